"""Patterns of module names are matched as `re` matches them, and in bounded time whatever they are."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multisbora.errors import UsageError
from multisbora.patterns import check_pattern, matches_end

NAME = "model.layers.3.self_attn.q_proj"
ATOMS = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", "[a-b.]", r"\d", r"\w", r"[^\d]", "1"])
QUANTIFIERS = st.sampled_from(["", "", "", "*", "+", "?", "{2}", "{0}", "{1,2}", "{1,}", "*?", "+?", "??", "{1,2}?"])
PARTS = st.tuples(ATOMS, QUANTIFIERS).map("".join) | st.sampled_from(["^", "$"])


def alternatives(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(st.lists(parts, max_size=3).map("".join), min_size=1, max_size=3).map("|".join)


def group(inner: str, opening: str, quantifier: str) -> str:
    return f"{opening}{inner}){quantifier}"


# One group within another, and short names: with more of either, `re` itself would not come back.
GROUPS = st.builds(group, alternatives(PARTS), st.sampled_from(["(", "(?:"]), QUANTIFIERS)
OUTER = st.builds(group, alternatives(PARTS | GROUPS), st.sampled_from(["(", "(?:"]), st.sampled_from(["", "?", "+"]))


@settings(max_examples=1500, deadline=None, derandomize=True)  # the same each time: of some, `re` would not come back
@given(pattern=alternatives(PARTS | GROUPS | OUTER), name=st.text("ab.1", max_size=5))
def test_the_answers_are_those_of_re(pattern: str, name: str) -> None:
    assert matches_end(pattern, name) == (re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) is not None)


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("q_proj", True),
        ("self_attn.q_proj", True),
        ("attn.q_proj", False),
        ("proj", False),
        ("layers.3.*.q_proj", True),
        (r".*layers\.[0-9]+\..*q_proj", True),
        (r"layers\.(1|3)\.self_attn\.[qk]_proj", True),
        (r"^layers\.3\..*", False),
        (r"^model\.layers\.3\..*", True),
        ("k_proj|q_proj", True),
        ("", False),
    ],
)
def test_patterns_of_modules(pattern: str, matches: bool) -> None:
    assert matches_end(pattern, NAME) == matches


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+$", r"(\w+)+!", "(.*)*!", r"(\w|\w)*!", "(a|a)" * 40 + "!", ".*" * 40 + "!"),
        "(((((a+)+)+)+)+)+!",
    ],
)
def test_what_re_would_take_years_for_is_answered(pattern: str) -> None:
    assert not matches_end(pattern, "a" * 500 + "-")


@pytest.mark.parametrize(
    "pattern",
    [
        *("(", ")", "[", "[z-a]", "*", "a**", "a{2}{3}", "a*+", "a{3,2}", "a{1000000}", "\\", r"(a)\1", "(?=a)b"),
        *("((((a{1000}){1000}){1000})", r"(\w{0,900}){900}!", "((a?){999}){999}!", "a" * 2000, "\ud800"),
    ],
)
def test_what_cannot_be_bounded_is_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match=r"it cannot be used \(.*\): write a plain|more than 1000") as caught:
        check_pattern(pattern)
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()
