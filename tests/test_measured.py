"""Moments in a registry: kept, read again, renamed, told of, and never in the way of claims."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from commands import refused

from multisbora.allocator import allocate
from multisbora.errors import RegistryError
from multisbora.geometry import Geometry, Matrix
from multisbora.moments import Moments, Site
from multisbora.registry import Registry, snapshot
from multisbora.registry.audit import check
from multisbora.registry.measured import Measured

GEOMETRY = Geometry(
    "tiny",
    "llama",
    tuple(
        Matrix(f"layers.{layer}.{name}", f"layers.{layer}.{name}.weight", *shape)
        for layer in range(2)
        for name, shape in {"q_proj": (8, 16), "down_proj": (12, 16)}.items()
    ),
)
Q0 = "layers.0.q_proj"


def made(task: str = "math", *, seed: int = 0, size: int = 5, **changes: Any) -> Moments:
    generator = np.random.default_rng(seed)
    sites = {}
    for matrix in GEOMETRY.matrices:
        x = generator.normal(size=(30, matrix.in_features)).astype(np.float32)
        channels = np.sort(generator.permutation(matrix.in_features)[:size]).astype(np.int32)
        block = x[:, channels].T @ x[:, channels]
        response = generator.random(matrix.out_features).astype(np.float32)
        sites[matrix.module] = Site((x**2).sum(0), response, channels, (block + block.T) / 2)
    head: dict[str, Any] = {"task": task, "base_fingerprint": "blake3:1", "geometry_digest": GEOMETRY.digest}
    return Moments(**(head | {"rows": 30, "tokens": 300, "sites": sites} | changes))


def keep(registry: Registry, *found: Moments, geometry: Geometry = GEOMETRY) -> None:
    with registry.transaction() as ledger:
        ledger.register(geometry)
        for moments in found:
            ledger.keep_moments(geometry.model, moments)


def same(one: Moments | None, other: Moments) -> bool:
    return one is not None and one.to_bytes() == other.to_bytes()


def test_kept_and_read_again(store_url: str) -> None:
    with Registry.open(store_url) as registry:
        assert registry.moments("tiny", "math") is None and registry.measured("tiny") == {}
        keep(registry, made(), made("law", seed=1, size=0, source="text"))
        assert check(registry).problems == ()
    with Registry.open(store_url) as registry:
        assert same(registry.moments("tiny", "math"), made())
        assert same(registry.moments("tiny", "law"), made("law", seed=1, size=0, source="text"))
        assert same(registry.moments("tiny", "math", channels=False), made().without_blocks())
        assert registry.moments("tiny", "code") is None and registry.moments("huge", "math") is None
        assert registry.measured("tiny") == {
            "law": Measured(30, 300, "text", "blake3:1", 4, 0),
            "math": Measured(30, 300, "task", "blake3:1", 4, 20),
        }
        assert registry.measured("huge") == {}


def test_measured_again_takes_the_place(store_url: str) -> None:
    with Registry.open(store_url) as registry:
        keep(registry, made(), made("law", seed=1))
        later = made(seed=2, size=3, rows=5, base_fingerprint="blake3:2")
        part = Moments(
            **{f: getattr(later, f) for f in ("task", "base_fingerprint", "geometry_digest", "rows", "tokens")},
            sites={Q0: later.sites[Q0]},
        )
        keep(registry, part)
        assert same(registry.moments("tiny", "math"), part)
        assert same(registry.moments("tiny", "law"), made("law", seed=1))
        assert registry.measured("tiny")["math"] == Measured(5, 300, "task", "blake3:2", 1, 3)


def test_nothing_is_kept_of_a_transaction_that_is_taken_back(store_url: str) -> None:
    with Registry.open(store_url) as registry:
        keep(registry, made())
        with registry.transaction(dry_run=True) as ledger:
            ledger.keep_moments("tiny", made(seed=1))
        assert same(registry.moments("tiny", "math"), made())


def test_moments_of_other_matrices(store_url: str) -> None:
    with Registry.open(store_url) as registry:
        with registry.transaction(dry_run=True) as ledger:
            refused(lambda: ledger.keep_moments("tiny", made()), RegistryError, "'tiny' is not in the registry")
        keep(registry, made())
        odd = (
            made(geometry_digest="0" * 64),
            made(sites={"layers.7.q_proj": made().sites[Q0]}),
            made(sites={Q0: made().sites["layers.0.down_proj"]}),
        )
        for moments in odd:
            words = "multisbora measure --tasks math"
            refused(lambda moments=moments: keep(registry, moments), RegistryError, "other matrices", words)  # type: ignore[misc]
        assert same(registry.moments("tiny", "math"), made())


def test_they_stay_when_claims_go_and_follow_a_task_to_its_new_name(store_url: str) -> None:
    with Registry.open(store_url) as registry:
        allocate(registry, GEOMETRY, ["math", "law"], rank=2, target_modules="all-linear")
        keep(registry, made(), made("sums", seed=3))
        registry.release("tiny", "law")
        registry.rename("tiny", "math", "sums")
        assert registry.moments("tiny", "math") is None
        assert same(registry.moments("tiny", "sums"), made("sums"))
        registry.release("tiny", "sums")
        assert same(registry.moments("tiny", "sums"), made("sums"))
        allocate(registry, GEOMETRY, ["law"], rank=2, target_modules="all-linear")
        registry.rename("tiny", "law", "sums")  # which was never measured, so what there is of that name stays
        assert same(registry.moments("tiny", "sums"), made("sums"))
        assert check(registry).problems == ()


def test_forgotten(store_url: str) -> None:
    with Registry.open(store_url) as registry:
        keep(registry, made(), made("law", seed=1))
        with registry.transaction() as ledger:
            for task, model in (("code", "tiny"), ("math", "huge")):
                refused(
                    lambda m=model, t=task: ledger.forget_moments(m, t), RegistryError, f"{task!r} was not measured"
                )  # type: ignore[misc]
            ledger.forget_moments("tiny", "math")
        assert registry.moments("tiny", "math") is None and registry.measured("tiny").keys() == {"law"}
        assert same(registry.moments("tiny", "law"), made("law", seed=1)) and check(registry).problems == ()


def test_an_export_leaves_them_out(store_url: str, tmp_path: Path) -> None:
    with Registry.open(store_url) as registry:
        allocate(registry, GEOMETRY, ["math"], rank=2, target_modules="all-linear")
        before = snapshot.dumps(snapshot.export(registry))
        keep(registry, made())
        assert snapshot.dumps(snapshot.export(registry)) == before
        assert [event.action for event in registry.events()] == ["register", "allocate"]
    with Registry.open(f"sqlite:///{tmp_path / 'other.db'}") as other:
        snapshot.load(other, before)
        assert other.measured("tiny") == {} and other.task("tiny", "math")


# Damage, past the API.

DAMAGE = {
    "energy": "UPDATE moments SET energy = substr(energy, 5)",
    "response": "UPDATE moments SET response = x''",
    "channels": "UPDATE moments SET channels = substr(channels, 1, 19)",
    "block": "UPDATE moments SET block = substr(block, 5)",
    "a number": "UPDATE moments SET energy = 7",
    "text": "UPDATE moments SET energy = printf('%*s', length(energy), 'x')",
    "no text": "UPDATE moments SET energy = CAST(zeroblob(length(energy) - 1) || x'ff' AS TEXT)",
    "NaN": "UPDATE moments SET response = CAST(x'0000c07f' || substr(response, 5) AS BLOB)",
    "a negative square": "UPDATE moments SET energy = CAST(x'000080bf' || substr(energy, 5) AS BLOB)",
    "channels that fall": "UPDATE moments SET channels = CAST(x'0f000000' || substr(channels, 5) AS BLOB)",
    "rows": "UPDATE measurements SET row_count = 'many'",
    "a matrix of nobody": "UPDATE moments SET matrix_id = 99 WHERE matrix_id = 1",
}


@pytest.fixture
def filled(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path / 'registry.db'}"
    with Registry.open(url) as registry:
        allocate(registry, GEOMETRY, ["math"], rank=2, target_modules="all-linear")
        keep(registry, made())
    return url


def write(url: str, statement: str, *values: object) -> None:
    with sa.create_engine(url, poolclass=sa.NullPool).begin() as connection:
        connection.exec_driver_sql(statement, tuple(values))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_moments_are_named(filled: str, damage: str) -> None:
    write(filled, DAMAGE[damage])
    with Registry.open(filled) as registry:
        problems = check(registry).problems
        assert problems and any("moments of task" in line and "measure --tasks math" in line for line in problems)
        if damage == "no text":  # SQLite's driver fails on it
            refused(lambda: registry.moments("tiny", "math"), RegistryError, "see multisbora registry check")
        elif damage != "a matrix of nobody":
            refused(lambda: registry.moments("tiny", "math"), RegistryError, "moments of task", "math", "damaged")
        # Claims are not what is broken.
        assert registry.task("tiny", "math") and snapshot.export(registry)
        keep(registry, made())
        assert check(registry).problems == () and same(registry.moments("tiny", "math"), made())


def test_values_that_cannot_be(filled: str) -> None:
    write(filled, "UPDATE moments SET energy = ?", np.full(16, np.nan, np.float32).tobytes())
    with Registry.open(filled) as registry:
        refused(
            lambda: registry.moments("tiny", "math"), RegistryError, "not finite", "multisbora measure --tasks math"
        )


@pytest.mark.parametrize("value", ["many", b"1", 2.5])
@pytest.mark.parametrize("column", ["row_count", "token_count"])
def test_counts_that_are_none(filled: str, column: str, value: object) -> None:
    """SQLite takes anything in a column of numbers, and text is above 0."""
    write(filled, f"UPDATE measurements SET {column} = ?", value)
    with Registry.open(filled) as registry:
        refused(lambda: registry.moments("tiny", "math"), RegistryError, "moments of task math are damaged")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE measurements SET source = 'guess'",
        "UPDATE measurements SET row_count = 0",
        "UPDATE measurements SET token_count = -1",
        "INSERT INTO measurements SELECT 9, model_id, task, base_fingerprint, 1, 1, 'task' FROM measurements",
        "INSERT INTO moments SELECT * FROM moments",
    ],
)
def test_what_the_database_refuses(store_url: str, statement: str) -> None:
    with Registry.open(store_url) as registry:
        keep(registry, made())
    with pytest.raises(sa.exc.IntegrityError):
        write(store_url, statement)
