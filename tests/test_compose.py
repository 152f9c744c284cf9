"""Tasks that are switched on and off in a running model: exactly those, at their lambdas, and exactly back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from builders import draw_regions, tiny_gpt2, tiny_llama, write_adapter
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from layers import TOLERANCE, Net, bits, error, randomise
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from multisbora import SboraConfig, composed, merge
from multisbora.errors import UsageError
from multisbora.geometry import from_checkpoint
from multisbora.loading import load_model

NAMES = [f"layers.{i}.{kind}" for i in (0, 1) for kind in ("up", "down")]
COLUMNS, ROWS = {"math": [1, 4, 6], "code": [0, 2], "law": [3, 5]}, {"chat": [0, 2, 7]}
TASKS = ("math", "chat", "code", "law")  # chat's rows cross the columns of the others: math's keep the cells


def mixed(net: nn.Module, **kwargs: Any) -> PeftModel:
    """Three fa tasks and an fb task on the small net, no two of which share a cell; frozen, and math active."""
    taken = {"chat": COLUMNS["math"], "code": ROWS["chat"], "law": ROWS["chat"]}
    configs = {}
    for task in TASKS:
        own = COLUMNS.get(task) or ROWS[task]
        configs[task] = SboraConfig(
            variant="fa" if task in COLUMNS else "fb",
            r=len(own),
            alpha=2 * len(own),
            indices={name: own for name in NAMES},
            excluded={name: taken[task] for name in NAMES} if task in taken else {},
            **kwargs,
        )
    model = get_peft_model(net, configs["math"], adapter_name="math")
    for task in TASKS[1:]:
        model.add_adapter(task, configs[task])
    randomise(model, *TASKS)
    model.base_model.set_adapter("math", inference_mode=True)
    return model.eval()


def raw(model: PeftModel) -> dict[str, Tensor]:
    """Bits of the adapted weights as they are in memory at this moment."""
    return {name: bits(layer.base_layer.weight) for name, layer in model.base_model.named_layers()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    assert one and one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def base_of(model: PeftModel) -> dict[str, Tensor]:
    model.base_model.restore()
    return raw(model)


def oracle(model: PeftModel, base: Mapping[str, Tensor], lambdas: Mapping[str, Any]) -> dict[str, Tensor]:
    """W0 + lambda * s * values in each task's own cells: one product and one sum in fp32, rounded once."""
    found = {}
    for name, layer in model.base_model.named_layers():
        dtype = layer.base_layer.weight.dtype
        dense = base[name].view(dtype).clone()
        for task, value in lambdas.items():
            weight = value if isinstance(value, float) else value.get(name.rpartition(".")[2], value["default"])
            matrix, values = (dense, layer.sbora_values[task].detach())  # (out, r) of fa
            taken = set(model.peft_config[task].excluded.get(name, []))
            if task in ROWS:
                matrix, values = matrix.t(), values.t()
            mine = [line for line in range(len(matrix)) if line not in taken]
            for own, column in enumerate(COLUMNS.get(task) or ROWS[task]):
                if weight:
                    after = matrix[mine, column].float() + values[mine, own] * (weight * 2.0)
                    matrix[mine, column] = after.to(dtype)
        found[name] = bits(dense)
    return found


def state(model: PeftModel) -> tuple[Any, ...]:
    """All that says what is active, at which lambda, and what is trained."""
    tuner = model.base_model
    layers = {name: (layer.mix, list(layer.merged_adapters)) for name, layer in tuner.named_layers()}
    return tuner.active_adapter, list(tuner.active_adapters), model.active_adapter, layers


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))


def forward(model: PeftModel) -> Tensor:
    with torch.no_grad():
        return model(X.to(next(iter(model.base_model.named_layers()))[1].base_layer.weight.dtype))


# --- the same as merged files -------------------------------------------------------------------------------------

