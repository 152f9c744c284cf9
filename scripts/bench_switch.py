"""Switching tasks in a running model: SBoRA against PEFT's LoRA at the same rank, and what is left in the weights.

    python scripts/bench_switch.py [--shapes S ...] [--layers N] [--rank R] [--rounds N] [--switches N] ...

Every method has a model in this process, with the same base weights and two tasks on q, k, v, up and down. In each
round every method does each of these, in rotated order, every other round backwards:

    switch   one task is in the weights: the other for it, and back; half of the time of both
    lambda   a task is in the weights: at half its weight, and back; half of the time of both
    drop     a third task is in the weights: out of them again, and deleted

Methods:

    fa composed, fb composed   SBoRA: composed(model, ...) and settle(), which writes what the first forward would
    fa merged, fb merged       SBoRA by PEFT's calls: unmerge_adapter(), merge_adapter() and delete_adapter()
    lora merged                the same calls of a model with PEFT's LoRA

A ratio is taken within a round, against "lora merged"; printed are medians over the rounds, with the quartiles of the
ratios. "cells" are those of the weights that one switch writes, counted in the models' shapes.

Before the rounds each method makes `--switches` changes between the two tasks, and takes out what is in. "cells left"
are those of its weights that differ from the base's in any bit, "largest" is the largest difference as a share of the
largest weight of that matrix.

The models: SmolLM2-135M, and layers of Llama-3-8B's shape with random weights and a small vocabulary. LoRA that is not
merged is switched by a flag, and computed beside the weights in every forward; bench_train.py measures such forwards.

Exit code 1 if SBoRA leaves a cell.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import peft
import torch
from bench_train import ratios
from figures import Budget, Result, add_output_options, finish, named
from methods import MODEL, SHAPES, TARGETS, Case, load

from multisbora import SboraConfig, composed
from multisbora.hub import find_base

METHODS = ["fa composed", "fa merged", "fb composed", "fb merged", "lora merged"]
PEER = "lora merged"
OPERATIONS = ["switch", "lambda", "drop"]
REAL = "smollm2-135m"  # the shape whose weights can be had
SIZE = 0.004  # of the entries of an update, in every method


class Switch:
    """A model with tasks a and b, and the ways to have one of them in its weights."""

    def __init__(self, base: Any, method: str, rank: int) -> None:
        self.method = method
        self.rank = rank
        self.indices: dict[str, list[int]] = {}
        names = [(name, module) for name, module in base.named_modules() if name.rpartition(".")[2] in TARGETS]
        for name, linear in names:
            size = linear.in_features if method.startswith("fa") else linear.out_features
            self.indices[name] = torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist()
        model = copy.deepcopy(base)
        self.model: Any = peft.get_peft_model(model, self._config(0), adapter_name="one").eval()
        self._fill("one")
        self.add("two", 1)
        self.held: list[tuple[str, float]] = []

    def _config(self, place: int) -> Any:
        """SBoRA's tasks share no index: the first, second and third `rank` of each matrix's own random order."""
        if self.method == PEER:
            return peft.LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=TARGETS)
        own = slice(place * self.rank, (place + 1) * self.rank)
        indices = {name: sorted(order[own]) for name, order in self.indices.items()}
        return SboraConfig(variant=self.method[:2], r=self.rank, alpha=self.rank, indices=indices)  # type: ignore[arg-type]

    def _fill(self, task: str) -> None:
        """Random values, as if trained."""
        found = dict(self.model.named_parameters())
        for name, parameter in found.items():
            if name.endswith(f"sbora_values.{task}"):
                parameter.data.normal_(0, SIZE)
            elif name.endswith(f"lora_B.{task}.weight"):
                # Entries of A are uniform within 1 / sqrt(in), of variance 1 / (3 in); an update adds `rank` products.
                inner = found[name.replace("lora_B", "lora_A")].shape[1]
                parameter.data.normal_(0, SIZE * (3 * inner / self.rank) ** 0.5)

    def add(self, task: str, place: int) -> None:
        self.model.add_adapter(task, self._config(place))
        self._fill(task)

    @contextlib.contextmanager
    def holding(self, task: str, weight: float = 1.0) -> Iterator[None]:
        """That task in the weights and no other; after it, what was there before."""
        if self.method.endswith("composed"):
            with composed(self.model, {task: weight}):
                self.model.base_model.settle()
                yield
            return
        self._merge([*self.held, (task, weight)])
        yield
        self._merge(self.held[:-1])

    def _merge(self, held: list[tuple[str, float]]) -> None:
        if self.held:
            self.model.unmerge_adapter()
        if held:
            task, weight = held[-1]
            if any(known == task and other != weight for known, other in self.held):
                self._set_weight(task, weight)
            self.model.merge_adapter([task])
        self.held = held

    def _set_weight(self, task: str, weight: float) -> None:
        if self.method != PEER:
            self.model.base_model.set_weight(task, weight)
            return
        for module in self.model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.set_scale(task, weight)

    def cells(self) -> int:
        """Of the base's weights, written by one switch."""
        if self.method == PEER:
            return 2 * sum(self.weight(name).numel() for name in self.indices)
        values = (p for name, p in self.model.named_parameters() if name.endswith(("values.one", "values.two")))
        return sum(value.numel() for value in values)

    def weight(self, name: str) -> torch.Tensor:
        """The weight of an adapted layer as it is in memory."""
        found: torch.Tensor = self.model.get_base_model().get_submodule(name).base_layer.weight
        return found


