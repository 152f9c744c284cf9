"""The commands that look after claims, as a user types them, and what else only a registry can refuse."""

from __future__ import annotations

import json
import shutil
import socket
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import tiny_llama
from commands import Run, assert_refused

from multisbora.adapter import Adapter
from multisbora.errors import RegistryError
from multisbora.project import Project
from multisbora.registry import Registry

STORE = "sqlite:///registry/registry.db"


def model(project: Path) -> str:
    with Registry.open(STORE, create=False) as registry:
        return next(iter(registry.models()))


def test_several_compositions_from_a_file(project: Path, run: Run) -> None:
    for task in ("a", "b", "c"):
        shutil.copyfile("tasks/adding.yaml", f"tasks/{task}.yaml")
    Path("groups.yaml").write_text("deploy: [a, b]\nother: [b, c]\n")
    dry = run("allocate", "--compositions", "groups.yaml", "--dry-run", "--json")
    assert dry.code == 0 and not (project / "registry").exists()
    shown = run("allocate", "--compositions", "groups.yaml", "--json")
    assert shown.json == dry.json and shown.json["composition"] is None
    regions = {task: found["regions"] for task, found in shown.json["tasks"].items()}
    assert regions["a"] == regions["c"] != regions["b"]
    assert shown.json["compositions"]["deploy"]["more_tasks"] == 6
    text = run("allocate", "--compositions", "groups.yaml").out
    assert (
        "deploy: 6 more tasks like these fit: model.layers.0.self_attn.q_proj decides: 8 of its 32 columns are" in text
    )
    status = run("status", "--composition", "other")
    assert "deploy" in status.out and "more that fit" in status.out
    assert run("status", "--json").json["compositions"]["other"]["tasks"] == ["b", "c"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["must hold `key: value` lines"]),
        ("{}", ["names no composition"]),
        ("one: adding\n", ["'one' must have a list of task names, got 'adding'"]),
        ("one: [adding, 3]\n", ["'one' must have a list of task names"]),
        ("one: [adding, adding]\n", ["composition one names a task twice"]),
        ("one: [adding]\none: [doubling]\n", ["'one' is given twice"]),
        ("'../one': [adding]\n", ["composition name '../one' is not usable"]),
        ("one: ['../../etc']\n", ["task name '../../etc' is not usable"]),
        ("one: [nothing]\n", ["unknown task 'nothing'"]),
        ("[" * 5000, ["nested too deeply"]),
    ],
)
def test_files_of_compositions_that_make_no_sense(project: Path, run: Run, text: str, parts: list[str]) -> None:
    Path("groups.yaml").write_text(text)
    assert_refused(run("allocate", "--compositions", "groups.yaml"), 2, *parts)
    assert not (project / "registry").exists()


def test_flags_that_do_not_go_together(project: Path, run: Run) -> None:
    Path("groups.yaml").write_text("deploy: [adding]\n")
    for arguments in (
        [],
        ["--tasks", "adding", "--compositions", "groups.yaml"],
        ["--compositions", "groups.yaml", "--composition", "one"],
    ):
        assert_refused(run("allocate", *arguments), 2, "--compositions")
    assert_refused(run("allocate", "--compositions", "missing.yaml"), 2, "missing.yaml does not exist")


@pytest.mark.parametrize("name", ["../x", "a b", "x" * 10_000, "a\nb", "\x1b[31m", "-x"])
def test_hostile_names_reach_no_file(project: Path, run: Run, name: str) -> None:
    before = sorted(project.rglob("*"))
    for arguments in (
        ["allocate", f"--tasks={name}"],
        ["train", f"--task={name}"],
        ["release", f"--task={name}"],
        ["registry", "rename", "--task", "adding", f"--to={name}"],
        ["allocate", "--tasks", "adding", f"--composition={name}"],
    ):
        result = run(*arguments)
        assert result.code in (1, 2) and len(result.err.strip().splitlines()) == 1
        assert len(result.err) < 500 and "\x1b" not in result.err
    assert sorted(project.rglob("*")) == before


