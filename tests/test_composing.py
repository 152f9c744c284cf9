"""`multisbora crosstalk`, as a user types it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from builders import edit_json
from commands import Run, assert_refused

from multisbora.deployed import merge_tasks
from multisbora.evaluate import evaluate
from multisbora.project import Project
from multisbora.recipe import load


def test_crosstalk(trained: Path, run: Run) -> None:
    found = run("crosstalk", "--tasks", "adding,doubling", "--rows", "5", "--worst", "2", "--plot", "map.png")
    assert found.code == 0, found
    assert "task adding has no dev rows" in found.err and "%" not in found.err
    lines = found.out.splitlines()
    assert lines[-1] == "wrote map.png" and Path("map.png").is_file()
    tables = [line for line in lines if line.startswith("adding ")]
    assert len(tables) == 1 + 4 + 2  # losses, four squares, two matrices
    assert sum("100.0%" in line for line in tables) == 2
    assert sum("_proj" in line for line in lines) == 4
    again = run("crosstalk", "--rows", "5", "--json")  # all of the composition
    shown = again.json
    assert again.code == 0 and list(shown["tasks"]) == ["adding", "doubling"]
    assert f"{shown['tasks']['adding']['nll']['merged']:.4f}" in tables[0]
    assert len(shown["worst"]) == 10 and len(shown["matrices"]) == 6
    assert shown["tasks"]["adding"]["rows"] == 5


def test_crosstalk_is_checked_and_not_measured_by_a_dry_run(trained: Path, run: Run) -> None:
    asked = ("crosstalk", "--rows", "5", "--plot", "map.png")
    would = run(*asked, "--dry-run")
    assert would.code == 0 and not Path("map.png").exists()
    assert would.out == "would send 50 rows of adding, doubling through the model and write map.png\n"
    told, found = run(*asked, "--json", "--dry-run").json, run(*asked, "--json").json
    assert told == {"passes": 50, "tasks": {"adding": {"weight": 1.0}, "doubling": {"weight": 1.0}}}
    assert found["passes"] == told["passes"]
    assert_refused(run("crosstalk", "--tasks", "adding", "--dry-run"), 2, "crosstalk is between tasks")
    assert_refused(run(*asked, "--dry-run"), 1, "map.png")  # which is there now


def test_tuned_by_channel_merged_proven_and_taken_out_again(trained: Path, run: Run) -> None:
    tuned = ("tune", "--by", "channel", "--rows", "8", "--steps", "4", "--slack", "5", "--output", "tuned")
    would = run(*tuned, "--dry-run")
    assert would.code == 0 and "would tune" in would.out and "write tuned" in would.out and not Path("tuned").exists()
    made = run(*tuned)
    assert made.code == 0, made.err
    assert "by channel" in made.out and "`multisbora merge --adapters tuned`" in made.out
    assert sorted(path.name for path in Path("tuned").iterdir()) == ["adding", "doubling"]
    before, record = (json.loads((Path(of) / "adding/training.json").read_bytes()) for of in ("adapters", "tuned"))
    tuned_by = {"by": "channel", "tasks": ["adding", "doubling"], "steps": 4, "follow": "answers", "ridge": None}
    assert record == before | {"tuned": tuned_by}
    merged = run("merge", "--adapters", "tuned", "--output", "merged")
    assert merged.code == 0 and "`multisbora verify merged --adapters tuned`" in merged.out
    assert run("verify", "merged", "--adapters", "tuned").code == 0
    own = run("verify", "merged")  # with the project's adapters, which were not merged
    assert own.code == 3 and "first at" in own.err and "other adapters were merged than" in own.err
    both = run("verify", "merged", "--adapters", "tuned", "--adapter", "tuned/adding")
    assert run("verify", "merged", "--quick", "--adapters", "tuned").code == 2
    assert_refused(both, 2, "--adapter names adapters one by one", "give one of them")
    assert run("remove", "merged", "--task", "adding").code == 0
    assert run("merge", "--adapters", "tuned", "--tasks", "doubling", "--output", "one").code == 0
    files = [path.name for path in Path("one").glob("*.safetensors")]
    assert files and all((Path("merged") / name).read_bytes() == (Path("one") / name).read_bytes() for name in files)
    assert_refused(run("merge", "--adapters", "none", "--output", "m"), 1, "none/adding does not exist")
    edit_json(Path("tuned/doubling/training.json"), tuned=tuned_by | {"ridge": 0.01})
    again = run("merge", "--method", "corrected", "--adapters", "tuned", "--output", "m")
    assert_refused(again, 2, "tuned/doubling has corrected values", "no second time")


def test_losses_are_those_of_the_merged_checkpoint(trained: Path, run: Run) -> None:
    """On rows that `eval` sees too: the test rows of this project are its training rows here."""
    patterns = "".join(f", layers.{place}.mlp.down_proj: 0.5" for place in (0, 1)) + ", q_proj: 1, v_proj: 1"
    Path("many.yaml").write_text(f"adding: {{default: 0.5{patterns}}}\n")
    assert "0.5 but for 4 patterns" in run("crosstalk", "--rows", "1", "--weights-from", "many.yaml").out
    Path("weights.yaml").write_text("adding: 0.5\nother: 3\n")
    weights = ("--weights-from", "weights.yaml", "--weight", "doubling:q_proj=-1")
    rows = ("--set", "train=data/same.jsonl", "--set", "eval.data=data/none.jsonl")
    shutil.copy("data/adding-test.jsonl", "data/same.jsonl")
    found = run("crosstalk", *weights, *rows, "--json")
    assert "weights.yaml: the weights of other are not used" in found.err
    assert [task["weight"] for task in found.json["tasks"].values()] == [0.5, {"default": 1.0, "q_proj": -1.0}]
    Path("foreign.yaml").write_text("other: 3\n")
    foreign = run("crosstalk", "--rows", "1", "--weights-from", "foreign.yaml")
    assert_refused(foreign, 2, "foreign.yaml has weights of other, and for none of adding, doubling", progress=True)
    Path("small.yaml").write_text("adding: 1e-05\n")
    small = run("crosstalk", "--rows", "1", "--weights-from", "small.yaml", *rows, "--json").json
    assert small["tasks"]["adding"]["weight"] == 1e-05
    project = Project.load()
    given = (["doubling:q_proj=-1"], Path("weights.yaml"), Path("merged"))
    merge_tasks(project, None, *given, None, None, None, False, False, lambda message: None)
    scores = evaluate("merged", [load("adding", Path("tasks"))]).tasks["adding"]
    assert found.json["tasks"]["adding"]["nll"]["merged"] == pytest.approx(scores.nll, rel=1e-5)
    assert found.json["tasks"]["adding"]["rows"] == scores.n


def test_what_cannot_be_measured(trained: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    both = ("crosstalk", "--tasks", "adding,doubling")
    assert_refused(run("crosstalk", "--tasks", "adding"), 2, "got adding: name at least two")
    assert_refused(run(*both, "--weight", "cooking=1"), 2, "'cooking'")
    assert_refused(run(*both, "--weights-from", "no.yaml"), 2, "no.yaml")
    assert_refused(run(*both, "--plot", "map.pdf"), 2, "ends in .png")
    assert_refused(run("crosstalk", "--tasks", "adding,cooking"), 1, "adapters/cooking does not exist", "train --task")
    assert run(*both, "--rows", "0").code == 2
    shutil.rmtree("data")
    assert_refused(run(*both), 1, "adding-train.jsonl does not exist")
    Path("tasks/adding.yaml").unlink()
    assert_refused(run(*both), 2, "unknown task 'adding'")
    shutil.rmtree("adapters/doubling")
    assert_refused(run("crosstalk"), 1, "adapters/doubling does not exist")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert_refused(run(*both, "--plot", "map.png"), 2, 'pip install "multisbora[plot]"')
