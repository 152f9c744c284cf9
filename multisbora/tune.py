"""Lambdas from data: how much of each task a composition is to hold, found on rows that no adapter learned.

What a task has to lose is its own gain, base - own, in nats a token. A composition takes a share of it away:

    lost = (merged - own) / (base - own),        retention = 1 - lost

Lambdas are the only parameters. Half of each task's rows says in which direction they go: down the sum of the lost
shares, with the worst task counted again for all of them, and tasks that do worse than allowed above everything. The
other half judges the points on the way: no task may lose more of its gain than at the start, `slack` aside, and among
the points that hold to this the one with the best worst retention is taken.

Followed are the answers of the rows, or what each task's own adapter says in their place: knowledge distillation
(Hinton et al. 2015), of the whole distribution at each answer token,

    lost = KL(own || merged) / (base - own)

which tells more of fewer tokens, has its least where the composition is the own adapter, and may look at the rows that
this adapter learned. Or both in turn, step by step: answers of dev rows, and own adapters on training rows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from .adapter import Adapter
from .blend import Blend, Half
from .checkpoint import Checkpoint
from .correct import RIDGE, check_ridge
from .corrected import Measured, spread_all
from .dataset import Example, check_fit
from .delta import delta
from .errors import DataError, TrainingError, UsageError
from .geometry import from_checkpoint
from .lambdas import MOST_SEED, Space, descend, require_optuna, search
from .loading import load_config, load_model, load_tokenizer
from .moments import Moments
from .probe import BATCH_TOKENS, probe
from .quantization import widen
from .recipe import Recipe
from .shares import Share, load, require_disjoint, shares_of
from .train import TEMPLATE, changed_since
from .weights import By, TaskWeight, Weight, check_by, resolve

Method = Literal["gradient", "search"]
Follow = Literal["answers", "own", "both"]
Say = Callable[[str], None]
Array = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

STEP_TOKENS = 1024  # of each task in one step of the gradient
MOST_LAMBDA = 1e30  # times a value of fp32, which goes to 3e38
LEAST_HEARD = 0.01  # lambda of a corrected merge: at 0 a task has no say in it
LEAST_GAIN = 0.01  # of the base's loss: what share of a smaller gain is lost would be noise


@dataclass(frozen=True, slots=True)
class Point:
    """A composition that was judged.

    Attributes:
        step: after which it was found; 0 is the start.
        weights: task -> lambda; None where each channel has its own.
        nll: task -> nats per answer token of the composition, on the rows that judge.
        retention: task -> share of its own gain that it keeps; None for a task that has none.
    """

    step: int
    weights: Mapping[str, TaskWeight] | None
    nll: Mapping[str, float]
    retention: Mapping[str, float | None]

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"step": self.step, "nll": dict(self.nll), "retention": dict(self.retention)}
        if self.weights is not None:
            found["weights"] = {task: weight.to_json() for task, weight in self.weights.items()}
        return found


@dataclass(frozen=True, slots=True)
class TunedTask:
    """One task, in nats per answer token on the rows that judge.

    Attributes:
        rows: how many judged, `learned` were followed.
        base, own: loss of the base model, and with the task's own adapter alone at lambda 1.
        before, after: of all tasks together, at the start and as tuned.
        retention_before, retention_after: None where the task's own adapter gains nothing to speak of.
    """

    rows: int
    learned: int
    base: float
    own: float
    before: float
    after: float
    retention_before: float | None
    retention_after: float | None


@dataclass(frozen=True, slots=True)
class Tuned:
    """What tuning came to.

    Attributes:
        lambdas: how many there were to choose.
        tasks: empty in a dry run.
        weights: what to merge with: those of `chosen`, in a dry run the start. By channel lambdas are in `values`, and
            what `adapter.rewrite` makes of these merges at 1.
        chosen: the point that was taken; None in a dry run.
        front: the judged points that no other one equals in all tasks and beats in one, the chosen one among them.
        follow: see `tune`.
        ridge: of the corrected merge that they are for, or by channel that they were found from; None for a plain one.
        values: by channel, task -> matrix -> its values with all lambdas and its scaling in them, fp32, in the layout
            of the adapter's own: what `adapter.rewrite` makes an adapter of.
    """

    by: By
    method: Method
    steps: int
    lambdas: int
    weights: Mapping[str, TaskWeight]
    tasks: Mapping[str, TunedTask]
    chosen: Point | None = None
    front: tuple[Point, ...] = ()
    follow: Follow = "answers"
    ridge: float | None = None
    values: Mapping[str, Mapping[str, np.ndarray]] | None = field(default=None, repr=False)

    def to_json(self) -> dict[str, Any]:
        return {
            "by": self.by,
            "method": self.method,
            "steps": self.steps,
            "follow": self.follow,
            "ridge": self.ridge,
            "lambdas": self.lambdas,
            "weights": {task: weight.to_json() for task, weight in self.weights.items()},
            "tasks": {name: asdict(task) for name, task in self.tasks.items()},
            "chosen": None if self.chosen is None else self.chosen.step,
            "front": [point.to_json() for point in self.front],
        }


def tune(
    base: str | os.PathLike[str],
    adapters: Sequence[str | os.PathLike[str]],
    recipes: Sequence[Recipe],
    *,
    start: Mapping[str, Weight | TaskWeight] | None = None,
    by: By = "matrix",
    method: Method = "gradient",
    follow: Follow = "answers",
    rows: int = 128,
    steps: int = 32,
    slack: float = 0.01,
    regular: float = 0.5,
    seed: int = 0,
    base_view: str | None = None,
    moments: Mapping[str, Moments] | None = None,
    ridge: float | None = None,
    dry_run: bool = False,
    say: Say = lambda message: None,
) -> Tuned:
    """Find the lambdas of a composition. Same arguments, rows and machine, same lambdas.

    Each is rounded to four places before it is judged, so that what was judged is what `merge` writes with these
    weights, or with adapters that have them: bit for bit on a base as stored, up to the products' rounding on a
    quantised one, and on an fp16 base up to that of fp16, whose gradient is taken in fp32. For a corrected merge, which
    solves anew for every lambda, it is that solution up to rounding: all its values are linear in the lambdas.

    By channel, each column of an fa task and each row of an fb task has a lambda. No file of weights holds so many:
    they go into values, `Tuned.values`, of which adapters are made that merge plainly at a lambda of 1. With `moments`
    these begin as the corrected merge has them, and are scaled as they are: where tasks come or go, tune anew.

    A step of "gradient" costs about a training step of all the tasks on `STEP_TOKENS` tokens of each. "search" needs no
    gradients, and optuna; a step of it is a forward over half of the rows.

    Args:
        base: folder of the base model.
        adapters: folders of trained adapters, one a task, of one composition.
        recipes: of the same tasks; they say where the rows are, see `probe`.
        start: lambdas to begin with, as `merge` takes them; 1 where none is given. 0 and negative ones are fine.
        by: what shares a lambda in a task: all of it, matrices of a kind, of a layer, or those of a matrix; or what it
            owns of one channel there.
        follow: what says where lambdas go: "answers" of half of the rows; "own", what each task's own adapter says, on
            training rows, which it may have learned, in place of that half; or "both" in turn, the answers of half of
            the rows and own adapters on as many training rows more. Of a task without dev rows, training rows make
            both halves.
        rows: of each task, those that judge and those that are followed, but for the training rows of "both".
        steps: of the gradient, or trials of the search.
        slack: share of its gain that a task may lose, against the start, for the good of the others; 0 lets none lose.
        regular: how strongly a task's lambdas are pulled towards their mean (or to the pattern of the start, moved by
            their mean), which is free. A matrix or channel of average slope stays within 1/regular of it; at 0
            nothing pulls.
        seed: of the search, from 0 to 2**32 - 1.
        base_view: see `load_model`.
        moments: task -> moments: tune for `merge` by method corrected, with these; None for the plain one.
        ridge: of that merge; None takes its usual one.
        dry_run: check everything, the model's files too, and compute nothing.

    Raises:
        UsageError: an argument that cannot mean anything, a task without a recipe, one with whole modules (which have
            no lambda), too many lambdas, or a search without optuna.
        DataError: rows or moments that are missing, rows that are cut or too few for two halves, moments of something
            else, or no task that gains anything.
        AdapterError, MergeError, CheckpointError: what could not be merged either.
        TrainingError: a loss that is not finite, or no gradient to be had.
    """
    _check(by, method, follow, rows, steps, slack, regular, seed)
    loaded = load(adapters)
    names = [adapter.task for adapter in loaded]
    weights = resolve(names, start)
    known = _recipes(names, recipes)
    shares = _composition(Path(base), loaded, weights)
    begin = [[weights[adapter.task].at(name) for name in adapter.modules] for adapter in loaded]
    _check_start(begin, names)
    correction = _correction(loaded, moments, ridge, min(map(min, begin)))
    ridge, spreads = None, None
    if correction is not None:
        measured, ridge = correction
        spreads = spread_all(shares, ridge, measured.block)
    own = {adapter.task: {name: own.region.rank for name, own in adapter.modules.items()} for adapter in loaded}
    lowest = 0.0 if moments is None or by == "channel" else LEAST_HEARD
    space = Space.of(own, weights if by != "channel" or spreads is None else resolve(names, None), by, lowest)
    if by == "channel":
        spreads = _alone(shares) if spreads is None else _settled(spreads, weights)
    if method == "search":
        require_optuna()
        if space.size > steps:
            raise UsageError(f"a search of {steps} steps cannot find {space.size} lambdas: raise steps, or use fewer")
    tokenizer, config = load_tokenizer(Path(base)), load_config(Path(base))
    ways = ("answers", "own") if follow == "both" else (follow,)
    parts: list[tuple[list[Example], ...]] = []  # of each task: by way what is followed, and what judges
    for adapter in loaded:
        _tell_recipe(adapter, known[adapter.task], say)
        part = _rows(known[adapter.task], tokenizer, rows, follow, say)
        remedy, loss = "lower training.cutoff of its recipe to {known}", "lambdas from its longest rows say little"
        check_fit(config, [*chain(*part)], f"task {adapter.task}", remedy, loss, say)
        parts.append(part)
    first, *others = (adapter.path for adapter in loaded)
    model, _ = load_model(first, base, others, base_view=base_view, say=say)
    if dry_run:
        return Tuned(by, method, steps, space.size, weights, {}, follow=follow, ridge=ridge)
    if method == "gradient" and model.get_base_model().dtype == torch.float16:
        say("the base is float16, whose gradients vanish without loss scaling: lambdas are tuned in float32")
        widen(model)
    blend = Blend(model, space.modules, spreads, space.tasks, space.width)
    *learned, judged = zip(*parts, strict=True)
    followed = [
        Half.measured(blend, part, space.start, STEP_TOKENS, way == "own")
        for way, part in zip(ways, learned, strict=True)
    ]
    judge = Half.measured(blend, judged, space.start, BATCH_TOKENS)
    gains = _gains(names, [*followed, judge], say)
    for half in (*followed, judge):
        half.scale = np.where(gains, half.gain, half.nll(half.base))
    if method == "gradient":
        walk = descend(space, blend, followed, steps, slack, regular)
    else:
        walk = search(space, blend, followed[0], steps, slack, seed)
    found, nlls = [(0, space.start)], [judge.nll(judge.start)]
    for step, lambdas in walk:
        if not any(np.array_equal(lambdas, other) for _, other in found):
            blend.compose(lambdas)
            nll = judge.nll([blend.nats(batches) for batches in judge.batches])
            if np.isfinite(nll).all():
                found.append((step, lambdas))
                nlls.append(nll)
    points = _points(space, found, nlls, judge, gains, weights)
    chosen = _choice(judge, nlls, gains, slack)
    if not chosen:
        say("no lambdas were found that do better than the start: keep it, or raise steps, rows or slack")
    values = None
    if by == "channel":
        values = dict(zip(names, blend.values(found[chosen][1]), strict=True))
    tasks = {
        name: TunedTask(
            rows=len(judged[task]),
            learned=len({id(example) for part in learned for example in part[task]}),
            base=float(judge.nll(judge.base)[task]),
            own=float(judge.nll(judge.own)[task]),
            before=points[0].nll[name],
            after=points[chosen].nll[name],
            retention_before=points[0].retention[name],
            retention_after=points[chosen].retention[name],
        )
        for task, name in enumerate(names)
    }
    front = tuple(point for place, point in enumerate(points) if _is_ahead(nlls[place], nlls))
    taken = points[chosen].weights or resolve(names, None)
    return Tuned(by, method, steps, space.size, taken, tasks, points[chosen], front, follow, ridge, values)


def _alone(shares: Sequence[Share]) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """What a lambda does to the values of its own task in a plain merge, in the form of `corrected.spread_all`."""
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    modules: dict[str, str] = {}
    for share in shares:
        module = modules.setdefault(share.matrix.cells_name, share.module)
        values = np.array(delta(share.trained.values, share.trained.scaling, 1.0))
        found.setdefault(module, {})[share.task] = {share.task: values}
    return found


def _settled(
    spreads: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]], weights: Mapping[str, TaskWeight]
) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """The values of a corrected merge at some lambdas, each of which is from then on its own task's alone."""
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for module, spread in spreads.items():
        own = found[module] = {}
        for task, reach in spread.items():
            for other, values in reach.items():
                part = np.float32(weights[task].at(module)) * values
                own[other] = {other: own[other][other] + part if other in own else part}
    return found


