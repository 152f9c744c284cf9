"""allocate: all or none, disjoint, seeded, the same again."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import draw_moments
from hypothesis import given, settings
from hypothesis import strategies as st

from multisbora.allocator import Allocation, allocate
from multisbora.errors import AllocationError, DataError, GeometryError, MultisboraError, RegistryError, UsageError
from multisbora.geometry import Geometry, Matrix, from_card
from multisbora.moments import Moments
from multisbora.registry import Registry
from multisbora.registry.audit import check
from multisbora.registry.claims import TaskClaims

SHAPES = {"q_proj": (24, 32), "k_proj": (8, 32), "down_proj": (32, 48)}
ROOT = Path(__file__).resolve().parents[1]


def tiny(layers: int = 2, model: str = "tiny") -> Geometry:
    return Geometry(
        model,
        "llama",
        tuple(
            Matrix(f"model.layers.{layer}.{name}", f"model.layers.{layer}.{name}.weight", *shape)
            for layer in range(layers)
            for name, shape in SHAPES.items()
        ),
    )


GEOMETRY = tiny()


@pytest.fixture
def registry() -> Iterator[Registry]:
    with Registry.open("sqlite://") as opened:
        yield opened


def give(registry: Registry, *tasks: str, **options: Any) -> Allocation:
    return allocate(registry, GEOMETRY, tasks, **({"rank": 4, "target_modules": "all-linear"} | options))


def assert_disjoint(claims: dict[str, TaskClaims]) -> None:
    for one, other in combinations(claims.values(), 2):
        for module in one.regions.keys() & other.regions.keys():
            assert not one.regions[module].meets(other.regions[module]), (one.task, other.task, module)


def test_tasks_get_disjoint_regions_of_their_rank(registry: Registry) -> None:
    found = give(registry, "a", "b", "c")
    assert list(found.tasks) == ["a", "b", "c"]
    assert_disjoint(found.tasks)
    for claims in found.tasks.values():
        assert (claims.model, claims.composition, claims.rank) == ("tiny", "default", 4)
        assert list(claims.regions) == [matrix.module for matrix in GEOMETRY.matrices]
        for matrix in GEOMETRY.matrices:
            region = claims.regions[matrix.module]
            assert region.rank == 4 and region.excluded == ()
            region.check(matrix.shape, matrix.module)
    assert registry.claims("tiny") == found.tasks


def test_the_json_is_the_designs(registry: Registry) -> None:
    found = give(registry, "a", target_modules=["k_proj"])
    regions = {
        f"model.layers.{layer}.k_proj": list(found.tasks["a"].regions[f"model.layers.{layer}.k_proj"].indices)
        for layer in range(2)
    }
    tightest = {"module": "model.layers.0.k_proj", "axis": "columns", "size": 32, "free": 28, "protected": 0}
    assert found.to_json() == {
        "composition": "default",
        "tasks": {"a": {"variant": "fa", "rank": 4, "regions": regions}},
        "compositions": {
            "default": {
                "tasks": ["a"],
                "more_tasks": 7,
                "line": "7 more tasks like these fit: model.layers.0.k_proj decides: 4 of its 32 columns are held by "
                "task a; 28 are free",
                "tightest": {**tightest, "crossed": False, "holders": {"a": 4}},
            }
        },
        "moved": [],
    }
    assert all(indices == sorted(indices) for indices in regions.values())


def test_again_gives_the_same_and_writes_nothing(registry: Registry) -> None:
    first = give(registry, "a", "b")
    events = registry.events()
    assert give(registry, "a", "b") == first
    assert give(registry, "b", seed=9).tasks["b"] == first.tasks["b"]
    assert registry.events() == events
    both = give(registry, "c", "a")  # new and old together
    assert both.tasks["a"] == first.tasks["a"] and list(registry.claims("tiny")) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("options", "now"),
    [
        ({"rank": 2}, r"fa rank 2 on 6"),
        ({"variant": "fb"}, r"fb rank 4 on 6"),
        ({"target_modules": ["q_proj"]}, r"fa rank 4 on 2"),
        ({"rank_pattern": {"q_proj": 2}}, r"fa rank 4 on 6"),
    ],
)
def test_other_parameters_are_refused(registry: Registry, options: dict[str, Any], now: str) -> None:
    first = give(registry, "a")
    with pytest.raises(AllocationError, match=rf"'a' already holds fa rank 4 on 6 matrices .*{now}.*release --task a"):
        give(registry, "new", "a", **options)
    assert registry.claims("tiny") == first.tasks
    registry.release("tiny", "a")
    assert give(registry, "a", **options).tasks["a"] != first.tasks["a"]


def test_the_draw_is_fixed() -> None:
    """A golden: any change here would give people with the same seed other regions than their colleagues have."""
    drawn = []
    for _ in range(2):
        with Registry.open("sqlite://") as registry:
            drawn.append(give(registry, "math").tasks["math"])
    assert drawn[0] == drawn[1]
    assert drawn[0].regions["model.layers.0.k_proj"].indices == (10, 14, 19, 22)
    assert drawn[0].regions["model.layers.1.down_proj"].indices == (16, 18, 29, 41)


def test_the_draw_depends_on_what_it_should(registry: Registry) -> None:
    base = give(registry, "a", dry_run=True).tasks["a"].regions
    module = "model.layers.1.down_proj"
    assert give(registry, "a", dry_run=True, seed=1).tasks["a"].regions[module] != base[module]
    # One order of the channels for all tasks and compositions: so those that never meet share blocks.
    assert give(registry, "b", dry_run=True, composition="x").tasks["b"].regions[module] == base[module]
    other = allocate(registry, tiny(3), ["a"], rank=4, target_modules="all-linear", dry_run=True)
    assert other.tasks["a"].regions[module] != base[module]
    # Other matrices do not matter: not which, and not whether.
    for targets in (["down_proj"], ["k_proj", "down_proj"], r".*\.1\.down_proj"):
        assert give(registry, "a", dry_run=True, target_modules=targets).tasks["a"].regions[module] == base[module]


def test_every_index_is_as_likely(registry: Registry) -> None:
    names = [f"h.{layer}.q_proj" for layer in range(600)]
    geometry = Geometry("deep", "llama", tuple(Matrix(name, f"{name}.weight", 4, 12) for name in names))
    found = allocate(registry, geometry, ["a"], rank=3, target_modules="all-linear").tasks["a"]
    counts = Counter(index for region in found.regions.values() for index in region.indices)
    assert sum(counts.values()) == 1800 and set(counts) == set(range(12))
    # 150 expected, standard deviation 10.6: 5 of them either way.
    assert all(97 <= count <= 203 for count in counts.values())


def test_a_matrix_can_be_filled_to_the_last_index(registry: Registry) -> None:
    found = give(registry, *"abcdefgh")
    for layer in range(2):
        q = [found.tasks[task].regions[f"model.layers.{layer}.q_proj"].indices for task in "abcdefgh"]
        assert sorted(index for indices in q for index in indices) == list(range(32))
    with pytest.raises(
        AllocationError,
        match=r"q_proj has 32 columns to give, and 9 tasks that all meet each other need 36 .*or use another compos",
    ):
        give(registry, "i", target_modules=["q_proj"])
    give(registry, "i", composition="other")
    give(registry, "j", target_modules=["down_proj"])


def test_running_out_takes_back_the_whole_call(registry: Registry) -> None:
    give(registry, "a")
    before = registry.events()
    with pytest.raises(
        AllocationError,
        match=r"k_proj has 8 rows to give, and 3 tasks that all meet each other need 12 \(b 4, c 4, d 4\): .*use fa",
    ):
        give(registry, "b", "c", "d", variant="fb")
    assert list(registry.claims("tiny")) == ["a"] and registry.events() == before
    with pytest.raises(UsageError):
        give(registry, "b", "../c")
    assert list(registry.claims("tiny")) == ["a"]


def test_the_message_of_the_paper_model(registry: Registry) -> None:
    geometry = from_card("SmolLM2-135M")
    allocate(registry, geometry, ["big"], rank=540, target_modules=["q_proj"])
    with pytest.raises(
        AllocationError,
        match=r"q_proj has 576 columns to give, and 2 tasks that all meet each other need 604 \(big 540, math 64\): "
        "lower the rank, use fb, or another composition",
    ):
        allocate(registry, geometry, ["math"], rank=64, target_modules=["q_proj"])


def test_dry_run_writes_nothing_and_says_the_same(registry: Registry) -> None:
    dry = give(registry, "a", "b", dry_run=True)
    assert registry.models() == {} and registry.events() == [] and registry.claims("tiny") == {}
    assert give(registry, "a", "b") == dry


@pytest.mark.parametrize("rank", [0, -1, True, 2.5, "4", None])
def test_a_rank_that_is_none(registry: Registry, rank: Any) -> None:
    with pytest.raises(UsageError, match="rank must be a whole number above 0"):
        give(registry, "a", rank=rank)
    with pytest.raises(UsageError, match="rank_pattern 'q_proj' must be a whole number above 0"):
        give(registry, "a", rank_pattern={"q_proj": rank})


def test_a_rank_above_the_axis(registry: Registry) -> None:
    with pytest.raises(UsageError, match=r"rank 33 is above the 32 columns of model\.layers\.0\.k_proj"):
        give(registry, "a", rank=33)
    with pytest.raises(UsageError, match=r"rank 9 is above the 8 rows of model\.layers\.0\.k_proj"):
        give(registry, "a", rank=9, variant="fb")
    found = give(registry, "a", rank=9, variant="fb", rank_pattern={"k_proj": 8})
    assert found.tasks["a"].regions["model.layers.0.k_proj"].indices == tuple(range(8))


def test_rank_pattern(registry: Registry) -> None:
    found = give(registry, "a", rank_pattern={r"layers\.1\.q_proj": 7, "q_proj": 2}).tasks["a"]
    assert {module: region.rank for module, region in found.regions.items()} == {
        "model.layers.0.q_proj": 2,
        "model.layers.1.q_proj": 7,
        **{f"model.layers.{layer}.{name}": 4 for layer in range(2) for name in ("k_proj", "down_proj")},
    }


@pytest.mark.parametrize(
    ("tasks", "options"),
    [
        ([], {}),
        (["a", "a"], {}),
        (["a", ""], {}),
        (["a"], {"composition": "../x"}),
        (["a"], {"variant": "fc"}),
        (["a"], {"target_modules": ["c_attn"]}),
    ],
)
def test_wrong_usage_writes_nothing(registry: Registry, tasks: list[str], options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        give(registry, *tasks, **options)
    assert registry.models() == {}


def test_another_geometry_under_the_same_name(registry: Registry) -> None:
    give(registry, "a")
    with pytest.raises(RegistryError, match="model 'tiny' is registered with other matrices"):
        allocate(registry, tiny(3), ["b"], rank=4, target_modules="all-linear")
    allocate(registry, tiny(3, "tiny3"), ["b"], rank=4, target_modules="all-linear")
    assert set(registry.models()) == {"tiny", "tiny3"}


def test_mixed_variants_exclude_what_came_before(registry: Registry) -> None:
    give(registry, "a")
    give(registry, "b", variant="fb", rank=2)
    give(registry, "c")
    claims = registry.claims("tiny")
    assert_disjoint(claims)
    for module in claims["a"].regions:
        a, b, c = (claims[task].regions[module] for task in "abc")
        assert a.excluded == () and b.excluded == a.indices and c.excluded == b.indices
    mixed = claims["b"]
    registry.release("tiny", "a")
    assert registry.task("tiny", "b") == mixed  # what it was trained with does not change


def test_variants_in_one_call(registry: Registry) -> None:
    first = give(registry, "a", "b", variant="fb", rank=2).tasks
    assert all(region.excluded == () for claims in first.values() for region in claims.regions.values())
    later = give(registry, "c").tasks["c"]
    for module, region in later.regions.items():
        assert region.excluded == tuple(sorted(first["a"].regions[module].indices + first["b"].regions[module].indices))


def test_a_task_has_the_same_indices_in_every_composition(registry: Registry) -> None:
    first = give(registry, "a", "b").tasks["a"]
    second = give(registry, "a", composition="second").tasks["a"]
    # One adapter serves both, so what it records of its claims is the same.
    assert second.regions == first.regions and second.digest == first.digest
    assert registry.compositions("tiny") == {"default": ("a", "b"), "second": ("a",)}
    with pytest.raises(AllocationError, match="already holds fa rank 4"):
        give(registry, "a", composition="third", rank=2)


def test_a_conflict_between_compositions_names_task_and_matrix(registry: Registry) -> None:
    give(registry, *"abcdefgh", target_modules=["q_proj"])
    give(registry, "x", "new", composition="second", target_modules=["q_proj"])
    with pytest.raises(
        AllocationError,
        match=r"'x' cannot join composition 'default' .* task '[a-h]' there owns the same cells in 2 matrices \(mod",
    ):
        give(registry, "x", target_modules=["q_proj"])
    assert registry.compositions("tiny")["second"] == ("x", "new")
    assert "x" not in registry.claims("tiny")


def test_reuse_across_a_crossing(registry: Registry) -> None:
    give(registry, "cols")
    crossed = give(registry, "rows", variant="fb", rank=2).tasks["rows"]
    # The mask goes along, so that one adapter fits both.
    assert give(registry, "rows", variant="fb", rank=2, composition="alone").tasks["rows"].regions == crossed.regions
    give(registry, "free", variant="fb", rank=2, composition="third")
    give(registry, "more", composition="third")
    with pytest.raises(
        AllocationError,
        match=r"'free' cannot join .*'default' .*task 'cols' there crosses it, and neither yields, in 6 mat",
    ):
        give(registry, "free", variant="fb", rank=2)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("abcdef"),
            st.sampled_from(["fa", "fb"]),
            st.integers(1, 6),
            st.sampled_from(["one", "two"]),
            st.sampled_from([["q_proj"], ["k_proj", "down_proj"], "all-linear"]),
            st.booleans(),
        ),
        max_size=12,
    )
)
def test_any_history_leaves_every_composition_disjoint(steps: list[tuple[Any, ...]]) -> None:
    with Registry.open("sqlite://") as registry:
        for task, variant, rank, composition, targets, release in steps:
            before = registry.claims("tiny", composition)
            try:
                if release:
                    registry.release("tiny", task, composition)
                else:
                    give(registry, task, variant=variant, rank=rank, composition=composition, target_modules=targets)
            except MultisboraError:
                assert registry.claims("tiny", composition) == before
        everything = {name: registry.claims("tiny", name) for name in ("one", "two")}
        for claims in everything.values():
            assert_disjoint(claims)
        for task in everything["one"].keys() & everything["two"].keys():
            assert everything["one"][task].regions == everything["two"][task].regions


WORKER = """
import sys
from multisbora.allocator import Allocation, allocate
from multisbora.errors import AllocationError
from multisbora.geometry import from_card
from multisbora.registry import Registry
url, card, own = sys.argv[1:]
with Registry.open(url) as registry:
    for task in (own + "0", own + "1", "shared", own + "2"):
        found = allocate(registry, from_card(card), [task], rank=4, target_modules="all-linear")
        print(task, found.tasks[task].digest)
    try:
        allocate(registry, from_card(card), [own + "3", own + "4"], rank=40, target_modules="all-linear")
    except AllocationError as error:
        assert "that all meet each other need" in str(error)
    else:
        raise SystemExit("two times 40 of 64 columns cannot be")
