"""The peak memory of training one task, before anything runs: the real training step on tensors without memory.

Importing this module loads no torch; `find_config` and `predict_peak` do.
"""

from __future__ import annotations

import contextlib
import copy
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import GeometryError, UsageError
from .geometry import Geometry
from .plan import Method, Plan

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

_STEPS = 2  # the optimizer's state is there from the second step on


@dataclass(frozen=True, slots=True)
class Peak:
    """Predicted memory of training steps, in bytes.

    `base`, `adapter`, `optimizer`, `activations` and `transient` add up to `peak`.

    Attributes:
        tokens: of the batch.
        base: weights and buffers of the frozen model.
        adapter: trained values and indices.
        gradients: of the values, when all are there. They come while the activations go, and are no part of the sum; a
            recipe with several micro-batches a step keeps them through the next forward pass, where they come on top.
        optimizer: the state of AdamW after a step.
        activations: what a forward pass leaves behind for backward.
        transient: what was alive besides all these at the highest point; nearly always it is the logits.
        peak: the highest sum of what was alive at once.
    """

    tokens: int
    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    transient: int
    peak: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def find_config(model: str) -> PretrainedConfig:
    """The config of a base model: a folder's, that of the copy on this machine, its card's, or the hub's.

    Args:
        model: a folder, a hub id, or the name of a geometry card.

    Raises:
        GeometryError: it is unreadable, needs remote code, or the model's card has none.
        CheckpointError: the hub does not give it.
    """
    from transformers import AutoConfig

    from .cards import read_card
    from .hub import cache_dir
    from .hub import find_config as fetch_config

    folder = Path(model).expanduser()
    converted = cache_dir() / model.replace("/", "--")
    if folder.is_dir() or converted.is_dir():
        return _read_config(folder if folder.is_dir() else converted)
    try:
        card = read_card(model)
    except UsageError:
        return _read_config(fetch_config(model))
    if not card.config:
        raise GeometryError(
            f"the card of {model} has no config, which the peak memory needs: give the model's folder in its place"
        )
    try:
        return AutoConfig.for_model(card.model_type, **card.config)
    except Exception as error:  # every architecture checks its config in code of its own
        raise GeometryError(f"the card of {model} has a config that cannot be used: {_first_line(error)}") from None


def predict_peak(
    config: PretrainedConfig | str | os.PathLike[str],
    plan: Plan,
    batch_size: int,
    length: int,
    *,
    answer: int | None = None,
    method: Method | None = None,
    dtype: torch.dtype | None = None,
    gradient_checkpointing: bool = False,
    dropout: float = 0.0,
) -> Peak:
    """The peak memory of training one task on a CPU, found by running the training step on tensors without memory.

    The model is built from its config, the adapter is put in by PEFT, and two steps run as `train` runs them: packed
    rows (padded ones where the model cannot take packed rows), logits at answer positions alone, AdamW. Every storage
    is counted from the operation that makes it until it dies.

    It is the peak on the base as stored, whose update is computed in place; that of a quantised base is another.

    Not in it: the interpreter and its libraries (about 0.5 GB), the workspace of kernels, and what the C library's
    allocator keeps of freed memory. An accelerator runs other kernels and leaves attention in the model's dtype.

    Args:
        config: a transformers config, a model folder, or the path of a config.json. No weights are read.
        plan: which matrices are adapted, and their ranks.
        batch_size: rows of a micro-batch.
        length: tokens of each row.
        answer: tokens of each row that are learned; None takes all but the first, which is the most there can be.
        method: None takes the plan's variant; "lora" is PEFT's LoRA of the same ranks.
        dtype: of the base model; None takes the config's, and bf16 where it names none.
        gradient_checkpointing, dropout: as in the recipe.

    Raises:
        UsageError: a batch that cannot be, or matrices of the plan that the live model does not have as linear layers.
        GeometryError: the config is missing, unreadable, needs remote code, or describes no decoder; or the model's
            own code looks at values, which tensors without memory do not have.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from .dataset import Example

    if batch_size < 1 or length < 2:
        raise UsageError(f"a batch of {batch_size} rows of {length} tokens cannot be: at least 1 row and 2 tokens")
    answer = length - 1 if answer is None else answer
    if not 1 <= answer < length:
        raise UsageError(f"{answer} answer tokens in a row of {length} cannot be: 1 to {length - 1}")
    model = _build(_read_config(config), plan, method or plan.variant, dtype, gradient_checkpointing, dropout)
    examples = [Example([0] * length, length - answer)] * batch_size
    try:
        with FakeTensorMode():
            return _follow(model, examples)
    except (RuntimeError, NotImplementedError) as error:  # the kinds that a FakeTensorMode raises
        raise GeometryError(
            f"{plan.model}: its training step depends on values, not on sizes alone, so its peak memory cannot be "
            f"predicted: {_first_line(error)}"
        ) from None


def _follow(model: Any, examples: list[Any]) -> Peak:
    """Two training steps; needs an active FakeTensorMode."""
    import torch

    with _live_bytes() as live:
        _materialise(model)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        indices = [buffer for name, buffer in model.named_buffers() if ".sbora_indices." in name]
        adapter = _bytes([*trainable, *indices])
        base = live.now - adapter
        optimizer = torch.optim.AdamW(trainable)
        activations = gradients = 0
        for _ in range(_STEPS):
            before = live.now
            loss = _loss(model, examples)
            activations = live.now - before
            loss.backward()
            gradients = _bytes([p.grad for p in trainable if p.grad is not None])
            del loss
            optimizer.step()
            optimizer.zero_grad()
        state = _bytes([value for kept in optimizer.state.values() for value in kept.values()])
    return Peak(
        tokens=sum(len(example.input_ids) for example in examples),
        base=base,
        adapter=adapter,
        gradients=gradients,
        optimizer=state,
        activations=activations,
        transient=live.peak - (base + adapter + state + activations),
        peak=live.peak,
    )


def _build(
    config: PretrainedConfig,
    plan: Plan,
    method: Method,
    dtype: torch.dtype | None,
    gradient_checkpointing: bool,
    dropout: float,
) -> Any:
    """The PEFT model on torch's meta device, in training mode, set up as `train` does it."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from .attention import use_packed_attention
    from .loading import quiet
    from .tuner import SboraConfig

    dtype = dtype or config.dtype or torch.bfloat16
    if dtype == torch.float16 and not torch.cuda.is_available():
        dtype = torch.float32  # as train does, for want of loss scaling on a CPU
    try:
        with quiet(), torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # every architecture builds itself in code of its own
        raise GeometryError(f"{config.model_type}: no decoder can be built from it: {_first_line(error)}") from None
    base.config.use_cache = False
    if gradient_checkpointing:
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        # The random state has no counterpart among tensors without memory, and no size that matters.
        enable({"use_reentrant": False, "preserve_rng_state": False})
    use_packed_attention(base)
    ranks = _live_ranks(base, plan)
    adapter: Any
    if method == "lora":
        adapter = peft.LoraConfig(
            task_type="CAUSAL_LM", target_modules=list(ranks), rank_pattern=ranks, lora_dropout=dropout
        )
    else:
        indices = {module: list(range(rank)) for module, rank in ranks.items()}
        adapter = SboraConfig(task_type="CAUSAL_LM", variant=method, indices=indices, dropout=dropout)
    with quiet():
        return peft.get_peft_model(base, adapter).train()


