"""Scores of a base model, an adapter or a merged checkpoint on the test rows of tasks, as the paper takes them.

Two numbers a row: whether the answer is right, which is taken from generated text (or from the option that the model
finds most likely), and how many nats the model loses on the target text. The second one needs no luck with formats and
moves long before the first.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import peft
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from .adapter import CONFIG_FILE, Adapter
from .attention import use_packed_attention
from .checkpoint import Checkpoint, fingerprint
from .dataset import Example, Row, encode, load_rows, pack, packs, pad
from .errors import AdapterError, CheckpointError, DataError, GeometryError, UsageError
from .geometry import Geometry, from_checkpoint
from .recipe import Metric, Recipe
from .tuner import SboraLayer

Method = Literal["generate", "choice"]
Say = Callable[[str], None]

LETTERS = ("A", "B", "C", "D", "E")
TOLERANCE = 1e-3
BATCH_TOKENS = 2048

_OPTION_WORDS = r"true|false|(?:solution|answer|ending|option)[0-9]+"
_NUMBER = re.compile(r"((?<![\w)\]])[-\u2212])?[$£€]?([0-9]+(?:\.[0-9]+)?|(?<![.\w])\.[0-9]+)")


# ----------------------------------------------------------------------------------------------------------- answers


def extract(text: str, metric: Metric, options: Sequence[str] = ()) -> str | None:
    """The answer that a generated text gives, by the LLM-Adapters protocol that the paper follows; None if it has none.

    number: the last number. Commas between digits go ("1,200" is 1200), a currency sign and a final period are no part
        of it, and a minus counts unless it follows a digit, a letter or a bracket ("10-8" ends in 8). "3/4" ends in 4.
    letter: a letter is one of `options` (default A to E), upper case, and no part of a longer word. The first one
        right after "answer is" or "answer:" counts; without one, the first after "option" or "choice" or before a
        closing bracket ("(C)", "C)"); without one, the first that stands alone. There, an "A" with a word behind it is
        the English article and is passed over.
    option: the first of the words `options`, in any case; without `options`: true, false, solutionN, answerN, endingN,
        optionN.
    """
    if metric == "number":
        numbers = list(_NUMBER.finditer(re.sub(r"(?<=[0-9]),(?=[0-9])", "", text)))
        return f"{'-' if numbers[-1][1] else ''}{numbers[-1][2]}" if numbers else None
    if metric == "option":
        words = "|".join(re.escape(option) for option in sorted(options, key=len, reverse=True)) or _OPTION_WORDS
        found = re.search(rf"(?<!\w)(?:{words})(?!\w)", text, re.IGNORECASE)
        return found[0].casefold() if found else None
    letter = f"({'|'.join(re.escape(option) for option in options or LETTERS)})(?![\\w'\u2019]|-\\w)"
    for pattern in (
        rf"(?i:\banswer\s*(?:\bis\b|[:=]))[\s:=(\[*\"'`$]*{letter}",
        rf"(?i:\b(?:option|choice)(?:\s+is)?\b)[\s:=(\[*\"'`$]*{letter}|(?<![\w'\u2019-]){letter}[)\]]",
        rf"(?<![\w'\u2019-])(?!A[ \t]+\w){letter}",
    ):
        if found := re.search(pattern, text):
            return next(group for group in found.groups() if group)
    return None


def is_right(extracted: str | None, gold: str, metric: Metric) -> bool:
    """Whether an extracted answer is the gold one: within 0.001 for numbers, equal but for case otherwise."""
    if extracted is None:
        return False
    if metric == "number":
        try:
            return abs(float(extracted) - float(gold)) <= TOLERANCE
        except ValueError:  # a gold answer that is no number
            return False
    return extracted.casefold() == gold.casefold()


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
    say: Say = lambda message: None,
    verbose: bool = False,
    seed: int = 0,
) -> Evaluation:
    """Score a model on the test rows of tasks. Nothing is sampled: same model, rows and machine, same scores.

    Args:
        model_path, base, adapters: see `load_model`.
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
    loaded, tokenizer = load_model(model_path, base, adapters, say=say)
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
    wanted = "a number" if first.metric == "number" else f"one of {', '.join(first.options or [_OPTION_WORDS])}"
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
    """Refuse texts longer than a table of learned positions; say where rotary positions go beyond their training.

    Raises:
        DataError: `needed` tokens are more than the model has positions.
    """
    known = getattr(model.config, "max_position_embeddings", None)
    if known is None or needed <= known:
        return
    message = f"task {recipe.name} needs up to {needed} tokens at a time and the model was made for {known}"
    if getattr(model.config, "rope_parameters", None) is None:
        raise DataError(f"{message}: lower max_new_tokens, or leave long rows out")
    say(f"{message}: scores of its longest rows say little")


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