"""


def test_several_processes_at_once(tmp_path: Path, store_url: str) -> None:
    geometry = Geometry("tiny", "llama", (Matrix("h.0.q_proj", "h.0.q_proj.weight", 8, 64), *tiny().matrices[:2]))
    geometry = Geometry(
        "tiny", "llama", tuple(Matrix(m.module, m.tensor, m.out_features, 64) for m in geometry.matrices)
    )
    card = tmp_path / "tiny.json"
    geometry.write(card)
    command = [sys.executable, "-c", WORKER, store_url, str(card)]  # the store is made by whoever comes first
    workers = [
        subprocess.Popen([*command, own], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        for own in "abcd"
    ]
    results = [(*worker.communicate(timeout=120), worker.returncode) for worker in workers]
    assert [code for _, _, code in results] == [0] * len(workers), results
    answers: dict[str, set[str]] = {}
    for output, _, _ in results:
        for line in output.splitlines():
            task, digest = line.split()
            answers.setdefault(task, set()).add(digest)
    with Registry.open(store_url) as registry:
        claims = registry.claims("tiny")
    assert set(claims) == {"shared"} | {own + number for own in "abcd" for number in "012"}
    assert {task: {claims[task].digest} for task in answers} == answers
    assert_disjoint(claims)


def allocate_all(registry: Registry, compositions: dict[str, list[str]], **options: Any) -> Allocation:
    options = {"rank": 4, "target_modules": ["q_proj"], **options}
    return allocate(registry, GEOMETRY, composition=compositions, **options)


def blocks(claims: Iterable[TaskClaims], module: str = "model.layers.0.q_proj") -> set[tuple[int, ...]]:
    return {held.regions[module].indices for held in claims}


def test_tasks_that_never_meet_share_indices(registry: Registry) -> None:
    pairs = {f"c{n}": [f"a{n}", f"b{n}"] for n in range(40)}
    found = allocate_all(registry, pairs)
    assert len(found.tasks) == 80 and len(blocks(found.tasks.values())) == 2
    for a, b in pairs.values():
        assert found.tasks[a].regions != found.tasks[b].regions
    later = allocate_all(registry, {"c0": ["x"], "c1": ["x", "y"]}).tasks
    assert len(blocks([*found.tasks.values(), *later.values()])) == 4
    assert later["x"].regions["model.layers.0.q_proj"].indices not in blocks(found.tasks.values())


def test_sixty_tasks_in_twelve_overlapping_compositions(registry: Registry) -> None:
    """60 x 32 columns are three times what there is. The chain's compositions share tasks, and one of them is full."""
    geometry = from_card("SmolLM2-135M")
    names = [f"t{n:02}" for n in range(60)]
    compositions = {f"c{n:02}": [names[(5 * n + step) % 60] for step in range(15)] for n in range(12)}
    compositions["c00"] += ["t20", "t25", "t30"]
    members = Counter(task for tasks in compositions.values() for task in tasks)
    assert len(members) == 60 and min(members.values()) == 3 and len(compositions["c00"]) == 18
    found = allocate(
        registry, geometry, names, composition=compositions, rank=32, target_modules=["q_proj", "down_proj"]
    )
    assert list(found.tasks) == names and found.composition is None
    for tasks in compositions.values():
        assert_disjoint({task: found.tasks[task] for task in tasks})
    assert len(blocks(found.tasks.values(), "model.layers.0.self_attn.q_proj")) == 18
    assert found.compositions["c00"].more_tasks == 0 and found.compositions["c06"].more_tasks == 3
    assert found.compositions["c00"].reason == (
        "model.layers.0.self_attn.q_proj decides: 576 of its 576 columns are held by 18 tasks that all meet; 0 are free"
    )
    assert found.to_json()["compositions"]["c06"]["tightest"]["free"] == 96
    with pytest.raises(AllocationError, match="19 tasks that all meet each other need 608"):
        allocate(registry, geometry, ["one-more"], composition="c00", rank=32, target_modules=["q_proj"])


