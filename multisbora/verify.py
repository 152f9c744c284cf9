"""Prove that a merged checkpoint is its base plus its adapters and nothing else, bit for bit.

The oracle works on its own: it reads files with safetensors' own reader and derives the expected cells a second time,
index by index in torch. It shares no code with what it judges, so that a mistake there cannot hide here. Where tasks
were added to the dequantised base, it quantises every matrix anew through bitsandbytes' own layers; "the base" is then
the dequantised one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import AdapterError, CheckpointError, UsageError

_RECEIPT = "multisbora_receipt.json"
_OWN_FILES = {_RECEIPT, "multisbora_undo.safetensors", "README.md"}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Kinds of files without which a merged checkpoint is another model than its base, or none.
_NEEDED = (".json", ".jinja", ".model", ".py", ".txt")
_TRANSPOSED_TYPES = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError),
    SafetensorError,
)
# Parts that a library puts before the numbered blocks of a language model, in any order; and parts of another model
# beside it, whose blocks may have the same names.
_AROUND = {"base_model", "model", "language_model"}
_BESIDE = re.compile(r"\b(?:(?:vision|audio)_(?:tower|model|encoder)|vision_backbone|visual|speech_encoder)\b")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class TaskProof:
    """One task in a merged checkpoint: cells it owns, cells whose bits differ from the base's, its lambda."""

    cells: int
    cells_changed: int
    weight: float


@dataclass(frozen=True, slots=True)
class Proof:
    """What `verify` found.

    Attributes:
        ok: everything holds.
        tensors: number of tensors compared bit by bit.
        cells_changed: cells whose bits differ between base and merged checkpoint, owned or not.
        cells_outside_regions: those of them that no task owns.
        tasks: task name -> its part.
        problem: the first thing that does not hold; a wrong cell with its stored tensor, row, column, owner,
            and the values expected and found.
    """

    ok: bool
    tensors: int
    cells_changed: int
    cells_outside_regions: int
    tasks: dict[str, TaskProof]
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "tensors": self.tensors,
            "cells_changed": self.cells_changed,
            "cells_outside_regions": self.cells_outside_regions,
            "tasks": {
                name: {"cells": task.cells, "cells_changed": task.cells_changed, "weight": task.weight}
                for name, task in self.tasks.items()
            },
            "problem": self.problem,
        }


def verify(
    merged: str | os.PathLike[str], base: str | os.PathLike[str], adapters: Sequence[str | os.PathLike[str]]
) -> Proof:
    """Compare a merged checkpoint with its base and adapters: files, names, shapes, dtypes and every bit.

    Lambdas are the receipt's, and are proven by the arithmetic of every owned cell. In memory lie a few copies of one
    tensor, and the adapters.

    Args:
        merged: folder that `merge` wrote.
        base: folder of the base model.
        adapters: the adapter folders that were merged, in any order.

    Raises:
        UsageError: `merged` is no folder, or is the base itself.
        CheckpointError: the base is unreadable.
        AdapterError: an adapter is unreadable.
    """
    merged_folder, base_folder = Path(merged), Path(base)
    if not merged_folder.is_dir():
        raise UsageError(f"{merged_folder} is not a folder: give the folder that `merge` wrote")
    if merged_folder.resolve() == base_folder.resolve():
        raise UsageError(f"{merged_folder} is the base itself: give the merged checkpoint and its base")
    tasks = sorted((_Task(Path(folder)) for folder in adapters), key=lambda task: task.name)
    audit = _Audit(merged_folder, base_folder, tasks)
    audit.run()
    return Proof(
        ok=not audit.problems,
        tensors=audit.tensors,
        cells_changed=audit.changed,
        cells_outside_regions=audit.outside,
        tasks={task.name: TaskProof(task.cells, task.changed, task.weight) for task in tasks},
        problem=audit.problems[0] if audit.problems else None,
    )


@dataclass
class _Share:
    """One task's values for one module, as its adapter folder has them."""

    indices: list[int]
    excluded: list[int]
    values: torch.Tensor
    scaling: float
    changed: int = 0


