"""The store of claims through its API, on both databases: what it keeps, gives back and remembers."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from multisbora.allocator import allocate
from multisbora.errors import AllocationError, RegistryError, UsageError
from multisbora.geometry import Geometry, Matrix
from multisbora.registry import Registry
from multisbora.registry.audit import check
from multisbora.registry.claims import TaskClaims
from multisbora.registry.ledger import Ledger
from multisbora.registry.replay import digests

GEOMETRY = Geometry(
    "tiny",
    "llama",
    tuple(
        Matrix(f"model.layers.{layer}.{name}", f"model.layers.{layer}.{name}.weight", *shape)
        for layer in range(2)
        for name, shape in {"q_proj": (8, 16), "down_proj": (12, 16)}.items()
    ),
)


def give(
    registry: Registry, *tasks: str, variant: str = "fa", composition: str = "default", rank: int = 4
) -> TaskClaims:
    found = allocate(
        registry,
        GEOMETRY,
        tasks,
        variant=variant,  # type: ignore[arg-type]
        rank=rank,
        composition=composition,
        target_modules="all-linear",
    )
    return found.tasks[tasks[0]]


def test_claims_survive_reopening(store_url: str) -> None:
    with Registry.open(store_url) as registry:
        math = give(registry, "math", "code")
    with Registry.open(store_url, create=False) as registry:
        assert registry.models() == {"tiny": GEOMETRY.digest}
        assert registry.compositions("tiny") == {"default": ("math", "code")}
        assert registry.compositions("other") == {} and registry.claims("other") == {}
        assert list(registry.claims("tiny")) == ["math", "code"]
        assert registry.task("tiny", "math") == math == registry.claims("tiny")["math"]
        assert registry.task("tiny", "math").digest == math.digest
        assert list(math.regions) == [matrix.module for matrix in GEOMETRY.matrices]
        assert registry.claimed("tiny") == {(matrix.module, 1): 8 for matrix in GEOMETRY.matrices}


def test_a_double_claim_through_the_ledger_writes_nothing(store_url: str) -> None:
    with Registry.open(store_url) as registry:
        thief = dataclasses.replace(give(registry, "math", "code"), task="thief")
        with (
            pytest.raises(AllocationError, match="refused what its rules forbid, nothing was written"),
            registry.transaction() as ledger,
        ):
            ledger.add(thief, ["default"])
        assert registry.compositions("tiny") == {"default": ("math", "code")}
        assert len(registry.events()) == 3
        with registry.transaction() as ledger:  # another composition is another matter
            ledger.add(thief, ["apart"])
        assert registry.compositions("tiny") == {"apart": ("thief",), "default": ("math", "code")}
        with (
            pytest.raises(AllocationError, match="refused what its rules forbid"),
            registry.transaction() as ledger,
        ):
            ledger.join("tiny", "thief", "default")


def test_the_ledger_decides_who_keeps_a_crossing(store_url: str) -> None:
    """Whatever a caller writes as excluded: those that are there already keep their cells."""
    with Registry.open(store_url) as registry:
        math = give(registry, "math")
        rows = dataclasses.replace(give(registry, "rows", variant="fb", composition="apart"), task="new")
        with registry.transaction() as ledger:
            written = ledger.add(rows, ["default"])
        for module, region in written.regions.items():
            assert region.excluded == math.regions[module].indices
        assert registry.task("tiny", "new") == dataclasses.replace(written, composition="default")
        with (
            pytest.raises(AllocationError, match="two tasks would own the cells where they cross"),
            registry.transaction() as ledger,
        ):
            ledger.join("tiny", "rows", "default")


def test_an_exception_takes_everything_back(store_url: str) -> None:
    with Registry.open(store_url) as registry:
        with pytest.raises(ZeroDivisionError), registry.transaction() as ledger:
            ledger.register(GEOMETRY)
            raise ZeroDivisionError
        assert registry.models() == {} and registry.events() == []


def test_a_reader_cannot_write(postgresql_url: str) -> None:
    with Registry.open(postgresql_url) as registry:
        give(registry, "math")
        with pytest.raises(RegistryError), registry.reading() as reader:
            Ledger(reader.connection).release("tiny", "math")
        assert list(registry.claims("tiny")) == ["math"]


def test_a_reader_sees_one_state(store_url: str) -> None:
    with Registry.open(store_url) as registry, Registry.open(store_url) as other:
        give(registry, "math")
        with registry.reading() as ledger:
            assert list(ledger.claims("tiny", "default")) == ["math"]
            give(other, "code")
            other.release("tiny", "math")
            assert list(ledger.claims("tiny", "default")) == ["math"]
        assert list(registry.claims("tiny")) == ["code"]


def test_an_unknown_task_says_what_to_run(store_url: str) -> None:
    with Registry.open(store_url) as registry:
        give(registry, "math")
        with pytest.raises(RegistryError, match="run multisbora allocate --tasks law"):
            registry.task("tiny", "law")
        with pytest.raises(RegistryError, match=r"in composition 'other': it has some in default"):
            registry.task("tiny", "math", "other")


def test_release_gives_back_and_history_stays(store_url: str) -> None:
    with Registry.open(store_url) as registry:
        math = give(registry, "math", "code")
        give(registry, "math", composition="b")
        with pytest.raises(RegistryError, match="in composition 'c': nothing to release"):
            registry.release("tiny", "math", "c")
        assert registry.release("tiny", "math", "b", dry_run=True) == ("b",)
        assert registry.release("tiny", "math", "b") == ("b",)
        assert registry.task("tiny", "math") == math
        assert registry.release("tiny", "math") == ("default",)
        assert registry.compositions("tiny") == {"default": ("code",)}
        assert registry.claimed("tiny") == {(matrix.module, 1): 4 for matrix in GEOMETRY.matrices}
        with pytest.raises(RegistryError, match="in any composition: nothing to release"):
            registry.release("tiny", "math")
        assert give(registry, "math", rank=2).rank == 2
        history = [(event.action, event.task, event.composition) for event in registry.events()]
    assert history == [
        ("register", None, None),
        ("allocate", "math", "default"),
        ("allocate", "code", "default"),
        ("join", "math", "b"),
        ("release", "math", "b"),
        ("release", "math", "default"),
        ("allocate", "math", "default"),
    ]


def test_masks_outlive_the_tasks_they_yield_to(store_url: str) -> None:
    with Registry.open(store_url) as registry:
        math = give(registry, "math")
        rows = give(registry, "rows", variant="fb")
        late = give(registry, "late")
        registry.release("tiny", "math")
        assert registry.task("tiny", "rows") == rows and registry.task("tiny", "late") == late
        assert list(registry.claims("tiny")) == ["rows", "late"]
        again = give(registry, "math")  # the name is free, and so are the indices
        assert {module: region.indices for module, region in again.regions.items()} == {
            module: region.indices for module, region in math.regions.items()
        }
        assert all(region.excluded == rows.regions[module].indices for module, region in again.regions.items())
        registry.release("tiny", "rows")
        registry.release("tiny", "late")
        registry.release("tiny", "math")
        assert registry.compositions("tiny") == {} and registry.claimed("tiny") == {}


def test_rename_keeps_everything_but_the_name(store_url: str) -> None:
    with Registry.open(store_url) as registry:
        math = give(registry, "math", "code")
        give(registry, "math", composition="b")
        registry.rename("tiny", "math", "arithmetic", dry_run=True)
        assert registry.task("tiny", "math") == math
        registry.rename("tiny", "math", "arithmetic")
        assert registry.task("tiny", "arithmetic") == dataclasses.replace(math, task="arithmetic")
        assert registry.task("tiny", "arithmetic").digest == math.digest
        assert registry.compositions("tiny") == {"b": ("arithmetic",), "default": ("arithmetic", "code")}
        for old, new, error, message in [
            ("math", "x", RegistryError, "'math' has no claims on tiny"),
            ("code", "arithmetic", RegistryError, "'arithmetic' holds claims on tiny already"),
            ("code", "../x", UsageError, "task name"),
            ("code", "#1", UsageError, "task name"),
        ]:
            with pytest.raises(error, match=message):
                registry.rename("tiny", old, new)
        event = registry.events()[-1]
        assert (event.action, event.task, event.detail) == ("rename", "math", {"to": "arithmetic"})


def test_stages_of_training(store_url: str) -> None:
    with Registry.open(store_url) as registry:
        math = give(registry, "math")
        assert math.stage == "allocated"
        registry.mark(math, "training")
        assert registry.task("tiny", "math").stage == "training"
        registry.mark(math, "trained", {"adapter_digest": "abc"})
        assert registry.task("tiny", "math") == dataclasses.replace(math, stage="trained")
        assert registry.events()[-1].detail == {"claim_digest": math.digest, "adapter_digest": "abc"}
        registry.release("tiny", "math")
        give(registry, "first")
        give(registry, "math")  # other indices now
        with pytest.raises(RegistryError, match="holds other claims on tiny than it was trained on"):
            registry.mark(math, "trained")
        assert registry.task("tiny", "math").stage == "allocated"


def test_events_say_who_did_what_when(store_url: str) -> None:
    with Registry.open(store_url) as registry:
        math = give(registry, "math")
        event = registry.events()[1]
    assert event.at.endswith("+00:00") and "@" in event.actor and event.model == "tiny"
    assert event.detail == {"variant": "fa", "rank": 4, "matrices": 4, "claim_digest": math.digest}


def test_one_model_under_two_spellings(store_url: str) -> None:
    """The hub's copy of a model and one that transformers saved differ in the leading parts of the names."""
    published, saved = (
        Geometry(
            "gpt2",
            "gpt2",
            tuple(
                Matrix(f"{prefix}h.{layer}.{name}", f"{prefix}h.{layer}.{name}.weight", 8, 16, "conv1d")
                for layer in range(11)
                for name in ("attn.c_attn", "mlp.c_fc")
            ),
        )
        for prefix in ("", "transformer.")
    )
    options = {"rank": 4, "target_modules": "all-linear"}
    with Registry.open(store_url) as registry:
        first = allocate(registry, published, ["a"], **options).tasks["a"]  # type: ignore[arg-type]
        assert allocate(registry, saved, ["a"], **options).tasks["a"] == first  # type: ignore[arg-type]
        second = allocate(registry, saved, ["b"], **options).tasks["b"]  # type: ignore[arg-type]
        assert list(second.regions) == list(first.regions) == [matrix.module for matrix in published.matrices]
        assert registry.named(saved).matrices[0].module == "h.0.attn.c_attn"
        assert registry.named(published) == published
        other = dataclasses.replace(saved, matrices=saved.matrices[:-1])
        with pytest.raises(RegistryError, match="model 'gpt2' is registered with other matrices"):
            allocate(registry, other, ["c"], **options)  # type: ignore[arg-type]


