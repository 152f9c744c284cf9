"""What one task holds, the store's history, and the names both go by. Plain data."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..region import Region, Variant

MAX_NAME = 100
_BESIDE_ADAPTERS = (".run", ".log")  # TASK.run and TASK.log are what training keeps beside the adapter TASK


@dataclass(frozen=True)
class TaskClaims:
    """What one task holds, in one composition of one model.

    Attributes:
        rank: the rank asked for; a `rank_pattern` may give single regions another.
        regions: module name -> region, the same in every composition that the task is in.
        stage: "allocated", "training" or "trained", as the commands that train reported it to the registry.
    """

    model: str
    geometry_digest: str
    composition: str
    task: str
    variant: Variant
    rank: int
    regions: dict[str, Region]
    stage: str = "allocated"

    @property
    def digest(self) -> str:
        """sha256 (hex) of what is held, and of what: all but the task's name, its stage and the composition.

        An adapter carries this, so that claims which changed since training show. A task can be renamed, and has the
        same regions in each of its compositions, so neither changes it.
        """
        content = {
            "model": self.model,
            "geometry_digest": self.geometry_digest,
            "variant": self.variant,
            "rank": self.rank,
            "regions": {name: [list(r.indices), list(r.excluded)] for name, r in self.regions.items()},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """`{"variant", "rank", "regions": {module: sorted indices}}`, as in design section 6."""
        regions = {name: list(region.indices) for name, region in self.regions.items()}
        return {"variant": self.variant, "rank": self.rank, "regions": regions}


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the store's history: who did what, when (ISO 8601, UTC)."""

    at: str
    actor: str
    action: str
    model: str
    composition: str | None
    task: str | None
    detail: dict[str, Any]


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
