"""The tasks of study_composition.py: cut from two files of rows, split once, and written down as recipes.

Training rows are split into train and dev rows by their prompts, with a fixed seed. Whatever is chosen or measured
(rates, moments, lambdas) sees dev rows; test rows are for the tables alone.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from multisbora.resources import tasks_dir

Row = dict[str, Any]
SOURCES = ("math", "commonsense")


@dataclass(frozen=True)
class Cut:
    """A task: rows of one file, all of them or those of some subsets."""

    source: str
    subsets: tuple[str, ...] = ()

    def rows(self, rows: Iterable[Row]) -> list[Row]:
        return [row for row in rows if not self.subsets or row["subset"] in self.subsets]


CUTS = {
    "math": Cut("math"),
    "commonsense": Cut("commonsense"),
    "gsm8k": Cut("math", ("gsm8k",)),
    "svamp": Cut("math", ("SVAMP",)),
    "boolq": Cut("commonsense", ("boolq",)),
    "arc-easy": Cut("commonsense", ("arc_easy",)),
    "equations": Cut("math", ("AddSub", "MultiArith", "SingleEq")),
    "aqua": Cut("math", ("AQuA",)),
    "arc-challenge": Cut("commonsense", ("arc_challenge",)),
    "openbookqa": Cut("commonsense", ("openbookqa",)),
}
PAIR = ("math", "commonsense")
EIGHT = tuple(task for task in CUTS if task not in PAIR)
# Tasks that are merged. The merge of 4 is of four of the eight adapters: they are trained once, for the merge of 8.
MERGES = {2: PAIR, 4: EIGHT[:4], 8: EIGHT}


@dataclass(frozen=True)
class Sizes:
    """How many rows, and how long a training is.

    Attributes:
        dev: rows a task that are held out of its training rows, a quarter of them at most.
        watch: those of them that a training looks at when it ends: what the learning rate is chosen by.
        test: rows a task that the tables are made from.
    """

    dev: int = 400
    watch: int = 128
    test: int = 300
    steps: int = 56
    batch: int = 8
    cutoff: int = 256
    warmup: int = 10


def joint(tasks: Sequence[str]) -> str:
    """The name of the task that is some tasks at once."""
    return f"joint{len(tasks)}"


def prepare(data: Path, work: Path, sizes: Sizes) -> None:
    """Write rows and recipes of all tasks into the work folder; what is there and differs is refused.

    Raises:
        OSError: a file of `data` is missing.
        ValueError: the work folder holds the rows of another study.
    """
    for folder in ("rows", "tasks"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    read = {source: {part: _read(data / source / f"{part}.jsonl") for part in ("train", "test")} for source in SOURCES}
    parts = {}
    for task, cut in CUTS.items():
        rows = read[cut.source]
        train, dev = split(cut.rows(rows["train"]), sizes.dev)
        test = _shuffled(cut.rows(rows["test"]), "test")[: sizes.test]
        parts[task] = {"train": train, "dev": dev, "watch": dev[: sizes.watch], "test": test}
    for task, found in parts.items():
        _write_task(work, task, CUTS[task].source, found, sizes)
    for tasks in MERGES.values():
        _write_task(work, joint(tasks), "math", _union({task: parts[task] for task in tasks}, sizes), sizes, len(tasks))


def split(rows: Sequence[Row], dev: int) -> tuple[list[Row], list[Row]]:
    """(train, dev): rows with the same instruction stay together, whatever their case and white space."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(" ".join(row["instruction"].lower().split()), []).append(row)
    wanted, held, kept = min(dev, len(rows) // 4), [], []
    for prompt in _shuffled(sorted(groups), "dev"):
        of = held if len(held) + len(groups[prompt]) <= wanted else kept
        of += groups[prompt]
    return _shuffled(kept, "train"), held


def _union(parts: Mapping[str, Mapping[str, list[Row]]], sizes: Sizes) -> dict[str, list[Row]]:
    """Rows of several tasks at once: as many of each as its own adapter learns, and as many dev rows of each."""
    learned = sizes.steps * sizes.batch
    found: dict[str, list[Row]] = {"train": [], "dev": [], "watch": [], "test": []}
    for of in parts.values():
        rows = of["train"]
        found["train"] += [rows[place % len(rows)] for place in range(learned)]
        for part in ("dev", "watch", "test"):
            found[part] += of[part][: max(1, len(of[part]) // len(parts))]
    return found


def _write_task(
    work: Path, task: str, source: str, parts: Mapping[str, list[Row]], sizes: Sizes, times: int = 1
) -> None:
    paths = {part: work / "rows" / f"{task}-{part}.jsonl" for part in parts}
    for part, rows in parts.items():
        _keep(paths[part], "".join(json.dumps(row) + "\n" for row in rows))
    recipe = yaml.safe_load((tasks_dir() / f"{source}.yaml").read_text(encoding="utf-8"))
    recipe |= {
        "description": f"Of scripts/study_composition.py: rows of {source}.",
        "train": str(paths["train"]),
        "dev": str(paths["dev"]),
        "training": {
            "max_steps": sizes.steps * times,
            "batch_size": sizes.batch,
            "cutoff": sizes.cutoff,
            "warmup_steps": sizes.warmup,
            "lr_scheduler": "linear",
            "max_truncated": 1.0,
            "logging_steps": 1,
            "save_steps": max(1, sizes.steps * times // 2),
        },
    }
    recipe["eval"] |= {"data": str(paths["test"]), "num_beams": 1}
    _keep(work / "tasks" / f"{task}.yaml", yaml.safe_dump(recipe, sort_keys=False))


def _keep(path: Path, text: str) -> None:
    if path.is_file():
        if path.read_text(encoding="utf-8") != text:
            raise ValueError(f"{path} is of a study of other rows or settings: give another --work")
        return
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _read(path: Path) -> list[Row]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _shuffled(values: Sequence[Any], key: str) -> list[Any]:
    return random.Random(f"study_composition {key}").sample(values, len(values))


# ------------------------------------------------------------------------------------------------------------- --quick


def write_toy(folder: Path) -> tuple[Path, Path]:
    """(model, data): a random Llama that reads bytes, and a few rows of every subset. What --quick works on."""
    model, data = folder / "model", folder / "data"
    if not model.is_dir():
        _write_model(model)
    for source in SOURCES:
        for part, count in (("train", 12), ("test", 4)):
            rows = [
                {"subset": subset, "instruction": f"{subset} {part} {n} ?", "output": f"It is {n}.", "answer": answer}
                for subset in _subsets(source)
                for n in range(count)
                for answer in [("A" if subset == "AQuA" else str(n)) if source == "math" else _option(subset)]
            ]
            (data / source).mkdir(parents=True, exist_ok=True)
            (data / source / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model, data


def _subsets(source: str) -> list[str]:
    return [subset for cut in CUTS.values() if cut.source == source for subset in cut.subsets]


def _option(subset: str) -> str:
    return "true" if subset == "boolq" else "answer1"


def _write_model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    words = {word: number for number, word in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), tie_word_embeddings=True, **shape, **ids))
    partial = folder.with_suffix(".partial")
    model.save_pretrained(partial)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(partial)
    partial.replace(folder)
