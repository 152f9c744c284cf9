"""TRL's trainers on our adapters: both forms learn the same, whatever a trainer does between steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from builders import tiny_llama
from datasets import Dataset
from layers import FORMS, bits
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from multisbora import SboraConfig
from multisbora.tuner.forms import Form

QUESTIONS = [f"{n} plus one is " for n in range(8)]
ANSWERS = [str(n + 1) for n in range(8)]
DATA: dict[str, dict[str, Any]] = {
    "sft": {"text": [question + answer for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]},
    # The reference model is this one with its adapter switched off, between forward and backward of the policy.
    "dpo": {"prompt": QUESTIONS, "chosen": ANSWERS, "rejected": ["none"] * 8},
}
KINDS: dict[str, tuple[Any, Any]] = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # TRL's own
@pytest.mark.parametrize("kind", KINDS)
def test_both_forms_learn_the_same(kind: str, tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", dtype="float32")
    trainer_class, arguments = KINDS[kind]

    def learn(form: Form) -> tuple[list[float], list[Tensor]]:
        model = AutoModelForCausalLM.from_pretrained(base)
        config = SboraConfig(r=4, alpha=4, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])
        adapted = peft.get_peft_model(model, config)
        adapted.base_model.set_form(form)
        layer = adapted.base_model.model.model.layers[0].mlp.down_proj
        before = bits(layer.weight)
        trainer = trainer_class(
            model=adapted,
            args=arguments(
                output_dir=str(tmp_path / form),
                max_steps=4,
                per_device_train_batch_size=2,
                learning_rate=0.05,
                logging_steps=1,
                save_strategy="no",
                bf16=False,
                use_cpu=True,
                disable_tqdm=True,
                report_to="none",
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_dict(DATA[kind]),
            processing_class=AutoTokenizer.from_pretrained(base),
        )
        trainer.train()
        assert torch.equal(bits(layer.weight), before)
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        return losses, [values.detach() for values in adapted.parameters() if values.requires_grad]

    (one, values), (other, wanted) = (learn(form) for form in FORMS)
    assert len(one) == 4 and one[0] != one[-1]
    assert one == pytest.approx(other, rel=1e-6)
    for found, value in zip(values, wanted, strict=True):
        assert found.abs().max() > 0.05
        torch.testing.assert_close(found, value, rtol=0, atol=1e-6)
