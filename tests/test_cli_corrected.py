"""Corrected merges as a user types them: measured, merged, proven, and tasks in and out."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import edit_json
from commands import Run, assert_refused
from faults import tree

from multisbora.kept import FOLDER
from multisbora.lifecycle import required
from multisbora.moments import MOMENTS_FILE, Moments, keep_beside, read_beside
from multisbora.project import Project
from multisbora.survey import Survey


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


def test_measured_through_the_adapters(trained: Path, run: Run) -> None:
    """Into their folders, where the corrected merge looks first."""
    told = run("measure", "--trained", "--tasks", "adding,doubling", "--rows", "8", "--json").json
    assert [task["source"] for task in told.values()] == ["adapter", "adapter"]
    assert run("status", "--json").json["tasks"]["adding"]["measured"] == 0
    merged = run("merge", "--output", "both", "--method", "corrected")
    assert merged.code == 0 and "base alone" not in merged.err
    kept = json.loads((Path("both") / "multisbora_receipt.json").read_text())["corrected"]["tasks"]
    assert [task["source"] for task in kept.values()] == ["adapter", "adapter"]
    assert run("verify", "both").code == 0

    before = tree(Path("both"))
    assert run("remove", "both", "--task", "doubling").code == 0
    assert run("add", "both", "--task", "doubling").code == 0
    assert tree(Path("both")) == before

    assert run("measure", "--tasks", "adding,doubling", "--rows", "8").code == 0
    beside = Path("adapters/doubling") / MOMENTS_FILE
    through = beside.read_bytes()
    beside.unlink()
    mixed = run("merge", "--output", "mixed", "--method", "corrected")
    assert mixed.code == 0 and "doubling: moments of the base alone" in mixed.err and "adding:" not in mixed.err
    assert "measure --trained --tasks doubling" in mixed.err
    assert run("verify", "mixed").code == 0
    assert tree(Path("mixed")) != before
    assert run("remove", "both", "--task", "doubling").code == 0
    again = run("add", "both", "--task", "doubling")
    assert again.code == 0 and "doubling: moments of the base alone" in again.err
    assert tree(Path("both")) == tree(Path("mixed"))

    found = Moments.from_bytes(through, "x")
    keep_beside(beside.parent, replace(found, adapter="0" * 64))
    stale = run("merge", "--output", "stale", "--method", "corrected")
    assert_refused(stale, 1, "doubling went through another adapter", "measure --trained --tasks doubling")
    beside.write_bytes(replace(found, source="task", adapter=None).to_bytes())
    stale = run("merge", "--output", "stale", "--method", "corrected")
    assert_refused(stale, 1, MOMENTS_FILE, "of the base model alone")
    beside.write_bytes(b"")
    assert_refused(run("merge", "--output", "stale", "--method", "corrected"), 1, MOMENTS_FILE, "cannot be read")


def test_the_moments_through_an_adapter_are_those_of_its_merge(
    trained: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same answers."""
    monkeypatch.setattr("multisbora.measure.drawn_answers", lambda outputs, batch, draws: batch)
    assert run("measure", "--trained", "--tasks", "adding", "--rows", "8").code == 0
    assert run("merge", "--output", "one", "--tasks", "adding").code == 0
    found = read_beside(Path("adapters/adding"))
    project = Project.load()
    with required(project) as registry:
        survey = Survey.of(project, registry, ["adding"], rows=8, text=None, say=lambda message: None)
    (expected,) = replace(survey, base=Path("one")).measure(lambda message: None)
    assert found is not None and found.sites.keys() == expected.sites.keys()
    for module, site in found.sites.items():
        other = expected.sites[module]
        assert site.channels.tolist() == other.channels.tolist()
        for one, two in ((site.energy, other.energy), (site.response, other.response), (site.block, other.block)):
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5 * np.abs(two).max(initial=0))


