"""Merging against copying: seconds and peak memory, beside `cp`, PEFT and mergekit; growth; edits in place.

    python scripts/bench_merge.py [--only merge,peers,growth,inplace] [--work FOLDER --keep] [--mergekit PYTHON] ...

The checkpoint has the shapes of Llama-3.2-3B and random weights: 6.4 GB of bf16 in two shards. The tasks are random
too, of rank 64 on q, k, v, up and down. Whatever is measured runs in a process of its own (merge_work.py), and its
imports do not count (the table of the peers has them apart). Runs take turns, forwards and backwards; a ratio is taken
within a round, printed is the median over the rounds with the quartiles. Before each run the outputs before it are
deleted and the disk is synced. "cold": no page of the input is in memory, mincore says so. "warm": all of them are.

    merge    two fa tasks, against `cp --reflink=never` of the base's folder. A merge is on the disk when it ends. cp
             leaves that to the kernel: "cp + sync" is cp and then `sync` of what it wrote, from the same run of it.
    peers    the same two tasks by PEFT (load, merge_and_unload, save) and, given a Python that has it, by mergekit's
             task_arithmetic, which needs a whole checkpoint a task as its input (made beforehand, not measured). Two
             matrices of every output are compared with ours.
    growth   1 to 16 tasks on that checkpoint, and two tasks on checkpoints from 1 GB to that. Warm.
    inplace  add and remove of an fb and of an fa task on the merged checkpoint, and reweight, against a whole merge of
             all its tasks. "written" are the pages that the kernel had to write, "counted" what went into write calls,
             "cells" the bf16 values of its rows or columns. In the end all files must be as before.

Memory is resident memory (peak), of the process and its children, imports and mapped files included; "anonymous" is
without files. MB are 1,000,000 bytes. On a virtual machine the host may have pages in memory that are cold here.

Needs Linux, and free space as it says. It deletes what it made; with --keep the next run finds its input there.
Exit code 1 if a budget is missed, or something that must be equal is not.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from figures import Budget, Result, add_output_options, finish
from merge_runs import Bench, Job, Run, digests, file_system, files, memory, ratios, spread, times
from synthetic import LLAMA_3B, Shape, name_of, task_size

SECTIONS = ("merge", "peers", "growth", "inplace")
WORK = "multisbora-bench-merge"  # the folder that is made and deleted
LIMITS = {"cold": 1.15, "warm": 1.5}
TASKS = (1, 2, 4, 8, 16)
SIZES = (1e9, 2e9, 4e9)  # bytes of the smaller checkpoints
MARGIN = 1 << 30  # bytes of the disk left free


def merge_section(bench: Bench) -> list[Result]:
    base, adapters = bench.base(bench.shape), bench.tasks(bench.shape, "fa0", "fa1")
    jobs = [bench.merge_job(base, adapters), bench.copy_job(base)]
    bound = bench.bound(bench.shape, adapters)
    rows, bars, budgets = [], {}, []
    for cache, limit in LIMITS.items():
        found = bench.rounds(jobs, cache, "merge", bench.options.rounds)
        ours, copies = found["multisbora"], found["cp"]
        plain, synced = ratios(ours, copies, "seconds"), ratios(ours, copies, "synced")
        beside = [f"{statistics.median(one['fsync'] for one in ours):.2f}", spread(plain), f"{synced[0]:.2f}"]
        for name, runs, key in (
            ("multisbora", ours, "seconds"),
            ("cp", copies, "seconds"),
            ("cp + sync", copies, "synced"),
        ):
            rows.append([cache, name, *times(runs, key), *(beside if runs is ours else [""] * 3), *memory(runs)])
        bars[f"multisbora, {cache}"] = plain
        peak = max(one["peak"] for one in ours)
        budgets += bench.budgets(
            Budget(f"merge / cp, {cache}", limit, plain[0]),
            Budget(f"peak memory of a {cache} merge / (one matrix + adapters + 300 MB)", 1.0, peak / bound),
        )
    setting = f"{bench.setting}; two fa tasks, rounds: {bench.options.rounds}; cold by {bench.how_cold}"
    setting += f"; memory may be {bound / 1e6:.0f} MB"
    columns = ["cache", "what", "median s", "quartiles", "in fsync s", "/ cp (quartiles)", "/ cp + sync"]
    columns += ["peak MB", "anonymous MB"]
    return [Result("merge", "merge / cp --reflink=never", setting, columns, rows, bars, budgets)]


def peers_section(bench: Bench) -> list[Result]:
    from multisbora.export import export_peft_lora
    from multisbora.geometry import from_checkpoint

    options, base = bench.options, bench.base(bench.shape)
    adapters = bench.tasks(bench.shape, "fa0", "fa1")
    reference, loras = bench.folder / "reference", [bench.folder / "loras" / adapter.name for adapter in adapters]
    bench.work("merge", base=base, adapters=adapters, output=reference)
    for adapter, lora in zip(adapters, loras, strict=True):
        export_peft_lora(adapter, lora, from_checkpoint(base))

    def peer(name: str, work: str, python: str, models: dict[str, list[Path]]) -> Job:
        inputs = (*files(base), *(file for folders in models.values() for folder in folders for file in files(folder)))
        arguments = {"base": base, "shard_size": bench.shard_size, **models}
        return Job(
            name,
            inputs,
            lambda output: bench.work(work, python, output=output, **arguments),
            lambda output: check_agreement(reference, output, base, bench.shape),
        )

    jobs = [bench.merge_job(base, adapters), bench.copy_job(base), peer("PEFT", "peft", options.peft, {"loras": loras})]
    if options.mergekit:
        singles = [bench.folder / f"single-{adapter.name}" for adapter in adapters]
        for adapter, single in zip(adapters, singles, strict=True):
            bench.work("merge", base=base, adapters=[adapter], output=single)
        jobs.append(peer("mergekit", "mergekit", options.mergekit, {"models": singles}))
    else:
        print("mergekit is left out: give --mergekit the Python of an environment that has it")
    found = {cache: bench.rounds(jobs, cache, "peers", options.peer_rounds) for cache in LIMITS}
    rows = []
    for cache, taken in found.items():
        for name, runs in taken.items():
            beside = [f"{ratios(runs, taken[other], 'seconds')[0]:.2f}" for other in ("cp", "multisbora")]
            imports = "" if name == "cp" else f"{statistics.median(one['imports'] for one in runs):.1f}"
            rows.append([cache, name, *times(runs, "seconds")[:1], *beside, imports, *memory(runs)])
    columns = ["cache", "what", "median s", "/ cp", "/ multisbora", "imports s", "peak MB", "anonymous MB"]
    setting = f"{bench.setting}; two fa tasks, rounds: {options.peer_rounds}; cold by {bench.how_cold}"
    return [Result("merge-peers", "merge / cp --reflink=never", setting, columns, rows)]


def growth_section(bench: Bench) -> list[Result]:
    count = bench.options.growth_rounds
    columns = ["median s", "quartiles", "/ cp (quartiles)", "peak MB", "anonymous MB", "may be MB"]

    def row(shape: Shape, tasks: Sequence[str]) -> tuple[list[str], float]:
        base, adapters = bench.base(shape), bench.tasks(shape, *tasks)
        found = bench.rounds([bench.merge_job(base, adapters), bench.copy_job(base)], "warm", "growth", count)
        ours, bound = found["multisbora"], bench.bound(shape, adapters)
        ratio = spread(ratios(ours, found["cp"], "seconds"))
        cells = [*times(ours, "seconds"), ratio, *memory(ours), f"{bound / 1e6:.0f}"]
        return cells, max(one["peak"] for one in ours) / bound

    by_task, by_size, shares = {}, [], []
    for number in TASKS:
        by_task[str(number)], share = row(bench.shape, [f"fa{task}" for task in range(number)])
        shares.append(share)
    by_task["1 fa, 1 fb"], _ = row(bench.shape, ["fa0", "fb"])
    sizes = [0.0] if bench.options.quick else [size for size in SIZES if size < bench.shape.size()]
    for shape in (bench.shape.of_size(size) for size in sizes):
        cells, share = row(shape, ["fa0", "fa1"])
        by_size.append([f"{shape.size() / 1e9:.2f}", str(shape.layers), *cells])
        shares.append(share)
        for path in bench.folder.glob(f"{name_of(shape)}*"):
            shutil.rmtree(path)
    by_size.append([f"{bench.shape.size() / 1e9:.2f}", str(bench.shape.layers), *by_task["2"]])
    budget = Budget("highest peak memory / (one matrix + adapters + 300 MB)", 1.0, max(shares))
    setting = f"{bench.setting}; warm, rounds: {count}"
    rows = [[name, *cells] for name, cells in by_task.items()]
    tasks = Result("merge-tasks", "merge of 1 to 16 tasks", setting, ["tasks", *columns], rows)
    sized = Result("merge-sizes", "merge into more", f"two fa tasks, {setting}", ["GB", "layers", *columns], by_size)
    return [tasks, replace(sized, budgets=bench.budgets(budget))]


def inplace_section(bench: Bench) -> list[Result]:
    base = bench.base(bench.shape)
    first, new = bench.tasks(bench.shape, "fa0", "fa1"), {"fb": "fb", "fa": "fa2"}
    merged = bench.folder / "deployed"
    bench.work("merge", base=base, adapters=first, output=merged)
    before = digests(merged)
    rows = []
    for variant, task in new.items():
        adapter = bench.task(bench.shape, task)
        whole = bench.merge_job(base, [*first, adapter], "whole merge")
        steps: dict[str, dict[str, Any]] = {
            "add": {"adapter": adapter},
            "reweight": {"adapter": adapter, "weight": 0.5},
            "remove": {"task": task},
        }
        cells = task_size(bench.shape, variant, bench.rank) // 2  # fp32 values, bf16 cells
        for cache in LIMITS:
            taken: dict[str, list[Run]] = {name: [] for name in (*steps, whole.name)}
            for _ in range(bench.options.inplace_rounds):
                taken[whole.name].append(bench.measure(whole, cache, "inplace"))
                for name, arguments in steps.items():
                    with bench.ready((*files(merged), *files(adapter)), cache):
                        found = bench.work(name, folder=merged, **arguments)
                    taken[name].append(found)
                    bench.note("inplace", f"{name} {task}", cache, found)
            for name, runs in taken.items():
                ratio = f"{ratios(runs, taken[whole.name], 'seconds')[0]:.3f}"
                sizes = [f"{statistics.median(one[key] for one in runs) / 1e6:.1f}" for key in ("written", "counted")]
                what = [variant, cache, name, *times(runs, "seconds")[:1], ratio, *sizes]
                rows.append([*what, f"{cells / 1e6:.1f}", *memory(runs)])
        if digests(merged) != before:
            raise SystemExit(f"after add and remove of {task} the checkpoint is not what it was before")
    shutil.rmtree(merged)
    columns = ["task", "cache", "what", "median s", "/ whole merge", "written MB", "counted MB", "cells MB"]
    columns += ["peak MB", "anonymous MB"]
    setting = f"{bench.setting}; one task more on two fa tasks, rounds: {bench.options.inplace_rounds}"
    setting += f"; cold by {bench.how_cold}"
    return [Result("merge-inplace", "edits in place", setting, columns, rows)]


def check_agreement(ours: Path, theirs: Path, base: Path, shape: Shape) -> None:
    """Two matrices of a peer's merge, the first adapted and the last, against ours, within the rounding of bf16.

    Raises:
        SystemExit: they differ by more, or are the base's.
    """
    import numpy as np

    from multisbora.checkpoint import Checkpoint

    modules = list(shape.adapted())
    for tensor in (f"{modules[0]}.weight", f"{modules[-1]}.weight"):
        mine, other, plain = (
            Checkpoint.open(folder).tensor(tensor).astype(np.float32) for folder in (ours, theirs, base)
        )
        far = np.abs(mine - other) > 2.0**-7 * (np.abs(mine) + np.abs(plain)) + 1e-6
        if far.any() or np.array_equal(other, plain):
            raise SystemExit(f"{theirs.name} merged another {tensor} than ours: {np.count_nonzero(far)} cells differ")


def space_needed(shape: Shape, rank: int, sections: Sequence[str], mergekit: bool) -> int:
    """Bytes of the disk that the sections need at once, what --keep left there included."""
    base = shape.size()
    counts = {"merge": 2, "peers": 4, "growth": max(TASKS), "inplace": 4}
    fa, fb = (task_size(shape, variant, rank) for variant in ("fa", "fb"))
    tasks = max(counts[section] for section in sections) * fa + fb
    undo = tasks // 2
    outputs = {"merge": 1.0, "peers": 4.0 if mergekit else 2.0, "growth": 2.0, "inplace": 2.0}
    return int(base * (1 + max(outputs[section] for section in sections)) + tasks + undo)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", default=",".join(SECTIONS), metavar="A,B", help=f"sections, of {','.join(SECTIONS)} (default: all)")
    add("--work", type=Path, default=Path(tempfile.gettempdir()), help="folder on the disk to measure (default: tmp)")
    add("--keep", action="store_true", help="keep checkpoint and adapters for another run with the same --work")
    add("--layers", type=int, default=LLAMA_3B.layers, help=f"of the checkpoint (default: {LLAMA_3B.layers}: 6.4 GB)")
    add("--rank", type=int, default=64)
    add("--rounds", type=int, default=5, help="of the merge section, cold and warm each (default: 5)")
    add("--growth-rounds", type=int, default=2, help="(default: 2)")
    add("--inplace-rounds", type=int, default=3, help="cold and warm each (default: 3)")
    add("--peer-rounds", type=int, default=1, help="cold and warm each (default: 1)")
    add("--peft", default=sys.executable, metavar="PYTHON", help="that has PEFT (default: this one)")
    here = sys.executable if importlib.util.find_spec("mergekit") else None
    add("--mergekit", default=here, metavar="PYTHON", help="that has mergekit (default: this one, if it does)")
    add("--quick", action="store_true", help="a toy of 0.3 MB: shows that everything runs, and judges no budget")
    add("--raw", type=Path, help="append every single run to this file, one JSON object a line")
    add_output_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(SECTIONS):
        parser.error(f"--only {unknown.pop()} is no section: they are {', '.join(SECTIONS)}")
    if min(options.rounds, options.growth_rounds, options.inplace_rounds, options.peer_rounds) < 1:
        parser.error("rounds must be 1 or more")
    if min(options.layers, options.rank) < 1:
        parser.error("--layers and --rank must be 1 or more")
    if options.rank * max(TASKS) > LLAMA_3B.hidden:
        parser.error(f"--rank {options.rank}: {max(TASKS)} tasks need {options.rank * max(TASKS)} columns of 3072")
    folder = options.work.absolute() / WORK
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        parser.error(f"another run is measuring in {folder}: wait for its end, or give another --work")
    bench = Bench(options, folder)
    try:
        bench.clean(everything=False)  # outputs of a run that was killed
        there = sum(file.stat().st_size for file in files(folder))
        needed = space_needed(bench.shape, bench.rank, options.only, bool(options.mergekit)) + MARGIN
        free = shutil.disk_usage(folder).free + there
        bench.say(f"{folder}: {needed / 1e9:.1f} GB of disk needed, {free / 1e9:.1f} GB free")
        if free < needed:
            parser.error(f"{folder} has only {free / 1e9:.1f} GB: give --work another disk")
        if not options.quick and file_system(folder) in ("tmpfs", "ramfs"):
            parser.error(f"{folder} is in memory: give --work a folder on a disk")
        sections = {"merge": merge_section, "peers": peers_section, "growth": growth_section}
        sections["inplace"] = inplace_section
        start, results = time.perf_counter(), []
        for name in options.only:
            results += sections[name](bench)
            bench.say(f"{name}: done at {time.perf_counter() - start:.0f} s")
        return finish(results, options)
    finally:
        bench.clean(everything=not options.keep)
        os.close(lock)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a time limit deletes what was made, too
    sys.exit(main())
