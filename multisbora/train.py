"""Training one task on one base model: transformers' Trainer on the PEFT model, and an adapter folder at the end."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from .attention import use_packed_attention
from .checkpoint import check_output, fingerprint, publish
from .dataset import Encoded, check_examples, encode, load_rows, overlap, pack, packs, pad
from .errors import DataError, TrainingError, UsageError
from .geometry import Geometry, from_checkpoint
from .loading import load_base, load_tokenizer
from .recipe import Recipe
from .registry.claims import TaskClaims
from .tuner import SboraConfig

RUN_FILE = "run.json"
LOCK_FILE = ".lock"
METRICS_FILE = "metrics.jsonl"
TRAINING_FILE = "training.json"


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run came to. `loss` is the mean over its last logged steps, nats per answer token; None in a dry run."""

    task: str
    adapter: Path
    steps: int
    tokens: int
    loss: float | None
    seconds: float
    trainable_parameters: int

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "adapter": str(self.adapter)}


def train(
    recipe: Recipe,
    base: str | os.PathLike[str],
    claims: TaskClaims,
    output: str | os.PathLike[str],
    *,
    alpha: float = 64,
    use_rslora: bool = False,
    geometry: Geometry | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda message: None,
    on_start: Callable[[], None] = lambda: None,
) -> TrainResult:
    """Train one task alone and write its adapter folder.

    The run keeps its checkpoints beside the output, in `<output>.run`, and goes on from the last of them when it is
    called again with the same settings. They are removed when the adapter is published.

    Args:
        recipe: data and hyperparameters.
        base: folder of the base model.
        claims: what the registry gave to this task; `Registry.task(...)`.
        output: folder of the adapter to make.
        alpha, use_rslora: scaling, see SboraConfig.
        geometry: of the base, where it is known already.
        dry_run: check base, claims and data, and return the steps and tokens of the run to come without starting it.
        say: told what a person should know on the way.
        on_start: called once, when everything is checked and the run begins or goes on.

    Raises:
        UsageError: the recipe names an optimizer or a schedule that transformers does not have.
        CheckpointError: the base cannot be read, or `output` is taken.
        DataError: rows that are missing or do not fit, or too many of them cut off.
        TrainingError: the claims are another model's, an interrupted run had other settings, or the loss is not finite.
    """
    base, output = Path(base), Path(output)
    check_output(output)
    geometry = geometry or from_checkpoint(base)
    if geometry.digest != claims.geometry_digest:
        raise TrainingError(
            f"the claims of task {claims.task!r} are for another geometry than that of {base}: "
            "release and allocate again for this model"
        )
    base_print = fingerprint(base, geometry)
    config = SboraConfig(
        task_type="CAUSAL_LM",
        variant=claims.variant,
        r=claims.rank,
        alpha=alpha,
        use_rslora=use_rslora,
        dropout=recipe.training.dropout,
        indices={module: list(region.indices) for module, region in claims.regions.items()},
        excluded={module: list(region.excluded) for module, region in claims.regions.items() if region.excluded},
        task=claims.task,
        composition=claims.composition,
        base_fingerprint=base_print,
        claim_digest=claims.digest,
    )
    _check_names(recipe)
    encoded = _prepare(recipe, base, say)
    if dry_run:
        cells = {m: r.values_shape(geometry.find(m).shape) for m, r in claims.regions.items()}
        return _expected(recipe, claims.task, output, encoded, sum(rows * columns for rows, columns in cells.values()))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainingError(
            "a task trains in one process: start `multisbora train` without torchrun or accelerate launch"
        )
    run = output.with_name(f"{output.name}.run")
    with _alone(run):
        on_start()
        return _run(recipe, base, claims, output, run, config, encoded, say)


