"""Updates written into the base weight: what is in it when, how W0 comes back, and that no gradient suffers."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from layers import (
    FORMS,
    TOLERANCE,
    VARIANTS,
    Net,
    adapt,
    bits,
    config,
    error,
    fill,
    layers_of,
    linear,
    one_hot,
    random_weight,
    two,
)
from peft import PeftModel
from torch import Tensor, nn

from multisbora.errors import UsageError
from multisbora.tuner import SboraConfig, SboraLayer
from multisbora.tuner.forms import Form

INDICES = [1, 2, 5]


def trained(variant: str = "fa", *, kind: str = "linear", dtype: torch.dtype = torch.bfloat16) -> SboraLayer:
    """A layer with one task whose values are not zero, which has run once and so holds it in its weight."""
    layer = adapt(linear(random_weight(dtype=dtype), kind), default=config(variant, INDICES))
    fill(layer, "default", torch.randn(layer.sbora_values["default"].shape))
    layer(torch.randn(2, 9).to(dtype))
    return layer


def stored(layer: SboraLayer) -> Tensor:
    """Bits of the weight as it is at this moment."""
    return bits(layer.base_layer.weight)


def base_bits(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return bits(random_weight(dtype=dtype))


# --- what the weight holds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_ran_is_bit_for_bit_what_is_merged(variant: str, kind: str, dtype: torch.dtype) -> None:
    layer = trained(variant, kind=kind, dtype=dtype)
    x = torch.randn(4, 9).to(dtype)
    live, output = stored(layer), layer(x)
    layer.merge()
    assert torch.equal(stored(layer), live)
    assert torch.equal(layer(x), output)
    layer.unmerge()
    base = base_bits(dtype)
    assert not torch.equal(live, base.t() if kind == "conv1d" else base)
    assert torch.equal(stored(layer), base.t() if kind == "conv1d" else base)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
}


class PastAutograd(torch.optim.SGD):
    """Steps through `.data`, as optimizers with a flat copy of the parameters do: no version is counted."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad, alpha=-group["lr"])


OPTIMIZERS["past autograd"] = lambda parameters: PastAutograd(parameters, lr=0.1)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_weight_follows_any_optimizer(variant: str, name: str) -> None:
    layer = trained(variant)
    values = layer.sbora_values["default"]
    optimizer = OPTIMIZERS[name]([values])
    x = torch.randn(5, 9).to(torch.bfloat16)
    for _ in range(3):
        before = values.detach().clone()
        layer(x).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(values, before)
        with torch.no_grad():
            layer(x)  # an evaluation right after the step
        fresh = adapt(linear(random_weight(dtype=torch.bfloat16)), default=config(variant, INDICES))
        fill(fresh, "default", values.detach())
        fresh.merge()
        assert torch.equal(stored(layer), stored(fresh))


def test_values_written_past_autograd_between_evaluations() -> None:
    layer = trained()
    values = layer.sbora_values["default"]
    x = torch.randn(5, 9).to(torch.bfloat16)

    def output() -> Tensor:
        with torch.no_grad():
            return layer(x)

    one = output()
    kept = values.detach().clone()
    values.data.mul_(2)  # an average of weights swapped in, and the mode switched
    layer.eval()
    two = output()
    assert not torch.equal(one, two)
    values.data.copy_(kept)
    layer.outdate()
    assert torch.equal(output(), one)
    values.data = 2 * kept
    assert torch.equal(output(), two)


def test_a_weight_of_zero_leaves_the_base_s_bits() -> None:
    layer = trained()
    layer.set_weight("default", 0.0)
    layer(torch.randn(2, 9).to(torch.bfloat16))
    assert torch.equal(stored(layer), base_bits())


