"""Walks through lambdas, on losses whose best is known."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from commands import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from multisbora import lambdas as walks
from multisbora.blend import Half
from multisbora.errors import UsageError
from multisbora.lambdas import PLACES, POINTS, Array, Space, descend, objective, search, urgency
from multisbora.weights import By, TaskWeight

MODULES = [f"layers.{i}.{kind}" for i in (0, 1, 2) for kind in ("q", "up")]


class Bowls:
    """Stands for a `Blend`: the loss of each task is a bowl over all lambdas, with nats that wobble by batch.

    Args:
        bottoms: (tasks, tasks, matrices): where the loss of each task is lowest.
        steep: (tasks, tasks, matrices): how fast it rises from there.
    """

    def __init__(self, bottoms: Array, steep: Array, wobble: float = 0.0, seed: int = 0) -> None:
        self.bottoms, self.steep, self.wobble = bottoms, steep, wobble
        self.noise = np.random.default_rng(seed)
        self.now = np.zeros(0)
        self.seen: list[Array] = []

    def compose(self, lambdas: Array, active: Any = None) -> None:
        self.now = lambdas
        self.seen.append(lambdas)

    def nats(self, rows: list[Any]) -> Array:
        return np.array([self.loss(batch.task, self.now) for batch in rows])

    def loss(self, task: int, lambdas: Array) -> float:
        return float((self.steep[task] * (lambdas - self.bottoms[task]) ** 2).sum())

    def slopes(self, batch: Any, target: Any = None) -> tuple[float, Array]:
        slope = 2 * self.steep[batch.task] * (self.now - self.bottoms[batch.task])
        return self.loss(batch.task, self.now), slope + self.wobble * self.noise.normal(size=slope.shape)


class Rows:
    """Stands for a `Batch` of one token."""

    tokens = 1

    def __init__(self, task: int) -> None:
        self.task = task


def space_of(tasks: int, by: By = "matrix", start: float | TaskWeight = 1.0, modules: list[str] = MODULES) -> Space:
    names = [f"task{number}" for number in range(tasks)]
    weight = start if isinstance(start, TaskWeight) else TaskWeight(start)
    return Space.of(dict.fromkeys(names, dict.fromkeys(modules, 8)), dict.fromkeys(names, weight), by)


def half_of(space: Space, bowls: Bowls, batches: int = 1) -> Half:
    """Own adapters lose nothing, and have gained one nat a token."""
    rows: Any = [[Rows(task)] * batches for task in range(len(space.tasks))]
    own = [np.zeros(batches) for _ in space.tasks]
    start = [np.full(batches, bowls.loss(task, space.start)) for task in range(len(space.tasks))]
    return Half(rows, base=[each + 1 for each in own], own=own, start=start, scale=np.ones(len(space.tasks)))


def walked(walk: Iterator[tuple[int, Array]]) -> list[tuple[int, Array]]:
    return list(walk)


# --- the space -----------------------------------------------------------------------------------------------------


def test_lambdas_of_a_space() -> None:
    weights = {"math": TaskWeight(0.5, (("q", 0.0),)), "code": TaskWeight(-1.0)}
    space = Space.of({"math": dict.fromkeys(MODULES, 8), "code": dict.fromkeys(MODULES[:2], 4)}, weights, "kind")
    assert space.size == 4 and space.modules == tuple(MODULES)
    assert space.start.tolist() == [[0.0, 0.5] * 3, [-1.0] * 6]
    assert space.present.tolist() == [[True] * 6, [True, True, *[False] * 4]]
    moved = space.moved(np.array([[0.12345, -3.0], [-0.1, 9.0]]))
    assert moved.tolist() == [[0.1234, 0.0] * 3, [-1.0, 2.0] * 3]  # no lower than 0 or the start, no higher than 2
    assert space.summed(np.arange(12.0).reshape(2, 6)).tolist() == [[0 + 2 + 4, 1 + 3 + 5], [6 + 8 + 10, 7 + 9 + 11]]
    assert space.weights(moved) == {
        "math": TaskWeight(0.0617, (("q", 0.1234), ("up", 0.0))),
        "code": TaskWeight(0.5, (("q", -1.0), ("up", 2.0))),
    }


def test_a_space_by_channel() -> None:
    """As many places a matrix as the widest has channels; where a task has fewer, or no such matrix, they are empty."""
    ranks = {"math": {"a.q": 3, "a.up": 2}, "code": {"a.up": 1}}
    space = Space.of(ranks, {"math": TaskWeight(0.5, (("q", 2.5),)), "code": TaskWeight(1.0)}, "channel")
    assert (space.modules, space.width, space.size) == (("a.q", "a.up"), 3, 6)
    assert space.present.tolist() == [[True] * 5 + [False], [False] * 3 + [True, False, False]]
    assert space.start.tolist() == [[2.5] * 3 + [0.5] * 3, [1.0] * 6]
    assert np.array_equal(space.owned, space.present)
    moved = space.moved(np.full((2, 6), 0.12345) * np.arange(6))
    assert moved[0].tolist() == [2.5, 2.5, 2.5, 0.8704, 0.9938, 1.1172]  # no higher than 2 or the start


def test_descent_by_channel() -> None:
    ranks = {task: {"a.q": 3, "a.up": 2} for task in ("math", "code")}
    space = Space.of(ranks, dict.fromkeys(ranks, TaskWeight()), "channel")
    wanted = np.random.default_rng(0).uniform(0.5, 1.3, (2, 6))
    bowls = Bowls(np.array([wanted, wanted]), np.ones((2, 2, 6)) * space.present)
    found = walked(descend(space, bowls, [half_of(space, bowls)], 200, slack=0.01, regular=0.0))[-1][1]  # type: ignore[arg-type]
    assert np.abs(found - wanted)[space.present].max() < 0.02


def test_how_many_lambdas_there_are() -> None:
    assert [space_of(2, by).size for by in ("task", "kind", "layer", "matrix")] == [2, 4, 6, 12]


# --- the objective -------------------------------------------------------------------------------------------------

SHARES = st.lists(st.floats(-0.5, 3.0), min_size=1, max_size=8)


@given(shares=SHARES, allowed=st.floats(-0.5, 3.0))
@settings(deadline=None)
def test_urgency_is_the_derivative_of_the_objective(shares: list[float], allowed: float) -> None:
    lost, most = np.array(shares), np.full(len(shares), allowed)
    for task, urge in enumerate(urgency(lost, most)):
        step = np.zeros(len(shares))
        step[task] = 1e-6
        slope = (objective(lost + step, most) - objective(lost - step, most)) / 2e-6
        assert urge == pytest.approx(slope, rel=1e-3, abs=1e-3)
        assert urge >= 1  # nobody's loss is ever worth raising


def test_the_worst_task_and_the_one_beyond_the_fence_are_urgent() -> None:
    urges = urgency(np.array([0.3, 0.1, 0.0]), np.array([0.4, 0.4, -0.1]))
    assert urges == pytest.approx([1 + 3, 1, 1 + 30], abs=1e-2)


# --- descent -------------------------------------------------------------------------------------------------------


def test_descent_finds_the_bottom() -> None:
    """Of two tasks that want the same: another lambda in each matrix."""
    space = space_of(2)
    wanted = np.random.default_rng(0).uniform(0.5, 1.3, (2, len(MODULES)))
    bowls = Bowls(np.array([wanted, wanted]), np.ones((2, 2, len(MODULES))))
    found = walked(descend(space, bowls, [half_of(space, bowls)], 200, slack=0.01, regular=0.0))  # type: ignore[arg-type]
    assert np.abs(found[-1][1] - wanted).max() < 0.01
    assert np.array_equal(found[-1][1], np.round(found[-1][1], PLACES))


def test_points_on_the_way_are_few_and_end_with_the_last() -> None:
    space = space_of(1, "task")
    bowls = Bowls(np.full((1, 1, 6), 0.2), np.ones((1, 1, 6)))
    for steps, wanted in ((1, [1]), (3, [1, 2, 3]), (32, [*range(4, 33, 4)]), (35, [*range(4, 33, 4), 35])):
        found = walked(descend(space, bowls, [half_of(space, bowls)], steps, 0.01, 0.5))  # type: ignore[arg-type]
        assert [step for step, _ in found] == wanted and len(wanted) <= POINTS + 1


def test_a_task_is_not_pushed_over_the_fence_for_another() -> None:
    """The first task wants all lambdas lower; the second is at its best at the start, and loses fast."""
    space = space_of(2, "task")
    bottoms, steep = np.ones((2, 2, 6)), np.ones((2, 2, 6)) / 12
    bottoms[0] = 0.5
    bowls = Bowls(bottoms, steep)
    half = half_of(space, bowls)
    for slack in (0.0, 0.01, 0.1):
        last = walked(descend(space, bowls, [half], 100, slack, 0.5))[-1][1]  # type: ignore[arg-type]
        assert bowls.loss(1, last) < slack + 0.01, slack
        assert bowls.loss(0, last) < bowls.loss(0, space.start) - 0.7 * min(slack, 0.05), slack


def test_lambdas_of_a_task_are_held_together_and_weak_ones_do_not_stray() -> None:
    """One matrix matters, the slopes of the others are noise."""
    space = space_of(1)
    steep = np.full((1, 1, 6), 1e-3)
    steep[..., 0] = 1.0
    bottoms = np.ones((1, 1, 6))
    bottoms[..., 0] = 0.4

    def last(regular: float) -> Array:
        bowls = Bowls(bottoms, steep, wobble=0.02)
        return walked(descend(space, bowls, [half_of(space, bowls)], 32, 0.01, regular))[-1][1][0]  # type: ignore[arg-type]

    free, held, tight, tied = map(last, (0.0, 0.5, 10.0, 1e300))
    assert free[0] < 0.6
    assert free[1:].std() < 0.1  # Adam alone would walk each of them as far as the first
    assert tied.std() < 1.5 * tight.std() and tight.std() < held.std() < free.std()


def test_a_start_far_off_and_a_task_without_some_matrices() -> None:
    names = {"math": dict.fromkeys(MODULES, 8), "code": dict.fromkeys(MODULES[:3], 8)}
    space = Space.of(names, {"math": TaskWeight(-0.5), "code": TaskWeight(0.0)}, "matrix")
    bowls = Bowls(np.full((2, 2, 6), 0.5), np.ones((2, 2, 6)) * space.present)
    last = walked(descend(space, bowls, [half_of(space, bowls)], 150, 0.01, 0.5))[-1][1]  # type: ignore[arg-type]
    assert np.abs(last[space.present] - 0.5).max() < 0.1
    assert space.weights(last)["code"].at(MODULES[0]) == last[1, 0]


# --- search --------------------------------------------------------------------------------------------------------


def searched(trials: int, seed: int = 0) -> tuple[list[tuple[int, Array]], Bowls]:
    space = space_of(2, "task")
    wanted = np.broadcast_to(np.array([[0.3], [1.3]]), (2, 6))
    bowls = Bowls(np.array([wanted, wanted]), np.full((2, 2, 6), 1 / 6))
    half = half_of(space, bowls)
    return walked(search(space, bowls, half, trials, 0.01, seed)), bowls  # type: ignore[arg-type]


def test_search_finds_the_bottom_and_hands_the_best_over_first() -> None:
    found, bowls = searched(16)
    losses = [max(bowls.loss(task, lambdas) for task in (0, 1)) for _, lambdas in found]
    assert losses[0] < 0.02 and losses[0] == min(losses)
    assert len(found) == POINTS
    assert np.array_equal(bowls.seen[0], np.ones((2, 6)))  # the start is a trial, which whoever asks has judged
    assert all(step > 0 for step, _ in found)


def test_search_is_the_same_for_a_seed() -> None:
    once, again, other = searched(12)[0], searched(12)[0], searched(12, seed=1)[0]
    assert [step for step, _ in once] == [step for step, _ in again]
    assert all(np.array_equal(one, two) for (_, one), (_, two) in zip(once, again, strict=True))
    assert any(not np.array_equal(one, two) for (_, one), (_, two) in zip(once, other, strict=True))


def test_trials_without_a_finite_loss_are_passed_over() -> None:
    space = space_of(1, "task")
    bowls = Bowls(np.full((1, 1, 6), 0.5), np.full((1, 1, 6), 1 / 6))
    half = half_of(space, bowls)
    plain = bowls.loss
    bowls.loss = lambda task, lambdas: np.nan if lambdas[0, 0] > 0.7 else plain(task, lambdas)  # type: ignore[method-assign]
    found = walked(search(space, bowls, half, 12, 0.01, 0))  # type: ignore[arg-type]
    assert found and all(lambdas[0, 0] <= 0.7 for _, lambdas in found)


@pytest.mark.parametrize("missing", ["optuna", "scipy"])
def test_search_says_what_is_missing(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    refused(walks.require_optuna, UsageError, f"method search needs {missing}", 'pip install "multisbora[search]"')