def test_a_clique_over_many_compositions_that_provably_cannot_fit(registry: Registry) -> None:
    """Nine tasks that meet in pairs only: no composition has more than two, and 9 x 4 is above 32 columns."""
    pairs = {f"{a}-{b}": [a, b] for a, b in combinations("abcdefghi", 2)}
    with pytest.raises(
        AllocationError,
        match=r"q_proj has 32 columns to give, and 9 tasks that all meet each other need 36 "
        r"\(a 4, b 4, c 4, d 4, e 4, f 4, \.\.\.\)",
    ):
        allocate_all(registry, pairs)
    assert registry.models() == {}
    allocate_all(registry, {name: tasks for name, tasks in pairs.items() if "i" not in tasks})


def test_no_room_without_a_clique_says_so(registry: Registry) -> None:
    """Tasks that came one by one hold different indices though they never meet; who meets them all finds none free."""
    give(registry, *"abcdefgh", target_modules=["q_proj"])
    for task, where in zip("abcdefgh", "stuvwxyz", strict=True):
        give(registry, task, composition=where, target_modules=["q_proj"])
        registry.release("tiny", task, "default")
    with pytest.raises(AllocationError, match="no arrangement was found, though no more than 8 are needed"):
        allocate_all(registry, {where: ["all"] for where in "stuvwxyz"})


