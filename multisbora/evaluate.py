"""Scores of a base model, an adapter or a merged checkpoint on the test rows of tasks, as the paper takes them.

Two numbers a row: whether the answer is right, which is taken from generated text (or from the option that the model
finds most likely), and how many nats the model loses on the target text. The second one needs no luck with formats and
moves long before the first.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import peft
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import GenerationConfig

from .answers import LETTERS, OPTION_WORDS, extract, is_right
from .attention import use_packed_attention
from .dataset import Example, Row, check_length, encode, load_rows, pack, packs, pad
from .errors import DataError, UsageError
from .loading import load_model
from .recipe import Metric, Recipe
from .view import Kind

Method = Literal["generate", "choice"]
Say = Callable[[str], None]

BATCH_TOKENS = 2048


# ------------------------------------------------------------------------------------------------------------ scores


@dataclass(frozen=True, slots=True)
class SubsetScore:
    """score: share of right answers. nll: nats per token of the target texts and their end-of-sequence, None where all
    targets are empty. n: rows."""

    score: float
    nll: float | None
    n: int

    def to_json(self) -> dict[str, Any]:
        return {"score": self.score, "nll": self.nll, "n": self.n}


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One task. `score` is the mean over rows, `subset_mean` over subsets (the paper's average); `nll` over tokens."""

    score: float
    subset_mean: float
    nll: float | None
    n: int
    subsets: dict[str, SubsetScore]

    def to_json(self) -> dict[str, Any]:
        subsets = {name: subset.to_json() for name, subset in self.subsets.items()}
        return {
            "score": self.score,
            "subset_mean": self.subset_mean,
            "nll": self.nll,
            "n": self.n,
            "subsets": subsets,
        }


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of one model, by task."""

    tasks: dict[str, TaskScore]

    def to_json(self) -> dict[str, Any]:
        return {"tasks": {name: task.to_json() for name, task in self.tasks.items()}}


@dataclass(frozen=True, slots=True)
class _Question:
    """One test row, filled into its recipe. `number` counts the task's rows from 1."""

    number: int
    row: Row
    subset: str
    prompt: str
    target: str
    gold: str
    metric: Metric
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Reply:
    """What a model answered: the extracted answer, and what a person is shown beside the prompt."""

    answer: str | None
    shown: str


def evaluate(
    model_path: str | os.PathLike[str],
    recipes: Sequence[Recipe],
    *,
    base: str | os.PathLike[str] | None = None,
    method: Method = "generate",
    limit: int | None = None,
    batch_size: int = 16,
    num_beams: int | None = None,
    max_new_tokens: int | None = None,
    adapters: Sequence[str | os.PathLike[str]] = (),
    base_view: str | None = None,
    quantization: Kind | None = None,
    say: Say = lambda message: None,
    verbose: bool = False,
    seed: int = 0,
) -> Evaluation:
    """Score a model on the test rows of tasks. Nothing is sampled: same model, rows and machine, same scores.

    Args:
        model_path, base, adapters, base_view, quantization: see `load_model`.
        recipes: of the tasks.
        method: "generate" takes the answer from generated text; "choice" takes the option whose text (the recipe's
            `eval.choice`) has the highest log-likelihood, summed over its tokens, after the prompt.
        limit: rows a task at most. They are drawn with `seed`, from every subset by its share, the same ones for every
            model; those of a lower limit are among those of a higher one.
        batch_size: prompts generated at a time.
        num_beams, max_new_tokens: in place of the recipe's.
        say: told what a person should know.
        verbose: also tell `say` every prompt, once, with the reply, the answer in it and the gold answer.

    Raises:
        UsageError: an argument that cannot mean anything, or "choice" for a subset without options.
        DataError: test rows that are missing or do not fit the recipe or the model.
        CheckpointError, AdapterError: see `load_model`.
    """
    given = {"limit": limit, "batch_size": batch_size, "num_beams": num_beams, "max_new_tokens": max_new_tokens}
    for name, value in given.items():
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")
    if method not in ("generate", "choice"):
        raise UsageError(f"method {method!r} is unknown: use generate or choice")
    names = [recipe.name for recipe in recipes]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"name at least one task, and each once: got {', '.join(names) or 'none'}")
    asked = [_questions(recipe, limit, seed, say) for recipe in recipes]
    if method == "choice":
        _check_options(recipes, asked)
    loaded, tokenizer = load_model(model_path, base, adapters, base_view=base_view, quantization=quantization, say=say)
    model = loaded.get_base_model() if isinstance(loaded, peft.PeftModel) else loaded
    scores = {}
    for recipe, questions in zip(recipes, asked, strict=True):
        limits = recipe.eval.model_copy(
            update={k: given[k] for k in ("num_beams", "max_new_tokens") if given[k] is not None}
        )
        recipe = recipe.model_copy(update={"eval": limits})
        losses = _losses(model, tokenizer, recipe, questions, say)
        if method == "choice":
            replies = _choose(model, tokenizer, recipe, questions, say)
        else:
            replies = _generate(model, tokenizer, recipe, questions, batch_size, say)
        scores[recipe.name] = _score(questions, replies, losses)
        if verbose:
            for question, reply in zip(questions, replies, strict=True):
                say(_show(recipe, question, reply))
    return Evaluation(scores)


