"""Which channels a task should own so that it speaks on its own rows and is quiet on those of others.

An update changes the output of a matrix by what passes through its channels. So a channel that carries much of a task's
energy and little of the others' lets the task say what it learned, and lets few others hear it. `Isolation` scores
every channel for every task by the moments of their rows, and `assign` hands the channels out: each task gets as many
as it asked for, tasks that meet get different ones, and the sum of the scores is the largest there is.

With a and b the shares of a channel in the energy of the task's own rows and of all others' together, as multiples of
an equal share (1 / number of channels), the score is log(a / (a + b + QUIET)): the task's part of what passes there.
It is near 0 where the others are silent, however silent, so that no single channel can buy a loud one its place, and it
falls by one for each factor e where they are loud. QUIET stands for noise: where the task itself hardly speaks, it has
no use for a channel, even one that nobody else uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import DataError
from .geometry import Geometry, Matrix
from .moments import Moments, Site
from .region import priorities

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]

QUIET = 0.01  # of an equal share
MASSIVE = 100.0  # times the median energy: ten times the amplitude of an ordinary channel
STEP = 2.0**-16  # nats; scores are whole multiples of it, so that sums and comparisons of them are exact
_LOWEST = -20.0  # nats: below it a channel is as bad as any
_SWEEPS = 12  # of prices; what is left to do then is done exactly


@dataclass(frozen=True)
class Newcomer:
    """A task that is to get channels of one axis of one matrix.

    Attributes:
        drawn: the channels that the seeded draw gave it.
        taken: (size of the axis,), True for those it must not have, held by tasks that it meets or by nobody.
        others: the tasks whose rows it shall be quiet on.
    """

    drawn: Sequence[int]
    taken: npt.NDArray[np.bool_]
    others: Sequence[str]


@dataclass(frozen=True)
class Isolation:
    """What the rows of tasks send through a model, and which channels are given to whom because of it.

    Attributes:
        moments: task -> its moments, all of one base model.
    """

    moments: Mapping[str, Moments]
    _sites: dict[str, dict[str, Site]] = field(repr=False)

    @classmethod
    def of(cls, moments: Mapping[str, Moments], geometry: Geometry) -> Isolation:
        """Moments under the names that a geometry gives to the matrices.

        Raises:
            DataError: moments of another model, or of two base models; names the task.
        """
        first = next(iter(moments.values()), None)
        sites: dict[str, dict[str, Site]] = {}
        for task, found in moments.items():
            if found.geometry_digest != geometry.digest:
                raise DataError(
                    f"the moments of task {task} were measured on a model with other matrices than {geometry.model}: "
                    f"run multisbora measure --tasks {task} on this one"
                )
            if first is not None and found.base_fingerprint != first.base_fingerprint:
                raise DataError(
                    f"the moments of tasks {first.task} and {task} were measured on two base models: run multisbora "
                    f"measure --tasks {first.task},{task} on the one that both are trained on"
                )
            sites[task] = {geometry.find(module).module: site for module, site in found.sites.items()}
        return cls(moments, sites)

    def require(self, task: str, others: Sequence[str]) -> None:
        """Refuse to choose channels for a task without knowing what its rows, and those of others, send through them.

        Raises:
            DataError: moments are missing; names the tasks.
        """
        missing = [name for name in (task, *others) if name not in self.moments]
        if missing:
            names = ",".join(missing)
            who = f"task {task} and those that it meets" if others else f"task {task}"
            raise DataError(
                f"isolated indices of {who} need moments, and there are none of {', '.join(missing)}: run multisbora "
                f"measure --tasks {names} where the rows are, or allocate with --strategy random"
            )

    def origin(self, task: str) -> dict[str, Any]:
        """What a choice for a task rests on: `{"rows", "tokens", "source"}` of its moments."""
        found = self.moments[task]
        return {"rows": found.rows, "tokens": found.tokens, "source": found.source}

    def arrange(
        self, matrix: Matrix, axis: int, newcomers: Mapping[str, Newcomer], key: Sequence[object]
    ) -> dict[str, tuple[int, ...]]:
        """Channels for tasks, as good as they can be; sorted.

        The seeded draw says how many channels each set of tasks shares (tasks that never meet may share, and then need
        less room together). Here those sets are given other channels, which each of their tasks may have. So whatever
        the draw can place has a place here, and of tasks that all meet the result is the best that there is.

        Channels that are massive for every task, those of attention sinks for example, go to nobody as long as there
        are others: an update there would speak on each token of everybody, and models are brittle in just these.

        Args:
            axis: 1 for columns, by the energy; 0 for rows, by the response.
            key: of `region.priorities`: the order in which channels of the same score are taken.

        Raises:
            DataError: the moments of a task lack the matrix, or have other channels.
        """
        size = matrix.shape[axis]
        place: dict[str, int] = {}
        for task, new in newcomers.items():
            for name in (task, *new.others):
                place.setdefault(name, len(place))
        shares = np.empty((len(place), size))
        for name, row in place.items():
            energy = self._energy(name, matrix, axis)
            np.multiply(energy, size / (energy.sum(dtype=np.float64) or 1.0), out=shares[row])

        drawn = np.zeros((len(newcomers), size), np.bool_)
        met = np.zeros((len(newcomers), len(place)))
        for row, new in enumerate(newcomers.values()):
            drawn[row, list(new.drawn)] = True
            met[row, [place[name] for name in new.others]] = 1
        others = met @ shares  # (newcomers, size)
        scores = np.zeros(drawn.shape)
        for row, (task, new) in enumerate(newcomers.items()):
            if new.others:
                scores[row] = score(shares[place[task]], others[row])
            scores[row, new.taken] = -np.inf
        sets, counts = np.unique(drawn[:, drawn.any(axis=0)].T, axis=0, return_counts=True)
        together = np.stack([scores[of].sum(axis=0) for of in sets])
        # Higher than what any chain of exchanges can win, so that the fewest possible are used, and then the best.
        together[:, massive(shares)] += (len(sets) + 2) * len(newcomers) * _LOWEST / STEP
        owners = assign(together, counts, priorities(size, *key))
        return {
            task: tuple(np.flatnonzero(np.isin(owners, np.flatnonzero(sets[:, row]))).tolist())
            for row, task in enumerate(newcomers)
        }

    def _energy(self, task: str, matrix: Matrix, axis: int) -> npt.NDArray[np.float32]:
        """(size of the axis,): the energy of columns or the response of rows.

        Raises:
            DataError: the moments lack the matrix, or have other channels.
        """
        site = self._sites[task].get(matrix.module)
        values = None if site is None else (site.energy if axis else site.response)
        if values is None or len(values) != matrix.shape[axis]:
            what = "lack" if values is None else f"have {len(values)} in place of {matrix.shape[axis]} channels for"
            raise DataError(
                f"the moments of task {task} {what} {matrix.module}: run multisbora measure --tasks {task} anew, or "
                "leave that matrix out with --targets"
            )
        return values


def score(own: Floats, others: Floats) -> Floats:
    """How well each channel would serve a task, (n,): 0 is best. Whole numbers, in units of STEP.

    Args:
        own, others: (n,) shares of the channels in the energy of the task's own rows, and of those of all other tasks
            added up, as multiples of an equal share.
    """
    with np.errstate(divide="ignore"):
        nats = np.log(own) - np.log(own + others + QUIET)
    found: Floats = np.rint(np.maximum(nats, _LOWEST) / STEP)
    return found


def massive(shares: Floats) -> npt.NDArray[np.bool_]:
    """(n,): channels that carry more than MASSIVE times the median energy on everybody's rows.

    Args:
        shares: (tasks, n). The median is over channels that carry any; tasks without any are passed over.
    """
    found: npt.NDArray[np.bool_] | None = None
    for row in shares:
        some = row if row.min() > 0 else row[row > 0]
        if some.size:
            loud = row > MASSIVE * _last_of(some, (len(some) + 1) // 2)
            found = loud if found is None else found & loud
            if not found.any():
                return found
    return np.zeros(shares.shape[1], np.bool_) if found is None else found


def assign(
    scores: Floats, counts: Sequence[int] | npt.NDArray[np.integer], ranks: npt.NDArray[Any] | None = None
) -> Places:
    """Give each taker exactly as many columns as it asks for, no column to two of them, the sum of scores maximal.

    Exact. Prices that fall from above (each taker's price is that of the last column it gets if all others pay theirs)
    place most columns, and stay such that what is placed is the best way to place as many; what is missing is added by
    the best chains of exchanges between takers, one column at a time. The same arguments give the same answer.

    Args:
        scores: (takers, n), whole numbers, -inf where a taker must not have a column. Sums of as many of them as there
            are takers must stay below 2^53.
        counts: (takers,), above 0.
        ranks: (n,) distinct: of equally good columns those with a lower one are preferred; None prefers earlier ones.

    Returns:
        (n,): the taker of each column, or -1.

    Raises:
        ValueError: it cannot be done.
    """
    wanted = np.asarray(counts, np.intp)
    if (np.isfinite(scores).sum(axis=1) < wanted).any():
        raise ValueError("a taker may have fewer columns than it asks for")
    owners = np.full(scores.shape[1], -1, np.intp)
    if len(wanted) == 1:
        owners[_highest(scores[0], wanted[0], ranks)] = 0
        return owners
    if ranks is not None:
        order = np.argsort(ranks)
        owners[order] = assign(scores.take(order, axis=1), counts)
        return owners
    # Among as many columns as all want together, one is left for a taker whose columns are worse: no need of those.
    most = min(int(wanted.sum()), scores.shape[1])
    columns = np.unique(np.concatenate([_highest(row, most) for row in scores]))
    near = np.ascontiguousarray(scores[:, columns])
    owners[columns] = _complete(near, wanted, _placed(near, wanted, _prices(near, wanted)))
    return owners


def _highest(values: Floats, count: int, ranks: npt.NDArray[Any] | None = None) -> Places:
    """Places of the `count` highest values, of equal ones those of the lowest ranks, or the first."""
    limit = _last_of(values, count)
    above, equal = np.flatnonzero(values > limit), np.flatnonzero(values == limit)
    if ranks is not None:
        equal = equal[np.argsort(ranks[equal])]
    return np.concatenate([above, equal[: count - len(above)]])


def _last_of(values: Floats, count: int) -> float:
    """The lowest of the `count` highest values."""
    return float(np.partition(values, len(values) - count)[len(values) - count])


def _prices(scores: Floats, wanted: Places) -> Floats:
    """(takers,): what a column of each taker costs.

    At first nobody else counts. Then each price falls to what the last of the wanted columns is worth more to its taker
    than to the best of the others at their prices, or than to nobody: with each sweep others are cheaper, so prices
    only fall, and no taker ever gets more than it wants.
    """
    takers = np.arange(len(wanted))[:, None]
    columns = np.arange(scores.shape[1])
    prices = np.array([_last_of(row, count) for row, count in zip(scores, wanted, strict=True)])
    for _ in range(_SWEEPS):
        gains = scores - prices[:, None]
        first = gains.argmax(axis=0)
        best = gains[first, columns]
        gains[first, columns] = -np.inf
        rivals = np.maximum(np.where(takers == first, gains.max(axis=0), best), 0)
        lower = np.array([_last_of(row, count) for row, count in zip(scores - rivals, wanted, strict=True)])
        if (lower == prices).all():
            break
        prices = lower
    return prices


def _placed(scores: Floats, wanted: Places, prices: Floats) -> Places:
    """(n,): owners at given prices: each column with the taker that gains most from it, if any gains.

    No taker has more than it wants. What is placed is the best way to place as many, by duality: every column that
    somebody gains from is with one who gains most, and no column is with anybody who loses by it.
    """
    gains = scores - prices[:, None]
    best = np.maximum(gains.max(axis=0), 0)
    ties = gains == best
    owners = np.full(len(best), -1, np.intp)
    clear = (best > 0) & (ties.sum(axis=0) == 1)
    owners[clear] = ties[:, clear].argmax(axis=0)
    room = wanted - np.bincount(owners[clear], minlength=len(wanted))
    for column in np.flatnonzero((best > 0) & ~clear):
        taker = int(np.where(ties[:, column], room, -1).argmax())
        owners[column] = taker
        room[taker] -= 1
    if room.min() < 0:  # not seen: ties that fit in no simple way; from nothing is right as well, and slower
        return np.full(len(best), -1, np.intp)
    for taker in range(len(wanted)):
        equal = np.flatnonzero((owners < 0) & ties[taker])[: room[taker]]
        owners[equal] = taker
    return owners


def _complete(scores: Floats, wanted: Places, owners: Places) -> Places:
    """Add columns one by one: each time a free one goes to a taker, one of that to the next, by the best chain there is
    (Bellman-Ford over the takers), so that what is placed stays the best way to place as many.

    Raises:
        ValueError: no chain ends at a taker that lacks columns.
    """
    takers = len(wanted)
    free = takers  # the number of the giver of columns that are nobody's
    left = np.where(owners < 0, scores, -np.inf)
    gains = np.full((takers + 1, takers), -np.inf)  # (giver, getter): what the best column to hand over wins
    what = np.zeros((takers + 1, takers), np.intp)  # and which one it is
    room = wanted - np.bincount(owners[owners >= 0], minlength=takers)

    def look(giver: int) -> None:
        if giver == free:
            what[free] = left.argmax(axis=1)
            gains[free] = left[np.arange(takers), what[free]]
            return
        mine = np.flatnonzero(owners == giver)
        if mine.size:
            wins = scores[:, mine] - scores[giver, mine]
            best = wins.argmax(axis=1)
            what[giver], gains[giver] = mine[best], wins[np.arange(takers), best]
            gains[giver, giver] = -np.inf

    if room.any():
        for giver in range(takers + 1):
            look(giver)
    for taker in np.repeat(np.arange(takers), room):
        value = gains[free].copy()
        giver_of = np.full(takers, free)
        for _ in range(takers - 1):
            through = value[:, None] + gains[:free]
            via = through.argmax(axis=0)
            best = through[via, np.arange(takers)]
            if not (better := best > value).any():
                break
            value[better], giver_of[better] = best[better], via[better]
        if value[taker] == -np.inf:
            raise ValueError("takers want more columns than there are for them")
        chain = [int(taker)]
        while giver_of[chain[-1]] != free:
            chain.append(int(giver_of[chain[-1]]))
        moves = [(what[giver_of[getter], getter], getter) for getter in chain]
        for column, getter in moves:
            owners[column] = getter
        left[:, moves[-1][0]] = -np.inf
        for giver in (*chain, free):
            look(giver)
    return owners
