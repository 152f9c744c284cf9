"""What the runs of study_composition.py come to, as tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from composition_plan import (
    BEFORE,
    CORRECTED,
    FA,
    FAMILIES,
    GRID,
    HEADLINES,
    ONE,
    PAIR,
    SECTIONS,
    Arm,
    Cell,
    Plan,
)
from composition_runs import Run
from composition_tasks import MERGES
from figures import Budget, Result

TARGETS = {2: 0.99, 8: 0.97}  # of the worst task's retention
DRAWS = 1000
LEAST_GAIN = 1e-3  # nats a token; what is kept of a smaller gain is noise
PEFT = {"cat": "sum", "linear": "linear", "svd": "svd", "ties": "TIES", "dare_ties": "DARE-TIES"}
PEFT |= {"magnitude_prune": "magnitude prune", "ties_svd": "TIES on the product, svd"}


class Tables:
    """Tables of all that is there.

    Args:
        setting: one line, what was run with what.
        judged: whether the targets are.
    """

    def __init__(self, plan: Plan, setting: str, *, judged: bool) -> None:
        self.plan, self.store, self.setting, self.judged = plan, plan.store, setting, judged

    def all(self) -> list[Result]:
        found: list[Result | None] = []
        for size in MERGES:
            found += self._merges(size)
            if size == 2 and len(self.plan.setup.seeds) > 1:
                found += self._merges(size, again=True)
        found += [*self._crosstalk(), self._scores(), self._rates()]
        return [table for table in found if table is not None]

    def strangers(self) -> list[str]:
        """Trainings that saw other batches than the first of the same task and seed; there are none, if all is well."""
        first: dict[tuple[str, int], str] = {}
        odd = []
        for run in self._trainings():
            batches = self.store.result(run)["batches"]
            if first.setdefault((run.spec["task"], run.spec["seed"]), batches) != batches:
                odd.append(run.key)
        return odd

    def _trainings(self) -> Iterator[Run]:
        seen: set[str] = set()
        for kind in FAMILIES:
            seen |= {run.key for run in self._there(self.plan.rate_runs(kind))}
            yield from self._there(self.plan.rate_runs(kind))
        for section in SECTIONS:
            for cell in self.plan.cells(section):
                if self.plan.rate(cell.arm.kind) is not None:
                    runs = [run for run in self._there(self.plan.trainings(cell)) if run.key not in seen]
                    seen |= {run.key for run in runs}
                    yield from runs

    def _there(self, runs: Sequence[Run]) -> list[Run]:
        return [run for run in runs if self.store.has(run)]

    # --------------------------------------------------------------------------------------------------------- merges

    def _merges(self, size: int, *, again: bool = False) -> Iterator[Result]:
        """What was kept, and the losses, of one seed; `again`: of all seeds, what is asked of all of them."""
        tasks, seeds = MERGES[size], self.plan.setup.seeds[: None if again else 1]
        kept, losses, bars, budgets = [], [], {}, []
        shown: set[str] = set()
        base = [self._bare(task) for task in tasks]
        limit = None if size == 2 else self.plan.setup.shown  # rows that merges are looked at on
        if None not in base:
            losses.append(["base", "", "", *(f"{_nll(found, limit):.3f}" for found in base if found)])
        ways: dict[Arm, dict[str, None]] = {}  # in tables, what belongs to an arm stands together
        for arm, hows in self.plan.again if again else self.plan.waves_of(tasks):
            ways.setdefault(arm, {}).update(dict.fromkeys(hows))
        for arm, how_each in ways.items():
            for how in how_each:
                cells = [cell for cell in (Cell(tasks, seed, arm, how) for seed in seeds) if self._whole(cell)]
                if not cells:
                    continue
                if arm.name not in shown and not arm.together:
                    shown.add(arm.name)
                    own = [[_nll(self._own(cell, task), limit) for task in tasks] for cell in cells]
                    losses.append([arm.name, "own adapters", str(len(cells)), *_means(own)])
                merged = [[_nll(self._mixed(cell, task)) for task in tasks] for cell in cells]
                losses.append([arm.name, _named(arm, how), str(len(cells)), *_means(merged)])
                shares = [[self._retention(cell, task) for task in tasks] for cell in cells]
                worst = self._worst(cells, shares)
                mean = statistics.mean(value for row in shares for value in row)
                kept.append(
                    [
                        *(arm.name, _named(arm, how), str(len(cells)), f"{self._values(cells[0]) / 1e6:.2f}"),
                        *(f"{value:.1%}" for value in map(statistics.mean, zip(*shares, strict=True))),
                        *(f"{mean:.1%}", f"{worst[0]:.1%} ({worst[1]:.1%} to {worst[2]:.1%})"),
                        *(f"{seconds / 60:.1f}" for seconds in self._times(cells)),
                    ]
                )
                bars[f"{arm.name}: {_named(arm, how)}"] = worst
                if self.judged and (arm, how) == HEADLINES.get(size):
                    what = f"worst task's retention, {arm.name}, {how}, merge of {size}, {len(cells)} seed(s)"
                    budgets.append(Budget(what, TARGETS[size], worst[0], at_most=False))
        if not kept:
            return
        spread = "mean over seeds, and the lowest to the highest of them"
        spread = f"worst: {spread}; of one seed, a 95% interval over rows drawn anew"
        columns = ["adapters", "composed", "seeds", "M values", *tasks, "mean", "worst", "train min", "else min"]
        name = "seeds" if again else str(size)
        of = f"merge of {size}" + (f", seeds {', '.join(map(str, seeds))}" if again else "")
        setting = f"{self.setting}. Retention on unseen rows; {spread}"
        title = f"what the worst task keeps of its gain, {of}"
        yield Result(f"composition-{name}", title, setting, columns, kept, bars, budgets)
        setting = f"{self.setting}. Nats per answer token on the same rows"
        yield Result(
            f"composition-{name}-nll",
            f"NLL, {of}",
            setting,
            ["adapters", "composed", "seeds", *tasks],
            losses,
        )

    def _whole(self, cell: Cell) -> bool:
        """Whether everything of a cell is there."""
        if self.plan.rate(cell.arm.kind) is None or (cell.arm.together and self.plan.rate(FA.kind) is None):
            return False
        runs = [self.plan.mix(cell), *(self.plan.bare(task) for task in cell.tasks)]
        runs += [self.plan.own(run) for run in self.plan.trainings(_alone(cell))]
        return all(map(self.store.has, runs))

    def _bare(self, task: str) -> Mapping[str, Any] | None:
        run = self.plan.bare(task)
        return self.store.result(run)[task] if self.store.has(run) else None

    def _own(self, cell: Cell, task: str) -> Mapping[str, Any]:
        (run,) = (run for run in self.plan.trainings(_alone(cell)) if run.spec["task"] == task)
        found: Mapping[str, Any] = self.store.result(self.plan.own(run))[task]
        return found

    def _mixed(self, cell: Cell, task: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.store.result(self.plan.mix(cell))[task]
        return found

    def _retention(self, cell: Cell, task: str) -> float:
        bare = self._bare(task)
        assert bare is not None  # `_whole` looked
        merged = self._mixed(cell, task)
        rows = len(merged["nats"])
        base, own = _nll(bare, rows), _nll(self._own(cell, task), rows)
        merged = _nll(merged)
        return (base - merged) / (base - own) if base - own > LEAST_GAIN else math.nan

    def _worst(self, cells: Sequence[Cell], shares: Sequence[Sequence[float]]) -> tuple[float, float, float]:
        """The worst task's retention: mean, lower, upper."""
        each = [min(filter(math.isfinite, row), default=math.nan) for row in shares]
        if len(each) > 1:
            return statistics.mean(each), min(each), max(each)
        draws = np.fmin.reduce([self._redrawn(cells[0], task) for task in cells[0].tasks])
        low, high = np.nanquantile(draws, (0.025, 0.975)) if np.isfinite(draws).any() else (math.nan, math.nan)
        return each[0], float(low), float(high)

    def _redrawn(self, cell: Cell, task: str) -> Any:
        """(DRAWS,) retention on rows drawn anew, the same ones for base, own and merged."""
        found = (self._bare(task), self._own(cell, task), self._mixed(cell, task))
        count = len(found[2]["nats"])
        base, own, merged = (np.array(one["nats"][:count]) for one in found if one is not None)
        rows = np.random.default_rng(0).integers(len(base), size=(DRAWS, len(base)))
        gain = (base - own)[rows].sum(1)
        return np.where(gain > 0, (base - merged)[rows].sum(1) / np.where(gain > 0, gain, 1), np.nan)

    def _values(self, cell: Cell) -> int:
        """Values that are trained for one task, or for all where they are trained together."""
        found: int = self.store.result(self.plan.trainings(cell)[0])["trainable_parameters"]
        return found

    def _times(self, cells: Sequence[Cell]) -> tuple[float, float]:
        """Seconds of training all adapters, and of all that comes before and after it; means over seeds."""
        trained, beside = [], []
        for cell in cells:
            runs = self.plan.trainings(cell)
            before = {need.key: need for run in runs for need in run.needs}  # of LoRI-S the first training
            again = [need for need in before.values() if need.kind == "train"]
            trained.append(sum(self._seconds(run) for run in (*runs, *again)))
            others = {need.key: need for need in before.values() if need.kind == "moments"}
            if cell.arm.strategy == "isolated":
                others |= {need.key: need for run in runs for need in _claims(run)}
            if cell.how.startswith(CORRECTED):
                others |= {need.key: need for need in self.plan.throughs(cell)}
            chosen = self.plan.lambdas(cell)
            beside.append(sum(map(self._seconds, others.values())) + (self._seconds(chosen) if chosen else 0))
        return statistics.mean(trained), statistics.mean(beside)

    def _seconds(self, run: Run) -> float:
        return float(self.store.read(run)["seconds"])

    # -------------------------------------------------------------------------------------- crosstalk, scores and rates

    def _crosstalk(self) -> Iterator[Result]:
        """Who is heard on whose rows, and where: a table of each for every size of merge."""
        for size, tasks in MERGES.items():
            heard, where, kinds, rows = [], [], [], 0
            for cell in self.plan.heard_in():
                runs = self._there(list(self.plan.crosstalk(cell))) if len(cell.tasks) == size else []
                for run in (run for run in runs if run.kind == "crosstalk"):
                    found = self.store.result(run)
                    kinds, rows = list(found["kinds"]), run.spec["rows"]
                    for on in tasks:
                        name = [cell.arm.name, _named(cell.arm, cell.how), on]
                        heard.append([*name, *_heard(found, on, tuned=cell.how in BEFORE)])
                        where.append([*name, *_where(found, on)])
            if not heard:
                continue
            setting = f"{self.setting}. `multisbora crosstalk` on {rows} dev rows a task, at lambda 1"
            if any(cell.how in BEFORE for cell in self.plan.heard_in() if len(cell.tasks) == size):
                setting += (
                    "; by channel, lambdas are in the values, and a task's own update is these, not what it trained"
                )
            of = "harm of each task's update on the rows of one, as a share of that of its own"
            title = f"who is heard, merge of {size}"
            columns = ["adapters", "composed", "on rows of", *tasks, "kept", "what leaving one out gains most, nats"]
            yield Result(f"composition-crosstalk-{size}", title, f"{setting}: {of}", columns, heard)
            of = "harm of all others' updates in the matrices of a kind, as a share of that of the own one in the model"
            columns = ["adapters", "composed", "on rows of", *kinds, "worst matrix"]
            yield Result(f"composition-crosstalk-{size}-where", f"{title}, where", f"{setting}: {of}", columns, where)

    def _scores(self) -> Result | None:
        rows, asked = [], 0
        for line, cell in self.plan.scored().items():
            runs = [self.plan.score(line, task) for task in PAIR]
            if all(run is not None and self.store.has(run) for run in runs):
                found = [self.store.result(run) for run in runs if run is not None]
                merged = cell is not None and not line.endswith(": own")
                name = f"{cell.arm.name}: {_named(cell.arm, cell.how)}" if cell and merged else line
                rows.append([name, *(_scored(one) for one in found)])
                asked = max(asked, *(one["n"] for one in found))
        if not rows:
            return None
        columns = ["model", *(f"{task}: score (95%)" for task in PAIR)]
        setting = f"{self.setting}. Greedy answers to {asked} test rows a task, Wilson's interval"
        return Result("composition-scores", "scores", setting, columns, rows)

    def _rates(self) -> Result | None:
        rates = {kind: self.plan.rate_losses(kind) for kind in FAMILIES if self._rated(kind)}
        tried = sorted({rate for losses in rates.values() for rate in losses})
        if not rates:
            return None
        rows = []
        for kind, losses in rates.items():
            cells = [f"{losses[rate]:+.1%}" if rate in losses else "" for rate in tried]
            rows.append([FAMILIES[kind].name, *cells, f"{self.plan.rate(kind):g}"])
        setting = f"{self.setting}. Dev loss of the merge of 2's tasks, above the lowest of each, one seed"
        columns = ["adapters", *(f"{rate:g}" for rate in tried), "taken"]
        return Result("composition-rates", "learning rates", setting, columns, rows)

    def _rated(self, kind: str) -> bool:
        return len(self.plan.setup.rates) > 1 and self.plan.rate(kind) is not None


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share of `count` answers."""
    z = 1.959964
    middle, spread = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    return (middle - spread) / (1 + z * z / count), (middle + spread) / (1 + z * z / count)


def _scored(found: Mapping[str, Any]) -> str:
    low, high = wilson(found["score"], found["n"])
    return f"{found['score']:.1%} ({low:.1%} to {high:.1%})"


def _nll(found: Mapping[str, Any], rows: int | None = None) -> float:
    """Nats per answer token, of the first rows or of all."""
    return sum(found["nats"][:rows]) / sum(found["tokens"][:rows])


def _heard(found: Mapping[str, Any], on: str, tuned: bool) -> list[str]:
    """What the updates do on one task's rows, all matrices together, and what it costs.

    Of values that have lambdas in them nothing is "kept": one task's alone are not the adapter that it trained.
    """
    loss, updates = found["losses"][on], found["total"][on]
    shares = ["" if of == on else _percent(figures["harm_share"]) for of, figures in updates.items()]
    gains = {of: -change["change"] for of, change in loss["without"].items() if of != on}
    most = max(gains, key=lambda of: gains[of])
    error = loss["without"][most]["error"]
    gain = f"{gains[most]:.3f}" + ("" if error is None else f" ± {error:.3f}")
    kept = "" if tuned else _percent(loss["retention"])
    return [*shares, kept, f"{gain} ({most})" if gains[most] > 0 else ""]


def _where(found: Mapping[str, Any], on: str) -> list[str]:
    """In what kinds of matrices others are heard on one task's rows, and the matrix in which that harms it most."""
    own = found["total"][on][on]["harm"]
    shares = [_percent(harm[on] / own if own else None) for harm in found["kinds"].values()]
    worst = next((culprit for culprit in found["worst"] if culprit["on"] == on), None)
    module = "" if worst is None else worst["module"].removeprefix("model.")
    return [*shares, "" if worst is None else f"{module}, of {worst['of']}: {_percent(worst['share'])} of all harm"]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _means(rows: Sequence[Sequence[float]]) -> list[str]:
    return [f"{statistics.mean(column):.3f}" for column in zip(*rows, strict=True)]


def _alone(cell: Cell) -> Cell:
    """The cell that has a task's own adapters: for those that were trained together, fa's."""
    return Cell(cell.tasks, cell.seed, FA, ONE) if cell.arm.together else cell


def _claims(training: Run) -> Iterator[Run]:
    for need in training.needs:
        if need.kind == "claims":
            yield need
        yield from _claims(need)


def _named(arm: Arm, how: str) -> str:
    """What a composition is called in a table."""
    if arm.together:
        return "one adapter"
    if arm.ours:
        return "a lambda a task by grid" if how == GRID else how
    way, _, chosen = how.partition(" ")
    return f"{PEFT[way]}, {'a lambda a task by grid' if chosen else ONE}"
