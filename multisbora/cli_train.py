"""The commands that train tasks, in this process or in others, and that measure their rows for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .distributed import finish, hush, is_first
from .errors import TrainingError, UsageError
from .terminal import Composition, DryRun, Json, OneTask, Set, Tasks, say, show, split, table

if TYPE_CHECKING:
    from .moments import Moments
    from .project import Project

_MEASURED = ("source", "rows", "tokens", "matrices", "channels")


def train(
    task: OneTask = None,
    tasks: Tasks = None,
    max_steps: Annotated[int | None, typer.Option("--max-steps", help="Optimizer steps, in place of epochs.")] = None,
    quantization: Annotated[
        str | None, typer.Option("--quantization", help="Quantise the base to train on it: nf4 or int8.")
    ] = None,
    isolate: Annotated[
        float | None,
        typer.Option(
            "--isolate",
            metavar="STRENGTH",
            help="Keep the update quiet on the rows of the other tasks of its compositions, which `multisbora measure` "
            "has to have looked at. 1000 if not given, for the tasks that were measured; 0 is off.",
        ),
    ] = None,
    composition: Composition = None,
    set_: Set = None,
    deepspeed: Annotated[
        Path | None, typer.Option("--deepspeed", help="DeepSpeed config file, in JSON. Start with torchrun.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine", help="For --tasks: local (one after another, if not given) or ray (as many at once as fit)."
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option("--address", help="Of a running Ray cluster, HOST:PORT. RAY_ADDRESS, or one here, if not given."),
    ] = None,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Train one task alone, into adapters/TASK, or with --tasks several. An interrupted run goes on by itself.

    On several devices, start it with `torchrun --nproc-per-node N -m multisbora train ...` or `accelerate launch`.

    With --tasks each task has a process of its own, and its output goes to adapters/TASK.log. A process that is killed
    is started again and goes on. Tasks that are trained already are left as they are.
    """
    from .commands import quiet_libraries, train_task
    from .project import Project

    flags = {"max_steps": max_steps, "quantization": quantization, "isolate": isolate}
    overrides = [*(set_ or []), *(f"training.{key}={value}" for key, value in flags.items() if value is not None)]
    if (task is None) == (tasks is None):
        raise UsageError("name the task with --task, or several with --tasks")
    if task is not None and (engine is not None or address is not None):
        raise UsageError("--engine and --address are for --tasks: name the task with that")
    if tasks is not None and deepspeed is not None:
        raise UsageError("--deepspeed trains one task in several processes: name it with --task")

    project = Project.load(composition=composition)
    if task is None:
        _train_several(project, split(tasks) or [], overrides, engine, address, as_json, dry_run)
        return
    talk = say if is_first() else hush
    found = train_task(project, task, overrides, deepspeed, dry_run=dry_run, say=talk, quiet=quiet_libraries)
    finish()
    if not is_first():
        return
    line = f"{found.steps} steps, {found.tokens:,} tokens, {found.trainable_parameters:,} trainable parameters"
    if found.loss is None:
        show(found.to_json(), as_json, [f"{found.adapter} would be trained: {line}"])
        return
    kept = "" if found.dev_loss is None else f", dev loss {found.dev_loss:.4f} at step {found.best_step}, which is kept"
    took = f"{found.seconds:.0f} s in this session"
    show(found.to_json(), as_json, [f"{found.adapter}: {line}, loss {found.loss:.4f}{kept}, {took}"])


def measure(
    tasks: Annotated[str, typer.Option("--tasks", help="Task names, separated by commas.")],
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of each task at most.")] = 128,
    text: Annotated[
        Path | None, typer.Option("--text", help="Plain text file that stands for the rows of tasks that have none.")
    ] = None,
    trained: Annotated[
        bool, typer.Option("--trained", help="Through each task's own adapter, for merge --method corrected.")
    ] = False,
    set_: Set = None,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Measure what tasks' rows send through the base model, into the registry: what allocation and training go by.

    One pass over the base, before a task is allocated or after it. Blocks of channels are measured for the claims that
    there are; when tasks join a composition, `allocate` measures again where the rows are here. --trained measures once
    more after training, into the adapters' folders, which a corrected merge then goes by.
    """
    from . import allocating
    from .commands import quiet_libraries
    from .project import Project

    project, names = Project.load(), split(tasks) or []
    found: dict[str, dict[str, object]] = {}

    def note(moments: Moments) -> None:
        channels = [len(site.channels) for site in moments.sites.values()]
        found[moments.task] = {
            "rows": moments.rows,
            "tokens": moments.tokens,
            "source": moments.source,
            "matrices": len(channels),
            "channels": sum(channels),
            "base_fingerprint": moments.base_fingerprint,
        }
        say(f"measured task {moments.task}")

    if dry_run:
        quiet_libraries()
        found = allocating.survey_tasks(project, names, rows, text, say, set_ or [], trained).to_json()
    elif trained:
        allocating.measure_trained(project, names, rows, text, say, quiet_libraries, note, set_ or [])
    else:
        allocating.measure_tasks(
            project,
            names,
            rows,
            text,
            dry_run=False,
            say=say,
            quiet=quiet_libraries,
            on_measured=note,
            overrides=set_ or [],
        )
    shown = [(task, *(told[key] for key in _MEASURED)) for task, told in found.items()]
    show(found, as_json, table([("task", *_MEASURED), *shown]))


def _train_several(
    project: Project,
    tasks: list[str],
    overrides: list[str],
    engine: str | None,
    address: str | None,
    as_json: bool,
    dry_run: bool,
) -> None:
    from .cluster import train_tasks
    from .commands import quiet_libraries

    if dry_run or engine == "ray":  # the plan is made in this process; the others have logs of their own
        quiet_libraries()
    found = train_tasks(project, tasks, overrides, engine=engine or "local", address=address, dry_run=dry_run, say=say)
    show(found.to_json(), as_json, table(found.rows()))
    if found.failure is not None:
        raise TrainingError(found.failure)