class _Task:
    """An adapter folder, read from scratch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weight = 0.0
        self.cells = 0
        self.changed = 0
        try:
            config = json.loads((folder / "adapter_config.json").read_bytes())
            self.name = config.get("task") or folder.resolve().name
            self.variant = config["variant"]
            self.fingerprint = config.get("base_fingerprint")
            self.claim_digest = config.get("claim_digest")
            self.quantization = config.get("base_quantization")
            view = "original" if self.quantization is None else "dequantized"
            self.trained_on = {"view": view, "quantization": self.quantization}
            self.digest = _sha256(folder / "adapter_model.safetensors")
            with _open(folder / "adapter_model.safetensors") as file:
                keys = list(file.keys())
                ends = [key.removesuffix(".sbora_indices") for key in keys if key.endswith(".sbora_indices")]
                if len(keys) != 2 * len(ends) or self.variant not in ("fa", "fb") or not isinstance(self.name, str):
                    raise ValueError("it is no SBORA adapter")
                names = {end: end.removeprefix("base_model.model.") for end in ends}
                self.shares = {names[end]: _share(config, names[end], file, end) for end in ends}
        except (*_UNREADABLE, re.error) as error:
            why = _one_line(error)
            raise AdapterError(f"{folder} is not a readable adapter: {why}; fetch or train it again") from None


def _share(config: dict[str, Any], module: str, file: Any, end: str) -> _Share:
    indices, values = file.get_tensor(f"{end}.sbora_indices"), file.get_tensor(f"{end}.sbora_values")
    if indices.dim() != 1 or values.dim() != 2 or indices.dtype != torch.int32 or values.dtype != torch.float32:
        raise ValueError(f"{module} has tensors of the wrong kind")
    alpha = config["alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(?:.*\.)?(?:{pattern})$", module):
            alpha = value
            break
    entries = config.get("excluded") or {}
    names = _meaning(module, entries)
    if len(names) > 1:
        raise ValueError(f"excluded has {len(names)} entries for {module}")
    excluded = sorted(entries[names[0]]) if names else []
    if any(type(index) is not int for index in excluded):
        raise ValueError(f"excluded[{module}] is no list of whole numbers")
    divisor = math.sqrt(len(indices)) if config.get("use_rslora") else len(indices)
    return _Share(indices.tolist(), excluded, values, alpha / divisor)


def _meaning(module: str, names: Collection[str]) -> list[str]:
    """Which of `names` mean `module`: the same; or the same block under other wrappers; or one with more in front."""
    if module in names:
        return [module]
    front, block = _at_block(module)
    split = {name: _at_block(name) for name in names}
    if front <= _AROUND and (same := [n for n, (f, b) in split.items() if b and b == block and f <= _AROUND]):
        return same
    beside = set(_BESIDE.findall(module))
    return [
        name
        for name, (_, other) in split.items()
        if block and other and set(_BESIDE.findall(name)) == beside
        if name.endswith("." + module) or module.endswith("." + name)
    ]


@functools.cache
def _at_block(name: str) -> tuple[frozenset[str], str]:
    """A module's name cut before its list of blocks: ({"model"}, "layers.0.mlp.up"); ({...}, "") outside of blocks."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts[:-1]) if part.isdecimal()), None)
    if number is None:
        return frozenset(parts), ""
    start = max(number - 1, 0)
    return frozenset(parts[:start]), ".".join(parts[start:])


