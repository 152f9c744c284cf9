"""`multisbora measure`: whose rows, at which channels, into which registry; and the one line of what cannot be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import Run, assert_refused
from safetensors.torch import load_file, save_file

from multisbora import allocating, survey
from multisbora.errors import RegistryError
from multisbora.moments import Moments
from multisbora.project import Project
from multisbora.registry import Registry, measured
from multisbora.registry.audit import check

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROWS = ["measure", "--tasks", "adding,doubling", "--rows", "8"]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


def registry() -> Registry:
    return Registry.open("sqlite:///registry/registry.db", create=False)


def moments(task: str) -> Moments:
    with registry() as opened:
        found = opened.moments("llama", task)
    assert found is not None
    return found


def test_before_and_after_allocation(project: Path, run: Run) -> None:
    result = run(*ROWS, "--json")
    assert result.code == 0, result
    told = result.json
    assert list(told) == ["adding", "doubling"]
    assert told["adding"] | {"tokens": 0, "base_fingerprint": ""} == {
        **{"rows": 8, "tokens": 0, "source": "task", "matrices": 14, "channels": 0, "base_fingerprint": ""},
    }
    assert run("status", "--json").json["to_come"] == {"adding": 8, "doubling": 8}
    assert "no claims yet: adding (8 rows), doubling (8 rows)" in run("status").out
    first = moments("adding")
    assert first.rows == 8 and first.tokens == told["adding"]["tokens"]
    assert {module.rpartition(".")[2] for module in first.sites} == set(KINDS)
    assert all(site.block.shape == (0, 0) for site in first.sites.values())

    assert run("allocate", "--tasks", "adding,doubling").code == 0
    result = run(*ROWS)
    assert result.code == 0 and "training rows stand for them" in result.err
    assert [line.split() for line in result.out.splitlines()] == [
        ["task", "source", "rows", "tokens", "matrices", "channels"],
        ["adding", "task", "8", str(first.tokens), "14", "48"],  # 3 kinds in 2 layers, 2 tasks of rank 4
        ["doubling", "task", "8", str(told["doubling"]["tokens"]), "14", "48"],
    ]
    status = run("status", "--json").json
    assert status["tasks"]["adding"]["measured"] == 8 and status["to_come"] == {}
    assert "rows measured" in run("status").out
    second = moments("adding")
    with registry() as opened:
        claims = opened.claims("llama")
        assert check(opened).problems == ()
        assert [event.action for event in opened.events()] == ["register", "allocate", "choose", "allocate", "choose"]
    for module, site in second.sites.items():
        held = {i for task in claims.values() if module in task.regions for i in task.regions[module].indices}
        assert site.channels.tolist() == sorted(held)
        assert np.array_equal(site.energy, first.sites[module].energy)


def test_channels_are_those_of_the_tasks_that_it_meets(project: Path, run: Run) -> None:
    """Of an fb task all, unless the matrix is wide; of tasks in other compositions none."""
    assert run("allocate", "--tasks", "adding", "--composition", "one").code == 0
    assert run("allocate", "--tasks", "doubling", "--composition", "two").code == 0
    assert (
        run(
            "allocate", "--tasks", "rows", "--composition", "two", "--variant", "fb", "--targets", "q_proj,down_proj"
        ).code
        == 0
    )
    with registry() as opened, opened.reading() as reader:
        alone = measured.block_channels(reader, "llama", "adding")
        met = measured.block_channels(reader, "llama", "doubling")
        assert measured.block_channels(reader, "llama", "nobody") == {}
        claims = opened.task("llama", "adding", "one"), opened.task("llama", "doubling", "two")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(measured, "WIDEST", 32)
            narrow = measured.block_channels(reader, "llama", "rows")
    assert alone == {module: list(region.indices) for module, region in claims[0].regions.items()}
    for module, region in claims[1].regions.items():
        width = {"q_proj": 32, "down_proj": 48}.get(module.rpartition(".")[2])
        assert met[module] == (list(region.indices) if width is None else list(range(width)))
        assert narrow[module] == (list(range(32)) if width == 32 else list(region.indices))


def test_what_allocation_reads(project: Path) -> None:
    """Without blocks, in a dry run too, which keeps nothing and makes no registry."""
    heard: list[str] = []
    opened = Project.load()
    found = allocating.measure_tasks(opened, ["adding"], 4, None, True, heard.append, lambda: None)
    assert not Path("registry").exists()
    kept = allocating.measure_tasks(opened, ["adding"], 4, None, False, heard.append, lambda: None)
    with registry() as store:
        again = store.moments("llama", "adding", channels=False)
    assert again is not None
    assert found["adding"].to_bytes() == kept["adding"].to_bytes() == again.to_bytes()


def test_a_dry_run_writes_nothing_and_needs_no_weights(
    project: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "open_base", lambda *_: pytest.fail("the model was loaded"))
    told = run(*ROWS, "--dry-run", "--json").json
    assert told["adding"] == {"rows": 8, "tokens": told["adding"]["tokens"], "source": "task"} | {
        "matrices": 14,
        "channels": 0,
    }
    assert not Path("registry").exists()


def test_test_rows_are_never_looked_at(project: Path, run: Run) -> None:
    """Of twelve training rows four are test rows as well, spelt a little otherwise."""
    train = [json.loads(line) for line in Path("data/adding-train.jsonl").read_text().splitlines()]
    test = [row | {"instruction": f" {row['instruction'].upper()} "} for row in train[:4]]
    Path("data/adding-test.jsonl").write_text("\n".join(map(json.dumps, test)))
    assert run("measure", "--tasks", "adding", "--dry-run", "--json").json["adding"]["rows"] == 8
    Path("data/adding-test.jsonl").write_text("\n".join(map(json.dumps, train)))
    assert_refused(run("measure", "--tasks", "adding"), 1, "all 12 training rows are also test rows", progress=True)


def test_dev_rows_go_before_training_rows(project: Path, run: Run) -> None:
    edit(Path("tasks/adding.yaml"), dev_size=3)
    result = run("measure", "--tasks", "adding", "--dry-run", "--json")
    assert result.json["adding"]["rows"] == 3 and "3 rows to measure, few" in result.err
    assert "training rows stand" not in result.err


def test_a_text_for_tasks_without_rows(project: Path, run: Run) -> None:
    """Without a recipe, and with one whose rows are not there."""
    Path("some.txt").write_text("the quick brown fox " * 100)
    Path("data/doubling-train.jsonl").unlink()
    result = run("measure", "--tasks", "adding,doubling,later", "--rows", "5", "--text", "some.txt", "--json")
    assert result.code == 0, result
    assert [told["source"] for told in result.json.values()] == ["task", "text", "text"]
    assert "some.txt stands for the rows of task doubling: data file data/doubling-train.jsonl" in result.err
    assert "some.txt stands for the rows of task later: it has no recipe" in result.err
    assert np.array_equal(
        next(iter(moments("later").sites.values())).energy, next(iter(moments("doubling").sites.values())).energy
    )
    assert moments("later").source == "text"


def test_a_text_that_nobody_needs(project: Path, run: Run) -> None:
    Path("some.txt").write_text("the quick brown fox " * 100)
    result = run("measure", "--tasks", "adding", "--text", "some.txt", "--dry-run", "--json")
    assert result.json["adding"]["source"] == "task" and "some.txt is not used" in result.err


def test_recipes_are_set_as_in_training(project: Path, run: Run) -> None:
    rows = Path("data/adding-train.jsonl").read_text().splitlines()
    Path("data/few.jsonl").write_text("\n".join(rows[:3]))
    for more in ([], ["--dry-run"]):
        result = run("measure", "--tasks", "adding", "--set", "train=data/few.jsonl", "--json", *more)
        assert result.code == 0 and result.json["adding"]["rows"] == 3
    assert_refused(run("measure", "--tasks", "adding", "--set", "trian=x"), 2, "did you mean train?", progress=True)


def test_one_row(project: Path, run: Run) -> None:
    result = run("measure", "--tasks", "adding", "--rows", "1", "--json")
    assert result.code == 0 and result.json["adding"]["rows"] == 1
    path = Path("data/adding-train.jsonl")
    path.write_text(path.read_text().splitlines()[0] + "\n")
    result = run("measure", "--tasks", "adding", "--json")
    assert result.code == 0 and "task adding has 1 rows to measure, few" in result.err


@pytest.fixture
def broken(project: Path) -> Iterator[Path]:
    """The weights of a base that has a NaN in it."""
    import shutil

    base = Path("base").resolve()
    shutil.copytree(Project.load().model, base)
    edit(Path("multisbora.yaml"), model=str(base))
    state = load_file(base / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    yield base


def test_a_base_with_nan(broken: Path, run: Run) -> None:
    assert_refused(run("measure", "--tasks", "adding"), 1, "task adding", "loss", "nan", progress=True)
    assert not Path("registry").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--tasks", "nobody"], 2, "unknown task 'nobody'"),
        (["--tasks", ","], 2, "names nothing"),
        (["--tasks", "a/b"], 2, "not usable"),
        (["--tasks", "a/b", "--text", "some.txt"], 2, "not usable"),
        (["--tasks", "later", "--text", "none.txt"], 1, "none.txt does not exist"),
    ],
)
def test_what_cannot_be_measured(project: Path, run: Run, arguments: list[str], code: int, words: str) -> None:
    assert_refused(run("measure", *arguments), code, words, progress=True)
    assert not Path("registry").exists()


def test_no_row_at_all(project: Path, run: Run) -> None:
    for text, words in (("", "adding-train.jsonl"), ('{"instruction": "x", "output": " "}\n', "no row is left")):
        Path("data/adding-train.jsonl").write_text(text)
        assert_refused(run("measure", "--tasks", "adding"), 1, words, progress=True)
    Path("data/adding-train.jsonl").unlink()
    assert_refused(run("measure", "--tasks", "adding"), 1, "does not exist", progress=True)


@pytest.mark.parametrize(("cutoff", "words"), [(5, "below the cutoff of 5 tokens"), (22, "exceed 22 tokens")])
def test_rows_that_are_all_cut(project: Path, run: Run, cutoff: int, words: str) -> None:
    edit(Path("tasks/adding.yaml"), training={"cutoff": cutoff})
    assert_refused(run("measure", "--tasks", "adding"), 1, words, progress=True)


def test_rows_beyond_the_models_positions(project: Path, run: Run, tmp_path: Path) -> None:
    from builders import tiny_gpt2

    edit(Path("multisbora.yaml"), model=str(tiny_gpt2(tmp_path / "gpt2", n_positions=16)), targets="all-linear")
    assert_refused(run("measure", "--tasks", "adding"), 1, "made for 16", "lower training.cutoff", progress=True)
    Path("some.txt").write_text("the quick brown fox " * 100)
    assert run("measure", "--tasks", "later", "--text", "some.txt", "--rows", "2").code == 0


def test_a_registry_of_another_model_of_that_name(project: Path, run: Run, tmp_path: Path) -> None:
    from builders import tiny_llama

    assert run("measure", "--tasks", "adding", "--rows", "2").code == 0
    before = moments("adding")
    edit(Path("multisbora.yaml"), model=str(tiny_llama(tmp_path / "llama", hidden_size=64)))
    assert_refused(run("measure", "--tasks", "adding"), 1, "registered with other matrices", progress=True)
    assert moments("adding").to_bytes() == before.to_bytes()


def test_what_was_measured_stays_when_a_later_task_fails(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = survey.measure

    def fails(model: Any, examples: Any, task: str, **rest: Any) -> Moments:
        if task == "doubling":
            raise RegistryError("stopped")
        return real(model, examples, task, **rest)

    monkeypatch.setattr(survey, "measure", fails)
    with pytest.raises(RegistryError, match="stopped"):
        allocating.measure_tasks(Project.load(), ["adding", "doubling"], 2, None, False, lambda _: None, lambda: None)
    with registry() as opened:
        assert list(opened.measured("llama")) == ["adding"]


def test_a_quantised_base_is_loaded_once_for_each_way(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    real = survey.open_base
    monkeypatch.setattr(survey, "open_base", lambda folder, kind, say: asked.append(kind) or real(folder, None, say))
    edit(Path("tasks/doubling.yaml"), training={"quantization": "nf4"})
    (Path("tasks") / "third.yaml").write_text(Path("tasks/adding.yaml").read_text())
    allocating.measure_tasks(
        Project.load(), ["adding", "third", "doubling"], 2, None, True, lambda _: None, lambda: None
    )
    assert asked == [None, "nf4"]
