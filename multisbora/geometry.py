"""Which matrices of a base model can be adapted: names, sizes, orientation. From a card or a checkpoint's headers.

Geometry speaks of STORED tensors (design, section 3): a tied tensor is stored once and therefore listed once, GPT-2's
Conv1D matrices lie transposed on disk, which `orientation` says, and each expert has matrices of its own, be they
stored apart or fused to one 3-D tensor, of which `part` then says the place. The same model is stored under names with
other leading parts here and there; `Names` says which names mean one module, and `Geometry.digest` and `Geometry.find`
see through that.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .cards import EXPERT, LAYER, Card, Orientation, card_text, grouped, read_card
from .errors import GeometryError, UsageError
from .header import Header, TensorInfo, read_headers
from .untrusted import is_plain, read_json, shown

# Their transformers implementations build every matrix of a block from Conv1D, which stores (in, out).
CONV1D_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_ADAPTABLE_DTYPES = frozenset({"F16", "BF16", "F32", "F64"})
_SUFFIX = ".weight"
_MAX_KINDS = 20  # that a message lists
_MAX_NEAR = 2000  # names to look for a near one among: of all experts of a large mixture it would take seconds
_FUSED = re.compile(r"(?P<experts>.*\bexperts)\.(?P<kind>(?!weight$|bias$)\w+)")
# Their checkpoints hold fused experts as (experts, in, out); all others, as transformers itself, as (experts, out, in).
_FUSED_TRANSPOSED = frozenset({"gpt_oss", "llama4", "llama4_text", "qwen3_vl_moe", "qwen3_vl_moe_text"})
_IN_BLOCK = re.compile(r"(?:^|\.)\d+\.")
_CONTAINER = re.compile(r"(?:^|(?<=\.))[^.]+\.\d+\.")
# Parts that a class of transformers puts around the same blocks, in one order or another, and PEFT around those.
_WRAPPERS = frozenset({"base_model", "model", "language_model"})
_LANGUAGE = "language_model"
_TOWERS = frozenset({"vision_tower", "vision_model", "vision_encoder", "vision_backbone", "visual"})
_TOWERS |= {"audio_tower", "audio_model", "audio_encoder", "speech_encoder"}


class Names:
    """The names of one model's modules, each found also under the names that the same module has elsewhere.

    A live model, the checkpoint that it came from and PEFT put other parts before the numbered blocks. Two names mean
    one module where they are equal; else where they are equal from the container of the block on and only the wrappers
    of transformers and PEFT stand before it, as in "language_model.model.layers.0..." and
    "model.language_model.layers.0..."; else where one has more parts in front, as "transformer.h.0..." has before
    "h.0...". A module of a vision or audio tower never stands for one outside of it.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = dict.fromkeys(names)
        self._by_tail: dict[str, list[str]] = {}
        for name in self._names:
            self._by_tail.setdefault(_split(name)[1], []).append(name)

    def find(self, module: str) -> list[str]:
        """Those of the names that can mean `module`: one, or none, or several where it is not clear which."""
        if module in self._names:
            return [module]
        head, tail = _split(module)
        if _WRAPPERS.issuperset(head):
            found = [name for name in self._by_tail.get(tail, ()) if _WRAPPERS.issuperset(_split(name)[0])]
            if found:
                return found
        towers = _TOWERS.intersection(module.split("."))
        return [
            name
            for name in self._names
            if (module.endswith(f".{name}") and _IN_BLOCK.search(name))
            or (name.endswith(f".{module}") and _IN_BLOCK.search(module))
            if towers == _TOWERS.intersection(name.split("."))
        ]


def spellings(module: str) -> tuple[str, ...]:
    """The names of a module with the wrappers before its block in every order, its own first.

    They are for PEFT, which finds a module by its exact name or by its last parts, and knows no `Names`.
    """
    head, tail = _split(module)
    orders = itertools.permutations(head) if _WRAPPERS.issuperset(head) else (head,)
    return tuple(dict.fromkeys(".".join((*order, tail)) for order in orders))


