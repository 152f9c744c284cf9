"""Which matrices of a base model can be adapted: names, sizes, orientation. From a card or a checkpoint's headers.

Geometry speaks of STORED tensors (design, section 3): a tied tensor is stored once and therefore listed once, and
GPT-2's Conv1D matrices lie transposed on disk, which `orientation` says.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from .errors import GeometryError, UsageError
from .header import read_headers
from .resources import models_dir

Orientation = Literal["linear", "conv1d"]

# Their transformers implementations build every matrix of a block from Conv1D, which stores (in, out).
CONV1D_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_ADAPTABLE_DTYPES = frozenset({"F16", "BF16", "F32", "F64"})
_SUFFIX = ".weight"
_IN_BLOCK = re.compile(r"(?:^|\.)\d+\.")
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
_CARD_KEYS = {"names", "model_type", "config", "groups"}
_GROUP_KEYS = {"module", "layers", "out", "in", "orientation"}


@dataclass(frozen=True, slots=True)
class Matrix:
    """One adaptable matrix.

    Attributes:
        module: dotted name of the layer, "model.layers.0.self_attn.q_proj".
        tensor: name of the stored tensor, "model.layers.0.self_attn.q_proj.weight".
        out_features: output channels, what `fb` claims.
        in_features: input channels, what `fa` claims.
        orientation: "linear" stores (out, in), "conv1d" stores (in, out).
    """

    module: str
    tensor: str
    out_features: int
    in_features: int
    orientation: Orientation = "linear"

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features), whatever the orientation."""
        return (self.out_features, self.in_features)

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape of the stored tensor."""
        return self.shape if self.orientation == "linear" else (self.in_features, self.out_features)

    @property
    def kind(self) -> str:
        """Last part of the module's name, "q_proj"."""
        return self.module.rpartition(".")[2]