def _run(
    recipe: Recipe,
    base: Path,
    claims: TaskClaims,
    output: Path,
    run: Path,
    config: SboraConfig,
    encoded: Encoded,
    say: Callable[[str], None],
) -> TrainResult:
    settings = {
        "recipe": recipe.model_dump(mode="json"),
        "examples": encoded.digest,
        "base_fingerprint": config.base_fingerprint,
        "claim_digest": config.claim_digest,
        "alpha": config.alpha,
        "use_rslora": config.use_rslora,
    }
    checkpoint = _enter_run(run, settings, say)

    base_model = load_base(base)
    if base_model.dtype == torch.float16 and not torch.cuda.is_available():
        say("the base is fp16, whose gradients vanish without loss scaling: training in fp32 on this machine")
        base_model = base_model.float()
    base_model.config.get_text_config().use_cache = False
    if recipe.training.gradient_checkpointing:
        # Called gradient_checkpointing_enable before transformers 5.23, which warns of that name.
        enable = (
            getattr(base_model, "activation_checkpointing_enable", None) or base_model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    use_packed_attention(base_model)
    packed = packs(base_model)
    if not packed:
        say("this model cannot keep packed examples apart: batches are padded")
    model = peft.get_peft_model(base_model, config)
    pad_id = model.config.get_text_config().pad_token_id or 0
    metrics = _Metrics(run / METRICS_FILE, recipe.name)
    arguments = _arguments(recipe, run, scale_loss=base_model.dtype == torch.float16)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=encoded.examples,
        data_collator=lambda examples: _for_trainer(pack(examples) if packed else pad(examples, pad_id)),
        compute_loss_func=lambda outputs, labels, **count: answer_loss(outputs, labels[:, 1:], **count),
        callbacks=[metrics],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    started = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"task {claims.task}: {run} cannot be written or read ({error}): "
            "free space on its disk and run the same command again, it goes on from its last checkpoint"
        ) from error
    result = TrainResult(
        task=claims.task,
        adapter=output,
        steps=trainer.state.global_step,
        tokens=int(trainer.state.num_input_tokens_seen),
        loss=metrics.loss,
        seconds=round(time.monotonic() - started, 1),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )
    if trainer.is_world_process_zero():
        _publish(model, claims.model, run, output, settings, result, encoded)
    return result


def answer_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of the answer tokens, in nats a token, in fp32.

    Args:
        outputs: of the model, logits (batch, positions, vocabulary).
        labels: (batch, positions), the token that each position predicts, -100 where there is none.
        num_items_in_batch: answer tokens of the whole optimizer step, over all its micro-batches and devices.
    """
    labels = labels.reshape(-1).to(outputs.logits.device)
    logits = outputs.logits.flatten(0, -2).float()
    total = F.cross_entropy(logits, labels, reduction="sum")
    return total / (num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum())


def _for_trainer(batch: dict[str, Any]) -> dict[str, Any]:
    """Trainer counts the answer tokens of a step in labels[..., 1:], for losses that shift labels. Ours line up with
    the logits already: a column is put before them for it to leave out."""
    return {**batch, "labels": F.pad(batch["labels"], (1, 0), value=-100)}


def _prepare(recipe: Recipe, base: Path, say: Callable[[str], None]) -> Encoded:
    tokenizer = load_tokenizer(base)
    rows = [row for _, row in load_rows(recipe.train)]
    encoded = encode(recipe, rows, tokenizer, recipe.training.cutoff)
    check_examples(encoded, recipe, say)
    try:
        test = [row for _, row in load_rows(recipe.eval.data)]
        seen = overlap(recipe, rows, test)
    except DataError as error:
        say(f"not checked whether test rows are among the training rows: {error}")
    else:
        if seen:
            say(
                f"{seen} of {len(test)} test rows of task {recipe.name} are also training rows: their scores say little"
            )
    return encoded


def _expected(recipe: Recipe, task: str, output: Path, encoded: Encoded, parameters: int) -> TrainResult:
    settings = recipe.training
    steps_an_epoch = math.ceil(len(encoded.examples) / settings.batch_size)
    steps = settings.max_steps or math.ceil(settings.epochs * steps_an_epoch)
    tokens = round(steps / steps_an_epoch * encoded.tokens)
    return TrainResult(task, output, steps, tokens, None, 0.0, parameters)


def _check_names(recipe: Recipe) -> None:
    for key, kind in (("optimizer", OptimizerNames), ("lr_scheduler", SchedulerType)):
        name, known = getattr(recipe.training, key), [str(member.value) for member in kind]
        if name not in known:
            raise UsageError(f"recipe {recipe.name}: training.{key} {name!r} is unknown: use one of {', '.join(known)}")


def _arguments(recipe: Recipe, run: Path, scale_loss: bool) -> TrainingArguments:
    settings = recipe.training
    micro = settings.micro_batch_size or settings.batch_size
    arguments = TrainingArguments(
        fp16=scale_loss,
        output_dir=str(run),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=settings.batch_size // micro,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=settings.optimizer,
        save_steps=settings.save_steps,
        save_total_limit=2,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
        seed=settings.seed,
        data_seed=settings.seed,
    )
    # With several GPUs in sight the Trainer would split each tensor of a batch; a packed batch is one row.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


@contextlib.contextmanager
def _alone(run: Path) -> Iterator[None]:
    """Hold the folder of a run. A second process that trains the same task would go on from this one's checkpoints."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(
                f"{run} is in use: another process is training this task; wait for it or stop it"
            ) from None
        yield


