"""One training step of SBoRA against the frozen model and against PEFT's methods: its time, and its peak of memory.

    python scripts/bench_train.py steps  [--dtype bfloat16 float32] [--rounds N] [--model M | --shape S] ...
    python scripts/bench_train.py memory [--model M | --shape S] ...

`steps`: every method has a model in this process, with the same weights. In each round each of them makes one step, in
rotated order, every other round backwards. A method's ratio is taken within a round, against the frozen model's step of
that round; printed is the median over the rounds, with the quartiles. The model is a random Llama of SmolLM2's width
with 12 layers, or another shape, or a real model (`--model`).

A step is forward and backward of the model's own loss (next token, cross-entropy in fp32, logits at all positions;
`--logits-to-keep N` for those of the last N positions alone), AdamW (torch's fused one for every method) and zero_grad.
"frozen" is forward and backward alone, with gradients for the input embeddings, so that they run through every layer,
and nothing trained. Adapted are q, k, v, up and down, by every method at the same rank. Methods:

    fa, fb                 SBoRA, update in the base weight ("in place")
    fa isolated, ...       the same with the gradient of `train --isolate` added, of blocks of random numbers
    fa gather, fb gather   SBoRA as the paper has it: sampled products beside the weight; the form of quantised bases
    lora                   PEFT's LoRA as get_peft_model makes it: adapter in fp32, computed in fp32
    lora 16 bit            the same with adapter, gradients and optimizer state in the base's 16-bit dtype
    lora A frozen          LoRA that trains B alone
    dora, shira            PEFT's DoRA and SHiRA (random mask)

`memory`: the same step on SmolLM2-135M, each method in a process of its own. "measured" is the peak of resident memory
from the loaded model on, above what the libraries take, as bench_memory.py defines it. "alive" is the same with
MALLOC_MMAP_THRESHOLD_ set, which makes malloc give freed blocks back at once: what the tensors themselves need. On CUDA
both are torch's peak of allocated memory.

Exit code 1 if a budget is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from figures import Budget, Result, add_output_options, finish, named
from methods import (
    IN_PLACE,
    ISOLATED,
    METHODS,
    MODEL,
    SHAPES,
    Case,
    Shape,
    adapt,
    fitted,
    load,
    make_step,
    twin,
    writes_in_place,
)


def seconds(step: Callable[[], None], device: str) -> float:
    """Of one step; on CUDA between two events on the stream, with nothing before them left to do."""
    if device != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()  # type: ignore[no-untyped-call]
    step()
    end.record()  # type: ignore[no-untyped-call]
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def time_steps(case: Case, methods: Sequence[str], rounds: int, warm: int) -> dict[str, list[float]]:
    """{method: seconds of its step in each round}."""
    base = load(case)
    models = {method: adapt(twin(base, method), method, case.rank) for method in methods}
    steps = {method: make_step(model, case, method) for method, model in models.items()}
    taken: dict[str, list[float]] = {method: [] for method in methods}
    for number in range(-warm, rounds):
        shift = number % len(methods)
        order = [*methods[shift:], *methods[:shift]][:: -1 if number % 2 else 1]
        for method in order:
            found = seconds(steps[method], case.device)
            if number >= 0:
                taken[method].append(found)
    for method in set(methods) & set(IN_PLACE):
        if not writes_in_place(models[method], base):
            raise RuntimeError(f"{method} was not computed in place: its figures would be those of the gather form")
    return taken


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, lower quartile, upper quartile)."""
    if len(values) == 1:
        return (values[0],) * 3
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return middle, lower, upper


def ratios(taken: dict[str, list[float]], method: str, against: str) -> tuple[float, float, float]:
    """Quartiles of the ratios within the rounds."""
    return quartiles([one / other for one, other in zip(taken[method], taken[against], strict=True)])