def _score(questions: list[_Question], replies: list[_Reply], losses: list[tuple[float, int]]) -> TaskScore:
    right = [is_right(r.answer, q.gold, q.metric) for q, r in zip(questions, replies, strict=True)]

    def over(rows: Sequence[int]) -> SubsetScore:
        tokens = sum(losses[i][1] for i in rows)
        nll = math.fsum(losses[i][0] for i in rows) / tokens if tokens else None
        return SubsetScore(sum(right[i] for i in rows) / len(rows), nll, len(rows))

    groups: dict[str, list[int]] = {}
    for i, question in enumerate(questions):
        groups.setdefault(question.subset, []).append(i)
    subsets = {name: over(rows) for name, rows in groups.items()}
    whole = over(range(len(questions)))
    mean = sum(subset.score for subset in subsets.values()) / len(subsets)
    return TaskScore(whole.score, mean, whole.nll, whole.n, subsets)


def _show(recipe: Recipe, question: _Question, reply: _Reply) -> str:
    verdict = "right" if is_right(reply.answer, question.gold, question.metric) else "wrong"
    answer = "no answer found" if reply.answer is None else f"answer {reply.answer}"
    head = f"--- {recipe.name}, {question.subset}, row {question.number}: {verdict} ({answer}, gold {question.gold})"
    return f"{head}\n{question.prompt}{reply.shown}"


# -------------------------------------------------------------------------------------------------------------- rows


def _questions(recipe: Recipe, limit: int | None, seed: int, say: Say) -> list[_Question]:
    """The test rows of a task, drawn down to `limit`, in the order of the data."""
    settings = recipe.eval
    options = {_key(name): words for name, words in settings.options.items()}
    metrics = {_key(name): metric for name, metric in settings.metrics.items()}
    names: dict[str, str] = {}  # a subset goes by the first of its spellings
    questions, odd = [], []
    for number, (source, row) in enumerate(load_rows(settings.data), 1):
        where = f"test row {number} of task {recipe.name}"
        prompt, target = recipe.fill(row, where)
        if row.get(settings.answer) is None:
            raise DataError(f"{where}: it has no {settings.answer}, the field that eval.answer names")
        named = source or row.get(settings.subset_field)
        subset = str(named) if named is not None else "all"
        key = _key(subset)
        subset = names.setdefault(key, subset)
        metric = metrics.get(key, settings.metric)
        words = options.get(key, LETTERS if metric == "letter" else ())
        gold = _gold(str(row[settings.answer]), metric, words)
        question = _Question(
            number, row, subset, prompt, target, gold or str(row[settings.answer]), metric, tuple(words)
        )
        questions.append(question)
        if gold is None:
            odd.append(question)
    for subset in names.values():
        _check_gold(recipe, subset, questions, odd, say)
    return _sample(questions, limit, f"{seed} {recipe.name}")


def _key(subset: str) -> str:
    return subset.casefold().replace("-", "_")


def _gold(text: str, metric: Metric, options: Sequence[str]) -> str | None:
    """A gold answer as `extract` would give it, or None if `extract` never could."""
    text = text.strip()
    if metric == "number":
        try:
            return text.replace(",", "") if math.isfinite(float(text.replace(",", ""))) else None
        except ValueError:
            return extract(text, metric)
    if metric == "letter":
        text = text.strip("().[]").upper()
        return text if text in options else None
    found = extract(text, metric, options)
    return found if found == text.casefold() else None