def test_untrained_tasks_can_be_given_other_indices(registry: Registry) -> None:
    give(registry, "a", "b", target_modules=["q_proj"])
    before = give(registry, "x", composition="second", target_modules=["q_proj"]).tasks["x"]
    with pytest.raises(AllocationError, match="'x' is not trained yet: run it again with --reallocate"):
        give(registry, "x", target_modules=["q_proj"])
    found = give(registry, "x", target_modules=["q_proj"], reallocate=True)
    assert found.moved == ("x",) and found.tasks["x"].regions != before.regions
    assert registry.compositions("tiny") == {"default": ("a", "b", "x"), "second": ("x",)}
    assert_disjoint(registry.claims("tiny"))
    assert give(registry, "x", target_modules=["q_proj"], reallocate=True).moved == ()


def test_trained_tasks_stay_and_those_in_their_way_move(registry: Registry) -> None:
    give(registry, "a", target_modules=["q_proj"])
    trained = give(registry, "x", composition="second", target_modules=["q_proj"]).tasks["x"]
    registry.mark(trained, "trained")
    with pytest.raises(AllocationError, match="those in its way are not trained yet: run it again with --reallocate"):
        give(registry, "x", target_modules=["q_proj"])
    found = give(registry, "x", target_modules=["q_proj"], reallocate=True)
    assert found.moved == ("a",) and found.tasks["x"].digest == trained.digest
    assert found.tasks["x"].stage == "trained"
    assert_disjoint(registry.claims("tiny"))
    give(registry, "y", composition="third", target_modules=["q_proj"])
    late = registry.task("tiny", "y", "third")
    registry.mark(late, "training")
    before = registry.claims("tiny")
    with pytest.raises(AllocationError, match=r"y, .* are trained or in training"):
        give(registry, "y", target_modules=["q_proj"], reallocate=True)
    assert registry.claims("tiny") == before


