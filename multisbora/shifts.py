"""What the updates of several tasks add to the outputs of a base model's matrices, on the rows of each task.

On a token with input x, task j's update D_j adds lambda_j D_j x to the output of a matrix, and task i's own adapter, as
it was trained, adds D_i x. `Shift` compares the two where the rows are task i's, with x from the base model alone.

An update is never made dense. The n columns and rows that tasks claimed in a matrix read n numbers of a token, x[I] for
columns and A x for rows, and each writes its number along one direction of the output, a column of B or a unit vector.
With F (tokens, n) what is read and C (out, n) where it is written, the inner products of all shifts by each other,
summed over tokens of weight w, are sums over blocks of (F' w F) * (C' C): two n x n matrices, multiplied cell by cell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import use_packed_attention
from .dataset import Example, packs
from .probe import BATCH_TOKENS, batches, opening_loss
from .tuner import SboraLayer

Figures = npt.NDArray[np.float64]


# ----------------------------------------------------------------------------------------------------------- figures


@dataclass(frozen=True, slots=True)
class Shift:
    """What updates add to the output of a matrix, or of several together, on the rows of each task.

    All are weighted means over all tokens of a task's rows, summed over output channels and matrices. A matrix that a
    token does not reach, as an expert's, adds nothing for it.

    Attributes:
        energy: (tasks, tasks), at [i, j]: |lambda_j D_j x|^2 on the rows of task i.
        inner: (tasks, tasks), at [i, j]: the inner product of lambda_j D_j x and D_i x on the rows of task i.
        own: (tasks,), at [i]: |D_i x|^2 on the rows of task i: its own update as it was trained, at lambda 1.
    """

    energy: Figures
    inner: Figures
    own: Figures

    def __add__(self, other: Shift) -> Shift:
        return Shift(self.energy + other.energy, self.inner + other.inner, self.own + other.own)

    @property
    def share(self) -> Figures:
        """(tasks, tasks), at [i, j]: the energy of update j on the rows of task i as a share of that of task i's own as
        it was trained, so that the diagonal is lambda squared; NaN where task i's own adds nothing."""
        return _divide(self.energy, np.broadcast_to(self.own[:, None], self.energy.shape))

    @property
    def cosine(self) -> Figures:
        """(tasks, tasks), at [i, j]: between the shift by update j, with the sign of its lambda, and that by task i's
        own as it was trained, over all tokens and outputs at once; NaN where one of them is zero."""
        found: Figures = _divide(self.inner, np.sqrt(self.energy * self.own[:, None])).clip(-1.0, 1.0)
        return found


def _divide(above: Figures, below: Figures) -> Figures:
    """NaN where the divisor is zero."""
    ratio: Figures = np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)
    return ratio


@dataclass(frozen=True, slots=True)
class Effect:
    """One matrix, or all of them together.

    Attributes:
        shift: all tokens weigh the same; energies are squared units of the matrix' output.
        harm: a token weighs |g|^2 / out_features, g being the gradient of its row's `probe.opening_loss` at the output
            of the matrix, in the base model; energies are `moments.harm`, squared nats a row.
    """

    shift: Shift
    harm: Shift

    def __add__(self, other: Effect) -> Effect:
        return Effect(self.shift + other.shift, self.harm + other.harm)

    @classmethod
    def of(cls, grams: Sequence[Figures], lambdas: Sequence[float]) -> Effect:
        """One matrix.

        Args:
            grams: of the rows of each task, as `observe` gives them.
            lambdas: of each task in this matrix.
        """
        scale = np.array(lambdas, np.float64)
        shifts = []
        for weighting in range(2):
            # Rounding may leave a sum of squares that is zero below it.
            energy = np.maximum([np.diag(gram[weighting]) for gram in grams], 0.0)
            inner = np.stack([gram[weighting][i] for i, gram in enumerate(grams)])
            shifts.append(Shift(scale**2 * energy, scale * inner, np.diag(energy).copy()))
        return cls(*shifts)

    def to_json(self, tasks: Sequence[str]) -> dict[str, Any]:
        """{rows of task: {update of task: {figure: value}}}; a figure that is not defined is null."""
        figures = {
            **{"energy": self.shift.energy, "share": self.shift.share, "cosine": self.shift.cosine},
            **{"harm": self.harm.energy, "harm_share": self.harm.share, "harm_cosine": self.harm.cosine},
        }
        return {
            on: {of: {name: defined(values[i, j]) for name, values in figures.items()} for j, of in enumerate(tasks)}
            for i, on in enumerate(tasks)
        }


def defined(value: float) -> float | None:
    """None in place of NaN, which JSON does not have."""
    return None if math.isnan(value) else float(value)


