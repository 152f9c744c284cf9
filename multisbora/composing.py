"""What the commands do that look at a composition in a running model, before it is merged."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .adapter import TRAINING_FILE, rewrite, training_record
from .deployed import moments_of
from .errors import AdapterError, UsageError
from .journal import reading
from .lifecycle import required
from .moments import MOMENTS_FILE
from .project import Project
from .publish import check_output, check_output_file, publish, publish_file
from .recipe import load
from .weights import SUFFIXES, GivenWeights, check_by, check_suffix, write_weights

if TYPE_CHECKING:
    from .crosstalk import Crosstalk
    from .tune import Tuned

Say = Callable[[str], None]


def measure_crosstalk(
    project: Project,
    tasks: Sequence[str] | None,
    rows: int | None,
    weight: Sequence[str],
    weights_from: Path | None,
    base_view: str | None,
    overrides: Sequence[str],
    plot: Path | None,
    dry_run: bool,
    quiet: Callable[[], None],
    say: Say,
) -> Crosstalk:
    """What trained tasks do to each other; None takes all that hold claims in the project's composition.

    Args:
        rows: of each task; None takes the default.
        plot: a PNG file to draw it into.
    """
    if plot is not None:
        from .heatmap import check_plot

        check_plot(plot)
    given = GivenWeights.read(weight, weights_from)
    tasks = _trained(project, tasks)
    recipes = [load(task, Path(project.recipes), overrides) for task in tasks]
    weights = given.of(tasks, say, "looked at")
    base = project.base(say)
    from .crosstalk import ROWS, crosstalk

    quiet()
    with reading(base, say=say):
        found = crosstalk(
            base,
            [project.adapter(task) for task in tasks],
            recipes,
            rows=ROWS if rows is None else rows,
            weights=weights,
            base_view=base_view,
            dry_run=dry_run,
            say=say,
        )
    if plot is not None and not dry_run:
        from .heatmap import draw

        draw(found, plot)
    return found


def tune_tasks(
    project: Project,
    tasks: Sequence[str] | None,
    weight: Sequence[str],
    weights_from: Path | None,
    output: Path | None,
    overrides: Sequence[str],
    dry_run: bool,
    quiet: Callable[[], None],
    say: Say,
    corrected: bool = False,
    **settings: Any,
) -> Tuned:
    """Tune the lambdas of trained tasks; None takes all that hold claims in the project's composition.

    Args:
        weight, weights_from: lambdas to start from.
        output: file of weights to make; by channel, folder of adapters.
        corrected: for a merge by method corrected, with the moments that it would take.
        settings: of `tune`.
    """
    if "by" in settings:
        check_by(settings["by"])
    by_channel = settings.get("by") == "channel"
    if output is not None and by_channel:
        _check_folder(output)
    elif output is not None:
        check_suffix(output)
        check_output_file(output)
    given = GivenWeights.read(weight, weights_from)
    tasks = _trained(project, tasks)
    recipes = [load(task, Path(project.recipes), overrides) for task in tasks]
    start = given.of(tasks, say, "tuned")
    moments = None
    if corrected:
        with required(project) as registry:
            moments = moments_of(registry, project, {task: project.adapter(task) for task in tasks}, {}, say)
    base = project.base(say)
    from .tune import tune

    quiet()
    with reading(base, say=say):
        found = tune(
            base,
            [project.adapter(task) for task in tasks],
            recipes,
            start=start,
            moments=moments,
            dry_run=dry_run,
            say=say,
            **settings,
        )
    if output is None or dry_run:
        return found
    if found.values is not None:
        heard = {task: own for task, own in found.values.items() if any(map(np.any, own.values()))}
        for task in found.values.keys() - heard.keys():
            say(f"task {task} is at 0 in every channel, and adds nothing: there is no adapter of it in {output}")
        with publish(output) as folder:
            for task, values in heard.items():
                _write_tuned(project.adapter(task), values, folder / task, found)
    else:
        note = f"made by multisbora tune --by {found.by} --method {found.method} --follow {found.follow}"
        if found.ridge is not None:
            note += f" --corrected --ridge {found.ridge!r}, for multisbora merge --method corrected"
        with publish_file(output) as path:
            write_weights(path, found.weights, note)
    return found


def _write_tuned(trained: Path, values: Mapping[str, Any], output: Path, found: Tuned) -> None:
    """Write an adapter with tuned values; what trained it says that, too, where there is such a record."""
    rewrite(trained, values, output, leave=MOMENTS_FILE)  # moments are of what was trained
    record = training_record(output)
    if not record:
        return
    settings = {"by": found.by, "steps": found.steps, "follow": found.follow, "ridge": found.ridge}
    record["tuned"] = {"tasks": list(found.tasks), **settings}
    (output / TRAINING_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_folder(output: Path) -> None:
    """Refuse a name for adapters that is one for a file, or taken.

    Raises:
        UsageError, CheckpointError: it is.
    """
    if output.suffix in SUFFIXES:
        raise UsageError(
            f"{output} is a file's name, and lambdas by channel are written as adapters: give --output a folder, or "
            "tune by matrix"
        )
    check_output(output)


def _trained(project: Project, tasks: Sequence[str] | None) -> list[str]:
    """Names of tasks that have an adapter in this project.

    Raises:
        UsageError: none is named, and none holds claims in the project's composition.
        AdapterError: one is not trained.
    """
    if tasks is None:
        with required(project) as registry:
            tasks = list(registry.claims(project.model_name, project.composition))
    if not tasks:
        raise UsageError(f"no task holds claims in composition {project.composition}: name another with --composition")
    for task in tasks:
        if not project.adapter(task).is_dir():
            raise AdapterError(
                f"{project.adapter(task)} does not exist: `multisbora train --task {task}`, or name others with --tasks"
            )
    return list(tasks)
