"""Geometry cards: JSON files that list a known model's matrices, those that differ by number alone as one group.

    {"module": "model.layers.{i}.mlp.experts.{e}.w1", "layers": 32, "experts": 8, "out": 14336, "in": 4096, ...}

`layers` and `experts` are counts, or lists of numbers where some are missing. This module knows the files; what a
matrix is and which ones a model has says `geometry`.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from .errors import GeometryError, UsageError
from .resources import models_dir

Orientation = Literal["linear", "conv1d"]
Row: TypeAlias = tuple[str, int, int, Orientation]
"""A matrix in a card: module, out features, in features, orientation."""

LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
EXPERT = re.compile(r"(?<=\bexperts\.)\d+(?=\.)")
_CARD_KEYS = {"names", "model_type", "parameters", "config", "groups"}
_GROUP_KEYS = {"module", "layers", "out", "in", "orientation"}


@dataclass(frozen=True)
class Card:
    """What a card's file says.

    Attributes:
        name: the file's name without its ending.
        names: other names of models with this geometry, hub ids above all.
        model_type: transformers' name of the architecture.
        parameters: of the first of `names`, those of head and embedding included, a tied one once; 0 if not known.
        config: the entries of the first one's config.json that its sizes follow from.
        groups: as in the file.
        path: the file.
    """

    name: str
    names: tuple[str, ...]
    model_type: str
    parameters: int
    config: Mapping[str, Any]
    groups: tuple[Mapping[str, Any], ...]
    path: Path

    def rows(self) -> Iterator[Row]:
        """Every matrix. Raises GeometryError where a group is malformed."""
        for group in self.groups:
            yield from _expand(self.path, group)


def read_card(name_or_path: str | os.PathLike[str]) -> Card:
    """A card by its name, by another name of the model (hub id; case does not matter), or by path.

    Raises:
        UsageError: no card has that name; the message has the nearest ones.
        GeometryError: the card's file is malformed.
    """
    name = os.fspath(name_or_path)
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        return _card(path)
    stems = {path.stem.lower(): path for path in models_dir().glob("*.json")}
    if name.lower() in stems:
        return _card(stems[name.lower()])
    # Stems go last here too, so that an alias in another card cannot take a card's own name.
    aliases = {alias.lower(): path for path in stems.values() for alias in _card(path).names} | stems
    if name.lower() in aliases:
        return _card(aliases[name.lower()])
    near = difflib.get_close_matches(name.lower(), aliases, n=3, cutoff=0.5)
    likely = list(dict.fromkeys(aliases[alias].stem for alias in near))
    hint = f"did you mean {' or '.join(likely)}?" if likely else f"cards: {', '.join(card_names())}"
    raise UsageError(f"no geometry card is called {name!r}: {hint}")


def card_names() -> tuple[str, ...]:
    """Names of the cards that ship with multisbora, sorted."""
    return tuple(sorted((path.stem for path in models_dir().glob("*.json")), key=str.lower))


def card_text(card: Mapping[str, Any]) -> str:
    """A card's JSON as its file holds it: one group a line."""
    entries = []
    for key, value in card.items():
        if key == "groups":
            text = "[\n" + ",\n".join(f"    {json.dumps(group)}" for group in value) + "\n  ]"
        else:
            text = json.dumps(value, indent=2 if isinstance(value, dict) else None).replace("\n", "\n  ")
        entries.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def grouped(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Matrices as the groups of a card, in the order in which each group's first one comes."""
    groups: dict[Row, list[tuple[int, int]]] = {}
    for module, out_features, in_features, orientation in rows:
        template, layer, expert = _template(module)
        groups.setdefault((template, out_features, in_features, orientation), []).append((layer, expert))
    return [_group(row, grid) for row, members in groups.items() for grid in _grids(members)]


def _template(module: str) -> tuple[str, int, int]:
    """ "model.layers.3.mlp.experts.5.w1" -> ("model.layers.{i}.mlp.experts.{e}.w1", 3, 5); -1 where there is none."""
    expert = EXPERT.search(module)
    if expert:
        module = f"{module[: expert.start()]}{{e}}{module[expert.end() :]}"
    layer = LAYER.search(module)
    template = LAYER.sub("{i}", module, count=1)
    return template, int(layer.group()) if layer else -1, int(expert.group()) if expert else -1


def _grids(members: list[tuple[int, int]]) -> list[tuple[list[int], list[int]]]:
    """(layer, expert) pairs as products of layers and experts: one product, or else one for each expert."""
    layers, experts = (sorted(set(numbers)) for numbers in zip(*members, strict=True))
    if len(members) == len(layers) * len(experts):
        return [(layers, experts)]
    return [(sorted(layer for layer, own in members if own == expert), [expert]) for expert in experts]


def _group(row: Row, grid: tuple[list[int], list[int]]) -> dict[str, Any]:
    template, out_features, in_features, orientation = row
    layers, experts = ([number for number in numbers if number >= 0] for numbers in grid)
    group: dict[str, Any] = {"module": template, "layers": _count(layers)}
    if experts:
        group["experts"] = _count(experts)
    return group | {"out": out_features, "in": in_features, "orientation": orientation}


def _count(numbers: list[int]) -> int | list[int]:
    return len(numbers) if numbers == list(range(len(numbers))) else numbers


def _card(path: Path) -> Card:
    try:
        card = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise GeometryError(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(card, dict) or not {"names", "model_type", "groups"} <= set(card) <= _CARD_KEYS:
        raise GeometryError(
            f"{path}: a card has the keys names, model_type, groups and perhaps parameters and config, no others"
        )
    names, groups = card["names"], card["groups"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise GeometryError(f"{path}: names must be a list of texts")
    if not isinstance(card["model_type"], str):
        raise GeometryError(f"{path}: model_type must be text")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise GeometryError(f"{path}: groups must be a list of objects")
    parameters, config = card.get("parameters", 0), card.get("config", {})
    if type(parameters) is not int or parameters < 0 or not isinstance(config, dict):
        raise GeometryError(f"{path}: parameters must be a whole number and config an object")
    return Card(path.stem, tuple(names), card["model_type"], parameters, config, tuple(groups), path)


def _expand(path: Path, group: Mapping[str, Any]) -> Iterator[Row]:
    if set(group) - {"experts"} != _GROUP_KEYS:
        raise GeometryError(
            f"{path}: a group has the keys {', '.join(sorted(_GROUP_KEYS))} and perhaps experts, got {sorted(group)}"
        )
    template, orientation = group["module"], group["orientation"]
    out_features, in_features = group["out"], group["in"]
    if not isinstance(template, str) or orientation not in get_args(Orientation):
        raise GeometryError(f"{path}: module must be text and orientation linear or conv1d, got {group}")
    if any(type(size) is not int or size < 1 for size in (out_features, in_features)):
        raise GeometryError(f"{path}: {template}: out and in must be whole numbers above 0")
    modules = [template]
    for key, mark in (("layers", "{i}"), ("experts", "{e}")):
        modules = _fill(f"{path}: {template}", modules, mark, key, group.get(key, 0))
    for module in modules:
        yield module, out_features, in_features, orientation


def _fill(where: str, modules: list[str], mark: str, key: str, given: object) -> list[str]:
    numbers = list(range(given)) if type(given) is int else given
    if not isinstance(numbers, list) or any(type(number) is not int or number < 0 for number in numbers):
        raise GeometryError(f"{where}: {key} must be a count or a list of numbers from 0 on")
    if bool(numbers) != (mark in modules[0]):
        raise GeometryError(f"{where}: a module with {mark} needs {key}, and one without has 0 of them")
    return [module.replace(mark, str(number)) for module in modules for number in numbers] or modules
