"""The receipt of a merged checkpoint: what was merged, and the model card that says it to people."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from .checkpoint import CARD_FILE, RECEIPT_FILE, FileDigest
from .errors import CheckpointError, UsageError
from .region import Region
from .view import BaseView, Quantization

_FORMAT = 1
_FLAT_LIST = re.compile(r"\[\s+(-?\d+(?:,\s+-?\d+)*)\s+\]")


@dataclass(frozen=True, slots=True)
class MergedRegion:
    """What a merge did in one matrix for one task: the cells, and s of `delta` (lambda is the task's)."""

    region: Region
    scaling: float


@dataclass(frozen=True, slots=True)
class MergedTask:
    """One task of a merge.

    Attributes:
        weight: lambda. At 0 the base's bytes stay.
        variant: "fa" or "fb".
        composition, claim_digest: as the adapter records them.
        adapter_digest: sha256 (hex) of the adapter's safetensors file.
        cells: number of cells that it owns.
        cells_changed: number of them whose bits differ from the base's; None in a dry run.
        regions: module name -> cells and scaling.
        trained_view: of the base that it was trained on; None in receipts from before this was recorded.
        quantization: how that base was quantised, where the view is "dequantized".
    """

    weight: float
    variant: str
    composition: str | None
    claim_digest: str | None
    adapter_digest: str
    cells: int
    cells_changed: int | None
    regions: dict[str, MergedRegion]
    trained_view: BaseView | None = None
    quantization: Quantization | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a merged checkpoint is made of: `multisbora_receipt.json`. The same merge gives the same bytes.

    Attributes:
        base_model: name of the base model, without folders.
        base_fingerprint: of the base's adaptable tensors (sha256, hex).
        base_checked: whether every adapter was trained on this very base.
        tasks: task name -> what was merged.
        files: name -> digest of every other file of the checkpoint; in a dry run only the sizes.
        tensors_changed: stored tensors that hold cells of a task whose lambda is not 0.
        scores: what `evaluate` adds; empty after a merge.
        quantization: of the dequantised base that the tasks were added to; None for the base as stored.
    """

    base_model: str
    base_fingerprint: str
    base_checked: bool
    tasks: dict[str, MergedTask]
    files: dict[str, FileDigest]
    tensors_changed: tuple[str, ...]
    scores: dict[str, Any] = field(default_factory=dict)
    quantization: Quantization | None = None

    @property
    def cells_owned(self) -> int:
        return sum(task.cells for task in self.tasks.values())

    @property
    def cells_changed(self) -> int | None:
        counts = [task.cells_changed for task in self.tasks.values()]
        return None if None in counts else sum(cast(list[int], counts))

    def moved(self) -> list[str]:
        """A sentence for each task that was trained on another view of the base than it was merged onto."""
        return [
            f"{name} was trained on {_base(task.quantization)} and is merged onto {_base(self.quantization)}"
            for name, task in self.tasks.items()
            if task.trained_view is not None and task.quantization != self.quantization
        ]

    def to_json(self) -> dict[str, Any]:
        """The receipt's file as plain JSON values."""
        return {
            "format": _FORMAT,
            "base": {
                "model": self.base_model,
                "fingerprint": self.base_fingerprint,
                "checked": self.base_checked,
                **_view_json(self.quantization),
            },
            "tasks": {name: _task_json(task) for name, task in self.tasks.items()},
            "files": {name: {"sha256": file.sha256, "size": file.size} for name, file in self.files.items()},
            "tensors_changed": list(self.tensors_changed),
            "cells_changed": self.cells_changed,
            "cells_owned": self.cells_owned,
            "scores": self.scores,
        }

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write the receipt into a checkpoint folder, whole or not at all.

        Raises:
            OSError: the folder cannot be written.
        """
        text = json.dumps(self.to_json(), indent=1, sort_keys=True, allow_nan=False)
        text = _FLAT_LIST.sub(lambda match: "[" + " ".join(match[1].split()) + "]", text)  # one line a list of indices
        path = Path(folder) / RECEIPT_FILE
        partial = path.with_name(f".{RECEIPT_FILE}.{os.getpid()}.partial")
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Receipt:
        """Read the receipt of a merged checkpoint.

        Raises:
            CheckpointError: there is none, or it is damaged or of a later format.
        """
        path = Path(folder) / RECEIPT_FILE
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise CheckpointError(
                f"{path} does not exist: only a checkpoint that `merge` wrote has a receipt"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}; merge again") from None
        if isinstance(content, dict) and content.get("format") != _FORMAT:
            raise CheckpointError(f"{path} has format {content.get('format')!r}, not {_FORMAT}: update multisbora")
        try:
            quantization = content["base"].get("quantization")  # no receipt had it at first: all were of the original
            return cls(
                base_model=content["base"]["model"],
                base_fingerprint=content["base"]["fingerprint"],
                base_checked=content["base"]["checked"],
                tasks={name: _task(entry) for name, entry in content["tasks"].items()},
                files={name: FileDigest(entry["sha256"], entry["size"]) for name, entry in content["files"].items()},
                tensors_changed=tuple(content["tensors_changed"]),
                scores=content["scores"],
                quantization=None if quantization is None else Quantization.from_json(quantization),
            )
        except (KeyError, TypeError, AttributeError, UsageError) as error:
            raise CheckpointError(f"{path} is damaged ({error}): merge again") from None


def write_card(folder: Path, receipt: Receipt) -> FileDigest:
    """Write README.md, the model card that hubs show, beside the receipt."""
    base = receipt.base_model
    front = [f"base_model: {base}"] if base.count("/") == 1 else []
    rows = [
        f"| {name} | {task.weight:g} | {task.variant} | {len(task.regions)} | {task.cells:,} | {task.cells_changed:,} |"
        for name, task in receipt.tasks.items()
    ]
    checked = "" if receipt.base_checked else "\nThe adapters were merged although they name another base, or none.\n"
    view = (
        ""
        if receipt.quantization is None
        else f"""
Its base is not the stored one but the one that the tasks were trained on, which is quantised: the base's
{len(receipt.quantization.modules)} linear layers were quantised ({receipt.quantization}) and turned back to plain
weights before the tasks were added, so their other cells differ from the stored base's too.
"""
    )
    moved = "".join(f"\n{sentence}.\n" for sentence in receipt.moved())
    text = f"""---
{"".join(line + chr(10) for line in front)}tags:
- multisbora
- merge
---

# {base} with {", ".join(receipt.tasks)}

One plain checkpoint: the base model `{base}` plus {len(receipt.tasks)} separately trained task(s). It loads like the
base; file names, tensor names, shapes, dtypes and the tokenizer are the base's own.

| task | lambda | variant | matrices | cells owned | cells changed |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}
{checked}{view}{moved}
## How it was made

