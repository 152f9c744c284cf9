"""What a step computes: the same from packed and from padded micro-batches; and what stops it."""

from __future__ import annotations

import importlib
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from builders import VOCABULARY
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    TrainerCallback,
)

from multisbora import SboraConfig
from multisbora.attention import use_packed_attention
from multisbora.dataset import Example, packs, pad
from multisbora.distributed import Processes
from multisbora.errors import TrainingError, UsageError
from multisbora.penalty import LivePenalty, Penalty
from multisbora.recipe import Recipe
from multisbora.trainer import LengthGrouped, TaskTrainer, answer_loss, checkpoint_files

trainer_module = importlib.import_module("multisbora.trainer")

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SIZES |= dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)
GPT2_SIZES = dict(n_embd=24, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=64, bos_token_id=1)
GPT2_SIZES |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
LENGTHS = [(9, 3), (3, 2), (14, 10), (7, 1), (5, 4), (21, 6), (4, 1)]
# fp32, the same sums in another order: relative to the norm of each gradient.
TOLERANCE = 2e-5


def model(kind: str, variant: str = "fa") -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base: PreTrainedModel = {
            "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
            "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZES)),
            "mistral": lambda: MistralForCausalLM(MistralConfig(sliding_window=4, **SIZES)),
        }[kind]()
        targets = ["c_attn", "c_fc"] if kind == "gpt2" else ["q_proj", "v_proj", "down_proj"]
        base.config.use_cache = False
        use_packed_attention(base)
        assert packs(base)
        found = peft.get_peft_model(base, SboraConfig(variant=variant, r=4, alpha=8, target_modules=targets))
        for name, parameter in found.named_parameters():
            if "sbora_values" in name:  # a fresh adapter is zero, and the gradients of some are zero with it
                torch.nn.init.normal_(parameter, std=0.05)
    return found


def examples(lengths: Sequence[tuple[int, int]] = LENGTHS) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    return [
        Example(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist(), start, row)
        for row, (length, start) in enumerate(lengths, 1)
    ]


def recipe(**training: Any) -> Recipe:
    content = {"name": "toy", "prompt": "{question}", "train": "x.json", "eval": {"data": "y.json", "metric": "number"}}
    plain = {"batch_size": len(LENGTHS), "warmup_steps": 0, "max_grad_norm": 1e9, "max_steps": 1, "logging_steps": 1}
    return Recipe.model_validate(content | {"training": plain | training})


class Gradients(TrainerCallback):
    """The gradients of each step, as the optimizer gets them, and the losses that were logged."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.losses: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.losses += [logs["loss"]] if "loss" in logs else []


def make_trainer(
    live: Any,
    folder: Path,
    train: list[Example],
    dev: list[Example] | None = None,
    packed: bool = True,
    penalty: Penalty | None = None,
    **training: Any,
) -> TaskTrainer:
    return TaskTrainer(
        *(live, recipe(**training), folder, train, dev, Processes()),
        packed=packed,
        show=lambda example: f"text of row {example.row}",
        penalty=penalty,
    )


def run(live: Any, folder: Path, *, packed: bool, penalty: Penalty | None = None, **training: Any) -> Gradients:
    folder.mkdir()
    trainer = make_trainer(live, folder, examples(), packed=packed, penalty=penalty, **training)
    seen = Gradients()
    trainer.add_callback(seen)
    trainer.train()
    return seen


# --- one step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["fa", "fb"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_packed_and_padded_steps_are_equal(kind: str, variant: str, tmp_path: Path) -> None:
    """Seven uneven examples in one, three or seven micro-batches: always the sum over all answer tokens, by their
    number."""
    live = model(kind, variant)
    batch = dict(pad(examples(), 0))
    labels = batch.pop("labels")
    loss = answer_loss(live.train()(**batch), labels)
    loss.backward()
    wanted = {n: p.grad.clone() for n, p in live.named_parameters() if p.grad is not None}
    assert all(gradient.any() for gradient in wanted.values())
    for packed, micro in itertools.product((True, False), (7, 1)):
        seen = run(model(kind, variant), tmp_path / f"{packed}-{micro}", packed=packed, micro_batch_size=micro)
        (step,) = seen.steps
        assert seen.losses == [pytest.approx(float(loss.detach()), rel=TOLERANCE)]
        assert step.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert (step[name] - gradient).norm() <= TOLERANCE * gradient.norm(), (name, packed, micro)


@pytest.mark.parametrize("packed", [True, False])
def test_uneven_micro_batches(packed: bool, tmp_path: Path) -> None:
    """The last micro-batch has one example of seven; a mean of means would weigh it like three."""
    whole = run(model("llama"), tmp_path / "whole", packed=packed)
    parts = run(model("llama"), tmp_path / "parts", packed=packed, batch_size=9, micro_batch_size=3)
    assert parts.losses == [pytest.approx(whole.losses[0], rel=TOLERANCE)]
    for name, gradient in whole.steps[0].items():
        assert (parts.steps[0][name] - gradient).norm() <= TOLERANCE * gradient.norm(), name


def random_penalty(live: Any) -> Penalty:
    """Of nobody's claims, with blocks of random numbers."""
    generator, blocks = torch.Generator().manual_seed(1), {}
    for name, layer in live.base_model.named_layers():
        fa = layer.variant["default"] == "fa"
        size = layer.sbora_indices["default"].numel() if fa else layer.in_features
        found = torch.randn((size, 2 * size), generator=generator)
        blocks[name] = (found @ found.t() / size).numpy()
    return Penalty("", (), blocks)


