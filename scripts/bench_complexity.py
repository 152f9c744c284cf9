"""The paper's Tables 1 and 2, measured: what SBoRA and LoRA store, train, keep and multiply, beside the formulas.

    python scripts/bench_complexity.py [--shape S] [--rank N] [--tokens N]

Nothing is timed, and every figure is exact. Counted are, of one adapted linear layer and of a whole random Llama:

- stored: elements of what `get_peft_model_state_dict` saves, the indices among them (Table 1, "Total Params");
- trainable: elements of the parameters that require a gradient (Table 1, "Trainable Params");
- gradient: elements of their gradients after a backward (Table 1, "Gradient Memory");
- kept: elements that autograd saves between forward and backward of T tokens, weights and indices aside, by torch's
  saved_tensors_hooks; of the layer alone, since in a model its neighbours keep some of the same;
- forward, backward: multiplications a token beyond the frozen model's, by torch's FlopCounterMode, which counts two
  operations a multiplication of a matrix product (Table 2 has the forward).

In the formulas a weight is (out x in). The paper's Table 1 calls these d and k, its Table 2 k and d; where its "Total
Params" of SBoRA-FA reads r + k x r, the trained matrix and the r indices come to r + d x r, which is what is measured.

Exit code 1 if a figure is not what its formula says.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from figures import Result, add_output_options, finish
from methods import SHAPES, TARGETS, Shape, adapt
from peft import get_peft_model_state_dict
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

METHODS = ("lora", "fa gather", "fa", "fb gather", "fb")
FIGURES = ("stored", "trainable", "gradient", "kept", "forward", "backward")
Formula = tuple[str, Callable[[int, int, int, int], int]]


def _formulas(
    width: str, plain: Callable[[int, int], int], kept: Formula, times: tuple[int, int]
) -> dict[str, Formula]:
    """Of SBoRA, which trains (width x r); `times` of that are multiplied forward and backward."""

    def multiple(number: int) -> Formula:
        name = f"{number} {width} r" if number > 1 else f"{width} r" if number else "0"
        return name, lambda o, i, r, t: number * plain(o, i) * r

    return {
        "stored": (f"{width} r + r", lambda o, i, r, t: plain(o, i) * r + r),
        "trainable": multiple(1),
        "gradient": multiple(1),
        "kept": kept,
        "forward": multiple(times[0]),
        "backward": multiple(times[1]),
    }


# Of one matrix and T tokens, by (out, in, r, T). Multiplications are those of a token.
FORMULAS: dict[str, dict[str, Formula]] = {
    "lora": {
        **dict.fromkeys(FIGURES[:3], ("(out + in) r", lambda o, i, r, t: (o + i) * r)),
        "kept": ("T (in + r)", lambda o, i, r, t: t * (i + r)),
        "forward": ("(out + in) r", lambda o, i, r, t: (o + i) * r),
        "backward": ("2 (out + in) r", lambda o, i, r, t: 2 * (o + i) * r),
    },
    "fa gather": _formulas("out", lambda o, i: o, ("T r + out r", lambda o, i, r, t: t * r + o * r), (1, 2)),
    "fa": _formulas("out", lambda o, i: o, ("T r", lambda o, i, r, t: t * r), (0, 1)),
    "fb gather": _formulas("in", lambda o, i: i, ("T in + in r", lambda o, i, r, t: t * i + i * r), (1, 2)),
    "fb": _formulas("in", lambda o, i: i, ("T in", lambda o, i, r, t: t * i), (0, 1)),
}


@dataclass(frozen=True)
class Counts:
    """All of one method; multiplications and kept elements of all tokens together."""

    stored: int
    trainable: int
    gradient: int
    kept: int
    forward: int
    backward: int


class OneLayer(nn.Module):
    """A linear layer where PEFT finds it."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)  # type: ignore[no-any-return]


def multiplications(run: Callable[[], Any]) -> tuple[int, Any]:
    """Multiplications in the matrix products of `run`, and what it returns."""
    with FlopCounterMode(display=False) as counter:
        value = run()
    return counter.get_total_flops() // 2, value


