"""Tasks that meet: known graphs, properties of any graph, and networkx's exact clique as an oracle."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multisbora.conflicts import Colouring, clique, colour, conflict_graph
from multisbora.errors import UsageError

RANK, COLUMNS = 32, 576  # SmolLM2-135M is 576 wide: 18 blocks

tasks = st.integers(0, 15).map(lambda number: f"t{number:02}")
compositions = st.dictionaries(st.sampled_from("abcdefgh"), st.lists(tasks, max_size=7, unique=True), max_size=8)


def ranks(graph: nx.Graph[str], seed: int) -> dict[str, int]:
    generator = random.Random(seed)
    return {task: generator.choice((1, 2, 4, 8)) for task in sorted(graph)}


def twelve_teams() -> dict[str, list[str]]:
    """60 tasks: 3 for everyone and those of 12 teams in a ring. A composition takes three teams: at most 18 tasks."""
    everyone = [f"everyone-{number}" for number in range(3)]
    own = [[f"team{team:02}-{number}" for number in range(4 if team < 3 else 5)] for team in range(12)]
    return {f"release{team:02}": everyone + own[team] + own[team - 1] + own[team - 2] for team in range(12)}


def four_groups() -> dict[str, list[str]]:
    """60 tasks in 12 compositions of at most 10; four groups, 19 tasks, meet pair by pair in six of these."""
    groups = [[f"group{group}-{number}" for number in range(4 if group == 3 else 5)] for group in range(4)]
    pairs = {f"pair{a}{b}": groups[a] + groups[b] for a, b in itertools.combinations(range(4), 2)}
    rest = [f"rest{number:02}" for number in range(41)]
    return pairs | {f"other{number}": rest[number * 7 : number * 7 + 8] for number in range(6)}


def circle(length: int) -> dict[str, list[str]]:
    return {f"c{number}": [f"t{number}", f"t{(number + 1) % length}"] for number in range(length)}


def check(graph: nx.Graph[str], found: Colouring, weights: Mapping[str, int] | None = None) -> None:
    weigh = weights or dict.fromkeys(graph, 1)
    assert sorted(itertools.chain(*found.classes)) == sorted(graph)
    assert all(not graph.has_edge(*pair) for names in found.classes for pair in itertools.combinations(names, 2))
    assert all(list(names) == sorted(names) for names in found.classes)
    assert [len(names) for names in found.classes] == sorted(map(len, found.classes), reverse=True)
    assert found.widths == tuple(max(weigh[task] for task in names) for names in found.classes)
    check_clique(graph, found.clique)
    assert found.bound == sum(weigh[task] for task in found.clique) <= found.width == sum(found.widths)
    assert found.optimal == (found.bound == found.width)


def check_clique(graph: nx.Graph[str], found: Sequence[str]) -> None:
    assert list(found) == sorted(set(found))
    assert all(graph.has_edge(*pair) for pair in itertools.combinations(found, 2))


def shuffled(graph: nx.Graph[str], seed: int) -> nx.Graph[str]:
    generator = random.Random(seed)
    nodes, edges = list(graph), [(*generator.sample((a, b), 2), data) for a, b, data in graph.edges(data=True)]
    generator.shuffle(nodes)
    generator.shuffle(edges)
    other: nx.Graph[str] = nx.Graph()
    other.add_nodes_from(nodes)
    other.add_edges_from(edges)
    return other


def test_an_edge_names_the_compositions_shared_and_a_lonely_task_stays_a_node() -> None:
    graph = conflict_graph({"z": ["b", "a"], "a": {"a", "b", "c"}, "m": ("lonely",), "empty": []})
    assert list(graph) == ["a", "b", "c", "lonely"]
    assert dict(graph.edges) == {
        ("a", "b"): {"compositions": ("a", "z")},
        ("a", "c"): {"compositions": ("a",)},
        ("b", "c"): {"compositions": ("a",)},
    }


@given(compositions)
@settings(deadline=None)
def test_edges_are_the_pairs_that_share_a_composition(drawn: dict[str, list[str]]) -> None:
    graph = conflict_graph(drawn)
    assert set(graph) == set(itertools.chain(*drawn.values()))
    for one, other in itertools.combinations(sorted(graph), 2):
        shared = tuple(sorted(name for name, members in drawn.items() if {one, other} <= set(members)))
        assert graph.get_edge_data(one, other) == ({"compositions": shared} if shared else None)


@pytest.mark.parametrize(
    ("drawn", "classes", "heaviest"),
    [
        ({}, 0, 0),
        ({"a": ["x"], "b": ["y"]}, 1, 1),  # no two meet
        ({"a": [f"t{number}" for number in range(40)]}, 40, 40),  # all meet
        (circle(8), 2, 2),
        ({f"{a}{b}": [f"a{a}", f"b{b}"] for a in range(6) for b in range(6)}, 2, 2),  # two sides, each meets the other
        (circle(7), 3, 2),  # an odd circle: no three meet, and yet two classes do not do
        (circle(5), 3, 2),
    ],
)
def test_known_graphs(drawn: dict[str, list[str]], classes: int, heaviest: int) -> None:
    graph = conflict_graph(drawn)
    found = colour(graph, effort=500)
    check(graph, found)
    assert (found.width, found.bound, found.optimal) == (classes, heaviest, classes == heaviest)


def test_the_search_finds_what_greedy_strategies_miss() -> None:
    drawn = {f"c{j:02}": [f"t{(7 * j + i) % 280:03}" for i in range(18)] for j in range(40)}  # a ring, 280 tasks
    graph = conflict_graph(drawn)
    strategies = ("largest_first", "smallest_last", "DSATUR", "independent_set")
    assert min(max(nx.greedy_color(graph, strategy).values()) + 1 for strategy in strategies) > 18
    found = colour(graph)
    check(graph, found)
    assert (found.width, found.optimal) == (18, True)


@given(compositions, st.booleans(), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_any_colouring_is_sound_and_not_worse_than_greedy(drawn: dict[str, list[str]], equal: bool, seed: int) -> None:
    graph = conflict_graph(drawn)
    weights = None if equal else ranks(graph, seed)
    found = colour(graph, weights=weights, effort=300)
    check(graph, found, weights)
    assert found.width <= colour(graph, weights=weights, effort=0).width
    for strategy in ("largest_first", "smallest_last", "DSATUR") if equal else ():
        assert found.width <= max(nx.greedy_color(graph, strategy).values(), default=-1) + 1


@given(compositions, st.booleans(), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_the_order_of_building_changes_nothing(drawn: dict[str, list[str]], equal: bool, seed: int) -> None:
    graph = conflict_graph(drawn)
    weights = None if equal else ranks(graph, seed)
    other = shuffled(graph, seed)
    assert colour(other, weights=weights, effort=300) == colour(graph, weights=weights, effort=300)
    assert clique(other, weights=weights) == clique(graph, weights=weights)
    reversed_ = conflict_graph({name: drawn[name][::-1] for name in reversed(drawn)})
    assert nx.utils.graphs_equal(reversed_, graph) and list(reversed_.edges) == list(graph.edges)


def test_another_process_with_other_string_hashes_gives_the_same() -> None:
    code = (
        "from multisbora.conflicts import *; import random; r = random.Random(1); t = [f't{i}' for i in range(60)];"
        "print(colour(conflict_graph({str(j): set(r.sample(t, 14)) for j in range(12)}), effort=1_000))"
    )
    command = [sys.executable, "-c", code]
    first, second = (
        subprocess.run(command, env={"PYTHONHASHSEED": seed}, check=True, capture_output=True, text=True).stdout
        for seed in "12"
    )
    assert first == second and "classes=(('t" in first


@given(compositions, st.booleans(), st.integers(0, 99))
@settings(deadline=None)
def test_the_clique_is_as_heavy_as_the_exact_one(drawn: dict[str, list[str]], equal: bool, seed: int) -> None:
    graph = conflict_graph(drawn)
    weights = None if equal else ranks(graph, seed)
    nx.set_node_attributes(graph, weights or dict.fromkeys(graph, 1), "weight")
    found = clique(graph, weights=weights)
    check_clique(graph, found)
    assert sum(graph.nodes[task]["weight"] for task in found) == nx.max_weight_clique(graph)[1]
    for task in graph:
        own = clique(graph, weights=weights, containing=task)
        check_clique(graph, own)
        exact = nx.max_weight_clique(graph.subgraph(graph[task]))[1] + graph.nodes[task]["weight"]
        assert task in own and sum(graph.nodes[name]["weight"] for name in own) == exact


@given(compositions, st.integers(0, 99), st.integers(0, 3))
@settings(deadline=None)
def test_a_search_cut_short_is_never_lighter_than_a_composition(
    drawn: dict[str, list[str]], seed: int, effort: int
) -> None:
    graph = conflict_graph(drawn)
    weights = ranks(graph, seed)
    found = clique(graph, weights=weights, effort=effort)
    check_clique(graph, found)
    best = max((sum(weights[task] for task in members) for members in drawn.values()), default=0)
    assert sum(weights[task] for task in found) >= best


def test_a_composition_whose_edges_were_taken_out_is_no_clique() -> None:
    graph = conflict_graph({"a": ["x", "y", "z"]})
    graph.remove_edge("x", "y")
    assert len(clique(graph)) == 2


def test_weights_make_few_wide_blocks() -> None:
    graph = conflict_graph({"a": ["big1", "small1"], "b": ["big2", "small2"], "c": ["small1", "small2"]})
    weights = {"big1": 64, "big2": 64, "small1": 8, "small2": 8}
    found = colour(graph, weights=weights, effort=500)
    check(graph, found, weights)
    assert found.classes == (("big1", "big2"), ("small1",), ("small2",))
    assert (found.width, found.bound, found.optimal) == (80, 72, False)
    assert len(colour(graph, effort=500).classes) == 2


def test_sixty_tasks_in_twelve_compositions_need_eighteen_blocks() -> None:
    graph = conflict_graph(twelve_teams())
    found = colour(graph)
    check(graph, found)
    assert len(graph) == 60 and len(graph) * RANK > COLUMNS
    assert (found.width, found.optimal) == (COLUMNS // RANK, True)


def test_nineteen_tasks_that_all_meet_cannot_fit_though_no_composition_has_more_than_ten() -> None:
    drawn = four_groups()
    graph = conflict_graph(drawn)
    assert (len(drawn), len(graph), max(map(len, drawn.values()))) == (12, 60, 10)
    found = clique(graph)
    assert found == tuple(task for task in sorted(graph) if task.startswith("group"))
    assert len(found) * RANK > COLUMNS
    assert clique(graph, containing="rest00") == tuple(f"rest{number:02}" for number in range(8))
    assert clique(graph, containing="group3-0") == found
    assert colour(graph).optimal


@pytest.mark.parametrize("weights", [{"a": 1}, {"a": 1, "b": 0}, {"a": 1, "b": 2.5}, {"a": 1, "b": True}])
def test_a_weight_that_means_nothing_is_refused(weights: dict[str, int]) -> None:
    graph = conflict_graph({"c": ["a", "b"]})
    for search in (clique, colour):
        with pytest.raises(UsageError, match=r"task 'b' has weight .*: give each task a whole number above 0"):
            search(graph, weights=weights)


def test_a_task_that_is_nowhere_is_refused() -> None:
    with pytest.raises(UsageError, match="task 'nobody' is in no composition: name one that is"):
        clique(conflict_graph({"c": ["a", "b"]}), containing="nobody")