@pytest.mark.parametrize("variant", ["fa", "fb"])
def test_an_isolated_step_adds_the_penalty_once(variant: str, tmp_path: Path) -> None:
    """However many micro-batches a step has, and before its gradient is clipped."""
    live = model("llama", variant)
    penalty = random_penalty(live)
    alone = LivePenalty(live, penalty, 5.0 / statistics.mean(len(x.input_ids) - x.answer_start for x in examples()))
    logged = alone.value()
    alone.add_gradient()
    added = {name: p.grad for name, p in live.named_parameters() if p.grad is not None}
    (plain,) = run(model("llama", variant), tmp_path / "plain", packed=True).steps
    wanted = {name: gradient + added[name] for name, gradient in plain.items()}
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    assert all((wanted[name] - gradient).norm() > 0.01 * gradient.norm() for name, gradient in plain.items())
    for micro, clip in ((7, 1e9), (1, 1e9), (3, float(norm) / 2)):
        isolated = {"isolate": 5.0, "micro_batch_size": micro, "max_grad_norm": clip}
        (step,) = run(model("llama", variant), tmp_path / f"{micro}", packed=True, penalty=penalty, **isolated).steps
        factor = min(1.0, clip / float(norm))
        assert step.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert (step[name] - factor * gradient).norm() <= TOLERANCE * gradient.norm(), (name, micro)

    trainer = make_trainer(model("llama", variant), tmp_path, examples(), penalty=penalty, isolate=5.0)
    assert trainer._penalty is not None and trainer._penalty.value() == pytest.approx(logged)
    trainer.train()
    (line, *_) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["isolation"] == trainer._penalty.value() < logged


def test_a_blank_is_at_hand_only_where_a_process_can_be_left_without(tmp_path: Path) -> None:
    trainer = make_trainer(model("llama"), tmp_path, examples())
    assert len(trainer.get_train_dataloader().dataset) == len(LENGTHS)
    trainer.processes = Processes(2)
    assert len(trainer.get_train_dataloader().dataset) == len(LENGTHS) + 1


def test_the_files_of_a_checkpoint() -> None:
    assert {"adapter_model.safetensors", "optimizer.json", "scheduler.safetensors"} < set(checkpoint_files(Processes()))
    one, two = checkpoint_files(Processes()), checkpoint_files(Processes(2, 1, "fsdp2"))
    assert sorted(set(two) - set(one)) == ["random_1.json", "random_1.safetensors"]
    assert checkpoint_files(Processes(2, 0, "deepspeed")) == ["adapter_model.safetensors"]


