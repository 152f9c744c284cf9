"""Where the processes that train tasks are: one after another on this machine, or where a Ray cluster puts them.

A process gives an answer, or is killed. Importing this module loads neither Ray nor torch.
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from . import __version__
from .errors import TrainingError
from .hub import local_folder
from .project import PROJECT_FILE, Project
from .workers import Job, error_line, first_line, work

_PATIENCE = 120  # seconds for a node to say what it sees, of which most go into the start of a worker
_CONNECT_SECONDS = 10


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
        # A file that no one else has a name for: anything may print on stdout, and a pipe would have to be drained.
        file = tempfile.TemporaryFile()  # noqa: SIM115 - it is open for as long as the process runs
        # Not by multiprocessing, whose helper complains on stderr about what a killed process leaves behind.
        code = f"import sys; sys.path[:] = {sys.path!r}; from multisbora.engines import serve; serve({file.fileno()})"
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=[file.fileno()],
                start_new_session=True,  # it does not hear Ctrl-C, which is for the process that started it
            )
        except OSError as error:
            file.close()
            raise TrainingError(f"no process could be started for task {job.task}: {error_line(error)}") from None
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{job.to_json()}\n".encode())
            process.stdin.flush()
        return _Served(process, file)

    def answer(self, started: Any) -> dict[str, Any] | None:
        code = started.process.poll()
        if code is None:
            return None
        with started.file, started.process:  # closes its pipe
            started.file.seek(0)
            said = started.file.read()
        if code:
            raise KilledError(_signal_name(-code) if code < 0 else f"exit code {code}")
        try:
            answer = json.loads(said)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or not answer.keys() & {"error", "steps"}:
            raise KilledError("no answer")
        return answer

    def stop(self, started: Sequence[Any]) -> None:
        for served in started:
            with served.file, served.process:
                served.process.kill()


@dataclass(frozen=True, slots=True)
class _Served:
    """A process of the local engine, and the file that its answer goes into."""

    process: subprocess.Popen[bytes]
    file: IO[bytes]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most of the real-time signals have none
        return f"signal {number}"


def serve(into: int) -> None:
    """What a process of the local engine runs: a `Job` in from its parent on stdin, the answer out, both as JSON.

    Its stdin stays open as long as the parent lives. When that ends, so does this process.

    Args:
        into: the descriptor of a file that the answer goes to.
    """
    code = 1
    try:
        try:
            job = Job.from_json(sys.stdin.buffer.readline())
            threading.Thread(target=_end_with_parent, daemon=True).start()
            said = json.dumps(work(job))
        except BaseException as error:
            said = json.dumps({"error": error_line(error)})
        with os.fdopen(into, "wb") as file:
            file.write(said.encode())
        code = 0
    finally:
        os._exit(code)  # not through the clean-up of an interpreter whose stdin another thread is reading


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


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
                raise TrainingError(f"a Ray cluster {where}: {first_line(error)}") from None
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
        known = self._ray.exceptions
        try:
            done, _ = self._ray.wait([started], timeout=0)
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
            f"no Ray cluster answers at {address} ({first_line(error)}): give HOST:PORT of its head node, "
            "or leave --address and RAY_ADDRESS out to start Ray on this machine"
        ) from None


def _last_line(error: BaseException) -> str:
    """Ray puts the other process's traceback before what it said."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:300]
