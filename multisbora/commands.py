"""What each command does in a project. Every function takes the project and plain values, and returns the result that
the command prints; heavy libraries are imported where they are needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapter import Adapter, training_record
from .allocator import DEFAULT_TARGETS, allocate, matrix_ranks
from .distributed import is_first
from .errors import AdapterError, AllocationError, CheckpointError, DataError, RegistryError, UsageError
from .journal import editing, reading
from .lifecycle import existing, required, resolve_targets
from .memory import Peak, find_config, predict_peak
from .ownership import Ownership, ownership
from .plan import METHODS, Plan, plan
from .project import PROJECT_FILE, Project
from .publish import check_output
from .recipe import Recipe, load
from .registry import Registry
from .room import Room, find_rooms, room

if TYPE_CHECKING:
    from .evaluate import Evaluation
    from .moments import Moments
    from .penalty import Penalty
    from .registry.claims import TaskClaims
    from .train import TrainResult

Say = Callable[[str], None]


def new_project(model: str, **flags: Any) -> Project:
    """A project for a base model, with targets that the model has: the paper's where it has them, else all linears.

    A geometry card's name stands for a hub id (`Project.hub_id`), since no weights can be fetched by it.

    Raises:
        UsageError: values with faults, targets that the model lacks, or a rank above one of its matrices.
    """
    project = Project.of(model=model, **flags)
    project = project.model_copy(update={"model": project.hub_id or model})
    geometry = project.outline()
    if flags.get("targets") is None and not set(DEFAULT_TARGETS) <= set(geometry.kinds()):
        project = project.model_copy(update={"targets": "all-linear"})
    matrix_ranks(geometry, variant=project.variant, rank=project.rank, target_modules=project.targets)
    return project


@dataclass(frozen=True)
class Forecast:
    """What `plan` says: costs, predicted peak memory if asked for, what still fits where, and who owns what.

    Attributes:
        refusal: why the tasks asked about cannot have it so, if they cannot.
    """

    plan: Plan
    peak: Peak | None
    rooms: dict[str, Room]
    ownership: Ownership
    refusal: AllocationError | None = None

    def to_json(self) -> dict[str, Any]:
        peak = {} if self.peak is None else {"peak": self.peak.to_json()}
        rooms = {name: found.to_json() for name, found in self.rooms.items()}
        return {**self.plan.to_json(), **peak, "compositions": rooms, "ownership": self.ownership.to_json()}

    def lines(self) -> Iterator[str]:
        plan = self.plan
        costs = {method: plan.cost(method) for method in METHODS}
        counts = {
            "trainable parameters a task": plan.trainable_parameters,
            "a LoRA of the same rank": plan.lora_parameters,
        }
        sizes = {
            "adapter file, bytes": plan.adapter_bytes,
            "gradients, bytes": costs[plan.variant].gradient_bytes,
            "AdamW's state, bytes": costs[plan.variant].optimizer_bytes,
            **{f"saved for backward a token, {m}": cost.activation_bytes_per_token for m, cost in costs.items()},
        }
        if self.peak is not None:
            parts = {part: n for part, n in self.peak.to_json().items() if part not in ("tokens", "gradients")}
            sizes |= {f"peak memory, {part}": n for part, n in parts.items()}
        fit = "room for tasks, before the planned" if plan.tasks else "tasks that still fit"
        yield f"{plan.model}: {plan.variant} rank {plan.rank} on {len(plan.matrices)} matrices"
        yield from (f"{what:<34}{number:>17,}" for what, number in counts.items())
        yield from (f"{what:<34}{number:>17,}{_human(number)}" for what, number in sizes.items())
        yield f"{fit:<34}{plan.capacity_tasks:>17,}"
        yield from (f"{name}: {found.line}" for name, found in self.rooms.items())
        yield ""
        yield from self.ownership.lines()


def plan_tasks(
    project: Project,
    tasks: Sequence[str],
    targets: Any,
    batch_size: int | None = None,
    length: int | None = None,
    say: Say = lambda message: None,
) -> Forecast:
    """What tasks would cost and who owns what, with the registry's claims counted where there is a registry.

    The peak memory is predicted where `batch_size` (rows of a micro-batch) and `length` (tokens a row) are given, with
    gradient checkpointing if every task's recipe has it. Where there is a registry, `allocate` itself is asked whether
    named tasks can have what the figures say, as a dry run. Writes nothing.

    Raises:
        UsageError: one of `batch_size` and `length` without the other, or with a task that quantises its base, whose
            peak is not predicted; or what `plan` and the recipes refuse.
    """
    if (batch_size is None) != (length is None):
        raise UsageError("--batch-size and --length belong together: give rows and tokens a row, or neither")
    training = [] if batch_size is None else [load(task, Path(project.recipes)).training for task in tasks]
    for task, settings in zip(tasks, training, strict=False):
        if settings.quantization is not None:
            raise UsageError(
                f"the peak memory is not predicted for a quantised base: task {task} has training.quantization "
                f"{settings.quantization}; leave --batch-size and --length out, or that task"
            )
    geometry = project.outline()
    target_modules = resolve_targets(project, tasks, targets)
    refusal: AllocationError | None = None
    registry = existing(project)
    with registry or contextlib.nullcontext():
        geometry = registry.named(geometry) if registry else geometry
        held = registry.claims(project.model_name, project.composition) if registry else {}
        found = plan(
            geometry,
            variant=project.variant,
            rank=project.rank,
            target_modules=target_modules,
            tasks=len([task for task in tasks if task not in held]) if tasks else 1,
            registry=registry,
            composition=project.composition,
        )
        protected = registry.protected(project.model_name) if registry else {}
        if registry:
            rooms = find_rooms(registry, project.model_name, found.ranks, project.variant, [project.composition])
        else:
            rooms = {project.composition: room([], project.composition, found.ranks, project.variant)}
        try:
            if registry and tasks:
                allocate(
                    registry,
                    geometry,
                    tasks,
                    variant=project.variant,
                    rank=project.rank,
                    composition=project.composition,
                    target_modules=target_modules,
                    seed=project.seed,
                    dry_run=True,
                )
            else:
                found.require_capacity()
        except AllocationError as error:
            refusal = error
    peak = None
    if batch_size is not None and length is not None:
        say("predicting the peak on a model without weights: up to a minute")
        peak = predict_peak(
            find_config(project.model),
            found,
            batch_size,
            length,
            gradient_checkpointing=bool(training) and all(settings.gradient_checkpointing for settings in training),
            dropout=max((settings.dropout for settings in training), default=0.0),
        )
    return Forecast(found, peak, rooms, ownership(geometry, held, found, protected), refusal)


def _human(size: int) -> str:
    """Bytes in decimal units, to stand behind their exact number; nothing below a thousand."""
    unit = next((unit for unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= unit[0]), None)
    return f"{size / unit[0]:>8.1f} {unit[1]}" if unit else ""


def quiet_libraries() -> None:
    """On the command line, what libraries say about their own future is nobody's business."""
    import logging
    import warnings

    import transformers

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it; it recommends a package at once
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)


