"""The lambdas of a composition as a space to walk in: down the slopes of the tasks' losses, or by search.

Both walks lower the same objective. With the share of its own gain that each task has lost,

    sum of lost + T * (smooth maximum of lost) + 10 T * sum of what is lost beyond the start and the slack,

for T tasks: the mean, the worst task, and a fence that nobody is pushed over for the sake of the others.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from .blend import Blend, Half
from .errors import UsageError
from .weights import By, TaskWeight, folded, grouped

Array = npt.NDArray[np.float64]
Walk = Iterator[tuple[int, Array]]

MOST_SEED = 2**32 - 1  # that optuna takes
POINTS = 8  # that a walk hands over to be judged
RATE = 0.05  # what a lambda moves in the first step of a descent, about; the last ones hardly move it
HIGHEST = 2.0  # of the lambdas that are looked at, with those of the start
DOWN, UP = -1.0, 0.5  # how far a search looks from the start
SHARPNESS = 0.02  # lost shares as close as this are about equally the worst
FENCE = 0.0025  # lost shares that are as close to what is allowed feel that it ends
HEIGHT = 10.0  # how many times more than a share of all tasks a share beyond it counts
PLACES = 4  # decimals of a lambda: what is judged is what a file of weights holds


@dataclass(frozen=True)
class Space:
    """Which lambdas there are, and what may move together.

    Attributes:
        tasks: their names.
        modules: names of the matrices.
        start: (tasks, places) lambdas to begin with. A place is a matrix, or by channel one of the `width` channels
            (fa columns, fb rows) that a task may own there: those of a matrix follow each other.
        present: (tasks, places) whether a task has the place.
        groups: (places,) number of the group that each is in.
        lowest: of the lambdas that are looked at, those of the start aside.
    """

    tasks: tuple[str, ...]
    modules: tuple[str, ...]
    start: Array
    present: npt.NDArray[np.bool_]
    groups: npt.NDArray[np.int64]
    by: By
    lowest: float = 0.0
    width: int = 1

    @classmethod
    def of(
        cls, modules: Mapping[str, Mapping[str, int]], weights: Mapping[str, TaskWeight], by: By, lowest: float = 0.0
    ) -> Space:
        """
        Args:
            modules: task -> name of each of its matrices -> its rank there.
            weights: task -> lambdas to begin with.

        Raises:
            UsageError: there are more lambdas than a file of weights can hold.
        """
        names = tuple(dict.fromkeys(name for own in modules.values() for name in own))
        ranks = np.array([[own.get(name, 0) for name in names] for own in modules.values()])
        start = np.array([[weights[task].at(name) for name in names] for task in modules])
        if by == "channel":
            width = int(ranks.max())
            present = (np.arange(width) < ranks[..., None]).reshape(len(ranks), -1)
            groups = np.arange(len(names) * width)
            return cls(tuple(modules), names, start.repeat(width, 1), present, groups, by, lowest, width)
        number = {name: place for place, group in enumerate(grouped(names, by).values()) for name in group}
        return cls(tuple(modules), names, start, ranks > 0, np.array([number[name] for name in names]), by, lowest)

    @property
    def owned(self) -> npt.NDArray[np.bool_]:
        """(tasks, groups) whether a task has a matrix of the group."""
        return self.summed(self.present.astype(np.float64)) > 0

    @property
    def size(self) -> int:
        """How many lambdas there are."""
        return int(self.owned.sum())

    def summed(self, values: Array) -> Array:
        """(tasks, places) added up to (tasks, groups)."""
        found: Array = np.zeros((len(values), int(self.groups.max()) + 1))
        np.add.at(found.T, self.groups, values.T)
        return found

    def moved(self, shift: Array) -> Array:
        """Lambdas, (tasks, places), that lie `shift` (tasks, groups) from the start: in bounds, and rounded."""
        low, high = np.minimum(self.start, self.lowest), np.maximum(self.start, HIGHEST)
        inside: Array = np.clip(self.start + shift[:, self.groups], low, high)
        found: Array = inside.round(PLACES)
        return found

    def weights(self, lambdas: Array) -> dict[str, TaskWeight]:
        """Lambdas as weights, by task; not for those by channel, which weights cannot tell."""
        found = {}
        for task, values, own in zip(self.tasks, lambdas.tolist(), self.present, strict=True):
            of_task = {name: value for name, value, here in zip(self.modules, values, own, strict=True) if here}
            found[task] = folded(of_task, self.by)
        return found


def objective(lost: Array, allowed: Array) -> float:
    """What a walk lowers, see above.

    Args:
        lost: (tasks,) shares.
        allowed: (tasks,) those that may be lost.
    """
    worst = SHARPNESS * np.logaddexp.reduce(lost / SHARPNESS)
    over = FENCE * np.logaddexp(0, (lost - allowed) / FENCE).sum()
    return float(lost.sum() + len(lost) * (worst + HEIGHT * over))


def urgency(lost: Array, allowed: Array) -> Array:
    """The derivative of `objective` by each task's lost share, (tasks,)."""
    worst = np.exp(lost / SHARPNESS - np.logaddexp.reduce(lost / SHARPNESS))
    over = np.exp(-np.logaddexp(0, (allowed - lost) / FENCE))
    found: Array = 1 + len(lost) * (worst + HEIGHT * over)
    return found


