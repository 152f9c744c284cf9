"""Slopes by lambda: those of the dense model, in every form, at every lambda; and nothing else is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import FORMS, TOLERANCE, Net, adapt, config, error, fill, layers_of, linear, one_hot, random_weight, two
from torch import Tensor
from torch.nn import functional as F

from multisbora.tuner import SboraLayer
from multisbora.tuner.forms import Form
from multisbora.tuner.slopes import lambda_slopes

SHAPE = (6, 9)
OWN = {"math": ("fa", [1, 4, 7]), "law": ("fa", [0, 8]), "chat": ("fb", [0, 3])}
LAMBDAS = [{"math": 1.0, "law": 0.3, "chat": 1.7}, {"math": 0.0, "law": 0.0, "chat": 0.0}, {"math": -0.5, "law": 1.0}]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(form: Form, kind: str, dtype: torch.dtype, lambdas: dict[str, float]) -> tuple[SboraLayer, Tensor]:
    """Three tasks of both variants on one layer, and its weight."""
    weight = random_weight(*SHAPE, dtype)
    configs = {task: config(variant, own, alpha=2 * len(own)) for task, (variant, own) in OWN.items()}
    layer = adapt(linear(weight, kind), form, **configs)
    for number, (task, (variant, own)) in enumerate(OWN.items()):
        fill(layer, task, drawn(*((SHAPE[0], len(own)) if variant == "fa" else (len(own), SHAPE[1])), seed=number))
        layer.sbora_values[task].requires_grad_(False)
        layer.set_weight(task, lambdas.get(task, 1.0))
    layer.set_adapter([task for task in OWN if task in lambdas], inference_mode=True)
    return layer, weight


def oracle(layer: SboraLayer, weight: Tensor, lambdas: dict[str, float], x: Tensor, grad: Tensor) -> dict[str, float]:
    """The same by autograd, of dense matrices in fp64."""
    leaves = {task: torch.tensor(value, dtype=torch.float64, requires_grad=True) for task, value in lambdas.items()}
    dense = weight.double()
    for task, leaf in leaves.items():
        variant, own = OWN[task]
        dense = dense + leaf * 2.0 * one_hot(variant, own, layer.sbora_values[task].detach(), SHAPE)
    F.linear(x.double(), dense).backward(grad.double())
    return {task: float(leaf.grad) for task, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("lambdas", LAMBDAS, ids=["some", "zero", "negative, one inactive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("form", FORMS)
def test_slopes_are_those_of_the_dense_model(
    form: Form, kind: str, dtype: torch.dtype, lambdas: dict[str, float]
) -> None:
    layer, weight = layer_of(form, kind, dtype, lambdas)
    x = drawn(2, 5, SHAPE[1], seed=7).to(dtype).requires_grad_()
    grad = drawn(2, 5, SHAPE[0], seed=8).to(dtype)
    with lambda_slopes({"lin": layer}) as found:
        layer(x).backward(grad)
    wanted = oracle(layer, weight, lambdas, x.detach(), grad)
    assert wanted and found["lin"].keys() == wanted.keys()
    got = torch.stack([found["lin"][task] for task in wanted])
    assert got.dtype == torch.float32
    assert error(got, torch.tensor(list(wanted.values()))) < 5 * TOLERANCE[dtype]
    assert all(values.grad is None for values in layer.sbora_values.values())


@pytest.mark.parametrize("form", FORMS)
def test_slopes_where_a_lambda_reaches_the_values_of_all(form: Form) -> None:
    """As in a corrected merge: dense weights of all reaches in fp64, the cells of a task set to their sum."""
    lambdas = {"math": 1.0, "law": 0.3, "chat": 1.7}
    layer, weight = layer_of(form, "linear", torch.float32, dict.fromkeys(lambdas, 1.0))
    sizes = {task: layer.sbora_values[task].shape for task in OWN}
    spread = {
        task: {other: drawn(*size, seed=10 * row + column) for column, (other, size) in enumerate(sizes.items())}
        for row, task in enumerate(OWN)
    }
    del spread["law"]["chat"]
    leaves = {task: torch.tensor(value, dtype=torch.float64, requires_grad=True) for task, value in lambdas.items()}
    dense = weight.double()
    for task, reach in spread.items():
        for other, values in reach.items():
            dense = dense + leaves[task] * one_hot(*OWN[other], values, SHAPE)
    for other in OWN:
        layer.scaling[other] = 1.0
        fill(layer, other, sum(lambdas[task] * reach[other] for task, reach in spread.items() if other in reach))
        layer.sbora_values[other].requires_grad_(False)
    x = drawn(2, 5, SHAPE[1], seed=7).requires_grad_()
    grad = drawn(2, 5, SHAPE[0], seed=8)
    with lambda_slopes({"lin": layer}, {"lin": spread}) as found:
        layer(x).backward(grad)
    F.linear(x.detach().double(), dense).backward(grad.double())
    assert found["lin"].keys() == leaves.keys()
    wanted = torch.tensor([float(leaf.grad) for leaf in leaves.values() if leaf.grad is not None])
    assert error(torch.stack([found["lin"][task] for task in leaves]), wanted) < 5 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("form", FORMS)
def test_slopes_by_channel(form: Form) -> None:
    """A lambda for each column of fa and each row of fb, against dense weights in fp64."""
    layer, weight = layer_of(form, "linear", torch.float32, dict.fromkeys(OWN, 1.0))
    spread = {task: {task: drawn(*layer.sbora_values[task].shape, seed=row)} for row, task in enumerate(OWN)}
    leaves, dense = {}, weight.double()
    for task, reach in spread.items():
        variant, indices = OWN[task]
        axis = 1 if variant == "fa" else 0
        leaf = drawn(len(indices), seed=30).double().requires_grad_()
        leaves[task] = leaf
        dense = dense + one_hot(variant, indices, reach[task].double() * leaf.unsqueeze(1 - axis), SHAPE)
        layer.scaling[task] = 1.0
        fill(layer, task, (reach[task] * leaf.detach().float().unsqueeze(1 - axis)))
        layer.sbora_values[task].requires_grad_(False)
    x = drawn(2, 5, SHAPE[1], seed=7).requires_grad_()
    grad = drawn(2, 5, SHAPE[0], seed=8)
    with lambda_slopes({"lin": layer}, {"lin": spread}, by_channel=True) as found:
        layer(x).backward(grad)
    F.linear(x.detach().double(), dense).backward(grad.double())
    for task, leaf in leaves.items():
        assert leaf.grad is not None and found["lin"][task].shape == leaf.shape
        assert error(found["lin"][task], leaf.grad) < 5 * TOLERANCE[torch.float32]


def test_cells_of_earlier_claims_have_no_say(net: Net) -> None:
    """Of a net of several layers, by differences of the loss itself; code's rows cross math's columns."""
    model = two(net.double())
    for layer in layers_of(model).values():
        layer.sbora_values.double()
        layer.sbora_values.requires_grad_(False)
    model.base_model.set_adapter(["math", "code"], inference_mode=True)
    layers = layers_of(model)
    x = drawn(3, 8, seed=5).double().requires_grad_()

    def loss() -> Tensor:
        found: Tensor = model(x).square().sum()
        return found

    with lambda_slopes(layers) as found:
        loss().backward()
    for name, layer in layers.items():
        for task in ("math", "code"):
            ends = []
            for weight in (1.001, 0.999):
                layer.set_weight(task, weight)
                ends.append(float(loss().detach()))
            layer.set_weight(task, 1.0)
            slope = (ends[0] - ends[1]) / 0.002
            assert float(found[name][task]) == pytest.approx(slope, rel=1e-3, abs=1e-3), (name, task)


def test_backwards_add_up_and_the_block_leaves_nothing_behind() -> None:
    layer, _ = layer_of("in_place", "linear", torch.float32, LAMBDAS[0])
    x = drawn(4, SHAPE[1], seed=1).requires_grad_()

    def slopes(times: int) -> dict[str, Tensor]:
        with lambda_slopes({"lin": layer}) as found:
            for _ in range(times):
                layer(x).sum().backward()
        return found["lin"]

    once, twice = slopes(1), slopes(2)
    assert all(torch.equal(2 * once[task], twice[task]) for task in OWN)
    assert not layer._forward_hooks


@pytest.mark.parametrize("why", ["no gradient", "disabled", "frozen input"])
def test_without_a_backward_through_tasks_there_is_no_slope(why: str) -> None:
    layer, _ = layer_of("gather", "linear", torch.float32, LAMBDAS[0])
    x = drawn(4, SHAPE[1], seed=1).requires_grad_(why != "frozen input")
    if why == "disabled":
        layer.enable_adapters(False)
    context: Any = torch.no_grad() if why == "no gradient" else torch.enable_grad()
    with lambda_slopes({"lin": layer}) as found, context:
        output = layer(x)
        if output.requires_grad:
            output.sum().backward()
    assert not found