WEIGHTS: dict[str, dict[str, Any]] = {
    "all": {"one": 1.0, "two": 0.37, "three": -0.6},
    "some": {"two": 1.0},
    "none of one": {"one": 0.0, "three": 0.8},
    "patterns": {"one": {"default": 1.0, "q_proj|c_attn": 0.5, "layers.1.*|h.1.*": 0.0}, "two": {"default": 0.25}},
}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=list(WEIGHTS))
@pytest.mark.parametrize("kind", ["llama bfloat16", "llama float32", "gpt2 bfloat16"])
def test_a_composition_computes_with_the_weights_of_merged_files(
    kind: str, weights: dict[str, Any], tmp_path: Path
) -> None:
    architecture, dtype = kind.split()
    base = (tiny_llama if architecture == "llama" else tiny_gpt2)(tmp_path / "base", dtype=dtype)
    geometry = from_checkpoint(base)
    variants = {"one": "fa", "two": "fb", "three": "fa"}
    regions = draw_regions(geometry, variants)
    excluded = {"two": regions["one"], "three": regions["two"]}
    folders = {
        task: write_adapter(
            tmp_path / task, geometry, task, variant=variant, indices=regions[task], excluded=excluded.get(task), seed=i
        )
        for i, (task, variant) in enumerate(variants.items())
    }
    merge(base, [folders[task] for task in weights], weights, output=tmp_path / "merged", allow_base_mismatch=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    model, _ = load_model(base, adapters=list(folders.values()))
    ids = torch.arange(3, 40)[None]
    before = base_of(model)
    with composed(model, weights), torch.no_grad():
        assert torch.equal(model(ids).logits, merged(ids).logits)
        assert same(raw(model), {name: bits(merged.get_submodule(name).weight) for name in before})
        text = model.generate(input_ids=ids[:, :9], max_new_tokens=6, do_sample=False)
        assert torch.equal(text, merged.generate(input_ids=ids[:, :9], max_new_tokens=6, do_sample=False))
    assert same(raw(model), before)


# --- on, off, and back --------------------------------------------------------------------------------------------


def loaded(model: PeftModel) -> None:
    model.base_model.restore()


def live(model: PeftModel) -> None:
    model.base_model.set_adapter(["code", "chat"], inference_mode=True)
    model.base_model.set_weight("chat", 0.75)
    forward(model)


def trained(model: PeftModel) -> None:
    model.set_adapter("law")
    forward(model)


def without_any(model: PeftModel) -> None:
    model.base_model.set_adapter([])
    forward(model)


def switched_off(model: PeftModel) -> None:
    forward(model)
    model.base_model.disable_adapter_layers()


BEFORE = (loaded, live, trained, without_any, switched_off)
COMPOSITION = {"law": 0.8, "chat": {"default": 1.0, "up": 0.5, "layers.0.down": -2.0}}
COMPOSITION_BY_LAYER = {"law": 0.8, "chat": {"default": 1.0, "up": 0.5}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("raised", [False, True], ids=["left", "raised"])
@pytest.mark.parametrize("prepare", BEFORE, ids=lambda f: f.__name__)
def test_exactly_these_tasks_and_exactly_back(
    net: Net, prepare: Callable[[PeftModel], None], raised: bool, dtype: torch.dtype
) -> None:
    model = mixed(net.to(dtype))
    base = base_of(model)
    output = forward(model)
    prepare(model)
    if prepare is not loaded:
        output = forward(model)
    before, held = state(model), raw(model)
    with contextlib.suppress(ZeroDivisionError), composed(model, COMPOSITION_BY_LAYER):
        inside = forward(model)
        assert same(raw(model), oracle(model, base, COMPOSITION_BY_LAYER))
        assert not any(parameter.requires_grad for parameter in model.parameters())
        forward(model)
        if raised:
            _ = 1 / 0
    assert not torch.equal(inside, output)
    assert state(model) == before
    assert same(raw(model), held)
    assert torch.equal(forward(model), output)
    assert same(base_of(model), base)


def test_the_first_pattern_that_names_a_matrix_decides(net: Net) -> None:
    model = mixed(net)
    with composed(model, COMPOSITION):
        lambdas = {name: layer.weight_of["chat"] for name, layer in model.base_model.named_layers()}
    assert lambdas == dict(zip(NAMES, (0.5, -2.0, 0.5, 1.0), strict=True))


def test_nothing_in_it_is_the_base(net: Net) -> None:
    model = mixed(net)
    base = base_of(model)
    with model.disable_adapter():
        wanted = forward(model)
    forward(model)
    with composed(model, {}):
        assert torch.equal(forward(model), wanted)
        assert same(raw(model), base)


def test_nested_and_left_one_by_one(net: Net) -> None:
    model = mixed(net.bfloat16())
    base = base_of(model)
    outer, inner = {"math": 1.0, "chat": 0.5}, {"chat": -1.0, "code": 2.0}
    with composed(model, outer):
        forward(model)
        with composed(model.base_model, inner):
            forward(model)
            assert same(raw(model), oracle(model, base, inner))
            with composed(model, {}):
                forward(model)
                assert same(raw(model), base)
            assert same(raw(model), oracle(model, base, inner))
        assert same(raw(model), oracle(model, base, outer))
    assert same(raw(model), base)


def test_what_happens_inside_is_undone(net: Net) -> None:
    """Tasks merged, set, weighted or switched off in the block: after it, all is as before it."""
    model = mixed(net.bfloat16())
    base = base_of(model)
    before, output = state(model), forward(model)
    with composed(model, {"code": 0.5}):
        model.merge_adapter(["code"])
        assert same(raw(model), oracle(model, base, {"code": 0.5}))
        forward(model)
    assert state(model) == before and torch.equal(forward(model), output)
    with composed(model, {"code": 0.5}):
        model.base_model.set_adapter(["law", "chat"])
        model.base_model.set_weight("law", 3.0)
        forward(model)
        model.base_model.disable_adapter_layers()
    assert state(model) == before and torch.equal(forward(model), output)
    with composed(model, {"code": 0.5}):
        model.set_adapter("law")
        forward(model)
    assert state(model) == before and torch.equal(forward(model), output)
    with composed(model, {"code": 0.5}):
        forward(model)
        list(model.parameters())
        model.state_dict()
        model.eval()
    assert state(model) == before and torch.equal(forward(model), output)
    assert same(base_of(model), base)


def test_a_task_that_is_deleted_inside_stays_away(net: Net) -> None:
    model = mixed(net.bfloat16())
    base = base_of(model)
    model.base_model.set_adapter(["math", "law"], inference_mode=True)
    with composed(model, {"chat": 1.0, "law": 0.5}):
        forward(model)
        model.delete_adapter("law")
    assert model.base_model.active_adapters == ["math"]
    assert all(layer.active_adapters == ["math"] for _, layer in model.base_model.named_layers())
    forward(model)
    assert same(raw(model), oracle(model, base, {"math": 1.0}))
    assert same(base_of(model), base)


def test_a_block_between_forward_and_backward_changes_no_gradient(net: Net) -> None:
    model = mixed(net).train()
    model.set_adapter("math")
    x = torch.randn(3, 8, requires_grad=True)

    def gradients(interrupted: bool) -> list[Tensor]:
        model.zero_grad()
        x.grad = None
        loss = model(x).square().sum()
        if interrupted:
            with composed(model, COMPOSITION):
                forward(model)
                model(x).sum().backward()
            x.grad = None
        loss.backward()
        found = [p.grad for name, p in model.named_parameters() if ".sbora_values.math" in name]
        return [gradient.clone() for gradient in (*found, x.grad)]

    for quiet, interrupted in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(quiet, interrupted) and quiet.any()


def test_in_the_gather_form_it_is_the_same_up_to_rounding(net: Net) -> None:
    model = mixed(net.bfloat16())
    base = base_of(model)
    with composed(model, COMPOSITION):
        wanted = forward(model)
        model.base_model.set_form("gather")
        assert error(forward(model), wanted) <= TOLERANCE[torch.bfloat16]
        assert same(raw(model), base)


def test_tasks_by_what_their_adapters_say(net: Net) -> None:
    """PEFT's name of an adapter, or its task: `multisbora` loads them as adapter0, adapter1."""
    model = mixed(net)
    for name, config in model.peft_config.items():
        config.task = f"task {name}"
    with composed(model, {"task law": 0.5, "chat": 2.0}):
        assert model.base_model.active_adapters == ["chat", "law"]
        weights = next(iter(model.base_model.named_layers()))[1].weight_of
        assert (weights["law"], weights["chat"]) == (0.5, 2.0)


# --- what it costs ------------------------------------------------------------------------------------------------


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, tuple[int, ...]]]:
    """(address of the matrix, axis, shape of the cells) of every write into a matrix that the test goes on to make."""
    found: list[tuple[int, int, tuple[int, ...]]] = []
    copy = Tensor.index_copy_

    def counting(self: Tensor, axis: int, index: Tensor, source: Tensor) -> Tensor:
        found.append((self.data_ptr(), axis, tuple(source.shape)))
        return copy(self, axis, index, source)

    monkeypatch.setattr(Tensor, "index_copy_", counting)
    return found


