"""Which channels suit a task: scores, the exact assignment, and the command."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
from commands import Run, assert_refused, refused
from hypothesis import given, settings
from hypothesis import strategies as st

from multisbora import isolation
from multisbora.errors import DataError
from multisbora.geometry import Geometry, Matrix
from multisbora.isolation import MASSIVE, STEP, Isolation, Newcomer, assign, massive, score
from multisbora.moments import Moments, Site
from multisbora.project import Project
from multisbora.recipe import load
from multisbora.region import draw
from multisbora.registry import Registry

Q = Matrix("h.0.q_proj", "h.0.q_proj.weight", 6, 40)
GEOMETRY = Geometry("tiny", "llama", (Q,))
NOBODY = np.zeros(40, np.bool_)


def moments(task: str, energy: Any, response: Any = None, geometry: Geometry = GEOMETRY, **changes: Any) -> Moments:
    """Moments with these energies, the same in every matrix."""
    site = Site(
        energy=np.asarray(energy, np.float32),
        response=np.ones(6, np.float32) if response is None else np.asarray(response, np.float32),
        channels=np.zeros(0, np.int32),
        block=np.zeros((0, 0), np.float32),
    )
    sites = {matrix.module: site for matrix in geometry.matrices}
    return replace(Moments(task, "one base", geometry.digest, 8, 64, sites), **changes)


def known(energies: Mapping[str, Any]) -> Isolation:
    return Isolation.of({task: moments(task, energy) for task, energy in energies.items()}, GEOMETRY)


def arrange(found: Isolation, ranks: Mapping[str, int], taken: Any = NOBODY, seed: int = 0) -> dict[str, set[int]]:
    """Channels of tasks that all meet each other, and everybody who was measured."""
    free, newcomers = taken.copy(), {}
    for task, rank in ranks.items():
        drawn = draw(40, rank, seed, taken=free)
        free[list(drawn)] = True
        newcomers[task] = Newcomer(drawn, taken, sorted(found.moments.keys() - {task}))
    chosen = found.arrange(Q, 1, newcomers, (seed,))
    assert all(list(indices) == sorted(set(indices)) for indices in chosen.values())
    assert {task: len(indices) for task, indices in chosen.items()} == dict(ranks)
    return {task: set(indices) for task, indices in chosen.items()}


def best(scores: np.ndarray, counts: Sequence[int]) -> int | None:
    """What an exact minimum cost flow of networkx comes to, or None where not everybody can have enough."""
    graph = nx.DiGraph()
    for taker, count in enumerate(counts):
        graph.add_edge("source", taker, capacity=int(count), weight=0)
        for column in np.flatnonzero(np.isfinite(scores[taker])).tolist():
            graph.add_edge(taker, f"column {column}", capacity=1, weight=-int(scores[taker, column]))
            graph.add_edge(f"column {column}", "sink", capacity=1, weight=0)
    if "sink" not in graph:
        return None
    flow = nx.max_flow_min_cost(graph, "source", "sink")
    return None if sum(flow["source"].values()) < sum(counts) else -nx.cost_of_flow(graph, flow)


@st.composite
def instances(draw: st.DrawFn) -> tuple[np.ndarray, list[int]]:
    """Scores of few different values have many ties; some columns are forbidden to some takers."""
    takers, columns = draw(st.integers(1, 5)), draw(st.integers(1, 16))
    counts = draw(st.lists(st.integers(1, 5), min_size=takers, max_size=takers))
    highest = draw(st.sampled_from([0, 1, 3, 50, 10**6]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    scores = generator.integers(-highest, highest + 1, (takers, columns)).astype(float)
    scores[generator.random(scores.shape) < draw(st.sampled_from([0, 0.2, 0.6]))] = -np.inf
    return scores, counts


def assert_best(scores: np.ndarray, counts: Sequence[int]) -> None:
    reference = best(scores, counts)
    if reference is None:
        with pytest.raises(ValueError, match=r"fewer columns than|more columns than"):
            assign(scores, counts)
        return
    owners = assign(scores, counts)
    held = np.flatnonzero(owners >= 0)
    assert np.bincount(owners[held], minlength=len(counts)).tolist() == list(counts)
    assert scores[owners[held], held].sum() == reference
    assert (assign(scores, counts) == owners).all()


@settings(max_examples=300, deadline=None)
@given(instances())
def test_no_assignment_is_better(instance: tuple[np.ndarray, list[int]]) -> None:
    assert_best(*instance)


@settings(max_examples=150, deadline=None)
@given(instances(), st.lists(st.integers(-60, 60), min_size=5, max_size=5))
def test_whatever_the_prices_are_the_rest_is_done_exactly(
    instance: tuple[np.ndarray, list[int]], prices: list[int]
) -> None:
    """Too high and little is placed by them, too low and nothing is: the chains must do it all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(isolation, "_prices", lambda scores, wanted: np.array(prices[: len(wanted)], float))
        assert_best(*instance)


