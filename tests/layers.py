"""Adapted layers and small nets in memory, for tests of the tuner."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from multisbora.tuner import SboraConfig, SboraLayer
from multisbora.tuner.forms import Form

VARIANTS = ("fa", "fb")
# Largest error against the fp64 oracle, as a share of the oracle's largest entry: a few roundings of each dtype.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
FORMS: tuple[Form, ...] = ("in_place", "gather")


def linear(weight: Tensor, kind: str = "linear", bias: Tensor | None = None) -> nn.Module:
    """A base layer that computes x @ weight^T + bias, whatever it stores; `weight` is (out, in)."""
    out_features, in_features = weight.shape
    base: nn.Module = Conv1D(out_features, in_features) if kind == "conv1d" else nn.Linear(in_features, out_features)
    base.to(weight.dtype).requires_grad_(False)
    base.weight.data = (weight.t() if kind == "conv1d" else weight).clone().contiguous()
    base.bias.data = torch.zeros(out_features, dtype=weight.dtype) if bias is None else bias.clone()
    return base


def adapt(base: nn.Module, form: Form = "in_place", **configs: SboraConfig) -> SboraLayer:
    """A layer with one adapter a keyword, all of them active."""
    layer = SboraLayer(base)
    layer.form = form
    for name, config in configs.items():
        layer.update_layer(name, config, "lin")
    layer.set_adapter(list(configs))
    return layer


def config(variant: str, indices: Iterable[int], **kwargs: Any) -> SboraConfig:
    chosen = sorted(indices)
    kwargs = {"r": len(chosen), "alpha": len(chosen)} | kwargs
    return SboraConfig(variant=variant, indices={"lin": chosen}, **kwargs)  # type: ignore[arg-type]


def fill(layer: SboraLayer, name: str, values: Tensor) -> None:
    with torch.no_grad():
        layer.sbora_values[name].copy_(values)


def one_hot(variant: str, indices: Sequence[int], values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Delta W as the paper writes it: a product with a matrix of one-hot vectors, in fp64."""
    basis = torch.zeros(len(indices), shape[1] if variant == "fa" else shape[0], dtype=torch.float64)
    basis[range(len(indices)), list(indices)] = 1
    return values.double() @ basis if variant == "fa" else basis.t() @ values.double()


def random_weight(out_features: int = 6, in_features: int = 9, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(1)).to(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).clone()


def error(got: Tensor | None, wanted: Tensor | None) -> float:
    assert got is not None and wanted is not None and got.shape == wanted.shape
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).abs().max() / wanted.abs().max())


class Net(nn.Module):
    """Two blocks of two linear layers: enough for names, patterns and several targets."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = x + block["down"](torch.tanh(block["up"](x)))
        return x


def layers_of(model: nn.Module) -> dict[str, SboraLayer]:
    found = {
        name.removeprefix("base_model.model."): m for name, m in model.named_modules() if isinstance(m, SboraLayer)
    }
    assert found
    return found


def randomise(model: nn.Module, *names: str, spread: float = 0.1, seed: int = 0) -> None:
    """Values as if trained; excluded cells stay as they are, at zero."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers_of(model).values():
        for name in names or ("default",):
            if name in layer.sbora_values:
                values = layer.sbora_values[name]
                drawn = torch.randn(values.shape, generator=generator) * spread
                if name in layer.sbora_excluded:
                    drawn.index_fill_(0 if layer.variant[name] == "fa" else 1, layer.sbora_excluded[name], 0)
                values.data.copy_(drawn)


KINDS = ("up", "down")


def two(net: Net, **kwargs: Any) -> PeftModel:
    """One fa and one fb adapter on the same layers; where they cross, the cells are math's."""
    columns, rows = [1, 4, 6], [0, 2, 7]
    first = SboraConfig(variant="fa", r=3, alpha=3, indices={f"layers.{i}.{n}": columns for i in (0, 1) for n in KINDS})
    second = SboraConfig(
        variant="fb",
        r=3,
        alpha=6,
        indices={f"layers.{i}.{n}": rows for i in (0, 1) for n in KINDS},
        excluded={f"layers.{i}.{n}": columns for i in (0, 1) for n in KINDS},
        **kwargs,
    )
    model = get_peft_model(net, first, adapter_name="math")
    model.add_adapter("code", second)
    randomise(model, "math", "code")
    return model.eval()