def matrices_at_random(registry: Registry) -> None:
    """The rows of the first model in another order than its geometry's, as a file could have brought them."""
    with registry.transaction() as ledger:
        run = ledger.connection.exec_driver_sql
        for number, (module,) in enumerate(run("SELECT module FROM matrices ORDER BY module DESC").fetchall(), 101):
            run(f"UPDATE matrices SET id = {number} WHERE module = '{module}'")


def two_spellings() -> tuple[Geometry, Geometry]:
    """Of GPT-2 as published and as saved; here the names of the saved one sort the other way round."""
    shapes = {"a.h.0.c": (8, 16), "b.h.0.d": (16, 8)}
    return tuple(
        Geometry("gpt2", "gpt2", tuple(Matrix(f"{before[name[0]]}{name}", name, *shapes[name]) for name in shapes))
        for before in ({"a": "", "b": ""}, {"a": "z.", "b": "y."})
    )  # type: ignore[return-value]


def test_spellings_that_sort_differently_are_matched_by_name() -> None:
    published, saved = two_spellings()
    assert [matrix.shape for matrix in published.matrices] != [matrix.shape for matrix in saved.matrices]
    assert published.digest == saved.digest
    with Registry.open("sqlite://") as registry:
        first = allocate(registry, published, ["a"], rank=4, target_modules="all-linear").tasks["a"]
        named = registry.named(saved)
        assert {m.module: m.shape for m in named.matrices} == {m.module: m.shape for m in published.matrices}
        assert {m.tensor: m.shape for m in named.matrices} == {m.tensor: m.shape for m in saved.matrices}
        assert allocate(registry, saved, ["a"], rank=4, target_modules="all-linear").tasks["a"] == first


