"""The commands on a composition in a running model, before it is merged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .terminal import BaseView, Composition, DryRun, Json, Set, Tasks, Weight, WeightsFrom, say, show, split, table

if TYPE_CHECKING:
    from .crosstalk import Crosstalk, Ratio
    from .shifts import Figures
    from .tune import Tuned
    from .weights import TaskWeight


def crosstalk(
    tasks: Tasks = None,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="Rows of each task, 200 if not given.")] = None,
    weight: Weight = None,
    weights_from: WeightsFrom = None,
    worst: Annotated[int, typer.Option("--worst", min=0, help="Matrices to name for each task.")] = 5,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw it as heat maps too.")] = None,
    base_view: BaseView = None,
    composition: Composition = None,
    set_: Set = None,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Measure what tasks do to each other: on each other's activations, in every matrix, and on each other's loss.

    Their dev rows are looked at, or training rows where a recipe holds none out. Without --tasks: all tasks of the
    composition.
    """
    from .commands import quiet_libraries
    from .composing import measure_crosstalk
    from .project import Project

    project = Project.load(composition=composition)
    found = measure_crosstalk(
        project,
        split(tasks),
        rows,
        weight or [],
        weights_from,
        base_view,
        set_ or [],
        plot,
        dry_run,
        quiet_libraries,
        say,
    )
    show(found.to_json(worst), as_json, _lines(found, worst, plot))