def test_tuned_for_a_corrected_merge(trained: Path, run: Run) -> None:
    missing = run("tune", "--corrected", "--tasks", "adding,doubling")
    assert_refused(missing, 1, "adding,doubling has none", "multisbora measure --tasks adding,doubling", progress=True)
    assert run("measure", "--trained", "--tasks", "adding,doubling", "--rows", "8").code == 0
    flags = (
        "--corrected",
        "--ridge",
        "0.02",
        "--rows",
        "8",
        "--steps",
        "4",
        "--slack",
        "5",
        "--output",
        "weights.yaml",
    )
    planned = run("tune", "--tasks", "adding,doubling", *flags, "--dry-run", "--json").json
    assert planned["ridge"] == 0.02 and not Path("weights.yaml").exists()
    told = run("tune", "--tasks", "adding,doubling", *flags)
    merging = "multisbora merge --method corrected --ridge 0.02 --weights-from weights.yaml"
    assert told.code == 0 and merging in told.out
    assert "--corrected --ridge 0.02" in Path("weights.yaml").read_text().splitlines()[0]
    assert run(*merging.split()[1:], "--output", "both").code == 0
    assert run("verify", "both").code == 0
    zero = run("tune", "--corrected", "--tasks", "adding,doubling", "--weight", "adding=0")
    assert_refused(zero, 2, "the start has 0", "leave the task out", progress=True)
    assert_refused(run("tune", "--ridge", "0.1"), 2, "a ridge is of corrected merges", progress=True)
    nothing = run("tune", "--corrected", "--ridge", "0", "--tasks", "adding,doubling")
    assert_refused(nothing, 2, "is no positive number", progress=True)


def test_what_cannot_be_measured_through_an_adapter(trained: Path, run: Run) -> None:
    Path("text").write_text("some words")
    text = run("measure", "--trained", "--tasks", "adding", "--text", "text")
    assert_refused(text, 2, "--text stands for rows before training", progress=True)
    for content, words in ((b"", "cannot be read"), (b"x" * 64, "holds no moments that can be used")):
        (Path("adapters/adding") / MOMENTS_FILE).write_bytes(content)
        broken = run("merge", "--output", "o", "--method", "corrected")
        assert_refused(broken, 1, words, "run multisbora measure --trained anew", progress=True)
    Path("adapters/adding").rename("adapters/kept")
    shutil.copytree("adapters/doubling", "adapters/adding")
    swapped = run("measure", "--trained", "--tasks", "adding")
    assert_refused(swapped, 1, "adapters/adding holds the adapter of task doubling", progress=True)
    shutil.rmtree("adapters/adding")
    Path("adapters/kept").rename("adapters/adding")
    other = run("measure", "--trained", "--tasks", "adding", "--rows", "8", "--set", "prompt='{instruction} ='")
    assert "task adding was trained with another prompt than its recipe has now" in other.err
    shutil.rmtree("adapters/doubling")
    missing = run("measure", "--trained", "--tasks", "doubling")
    assert_refused(missing, 1, "adapters/doubling does not exist", "multisbora train --task doubling", progress=True)


def test_flags_that_do_not_fit(trained: Path, run: Run) -> None:
    assert_refused(run("merge", "--output", "o", "--ridge", "0.1"), 2, "a plain merge knows no ridge", progress=True)
    assert_refused(run("merge", "--output", "o", "--method", "best"), 2, "'best' is unknown", progress=True)
    for ridge in ("0", "-1", "nan"):
        wrong = run("merge", "--output", "o", "--method", "corrected", "--ridge", ridge)
        assert_refused(wrong, 2, "is no positive number", progress=True)


def test_corrected_values_are_corrected_no_second_time(trained: Path, run: Run) -> None:
    """Neither by an edit, nor while lambdas are tuned: the checkpoint stays as it was."""
    assert run("measure", "--tasks", "adding,doubling").code == 0
    assert run("merge", "--output", "one", "--tasks", "adding", "--method", "corrected").code == 0
    edit_json(Path("adapters/doubling/training.json"), tuned={"by": "channel", "ridge": 0.01})
    before = tree(Path("one"))
    words = ("adapters/doubling has corrected values", "no second time", "give the adapters that were trained")
    assert_refused(run("add", "one", "--task", "doubling"), 2, *words, progress=True)
    assert_refused(run("tune", "--corrected", "--tasks", "adding,doubling"), 2, *words, progress=True)
    assert tree(Path("one")) == before


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
