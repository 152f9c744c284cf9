"""Files of cells: written in any order from any thread, read one by one, and plain safetensors to everyone else."""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from commands import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from multisbora.cells import PATCHABLE, bits
from multisbora.errors import CheckpointError
from multisbora.undo import CellsFile, CellsWriter, Shapes, digest, undo_path


def draw_cells(shapes: Shapes) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {name: generator.normal(size=shape).astype(dtype) for name, (shape, dtype) in shapes.items()}


SHAPES: Shapes = {
    "model.layers.0.q_proj.weight": ((7, 4), PATCHABLE["BF16"]),
    "model.layers.0.experts.down_proj[11]": ((2, 9), PATCHABLE["F32"]),
    "größe": ((1, 3), PATCHABLE["F16"]),
    "nothing": ((0, 3), PATCHABLE["F16"]),
}


@settings(deadline=None, max_examples=30)
@given(data=st.data(), threads=st.integers(1, 4))
def test_rows_may_come_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, threads: int
) -> None:
    path = tmp_path_factory.mktemp("cells") / "folder" / "cells.safetensors"
    cells = draw_cells(SHAPES)
    parts = []
    for name, array in cells.items():
        cuts = sorted(data.draw(st.sets(st.integers(0, len(array)), max_size=3)) | {0, len(array)})
        parts += [(name, start, stop) for start, stop in itertools.pairwise(cuts)]
    order = data.draw(st.permutations(parts))
    with CellsWriter(path, SHAPES, {"task": "math"}) as writer:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda part: writer.write(part[0], cells[part[0]][part[1] : part[2]], part[1]), order))
        writer.sync()
        assert path.stat().st_size == writer.size
    file = CellsFile.open(path)
    assert file.header.metadata == {"format": "pt", "task": "math"}
    assert file.header.tensors.keys() == SHAPES.keys()
    for name, array in cells.items():
        found = file.read(name, *SHAPES[name])
        assert found.dtype == array.dtype and np.array_equal(bits(found), bits(array))
        assert found.flags.writeable


def test_safetensors_reads_it(tmp_path: Path) -> None:
    cells = draw_cells(SHAPES)
    with CellsWriter(tmp_path / "cells.safetensors", SHAPES, {}) as writer:
        for name, array in cells.items():
            writer.write(name, array[:, ::-1][:, ::-1] if array.size else array)  # not contiguous
    with safe_open(tmp_path / "cells.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(cells)
        for name, array in cells.items():
            assert np.array_equal(file.get_tensor(name).float().numpy(), array.astype(np.float32))


def test_what_was_not_written_is_zero(tmp_path: Path) -> None:
    with CellsWriter(tmp_path / "cells", SHAPES, {}):
        pass
    file = CellsFile.open(tmp_path / "cells")
    assert not any(bits(file.read(name, *of)).any() for name, of in SHAPES.items())


def test_another_shape_or_dtype_is_refused(tmp_path: Path) -> None:
    with CellsWriter(tmp_path / "cells", {"a": ((2, 3), PATCHABLE["F16"])}, {}):
        pass
    file = CellsFile.open(tmp_path / "cells")
    for name, shape, dtype, words in (
        ("b", (2, 3), "F16", "of b it holds nothing, not F16 [2, 3]"),
        ("a", (3, 2), "F16", "of a it holds F16 [2, 3], not F16 [3, 2]"),
        ("a", (2, 3), "BF16", "of a it holds F16 [2, 3], not BF16 [2, 3]"),
    ):
        refused(lambda of=(name, shape, PATCHABLE[dtype]): file.read(*of), CheckpointError, f"{file.path}: {words}")


def test_a_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cells"
    with CellsWriter(path, SHAPES, {}):
        pass
    file = CellsFile.open(path)
    os.truncate(path, path.stat().st_size - 1)
    refused(lambda: file.read("größe", *SHAPES["größe"]), CheckpointError, f"{path} ended while it was read")
    refused(lambda: CellsFile.open(path), CheckpointError, f"{path} is truncated or corrupt")
    path.unlink()
    refused(lambda: CellsFile.open(path), CheckpointError, f"{path} does not exist")


def test_no_file_is_written_over_and_none_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FileExistsError):
        CellsWriter(tmp_path / "mine", SHAPES, {})
    assert (tmp_path / "mine").read_text() == "mine"

    def fails(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    before = sorted(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "ftruncate", fails)
    with pytest.raises(OSError, match="No space"):
        CellsWriter(tmp_path / "full", SHAPES, {})
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_digests_are_of_the_rows_one_after_another() -> None:
    cells = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert digest(cells) == blake3(cells.tobytes()).hexdigest()
    assert digest(cells.T) == blake3(cells.T.tobytes()).hexdigest() != digest(cells)
    assert digest(np.zeros((0, 3), np.float16)) == blake3(b"").hexdigest()


def test_where_a_checkpoint_keeps_them(tmp_path: Path) -> None:
    assert undo_path(tmp_path, "math") == tmp_path / "multisbora_undo" / "math.safetensors"
