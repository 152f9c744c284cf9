"""Rows to look at a model with, and the batches in which it reads them: what measuring, tuning and crosstalk share."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .dataset import Example, Row, check_examples, encode, load_rows, overlap, pack, packs, pad, split
from .errors import DataError
from .recipe import Recipe

BATCH_TOKENS = 2048
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows of one task.

    Attributes:
        inputs: arguments of the model.
        labels: those that line up with its logits, -100 where there is none.
        places: like `labels`, int64: 1 at the first token of each answer, 2 at the second, and so on; 0 elsewhere.
    """

    inputs: dict[str, Any]
    labels: Tensor
    places: Tensor

    @property
    def tokens(self) -> int:
        """How many are of an answer."""
        return int(torch.count_nonzero(self.places))


def opening_loss(outputs: Any, batch: Batch) -> Tensor:
    """The nats of a batch's answer tokens, summed, of which the p-th of an answer counts 1 / p.

    What an answer will be is settled by its first words. That is where one task speaks in another's voice, and the rest
    follows what was said: tokens that all count alike hide it.

    Args:
        outputs: of the model, logits (batch, positions, vocabulary).
    """
    nats = F.cross_entropy(outputs.logits.flatten(0, -2).float(), batch.labels.reshape(-1), reduction="none")
    return (nats / batch.places.reshape(-1).clamp(min=1)).sum()  # (tokens,), 0 where there is no label


def probe(
    recipe: Recipe, tokenizer: Any, rows: int, say: Say, *, least: int = 1, learned: bool = False
) -> list[Example]:
    """Examples of a task that are no test rows: its dev rows, which no adapter learned, or else training rows.

    The same rows each time, drawn with the recipe's `training.seed`; those of a smaller number are among those of a
    larger one. Examples are cut as in training.

    Args:
        rows: how many at most.
        least: how many there must be.
        learned: training rows, though there are dev rows.

    Raises:
        DataError: rows are missing or do not fit the recipe, most of them are cut, or too few are left.
    """
    known = [row for _, row in load_rows(recipe.train)]
    dev = None if recipe.dev is None else [row for _, row in load_rows(recipe.dev)]
    test = _test_rows(recipe)
    parts = split(recipe, known, dev, test)
    found = {} if learned else dict(parts.dev)
    if not found:
        if not learned:
            say(f"task {recipe.name} has no dev rows: training rows stand for them; set dev_size to hold some out")
        tested = {_asked(recipe, row) for row in test}
        found = {number: row for number, row in parts.train.items() if _asked(recipe, row) not in tested}
        if not found:
            remedy = "give others" if learned else "name dev rows"
            raise DataError(f"task {recipe.name}: all {len(known)} training rows are also test rows: {remedy}")
    order = sorted(found)
    random.Random(f"{recipe.training.seed} {recipe.name}").shuffle(order)
    kind: Literal["", "dev "] = "dev " if parts.dev and not learned else ""
    encoded = encode(
        recipe, {row: found[row] for row in order[:rows]}, tokenizer, recipe.training.cutoff, f"{kind}row".strip()
    )
    allowed = recipe
    if 2 * encoded.truncated <= len(encoded.examples):  # a few rows can have more by chance than the run that learned
        training = recipe.training.model_copy(update={"max_truncated": 0.5})
        allowed = recipe.model_copy(update={"training": training})
    check_examples(encoded, allowed, say, kind)
    if len(encoded.examples) < least:
        raise DataError(
            f"task {recipe.name} has {len(encoded.examples)} rows to look at, and this needs {least}: give more"
        )
    return encoded.examples


def _test_rows(recipe: Recipe) -> list[Row]:
    """The test rows, as far as they can be told from others: none where some are missing or lack a field."""
    try:
        rows = [row for _, row in load_rows(recipe.eval.data)]
        overlap(recipe, (), rows)
    except DataError:  # training says so, who looks at a model has nothing to do with them
        return []
    return rows


def _asked(recipe: Recipe, row: Row) -> str:
    """A row's prompt, by which test rows are known again, white space and case aside."""
    prompt, _ = recipe.fill({**row, recipe.target: ""}, f"a row of task {recipe.name}")
    return " ".join(prompt.lower().split())


def batches(model: Any, examples: Sequence[Example], tokens: int = BATCH_TOKENS) -> Iterator[Batch]:
    """Examples in batches, in their order.

    A batch holds examples of `tokens` tokens at most, padding included, or one example. They are packed where the model
    keeps packed examples apart; `attention.use_packed_attention` makes that cheap.
    """
    packed = packs(model)
    for group in _groups(examples, tokens, packed):
        batch: dict[str, Any] = pack(group) if packed else pad(group, 0)
        batch["places"] = _places(group, batch["labels"], packed)
        placed = {key: value.to(model.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        labels, places = placed.pop("labels"), placed.pop("places")
        yield Batch({**placed, "use_cache": False}, labels, places)


def _places(group: Sequence[Example], labels: Tensor, packed: bool) -> Tensor:
    """`Batch.places`."""
    if packed:
        return torch.cat([torch.arange(1, len(x.input_ids) - x.answer_start + 1) for x in group])[None]
    answered = labels != -100
    return answered.cumsum(1) * answered


def _groups(examples: Sequence[Example], tokens: int, packed: bool) -> Iterator[list[Example]]:
    group: list[Example] = []
    for example in examples:
        sizes = [len(other.input_ids) for other in (*group, example)]
        if group and (sum(sizes) if packed else max(sizes) * len(sizes)) > tokens:
            yield group
            group = []
        group.append(example)
    if group:
        yield group
