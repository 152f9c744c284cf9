"""What a run tells while it goes: metrics.jsonl, the bar on a terminal; and when it keeps, evaluates and ends."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from .recipe import Recipe


class Metrics(TrainerCallback):
    """A line of JSON for each logged step and each look at the dev rows; process 0 alone writes and draws.

    It also ends a run whose dev loss falls no more, and has a checkpoint written wherever that was lowest. It has no
    state of its own that a run would lose when it is killed: all follows from the Trainer's state and the file.

    Attributes:
        loss: mean over the last logged steps, nats per answer token.
    """

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path, self.recipe = path, recipe
        self.loss = math.nan
        self._bar: Any = None
        self._shown: dict[str, str] = {}
        self._clock = (0.0, 0)

    def rewind(self, step: int) -> None:
        """Drop what was written of later steps: a run that was killed may have got beyond its last checkpoint."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        partial.replace(self.path)
        losses = [loss for line in kept if (loss := json.loads(line).get("loss")) is not None]
        self.loss = losses[-1] if losses else math.nan

    def over(self, state: Any) -> bool:
        """Whether a run in this state has nothing left to do."""
        return bool(state.global_step >= state.max_steps) or self._out_of_patience(state)

    def _out_of_patience(self, state: Any) -> bool:
        settings = self.recipe.training
        if settings.early_stopping_patience is None or state.best_global_step is None:
            return False
        without = (state.global_step - state.best_global_step) // settings.eval_steps
        return bool(without >= settings.early_stopping_patience)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._clock = (time.monotonic(), state.num_input_tokens_seen)
        if not state.is_world_process_zero:
            return
        self.rewind(state.global_step)
        if sys.stderr.isatty():
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.recipe.name, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True  # whatever logging_steps is: no run may end without a loss
            control.should_evaluate = args.eval_strategy != "no"
            control.should_save = False  # the adapter itself comes next
        # A checkpoint lies between two logged means, so that a run that goes on from it logs the same ones. And a dev
        # loss says most beside the training loss of its step.
        control.should_log |= control.should_save or control.should_evaluate
        if self._bar is not None:
            self._bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        self.loss = float(logs["loss"])
        now, tokens = time.monotonic(), int(state.num_input_tokens_seen)
        speed = (tokens - self._clock[1]) / max(now - self._clock[0], 1e-9)
        self._clock = (now, tokens)
        isolation = {key: logs[key] for key in ("isolation",) if key in logs}
        shown = {key: f"{value:.3g}" for key, value in isolation.items()}
        self._write(
            state,
            {"loss": f"{self.loss:.3f}", **shown, "tok/s": f"{speed:.0f}"},
            loss=self.loss,
            learning_rate=logs.get("learning_rate"),
            grad_norm=logs.get("grad_norm"),
            tokens=tokens,
            tokens_per_second=round(speed, 1),
            **isolation,
        )

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        loss = metrics["eval_loss"]
        self._write(state, {"dev": f"{loss:.3f}"}, dev_loss=loss)
        self._clock = (time.monotonic(), int(state.num_input_tokens_seen))
        # The Trainer takes it for the best after this call.
        if state.best_metric is None or loss < state.best_metric:
            control.should_save = True
        elif self._out_of_patience(state):
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def _write(self, state: Any, shown: dict[str, str], **figures: Any) -> None:
        if not state.is_world_process_zero:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **figures}) + "\n")
        if self._bar is not None:
            self._shown |= shown
            self._bar.set_postfix(self._shown)
