"""Which form a layer takes: in place where its base weight is plain and its own, else sampled products beside it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.pytorch_utils import Conv1D

from .live import Part

if TYPE_CHECKING:
    from .layer import SboraLayer

Form: TypeAlias = Literal["in_place", "gather"]

_PLAIN = (nn.Parameter, FakeTensor)  # a fake one stands for a plain one, where memory is predicted
_DENSE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PRODUCTS = (nn.Linear.forward, Conv1D.forward)
_log = logging.getLogger(__name__)


@cache
def say_once(message: str) -> None:
    _log.warning(message)


def extras_of(layer: Any) -> tuple[Any, ...]:
    """What may have been put around a layer's own forward."""
    own = layer.__dict__
    hooked = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return own.get("forward"), own.get("_hf_hook"), bool(hooked)


@dataclass(slots=True)
class Plan:
    """How a layer computes in place, worked out once, and what that was worked out from.

    Attributes:
        factors: adapter -> (scaling, lambda).
        drops: whether an adapter has dropout, which is not computed in place.
        parts: what the base weight is to hold; None where it cannot.
    """

    active: str | list[str]
    weight: Any
    extras: tuple[Any, ...]
    factors: dict[str, tuple[float, float]]
    drops: bool
    parts: list[Part] | None

    def holds(self, layer: SboraLayer) -> bool:
        base = layer.__dict__["_modules"]["base_layer"]
        parameters = base._parameters
        bias = parameters.get("bias")
        values = layer.__dict__["_modules"]["sbora_values"]._parameters
        return (
            parameters.get("weight") is self.weight
            and not (self.parts and (self.weight.requires_grad or "ds_id" in self.weight.__dict__))
            and not (self.parts and bias is not None and bias.requires_grad)
            and extras_of(base) == self.extras
            and layer._active_adapter == self.active
            and all(values[part.name] is part.values for part in self.parts or ())
            and all(
                layer.scaling[name] == scaling and layer.weight_of[name] == weight
                for name, (scaling, weight) in self.factors.items()
            )
        )


def obstacle(layer: SboraLayer, names: Sequence[str]) -> str | None:
    """Why updates cannot be written into the base weight, if they cannot."""
    base = layer.base_layer
    weight: Any = base._parameters.get("weight")
    if layer.quantization_backend is not None:
        return "the base weight is quantised"
    if type(weight) not in _PLAIN or weight.dtype not in _DENSE or weight.ndim != 2:
        return "the base weight is no plain tensor (sharded, quantised or parametrised)"
    if weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return "the base layer is trained itself"
    if layer._shared:
        return "other modules use the base weight too"
    patched, hook, hooked = extras_of(base)
    if weight.is_meta or (hook is not None and getattr(hook, "offload", True)):
        return "the base weight is offloaded"
    if type(base).forward not in _PRODUCTS or hooked or (patched is not None and hook is None):
        return "the base layer does more than a product"
    if weight.device.type == "cpu" and weight.is_shared():
        return "other processes use the base weight too"
    if hasattr(weight, "ds_id") or getattr(weight, "_fsdp_flattened", False) or layer._is_replica:
        return "the base weight is sharded or replicated"
    if weight is not layer._weight_at_injection():
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return "the base weight is sharded"  # FSDP2 shows a plain parameter while a layer runs
        layer._weight_at_injection = weakref.ref(weight)
    if weight.is_inference() or any(layer.sbora_values[name].is_inference() for name in names):
        return "tensors were made in inference mode"
    return None
