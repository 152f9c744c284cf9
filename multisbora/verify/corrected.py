"""What a corrected checkpoint keeps, and whether its values solve the equations that they are said to solve.

Where several tasks own cells of one matrix, D of it is the best for all of them at once if, in every owned cell,

    D (S + rho) = sum_i a_i R_i,        R_i = D_i (omega_i M_i + rho)

with D_i what task i trained, scaled; M_i the moments of its rows; omega_i = 1 / trace(D_i M_i D_i'), S = sum_i omega_i
M_i, and rho = ridge * mean diagonal of S. What the checkpoint keeps is put into these equations, in fp64, and may be
wrong by what rounding it to fp32 explains.

a_i is lambda_i and the excess that is kept. It minimises sum_i (h_i - lambda_i)^2 + ridge (a_i - lambda_i)^2, where
h_i = omega_i trace(D M_i D_i'), if for every task i

    <R_i, P> + ridge (a_i - lambda_i) = 0,        P (S + rho) = sum_j (h_j - lambda_j) omega_j D_j M_j in owned cells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from blake3 import blake3

from .cells import place
from .tensors import UNREADABLE, File, load, one_line
from .told import Told
from .updates import Update

_TOLERANCE = 2.0**-22  # four times what rounding to fp32 does
_STEADY = 1e-5  # of an excess, which hangs on all values of a matrix
_ROWS = 1024  # of a matrix that are looked at together
_CHUNK = 4 << 20


class Kept:
    """The files that a corrected checkpoint keeps, one a task; none in a plain one.

    Attributes:
        problems: what is wrong with them, but for their values.
    """

    def __init__(self, folder: Path, told: Told) -> None:
        self.problems: list[str] = []
        self._corrected = told.correction is not None
        self._files: dict[str, tuple[str, File]] = {}
        for task, name in told.kept_files.items():
            assert told.correction is not None
            kept = told.correction.files[task]
            try:
                file = File.open(folder / name)
                digest = _digest(folder / name)
            except UNREADABLE as error:
                self.problems.append(f"{name} is missing or damaged: {one_line(error)}")
                continue
            self._files[task] = name, file
            if (digest, file.size) != (kept.digest, kept.size):
                self.problems.append(f"{name} is not the file that was kept: its digest or size is not the receipt's")
            if file.metadata != {"format": "pt", "multisbora": "corrected", "task": task}:
                self.problems.append(f"{name} says of itself that it is {str(file.metadata)[:200]}")

    def merged(self, share: Update) -> _Merged | None:
        """What was merged of a share; None where tasks were merged as they are."""
        return _Merged(self, share) if self._corrected else None

    def get(self, task: str, what: str, share: Update) -> torch.Tensor:
        """One array of a task's file, fp32.

        Raises:
            One of UNREADABLE: it is not there.
        """
        if task not in self._files:
            raise ValueError(f"no file is kept of {task}")
        name, file = self._files[task]
        key = f"{what}/{share.matrix.cells_name}"
        found = file.tensors.get(key)
        if found is None or found.dtype != "F32" or len(found.shape) != 2:
            raise ValueError(f"{name} has no {key}")
        return load(found)

    def unsolved(self, shares: Sequence[Update], told: Told) -> Iterator[str]:
        """What does not hold of the values: one problem a matrix."""
        if told.correction is None:
            return
        together: dict[str, list[Update]] = {}
        needed: dict[str, set[str]] = {task: set() for task in self._files}
        for share in shares:
            together.setdefault(share.matrix.cells_name, []).append(share)
        for name, found in together.items():
            kinds = ["values", *(["moments"] if len(found) > 1 else [])]
            for share in found:
                own = [
                    *kinds,
                    *([] if share.factor is None else ["corrected", *(["excess"] if len(found) > 1 else [])]),
                ]
                needed.get(share.task, set()).update(f"{kind}/{name}" for kind in own)
            try:
                problem = self._unsolved(sorted(found, key=lambda share: share.task), told.correction.ridge, told)
            except UNREADABLE as error:
                problem = f"what is kept of it cannot be used: {one_line(error)}"
            if problem:
                yield f"{name}: {problem}"
        for task, (name, file) in self._files.items():
            for odd in sorted(file.tensors.keys() ^ needed[task]):
                yield f"{name} {'has' if odd in file.tensors else 'lacks'} {odd}"

    def _unsolved(self, shares: Sequence[Update], ridge: float, told: Told) -> str | None:
        """What does not hold of the values of one matrix."""
        for share in shares:
            assert share.adapter is not None
            kept, trained = self.get(share.task, "values", share), share.adapter.values(share.module)
            if kept.shape != trained.shape or not torch.equal(kept.view(torch.int32), trained.view(torch.int32)):
                return f"what is kept as trained by {share.task} is not what its adapter has"
        known = _channels(shares)
        heard = [share for share in shares if share.factor is not None]
        terms = []
        for share in heard:
            block = self._block(share, known, heard) if len(heard) > 1 else None
            terms.append(self._term(share, heard, block, told, len(shares) > 1))
        rho = 0.0
        if len(terms) > 1:
            total = sum((term.omega * term.block for term in terms), torch.zeros(()))
            rho = ridge * float(total.trace()) / max(1, len(total))
        if not rho:
            return next((problem for term in terms if (problem := _plain(term))), None)
        left = total + rho * torch.eye(len(total), dtype=torch.float64)
        for first in range(0, terms[0].out, _ROWS):
            window = range(first, min(first + _ROWS, terms[0].out))
            if problem := _residual(terms, left, rho, window, _channels(heard)):
                return f"{problem}: of a ridge of {ridge:g} and the moments that are kept"
        if problem := _unheard(terms, left, rho, ridge):
            return f"{problem}: of a ridge of {ridge:g} and the moments that are kept"
        return None

    def _block(self, share: Update, known: torch.Tensor, heard: Sequence[Update]) -> torch.Tensor:
        """The moments of a task at the channels of those that have a say, (n, n) fp64."""
        upper, size = self.get(share.task, "moments", share), len(known)
        if upper.shape != (1, size * (size + 1) // 2):
            raise ValueError(f"the moments of {share.task} are of {list(upper.shape)}, not of {size} channels")
        if not torch.isfinite(upper).all():
            raise ValueError(f"the moments of {share.task} are not finite")
        block = torch.zeros(size, size, dtype=torch.float64)
        row, column = torch.triu_indices(size, size)
        block[row, column] = block[column, row] = upper[0].to(torch.float64)
        inner = torch.searchsorted(known, _channels(heard))
        return block[inner][:, inner]

    def _term(
        self, share: Update, heard: Sequence[Update], block: torch.Tensor | None, told: Told, shared: bool
    ) -> _Term:
        assert share.adapter is not None
        used, matrix = _channels(heard), share.matrix
        out = matrix.columns if matrix.transposed else matrix.rows
        indices, excluded = torch.tensor(share.indices), torch.tensor(share.excluded, dtype=torch.int64)
        trained, merged = share.adapter.values(share.module), self.get(share.task, "corrected", share)
        if trained.shape != merged.shape:
            raise ValueError(f"the corrected values of {share.task} are of another shape than the trained ones")
        if share.variant == "fa":
            rows, columns, source = torch.arange(out), torch.searchsorted(used, indices), torch.arange(len(indices))
            owned = torch.ones(out, len(indices), dtype=torch.bool)
            owned[excluded] = False
        else:
            rows, columns, source = indices, torch.arange(len(used)), used
            owned = ~torch.isin(used, excluded).expand(len(indices), -1)
        scaling = share.adapter.modules[share.module].scaling
        update = trained[:, source].to(torch.float64) * scaling
        omega = 0.0
        if block is not None:
            energy = float((update @ block[columns][:, columns] * update).sum())
            omega = 1 / energy if energy > 0 and math.isfinite(1 / energy) else 0.0
        excess = float(self.get(share.task, "excess", share).item()) if shared else 0.0
        weight = told.tasks[share.task].at(share.module)
        return _Term(
            share=share,
            out=out,
            rows=rows,
            columns=columns,
            owned=owned,
            update=update,
            weight=weight,
            amount=weight + excess,
            merged=merged[:, source].to(torch.float64),
            plain=not excess and torch.equal(merged, torch.tensor(share.factor, dtype=torch.float32) * trained),
            block=torch.zeros(0, 0) if block is None else block,
            omega=omega,
        )


@dataclass(frozen=True, eq=False)
class _Merged:
    """What a corrected merge wrote for one task in one matrix."""

    kept: Kept
    share: Update

    def values(self, module: str) -> torch.Tensor:
        return self.kept.get(self.share.task, "corrected", self.share)


@dataclass(frozen=True, eq=False)
class _Term:
    """One task in the equations of a matrix, among the n channels of those that have a say; fp64.

    Attributes:
        out: rows of the matrix.
        rows: (m,) of the matrix, that its values are of.
        columns: (k,) of the n channels, that they are at.
        owned: (m, k) the cells that are its own.
        update, merged: (m, k) s * what it trained, and what was merged instead.
        weight, amount: lambda and a.
        plain: whether what was merged are the fp32 numbers of a plain merge, and a is lambda.
    """

    share: Update
    out: int
    rows: torch.Tensor
    columns: torch.Tensor
    owned: torch.Tensor
    update: torch.Tensor
    weight: float
    amount: float
    merged: torch.Tensor
    plain: bool
    block: torch.Tensor
    omega: float


def _plain(term: _Term) -> str | None:
    """Where nothing is to be solved, what is wrong with values that are not those of a plain merge."""
    return None if term.plain else f"the corrected values of {term.share.task} are not those that it has there alone"


def _residual(terms: Sequence[_Term], left: torch.Tensor, rho: float, window: range, used: torch.Tensor) -> str | None:
    """What is wrong with the values of some rows of a matrix; `used` are its channels."""
    found, owner = _cells(terms, window, len(left))
    right = torch.zeros(found.shape, dtype=torch.float64)
    for term in terms:
        right += term.amount * sum(_asked(term, rho, window, len(left)))
    off = (found @ left - right).abs()
    # What rounding each value to fp32 can do, subnormal ones included.
    allowed = _TOLERANCE * ((found.abs() + torch.finfo(torch.float32).tiny) @ left.abs() + right.abs())
    wrong = (owner >= 0) & ~(off <= allowed)
    if not wrong.any():
        return None
    row, column = (int(index) for index in wrong.nonzero()[0])
    where, whose = place((window.start + row, int(used[column]))), terms[int(owner[row, column])].share.task
    return f"{int(wrong.sum())} corrected values are no solution, first at {where}, owned by {whose}"


def _cells(terms: Sequence[_Term], window: range, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What was merged into some rows of a matrix, (rows, n) fp64, and the number of each cell's owner, -1 for none."""
    found, owner = torch.zeros(len(window), size, dtype=torch.float64), torch.full((len(window), size), -1)
    for number, term in enumerate(terms):
        inside = (term.rows >= window.start) & (term.rows < window.stop)
        rows, own = term.rows[inside] - window.start, term.owned[inside]
        at = rows[:, None].expand(own.shape)[own], term.columns.expand(own.shape)[own]
        found[at], owner[at] = term.merged[inside][own], number
    return found, owner


