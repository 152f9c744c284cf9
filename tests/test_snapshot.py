"""A registry as one JSON document: out, in and out again; what does not fit is refused, what is hostile too."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multisbora.allocator import allocate
from multisbora.errors import AllocationError, MultisboraError, RegistryError, UsageError
from multisbora.geometry import Geometry, Matrix
from multisbora.registry import Registry
from multisbora.registry.audit import check
from multisbora.registry.document import content_name, parse
from multisbora.registry.snapshot import Imported, dumps, export, load

GEOMETRY = Geometry(
    "tiny",
    "llama",
    tuple(
        Matrix(f"model.layers.{layer}.{name}", f"model.layers.{layer}.{name}.weight", *shape)
        for layer in range(2)
        for name, shape in {"q_proj": (12, 16), "down_proj": (20, 24)}.items()
    ),
)
OTHER = replace(GEOMETRY, model="other")
Q0, Q1 = "model.layers.0.q_proj", "model.layers.1.q_proj"
MEMORY = "sqlite://"


def give(registry: Registry, *tasks: str, geometry: Geometry = GEOMETRY, **options: Any) -> None:
    allocate(registry, geometry, tasks, **({"rank": 2, "target_modules": ["q_proj"]} | options))


def fill(registry: Registry) -> None:
    """Something of everything: two models, protected, released, renamed, both variants, a task in two compositions."""
    give(registry, "lone", geometry=OTHER)
    give(registry, "z")
    registry.release("tiny", "z")
    registry.protect(GEOMETRY, columns={Q0: [3, 5]})
    give(registry, "a", "gone")
    give(registry, "rows", variant="fb", rank=3)
    give(registry, "a", composition="second")
    give(registry, "b", composition="second", target_modules="all-linear")
    registry.release("tiny", "gone")
    registry.rename("tiny", "b", "bee")
    registry.mark(registry.task("tiny", "a"), "trained", {"loss": 0.125})


def filled(url: str = MEMORY) -> Registry:
    registry = Registry.open(url)
    fill(registry)
    return registry


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    with filled() as registry:
        return export(registry)


def empty() -> Registry:
    return Registry.open(MEMORY)


def state(registry: Registry) -> str:
    assert check(registry).problems == ()
    return dumps(export(registry))


def test_the_layout() -> None:
    with empty() as registry:
        give(registry, "math")
        text = state(registry)
        event = json.loads(text)["history"]
        digest = registry.task("tiny", "math").digest
        regions = {module: list(region.indices) for module, region in registry.task("tiny", "math").regions.items()}
    register, joined = event
    assert joined["detail"] == {"claim_digest": digest, "matrices": 2, "rank": 2, "variant": "fa"}
    assert (
        text
        == f"""{{
 "format": 1,
 "models": [
  {{
   "name": "tiny",
   "model_type": "llama",
   "geometry_digest": "{GEOMETRY.digest}",
   "matrices": [
    {{"module": "model.layers.0.down_proj", "out_features": 20, "in_features": 24}},
    {{"module": "model.layers.0.q_proj", "out_features": 12, "in_features": 16}},
    {{"module": "model.layers.1.down_proj", "out_features": 20, "in_features": 24}},
    {{"module": "model.layers.1.q_proj", "out_features": 12, "in_features": 16}}
   ],
   "holders": [
    {{
     "name": "math",
     "role": "task",
     "variant": "fa",
     "rank": 2,
     "stage": "allocated",
     "yields": [],
     "regions": {{
      "{Q0}": {regions[Q0]},
      "{Q1}": {regions[Q1]}
     }}
    }}
   ],
   "memberships": [
    {{"composition": "default", "task": "math"}}
   ]
  }}
 ],
 "history": [
  {json.dumps(register)},
  {json.dumps(joined)}
 ]
}}
"""
    )


def test_a_task_more_changes_its_own_lines_alone() -> None:
    with filled() as registry:
        before = state(registry).splitlines()
        give(registry, "new", composition="third")
        after = state(registry).splitlines()
    lost = [line for line in before if line not in after]
    assert len(after) - len(before) == 14 and len(lost) <= 2  # commas after what was last


def test_the_empty_registry(store_url: str) -> None:
    with Registry.open(store_url) as registry, empty() as other:
        text = state(registry)
        assert json.loads(text) == {"format": 1, "models": [], "history": []}
        assert load(other, text) == Imported((), (), (), 0, 0, 0) and state(other) == text


def test_out_in_and_out_again(store_url: str, content: dict[str, Any]) -> None:
    text = dumps(content)
    with Registry.open(store_url) as registry:
        assert load(registry, text) == Imported(
            models=("other", "tiny"),
            tasks=(("other", "lone"), ("tiny", "a"), ("tiny", "rows"), ("tiny", "bee")),
            memberships=(
                ("other", "default", "lone"),
                ("tiny", "default", "a"),
                ("tiny", "default", "rows"),
                ("tiny", "second", "a"),
                ("tiny", "second", "bee"),
            ),
            protected=2,
            unchanged=0,
            events=len(content["history"]),
        )
        assert state(registry) == text
        # It is a registry like any other.
        with filled() as first:
            assert registry.claims("tiny") == first.claims("tiny")
            assert registry.claims("tiny", "second") == first.claims("tiny", "second")
            assert registry.protected("tiny") == first.protected("tiny") == {(Q0, 1): (3, 5)}
        give(registry, "more", composition="second")
        registry.release("tiny", "rows")
        registry.unprotect("tiny")
        state(registry)


def test_again_changes_nothing(content: dict[str, Any]) -> None:
    with filled() as registry:
        before = state(registry)
        assert load(registry, before) == Imported((), (), (), 0, 4, 0)
        assert load(registry, json.loads(before)) == Imported((), (), (), 0, 4, 0)
        assert state(registry) == before


def test_a_dry_run_says_the_same_and_writes_nothing(content: dict[str, Any]) -> None:
    with empty() as registry:
        dry = load(registry, content, dry_run=True)
        assert json.loads(state(registry))["models"] == []
        assert load(registry, content) == dry


def test_a_registry_that_holds_something_gains_the_rest(content: dict[str, Any], store_url: str) -> None:
    with Registry.open(store_url) as registry:
        give(registry, "own", geometry=replace(GEOMETRY, model="mine"))
        before = registry.events()
        found = load(registry, content)
        assert found.models == ("other", "tiny") and found.events == 0 and found.unchanged == 0
        new = registry.events()[len(before) :]
        assert registry.events()[: len(before)] == before
        assert [(e.action, e.model, e.composition, e.task) for e in new] == [
            ("register", "other", None, None),
            ("import", "other", "default", "lone"),
            ("register", "tiny", None, None),
            ("import", "tiny", None, None),
            ("import", "tiny", "default", "a"),
            ("import", "tiny", "default", "rows"),
            ("import", "tiny", "second", "a"),
            ("import", "tiny", "second", "bee"),
        ]
        digest = hashlib.sha256(json.dumps({Q0: [3, 5]}).encode()).hexdigest()
        assert new[3].detail == {"axis": "columns", "matrices": 1, "channels": 2, "digest": digest}
        assert new[4].detail["claim_digest"] == registry.task("tiny", "a").digest
        after = json.loads(state(registry))["models"]
        assert after[1:] == content["models"]
        assert load(registry, content) == Imported((), (), (), 0, 4, 0)
        registry.rename("tiny", "a", "renamed")
        registry.release("tiny", "rows")
        state(registry)


def test_new_tasks_and_compositions_among_old_ones(content: dict[str, Any]) -> None:
    with filled() as registry:
        give(registry, "late", composition="second", variant="fb", rank=1)
        give(registry, "rows", variant="fb", rank=3, composition="third")
        later = export(registry)
    with filled() as registry:
        there = registry.events()
        found = load(registry, later)
        assert found.tasks == (("tiny", "late"),) and found.unchanged == 4
        assert found.memberships == (("tiny", "second", "late"), ("tiny", "third", "rows"))
        assert [event.action for event in registry.events()[len(there) :]] == ["import", "import"]
        assert json.loads(state(registry))["models"] == later["models"]


def test_without_a_history(content: dict[str, Any]) -> None:
    """Who wants no names and times in git leaves it out, and gets one of the import."""
    with empty() as registry:
        assert load(registry, {**content, "history": []}).events == 0
        assert json.loads(state(registry))["models"] == content["models"]
        assert {event.action for event in registry.events()} == {"register", "import"}


Change = Callable[[dict[str, Any]], object]


def tiny(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["models"][1]
    return found


def holder(content: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in tiny(content)["holders"] if row["name"].startswith(name))


def put(place: Any, key: Any, value: object) -> None:
    place[key] = value


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            lambda c: put(holder(c, "bee")["regions"], Q0, [0, 15]),
            RegistryError,
            rf"task 'bee' of tiny is in the registry already and differs: indices \d+, \d+ of {Q0}, in the file "
            r"indices 0, 15; rename or release",
        ),
        (lambda c: put(holder(c, "bee"), "rank", 9), RegistryError, "'bee' .* differs: rank 2, in the file 9"),
        (lambda c: put(holder(c, "#"), "stage", "trained"), RegistryError, "stage allocated, in the file trained"),
        (lambda c: holder(c, "bee")["regions"].pop(Q0), RegistryError, f"of {Q0}, in the file nothing"),
        (
            lambda c: holder(c, "rows")["yields"].pop(1),
            RegistryError,
            "'rows' .* differs: yields to #.*, a, #.*, in the",
        ),
        (
            lambda c: put(holder(c, "bee"), "name", "fresh") or put(tiny(c)["memberships"][-1], "task", "fresh"),
            AllocationError,
            r"'fresh' and 'bee' of tiny would both own column \d+ of .* in composition 'second': nothing was imported",
        ),
        (
            lambda c: tiny(c)["memberships"].append({"composition": "default", "task": "bee"}),
            AllocationError,
            rf"'bee' and 'rows' of tiny would both own row \d+, column \d+ of {Q0}, where neither yields",
        ),
        (
            lambda c: tiny(c)["matrices"].append({"module": "x.1.y", "out_features": 1, "in_features": 1}),
            RegistryError,
            "model 'tiny' is registered with other matrices",
        ),
        (
            lambda c: tiny(c)["holders"].append(protected(16, [0])),
            AllocationError,
            r"'#\w{12}' and 'a' of tiny would both own column \d+ of .*q_proj in composition 'default'",
        ),
    ],
)
def test_what_differs_or_collides_is_refused(
    content: dict[str, Any], change: Change, kind: type[Exception], message: str
) -> None:
    changed = copy.deepcopy(content)
    change(changed)
    with filled() as registry:
        before = state(registry)
        with pytest.raises(kind, match=message) as caught:
            load(registry, changed)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
        assert state(registry) == before


def protected(size: int, outside: list[int]) -> dict[str, Any]:
    """A holder of every column of the first matrix but some."""
    indices = [index for index in range(size) if index not in (*outside, 3, 5)]
    row: dict[str, Any] = {"role": "protected", "variant": "fa", "rank": 2, "stage": "allocated", "yields": []}
    return {"name": content_name("fa", 2, {Q0: tuple(indices)}, Counter()), **row, "regions": {Q0: indices}}


def test_protected_channels_join_every_composition() -> None:
    with filled() as registry:
        registry.release("tiny", "rows")  # what rows cross cannot be protected
        claims = [*registry.claims("tiny").values(), *registry.claims("tiny", "second").values()]
        index = min(set(range(16)) - {i for held in claims for i in held.regions[Q1].indices})
        before = len(registry.events())
        content = export(registry)
        row = {"role": "protected", "variant": "fa", "rank": 1, "stage": "allocated", "yields": []}
        name = content_name("fa", 1, {Q1: (index,)}, Counter())
        tiny(content)["holders"].append({"name": name, **row, "regions": {Q1: [index]}})
        assert load(registry, content).protected == 1
        assert registry.protected("tiny") == {(Q0, 1): (3, 5), (Q1, 1): (index,)}
        assert len(registry.events()) == before + 1
        state(registry)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["history"].pop(), "task 'a' of tiny: its stage is 'trained', by the history 'allocated'"),
        (lambda c: c["history"].pop(0), "the history never registers model 'other'|never registered"),
        (lambda c: c["history"].reverse(), "never registered|the history before it has no such task"),
        (lambda c: tiny(c)["memberships"].reverse(), "out of the order of the history"),
        (lambda c: put(holder(c, "bee")["regions"], Q0, [0, 15]), "task 'bee' of tiny: its claims have the digest"),
        (lambda c: put(tiny(c), "geometry_digest", "0" * 64), "matrices of tiny are not those of its geometry digest"),
        (lambda c: put(tiny(c)["matrices"][0], "in_features", 25), "matrices of tiny are not those of its geometry"),
    ],
)
def test_what_the_store_cannot_prove_is_refused(content: dict[str, Any], change: Change, message: str) -> None:
    changed = copy.deepcopy(content)
    change(changed)
    with empty() as registry:
        with pytest.raises(RegistryError, match=rf"nothing was imported: .*would be broken \(.*({message})"):
            load(registry, changed)
        assert json.loads(state(registry))["models"] == []


def event(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["history"][0]
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: put(c, "format", 2), "format is 2, this multisbora reads 1"),
        (lambda c: put(c, "format", True), "format is True"),
        (lambda c: c.pop("history"), "the file lacks history"),
        (lambda c: put(c, "model", []), "the file has an unknown key 'model', did you mean 'models'"),
        (lambda c: put(c, "xyz" * 9999, []), r"unknown key 'xyz.{0,60}\.\.\. \(known: format, models, history\)"),
        (lambda c: put(c, "models", {}), r"models must be a list, got \{\}"),
        (lambda c: c["models"].append(7), r"models\[2\] must be an object with name, .*got 7"),
        (lambda c: c["models"].append(c["models"][0]), "models has model 'other' 2 times"),
        (lambda c: put(tiny(c), "name", "a\nb"), r"models\[1\]\.name must be printable text .*got 'a\\nb'"),
        (lambda c: put(tiny(c), "name", "\ud800"), "must be printable text"),
        (lambda c: put(tiny(c), "name", "x" * 1001), r"at most 1000 characters, got 'x{59}\.\.\."),
        (lambda c: put(tiny(c), "model_type", None), "model 'tiny': model_type must be printable text"),
        (lambda c: put(tiny(c), "geometry_digest", "F" * 64), "model 'tiny': geometry_digest must be 64 hexadecimal"),
        (lambda c: tiny(c)["matrices"].append(tiny(c)["matrices"][0]), "matrix '.*' is given twice"),
        (lambda c: put(tiny(c)["matrices"][0], "in_features", 0), "must be a whole number from 1 to 16777216, got 0"),
        (lambda c: put(tiny(c)["matrices"][0], "in_features", 2**24 + 1), "from 1 to 16777216, got 16777217"),
        (lambda c: put(holder(c, "bee"), "rank", 2**31), "must be a whole number from 1 to 2147483647"),
        (lambda c: put(tiny(c), "matrices", []), "model 'tiny': matrices is empty: a model has one at least"),
        (lambda c: put(tiny(c)["matrices"][0], "in_features", 24.0), "must be a whole number .*got 24.0"),
        (lambda c: put(holder(c, "a"), "names", "x"), "unknown key 'names', did you mean 'name'"),
        (lambda c: put(holder(c, "bee"), "name", "a"), "model 'tiny': 'a' is listed twice"),
        (lambda c: put(holder(c, "bee"), "name", "../a"), "task name '../a' is not usable"),
        (lambda c: put(holder(c, "#"), "name", "#1"), r"'#1' is protected and must be called '#\w{12}', after what it"),
        (lambda c: put(holder(c, "bee"), "role", "boss"), "'bee': role must be one of task, protected, released"),
        (lambda c: put(holder(c, "bee"), "role", ["task"]), r"role must be one of .*got \['task'\]"),
        (lambda c: put(holder(c, "bee"), "variant", "fc"), "'bee': variant must be one of fa, fb, got 'fc'"),
        (lambda c: put(holder(c, "bee"), "stage", "done"), "'bee': stage must be one of allocated, training, trained"),
        (lambda c: put(holder(c, "bee"), "rank", "2"), "'bee': rank must be a whole number"),
        (lambda c: put(holder(c, "bee"), "yields", ["a"]), "'bee' yields to 'a', which is of the same variant"),
        (lambda c: put(holder(c, "bee"), "yields", ["rows"] * 2), "'bee': yields has name 'rows' 2 times"),
        (lambda c: put(holder(c, "rows"), "yields", ["bee"]), "'rows' yields to 'bee', which is not listed before it"),
        (lambda c: put(holder(c, "rows"), "yields", [{}]), r"'rows' yields to \{\}, which is not listed before it"),
        (lambda c: put(holder(c, "rows"), "yields", "a"), "yields must be a list"),
        (lambda c: holder(c, "rows")["yields"].pop(), "is released and nobody yields to it: leave it out"),
        (lambda c: put(holder(c, "a"), "regions", {}), "'a': regions must be a region or more"),
        (lambda c: put(holder(c, "a")["regions"], "q_proj", [1]), "of 'q_proj' is of a matrix that the model does not"),
        (lambda c: put(holder(c, "a")["regions"], Q0[:-1], [1]), f"does not list, did you mean '{Q0}'"),
        (lambda c: put(holder(c, "a")["regions"], Q0, []), "must be a list of whole numbers"),
        (lambda c: put(holder(c, "a")["regions"], Q0, [1, True]), "must be a list of whole numbers"),
        (lambda c: put(holder(c, "a")["regions"], Q0, [1, "2"]), "must be a list of whole numbers"),
        (lambda c: put(holder(c, "a")["regions"], Q0, [2, 1]), "must be sorted, without repeats and not negative"),
        (lambda c: put(holder(c, "a")["regions"], Q0, [1, 1]), "must be sorted, without repeats and not negative"),
        (lambda c: put(holder(c, "a")["regions"], Q0, [-1, 1]), "must be sorted, without repeats and not negative"),
        (lambda c: put(holder(c, "a")["regions"], Q0, [1, 16]), "has index 16, outside of an axis of 16"),
        (lambda c: put(holder(c, "rows")["regions"], Q0, [1, 12]), "has index 12, outside of an axis of 12"),
        (lambda c: put(holder(c, "a")["regions"], Q0, [1, 10**400]), r"has index 1(0){59}\.\.\., outside"),
        (lambda c: tiny(c)["memberships"].append(tiny(c)["memberships"][0]), "memberships has membership .* 2 times"),
        (lambda c: put(tiny(c)["memberships"][0], "task", "x"), "of task 'x', which is not among its holders"),
        (lambda c: put(tiny(c)["memberships"][0], "composition", "a b"), "composition name 'a b' is not usable"),
        (lambda c: put(tiny(c)["memberships"][0], "composition", 5), "composition name 5 is not usable"),
        (lambda c: tiny(c)["memberships"].pop(), "task 'bee' is in no composition"),
        (lambda c: put(event(c), "at", "yesterday"), r"history\[0\]\.at must be a time such as .*got 'yesterday'"),
        (lambda c: put(event(c), "at", 7), r"history\[0\]\.at must be a time"),
        # Python 3.11 reads all of these as times, 3.10 none.
        *(
            (lambda c, at=at: put(event(c), "at", at), r"history\[0\]\.at must be a time such as")
            for at in ("2026-W05-6", "20260131T120000Z", "2026-01-31T12:00:00Z", "2026-01-31", "2026-01-31T12")
        ),
        *(
            (lambda c, at=at: put(event(c), "at", at), r"history\[0\]\.at must be a time such as")
            for at in (
                "2026-13-01T00:00:00+00:00",
                "2026-01-01T24:00:00+00:00",
                "2026-01-31T12:00:00+01:00",
                "\u0662026-01-31T12:00:00+00:00",
            )
        ),
        (lambda c: put(event(c), "actor", "a\x00b"), r"history\[0\]\.actor must be printable text"),
        (lambda c: put(event(c), "action", "x" * 33), r"history\[0\]\.action must be printable text of at most 32"),
        (lambda c: put(event(c), "task", ""), "task name '' is not usable"),
        (lambda c: put(event(c), "detail", []), r"history\[0\]\.detail must be an object, got \[\]"),
        (lambda c: put(event(c), "detail", {"x": float("nan")}), "is no valid JSON"),
        (
            lambda c: put(event(c), "detail", {"a\x1b[2J": 1}),
            r"detail has key 'a\\x1b\[2J', which is not printable text",
        ),
        (
            lambda c: put(event(c), "detail", {"x": [{"y" * 101: 1}]}),
            r"has key 'y+, which is .* at most 100 characters",
        ),
        (lambda c: put(event(c), "detail", {"x": [[[[[[[[]]]]]]]]}), "detail nests deeper than 8 levels"),
        (lambda c: put(event(c), "detail", {"x": {1}}), "is no valid JSON: .*set is not JSON serializable"),
    ],
)
def test_a_hostile_document(content: dict[str, Any], change: Change, message: str) -> None:
    changed = copy.deepcopy(content)
    change(changed)
    with pytest.raises(UsageError, match=message) as caught:
        parse(changed)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no valid JSON: Expecting value"),
        ("[]", r"the file must be an object with format, models, history, got \[\]"),
        ('{"format": 1, "format": 1}', "key 'format' is given twice in one object"),
        ('{"format": NaN}', "NaN is no number"),
        ('{"format": -Infinity}', "-Infinity is no number"),
        ("[" * 10_000_000, "nests too deep to be a registry"),
        ('{"a":' * 1_000_000, "nests too deep to be a registry"),
        ('{"format": ' + "1" * 5000 + "}", "is no valid JSON: Exceeds the limit|format is 1"),
        ("\ufeff{}", "is no valid JSON"),
    ],
    ids=range(9),
)
def test_hostile_text(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_an_older_file_takes_no_training_back(content: dict[str, Any], store_url: str) -> None:
    """Stages only go on: what was trained since the export stays trained."""
    with Registry.open(store_url) as registry:
        load(registry, content)
        registry.mark(registry.task("tiny", "bee", "second"), "trained")
        registry.mark(registry.task("tiny", "rows"), "training")
        before = state(registry)
        assert load(registry, content) == Imported((), (), (), 0, 4, 0)
        assert state(registry) == before


def test_a_newer_file_brings_the_stage(content: dict[str, Any]) -> None:
    newer = copy.deepcopy(content)
    put(holder(newer, "bee"), "stage", "trained")
    put(holder(newer, "rows"), "stage", "training")
    put(holder(newer, "a"), "stage", "allocated")
    with filled() as registry:
        before = registry.events()
        found = load(registry, newer, dry_run=True)
        assert registry.task("tiny", "bee", "second").stage == "allocated"
        assert load(registry, newer) == found
        assert found == Imported((), (), (), 0, 4, 0, (("tiny", "rows"), ("tiny", "bee")))
        assert found.to_json()["advanced"] == (("tiny", "rows"), ("tiny", "bee"))
        bee = registry.task("tiny", "bee", "second")
        assert (bee.stage, registry.task("tiny", "rows").stage) == ("trained", "training")
        assert registry.task("tiny", "a").stage == "trained"
        new = registry.events()[len(before) :]
        assert [(e.action, e.task) for e in new] == [("training", "rows"), ("trained", "bee")]
        assert new[1].detail == {"claim_digest": bee.digest, "source": "import"}
        state(registry)


def test_the_order_of_matrices_in_a_file_stands_for_nothing(content: dict[str, Any]) -> None:
    changed = copy.deepcopy(content)
    for model in changed["models"]:
        rows = model["matrices"]
        rows[:] = [rows[-1], *rows[1:-1], rows[0]]
        for held in model["holders"]:
            held["regions"] = dict(reversed(held["regions"].items()))
    with empty() as registry, filled() as first:
        load(registry, changed)
        assert state(registry) == dumps(content)
        assert registry.named(GEOMETRY) == GEOMETRY
        assert load(first, changed) == Imported((), (), (), 0, 4, 0)
        give(registry, "more", composition="third", target_modules="all-linear")
        give(first, "more", composition="third", target_modules="all-linear")
        assert registry.claims("tiny", "third") == first.claims("tiny", "third")


def test_rows_in_another_order_are_exported_in_the_geometry_s(content: dict[str, Any]) -> None:
    with filled() as registry:
        with registry.transaction() as ledger:
            run = ledger.connection.exec_driver_sql
            run("PRAGMA defer_foreign_keys = ON")
            for trigger in ("regions_fixed", "claims_fixed"):
                run(f"DROP TRIGGER {trigger}")
            for table, column in (("matrices", "id"), ("regions", "matrix_id"), ("claims", "matrix_id")):
                run(f"UPDATE {table} SET {column} = 100 - {column}")
        assert json.dumps(export_past_the_guards(registry)["models"]) == json.dumps(content["models"])


def export_past_the_guards(registry: Registry) -> dict[str, Any]:
    """As `export`, of a store whose triggers were dropped."""
    from multisbora.registry.rows import read
    from multisbora.registry.snapshot import _document

    with registry.reading() as reader:
        return _document(read(reader.connection)).to_json()


def test_a_long_axis_costs_nothing(content: dict[str, Any]) -> None:
    """A file of a kilobyte that says that an axis is very long takes no memory for it."""
    wide = Geometry("wide", "x", (Matrix("h.0.a", "h.0.a.weight", 2**24, 2**24),))
    with empty() as registry:
        with registry.transaction() as ledger:
            ledger.register(wide)
        text = export(registry)
    region = {"variant": "fa", "rank": 2, "stage": "allocated", "yields": [], "regions": {"h.0.a": [0, 2**24 - 1]}}
    text["models"][0]["holders"] = [{"name": "a", "role": "task", **region}]
    text["models"][0]["memberships"] = [{"composition": f"c{i}", "task": "a"} for i in range(9)]
    with empty() as registry:
        tracemalloc.start()
        try:
            load(registry, {**text, "history": []})
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 2**24 and len(registry.compositions("wide")) == 9


def test_a_number_beyond_all_numbers(content: dict[str, Any]) -> None:
    text = dumps(content).replace("0.125", "1e999")
    with pytest.raises(UsageError, match=r"history\[\d+\]\.detail holds a number out of range"):
        parse(text)


def test_a_broken_store_is_neither_exported_nor_added_to(content: dict[str, Any]) -> None:
    with filled() as registry:
        with registry.transaction() as ledger:
            ledger.connection.exec_driver_sql("DROP TRIGGER yields_held")
            ledger.connection.exec_driver_sql("DELETE FROM yields")
        with pytest.raises(RegistryError, match=r"is broken, nothing was exported .*neither yields.*registry check"):
            export(registry)
        with pytest.raises(RegistryError, match=r"is broken, nothing was imported .*neither yields"):
            load(registry, content)


STEP = st.tuples(
    st.sampled_from(["allocate", "allocate", "allocate", "both", "release", "rename", "protect", "unprotect", "mark"]),
    st.sampled_from("abcdef"),
    st.sampled_from(["fa", "fb"]),
    st.integers(1, 4),
    st.sampled_from(["one", "two"]),
    st.sampled_from([["q_proj"], ["down_proj"], "all-linear"]),
)


def take(registry: Registry, step: tuple[str, str, Any, int, str, Any]) -> None:
    action, task, variant, rank, composition, targets = step
    options = {"variant": variant, "rank": rank, "target_modules": targets}
    if action == "allocate":
        give(registry, task, composition=composition, **options)
    elif action == "both":
        give(registry, composition={"one": [task], "two": [task, "f"]}, reallocate=True, **options)
    elif action == "release":
        registry.release("tiny", task, composition if rank > 2 else None)
    elif action == "rename":
        registry.rename("tiny", task, "abcdef"[rank])
    elif action == "protect":
        registry.protect(GEOMETRY, **{("rows", "columns")[rank % 2]: {Q0: [rank, rank + 5]}})
    elif action == "unprotect":
        registry.unprotect("tiny")
    else:
        registry.mark(registry.task("tiny", task, composition), "trained", {"steps": rank})


@settings(max_examples=30, deadline=None)
@given(st.lists(STEP, max_size=14), st.integers(0, 14))
def test_any_history_travels(steps: list[tuple[str, str, Any, int, str, Any]], early: int) -> None:
    earlier = None
    with empty() as registry, empty() as other, empty() as third:
        for count, step in enumerate(steps):
            if count == early:
                earlier = export(registry)
            with contextlib.suppress(MultisboraError):
                take(registry, step)
        text = state(registry)
        load(other, text)
        assert state(other) == text
        for name in ("one", "two"):
            assert other.claims("tiny", name) == registry.claims("tiny", name)
        assert other.protected("tiny") == registry.protected("tiny") and other.events() == registry.events()
        # Into a store that went another way, or as far as half of this one: all of it fits, or nothing changes.
        load(third, earlier or {"format": 1, "models": [], "history": []})
        before = state(third)
        try:
            load(third, text)
        except RegistryError:
            assert state(third) == before
        else:
            held = {row["name"]: row for model in json.loads(state(third))["models"] for row in model["holders"]}
            for model in json.loads(text)["models"]:
                for row in model["holders"]:
                    assert held[row["name"]]["regions"] == row["regions"]
        # Both go on alike.
        for again in (registry, other):
            with contextlib.suppress(AllocationError):
                give(again, "later", composition="one", rank=1)
        assert registry.claims("tiny", "one") == other.claims("tiny", "one")
        assert check(registry).ok and check(other).ok
