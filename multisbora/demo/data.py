"""The demo's data: arithmetic word problems, and multiple-choice questions from a table of everyday facts.

Rows have the keys of the paper's data (`subset`, `instruction`, `output`, `answer`), so the demo's recipes read like
any other. Nothing tested is ever trained on: for math no equation and no set of numbers, for commonsense no fact.
Everything follows from a seed: the same seed gives the same bytes, on every machine.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from string import Formatter
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import DataError
from ..resources import tasks_dir
from ..settings import UniqueKeys
from .problems import PROBLEMS, SUBSETS, Problem, scene

Row = dict[str, str]
"""One example: `subset`, `instruction` (what the model is asked), `output` (what it learns to say), `answer` (gold)."""

OPTIONS = 4

# A row that cannot be made within so many draws will not be found at all.
_TRIES = 20_000


# ------------------------------------------------------------------------------------------------------------- math


def make_math(seed: int = 0, train_rows: int = 2_500, test_rows: int = 300) -> tuple[list[Row], list[Row]]:
    """Word problems over five subsets (`SUBSETS`), evenly; each subset goes round its templates evenly.

    Every pair and triple of numbers belongs, by a hash, to either training or test. A problem is drawn only from its
    own side: the numbers of its story, and the two numbers of each of its equations, in any order, never occur on the
    other side, in whatever template. All numbers are whole and at least 2.

    Returns:
        (train, test): rows in random order; `answer` is digits, `output` a worked equation and "The answer is N.".

    Raises:
        DataError: more rows are asked for than there are different problems.
    """
    seen: set[str] = set()
    sides = []
    for test, total in ((False, train_rows), (True, test_rows)):
        rng = random.Random(f"multisbora demo math {seed} {'test' if test else 'train'}")
        mine = partial(_on_side, seed, test)
        rows: list[Row] = []
        for index, subset in enumerate(SUBSETS):
            share = total // len(SUBSETS) + (index < total % len(SUBSETS))
            rows += _math_rows(rng, [problem for problem in PROBLEMS if problem.subset == subset], share, seen, mine)
        rng.shuffle(rows)
        sides.append(rows)
    return sides[0], sides[1]


def _math_rows(
    rng: random.Random, problems: list[Problem], count: int, seen: set[str], mine: Callable[[Sequence[int]], bool]
) -> list[Row]:
    rng.shuffle(problems)
    rows: list[Row] = []
    while len(rows) < count:
        if not problems:
            raise DataError(
                f"there are no more than {len(rows)} different problems of one kind: ask for fewer math rows"
            )
        problem = problems.pop(0)
        if row := _math_row(rng, problem, seen, mine):
            rows.append(row)
            problems.append(problem)  # its turn comes again; a template that is used up does not
    return rows


def _on_side(seed: int, test: bool, numbers: Sequence[int]) -> bool:
    """Whether these numbers, in any order, are the test's (a fifth of all pairs, a third of triples) or training's."""
    digest = sha256(f"{seed}:{sorted(numbers)}".encode()).digest()
    held_out = int.from_bytes(digest[:8], "big") % (5 if len(numbers) == 2 else 3) == 0
    return held_out == test


def _math_row(
    rng: random.Random, problem: Problem, seen: set[str], mine: Callable[[Sequence[int]], bool]
) -> Row | None:
    for _ in range(_TRIES):
        numbers = {name: rng.randint(low, high) for name, (low, high) in problem.limits.items()}
        solved = _solve(problem.steps, numbers)
        if solved is None:
            continue
        equations, operands, result = solved
        if not all(mine(key) for key in (tuple(numbers.values()), *operands)):
            continue
        words: dict[str, Any] = {**scene(rng), **numbers, **dict(zip(("eq", "eq2"), equations, strict=False))}
        story = problem.story.format_map(words)
        if story in seen:
            continue
        seen.add(story)
        output = f"{problem.work.format_map(words)} The answer is {result}."
        return {"subset": problem.subset, "instruction": story, "output": output, "answer": str(result)}
    return None


def _solve(steps: Sequence[str], numbers: dict[str, int]) -> tuple[list[str], list[tuple[int, int]], int] | None:
    """(equations, operands of each, last result), or None where a result is broken or below 2."""
    known = dict(numbers)
    equations, operands = [], []
    for step in steps:
        left, sign, right = step.split()
        x, y = known[left], known[right]
        if sign == "/" and x % y:
            return None
        known["p"] = {"+": x + y, "-": x - y, "x": x * y, "/": x // y}[sign]
        if known["p"] < 2:
            return None
        equations.append(f"{x} {sign} {y} = {known['p']}")
        operands.append((x, y))
    return equations, operands, known["p"]


# ------------------------------------------------------------------------------------------------------ commonsense

Text = Annotated[str, Field(min_length=1, pattern=r"^\S(.*\S)?$")]


class Relation(BaseModel):
    """Facts that answer the same question about different subjects. Its answers exclude each other (facts.yaml)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    relation: Text
    templates: Annotated[list[Text], Field(min_length=2)]
    facts: Annotated[dict[Text, Text], Field(min_length=2)]
    wrong: list[Text] = []

    @field_validator("templates")
    @classmethod
    def _subject_alone(cls, templates: list[str]) -> list[str]:
        for template in templates:
            fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
            if fields != ["subject"]:
                raise ValueError(f"template {template!r} needs {{subject}}, once, and no other field")
        return templates

    @model_validator(mode="after")
    def _answers_differ(self) -> Relation:
        subjects = [subject.casefold() for subject in self.facts]
        if twice := {subject for subject in subjects if subjects.count(subject) > 1}:
            raise ValueError(f"relation {self.relation!r} has a subject twice but for case: {sorted(twice)}")
        options = [*dict.fromkeys(self.facts.values()), *self.wrong]
        folded = [option.casefold() for option in options]
        if twice := {option for option in folded if folded.count(option) > 1}:
            raise ValueError(f"relation {self.relation!r} has options that are equal but for case: {sorted(twice)}")
        if len(options) < OPTIONS:
            raise ValueError(f"relation {self.relation!r} has {len(options)} different options and needs {OPTIONS}")
        return self


