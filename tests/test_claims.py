"""What a task holds and what it may be called: the digest that adapters carry, and names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multisbora.errors import UsageError
from multisbora.names import check_name
from multisbora.region import Region
from multisbora.registry.claims import TaskClaims


def test_the_digest_covers_what_is_held() -> None:
    base = TaskClaims("m", "g", "c", "t", "fa", 2, {"x.0.q": Region("fa", (1, 2))})
    others = [
        TaskClaims("m2", "g", "c", "t", "fa", 2, base.regions),
        TaskClaims("m", "g2", "c", "t", "fa", 2, base.regions),
        TaskClaims("m", "g", "c", "t", "fb", 2, base.regions),
        TaskClaims("m", "g", "c", "t", "fa", 3, base.regions),
        TaskClaims("m", "g", "c", "t", "fa", 2, {"x.1.q": Region("fa", (1, 2))}),
        TaskClaims("m", "g", "c", "t", "fa", 2, {"x.0.q": Region("fa", (1, 3))}),
        TaskClaims("m", "g", "c", "t", "fa", 2, {"x.0.q": Region("fa", (1, 2), (0,))}),
    ]
    assert len({claims.digest for claims in (base, *others)}) == 1 + len(others)
    # A task has the same regions, and one adapter, in all of its compositions and under any name.
    assert TaskClaims("m", "g", "other", "t2", "fa", 2, base.regions, "trained").digest == base.digest
    two = {"x.0.q": Region("fa", (1, 2)), "x.1.q": Region("fa", (3, 4))}
    forward = TaskClaims("m", "g", "c", "t", "fa", 2, two)
    assert forward.digest == TaskClaims("m", "g", "c", "t", "fa", 2, dict(reversed(two.items()))).digest
    assert base.to_json() == {"variant": "fa", "rank": 2, "regions": {"x.0.q": [1, 2]}}


@pytest.mark.parametrize(
    "bad",
    [
        "",
        " ",
        ".",
        "..",
        ".hidden",
        "-x",
        "a b",
        "a/b",
        "../a",
        "a\\b",
        "a\n",
        "a\0",
        "ä",
        "x" * 101,
        "y" * 10_000,
        None,
        3,
    ],
)
def test_hostile_names_are_refused_in_one_short_line(bad: str) -> None:
    with pytest.raises(UsageError, match="composition name") as caught:
        check_name(bad, "composition")
    message = str(caught.value)
    assert len(message) < 250 and message.isprintable()


@given(st.text())
def test_names_that_pass_are_safe(name: str) -> None:
    try:
        check_name(name)
    except UsageError:
        return
    assert name.isascii() and "/" not in name and name[0] not in ".-" and 0 < len(name) <= 100


def test_ordinary_names_pass() -> None:
    for name in ("math", "commonsense_170k", "gsm8k-v1.2", "7", "x" * 100):
        assert check_name(name) == name


@pytest.mark.parametrize("name", ["adding.run", "x.log", "x.run.RUN", "_.Log"])
def test_no_new_task_is_called_as_what_lies_beside_adapters(name: str) -> None:
    with pytest.raises(UsageError, match=r"^task name '\S+' is not usable: .*neither \.run nor \.log$"):
        check_name(name, new_task=True)
    assert check_name(name) == name
    assert check_name(f"{name}.x", new_task=True) == f"{name}.x"
