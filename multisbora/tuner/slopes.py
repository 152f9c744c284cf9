"""d loss / d lambda of the tasks in a running model: all that tuning lambdas needs of a backward pass.

A layer computes h = x W^T with W = W0 + lambda * U at a task's cells. With g = d loss / d h the slope is <g^T x, U>,
and g^T x is needed at the task's cells alone:

    fa   sum of (x_I^T g) * U^T    x_I (tokens, r): the owned input channels
    fb   sum of (g_J^T x) * U      g_J (tokens, r): the owned output channels

So the slopes of all tasks of a layer cost one product, at most that of the gradient of its whole weight: a training
step of these tasks, without gradients and optimizer state of their values. Lambda is not divided by, so there is a
slope at 0 as well, and layers stay in the form that they are in: in place, a merge's own weights are differentiated.

Where the values of all tasks hang on each lambda, as in a corrected merge, U reaches over the cells of all of them.
Where each channel (fa column, fb row) has a lambda of its own, the products are added up along the other axis alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..region import VARIANTS, own_axis
from .layer import SboraLayer

Spread = Mapping[str, Mapping[str, Tensor]]  # adapter -> adapter -> what the first one's lambda adds to its values


@contextlib.contextmanager
def lambda_slopes(
    layers: Mapping[str, SboraLayer], spreads: Mapping[str, Spread] | None = None, by_channel: bool = False
) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Add up d loss / d lambda, over every backward in this block, of each task that was active in its forward.

    Values need no gradient, and get none. The input of a layer must require one, or nothing comes back through the
    layers before it: `enable_input_require_grads()` of a transformers model sees to that. Backward holds a layer's
    input, which layers that read the same tensor share.

    Args:
        layers: name -> layer.
        spreads: name -> spread; None where a task's lambda scales what it trained, and nothing else.
        by_channel: each task scales its own values alone, and each of its channels by itself.

    Yields:
        name -> adapter -> slope, fp32 on the layer's device, 0-dim or by channel (rank,); filled by backward.
    """
    found: dict[str, dict[str, Tensor]] = {}

    def watch(name: str, layer: SboraLayer) -> Any:
        def after_forward(_: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            if layer.disable_adapters or layer.merged or not output.requires_grad:
                return
            adapters = [adapter for adapter in layer.active_adapters if adapter in layer.sbora_values]
            x = args[0].detach()

            def after_backward(grad: Tensor) -> None:
                own = found.setdefault(name, {})
                parts = _parts(layer, adapters, x, grad)
                for adapter, slope in _slopes(layer, parts, (spreads or {}).get(name), by_channel).items():
                    own[adapter] = own[adapter] + slope if adapter in own else slope

            if adapters:
                output.register_hook(after_backward)

        return layer.register_forward_hook(after_forward)

    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(watch(name, layer).remove)
        yield found


@torch.no_grad()
def _parts(layer: SboraLayer, adapters: list[str], x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """g^T x at the cells of each task, in the layout of its values.

    Args:
        x: input of the layer, (..., in_features).
        grad: d loss / d output, (..., out_features).
    """
    rows, ends = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])  # (tokens, in), (tokens, out)
    found = {}
    for variant in VARIANTS:
        own = [adapter for adapter in adapters if layer.variant[adapter] == variant]
        if not own:
            continue
        indices = [layer.sbora_indices[adapter] for adapter in own]
        index = torch.cat(indices).long()
        left, right = (rows, ends) if variant == "fa" else (ends, rows)
        product = left.t()[index].to(grad.dtype) @ right.to(grad.dtype)  # (ranks, out) or (ranks, in)
        for adapter, part in zip(own, product.split([each.numel() for each in indices]), strict=True):
            found[adapter] = part.t() if variant == "fa" else part
    return found


@torch.no_grad()
def _slopes(
    layer: SboraLayer, parts: Mapping[str, Tensor], spread: Spread | None, by_channel: bool
) -> dict[str, Tensor]:
    """The slope of each task, or those of its channels."""
    if spread is None:
        spread = {adapter: {adapter: layer.update(adapter, 1.0)} for adapter in parts}
    if by_channel:
        return {
            adapter: (parts[adapter] * reach[adapter]).sum(1 - own_axis(layer.variant[adapter]), dtype=torch.float32)
            for adapter, reach in spread.items()
        }
    return {
        adapter: torch.stack(
            [(parts[other] * update).sum(dtype=torch.float32) for other, update in reach.items()]
        ).sum()
        for adapter, reach in spread.items()
    }
