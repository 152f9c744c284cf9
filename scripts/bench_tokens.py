"""Tokens a second on real, uneven examples: `multisbora.train` against PEFT's LoRA in transformers' default Trainer.

    python scripts/bench_tokens.py --data ROWS.jsonl [...] [--model M] [--task math] [--blocks N] [--steps N]

Rows are instruction rows (the fields that the task's recipe names), JSON lists or JSONL; those without an answer, or of
more tokens than the cutoff, are left out. The methods take turns: a block is some optimizer steps of each, from the
untrained base, on the same rows; every block has rows of its own. Rank, targets, batch (8 examples, Trainer's default)
and learning rate are the same for all. The peer is what its documentation shows: `Trainer` with DataCollatorForSeq2Seq,
which pads every batch to its longest example, the prompt masked out of the labels, and TrainingArguments left alone,
but for one epoch and no saving, reporting or progress bar.

Counted are tokens of examples, never padding, over the time between the ends of steps; a block's first steps do not
count. A ratio is taken within a block; printed is the median over the blocks, with the quartiles.

Exit code 1 if the budget is missed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from bench_train import quartiles
from figures import Budget, Result, add_output_options, finish, named
from methods import MODEL, TARGETS
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from multisbora import Registry, allocate, train
from multisbora.geometry import from_checkpoint
from multisbora.hub import find_base
from multisbora.recipe import Recipe
from multisbora.recipe import load as load_recipe

BATCH = 8  # the default of TrainingArguments
METHODS = ("fa", "fb", "lora")
BUDGET = 2.0


@dataclass(frozen=True)
class Block:
    """What came of some steps: the examples' tokens and the seconds of each, and the places that batches had."""

    tokens: list[int]
    seconds: list[float]
    places: int

    def speed(self, warm: int) -> float:
        """Tokens a second after `warm` steps."""
        return sum(self.tokens[warm:]) / sum(self.seconds[warm:])


