"""The base as quantised training saw it, derived from the stored one through bitsandbytes' own layers."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from .names import Model
from .tensors import as_bits


class Dequantized:
    """What quantisation makes of a base's tensors."""

    def __init__(self, scheme: dict[str, Any], model: Model) -> None:
        """Find the tensors that were quantised.

        Raises:
            One of tensors.UNREADABLE: the scheme is none, or the base lacks a module of it.
        """
        self.kind, self.double = scheme["kind"], scheme["double"]
        self.digest = str(scheme["digest"])
        self.dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[scheme["dtype"]]
        self.block_size = scheme["block_size"]
        found = {module: model.find(module) for module in scheme["modules"]}
        if fused := [module for module, matrix in found.items() if matrix.part is not None]:
            raise ValueError(f"{fused[0]} is no matrix of its own")
        self.modules = {matrix.tensor: module for module, matrix in found.items()}  # stored tensor -> module
        self._transposed = {matrix.tensor for matrix in found.values() if matrix.transposed}
        self._lines: dict[str, str] = {}

    def of(self, key: str, stored: torch.Tensor) -> torch.Tensor:
        """A stored tensor of these, quantised and turned back, in its own shape and dtype."""
        from bitsandbytes import functional, nn

        turned = key in self._transposed
        values: torch.Tensor = (stored.T if turned else stored).contiguous().to(self.dtype)  # (out, in)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the mean of the scales, which double quantisation takes, depends on their number
        try:
            if self.kind == "int8":
                layer = nn.Int8Params(values, requires_grad=False).to("cpu")
                values = functional.int8_vectorwise_dequant(layer.CB, layer.SCB).to(self.dtype)
            else:
                options = {"blocksize": self.block_size, "compress_statistics": self.double, "quant_type": self.kind}
                layer = nn.Params4bit(values, requires_grad=False, **options).to("cpu")
                values = functional.dequantize_4bit(layer.data, layer.quant_state).view(values.shape)
        finally:
            torch.set_num_threads(threads)
        self._lines[self.modules[key]] = hashlib.sha256(as_bits(values).tobytes()).hexdigest()
        values = values.to(stored.dtype)
        return values.T.contiguous() if turned else values

    def is_whole(self) -> bool:
        """Whether all of it has the digest that training recorded."""
        lines = "".join(f"{module} {line}\n" for module, line in sorted(self._lines.items()))
        return hashlib.sha256(lines.encode()).hexdigest() == self.digest
