"""The two forms of an adapted layer: the paper's equations by hand, a dense one-hot oracle, and what backward keeps."""

from __future__ import annotations

import pytest
import torch
from layers import FORMS, TOLERANCE, VARIANTS, adapt, bits, config, error, fill, linear, one_hot, random_weight
from torch import Tensor

from multisbora.tuner.forms import Form
from multisbora.tuner.kernels import add_columns, add_rows

LEADING = {"(in,)": (), "(n, in)": (5,), "(b, t, in)": (2, 3), "(b, h, t, in)": (2, 2, 3)}

# --- the paper's equations, by hand -------------------------------------------------------------------------------

W0 = torch.arange(1.0, 17).reshape(4, 4)
X = torch.tensor([[1.0, 2, 3, 4], [0, 1, 0, -1]])
GOLDEN = {
    # equations 9 and 10: b is 4 x 2, columns 0 and 3
    "fa": (
        [[10.0, 20], [30, 40], [50, 60], [70, 80]],
        [[10.0, 0, 0, 20], [30, 0, 0, 40], [50, 0, 0, 60], [70, 0, 0, 80]],
        [[11.0, 2, 3, 24], [35, 6, 7, 48], [59, 10, 11, 72], [83, 14, 15, 96]],
        [[120.0, 260, 400, 540], [-22, -42, -62, -82]],
    ),
    # equations 11 and 12: a is 2 x 4, rows 0 and 3
    "fb": (
        [[10.0, 20, 30, 40], [50, 60, 70, 80]],
        [[10.0, 20, 30, 40], [0, 0, 0, 0], [0, 0, 0, 0], [50, 60, 70, 80]],
        [[11.0, 22, 33, 44], [5, 6, 7, 8], [9, 10, 11, 12], [63, 74, 85, 96]],
        [[330.0, 70, 110, 850], [-22, -2, -2, -22]],
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equations_9_to_12(variant: str, kind: str, form: Form) -> None:
    values, delta, merged, output = (torch.tensor(part) for part in GOLDEN[variant])
    layer = adapt(linear(W0, kind), form, default=config(variant, [0, 3]))
    fill(layer, "default", values)
    as_stored = (lambda w: w.t()) if kind == "conv1d" else (lambda w: w)
    assert torch.equal(layer.get_delta_weight("default"), as_stored(delta))
    assert torch.equal(layer(X), output)
    layer.merge()
    assert torch.equal(layer.base_layer.weight, as_stored(merged))
    assert torch.equal(layer(X), output)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, as_stored(W0))


# --- parity with a dense oracle -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_parity_with_dense_one_hot(
    variant: str, kind: str, dtype: torch.dtype, leading: tuple[int, ...], form: Form
) -> None:
    shape, indices, scale = (6, 9), [1, 2, 5], 4 / 3
    generator = torch.Generator().manual_seed(0)
    weight = random_weight(*shape, dtype=dtype)
    bias = torch.randn(shape[0], generator=generator).to(dtype)
    layer = adapt(linear(weight, kind, bias), form, default=config(variant, indices, alpha=4))
    values = torch.randn(layer.sbora_values["default"].shape, generator=generator)
    fill(layer, "default", values)
    x = torch.randn(*leading, shape[1], generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(*leading, shape[0], generator=generator).to(dtype)

    output = layer(x)
    assert output.shape == (*leading, shape[0]) and output.dtype == dtype
    output.backward(grad)

    oracle_x = x.detach().double().requires_grad_()
    oracle_values = values.double().requires_grad_()
    dense = weight.double() + scale * one_hot(variant, indices, oracle_values, shape)
    oracle = oracle_x @ dense.t() + bias.double()
    oracle.backward(grad.double())

    assert error(output, oracle) <= TOLERANCE[dtype]
    assert error(x.grad, oracle_x.grad) <= TOLERANCE[dtype]
    gradient = layer.sbora_values["default"].grad
    assert gradient is not None and gradient.dtype == torch.float32
    assert error(gradient, oracle_values.grad) <= TOLERANCE[dtype]
    assert layer.base_layer.weight.grad is None
    assert torch.equal(bits(layer.weight), bits(weight.t() if kind == "conv1d" else weight))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_input_without_gradient(variant: str, form: Form) -> None:
    layer = adapt(linear(random_weight()), form, default=config(variant, [0, 4]))
    x = torch.randn(5, 9)
    layer(x).square().sum().backward()
    wanted = layer.sbora_values["default"].grad
    layer.sbora_values["default"].grad = None
    layer(x.requires_grad_()).square().sum().backward()
    assert torch.equal(layer.sbora_values["default"].grad, wanted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_by_finite_differences(variant: str) -> None:
    kernel, shape = (add_columns, (4, 2)) if variant == "fa" else (add_rows, (2, 5))
    generator = torch.Generator().manual_seed(0)

    def make(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64, requires_grad=True)

    indices = torch.tensor([0, 3])
    assert torch.autograd.gradcheck(lambda h, x, u: kernel(h, x, u, indices), (make(3, 4), make(3, 5), make(*shape)))


@pytest.mark.parametrize(("form", "dropout"), [("in_place", 0.0), ("gather", 0.0), ("gather", 0.5)])
def test_fa_keeps_only_the_gathered_channels_for_backward(form: Form, dropout: float) -> None:
    tokens, in_features, rank = 50, 40, 3
    layer = adapt(linear(torch.randn(7, in_features)), form, default=config("fa", range(rank), dropout=dropout))
    x = torch.randn(tokens, in_features, requires_grad=True)
    saved: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    # Beside the gathered channels: the base weight, the update, the indices, and nothing that grows with the tokens.
    kept = (tokens, rank) if dropout else (rank, tokens)
    assert {shape for shape in saved if tokens in shape} == {kept}
    assert set(saved) <= {kept, (7, in_features), (in_features, 7), (7, rank), (rank, 7), (rank,)}


@pytest.mark.parametrize("form", FORMS)
def test_fb_keeps_the_input_and_nothing_of_the_output(form: Form) -> None:
    tokens, out_features = 50, 40
    layer = adapt(linear(torch.randn(out_features, 7)), form, default=config("fb", range(3)))
    saved: list[Tensor] = []
    x = torch.randn(tokens, 7, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    of_tokens = [tensor for tensor in saved if tokens in tensor.shape]
    assert [tensor.data_ptr() for tensor in of_tokens] == [x.data_ptr()]
