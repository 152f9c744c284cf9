"""A patch makes the very checkpoint that it was taken from, out of the very base; anything else is refused."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import draw_regions, edit_json, tiny_gpt2, tiny_llama, tree, write_adapter
from commands import Run, assert_refused, refused
from safetensors.torch import load_file, save_file

import multisbora.difference
import multisbora.quantization
from multisbora.checkpoint import FileDigest
from multisbora.difference import apply, diff
from multisbora.errors import CheckpointError, MergeError
from multisbora.geometry import from_checkpoint
from multisbora.loading import load_base
from multisbora.merge import merge
from multisbora.quantization import record
from multisbora.receipt import Receipt
from multisbora.stream import fingerprint

Q = "model.layers.0.self_attn.q_proj.weight"
EXPERTS = r"model\.layers\.0\.mlp\.experts\.\d+\.(gate_up|down)_proj"
VARIANTS = {"math": "fa", "chat": "fb", "code": "fa"}  # where chat crosses math, math keeps the cells


def write_tasks(folder: Path, base: Path, variants: Mapping[str, str] = VARIANTS, **options: Any) -> list[Path]:
    """One adapter a task, with disjoint regions: where fb crosses fa, the task that comes first keeps the cells."""
    geometry = from_checkpoint(base)
    drawn = {key: options.pop(key) for key in ("rank", "target_modules") if key in options}
    regions = draw_regions(geometry, variants, **drawn)
    names = list(variants)
    return [
        write_adapter(
            folder / task,
            geometry,
            task,
            variant=variants[task],
            rank=drawn.get("rank", 4),
            indices=regions[task],
            seed=place,
            excluded={
                module: sorted({i for t in names[:place] if variants[t] != variants[task] for i in regions[t][module]})
                for module in regions[task]
            },
            base_fingerprint=fingerprint(base, geometry),
            **options,
        )
        for place, task in enumerate(names)
    ]


def fused(folder: Path) -> Path:
    """A base whose experts are fused, of which there are more than ten, so that their names sort otherwise."""
    base = tiny_llama(folder, shards=2)
    path = base / "model-00001-of-00002.safetensors"
    state, index = load_file(path), json.loads((base / "model.safetensors.index.json").read_text())
    generator = torch.Generator().manual_seed(0)
    for kind, shape in (("gate_up", (12, 8, 5)), ("down", (12, 5, 4))):
        name = f"model.layers.0.mlp.experts.{kind}_proj"
        state[name] = torch.randn(shape, generator=generator).to(torch.bfloat16)
        index["weight_map"][name] = path.name
    save_file(state, path, metadata={"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    return base


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base") / "llama", shards=2, num_hidden_layers=1)


@pytest.fixture(scope="module")
def merged(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    merge(model, write_tasks(folder, model), {"math": 0.5}, output=folder / "merged")
    return folder / "merged"


@pytest.fixture(scope="module")
def patch(merged: Path) -> Path:
    path = merged.parent / "patch.safetensors"
    diff(merged, path)
    return path


def round_trip(folder: Path, base: Path, merged: Path) -> None:
    """A patch is taken, and makes the same folder elsewhere from a base that has another name and is sound."""
    diff(merged, folder / "patch.safetensors")
    before = tree(base)
    elsewhere = shutil.copytree(base, folder / "elsewhere")
    receipt = apply(folder / "patch.safetensors", elsewhere, folder / "again")
    assert tree(folder / "again") == tree(merged)
    assert tree(elsewhere) == before
    assert receipt == Receipt.read(merged)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kind", ["llama", "sharded llama", "gpt2", "sharded bare gpt2"])
def test_a_patch_and_the_base_are_the_merged_checkpoint(tmp_path: Path, kind: str, dtype: str) -> None:
    shards = 3 if "sharded" in kind else 1
    if "llama" in kind:
        base = tiny_llama(tmp_path / "base", dtype=dtype, shards=shards, tied=shards == 1)
    else:
        base = tiny_gpt2(tmp_path / "base", dtype=dtype, shards=shards, bare="bare" in kind)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("template")
    adapters = write_tasks(tmp_path, base, use_rslora=True)
    weights = {"math": 0.7, "chat": {"default": -1.0, "q_proj|c_attn": 0.0, "down_proj|c_fc": 2.0}, "code": 0.0}
    merge(base, adapters, weights, output=tmp_path / "merged")
    round_trip(tmp_path, base, tmp_path / "merged")


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("size", [10_000, 40_000, 1 << 30])
def test_what_was_sharded_anew_is_so_again(tmp_path: Path, shards: int, size: int) -> None:
    base = tiny_llama(tmp_path / "base", shards=shards)
    merge(base, write_tasks(tmp_path, base), output=tmp_path / "merged", max_shard_size=size)
    round_trip(tmp_path, base, tmp_path / "merged")


def test_fused_experts(tmp_path: Path) -> None:
    base = fused(tmp_path / "base")
    adapters = write_tasks(tmp_path, base, rank=2, target_modules=EXPERTS)
    merge(base, adapters, {"math": {r"experts\.3\.down_proj": 0.0}}, output=tmp_path / "merged")
    round_trip(tmp_path, base, tmp_path / "merged")


@pytest.mark.parametrize("how", ["keep", "average"])
def test_modules_that_were_trained_whole(tmp_path: Path, how: str) -> None:
    base = tiny_llama(tmp_path / "base", tied=False)
    adapters = write_tasks(tmp_path, base, modules_to_save=["lm_head", "norm"])
    for place, folder in enumerate(adapters):
        tensors = load_file(folder / "adapter_model.safetensors")
        generator = torch.Generator().manual_seed(place)
        if how == "average" or place == 0:
            tensors["base_model.model.lm_head.weight"] = torch.randn((259, 32), generator=generator)
        if place == 1:
            tensors["base_model.model.model.norm.weight"] = torch.randn(32, generator=generator)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    merge(base, adapters, {"math": 0.5}, output=tmp_path / "merged", whole_modules=how)
    round_trip(tmp_path, base, tmp_path / "merged")
    cells = load_file(tmp_path / "patch.safetensors")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(cells["+whole/lm_head.weight"], found["lm_head.weight"])
    assert diff(tmp_path / "merged", tmp_path / "dry", dry_run=True).whole == 259 * 32 + 32
    shift(tmp_path / "merged", "model.norm.weight")
    words = "model.norm.weight is not what its receipt says"
    refused(lambda: diff(tmp_path / "merged", tmp_path / "dry"), CheckpointError, words)


@pytest.mark.parametrize(("kind", "quantization"), [("llama", "nf4"), ("gpt2", "int8")])
def test_a_dequantised_base_is_dequantised_again(tmp_path: Path, kind: str, quantization: Any) -> None:
    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
    base = tiny_gpt2(tmp_path / "base", n_embd=64) if kind == "gpt2" else tiny_llama(tmp_path / "base", **sizes)
    how = record(load_base(base, quantization))
    targets = r".*\.[01]\.(attn\.c_attn|.*q_proj)"
    merge(base, write_tasks(tmp_path, base, target_modules=targets, base_quantization=how), output=tmp_path / "merged")
    round_trip(tmp_path, base, tmp_path / "merged")
    assert apply(tmp_path / "patch.safetensors", base, tmp_path / "dry", dry_run=True) == Receipt.read(
        tmp_path / "merged"
    )


def test_a_base_dequantised_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_llama(tmp_path / "base", hidden_size=64, intermediate_size=128)
    how = record(load_base(base, "nf4"))
    adapters = write_tasks(tmp_path, base, {"math": "fa"}, base_quantization=how)
    merge(base, adapters, output=tmp_path / "merged")
    diff(tmp_path / "merged", tmp_path / "patch")
    original = multisbora.quantization.dequantize_stored

    def otherwise(matrix: np.ndarray, *arguments: Any) -> str:
        mark = original(matrix, *arguments)
        matrix[0, 0] += 1
        return mark

    monkeypatch.setattr(multisbora.quantization, "dequantize_stored", otherwise)
    message = refused(lambda: apply(tmp_path / "patch", base, tmp_path / "out"), MergeError, "dequantised here is not")
    assert "install the version of bitsandbytes" in message
    monkeypatch.undo()
    shift(base, Q)
    for dry_run in (True, False):
        words = "the matrices that can be adapted differ" if dry_run else f"{Q} differs"
        refused(
            lambda dry=dry_run: apply(tmp_path / "patch", base, tmp_path / "out", dry_run=dry), CheckpointError, words
        )
    assert not (tmp_path / "out").exists()


def test_scores_travel(model: Path, merged: Path, tmp_path: Path) -> None:
    scored = shutil.copytree(merged, tmp_path / "scored")
    replace(Receipt.read(scored), scores={"math": {"score": 0.1 + 0.2, "nll": 1e-7, "n": 3}}).write(scored)
    round_trip(tmp_path, model, scored)


def test_a_patch_has_the_cells_that_tasks_changed_and_no_others(model: Path, tmp_path: Path) -> None:
    adapters = write_tasks(tmp_path, model)
    weights = {"math": {"default": 0.0, "q_proj": 1.0}, "code": 0.0}
    receipt = merge(model, adapters, weights, output=tmp_path / "merged")
    found = diff(tmp_path / "merged", tmp_path / "patch")
    cells = load_file(tmp_path / "patch")
    assert {name for name in cells if not name.startswith("chat/")} == {f"math/{Q}"}
    after = load_file(next(p for p in (tmp_path / "merged").glob("*.safetensors") if Q in load_file(p)))[Q]
    region = receipt.tasks["math"].regions[Q.removesuffix(".weight")].region
    assert torch.equal(cells[f"math/{Q}"], after[:, list(region.indices)])
    assert found.cells == {"math": 32 * 4, "chat": receipt.tasks["chat"].cells, "code": 0}
    assert sum(cells[name].numel() for name in cells) == sum(found.cells.values())
    assert found.size == (tmp_path / "patch").stat().st_size
    assert found.checkpoint_size == sum(len(data) for data in tree(tmp_path / "merged").values())
    assert found.to_json()["tasks"]["math"] == {"cells": 128}


def test_the_same_checkpoint_gives_the_same_patch(merged: Path, patch: Path, tmp_path: Path) -> None:
    diff(shutil.copytree(merged, tmp_path / "copy"), tmp_path / "patch")
    assert (tmp_path / "patch").read_bytes() == patch.read_bytes()
    assert str(merged.parent) not in patch.read_bytes().decode("latin-1")


def test_a_dry_run_checks_everything_and_writes_nothing(model: Path, merged: Path, patch: Path, tmp_path: Path) -> None:
    found = diff(merged, tmp_path / "patch", dry_run=True)
    assert found.size == patch.stat().st_size
    assert apply(patch, model, tmp_path / "out", dry_run=True) == Receipt.read(merged)
    assert not list(tmp_path.iterdir())
    altered = shutil.copytree(merged, tmp_path / "altered")
    shift(altered, Q)
    refused(lambda: diff(altered, tmp_path / "patch", dry_run=True), CheckpointError, f"{Q} in the cells of")
    other = shutil.copytree(model, tmp_path / "other")
    shift(other, Q)
    refused(lambda: apply(patch, other, tmp_path / "out", dry_run=True), CheckpointError, f"{Q} differs")


def test_every_byte_of_the_header_counts(tmp_path: Path) -> None:
    base, merged, hurt = tmp_path / "base", tmp_path / "merged", tmp_path / "hurt"
    base.mkdir()
    save_file({Q: torch.ones(6, 5)}, base / "model.safetensors")
    (base / "config.json").write_text('{"model_type": "llama"}')
    merge(base, write_tasks(tmp_path, base, {"math": "fa"}, rank=1), output=merged)
    diff(merged, tmp_path / "patch")
    data = bytearray((tmp_path / "patch").read_bytes())
    generator = random.Random(0)
    for place in range(8 + int.from_bytes(data[:8], "little")):
        old, data[place] = data[place], data[place] ^ generator.randrange(1, 256)
        hurt.write_bytes(data)
        data[place] = old
        with pytest.raises(CheckpointError) as caught:
            apply(hurt, base, tmp_path / "out")
        assert str(hurt) in str(caught.value) and "\n" not in str(caught.value), place
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "hurt", "math", "merged", "patch"]


def test_every_cell_counts(model: Path, patch: Path, tmp_path: Path) -> None:
    data = bytearray(patch.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    generator = random.Random(1)
    hurt = tmp_path / "hurt"
    for place in (start, len(data) - 1, *(generator.randrange(start, len(data)) for _ in range(60))):
        old, data[place] = data[place], data[place] ^ (1 << generator.randrange(8))
        hurt.write_bytes(data)
        data[place] = old
        refused(
            lambda: apply(hurt, model, tmp_path / "out"), CheckpointError, f"{hurt} is damaged: ", "in the cells of"
        )
    for cut in (0, 7, start - 1, start, len(data) - 1):
        hurt.write_bytes(data[:cut])
        refused(lambda: apply(hurt, model, tmp_path / "out"), CheckpointError, f"{hurt} is truncated or corrupt")
    hurt.write_bytes(data + b"\0")
    refused(lambda: apply(hurt, model, tmp_path / "out"), CheckpointError, f"{hurt} is truncated or corrupt")
    assert [path.name for path in tmp_path.iterdir()] == ["hurt"]


def test_a_space_in_the_header_counts(model: Path, patch: Path, tmp_path: Path) -> None:
    data = patch.read_bytes()
    length = int.from_bytes(data[:8], "little")
    longer = (length + 8).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 8 + data[8 + length :]
    (tmp_path / "longer").write_bytes(longer)
    refused(lambda: apply(tmp_path / "longer", model, tmp_path / "out"), CheckpointError, "is damaged: its header")


def test_what_is_no_patch(model: Path, merged: Path, tmp_path: Path) -> None:
    for file in (model / "model-00001-of-00002.safetensors", merged / "multisbora_undo" / "math.safetensors"):
        refused(
            lambda file=file: apply(file, model, tmp_path / "out"), CheckpointError, "is no patch", "multisbora diff"
        )
    refused(lambda: apply(tmp_path / "gone", model, tmp_path / "out"), CheckpointError, "gone does not exist")
    refused(lambda: apply(model, model, tmp_path / "out"), CheckpointError, f"{model} cannot be read")


def shift(folder: Path, tensor: str) -> None:
    """Change every value of a stored tensor, and nothing else."""
    for path in folder.glob("model*.safetensors"):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        if tensor in header:
            start, stop = (8 + length + place for place in header[tensor]["data_offsets"])
            path.write_bytes(raw[:start] + bytes(value ^ 1 for value in raw[start:stop]) + raw[stop:])
            return
    raise AssertionError(tensor)


@pytest.mark.parametrize("tensor", [Q, "model.embed_tokens.weight", "model.norm.weight"])
def test_a_base_with_other_values_is_refused(model: Path, patch: Path, tmp_path: Path, tensor: str) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    shift(other, tensor)
    refused(
        lambda: apply(patch, other, tmp_path / "out"),
        CheckpointError,
        f"{other} is not the base that {patch} was made with: {tensor} differs",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_the_first_of_many_tensors_is_named(patch: Path, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", shards=2, num_hidden_layers=1, seed=1)
    refused(lambda: apply(patch, other, tmp_path / "out"), CheckpointError, "model.embed_tokens.weight differs")


def test_a_base_of_other_shapes_and_names_is_refused(model: Path, patch: Path, tmp_path: Path) -> None:
    layers = tiny_llama(tmp_path / "layers", shards=2, num_hidden_layers=2)
    small = tiny_llama(tmp_path / "small", shards=2, num_hidden_layers=1, intermediate_size=40)
    dtype = tiny_llama(tmp_path / "dtype", shards=2, num_hidden_layers=1, dtype="float16")
    single = tiny_llama(tmp_path / "single", num_hidden_layers=1)
    merged_name = "model.layers.1.input_layernorm.weight"
    refused(lambda: apply(patch, layers, tmp_path / "out"), CheckpointError, f"it has a tensor {merged_name}")
    untied = tiny_llama(tmp_path / "untied", num_hidden_layers=1, tied=False)
    merge(untied, write_tasks(tmp_path, untied), output=tmp_path / "merged")
    diff(tmp_path / "merged", tmp_path / "patch")
    refused(lambda: apply(tmp_path / "patch", model, tmp_path / "out"), CheckpointError, "it lacks the tensor lm_head")
    for folder in (small, dtype, single):
        refused(
            lambda folder=folder: apply(patch, folder, tmp_path / "out"),
            CheckpointError,
            f"{folder} is not the base",
            "it has other dtypes, shapes or files of tensors (model",
        )
    assert not (tmp_path / "out").exists()


def test_a_base_with_another_tokenizer_is_refused(model: Path, patch: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    edit_json(other / "tokenizer_config.json", padding_side="left")
    refused(lambda: apply(patch, other, tmp_path / "out"), CheckpointError, "its tokenizer_config.json differs")
    (other / "tokenizer_config.json").unlink()
    refused(lambda: apply(patch, other, tmp_path / "out"), CheckpointError, "its tokenizer_config.json is missing")


def test_files_that_the_base_did_not_have_are_left_out(model: Path, merged: Path, patch: Path, tmp_path: Path) -> None:
    more = shutil.copytree(model, tmp_path / "more")
    (more / "download.log").write_text("fetched")
    (more / "README.md").write_text("# The base")
    apply(patch, more, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(merged)


def test_an_altered_checkpoint_gives_no_patch(merged: Path, tmp_path: Path) -> None:
    def altered(name: str, *words: str) -> None:
        refused(
            lambda: diff(tmp_path / name, tmp_path / "patch"), CheckpointError, "altered since it was merged", *words
        )
        shutil.rmtree(tmp_path / name)

    shift(shutil.copytree(merged, tmp_path / "cells"), Q)
    altered("cells", f"{Q} in the cells of")
    with (shutil.copytree(merged, tmp_path / "card") / "README.md").open("a") as file:
        file.write("By me.\n")
    altered("card", "README.md is not what its receipt says")
    path = shutil.copytree(merged, tmp_path / "receipt") / "multisbora_receipt.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    altered("receipt", "multisbora_receipt.json is not what")
    path = shutil.copytree(merged, tmp_path / "header") / "model-00001-of-00002.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "more": "of it"})
    altered("header", "model-00001-of-00002.safetensors is not what")
    path = shutil.copytree(merged, tmp_path / "undo") / "multisbora_undo" / "math.safetensors"
    path.unlink()
    refused(lambda: diff(tmp_path / "undo", tmp_path / "patch"), CheckpointError, f"{path} cannot be read")
    shutil.rmtree(tmp_path / "undo")
    refused(lambda: diff(merged.parent / "math", tmp_path / "patch"), CheckpointError, "neither model.safetensors nor")
    assert not list(tmp_path.iterdir())


def test_what_came_out_otherwise_is_not_published(
    model: Path, patch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merging = sys.modules["multisbora.merge"]  # the package has a function of that name
    write = merging.copy_file

    def otherwise(source: Path, target: Path) -> FileDigest:
        target.write_bytes(source.read_bytes() + b" ")
        return replace(write(source, target.with_suffix(".again")), size=1)

    monkeypatch.setattr(merging, "copy_file", otherwise)
    message = refused(lambda: apply(patch, model, tmp_path / "out"), CheckpointError, "what came out is not")
    assert "the receipts differ in files; is the same version" in message
    assert not list(tmp_path.iterdir())


def test_a_base_is_no_merged_checkpoint(model: Path, tmp_path: Path) -> None:
    refused(lambda: diff(model, tmp_path / "patch"), CheckpointError, "multisbora_receipt.json does not exist")


def test_nothing_is_written_over(model: Path, merged: Path, patch: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("mine", "link"):
        refused(lambda name=name: diff(merged, tmp_path / name), CheckpointError, f"{name} exists: choose another")
    refused(lambda: apply(patch, model, tmp_path), CheckpointError, "is not an empty folder")
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "link"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_write_that_fails_leaves_nothing(
    model: Path, merged: Path, patch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    original, left = getattr(os, call), 0

    def failing(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(number, os.strerror(number))
        return original(*arguments)

    words = "out of disk space while writing" if number == errno.ENOSPC else "Input/output error"
    for place in (0, 1, 3):
        for work in (lambda: diff(merged, tmp_path / "out"), lambda: apply(patch, model, tmp_path / "out")):
            left = place
            with monkeypatch.context() as patched:
                patched.setattr(os, call, failing)
                if (call, place) == ("fsync", 3) and not list(tmp_path.iterdir()):
                    continue  # a patch is one file in one folder, which are synced, and the folder that it comes into
                refused(work, CheckpointError, words)
            assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ["write_all", "_sync", "sync_folder"])
def test_a_kill_leaves_nothing_to_see_and_nothing_in_the_way(
    model: Path, merged: Path, patch: Path, tmp_path: Path, moment: str
) -> None:
    script = f"""
