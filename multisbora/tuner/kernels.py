"""The sampled products of SBoRA (paper, section 4): no one-hot matrix is ever built or multiplied.

In the gather form, `add_columns` and `add_rows` add one task's contribution to the base layer's output. In the in-place
form the base weight holds the update already, and `through_weight` differentiates through it. All are exact autograd
functions with the memory that the paper promises: fa keeps the r gathered input channels for backward instead of the
whole input, fb keeps the input, which the base layer's neighbours share, and nothing of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from ..delta import delta
from ..region import own_axis
from .live import LiveWeight, Part

Linear: TypeAlias = nn.Linear | Conv1D


def _flat(x: Tensor) -> Tensor:
    """(..., n) as (tokens, n)."""
    return x.reshape(-1, x.shape[-1])


def _gather(x: Tensor, indices: Tensor) -> Tensor:
    """Channels of x (..., n), as (r, tokens). On a CPU in bf16, gathering into rows takes half the time of gathering
    into columns, and both products that follow read rows faster."""
    return _flat(x).t()[indices]


def _columns_gradient(grad: Tensor, gathered: Tensor) -> Tensor:
    """(out, r), of the gradient (tokens, out) and the gathered input (r, tokens)."""
    return (gathered @ grad).t()


def _rows_gradient(sampled: Tensor, x: Tensor) -> Tensor:
    """(r, in), of the gathered gradient (r, tokens) and the input (..., in)."""
    return sampled @ _flat(x).to(sampled.dtype)


class _AddColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, x: Tensor, update: Tensor, indices: Tensor) -> Tensor:
        gathered = _gather(x, indices).to(hidden.dtype)  # (r, tokens)
        ctx.save_for_backward(gathered, update, indices)
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        return torch.addmm(_flat(hidden), gathered.t(), update.t()).view(hidden.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        gathered, update, indices = ctx.saved_tensors
        flat = _flat(grad)  # (tokens, out)
        grad_x = grad_update = None
        if ctx.needs_input_grad[1]:
            grad_x = flat.new_zeros((flat.shape[0], ctx.x_shape[-1]), dtype=ctx.x_dtype)  # (tokens, in)
            # Claimed indices are unique, so a copy is enough where a gather would otherwise need an addition.
            grad_x.index_copy_(1, indices, (flat @ update).to(ctx.x_dtype))
            grad_x = grad_x.view(ctx.x_shape)
        if ctx.needs_input_grad[2]:
            grad_update = _columns_gradient(flat, gathered)
        return (grad if ctx.needs_input_grad[0] else None), grad_x, grad_update, None


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, x: Tensor, update: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(x, update, indices)
        projected = _flat(x).to(hidden.dtype) @ update.t()  # (tokens, r)
        return hidden.index_add(-1, indices, projected.view(*hidden.shape[:-1], indices.numel()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, update, indices = ctx.saved_tensors
        sampled = _gather(grad, indices)  # (r, tokens)
        grad_x = grad_update = None
        if ctx.needs_input_grad[1]:
            grad_x = (sampled.t() @ update).to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[2]:
            grad_update = _rows_gradient(sampled, x)
        return (grad if ctx.needs_input_grad[0] else None), grad_x, grad_update, None


class _ThroughWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Linear, live: LiveWeight, parts: Sequence[Part], *values: Tensor) -> Tensor:
        live.write(layer.weight, parts, renew=any(ctx.needs_input_grad[4:]))
        hidden: Tensor = layer(x)
        ctx.layer, ctx.live, ctx.parts, ctx.x_dtype = layer, live, parts, x.dtype
        kept = []
        for part, wanted in zip(parts, ctx.needs_input_grad[4:], strict=True):
            if wanted:
                # In the compute dtype, which autocast may have made another than that of x.
                kept.append(_gather(x, part.index).to(hidden.dtype) if part.variant == "fa" else x)
        # The values are kept for autograd's own check that nobody changed them before backward.
        ctx.save_for_backward(*kept, *values)
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        flat = _flat(grad)  # (tokens, out)
        gradients: list[Tensor | None] = []
        for part, wanted in zip(ctx.parts, ctx.needs_input_grad[4:], strict=True):
            gradients.append(_values_gradient(part, flat, next(saved)) if wanted else None)
        grad_x = None
        if ctx.needs_input_grad[0]:
            weight = ctx.layer.weight
            # What was active in forward may have been switched off, or weighted anew, since.
            ctx.live.write(weight, ctx.parts)
            weight = weight.to(grad.dtype)
            grad_x = (grad @ (weight.t() if isinstance(ctx.layer, Conv1D) else weight)).to(ctx.x_dtype)
        # An optimizer's step comes next, and not every one is counted by torch.
        ctx.live.outdate(*ctx.parts)
        return grad_x, None, None, None, *gradients


def _values_gradient(part: Part, grad: Tensor, kept: Tensor) -> Tensor:
    """d loss / d values, in the values' layout and dtype; zero in the cells of earlier claims."""
    found = _columns_gradient(grad, kept) if part.variant == "fa" else _rows_gradient(_gather(grad, part.index), kept)
    found = delta(torch.empty_like(part.values).copy_(found), part.scaling, part.weight)
    if part.excluded is not None:
        found.index_fill_(1 - own_axis(part.variant), part.excluded, 0.0)
    return found


def through_weight(x: Tensor, layer: Linear, live: LiveWeight, parts: Sequence[Part]) -> Tensor:
    """layer(x) with the updates of some tasks in its weight, differentiable with respect to x and to their values.

    Once differentiable. Writes the weight anew, in backward too if it has changed since. Backward holds (r, tokens) of
    x for each fa task that is trained, and x itself for fb.

    Args:
        x: (..., in_features).
        layer: nn.Linear or Conv1D; its weight needs no gradient.
        live: what is written into that weight.
        parts: what is to be in it.

    Returns:
        (..., out_features), in the dtype that the layer computes in.
    """
    return _ThroughWeight.apply(x, layer, live, parts, *(part.values for part in parts))  # type: ignore[no-any-return]


def add_columns(hidden: Tensor, x: Tensor, update: Tensor, indices: Tensor) -> Tensor:
    """hidden + x[..., indices] @ update^T: the fa forward (paper eq. 13). Once differentiable.

    Args:
        hidden: output of the base layer, (..., out_features), in the compute dtype.
        x: input of the base layer, (..., in_features), in any float dtype.
        update: lambda * s * B, (out_features, r), in the compute dtype.
        indices: claimed columns, (r,), int64, unique.

    Returns:
        A new tensor of hidden's shape and dtype. Backward holds (r, tokens) of x, never the whole of it.
    """
    return _AddColumns.apply(hidden, x, update, indices)  # type: ignore[no-any-return]


def add_rows(hidden: Tensor, x: Tensor, update: Tensor, indices: Tensor) -> Tensor:
    """hidden with x @ update^T added at `indices` of its last axis: the fb forward (paper eq. 14). Once differentiable.

    Args:
        hidden: output of the base layer, (..., out_features), in the compute dtype.
        x: input of the base layer, (..., in_features), in any float dtype.
        update: lambda * s * A, (r, in_features), in the compute dtype.
        indices: claimed rows, (r,), int64, unique.

    Returns:
        A new tensor of hidden's shape and dtype.
    """
    return _AddRows.apply(hidden, x, update, indices)  # type: ignore[no-any-return]
