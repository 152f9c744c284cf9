"""Runs of several processes, for test_distributed.py, which starts this file once as a program of its own.

The libraries take seconds to load and a launcher loads them in every process, so that this program loads them once and
forks the processes of every run, with the environment that torchrun gives them. What a run leaves in its folder is what
the tests look at: adapters, and of each process its exit code, stdout, stderr and what it noted.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ENDED = "ended.json"
NOTES = "notes"
BATCH = 4
LIMIT = 240  # seconds, after which a run is taken to hang
ROWS = 13  # the last step of an epoch has one example: one of two processes is left without
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "ACCELERATE_TORCH_DEVICE": "cpu",
}
Work = Callable[[int], None]


def run(
    folder: Path,
    work: Work,
    *,
    count: int = 2,
    where: Path | None = None,
    environ: dict[str, str] | None = None,
) -> None:
    """Start `count` processes that do `work(rank)`, and wait for their end. None is ended because another one failed.

    Args:
        folder: where what they say and note is kept.
        where: their working folder; `folder` if None.
    """
    from torch.distributed import TCPStore

    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    started = time.monotonic()
    launched = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    launched["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    pids = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            if count > 1:
                os.environ.update(launched, MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
            os.environ.update(environ or {})
            os.environ[NOTES] = str(folder / f"{NOTES}.{rank}")
            os.chdir(where or folder)
            _work(folder, work, rank)
        pids.append(pid)
    # torchrun keeps the store itself too, so that it outlives the process that fails first.
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    codes: dict[int, int] = {}
    while len(codes) < count:
        for rank, pid in enumerate(pids):
            if rank not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[rank] = os.waitstatus_to_exitcode(status)
        if time.monotonic() - started > LIMIT:
            for rank in range(count):
                if rank not in codes:
                    os.kill(pids[rank], signal.SIGKILL)
        time.sleep(0.02)
    del store
    texts = {name: [(folder / f"{name}.{rank}").read_text() for rank in range(count)] for name in ("stdout", "stderr")}
    ended_as = {"codes": [codes[rank] for rank in range(count)], **texts}
    (folder / ENDED).write_text(json.dumps(ended_as, indent=1))
    print(f"{folder.name}: {ended_as['codes']}, {time.monotonic() - started:.1f} s", flush=True)


def _work(folder: Path, work: Work, rank: int) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / f"{name}.{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    code = 0
    try:
        work(rank)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def note(**what: Any) -> None:
    """Keep something for the tests, in a file of this process."""
    with open(os.environ[NOTES], "a") as file:
        file.write(json.dumps(what) + "\n")


def shard_on_cpu() -> None:
    """Let accelerate shard on a CPU: it looks for FSDP only where it came up with accelerators."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    import multisbora.distributed
    import multisbora.trainer

    PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)
    multisbora.distributed.use_cpu = multisbora.trainer.use_cpu = lambda: False