def cells_written(model: PeftModel, written: list[tuple[int, int, tuple[int, ...]]]) -> dict[str, int]:
    """{matrix: cells} since the last call. What is written into copies of cells is not counted."""
    matrices = {layer.base_layer.weight.data_ptr(): name for name, layer in model.base_model.named_layers()}
    found: dict[str, int] = {}
    for address, _, (rows, columns) in written:
        if address in matrices:
            found[matrices[address]] = found.get(matrices[address], 0) + rows * columns
    written.clear()
    return found


def region_cells(model: PeftModel, *tasks: str) -> dict[str, int]:
    """Cells of whole owned columns and rows, those of earlier claims with them."""
    return {
        name: sum(layer.sbora_values[task].numel() for task in tasks) for name, layer in model.base_model.named_layers()
    }


def test_only_the_cells_of_what_changed_are_written(net: Net, written: list[Any]) -> None:
    model = mixed(net)
    everything = dict.fromkeys(TASKS, 1.0)
    with composed(model, everything):
        forward(model)
        assert cells_written(model, written) == region_cells(model, *TASKS)
        forward(model)
        assert cells_written(model, written) == {}

        with composed(model, everything | {"math": 0.5}):  # another lambda
            assert cells_written(model, written) == {}
            forward(model)
            assert cells_written(model, written) == region_cells(model, "math")
        assert cells_written(model, written) == region_cells(model, "math")
        forward(model)
        assert cells_written(model, written) == {}

        with composed(model, {"math": 1.0, "code": 1.0, "law": 1.0}):  # one task out
            forward(model)
            assert cells_written(model, written) == region_cells(model, "chat")
        assert cells_written(model, written) == region_cells(model, "chat")

        with composed(model, everything | {"law": {"default": 1.0, "layers.1.up": 0.25}}):  # in one matrix alone
            forward(model)
            assert cells_written(model, written) == {"layers.1.up": region_cells(model, "law")["layers.1.up"]}
        cells_written(model, written)
        forward(model)
        assert cells_written(model, written) == {}
    assert cells_written(model, written) == region_cells(model, *TASKS)  # nothing was live when it was entered


