"""Bases quantised by bitsandbytes: loading them so that their weights stay what they are, and deriving those weights
from the stored ones a second time.

What was measured of bitsandbytes 0.50 on a CPU, and what follows from it here:

- Quantising is elementwise but for one thing: double quantisation centres the scales of a matrix on their mean, and
  torch's mean of more than 32,768 numbers (a matrix of more than 2 million weights) depends on the number of threads.
  One and two threads gave other weights in 522 of 8 million cells. So whoever quantises does it on the CPU and on one
  thread (`one_thread`): loading, merging and the verifier. Then the load path of transformers and a call on the stored
  tensor give the same bytes, on any machine. An adapter keeps the sha256 of them all, so that a version of bitsandbytes
  that rounds otherwise is noticed.
- On a CPU with AVX512-BF16 a `Linear4bit` repacks its weight in place at its first forward in eval mode. From then on
  gradients are wrong, `dequantize` gives garbage and other bytes are saved (bitsandbytes#2078); and the repacking fails
  where out_features is no multiple of 32 or in_features is below the block. `keep_exact` prevents it: the weight is
  dequantised and multiplied in eval mode as it is in training.
- On a CPU with AVX512 `dequantize_4bit` uses the scales of other blocks where the width of the matrix is a multiple of
  16 but not of the block: 1,344 of 1,536 weights of a 48 x 32 matrix come back wrong, in forward and backward too. So
  4-bit layers whose in_features is no multiple of the block are refused, on every device, since a merge derives them on
  a CPU.
- In training on a CPU, LLM.int8() multiplies by the dequantised weight. In eval mode, and on CUDA always, it rounds the
  activations to 8 bits too: scores of an int8 base are then those of LLM.int8(), not only of its weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import CheckpointError, UsageError
from .view import KINDS, Kind, Quantization

_BLOCK_SIZE = 64


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Quantise in here: the mean of the scales depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def loading_options(quantization: Kind | Quantization) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantise the base while it is loaded: NF4 in blocks of 64 with double
    quantisation (QLoRA, arXiv 2305.14314), or LLM.int8() (arXiv 2208.07339); or as a model was quantised before. On the
    CPU, see above; it is moved later.

    Raises:
        UsageError: it is unknown, or has blocks that transformers cannot make.
    """
    from transformers import BitsAndBytesConfig

    kind: str = quantization if isinstance(quantization, str) else quantization.kind
    double = True
    if isinstance(quantization, Quantization):
        double = quantization.double
        if quantization.block_size not in (None, _BLOCK_SIZE):
            raise UsageError(
                f"transformers loads {kind} in blocks of {_BLOCK_SIZE}, not of {quantization.block_size}: use "
                "--base-view original"
            )
    elif kind not in KINDS:
        raise UsageError(f"quantization {kind!r} is unknown: use {' or '.join(KINDS)}")
    # bitsandbytes says of every int8 product that it is one.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    return {"quantization_config": config, "device_map": {"": "cpu"}}


def prepare(model: Any) -> None:
    """Make a quantised model, fresh from its folder, one whose weights stay exact; on the accelerator if there is one.

    Products are computed in the dtype that the base is stored in, so that the weights multiplied are, to the bit, the
    dequantised ones that a merge writes. bf16 for bf16, as in QLoRA; no narrower than the base for fp32 and fp16.

    Raises:
        UsageError: a 4-bit layer cannot be turned back.
    """
    _check_widths(model)
    keep_exact(model)
    _compute_in(model, model.dtype)
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        assert accelerator is not None
        device = torch.device(accelerator.type, torch.accelerator.current_device_index())
        model.to(device)
        model.hf_device_map = {"": device}  # accelerate trains a quantised model only where this says it lies


def _check_widths(model: nn.Module) -> None:
    for name, layer in quantized_layers(model):
        block_size = layer.weight.quant_state.blocksize if _is_4bit(layer) else 1
        if layer.in_features % block_size:
            raise UsageError(
                f"{name} has {layer.in_features} input channels, no multiple of the 4-bit block of {block_size}, which "
                "bitsandbytes turns back wrongly: quantise this model to int8"
            )


def widen(model: Any) -> None:
    """Compute in fp32, and hold everything in it that is not quantised.

    For fp16, where gradients vanish without loss scaling. Their own `float` refuses quantised models.
    """
    _compute_in(model, torch.float32)
    kept = {id(layer.weight) for _, layer in quantized_layers(model)}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and id(tensor) not in kept:
            tensor.data = tensor.data.float()


def _compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    for _, layer in quantized_layers(model):
        if _is_4bit(layer):
            layer.compute_dtype, layer.compute_type_is_set = dtype, True


def keep_exact(model: nn.Module) -> None:
    """Stop 4-bit layers from repacking their weights on a CPU. For any model, also one that a user quantised; cheap.

    Raises:
        UsageError: a layer was used in eval mode already, and its weight is no longer what was quantised.
    """
    for name, module in quantized_layers(model):
        if not _is_4bit(module):
            continue
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            raise UsageError(
                f"{name} was used in eval mode before, where bitsandbytes repacked its weight for this CPU: load the "
                "model again and add the adapter, or call multisbora.quantization.keep_exact, before its first forward"
            )
        module.support_avx512bf16_for_cpu = False


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of the linear layers whose weight bitsandbytes quantised, in the model's own order."""
    if "bitsandbytes" not in sys.modules:  # whoever made such a layer has imported it
        return
    import bitsandbytes

    for path, module in model.named_modules():
        name = path.removesuffix(".base_layer")  # where an adapter is around it already
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            quantized = module.weight.dtype == torch.int8
        else:
            quantized = _is_4bit(module) and module.weight.quant_state is not None
        if quantized:
            yield name, module


