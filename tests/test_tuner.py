"""SBORA as a PEFT method: regions, several adapters, merging, and what users of PEFT rely on."""

from __future__ import annotations

import copy
import json
import random
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from builders import tiny_gpt2, tiny_llama
from layers import (
    FORMS,
    KINDS,
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
    random_weight,
    randomise,
    two,
)
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from multisbora.adapter import Adapter
from multisbora.errors import MergeError, UsageError
from multisbora.tuner import PEFT_TYPE, SboraConfig, SboraLayer
from multisbora.tuner.forms import Form

# --- ranks, scaling, excluded cells, dropout ----------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / 2)])
def test_scaling(variant: str, rslora: bool, scale: float) -> None:
    layer = adapt(linear(torch.ones(4, 4)), default=config(variant, range(4), alpha=8, use_rslora=rslora))
    values = torch.arange(16.0).reshape(4, 4)
    fill(layer, "default", values)
    assert layer.scaling == {"default": scale}
    assert torch.equal(layer.get_delta_weight("default"), scale * values)


def test_patterns_and_targets(net: Net) -> None:
    given = SboraConfig(
        r=2,
        alpha=6,
        target_modules=["up", "down"],
        rank_pattern={"layers.1.up": 5, "down": 3},
        alpha_pattern={r"layers\.0\..*": 12},
    )
    model = get_peft_model(net, given)
    found = {name: (m.sbora_indices["default"].numel(), m.scaling["default"]) for name, m in layers_of(model).items()}
    assert found == {
        "layers.0.up": (2, 6.0),
        "layers.0.down": (3, 4.0),
        "layers.1.up": (5, 6 / 5),
        "layers.1.down": (3, 2.0),
    }
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"base_model.model.{name}.sbora_values.default" for name in found}


def test_drawn_indices_depend_on_seed_and_module_alone(net: Net) -> None:
    def indices(**kwargs: Any) -> dict[str, list[int]]:
        model = get_peft_model(copy.deepcopy(net), SboraConfig(r=4, target_modules=["up", "down"], **kwargs))
        return {name: layer.sbora_indices["default"].tolist() for name, layer in layers_of(model).items()}

    random.seed(3)
    first = indices(seed=1)
    torch.manual_seed(9)
    assert first == indices(seed=1) != indices(seed=2)
    assert first["layers.0.up"] != first["layers.1.up"]
    assert all(found == sorted(set(found)) for found in first.values())


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", FORMS)
def test_excluded_cells_stay_the_base_s(form: Form, variant: str, kind: str) -> None:
    weight = random_weight(6, 6, torch.bfloat16)
    weight[:, 2] = -0.0
    weight[2, :] = -0.0
    layer = adapt(linear(weight, kind), form, default=config(variant, [0, 2, 5], excluded={"lin": [1, 2]}))
    axis = 0 if variant == "fa" else 1
    # Values that ought not to be there: neither forward nor merge nor delta lets them through.
    fill(layer, "default", torch.ones(layer.sbora_values["default"].shape))
    dense = layer.get_delta_weight("default")
    dense = dense.t() if kind == "conv1d" else dense
    assert not dense.index_select(axis, torch.tensor([1, 2])).any()
    assert int(dense.ne(0).sum()) == 3 * 4

    x = torch.randn(4, 6).to(torch.bfloat16)
    assert error(layer(x), x.double() @ (weight.double() + dense.double()).t()) <= TOLERANCE[torch.bfloat16]
    layer(x).square().sum().backward()
    gradient = layer.sbora_values["default"].grad
    assert not gradient.index_select(axis, torch.tensor([1, 2])).any()
    assert gradient.index_select(axis, torch.tensor([0, 3, 4, 5])).any()

    layer.merge()
    merged = layer.base_layer.weight.t() if kind == "conv1d" else layer.base_layer.weight
    kept = (dense == 0).nonzero(as_tuple=True)
    assert torch.equal(bits(merged)[kept], bits(weight)[kept])
    assert torch.signbit(merged[kept]).sum() == torch.signbit(weight[kept]).sum()
    layer.unmerge()
    restored = layer.base_layer.weight.t() if kind == "conv1d" else layer.base_layer.weight
    assert torch.equal(bits(restored), bits(weight))


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout(variant: str) -> None:
    layer = adapt(linear(random_weight()), default=config(variant, [0, 3, 4], dropout=0.4))
    fill(layer, "default", torch.ones(layer.sbora_values["default"].shape))
    x = torch.linspace(1, 2, 9).expand(20_000, 9)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    wanted = layer(x[0])
    layer.train()
    torch.manual_seed(0)
    dropped = layer(x)
    # Every row is dropped by itself; rows that fb does not own never change.
    adapted = slice(None) if variant == "fa" else [0, 3, 4]
    assert dropped[:, adapted].std(0).min() > 0.1
    assert error(dropped.mean(0), wanted) < 0.02
    if variant == "fb":
        assert torch.equal(dropped[:, [1, 2, 5]], layer.get_base_layer()(x)[:, [1, 2, 5]])
    torch.manual_seed(0)
    assert torch.equal(layer(x), dropped)


