"""Many tasks, one after another here or together on a Ray cluster: each in a process of its own, which may die.

A process that is killed (by a signal, for want of memory, with its node) is started again, and its run goes on from its
last checkpoint. An error that multisbora or a library raised would only be raised again, so it ends its task, and no
other. Ray alone decides what runs where; this module asks for resources and waits.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from .adapter import Adapter
from .board import Board
from .commands import claims_to_train, quiet_libraries, train_task
from .distributed import Processes
from .engines import KilledError, LocalProcesses, RayCluster, Workers
from .errors import AdapterError, GeometryError, MultisboraError, TrainingError, UsageError
from .geometry import Geometry
from .lifecycle import required
from .memory import find_config, predict_peak
from .plan import MatrixPlan, Plan
from .project import Project
from .recipe import Recipe, Training, load
from .registry.claims import TaskClaims
from .registry.replay import digests
from .workers import Job

Say = Callable[[str], None]
ENGINES = ("local", "ray")
RETRIES = 3
LIBRARY_BYTES = 600_000_000  # the interpreter with torch, transformers and peft: 530 MB, before they do anything
_QUANTIZED = {"nf4": 0.52, "int8": 1.01}  # bytes a weight, its scales included
_POLL_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one task.

    Attributes:
        state: "there already" where an adapter of the task's claims was found.
        result: `TrainResult.to_json()`, of a dry run where the state is "planned"; None if it failed or was there.
        resources: "cpus", "gpus" and "memory" in bytes that Ray was asked for; empty with the local engine.
    """

    state: Literal["trained", "there already", "failed", "planned"]
    attempts: int = 0
    error: str | None = None
    log: str | None = None
    result: dict[str, Any] | None = None
    resources: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What became of all tasks, in the order asked for."""

    engine: str
    tasks: dict[str, Outcome]

    @property
    def failure(self) -> str | None:
        """One line that names every task that failed, and its log."""
        failed = [f"{task} ({found.log})" for task, found in self.tasks.items() if found.state == "failed"]
        return f"{len(failed)} of {len(self.tasks)} tasks failed: {', '.join(failed)}" if failed else None

    def to_json(self) -> dict[str, Any]:
        return {"engine": self.engine, "tasks": {task: asdict(found) for task, found in self.tasks.items()}}

    def rows(self) -> list[tuple[object, ...]]:
        """As a table, heading first."""
        rows: list[tuple[object, ...]] = [("task", "state", "attempts", "steps", "tokens", "loss", "seconds")]
        if any(found.resources for found in self.tasks.values()):
            rows[0] += ("cpus", "gpus", "memory")
        for task, found in self.tasks.items():
            result = found.result or {}
            loss = result.get("loss")
            shown = (result.get("steps", "-"), result.get("tokens", "-"), "-" if loss is None else f"{loss:.4f}")
            rows.append((task, found.state, found.attempts, *shown, result.get("seconds", "-")))
            if len(rows[0]) > len(rows[-1]):
                rows[-1] += tuple(found.resources.get(what, "-") for what in ("cpus", "gpus", "memory"))
        return rows


def train_tasks(
    project: Project,
    tasks: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    engine: str = "local",
    address: str | None = None,
    dry_run: bool = False,
    say: Say = lambda message: None,
) -> Outcomes:
    """Train tasks of the project in the working folder, each in a process of its own.

    A task whose adapter is there, of the claims that it holds, is left as it is: a second call does what is left.
    An interrupt (Ctrl-C, SIGTERM) stops all processes; their checkpoints stay.

    Args:
        overrides: of every task's recipe.
        engine: "local" trains one after another on this machine, "ray" as many at once as the cluster has room for.
        address: of a running Ray cluster; None takes RAY_ADDRESS, else starts Ray on this machine for this call.
        dry_run: check everything, plan, and train nothing.

    Raises:
        UsageError: no task or an unknown one, a recipe with faults, an engine or address that cannot be, or a
            launcher's process.
        RegistryError: a task without claims.
        AdapterError: an adapter of other claims is in the way, or is damaged.
        TrainingError: Ray is not installed or not reached, a node lacks the project, a task fits on no node, the
            registry is a file and the nodes are several, or the call was interrupted.
    """
    if not tasks:
        raise UsageError("no task to train was named: name at least one")
    if engine not in ENGINES:
        raise UsageError(f"engine {engine!r} is unknown: use {' or '.join(ENGINES)}")
    if address is not None and engine != "ray":
        raise UsageError("--address is of a Ray cluster: add --engine ray")
    if Processes.promised().count > 1:
        raise UsageError("--tasks trains each task in one process: under torchrun or accelerate, name one with --task")
    recipes = {task: load(task, Path(project.recipes), overrides) for task in tasks}
    claims = _claims(project, recipes)
    missing = [task for task in recipes if not _is_there(project, claims[task], dry_run)]
    outcomes = {task: Outcome("there already") for task in recipes if task not in missing}
    for task in outcomes:
        say(f"{task}: {project.adapter(task)} is there already; move or delete it to train the task anew")
    jobs = [Job(project, Path.cwd(), task, tuple(overrides), recipes[task].training.max_steps) for task in missing]
    if jobs:
        project.base(say)  # fetched once, before several processes would do it
        with LocalProcesses() if engine == "local" else RayCluster(address) as workers:
            if isinstance(workers, RayCluster):
                jobs = _place(jobs, recipes, claims, workers.nodes(), say)
                if not dry_run:
                    workers.look(project, Path.cwd())
            outcomes |= _plan(jobs, say) if dry_run else _drive(jobs, claims, workers, say)
    return Outcomes(engine, {task: outcomes[task] for task in recipes})


def _claims(project: Project, tasks: Mapping[str, Recipe]) -> dict[str, TaskClaims]:
    with required(project, next(iter(tasks))) as registry:
        return {task: claims_to_train(project, registry, task) for task in tasks}


def _is_there(project: Project, claims: TaskClaims, dry_run: bool) -> bool:
    """Whether the task's adapter is, trained on the claims that it holds, and its run is over."""
    folder = project.adapter(claims.task)
    if not folder.exists() or folder.with_name(f"{folder.name}.run").exists():
        return False
    adapter = Adapter.read(folder)
    with required(project) as registry:
        with registry.reading() as reader:
            known = digests(reader, project.model_name, claims.task)
        if adapter.claim_digest not in known:
            raise AdapterError(f"{folder} was trained on other claims: move or delete it to train {claims.task} anew")
        if claims.stage != "trained" and not dry_run:  # its process was killed before it could say so
            registry.mark(claims, "trained", {"adapter_digest": adapter.digest})
    return True


