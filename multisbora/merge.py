"""Compose trained tasks into one plain checkpoint.

One pass over the base's files: what no task owns is copied byte for byte, owned cells are patched in fp32 and rounded
once, and what they held is kept aside, so that any task can be taken out again. No cell has two owners, so the order of
the adapters cannot matter. In memory lie the adapters and a few megabytes; where the base is dequantised, also 20 bytes
for each weight of one matrix; and in a corrected merge the moments of all tasks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import CARD_FILE, UNDO_FOLDER, Checkpoint, FileDigest, copy_file
from .correct import RIDGE, check_ridge
from .corrected import Corrected, Measured, correct_all
from .errors import CheckpointError, UsageError
from .geometry import Geometry, from_checkpoint
from .header import INDEX_FILE
from .journal import reading
from .layout import lay_out
from .moments import Moments
from .patching import TensorPatch, View, Written
from .publish import check_output, publish
from .receipt import MergedTask, MergedWhole, Receipt, WeightsFile, card
from .shares import (
    Share,
    check_base,
    check_claims,
    load,
    merged_task,
    model_name,
    require_disjoint,
    require_trace,
    shares_of,
)
from .stream import PREFIX, Passed, fingerprint_of, stream
from .undo import WHOLE, CellsWriter
from .view import Quantization, choose_view
from .weights import TaskWeight, Weight, resolve
from .whole import require_apart
from .whole import whole_modules as find_whole

METHODS = ("plain", "corrected")


def merge(
    base: str | os.PathLike[str],
    adapters: Sequence[str | os.PathLike[str]],
    weights: Mapping[str, Weight | TaskWeight] | None = None,
    *,
    output: str | os.PathLike[str],
    base_view: str | None = None,
    geometry: Geometry | None = None,
    claims: Mapping[str, Collection[str]] | None = None,
    allow_base_mismatch: bool = False,
    whole_modules: str | Mapping[str, str] = "refuse",
    max_shard_size: int | None = None,
    method: str = "plain",
    moments: Mapping[str, Moments] | None = None,
    ridge: float | None = None,
    dry_run: bool = False,
) -> Receipt:
    """Write one checkpoint with all tasks in it: the base's files, with each task's cells at W0 + lambda * s * values.

    Args:
        base: folder of the base model.
        adapters: folders of trained adapters, one a task, in any order.
        weights: task -> lambda, 1 where it is left out; or task -> {"default": lambda, pattern of modules: lambda}.
        output: folder to make; it appears whole or not at all.
        base_view: what W0 is: "original", the base as it is stored, or "dequantized", where every matrix that training
            quantised is quantised and turned back first, as bitsandbytes does it. None takes the view that the adapters
            were trained on.
        geometry: of the base, where it is known already; read from its headers otherwise.
        claims: task -> digests that the registry knows for the claims it holds now, to refuse an adapter trained on
            others. There is more than one where the claims are older than the way of digesting them.
        allow_base_mismatch: merge adapters that were trained on another base, or that do not say on which.
        whole_modules: what happens to modules that a task trained whole (`modules_to_save`): "refuse" them, "keep" the
            one there is, or "average" them by lambda; for all tasks, or task -> which.
        max_shard_size: lay the tensors out in files of at most so many bytes of tensors; None keeps the base's files.
        method: "plain", each task's cells hold what it trained; or "corrected", other values in the same cells, by
            which tasks disturb each other's inputs less: see `correct`. Lambda then says how much of each is wished.
        moments: task -> second moments of its rows, which a corrected merge needs of every task.
        ridge: how strongly a corrected merge is pulled towards the plain one, positive; `correct.RIDGE` if None.
        dry_run: check everything, reading the base once, and return the receipt as far as it is known; write nothing.

    Raises:
        UsageError: no adapters, a weight of an unknown task or that is not finite, or adapters that were trained on
            different views of the base while `base_view` names none.
        AdapterError: an adapter is damaged, belongs to another base or to other claims, or does not fit the base.
        DataError: moments are missing, or of another base.
        MergeError: two adapters have one name or share a cell, a task changes nothing, a cell overflows, or the
            equations of a corrected merge are singular.
        CheckpointError: the base is unreadable, `output` is taken, or the disk is full.
    """
    _check_method(method, moments, ridge)
    loaded = load(adapters)
    lambdas = resolve((adapter.task for adapter in loaded), weights)
    check_claims(loaded, claims or {})
    checkpoint = Checkpoint.open(base)
    geometry = geometry or from_checkpoint(base, checkpoint.headers)
    quantization = choose_view({adapter.task: adapter.quantization for adapter in loaded}, base_view)
    shares: dict[str, list[Share]] = {}
    for adapter in loaded:
        for tensor, found in shares_of(adapter, lambdas[adapter.task], geometry, checkpoint).items():
            shares.setdefault(tensor, []).extend(found)
    for found in shares.values():
        require_disjoint(found)
    whole = find_whole(loaded, lambdas, whole_modules, checkpoint)
    require_apart(whole, shares)
    if not allow_base_mismatch:
        check_base(loaded, None, base)
    measured, corrected = None, None
    if method == "corrected":
        check_output(output)  # before the time that solving takes
        measured = Measured(moments or {}, [adapter.task for adapter in loaded])
        if not allow_base_mismatch:
            measured.check_adapters(loaded)
        measured.check_digests({adapter.task: adapter.digest for adapter in loaded})
        every = [share for found in shares.values() for share in found]
        corrected = correct_all(every, measured.rows, RIDGE if ridge is None else float(ridge), measured.block)
        shares = {}
        for share in (share for task in corrected.shares.values() for share in task):
            shares.setdefault(share.matrix.tensor, []).append(share)

    def check(base_print: str, passed: Mapping[str, Passed]) -> None:
        if not allow_base_mismatch:
            check_base(loaded, base_print, base)
        if measured is not None:
            measured.check_base(base_print)

    tasks = {adapter.task: merged_task(adapter, lambdas[adapter.task], geometry) for adapter in loaded}
    return write_merged(
        checkpoint,
        geometry,
        {**shares, **{tensor: [found] for tensor, found in whole.items()}},
        tasks,
        Path(output),
        quantization,
        max_shard_size,
        whole={tensor: MergedWhole(found.how, found.weights) for tensor, found in whole.items()},
        corrected=corrected,
        check=check,
        dry_run=dry_run,
    )


def _check_method(method: str, moments: object, ridge: float | None) -> None:
    """Refuse a method that is unknown, a ridge that is none, or what would be read and ignored.

    Raises:
        UsageError: as it says.
    """
    if method not in METHODS:
        raise UsageError(f"the method {method!r} is unknown: use {' or '.join(METHODS)}")
    for what, given in (("moments", moments), ("ridge", ridge)):
        if method != "corrected" and given is not None:
            raise UsageError(f"a plain merge knows no {what}: leave it out, or merge with --method corrected")
    if ridge is not None:
        check_ridge(ridge)


@dataclass(frozen=True, slots=True)
class Original:
    """A merged checkpoint that is made once more, from a base of which there may be more files than there were.

    Attributes:
        receipt: what the new one's must be.
        card: README.md.
    """

    receipt: Receipt
    card: bytes

    def require(self, made: Receipt) -> Receipt:
        """The receipt to write, with the scores of the original.

        Raises:
            CheckpointError: what was made is not the original.
        """
        made = replace(made, scores=self.receipt.scores)
        if made != self.receipt:
            one, two = made.to_json(), self.receipt.to_json()
            parts = ", ".join(key for key in two if one[key] != two[key])
            raise CheckpointError(
                f"what came out is not the checkpoint that was to be made again: the receipts differ in {parts}; is "
                "the same version of multisbora installed?"
            )
        return made


def write_merged(
    checkpoint: Checkpoint,
    geometry: Geometry,
    shares: Mapping[str, Sequence[Written]],
    tasks: Mapping[str, MergedTask],
    output: Path,
    quantization: Quantization | None,
    max_shard_size: int | None,
    *,
    whole: Mapping[str, MergedWhole] | None = None,
    corrected: Corrected | None = None,
    check: Callable[[str, Mapping[str, Passed]], None],
    original: Original | None = None,
    dry_run: bool = False,
) -> Receipt:
    """Write a checkpoint with tasks in it, their undo files, the card and the receipt; all of it or nothing.

    Args:
        checkpoint: the base.
        shares: stored tensor -> what goes into it.
        tasks, whole: what the receipt says of them, but for what only the pass over the tensors can tell.
        corrected: what is kept beside, where `shares` are those of a corrected merge.
        check: called with the fingerprint of the base, and the digests of its tensors, before anything is published;
            raises to refuse it.
        original: what the result must be, byte by byte; None where it is new.

    Raises:
        MergeError: a cell overflows, a task leaves no trace, or a name is none that a receipt may hold.
        CheckpointError: the base is unreadable, `output` is taken, the disk is full, or the result is not `original`.
    """
    whole, kept = whole or {}, [] if corrected is None else corrected.contents
    layout = lay_out(checkpoint, max_shard_size)
    targets, index, companions = layout.targets, layout.index, layout.companions
    if original is not None:
        companions = tuple(path for path in companions if checkpoint.name(path) in original.receipt.files)
    undo = {name: undo_shapes(name, shares, checkpoint) for name in (*tasks, *([WHOLE] if whole else []))}
    sizes = {checkpoint.name(path): path.stat().st_size for path in companions}
    sizes |= {} if index is None else {INDEX_FILE: len(index)}
    needed = sum(target.size for target in targets) + sum(sizes.values())
    needed += sum(rows * columns * dtype.itemsize for of in undo.values() for (rows, columns), dtype in of.values())
    needed += sum(contents.size for contents in kept)
    check_output(output, needed)
    view = None if quantization is None else View(quantization, geometry, checkpoint)
    receipt = Receipt(
        base_model=model_name(geometry.model),
        base_fingerprint=PREFIX,  # of which the pass tells the rest
        tasks=dict(tasks),
        weights={target.name: WeightsFile(target.size, target.head_digest) for target in targets},
        tensors={},
        files={name: FileDigest(None, size) for name, size in sizes.items()},
        tensors_changed=tuple(sorted(name for name, found in shares.items() if any(share.weight for share in found))),
        max_shard_size=max_shard_size,
        quantization=quantization,
        whole=dict(whole),
        correction=None if corrected is None else corrected.correction,
    )
    receipt.check()
    if dry_run:
        with reading(checkpoint.folder):
            passed = stream(checkpoint)
        base_print = fingerprint_of(checkpoint, geometry, passed)
        check(base_print, passed)
        return replace(receipt, base_fingerprint=base_print)
    with reading(checkpoint.folder), publish(output, needed) as partial:
        with ExitStack() as open_files:
            keepers = {
                name: open_files.enter_context(
                    CellsWriter(partial / UNDO_FOLDER / f"{name}.safetensors", of, {"multisbora": "undo", "task": name})
                )
                for name, of in undo.items()
            }
            patches = {
                tensor: TensorPatch(shares.get(tensor, ()), keepers, None if view is None else view.of(tensor))
                for tensor in {*shares, *(view.tensors if view else ())}
            }
            # bitsandbytes sets the number of its threads for the whole process, and takes 20 bytes a weight.
            passed = stream(checkpoint, targets, partial, patches, threads=None if view is None else 1)
        base_print = fingerprint_of(checkpoint, geometry, passed)
        check(base_print, passed)
        for contents in kept:
            contents.write(partial)
        receipt = replace(receipt, base_fingerprint=base_print)
        if view is not None and receipt.base_checked:
            view.check()
        files = {}
        for path in companions:
            name = checkpoint.name(path)
            (partial / name).parent.mkdir(exist_ok=True)
            files[name] = copy_file(path, partial / name)
        if index is not None:
            files[INDEX_FILE] = write_bytes(partial / INDEX_FILE, index)
        counted = {name: _counted(task, name, patches.values()) for name, task in tasks.items()}
        receipt = replace(
            receipt,
            tasks=counted,
            whole={tensor: _counted_whole(found, patches[tensor]) for tensor, found in whole.items()},
            tensors={name: passed[name].base for name in sorted(passed)},
            files=files,
        )
        text = card(receipt) if original is None else original.card
        receipt = replace(receipt, files={**files, CARD_FILE: write_bytes(partial / CARD_FILE, text)})
        if original is not None:
            receipt = original.require(receipt)
        receipt.write(partial)
    return receipt


def write_bytes(path: Path, data: bytes) -> FileDigest:
    """Write a file anew; its digest."""
    path.write_bytes(data)
    return FileDigest(hashlib.sha256(data).hexdigest(), len(data))


def undo_shapes(
    task: str, shares: Mapping[str, Sequence[Written]], checkpoint: Checkpoint
) -> dict[str, tuple[tuple[int, int], np.dtype[Any]]]:
    return {
        share.matrix.cells_name: (share.cells.shape, checkpoint.place(tensor).dtype)
        for tensor in sorted(shares)
        for share in sorted(shares[tensor], key=lambda share: share.matrix.part or 0)
        if share.task == task
    }


def _counted(task: MergedTask, name: str, patches: Iterable[TensorPatch]) -> MergedTask:
    """What the receipt says of a task, with what the pass over the tensors told.

    Raises:
        MergeError: the task left no trace.
    """
    traces = {module: trace for patch in patches for (owner, module), trace in patch.traces.items() if owner == name}
    changed = sum(trace.changed for trace in traces.values())
    require_trace(name, task, changed)
    regions = {
        module: replace(region, digest=traces[module].after.hexdigest(), undo_digest=traces[module].before.hexdigest())
        for module, region in task.regions.items()
    }
    return replace(task, cells_changed=changed, regions=regions)


def _counted_whole(whole: MergedWhole, patch: TensorPatch) -> MergedWhole:
    (trace,) = patch.traces.values()
    return replace(
        whole,
        cells_changed=trace.changed,
        digest=trace.after.hexdigest(),
        undo_digest=trace.before.hexdigest(),
    )