# --- several adapters, lambda, merging ----------------------------------------------------------------------------


def test_active_adapters_add_up(net: Net) -> None:
    model = two(net)
    layer = layers_of(model)["layers.0.up"]
    x = torch.randn(3, layer.in_features)
    outputs = {}
    for active in ("math", "code", ["math", "code"], ["code", "math"]):
        model.base_model.set_adapter(active)
        outputs[str(active)] = layer(x)
    base = layer.get_base_layer()(x)
    assert not torch.equal(outputs["math"], outputs["code"])
    both = outputs["math"] + outputs["code"] - base
    assert error(outputs["['math', 'code']"], both) < 1e-6
    assert error(outputs["['code', 'math']"], both) < 1e-6
    with model.disable_adapter():
        assert torch.equal(layer(x), base)
    assert torch.equal(layer(x), outputs["['code', 'math']"])


def test_set_weight_is_lambda(net: Net) -> None:
    model = two(net)
    model.base_model.set_adapter(["math", "code"])
    layer = layers_of(model)["layers.0.up"]
    plain = {name: layer.get_delta_weight(name) for name in ("math", "code")}
    model.base_model.set_weight("math", 0.25)
    assert torch.equal(layer.get_delta_weight("math"), 0.25 * plain["math"])
    assert torch.equal(layer.get_delta_weight("code"), plain["code"])
    x = torch.randn(4, 8)
    dense = layer.base_layer.weight + 0.25 * plain["math"] + plain["code"]
    assert error(layer(x), x @ dense.t() + layer.base_layer.bias) < 1e-6
    with pytest.raises(UsageError, match="no adapter 'other': loaded are math, code"):
        model.base_model.set_weight("other", 1.0)
    model.merge_adapter()
    with pytest.raises(UsageError, match="'math' is merged: unmerge it before"):
        model.base_model.set_weight("math", 1.0)
    model.unmerge_adapter()
    model.base_model.set_weight("math", 1.0)
    assert torch.equal(layer.get_delta_weight("math"), plain["math"])


@pytest.mark.parametrize("names", [["math"], ["code"], ["math", "code"], ["code", "math"]], ids=" ".join)
def test_merge_and_unmerge_keep_every_bit_in_bf16(net: Net, names: list[str]) -> None:
    model = two(net.to(torch.bfloat16))
    before = {name: bits(layer.base_layer.weight) for name, layer in layers_of(model).items()}
    wanted = {}
    for name, layer in layers_of(model).items():
        dense = layer.base_layer.weight.float() + sum(layer.get_delta_weight(n) for n in names)
        wanted[name] = bits(dense.to(torch.bfloat16))
    model.merge_adapter(names)
    for name, layer in layers_of(model).items():
        assert layer.merged_adapters == names
        assert torch.equal(bits(layer.base_layer.weight), wanted[name])
    model.unmerge_adapter()
    for name, layer in layers_of(model).items():
        assert torch.equal(bits(layer.base_layer.weight), before[name])