# ----------------------------------------------------------------------------------------------------------- judging


def _points(
    space: Space,
    found: Sequence[tuple[int, Array]],
    nlls: Sequence[Array],
    judge: Half,
    gains: Flags,
    weights: Mapping[str, TaskWeight],
) -> list[Point]:
    points = []
    base, gain = judge.nll(judge.base), judge.gain
    for (step, lambdas), nll in zip(found, nlls, strict=True):
        kept = [float((base - nll)[task] / gain[task]) if gains[task] else None for task in range(len(nll))]
        points.append(
            Point(
                step=step,
                weights=None if space.by == "channel" else space.weights(lambdas) if step else dict(weights),
                nll=dict(zip(space.tasks, nll.tolist(), strict=True)),
                retention=dict(zip(space.tasks, kept, strict=True)),
            )
        )
    return points


def _choice(judge: Half, nlls: Sequence[Array], gains: Flags, slack: float) -> int:
    """The place of the point to take: of those that keep to the slack, the one that is best where it is worst."""
    lost = (np.array(nlls) - judge.nll(judge.own)) / judge.scale
    held = [place for place, each in enumerate(lost) if (each <= lost[0] + slack).all()]
    return min(held, key=lambda place: (lost[place][gains].max(), lost[place][gains].sum(), lost[place].sum(), place))


