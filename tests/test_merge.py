"""Merging: exact, order-free, deterministic, refused where it would lie, and never half-written."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import draw_regions, edit_json, tiny_gpt2, tiny_llama, tree, write_adapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import multisbora.cells
import multisbora.publish
from multisbora.adapter import Adapter
from multisbora.errors import AdapterError, CheckpointError, GeometryError, MergeError, MultisboraError, UsageError
from multisbora.geometry import Geometry, from_checkpoint
from multisbora.loading import load_model
from multisbora.merge import merge
from multisbora.receipt import Receipt
from multisbora.stream import fingerprint

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def geometry(base: Path) -> Geometry:
    return from_checkpoint(base)


def write_tasks(
    folder: Path, base: Path, variants: dict[str, str], *, geometry: Geometry | None = None, **options: Any
) -> dict[str, Path]:
    """One adapter a task, with disjoint regions: where fb crosses fa, the task that comes first keeps the cells."""
    geometry = geometry or from_checkpoint(base)
    regions = draw_regions(geometry, variants)
    found, earlier = {}, []
    for seed, (task, variant) in enumerate(variants.items()):
        excluded = {
            module: sorted({i for other in earlier if variants[other] != variant for i in regions[other][module]})
            for module in regions[task]
        }
        found[task] = write_adapter(
            folder / task,
            geometry,
            task,
            variant=variant,
            indices=regions[task],
            seed=seed,
            excluded={module: values for module, values in excluded.items() if values},
            base_fingerprint=fingerprint(base, geometry),
            **options,
        )
        earlier.append(task)
    return found


@pytest.fixture(scope="module")
def tasks(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    variants = {"math": "fa", "commonsense": "fa", "chat": "fb", "code": "fa"}
    return write_tasks(tmp_path_factory.mktemp("adapters"), base, variants)


def state(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for path in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(path).items()
    }


def same_files(one: Path, two: Path) -> bool:
    return tree(one) == tree(two)


def dense(base: Path, adapters: list[Path], weights: dict[str, float]) -> dict[str, torch.Tensor]:
    """The oracle: each update as a dense matrix from one-hot factors, added in fp32 by torch, rounded once."""
    geometry, expected = from_checkpoint(base), state(base)
    updates: dict[str, torch.Tensor] = {}
    for folder in adapters:
        adapter = Adapter.read(folder)
        for name, module in adapter.modules.items():
            matrix = geometry.find(name)
            size = matrix.in_features if adapter.variant == "fa" else matrix.out_features
            one_hot = torch.nn.functional.one_hot(torch.tensor(module.region.indices), size).float()  # (r, size)
            factor = torch.tensor(weights.get(adapter.task, 1.0) * module.scaling, dtype=torch.float32)
            values = factor * torch.tensor(module.values)
            update = values @ one_hot if adapter.variant == "fa" else one_hot.T @ values  # (out, in)
            update = update.T if matrix.orientation == "conv1d" else update
            updates[matrix.tensor] = updates.get(matrix.tensor, torch.zeros_like(update)) + update
    for name, update in updates.items():
        expected[name] = (expected[name].float() + update).to(expected[name].dtype)
    return expected


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("kind", "shards", "tied"), [("llama", 1, True), ("llama", 3, False), ("gpt2", 1, True), ("bare gpt2", 2, True)]
)
def test_equals_a_dense_one_hot_oracle_and_touches_nothing_else(
    tmp_path: Path, dtype: str, kind: str, shards: int, tied: bool
) -> None:
    if kind == "llama":
        base = tiny_llama(tmp_path / "base", dtype=dtype, shards=shards, tied=tied)
    else:
        base = tiny_gpt2(tmp_path / "base", dtype=dtype, shards=shards, bare=kind != "gpt2")
    adapters = list(write_tasks(tmp_path, base, {"one": "fa", "two": "fb", "three": "fa"}, use_rslora=True).values())
    weights = {"one": 0.7, "three": -1.3}
    receipt = merge(base, adapters, weights, output=tmp_path / "out")
    expected = dense(base, adapters, weights)
    assert_equal(state(tmp_path / "out"), expected)
    before = state(base)
    untouched = [name for name in before if name not in receipt.tensors_changed]
    assert untouched
    for name in untouched:
        assert torch.equal(state(tmp_path / "out")[name].view(torch.uint8), before[name].view(torch.uint8))
    changed = sum(int((expected[name] != before[name]).sum()) for name in before)
    assert receipt.cells_changed == changed
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {path.name for path in base.iterdir()} | {"README.md", "multisbora_receipt.json", "multisbora_undo"}
    for path in base.iterdir():
        if not path.name.endswith(".safetensors"):
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_lambdas_by_matrix(base: Path, tasks: dict[str, Path], tmp_path: Path) -> None:
    """Merging with patterns is merging each set of matrices with its own number, and taking them together."""
    weight = {"default": 0.5, "layers.0.*": 2.0, "q_proj": -1.0}
    merge(base, [tasks["math"], tasks["chat"]], {"math": weight}, output=tmp_path / "out")
    found = state(tmp_path / "out")
    oracles = {value: dense(base, [tasks["math"], tasks["chat"]], {"math": value}) for value in (0.5, 2.0, -1.0)}
    for name, tensor in found.items():
        value = 2.0 if ".layers.0." in name else -1.0 if "q_proj" in name else 0.5
        assert torch.equal(tensor, oracles[value][name]), name
    told = Receipt.read(tmp_path / "out").tasks["math"]
    assert told.weight.to_json() == weight
    assert told.regions[Q].weight == 2.0
    assert told.regions[Q.replace("layers.0", "layers.1")].weight == -1.0


@pytest.mark.parametrize(("model_type", "transposed"), [("mixtral", False), ("gpt_oss", True)])
@pytest.mark.parametrize("variant", ["fa", "fb"])
def test_experts_in_one_tensor(tmp_path: Path, model_type: str, transposed: bool, variant: str) -> None:
    """Two of three experts change, each in its own cells of the stored 3-D tensor."""
    shape = (3, 8, 6) if transposed else (3, 6, 8)
    tensor, plain = "model.layers.0.mlp.experts.down_proj", "model.layers.0.self_attn.q_proj.weight"
    before = {tensor: torch.randn(shape).bfloat16(), plain: torch.randn(4, 4).bfloat16()}
    base = tmp_path / "base"
    base.mkdir()
    save_file(before, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps({"model_type": model_type}))
    module = "model.layers.0.mlp.experts.{}.down_proj"
    indices = {module.format(0): [1, 4], module.format(2): [0, 5]}
    adapter = write_adapter(tmp_path / "a", from_checkpoint(base), "a", variant=variant, indices=indices)
    merge(base, [adapter], output=tmp_path / "out", allow_base_mismatch=True)
    expected = before[tensor].float()
    for part in (0, 2):
        values = torch.tensor(Adapter.read(adapter).modules[module.format(part)].values)
        expert = expected[part].T if transposed else expected[part]  # (out, in), a view
        own = indices[module.format(part)]
        expert[(slice(None), own) if variant == "fa" else own] += 4 * values  # alpha 8 for 2 indices
    found = state(tmp_path / "out")
    assert torch.equal(found[tensor], expected.bfloat16())
    assert torch.equal(found[plain], before[plain])
    assert not torch.equal(found[tensor], before[tensor])
    assert torch.equal(found[tensor][1], before[tensor][1])


def test_module_names_may_have_other_leading_parts(tmp_path: Path) -> None:
    base = tiny_gpt2(tmp_path / "base", bare=True)
    live = from_checkpoint(tiny_gpt2(tmp_path / "live"))
    stored = from_checkpoint(base)
    adapter = write_adapter(tmp_path / "a", live, "math", base_fingerprint=fingerprint(base, stored))
    receipt = merge(base, [adapter], output=tmp_path / "out")
    assert all(name.startswith("h.") for name in receipt.tensors_changed)
    assert_equal(state(tmp_path / "out"), dense(base, [adapter], {}))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_order_of_the_adapters_does_not_matter(
    base: Path, tasks: dict[str, Path], tmp_path: Path, data: st.DataObject
) -> None:
    chosen = data.draw(st.lists(st.sampled_from(sorted(tasks)), min_size=1, unique=True))
    number = st.floats(-3, 3, allow_nan=False).filter(lambda weight: weight == 0 or abs(weight) > 0.1)
    weights = {task: data.draw(number) for task in chosen if data.draw(st.booleans())}
    first, second = tmp_path / f"{os.urandom(8).hex()}", tmp_path / f"{os.urandom(8).hex()}"
    merge(base, [tasks[task] for task in sorted(chosen)], weights, output=first)
    merge(base, [tasks[task] for task in chosen], weights, output=second)
    assert same_files(first, second)
    assert_equal(state(first), dense(base, [tasks[task] for task in chosen], weights))


def test_the_same_merge_gives_the_same_bytes_wherever_it_runs(
    base: Path, tasks: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(base, list(tasks.values()), {"math": 0.5}, output=tmp_path / "one")
    monkeypatch.chdir(base.parent)
    merge(base.name, list(tasks.values())[::-1], {"math": 0.5}, output=tmp_path / "two")
    assert same_files(tmp_path / "one", tmp_path / "two")
    for name in ("multisbora_receipt.json", "README.md"):
        assert str(base.parent) not in (tmp_path / "one" / name).read_text()


def test_one_task_at_lambda_one_is_what_was_trained(base: Path, tasks: dict[str, Path], tmp_path: Path) -> None:
    merge(base, [tasks["math"]], output=tmp_path / "out")
    module = Adapter.read(tasks["math"]).modules[Q]
    before, after = state(base)[f"{Q}.weight"], state(tmp_path / "out")[f"{Q}.weight"]
    own = list(module.region.indices)
    trained = before[:, own].float() + torch.tensor(module.values) * module.scaling
    assert torch.equal(after[:, own], trained.to(torch.bfloat16))
    rest = [i for i in range(32) if i not in own]
    assert torch.equal(after[:, rest], before[:, rest])


def test_all_tasks_together_are_each_task_alone(base: Path, tasks: dict[str, Path], tmp_path: Path) -> None:
    merge(base, list(tasks.values()), output=tmp_path / "all")
    together, before = state(tmp_path / "all"), state(base)
    for task, folder in tasks.items():
        merge(base, [folder], output=tmp_path / task)
        for name, tensor in state(tmp_path / task).items():
            own = tensor != before[name]
            assert torch.equal(together[name][own], tensor[own])


def test_a_weight_of_zero_keeps_the_bits_of_the_base(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    tensors = state(base)
    tensors[f"{Q}.weight"][:] = -0.0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    tasks = write_tasks(tmp_path, base, {"math": "fa", "chat": "fa"})
    receipt = merge(base, list(tasks.values()), {"math": 0}, output=tmp_path / "out")
    assert receipt.tasks["math"].cells_changed == 0
    own = list(Adapter.read(tasks["math"]).modules[Q].region.indices)
    assert torch.signbit(state(tmp_path / "out")[f"{Q}.weight"][:, own]).all()
    merge(base, list(tasks.values()), {"math": 0, "chat": 0}, output=tmp_path / "same")
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_stock_transformers_loads_it(tmp_path: Path, kind: str) -> None:
    build = tiny_llama if kind == "llama" else tiny_gpt2
    base = build(tmp_path / "base", dtype="float32", shards=2)
    adapters = list(write_tasks(tmp_path, base, {"one": "fa", "two": "fb"}).values())
    merge(base, adapters, output=tmp_path / "out")
    merged, plain = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "out", base))
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        original = plain(tokens).logits
        missing = plain.load_state_dict(dense(base, adapters, {}), strict=False)
        assert not missing.unexpected_keys
        assert torch.equal(merged(tokens).logits, plain(tokens).logits)
    assert not torch.allclose(merged(tokens).logits, original, atol=1e-3)


def test_the_receipt_says_what_was_merged(base: Path, tasks: dict[str, Path], tmp_path: Path) -> None:
    receipt = merge(base, [tasks["math"], tasks["chat"], tasks["code"]], {"math": 0.5}, output=tmp_path / "out")
    assert Receipt.read(tmp_path / "out") == receipt
    text = (tmp_path / "out" / "multisbora_receipt.json").read_text()
    content = json.loads(text)
    assert list(content) == sorted(content)
    assert content["scores"] == {}
    assert {task: entry["weight"] for task, entry in content["tasks"].items()} == {"math": 0.5, "chat": 1, "code": 1}
    module = Adapter.read(tasks["code"]).modules[Q]
    told = content["tasks"]["code"]["regions"][Q]
    wanted = {"indices": list(module.region.indices), "excluded": list(module.region.excluded), "scaling": 2.0}
    assert wanted.items() <= told.items()
    assert told["weight"] == 1
    assert told["excluded"]
    told = {*content["files"], *content["weights"], "multisbora_receipt.json", "multisbora_undo"}
    assert told == {path.name for path in (tmp_path / "out").iterdir()}
    assert set(tree(tmp_path / "out" / "multisbora_undo")) == {f"{t}.safetensors" for t in ("math", "chat", "code")}
    assert receipt.cells_owned == sum(task.cells for task in receipt.tasks.values())
    assert 0 < receipt.cells_changed <= receipt.cells_owned  # type: ignore[operator]
    again = replace(receipt, scores={"math": {"score": 0.5}})
    again.write(tmp_path / "out")
    assert Receipt.read(tmp_path / "out") == again
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b'{"format": 9}', b'{"format": 1, "base": {}}', b"\xff"])
def test_a_damaged_receipt_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "multisbora_receipt.json").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"multisbora_receipt\.json (does not exist|cannot be|has format|is damaged)"
    ):
        Receipt.read(tmp_path)


def test_the_card_names_the_base_only_by_a_public_name(
    base: Path, geometry: Geometry, tasks: dict[str, Path], tmp_path: Path
) -> None:
    for model, shown, linked in (("org/name", "org/name", True), ("/data/secret/name", "name", False)):
        output = tmp_path / model.replace("/", "_")
        receipt = merge(base, [tasks["math"]], output=output, geometry=replace(geometry, model=model))
        card = (output / "README.md").read_text()
        assert receipt.base_model == shown
        assert ("base_model: org/name" in card) == linked
        assert "secret" not in card
        assert "| math | 1 | fa | 14 |" in card


def test_a_dry_run_checks_everything_and_writes_nothing(base: Path, tasks: dict[str, Path], tmp_path: Path) -> None:
    chosen = [tasks["math"], tasks["chat"]]
    plan = merge(base, chosen, output=tmp_path / "out", dry_run=True)
    assert not list(tmp_path.iterdir())
    real = merge(base, chosen, output=tmp_path / "out")
    assert plan.cells_changed is None
    assert (plan.cells_owned, plan.tensors_changed) == (real.cells_owned, real.tensors_changed)
    assert all(real.files[name].size == file.size for name, file in plan.files.items())
    with pytest.raises(CheckpointError, match="not an empty folder"):
        merge(base, chosen, output=tmp_path / "out", dry_run=True)


def refused(
    kind: type[MultisboraError], message: str, base: Path, adapters: list[Path], *args: Any, **options: Any
) -> None:
    output = adapters[0].parent / "refused" if adapters else base.parent / "refused"
    with pytest.raises(kind, match=message) as caught:
        merge(base, adapters, *args, output=output, **options)
    assert "\n" not in str(caught.value)
    assert not output.exists()
    assert not [path.name for path in output.parent.iterdir() if "partial" in path.name]


def test_another_base_is_refused_unless_allowed(base: Path, geometry: Geometry, tmp_path: Path) -> None:
    mark = fingerprint(base, geometry)
    other = tiny_llama(tmp_path / "other", seed=9)
    mine = write_adapter(tmp_path / "mine", geometry, "math", base_fingerprint=mark)
    silent = write_adapter(tmp_path / "silent", geometry, "chat", indices={Q: [0]})
    refused(AdapterError, r"mine was trained on another base than .*other \(fingerprint", other, [mine])
    refused(AdapterError, "does not say which base", base, [silent])
    allowed = merge(other, [mine], output=tmp_path / "out", allow_base_mismatch=True)
    assert not allowed.base_checked
    assert "name another base" in (tmp_path / "out" / "README.md").read_text()
    assert merge(base, [mine], output=tmp_path / "out2", allow_base_mismatch=True).base_checked


def test_claims_that_changed_are_refused(base: Path, geometry: Geometry, tmp_path: Path) -> None:
    mark = fingerprint(base, geometry)
    claimed = write_adapter(tmp_path / "claimed", geometry, "math", base_fingerprint=mark, claim_digest="c" * 64)
    free = write_adapter(tmp_path / "free", geometry, "chat", base_fingerprint=mark)
    refused(AdapterError, "the claims of math changed since its training", base, [claimed], claims={"math": ["d" * 64]})
    refused(AdapterError, "was trained without claims", base, [free], claims={"chat": ["d" * 64]})
    merge(base, [claimed], output=tmp_path / "out", claims={"math": ["c" * 64, "f" * 64], "more": ["e" * 64]})


def test_shared_cells_are_refused(base: Path, geometry: Geometry, tmp_path: Path) -> None:
    mark = fingerprint(base, geometry)
    own: list[tuple[str, str, dict[str, list[int]], dict[str, list[int]]]] = [
        ("one", "fa", {Q: [1, 4]}, {}),
        ("two", "fa", {Q: [0, 4]}, {}),
        ("cross", "fb", {Q: [3]}, {}),
        ("polite", "fb", {Q: [3]}, {Q: [1, 4]}),
    ]
    made = {
        task: write_adapter(
            tmp_path / task, geometry, task, variant=variant, indices=indices, excluded=excluded, base_fingerprint=mark
        )
        for task, variant, indices, excluded in own
    }
    refused(MergeError, f"one and two both own cells of {Q}.weight", base, [made["two"], made["one"]])
    refused(MergeError, f"cross and one both own cells of {Q}.weight", base, [made["one"], made["cross"]])
    refused(MergeError, "both own cells", base, [made["two"], made["one"]], {"one": 0})
    merge(base, [made["one"], made["polite"]], output=tmp_path / "out")


def test_one_task_twice_is_refused(base: Path, geometry: Geometry, tmp_path: Path) -> None:
    adapters = [write_adapter(tmp_path / name, geometry, "math") for name in ("a", "b")]
    refused(MergeError, "are both task 'math'", base, adapters)


def test_weights_that_mean_nothing_are_refused(base: Path, tasks: dict[str, Path]) -> None:
    chosen = [tasks["math"], tasks["chat"]]
    refused(UsageError, "given for 'maths', which is not merged: the tasks are chat, math", base, chosen, {"maths": 1})
    for weight in (math.nan, math.inf, "1", None, True):
        refused(UsageError, "the weight of math must be a finite number", base, chosen, {"math": weight})
    refused(UsageError, "nothing to merge", base, [])
    with pytest.raises(UsageError, match="must be a list"):
        merge(base, str(tasks["math"]), output=base.parent / "refused")


def test_a_task_that_would_change_nothing_is_refused(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    geometry = from_checkpoint(base)
    mark = fingerprint(base, geometry)
    zero = write_adapter(tmp_path / "zero", geometry, "zero", spread=0, base_fingerprint=mark)
    tiny = write_adapter(tmp_path / "tiny", geometry, "tiny", base_fingerprint=mark)
    refused(MergeError, "zero was never trained: every value of .*zero is zero", base, [zero])
    refused(MergeError, "tiny changes no cell: every update at weight 1e-30 rounds away", base, [tiny], {"tiny": 1e-30})
    merge(base, [zero], {"zero": 0}, output=tmp_path / "out")


def test_a_cell_that_overflows_is_refused(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", dtype="float16")
    tasks = write_tasks(tmp_path, base, {"math": "fa"})
    refused(MergeError, "math: .* would hold a value that float16 cannot", base, list(tasks.values()), {"math": 1e7})


def test_an_adapter_of_other_matrices_is_refused(base: Path, tmp_path: Path) -> None:
    def toy(name: str, **sizes: int) -> Geometry:
        return from_checkpoint(tiny_llama(tmp_path / name, **sizes))  # type: ignore[arg-type]

    wide, deep = toy("wide", intermediate_size=64), toy("deep", num_hidden_layers=3)
    gpt2 = from_checkpoint(tiny_gpt2(tmp_path / "gpt2"))
    down = "model.layers.0.mlp.down_proj"
    for name, geometry, indices, message in (
        ("index", wide, {down: [3, 60]}, "index 60 is outside an axis of 48"),
        ("shape", wide, {"model.layers.0.mlp.up_proj": [3]}, r"values of shape \[64, 1\], its matrix needs \[48, 1\]"),
        ("layer", deep, {"model.layers.2.mlp.up_proj": [3]}, "has no matrix"),
        ("kind", gpt2, None, "has no matrix"),
    ):
        adapter = write_adapter(tmp_path / "adapters" / name, geometry, "math", indices=indices)
        refused(AdapterError, f"{name} does not fit base: .*{message}", base, [adapter])


def test_damaged_adapters_are_refused(base: Path, geometry: Geometry, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", geometry, "math")
    path = adapter / "adapter_model.safetensors"
    content = load_file(path)
    next(tensor for name, tensor in content.items() if name.endswith("values"))[0, 0] = math.nan
    save_file(content, path)
    refused(AdapterError, "NaN or infinite", base, [adapter])
    os.truncate(path, path.stat().st_size // 2)
    refused(AdapterError, "truncated or corrupt", base, [adapter])


def _cut(base: Path) -> None:
    os.truncate(base / "model.safetensors", (base / "model.safetensors").stat().st_size - 1)


def _header(base: Path) -> None:
    with (base / "model.safetensors").open("r+b") as file:
        file.seek(8)
        file.write(b"}")


def _nan(base: Path) -> None:
    tensors = state(base)
    tensors[f"{Q}.weight"][:] = math.nan
    save_file(tensors, base / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (_cut, CheckpointError, "truncated or corrupt"),
        (_header, CheckpointError, "truncated or corrupt"),
        (lambda base: (base / "model.safetensors").unlink(), CheckpointError, "holds neither"),
        (lambda base: (base / "config.json").unlink(), GeometryError, "config.json does not exist"),
        (_nan, MergeError, "check the base model for NaN"),
    ],
)
def test_a_damaged_base_is_refused(
    tmp_path: Path, damage: Callable[[Path], None], kind: type[MultisboraError], message: str
) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", from_checkpoint(base), "math")
    damage(base)
    refused(kind, message, base, [adapter], allow_base_mismatch=True)


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_base_that_the_disk_does_not_give_is_not_taken_for_the_output(
    base: Path, tasks: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry_run: bool
) -> None:
    def fail(*arguments: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(multisbora.cells.os, "preadv", fail)
    with pytest.raises(CheckpointError, match=rf"^{base}/model.*safetensors cannot be read: Input/output error"):
        merge(base, [tasks["math"]], output=tmp_path / "out", dry_run=dry_run)
    assert not list(tmp_path.iterdir())


def test_what_no_receipt_could_tell_is_refused_first(base: Path, tasks: dict[str, Path], tmp_path: Path) -> None:
    """A receipt that is written must be one that is read."""
    edited = tmp_path / "adapter"
    shutil.copytree(tasks["math"], edited)
    edit_json(edited / "adapter_config.json", composition="x" * 600)
    refused(MergeError, r"no receipt can tell of this merge \(tasks.math.composition", base, [edited])
    odd = tmp_path / "base"
    shutil.copytree(base, odd)
    (odd / "a\\b.txt").write_text("x")
    refused(MergeError, r"no receipt can tell of this merge \(files\.", odd, [tasks["math"]])
    refused(MergeError, "no receipt can tell", base, [tasks["math"]], {"math": {"q_proj|" * 100 + "v_proj": 0.5}})
    for size in (0, -1, 1.5, True):
        refused(UsageError, "is no number of bytes", base, [tasks["math"]], max_shard_size=size)


def test_a_merged_checkpoint_is_a_base_too(base: Path, tasks: dict[str, Path], tmp_path: Path) -> None:
    merge(base, [tasks["math"]], output=tmp_path / "one")
    (tmp_path / "one").chmod(0o555)
    receipt = merge(tmp_path / "one", [tasks["chat"]], output=tmp_path / "two", allow_base_mismatch=True)
    assert_equal(state(tmp_path / "two"), dense(base, [tasks["math"], tasks["chat"]], {}))
    assert Receipt.read(tmp_path / "two") == receipt
    assert not receipt.base_checked and list(receipt.tasks) == ["chat"]
    assert {path.name for path in (tmp_path / "two" / "multisbora_undo").iterdir()} == {"chat.safetensors"}


def test_the_card_keeps_the_bars_of_a_pattern_out_of_its_table(
    base: Path, tasks: dict[str, Path], tmp_path: Path
) -> None:
    merge(base, [tasks["math"]], {"math": {"q_proj|v_proj": 0.5}}, output=tmp_path / "out")
    (row,) = (line for line in (tmp_path / "out" / "README.md").read_text().splitlines() if line.startswith("| math |"))
    assert r"q_proj\|v_proj 0.5" in row
    assert len(re.split(r"(?<!\\)\|", row)) == 8


def test_a_base_of_another_dtype_is_refused(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    save_file({name: tensor.double() for name, tensor in state(base).items()}, base / "model.safetensors")
    adapter = write_adapter(tmp_path / "a", from_checkpoint(base), "math")
    refused(CheckpointError, "is F64 .*merging needs F32, F16, BF16", base, [adapter], allow_base_mismatch=True)


def test_an_output_that_is_taken_is_not_touched(base: Path, tasks: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not an empty folder"):
        merge(base, [tasks["math"]], output=tmp_path)
    with pytest.raises(CheckpointError, match="is not an empty folder"):
        merge(base, [tasks["math"]], output=base)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("files", [0, 1, 3])
def test_a_disk_that_fills_up_leaves_nothing(
    base: Path, tasks: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int
) -> None:
    written = 0

    def sync(descriptor: int) -> None:
        nonlocal written
        written += 1
        if written > files:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(multisbora.publish.os, "fsync", sync)
    with pytest.raises(CheckpointError, match="out of disk space while writing"):
        merge(base, [tasks["math"]], output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ["write_all", "copy_file", "_sync", "sync_folder"])
def test_a_killed_merge_leaves_nothing_to_see_and_nothing_in_the_way(
    base: Path, tasks: dict[str, Path], tmp_path: Path, moment: str
) -> None:
    script = f"""
