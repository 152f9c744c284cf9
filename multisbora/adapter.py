"""One task's trained adapter, read from its PEFT folder and checked cell by cell. No PEFT and no torch needed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from .cells import PATCHABLE
from .delta import scaling
from .errors import AdapterError, CheckpointError, GeometryError, UsageError
from .geometry import Geometry, Matrix, Names
from .header import MAX_NAME, Header, TensorInfo, read_header
from .names import check_name
from .patterns import MAX_PATTERNS, check_pattern, matches_end
from .region import VARIANTS, Region, Variant, own_axis
from .untrusted import is_plain, open_file, read_json, shown
from .view import Quantization

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
TRAINING_FILE = "training.json"  # beside an adapter that `train` made: how it did
_PREFIX = "base_model.model."
_VALUES, _INDICES = ".sbora_values", ".sbora_indices"
_MAX_RANK = 1 << 20  # the longest axis of a matrix, an embedding's, has a quarter of it
_MAX_MATCHES = 1_000_000  # of patterns with modules, which take some seconds
_MAX_SEARCHES = 1_000_000  # of modules for a name that is spelt in another way
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # bitsandbytes' own
_MAX_TEXT = 4096  # as long as a path may be


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
        whole: stored tensor -> what it was trained to, for modules that the task trained whole (PEFT's
            `modules_to_save`), in float32, float16 or bfloat16.
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
    whole: dict[str, np.ndarray] = field(default_factory=dict)

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
        names, whole = _sorted_tensors(weights, header, config.whole)
        for module in names:
            _check_shapes(header, module, config.variant, f"{weights}: {module}")
        excluded = config.excluded(names)
        alphas = config.alphas(names)
        content = _content(weights, header)
        modules = {}
        for module in names:
            where = f"{weights}: {module}"
            indices = _array(content, header, _PREFIX + module + _INDICES, np.dtype("<i4"))
            values = _array(content, header, _PREFIX + module + _VALUES, np.dtype("<f4"))
            try:
                region = Region(config.variant, tuple(indices.tolist()), excluded.get(module, ()))
            except UsageError as error:
                raise AdapterError(f"{where}: {error}; train or fetch the adapter again") from None
            _check_values(values, region, where)
            modules[module] = AdapterModule(region, values, scaling(alphas[module], region.rank, config.use_rslora))
        return cls(
            path=path,
            task=config.task(),
            composition=config.text("composition"),
            variant=config.variant,
            base_model=config.text("base_model_name_or_path"),
            base_fingerprint=config.text("base_fingerprint"),
            claim_digest=config.text("claim_digest"),
            quantization=config.quantization(),
            digest=hashlib.sha256(content).hexdigest(),
            modules=modules,
            whole={tensor: _whole(content, header, tensor, weights) for tensor in whole},
        )

    def fit(self, geometry: Geometry) -> dict[str, Matrix]:
        """The matrix of each module in a base model.

        Raises:
            AdapterError: a module that the model lacks or that is another one's too, indices outside its matrix, or
                values of another shape.
        """
        matrices: dict[str, Matrix] = {}
        taken: dict[str, str] = {}
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
            if taken.setdefault(matrix.cells_name, name) != name:
                raise AdapterError(
                    f"{self.path} has {taken[matrix.cells_name]} and {name}, which are one matrix: train again"
                )
            matrices[name] = matrix
        return matrices


def training_record(folder: Path) -> dict[str, Any]:
    """What `train` wrote of its run beside an adapter; nothing where another trainer made it."""
    with contextlib.suppress(OSError, ValueError):
        if isinstance(content := read_json(folder / TRAINING_FILE), dict):
            return content
    return {}


def is_corrected(folder: Path) -> bool:
    """Whether an adapter has the values of a corrected merge, from `tune --by channel`, as far as its folder tells."""
    tuned = training_record(folder).get("tuned")
    return isinstance(tuned, dict) and tuned.get("ridge") is not None


def rewrite(folder: Path, values: Mapping[str, np.ndarray], output: Path, leave: str) -> None:
    """Write an adapter of the same task and claims with other values, which have scaling and lambda in them.

    Args:
        folder: of the adapter, whose other files go along.
        values: module -> fp32 values of the shape that it has, for every module of the adapter.
        output: folder to make.
        leave: name of a file that does not go along.

    Raises:
        AdapterError: what was written cannot be read again.
    """
    output.mkdir(parents=True)
    for path in folder.iterdir():
        if path.is_file() and path.name not in (leave, WEIGHTS_FILE, CONFIG_FILE):
            shutil.copyfile(path, output / path.name)
    header = read_header(folder / WEIGHTS_FILE)
    tensors = safetensors.numpy.load_file(folder / WEIGHTS_FILE)
    tensors |= {_PREFIX + module + _VALUES: np.ascontiguousarray(own) for module, own in values.items()}
    safetensors.numpy.save_file(tensors, output / WEIGHTS_FILE, header.metadata)
    config = read_json(folder / CONFIG_FILE)
    # Alpha is the rank everywhere, so that the scaling is 1.
    by_rank: dict[int, list[str]] = {}
    for module in values:
        (rank,) = header.tensors[_PREFIX + module + _INDICES].shape
        by_rank.setdefault(rank, []).append(re.escape(module).replace(r"\-", "-"))
    alpha = max(by_rank, key=lambda rank: len(by_rank[rank]))
    patterns = {"|".join(names): rank for rank, names in by_rank.items() if rank != alpha}
    config |= {"alpha": alpha, "alpha_pattern": patterns, "use_rslora": False}
    (output / CONFIG_FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")
    if odd := [name for name, module in Adapter.read(output).modules.items() if module.scaling != 1]:
        raise AdapterError(
            f"{folder} cannot be written with other values: {odd[0]} would be scaled by its alpha_pattern"
        )


class _Config:
    """adapter_config.json, read strictly for what merging needs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = read_json(path)
        except FileNotFoundError:
            raise AdapterError(f"{path} does not exist: give an adapter folder, as `train` writes it") from None
        except OSError as error:
            raise AdapterError(f"{path} cannot be read: {error.strerror or error}") from None
        except ValueError as error:
            raise AdapterError(f"{path} is refused, {error}: train or fetch the adapter again") from None
        if not isinstance(content, dict):
            raise AdapterError(f"{path} is not a JSON object: train or fetch the adapter again")
        self.content: dict[str, Any] = content
        if content.get("peft_type") != "SBORA":
            raise AdapterError(f"{path} is a {shown(content.get('peft_type'))} adapter: only SBORA ones are read")
        if content.get("variant") not in VARIANTS:
            raise AdapterError(f"{path}: variant {shown(content.get('variant'))!r} is unknown: it must be fa or fb")
        self.variant: Variant = content["variant"]
        if content.get("bias", "none") not in ("none", None):
            raise AdapterError(f"{path} trained biases, which SBoRA does not: name their modules in modules_to_save")
        whole = content.get("modules_to_save") or []
        if not isinstance(whole, list) or not all(isinstance(name, str) and is_plain(name, MAX_NAME) for name in whole):
            raise AdapterError(f"{path}: modules_to_save must be a list of names, got {shown(whole)}")
        self.whole: list[str] = whole
        self.alpha = self._number("alpha", content.get("alpha"))
        self.use_rslora = content.get("use_rslora", False)
        if not isinstance(self.use_rslora, bool):
            raise AdapterError(f"{path}: use_rslora must be true or false, got {shown(self.use_rslora)}")
        patterns = self._object("alpha_pattern")
        if len(patterns) > MAX_PATTERNS:
            raise AdapterError(f"{path}: alpha_pattern has too many patterns, {len(patterns)}: use fewer")
        self.alpha_pattern = {key: self._number(f"alpha_pattern[{shown(key)}]", patterns[key]) for key in patterns}
        for pattern in patterns:
            try:
                check_pattern(pattern)
            except UsageError as error:
                raise AdapterError(f"{path}: alpha_pattern {shown(pattern)!r}: {error}") from None

    def task(self) -> str:
        """The task's name: that of the folder, if it was trained without one. It is to become a file's name."""
        name = self.text("task")
        try:
            return check_name(self.path.parent.resolve().name if name is None else name)
        except UsageError as error:
            raise AdapterError(f"{self.path}: {error}") from None

    def alphas(self, modules: list[str]) -> dict[str, float]:
        """module -> alpha: that of the first pattern that names it, as in `delta.pattern_value`, or the common one."""
        if len(modules) * len(self.alpha_pattern) > _MAX_MATCHES:
            raise AdapterError(
                f"{self.path}: alpha_pattern has too many patterns, {len(self.alpha_pattern)}: use fewer"
            )
        found: dict[str, float] = {}
        for key, alpha in self.alpha_pattern.items():
            found |= {module: alpha for module in modules if module not in found and matches_end(key, module)}
        return {module: found.get(module, self.alpha) for module in modules}

    def text(self, key: str, most: int = _MAX_TEXT) -> str | None:
        value = self.content.get(key)
        if value is not None and not isinstance(value, str):
            raise AdapterError(f"{self.path}: {key} must be text, got {shown(value)}")
        if value and not is_plain(value, most):
            raise AdapterError(f"{self.path}: {key} must be printable and of at most {most} characters: {shown(value)}")
        return value or None

    def quantization(self) -> Quantization | None:
        content = self.content.get("base_quantization")
        if content is None:
            return None
        try:
            found = Quantization.from_json(content)
            if not all(is_plain(name, MAX_NAME) for name in found.modules):
                raise UsageError("a name of its modules is no name of a module")
            if found.block_size is not None and found.block_size not in _BLOCK_SIZES:
                raise UsageError(f"block_size {found.block_size} is none of {', '.join(map(str, _BLOCK_SIZES))}")
            return found
        except UsageError as error:
            why = shown(str(error), 240)
            raise AdapterError(f"{self.path}: base_quantization: {why}; train or fetch the adapter again") from None

    def excluded(self, modules: list[str]) -> dict[str, tuple[int, ...]]:
        """module -> indices of the other axis; it may have another of the names that `geometry.Names` knows."""
        names = Names(modules)
        entries = self._object("excluded")
        if len(entries.keys() - set(modules)) * len(modules) > _MAX_SEARCHES:
            raise AdapterError(f"{self.path}: excluded names too many modules, {len(entries)}: train the adapter again")
        found: dict[str, tuple[int, ...]] = {}
        for name, values in entries.items():
            known = names.find(name)
            if len(known) != 1:
                raise AdapterError(f"{self.path}: excluded names {shown(name)}, which is no module of the adapter")
            if not isinstance(values, list) or any(type(value) is not int for value in values):
                raise AdapterError(f"{self.path}: excluded[{shown(name)}] must be a list of whole numbers")
            if known[0] in found:
                raise AdapterError(f"{self.path}: excluded names {known[0]} twice: train the adapter again")
            found[known[0]] = tuple(values)
        return found

    def _number(self, key: str, value: object) -> float:
        # `read_json` lets no number through that is not finite.
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise AdapterError(f"{self.path}: {key} must be a finite number, got {shown(value)}")
        return float(value)

    def _object(self, key: str) -> Mapping[str, Any]:
        value = self.content.get(key) or {}
        if not isinstance(value, dict):
            raise AdapterError(f"{self.path}: {key} must be an object, got {shown(value)}")
        return value


