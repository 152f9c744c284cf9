"""What each command does in a project. Every function takes the project and plain values, and returns the result that
the command prints; heavy libraries are imported where they are needed.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapter import Adapter
from .allocator import DEFAULT_TARGETS, Allocation, allocate
from .checkpoint import RECEIPT_FILE, check_output
from .errors import AdapterError, RegistryError, UsageError, VerificationError
from .plan import Plan, plan
from .project import PROJECT_FILE, Project
from .recipe import Recipe, load
from .region import own_axis
from .registry import Registry, TaskClaims

if TYPE_CHECKING:
    from .evaluate import Evaluation
    from .receipt import Receipt
    from .train import TrainResult
    from .verify import Proof

Say = Callable[[str], None]


def new_project(model: str, **flags: Any) -> Project:
    """A project for a base model, with targets that the model has: the paper's where it has them, else all linears."""
    project = Project.of(model=model, **flags)
    geometry = project.outline()
    if flags.get("targets") is None and not set(DEFAULT_TARGETS) <= set(geometry.kinds()):
        project = project.model_copy(update={"targets": "all-linear"})
    geometry.select(project.targets)
    return project


def plan_tasks(project: Project, tasks: Sequence[str], targets: Any) -> Plan:
    """What tasks would cost, with the registry's claims counted where there is a registry. Writes nothing."""
    registry = _existing(project)
    with registry or contextlib.nullcontext():
        held = registry.claims(project.model_name, project.composition) if registry else {}
        return plan(
            project.outline(),
            variant=project.variant,
            rank=project.rank,
            target_modules=_resolve_targets(project, tasks, targets),
            tasks=len([task for task in tasks if task not in held]) if tasks else 1,
            registry=registry,
            composition=project.composition,
        )


def _resolve_targets(project: Project, tasks: Sequence[str], targets: Any) -> Any:
    """The flag's targets, else those that the tasks' recipes name, else the project's."""
    wanted = [targets or load(task, Path(project.recipes)).target_modules or project.targets for task in tasks]
    if any(found != wanted[0] for found in wanted):
        raise UsageError(f"the recipes of {', '.join(tasks)} name different target modules: allocate them one by one")
    return wanted[0] if wanted else targets or project.targets


def allocate_tasks(project: Project, tasks: Sequence[str], targets: Any, dry_run: bool, say: Say) -> Allocation:
    """Claims for tasks."""
    target_modules = _resolve_targets(project, tasks, targets)
    geometry = project.geometry(say)
    settings: dict[str, Any] = {
        "variant": project.variant,
        "rank": project.rank,
        "composition": project.composition,
        "target_modules": target_modules,
        "seed": project.seed,
    }
    registry = _existing(project)
    if registry is None:  # tried in memory first: what cannot be allocated makes no store
        with Registry.open("sqlite://") as trial:
            found = allocate(trial, geometry, tasks, **settings)
        if dry_run:
            return found
        registry = Registry.open(project.registry)
    with registry:
        return allocate(registry, geometry, tasks, dry_run=dry_run, **settings)