def _is_4bit(module: nn.Module) -> bool:
    import bitsandbytes

    return isinstance(module, bitsandbytes.nn.Linear4bit)


def dequantize(layer: Any, dtype: torch.dtype) -> Tensor:
    """The weight of a quantised layer as the product uses it: (out_features, in_features), dtype `dtype`."""
    from bitsandbytes import functional

    weight = layer.weight
    if _is_4bit(layer):
        values: Tensor = functional.dequantize_4bit(weight.data, weight.quant_state)
    else:
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        values = functional.int8_vectorwise_dequant(weight.data, scales)
    return values.to(dtype)


def describe(model: Any) -> Quantization | None:
    """How a live model is quantised, with the digest of its dequantised weights. None if it is not.

    To be asked before anything is put around its layers, and before `widen`.

    Raises:
        UsageError: its layers are quantised in more than one way, or some cannot be turned back.
        CheckpointError: a weight is NaN or infinite.
    """
    _check_widths(model)
    layers = dict(quantized_layers(model))
    if not layers:
        return None
    dtype = model.dtype
    schemes = {_scheme(layer, dtype) for layer in layers.values()}
    if len(schemes) > 1:
        raise UsageError(f"the base is quantised in {len(schemes)} ways at once, which no merge can derive: use one")
    kind, name, block_size, double = schemes.pop()
    rows = ((name, dequantize(layer, dtype)) for name, layer in sorted(layers.items()))
    return Quantization(kind, name, block_size, double, tuple(sorted(layers)), digest(map(_digest_row, rows)))


def record(model: Any) -> dict[str, Any] | None:
    """What an adapter says of its base in `base_quantization`: `describe` as JSON values, None for a plain base."""
    found = describe(model)
    return None if found is None else found.to_json()


def _scheme(layer: Any, dtype: torch.dtype) -> tuple[str, str, int | None, bool]:
    if not _is_4bit(layer):
        return "int8", str(dtype).removeprefix("torch."), None, False
    state = layer.weight.quant_state
    return state.quant_type, str(state.dtype).removeprefix("torch."), state.blocksize, bool(state.nested)


def _digest_row(row: tuple[str, Tensor]) -> tuple[str, str]:
    name, values = row
    return name, tensor_digest(values, name)


def tensor_digest(values: Tensor, name: str) -> str:
    """sha256 (hex) of the bytes of one dequantised weight, (out_features, in_features).

    Raises:
        CheckpointError: it holds NaN or infinity.
    """
    if not torch.isfinite(values).all():
        raise CheckpointError(
            f"{name} is not finite once it is quantised: use a base without NaN or such large weights"
        )
    return hashlib.sha256(values.cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()


def digest(rows: Iterable[tuple[str, str]]) -> str:
    """sha256 (hex) of all dequantised weights: of a line `module sha256` each, sorted by module."""
    return hashlib.sha256("".join(f"{name} {value}\n" for name, value in sorted(rows)).encode()).hexdigest()


def round_trip(weight: Tensor, quantization: Quantization) -> Tensor:
    """Quantise a stored weight and turn it back, as loading and training see it.

    Args:
        weight: (out_features, in_features), on the CPU, in the checkpoint's dtype.

    Returns:
        A new tensor of that shape, in the dtype that the base was loaded in.

    Raises:
        UsageError: its width is no multiple of the blocks that it is quantised in.
    """
    from bitsandbytes import functional

    dtype = getattr(torch, quantization.dtype)
    if quantization.block_size is not None and weight.shape[1] % quantization.block_size:
        raise UsageError(
            f"a matrix of {weight.shape[1]} columns cannot be turned back from {quantization.kind}: use int8"
        )
    weight = weight.to(dtype).contiguous()
    with one_thread():
        if quantization.kind == "int8":
            codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
            return functional.int8_vectorwise_dequant(codes, scales).to(dtype)  # type: ignore[no-any-return]
        packed, state = functional.quantize_4bit(
            weight,
            blocksize=quantization.block_size,
            compress_statistics=quantization.double,
            quant_type=quantization.kind,
        )
        return functional.dequantize_4bit(packed, state)  # type: ignore[no-any-return]


def dequantize_stored(stored: np.ndarray, quantization: Quantization, module: str) -> str:
    """Replace a stored weight by its dequantised form, rounded to the checkpoint's own dtype.

    In memory lie for a moment about 20 bytes a weight of this one matrix.

    Args:
        stored: (out_features, in_features), fp32, fp16 or bf16 (of ml_dtypes); changed in place. A view will do.
        module: what a message calls it.

    Returns:
        Its `tensor_digest`, for `digest`.
    """
    own = np.ascontiguousarray(stored)
    if own.dtype.name == "bfloat16":
        weight = torch.from_numpy(own.view(np.uint16)).view(torch.bfloat16)
    else:
        weight = torch.from_numpy(own)
    values = round_trip(weight, quantization)
    found = tensor_digest(values, module)
    bits = np.dtype(f"u{stored.dtype.itemsize}")
    kept = values.to(weight.dtype).contiguous().view(torch.uint8).numpy()
    stored.view(bits)[...] = kept.view(bits).reshape(stored.shape)
    return found