def test_joining_with_reallocation(project: Path, run: Run) -> None:
    assert run("allocate", "--tasks", "adding").code == 0
    assert run("allocate", "--tasks", "doubling", "--composition", "other").code == 0
    assert_refused(
        run("allocate", "--tasks", "doubling"),
        1,
        "task 'doubling' cannot join composition 'default' with its indices: task 'adding' there owns the same cells",
        "'doubling' is not trained yet: run it again with --reallocate",
    )
    shown = run("allocate", "--tasks", "doubling", "--reallocate")
    assert shown.code == 0 and "given other indices: doubling" in shown.out
    assert run("registry", "check").code == 0


def test_check_proves_and_finds(trained: Path, run: Run) -> None:
    shown = run("registry", "check")
    assert shown.code == 0 and "every invariant holds" in shown.out and "2 tasks" in shown.out
    assert run("registry", "check", "--json").json["ok"] is True
    with closing(sqlite3.connect("registry/registry.db")) as connection:
        connection.execute(
            "DELETE FROM claims WHERE (composition_id, matrix_id, axis, channel) IN "
            "(SELECT composition_id, matrix_id, axis, channel FROM claims LIMIT 1)"
        )
        connection.commit()
    broken = run("registry", "check", "--json")
    assert broken.code == 3 and broken.json["ok"] is False and len(broken.json["problems"]) == 1
    assert "does not hold" in broken.err and len(broken.err.strip().splitlines()) == 1


def test_history_says_who_did_what(trained: Path, run: Run) -> None:
    assert run("merge", "--output", "merged").code == 0
    events = run("registry", "history", "--json").json
    assert [event["action"] for event in events] == [
        *("register", "allocate", "allocate"),
        *("training", "trained", "training", "trained", "merge"),
    ]
    assert events[-1]["detail"] == {
        "output": str(trained / "merged"),
        "host": socket.gethostname(),
        "weights": {"adding": 1.0, "doubling": 1.0},
    }
    assert events[4]["detail"]["adapter_digest"] == Adapter.read("adapters/adding").digest
    mine = run("registry", "history", "--task", "doubling").out.splitlines()
    assert len(mine) == 5 and all("doubling" in line for line in mine[1:-1]) and "merge" in mine[-1]
    assert_refused(run("registry", "history", "--task", "doublin"), 1, "nothing ever happened to a task 'doublin'")


def test_stages_are_everybody_s(trained: Path, run: Run) -> None:
    shutil.rmtree("adapters")  # as on a colleague's machine
    assert {t: (s["stage"], s["adapter"]) for t, s in run("status", "--json").json["tasks"].items()} == {
        "adding": ("trained", "not trained"),
        "doubling": ("trained", "not trained"),
    }
    assert run("allocate", "--tasks", "adding", "--composition", "other").code == 0


def test_a_task_in_training_is_not_released_by_chance(project: Path, run: Run) -> None:
    assert run("allocate", "--tasks", "adding").code == 0
    with Registry.open(STORE) as registry:
        registry.mark(registry.task(model(project), "adding"), "training")
    assert_refused(run("release", "--task", "adding"), 1, "is being trained", "--force")
    assert run("release", "--task", "adding", "--force", "--dry-run").code == 0
    assert run("release", "--task", "adding", "--force").code == 0


