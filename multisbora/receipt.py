"""The receipt of a merged checkpoint: what was merged, and the model card that says it to people."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from .checkpoint import RECEIPT_FILE, UNDO_FOLDER, FileDigest
from .errors import CheckpointError, MergeError, UsageError
from .kept import FOLDER as KEPT_FOLDER
from .kept import Correction
from .publish import write_whole
from .receipt_form import FORMAT, check_form
from .region import Region
from .untrusted import parse_json, read_bytes, shown
from .view import BaseView, Quantization
from .weights import TaskWeight

_MAX_BYTES = 256 << 20
_MAX_MARKS = 20_000_000  # most of them indices: of 20,000 matrices, 1000 each
_FLAT_LIST = re.compile(r"\[\s+(-?\d+(?:,\s+-?\d+)*)\s+\]")


@dataclass(frozen=True, slots=True)
class MergedRegion:
    """What a merge did in one matrix for one task.

    Attributes:
        region: the cells.
        scaling: s of `delta`.
        weight: lambda in this matrix. At 0 the base's bytes stay.
        digest: blake3 (hex) of the cells as they are in the checkpoint, in the layout of `Cells`; None in a dry run.
        undo_digest: the same of what they hold without the task.
    """

    region: Region
    scaling: float
    weight: float
    digest: str | None = None
    undo_digest: str | None = None


@dataclass(frozen=True, slots=True)
class MergedTask:
    """One task of a merge.

    Attributes:
        weight: lambda, in all matrices or by patterns, as it was asked for.
        variant: "fa" or "fb".
        composition, claim_digest: as the adapter records them.
        adapter_digest: sha256 (hex) of the adapter's safetensors file.
        base_fingerprint: of the base that it was trained on, as the adapter records it.
        cells: number of cells that it owns.
        cells_changed: number of them whose bits differ from the base's; None in a dry run.
        regions: module name -> cells and scaling.
        quantization: how the base was quantised that it was trained on; None for the base as stored.
    """

    weight: TaskWeight
    variant: str
    composition: str | None
    claim_digest: str | None
    adapter_digest: str
    base_fingerprint: str | None
    cells: int
    cells_changed: int | None
    regions: dict[str, MergedRegion]
    quantization: Quantization | None = None


@dataclass(frozen=True, slots=True)
class MergedWhole:
    """A stored tensor that tasks trained whole, see `whole.Whole`.

    Attributes:
        how: "keep" or "average".
        weights: task -> lambda.
        cells_changed: number of its values whose bits differ from the base's; None in a dry run.
        digest, undo_digest: blake3 (hex) of the tensor as merged, and of the base's; None in a dry run.
    """

    how: str
    weights: dict[str, float]
    cells_changed: int | None = None
    digest: str | None = None
    undo_digest: str | None = None


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """A file of tensors: its size in bytes, and sha256 (hex) of its header, the 8 bytes of the length included."""

    size: int
    header: str


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a merged checkpoint is made of: `multisbora_receipt.json`. The same merge gives the same bytes.

    Attributes:
        base_model: name of the base model, without folders.
        base_fingerprint: of the base's adaptable tensors, see `stream.fingerprint`.
        tasks: task name -> what was merged.
        weights: name -> every file of tensors.
        tensors: stored tensor -> blake3 (hex) of the base's bytes, in the view that the tasks were added to; empty in
            a dry run. With them and the undo files a checkpoint is checked without its base.
        files: name -> digest of every other file of the checkpoint; in a dry run only the sizes.
        max_shard_size: bytes, where tensors were laid out in other files than the base's.
        tensors_changed: stored tensors that hold cells of a task whose lambda there is not 0.
        scores: what `evaluate` adds; empty after a merge.
        quantization: of the dequantised base that the tasks were added to; None for the base as stored.
        whole: stored tensor -> how tasks were merged that trained all of it. Counts of cells leave these out.
        correction: of a corrected merge, see `correct`; None where tasks were merged as they are. A plain receipt's
            file does not speak of it.
    """

    base_model: str
    base_fingerprint: str
    tasks: dict[str, MergedTask]
    weights: dict[str, WeightsFile]
    tensors: dict[str, str]
    files: dict[str, FileDigest]
    tensors_changed: tuple[str, ...]
    max_shard_size: int | None = None
    scores: dict[str, Any] = field(default_factory=dict)
    quantization: Quantization | None = None
    whole: dict[str, MergedWhole] = field(default_factory=dict)
    correction: Correction | None = None

    @property
    def base_checked(self) -> bool:
        """Whether every adapter was trained on this very base."""
        return all(task.base_fingerprint == self.base_fingerprint for task in self.tasks.values())

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
            if task.quantization != self.quantization
        ]

    def check(self) -> None:
        """Refuse what could be written, but not be read again: names and patterns that are long or not printable.

        Raises:
            MergeError: there is one.
        """
        try:
            check_form(self.to_json())
        except UsageError as error:
            raise MergeError(f"no receipt can tell of this merge ({error}): choose other names, or patterns") from None

    def to_json(self) -> dict[str, Any]:
        """The receipt's file as plain JSON values."""
        return {
            "format": FORMAT,
            "base": {
                "model": self.base_model,
                "fingerprint": self.base_fingerprint,
                "checked": self.base_checked,
                **_view_json(self.quantization),
            },
            "tasks": {name: _task_json(task) for name, task in self.tasks.items()},
            "weights": {name: {"size": file.size, "header": file.header} for name, file in self.weights.items()},
            "tensors": dict(self.tensors),
            "files": {name: {"sha256": file.sha256, "size": file.size} for name, file in self.files.items()},
            "whole": {tensor: asdict(whole) for tensor, whole in self.whole.items()},
            "max_shard_size": self.max_shard_size,
            "tensors_changed": list(self.tensors_changed),
            "cells_changed": self.cells_changed,
            "cells_owned": self.cells_owned,
            "scores": self.scores,
            **({} if self.correction is None else {"corrected": self.correction.to_json()}),
        }

    def to_bytes(self) -> bytes:
        """The receipt's file: sorted, with every list of indices on one line."""
        content = _sorted(self.to_json())
        for name, task in self.tasks.items():  # of its patterns the first that fits decides: they keep their order
            content["tasks"][name]["weight"] = task.weight.to_json()
        text = json.dumps(content, indent=1, allow_nan=False)
        return (_FLAT_LIST.sub(lambda match: "[" + " ".join(match[1].split()) + "]", text) + "\n").encode()

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write the receipt into a checkpoint folder, whole or not at all.

        Raises:
            OSError: the folder cannot be written.
        """
        write_whole(Path(folder) / RECEIPT_FILE, self.to_bytes())

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Receipt:
        """Read the receipt of a merged checkpoint.

        Raises:
            CheckpointError: there is none, or it is damaged or of another format.
        """
        path = Path(folder) / RECEIPT_FILE
        try:
            data = read_bytes(path, _MAX_BYTES)
        except FileNotFoundError:
            raise CheckpointError(
                f"{path} does not exist: only a checkpoint that `merge` wrote has a receipt"
            ) from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}; merge again") from None
        except ValueError as error:
            raise CheckpointError(f"{path} cannot be used, {error}: is it a receipt?") from None
        return cls.parse(data, path)

    @classmethod
    def parse(cls, data: bytes, path: Path) -> Receipt:
        """Read what `to_bytes` gave.

        Args:
            path: what a message names.

        Raises:
            CheckpointError: it is damaged or of another format.
        """
        try:
            content = parse_json(data, _MAX_MARKS)
        except ValueError as error:
            raise CheckpointError(f"{path} cannot be used, {error}: merge again") from None
        try:
            check_form(content)
            quantization, correction = content["base"]["quantization"], content.get("corrected")
            return cls(
                base_model=content["base"]["model"],
                base_fingerprint=content["base"]["fingerprint"],
                tasks={name: _task(name, entry) for name, entry in content["tasks"].items()},
                weights={n: WeightsFile(entry["size"], entry["header"]) for n, entry in content["weights"].items()},
                tensors=dict(content["tensors"]),
                files={name: FileDigest(entry["sha256"], entry["size"]) for name, entry in content["files"].items()},
                tensors_changed=tuple(content["tensors_changed"]),
                max_shard_size=content["max_shard_size"],
                whole={tensor: MergedWhole(**entry) for tensor, entry in content["whole"].items()},
                scores=content["scores"],
                quantization=None if quantization is None else Quantization.from_json(quantization),
                correction=None if correction is None else Correction.from_json(correction),
            )
        except UsageError as error:
            why = shown(str(error), 300)
            raise CheckpointError(f"{path} is damaged or of another version ({why}): merge again") from None


def card(receipt: Receipt) -> bytes:
    """README.md, the model card that hubs show."""
    base = receipt.base_model
    front = [f"base_model: {base}"] if base.count("/") == 1 else []
    rows = [
        f"| {name} | {_cell(task.weight)} | {task.variant} | {len(task.regions)} "
        f"| {task.cells:,} | {task.cells_changed:,} |"
        for name, task in receipt.tasks.items()
    ]
    if rows:
        rows[:0] = [
            "| task | lambda | variant | matrices | cells owned | cells changed |",
            "| --- | --- | --- | --- | --- | --- |",
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
    wrote = "`base + lambda * scaling * values`"
    corrected = ""
    if receipt.correction is not None and receipt.tasks:
        wrote = "`base + corrected values`"
        corrected = f"""