import os, signal, sys
import importlib
names = ("publish", "stream", "undo", "merge")
publish, stream, undo, merge = modules = [importlib.import_module("multisbora." + name) for name in names]
def die(*args, **options):
    if {moment!r} == "write_all":
        os.pwrite(args[0], b"half", args[2])
    os.kill(os.getpid(), signal.SIGKILL)
for module in modules:
    if hasattr(module, {moment!r}):
        setattr(module, {moment!r}, die)
merge.merge(sys.argv[1], [sys.argv[2]], output=sys.argv[3])
"""
    environment = os.environ | {"PYTHONPATH": str(Path(multisbora.publish.__file__).parents[1])}
    command = [sys.executable, "-c", script, base, tasks["math"], tmp_path / "out"]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.iterdir())) == 1
    merge(base, [tasks["math"]], output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_merging_loads_no_torch() -> None:
    script = "import sys, multisbora.merge; sys.exit('torch' in sys.modules or 'peft' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(multisbora.publish.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == 0


def test_the_adapters_config_may_not_lie_about_the_rank(base: Path, tasks: dict[str, Path], tmp_path: Path) -> None:
    """Rank is the number of indices; an edited `r` changes nothing."""
    merge(base, [tasks["math"]], output=tmp_path / "one")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tasks["math"].iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    edit_json(copy / "adapter_config.json", r=999)
    merge(base, [copy], output=tmp_path / "two")
    assert same_files(tmp_path / "one", tmp_path / "two")
    assert np.isclose(Adapter.read(copy).modules[Q].scaling, 2.0)


@pytest.mark.parametrize("kind", ["llama bfloat16", "llama float16", "gpt2 bfloat16"])
def test_equals_the_live_model_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """fa and fb tasks that cross, with lambdas: `merge_adapter` in memory and `merge` on files write the same cells."""
    architecture, dtype = kind.split()
    base = (tiny_llama if architecture == "llama" else tiny_gpt2)(tmp_path / "base", dtype=dtype)
    adapters = write_tasks(tmp_path / "adapters", base, {"one": "fa", "two": "fb", "three": "fa"})
    weights = {"one": 1.0, "two": 0.37, "three": -0.6}
    merge(base, list(adapters.values()), weights, output=tmp_path / "merged")

    live, _ = load_model(base, adapters=list(adapters.values()))
    for name, config in live.peft_config.items():
        live.base_model.set_weight(name, weights[config.task])
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        active = live(ids).logits.float()
        live.merge_adapter(live.active_adapters)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert torch.equal(live(ids).logits, merged(ids).logits)
        # Unmerged, each task's product is rounded to the dtype and added: a few roundings more a layer.
        wanted = merged(ids).logits.float()
        assert (active - wanted).norm() <= 3e-2 * wanted.norm()
    stored = {name.replace(".base_layer", ""): weight for name, weight in live.get_base_model().named_parameters()}
    for name, weight in merged.named_parameters():
        assert torch.equal(stored[name].view(torch.int16), weight.view(torch.int16)), name
