"""The processes that train tasks: one after another on this machine, or where a Ray cluster puts them.

Each trains one task, with its output in the task's log, and gives an answer or is killed. What they share with one
another and with whoever started them is the project's folder, at the same path everywhere, and the registry; nothing is
shipped. Importing this module loads neither Ray nor torch.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from . import __version__
from .commands import quiet_libraries, train_task
from .errors import MultisboraError, TrainingError
from .hub import local_folder
from .project import PROJECT_FILE, Project

WORKER_FILE = "worker.json"  # in the folder of a run: where its process is
_PATIENCE = 120  # seconds for a node to say what it sees, of which most go into the start of a worker
_CONNECT_SECONDS = 10


@dataclass(frozen=True)
class Job:
    """One task's training, as the process that does it gets it.

    Attributes:
        folder: the project's, and the process's working folder.
        overrides: of the recipe, "training.epochs=1".
        cpus, gpus, memory: what Ray sets aside for it; memory in bytes. The local engine sets nothing aside.
        attempt: 1, and one more after each time that its process was killed.
        token: of this attempt.
    """

    project: Project
    folder: Path
    task: str
    overrides: tuple[str, ...]
    max_steps: int | None = None
    cpus: int = 0
    gpus: int = 0
    memory: int = 0
    attempt: int = 1
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def adapter(self) -> Path:
        """Like all its paths, relative to the project's folder."""
        return self.project.adapter(self.task)

    @property
    def run(self) -> Path:
        return self.adapter.with_name(f"{self.task}.run")

    @property
    def log(self) -> Path:
        """What the task's processes print. Beside the adapter: that folder is not there before the task is trained."""
        return self.adapter.with_name(f"{self.task}.log")

    @property
    def resources(self) -> dict[str, int]:
        """What was asked of Ray, if anything."""
        return {"cpus": self.cpus, "gpus": self.gpus, "memory": self.memory} if self.cpus else {}

    def to_json(self) -> str:
        """One line that `from_json` reads."""
        return json.dumps(vars(self) | {"project": self.project.model_dump(mode="json"), "folder": str(self.folder)})

    @classmethod
    def from_json(cls, line: str | bytes) -> Job:
        content = json.loads(line)
        plain = {"project": Project.of(**content["project"]), "folder": Path(content["folder"])}
        return cls(**(content | plain | {"overrides": tuple(content["overrides"])}))

    def again(self) -> Job:
        return replace(self, attempt=self.attempt + 1, token=uuid.uuid4().hex)


def work(job: Job) -> dict[str, Any]:
    """Train one task in this process, whose output goes to the task's log. Ray and the local engine call this.

    Returns:
        `TrainResult.to_json()`, or `{"error": line}`.
    """
    os.chdir(job.folder)
    # As on the command line: what these say while they are imported is of no use.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with _output_into(job.log), _here(job):
        where = f"on {socket.gethostname()}, process {os.getpid()}"
        _print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S%z')} task {job.task}, attempt {job.attempt} {where}")
        try:
            found = train_task(
                job.project, job.task, job.overrides, None, dry_run=False, say=_print, quiet=quiet_libraries
            )
        except (MultisboraError, OSError) as error:
            _print(f"multisbora: {error}")
            return {"error": str(error)}
        except Exception as error:  # of a library: whatever it is, the other tasks go on
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {_first_line(error)}"}
        return found.to_json()


def _print(message: str) -> None:
    print(message, flush=True)


@contextlib.contextmanager
def _output_into(log: Path) -> Iterator[None]:
    """What Python prints here goes to the end of a file, and what the libraries below it print as well."""
    log.parent.mkdir(parents=True, exist_ok=True)
    kept = os.dup(1), os.dup(2)
    with log.open("a", encoding="utf-8", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            for number, copy in enumerate(kept, 1):
                os.dup2(copy, number)
                os.close(copy)


@contextlib.contextmanager
def _here(job: Job) -> Iterator[None]:
    """Say in the folder of the run where its process is. A folder without anything else in it does not stay."""
    if job.adapter.exists() and not job.run.exists():  # whoever trained it meanwhile: an adapter has no run beside it
        yield
        return
    job.run.mkdir(parents=True, exist_ok=True)
    file = job.run / WORKER_FILE
    file.write_text(json.dumps({"token": job.token, "host": socket.gethostname(), "pid": os.getpid()}))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
            job.run.rmdir()


class KilledError(Exception):
    """The process of a task ended without an answer."""


class Workers(Protocol):
    """An engine: it starts jobs, `slots` of them at a time, and is asked again and again for their answers."""

    slots: float

    def start(self, job: Job) -> Any: ...

    def answer(self, started: Any) -> dict[str, Any] | None:
        """What `work` gave; None while it is at it.

        Raises:
            KilledError: it will never give anything.
        """

    def stop(self, started: Sequence[Any]) -> None: ...


class LocalProcesses:
    """One process at a time, on this machine."""

    slots: float = 1

    def __enter__(self) -> LocalProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, job: Job) -> Any:
        # Not by multiprocessing, whose helper complains on stderr about what a killed process leaves behind.
        code = f"import sys; sys.path[:] = {sys.path!r}; from multisbora.workers import serve; serve()"
        # In a session of its own it does not hear Ctrl-C, which is for the process that started it.
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{job.to_json()}\n".encode())
            process.stdin.flush()
        return process

    def answer(self, started: Any) -> dict[str, Any] | None:
        code = started.poll()
        if code is None:
            return None
        with started:  # closes its pipes
            said = started.stdout.read()
        if code == 0:
            return json.loads(said)  # type: ignore[no-any-return]
        raise KilledError(signal.Signals(-code).name if code < 0 else f"exit code {code}")

    def stop(self, started: Sequence[Any]) -> None:
        for process in started:
            with process:
                process.kill()


def serve() -> None:
    """What a process of the local engine runs: a `Job` in from its parent, the answer out, both as JSON.

    Its stdin stays open as long as the parent lives. When that ends, so does this process.
    """
    job = Job.from_json(sys.stdin.buffer.readline())

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    answer = work(job)
    sys.stdout.write(json.dumps(answer))
    sys.stdout.flush()
    os._exit(0)  # not through the clean-up of an interpreter whose stdin another thread is reading


class RayCluster:
    """A Ray cluster: one that runs, or one on this machine that ends with the block."""

    slots: float = math.inf

    def __init__(self, address: str | None) -> None:
        # Ray reads this when it starts, and reports to its makers otherwise.
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        try:
            import ray
        except ImportError:
            raise TrainingError("--engine ray needs the package ray: pip install 'multisbora[ray]'") from None
        self._ray: Any = ray
        self._address = address or os.environ.get("RAY_ADDRESS") or "local"
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> RayCluster:
        with contextlib.ExitStack() as stack:
            # A thread of Ray's prints on stdout, whatever its settings are, when a process dies.
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
            if self._address == "local":
                options |= {"include_dashboard": False, "object_store_memory": 100 * 2**20}
            else:
                _knock(self._address)
            try:
                self._ray.init(address=self._address, **options)
            except (OSError, RuntimeError, ValueError, self._ray.exceptions.RayError, SystemExit) as error:
                where = "could not be started" if self._address == "local" else f"at {self._address} was not joined"
                raise TrainingError(f"a Ray cluster {where}: {_first_line(error)}") from None
            stack.callback(self._ray.shutdown)
            self._work = self._ray.remote(max_calls=1, max_retries=0)(work)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def nodes(self) -> list[dict[str, float]]:
        """The resources, in Ray's words, of every node that tasks can be on."""
        return [node["Resources"] for node in self._nodes()]

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]

    def look(self, project: Project, folder: Path) -> None:
        """Ask every node whether it sees the project's folder, the base model and this version of multisbora.

        Raises:
            TrainingError: one does not.
        """
        if self._address == "local":
            return
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        base = local_folder(project.model)
        Path(project.adapters).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=project.adapters, prefix=".shared-") as mark:
            sights = (folder / PROJECT_FILE, folder / mark.name, *([folder / base] if base else []))
            look = self._ray.remote(num_cpus=0, max_retries=0)(_look)
            asked = {
                look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                    sights
                ): node["NodeManagerHostname"]
                for node in self._nodes()
            }
            for ref, host in asked.items():
                try:
                    version, unseen = self._ray.get(ref, timeout=_PATIENCE)
                except self._ray.exceptions.RayError as error:
                    raise TrainingError(f"node {host} cannot run multisbora: {_last_line(error)}") from None
                if version != __version__:
                    raise TrainingError(f"node {host} has multisbora {version}, not {__version__}: install the same")
                if unseen:
                    raise TrainingError(
                        f"node {host} does not see {unseen}: nodes need the project's folder and its base model at "
                        "the same path as here, on a file system that they share"
                    )

    def start(self, job: Job) -> Any:
        resources = {"num_cpus": job.cpus, "num_gpus": job.gpus, "memory": job.memory}
        return self._work.options(name=f"multisbora {job.task}", **resources).remote(job)

    def answer(self, started: Any) -> dict[str, Any] | None:
        done, _ = self._ray.wait([started], timeout=0)
        known = self._ray.exceptions
        try:
            return self._ray.get(started) if done else None
        except (
            known.LocalRayletDiedError,
            known.NodeDiedError,
            known.ObjectLostError,
            known.OutOfMemoryError,
            known.WorkerCrashedError,
        ) as error:
            raise KilledError(type(error).__name__) from None
        except known.RayError as error:
            return {"error": _last_line(error)}

    def stop(self, started: Sequence[Any]) -> None:
        for ref in started:
            self._ray.cancel(ref, force=True)
        if started:
            self._ray.wait(list(started), num_returns=len(started), timeout=10)


def _look(sights: Sequence[Path]) -> tuple[str, Path | None]:
    """The version of multisbora here, and the first of these paths that is not here."""
    return __version__, next((path for path in sights if not path.exists()), None)


def _knock(address: str) -> None:
    """Whether anything answers at HOST:PORT. Ray itself asks for minutes, and then ends the whole process.

    Raises:
        TrainingError: nothing does.
    """
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise TrainingError(
            f"no Ray cluster answers at {address} ({_first_line(error)}): give HOST:PORT of its head node, "
            "or leave --address and RAY_ADDRESS out to start Ray on this machine"
        ) from None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def _last_line(error: BaseException) -> str:
    """Ray puts the other process's traceback before what it said."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:300]
