"""Folders and files that appear whole or not at all, and what keeps two processes out of each other's way."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from .errors import CheckpointError

_MARGIN = 16 << 20  # free bytes to leave beside an output: directory blocks, the receipt, the card
_OUT_OF_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextlib.contextmanager
def publish(output: str | os.PathLike[str], needed: int = 0) -> Iterator[Path]:
    """A folder that appears whole or not at all: yields a temporary sibling, synced and renamed to `output` at the end.

    Whatever ends the block early removes the sibling. The sibling of a process that was killed stays, hidden, until the
    next `publish` to the same `output` sweeps it away; it never stands in the way.

    Args:
        output: folder to make; it may exist if it is empty.
        needed: bytes that will be written, checked against the free space before anything is.

    Raises:
        CheckpointError: `output` exists and is not an empty folder, there is too little disk space, or a write failed.
    """
    output = Path(os.path.abspath(output))
    check_output(output, needed)
    with _sibling(output) as partial:
        yield partial
        _sync(partial)
        try:
            partial.rename(output)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise _taken(output) from None
            raise
        sync_folder(output.parent)


@contextlib.contextmanager
def publish_file(output: str | os.PathLike[str], needed: int = 0) -> Iterator[Path]:
    """A file that appears whole or not at all, and never in the place of another one: `publish` for one file.

    Yields the path to write it at.

    Raises:
        CheckpointError: `output` exists, there is too little disk space, or a write failed.
    """
    output = Path(os.path.abspath(output))
    check_output_file(output, needed)
    with _sibling(output) as partial:
        yield partial / output.name
        _sync(partial)
        try:
            os.link(partial / output.name, output)
        except FileExistsError:
            raise _taken_file(output) from None
        except OSError:  # a file system without hard links
            check_output_file(output)
            os.rename(partial / output.name, output)
        sync_folder(output.parent)


def check_output(output: str | os.PathLike[str], needed: int = 0) -> None:
    """Refuse a place where `publish` could not put `needed` bytes. What it tries with leaves nothing.

    Raises:
        CheckpointError: it exists and is not an empty folder, nothing can be written where it is to be, or the disk has
            too little free space.
    """
    output = Path(os.path.abspath(output))
    if os.path.lexists(output) and (output.is_symlink() or not output.is_dir() or any(output.iterdir())):
        raise _taken(output)
    _require_place(output, needed)


def check_output_file(output: str | os.PathLike[str], needed: int = 0) -> None:
    """Refuse a place where `publish_file` could not put `needed` bytes. What it tries with leaves nothing.

    Raises:
        CheckpointError: something is there, nothing can be written beside it, or the disk has too little free space.
    """
    output = Path(os.path.abspath(output))
    if os.path.lexists(output):
        raise _taken_file(output)
    _require_place(output, needed)


def _require_place(output: Path, needed: int) -> None:
    standing = next(path for path in output.parents if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=standing):
            pass
        free = shutil.disk_usage(standing).free
    except OSError as error:
        raise CheckpointError(
            f"{output} cannot be made, {standing} takes no files ({error.strerror}): choose another output"
        ) from None
    if needed and free < needed + _MARGIN:
        raise CheckpointError(
            f"out of disk space for {output}: it needs {_gigabytes(needed + _MARGIN)}, {_gigabytes(free)} are free; "
            "free some, or choose an output on another disk"
        )


def _taken(output: Path) -> CheckpointError:
    return CheckpointError(f"{output} exists and is not an empty folder: choose another output, or remove it first")


def _taken_file(output: Path) -> CheckpointError:
    return CheckpointError(f"{output} exists: choose another output, or remove it first")


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


@contextlib.contextmanager
def writing(output: Path, kept: str = "nothing was kept") -> Iterator[None]:
    """What the system says against writing, as an error with the next step.

    Args:
        kept: what is left of `output`.

    Raises:
        CheckpointError: the block raised an OSError, or safetensors' own kind of it.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _OUT_OF_SPACE:
            raise CheckpointError(
                f"out of disk space while writing {output}: {kept}; free some space, or choose an output on "
                "another disk"
            ) from error
        raise CheckpointError(
            f"{output} was not written: {error.strerror or error}; {kept}; check the path and its rights"
        ) from error
    except SafetensorError as error:  # its writer hides the system's error number in a text
        raise CheckpointError(f"{output} was not written: {error}; {kept}; is there space on its disk?") from error


@contextlib.contextmanager
def _sibling(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that is gone at the end, unless it was renamed."""
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        _sweep(output)
        partial, lock = _locked_sibling(output)
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)


def _locked_sibling(output: Path) -> tuple[Path, int]:
    """A new temporary folder and a descriptor whose lock says, for as long as we live, that it is in use."""
    while True:
        partial = output.parent / f".{output.name}.{secrets.token_hex(6)}.partial"
        partial.mkdir()
        lock = os.open(partial, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks: then nothing is ever swept there either
            fcntl.flock(lock, fcntl.LOCK_EX)
        if partial.is_dir():
            return partial, lock
        os.close(lock)  # another process swept it between mkdir and flock


def _sweep(output: Path) -> None:
    """Remove the temporary siblings of dead processes: those whose lock is free."""
    for path in output.parent.glob(f".{_literal(output.name)}.*.partial"):
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pass
        else:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


def _literal(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            _sync(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Have what was made, renamed and removed in a folder reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that holds either what it held or all of `data`, and reaches the disk.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)
