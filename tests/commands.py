"""Commands as a user types them, a project on a tiny model to type them in, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Result]


def assert_refused(result: Result, code: int, *parts: str, progress: bool = False) -> None:
    """One line on stderr that has these parts, nothing on stdout, and this exit code.

    Args:
        progress: lines that say what is being done may stand before it.
    """
    assert result.code == code, result
    lines = result.err.splitlines()
    assert len(lines) == 1 or (progress and lines), result.err
    assert lines[-1].startswith("multisbora: "), result.err
    assert all(part in lines[-1] for part in parts), lines[-1]
    assert "Traceback" not in result.err
    assert result.out == ""


def refused(call: Callable[[], object], kind: type[Exception], *words: str) -> str:
    """The message of what a call raises: of this kind, one line, with these words in it."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def recipe(folder: Path, task: str, rows: list[dict[str, str]]) -> dict[str, Any]:
    (folder / "data").mkdir(exist_ok=True)
    for part in ("train", "test"):
        lines = (json.dumps(row | {"instruction": f"{part} {row['instruction']}"}) for row in rows)
        (folder / "data" / f"{task}-{part}.jsonl").write_text("\n".join(lines) + "\n")
    return {
        "prompt": "Q: {instruction}\nA:",
        "train": f"data/{task}-train.jsonl",
        "training": {"max_steps": 3, "batch_size": 4, "learning_rate": 0.01, "warmup_steps": 0, "logging_steps": 1},
        "eval": {"data": f"data/{task}-test.jsonl", "metric": "number", "num_beams": 1, "max_new_tokens": 4},
    }


def make_project(folder: Path, base: Path) -> None:
    (folder / "tasks").mkdir()
    for task, shift in (("adding", 1), ("doubling", 2)):
        rows = [{"instruction": f"{n} {task}", "output": f" {n * shift}", "answer": str(n * shift)} for n in range(12)]
        (folder / "tasks" / f"{task}.yaml").write_text(yaml.safe_dump(recipe(folder, task, rows)))
    project = {"model": str(base), "rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj", "down_proj"]}
    (folder / "multisbora.yaml").write_text(yaml.safe_dump(project))
