"""The life of a claim, as the commands that manage claims go about it: from `allocate` to `release`."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .adapter import CONFIG_FILE, Adapter
from .allocator import matrix_ranks
from .checkpoint import RECEIPT_FILE
from .errors import AdapterError, MissingRegistryError, RegistryError, UsageError
from .names import check_name
from .project import Project
from .recipe import load
from .region import own_axis
from .registry import AXES, Registry
from .registry.claims import Event, TaskClaims
from .registry.ledger import Ledger
from .registry.measured import Measured
from .registry.reader import Reader
from .registry.replay import digests
from .room import Room, find_rooms

if TYPE_CHECKING:
    from .registry.audit import Audit
    from .registry.snapshot import Imported

Say = Callable[[str], None]
_RENAMED_FROM = ".renamed_from"  # in an adapter folder whose task is being renamed
Result = TypeVar("Result")


def existing(project: Project) -> Registry | None:
    """The project's registry, or None where nothing was ever allocated."""
    try:
        return Registry.open(project.registry, create=False)
    except MissingRegistryError:
        return None


def required(project: Project, task: str | None = None) -> Registry:
    """The project's registry.

    Raises:
        RegistryError: nothing was ever allocated.
    """
    try:
        return Registry.open(project.registry, create=False)
    except MissingRegistryError as error:
        raise RegistryError(f"task {task} holds no claims: {error}" if task else str(error)) from None


def resolve_targets(project: Project, tasks: Sequence[str], targets: Any) -> Any:
    """The flag's targets, else those that the tasks' recipes name, else the project's.

    Raises:
        UsageError: the recipes name different ones.
    """
    wanted = [targets or load(task, Path(project.recipes)).target_modules or project.targets for task in tasks]
    if any(found != wanted[0] for found in wanted):
        raise UsageError(f"the recipes of {', '.join(tasks)} name different target modules: allocate them one by one")
    return wanted[0] if wanted else targets or project.targets


def status(project: Project) -> dict[str, Any]:
    """`{"model", "composition", "tasks": {task: {...}}, "to_come": {task: rows}, "free": [{kind, axis, size, claimed,
    free}], "compositions"}`.

    "measured" is how many rows of a task its moments are of; of tasks that hold no claims anywhere, and that indices
    are left for, "to_come" says it. "compositions" are all those of the model: their tasks, and how many more of the
    project's kind fit into each.
    """
    geometry = project.geometry()
    registry = existing(project)
    claims: dict[str, TaskClaims] = {}
    known: dict[str, frozenset[str]] = {}
    taken: dict[tuple[str, int], int] = {}
    rooms: dict[str, Room] = {}
    measured: dict[str, Measured] = {}
    held_by: set[str] = set()
    if registry is not None:
        with registry:
            geometry = registry.named(geometry)
            claims = registry.claims(project.model_name, project.composition)
            with registry.reading() as reader:
                known = {task: digests(reader, project.model_name, task) for task in claims}
            measured = registry.measured(project.model_name)
            held_by.update(*registry.compositions(project.model_name).values())
            taken = registry.claimed(project.model_name, project.composition)
            ranks = matrix_ranks(geometry, variant=project.variant, rank=project.rank, target_modules=project.targets)
            rooms = find_rooms(registry, project.model_name, ranks, project.variant)
    tasks = {
        name: {
            "variant": held.variant,
            "rank": held.rank,
            "matrices": len(held.regions),
            "stage": held.stage,
            "adapter": _adapter_state(project, name, known[name]),
            "measured": measured[name].rows if name in measured else 0,
        }
        for name, held in claims.items()
    }
    free = []
    axes = sorted({own_axis(held.variant) for held in claims.values()} or {own_axis(project.variant)}, reverse=True)
    for kind in geometry.kinds():
        matrices = [matrix for matrix in geometry.matrices if matrix.kind == kind]
        for axis in axes:
            tight = min(matrices, key=lambda m: m.shape[axis] - taken.get((m.module, axis), 0))
            claimed = taken.get((tight.module, axis), 0)
            size = tight.shape[axis]
            free.append({"kind": kind, "axis": AXES[axis], "size": size, "claimed": claimed, "free": size - claimed})
    return {
        "model": project.model,
        "composition": project.composition,
        "tasks": tasks,
        "to_come": {name: found.rows for name, found in measured.items() if name not in held_by},
        "free": free,
        "compositions": {name: found.to_json() for name, found in rooms.items()},
    }


def release(project: Project, task: str, force: bool, dry_run: bool) -> None:
    """Give back what a task holds in the project's composition.

    Raises:
        RegistryError: it holds nothing there; or, unless `force`, it is being trained, or a merged checkpoint depends
            on its claims.
    """
    model, composition = project.model_name, project.composition
    with required(project, task) as registry, registry.transaction(dry_run=dry_run) as ledger:
        held = ledger.memberships(model, task)
        if held and composition not in held:
            raise RegistryError(
                f"task {task} holds nothing in composition {composition}, but in {', '.join(held)}: "
                f"name one with --composition {next(iter(held))}"
            )
        if held and not force:
            _refuse_training(held[composition], "give its claims back")
            _refuse_dependents(ledger, held[composition], composition, "release it")
        ledger.release(model, task, composition)