def test_merged_one_after_the_other(net: Net) -> None:
    model = two(net.to(torch.bfloat16))
    before = {name: bits(layer.base_layer.weight) for name, layer in layers_of(model).items()}
    model.merge_adapter(["math"])
    with pytest.warns(UserWarning, match="additionally merging code"):
        model.merge_adapter(["code"])
    one_by_one = {name: bits(layer.base_layer.weight) for name, layer in layers_of(model).items()}
    model.unmerge_adapter()
    assert all(torch.equal(bits(m.base_layer.weight), before[name]) for name, m in layers_of(model).items())
    model.merge_adapter(["code", "math"])
    assert all(torch.equal(bits(m.base_layer.weight), one_by_one[name]) for name, m in layers_of(model).items())
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_adapters_that_share_cells_unmerge_exactly(net: Net) -> None:
    """Without a registry two adapters may own the same columns; their sum still comes out whole."""
    model = get_peft_model(net.to(torch.bfloat16), SboraConfig(r=4, target_modules=["up"]), adapter_name="math")
    model.add_adapter("code", SboraConfig(r=4, target_modules=["up"]))
    randomise(model, "math", "code")
    layer = layers_of(model)["layers.0.up"]
    before = bits(layer.base_layer.weight)
    model.merge_adapter(["math", "code"])
    assert not torch.equal(bits(layer.base_layer.weight), before)
    model.unmerge_adapter()
    assert torch.equal(bits(layer.base_layer.weight), before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_merge_and_unload(net: Net, variant: str) -> None:
    plain = copy.deepcopy(net)
    model = get_peft_model(net, SboraConfig(variant=variant, r=3, target_modules=["up", "down"]))  # type: ignore[arg-type]
    randomise(model)
    x = torch.randn(4, 8)
    live = model(x)
    deltas = {name: layer.get_delta_weight("default") for name, layer in layers_of(model).items()}
    merged = model.merge_and_unload()
    assert not any(isinstance(module, SboraLayer) for module in merged.modules())
    assert error(merged(x), live) < 1e-6
    for name, delta in deltas.items():
        assert torch.equal(merged.get_submodule(name).weight, plain.get_submodule(name).weight + delta)


def test_unload_gives_the_base_back(net: Net) -> None:
    plain = copy.deepcopy(net.state_dict())
    model = two(net)
    model.merge_adapter(["math", "code"])
    model.unmerge_adapter()
    unloaded = model.unload()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in unloaded.state_dict().items())


def test_disabling_a_merged_adapter_gives_the_base_s_output(net: Net) -> None:
    x = torch.randn(4, 8)
    wanted = net(x)
    model = two(net)
    model.merge_adapter(["math", "code"])
    assert error(model(x), wanted) > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(x), wanted)


def test_safe_merge_refuses_before_it_writes(net: Net) -> None:
    model = two(net)
    layer = layers_of(model)["layers.0.up"]
    layer.sbora_values["math"].data[0, 0] = torch.inf
    before = bits(layer.base_layer.weight)
    with pytest.raises(MergeError, match="adapter 'math' gives weights that are not finite"):
        model.merge_adapter(["math"], safe_merge=True)
    assert torch.equal(bits(layer.base_layer.weight), before)
    assert not layer.merged


def test_delete_adapter(net: Net) -> None:
    model = two(net)
    model.base_model.set_adapter(["math", "code"])
    x = torch.randn(4, 8)
    model.delete_adapter("code")
    alone = model(x)
    assert all(
        "code" not in layer.sbora_values and "code" not in layer.sbora_indices for layer in layers_of(model).values()
    )
    model.base_model.set_adapter("math")
    assert torch.equal(model(x), alone)


