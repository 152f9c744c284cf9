"""The demo's data: true arithmetic, sound facts, and nothing of the test in training."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from string import Formatter

import pytest

from multisbora.demo import data
from multisbora.demo.data import Facts, Row, facts_file, load_facts, make_commonsense, make_math, write_demo_data
from multisbora.demo.problems import PROBLEMS, SUBSETS
from multisbora.errors import DataError

EQUATION = re.compile(r"(\d+) ([-+x/]) (\d+) = (\d+)")
OPTIONS = re.compile(r"Answer1: (.+) Answer2: (.+) Answer3: (.+) Answer4: (.+)$", re.MULTILINE)
PREFIX = "Please choose the correct answer to the question: "

Sides = tuple[list[Row], list[Row]]


@pytest.fixture(scope="module")
def math() -> Sides:
    return make_math()


@pytest.fixture(scope="module")
def facts() -> Facts:
    return load_facts(facts_file())


@pytest.fixture(scope="module")
def commonsense() -> Sides:
    return make_commonsense(facts_file())


def numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted(int(number) for number in re.findall(r"\d+", text)))


def equations(row: Row) -> list[tuple[int, str, int, int]]:
    return [(int(x), sign, int(y), int(z)) for x, sign, y, z in EQUATION.findall(row["output"])]


def options(row: Row) -> tuple[str, ...]:
    found = OPTIONS.search(row["instruction"])
    assert found, row
    return found.groups()


def question(row: Row) -> str:
    return row["instruction"].removeprefix(PREFIX).split("\n\n")[0]


def asked(facts: Facts) -> dict[tuple[str, str], set[tuple[str, str, str]]]:
    """(category, question) -> the facts (relation, subject, answer) that it can ask for."""
    found: dict[tuple[str, str], set[tuple[str, str, str]]] = {}
    for category, relation in facts.relations():
        for subject, answer in relation.facts.items():
            for template in relation.templates:
                key = (category, template.format(subject=subject))
                found.setdefault(key, set()).add((relation.relation, subject, answer))
    return found


# math


def test_math_counts(math: Sides) -> None:
    train, test = math
    assert (len(train), len(test)) == (2_500, 300)
    assert SUBSETS == ("addition", "subtraction", "multiplication", "division", "two_step")
    assert Counter(row["subset"] for row in train) == dict.fromkeys(SUBSETS, 500)
    assert Counter(row["subset"] for row in test) == dict.fromkeys(SUBSETS, 60)
    assert len({row["instruction"] for row in train + test}) == 2_800
    assert len({row["subset"] for row in train[:50]}) == 5, "rows are not shuffled"


def test_math_templates_differ_and_use_their_numbers() -> None:
    assert len(PROBLEMS) >= 24
    assert len({problem.story for problem in PROBLEMS}) == len(PROBLEMS)
    for problem in PROBLEMS:
        used = [field for _, field, _, _ in Formatter().parse(problem.story) if field in ("a", "b", "c")]
        assert sorted(used) == sorted(problem.limits), problem.story
        shown = [field for _, field, _, _ in Formatter().parse(problem.work) if field in ("eq", "eq2")]
        assert shown == ["eq", "eq2"][: len(problem.steps)], problem.work
        assert len(problem.steps) == (2 if problem.subset == "two_step" else 1)


def test_math_every_answer_is_right(math: Sides) -> None:
    for row in math[0] + math[1]:
        assert set(row) == {"subset", "instruction", "output", "answer"}
        steps = equations(row)
        assert len(steps) == (2 if row["subset"] == "two_step" else 1), row
        for x, sign, y, z in steps:
            assert {"+": x + y, "-": x - y, "x": x * y, "/": x / y}[sign] == z >= 2, row
        for before, after in pairwise(steps):
            assert before[3] in (after[0], after[2]), f"the second step does not use the first: {row}"
        assert row["answer"] == str(steps[-1][3])
        assert row["output"].endswith(f" The answer is {row['answer']}.")
        given = [number for x, _, y, _ in steps for number in (x, y)]
        for _, _, _, between in steps[:-1]:
            given.remove(between)
        assert tuple(sorted(given)) == numbers(row["instruction"]), f"the story has other numbers: {row}"


@pytest.mark.parametrize("seed", [0, 1])
def test_math_test_numbers_are_never_trained_on(seed: int) -> None:
    train, test = make_math(seed)
    stories = {numbers(row["instruction"]) for row in train}
    pairs = {tuple(sorted((x, y))) for row in train for x, _, y, _ in equations(row)}
    assert len(stories) > 1_000
    for row in test:
        assert numbers(row["instruction"]) not in stories | pairs, row
        for x, _, y, _ in equations(row):
            assert tuple(sorted((x, y))) not in stories | pairs, row


def test_math_rows_are_short_clean_english(math: Sides) -> None:
    for row in math[0] + math[1]:
        text = f"{row['instruction']} {row['output']}"
        assert not re.search(r"[{}_]|  ", text), text
        assert not re.search(r"\b[aA] [aeiou]|\b1\b", text), text
        assert len(re.findall(r"\w+|[^\w\s]", text)) <= 70, text
    lengths = sorted(len(re.findall(r"\w+|[^\w\s]", row["instruction"] + " " + row["output"])) for row in math[0])
    assert lengths[len(lengths) * 9 // 10] <= 60


def test_math_says_when_it_runs_out_of_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_TRIES", 1)
    with pytest.raises(DataError, match="ask for fewer math rows"):
        make_math(0, 50, 50)


# commonsense


def test_facts_counts(facts: Facts) -> None:
    assert len(facts.categories) >= 14
    assert sum(len(relation.facts) for _, relation in facts.relations()) >= 600
    names = [relation.relation for _, relation in facts.relations()]
    assert len(set(names)) == len(names)


def test_facts_subjects_and_answers_differ_but_for_case(facts: Facts) -> None:
    for _, relation in facts.relations():
        subjects = [subject.casefold() for subject in relation.facts]
        assert len(set(subjects)) == len(subjects), relation.relation
        texts = {*relation.facts.values(), *relation.wrong}
        assert len({text.casefold() for text in texts}) == len(texts) >= 4, relation.relation
        assert not set(relation.wrong) & set(relation.facts.values()), relation.relation
        assert not any(re.search(r"Answer\d", text) for text in texts)


def test_facts_never_stand_twice_nor_turned_round(facts: Facts) -> None:
    def bare(text: str) -> str:
        return re.sub(r"^(a|an|the|in a|in the|on a|some) ", "", text.casefold())

    pairs = Counter((bare(s), bare(a)) for _, relation in facts.relations() for s, a in relation.facts.items())
    assert [pair for pair, times in pairs.items() if times > 1] == []
    assert [pair for pair in pairs if pair[::-1] in pairs] == []


def test_facts_templates_are_filled(facts: Facts) -> None:
    for _, relation in facts.relations():
        assert len(set(relation.templates)) == len(relation.templates) >= 2
        for template in relation.templates:
            assert "{subject}" in template
            for subject in relation.facts:
                filled = template.format(subject=subject)
                assert subject in filled
                assert not re.search(r"[{}]|  |\n", filled), filled
                assert filled.endswith(("?", ".")), filled


def test_commonsense_counts(commonsense: Sides, facts: Facts) -> None:
    train, test = commonsense
    assert len(train) == 2_500
    assert len(test) >= 120
    for rows in commonsense:
        assert {row["subset"] for row in rows} == set(facts.categories)
        assert len({row["instruction"] for row in rows}) == len(rows)
    total = sum(len(relation.facts) for _, relation in facts.relations())
    assert 0.17 <= len(test) / total <= 0.23


def test_commonsense_rows_have_one_right_option(commonsense: Sides, facts: Facts) -> None:
    by_question = asked(facts)
    for row in commonsense[0] + commonsense[1]:
        assert set(row) == {"subset", "instruction", "output", "answer"}
        assert row["instruction"].startswith(PREFIX)
        assert row["instruction"].endswith("\n\nAnswer format: answer1/answer2/answer3/answer4")
        assert row["output"] == f"the correct answer is {row['answer']}"
        offered = options(row)
        assert len({option.casefold() for option in offered}) == 4, row
        right = {answer for _, _, answer in by_question[row["subset"], question(row)]}
        assert [f"answer{place}" for place, option in enumerate(offered, start=1) if option in right] == [row["answer"]]


@pytest.mark.parametrize("seed", [0, 1])
def test_commonsense_test_facts_are_never_trained_on(seed: int, facts: Facts) -> None:
    by_question = asked(facts)
    train, test = make_commonsense(facts_file(), seed)
    known, held_out = (
        [fact for row in rows for fact in by_question[row["subset"], question(row)]] for rows in (train, test)
    )
    assert not set(known) & set(held_out)
    assert not {fact[1:] for fact in known} & {fact[1:] for fact in held_out}
    assert len(set(held_out)) == len(held_out) == len(test), "a test fact is asked twice"
    assert len(set(known)) + len(held_out) == sum(len(relation.facts) for _, relation in facts.relations())
    assert {name for name, _, _ in held_out} <= {name for name, _, _ in known}


def test_commonsense_training_covers_every_fact_before_any_twice(commonsense: Sides, facts: Facts) -> None:
    by_question = asked(facts)
    known = [next(iter(by_question[row["subset"], question(row)])) for row in commonsense[0]]
    once = len(set(known))
    assert once > 480
    for start in range(0, len(known), once):
        chunk = known[start : start + once]
        assert len(set(chunk)) == len(chunk)


def test_commonsense_training_never_calls_a_test_answer_wrong(commonsense: Sides, facts: Facts) -> None:
    by_question = asked(facts)
    answers: dict[str, set[str]] = {}
    for row in commonsense[0]:
        for name, _, answer in by_question[row["subset"], question(row)]:
            answers.setdefault(name, set()).add(answer)
    pools = {relation.relation: set(relation.wrong) for _, relation in facts.relations()}
    for row in commonsense[0]:
        (name, *_), *_ = by_question[row["subset"], question(row)]
        assert set(options(row)) <= answers[name] | pools[name], row


def test_commonsense_positions_are_balanced(commonsense: Sides) -> None:
    for rows in commonsense:
        counts = Counter(row["answer"] for row in rows)
        assert set(counts) == {"answer1", "answer2", "answer3", "answer4"}
        assert max(counts.values()) - min(counts.values()) <= 1
    runs = Counter(after["answer"] for before, after in pairwise(commonsense[0]) if before["answer"] == "answer1")
    assert min(runs[f"answer{place}"] for place in range(1, 5)) > 100, (
        f"the next position follows from the one before: {runs}"
    )


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_commonsense_refuses_a_share_that_is_none(share: float) -> None:
    with pytest.raises(DataError, match="test_share"):
        make_commonsense(facts_file(), 0, share)


# a facts file with faults


GOOD = """
categories:
  pets:
    - relation: sound
      templates: ["What does {subject} say?", "How does {subject} sound?"]
      facts: {a dog: woof, a cat: meow, a cow: moo, a pig: oink}
