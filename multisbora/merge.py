"""Compose trained tasks into one plain checkpoint.

One pass over the base's files: what no task owns is copied byte for byte, owned cells are patched in fp32 and rounded
once. No cell has two owners, so the order of the adapters cannot matter. In memory lie one tensor and the adapters.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .adapter import Adapter, AdapterModule
from .checkpoint import (
    CARD_FILE,
    PATCHABLE,
    Checkpoint,
    FileDigest,
    check_output,
    copy_file,
    copy_patched,
    fingerprint,
    publish,
)
from .delta import delta
from .errors import AdapterError, CheckpointError, MergeError, UsageError
from .geometry import Geometry, Matrix, Names, from_checkpoint
from .receipt import MergedRegion, MergedTask, Receipt, write_card
from .region import Region
from .view import Quantization, choose_view


def merge(
    base: str | os.PathLike[str],
    adapters: Sequence[str | os.PathLike[str]],
    weights: Mapping[str, float] | None = None,
    *,
    output: str | os.PathLike[str],
    base_view: str | None = None,
    geometry: Geometry | None = None,
    claims: Mapping[str, Collection[str]] | None = None,
    allow_base_mismatch: bool = False,
    dry_run: bool = False,
) -> Receipt:
    """Write one checkpoint with all tasks in it: the base's files, with each task's cells at W0 + lambda * s * values.

    Args:
        base: folder of the base model.
        adapters: folders of trained adapters, one a task, in any order.
        weights: task -> lambda, 1 where it is left out.
        output: folder to make; it appears whole or not at all.
        base_view: what W0 is: "original", the base as it is stored, or "dequantized", where every matrix that training
            quantised is quantised and turned back first, as bitsandbytes does it. None takes the view that the adapters
            were trained on.
        geometry: of the base, where it is known already; read from its headers otherwise.
        claims: task -> digests that the registry knows for the claims it holds now, to refuse an adapter trained on
            others. There is more than one where the claims are older than the way of digesting them.
        allow_base_mismatch: merge adapters that were trained on another base, or that do not say on which.
        dry_run: check everything and return the receipt as far as it is known, without writing.

    Raises:
        UsageError: no adapters, a weight of an unknown task or that is not finite, or adapters that were trained on
            different views of the base while `base_view` names none.
        AdapterError: an adapter is damaged, belongs to another base or to other claims, or does not fit the base.
        MergeError: two adapters have one name or share a cell, a task changes nothing, or a cell overflows.
        CheckpointError: the base is unreadable, `output` is taken, or the disk is full.
    """
    loaded = _load(adapters)
    lambdas = _lambdas(loaded, weights or {})
    _check_claims(loaded, claims or {})
    checkpoint = Checkpoint.open(base)
    needed = checkpoint.size()
    check_output(output, needed)
    geometry = geometry or from_checkpoint(base)
    quantization = choose_view({adapter.task: adapter.quantization for adapter in loaded}, base_view)
    view = None if quantization is None else _View(quantization, geometry, checkpoint)
    patches = _plan(loaded, lambdas, geometry, checkpoint, view)
    base_print = fingerprint(base, geometry)
    base_checked = all(adapter.base_fingerprint == base_print for adapter in loaded)
    if not base_checked and not allow_base_mismatch:
        _refuse_base(loaded, base_print, checkpoint)
    copied = (*checkpoint.headers, *checkpoint.companions())
    receipt = Receipt(
        base_model=_model_name(geometry.model),
        base_fingerprint=base_print,
        base_checked=base_checked,
        tasks={adapter.task: _merged_task(adapter, lambdas[adapter.task], geometry) for adapter in loaded},
        files={path.name: FileDigest(None, path.stat().st_size) for path in copied},
        tensors_changed=tuple(sorted(patches)),
        quantization=quantization,
    )
    if dry_run:
        return receipt
    with publish(output, needed) as partial:
        files = {
            path.name: copy_patched(path, partial / path.name, header, (view.patches() if view else {}) | patches)
            for path, header in checkpoint.headers.items()
        }
        files |= {path.name: copy_file(path, partial / path.name) for path in checkpoint.companions()}
        if view is not None and base_checked:
            view.check()
        changed = _count_changed(loaded, lambdas, patches)
        tasks = {name: replace(task, cells_changed=changed[name]) for name, task in receipt.tasks.items()}
        files[CARD_FILE] = write_card(partial, replace(receipt, tasks=tasks))
        receipt = replace(receipt, tasks=tasks, files=files)
        receipt.write(partial)
    return receipt


@dataclass(frozen=True, slots=True)
class _Part:
    """One task's share of one tensor."""

    task: str
    weight: float
    module: AdapterModule
    matrix: Matrix


