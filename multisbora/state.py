"""The state of an optimizer, a schedule or a random generator in files that run no code when they are read: a JSON file
for its shape and numbers, and a safetensors file beside it for its tensors.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import TrainingError


def state_files(name: str) -> tuple[str, str]:
    """Names of the two files of a state: of its shape, and of its tensors."""
    return f"{name}.json", f"{name}.safetensors"


def write_state(path: Path, state: Any) -> None:
    """Write nested dicts, lists and tuples of tensors, numbers, text, True, False and None.

    Args:
        path: of both files, without their suffixes.
        state: a tensor that occurs twice is written once and read twice.

    Raises:
        TypeError: something else is in there.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    shape = _fold(state, tensors, names)
    numbers, bits = state_files(str(path))
    save_file(tensors, bits)
    Path(numbers).write_text(json.dumps(shape), encoding="utf-8")


def read_state(path: Path) -> Any:
    """What `write_state` wrote, bit for bit, its tensors on the CPU.

    Raises:
        TrainingError: the files are missing or damaged.
    """
    try:
        numbers, bits = state_files(str(path))
        tensors = load_file(bits)
        return _unfold(json.loads(Path(numbers).read_text(encoding="utf-8")), tensors)
    except Exception as error:  # safetensors, json and the look-ups in what they gave raise many kinds
        reason = " ".join(str(error).split())[:200]
        raise TrainingError(f"{path}.json or .safetensors cannot be read ({reason}): delete that checkpoint") from None


def _fold(value: Any, tensors: dict[str, Tensor], names: dict[int, str]) -> Any:
    if isinstance(value, Tensor):
        if id(value) not in names:
            names[id(value)] = f"{len(names)}"
            # Views of one storage would be refused, and they are tensors of their own when they are read again.
            tensors[names[id(value)]] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": names[id(value)]}
    if isinstance(value, dict):  # keys may be numbers, which JSON's are not
        return {"dict": [[key, _fold(item, tensors, names)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_fold(item, tensors, names) for item in value]}
    if isinstance(value, list):
        return [_fold(item, tensors, names) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{type(value).__name__} is nothing that a state's JSON and safetensors files can hold")


def _unfold(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unfold(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_unfold(item, tensors) for item in content)
    return {key: _unfold(item, tensors) for key, item in content}


def random_state() -> dict[str, Any]:
    """The state of all random generators that training draws from in this process."""
    name, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` gave."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