def rename(project: Project, task: str, name: str, force: bool, dry_run: bool) -> None:
    """Give a task another name, in the registry and in its adapter folder. Its regions stay.

    Killed half-way, the same call again finishes it.

    Raises:
        RegistryError: it holds nothing, the name is taken; or, unless `force`, it is being trained, or a merged
            checkpoint names it.
        AdapterError: its adapter is damaged, its run is not finished, or another adapter is in the way.
    """
    check_name(name, new_task=True)
    old, new = project.adapter(task), project.adapter(name)
    run = old.with_name(f"{old.name}.run")
    if run.exists():
        raise AdapterError(f"{run} is a run that is not finished: finish it with `multisbora train`, or delete it")
    with required(project, task) as registry:
        with registry.transaction(dry_run=dry_run) as ledger:
            held = next(iter(ledger.memberships(project.model_name, task).values()), None)
            if held is not None and not force:
                _refuse_training(held, "rename it")
                _refuse_dependents(ledger, held, None, "rename it")
            ledger.rename(project.model_name, task, name)
            _move_adapter(old, new, dry_run)
        if not dry_run:
            (new / _RENAMED_FROM).unlink(missing_ok=True)


def _move_adapter(old: Path, new: Path, dry_run: bool) -> None:
    """Move an adapter to its task's new name. A mark in it says from where, until the registry knows as well."""
    mark = new / _RENAMED_FROM
    if new.exists():
        was_cut_short = mark.is_file() and mark.read_text(encoding="utf-8") == old.name
        if old.exists() or not was_cut_short:
            raise AdapterError(f"{new} is in the way: move or delete it first")
        return
    if not old.is_dir():
        return
    Adapter.read(old)
    if not dry_run:
        (old / _RENAMED_FROM).write_text(old.name, encoding="utf-8")
        _write_task(old, new.name)
        old.rename(new)


