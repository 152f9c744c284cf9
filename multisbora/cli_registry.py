"""The commands under `multisbora registry`: what can be asked of, and done to, the store of claims as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import UsageError, VerificationError
from .terminal import DryRun, Json, Targets, Task, say, show, split, split_targets, table

registry_app = typer.Typer(
    help="Prove, review, and look after the store of claims.", no_args_is_help=True, rich_markup_mode=None
)

Force = Annotated[bool, typer.Option("--force", help="Do it though a merged checkpoint here depends on the task.")]


@registry_app.command()
def check(as_json: Json = False) -> None:
    """Prove every invariant of the store. Exit code 3 and what is broken, the worst first, if anything is."""
    from . import lifecycle
    from .project import Project

    where, found = lifecycle.check(Project.load())
    result = found.to_json()
    counts = ", ".join(f"{number:,} {what}" for what, number in result.items() if type(number) is int)
    show(result, as_json, [counts, *found.problems, *(["every invariant holds"] if found.ok else [])])
    if not found.ok:
        raise VerificationError(f"registry {where} does not hold: {found.problems[0]}")


@registry_app.command()
def history(
    task: Annotated[str | None, typer.Option("--task", help="Only what happened to this task.")] = None,
    as_json: Json = False,
) -> None:
    """Say who did what to the model's claims, and when."""
    from . import lifecycle
    from .project import Project

    events = lifecycle.history(Project.load(), task)
    rows: list[tuple[object, ...]] = [("at", "who", "action", "task", "composition", "detail")]
    for event in events:
        detail = " ".join(f"{_short(key)}={_short(value)}" for key, value in event.detail.items())
        rows.append((event.at, event.actor, event.action, event.task or "-", event.composition or "-", detail))
    keys = ("at", "actor", "action", "model", "composition", "task", "detail")
    show([{key: getattr(event, key) for key in keys} for event in events], as_json, table(rows))


@registry_app.command()
def export(
    output: Annotated[Path | None, typer.Option("--output", help="File to write; left out: standard output.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Write the whole store as one JSON, in an order that makes small differences under version control."""
    from . import lifecycle
    from .project import Project

    text = lifecycle.export(Project.load(), output, dry_run)
    if output is None:
        print(text, end="")
    else:
        say(f"{'would write' if dry_run else 'wrote'} {output}: {len(text.encode()):,} bytes")


@registry_app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="What `multisbora registry export` wrote.")],
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Add what a file holds to the store: all of it or, where something collides, nothing."""
    from . import lifecycle
    from .project import Project

    found = lifecycle.import_(Project.load(), path, dry_run=dry_run).to_json()
    verb = "would add" if dry_run else "added"
    show(found, as_json, [f"{verb} " + ", ".join(f"{_count(value)} {what}" for what, value in found.items())])


@registry_app.command()
def rename(
    task: Task,
    to: Annotated[str, typer.Option("--to", help="The new name.")],
    force: Force = False,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Give a task another name, in the store and in its adapter folder. What it holds stays."""
    from . import lifecycle
    from .project import Project

    lifecycle.rename(Project.load(), task, to, force=force, dry_run=dry_run)
    verb = "would rename" if dry_run else "renamed"
    recipe = f"its recipe, if it has one of its own, is renamed by hand: tasks/{task}.yaml to tasks/{to}.yaml"
    show({"task": task, "to": to, "dry_run": dry_run}, as_json, [f"{verb} {task} to {to}", recipe])


@registry_app.command()
def forget(task: Task, as_json: Json = False, dry_run: DryRun = False) -> None:
    """Delete what `multisbora measure` found of a task's rows: others are no longer isolated from it. Claims stay."""
    from . import lifecycle
    from .project import Project

    lifecycle.forget(Project.load(), task, dry_run=dry_run)
    show(
        {"task": task, "dry_run": dry_run},
        as_json,
        [f"{'would forget' if dry_run else 'forgot'} the moments of {task}"],
    )


@registry_app.command()
def protect(
    columns: Annotated[str | None, typer.Option("--columns", help="Input channels, separated by commas.")] = None,
    rows: Annotated[str | None, typer.Option("--rows", help="Output channels, separated by commas.")] = None,
    channels: Annotated[
        Path | None, typer.Option("--channels", help='JSON file {"columns": {module: [...]}, "rows": {module: [...]}}.')
    ] = None,
    targets: Targets = None,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Keep channels from ever being owned: given ones of every target matrix, or those that a file lists."""
    from . import lifecycle
    from .project import Project

    given = {"columns": _channels(columns, "--columns"), "rows": _channels(rows, "--rows")}
    found = lifecycle.protect(Project.load(), given, split_targets(targets), channels, dry_run=dry_run)
    verb = "would protect" if dry_run else "protected"
    lines = [f"{verb} {sum(map(len, of.values())):,} {axis} of {len(of)} matrices" for axis, of in found.items() if of]
    show(found, as_json, lines or ["all of them are protected already"])


@registry_app.command()
def unprotect(as_json: Json = False, dry_run: DryRun = False) -> None:
    """Give every protected channel of the model free. Tasks that left them out keep doing so."""
    from . import lifecycle
    from .project import Project

    count = lifecycle.unprotect(Project.load(), dry_run=dry_run)
    show({"channels": count}, as_json, [f"{'would give' if dry_run else 'gave'} {count:,} protected channels free"])


def _channels(text: str | None, flag: str) -> list[int]:
    names = split(text) or []
    try:
        return [int(name) for name in names]
    except ValueError:
        raise UsageError(f"{flag} {text!r} is not a list of channel numbers, for example 3,17") from None


def _short(value: Any) -> str:
    text = str(value)
    text = text if len(text) <= 16 else text[:12] + "..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)  # a file's text must not steer a terminal


def _count(value: Any) -> int:
    return value if isinstance(value, int) else len(value)