@contextlib.contextmanager
def timed(taken: list[float], device: str, share: float = 1.0) -> Iterator[None]:
    """Adds a share of the seconds that the block takes."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    yield
    if device == "cuda":
        torch.cuda.synchronize()
    taken.append(share * (time.perf_counter() - start))


def time_round(switch: Switch, device: str) -> dict[str, float]:
    """Seconds of each operation, once."""
    taken: dict[str, list[float]] = {operation: [] for operation in OPERATIONS}
    with switch.holding("one"):
        with timed(taken["switch"], device, 0.5), switch.holding("two"):
            pass
        with timed(taken["lambda"], device, 0.5), switch.holding("one", 0.5):
            pass
    switch.add("three", 2)
    with contextlib.ExitStack() as stack:
        stack.enter_context(switch.holding("three"))
        with timed(taken["drop"], device):
            stack.close()
            switch.model.delete_adapter("three")
    return {operation: seconds for operation, (seconds,) in taken.items()}


def left_over(switch: Switch, base: Any, switches: int) -> tuple[int, float]:
    """(cells that differ from the base's in any bit, largest difference as a share of its matrix's largest weight)."""
    with switch.holding("one"):
        for _ in range(switches // 2):
            with switch.holding("two"):
                pass
    cells, largest = 0, 0.0
    for name in switch.indices:
        now, before = switch.weight(name).detach(), base.get_submodule(name).weight.detach()
        whole = {2: torch.int16, 4: torch.int32}[now.element_size()]
        cells += int((now.view(whole) != before.view(whole)).sum())
        largest = max(largest, float((now.float() - before.float()).abs().max() / before.abs().max()))
    return cells, largest


def measure(case: Case, name: str, methods: Sequence[str], rounds: int, warm: int, switches: int) -> Result:
    base = load(case).eval()
    models = {method: Switch(base, method, case.rank) for method in methods}
    left = {method: left_over(models[method], base, switches) for method in methods}
    taken: dict[str, dict[str, list[float]]] = {operation: {m: [] for m in methods} for operation in OPERATIONS}
    for number in range(-warm, rounds):
        shift = number % len(methods)
        for method in [*methods[shift:], *methods[:shift]][:: -1 if number % 2 else 1]:
            for operation, seconds in time_round(models[method], case.device).items():
                if number >= 0:
                    taken[operation][method].append(seconds)
    rows, budgets = [], []
    for method in methods:
        row = [method]
        for operation in OPERATIONS:
            row.append(f"{1000 * statistics.median(taken[operation][method]):.2f}")
            middle, lower, upper = ratios(taken[operation], method, PEER)
            row.append(f"{middle:.3f} ({lower:.3f} to {upper:.3f})")
        cells, largest = left[method]
        rows.append([*row, f"{models[method].cells():,}", f"{cells:,}", f"{largest:.1e}" if cells else "0"])
        if method != PEER:
            budgets.append(Budget(f"cells that {method} leaves after {switches} switches", cells, 0))
    columns = ["method"]
    for operation in OPERATIONS:
        columns += [f"{operation} ms", f"/ {PEER}"]
    columns += ["cells", f"cells left after {switches}", "largest"]
    where = torch.cuda.get_device_name() if case.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    what = str(case).split(";")[0]
    setting = f"{what}; {case.dtype}; rank {case.rank}; {where}; {rounds} rounds"
    place = named(f"switch-{name}", case.device)
    return Result(place, f"Switch of a task, {what}", setting, columns, rows, budgets=budgets)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = sorted(SHAPES)
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=[REAL, "llama-3-8b"], help="(default: two)")
    parser.add_argument("--random", action="store_true", help=f"random weights for {REAL} too")
    parser.add_argument("--layers", type=int, default=2, help="of a shape with random weights (default: 2)")
    parser.add_argument("--hidden", type=int, help="width of such a shape, in place of its own")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="M")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rank", type=int, default=64, help="(default: 64)")
    parser.add_argument("--rounds", type=int, default=11, help="(default: 11)")
    parser.add_argument("--warm", type=int, default=1, help="rounds before those that count (default: 1)")
    parser.add_argument("--switches", type=int, default=100, help="before cells are compared (default: 100)")
    parser.add_argument("--threads", type=int, default=2, help="of torch on the CPU (default: 2)")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    if PEER not in options.methods:
        parser.error(f"every ratio is against {PEER!r}: name it in --methods")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: leave --device out, or give --device cpu")
    if options.switches < 2 or options.switches % 2:
        parser.error(f"--switches is {options.switches}: give an even number, there and back")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    methods = [method for method in METHODS if method in options.methods]
    results = []
    for name in options.shapes:
        shape = dataclasses.replace(SHAPES[name], layers=options.layers, vocabulary=1024)
        shape = shape.narrowed(options.hidden or shape.hidden)
        real = name == REAL and not options.random
        case = Case(
            dtype=options.dtype,
            device=options.device,
            rank=options.rank,
            batch=0,
            tokens=0,
            logits_to_keep=0,
            nf4=False,
            shape=None if real else shape,
            model=str(find_base(MODEL, say=print)) if real else None,
        )
        results.append(measure(case, name, methods, options.rounds, options.warm, options.switches))
    return finish(results, options)


if __name__ == "__main__":
    sys.exit(main())
