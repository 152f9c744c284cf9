"""Runs of a tiny task that are killed with SIGKILL and started again, until one of them ends.

`python tests/kills.py 200` kills two hundred times; tests/test_kills.py does a handful.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from builders import tiny_llama

from multisbora.allocator import allocate
from multisbora.geometry import from_checkpoint
from multisbora.recipe import Recipe
from multisbora.registry import Registry
from multisbora.registry.claims import TaskClaims

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["datasets", "transformers.models.llama.modeling_llama", "multisbora.train", "kills"])
WRITES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
LIMIT = 120  # seconds that one process may take


@dataclass(frozen=True)
class Job:
    """One run to do."""

    recipe: Recipe
    base: Path
    claims: TaskClaims
    output: Path

    @property
    def run(self) -> Path:
        return self.output.with_name(f"{self.output.name}.run")


@dataclass(frozen=True)
class Kill:
    """When a process dies: before its `change`-th change to a file of the run or its output, or `seconds` after the
    first step that it logs."""

    change: int | None = None
    seconds: float | None = None


def make_jobs(folder: Path, dev: bool) -> dict[str, Job]:
    """{variant: job}, on a tiny bf16 Llama. With `dev`, the run stops early and keeps an adapter before its last."""
    base = tiny_llama(folder / "base")
    geometry = from_checkpoint(base)
    rows = folder / "train.json"
    rows.write_text(json.dumps([{"question": f"{n} plus 1?", "output": f"it is {n + 1}"} for n in range(24)]))
    training: dict[str, Any] = {"batch_size": 4, "micro_batch_size": 2, "dropout": 0.1, "warmup_steps": 0}
    training |= {"learning_rate": 0.05, "max_steps": 9, "save_steps": 3, "logging_steps": 2}
    content: dict[str, Any] = {"name": "toy", "prompt": "Q: {question} A: ", "train": str(rows)}
    content["eval"] = {"data": str(folder / "none.json"), "metric": "number"}
    if dev:
        # Its letters become less likely while the digits are learned: the dev loss falls first, and rises then.
        unlike = folder / "dev.json"
        unlike.write_text(json.dumps([{"question": f"{n} minus 1?", "output": "it is QQQQQQ"} for n in range(6)]))
        training |= {"lr_scheduler": "constant", "max_steps": 40, "eval_steps": 1, "early_stopping_patience": 5}
        content["dev"] = str(unlike)
    recipe = Recipe.model_validate(content | {"training": training})
    with Registry.open("sqlite://") as registry:
        for variant in ("fa", "fb"):
            allocate(registry, geometry, [variant], variant=variant, rank=4, target_modules=["q_proj", "down_proj"])
        claims = registry.claims(geometry.model)
    return {variant: Job(recipe, base, claims[variant], folder / variant) for variant in ("fa", "fb")}


def work(job: Job, change: int | None, counted: Path | None) -> None:
    """One process's part: train, and die before a certain change; or write down how many there were."""
    import datasets
    import torch

    from multisbora.train import train

    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = str(job.output.parent / "cache")
    changes = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        if event not in WRITES or not str(arguments[0]).startswith(str(job.output)):
            return
        if event == "open" and (arguments[2] or 0) & os.O_ACCMODE == os.O_RDONLY:
            return
        changes += 1
        if changes == change:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    train(job.recipe, job.base, job.claims, job.output)
    if counted is not None:
        counted.write_text(str(changes))


def attempt(job: Job, kill: Kill, counted: Path | None = None) -> bool:
    """Whether the run ended before it was killed."""
    process = PROCESSES.Process(target=work, args=(job, kill.change, counted))
    before = _logged(job)
    process.start()
    if kill.seconds is not None:
        end = time.monotonic() + LIMIT
        while process.is_alive() and _logged(job) <= before and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(kill.seconds)
        process.kill()
    process.join(LIMIT)
    if process.exitcode not in (0, -signal.SIGKILL):
        process.kill()
        raise RuntimeError(f"a process ended with {process.exitcode}, neither done nor killed")
    return process.exitcode == 0


def finish(job: Job, kills: Iterable[Kill]) -> int:
    """Kill, start again, kill; and let the last process end. Returns how many were killed."""
    killed = 0
    for kill in kills:
        if attempt(job, kill):
            return killed
        killed += 1
    assert attempt(job, Kill())
    return killed


def changes_of(job: Job) -> int:
    """How many changes an uninterrupted run makes to its files. It leaves the adapter at the job's output."""
    counted = job.output.parent / "changes"
    assert attempt(job, Kill(), counted)
    return int(counted.read_text())


def outcome(job: Job) -> tuple[bytes, list[dict[str, Any]], dict[str, Any]]:
    """What a run left, without the speed of the machine: adapter, metrics, summary."""
    lines = [json.loads(line) for line in (job.output / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_second", None)
    summary = json.loads((job.output / "training.json").read_text())
    return (job.output / "adapter_model.safetensors").read_bytes(), lines, summary


def compare(whole: Job, job: Job) -> None:
    """Fail where two runs differ, or where one left more than its adapter."""
    for one, two in zip(outcome(whole), outcome(job), strict=True):
        assert one == two
    assert not job.run.exists()


def _logged(job: Job) -> int:
    try:
        return (job.run / "metrics.jsonl").stat().st_size
    except OSError:
        return -1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    done = 0
    with tempfile.TemporaryDirectory() as folder:
        cases = []
        for dev in (False, True):
            place = Path(folder, f"dev-{dev}")
            place.mkdir()
            cases += [(dev, job, changes_of(job)) for job in make_jobs(place, dev).values()]
        while done < arguments.kills:
            dev, whole, changes = draw.choice(cases)
            job = replace(whole, output=whole.output.with_name(f"{whole.output.name}-{done}"))
            kills = [
                Kill(change=draw.randint(1, changes)) if draw.random() < 0.7 else Kill(seconds=draw.uniform(0, 0.4))
                for _ in range(draw.randint(1, 5))
            ]
            done += finish(job, kills)
            compare(whole, job)
            print(f"{done} killed; {job.claims.variant}, dev rows {dev}: {kills}: equal", flush=True)


if __name__ == "__main__":
    main()
