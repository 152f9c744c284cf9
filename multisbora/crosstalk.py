"""What tasks of one composition do to each other, on data.

Disjoint regions make a merge exact. They do not make tasks silent: each task's update acts on what every other task's
rows send through its matrix. Two things are measured. In every matrix, what each update adds to the output on the rows
of each task, beside what the task's own adapter adds there (`shifts`). And what all of it costs: the loss of each
task's rows under the base, the task's own adapter, the composition, and the composition without each of its tasks.

The first says where tasks talk over each other, by the base model alone and to second order. The second is the truth,
but of whole tasks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import torch
from tqdm.auto import tqdm

from .adapter import Adapter
from .dataset import Example, check_fit
from .errors import DataError, UsageError
from .evaluate import log_likelihoods
from .loading import load_model
from .probe import probe
from .quantization import widen
from .recipe import Recipe
from .shifts import Effect, Figures, Watch, defined, observe
from .train import TEMPLATE, changed_since
from .tuner import composed
from .weights import TaskWeight, Weight, require_use, resolve

ROWS = 200
Say = Callable[[str], None]
_Composition: TypeAlias = frozenset[tuple[str, TaskWeight]]
_BASE: _Composition = frozenset()


# ----------------------------------------------------------------------------------------------------------- figures


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of two sums over the same rows, and its standard error by the rows' spread; None with one row."""

    value: float
    error: float | None

    @classmethod
    def of(cls, above: Figures, below: Figures) -> Ratio:
        """
        Args:
            above, below: (rows,), what each row adds to either sum.
        """
        value = float(above.sum() / below.sum())
        spread = float(((above - value * below) ** 2).sum())
        rows = len(above)
        error = math.sqrt(spread * rows / (rows - 1)) / abs(float(below.sum())) if rows > 1 else None
        return cls(value, error)


@dataclass(frozen=True, slots=True)
class Losses:
    """The loss of one task's rows, in nats per answer token.

    Attributes:
        rows, tokens, answer_tokens: how many were looked at.
        base: of the base model alone.
        solo: with the task's own adapter alone, at lambda 1.
        merged: with all tasks at their lambdas.
        retention: (base - merged) / (base - solo); None where the own adapter gains nothing on these rows.
        without: task -> the loss without it in the composition less `merged`. Above zero, the task helps here; below
            zero it does harm. Its error is that of the difference, row by row.
    """

    rows: int
    tokens: int
    answer_tokens: int
    base: float
    solo: float
    merged: float
    retention: Ratio | None
    without: dict[str, Ratio]

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "answer_tokens": self.answer_tokens,
            "nll": {"base": self.base, "solo": self.solo, "merged": self.merged},
            "retention": self.retention and self.retention.value,
            "retention_error": self.retention and self.retention.error,
            "without": {task: {"change": ratio.value, "error": ratio.error} for task, ratio in self.without.items()},
        }


@dataclass(frozen=True, slots=True)
class Culprit:
    """What the update of one task does to the rows of another in one matrix.

    Attributes:
        on, of: whose rows, and whose update.
        harm: squared nats a row, see `Effect.harm`.
        share: of the harm of all other tasks' updates in all matrices on these rows.
        against_own: the harm as a share of that of the rows' own update, as trained, in this matrix; None where that
            adds nothing.
    """

    module: str
    on: str
    of: str
    harm: float
    share: float
    against_own: float | None

    def to_json(self) -> dict[str, Any]:
        return {
            "module": self.module,
            "on": self.on,
            "of": self.of,
            "harm": self.harm,
            "share": self.share,
            "against_own": self.against_own,
        }


