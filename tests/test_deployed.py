"""The commands on a merged checkpoint, as a user types them: add, remove, reweight."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from builders import edit_json
from commands import Run, assert_refused
from faults import dies, tree

from multisbora.edit import remove
from multisbora.journal import FOLDER, editing
from multisbora.lifecycle import required
from multisbora.project import Project
from multisbora.receipt import Receipt


def events(action: str) -> list[dict[str, object]]:
    project = Project.load()
    with required(project) as registry, registry.reading() as reader:
        return [event.detail | {"task": event.task} for event in reader.events() if event.action == action]


def test_in_out_and_another_weight(trained: Path, run: Run) -> None:
    assert run("merge", "--tasks", "adding", "--output", "one").code == 0
    assert run("merge", "--output", "both", "--weight", "doubling:q_proj=0.5").code == 0
    one, both = tree(Path("one")), tree(Path("both"))
    shutil.copytree("one", "ours")

    preview = run("add", "ours", "--task", "doubling", "--weight", "doubling:q_proj=0.5", "--dry-run")
    assert "would put doubling into ours" in preview.out
    assert "multisbora_undo/doubling.safetensors" in preview.out
    assert tree(Path("ours")) == one
    added = run("add", "ours", "--task", "doubling", "--weight", "doubling:q_proj=0.5", "--json").json
    assert added["operation"] == "add"
    assert added["tasks"] == {"adding": 1.0, "doubling": {"default": 1.0, "q_proj": 0.5}}
    assert added["cells"] > 0
    assert tree(Path("ours")) == both
    assert run("verify", "ours").code == 0

    Path("weights.yaml").write_text("adding: 0.25\ndoubling: 2\n")
    heavier = run("reweight", "ours", "--task", "doubling", "--weights-from", "weights.yaml")
    assert "gave doubling another weight in ours" in heavier.out
    assert "tasks: adding 1, doubling 2" in heavier.out
    assert "nothing to do" in run("reweight", "ours", "--task", "doubling", "--weight", "doubling=2").out
    assert run("verify", "ours").code == 0

    assert "took doubling out of ours" in run("remove", "ours", "--task", "doubling").out
    assert tree(Path("ours")) == one
    for action, weights in (
        ("add", {"adding": 1.0, "doubling": {"default": 1.0, "q_proj": 0.5}}),
        ("reweight", {"adding": 1.0, "doubling": 2.0}),
        ("remove", {"adding": 1.0}),
    ):
        (event,) = events(action)
        assert event["weights"] == weights
        assert event["task"] == "doubling"
        assert event["output"] == str(Path("ours").resolve())
    assert run("registry", "check").code == 0


def test_a_task_that_was_added_cannot_be_released(trained: Path, run: Run, tmp_path: Path) -> None:
    """Wherever the checkpoint lies, the history has it."""
    far = tmp_path / "elsewhere" / "far" / "ours"
    far.parent.mkdir(parents=True)
    run("merge", "--tasks", "adding", "--output", "one")
    shutil.move("one", far)
    assert run("add", str(far), "--task", "doubling").code == 0
    assert_refused(run("release", "--task", "doubling"), 1, "depends on task doubling")


def test_outside_of_a_project(trained: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("merge", "--tasks", "adding", "--output", "one")
    before = tree(Path("one"))
    folder, adapter = str(Path("one").resolve()), str(Path("adapters/doubling").resolve())
    bare = tmp_path / "bare"
    bare.mkdir()
    monkeypatch.chdir(bare)
    assert_refused(run("add", folder, "--task", "doubling"), 2, "multisbora.yaml", "--adapter")
    assert run("add", folder, "--task", "doubling", "--adapter", adapter).code == 0
    assert run("reweight", folder, "--task", "doubling", "--adapter", adapter, "--weight", "doubling=3").code == 0
    assert run("remove", folder, "--task", "doubling").code == 0
    assert tree(Path(folder)) == before
    assert [*bare.iterdir()] == []


def test_what_cannot_mean_anything(trained: Path, run: Run) -> None:
    run("merge", "--tasks", "adding", "--output", "one")
    before = tree(Path("one"))
    add, again = ("add", "one", "--task", "doubling"), ("reweight", "one", "--task", "adding")
    assert_refused(run(*add, "--weight", "adding=1"), 2, "--weight is given for adding", "--task names doubling")
    assert_refused(run(*add, "--weight", "doubling"), 2, "--weight 'doubling'")
    assert_refused(run(*add, "--weight", "doubling:gate_proj=1"), 2, "gate_proj", "names none of its matrices")
    assert_refused(run(*add, "--adapter", "adapters/adding"), 2, "is the adapter of adding")
    assert_refused(run(*add, "--adapter", "none"), 1, "none")
    Path("weights.yaml").write_text("adding: 0.25\n")
    assert_refused(run(*add, "--weights-from", "weights.yaml"), 2, "holds no weight of doubling")
    assert_refused(run(*again), 2, "which weight")
    assert_refused(run("add", "one", "--task", "adding"), 2, "holds task adding already")
    assert_refused(run("remove", "one", "--task", "doubling"), 2, "does not hold task 'doubling'")
    assert_refused(run("remove", "adapters", "--task", "doubling"), 1, "only a checkpoint that `merge` wrote")
    shutil.rmtree("adapters/doubling")
    assert_refused(run(*add), 1, "doubling", "does not exist", "multisbora train --task doubling")
    assert tree(Path("one")) == before


def test_claims_that_changed_since_the_training(trained: Path, run: Run) -> None:
    run("merge", "--tasks", "adding", "--output", "one")
    edit_json("adapters/doubling/adapter_config.json", claim_digest="0" * 64)
    assert_refused(run("add", "one", "--task", "doubling"), 1, "claims of doubling changed")
    run("release", "--task", "doubling", "--force")
    assert_refused(run("add", "one", "--task", "doubling"), 1, "doubling")


def test_scores_of_another_composition_are_dropped(trained: Path, run: Run) -> None:
    run("merge", "--output", "both")
    assert run("eval", "both", "--tasks", "adding", "--limit", "2", "--record").code == 0
    assert Receipt.read("both").scores.keys() == {"adding"}
    assert "its scores were of another composition" in run("remove", "both", "--task", "doubling").out
    assert Receipt.read("both").scores == {}


@pytest.mark.parametrize("command", ["verify", "eval", "merge", "add"])
def test_any_command_first_puts_right_what_was_cut_short(trained: Path, run: Run, command: str) -> None:
    run("merge", "--output", "both")
    before = tree(Path("both"))
    at = 1
    while not Path("both", FOLDER).exists() or tree(Path("both"))["model.safetensors"] == before["model.safetensors"]:
        if Path("both").exists():
            shutil.rmtree("both")
        run("merge", "--output", "both")
        assert dies(lambda: remove("both", "adding"), at, "before")
        at += 4
    arguments = {
        "verify": ["verify", "both"],
        "eval": ["eval", "both", "--tasks", "adding", "--limit", "1"],
        "merge": ["merge", "--output", "of-it", "--allow-base-mismatch"],
        "add": ["add", "both", "--task", "adding", "--dry-run"],
    }[command]
    if command == "merge":
        content = Path("multisbora.yaml").read_text()
        kept = json.dumps(str(Path("both").resolve()))
        Path("multisbora.yaml").write_text(
            "\n".join(f"model: {kept}" if line.startswith("model:") else line for line in content.splitlines())
            + f"\nname: {Project.load().model_name}\n"
        )
    result = run(*arguments)
    assert "had been cut short" in result.err or command == "merge", result
    assert tree(Path("both")) == before
    assert result.code == (2 if command == "add" else 0), result


def test_a_checkpoint_that_is_edited_is_not_read(trained: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("merge", "--output", "both")
    monkeypatch.setattr("multisbora.journal._PATIENCE", 0.0)
    with editing("both"):
        for arguments in (["verify", "both"], ["eval", "both", "--tasks", "adding"]):
            assert_refused(run(*arguments), 1, "being edited by another process", progress=True)
        for arguments in (["remove", "both", "--task", "adding"], ["add", "both", "--task", "adding"]):
            assert_refused(run(*arguments), 1, "being read or edited by another process")