# --- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_tasks_that_cross_and_have_lambdas(net: Net, form: Form, dtype: torch.dtype) -> None:
    model = two(net).to(dtype).train()
    for layer in layers_of(model).values():
        for values in layer.sbora_values.values():
            values.data = values.data.float()
    model.base_model.set_adapter(["math", "code"])
    model.base_model.set_weight("math", 0.5)
    model.base_model.set_weight("code", -1.25)
    model.base_model.set_form(form)
    layer = layers_of(model)["layers.0.up"]
    x = torch.randn(4, 8, dtype=dtype, requires_grad=True)
    grad = torch.randn(4, 12, dtype=dtype)
    output = layer(x)
    output.backward(grad)

    oracle = {name: layer.sbora_values[name].detach().double().requires_grad_() for name in ("math", "code")}
    masked = oracle["code"] * (~torch.isin(torch.arange(8), layer.sbora_excluded["code"]))
    dense = layer.get_base_layer().weight.detach().double()
    dense = dense + 0.5 * one_hot("fa", [1, 4, 6], oracle["math"], (12, 8))
    dense = dense - 1.25 * 2 * one_hot("fb", [0, 2, 7], masked, (12, 8))
    oracle_x = x.detach().double().requires_grad_()
    wanted = oracle_x @ dense.t() + layer.base_layer.bias.double()
    wanted.backward(grad.double())
    assert error(output, wanted) <= TOLERANCE[dtype]
    assert error(x.grad, oracle_x.grad) <= TOLERANCE[dtype]
    for name, values in oracle.items():
        assert error(layer.sbora_values[name].grad, values.grad) <= TOLERANCE[dtype]


def disable(model: PeftModel, x: Tensor) -> None:
    with torch.no_grad(), model.disable_adapter():
        model(x)


def other_lambda(model: PeftModel, x: Tensor) -> None:
    model.base_model.set_weight("math", 3.0)
    with torch.no_grad():
        model(x)
    model.base_model.set_weight("math", 1.0)


def other_task(model: PeftModel, x: Tensor) -> None:
    model.base_model.set_adapter("code", inference_mode=True)
    with torch.no_grad():
        model(x)
    model.base_model.set_adapter("math")


def saved(model: PeftModel, x: Tensor) -> None:
    model.state_dict()


def evaluated(model: PeftModel, x: Tensor) -> None:
    model.eval()
    with torch.no_grad():
        model(x)
    model.train()


BETWEEN = (disable, other_lambda, other_task, saved, evaluated)


@pytest.mark.parametrize("between", BETWEEN, ids=lambda f: f.__name__)
def test_what_happens_between_forward_and_backward_changes_no_gradient(
    net: Net, between: Callable[[PeftModel, Tensor], None]
) -> None:
    model = two(net).train()
    model.base_model.set_adapter("math")
    x = torch.randn(3, 8, requires_grad=True)

    def gradients(interrupt: bool) -> list[Tensor]:
        model.zero_grad()
        x.grad = None
        loss = model(x).square().sum()
        if interrupt:
            between(model, torch.randn(2, 8))
        loss.backward()
        found = [p.grad for name, p in model.named_parameters() if ".sbora_values.math" in name]
        return [gradient.clone() for gradient in (*found, x.grad)]

    for quiet, interrupted in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(quiet, interrupted) and quiet.any()


def test_two_lambdas_in_one_graph(net: Net) -> None:
    model = two(net).train()
    model.base_model.set_adapter(["math", "code"])
    x = torch.randn(3, 8, requires_grad=True)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        x.grad = None
        model.base_model.set_weight("math", 1.0)
        one = model(x)
        model.base_model.set_weight("math", -0.5)
        (one * model(x)).sum().backward()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        return [gradient.clone() for gradient in (*found, x.grad)]

    live = gradients()
    model.base_model.set_form("gather")
    for one, other in zip(live, gradients(), strict=True):
        assert error(one, other) < 1e-5


