"""The cells of a region in a stored tensor, against a dense mask of them."""

from __future__ import annotations

import itertools
import os
import tempfile
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import multisbora.cells
from multisbora.adapter import AdapterModule
from multisbora.cells import (
    PATCHABLE,
    Cells,
    Place,
    as_bytes,
    bits,
    compose,
    finite,
    read_cells,
    read_into,
    read_rows,
    write_all,
    write_cells,
)
from multisbora.errors import CheckpointError, MergeError
from multisbora.geometry import Matrix
from multisbora.region import Region
from multisbora.shares import Share

DTYPES = st.sampled_from(sorted(PATCHABLE))


@dataclass(frozen=True)
class Case:
    """A region in a matrix, and the oracle: a mask of its cells over the stored rows, and values of the region."""

    region: Region
    matrix: Matrix
    mask: np.ndarray
    values: np.ndarray

    @property
    def dense(self) -> np.ndarray:
        """The values at their places in the stored tensor's rows, 0 elsewhere."""
        own = list(self.region.indices)
        full = np.zeros(self.matrix.shape, np.float32)
        full[(slice(None), own) if self.region.variant == "fa" else (own, slice(None))] = self.values
        return self._stored(full, 0)

    def _stored(self, full: np.ndarray, other: Any) -> np.ndarray:
        stored = full if self.matrix.orientation == "linear" else full.T
        rows = np.full((self.matrix.parts * stored.shape[0], stored.shape[1]), other, full.dtype)
        first = (self.matrix.part or 0) * stored.shape[0]
        rows[first : first + stored.shape[0]] = stored
        return rows


@st.composite
def cases(draw: st.DrawFn) -> Case:
    out_features, in_features = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    variant = draw(st.sampled_from(["fa", "fb"]))
    own_size, other_size = (in_features, out_features) if variant == "fa" else (out_features, in_features)
    indices = draw(st.sets(st.integers(0, own_size - 1), min_size=1))
    excluded = draw(st.sets(st.integers(0, other_size - 1)))
    parts = draw(st.one_of(st.none(), st.integers(1, 4)))
    part = None if parts is None else draw(st.integers(0, parts - 1))
    orientation = draw(st.sampled_from(["linear", "conv1d"]))
    region = Region(variant, tuple(sorted(indices)), tuple(sorted(excluded)))
    matrix = Matrix("m", "m.weight", out_features, in_features, orientation, part, parts or 1)
    cells = np.zeros(matrix.shape, bool)
    lines, others = sorted(indices), sorted(set(range(other_size)) - excluded)
    cells[np.ix_(others, lines) if variant == "fa" else np.ix_(lines, others)] = True
    values = np.arange(1, len(indices) * other_size + 1, dtype=np.float32).reshape(region.values_shape(matrix.shape))
    case = Case(region, matrix, cells, values)
    return Case(region, matrix, case._stored(cells, False), values)


def blocks(draw: Any, rows: int) -> list[tuple[int, int]]:
    """The rows cut into blocks anywhere."""
    cuts = sorted(draw(st.sets(st.integers(1, max(1, rows - 1)), max_size=4)) - {rows})
    edges = [0, *cuts, rows]
    return list(itertools.pairwise(edges))