This is a corrected merge: the values of each task are not those that it trained, but those by which all tasks together
come nearest to what each of them, at its lambda, does alone, by least squares over the second moments of what their
rows send into each matrix (ridge {receipt.correction.ridge:g}). `{KEPT_FOLDER}/` holds the values as trained and as
corrected, and these moments: with them tasks are taken out, and the others solved again.
"""
    text = f"""---
{"".join(line + chr(10) for line in front)}tags:
- multisbora
- merge
---

# {base} with {", ".join(receipt.tasks) or "no task"}

One plain checkpoint: the base model `{base}` plus {len(receipt.tasks)} separately trained task(s). It loads like the
base; file names, tensor names, shapes, dtypes and the tokenizer are the base's own.

{chr(10).join(rows) or "All its tasks were taken out again: its weights are the base's, bit for bit."}
{checked}{view}{moved}
## How it was made

Each task owns some columns (fa) or rows (fb) of the weight matrices and was trained there alone (SBoRA, arXiv
2407.05413). Merging wrote {wrote} into the cells of each task, computed in fp32 and rounded
once. No cell has two owners, and every other cell has the base's bits. The tasks still act on each other's activations:
look at their scores together, not only at their cells.
{corrected}
## How to check it

`{RECEIPT_FILE}` lists tasks, cells and digests of every file and tensor; `{UNDO_FOLDER}/` holds what the tasks' cells
were before. `multisbora verify --quick` on this folder checks it against these alone. With the base model and the
adapters at hand, `multisbora verify` compares every tensor bit by bit and names the first wrong cell. `multisbora
remove` takes a task out of it again.
"""
    return text.encode()


def _cell(value: object) -> str:
    """A value in a row of a table: patterns have bars."""
    return str(value).replace("|", r"\|")


def _sorted(content: Any) -> Any:
    """JSON values with the keys of every object in order."""
    if isinstance(content, dict):
        return {key: _sorted(content[key]) for key in sorted(content)}
    return [_sorted(value) for value in content] if isinstance(content, list) else content


def _task_json(task: MergedTask) -> dict[str, Any]:
    return {
        "weight": task.weight.to_json(),
        "variant": task.variant,
        "composition": task.composition,
        "claim_digest": task.claim_digest,
        "adapter_digest": task.adapter_digest,
        "base_fingerprint": task.base_fingerprint,
        "cells": task.cells,
        "cells_changed": task.cells_changed,
        "regions": {
            name: {
                "indices": list(merged.region.indices),
                "excluded": list(merged.region.excluded),
                "scaling": merged.scaling,
                "weight": merged.weight,
                "digest": merged.digest,
                "undo_digest": merged.undo_digest,
            }
            for name, merged in task.regions.items()
        },
        "trained_on": _view_json(task.quantization),
    }


def _task(name: str, entry: dict[str, Any]) -> MergedTask:
    regions = {
        module: MergedRegion(
            Region(entry["variant"], tuple(region["indices"]), tuple(region["excluded"])),
            region["scaling"],
            region["weight"],
            region["digest"],
            region["undo_digest"],
        )
        for module, region in entry["regions"].items()
    }
    scheme = entry["trained_on"]["quantization"]
    quantization = None if scheme is None else Quantization.from_json(scheme)
    if entry["trained_on"]["view"] != _view(quantization):
        raise UsageError(f"the view {entry['trained_on']['view']!r} does not fit its quantisation")
    told = {key: value for key, value in entry.items() if key != "trained_on"}
    weight = TaskWeight.of(entry["weight"], name)
    return MergedTask(**{**told, "weight": weight, "regions": regions, "quantization": quantization})


def _view(quantization: Quantization | None) -> BaseView:
    return "original" if quantization is None else "dequantized"


def _view_json(quantization: Quantization | None) -> dict[str, Any]:
    return {
        "view": _view(quantization),
        "quantization": None if quantization is None else quantization.to_json(),
    }


def _base(quantization: Quantization | None) -> str:
    return "the stored base" if quantization is None else f"the dequantised base ({quantization})"