def test_a_contested_matrix_of_a_real_size() -> None:
    """Eight tasks like each other share all but a few columns, where prices alone do not get to the end."""
    generator = np.random.default_rng(0)
    energies = np.exp(generator.normal(0, 1.5, 192) + generator.normal(0, 0.3, (8, 192)))
    shares = energies / energies.mean(axis=1, keepdims=True)
    scores = np.stack([score(own, shares.sum(axis=0) - own) for own in shares])
    assert_best(scores, [22] * 8)


def test_of_equally_good_columns_the_first_are_taken() -> None:
    assert assign(np.zeros((1, 9)), [3]).tolist() == [0, 0, 0, -1, -1, -1, -1, -1, -1]
    assert assign(np.array([[1.0, 5, 1, 1, 5, 1]]), [4]).tolist() == [0, 0, 0, -1, 0, -1]
    assert assign(np.zeros((1, 4)), [2], np.array([3, 0, 2, 1])).tolist() == [-1, 0, -1, 0]
    assert sorted(np.flatnonzero(assign(np.zeros((2, 4)), [1, 1], np.array([3, 0, 2, 1])) >= 0)) == [1, 3]
    several = assign(np.zeros((3, 9)), [2, 2, 2])
    assert (several[:6] >= 0).all() and (several[6:] == -1).all()


def test_scores_are_the_tasks_part_of_what_passes() -> None:
    own = np.array([1.0, 1, 1, 1, 0.01, 0, 4])
    others = np.array([0.0, 1, 3, 1e30, 0, 0, 4])
    found = score(own, others) * STEP
    part = own / (own + others + isolation.QUIET)
    expected = np.maximum(np.log(part, where=part > 0, out=np.full(7, -np.inf)), -20)
    assert np.abs(found - expected).max() <= STEP / 2
    assert found[4] == pytest.approx(np.log(0.5), abs=STEP)  # where it hardly speaks itself, silence is not enough
    assert found[5] == found[3] == -20
    assert (score(own, others) == np.rint(score(own, others))).all()


def test_massive_channels_are_those_of_everybody() -> None:
    ordinary = np.ones(20)
    one, other = ordinary.copy(), ordinary.copy()
    one[[3, 7]] = MASSIVE + 1
    other[[7, 9]] = MASSIVE + 1
    assert np.flatnonzero(massive(np.stack([one, other]))).tolist() == [7]
    assert np.flatnonzero(massive(np.stack([one, other, 0 * one]))).tolist() == [7]  # whoever is silent has no say
    other[7] = MASSIVE
    assert not massive(np.stack([one, other])).any()
    sparse = np.zeros(20)
    sparse[:3] = 1  # most channels are dead: the others are no outliers for that
    assert not massive(sparse[None]).any()
    assert not massive(0 * sparse[None]).any()


def test_each_task_gets_its_own_loud_channels() -> None:
    energies = {"a": np.ones(40), "b": np.ones(40)}
    energies["a"][[1, 5, 30]] = 20
    energies["b"][[2, 5, 31]] = 20
    found = arrange(known(energies), {"a": 2, "b": 2})
    assert found == {"a": {1, 30}, "b": {2, 31}}  # and 5, which is loud for both, is nobody's


