"""What a merged checkpoint's receipt tells: read with suspicion, and only ever compared, but for lambdas and view."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..patterns import MAX_PATTERNS, check_pattern, matches_end
from ..untrusted import read_json
from .proof import Weight
from .tensors import UNREADABLE, one_line

RECEIPT = "multisbora_receipt.json"
_FORMAT = 2
_MAX_BYTES = 256 << 20
_MAX_MARKS = 20_000_000
KEPT = "multisbora_corrected"  # where a corrected checkpoint keeps what it was solved from
WHOLE_OWNER = "+whole"  # has the undo file of what tasks trained whole; no task can be called so
_KEYS = {"format", "base", "tasks", "weights", "tensors", "files", "whole", "max_shard_size", "tensors_changed"}
_KEYS |= {"cells_changed", "cells_owned", "scores"}
_BASE_KEYS = {"model", "fingerprint", "checked", "view", "quantization"}
_SCHEME_KEYS = {"kind", "dtype", "block_size", "double", "modules", "digest"}
_REST_KEYS = ("composition", "claim_digest", "adapter_digest", "base_fingerprint", "trained_on")
_DIGEST = re.compile("[0-9a-f]{64}")
# Names of tasks become names of files.
_TASK_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class ToldRegion:
    """What the receipt tells of one task in one matrix; digests are blake3 in hex, of cells with and without tasks."""

    indices: list[int]
    excluded: list[int]
    scaling: float
    weight: float
    digest: str
    undo_digest: str


@dataclass(frozen=True, slots=True)
class ToldTask:
    """What the receipt tells of one task; `rest` is what is only compared, by its keys in the file."""

    weight: Weight
    variant: str
    cells: int
    cells_changed: int
    regions: dict[str, ToldRegion]
    rest: dict[str, Any]

    def at(self, module: str) -> float:
        """lambda in one matrix, as it follows from the task's weight: the first pattern that names it decides."""
        if not isinstance(self.weight, dict):
            return self.weight
        patterns = (pattern for pattern in self.weight if pattern != "default")
        return self.weight[next((p for p in patterns if matches_end(p, module)), "default")]


@dataclass(frozen=True, slots=True)
class ToldWhole:
    """What the receipt tells of a stored tensor that tasks trained whole; `weights` is task -> lambda."""

    how: str
    weights: dict[str, float]
    cells_changed: int
    digest: str
    undo_digest: str


@dataclass(frozen=True, slots=True)
class ToldKept:
    """What the receipt tells of a file in which a corrected checkpoint keeps one task: blake3 (hex), and its bytes."""

    digest: str
    size: int


@dataclass(frozen=True, slots=True)
class ToldCorrection:
    """What the receipt tells of a corrected merge; `files` is task -> what is kept of it."""

    ridge: float
    files: dict[str, ToldKept]