# --- configuration: what is refused, in one line ------------------------------------------------------------------


def refused(call: Any, *words: str) -> None:
    with pytest.raises(UsageError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(variant="fc"), ("'fc'", "use fa")),
        (dict(r=0), ("rank 0 (r)", "positive")),
        (dict(r=True), ("rank True",)),
        (dict(rank_pattern={"up": -1}), ("rank -1 (up)",)),
        (dict(dropout=1.0), ("dropout 1.0",)),
        (dict(layers_pattern="layers"), ("layers_to_transform",)),
        (dict(indices={"lin": [3, 1]}), ("lin:", "sorted")),
        (dict(indices={"lin": [1, 1]}), ("lin:", "without repeats")),
        (dict(indices={"lin": [-1, 1]}), ("lin:", "not negative")),
        (dict(indices={"lin": []}), ("lin:", "at least one index")),
        (dict(indices={"lin": ["a"]}), ("lin:", "whole numbers")),
        (dict(indices={"lin": [1.5]}), ("lin:", "whole numbers")),
        (dict(indices={"lin": 3}), ("lin:", "whole numbers")),
        (dict(indices={"lin": [1]}, excluded={"lin": [2, 0]}), ("lin:", "excluded", "sorted")),
    ],
    ids=str,
)
def test_wrong_configuration(given: dict[str, Any], words: tuple[str, ...]) -> None:
    refused(lambda: SboraConfig(**given), *words)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(indices={"layers.0.up": [8]}), ("layers.0.up", "index 8", "axis of 8")),
        (dict(indices={"layers.0.up": [1]}, excluded={"layers.0.up": [12]}), ("excluded 12",)),
        (dict(indices={"layers.0.up": [1]}, target_modules=["up"]), ("layers.1.up is a target", "no entry")),
        (dict(indices={"layers.0.up": [1], "layers.7.up": [1]}), ("layers.7.up", "no target module")),
        (
            dict(indices={"layers.0.up": [1]}, excluded={"up": [2]}),
            ("`excluded` has an entry for up", "no target module"),
        ),
        (dict(r=9, target_modules=["up"]), ("layers.0.up", "rank 9", "8 columns", "rank_pattern")),
        (dict(variant="fb", r=9, target_modules=["down"]), ("layers.0.down", "8 rows")),
        (dict(r=2, target_modules=["embed"]), ("embed is a Embedding", "linear layers")),
    ],
    ids=str,
)
def test_configuration_that_does_not_fit_the_model(net: Net, given: dict[str, Any], words: tuple[str, ...]) -> None:
    refused(lambda: get_peft_model(net, SboraConfig(**given)), *words)


def test_another_tuner_s_layer_is_no_target(net: Net) -> None:
    lora = get_peft_model(net, peft.LoraConfig(r=2, target_modules=["up"])).base_model.model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, about a second tuner on one model
        refused(lambda: get_peft_model(lora, SboraConfig(r=2, target_modules=["layers.0.up"])), "linear layers")


def test_indices_alone_name_the_targets(net: Net) -> None:
    model = get_peft_model(net, SboraConfig(indices={"layers.1.up": [0, 5], "layers.0.down": [3]}))
    found = {name: layer.sbora_indices["default"].tolist() for name, layer in layers_of(model).items()}
    assert found == {"layers.1.up": [0, 5], "layers.0.down": [3]}


def test_registration() -> None:
    assert PeftType.SBORA is PEFT_TYPE and PeftType("SBORA") is PEFT_TYPE and "SBORA" in PeftType.__members__
    assert PEFT_TYPE in set(PeftType) and len(set(PeftType)) == len(list(PeftType))
    assert PEFT_TYPE == "SBORA" and json.dumps(PEFT_TYPE) == '"SBORA"'
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] is SboraConfig
    assert peft.get_peft_config({"peft_type": "SBORA", "r": 3}) == SboraConfig(r=3)