class _Weights:
    """The tensors of a model folder: which file holds which, with what dtype and shape; one at a time in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        mapped: dict[str, str] | None = None
        files = [_SINGLE]
        if not (folder / _SINGLE).is_file():
            mapped = dict(json.loads((folder / _INDEX).read_bytes())["weight_map"])
            files = sorted(set(mapped.values()))
        self.where: dict[str, str] = {}
        self.signature: dict[str, tuple[str, list[int]]] = {}
        self.metadata: dict[str, dict[str, str] | None] = {}
        for name in files:
            with _open(folder / name) as file:
                self.metadata[name] = file.metadata()
                for key in list(file.keys()):
                    if key in self.where:
                        raise ValueError(f"{key} lies in {self.where[key]} and in {name}")
                    part = file.get_slice(key)
                    self.where[key], self.signature[key] = name, (part.get_dtype(), part.get_shape())
        if mapped is not None and self.where != mapped:
            raise ValueError(f"{_INDEX} does not say where the tensors are")

    def get(self, key: str) -> torch.Tensor:
        # Opened for each tensor: a mapping that stays open keeps every page that was ever read in memory.
        with _open(self.folder / self.where[key]) as file:
            tensor: torch.Tensor = file.get_tensor(key)
        return tensor


class _Dequantized:
    """The base as quantised training saw it, derived from the stored one through bitsandbytes' own layers."""

    def __init__(self, scheme: dict[str, Any], before: _Weights, transposed: bool) -> None:
        self.kind, self.double = scheme["kind"], scheme["double"]
        self.digest = str(scheme["digest"])
        self.dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[scheme["dtype"]]
        self.block_size, self.transposed = scheme["block_size"], transposed
        self.modules: dict[str, str] = {}  # stored tensor -> module
        self.lines: dict[str, str] = {}
        layers = {key.removesuffix(".weight") for key in before.where if key.endswith(".weight")}
        for module in scheme["modules"]:
            names = _meaning(module, layers)
            if len(names) != 1:
                raise ValueError(f"the base has no one tensor for the quantised module {module}")
            self.modules[f"{names[0]}.weight"] = module

    def of(self, key: str, stored: torch.Tensor) -> torch.Tensor:
        """A stored tensor quantised and turned back, in its own shape and dtype; itself if it was not quantised."""
        if key not in self.modules:
            return stored
        from bitsandbytes import functional, nn

        values: torch.Tensor = (stored.T if self.transposed else stored).contiguous().to(self.dtype)  # (out, in)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the mean of the scales, which double quantisation takes, depends on their number
        try:
            if self.kind == "int8":
                layer = nn.Int8Params(values, requires_grad=False).to("cpu")
                values = functional.int8_vectorwise_dequant(layer.CB, layer.SCB).to(self.dtype)
            else:
                options = {"blocksize": self.block_size, "compress_statistics": self.double, "quant_type": self.kind}
                layer = nn.Params4bit(values, requires_grad=False, **options).to("cpu")
                values = functional.dequantize_4bit(layer.data, layer.quant_state).view(values.shape)
        finally:
            torch.set_num_threads(threads)
        module = self.modules[key]
        self.lines[module] = hashlib.sha256(_bits(values).numpy().tobytes()).hexdigest()
        values = values.to(stored.dtype)
        return values.T.contiguous() if self.transposed else values

    def is_whole(self) -> bool:
        """Whether all of it has the digest that training recorded."""
        lines = "".join(f"{module} {line}\n" for module, line in sorted(self.lines.items()))
        return hashlib.sha256(lines.encode()).hexdigest() == self.digest