@dataclass(frozen=True, slots=True)
class Matrix:
    """One adaptable matrix.

    Attributes:
        module: dotted name of the layer, "model.layers.0.self_attn.q_proj".
        tensor: name of the stored tensor, "model.layers.0.self_attn.q_proj.weight".
        out_features: output channels, what `fb` claims.
        in_features: input channels, what `fa` claims.
        orientation: "linear" stores (out, in), "conv1d" stores (in, out).
        part: its index in a stored 3-D tensor of fused experts; None where the tensor is the matrix.
        parts: how many matrices that tensor holds; 1 where it is the matrix.
    """

    module: str
    tensor: str
    out_features: int
    in_features: int
    orientation: Orientation = "linear"
    part: int | None = None
    parts: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features), whatever the orientation."""
        return (self.out_features, self.in_features)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the stored tensor: of two axes, or of three where experts are fused."""
        shape = self.shape if self.orientation == "linear" else (self.in_features, self.out_features)
        return shape if self.part is None else (self.parts, *shape)

    @property
    def cells_name(self) -> str:
        """What the cells of this matrix are called in files: the stored tensor, with the part's index if it has one."""
        return self.tensor if self.part is None else f"{self.tensor}[{self.part}]"

    @property
    def kind(self) -> str:
        """Last part of the module's name, "q_proj"."""
        return self.module.rpartition(".")[2]

    @property
    def is_expert(self) -> bool:
        """Whether it is one of the numbered experts of a mixture, which a live model holds fused, not as a layer."""
        return EXPERT.search(self.module) is not None


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
    def _names(self) -> Names:
        return Names(self._by_module)

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) over the matrices' names, sizes and orientations. Two names of one model have one digest.

        A matrix is named from the container of its numbered block on: "h.0.attn.c_attn", whether it is stored so or as
        "transformer.h.0.attn.c_attn". Where two matrices would then share a name, all have their full names.
        """
        tails = [_split(matrix.module)[1] for matrix in self.matrices]
        plain = len(set(tails)) == len(tails)
        rows = sorted(
            [tail if plain else m.module, m.out_features, m.in_features, m.orientation]
            for tail, m in zip(tails, self.matrices, strict=True)
        )
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()

    def kinds(self) -> tuple[str, ...]:
        """The distinct kinds, in the order of the layers: ("down_proj", "gate_proj", ...)."""
        return tuple(dict.fromkeys(matrix.kind for matrix in self.matrices))

    def _told_kinds(self) -> str:
        kinds = self.kinds()
        return shown(", ".join(kinds[:_MAX_KINDS]), 240) + (
            f" and {len(kinds) - _MAX_KINDS} more" * (len(kinds) > _MAX_KINDS)
        )

    def select(self, target_modules: str | Sequence[str]) -> tuple[Matrix, ...]:
        """The matrices that `target_modules` names, as PEFT reads it.

        Args:
            target_modules: "all-linear", every matrix that is a linear layer of the live model. Experts are none: a
                live model holds all experts of a block fused in one 3-D tensor. The other two forms do select them.
                Another string is a regular expression for the whole module name; a sequence lists last parts of names
                ("q_proj", "mlp.down_proj", "w1", "experts.0.w1").

        Raises:
            UsageError: nothing matches, or the regular expression is none. The message lists the kinds there are.
        """
        if isinstance(target_modules, str):
            if target_modules == "all-linear":
                chosen = tuple(matrix for matrix in self.matrices if not matrix.is_expert)
            else:
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
                    f"it has {self._told_kinds()}; or use all-linear"
                )
        if not chosen:
            raise UsageError(
                f"target_modules {target_modules!r} matches no matrix of {self.model}: "
                f"it has {self._told_kinds()}; or use all-linear"
            )
        return chosen

    def find(self, module: str) -> Matrix:
        """The matrix of a module, named exactly or with other leading parts: see `Names`.

        Raises:
            GeometryError: no matrix, or more than one, has that name.
        """
        found = self._names.find(module)
        if len(found) != 1:
            near = difflib.get_close_matches(module, list(self._by_module)[:_MAX_NEAR], n=1)
            hint = f": did you mean {near[0]}?" if near else f": its kinds are {self._told_kinds()}"
            raise GeometryError(f"{self.model} has {'no' if not found else 'more than one'} matrix {module!r}{hint}")
        return self._by_module[found[0]]

    def to_card(self) -> dict[str, Any]:
        """The geometry as a card's JSON: matrices that differ by layer and expert number alone become one group."""
        rows = ((m.module, m.out_features, m.in_features, m.orientation) for m in self.matrices)
        return {"names": [self.model], "model_type": self.model_type, "groups": grouped(rows)}

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write `to_card` as JSON, readable by `from_card`."""
        Path(path).write_text(card_text(self.to_card()), encoding="utf-8")


def adaptable(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Which tensors of a model are matrices that can be adapted: 2-D weights inside numbered blocks, less two things.

    Embeddings, heads, norms and biases lie outside of blocks or are no matrices. Left out of what remains are

    - routers, which choose the experts of a mixture: modules named `router` or inside of one, and those named `gate`
      or `shared_expert_gate` beside `experts` (a plain block may call a real matrix `gate`);
    - towers of a multimodal model: where some name has the part `language_model`, only matrices with that part count;
      elsewhere those with a part that names a vision or audio tower ("vision_tower", "visual", ...) do not.

    Args:
        shapes: name -> shape of ALL tensors, stored or live.
    """
    mixtures = {name.partition(".experts.")[0] for name in shapes if ".experts." in name}
    parts = {
        name: name.split(".")
        for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith(_SUFFIX) and _IN_BLOCK.search(name) and not _is_router(name, mixtures)
    }
    spoken = [name for name in parts if _LANGUAGE in parts[name]]
    return spoken or [name for name in parts if _TOWERS.isdisjoint(parts[name])]