# --- on transformers' models: saving, loading, training -----------------------------------------------------------

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
INPUT = torch.tensor([[5, 9, 77, 123, 8, 31]])


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tuner") / "llama", dtype="float32")


@pytest.fixture(scope="module")
def llama_base(llama_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(llama_folder)


@pytest.fixture
def llama(llama_base: Any) -> Any:
    return copy.deepcopy(llama_base)


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt2(tmp_path_factory.mktemp("tuner") / "gpt2", bare=True)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(INPUT).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_fresh_adapter_changes_nothing(llama: Any, variant: str) -> None:
    before = logits(llama)
    model = get_peft_model(llama, SboraConfig(variant=variant, r=4, target_modules=TARGETS))  # type: ignore[arg-type]
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_folder_and_what_loads_it(llama: Any, llama_base: Any, tmp_path: Path, variant: str) -> None:
    given = SboraConfig(variant=variant, r=4, alpha=8, target_modules=TARGETS, task="math", seed=3)  # type: ignore[arg-type]
    model = get_peft_model(llama, given)
    randomise(model)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "a")

    content = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert content["peft_type"] == "SBORA" and content["variant"] == variant and content["task"] == "math"
    assert content["target_modules"] == sorted(TARGETS)
    assert content["indices"] is None and content["excluded"] == {}
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert set(tensors) == {
        f"base_model.model.{name}.sbora_{part}" for name in layers_of(model) for part in ("values", "indices")
    }
    for name, layer in layers_of(model).items():
        values, indices = (tensors[f"base_model.model.{name}.sbora_{part}"] for part in ("values", "indices"))
        assert values.dtype == torch.float32 and torch.equal(values, layer.sbora_values["default"])
        assert indices.dtype == torch.int32 and torch.equal(indices, layer.sbora_indices["default"])
        assert indices.tolist() == sorted(set(indices.tolist()))

    # A loader that knows only the folder: another seed in the config would draw other indices.
    edited = content | {"seed": 99}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(edited))
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(copy.deepcopy(llama_base), tmp_path / "a", **options)
        assert torch.equal(logits(loaded), wanted)
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert isinstance(PeftConfig.from_pretrained(tmp_path / "a"), SboraConfig)

    trainable = PeftModel.from_pretrained(copy.deepcopy(llama_base), tmp_path / "a", is_trainable=True)
    assert all(layer.sbora_values["default"].requires_grad for layer in layers_of(trainable).values())


@pytest.mark.parametrize("low", [False, True])
def test_load_a_second_adapter(llama: Any, llama_base: Any, tmp_path: Path, low: bool) -> None:
    for number, variant in enumerate(VARIANTS):
        given = SboraConfig(variant=variant, r=2 + number, target_modules=TARGETS, seed=number)  # type: ignore[arg-type]
        model = get_peft_model(copy.deepcopy(llama_base), given)
        randomise(model, seed=number)
        model.save_pretrained(tmp_path / variant)
    model = PeftModel.from_pretrained(llama, tmp_path / "fa", adapter_name="one")
    model.load_adapter(tmp_path / "fb", adapter_name="two", low_cpu_mem_usage=low)
    assert model.active_adapters == ["one"]
    alone = logits(PeftModel.from_pretrained(copy.deepcopy(llama_base), tmp_path / "fb"))
    model.set_adapter("two")
    assert torch.equal(logits(model), alone)
    model.base_model.set_adapter(["one", "two"])
    both = logits(model)
    merged = logits(model.merge_and_unload())
    assert error(merged, both) < 1e-5