@dataclass
class _Audit:
    merged: Path
    base: Path
    tasks: list[_Task]
    problems: list[str] = field(default_factory=list)
    tensors: int = 0
    changed: int = 0
    outside: int = 0

    def run(self) -> None:
        receipt = self._receipt()
        if receipt is None or not self._same_tasks(receipt):
            return
        self._tasks(receipt)
        self._files(receipt)
        try:
            before = _Weights(self.base)
        except _UNREADABLE as error:
            raise CheckpointError(f"{self.base} is not a readable base: {_one_line(error)}; fetch it again") from None
        try:
            after = _Weights(self.merged)
        except _UNREADABLE as error:
            self.problems.append(f"{self.merged} has no readable weights: {_one_line(error)}")
            return
        # A wrong cell says more than the wrong sha256 of its file: it goes first.
        around, self.problems = self.problems, []
        self._compare(receipt, before, after)
        if not self.problems:
            self._totals(receipt)
        self.problems += around

    def _receipt(self) -> dict[str, Any] | None:
        """The receipt, or a problem. Its values are only ever compared, never trusted, but for the lambdas."""
        try:
            receipt = json.loads((self.merged / _RECEIPT).read_bytes())
            for task in receipt["tasks"].values():
                if type(task["weight"]) not in (int, float) or not math.isfinite(task["weight"]):
                    raise ValueError("a weight is no number")
                for region in task["regions"].values():
                    region["indices"], region["excluded"], region["scaling"]
            for entry in receipt["files"].values():
                entry["sha256"], entry["size"]
            receipt["base"]["fingerprint"], receipt["base"]["checked"]
            view, scheme = receipt["base"].get("view", "original"), receipt["base"].get("quantization")
            if (view, scheme is None) not in (("original", True), ("dequantized", False)):
                raise ValueError(f"the base view {view!r} does not fit its quantisation")
            receipt["tensors_changed"], receipt["cells_changed"], receipt["cells_owned"]
            return dict(receipt)
        except _UNREADABLE as error:
            self.problems.append(f"{self.merged / _RECEIPT} is missing or damaged: {_one_line(error)}")
            return None

    def _same_tasks(self, receipt: dict[str, Any]) -> bool:
        names = [task.name for task in self.tasks]
        if sorted(receipt["tasks"]) != names:
            merged = ", ".join(sorted(receipt["tasks"]))
            self.problems.append(f"the receipt has the tasks {merged}; the adapters given are {', '.join(names)}")
            return False
        for task in self.tasks:
            task.weight = float(receipt["tasks"][task.name]["weight"])
        return True

    def _tasks(self, receipt: dict[str, Any]) -> None:
        """What the receipt says of each task, against the adapters themselves."""
        base = receipt["base"]
        scheme = base.get("quantization")
        if scheme is not None and all(task.quantization != scheme for task in self.tasks):
            self.problems.append("the receipt has a dequantised base that none of the adapters was trained on")
        for task in self.tasks:
            entry = receipt["tasks"][task.name]
            same = {
                "variant": entry.get("variant") == task.variant,
                "adapter digest": entry.get("adapter_digest") == task.digest,
                "claim digest": entry.get("claim_digest") == task.claim_digest,
                "base fingerprint": base["checked"] is False or base["fingerprint"] == task.fingerprint,
                "set of modules": set(entry["regions"]) == set(task.shares),
                # Receipts from before it was recorded say nothing of it.
                "view of the training": "trained_on" not in entry or entry["trained_on"] == task.trained_on,
            }
            for module, share in task.shares.items():
                region = entry["regions"].get(module, {})
                told = (region.get("indices"), region.get("excluded"), region.get("scaling"))
                same[f"region or scaling in {module}"] = told == (share.indices, share.excluded, share.scaling)
            for what in (what for what, holds in same.items() if not holds):
                self.problems.append(f"{task.name}: the receipt has another {what} than {task.folder}")

    def _files(self, receipt: dict[str, Any]) -> None:
        """The merged folder's files against the receipt's hashes, and against the base's bytes."""
        present = {path.name for path in self.merged.iterdir() if path.is_file() and not path.name.startswith(".")}
        listed = set(receipt["files"])
        for name in sorted(listed - present):
            self.problems.append(f"{name} is in the receipt but not in {self.merged}")
        for name in sorted(present - listed - {_RECEIPT, "multisbora_undo.safetensors"}):
            self.problems.append(f"{name} is in {self.merged} but not in the receipt")
        for name in sorted(listed & present):
            path, entry = self.merged / name, receipt["files"][name]
            if path.stat().st_size != entry["size"]:
                self.problems.append(f"{name} has {path.stat().st_size} bytes, the receipt says {entry['size']}")
            elif _sha256(path) != entry["sha256"]:
                self.problems.append(f"{name} is not the file that was merged: its sha256 differs from the receipt's")
        others = {name for name in present - _OWN_FILES if not name.endswith(".safetensors")}
        for name in sorted(others):
            if not (self.base / name).is_file() or _sha256(self.base / name) != _sha256(self.merged / name):
                self.problems.append(f"{name} is not the base's, byte for byte")
        needed = {path.name for path in self.base.glob("*") if path.is_file() and path.suffix in _NEEDED}
        for name in sorted(needed - present - _OWN_FILES - {"adapter_config.json"}):
            if not name.startswith(".") and not name.endswith(".index.json"):
                self.problems.append(f"{name} of the base is missing in {self.merged}")

    def _compare(self, receipt: dict[str, Any], before: _Weights, after: _Weights) -> None:
        if lacking := sorted(set(before.where) - set(after.where)):
            self.problems.append(f"{lacking[0]} of the base is missing in {self.merged}")
        if added := sorted(set(after.where) - set(before.where)):
            self.problems.append(f"{added[0]} is in {self.merged} but not in the base")
        if before.metadata != after.metadata:
            self.problems.append(f"the files of {self.merged} have other names or metadata than the base's")
        owners = self._owners(before)
        if receipt["tensors_changed"] != sorted(k for k, parts in owners.items() if any(t.weight for t, _ in parts)):
            self.problems.append("the receipt lists other changed tensors than the tasks have")
        transposed = _model_type(self.base) in _TRANSPOSED_TYPES
        seen = self._seen(receipt["base"].get("quantization"), before, transposed)
        for key in sorted(set(before.where) & set(after.where)):
            if before.signature[key] != after.signature[key]:
                self.problems.append(f"{key} is {after.signature[key]}, in the base {before.signature[key]}")
                continue
            try:
                old, new = before.get(key), after.get(key)
                old = seen.of(key, old) if seen is not None else old
            except _UNREADABLE as error:
                self.problems.append(f"{key} cannot be read: {_one_line(error)}")
                continue
            self._tensor(key, old, new, owners.get(key, []), transposed)
            self.tensors += 1
        if seen is not None and receipt["base"]["checked"] and not seen.is_whole():
            self.problems.append(
                "the dequantised base is not, bit for bit, the one that the tasks were trained on: another version of "
                "bitsandbytes, or another base"
            )

    def _seen(self, scheme: dict[str, Any] | None, before: _Weights, transposed: bool) -> _Dequantized | None:
        if scheme is None:
            return None
        try:
            return _Dequantized(scheme, before, transposed)
        except _UNREADABLE as error:
            self.problems.append(f"the receipt's quantisation cannot be repeated: {_one_line(error)}")
            return None

    def _owners(self, before: _Weights) -> dict[str, list[tuple[_Task, _Share]]]:
        """Stored tensor -> the tasks that own cells of it."""
        found: dict[str, list[tuple[_Task, _Share]]] = {}
        layers = {key.removesuffix(".weight") for key in before.where if key.endswith(".weight")}
        for task in self.tasks:
            for module, share in task.shares.items():
                names = _meaning(module, layers)
                if len(names) == 1:
                    found.setdefault(f"{names[0]}.weight", []).append((task, share))
                else:
                    self.problems.append(f"{task.name}: {self.base} has no one tensor for the module {module}")
        return found

    def _tensor(
        self, key: str, old: torch.Tensor, new: torch.Tensor, owners: list[tuple[_Task, _Share]], transposed: bool
    ) -> None:
        old_bits, new_bits = _bits(old), _bits(new)
        if not owners:
            if not torch.equal(old_bits, new_bits):
                wrong = old_bits != new_bits
                self.changed += int(wrong.sum())
                self.outside += int(wrong.sum())
                self._first(key, wrong, old, new, "which no task owns")
            return
        if old.dim() != 2 or not old.dtype.is_floating_point:
            self.problems.append(f"{key} is no matrix of floats, but {owners[0][0].name} has a region in it")
            return
        expected = old.clone()
        differs = old_bits != new_bits
        taken = torch.zeros(old.shape, dtype=torch.bool)
        views = [tensor.T if transposed else tensor for tensor in (expected, differs, taken)]  # (out, in)
        changed = 0
        for task, share in owners:
            problem = _apply(task, share, *views)
            if problem:
                self.problems.append(f"{task.name}: {key}: {problem}")
                return
            changed += share.changed
        total = int(torch.count_nonzero(differs))
        self.changed += total
        self.outside += total - changed
        wrong = new_bits != _bits(expected)
        if wrong.any():
            place = wrong.nonzero()[0].tolist()
            row, column = place[::-1] if transposed else place
            owner = next((task.name for task, share in owners if _owns(task, share, row, column)), None)
            self._first(key, wrong, expected, new, f"owned by {owner}" if owner else "which no task owns")

    def _first(self, key: str, wrong: torch.Tensor, expected: torch.Tensor, found: torch.Tensor, whose: str) -> None:
        place = tuple(wrong.nonzero()[0].tolist())
        where = f"row {place[0]}, column {place[1]}" if len(place) == 2 else f"index {list(place)}"
        self.problems.append(
            f"{key}: {int(wrong.sum())} wrong cells, first at {where}, {whose}: "
            f"expected {_shown(expected[place])}, found {_shown(found[place])}"
        )

    def _totals(self, receipt: dict[str, Any]) -> None:
        """The counts of the receipt, and that every task which is merged left a trace."""
        told: dict[str, Any] = {"in all": (receipt["cells_owned"], receipt["cells_changed"])}
        counted = {"in all": (sum(task.cells for task in self.tasks), sum(task.changed for task in self.tasks))}
        for task in self.tasks:
            entry = receipt["tasks"][task.name]
            told[task.name] = (entry.get("cells"), entry.get("cells_changed"))
            counted[task.name] = (task.cells, task.changed)
            if task.weight and not task.changed:
                self.problems.append(f"{task.name} changed no cell at weight {task.weight:g}: it is not in the model")
        for name, (cells, changed) in counted.items():
            if told[name] != (cells, changed):
                self.problems.append(
                    f"{name}: the receipt says cells owned, changed = {told[name]}, counted were {cells}, {changed}"
                )