# ------------------------------------------------------------------------------------------------------------ the pass


class Watch:
    """All updates of one layer at lambda 1, ready to be asked what they add to its output on some tokens."""

    def __init__(self, layer: SboraLayer, adapters: Sequence[str]) -> None:
        """
        Args:
            layer: its tasks have lambda 1, as after loading.
            adapters: PEFT's names of the tasks' adapters, in the order of the answers; the layer may lack some.
        """
        self.layer = layer
        self._tasks = len(adapters)
        held = [(i, name) for i, name in enumerate(adapters) if name in layer.sbora_values]
        columns = [(i, name) for i, name in held if layer.variant[name] == "fa"]
        rows = [(i, name) for i, name in held if layer.variant[name] == "fb"]
        indices = {name: layer.sbora_indices[name].long() for _, name in held}
        self._channels = [indices[name] for _, name in columns]
        self._projections = [layer.update(name).detach() for _, name in rows]  # (r, in)
        written = [layer.update(name).detach() for _, name in columns]  # (out, r)
        written += [F.one_hot(indices[name], layer.out_features).t().float() for _, name in rows]
        directions = torch.cat(written, 1)  # (out, n)
        self._products = directions.t() @ directions  # (n, n)
        owners = [i for i, name in columns + rows for _ in indices[name]]
        self._owned = F.one_hot(torch.tensor(owners, device=directions.device), self._tasks).float()  # (n, tasks)

    def nothing(self) -> Tensor:
        """Sums to add to, (2, tasks, tasks) fp32."""
        return torch.zeros(2, self._tasks, self._tasks, device=self._products.device)

    def read(self, x: Tensor) -> Tensor:
        """What the claimed columns and rows read of some inputs, (tokens, in) -> (tokens, n).

        It is kept from forward to backward: in the inputs' own dtype where only columns are claimed, else in fp32.
        """
        parts = [x.index_select(1, channels) for channels in self._channels]
        parts += [x.float() @ projection.t() for projection in self._projections]
        return torch.cat(parts, 1)

    def inner_products(self, read: Tensor, weights: Tensor | None = None) -> Tensor:
        """Of the shifts by each two updates, summed over tokens, (tasks, tasks) fp32.

        Args:
            read: (tokens, n).
            weights: (tokens,), 1 if None.
        """
        read = read.float()
        moments = read.t() @ (read if weights is None else read * weights[:, None])  # (n, n)
        return self._owned.t() @ (moments * self._products) @ self._owned


def observe(model: Any, watches: Mapping[str, Watch], examples: Sequence[Example]) -> dict[str, Figures]:
    """Inner products of the shifts by all updates on some rows: one pass forward and back through the base alone.

    Args:
        model: a transformers model in eval mode with frozen weights, in which no adapter is active. Its attention is
            what it was afterwards.
        watches: module -> those of its layer.

    Returns:
        {module: (2, tasks, tasks) fp64}, means over the tokens, which weigh the same; and over the rows, of sums over
        their tokens weighted by |g|^2 / out_features.
    """
    packing = use_packed_attention(model)
    try:
        # Padding would count as tokens: where examples cannot be packed, they go through one at a time.
        found = list(batches(model, examples, BATCH_TOKENS if packs(model) else 1))
        sums = {name: watch.nothing() for name, watch in watches.items()}
        with _watched(model, watches, sums), torch.enable_grad():
            for batch in found:
                opening_loss(model(**batch.inputs), batch).backward()
    finally:
        if packing:
            model.set_attn_implementation("sdpa")
    counts = np.array([sum(len(example.input_ids) for example in examples), len(examples)])[:, None, None]
    return {name: total.double().cpu().numpy() / counts for name, total in sums.items()}


@contextmanager
def _watched(model: Any, watches: Mapping[str, Watch], sums: dict[str, Tensor]) -> Iterator[None]:
    """Have each forward and backward of a model add to `sums` what the updates of its layers would do."""

    def watch(name: str) -> Any:
        watching = watches[name]

        def forward(layer: SboraLayer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            read = watching.read(inputs[0].detach().reshape(-1, layer.in_features))
            sums[name][0] += watching.inner_products(read)

            def backward(gradient: Tensor) -> None:
                loudness = gradient.reshape(-1, layer.out_features).float().square().mean(1)  # (tokens,)
                sums[name][1] += watching.inner_products(read, loudness)

            output.register_hook(backward)

        return watching.layer.register_forward_hook(forward)

    def differentiate(layer: Any, inputs: Any, output: Tensor) -> None:
        output.requires_grad_(True)  # all weights are frozen

    hooks = [watch(name) for name in watches]
    hooks.append(model.get_input_embeddings().register_forward_hook(differentiate))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
