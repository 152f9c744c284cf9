"""An adapter folder, read from scratch; its values one matrix at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import AdapterError, UsageError
from ..patterns import MAX_PATTERNS, matches_end
from ..untrusted import is_plain, read_json
from .names import Names
from .tensors import UNREADABLE, File, load, one_line, sha256

_MAX_RANK = 1 << 20
_FRONT, _INDICES, _VALUES = "base_model.model.", ".sbora_indices", ".sbora_values"


@dataclass(frozen=True, slots=True)
class Trained:
    """What one task trained in one matrix, but for its values."""

    indices: list[int]
    excluded: list[int]
    scaling: float


class Task:
    """One task's adapter.

    Attributes:
        rest: what a receipt repeats of it, by the receipt's keys.
        modules: name -> what was trained there.
        whole: tensor -> its place, for modules that were trained whole.
    """

    def __init__(self, folder: Path) -> None:
        """Read all but the values.

        Raises:
            AdapterError: a file is missing, damaged or no SBORA adapter's.
        """
        self.folder = folder
        try:
            config = read_json(folder / "adapter_config.json")
            self.name = config.get("task") or folder.resolve().name
            self.variant = config["variant"]
            self.fingerprint = config.get("base_fingerprint")
            self.quantization = config.get("base_quantization")
            path = folder / "adapter_model.safetensors"
            if path.stat().st_size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
                raise ValueError(f"{path.name} is larger than this machine's memory")  # a hole needs no disk, but hours
            self._file = File.open(path)
            self.rest = {
                "composition": config.get("composition") or None,
                "claim_digest": config.get("claim_digest") or None,
                "adapter_digest": sha256(path),
                "base_fingerprint": self.fingerprint or None,
                "trained_on": {
                    "view": "original" if self.quantization is None else "dequantized",
                    "quantization": self.quantization,
                },
            }
            ends = [name.removesuffix(_INDICES) for name in self._file.tensors if name.endswith(_INDICES)]
            regions = {end + kind for end in ends for kind in (_INDICES, _VALUES)}
            saved = tuple(f".{module}." for module in config.get("modules_to_save") or ())
            self.whole = {
                name.removeprefix(_FRONT): stored
                for name, stored in self._file.tensors.items()
                if name not in regions and any(module in f".{name}" for module in saved)
            }
            fits = len(self.whole) + len(regions) == len(self._file.tensors) and regions <= self._file.tensors.keys()
            if not fits or not ends or self.variant not in ("fa", "fb") or not is_plain(self.name, 100):
                raise ValueError("it is no SBORA adapter")
            if len(config.get("alpha_pattern") or {}) > MAX_PATTERNS:
                raise ValueError("alpha_pattern has too many patterns")
            self._ends = {end.removeprefix(_FRONT): end for end in ends}
            excluded = _excluded(config.get("excluded") or {}, self._ends)
            self.modules = {module: self._trained(config, module, excluded.get(module, [])) for module in self._ends}
        except (*UNREADABLE, UsageError) as error:
            why = one_line(error)
            raise AdapterError(f"{folder} is not a readable adapter: {why}; fetch or train it again") from None

    def _trained(self, config: dict[str, Any], module: str, excluded: list[int]) -> Trained:
        places = self._file.tensors
        indices, values = places[self._ends[module] + _INDICES], places[self._ends[module] + _VALUES]
        if (indices.dtype, len(indices.shape), values.dtype, len(values.shape)) != ("I32", 1, "F32", 2):
            raise ValueError(f"{module} has tensors of the wrong kind")
        alpha = config["alpha"]
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if matches_end(pattern, module):
                alpha = value
                break
        rank = indices.shape[0]
        if rank > _MAX_RANK:
            raise ValueError(f"{module} has {rank} indices, more than any matrix")
        return Trained(
            load(indices).tolist(), excluded, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        )

    def values(self, module: str) -> torch.Tensor:
        """What was trained in one matrix: fp32, (out, rank) for fa and (rank, in) for fb.

        Raises:
            One of UNREADABLE: the file is gone, or ends early.
        """
        return load(self._file.tensors[self._ends[module] + _VALUES])


def _excluded(entries: dict[str, Any], modules: Iterable[str]) -> dict[str, list[int]]:
    names = Names(modules)
    found: dict[str, list[int]] = {}
    for name, indices in entries.items():
        meant = names.find(name)
        if len(meant) != 1 or meant[0] in found:
            raise ValueError(f"excluded[{name}] is of no one module")
        if not isinstance(indices, list) or any(type(index) is not int or index >> 31 for index in indices):
            raise ValueError(f"excluded[{name}] is no list of indices")
        found[meant[0]] = sorted(indices)
    return found
