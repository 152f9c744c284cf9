"""A running model whose lambdas can be set anywhere: the losses of rows in it, and their slopes by each lambda."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .attention import use_packed_attention
from .dataset import Example
from .errors import TrainingError
from .probe import Batch, batches
from .trainer import answer_loss
from .tuner.layer import Mix, SboraLayer
from .tuner.slopes import lambda_slopes

Array = npt.NDArray[np.float64]
Spreads = Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]  # module -> task -> task -> values, see `correct.spread`


class Blend:
    """The adapters of some tasks on one base, of which a lambda for each task and matrix says how much is in it.

    The model is this object's to change: what was active in it does not come back.
    """

    def __init__(
        self, model: Any, modules: Sequence[str], spreads: Spreads | None = None, tasks: Sequence[str] = ()
    ) -> None:
        """
        Args:
            model: of `load_model`, with an adapter a task; the tasks go by the order in which they were loaded.
            modules: names of the matrices, in the order of the columns of `lambdas`.
            spreads: of a corrected merge, by the names of tasks. All tasks together are composed by these, which stay
                on the model's device, as many times the size of all adapters as there are tasks; one alone is as it was
                trained.
            tasks: their names, in the order in which they were loaded, where there are spreads.
        """
        self.model = model.get_base_model()
        self.adapters = list(model.peft_config)
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
            lambdas: (tasks, matrices).
            active: numbers of tasks; None takes all.
        """
        together = active is None
        names = self.adapters if active is None else [self.adapters[task] for task in active]
        if self._inside and self._inside[1:] == (names, together) and np.array_equal(self._inside[0], lambdas):
            return
        for (module, layer), column in zip(self.layers.items(), lambdas.T.tolist(), strict=True):
            weights = dict(zip(self.adapters, column, strict=True))
            if self._spreads:
                weights = self._put(module, layer, weights, together)
            layer.mix = Mix(list(names), weights)
        self._inside = lambdas.copy(), names, together

    @torch.no_grad()
    def _put(self, module: str, layer: SboraLayer, weights: dict[str, float], together: bool) -> dict[str, float]:
        """Put the values of a corrected merge into a layer, or the trained ones; the lambdas that go with them."""
        for adapter, (trained, scaling) in self._trained[module].items():
            values = layer.sbora_values[adapter]
            layer.scaling[adapter] = 1.0 if together else scaling
            if not together:
                values.copy_(trained)
                continue
            values.zero_()
            for task, reach in self._spreads[module].items():
                if adapter in reach:
                    values.add_(reach[adapter], alpha=weights[task])
        return dict.fromkeys(weights, 1.0) if together else weights

    @torch.no_grad()
    def nats(self, rows: Sequence[Batch]) -> Array:
        """The loss of each batch, (batches,): the sum over its answer tokens."""
        return np.array([float(self._loss(batch)) for batch in rows])

    def slopes(self, batch: Batch) -> tuple[float, Array]:
        """The loss of a batch, and its derivative by each lambda, (tasks, matrices); 0 where a task has no such matrix.

        Raises:
            TrainingError: the model cannot be differentiated, or not in finite numbers.
        """
        try:
            with torch.enable_grad(), lambda_slopes(self.layers, self._spreads) as found:
                loss = self._loss(batch)
                loss.backward()
        except (RuntimeError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:200]
            raise TrainingError(f"this model gives no gradient ({reason}): tune by --method search") from None
        places = [
            (self.adapters.index(adapter), column)
            for column, module in enumerate(self.layers)
            for adapter in found.get(module, {})
        ]
        slopes = np.zeros((len(self.adapters), len(self.layers)))
        if places:
            values = torch.stack([slope for module in self.layers for slope in found.get(module, {}).values()])
            slopes[tuple(np.array(places).T)] = values.double().cpu().numpy()
        if not places or not np.isfinite(slopes).all() or not torch.isfinite(loss):
            what = "is not finite" if places else "does not reach its layers"
            raise TrainingError(f"the gradient of this model {what}: tune by --method search")
        return float(loss.detach()), slopes

    def _loss(self, batch: Batch) -> Tensor:
        return answer_loss(self.model(**batch.inputs), batch.labels, num_items_in_batch=1)


@dataclass(slots=True)
class Half:
    """Rows of every task, and what its losses on them are without the others and at the start.

    Attributes:
        batches: task -> its rows.
        base, own, start: task -> nats of each of its batches: of the base model, with the task's own adapter alone at
            lambda 1, and of the composition that tuning starts from.
        scale: (tasks,) nats a token that are one lost share; the gain, where nobody says something else.
    """

    batches: list[list[Batch]]
    base: list[Array]
    own: list[Array]
    start: list[Array]
    scale: Array = field(default_factory=lambda: np.zeros(0))

    @classmethod
    def measured(cls, blend: Blend, examples: Sequence[Sequence[Example]], start: Array, tokens: int) -> Half:
        """
        Args:
            examples: of each task.
            start: lambdas, (tasks, matrices).
            tokens: of a batch, at most.
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
