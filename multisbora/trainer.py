"""What a run adds to transformers' Trainer: its arguments from a recipe, the loss of the answer tokens, and metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import get_length_grouped_indices

from .adapter import WEIGHTS_FILE
from .dataset import Example, pack, pad
from .distributed import Processes, StepBatches, use_cpu
from .errors import TrainingError, UsageError
from .metrics import Metrics
from .penalty import LivePenalty, Penalty, strength_of
from .recipe import Recipe
from .run import METRICS_FILE
from .sharding import local, spread_adapter, spread_optimizer, whole, whole_adapter
from .state import random_state, read_state, restore_random_state, state_files, write_state

OPTIMIZER, SCHEDULER, SCALER, RANDOM = "optimizer", "scheduler", "scaler", "random"


class TaskTrainer(Trainer):
    """transformers' Trainer for one task.

    It has one order of examples, however many processes share them. It keeps its state without pickles, counts tokens
    without waiting for the device, and looks at the loss of every step before the optimizer does, once a step.

    Attributes:
        metrics: the callback that knows the run's last loss.

    Args:
        model: the PEFT model.
        train: the examples to learn.
        dev: the examples to watch the run by, if there are any.
        packed: whether the model keeps packed examples apart; else batches are padded.
        show: the text of an example, for messages.
        penalty: for isolated training.
    """

    def __init__(
        self,
        model: Any,
        recipe: Recipe,
        run: Path,
        train: Sequence[Example],
        dev: Sequence[Example] | None,
        processes: Processes,
        *,
        packed: bool,
        show: Callable[[Example], str],
        penalty: Penalty | None = None,
    ) -> None:
        self.recipe, self.processes, self.packed, self.show = recipe, processes, packed, show
        self.metrics = Metrics(run / METRICS_FILE, recipe)
        self._pad_id = model.config.get_text_config().pad_token_id or 0
        self._tokens = 0
        self._losses: list[tuple[Tensor, list[int]]] = []  # of the micro-batches of this step, with their rows
        self._penalty = None
        if penalty is not None:  # what harms a row is weighed against a row, and the loss is one of answer tokens
            answers = sum(len(example.input_ids) - example.answer_start for example in train) / len(train)
            self._penalty = LivePenalty(model, penalty, strength_of(recipe, penalty) / answers)
        # Whole batches of similar length waste least where they have to be padded.
        self._dev = sorted(dev or [], key=lambda example: len(example.input_ids))
        super().__init__(
            model=model,
            args=training_arguments(
                recipe, run, processes, scale_loss=model.dtype == torch.float16, evaluate=dev is not None
            ),
            train_dataset=train,
            eval_dataset=dev,
            data_collator=self._collate,
            compute_loss_func=lambda outputs, labels, **count: answer_loss(outputs, labels[:, 1:], **count),
            callbacks=[self.metrics],
        )
        self.remove_callback(transformers.PrinterCallback)
        processes.check(self.accelerator)
        try:
            self.get_optimizer_cls_and_kwargs(self.args, self.model)
        except (ImportError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UsageError(
                f"recipe {recipe.name}: training.optimizer {recipe.training.optimizer!r} cannot be had: {reason}"
            ) from None

    def is_over(self, checkpoint: str | None) -> bool:
        """Whether the run that left a checkpoint had no step to go; its state is this Trainer's then."""
        if checkpoint is None:
            return False
        state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
        if not self.metrics.over(state):
            return False
        self.state = state
        if self.processes.first:
            self.metrics.rewind(state.global_step)
        return True

    def get_train_dataloader(self) -> Any:
        examples = self.train_dataset
        batches = StepBatches(
            self._get_train_sampler(examples),
            self.recipe.training.batch_size,
            self.args.per_device_train_batch_size,
            self.processes,
            blank=len(examples),
        )
        # One process alone is never left without an example.
        spare = [blank(examples[0])] if self.processes.count > 1 else []
        loader: DataLoader[Any] = DataLoader(
            [*examples, *spare],  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.packed:
            return super()._get_train_sampler(train_dataset)
        lengths = [len(example.input_ids) for example in self.train_dataset]
        return LengthGrouped(lengths, self.recipe.training.batch_size, self.args.seed)

    def _collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        batch = self._batch(examples)
        # Trainer counts the answer tokens of a step in labels[..., 1:], for losses that shift labels. Ours line up with
        # the logits already: a column is put before them for it to leave out.
        batch["labels"] = F.pad(batch["labels"], (1, 0), value=-100)
        ids = [example.input_ids for example in examples if example.answer_start < len(example.input_ids)]
        batch["tokens"] = sum(map(len, ids))  # a blank does not count
        batch["rows"] = [example.row for example in examples]
        return batch

    def _batch(self, examples: Sequence[Example]) -> dict[str, Any]:
        if self.packed:
            # Flash attention's backward adds up in the order of the moment unless it is told not to.
            return {**pack(examples), "deterministic": True}
        return dict(pad(examples, self._pad_id))

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self._tokens += inputs.pop("tokens")
        rows = inputs.pop("rows")
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._losses.append((loss, rows))
        if self.accelerator.sync_gradients:  # the step's last micro-batch
            self._check_losses()
            if self._penalty is not None:
                scaler = self.accelerator.scaler
                self._penalty.add_gradient(
                    None if scaler is None else scaler.scale(torch.ones((), device=self.args.device))
                )
            self._count_tokens()
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """A training loss is logged with the penalty of the values at that moment, as "isolation"."""
        if self._penalty is not None and "loss" in logs:
            logs["isolation"] = self._penalty.value()
        super().log(logs, *args, **kwargs)

    def _check_losses(self) -> None:
        """The one place in a step that waits for the device.

        Raises:
            TrainingError: a loss is not finite. The optimizer has not seen its gradients.
        """
        losses, rows = zip(*self._losses, strict=True)
        self._losses.clear()
        values = torch.stack(losses).tolist()
        odd = [i for i, value in enumerate(values) if not math.isfinite(value)]
        if not odd:
            return
        step = self.state.global_step + 1
        numbers = sorted(row for i in odd for row in rows[i] if row)
        named = ", ".join(map(str, numbers[:16])) + (f" and {len(numbers) - 16} more" if len(numbers) > 16 else "")
        text = next((self.show(example) for example in self.train_dataset if example.row == numbers[0]), "")
        said = f"task {self.recipe.name}: loss is {values[odd[0]]} at step {step}, on training rows {named}"
        said += f" (row {numbers[0]}: {' '.join(text.split())[:80]!r})"
        if not all(bool(local(p).isfinite().all()) for p in self.model.parameters() if p.requires_grad):
            raise TrainingError(
                f"{said}, but not for their sake: the update of step {step - 1} made values of the adapter infinite; "
                "lower training.learning_rate or training.max_grad_norm"
            )
        raise TrainingError(f"{said}; lower training.learning_rate, or look for broken rows in the training data")

    def _count_tokens(self) -> None:
        tokens, self._tokens = self._tokens, 0
        if self.processes.count > 1:
            tokens = int(self.accelerator.reduce(torch.tensor(tokens, device=self.args.device), "sum"))
        self.state.num_input_tokens_seen += tokens

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """None: nobody reads the count, and Trainer walks through all of the model for it at every micro-batch."""
        return 0

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The loss of the dev examples, nats per answer token over all of them, as "eval_loss".

        Draws no random number, so that training goes on as it would have without.

        Raises:
            TrainingError: it is not finite.
        """
        size = self.args.per_device_eval_batch_size
        batches = [self._dev[start : start + size] for start in range(0, len(self._dev), size)]
        self.model.eval()
        total = 0.0
        # Sharded weights are gathered by all processes at once, so that all have to run as many batches.
        for start in range(0, len(batches), self.processes.count):
            mine = batches[start + self.processes.rank :][:1]
            batch = self._prepare_inputs(self._batch(mine[0] if mine else [blank(self._dev[0])]))
            labels = batch.pop("labels")
            with torch.no_grad(), self.compute_loss_context_manager():
                total += float(answer_loss(self.model(**batch), labels, num_items_in_batch=1))
        if self.processes.count > 1:
            summed = torch.tensor(total, dtype=torch.float64, device=self.args.device)
            total = float(self.accelerator.reduce(summed, "sum"))
        loss = total / sum(len(example.input_ids) - example.answer_start for example in self._dev)
        if not math.isfinite(loss):
            raise TrainingError(
                f"task {self.recipe.name}: dev loss is {loss} at step {self.state.global_step}; "
                "lower training.learning_rate, or look for broken dev rows"
            )
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.log(dict(metrics))  # it puts the epoch in
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # What follows keeps a checkpoint's files to safetensors and JSON. Trainer itself would pickle them.

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.model.save_pretrained(
            output_dir or self.args.output_dir, state_dict=state_dict, save_embedding_layers=False
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.processes.parallelism == "ddp":
            super().save_model(output_dir, _internal_call)
            return
        adapter = whole_adapter(self.model)  # Trainer would gather the base model's weights too
        if self.args.should_save:
            self._save(output_dir, state_dict=adapter)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.processes.parallelism != "fsdp2":
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = load_file(Path(resume_from_checkpoint, WEIGHTS_FILE))
        spread_adapter(self.model, saved, self.model.active_adapter)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.processes.parallelism == "deepspeed":  # which has files of its own for both
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer = whole(self.optimizer.state_dict())
        if self.args.should_save:
            write_state(Path(output_dir, OPTIMIZER), optimizer)
            write_state(Path(output_dir, SCHEDULER), self.lr_scheduler.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.processes.parallelism == "deepspeed":
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            optimizer = read_state(Path(checkpoint, OPTIMIZER))
            self.optimizer.load_state_dict(spread_optimizer(optimizer, self.optimizer))
            self.lr_scheduler.load_state_dict(read_state(Path(checkpoint, SCHEDULER)))

    def _save_scaler(self, output_dir: str) -> None:
        if self.accelerator.scaler is not None and self.args.should_save:
            write_state(Path(output_dir, SCALER), self.accelerator.scaler.state_dict())

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self.accelerator.scaler is not None and checkpoint is not None:
            self.accelerator.scaler.load_state_dict(read_state(Path(checkpoint, SCALER)))

    def _save_rng_state(self, output_dir: str) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        write_state(Path(output_dir, f"{RANDOM}_{self.processes.rank}"), random_state())
        # Process 0 writes the Trainer's state next, which says that the checkpoint is whole.
        self.accelerator.wait_for_everyone()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_random_state(read_state(Path(checkpoint, f"{RANDOM}_{self.processes.rank}")))


class LengthGrouped(Sampler[int]):
    """Examples in an order in which those of a step have similar lengths, drawn from seed and epoch alone.

    transformers' own sampler of this kind draws from the random state of the moment, which a run that goes on in the
    middle of an epoch has no more.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


def checkpoint_files(processes: Processes) -> list[str]:
    """Names of the files without which a run cannot go on from a checkpoint, but for the Trainer's own state."""
    if processes.parallelism == "deepspeed":  # which names its own files by its version and the number of devices
        return [WEIGHTS_FILE]
    states = [OPTIMIZER, SCHEDULER, *(f"{RANDOM}_{rank}" for rank in range(processes.count))]
    return [WEIGHTS_FILE, *(name for state in states for name in state_files(state))]


def blank(example: Example) -> Example:
    """An example without an answer token: it adds nothing to loss and gradients."""
    return Example(example.input_ids[:1], answer_start=1)


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


def training_arguments(
    recipe: Recipe, run: Path, processes: Processes, *, scale_loss: bool, evaluate: bool
) -> TrainingArguments:
    settings = recipe.training
    micro, accumulate = processes.micro_batch(settings.batch_size, settings.micro_batch_size)
    arguments = TrainingArguments(
        fp16=scale_loss,
        output_dir=str(run),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=settings.optimizer,
        save_steps=settings.save_steps,
        save_total_limit=2,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=settings.eval_steps if evaluate else None,
        metric_for_best_model="loss" if evaluate else None,
        greater_is_better=False if evaluate else None,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=use_cpu(),
        deepspeed=processes.deepspeed,
        # StepBatches deals out the last batch of an epoch itself; accelerate would fill it up with examples again.
        accelerator_config={"even_batches": False},
        # Every adapter takes part in every forward.
        ddp_find_unused_parameters=False,
    )
    # With several GPUs in sight the Trainer would split each tensor of a batch; a packed batch is one row.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments
