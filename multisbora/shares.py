"""What adapters do to the stored tensors of a base model, after every check that needs no weights."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .adapter import Adapter, AdapterModule
from .cells import PATCHABLE, Cells, compose
from .checkpoint import Checkpoint
from .errors import AdapterError, CheckpointError, MergeError, UsageError
from .geometry import Geometry, Matrix
from .receipt import MergedRegion, MergedTask
from .stream import PREFIX, in_threads
from .weights import TaskWeight, require_use


@dataclass(frozen=True)
class Share:
    """One task's part in one matrix.

    Attributes:
        module: its name, as the adapter has it.
        weight: lambda here.
    """

    task: str
    module: str
    matrix: Matrix
    trained: AdapterModule
    weight: float

    @property
    def cells(self) -> Cells:
        """Made anew each time: of all tasks and matrices together they would take more memory than a merge may."""
        return Cells.of(self.trained.region, self.matrix)

    def compose(self, before: np.ndarray, own: slice) -> np.ndarray:
        """What rows `own` of the cells' layout hold with the task in them, where they hold `before` without it.

        Raises:
            MergeError: a result is not finite.
        """
        what = f"{self.task}: {self.matrix.cells_name}"
        return compose(before, self.cells.arrange(self.trained.values, own), self.trained.scaling, self.weight, what)


def load(folders: Sequence[str | os.PathLike[str]]) -> list[Adapter]:
    """Adapters, sorted by task.

    Raises:
        UsageError: there are none.
        AdapterError: one is damaged.
        MergeError: two have one name.
    """
    if isinstance(folders, str | os.PathLike):
        raise UsageError("adapters must be a list of folders, not one folder")
    if not folders:
        raise UsageError("there is nothing to merge: give at least one adapter folder")
    loaded = sorted(in_threads(Adapter.read, folders), key=lambda adapter: adapter.task)
    for one, two in itertools.pairwise(loaded):
        if one.task == two.task:
            raise MergeError(f"{one.path} and {two.path} are both task {one.task!r}: merge one of them")
    return loaded


def shares_of(
    adapter: Adapter, weight: TaskWeight, geometry: Geometry, checkpoint: Checkpoint
) -> dict[str, list[Share]]:
    """What one adapter does: stored tensor -> its shares there; several where experts are fused in one tensor.

    Raises:
        AdapterError: it does not fit the base.
        CheckpointError: a tensor is of another shape than the geometry says, or no F32, F16 or BF16.
        MergeError: it was never trained.
        UsageError: a pattern of its weight names none of its matrices.
    """
    shares: dict[str, list[Share]] = {}
    require_use(weight, adapter.task, (*adapter.modules, *(tensor.rpartition(".")[0] for tensor in adapter.whole)))
    for name, matrix in adapter.fit(geometry).items():
        _check_stored(matrix, checkpoint)
        share = Share(adapter.task, name, matrix, adapter.modules[name], weight.at(name))
        shares.setdefault(matrix.tensor, []).append(share)
    weighted = any(share.weight for found in shares.values() for share in found)
    if weighted and not any(np.any(module.values) for module in adapter.modules.values()):
        raise MergeError(f"{adapter.task} was never trained: every value of {adapter.path} is zero; train it first")
    return shares


def require_disjoint(shares: Sequence[Share]) -> None:
    """Refuse shares of one tensor that have a cell in common.

    Raises:
        MergeError: two have.
    """
    for one, two in itertools.combinations(shares, 2):
        if one.matrix.part == two.matrix.part and one.trained.region.meets(two.trained.region):
            raise overlap(one.task, two.task, one.matrix.cells_name)


def overlap(one: str, two: str, tensor: str) -> MergeError:
    return MergeError(
        f"{one} and {two} both own cells of {tensor}: only tasks of one composition can be merged; allocate both in "
        "one and train again"
    )


def check_claims(loaded: Sequence[Adapter], claims: Mapping[str, Collection[str]]) -> None:
    """Refuse an adapter that was trained on other claims than the registry holds.

    Args:
        claims: task -> digests of the claims that it holds now.

    Raises:
        AdapterError: there is one.
    """
    for adapter in loaded:
        if adapter.task not in claims or adapter.claim_digest in claims[adapter.task]:
            continue
        if adapter.claim_digest is None:
            raise AdapterError(f"{adapter.path} was trained without claims, {adapter.task} has some: train it again")
        raise AdapterError(f"{adapter.path}: the claims of {adapter.task} changed since its training: train it again")


def check_base(loaded: Sequence[Adapter], base_print: str | None, base: str | os.PathLike[str]) -> None:
    """Refuse an adapter that was trained on another base, or does not say on which.

    Args:
        base_print: fingerprint of the base; None where it is not known yet: then only what needs none is checked.

    Raises:
        AdapterError: there is one.
    """
    allow = "or allow the mismatch (--allow-base-mismatch)"
    for adapter in loaded:
        theirs = adapter.base_fingerprint
        if theirs is None:
            raise AdapterError(
                f"{adapter.path} does not say which base it was trained on: if {base} is it, allow the mismatch "
                "(--allow-base-mismatch)"
            )
        if not theirs.startswith(PREFIX):
            raise AdapterError(
                f"{adapter.path} names its base by a fingerprint of an older kind ({theirs[:12]}): train it again, "
                f"{allow}"
            )
        if base_print is not None and theirs != base_print:
            raise AdapterError(
                f"{adapter.path} was trained on another base than {base} (fingerprint "
                f"{theirs.removeprefix(PREFIX)[:12]}, not {base_print.removeprefix(PREFIX)[:12]}): merge it into its "
                f"own base, {allow}"
            )


def merged_task(adapter: Adapter, weight: TaskWeight, geometry: Geometry) -> MergedTask:
    """What the receipt says of a task before anything is written."""
    return MergedTask(
        weight=weight,
        variant=adapter.variant,
        composition=adapter.composition,
        claim_digest=adapter.claim_digest,
        adapter_digest=adapter.digest,
        base_fingerprint=adapter.base_fingerprint,
        cells=sum(module.region.cells(geometry.find(name).shape) for name, module in adapter.modules.items()),
        cells_changed=None,
        regions={
            name: MergedRegion(module.region, module.scaling, weight.at(name))
            for name, module in adapter.modules.items()
        },
        quantization=adapter.quantization,
    )


def require_trace(name: str, task: MergedTask, changed: int) -> None:
    """Refuse a task that is merged but left no trace: it would be a base model sold as a merged one.

    Args:
        changed: number of its cells whose bits are not the base's.

    Raises:
        MergeError: it did not leave any.
    """
    if not changed and any(region.weight for region in task.regions.values()):
        raise MergeError(
            f"{name} changes no cell: every update at weight {task.weight} rounds away in the checkpoint's dtype; "
            "raise the weight, or use a 32-bit base"
        )


def model_name(name: str) -> str:
    """A hub id or a plain name as it is; of a path only the last part: no receipt tells of a machine's folders."""
    is_path = os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1
    return Path(name).name if is_path else name


def _check_stored(matrix: Matrix, checkpoint: Checkpoint) -> None:
    info = checkpoint.info(matrix.tensor)
    if info.dtype not in PATCHABLE or info.shape != matrix.stored_shape:
        raise CheckpointError(
            f"{checkpoint.folder}: {matrix.tensor} is {info.dtype} {list(info.shape)}, merging needs "
            f"{', '.join(PATCHABLE)} and {list(matrix.stored_shape)}: use the 16- or 32-bit checkpoint of that model"
        )
