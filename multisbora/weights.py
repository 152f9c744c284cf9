"""Lambdas: how much of each task goes into a composition, as one number a task or one a pattern of its matrices."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from .delta import pattern_value
from .errors import UsageError
from .patterns import MAX_PATTERNS, check_pattern
from .settings import load_yaml
from .untrusted import read_json, shown

DEFAULT = "default"
Weight = float | Mapping[str, float]
By = Literal["task", "kind", "layer", "matrix", "channel"]
SUFFIXES = (".yaml", ".yml", ".json")
_SHOWN = 8  # patterns that people are shown one by one


@dataclass(frozen=True, slots=True)
class TaskWeight:
    """Lambda of one task in every matrix.

    Attributes:
        default: lambda where no pattern names the matrix.
        patterns: (pattern, lambda) in order; the first one that names a matrix decides, as in `delta.pattern_value`.
    """

    default: float = 1.0
    patterns: tuple[tuple[str, float], ...] = ()

    def at(self, module: str) -> float:
        """Lambda in one matrix, by its module's name."""
        return pattern_value(dict(self.patterns), module, self.default)

    def to_json(self) -> float | dict[str, float]:
        """A number where there are no patterns; else {"default": lambda, pattern: lambda, ...}."""
        return {DEFAULT: self.default, **dict(self.patterns)} if self.patterns else self.default

    def __str__(self) -> str:
        if len(self.patterns) > _SHOWN:
            lambdas = [value for _, value in self.patterns]
            return f"{self.default:g}, {len(lambdas)} patterns {min(lambdas):g} to {max(lambdas):g}"
        patterns = "".join(f", {pattern} {value:g}" for pattern, value in self.patterns)
        return f"{self.default:g}{patterns}"

    @classmethod
    def of(cls, value: object, task: str) -> TaskWeight:
        """Read what `to_json` gives; a mapping may leave its default out.

        Args:
            task: what a message calls it.

        Raises:
            UsageError: it is something else, a lambda is not finite, or a pattern is no regular expression.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            return cls(_number(value, f"the weight of {task}"))
        if len(value) > MAX_PATTERNS:
            raise UsageError(f"the weight of {task} has {len(value)} patterns, {MAX_PATTERNS} are the most: use fewer")
        patterns = []
        for pattern, number in value.items():
            if not isinstance(pattern, str) or not pattern:
                raise UsageError(f"the weight of {task} has the key {pattern!r}: use {DEFAULT} or a pattern of modules")
            try:
                check_pattern(pattern)
            except UsageError as error:
                raise UsageError(f"the weight of {task} in {pattern!r}: {error}") from None
            if pattern != DEFAULT:
                patterns.append((pattern, _number(number, f"the weight of {task} in {pattern}")))
        return cls(_number(value.get(DEFAULT, 1.0), f"the weight of {task}"), tuple(patterns))


def resolve(tasks: Iterable[str], given: Mapping[str, Weight | TaskWeight] | None) -> dict[str, TaskWeight]:
    """The weight of each task, 1 where none is given.

    Raises:
        UsageError: one is given for a task that is not there, or is not a weight.
    """
    names = list(tasks)
    for task in given or {}:
        if task not in names:
            raise UsageError(f"a weight is given for {task!r}, which is not merged: the tasks are {', '.join(names)}")
    return {name: TaskWeight.of((given or {}).get(name, 1.0), name) for name in names}


def require_use(weight: TaskWeight, task: str, modules: Iterable[str]) -> None:
    """Refuse a pattern that names none of a task's matrices: it would be read and ignored.

    Raises:
        UsageError: there is one.
    """
    names = list(modules)
    for pattern, _ in weight.patterns:
        if not any(pattern_value({pattern: True}, name, False) for name in names):
            kinds = sorted({name.rpartition(".")[2] for name in names})
            raise UsageError(
                f"the weight of {task} in {pattern!r} names none of its matrices: their kinds are {', '.join(kinds)}"
            )


def parse_weights(given: Sequence[str], from_file: Mapping[str, TaskWeight] | None = None) -> dict[str, TaskWeight]:
    """Read `--weight` options: TASK=LAMBDA, or TASK:PATTERN=LAMBDA for the matrices that a pattern names.

    Args:
        from_file: what a file says. TASK=LAMBDA stands for all of that; patterns alone go before it.

    Raises:
        UsageError: one is something else, or is given twice.
    """
    found: dict[str, dict[str, float]] = {}
    for text in given:
        name, _, number = text.rpartition("=")
        task, colon, pattern = name.partition(":")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not task or (colon and pattern in ("", DEFAULT)) or not math.isfinite(value):
            raise UsageError(f"--weight {text!r} is not TASK=LAMBDA or TASK:PATTERN=LAMBDA, for example math=0.8")
        if (pattern or DEFAULT) in found.setdefault(task, {}):
            raise UsageError(f"--weight {name} is given twice: give one lambda")
        found[task][pattern or DEFAULT] = value
    told = {task: TaskWeight.of(values, task) for task, values in found.items()}
    for task, file in (from_file or {}).items():
        if task in told and DEFAULT not in found[task]:
            rest = tuple(part for part in file.patterns if part[0] not in found[task])
            told[task] = TaskWeight(file.default, (*told[task].patterns, *rest))
    return told


@dataclass(frozen=True)
class GivenWeights:
    """What `--weight` options and a file of `--weights-from` say, before it is known of which tasks.

    Attributes:
        file: the file; None where there is none.
        from_file: what it says.
        options: what the options say, of what the file says where they leave it.
    """

    file: Path | None
    from_file: Mapping[str, TaskWeight]
    options: Mapping[str, TaskWeight]

    @classmethod
    def read(cls, given: Sequence[str], file: Path | None) -> GivenWeights:
        """Read both.

        Raises:
            UsageError: as `parse_weights` and `read_weights`.
        """
        from_file = read_weights(file) if file else {}
        return cls(file, from_file, parse_weights(given, from_file))

    def of(self, tasks: Collection[str], say: Callable[[str], None], done: str) -> dict[str, TaskWeight]:
        """Those of the tasks of a composition; an option for another task is left to whoever takes them to refuse.

        Args:
            say: told of tasks in the file that are not among `tasks`.
            done: what is not done with those, in that message.

        Raises:
            UsageError: the file has a weight for none of the tasks.
        """
        if unused := [shown(task) for task in sorted(set(self.from_file) - set(tasks))]:
            if len(unused) == len(self.from_file):
                raise UsageError(f"{self.file} has weights of {', '.join(unused)}, and for none of {', '.join(tasks)}")
            say(f"{self.file}: the weights of {', '.join(unused)} are not used, since they are not {done}")
        return {task: value for task, value in self.from_file.items() if task in tasks} | dict(self.options)


def read_weights(path: str | os.PathLike[str]) -> dict[str, TaskWeight]:
    """Read a file of weights, YAML or JSON: `task: lambda`, or `task: {default: lambda, pattern: lambda}`.

    Raises:
        UsageError: it is missing, unreadable, or something else.
    """
    path = Path(path)
    content = _load_json(path) if path.suffix == ".json" else _numbers(load_yaml(path))
    if not isinstance(content, dict) or not content or any(not isinstance(task, str) for task in content):
        raise UsageError(f"{path} holds no weights: write a line `task: lambda` for each task")
    try:
        return {task: TaskWeight.of(value, task) for task, value in content.items()}
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _numbers(value: Any, depth: int = 2) -> Any:
    """What YAML holds, with numbers where it reads words: it wants a dot in 1e-4. As deep as weights are."""
    if isinstance(value, dict) and depth:
        return {key: _numbers(inner, depth - 1) for key, inner in value.items()}
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def grouped(modules: Iterable[str], by: By) -> dict[str, list[str]]:
    """The modules that share a lambda, by a pattern that names them: all, those of one kind ("q_proj"), those of one
    numbered block, or each alone (by channel too). A module outside of all blocks is a layer of its own.

    Raises:
        UsageError: there are more groups than a weight may have patterns.
    """
    found: dict[str, list[str]] = {}
    for module in modules:
        found.setdefault(_pattern(module, by), []).append(module)
    if len(found) >= MAX_PATTERNS:
        raise UsageError(
            f"{len(found)} lambdas a task are more than the {MAX_PATTERNS - 1} patterns that a weight may have: group "
            "them by layer, kind or task"
        )
    # A name is the last parts of a longer one in models of several towers: the longer one is asked first.
    return dict(sorted(found.items(), key=lambda item: -item[1][0].count(".")))


def _pattern(module: str, by: By) -> str:
    if by == "task":
        return ".*"
    if by == "kind":
        return _literal(module.rpartition(".")[2])
    if by == "layer" and (block := re.match(r"(?:.*?\.)?\d+(?=\.)", module)):
        return _literal(block[0]) + r"\..*"
    return _literal(module)


def _literal(name: str) -> str:
    return re.escape(name).replace(r"\-", "-")  # `patterns` is quick with names whose dots alone are escaped


def folded(lambdas: Mapping[str, float], by: By) -> TaskWeight:
    """A task's lambdas as the weight that gives them: one number where they are equal, else a pattern for each group in
    which they are, or for each matrix.

    Args:
        lambdas: module -> lambda, at least one.
    """
    default = round(math.fsum(lambdas.values()) / len(lambdas), 4)
    if len(set(lambdas.values())) == 1:
        return TaskWeight(next(iter(lambdas.values())))
    groups = grouped(lambdas, by)
    weight = TaskWeight(default, tuple((pattern, lambdas[group[0]]) for pattern, group in groups.items()))
    if by == "matrix" or all(weight.at(module) == value for module, value in lambdas.items()):
        return weight
    return folded(lambdas, "matrix")


def write_weights(path: str | os.PathLike[str], weights: Mapping[str, TaskWeight], note: str = "") -> None:
    """Write a file that `read_weights` reads, JSON or YAML by its suffix: the same lambdas, bit for bit.

    Args:
        note: a line for people at the top; JSON has no place for it.

    Raises:
        UsageError: another suffix.
    """
    path = Path(path)
    check_suffix(path)
    content = {task: weight.to_json() for task, weight in weights.items()}
    if path.suffix == ".json":
        text = json.dumps(content, indent=2)
    else:
        text = f"# {note}\n" * bool(note) + yaml.safe_dump(content, sort_keys=False, width=1000).rstrip()
    path.write_text(f"{text}\n", encoding="utf-8")


def check_by(by: str) -> None:
    """
    Raises:
        UsageError: it is none of `By`.
    """
    if by not in get_args(By):
        raise UsageError(f"by {by!r} is unknown: use {', '.join(get_args(By))}")


def check_suffix(path: Path) -> None:
    """Refuse a file of weights that its suffix does not tell as YAML or JSON.

    Raises:
        UsageError: it does not.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path} is no file of weights: name it with one of {', '.join(SUFFIXES)}")


def _load_json(path: Path) -> object:
    """JSON as JSON: to YAML 1.1, what Python writes as 1e-05 is text."""
    try:
        content: object = read_json(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}; give a file of weights") from None
    except ValueError as error:
        raise UsageError(f"{path} is no valid JSON ({error}): write {{task: lambda}}") from None
    return content


def _number(value: object, what: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise UsageError(f"{what} must be a finite number, got {value!r:.60}")
    return number