"""


def test_a_small_table_without_test_facts(tmp_path: Path) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text(GOOD)
    train, test = make_commonsense(path, 0, 0.0, train_rows=20)
    assert len(train) == 20
    assert test == []
    with pytest.raises(DataError, match="ask for fewer commonsense rows"):
        make_commonsense(path, 0, 0.0, train_rows=4 * 2 * 24 + 1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("a cat:", "a dog:", "'a dog' is given twice"),
        ("a cat:", "A Dog:", "a subject twice but for case"),
        ("meow", "Woof", "equal but for case"),
        ("meow", "woof", "3 different options and needs 4"),
        ("meow", "yes", r"facts\.a cat: Input should be a valid string"),
        ("meow", '""', "at least 1 character"),
        ("      facts:", "      fact:", r"relations?|fact: Extra inputs"),
        ("{subject} say", "it say", "template 'What does it say\\?' needs {subject}"),
        ("{subject} say", "{animal} say", "needs {subject}"),
        (', "How does {subject} sound?"', "", "at least 2 items"),
        ("categories:", "categories: [", "not a readable YAML file"),
        ("categories:", "kinds:", "categories: Field required; kinds: Extra inputs"),
    ],
)
def test_a_faulty_table_is_refused_in_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "facts.yaml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(DataError, match=message) as caught:
        load_facts(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.yaml: the table of facts cannot be read"):
        load_facts(tmp_path / "none.yaml")


# files


def test_written_files_hold_the_rows_and_repeat_byte_for_byte(tmp_path: Path, math: Sides, commonsense: Sides) -> None:
    first, again = write_demo_data(tmp_path / "a"), write_demo_data(tmp_path / "b")
    assert list(first) == ["math/train", "math/test", "commonsense/train", "commonsense/test"]
    for (name, path), rows in zip(first.items(), (*math, *commonsense), strict=True):
        assert path == tmp_path / "a" / f"{name}.jsonl"
        assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == rows
        assert path.read_bytes() == again[name].read_bytes()
    assert sorted(path for path in (tmp_path / "a").rglob("*") if path.is_file()) == sorted(first.values())


def test_another_seed_gives_other_rows(math: Sides, commonsense: Sides) -> None:
    assert make_math(1) != math
    assert make_commonsense(facts_file(), 1) != commonsense


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "math").write_text("a file, no folder")
    with pytest.raises(DataError, match="cannot be written"):
        write_demo_data(tmp_path)
    assert (tmp_path / "math").read_text() == "a file, no folder"


def test_a_failed_write_leaves_the_old_file_and_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_demo_data(tmp_path)
    before = paths["math/train"].read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.os, "replace", full)
    with pytest.raises(DataError, match="No space left"):
        write_demo_data(tmp_path, seed=1)
    assert paths["math/train"].read_bytes() == before
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(paths.values())
