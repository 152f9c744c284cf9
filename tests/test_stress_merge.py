"""The stress of `scripts/stress_merge.py`, small: nothing is lost, and its own comparison finds what is broken."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)  # it imports its neighbour
        import stress_merge

        yield stress_merge
    for name in ("stress_merge", "synthetic"):
        sys.modules.pop(name)


def test_kills_leave_the_old_checkpoint_or_the_new_one(script: ModuleType, tmp_path: Path) -> None:
    told: list[str] = []
    operations, wrong = script.stress(tmp_path, 7, 0, told.append)
    assert wrong == 0
    assert told == []
    assert [operation.counts["kills"] for operation in operations] == [1] * 7
    assert all(operation.counts["old"] + operation.counts["new"] == 1 for operation in operations)
    assert "| all |  | 7 |" in "\n".join(script.lines(operations))


def test_what_is_neither_is_found(script: ModuleType, tmp_path: Path) -> None:
    """The same run with a byte of the outcome changed."""
    operations = script.make_operations(tmp_path)
    operation = next(each for each in operations if each.name == "remove fb")
    operation.old["config.json"] = operation.new["config.json"] = "another"
    folder = script._fresh(operation, tmp_path / "runs", 0)
    assert not script.kill_once(operation, folder, random.Random(0))
