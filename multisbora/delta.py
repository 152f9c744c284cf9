"""What one task adds to a matrix. Live forward, merge and export all stand on these functions; the verifier alone
derives the same numbers a second time, on purpose.

Nothing here imports an array library: `delta` takes numpy arrays and torch tensors alike, and gives the same fp32 bits
for both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

from .patterns import matches_end

Array = TypeVar("Array")
Value = TypeVar("Value")


def pattern_value(patterns: Mapping[str, Value], module: str, default: Value) -> Value:
    """The value of the first pattern that names `module`, as PEFT reads `rank_pattern` and `alpha_pattern`.

    A pattern is a regular expression for the whole dotted name or for its last parts: "q_proj" and "layers.3.*.q_proj"
    both match "model.layers.3.self_attn.q_proj".
    """
    for pattern, value in patterns.items():
        if matches_end(pattern, module):
            return value
    return default


def scaling(alpha: float, rank: int, use_rslora: bool) -> float:
    """s of design section 3: alpha / rank, or alpha / sqrt(rank) with rank-stabilised scaling (arXiv 2312.03732)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def delta(values: Array, scaling: float, weight: float = 1.0) -> Array:
    """lambda * s * values: the update of the owned cells, in the values' layout and dtype.

    Args:
        values: trained B (out_features x rank) or A (rank x in_features), fp32.
        scaling: s, applied here and nowhere else.
        weight: lambda, the task's weight in a merge.

    Returns:
        A new array, or `values` itself where the factor is 1.
    """
    factor = weight * scaling
    return values if factor == 1.0 else values * factor  # type: ignore[operator, return-value]