def _apply(task: _Task, share: _Share, matrix: torch.Tensor, differs: torch.Tensor, taken: torch.Tensor) -> str | None:
    """Put what one task should have written into `matrix`, index by index, and count its cells.

    Args:
        matrix: expected values so far, (out, in); changed in place.
        differs: where the merged bits are not the base's, (out, in).
        taken: cells that another task owns, (out, in); changed in place.

    Returns:
        What is impossible, if anything.
    """
    if task.variant == "fa":  # one line an owned index
        matrix, differs, taken = matrix.T, differs.T, taken.T
    values = share.values.T if task.variant == "fa" else share.values  # (rank, other axis)
    size, length = matrix.shape
    if values.shape != (len(share.indices), length):
        return f"values of shape {list(share.values.shape)} and {len(share.indices)} indices do not fit"
    if any(not 0 <= index < size for index in share.indices) or len(set(share.indices)) != len(share.indices):
        return "indices are outside the matrix or repeated"
    if any(not 0 <= index < length for index in share.excluded):
        return "excluded indices are outside the matrix"
    if values[:, share.excluded].any():
        return "the adapter's values are not zero in cells that an earlier task owns"
    own = torch.ones(length, dtype=torch.bool)
    own[share.excluded] = False
    factor = torch.tensor(task.weight * share.scaling, dtype=torch.float32)
    for position, index in enumerate(share.indices):
        if (taken[index] & own).any():
            return f"index {index} is owned by another task too"
        taken[index] |= own
        share.changed += int(torch.count_nonzero(differs[index] & own))
        task.cells += int(torch.count_nonzero(own))
        if task.weight != 0:
            summed = matrix[index].to(torch.float32) + factor * values[position]
            matrix[index] = torch.where(own, summed.to(matrix.dtype), matrix[index])
    task.changed += share.changed
    return None


def _owns(task: _Task, share: _Share, row: int, column: int) -> bool:
    own, other = (column, row) if task.variant == "fa" else (row, column)
    return own in share.indices and other not in share.excluded


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bits as integers of the same size, so that -0.0 and NaN compare as what they are."""
    return tensor.contiguous().view(_BITS[tensor.element_size()]) if tensor.element_size() in _BITS else tensor


def _shown(value: torch.Tensor) -> str:
    return repr(value.item())


def _model_type(folder: Path) -> str | None:
    try:
        config = json.loads((folder / "config.json").read_bytes())
        return str(config["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{folder / 'config.json'} is missing or has no model_type: fetch the base again"
        ) from None


def _open(path: Path) -> Any:
    return safe_open(path, framework="pt")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(4 << 20):
            digest.update(block)
    return digest.hexdigest()


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__} {error}".split())[:300]