def test_real_tokens_are_counted(tmp_path: Path) -> None:
    for packed in (True, False):
        folder = tmp_path / str(packed)
        folder.mkdir()
        trainer = make_trainer(model("llama"), folder, examples(), packed=packed, micro_batch_size=1)
        trainer.train()
        assert trainer.state.num_input_tokens_seen == sum(length for length, _ in LENGTHS)


# --- dev examples -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_dev_loss_is_per_answer_token(packed: bool, tmp_path: Path) -> None:
    live, dev = model("llama"), examples()
    batch = dict(pad(dev, 0))
    labels = batch.pop("labels")
    with torch.no_grad():
        wanted = answer_loss(live.eval()(**batch), labels)
    trainer = make_trainer(live, tmp_path, examples(), dev, packed=packed, batch_size=2)
    before = torch.get_rng_state()
    assert trainer.evaluate() == {"eval_loss": pytest.approx(float(wanted), rel=TOLERANCE)}
    assert torch.equal(torch.get_rng_state(), before)


# --- order --------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 8), st.integers(0, 3), st.integers(0, 3))
def test_length_grouped_order(lengths: list[int], batch: int, seed: int, epoch: int) -> None:
    sampler = LengthGrouped(lengths, batch, seed)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths))) and len(sampler) == len(lengths)
    torch.rand(1)  # whatever was drawn before
    again = LengthGrouped(lengths, batch, seed)
    again.set_epoch(epoch)
    assert list(again) == order == list(again)


def test_length_grouping_saves_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 400, (800,), generator=generator).tolist()

    def padded(order: list[int]) -> int:
        return sum(8 * max(lengths[i] for i in order[at : at + 8]) for at in range(0, 800, 8))

    assert padded(list(LengthGrouped(lengths, 8, 0))) < 1.05 * sum(lengths) < padded(list(range(800)))
    one, two = LengthGrouped(lengths, 8, 0), LengthGrouped(lengths, 8, 0)
    two.set_epoch(1)
    assert list(one) != list(two)


# --- what stops it ------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = examples()
    broken = train[2].input_ids[-1]

    def loss(outputs: Any, labels: torch.Tensor, **count: Any) -> torch.Tensor:
        found = answer_loss(outputs, labels, **count)
        return found * torch.nan if (labels == broken).any() else found

    monkeypatch.setattr(trainer_module, "answer_loss", loss)
    live = model("llama")
    before = {name: p.detach().clone() for name, p in live.named_parameters() if p.requires_grad}
    trainer = make_trainer(live, tmp_path, train, micro_batch_size=1, logging_steps=50, max_steps=3)
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    message = str(caught.value)
    assert message.startswith("task toy: loss is nan at step 1, on training rows 3 (row 3: 'text of row 3')")
    assert "lower training.learning_rate" in message and "\n" not in message
    for name, parameter in live.named_parameters():
        assert name not in before or torch.equal(parameter, before[name])  # the optimizer has not seen it


def test_an_adapter_that_is_not_finite_is_not_the_rows_fault(tmp_path: Path) -> None:
    live = model("llama")
    trainer = make_trainer(live, tmp_path, examples(), max_steps=3)

    class Break(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(torch.inf)

    trainer.add_callback(Break())
    with pytest.raises(TrainingError, match=r"at step 2, .* the update of step 1 made values of the adapter infinite"):
        trainer.train()


def test_a_dev_loss_that_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(model("llama"), tmp_path, examples(), examples())
    monkeypatch.setattr(trainer_module, "answer_loss", lambda *_, **__: torch.tensor(torch.inf))
    with pytest.raises(TrainingError, match="task toy: dev loss is inf at step 0"):
        trainer.evaluate()


def test_an_optimizer_whose_package_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"recipe toy: training.optimizer 'galore_adamw' cannot be had: .*galore"):
        make_trainer(model("llama"), tmp_path, examples(), optimizer="galore_adamw")
