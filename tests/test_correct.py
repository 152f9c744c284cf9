"""The corrected merge of one matrix: the least of a stated sum, against dense algebra over all its cells at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from commands import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from multisbora.correct import RIDGE, Wish, channels, check_ridge, correct, spread
from multisbora.delta import delta
from multisbora.errors import MergeError, UsageError
from multisbora.region import Region

SHAPE = (5, 7)


def draw_wishes(
    regions: Mapping[str, Region],
    *,
    shape: tuple[int, int] = SHAPE,
    weights: Mapping[str, float] | None = None,
    seed: int = 0,
    spread: float = 1.0,
    rank: int | None = None,
) -> list[Wish]:
    """Random values and moments.

    Args:
        spread: how many orders of magnitude the channels' energies span, as a standard deviation of their logarithm.
        rank: of the moments; full where None.
    """
    generator = np.random.default_rng(seed)
    known = channels(regions.values(), shape[1])
    wishes = []
    for number, (task, region) in enumerate(regions.items()):
        values = generator.normal(0, 10.0**-number, region.values_shape(shape)).astype(np.float32)
        excluded: Any = list(region.excluded)
        values[(excluded, slice(None)) if region.variant == "fa" else (slice(None), excluded)] = 0
        x = generator.normal(size=(rank or 3 * len(known), len(known))) * generator.lognormal(0, spread, len(known))
        block = (x.T @ x).astype(np.float32)
        weight = (weights or {}).get(task, 1.0)
        wishes.append(Wish(task, region, values, 0.5 + number, weight, block))
    return wishes


def dense(region: Region, values: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Values in a whole matrix, and which cells are the region's; fp64."""
    matrix, owned = np.zeros(shape), np.zeros(shape, bool)
    indices, excluded = list(region.indices), list(region.excluded)
    if region.variant == "fa":
        matrix[:, indices], owned[:, indices] = values, True
        owned[np.ix_(excluded, indices)] = False
    else:
        matrix[indices], owned[indices] = values, True
        owned[np.ix_(indices, excluded)] = False
    return matrix, owned


class Oracle:
    """The sum that a corrected merge makes least, over whole matrices.

    Attributes:
        wanted: what each task asks for, so that it is heard as its lambda says.
    """

    def __init__(self, wishes: Sequence[Wish], shape: tuple[int, int], ridge: float) -> None:
        known = channels((wish.region for wish in wishes), shape[1])
        heard = sorted((wish for wish in wishes if wish.weight), key=lambda wish: wish.task)
        self.trained, self.blocks, self.omegas = [], [], []
        self.owned = np.zeros(shape, bool)
        for wish in heard:
            block = np.zeros((shape[1], shape[1]))
            block[np.ix_(known, known)] = wish.block
            trained, owned = dense(wish.region, wish.values.astype(np.float64) * wish.scaling, shape)
            self.owned |= owned
            self.trained.append(trained)
            self.blocks.append(block)
            energy = np.trace(trained @ block @ trained.T)
            self.omegas.append(1 / energy if energy else 0.0)
        used = channels((wish.region for wish in heard), shape[1])
        total = sum(omega * block for omega, block in zip(self.omegas, self.blocks, strict=True))
        self.rho = ridge * np.trace(total[np.ix_(used, used)]) / len(used)
        self.weights = np.array([wish.weight for wish in heard])
        self.amounts = self._amounts(ridge) if self.rho else self.weights
        self.ask(self.amounts)

    def ask(self, amounts: np.ndarray) -> None:
        self.wanted = [amount * trained for amount, trained in zip(amounts, self.trained, strict=True)]

    def loud(self, matrix: np.ndarray) -> np.ndarray:
        """How loud each task is heard in a matrix, along its own update on its own rows."""
        parts = zip(self.omegas, self.trained, self.blocks, strict=True)
        return np.array([omega * np.trace(matrix @ block @ trained.T) for omega, trained, block in parts])

    def _amounts(self, ridge: float) -> np.ndarray:
        columns = []
        for unit in np.eye(len(self.weights)):
            self.ask(unit)
            columns.append(self.loud(self.solve()))
        left = np.concatenate([np.stack(columns, 1), np.sqrt(ridge) * np.eye(len(columns))])
        right = np.concatenate([self.weights, np.sqrt(ridge) * self.weights])
        return np.linalg.lstsq(left, right, rcond=None)[0]

    def cost(self, matrix: np.ndarray) -> float:
        cost = self.rho * float(((matrix - sum(self.wanted)) ** 2).sum())
        for omega, wanted, block in zip(self.omegas, self.wanted, self.blocks, strict=True):
            cost += omega * float(np.trace((matrix - wanted) @ block @ (matrix - wanted).T))
        return cost

    def solve(self) -> np.ndarray:
        """Its least: one system over all owned cells of the matrix, whatever row they are in."""
        rows, columns = np.nonzero(self.owned)
        same = rows[:, None] == rows[None, :]
        total = sum(omega * block for omega, block in zip(self.omegas, self.blocks, strict=True))
        total = total + self.rho * np.eye(len(total))
        right = self.rho * sum(self.wanted)
        for omega, wanted, block in zip(self.omegas, self.wanted, self.blocks, strict=True):
            right = right + omega * wanted @ block
        matrix = np.zeros(self.owned.shape)
        matrix[rows, columns] = np.linalg.solve(same * total[np.ix_(columns, columns)], right[rows, columns])
        return matrix


