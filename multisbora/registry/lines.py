"""What a line of a registry's history may hold: text, times and details that every database and file can carry."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UsageError

LONGEST = 1000  # characters of a text that is not the name of a task or composition
# An event's time as `Ledger.record` writes it. What `datetime.fromisoformat` takes differs between versions of Python.
TIME = re.compile(r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])T([01]\d|2[0-3]):[0-5]\d:[0-5]\d\+00:00", re.ASCII)
_LONGEST_KEY = 100  # characters of a key in an event's detail
_DEEPEST = 8  # levels of an event's detail


def is_text(value: object, longest: int = LONGEST) -> bool:
    """Whether text is printable: without control characters, and halves of characters, which a database refuses."""
    return isinstance(value, str) and 0 < len(value) <= longest and value.isprintable()


def detail_fault(value: object, level: int = 1) -> str:
    """Why something cannot be (in) the detail of an event: it is no JSON, or not such as a line has. "" if it can."""
    if value is None or isinstance(value, str | bool | int | float):
        return "holds a number out of range" if isinstance(value, float) and not math.isfinite(value) else ""
    if not isinstance(value, dict | list | tuple):
        return f"holds a {type(value).__name__}, which is no JSON"
    if level > _DEEPEST:
        return f"nests deeper than {_DEEPEST} levels"
    for key in value if isinstance(value, dict) else ():
        if not isinstance(key, str) or len(key) > _LONGEST_KEY or not key.isprintable():
            return f"has key {repr(key)[:60]}, which is not printable text of at most {_LONGEST_KEY} characters"
    inner = value.values() if isinstance(value, dict) else value
    return next(filter(None, (detail_fault(element, level + 1) for element in inner)), "")


def protection(axis: int, channels: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """What the history says of channels that are protected from now on: module -> rows (axis 0) or columns (axis 1)."""
    content = json.dumps({module: sorted(indices) for module, indices in channels.items()}, sort_keys=True)
    return {
        "axis": ("rows", "columns")[axis],
        "matrices": len(channels),
        "channels": sum(map(len, channels.values())),
        "digest": hashlib.sha256(content.encode()).hexdigest(),
    }


def detail_text(action: str, detail: Mapping[str, object]) -> str:
    """The detail of an event as it is stored.

    Raises:
        UsageError: it cannot be written down and read again.
    """
    fault = detail_fault(dict(detail))
    try:
        if not fault:
            return json.dumps(dict(detail), sort_keys=True, allow_nan=False)
    except ValueError:
        fault = "holds a whole number of too many digits"
    raise UsageError(f"the detail of {action!r} for the registry's history {fault}: leave that out")
