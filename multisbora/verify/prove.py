"""The two proofs of a merged checkpoint, behind one call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import UsageError
from .adapters import Task
from .full import Audit
from .proof import Proof
from .quick import Check


def verify(
    merged: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    adapters: Sequence[str | os.PathLike[str]] | None = None,
    *,
    quick: bool = False,
) -> Proof:
    """Compare a merged checkpoint with its base and adapters: files, names, shapes, dtypes and every bit.

    Lambdas are the receipt's, and are proven by the arithmetic of every owned cell. Tensors are read in blocks and
    adapters one matrix at a time; in memory lie a few blocks, and the values of the matrices at hand.

    Args:
        merged: folder that `merge` wrote.
        base: folder of the base model.
        adapters: the adapter folders that were merged, in any order.
        quick: check the checkpoint against the digests in its own receipt and its undo files instead, without base and
            adapters. That finds damage, not a forger who changed the receipt too.

    Raises:
        UsageError: `merged` is no folder, or is the base itself; base or adapters are missing, or given with `quick`.
        CheckpointError: the base is unreadable.
        AdapterError: an adapter is unreadable.
    """
    folder = Path(merged)
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder: give the folder that `merge` wrote")
    if quick:
        if base is not None or adapters is not None:
            raise UsageError("a quick check takes neither base nor adapters: leave them out, or leave out quick")
        return Check(folder).run()
    if base is None or adapters is None:
        raise UsageError("a proof needs the base and the adapters: give both, or ask for a quick check without them")
    if isinstance(adapters, str | os.PathLike):
        raise UsageError("adapters must be a list of folders, not one folder")
    base_folder = Path(base)
    if folder.resolve() == base_folder.resolve():
        raise UsageError(f"{folder} is the base itself: give the merged checkpoint and its base")
    tasks = sorted((Task(Path(one)) for one in adapters), key=lambda task: task.name)
    return Audit(folder, base_folder, tasks).run()
