"""Adapters whose regions cross, as tasks of one composition have them, and the checkpoints that are merged of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builders import draw_regions, write_adapter

from multisbora.geometry import from_checkpoint
from multisbora.stream import fingerprint


def write_mix(
    folder: Path, base: Path, variants: Mapping[str, str], *, rank: int = 4, target_modules: Any = "all-linear"
) -> dict[str, Path]:
    """One adapter a task; where fb crosses fa, the task that comes first keeps the cells.

    Args:
        variants: task -> "fa" or "fb", the earliest claim first.
    """
    geometry = from_checkpoint(base)
    mark = fingerprint(base, geometry)
    regions = draw_regions(geometry, variants, rank=rank, target_modules=target_modules)
    found: dict[str, Path] = {}
    for seed, (task, variant) in enumerate(variants.items()):
        crossing = [other for other in found if variants[other] != variant]
        excluded = {
            module: sorted({index for other in crossing for index in regions[other][module]})
            for module in regions[task]
            if crossing
        }
        found[task] = write_adapter(
            folder / task,
            geometry,
            task,
            variant=variant,
            indices=regions[task],
            excluded=excluded,
            seed=seed,
            base_fingerprint=mark,
        )
    return found
