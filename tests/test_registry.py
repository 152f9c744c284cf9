"""The store of claims through its API, on both databases: what it keeps, gives back and remembers."""

from __future__ import annotations

import dataclasses

import pytest

from multisbora.allocator import allocate
from multisbora.errors import AllocationError, RegistryError, UsageError
from multisbora.geometry import Geometry, Matrix
from multisbora.registry import Registry
from multisbora.registry.claims import TaskClaims

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
        with pytest.raises(RegistryError), registry.reading() as ledger:
            ledger.release("tiny", "math")
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
        with pytest.raises(RegistryError, match=r"in composition 'other' \(it has some in default\)"):
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
