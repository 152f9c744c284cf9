"""Attention over packed examples, one example at a time, so that its cost grows with their lengths and not with the
square of the whole batch: by a flash kernel where one is installed, else by SDPA. Importing this module registers the
latter with transformers as "packed_sdpa".

transformers' own way for packed examples without a flash kernel is a block-diagonal mask over the whole batch: on a
CPU, a batch of 8 examples of 128 tokens spends nearly half of its step in masked-out cells.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

PACKED = "packed_sdpa"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    example_lengths: list[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA attention, applied to each packed example on its own.

    Args:
        query, key, value: (1, heads, tokens, head_dim).
        attention_mask: used only where `example_lengths` is not given.
        example_lengths: tokens of each example, in order; their sum is `tokens`.

    Returns:
        (1, tokens, heads, head_dim), and no weights.
    """
    if example_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    dtype = query.dtype
    if query.device.type == "cpu":
        # The bf16 flash kernel's backward is two to four times slower than the fp32 one on examples of this length.
        query, key, value = query.float(), key.float(), value.float()
    # Some models say None for the layers that see everything, although the module knows of a window.
    window = kwargs["sliding_window"] if "sliding_window" in kwargs else getattr(module, "sliding_window", None)
    # Splitting differentiates to one concatenation, slicing to as many whole tensors of zeros as there are examples.
    parts = zip(*(states.split(example_lengths, dim=2) for states in (query, key, value)), strict=True)
    outputs = [
        sdpa_attention_forward(module, *part, _window(length, window, query.device), **kwargs)[0]
        for length, part in zip(example_lengths, parts, strict=True)
    ]
    return torch.cat(outputs, dim=1).to(dtype), None


def _window(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """The mask of a sliding window, (1, 1, length, length), or None where plain causal attention is the same."""
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return ((distance >= 0) & (distance < window))[None, None]


def use_packed_attention(model: PreTrainedModel) -> bool:
    """Switch a model that uses SDPA to packed attention. Whether it was done.

    Other kinds of attention stay, and so do models whose layers see chunks of the text (Llama 4): only their own masks
    tell where a chunk begins.
    """
    chunked = getattr(model.config.get_text_config(), "attention_chunk_size", None)
    if model.config._attn_implementation != "sdpa" or chunked:
        return False
    model.set_attn_implementation(PACKED)
    return True


def use_flash_attention(model: PreTrainedModel) -> bool:
    """Switch a model that `dataset.packs` was asked about to a flash kernel, if there is one. Whether it was done.

    The kernel gets the bounds of the examples by the way that they came to packed attention: as arguments which the
    model's forward hands on. So what `packs` has found of that way is true of this one.
    """
    kernel = flash_kernel(model)
    if kernel is None or model.config._attn_implementation != PACKED:
        return False
    try:
        model.set_attn_implementation(kernel)
    except (ImportError, ValueError, RuntimeError):  # transformers knows of a reason: the device, a head's size
        model.set_attn_implementation(PACKED)
        return False
    return True


def flash_kernel(model: PreTrainedModel) -> str | None:
    """transformers' name of the flash attention that this model can use on this machine, or None.

    Only what is installed counts. transformers can also fetch compiled kernels from the hub, which is remote code that
    nobody asked for.
    """
    half = model.dtype in (torch.float16, torch.bfloat16)
    if not (torch.cuda.is_available() and half and getattr(model, "_supports_flash_attn", False)):
        return None
    if is_flash_attn_3_available():
        return "flash_attention_3"
    return "flash_attention_2" if is_flash_attn_2_available() else None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, AttentionMaskInterface()["sdpa"])
