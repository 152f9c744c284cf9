"""What happens to one stored tensor on its way into a merge: turned to the view, and tasks written into it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from blake3 import blake3

from .cells import Cells, as_bytes, bits
from .checkpoint import Checkpoint
from .errors import AdapterError, MergeError
from .geometry import Geometry, Matrix, Names
from .undo import CellsWriter
from .view import Quantization


class Written(Protocol):
    """What decides the cells of one task in one matrix; `shares.Share`, or a file that has them."""

    @property
    def task(self) -> str: ...
    @property
    def module(self) -> str: ...
    @property
    def matrix(self) -> Matrix: ...
    @property
    def weight(self) -> float: ...
    @property
    def cells(self) -> Cells: ...

    def compose(self, before: np.ndarray, own: slice) -> np.ndarray: ...


@dataclass(slots=True)
class _Trace:
    """What one share did: digests of its cells before and after, and how many changed."""

    before: Any = field(default_factory=blake3)
    after: Any = field(default_factory=blake3)
    changed: int = 0


class TensorPatch:
    """Writes tasks into one stored tensor block by block, keeps what their cells held, and counts."""

    def __init__(
        self, shares: Sequence[Written], keepers: Mapping[str, CellsWriter], view: TensorView | None = None
    ) -> None:
        self.shares, self.keepers, self.view = shares, keepers, view
        self.traces = {(share.task, share.module): _Trace() for share in shares}
        self._rows = math.prod(shares[0].matrix.stored_shape[:-1]) if shares else 0
        self._cells: list[Cells] = []  # in memory only while the tensor goes through

    @property
    def whole(self) -> bool:
        return self.view is not None

    def turn(self, stored: np.ndarray) -> bool:
        if self.view is None:
            return False
        self.view.turn(stored)
        return True

    def apply(self, rows: np.ndarray, start: int) -> None:
        if not start:
            self._cells = [share.cells for share in self.shares]
        for share, cells in zip(self.shares, self._cells, strict=True):
            window = cells.window(start, start + len(rows))
            if window is None:
                continue
            before = window.get(rows)
            after = share.compose(before, window.own)
            trace = self.traces[share.task, share.module]
            trace.before.update(as_bytes(before))
            trace.after.update(as_bytes(after))
            trace.changed += int(np.count_nonzero(bits(before) != bits(after)))
            if after is not before:
                window.put(rows, after)
            self.keepers[share.task].write(share.matrix.cells_name, before, window.own.start)
        if start + len(rows) == self._rows:
            self._cells = []


class View:
    """The dequantised base: turns one stored tensor after another into what training saw, and proves that it was so."""

    def __init__(self, quantization: Quantization, geometry: Geometry, checkpoint: Checkpoint) -> None:
        self.quantization = quantization
        self._digests: dict[str, str] = {}  # module -> of its dequantised weight
        self.tensors: dict[str, TensorView] = {}
        transposed = {matrix.tensor for matrix in geometry.matrices if matrix.orientation == "conv1d"}
        stored = Names(name.removesuffix(".weight") for name in checkpoint.where if name.endswith(".weight"))
        for module in quantization.modules:
            names = stored.find(module)
            if len(names) != 1 or len(checkpoint.info(f"{names[0]}.weight").shape) != 2:
                raise AdapterError(
                    f"{module} was quantised in training, but {checkpoint.folder} has no one matrix of that name: "
                    "merge into the base of the training, or with --base-view original"
                )
            tensor = f"{names[0]}.weight"
            self.tensors[tensor] = TensorView(quantization, module, tensor in transposed, self._digests)

    def of(self, tensor: str) -> TensorView | None:
        """What makes a stored tensor that of this view; None where it is as stored."""
        return self.tensors.get(tensor)

    def check(self) -> None:
        """Refuse another dequantised base than the adapters were trained on.

        Raises:
            MergeError: bitsandbytes made other weights here.
        """
        from .quantization import digest

        if digest(self._digests.items()) != self.quantization.digest:
            raise MergeError(
                "the base dequantised here is not, bit for bit, the one that the tasks were trained on: install the "
                "version of bitsandbytes that they were trained with, or merge with --base-view original"
            )


@dataclass(frozen=True, slots=True)
class TensorView:
    """Dequantises one stored tensor in place, and files the digest."""

    quantization: Quantization
    module: str
    transposed: bool
    digests: dict[str, str]

    def turn(self, stored: np.ndarray) -> None:
        from .quantization import dequantize_stored

        matrix = stored.T if self.transposed else stored  # (out, in), a view
        self.digests[self.module] = dequantize_stored(matrix, self.quantization, self.module)