class Facts(BaseModel):
    """The table of facts: relations by category."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    categories: Annotated[dict[Text, Annotated[list[Relation], Field(min_length=1)]], Field(min_length=1)]

    def relations(self) -> Iterator[tuple[str, Relation]]:
        """(category, relation), in the file's order."""
        for category, relations in self.categories.items():
            for relation in relations:
                yield category, relation


def facts_file() -> Path:
    """The table of facts that ships with multisbora."""
    return tasks_dir() / "demo" / "facts.yaml"


def load_facts(path: str | os.PathLike[str]) -> Facts:
    """Read a table of facts and check it.

    Raises:
        DataError: the file is missing, is no YAML, names a key twice, or does not fit; all faults in one line.
    """
    try:
        loaded = yaml.load(Path(path).read_text(encoding="utf-8"), UniqueKeys)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the table of facts cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not a readable YAML file: {' '.join(str(error).split())}") from error
    try:
        return Facts.model_validate(loaded)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(str(part) for part in fault['loc']) or 'the file'}: {fault['msg']}" for fault in error.errors()
        )
        raise DataError(f"{path}: {faults}; correct the table of facts") from error


@dataclass(frozen=True)
class _Fact:
    category: str
    relation: Relation
    subject: str
    answer: str
    pool: tuple[str, ...]  # what its wrong options are drawn from


