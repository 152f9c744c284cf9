"""A task recipe: where the rows come from, how they become prompts, how the task is trained and how it is scored.

Recipes are YAML files in the project's `tasks` folder, or those that come with the package. Relative paths in them
are relative to the working folder.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from .errors import DataError, UsageError
from .resources import tasks_dir
from .settings import Strict, read_yaml, unfit
from .view import Kind

Metric = Literal["number", "letter", "option"]


class Source(Strict):
    """Rows: a local json, jsonl, csv or parquet file, such a file's URL, or a data set's id on the hub.

    A plain string in a recipe is the path alone.

    Attributes:
        config: configuration of a data set on the hub.
        split: as `datasets` writes it, "train[:90%]" for example. All rows of a file are its "train".
        subset: name of these rows in evaluation.
    """

    path: str
    config: str | None = None
    split: str = "train"
    subset: str | None = None


def _sources(value: Any) -> Any:
    values = value if isinstance(value, list | tuple) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in values]


Sources = Annotated[tuple[Source, ...], BeforeValidator(_sources), Field(min_length=1)]


class Training(Strict):
    """Hyperparameters of one task's run, as transformers' Trainer knows them.

    Attributes:
        batch_size: examples a step, over all processes.
        micro_batch_size: the most examples that a process takes at a time (None: its whole share of a step). It takes
            the largest number below that which divides its share.
        cutoff: tokens an example may have, prompt, answer and end-of-sequence together; the rest is cut off.
        max_truncated: share of examples that may be cut before the run refuses to start.
        max_steps: optimizer steps in place of whole epochs, where it is given.
        quantization: train on a base quantised by bitsandbytes (QSBoRA): "nf4", 4-bit with double quantisation, or
            "int8". The base on disk stays what it is.
        max_grad_norm: a step's gradients are scaled down to this norm; .inf leaves them as they are.
        isolate: strength of the penalty on what the update does on other tasks' rows: nats of an own row that a
            squared nat of theirs counts as (see `penalty`), 1e9 at most; 0 trains without. Left out: `penalty.STRENGTH`
            where the other tasks were measured, and else 0. Half a squared nat is about what an answer loses by one
            matrix alone; what all of them do at once can be as many times that as there are matrices.
        eval_steps: steps from one look at the dev rows to the next, where the recipe has some. The last step has one
            too, and the adapter of the lowest dev loss is what is kept.
        early_stopping_patience: the run stops after so many looks at the dev rows without a lower loss; None never.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    epochs: float = Field(default=3, gt=0)
    max_steps: int | None = Field(default=None, gt=0)
    batch_size: int = Field(default=16, gt=0)
    micro_batch_size: int | None = Field(default=None, gt=0)
    learning_rate: float = Field(default=3e-4, gt=0)
    lr_scheduler: str = "linear"
    warmup_steps: int = Field(default=100, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    isolate: float | None = Field(default=None, ge=0, le=1e9)
    max_grad_norm: float = Field(default=1.0, gt=0, allow_inf_nan=True)
    optimizer: str = "adamw_torch_fused"
    dropout: float = Field(default=0.0, ge=0, lt=1)
    cutoff: int = Field(default=256, gt=0)
    max_truncated: float = Field(default=0.005, ge=0, le=1)
    gradient_checkpointing: bool = False
    quantization: Kind | None = None
    save_steps: int = Field(default=100, gt=0)
    eval_steps: int = Field(default=100, gt=0)
    early_stopping_patience: int | None = Field(default=None, gt=0)
    logging_steps: int = Field(default=10, gt=0)
    seed: int = Field(default=0, ge=0, lt=2**32)


class Evaluation(Strict):
    """How the task is scored (paper, section 5, and the LLM-Adapters protocol that it follows).

    Attributes:
        data: one or more sources of test rows. A row belongs to its source's `subset`, else to the subset that its
            `subset_field` names, else to "all".
        metric: "number" (last number of the answer, within 0.001), "letter" (the one of A to E that it names) or
            "option" (first option word), see `answers.extract`; `metrics` overrides it by subset.
        answer: the field with the gold answer.
        options: subset -> the option words of its answers, for "option" and for choice log-likelihood.
        choice: the text that stands for an option where choices are scored, with {option} in it.
        num_beams, max_new_tokens: of the generation, which never samples.
    """

    data: Sources
    metric: Metric
    metrics: dict[str, Metric] = Field(default_factory=dict)
    subset_field: str = "subset"
    answer: str = "answer"
    options: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    choice: str = "{option}"
    num_beams: int = Field(default=4, gt=0)
    max_new_tokens: int = Field(default=256, gt=0)

    @model_validator(mode="after")
    def _choice_has_option(self) -> Evaluation:
        if fields_of(self.choice) != {"option"}:
            raise ValueError(f"choice must name {{option}} and nothing else, got {self.choice!r}")
        return self


class Recipe(Strict):
    """One task. `prompt` is a template with the fields of a row in braces; the model learns what stands in `target`.

    Attributes:
        dev: rows of their own to watch a run by, its loss on what it does not learn.
        dev_size: in place of `dev`, training rows to hold out for that: a share below 1, or a number of rows.
        whole_modules: what a merge does with modules of its adapter that were trained whole, see `merge`.
    """

    name: str
    description: str = ""
    prompt: str
    target: str = "output"
    target_modules: tuple[str, ...] | str | None = None
    train: Sources
    dev: Sources | None = None
    dev_size: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    training: Training = Training()
    eval: Evaluation
    whole_modules: Literal["refuse", "keep", "average"] = "refuse"

    @model_validator(mode="after")
    def _prompt_has_fields(self) -> Recipe:
        if not fields_of(self.prompt):
            raise ValueError("prompt names no field: put at least one in braces, for example {instruction}")
        return self

    @model_validator(mode="after")
    def _dev_rows_are_clear(self) -> Recipe:
        if self.dev is not None and self.dev_size is not None:
            raise unfit("dev names rows and dev_size holds some of the training rows out: give one of them")
        if self.dev_size is not None and self.dev_size > 1 and not self.dev_size.is_integer():
            raise unfit(f"dev_size {self.dev_size:g} is neither a share of the rows below 1 nor a whole number of rows")
        # A recipe that comes back from its own JSON has all keys given, with their defaults.
        steps = Training.model_fields["eval_steps"].default
        needy = ["early_stopping_patience"] * (self.training.early_stopping_patience is not None)
        needy += ["eval_steps"] * (self.training.eval_steps != steps)
        if needy and self.dev is None and self.dev_size is None:
            raise unfit(
                f"training.{needy[0]} needs dev rows: name some with dev, or hold training rows out with "
                "dev_size, 0.05 for example"
            )
        return self

    @property
    def digest(self) -> str:
        """sha256 (hex) of everything in the recipe."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def fill(self, row: dict[str, Any], where: str) -> tuple[str, str]:
        """The prompt and the target text of one row.

        Raises:
            DataError: the row lacks a field of the prompt or the target; `where` names the row.
        """
        missing = sorted((fields_of(self.prompt) | {self.target}) - {k for k, v in row.items() if v is not None})
        if missing:
            raise DataError(
                f"{where}: field {', '.join(missing)} of recipe {self.name} is missing; the row has {', '.join(row)}"
            )
        return self.prompt.format_map(row), str(row[self.target])


def fields_of(template: str) -> set[str]:
    """The field names in a template.

    Raises:
        ValueError: braces that do not match, or a field that is no plain name.
    """
    names = set()
    for _, name, form, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not name.isidentifier() or form or conversion:
            shown = name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise ValueError(f"{{{shown}}} is no plain field name; write a literal brace as {{{{ or }}}}")
        names.add(name)
    return names


def names(folder: Path | None = None) -> dict[str, Path]:
    """{task: recipe file}, from the project's folder of recipes and, behind those, the package's own."""
    found = {path.stem: path for path in sorted(tasks_dir().glob("*.yaml"))}
    if folder is not None:
        found |= {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return found


def load(task: str, folder: Path | None = None, overrides: Iterable[str] = ()) -> Recipe:
    """Read the recipe of a task.

    Args:
        folder: the project's own recipes, which come before the package's.
        overrides: "training.learning_rate=1e-4" and the like.

    Raises:
        UsageError: no such task, or a recipe with faults.
    """
    known = names(folder)
    if task not in known:
        near = difflib.get_close_matches(task, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        raise UsageError(f"unknown task {task!r}: {hint} (a recipe is a file tasks/{task}.yaml)")
    recipe = read_yaml(known[task], Recipe, overrides, name=task)
    if recipe.name != task:
        raise UsageError(f"{known[task]}: name is {recipe.name!r}, but the file's name says {task!r}: leave name out")
    return recipe
