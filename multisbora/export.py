"""An adapter as a plain LoRA folder, for stock PEFT, vLLM and whatever else reads one."""

from __future__ import annotations

import json
import os

import numpy as np
from safetensors.numpy import save_file

from .adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter, AdapterModule
from .delta import delta
from .geometry import Geometry, Matrix
from .publish import publish


def export_peft_lora(
    adapter_folder: str | os.PathLike[str], output: str | os.PathLike[str], base_geometry: Geometry
) -> None:
    """Write an adapter as the LoRA that it is: one factor one-hot, the other s * values, exactly, in fp32.

    lora_A is (rank x in_features), lora_B (out_features x rank). `lora_alpha` is the rank, so that LoRA's own scaling
    is 1 and s counts once.

    Args:
        adapter_folder: folder of a trained SBORA adapter.
        output: folder to make; it appears whole or not at all.
        base_geometry: of the base model; the one-hot factor has the full size of an axis, which the adapter lacks.

    Raises:
        AdapterError: the adapter is damaged or does not fit the geometry.
        CheckpointError: `output` exists and is not an empty folder, or cannot be written.
    """
    adapter = Adapter.read(adapter_folder)
    tensors: dict[str, np.ndarray] = {}
    transposed = False
    for name, matrix in adapter.fit(base_geometry).items():
        lora_a, lora_b = _factors(adapter.modules[name], matrix)
        tensors[f"base_model.model.{name}.lora_A.weight"] = lora_a
        tensors[f"base_model.model.{name}.lora_B.weight"] = lora_b
        transposed |= matrix.orientation == "conv1d"
    with publish(output, sum(tensor.nbytes for tensor in tensors.values())) as partial:
        save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        config = json.dumps(_config(adapter, transposed), indent=2, sort_keys=True)
        (partial / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")


def _factors(module: AdapterModule, matrix: Matrix) -> tuple[np.ndarray, np.ndarray]:
    """(lora_A, lora_B), (rank, in) and (out, rank): the paper's E_A and E_B are the one-hot ones."""
    region, rank = module.region, np.arange(module.region.rank)
    trained = np.ascontiguousarray(delta(module.values, module.scaling))
    if region.variant == "fa":
        one_hot = np.zeros((region.rank, matrix.in_features), np.float32)
        one_hot[rank, region.indices] = 1
        return one_hot, trained
    one_hot = np.zeros((matrix.out_features, region.rank), np.float32)
    one_hot[region.indices, rank] = 1
    return trained, one_hot


def _config(adapter: Adapter, transposed: bool) -> dict[str, object]:
    ranks = {name: module.region.rank for name, module in adapter.modules.items()}
    highest = max(ranks.values())  # what loaders that reserve memory by `r` must know
    lower = {name: rank for name, rank in ranks.items() if rank != highest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "r": highest,
        "lora_alpha": highest,
        "rank_pattern": lower,
        "alpha_pattern": lower,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(ranks),
        "fan_in_fan_out": transposed,
        "inference_mode": True,
    }
