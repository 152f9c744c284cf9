"""All matrices of a corrected merge: what its tasks write into them instead of what they trained, and what is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .adapter import Adapter, AdapterModule
from .correct import Places, Solution, Wish, channels, correct, spread
from .errors import DataError
from .geometry import Matrix, Names
from .kept import CORRECTED, EXCESS, MOMENTS, VALUES, Contents, Correction, KeptTask, square, triangle
from .moments import Moments
from .shares import Share

Blocks = Callable[[Share, Places], np.ndarray]  # the moments of a share's task in its matrix at some channels


@dataclass(frozen=True, slots=True)
class Rows:
    """What moments were measured on, see `moments.Moments`."""

    rows: int
    tokens: int
    source: str


@dataclass(frozen=True, eq=False)
class Corrected:
    """A corrected merge that is ready to be written.

    Attributes:
        shares: task -> what it writes, as a plain merge takes it: corrected values at a lambda of 1.
        contents: the files that are kept, one a task.
        correction: what the receipt says of them.
    """

    shares: dict[str, list[Share]]
    contents: list[Contents]
    correction: Correction


def correct_all(
    shares: Iterable[Share],
    measured: Mapping[str, Rows],
    ridge: float,
    blocks: Blocks,
    known: Callable[[Matrix], Solution | None] = lambda matrix: None,
) -> Corrected:
    """Correct every matrix.

    Args:
        shares: what the tasks trained, of all tasks in all matrices.
        measured: task -> what its moments are of.
        blocks: asked for the moments where several tasks own cells of one matrix.
        known: the solution of a matrix that stays as it was; None where it is to be solved.

    Raises:
        DataError: moments are missing.
        MergeError: the equations of a matrix are singular.
    """
    merged: dict[str, list[Share]] = {task: [] for task in measured}
    arrays: dict[str, dict[str, np.ndarray]] = {task: {} for task in measured}
    for found in _by_matrix(shares):
        matrix = found[0].matrix
        name = matrix.cells_name
        solution, upper = known(matrix), _triangles(found, blocks)
        if solution is None:
            solution = correct(_wishes(found, upper), matrix.shape, ridge, name)
        for share in found:
            kept = arrays[share.task]
            kept[f"{VALUES}/{name}"] = share.trained.values
            if share.task in upper:
                kept[f"{MOMENTS}/{name}"] = upper[share.task]
            if share.weight:
                values = solution.values[share.task]
                kept[f"{CORRECTED}/{name}"] = values
                if share.task in upper:
                    kept[f"{EXCESS}/{name}"] = np.array([[solution.excess[share.task]]], np.float32)
                trained = AdapterModule(share.trained.region, values, 1.0)
                share = replace(share, trained=trained, weight=1.0)
            merged[share.task].append(share)
    contents = [Contents(task, arrays[task]) for task in sorted(arrays)]
    kept_tasks = {
        found.task: KeptTask(found.digest, found.size, rows.rows, rows.tokens, rows.source)
        for found in contents
        for rows in (measured[found.task],)
    }
    return Corrected(merged, contents, Correction(ridge, kept_tasks))


def spread_all(shares: Iterable[Share], ridge: float, blocks: Blocks) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """How a corrected merge of all matrices hangs on the lambdas, see `correct.spread`.

    Args:
        shares, ridge, blocks: as for `correct_all`.

    Returns:
        the module's name, as the first of its tasks has it -> task -> task -> values.

    Raises:
        As `correct_all`.
    """
    return {
        found[0].module: spread(
            _wishes(found, _triangles(found, blocks)), found[0].matrix.shape, ridge, found[0].matrix.cells_name
        )
        for found in _by_matrix(shares)
    }


def _by_matrix(shares: Iterable[Share]) -> Iterable[list[Share]]:
    """The shares of each matrix, by task."""
    together: dict[str, list[Share]] = {}
    for share in sorted(shares, key=lambda share: share.task):
        together.setdefault(share.matrix.cells_name, []).append(share)
    return together.values()


def _triangles(found: Sequence[Share], blocks: Blocks) -> dict[str, np.ndarray]:
    """The moments of the tasks of one matrix, as they are kept; none of a task that has it alone."""
    if len(found) < 2:
        return {}
    at = channels((share.trained.region for share in found), found[0].matrix.in_features)
    return {share.task: triangle(blocks(share, at)) for share in found}


def _wishes(found: Sequence[Share], upper: Mapping[str, np.ndarray]) -> list[Wish]:
    """What the tasks of one matrix want."""
    return [
        Wish(
            task=share.task,
            region=share.trained.region,
            values=share.trained.values,
            scaling=share.trained.scaling,
            weight=share.weight,
            block=square(upper[share.task]) if upper else np.zeros((0, 0), np.float32),
        )
        for share in found
    ]


class Measured:
    """The moments of some tasks, whatever leading parts the names of their matrices have."""

    def __init__(self, moments: Mapping[str, Moments], tasks: Iterable[str]) -> None:
        """
        Raises:
            DataError: those of one of the tasks are missing.
        """
        self.moments = {task: moments[task] for task in tasks if task in moments}
        if missing := [task for task in tasks if task not in moments]:
            names = ",".join(missing)
            raise DataError(
                f"a corrected merge needs the moments of every task, {names} has none: run multisbora measure --tasks "
                f"{names} where its rows are"
            )
        self._names = {task: Names(found.sites) for task, found in self.moments.items()}

    @property
    def rows(self) -> dict[str, Rows]:
        return {task: Rows(found.rows, found.tokens, found.source) for task, found in self.moments.items()}

    def block(self, share: Share, at: Places) -> np.ndarray:
        """The moments of a task at some channels of a matrix, (n, n) fp32.

        Raises:
            DataError: it was not measured there.
        """
        module = share.matrix.module
        names = self._names[share.task].find(module)
        if not names and share.matrix.is_expert:
            raise DataError(
                f"the moments of task {share.task} lack {module}: experts are no linear layers of the running model, "
                "which measuring looks at; merge with --method plain"
            )
        return self.moments[share.task].block(names[0] if len(names) == 1 else module, at)

    def check_base(self, base_print: str) -> None:
        """Refuse moments of another base.

        Raises:
            DataError: some are.
        """
        for found in self.moments.values():
            found.check_base(base_print)

    def check_adapters(self, adapters: Iterable[Adapter]) -> None:
        """The same by what the adapters say of their base, which is known before that is read."""
        for adapter in adapters:
            if adapter.base_fingerprint is not None:
                self.moments[adapter.task].check_base(adapter.base_fingerprint)

    def check_digests(self, adapters: Mapping[str, str]) -> None:
        """Refuse moments that went through other adapters than those of the tasks.

        Args:
            adapters: task -> digest of its adapter.

        Raises:
            DataError: some did.
        """
        for task, digest in adapters.items():
            found = self.moments[task]
            if found.adapter not in (None, digest):
                raise DataError(
                    f"the moments of task {task} went through another adapter than the one that is merged: run "
                    f"multisbora measure --trained --tasks {task} where its rows are"
                )
