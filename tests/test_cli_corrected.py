"""Corrected merges as a user types them: measured, merged, proven, and tasks in and out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from builders import edit_json
from commands import Run, assert_refused
from faults import tree

from multisbora.kept import FOLDER
from multisbora.lifecycle import required
from multisbora.project import Project


def test_measured_merged_and_edited(trained: Path, run: Run) -> None:
    missing = run("merge", "--output", "both", "--method", "corrected")
    assert_refused(missing, 1, "adding,doubling has none", "multisbora measure --tasks adding,doubling", progress=True)
    assert not Path("both").exists()
    assert run("measure", "--tasks", "adding,doubling").code == 0
    planned = run("merge", "--output", "both", "--method", "corrected", "--dry-run")
    assert "would write both" in planned.out and not Path("both").exists()

    assert run("merge", "--output", "plain").code == 0
    merged = run("merge", "--output", "both", "--method", "corrected", "--weight", "doubling=0.5", "--json").json
    assert merged["corrected"]["ridge"] == 0.01
    assert {*merged["corrected"]["tasks"]} == {"adding", "doubling"}
    assert (Path("both") / FOLDER).is_dir()
    project = Project.load()
    with required(project) as registry, registry.reading() as reader:
        details = [event.detail for event in reader.events() if event.action == "merge"]
    assert [detail.get("ridge") for detail in details] == [None, 0.01]
    assert run("verify", "both").code == 0
    assert run("verify", "both", "--quick").code == 0

    before = tree(Path("both"))
    taken = run("remove", "both", "--task", "doubling")
    assert taken.code == 0 and "took doubling out of both" in taken.out
    assert run("verify", "both").code == 0
    assert run("add", "both", "--task", "doubling", "--weight", "doubling=0.5").code == 0
    assert tree(Path("both")) == before
    assert run("reweight", "both", "--task", "doubling", "--weight", "doubling=2").code == 0
    assert run("verify", "both").code == 0
    assert tree(Path("both")) != before

    assert_refused(run("diff", "both", "--output", "patch"), 1, "is a corrected merge")
    receipt = Path("both") / "multisbora_receipt.json"
    edit_json(receipt, corrected=json.loads(receipt.read_text())["corrected"] | {"ridge": 1.0})
    wrong = run("verify", "both")
    assert wrong.code == 3
    assert "corrected values are no solution" in wrong.err


def test_flags_that_do_not_fit(trained: Path, run: Run) -> None:
    assert_refused(run("merge", "--output", "o", "--ridge", "0.1"), 2, "a plain merge knows no ridge", progress=True)
    assert_refused(run("merge", "--output", "o", "--method", "best"), 2, "'best' is unknown", progress=True)
    for ridge in ("0", "-1", "nan"):
        wrong = run("merge", "--output", "o", "--method", "corrected", "--ridge", ridge)
        assert_refused(wrong, 2, "is no positive number", progress=True)


def test_a_task_joins_elsewhere(trained: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no project is, nobody knows the moments; to take one out nobody has to."""
    assert run("measure", "--tasks", "adding,doubling").code == 0
    assert run("merge", "--output", "one", "--tasks", "adding", "--method", "corrected").code == 0
    assert run("merge", "--output", "both", "--method", "corrected").code == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("one", "both"):
        shutil.copytree(name, elsewhere / name)
    adapter = str(Path("adapters/doubling").resolve())
    expected = tree(Path("one"))
    monkeypatch.chdir(elsewhere)
    refused = run("add", "one", "--task", "doubling", "--adapter", adapter)
    assert_refused(refused, 2, "is a corrected merge", "go to the project's folder")
    assert run("remove", "both", "--task", "doubling").code == 0
    assert tree(Path("both")) == expected
    assert json.loads((Path("both") / "multisbora_receipt.json").read_text())["corrected"]["tasks"].keys() == {"adding"}
