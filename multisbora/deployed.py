"""What the commands on merged checkpoints do: made, proven, changed where they lie, shipped as patches."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapter import Adapter, is_corrected
from .commands import tell
from .errors import AdapterError, CheckpointError, UsageError, VerificationError
from .journal import reading
from .layout import parse_size
from .lifecycle import required
from .moments import Moments, read_beside
from .project import PROJECT_FILE, Project
from .recipe import load
from .registry import Registry
from .registry.replay import digests
from .shares import model_name
from .weights import GivenWeights, TaskWeight

if TYPE_CHECKING:
    from .change import Edit
    from .difference import Difference
    from .receipt import Receipt
    from .verify import Proof

Say = Callable[[str], None]


@dataclass(frozen=True)
class Merged:
    """A merge that was done, or in a dry run what it would do and how long it would take."""

    receipt: Receipt
    seconds_expected: float | None = None

    @property
    def bytes(self) -> int:
        """Of the checkpoint's files, without those of undo."""
        weights, others = self.receipt.weights.values(), self.receipt.files.values()
        return sum(file.size for file in weights) + sum(file.size for file in others)

    def to_json(self) -> dict[str, Any]:
        """The receipt; of a dry run with a `plan`: tensors and cells changed, bytes written, seconds expected."""
        if self.seconds_expected is None:
            return self.receipt.to_json()
        plan = {
            "tensors": len(self.receipt.tensors_changed),
            "cells": self.receipt.cells_owned,
            "bytes": self.bytes,
            "seconds_expected": round(self.seconds_expected, 1),
        }
        return {**self.receipt.to_json(), "plan": plan}

    def line(self, output: Path) -> str:
        """What a dry run says at its end."""
        return (
            f"would write {output}: {self.bytes:,} bytes, {len(self.receipt.tensors_changed)} tensors changed in "
            f"{self.receipt.cells_owned:,} cells, in about {self.seconds_expected or 0:.0f} s (twice what reading took)"
        )


def merge_tasks(
    project: Project,
    tasks: Sequence[str] | None,
    weight: Sequence[str],
    weights_from: Path | None,
    output: Path,
    max_shard_size: str | None,
    whole_modules: str | None,
    base_view: str | None,
    allow_base_mismatch: bool,
    dry_run: bool,
    say: Say,
    method: str = "plain",
    ridge: float | None = None,
) -> Merged:
    """Merge trained tasks of the project's composition; None takes all that hold claims in it.

    Args:
        method, ridge: as in `merge.merge`, with the moments that the registry has.
    """
    shard_size = None if max_shard_size is None else parse_size(max_shard_size)
    given = GivenWeights.read(weight, weights_from)
    with required(project) as registry:
        claims = registry.claims(project.model_name, project.composition)
        chosen = list(tasks or claims)
        if not chosen:
            others = ", ".join(registry.compositions(project.model_name))
            raise UsageError(
                f"no task holds claims in composition {project.composition}: "
                + (f"name one of {others} with --composition" if others else "`multisbora allocate --tasks ...`")
            )
        for task in chosen:
            registry.task(project.model_name, task, project.composition)
        with registry.reading() as reader:
            known = {task: digests(reader, project.model_name, task) for task in chosen}
        moments = None
        if method == "corrected":
            moments = moments_of(registry, project, {task: project.adapter(task) for task in chosen}, {}, say)
    weights = given.of(chosen, say, "merged")
    for task in chosen:
        if not project.adapter(task).is_dir():
            raise AdapterError(
                f"task {task} is allocated, but {project.adapter(task)} does not exist: "
                f"`multisbora train --task {task}`, or name the tasks to merge with --tasks"
            )
    base = project.base(say)
    from .merge import merge

    started = time.perf_counter()
    receipt = merge(
        base,
        [project.adapter(task) for task in chosen],
        weights,
        output=output,
        base_view=base_view,
        geometry=project.base_geometry(base),
        claims=known,
        allow_base_mismatch=allow_base_mismatch,
        max_shard_size=shard_size,
        whole_modules=whole_modules or _whole_modules(project, chosen),
        method=method,
        moments=moments,
        ridge=ridge,
        dry_run=dry_run,
    )
    seconds = time.perf_counter() - started
    for sentence in receipt.moved():
        say(sentence)
    if not dry_run:
        detail = {
            "output": str(output.resolve()),
            "host": socket.gethostname(),
            "weights": {name: task.weight.to_json() for name, task in receipt.tasks.items()},
            **({"ridge": receipt.correction.ridge} if receipt.correction else {}),
        }
        event = ("merge", project.model_name, project.composition, None, detail)
        tell(project, say, f"{output} is complete", lambda registry: registry.record(*event))
    return Merged(receipt, 2 * seconds if dry_run else None)