def _live_ranks(model: Any, plan: Plan) -> dict[str, int]:
    """Live module name -> rank; the plan has the names of the stored tensors, whose leading parts can differ."""
    ranks = {part.matrix.module: part.rank for part in plan.matrices}
    kinds = {part.matrix.kind for part in plan.matrices}
    geometry = Geometry(plan.model, model.config.model_type, tuple(part.matrix for part in plan.matrices))
    found = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in kinds and getattr(getattr(module, "weight", None), "ndim", 0) == 2:
            with contextlib.suppress(GeometryError):
                stored = geometry.find(name).module
                if stored in ranks:
                    found[name] = ranks.pop(stored)
    if ranks:
        raise UsageError(
            f"{plan.model}: {next(iter(ranks))} ({len(ranks)} such) is no linear layer of the live model, "
            "so its peak memory cannot be predicted: choose other target modules"
        )
    return found


def _materialise(model: Any) -> None:
    """Put CPU tensors in the places of the meta ones; under FakeTensorMode they have sizes and no memory.

    By hand, because torch's own conversions refuse to swap tensors that a FakeTensorMode has seen.
    """
    import torch

    made: dict[int, Any] = {}
    kept = []  # an id is of use only while its tensor lives
    for module in model.modules():
        for places in (module._parameters, module._buffers):
            for name, tensor in places.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:  # tied tensors stay one
                    kept.append(tensor)
                    fresh = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, torch.nn.Parameter):
                        fresh = torch.nn.Parameter(fresh, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = fresh
                places[name] = made[id(tensor)]


def _loss(model: Any, examples: list[Any]) -> torch.Tensor:
    from .dataset import pack, pad
    from .trainer import answer_loss

    try:
        batch: dict[str, Any] = pack(examples)
        labels = batch.pop("labels")
        return answer_loss(model(**batch), labels)
    except TypeError:  # a model without position_ids or logits_to_keep
        batch = dict(pad(examples, 0))
        labels = batch.pop("labels")
        return answer_loss(model(**batch), labels)


def _bytes(values: list[Any]) -> int:
    import torch

    return sum(value.untyped_storage().nbytes() for value in values if isinstance(value, torch.Tensor))


def _live_bytes() -> Any:
    """A dispatch mode that keeps count of the bytes alive: `now`, and `peak`, the most there ever was."""
    import weakref

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class LiveBytes(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.now = self.peak = 0
            self._seen: dict[int, weakref.ref[Any]] = {}

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self._see(leaf.untyped_storage())
            return result

        def _see(self, storage: Any) -> None:
            key, size = storage._cdata, storage.nbytes()
            if key in self._seen:
                return

            def forget(_: Any) -> None:
                del self._seen[key]
                self.now -= size

            self._seen[key] = weakref.ref(storage, forget)
            self.now += size
            self.peak = max(self.peak, self.now)

    return LiveBytes()


def _read_config(config: PretrainedConfig | str | os.PathLike[str]) -> PretrainedConfig:
    from transformers import AutoConfig, PretrainedConfig

    if isinstance(config, PretrainedConfig):
        return copy.deepcopy(config)  # building the model writes into it
    path = Path(config)
    folder = path.parent if path.name == "config.json" else path
    if not (folder / "config.json").is_file():
        raise GeometryError(f"{folder} has no config.json: give a model folder or the path of its config.json")
    try:
        return AutoConfig.from_pretrained(folder.resolve(), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # unreadable JSON, an unknown model_type, values that the architecture refuses
        raise GeometryError(f"{folder}: config.json is not usable: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