def _enter_run(run: Path, settings: dict[str, Any], say: Callable[[str], None]) -> str | None:
    """The last checkpoint of an interrupted run, whose settings must be the same; a new run where there is none."""
    kept, checkpoint = run / RUN_FILE, _last_checkpoint(run)
    if checkpoint is not None:
        try:
            before = _flat(json.loads(kept.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            raise TrainingError(f"{kept} is missing or damaged: delete that folder to start anew") from None
        after = _flat(settings)
        changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
        if changed:
            shown = "; ".join(f"{key} was {before.get(key)!r}, is {after.get(key)!r}" for key in changed[:5])
            raise TrainingError(
                f"{run} holds an interrupted run with other settings ({shown}): "
                "set them back to go on, or delete that folder to start anew"
            )
        say(f"going on from {checkpoint}")
        return str(checkpoint)
    if kept.is_file():
        say("an interrupted run left no checkpoint: starting anew")
    partial = kept.with_suffix(".partial")
    partial.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
    partial.replace(kept)
    return None


def _last_checkpoint(run: Path) -> Path | None:
    """The last whole checkpoint. The Trainer writes its state last, so one that a kill cut short has none."""
    found = {int(path.name.rpartition("-")[2]): path for path in run.glob("checkpoint-*")}
    for _, checkpoint in sorted(found.items(), reverse=True):
        with contextlib.suppress(OSError, ValueError):
            json.loads((checkpoint / "trainer_state.json").read_bytes())
            return checkpoint
    return None


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(settings, dict):
        return {prefix: settings}
    return {
        key: value
        for name, inner in settings.items()
        for key, value in _flat(inner, f"{prefix}.{name}" if prefix else name).items()
    }


def _publish(
    model: peft.PeftModel,
    name: str,
    run: Path,
    output: Path,
    settings: dict[str, Any],
    result: TrainResult,
    encoded: Encoded,
) -> None:
    summary = {
        **settings,
        "steps": result.steps,
        "tokens": result.tokens,
        "loss": result.loss,
        "trainable_parameters": result.trainable_parameters,
        "examples": len(encoded.examples),
        "truncated": encoded.truncated,
    }
    # The model's name, not this machine's path, goes into the config and the model card. Not earlier: PEFT asks the hub
    # for the base model's config at every checkpoint, unless it finds the folder.
    base_model = model.get_base_model()
    model.active_peft_config.base_model_name_or_path = base_model.name_or_path = base_model.config.name_or_path = name
    with publish(output) as partial:
        model.save_pretrained(partial, save_embedding_layers=False)
        (partial / TRAINING_FILE).write_text(json.dumps(summary, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        shutil.copyfile(run / METRICS_FILE, partial / METRICS_FILE)
    shutil.rmtree(run)


class _Metrics(TrainerCallback):
    """A line of JSON a logged step, on a terminal a bar with loss and tokens/s, and a stop where loss is not finite."""

    def __init__(self, path: Path, task: str) -> None:
        self.path, self.task = path, task
        self.loss = math.nan
        self._bar: Any = None
        self._clock = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._clock = (time.monotonic(), state.num_input_tokens_seen)
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        # A run that was killed may have logged steps after its last checkpoint; they will be logged again.
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= state.global_step]
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        if sys.stderr.isatty():
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.task, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True  # whatever logging_steps is: no run may end without having looked at its loss
            control.should_save = False  # the adapter itself comes next; there would be no step left to resume into
        if self._bar is not None:
            self._bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        self.loss = float(logs["loss"])
        if not math.isfinite(self.loss):
            raise TrainingError(
                f"task {self.task}: loss is {self.loss} at step {state.global_step}; "
                "lower training.learning_rate, or look for broken rows in the training data"
            )
        now, tokens = time.monotonic(), int(state.num_input_tokens_seen)
        speed = (tokens - self._clock[1]) / max(now - self._clock[0], 1e-9)
        self._clock = (now, tokens)
        line = {
            "step": state.global_step,
            "loss": self.loss,
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "tokens": tokens,
            "tokens_per_second": round(speed, 1),
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._bar is not None:
            self._bar.set_postfix({"loss": f"{self.loss:.3f}", "tok/s": f"{speed:.0f}"})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
