"""What one task holds, and the store's history. Plain data."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from ..region import Region, Variant


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