@dataclass(frozen=True, slots=True)
class Crosstalk:
    """What tasks do to each other. Tasks stand in the same order along every axis.

    Attributes:
        weights: task -> lambda.
        losses: task -> loss of its rows; empty in a dry run.
        matrices: module -> effect, of every matrix that a task adapts; empty in a dry run.
        passes: rows that go through the model for it, each as often as it does.
    """

    weights: dict[str, TaskWeight]
    losses: dict[str, Losses]
    matrices: dict[str, Effect]
    passes: int

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.weights)

    @property
    def total(self) -> Effect:
        """All matrices together: their energies are summed. In `harm` all are in the units of the loss; in `shift` the
        matrices with the largest outputs speak loudest."""
        first, *others = self.matrices.values()
        return sum(others, first)

    def worst(self, count: int) -> list[Culprit]:
        """The matrices that do the harm: for each task `count` of them at most, the most harmful first."""
        found = []
        shares = {module: effect.harm.share for module, effect in self.matrices.items()}
        for i, on in enumerate(self.tasks):
            pairs = [
                (float(effect.harm.energy[i, j]), module, j)
                for module, effect in self.matrices.items()
                for j in range(len(self.tasks))
                if i != j and effect.harm.energy[i, j] > 0
            ]
            whole = math.fsum(harm for harm, _, _ in pairs)
            for harm, module, j in sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:count]:
                found.append(Culprit(module, on, self.tasks[j], harm, harm / whole, defined(shares[module][i, j])))
        return found

    def to_json(self, worst: int = 5) -> dict[str, Any]:
        """`{"passes": rows, "tasks": {task: {...}}, "total": {...}, "matrices": {module: {...}}, "worst": [...]}`.

        "total" and each matrix are as `Effect.to_json` says. Of a dry run there are "passes", and the tasks' lambdas.
        """
        tasks: dict[str, dict[str, Any]] = {task: {"weight": w.to_json()} for task, w in self.weights.items()}
        if not self.losses:
            return {"passes": self.passes, "tasks": tasks}
        return {
            "passes": self.passes,
            "tasks": {task: told | self.losses[task].to_json() for task, told in tasks.items()},
            "total": self.total.to_json(self.tasks),
            "matrices": {module: effect.to_json(self.tasks) for module, effect in self.matrices.items()},
            "worst": [culprit.to_json() for culprit in self.worst(worst)],
        }


# -------------------------------------------------------------------------------------------------------- measuring


def crosstalk(
    base: str | os.PathLike[str],
    adapters: Sequence[str | os.PathLike[str]],
    recipes: Sequence[Recipe],
    *,
    rows: int = ROWS,
    weights: Mapping[str, Weight | TaskWeight] | None = None,
    base_view: str | None = None,
    dry_run: bool = False,
    say: Say = lambda message: None,
) -> Crosstalk:
    """Measure what tasks do to each other on their own rows: dev rows where their recipes have some, see `probe`.

    One pass forward and back through the base gives the shifts by all updates, and one forward for each different
    composition the losses: T + 3 of them at most for each task's rows, if there are T tasks.

    Args:
        base: folder of the base model.
        adapters: folders of the tasks' adapters, two or more.
        recipes: one for each of these tasks.
        rows: rows a task at most.
        weights: lambdas as `merge` takes them, 1 where none is given. Any finite number will do: a task at 0 is left
            out of the composition, one below 0 is subtracted.
        base_view: "original" has adapters that were trained on a quantised base looked at on the base as it is stored.
        dry_run: check everything, the model's files too, and compute nothing.
        say: told what a person should know.

    Raises:
        UsageError: fewer than two tasks, recipes of other tasks, a weight that cannot be used, or adapters that cannot
            be composed in a running model: with modules trained whole, or on a quantised base.
        DataError: rows that are missing or do not fit the recipe or the model, or a model that gives no finite numbers.
        CheckpointError, AdapterError: see `load_model`.
    """
    if rows < 1:
        raise UsageError(f"rows must be at least 1, got {rows}")
    read = [Adapter.read(folder) for folder in adapters]
    by_task = _match(read, recipes)
    lambdas = resolve(by_task, weights)
    for adapter in read:
        _check_composable(adapter, lambdas[adapter.task], base_view)
        _check_template(adapter, by_task[adapter.task], say)
    model, tokenizer = load_model(base, adapters=[adapter.path for adapter in read], base_view=base_view, say=say)
    plain = model.get_base_model()
    if plain.dtype == torch.float16:
        say("the base is float16, whose gradients vanish without loss scaling: it is looked at in float32")
        widen(model)
    examples = {task: probe(recipe, tokenizer, rows, say) for task, recipe in by_task.items()}
    for task, found in examples.items():
        remedy, loss = "lower training.cutoff of its recipe to {known}", "figures of its longest rows say little"
        check_fit(plain.config, found, f"task {task}", remedy, loss, say)
    compositions = _compositions(lambdas)
    passes = sum(len(examples[task]) for task in chain(by_task, *compositions.values()))
    if dry_run:
        return Crosstalk(lambdas, {}, {}, passes)
    names = {adapter.task: name for adapter, name in zip(read, model.peft_config, strict=True)}
    watches = {module: Watch(layer, list(names.values())) for module, layer in model.base_model.named_layers()}
    nats: dict[tuple[_Composition, str], Figures] = {}
    grams = {}
    with tqdm(total=passes, desc="crosstalk", unit="row", leave=False, disable=None) as bar:
        with composed(model, {}):
            for task, found in examples.items():
                grams[task] = observe(plain, watches, found)
                _require_finite(task, *grams[task].values())
                bar.update(len(found))
        for composition, tasks in compositions.items():
            with composed(model, {names[task]: weight for task, weight in composition}):
                for task in tasks:
                    nats[composition, task] = -np.array(log_likelihoods(plain, examples[task]))
                    _require_finite(task, nats[composition, task])
                    bar.update(len(examples[task]))
    effects = {
        module: Effect.of([grams[task][module] for task in lambdas], [w.at(module) for w in lambdas.values()])
        for module in watches
    }
    losses = {task: _losses(task, lambdas, examples[task], nats) for task in lambdas}
    return Crosstalk(lambdas, losses, effects, passes)


