"""One edit of a merged checkpoint in place: what it comes to, and the writing of it."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .cells import Cells, Place, bits, read_cells, write_cells
from .checkpoint import CARD_FILE, RECEIPT_FILE, UNDO_FOLDER, Checkpoint, FileDigest
from .checkpoint import reading as opened
from .corrected import Corrected
from .errors import CheckpointError, MergeError, UsageError
from .geometry import Geometry, Matrix
from .journal import Journal, journalled, require_space, require_unchanged
from .kept import FOLDER as KEPT_FOLDER
from .kept import Contents, Correction
from .publish import write_whole
from .receipt import MergedRegion, MergedTask, Receipt, card
from .shares import Share, overlap, require_trace
from .stream import in_threads
from .undo import CellsFile, CellsWriter, Shapes, digest, undo_path


@dataclass(frozen=True, slots=True)
class Edit:
    """What an edit did, or would do.

    Attributes:
        operation: "add", "remove" or "reweight".
        receipt: of the checkpoint after it.
        tensors: the stored tensors that get other bytes.
        cells: how many cells get other bits.
        bytes_written: to files of tensors. Rows are written alone; where columns are owned, all rows that hold some.
        files: the files that are written anew, in part or whole, or that appear or go away.
        scores_dropped: whether the receipt had scores, which were of another composition.
    """

    operation: str
    task: str
    receipt: Receipt
    tensors: tuple[str, ...]
    cells: int
    bytes_written: int
    files: tuple[str, ...]
    scores_dropped: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "operation": self.operation,
            "task": self.task,
            "tasks": {name: task.weight.to_json() for name, task in self.receipt.tasks.items()},
            "tensors": list(self.tensors),
            "cells": self.cells,
            "bytes_written": self.bytes_written,
            "files": list(self.files),
            "scores_dropped": self.scores_dropped,
        }


@dataclass(frozen=True)
class Deployed:
    """A merged checkpoint that is held while it is edited."""

    folder: Path
    receipt: Receipt
    checkpoint: Checkpoint
    geometry: Geometry

    def check_regions(self) -> None:
        """Refuse regions of the receipt that do not lie in their matrices.

        Raises:
            CheckpointError: one does not.
            GeometryError: there is no such matrix.
        """
        for name, task in self.receipt.tasks.items():
            for module, merged in task.regions.items():
                try:
                    merged.region.check(self.geometry.find(module).shape, module)
                except UsageError as error:
                    raise CheckpointError(
                        f"{self.folder / RECEIPT_FILE} is damaged, it has cells of {name} that are nowhere ({error}): "
                        "merge again"
                    ) from None

    def told(self, task: str) -> MergedTask:
        """What the receipt says of a task.

        Raises:
            UsageError: it is not in the checkpoint.
        """
        if task not in self.receipt.tasks:
            raise UsageError(f"{self.folder} does not hold task {task!r}: it holds {', '.join(self.receipt.tasks)}")
        return self.receipt.tasks[task]

    def require_free(self, shares: Sequence[Share]) -> None:
        """Refuse shares that have a cell in common with a task of the checkpoint.

        Raises:
            MergeError: one has.
        """
        held: dict[str, list[tuple[str, MergedRegion]]] = {}
        for name, task in self.receipt.tasks.items():
            for module, merged in task.regions.items():
                held.setdefault(self.geometry.find(module).cells_name, []).append((name, merged))
        for share in shares:
            if share.matrix.tensor in self.receipt.whole:
                one = ", ".join(self.receipt.whole[share.matrix.tensor].weights)
                raise overlap(one, share.task, share.matrix.tensor)
            for name, merged in held.get(share.matrix.cells_name, ()):
                if merged.region.meets(share.trained.region):
                    one, two = sorted((name, share.task))
                    raise overlap(one, two, share.matrix.cells_name)

    def require_regions_alone(self, task: str, whole: Sequence[str] = ()) -> None:
        """Refuse a task that trained tensors whole: they are no cells of its own, so an edit cannot tell its part.

        Args:
            whole: the tensors of its adapter, where there is one.

        Raises:
            MergeError: there are such tensors.
        """
        merged = [tensor for tensor, told in self.receipt.whole.items() if task in told.weights]
        if found := sorted({*merged, *whole}):
            raise MergeError(
                f"{task} trained {found[0]} whole, which is not changed in place: merge the tasks anew that are to be "
                "in the checkpoint"
            )

    def card(self) -> bytes | None:
        """README.md; None if there is none.

        Raises:
            CheckpointError: somebody wrote into it.
        """
        path = self.folder / CARD_FILE
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        told = self.receipt.files.get(CARD_FILE)
        if told is None or hashlib.sha256(content).hexdigest() != told.sha256:
            raise CheckpointError(
                f"{path} was changed since it was made, and an edit writes it anew: keep your text under another name, "
                "delete it there, and edit again"
            )
        return content

    def with_tasks(self, entries: Mapping[str, MergedTask | None], correction: Correction | None) -> Receipt:
        """The receipt with some tasks put in or exchanged, or, if None, taken out; as a merge would write it."""
        tasks = {**self.receipt.tasks, **entries}
        kept = {name: task for name, task in sorted(tasks.items()) if task is not None}
        changed = {
            self.geometry.find(module).tensor
            for task in kept.values()
            for module, merged in task.regions.items()
            if merged.weight
        } | self.receipt.whole.keys()
        receipt = replace(
            self.receipt, tasks=kept, tensors_changed=tuple(sorted(changed)), scores={}, correction=correction
        )
        text = card(receipt)
        told = FileDigest(hashlib.sha256(text).hexdigest(), len(text))
        return replace(receipt, files={**receipt.files, CARD_FILE: told})


@dataclass(frozen=True)
class Move:
    """What an edit does to one task.

    Attributes:
        told: what the receipt says of it; None where it is new.
        entry: what the receipt will say; None where it goes.
        shares: what it then writes.
    """

    task: str
    told: MergedTask | None
    entry: MergedTask | None
    shares: Sequence[Share]


@dataclass(frozen=True)
class _Part:
    """One region of a task: where its cells lie, and what decides them."""

    task: str
    module: str
    matrix: Matrix
    cells: Cells
    place: Place
    path: Path
    told: MergedRegion | None  # None where the task is new
    share: Share | None  # None where the task goes

    @property
    def bytes_written(self) -> int:
        return (self.place.rows if self.cells.rows is None else len(self.cells.rows)) * self.place.row_bytes


@dataclass(frozen=True, slots=True)
class _Look:
    """What one region comes to: digests of its cells with and without the task, and how many bits change to which."""

    digest: str
    undo_digest: str
    changed: int
    others: int


@dataclass(frozen=True)
class Change:
    """One edit.

    Attributes:
        moves: what it does to the task, and in a corrected checkpoint to all others.
        corrected: what a corrected checkpoint then keeps.
    """

    deployed: Deployed
    operation: str
    task: str
    moves: Sequence[Move]
    corrected: Corrected | None = None

    @cached_property
    def parts(self) -> list[_Part]:
        """The regions of the tasks, each task's in the order of its undo file."""
        return [part for move in self.moves for part in self._parts(move)]

    def _parts(self, move: Move) -> list[_Part]:
        checkpoint, geometry = self.deployed.checkpoint, self.deployed.geometry
        shares = {share.module: share for share in move.shares}
        entry = move.entry or move.told
        assert entry is not None
        found = []
        for module, merged in entry.regions.items():
            matrix = geometry.find(module)
            told = move.told.regions[module] if move.told else None
            found.append(
                _Part(
                    task=move.task,
                    module=module,
                    matrix=matrix,
                    cells=Cells.of(merged.region, matrix),
                    place=checkpoint.place(matrix.tensor),
                    path=checkpoint.where[matrix.tensor],
                    told=told,
                    share=shares.get(module),
                )
            )
        return sorted(found, key=lambda part: (part.matrix.tensor, part.matrix.part or 0))

    def make(self, dry_run: bool) -> Edit:
        """Check everything; unless `dry_run`, do it."""
        folder, receipt = self.deployed.folder, self.deployed.receipt
        readme = self.deployed.card()
        paths = {part.path for part in self.parts}
        require_unchanged(self.deployed.checkpoint, receipt, paths)
        undo, kept = folder / UNDO_FOLDER, folder / KEPT_FOLDER
        for path in (*sorted(paths), *([undo] if receipt.tasks or os.path.lexists(undo) else [])):
            _require_own(path, folder)
        if self.corrected is not None and os.path.lexists(kept):
            _require_own(kept, folder)
        new = undo_path(folder, self.task)
        if self.task not in receipt.tasks and new.exists():
            raise CheckpointError(f"{new} is of no task that {RECEIPT_FILE} knows: delete it, then add {self.task}")
        size = sum(part.cells.count * part.place.dtype.itemsize for part in self.parts)
        size += sum(contents.size for contents in self._new_files)
        require_space(folder, size + 4 * len(receipt.to_bytes()))
        if dry_run:
            return self._looked_at(None)[0]
        with journalled(folder, self.operation, self.task) as journal:
            edit, written = self._looked_at(journal)
            if edit.receipt == receipt:
                return edit  # the same weight as before
            after = edit.receipt.to_bytes()
            for contents in self._new_files:
                contents.write(folder)
            regions: dict[str, list[str]] = {}
            for part in written:
                regions.setdefault(part.task, []).append(part.module)
            journal.begin(regions, (folder / RECEIPT_FILE).read_bytes(), after, readme)
            self._write(written, edit.receipt)
            write_whole(folder / RECEIPT_FILE, after)
            write_whole(folder / CARD_FILE, card(edit.receipt))
        return edit

    def _looked_at(self, journal: Journal | None) -> tuple[Edit, list[_Part]]:
        """What the edit comes to, and the parts that get other bytes; what they hold goes into the journal.

        Raises:
            CheckpointError: cells or the undo file are not what the receipt says.
            MergeError: a cell overflows, or the task would leave no trace.
        """
        undo = {m.task: CellsFile.open(undo_path(self.deployed.folder, m.task)) for m in self.moves if m.told}
        with ExitStack() as stack:
            keepers: dict[str, CellsWriter] = {}
            for move in self.moves if journal else ():
                assert journal is not None
                own = (part for part in self.parts if part.task == move.task)
                shapes: Shapes = {part.matrix.cells_name: (part.cells.shape, part.place.dtype) for part in own}
                keepers[move.task] = stack.enter_context(journal.keep(move.task, shapes))
            files = {path: stack.enter_context(opened(path)) for path in {part.path for part in self.parts}}

            def look(part: _Part) -> _Look:
                now = read_cells(files[part.path].fileno(), part.place, part.cells, part.path)
                without = now if part.told is None else self._checked(part, now, undo[part.task])
                then = without if part.share is None else part.share.compose(without, slice(None))
                others = int(np.count_nonzero(bits(then) != bits(now)))
                if keepers and (others or part.told is None):
                    keepers[part.task].write(part.matrix.cells_name, now)
                changed = int(np.count_nonzero(bits(then) != bits(without)))
                return _Look(digest(then), digest(without), changed, others)

            looks = in_threads(look, self.parts)
            for keeper in keepers.values():
                keeper.sync()
        entries = {}
        for move in self.moves:
            seen = [(part, found) for part, found in zip(self.parts, looks, strict=True) if part.task == move.task]
            entries[move.task] = None if move.entry is None else _entry(move.task, move.entry, seen)
        written = [part for part, found in zip(self.parts, looks, strict=True) if found.others]
        return self._edit(entries, written, sum(found.others for found in looks)), written

    def _checked(self, part: _Part, now: np.ndarray, undo: CellsFile) -> np.ndarray:
        """What the cells hold without the task.

        Raises:
            CheckpointError: that, or what they hold now, is not what the receipt says.
        """
        assert part.told is not None
        name = part.matrix.cells_name
        if digest(now) != part.told.digest:
            raise CheckpointError(
                f"{part.path}: the cells of {part.task} in {name} were changed since they were merged: merge again"
            )
        without = undo.read(name, part.cells.shape, part.place.dtype)
        if digest(without) != part.told.undo_digest:
            raise CheckpointError(f"{undo.path}: the cells of {name} are not what {RECEIPT_FILE} says: merge again")
        return without

    @property
    def _new_files(self) -> list[Contents]:
        """The files to keep that a corrected checkpoint does not have yet."""
        told = self.deployed.receipt.correction
        found = [] if self.corrected is None else self.corrected.contents
        return [contents for contents in found if told is None or contents.name not in told.names]

    def _edit(self, entries: Mapping[str, MergedTask | None], written: Sequence[_Part], cells: int) -> Edit:
        folder, old = self.deployed.folder, self.deployed.receipt
        correction = None if self.corrected is None else self.corrected.correction
        receipt = self.deployed.with_tasks(entries, correction)
        if replace(receipt, scores=old.scores) == old:
            return Edit(self.operation, self.task, old, (), 0, 0, (), scores_dropped=False)
        files = {part.path for part in written} | {folder / RECEIPT_FILE, folder / CARD_FILE}
        files |= set() if self.operation == "reweight" else {undo_path(folder, self.task)}
        if old.correction and correction:
            files |= {folder / KEPT_FOLDER / name for name in old.correction.names ^ correction.names}
        return Edit(
            operation=self.operation,
            task=self.task,
            receipt=receipt,
            tensors=tuple(dict.fromkeys(part.matrix.tensor for part in written)),
            cells=cells,
            bytes_written=sum(part.bytes_written for part in written),
            files=tuple(sorted(path.relative_to(folder).as_posix() for path in files)),
            scores_dropped=bool(old.scores),
        )

    def _write(self, written: Sequence[_Part], receipt: Receipt) -> None:
        """Write the cells, from what they hold without the task.

        Raises:
            CheckpointError: the undo file changes under our hands.
            OSError: the system refused a write.
        """
        undo = {task: CellsFile.open(undo_path(self.deployed.folder, task)) for task in {p.task for p in written}}
        with ExitStack() as stack:
            files = {
                path: stack.enter_context(path.open("r+b", buffering=0))
                for path in sorted({part.path for part in written})
            }

            def write(part: _Part) -> None:
                new = undo[part.task].read(part.matrix.cells_name, part.cells.shape, part.place.dtype)
                if part.share is not None:
                    new = part.share.compose(new, slice(None))
                    expected = receipt.tasks[part.task].regions[part.module].digest
                else:
                    expected = part.told.undo_digest if part.told else None
                if digest(new) != expected:
                    path = undo[part.task].path
                    raise CheckpointError(f"{path} changed while it was read: is another program at work?")
                write_cells(files[part.path].fileno(), part.place, part.cells, new, part.path)

            # Columns are written in blocks that hold other tasks' cells too: never two of one tensor at once.
            tensors: dict[str, list[_Part]] = {}
            for part in written:
                tensors.setdefault(part.matrix.tensor, []).append(part)

            def write_all(parts: Sequence[_Part]) -> None:
                for part in parts:
                    write(part)

            in_threads(write_all, tensors.values())
            for file in files.values():
                os.fsync(file.fileno())


def _entry(task: str, entry: MergedTask, looks: Sequence[tuple[_Part, _Look]]) -> MergedTask:
    """What the receipt will say of a task, with what its cells came to.

    Raises:
        MergeError: the task would leave no trace.
    """
    changed = sum(found.changed for _, found in looks)
    require_trace(task, entry, changed)
    regions = {
        part.module: replace(entry.regions[part.module], digest=found.digest, undo_digest=found.undo_digest)
        for part, found in looks
    }
    return replace(entry, regions=regions, cells_changed=changed)


def _require_own(path: Path, folder: Path) -> None:
    """Refuse what another folder has, too: an edit here would be one there.

    Raises:
        CheckpointError: it is a link, or its file has several names.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: merge again") from None
    if stat.S_ISLNK(status.st_mode) or (stat.S_ISREG(status.st_mode) and status.st_nlink > 1):
        kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "a hard link"
        raise CheckpointError(
            f"{path} is {kind}, so an edit would change another folder too: copy the checkpoint (`cp -rL {folder} "
            "COPY`) and edit the copy"
        )