def _check_gold(recipe: Recipe, subset: str, questions: list[_Question], odd: list[_Question], say: Say) -> None:
    bad = [question for question in odd if question.subset == subset]
    if not bad:
        return
    first = bad[0]
    wanted = "a number" if first.metric == "number" else f"one of {', '.join(first.options or [OPTION_WORDS])}"
    example = f"row {first.number} says {first.gold!r}, metric {first.metric!r} wants {wanted}"
    total = sum(question.subset == subset for question in questions)
    if len(bad) == total:
        raise DataError(
            f"task {recipe.name}, subset {subset}: no gold answer can ever be given ({example}): "
            "correct eval.metric, eval.options or eval.answer of the recipe"
        )
    say(f"task {recipe.name}, subset {subset}: {len(bad)} of {total} rows will count as wrong ({example})")


def _sample(questions: list[_Question], limit: int | None, key: str) -> list[_Question]:
    """`limit` rows, at least one a subset where that fits and the rest by the subsets' shares."""
    if limit is None or limit >= len(questions):
        return questions
    groups: dict[str, list[int]] = {}
    for i, question in enumerate(questions):
        groups.setdefault(question.subset, []).append(i)
    ranked = []
    for order, (subset, rows) in enumerate(groups.items()):
        random.Random(f"{key} {_key(subset)}").shuffle(rows)
        ranked += [(place / len(rows), order, row) for place, row in enumerate(rows)]
    return [questions[row] for row in sorted(row for _, _, row in sorted(ranked)[:limit])]


def _check_options(recipes: Sequence[Recipe], asked: list[list[_Question]]) -> None:
    for recipe, questions in zip(recipes, asked, strict=True):
        for question in questions:
            if question.options:
                continue
            hint = "" if question.metric == "number" else ", or name them in eval.options of the recipe"
            raise UsageError(
                f"task {recipe.name}, subset {question.subset}, has no options to choose from: "
                f"use method generate{hint}"
            )


# -------------------------------------------------------------------------------------------------------- likelihoods


@torch.no_grad()
def log_likelihoods(model: Any, examples: Sequence[Example]) -> list[float]:
    """How likely a model finds the answer of each example: the sum over its tokens of log p, in nats.

    Examples are packed, up to `BATCH_TOKENS` tokens a batch, where the model keeps them apart, and padded where not.

    Args:
        model: a transformers model in eval mode; adapters may be active in it. Its attention is what it was afterwards.
    """
    packing = use_packed_attention(model)
    try:
        packed = packs(model)
        sums = [0.0] * len(examples)
        for rows in _batches([len(example.input_ids) for example in examples], packed):
            batch = [examples[row] for row in rows]
            terms = _packed_terms(model, batch) if packed else _padded_terms(model, batch)
            counts = [len(example.input_ids) - example.answer_start for example in batch]
            for row, part in zip(rows, terms.double().cpu().split(counts), strict=True):
                sums[row] = part.sum().item()
        return sums
    finally:
        if packing:
            model.set_attn_implementation("sdpa")


def _packed_terms(model: Any, batch: list[Example]) -> Tensor:
    """log p of every answer token of a batch, in order, (answer tokens,), fp32."""
    inputs = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in pack(batch).items()}
    labels = inputs.pop("labels")[0]
    logits = model(**inputs, use_cache=False).logits[0]  # (answer tokens, vocabulary)
    return -F.cross_entropy(logits.float(), labels, reduction="none")


def _padded_terms(model: Any, batch: list[Example]) -> Tensor:
    inputs = {k: v.to(model.device) for k, v in pad(batch, 0).items()}
    labels = inputs.pop("labels")
    answers = labels != -100
    logits = model(**inputs, use_cache=False).logits[answers]  # (answer tokens, vocabulary)
    return -F.cross_entropy(logits.float(), labels[answers], reduction="none")


def _batches(lengths: list[int], packed: bool) -> Iterator[list[int]]:
    """Indices of examples, longest first, in batches of at most BATCH_TOKENS tokens, padding included, or of one."""
    batch: list[int] = []
    tokens = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        size = lengths[row] if packed or not batch else lengths[batch[0]]
        if batch and tokens + size > BATCH_TOKENS:
            yield batch
            batch, tokens, size = [], 0, lengths[row]
        batch.append(row)
        tokens += size
    if batch:
        yield batch