Each task owns some columns (fa) or rows (fb) of the weight matrices and was trained there alone (SBoRA, arXiv
2407.05413). Merging wrote `base + lambda * scaling * values` into the cells of each task, computed in fp32 and rounded
once. No cell has two owners, and every other cell has the base's bits. The tasks still act on each other's activations:
look at their scores together, not only at their cells.

## How to check it

`{RECEIPT_FILE}` lists tasks, cells and the sha256 of every file. With the base model and the adapters at hand,
`multisbora verify` on this folder compares every tensor bit by bit and names the first wrong cell.
"""
    path = folder / CARD_FILE
    path.write_text(text, encoding="utf-8", newline="\n")
    data = path.read_bytes()
    return FileDigest(hashlib.sha256(data).hexdigest(), len(data))


def _task_json(task: MergedTask) -> dict[str, Any]:
    return {
        "weight": task.weight,
        "variant": task.variant,
        "composition": task.composition,
        "claim_digest": task.claim_digest,
        "adapter_digest": task.adapter_digest,
        "cells": task.cells,
        "cells_changed": task.cells_changed,
        "regions": {
            name: {
                "indices": list(merged.region.indices),
                "excluded": list(merged.region.excluded),
                "scaling": merged.scaling,
            }
            for name, merged in task.regions.items()
        },
        **({} if task.trained_view is None else {"trained_on": _view_json(task.quantization)}),
    }


def _task(entry: dict[str, Any]) -> MergedTask:
    regions = {
        name: MergedRegion(
            Region(entry["variant"], tuple(region["indices"]), tuple(region["excluded"])), region["scaling"]
        )
        for name, region in entry["regions"].items()
    }
    view: BaseView | None = None
    quantization = None
    if "trained_on" in entry:  # no receipt had it at first
        scheme = entry["trained_on"]["quantization"]
        quantization = None if scheme is None else Quantization.from_json(scheme)
        view = _view(quantization)
        if entry["trained_on"]["view"] != view:
            raise UsageError(f"the view {entry['trained_on']['view']!r} does not fit its quantisation")
    told = {key: value for key, value in entry.items() if key != "trained_on"}
    return MergedTask(**{**told, "regions": regions, "trained_view": view, "quantization": quantization})


def _view(quantization: Quantization | None) -> BaseView:
    return "original" if quantization is None else "dequantized"


def _view_json(quantization: Quantization | None) -> dict[str, Any]:
    return {
        "view": _view(quantization),
        "quantization": None if quantization is None else quantization.to_json(),
    }


def _base(quantization: Quantization | None) -> str:
    return "the stored base" if quantization is None else f"the dequantised base ({quantization})"
