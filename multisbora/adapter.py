"""One task's trained adapter, read from its PEFT folder and checked cell by cell. No PEFT and no torch needed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .delta import pattern_value, scaling
from .errors import AdapterError, CheckpointError, GeometryError, UsageError
from .geometry import Geometry, Matrix, Names
from .header import Header, TensorInfo, read_header
from .region import VARIANTS, Region, own_axis
from .view import Quantization

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_VALUES, _INDICES = ".sbora_values", ".sbora_indices"


@dataclass(frozen=True, slots=True)
class AdapterModule:
    """What one task trained in one matrix.

    Attributes:
        region: its cells.
        values: fp32, (out_features, rank) for fa and (rank, in_features) for fb, in logical orientation also for
            Conv1D; zero in excluded cells.
        scaling: s, alpha / rank or alpha / sqrt(rank).
    """

    region: Region
    values: np.ndarray
    scaling: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """A task's adapter folder.

    Attributes:
        path: the folder.
        task: name of the task; of the folder, if it was trained without one.
        composition: the composition whose claims it was trained on, if any.
        variant: "fa" or "fb".
        base_model: name or path of the base model it was trained on, if recorded.
        base_fingerprint: of the base's adaptable tensors (sha256, hex), if recorded.
        claim_digest: of the claims it was trained on (sha256, hex), if recorded.
        quantization: how the base was quantised while it was trained; None where it was trained on the base as stored.
        digest: sha256 (hex) of its safetensors file.
        modules: module name -> what was trained there, sorted by name.
    """

    path: Path
    task: str
    composition: str | None
    variant: str
    base_model: str | None
    base_fingerprint: str | None
    claim_digest: str | None
    quantization: Quantization | None
    digest: str
    modules: dict[str, AdapterModule]

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Adapter:
        """Read and check an adapter folder.

        Raises:
            AdapterError: a file is missing, truncated or no SBORA adapter; a tensor has another dtype or shape than its
                region; indices are unsorted or repeated; a value is NaN or infinite, or not zero in an excluded cell;
                or the folder holds tensors that no region explains.
        """
        path = Path(folder)
        config = _Config(path / CONFIG_FILE)
        weights = path / WEIGHTS_FILE
        try:
            header = read_header(weights)
        except CheckpointError as error:
            hint = "" if weights.exists() else f" (is {path} an adapter folder?)"
            raise AdapterError(f"{error}{hint}") from None
        try:
            content = weights.read_bytes()
        except OSError as error:
            raise AdapterError(f"{weights} cannot be read: {error.strerror or error}") from None
        modules = {}
        excluded = config.excluded(set(_modules(weights, header)))
        for module in _modules(weights, header):
            where = f"{weights}: {module}"
            indices = _array(content, header, _PREFIX + module + _INDICES, "I32", np.dtype("<i4"), 1, where)
            values = _array(content, header, _PREFIX + module + _VALUES, "F32", np.dtype("<f4"), 2, where)
            try:
                region = Region(config.variant, tuple(indices.tolist()), excluded.get(module, ()))  # type: ignore[arg-type]
            except UsageError as error:
                raise AdapterError(f"{where}: {error}; train or fetch the adapter again") from None
            _check_values(values, region, where)
            alpha = pattern_value(config.alpha_pattern, module, config.alpha)
            modules[module] = AdapterModule(region, values, scaling(alpha, region.rank, config.use_rslora))
        return cls(
            path=path,
            task=config.text("task") or path.resolve().name,
            composition=config.text("composition"),
            variant=config.variant,
            base_model=config.text("base_model_name_or_path"),
            base_fingerprint=config.text("base_fingerprint"),
            claim_digest=config.text("claim_digest"),
            quantization=config.quantization(),
            digest=hashlib.sha256(content).hexdigest(),
            modules=modules,
        )

    def fit(self, geometry: Geometry) -> dict[str, Matrix]:
        """The matrix of each module in a base model.

        Raises:
            AdapterError: a module that the model lacks, indices outside its matrix, or values of another shape.
        """
        matrices = {}
        for name, module in self.modules.items():
            try:
                matrix = geometry.find(name)
                module.region.check(matrix.shape, name)
            except (GeometryError, UsageError) as error:
                raise AdapterError(f"{self.path} does not fit {geometry.model}: {error}") from None
            expected = module.region.values_shape(matrix.shape)
            if module.values.shape != expected:
                raise AdapterError(
                    f"{self.path} does not fit {geometry.model}: {name} has values of shape "
                    f"{list(module.values.shape)}, its matrix needs {list(expected)}"
                )
            matrices[name] = matrix
        return matrices


class _Config:
    """adapter_config.json, read strictly for what merging needs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise AdapterError(f"{path} does not exist: give an adapter folder, as `train` writes it") from None
        except OSError as error:
            raise AdapterError(f"{path} cannot be read: {error.strerror or error}") from None
        except (ValueError, RecursionError):
            raise AdapterError(f"{path} is not JSON: train or fetch the adapter again") from None
        if not isinstance(content, dict):
            raise AdapterError(f"{path} is not a JSON object: train or fetch the adapter again")
        self.content: dict[str, Any] = content
        if content.get("peft_type") != "SBORA":
            raise AdapterError(f"{path} is a {content.get('peft_type')} adapter: only SBORA ones are read")
        if content.get("variant") not in VARIANTS:
            raise AdapterError(f"{path}: variant {content.get('variant')!r} is unknown: it must be fa or fb")
        self.variant: str = content["variant"]
        if content.get("modules_to_save") or content.get("bias", "none") not in ("none", None):
            raise AdapterError(
                f"{path} trained biases or whole modules too, which a merge cannot compose: train without"
            )
        self.alpha = self._number("alpha", content.get("alpha"))
        self.use_rslora = content.get("use_rslora", False)
        if not isinstance(self.use_rslora, bool):
            raise AdapterError(f"{path}: use_rslora must be true or false, got {self.use_rslora!r}")
        patterns = self._object("alpha_pattern")
        self.alpha_pattern = {key: self._number(f"alpha_pattern[{key}]", patterns[key]) for key in patterns}
        for pattern in patterns:
            try:
                re.compile(f"(?:{pattern})")
            except re.error as error:
                raise AdapterError(
                    f"{path}: alpha_pattern {pattern!r} is no regular expression ({error}): correct it"
                ) from None

    def text(self, key: str) -> str | None:
        value = self.content.get(key)
        if value is not None and not isinstance(value, str):
            raise AdapterError(f"{self.path}: {key} must be text, got {value!r}")
        return value or None

    def quantization(self) -> Quantization | None:
        content = self.content.get("base_quantization")
        if content is None:
            return None
        try:
            return Quantization.from_json(content)
        except UsageError as error:
            raise AdapterError(f"{self.path}: base_quantization: {error}; train or fetch the adapter again") from None

    def excluded(self, modules: set[str]) -> dict[str, tuple[int, ...]]:
        """module -> indices of the other axis; it may have another of the names that `geometry.Names` knows."""
        names = Names(modules)
        found = {}
        for name, values in self._object("excluded").items():
            known = names.find(name)
            if len(known) != 1:
                raise AdapterError(f"{self.path}: excluded names {name}, which is no module of the adapter")
            if not isinstance(values, list) or any(type(value) is not int for value in values):
                raise AdapterError(f"{self.path}: excluded[{name}] must be a list of whole numbers")
            found[known[0]] = tuple(values)
        return found

    def _number(self, key: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise AdapterError(f"{self.path}: {key} must be a finite number, got {value!r}")
        return float(value)

    def _object(self, key: str) -> Mapping[str, Any]:
        value = self.content.get(key) or {}
        if not isinstance(value, dict):
            raise AdapterError(f"{self.path}: {key} must be an object, got {value!r}")
        return value


def _modules(weights: Path, header: Header) -> Iterator[str]:
    """Modules of the file, sorted; refuses every tensor that is not half of a pair of values and indices."""
    pairs: dict[str, set[str]] = {}
    for name in header.tensors:
        kind = next((kind for kind in (_VALUES, _INDICES) if name.endswith(kind)), None)
        if kind is None or not name.startswith(_PREFIX):
            raise AdapterError(
                f"{weights} holds {name}, which is no part of an SBoRA region; merging biases or whole modules is not "
                "possible: train without them"
            )
        pairs.setdefault(name.removeprefix(_PREFIX).removesuffix(kind), set()).add(kind)
    if not pairs:
        raise AdapterError(f"{weights} holds no tensors: train the adapter again")
    for module in sorted(pairs):
        if lacking := {_VALUES, _INDICES} - pairs[module]:
            raise AdapterError(f"{weights}: {module} has no {lacking.pop().removeprefix('.')}: fetch the adapter again")
        yield module


def _array(
    content: bytes, header: Header, name: str, dtype: str, kind: np.dtype[Any], dims: int, where: str
) -> np.ndarray:
    info: TensorInfo = header.tensors[name]
    part = name.rpartition(".")[2]
    if info.dtype != dtype or len(info.shape) != dims:
        raise AdapterError(
            f"{where}: {part} must be {dtype} with {dims} axes, got {info.dtype} of shape {list(info.shape)}"
        )
    count = info.nbytes // kind.itemsize
    return np.frombuffer(content, kind, count, header.data_start + info.start).reshape(info.shape)


def _check_values(values: np.ndarray, region: Region, where: str) -> None:
    """Shape against rank, finite everywhere, and zero in the cells of earlier claims."""
    axis = own_axis(region.variant)
    if values.shape[axis] != region.rank:
        raise AdapterError(f"{where}: {region.rank} indices but values of shape {list(values.shape)}: fetch it again")
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        raise AdapterError(
            f"{where}: {len(bad)} values are NaN or infinite, first at {bad[0].tolist()}: "
            "the training diverged; train again with a lower learning rate"
        )
    if region.excluded:
        if region.excluded[-1] >= values.shape[1 - axis]:
            raise AdapterError(f"{where}: excluded index {region.excluded[-1]} is outside {values.shape[1 - axis]}")
        if np.any(values.take(region.excluded, axis=1 - axis)):
            raise AdapterError(
                f"{where}: values are not zero in excluded cells, which an earlier task owns: train again"
            )
