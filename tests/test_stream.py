"""One pass over a checkpoint: what it hashes, what it writes, and what happens where something goes wrong."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from builders import tiny_gpt2, tiny_llama, tree
from commands import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import multisbora.cells
import multisbora.stream
from multisbora.checkpoint import Checkpoint
from multisbora.errors import CheckpointError
from multisbora.geometry import from_checkpoint
from multisbora.layout import same_layout, sharded
from multisbora.stream import PREFIX, Passed, check_shapes, fingerprint, fingerprint_of, stream

Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base") / "llama", shards=2)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of which every tensor has several."""
    monkeypatch.setattr(multisbora.cells, "_BLOCK", 100)
    monkeypatch.setattr(multisbora.stream, "_CHUNK", 1000)


def state(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class Adds:
    """A patch that writes the number of its row into the first column, and on the way perhaps doubles all."""

    def __init__(self, whole: bool = False, turns: bool = False) -> None:
        self.whole, self.turns, self.seen = whole, turns, []

    def turn(self, stored: np.ndarray) -> bool:
        assert self.whole and stored.ndim == 2
        if self.turns:
            stored *= 2
        return self.turns

    def apply(self, rows: np.ndarray, start: int) -> None:
        self.seen.append((start, start + len(rows)))
        rows[:, 0] = np.arange(start, start + len(rows))


@pytest.mark.parametrize("threads", [1, 2, 7, None])
@pytest.mark.usefixtures("small_blocks")
def test_digests_are_of_the_bytes(base: Path, threads: int | None) -> None:
    checkpoint = Checkpoint.open(base)
    passed = stream(checkpoint, threads=threads)
    assert list(passed) == list(checkpoint.where)
    for name, tensor in state(base).items():
        assert passed[name] == Passed(*[blake3(raw(tensor)).hexdigest()] * 2)


@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("size", [None, 9_000, 1 << 30])
@pytest.mark.usefixtures("small_blocks")
def test_what_no_patch_touches_is_copied(base: Path, tmp_path: Path, size: int | None, threads: int) -> None:
    checkpoint = Checkpoint.open(base)
    targets = same_layout(checkpoint) if size is None else sharded(checkpoint, size)[0]
    passed = stream(checkpoint, targets, tmp_path, threads=threads)
    assert passed == stream(checkpoint)
    assert sorted(path.name for path in tmp_path.iterdir()) == [target.name for target in targets]
    for name, tensor in state(base).items():
        assert raw(state(tmp_path)[name]) == raw(tensor)
    if size is None:
        assert tree(tmp_path).items() <= tree(base).items()


@pytest.mark.parametrize("cloned", [False, True])
@pytest.mark.usefixtures("small_blocks")
def test_patched_tensors_and_no_others_change(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cloned: bool
) -> None:
    def clone(source: int, target: int) -> bool:
        os.sendfile(target, source, 0, os.fstat(source).st_size)
        return True

    monkeypatch.setattr(multisbora.stream, "_clone", clone if cloned else lambda source, target: False)
    checkpoint = Checkpoint.open(base)
    patches = {Q: Adds(), UP: Adds(whole=True, turns=True), EMBEDDING: Adds(whole=True)}
    passed = stream(checkpoint, same_layout(checkpoint), tmp_path, patches, threads=3)
    before, after = state(base), state(tmp_path)
    for name, tensor in before.items():
        base_now = tensor * 2 if name == UP else tensor.clone()
        assert passed[name] == Passed(blake3(raw(tensor)).hexdigest(), blake3(raw(base_now)).hexdigest())
        if name in patches:
            base_now[:, 0] = torch.arange(len(tensor))
        assert raw(after[name]) == raw(base_now), name
    rows = len(before[Q])
    assert patches[Q].seen == [(row, row + 1) for row in range(rows)]
    assert patches[UP].seen == [(0, len(before[UP]))]


def test_without_a_file_to_write_no_task_is_written(base: Path) -> None:
    patches = {Q: Adds(), UP: Adds(whole=True, turns=True)}
    passed = stream(Checkpoint.open(base), patches=patches)
    assert not patches[Q].seen and not patches[UP].seen
    assert passed[UP].base == blake3(raw(state(base)[UP] * 2)).hexdigest() != passed[UP].stored


@settings(deadline=None, max_examples=25)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.bool]))
def test_any_shapes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, dtype: torch.dtype) -> None:
    shapes = data.draw(st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=5))
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "out").mkdir()
    tensors = {f"t{n}": (torch.randn(shape) * 50).to(dtype) for n, shape in enumerate(shapes)}
    save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    passed = stream(checkpoint, same_layout(checkpoint), folder / "out", threads=data.draw(st.integers(1, 3)))
    assert (folder / "out" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert {name: each.stored for name, each in passed.items()} == {
        name: blake3(raw(tensor)).hexdigest() for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("threads", [1, 4])
def test_the_error_of_one_tensor_is_the_one_that_is_raised(base: Path, tmp_path: Path, threads: int) -> None:
    class Fails(Adds):
        def apply(self, rows: np.ndarray, start: int) -> None:
            raise CheckpointError("only this one")

    before = descriptors(), threading.active_count()
    checkpoint = Checkpoint.open(base)
    patches = {name: Adds() for name in from_tensors(checkpoint)} | {UP: Fails()}
    refused(
        lambda: stream(checkpoint, same_layout(checkpoint), tmp_path, patches, threads),
        CheckpointError,
        "only this one",
    )
    assert (descriptors(), threading.active_count()) == before


def from_tensors(checkpoint: Checkpoint) -> list[str]:
    return [name for name in checkpoint.where if len(checkpoint.info(name).shape) == 2]


@pytest.mark.usefixtures("small_blocks")
def test_the_others_stop_when_one_failed(base: Path, tmp_path: Path) -> None:
    failed = threading.Event()

    class Fails(Adds):
        def apply(self, rows: np.ndarray, start: int) -> None:
            failed.set()
            raise CheckpointError("stop")

    class Waits(Adds):
        def apply(self, rows: np.ndarray, start: int) -> None:
            super().apply(rows, start)
            failed.wait(10)
            if start:  # by then the failure is known, or will be within a few rows
                threading.Event().wait(0.01)

    checkpoint = Checkpoint.open(base)
    waits = Waits()
    with pytest.raises(CheckpointError, match="stop"):
        stream(checkpoint, same_layout(checkpoint), tmp_path, {EMBEDDING: waits, Q: Fails()}, threads=2)
    assert len(waits.seen) < checkpoint.info(EMBEDDING).shape[0]


@pytest.mark.parametrize("patched", [False, True])
def test_a_source_that_shrinks_meanwhile_is_noticed(tmp_path: Path, patched: bool) -> None:
    base = tiny_llama(tmp_path / "base")
    checkpoint = Checkpoint.open(base)
    targets = same_layout(checkpoint)
    last = list(checkpoint.headers[base / "model.safetensors"].tensors)[-1]
    os.truncate(base / "model.safetensors", (base / "model.safetensors").stat().st_size - 10)
    (tmp_path / "out").mkdir()
    refused(
        lambda: stream(checkpoint, targets, tmp_path / "out", {last: Adds(whole=True)} if patched else {}),
        CheckpointError,
        "model.safetensors ended while it was read",
    )


def test_a_source_that_is_gone_is_named(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", shards=2)
    checkpoint = Checkpoint.open(base)
    (base / "model-00002-of-00002.safetensors").unlink()
    before = descriptors()
    refused(
        lambda: stream(checkpoint), CheckpointError, "model-00002-of-00002.safetensors cannot be read: No such file"
    )
    assert descriptors() == before


def test_no_file_is_written_over(base: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(base)
    targets = same_layout(checkpoint)
    (tmp_path / targets[1].name).write_text("mine")
    before = descriptors()
    with pytest.raises(FileExistsError):
        stream(checkpoint, targets, tmp_path)
    assert (tmp_path / targets[1].name).read_text() == "mine"
    assert descriptors() == before


@pytest.mark.parametrize("call", ["ftruncate", "pwrite", "fsync", "fdatasync"])
def test_what_the_system_refuses_is_raised(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(multisbora.stream, "_clone", lambda source, target: False)

    def fails(*arguments: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    class Slow(Adds):
        def apply(self, rows: np.ndarray, start: int) -> None:
            threading.Event().wait(0.3)  # so that the thread that writes back has its turn

    monkeypatch.setattr(os, call, fails)
    checkpoint = Checkpoint.open(base)
    before = descriptors(), threading.active_count()
    with pytest.raises(OSError, match="Input/output error"):
        stream(checkpoint, same_layout(checkpoint), tmp_path, {Q: Slow(whole=True)})
    assert (descriptors(), threading.active_count()) == before


def test_the_files_have_reached_the_disk(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    fsync: Callable[[int], None] = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file))[1])
    checkpoint = Checkpoint.open(base)
    stream(checkpoint, same_layout(checkpoint), tmp_path)
    assert sorted(synced) == sorted(str(path) for path in tmp_path.iterdir())


def test_the_fingerprint_is_of_the_adaptable_tensors_alone(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    geometry = from_checkpoint(base)
    mark = fingerprint(base, geometry)
    assert len(mark.removeprefix(PREFIX)) == 64
    assert fingerprint(tiny_llama(tmp_path / "sharded", shards=3), geometry) == mark
    assert fingerprint(tiny_llama(tmp_path / "seed", seed=1), geometry) != mark
    assert fingerprint(tiny_llama(tmp_path / "float", dtype="float16"), geometry) != mark
    (base / "tokenizer.json").write_text("{}")
    tensors = load_file(base / "model.safetensors")
    tensors[EMBEDDING][0, 0] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(base, geometry) == mark
    tensors[Q][0, 0] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(base, geometry) != mark


def test_the_fingerprint_is_what_its_docstring_says(tmp_path: Path) -> None:
    base = tiny_gpt2(tmp_path / "base")
    geometry, tensors = from_checkpoint(base), load_file(base / "model.safetensors")
    whole = blake3()
    for matrix in sorted(geometry.matrices, key=lambda m: m.tensor):
        inner = blake3(raw(tensors[matrix.tensor])).hexdigest()
        rows, columns = matrix.in_features, matrix.out_features
        whole.update(f'["{matrix.tensor}","F32",[{rows},{columns}],"{inner}"]\n'.encode())
    assert fingerprint(base, geometry) == f"blake3:{whole.hexdigest()}"
    checkpoint = Checkpoint.open(base)
    assert fingerprint_of(checkpoint, geometry, stream(checkpoint)) == fingerprint(base, geometry)


def test_a_fingerprint_of_another_model_is_refused(tmp_path: Path) -> None:
    geometry = from_checkpoint(tiny_llama(tmp_path / "base"))
    wide = tiny_llama(tmp_path / "wide", intermediate_size=64)
    for call in (lambda: fingerprint(wide, geometry), lambda: check_shapes(Checkpoint.open(wide), geometry)):
        refused(call, CheckpointError, "another model")
    gpt2 = tiny_gpt2(tmp_path / "gpt2")
    refused(lambda: fingerprint(gpt2, geometry), CheckpointError, "holds no tensor")


def test_a_clone_is_made_where_the_file_system_can(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(range(256)) * 64)
    with (tmp_path / "source").open("rb") as source, (tmp_path / "target").open("xb") as target:
        cloned = multisbora.stream._clone(source.fileno(), target.fileno())
    same = (tmp_path / "target").read_bytes() == (tmp_path / "source").read_bytes()
    assert same == cloned
    shutil.rmtree(tmp_path)