def _sorted_tensors(weights: Path, header: Header, saved: list[str]) -> tuple[list[str], list[str]]:
    """Modules with a region, and tensors of the modules that were `saved` whole; sorted. Refuses every other tensor."""
    pairs: dict[str, set[str]] = {}
    whole = []
    for name in header.tensors:
        kind = next((kind for kind in (_VALUES, _INDICES) if name.endswith(kind)), None)
        plain = name.removeprefix(_PREFIX)
        if kind is not None and name.startswith(_PREFIX):
            pairs.setdefault(plain.removesuffix(kind), set()).add(kind)
        elif name.startswith(_PREFIX) and any(f".{module}." in f".{plain}" for module in saved):
            whole.append(plain)
        else:
            raise AdapterError(
                f"{weights} holds {shown(name)}, which is no part of an SBoRA region, nor of a module that "
                "modules_to_save names: fetch or train the adapter again"
            )
    if not pairs:
        raise AdapterError(f"{weights} holds no tensors of regions: train the adapter again")
    for module in sorted(pairs):
        if lacking := {_VALUES, _INDICES} - pairs[module]:
            raise AdapterError(f"{weights}: {module} has no {lacking.pop().removeprefix('.')}: fetch the adapter again")
    return sorted(pairs), sorted(whole)


