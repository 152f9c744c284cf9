"""What study_composition.py compares, as runs in the order in which they tell most."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from composition_runs import Run, Store
from composition_tasks import EIGHT, MERGES, PAIR, Sizes, joint

from multisbora.penalty import STRENGTH

SECTIONS = {"pair": 2, "seeds": 2, "eight": 8, "four": 4}  # merges of so many
BESIDE = ("scores", "crosstalk")  # what else is looked at


@dataclass(frozen=True)
class Arm:
    """A way to train adapters.

    Attributes:
        name: in tables.
        kind: "fa", "fb" or one of baselines.PEERS.
        strategy: how ours get indices: "random", "isolated", or "alone", in a registry of each task's own, where all
            tasks get the same.
        isolate: whether ours are trained with the penalty.
        together: one adapter for all tasks.
    """

    name: str
    kind: str
    strategy: str = "random"
    isolate: bool = False
    together: bool = False

    @property
    def ours(self) -> bool:
        return self.kind in ("fa", "fb")


FA, FB = Arm("fa, random", "fa"), Arm("fb, random", "fb")
FA_ISOLATED, FB_ISOLATED = Arm("fa, isolated", "fa", "isolated"), Arm("fb, isolated", "fb", "isolated")
FA_QUIET, FB_QUIET = (Arm(f"{kind}, random, --isolate", kind, "random", True) for kind in ("fa", "fb"))
FA_BOTH, FB_BOTH = (Arm(f"{kind}, isolated, --isolate", kind, "isolated", True) for kind in ("fa", "fb"))
OVERLAP = Arm("fa, same indices for all", "fa", "alone")
JOINT = Arm("fa, trained jointly", "fa", "alone", together=True)
LORA, OSRM = Arm("LoRA", "lora"), Arm("OSRM", "osrm")
LORI, LORI_DENSE = Arm("LoRI-S", "lori"), Arm("LoRI-D", "lori-dense")
FAMILIES = {arm.kind: arm for arm in (FA, FB, LORA, LORI_DENSE)}  # that learning rates are chosen for
RATED_AS = {"osrm": "lora", "lori": "lori-dense"}  # another start, and fewer entries, of the same adapter

# Ways to compose: of ours by lambdas and solves, of peers by PEFT's names; "grid": one lambda a task by trial.
ONE, BY_TASK, BY_MATRIX, GRID = "lambda 1", "tuned by task", "tuned by matrix", "grid"
CORRECTED, CORRECTED_TUNED = "corrected", "corrected, tuned by matrix"
BY_CHANNEL, CORRECTED_CHANNEL = "tuned by channel", "corrected, tuned by channel"
TUNINGS = {BY_TASK: "task", BY_MATRIX: "matrix", CORRECTED_TUNED: "matrix"}
# With as many rows and steps as two tasks have, however many there are; and the same, after own adapters or both.
MORE_CHANNEL = f"{CORRECTED_CHANNEL}, more rows"
FOLLOWS = {f"{CORRECTED_CHANNEL}, follow {what}": what for what in ("own", "both")}
OWN_CHANNEL, BOTH_CHANNEL = FOLLOWS
CHANNELS = dict.fromkeys((CORRECTED_CHANNEL, MORE_CHANNEL, *FOLLOWS), CORRECTED_TUNED)
BEFORE = {BY_CHANNEL: BY_MATRIX} | CHANNELS  # lambdas by matrix, where those by channel start
# One lambda for all that needs no rows, by how many tasks there are.
ROOT, MEAN = "lambda 1/sqrt(tasks)", "lambda 1/tasks"
EVEN: Mapping[str, Callable[[int], float]] = {ONE: lambda n: 1.0, ROOT: lambda n: n**-0.5, MEAN: lambda n: 1 / n}
FIRST = (ONE, BY_TASK, BY_MATRIX)
SOLVED = (CORRECTED, CORRECTED_TUNED)
SUMS = ("cat", f"cat {GRID}")
OTHERS = ("linear", "svd", "ties", "dare_ties", "magnitude_prune")
GRID_OF = {"svd": "cat"}  # it cuts off what is left of that sum: lambdas are chosen for the sum

Wave = tuple[Arm, tuple[str, ...]]
WAVES: tuple[Wave, ...] = (
    (FA_BOTH, (ONE, BY_MATRIX)),
    (FA, (ONE, CORRECTED)),
    (LORA, (*SUMS, *OTHERS)),
    (FA_BOTH, (CORRECTED,)),
    (FA_ISOLATED, (ONE,)),
    (FA_QUIET, (ONE,)),
    (FB_BOTH, (ONE, CORRECTED)),
    (FB, (ONE, CORRECTED)),
    (OSRM, SUMS[:1]),
    (LORI, SUMS[:1]),
    (JOINT, (ONE,)),
    (OVERLAP, (ONE,)),
    (FA, FIRST[1:]),
    (FA_BOTH, (BY_TASK, CORRECTED_TUNED, ROOT, MEAN)),
    (FA, (CORRECTED_TUNED, ROOT, MEAN)),
    (FA_ISOLATED, FIRST[1:]),
    (FA_QUIET, FIRST[1:]),
    (OVERLAP, (GRID,)),
    (FB, FIRST[1:]),
    (FB_BOTH, FIRST[1:]),
    (OSRM, SUMS[1:]),
    (LORI, SUMS[1:]),
    (LORA, tuple(f"{how} {GRID}" for how in OTHERS)),
    *((arm, SOLVED) for arm in (FA_ISOLATED, FA_QUIET, FB, FB_BOTH)),
    *((arm, FIRST + SOLVED) for arm in (FB_ISOLATED, FB_QUIET)),
    (LORI_DENSE, SUMS),
    (LORA, ("ties_svd",)),
    (FA, (GRID,)),
)
# What is asked again with other seeds, and of merges of 4 and 8: what tells most, since all of it would take days.
AGAIN: tuple[Wave, ...] = (
    (FA_BOTH, (ONE, BY_MATRIX)),
    (FA, (ONE, CORRECTED)),
    (LORA, (*SUMS, *OTHERS)),
    (FA_ISOLATED, (ONE,)),
    (FA_QUIET, (ONE,)),
    (FA, (BY_MATRIX,)),
)
MANY: tuple[Wave, ...] = (
    (FA_BOTH, (ONE, *SOLVED, CORRECTED_CHANNEL, MORE_CHANNEL, MEAN)),
    (JOINT, (ONE,)),
    (LORA, (SUMS[0], *OTHERS)),
    (FA, (ONE, CORRECTED, MEAN)),
    (FA_QUIET, (ONE, *SOLVED, MORE_CHANNEL)),
    (FA_BOTH, (BY_MATRIX, OWN_CHANNEL, BOTH_CHANNEL, BY_CHANNEL)),
    (LORA, SUMS[1:]),
    (OVERLAP, (ONE, GRID)),
    (FA_BOTH, (BY_TASK, ROOT)),
    (FA, (BY_TASK, BY_MATRIX, ROOT)),
    (FA_ISOLATED, (ONE, CORRECTED)),
    (OSRM, SUMS),
    (LORI, SUMS),
    (FB, (ONE, BY_TASK)),
    (FB_BOTH, (ONE, BY_TASK)),
)
# Of which merges crosstalk is measured: at lambda 1, and what tuning by channel left.
Heard = tuple[int, Arm, str]
HEARD: tuple[Heard, ...] = (
    (2, FA, ONE),
    (2, FA_BOTH, ONE),
    (8, FA, ONE),
    (8, FA_BOTH, ONE),
    (8, FA_BOTH, MORE_CHANNEL),
)
HEADLINES = {2: (FA_BOTH, BY_MATRIX), 8: (FA_BOTH, MORE_CHANNEL)}  # what the targets are set for
# Of --quick: every way to train and to compose at least once, and two of them for merges of 4 and 8.
FEW: tuple[Wave, ...] = (
    (FA, (ONE, BY_TASK, GRID)),
    (LORA, (*SUMS, "svd", f"svd {GRID}", "ties")),
    (FA_BOTH, (BY_MATRIX, *SOLVED, BY_CHANNEL, CORRECTED_CHANNEL, OWN_CHANNEL)),
    (JOINT, (ONE,)),
    (OVERLAP, (GRID,)),
    (FB_BOTH, (ONE, CORRECTED)),
    (OSRM, ("cat",)),
    (LORI, ("cat",)),
)
FEWEST: tuple[Wave, ...] = ((FA, (BY_TASK,)), (LORA, ("cat",)))
FEW_HEARD: tuple[Heard, ...] = ((2, FA, ONE), (2, FA_BOTH, CORRECTED_CHANNEL))


@dataclass(frozen=True)
class Setup:
    """What all runs of a study have in common.

    Attributes:
        base: folder of the base model; fingerprint: of its weights.
        ranks: kind -> rank, for merges of 2; many: the same for those of 4 and 8, where no more fb rows are free.
        rates: learning rates to try. One alone is taken as it is.
        isolate: strength of the penalty.
        looked: dev rows a task for moments and for OSRM's start; tuned: for `multisbora tune`; tried: for a grid. Of
            more than 2 tasks there are fewer rows of each, and half the steps of `tune`.
        shown: test rows a task for merges of 4 and 8.
        scored: test rows a task that answers are generated for.
    """

    base: str
    fingerprint: str
    targets: tuple[str, ...]
    ranks: Mapping[str, int]
    many: Mapping[str, int]
    rates: tuple[float, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    isolate: float = STRENGTH
    looked: int = 128
    tuned: int = 128
    tune_steps: int = 32
    tried: int = 64
    shown: int = 75
    scored: int = 200
    sizes: Sizes = field(default_factory=Sizes)

    def rank(self, arm: Arm, group: Sequence[str]) -> int:
        return (self.ranks if set(group) <= {*PAIR, joint(PAIR)} else self.many)[arm.kind]


@dataclass(frozen=True)
class Cell:
    """One line of a table at one seed."""

    tasks: tuple[str, ...]
    seed: int
    arm: Arm
    how: str


@dataclass
class Plan:
    """Runs of a study. What comes next hangs on what was found: learning rates are chosen first.

    Attributes:
        waves: what is compared, in order, in merges of 2 at the first seed; again: at the others; many: in merges of 4
            and 8.
        heard: merges of which crosstalk is measured, at the first seed.
    """

    setup: Setup
    store: Store
    waves: Sequence[Wave] = WAVES
    again: Sequence[Wave] = AGAIN
    many: Sequence[Wave] = MANY
    heard: Sequence[Heard] = HEARD
    _rates: dict[str, float] = field(default_factory=dict)

    def runs(self, sections: Sequence[str]) -> Iterator[Run]:
        for section in sections:
            if section == "scores":
                yield from self.scores()
            elif section == "crosstalk":
                yield from (run for cell in self.heard_in() for run in self.crosstalk(cell))
            else:
                yield from (run for cell in self.cells(section) for run in self.of(cell))

    def cells(self, section: str) -> Iterator[Cell]:
        seeds = self.setup.seeds[1:] if section == "seeds" else self.setup.seeds[:1]
        tasks = MERGES[SECTIONS[section]]
        for arm, hows in self.again if section == "seeds" else self.waves_of(tasks):
            yield from (Cell(tasks, seed, arm, how) for seed in seeds for how in hows)

    def waves_of(self, tasks: Sequence[str]) -> Sequence[Wave]:
        return self.waves if len(tasks) == 2 else self.many

    def of(self, cell: Cell) -> Iterator[Run]:
        """The runs of a cell; those that its learning rate hangs on, as long as that is not known."""
        if self.rate(cell.arm.kind) is None:
            yield from self.rate_runs(cell.arm.kind)
            return
        yield from (self.bare(task) for task in cell.tasks)
        yield from (self.own(run) for run in self.trainings(cell) if not cell.arm.together)
        yield self.mix(cell)

    # ------------------------------------------------------------------------------------------------- learning rates

    def rate(self, kind: str) -> float | None:
        """The learning rate of a kind of adapter: of those tried, the best for the dev rows of the pair at one seed.

        A task counts by how much higher its dev loss is than at its own best rate. None as long as runs are missing.
        """
        kind = RATED_AS.get(kind, kind)
        if kind not in self._rates:
            if len(self.setup.rates) == 1:
                self._rates[kind] = self.setup.rates[0]
            elif all(self.store.has(run) for run in self.rate_runs(kind)):
                losses = self.rate_losses(kind)
                self._rates[kind] = min(losses, key=lambda rate: losses[rate])
        return self._rates.get(kind)

    def rate_runs(self, kind: str) -> list[Run]:
        """The trainings that a learning rate is chosen by. Where the best one is the lowest or the highest of those
        tried, one more beyond it, twice at most."""
        kind = RATED_AS.get(kind, kind)
        tried = sorted(self.setup.rates)
        for extended in range(3):
            runs = self._tried(kind, tried)
            if extended == 2 or len(tried) < 2 or not all(self.store.has(run) for of in runs.values() for run in of):
                break
            losses = self._losses(runs)
            best = min(losses, key=lambda rate: losses[rate])
            if best not in (tried[0], tried[-1]):
                break
            tried = sorted([*tried, best / 2 if best == tried[0] else best * 2])
        return [run for of in runs.values() for run in of]

    def rate_losses(self, kind: str) -> dict[float, float]:
        """{rate: how much higher the dev loss is than at the best rate of each task, as a mean}."""
        runs = self.rate_runs(kind)
        return self._losses(self._tried(RATED_AS.get(kind, kind), sorted({run.spec["rate"] for run in runs})))

    def _tried(self, kind: str, rates: Sequence[float]) -> dict[float, list[Run]]:
        arm, seed = FAMILIES[kind], self.setup.seeds[0]
        return {rate: [self.training(arm, task, PAIR, seed, rate) for task in PAIR] for rate in rates}

    def _losses(self, runs: Mapping[float, Sequence[Run]]) -> dict[float, float]:
        losses = {rate: [self.store.result(run)["dev_loss"] for run in of] for rate, of in runs.items()}
        best = [min(values) for values in zip(*losses.values(), strict=True)]
        return {
            rate: sum(value / least - 1 for value, least in zip(values, best, strict=True)) / len(best)
            for rate, values in losses.items()
        }

    # ------------------------------------------------------------------------------------------------- single runs

    def claims(self, arm: Arm, group: Sequence[str], seed: int) -> Run:
        """Regions for tasks that are to meet."""
        spec: dict[str, Any] = {"variant": arm.kind, "rank": self.setup.rank(arm, group), "strategy": arm.strategy}
        spec |= {"tasks": list(group), "seed": seed, "base": self.setup.fingerprint}
        spec["targets"] = list(self.setup.targets)
        if arm.strategy == "isolated":
            spec |= {"rows": self.looked(group), "sizes": asdict(self.setup.sizes)}
        return Run("claims", f"{arm.kind} {arm.strategy} {'+'.join(group)[:24]} s{seed}", spec)

    def looked(self, group: Sequence[str]) -> int:
        """Dev rows of each task of a group that moments are of."""
        return self.setup.looked if len(group) <= 2 else max(1, self.setup.looked // 2)

    def moments(self, arm: Arm, group: Sequence[str], seed: int) -> Run:
        spec = {"tasks": list(group), "rows": self.looked(group), "sizes": asdict(self.setup.sizes)}
        claims = self.claims(arm, group, seed)
        return Run("moments", claims.name, spec, (claims,))

    def through(self, training: Run, group: Sequence[str]) -> Run:
        """Moments of a task's rows through its adapter, which a corrected merge goes by."""
        spec = {"rows": self.looked(group), "sizes": asdict(self.setup.sizes)}
        return Run("through", training.name, spec, (training,))

    def training(self, arm: Arm, task: str, group: Sequence[str], seed: int, rate: float) -> Run:
        spec: dict[str, Any] = {"task": task, "seed": seed, "rate": rate, "sizes": asdict(self.setup.sizes)}
        needs: tuple[Run, ...] = ()
        if arm.ours:
            group = (task,) if arm.strategy == "alone" else group
            measured = self.moments if arm.isolate else self.claims
            spec["isolate"] = self.setup.isolate if arm.isolate else 0.0
            needs = (measured(arm, group, seed),)
        else:
            spec |= {"peer": arm.kind, "rank": self.setup.rank(arm, group), "base": self.setup.fingerprint}
            spec["targets"] = list(self.setup.targets)
        if arm.kind == "osrm":
            spec |= {"others": [other for other in group if other != task], "rows": self.setup.looked}
        if arm.kind == "lori":
            dense = self.rate("lori-dense")
            if dense is None:
                raise KeyError("no learning rate for lori-dense yet")
            needs = (self.training(LORI_DENSE, task, group, seed, dense),)
        return Run("train", f"{arm.name} {task} s{seed} {rate:g}", spec, needs)

    def trainings(self, cell: Cell) -> tuple[Run, ...]:
        """One of each task, or of all of them together."""
        rate = self.rate(cell.arm.kind)
        if rate is None:
            raise KeyError(f"no learning rate for {cell.arm.kind} yet")
        group = EIGHT if len(cell.tasks) > 2 else PAIR
        if cell.arm.together:
            return (self.training(cell.arm, joint(cell.tasks), (joint(cell.tasks),), cell.seed, rate),)
        return tuple(self.training(cell.arm, task, group, cell.seed, rate) for task in cell.tasks)

    def bare(self, task: str) -> Run:
        """The base on a task's test rows."""
        spec = {"tasks": [task], "base": self.setup.fingerprint, "sizes": asdict(self.setup.sizes)}
        return Run("base", task, spec)

    def own(self, training: Run) -> Run:
        """A task's own adapter, alone, on its test rows."""
        task = training.spec["task"]
        return Run("own", training.name, {"tasks": [task]}, (training,))

    def throughs(self, cell: Cell) -> tuple[Run, ...]:
        """The moments that a corrected merge of a cell goes by."""
        group = EIGHT if len(cell.tasks) > 2 else PAIR
        return tuple(self.through(run, group) for run in self.trainings(cell))

    def lambdas(self, cell: Cell) -> Run | None:
        """What chooses the lambdas of a cell."""
        runs, tasks = self.trainings(cell), list(cell.tasks)
        name = f"{cell.arm.name} {len(tasks)}t s{cell.seed}"
        rows, steps = self.setup.tuned, self.setup.tune_steps
        if len(tasks) > 2:
            rows, steps = max(2 * rows // len(tasks), min(rows, 32)), max(1, steps // 2)
        if cell.how in BEFORE:
            before = self.lambdas(replace(cell, how=BEFORE[cell.how]))
            assert before is not None
            # Many lambdas want many rows, and eight tasks have few each.
            spec = {"tasks": tasks, "by": "channel", "rows": min(2 * rows, self.setup.tuned), "steps": steps}
            if cell.how in CHANNELS and cell.how != CORRECTED_CHANNEL:
                spec |= {"rows": self.setup.tuned, "steps": self.setup.tune_steps}
            spec |= {"corrected": True} if cell.how in CHANNELS else {}
            spec |= {"follow": FOLLOWS[cell.how]} if cell.how in FOLLOWS else {}
            return Run("tune", f"{name} {cell.how}", spec, (*before.needs, before))
        if cell.how in TUNINGS:
            spec = {"tasks": tasks, "by": TUNINGS[cell.how], "rows": rows, "steps": steps}
            if cell.how == CORRECTED_TUNED:
                spec["corrected"] = True
                return Run("tune", f"{name} corrected by {spec['by']}", spec, runs + self.throughs(cell))
            return Run("tune", f"{name} by {spec['by']}", spec, runs)
        how, _, chosen = cell.how.rpartition(" ")
        if chosen == GRID:
            how = GRID_OF.get(how, how)
            rows = max(2 * self.setup.tried // len(tasks), min(self.setup.tried, 16))
            return Run("grid", f"{name} {how}".strip(), {"tasks": tasks, "how": how, "rows": rows}, runs)
        return None

    def mix(self, cell: Cell) -> Run:
        """A composition on the test rows of all its tasks. What chose its lambdas is the last run that it needs."""
        runs, chosen = self.trainings(cell), self.lambdas(cell)
        spec: dict[str, Any] = {"tasks": list(cell.tasks), "how": cell.how.removesuffix(GRID).strip()}
        if len(cell.tasks) > 2:
            spec["limit"] = self.setup.shown
        needs = runs
        if cell.how in SOLVED:
            spec["how"] = CORRECTED
            needs += self.throughs(cell)
        elif cell.arm.ours:
            spec["how"] = "live"
            if cell.how in EVEN and cell.how != ONE:
                spec["weight"] = EVEN[cell.how](len(cell.tasks))
        needs += () if chosen is None else (chosen,)
        return Run("mix", f"{cell.arm.name} {cell.how} {len(cell.tasks)}t s{cell.seed}", spec, needs)

    # ---------------------------------------------------------------------------------------- crosstalk, and scores

    def heard_in(self) -> Iterator[Cell]:
        """Cells whose crosstalk is measured."""
        return (Cell(MERGES[size], self.setup.seeds[0], arm, how) for size, arm, how in self.heard)

    def crosstalk(self, cell: Cell) -> Iterator[Run]:
        """The run that measures it, on dev rows; those that its learning rate hangs on, as long as that is not known.

        Of lambdas by channel, which are in adapters of their own, what chose them is the last run that it needs.
        """
        if self.rate(cell.arm.kind) is None:
            yield from self.rate_runs(cell.arm.kind)
            return
        chosen = self.lambdas(cell)
        spec = {"tasks": list(cell.tasks), "rows": max(2 * self.setup.tried // len(cell.tasks), 2)}
        needs = self.trainings(cell) + (() if chosen is None else (chosen,))
        yield Run("crosstalk", f"{cell.arm.name} {cell.how} {len(cell.tasks)}t s{cell.seed}", spec, needs)

    def scored(self) -> dict[str, Cell | None]:
        """{line of the table: composition}; None is the base. With "own" in front: the adapters alone."""
        seed = self.setup.seeds[0]
        ours, peer = Cell(PAIR, seed, *HEADLINES[len(PAIR)]), Cell(PAIR, seed, LORA, SUMS[1])
        return {"base": None, f"{ours.arm.name}: own": ours, f"{ours.arm.name}: {ours.how}": ours} | {
            f"{peer.arm.name}: own": peer,
            f"{peer.arm.name}: {peer.how}": peer,
        }

    def score(self, line: str, task: str) -> Run | None:
        """Generated answers of one line on one task's test rows; None as long as a learning rate is not known."""
        cell = self.scored()[line]
        spec: dict[str, Any] = {"task": task, "rows": self.setup.scored, "what": line}
        if cell is None:
            return Run(
                "score", f"base {task}", spec | {"base": self.setup.fingerprint, "sizes": asdict(self.setup.sizes)}
            )
        if self.rate(cell.arm.kind) is None:
            return None
        needs = self.trainings(cell)
        if line.endswith(": own"):
            needs = tuple(run for run in needs if run.spec["task"] == task)
            spec["how"] = "own"
        else:
            spec |= {"how": self.mix(cell).spec["how"], "tasks": list(PAIR)}
            chosen = self.lambdas(cell)
            needs += () if chosen is None else (chosen,)
        return Run("score", f"{line} {task}", spec, needs)

    def scores(self) -> Iterator[Run]:
        for line, cell in self.scored().items():
            for task in PAIR:
                run = self.score(line, task)
                if run is not None:
                    yield run
                elif cell is not None:
                    yield from self.rate_runs(cell.arm.kind)