def filled(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An array of this dtype in which every cell has bits of its own, none of them NaN."""
    size = int(np.prod(shape))
    return np.arange(1, size + 1, dtype=f"u{PATCHABLE[dtype].itemsize}").view(PATCHABLE[dtype]).reshape(shape)


@settings(deadline=None)
@given(case=cases())
def test_the_layout_is_that_of_the_mask(case: Case) -> None:
    cells = Cells.of(case.region, case.matrix)
    assert cells.count == case.mask.sum() == case.region.cells(case.matrix.shape)
    assert cells.arrange(case.values).shape == cells.shape
    assert np.array_equal(cells.arrange(case.values).ravel(), case.dense[case.mask])
    for own in (slice(0, 1), slice(1, cells.shape[0])):
        assert np.array_equal(cells.arrange(case.values, own), cells.arrange(case.values)[own])
    if case.mask.any():
        assert cells.shape == (case.mask.any(axis=1).sum(), case.mask.any(axis=0).sum())


@settings(deadline=None)
@given(case=cases(), dtype=DTYPES, data=st.data())
def test_windows_take_and_put_these_cells_alone(case: Case, dtype: str, data: st.DataObject) -> None:
    cells = Cells.of(case.region, case.matrix)
    before = filled(case.mask.shape, dtype)
    tensor, found, seen = before.copy(), np.zeros(cells.shape, before.dtype), []
    new = filled(cells.shape, dtype)[::-1, ::-1]
    for start, stop in blocks(data.draw, len(tensor)):
        window = cells.window(start, stop)
        assert window is not None or not case.mask[start:stop].any()
        if window is None:
            continue
        block = tensor[start:stop]
        taken = window.get(block)
        assert taken.flags.c_contiguous and not np.shares_memory(taken, tensor)
        found[window.own] = taken
        seen += list(range(window.own.start, window.own.stop))
        window.put(block, new[window.own])
    assert np.array_equal(bits(found).ravel(), bits(before)[case.mask])
    assert np.array_equal(bits(tensor)[case.mask], bits(np.ascontiguousarray(new)).ravel())
    assert np.array_equal(bits(tensor)[~case.mask], bits(before)[~case.mask])
    if cells.count:
        assert seen == list(range(cells.shape[0]))


@settings(deadline=None)
@given(case=cases(), dtype=DTYPES, block=st.sampled_from([1, 20, 64, 1 << 20]), offset=st.integers(0, 9))
def test_files_are_read_and_written_at_these_cells_alone(case: Case, dtype: str, block: int, offset: int) -> None:
    cells = Cells.of(case.region, case.matrix)
    before = filled(case.mask.shape, dtype)
    place = Place(offset, *before.shape, before.dtype)
    new = np.ascontiguousarray(filled(cells.shape, dtype)[::-1])
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(multisbora.cells, "_BLOCK", block)
        path = Path(folder) / "file"
        path.write_bytes(b"\xaa" * offset + before.tobytes() + b"\xaa" * 7)
        file = os.open(path, os.O_RDWR)
        try:
            found = read_cells(file, place, cells, path)
            written = write_cells(file, place, cells, new, path)
            again = read_cells(file, place, cells, path)
        finally:
            os.close(file)
        after = before.copy()
        after[case.mask] = new.ravel()
        assert path.read_bytes() == b"\xaa" * offset + after.tobytes() + b"\xaa" * 7
    assert np.array_equal(bits(found).ravel(), bits(before)[case.mask])
    assert np.array_equal(bits(again), bits(new))
    if cells.columns is None:
        assert written == new.nbytes
    assert written <= before.nbytes


def test_blocks_cover_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multisbora.cells, "_BLOCK", 100)
    assert list(Place(0, 7, 12, np.dtype("<f4")).blocks()) == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert list(Place(0, 2, 1000, np.dtype("<f2")).blocks()) == [(0, 1), (1, 2)]
    assert list(Place(0, 0, 5, np.dtype("<f4")).blocks()) == []
    assert list(Place(0, 5, 0, np.dtype("<f4")).blocks()) == [(0, 5)]


@pytest.mark.parametrize(("dtype", "kind"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_composing_is_fp32_rounded_once(dtype: str, kind: torch.dtype) -> None:
    generator = np.random.default_rng(0)
    before = generator.normal(0, 1, (40, 7)).astype(np.float32).astype(PATCHABLE[dtype])
    values = generator.normal(0, 0.1, (40, 7)).astype(np.float32)
    after = compose(before, values, 2.0, 0.3, "these")
    own = torch.tensor(before.astype(np.float32))
    expected = (own + torch.tensor(values) * torch.tensor(0.3 * 2.0, dtype=torch.float32)).to(kind)
    assert after.dtype == before.dtype
    assert after.tobytes() == expected.view(torch.uint8).numpy().tobytes()


def test_a_weight_of_zero_keeps_every_bit() -> None:
    before = np.array([[-0.0, np.nan, np.inf]], np.float32)
    assert compose(before, np.ones((1, 3), np.float32), 1.0, 0.0, "these") is before


@pytest.mark.parametrize("value", [7e4, np.nan, -np.inf])
def test_what_the_dtype_cannot_hold_is_refused(value: float) -> None:
    before = np.array([[1.0, value]], np.float32)
    with pytest.raises(
        MergeError, match=r"^math: q_proj would hold a value that float16 cannot: lower its lambda, or check"
    ):
        with np.errstate(over="ignore"):
            stored = before.astype(np.float16) if abs(value) != 7e4 else np.array([[1.0, 6e4]], np.float16)
        compose(stored, np.full((1, 2), 1e4, np.float32), 1.0, 2.0, "math: q_proj")


@pytest.mark.parametrize("dtype", sorted(PATCHABLE))
def test_what_is_finite(dtype: str) -> None:
    kind = PATCHABLE[dtype]
    limits = ml_dtypes.finfo(kind)
    for values in ([], [0.0, -0.0, 1.0, limits.max, limits.min, limits.smallest_subnormal]):
        assert finite(np.array(values, kind).reshape(1, -1))
    for value in (np.inf, -np.inf, np.nan, -np.nan):
        assert not finite(np.array([[1.0, value]], np.float32).astype(kind))


def test_values_beside_excluded_cells_are_not_copied_as_a_whole() -> None:
    matrix = Matrix("m", "m.weight", 4096, 256)
    region = Region("fa", tuple(range(64)), excluded=(7,))
    values = np.ones((4096, 64), np.float32)
    share = Share("math", "m", matrix, AdapterModule(region, values, 1.0), 1.0)
    before = np.zeros((16, 64), np.float32)
    tracemalloc.start()
    for start in range(0, 4080, 16):
        share.compose(before, slice(start, start + 16))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < values.nbytes / 4


def test_bits_tell_zeros_apart() -> None:
    zeros = np.array([0.0, -0.0], np.float32)
    assert list(bits(zeros)) == [0, 1 << 31]
    assert bytes(as_bytes(zeros)) == b"\0\0\0\0\0\0\0\x80"


def test_reads_and_writes_go_on_where_the_system_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10))
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:3], offset))
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: preadv(file, [buffers[0][:3]], offset))
    buffer = bytearray(8)
    with path.open("r+b") as file:
        write_all(file.fileno(), memoryview(b"abcdefgh"), 1)
        read_into(file.fileno(), memoryview(buffer), 1, path)
    assert path.read_bytes() == b"\0abcdefgh\0"
    assert buffer == b"abcdefgh"


def test_a_file_that_ends_early_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    place = Place(4, 5, 5, np.dtype("<f4"))
    cells = Cells.of(Region("fa", (1,)), Matrix("m", "m", 5, 5))
    with path.open("r+b") as file:
        for call in (
            lambda: read_rows(file.fileno(), place, 0, 5, path),
            lambda: read_cells(file.fileno(), place, cells, path),
            lambda: write_cells(file.fileno(), place, cells, np.zeros((5, 1), np.float32), path),
        ):
            with pytest.raises(CheckpointError, match=r"file ended while it was read"):
                call()
    assert path.read_bytes() == bytes(100)
