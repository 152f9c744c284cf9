"""One command in a process of its own, measured: its time, its peak of memory, and what of its input lay in memory.

Linux only: memory is that of /proc/PID/status, of the process and all its children, looked at 50 times a second.
"peak" is resident memory with everything in it, mapped files too. "anonymous" is what of it no file stands behind, so
that the system could not simply drop it. Between two looks a peak can hide from "anonymous", but not from "peak": the
kernel keeps that one, VmHWM, for each process.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_LOOK = 0.02  # seconds
_CHUNK = 16 << 20
_COLD, _WARM = 0.001, 0.999  # shares of a file's pages that are in memory
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass(frozen=True)
class Measured:
    """What a command did.

    Attributes:
        seconds: from its start to its end.
        peak, anonymous: bytes, as this module defines them.
        output: what it wrote to stdout.
    """

    seconds: float
    peak: int
    anonymous: int
    output: str


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Measured:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        start = time.perf_counter()
        with subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        ) as process:
            watch = _Watch(process.pid)
            watch.start()
            try:
                output, _ = process.communicate()
                seconds = time.perf_counter() - start
            except BaseException:
                process.kill()
                raise
            finally:
                watch.stop()
        if process.returncode:
            said.seek(0)
            raise RuntimeError(
                f"{' '.join(command[:3])} ... ended with exit code {process.returncode}: {said.read()[-2000:].strip()}"
            )
        return Measured(seconds, watch.peak, watch.anonymous, output)


def make_cold(paths: Iterable[Path]) -> str:
    """Put the files' pages out of memory, and see that they are. How it was done, in words.

    Raises:
        RuntimeError: they stayed, and this user may not drop the whole cache.
    """
    files = list(paths)
    for _ in range(3):
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if in_memory(files) <= _COLD:
            return "posix_fadvise(DONTNEED)"
    if os.access(_DROP_CACHES, os.W_OK):
        os.sync()
        _DROP_CACHES.write_text("1\n")
        if in_memory(files) <= _COLD:
            return "/proc/sys/vm/drop_caches"
    raise RuntimeError(f"{in_memory(files):.1%} of the input stays in the page cache: run this as root")


def make_warm(paths: Iterable[Path]) -> None:
    """Read the files, so that they are in memory, and see that they are.

    Raises:
        RuntimeError: this machine's memory does not hold them.
    """
    files = list(paths)
    buffer = bytearray(_CHUNK)
    for _ in range(2):
        if in_memory(files) >= _WARM:
            return
        for path in files:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
    if in_memory(files) < _WARM:
        raise RuntimeError(
            f"only {in_memory(files):.1%} of the input stays in the page cache: measure less of it (--layers)"
        )


def in_memory(paths: Iterable[Path]) -> float:
    """Share of the files' pages that the page cache holds, as mincore says; 0 for no pages at all."""
    held = pages = 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    for path in paths:
        size = path.stat().st_size
        count = -(-size // mmap.PAGESIZE)
        if not count:
            continue
        with path.open("rb") as file:
            address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        if address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), f"mmap of {path}")
        try:
            states = ctypes.create_string_buffer(count)
            if libc.mincore(address, size, states):
                raise OSError(ctypes.get_errno(), f"mincore of {path}")
            present = states.raw
        finally:
            libc.munmap(address, size)
        held += sum(present.count(bytes([state])) for state in range(1, 256, 2))  # only the lowest bit is defined
        pages += count
    return held / pages if pages else 0.0


class _Watch(threading.Thread):
    """Looks at a process and its children until it is stopped."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak = self.anonymous = 0
        self._pid = pid
        self._done = threading.Event()

    def run(self) -> None:
        while True:
            self._look()
            if self._done.wait(_LOOK):
                return

    def stop(self) -> None:
        self._done.set()
        self.join()

    def _look(self) -> None:
        found = [_status(pid) for pid in _family(self._pid)]
        self.anonymous = max(self.anonymous, sum(status.get("RssAnon", 0) for status in found))
        resident = sum(status.get(key, 0) for status in found for key in ("RssAnon", "RssFile", "RssShmem"))
        self.peak = max(self.peak, resident, *(status.get("VmHWM", 0) for status in found))


def _family(pid: int) -> list[int]:
    """A process and all its living descendants."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{parent}/task").iterdir():
                with contextlib.suppress(OSError):
                    found += map(int, (thread / "children").read_text().split())
    return found


def _status(pid: int) -> dict[str, int]:
    """The memory of a process, in bytes; nothing if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines if line.startswith(("VmHWM:", "Rss")))
    return {key.rstrip(":"): 1024 * int(value) for key, value, *_ in pairs}