def test_rows_in_another_order_than_the_geometry() -> None:
    with Registry.open("sqlite://") as registry:
        with registry.transaction() as ledger:
            ledger.register(GEOMETRY)
        matrices_at_random(registry)
        assert check(registry).problems == ()
        with registry.reading() as reader:
            assert list(reader.shapes("tiny")) != [matrix.module for matrix in GEOMETRY.matrices]
        assert registry.named(GEOMETRY) == GEOMETRY
        held = give(registry, "math")
        assert {name: region.indices[-1] < 16 for name, region in held.regions.items()} == {
            matrix.module: True for matrix in GEOMETRY.matrices
        }
        assert check(registry).problems == ()


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE matrices SET in_features = 17 WHERE id = 1", r"layers\.0\.down_proj' of tiny is 12 x 17"),
        ("UPDATE matrices SET module = 'x.0.y' WHERE id = 1", r"registered matrix 'x\.0\.y': tiny has no matrix"),
        ("DELETE FROM matrices WHERE id = 1", r"matrix 'model\.layers\.0\.down_proj' of tiny is not registered"),
        ("UPDATE matrices SET module = 'layers.0.down_proj' WHERE id = 2", "is registered twice, under two names"),
    ],
)
def test_registered_matrices_that_are_not_the_geometry(statement: str, message: str) -> None:
    with Registry.open("sqlite://") as registry:
        with registry.transaction() as ledger:
            ledger.register(GEOMETRY)
            shape = "UPDATE matrices SET out_features = 12 WHERE id = 2"
            for text in (shape, statement) if "id = 2" in statement else (statement,):
                ledger.connection.exec_driver_sql(text)
        with pytest.raises(
            RegistryError, match=f"the registry is damaged .*{message}.*: run multisbora registry check"
        ):
            registry.named(GEOMETRY)


