"""The folder of a run: one holder, named changes, and the last checkpoint that is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from multisbora.errors import TrainingError
from multisbora.run import RUN_FILE, enter_run, hold_run, last_checkpoint


def checkpoint(run: Path, step: int) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file({"x": torch.zeros(step)}, folder / "adapter_model.safetensors")
    for name in ("optimizer.json", "trainer_state.json"):
        (folder / name).write_text("{}")
    return folder


def test_the_last_whole_checkpoint(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    nine, ten = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    assert last_checkpoint(tmp_path) == ten  # by number, not by name
    (ten / "trainer_state.json").unlink()
    assert last_checkpoint(tmp_path) == nine and not ten.exists()


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
    assert last_checkpoint(tmp_path) == one


def test_changed_keys_are_named(tmp_path: Path) -> None:
    said: list[str] = []
    before: dict[str, Any] = {"recipe": {"training": {"seed": 0, "eval_steps": 5}, "dev": None}, "processes": 1}
    assert enter_run(tmp_path, before, said.append) is None
    last = checkpoint(tmp_path, 4)
    assert enter_run(tmp_path, json.loads(json.dumps(before)), said.append) == str(last)
    changed = {"recipe": {"training": {"seed": 0, "eval_steps": 9}, "dev": [{"path": "x"}]}, "processes": 2}
    with pytest.raises(TrainingError) as caught:
        enter_run(tmp_path, changed, said.append)
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
