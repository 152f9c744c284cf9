"""The stress of `scripts/stress_registry.py`, small: it holds on both databases, and its proof finds what is broken."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from multisbora.allocator import allocate
from multisbora.geometry import from_card
from multisbora.registry import Registry

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)  # it imports its neighbour
        import stress_registry

        yield stress_registry
    for name in ("stress_registry", "bench_registry"):
        sys.modules.pop(name)


def test_killed_workers_leave_a_whole_store(script: ModuleType, store_url: str, tmp_path: Path) -> None:
    found = script.stress(store_url, tmp_path, workers=4, tasks=12, kill=0.25, seed=1)
    assert found.problems == ()
    assert found.killed == 1
    assert found.stored > 0


@pytest.mark.parametrize("workers, tasks", [(1, 7), (4, 12), (32, 200)])
def test_the_steps_are_the_hard_case(script: ModuleType, workers: int, tasks: int) -> None:
    plans = [script.steps_of(worker, workers, tasks) for worker in range(workers)]
    steps = [step for plan in plans for step in plan]
    assert {step.task for step in steps} == {f"task-{number:03}" for number in range(tasks)}
    assert {step.variant for step in steps} == {"fa", "fb"}
    assert {name for step in steps for name in step.compositions} == {"main", "side", "late"}
    for task in {step.task for step in steps if step.action == "release"}:
        mine = [[step.action for step in plan if step.task == task] for plan in plans]
        (actions,) = [found for found in mine if found]  # nobody else asks for what is released
        assert actions[: actions.index("release")] in (["allocate"], ["allocate", "allocate"])
    assert workers < 3 or sum(any(step.task == "task-005" for step in plan) for plan in plans) == 3
    assert all(any(step.task == "task-000" for step in plan) for plan in plans)


def play(script: ModuleType, registry: Registry, worker: int, count: int | None = None) -> list[dict[str, Any]]:
    """Do the first `count` steps of one of two workers, one after the other; returns what it would have logged."""
    answers = []
    for step in script.steps_of(worker, 2, 10)[:count]:
        digest = None
        if step.action == "release":
            registry.release(script.MODEL, step.task)
        else:
            places = {name: [step.task] for name in step.compositions}
            kind: dict[str, Any] = {"variant": step.variant, "rank": script.RANK, "target_modules": step.targets}
            digest = allocate(registry, from_card(script.MODEL), composition=places, **kind).tasks[step.task].digest
        answers.append({"task": step.task, "digest": digest})
    return answers


@pytest.fixture
def ended(script: ModuleType) -> tuple[Registry, list[Any]]:
    """A store in memory, and the logs of the two workers that filled it."""
    registry = Registry.open("sqlite://")
    return registry, [
        script.Ended(script.steps_of(worker, 2, 10), None, play(script, registry, worker), False) for worker in range(2)
    ]


def problems(script: ModuleType, registry: Registry, logs: list[Any]) -> list[str]:
    with registry:
        return list(script.prove(registry, logs)[2])


def test_proof_passes_what_is_whole(script: ModuleType, ended: tuple[Registry, list[Any]]) -> None:
    assert problems(script, *ended) == []


def test_proof_finds_a_lost_task(script: ModuleType, ended: tuple[Registry, list[Any]]) -> None:
    registry, logs = ended
    registry.release(script.MODEL, "task-003")
    assert problems(script, registry, logs) == ["worker 1: task-003 is lost"]


def test_proof_finds_a_lost_membership(script: ModuleType, ended: tuple[Registry, list[Any]]) -> None:
    registry, logs = ended
    registry.release(script.MODEL, "task-007", "side")
    assert problems(script, registry, logs) == ["worker 1: task-007 is not in side"]


def test_proof_finds_other_claims(script: ModuleType, ended: tuple[Registry, list[Any]]) -> None:
    registry, logs = ended
    place = next(n for n, answer in enumerate(logs[0].answers) if answer["task"] == "task-006")
    logs[0].answers[place]["digest"] = "0" * 64
    assert problems(script, registry, logs) == ["worker 0: task-006 has other claims than was answered"]


def test_proof_finds_what_nobody_asked_for(script: ModuleType, ended: tuple[Registry, list[Any]]) -> None:
    registry, logs = ended
    allocate(registry, from_card(script.MODEL), ["stranger"], rank=16, composition="main", target_modules=["q_proj"])
    assert problems(script, registry, logs) == ["nobody asked for stranger in all of main"]


def test_proof_finds_a_task_of_another_kind(script: ModuleType, ended: tuple[Registry, list[Any]]) -> None:
    registry, logs = ended
    steps = [replace(step, targets=("down_proj",)) if step.task == "task-008" else step for step in logs[0].steps]
    assert {step.targets for step in logs[0].steps if step.task == "task-008"} == {("q_proj",)}, "the test's premise"
    logs[0] = replace(logs[0], steps=steps)
    assert problems(script, registry, logs) == ["task-008 is not what was asked for"]


def test_proof_finds_half_a_task(script: ModuleType, ended: tuple[Registry, list[Any]]) -> None:
    registry, logs = ended
    with registry.transaction() as ledger:
        ledger.connection.exec_driver_sql(
            "DELETE FROM claims WHERE (composition_id, matrix_id, axis, channel) = "
            "(SELECT composition_id, matrix_id, axis, channel FROM claims WHERE axis = 1 LIMIT 1)"
        )
    (problem,) = problems(script, registry, logs)
    assert "has no claim on column" in problem


def test_proof_finds_cells_of_two_tasks(script: ModuleType, ended: tuple[Registry, list[Any]]) -> None:
    registry, logs = ended
    with registry.transaction() as ledger:
        ledger.connection.exec_driver_sql("DROP TRIGGER yields_held")
        ledger.connection.exec_driver_sql("DELETE FROM yields")
    found = problems(script, registry, logs)
    assert any(" own a cell of model.layers." in problem for problem in found)
    assert any("neither yields" in problem for problem in found)


def test_proof_finds_a_survivor_that_gave_up(script: ModuleType, ended: tuple[Registry, list[Any]]) -> None:
    registry, logs = ended
    logs[1] = replace(logs[1], answers=logs[1].answers[:-1], asking=True, complaint="Traceback\nRegistryError: busy")
    (problem,) = problems(script, registry, logs)
    assert problem.startswith("survivor 1 ended ") and problem.endswith(" steps: RegistryError: busy")


@pytest.mark.parametrize("action", ["allocate", "release"])
@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("asking", [False, True])
def test_a_killed_worker_may_have_done_what_it_was_asking(
    script: ModuleType, action: str, done: bool, asking: bool
) -> None:
    registry = Registry.open("sqlite://")
    survivor = script.Ended(script.steps_of(0, 2, 10), None, play(script, registry, 0), False)
    steps = script.steps_of(1, 2, 10)
    alone = {step.task for step in steps} - {step.task for step in survivor.steps}
    at = max(n for n, step in enumerate(steps) if step.action == action and step.task in alone)
    answers = play(script, registry, 1, at + done)[:at]
    killed = script.Ended(steps, script.INSIDE, answers, asking)
    assert bool(problems(script, registry, [survivor, killed])) == (done and not asking)


def test_a_line_that_was_cut_off_is_no_answer(script: ModuleType, tmp_path: Path) -> None:
    first = script.steps_of(0, 2, 10)[0]
    asking = '{"asking": "allocate", "task": "task-000", "compositions": ["main"]}\n'
    (tmp_path / "0.log").write_text(asking + '{"task": "task-000", "dig')
    found = script.read_log(tmp_path, 0, 2, 10, script.INSIDE)
    assert (list(found.answers), list(found.begun)) == ([], [first])