def test_a_single_very_quiet_channel_buys_no_loud_one() -> None:
    """A difference of logarithms would take the first two; the harm of the second is what counts."""
    shares = np.full(40, 1.0), np.full(40, 3.0)
    shares[1][:4] = [1e-9, 2.9, 0.1, 0.1]
    found = arrange(known({"a": shares[0], "b": shares[1]}), {"a": 3})
    assert found["a"] == {0, 2, 3}


def test_the_others_hear_less_than_of_random_channels() -> None:
    """Each task speaks as loudly on its own rows either way: one unit a column."""
    generator = np.random.default_rng(1)
    energies = {task: np.exp(generator.normal(0, 1, 40)) for task in "abc"}
    shares = {task: energy / energy.sum() for task, energy in energies.items()}

    def heard(chosen: Mapping[str, set[int]]) -> float:
        return sum(
            shares[other][list(indices)].dot(1 / shares[task][list(indices)])
            for task, indices in chosen.items()
            for other in shares
            if other != task
        )

    random = [{t: set(np.flatnonzero(generator.permutation(40) < 8)) for t in "abc"} for _ in range(20)]
    assert heard(arrange(known(energies), dict.fromkeys("abc", 8))) < min(map(heard, random)) / 2


def test_massive_channels_go_to_nobody_before_all_others_are_used_up() -> None:
    generator = np.random.default_rng(2)
    energies = {task: np.exp(generator.normal(0, 0.3, 40)) for task in "ab"}
    for energy in energies.values():
        energy[[4, 8]] = 1000
    energies["a"][[4, 8]] = 9000  # by the score alone they would be the first that a takes
    found = known(energies)
    assert not {4, 8} & set.union(*arrange(found, {"a": 19, "b": 19}).values())
    assert not {4, 8} & arrange(found, {"a": 38})["a"]
    assert len({4, 8} & set.union(*arrange(found, {"a": 20, "b": 19}).values())) == 1
    taken = NOBODY.copy()
    taken[:30] = True
    assert len({4, 8} & arrange(found, {"a": 10}, taken)["a"]) == 0
    alone = known({"a": energies["a"]})
    assert not {4, 8} & arrange(alone, {"a": 38})["a"]


def test_taken_channels_are_left_alone() -> None:
    energies = {"a": np.arange(1.0, 41), "b": np.ones(40)}
    taken = NOBODY.copy()
    taken[20:] = True
    assert arrange(known(energies), {"a": 3}, taken)["a"] == {17, 18, 19}


def test_without_others_it_is_the_seeded_draw() -> None:
    """Nobody to be quiet for: no channel is better than another."""
    alone = known({"a": np.exp(np.random.default_rng(3).normal(0, 1, 40))})
    for seed in range(3):
        assert arrange(alone, {"a": 7}, seed=seed)["a"] == set(draw(40, 7, seed))


def test_tasks_that_never_meet_share_what_the_draw_lets_them_share() -> None:
    """a and b meet c, not each other. What suits both of them is weighed together."""
    energies = {task: np.ones(40) for task in "abc"}
    energies["a"][[0, 1, 2]] = 30, 30, 10
    energies["b"][[1, 2, 3]] = 30, 30, 10
    energies["c"][[6, 7]] = 30
    newcomers = {
        "a": Newcomer([10, 11], NOBODY, ["c"]),
        "b": Newcomer([10, 11], NOBODY, ["c"]),
        "c": Newcomer([12, 13], NOBODY, ["a", "b"]),
    }
    found = known(energies).arrange(Q, 1, newcomers, (0,))
    assert found == {"a": (1, 2), "b": (1, 2), "c": (6, 7)}
    wider = known(energies).arrange(Q, 1, {**newcomers, "b": replace(newcomers["b"], drawn=[10, 11, 14])}, (0,))
    assert set(wider["a"]) < set(wider["b"]) and len(wider["b"]) == 3 and not set(wider["b"]) & set(wider["c"])


def test_rows_are_chosen_by_the_response() -> None:
    found = Isolation.of(
        {
            "a": moments("a", np.ones(40), [1, 1, 9, 1, 1, 1]),
            "b": moments("b", np.ones(40), [1, 1, 1, 1, 9, 1]),
        },
        GEOMETRY,
    )
    nobody = np.zeros(6, np.bool_)
    newcomers = {"a": Newcomer([0], nobody, ["b"]), "b": Newcomer([1], nobody, ["a"])}
    assert found.arrange(Q, 0, newcomers, (0,)) == {"a": (2,), "b": (4,)}


