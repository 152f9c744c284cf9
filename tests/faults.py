"""Processes that die, and systems that refuse, at one chosen call out of all that change files."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import random
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import builders

How = Literal["before", "half", "after"]
CALLS = ("pwrite", "write", "ftruncate", "fsync", "fdatasync", "rename", "replace", "link", "unlink", "rmdir", "mkdir")
_DIED = 77


class _Writer:
    """A buffered file whose writes are counted, too."""

    def __init__(self, file: Any, call: Callable[..., Any]) -> None:
        self._file, self._call = file, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, data: Any) -> Any:
        def through(data: Any) -> Any:
            done = self._file.write(data)
            self._file.flush()
            return done

        return self._call("buffered write", through, data)


@contextlib.contextmanager
def watched(act: Callable[[int, str, Callable[..., Any], tuple[Any, ...]], Any]) -> Iterator[None]:
    """Have `act(number, name, function, arguments)` called in place of each call that changes files, from 1 on."""
    lock, number = threading.Lock(), 0

    def call(name: str, function: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        nonlocal number
        with lock:
            number += 1
            mine = number
        return act(mine, name, lambda *given: function(*given, **more), arguments)

    kept = {name: getattr(os, name) for name in (*CALLS, "open")}
    open_ = io.open

    def os_open(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return int(call("open", kept["open"], path, flags, *rest, **more))
        return int(kept["open"](path, flags, *rest, **more))

    def buffered(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if not set(mode) & set("wx+a"):
            return open_(file, mode, *rest, **more)
        found = call("open", open_, file, mode, *rest, **more)
        return _Writer(found, call)

    def wrapped(name: str) -> Callable[..., Any]:
        return lambda *arguments, **more: call(name, kept[name], *arguments, **more)

    for name in CALLS:
        setattr(os, name, wrapped(name))
    os.open, io.open = os_open, buffered
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(os, name, function)
        io.open = open_


def calls(work: Callable[[], object]) -> list[str]:
    """The calls that it makes, in this process."""
    made = []

    def act(number: int, name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        made.append(name)
        return function(*arguments)

    with watched(act):
        work()
    return made


def moments(names: list[str]) -> Iterator[tuple[int, How]]:
    """When to die: before each of these calls, in the middle of what it writes, and after the last one.

    After one call is before the next: between them no file changes.
    """
    for number, name in enumerate(names, 1):
        yield number, "before"
        if "write" in name:
            yield number, "half"
    if names:
        yield len(names), "after"


def dies(work: Callable[[], object], at: int, how: How) -> bool:
    """Do it in a process that ends, with nothing cleaned up, at the `at`-th call; whether it came to that.

    Args:
        how: before the call, after it, or when half of what it writes is written.
    """

    def act(number: int, name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if number != at:
            return function(*arguments)
        if how == "half" and "write" in name:  # threads may have made another call the `at`-th one this time
            _some(name, function, arguments, 0.5)
        elif how == "after":
            with contextlib.suppress(OSError):
                function(*arguments)
        os._exit(_DIED)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child runs none of them
        child = os.fork()
    if not child:
        status = 1
        try:
            with watched(act):
                work()
            status = 0
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, _DIED), f"the process failed by itself, with {code}"
    return code == _DIED


@contextlib.contextmanager
def refused(at: int, number_of_error: int, lasting: bool = False) -> Iterator[list[str]]:
    """The `at`-th call is refused with this errno, or with `lasting` it and every later one that takes space.

    Yields:
        The names of the calls that were refused.
    """
    hit: list[str] = []

    def act(number: int, name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        takes = "write" in name or name in ("open", "mkdir", "ftruncate", "link")
        if number == at or (lasting and number > at and takes):
            hit.append(name)
            if name == "buffered write":
                _some(name, function, arguments, 0.5)
            raise OSError(number_of_error, os.strerror(number_of_error))
        return function(*arguments)

    with watched(act):
        yield hit


@contextlib.contextmanager
def short_writes(seed: int) -> Iterator[None]:
    """Every positioned write of more than one byte writes fewer than it is asked to, and says so."""
    draw = random.Random(seed)

    def act(number: int, name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if name != "pwrite" or len(memoryview(arguments[1]).cast("B")) < 2:
            return function(*arguments)
        return _some(name, function, arguments, draw.random())

    with watched(act):
        yield


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones and those in folders included, and empty folders by their names."""
    empty = (path for path in folder.rglob("*") if path.is_dir() and not any(path.iterdir()))
    return builders.tree(folder) | {f"{path.relative_to(folder)}/": b"" for path in empty}


def _some(name: str, function: Callable[..., Any], arguments: tuple[Any, ...], part: float) -> Any:
    """Write a part of the bytes: at least one of them, and one fewer than all."""
    position = 0 if name == "buffered write" else 1
    data = memoryview(arguments[position]).cast("B")
    size = max(1, min(len(data) - 1, int(len(data) * part)))
    return function(*arguments[:position], data[:size], *arguments[position + 1 :])


ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)


class Case:
    """One operation: the folder before it, and all files before and after."""

    def __init__(self, before: Path, act: Callable[[Path], object]) -> None:
        self.before, self.act = before, act
        self.old = tree(before)
        twin = Path(shutil.copytree(before, before.with_name(f"{before.name}-after")))
        self.calls = calls(lambda: act(twin))
        self.new = tree(twin)
        assert self.old != self.new

    def copy(self, to: Path) -> Path:
        return Path(shutil.copytree(self.before, to))