def test_ranks_that_differ_by_module_survive_saving(llama: Any, llama_base: Any, tmp_path: Path) -> None:
    prefix = "model.layers"
    indices = {
        f"{prefix}.0.self_attn.q_proj": [3, 4, 9],
        f"{prefix}.1.self_attn.q_proj": [0],
        f"{prefix}.1.mlp.up_proj": [1, 30],
    }
    model = get_peft_model(llama, SboraConfig(r=2, alpha=6, indices=indices, alpha_pattern={"up_proj": 3}))
    randomise(model)
    model.save_pretrained(tmp_path / "a")
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama_base), tmp_path / "a")
    assert torch.equal(logits(loaded), logits(model))
    read = Adapter.read(tmp_path / "a")
    assert {name: list(module.region.indices) for name, module in read.modules.items()} == indices
    assert [module.scaling for module in read.modules.values()] == [2.0, 1.5, 6.0]


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_names_with_and_without_prefix(gpt2_folder: Path, tmp_path: Path, prefix: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    before = logits(model)
    c_attn, c_proj = (f"{prefix}h.{name}" for name in ("0.attn.c_attn", "1.mlp.c_proj"))
    given = SboraConfig(
        variant="fb", r=2, indices={c_attn: [0, 71], c_proj: [3, 4]}, excluded={c_attn: [1], c_proj: [5, 95]}
    )
    model = get_peft_model(model, given)
    layers = layers_of(model)
    assert list(layers) == ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"]
    assert [layer.shape for layer in layers.values()] == [(72, 24), (24, 96)]
    assert [layer.sbora_excluded["default"].tolist() for layer in layers.values()] == [[1], [5, 95]]
    assert torch.equal(logits(model), before)
    randomise(model)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "a")
    read = Adapter.read(tmp_path / "a")
    assert {name: module.region.excluded for name, module in read.modules.items()} == {
        "transformer.h.0.attn.c_attn": (1,),
        "transformer.h.1.mlp.c_proj": (5, 95),
    }
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gpt2_folder), tmp_path / "a")
    assert torch.equal(logits(loaded), wanted)
    assert error(logits(loaded.merge_and_unload()), wanted) < 1e-5


def test_many_targets_are_written_in_order(tmp_path: Path) -> None:
    """PEFT shortens a list of 20 and more names, and a set has no order: the file must not depend on either."""
    given = SboraConfig(r=1, indices={f"layers.{i}.{kind}": [i] for i in range(12) for kind in KINDS})
    given.save_pretrained(str(tmp_path))
    written = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert len(written) == 24 and written == sorted(written)


def test_a_cast_model_still_saves_fp32(llama: Any, tmp_path: Path) -> None:
    model = get_peft_model(llama, SboraConfig(r=2, target_modules=TARGETS))
    randomise(model)
    model.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if name.endswith("values")} == {torch.float32}
    assert {tensor.dtype for name, tensor in tensors.items() if name.endswith("indices")} == {torch.int32}
    assert Adapter.read(tmp_path / "a").modules


def test_values_are_fp32_on_a_bf16_base(llama: Any) -> None:
    model = get_peft_model(llama.to(torch.bfloat16), SboraConfig(r=2, target_modules=TARGETS))
    assert {layer.sbora_values["default"].dtype for layer in layers_of(model).values()} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing_gives_the_same_gradients(llama: Any, variant: str) -> None:
    model = get_peft_model(llama, SboraConfig(variant=variant, r=4, target_modules=TARGETS))  # type: ignore[arg-type]
    randomise(model)
    model.train()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(input_ids=INPUT, labels=INPUT).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]

    plain = gradients()
    assert plain and all(gradient.any() for gradient in plain)
    enable = getattr(llama, "activation_checkpointing_enable", None) or llama.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


def test_plain_trainer(llama: Any, llama_base: Any, tmp_path: Path) -> None:
    model = get_peft_model(llama, SboraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = [{"input_ids": INPUT[0], "labels": INPUT[0]} for _ in range(4)]
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    checkpoint = tmp_path / "checkpoint-2"
    files = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert not {"model.safetensors", "pytorch_model.bin"} & files
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    assert tensors and all(".sbora_" in name for name in tensors)
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama_base), checkpoint)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(llama_base))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama_base))
