"""The undo files of a merged checkpoint: which cells they must hold, and where those lie."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .cells import Share
from .tensors import UNREADABLE, File, Stored, one_line

FOLDER = "multisbora_undo"


def undo_name(task: str) -> str:
    """What a task's undo file is called in the checkpoint."""
    return f"{FOLDER}/{task}.safetensors"


class Undo:
    """The undo files of some tasks.

    Attributes:
        problems: what is wrong with them, but for the cells themselves.
    """

    def __init__(self, folder: Path, tasks: Iterable[str]) -> None:
        self.problems: list[str] = []
        self._files: dict[str, File] = {}
        self._unread: dict[str, set[str]] = {}
        for task in tasks:
            name = undo_name(task)
            try:
                file = File.open(folder / name)
            except UNREADABLE as error:
                self.problems.append(f"{name} is missing or damaged: {one_line(error)}")
                continue
            self._files[task] = file
            self._unread[task] = set(file.tensors)
            if file.metadata != {"format": "pt", "multisbora": "undo", "task": task}:
                self.problems.append(f"{name} says of itself that it is {str(file.metadata)[:200]}")

    def stored(self, share: Share, dtype: str) -> Stored | None:
        """Where the cells of a share lie in its task's file; None, and a problem, if they do not."""
        file = self._files.get(share.task)
        if file is None:
            return None
        name = share.matrix.cells_name
        self._unread[share.task].discard(name)
        found = file.tensors.get(name)
        if found is None or found.like != (dtype, list(share.shape)):
            what = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            self.problems.append(
                f"{undo_name(share.task)} has {what} of {name}, where {share.task} owns {dtype} {list(share.shape)}"
            )
            return None
        return found

    def check_rest(self) -> None:
        """Note what the files hold that no share asked for."""
        for task, names in self._unread.items():
            for name in sorted(names):
                self.problems.append(f"{undo_name(task)} has {name}, of which {task} owns no cell")
