"""What study_composition.py does with models in memory, each piece in a process of its own:

    python composition_work.py WORK.json        {"work": name of a function here, and its arguments}

The answer is one line of JSON on stdout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import baselines

from multisbora import composed
from multisbora.dataset import Example, encode, load_rows
from multisbora.evaluate import log_likelihoods
from multisbora.loading import load_model
from multisbora.recipe import load

Answer = dict[str, Any]
LAMBDAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
COARSE = (1.0, 0.8, 0.6, 0.4)  # tried for all tasks alike, before each goes its own way
TRIALS = 40  # at most


class Live:
    """A model whose tasks can be composed: ours, a peer's, or a checkpoint that is what it is.

    Args:
        kind: "ours", "peer" or "checkpoint".
        base: folder of the base model, or of the checkpoint.
        how: PEFT's way of adding adapters up, for a peer.
    """

    def __init__(self, kind: str, base: str, adapters: Mapping[str, str], how: str = "") -> None:
        self.kind, self.how = kind, how
        folders = {task: Path(folder) for task, folder in adapters.items()}
        if kind == "peer" and folders:
            self.model, self.tokenizer = baselines.load_peers(Path(base), folders)
        else:
            self.model, self.tokenizer = load_model(base, adapters=list(folders.values()))
        self.inner = self.model.get_base_model() if folders else self.model

    def mixed(self, weights: Mapping[str, Any]) -> AbstractContextManager[None]:
        if self.inner is self.model:
            return nullcontext()
        if self.kind == "peer":
            return baselines.combined(self.model, weights, self.how)
        return composed(self.model, weights)

    def nats(self, weights: Mapping[str, Any], examples: Sequence[Example]) -> list[float]:
        """What the answer of each example costs a composition."""
        with self.mixed(weights):
            return [-value for value in log_likelihoods(self.inner, examples)]


def examples(live: Live, recipes: str, task: str, part: str, limit: int | None) -> list[Example]:
    """The first rows of a task's test or dev rows, whole."""
    recipe = load(task, Path(recipes))
    sources = recipe.eval.data if part == "test" else recipe.dev or ()
    return encode(recipe, [row for _, row in load_rows(sources)][:limit], live.tokenizer).examples


def tokens(rows: Sequence[Example]) -> list[int]:
    return [len(example.input_ids) - example.answer_start for example in rows]


def mean(nats: Sequence[float], rows: Sequence[Example]) -> float:
    return sum(nats) / sum(tokens(rows))


# ---------------------------------------------------------------------------------------------------- pieces of work


def loss(
    kind: str,
    base: str,
    adapters: Mapping[str, str],
    weights: Mapping[str, Any],
    how: str,
    recipes: str,
    tasks: list[str],
    limit: int | None = None,
) -> Answer:
    """What the first test rows, or all, cost one composition: {task: {"nats": [...], "tokens": [...]}}."""
    live = Live(kind, base, adapters, how)
    with live.mixed(weights):
        found = {}
        for task in tasks:
            rows = examples(live, recipes, task, "test", limit)
            nats = [round(-value, 5) for value in log_likelihoods(live.inner, rows)]
            found[task] = {"nats": nats, "tokens": tokens(rows)}
    return found


def grid(kind: str, base: str, adapters: Mapping[str, str], how: str, recipes: str, rows: int) -> Answer:
    """One lambda a task by trial on dev rows: the best of a few that all tasks share, then one task at a time to its
    neighbours on the grid while that helps. What is lowered is the mean share of the own gains that is lost, plus the
    largest."""
    live = Live(kind, base, adapters, how)
    dev = {task: examples(live, recipes, task, "dev", rows) for task in adapters}
    bare = {task: mean(live.nats({}, dev[task]), dev[task]) for task in dev}
    own = {task: mean(live.nats({task: 1.0}, dev[task]), dev[task]) for task in dev}
    tried: dict[tuple[float, ...], float] = {}

    def lost(point: tuple[float, ...]) -> float:
        if point not in tried:
            weights = dict(zip(dev, point, strict=True))
            with live.mixed(weights):
                now = {t: mean([-v for v in log_likelihoods(live.inner, dev[t])], dev[t]) for t in dev}
            shares = [(now[t] - own[t]) / max(bare[t] - own[t], 1e-6) for t in dev]
            tried[point] = sum(shares) / len(shares) + max(shares)
        return tried[point]

    best = climb(lost, len(dev), tried)
    weights = dict(zip(dev, best, strict=True))
    return {"weights": weights, "lost": tried[best], "trials": len(tried), "base": bare, "own": own}


def climb(
    lost: Callable[[tuple[float, ...]], float], tasks: int, tried: Mapping[tuple[float, ...], float]
) -> tuple[float, ...]:
    """The point of the grid with the lowest loss among those looked at, TRIALS at most."""
    best = min(((value,) * tasks for value in COARSE), key=lost)
    moved = True
    while moved and len(tried) < TRIALS:
        moved = False
        for place in range(tasks):
            for step in (-1, 1):
                at = LAMBDAS.index(best[place]) + step
                while 0 <= at < len(LAMBDAS) and len(tried) < TRIALS:
                    point = (*best[:place], LAMBDAS[at], *best[place + 1 :])
                    if lost(point) >= lost(best):
                        break
                    best, moved, at = point, True, at + step
    return best


def peer(
    base: str,
    recipes: str,
    task: str,
    overrides: list[str],
    output: str,
    dense: str | None,
    others: list[str],
    **how: Any,
) -> Answer:
    """Train a peer's adapter: see baselines.train_peer."""
    recipe = load(task, Path(recipes), overrides)
    elsewhere = [load(other, Path(recipes)) for other in others]
    given = {"others": elsewhere, "dense": None if dense is None else Path(dense)}
    baselines.train_peer(Path(base), recipe, output=Path(output), **given, **how)
    return trained(output)


def trained(output: str) -> Answer:
    """What a training came to, ours or a peer's."""
    folder = Path(output)
    summary = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    kept = ("steps", "tokens", "loss", "dev_loss", "trainable_parameters")
    return {key: summary[key] for key in kept} | {"batches": baselines.batches_of(folder)}


def unload(base: str, adapters: Mapping[str, str], weights: Mapping[str, float], how: str, output: str) -> Answer:
    """Write a checkpoint with a peer's merge in it, for `multisbora eval`."""
    live = Live("peer", base, adapters, how)
    with live.mixed(weights):
        merged = live.model.merge_and_unload()
    merged.save_pretrained(output)
    live.tokenizer.save_pretrained(output)
    return {}


WORK: dict[str, Callable[..., Answer]] = {
    "loss": loss,
    "grid": grid,
    "peer": peer,
    "trained": trained,
    "unload": unload,
}


def do(told: Mapping[str, Any]) -> Answer:
    return WORK[told["work"]](**{key: value for key, value in told.items() if key != "work"})


if __name__ == "__main__":
    print(json.dumps(do(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