@dataclass(frozen=True)
class Geometry:
    """The adaptable matrices of one base model, in the order of its layers.

    Attributes:
        model: name under which the registry keeps the model's claims.
        model_type: transformers' name of the architecture, "llama".
        matrices: sorted so that layer 2 comes before layer 10.

    Raises:
        GeometryError: there are no matrices, or one is listed twice.
    """

    model: str
    model_type: str
    matrices: tuple[Matrix, ...]

    def __post_init__(self) -> None:
        if not self.matrices:
            raise GeometryError(f"{self.model} has no adaptable matrices: is it a decoder with numbered blocks?")
        object.__setattr__(self, "matrices", tuple(sorted(self.matrices, key=lambda matrix: _natural(matrix.module))))
        if len(self._by_module) != len(self.matrices):
            raise GeometryError(f"{self.model} lists a matrix twice: correct its card")

    @cached_property
    def _by_module(self) -> dict[str, Matrix]:
        return {matrix.module: matrix for matrix in self.matrices}

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) over the tensors' names, sizes and orientations. Two names of one model have one digest."""
        rows = [[m.tensor, m.out_features, m.in_features, m.orientation] for m in self.matrices]
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()

    def kinds(self) -> tuple[str, ...]:
        """The distinct kinds, in the order of the layers: ("down_proj", "gate_proj", ...)."""
        return tuple(dict.fromkeys(matrix.kind for matrix in self.matrices))

    def select(self, target_modules: str | Sequence[str]) -> tuple[Matrix, ...]:
        """The matrices that `target_modules` names, as PEFT reads it.

        Args:
            target_modules: "all-linear"; another string is a regular expression for the whole module name; a sequence
                lists last parts of names ("q_proj", "mlp.down_proj").

        Raises:
            UsageError: nothing matches, or the regular expression is none. The message lists the kinds there are.
        """
        if isinstance(target_modules, str):
            if target_modules == "all-linear":
                return self.matrices
            try:
                pattern = re.compile(target_modules)
            except re.error as error:
                raise UsageError(f"target_modules {target_modules!r} is no regular expression: {error}") from None
            chosen = tuple(matrix for matrix in self.matrices if pattern.fullmatch(matrix.module))
        else:
            names = tuple(target_modules)
            ends = tuple(f".{name}" for name in names)
            chosen = tuple(m for m in self.matrices if m.module in names or m.module.endswith(ends))
            idle = [n for n in names if not any(m.module == n or m.module.endswith(f".{n}") for m in chosen)]
            if idle:
                raise UsageError(
                    f"target module {', '.join(idle)} matches no matrix of {self.model}: "
                    f"it has {', '.join(self.kinds())}; or use all-linear"
                )
        if not chosen:
            raise UsageError(
                f"target_modules {target_modules!r} matches no matrix of {self.model}: "
                f"it has {', '.join(self.kinds())}; or use all-linear"
            )
        return chosen

    def find(self, module: str) -> Matrix:
        """The matrix of a module, named exactly or with other leading parts ("h.0..." for "transformer.h.0...").

        Raises:
            GeometryError: no matrix, or more than one, has that name.
        """
        if module in self._by_module:
            return self._by_module[module]
        found = [
            matrix
            for matrix in self.matrices
            if (module.endswith(f".{matrix.module}") and _IN_BLOCK.search(matrix.module))
            or (matrix.module.endswith(f".{module}") and _IN_BLOCK.search(module))
        ]
        if len(found) != 1:
            near = difflib.get_close_matches(module, self._by_module, n=1)
            hint = f": did you mean {near[0]}?" if near else f": its kinds are {', '.join(self.kinds())}"
            raise GeometryError(f"{self.model} has {'no' if not found else 'more than one'} matrix {module!r}{hint}")
        return found[0]

    def to_card(self) -> dict[str, Any]:
        """The geometry as a card's JSON: matrices that differ by layer number alone become one group."""
        groups: dict[tuple[str, int, int, Orientation], list[int]] = {}
        for matrix in self.matrices:
            match = _LAYER.search(matrix.module)
            template = matrix.module if not match else _LAYER.sub("{i}", matrix.module, count=1)
            layers = groups.setdefault((template, matrix.out_features, matrix.in_features, matrix.orientation), [])
            if match:
                layers.append(int(match.group()))
        return {
            "names": [self.model],
            "model_type": self.model_type,
            "groups": [
                {
                    "module": template,
                    "layers": len(layers) if layers == list(range(len(layers))) else layers,
                    "out": out_features,
                    "in": in_features,
                    "orientation": orientation,
                }
                for (template, out_features, in_features, orientation), layers in groups.items()
            ],
        }

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write `to_card` as JSON, readable by `from_card`."""
        Path(path).write_text(json.dumps(self.to_card(), indent=2) + "\n", encoding="utf-8")


def is_adaptable(tensor: str, dims: int) -> bool:
    """Whether a stored tensor is a matrix inside a numbered block: no embedding, head, norm or bias."""
    return dims == 2 and tensor.endswith(_SUFFIX) and bool(_IN_BLOCK.search(tensor))


def from_card(name_or_path: str | os.PathLike[str]) -> Geometry:
    """Geometry of a known model, by card name, by another name of the model (hub id; case does not matter), or by path.

    Raises:
        UsageError: no card has that name; the message has the nearest ones.
        GeometryError: the card's file is malformed.
    """
    name = os.fspath(name_or_path)
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        return _read_card(path)
    aliases = _aliases()
    if name.lower() in aliases:
        return _read_card(aliases[name.lower()])
    near = difflib.get_close_matches(name.lower(), aliases, n=3, cutoff=0.5)
    stems = list(dict.fromkeys(aliases[alias].stem for alias in near))
    hint = f"did you mean {' or '.join(stems)}?" if stems else f"cards: {', '.join(card_names())}"
    raise UsageError(f"no geometry card is called {name!r}: {hint}")


def card_names() -> tuple[str, ...]:
    """Names of the cards that ship with multisbora, sorted."""
    return tuple(sorted((path.stem for path in models_dir().glob("*.json")), key=str.lower))


def from_checkpoint(folder: str | os.PathLike[str]) -> Geometry:
    """Geometry of a checkpoint on disk, from config.json and the headers of its safetensors files alone.

    The model is called after its folder.

    Raises:
        CheckpointError: the weights are missing, truncated or corrupt.
        GeometryError: config.json is missing or unreadable, or no matrix can be adapted.
    """
    folder = Path(folder).resolve()
    headers = read_headers(folder)
    model_type = _model_type(folder / "config.json")
    orientation: Orientation = "conv1d" if model_type in CONV1D_MODEL_TYPES else "linear"
    matrices = []
    other: str | None = None
    for header in headers.values():
        for tensor, info in header.tensors.items():
            if not is_adaptable(tensor, len(info.shape)):
                continue
            if info.dtype not in _ADAPTABLE_DTYPES:
                other = info.dtype
                continue
            out_features, in_features = info.shape if orientation == "linear" else info.shape[::-1]
            matrices.append(Matrix(tensor.removesuffix(_SUFFIX), tensor, out_features, in_features, orientation))
    if not matrices and other:
        raise GeometryError(f"{folder} is quantised (its matrices are {other}): use the 16-bit checkpoint it came from")
    return Geometry(model=folder.name, model_type=model_type, matrices=tuple(matrices))


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]


def _model_type(config: Path) -> str:
    try:
        model_type = json.loads(config.read_bytes())["model_type"]
    except FileNotFoundError:
        raise GeometryError(f"{config} does not exist: a model folder needs it beside its weights") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise GeometryError(f"{config} is unreadable or has no model_type: fetch it again") from None
    if not isinstance(model_type, str):
        raise GeometryError(f"{config}: model_type must be text, got {model_type!r}")
    return model_type


def _aliases() -> dict[str, Path]:
    """Lower-case name -> card. Stems go last, so that an alias in another card cannot take a card's own name."""
    paths = sorted(models_dir().glob("*.json"))
    aliases = {name.lower(): path for path in paths for name in _card(path)["names"]}
    return aliases | {path.stem.lower(): path for path in paths}