def test_one_task_for_another_writes_both(net: Net, written: list[Any]) -> None:
    model = mixed(net)
    forward(model)
    cells_written(model, written)
    with composed(model, {"law": 1.0}):
        model.base_model.settle()
        assert cells_written(model, written) == region_cells(model, "math", "law")
        forward(model)
        assert cells_written(model, written) == {}
        model.base_model.set_weight("law", 0.5)
        forward(model)
        assert cells_written(model, written) == region_cells(model, "law")


def test_a_generation_writes_once(tmp_path: Path, written: list[Any]) -> None:
    base = tiny_llama(tmp_path / "base")
    geometry = from_checkpoint(base)
    adapter = write_adapter(tmp_path / "math", geometry, "math")
    model, _ = load_model(base, adapters=[adapter])
    ids = torch.arange(3, 12)[None]
    with composed(model, {"math": 0.5}):
        model.generate(input_ids=ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        wanted = region_cells(model, "adapter0")
        assert cells_written(model, written) == wanted
        with torch.no_grad():
            model(ids)
        assert cells_written(model, written) == {}


# --- any sequence -------------------------------------------------------------------------------------------------

LAMBDAS = st.sampled_from([0.0, 1.0, -0.5, 0.37])
COMPOSITIONS = st.dictionaries(
    st.sampled_from(TASKS), LAMBDAS | st.fixed_dictionaries({"default": LAMBDAS, "up": LAMBDAS}), max_size=4
)


class Nest(RuleBasedStateMachine):
    """Blocks that are entered and left, in bf16, with tasks that cross: after every forward the weights are the
    oracle's, bit for bit, and in the end they are the base's."""

    KEPT: ClassVar[dict[str, Any]] = {"math": 1.0}

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = mixed(Net().bfloat16())
        self.base = base_of(self.model)
        self.open: list[tuple[contextlib.AbstractContextManager[None], dict[str, Any]]] = []

    @rule(weights=COMPOSITIONS)
    def enter(self, weights: dict[str, Any]) -> None:
        block = composed(self.model, weights)
        block.__enter__()
        self.open.append((block, weights))

    @precondition(lambda self: self.open)
    @rule()
    def leave(self) -> None:
        self.open.pop()[0].__exit__(None, None, None)

    @precondition(lambda self: self.open)
    @rule()
    def fail(self) -> None:
        failure = RuntimeError("inside")
        with contextlib.suppress(RuntimeError):
            self.open.pop()[0].__exit__(RuntimeError, failure, None)

    @rule(task=st.sampled_from(TASKS))
    def train(self, task: str) -> None:
        randomise(self.model, task, seed=len(self.open))
        self.model.base_model.outdate()

    @rule(inference=st.booleans())
    def forward(self, inference: bool) -> None:
        with torch.inference_mode(inference):
            forward(self.model)
        weights = self.open[-1][1] if self.open else self.KEPT
        assert same(raw(self.model), oracle(self.model, self.base, weights))

    @rule()
    def read(self) -> None:
        for name, weight in self.model.state_dict().items():
            if name.endswith("base_layer.weight"):
                key = name.removeprefix("base_model.model.").removesuffix(".base_layer.weight")
                assert torch.equal(bits(weight), self.base[key])

    @invariant()
    def lambdas_are_the_block_s(self) -> None:
        wanted = self.open[-1][1] if self.open else self.KEPT
        assert set(self.model.base_model.active_adapters) == set(wanted)

    def teardown(self) -> None:
        while self.open:
            self.leave()
        assert same(base_of(self.model), self.base)
        assert state(self.model) == state(mixed(Net().bfloat16()))


Nest.TestCase.settings = settings(deadline=None, max_examples=40, stateful_step_count=25)
test_any_nest_of_blocks = Nest.TestCase


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"cooking": 1.0}, "no task 'cooking' is loaded: there are math, chat, code, law"),
        ({"math": float("nan")}, "the weight of math must be a finite number, got nan"),
        ({"math": "0.5"}, "the weight of math must be a finite number, got '0.5'"),
        ({"math": {"up": True}}, "the weight of math in up must be a finite number, got True"),
        ({"math": {"(": 1.0}}, "the weight of math in '\\(': it cannot be used"),
        ({"math": {"q_proj": 0.5}}, "the weight of math in 'q_proj' names none of its matrices"),
        (["math"], "a composition is {task: lambda}, got \\['math'\\]"),
    ],
)
def test_a_composition_that_cannot_be(net: Net, weights: Any, message: str) -> None:
    model = mixed(net)
    refused(model, weights, message)