QUESTIONS: dict[str, Callable[[Registry], object]] = {
    "claims": lambda registry: registry.claims("tiny"),
    "task": lambda registry: registry.task("tiny", "math"),
    "claimed": lambda registry: registry.claimed("tiny"),
    "protected": lambda registry: registry.protected("tiny"),
    "allocate": lambda registry: give(registry, "law"),
    "join": lambda registry: give(registry, "math", composition="other"),
}


@pytest.mark.parametrize("question", [name for name in QUESTIONS if name != "protected"])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            "indices = X'010203'",
            r"the region of model\.layers\.0\.down_proj of task 'math' is no sorted list of indices",
        ),
        ("indices = X''", "the region of .* is no sorted list of indices on its axis"),
        ("indices = X'0200000001000000'", "the region of .* is no sorted list of indices on its axis"),
        ("indices = X'0100000010000000'", "the region of .* is no sorted list of indices on its axis"),
        ("indices = 8", "the region of .* is no sorted list of indices on its axis"),
        ("indices = 'abcd'", "the region of .* is no sorted list of indices on its axis"),
        ("matrix_id = 77", "task 'math' has a region of matrix number 77, which its model does not have"),
    ],
)
def test_a_damaged_region_is_one_line_everywhere(tmp_path: Path, question: str, change: str, what: str) -> None:
    url = f"sqlite:///{tmp_path / 'registry.db'}"
    with Registry.open(url) as registry:
        give(registry, "math")
    with closing(sqlite3.connect(tmp_path / "registry.db")) as connection:
        connection.execute("DROP TRIGGER regions_fixed")
        connection.execute(f"UPDATE regions SET {change} WHERE matrix_id = 1")
        connection.commit()
    with Registry.open(url) as registry:
        with pytest.raises(RegistryError, match=rf"^the registry is damaged \({what}.*run multisbora registry check$"):
            QUESTIONS[question](registry)
        assert not check(registry).ok


def test_a_damaged_protection(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'registry.db'}"
    with Registry.open(url) as registry:
        registry.protect(GEOMETRY, columns={GEOMETRY.matrices[0].module: [3]})
    with closing(sqlite3.connect(tmp_path / "registry.db")) as connection:
        connection.execute("DROP TRIGGER regions_fixed")
        connection.execute("UPDATE regions SET indices = X'03'")
        connection.commit()
    with Registry.open(url) as registry:
        for question in ("claimed", "protected", "allocate"):
            with pytest.raises(RegistryError, match=r"^the registry is damaged \(the region of .* of task '#1' is no"):
                QUESTIONS[question](registry)


@pytest.mark.parametrize("detail", ["{", "[1]", "7", "", "[" * 100_000])
def test_a_damaged_event_is_one_line(store_url: str, detail: str) -> None:
    with Registry.open(store_url) as registry:
        give(registry, "math")
        with registry.transaction() as ledger:
            ledger.connection.exec_driver_sql(
                f"INSERT INTO events (at, actor, action, model, detail) VALUES ('x', 'y', 'z', 'tiny', '{detail}')"
            )
        with pytest.raises(RegistryError, match=r"^the registry is damaged \(the detail of event \d+, 'z', is no JSON"):
            registry.events()