def step_result(case: Case, taken: dict[str, list[float]]) -> Result:
    rows, bars, budgets = [], {}, []
    peers = [peer for peer in ("lora", "lora 16 bit", "dora") if peer in taken]
    for method, times in taken.items():
        bars[method] = ratios(taken, method, "frozen")
        middle, lower, upper = bars[method]
        beside = [f"{ratios(taken, method, peer)[0]:.2f}" for peer in peers]
        spread = f"{lower:.3f} to {upper:.3f}"
        rows.append([method, f"{1000 * statistics.median(times):.1f}", f"{middle:.3f}", spread, *beside])
    # The budgets are of 16- and 32-bit bases; quantised ones have none.
    for method in () if case.nf4 else IN_PLACE:
        limits = {"frozen": 1.05} | ({"lora": 0.80, "dora": 0.61} if case.dtype == "bfloat16" else {})
        limits = {ISOLATED[method]: 1.03} if method in ISOLATED else limits
        for peer, limit in limits.items():
            if method in taken and peer in taken:
                budgets.append(Budget(f"step of {method} / {peer}", limit, ratios(taken, method, peer)[0]))
    weights = "nf4" if case.nf4 else case.dtype
    return Result(
        name=named(f"steps-{weights}", case.device),
        title=f"time of one step / frozen model's forward and backward, {weights}{_on(case)}",
        setting=f"{case}; {len(taken['frozen'])} rounds",
        columns=["method", "median ms", "/ frozen", "quartiles", *(f"/ {peer}" for peer in peers)],
        rows=rows,
        bars=bars,
        budgets=budgets,
    )


def _on(case: Case) -> str:
    return ", on a GPU" if case.device == "cuda" else ""


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}: this needs Linux")


def measure_memory(case: Case, method: str, count: int = 3) -> int:
    """Bytes at the peak of `count` steps, in this process, above what it takes before the model is loaded."""
    tiny = dataclasses.replace(case, shape=Shape(64, 96, 2, 2, 1, 128, True), model=None, rank=4, batch=2, tokens=16)
    warm = make_step(adapt(load(tiny), method, tiny.rank), tiny, method)
    for _ in range(2):
        warm()
    del warm
    on_gpu = case.device == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else resident("VmRSS")
    model = load(case)
    # The peak of loading is not what is asked for.
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    step = make_step(adapt(model, method, case.rank), case, method)
    for _ in range(count):
        step()
    return (torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")) - before


def memory_result(case: Case, methods: Sequence[str]) -> Result:
    """Each method in processes of its own, one after another."""
    peaks: dict[str, tuple[int, int]] = {}
    for method in methods:
        peak = _in_a_process(case, method, {})
        alive = peak if case.device == "cuda" else _in_a_process(case, method, {"MALLOC_MMAP_THRESHOLD_": "65536"})
        peaks[method] = (peak, alive)
        print(f"{method}: {peak / 1e6:.0f} MB, alive {alive / 1e6:.0f} MB", file=sys.stderr, flush=True)
    columns, rows, budgets, bars = ["method", "measured MB", "alive MB"], [], [], {}
    peers = [peer for peer in ("lora", "lora 16 bit") if peer in peaks]
    columns += [column for peer in peers for column in (f"/ {peer}", f"alive / {peer}")]
    for method, values in peaks.items():
        over = [value / other for peer in peers for value, other in zip(values, peaks[peer], strict=True)]
        rows.append([method, *(f"{value / 1e6:.0f}" for value in values), *(f"{ratio:.2f}" for ratio in over)])
        if "lora" in peaks:
            bars[method] = (over[0],) * 3
            if method in IN_PLACE and method not in ISOLATED:
                budgets.append(Budget(f"peak memory of {method} / lora", 0.78, over[0]))
    weights = "nf4" if case.nf4 else case.dtype
    name = named("memory" if weights == "bfloat16" else f"memory-{weights}", case.device)
    title = f"peak memory of the step / LoRA's, {weights}{_on(case)}"
    return Result(name, title, f"{case}; 1 MB = 1,000,000 bytes", columns, rows, bars, budgets)


def _in_a_process(case: Case, method: str, environment: dict[str, str]) -> int:
    given = json.dumps({"case": dataclasses.asdict(case), "method": method, "threads": torch.get_num_threads()})
    command = [sys.executable, "-W", "ignore", __file__, "one", given]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, **environment})
    return int(done.stdout.splitlines()[-1])