def _whole(content: bytes, header: Header, tensor: str, weights: Path) -> np.ndarray:
    """One tensor of a module that was trained whole."""
    dtype = header.tensors[_PREFIX + tensor].dtype
    if dtype not in PATCHABLE:
        raise AdapterError(f"{weights}: {shown(tensor)} is {dtype}, no float of 16 or 32 bits: train it again")
    values = _array(content, header, _PREFIX + tensor, PATCHABLE[dtype])
    if not np.isfinite(values).all():
        raise AdapterError(
            f"{weights}: {shown(tensor)} holds NaN or infinity: the training diverged; train again with a lower "
            "learning rate"
        )
    return values


def _check_shapes(header: Header, module: str, variant: Variant, where: str) -> None:
    """dtype and axes of a pair of tensors, one index for each trained line, and at least one of either."""
    indices, values = (header.tensors[_PREFIX + module + kind] for kind in (_INDICES, _VALUES))
    for part, info, dtype, axes in ((_INDICES, indices, "I32", 1), (_VALUES, values, "F32", 2)):
        if info.dtype != dtype or len(info.shape) != axes:
            axis = "axis" if axes == 1 else "axes"
            raise AdapterError(
                f"{where}: {part[1:]} must be {dtype} with {axes} {axis}, got {info.dtype} of shape {list(info.shape)}"
            )
    (rank,) = indices.shape
    if values.shape[own_axis(variant)] != rank:
        raise AdapterError(f"{where}: {rank} indices but values of shape {list(values.shape)}: fetch it again")
    if not rank or not values.nbytes:
        raise AdapterError(f"{where}: a region needs at least one index, and a value: fetch or train it again")
    if rank > _MAX_RANK:
        raise AdapterError(f"{where}: {rank} indices are more than any matrix has: fetch it again")