class _View:
    """The dequantised base: turns one stored tensor after another into what training saw, and proves that it was so."""

    def __init__(self, quantization: Quantization, geometry: Geometry, checkpoint: Checkpoint) -> None:
        self.quantization = quantization
        self._digests: dict[str, str] = {}  # module -> of its dequantised weight
        self._modules: dict[str, str] = {}  # stored tensor -> module
        self._transposed = {matrix.tensor for matrix in geometry.matrices if matrix.orientation == "conv1d"}
        stored = Names(name.removesuffix(".weight") for name in checkpoint.where if name.endswith(".weight"))
        for module in quantization.modules:
            names = stored.find(module)
            if len(names) != 1 or len(checkpoint.info(f"{names[0]}.weight").shape) != 2:
                raise AdapterError(
                    f"{module} was quantised in training, but {checkpoint.folder} has no one matrix of that name: "
                    "merge into the base of the training, or with --base-view original"
                )
            self._modules[f"{names[0]}.weight"] = module

    def of(self, tensor: str) -> Callable[[np.ndarray], None] | None:
        """What makes the stored tensor that of this view, in place; None where it is as stored."""
        module = self._modules.get(tensor)
        if module is None:
            return None

        def dequantize(stored: np.ndarray) -> None:
            from .quantization import dequantize_stored

            matrix = stored.T if tensor in self._transposed else stored  # (out, in), a view
            self._digests[module] = dequantize_stored(matrix, self.quantization, module)

        return dequantize

    def patches(self) -> dict[str, Callable[[np.ndarray], None]]:
        return {tensor: patch for tensor in self._modules if (patch := self.of(tensor)) is not None}

    def check(self) -> None:
        """Refuse another dequantised base than the adapters were trained on.

        Raises:
            MergeError: bitsandbytes made other weights here.
        """
        from .quantization import digest

        if digest(self._digests.items()) != self.quantization.digest:
            raise MergeError(
                "the base dequantised here is not, bit for bit, the one that the tasks were trained on: install the "
                "version of bitsandbytes that they were trained with, or merge with --base-view original"
            )


@dataclass(slots=True)
class _TensorPatch:
    """Patches one stored tensor, and counts per task the cells whose bits changed, against the view of the base."""

    parts: list[_Part]
    dequantize: Callable[[np.ndarray], None] | None = None
    changed: dict[str, int] = field(default_factory=dict)

    def __call__(self, stored: np.ndarray) -> None:
        if self.dequantize is not None:
            self.dequantize(stored)
        bits = np.dtype(f"u{stored.dtype.itemsize}")
        for part in self.parts:
            region, values = part.module.region, part.module.values
            matrix = stored.T if part.matrix.orientation == "conv1d" else stored  # (out, in), a view
            cells, own = _index(region, part.matrix.shape)
            before = matrix[cells]
            with np.errstate(over="ignore"):
                after = before.astype(np.float32) + delta(values[own], part.module.scaling, part.weight)
                rounded = after.astype(stored.dtype)
            if not np.all(np.isfinite(rounded)):
                raise MergeError(
                    f"{part.task}: {part.matrix.tensor} would hold a value that {stored.dtype} cannot: "
                    f"lower its weight of {part.weight:g}, or check the base model for NaN"
                )
            matrix[cells] = rounded
            self.changed[part.task] = int(np.count_nonzero(before.view(bits) != rounded.view(bits)))


def _index(region: Region, shape: tuple[int, int]) -> tuple[Any, Any]:
    """(cells of the matrix, cells of the values) that a region owns, as numpy indices."""
    own = np.array(region.indices)
    other_size = shape[0] if region.variant == "fa" else shape[1]
    if not region.excluded:
        everything = slice(None)
        return ((everything, own) if region.variant == "fa" else (own, everything)), (everything, everything)
    other = np.delete(np.arange(other_size), region.excluded)
    rank = np.arange(region.rank)
    if region.variant == "fa":
        return np.ix_(other, own), np.ix_(other, rank)
    return np.ix_(own, other), np.ix_(rank, other)


def _load(folders: Sequence[str | os.PathLike[str]]) -> list[Adapter]:
    if isinstance(folders, str | os.PathLike):
        raise UsageError("adapters must be a list of folders, not one folder")
    if not folders:
        raise UsageError("there is nothing to merge: give at least one adapter folder")
    loaded = sorted((Adapter.read(folder) for folder in folders), key=lambda adapter: adapter.task)
    for one, two in itertools.pairwise(loaded):
        if one.task == two.task:
            raise MergeError(f"{one.path} and {two.path} are both task {one.task!r}: merge one of them")
    return loaded