def _card(path: Path) -> dict[str, Any]:
    try:
        card = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise GeometryError(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(card, dict) or not {"names", "model_type", "groups"} <= set(card) <= _CARD_KEYS:
        raise GeometryError(f"{path}: a card has the keys names, model_type, groups and perhaps config, no others")
    names, groups = card["names"], card["groups"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise GeometryError(f"{path}: names must be a list of texts")
    if not isinstance(card["model_type"], str):
        raise GeometryError(f"{path}: model_type must be text")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise GeometryError(f"{path}: groups must be a list of objects")
    return card


def _read_card(path: Path) -> Geometry:
    card = _card(path)
    matrices = tuple(matrix for group in card["groups"] for matrix in _expand(path, group))
    return Geometry(model=path.stem, model_type=card["model_type"], matrices=matrices)


def _expand(path: Path, group: dict[str, Any]) -> Iterable[Matrix]:
    if set(group) != _GROUP_KEYS:
        raise GeometryError(f"{path}: a group has the keys {', '.join(sorted(_GROUP_KEYS))}, got {sorted(group)}")
    template, layers = group["module"], group["layers"]
    out_features, in_features, orientation = group["out"], group["in"], group["orientation"]
    numbers = list(range(layers)) if type(layers) is int else layers
    if not isinstance(template, str) or orientation not in get_args(Orientation):
        raise GeometryError(f"{path}: module must be text and orientation linear or conv1d, got {group}")
    if any(type(size) is not int or size < 1 for size in (out_features, in_features)):
        raise GeometryError(f"{path}: {template}: out and in must be whole numbers above 0")
    if not isinstance(numbers, list) or any(type(number) is not int or number < 0 for number in numbers):
        raise GeometryError(f"{path}: {template}: layers must be a count or a list of layer numbers")
    if bool(numbers) != ("{i}" in template):
        raise GeometryError(f"{path}: {template}: a module with {{i}} needs layers, and one without has 0 of them")
    for module in [template.replace("{i}", str(number)) for number in numbers] or [template]:
        yield Matrix(module, module + _SUFFIX, out_features, in_features, orientation)
