"""Which stored tensor a module's name means, and which tensors of a checkpoint can be adapted: derived anew."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from ..errors import CheckpointError
from ..untrusted import read_json
from .tensors import Stored

# Parts that a library puts before the numbered blocks of a language model, in any order; and parts of another model
# beside it, whose blocks may have the same names.
_AROUND = {"base_model", "model", "language_model"}
_BESIDE = {"vision_tower", "vision_model", "vision_encoder", "vision_backbone", "visual"}
_BESIDE |= {"audio_tower", "audio_model", "audio_encoder", "speech_encoder"}
# Model types that store matrices as (in, out): all of them, or those of experts fused in one tensor.
_TRANSPOSED = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_TRANSPOSED_EXPERTS = {"gpt_oss", "llama4", "llama4_text", "qwen3_vl_moe", "qwen3_vl_moe_text"}
_FLOATS = {"F16", "BF16", "F32", "F64"}


class Names:
    """Names of modules, in which others are looked up that may stand under other wrappers."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self._blocks: dict[str, list[str]] = {}
        self._ends: dict[str, list[str]] = {}
        for name in self._names:
            front, block = _at_block(name)
            if block and front <= _AROUND:
                self._blocks.setdefault(block, []).append(name)
            parts = name.split(".") if block else []
            for place in range(1, len(parts)):
                self._ends.setdefault(".".join(parts[place:]), []).append(name)

    def find(self, module: str) -> list[str]:
        """Those that mean `module`: itself; or the same block under other wrappers; or one with more or less in front.

        Returns:
            One name, or none, or several where it is not clear which one is meant.
        """
        if module in self._names:
            return [module]
        front, block = _at_block(module)
        if block and front <= _AROUND and block in self._blocks:
            return self._blocks[block]
        parts = module.split(".")
        longer = self._ends.get(module, []) if block else []
        ends = (".".join(parts[place:]) for place in range(1, len(parts)))
        shorter = [end for end in ends if end in self._names and _at_block(end)[1]]
        beside = _BESIDE.intersection(parts)
        return [name for name in (*longer, *shorter) if _BESIDE.intersection(name.split(".")) == beside]


def _at_block(name: str) -> tuple[set[str], str]:
    """A module's name cut before its list of blocks: ({"model"}, "layers.0.mlp.up"); ({...}, "") outside of blocks."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts[:-1]) if part.isdecimal()), None)
    if number is None:
        return set(parts), ""
    start = max(number - 1, 0)
    return set(parts[:start]), ".".join(parts[start:])


@dataclass(frozen=True, slots=True)
class Matrix:
    """Where a module's matrix is stored.

    Attributes:
        part: which matrix of a 3-D tensor of fused experts; None where the tensor is the matrix.
        rows, columns: as they are stored.
        transposed: whether they are (in, out).
    """

    tensor: str
    part: int | None
    rows: int
    columns: int
    transposed: bool

    @property
    def cells_name(self) -> str:
        """What an undo file calls cells of it."""
        return self.tensor if self.part is None else f"{self.tensor}[{self.part}]"


class Model:
    """The matrices of one checkpoint, by the names of their modules."""

    def __init__(self, stored: Mapping[str, Stored], model_type: str) -> None:
        self._stored = stored
        self._transposed = model_type in _TRANSPOSED
        self._transposed_experts = model_type in _TRANSPOSED_EXPERTS
        self._experts = {
            f"{holder}.{part}.{kind}": (name, part)
            for name, tensor in stored.items()
            for holder, _, kind in [name.rpartition(".")]
            if _is_fused(name, tensor)
            for part in range(tensor.shape[0])
        }
        plain = (name.removesuffix(".weight") for name in stored if name.endswith(".weight"))
        self._names = Names((*plain, *self._experts))
        self._known: dict[str, Matrix] = {}

    def find(self, module: str) -> Matrix:
        """Where the matrix of a module is stored.

        Raises:
            ValueError: nowhere, in several places, or what lies there is no matrix of floats.
        """
        if module not in self._known:
            found = self._names.find(module)
            if len(found) != 1:
                raise ValueError(f"there is no one tensor for the module {module}")
            name, part = self._experts.get(found[0], (f"{found[0]}.weight", None))
            stored = self._stored[name]
            if len(stored.shape) != (2 if part is None else 3) or stored.dtype not in ("F32", "F16", "BF16"):
                raise ValueError(f"{name} is no matrix of floats, but the module {module} has a region in it")
            transposed = self._transposed if part is None else self._transposed_experts
            rows, columns = stored.shape[-2:]
            self._known[module] = Matrix(name, part, rows, columns, transposed)
        return self._known[module]

    def dtype(self, matrix: Matrix) -> str:
        """What its values are stored in."""
        return self._stored[matrix.tensor].dtype


def model_type(folder: Path) -> str:
    """What config.json calls the architecture.

    Raises:
        CheckpointError: it is missing or says nothing.
    """
    try:
        found = read_json(folder / "config.json")["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        found = None
    if not isinstance(found, str):
        raise CheckpointError(f"{folder / 'config.json'} is missing or has no model_type: fetch it again")
    return found


def adaptable(stored: Mapping[str, Stored]) -> list[str]:
    """The tensors that a base's fingerprint is of: matrices of floats in numbered blocks, and fused experts, sorted.

    Without routers of mixtures, and without the towers of a multimodal model: where a name has the part
    "language_model", matrices without that part are of towers; elsewhere those that a tower's name is part of.
    """
    holders = {name[: name.index(".experts.")] for name in stored if ".experts." in name}
    matrices: dict[str, set[str]] = {}
    for name, tensor in stored.items():
        *parts, last = name.split(".")
        if len(tensor.shape) != 2 or last != "weight" or not any(map(str.isdecimal, parts)):
            continue
        gate = parts[-1] in ("gate", "shared_expert_gate") and ".".join(parts[:-1]) in holders
        if not gate and "router" not in parts:
            matrices[name] = set(parts)
    language = {name for name, parts in matrices.items() if "language_model" in parts}
    chosen = language or {name for name, parts in matrices.items() if not parts & _BESIDE}
    fused = {name for name, tensor in stored.items() if _is_fused(name, tensor)}
    return sorted(fused | {name for name in chosen if stored[name].dtype in _FLOATS})


def fingerprint(stored: Mapping[str, Stored], digests: Mapping[str, str]) -> str:
    """Fingerprint of a base: over name, dtype, shape and digest of each tensor that can be adapted.

    Args:
        digests: tensor -> blake3 (hex) of its bytes.
    """
    digest = blake3()
    for name in adaptable(stored):
        line = json.dumps([name, *stored[name].like, digests[name]], separators=(",", ":"))
        digest.update(f"{line}\n".encode())
    return f"blake3:{digest.hexdigest()}"


def _is_fused(name: str, tensor: Stored) -> bool:
    """Whether a tensor holds one matrix of all experts of a block: "model.layers.0.mlp.experts.down_proj"."""
    parts = name.split(".")
    numbered = any(map(str.isdecimal, parts[:-1]))
    of_experts = re.search(r"\bexperts\Z", ".".join(parts[:-1])) and re.fullmatch(r"\w+", parts[-1])
    plain = parts[-1] in ("weight", "bias")  # of a module that is called so
    return bool(len(tensor.shape) == 3 and tensor.dtype in _FLOATS and numbered and of_experts and not plain)