def refused(model: PeftModel, weights: Any, message: str) -> None:
    """In one line, and with nothing changed."""
    before, held = state(model), raw(model)
    with pytest.raises(UsageError, match=message) as failure, composed(model, weights):
        raise AssertionError("entered")
    assert "\n" not in str(failure.value)
    assert state(model) == before and same(raw(model), held)


def test_two_names_for_a_task_and_two_tasks_for_a_name(net: Net) -> None:
    model = mixed(net)
    model.peft_config["law"].task = "justice"
    refused(model, {"law": 1.0, "justice": 0.5}, "'justice' names an adapter that the composition has already")
    model.peft_config["code"].task = "justice"
    refused(model, {"justice": 1.0}, "more than one task 'justice' is loaded: there are math, .*justice .law.")


def test_merged_tasks_are_unmerged_first(net: Net) -> None:
    model = mixed(net)
    model.merge_adapter(["math"])
    refused(model, {"math": 0.5}, r"math are merged into the base: call unmerge_adapter\(\) before")


def test_whole_modules_have_no_lambda(net: Net) -> None:
    model = get_peft_model(net, SboraConfig(r=2, target_modules=["up"], modules_to_save=["embed"]))
    refused(model, {"default": 0.5}, "default trained whole modules too, which have no lambda")


def test_models_without_sbora(net: Net) -> None:
    lora = get_peft_model(Net(), LoraConfig(r=2, target_modules=["up"]))
    for model in (net, lora, lora.base_model, mixed(net).get_base_model()):
        with pytest.raises(UsageError, match="has no SBORA adapters: give the model of"), composed(model, {}):
            raise AssertionError("entered")


def test_a_quantised_base(net: Net) -> None:
    model = mixed(net)
    next(iter(model.base_model.named_layers()))[1].quantization_backend = "bnb"
    refused(model, {"math": 0.5}, "a quantised base cannot be composed exactly: load the 16-bit base")


# --- lambdas by pattern -------------------------------------------------------------------------------------------


def test_set_weight_by_pattern(net: Net) -> None:
    model = mixed(net)
    base = base_of(model)
    weight = {"default": 1.0, "up": 0.25}
    model.base_model.set_weight("math", weight)
    forward(model)
    assert same(raw(model), oracle(model, base, {"math": weight}))
    with pytest.raises(UsageError, match="'q_proj' names none of its matrices"):
        model.base_model.set_weight("math", {"q_proj": 1.0})
    assert same(raw(model), oracle(model, base, {"math": weight}))
