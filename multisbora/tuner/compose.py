"""Compositions in a running model: which tasks are in it, at which lambdas, for as long as a block of code runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import UsageError
from ..weights import TaskWeight, Weight, require_use
from .layer import Mix, SboraLayer
from .model import SboraModel


@contextlib.contextmanager
def composed(model: nn.Module, weights: Mapping[str, Weight | TaskWeight]) -> Iterator[None]:
    """Have exactly these tasks active, at these lambdas; on leaving, by an exception too, all is as it was.

        with composed(model, {"math": 0.8, "commonsense": {"default": 1, "q_proj": 0.5}}):
            model.generate(**inputs)

    Inside, no values take gradients. What was active, at which lambdas, whether adapters were disabled, and what takes
    gradients come back on leaving, and with them every bit of the base weights. Blocks can be nested; the innermost
    alone counts. It is the model that changes, for every thread that runs it.

    Cost: entering writes nothing. The first forward inside writes the cells of the tasks that came, went or changed
    their lambda, r columns or rows a matrix and task, and no others. The forwards after it, those of a generation too,
    find the weights as they are to be, unless something read the base weights in between (`parameters()`,
    `state_dict()`), which gets W0. Leaving writes the same cells once more. `model.base_model.settle()` writes what
    the next forward would. Where two tasks share cells, as tasks of one composition never do, all tasks of that matrix
    are written each time.

    The weights that a forward in there computes with are, bit for bit, those that `merge` writes for these tasks and
    lambdas, where layers compute in place (see SboraLayer); in the gather form they are the same up to rounding.

    Args:
        model: a PeftModel with SBORA adapters, or its base_model.
        weights: task -> lambda, or task -> {"default": lambda, pattern: lambda} as `merge` takes it. A task is named by
            its adapter's name in PEFT, or as its adapter says. Nothing in it is the base alone.

    Raises:
        UsageError: no such model or task, a lambda that is none, a pattern without a matrix, a quantised base, a task
            that is merged at present, or adapters that hold whole modules. Nothing has changed then.
    """
    tuner = model if isinstance(model, SboraModel) else getattr(model, "base_model", None)
    if not isinstance(tuner, SboraModel):
        raise UsageError(f"a {type(model).__name__} has no SBORA adapters: give the model of peft.get_peft_model")
    layers = list(tuner.named_layers())
    wanted = _by_adapter(tuner, weights)
    _check(tuner, [layer for _, layer in layers])
    for adapter, weight in wanted.items():
        require_use(weight, adapter, [name for name, layer in layers if adapter in layer.sbora_values])
    outer: Any = model
    active, named = tuner.active_adapter, getattr(outer, "active_adapter", None)  # a PeftModel has its own
    before = [(layer, layer.mix, layer.is_live) for _, layer in layers]
    try:
        tuner.active_adapter = list(wanted)
        for name, layer in layers:
            layer.mix = Mix(list(wanted), {adapter: weight.at(name) for adapter, weight in wanted.items()})
        yield
    finally:
        tuner.active_adapter = _loaded(tuner, active)
        if isinstance(named, str) and named in tuner.peft_config:
            outer.active_adapter = named
        for layer, mix, _ in before:
            layer.mix = replace(mix, active=_loaded(tuner, mix.active))
        for layer, _, was_live in before:
            if was_live:
                layer.settle()
            else:
                layer.restore()


def _loaded(tuner: SboraModel, active: str | list[str]) -> str | list[str]:
    """Active adapters without those that were deleted in the block."""
    return active if isinstance(active, str) else [name for name in active if name in tuner.peft_config]


def _by_adapter(tuner: SboraModel, weights: Mapping[str, Weight | TaskWeight]) -> dict[str, TaskWeight]:
    """Weights by the names that PEFT has for the tasks, in the order in which they were loaded."""
    if not isinstance(weights, Mapping):
        raise UsageError(f"a composition is {{task: lambda}}, got {weights!r}")
    found: dict[str, TaskWeight] = {}
    for task, value in weights.items():
        named = {name for name, config in tuner.peft_config.items() if task in (name, config.task)}
        if len(named) != 1:
            known = ", ".join(
                name if config.task in (None, name) else f"{config.task} ({name})"
                for name, config in tuner.peft_config.items()
            )
            raise UsageError(f"{'no' if not named else 'more than one'} task {task!r} is loaded: there are {known}")
        (adapter,) = named
        if adapter in found:
            raise UsageError(f"{task!r} names an adapter that the composition has already: name it once")
        found[adapter] = TaskWeight.of(value, task)
    return {name: found[name] for name in tuner.peft_config if name in found}


def _check(tuner: SboraModel, layers: list[SboraLayer]) -> None:
    if any(layer.quantization_backend is not None for layer in layers):
        raise UsageError(
            "a quantised base cannot be composed exactly: load the 16-bit base, or use set_adapter and set_weight"
        )
    if merged := sorted({name for layer in layers for name in layer.merged_adapters}):
        raise UsageError(f"{', '.join(merged)} are merged into the base: call unmerge_adapter() before composing")
    for name, config in tuner.peft_config.items():
        if config.modules_to_save:
            raise UsageError(f"{name} trained whole modules too, which have no lambda: train without modules_to_save")
