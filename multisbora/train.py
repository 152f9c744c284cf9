"""Training one task on one base model: transformers' Trainer on the PEFT model, and an adapter folder at the end."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from safetensors import SafetensorError
from transformers.training_args import OptimizerNames

from .adapter import TRAINING_FILE, WEIGHTS_FILE, training_record
from .attention import use_flash_attention, use_packed_attention
from .dataset import Encoded, Example, Row, check_examples, check_fit, encode, load_rows, overlap, packs, split
from .distributed import Processes, hush
from .errors import DataError, TrainingError, UsageError
from .geometry import Geometry, from_checkpoint
from .loading import load_base, load_config, load_tokenizer, vocabulary_digest
from .penalty import Penalty, strength_of
from .publish import check_output, publish
from .quantization import record, widen
from .recipe import Recipe
from .registry.claims import TaskClaims
from .run import ISOLATION_FILE, METRICS_FILE, enter_run, hold_run, keep_machine, last_checkpoint, remove_run
from .sharding import whole_adapter
from .stream import fingerprint
from .trainer import TaskTrainer, checkpoint_files
from .tuner import SboraConfig

TEMPLATE = ("prompt", "target")  # what of a recipe makes words of a row
# The schedules that need nothing but the warm-up and the number of steps, which is all that a recipe says of them.
_SCHEDULES = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial"),
    *("constant", "constant_with_warmup", "inverse_sqrt"),
)
# They change nothing of an adapter that the digests of rows and claims do not say.
_WITHOUT_EFFECT = frozenset({"description", "eval", "train", "dev", "target_modules"})


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run came to.

    Attributes:
        loss: mean over the last logged steps, nats per answer token; None in a dry run.
        dev_loss, best_step: the lowest loss of the dev rows, and the step whose adapter has it: that is the one kept.
            None without dev rows.
    """

    task: str
    adapter: Path
    steps: int
    tokens: int
    loss: float | None
    seconds: float
    trainable_parameters: int
    dev_loss: float | None = None
    best_step: int | None = None

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
    deepspeed: str | os.PathLike[str] | None = None,
    penalty: Penalty | Callable[[str], Penalty | None] | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda message: None,
    on_start: Callable[[], None] = lambda: None,
) -> TrainResult:
    """Train one task alone and write its adapter folder.

    In the processes of torchrun or `accelerate launch` it is called in each of them. They share every step's examples,
    and the recipe's batch stays the batch of them all. Process 0 alone talks, keeps the run's folder and publishes.

    The run keeps its checkpoints beside the output, in `<output>.run`, and goes on from the last of them when it is
    called again with the same settings. They are removed when the adapter is published. Where the recipe has dev rows,
    the adapter of the step with the lowest dev loss is published, not the last.

    Args:
        recipe: data and hyperparameters.
        base: folder of the base model.
        claims: what the registry gave to this task; `Registry.task(...)`.
        output: folder of the adapter to make.
        alpha, use_rslora: scaling, see SboraConfig.
        geometry: of the base, where it is known already.
        deepspeed: a DeepSpeed config file.
        penalty: what isolates the task from others, `Penalty.of(claims, moments)`: needed where the recipe's
            `training.isolate` is above 0, refused where it is 0. Or a function of the base's fingerprint that gives it.
            A run that goes on takes what it began with.
        dry_run: check base, claims and data, and return the steps and tokens of the run to come without starting it.
        say: told what a person should know on the way.
        on_start: called once, in process 0, when everything is checked and the run begins or goes on.

    Raises:
        UsageError: the recipe names an optimizer or a schedule that transformers does not have, its batch cannot be
            divided among the processes, their launcher asks for what cannot be had, or the penalty and
            `training.isolate` do not go together.
        CheckpointError: the base cannot be read, or `output` is taken.
        DataError: rows that are missing or do not fit, or too many of them cut off; a penalty of another base.
        TrainingError: the claims are another model's, an interrupted run had other settings, the loss is not finite, or
            the processes came up as something else than their launcher promised.
    """
    base, output = Path(base), Path(output)
    processes = Processes.promised(deepspeed=deepspeed)
    processes.check_recipe(recipe.training)
    if not processes.first:
        say = hush
    if penalty is not None and recipe.training.isolate is None and processes.parallelism == "deepspeed":
        say("DeepSpeed takes its step within backward: training without isolation from other tasks")
        penalty = None
    if not callable(penalty):
        strength_of(recipe, penalty)
    if not dry_run:
        processes.start()
    with processes.agree():
        run = output.with_name(f"{output.name}.run")
        if not run.is_dir():  # else the output may be this very run's, which was killed before its folder was gone
            check_output(output)
        geometry = geometry or from_checkpoint(base)
        if geometry.digest != claims.geometry_digest:
            raise TrainingError(
                f"the claims of task {claims.task!r} are for another geometry than that of {base}: "
                "release and allocate again for this model"
            )
        base_print = fingerprint(base, geometry)
        if isinstance(penalty, Penalty):
            penalty.check(claims, base_print)
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
        data = _prepare(recipe, base, say)
        # A run that goes on knows how it was begun. Of a new one nobody is told that it trains before this is settled.
        if callable(penalty) and not run.is_dir():
            penalty = _asked(penalty, recipe, claims, base_print)
    if dry_run:
        if callable(penalty) and not (run / ISOLATION_FILE).is_file():
            _asked(penalty, recipe, claims, base_print)
        cells = {m: r.values_shape(geometry.find(m).shape) for m, r in claims.regions.items()}
        return _expected(
            recipe, claims.task, output, data.train, sum(rows * columns for rows, columns in cells.values())
        )
    with contextlib.ExitStack() as held:
        with processes.agree():
            if processes.first:
                held.enter_context(hold_run(run))
                on_start()
        return _run(recipe, base, claims, output, run, config, data, penalty, processes, say)