def _place(
    jobs: Sequence[Job],
    recipes: Mapping[str, Recipe],
    claims: Mapping[str, TaskClaims],
    nodes: Sequence[Mapping[str, Any]],
    say: Say,
) -> list[Job]:
    """The jobs, with what each asks Ray for: a GPU where there are any, its predicted memory, and a share of the CPUs.

    Raises:
        TrainingError: a job that fits on no node, or a registry that several nodes cannot share.
    """
    project = jobs[0].project
    gpus = 1 if any(node.get("GPU", 0) >= 1 for node in nodes) else 0
    usable = [node for node in nodes if node.get("GPU", 0) >= gpus]
    if not usable:
        raise TrainingError("the Ray cluster has no node with a CPU: start one with `ray start --num-cpus N`")
    if len(usable) > 1 and project.registry.startswith("sqlite"):
        raise TrainingError(
            f"the registry is an SQLite file, and the Ray cluster has {len(usable)} nodes: "
            "a PostgreSQL registry is what they can share (docs/registry.md says how to move to one)"
        )
    share = sum(int(node["CPU"]) for node in usable) // len(jobs)
    cpus = 1 if gpus else max(1, min(share, *(int(node["CPU"]) for node in usable)))
    say("predicting the memory of each task on a model without weights: up to a minute")
    with required(project) as registry:
        there = registry.measured(project.model_name).keys()
        groups = [set(group) for group in registry.compositions(project.model_name).values()]
    geometry = project.base_geometry(project.base())
    from .penalty import MOST_BYTES, block_bytes

    known: dict[Any, int] = {}
    placed = []
    for job in jobs:
        held, training = claims[job.task], recipes[job.task].training
        needed = _memory(project, held, training, on_gpu=bool(gpus), known=known, say=say)
        met = {other for group in groups if job.task in group for other in group} - {job.task}
        size = block_bytes(held, geometry)
        if training.isolate or (training.isolate is None and met & there and size <= MOST_BYTES):
            needed += 3 * size  # one task's as it was read, the sum of all, and its copy in the model
        placed.append(replace(job, cpus=cpus, gpus=gpus, memory=needed))
    largest = int(max(node.get("memory", 0) for node in usable))
    if unfit := [job for job in placed if job.memory > largest]:
        job, others = max(unfit, key=lambda job: job.memory), len(unfit) - 1
        raise TrainingError(
            f"task {job.task} needs {job.memory:,} bytes of memory, and no node of the Ray cluster has more than "
            f"{largest:,}" + (f" ({others} more tasks do not fit either)" if others else "") + ": lower "
            "training.micro_batch_size or training.cutoff with --set, or add a larger node"
        )
    return placed


