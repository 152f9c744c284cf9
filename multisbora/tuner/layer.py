"""One adapted linear layer: the base layer, and any number of tasks that each own columns or rows of its weight."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from .forms import Form, Plan, extras_of, obstacle, say_once
from .kernels import add_columns, add_rows, through_weight
from .live import LiveWeight, Part


def _nothing() -> None:
    return None


@dataclass(frozen=True, slots=True)
class Mix:
    """Which tasks a layer computes with.

    Attributes:
        active: names of adapters, or one name, as PEFT keeps it.
        weights: adapter -> lambda.
        trained: adapters whose values take gradients.
        disabled: whether the layer computes without any.
    """

    active: str | list[str]
    weights: dict[str, float]
    trained: frozenset[str] = frozenset()
    disabled: bool = False


class SboraLayer(nn.Module, BaseTunerLayer):
    """Wraps a linear layer (nn.Linear, a quantised one, or GPT-2's Conv1D).

    Values are kept in fp32 and in logical orientation, (out_features, r) for fa and (r, in_features) for fb, whatever
    the base layer stores. What they add to the base layer's output is computed in one of two forms:

    - in place: the base weight holds W0 + update, rounded to its dtype, at the cells of the active tasks, so that a
      forward is one product and what is trained is bit for bit what a merge writes. W0 is kept aside and comes back
      with `restore`, which saving, moving, copying, loading, unloading, disabling and going through the model's
      parameters do too. Who holds a tensor of W0 over a forward holds what that forward writes: clone it. A base weight
      that other live models share is theirs to lose: use the other form.
    - gather: the base weight stays as it is; the sampled products of `add_columns` and `add_rows` come on top. It
      serves bases that are quantised, sharded, offloaded, shared or trained themselves, layers that do more than a
      product, dropout, torch.compile and tracing. Like the first it is differentiable once, and not by forward
      mode or torch.func.

    The weight is written anew in every forward that can be differentiated, and in others when the values have a new
    version, the active tasks or their lambdas changed, or train() or eval() was called. Values that are changed through
    `.data` alone, between two forwards without gradient, need a call of `outdate`.
    """

    # Types of what PEFT's mixin provides, which nn.Module would otherwise hide from a type checker.
    base_layer: Any
    active_adapters: list[str]
    set_adapter: Callable[..., None]
    _get_base_layer_device_and_dtype: Callable[..., tuple[Any, Any]]
    in_features: int
    out_features: int
    adapter_layer_names = ("sbora_values",)
    other_param_names = ("sbora_indices", "sbora_excluded", "variant", "scaling", "weight_of", "dropout")

    def __init__(self, base_layer: Any, get_apply_tensor_subclass: Any = None, *, shared: bool = False) -> None:
        """
        Args:
            shared: other modules use the base weight too.
        """
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
        self.sbora_excluded = BufferDict(persistent=False)
        self.variant: dict[str, Variant] = {}
        self.scaling: dict[str, float] = {}
        self.weight_of: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.form: Form = "in_place"
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._merged = LiveWeight()
        self._live = LiveWeight()
        self._plan: Plan | None = None
        self._parts: dict[str, Part] = {}
        self._shared = shared
        self._is_replica = False
        # Weak, or a sharded model's whole weights would stay in memory.
        weight = base_layer._parameters.get("weight")
        self._weight_at_injection: Callable[[], Any] = _nothing if weight is None else weakref.ref(weight)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.out_features, self.in_features)

    def update_layer(self, adapter_name: str, config: SboraConfig, module: str, inference_mode: bool = False) -> None:
        """Add or replace one task's adapter on this layer; its values start at zero, so it changes nothing yet."""
        region = config.region(module, self.shape)
        self._start_over()
        self.variant[adapter_name] = region.variant
        self.scaling[adapter_name] = scaling(
            pattern_value(config.alpha_pattern, module, config.alpha), region.rank, config.use_rslora
        )
        self.weight_of[adapter_name] = 1.0
        self.dropout[adapter_name] = config.dropout
        device, _ = self._get_base_layer_device_and_dtype(self.base_layer)
        values = torch.zeros(region.values_shape(self.shape), device=device)
        self.sbora_values[adapter_name] = nn.Parameter(values)
        self.sbora_indices[adapter_name] = torch.tensor(region.indices, dtype=torch.int32, device=device)
        if region.excluded:
            self.sbora_excluded[adapter_name] = torch.tensor(region.excluded, device=device)
        elif adapter_name in self.sbora_excluded:
            del self.sbora_excluded[adapter_name]
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

    @property
    def mix(self) -> Mix:
        trained = frozenset(name for name, values in self.sbora_values.items() if values.requires_grad)
        active = self._active_adapter if isinstance(self._active_adapter, str) else list(self._active_adapter)
        return Mix(active, dict(self.weight_of), trained, self._disable_adapters)

    @mix.setter
    def mix(self, mix: Mix) -> None:
        """The base weight follows with the next forward, or with `settle`. Tasks that are merged are taken out."""
        if self.merged:
            self.unmerge()
        self._active_adapter = mix.active
        self.weight_of.update({name: mix.weights[name] for name in self.weight_of if name in mix.weights})
        self._disable_adapters = mix.disabled
        for name, values in self.sbora_values.items():
            values.requires_grad_(name in mix.trained)

    def update(self, adapter_name: str, weight: float | None = None) -> Tensor:
        """lambda * s * values of one task, fp32, (out_features, r) or (r, in_features); zero in earlier claims' cells.

        Differentiable with respect to the values.

        Args:
            weight: lambda; None takes the one that the task has here.
        """
        values = self.sbora_values[adapter_name]
        if adapter_name in self.sbora_excluded:
            other = 1 - own_axis(self.variant[adapter_name])
            values = values.index_fill(other, self.sbora_excluded[adapter_name], 0.0)
        weight = self.weight_of[adapter_name] if weight is None else weight
        update: Tensor = delta(values.float(), self.scaling[adapter_name], weight)
        return update

    # ------------------------------------------------------------------------------------------------------- forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        recorded = torch._C._get_tracing_state() is not None or torch.compiler.is_exporting()
        if recorded and self.form == "in_place":  # what is recorded shares the weight, now and later
            raise UsageError(
                'a model is traced or exported in the gather form: call base_model.set_form("gather") before'
            )
        parts = None if args or kwargs or torch.compiler.is_compiling() else self._parts_in_place()
        if parts:
            layer = self.__dict__["_modules"]["base_layer"]  # what nn.Module finds slowly
            if torch.is_grad_enabled() and (x.requires_grad or any(part.values.requires_grad for part in parts)):
                return through_weight(x, layer, self._live, parts)
            self._live.write(layer.weight, parts)
            return layer(x)  # type: ignore[no-any-return]
        self.restore()
        hidden: Tensor = self.base_layer(x, *args, **kwargs)  # (..., out)
        if not (self._disable_adapters or self.merged_adapters):
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

    def _parts_in_place(self) -> list[Part] | None:
        """What this forward is to find in the base weight; None or nothing where it computes nothing in place."""
        if self._disable_adapters or self.merged_adapters or self.form != "in_place":
            return None
        plan = self._plan
        if plan is None or not plan.holds(self):
            plan = self._plan = self._new_plan()
        return None if self.training and plan.drops else plan.parts

    def _new_plan(self) -> Plan:
        names = [name for name in self.active_adapters if name in self.sbora_values]
        reason = obstacle(self, names) if names else None
        if reason is not None:
            say_once(f"SBoRA uses the gather form where {reason}: the same up to rounding")
        active: Any = self._active_adapter
        return Plan(
            active=active if isinstance(active, str) else list(active),
            weight=self.base_layer._parameters.get("weight"),
            extras=extras_of(self.base_layer),
            factors={name: (self.scaling[name], self.weight_of[name]) for name in names},
            drops=any(self.dropout[name] for name in names),
            parts=[self._part(name) for name in names] if reason is None else None,
        )

    def _part(self, name: str) -> Part:
        """The same object until something changes; with the same `index` until the layer starts over."""
        values, scaling, weight = self.sbora_values[name], self.scaling[name], self.weight_of[name]
        part = self._parts.get(name)
        if part is None:
            part = Part(
                name=name,
                variant=self.variant[name],
                values=values,
                index=self.sbora_indices[name].long(),
                excluded=self.sbora_excluded[name] if name in self.sbora_excluded else None,  # noqa: SIM401
                scaling=scaling,
                weight=weight,
                axis=own_axis(self.variant[name]) ^ self.transposed,
                transposed=self.transposed,
            )
        elif part.values is not values or part.scaling != scaling or part.weight != weight:
            part = part.weighted(values, scaling, weight)
        self._parts[name] = part
        return part

    # ------------------------------------------------------------------------------------------------ the base weight

    def restore(self) -> None:
        """Make the base weight W0 again, bit for bit, until the next forward. Tasks that are merged stay in it."""
        if len(self._live):
            self._live.restore(self.base_layer.weight if self._is_replica else None)

    @property
    def is_live(self) -> bool:
        """Whether updates are in the base weight at this moment, those of merged tasks aside."""
        return len(self._live) > 0

    def settle(self) -> None:
        """Have the base weight hold at once what the next forward would write."""
        if parts := self._parts_in_place():
            self._live.write(self.base_layer.weight, parts)
        else:
            self.restore()

    def _start_over(self) -> None:
        self.restore()
        self._plan = None
        self._parts = {}

    def outdate(self) -> None:
        """Have the weight written anew by the next forward, whatever seems to have changed."""
        self._live.outdate()

    def get_base_layer(self) -> nn.Module:
        self.restore()
        layer: nn.Module = super().get_base_layer()
        return layer

    def train(self, mode: bool = True) -> SboraLayer:
        self.outdate()
        super().train(mode)
        return self

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled:
            self.restore()
        super().enable_adapters(enabled)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        self.restore()  # parameters() and named_parameters() of any model around this come through here
        yield from super().named_modules(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        self._start_over()
        super().delete_adapter(adapter_name)

    def _save_to_state_dict(self, *args: Any) -> None:
        self.restore()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._start_over()
        super()._load_from_state_dict(*args)

    def _apply(self, *args: Any, **kwargs: Any) -> SboraLayer:
        self._start_over()
        super()._apply(*args, **kwargs)
        self._merged.moved(self.base_layer.weight)
        return self

    def _replicate_for_data_parallel(self) -> SboraLayer:
        replica: SboraLayer = super()._replicate_for_data_parallel()
        replica._is_replica = True
        replica._live = self._live.copy()  # the replica's weight is a copy of ours, and so is what is written into it
        return replica

    def __getstate__(self) -> dict[str, Any]:
        self._start_over()
        return {**self.__dict__, "_weight_at_injection": _nothing}

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
        if names:
            self._live.seal("a base weight has tasks merged into it since forward: unmerge them before backward")
        for name in names:
            self._merged.append(self.base_layer.weight, self._part(name), finite=safe_merge)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the base values of all merged tasks back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._merged.restore()
        self.merged_adapters.clear()
        self._live.seal("")

    def retire(self) -> None:
        """Leave the base weight alone for good: it is a plain model's again."""
        self._live.seal("the adapters were unloaded since forward: call backward before")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def extra_repr(self) -> str:
        return ", ".join(f"{n}: {v} r={self.sbora_indices[n].numel()}" for n, v in self.variant.items())

    def __repr__(self) -> str:
        return "sbora." + super().__repr__()
