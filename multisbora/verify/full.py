"""A merged checkpoint against its base and adapters: every file, name, shape, dtype and bit."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from blake3 import blake3

from ..errors import CheckpointError
from ..untrusted import shown
from .adapters import Task
from .cells import WHOLE, Impossible, Share, Window, Wrong, claim, place
from .corrected import Kept
from .dequantized import Dequantized
from .files import base_files, carried_metadata, interrupted, layout, listed_files, other_weights, own_layout
from .names import Matrix, Model, fingerprint, model_type
from .proof import MAX_PROBLEM, Proof, TaskProof
from .tensors import UNREADABLE, InMemory, Rows, Source, Stored, Weights, as_bits, flat, load, one_line, reading
from .told import WHOLE_OWNER, Told, read_receipt
from .undo import Undo, undo_name
from .updates import Replacement, Update, Updated


@dataclass
class _Finding:
    """What one tensor showed: what is wrong with its cells, and with the undo files' and the receipt's of them."""

    compared: bool = False
    changed: int = 0
    outside: int = 0
    stored: str = ""  # blake3 (hex) of the base's bytes as they are stored
    base: list[str] = field(default_factory=list)
    cells: list[str] = field(default_factory=list)
    undo: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)


class Audit:
    """One comparison."""

    def __init__(self, merged: Path, base: Path, tasks: Sequence[Task]) -> None:
        self.merged, self.base, self.tasks = merged, base, tasks
        self.problems: list[str] = []
        self.findings: list[_Finding] = []
        self.shares: dict[str, list[Update | Replacement]] = {}

    def run(self) -> Proof:
        """Compare.

        Raises:
            CheckpointError: the base is unreadable.
        """
        told = read_receipt(self.merged)
        if isinstance(told, str):
            self.problems.append(told)
            return self._proof(None)
        self.problems += interrupted(self.merged)
        names = [task.name for task in self.tasks]
        if sorted(told.tasks) != names:
            merged, given = (", ".join(found) or "none" for found in (sorted(told.tasks), names))
            self.problems.append(f"the receipt has the tasks {merged}; the adapters given are {given}")
            return self._proof(None)
        around = [*self._tasks(told), *told.inner_problems()]
        try:
            before = Weights(self.base)
        except UNREADABLE as error:
            raise CheckpointError(f"{self.base} is not a readable base: {one_line(error)}; fetch it again") from None
        model = Model(before.tensors, model_type(self.base))
        files = [*listed_files(self.merged, told), *base_files(self.merged, self.base, told)]
        try:
            after = Weights(self.merged)
        except UNREADABLE as error:
            self.problems += [*files, f"{self.merged} has no readable weights: {one_line(error)}", *around]
            return self._proof(told)
        kept = Kept(self.merged, told)
        self.problems += kept.problems  # before the cells, of which they decide what is right
        # A wrong cell says more than the wrong digest of its file: it goes first.
        self._compare(told, before, after, model, kept)
        if not self.problems:
            self.problems += self._totals(told)
        if told.max_shard_size is None:
            self.problems += layout(before, after)
        else:
            self.problems += own_layout(self.merged, after, told.max_shard_size)
            self.problems += carried_metadata(before, after, self.base, self.merged)
        self.problems += [*around, *files, *other_weights(after, told)]
        return self._proof(told)

    def _tasks(self, told: Told) -> list[str]:
        """What the receipt says of each task that its adapter does not."""
        problems = []
        scheme = told.quantization
        if scheme is not None and self.tasks and all(task.quantization != scheme for task in self.tasks):
            problems.append("the receipt has a dequantised base that none of the adapters was trained on")
        for task in self.tasks:
            entry = told.tasks[task.name]
            same = {
                "variant": entry.variant == task.variant,
                "adapter digest": entry.rest["adapter_digest"] == task.rest["adapter_digest"],
                "claim digest": entry.rest["claim_digest"] == task.rest["claim_digest"],
                "composition": entry.rest["composition"] == task.rest["composition"],
                "base fingerprint": entry.rest["base_fingerprint"] == task.rest["base_fingerprint"],
                "view of the training": entry.rest["trained_on"] == task.rest["trained_on"],
                "set of modules": entry.regions.keys() == task.modules.keys(),
            }
            for module, trained in task.modules.items():
                region = entry.regions.get(module)
                one = None if region is None else (region.indices, region.excluded, region.scaling)
                same[f"region or scaling in {module}"] = one == (trained.indices, trained.excluded, trained.scaling)
            problems += [
                f"{task.name}: the receipt has another {what} than {task.folder}" for what, ok in same.items() if not ok
            ]
        return problems

    def _compare(self, told: Told, before: Weights, after: Weights, model: Model, kept: Kept) -> None:
        wrong: list[str] = []
        if lacking := sorted(before.tensors.keys() - after.tensors.keys()):
            wrong.append(f"{lacking[0]} of the base is missing in {self.merged}")
        if added := sorted(after.tensors.keys() - before.tensors.keys()):
            wrong.append(f"{added[0]} is in {self.merged} but not in the base")
        undo = Undo(self.merged, told.undo_files)
        wrong += self._find_shares(told, model, undo, kept)
        wrong += self._find_whole(told, before, undo)
        undo.check_rest()
        seen = None
        try:
            seen = None if told.quantization is None else Dequantized(told.quantization, model)
        except UNREADABLE as error:
            wrong.append(f"the receipt's quantisation cannot be repeated: {one_line(error)}")
        keys = []
        for key in sorted(before.tensors.keys() & after.tensors.keys()):
            one, two = before.tensors[key], after.tensors[key]
            if one.like == two.like:
                keys.append(key)
            else:
                wrong.append(f"{key} is {two.like}, in the base {one.like}")

        def look(key: str) -> _Finding:
            return self._tensor(key, before.tensors[key], after.tensors[key], seen, told)

        # bitsandbytes' threads are set for the whole process.
        threads = 1 if seen is not None else min(8, len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(threads, "multisbora-verify") as pool:
            self.findings = list(pool.map(look, keys) if threads > 1 else map(look, keys))
        wrong += [problem for finding in self.findings for problem in finding.base]
        wrong += [problem for finding in self.findings for problem in finding.cells]
        self.problems += wrong
        if not wrong:
            updates = [share for found in self.shares.values() for share in found if isinstance(share, Update)]
            self.problems += kept.unsolved(updates, told)
        if seen is not None and told.checked and not wrong and not seen.is_whole():
            self.problems.append(
                "the dequantised base is not, bit for bit, the one that the tasks were trained on: another version of "
                "bitsandbytes, or another base"
            )
        self.problems += [problem for finding in self.findings for problem in finding.undo]
        self.problems += undo.problems
        self.problems += [problem for finding in self.findings for problem in finding.told]
        changed = sorted(key for key, found in self.shares.items() if any(map(_weighted, found)))
        if told.tensors_changed != changed:
            self.problems.append("the receipt lists other changed tensors than the tasks have")
        if told.tensors.keys() != before.tensors.keys():
            odd = min(told.tensors.keys() ^ before.tensors.keys())
            self.problems.append(f"the receipt has digests of other tensors than the base has: {odd}")
        digests = {key: finding.stored for key, finding in zip(keys, self.findings, strict=True)}
        if digests.keys() == before.tensors.keys() and told.fingerprint != fingerprint(before.tensors, digests):
            self.problems.append(f"the receipt has another base fingerprint than that of {self.base}")

    def _find_shares(self, told: Told, model: Model, undo: Undo, kept: Kept) -> list[str]:
        """Which tensors the adapters' regions lie in; and what is impossible of them."""
        problems = []
        for task in self.tasks:
            for module, trained in task.modules.items():
                try:
                    matrix = model.find(module)
                    share = Update(task.name, module, matrix, task.variant, trained.indices, trained.excluded)
                except ValueError as error:
                    problems.append(f"{task.name}: {module}: {error}")
                    continue
                weight, share.adapter = told.tasks[task.name].at(module), task
                share.factor, share.merged = weight * trained.scaling if weight else None, kept.merged(share)
                share.undo = undo.stored(share, model.dtype(matrix))
                self.shares.setdefault(matrix.tensor, []).append(share)
        return problems

    def _find_whole(self, told: Told, before: Weights, undo: Undo) -> list[str]:
        """Which tensors the adapters trained whole; and what is impossible of them."""
        problems, weights = [], dict[str, dict[str, float]]()
        for task in self.tasks:
            for tensor in task.whole:
                if weight := told.tasks[task.name].at(tensor.rpartition(".")[0]):
                    weights.setdefault(tensor, {})[task.name] = weight
        if weights.keys() != told.whole.keys():
            problems.append(
                f"the receipt has other tensors that were trained whole than {', '.join(weights) or 'none'}"
            )
        for tensor in sorted(weights.keys() & told.whole.keys()):
            sources = {task.name: task.whole[tensor] for task in self.tasks if task.name in weights[tensor]}
            stored = before.tensors.get(tensor)
            if stored is None or any(source.shape != stored.shape for source in sources.values()):
                problems.append(f"{tensor} was trained whole, and is of another shape in {self.base}, or not there")
                continue
            rows = stored.rows.as_one()
            matrix = Matrix(tensor, None, rows.rows, rows.columns, False)
            share = Replacement(WHOLE_OWNER, tensor, matrix, WHOLE, (), ())
            share.keep, share.weights, share.sources = told.whole[tensor].how == "keep", weights[tensor], sources
            if share.keep and len(sources) > 1:
                problems.append(f"{tensor}: {', '.join(sources)} trained it whole, of which none can be kept alone")
                continue
            share.undo = undo.stored(share, stored.dtype)
            self.shares.setdefault(tensor, []).append(share)
        return problems

    def _tensor(self, key: str, old: Stored, new: Stored, seen: Dequantized | None, told: Told) -> _Finding:
        finding = _Finding()
        try:
            with ExitStack() as stack:
                before, after = stack.enter_context(reading(old)), stack.enter_context(reading(new))
                if seen is not None and key in seen.modules:
                    finding.stored = blake3(flat(before.read(0, old.nbytes))).hexdigest()
                    before = InMemory(as_bits(seen.of(key, load(old))).reshape(-1).view(np.uint8))
                digest = self._scan(finding, key, old, before, after)
        except Impossible as error:
            finding.cells.append(str(error))
            return finding
        except UNREADABLE as error:
            finding.cells.append(f"{key} cannot be read: {one_line(error)}")
            return finding
        finding.compared = True
        finding.stored = finding.stored or digest
        if told.tensors.get(key, digest) != digest:
            finding.base.append(
                f"{key}: the base's bytes do not have the digest that the receipt tells: another base, or an edited "
                "receipt"
            )
        if not finding.cells:
            for share in self.shares.get(key, ()):
                finding.told += _digests(share, told)
        return finding

    def _scan(self, finding: _Finding, key: str, stored: Stored, before: Source, after: Source) -> str:
        """Go through one tensor block by block; blake3 (hex) of the base's bytes."""
        owners = self.shares.get(key, [])
        digest, wrong, rows = blake3(), Wrong(), stored.rows
        rows = rows.as_one() if any(isinstance(share, Replacement) for share in owners) else rows
        for part in range(rows.parts):
            with ExitStack() as stack:
                owning = [share.start(stack) for share in owners if (share.matrix.part or 0) == part]
                for start, stop in rows.blocks():
                    at = [(part * rows.rows + row) * rows.columns * rows.size for row in (start, stop)]
                    raw = before.read(*at)
                    digest.update(flat(raw))
                    shape, kind = (stop - start, rows.columns), f"u{rows.size}"
                    old, new = (data.view(kind).reshape(shape) for data in (raw, after.read(*at)))
                    expected, taken = _expected(old, new, start, owning, stored.dtype)
                    if np.array_equal(expected, new):
                        continue
                    whose = functools.partial(_whose, rows, part, start, owning)
                    wrong.note(expected, new, stored.dtype, whose)
                    outside = old != new if taken is None else (old != new) & ~taken
                    finding.outside += int(np.count_nonzero(outside))
                for passing in owning:
                    passing.end()
                    if passing.wrong.count:
                        name = undo_name(passing.share.task)
                        finding.undo.append(f"{name}: {passing.share.matrix.cells_name}: {passing.wrong}")
        finding.changed = finding.outside + sum(share.changed for share in owners)
        if wrong.count:
            finding.cells.append(f"{key}: {wrong}")
        return digest.hexdigest()

    def _totals(self, told: Told) -> list[str]:
        """The counts of the receipt, and that every task which is merged left a trace."""
        problems = []
        for task in self.tasks:
            shares = self._of(task.name)
            entry = told.tasks[task.name]
            found = sum(share.count for share in shares), sum(share.changed for share in shares)
            if found != (entry.cells, entry.cells_changed):
                problems.append(
                    f"{task.name}: the receipt says cells owned, changed = {(entry.cells, entry.cells_changed)}, "
                    f"counted were {found}"
                )
            if not found[1] and any(map(_weighted, shares)):
                problems.append(f"{task.name} changed no cell at its weight: it is not in the model")
        return problems

    def _of(self, task: str) -> list[Update | Replacement]:
        return [share for shares in self.shares.values() for share in shares if share.task == task]

    def _source(self, told: Told | None) -> str:
        """Which adapters are not those that were merged: why cells are wrong, where these are."""
        if told is None or "adapter digest" in self.problems[0]:
            return ""
        merged = {name: task.rest["adapter_digest"] for name, task in told.tasks.items()}
        other = [str(task.folder) for task in self.tasks if merged[task.name] != task.rest["adapter_digest"]]
        return f" (by its receipt, other adapters were merged than {', '.join(other)}: give those)" if other else ""

    def _proof(self, told: Told | None) -> Proof:
        return Proof(
            ok=not self.problems,
            quick=False,
            tensors=sum(finding.compared for finding in self.findings),
            cells_changed=sum(finding.changed for finding in self.findings),
            cells_outside_regions=sum(finding.outside for finding in self.findings),
            tasks={
                task.name: TaskProof(
                    sum(share.count for share in self._of(task.name)),
                    sum(share.changed for share in self._of(task.name)),
                    0.0 if told is None else told.tasks[task.name].weight,
                )
                for task in self.tasks
            },
            problem=shown(self.problems[0] + self._source(told), MAX_PROBLEM) if self.problems else None,
        )