def status(project: Project) -> dict[str, Any]:
    """`{"model", "composition", "tasks": {task: {...}}, "free": [{kind, axis, size, claimed, free}]}`."""
    geometry = project.geometry()
    registry = _existing(project)
    if registry is None:
        claims: dict[str, TaskClaims] = {}
        taken: dict[tuple[str, int], int] = {}
    else:
        with registry:
            claims = registry.claims(project.model_name, project.composition)
            taken = registry.claimed(project.model_name, project.composition)
    tasks = {
        name: {
            "variant": held.variant,
            "rank": held.rank,
            "matrices": len(held.regions),
            "adapter": _adapter_state(project, held),
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
            free.append(
                {
                    "kind": kind,
                    "axis": ("rows", "columns")[axis],
                    "size": size,
                    "claimed": claimed,
                    "free": size - claimed,
                }
            )
    return {"model": project.model, "composition": project.composition, "tasks": tasks, "free": free}


def release(project: Project, task: str, dry_run: bool) -> None:
    """Give back what a task holds in the project's composition."""
    with _required(project) as registry:
        registry.task(project.model_name, task, project.composition)
        if not dry_run:
            registry.release(project.model_name, task, project.composition)


def train_task(
    project: Project, task: str, overrides: Sequence[str], dry_run: bool, say: Say, quiet: Callable[[], None]
) -> TrainResult:
    """Train one task on the claims that the registry holds for it."""
    recipe = load(task, Path(project.recipes), overrides)
    with _required(project, task) as registry:
        claims = registry.task(project.model_name, task, project.composition)
    output = project.adapter(task)
    if output.exists():
        raise AdapterError(f"{output} is there already: move or delete it to train task {task} anew")
    base = project.base(say)
    from .train import train

    quiet()
    return train(
        recipe,
        base,
        claims,
        output,
        alpha=project.alpha,
        use_rslora=project.use_rslora,
        geometry=project.base_geometry(base),
        dry_run=dry_run,
        say=say,
    )


def merge_tasks(
    project: Project,
    tasks: Sequence[str] | None,
    weights: Mapping[str, float],
    output: Path,
    allow_base_mismatch: bool,
    dry_run: bool,
    say: Say,
) -> Receipt:
    """Merge trained tasks of the project's composition; None takes all that hold claims in it."""
    with _required(project) as registry:
        claims = registry.claims(project.model_name, project.composition)
        chosen = list(tasks or claims)
        if not chosen:
            raise UsageError(
                f"no task holds claims in composition {project.composition}: `multisbora allocate --tasks ...`"
            )
        digests = {t: registry.task(project.model_name, t, project.composition).digest for t in chosen}
    for task in chosen:
        if not project.adapter(task).is_dir():
            raise AdapterError(
                f"task {task} is allocated, but {project.adapter(task)} does not exist: "
                f"`multisbora train --task {task}`, or name the tasks to merge with --tasks"
            )
    base = project.base(say)
    from .merge import merge

    return merge(
        base,
        [project.adapter(task) for task in chosen],
        weights,
        output=output,
        geometry=project.base_geometry(base),
        claims=digests,
        allow_base_mismatch=allow_base_mismatch,
        dry_run=dry_run,
    )


def verify_merged(path: Path, base: str | None, adapters: Sequence[Path] | None, say: Say) -> Proof:
    """Prove a merged checkpoint; base and adapters are the project's where they are not given."""
    from .hub import find_base
    from .verify import verify

    if adapters is None:
        project = Project.load()
        adapters = [project.adapter(task) for task in _merged_tasks(path)]
    folder = find_base(base, say) if base is not None else Project.load().base(say)
    return verify(path, folder, adapters)


def _merged_tasks(path: Path) -> list[str]:
    if not path.is_dir():
        raise UsageError(f"{path} is not a folder: give the folder that `multisbora merge` wrote")
    try:
        return sorted(json.loads((path / RECEIPT_FILE).read_bytes())["tasks"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VerificationError(
            f"{path} does not hold: {RECEIPT_FILE} is missing or damaged ({type(error).__name__}); merge again"
        ) from None


def evaluate_path(
    path: str,
    tasks: Sequence[str],
    overrides: Sequence[str],
    record: bool,
    quiet: Callable[[], None],
    say: Say,
    **settings: Any,
) -> Evaluation:
    """Score a base, an adapter or a merged checkpoint; `record` writes the scores into the last one's receipt."""
    in_project = Path(PROJECT_FILE).is_file()
    project = Project.load() if in_project else None
    recipes: list[Recipe] = [load(t, Path(project.recipes) if project else None, overrides) for t in tasks]
    from .hub import find_base
    from .receipt import Receipt

    folder = find_base(path, say)
    receipt = Receipt.read(folder) if record else None
    base = None
    if (folder / "adapter_config.json").is_file():
        if project is None:
            raise UsageError(f"{path} is an adapter, and no {PROJECT_FILE} here says which base model it belongs to")
        base = project.base(say)
    from .evaluate import evaluate

    quiet()
    found = evaluate(folder, recipes, base=base, say=say, **settings)
    if receipt is not None:
        replace(receipt, scores={**receipt.scores, **found.to_json()["tasks"]}).write(folder)
    return found


def export_task(project: Project, task: str, format: str, output: Path, dry_run: bool, say: Say) -> None:
    """Write a task's adapter in another tool's format."""
    if format != "peft-lora":
        raise UsageError(f"export format {format!r} is unknown: use peft-lora")
    folder = project.adapter(task)
    if not folder.is_dir():
        raise AdapterError(f"{folder} does not exist: `multisbora train --task {task}` first")
    from .export import export_peft_lora

    if dry_run:
        Adapter.read(folder)
        check_output(output)
        return
    export_peft_lora(folder, output, project.geometry(say))


def _adapter_state(project: Project, held: TaskClaims) -> str:
    folder = project.adapter(held.task)
    if not folder.is_dir():
        started = folder.with_name(f"{folder.name}.run").is_dir()
        return "interrupted or training" if started else "not trained"
    try:
        trained_on = Adapter.read(folder).claim_digest
    except AdapterError:
        return "damaged"
    return "trained" if trained_on == held.digest else "trained on other claims"


def _existing(project: Project) -> Registry | None:
    """The project's registry, or None where nothing was ever allocated."""
    try:
        return Registry.open(project.registry, create=False)
    except RegistryError:
        if _is_missing_file(project.registry):
            return None
        raise


def _required(project: Project, task: str | None = None) -> Registry:
    registry = _existing(project)
    if registry is None:
        which = f"task {task} holds no claims" if task else "no task holds claims"
        raise RegistryError(
            f"{which}, registry {project.registry} does not exist: `multisbora allocate --tasks ...` first"
        )
    return registry


def _is_missing_file(url: str) -> bool:
    path = url.removeprefix("sqlite:///")
    return path != url and not os.path.exists(path)
