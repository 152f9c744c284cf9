"""Rows to look at a model with: always the same, none of the test, and every one in exactly one batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from multisbora import probe as module
from multisbora.dataset import Example
from multisbora.errors import DataError
from multisbora.loading import load_tokenizer
from multisbora.probe import batches, probe
from multisbora.recipe import load


def rows_of(found: Sequence[Example]) -> list[int]:
    return [example.row for example in found]


def test_the_same_rows_each_time_and_the_fewer_among_the_more(project: Path, base: Path) -> None:
    recipe, tokenizer, said = load("adding", Path("tasks")), load_tokenizer(base), list[str]()
    every = probe(recipe, tokenizer, 100, said.append)
    assert sorted(rows_of(every)) == list(range(1, 13)) and rows_of(every) != sorted(rows_of(every))
    assert said == ["task adding has no dev rows: training rows stand for them; set dev_size to hold some out"]
    for rows in (1, 5, 12):
        assert probe(recipe, tokenizer, rows, said.append) == every[:rows]
    other = load("adding", Path("tasks"), ["training.seed=1"])
    assert rows_of(probe(other, tokenizer, 100, said.append)) != rows_of(every)


def test_dev_rows_alone(project: Path, base: Path) -> None:
    recipe, tokenizer = load("adding", Path("tasks"), ["dev_size=4"]), load_tokenizer(base)
    assert len(probe(recipe, tokenizer, 100, pytest.fail)) == 4
    refused(lambda: probe(recipe, tokenizer, 3, pytest.fail, least=4), DataError, "has 3 rows to look at", "needs 4")


def test_rows_that_were_learned(project: Path, base: Path) -> None:
    """Training rows though there are dev rows, which are not among them."""
    recipe, tokenizer = load("adding", Path("tasks"), ["dev_size=4"]), load_tokenizer(base)
    learned, dev = (probe(recipe, tokenizer, 100, pytest.fail, learned=which) for which in (True, False))
    assert len(learned) == 8 and len(dev) == 4
    assert not {tuple(x.input_ids) for x in learned} & {tuple(x.input_ids) for x in dev}
    assert probe(recipe, tokenizer, 3, pytest.fail, learned=True) == learned[:3]


def test_learned_rows_that_are_all_test_rows(project: Path, base: Path) -> None:
    """Other rows are asked for, and no dev rows, which there are."""
    train = Path("data/adding-train.jsonl").read_text()
    Path("data/dev.jsonl").write_text(train.replace('"instruction": "', '"instruction": "Now '))
    Path("data/adding-test.jsonl").write_text(train)
    recipe, tokenizer = load("adding", Path("tasks"), ["dev=data/dev.jsonl"]), load_tokenizer(base)
    assert len(probe(recipe, tokenizer, 100, pytest.fail)) == 12
    refused(
        lambda: probe(recipe, tokenizer, 100, pytest.fail, learned=True), DataError, "are also test rows: give others"
    )


@pytest.mark.parametrize("dev", [[], ["dev_size=4"]])
def test_test_rows_that_lack_a_field_are_in_nobodys_way(project: Path, base: Path, dev: list[str]) -> None:
    """As in training, which says so."""
    recipe, tokenizer, said = load("adding", Path("tasks"), dev), load_tokenizer(base), list[str]()
    every = probe(recipe, tokenizer, 100, said.append)
    Path("data/adding-test.jsonl").write_text('{"question": "of another kind"}\n')
    assert probe(recipe, tokenizer, 100, said.append) == every


@settings(deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=20), st.integers(1, 100), st.booleans())
def test_every_example_is_in_one_batch(lengths: list[int], tokens: int, packed: bool) -> None:
    examples = [Example(list(range(size)), 1, row) for row, size in enumerate(lengths, 1)]
    model = SimpleNamespace(device=torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "packs", lambda _: packed)
        found = list(batches(model, examples, tokens))
    answers, places = 0, []
    for batch in found:
        inputs, ids = batch.inputs, batch.inputs["input_ids"]
        assert ids.numel() <= tokens or ids.numel() in lengths
        assert inputs["use_cache"] is False and "labels" not in inputs
        answers += batch.tokens
        places += batch.places[batch.labels != -100].tolist()
        assert not batch.places[batch.labels == -100].any()
    assert answers == sum(size - 1 for size in lengths)
    assert places == [place for size in lengths for place in range(1, size)]
