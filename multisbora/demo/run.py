"""`multisbora demo`: a project of its own in a folder, and the very commands that a user would type in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import MultisboraError, UsageError, VerificationError
from ..hub import DEMO_MODEL, find_base
from ..project import PROJECT_FILE, Project
from ..resources import tasks_dir
from .data import write_demo_data

TASKS = ("math", "commonsense")
_PROGRESS_SECONDS = 20
_MEASURED_ROWS = 32  # a task
_TEST_ROWS = 80  # a task, of the nearly 300 that there are: the whole demo is to end within ten minutes on two cores


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Scores by task and model: `{task: {"base" | "own adapter" | "merged": {"score", "nll", "n"}}}`."""

    folder: Path
    scores: dict[str, dict[str, dict[str, float]]]
    verified: bool
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}

    def lines(self) -> list[str]:
        """The table, and where everything lies."""
        models = list(next(iter(self.scores.values())))
        lines = ["", f"{'':<14}" + "".join(f"{model:>22}" for model in models)]
        lines.append(f"{'task':<14}" + f"{'score      NLL':>22}" * len(models))
        for task, scores in self.scores.items():
            cells = (f"{scores[m]['score']:>7.1%}  {scores[m]['nll']:>7.3f}" for m in models)
            lines.append(f"{task:<14}" + "".join(f"{cell:>22}" for cell in cells))
        folder = self.folder
        asked = ", ".join(f"{row['base']['n']} {task}" for task, row in self.scores.items())
        return [
            *lines,
            "",
            f"{self.seconds / 60:.1f} minutes; scores on {asked} questions that no training row contains",
            f"project        {folder}  (cd there: every multisbora command works in it)",
            f"recipes, data  {folder / 'tasks'}, {folder / 'data'}",
            f"adapters       {', '.join(str(folder / 'adapters' / task) for task in self.scores)}",
            f"merged model   {folder / 'merged'}  (plain safetensors, with its receipt; proven by `multisbora verify`)",
        ]


def run_demo(folder: Path, say: Callable[[str], None]) -> DemoResult:
    """Two tasks trained apart on the demo's model, merged, verified and scored. Goes on where an earlier run stopped.

    Raises:
        UsageError: the folder holds something else.
        MultisboraError: a command failed; its log says why.
    """
    started = time.monotonic()
    _make_project(folder)
    base = find_base(DEMO_MODEL, say)
    say(f"base model {DEMO_MODEL}: {base}")
    demo = _Commands(folder, say)
    both = ",".join(TASKS)
    if not (folder / "adapters").exists():
        demo.run("measure", "--tasks", both, "--rows", str(_MEASURED_ROWS))
    demo.run("allocate", "--tasks", both)
    untrained = [task for task in TASKS if not (folder / "adapters" / task).is_dir()]
    if untrained:
        demo.side_by_side([("train", "--task", task) for task in untrained], progress=untrained)
    if not (folder / "merged").is_dir():
        demo.run("merge", "--output", "merged")
    proof = json.loads(demo.run("verify", "merged", "--json"))
    scored = ("--limit", str(_TEST_ROWS), "--json")
    answers = demo.side_by_side(
        [
            ("eval", DEMO_MODEL, "--tasks", both, *scored),
            ("eval", "merged", "--tasks", both, "--record", *scored),
            *(("eval", f"adapters/{task}", "--tasks", task, *scored) for task in TASKS),
        ]
    )
    base_scores, merged_scores, *own_scores = (json.loads(answer)["tasks"] for answer in answers)
    scores = {
        task: {"base": base_scores[task], "own adapter": own[task], "merged": merged_scores[task]}
        for task, own in zip(TASKS, own_scores, strict=True)
    }
    kept = {t: {m: {k: s[k] for k in ("score", "nll", "n")} for m, s in row.items()} for t, row in scores.items()}
    return DemoResult(folder, kept, proof["ok"], round(time.monotonic() - started, 1))


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something else than a demo.

    Raises:
        UsageError: it does.
    """
    if folder.exists() and not (folder / PROJECT_FILE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} holds something else than a demo: name another folder with --output")


def _make_project(folder: Path) -> None:
    check_folder(folder)
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        shutil.copyfile(tasks_dir() / "demo" / f"{task}.yaml", folder / "tasks" / f"{task}.yaml")
    write_demo_data(folder / "data")
    if not (folder / PROJECT_FILE).is_file():
        Project(model=DEMO_MODEL).write(folder)


class _Commands:
    """Runs `multisbora ...` in the demo's folder, each command shown as it would be typed, with a log of its own."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self.logs = folder / "logs"
        self.logs.mkdir(exist_ok=True)

    def run(self, *arguments: str, threads: int | None = None) -> str:
        """Standard output of one command."""
        self.say(f"$ multisbora {' '.join(arguments)}")
        log = self.logs / ("-".join(a.replace("/", "-") for a in arguments if not a.startswith("--"))[:80] + ".log")
        environment = dict(os.environ)
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        with log.open("w", encoding="utf-8") as stderr:
            done = subprocess.run(
                [sys.executable, "-m", "multisbora", *arguments],
                cwd=self.folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        if done.returncode:
            kind = VerificationError if done.returncode == VerificationError.exit_code else MultisboraError
            last = (log.read_text(encoding="utf-8").strip().splitlines() or ["it said nothing"])[-1]
            raise kind(f"`multisbora {' '.join(arguments)}` failed: {last.removeprefix('multisbora: ')} ({log})")
        return done.stdout

    def side_by_side(self, commands: list[tuple[str, ...]], progress: list[str] | None = None) -> list[str]:
        """Commands that need nothing of each other, as many at a time as there are cores, two at most."""
        at_once = max(1, min(2, os.cpu_count() or 1, len(commands)))
        threads = max(1, (os.cpu_count() or 1) // at_once)
        with ThreadPoolExecutor(at_once) as pool:
            futures = [pool.submit(self.run, *command, threads=threads) for command in commands]
            shown = time.monotonic()
            while not all(future.done() for future in futures):
                time.sleep(0.2)
                if progress and time.monotonic() - shown > _PROGRESS_SECONDS:
                    shown = time.monotonic()
                    self.say("; ".join(filter(None, map(self._progress, progress))) or "loading the base model")
            return [future.result() for future in futures]

    def _progress(self, task: str) -> str:
        metrics = self.folder / "adapters" / f"{task}.run" / "metrics.jsonl"
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
        if not lines:
            return ""
        last = json.loads(lines[-1])
        return f"{task}: step {last['step']}, loss {last['loss']:.3f}, {last['tokens_per_second']:.0f} tokens/s"
