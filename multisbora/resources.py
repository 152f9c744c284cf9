"""Where the data that ships with multisbora lies: geometry cards and task recipes.

A wheel carries them inside the package; a checkout has them in `registry/models` and `tasks`, next to the package.
"""

from __future__ import annotations

from pathlib import Path

from .errors import MultisboraError

_PACKAGE = Path(__file__).resolve().parent


def models_dir() -> Path:
    """The folder of geometry cards, one JSON a model.

    Raises:
        MultisboraError: this installation has none.
    """
    return _find("models", "registry/models")


def tasks_dir() -> Path:
    """The folder of task recipes, one YAML a task.

    Raises:
        MultisboraError: this installation has none.
    """
    return _find("tasks", "tasks")


def _find(packaged: str, checkout: str) -> Path:
    # The wheel's copy goes first: beside an installed package lies site-packages, whose `tasks` would be a stranger's.
    for folder in (_PACKAGE / "_data" / packaged, _PACKAGE.parent / checkout):
        if folder.is_dir():
            return folder
    raise MultisboraError(f"this installation of multisbora lacks its {packaged}: install it again")