def read_rows(paths: Sequence[Path]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        rows += json.loads(text) if text.lstrip()[:1] == "[" else [json.loads(line) for line in text.splitlines()]
    return rows


def make_recipe(task: str, file: Path, cutoff: int) -> Recipe:
    """The task's recipe on the rows of one file, for one epoch with the Trainer's own defaults."""
    settings = {"epochs": 1, "batch_size": BATCH, "learning_rate": 5e-5, "warmup_steps": 0, "cutoff": cutoff}
    settings |= {"max_truncated": 1, "save_steps": 500, "logging_steps": 1, "seed": 42}
    content = load_recipe(task).model_dump(mode="json", exclude_unset=True)
    content |= {"name": "bench", "train": str(file), "training": settings}
    content["eval"]["data"] = str(file.with_name("none.jsonl"))
    return Recipe.model_validate(content)


def run_sbora(recipe: Recipe, base: Path, variant: str, rank: int, work: Path) -> Block:
    """One block of `multisbora.train`; its metrics.jsonl has a line a step."""
    geometry = from_checkpoint(base)
    with Registry.open("sqlite://") as registry:
        claims = allocate(registry, geometry, ["bench"], variant=variant, rank=rank, target_modules=TARGETS)
    train(recipe, base, claims.tasks["bench"], work / "adapter", geometry=geometry)
    tokens, seconds, before = [], [], 0
    for line in (work / "adapter" / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        step = json.loads(line)
        tokens.append(step["tokens"] - before)
        seconds.append(tokens[-1] / step["tokens_per_second"])
        before = step["tokens"]
    return Block(tokens, seconds, sum(tokens))


class Clock(transformers.TrainerCallback):
    """Seconds of each step, from the end of the one before."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._last = time.monotonic()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        self.seconds.append(now - self._last)
        self._last = now


def encode(recipe: Recipe, rows: Sequence[dict[str, Any]], tokenizer: Any) -> list[dict[str, list[int]]]:
    """Prompt, answer and end of sequence, with labels for the answer alone."""
    examples = []
    for row in rows:
        prompt, target = recipe.fill(row, "row")
        asked = tokenizer(prompt).input_ids
        answer = [*tokenizer(target, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        examples.append({"input_ids": [*asked, *answer], "labels": [*[-100] * len(asked), *answer]})
    return examples


def run_lora(recipe: Recipe, rows: Sequence[dict[str, Any]], base: Path, rank: int, work: Path) -> Block:
    """One block of PEFT's LoRA in a Trainer."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=64, target_modules=TARGETS)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    pad, clock = DataCollatorForSeq2Seq(tokenizer), Clock()
    tokens: list[int] = []
    places: list[int] = []

    def collate(features: list[dict[str, Any]]) -> Any:
        batch = pad(features)
        tokens.append(int(batch["attention_mask"].sum()))
        places.append(batch["input_ids"].numel())
        return batch

    arguments = TrainingArguments(
        output_dir=str(work / "trainer"), num_train_epochs=1, save_strategy="no", report_to="none", disable_tqdm=True
    )
    examples: Any = encode(recipe, rows, tokenizer)
    trainer = Trainer(model=model, args=arguments, train_dataset=examples, data_collator=collate, callbacks=[clock])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return Block(tokens, clock.seconds, sum(places))


def measure(
    rows: list[dict[str, Any]], base: Path, task: str, rank: int, cutoff: int, blocks: int, steps: int
) -> dict[str, list[Block]]:
    """{method: its blocks}, in turns whose order rotates."""
    size = BATCH * steps
    recipe = load_recipe(task)
    answered = [row for row in rows if str(row.get(recipe.target) or "").strip()]
    encoded = encode(recipe, answered, AutoTokenizer.from_pretrained(base))
    usable = [row for row, example in zip(answered, encoded, strict=True) if len(example["input_ids"]) <= cutoff]
    if len(usable) < blocks * size:
        raise SystemExit(f"--data has {len(usable)} usable rows: {blocks} blocks of {size} need {blocks * size}")
    drawn = random.Random(0).sample(usable, blocks * size)
    found: dict[str, list[Block]] = {method: [] for method in METHODS}
    for number in range(blocks):
        chosen = drawn[number * size : (number + 1) * size]
        shift = number % len(METHODS)
        for method in (*METHODS[shift:], *METHODS[:shift]):
            with tempfile.TemporaryDirectory() as scratch:
                file = Path(scratch) / "rows.jsonl"
                file.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
                recipe = make_recipe(task, file, cutoff)
                if method == "lora":
                    block = run_lora(recipe, chosen, base, rank, Path(scratch))
                else:
                    block = run_sbora(recipe, base, method, rank, Path(scratch))
            found[method].append(block)
            print(f"block {number + 1} {method}: {block.speed(0):.0f} tokens/s in all", file=sys.stderr, flush=True)
        totals = {method: sum(found[method][-1].tokens) for method in METHODS}
        if len(set(totals.values())) > 1:
            raise RuntimeError(f"the methods were not trained on the same tokens: {totals}")
    return found


def token_result(found: dict[str, list[Block]], setting: str, warm: int, device: str) -> Result:
    speeds = {method: [block.speed(warm) for block in blocks] for method, blocks in found.items()}
    rows, bars, budgets = [], {}, []
    for method, values in speeds.items():
        bars[method] = quartiles([one / other for one, other in zip(values, speeds["lora"], strict=True)])
        middle, lower, upper = bars[method]
        tokens = sum(sum(block.tokens) for block in found[method])
        share = 1 - tokens / sum(block.places for block in found[method])
        speed = f"{statistics.median(values):.0f}"
        rows.append([method, speed, f"{middle:.2f}", f"{lower:.2f} to {upper:.2f}", f"{share:.1%}"])
        if method != "lora":
            budgets.append(Budget(f"tokens/s of {method} / lora", BUDGET, middle, at_most=False))
    return Result(
        name=named("tokens", device),
        title="tokens/s on real examples / PEFT LoRA in a default Trainer (more is better)",
        setting=setting,
        columns=["method", "tokens/s", "/ lora", "quartiles", "padding"],
        rows=rows,
        bars=bars,
        budgets=budgets,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="ROWS.jsonl")
    parser.add_argument("--model", default=MODEL, help=f"(default: {MODEL})")
    parser.add_argument("--task", default="math", help="whose recipe makes prompts of the rows (default: math)")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--cutoff", type=int, default=256, help="tokens of an example (default: 256)")
    parser.add_argument("--blocks", type=int, default=6, help="turns of each method (default: 6)")
    parser.add_argument("--steps", type=int, default=8, help="of a turn (default: 8)")
    parser.add_argument("--warm", type=int, default=2, help="first steps of a turn that do not count (default: 2)")
    parser.add_argument("--threads", type=int, default=2, help="of torch on the CPU (default: 2)")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    if not 0 <= options.warm < options.steps:
        parser.error(f"--warm {options.warm} leaves none of {options.steps} steps to count")
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    rows = read_rows(options.data)
    base = find_base(options.model, say=print)
    sizes = (options.rank, options.cutoff, options.blocks, options.steps)
    found = measure(rows, base, options.task, *sizes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{options.threads} CPU threads"
    setting = f"{Path(options.model).name}, rank {options.rank}, {BATCH} examples a step, cutoff {options.cutoff}"
    setting += f"; {options.blocks} blocks of {options.steps} steps, {options.warm} of them warm-up; {name}"
    return finish([token_result(found, setting, options.warm, device)], options)


if __name__ == "__main__":
    sys.exit(main())