def test_moving_keeps_variant_rank_and_targets(registry: Registry) -> None:
    give(registry, "rows", variant="fb", rank=2, composition="one")
    give(registry, "cols", composition="two", target_modules=["q_proj"])
    registry.mark(registry.task("tiny", "cols", "two"), "trained")
    found = give(registry, "cols", composition="one", target_modules=["q_proj"], reallocate=True)
    assert found.moved == ("rows",)
    rows = registry.task("tiny", "rows", "one")
    assert (rows.variant, rows.rank, len(rows.regions)) == ("fb", 2, 6)
    q = "model.layers.0.q_proj"
    assert rows.regions[q].excluded == found.tasks["cols"].regions[q].indices


def test_compositions_that_make_no_sense(registry: Registry) -> None:
    for compositions, tasks, message in [
        ({"c": ["a", "a"]}, (), "composition c names a task twice"),
        ({"../c": ["a"]}, (), "composition name"),
        ({"c": ["a"]}, ("a", "b"), "'b' is in none of the compositions"),
        ({}, (), "no task to allocate for"),
        ({"c": []}, (), "no task to allocate for"),
    ]:
        with pytest.raises(UsageError, match=message):
            allocate(registry, GEOMETRY, tasks, composition=compositions)
    assert registry.models() == {}


def test_protected_channels_are_nobodys(registry: Registry) -> None:
    give(registry, "first", composition="one", dry_run=True)
    give(registry, "first", composition="one", target_modules=["k_proj"])
    q = "model.layers.0.q_proj"
    assert registry.protect(GEOMETRY, columns={q: [3, 1, 2]}) == {"rows": {}, "columns": {q: (1, 2, 3)}}
    assert registry.protect(GEOMETRY, columns={q: [1, 2, 9]})["columns"] == {q: (9,)}
    assert registry.protected("tiny") == {(q, 1): (1, 2, 3, 9)}
    for name in ("one", "two"):
        found = give(registry, *"abcdefg", composition=name, target_modules=["q_proj"])
        assert not any(set(held.regions[q].indices) & {1, 2, 3, 9} for held in found.tasks.values())
        assert found.compositions[name].to_json()["tightest"]["protected"] == 4
        assert found.compositions[name].more_tasks == 0
    with pytest.raises(AllocationError, match=r"q_proj has 28 columns to give \(4 more are protected\), and 8 tasks"):
        give(registry, "h", composition="two", target_modules=["q_proj"])
    rows = give(registry, "rows", variant="fb", rank=2, composition="three", target_modules=["q_proj"]).tasks["rows"]
    assert rows.regions[q].excluded == (1, 2, 3, 9) and rows.regions["model.layers.1.q_proj"].excluded == ()
    assert registry.unprotect("tiny") == 4
    assert registry.protected("tiny") == {} and registry.task("tiny", "rows", "three") == rows
    with pytest.raises(RegistryError, match="nothing to give free"):
        registry.unprotect("tiny")


