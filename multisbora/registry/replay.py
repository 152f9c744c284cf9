"""What a store's history says is held: its events, played from the first to the last, against the rows."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .lines import LONGEST, TIME, detail_fault, is_text
from .reader import Reader
from .rows import Holder, Line, Rows, events_of, geometry_digests, shown

_JOINING = frozenset({"allocate", "join", "import"})
_STAGES = frozenset({"allocated", "training", "trained"})


@dataclass
class Life:
    """One task from its first claim on, or to its release.

    Attributes:
        compositions: those it is in -> the id of the event by which it joined.
        digests: every claim digest that was recorded of it -> the name that it had then.
        detail: what the event of its first claim says of it: variant, rank, number of matrices.
    """

    compositions: dict[str, int]
    digests: dict[str, str]
    detail: dict[str, Any]
    stage: str = "allocated"


@dataclass(frozen=True)
class History:
    """What there should be.

    Attributes:
        models: registered models -> geometry digest then.
        tasks: (model, task) -> its life; those that are still there.
        protected: (model, "rows" or "columns", digest of the channels) -> how often these were protected.
        counted: (model, "rows" or "columns", module) -> channels that were protected by events without a digest, as
            they were written at first.
        problems: one line for each event that does not follow from those before.
    """

    models: dict[str, object] = field(default_factory=dict)
    tasks: dict[tuple[str, str], Life] = field(default_factory=dict)
    protected: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    counted: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def replay(events: Iterable[Line]) -> History:
    """Play events, oldest first. Actions that claim nothing and give nothing back are passed over."""
    found = History()
    for event in events:
        detail = _detail(event)
        if detail is None:
            found.problems.append(f"event {event.id} ({event.action}): its detail is no JSON object")
            continue
        if fault := detail_fault(detail):
            found.problems.append(f"event {event.id} ({event.action}): its detail {fault}")
        if event.action == "register":
            if event.model in found.models:
                found.problems.append(f"event {event.id} registers model {shown(event.model)}, which was registered")
            found.models.setdefault(event.model, detail.get("geometry_digest"))
            continue
        if event.model not in found.models:
            found.problems.append(
                f"event {event.id} ({event.action}) is of model {shown(event.model)}, never registered"
            )
        problem = _play(found, event, detail)
        if problem:
            where = f" in composition {event.composition!r}" if event.composition else ""
            found.problems.append(
                f"event {event.id} ({event.action}) of task {event.task!r} of {event.model}{where}: {problem}"
            )
    return found


def _play(found: History, event: Line, detail: dict[str, Any]) -> str | None:
    """Apply one event; what is wrong with it, if anything is."""
    if event.action == "protect" or (event.action == "import" and event.task is None):
        return _protect(found, event.model, detail)
    if event.action == "unprotect":
        for protected in (found.protected, found.counted):
            for key in [key for key in protected if key[0] == event.model]:
                del protected[key]
        return None
    if event.action not in _JOINING | _STAGES | {"release", "rename"}:
        return None
    if event.task is None or (event.composition is None and event.action in _JOINING | {"release"}):
        return "it names no task or no composition"
    name = (event.model, event.task)
    life = found.tasks.get(name)
    if event.action in _JOINING and life is None and event.action != "join":
        life = found.tasks[name] = Life({}, {}, detail)
        life.stage = str(detail.get("stage", life.stage))
    if life is None:
        return "the history before it has no such task"
    if isinstance(digest := detail.get("claim_digest"), str):
        life.digests.setdefault(digest, event.task)
    if event.action in _STAGES:
        life.stage = event.action
    elif event.action == "rename":
        return _rename(found, name, life, detail.get("to"))
    elif event.action == "release":
        if life.compositions.pop(str(event.composition), None) is None:
            return "it was not there"
        if not life.compositions:
            del found.tasks[name]
    elif event.composition in life.compositions:
        return "it was there already"
    else:
        life.compositions[str(event.composition)] = event.id
    return None


def _protect(found: History, model: str, detail: dict[str, Any]) -> str | None:
    axis, channels, digest = detail.get("axis"), detail.get("channels"), detail.get("digest")
    if axis in ("rows", "columns") and isinstance(digest, str):
        found.protected[model, axis, digest] += 1
        return None
    if axis not in ("rows", "columns") or not isinstance(channels, dict):
        return "it does not say which channels"
    if not all(type(count) is int for count in channels.values()):
        return "it does not say which channels"
    for module, count in channels.items():
        found.counted[model, axis, module] += count
    return None


def _rename(found: History, key: tuple[str, str], life: Life, name: object) -> str | None:
    if not isinstance(name, str):
        return "it does not say to what"
    if (key[0], name) in found.tasks:
        return f"{name!r} was taken"
    del found.tasks[key]
    found.tasks[key[0], name] = life
    return None


def _detail(event: Line) -> dict[str, Any] | None:
    def number(text: str) -> object:
        raise ValueError(f"{text} is no number")

    try:
        detail = json.loads(event.detail, parse_constant=number)
    except (ValueError, RecursionError):
        return None
    return detail if isinstance(detail, dict) else None


def digests(reader: Reader, model: str, task: str) -> frozenset[str]:
    """Every claim digest that a task's claims have or had since it holds them; empty if it holds none.

    Its regions never change in that time, so an adapter that carries any of these was trained on them. There are
    several where the digest itself was made another way before (schema 0002).
    """
    held = reader.memberships(model, task)
    life = replay(events_of(reader.connection, model)).tasks.get((model, task))
    now = {claims.digest for claims in held.values()}
    return frozenset(now | life.digests.keys() if now and life else now)


def disagreements(rows: Rows) -> Iterator[str]:
    """Where the history, and what it leaves, is not what the rows say is held; one line each."""
    history = replay(rows.events.values())
    for event in rows.events.values():
        if fault := _line_fault(event):
            yield f"event {event.id} ({shown(event.action)}): {fault}"
    yield from history.problems
    registered = {model.name: model for model in rows.models.values()}
    for name in registered.keys() ^ history.models.keys():
        where = "the history never registers" if name in registered else "the store does not have"
        yield f"{where} model {shown(name)}"
    for name in registered.keys() & history.models.keys():
        digest = history.models[name]
        if not isinstance(digest, str) or digest not in geometry_digests(rows, registered[name]):
            yield f"model {shown(name)} was registered with other matrices, of digest {shown(digest)}"
    tasks = {(rows.model(held.model_id), held.name): held for held in rows.holders.values() if held.role == "task"}
    for model, task in history.tasks.keys() - tasks.keys():
        yield f"task {task!r} of {model} holds claims by the history, none in the store"
    joined: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for membership in rows.memberships.values():
        if membership.composition_id in rows.compositions:
            joined[membership.task_id].append((membership.id, rows.compositions[membership.composition_id].name))
    order: dict[tuple[str, str], list[tuple[int, int, str]]] = defaultdict(list)
    for (model, task), holder in tasks.items():
        life = history.tasks.get((model, task))
        if life is None:
            yield f"task {task!r} of {model} holds claims of which the history knows nothing"
            continue
        for fault in _life_faults(rows, holder, life, {name for _, name in joined[holder.id]}, history.models):
            yield f"task {task!r} of {model}: {fault}"
        for membership_id, name in joined[holder.id]:
            order[model, name].append((membership_id, life.compositions.get(name, 0), task))
    for (model, name), members in order.items():
        by_rows = [(joining, task) for _, joining, task in sorted(members)]
        for (before, _), (after, task) in itertools.pairwise(by_rows):
            if after < before:
                yield f"composition {name!r} of {model}: task {task!r} is out of the order of the history"
                break
    yield from _protected_faults(rows, history)


def _life_faults(
    rows: Rows, holder: Holder, life: Life, joined: set[str], registered: dict[str, object]
) -> Iterator[str]:
    for name in sorted(joined ^ life.compositions.keys()):
        yield (
            f"it is in composition {name!r}, by the history it is not"
            if name in joined
            else f"by the history it is in composition {name!r}, and it is not"
        )
    held = {"variant": holder.variant, "rank": holder.rank, "matrices": len(rows.regions.get(holder.id, {}))}
    for key, value in held.items():
        if life.detail.get(key) != value:
            yield f"its {key} is {value}, by the history {shown(life.detail.get(key))}"
    if holder.stage != life.stage:
        yield f"its stage is {holder.stage!r}, by the history {life.stage!r}"
    if not life.digests:
        yield "the history has no digest of its claims"
        return
    content = _content(rows, holder)
    now = _sha256(content)
    for digest, name in life.digests.items():
        # Before schema 0002 a digest was also of the task's name, and the geometry had another one.
        before = {**content, "geometry_digest": registered.get(content["model"])}
        if digest != now and digest not in (_sha256({**before, "task": name}), _sha256(before)):
            yield f"its claims have the digest {now[:12]}, by the history {shown(digest[:12])}"
            return


def _line_fault(event: Line) -> str:
    """Why an event could not be read again from a file, if it could not; its detail aside."""
    if not TIME.fullmatch(event.at):
        return f"its time is {shown(event.at)}"
    texts = {"actor": (event.actor, LONGEST), "action": (event.action, 32), "model": (event.model, LONGEST)}
    for what, (value, longest) in texts.items():
        if not is_text(value, longest):
            return f"its {what} is {shown(value)}, which is not printable text of at most {longest} characters"
    return ""


def _protected_faults(rows: Rows, history: History) -> Iterator[str]:
    unknown = history.protected.copy()
    counts: Counter[tuple[str, str, str]] = Counter()
    for holder in rows.holders.values():
        if holder.role != "protected":
            continue
        model, axis = rows.model(holder.model_id), "columns" if holder.variant == "fa" else "rows"
        held = {rows.matrix(matrix_id): indices.tolist() for matrix_id, indices in rows.regions[holder.id].items()}
        digest = hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()
        if unknown[model, axis, digest]:
            unknown[model, axis, digest] -= 1
        else:
            counts.update({(model, axis, module): len(indices) for module, indices in held.items()})
    for model, axis, digest in sorted(unknown.elements(), key=str):
        yield f"by the history other {axis} of {model} are protected, of digest {shown(digest[:12])}"
    for model, axis, module in sorted(counts.keys() | history.counted.keys(), key=str):
        there, by_history = counts[model, axis, module], history.counted[model, axis, module]
        if there != by_history:
            yield f"{there} {axis} of {module} of {model} are protected, by the history {by_history}"


def _content(rows: Rows, holder: Holder) -> dict[str, Any]:
    """What a claim digest is of (`TaskClaims.digest`), from the rows."""
    model = rows.models.get(holder.model_id)
    keepers = [rows.regions.get(keeper, {}) for keeper in rows.yields.get(holder.id, ())]
    held: dict[str, list[list[int]]] = {}
    for matrix_id, indices in rows.regions.get(holder.id, {}).items():
        crossed = [keeper[matrix_id] for keeper in keepers if matrix_id in keeper]
        excluded = np.unique(np.concatenate(crossed)).tolist() if crossed else []
        held[rows.matrix(matrix_id)] = [indices.tolist(), excluded]
    return {
        "model": model.name if model else "",
        "geometry_digest": model.geometry_digest if model else "",
        "variant": holder.variant,
        "rank": holder.rank,
        "regions": held,
    }


def _sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
