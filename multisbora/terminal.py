"""What the commands share: options that mean the same everywhere, names in, tables and JSON out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import UsageError


def _checked(what: str, text: str | None) -> str | None:
    """An option's text, each name in it checked before anything else is done with it."""
    from .names import check_name

    for name in [text] if text is not None and what != "tasks" else split(text) or []:
        check_name(name, what.removesuffix("s"))
    return text


def _tasks(text: str | None) -> str | None:
    return _checked("tasks", text)


def _task(text: str | None) -> str | None:
    return _checked("task", text)


def _composition(text: str | None) -> str | None:
    return _checked("composition", text)


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would be done; write nothing.")]
Model = Annotated[str | None, typer.Option("--model", help="Base model: a hub id or a folder.")]
Tasks = Annotated[str | None, typer.Option("--tasks", help="Task names, separated by commas.", callback=_tasks)]
Task = Annotated[str, typer.Option("--task", help="Name of the task.", callback=_task)]
OneTask = Annotated[str | None, typer.Option("--task", help="Name of the task.", callback=_task)]
VariantOption = Annotated[str | None, typer.Option("--variant", help="fa owns columns, fb owns rows.")]
Rank = Annotated[int | None, typer.Option("--rank", help="Columns or rows that a task owns of each matrix.")]
Targets = Annotated[str | None, typer.Option("--targets", help="Target modules, separated by commas, or all-linear.")]
Composition = Annotated[
    str | None,
    typer.Option("--composition", help="Name of the set of tasks that may be merged together.", callback=_composition),
]
Weight = Annotated[
    list[str] | None,
    typer.Option(
        "--weight",
        metavar="TASK=LAMBDA",
        help="Weight of a task, 1 if not given; TASK:PATTERN=LAMBDA for the matrices that a pattern names.",
    ),
]
WeightsFrom = Annotated[
    Path | None,
    typer.Option(
        "--weights-from", help="YAML or JSON file of weights. --weight goes before it, a pattern before its patterns."
    ),
]
Output = Annotated[Path, typer.Option("--output", help="Folder to make.")]
BaseView = Annotated[
    str | None,
    typer.Option(
        "--base-view",
        help="Base that adapters are put on: original, or dequantized (quantised as in training and turned back). "
        "The one they were trained on, if not given.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Another value for a key of the recipe, e.g. training.epochs=1."),
]


def split(names: str | None) -> list[str] | None:
    """Names separated by commas.

    Raises:
        UsageError: there is nothing between them.
    """
    if names is None:
        return None
    found = [name.strip() for name in names.split(",") if name.strip()]
    if not found:
        raise UsageError(f"{names!r} names nothing: separate names with commas")
    return found


def split_targets(text: str | None) -> Any:
    """The value of --targets."""
    return "all-linear" if text == "all-linear" else split(text)


def say(message: str) -> None:
    """A message for people, on stderr."""
    print(message, file=sys.stderr, flush=True)


def show(result: Any, as_json: bool, lines: Iterable[str]) -> None:
    """A command's result on stdout."""
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        for line in lines:
            print(line)


def table(rows: Sequence[Sequence[object]]) -> list[str]:
    """Rows of equal length as aligned lines; the first is the heading. Numbers stand on the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [isinstance(cell, int | float) for cell in rows[-1]]
    return [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in cells
    ]
