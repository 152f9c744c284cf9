"""What packed batches tell a flash kernel, shown by a kernel of our own that believes nothing else."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
from builders import VOCABULARY
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from multisbora.attention import PACKED, flash_kernel, use_flash_attention, use_packed_attention
from multisbora.dataset import Example, pack, packs, pad
from multisbora.trainer import answer_loss

attention = importlib.import_module("multisbora.attention")
KERNEL = "varlen_of_this_test"
WINDOW = 4
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SIZES |= dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)
GPT2_SIZES = dict(n_embd=24, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=64, bos_token_id=1)
GPT2_SIZES |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def by_bounds(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What flash_attn_varlen_func computes, written out: scores of each example alone, by softmax."""
    assert attention_mask is None and cu_seq_lens_q.dtype == cu_seq_lens_k.dtype == torch.int32
    bounds = cu_seq_lens_q.tolist()
    assert bounds == cu_seq_lens_k.tolist() and bounds[0] == 0 and bounds[-1] == query.shape[2]
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    assert max_length_q == max_length_k == max(lengths)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    parts = []
    for start, length in zip(bounds, lengths, strict=False):
        q, k, v = (x[:, :, start : start + length] for x in (query, key, value))
        distance = torch.arange(length)[:, None] - torch.arange(length)
        seen = (distance >= 0) & (distance < (sliding_window or length))
        scores = q @ k.transpose(-1, -2) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
        parts.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v)
    return torch.cat(parts, 2).transpose(1, 2), None


def make(kind: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
            "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZES)),
            "mistral": lambda: MistralForCausalLM(MistralConfig(sliding_window=WINDOW, **SIZES)),
        }[kind]()


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    return [
        Example(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist(), start)
        for length, start in [(9, 3), (3, 2), (14, 10), (1, 1), (7, 1)]
    ]


def loss_and_gradients(model: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    labels = batch.pop("labels")
    loss = answer_loss(model(**batch, use_cache=False), labels)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_a_flash_kernel_is_told_where_examples_lie(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    AttentionInterface.register(KERNEL, by_bounds)
    AttentionMaskInterface.register(KERNEL, AttentionMaskInterface()["flash_attention_2"])
    model = make(kind)
    wanted, padded = loss_and_gradients(model, dict(pad(examples(), 0)))
    assert use_packed_attention(model) and packs(model)
    monkeypatch.setattr(attention, "flash_kernel", lambda model: KERNEL)
    assert use_flash_attention(model) and model.config._attn_implementation == KERNEL
    loss, packed = loss_and_gradients(model, {**pack(examples()), "deterministic": True})
    # fp32, sums in another order: a few roundings.
    assert abs(loss - wanted) <= 2e-6 * abs(wanted)
    assert packed.keys() == padded.keys() and packed
    for name, gradient in packed.items():
        assert (gradient - padded[name]).norm() <= 1e-5 * padded[name].norm() + 1e-7, name


def test_when_a_flash_kernel_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama").to(torch.bfloat16)
    installed: set[int] = set()
    monkeypatch.setattr(attention.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: 2 in installed)
    monkeypatch.setattr(attention, "is_flash_attn_3_available", lambda: 3 in installed)
    assert flash_kernel(model) is None
    installed.add(2)
    assert flash_kernel(model) == "flash_attention_2"
    installed.add(3)
    assert flash_kernel(model) == "flash_attention_3"
    assert flash_kernel(make("llama")) is None  # fp32
    monkeypatch.setattr(type(model), "_supports_flash_attn", False)
    assert flash_kernel(model) is None
    monkeypatch.undo()
    assert torch.cuda.is_available() or flash_kernel(model) is None


def test_a_kernel_that_transformers_refuses_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    use_packed_attention(model)
    monkeypatch.setattr(attention, "flash_kernel", lambda model: "flash_attention_2")

    def refuse(name: str) -> None:
        if name != PACKED:
            raise ValueError("heads of this size are too large")

    monkeypatch.setattr(model, "set_attn_implementation", refuse)
    assert not use_flash_attention(model) and model.config._attn_implementation == PACKED
    model.config._attn_implementation_internal = "eager"
    assert not use_flash_attention(model)