def make_commonsense(
    facts_path: str | os.PathLike[str], seed: int = 0, test_share: float = 0.2, train_rows: int = 2_500
) -> tuple[list[Row], list[Row]]:
    """Multiple-choice questions with four options, from a table of facts.

    Each relation gives `test_share` of its facts to the test, which asks each of them once. The others are asked again
    and again in training, every fact before any a second time, so that any first part of the rows covers the table
    evenly; a repeated fact gets another template, other wrong options or another order. The right answer is at each of
    the four places equally often. Training draws its wrong options from training answers: were they drawn from the
    test's, the model would learn that those are wrong.

    Returns:
        (train, test): `answer` is "answer1" to "answer4", `output` "the correct answer is answerN".

    Raises:
        DataError: the table cannot be read, `test_share` is not in [0, 1), or too few different questions are possible.
    """
    if not 0 <= test_share < 1:
        raise DataError(f"test_share is {test_share}: give the share of facts to test, at least 0 and below 1")
    train, test = _split(load_facts(facts_path), random.Random(f"multisbora demo facts {seed}"), test_share)
    return (
        _questions(random.Random(f"multisbora demo commonsense {seed} train"), train, train_rows),
        _questions(random.Random(f"multisbora demo commonsense {seed} test"), test, len(test)),
    )


def _split(facts: Facts, rng: random.Random, test_share: float) -> tuple[list[_Fact], list[_Fact]]:
    train: list[_Fact] = []
    test: list[_Fact] = []
    for category, relation in facts.relations():
        kept = dict(relation.facts)
        held_out: dict[str, str] = {}
        for subject in rng.sample(list(kept), len(kept)):
            if len(held_out) == round(test_share * len(relation.facts)):
                break
            answers = {answer for other, answer in kept.items() if other != subject}
            if len(answers) + len(relation.wrong) >= OPTIONS:  # training must still fill its four options
                held_out[subject] = kept.pop(subject)
        for side, chosen, answers_of in ((train, kept, kept), (test, held_out, relation.facts)):
            pool = (*dict.fromkeys(answers_of.values()), *relation.wrong)
            side.extend(_Fact(category, relation, subject, answer, pool) for subject, answer in chosen.items())
    return train, test


def _questions(rng: random.Random, facts: Sequence[_Fact], count: int) -> list[Row]:
    if count and not facts:
        raise DataError("no facts are left for training: lower test_share")
    places = [index % OPTIONS for index in range(count)]
    rng.shuffle(places)
    rows: list[Row] = []
    seen: set[str] = set()
    while len(rows) < count:
        for fact in rng.sample(facts, min(len(facts), count - len(rows))):
            rows.append(_question(rng, fact, places[len(rows)], seen))
    return rows


def _question(rng: random.Random, fact: _Fact, place: int, seen: set[str]) -> Row:
    others = [answer for answer in fact.pool if answer != fact.answer]
    for _ in range(_TRIES):
        options = rng.sample(others, OPTIONS - 1)
        options.insert(place, fact.answer)
        question = rng.choice(fact.relation.templates).format(subject=fact.subject)
        listed = " ".join(f"Answer{number}: {option}" for number, option in enumerate(options, start=1))
        names = [f"answer{number}" for number in range(1, OPTIONS + 1)]
        instruction = (
            f"Please choose the correct answer to the question: {question}\n\n{listed}\n\n"
            f"Answer format: {'/'.join(names)}"
        )
        if instruction not in seen:
            seen.add(instruction)
            output = f"the correct answer is {names[place]}"
            return {"subset": fact.category, "instruction": instruction, "output": output, "answer": names[place]}
    raise DataError(f"no new question about {fact.subject!r} after {_TRIES} draws: ask for fewer commonsense rows")


# ------------------------------------------------------------------------------------------------------------ files


def write_demo_data(folder: str | os.PathLike[str], seed: int = 0) -> dict[str, Path]:
    """Write `<folder>/{math,commonsense}/{train,test}.jsonl`, each appearing whole or not at all.

    Returns:
        {"math/train": path, "math/test": path, "commonsense/train": path, "commonsense/test": path}.

    Raises:
        DataError: a file cannot be written.
    """
    made = {"math": make_math(seed), "commonsense": make_commonsense(facts_file(), seed)}
    paths: dict[str, Path] = {}
    for task, sides in made.items():
        for side, rows in zip(("train", "test"), sides, strict=True):
            path = Path(folder) / task / f"{side}.jsonl"
            _write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            paths[f"{task}/{side}"] = path
    return paths


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_bytes(text.encode())
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{path}: the demo's data cannot be written: {error}; free the space or choose a folder"
        ) from error