@pytest.mark.parametrize(
    ("detail", "message"),
    [
        ({"loss": float("nan")}, "'trained' .* holds a number out of range"),
        ({"loss": [1, float("inf")]}, "holds a number out of range"),
        ({"path": Path("x")}, "holds a PosixPath, which is no JSON"),
        ({"x": {1: 2}}, "has key 1, which is not printable text"),
        ({"a\nb": 2}, r"has key 'a\\nb', which is not printable text"),
        ({"x" * 101: 2}, "which is not printable text of at most 100 characters"),
        ({"x": [[[[[[[[1]]]]]]]]}, "nests deeper than 8 levels"),
        ({"x": 10**5000}, "holds a whole number of too many digits"),
    ],
)
def test_a_detail_that_is_no_json_writes_nothing(detail: dict[str, object], message: str) -> None:
    with Registry.open("sqlite://") as registry:
        math = give(registry, "math")
        before = registry.events()
        with registry.transaction() as ledger:  # nothing is written even where the caller goes on
            with pytest.raises(UsageError, match=message):
                ledger.mark(math, "trained", detail)
            with pytest.raises(UsageError, match="for the registry's history"):
                ledger.record("merge", "tiny", detail=detail)
        assert registry.events() == before and registry.task("tiny", "math").stage == "allocated"


def test_a_detail_cannot_stand_in_for_the_digest() -> None:
    with Registry.open("sqlite://") as registry:
        math = give(registry, "math")
        registry.mark(math, "trained", {"claim_digest": "0" * 64, "nested": {"a": [1.5, None, True, "\n"]}})
        assert registry.events()[-1].detail["claim_digest"] == math.digest
        assert check(registry).ok


@pytest.mark.parametrize(
    "geometry",
    [
        dataclasses.replace(GEOMETRY, model="a\nb"),
        dataclasses.replace(GEOMETRY, model="x" * 1001),
        dataclasses.replace(GEOMETRY, model=""),
        dataclasses.replace(GEOMETRY, model="\ud800"),
        dataclasses.replace(GEOMETRY, model_type="\x1b[2J"),
        dataclasses.replace(GEOMETRY, matrices=(Matrix("h.0.a\tb", "x", 4, 4),)),
    ],
)
def test_names_that_could_not_be_exported_are_not_registered(geometry: Geometry) -> None:
    with Registry.open("sqlite://") as registry:
        with pytest.raises(UsageError, match="use printable text of at most 1000 characters") as caught:
            allocate(registry, geometry, ["a"], rank=2, target_modules=[geometry.matrices[0].kind])
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
        assert registry.models() == {}


def test_an_axis_beyond_all_models_is_not_registered() -> None:
    with Registry.open("sqlite://") as registry, registry.transaction() as ledger:
        with pytest.raises(UsageError, match=r"h\.0\.a has an axis longer than 16777216"):
            ledger.register(Geometry("wide", "x", (Matrix("h.0.a", "x", 4, 2**24 + 1),)))
        ledger.register(Geometry("wide", "x", (Matrix("h.0.a", "x", 4, 2**24),)))


def forged(registry: Registry, action: str, task: str, digest: str) -> None:
    """A line that an older multisbora wrote, whose digests were made another way."""
    with registry.transaction() as ledger:
        ledger.connection.exec_driver_sql(
            "INSERT INTO events (at, actor, action, model, composition, task, detail) VALUES "
            f"('2026-01-01T00:00:00+00:00', 'me', '{action}', 'tiny', 'default', '{task}', "
            f"'{json.dumps({'claim_digest': digest})}')"
        )


def test_digests_of_a_task_in_its_present_life(store_url: str) -> None:
    with Registry.open(store_url) as registry:

        def known(task: str) -> frozenset[str]:
            with registry.reading() as reader:
                return digests(reader, "tiny", task)

        assert known("math") == frozenset()
        first = give(registry, "math")
        assert known("math") == {first.digest}
        forged(registry, "trained", "math", "old" * 20)
        forged(registry, "merge", "math", "no" * 32)  # says nothing of what the task holds
        assert known("math") == {first.digest, "old" * 20}
        give(registry, "math", composition="b")
        registry.release("tiny", "math", "default")
        registry.rename("tiny", "math", "sums")
        assert known("math") == frozenset()
        assert known("sums") == {first.digest, "old" * 20}
        # A new life under the old name, and under the same.
        second = give(registry, "math", rank=2)
        assert known("math") == {second.digest}
        registry.release("tiny", "sums")
        assert known("sums") == frozenset()
        third = give(registry, "sums", rank=3)
        assert known("sums") == {third.digest}


def test_digests_with_a_history_that_is_damaged(store_url: str) -> None:
    with Registry.open(store_url) as registry:
        held = give(registry, "math")
        with registry.transaction() as ledger:
            ledger.connection.exec_driver_sql(
                "INSERT INTO events (at, actor, action, model, detail) VALUES ('x', 'y', 'z', 'tiny', '{')"
            )
        with registry.reading() as reader:
            assert digests(reader, "tiny", "math") == {held.digest}