def test_rows_that_never_reach_a_matrix() -> None:
    """An expert that a task's rows never choose gets nothing of them, and any channel is quiet on them."""
    silent = known({"a": np.zeros(40), "b": np.arange(1.0, 41)})
    found = arrange(silent, {"a": 4, "b": 4})
    assert not found["a"] & found["b"]


def test_loudness_of_a_task_as_a_whole_does_not_matter() -> None:
    generator = np.random.default_rng(4)
    energies = {task: np.exp(generator.normal(0, 1, 40)) for task in "abc"}
    ranks = dict.fromkeys("abc", 5)
    louder = energies | {"b": energies["b"] * 1024}
    assert arrange(known(louder), ranks) == arrange(known(energies), ranks)


def test_moments_that_do_not_belong() -> None:
    one, other = moments("a", np.ones(40)), moments("b", np.ones(40))
    refused(
        lambda: Isolation.of({"a": one, "b": replace(other, base_fingerprint="another")}, GEOMETRY),
        DataError,
        "tasks a and b were measured on two base models",
        "multisbora measure --tasks a,b",
    )
    refused(
        lambda: Isolation.of({"a": one, "b": replace(other, geometry_digest="0" * 64)}, GEOMETRY),
        DataError,
        "task b were measured on a model with other matrices than tiny",
    )
    newcomer = {"a": Newcomer([0], NOBODY, ["b"])}
    for sites, words in [
        ({}, "task b lack h.0.q_proj"),
        (moments("b", np.ones(39)).sites, "task b have 39 in place of 40 channels for h.0.q_proj"),
    ]:
        found = Isolation.of({"a": one, "b": replace(other, sites=sites)}, GEOMETRY)
        refused(lambda found=found: found.arrange(Q, 1, newcomer, (0,)), DataError, words, "--tasks b anew")
    refused(lambda: moments("a", [np.nan] * 40), DataError, "moments of task a are damaged", "h.0.q_proj")


def test_names_of_another_spelling_are_the_same_matrices() -> None:
    """A live model may put other parts before a module than the registry does."""
    sites = {f"model.{module}": site for module, site in moments("a", np.arange(1.0, 41)).sites.items()}
    found = Isolation.of({"a": moments("a", np.ones(40), sites=sites), "b": moments("b", np.ones(40))}, GEOMETRY)
    assert found.arrange(Q, 1, {"a": Newcomer([0], NOBODY, ["b"])}, (0,)) == {"a": (39,)}


def test_the_command_measures_what_nobody_measured(project: Any, run: Run) -> None:
    dry = run("allocate", "--tasks", "adding,doubling", "--strategy", "isolated", "--dry-run", "--json")
    assert dry.code == 0, dry.err
    assert not (project / "registry").exists() and "measuring adding, doubling" in dry.err
    done = run("allocate", "--tasks", "adding,doubling", "--strategy", "isolated", "--json")
    assert done.json == dry.json and "measuring adding, doubling at the channels that were given out" in done.err
    plain = Project.load()
    assert plain.strategy == "auto"
    events = run("registry", "history", "--task", "adding", "--json").json
    (chosen,) = [event["detail"] for event in events if event["action"] == "choose"]
    assert chosen["strategy"] == "isolated" and chosen["others"] == ["doubling"] and chosen["rows"] > 0
    again = run("allocate", "--tasks", "doubling,adding", "--strategy", "isolated", "--json")
    assert again.err == "" and again.json["tasks"] == {t: done.json["tasks"][t] for t in ("doubling", "adding")}
    assert run("registry", "check").code == 0
    run("release", "--task", "adding")
    anew = run("allocate", "--tasks", "adding", "--strategy", "isolated", "--json")
    assert "measuring" not in anew.err
    assert anew.json["tasks"]["adding"]["regions"].keys() == done.json["tasks"]["adding"]["regions"].keys()
    run("release", "--task", "adding")
    random = run("allocate", "--tasks", "adding", "--strategy", "random", "--json").json
    assert random["tasks"]["adding"] != anew.json["tasks"]["adding"]


