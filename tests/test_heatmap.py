"""Crosstalk as a picture: what is drawn where, and when it is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from commands import refused
from matplotlib import image

from multisbora.crosstalk import Crosstalk, Losses, Ratio
from multisbora.errors import CheckpointError, UsageError
from multisbora.heatmap import by_layer, check_plot, draw
from multisbora.shifts import Effect, Shift
from multisbora.weights import TaskWeight


def effect(*harms: list[float]) -> Effect:
    """Of energies by rows; the own ones are at lambda 1."""
    energy = np.array(harms)
    shift = Shift(energy, energy, energy.diagonal().copy())
    return Effect(shift, shift)


def losses(*changes: float) -> Losses:
    without = {f"task{i}": Ratio(change, None) for i, change in enumerate(changes)}
    return Losses(1, 9, 5, 3.0, 1.0, 2.0, Ratio(0.5, None), without)


def made(count: int = 2, layers: int = 2, scale: float = 1.0) -> Crosstalk:
    tasks = [f"task{i}" for i in range(count)]
    matrices = {
        f"model.layers.{layer}.{kind}": effect(
            *([scale * (1 + i + j + layer) if i != j else 4.0 for j in range(count)] for i in range(count))
        )
        for layer in range(layers)
        for kind in ("self_attn.q_proj", "mlp.down_proj")
    }
    found = {task: losses(*(0.1 * j - 0.2 * i for j in range(count))) for i, task in enumerate(tasks)}
    return Crosstalk(dict.fromkeys(tasks, TaskWeight()), found, matrices, 0)


def test_where_the_harm_is() -> None:
    matrices = {
        "model.layers.10.self_attn.q_proj": effect([2.0, 3.0], [5.0, 0.0]),
        "model.layers.2.mlp.experts.0.up": effect([1.0, 0.5], [1.0, 0.0]),
        "model.layers.2.mlp.experts.1.up": effect([1.0, 0.25], [1.0, 0.0]),
        "lm_head": effect([4.0, 1.0], [0.0, 0.0]),
    }
    found = Crosstalk({"a": TaskWeight(), "b": TaskWeight()}, {}, matrices, 0)
    layers, kinds, shares = by_layer(found)
    assert layers == ["-", "2", "10"]
    assert kinds == ["self_attn.q_proj", "mlp.experts.*.up", "lm_head"]
    own = 8.0
    nan = np.nan
    np.testing.assert_allclose(shares[0], np.array([[nan, nan, 1.0], [nan, 0.75, nan], [3.0, nan, nan]]) / own)
    assert np.isnan(shares[1]).all()  # b has no update to be compared with


@pytest.mark.parametrize("count", [2, 5])
def test_a_picture(count: int, tmp_path: Path) -> None:
    for name, found in (("one", made(count)), ("again", made(count)), ("other", made(count, scale=3.0))):
        draw(found, tmp_path / f"{name}.png")
    one, again, other = ((tmp_path / f"{name}.png").read_bytes() for name in ("one", "again", "other"))
    assert one == again != other
    assert one.startswith(b"\x89PNG")
    height, width, _ = image.imread(tmp_path / "one.png").shape
    assert 300 < height < 4000 and 500 < width < 4000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.png", "one.png", "other.png"]


def test_a_picture_of_nothing(tmp_path: Path) -> None:
    """No update adds anything."""
    nothing = effect([0.0, 0.0], [0.0, 0.0])
    draw(
        Crosstalk(
            {"task0": TaskWeight(), "task1": TaskWeight()},
            {"task0": losses(0.0, 0.0), "task1": losses(0.0, 0.0)},
            {"lm_head": nothing},
            0,
        ),
        tmp_path / "nothing.png",
    )
    assert (tmp_path / "nothing.png").stat().st_size > 0


def test_what_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(lambda: check_plot(tmp_path / "map.svg"), UsageError, "map.svg", "ends in .png")
    there = tmp_path / "there.PNG"
    there.write_text("")
    refused(lambda: draw(made(), there), CheckpointError, "there.PNG exists: choose another output")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(lambda: check_plot(tmp_path / "map.png"), UsageError, 'pip install "multisbora[plot]"')
    assert not (tmp_path / "map.png").exists()
