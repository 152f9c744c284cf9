"""Isolated training: what a task's update does on the rows of other tasks, as a penalty beside the task's own loss.

With D = s B what the task adds to a matrix (out x in), and M_i the moments of another task's rows there, the penalty is

    strength / tokens * sum over tasks i, sum over matrices, of harm(D, M_i),   harm(D, M) = trace(D M D') / out

with harm in squared nats a row (`moments.harm`), and tokens the answer tokens that a row of the task itself has in the
mean: its loss is one of answer tokens, and so a row of others is weighed against a row of its own. An fa update reads r
input channels, so that the (r x r) block of these is all of M_i that counts; an fb update has r rows, and each of them
reads all input channels. Nobody needs anybody's rows, and since the blocks of all tasks come in as their sum M, the
gradient is one product a matrix,

    d penalty / d B = 2 strength / tokens s^2 B M / out

which is added to that of the loss when backward is done. The forward knows nothing of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from .errors import DataError, TrainingError, UsageError
from .geometry import Geometry, Names
from .moments import WIDEST, Floats, Moments
from .recipe import Recipe
from .region import Region
from .registry.claims import TaskClaims
from .sharding import add_up, local

# Moments of more bytes isolate no task unless they are asked to: those of fb tasks, which read all input channels, can
# take more memory than the model.
MOST_BYTES = 2**30
STRENGTH = 1000.0  # where a recipe does not say: see docs/composition.md
_HEAD = "multisbora_penalty"
_KEPT = ("task", "base_fingerprint", "geometry_digest", "rows", "tokens", "source")  # of other tasks' moments


@dataclass(frozen=True, slots=True)
class Penalty:
    """What the rows of other tasks send into the input channels that one task's update reads.

    Attributes:
        claim_digest: of the claims of that task.
        others: moments of the other tasks, without their sites.
        blocks: module, as the claims call it -> sum of the others' blocks, fp32 and symmetric: (r, r) at the claimed
            columns for fa, (in, in) for fb, with zeros where earlier claims own the cells.
    """

    claim_digest: str
    others: tuple[Moments, ...]
    blocks: Mapping[str, Floats] = field(repr=False)

    @classmethod
    def of(cls, claims: TaskClaims, others: Iterable[Moments]) -> Penalty:
        """The penalty that isolates a task from others.

        Args:
            others: their moments. They are taken one by one, so that a generator keeps one task's in memory at a time.

        Raises:
            UsageError: there are none, or the task's own are among them.
            DataError: they are of another geometry, or lack a matrix or channels of the claims.
        """
        found = cls.gather(claims, others, on_lacking=None)
        if found is None:
            raise UsageError(
                f"task {claims.task} shares no composition with another task, so there is nobody to isolate it from: "
                "allocate the others first, or set training.isolate to 0"
            )
        return found

    @classmethod
    def gather(
        cls,
        claims: TaskClaims,
        others: Iterable[Moments],
        on_lacking: Callable[[str], object] | None,
        base_fingerprint: str | None = None,
    ) -> Penalty | None:
        """The same of those that there are; None where there are none.

        Args:
            on_lacking: told of moments that are of another model, or lack a matrix or channels of the claims, which are
                then passed over; None lets nothing be passed over.
            base_fingerprint: of the base that they have to be of; None takes any.

        Raises:
            UsageError, DataError: as `of`.
        """
        heads: list[Moments] = []
        blocks: dict[str, Floats] = {}
        for moments in others:
            if moments.task == claims.task:
                raise UsageError(f"the moments of task {claims.task} are its own: it is isolated from other tasks")
            try:
                if moments.geometry_digest != claims.geometry_digest:
                    raise DataError(
                        f"the moments of task {moments.task} are of another geometry than the claims of {claims.task}: "
                        f"run multisbora measure --tasks {moments.task} on this model"
                    )
                if base_fingerprint is not None:
                    moments.check_base(base_fingerprint)
                found = {module: _block(moments, module, region) for module, region in claims.regions.items()}
            except DataError as error:
                if on_lacking is None:
                    raise
                on_lacking(str(error))
                continue
            for module, block in found.items():
                if heads:
                    blocks[module] += block
                else:
                    blocks[module] = block.copy()
            heads.append(replace(moments, sites={}))
            del moments, found, block  # before the next one's are read
        if not heads:
            return None
        for module, region in claims.regions.items():
            block = blocks[module]
            if region.variant == "fb":  # there the values are zero and have to stay so
                block[list(region.excluded)] = 0
                block[:, list(region.excluded)] = 0
            blocks[module] = (block + block.T) / 2
        return cls(claims.digest, tuple(heads), blocks)

    def check(self, claims: TaskClaims, base_fingerprint: str) -> None:
        """Refuse other claims than those that it was made of, or another base than the moments are of.

        Raises:
            UsageError: the claims are others.
            DataError: the base is another.
        """
        if self.claim_digest != claims.digest:
            raise UsageError(f"the penalty is of other claims than those of task {claims.task}: make it of these")
        for moments in self.others:
            moments.check_base(base_fingerprint)

    def write(self, path: Path) -> None:
        """Keep it in a safetensors file, for a run that may be interrupted: moments may be measured anew meanwhile."""
        heads = [{key: getattr(moments, key) for key in _KEPT} for moments in self.others]
        head = {"claim_digest": self.claim_digest, "others": heads}
        try:
            save_file(
                {name: np.ascontiguousarray(b) for name, b in self.blocks.items()}, path, {_HEAD: json.dumps(head)}
            )
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"{path} cannot be written ({error}): free space on its disk") from None

    @classmethod
    def read(cls, path: Path) -> Penalty:
        """What `write` kept.

        Raises:
            TrainingError: the file is damaged.
        """
        if not path.is_file():
            raise TrainingError(f"{path} is not there: all machines of a run need to see the folder of its output")
        try:
            with safe_open(path, framework="np") as file:
                head = json.loads((file.metadata() or {})[_HEAD])
                blocks = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            others = tuple(Moments(**moments, sites={}) for moments in head["others"])
            return cls(head["claim_digest"], others, blocks)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError, DataError) as error:
            raise TrainingError(f"{path} is damaged ({error}): delete its folder to start anew") from None

    @property
    def tasks(self) -> list[str]:
        return [moments.task for moments in self.others]

    @property
    def digest(self) -> str:
        """sha256 (hex) of the blocks: all that training gets to know of the other tasks."""
        found = hashlib.sha256()
        for module, block in sorted(self.blocks.items()):
            found.update(json.dumps([module, block.shape]).encode())
            found.update(np.ascontiguousarray(block, "<f4").data)
        return found.hexdigest()


def block_bytes(claims: TaskClaims, geometry: Geometry) -> int:
    """What the blocks of one other task take at the channels that an update reads, fp32."""
    fa = claims.variant == "fa"
    sizes = (region.rank if fa else geometry.find(name).in_features for name, region in claims.regions.items())
    return sum(4 * size**2 for size in sizes)


def strength_of(recipe: Recipe, penalty: Penalty | None) -> float:
    """The strength of a run's penalty: where the recipe leaves it open, `STRENGTH` if there is a penalty, and else 0.

    Raises:
        UsageError: there is a strength without a penalty, or a penalty without a strength.
    """
    strength = recipe.training.isolate
    if strength is None:
        return STRENGTH if penalty is not None else 0.0
    if strength and penalty is None:
        raise UsageError(
            f"recipe {recipe.name}: training.isolate {strength:g} needs the moments of other tasks: make a penalty of "
            "them (Penalty.of) and give it to train(), as `multisbora train` does"
        )
    if penalty is not None and not strength:
        raise UsageError(f"recipe {recipe.name}: training.isolate is 0, and a penalty was given: set a strength")
    return strength


def _block(moments: Moments, module: str, region: Region) -> Floats:
    site = moments.sites.get(module)
    if region.variant == "fa" or site is None:
        return moments.block(module, region.indices)
    wanted = len(site.energy)
    if wanted > WIDEST:
        raise DataError(
            f"an fb update reads all {wanted} input channels of {module}, and no more than {WIDEST} are measured "
            "together: train with fa, leave that matrix out, or train with --isolate 0"
        )
    if len(site.channels) < wanted:
        raise DataError(
            f"the moments of task {moments.task} have the block of {len(site.channels)} of {wanted} input channels of "
            f"{module}, and an fb update reads all of them: run multisbora measure --tasks {moments.task}, or train "
            "with fa if that leaves so wide a matrix out"
        )
    return site.block


class LivePenalty:
    """The penalty of a model in training.

    On a bf16 base the (in x in) products of fb are bf16 too, as those are that the loss's gradient comes from: in fp32
    they would take several hundredths of a step. All else is fp32.

    Args:
        model: the PEFT model.
        penalty: of the claims that its active adapter was made of.
        strength: `Training.isolate` over the answer tokens of a row.
    """

    def __init__(self, model: Any, penalty: Penalty, strength: float) -> None:
        self._adapter: str = model.active_adapter
        self._pulls: list[tuple[Any, Tensor]] = []  # layer, and what the gradient is the product of its values with
        names = Names(penalty.blocks)
        for name, layer in model.base_model.named_layers():
            (module,) = names.find(name)
            factor = 2 * strength * layer.scaling[self._adapter] ** 2 / layer.out_features
            pull = torch.from_numpy(penalty.blocks[module]) * factor
            whole = layer.variant[self._adapter] == "fb" and layer.base_layer.weight.dtype == torch.bfloat16
            self._pulls.append((layer, pull.bfloat16() if whole else pull))

    @torch.no_grad()
    def add_gradient(self, scale: Tensor | None = None) -> None:
        """Add the penalty's gradient to the loss's: once a step, when its last backward is done and before clipping.

        Every process adds the whole of it to what it holds of the values, (out, r) or (r, in): a row needs no other.
        Gradients that are averaged over processes are so already.

        Args:
            scale: of the gradients, where losses were scaled; a number on their device.
        """
        for values, pull in self._pairs():
            if values.grad is None:  # an expert that no token of the step went through
                values.grad = torch.zeros_like(values)
            if scale is not None:
                pull = pull * scale
            here, gradient = local(values), local(values.grad)
            if pull.dtype == here.dtype:
                gradient.addmm_(here, pull)
            else:  # which is symmetric: the same product, in the order that is faster
                gradient.add_((pull @ here.t().to(pull.dtype)).t())

    @torch.no_grad()
    def value(self) -> float:
        """strength * the sum of harms, of the values as they are. Where values are sharded, all processes call it."""
        twice = []
        for values, pull in self._pairs():
            here = local(values)
            twice.append(torch.vdot((here @ pull.to(here.dtype)).flatten(), here.flatten()))
        return float(add_up(torch.stack(twice).sum(), values)) / 2

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Values and pulls, on one device. Values are looked up each time: sharding puts others in their place."""
        for number, (layer, pull) in enumerate(self._pulls):
            values = layer.sbora_values[self._adapter]
            if pull.device != (device := local(values).device):
                pull = pull.to(device)
                self._pulls[number] = layer, pull
            yield values, pull