def _is_ahead(nll: Array, others: Sequence[Array]) -> bool:
    """Whether no other point is as good in all tasks and better in one."""
    return not any((other <= nll).all() and (other < nll).any() for other in others)


def _gains(names: Sequence[str], halves: Sequence[Half], say: Say) -> Flags:
    """Which tasks gain anything by their own adapter that could be kept, on each part of their rows.

    Raises:
        DataError: none of them.
        TrainingError: a loss is not finite.
    """
    gains = np.ones(len(names), bool)
    for half in halves:
        for what, nats in (("the base", half.base), ("its own adapter", half.own), ("all tasks", half.start)):
            for name, nll in zip(names, half.nll(nats), strict=True):
                if not np.isfinite(nll):
                    raise TrainingError(
                        f"task {name}: its loss with {what} is {nll}: is an adapter or the base broken"
                        + (", or a lambda far too large?" if nats is half.start else "?")
                    )
        gains &= half.gain > LEAST_GAIN * half.nll(half.base)
    losses = [(half.nll(half.base), half.nll(half.own)) for half in halves]
    for task in np.flatnonzero(~gains).tolist():
        told = " and ".join(f"{own[task]:.4f} after {base[task]:.4f}" for base, own in losses)
        say(
            f"task {names[task]}: its own adapter gains nothing to speak of ({told} nats a token on what is followed "
            "and what judges): it has no retention, and is only kept from doing worse"
        )
    if not gains.any():
        raise DataError(
            f"no adapter of {', '.join(names)} gains anything on its own rows, so there is nothing to keep: train "
            "longer, or give more rows"
        )
    return gains