def claims_to_train(project: Project, registry: Registry, task: str) -> TaskClaims:
    """What a task holds in the project's composition, or else in another one of its own.

    Raises:
        RegistryError: it holds nothing in any.
    """
    there = registry.memberships(project.model_name, task)
    elsewhere = next(iter(there), project.composition)
    return registry.task(project.model_name, task, project.composition if project.composition in there else elsewhere)


def train_task(
    project: Project,
    task: str,
    overrides: Sequence[str],
    deepspeed: Path | None,
    dry_run: bool,
    say: Say,
    quiet: Callable[[], None],
    on_start: Callable[[], None] = lambda: None,
) -> TrainResult:
    """Train one task on the claims that the registry holds for it: the same in each of its compositions.

    A launcher's processes all call this; the first of them tells the registry.

    Args:
        on_start: called once, when the run's folder is held and the registry told.
    """
    recipe = load(task, Path(project.recipes), overrides)
    with required(project, task) as registry:
        claims = claims_to_train(project, registry, task)
    output = project.adapter(task)
    if output.exists() and not output.with_name(f"{output.name}.run").exists():
        if (done := _done(output, claims)) is None:
            raise AdapterError(f"{output} is there already: move or delete it to train task {task} anew")
        say(f"{output} is complete: the process that trained it was killed before it could tell the registry")
        if is_first() and not dry_run:
            _tell_trained(project, claims, output, say)
        return done
    base = project.base(say)
    from .train import train

    quiet()

    def begin() -> None:
        with required(project, task) as registry:
            registry.mark(claims, "training")
        on_start()

    with reading(base, say=say):
        found = train(
            recipe,
            base,
            claims,
            output,
            alpha=project.alpha,
            use_rslora=project.use_rslora,
            geometry=project.base_geometry(base),
            deepspeed=deepspeed,
            penalty=None if recipe.training.isolate == 0 else partial(_penalty, project, claims, recipe, say),
            dry_run=dry_run,
            say=say,
            on_start=begin,
        )
    if is_first() and not dry_run:
        _tell_trained(project, claims, output, say)
    return found


