"""What a person sees of tasks that are trained."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest

from multisbora.board import Board
from multisbora.project import Project
from multisbora.workers import WORKER_FILE, Job


def test_a_table_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, said = Terminal(), list[str]()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    project = Project.of(model="base")
    jobs = [Job(project, tmp_path, task, (), max_steps=60) for task in ("adding", "doubling")]
    with Board(jobs, said.append) as board:
        board.look(jobs)
        (tmp_path / jobs[0].run).mkdir(parents=True)
        place = {"token": jobs[0].token, "host": "node-7", "pid": 1}
        (tmp_path / jobs[0].run / WORKER_FILE).write_text(json.dumps(place))
        lines = [{"step": 5, "loss": 2.5, "tokens_per_second": 1234.5}, {"step": 6, "dev_loss": 2.0}]
        metrics = "".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 7, "lo'
        (tmp_path / jobs[0].run / "metrics.jsonl").write_text(metrics)
        board.look(jobs)
        board.ended(jobs[1], "failed", "no rows", {})
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).split("\n")
    last = [line.split() for line in shown if line.strip()][-3:]
    assert last[0] == ["task", "state", "node", "step", "loss", "tokens/s", "elapsed"]
    assert last[1][:6] == ["adding", "training", "node-7", "6/60", "2.5000", "1,234"]
    assert last[2] == ["doubling", "failed", "0:00"]
    assert said == ["doubling: failed: no rows (log: adapters/doubling.log)"]
