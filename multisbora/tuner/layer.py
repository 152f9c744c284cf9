"""One adapted linear layer: the base layer, and any number of tasks that each own columns or rows of its weight."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..delta import delta, pattern_value, scaling
from ..errors import MergeError, UsageError
from ..region import Variant, own_axis
from .config import SboraConfig
from .kernels import add_columns, add_rows


class SboraLayer(nn.Module, BaseTunerLayer):
    """Wraps a linear layer (nn.Linear, a quantised one, or GPT-2's Conv1D).

    Values are kept in fp32 and in logical orientation, (out_features, r) for fa and (r, in_features) for fb, whatever
    the base layer stores. The base weight is read, and written only by `merge` and `unmerge`.
    """

    # Types of what PEFT's mixin provides, which nn.Module would otherwise hide from a type checker.
    base_layer: Any
    active_adapters: list[str]
    set_adapter: Callable[..., None]
    _get_base_layer_device_and_dtype: Callable[..., tuple[Any, Any]]
    in_features: int
    out_features: int
    adapter_layer_names = ("sbora_values",)
    other_param_names = ("sbora_indices", "variant", "excluded", "scaling", "weight_of", "dropout")

    def __init__(self, base_layer: Any, get_apply_tensor_subclass: Any = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.transposed = isinstance(base_layer, Conv1D)
        if self.transposed:
            self.in_features, self.out_features = base_layer.weight.shape
        else:
            self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.quantization_backend = resolve_quantization_backend(
            base_layer, get_apply_tensor_subclass=get_apply_tensor_subclass
        )
        self.sbora_values = nn.ParameterDict()
        self.sbora_indices = BufferDict(persistent=True)
        self.variant: dict[str, Variant] = {}
        self.excluded: dict[str, tuple[int, ...]] = {}
        self.scaling: dict[str, float] = {}
        self.weight_of: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._base_cells: dict[str, Tensor] = {}

    @property
    def shape(self) -> tuple[int, int]:
        return (self.out_features, self.in_features)

    def update_layer(self, adapter_name: str, config: SboraConfig, module: str, inference_mode: bool = False) -> None:
        """Add or replace one task's adapter on this layer; its values start at zero, so it changes nothing yet."""
        region = config.region(module, self.shape)
        self.variant[adapter_name], self.excluded[adapter_name] = region.variant, region.excluded
        self.scaling[adapter_name] = scaling(
            pattern_value(config.alpha_pattern, module, config.alpha), region.rank, config.use_rslora
        )
        self.weight_of[adapter_name] = 1.0
        self.dropout[adapter_name] = config.dropout
        device, _ = self._get_base_layer_device_and_dtype(self.base_layer)
        values = torch.zeros(region.values_shape(self.shape), device=device)
        self.sbora_values[adapter_name] = nn.Parameter(values)
        self.sbora_indices[adapter_name] = torch.tensor(region.indices, dtype=torch.int32, device=device)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def set_weight(self, adapter_name: str, weight: float) -> None:
        """Set lambda of one task, 1 after loading.

        Raises:
            UsageError: the task is merged into the base weight at its present lambda.
        """
        if adapter_name in self.merged_adapters:
            raise UsageError(f"adapter {adapter_name!r} is merged: unmerge it before its weight is changed")
        if adapter_name in self.weight_of:
            self.weight_of[adapter_name] = weight

    def update(self, adapter_name: str) -> Tensor:
        """lambda * s * values of one task, fp32, (out_features, r) or (r, in_features); zero in earlier claims' cells.

        Differentiable with respect to the values.
        """
        values = self.sbora_values[adapter_name]
        if excluded := self.excluded[adapter_name]:
            other = 1 - own_axis(self.variant[adapter_name])
            values = values.index_fill(other, torch.tensor(excluded, device=values.device), 0.0)
        update: Tensor = delta(values.float(), self.scaling[adapter_name], self.weight_of[adapter_name])
        return update

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        hidden: Tensor = self.base_layer(x, *args, **kwargs)  # (..., out)
        if self.disable_adapters or self.merged:
            return hidden
        for name in self.active_adapters:
            if name in self.sbora_values:
                hidden = self._add(name, x, hidden)
        return hidden

    def _add(self, name: str, x: Tensor, hidden: Tensor) -> Tensor:
        update = self.update(name).to(hidden.dtype)
        indices = self.sbora_indices[name].long()  # torch gathers faster by int64
        p = self.dropout[name] if self.training else 0.0
        if self.variant[name] == "fb":
            return add_rows(hidden, F.dropout(x, p) if p else x, update, indices)
        if p:
            gathered = F.dropout(x.index_select(-1, indices), p).to(hidden.dtype)  # (..., r)
            return hidden + F.linear(gathered, update)
        return add_columns(hidden, x, update, indices)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The update of one task as a dense fp32 matrix in the base weight's own orientation."""
        update = self.update(adapter_name)
        dense = update.new_zeros(self.shape)
        dense.index_copy_(
            own_axis(self.variant[adapter_name]), self.sbora_indices[adapter_name].long(), update.detach()
        )
        return dense.t().contiguous() if self.transposed else dense

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write W0 + update into the owned cells: fp32 arithmetic, rounded once to the weight's dtype (paper eq. 8).

        The cells' base values are kept aside, so that `unmerge` is exact in every dtype.

        Args:
            safe_merge: refuse a result with NaN or infinity before anything is written.
            adapter_names: tasks to merge; None takes the active ones.

        Raises:
            MergeError: the base weight is quantised, or `safe_merge` found a value that is not finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.sbora_values]
        if names and self.quantization_backend is not None:
            raise MergeError(
                "a quantised weight cannot be merged into exactly: "
                "run `multisbora merge` on the 16-bit base model, or load it unquantised"
            )
        weight = self.base_layer.weight.data
        for name in names:
            axis = own_axis(self.variant[name]) ^ self.transposed
            indices = self.sbora_indices[name].long()
            base = weight.index_select(axis, indices)
            update = self.update(name).detach()
            cells = (base.float() + (update.t() if self.transposed else update)).to(weight.dtype)
            cells = cells if self.weight_of[name] else base  # a task at 0 is left out, as in a merge of files
            if self.excluded[name]:
                # 0 added to -0.0 is +0.0: cells of earlier claims keep their very bits.
                excluded = torch.tensor(self.excluded[name], device=weight.device)
                cells.index_copy_(1 - axis, excluded, base.index_select(1 - axis, excluded))
            if safe_merge and not torch.isfinite(cells).all():
                raise MergeError(f"adapter {name!r} gives weights that are not finite: it seems to be broken")
            weight.index_copy_(axis, indices, cells)
            self._base_cells[name] = base
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the base values of all merged tasks back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self.base_layer.weight.data
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            axis = own_axis(self.variant[name]) ^ self.transposed
            weight.index_copy_(axis, self.sbora_indices[name].long(), self._base_cells.pop(name).to(weight))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def extra_repr(self) -> str:
        return ", ".join(f"{n}: {v} r={self.sbora_indices[n].numel()}" for n, v in self.variant.items())

    def __repr__(self) -> str:
        return "sbora." + super().__repr__()
