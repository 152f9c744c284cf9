"""Processes that merge, add, remove and reweight are killed with SIGKILL at random moments, again and again, and after
each kill every file of the checkpoint is compared: it must be exactly the old one or exactly the new one.

Run it with the environment's Python: `.venv/bin/python scripts/stress_merge.py --kills 300`.

The checkpoint has random bf16 weights in shards, of a few MB, so that a process is killed inside of its work and not
before or after it. How long each operation takes is measured first; a kill comes at a random moment of that time. After
it the state is looked at, as the process left it, and counted: whether it is the old one, the new one, or one that has
to be put right. Then a process puts it right, and in every other case is killed, too, up to three times. Last, the
checkpoint is put right without a kill, and every byte of every file, hidden ones included, is compared.

A merge makes a new folder: it must not be there, or be whole. Where it is not, merging again must give it, and sweep
away what the killed process left beside it.

SIGKILL shows that a process may die at any moment. What a machine that loses its power leaves depends on its disk; the
tests show that everything is synced before the next step counts on it.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from synthetic import Shape, write_model, write_task

from multisbora.edit import add, remove, reweight
from multisbora.geometry import from_checkpoint
from multisbora.journal import FOLDER, recover
from multisbora.merge import merge
from multisbora.stream import fingerprint

SHAPE = Shape(layers=4, hidden=256, intermediate=512, heads=4, kv_heads=2, vocabulary=2048)
RANK = 16
PROCESSES = multiprocessing.get_context("forkserver")
LIMIT = 120.0  # seconds that any process may take
Tree = dict[str, str]


@dataclass
class Operation:
    """One kind of work: what it starts from, and what it must end in.

    Attributes:
        before: the folder that it edits; None where it makes one.
        seconds: how long it takes.
        counts: what became of it.
    """

    name: str
    before: Path | None
    work: Callable[..., object]
    arguments: tuple[Any, ...]
    old: Tree
    new: Tree = field(default_factory=dict)
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)


def run_merge(folder: Path, base: Path, adapters: list[Path]) -> None:
    merge(base, adapters, output=folder)


def run_add(folder: Path, adapter: Path) -> None:
    add(folder, adapter, 0.5)


def run_remove(folder: Path, task: str) -> None:
    remove(folder, task)


def run_reweight(folder: Path, adapter: Path) -> None:
    reweight(folder, adapter, -0.5)


def run_recover(folder: Path) -> None:
    recover(folder)


def digests(folder: Path) -> Tree:
    """sha256 of every file, hidden ones included; of a folder that is not there, nothing."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def make_operations(place: Path) -> list[Operation]:
    """A base, its tasks, the checkpoints to start from, and how long everything takes."""
    PROCESSES.set_forkserver_preload(["multisbora.edit", "multisbora.merge", "stress_merge"])
    base = write_model(place / "base", SHAPE, SHAPE.size() // 3)
    mark = fingerprint(base, from_checkpoint(base))
    tasks = {name: write_task(place / name, SHAPE, name, RANK, mark) for name in ("fa0", "fa1", "fb")}
    merged = {}
    for present in (("fa0",), ("fa0", "fa1"), ("fa0", "fb"), ("fa0", "fa1", "fb")):
        merged[present] = place / "-".join(("merged", *present))
        merge(base, [tasks[task] for task in present], output=merged[present])
    found = [
        Operation("merge", None, run_merge, (base, [*tasks.values()]), {}),
        Operation("add fa", merged["fa0", "fb"], run_add, (tasks["fa1"],), {}),
        Operation("add fb", merged["fa0", "fa1"], run_add, (tasks["fb"],), {}),
        Operation("remove fa", merged["fa0", "fa1"], run_remove, ("fa1",), {}),
        Operation("remove fb", merged["fa0", "fb"], run_remove, ("fb",), {}),
        Operation("reweight fa", merged["fa0", "fa1", "fb"], run_reweight, (tasks["fa1"],), {}),
        Operation("reweight fb", merged["fa0", "fb"], run_reweight, (tasks["fb"],), {}),
    ]
    for operation in found:
        times = []
        for number in range(3):
            folder = _fresh(operation, place / "trial", number)
            if operation.before is not None:
                operation.old = digests(folder)
            times.append(attempt(operation.work, (folder, *operation.arguments), None)[1])
            operation.new = digests(folder)
            shutil.rmtree(folder.parent)
        operation.seconds = statistics.median(times)
        assert operation.new != operation.old
    return found


def attempt(work: Callable[..., object], arguments: tuple[Any, ...], seconds: float | None) -> tuple[bool, float]:
    """Do it in a process that is killed so many seconds after it began; whether it was, and how long it lived."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_begin, args=(sender, work, arguments))
    process.start()
    sender.close()
    receiver.recv()
    start = time.perf_counter()
    if seconds is not None:
        process.join(seconds)
        process.kill()
    process.join(LIMIT)
    code = process.exitcode
    if code not in (0, -9):
        process.kill()
        raise RuntimeError(f"{work.__name__} ended with {code}, neither done nor killed")
    return code == -9, time.perf_counter() - start


def _begin(sender: Any, work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    sender.send(None)
    work(*arguments)


def _fresh(operation: Operation, place: Path, number: int) -> Path:
    folder = place / str(number) / "ours"
    folder.parent.mkdir(parents=True)
    if operation.before is not None:
        shutil.copytree(operation.before, folder)
    return folder


def kill_once(operation: Operation, folder: Path, draw: random.Random) -> bool:
    """One kill and what follows; whether everything was right. Tries again until a process is really killed."""
    counts = operation.counts
    moment = draw.uniform(0, 1.1 * operation.seconds)
    killed, lived = attempt(operation.work, (folder, *operation.arguments), moment)
    if not killed:
        operation.seconds = lived  # how fast the machine is at the moment
        counts["was done before"] += 1
        return digests(folder) == operation.new
    counts["kills"] += 1
    if operation.before is None:
        found = digests(folder)
        counts["new" if found == operation.new else "old"] += 1
        counts["left something"] += len(list(folder.parent.iterdir())) > bool(found)
        if not found:
            operation.work(folder, *operation.arguments)
        return digests(folder) == operation.new and [*folder.parent.iterdir()] == [folder]
    left = digests(folder)
    counts["left something"] += left not in (operation.old, operation.new)
    cut_short = (folder / FOLDER).is_dir()
    counts["put back"] += cut_short
    for _ in range(draw.choice((0, 3))):
        if attempt(run_recover, (folder,), draw.uniform(0, 0.3 * operation.seconds))[0]:
            counts["recoveries killed"] += 1
    recover(folder)
    found = digests(folder)
    counts["new" if found == operation.new else "old"] += 1
    return found == operation.new or found == operation.old


def stress(place: Path, kills: int, seed: int, say: Callable[[str], None]) -> tuple[list[Operation], int]:
    """So many kills, spread evenly over the operations; the operations with their counts, and how many went wrong."""
    draw = random.Random(seed)
    operations = make_operations(place)
    wrong = 0
    for number in range(100 * kills):
        operation = min(operations, key=lambda operation: operation.counts["kills"])
        if sum(each.counts["kills"] for each in operations) >= kills:
            break
        folder = _fresh(operation, place / "runs", number)
        if not kill_once(operation, folder, draw):
            wrong += 1
            say(f"run {number}, {operation.name}: neither the old checkpoint nor the new one, see {folder}")
        else:
            shutil.rmtree(folder.parent)
    return operations, wrong


COLUMNS = ("kills", "left something", "put back", "recoveries killed", "old", "new", "was done before")


def lines(operations: list[Operation]) -> list[str]:
    """The counts as a Markdown table."""
    rows = [["operation", "ms", *COLUMNS], ["---", *["---:"] * (1 + len(COLUMNS))]]
    for operation in operations:
        counts = [str(operation.counts[column]) for column in COLUMNS]
        rows.append([operation.name, f"{1000 * operation.seconds:.0f}", *counts])
    rows.append(["all", "", *(str(sum(o.counts[column] for o in operations)) for column in COLUMNS)])
    return [f"| {' | '.join(row)} |" for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work, for example on another disk")
    arguments = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="stress-merge-", dir=arguments.folder))
    operations, wrong = stress(place, arguments.kills, arguments.seed, lambda line: print(line, file=sys.stderr))
    print("\n".join(lines(operations)))
    print(f"\n{wrong} of them ended in neither the old checkpoint nor the new one")
    if not wrong:
        shutil.rmtree(place)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
