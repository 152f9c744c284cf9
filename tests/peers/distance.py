"""How far two tensors of one dtype lie apart, in steps between its numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Distance:
    """Attributes:
    cells: how many cells were compared.
    differing: how many do not hold the same number; 0 and -0 are the same.
    steps: most numbers of the dtype that lie between the two in one cell, plus one. Near zero there are many.
    spacings: the largest difference, in spacings of the dtype at the larger of the cell's operands.
    """

    cells: int = 0
    differing: int = 0
    steps: int = 0
    spacings: float = 0.0

    def __add__(self, other: Distance) -> Distance:
        return Distance(
            self.cells + other.cells,
            self.differing + other.differing,
            max(self.steps, other.steps),
            max(self.spacings, other.spacings),
        )

    def __str__(self) -> str:
        return (
            f"{self.differing:,} of {self.cells:,} cells differ, by at most {self.steps} steps "
            f"and {self.spacings:.3g} spacings of the larger operand"
        )


def between(one: Tensor, other: Tensor, *operands: Tensor) -> Distance:
    """The distance of two tensors.

    Args:
        operands: what was added up to give them, in any dtype. A sum that cancels is tiny, its error is not.
    """
    assert one.dtype == other.dtype and one.shape == other.shape, (one.dtype, other.dtype, one.shape, other.shape)
    if not one.numel():
        return Distance()
    largest = torch.stack([tensor.double().abs() for tensor in (one, other, *operands)]).amax(0)
    return Distance(
        cells=one.numel(),
        differing=int((one != other).sum()),
        steps=int((_position(one) - _position(other)).abs().max()),
        spacings=float(((one.double() - other.double()).abs() / spacing(largest, one.dtype)).max()),
    )


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between the numbers of `dtype` around each value, in float64."""
    limits = torch.finfo(dtype)
    _, exponent = torch.frexp(values.double().abs().clamp(min=limits.smallest_normal))  # value in [1/2, 1) * 2^exponent
    return limits.eps * torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent - 1)


def _position(values: Tensor) -> Tensor:
    """Place of each value in the order of its dtype's numbers, counted from zero."""
    bits = values.contiguous().view(BITS[values.element_size()]).long()
    sign = torch.iinfo(BITS[values.element_size()]).min
    return torch.where(bits < 0, sign - bits, bits)