def _run(
    recipe: Recipe,
    base: Path,
    claims: TaskClaims,
    output: Path,
    run: Path,
    config: SboraConfig,
    data: _Data,
    penalty: Penalty | Callable[[str], Penalty | None] | None,
    processes: Processes,
    say: Callable[[str], None],
) -> TrainResult:
    with processes.agree():
        begun = _begun(run, checkpoint_files(processes)) if processes.first else None
    begun = processes.tell(begun)
    with processes.agree():
        if begun == "isolated" and recipe.training.isolate != 0:
            penalty = Penalty.read(run / ISOLATION_FILE)
        elif begun == "plain" and recipe.training.isolate is None:
            penalty = None
        elif callable(penalty):
            penalty = _asked(penalty, recipe, claims, config.base_fingerprint)
        training = recipe.training.model_copy(update={"isolate": strength_of(recipe, penalty)})
        recipe = recipe.model_copy(update={"training": training})
    settings = {
        "recipe": _effective(recipe.model_dump(mode="json")),
        "train_digest": data.train.digest,
        "dev_digest": None if data.dev is None else data.dev.digest,
        "vocabulary_digest": data.vocabulary,
        "base_fingerprint": config.base_fingerprint,
        "claim_digest": config.claim_digest,
        "alpha": config.alpha,
        "use_rslora": config.use_rslora,
        **({} if penalty is None else {"isolation_digest": penalty.digest}),
        **processes.settings,
    }
    checkpoint = published = None
    with processes.agree():
        if processes.first:
            published = _published(output, run, settings, claims.task)
            if published is None:
                check_output(output)
                checkpoint = enter_run(run, settings, checkpoint_files(processes), say)
                if checkpoint is None:
                    (run / ISOLATION_FILE).unlink(missing_ok=True)
                    if penalty is not None:
                        penalty.write(run / ISOLATION_FILE)
    published = processes.tell(published)
    if published is not None:
        return published
    checkpoint = processes.tell(checkpoint)
    with processes.agree():
        processes.check_same(settings)
        if checkpoint is not None and not Path(checkpoint).is_dir():
            raise TrainingError(
                f"{checkpoint} is not there: all machines of a run need to see the folder of its output"
            )

    with processes.agree():
        base_model = load_base(base, recipe.training.quantization)
        config.base_quantization = record(base_model)
        if base_model.dtype == torch.float16 and not torch.cuda.is_available():
            say("the base is fp16, whose gradients vanish without loss scaling: training in fp32 on this machine")
            widen(base_model)
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
        elif use_flash_attention(base_model):
            say(f"attention: {base_model.config._attn_implementation}")
        machine = _machine(base_model, packed)
        if processes.first:
            keep_machine(run, machine, say)
        model = peft.get_peft_model(base_model, config)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        dev = None if data.dev is None else data.dev.examples
        trainer = TaskTrainer(
            *(model, recipe, run, data.train.examples, dev, processes), packed=packed, show=data.show, penalty=penalty
        )
    started = time.monotonic()
    try:
        with processes.connected():
            if not trainer.is_over(checkpoint):
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
        loss=trainer.metrics.loss,
        seconds=round(time.monotonic() - started, 1),
        trainable_parameters=trainable,
        dev_loss=trainer.state.best_metric,
        best_step=trainer.state.best_global_step,
    )
    state = None if processes.parallelism == "ddp" else whole_adapter(model)
    with processes.agree():
        if processes.first:
            summary = settings | {"recipe": recipe.model_dump(mode="json"), "machine": machine}
            summary |= {} if penalty is None else {"isolated_from": penalty.tasks}
            _publish(model, state, claims.model, run, output, summary, result, data)
    return result