def _losses(
    model: Any, tokenizer: Any, recipe: Recipe, questions: list[_Question], say: Say
) -> list[tuple[float, int]]:
    """(nats, tokens) of each row's target text; (0, 0) where it is empty."""
    held = [i for i, question in enumerate(questions) if question.target.strip()]
    examples = encode(recipe, [questions[i].row for i in held], tokenizer).examples
    _check_length(model, recipe, max((len(example.input_ids) for example in examples), default=0), say)
    losses = [(0.0, 0)] * len(questions)
    for i, example, value in zip(held, examples, log_likelihoods(model, examples), strict=True):
        losses[i] = (-value, len(example.input_ids) - example.answer_start)
    return losses


def _choose(model: Any, tokenizer: Any, recipe: Recipe, questions: list[_Question], say: Say) -> list[_Reply]:
    """The most likely option of each row; the first one of equals."""
    examples = []
    for question in questions:
        prompt = tokenizer(question.prompt).input_ids
        for option in question.options:
            text = recipe.eval.choice.format(option=option)
            examples.append(Example([*prompt, *tokenizer(text, add_special_tokens=False).input_ids], len(prompt)))
    _check_length(model, recipe, max(len(example.input_ids) for example in examples), say)
    found = iter(log_likelihoods(model, examples))
    replies = []
    for question in questions:
        likely = {option: next(found) for option in question.options}
        shown = ", ".join(f"{option} {value:.3f}" for option, value in likely.items())
        replies.append(_Reply(max(likely, key=lambda option: likely[option]), f"[log-likelihoods: {shown}]"))
    return replies


def _check_length(model: Any, recipe: Recipe, needed: int, say: Say) -> None:
    remedy, loss = "lower max_new_tokens, or leave long rows out", "scores of its longest rows say little"
    check_length(model.config, needed, f"task {recipe.name}", remedy, loss, say)


# --------------------------------------------------------------------------------------------------------- generation


def _generate(
    model: Any, tokenizer: Any, recipe: Recipe, questions: list[_Question], batch_size: int, say: Say
) -> list[_Reply]:
    """Replies by greedy or beam search, long prompts first."""
    prompts = [tokenizer(question.prompt).input_ids for question in questions]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    _check_length(model, recipe, len(prompts[order[0]]) + recipe.eval.max_new_tokens, say)

    def reply(rows: list[int]) -> list[_Reply]:
        texts = generate(
            model,
            tokenizer,
            [prompts[i] for i in rows],
            num_beams=recipe.eval.num_beams,
            max_new_tokens=recipe.eval.max_new_tokens,
        )
        asked = [questions[i] for i in rows]
        return [_Reply(extract(text, q.metric, q.options), text) for q, text in zip(asked, texts, strict=True)]

    replies: dict[int, _Reply] = {}
    with tqdm(total=len(order), desc=recipe.name, unit="row", leave=False, disable=None) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            replies |= zip(rows, reply(rows), strict=True)
            if start == 0 and len(rows) > 1:
                # From no padding to the most of it. One prompt at a time is the truth that a batch has to meet.
                probes = sorted({rows[0], rows[len(rows) // 2], rows[-1]})
                changed = sum(reply([i])[0].answer != replies[i].answer for i in probes)
                if changed:
                    say(
                        f"task {recipe.name}: {changed} of {len(probes)} answers differ between a batch of {len(rows)} "
                        "and one prompt at a time, because rounding differs; batch_size 1 gives scores free of it"
                    )
            bar.update(len(rows))
    return [replies[i] for i in range(len(questions))]


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], *, num_beams: int = 1, max_new_tokens: int = 256
) -> list[str]:
    """What a model writes after some prompts, in one batch, padded on the left; it samples nothing.

    A text ends before the end-of-sequence token of the tokenizer or of the model's own generation settings; nothing
    else of those settings counts.

    Args:
        model: a transformers model in eval mode; adapters may be active in it.
        prompts: token ids.
    """
    own = model.generation_config
    ends = {tokenizer.eos_token_id, *(own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id])}
    ends.discard(None)
    # Masked in prompts, and behind the end of a text: any id will do that does not end a text.
    filler = next(i for i in (tokenizer.pad_token_id, *range(len(ends) + 1)) if i is not None and i not in ends)
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), filler)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    config = GenerationConfig(
        do_sample=False,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=filler,
        bos_token_id=tokenizer.bos_token_id,
    )
    # transformers fills what a given config leaves open from the model's own: temperatures, penalties, forced tokens.
    model.generation_config = config
    try:
        made = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
        )
    finally:
        model.generation_config = own
    texts = []
    for row in made[:, longest:].tolist():
        end = next((place for place, token in enumerate(row) if token in ends), len(row))
        texts.append(tokenizer.decode(row[:end], skip_special_tokens=True))
    return texts
