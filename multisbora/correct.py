"""The corrected merge: the same cells with other values in them, so that tasks speak less on each other's inputs.

A plain merge writes D = sum_i lambda_i D_i into a matrix, D_i = s_i * (what task i trained). That is what each task
asked for, and also what the inputs of every other task get. Here D is what serves all tasks best. With M_i the second
moments of what the rows of task i send into the matrix (`moments.Moments`), it minimises

    sum_i omega_i trace((D - a_i D_i) M_i (D - a_i D_i)') + rho |D - sum_i a_i D_i|^2

over all D that are zero but for owned cells. omega_i = 1 / trace(D_i M_i D_i') measures each task by what its own
update does on its own rows, and rho = ridge * (mean diagonal of sum_i omega_i M_i) pulls towards the sum of all where
the moments say little.

Were a_i = lambda_i, tasks that want different things of the same inputs would each get less than they asked for, in all
matrices alike, and that adds up over the layers. So they ask for more: along its own update, on its own rows, each task
is to be heard in D as loud as its lambda says. With heard_i = omega_i trace(D M_i D_i'), which is linear in a,

    a minimises |heard - lambda|^2 + ridge |a - lambda|^2

and a_i - lambda_i is the task's excess. Each row of a matrix is a problem of its own over the cells that anybody owns
in it, so fa and fb are one case: where tasks own columns, a row's cells are those of all of them; a row that a task
owns by fb is solved over all its input channels, and the other tasks want nothing there.

A task has no say in matrices where its lambda is 0, nor where its update cannot be heard on its own rows (omega would
be infinite). A task that has a matrix for itself gets there, bit for bit, what the plain merge gives it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .delta import delta
from .errors import MergeError, UsageError
from .region import Region

RIDGE = 0.01
_ROWS = 1024  # of a matrix that are solved together
Places = npt.NDArray[np.intp]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Wish:
    """What one task wants of one matrix.

    Attributes:
        values: fp32, as trained: (out, rank) for fa, (rank, in) for fb; zero in excluded cells.
        scaling, weight: s and lambda.
        block: (n, n) fp32, symmetric: the moments of its rows at the n `channels` of all wishes for the matrix.
    """

    task: str
    region: Region
    values: np.ndarray
    scaling: float
    weight: float
    block: np.ndarray


def check_ridge(ridge: float) -> None:
    """Refuse a ridge that is none.

    Raises:
        UsageError: it is no positive number.
    """
    if isinstance(ridge, bool) or not math.isfinite(ridge) or ridge <= 0:
        raise UsageError(f"the ridge {ridge!r} is no positive number: {RIDGE} is the usual one")


def channels(regions: Iterable[Region], in_features: int) -> Places:
    """The input channels of a matrix at which one of the regions has cells, sorted."""
    owned = np.zeros(in_features, bool)
    for region in regions:
        if region.variant == "fa":
            owned[list(region.indices)] = True
        else:
            free = np.ones(in_features, bool)
            free[list(region.excluded)] = False
            owned |= free
    return np.flatnonzero(owned)


@dataclass(frozen=True, eq=False)
class Solution:
    """What serves all tasks of one matrix best; of tasks whose lambda is not 0.

    Attributes:
        values: task -> fp32 in the layout of its own, with lambda and scaling in them, zero in excluded cells.
        excess: task -> a - lambda, see above; an fp32 number.
    """

    values: dict[str, np.ndarray]
    excess: dict[str, np.float32]


def correct(wishes: Sequence[Wish], shape: tuple[int, int], ridge: float, what: str) -> Solution:
    """The values that serve all tasks of one matrix best: solved in fp64, rounded once.

    Args:
        wishes: one a task, in any order; their regions share no cell.
        shape: (out, in) of the matrix.
        ridge: as above, positive.
        what: what a message calls the matrix.

    Raises:
        MergeError: the equations are singular in fp64.
    """
    heard = sorted((wish for wish in wishes if wish.weight), key=lambda wish: wish.task)
    equations = _Equations.of(wishes, heard, shape, ridge, what)
    if equations is None:
        with np.errstate(over="ignore"):
            values = {wish.task: delta(wish.values, wish.scaling, wish.weight) for wish in heard}
        return Solution(values, {wish.task: np.float32(0) for wish in heard})
    (solution,) = equations.solve([[wish.weight for wish in heard]])
    return solution


def spread(wishes: Sequence[Wish], shape: tuple[int, int], ridge: float, what: str) -> dict[str, dict[str, np.ndarray]]:
    """What each task's lambda does to the values of all: they are linear in the lambdas.

    Arguments and errors are those of `correct`. Which tasks have a say is settled by the lambdas that the wishes have:
    what is found holds for others too, as long as none of them is 0.

    Returns:
        task i -> task j -> S_ij, fp32 in the layout of j, so that `correct` finds sum_i lambda_i S_ij for j, but for
        rounding. Where nobody disturbs anybody, S_ij is not there for others than i itself.
    """
    heard = sorted((wish for wish in wishes if wish.weight), key=lambda wish: wish.task)
    equations = _Equations.of(wishes, heard, shape, ridge, what)
    if equations is None:
        with np.errstate(over="ignore"):
            return {wish.task: {wish.task: np.array(delta(wish.values, wish.scaling, 1.0))} for wish in heard}
    found = equations.solve(np.eye(len(heard)).tolist())
    return {wish.task: solution.values for wish, solution in zip(heard, found, strict=True)}


@dataclass(frozen=True, eq=False)
class _Equations:
    """The equations of one matrix.

    Attributes:
        updates: of the tasks that are heard, and `wishes` theirs.
        total, rho: sum of omega_i M_i, (n, n), and rho.
        groups: see `_groups`.
    """

    wishes: Sequence[Wish]
    updates: Sequence[_Update]
    total: Doubles
    rho: float
    groups: Sequence[tuple[Places, Places]]
    ridge: float
    what: str

    @classmethod
    def of(
        cls, wishes: Sequence[Wish], heard: Sequence[Wish], shape: tuple[int, int], ridge: float, what: str
    ) -> _Equations | None:
        """None where there is nothing to solve, and a plain merge does all that can be done."""
        if len(heard) < 2:
            return None
        known = channels((wish.region for wish in wishes), shape[1])
        used = channels((wish.region for wish in heard), shape[1])
        inner = np.searchsorted(known, used)
        updates = [_Update.of(wish, shape, used, inner) for wish in heard]
        total: Doubles = np.zeros((len(used), len(used)))
        for update in updates:
            total += update.omega * update.block.astype(np.float64)
        rho = ridge * float(np.trace(total)) / max(1, len(used))
        return cls(heard, updates, total, rho, list(_groups(updates, len(used))), ridge, what) if rho else None

    def solve(self, weights: Sequence[Sequence[float]]) -> list[Solution]:
        """The solution for each of some rows of lambdas, which are of the tasks that are heard.

        Raises:
            MergeError: the equations are singular in fp64.
        """
        found = [{wish.task: np.zeros_like(wish.values) for wish in self.wishes} for _ in weights]
        loud: Doubles = np.zeros((len(self.updates), len(self.updates)))
        with np.errstate(over="ignore", invalid="ignore"):
            for rows, own in self.groups:
                left, rights, told = _equations(self.updates, self.total, self.rho, rows, own)
                parts = _solved(left, rights.reshape(-1, len(own)), self.ridge, self.what).reshape(rights.shape)
                loud += np.tensordot(told, parts, ((1, 2), (1, 2)))
            excesses = [_excess(loud, np.array(row), self.ridge) for row in weights]
            amounts = np.array(weights, np.float64) + np.array(excesses, np.float64)
            for rows, own in self.groups:  # again: the parts of all of them together take too much room
                left, rights, _ = _equations(self.updates, self.total, self.rho, rows, own)
                right = np.tensordot(amounts, rights, 1)
                solved = _solved(left, right.reshape(-1, len(own)), self.ridge, self.what).reshape(right.shape)
                for values, part in zip(found, solved, strict=True):
                    _hand_out(self.updates, part, rows, own, values)
        numbers = [*excesses, *(part for values in found for part in values.values())]
        if not all(np.isfinite(part).all() for part in numbers):
            raise _singular(self.what, self.ridge)
        return [
            Solution(values, dict(zip(values, excess, strict=True)))
            for values, excess in zip(found, excesses, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class _Update:
    """One wish among the n channels that all wishes use.

    Attributes:
        wanted: (m, k) s * values, of those rows of the matrix and channels at which it has values.
        rows: (out,) which row of `wanted` each row of the matrix is, -1 for none.
        columns: (k,) which of the n channels each of its columns is.
        source: (k,) which column of the values each of them is.
        open: (out,) the rows of the matrix in which it owns cells.
        mine: (k,) the columns that it owns there.
        block: (n, n) fp32, M.
        omega: 1 / trace(D M D'), 0 where that is not positive.
    """

    task: str
    wanted: Doubles
    rows: Places
    columns: Places
    source: Places
    open: npt.NDArray[np.bool_]
    mine: npt.NDArray[np.bool_]
    block: np.ndarray
    omega: float

    @classmethod
    def of(cls, wish: Wish, shape: tuple[int, int], used: Places, inner: Places) -> _Update:
        """A wish, where `used` are the channels and `inner` their places in its block."""
        region, out = wish.region, shape[0]
        indices, excluded = (np.array(found, np.intp) for found in (region.indices, region.excluded))
        if region.variant == "fa":
            rows, columns, source = np.arange(out), np.searchsorted(used, indices), np.arange(len(indices))
            is_open, mine = np.ones(out, bool), np.ones(len(indices), bool)
            is_open[excluded] = False
        else:
            rows, columns, source = np.full(out, -1), np.arange(len(used)), used
            rows[indices] = np.arange(len(indices))
            is_open, mine = rows >= 0, ~np.isin(used, excluded)
        update = wish.scaling * wish.values[:, source].astype(np.float64)
        block = wish.block[np.ix_(inner, inner)]
        energy = float(((update @ block[np.ix_(columns, columns)].astype(np.float64)) * update).sum())
        omega = 1 / energy if energy > 0 and math.isfinite(1 / energy) else 0.0
        return cls(wish.task, update, rows, columns, source, is_open, mine, block, omega)


def _groups(updates: Sequence[_Update], size: int) -> Iterator[tuple[Places, Places]]:
    """Rows of the matrix in which the same channels are owned, some at a time: (the rows, those channels); rows of
    nobody are left out."""
    pattern, kind = np.unique(np.stack([update.open for update in updates]), axis=1, return_inverse=True)
    together: dict[bytes, list[int]] = {}
    for number, owners in enumerate(pattern.T):
        owned = np.zeros(size, bool)
        for update, owner in zip(updates, owners, strict=True):
            owned[update.columns[update.mine & owner]] = True
        together.setdefault(owned.tobytes(), []).append(number)
    for owned_bytes, numbers in together.items():
        own = np.flatnonzero(np.frombuffer(owned_bytes, bool))
        if len(own):
            rows = np.flatnonzero(np.isin(kind.reshape(-1), numbers))
            yield from ((rows[first : first + _ROWS], own) for first in range(0, len(rows), _ROWS))


def _equations(
    updates: Sequence[_Update], total: Doubles, rho: float, rows: Places, own: Places
) -> tuple[Doubles, Doubles, Doubles]:
    """D left = sum_i a_i right_i, over the channels `own` of some rows.

    Returns:
        left (n, n); right (tasks, rows, n); and omega_i D_i M_i, (tasks, rows, n), along which a task is heard.
    """
    left = total[np.ix_(own, own)]
    left[np.diag_indices_from(left)] += rho
    told, right = np.zeros((2, len(updates), len(rows), len(own)))
    place = np.full(len(total), -1)
    place[own] = np.arange(len(own))
    for number, update in enumerate(updates):
        here = np.flatnonzero(update.rows[rows] >= 0)
        part = update.wanted[update.rows[rows[here]]]  # (rows, k), zero where somebody else owns the cell
        told[number, here] = update.omega * (part @ update.block[np.ix_(update.columns, own)].astype(np.float64))
        right[number] = told[number]
        inside = place[update.columns] >= 0
        right[number][np.ix_(here, place[update.columns[inside]])] += rho * part[:, inside]
    return left, right, told


def _excess(loud: Doubles, weights: Doubles, ridge: float) -> npt.NDArray[np.float32]:
    """a - lambda, (tasks,).

    Args:
        loud: (tasks, tasks), how loud the first is heard in what the second asks for.
    """
    if not np.isfinite(loud).all():
        return np.full(len(weights), np.nan, np.float32)
    left = loud.T @ loud + ridge * np.eye(len(loud))
    found: npt.NDArray[np.float32] = np.linalg.solve(left, loud.T @ (weights - loud @ weights)).astype(np.float32)
    return found


def _solved(left: Doubles, right: Doubles, ridge: float, what: str) -> Doubles:
    """D of D left = right, once left is known to be positive definite.

    Raises:
        MergeError: it is not.
    """
    size = np.sqrt(np.diag(left))  # channels differ by many orders of magnitude: each is brought to the same
    try:
        scaled = left / size / size[:, None]
        np.linalg.cholesky(scaled)
        found: Doubles = np.linalg.solve(scaled, (right / size).T).T / size
    except np.linalg.LinAlgError:
        raise _singular(what, ridge) from None
    return found


def _hand_out(
    updates: Sequence[_Update], solved: Doubles, rows: Places, own: Places, found: Mapping[str, np.ndarray]
) -> None:
    """Give each task its cells of a solution, rounded to fp32."""
    for update in updates:
        here = np.flatnonzero(update.open[rows])
        if len(here):  # or its channels need not be among these
            columns = np.searchsorted(own, update.columns[update.mine])
            to: Any = np.ix_(update.rows[rows[here]], update.source[update.mine])
            found[update.task][to] = solved[np.ix_(here, columns)]


def _singular(what: str, ridge: float) -> MergeError:
    return MergeError(
        f"the corrected merge of {what} has no stable solution at a ridge of {ridge:g}: raise --ridge, lower lambdas "
        "that are far above 1, or merge with --method plain"
    )
