"""Tasks that meet in a composition, as a graph: which of them may hold the same indices, and which set forbids it.

Two tasks need different indices only where some composition holds both. Colouring the graph whose edges are those pairs
puts tasks that never meet into one class, and one block of indices serves the class. A clique, a set of tasks that
all meet each other, says how few blocks can do. Both are hard problems: the searches here stop after a stated effort,
and `Colouring.optimal` says whether the two ends met.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import networkx as nx

from .errors import UsageError

_EFFORT = 12_000  # a task: about one second for 300 tasks
_CLIQUE_EFFORT = 1_000_000  # about one second
_Bits = int  # a set of tasks: bit i is the task with number i


@dataclass(frozen=True)
class Colouring:
    """Tasks in classes that may share indices, and the clique that no arrangement can get below.

    Attributes:
        classes: sets of tasks of which no two meet; every task is in one. Largest first, names sorted.
        widths: the weight of the heaviest task of each class: the indices a matrix its block needs, or 1.
        clique: tasks that all meet each other, sorted; the heaviest that was found.
        bound: their weights together. No arrangement needs less.
    """

    classes: tuple[tuple[str, ...], ...]
    widths: tuple[int, ...]
    clique: tuple[str, ...]
    bound: int

    @property
    def width(self) -> int:
        """All blocks together: the number of classes, or with weights the indices a matrix they need."""
        return sum(self.widths)

    @property
    def optimal(self) -> bool:
        """Whether no colouring can be narrower. False means not known: the clique found does not prove it."""
        return self.width == self.bound


def conflict_graph(compositions: Mapping[str, Iterable[str]]) -> nx.Graph[str]:
    """Tasks as nodes, an edge where two share a composition.

    Args:
        compositions: composition -> its tasks, in any order; naming one twice changes nothing.

    Returns:
        Nodes and edges in sorted order. The edge attribute `compositions` is the sorted tuple of the names of those
        that both tasks are in. A task that meets no other is a node without edges.
    """
    tasks: set[str] = set()
    shared: dict[tuple[str, str], tuple[str, ...]] = {}
    for name in sorted(compositions):
        members = sorted(set(compositions[name]))
        tasks.update(members)
        for pair in itertools.combinations(members, 2):
            shared[pair] = (*shared.get(pair, ()), name)
    graph: nx.Graph[str] = nx.Graph()
    graph.add_nodes_from(sorted(tasks))
    graph.add_edges_from((one, other, {"compositions": shared[one, other]}) for one, other in sorted(shared))
    return graph


def clique(
    graph: nx.Graph[str],
    *,
    weights: Mapping[str, int] | None = None,
    containing: str | None = None,
    effort: int = _CLIQUE_EFFORT,
) -> tuple[str, ...]:
    """The heaviest set of tasks that all meet each other, sorted by name; empty if the graph is.

    Branch and bound over the conflict graph. If `effort` runs out, the answer is the heaviest set found by then, a
    lower bound only; it is never lighter than a composition of the graph. The answer does not depend on the order in
    which the graph was built.

    Args:
        weights: task -> weight, a whole number above 0, for every task; without it each counts 1.
        containing: only sets with this task.
        effort: candidates looked at before the search gives up; the default is about a second.

    Raises:
        UsageError: a weight that is missing or no whole number above 0, or a task that is not in the graph.
    """
    return _Numbered(graph, weights).clique(containing, effort)


def colour(graph: nx.Graph[str], *, weights: Mapping[str, int] | None = None, effort: int = _EFFORT) -> Colouring:
    """Put the tasks into as few classes as can be found, no two of a class sharing a composition.

    The best of three greedy strategies of networkx (heaviest and most connected first, smallest last, DSATUR), narrowed
    by a tabu search over partial colourings (after Blöchliger and Zufferey 2008) until the clique is met or `effort` is
    used up. The answer does not depend on the order in which the graph was built.

    Args:
        weights: task -> indices a matrix it needs, for every task. A class is as wide as its heaviest task, and the sum
            of the widths is made small instead of the number of classes.
        effort: pairs of task and class looked at before improvement stops, times the number of tasks; the default is
            about a second for 300 tasks.

    Raises:
        UsageError: a weight that is missing or no whole number above 0.
    """
    tasks = _Numbered(graph, weights)
    largest = tasks.clique(None, _CLIQUE_EFFORT)
    bound = sum(tasks.weight[tasks.number[task]] for task in largest)
    best: list[_Bits] | None = None
    for found in _greedy(tasks):
        if best is None or tasks.width(found) < tasks.width(best):
            best = found
        if tasks.width(best) == bound:
            break
    best = _narrower(tasks, best or [], bound, effort * len(tasks.names))
    named = sorted((tasks.named(bits) for bits in best), key=lambda names: (-len(names), names))
    widths = tuple(max(tasks.weight[tasks.number[name]] for name in names) for names in named)
    return Colouring(classes=tuple(named), widths=widths, clique=largest, bound=bound)


class _Numbered:
    """A graph with its tasks numbered, heaviest and most connected first, so that a set of tasks is one integer."""

    def __init__(self, graph: nx.Graph[str], weights: Mapping[str, int] | None) -> None:
        weigh = {task: 1 if weights is None else weights.get(task, 0) for task in sorted(graph)}
        for task, value in weigh.items():
            if type(value) is not int or value < 1:
                raise UsageError(f"task {task!r} has weight {value!r}: give each task a whole number above 0")
        self.names = sorted(weigh, key=lambda task: (-weigh[task], -len(graph.adj[task]), task))
        self.number = {task: number for number, task in enumerate(self.names)}
        self.weight = [weigh[task] for task in self.names]
        self.meets: list[_Bits] = [0] * len(self.names)
        together: dict[str, _Bits] = {}
        for one, other, data in graph.edges(data=True):
            pair = 1 << self.number[one] | 1 << self.number[other]
            self.meets[self.number[one]] |= pair
            self.meets[self.number[other]] |= pair
            for name in data.get("compositions", ()):
                together[name] = together.get(name, 0) | pair
        self.meets = [bits & ~(1 << number) for number, bits in enumerate(self.meets)]
        self.compositions = [together[name] for name in sorted(together)]

    def named(self, bits: _Bits) -> tuple[str, ...]:
        return tuple(sorted(self.names[number] for number in _members(bits)))

    def width(self, classes: Sequence[_Bits]) -> int:
        return sum(self.weight[_first(bits)] for bits in classes)

    def clique(self, containing: str | None, effort: int) -> tuple[str, ...]:
        if containing is not None and containing not in self.number:
            raise UsageError(f"task {containing!r} is in no composition: name one that is")
        fixed = 0 if containing is None else 1 << self.number[containing]
        allowed = self.meets[self.number[containing]] if containing is not None else (1 << len(self.names)) - 1

        best = fixed or (1 if self.names else 0)
        heaviest = sum(self.weight[number] for number in _members(best & ~fixed))  # here and below without `fixed`
        for bits in self.compositions:
            total = sum(self.weight[number] for number in _members(bits & ~fixed))
            if bits & fixed == fixed and total > heaviest and self._all_meet(bits):
                best, heaviest = bits, total
        open_sets = [(allowed, self._bounds(allowed), fixed, 0)]
        while open_sets and effort > 0:
            candidates, order, chosen, total = open_sets.pop()
            if not order or total + order[-1][1] <= heaviest:
                continue
            number, _ = order.pop()
            open_sets.append((candidates & ~(1 << number), order, chosen, total))
            candidates &= self.meets[number]
            chosen |= 1 << number
            total += self.weight[number]
            if total > heaviest:
                best, heaviest = chosen, total
            order = self._bounds(candidates)
            effort -= len(order) + 1
            open_sets.append((candidates, order, chosen, total))
        return self.named(best)

    def _all_meet(self, bits: _Bits) -> bool:
        """Whether the set is a clique: a composition no longer is where a caller took edges out."""
        return all(not bits & ~(self.meets[number] | 1 << number) for number in _members(bits))

    def _bounds(self, candidates: _Bits) -> list[tuple[int, int]]:
        """The candidates as (number, weight that no clique among it and those before it exceeds), rising."""
        found = []
        total = 0
        while candidates:
            left, heaviest = candidates, self.weight[_first(candidates)]
            while left:
                number = _first(left)
                left &= ~(self.meets[number] | 1 << number)
                candidates ^= 1 << number
                found.append((number, total + heaviest))
            total += heaviest
        return found


def _first(bits: _Bits) -> int:
    return (bits & -bits).bit_length() - 1


def _members(bits: _Bits) -> Iterator[int]:
    while bits:
        yield _first(bits)
        bits &= bits - 1


def _greedy(tasks: _Numbered) -> Iterator[list[_Bits]]:
    """Colourings from the cheapest strategy to the dearest: the first that meets the lower bound saves the rest."""
    # On numbers, since networkx walks over sets of nodes, and a set of strings has another order in every process.
    plain: nx.Graph[int] = nx.Graph()
    plain.add_nodes_from(range(len(tasks.names)))
    plain.add_edges_from((one, other) for one, bits in enumerate(tasks.meets) for other in _members(bits >> one << one))
    strategies: tuple[Callable[..., list[int]] | Literal["smallest_last", "DSATUR"], ...] = (
        lambda graph, colours: list(graph),
        "smallest_last",
        "DSATUR",
    )
    for strategy in strategies:
        colours = nx.greedy_color(plain, strategy)
        classes: dict[int, _Bits] = {}
        for number, which in colours.items():
            classes[which] = classes.get(which, 0) | 1 << number
        yield [classes[which] for which in sorted(classes)]


def _narrower(tasks: _Numbered, classes: list[_Bits], bound: int, effort: int) -> list[_Bits]:
    """Take the heaviest tasks out of a class, or all tasks of a class, and find them places in the others; repeat."""
    generator = random.Random(0)  # of the search alone, so that the same graph gets the same answer
    share = effort // 16 + 1
    while tasks.width(classes) > bound:
        attempts = []
        for which, bits in enumerate(classes):
            top = tasks.weight[_first(bits)]
            heavy = sum(1 << number for number in _members(bits) if tasks.weight[number] == top)
            attempts.append((heavy.bit_count(), which, heavy))
        for _, which, heavy in itertools.cycle(sorted(attempts)):
            if effort <= 0:
                return classes
            rest = [*classes[:which], classes[which] & ~heavy, *classes[which + 1 :]]
            found, used = _place(tasks, [bits for bits in rest if bits], heavy, min(share, effort), generator)
            effort -= used
            if found is not None:
                classes = found
                break
    return classes


def _place(
    tasks: _Numbered, classes: list[_Bits], homeless: _Bits, effort: int, generator: random.Random
) -> tuple[list[_Bits] | None, int]:
    """Put the homeless into classes no narrower than they are, each time throwing out whom they meet there.

    Returns:
        The classes, not wider than before, or None; and the effort used.
    """
    classes = list(classes)
    widths = [tasks.weight[_first(bits)] for bits in classes]
    barred: dict[tuple[int, int], int] = {}  # (task, class it was thrown out of) -> the move up to which it stays out
    used = move = 0
    while homeless and used < effort:
        move += 1
        used += homeless.bit_count() * len(classes) + 10  # a move costs about ten looks more
        fewest = len(tasks.names)
        choices: list[tuple[int, int]] = []
        for number in _members(homeless):
            for which, bits in enumerate(classes):
                met = (bits & tasks.meets[number]).bit_count()
                if met > fewest or widths[which] < tasks.weight[number] or barred.get((number, which), 0) >= move:
                    continue
                if met < fewest:
                    fewest, choices = met, []
                choices.append((number, which))
        if not choices:
            continue  # all are barred, which the next move may end
        number, which = generator.choice(choices)
        thrown = classes[which] & tasks.meets[number]
        classes[which] ^= thrown | 1 << number
        homeless ^= thrown | 1 << number
        for other in _members(thrown):
            barred[other, which] = move + 1 + homeless.bit_count() * 3 // 5 + generator.randrange(10)
    return (None if homeless else [bits for bits in classes if bits]), used
