"""Runs that are kept: one JSON file each, named by what it is and a digest of all that decides it.

What is there is not done again, so a study that was killed goes on where it was, and one that asks for more does no
more than that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
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
        """The name of its file, and of a folder where it has one."""
        told = [self.kind, dict(self.spec), [run.key for run in self.needs]]
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:10]
        return "-".join([self.kind, *re.findall(r"[\w.+]+", self.name), digest])


class Store:
    """The runs that were done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, Answer] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def has(self, run: Run) -> bool:
        return run.key in self._known or self._path(run).is_file()

    def read(self, run: Run) -> Answer:
        """{"seconds": wall time, "result": what the work answered}.

        Raises:
            KeyError: it was not done.
        """
        if run.key not in self._known:
            try:
                self._known[run.key] = json.loads(self._path(run).read_text(encoding="utf-8"))
            except FileNotFoundError:
                raise KeyError(run.key) from None
        return self._known[run.key]

    def result(self, run: Run) -> Answer:
        found: Answer = self.read(run)["result"]
        return found

    def write(self, run: Run, result: Answer, seconds: float) -> None:
        told = {"kind": run.kind, "name": run.name, "spec": dict(run.spec), "needs": [need.key for need in run.needs]}
        text = json.dumps({**told, "seconds": round(seconds, 2), "result": result}, indent=1)
        partial = self._path(run).with_suffix(".partial")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(self._path(run))

    def _path(self, run: Run) -> Path:
        return self.folder / f"{run.key}.json"


def in_order(runs: Iterable[Run]) -> Iterator[Run]:
    """Every run once, those that it needs before it."""
    seen: set[str] = set()

    def walk(run: Run) -> Iterator[Run]:
        if run.key not in seen:
            seen.add(run.key)
            for need in run.needs:
                yield from walk(need)
            yield run

    for run in runs:
        yield from walk(run)


def work_off(
    plan: Callable[[], Iterable[Run]], store: Store, perform: Callable[[Run, int], Answer], workers: int = 2
) -> dict[str, str]:
    """Do what a plan asks for and is not there yet, `workers` runs at a time, with an equal share of the cores each.

    The plan is asked again after each run, since what comes next may hang on what was found. A run that fails takes
    those that need it with it, and no others.

    Args:
        perform: does one run, with so many threads.

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
                for run in in_order(plan()):
                    if len(busy) >= workers:
                        break
                    ready = run.key not in held and run.key not in failed and not store.has(run)
                    if ready and all(store.has(need) for need in run.needs):
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
                        store.write(run, future.result(), seconds)
                        say(f"{run.kind} {run.name}: done in {seconds:.0f} s")
                    except Exception as error:  # whatever it is, other runs have nothing to do with it
                        failed[run.key] = " ".join(f"{type(error).__name__}: {error}".split())
                        say(f"{run.kind} {run.name}: FAILED after {seconds:.0f} s: {failed[run.key]}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def say(words: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {words}", file=sys.stderr, flush=True)
