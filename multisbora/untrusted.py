"""Files and texts that other people made: read within bounds, and shown in one short line.

A base model, an adapter or a merged checkpoint may come from anyone. What is read of it here costs memory and time in
proportion to bounds that are known beforehand, and what a message quotes of it stays printable and short.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import reprlib
import stat
from pathlib import Path
from typing import Any, BinaryIO

MAX_JSON_BYTES = 32 << 20
# A JSON value takes up to 80 bytes of memory for each mark that it is written with: 160 MB at the most.
MAX_JSON_MARKS = 2_000_000
_MAX_DEPTH = 64
_MAX_DIGITS = 20  # of 2**64, and a sign
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 80


def shown(value: object, most: int = 120) -> str:
    """A foreign value for a message: a text as it is where that is printable and short, else escaped, and cut."""
    if isinstance(value, str):
        if len(value) <= most and value.isprintable():
            return value
        value = value if len(value) <= most else f"{value[: most // 2]}...{value[-most // 3 :]}"
        return repr(value)[: 2 * most]
    return _BRIEF.repr(value)[: 2 * most]


def is_plain(text: str, most: int) -> bool:
    """Whether a foreign name can stand in messages, tables and files: printable, not empty, `most` characters."""
    return 0 < len(text) <= most and text.isprintable()


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading, following links, but never a pipe or a device, which may not answer or never end.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_json(path: str | os.PathLike[str], most: int = MAX_JSON_BYTES, marks: int = MAX_JSON_MARKS) -> Any:
    """The content of a JSON file.

    Args:
        most: bytes that it may have.
        marks: as for `parse_json`.

    Raises:
        OSError: it cannot be read, or is no regular file.
        ValueError: as for `parse_json`, or it is larger than `most`.
    """
    return parse_json(read_bytes(path, most), marks)


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """The content of a file of at most `most` bytes. One that claims more is not read: it can be a hole.

    Raises:
        OSError: it cannot be read, or is no regular file.
        ValueError: it is larger.
    """
    with open_file(Path(path)) as file:
        raw = file.read(most + 1) if os.fstat(file.fileno()).st_size <= most else None
    if raw is None or len(raw) > most:
        raise ValueError(f"it has more than {most} bytes")
    return raw


def parse_json(raw: bytes, marks: int = MAX_JSON_MARKS) -> Any:
    """Parse UTF-8 JSON strictly: no name twice, no NaN or infinity, no lone surrogate, whole numbers of 64 bits.

    Args:
        marks: commas, colons and opening brackets that it may have: what bounds the memory of the parsed content.

    Raises:
        ValueError: it is refused; the message says why, in a few words that quote nothing of it.
    """
    if sum(raw.count(mark) for mark in (b",", b":", b"[", b"{")) > marks:
        raise ValueError(f"it has more than {marks} values and brackets")
    try:
        content = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_constant,
        )
        _check_depth(content)
        if _SURROGATE.search(raw):
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        raise ValueError("it is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise ValueError(f"it is nested deeper than {_MAX_DEPTH}") from None
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice in it")
    return found


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError("it has a whole number of more than 64 bits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("it has a number that is not finite")
    return value


def _constant(text: str) -> float:
    raise ValueError(f"it has {text}, which is no JSON")


def _check_depth(content: object) -> None:
    level = [content]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer if type(outer) is list else ())
            if type(inner) in (dict, list)
        ]
        if not level:
            return
    raise RecursionError
