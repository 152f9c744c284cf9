"""Tasks in and out of a merged checkpoint where it lies: `add`, `remove`, `reweight`.

Only the task's own cells are read and written, so an edit costs what its region costs and not what the checkpoint does.
In a corrected merge all tasks are solved again, so there it costs what the regions of all of them do. What comes out
is, byte for byte and in all files, what a merge of the tasks that are then in it would have made. `journal` sees to it
that an edit happens whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from .adapter import Adapter
from .change import Change, Deployed, Edit, Move
from .checkpoint import RECEIPT_FILE, Checkpoint
from .errors import AdapterError, UsageError
from .geometry import from_checkpoint
from .journal import editing, reading
from .locks import Say
from .moments import Moments
from .receipt import MergedRegion, MergedTask, Receipt
from .recorrected import check_moments, resolve
from .shares import check_base, check_claims, merged_task, shares_of
from .view import choose_view
from .weights import TaskWeight, Weight
from .whole import whole_of


def add(
    folder: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    weight: Weight | TaskWeight = 1.0,
    *,
    claims: Mapping[str, Collection[str]] | None = None,
    allow_base_mismatch: bool = False,
    base_view: str | None = None,
    moments: Mapping[str, Moments] | None = None,
    dry_run: bool = False,
    say: Say = lambda message: None,
) -> Edit:
    """Put one more trained task into a merged checkpoint.

    Args:
        folder: the checkpoint.
        adapter: folder of the task's adapter.
        weight: lambda, or {"default": lambda, pattern of modules: lambda}.
        claims, allow_base_mismatch, base_view: as in `merge`; the view must be the one that the checkpoint is on.
        moments: task -> second moments of its rows, of this task and all that are there, if they were merged corrected;
            of those of the same rows as then.
        dry_run: check everything, reading the cells, and say what would be done; write nothing.
        say: told if a former edit had been cut short.

    Raises:
        UsageError: the task is in it already, the weight means nothing, or the view is not that of the checkpoint.
        AdapterError: the adapter is damaged, belongs to another base or to other claims, or does not fit.
        DataError: moments are missing, are of another base, or are not those of the merge.
        MergeError: the task shares a cell with another one, changes nothing, trained a module whole, a cell overflows,
            or the equations of a corrected merge are singular.
        CheckpointError: no merged checkpoint, one that was changed, is in use, or shares files with another folder; or
            a write failed, and all is as it was.
    """
    found = Adapter.read(adapter)
    lambdas = TaskWeight.of(weight, found.task)
    with _opened(folder, dry_run, say) as deployed:
        receipt = deployed.receipt
        check_moments(deployed, moments)
        if found.task in receipt.tasks:
            raise UsageError(
                f"{folder} holds task {found.task} already: `reweight` gives it another weight; to put in what was "
                "trained anew, remove it first"
            )
        _check(found, deployed, claims, allow_base_mismatch)
        _require_view(found, deployed, base_view)
        shares = [
            s for part in shares_of(found, lambdas, deployed.geometry, deployed.checkpoint).values() for s in part
        ]
        deployed.require_free(shares)
        deployed.require_regions_alone(found.task, whole_of(found, lambdas))
        entry = merged_task(found, lambdas, deployed.geometry)
        moves, corrected = resolve(deployed, Move(found.task, None, entry, shares), moments)
        return Change(deployed, "add", found.task, moves, corrected).make(dry_run)


def remove(
    folder: str | os.PathLike[str], task: str, *, dry_run: bool = False, say: Say = lambda message: None
) -> Edit:
    """Take a task out of a merged checkpoint: its cells hold the base's bits again. Needs neither base nor adapter.

    The other tasks of a corrected merge are solved again, as if it had never been there.

    The last task may go, too; then the weights are the base's.

    Raises:
        UsageError: the task is not in it.
        MergeError: it trained a module whole.
        CheckpointError: as `add`.
    """
    with _opened(folder, dry_run, say) as deployed:
        told = deployed.told(task)
        deployed.require_regions_alone(task)
        moves, corrected = resolve(deployed, Move(task, told, None, []))
        return Change(deployed, "remove", task, moves, corrected).make(dry_run)


def reweight(
    folder: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    weight: Weight | TaskWeight,
    *,
    claims: Mapping[str, Collection[str]] | None = None,
    allow_base_mismatch: bool = False,
    dry_run: bool = False,
    say: Say = lambda message: None,
) -> Edit:
    """Give a task of a merged checkpoint another lambda. Matrices in which it stays the same are not written.

    Args:
        adapter: folder of the adapter that was merged.

    Raises:
        UsageError: the task is not in it, or the weight means nothing.
        AdapterError: it is another adapter than was merged, is damaged, or belongs to another base or other claims.
        MergeError: the task would change nothing, trained a module whole, or a cell overflows.
        CheckpointError: as `add`.
    """
    found = Adapter.read(adapter)
    lambdas = TaskWeight.of(weight, found.task)
    with _opened(folder, dry_run, say) as deployed:
        told = deployed.told(found.task)
        deployed.require_regions_alone(found.task, whole_of(found, lambdas))
        _check(found, deployed, claims, allow_base_mismatch)
        shares = [
            s for part in shares_of(found, lambdas, deployed.geometry, deployed.checkpoint).values() for s in part
        ]
        entry = merged_task(found, lambdas, deployed.geometry)
        if _identity(entry) != _identity(told):
            raise AdapterError(
                f"{found.path} is not the adapter of {found.task} that was merged into {folder}: give that one, or "
                f"remove {found.task} there and add it anew"
            )
        moves, corrected = resolve(deployed, Move(found.task, told, entry, shares))
        return Change(deployed, "reweight", found.task, moves, corrected).make(dry_run)


@contextlib.contextmanager
def _opened(folder: str | os.PathLike[str], dry_run: bool, say: Say) -> Iterator[Deployed]:
    folder = Path(folder)
    if not (folder / RECEIPT_FILE).is_file():
        Receipt.read(folder)
    with reading(folder, say=say) if dry_run else editing(folder, say):
        deployed = Deployed(folder, Receipt.read(folder), Checkpoint.open(folder), from_checkpoint(folder))
        deployed.check_regions()
        yield deployed


def _check(
    adapter: Adapter, deployed: Deployed, claims: Mapping[str, Collection[str]] | None, allow_base_mismatch: bool
) -> None:
    check_claims([adapter], claims or {})
    if not allow_base_mismatch:
        check_base([adapter], deployed.receipt.base_fingerprint, deployed.folder)


def _require_view(adapter: Adapter, deployed: Deployed, asked: str | None) -> None:
    """Refuse a task that a merge would have put on another view of the base.

    Raises:
        UsageError: it would have, or the tasks' views differ and none is asked for.
    """
    receipt = deployed.receipt
    trained = {name: task.quantization for name, task in receipt.tasks.items()}
    view = choose_view({**trained, adapter.task: adapter.quantization}, asked)
    if view != receipt.quantization:
        ours = "the stored base" if receipt.quantization is None else f"a base dequantised from {receipt.quantization}"
        theirs = "the stored base" if view is None else f"a base dequantised from {view}"
        hint = ": say --base-view original, or merge anew" if receipt.quantization is None else ": merge anew"
        raise UsageError(f"{deployed.folder} stands on {ours}, {adapter.task} would be put on {theirs}{hint}")


def _identity(task: MergedTask) -> MergedTask:
    """What a receipt says of a task, without what its weight decides."""
    regions = {name: MergedRegion(region.region, region.scaling, 0.0) for name, region in task.regions.items()}
    return replace(task, weight=TaskWeight(), cells_changed=None, regions=regions)