def test_training_survives_a_registry_that_is_gone(project: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("allocate", "--tasks", "adding").code == 0
    mark = Registry.mark

    def gone(self: Registry, claimed: object, stage: str, detail: object = None) -> None:
        if stage == "trained":
            raise RegistryError("the server is gone")
        mark(self, claimed, stage, detail)  # type: ignore[arg-type]

    monkeypatch.setattr(Registry, "mark", gone)
    shown = run("train", "--task", "adding")
    assert shown.code == 0 and Adapter.read("adapters/adding").task == "adding"
    assert "is complete, but the registry was not told: the server is gone" in shown.err


def test_release_with_a_merge_that_depends_on_it(trained: Path, run: Run) -> None:
    assert run("merge", "--output", "out/merged").code == 0
    assert_refused(run("release", "--task", "adding"), 1, "out/merged depends on task adding", "--force")
    shutil.rmtree("out")
    assert run("release", "--task", "adding").code == 0
    assert set(run("status", "--json").json["tasks"]) == {"doubling"}


def test_forget(project: Path, run: Run) -> None:
    assert run("allocate", "--tasks", "adding,doubling").code == 0
    assert_refused(run("registry", "forget", "--task", "adding"), 1, "task 'adding' was not measured on")
    assert run("measure", "--tasks", "adding").code == 0
    assert run("registry", "forget", "--task", "adding", "--dry-run").out.startswith("would forget")
    dry = ("train", "--task", "doubling", "--dry-run")
    assert "isolated from adding" in run(*dry).err
    assert run("registry", "forget", "--task", "adding", "--json").json == {"task": "adding", "dry_run": False}
    assert "isolated" not in run(*dry).err and run("registry", "check").code == 0


def test_rename_takes_the_adapter_along(trained: Path, run: Run) -> None:
    before = Adapter.read("adapters/adding")
    assert run("registry", "rename", "--task", "adding", "--to", "sums", "--dry-run").code == 0
    assert Path("adapters/adding").is_dir()
    assert run("registry", "rename", "--task", "adding", "--to", "sums").code == 0
    after = Adapter.read("adapters/sums")
    assert (after.task, after.digest, after.claim_digest) == ("sums", before.digest, before.claim_digest)
    assert not Path("adapters/adding").exists()
    assert run("status", "--json").json["tasks"]["sums"]["adapter"] == "trained"
    assert run("merge", "--tasks", "sums,doubling", "--output", "merged").code == 0
    assert run("verify", "merged").code == 0
    assert_refused(run("registry", "rename", "--task", "sums", "--to", "adding"), 1, "merged depends on task sums")
    assert_refused(run("registry", "rename", "--task", "sums", "--to", "doubling", "--force"), 1, "already")
    assert_refused(run("registry", "rename", "--task", "adding", "--to", "x"), 1, "'adding' has no claims")
    assert run("registry", "check").code == 0


def test_a_rename_that_was_cut_short_is_finished_by_the_next(
    trained: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from multisbora import lifecycle

    move = lifecycle._move_adapter

    def move_and_die(*arguments: Any) -> None:
        move(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(lifecycle, "_move_adapter", move_and_die)  # the machine stops before the commit
    with pytest.raises(KeyboardInterrupt):
        lifecycle.rename(Project.load(), "adding", "sums", force=False, dry_run=False)
    monkeypatch.undo()
    monkeypatch.chdir(trained)
    assert run("status", "--json").json["tasks"]["adding"]["adapter"] == "not trained"
    assert_refused(run("registry", "rename", "--task", "doubling", "--to", "sums"), 1, "adapters/sums is in the way")
    assert run("registry", "rename", "--task", "adding", "--to", "sums").code == 0
    assert run("status", "--json").json["tasks"]["sums"]["adapter"] == "trained"
    assert sorted(path.name for path in Path("adapters/sums").iterdir() if path.name.startswith(".")) == []


def test_a_stranger_s_adapter_is_never_taken_for_one_s_own(project: Path, run: Run) -> None:
    """Tasks that never meet hold the same indices, so nothing but the name tells their adapters apart."""
    Path("groups.yaml").write_text("one: [adding]\ntwo: [doubling]\n")
    assert run("allocate", "--compositions", "groups.yaml").code == 0
    assert run("train", "--task", "adding").code == 0
    assert run("release", "--task", "adding", "--composition", "one").code == 0
    assert_refused(run("registry", "rename", "--task", "doubling", "--to", "adding"), 1, "is in the way")
    assert run("status", "--composition", "two", "--json").json["tasks"]["doubling"]["adapter"] == "not trained"


def test_training_needs_no_composition(project: Path, run: Run) -> None:
    Path("groups.yaml").write_text("one: [adding]\ntwo: [adding, doubling]\n")
    assert run("allocate", "--compositions", "groups.yaml").code == 0
    assert run("train", "--task", "adding").code == 0
    assert set(run("registry", "history", "--task", "adding", "--json").json[-1]) >= {"composition"}
    assert "default" not in run("status", "--json").json["compositions"]
    assert_refused(run("merge", "--output", "merged"), 2, "name one of one, two with --composition")
    assert_refused(
        run("release", "--task", "adding"),
        1,
        "but in one, two: name one with --composition one",
    )


def test_a_task_in_training_is_not_renamed(project: Path, run: Run) -> None:
    assert run("allocate", "--tasks", "adding").code == 0
    with Registry.open(STORE) as registry:
        registry.mark(registry.task(model(project), "adding"), "training")
    assert_refused(run("registry", "rename", "--task", "adding", "--to", "sums"), 1, "is being trained", "--force")


def test_a_damaged_adapter_is_not_renamed(trained: Path, run: Run) -> None:
    Path("adapters/adding/adapter_config.json").write_text("{")
    for arguments in ((), ("--dry-run",)):
        assert_refused(
            run("registry", "rename", "--task", "adding", "--to", "sums", *arguments), 1, "adapter_config.json"
        )
    assert "adding" in run("status", "--json").json["tasks"]


def test_dependence_outlives_a_rename_and_leaves_the_folder(trained: Path, run: Run, tmp_path: Path) -> None:
    assert run("merge", "--output", str(tmp_path / "far" / "away" / "merged")).code == 0
    assert_refused(run("release", "--task", "adding"), 1, "far/away/merged depends on task adding")
    assert run("registry", "rename", "--task", "adding", "--to", "sums", "--force").code == 0
    assert_refused(run("release", "--task", "sums"), 1, "far/away/merged depends on task sums")
    names = [event["task"] for event in run("registry", "history", "--task", "sums", "--json").json]
    assert "adding" in names


def test_a_composition_that_the_merge_does_not_need_can_be_left(trained: Path, run: Run) -> None:
    assert run("merge", "--output", "merged").code == 0
    assert run("allocate", "--tasks", "adding", "--composition", "other").code == 0
    assert run("release", "--task", "adding", "--composition", "other").code == 0
    assert_refused(run("release", "--task", "adding"), 1, "merged depends on task adding")


def test_a_rename_does_not_write_over_anything(trained: Path, run: Run) -> None:
    shutil.copytree("adapters/doubling", "adapters/sums")
    assert_refused(run("registry", "rename", "--task", "adding", "--to", "sums"), 1, "adapters/sums is in the way")
    shutil.rmtree("adapters/sums")
    Path("adapters/adding.run").mkdir()
    assert_refused(run("registry", "rename", "--task", "adding", "--to", "sums"), 1, "is not finished")
    assert "adding" in run("status", "--json").json["tasks"]


def test_protected_channels_on_the_command_line(project: Path, run: Run) -> None:
    arguments = ("registry", "protect", "--columns", "3,5", "--targets", "q_proj")
    assert run(*arguments, "--dry-run").code == 0 and not (project / "registry").exists()
    shown = run(*arguments)
    assert shown.code == 0 and "protected 4 columns of 2 matrices" in shown.out
    assert run(*arguments).out.strip() == "all of them are protected already"
    Path("outliers.json").write_text(json.dumps({"rows": {"model.layers.0.self_attn.q_proj": [7]}}))
    found = run("registry", "protect", "--channels", "outliers.json", "--json").json
    assert found == {"rows": {"model.layers.0.self_attn.q_proj": [7]}, "columns": {}}
    regions = run("allocate", "--tasks", "adding", "--rank", "30", "--json").json["tasks"]["adding"]["regions"]
    assert not {3, 5} & set(regions["model.layers.0.self_attn.q_proj"])
    assert_refused(
        run("registry", "protect", "--columns", "0,1,2,4", "--targets", "q_proj"), 1, "protect channels before"
    )
    assert run("registry", "check").code == 0
    assert "5 protected channels" in run("registry", "unprotect").out
    assert_refused(run("registry", "unprotect"), 1, "nothing to give free")


@pytest.mark.parametrize(
    ("arguments", "content", "parts"),
    [
        ([], None, ["no channel to protect"]),
        (["--columns", "x"], None, ["is not a list of channel numbers"]),
        (["--columns", "32"], None, ["has 32 columns, numbered from 0: 32 is none"]),
        (["--columns", "-1"], None, ["-1 is none"]),
        (["--columns", "1", "--targets", "nope"], None, ["nope matches no matrix"]),
        (["--channels", "c.json"], None, ["c.json does not exist"]),
        (["--channels", "c.json"], "{", ["not readable as JSON"]),
        (["--channels", "c.json"], "[]", ["must hold"]),
        (["--channels", "c.json"], '{"column": {}}', ["must hold"]),
        (["--channels", "c.json"], '{"columns": {"model.layers.0.self_attn.q_proj": ["3"]}}', ["'3' is none"]),
        (["--channels", "c.json", "--rows", "1"], "{}", ["leave --columns, --rows and --targets out"]),
    ],
)
def test_channels_that_make_no_sense(
    project: Path, run: Run, arguments: list[str], content: str | None, parts: list[str]
) -> None:
    if content is not None:
        Path("c.json").write_text(content)
    assert_refused(run("registry", "protect", *arguments), 2, *parts)
    assert run("registry", "history").code == 1  # nothing is there


def test_review_in_git(trained: Path, run: Run) -> None:
    assert run("registry", "export", "--output", "registry.json", "--dry-run").code == 0
    assert not Path("registry.json").exists()
    assert run("registry", "export", "--output", "registry.json").code == 0
    text = Path("registry.json").read_text()
    assert run("registry", "export").out == text
    shutil.move("registry", "elsewhere")
    assert run("registry", "import", "registry.json", "--dry-run").code == 0 and not Path("registry").exists()
    assert run("registry", "import", "registry.json").code == 0
    assert run("registry", "check").code == 0
    assert run("registry", "export").out == text
    assert run("merge", "--output", "merged").code == 0
    Path("registry.json").write_text(text.replace('"fa"', '"fb"'))
    before = run("registry", "export").out
    refused = run("registry", "import", "registry.json")
    assert refused.code in (1, 2) and len(refused.err.strip().splitlines()) == 1
    assert run("registry", "export").out == before
    assert_refused(run("registry", "import", "missing.json"), 2, "missing.json does not exist")
    assert_refused(run("registry", "export", "--output", "no/where.json"), 2, "no is not a folder")


def test_a_project_on_a_server(project: Path, run: Run, postgresql_url: str) -> None:
    text = Path("multisbora.yaml").read_text()
    Path("multisbora.yaml").write_text(f"{text}registry: {postgresql_url}\n")
    assert_refused(run("release", "--task", "adding"), 1, "is empty: run multisbora allocate first")
    assert run("plan").code == 0 and run("status").code == 0  # on an empty database, and make nothing there
    assert_refused(run("registry", "check"), 1, "is empty: run multisbora allocate first")
    assert run("allocate", "--tasks", "adding,doubling").code == 0
    assert run("registry", "check").code == 0
    assert run("train", "--task", "adding").code == 0
    assert run("status", "--json").json["tasks"]["adding"]["stage"] == "trained"
    assert not Path("registry").exists()
    Path("multisbora.yaml").write_text(f"{text}registry: postgresql+psycopg://u:secret@/x?host=/nowhere\n")
    for arguments in (["status"], ["allocate", "--tasks", "adding"], ["plan"], ["registry", "check"]):
        result = run(*arguments)
        assert_refused(result, 1, "cannot be reached", "check the server")
        assert "secret" not in result.err


def test_a_model_whose_geometry_changed_since_the_claims(trained: Path, run: Run, tmp_path: Path) -> None:
    """The same name, other matrices: each command says so in one line, and nothing is lost."""
    deeper = tiny_llama(tmp_path / "elsewhere" / "llama", dtype="float32", num_hidden_layers=3)
    project = yaml.safe_load(Path("multisbora.yaml").read_text())
    shutil.rmtree("adapters")
    before = run("registry", "export").out
    Path("multisbora.yaml").write_text(yaml.safe_dump({**project, "model": str(deeper)}))
    for arguments in (["allocate", "--tasks", "third"], ["status"], ["plan"], ["registry", "protect", "--rows", "1"]):
        if arguments[0] == "allocate":
            shutil.copyfile("tasks/adding.yaml", "tasks/third.yaml")
        assert_refused(run(*arguments), 1, "model 'llama' is registered with other matrices", "another name")
    assert_refused(run("train", "--task", "adding"), 1, "another geometry")
    assert run("registry", "export").out == before
    Path("multisbora.yaml").write_text(yaml.safe_dump({**project, "model": str(deeper), "name": "deeper"}))
    assert run("allocate", "--tasks", "third").code == 0 and run("registry", "check").code == 0
