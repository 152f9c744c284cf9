"""What a person sees of tasks that are trained: a live table on a terminal, else a line for each change of state."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .run import METRICS_FILE
from .workers import WORKER_FILE, Job

_TAIL_BYTES = 4096  # of the metrics: some ten of their lines
_COLUMNS = ("task", "state", "node", "step", "loss", "tokens/s", "elapsed")


@dataclass(slots=True)
class _Row:
    state: str = "waiting"
    node: str = ""
    since: float | None = None
    seconds: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)


class Board:
    """One row a task. Where its process is and how far it has come is read from the folder of its run."""

    def __init__(self, jobs: Sequence[Job], say: Callable[[str], None]) -> None:
        self._jobs, self._say = {job.task: job for job in jobs}, say
        self._rows = {job.task: _Row() for job in jobs}
        self._live: Any = None

    def __enter__(self) -> Board:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            # stdout is for the result, so nothing of the table goes there.
            self._live = Live(get_renderable=self._table, console=Console(stderr=True), redirect_stdout=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def look(self, running: Sequence[Job]) -> None:
        """Read how far the jobs are whose processes were asked for. They may still wait for room."""
        for job in running:
            row = self._rows[job.task]
            worker = _read(job.folder / job.run / WORKER_FILE)
            if row.since is None and worker.get("token") == job.token:
                row.state, row.node, row.since = "training", str(worker.get("host")), time.monotonic()
                self._tell(f"{job.task}: training on {row.node}, its output goes to {job.log}")
            if row.since is not None:
                row.metrics = _last_metrics(job.folder / job.run / METRICS_FILE) or row.metrics

    def killed(self, job: Job, by: str, retries: int) -> None:
        """A process has died and will be started again."""
        self._rows[job.task] = _Row(state="waiting again", metrics=self._rows[job.task].metrics)
        self._tell(f"{job.task}: its process was killed ({by}), retry {job.attempt} of {retries}", loud=True)

    def ended(self, job: Job, state: str, error: str | None, result: Mapping[str, Any]) -> None:
        """A task is done with, well or not."""
        row = self._rows[job.task]
        row.state = state
        row.seconds = time.monotonic() - row.since if row.since is not None else 0.0
        if error is not None:
            self._tell(f"{job.task}: failed: {error} (log: {job.log})", loud=True)
            return
        row.metrics |= {"step": result.get("steps", row.metrics.get("step"))}
        loss = result.get("loss")
        what = f", {result['steps']} steps" + (f", loss {loss:.4f}" if loss is not None else "") if result else ""
        self._tell(f"{job.task}: trained{what}")

    def _tell(self, line: str, loud: bool = False) -> None:
        """A line, which the table makes superfluous unless it is `loud`."""
        if self._live is None or loud:
            self._say(line)

    def _table(self) -> Any:
        from rich.table import Table

        table = Table(*_COLUMNS, box=None, pad_edge=False)
        for task, row in self._rows.items():
            step, total = row.metrics.get("step"), self._jobs[task].max_steps
            elapsed = row.seconds if row.seconds is not None or row.since is None else time.monotonic() - row.since
            table.add_row(
                task,
                row.state,
                row.node,
                "" if step is None else f"{step}/{total}" if total else str(step),
                _figure(row.metrics.get("loss"), ".4f"),
                _figure(row.metrics.get("tokens_per_second"), ",.0f"),
                "" if elapsed is None else f"{int(elapsed) // 60}:{int(elapsed) % 60:02d}",
            )
        return table


def _figure(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _last_metrics(path: Path) -> dict[str, Any]:
    """The newest value of every metric. A file that is being written may end in half a line."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return {}
    found: dict[str, Any] = {}
    for line in lines:
        try:
            found |= json.loads(line)
        except (ValueError, TypeError):
            continue
    return found