def _memory(
    project: Project,
    claims: TaskClaims,
    training: Training,
    *,
    on_gpu: bool,
    known: dict[Any, int],
    say: Say,
) -> int:
    """Bytes of a node's memory that a task's process takes, if every row were as long as training.cutoff.

    Args:
        on_gpu: the node's memory then only sees the base come by.
        known: what was found out before, since tasks are often alike.
    """
    geometry = project.base_geometry(project.base())
    ranks = tuple((module, region.rank) for module, region in claims.regions.items())
    rows = training.micro_batch_size or training.batch_size
    settings = (training.gradient_checkpointing, training.dropout)
    key = (claims.variant, ranks, rows, training.cutoff, training.quantization, settings)
    if key not in known:
        matrices = (MatrixPlan(geometry.find(module), claims.variant, rank, 0, 0) for module, rank in ranks)
        plan = Plan(geometry.model, claims.variant, claims.rank, 1, tuple(matrices))
        config = find_config(project.model)
        try:
            peak = predict_peak(
                config, plan, rows, training.cutoff, gradient_checkpointing=settings[0], dropout=settings[1]
            )
        except (GeometryError, UsageError) as error:
            say(f"{claims.task}: its memory cannot be predicted, so Ray is asked for that of the libraries: {error}")
            known[key] = LIBRARY_BYTES
        else:
            spared = _spared(geometry, training.quantization, peak.base) if not on_gpu else 0
            known[key] = (peak.base if on_gpu else peak.peak - spared) + LIBRARY_BYTES
    return known[key]


def _spared(geometry: Geometry, quantization: str | None, base: int) -> int:
    """Bytes by which a quantised base is smaller than one of `base` bytes in 16 bits. Experts are not quantised."""
    if quantization is None:
        return 0
    weights = sum(math.prod(matrix.shape) for matrix in geometry.matrices if not matrix.is_expert)
    return min(base, int(weights * (2 - _QUANTIZED[quantization])))


def _plan(jobs: Sequence[Job], say: Say) -> dict[str, Outcome]:
    """What would be trained, each task checked as its run would check it."""
    found = {}
    for job in jobs:
        try:
            result = train_task(
                job.project, job.task, job.overrides, None, dry_run=True, say=say, quiet=quiet_libraries
            )
        except MultisboraError as error:
            say(f"{job.task}: would fail: {error}")
            found[job.task] = Outcome("failed", error=str(error), resources=job.resources)
        else:
            found[job.task] = Outcome("planned", result=result.to_json(), resources=job.resources)
    return found


def _drive(jobs: Sequence[Job], claims: Mapping[str, TaskClaims], workers: Workers, say: Say) -> dict[str, Outcome]:
    """Have all jobs done; those whose process is killed again, until it was too often.

    Whatever ends this before its time stops all processes.
    """
    found: dict[str, Outcome] = {}
    waiting, running = deque(jobs), dict[str, tuple[Job, Any]]()
    with Board(jobs, say) as board, _terminated_as_interrupted():
        try:
            while waiting or running:
                while waiting and len(running) < workers.slots:
                    job = waiting.popleft()
                    running[job.task] = job, workers.start(job)
                for job, started in list(running.values()):
                    try:
                        answer = workers.answer(started)
                    except KilledError as error:
                        answer = _after_kill(job, claims[job.task], error)
                        if answer is None:
                            board.killed(job, str(error), RETRIES)
                            waiting.appendleft(job.again())
                            del running[job.task]
                    if answer is not None:
                        found[job.task] = _outcome(job, answer)
                        board.ended(job, found[job.task].state, found[job.task].error, answer)
                        del running[job.task]
                board.look([job for job, _ in running.values()])
                time.sleep(_POLL_SECONDS)
        except BaseException as error:
            with contextlib.suppress(Exception):  # what ended it is what a person needs to hear of
                workers.stop([started for _, started in running.values()])
            if not isinstance(error, KeyboardInterrupt):
                raise
            left = ", ".join(job.task for job in jobs if job.task not in found)
            raise TrainingError(f"interrupted: run the same command again, and {left} will go on or start") from None
    return found


def _after_kill(job: Job, claims: TaskClaims, error: KilledError) -> dict[str, Any] | None:
    """The answer that a killed process has left behind, or that stands for one; None to start it again."""
    try:
        if _is_there(job.project, claims, dry_run=False):
            return {}
    except MultisboraError as told:  # the adapter is damaged, or the registry cannot be reached: the others go on
        return {"error": f"its process was killed ({error}), and what it left cannot be read: {told}"}
    if job.attempt > RETRIES:
        return {"error": f"its process was killed {job.attempt} times ({error}), for want of memory perhaps"}
    return None


def _outcome(job: Job, answer: dict[str, Any]) -> Outcome:
    error = answer.get("error")
    return Outcome(
        "trained" if error is None else "failed",
        job.attempt,
        error,
        str(job.log),
        answer if answer and error is None else None,
        job.resources,
    )


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does: a batch system's way to stop a job must not leave its processes behind.

    Python lets the main thread alone say so, and cannot put back what something else than Python has set.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is None:
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
