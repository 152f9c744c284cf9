"""SboraModel: puts SBoRA layers into a base model, as PEFT's other tuners do."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, get_args

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, get_quantization_kwargs
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ..errors import UsageError
from ..quantization import keep_exact, record
from ..weights import TaskWeight, Weight, require_use
from .config import SboraConfig
from .forms import Form
from .layer import SboraLayer

# Their kernels take the weight of out_proj, and not its output.
_READ_PAST_FORWARD = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")


def _own(module: nn.Module) -> list[Tensor]:
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def _memory(tensor: Tensor) -> int:
    """The same for tensors that share memory."""
    return int(tensor.untyped_storage()._cdata)


class SboraModel(BaseTuner):
    """A base model with SBoRA adapters on its linear layers. Made by `peft.get_peft_model(base, SboraConfig(...))`.

    Attributes:
        model: the base model, with its target layers replaced.
        peft_config: {adapter name: SboraConfig}.
    """

    prefix = "sbora_"
    tuner_layer_cls = SboraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put one adapter's layers into the model: the first, or one more.

        Before the model is touched, claims that would be left out in silence are refused. A model that bitsandbytes
        quantised is kept exact, and a new adapter records how that was done, since its values belong to those weights.
        """
        config = self.peft_config[adapter_name]
        if config.indices is not None and config.target_modules != "all-linear":
            modules = [name for name, _ in model.named_modules() if name]
            config.check_targets([name for name in modules if self._check_target_module_exists(config, name)])
        keep_exact(model)
        if config.base_quantization is None and not config.inference_mode:
            others = [other.base_quantization for other in self.peft_config.values() if other.base_quantization]
            config.base_quantization = others[0] if others else record(model)
        uses = Counter(_memory(p) for _, module in model.named_modules(remove_duplicate=False) for p in _own(module))
        self._shared = {key for key, count in uses.items() if count > 1}
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _check_target_module_compatiblity(self, peft_config: Any, model: Any, target_name: str) -> None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if target_name == "out_proj" and model_type in _READ_PAST_FORWARD:
            raise UsageError(
                f"out_proj of {model_type} is never called where its fast kernels are installed: change target_modules"
            )
        super()._check_target_module_compatiblity(peft_config, model, target_name)

    def _create_and_replace(
        self,
        config: SboraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, SboraLayer):
            target.update_layer(adapter_name, config, current_key, inference_mode=config.inference_mode)
            return
        if isinstance(target, BaseTunerLayer) or not isinstance(target, nn.Linear | Conv1D):
            raise UsageError(
                f"{current_key} is a {type(target).__name__}: SBoRA adapts linear layers (nn.Linear, its quantised "
                "forms, Conv1D); change target_modules"
            )
        if isinstance(target, NonDynamicallyQuantizableLinear):
            raise UsageError(
                f"{current_key} is never called, {type(parent).__name__} reads its weight itself: change target_modules"
            )
        layer = SboraLayer(
            target,
            get_quantization_kwargs(self).get("get_apply_tensor_subclass"),
            shared=any(_memory(parameter) in self._shared for parameter in _own(target)),
        )
        layer.set_adapter(adapter_name)
        layer.update_layer(adapter_name, config, current_key, inference_mode=config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise UsageError("adapter_names, an adapter for each row of a batch, cannot be done: use set_adapter")
        yield

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        layers = list(self._layers())
        plain = super()._unload_and_optionally_merge(*args, **kwargs)
        for layer in layers:
            layer.retire()
        return plain

    def set_weight(self, adapter_name: str, weight: Weight | TaskWeight) -> None:
        """Set lambda of one task, which is 1 after loading, in every layer: a number, or {"default": number, pattern:
        number} as `merge` takes it.

        Raises:
            UsageError: no such adapter, it is merged at present, the weight is none, or a pattern names no layer.
        """
        if adapter_name not in self.peft_config:
            raise UsageError(f"no adapter {adapter_name!r}: loaded are {', '.join(self.peft_config)}")
        of_task = TaskWeight.of(weight, adapter_name)
        layers = [(name, layer) for name, layer in self.named_layers() if adapter_name in layer.sbora_values]
        require_use(of_task, adapter_name, [name for name, _ in layers])
        for name, layer in layers:
            layer.set_weight(adapter_name, of_task.at(name))

    def set_form(self, form: Form) -> None:
        """Choose how updates are computed, see SboraLayer: "in_place" (after loading, where it can be) or "gather".

        Raises:
            UsageError: there is no such form.
        """
        if form not in get_args(Form):
            raise UsageError(f"form {form!r} is unknown: use {' or '.join(get_args(Form))}")
        for layer in self._layers():
            layer.restore()
            layer.form = form

    def restore(self) -> None:
        """Make every base weight W0 again, bit for bit, until the next forward: for who reads base weights directly."""
        for layer in self._layers():
            layer.restore()

    def settle(self) -> None:
        """Write into the base weights at once what the next forward would: for who wants no delay there."""
        for layer in self._layers():
            layer.settle()

    def outdate(self) -> None:
        """Have every weight written anew by the next forward: after values were changed through `.data`."""
        for layer in self._layers():
            layer.outdate()

    def named_layers(self) -> Iterator[tuple[str, SboraLayer]]:
        """(name in the base model, layer) for each adapted layer. The weights stay as they are, where modules() and
        parameters() would make them W0."""
        pending: list[tuple[str, nn.Module]] = [("", self.model)]
        seen: set[nn.Module] = set()
        while pending:
            name, module = pending.pop()
            if module in seen:
                continue
            seen.add(module)
            if isinstance(module, SboraLayer):
                yield name, module
            else:
                inner = [(child, found) for child, found in module._modules.items() if found is not None]
                pending.extend((f"{name}.{child}".lstrip("."), found) for child, found in reversed(inner))

    def _layers(self) -> Iterator[SboraLayer]:
        return (layer for _, layer in self.named_layers())

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        state = super()._get_adapter_state_dict(*args, **kwargs)
        # The file format is fp32, also when somebody cast the whole model.
        return {k: v.to(torch.float32) if ".sbora_values." in k else v for k, v in state.items()}