def test_what_is_owned_cannot_be_protected(registry: Registry) -> None:
    held = give(registry, "a", target_modules=["q_proj"]).tasks["a"].regions["model.layers.0.q_proj"].indices
    free = next(index for index in range(32) if index not in held)
    for axis, index in (("columns", held[0]), ("rows", 0)):  # one of its columns; any row, which its columns cross
        with pytest.raises(
            AllocationError, match=r"held or crossed by a, first a in model\.layers\.0\.q_proj: protect channels before"
        ):
            registry.protect(GEOMETRY, **{axis: {"model.layers.0.q_proj": [index]}})
    for channels, message in [
        ({"model.layers.0.q_proj": [32]}, "has 32 columns, numbered from 0: 32 is none"),
        ({"model.layers.0.q_proj": [True]}, "True is none"),
        ({"nowhere": [1]}, "has no matrix 'nowhere'"),
    ]:
        with pytest.raises((UsageError, GeometryError), match=message):
            registry.protect(GEOMETRY, columns=channels)
    assert registry.protected("tiny") == {}
    assert registry.protect(GEOMETRY, columns={"model.layers.0.q_proj": [free]}, dry_run=True)
    assert registry.protected("tiny") == {}


def test_protected_rows_and_columns_cross(registry: Registry) -> None:
    q = "model.layers.0.q_proj"
    registry.protect(GEOMETRY, columns={q: [5]}, rows={q: [2]})
    columns = give(registry, "columns", target_modules=["q_proj"]).tasks["columns"].regions[q]
    rows = give(registry, "rows", variant="fb", target_modules=["q_proj"]).tasks["rows"].regions[q]
    assert 5 not in columns.indices and columns.excluded == (2,)
    assert 2 not in rows.indices and rows.excluded == tuple(sorted({5, *columns.indices}))


def test_a_task_moved_away_meets_nobody_in_its_other_compositions(registry: Registry) -> None:
    """Nobody asked about those, and one order of channels makes a clash there all but certain."""
    options: dict[str, Any] = {"target_modules": ["q_proj"]}
    give(registry, "bystander", composition="other", **options)
    allocate_all(registry, {"mine": ["away"], "other": ["away"]})
    trained = give(registry, "filler", "rival", composition="apart", **options).tasks["rival"]
    registry.mark(trained, "trained")
    away = registry.task("tiny", "away", "mine")
    assert away.regions == trained.regions  # so it is in the way
    found = give(registry, "rival", composition="mine", reallocate=True, **options)
    assert found.moved == ("away",) and found.tasks["rival"].composition == "mine"
    assert found.tasks["rival"].regions == trained.regions
    assert registry.compositions("tiny") == {
        **{"apart": ("filler", "rival"), "mine": ("rival", "away")},
        "other": ("bystander", "away"),
    }
    for name in registry.compositions("tiny"):
        assert_disjoint(registry.claims("tiny", name))


def test_plain_text_is_one_task(registry: Registry) -> None:
    assert list(allocate_all(registry, {"all": "math"}).tasks) == ["math"]  # type: ignore[dict-item]


def test_protection_under_two_spellings_and_of_a_whole_axis(registry: Registry) -> None:
    found = registry.protect(GEOMETRY, columns={"model.layers.0.q_proj": [1, 2], "layers.0.q_proj": [5]})
    assert found["columns"] == {"model.layers.0.q_proj": (1, 2, 5)}
    registry.protect(GEOMETRY, columns={"model.layers.0.q_proj": range(32)})
    with pytest.raises(AllocationError, match=r"has 0 columns to give \(32 more are protected\), and the task needs 4"):
        give(registry, "a", target_modules=["q_proj"])
    with pytest.raises(AllocationError, match="all of its 32 columns are other tasks' or protected"):
        give(registry, "a", variant="fb", target_modules=["q_proj"])


def measured(tasks: Iterable[str], geometry: Geometry = GEOMETRY) -> dict[str, Moments]:
    """Moments of tasks, each always the same."""
    found = (draw_moments(geometry, task, seed=sum(task.encode()), tokens=48) for task in tasks)
    return {moments.task: moments.without_blocks() for moments in found}


def isolate(registry: Registry, *tasks: str, known: Iterable[str] = (), **options: Any) -> Allocation:
    """Isolated indices, by moments of the tasks themselves and of those that are named."""
    return give(registry, *tasks, **({"strategy": "isolated", "moments": measured({*tasks, *known})} | options))


def heard(claims: dict[str, TaskClaims], known: dict[str, Moments]) -> float:
    """What all others hear of each task, relative to what it says on its own rows, one unit a channel."""
    total = 0.0
    for task, held in claims.items():
        for module, region in held.regions.items():
            sites = {name: moments.sites[module] for name, moments in known.items()}
            loud = {n: site.energy if held.variant == "fa" else site.response for n, site in sites.items()}
            part = {n: (energy / energy.sum())[list(region.indices)] for n, energy in loud.items()}
            total += sum(float((part[n] / part[task]).sum()) for n in claims if n != task)
    return total


