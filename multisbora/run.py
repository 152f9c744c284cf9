"""The folder of one run: who holds it, the settings that it was started with, and the checkpoint it goes on from."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .adapter import CONFIG_FILE
from .errors import TrainingError

RUN_FILE = "run.json"
ISOLATION_FILE = "isolation.safetensors"  # what the run is isolated from, see `penalty`
LOCK_FILE = ".lock"
METRICS_FILE = "metrics.jsonl"
_MACHINE = "machine"


@contextlib.contextmanager
def hold_run(run: Path) -> Iterator[None]:
    """Hold the folder of a run. A second process that trains the same task would go on from this one's checkpoints.

    Raises:
        TrainingError: another process holds it, or it is an adapter.
    """
    _refuse_adapter(run)
    run.mkdir(parents=True, exist_ok=True)
    with (run / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(run) from None
        yield


def refuse_held(run: Path) -> None:
    """For who would write about the run beside its folder. It may be held the moment after.

    Raises:
        TrainingError: another process holds it.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), (run / LOCK_FILE).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(run) from None


def remove_run(run: Path) -> None:
    """Delete the folder of a run that is over.

    Raises:
        TrainingError: it is an adapter.
    """
    _refuse_adapter(run)
    shutil.rmtree(run)


def _in_use(run: Path) -> TrainingError:
    return TrainingError(f"{run} is in use: another process is training this task; wait for it or stop it")


def _refuse_adapter(run: Path) -> None:
    """A task may be called as the folder of another one's run: an old registry may hold it, or somebody made it."""
    if (run / CONFIG_FILE).exists():
        raise TrainingError(
            f"{run} holds an adapter, and the run of task {run.stem} would go there: "
            f"give task {run.name} another name with `multisbora registry rename`, or move that folder"
        )


def enter_run(run: Path, settings: dict[str, Any], files: Iterable[str], say: Callable[[str], None]) -> str | None:
    """The last checkpoint of an interrupted run, whose settings must be the same; a new run where there is none.

    Args:
        files: names of those that a checkpoint must have.

    Raises:
        TrainingError: its settings were others, or cannot be read.
    """
    kept, checkpoint = run / RUN_FILE, last_checkpoint(run, files)
    if checkpoint is not None:
        before = {key: value for key, value in _read(kept).items() if key != _MACHINE}
        _refuse_changes(run, "with other settings", before, settings, "set them back to go on")
        say(f"going on from {checkpoint}")
        return str(checkpoint)
    if kept.is_file():
        say("an interrupted run left no checkpoint: starting anew")
    _write(kept, settings)
    return None


def keep_machine(run: Path, machine: dict[str, Any], say: Callable[[str], None]) -> None:
    """Note what a new run computes with, or compare it with what an interrupted one did. After `enter_run`.

    Args:
        machine: what the bits of a result hang on and no setting says. "threads" alone may change: sums of many numbers
            are then rounded in another way, and on a GPU nothing is.

    Raises:
        TrainingError: the interrupted run computed with something else.
    """
    content = _read(run / RUN_FILE)
    if _MACHINE not in content:
        _write(run / RUN_FILE, {**content, _MACHINE: machine})
        return
    before, after = dict(content[_MACHINE]), dict(machine)
    threads = before.pop("threads", None), after.pop("threads", None)
    _refuse_changes(run, "that computed with something else", before, after, "go on with the same again")
    if threads[0] != threads[1]:
        say(
            f"the interrupted run computed in {threads[0]} threads, this one in {threads[1]}: "
            "the last bits of its adapter may be others than without the interruption (set OMP_NUM_THREADS)"
        )


def last_checkpoint(run: Path, files: Iterable[str]) -> Path | None:
    """The last whole checkpoint. Any that are not are deleted: left by a kill while they were written or removed.

    One that names another as the best so far is of no use without that one.
    """
    named = ("trainer_state.json", *files)
    found = sorted((_step(path), path) for path in run.glob("checkpoint-*"))
    best = {step: _best_step(path) for step, path in found if _is_whole(path, named)}
    usable = [step for step in best if best[step] is None or best[step] in best]
    for step, path in found:
        if step not in usable:
            shutil.rmtree(path)
    return dict(found)[usable[-1]] if usable else None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _best_step(checkpoint: Path) -> int | None:
    found: int | None = json.loads((checkpoint / "trainer_state.json").read_bytes()).get("best_global_step")
    return found


def _is_whole(checkpoint: Path, files: Iterable[str]) -> bool:
    # The Trainer writes its state last. After a power cut the files before it may be short or missing all the same.
    if not all((checkpoint / name).is_file() for name in files):
        return False
    try:
        for path in checkpoint.glob("*.json"):
            json.loads(path.read_bytes())
        for path in checkpoint.glob("*.safetensors"):
            with safe_open(path, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return True


def _refuse_changes(run: Path, what: str, before: dict[str, Any], after: dict[str, Any], remedy: str) -> None:
    before, after = _flat(before), _flat(after)
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    if changed:
        shown = "; ".join(f"{key} was {before.get(key)!r}, is {after.get(key)!r}" for key in changed[:5])
        raise TrainingError(
            f"{run} holds an interrupted run {what} ({shown}): {remedy}, or delete that folder to start anew"
        )


def _read(kept: Path) -> dict[str, Any]:
    try:
        content = json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise TrainingError(f"{kept} is missing or damaged: delete that folder to start anew")
    return content


def _write(kept: Path, content: dict[str, Any]) -> None:
    partial = kept.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
    partial.replace(kept)


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(settings, dict):
        return {prefix: settings}
    return {
        key: value
        for name, inner in settings.items()
        for key, value in _flat(inner, f"{prefix}.{name}" if prefix else name).items()
    }
