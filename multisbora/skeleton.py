"""Geometry from a transformers config, for any decoder, without weights: the model is built on torch's meta device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import GeometryError
from .geometry import Geometry, Matrix, Orientation, is_adaptable

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def from_config(config: PretrainedConfig | str | os.PathLike[str]) -> Geometry:
    """Geometry of the model that a config describes. No weights are made or read, and no remote code is run.

    The model is called after the config's `_name_or_path` or the given folder, else after its type. Experts that
    transformers keeps as fused 3-D tensors are no matrices here; `geometry.from_checkpoint` sees how the disk has them.

    Args:
        config: a transformers config, a model folder, or the path of a config.json.

    Raises:
        GeometryError: the config is missing or unreadable, needs remote code, or describes no decoder.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
    from transformers.pytorch_utils import Conv1D

    if not isinstance(config, PretrainedConfig):
        path = Path(config)
        folder = path.parent if path.name == "config.json" else path
        if not (folder / "config.json").is_file():
            raise GeometryError(f"{folder} has no config.json: give a model folder or the path of its config.json")
        try:
            config = AutoConfig.from_pretrained(folder.resolve(), trust_remote_code=False, local_files_only=True)
        except Exception as error:
            raise GeometryError(f"{folder}: config.json is not usable: {_first_line(error)}") from error
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise GeometryError(f"{config.model_type}: no decoder can be built from it: {_first_line(error)}") from error

    matrices = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, (torch.nn.Linear, Conv1D)) or id(module.weight) in seen:
            continue
        if not is_adaptable(f"{name}.weight", module.weight.dim()):
            continue
        seen.add(id(module.weight))  # a tied tensor is stored, and claimed, once
        orientation: Orientation = "conv1d" if isinstance(module, Conv1D) else "linear"
        first, second = module.weight.shape
        shape = (first, second) if orientation == "linear" else (second, first)
        matrices.append(Matrix(name, f"{name}.weight", shape[0], shape[1], orientation))
    given = Path(config.name_or_path).name if config.name_or_path else ""
    return Geometry(model=given or config.model_type, model_type=config.model_type, matrices=tuple(matrices))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