def from_card(name_or_path: str | os.PathLike[str]) -> Geometry:
    """Geometry of a known model, by card name, by another name of the model (hub id; case does not matter), or by path.

    Raises:
        UsageError: no card has that name; the message has the nearest ones.
        GeometryError: the card's file is malformed.
    """
    return _geometry(read_card(name_or_path))


def describe(card: Card) -> dict[str, Any]:
    """What a card says and what follows from it, for people and as JSON: layers, sizes, matrices, kinds, digest.

    Raises:
        GeometryError: one of its groups is malformed.
    """
    geometry = _geometry(card)
    text = card.config.get("text_config", card.config)
    return {
        "names": list(card.names),
        "model_type": card.model_type,
        "parameters": card.parameters,
        "layers": len({m.module[: found.end()] for m in geometry.matrices if (found := LAYER.search(m.module))}),
        "hidden_size": text.get("hidden_size", text.get("n_embd", 0)),
        "matrices": len(geometry.matrices),
        "expert_matrices": sum(m.is_expert for m in geometry.matrices),
        "adaptable_parameters": sum(m.out_features * m.in_features for m in geometry.matrices),
        "kinds": list(geometry.kinds()),
        "digest": geometry.digest,
        "config": dict(card.config),
    }


def from_checkpoint(folder: str | os.PathLike[str], headers: Mapping[Path, Header] | None = None) -> Geometry:
    """Geometry of a checkpoint on disk, from config.json and the headers of its safetensors files alone.

    The model is called after its folder. `adaptable` says which of the tensors count.

    Args:
        headers: what `read_headers` gave for the folder, where it was read already.

    Raises:
        CheckpointError: the weights are missing, truncated or corrupt.
        GeometryError: config.json is missing or unreadable, or no matrix can be adapted.
    """
    folder = Path(folder).resolve()
    headers = headers or read_headers(folder)
    model_type = _model_type(folder / "config.json")
    orientation: Orientation = "conv1d" if model_type in CONV1D_MODEL_TYPES else "linear"
    stored = {tensor: info for header in headers.values() for tensor, info in header.tensors.items()}
    matrices = []
    other: str | None = None
    for tensor in adaptable({tensor: info.shape for tensor, info in stored.items()}):
        info = stored[tensor]
        if info.dtype not in _ADAPTABLE_DTYPES:
            other = info.dtype
            continue
        out_features, in_features = info.shape if orientation == "linear" else info.shape[::-1]
        matrices.append(Matrix(tensor.removesuffix(_SUFFIX), tensor, out_features, in_features, orientation))
    matrices += _fused(stored, model_type)
    if not matrices and other:
        raise GeometryError(f"{folder} is quantised (its matrices are {other}): use the 16-bit checkpoint it came from")
    return Geometry(model=folder.name, model_type=model_type, matrices=tuple(matrices))


def _fused(stored: Mapping[str, TensorInfo], model_type: str) -> Iterator[Matrix]:
    """The matrices of experts that are stored fused, one an expert: "experts.3.down_proj" of "experts.down_proj"."""
    orientation: Orientation = "conv1d" if model_type in _FUSED_TRANSPOSED else "linear"
    for tensor, info in stored.items():
        name = _FUSED.fullmatch(tensor)
        if name and len(info.shape) == 3 and info.dtype in _ADAPTABLE_DTYPES and _IN_BLOCK.search(tensor):
            parts, first, second = info.shape
            sizes = (first, second) if orientation == "linear" else (second, first)
            for part in range(parts):
                module = f"{name['experts']}.{part}.{name['kind']}"
                yield Matrix(module, tensor, *sizes, orientation, part, parts)


def _geometry(card: Card) -> Geometry:
    matrices = tuple(Matrix(row[0], row[0] + _SUFFIX, *row[1:]) for row in card.rows())
    return Geometry(model=card.name, model_type=card.model_type, matrices=matrices)


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]


def _model_type(config: Path) -> str:
    try:
        model_type = read_json(config)["model_type"]
    except FileNotFoundError:
        raise GeometryError(f"{config} does not exist: a model folder needs it beside its weights") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise GeometryError(f"{config} is unreadable or has no model_type: fetch it again") from None
    if not isinstance(model_type, str) or not is_plain(model_type, 100):
        raise GeometryError(f"{config}: model_type must be a short text, got {shown(model_type)}")
    return model_type


def _split(module: str) -> tuple[tuple[str, ...], str]:
    """The parts before the container of the numbered blocks, and the name from there on; all of it if there is none."""
    match = _CONTAINER.search(module)
    start = match.start() if match else 0
    return tuple(module[:start].split(".")[:-1]), module[start:]


def _is_router(tensor: str, mixtures: set[str]) -> bool:
    parent, _, last = tensor.removesuffix(_SUFFIX).rpartition(".")
    return "router" in (last, *parent.split(".")) or (last in ("gate", "shared_expert_gate") and parent in mixtures)