import os, signal, sys
from multisbora import cells, difference, publish, stream, undo
def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
for module in (publish, stream, undo):
    if hasattr(module, {moment!r}):
        setattr(module, {moment!r}, die)
arguments = sys.argv[1:]
(difference.diff if len(arguments) == 2 else difference.apply)(*arguments)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(multisbora.difference.__file__).parents[1])}
    for arguments in ([merged, tmp_path / "patch"], [patch, model, tmp_path / "out"]):
        command = [sys.executable, "-c", script, *arguments]
        assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    diff(merged, tmp_path / "patch")
    apply(tmp_path / "patch", model, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(merged)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "patch"]


def test_the_commands(trained: Path, base: Path, run: Run) -> None:
    assert run("merge", "--weight", "doubling=0.5", "--output", "merged").code == 0
    dry = run("diff", "merged", "--output", "patch", "--dry-run")
    assert dry.code == 0 and "would write patch: " in dry.out and not Path("patch").exists()
    done = run("diff", "merged", "--output", "patch", "--json")
    assert done.json["bytes"] == Path("patch").stat().st_size
    assert sorted(done.json["tasks"]) == ["adding", "doubling"]
    assert_refused(run("diff", "merged", "--output", "patch"), 1, "patch exists: choose another output")

    dry = run("apply", "patch", "--output", "out", "--dry-run")
    assert dry.code == 0 and "would write out" in dry.out and not Path("out").exists()
    assert run("apply", "patch", "--output", "out").out.endswith(
        "every file is the one that the patch was taken from\n"
    )
    Path("multisbora.yaml").unlink()
    done = run("apply", "patch", "--base", str(base), "--output", "too", "--json")
    assert done.json == json.loads(Path("merged/multisbora_receipt.json").read_text())
    assert tree(Path("out")) == tree(Path("too")) == tree(Path("merged"))
    assert_refused(run("apply", "patch", "--output", "more"), 2, "multisbora.yaml")
    assert_refused(
        run("apply", "patch", "--base", "merged", "--output", "more"), 1, "merged is not the base", "differs"
    )
