"""Adapters of a quantised base: merged onto either view, proven, evaluated; and refused where nobody can know which."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import edit_json, tiny_gpt2, tiny_llama, write_adapter
from commands import Run, assert_refused, make_project
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from multisbora.adapter import Adapter
from multisbora.dataset import Example
from multisbora.delta import delta
from multisbora.errors import AdapterError, MergeError, TrainingError, UsageError
from multisbora.geometry import from_checkpoint
from multisbora.loading import load_base, load_model
from multisbora.measure import measure, open_base, open_trained
from multisbora.merge import merge
from multisbora.moments import Site
from multisbora.quantization import dequantize, describe, quantized_layers, record
from multisbora.receipt import Receipt
from multisbora.stream import fingerprint
from multisbora.verify import Proof, verify

LLAMA: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 1}
RECEIPT = "multisbora_receipt.json"
# Logits of the live quantised model against those of the merged checkpoint, relative: the order of two products.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def build(folder: Path, kind: str = "llama", **config: Any) -> Path:
    if kind == "gpt2":
        return tiny_gpt2(folder, n_embd=64, **config)
    return tiny_llama(folder, **(LLAMA | config))


def trained(folder: Path, base: Path, quantization: dict[str, Any] | None, task: str = "math", **options: Any) -> Path:
    """An adapter as training on `base` leaves it, quantised so or as stored."""
    geometry = from_checkpoint(base)
    return write_adapter(
        folder / task,
        geometry,
        task,
        base_fingerprint=fingerprint(base, geometry),
        base_quantization=quantization,
        **options,
    )


def state(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor for path in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(path).items()
    }


def same_bits(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(
        one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8)
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("base") / "llama", shards=2)


@pytest.fixture(scope="module")
def nf4(base: Path) -> dict[str, Any]:
    found = record(load_base(base, "nf4"))
    assert found is not None
    return found


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize(("kind", "dtype"), [("llama", "bfloat16"), ("llama", "float16"), ("gpt2", "float32")])
def test_the_merged_weights_are_the_live_dequantised_ones_and_the_update(
    kind: str, dtype: str, quantization: Any, tmp_path: Path
) -> None:
    base = build(tmp_path / "base", kind, dtype=dtype, shards=2)
    live = load_base(base, quantization)
    columns = trained(tmp_path, base, record(live), "columns", target_modules=r".*\.[01]\.(attn\.c_attn|.*q_proj)")
    rows = trained(tmp_path, base, record(live), "rows", variant="fb", target_modules=r".*(mlp\.c_fc|down_proj)")
    adapters = [columns, rows]
    merge(base, adapters, {"rows": 0.5}, output=tmp_path / "out")  # no flag: the view of the training
    found, stored, geometry = state(tmp_path / "out"), state(base), from_checkpoint(base)

    expected = dict(stored)
    for name, layer in quantized_layers(live):
        matrix = geometry.find(name)
        values = dequantize(layer, getattr(torch, dtype))
        for folder, weight in ((columns, 1.0), (rows, 0.5)):
            adapter = Adapter.read(folder)
            if name in adapter.modules:
                module = adapter.modules[name]
                update, own = (
                    torch.from_numpy(delta(module.values.copy(), module.scaling, weight)),
                    module.region.indices,
                )
                cells = (slice(None), list(own)) if adapter.variant == "fa" else (list(own), slice(None))
                values[cells] = (values[cells].float() + update).to(values.dtype)
        expected[matrix.tensor] = values.T if matrix.orientation == "conv1d" else values
    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], expected[name]) for name in expected)
    changed = {name for name in stored if not same_bits(stored[name], found[name])}
    assert changed == {geometry.find(name).tensor for name, _ in quantized_layers(live)}

    proof = verify(tmp_path / "out", base, adapters)
    assert proof.ok, proof.problem
    assert proof.cells_outside_regions == 0
    quick = verify(tmp_path / "out", quick=True)
    assert quick.ok, quick.problem
    receipt = Receipt.read(tmp_path / "out")
    assert receipt.quantization == describe(live)
    assert set(receipt.tensors_changed) < changed
    assert f"quantised ({receipt.quantization}) and turned back" in " ".join(
        (tmp_path / "out" / "README.md").read_text().split()
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("variant", ["fa", "fb"])
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_rows_through_an_adapter_are_rows_through_its_merge(
    kind: str, variant: str, quantization: Any, tmp_path: Path
) -> None:
    base = build(tmp_path / "base", kind, dtype="float32")
    told = None if quantization is None else record(load_base(base, quantization))
    adapter = Adapter.read(trained(tmp_path, base, told, variant=variant, target_modules="all-linear"))
    merge(base, [adapter.path], output=tmp_path / "out")
    geometry = from_checkpoint(base)
    options: dict[str, Any] = {"geometry": geometry, "base_fingerprint": "x"}
    options["channels"] = {module: range(6) for module in adapter.modules}
    generator = np.random.default_rng(0)
    examples = [Example(generator.integers(3, 90, 20).tolist(), 8, row) for row in range(3)]
    model = open_trained(base, adapter, pytest.fail)
    found = measure(model, examples, "math", adapter=adapter.digest, **options)
    merged = open_base(tmp_path / "out", None, pytest.fail)
    expected = measure(merged, examples, "math", adapter=adapter.digest, **options)
    assert (found.source, found.adapter) == ("adapter", adapter.digest)
    assert set(adapter.modules) <= found.sites.keys() == expected.sites.keys()
    for module, site in found.sites.items():
        for one, two in zip(parts(site), parts(expected.sites[module]), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4 * np.abs(two).max(initial=0))


def parts(site: Site) -> tuple[np.ndarray, ...]:
    return site.energy, site.response, site.channels, site.block


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_live_model_and_the_merged_checkpoint_agree(dtype: str, tmp_path: Path) -> None:
    base = build(tmp_path / "base", dtype=dtype)
    adapter = trained(tmp_path, base, record(load_base(base, "nf4")))
    merge(base, [adapter], output=tmp_path / "out")
    live, _ = load_model(adapter, base)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(3, 120)[None]
    with torch.no_grad():
        one, two = live(ids).logits.float(), stock(ids).logits.float()
        plain = AutoModelForCausalLM.from_pretrained(base).eval()(ids).logits.float()
    assert (one - two).norm() / two.norm() <= TOLERANCE[dtype]
    assert (plain - two).norm() / two.norm() > 10 * TOLERANCE[dtype]


def test_both_views_can_be_chosen(base: Path, nf4: dict[str, Any], tmp_path: Path) -> None:
    quantized, plain = trained(tmp_path, base, nf4), trained(tmp_path / "plain", base, None)
    onto = {}
    for name, adapter, view in (
        ("trained", quantized, None),
        ("dequantized", quantized, "dequantized"),
        ("original", quantized, "original"),
        ("stored", plain, None),
        ("stored original", plain, "original"),
    ):
        merge(base, [adapter], output=tmp_path / name, base_view=view)
        proof = verify(tmp_path / name, base, [adapter])
        assert proof.ok, (name, proof.problem)
        onto[name] = (tmp_path / name / "model-00001-of-00002.safetensors").read_bytes()
    assert onto["trained"] == onto["dequantized"] != onto["original"]
    assert onto["original"] == onto["stored"] == onto["stored original"]
    content = json.loads((tmp_path / "original" / RECEIPT).read_text())
    assert (content["base"]["view"], content["base"]["quantization"]) == ("original", None)
    content = json.loads((tmp_path / "trained" / RECEIPT).read_text())
    assert (content["base"]["view"], content["base"]["quantization"]) == ("dequantized", nf4)


def card(folder: Path) -> str:
    return " ".join((folder / "README.md").read_text().split())


def test_a_receipt_says_what_each_task_was_trained_on(base: Path, nf4: dict[str, Any], tmp_path: Path) -> None:
    math = trained(tmp_path, base, nf4, target_modules=["q_proj"])
    chat = trained(tmp_path, base, None, "chat", target_modules=["v_proj"])
    moved = {
        "original": "math was trained on the dequantised base (nf4 with double quantisation) and is merged onto the "
        "stored base",
        "dequantized": "chat was trained on the stored base and is merged onto the dequantised base (nf4 with double "
        "quantisation)",
    }
    for view, sentence in moved.items():
        receipt = merge(base, [math, chat], output=tmp_path / view, base_view=view)
        assert receipt.moved() == [sentence]
        assert Receipt.read(tmp_path / view) == receipt
        assert card(tmp_path / view).count(" was trained on ") == 1 and f"{sentence}." in card(tmp_path / view)
        told = json.loads((tmp_path / view / RECEIPT).read_text())["tasks"]
        assert told["math"]["trained_on"] == {"view": "dequantized", "quantization": nf4}
        assert told["chat"]["trained_on"] == {"view": "original", "quantization": None}
    own = merge(base, [math], output=tmp_path / "own")
    assert own.moved() == [] and " was trained on " not in card(tmp_path / "own")


@pytest.mark.parametrize("lie", [{"view": "original", "quantization": None}, {"view": "dequantized"}, None, "nf4"])
def test_a_receipt_that_lies_about_the_training_is_found(case: Case, lie: Any) -> None:
    tasks = json.loads((case.merged / RECEIPT).read_text())["tasks"]
    tasks["math"]["trained_on"] = lie
    edit_json(case.merged / RECEIPT, tasks=tasks)
    proof = case.proof()
    assert proof.problem is not None and "math: the receipt has another view of the training" in proof.problem


def test_adapters_of_different_views_need_the_flag(base: Path, nf4: dict[str, Any], tmp_path: Path) -> None:
    math = trained(tmp_path, base, nf4, target_modules=["q_proj"])
    chat = trained(tmp_path, base, None, "chat", target_modules=["v_proj"])
    int8 = trained(tmp_path, base, record(load_base(base, "int8")), "code", target_modules=["up_proj"])
    with pytest.raises(UsageError, match="--base-view original or --base-view dequantized"):
        merge(base, [math, chat], output=tmp_path / "out")
    with pytest.raises(UsageError, match=r"say --base-view original$"):
        merge(base, [math, int8], output=tmp_path / "out", base_view="dequantized")
    with pytest.raises(UsageError, match="does not say how to quantise it"):
        merge(base, [chat], output=tmp_path / "out", base_view="dequantized")
    assert not (tmp_path / "out").exists()
    for view in ("original", "dequantized"):
        merge(base, [math, chat], output=tmp_path / view, base_view=view)
        assert verify(tmp_path / view, base, [math, chat]).ok
    dry = merge(base, [math], output=tmp_path / "out", dry_run=True)
    assert dry.quantization is not None


def test_another_bitsandbytes_than_that_of_the_training_is_noticed(
    base: Path, nf4: dict[str, Any], tmp_path: Path
) -> None:
    other = trained(tmp_path, base, nf4 | {"digest": "0" * 64})
    with pytest.raises(MergeError, match=r"not, bit for bit, the one that the tasks were trained on.*bitsandbytes"):
        merge(base, [other], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(AdapterError, match=r"not, bit for bit, the base of its training.*bitsandbytes"):
        load_model(other, base)
    load_model(other, base, base_view="original")
    merge(base, [other], output=tmp_path / "out", base_view="original")
    plain = trained(tmp_path, base, None, "chat", target_modules=["v_proj"])
    with pytest.raises(AdapterError, match=f"^{re.escape(str(other))}: .* the base of its training"):
        load_model(plain, base, [other], base_view="dequantized")  # it is not about the first of them


def test_a_recorded_quantisation_is_read_with_suspicion(base: Path, nf4: dict[str, Any], tmp_path: Path) -> None:
    adapter = trained(tmp_path, base, nf4)
    edit_json(adapter / "adapter_config.json", base_quantization=nf4 | {"kind": "nf5"})
    with pytest.raises(AdapterError, match="base_quantization: quantisation 'nf5' is unknown"):
        merge(base, [adapter], output=tmp_path / "out")
    edit_json(adapter / "adapter_config.json", base_quantization=nf4 | {"modules": ["model.layers.9.q_proj"]})
    with pytest.raises(AdapterError, match=r"model\.layers\.9\.q_proj was quantised in training, but .* no one matrix"):
        merge(base, [adapter], output=tmp_path / "out")


class Case:
    """A checkpoint merged onto the dequantised base, to be damaged."""

    def __init__(self, folder: Path, base: Path, nf4: dict[str, Any]) -> None:
        self.base, self.merged = base, folder / "merged"
        self.adapter = trained(folder, base, nf4, target_modules=["q_proj"])
        merge(base, [self.adapter], output=self.merged)

    def proof(self) -> Proof:
        return verify(self.merged, self.base, [self.adapter])

    def receipt(self, **changes: Any) -> None:
        content = json.loads((self.merged / RECEIPT).read_text())
        edit_json(self.merged / RECEIPT, base=content["base"] | changes)


@pytest.fixture
def case(base: Path, nf4: dict[str, Any], tmp_path: Path) -> Case:
    return Case(tmp_path, base, nf4)


@pytest.mark.parametrize("module", ["self_attn.q_proj", "mlp.up_proj", "input_layernorm"])
def test_a_wrong_bit_in_any_tensor_is_found(case: Case, module: str) -> None:
    assert case.proof().ok
    shard = case.merged / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    name = f"model.layers.0.{module}.weight"
    tensors[name].view(torch.int16).view(-1)[77 % tensors[name].numel()] ^= 1
    save_file(tensors, shard, metadata={"format": "pt"})
    proof = case.proof()
    assert not proof.ok
    assert proof.problem is not None and proof.problem.startswith(f"{name}: 1 wrong cells")
    assert verify(case.merged, quick=True).problem == (
        f"{name}: with all tasks taken out it is not the base's: cells that no task owns differ"
        if "which no task owns" in proof.problem
        else f"{name}: the cells owned by math are not those that were merged"
    )


def test_stored_weights_where_the_dequantised_belong_are_found(case: Case) -> None:
    shard = case.merged / "model-00001-of-00002.safetensors"
    tensors, name = load_file(shard), "model.layers.0.mlp.up_proj.weight"
    tensors[name] = state(case.base)[name]
    save_file(tensors, shard, metadata={"format": "pt"})
    proof = case.proof()
    assert not proof.ok
    assert proof.cells_outside_regions > 1000


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"view": "original"}, "does not fit its quantisation"),
        ({"view": "original", "quantization": None}, "the base's bytes do not have the digest that the receipt tells"),
        ({"quantization": {"kind": "nf4"}}, "missing or damaged: ValueError 'block_size' is missing"),
    ],
)
def test_a_receipt_that_lies_about_the_view_is_found(case: Case, changes: dict[str, Any], problem: str) -> None:
    case.receipt(**changes)
    proof = case.proof()
    assert not proof.ok
    assert proof.problem is not None
    assert re.search(problem, proof.problem), proof.problem


def test_a_quantisation_of_nobody_is_found(case: Case, nf4: dict[str, Any]) -> None:
    edit_json(case.adapter / "adapter_config.json", base_quantization=None)
    proof = case.proof()
    assert not proof.ok
    assert proof.problem is not None and "none of the adapters was trained on" in proof.problem
    case.receipt(quantization=nf4 | {"digest": "1" * 64})
    edit_json(case.adapter / "adapter_config.json", base_quantization=nf4 | {"digest": "1" * 64})
    proof = case.proof()
    assert proof.problem is not None and "the dequantised base is not, bit for bit" in proof.problem


def test_a_merge_onto_the_stored_base_loads_no_torch() -> None:
    code = "import sys; import multisbora.merge, multisbora.view; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_evaluation_takes_the_view_of_the_training(base: Path, nf4: dict[str, Any], tmp_path: Path) -> None:
    adapter, plain = trained(tmp_path, base, nf4), trained(tmp_path, base, None, "chat")

    def kinds(*args: Any, **kwargs: Any) -> set[str]:
        model, _ = load_model(*args, **kwargs)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        found = {type(layer).__name__ for _, layer in quantized_layers(model)}
        assert all(not layer.support_avx512bf16_for_cpu for _, layer in quantized_layers(model))
        return found

    assert kinds(adapter, base) == {"Linear4bit"}
    assert kinds(adapter, base, base_view="original") == set()
    assert kinds(plain, base) == set()
    assert kinds(plain, base, base_view="dequantized", quantization="nf4") == {"Linear4bit"}
    assert kinds(base) == kinds(base, base_view="original") == set()
    assert kinds(base, quantization="nf4") == {"Linear4bit"}
    merge(base, [adapter], output=tmp_path / "out")
    assert kinds(tmp_path / "out") == set()
    for arguments, options, message in (
        ((base,), {"base_view": "dequantized"}, "nothing says how .* say --quantization nf4"),
        ((plain, base), {"base_view": "dequantized"}, "nothing says how .* say --quantization nf4"),
        ((base,), {"base_view": "original", "quantization": "nf4"}, "leave --quantization nf4 out"),
        ((base,), {"base_view": "stored", "quantization": "nf4"}, "base view 'stored' is unknown"),
        ((base,), {"base_view": "stored"}, "base view 'stored' is unknown"),
        ((base,), {"quantization": "nf5"}, "quantization 'nf5' is unknown"),
        ((adapter, base), {"quantization": "int8"}, "says itself how its base was quantised"),
        ((tmp_path / "out",), {"quantization": "nf4"}, "is a merged checkpoint, whose view was chosen"),
        ((adapter, base, [plain]), {}, "trained on different views"),
    ):
        with pytest.raises(UsageError, match=message):
            load_model(*arguments, **options)  # type: ignore[arg-type]


def test_the_commands(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    """Trained, merged onto both views, proven and scored as a user would."""
    folder = tmp_path / "project"
    folder.mkdir()
    make_project(folder, base)
    monkeypatch.chdir(folder)
    assert run("allocate", "--tasks", "adding,doubling").code == 0
    assert_refused(run("train", "--task", "adding", "--quantization", "nf5"), 2, "quantization")
    assert run("train", "--task", "adding", "--quantization", "nf4").code == 0
    assert run("train", "--task", "doubling").code == 0
    recorded = Adapter.read(folder / "adapters" / "adding").quantization
    assert recorded is not None
    assert (recorded.kind, recorded.double, recorded.block_size) == ("nf4", True, 64)
    assert recorded == describe(load_base(base, "nf4"))
    assert Adapter.read(folder / "adapters" / "doubling").quantization is None

    both = ["--base-view original", "--base-view dequantized"]
    assert_refused(run("merge", "--output", "out"), 2, *both)
    assert run("merge", "--output", "out", "--base-view", "dequantized").code == 0
    assert run("verify", "out", "--json").json["ok"]
    done = run("merge", "--output", "dry", "--base-view", "original", "--dry-run")
    assert done.err == (
        "adding was trained on the dequantised base (nf4 with double quantisation) and is merged onto the stored base\n"
    )
    assert run("merge", "--tasks", "adding", "--output", "one").code == 0
    assert run("verify", "one").code == 0

    scored = ["--tasks", "adding", "--json"]
    own = run("eval", "adapters/adding", *scored).json["tasks"]["adding"]["nll"]
    merged = run("eval", "one", *scored).json["tasks"]["adding"]["nll"]
    other = run("eval", "adapters/adding", "--base-view", "original", *scored).json["tasks"]["adding"]["nll"]
    assert own == pytest.approx(merged, abs=5e-3)
    assert own != other
    assert run("eval", str(base), "--quantization", "int8", *scored).code == 0

    for flags in (["--dry-run"], []):
        done = run("export", "--task", "adding", "--format", "peft-lora", "--output", "lora", *flags)
        assert done.code == 0
        assert "trained on a base quantised to nf4" in done.err
    shutil.rmtree(folder / "lora")
    assert run("export", "--task", "doubling", "--format", "peft-lora", "--output", "lora").err == ""


def test_a_run_on_another_base_view_is_another_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    make_project(folder, base)
    monkeypatch.chdir(folder)
    assert run("allocate", "--tasks", "adding").code == 0

    def stop(*args: Any) -> None:
        raise TrainingError("stopped before the end")

    monkeypatch.setattr(importlib.import_module("multisbora.train"), "_publish", stop)
    steps = ["--set", "training.save_steps=1"]
    assert_refused(run("train", "--task", "adding", "--quantization", "nf4", *steps), 1, "stopped", progress=True)
    again = run("train", "--task", "adding", *steps)
    assert_refused(again, 1, "training.quantization was 'nf4', is None", progress=True)


def test_the_same_adapters_choose_the_same_view_in_any_order(base: Path, nf4: dict[str, Any], tmp_path: Path) -> None:
    one = trained(tmp_path, base, nf4, target_modules=["q_proj"])
    two = trained(tmp_path, base, nf4, "chat", target_modules=["v_proj"])
    first = merge(base, [one, two], output=tmp_path / "a")
    second = merge(base, [two, one], output=tmp_path / "b")
    assert replace(first, files={}) == replace(second, files={})
    assert first.files == second.files