def _match(adapters: Sequence[Adapter], recipes: Sequence[Recipe]) -> dict[str, Recipe]:
    """task -> recipe, in the order of the adapters."""
    tasks = [adapter.task for adapter in adapters]
    known = {recipe.name: recipe for recipe in recipes}
    if len(tasks) < 2 or len(set(tasks)) < len(tasks):
        raise UsageError(f"crosstalk is between tasks, got {', '.join(tasks) or 'none'}: name at least two, each once")
    if set(tasks) != set(known) or len(known) < len(recipes):
        raise UsageError(
            f"the adapters are of {', '.join(tasks)}, the recipes of {', '.join(recipe.name for recipe in recipes)}: "
            "give one recipe for each adapter"
        )
    return {task: known[task] for task in tasks}


def _check_composable(adapter: Adapter, weight: TaskWeight, base_view: str | None) -> None:
    require_use(weight, adapter.task, adapter.modules)
    if adapter.whole:
        raise UsageError(f"task {adapter.task} trained whole modules too, which have no lambda: leave it out")
    if adapter.quantization is not None and base_view != "original":
        raise UsageError(
            f"task {adapter.task} was trained on a base quantised to {adapter.quantization}, and a running model "
            "composes tasks on a stored one alone: say --base-view original"
        )


def _check_template(adapter: Adapter, recipe: Recipe, say: Say) -> None:
    """Say where rows are put into words that the adapter was not trained with, as far as its folder tells."""
    if changed := changed_since(adapter.path, recipe, TEMPLATE):
        say(
            f"task {adapter.task} was trained with another {' and '.join(changed)} than its recipe has now: "
            "what it is said to lose may be that"
        )


def _compositions(weights: Mapping[str, TaskWeight]) -> dict[_Composition, list[str]]:
    """Every composition whose loss is needed, once, with the tasks whose rows it is needed on."""
    found: dict[_Composition, list[str]] = {}
    for task in weights:
        wanted = (_BASE, _solo(task), _merged(weights), *(_merged(weights, without=other) for other in weights))
        for composition in dict.fromkeys(wanted):
            found.setdefault(composition, []).append(task)
    return found


def _solo(task: str) -> _Composition:
    return frozenset({(task, TaskWeight())})


def _merged(weights: Mapping[str, TaskWeight], without: str | None = None) -> _Composition:
    """All tasks but one, and but those whose lambda is zero everywhere."""
    return frozenset(
        (task, weight)
        for task, weight in weights.items()
        if task != without and (weight.default or any(value for _, value in weight.patterns))
    )


def _losses(
    task: str,
    weights: Mapping[str, TaskWeight],
    examples: Sequence[Example],
    nats: Mapping[tuple[_Composition, str], Figures],
) -> Losses:
    counts = np.array([len(example.input_ids) - example.answer_start for example in examples], np.float64)
    base, solo, merged = (nats[composition, task] for composition in (_BASE, _solo(task), _merged(weights)))
    left_out = {other: nats[_merged(weights, without=other), task] for other in weights}
    return Losses(
        rows=len(examples),
        tokens=sum(len(example.input_ids) for example in examples),
        answer_tokens=int(counts.sum()),
        base=Ratio.of(base, counts).value,
        solo=Ratio.of(solo, counts).value,
        merged=Ratio.of(merged, counts).value,
        retention=Ratio.of(base - merged, base - solo) if base.sum() > solo.sum() else None,
        without={other: Ratio.of(values - merged, counts) for other, values in left_out.items()},
    )


def _require_finite(task: str, *figures: Figures) -> None:
    if not all(np.isfinite(values).all() for values in figures):
        raise DataError(
            f"the model gives NaN or infinity on rows of task {task}: its dtype is too narrow for them, or a lambda "
            "too large: lower the lambdas, or take a bfloat16 or float32 base"
        )
