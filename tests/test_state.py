"""States of optimizers, schedules and random generators, through files and back, to the bit."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multisbora.errors import TrainingError
from multisbora.state import random_state, read_state, restore_random_state, write_state

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.integers() | st.text(), inner, max_size=3)
    ),
    max_leaves=12,
)


def same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)
    if type(one) is not type(two):
        return False
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


@settings(deadline=None)
@given(TREES)
def test_any_tree_comes_back(tree: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_state(Path(folder, "x.y"), tree)
        assert same(read_state(Path(folder, "x.y")), tree)


def test_tensors_come_back(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    tree = {
        0: {"step": torch.tensor(3.0), "view": shared[2:4], "twice": [shared, shared]},
        "dtypes": tuple(torch.ones(2, 3, dtype=d).t() for d in (torch.bfloat16, torch.uint8, torch.int64, torch.bool)),
        "none": torch.zeros(0),
    }
    write_state(tmp_path / "a", tree)
    assert same(read_state(tmp_path / "a"), tree)
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "a.safetensors"}
    json.loads((tmp_path / "a.json").read_text())


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_goes_on_to_the_bit(tmp_path: Path, fused: bool) -> None:
    def steps(values: list[torch.nn.Parameter], optimizer: Any, schedule: Any, seeds: range) -> None:
        for seed in seeds:
            for value in values:
                value.grad = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
            schedule.step()

    def make() -> tuple[list[torch.nn.Parameter], Any, Any]:
        values = [torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(5))]
        optimizer = torch.optim.AdamW(values, lr=0.1, fused=fused)
        return values, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))

    whole, optimizer, schedule = make()
    steps(whole, optimizer, schedule, range(3))
    write_state(tmp_path / "optimizer", optimizer.state_dict())
    write_state(tmp_path / "schedule", schedule.state_dict())
    resumed, other, later = make()
    for mine, theirs in zip(resumed, whole, strict=True):
        mine.data.copy_(theirs.data)
    other.load_state_dict(read_state(tmp_path / "optimizer"))
    later.load_state_dict(read_state(tmp_path / "schedule"))
    steps(whole, optimizer, schedule, range(3, 6))
    steps(resumed, other, later, range(3, 6))
    assert all(torch.equal(one, two) for one, two in zip(whole, resumed, strict=True))
    assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"]


def test_random_states(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float, float]:
        return random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(1))

    kept = random_state()
    try:
        np.random.randn()  # numpy keeps the second of two normal numbers back
        write_state(tmp_path / "random_0", random_state())
        wanted = draw()
        assert draw() != wanted
        restore_random_state(read_state(tmp_path / "random_0"))
        assert draw() == wanted
    finally:
        restore_random_state(kept)


def test_what_cannot_be_kept(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="function is nothing that"):
        write_state(tmp_path / "a", {"f": [lambda: None]})


@pytest.mark.parametrize("content", [None, "", "{", '{"tensor": "7"}', '{"odd": 1}'])
def test_files_that_are_damaged(tmp_path: Path, content: str | None) -> None:
    write_state(tmp_path / "a", {"x": torch.zeros(2)})
    if content is None:
        (tmp_path / "a.safetensors").write_bytes(b"\x08")
    else:
        (tmp_path / "a.json").write_text(content)
    with pytest.raises(TrainingError) as caught:
        read_state(tmp_path / "a")
    assert "delete that checkpoint" in str(caught.value) and "\n" not in str(caught.value)