def tune(
    tasks: Tasks = None,
    by: Annotated[
        str, typer.Option("--by", help="What has a lambda of its own: task, kind, layer, matrix or channel of each.")
    ] = "matrix",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="PATH",
            help="YAML or JSON file to make, for `merge --weights-from`; by channel a folder, for `merge --adapters`.",
        ),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=2, help="Rows of each task: half to learn, half to judge.")] = 128,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of the gradient, or trials of the search.")] = 32,
    method: Annotated[
        str, typer.Option("--method", help="gradient, or search: for few lambdas, where there are no gradients.")
    ] = "gradient",
    follow: Annotated[
        str,
        typer.Option(
            "--follow",
            help="What lambdas are fitted to: answers of dev rows; own, what each task's own adapter says on training "
            "rows; or both in turn.",
        ),
    ] = "answers",
    slack: Annotated[
        float, typer.Option("--slack", min=0, help="Share of its gain that a task may lose for the others' sake.")
    ] = 0.01,
    regular: Annotated[
        float, typer.Option("--regular", min=0, help="How strongly the gradient holds lambdas of one task together.")
    ] = 0.5,
    seed: Annotated[int, typer.Option("--seed", help="Of the search.")] = 0,
    corrected: Annotated[bool, typer.Option("--corrected", help="For a merge by `--method corrected`.")] = False,
    ridge: Annotated[float | None, typer.Option("--ridge", help="Of that merge, 0.01 if not given.")] = None,
    weight: Weight = None,
    weights_from: WeightsFrom = None,
    base_view: BaseView = None,
    composition: Composition = None,
    set_: Set = None,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Find the lambdas at which every task keeps most of its own gain, on dev rows. Starts at --weight, else at 1.

    Half of each task's dev rows (training rows, where a recipe holds none out) say where lambdas go, the other half
    what is kept of it; with --follow own training rows say the first, with both training rows too. Without --tasks:
    all tasks of the composition.
    """
    from .commands import quiet_libraries
    from .composing import tune_tasks
    from .project import Project

    found = tune_tasks(
        Project.load(composition=composition),
        split(tasks),
        weight or [],
        weights_from,
        output,
        set_ or [],
        dry_run,
        quiet_libraries,
        say,
        corrected,
        by=by,
        method=method,
        follow=follow,
        rows=rows,
        steps=steps,
        slack=slack,
        regular=regular,
        seed=seed,
        base_view=base_view,
        ridge=ridge,
    )
    show(found.to_json(), as_json, _tuned_lines(found, output))


def _tuned_lines(found: Tuned, output: Path | None) -> list[str]:
    """What people are told of tuned lambdas."""
    if found.chosen is None:
        made = "" if output is None else f" and write {output}"
        return [f"would tune {found.lambdas} lambdas in {found.steps} steps{made}"]
    heading = ("task", "rows", "base", "own", "before", "after", "kept before", "kept after", "lambda")
    rows: list[tuple[object, ...]] = [heading]
    for name, task in found.tasks.items():
        losses = (f"{value:.4f}" for value in (task.base, task.own, task.before, task.after))
        weight = found.weights[name]
        is_mean = weight.patterns and found.chosen.step  # of the start, the default is what somebody said
        told = f"{weight.default:g} in the mean" if is_mean else _lambda(weight)
        if found.values is not None:
            told = "by channel"
        rows.append((name, task.rows, *losses, _kept(task.retention_before), _kept(task.retention_after), told))
    points: list[tuple[object, ...]] = [("step", *found.tasks, "")]
    for point in found.front:
        taken = "taken" if point.step == found.chosen.step else ""
        points.append((str(point.step), *(_kept(value) for value in point.retention.values()), taken))
    command = "multisbora merge" + (f" --method corrected --ridge {found.ridge!r}" if found.ridge is not None else "")
    end = f"--output FILE writes them for `{command} --weights-from`"
    if output is not None:
        end = f"wrote {output}: `{command} --weights-from {output}`"
    if found.values is not None:
        end = "--output DIR writes adapters that have them for `multisbora merge --adapters`"
        if output is not None:
            end = f"wrote adapters that have them: `multisbora merge --adapters {output}`"
    return [
        "loss of the answers, nats a token; kept: share of the own adapter's gain",
        *table(rows),
        "",
        "what can be had: no point is better than these for every task",
        *table(points),
        "",
        f"{found.lambdas} lambdas, {found.steps} steps; {end}",
    ]


def _kept(retention: float | None) -> str:
    return "-" if retention is None else f"{retention:.1%}"


def _lines(found: Crosstalk, worst: int, plot: Path | None) -> list[str]:
    """What people are told of crosstalk."""
    if not found.losses:
        drawn = "" if plot is None else f" and write {plot}"
        return [f"would send {found.passes} rows of {', '.join(found.tasks)} through the model{drawn}"]
    losses: list[tuple[object, ...]] = [("task", "rows", "lambda", "base", "own", "merged", "retention")]
    for task, loss in found.losses.items():
        figures = (f"{value:.4f}" for value in (loss.base, loss.solo, loss.merged))
        kept = "-" if loss.retention is None else _with_error(loss.retention, "{:.1%}")
        losses.append((task, loss.rows, _lambda(found.weights[task]), *figures, kept))
    changes = [[_with_error(found.losses[on].without[of], "{:+.4f}") for of in found.tasks] for on in found.tasks]
    total = found.total
    lines = [
        "loss of the answers, nats a token; retention: share of the own adapter's gain that is left",
        *table(losses),
        *_square(
            "energy of each task's update on the rows of each, own as trained = 100%", found, _shares(total.shift.share)
        ),
        *_square("the same where the loss hears it, tokens weighted by |g|^2", found, _shares(total.harm.share)),
        *_square("cosine of what it adds with what the own update adds, |g|^2", found, _signed(total.harm.cosine)),
        *_square("change of the loss if a task is left out, nats a token", found, changes),
    ]
    culprits: list[tuple[object, ...]] = [("rows of", "update of", "matrix", "of all harm there", "of the own there")]
    for culprit in found.worst(worst):
        own = "-" if culprit.against_own is None else f"{culprit.against_own:.0%}"
        culprits.append((culprit.on, culprit.of, culprit.module, f"{culprit.share:.1%}", own))
    if len(culprits) > 1:
        lines += ["", "the matrices that do the harm", *table(culprits)]
    return lines if plot is None else [*lines, "", f"wrote {plot}"]


def _lambda(weight: TaskWeight) -> str:
    count = len(weight.patterns)
    return f"{weight.default:g} but for {count} patterns" if count > 3 else str(weight)


def _square(heading: str, found: Crosstalk, cells: list[list[str]]) -> list[str]:
    """A table with a line for the rows and a column for the update of each task."""
    width = max(len(cell) for line in cells for cell in line)
    lines = [(on, *(cell.rjust(width) for cell in line)) for on, line in zip(found.tasks, cells, strict=True)]
    return ["", heading, *table([("rows of \\ update of", *found.tasks), *lines])]


def _shares(values: Figures) -> list[list[str]]:
    return [["-" if math.isnan(value) else f"{value:.1%}" for value in line] for line in values]


def _signed(values: Figures) -> list[list[str]]:
    return [["-" if math.isnan(value) else f"{value:+.2f}" for value in line] for line in values]


def _with_error(ratio: Ratio, form: str) -> str:
    shown = form.format(ratio.value)
    return shown if ratio.error is None else f"{shown} +- {form.replace('+', '').format(ratio.error)}"
