"""A registry as one JSON document: what is in it, how it is laid out for review in git, and how it is read again.

One line a matrix, a region, a membership and an event, in an order that is the same in every store with the same
content, so that a task that comes or goes changes its own lines. What is read is checked as if somebody meant harm.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import operator
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..names import check_name
from ..region import VARIANTS, Variant, own_axis
from .claims import Event
from .ledger import LARGEST_AXIS
from .lines import LONGEST, TIME, detail_fault, is_text
from .rows import shown

FORMAT = 1
ROLES = ("task", "protected", "released")
STAGES = ("allocated", "training", "trained")
_KEYS = ("format", "models", "history")
_MODEL_KEYS = ("name", "model_type", "geometry_digest", "matrices", "holders", "memberships")
_MATRIX_KEYS = ("module", "out_features", "in_features")
_HOLDER_KEYS = ("name", "role", "variant", "rank", "stage", "yields", "regions")
_EVENT_KEYS = ("at", "actor", "action", "model", "composition", "task", "detail")
_LARGEST = 2**31 - 1  # of PostgreSQL's INTEGER
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Holder:
    """Who holds regions: a task, protected channels, or what is left of a released task.

    Attributes:
        name: of a task its name; of the others `content_name`, for they have none.
        yields: names of the earlier holders that keep the cells where the two cross.
        regions: module -> sorted indices.
    """

    name: str
    role: str
    variant: Variant
    rank: int
    stage: str
    yields: tuple[str, ...]
    regions: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Model:
    """One base model and what is held of it.

    Attributes:
        matrices: module -> (out_features, in_features), in the order of the geometry.
        holders: earliest first.
        memberships: (composition, task), in the order in which the tasks joined.
    """

    name: str
    model_type: str
    geometry_digest: str
    matrices: dict[str, tuple[int, int]]
    holders: tuple[Holder, ...]
    memberships: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Document:
    """Everything that a registry says."""

    models: tuple[Model, ...]
    history: tuple[Event, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "models": [_model_json(model) for model in self.models],
            "history": [{key: getattr(event, key) for key in _EVENT_KEYS} for event in self.history],
        }


def content_name(variant: str, rank: int, regions: Mapping[str, tuple[int, ...]], used: Counter[str]) -> str:
    """The name of a holder that has none, by what it holds: the same in every store. `used` counts equal ones."""
    content = json.dumps([variant, rank, regions], sort_keys=True, separators=(",", ":"))
    name = "#" + hashlib.sha256(content.encode()).hexdigest()[:12]
    used[name] += 1
    return name if used[name] == 1 else f"{name}.{used[name]}"


def render(content: Mapping[str, Any]) -> str:
    """The text of a document: small differences between small changes."""
    return "\n".join(_lines(content, "")) + "\n"


def parse(content: str | Mapping[str, Any]) -> Document:
    """Read a document, and believe nothing in it.

    Whether its claims are disjoint, and whether its history leads to them, is for the store to say that takes it.

    Raises:
        UsageError: it is no such document, or says what cannot be; one line, which names the place.
    """
    top = _object(_json(content), "the file", _KEYS)
    if type(top["format"]) is not int or top["format"] != FORMAT:
        raise _fault("format", f"is {shown(top['format'])}, this multisbora reads {FORMAT}")
    models = tuple(_model(value, f"models[{i}]") for i, value in enumerate(_list(top["models"], "models")))
    _unique([model.name for model in models], "models", "model")
    history = tuple(_event(value, f"history[{i}]") for i, value in enumerate(_list(top["history"], "history")))
    return Document(models, history)


# Writing.


def _model_json(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "model_type": model.model_type,
        "geometry_digest": model.geometry_digest,
        "matrices": [
            dict(zip(_MATRIX_KEYS, (module, *shape), strict=True)) for module, shape in model.matrices.items()
        ],
        "holders": [
            {
                **{key: getattr(holder, key) for key in ("name", "role", "variant", "rank", "stage")},
                "yields": list(holder.yields),
                "regions": {module: list(indices) for module, indices in holder.regions.items()},
            }
            for holder in model.holders
        ],
        "memberships": [{"composition": composition, "task": task} for composition, task in model.memberships],
    }


def _lines(value: Any, key: str, depth: int = 0, *, flat: bool = False) -> Iterator[str]:
    """`value` in lines: what holds nothing but plain values is one, and so is an event (`flat`)."""
    start = " " * depth + (f"{json.dumps(key)}: " if key else "")
    named = isinstance(value, Mapping)
    inner = list(value.values()) if named else value
    if flat or not isinstance(inner, list) or not any(isinstance(element, Mapping | list) for element in inner):
        yield start + json.dumps(value)
        return
    yield start + ("{" if named else "[")
    for place, (name, element) in enumerate(zip(value if named else [""] * len(inner), inner, strict=True)):
        *lines, last = _lines(element, name, depth + 1, flat=key == "history")
        yield from lines
        yield last + ("," if place + 1 < len(inner) else "")
    yield " " * depth + ("}" if named else "]")


# Reading.


def _json(content: str | Mapping[str, Any]) -> object:
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"key {shown(name)} is given twice in one object")
        return found

    def number(text: str) -> object:
        raise ValueError(f"{text} is no number")

    try:
        text = content if isinstance(content, str) else json.dumps(content, allow_nan=False)
        return json.loads(text, object_pairs_hook=once, parse_constant=number)
    except RecursionError:
        raise _fault("it", "nests too deep to be a registry") from None
    except (TypeError, ValueError) as error:
        raise _fault("it", f"is no valid JSON: {' '.join(str(error).split())[:200]}") from None


def _model(value: object, where: str) -> Model:
    content = _object(value, where, _MODEL_KEYS)
    name = _text(content["name"], f"{where}.name")
    where = f"model {shown(name)}"
    digest = content["geometry_digest"]
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise _fault(f"{where}: geometry_digest", f"must be 64 hexadecimal digits, got {shown(digest)}")
    matrices: dict[str, tuple[int, int]] = {}
    for i, row in enumerate(_list(content["matrices"], f"{where}: matrices")):
        place = f"{where}: matrices[{i}]"
        matrix = _object(row, place, _MATRIX_KEYS)
        module = _text(matrix["module"], f"{place}.module")
        if module in matrices:
            raise _fault(f"{where}: matrix {shown(module)}", "is given twice")
        matrices[module] = (
            _whole(matrix["out_features"], f"{place}.out_features", LARGEST_AXIS),
            _whole(matrix["in_features"], f"{place}.in_features", LARGEST_AXIS),
        )
    if not matrices:
        raise _fault(f"{where}: matrices", "is empty: a model has one at least")
    holders = _holders(content["holders"], where, matrices)
    memberships = _memberships(content["memberships"], where, {held.name for held in holders if held.role == "task"})
    return Model(name, _text(content["model_type"], f"{where}: model_type"), digest, matrices, holders, memberships)


def _holders(value: object, where: str, matrices: Mapping[str, tuple[int, int]]) -> tuple[Holder, ...]:
    found: dict[str, Holder] = {}
    used: Counter[str] = Counter()
    for i, row in enumerate(_list(value, f"{where}: holders")):
        content = _object(row, f"{where}: holders[{i}]", _HOLDER_KEYS)
        name = _text(content["name"], f"{where}: holders[{i}].name")
        place = f"{where}: {shown(name)}"
        role = _choice(content["role"], f"{place}: role", ROLES)
        variant: Any = _choice(content["variant"], f"{place}: variant", VARIANTS)
        holder = Holder(
            name,
            role,
            variant,
            _whole(content["rank"], f"{place}: rank"),
            _choice(content["stage"], f"{place}: stage", STAGES),
            tuple(_yields(content["yields"], place, role, variant, found)),
            _regions(content["regions"], place, matrices, own_axis(variant)),
        )
        if role == "task":
            check_name(name)
        elif name != (expected := content_name(variant, holder.rank, holder.regions, used)):
            raise _fault(place, f"is {role} and must be called {expected!r}, after what it holds")
        if name in found:
            raise _fault(place, "is listed twice")
        found[name] = holder
    kept = {keeper for holder in found.values() for keeper in holder.yields}
    for holder in found.values():
        if holder.role == "released" and holder.name not in kept:
            raise _fault(f"{where}: {holder.name!r}", "is released and nobody yields to it: leave it out")
    return tuple(found.values())


def _yields(value: object, place: str, role: str, variant: str, before: Mapping[str, Holder]) -> Iterator[str]:
    names = _list(value, f"{place}: yields")
    for name in names:
        if not isinstance(name, str) or name not in before:
            raise _fault(place, f"yields to {shown(name)}, which is not listed before it")
        if before[name].variant == variant:
            raise _fault(place, f"yields to {shown(name)}, which is of the same variant and crosses nothing")
        if role == "released" or (role == "protected" and before[name].role != "protected"):
            raise _fault(place, f"is {role} and yields to {shown(name)}: no such holder does")
        yield name
    _unique(names, f"{place}: yields", "name")


def _regions(
    value: object, place: str, matrices: Mapping[str, tuple[int, int]], axis: int
) -> dict[str, tuple[int, ...]]:
    if not isinstance(value, dict) or not value:
        raise _fault(f"{place}: regions", f"must be a region or more, got {shown(value)}")
    for module, indices in value.items():
        where = f"{place}: region of {shown(module)}"
        if module not in matrices:
            near = difflib.get_close_matches(module[:LONGEST], matrices, n=1)
            raise _fault(where, "is of a matrix that the model does not list" + _near(near))
        if not isinstance(indices, list) or set(map(type, indices)) != {int}:
            raise _fault(where, f"must be a list of whole numbers, got {shown(indices)}")
        if indices[0] < 0 or not all(map(operator.lt, indices, indices[1:])):
            raise _fault(where, "must be sorted, without repeats and not negative")
        if indices[-1] >= matrices[module][axis]:
            raise _fault(where, f"has index {shown(indices[-1])}, outside of an axis of {matrices[module][axis]}")
    return {module: tuple(indices) for module, indices in value.items()}


def _memberships(value: object, where: str, tasks: set[str]) -> tuple[tuple[str, str], ...]:
    found = []
    for i, row in enumerate(_list(value, f"{where}: memberships")):
        content = _object(row, f"{where}: memberships[{i}]", ("composition", "task"))
        composition, task = content["composition"], content["task"]
        check_name(composition, "composition")
        if not isinstance(task, str) or task not in tasks:
            raise _fault(f"{where}: memberships[{i}]", f"is of task {shown(task)}, which is not among its holders")
        found.append((composition, task))
    _unique(found, f"{where}: memberships", "membership")
    if alone := tasks - {task for _, task in found}:
        raise _fault(f"{where}: task {min(alone)!r}", "is in no composition")
    return tuple(found)


def _event(value: object, where: str) -> Event:
    content = _object(value, where, _EVENT_KEYS)
    at = content["at"]
    if not isinstance(at, str) or not TIME.fullmatch(at):
        raise _fault(f"{where}.at", f"must be a time such as 2026-01-31T12:00:00+00:00, got {shown(at)}")
    for key in ("composition", "task"):
        if content[key] is not None:
            check_name(content[key], key)
    detail = content["detail"]
    if not isinstance(detail, dict):
        raise _fault(f"{where}.detail", f"must be an object, got {shown(detail)}")
    if fault := detail_fault(detail):
        raise _fault(f"{where}.detail", fault)
    actor, model = _text(content["actor"], f"{where}.actor"), _text(content["model"], f"{where}.model")
    action = _text(content["action"], f"{where}.action", 32)
    return Event(at, actor, action, model, content["composition"], content["task"], detail)


def _object(value: object, where: str, keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _fault(where, f"must be an object with {', '.join(keys)}, got {shown(value)}")
    for key in value:
        if key not in keys:
            near = difflib.get_close_matches(key[:LONGEST], keys, n=1)
            raise _fault(where, f"has an unknown key {shown(key)}" + _near(near, f" (known: {', '.join(keys)})"))
    for key in keys:
        if key not in value:
            raise _fault(where, f"lacks {key}")
    return value


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise _fault(where, f"must be a list, got {shown(value)}")
    return value


def _text(value: object, where: str, longest: int = LONGEST) -> str:
    if not isinstance(value, str) or not is_text(value, longest):
        raise _fault(where, f"must be printable text of at most {longest} characters, got {shown(value)}")
    return value


def _whole(value: object, where: str, largest: int = _LARGEST) -> int:
    if type(value) is not int or not 1 <= value <= largest:
        raise _fault(where, f"must be a whole number from 1 to {largest}, got {shown(value)}")
    return value


def _choice(value: object, where: str, known: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in known:
        raise _fault(where, f"must be one of {', '.join(known)}, got {shown(value)}")
    return value


def _unique(names: list[Any], where: str, what: str) -> None:
    for name, times in Counter(names).items():
        if times > 1:
            raise _fault(where, f"has {what} {shown(name)} {times} times")


def _near(near: list[str], otherwise: str = "") -> str:
    return f", did you mean {near[0]!r}?" if near else otherwise


def _fault(where: str, what: str) -> UsageError:
    return UsageError(f"registry file: {where} {what}")
