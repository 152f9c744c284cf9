"""The names that tasks and compositions go by: in folders, URLs, databases and on the command line."""

from __future__ import annotations

import re

from .errors import UsageError

MAX_NAME = 100
_BESIDE_ADAPTERS = (".run", ".log")  # TASK.run and TASK.log are what training keeps beside the adapter TASK


def check_name(name: str, what: str = "task", *, new_task: bool = False) -> str:
    """Return `name` if it can stand for a task or composition in a folder name, a URL and a command line.

    Args:
        new_task: a task shall be called so from now on. Names that older registries hold may end as no new one may.

    Raises:
        UsageError: it is empty, longer than 100 characters, or has others than letters, digits, dot, dash, underscore;
            or, of a new task, ends in .run or .log.
    """
    if isinstance(name, str) and len(name) <= MAX_NAME and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        if new_task and name.lower().endswith(_BESIDE_ADAPTERS):
            raise UsageError(
                f"task name {name!r} is not usable: training keeps the run of a task TASK in TASK.run and its output "
                "in TASK.log, beside the adapters; choose a name that ends in neither .run nor .log"
            )
        return name
    shown = repr(name) if len(repr(name)) <= 60 else repr(name)[:60] + "..."
    raise UsageError(
        f"{what} name {shown} is not usable: at most {MAX_NAME} letters, digits, '.', '-' or '_', "
        "and neither dot nor dash first"
    )