# ---------------------------------------------------------------------------------------------------------- checking


def _check(by: str, method: str, follow: str, rows: int, steps: int, slack: float, regular: float, seed: int) -> None:
    check_by(by)
    for what, told, known in (("method", method, get_args(Method)), ("follow", follow, get_args(Follow))):
        if told not in known:
            raise UsageError(f"{what} {told!r} is unknown: use {' or '.join(known)}")
    if method == "search" and follow != "answers":
        raise UsageError("a search follows the answers: use method gradient, or follow answers")
    for name, value, least in (("rows", rows, 2), ("steps", steps, 1), ("slack", slack, 0), ("regular", regular, 0)):
        if not least <= value < math.inf:
            raise UsageError(f"{name} must be at least {least} and finite, got {value}")
    if not 0 <= seed <= MOST_SEED:
        raise UsageError(f"seed must be from 0 to {MOST_SEED}, got {seed}")


def _check_start(start: Sequence[Sequence[float]], tasks: Sequence[str]) -> None:
    """Refuse lambdas that no value of fp32 can be multiplied by.

    Raises:
        UsageError: there are such.
    """
    for task, lambdas in zip(tasks, start, strict=True):
        if (largest := max(map(abs, lambdas))) > MOST_LAMBDA:
            raise UsageError(f"task {task}: a lambda of {largest:g} is too large to start from: lower it")


