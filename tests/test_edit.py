"""Editing in place: byte for byte what a merge of the tasks that are there makes, and refused where it would lie."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import edit_json, tiny_gpt2, tiny_llama, write_adapter
from commands import refused
from faults import calls, tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mix import write_mix
from safetensors.torch import load_file, save_file

from multisbora import cells as cells_module
from multisbora.checkpoint import Checkpoint
from multisbora.edit import add, remove, reweight
from multisbora.errors import AdapterError, CheckpointError, MergeError, UsageError
from multisbora.geometry import from_checkpoint
from multisbora.kept import FOLDER as CORRECTED
from multisbora.merge import merge
from multisbora.receipt import Receipt
from multisbora.undo import CellsFile, undo_path

pytestmark = pytest.mark.usefixtures("unsynced")

VARIANTS = {"math": "fa", "chat": "fb", "code": "fa", "law": "fb"}
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "base", shards=2)


@pytest.fixture(scope="module")
def tasks(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_mix(tmp_path_factory.mktemp("adapters"), base, VARIANTS)


@pytest.fixture(scope="module")
def merged_once(base: Path, tasks: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "ours"
    merge(base, [tasks["math"], tasks["chat"]], {"chat": 0.5}, output=folder)
    return folder


@pytest.fixture
def merged(merged_once: Path, tmp_path: Path) -> Path:
    """math and chat, chat at 0.5; a copy to edit."""
    return Path(shutil.copytree(merged_once, tmp_path / "ours"))


def tiny_mixture(folder: Path, *, model_type: str) -> Path:
    """A Llama with a fused mixture beside its layers, in three dimensions; it is never loaded."""
    base = tiny_llama(folder, dtype="bfloat16")
    tensors = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        fused = torch.randn(3, 20, 28, generator=generator).bfloat16()
        tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = fused
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    edit_json(base / "config.json", model_type=model_type)
    return base


KINDS: dict[str, tuple[Callable[..., Path], dict[str, Any], int | None]] = {
    "llama bf16": (tiny_llama, {"dtype": "bfloat16"}, None),
    "llama fp32 in shards": (tiny_llama, {"dtype": "float32", "shards": 3, "tied": False}, None),
    "llama fp16 laid out anew": (tiny_llama, {"dtype": "float16"}, 30_000),
    "mixture": (tiny_mixture, {"model_type": "mixtral"}, None),
    "mixture transposed": (tiny_mixture, {"model_type": "gpt_oss"}, None),
    "gpt2": (tiny_gpt2, {"dtype": "float32"}, None),
    "gpt2 bf16 in shards": (tiny_gpt2, {"dtype": "bfloat16", "shards": 2, "bare": True}, None),
}
PATTERNS = {"llama": "q_proj|down_proj", "mixture": "experts.1.down_proj", "gpt2": "c_attn"}


class Models:
    """Bases and adapters of each kind, made when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, dict[str, tuple[Path, dict[str, Path]]]()

    def get(self, kind: str) -> tuple[Path, dict[str, Path]]:
        if kind not in self.made:
            build, options, _ = KINDS[kind]
            place = self.folder / kind.replace(" ", "-")
            base = build(place / "base", **options)
            self.made[kind] = base, write_mix(place, base, VARIANTS, target_modules=from_checkpoint(base).kinds())
        return self.made[kind]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("kinds"))