@dataclass(frozen=True, slots=True)
class Told:
    """What the receipt tells.

    Attributes:
        fingerprint, checked: of the base, and whether every adapter names it.
        whole: stored tensor -> what was made of it, where tasks trained all of it.
        quantization: of the dequantised base; None for the base as stored.
        weights: file of tensors -> (bytes, sha256 of its head).
        tensors: stored tensor -> blake3 of the base's bytes.
        files: other file -> (bytes, sha256).
        correction: of a corrected merge; None for a plain one.
    """

    fingerprint: str
    checked: bool
    quantization: dict[str, Any] | None
    tasks: dict[str, ToldTask]
    whole: dict[str, ToldWhole]
    weights: dict[str, tuple[int, str]]
    tensors: dict[str, str]
    files: dict[str, tuple[int, str]]
    max_shard_size: int | None
    tensors_changed: list[str]
    cells_changed: int
    cells_owned: int
    correction: ToldCorrection | None

    @property
    def kept_files(self) -> dict[str, str]:
        """Task -> the file that a corrected checkpoint keeps of it."""
        files = self.correction.files if self.correction else {}
        return {task: f"{KEPT}/{task}-{kept.digest[:16]}.safetensors" for task, kept in files.items()}

    @property
    def undo_files(self) -> list[str]:
        """Whom the checkpoint keeps undo files of."""
        return [*self.tasks, *([WHOLE_OWNER] if self.whole else [])]

    def inner_problems(self) -> list[str]:
        """What does not hold whatever the weights are: lambdas, sums, and whether the base was checked."""
        problems = []
        for name, task in self.tasks.items():
            for module, region in task.regions.items():
                if region.weight != task.at(module):
                    problems.append(
                        f"{name}: the receipt has the lambda {region.weight:g} in {module}, where the task's weight is "
                        f"{task.at(module):g}"
                    )
        for tensor, whole in self.whole.items():
            at = {name: task.at(tensor.rpartition(".")[0]) for name, task in self.tasks.items()}
            if any(weight != at.get(name) for name, weight in whole.weights.items()):
                problems.append(f"the receipt has other lambdas in {tensor}, trained whole, than its tasks have there")
            if not whole.weights or 0 in whole.weights.values() or (whole.how == "keep" and len(whole.weights) > 1):
                problems.append(f"{tensor}: the receipt has {len(whole.weights)} tasks that trained it whole")
        if self.correction is not None and self.correction.files.keys() != self.tasks.keys():
            problems.append("the receipt has other tasks that were corrected than it has tasks")
        named = all(task.rest["base_fingerprint"] == self.fingerprint for task in self.tasks.values())
        if self.checked != named:
            problems.append(f"the receipt has checked = {self.checked}, but its tasks name {_bases(named)}")
        for what, told, found in (
            ("owned", self.cells_owned, sum(task.cells for task in self.tasks.values())),
            ("changed", self.cells_changed, sum(task.cells_changed for task in self.tasks.values())),
        ):
            if told != found:
                problems.append(f"the receipt says {told} cells {what} in all, those of its tasks are {found}")
        return problems


def _bases(named: bool) -> str:
    return "its base" if named else "another base, or none"


def read_receipt(folder: Path) -> Told | str:
    """The receipt of a merged checkpoint; or what is wrong with it."""
    path = folder / RECEIPT
    try:
        if not path.is_file():
            raise FileNotFoundError("there is no such file")
        content = read_json(path, _MAX_BYTES, _MAX_MARKS)
        if content["format"] != _FORMAT:
            return f"{path} has format {str(content['format'])[:20]!r}, not {_FORMAT}: merge again"
        return _told(content)
    except (*UNREADABLE, UsageError) as error:
        return f"{path} is missing or damaged: {one_line(error)}"


def _told(content: dict[str, Any]) -> Told:
    corrected = {"corrected"} & content.keys()
    base = _keys(_keys(content, _KEYS | corrected)["base"], _BASE_KEYS)
    _is(base["model"], str), _is(content["scores"], dict)
    view, scheme = base["view"], base["quantization"]
    if (view, scheme is None) not in (("original", True), ("dequantized", False)):
        raise ValueError(f"the base view {view!r} does not fit its quantisation")
    limit = content["max_shard_size"]
    return Told(
        fingerprint=_is(base["fingerprint"], str),
        checked=_is(base["checked"], bool),
        quantization=None if scheme is None else _keys(_is(scheme, dict), _SCHEME_KEYS),
        tasks={_task_name(name): _task(entry) for name, entry in content["tasks"].items()},
        whole={tensor: _whole(entry) for tensor, entry in content["whole"].items()},
        weights={_file_name(n): (_is(e["size"], int), _is(e["header"], str)) for n, e in content["weights"].items()},
        tensors={name: _is(digest, str) for name, digest in content["tensors"].items()},
        files={_file_name(n): (_is(e["size"], int), _is(e["sha256"], str)) for n, e in content["files"].items()},
        max_shard_size=None if limit is None else _is(limit, int),
        tensors_changed=[_is(name, str) for name in _is(content["tensors_changed"], list)],
        cells_changed=_is(content["cells_changed"], int),
        cells_owned=_is(content["cells_owned"], int),
        correction=_correction(content["corrected"]) if corrected else None,
    )


