#!/usr/bin/env python3
"""Composition quality on a real model and real data: what tasks keep of their own gain when they are merged, ours and
peers, at equal numbers of trained values (docs/composition.md).

    scripts/study_composition.py --data DIR --work DIR [--only pair,seeds,eight,four,scores,crosstalk]
    scripts/study_composition.py --work DIR --quick      the same on a toy of random weights: shows that all of it runs

DIR of --data holds math/{train,test}.jsonl and commonsense/{train,test}.jsonl, rows with the fields subset,
instruction, output, answer (the LLM-Adapters format). What comes out of a training, a tuning or an evaluation stays in
WORK/runs.jsonl, or in the file that --runs names, and not done again: what was cut short goes on, the most telling runs
come first, and --report prints what is there. On a machine that has that file alone, adapters are trained anew where
runs that are still to be done need them. Rates, moments and lambdas are taken from dev rows that are split from the
training files; the tables are of test rows.

    pair     merges of math and commonsense, one seed       eight, four    merges of tasks cut from the same files
    seeds    the same with the other seeds                   scores        generated answers of a few of the first
    crosstalk   who is heard on whose rows, in which matrices, in some of these

The peers and how they are kept comparable: baselines.py. How ours are composed: `multisbora tune --by task` and `--by
matrix`, `merge --method corrected`; "grid" is one lambda a task by trial, for whom gradients do not serve.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from composition_plan import BESIDE, FEW, FEW_HEARD, FEWEST, SECTIONS, Plan, Setup
from composition_runs import Store, say, work_off
from composition_steps import Steps
from composition_tables import Tables
from composition_tasks import EIGHT, Sizes, prepare, write_toy
from figures import add_output_options, finish

from multisbora.allocator import DEFAULT_TARGETS
from multisbora.geometry import Geometry, from_checkpoint
from multisbora.hub import find_base
from multisbora.penalty import STRENGTH
from multisbora.stream import fingerprint

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_SECTIONS = (*SECTIONS, *BESIDE)


def ranks(geometry: Geometry, targets: Sequence[str], rank: int, tasks: int) -> dict[str, int]:
    """Ranks with the number of trained values that fa of `rank` has, or the nearest; of ours, `tasks` of them fit.

    Raises:
        ValueError: so many fa tasks do not fit.
    """
    shapes = [matrix.shape for matrix in geometry.select(targets)]
    rows, columns = (sum(shape[axis] for shape in shapes) for axis in (0, 1))
    narrowest = [min(shape[axis] for shape in shapes) for axis in (0, 1)]
    if rank * tasks > narrowest[1]:
        raise ValueError(f"{tasks} tasks of rank {rank} need {rank * tasks} columns of {narrowest[1]}: lower --rank")
    values = rank * rows
    lora = min(max(1, round(values / (rows + columns))), *narrowest)
    fb = min(max(1, round(values / columns)), narrowest[0] // tasks)
    return {"fa": rank, "fb": fb, "lora": lora, "osrm": lora, "lori": rank, "lori-dense": rank}


def _setup(options: argparse.Namespace, base: Path, sizes: Sizes) -> Setup:
    geometry = from_checkpoint(base)
    return Setup(
        base=str(base),
        fingerprint=fingerprint(base, geometry),
        targets=tuple(DEFAULT_TARGETS),
        ranks=ranks(geometry, DEFAULT_TARGETS, options.rank, 2),
        many=ranks(geometry, DEFAULT_TARGETS, options.rank, len(EIGHT)),
        rates=tuple(options.rates),
        seeds=tuple(options.seeds),
        isolate=options.isolate,
        looked=options.measure_rows,
        tuned=options.tune_rows,
        tune_steps=options.tune_steps,
        tried=options.grid_rows,
        scored=options.score_rows,
        sizes=sizes,
    )


def _setting(setup: Setup, workers: int) -> str:
    sizes = setup.sizes
    rank = {kind: str(value) for kind, value in setup.ranks.items()}
    if setup.many["fb"] != setup.ranks["fb"]:
        rank["fb"] += f" (merges of 4 and 8: {setup.many['fb']}, no more rows are free)"
    return (
        f"{Path(setup.base).name.rpartition('--')[2]}; rank {rank['fa']} for fa and LoRI, {rank['fb']} for fb, "
        f"{rank['lora']} for LoRA and OSRM; {sizes.steps} steps of {sizes.batch} rows of at most {sizes.cutoff} "
        f"tokens; --isolate {setup.isolate:g}; lambdas tuned on {setup.tuned} dev rows a task, by grid on "
        f"{setup.tried}; {os.cpu_count()} CPU threads, {workers} runs at a time"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="folder of the rows (not for --quick and --report)")
    add("--work", type=Path, required=True, help="folder of all that is made; some GB")
    known = ",".join(_SECTIONS)
    add("--only", default=known, metavar="A,B", help=f"sections, of {known} (default: all)")
    add("--runs", type=Path, metavar="FILE", help="what came out of each run (default: runs.jsonl in --work)")
    add("--report", action="store_true", help="run nothing, print what is there")
    add("--quick", action="store_true", help="a toy: shows that everything runs, and judges no target")
    add("--model", default=MODEL, help=f"base model (default: {MODEL})")
    add("--rank", type=int, help="of fa; the others' follow from it (default: 64)")
    add("--rates", type=_numbers, metavar="A,B", help="learning rates to try (default: 5e-4,1e-3,2e-3)")
    add("--seeds", type=_whole, metavar="A,B", help="of the merges of 2; others take the first (default: 0,1,2)")
    add("--isolate", type=float, default=STRENGTH, help=f"strength of the penalty (default: {STRENGTH:g})")
    sizes = Sizes()
    add("--steps", type=int, help=f"of a training (default: {sizes.steps})")
    add("--batch", type=int, help=f"rows of a step (default: {sizes.batch})")
    add("--warmup", type=int, help=f"steps (default: {sizes.warmup})")
    add("--cutoff", type=int, help=f"tokens of a row in training (default: {sizes.cutoff})")
    add("--dev-rows", type=int, help=f"held out a task, a quarter at most (default: {sizes.dev})")
    add("--watch-rows", type=int, help=f"of them, looked at when a training ends (default: {sizes.watch})")
    add("--test-rows", type=int, help=f"a task (default: {sizes.test})")
    add("--measure-rows", type=int, help="dev rows a task for moments and OSRM's start (default: 128)")
    add("--tune-rows", type=int, help="dev rows a task for multisbora tune (default: 128)")
    add("--tune-steps", type=int, help="of it (default: 32)")
    add("--grid-rows", type=int, help="dev rows a task for lambdas by trial, merge of 2 (default: 64)")
    add("--score-rows", type=int, help="test rows a task for generated answers (default: 200)")
    add("--workers", type=int, default=2, help="runs at a time (default: 2)")
    add_output_options(parser)
    return parser


REAL = {"rank": 64, "rates": [5e-4, 1e-3, 2e-3], "seeds": [0, 1, 2], "measure_rows": 128, "tune_rows": 128}
REAL |= {"tune_steps": 32, "grid_rows": 64, "score_rows": 200}
TOY = {"rank": 3, "rates": [0.1], "seeds": [0, 1], "measure_rows": 4, "tune_rows": 4, "tune_steps": 2, "grid_rows": 2}
TOY |= {"score_rows": 2, "steps": 4, "batch": 2, "warmup": 0, "cutoff": 320, "dev_rows": 4, "watch_rows": 2}
TOY |= {"test_rows": 3}


def commit() -> str:
    """Of the code that runs here; "" where it is in no repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _whole(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    for name, value in (TOY if options.quick else REAL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    sections = options.only.split(",")
    if unknown := set(sections) - set(_SECTIONS):
        parser.error(f"--only {unknown.pop()} is no section: they are {', '.join(_SECTIONS)}")
    if options.data is None and not (options.quick or options.report):
        parser.error("--data names the folder of the rows")
    if options.isolate <= 0 or options.workers < 1:
        parser.error("--isolate must be above 0, and --workers 1 or more")
    given = {"dev": "dev_rows", "watch": "watch_rows", "test": "test_rows"}
    given |= {name: name for name in ("steps", "batch", "cutoff", "warmup")}
    sizes = Sizes(**{name: value for name, flag in given.items() if (value := getattr(options, flag)) is not None})
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    lock = os.open(work, os.O_RDONLY)
    try:
        if not options.report:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        parser.error(f"another study, or a process that one left behind, is at work in {work}: wait for its end")
    try:
        base, data = write_toy(work) if options.quick else (find_base(options.model, say).resolve(), options.data)
        if not options.report:
            prepare(data.resolve(), work, sizes)
        setup = _setup(options, base, sizes)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    path = (options.runs or work / "runs.jsonl").resolve()
    if not path.parent.is_dir():
        parser.error(f"--runs: {path.parent} is no folder")
    store = Store(path, commit())
    plan = Plan(setup, store, FEW, FEW, FEWEST, FEW_HEARD) if options.quick else Plan(setup, store)
    failed: dict[str, str] = {}
    if not options.report:
        steps = Steps(work, setup, store, here=options.quick, lock=lock)

        def leave(number: int, _: object) -> None:
            steps.stop()
            sys.exit(128 + number)

        before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            workers = 1 if options.quick else options.workers
            failed = work_off(lambda: plan.runs(sections), store, steps, workers, steps.at_hand)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    os.close(lock)
    tables = Tables(plan, _setting(setup, 1 if options.quick else options.workers), judged=not options.quick)
    odd = tables.strangers()
    code = finish(tables.all(), options)
    for key in odd:
        say(f"{key} was trained on other batches than the others of its task and seed")
    for key, reason in failed.items():
        say(f"{key} failed: {reason}")
    return 1 if failed or odd else code


if __name__ == "__main__":
    sys.exit(main())
