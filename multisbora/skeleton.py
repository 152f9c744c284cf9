"""Geometry from a transformers config, for any decoder, without weights: the model is built on torch's meta device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .cards import Orientation
from .errors import GeometryError
from .geometry import Geometry, Matrix, adaptable

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def from_config(config: PretrainedConfig | str | os.PathLike[str]) -> Geometry:
    """Geometry of the model that a config describes. No weights are made or read, and no remote code is run.

    The model is called after the config's `_name_or_path` or the given folder, else after its type. Names are those of
    the live model, as `from_model` has them.

    Args:
        config: a transformers config, a model folder, or the path of a config.json.

    Raises:
        GeometryError: the config is missing or unreadable, needs remote code, or describes no decoder.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

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

    return from_model(model)


def from_model(model: PreTrainedModel) -> Geometry:
    """Geometry of a live transformers model, on whatever device.

    Names are those of the live model: they can differ from the stored ones in their leading parts, and experts that
    transformers keeps as fused 3-D tensors are no matrices here. `geometry.from_checkpoint` sees what the disk has.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    matrices = []
    seen: set[int] = set()
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters(remove_duplicate=False)}
    for tensor in adaptable(shapes):
        name = tensor.removesuffix(".weight")
        module = model.get_submodule(name)
        if not isinstance(module, (torch.nn.Linear, Conv1D)) or id(module.weight) in seen:
            continue
        seen.add(id(module.weight))  # a tied tensor is stored, and claimed, once
        orientation: Orientation = "conv1d" if isinstance(module, Conv1D) else "linear"
        first, second = module.weight.shape
        shape = (first, second) if orientation == "linear" else (second, first)
        matrices.append(Matrix(name, tensor, shape[0], shape[1], orientation))
    given = Path(model.config.name_or_path).name if model.config.name_or_path else ""
    return Geometry(given or model.config.model_type, model.config.model_type, tuple(matrices))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