def _asked(term: _Term, rho: float, window: range, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """omega_i D_i M_i and rho D_i of one task, at some rows of a matrix, (rows, n) fp64."""
    inside = (term.rows >= window.start) & (term.rows < window.stop)
    rows, update = term.rows[inside] - window.start, term.update[inside]
    heard, pulled = torch.zeros(2, len(window), size, dtype=torch.float64)
    heard[rows] = term.omega * (update @ term.block[term.columns])
    pulled[rows[:, None], term.columns] = rho * update
    return heard, pulled


def _unheard(terms: Sequence[_Term], left: torch.Tensor, rho: float, ridge: float) -> str | None:
    """Whose excess is not what it has to be for tasks to be heard as loud as their lambdas say."""
    windows = [range(first, min(first + _ROWS, terms[0].out)) for first in range(0, terms[0].out, _ROWS)]
    size = len(left)
    loud = [-term.weight for term in terms]
    for window in windows:
        found, _ = _cells(terms, window, size)
        for number, term in enumerate(terms):
            loud[number] += float((found * _asked(term, rho, window, size)[0]).sum())
    slopes, sizes = [0.0] * len(terms), [0.0] * len(terms)
    for window in windows:
        owned = _cells(terms, window, size)[1] >= 0
        parts = [_asked(term, rho, window, size) for term in terms]
        right = sum((off * part[0] for off, part in zip(loud, parts, strict=True)), torch.zeros(()))
        patterns, kind = owned.unique(dim=0, return_inverse=True)
        for number, pattern in enumerate(patterns):
            own, rows = pattern.nonzero()[:, 0], (kind == number).nonzero()[:, 0]
            scale = left.diagonal()[own].sqrt()
            inner = left[own][:, own] / scale / scale[:, None]
            pushed = torch.linalg.solve(inner, (right[rows][:, own] / scale).T).T / scale
            for task, part in enumerate(parts):
                products = (part[0] + part[1])[rows][:, own] * pushed
                slopes[task] += float(products.sum())
                sizes[task] += float(products.abs().sum())
    for term, slope, magnitude in zip(terms, slopes, sizes, strict=True):
        allowed = _STEADY * (magnitude + ridge * abs(term.amount) + max(abs(other.weight) for other in terms))
        if not abs(slope + ridge * (term.amount - term.weight)) <= allowed:
            return f"the excess of {term.share.task}, {term.amount - term.weight:g}, is not the one that it has to have"
    return None


def _channels(shares: Sequence[Update]) -> torch.Tensor:
    """The input channels at which one of the shares has cells, sorted."""
    matrix = shares[0].matrix
    size = matrix.rows if matrix.transposed else matrix.columns
    owned = torch.zeros(size, dtype=torch.bool)
    for share in shares:
        if share.variant == "fa":
            owned[torch.tensor(share.indices)] = True
        else:
            free = torch.ones(size, dtype=torch.bool)
            free[torch.tensor(share.excluded, dtype=torch.int64)] = False
            owned |= free
    return owned.nonzero()[:, 0]


def _digest(path: Path) -> str:
    """blake3 (hex) of a file."""
    found = blake3()
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            found.update(block)
    return found.hexdigest()
