"""Tensors that are spread over processes, whole again for files, and whole tensors from files spread again.

FSDP2 keeps a parameter as a DTensor, of which every process holds some rows; DeepSpeed keeps fp32 values in its
optimizer, and with ZeRO-3 nothing in the model. All functions but `local` exchange data: every process calls them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

PREFIX = ".sbora_"


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def add_up(found: Tensor, of: Tensor) -> Tensor:
    """The sum over all processes of what each of them found from what it holds of a tensor.

    Args:
        found: this process's share of the sum; any shape.
        of: the tensor. Where it is not spread, every process has all of it, and the sum already.
    """
    if not isinstance(of, DTensor):
        return found
    kinds = [Partial() if placement.is_shard() else Replicate() for placement in of.placements]
    return DTensor.from_local(found, of.device_mesh, kinds).full_tensor()


def whole(value: Any) -> Any:
    """Nested dicts, lists and tuples with every spread tensor in them whole, on the CPU; all else as it is."""
    if isinstance(value, DTensor):
        return value.full_tensor().detach().cpu()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(item) for item in value)
    return value


def whole_adapter(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's adapters by their names in its state dict, whole and in fp32 where they are trained."""
    adapter = {name: tensor for name, tensor in model.state_dict().items() if PREFIX in name}
    for name, parameter in model.named_parameters():
        if name in adapter and _of_deepspeed(parameter):
            from deepspeed.utils import safe_get_full_fp32_param

            adapter[name] = safe_get_full_fp32_param(parameter)
    found: dict[str, Tensor] = whole({name: tensor.detach() for name, tensor in adapter.items()})
    return {name: tensor.cpu() for name, tensor in found.items()}


def spread_adapter(model: nn.Module, saved: dict[str, Tensor], adapter: str) -> None:
    """Put values from an adapter file into a model whose values are spread.

    Args:
        saved: by their names in the file, which lack the adapter's own.
        adapter: its name in the model.

    Raises:
        KeyError: a value is not in the file.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if PREFIX in name and name.endswith(f".{adapter}"):
                parameter.copy_(_like(saved[name.removesuffix(f".{adapter}")], parameter))


def spread_optimizer(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """A whole state of an optimizer with its tensors spread as the parameters are that they belong to."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    spread = {
        number: {
            key: _like(item, parameters[number])
            if isinstance(item, Tensor) and item.shape == parameters[number].shape
            else item
            for key, item in of_one.items()
        }
        for number, of_one in state["state"].items()
    }
    return {**state, "state": spread}


def _like(tensor: Tensor, parameter: Tensor) -> Tensor:
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor


def _of_deepspeed(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed holds the fp32 values of a parameter: with ZeRO-3, or beside a 16-bit copy in the model."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