def _penalty(project: Project, claims: TaskClaims, recipe: Recipe, say: Say, base_fingerprint: str) -> Penalty | None:
    """What isolates a task from all others that share a composition with it.

    Where the recipe leaves open whether it is, those that were measured do; None where none was.

    Raises:
        DataError: the recipe asks for it, and some of them were not measured, or not since claims changed.
        UsageError: it asks for it, and there are no others.
    """
    model, task = claims.model, claims.task
    left_out: list[str] = []
    with required(project, task) as registry:
        with registry.reading() as reader:
            met = [tasks for tasks in reader.compositions(model).values() if task in tasks]
        others = sorted({other for tasks in met for other in tasks} - {task})
        known = registry.measured(model)
        missing = [other for other in others if other not in known]
        from .penalty import MOST_BYTES, STRENGTH, Penalty, block_bytes

        def measured(other: str) -> Moments:
            found = None if missing else registry.moments(model, other)
            if found is None:
                raise DataError(
                    f"task {task} is to be isolated from {', '.join(missing or [other])}, whose rows nobody has "
                    f"measured: run multisbora measure --tasks {','.join(missing or [other])}"
                )
            return found

        if recipe.training.isolate is not None:
            return Penalty.of(claims, map(measured, others))
        penalty = None
        if len(missing) == len(others):  # nobody asked for it in any way
            return None
        size = block_bytes(claims, project.base_geometry(project.base()))
        if size > MOST_BYTES:
            left_out.append(f"moments at all of its channels take {size:,} bytes, --isolate {STRENGTH:g} takes them")
        else:

            def there() -> Iterator[Moments]:
                for other in others:
                    try:
                        found = registry.moments(model, other)
                    except DataError as error:  # nobody asked for it in any way
                        left_out.append(str(error))
                        continue
                    if found is not None:
                        yield found

            penalty = Penalty.gather(claims, there(), left_out.append, base_fingerprint)
    left_out += [f"the rows of {', '.join(missing)} were not measured"] if missing else []
    if is_first():  # of a launcher's processes one says it
        others = [] if penalty is None else penalty.tasks
        why = f"not isolated from {'others' if others else 'other tasks'}: {'; '.join(left_out)}" if left_out else ""
        say("; ".join(filter(None, [f"isolated from {', '.join(others)}" if others else "", why])))
    return penalty


def _done(output: Path, claims: TaskClaims) -> TrainResult | None:
    """What a run came to that was killed when its adapter was in place and the registry not told; else None."""
    # A launcher's other processes may look when the first one has told the registry already.
    if claims.stage != "training" and (is_first() or claims.stage != "trained"):
        return None
    from .train import TrainResult

    try:
        if Adapter.read(output).claim_digest != claims.digest:
            return None
        summary = training_record(output)
        return TrainResult(
            task=claims.task,
            adapter=output,
            steps=summary["steps"],
            tokens=summary["tokens"],
            loss=summary["loss"],
            seconds=0.0,
            trainable_parameters=summary["trainable_parameters"],
            dev_loss=summary.get("dev_loss"),
            best_step=summary.get("best_step"),
        )
    except (AdapterError, KeyError):  # none, or another program's
        return None


def _tell_trained(project: Project, claims: TaskClaims, output: Path, say: Say) -> None:
    detail = {"adapter_digest": Adapter.read(output).digest}
    tell(project, say, f"{output} is complete", lambda registry: registry.mark(claims, "trained", detail))


def tell(project: Project, say: Say, done: str, what: Callable[[Registry], None]) -> None:
    """Tell the registry what was done. What it says against it cannot undo that, so it is passed on as a message."""
    try:
        with required(project) as registry:
            what(registry)
    except RegistryError as error:
        say(f"multisbora: {done}, but the registry was not told: {error}")


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
    if record:
        Receipt.read(folder)  # refused now and not after an hour of scoring
    base = None
    if (folder / "adapter_config.json").is_file():
        if project is None:
            raise UsageError(f"{path} is an adapter, and no {PROJECT_FILE} here says which base model it belongs to")
        base = project.base(say)
    from .evaluate import evaluate

    quiet()
    with reading(folder, *([base] if base else []), say=say):
        receipt = Receipt.read(folder) if record else None
        found = evaluate(folder, recipes, base=base, say=say, **settings)
    if receipt is not None:
        with editing(folder, say):
            if Receipt.read(folder) != receipt:
                raise CheckpointError(f"{folder} was edited or scored meanwhile: the scores are not recorded")
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

    adapter, geometry = Adapter.read(folder), project.geometry(say)
    if dry_run:
        adapter.fit(geometry)
        check_output(output)
    else:
        export_peft_lora(folder, output, geometry)
    if adapter.quantization is not None:
        say(f"{task} was trained on a base quantised to {adapter.quantization}: load the base so when you use {output}")