def _content(weights: Path, header: Header) -> bytes:
    """The bytes of a file whose header was read. What it claims can be a hole, which needs no disk but memory."""
    size = header.data_start + max(info.end for info in header.tensors.values())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise AdapterError(f"{weights} has {size} bytes, this machine's memory {memory}: is it an adapter?")
    try:
        with open_file(weights) as file:
            content = file.read(size)
    except OSError as error:
        raise AdapterError(f"{weights} cannot be read: {error.strerror or error}") from None
    if len(content) < size:
        raise AdapterError(f"{weights} ended while it was read: it is truncated, or changes under our hands")
    return content


def _array(content: bytes, header: Header, name: str, kind: np.dtype[Any]) -> np.ndarray:
    info: TensorInfo = header.tensors[name]
    count = info.nbytes // kind.itemsize
    return np.frombuffer(content, kind, count, header.data_start + info.start).reshape(info.shape)


def _check_values(values: np.ndarray, region: Region, where: str) -> None:
    """Finite everywhere, and zero in the cells of earlier claims."""
    axis = own_axis(region.variant)
    finite = np.isfinite(values)
    if not finite.all():
        first = [int(place) for place in np.unravel_index(int(finite.argmin()), values.shape)]
        raise AdapterError(
            f"{where}: {values.size - np.count_nonzero(finite)} values are NaN or infinite, first at {first}: "
            "the training diverged; train again with a lower learning rate"
        )
    if region.excluded:
        if region.excluded[-1] >= values.shape[1 - axis]:
            raise AdapterError(f"{where}: excluded index {region.excluded[-1]} is outside {values.shape[1 - axis]}")
        if np.any(values.take(region.excluded, axis=1 - axis)):
            raise AdapterError(
                f"{where}: values are not zero in excluded cells, which an earlier task owns: train again"
            )
