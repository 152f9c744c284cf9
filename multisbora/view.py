"""The view of a base model that a task trains on: its weights as they are stored, or quantised and turned back.

A QSBoRA task trains on the second one, so the base that its values belong to is the dequantised one (peft#2105). An
adapter and a receipt say which view it was, in the words of this module. Pure data: what the words mean for numbers
lies in `quantization`, and a second time in the verifier.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .errors import UsageError

BaseView = Literal["original", "dequantized"]
# What `training.quantization` takes. bitsandbytes' fp4 is read too, since models of one's own may have it.
Kind = Literal["nf4", "int8"]
BASE_VIEWS: tuple[str, ...] = get_args(BaseView)
KINDS: tuple[str, ...] = get_args(Kind)
_BLOCKWISE = ("nf4", "fp4")
_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a base was quantised, so that its dequantised weights can be derived from its files again, bit for bit.

    Attributes:
        kind: "nf4" or "fp4" (blocks of 4-bit values), or "int8" (LLM.int8(): a scale a row).
        dtype: what the weights were loaded in before they were quantised, and are dequantised to.
        block_size: weights that share a scale; None for int8.
        double: whether the scales are quantised too, 8 bits each, around the mean of their matrix.
        modules: names of the quantised modules in the live model, sorted; all others are as stored.
        digest: sha256 (hex) of their dequantised weights, see `quantization.digest`.
    """

    kind: str
    dtype: str
    block_size: int | None
    double: bool
    modules: tuple[str, ...]
    digest: str

    def __post_init__(self) -> None:
        blockwise = self.kind in _BLOCKWISE
        if not blockwise and self.kind != "int8":
            raise UsageError(f"quantisation {self.kind!r} is unknown: it must be one of {', '.join(_BLOCKWISE)}, int8")
        if self.dtype not in _DTYPES:
            raise UsageError(f"quantisation of {self.dtype!r} weights is unknown: use {', '.join(_DTYPES)}")
        if blockwise != (type(self.block_size) is int) or type(self.double) is not bool or (self.double > blockwise):
            raise UsageError(f"quantisation {self.kind} with block_size {self.block_size!r}, double {self.double!r}")
        if not self.modules or any(not isinstance(name, str) for name in self.modules):
            raise UsageError("a quantisation must name the modules that it was of")
        if not isinstance(self.digest, str):
            raise UsageError(f"the digest of a quantisation must be text, got {self.digest!r}")

    def __str__(self) -> str:
        return f"{self.kind} with double quantisation" if self.double else self.kind

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "dtype": self.dtype,
            "block_size": self.block_size,
            "double": self.double,
            "modules": list(self.modules),
            "digest": self.digest,
        }

    @classmethod
    def from_json(cls, content: object) -> Quantization:
        """Read what `to_json` gave.

        Raises:
            UsageError: it is something else.
        """
        keys = ("kind", "dtype", "block_size", "double", "modules", "digest")
        if not isinstance(content, dict) or sorted(content) != sorted(keys) or not isinstance(content["modules"], list):
            raise UsageError(f"a quantisation has the keys {', '.join(keys)}")
        return cls(**{**content, "modules": tuple(content["modules"])})


def choose_view(trained: Mapping[str, Quantization | None], asked: str | None) -> Quantization | None:
    """The view that adapters are put on: the one that all of them were trained on, or the one asked for.

    Args:
        trained: name of each adapter -> how the base was quantised that it was trained on, None if it was not.
        asked: "original", "dequantized", or None for the view of the training.

    Returns:
        The quantisation of the dequantised view; None means the original one.

    Raises:
        UsageError: the adapters' views differ and none is asked for, or what is asked for is not known.
    """
    if asked is not None and asked not in BASE_VIEWS:
        raise UsageError(f"base view {asked!r} is unknown: use {' or '.join(BASE_VIEWS)}")
    if asked == "original":
        return None
    known = {quantization: name for name, quantization in trained.items()}
    quantized = [quantization for quantization in known if quantization is not None]
    if asked is None and len(known) > 1:
        told = ", ".join(f"{name} on {_name(quantization)}" for quantization, name in known.items())
        dequantized = " or --base-view dequantized" if len(quantized) == 1 else ""
        raise UsageError(
            f"the adapters were trained on different views ({told}): say --base-view original{dequantized}"
        )
    if len(quantized) > 1:
        one, two = (known[quantization] for quantization in quantized[:2])
        raise UsageError(f"{one} and {two} were trained on differently quantised bases: say --base-view original")
    if asked == "dequantized" and not quantized:
        raise UsageError(
            f"{', '.join(trained)} trained on the original base, which does not say how to quantise it: "
            "say --base-view original"
        )
    return quantized[0] if quantized else None


def _name(quantization: Quantization | None) -> str:
    return "the original base" if quantization is None else f"the dequantised one ({quantization})"
