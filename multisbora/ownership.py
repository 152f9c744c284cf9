"""Who owns which share of each kind of matrix, as lines of ASCII for people and as JSON for programs.

Bars show shares, not positions: indices are drawn at random, so a true map would be noise.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .geometry import Geometry, Matrix
from .plan import Plan
from .region import own_axis

if TYPE_CHECKING:
    from .registry.claims import TaskClaims

WIDTH = 80
MAX_LINES = 25
FREE, PLANNED, PROTECTED, OTHERS = ".", "+", "x", "*"
_LETTERS = "abcdefghijklmnopqrst"  # later tasks share OTHERS: more letters than this, a bar of 32 could not show
_BAR = 32
_NAME = 20
_AXES = ("rows", "columns")

Range = tuple[int, int]  # fewest and most indices among the matrices of a strip


@dataclass(frozen=True, slots=True)
class Strip:
    """One axis of all matrices of a kind, whatever their layer.

    Attributes:
        kind: last part of the modules' names, with the part before it where that alone would be ambiguous.
        axis: "rows" or "columns".
        size: indices of that axis.
        matrices: how many there are.
        tasks: task -> the fewest and the most indices that it holds in one of them, earliest claim first.
        protected, planned: likewise for channels that nobody may claim, and for the tasks of the plan.
        free: likewise for what is left after the planned tasks; below zero where the planned tasks do not fit.
        totals: mark -> indices in all matrices together, in the order of the bar.
    """

    kind: str
    axis: str
    size: int
    matrices: int
    tasks: dict[str, Range]
    protected: Range
    planned: Range
    free: Range
    totals: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "axis": self.axis,
            "size": self.size,
            "matrices": self.matrices,
            "tasks": {task: list(held) for task, held in self.tasks.items()},
            "protected": list(self.protected),
            "planned": list(self.planned),
            "free": list(self.free),
        }

    def line(self) -> str:
        bar = _bar(self.totals, self.size * self.matrices)
        tightest = self.free[0]
        left = f"{_range(self.free)}/{self.size}" if tightest >= 0 else f"{-tightest} missing of {self.size}"
        return _cut(f"{_cut(self.kind, 14):<14} {self.axis:<7} [{bar}] {left}", WIDTH)


@dataclass(frozen=True, slots=True)
class Ownership:
    """The map of one composition. `marks` has the legend: letter -> what it stands for."""

    title: str
    marks: dict[str, str]
    strips: tuple[Strip, ...]

    def to_json(self) -> list[dict[str, Any]]:
        return [strip.to_json() for strip in self.strips]

    def lines(self) -> list[str]:
        """At most 25 lines of at most 80 columns. Of too many strips, those with the least room are shown."""
        head = [_cut(self.title, WIDTH), *_wrap([f"{mark} {text}" for mark, text in self.marks.items()])]
        left = "free after/all" if PLANNED in self.marks else "free/all"
        head.append(f"{'kind':<14} {'axis':<7} {'share of the indices':<{_BAR + 2}} {left}")
        room = MAX_LINES - len(head)
        shown = self.strips
        if len(shown) > room:
            tight = sorted(shown, key=lambda strip: strip.free[0] / strip.size)[: room - 1]
            shown = tuple(strip for strip in self.strips if strip in tight)
        lines = [*head, *(strip.line() for strip in shown)]
        if hidden := len(self.strips) - len(shown):
            lines.append(f"and {hidden} more with more room")
        return lines


def ownership(
    geometry: Geometry,
    claims: Mapping[str, TaskClaims],
    plan: Plan,
    protected: Mapping[tuple[str, int], Sized | int] | None = None,
) -> Ownership:
    """The map of a composition with the tasks of a plan in it. Kinds and axes that nobody owns are left out.

    Args:
        claims: what the tasks of the composition hold, earliest first: `Registry.claims`.
        plan: its `tasks` are drawn in as planned.
        protected: (module, axis) -> indices that no task may claim, or how many.

    Raises:
        GeometryError: a claim of a module that the geometry does not have.
    """
    held = {
        task: (own_axis(found.variant), {geometry.find(m).module: region.rank for m, region in found.regions.items()})
        for task, found in claims.items()
    }
    kept = {key: found if isinstance(found, int) else len(found) for key, found in (protected or {}).items()}
    planned = {part.matrix.module: part.rank * plan.tasks for part in plan.matrices}
    own = own_axis(plan.variant)
    marks = {task: _LETTERS[i] if i < len(_LETTERS) else OTHERS for i, task in enumerate(held)}
    strips = []
    for (kind, axis, size), matrices in _groups(geometry.matrices).items():
        modules = [matrix.module for matrix in matrices]
        tasks = {
            task: [ranks.get(module, 0) for module in modules]
            for task, (held_axis, ranks) in held.items()
            if held_axis == axis and not ranks.keys().isdisjoint(modules)
        }
        guarded = [kept.get((module, axis), 0) for module in modules]
        wanted = [planned.get(module, 0) if axis == own else 0 for module in modules]
        if not tasks and not any(guarded) and not any(wanted):
            continue
        free = [size - sum(each) for each in zip(guarded, wanted, *tasks.values(), strict=True)]
        totals = {PROTECTED: sum(guarded)}
        for task, counts in tasks.items():
            totals[marks[task]] = totals.get(marks[task], 0) + sum(counts)
        totals[FREE] = sum(max(0, left) for left in free)
        # No more than there is room for: the bar stays as long as the axis.
        totals[PLANNED] = size * len(modules) - sum(totals.values())
        strips.append(
            Strip(
                kind=kind,
                axis=_AXES[axis],
                size=size,
                matrices=len(modules),
                tasks={task: _span(counts) for task, counts in tasks.items()},
                protected=_span(guarded),
                planned=_span(wanted),
                free=_span(free),
                totals={**{m: n for m, n in totals.items() if m != FREE}, FREE: totals[FREE]},
            )
        )
    return Ownership(_title(plan, claims), _legend(claims, marks, plan, any(kept.values())), tuple(strips))


def _groups(matrices: Iterable[Matrix]) -> dict[tuple[str, int, int], list[Matrix]]:
    """(kind, axis, size of the axis) -> matrices, columns before rows."""
    parents: dict[str, set[str]] = {}
    for matrix in matrices:
        parents.setdefault(matrix.kind, set()).add(_parent(matrix))
    groups: dict[tuple[str, int, int], list[Matrix]] = {}
    for axis in (1, 0):
        for matrix in matrices:
            name = matrix.kind if len(parents[matrix.kind]) == 1 else f"{_parent(matrix)}.{matrix.kind}".lstrip(".")
            groups.setdefault((name, axis, matrix.shape[axis]), []).append(matrix)
    return groups


def _parent(matrix: Matrix) -> str:
    """The part of the name before the kind, numbers of layers and experts left out."""
    return next((part for part in reversed(matrix.module.split(".")[:-1]) if not part.isdecimal()), "")


def _title(plan: Plan, claims: Mapping[str, TaskClaims]) -> str:
    named = next((f", composition {found.composition}" for found in claims.values()), "")
    return f"{plan.model}{named}"


def _legend(
    claims: Mapping[str, TaskClaims], marks: Mapping[str, str], plan: Plan, any_protected: bool
) -> dict[str, str]:
    legend = {PROTECTED: "protected"} if any_protected else {}
    for task, found in claims.items():
        if marks[task] != OTHERS:
            legend[marks[task]] = f"{_cut(task, _NAME)} {found.variant} {found.rank}"
    if others := sum(mark == OTHERS for mark in marks.values()):
        legend[OTHERS] = f"{others} more tasks"
    if plan.tasks:
        legend[PLANNED] = f"{plan.tasks} planned {plan.variant} {plan.rank}"
    legend[FREE] = "free"
    return legend


def _bar(totals: Mapping[str, int], whole: int) -> str:
    """Marks in proportion, by largest remainders; whoever owns something at all gets one mark at least."""
    exact = {mark: count * _BAR / whole for mark, count in totals.items() if count}
    marks = {mark: max(1, int(share)) for mark, share in exact.items()}
    while (missing := _BAR - sum(marks.values())) != 0:
        if missing > 0:
            marks[max(exact, key=lambda mark: exact[mark] - marks[mark])] += 1
        else:
            marks[max((m for m in marks if marks[m] > 1), key=lambda mark: marks[mark] / exact[mark])] -= 1
    return "".join(mark * count for mark, count in marks.items())


def _span(counts: list[int]) -> Range:
    return min(counts), max(counts)


def _range(span: Range) -> str:
    return str(span[0]) if span[0] == span[1] else f"{span[0]}..{span[1]}"


def _wrap(entries: Iterable[str]) -> list[str]:
    """Entries on lines of at most WIDTH columns, none of them broken in two."""
    glued = "  ".join(entry.replace(" ", "\N{NO-BREAK SPACE}") for entry in entries)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in textwrap.wrap(glued, WIDTH, break_on_hyphens=False)]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 2]}.."
