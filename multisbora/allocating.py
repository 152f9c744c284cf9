"""What `allocate` and `measure` do in a project: claims for tasks, and the moments by which they can be chosen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .allocator import Allocation, allocate
from .errors import DataError, MultisboraError, RegistryError, UsageError
from .geometry import Geometry
from .hub import find_here, local_folder
from .journal import reading
from .lifecycle import existing, resolve_targets, write_registry
from .moments import Moments, keep_beside
from .names import check_name
from .project import Project
from .recipe import names as recipe_names
from .registry import Registry
from .settings import load_yaml
from .stream import fingerprint

if TYPE_CHECKING:
    from .registry.measured import Measured
    from .survey import Survey

Say = Callable[[str], None]
_ROWS = 128  # of each task that is measured because its indices are asked for


def read_compositions(path: Path) -> dict[str, list[str]]:
    """Compositions and their tasks from a YAML file: a line `name: [task, task]` each.

    Raises:
        UsageError: no such file, no valid YAML, or something else in it than names.
    """
    found = load_yaml(path)
    if not found:
        raise UsageError(f"{path} names no composition: write a line `name: [task, task]` each")
    for name, tasks in found.items():
        if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) for task in tasks):
            raise UsageError(f"{path}: composition {name!r} must have a list of task names, got {tasks!r}")
    return found


def allocate_tasks(
    project: Project,
    tasks: Sequence[str],
    compositions: dict[str, list[str]] | None,
    targets: Any,
    reallocate: bool,
    dry_run: bool,
    say: Say,
    quiet: Callable[[], None] = lambda: None,
) -> Allocation:
    """Claims for tasks in the project's composition, or for the tasks of several compositions.

    Isolated indices need moments of the tasks. Those that nobody measured are measured now, after it is clear that the
    tasks fit, from the rows of their recipes. Once indices are given out, tasks whose rows are here are measured at
    them: training isolates tasks by that.

    Raises:
        DataError: moments of another base model; or of a task that is there already none, and its rows are not here.
        RegistryError: isolated indices are asked for, and moments that they hang on are damaged.
    """
    names = list(tasks) or list(dict.fromkeys(t for members in (compositions or {}).values() for t in members))
    for name in names:
        check_name(name, new_task=True)
    target_modules = resolve_targets(project, names, targets)
    geometry = project.geometry(say)
    settings: dict[str, Any] = {
        "variant": project.variant,
        "rank": project.rank,
        "composition": compositions if compositions is not None else project.composition,
        "target_modules": target_modules,
        "seed": project.seed,
        "reallocate": reallocate,
    }

    def write(dry_run: bool) -> Allocation:
        return write_registry(
            project, dry_run, lambda registry: allocate(registry, geometry, tasks, dry_run=dry_run, **settings)
        )

    moments: dict[str, Moments] | str = ""
    if project.strategy != "random":
        asked = compositions if compositions is not None else {project.composition: names}
        moved = write(dry_run=True).moved if reallocate else ()
        moments = _find_moments(project, asked, moved, lambda: write(dry_run=True), dry_run, say, quiet)
    if isinstance(moments, str):
        found = write(dry_run)
        if moments:
            say(f"indices are drawn at random, since {moments}")
        return found
    settings |= {"strategy": "isolated", "moments": moments}
    found = write(dry_run)
    if not dry_run:
        _measure_again(project, found.tasks, say, quiet)
    return found


def _find_moments(
    project: Project,
    asked: Mapping[str, Sequence[str]],
    moved: Sequence[str],
    check: Callable[[], object],
    dry_run: bool,
    say: Say,
    quiet: Callable[[], None],
) -> dict[str, Moments] | str:
    """What was measured of any task; of those that get indices now, and of those that these meet, it is if need be.

    Args:
        asked: compositions and the tasks that shall be in them.
        moved: tasks that will be given other indices than they hold.
        check: refuses what cannot be allocated; called before anybody is asked to measure for it.

    Returns:
        {} where nobody gets any: no moments are read then. Where the project leaves it open how indices are chosen, and
        moments are not what they have to be, why; "" for a task that meets nobody.
    """
    model = project.model_name
    registry = existing(project)
    with registry or contextlib.nullcontext():
        there = registry.compositions(model) if registry else {}
        held = {task for members in there.values() for task in members}
        members = {name: {*asked.get(name, ()), *there.get(name, ())} for name in (*asked, *there)}
        new = {task for tasks in asked.values() for task in tasks} - held | set(moved)
        kept = {task for tasks in asked.values() for task in tasks} - new
        if registry and kept and project.strategy == "isolated":
            _say_what_is_kept(registry, model, kept, say)
        if not new:
            return {}
        found, damaged = _readable(registry, model) if registry else ({}, {})
    needed = new.union(*(tasks for tasks in members.values() if not tasks.isdisjoint(new)))
    if broken := sorted(needed & damaged.keys()):
        if project.strategy == "auto":
            return str(damaged[broken[0]])
        raise damaged[broken[0]]
    missing = sorted(needed - found.keys())
    if missing and project.strategy == "auto":
        if len(needed) == 1:
            return ""
        return (
            f"there are no moments of {', '.join(missing)}: `multisbora measure --tasks {','.join(missing)}` first, or "
            "--strategy isolated, and they are chosen so that tasks stay out of each other's way"
        )
    if missing:
        check()
    absent = [task for task in missing if task not in recipe_names(Path(project.recipes))]
    if absent:
        raise DataError(
            f"isolated indices of {', '.join(sorted(new))} need moments of {', '.join(absent)}, whose rows are not "
            f"here: run multisbora measure --tasks {','.join(absent)} where they are, or allocate with "
            "--strategy random"
        )
    if missing:
        say(f"measuring {', '.join(missing)}: isolated indices need moments of the tasks that meet")
        found |= measure_tasks(project, missing, _ROWS, None, dry_run, say, quiet)
        base_fingerprint = found[missing[0]].base_fingerprint
    elif folder := local_folder(project.model):
        base_fingerprint = fingerprint(folder, project.base_geometry(folder))
    else:  # nothing is fetched for this: the weights of a large model are hours away
        base_fingerprint = found[min(new)].base_fingerprint
    if project.strategy == "auto" and any(found[task].base_fingerprint != base_fingerprint for task in needed):
        return "the moments of these tasks are not all of this base model"
    for task in sorted(found):
        if task in needed:
            found[task].check_base(base_fingerprint)
        elif found[task].base_fingerprint != base_fingerprint:
            say(f"task {task} was measured on another base model: no room is left for it")
            del found[task]
    for task, error in damaged.items():
        say(f"no room is left for task {task}: {error}")
    return found


def _readable(registry: Registry, model: str) -> tuple[dict[str, Moments], dict[str, RegistryError]]:
    """The moments of all tasks that were measured, without their blocks, and what is wrong with those of others."""
    found: dict[str, Moments] = {}
    damaged: dict[str, RegistryError] = {}
    for task in registry.measured(model):
        try:
            moments = registry.moments(model, task, channels=False)
        except RegistryError as error:
            damaged[task] = error
            continue
        if moments is not None:  # or somebody forgot them just now
            found[task] = moments
    return found, damaged


def _measure_again(project: Project, tasks: Collection[str], say: Say, quiet: Callable[[], None]) -> None:
    """Measure tasks that meet these at the channels that they hold now, where their moments lack some.

    Only what can be measured as it was: from rows that are here and as many, and without fetching the base.
    """
    model = project.model_name
    with Registry.open(project.registry) as registry:
        if not (known := registry.measured(model)):
            return
        groups = [set(group) for group in registry.compositions(model).values()]
        met = {task for group in groups if not group.isdisjoint(tasks) for task in group}
        lacking = sorted(task for task in met & known.keys() if len(met) > 1 and registry.lacks_moments(model, task))
    if not lacking:
        return
    base_is_here = find_here(project.model) is not None
    again: dict[int, list[str]] = {}
    for task in lacking:
        if base_is_here and known[task].source == "task" and _measures_alike(project, task, known[task]):
            again.setdefault(known[task].rows, []).append(task)
    for rows, same in again.items():
        say(f"measuring {', '.join(same)} at the channels that were given out")
        measure_tasks(project, same, rows, None, False, say, quiet)
    for task in lacking:
        if not any(task in same for same in again.values()):
            text = "" if known[task].source == "task" else " --text FILE"
            say(
                f"run multisbora measure --tasks {task}{text} as it was measured before: until then nobody is isolated "
                "from it at the channels that were given out"
            )


def _measures_alike(project: Project, task: str, before: Measured) -> bool:
    """Whether what a task's recipe says here comes to as many rows and tokens as were measured of it."""
    try:
        found = survey_tasks(project, [task], before.rows, None, lambda message: None).to_json()[task]
    except MultisboraError:
        return False
    return (found["rows"], found["tokens"]) == (before.rows, before.tokens)


