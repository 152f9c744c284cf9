"""Crosstalk as a picture: task by task, and where in the model it is.

matplotlib draws it, which is installed with the extra `plot` alone. Its figures are made without pyplot, so that
nothing of the process' settings is read or changed, and the same figures give the same bytes.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .cards import EXPERT, LAYER
from .errors import UsageError
from .publish import check_output_file, publish_file

if TYPE_CHECKING:
    from .crosstalk import Crosstalk
    from .shifts import Figures

_ABREAST = 4  # maps of tasks in one line of the picture


def check_plot(path: Path) -> None:
    """Refuse a picture that could not be written, before hours of work go into what it is to show.

    Raises:
        UsageError: it is to be something else than a PNG file, or matplotlib is not installed.
        CheckpointError: the file exists.
    """
    if path.suffix.lower() != ".png":
        raise UsageError(f"the picture is a PNG file, and {path} is called otherwise: give a name that ends in .png")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError('a picture needs matplotlib: pip install "multisbora[plot]", or leave --plot out')
    check_output_file(path)


def by_layer(found: Crosstalk) -> tuple[list[str], list[str], Figures]:
    """The harm of all other tasks' updates in each part of the model.

    Returns:
        (layers, kinds, shares): shares (tasks, layers, kinds), of the harm of the task's own update, as trained, in the
        whole model; NaN where the model has no such matrix that a task adapts, or the own update adds nothing. Experts
        of a layer are summed. A matrix in no layer, as a head, stands in one called "-".
    """
    places = {module: _place(module) for module in found.matrices}
    numbers = sorted({layer for layer, _ in places.values()})
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    own = found.total.harm.own
    sums = np.full((len(own), len(numbers), len(kinds)), np.nan)
    for module, effect in found.matrices.items():
        layer, kind = places[module]
        place = (slice(None), numbers.index(layer), kinds.index(kind))
        others = effect.harm.energy.sum(1) - np.diag(effect.harm.energy)
        sums[place] = np.nan_to_num(sums[place]) + others
    shares = np.divide(sums, own[:, None, None], out=np.full(sums.shape, np.nan), where=own[:, None, None] > 0)
    return ["-" if number < 0 else str(number) for number in numbers], kinds, shares


def _place(module: str) -> tuple[int, str]:
    """Number of the layer, and what the matrix is called in each layer."""
    layer = LAYER.search(module)
    if layer is None:
        return -1, module
    return int(layer.group()), EXPERT.sub("*", module[layer.end() + 1 :])


def draw(found: Crosstalk, path: Path) -> None:
    """Write the picture.

    Raises:
        UsageError, CheckpointError: see `check_plot`.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    layers, kinds, shares = by_layer(found)
    count = len(found.tasks)
    lines = -(-count // _ABREAST)
    heights = [2.2 + 0.45 * count, lines * (1.8 + 0.14 * len(layers))]
    widths = [3 * (2.4 + 0.5 * count), min(count, _ABREAST) * (1.8 + 0.34 * len(kinds))]
    figure = Figure(figsize=(max(widths), sum(heights)), layout="constrained", dpi=120)
    parts: Any = figure.subfigures(2, 1, height_ratios=heights)
    top, bottom = parts
    _draw_tasks(top, found)
    _draw_layers(bottom, found.tasks, layers, kinds, shares, lines)
    with publish_file(path) as partial:
        figure.savefig(partial, format="png", metadata={"Software": None})


def _draw_tasks(figure: Any, found: Crosstalk) -> None:
    changes = np.array([[found.losses[on].without[of].value for of in found.tasks] for on in found.tasks])
    limit = float(np.abs(changes).max()) or 1.0
    panels: list[tuple[str, Figures, str, dict[str, Any]]] = [
        ("energy, own = 1", found.total.shift.share, "{:.2f}", {"cmap": "YlOrRd", "vmin": 0.0}),
        ("energy that the loss hears, own = 1", found.total.harm.share, "{:.2f}", {"cmap": "YlOrRd", "vmin": 0.0}),
        ("loss without the task, nats a token", changes, "{:+.3f}", {"cmap": "RdBu", "vmin": -limit, "vmax": limit}),
    ]
    for axes, (title, values, form, colours) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axes.imshow(values, **colours)
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(len(found.tasks)), found.tasks, rotation=45, ha="right", fontsize=8)
        axes.set_yticks(range(len(found.tasks)), found.tasks, fontsize=8)
        axes.set_xlabel("update of", fontsize=8)
        axes.set_ylabel("rows of", fontsize=8)
        for (i, j), value in np.ndenumerate(values):
            text = "-" if np.isnan(value) else form.format(value)
            axes.text(
                j, i, text, ha="center", va="center", fontsize=7, bbox={"facecolor": "white", "alpha": 0.6, "lw": 0}
            )


def _draw_layers(
    figure: Any, tasks: tuple[str, ...], layers: list[str], kinds: list[str], shares: Figures, lines: int
) -> None:
    known = shares[np.isfinite(shares)]
    limit = float(known.max(initial=0.0)) or 1.0
    grid = figure.subplots(lines, min(len(tasks), _ABREAST), squeeze=False)
    shown = None
    for axes, task, values in zip(grid.flat, tasks, shares, strict=False):
        shown = axes.imshow(values, aspect="auto", cmap="YlOrRd", vmin=0.0, vmax=limit)
        axes.set_title(f"harm on rows of {task}", fontsize=9)
        axes.set_xticks(range(len(kinds)), kinds, rotation=90, fontsize=7)
        step = max(1, len(layers) // 16)
        axes.set_yticks(range(0, len(layers), step), layers[::step], fontsize=7)
        axes.set_ylabel("layer", fontsize=8)
    for axes in grid.flat[len(tasks) :]:
        axes.set_axis_off()
    bar = figure.colorbar(shown, ax=grid, fraction=0.03)
    bar.set_label("of the harm of the own update in all matrices", fontsize=8)
