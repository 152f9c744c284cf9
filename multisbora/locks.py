"""What keeps two processes from one folder: one that edits it is alone, any number may read it.

The lock is on the folder itself, so no file tells of it, and it ends with the process that holds it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import CheckpointError

Say = Callable[[str], None]


class BusyError(CheckpointError):
    """Another process holds the folder."""


def shared(folder: Path) -> int | None:
    """A descriptor of the folder that keeps those away who want it alone, for as long as it is open.

    None where it may not be opened. Where folders cannot be locked, the descriptor keeps nobody away.

    Raises:
        BusyError: one has it alone.
    """
    try:
        file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        return None
    try:
        with contextlib.suppress(OSError):
            _lock(file, folder, fcntl.LOCK_SH, "edited")
    except BaseException:
        os.close(file)
        raise
    return file


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Have a folder alone.

    Raises:
        BusyError: another process has it, too.
        CheckpointError: it cannot be opened or locked.
    """
    try:
        file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be opened: {error.strerror}; give a merged checkpoint") from None
    try:
        try:
            _lock(file, folder, fcntl.LOCK_EX, "read or edited")
        except OSError as error:
            raise CheckpointError(
                f"{folder} cannot be locked ({error.strerror}), so nothing would keep two edits apart: copy it to a "
                "local disk and edit it there"
            ) from None
        yield
    finally:
        os.close(file)


def _lock(file: int, folder: Path, kind: int, what: str) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BusyError(f"{folder} is being {what} by another process: try again when that one is done") from None