def _expected(
    old: np.ndarray, new: np.ndarray, start: int, owning: Sequence[Updated], dtype: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """What a block of rows must hold, and which of its cells tasks own; hashes, counts and compares on the way.

    Raises:
        Impossible: a cell has two owners.
    """
    expected, taken = old, None
    for passing in owning:
        window = passing.cells.within(start, start + len(old))
        if window is None:
            continue
        if taken is None:
            expected, taken = old.copy(), np.zeros(old.shape, dtype=bool)
        claim(taken, window, start, passing)
        held, found = window.get(old), window.get(new)
        passing.note(held, found)
        window.put(expected, passing.after(held, dtype, window))
        kept = passing.kept(window, old.itemsize)
        if kept is not None and not np.array_equal(held, kept):
            passing.wrong.note(held, kept, dtype, functools.partial(_undone, window, start))
    return expected, taken


def _whose(rows: Rows, part: int, start: int, owning: Sequence[Updated], row: int, column: int) -> str:
    owner = next((passing.share.whose for passing in owning if passing.hold(start + row, column)), "which no task owns")
    return f"{place(rows.index(part, start + row, column))}, {owner}"


def _undone(window: Window, start: int, row: int, column: int) -> str:
    return place((start + int(window.rows[row]), int(window.columns[column])))


def _weighted(share: Update | Replacement) -> bool:
    """Whether anything is added to the base's cells."""
    return isinstance(share, Replacement) or share.factor is not None


def _digests(share: Share, told: Told) -> list[str]:
    """What the receipt tells of a share's cells that is not so."""
    name = share.matrix.cells_name
    if share.task == WHOLE_OWNER:
        entry = told.whole[name]
        if entry.cells_changed != share.changed:
            return [f"{name}: the receipt says {entry.cells_changed} cells changed, counted were {share.changed}"]
        digests = entry.digest, entry.undo_digest
    elif region := told.tasks[share.task].regions.get(share.module):
        digests = region.digest, region.undo_digest
    else:
        return []
    return [
        f"{share.task}: the receipt has another digest of its {what} in {name} than the checkpoint"
        for what, one, two in zip(("cells", "undone cells"), digests, (share.found, share.held), strict=True)
        if one != two
    ]
