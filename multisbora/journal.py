"""Edits in place of a merged checkpoint: whole or not at all, whatever ends them, and never two at once.

Before the first byte of the weights is overwritten, everything that it takes to have the old ones again lies on the
disk, in a hidden folder of the checkpoint. That folder is renamed at the end, which is the moment when the edit counts.
Whoever finds it under its own name knows that an edit was cut short, and puts the old bytes back.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .cells import Cells, write_all, write_cells
from .checkpoint import CARD_FILE, RECEIPT_FILE, UNDO_FOLDER, Checkpoint
from .checkpoint import reading as opened
from .errors import CheckpointError, MultisboraError
from .geometry import from_checkpoint
from .kept import FOLDER as KEPT_FOLDER
from .locks import BusyError, Say, exclusive, shared
from .publish import sync_folder, write_whole
from .receipt import MergedRegion, Receipt
from .undo import WHOLE, CellsFile, CellsWriter, Shapes, digest, undo_path

FOLDER = ".multisbora_journal"
_PARTIAL, _DONE = f"{FOLDER}.partial", f"{FOLDER}.done"
_NOTE, _BEFORE, _AFTER, _CELLS = "journal.json", "before.json", "after.json", "cells.safetensors"
_PAUSE, _PATIENCE = 0.02, 1.0  # seconds: between looks at a lock, and for how long a reader looks


@contextlib.contextmanager
def reading(*folders: str | os.PathLike[str], say: Say = lambda message: None) -> Iterator[None]:
    """Keep edits away from model folders while they are read; what a killed edit left is put right first.

    A folder that is no merged checkpoint may be among them, and one that nobody may lock.

    Args:
        say: told if an edit had been cut short.

    Raises:
        CheckpointError: another process edits one of them, or an edit was cut short and cannot be put right here.
    """
    with contextlib.ExitStack() as locks:
        for folder in dict.fromkeys(Path(folder).resolve() for folder in folders):
            if folder.is_dir():
                file = _shared(folder, say)
                if file is not None:
                    locks.callback(os.close, file)
        yield


@contextlib.contextmanager
def editing(folder: str | os.PathLike[str], say: Say = lambda message: None) -> Iterator[None]:
    """Have a checkpoint for oneself; what a killed edit left is put right first.

    Raises:
        CheckpointError: another process reads or edits it, nothing could keep others away, or an edit was cut short and
            cannot be put right.
    """
    folder = Path(folder)
    with exclusive(folder):
        _settle(folder, say)
        yield


def recover(folder: str | os.PathLike[str], say: Say = lambda message: None) -> bool:
    """Put right what a killed edit left; True if there was something.

    Raises:
        CheckpointError: as `editing`.
    """
    with exclusive(Path(folder)):
        return _settle(Path(folder), say)


@dataclass(frozen=True, slots=True)
class Note:
    """What the journal says of itself.

    Attributes:
        operation: "add", "remove" or "reweight".
        modules: the regions of the task that are overwritten.
        before, after: sha256 (hex) of the receipt's file.
        card: the same of the model card; None where there is none.
        others: the regions of other tasks that are overwritten too, as they are in a corrected checkpoint.
    """

    operation: str
    task: str
    modules: tuple[str, ...]
    before: str
    after: str
    card: str | None
    others: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def regions(self) -> dict[str, tuple[str, ...]]:
        """All regions that are overwritten, by their tasks."""
        return {self.task: self.modules, **self.others}

    @property
    def adds(self) -> bool:
        """Whether the task's undo file is new. Then it holds the old bytes, and the journal needs none of its own."""
        return self.operation == "add"

    def to_bytes(self) -> bytes:
        content = asdict(self)
        if not self.others:
            del content["others"]
        return json.dumps({"format": 1, "note": content, "digest": _note_digest(content)}, indent=1).encode()

    @classmethod
    def read(cls, path: Path) -> Note:
        try:
            content = json.loads(path.read_bytes())
            note = content["note"]
            if content["format"] != 1 or content["digest"] != _note_digest(note):
                raise ValueError
            others = {task: tuple(modules) for task, modules in note.get("others", {}).items()}
            return cls(**{**note, "modules": tuple(note["modules"]), "others": others})
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise _damaged(path) from None