def moments_of(
    registry: Registry, project: Project, folders: Mapping[str, Path], sources: Mapping[str, str], say: Say
) -> dict[str, Moments]:
    """The moments of tasks for a corrected merge: those beside their adapters, or else those of the registry. What is
    missing, whoever takes them says.

    Args:
        folders: task -> its adapter.
        sources: task -> the source that its moments must have, see `moments.Moments`, where not any will do.

    Raises:
        UsageError: an adapter is corrected already.
    """
    if corrected := [str(folder) for folder in folders.values() if is_corrected(folder)]:
        raise UsageError(
            f"{corrected[0]} has corrected values, for which `tune --by channel` solved: correct them no second time, "
            "or give the adapters that were trained"
        )
    found: dict[str, Moments] = {}
    for task, folder in folders.items():
        moments = read_beside(folder) if sources.get(task, "adapter") == "adapter" else None
        moments = moments or registry.moments(project.model_name, task)
        if moments is not None:
            found[task] = moments
    if before := [task for task, moments in found.items() if moments.adapter is None and task not in sources]:
        names = ",".join(before)
        say(
            f"{names}: moments of the base alone; `multisbora measure --trained --tasks {names}` where the rows are "
            "measures them through what was trained"
        )
    return found


def _whole_modules(project: Project, tasks: Sequence[str]) -> dict[str, str]:
    """What the recipes say of modules that were trained whole; a task without a recipe here says nothing."""
    folder = Path(project.recipes)
    return {task: load(task, folder).whole_modules for task in tasks if (folder / f"{task}.yaml").is_file()}


def verify_merged(
    path: Path, base: str | None, adapters: Sequence[Path] | None, within: str | None, quick: bool, say: Say
) -> Proof:
    """Prove a merged checkpoint; base and adapters are the project's where they are not given.

    Args:
        adapters: folder of each; within: folder that those of all tasks lie in, by their names.
        quick: by its own digests alone, wherever it lies.
    """
    from .hub import find_base
    from .verify import verify

    if adapters is not None and within is not None:
        raise UsageError("--adapter names adapters one by one, and --adapters the folder of all: give one of them")
    if within is not None:
        adapters = [Path(within) / task for task in _merged_tasks(path)]
    if quick:
        with reading(path, say=say):
            return verify(path, base, adapters, quick=True)
    if adapters is None:
        project = Project.load()
        adapters = [project.adapter(task) for task in _merged_tasks(path)]
    folder = find_base(base, say) if base is not None else Project.load().base(say)
    with reading(path, folder, say=say):
        return verify(path, folder, adapters)


def _merged_tasks(path: Path) -> list[str]:
    if not path.is_dir():
        raise UsageError(f"{path} is not a folder: give the folder that `multisbora merge` wrote")
    from .receipt import Receipt

    try:
        return sorted(Receipt.read(path).tasks)
    except CheckpointError as error:
        raise VerificationError(f"{path} does not hold: {error}") from None


def add_task(
    path: Path,
    task: str,
    adapter: Path | None,
    weight: Sequence[str],
    weights_from: Path | None,
    base_view: str | None,
    allow_base_mismatch: bool,
    dry_run: bool,
    say: Say,
) -> Edit:
    """Put a task into a merged checkpoint; its adapter is the project's where none is given."""
    from .edit import add
    from .receipt import Receipt

    value = _weight(task, weight, weights_from)
    project, folder, known = _adapter(path, task, adapter)
    receipt, moments = Receipt.read(path), None
    if receipt.correction is not None:
        if project is None:
            raise UsageError(
                f"{path} is a corrected merge, and no {PROJECT_FILE} here says which registry has the moments of "
                f"{task}: go to the project's folder"
            )
        with required(project, task) as registry:
            sources = {name: told.source for name, told in receipt.correction.tasks.items()}
            folders = {name: project.adapter(name) for name in sources} | {task: folder}
            moments = moments_of(registry, project, folders, sources, say)
    edit = add(
        path,
        folder,
        TaskWeight() if value is None else value,
        claims=known,
        allow_base_mismatch=allow_base_mismatch,
        base_view=base_view,
        moments=moments,
        dry_run=dry_run,
        say=say,
    )
    _record(project, path, edit, dry_run, say)
    return edit


def remove_task(path: Path, task: str, dry_run: bool, say: Say) -> Edit:
    """Take a task out of a merged checkpoint."""
    from .edit import remove

    edit = remove(path, task, dry_run=dry_run, say=say)
    _record(_project_of(path), path, edit, dry_run, say)
    return edit