def edit_at_random(
    data: st.DataObject,
    folder: Path,
    base: Path,
    adapters: Mapping[str, Path],
    weight: st.SearchStrategy[Any],
    options: Mapping[str, Any],
    adding: Mapping[str, Any],
    most: int,
) -> list[str]:
    """Merge some tasks into `folder` and edit it up to `most` times. After each edit it is what a merge makes, a dry
    run has said what would be done, and nothing else has changed.

    Args:
        options, adding: of `merge` and of `add`.

    Returns:
        The tasks that are in it.
    """
    present: dict[str, Any] = {
        task: data.draw(weight)
        for task in data.draw(st.lists(st.sampled_from(sorted(adapters)), min_size=1, unique=True))
    }

    def fresh() -> dict[str, bytes]:
        twin = folder.with_name(f"{folder.name}-{os.urandom(4).hex()}")
        merge(base, [adapters[task] for task in present], present, output=twin, **options)
        found = tree(twin)
        shutil.rmtree(twin)
        return found

    merge(base, [adapters[task] for task in present], present, output=folder, **options)
    for _ in range(data.draw(st.integers(1, most))):
        task = data.draw(st.sampled_from(sorted(adapters)))
        before = tree(folder)
        if task not in present:
            present[task] = data.draw(weight)
            preview = add(folder, adapters[task], present[task], **adding, dry_run=True)
            assert tree(folder) == before
            assert add(folder, adapters[task], present[task], **adding) == preview
        elif data.draw(st.booleans()):
            present[task] = data.draw(weight)
            preview = reweight(folder, adapters[task], present[task], dry_run=True)
            assert tree(folder) == before
            assert reweight(folder, adapters[task], present[task]) == preview
        else:
            del present[task]
            preview = remove(folder, task, dry_run=True)
            assert tree(folder) == before
            assert remove(folder, task) == preview
        after = tree(folder)
        assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} <= {
            *preview.files
        }
        if present:
            assert after == fresh()
        else:
            stored = {path.name: path.read_bytes() for path in base.glob("*.safetensors")}
            assert options["max_shard_size"] or {name: after[name] for name in stored} == stored
            assert not (folder / CORRECTED).exists()
    return list(present)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_edits_in_any_order_end_in_what_a_merge_makes(models: Models, tmp_path: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    base, adapters = models.get(kind)
    shard_size, pattern = KINDS[kind][2], PATTERNS[kind.split()[0]]
    number = st.sampled_from([1.0, 0.5, -1.25, 0.0, 3.0])
    # Two patterns that name the same matrices: the first decides, also when the receipt was written and read.
    weight = number | st.fixed_dictionaries({"default": number, f"({pattern})": number, f".*({pattern})": number})
    folder = tmp_path / os.urandom(6).hex()
    options = {"max_shard_size": shard_size}
    edit_at_random(data, folder, base, adapters, weight, options, {}, most=5)
    shutil.rmtree(folder)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_remove_of_add_is_nothing_for_every_task(models: Models, tmp_path: Path, kind: str) -> None:
    base, adapters = models.get(kind)
    for task, folder in adapters.items():
        others = [adapters[other] for other in adapters if other != task]
        output = tmp_path / task
        merge(base, others, output=output, max_shard_size=KINDS[kind][2])
        before = tree(output)
        edit = add(output, folder, -0.75)
        assert edit.cells > 0
        assert tree(output) != before
        remove(output, task)
        assert tree(output) == before


def test_the_last_task_may_go_and_any_may_come_back(merged: Path, base: Path, tasks: dict[str, Path]) -> None:
    before = tree(merged)
    remove(merged, "math")
    edit = remove(merged, "chat")
    assert edit.receipt.tasks == {}
    assert edit.receipt.tensors_changed == ()
    assert not (merged / "multisbora_undo").exists()
    for path in base.iterdir():
        assert (merged / path.name).read_bytes() == path.read_bytes()
    assert "no task" in (merged / "README.md").read_text()
    assert Receipt.read(merged).base_checked
    add(merged, tasks["chat"], 0.5)
    add(merged, tasks["math"])
    assert tree(merged) == before


def test_rows_are_written_alone_and_only_in_their_files(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    geometry = from_checkpoint(base)
    tasks = write_mix(tmp_path / "a", base, {"first": "fa", "rows": "fb"}, target_modules=["o_proj"])
    folder = tmp_path / "ours"
    merge(base, [tasks["first"]], output=folder)
    checkpoint = Checkpoint.open(folder)
    indices = {m.module: set() for m in geometry.select(["o_proj"])}  # type: ignore[var-annotated]
    spans = []
    writes = cells_module.write_all

    def spy(file: int, data: memoryview, offset: int) -> None:
        spans.append((os.readlink(f"/proc/self/fd/{file}"), offset, len(data)))
        writes(file, data, offset)

    monkeypatch.setattr(cells_module, "write_all", spy)
    stamps = {path: path.stat().st_mtime_ns for path in checkpoint.headers}
    edit = add(folder, tasks["rows"])
    owned = Receipt.read(folder).tasks["rows"].regions
    allowed = set()
    for module, region in owned.items():
        tensor = geometry.find(module).tensor
        place, path = checkpoint.place(tensor), checkpoint.where[tensor]
        allowed |= {
            (str(path), place.offset + row * place.row_bytes + i)
            for row in region.region.indices
            for i in range(place.row_bytes)
        }
        indices.pop(module)
    assert not indices
    touched = [(path, start + i) for path, start, size in spans for i in range(size)]
    assert set(touched) == allowed
    assert len(touched) == len(allowed) == edit.bytes_written
    files = {name for name in edit.files if name.startswith("model")}
    assert files == {Path(path).name for path, _ in allowed}
    for path, stamp in stamps.items():
        assert (path.stat().st_mtime_ns == stamp) == (path.name not in files)


def test_reweight_leaves_matrices_alone_whose_lambda_stays(merged: Path, tasks: dict[str, Path]) -> None:
    edit = reweight(merged, tasks["chat"], {"default": 0.5, "q_proj": 2.0})
    assert {name.split(".")[-2] for name in edit.tensors} == {"q_proj"}
    assert edit.receipt.tasks["chat"].regions[Q].weight == 2
    before = tree(merged)
    nothing = reweight(merged, tasks["chat"], {"default": 0.5, "q_proj": 2.0})
    assert (nothing.files, nothing.tensors, nothing.cells) == ((), (), 0)
    assert tree(merged) == before


def test_scores_are_dropped_by_an_edit_and_kept_where_nothing_is_done(merged: Path, tasks: dict[str, Path]) -> None:
    replace(Receipt.read(merged), scores={"math": {"score": 0.5}}).write(merged)
    kept = reweight(merged, tasks["chat"], 0.5)
    assert not kept.scores_dropped
    assert Receipt.read(merged).scores == {"math": {"score": 0.5}}
    assert remove(merged, "chat").scores_dropped
    assert Receipt.read(merged).scores == {}


def untouched(folder: Path, call: Callable[[], object], kind: type[Exception], *words: str) -> str:
    before = tree(folder)
    message = refused(call, kind, *words)
    assert tree(folder) == before
    return message


def test_tasks_that_are_not_there_or_are_already(merged: Path, tasks: dict[str, Path]) -> None:
    untouched(merged, lambda: add(merged, tasks["math"]), UsageError, "holds task math already", "reweight")
    untouched(merged, lambda: remove(merged, "code"), UsageError, "'code'", "chat, math")
    untouched(merged, lambda: reweight(merged, tasks["code"], 1), UsageError, "'code'")
    untouched(merged, lambda: add(merged, tasks["code"], float("nan")), UsageError, "finite")
    untouched(merged, lambda: add(merged, tasks["code"], {"nothing": 1}), UsageError, "'nothing'", "names none")
    untouched(merged, lambda: add(merged, merged), AdapterError, "adapter_config.json")


def test_no_merged_checkpoint(base: Path, tasks: dict[str, Path], tmp_path: Path) -> None:
    refused(lambda: add(base, tasks["math"]), CheckpointError, "only a checkpoint that `merge` wrote")
    refused(lambda: remove(tmp_path / "none", "math"), CheckpointError, "does not exist")
    assert not (tmp_path / "none").exists()


def test_regions_that_meet_are_refused(merged: Path, base: Path, tmp_path: Path) -> None:
    geometry, receipt = from_checkpoint(base), Receipt.read(merged)
    own = {name: list(region.region.indices) for name, region in receipt.tasks["math"].regions.items()}
    mark = receipt.base_fingerprint
    same = write_adapter(tmp_path / "same", geometry, "same", indices=own, base_fingerprint=mark)
    message = untouched(merged, lambda: add(merged, same), MergeError, "math and same both own cells of model.layers.0")
    crossing = write_adapter(tmp_path / "rows", geometry, "rows", variant="fb", base_fingerprint=mark)
    untouched(merged, lambda: add(merged, crossing), MergeError, "both own cells")
    twins = [tmp_path / "math-adapter", same]
    shutil.copytree(same, twins[0])
    edit_json(twins[0] / "adapter_config.json", task="math")
    assert message == refused(lambda: merge(base, twins, output=tmp_path / "out"), MergeError)


def test_adapters_of_another_base_or_other_claims(merged: Path, tasks: dict[str, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(tasks["code"], tmp_path / "code"))
    edit_json(other / "adapter_config.json", base_fingerprint="blake3:" + 64 * "0")
    untouched(merged, lambda: add(merged, other), AdapterError, "another base", "--allow-base-mismatch")
    edit_json(other / "adapter_config.json", base_fingerprint=None, claim_digest="c")
    untouched(merged, lambda: add(merged, other), AdapterError, "does not say which base")
    claims = {"code": ["d"]}
    untouched(
        merged,
        lambda: add(merged, other, claims=claims, allow_base_mismatch=True),
        AdapterError,
        "claims of code changed",
    )
    assert not add(merged, other, claims={"code": ["c"]}, allow_base_mismatch=True).receipt.base_checked


def test_an_adapter_that_is_not_the_merged_one(merged: Path, tasks: dict[str, Path], tmp_path: Path) -> None:
    moved = Path(shutil.copytree(tasks["chat"], tmp_path / "moved"))
    assert reweight(merged, moved, 0.75).cells
    edit_json(moved / "adapter_config.json", alpha=4)
    untouched(merged, lambda: reweight(merged, moved, 1), AdapterError, "not the adapter of chat", "add it anew")
    shutil.rmtree(moved)
    geometry = from_checkpoint(merged)
    regions = {name: r.region for name, r in Receipt.read(merged).tasks["chat"].regions.items()}
    again = write_adapter(
        moved,
        geometry,
        "chat",
        variant="fb",
        indices={name: region.indices for name, region in regions.items()},
        excluded={name: region.excluded for name, region in regions.items()},
        seed=99,
        base_fingerprint=Receipt.read(merged).base_fingerprint,
    )
    untouched(merged, lambda: reweight(merged, again, 1), AdapterError, "not the adapter of chat")


def test_a_task_that_changes_nothing_or_overflows(merged: Path, base: Path, tmp_path: Path) -> None:
    tiny = write_mix(tmp_path / "a", base, {**VARIANTS, "new": "fa"})["new"]
    untouched(merged, lambda: add(merged, tiny, 1e-9), MergeError, "new changes no cell")
    untouched(merged, lambda: add(merged, tiny, 1e39), MergeError, "lower its lambda")
    assert add(merged, tiny, 0).cells == 0


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_cells_that_were_changed_since(merged: Path, tasks: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(merged)
    tensor = f"{Q}.weight"
    place, row = checkpoint.place(tensor), Receipt.read(merged).tasks["chat"].regions[Q].region.indices[0]
    excluded = Receipt.read(merged).tasks["chat"].regions[Q].region.excluded
    column = next(i for i in range(place.columns) if i not in excluded)
    flip(checkpoint.where[tensor], place.offset + row * place.row_bytes + column * place.dtype.itemsize)
    for call in (lambda: remove(merged, "chat"), lambda: reweight(merged, tasks["chat"], 1)):
        untouched(merged, call, CheckpointError, f"cells of chat in {tensor} were changed since")
    remove(merged, "math")  # another task's


def test_cells_that_are_nowhere(merged: Path, tasks: dict[str, Path]) -> None:
    path = merged / "multisbora_receipt.json"
    content = json.loads(path.read_text())
    content["tasks"]["math"]["regions"][Q]["indices"].append(10**6)
    edit_json(path, tasks=content["tasks"])
    for call in (lambda: remove(merged, "math"), lambda: remove(merged, "chat"), lambda: add(merged, tasks["code"])):
        untouched(merged, call, CheckpointError, "is damaged, it has cells of math", "1000000 is outside an axis")


def test_an_undo_file_that_was_changed_or_is_gone(merged: Path, tasks: dict[str, Path]) -> None:
    undo = undo_path(merged, "chat")
    flip(undo, undo.stat().st_size - 1)
    for call in (lambda: remove(merged, "chat"), lambda: reweight(merged, tasks["chat"], 1)):
        untouched(merged, call, CheckpointError, "chat.safetensors", "not what multisbora_receipt.json says")
    undo.unlink()
    untouched(merged, lambda: remove(merged, "chat"), CheckpointError, "chat.safetensors does not exist")


@pytest.mark.parametrize("change", ["header", "size"])
def test_files_that_are_laid_out_otherwise(merged: Path, tasks: dict[str, Path], change: str) -> None:
    path = sorted(merged.glob("model*.safetensors"))[0]
    data = path.read_bytes()
    if change == "header":
        path.write_bytes(data.replace(b'"format":"pt"', b'"format":"tp"'))
    else:
        told = Receipt.read(merged)
        wrong = replace(told.weights[path.name], size=told.weights[path.name].size + 1)
        replace(told, weights={**told.weights, path.name: wrong}).write(merged)
    for call in (lambda: remove(merged, "chat"), lambda: add(merged, tasks["code"])):
        untouched(merged, call, CheckpointError, path.name, "was changed since")


def test_a_card_that_somebody_wrote_into(merged: Path) -> None:
    card = merged / "README.md"
    plain = card.read_bytes()
    card.write_text("ours is better")
    untouched(merged, lambda: remove(merged, "chat"), CheckpointError, "README.md was changed", "delete it there")
    card.unlink()
    remove(merged, "chat")
    assert card.is_file()
    assert card.read_bytes() != plain


def test_an_undo_file_of_nobody(merged: Path, tasks: dict[str, Path]) -> None:
    undo_path(merged, "code").write_bytes(b"ours")
    untouched(merged, lambda: add(merged, tasks["code"]), CheckpointError, "code.safetensors is of no task")


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_files_that_another_folder_has_too(merged: Path, tasks: dict[str, Path], tmp_path: Path, kind: str) -> None:
    path = sorted(merged.glob("model*.safetensors"))[0]
    twin = tmp_path / "twin.safetensors"
    if kind == "hard":
        os.link(path, twin)
    else:
        path.rename(twin)
        path.symlink_to(twin)
    for call in (lambda: remove(merged, "chat"), lambda: add(merged, tasks["code"])):
        untouched(merged, call, CheckpointError, path.name, f"is a {kind} link", "cp -rL")
    copy = Path(shutil.copytree(merged, tmp_path / "copy"))
    assert remove(copy, "chat").cells


def test_a_disk_without_room_is_seen_before(
    merged: Path, tasks: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    made = calls(lambda: untouched(merged, lambda: add(merged, tasks["code"]), CheckpointError, "out of disk space"))
    assert made == []


def test_a_task_name_is_no_path(merged: Path, tasks: dict[str, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(tasks["code"], tmp_path / "code"))
    edit_json(other / "adapter_config.json", task="../../code")
    untouched(merged, lambda: add(merged, other), AdapterError, "not usable")


def test_the_view_must_be_that_of_the_checkpoint(merged: Path, tasks: dict[str, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(tasks["code"], tmp_path / "code"))
    scheme = {"kind": "nf4", "dtype": "bfloat16", "block_size": 64, "double": True, "modules": [Q], "digest": "0"}
    edit_json(other / "adapter_config.json", base_quantization=scheme)
    untouched(merged, lambda: add(merged, other), UsageError, "--base-view original")
    untouched(merged, lambda: add(merged, other, base_view="dequantized"), UsageError, "stands on the stored base")
    assert add(merged, other, base_view="original").receipt.tasks["code"].quantization is not None


def test_an_edit_writes_what_it_checked(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An undo file that another program changes between the two readings is not written into the weights."""
    real = CellsFile.read
    seen: list[str] = []

    def second_differs(self: Any, name: str, shape: tuple[int, int], dtype: np.dtype[Any]) -> np.ndarray:
        found = real(self, name, shape, dtype)
        if self.path.name == "chat.safetensors":
            seen.append(name)
            if seen.count(name) == 2:
                found = found.copy()
                found[0, 0] += 1
        return found

    monkeypatch.setattr(CellsFile, "read", second_differs)
    untouched(merged, lambda: remove(merged, "chat"), CheckpointError, "changed while it was read")


def test_the_receipt_keeps_the_order_of_patterns(merged: Path, tasks: dict[str, Path]) -> None:
    weight = {"default": 1.0, "z.*|q_proj": 0.5, "a.*|q_proj": 0.25}
    reweight(merged, tasks["chat"], weight)
    content = json.loads((merged / "multisbora_receipt.json").read_text())
    assert list(content["tasks"]["chat"]["weight"].items()) == list(weight.items())
    assert Receipt.read(merged).tasks["chat"].weight.at(Q) == 0.5