def test_values_changed_between_forward_and_backward_are_refused(net: Net) -> None:
    model = two(net).train()
    output = model(torch.randn(3, 8))
    with torch.no_grad():
        layers_of(model)["layers.0.up"].sbora_values["math"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("variant", VARIANTS)
def test_micro_batches_add_up(variant: str) -> None:
    layer = trained(variant, dtype=torch.float32)
    values = layer.sbora_values["default"]
    x = torch.randn(6, 9)
    layer(x).square().sum().backward()
    whole, values.grad = values.grad, None
    for part in x.split(2):
        layer(part).square().sum().backward()
    assert error(values.grad, whole) < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast(form: Form, variant: str) -> None:
    layer = trained(variant, dtype=torch.float32)
    layer.form = form
    x = torch.randn(4, 9, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    values = layer.sbora_values["default"]
    oracle_x, oracle_values = (t.detach().double().requires_grad_() for t in (x, values))
    dense = random_weight().double() + one_hot(variant, INDICES, oracle_values, layer.shape)
    wanted = oracle_x @ dense.t()
    wanted.square().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert error(output, wanted) < 2e-2
    assert error(x.grad, oracle_x.grad) < 3e-2
    assert error(values.grad, oracle_values.grad) < 3e-2
    assert layer.base_layer.weight.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing does
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_compile(form: Form, variant: str) -> None:
    layer = trained(variant, dtype=torch.float32)  # its weight holds the task: the compiled function must not add it
    layer.form = form
    x = torch.randn(4, 9, requires_grad=True)

    def run(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x.grad = layer.sbora_values["default"].grad = None
        output = function(x)
        output.square().sum().backward()
        return [output.detach(), x.grad, layer.sbora_values["default"].grad]  # type: ignore[list-item]

    compiled = torch.compile(layer, backend="aot_eager")
    wanted = run(layer)
    for _ in range(2):
        for got, eager in zip(run(compiled), wanted, strict=True):
            assert error(got, eager) < 1e-5
        with torch.no_grad():
            layer(x)  # writes the task into the weight again
    torch._dynamo.reset()


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_input_s_gradient_where_no_value_is_trained(variant: str) -> None:
    layer = trained(variant, dtype=torch.float32)
    layer.requires_grad_(False)
    x = torch.randn(4, 9, requires_grad=True)
    output = layer(x)
    with torch.no_grad():
        layer.enable_adapters(False)
        layer(x)
        layer.enable_adapters(True)
    output.sum().backward()
    dense = random_weight() + one_hot(variant, INDICES, layer.sbora_values["default"], layer.shape).float()
    assert error(x.grad, dense.sum(0).expand(4, 9)) < 1e-5


# --- the way back -------------------------------------------------------------------------------------------------


def save_state(layer: SboraLayer) -> Tensor:
    return layer.state_dict()["base_layer.weight"]


def save_whole(layer: SboraLayer) -> Tensor:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded: SboraLayer = torch.load(buffer, weights_only=False)
    return loaded.base_layer.weight


def deep_copy(layer: SboraLayer) -> Tensor:
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 9).to(torch.bfloat16)
    assert torch.equal(twin(x), layer(x))
    fill(twin, "default", torch.zeros(6, 3))
    twin(x)
    return twin.base_layer.weight


def disabled(layer: SboraLayer) -> Tensor:
    layer.enable_adapters(False)
    layer(torch.randn(2, 9).to(torch.bfloat16))
    return layer.base_layer.weight


def deleted(layer: SboraLayer) -> Tensor:
    layer.delete_adapter("default")
    return layer.base_layer.weight


def replaced(layer: SboraLayer) -> Tensor:
    layer.update_layer("default", config("fb", [0, 3]), "lin")
    layer(torch.randn(2, 9).to(torch.bfloat16))
    return layer.base_layer.weight


def inactive(layer: SboraLayer) -> Tensor:
    layer.set_adapter([])
    layer(torch.randn(2, 9).to(torch.bfloat16))
    return layer.base_layer.weight


def widened(layer: SboraLayer) -> Tensor:
    weight = layer.float().base_layer.weight
    assert weight.dtype == torch.float32
    return weight.bfloat16()


def gathered(layer: SboraLayer) -> Tensor:
    layer.form = "gather"
    layer(torch.randn(2, 9).to(torch.bfloat16))
    return layer.base_layer.weight


def merged_and_back(layer: SboraLayer) -> Tensor:
    layer.merge()
    copy.deepcopy(layer)
    layer.unmerge()
    return layer.base_layer.weight


WAYS_BACK: dict[str, Callable[[SboraLayer], Tensor]] = {
    f.__name__: f
    for f in (
        save_state,
        save_whole,
        deep_copy,
        disabled,
        deleted,
        replaced,
        inactive,
        widened,
        gathered,
        merged_and_back,
    )
} | {
    "restore": lambda layer: (layer.restore(), layer.base_layer.weight)[1],
    "weight": lambda layer: layer.weight,
    "get_base_layer": lambda layer: layer.get_base_layer().weight,
}


@pytest.mark.parametrize("way", WAYS_BACK)
def test_the_base_comes_back_bit_for_bit(way: str) -> None:
    layer = trained()
    assert not torch.equal(stored(layer), base_bits())
    assert torch.equal(bits(WAYS_BACK[way](layer)), base_bits())


def test_a_merged_copy_can_be_unmerged(net: Net) -> None:
    model = two(net)
    before = [bits(layer.weight) for layer in layers_of(model).values()]
    model.merge_adapter(["math", "code"])
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    for layer, wanted in zip(layers_of(twin).values(), before, strict=True):
        assert torch.equal(stored(layer), wanted)
    assert not torch.equal(stored(layers_of(model)["layers.0.up"]), before[0])


def test_unload_and_saved_folders_have_the_base(net: Net, tmp_path: Path) -> None:
    before = {name: bits(tensor) for name, tensor in net.state_dict().items()}
    model = two(net)
    model.base_model.set_adapter(["math", "code"])
    x = torch.randn(3, 8)
    output = model(x)
    model.save_pretrained(tmp_path, selected_adapters=["math"])
    assert torch.equal(model(x), output)
    base = model.unload()
    assert {name: bits(tensor).tolist() for name, tensor in base.state_dict().items()} == {
        name: value.tolist() for name, value in before.items()
    }


def test_another_base_loaded_over_a_live_weight() -> None:
    other = torch.full((6, 9), 0.5, dtype=torch.bfloat16)
    for assign in (False, True):
        layer = trained()
        state = {**layer.state_dict(), "base_layer.weight": other.clone()}
        layer(torch.randn(2, 9).to(torch.bfloat16))
        layer.load_state_dict(state, assign=assign)
        layer(torch.randn(2, 9).to(torch.bfloat16))
        assert not torch.equal(stored(layer), bits(other))
        assert torch.equal(bits(layer.weight), bits(other))


def test_a_weight_written_behind_our_back() -> None:
    """The same content once more, as DistributedDataParallel broadcasts it, is ours; from another W0 cannot be had."""
    layer = trained()
    weight = layer.base_layer.weight
    with torch.no_grad():
        weight.copy_(weight.clone())
    layer(torch.randn(2, 9).to(torch.bfloat16))
    assert torch.equal(bits(layer.weight), base_bits())
    changes: list[Callable[[], Any]] = [
        lambda: weight.mul_(0.5),
        lambda: weight.fill_(0.5),
        lambda: setattr(weight, "data", torch.zeros(6, 9, dtype=torch.bfloat16)),
    ]
    for change in changes:
        layer(torch.randn(2, 9).to(torch.bfloat16))
        kept = weight.data.clone()
        with torch.no_grad():
            change()
        with pytest.raises(UsageError, match="changed while the updates of default were in it: call restore"):
            layer(torch.randn(2, 9).to(torch.bfloat16))
        weight.data = kept
        layer.restore()
        assert torch.equal(stored(layer), base_bits())


def test_another_base_under_merged_tasks_is_refused() -> None:
    layer = trained()
    layer.merge()
    layer.load_state_dict({**layer.state_dict(), "base_layer.weight": torch.zeros(6, 9, dtype=torch.bfloat16)})
    with pytest.raises(UsageError, match="or unmerge"):
        layer.unmerge()


def test_merged_between_forward_and_backward(net: Net) -> None:
    model = two(net).train()
    before = bits(layers_of(model)["layers.0.up"].weight)
    loss = model(torch.randn(3, 8)).sum()
    model.merge_adapter(["math"])
    with pytest.raises(UsageError, match="unmerge them before backward"):
        loss.backward()
    model.unmerge_adapter()
    loss = model(torch.randn(3, 8)).sum()
    loss.backward()
    plain = model.unload()
    assert torch.equal(bits(plain.layers[0]["up"].weight), before)


def test_unloaded_between_forward_and_backward(net: Net) -> None:
    model = two(net).train()
    before = bits(layers_of(model)["layers.0.up"].weight)
    loss = model(torch.randn(3, 8, requires_grad=True)).sum()
    plain = model.unload()
    with pytest.raises(UsageError, match="unloaded since forward"):
        loss.backward()
    assert torch.equal(bits(plain.layers[0]["up"].weight), before)


def test_an_average_of_the_parameters_is_of_the_base_s(net: Net) -> None:
    """torch's own goes through parameters(), which hands W0 out."""
    model = two(net).train()
    model.base_model.set_adapter(["math", "code"])
    x = torch.randn(3, 8)
    average = torch.optim.swa_utils.AveragedModel(model)
    before = {name: bits(layer.weight) for name, layer in layers_of(model).items()}
    for _ in range(3):
        model(x)
        average.update_parameters(model)
    averaged = layers_of(average.module)
    assert {name: bits(averaged[name].weight).tolist() for name in before} == {n: b.tolist() for n, b in before.items()}
    assert error(average(x), model(x)) < 1e-6


def test_threads_share_a_model() -> None:
    torch.manual_seed(0)
    layers = [adapt(linear(torch.randn(256, 256)), default=config("fa", range(64))) for _ in range(4)]
    bases = [bits(layer.weight) for layer in layers]
    for layer in layers:
        fill(layer, "default", torch.randn(256, 64))
    x = torch.randn(8, 256)

    def outputs() -> list[Tensor]:
        with torch.no_grad():
            return [layer(x) for layer in layers]

    wanted = outputs()
    for _ in range(20):
        for layer in layers:
            layer.restore()
        with ThreadPoolExecutor(4) as pool:
            found = [job.result() for job in [pool.submit(outputs) for _ in range(4)]]
        assert all(torch.equal(one, other) for each in found for one, other in zip(each, wanted, strict=True))
    assert all(torch.equal(bits(layer.weight), base) for layer, base in zip(layers, bases, strict=True))


@pytest.mark.parametrize("moment", range(12))
def test_an_interrupt_loses_nothing(moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C right after one of the calls of torch that read or write a weight."""
    layer = trained()
    x = torch.randn(2, 9).to(torch.bfloat16)
    layer.restore()
    left = moment

    def interrupting(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            nonlocal left
            result = original(*args)
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return result

        return call

    with monkeypatch.context() as patch:
        for name in ("index_copy_", "index_select"):
            patch.setattr(Tensor, name, interrupting(getattr(Tensor, name)))
        with contextlib.suppress(KeyboardInterrupt), torch.no_grad():
            for _ in range(4):
                layer(x)
                layer.restore()
    layer.restore()
    assert torch.equal(stored(layer), base_bits())


def test_adapters_that_share_cells_are_written_over_one_another() -> None:
    layer = adapt(linear(random_weight(dtype=torch.bfloat16)), one=config("fa", [1, 2, 5]), two=config("fb", [0, 2, 3]))
    x = torch.randn(4, 9).to(torch.bfloat16)
    optimizer = torch.optim.SGD(layer.sbora_values.parameters(), lr=0.1)
    for _ in range(3):
        layer(x).float().square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        output = layer(x)
    layer.form = "gather"
    assert error(layer(x), output) <= TOLERANCE[torch.bfloat16]
    assert torch.equal(bits(layer.weight), base_bits())


class Story(RuleBasedStateMachine):
    """One bf16 layer with three tasks, some of which cross or share cells, through whatever a program does to it. After
    every step its outputs are those of a dense oracle, and at the end its base is what it was, bit for bit."""

    TASKS: ClassVar[dict[str, SboraConfig]] = {
        "math": config("fa", [1, 2, 5]),
        "code": config("fb", [0, 2, 3], excluded={"lin": [1, 2, 5]}),
        "chat": config("fb", [2, 5], alpha=4),
    }

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = random_weight(dtype=torch.bfloat16)
        self.layer = adapt(linear(self.base.clone()), **self.TASKS)
        self.count = 0

    def _random(self, *shape: int) -> Tensor:
        self.count += 1
        return torch.randn(*shape, generator=torch.Generator().manual_seed(self.count))

    @rule(task=st.sampled_from(sorted(TASKS)), past_autograd=st.booleans())
    def write(self, task: str, past_autograd: bool) -> None:
        values = self.layer.sbora_values[task]
        drawn = self._random(*values.shape)
        if past_autograd:
            values.data = drawn
        else:
            fill(self.layer, task, drawn)

    @rule(names=st.lists(st.sampled_from(sorted(TASKS)), unique=True))
    def activate(self, names: list[str]) -> None:
        self.layer.set_adapter(names)

    @rule(task=st.sampled_from(sorted(TASKS)), weight=st.sampled_from([0.0, 1.0, -0.5]))
    def reweigh(self, task: str, weight: float) -> None:
        self.layer.set_weight(task, weight)

    @rule(form=st.sampled_from(FORMS))
    def choose(self, form: Form) -> None:
        self.layer.form = form

    @rule()
    def evaluate(self) -> None:
        with torch.no_grad():
            self.layer(self._random(2, 9).to(torch.bfloat16))

    @precondition(lambda self: self.layer.active_adapters)
    @rule()
    def train(self) -> None:
        names = self.layer.active_adapters
        self.layer(self._random(3, 9).to(torch.bfloat16)).float().square().sum().backward()
        with torch.no_grad():
            for name in names:
                values = self.layer.sbora_values[name]
                assert values.grad is not None
                values.sub_(0.1 * values.grad / values.grad.norm().clamp(min=1e-6))
                values.grad = None

    @rule(task=st.sampled_from(sorted(TASKS)))
    def write_twice(self, task: str) -> None:
        values = self.layer.sbora_values[task]
        for _ in range(2):
            values.data = self._random(*values.shape)

    @precondition(lambda self: self.layer.active_adapters)
    @rule()
    def merge_and_back(self) -> None:
        self.layer.merge()
        self.layer(self._random(2, 9).to(torch.bfloat16))
        self.layer.unmerge()

    @rule()
    def copy(self) -> None:
        self.layer = copy.deepcopy(self.layer)

    @rule()
    def save(self) -> None:
        assert torch.equal(bits(self.layer.state_dict()["base_layer.weight"]), bits(self.base))

    @invariant()
    def outputs_are_the_oracle_s(self) -> None:
        x = self._random(4, 9).to(torch.bfloat16)
        dense = self.base.double()
        for name in self.layer.active_adapters:
            dense = dense + self.layer.get_delta_weight(name).double()
        with torch.no_grad():
            assert error(self.layer(x), x.double() @ dense.t()) <= TOLERANCE[torch.bfloat16]

    def teardown(self) -> None:
        assert torch.equal(bits(self.layer.weight), bits(self.base))


Story.TestCase.settings = settings(deadline=None, max_examples=40, stateful_step_count=25)
test_any_story_of_a_layer = Story.TestCase
