"""What the sections of bench_merge.py share: its inputs, its runs in turns, and what is said of them."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from figures import Budget
from measured import make_cold, make_warm, run
from synthetic import LLAMA_3B, TOY, Shape, name_of, write_model, write_task

BASE_MEMORY = 300e6  # what a merge may take beside one matrix and the adapters
Run = dict[str, Any]


def _as_it_is(output: Path) -> None:
    """The check of an output that needs none."""


@dataclass(frozen=True)
class Job:
    """Something to measure.

    Attributes:
        inputs: the files that it reads.
        do: runs it into a folder.
        check: looks at that folder afterwards, and ends the script if it is not what it should be.
    """

    name: str
    inputs: tuple[Path, ...]
    do: Callable[[Path], Run]
    check: Callable[[Path], None] = _as_it_is


class Bench:
    """The inputs, the outputs and the runs of one call of this script."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.shape: Shape = TOY if options.quick else replace(LLAMA_3B, layers=options.layers)
        self.rank = 4 if options.quick else options.rank
        self.shard_size = self.shape.size() // 2 if options.quick else 5_000_000_000
        self.how_cold = ""  # how pages were put out of memory, in words
        self._fingerprints: dict[Path, str] = {}

    @property
    def setting(self) -> str:
        shape = self.shape
        words = f"{shape.size() / 1e9:.2f} GB of bf16, {shape.layers} layers, {shape.hidden} wide, rank {self.rank}"
        return f"{words}; {os.cpu_count()} CPU threads, {file_system(self.folder)}"

    def base(self, shape: Shape) -> Path:
        folder = self.folder / name_of(shape)
        if not folder.exists():
            self.say(f"writing {shape.size() / 1e9:.2f} GB of random weights")
            write_model(folder, shape, self.shard_size)
        return folder

    def task(self, shape: Shape, task: str) -> Path:
        """An adapter of the checkpoint of that shape."""
        from multisbora.geometry import from_checkpoint
        from multisbora.stream import fingerprint

        base = self.base(shape)
        if base not in self._fingerprints:
            self._fingerprints[base] = fingerprint(base, from_checkpoint(base))
        known = self._fingerprints[base]
        folder = self.folder / f"{base.name}-rank-{self.rank}" / task
        if folder.exists():
            content = json.loads((folder / "adapter_config.json").read_bytes())
            if content["base_fingerprint"] == known:
                return folder
            shutil.rmtree(folder)  # kept from a version that took fingerprints in another way
        folder.parent.mkdir(exist_ok=True)
        return write_task(folder, shape, task, self.rank, known)

    def tasks(self, shape: Shape, *tasks: str) -> list[Path]:
        return [self.task(shape, task) for task in tasks]

    def clean(self, everything: bool) -> None:
        """Delete what is here, or all of it but checkpoints and adapters that are whole."""
        for path in self.folder.iterdir():
            if everything or not path.name.startswith("llama-") or path.name.endswith(".partial"):
                shutil.rmtree(path)
        if everything:
            self.folder.rmdir()

    def say(self, words: str) -> None:
        print(words, file=sys.stderr, flush=True)

    def work(self, work: str, python: str = sys.executable, **arguments: Any) -> Run:
        """One piece of work of merge_work.py, measured."""
        script = Path(__file__).with_name("merge_work.py")
        text = json.dumps(arguments, default=str)
        offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = run([python, str(script), work, text], offline)
        found: Run = json.loads(done.output.splitlines()[-1])
        return found | {"peak": max(found["peak"], done.peak), "anonymous": done.anonymous, "process": done.seconds}

    def merge_job(self, base: Path, adapters: list[Path], name: str = "multisbora") -> Job:
        inputs = (*files(base), *(file for adapter in adapters for file in files(adapter)))
        return Job(name, inputs, lambda out: self.work("merge", base=base, adapters=adapters, output=out))

    def copy_job(self, base: Path) -> Job:
        def copy(out: Path) -> Run:
            copied = run(["cp", "--reflink=never", "-r", str(base), str(out)])
            synced = run(["sync", *map(str, files(out)), str(out)])
            both = copied.seconds + synced.seconds
            return {"seconds": copied.seconds, "synced": both, "peak": copied.peak, "anonymous": copied.anonymous}

        return Job("cp", files(base), copy)

    @contextlib.contextmanager
    def ready(self, inputs: Sequence[Path], cache: str) -> Iterator[None]:
        """With inputs in memory or out of it, and nothing left to write."""
        os.sync()
        if cache == "cold":
            self.how_cold = make_cold(inputs)
        else:
            make_warm(inputs)
        yield

    def measure(self, job: Job, cache: str, section: str) -> Run:
        """One run; its output is looked at and deleted."""
        out = self.folder / job.name.replace(" ", "-")
        shutil.rmtree(out, ignore_errors=True)
        with self.ready(job.inputs, cache):
            found = job.do(out)
        job.check(out)
        shutil.rmtree(out)
        self.note(section, job.name, cache, found)
        return found

    def note(self, section: str, name: str, cache: str, found: Run) -> None:
        rounded = {key: round(value, 6) if isinstance(value, float) else value for key, value in found.items()}
        self.say(f"{section}: {name}, {cache}: {found['seconds']:.2f} s, {found['peak'] / 1e6:.0f} MB")
        if self.options.raw:
            line = json.dumps({"section": section, "what": name, "cache": cache, **rounded})
            with self.options.raw.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def rounds(self, jobs: Sequence[Job], cache: str, section: str, count: int) -> dict[str, list[Run]]:
        """Runs of each job, in turns."""
        found: dict[str, list[Run]] = {job.name: [] for job in jobs}
        for number in range(count):
            for job in jobs[:: -1 if number % 2 else 1]:
                found[job.name].append(self.measure(job, cache, section))
        return found

    def bound(self, shape: Shape, adapters: Sequence[Path]) -> float:
        """The memory that a merge may take, in bytes: one matrix, the adapters, 300 MB."""
        sizes = sum((adapter / "adapter_model.safetensors").stat().st_size for adapter in adapters)
        return shape.largest_adapted() + sizes + BASE_MEMORY

    def budgets(self, *budgets: Budget) -> list[Budget]:
        """None for a toy: its merges take no time beside starting one."""
        return [] if self.options.quick else list(budgets)


