"""The commands on merged checkpoints: made, proven, changed where they lie, shipped as patches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import VerificationError
from .terminal import (
    BaseView,
    Composition,
    DryRun,
    Json,
    Output,
    Task,
    Tasks,
    Weight,
    WeightsFrom,
    say,
    show,
    split,
    table,
)

if TYPE_CHECKING:
    from .receipt import Receipt

Deployed = Annotated[Path, typer.Argument(metavar="DIR", help="A merged checkpoint.")]
Adapters = Annotated[
    str | None, typer.Option("--adapters", metavar="DIR", help="Folder of the tasks' adapters, if not the project's.")
]
OneAdapter = Annotated[
    Path | None, typer.Option("--adapter", help="Folder of the task's adapter, if not the project's.")
]
AllowMismatch = Annotated[
    bool, typer.Option("--allow-base-mismatch", help="Take an adapter that was trained on another base.")
]


def merge(
    output: Output,
    tasks: Tasks = None,
    weight: Weight = None,
    weights_from: WeightsFrom = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            "--max-shard-size",
            metavar="SIZE",
            help="Lay the weights out in files of at most 5GB, 500MB, ...; as in the base if not given.",
        ),
    ] = None,
    base_view: BaseView = None,
    whole_modules: Annotated[
        str | None,
        typer.Option(
            "--whole-modules",
            help="What happens to modules that a task trained whole: refuse, keep, or average them by lambda. As the "
            "recipes say, if not given.",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="plain: the cells hold what was trained. corrected: other values in them, by which tasks disturb each "
            "other less; needs `multisbora measure` of every task.",
        ),
    ] = "plain",
    ridge: Annotated[
        float | None,
        typer.Option("--ridge", help="Pull of a corrected merge towards the plain one, 0.01 if not given."),
    ] = None,
    adapters: Adapters = None,
    composition: Composition = None,
    allow_base_mismatch: Annotated[
        bool, typer.Option("--allow-base-mismatch", help="Merge adapters that were trained on another base.")
    ] = False,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Compose trained tasks into one plain checkpoint. Without --tasks: all tasks of the composition."""
    from .deployed import merge_tasks
    from .project import Project

    merged = merge_tasks(
        Project.load(composition=composition, adapters=adapters),
        split(tasks),
        weight or [],
        weights_from,
        output,
        max_shard_size=max_shard_size,
        whole_modules=whole_modules,
        base_view=base_view,
        allow_base_mismatch=allow_base_mismatch,
        dry_run=dry_run,
        say=say,
        method=method,
        ridge=ridge,
    )
    rows = _task_rows(merged.receipt)
    within = "" if adapters is None else f" --adapters {adapters}"
    done = f"wrote {output}: prove it with `multisbora verify {output}{within}`"
    show(merged.to_json(), as_json, [*table(rows), merged.line(output) if dry_run else done])


def verify(
    path: Deployed,
    base: Annotated[str | None, typer.Option("--base", help="Base model, if not the project's.")] = None,
    adapter: Annotated[
        list[Path] | None, typer.Option("--adapter", help="Adapter folder, if not the project's; once a task.")
    ] = None,
    adapters: Adapters = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="By the checkpoint's own digests, without base and adapters.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Prove a merged checkpoint against its base and adapters. Exit code 3 and the first wrong cell if it is wrong."""
    from .deployed import verify_merged

    proof = verify_merged(path, base, adapter, adapters, quick, say=say)
    outside = "some" if proof.cells_outside_regions is None else proof.cells_outside_regions
    lines = [
        f"{proof.tensors} tensors, {proof.cells_changed:,} cells changed, {outside} of them outside the tasks' regions"
    ]
    if proof.ok:
        lines.append(f"{path} is what its {'receipt says' if quick else 'base and adapters make it'}")
    show(proof.to_json(), as_json, lines)
    if not proof.ok:
        raise VerificationError(f"{path} does not hold: {proof.problem}")


def add(
    path: Deployed,
    task: Task,
    weight: Weight = None,
    weights_from: WeightsFrom = None,
    adapter: OneAdapter = None,
    base_view: BaseView = None,
    allow_base_mismatch: AllowMismatch = False,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Put one more trained task into a merged checkpoint where it lies: whole or not at all."""
    from .deployed import add_task, edit_lines

    edit = add_task(path, task, adapter, weight or [], weights_from, base_view, allow_base_mismatch, dry_run, say)
    show(edit.to_json(), as_json, edit_lines(path, edit, dry_run))


def remove(path: Deployed, task: Task, as_json: Json = False, dry_run: DryRun = False) -> None:
    """Take a task out of a merged checkpoint where it lies, bit for bit. Needs neither base nor adapter."""
    from .deployed import edit_lines, remove_task

    edit = remove_task(path, task, dry_run, say)
    show(edit.to_json(), as_json, edit_lines(path, edit, dry_run))


def reweight(
    path: Deployed,
    task: Task,
    weight: Weight = None,
    weights_from: WeightsFrom = None,
    adapter: OneAdapter = None,
    allow_base_mismatch: AllowMismatch = False,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Give a task of a merged checkpoint another weight where it lies."""
    from .deployed import edit_lines, reweight_task

    edit = reweight_task(path, task, adapter, weight or [], weights_from, allow_base_mismatch, dry_run, say)
    show(edit.to_json(), as_json, edit_lines(path, edit, dry_run))


def diff(
    path: Deployed,
    output: Annotated[Path, typer.Option("--output", help="File to make, for example patch.safetensors.")],
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Write what tasks changed in a merged checkpoint to one small file, for those who have the base."""
    from .deployed import diff_merged

    found = diff_merged(path, output, dry_run, say)
    rows: list[tuple[object, ...]] = [("task", "cells"), *found.cells.items()]
    share = f"{found.size:,} bytes, {found.size / found.checkpoint_size:.2%} of the checkpoint"
    end = f"would write {output}: {share}" if dry_run else f"wrote {output}: {share}; `multisbora apply` takes it"
    show(found.to_json(), as_json, [*table(rows), end])


def apply(
    patch: Annotated[Path, typer.Argument(metavar="PATCH", help="File that `multisbora diff` wrote.")],
    output: Output,
    base: Annotated[str | None, typer.Option("--base", help="Base model, if not the project's.")] = None,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Make the merged checkpoint that a patch was taken from, byte for byte, out of the patch and the base."""
    from .deployed import apply_patch

    receipt = apply_patch(patch, base, output, dry_run, say)
    rows = _task_rows(receipt)
    end = f"would write {output}" if dry_run else f"wrote {output}: every file is the one that the patch was taken from"
    show(receipt.to_json(), as_json, [*table(rows), end])


def _task_rows(receipt: Receipt) -> list[tuple[object, ...]]:
    """A table of the tasks of a merge."""
    rows: list[tuple[object, ...]] = [("task", "lambda", "variant", "cells owned", "cells changed")]
    for name, task in receipt.tasks.items():
        changed = "-" if task.cells_changed is None else task.cells_changed
        rows.append((name, str(task.weight), task.variant, task.cells, changed))
    return rows