@pytest.mark.parametrize("variant", ["fa", "fb"])
def test_isolated_tasks_are_heard_less(registry: Registry, variant: str) -> None:
    ranks = {"rank": 2, "variant": variant, "rank_pattern": {"down_proj": 5}}
    at_random = [give(registry, *"abc", **ranks, seed=seed, dry_run=True).tasks for seed in range(8)]
    found = isolate(registry, *"abc", **ranks).tasks
    known = measured("abc")
    assert heard(found, known) < 0.6 * min(heard(claims, known) for claims in at_random)
    assert_disjoint(found)
    assert registry.claims("tiny") == found
    assert {m: r.rank for m, r in found["a"].regions.items()} == {
        m: r.rank for m, r in at_random[0]["a"].regions.items()
    }


def test_isolated_claims_are_those_of_nobody_elses_order(registry: Registry) -> None:
    """The order in which tasks are named, and moments are given, changes nothing."""
    moments = measured("abc")
    first = isolate(registry, *"abc", moments=moments, dry_run=True).tasks
    turned = dict(reversed(moments.items()))
    second = isolate(registry, *"cba", moments=turned, dry_run=True).tasks
    assert {task: held.regions for task, held in second.items()} == {t: held.regions for t, held in first.items()}


def test_isolated_again_gives_the_same_and_needs_no_moments(registry: Registry) -> None:
    dry = isolate(registry, "a", "b", dry_run=True)
    assert registry.models() == {}
    first = isolate(registry, "a", "b")
    assert first == dry
    events = registry.events()
    assert isolate(registry, "a", "b", moments={}) == first
    assert give(registry, "b", "a").tasks["a"] == first.tasks["a"]
    assert isolate(registry, "a", "b", seed=5, moments=measured("xb")).tasks == first.tasks
    assert registry.events() == events


def test_tasks_that_come_later_are_quiet_on_those_that_are_there(registry: Registry) -> None:
    give(registry, "old", target_modules=["q_proj"])
    before = registry.claims("tiny")
    with pytest.raises(DataError, match="there are none of old: run multisbora measure --tasks old where the rows"):
        isolate(registry, "a", target_modules=["q_proj"])
    with pytest.raises(DataError, match="there are none of a, old: run multisbora measure --tasks a,old"):
        isolate(registry, "a", target_modules=["q_proj"], moments={})
    assert registry.claims("tiny") == before
    moments = measured(["old", "a"])
    found = isolate(registry, "a", target_modules=["q_proj"], moments=moments).tasks["a"]
    for module, region in found.regions.items():
        own, others = (moments[task].sites[module].energy.astype(float) for task in ("a", "old"))
        own, others = own / own.mean(), others / others.mean()
        worth = own / (own + others + 0.01)
        worth[list(before["old"].regions[module].indices)] = -1
        assert set(region.indices) == set(np.argsort(-worth)[:4].tolist())
    assert registry.claims("tiny")["old"] == before["old"]
    elsewhere = isolate(registry, "a", composition="elsewhere", target_modules=["q_proj"], moments={})
    assert elsewhere.tasks["a"].regions == found.regions


def test_room_is_left_for_tasks_that_may_come(registry: Registry) -> None:
    """Who was measured and holds nothing yet counts as met; who holds claims in other compositions alone does not."""
    first = isolate(registry, "a", known="b", dry_run=True).tasks["a"]
    together = isolate(registry, "a", "b", dry_run=True).tasks["a"]
    alone = isolate(registry, "a", dry_run=True).tasks["a"]
    assert first.regions != alone.regions
    shared = [
        len(set(first.regions[module].indices) & set(region.indices)) for module, region in together.regions.items()
    ]
    assert sum(shared) > 20  # of 24: b takes some that both would like
    isolate(registry, "b", composition="elsewhere")
    assert isolate(registry, "a", known="b").tasks["a"].regions == alone.regions


def test_isolated_tasks_that_never_meet_share_indices(registry: Registry) -> None:
    pairs = {f"c{n}": [f"a{n}", f"b{n}"] for n in range(12)}
    moments = measured(name for pair in pairs.values() for name in pair)
    found = allocate_all(registry, pairs, strategy="isolated", moments=moments)
    assert len(found.tasks) == 24 and len(blocks(found.tasks.values())) == 2
    assert found.compositions["c3"].more_tasks == 6
    for a, b in pairs.values():
        assert_disjoint({task: found.tasks[task] for task in (a, b)})


def test_isolated_tasks_fit_wherever_random_ones_do(registry: Registry) -> None:
    """60 tasks in overlapping compositions, of which one is full to the last column, and one more that does not fit."""
    geometry = from_card("SmolLM2-135M")
    names = [f"t{n:02}" for n in range(60)]
    compositions = {f"c{n:02}": [names[(5 * n + step) % 60] for step in range(15)] for n in range(12)}
    compositions["c00"] += ["t20", "t25", "t30"]
    options: dict[str, Any] = {"composition": compositions, "rank": 32, "target_modules": r".*\.0\.self_attn\.q_proj"}
    one = Geometry(geometry.model, "llama", (geometry.find("model.layers.0.self_attn.q_proj"),))
    moments = measured([*names, "one-more"], one)
    found = allocate(registry, one, names, strategy="isolated", moments=moments, **options)
    for tasks in compositions.values():
        assert_disjoint({task: found.tasks[task] for task in tasks})
    assert len(blocks(found.tasks.values(), "model.layers.0.self_attn.q_proj")) == 18
    options |= {"composition": "c00", "strategy": "isolated", "moments": moments}
    with pytest.raises(AllocationError, match="19 tasks that all meet each other need 608"):
        allocate(registry, one, ["one-more"], **options)