def protect(
    project: Project, given: Mapping[str, Sequence[int]], targets: Any, channels: Path | None, dry_run: bool
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Keep channels from being owned by any task: the same of every target matrix, or those that a file lists.

    Args:
        given: "columns" and "rows" -> indices, of every matrix of `targets`.
        channels: in their place a JSON file `{"columns": {module: indices}, "rows": ...}`, as a calibration run may
            write it.

    Returns:
        What is newly protected: "rows" and "columns" -> module -> sorted indices.
    """
    geometry = project.geometry()
    if channels is not None:
        if any(given.values()) or targets is not None:
            raise UsageError("--channels lists channels and matrices itself: leave --columns, --rows and --targets out")
        wanted = _read_channels(channels)
    else:
        matrices = geometry.select(targets or project.targets)
        wanted = {axis: {m.module: list(found) for m in matrices} for axis, found in given.items() if found}
    if not any(found for modules in wanted.values() for found in modules.values()):
        raise UsageError("no channel to protect: name some with --columns or --rows, or in a file with --channels")
    return write_registry(project, dry_run, lambda registry: registry.protect(geometry, **wanted, dry_run=dry_run))


def unprotect(project: Project, dry_run: bool) -> int:
    """Give every protected channel of the model free; returns how many there were."""
    with required(project) as registry:
        return registry.unprotect(project.model_name, dry_run=dry_run)


def forget(project: Project, task: str, dry_run: bool) -> None:
    """Delete what was measured of a task's rows; its claims stay.

    Raises:
        RegistryError: it was not measured.
    """
    with required(project) as registry, registry.transaction(dry_run=dry_run) as ledger:
        ledger.forget_moments(project.model_name, task)


def check(project: Project) -> tuple[str, Audit]:
    """Prove every invariant of the project's registry; returns its URL as well."""
    from .registry.audit import check

    with required(project) as registry:
        return registry.where, check(registry)


def export(project: Project, output: Path | None, dry_run: bool = False) -> str:
    """The whole registry as one JSON text, written to a file if one is given.

    Raises:
        UsageError: the file cannot be there.
    """
    from .registry import snapshot

    with required(project) as registry:
        text = snapshot.dumps(snapshot.export(registry))
    if output is not None:
        if not output.parent.is_dir():
            raise UsageError(f"{output.parent} is not a folder: make it first")
        if output.is_dir():
            raise UsageError(f"{output} is a folder: name a file in it")
        if dry_run:
            return text
        partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(output)
        finally:
            partial.unlink(missing_ok=True)
    return text


def import_(project: Project, path: Path, dry_run: bool) -> Imported:
    """Add what a file holds to the project's registry, which is made if it is not there."""
    from .registry import snapshot

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    return write_registry(project, dry_run, lambda registry: snapshot.load(registry, text, dry_run=dry_run))


def history(project: Project, task: str | None) -> list[Event]:
    """What happened to the model's claims, oldest first; of one task under all of its names, if one is named.

    Raises:
        RegistryError: nothing ever happened to a task of that name.
    """
    with required(project) as registry:
        found = [event for event in registry.events() if event.model == project.model_name]
    if task is None:
        return found
    names = _names(found, task)
    mine = [e for e in found if e.task in names or not names.isdisjoint(e.detail.get("weights", ()))]
    if not mine:
        raise RegistryError(f"nothing ever happened to a task {task!r} of {project.model_name}: see registry history")
    return mine


def dependents(reader: Reader, held: TaskClaims, folder: Path = Path()) -> dict[Path, tuple[str, ...]]:
    """Merged checkpoints that were made with an adapter of these claims: folder -> their tasks.

    Looks at most two levels below a folder, and wherever the history has a merge of this machine.
    """
    events, known = reader.events(), digests(reader, held.model, held.task)
    receipts = {path.resolve() for pattern in ("*", "*/*") for path in folder.glob(f"{pattern}/{RECEIPT_FILE}")}
    for event in events:
        if event.action in ("merge", "add", "reweight") and event.detail.get("host") == socket.gethostname():
            receipts.add(Path(str(event.detail.get("output"))) / RECEIPT_FILE)
    names = _names([event for event in events if event.model == held.model], held.task)
    found = {}
    for receipt in sorted(receipts):
        try:
            tasks = json.loads(receipt.read_bytes())["tasks"]
            if any(tasks[name]["claim_digest"] in known for name in names & set(tasks)):
                found[receipt.parent] = tuple(tasks)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # not a receipt that anything can depend on; `multisbora verify` says what is wrong with it
    return found


def _names(events: Sequence[Event], task: str) -> set[str]:
    """Every name that a task has had."""
    names = {task}
    for event in reversed(events):
        if event.action == "rename" and event.detail.get("to") in names and event.task is not None:
            names.add(event.task)
    for event in events:
        if event.action == "rename" and event.task in names:
            names.add(str(event.detail.get("to")))
    return names


def write_registry(project: Project, dry_run: bool, what: Callable[[Registry], Result]) -> Result:
    """Do what may make the registry: tried in memory first, so that what cannot be done makes none."""
    registry = existing(project)
    if registry is None:
        with Registry.open("sqlite://") as trial:
            found = what(trial)
        if dry_run:
            return found
        registry = Registry.open(project.registry)
    with registry:
        return what(registry)


def _refuse_training(held: TaskClaims, verb: str) -> None:
    if held.stage == "training":
        raise RegistryError(
            f"task {held.task} is being trained (see `multisbora registry history`): wait for it, or {verb} all the "
            "same with --force"
        )


def _refuse_dependents(ledger: Ledger, held: TaskClaims, leaving: str | None, verb: str) -> None:
    """Refuse what would leave a merged checkpoint without its claims; `leaving` one composition may leave another that
    allows the same merge."""
    stays = [set(members) for name, members in ledger.compositions(held.model).items() if name != leaving]
    found = dependents(ledger, held)
    merged = [path for path, tasks in found.items() if leaving is None or not any(set(tasks) <= all_ for all_ in stays)]
    if merged:
        path = min(os.path.relpath(merged[0]), str(merged[0]), key=len)
        raise RegistryError(
            f"the merged checkpoint {path} depends on task {held.task}"
            + (f", and so do {len(merged) - 1} more" if len(merged) > 1 else "")
            + f": delete or merge it anew without the task first, or {verb} all the same with --force"
        )


def _adapter_state(project: Project, task: str, digests: Collection[str]) -> str:
    """What is here of a task's adapter; the registry's stage says what anybody, anywhere, has trained."""
    folder = project.adapter(task)
    if not folder.is_dir():
        started = folder.with_name(f"{folder.name}.run").is_dir()
        return "interrupted or training" if started else "not trained"
    try:
        trained_on = Adapter.read(folder).claim_digest
    except AdapterError:
        return "damaged"
    return "trained" if trained_on in digests else "trained on other claims"


def _write_task(folder: Path, task: str) -> None:
    path = folder / CONFIG_FILE
    content = json.loads(path.read_bytes())
    partial = path.with_name(f".{CONFIG_FILE}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps({**content, "task": task}, indent=2, sort_keys=True))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _read_channels(path: Path) -> dict[str, dict[str, list[int]]]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not readable as JSON: {type(error).__name__}") from None
    sound = isinstance(content, dict) and set(content) <= set(AXES)
    if not sound or not all(
        isinstance(of, dict) and all(isinstance(f, list) for f in of.values()) for of in content.values()
    ):
        raise UsageError(f'{path} must hold {{"columns": {{module: [channels]}}, "rows": {{module: [channels]}}}}')
    return content  # type: ignore[no-any-return]
