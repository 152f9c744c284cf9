"""A merged checkpoint against its own receipt and undo files, without base and adapters: one reading of it.

Put back what the undo files hold, and every tensor must have the digest of the base's; leave the cells, and those of
each task must have theirs. That finds every change of the checkpoint that its receipt was not changed for too. It does
not find what a forger made fit: other values, digests, undo cells and receipt together are another honest merge.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from blake3 import blake3

from ..errors import CheckpointError
from ..untrusted import shown
from .cells import WHOLE, Impossible, Passing, Share, claim
from .corrected import Kept
from .files import interrupted, listed_files, other_weights, own_layout
from .names import Matrix, Model, fingerprint, model_type
from .proof import MAX_PROBLEM, Proof, TaskProof
from .tensors import UNREADABLE, Source, Stored, Weights, flat, one_line, reading
from .told import WHOLE_OWNER, Told, read_receipt
from .undo import Undo, undo_name


@dataclass
class _Finding:
    """What one tensor showed: what is wrong with tasks' cells, and with the rest; and whether that can be said."""

    hashed: bool = False
    outside: bool = False
    cells: list[str] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)


class Check:
    """One quick check."""

    def __init__(self, merged: Path) -> None:
        self.merged = merged
        self.problems: list[str] = []
        self.findings: list[_Finding] = []
        self.shares: dict[str, list[Share]] = {}

    def run(self) -> Proof:
        told = read_receipt(self.merged)
        if isinstance(told, str):
            self.problems.append(told)
            return self._proof(None)
        self.problems += interrupted(self.merged)
        files = [*Kept(self.merged, told).problems, *listed_files(self.merged, told)]
        try:
            weights = Weights(self.merged)
            model = Model(weights.tensors, model_type(self.merged))
        except (*UNREADABLE, CheckpointError) as error:
            self.problems += [*files, f"{self.merged} has no readable weights: {one_line(error)}"]
            return self._proof(told)
        self._compare(told, weights, model)
        if not self.problems:
            self.problems += self._totals(told)
        if told.max_shard_size is not None:
            self.problems += own_layout(self.merged, weights, told.max_shard_size)
        self.problems += other_weights(weights, told)
        self.problems += [*told.inner_problems(), *files]
        known = told.quantization is None and told.tensors.keys() == weights.tensors.keys()
        if known and told.fingerprint != fingerprint(weights.tensors, told.tensors):
            self.problems.append("the receipt has another base fingerprint than that of its tensors")
        return self._proof(told)

    def _compare(self, told: Told, weights: Weights, model: Model) -> None:
        wrong: list[str] = []
        if lacking := sorted(told.tensors.keys() - weights.tensors.keys()):
            wrong.append(f"{lacking[0]} is in the receipt but not in {self.merged}")
        if added := sorted(weights.tensors.keys() - told.tensors.keys()):
            wrong.append(f"{added[0]} is in {self.merged} but not in the receipt")
        undo = Undo(self.merged, told.undo_files)
        for name, task in told.tasks.items():
            for module, region in task.regions.items():
                try:
                    matrix = model.find(module)
                    share = Share(name, module, matrix, task.variant, region.indices, region.excluded)
                except ValueError as error:
                    wrong.append(f"{name}: {module}: {error}")
                    continue
                share.undo = undo.stored(share, model.dtype(matrix))
                self.shares.setdefault(matrix.tensor, []).append(share)
        for tensor in sorted(told.whole.keys() & weights.tensors.keys()):
            stored = weights.tensors[tensor]
            rows = stored.rows.as_one()
            whole = Share(WHOLE_OWNER, tensor, Matrix(tensor, None, rows.rows, rows.columns, False), WHOLE, (), ())
            whole.undo = undo.stored(whole, stored.dtype)
            self.shares.setdefault(tensor, []).append(whole)
        if lost := sorted(told.whole.keys() - weights.tensors.keys()):
            wrong.append(f"{lost[0]} was trained whole, says the receipt, and is not in {self.merged}")
        undo.check_rest()
        keys = sorted(weights.tensors.keys() & told.tensors.keys())
        with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0))), "multisbora-verify") as pool:
            self.findings = list(pool.map(lambda key: self._tensor(key, weights.tensors[key], told), keys))
        self.problems += wrong
        for finding in self.findings:
            self.problems += finding.cells
        self.problems += undo.problems
        for finding in self.findings:
            self.problems += finding.rest
        changed = {s.matrix.tensor for shares in self.shares.values() for s in shares if _weighted(s, told)}
        if told.tensors_changed != sorted(changed):
            self.problems.append("the receipt lists other changed tensors than its tasks have")

    def _tensor(self, key: str, stored: Stored, told: Told) -> _Finding:
        finding = _Finding()
        owners = self.shares.get(key, [])
        try:
            with reading(stored) as source:
                digest = self._scan(stored, source, owners)
        except Impossible as error:
            finding.rest.append(str(error))
            return finding
        except UNREADABLE as error:
            finding.rest.append(f"{key} cannot be read: {one_line(error)}")
            return finding
        finding.hashed = True
        sound = True
        for share in owners:
            name, whole = share.matrix.cells_name, told.whole.get(key) if share.task == WHOLE_OWNER else None
            region = whole or told.tasks[share.task].regions[share.module]
            if share.found != region.digest:
                whose = f"owned by {share.task}" if whole is None else f"trained whole by {', '.join(whole.weights)}"
                finding.cells.append(f"{name}: the cells {whose} are not those that were merged")
            if whole is not None and share.undo is not None and whole.cells_changed != share.changed:
                finding.cells.append(
                    f"{name}: the receipt says {whole.cells_changed} cells changed, counted were {share.changed}"
                )
            if share.undo is None or share.held != region.undo_digest:
                sound = False
            if share.undo is not None and share.held != region.undo_digest:
                finding.cells.append(f"{undo_name(share.task)}: {name}: its cells are not those that were kept")
        if sound and digest != told.tensors[key]:
            finding.outside = True
            finding.rest.append(f"{key}: with all tasks taken out it is not the base's: cells that no task owns differ")
        return finding

    def _scan(self, stored: Stored, source: Source, owners: list[Share]) -> str:
        """Go through one tensor block by block; blake3 (hex) of its bytes with all tasks taken out."""
        digest, rows = blake3(), stored.rows
        rows = rows.as_one() if any(share.task == WHOLE_OWNER for share in owners) else rows
        for part in range(rows.parts):
            with ExitStack() as stack:
                owning = [
                    Passing(share, None if share.undo is None else stack.enter_context(reading(share.undo)))
                    for share in owners
                    if (share.matrix.part or 0) == part
                ]
                for start, stop in rows.blocks():
                    at = [(part * rows.rows + row) * rows.columns * rows.size for row in (start, stop)]
                    block = source.read(*at).view(f"u{rows.size}").reshape(stop - start, rows.columns)
                    taken = np.zeros(block.shape if owning else (0, 0), dtype=bool)
                    for passing in owning:
                        window = passing.cells.within(start, stop)
                        if window is None:
                            continue
                        claim(taken, window, start, passing)
                        found = window.get(block)
                        held = passing.kept(window, rows.size)
                        passing.note(found if held is None else held, found)
                        if held is not None:
                            window.put(block, held)
                    digest.update(flat(block))
                for passing in owning:
                    passing.end()
        return digest.hexdigest()

    def _totals(self, told: Told) -> list[str]:
        """The counts of the receipt, and that every task which is merged left a trace."""
        problems = []
        for name, task in told.tasks.items():
            found = self._counts(name)
            if found != (task.cells, task.cells_changed):
                problems.append(
                    f"{name}: the receipt says cells owned, changed = {(task.cells, task.cells_changed)}, counted were "
                    f"{found}"
                )
            if not found[1] and any(task.at(module) for module in task.regions):
                problems.append(f"{name} changed no cell at its weight: it is not in the model")
        return problems

    def _counts(self, task: str) -> tuple[int, int]:
        own = [share for shares in self.shares.values() for share in shares if share.task == task]
        return sum(share.count for share in own), sum(share.changed for share in own)

    def _proof(self, told: Told | None) -> Proof:
        tasks = {} if told is None else told.tasks
        counts = {name: self._counts(name) for name in tasks}
        return Proof(
            ok=not self.problems,
            quick=True,
            tensors=sum(finding.hashed for finding in self.findings),
            cells_changed=sum(share.changed for shares in self.shares.values() for share in shares),
            cells_outside_regions=None if any(finding.outside for finding in self.findings) else 0,
            tasks={name: TaskProof(*counts[name], task.weight) for name, task in tasks.items()},
            problem=shown(self.problems[0], MAX_PROBLEM) if self.problems else None,
        )


def _weighted(share: Share, told: Told) -> bool:
    """Whether anything is added to the base's cells."""
    return share.task == WHOLE_OWNER or told.tasks[share.task].at(share.module) != 0
