"""JSON of others is parsed strictly and within bounds; what is shown of it fits a line."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multisbora.untrusted import is_plain, open_file, parse_json, read_bytes, read_json, shown

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(SCALARS | TEXT, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=20)


@settings(max_examples=200, deadline=None)
@given(content=JSON, ascii_only=st.booleans())
def test_what_json_writes_is_read(content: Any, ascii_only: bool) -> None:
    assert parse_json(json.dumps(content, ensure_ascii=ascii_only).encode()) == content


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "not JSON at line 1, column 1"),
        (b"{} {}", "not JSON"),
        ("{}".encode("utf-16"), "not UTF-8"),
        (b'{"a":1,"a":1}', "a name occurs twice"),
        (b'{"b":{"a":1,"a":2}}', "a name occurs twice"),
        (b"[NaN]", "NaN"),
        (b"-Infinity", "Infinity"),
        (b"[1e400]", "not finite"),
        (b"1" * 5000, "more than 64 bits"),
        (b"-" + b"9" * 20, "more than 64 bits"),
        (b'["\\ud800"]', "not UTF-8"),
        (b'["\xed\xa0\x80"]', "not UTF-8"),
        (b"[" * 65 + b"]" * 65, "nested deeper"),
        (b"[" * 100_000, "nested deeper"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "nested deeper"),
        (b"[" + b"0," * 100 + b"0]", "more than 100 values"),
        (b"[" + b"[]," * 50 + b"0]", "more than 100 values"),
    ],
)
def test_what_is_refused(raw: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        parse_json(raw, marks=100 if "values" in why else 100_000)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 100


def test_a_pair_of_surrogates_is_a_character() -> None:
    assert parse_json(b'"\\ud83e\\udd80"') == "\U0001f980"


def test_files_are_read_to_a_bound(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1, 2]")
    assert read_json(tmp_path / "a.json", most=6) == [1, 2]
    with pytest.raises(ValueError, match="more than 5 bytes"):
        read_json(tmp_path / "a.json", most=5)
    assert read_bytes(tmp_path / "a.json", 6) == b"[1, 2]"
    os.truncate(tmp_path / "a.json", 1 << 40)
    with pytest.raises(ValueError, match="more than"):
        read_json(tmp_path / "a.json")
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"more than {100 << 20} bytes"):  # a hole, which is not read to its bound
        read_bytes(tmp_path / "a.json", 100 << 20)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_only_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            open_file(path)
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    with open_file(tmp_path / "link") as file:
        assert file.read() == b"x"


@pytest.mark.parametrize(
    "value", ["a\nb", "x" * 10**6, "\ud800", "\x1b[31m", "\u202e", [[[[[[[[1]]]]]]]] * 1000, 10**30]
)
def test_what_is_shown_is_short_and_printable(value: object) -> None:
    assert shown(value).isprintable()
    assert len(shown(value)) <= 240


def test_what_is_harmless_is_shown_as_it_is() -> None:
    assert shown("layers.0.q_proj") == "layers.0.q_proj"
    assert shown([1, 2]) == "[1, 2]"
    deep: Any = 1
    for _ in range(900):
        deep = [deep]
    assert len(shown(deep)) <= 240


def test_plain_names() -> None:
    assert is_plain("a.b", 3)
    assert not any(is_plain(text, 3) for text in ("", "abcd", "a\n", "\0", "\ud800"))