def _task(entry: dict[str, Any]) -> ToldTask:
    if not _DIGEST.fullmatch(entry["adapter_digest"]):
        raise ValueError(f"{entry['adapter_digest'][:40]!r} is no digest of an adapter")
    _keys(entry, {*_REST_KEYS, "weight", "variant", "cells", "cells_changed", "regions"})
    return ToldTask(
        weight=_weight(entry["weight"]),
        variant=_is(entry["variant"], str),
        cells=_is(entry["cells"], int),
        cells_changed=_is(entry["cells_changed"], int),
        regions={module: _region(region) for module, region in entry["regions"].items()},
        rest={key: entry[key] for key in _REST_KEYS},
    )


def _region(entry: dict[str, Any]) -> ToldRegion:
    _keys(entry, {"indices", "excluded", "scaling", "weight", "digest", "undo_digest"})
    return ToldRegion(
        indices=_numbers(entry["indices"]),
        excluded=_numbers(entry["excluded"]),
        scaling=_number(entry["scaling"]),
        weight=_number(entry["weight"]),
        digest=_is(entry["digest"], str),
        undo_digest=_is(entry["undo_digest"], str),
    )


def _whole(entry: dict[str, Any]) -> ToldWhole:
    if entry["how"] not in ("keep", "average"):
        raise ValueError(f"{str(entry['how'])[:40]!r} is no way to merge what was trained whole")
    return ToldWhole(
        how=entry["how"],
        weights={task: _number(weight) for task, weight in entry["weights"].items()},
        cells_changed=_is(entry["cells_changed"], int),
        digest=_is(entry["digest"], str),
        undo_digest=_is(entry["undo_digest"], str),
    )


def _correction(entry: dict[str, Any]) -> ToldCorrection:
    _keys(entry, {"ridge", "tasks"})
    files = {}
    for task, told in entry["tasks"].items():
        _keys(told, {"digest", "size", "rows", "tokens", "source"})
        _is(told["rows"], int), _is(told["tokens"], int)
        if not _DIGEST.fullmatch(told["digest"]) or told["source"] not in ("task", "text", "adapter"):
            raise ValueError("what the receipt tells of a kept file is no such thing")
        files[_task_name(task)] = ToldKept(told["digest"], _is(told["size"], int))
    ridge = _number(entry["ridge"])
    if ridge <= 0:
        raise ValueError("the ridge is not positive")
    return ToldCorrection(ridge, files)


def _weight(value: Any) -> Weight:
    if not isinstance(value, dict):
        return _number(value)
    if len(value) > MAX_PATTERNS:
        raise ValueError(f"a weight has {len(value)} patterns")
    for pattern in value:
        check_pattern(pattern)
    found = {pattern: _number(number) for pattern, number in value.items()}
    found["default"]
    return found


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError("a weight or scaling is no number")
    return float(value)


def _numbers(values: Any) -> list[int]:
    if not isinstance(values, list) or set(map(type, values)) - {int}:
        raise ValueError("indices are no list of whole numbers")
    return values


def _keys(entry: dict[str, Any], keys: Set[str]) -> dict[str, Any]:
    """An object of exactly these keys: what nobody here looks at must not be in it, nor what others need be missing."""
    if odd := sorted(entry.keys() ^ keys):
        raise ValueError(f"{odd[0][:40]!r} is {'missing' if odd[0] in keys else 'no part of a receipt'}")
    return entry


def _is(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{str(value)[:40]!r} is no {kind.__name__}")
    return value


def _task_name(name: str) -> str:
    if not _TASK_NAME.fullmatch(name):
        raise ValueError(f"{name[:40]!r} is no name of a task")
    return name


def _file_name(name: str) -> str:
    parts: Iterable[str] = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\0" in name:
        raise ValueError(f"{name[:40]!r} is no file of the checkpoint")
    return name