def reweight_task(
    path: Path,
    task: str,
    adapter: Path | None,
    weight: Sequence[str],
    weights_from: Path | None,
    allow_base_mismatch: bool,
    dry_run: bool,
    say: Say,
) -> Edit:
    """Give a task of a merged checkpoint another weight; its adapter is the project's where none is given."""
    from .edit import reweight

    value = _weight(task, weight, weights_from)
    if value is None:
        raise UsageError(f"which weight shall {task} have? Say --weight {task}=LAMBDA, or --weights-from FILE")
    project, folder, known = _adapter(path, task, adapter)
    edit = reweight(
        path, folder, value, claims=known, allow_base_mismatch=allow_base_mismatch, dry_run=dry_run, say=say
    )
    _record(project, path, edit, dry_run, say)
    return edit


def edit_lines(path: Path, edit: Edit, dry_run: bool) -> list[str]:
    """What people are told of an edit."""
    if not edit.files:
        return [f"{path}: nothing to do, {edit.task} has that weight"]
    done = {"add": "put {} into", "remove": "took {} out of", "reweight": "gave {} another weight in"}
    would = {
        "add": "would put {} into",
        "remove": "would take {} out of",
        "reweight": "would give {} another weight in",
    }
    lines = [
        f"{(would if dry_run else done)[edit.operation].format(edit.task)} {path}: {edit.cells:,} cells in "
        f"{len(edit.tensors)} tensors, {edit.bytes_written:,} bytes of weights",
        f"files: {', '.join(edit.files)}",
        f"tasks: {', '.join(f'{name} {task.weight}' for name, task in edit.receipt.tasks.items()) or 'none'}",
    ]
    if edit.scores_dropped:
        lines.append(
            "its scores were of another composition and are dropped: `multisbora eval --record` makes new ones"
        )
    return lines


def _weight(task: str, given: Sequence[str], file: Path | None) -> TaskWeight | None:
    """The weight of one task; None where none is given.

    Raises:
        UsageError: --weight is of another task, or the file has none of this one.
    """
    weights = GivenWeights.read(given, file)
    from_file, told = weights.from_file, weights.options
    if others := sorted(set(told) - {task}):
        raise UsageError(f"--weight is given for {', '.join(others)}, --task names {task}: one task at a time")
    if file and task not in from_file and task not in told:
        raise UsageError(f"{file} holds no weight of {task}: it has {', '.join(from_file)}")
    return told.get(task, from_file.get(task))


def _project_of(path: Path) -> Project | None:
    """The project of this folder, if a merged checkpoint is of its base model."""
    from .receipt import Receipt

    if not Path(PROJECT_FILE).is_file():
        return None
    project = Project.load()
    return project if Receipt.read(path).base_model == model_name(project.model_name) else None


def _adapter(path: Path, task: str, given: Path | None) -> tuple[Project | None, Path, dict[str, frozenset[str]]]:
    """The project that a checkpoint is of, a task's adapter, and the digests of the claims that the task holds."""
    project = _project_of(path)
    if given is None:
        if project is None:
            raise UsageError(
                f"no {PROJECT_FILE} here says where the adapter of {task} is: name its folder with --adapter"
                if not Path(PROJECT_FILE).is_file()
                else f"{path} is of another base model than the project: name the adapter's folder with --adapter"
            )
        given = project.adapter(task)
        if not given.is_dir():
            raise AdapterError(f"{given} does not exist: `multisbora train --task {task}`, or name it with --adapter")
    found = Adapter.read(given)
    if found.task != task:
        raise UsageError(f"{given} is the adapter of {found.task}, --task names {task}: give the right one")
    if project is None:
        return None, given, {}
    with required(project, task) as registry:
        registry.task(project.model_name, task, found.composition or project.composition)
        with registry.reading() as reader:
            return project, given, {task: frozenset(digests(reader, project.model_name, task))}


def _record(project: Project | None, path: Path, edit: Edit, dry_run: bool, say: Say) -> None:
    """Tell the project's registry; where there is no project, nobody needs to know."""
    if project is None or dry_run or not edit.files:
        return
    weights = {name: task.weight.to_json() for name, task in edit.receipt.tasks.items()}
    detail = {"output": str(path.resolve()), "host": socket.gethostname(), "weights": weights}
    event = (edit.operation, project.model_name, project.composition, edit.task, detail)
    tell(project, say, f"{path} is edited", lambda registry: registry.record(*event))


def diff_merged(path: Path, output: Path, dry_run: bool, say: Say) -> Difference:
    """Write what tasks changed in a merged checkpoint to a patch."""
    from .difference import diff

    return diff(path, output, dry_run=dry_run, say=say)


def apply_patch(patch: Path, base: str | None, output: Path, dry_run: bool, say: Say) -> Receipt:
    """Make a merged checkpoint from a patch; the base is the project's where it is not given."""
    from .difference import apply
    from .hub import find_base

    folder = find_base(base, say) if base is not None else Project.load().base(say)
    return apply(patch, folder, output, dry_run=dry_run)