# ------------------------------------------------------------------------------------------------------------ loading


def load_model(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    adapters: Sequence[str | os.PathLike[str]] = (),
    *,
    say: Say = lambda message: None,
) -> tuple[Any, Any]:
    """A model in eval mode, on the accelerator if there is one, and its tokenizer. Safetensors only, no remote code.

    Args:
        path: a model folder (a base or a merged checkpoint), or an adapter folder, which needs `base`.
        base: folder of the base model that an adapter is of; not looked at where `path` is a model folder.
        adapters: folders of further adapters. All adapters are active; PEFT knows them as adapter0, adapter1, ...,
            that of `path` first.

    Returns:
        (model, tokenizer): a transformers model, in a PeftModel where there are adapters.

    Raises:
        UsageError: an adapter folder without a base, or two adapters of one task.
        CheckpointError: the model is missing, damaged, incomplete, or no causal language model.
        AdapterError: an adapter is damaged, or of another base.
    """
    path = Path(path)
    folders = [Path(folder) for folder in adapters]
    if (path / CONFIG_FILE).is_file():
        if base is None:
            raise UsageError(f"{path} is an adapter: give the base model that it was trained on too")
        folders.insert(0, path)
        path = Path(base)
    read = [Adapter.read(folder) for folder in folders]
    for i, adapter in enumerate(read):
        if twin := next((other for other in read[:i] if other.task == adapter.task), None):
            raise UsageError(f"{twin.path} and {adapter.path} are both task {adapter.task!r}: give one of them")
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder: give the folder of a model or of an adapter")
    Checkpoint.open(path)  # a missing, truncated or corrupt file, in one clear line
    _check_base(read, path, say)
    model, tokenizer = _load_base(path)
    if read:
        model = _with_adapters(model, read)
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    return model.eval(), tokenizer


def _check_base(adapters: list[Adapter], base: Path, say: Say) -> None:
    if not adapters:
        return
    geometry = from_checkpoint(base)
    base_print = fingerprint(base, geometry)
    for adapter in adapters:
        if adapter.base_fingerprint is None:
            say(f"{adapter.path} does not say which base it was trained on: its scores are right if {base} is it")
        elif adapter.base_fingerprint != base_print:
            raise AdapterError(
                f"{adapter.path} was trained on another base than {base} (fingerprint "
                f"{adapter.base_fingerprint[:12]}, not {base_print[:12]}): evaluate it on its own base"
            )
        _check_fit(adapter, geometry)


def _check_fit(adapter: Adapter, geometry: Geometry) -> None:
    for name, module in adapter.modules.items():
        try:
            shape = geometry.find(name).shape
            module.region.check(shape, name)
        except (GeometryError, UsageError) as error:
            raise AdapterError(f"{adapter.path} does not fit {geometry.model}: {error}") from None
        if module.values.shape != module.region.values_shape(shape):
            raise AdapterError(
                f"{adapter.path} does not fit {geometry.model}: {name} has values of shape "
                f"{list(module.values.shape)}, its matrix is {list(shape)}"
            )


def _load_base(folder: Path) -> tuple[Any, Any]:
    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype="auto",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except Exception as error:  # every model's and tokenizer's own code runs in there
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{folder} cannot be loaded as a causal language model: {reason}") from None
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors of its model, {missing[0]} first: fetch or merge it again"
        )
    return model, tokenizer


def _with_adapters(model: Any, adapters: list[Adapter]) -> peft.PeftModel:
    names = [f"adapter{i}" for i in range(len(adapters))]
    for name, adapter in zip(names, adapters, strict=True):
        with _quiet():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error below
            try:
                if isinstance(model, peft.PeftModel):
                    model.load_adapter(adapter.path, name)
                else:
                    model = peft.PeftModel.from_pretrained(model, adapter.path, name)
            except (RuntimeError, ValueError, KeyError, UsageError) as error:
                reason = " ".join(str(error).split())[:300]
                raise AdapterError(f"{adapter.path} cannot be put into this base: {reason}") from None
        modules = model.get_base_model().named_modules()
        live = {module for module, layer in modules if isinstance(layer, SboraLayer) and name in layer.sbora_values}
        if odd := sorted(live ^ set(adapter.modules)):
            raise AdapterError(
                f"{adapter.path}: {CONFIG_FILE} and its tensors are about different modules, {odd[0]} first: "
                "fetch or train the adapter again"
            )
    model.base_model.set_adapter(names, inference_mode=True)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Loading draws bars, reports missing tensors and warns about its own future; we say what matters ourselves."""
    logging = transformers.utils.logging
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