def digests(folder: Path) -> dict[str, str]:
    """Of every file under a folder."""

    def digest(path: Path) -> str:
        state = hashlib.sha256()
        with path.open("rb") as file:
            for piece in iter(lambda: file.read(4 << 20), b""):
                state.update(piece)
        return state.hexdigest()

    found = files(folder)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip((str(file.relative_to(folder)) for file in found), pool.map(digest, found), strict=True))


def files(folder: Path) -> tuple[Path, ...]:
    return tuple(path for path in sorted(folder.rglob("*")) if path.is_file())


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, lower quartile, upper quartile)."""
    if len(values) == 1:
        return (values[0],) * 3
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return middle, lower, upper


def ratios(ours: Sequence[Run], others: Sequence[Run], key: str) -> tuple[float, float, float]:
    """Quartiles of the ratios within the rounds: our seconds to the others' `key`."""
    return quartiles([one["seconds"] / other[key] for one, other in zip(ours, others, strict=True)])


def spread(values: tuple[float, float, float]) -> str:
    return f"{values[0]:.2f} ({values[1]:.2f} to {values[2]:.2f})"


def times(runs: Sequence[Run], key: str) -> list[str]:
    middle, lower, upper = quartiles([one[key] for one in runs])
    return [f"{middle:.2f}", f"{lower:.2f} to {upper:.2f}"]


def memory(runs: Sequence[Run]) -> list[str]:
    """The highest of the runs, in MB."""
    return [f"{max(one[key] for one in runs) / 1e6:.0f}" for key in ("peak", "anonymous")]


def file_system(folder: Path) -> str:
    """Its kind, as "ext4"."""
    done = subprocess.run(["df", "--output=fstype", str(folder)], capture_output=True, text=True, check=True)
    return done.stdout.split()[-1]