def count(model: Any, forward: Callable[[], Tensor], inputs: Sequence[Tensor] = ()) -> Counts:
    """Everything that one forward and backward of `model` needs; `inputs` are not counted twice in what it keeps."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[tuple[int, int, tuple[int, ...]], int] = {}

    def keep(tensor: Tensor) -> Tensor:
        at = tensor.untyped_storage().data_ptr()
        if at not in weights and tensor.is_floating_point():
            kept[at, tensor.storage_offset(), tuple(tensor.shape)] = tensor.numel()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        ahead, loss = multiplications(forward)
    back, _ = multiplications(loss.backward)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stored = get_peft_model_state_dict(model) if hasattr(model, "peft_config") else {}
    return Counts(
        stored=sum(tensor.numel() for tensor in stored.values()),
        trainable=sum(parameter.numel() for parameter in trained),
        gradient=sum(parameter.grad.numel() for parameter in trained if parameter.grad is not None),
        kept=sum(kept.values()),
        forward=ahead,
        backward=back,
    )


def count_layer(method: str, out_features: int, in_features: int, rank: int, tokens: int) -> Counts:
    """Of one layer on random input that requires a gradient, as it does inside a model; the loss is its plain sum."""
    torch.manual_seed(0)
    model: Any = OneLayer(out_features, in_features).requires_grad_(False)
    if method != "frozen":
        model = adapt(model, method, rank, ["linear"])
    # Not a leaf: autograd saves leaves and results in different ways.
    x = torch.randn(tokens, in_features, requires_grad=True) * 1.0
    return count(model, lambda: model(x).sum())


def count_model(method: str, shape: Shape, rank: int, tokens: int) -> Counts:
    """Of a random Llama in fp32, whose input embeddings require a gradient, so that it runs through every layer."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(shape.config()).requires_grad_(False).train()
    base.config.use_cache = False
    base.enable_input_require_grads()
    model = base if method == "frozen" else adapt(base, method, rank)
    ids = torch.randint(0, shape.vocabulary, (1, tokens))
    return count(model, lambda: model(input_ids=ids, labels=ids).loss)


def beyond(found: Counts, frozen: Counts, tokens: int) -> dict[str, int]:
    """The figures of a method. Raises ValueError where a figure a token is no whole number."""
    more = {key: getattr(found, key) - getattr(frozen, key) for key in FIGURES}
    if any(more[key] % tokens for key in ("forward", "backward")):
        raise ValueError(f"{more}: multiplications are not the same for each of {tokens} tokens")
    return more | {key: more[key] // tokens for key in ("forward", "backward")}


def expected(method: str, shapes: Sequence[tuple[int, int]], rank: int, tokens: int) -> dict[str, int]:
    """The same by the formulas, over matrices of (out, in)."""
    return {key: sum(FORMULAS[method][key][1](*shape, rank, tokens) for shape in shapes) for key in FIGURES}


def adapted_shapes(shape: Shape) -> list[tuple[int, int]]:
    with torch.device("meta"):
        model = LlamaForCausalLM(shape.config())
    found = [(name.rpartition(".")[2], module) for name, module in model.named_modules()]
    return [(module.out_features, module.in_features) for name, module in found if name in TARGETS]


def result(
    name: str, setting: str, found: dict[str, dict[str, int]], wanted: dict[str, dict[str, int]], shown: Sequence[str]
) -> tuple[Result, list[str]]:
    """The table, and a line for each figure that is not what its formula says."""
    rows, wrong = [], []
    for method, figures in found.items():
        cells = []
        for key in shown:
            formula, is_right = FORMULAS[method][key][0], figures[key] == wanted[method][key]
            cells.append(
                f"{figures[key]:,} ({formula})" if is_right else f"{figures[key]:,} NOT {wanted[method][key]:,}"
            )
            if not is_right:
                wrong.append(f"{name}, {method}, {key}: {figures[key]:,}, by the formula {wanted[method][key]:,}")
        rows.append([method, *cells])
    return Result(name, "", setting, ["method", *shown], rows), wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2-12", help="(default: smollm2-12)")
    parser.add_argument("--layers", type=int, help="of the shape, in place of its own number")
    parser.add_argument("--rank", type=int, default=32, help="(default: 32)")
    parser.add_argument("--tokens", type=int, default=64, help="(default: 64)")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    shape = SHAPES[options.shape]
    shape = dataclasses.replace(shape, layers=options.layers or shape.layers)
    rank, tokens = options.rank, options.tokens

    one = (shape.intermediate, shape.hidden)  # up_proj, the least square of the five
    frozen = count_layer("frozen", *one, rank, tokens)
    layer = {m: beyond(count_layer(m, *one, rank, tokens), frozen, tokens) for m in METHODS}
    whole = count_model("frozen", shape, rank, tokens)
    model = {m: beyond(count_model(m, shape, rank, tokens), whole, tokens) for m in METHODS}
    shapes = adapted_shapes(shape)
    heading = f"rank {rank}, T = {tokens} tokens; measured (formula); multiplications a token, beyond the frozen"
    first, wrong = result(
        "complexity-layer",
        f"One layer, out = {one[0]}, in = {one[1]}; {heading} layer's {one[0] * one[1]:,}",
        layer,
        {method: expected(method, [one], rank, tokens) for method in METHODS},
        FIGURES,
    )
    sizes = f"{shape.layers} layers, {shape.hidden} wide"
    second, more = result(
        "complexity-model",
        f"A Llama of {sizes}, sums over its {len(shapes)} adapted matrices; {heading} "
        f"model's {whole.forward // tokens:,} forward and {whole.backward // tokens:,} backward",
        model,
        {method: expected(method, shapes, rank, tokens) for method in METHODS},
        [key for key in FIGURES if key != "kept"],
    )
    code = finish([first, second], options)
    print(f"\nagainst the formulas: {'; '.join(wrong + more) or 'every figure equal'}")
    return 1 if wrong or more else code


if __name__ == "__main__":
    sys.exit(main())