def watch() -> None:
    """Note the rows of every micro-batch, and how parameters are kept after the first step."""
    from multisbora.sharding import local
    from multisbora.trainer import TaskTrainer

    original = TaskTrainer.training_step

    def training_step(self: Any, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        note(task=self.recipe.name, step=self.state.global_step, rows=inputs["rows"])
        if self.state.global_step == 1:
            kinds = {type(p.data).__name__ for p in self.model.parameters()}
            held = sum(local(p).numel() for p in self.model.parameters())
            note(kinds=sorted(kinds), held=held, all=sum(p.numel() for p in self.model.parameters()))
        return original(self, model, inputs, num_items_in_batch)

    TaskTrainer.training_step = training_step


@contextmanager
def at_step(step: int, do: Callable[[], object], rank: int | None = None) -> Iterator[None]:
    """Do something at the end of a step, in one process or in all."""
    from multisbora.metrics import Metrics

    original = Metrics.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        if state.global_step == step and rank in (None, args.process_index):
            do()

    Metrics.on_step_end = on_step_end
    try:
        yield
    finally:
        Metrics.on_step_end = original


def throw(error: BaseException) -> Any:
    raise error


def recipe(name: str, rows: Path, dev_size: int | None, **training: Any) -> Any:
    from multisbora.recipe import Recipe

    settings = {"epochs": 2, "batch_size": BATCH, "learning_rate": 0.05, "warmup_steps": 0}
    settings |= {"save_steps": 3, "logging_steps": 1} | ({} if dev_size is None else {"eval_steps": 3})
    return Recipe.model_validate(
        {
            "name": name,
            "prompt": "Q: {question} A: ",
            "train": str(rows),
            "dev_size": dev_size,
            "training": settings | training,
            "eval": {"data": "no-test.json", "metric": "number"},
        }
    )


class Task(NamedTuple):
    """A training: its output is named after it, its rows and claims are those of its variant."""

    name: str
    variant: str
    base: str = "llama"
    stop: int | None = None
    dropout: float = 0.0
    isolate: float = 0.0


def draw_claims(base: Path) -> dict[str, Any]:
    """Claims of an fa and, after it, an fb task."""
    from multisbora.allocator import allocate
    from multisbora.geometry import from_checkpoint
    from multisbora.registry import Registry

    geometry = replace(from_checkpoint(base), model="owner/tiny")
    targets = ["q_proj", "down_proj"]
    with Registry.open("sqlite://") as registry:
        for variant in ("fa", "fb"):
            allocate(registry, geometry, [variant], variant=variant, rank=3, target_modules=targets)
        found: dict[str, Any] = registry.claims("owner/tiny")
    return found


def draw_penalty(base: Path, claims: Any) -> Any:
    """What isolates a task from one whose moments are random."""
    from builders import draw_moments

    from multisbora.geometry import from_checkpoint
    from multisbora.penalty import Penalty
    from multisbora.stream import fingerprint

    geometry = replace(from_checkpoint(base), model="owner/tiny")
    return Penalty.of(claims, [draw_moments(geometry, "other", base_fingerprint=fingerprint(base, geometry))])


def train_tasks(folder: Path, claims: dict[str, Any], *tasks: Task) -> Work:
    """Train tasks of `folder` into the working folder: fa in micro-batches of one, fb with dev rows.

    A task with a `stop` is interrupted at the end of that step, and trained again.
    """

    def work(rank: int) -> None:
        from multisbora.train import train

        for task in tasks:
            micro, dev_size = (1, None) if task.variant == "fa" else (None, 5)
            rows = folder / f"{task.variant}.json"
            this = recipe(task.name, rows, dev_size, micro_batch_size=micro, dropout=task.dropout, isolate=task.isolate)
            held = claims[task.variant]
            given = (this, folder / task.base, held, Path("adapters", task.name))
            penalty = draw_penalty(folder / task.base, held) if task.isolate else None
            if task.stop is not None:
                with at_step(task.stop, partial(throw, KeyboardInterrupt())), suppress(KeyboardInterrupt):
                    train(*given, alpha=8)
                checkpoint = Path("adapters", f"{task.name}.run", "checkpoint-3")
                note(task=task.name, checkpoint=sorted(path.name for path in checkpoint.iterdir()))
            note(task=task.name, result=train(*given, alpha=8, penalty=penalty).to_json())

    return work


def command(*arguments: str) -> Work:
    """`multisbora` with these arguments, as typed."""

    def work(rank: int) -> None:
        import multisbora.cli

        sys.argv = ["multisbora", *arguments]
        multisbora.cli.main()

    return work


def after(first: Callable[[], object], work: Work, *, rank: int | None = None) -> Work:
    """`work` with something done before it, in one process or in all."""

    def both(this: int) -> None:
        if rank in (None, this):
            first()
        work(this)

    return both


def equal_runs(folder: Path) -> None:
    """The same tasks in one process and in two, plain and sharded, whole and interrupted."""
    tasks = partial(train_tasks, folder, draw_claims(folder / "llama"))
    both = Task("fa", "fa"), Task("fb", "fb")
    quiet = Task("quiet-fa", "fa", isolate=0.1), Task("quiet-fb", "fb", isolate=0.1)
    bf16 = Task("bf16", "fa", base="bf16")
    whole, resumed = Task("dropout", "fa", dropout=0.2), Task("resumed", "fa", stop=5, dropout=0.2)
    run(folder / "one", after(watch, tasks(*both, bf16, *quiet)), count=1)
    run(folder / "ddp", after(watch, tasks(*both, whole, resumed, *quiet)))
    sharded = after(watch, tasks(*both, bf16, Task("resumed", "fb", stop=5), *quiet))
    run(folder / "fsdp2", after(shard_on_cpu, sharded), environ=FSDP)


def failing_runs(folder: Path) -> None:
    """The command line in processes of which something goes wrong."""
    import importlib

    from multisbora.errors import DataError, TrainingError

    train = importlib.import_module("multisbora.train")
    adding = command("train", "--task", "adding")
    no_data = partial(setattr, train, "_prepare", lambda *_: throw(DataError("no rows here")))
    bug = partial(setattr, train, "_prepare", lambda *_: throw(KeyError("rows")))
    breaks = at_step(3, partial(throw, TrainingError("it breaks at step 3")), rank=1).__enter__
    dies = at_step(2, lambda: os.kill(os.getpid(), signal.SIGKILL), rank=1).__enter__
    cases: dict[str, tuple[Work, dict[str, str]]] = {
        "dry-run": (command("train", "--task", "adding", "--dry-run"), {}),
        "no-such-task": (command("train", "--task", "nothing"), {}),
        "odd-batch": (command("train", "--task", "adding", "--set", "training.batch_size=5"), {}),
        "no-data": (after(no_data, adding, rank=1), {}),
        "bug": (after(bug, adding, rank=0), {}),
        "other-data": (after(partial(other_data, train), adding, rank=1), {}),
        "breaks": (after(breaks, adding), {}),
        "killed": (after(dies, adding), {}),
        "fsdp-on-cpu": (adding, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
        "strangers": (after(forget_cpu, adding), {}),
        "trained": (adding, {}),
    }
    project = folder / "project"
    run(folder / "allocate", command("allocate", "--tasks", "adding"), count=1, where=project)
    for name, (work, environ) in cases.items():
        run(folder / name, work, where=project, environ=environ)


def other_data(train: Any) -> None:
    """Let this process find one row less than the others."""
    original = train.load_rows
    train.load_rows = lambda sources: original(sources)[1:]


def forget_cpu() -> None:
    """Leave accelerate alone, as a Trainer does that nobody tells to use the CPU."""
    import multisbora.distributed

    multisbora.distributed.use_cpu = lambda: False


if __name__ == "__main__":
    # Every process of every run needs what this loads and compiles once, and no collector has to walk through it.
    import datasets  # noqa: F401

    import multisbora.train  # noqa: F401
    from multisbora.loading import load_base, load_tokenizer

    started_in = Path(sys.argv[1])
    load_base(started_in / "llama")
    load_tokenizer(started_in / "llama")
    gc.freeze()
    equal_runs(started_in)
    failing_runs(started_in)