def _asked(
    penalty: Callable[[str], Penalty | None], recipe: Recipe, claims: TaskClaims, base_print: str | None
) -> Penalty | None:
    """The penalty that a function gives, as good as one that was given at once."""
    assert base_print is not None  # `train` took it
    found = None if recipe.training.isolate == 0 else penalty(base_print)
    strength_of(recipe, found)
    if found is not None:
        found.check(claims, base_print)
    return found


def _begun(run: Path, files: list[str]) -> Literal["isolated", "plain"] | None:
    """How a run that goes on was begun; None where there is none."""
    if last_checkpoint(run, files) is None:
        return None
    return "isolated" if (run / ISOLATION_FILE).is_file() else "plain"


def _effective(recipe: dict[str, Any]) -> dict[str, Any]:
    """What of a recipe's JSON an interrupted run needs to find again, to end as it would have."""
    training = {key: value for key, value in recipe["training"].items() if key != "save_steps"}
    if not training.get("isolate"):  # runs that were interrupted before there was such a key go on
        training.pop("isolate", None)
    return {key: value for key, value in recipe.items() if key not in _WITHOUT_EFFECT} | {"training": training}


def _machine(model: Any, packed: bool) -> dict[str, Any]:
    """What the bits of a result hang on and no setting says."""
    device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    return {
        "torch": torch.__version__,
        "device": device,
        "attention": model.config._attn_implementation,
        "packed": packed,
        "threads": torch.get_num_threads() if device == "cpu" else None,
    }


@dataclass(frozen=True, slots=True)
class _Data:
    """What a run learns, what it is watched by, its vocabulary's digest, and the text of an example."""

    train: Encoded
    dev: Encoded | None
    vocabulary: str
    show: Callable[[Example], str]


def _prepare(recipe: Recipe, base: Path, say: Callable[[str], None]) -> _Data:
    tokenizer = load_tokenizer(base)
    rows = [row for _, row in load_rows(recipe.train)]
    dev_rows = None if recipe.dev is None else [row for _, row in load_rows(recipe.dev)]
    test: list[Row] = []
    try:
        test = [row for _, row in load_rows(recipe.eval.data)]
        seen = overlap(recipe, rows, test)
    except DataError as error:
        test = []
        say(f"not checked whether test rows are among the training rows: {error}")
    else:
        if seen:
            say(
                f"{seen} of {len(test)} test rows of task {recipe.name} are also training rows: their scores say little"
            )
    parts = split(recipe, rows, dev_rows, test)
    if parts.in_training or parts.in_test:
        say(
            f"task {recipe.name}: {parts.in_training + parts.in_test} dev rows are left out: {parts.in_training} have "
            f"the prompt of a training row, {parts.in_test} that of a test row"
        )
    if parts.of_training:
        say(f"task {recipe.name}: {len(parts.dev)} of {len(rows)} training rows are held out as dev rows")
    cutoff = recipe.training.cutoff
    train = encode(recipe, parts.train, tokenizer, cutoff)
    check_examples(train, recipe, say)
    dev = None
    if parts.dev:
        dev = encode(recipe, parts.dev, tokenizer, cutoff, "row" if parts.of_training else "dev row")
        check_examples(dev, recipe, say, "dev ")
    examples = [example for part in (train, dev) if part for example in part.examples]
    remedy, loss = "lower training.cutoff to {known}", "what it learns and scores beyond that is worth little"
    check_fit(load_config(base), examples, f"task {recipe.name}", remedy, loss, say)
    return _Data(train, dev, vocabulary_digest(tokenizer), lambda example: str(tokenizer.decode(example.input_ids)))