def _say_what_is_kept(registry: Registry, model: str, tasks: Collection[str], say: Say) -> None:
    """Tell who asks for isolated indices which tasks hold others, and keep them. Renamed tasks are passed over."""
    how = {e.task: e.action for e in registry.events() if e.model == model and e.action in ("allocate", "choose")}
    if at_random := sorted(task for task in tasks if how.get(task) == "allocate"):
        say(
            f"the indices of {', '.join(at_random)} were drawn at random, and stay: to have them chosen, "
            "run multisbora release first"
        )


def survey_tasks(
    project: Project,
    tasks: Sequence[str],
    rows: int,
    text: Path | None,
    say: Say,
    overrides: Sequence[str] = (),
    trained: bool = False,
) -> Survey:
    """What `measure_tasks` would measure: rows, tokens and channels of each task, without its model.

    Raises:
        UsageError, AdapterError, DataError: as `measure_tasks` and `measure_trained`.
    """
    from .survey import Survey

    with existing(project) or contextlib.nullcontext() as registry:
        return Survey.of(project, registry, tasks, rows=rows, text=text, say=say, overrides=overrides, trained=trained)


def measure_tasks(
    project: Project,
    tasks: Sequence[str],
    rows: int,
    text: Path | None,
    dry_run: bool,
    say: Say,
    quiet: Callable[[], None],
    on_measured: Callable[[Moments], None] = lambda moments: None,
    overrides: Sequence[str] = (),
) -> dict[str, Moments]:
    """Measure what tasks' rows send through the base model, into the registry, which is made if it is not there.

    Each task is kept as soon as it is measured, so what was interrupted need not be done again.

    Args:
        tasks: with claims or without; without, nothing is measured of how channels vary together.
        rows: how many of each task at most.
        text: a plain text file that stands for the rows of tasks that have none.
        dry_run: measure, and keep nothing.
        quiet: called before anything heavy is imported.
        on_measured: called with each task's moments, blocks and all.
        overrides: of the tasks' recipes, see `recipe.load`.

    Returns:
        What allocation reads of them: their blocks are empty, since all of them together can be large.

    Raises:
        UsageError: no task, or one without a recipe and no text.
        DataError: rows that are missing or do not fit, or a base that gives values on them that are not finite.
        RegistryError: the store cannot be used, or the model's name stands there for another geometry.
    """
    quiet()
    survey = survey_tasks(project, tasks, rows, text, say, overrides)
    if not dry_run:
        write_registry(project, True, lambda registry: _keep(registry, survey.geometry, None))
    found: dict[str, Moments] = {}
    with reading(survey.base, say=say):
        for moments in survey.measure(say):
            if not dry_run:
                with Registry.open(project.registry) as registry:
                    _keep(registry, survey.geometry, moments)
            on_measured(moments)
            found[moments.task] = moments.without_blocks()
    return found


def measure_trained(
    project: Project,
    tasks: Sequence[str],
    rows: int,
    text: Path | None,
    say: Say,
    quiet: Callable[[], None],
    on_measured: Callable[[Moments], None],
    overrides: Sequence[str] = (),
) -> None:
    """Measure tasks' rows through their own adapters, into the adapters' folders: what a corrected merge goes by.

    Args:
        as of `measure_tasks`; a text is refused.

    Raises:
        AdapterError: a task has no adapter, or one of another base or of other claims.
        UsageError, DataError: as `measure_tasks`; or an adapter's folder that cannot be written.
    """
    quiet()
    survey = survey_tasks(project, tasks, rows, text, say, overrides, trained=True)
    with reading(survey.base, say=say):
        for moments in survey.measure(say):
            keep_beside(project.adapter(moments.task), moments)
            on_measured(moments)


def _keep(registry: Registry, geometry: Geometry, moments: Moments | None) -> None:
    with registry.transaction(dry_run=moments is None) as ledger:
        ledger.register(geometry)
        if moments is not None:
            ledger.keep_moments(geometry.model, moments)
