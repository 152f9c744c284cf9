"""Strict YAML: an unknown key is an error with a suggestion, and all faults of a file come at once, in one line."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Collection, Hashable, Iterable
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError

from .errors import UsageError

# What reading YAML raises: the values that its types are made of, such as dates, raise what Python does.
FAULTS = (yaml.YAMLError, ValueError, LookupError, TypeError, OverflowError)


class Strict(BaseModel):
    """A frozen settings object that takes the keys it names and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Settings = TypeVar("Settings", bound=Strict)


class UniqueKeys(yaml.SafeLoader):
    """YAML that refuses a key given twice, which plain YAML would silently let the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys: list[Hashable] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in keys:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            keys.append(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, kind: type[Settings], overrides: Iterable[str] = (), **given: object) -> Settings:
    """Read a YAML file into a settings object.

    Args:
        path: the file; in messages as it was given.
        overrides: "dotted.key=value" each, the value read as YAML; what `--set` takes.
        given: keys that the file may leave out, because its place says them (a recipe's name).

    Raises:
        UsageError: no such file, no valid YAML, or faults in it, all of them named.
    """
    content = load_yaml(path)
    overridden = {_override(content, override) for override in overrides}
    return check({**given, **content}, kind, str(path), overridden=overridden)


def load_yaml(path: Path) -> dict[Any, Any]:
    """The keys and values of a YAML file, as they are.

    Raises:
        UsageError: no such file, no valid YAML, a key given twice, or no keys at the top.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), UniqueKeys)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    except RecursionError:
        raise UsageError(f"{path} is no usable YAML: its values are nested too deeply") from None
    except FAULTS as error:
        raise UsageError(f"{path} is no valid YAML: {_problem(error)}") from None
    if content is None:
        raise UsageError(f"{path} is empty: it must hold `key: value` lines")
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold `key: value` lines, but holds {type(content).__name__}")
    return content


def check(
    content: dict[str, Any],
    kind: type[Settings],
    where: str | None = None,
    flags: Collection[str] = (),
    overridden: Collection[str] = (),
) -> Settings:
    """A settings object of `content`.

    Args:
        where: its source, in messages.
        flags: keys that come from the command line, where their names are these with two dashes.
        overridden: dotted keys whose values come from the command line, and not from `where`.

    Raises:
        UsageError: faults, all of them named.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        faults = "; ".join(dict.fromkeys(_fault(dict(fault), kind, flags, overridden) for fault in error.errors()))
        raise UsageError(f"{where}: {faults}" if where else faults) from None


def unfit(reason: str) -> PydanticCustomError:
    """The fault that a validator raises where the message must not repeat the value, or need not."""
    return PydanticCustomError("unfit", "{reason}", {"reason": reason})


def _override(content: dict[str, Any], override: str) -> str:
    """Put a value in its place, and say which key it has."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {override!r} is not KEY=VALUE, for example training.learning_rate=1e-4")
    try:
        value = yaml.safe_load(text)
    except FAULTS:
        raise UsageError(f"--set {override!r}: the value is no valid YAML") from None
    if isinstance(value, str):  # YAML 1.1 wants a dot in 1e-4
        with contextlib.suppress(ValueError):
            value = float(value)
    *parents, last = key.split(".")
    place = content
    for parent in parents:
        inner = place.setdefault(parent, {})
        if not isinstance(inner, dict):
            inner = place[parent] = {}
        place = inner
    place[last] = value
    return key


def _problem(error: Exception) -> str:
    """Where in the file a YAML error is, and what it is."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"{f'line {mark.line + 1}: ' if mark else ''}{' '.join(problem.split())}"


def _fault(fault: dict[str, Any], kind: type[Strict], flags: Collection[str], overridden: Collection[str]) -> str:
    place = [str(part) for part in fault["loc"]]
    key = f"--{place[0]}" if place and place[0] in flags else ".".join(place)
    if key in overridden:
        key += " (from the command line)"
    if fault["type"] == "extra_forbidden":
        known = _keys(kind, place[:-1])
        near = difflib.get_close_matches(place[-1], known, n=1)
        return f"unknown key {key}" + (f", did you mean {near[0]}?" if near else f" (known: {', '.join(known)})")
    if fault["type"] == "missing":
        return f"{key} is missing"
    if fault["type"] == "unfit":
        return f"{key}: {fault['msg']}"
    return f"{key}: {fault['msg'].removeprefix('Value error, ')}, got {fault['input']!r}"


def _keys(kind: type[Strict], path: list[str]) -> list[str]:
    """The keys that the settings object at `path` inside `kind` takes."""
    kinds: list[Any] = [kind]
    for part in path:
        inner = [found.model_fields[part].annotation for found in kinds if part in found.model_fields]
        if inner:
            kinds = [leaf for annotation in inner for leaf in _leaves(annotation)]
    return sorted({name for found in kinds for name in found.model_fields})


def _leaves(annotation: Any) -> list[type[Strict]]:
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return [annotation]
    return [leaf for part in get_args(annotation) for leaf in _leaves(part)]
