"""What a process does that trains one of several tasks: its output goes into the task's log, and it gives an answer.

What such processes share with one another and with whoever started them is the project's folder, at the same path
everywhere, and the registry; nothing is shipped. Importing this module does not load torch.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import socket
import time
import traceback
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .commands import quiet_libraries, train_task
from .errors import MultisboraError, TrainingError
from .project import Project
from .run import refuse_held

WORKER_FILE = "worker.json"  # in the folder of a run: where its process is
_LONGEST_ERROR = 2000  # characters


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
        `TrainResult.to_json()`, or `{"error": line}` of whatever was raised.
    """
    try:
        os.chdir(job.folder)
        refuse_held(job.run)  # whoever holds it has the log as well
        # As on the command line: what these say while they are imported is of no use.
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        with _output_into(job.log):
            return _train(job)
    except Exception as error:  # of a library: whatever it is, the other tasks go on
        return {"error": error_line(error)}


def _train(job: Job) -> dict[str, Any]:
    where = f"on {socket.gethostname()}, process {os.getpid()}"
    _print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S%z')} task {job.task}, attempt {job.attempt} {where}")
    with contextlib.ExitStack() as held:
        try:
            return train_task(
                job.project,
                job.task,
                job.overrides,
                None,
                dry_run=False,
                say=_print,
                quiet=quiet_libraries,
                on_start=lambda: held.enter_context(_here(job)),
            ).to_json()
        except BaseException as error:
            plain = isinstance(error, MultisboraError | OSError)
            _print(f"multisbora: {error}" if plain else traceback.format_exc().rstrip())
            raise


def error_line(error: BaseException) -> str:
    """What an error says, in a line for a person. Our own errors are one; others go by their first and their type."""
    if not isinstance(error, MultisboraError | OSError):
        return f"{type(error).__name__}: {first_line(error)}"
    text = str(error)
    return text if len(text) <= _LONGEST_ERROR else f"{text[:_LONGEST_ERROR]}..."


def _print(message: str) -> None:
    print(message, flush=True)


class _Log(io.FileIO):
    """A file that drops what there is no room for: for want of a log, nothing that was learned may be lost."""

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            super().write(data)
        return memoryview(data).nbytes


@contextlib.contextmanager
def _output_into(log: Path) -> Iterator[None]:
    """What Python prints here goes to the end of a file, and what the libraries below it print as well.

    Raises:
        TrainingError: there can be no such file.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        raw = _Log(log, "a")
    except OSError as error:
        raise TrainingError(
            f"the log {log} cannot be written ({error.strerror}): move away what is in its place, "
            "or choose a folder for adapters that can be written"
        ) from None
    kept = os.dup(1), os.dup(2)
    with io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", write_through=True) as file:
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
    """Say in the folder of the run, which this process holds, that it is here."""
    file, content = job.run / WORKER_FILE, {"token": job.token, "host": socket.gethostname(), "pid": os.getpid()}
    file.write_text(json.dumps(content))
    try:
        yield
    finally:
        # The folder is gone if all went well. If not, somebody else may hold it by now.
        with contextlib.suppress(OSError):
            if file.read_text() == json.dumps(content):
                file.unlink()


def first_line(error: BaseException) -> str:
    """What an error says first, or else its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