@dataclass(slots=True)
class Journal:
    """An edit under way; `journalled` makes one.

    Attributes:
        begun: whether the old state is safe, so that weights may be written.
    """

    folder: Path
    operation: str
    task: str
    begun: bool = False

    def keep(self, task: str, shapes: Shapes) -> CellsWriter:
        """The file for the old bytes of one task's cells; of the task that is added, that is its undo file. `begin`
        needs it synced."""
        if self.operation == "add" and task == self.task:
            return CellsWriter(undo_path(self.folder, task), shapes, {"multisbora": "undo", "task": task})
        path = self.folder / _PARTIAL / (_CELLS if task == self.task else _cells_of(task))
        return CellsWriter(path, shapes, {"multisbora": "journal", "task": task})

    def begin(self, regions: Mapping[str, Sequence[str]], before: bytes, after: bytes, card: bytes | None) -> None:
        """Have all that the old state takes on the disk. From here on weights may be written.

        Args:
            regions: task -> its regions that will be overwritten.
            before, after: the receipt's file.
            card: README.md as it is; None where there is none.
        """
        partial = self.folder / _PARTIAL
        if self.operation == "add":
            sync_folder(self.folder / UNDO_FOLDER)
        note = Note(
            operation=self.operation,
            task=self.task,
            modules=tuple(regions.get(self.task, ())),
            before=_sha(before),
            after=_sha(after),
            card=None if card is None else _sha(card),
            others={task: tuple(modules) for task, modules in regions.items() if task != self.task},
        )
        for name, data in {_BEFORE: before, _AFTER: after, CARD_FILE: card, _NOTE: note.to_bytes()}.items():
            if data is not None:
                _write_new(partial / name, data)
        sync_folder(partial)
        os.rename(partial, self.folder / FOLDER)
        sync_folder(self.folder)
        self.begun = True


@contextlib.contextmanager
def journalled(folder: Path, operation: str, task: str) -> Iterator[Journal]:
    """An edit: if the block ends well, it counts; if not, all is put back at once.

    Raises:
        CheckpointError: the system refused a write, or the old state could not be put back yet.
    """
    try:
        os.mkdir(folder / _PARTIAL)
        sync_folder(folder)  # or an undo file could outlive the mark by which it is swept
        journal = Journal(folder, operation, task)
        yield journal
        if journal.begun:
            os.rename(folder / FOLDER, folder / _DONE)
            sync_folder(folder)
    except BaseException as error:
        whole = _taken_back(folder)
        kept = "all is as it was" if whole else "the next command that uses it puts it back as it was"
        if isinstance(error, OSError):
            raise CheckpointError(
                f"{folder} was not edited: {error.strerror or error}; {kept}; see to its disk, then try again"
            ) from error
        if not whole and isinstance(error, MultisboraError):
            raise CheckpointError(f"{error}; {folder} could not be put back: {kept}") from error
        raise
    with contextlib.suppress(OSError, CheckpointError):  # the edit counts; whoever comes next sweeps
        _sweep(folder)


def require_unchanged(checkpoint: Checkpoint, receipt: Receipt, paths: Collection[Path]) -> None:
    """Refuse files of tensors that are not laid out as the receipt says.

    Raises:
        CheckpointError: there is one.
    """
    for path in sorted(paths):
        told = receipt.weights.get(path.name)
        with opened(path) as file:
            head = file.read(checkpoint.headers[path].data_start)
            size = os.fstat(file.fileno()).st_size
        if told is None or size != told.size or _sha(head) != told.header:
            raise CheckpointError(
                f"{path} was changed since the checkpoint was merged: its layout is not that of {RECEIPT_FILE}; merge "
                "again"
            )


def require_space(folder: Path, needed: int) -> None:
    """Refuse an edit that the disk has no room for.

    Raises:
        CheckpointError: fewer than `needed` bytes, and some for the folders, are free.
    """
    needed += 1 << 18
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"out of disk space for an edit of {folder}: it needs {needed / 1e6:.1f} MB for what the cells held, "
            f"{free / 1e6:.1f} MB are free; free some"
        )


def _taken_back(folder: Path) -> bool:
    """Put the old state back after an error; whether that was possible."""
    try:
        if not (folder / FOLDER).exists() and (folder / _DONE).exists():  # the rename may not have reached the disk
            os.rename(folder / _DONE, folder / FOLDER)
        if (folder / FOLDER).exists():
            _roll_back(folder)
    except (OSError, MultisboraError):
        return False
    with contextlib.suppress(OSError, CheckpointError):
        _sweep(folder)
    return True


def _settle(folder: Path, say: Say) -> bool:
    if not _interrupted(folder):
        return False
    cut_short = (folder / FOLDER).exists()
    try:
        if cut_short:
            _roll_back(folder)
            say(f"an edit of {folder} had been cut short: it is put back as it was before")
        _sweep(folder)
    except OSError as error:
        raise CheckpointError(
            f"an edit of {folder} was cut short and cannot be put right: {error.strerror or error}; use it once where "
            f"it can be written, and see that {_PARTIAL} and {_DONE} are folders in it or are not there"
        ) from error
    return True


