"""From a recipe's rows to token batches without padding and without logits that nobody needs.

An example is prompt + answer + end-of-sequence. A batch is its examples laid end to end in one sequence, with position
ids that start anew at each example: transformers builds the block-diagonal mask from them. The model computes logits
at `logits_to_keep` alone, the positions that predict an answer token.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .errors import DataError
from .recipe import Recipe, Source

_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# Where a model's configuration says how far back a layer sees.
_REACHES = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size")
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one example; those from `answer_start` on are what the model learns or is scored on.

    Attributes:
        row: number of its row among those of its source, from 1; 0 where there is none.
    """

    input_ids: list[int]
    answer_start: int
    row: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Examples, and what became of the other rows.

    Attributes:
        truncated: rows that the cutoff cut, `shown` is one of them.
        dropped: those of them that had no room for a single answer token, and are no examples.
        empty: rows whose target is empty, and are no examples.
    """

    examples: list[Example]
    truncated: int
    dropped: int
    empty: int
    shown: str

    @property
    def digest(self) -> str:
        """sha256 (hex) of all examples in their order."""
        content = [[example.answer_start, example.input_ids] for example in self.examples]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def tokens(self) -> int:
        return sum(len(example.input_ids) for example in self.examples)


def load_rows(sources: Sequence[Source]) -> list[tuple[str | None, Row]]:
    """All rows of some sources, each with its source's `subset`.

    Raises:
        DataError: a file is missing or unreadable, a hub id cannot be fetched, or there is no row.
    """
    rows = [(source.subset, row) for source in sources for row in _read(source)]
    if not rows:
        raise DataError(f"{', '.join(source.path for source in sources)}: no rows")
    return rows


def _read(source: Source) -> list[Row]:
    import datasets

    suffix = Path(source.path.partition("?")[0]).suffix.lower()
    remote = "://" in source.path
    if suffix in _FORMATS and source.config is not None:
        raise DataError(f"data file {source.path} has no configurations: leave config {source.config!r} out")
    file = Path(source.path).expanduser()
    if not remote and (suffix in _FORMATS or source.path.startswith((".", "/", "~"))):
        if not file.is_file():
            raise DataError(f"data file {source.path} does not exist (paths are relative to {Path.cwd()})")
        if suffix not in _FORMATS:
            raise DataError(f"data file {source.path} is none of {', '.join(_FORMATS)}")
    with _quiet(datasets):
        if not remote and file.is_file() and not file.stat().st_size:
            raise DataError(f"data file {source.path} is empty: give it rows, or name another one")
        try:
            if suffix in _FORMATS and (remote or file.is_file()):
                path = source.path if remote else str(file)
                found = datasets.load_dataset(_FORMATS[suffix], data_files=path, split=source.split)
            else:
                found = datasets.load_dataset(source.path, source.config, split=source.split)
        except Exception as error:  # datasets lets every kind of error of its readers and of the network through
            reason = " ".join(str(error.__cause__ or error).split())[:300]
            raise DataError(f"data source {source.path} cannot be read: {reason}") from None
    return [dict(row) for row in found]


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@dataclass(frozen=True, slots=True)
class Split:
    """Training rows and dev rows, each {number of the row in its source, from 1: row}. No prompt is in both.

    Attributes:
        of_training: whether the dev rows are training rows that are held out.
        in_training, in_test: dev rows that are left out, because their prompt is a training row's or a test row's.
    """

    train: dict[int, Row]
    dev: dict[int, Row]
    of_training: bool = False
    in_training: int = 0
    in_test: int = 0


def split(recipe: Recipe, rows: Sequence[Row], dev: Sequence[Row] | None, test: Sequence[Row]) -> Split:
    """Set the dev rows of a recipe apart.

    Rows that are held out of the training rows (`dev_size`) are drawn by prompt, from `training.seed` alone: whether a
    row is held out does not depend on where it stands. Rows with the same prompt stay together, and test rows are never
    among them.

    Args:
        rows: all training rows.
        dev: rows of the recipe's `dev`, if it has one.
        test: rows whose prompts may not be dev rows' prompts.

    Raises:
        DataError: a row lacks a field, no dev row is left, or no training row.
    """
    numbered = dict(enumerate(rows, 1))
    if dev is None and recipe.dev_size is None:
        return Split(numbered, {})
    tested = {_prompt(recipe, row, f"test row {number}") for number, row in enumerate(test, 1)}
    groups: dict[str, list[int]] = {}
    for number, row in numbered.items():
        groups.setdefault(_prompt(recipe, row, f"row {number} of task {recipe.name}"), []).append(number)
    if dev is not None:
        asked = {n: _prompt(recipe, row, f"dev row {n} of task {recipe.name}") for n, row in enumerate(dev, 1)}
        kept = {n: dev[n - 1] for n, prompt in asked.items() if prompt not in groups and prompt not in tested}
        if not kept:
            raise DataError(f"task {recipe.name}: all {len(dev)} dev rows are also training rows or test rows")
        in_test = sum(prompt in tested for prompt in asked.values())
        return Split(numbered, kept, in_training=len(dev) - len(kept) - in_test, in_test=in_test)

    size = recipe.dev_size or 0.0
    wanted = int(size) if size >= 1 else max(1, round(size * len(rows)))
    if wanted >= len(rows):
        raise DataError(f"task {recipe.name}: dev_size {size:g} leaves none of {len(rows)} rows to train on")
    held: set[int] = set()
    for prompt in sorted(groups.keys() - tested, key=lambda text: _draw(recipe.training.seed, text)):
        if len(held) + len(groups[prompt]) <= wanted:
            held.update(groups[prompt])
    if not held:
        raise DataError(
            f"task {recipe.name}: no rows can be held out as dev_size {size:g} asks: rows with the same prompt stay "
            "together, and test rows stay out; name dev rows with dev, or raise dev_size"
        )
    train = {number: row for number, row in numbered.items() if number not in held}
    return Split(train, {number: numbered[number] for number in sorted(held)}, of_training=True)


def _draw(seed: int, prompt: str) -> bytes:
    return hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()


def encode(
    recipe: Recipe,
    rows: Sequence[Row] | Mapping[int, Row],
    tokenizer: Any,
    cutoff: int | None = None,
    what: str = "row",
) -> Encoded:
    """Tokenise rows. Prompt and answer are tokenised apart, so that their boundary is the same in training and in use.

    Args:
        rows: in a mapping, by their numbers.
        cutoff: tokens an example may have; None keeps all.
        what: a row is called in messages.

    Raises:
        DataError: a row lacks a field, or the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer of this base model has no end-of-sequence token, which recipe {recipe.name} needs"
        )
    examples, truncated, dropped, empty, shown = [], 0, 0, 0, ""
    for number, row in rows.items() if isinstance(rows, Mapping) else enumerate(rows, 1):
        prompt, target = recipe.fill(row, f"{what} {number} of task {recipe.name}")
        if not target.strip():
            empty += 1
            continue
        prompt_ids = tokenizer(prompt).input_ids
        ids = [*prompt_ids, *tokenizer(target, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        if cutoff is not None and len(ids) > cutoff:
            truncated += 1
            shown = shown or f"{what} {number} has {len(ids)} tokens: {' '.join((prompt + target).split())[-80:]!r}"
            if len(prompt_ids) >= cutoff:
                dropped += 1
                continue
            ids = ids[:cutoff]
        # Nothing predicts the first token of an empty prompt's answer where the tokenizer adds no token of its own.
        examples.append(Example(ids, max(len(prompt_ids), 1), number))
    return Encoded(examples, truncated, dropped, empty, shown)


def check_examples(encoded: Encoded, recipe: Recipe, say: Any, kind: Literal["", "dev "] = "") -> None:
    """Say how many rows are empty or cut, and show one that is.

    Args:
        kind: of the rows, in messages; "" is training rows.

    Raises:
        DataError: more than the recipe allows, or nothing left.
    """
    total = len(encoded.examples) + encoded.dropped
    if encoded.empty:
        say(f"task {recipe.name}: {encoded.empty} {kind}rows have an empty {recipe.target} and are left out")
    if not encoded.examples:
        raise DataError(
            f"task {recipe.name}: no {kind}row is left to {'score' if kind else 'train on'}: none has "
            f"both a {recipe.target} and a prompt below the cutoff of {recipe.training.cutoff} tokens"
        )
    if not encoded.truncated:
        return
    share = encoded.truncated / total
    cutoff = recipe.training.cutoff
    counted = f"task {recipe.name}: {encoded.truncated} of {total} {kind}examples ({share:.1%}) exceed {cutoff} tokens"
    if share > recipe.training.max_truncated:
        raise DataError(
            f"{counted}, more than training.max_truncated {recipe.training.max_truncated:.1%} "
            f"({encoded.shown}): raise training.cutoff, or max_truncated"
        )
    say(f"{counted} and are cut ({encoded.dropped} left out whole); {encoded.shown}")


def overlap(recipe: Recipe, train: Sequence[Row], test: Sequence[Row]) -> int:
    """How many test rows have a prompt that also occurs in training, white space and case aside.

    Raises:
        DataError: a row lacks a field of the prompt; the target may be missing.
    """
    seen = {_prompt(recipe, row, f"training row {number}") for number, row in enumerate(train, 1)}
    return sum(_prompt(recipe, row, f"test row {number}") in seen for number, row in enumerate(test, 1))


def _prompt(recipe: Recipe, row: Row, where: str) -> str:
    return _normal(recipe.fill({**row, recipe.target: row.get(recipe.target) or ""}, where)[0])


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


def pack(examples: Sequence[Example]) -> dict[str, Any]:
    """One batch without padding.

    Returns:
        input_ids, position_ids: (1, tokens). logits_to_keep: (answer tokens,), positions in the sequence whose logits
        predict an answer token. labels: (1, answer tokens), the tokens they predict. All int64.
        The bounds of the examples, for each kind of attention: example_lengths, tokens of each, is read by
        `attention.packed_attention`. cu_seq_lens_q and cu_seq_lens_k, (examples + 1,) int32, the starts and the end,
        and max_length_q and max_length_k, tokens of the longest, are read by transformers' flash attention, which would
        otherwise search the position ids for them in every layer.
    """
    ids: list[int] = []
    positions: list[int] = []
    keep: list[int] = []
    labels: list[int] = []
    for example in examples:
        keep += range(len(ids) + example.answer_start - 1, len(ids) + len(example.input_ids) - 1)
        labels += example.input_ids[example.answer_start :]
        positions += range(len(example.input_ids))
        ids += example.input_ids
    lengths = [len(example.input_ids) for example in examples]
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "logits_to_keep": torch.tensor(keep, dtype=torch.long),
        "labels": torch.tensor([labels], dtype=torch.long),
        "example_lengths": lengths,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def pad(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """One padded batch, for models that cannot tell packed examples apart.

    Returns:
        input_ids, attention_mask: (batch, longest). labels: (batch, longest), the next token where it belongs to the
        answer, -100 elsewhere, so that they line up with the logits as in `pack`. Padding is on the right.
    """
    longest = max(len(example.input_ids) for example in examples)
    shape = (len(examples), longest)
    batch = {
        "input_ids": torch.full(shape, pad_id),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, -100),
    }
    for row, example in enumerate(examples):
        length, start = len(example.input_ids), example.answer_start
        batch["input_ids"][row, :length] = torch.tensor(example.input_ids)
        batch["attention_mask"][row, :length] = 1
        batch["labels"][row, start - 1 : length - 1] = torch.tensor(example.input_ids[start:])
    return batch


@torch.no_grad()
def packs(model: PreTrainedModel) -> bool:
    """Whether a model keeps packed examples apart: asked of the model itself, with two short sequences.

    Compares the logits of the second one in a packed batch with those that it has alone: as a packed batch of one,
    where they must agree closely, and by the model's own masks, whose 16-bit attention rounds in another way. Both
    sequences are longer than the model's window or chunk where that is short, so that its masks say something.
    """
    mode = model.training
    model.eval()
    length = _reach(model) + 4
    one = Example([5 + place % 5 for place in range(length + 1)], 1)
    two = Example([4 - place % 4 for place in range(length)], 1)
    both, alone = pack([one, two]), pack([two])
    plain = {key: alone[key] for key in ("input_ids", "position_ids", "logits_to_keep")}
    try:
        packed, wanted, own = (
            model(
                **{k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"},
                use_cache=False,
            ).logits[0]
            for batch in (both, alone, plain)
        )
    except (TypeError, ValueError, NotImplementedError):  # no position_ids or logits_to_keep, or only for some batches
        return False
    finally:
        model.train(mode)
    if packed.shape[0] != both["logits_to_keep"].numel():
        return False
    packed = packed[-wanted.shape[0] :].float()
    # Attention that leaks from one example into the next moves logits by far more than rounding does: SmolLM2-135M's in
    # bf16 by 0.84 of their norm, where rounding over its 30 layers makes up to 0.09.
    bounds = (1e-3, 1e-3) if model.dtype == torch.float32 else (3e-2, 0.3)
    return all(
        bool((packed - other.float()).norm() <= bound * other.float().norm())
        for other, bound in zip((wanted, own), bounds, strict=True)
    )


def _reach(model: PreTrainedModel) -> int:
    """Tokens of the shortest window or chunk of a model's attention; 0 where it is long, or no text longer."""
    config = model.config.get_text_config()
    longest = min(256, (getattr(config, "max_position_embeddings", None) or math.inf) - 5)
    found = (getattr(config, name, None) for name in _REACHES)
    return min((size for size in found if isinstance(size, int) and 0 < size <= longest), default=0)


def check_fit(
    config: Any, examples: Sequence[Example], what: str, remedy: str, loss: str, say: Callable[[str], None]
) -> None:
    """Refuse examples with tokens or lengths that a model does not have.

    Args:
        what, remedy, loss: as for `check_length`.

    Raises:
        DataError: a token is beyond the model's vocabulary, or a text longer than its table of positions.
    """
    size = getattr(config.get_text_config(), "vocab_size", None)
    highest = max(max(example.input_ids) for example in examples)
    if size is not None and highest >= size:
        raise DataError(
            f"{what}: its rows have token {highest}, and the vocabulary of this model has {size}: the tokenizer beside "
            "it is another model's, put its own there"
        )
    check_length(config, max(len(example.input_ids) for example in examples), what, remedy, loss, say)


def check_length(config: Any, needed: int, what: str, remedy: str, loss: str, say: Callable[[str], None]) -> None:
    """Refuse texts longer than a table of learned positions; say where rotary positions go beyond their training.

    Args:
        needed: tokens of the longest text.
        what, remedy, loss: in messages; who needs them, what to do ("{known}" stands for the model's positions), and
            what a text suffers that is too long all the same.

    Raises:
        DataError: `needed` tokens are more than the model has positions.
    """
    text = config.get_text_config()
    known = getattr(text, "max_position_embeddings", None)
    if known is None or needed <= known:
        return
    message = f"{what} needs up to {needed} tokens at a time and the model was made for {known}"
    if getattr(text, "rope_parameters", None) is None and getattr(config, "rope_parameters", None) is None:
        raise DataError(f"{message}: {remedy.format(known=known)}")
    say(f"{message}: {loss}")
