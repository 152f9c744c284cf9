"""What a process does that trains one of several tasks, here called in this one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Run

from multisbora import workers
from multisbora.project import Project
from multisbora.run import hold_run
from multisbora.workers import WORKER_FILE, Job


def test_a_job_as_json(project: Path) -> None:
    job = Job(Project.load(composition="other"), project, "adding", ("training.epochs=1",), max_steps=3, cpus=2).again()
    assert Job.from_json(job.to_json()) == job and "\n" not in job.to_json()


def test_an_error_of_a_library_ends_its_task_alone(project: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it said, and where, is in the log; this process keeps its own stdout."""
    assert run("allocate", "--tasks", "adding").code == 0

    def fail(*_: object, **__: object) -> None:
        os.write(1, b"from below\n")
        raise ZeroDivisionError("first\nsecond")

    monkeypatch.setattr(workers, "train_task", fail)
    # pytest has put a file in the place of stdout, for which `work` puts another.
    assert workers.work(Job(Project.load(), project, "adding", ())) == {"error": "ZeroDivisionError: first"}
    log = (project / "adapters" / "adding.log").read_text()
    assert "from below" in log and "Traceback" in log and log.endswith("second\n")
    assert sorted(path.name for path in (project / "adapters").iterdir()) == ["adding.log"]


def test_a_run_that_another_process_holds(project: Path, run: Run) -> None:
    """Neither its log nor what it says of its place is touched."""
    assert run("allocate", "--tasks", "adding").code == 0
    job = Job(Project.load(), project, "adding", ())
    with hold_run(job.run):
        (job.run / WORKER_FILE).write_text("of the other")
        job.log.write_text("of the other")
        assert "adding.run is in use: another process" in workers.work(job)["error"]
    assert (job.run / WORKER_FILE).read_text() == job.log.read_text() == "of the other"


@pytest.mark.parametrize("meanwhile", [None, "of another"])
def test_it_says_where_it_is_and_takes_back_its_own_word(
    meanwhile: str | None, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(Project.load(), project, "adding", ())
    file = job.run / WORKER_FILE

    def fail(*_: object, on_start: Callable[[], None], **__: object) -> None:
        job.run.mkdir()
        on_start()
        found: dict[str, Any] = json.loads(file.read_bytes())
        assert (found["token"], found["pid"]) == (job.token, os.getpid())
        if meanwhile is not None:
            file.write_text(meanwhile)
        raise ValueError

    monkeypatch.setattr(workers, "train_task", fail)
    assert workers.work(job) == {"error": "ValueError: ValueError"}
    assert (file.read_text() if file.exists() else None) == meanwhile


def test_a_task_that_cannot_start_makes_no_run(project: Path, run: Run) -> None:
    assert run("allocate", "--tasks", "adding").code == 0
    Path("data/adding-train.jsonl").write_text("")
    job = Job(Project.load(), project, "adding", ())
    assert "adding-train.jsonl" in workers.work(job)["error"]
    assert not job.run.exists() and "adding-train.jsonl" in job.log.read_text()