def _roll_back(folder: Path) -> None:
    """Write the old bytes again. Can be cut short and begun anew; touches nothing before it has checked everything.

    Raises:
        CheckpointError: the journal is damaged, or the weights are not those that it is of.
        OSError: the system refused a write.
    """
    journal = folder / FOLDER
    note = Note.read(journal / _NOTE)
    before, after = (_read(journal / name, sha) for name, sha in ((_BEFORE, note.before), (_AFTER, note.after)))
    card = None if note.card is None else _read(journal / CARD_FILE, note.card)
    old = Receipt.parse(before, journal / _BEFORE)
    told = {task: old.tasks.get(task) for task in note.regions}
    if note.adds:
        told[note.task] = Receipt.parse(after, journal / _AFTER).tasks.get(note.task)
    checkpoint, geometry = Checkpoint.open(folder), from_checkpoint(folder)
    files: dict[Path, list[tuple[str, str, MergedRegion]]] = {}
    for task, modules in note.regions.items():
        regions = {} if (entry := told[task]) is None else entry.regions
        if entry is None or not regions.keys() >= set(modules):
            raise _damaged(journal / _NOTE)
        for module in modules:
            part = (task, module, regions[module])
            files.setdefault(checkpoint.where[geometry.find(module).tensor], []).append(part)
    require_unchanged(checkpoint, old, files.keys())
    sources = {task: journal / _cells_of(task) for task in note.others}
    sources[note.task] = undo_path(folder, note.task) if note.adds else journal / _CELLS
    # Without a cell in them where only the receipt changes.
    kept = {task: CellsFile.open(source) for task, source in sources.items()}
    for put in (False, True) if files else ():
        for path, parts in files.items():
            with open(path, "r+b" if put else "rb", opener=_not_through_links) as file:
                for task, module, region in parts:
                    matrix = geometry.find(module)
                    cells, place = Cells.of(region.region, matrix), checkpoint.place(matrix.tensor)
                    held = kept[task].read(matrix.cells_name, cells.shape, place.dtype)
                    mark = region.undo_digest if note.adds and task == note.task else region.digest
                    if digest(held) != mark:
                        raise _damaged(sources[task])
                    if put:
                        write_cells(file.fileno(), place, cells, held, path)
                if put:
                    os.fsync(file.fileno())
    write_whole(folder / RECEIPT_FILE, before)
    if card is None:
        (folder / CARD_FILE).unlink(missing_ok=True)
    else:
        write_whole(folder / CARD_FILE, card)
    if (folder / _DONE).exists():
        shutil.rmtree(folder / _DONE)
    os.rename(journal, folder / _DONE)
    sync_folder(folder)


def _sweep(folder: Path) -> None:
    """Remove what no edit needs any more: the journal, halves of files, undo files of tasks that are not there, and
    kept files that are not the receipt's."""
    receipt = Receipt.read(folder)
    undo = {undo_path(folder, owner).name for owner in (*receipt.tasks, *([WHOLE] if receipt.whole else []))}
    corrected = receipt.correction.names if receipt.correction else frozenset[str]()
    for place, needed in ((folder / UNDO_FOLDER, undo), (folder / KEPT_FOLDER, corrected)):
        if place.is_dir() and not place.is_symlink():
            for path in place.glob("*.safetensors"):
                if path.name not in needed:
                    path.unlink()
            sync_folder(place)
            if not any(place.iterdir()):
                place.rmdir()
    for name in (RECEIPT_FILE, CARD_FILE):
        for path in folder.glob(f".{name}.*.partial"):
            path.unlink()
    for name in (_PARTIAL, _DONE):
        if (folder / name).exists():
            shutil.rmtree(folder / name)
    sync_folder(folder)


def _not_through_links(path: str, flags: int) -> int:
    """No edit begins where weights are links, so a folder in which one ends there comes from somebody else."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)


def _cells_of(task: str) -> str:
    """The file for the old bytes of another task than the one that is added, removed or re-weighted."""
    return f"cells-{task}.safetensors"


def _interrupted(folder: Path) -> bool:
    return any((folder / name).exists() for name in (FOLDER, _PARTIAL, _DONE))


def _shared(folder: Path, say: Say) -> int | None:
    """A descriptor of the folder that keeps edits away for as long as it is open; None where it may not be opened."""
    end = time.monotonic() + _PATIENCE
    while True:
        try:  # an edit is in the way, or another reader that puts one right, which is done in no time
            file = shared(folder)
            if file is None or not _interrupted(folder):
                return file
            if not (folder / FOLDER).exists() and not os.access(folder, os.W_OK):
                return file  # only litter is left, which whoever may write here sweeps
            os.close(file)
            recover(folder, say)
        except BusyError:
            if time.monotonic() > end:
                raise
            time.sleep(_PAUSE)


def _write_new(path: Path, data: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        write_all(file, memoryview(data), 0)
        os.fsync(file)
    finally:
        os.close(file)


def _read(path: Path, sha: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError:
        raise _damaged(path) from None
    if _sha(data) != sha:
        raise _damaged(path)
    return data


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _note_digest(content: object) -> str:
    return _sha(json.dumps(content, sort_keys=True).encode())


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(
        f"an edit of this checkpoint was cut short, and {path}, by which it would be put back, is damaged: nothing was "
        "touched; merge again"
    )
