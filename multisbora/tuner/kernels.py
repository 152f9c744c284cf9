"""The two sampled products of SBoRA (paper, section 4): no one-hot matrix is ever built or multiplied.

Each adds one task's contribution to the base layer's output. They are exact autograd functions with the memory that the
paper promises: `add_columns` keeps the r gathered input channels for backward instead of the whole input, `add_rows`
keeps the input, which the base layer's neighbours share, and nothing of the output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _AddColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, x: Tensor, update: Tensor, indices: Tensor) -> Tensor:
        gathered = x.index_select(-1, indices).reshape(-1, indices.numel()).to(hidden.dtype)  # (tokens, r)
        ctx.save_for_backward(gathered, update, indices)
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        flat = hidden.reshape(-1, hidden.shape[-1])  # (tokens, out)
        return torch.addmm(flat, gathered, update.t()).view(hidden.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        gathered, update, indices = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        grad_x = grad_update = None
        if ctx.needs_input_grad[1]:
            grad_x = flat.new_zeros((flat.shape[0], ctx.x_shape[-1]), dtype=ctx.x_dtype)  # (tokens, in)
            # Claimed indices are unique, so a copy is enough where a gather would otherwise need an addition.
            grad_x.index_copy_(1, indices.long(), (flat @ update).to(ctx.x_dtype))
            grad_x = grad_x.view(ctx.x_shape)
        if ctx.needs_input_grad[2]:
            grad_update = flat.t() @ gathered  # (out, r)
        return (grad if ctx.needs_input_grad[0] else None), grad_x, grad_update, None


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, x: Tensor, update: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(x, update, indices)
        projected = x.reshape(-1, x.shape[-1]).to(hidden.dtype) @ update.t()  # (tokens, r)
        return hidden.index_add(-1, indices, projected.view(*hidden.shape[:-1], indices.numel()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, update, indices = ctx.saved_tensors
        sampled = grad.index_select(-1, indices).reshape(-1, indices.numel())  # (tokens, r)
        grad_x = grad_update = None
        if ctx.needs_input_grad[1]:
            grad_x = (sampled @ update).to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[2]:
            grad_update = sampled.t() @ x.reshape(-1, x.shape[-1]).to(grad.dtype)  # (r, in)
        return (grad if ctx.needs_input_grad[0] else None), grad_x, grad_update, None


def add_columns(hidden: Tensor, x: Tensor, update: Tensor, indices: Tensor) -> Tensor:
    """hidden + x[..., indices] @ update^T: the fa forward (paper eq. 13). Once differentiable.

    Args:
        hidden: output of the base layer, (..., out_features), in the compute dtype.
        x: input of the base layer, (..., in_features), in any float dtype.
        update: lambda * s * B, (out_features, r), in the compute dtype.
        indices: claimed columns, (r,), int32 or int64, unique.

    Returns:
        A new tensor of hidden's shape and dtype. Backward holds (tokens, r) of x, never the whole of it.
    """
    return _AddColumns.apply(hidden, x, update, indices)  # type: ignore[no-any-return]


def add_rows(hidden: Tensor, x: Tensor, update: Tensor, indices: Tensor) -> Tensor:
    """hidden with x @ update^T added at `indices` of its last axis: the fb forward (paper eq. 14). Once differentiable.

    Args:
        hidden: output of the base layer, (..., out_features), in the compute dtype.
        x: input of the base layer, (..., in_features), in any float dtype.
        update: lambda * s * A, (r, in_features), in the compute dtype.
        indices: claimed rows, (r,), int32 or int64, unique.

    Returns:
        A new tensor of hidden's shape and dtype.
    """
    return _AddRows.apply(hidden, x, update, indices)  # type: ignore[no-any-return]