def whole(wishes: Sequence[Wish], found: Mapping[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """The matrix that corrected values make."""
    matrix = np.zeros(shape)
    for wish in wishes:
        if wish.task in found:
            assert found[wish.task].dtype == np.float32
            part, owned = dense(wish.region, found[wish.task], shape)
            assert not part[~owned].any()
            matrix += part
    return matrix


CASES: dict[str, dict[str, Region]] = {
    "two of columns": {"a": Region("fa", (0, 3)), "b": Region("fa", (1, 6))},
    "three of columns": {"a": Region("fa", (0,)), "b": Region("fa", (1, 4, 6)), "c": Region("fa", (2, 5))},
    "two of rows": {"a": Region("fb", (0, 3)), "b": Region("fb", (4,))},
    "columns before rows": {"a": Region("fa", (1, 4)), "b": Region("fb", (0, 3), (1, 4))},
    "rows before columns": {"a": Region("fb", (0, 3)), "b": Region("fa", (1, 4), (0, 3))},
    "crossing twice": {
        "a": Region("fa", (0, 2)),
        "b": Region("fb", (1, 3), (0, 2)),
        "c": Region("fa", (4, 5), (1, 3)),
        "d": Region("fb", (2,), (0, 2, 4, 5)),
    },
    "rows beside columns of a task that is not merged": {
        "b": Region("fb", (1, 3), (0, 2)),
        "c": Region("fa", (4, 5), (1, 2, 3)),
    },
}


@pytest.mark.parametrize("ridge", [1e-6, RIDGE, 10.0])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_least_over_all_owned_cells(name: str, ridge: float) -> None:
    wishes = draw_wishes(CASES[name], weights={"b": 0.6, "c": -1.5})
    oracle = Oracle(wishes, SHAPE, ridge)
    expected = oracle.solve()
    solution = correct(wishes, SHAPE, ridge, "x")
    np.testing.assert_allclose([*solution.excess.values()], oracle.amounts - oracle.weights, rtol=1e-4, atol=1e-6)
    found = whole(wishes, solution.values, SHAPE)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6 * np.abs(expected).max())
    assert oracle.cost(found) < oracle.cost(sum(oracle.wanted))
    for sign in (-1, 1):  # and no neighbour is lower
        for cell in np.argwhere(oracle.owned):
            moved = expected.copy()
            moved[tuple(cell)] += sign * 1e-3 * np.abs(expected).max()
            assert oracle.cost(moved) > oracle.cost(expected)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_tasks_in_any_order(data: st.DataObject) -> None:
    """Columns and rows of any tasks; where they cross, the earlier claim keeps the cell."""
    shape = data.draw(st.tuples(st.integers(2, 6), st.integers(2, 8)))
    free = {"fa": list(range(shape[1])), "fb": list(range(shape[0]))}
    regions: dict[str, Region] = {}
    for task in "abcd"[: data.draw(st.integers(1, 4))]:
        variant = data.draw(st.sampled_from(["fa", "fb"]))
        if not free[variant]:
            continue
        own = data.draw(st.sets(st.sampled_from(free[variant]), min_size=1, max_size=3))
        free[variant] = [index for index in free[variant] if index not in own]
        crossing = {i for region in regions.values() if region.variant != variant for i in region.indices}
        regions[task] = Region(variant, tuple(sorted(own)), tuple(sorted(crossing)))
    weights = {task: data.draw(st.sampled_from([1.0, 0.3, -2.0, 0.0])) for task in regions}
    wishes = draw_wishes(regions, shape=shape, weights=weights, seed=data.draw(st.integers(0, 99)), spread=2.0)
    found = correct(wishes, shape, RIDGE, "x").values
    assert found.keys() == {task for task, weight in weights.items() if weight}
    again = correct(data.draw(st.permutations(wishes)), shape, RIDGE, "x").values
    assert all(np.array_equal(found[task], again[task]) for task in found)
    heard = [wish for wish in wishes if wish.weight]
    if len(heard) > 1 and any(wish.values.any() for wish in heard):
        oracle = Oracle(wishes, shape, RIDGE)
        assert oracle.cost(whole(wishes, found, shape)) <= oracle.cost(oracle.solve()) * (1 + 1e-4) + 1e-9
    else:
        for wish in heard:
            assert np.array_equal(found[wish.task], delta(wish.values, wish.scaling, wish.weight))


@pytest.mark.parametrize("name", CASES)
def test_the_values_are_linear_in_the_lambdas(name: str) -> None:
    """Of those that are not 0; who has a say is settled before."""
    silent = sorted(CASES[name])[0] if len(CASES[name]) > 2 else ""
    for weights in ({"b": 0.3, "c": -1.5}, {"a": 2.0, "b": 0.01}):
        weights = weights | ({silent: 0.0} if silent else {})
        wishes = draw_wishes(CASES[name], weights=weights)
        expected = correct(wishes, SHAPE, RIDGE, "x").values
        other = [replace(wish, weight=1.0 if wish.weight else 0.0) for wish in wishes]
        reach = spread(other, SHAPE, RIDGE, "x")
        assert reach.keys() == expected.keys()
        for task, values in expected.items():
            found = sum(wish.weight * reach[wish.task][task] for wish in wishes if wish.weight)
            np.testing.assert_allclose(found, values, rtol=1e-4, atol=1e-5 * np.abs(values).max())


def test_a_lambda_reaches_nobody_where_nothing_is_to_be_solved() -> None:
    (wish,) = draw_wishes({"a": Region("fa", (0, 3))}, weights={"a": 0.7})
    reach = spread([wish], SHAPE, RIDGE, "x")
    assert reach.keys() == reach["a"].keys() == {"a"}
    assert np.array_equal(reach["a"]["a"], delta(wish.values, 0.5))
    silent = [replace(wish, block=np.zeros_like(wish.block)) for wish in draw_wishes(CASES["two of columns"])]
    assert {task: {*found} for task, found in spread(silent, SHAPE, RIDGE, "x").items()} == {"a": {"a"}, "b": {"b"}}


def test_a_task_alone_has_what_the_plain_merge_gives_it() -> None:
    (wish,) = draw_wishes({"a": Region("fa", (0, 3))}, weights={"a": 0.7})
    assert np.array_equal(correct([wish], SHAPE, RIDGE, "x").values["a"], delta(wish.values, 0.5, 0.7))
    wishes = draw_wishes(CASES["three of columns"], weights={"a": 0.0, "c": 0.0})
    assert np.array_equal(correct(wishes, SHAPE, RIDGE, "x").values["b"], delta(wishes[1].values, 1.5))


def test_tasks_without_a_cell_of_their_own_have_nothing_to_correct() -> None:
    """Rows of which somebody else has all columns, and who is not merged."""
    columns = tuple(range(SHAPE[1]))
    regions = {"a": Region("fa", columns), "b": Region("fb", (0,), columns), "c": Region("fb", (1,), columns)}
    solution = correct(draw_wishes(regions, weights={"a": 0.0}), SHAPE, RIDGE, "x")
    assert solution.values.keys() == {"b", "c"}
    assert not any(values.any() for values in solution.values.values())
    assert solution.excess == {"b": 0, "c": 0}


def test_a_task_at_lambda_0_has_no_say() -> None:
    wishes = draw_wishes(CASES["three of columns"], weights={"b": 0.0})
    found = correct(wishes, SHAPE, RIDGE, "x").values
    known, used = (channels((wish.region for wish in some), SHAPE[1]) for some in (wishes, [wishes[0], wishes[2]]))
    inner = np.ix_(*[np.searchsorted(known, used)] * 2)
    without = [replace(wish, block=wish.block[inner]) for wish in (wishes[0], wishes[2])]
    expected = correct(without, SHAPE, RIDGE, "x").values
    assert found.keys() == expected.keys() == {"a", "c"}
    assert all(np.array_equal(found[task], expected[task]) for task in found)


def test_a_large_ridge_is_the_plain_merge() -> None:
    wishes = draw_wishes(CASES["crossing twice"])
    found = correct(wishes, SHAPE, 1e12, "x").values
    for wish in wishes:
        np.testing.assert_allclose(found[wish.task], wish.scaling * wish.values, rtol=1e-6, atol=1e-12)


def test_tasks_that_do_not_meet_keep_what_they_have() -> None:
    """Where nobody's rows reach anybody else's channels, there is nothing to correct."""
    wishes = draw_wishes(CASES["two of columns"])
    apart = []
    for wish, own in zip(wishes, ([0, 2], [1, 3]), strict=True):
        block = np.zeros_like(wish.block)
        block[np.ix_(own, own)] = wish.block[np.ix_(own, own)]
        apart.append(replace(wish, block=block))
    found = correct(apart, SHAPE, RIDGE, "x").values
    for wish in apart:
        np.testing.assert_allclose(found[wish.task], wish.scaling * wish.values, rtol=1e-6)


def test_the_others_rows_are_spared_and_the_own_ones_served() -> None:
    """A channel that is loud on the other's rows is given up where another one of the own can say the same."""
    a, b = Region("fa", (0, 1)), Region("fa", (2,))
    x = np.random.default_rng(0).normal(size=(200, 3))
    x[:, 1] = x[:, 0]  # on a's rows its two channels say the same
    y = np.zeros((200, 3))
    y[:, 1:] = np.random.default_rng(1).normal(size=(200, 2))  # on b's rows its first one is silent
    blocks = [(rows.T @ rows / 200).astype(np.float32) for rows in (x, y)]
    values = np.ones((4, 2), np.float32), np.ones((4, 1), np.float32)
    wishes = [Wish("a", a, values[0], 1.0, 1.0, blocks[0]), Wish("b", b, values[1], 1.0, 1.0, blocks[1])]
    found = correct(wishes, (4, 3), 1e-6, "x").values
    served = x[:, :2] @ found["a"].T
    np.testing.assert_allclose(served, x[:, :2] @ values[0].T, rtol=0.05)
    assert np.abs(found["a"][:, 1]).max() < 0.1 < 1.9 < np.abs(found["a"][:, 0]).min()


def test_moments_that_say_nothing_leave_the_plain_merge() -> None:
    wishes = draw_wishes(CASES["crossing twice"])
    silent = [replace(wish, block=np.zeros_like(wish.block)) for wish in wishes]
    for wish, values in zip(silent, correct(silent, SHAPE, RIDGE, "x").values.values(), strict=True):
        assert np.array_equal(values, delta(wish.values, wish.scaling, wish.weight))


def test_a_task_that_is_silent_on_its_own_rows_has_no_say() -> None:
    wishes = draw_wishes(CASES["two of columns"])
    wishes[1] = replace(wishes[1], values=np.zeros_like(wishes[1].values))
    found = correct(wishes, SHAPE, RIDGE, "x").values
    alone = correct([*wishes[:1], replace(wishes[1], block=np.zeros_like(wishes[1].block))], SHAPE, RIDGE, "x").values
    assert all(np.array_equal(found[task], alone[task]) for task in found)
    np.testing.assert_allclose(found["a"], 0.5 * wishes[0].values, rtol=1e-6)


@pytest.mark.parametrize("rank", [1, 2])
def test_moments_of_few_tokens(rank: int) -> None:
    """Fewer tokens than channels: singular without the ridge, a solution with it."""
    wishes = draw_wishes(CASES["three of columns"], rank=rank)
    oracle = Oracle(wishes, SHAPE, RIDGE)
    found = whole(wishes, correct(wishes, SHAPE, RIDGE, "x").values, SHAPE)
    np.testing.assert_allclose(found, oracle.solve(), rtol=1e-4, atol=1e-5)
    assert np.abs(found).max() < 10 * np.abs(sum(oracle.wanted)).max()


def test_channels_of_very_different_energies() -> None:
    """Massive activations: one channel a hundred million times as loud as the others."""
    wishes = draw_wishes(CASES["three of columns"])
    loud = np.ones(6)
    loud[2] = 1e4
    wishes = [replace(wish, block=(wish.block * loud * loud[:, None]).astype(np.float32)) for wish in wishes]
    oracle = Oracle(wishes, SHAPE, RIDGE)
    expected = oracle.solve()
    found = whole(wishes, correct(wishes, SHAPE, RIDGE, "x").values, SHAPE)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_equations_without_a_solution_are_refused() -> None:
    """Blocks that are none of second moments, and a ridge too small to help."""
    wishes = draw_wishes(CASES["two of columns"])
    odd = np.array([[1, 9], [9, 1]], np.float32)
    wishes = [replace(wish, block=np.kron(np.eye(2, dtype=np.float32), odd)) for wish in wishes]
    wishes[0] = replace(wishes[0], values=np.ones_like(wishes[0].values))
    message = refused(
        lambda: correct(wishes, SHAPE, 1e-9, "m.weight"), MergeError, "m.weight", "1e-09", "raise --ridge"
    )
    assert "--method plain" in message
    assert correct(wishes, SHAPE, 100.0, "m.weight")


def test_overflow_is_refused() -> None:
    wishes = [replace(w, values=100 * w.values, scaling=3e38) for w in draw_wishes(CASES["two of columns"])]
    refused(lambda: correct(wishes, SHAPE, RIDGE, "x"), MergeError, "x has no stable")


@pytest.mark.parametrize("ridge", [0, -1.0, float("nan"), float("inf"), True])
def test_a_ridge_is_a_positive_number(ridge: Any) -> None:
    refused(lambda: check_ridge(ridge), UsageError, "ridge", "0.01")


def test_channels_are_where_cells_are() -> None:
    assert channels([Region("fa", (4, 6)), Region("fa", (0,))], 7).tolist() == [0, 4, 6]
    assert channels([Region("fb", (4,), (1, 2))], 5).tolist() == [0, 3, 4]
    assert channels([Region("fb", (4,), (1, 2)), Region("fa", (2,))], 5).tolist() == [0, 2, 3, 4]
