"""Regular expressions of module names, matched in a time and memory that the pattern's author cannot blow up.

`alpha_pattern` of an adapter that somebody else made is a regular expression, and Python's `re` needs years for some of
them ("(a+)+$"). RE2 takes time linear in the name, for the same language less lookarounds and back references.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import re2

from .errors import UsageError
from .untrusted import shown

MAX_LENGTH = 1000
MAX_PATTERNS = 4000  # of one task: to compile so many takes a second
_NAME = re.compile(r"(?:[A-Za-z0-9_-]|\\?\.)+", re.ASCII)
_ANY = "\n"
_OPTIONS = re2.Options()
_OPTIONS.log_errors = False


def matches_end(pattern: str, name: str) -> bool:
    """Whether `pattern` matches the whole of a dotted name or its last parts, as `re.fullmatch` would say it.

    Raises:
        UsageError: as `check_pattern`.
    """
    plain = _plain(pattern)
    if plain is None or _ANY in name:
        return _compiled(pattern).fullmatch(name) is not None
    text, end = plain
    size = len(text)
    if not name.endswith(end) or size > len(name) or name[-size - 1 : -size] not in ("", "."):
        return False
    return all(one in (other, _ANY) for one, other in zip(text, name[-size:], strict=True))


def check_pattern(pattern: str) -> None:
    """Refuse what cannot be matched in a bounded time.

    Raises:
        UsageError: it is no regular expression, is long, repeats something more than a thousand times, or looks around
            or back.
    """
    _compiled(pattern)


@functools.lru_cache(maxsize=1 << 16)
def _plain(pattern: str) -> tuple[str, str] | None:
    """A pattern that is a name, of which a dot stands for any character: its text, with _ANY for those, and what
    follows the last of them. A lambda for each matrix is written so, and a thousand of them are matched a million
    times.
    """
    if len(pattern) > MAX_LENGTH or _NAME.fullmatch(pattern) is None:
        return None
    text = pattern.replace("\\.", "\\").replace(".", _ANY).replace("\\", ".")
    return text, text.rpartition(_ANY)[2]


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> Any:
    if len(pattern) > MAX_LENGTH:
        raise UsageError(f"it has {len(pattern)} characters, more than {MAX_LENGTH}: use a shorter pattern")
    try:
        re2.compile(pattern, _OPTIONS)  # alone, so that no bracket of it closes ours
        return re2.compile(rf"(?:.*\.)?(?:{pattern})", _OPTIONS)
    except (re2.error, UnicodeError) as error:
        why = error.args[0] if error.args else ""
        why = why.decode(errors="replace") if isinstance(why, bytes) else str(why)
        raise UsageError(f"it cannot be used ({shown(why, 60)}): write a plain regular expression") from None
