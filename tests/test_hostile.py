"""Hostile files are read as safetensors reads them, or refused in one line: scripts/stress_files.py, small."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from multisbora.errors import CheckpointError

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
FILES = (
    *("base/model.safetensors", "shards/model-00001-of-00002.safetensors", "shards/model.safetensors.index.json"),
    *("a/adapter_model.safetensors", "a/adapter_config.json", "base/config.json", "merged/multisbora_receipt.json"),
    *("merged/model.safetensors", "merged/multisbora_undo/a.safetensors"),
)


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)  # it imports its neighbour
        import stress_files

        patch.setattr(stress_files, "HANG_SECONDS", 5)
        yield stress_files
    for name in ("stress_files", "hostile"):
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def sample(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return script.Sample(tmp_path_factory.mktemp("hostile").resolve())


@pytest.fixture(scope="module")
def watch(script: ModuleType, sample: Any) -> Any:
    return script.Watch(sample.root)


def test_every_target_is_tried(script: ModuleType, sample: Any) -> None:
    assert {target.file for target in script.TARGETS} == set(FILES)
    assert all((sample.root / file).is_file() for file in FILES)


def test_valid_files_are_read(script: ModuleType, sample: Any, watch: Any) -> None:
    found = script.Found()
    for target in script.TARGETS:
        for reader in target.readers:
            script.try_one(found, watch, getattr(sample, reader), sample.root / target.file, "valid", 60)
    assert found.problems == []
    assert {outcome for _, outcome in found.outcomes} == {"read"}


@pytest.mark.parametrize("file", FILES)
@settings(
    max_examples=30,
    deadline=None,
    phases=[Phase.generate],  # to shrink a hang takes hours
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(chance=st.randoms(use_true_random=False))
def test_hostile_files_do_no_harm(
    script: ModuleType, sample: Any, watch: Any, file: str, chance: random.Random
) -> None:
    (target,) = (target for target in script.TARGETS if target.file == file)
    small = tuple(pair for pair in target.mutations if pair[1] is not script.hostile.large_mutation)
    target = replace(target, mutations=small)  # test_header.py has the large ones
    found = script.Found()
    with script.bounded(), sample.mutated(target, chance) as mutation:
        for reader in target.readers:
            script.try_one(found, watch, getattr(sample, reader), sample.root / file, mutation, 60)
    assert found.problems == []


def test_the_same_seed_makes_the_same_files(script: ModuleType, sample: Any) -> None:
    made = []
    for _ in range(2):
        chance = random.Random("1/2")
        for target in script.TARGETS:
            with sample.mutated(target, chance) as mutation:
                path = sample.root / target.file
                made.append((mutation, path.read_bytes() if path.is_file() and path.stat().st_size < 1 << 20 else None))
    assert made[: len(script.TARGETS)] == made[len(script.TARGETS) :]


def _crash(path: Path) -> None:
    raise KeyError("dtype")


def _babble(path: Path) -> None:
    raise CheckpointError("x" * 601)


def _lines(path: Path) -> None:
    raise CheckpointError("one\ntwo")


def _peep(path: Path) -> None:
    with open("/proc/self/status"):
        pass


def _loop(path: Path) -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("reader", "problem"),
    [
        (_crash, "KeyError: 'dtype'"),
        (_babble, "a message of 601 characters"),
        (_lines, "not one printable line"),
        (_peep, "it opens /proc/self/status"),
        (_loop, "it hangs"),
    ],
)
def test_the_judge_sees(
    script: ModuleType, watch: Any, monkeypatch: pytest.MonkeyPatch, reader: Any, problem: str
) -> None:
    monkeypatch.setattr(script, "HANG_SECONDS", 0.2)
    found = script.Found()
    script.try_one(found, watch, reader, watch.root / "base" / "x", "case", 60)
    assert len(found.problems) == 1 and problem in found.problems[0]


def test_what_is_slow_is_a_problem(script: ModuleType, watch: Any) -> None:
    found = script.Found()
    script.try_one(found, watch, lambda path: None, watch.root / "base" / "x", "case", 0.0)
    assert "it takes" in found.problems[0]