def _recipes(names: Sequence[str], recipes: Sequence[Recipe]) -> dict[str, Recipe]:
    known = {recipe.name: recipe for recipe in recipes}
    if missing := [name for name in names if name not in known]:
        raise UsageError(f"task {missing[0]} has an adapter and no recipe, which says where its rows are: give one")
    if spare := [name for name in known if name not in names]:
        raise UsageError(f"task {spare[0]} has a recipe and no adapter: give its adapter too, or leave it out")
    return known


def _composition(base: Path, loaded: Sequence[Adapter], weights: Mapping[str, TaskWeight]) -> list[Share]:
    """What the tasks write into the base; refuses what `merge` would refuse to compose."""
    checkpoint = Checkpoint.open(base)
    geometry = from_checkpoint(base, checkpoint.headers)
    shares: dict[str, list[Share]] = {}
    for adapter in loaded:
        if adapter.whole:
            raise UsageError(
                f"{adapter.path} trained whole modules too, which have no lambda: train without modules_to_save"
            )
        for tensor, found in shares_of(adapter, weights[adapter.task], geometry, checkpoint).items():
            shares.setdefault(tensor, []).extend(found)
    for found in shares.values():
        require_disjoint(found)
    return [share for found in shares.values() for share in found]


def _correction(
    loaded: Sequence[Adapter], moments: Mapping[str, Moments] | None, ridge: float | None, lowest: float
) -> tuple[Measured, float] | None:
    """The moments and the ridge of a corrected merge; None for a plain one.

    Raises:
        UsageError: the ridge is none or is ignored, or a lambda of the start is too low.
        DataError: moments are missing, or of another base or other adapters than these say of themselves.
    """
    if moments is None:
        if ridge is not None:
            raise UsageError("a ridge is of corrected merges: tune for one with --corrected, or leave it out")
        return None
    ridge = RIDGE if ridge is None else ridge
    check_ridge(ridge)
    if lowest < LEAST_HEARD:
        raise UsageError(
            f"lambdas of a corrected merge are tuned from {LEAST_HEARD:g} on, the start has {lowest:g}: a task at "
            "0 is left out of the equations there; start higher, or leave the task out of --tasks"
        )
    measured = Measured(moments, [adapter.task for adapter in loaded])
    measured.check_adapters(loaded)
    measured.check_digests({adapter.task: adapter.digest for adapter in loaded})
    return measured, float(ridge)


def _tell_recipe(adapter: Adapter, recipe: Recipe, say: Say) -> None:
    """Say so where a task's rows are read in another way than when it was trained: they may be rows that it learned."""
    if odd := changed_since(adapter.path, recipe, (*TEMPLATE, "train", "dev", "dev_size", "seed")):
        say(
            f"task {adapter.task}: {', '.join(odd)} of its recipe differ from those that it was trained with: it may "
            "have learned some of these rows, or know them in another form"
        )


def _rows(recipe: Recipe, tokenizer: Any, rows: int, follow: Follow, say: Say) -> tuple[list[Example], ...]:
    """Examples to follow, of each way to do so, and last examples to judge by.

    Raises:
        DataError: there are none, or not two prompts for two halves.
    """
    held_out = recipe.dev is not None or recipe.dev_size is not None
    own = probe(recipe, tokenizer, rows - rows // 2, say, learned=True) if held_out and follow != "answers" else []
    if held_out and follow == "own":
        return own, probe(recipe, tokenizer, rows // 2, say)
    learn, judge = _halves(probe(recipe, tokenizer, rows, say, least=2), recipe.name)
    return (learn, own or learn, judge) if follow == "both" else (learn, judge)


def _halves(examples: Sequence[Example], task: str) -> tuple[list[Example], list[Example]]:
    """Examples to follow and examples to judge by; those with one prompt stay together.

    Raises:
        DataError: they all have one prompt.
    """
    prompts: dict[tuple[int, ...], list[Example]] = {}
    for example in examples:
        prompts.setdefault(tuple(example.input_ids[: example.answer_start]), []).append(example)
    if len(prompts) < 2:
        raise DataError(f"the rows of task {task} have one prompt, and tuning needs two halves of them: give more")
    groups = list(prompts.values())
    learn, judge = ([example for group in groups[half::2] for example in group] for half in (0, 1))
    return learn, judge
