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
    Exaone4Config,
    Exaone4ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
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


def windowed() -> Any:
    """Its second layer sees everything, and its attention modules know of the window all the same."""
    layers = ["sliding_attention", "full_attention"]
    return Exaone4ForCausalLM(Exaone4Config(sliding_window=WINDOW, layer_types=layers, **SIZES))


def chunked(size: int = WINDOW) -> Any:
    experts = dict(num_local_experts=2, intermediate_size_mlp=48, head_dim=8, use_qk_norm=False)
    layers = ["chunked_attention", "full_attention"]
    return Llama4ForCausalLM(
        Llama4TextConfig(attention_chunk_size=size, layer_types=layers, **experts, **SIZES)  # type: ignore[arg-type]
    )


def recurrent() -> Any:
    linear = dict(linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
    experts = dict(head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16)
    experts |= dict(shared_expert_intermediate_size=16)
    layers = ["linear_attention", "full_attention"]
    return Qwen3NextForCausalLM(Qwen3NextConfig(layer_types=layers, **linear, **experts, **SIZES))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("build", "own", "packed"),
    [(windowed, False, True), (chunked, True, True), (recurrent, None, False)],
    ids=["a window in some layers", "chunks", "a state"],
)
def test_layers_of_several_kinds(build: Any, own: bool | None, packed: bool) -> None:
    """What `packs` says is true: the loss of a batch is that of its examples padded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().eval()
    batch = dict(pad(examples(), 0))
    labels = batch.pop("labels")
    with torch.no_grad():
        wanted = answer_loss(model(**batch, use_cache=False), labels)
    used = use_packed_attention(model)
    assert own is None or used is not own
    assert packs(model) is packed
    if not packed:
        return
    inputs = pack(examples())
    labels = inputs.pop("labels")
    with torch.no_grad():
        loss = answer_loss(model(**inputs, use_cache=False), labels)
    assert abs(loss - wanted) <= 2e-6 * abs(wanted)


def test_packed_attention_takes_no_chunked_model_however_long_its_chunks() -> None:
    model = chunked(8192)
    assert not use_packed_attention(model) and model.config._attn_implementation == "sdpa"


def test_packs_looks_beyond_a_short_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that forgets the window gives the same for shorter examples."""
    model = make("mistral")
    use_packed_attention(model)
    assert packs(model)
    monkeypatch.setattr(attention, "_window", lambda *_: None)
    assert not packs(model)
    model.config.sliding_window = 10_000
    assert packs(model)


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
