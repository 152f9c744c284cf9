"""A corrected checkpoint solved again for the tasks that an edit leaves in it.

All that takes is kept in the checkpoint, but for the moments at the channels of a task that is new. Matrices in which
the edit changes no task stay as they are, so they have the bits that they had, wherever they were solved. And moments
that were kept stay, where they were measured once more at more channels, for a task that came later: that rounds the
old ones anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .adapter import AdapterModule
from .change import Deployed, Move
from .correct import Places, Solution, channels
from .corrected import Corrected, Measured, Rows, correct_all
from .errors import DataError, UsageError
from .geometry import Matrix
from .kept import KeptFile
from .moments import Moments
from .receipt import MergedRegion, MergedTask
from .region import Region
from .shares import Share

ROUNDING = 1e-4  # of sqrt(M_cc M_dd), by which M_cd of the same rows may differ


def check_moments(deployed: Deployed, moments: object) -> None:
    """Refuse moments where they would be read and ignored.

    Raises:
        UsageError: the checkpoint is no corrected one, and there are some.
    """
    if deployed.receipt.correction is None and moments is not None:
        raise UsageError(f"{deployed.folder} was merged plainly, which takes no moments: leave them out")


def resolve(
    deployed: Deployed, move: Move, moments: Mapping[str, Moments] | None = None
) -> tuple[list[Move], Corrected | None]:
    """What an edit of one task does to all tasks of a checkpoint: to that one alone, where it was merged plainly.

    Args:
        move: the edit, with shares of what the task trained.
        moments: task -> moments, for a task that is new and all that are there.

    Returns:
        The moves of all tasks, and what the checkpoint then keeps; None for a plain one.

    Raises:
        DataError: moments are missing, or of other rows than the checkpoint was merged with.
        MergeError: the equations of a matrix are singular.
        CheckpointError: a kept file is missing or damaged.
    """
    if deployed.receipt.correction is None:
        return [move], None
    again = _Again(deployed, move, moments)
    found = correct_all(again.shares, again.rows, deployed.receipt.correction.ridge, again.block, again.known)
    others = [
        Move(task, told, told, found.shares[task]) for task, told in deployed.receipt.tasks.items() if task != move.task
    ]
    return [Move(move.task, move.told, move.entry, found.shares.get(move.task, [])), *others], found


class _Again:
    """What a corrected checkpoint is solved from.

    Attributes:
        shares: what the tasks trained that will be in it.
        rows: of their moments.
    """

    def __init__(self, deployed: Deployed, move: Move, moments: Mapping[str, Moments] | None) -> None:
        correction = deployed.receipt.correction
        assert correction is not None
        self.deployed, self.move = deployed, move
        self.files = {task: KeptFile.open(deployed.folder, task, told) for task, told in correction.tasks.items()}
        self.rows = {task: Rows(told.rows, told.tokens, told.source) for task, told in correction.tasks.items()}
        self.measured: Measured | None = None
        if move.told is None:
            self.measured = Measured(moments or {}, [*correction.tasks, move.task])
            self.measured.check_base(deployed.receipt.base_fingerprint)
            digests = {task: entry.adapter_digest for task, entry in deployed.receipt.tasks.items()}
            if move.entry is not None:
                digests[move.task] = move.entry.adapter_digest
            self.measured.check_digests(digests)
            for task, rows in self.rows.items():
                if self.measured.rows[task] != rows:
                    raise self._measured_anew(task)
            self.rows[move.task] = self.measured.rows[move.task]
        elif move.entry is None:
            del self.rows[move.task]
        self.held: dict[str, dict[str, MergedRegion]] = {}  # cells -> task -> what it owns there now
        for task, told in deployed.receipt.tasks.items():
            for module, merged in told.regions.items():
                self.held.setdefault(deployed.geometry.find(module).cells_name, {})[task] = merged
        others = {task: told for task, told in deployed.receipt.tasks.items() if task != move.task}
        self.shares = [*move.shares, *(share for task, told in others.items() for share in self._trained(task, told))]
        self.touched = self._touched()

    def _trained(self, task: str, told: MergedTask) -> list[Share]:
        """What a task of the checkpoint trained."""
        shares = []
        for module, merged in told.regions.items():
            matrix = self.deployed.geometry.find(module)
            values = self.files[task].values(matrix.cells_name, merged.region.values_shape(matrix.shape))
            shares.append(
                Share(task, module, matrix, AdapterModule(merged.region, values, merged.scaling), merged.weight)
            )
        return shares

    def _touched(self) -> set[str]:
        """The cells' names of the matrices in which the edit changes something."""
        old, new = (
            {self.deployed.geometry.find(module).cells_name: merged.weight for module, merged in entry.regions.items()}
            if entry
            else {}
            for entry in (self.move.told, self.move.entry)
        )
        return {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}

    def known(self, matrix: Matrix) -> Solution | None:
        """The solution of a matrix that stays as it is."""
        name, held = matrix.cells_name, self.held.get(matrix.cells_name, {})
        if name in self.touched:
            return None
        heard = {task: merged.region for task, merged in held.items() if merged.weight}
        return Solution(
            {task: self.files[task].corrected(name, heard[task].values_shape(matrix.shape)) for task in heard},
            {task: self.files[task].excess(name) if len(held) > 1 else np.float32(0) for task in heard},
        )

    def block(self, share: Share, at: Places) -> np.ndarray:
        """The moments of a task at some channels: those that were kept, and measured ones at the others."""
        task, matrix, held = share.task, share.matrix, self.held.get(share.matrix.cells_name, {})
        kept = None
        if task in held and len(held) > 1:
            known = channels(_regions(held), matrix.in_features)
            kept = self.files[task].moments(matrix.cells_name, len(known))
            if np.isin(at, known).all():
                places = np.searchsorted(known, at)
                return kept[np.ix_(places, places)]
        if self.measured is None:
            raise DataError(f"{self.deployed.folder} keeps no moments of {task} in {share.module}: merge anew")
        found = self.measured.block(share, at)
        if kept is not None:
            places = np.searchsorted(at, known)
            if not _alike(found[np.ix_(places, places)], kept):
                raise self._measured_anew(task)
            found[np.ix_(places, places)] = kept  # or to take the new task out would not give the old bits
        return found

    def _measured_anew(self, task: str) -> DataError:
        return DataError(
            f"the moments of task {task} are not those that {self.deployed.folder} was merged with: merge all anew"
        )


def _regions(held: Mapping[str, MergedRegion]) -> Sequence[Region]:
    return [merged.region for merged in held.values()]


def _alike(found: np.ndarray, kept: np.ndarray) -> bool:
    """Whether two blocks are of the same rows, but for rounding, which the number of channels decides too."""
    size = np.sqrt(np.diag(kept).astype(np.float64))
    off = np.abs(found.astype(np.float64) - kept)
    return bool((off <= ROUNDING * size * size[:, None]).all())