def changed_since(adapter: Path, recipe: Recipe, keys: Sequence[str]) -> list[str]:
    """Which of a recipe's keys ("seed" is training.seed) are not what an adapter was trained with, as far as its folder
    tells: nothing where another trainer made it."""
    told: dict[str, Any] = {}
    with contextlib.suppress(KeyError, TypeError):
        content = training_record(adapter)["recipe"]
        told = {**content, "seed": content["training"]["seed"]}
    now = {**recipe.model_dump(mode="json"), "seed": recipe.training.seed}
    return [key for key in keys if told and told.get(key) != now[key]]


def _expected(recipe: Recipe, task: str, output: Path, encoded: Encoded, parameters: int) -> TrainResult:
    settings = recipe.training
    steps_an_epoch = math.ceil(len(encoded.examples) / settings.batch_size)
    steps = settings.max_steps or math.ceil(settings.epochs * steps_an_epoch)
    tokens = round(steps / steps_an_epoch * encoded.tokens)
    return TrainResult(task, output, steps, tokens, None, 0.0, parameters)


def _check_names(recipe: Recipe) -> None:
    usable = {"optimizer": [str(member.value) for member in OptimizerNames], "lr_scheduler": _SCHEDULES}
    for key, known in usable.items():
        name = getattr(recipe.training, key)
        if name not in known:
            raise UsageError(
                f"recipe {recipe.name}: training.{key} {name!r} cannot be used: use one of {', '.join(known)}"
            )
    if recipe.training.optimizer.startswith("paged_") and not torch.cuda.is_available():
        raise UsageError(
            f"recipe {recipe.name}: training.optimizer {recipe.training.optimizer!r} moves its state between GPU and "
            "host, and there is no CUDA device here: use adamw_torch_fused, or adamw_bnb_8bit for a small state"
        )


def _publish(
    model: peft.PeftModel,
    state: dict[str, torch.Tensor] | None,
    name: str,
    run: Path,
    output: Path,
    settings: dict[str, Any],
    result: TrainResult,
    data: _Data,
) -> None:
    summary = {
        **settings,
        "steps": result.steps,
        "tokens": result.tokens,
        "loss": result.loss,
        "trainable_parameters": result.trainable_parameters,
        "dev_loss": result.dev_loss,
        "best_step": result.best_step,
        "examples": len(data.train.examples),
        "truncated": data.train.truncated,
        "dev_examples": None if data.dev is None else len(data.dev.examples),
        "dev_truncated": None if data.dev is None else data.dev.truncated,
    }
    # The model's name, not this machine's path, goes into the config and the model card. Not earlier: PEFT asks the hub
    # for the base model's config at every checkpoint, unless it finds the folder.
    base_model = model.get_base_model()
    model.active_peft_config.base_model_name_or_path = base_model.name_or_path = base_model.config.name_or_path = name
    with publish(output) as partial:
        model.save_pretrained(partial, state_dict=state, save_embedding_layers=False)
        if result.best_step is not None:  # also of the last step: a run that went on to publish has loaded no values
            shutil.copyfile(run / f"checkpoint-{result.best_step}" / WEIGHTS_FILE, partial / WEIGHTS_FILE)
        (partial / TRAINING_FILE).write_text(json.dumps(summary, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        shutil.copyfile(run / METRICS_FILE, partial / METRICS_FILE)
    remove_run(run)


def _published(output: Path, run: Path, settings: dict[str, Any], task: str) -> TrainResult | None:
    """The result of a run that was killed when its adapter was in place and its own folder not yet gone."""
    try:
        summary = training_record(output)
        found = {**summary, "recipe": _effective(summary["recipe"])}
    except (ValueError, TypeError, KeyError, AttributeError):  # missing, or another program's
        return None
    if {key: found.get(key) for key in settings} != settings:
        return None
    remove_run(run)
    figures = {
        key: summary[key] for key in ("steps", "tokens", "loss", "trainable_parameters", "dev_loss", "best_step")
    }
    return TrainResult(task=task, adapter=output, seconds=0.0, **figures)