def _one(given: str) -> int:
    """What a process of its own does for `memory`."""
    content = json.loads(given)
    torch.set_num_threads(content["threads"])
    fields = content["case"]
    fields["shape"] = fields["shape"] and Shape(**fields["shape"])
    print(measure_memory(Case(**fields), content["method"]))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "memory"])
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape (default: smollm2-12)")
    parser.add_argument("--model", help=f"a real model in place of a shape (default of memory: {MODEL})")
    parser.add_argument("--layers", type=int, help="of the shape, in place of its own number")
    parser.add_argument("--hidden", type=int, help="width of the shape, in place of its own; the rank goes with it")
    parser.add_argument("--dtype", nargs="+", choices=["bfloat16", "float32"], help="(default: both; memory: bfloat16)")
    parser.add_argument("--nf4", action="store_true", help="quantise the base with bitsandbytes")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="M")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rank", type=int, help="(default: 32, narrowed with --hidden)")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step (default: 4)")
    parser.add_argument("--tokens", type=int, default=128, help="of each sequence (default: 128)")
    parser.add_argument("--logits-to-keep", type=int, default=0, help="last positions with logits (default: 0, all)")
    parser.add_argument("--rounds", type=int, default=40, help="of `steps` (default: 40)")
    parser.add_argument("--warm", type=int, default=3, help="rounds before those that count (default: 3)")
    parser.add_argument("--threads", type=int, default=2, help="of torch on the CPU (default: 2)")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    if options.model and (options.shape or options.layers or options.hidden):
        parser.error("--model has a shape of its own: leave --shape, --layers and --hidden out")
    width = 2 * SHAPES[options.shape or "smollm2-12"].heads
    if options.hidden and options.hidden % width:
        parser.error(f"--hidden is {options.hidden}: give a multiple of {width}, an even width for every head")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: leave --device out, or give --device cpu")
    if options.what == "steps" and "frozen" not in options.methods:
        parser.error("every ratio is against `frozen`: name it in --methods")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["one"]:
        return _one(given[1])
    options = parse(given)
    torch.set_num_threads(options.threads)
    # torch says of sparse tensors, which SHiRA uses, that they are in beta; transformers of its own renamed methods.
    warnings.simplefilter("ignore")
    methods = [method for method in METHODS if method in options.methods]
    if options.nf4:
        # Nothing can be written into quantised weights, and PEFT has no SHiRA for them.
        methods = [method for method in methods if method not in (*IN_PLACE, "shira")]
    model = options.model or (MODEL if options.what == "memory" and not options.shape else None)
    shape, rank = None, options.rank or 32
    if model is None:
        whole = SHAPES[options.shape or "smollm2-12"]
        shape = whole.narrowed(options.hidden or whole.hidden)
        rank = options.rank or max(32 * shape.hidden // whole.hidden, 1)
        if options.layers:
            shape = dataclasses.replace(shape, layers=options.layers)
        elif options.device == "cuda":
            copies = 1 if options.what == "memory" else 1 + len(set(methods) & set(IN_PLACE))
            shape = fitted(shape, options.nf4, copies, options.batch * options.tokens)
            if shape.layers < whole.layers:
                print(f"{shape.layers} of {whole.layers} layers: more do not fit into this GPU's memory", flush=True)
    else:
        from multisbora.hub import find_base

        model = str(find_base(model, say=print))
    dtypes = options.dtype or (["bfloat16"] if options.what == "memory" or options.nf4 else ["bfloat16", "float32"])
    results = []
    for dtype in dtypes:
        sizes = (rank, options.batch, options.tokens, options.logits_to_keep)
        case = Case(dtype, options.device, *sizes, options.nf4, shape, model)
        chosen = [m for m in methods if m != "lora 16 bit" or dtype == "bfloat16"]
        if options.what == "memory":
            results.append(memory_result(case, chosen))
        else:
            results.append(step_result(case, time_steps(case, chosen, options.rounds, options.warm)))
    return finish(results, options)


if __name__ == "__main__":
    sys.exit(main())
