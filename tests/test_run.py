"""The folder of a run: one holder, named changes, and the last checkpoint that is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from multisbora.errors import TrainingError
from multisbora.run import RUN_FILE, enter_run, hold_run, keep_machine, last_checkpoint, refuse_held, remove_run

FILES = ("adapter_model.safetensors", "optimizer.json")


def checkpoint(run: Path, step: int) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file({"x": torch.zeros(step)}, folder / "adapter_model.safetensors")
    for name in ("optimizer.json", "trainer_state.json"):
        (folder / name).write_text("{}")
    return folder


def test_the_last_whole_checkpoint(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path, FILES) is None
    nine, ten = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    assert last_checkpoint(tmp_path, FILES) == ten  # by number, not by name
    (ten / "trainer_state.json").unlink()
    assert last_checkpoint(tmp_path, FILES) == nine and not ten.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [("trainer_state.json", b"{"), ("optimizer.json", b""), ("adapter_model.safetensors", b"\x10"), (None, None)],
)
def test_a_checkpoint_that_is_cut_short(tmp_path: Path, name: str | None, content: bytes | None) -> None:
    one, two = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    if name is None or content is None:
        path = two / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    else:
        (two / name).write_bytes(content)
    assert last_checkpoint(tmp_path, FILES) == one


@pytest.mark.parametrize("name", [*FILES, "trainer_state.json"])
def test_a_checkpoint_that_lacks_a_file(tmp_path: Path, name: str) -> None:
    one, two = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    (two / name).unlink()
    assert last_checkpoint(tmp_path, FILES) == one and not two.exists()


def test_a_checkpoint_needs_the_best_one(tmp_path: Path) -> None:
    two, four, six = (checkpoint(tmp_path, step) for step in (2, 4, 6))
    (two / "trainer_state.json").write_text('{"best_global_step": 2}')
    (six / "trainer_state.json").write_text('{"best_global_step": 4}')
    assert last_checkpoint(tmp_path, FILES) == six
    (four / "optimizer.json").write_text("{")
    assert last_checkpoint(tmp_path, FILES) == two and not six.exists()


def test_other_machines_are_refused(tmp_path: Path) -> None:
    said: list[str] = []
    settings = {"alpha": 8}
    machine = {"torch": "2.7", "device": "cpu", "attention": "packed_sdpa", "packed": True, "threads": 2}
    enter_run(tmp_path, settings, FILES, said.append)
    keep_machine(tmp_path, machine, said.append)
    checkpoint(tmp_path, 2)
    enter_run(tmp_path, settings, FILES, said.append)  # the settings are the same: what it computes with is none
    del said[:]
    keep_machine(tmp_path, dict(machine), said.append)
    assert not said
    for key, value in {"torch": "2.8", "device": "cuda", "attention": "sdpa", "packed": False}.items():
        with pytest.raises(TrainingError, match=f"computed with something else.*{key} was .*go on with the same"):
            keep_machine(tmp_path, machine | {key: value}, said.append)
    keep_machine(tmp_path, machine | {"threads": 1}, said.append)
    assert len(said) == 1 and "in 2 threads, this one in 1" in said[0]
    assert json.loads((tmp_path / RUN_FILE).read_text()) == settings | {"machine": machine}


def test_changed_keys_are_named(tmp_path: Path) -> None:
    said: list[str] = []
    before: dict[str, Any] = {"recipe": {"training": {"seed": 0, "eval_steps": 5}, "dev": None}, "processes": 1}
    assert enter_run(tmp_path, before, FILES, said.append) is None
    last = checkpoint(tmp_path, 4)
    assert enter_run(tmp_path, json.loads(json.dumps(before)), FILES, said.append) == str(last)
    changed = {"recipe": {"training": {"seed": 0, "eval_steps": 9}, "dev": [{"path": "x"}]}, "processes": 2}
    with pytest.raises(TrainingError) as caught:
        enter_run(tmp_path, changed, FILES, said.append)
    message = str(caught.value)
    for words in ("processes was 1, is 2", "recipe.training.eval_steps was 5, is 9", "recipe.dev was None, is [{"):
        assert words in message
    assert "seed" not in message and "\n" not in message
    assert json.loads((tmp_path / RUN_FILE).read_text()) == before


def test_one_holder(tmp_path: Path) -> None:
    with hold_run(tmp_path / "a.run"), pytest.raises(TrainingError, match="in use"), hold_run(tmp_path / "a.run"):
        pass
    with hold_run(tmp_path / "a.run"):
        pass


def test_a_folder_that_is_an_adapter_is_neither_held_nor_removed(tmp_path: Path) -> None:
    run = tmp_path / "a.run"
    run.mkdir()
    (run / "adapter_config.json").write_text("{}")
    with pytest.raises(TrainingError, match=r"a\.run holds an adapter.*rename"), hold_run(run):
        pass
    with pytest.raises(TrainingError, match=r"a\.run holds an adapter.*rename"):
        remove_run(run)
    assert [path.name for path in run.iterdir()] == ["adapter_config.json"]
    (run / "adapter_config.json").unlink()
    remove_run(run)
    assert not run.exists()


def test_whether_a_run_is_held(tmp_path: Path) -> None:
    run = tmp_path / "a.run"
    refuse_held(run)
    assert not run.exists()
    with hold_run(run), pytest.raises(TrainingError, match="in use"):
        refuse_held(run)
    refuse_held(run)
