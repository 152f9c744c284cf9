"""What the training benchmarks compare: models, the methods that train them, and one step."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from multisbora import SboraConfig
from multisbora.penalty import LivePenalty, Penalty

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
SBORA = ["fa", "fa isolated", "fa gather", "fb", "fb isolated", "fb gather"]
METHODS = ["frozen", *SBORA, "lora", "lora 16 bit", "lora A frozen", "dora", "shira"]
IN_PLACE = ("fa", "fb", "fa isolated", "fb isolated")
ISOLATED = {"fa isolated": "fa", "fb isolated": "fb"}


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama. `tied`: the head is the embedding."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int
    tied: bool

    def narrowed(self, hidden: int) -> Shape:
        """The same proportions and vocabulary at another width."""
        return dataclasses.replace(self, hidden=hidden, intermediate=self.intermediate * hidden // self.hidden)

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            num_hidden_layers=self.layers,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            max_position_embeddings=8192,
        )

    def weight_bytes(self, bits: float) -> float:
        """Of a model with `bits` a weight in its layers and 16 in its embeddings."""
        attention = 2 * self.hidden**2 * (1 + self.kv_heads / self.heads)
        layer = attention + 3 * self.hidden * self.intermediate
        return self.layers * layer * bits / 8 + self.vocabulary * self.hidden * 2 * (1 if self.tied else 2)


SHAPES = {
    "smollm2-12": Shape(576, 1536, 9, 3, 12, 49152, True),
    "smollm2-135m": Shape(576, 1536, 9, 3, 30, 49152, True),
    "llama-3-8b": Shape(4096, 14336, 32, 8, 32, 128256, False),
}


@dataclass(frozen=True)
class Case:
    """What a step works on. Exactly one of `shape` and `model`, a folder, is given."""

    dtype: str
    device: str
    rank: int
    batch: int
    tokens: int
    logits_to_keep: int
    nf4: bool
    shape: Shape | None = None
    model: str | None = None

    def __str__(self) -> str:
        if self.shape is not None:
            what = f"Llama, {self.shape.layers} layers, {self.shape.hidden} wide, random weights"
        else:
            what = Path(self.model or "").name.rpartition("--")[2]
        kept = f"logits at the last {self.logits_to_keep} positions" if self.logits_to_keep else "all logits"
        weights = f"NF4, computed in {self.dtype}" if self.nf4 else self.dtype
        name = torch.cuda.get_device_name() if self.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
        return f"{what}; {weights}; rank {self.rank}; {self.batch} x {self.tokens} tokens, {kept}; {name}"


def load(case: Case) -> Any:
    """The base model of a case: frozen, in training mode."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    if case.shape is None:
        model = AutoModelForCausalLM.from_pretrained(case.model, dtype=dtype).to(case.device)
    else:
        with torch.device(case.device):
            model = AutoModelForCausalLM.from_config(case.shape.config(), dtype=dtype)
    if case.nf4:
        quantise(model, dtype)
    model.config.use_cache = False
    return model.requires_grad_(False).train()


def quantise(model: Any, dtype: torch.dtype) -> None:
    """Every linear layer but the head to NF4 with double quantisation, where it stands."""
    import bitsandbytes

    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        linear = bitsandbytes.nn.Linear4bit(
            module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
        device = module.weight.device
        # Quantised when it comes from the CPU to its device; a weight that is on the GPU already would stay as it is.
        linear.weight = bitsandbytes.nn.Params4bit(module.weight.data.cpu(), requires_grad=False, quant_type="nf4")
        linear.to(device)
        linear.support_avx512bf16_for_cpu = False  # it would repack the weights, and gradients would be wrong
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    model.is_loaded_in_4bit = True


def twin(base: Any, method: str) -> Any:
    """A model with the base's weights: its own copy of them where the method writes into them, else the very same."""
    shared = {} if method in IN_PLACE else {id(parameter): parameter for parameter in base.parameters()}
    return copy.deepcopy(base, shared)


def adapt(base: Any, method: str, rank: int, targets: Sequence[str] = TARGETS) -> Any:
    """The model that a method trains, made of `base`. Same rank, same targets, same scaling for all."""
    common: dict[str, Any] = {"r": rank, "target_modules": list(targets)}
    if method == "frozen":
        base.enable_input_require_grads()
        return base
    if method in SBORA:
        model = peft.get_peft_model(base, SboraConfig(variant=method[:2], alpha=2 * rank, **common))
        model.base_model.set_form("in_place" if method in IN_PLACE else "gather")
        return model
    if method == "shira":
        return peft.get_peft_model(base, peft.ShiraConfig(random_seed=0, **common))
    lora = peft.LoraConfig(lora_alpha=2 * rank, use_dora=method == "dora", **common)
    model = peft.get_peft_model(base, lora, autocast_adapter_dtype=method != "lora 16 bit")
    if method == "lora A frozen":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "lora_A" not in name)
    return model


def make_penalty(model: Any) -> LivePenalty:
    """The penalty of isolated training, with blocks of random numbers: what they are costs no time."""
    generator = torch.Generator().manual_seed(0)
    blocks = {}
    for name, layer in model.base_model.named_layers():
        fa = layer.variant["default"] == "fa"
        size = layer.sbora_indices["default"].numel() if fa else layer.in_features
        square = torch.rand((size, size), generator=generator)
        blocks[name] = (square + square.t()).numpy()
    return LivePenalty(model, Penalty("", (), blocks), strength=1e-6)


def make_step(model: Any, case: Case, method: str = "") -> Callable[[], None]:
    """A function that makes one step, as the head of bench_train.py defines it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (case.batch, case.tokens), generator=generator).to(case.device)
    labels = ids[:, -case.logits_to_keep :]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None
    penalty = make_penalty(model) if method in ISOLATED else None

    def step() -> None:
        model(input_ids=ids, labels=labels, logits_to_keep=case.logits_to_keep).loss.backward()
        if penalty is not None:
            penalty.add_gradient()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def writes_in_place(model: Any, base: Any) -> bool:
    """Whether the weights that a model trained on hold other values than the base's."""
    trained = model.get_base_model()

    def now(name: str) -> torch.Tensor:
        path, _, own = name.rpartition(".")
        module = trained.get_submodule(path)
        # Not by parameters(), which gives the base's values back before it hands weights out.
        weight: torch.Tensor = getattr(getattr(module, "base_layer", module), own)
        return weight

    return any(not torch.equal(now(name), weight) for name, weight in base.named_parameters())


def fitted(shape: Shape, nf4: bool, copies: int, tokens: int) -> Shape:
    """The shape with as many of its layers as the GPU's free memory holds, in `copies` of the weights."""
    free = torch.cuda.mem_get_info()[0]
    while shape.layers > 1:
        smaller = dataclasses.replace(shape, layers=shape.layers - 1)
        # Kept activations, some twenty numbers a channel, and logits, three times in fp32.
        kept = tokens * (shape.layers * (16 * shape.hidden + 5 * shape.intermediate) * 2 + 12 * shape.vocabulary)
        # Weights are made in 16 bits before they are quantised.
        weights = max(shape.weight_bytes(16), copies * shape.weight_bytes(4.5 if nf4 else 16))
        if weights + kept < 0.8 * free:
            break
        shape = smaller
    return shape