def test_indices_are_chosen_by_moments_where_they_are_there(project: Any, run: Run) -> None:
    """Nobody has to ask for it, and nothing is measured that nobody asked to measure."""
    drawn = run("allocate", "--tasks", "adding,doubling", "--json")
    assert (
        "drawn at random, since there are no moments of adding, doubling" in drawn.err and "measuring" not in drawn.err
    )
    for task in ("adding", "doubling"):
        run("release", "--task", task)
        assert run("measure", "--tasks", task).code == 0
    chosen = run("allocate", "--tasks", "adding,doubling", "--json")
    assert "random" not in chosen.err and chosen.json["tasks"] != drawn.json["tasks"]
    assert chosen.json["tasks"] == run("allocate", "--tasks", "adding,doubling", "--json").json["tasks"]
    dry = run("train", "--task", "adding", "--dry-run")
    assert dry.code == 0 and "isolated from doubling" in dry.err


def test_rows_that_are_elsewhere(project: Any, run: Run) -> None:
    """Until they are measured again, nobody knows what they send through the channels that were given out."""
    assert run("measure", "--tasks", "adding,doubling").code == 0
    assert run("allocate", "--tasks", "doubling").code == 0
    (project / "tasks" / "doubling.yaml").unlink()
    done = run("allocate", "--tasks", "adding")
    assert done.code == 0 and "run multisbora measure --tasks doubling as it was measured before" in done.err
    assert "measuring adding at the channels" in done.err
    dry = run("train", "--task", "adding", "--dry-run")
    assert dry.code == 0 and "not isolated from other tasks: the moments of task doubling lack" in dry.err