def descend(space: Space, blend: Blend, halves: Sequence[Half], steps: int, slack: float, regular: float) -> Walk:
    """Walk down the slopes, and hand over points on the way: (step, lambdas).

    A step takes one batch of each task, in turn, of one of the halves, in turn too. What a batch has lost is told
    against the same batch's loss with its task alone, which says more than a mean over others. Where own adapters are
    followed, it is how far the composition is apart from its task alone, which is 0 at best, and never less.

    A task's lambdas move together by their common slope, and apart from each other by what is left of it. How far apart
    is by Adam, whose measure is the matrix's own slope and, to half, the average one of the task: Adam alone would walk
    a matrix that hardly matters as far as any, wherever noise leads it. `regular` pulls them together.
    """
    owned = space.owned
    common, apart = _Adam((len(space.tasks), 1)), _Adam(owned.shape)
    together, offset = np.zeros((len(space.tasks), 1)), np.zeros(owned.shape)
    every = max(1, steps // POINTS)
    for step in tqdm(range(steps), desc="tuning", unit="step", leave=False, disable=None):
        lambdas = space.moved(together + offset)
        lost, allowed, slopes = np.zeros(len(owned)), np.zeros(len(owned)), []
        half = halves[step % len(halves)]
        for task, rows in enumerate(half.batches):
            turn = step // len(halves) % len(rows)
            target = blend.told(rows[turn], task) if half.apart else None
            blend.compose(lambdas)
            nats, slope = blend.slopes(rows[turn], target)
            share = half.scale[task] * rows[turn].tokens
            if target is None:
                least, begun = half.own[task][turn], half.start[task][turn]
            else:
                least, begun = 0.0, half.apart[task][turn]
            lost[task] = (nats - least) / share
            allowed[task] = (begun - least) / share + slack
            slopes.append(slope / share)
        down = space.summed(np.tensordot(urgency(lost, allowed), np.array(slopes), 1))  # (tasks, groups)
        rate = RATE * (1 - step / steps)
        together = together - rate * common.direction(down.sum(1, keepdims=True))
        if owned.shape[1] > 1:
            offset = max(0.0, 1 - rate * regular) * offset - rate * apart.direction(down, owned)
            offset = np.where(owned, offset - _mean(offset, owned), 0)
        if (step + 1) % every == 0 or step + 1 == steps:
            yield step + 1, space.moved(together + offset)


class _Adam:
    """Directions of Adam for some rows of slopes: about 1 for a slope that stays as it is, less for one that turns."""

    def __init__(self, shape: tuple[int, ...], fast: float = 0.9, slow: float = 0.95) -> None:
        self.mean, self.square = np.zeros(shape), np.zeros(shape)
        self.fast, self.slow, self.steps = fast, slow, 0

    def direction(self, slopes: Array, owned: npt.NDArray[np.bool_] | None = None) -> Array:
        """
        Args:
            slopes: (rows, n).
            owned: measure each slope against the root mean square of these of its row too.
        """
        self.steps += 1
        self.mean += (1 - self.fast) * (slopes - self.mean)
        self.square += (1 - self.slow) * (slopes**2 - self.square)
        mean, square = self.mean / (1 - self.fast**self.steps), self.square / (1 - self.slow**self.steps)
        size = np.sqrt(square)
        if owned is not None:
            size = (size + np.sqrt(_mean(square, owned))) / 2
        return mean / np.maximum(size, 1e-30)


def _mean(values: Array, owned: npt.NDArray[np.bool_]) -> Array:
    """The mean of each row over what is owned, (rows, 1)."""
    found: Array = np.where(owned, values, 0).sum(1, keepdims=True) / owned.sum(1, keepdims=True)
    return found


def search(space: Space, blend: Blend, half: Half, trials: int, slack: float, seed: int) -> Walk:
    """Try lambdas, the start first, as optuna's Gaussian process proposes them, and hand the best over, but for the
    start: (trial, lambdas). A trial is a forward over the whole half.

    Raises:
        UsageError: optuna is missing.
    """
    require_optuna()
    import optuna

    places = [(int(task), int(group)) for task, group in np.argwhere(space.owned)]
    allowed = half.lost(half.start) + slack

    def lambdas_of(values: Mapping[str, float]) -> Array:
        shift = np.zeros(space.owned.shape)
        for number, place in enumerate(places):
            shift[place] = values[str(number)]
        return space.moved(shift)

    def trial_of(trial: optuna.Trial) -> float:
        blend.compose(
            lambdas_of({str(number): trial.suggest_float(str(number), DOWN, UP) for number in range(len(places))})
        )
        lost = half.lost([blend.nats(rows) for rows in half.batches])
        if not np.isfinite(lost).all():
            raise optuna.TrialPruned
        return objective(lost, allowed)

    said = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(sampler=optuna.samplers.GPSampler(seed=seed))
        study.enqueue_trial({str(number): 0.0 for number in range(len(places))})
        for _ in tqdm(range(trials), desc="searching", unit="trial", leave=False, disable=None):
            study.optimize(trial_of, n_trials=1)
    finally:
        optuna.logging.set_verbosity(said)
    done = [trial for trial in study.trials if trial.value is not None and trial.number]
    for trial in sorted(done, key=lambda trial: trial.value or 0.0)[:POINTS]:
        yield trial.number, lambdas_of(trial.params)


def require_optuna() -> None:
    """
    Raises:
        UsageError: it is missing, or what its Gaussian process needs.
    """
    if missing := [name for name in ("optuna", "scipy") if importlib.util.find_spec(name) is None]:
        raise UsageError(f'method search needs {missing[0]}: pip install "multisbora[search]", or use method gradient')
