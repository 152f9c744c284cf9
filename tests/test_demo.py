"""The demo's steps, with commands that answer at once; its parts have their own tests, and it is run by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from multisbora.demo import run as demo
from multisbora.demo.run import TASKS, DemoResult, check_folder, run_demo
from multisbora.errors import MultisboraError, UsageError, VerificationError
from multisbora.hub import DEMO_MODEL
from multisbora.recipe import load


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The commands that the demo runs. Each does just what the next one looks for."""
    seen: list[list[str]] = []

    def answer(command: list[str], cwd: Path, **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", "multisbora"]
        arguments = command[3:]
        seen.append(arguments)
        out = ""
        if arguments[0] == "train":
            (cwd / "adapters" / arguments[2]).mkdir(parents=True)
        elif arguments[0] == "merge":
            (cwd / "merged").mkdir()
        elif arguments[0] == "verify":
            out = json.dumps({"ok": True})
        elif arguments[0] == "eval":
            score = 0.25 if arguments[1] == DEMO_MODEL else 0.75
            tasks = arguments[arguments.index("--tasks") + 1].split(",")
            out = json.dumps({"tasks": {task: {"score": score, "nll": 1.5, "n": 160} for task in tasks}})
        return subprocess.CompletedProcess(command, 0, out)

    monkeypatch.setattr(demo.subprocess, "run", answer)
    monkeypatch.setattr(demo, "find_base", lambda model, say: tmp_path / "base")
    return seen


def test_the_way_of_the_demo(tmp_path: Path, commands: list[list[str]]) -> None:
    said: list[str] = []
    found = run_demo(tmp_path / "demo", said.append)
    assert [c[0] for c in commands[:2]] == ["measure", "allocate"]
    assert sorted(c[2] for c in commands if c[0] == "train") == sorted(TASKS)
    assert [c[0] for c in commands[4:6]] == ["merge", "verify"]
    assert sorted(c[1] for c in commands if c[0] == "eval") == sorted(
        [DEMO_MODEL, "merged", "adapters/math", "adapters/commonsense"]
    )
    assert "$ multisbora merge --output merged" in said
    assert found.verified
    assert found.scores["math"]["base"]["score"] == 0.25
    assert found.scores["math"]["merged"]["score"] == 0.75

    project = yaml.safe_load((tmp_path / "demo" / "multisbora.yaml").read_text())
    assert project["model"] == DEMO_MODEL
    for task in TASKS:
        recipe = load(task, tmp_path / "demo" / "tasks")
        assert all((tmp_path / "demo" / source.path).is_file() for source in (*recipe.train, *recipe.eval.data))

    commands.clear()
    run_demo(tmp_path / "demo", said.append)
    assert not {"measure", "train", "merge"} & {c[0] for c in commands}  # what is there is not made again


def test_the_table(tmp_path: Path) -> None:
    score = {"score": 0.5, "nll": 1.234, "n": 160}
    scores = {task: {"base": score, "own adapter": score | {"score": 0.875}, "merged": score} for task in TASKS}
    lines = DemoResult(tmp_path, scores, True, 300.0).lines()
    heading, row = lines[1], next(line for line in lines if line.startswith("math"))
    assert all(model in heading for model in ("base", "own adapter", "merged"))
    assert row.split() == ["math", "50.0%", "1.234", "87.5%", "1.234", "50.0%", "1.234"]
    text = "\n".join(lines)
    for place in ("tasks", "data", "adapters/math", "adapters/commonsense", "merged"):
        assert str(tmp_path / place) in text
    assert "5.0 minutes" in text


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="something else than a demo"):
        check_folder(tmp_path)
    check_folder(tmp_path / "new")


@pytest.mark.parametrize("code, kind", [(1, MultisboraError), (3, VerificationError)])
def test_a_command_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[MultisboraError]
) -> None:
    def fail(command: list[str], stderr: Any, **_: Any) -> subprocess.CompletedProcess[str]:
        stderr.write("noise\nmultisbora: the reason\n")
        return subprocess.CompletedProcess(command, code, "")

    monkeypatch.setattr(demo.subprocess, "run", fail)
    monkeypatch.setattr(demo, "find_base", lambda model, say: tmp_path)
    with pytest.raises(MultisboraError, match="--rows 32` failed: the reason") as caught:
        run_demo(tmp_path / "demo", lambda message: None)
    assert type(caught.value) is kind