@pytest.mark.parametrize("how", ["other rows", "text", "another base"])
def test_what_cannot_be_measured_as_it_was_is_left_to_who_can(
    project: Any, run: Run, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was measured stays."""
    rows = Path(load("doubling", Path("tasks")).train[0].path).read_text().splitlines()
    (tmp_path / "mine.jsonl").write_text("\n".join(rows[:5]))
    (tmp_path / "mine.txt").write_text("one two three four " * 40)
    flags = {
        "other rows": ("--set", f"train={tmp_path / 'mine.jsonl'}"),
        "text": ("--text", f"{tmp_path / 'mine.txt'}"),
    }
    assert run("measure", "--tasks", "adding").code == 0
    if how == "text":
        Path("tasks/doubling.yaml").rename("doubling.yaml")
    assert run("measure", "--tasks", "doubling", *flags.get(how, ())).code == 0
    if how == "text":
        Path("doubling.yaml").rename("tasks/doubling.yaml")
    with Registry.open(Project.load().registry) as registry:
        before = registry.moments("llama", "doubling")
    if how == "another base":
        monkeypatch.setattr("multisbora.allocating.find_here", lambda model: None)
    done = run("allocate", "--tasks", "adding,doubling", "--json")
    assert done.code == 0 and len(done.json["tasks"]) == 2
    more = " --text FILE" if how == "text" else ""
    assert f"run multisbora measure --tasks doubling{more} as it was measured before" in done.err
    with Registry.open(Project.load().registry) as registry:
        after = registry.moments("llama", "doubling")
    assert before is not None and after is not None and before.to_bytes() == after.to_bytes()


def test_measuring_that_was_cut_short_is_made_up_for(project: Any, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("measure", "--tasks", "adding,doubling").code == 0
    with monkeypatch.context() as patch:
        patch.setattr("multisbora.allocating._measure_again", lambda *_: None)  # killed before it
        assert run("allocate", "--tasks", "adding,doubling").code == 0
    assert "not isolated" in run("train", "--task", "adding", "--dry-run").err
    assert "measuring adding, doubling at the channels" in run("allocate", "--tasks", "adding").err
    assert "isolated from doubling" in run("train", "--task", "adding", "--dry-run").err
    assert run("allocate", "--tasks", "adding").err == ""


def test_the_project_can_say_so_once(project: Any, run: Run) -> None:
    file = project / "multisbora.yaml"
    file.write_text(file.read_text() + "strategy: isolated\n")
    assert "measuring adding" in run("allocate", "--tasks", "adding").err
    assert run("plan", "--tasks", "adding,doubling").code == 0
    assert_refused(run("allocate", "--tasks", "adding", "--strategy", "best"), 2, "--strategy", "isolated")
    file.write_text(file.read_text().replace("isolated", "isolate"))
    assert_refused(run("allocate", "--tasks", "adding"), 2, "strategy", "random", "isolated")


def test_random_indices_that_are_kept_are_told(project: Any, run: Run) -> None:
    """Who asks for isolated ones would take them for such."""
    before = run("allocate", "--tasks", "adding", "--json").json["tasks"]["adding"]
    again = run("allocate", "--tasks", "adding", "--strategy", "isolated", "--json")
    assert again.json["tasks"]["adding"] == before and "measuring" not in again.err
    assert "the indices of adding were drawn at random, and stay" in again.err
    both = run("allocate", "--tasks", "adding,doubling", "--strategy", "isolated", "--json")
    assert both.json["tasks"]["adding"] == before and "the indices of adding were drawn" in both.err
    assert run("release", "--task", "adding").code == 0
    assert "random" not in run("allocate", "--tasks", "adding", "--strategy", "isolated").err


def test_a_task_that_is_there_and_cannot_be_measured(project: Any, run: Run) -> None:
    assert run("allocate", "--tasks", "adding").code == 0
    assert run("registry", "rename", "--task", "adding", "--to", "elsewhere").code == 0
    before = run("status", "--json").json
    assert_refused(
        run("allocate", "--tasks", "doubling", "--strategy", "isolated"),
        1,
        "isolated indices of doubling need moments of elsewhere, whose rows are not here",
        "multisbora measure --tasks elsewhere",
    )
    assert run("status", "--json").json == before
    assert_refused(run("allocate", "--tasks", "doubling", "--strategy", "isolated", "--rank", "30"), 1, "need 34")


def test_moments_of_other_weights_are_refused(project: Any, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("measure", "--tasks", "adding,doubling").code == 0
    monkeypatch.setattr("multisbora.allocating.fingerprint", lambda folder, geometry: "blake3:other")
    assert_refused(
        run("allocate", "--tasks", "adding", "--strategy", "isolated"),
        1,
        "the moments of task adding were measured on another base model",
    )
    drawn = run("allocate", "--tasks", "adding")  # at random it does not matter
    assert drawn.code == 0 and "drawn at random, since the moments of these tasks are not all of this base" in drawn.err


def test_damaged_moments_leave_indices_to_chance(project: Any, run: Run) -> None:
    """Unless isolated ones are asked for; and those of tasks that nobody meets stop no allocation."""
    assert run("measure", "--tasks", "adding,doubling").code == 0
    with sqlite3.connect("registry/registry.db") as store:
        store.execute("UPDATE moments SET energy = substr(energy, 5)")
    both = ("allocate", "--tasks", "adding,doubling")
    assert_refused(run(*both, "--strategy", "isolated"), 1, "the moments of task 'adding' do not fit its matrix")
    drawn = run(*both)
    assert (
        drawn.code == 0 and "drawn at random, since the registry is damaged (the moments of task 'adding'" in drawn.err
    )
    assert run("release", "--task", "adding").code == run("release", "--task", "doubling").code == 0
    assert run("measure", "--tasks", "adding").code == 0
    alone = run("allocate", "--tasks", "adding", "--strategy", "isolated")
    assert alone.code == 0 and "no room is left for task doubling" in alone.err


def test_others_that_were_measured_on_other_weights_are_passed_over(
    project: Any, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody who gets indices now meets them, and it may be that their rows are nowhere."""
    with monkeypatch.context() as patch:
        patch.setattr("multisbora.survey.fingerprint", lambda folder, geometry: "blake3:other")
        assert run("measure", "--tasks", "doubling").code == 0
    found = run("allocate", "--tasks", "adding", "--strategy", "isolated")
    assert found.code == 0 and "doubling was measured on another base model" in found.err
    assert_refused(
        run("allocate", "--tasks", "doubling", "--strategy", "isolated"),
        1,
        "the moments of task doubling were measured on another base model",
        "multisbora measure --tasks doubling",
    )
