"""Runs that are kept: a line of JSON each in one file, known by what it is and a digest of all that decides it.

What is there is not done again, so a study that was killed goes on where it was, and one that asks for more does no
more than that. The file can be carried to another machine: what runs left behind there, such as adapters, is then made
anew as far as runs that are still to be done need it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

Answer = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training, one tuning, one evaluation.

    Attributes:
        kind: of work.
        name: for people; it says nothing that `spec` and `needs` do not.
        spec: what the result hangs on, beside the runs that come before it; JSON.
        needs: those runs.
    """

    kind: str
    name: str
    spec: Mapping[str, Any]
    needs: tuple[Run, ...] = field(default=(), repr=False)

    @cached_property
    def key(self) -> str:
        """Its name in the file of runs, and that of a folder where it has one."""
        told = [self.kind, dict(self.spec), [run.key for run in self.needs]]
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:10]
        return "-".join([self.kind, *re.findall(r"[\w.+]+", self.name), digest])


class Store:
    """The runs that were done.

    Args:
        path: of the file. Each run that is done adds a line; of two with one key the later counts.
        commit: that the code is of, for people who read the file.
    """

    def __init__(self, path: Path, commit: str = "") -> None:
        self.path, self.commit = path, commit
        self._known: dict[str, Answer] = {}
        text = path.read_bytes() if path.is_file() else b""
        for number, line in enumerate(text.splitlines(), 1):
            try:
                told = json.loads(line)
                self._known[told["key"]] = {"seconds": told["seconds"], "result": told["result"]}
            except (ValueError, KeyError, TypeError):  # a study was killed while it wrote
                say(f"line {number} of {path} holds no run and is passed over")
        self._whole = not text or text.endswith(b"\n")

    def has(self, run: Run) -> bool:
        return run.key in self._known

    def read(self, run: Run) -> Answer:
        """{"seconds": wall time, "result": what the work answered}.

        Raises:
            KeyError: it was not done.
        """
        return self._known[run.key]

    def result(self, run: Run) -> Answer:
        found: Answer = self.read(run)["result"]
        return found

    def write(self, run: Run, result: Answer, seconds: float) -> None:
        told = {"key": run.key, "kind": run.kind, "name": run.name, "spec": dict(run.spec)}
        told |= {"needs": [need.key for need in run.needs], "commit": self.commit}
        told |= {"seconds": round(seconds, 2), "result": result}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("" if self._whole else "\n") + json.dumps(told) + "\n")
        self._whole = True
        self._known[run.key] = {"seconds": told["seconds"], "result": result}


def left(runs: Iterable[Run], store: Store, at_hand: Callable[[Run], bool]) -> dict[str, Run]:
    """{key: run} of what is not ready, what others need before them: runs without a result, of those that they need,
    however far, also the ones whose files are gone, and all in between."""
    found: dict[str, Run] = {}
    seen: set[str] = set()

    def look(run: Run) -> None:
        if run.key not in seen:
            seen.add(run.key)
            for need in run.needs:
                look(need)
            if not store.has(run) or not at_hand(run) or any(need.key in found for need in run.needs):
                found[run.key] = run

    for run in runs:
        if not store.has(run):
            look(run)
    return found


def work_off(
    plan: Callable[[], Iterable[Run]],
    store: Store,
    perform: Callable[[Run, int], Answer],
    workers: int = 2,
    at_hand: Callable[[Run], bool] = lambda run: True,
) -> dict[str, str]:
    """Do what a plan asks for and is not there yet, `workers` runs at a time, with an equal share of the cores each.

    The plan is asked again after each run, since what comes next may hang on what was found. A run that fails takes
    those that need it with it, and no others.

    Args:
        perform: does one run, with so many threads.
        at_hand: whether the files that a run leaves behind for others are there. Where they are not, it is done again
            for them, and its result stays what it was.

    Returns:
        {key of a run that failed: why}.
    """
    failed: dict[str, str] = {}
    busy: dict[Future[Answer], tuple[Run, float]] = {}
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                held = {run.key for run, _ in busy.values()}
                todo = left(plan(), store, at_hand)
                for run in todo.values():
                    if len(busy) >= workers:
                        break
                    ready = run.key not in held and run.key not in failed
                    if ready and not any(need.key in todo for need in run.needs):
                        say(f"{run.kind} {run.name}")
                        busy[pool.submit(perform, run, threads)] = (run, time.monotonic())
                        held.add(run.key)
                if not busy:
                    return failed
                done, _ = wait(busy, return_when=FIRST_COMPLETED)
                for future in done:
                    run, start = busy.pop(future)
                    seconds = time.monotonic() - start
                    try:
                        result = future.result()
                        if not store.has(run):
                            store.write(run, result, seconds)
                        say(f"{run.kind} {run.name}: done in {seconds:.0f} s")
                    except Exception as error:  # whatever it is, other runs have nothing to do with it
                        failed[run.key] = " ".join(f"{type(error).__name__}: {error}".split())
                        say(f"{run.kind} {run.name}: FAILED after {seconds:.0f} s: {failed[run.key]}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def say(words: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {words}", file=sys.stderr, flush=True)