def _lambdas(loaded: list[Adapter], weights: Mapping[str, float]) -> dict[str, float]:
    names = [adapter.task for adapter in loaded]
    for task, weight in weights.items():
        if task not in names:
            raise UsageError(f"a weight is given for {task!r}, which is not merged: the tasks are {', '.join(names)}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise UsageError(f"the weight of {task} must be a finite number, got {weight!r}")
    return {name: float(weights.get(name, 1.0)) for name in names}


def _check_claims(loaded: list[Adapter], claims: Mapping[str, Collection[str]]) -> None:
    for adapter in loaded:
        if adapter.task not in claims or adapter.claim_digest in claims[adapter.task]:
            continue
        if adapter.claim_digest is None:
            raise AdapterError(f"{adapter.path} was trained without claims, {adapter.task} has some: train it again")
        raise AdapterError(f"{adapter.path}: the claims of {adapter.task} changed since its training: train it again")


def _refuse_base(loaded: list[Adapter], base_print: str, checkpoint: Checkpoint) -> None:
    wrong = next(adapter for adapter in loaded if adapter.base_fingerprint != base_print)
    if wrong.base_fingerprint is None:
        raise AdapterError(
            f"{wrong.path} does not say which base it was trained on: if {checkpoint.folder} is it, "
            "allow the mismatch (--allow-base-mismatch)"
        )
    raise AdapterError(
        f"{wrong.path} was trained on another base than {checkpoint.folder} (fingerprint "
        f"{wrong.base_fingerprint[:12]}, not {base_print[:12]}): merge it into its own base, "
        "or allow the mismatch (--allow-base-mismatch)"
    )


def _plan(
    loaded: list[Adapter],
    lambdas: Mapping[str, float],
    geometry: Geometry,
    checkpoint: Checkpoint,
    view: _View | None,
) -> dict[str, _TensorPatch]:
    """What to change in which stored tensor, after every check that needs no weights."""
    parts: dict[str, list[_Part]] = {}
    for adapter in loaded:
        for name, matrix in adapter.fit(geometry).items():
            _check_stored(matrix, checkpoint)
            module = adapter.modules[name]
            parts.setdefault(matrix.tensor, []).append(_Part(adapter.task, lambdas[adapter.task], module, matrix))
        if lambdas[adapter.task] and not any(np.any(module.values) for module in adapter.modules.values()):
            raise MergeError(f"{adapter.task} was never trained: every value of {adapter.path} is zero; train it first")
    for tensor, sharing in parts.items():
        for one, two in itertools.combinations(sharing, 2):
            if one.module.region.meets(two.module.region):
                raise MergeError(
                    f"{one.task} and {two.task} both own cells of {tensor}: only tasks of one composition can be "
                    "merged; allocate both in one and train again"
                )
    weighted = {tensor: [part for part in sharing if part.weight] for tensor, sharing in parts.items()}
    return {
        tensor: _TensorPatch(sharing, None if view is None else view.of(tensor))
        for tensor, sharing in weighted.items()
        if sharing
    }


def _check_stored(matrix: Matrix, checkpoint: Checkpoint) -> None:
    info = checkpoint.info(matrix.tensor)
    if info.dtype not in PATCHABLE or info.shape != matrix.stored_shape:
        raise CheckpointError(
            f"{checkpoint.folder}: {matrix.tensor} is {info.dtype} {list(info.shape)}, merging needs "
            f"{', '.join(PATCHABLE)} and {list(matrix.stored_shape)}: use the 16- or 32-bit checkpoint of that model"
        )


def _count_changed(
    loaded: list[Adapter], lambdas: Mapping[str, float], patches: Mapping[str, _TensorPatch]
) -> dict[str, int]:
    """Cells changed per task; a task that is merged but left no trace would be a base model sold as a merged one."""
    changed = {
        adapter.task: sum(patch.changed.get(adapter.task, 0) for patch in patches.values()) for adapter in loaded
    }
    for task, count in changed.items():
        if lambdas[task] and not count:
            raise MergeError(
                f"{task} changes no cell: every update at weight {lambdas[task]:g} rounds away in the checkpoint's "
                "dtype; raise the weight, or use a 32-bit base"
            )
    return changed


def _merged_task(adapter: Adapter, weight: float, geometry: Geometry) -> MergedTask:
    return MergedTask(
        weight=weight,
        variant=adapter.variant,
        composition=adapter.composition,
        claim_digest=adapter.claim_digest,
        adapter_digest=adapter.digest,
        cells=sum(module.region.cells(geometry.find(name).shape) for name, module in adapter.modules.items()),
        cells_changed=None,
        regions={name: MergedRegion(module.region, module.scaling) for name, module in adapter.modules.items()},
        trained_view="original" if adapter.quantization is None else "dequantized",
        quantization=adapter.quantization,
    )


def _model_name(name: str) -> str:
    """A hub id or a plain name as it is; of a path only the last part: no receipt tells of a machine's folders."""
    is_path = os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1
    return Path(name).name if is_path else name
