"""A running model whose lambdas can be set anywhere: the losses of rows in it, and their slopes by each lambda."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import use_packed_attention
from .dataset import Example
from .errors import TrainingError
from .probe import Batch, batches
from .region import own_axis
from .trainer import answer_loss
from .tuner.layer import Mix, SboraLayer
from .tuner.slopes import lambda_slopes

Array = npt.NDArray[np.float64]
Spreads = Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]  # module -> task -> task -> values, see `correct.spread`


class Blend:
    """The adapters of some tasks on one base, of which a lambda for each task and matrix, or for each task and channel
    that it owns there, says how much is in it.

    The model is this object's to change: what was active in it does not come back.
    """

    def __init__(
        self,
        model: Any,
        modules: Sequence[str],
        spreads: Spreads | None = None,
        tasks: Sequence[str] = (),
        width: int = 1,
    ) -> None:
        """
        Args:
            model: of `load_model`, with an adapter a task; the tasks go by the order in which they were loaded.
            modules: names of the matrices, in the order of the places of `lambdas`.
            spreads: what each lambda does to the values, by the names of tasks: of a corrected merge, to those of all,
                and by channel to the task's own. All tasks together are composed by these, which stay on the model's
                device, of a corrected merge as many times the size of all adapters as there are tasks; one alone is as
                it was trained.
            tasks: their names, in the order in which they were loaded, where there are spreads.
            width: lambdas of a task in a matrix; above 1 they are of its channels, see `lambdas.Space`.
        """
        self.model = model.get_base_model()
        self.adapters, self.width = list(model.peft_config), width
        layers = dict(model.base_model.named_layers())
        self.layers = {module: layers[module] for module in modules}
        self._inside: tuple[Array, list[str], bool] | None = None
        self._trained: dict[str, dict[str, tuple[Tensor, float]]] = {}
        self._spreads: dict[str, dict[str, dict[str, Tensor]]] = {}
        names = dict(zip(tasks, self.adapters, strict=True)) if spreads else {}
        for module, spread in (spreads or {}).items():
            layer = self.layers[module]
            self._spreads[module] = {
                names[task]: {
                    names[other]: torch.from_numpy(values).to(layer.sbora_values[names[other]].device)
                    for other, values in reach.items()
                }
                for task, reach in spread.items()
            }
            self._trained[module] = {
                adapter: (values.detach().clone(), layer.scaling[adapter])
                for adapter, values in layer.sbora_values.items()
            }
        use_packed_attention(self.model)
        self.model.enable_input_require_grads()

    def batches(self, examples: Sequence[Example], tokens: int) -> list[Batch]:
        """Examples in batches of `tokens` tokens at most, see `probe.batches`."""
        return list(batches(self.model, examples, tokens))

    def compose(self, lambdas: Array, active: Iterable[int] | None = None) -> None:
        """Have these lambdas in the next forward.

        Args:
            lambdas: (tasks, places).
            active: numbers of tasks; None takes all.
        """
        together = active is None
        names = self.adapters if active is None else [self.adapters[task] for task in active]
        if self._inside and self._inside[1:] == (names, together) and np.array_equal(self._inside[0], lambdas):
            return
        for (module, layer), column in zip(self.layers.items(), self._by_matrix(lambdas), strict=True):
            if self._spreads:
                weights = self._put(module, layer, column, together)
            else:
                weights = dict(zip(self.adapters, column[:, 0].tolist(), strict=True))
            layer.mix = Mix(list(names), weights)
        self._inside = lambdas.copy(), names, together

    def _by_matrix(self, lambdas: Array) -> Array:
        """(tasks, places) as (matrices, tasks, width)."""
        found: Array = lambdas.reshape(len(lambdas), len(self.layers), self.width).transpose(1, 0, 2)
        return found

    @torch.no_grad()
    def _put(self, module: str, layer: SboraLayer, lambdas: Array, together: bool) -> dict[str, float]:
        """Put what the spreads say into a layer, or the trained values; the lambdas that go with them.

        Args:
            lambdas: (tasks, width).
        """
        weights = dict(zip(self.adapters, lambdas, strict=True))
        for adapter, (trained, scaling) in self._trained[module].items():
            values = layer.sbora_values[adapter]
            layer.scaling[adapter] = 1.0 if together else scaling
            if not together:
                values.copy_(trained)
                continue
            values.zero_()
            for task, reach in self._spreads[module].items():
                if adapter in reach:
                    values.add_(scaled(reach[adapter], weights[task], own_axis(layer.variant[adapter])))
        return {name: 1.0 if together else float(own[0]) for name, own in weights.items()}

    @torch.no_grad()
    def values(self, lambdas: Array) -> list[dict[str, np.ndarray]]:
        """What all tasks together have for values at these lambdas, where there are spreads: of each task, in the order
        of `lambdas`, by matrix; fp32, at a scaling of 1."""
        self.compose(lambdas)
        return [
            {
                module: layer.sbora_values[adapter].detach().cpu().numpy().copy()
                for module, layer in self.layers.items()
                if adapter in layer.sbora_values
            }
            for adapter in self.adapters
        ]

    @torch.no_grad()
    def nats(self, rows: Sequence[Batch]) -> Array:
        """The loss of each batch, (batches,): the sum over its answer tokens."""
        return np.array([float(self._loss(batch)) for batch in rows])

    @torch.no_grad()
    def told(self, batch: Batch, task: int) -> Tensor:
        """What a task's own adapter says at each answer token of a batch, alone and at lambda 1: log-probabilities,
        (tokens, vocabulary), fp32. That is composed then."""
        self.compose(np.ones((len(self.adapters), len(self.layers) * self.width)), [task])
        return F.log_softmax(_answered(self.model(**batch.inputs), batch), -1)

    @torch.no_grad()
    def apart(self, batch: Batch, target: Tensor) -> float:
        """How far what is composed is from `target`, of `told`: Kullback-Leibler divergence, nats, summed."""
        return float(self._loss(batch, target))

    def slopes(self, batch: Batch, target: Tensor | None = None) -> tuple[float, Array]:
        """The loss of a batch, and its derivative by each lambda, (tasks, places); 0 where a task has no such place.

        Args:
            target: where the loss is not that of the answers, but how far what is composed is `apart` from this.

        Raises:
            TrainingError: the model cannot be differentiated, or not in finite numbers.
        """
        try:
            with torch.enable_grad(), lambda_slopes(self.layers, self._spreads, self.width > 1) as found:
                loss = self._loss(batch, target)
                loss.backward()
        except (RuntimeError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:200]
            raise TrainingError(f"this model gives no gradient ({reason}): tune by --method search") from None
        parts = [
            (self.adapters.index(adapter), place, slope.reshape(-1))
            for place, module in enumerate(self.layers)
            for adapter, slope in found.get(module, {}).items()
        ]
        slopes = np.zeros((len(self.adapters), len(self.layers), self.width))
        if parts:
            lengths = [len(slope) for _, _, slope in parts]
            values = torch.cat([slope for _, _, slope in parts]).double().cpu().numpy()  # at once, from a GPU too
            for (task, place, _), own in zip(parts, np.split(values, np.cumsum(lengths)[:-1]), strict=True):
                slopes[task, place, : len(own)] = own
        if not parts or not np.isfinite(slopes).all() or not torch.isfinite(loss):
            what = "is not finite" if parts else "does not reach its layers"
            raise TrainingError(f"the gradient of this model {what}: tune by --method search")
        return float(loss.detach()), slopes.reshape(len(self.adapters), -1)

    def _loss(self, batch: Batch, target: Tensor | None = None) -> Tensor:
        outputs = self.model(**batch.inputs)
        if target is None:
            return answer_loss(outputs, batch.labels, num_items_in_batch=1)
        found = F.log_softmax(_answered(outputs, batch), -1)
        return F.kl_div(found, target, reduction="sum", log_target=True)


def _answered(outputs: Any, batch: Batch) -> Tensor:
    """The logits that answer tokens are predicted from, (tokens, vocabulary), fp32."""
    kept: Tensor = outputs.logits.flatten(0, -2)[batch.places.reshape(-1) > 0]
    return kept.float()


def scaled(values: Tensor, lambdas: Array, axis: int) -> Tensor:
    """A task's values in fp32, with a lambda for each of its channels in them, or one for all.

    Args:
        lambdas: one, or at least as many as there are channels.
        axis: of the values, along which its channels lie.
    """
    own = torch.from_numpy(lambdas[: values.shape[axis]].astype(np.float32)).to(values.device)
    return values * own.unsqueeze(1 - axis)


@dataclass(slots=True)
class Half:
    """Rows of every task, and what its losses on them are without the others and at the start.

    Attributes:
        batches: task -> its rows.
        base, own, start: task -> nats of each of its batches: of the base model, with the task's own adapter alone at
            lambda 1, and of the composition that tuning starts from.
        apart: task -> how far that composition is from the own adapter on each of its batches, see `Blend.apart`, where
            own adapters are followed; else none.
        scale: (tasks,) nats a token that are one lost share; the gain, where nobody says something else.
    """

    batches: list[list[Batch]]
    base: list[Array]
    own: list[Array]
    start: list[Array]
    apart: list[Array] = field(default_factory=list)
    scale: Array = field(default_factory=lambda: np.zeros(0))

    @classmethod
    def measured(
        cls, blend: Blend, examples: Sequence[Sequence[Example]], start: Array, tokens: int, follow_own: bool = False
    ) -> Half:
        """
        Args:
            examples: of each task.
            start: lambdas, (tasks, places).
            tokens: of a batch, at most.
            follow_own: own adapters are followed here, and not the answers.
        """
        rows = [blend.batches(each, tokens) for each in examples]
        blend.compose(start, [])
        base = [blend.nats(each) for each in rows]
        own = []
        for task, each in enumerate(rows):
            blend.compose(np.ones_like(start), [task])
            own.append(blend.nats(each))
        blend.compose(start)
        half = cls(rows, base, own, [blend.nats(each) for each in rows])
        if follow_own:
            half.apart = [np.zeros(len(each)) for each in rows]
            for task, each in enumerate(rows):
                for turn, batch in enumerate(each):
                    target = blend.told(batch, task)
                    blend.compose(start)
                    half.apart[task][turn] = blend.apart(batch, target)
        half.scale = half.gain
        return half

    @property
    def gain(self) -> Array:
        """What each task's own adapter gains, (tasks,), nats a token."""
        return self.nll(self.base) - self.nll(self.own)

    def nll(self, nats: Sequence[Array]) -> Array:
        """Nats a token of each task, (tasks,)."""
        tokens = [sum(batch.tokens for batch in rows) for rows in self.batches]
        return np.array([each.sum() / count for each, count in zip(nats, tokens, strict=True)])

    def lost(self, nats: Sequence[Array]) -> Array:
        """The share of its gain that each task has lost, (tasks,)."""
        return (self.nll(nats) - self.nll(self.own)) / self.scale