def test_isolated_tasks_leave_protected_channels_alone(registry: Registry) -> None:
    q = "model.layers.0.q_proj"
    wanted = isolate(registry, "a", known="b", dry_run=True).tasks["a"].regions[q].indices
    registry.protect(GEOMETRY, columns={q: list(wanted[:3])})
    found = isolate(registry, "a", known="b").tasks["a"].regions[q].indices
    assert not set(found) & set(wanted[:3]) and wanted[3] in found
    give(registry, *"cdefgh", target_modules=["q_proj"])
    with pytest.raises(AllocationError, match="q_proj has 29 columns to give"):
        isolate(registry, "b", known="acdefgh", target_modules=["q_proj"])


def test_isolated_variants_mix(registry: Registry) -> None:
    isolate(registry, "a", known="b")
    isolate(registry, "b", variant="fb", rank=2, known="a")
    claims = registry.claims("tiny")
    assert_disjoint(claims)
    for module, region in claims["b"].regions.items():
        assert region.excluded == claims["a"].regions[module].indices


def test_isolated_tasks_can_be_moved(registry: Registry) -> None:
    """Tasks of both variants get new indices in one call, each on its own axis."""
    isolate(registry, "a", "b", target_modules=["q_proj"])
    isolate(registry, "x", composition="second", known="ab", target_modules=["q_proj"])
    give(registry, "x", composition="third", target_modules=["q_proj"])
    isolate(registry, "y", composition="third", variant="fb", rank=2, known="xab")
    with pytest.raises(AllocationError):
        isolate(registry, "x", known="ab", target_modules=["q_proj"])
    registry.mark(registry.task("tiny", "x", "second"), "trained")
    found = isolate(registry, "x", known="aby", target_modules=["q_proj"], reallocate=True)
    assert set(found.moved) <= {"a", "b"} and found.moved
    assert_disjoint(registry.claims("tiny"))
    assert_disjoint(registry.claims("tiny", "third"))


def test_the_history_says_what_a_choice_rests_on(registry: Registry) -> None:
    give(registry, "old")
    isolate(registry, "a", "b", known=["old", "later"])
    chosen = [event for event in registry.events() if event.action == "choose"]
    assert [event.task for event in chosen] == ["a", "b"]
    assert chosen[0].detail == {
        "strategy": "isolated",
        "rows": 4,
        "tokens": 48,
        "source": "task",
        "others": ["b", "later", "old"],
    }
    registry.rename("tiny", "a", "c")
    assert check(registry).ok


def test_strategies_that_make_no_sense(registry: Registry) -> None:
    with pytest.raises(UsageError, match="strategy 'best' is unknown: use random or isolated"):
        give(registry, "a", strategy="best")
    with pytest.raises(UsageError, match="random indices do not depend on moments"):
        give(registry, "a", moments=measured("a"))
    with pytest.raises(DataError, match="isolated indices of task a need moments, and there are none of a: run multi"):
        give(registry, "a", strategy="isolated")
    with pytest.raises(DataError, match="task a were measured on a model with other matrices than tiny"):
        isolate(registry, "a", moments=measured("a", tiny(3)))
    with pytest.raises(DataError, match=r"task a lack model\.layers\.1\.q_proj: .*leave that matrix out"):
        few = draw_moments(GEOMETRY, "a", target_modules=r".*(0\.q_proj|k_proj|down_proj)")
        isolate(registry, "a", known="b", moments={"a": few, **measured("b")})
    assert registry.models() == {}


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sets(st.sampled_from("abcdef"), min_size=1, max_size=3),
            st.sampled_from(["fa", "fb"]),
            st.integers(1, 6),
            st.sampled_from(["one", "two"]),
            st.sampled_from([["q_proj"], ["k_proj", "down_proj"], "all-linear"]),
            st.sampled_from(["random", "isolated", "release"]),
        ),
        max_size=6,
    )
)
def test_either_strategy_is_refused_where_the_other_is(steps: list[tuple[Any, ...]]) -> None:
    """Whatever came before: room does not depend on how indices are chosen, and every composition stays disjoint."""
    moments = measured("abcdef")
    with Registry.open("sqlite://") as registry:
        for tasks, variant, rank, composition, targets, what in steps:
            options = {"variant": variant, "rank": rank, "composition": composition, "target_modules": targets}
            if what == "release":
                if tasks & registry.claims("tiny", composition).keys():
                    registry.release("tiny", min(tasks & registry.claims("tiny", composition).keys()), composition)
                continue
            outcomes = []
            for strategy, dry_run in (("random", True), ("isolated", True), (what, False)):
                chosen = {"strategy": strategy} | ({"moments": moments} if strategy == "isolated" else {})
                try:
                    give(registry, *sorted(tasks), **options, **chosen, dry_run=dry_run)
                    outcomes.append("")
                except AllocationError as error:
                    outcomes.append(str(error))
            assert len(set(outcomes)) == 1
        for name in ("one", "two"):
            assert_disjoint(registry.claims("tiny", name))
        assert check(registry).ok
