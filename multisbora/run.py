"""The folder of one run: who holds it, the settings that it was started with, and the checkpoint it goes on from."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .errors import TrainingError

RUN_FILE = "run.json"
LOCK_FILE = ".lock"
METRICS_FILE = "metrics.jsonl"


@contextlib.contextmanager
def hold_run(run: Path) -> Iterator[None]:
    """Hold the folder of a run. A second process that trains the same task would go on from this one's checkpoints."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(
                f"{run} is in use: another process is training this task; wait for it or stop it"
            ) from None
        yield


def enter_run(run: Path, settings: dict[str, Any], say: Callable[[str], None]) -> str | None:
    """The last checkpoint of an interrupted run, whose settings must be the same; a new run where there is none."""
    kept, checkpoint = run / RUN_FILE, last_checkpoint(run)
    if checkpoint is not None:
        try:
            before = _flat(json.loads(kept.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            raise TrainingError(f"{kept} is missing or damaged: delete that folder to start anew") from None
        after = _flat(settings)
        changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
        if changed:
            shown = "; ".join(f"{key} was {before.get(key)!r}, is {after.get(key)!r}" for key in changed[:5])
            raise TrainingError(
                f"{run} holds an interrupted run with other settings ({shown}): "
                "set them back to go on, or delete that folder to start anew"
            )
        say(f"going on from {checkpoint}")
        return str(checkpoint)
    if kept.is_file():
        say("an interrupted run left no checkpoint: starting anew")
    partial = kept.with_suffix(".partial")
    partial.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
    partial.replace(kept)
    return None


def last_checkpoint(run: Path) -> Path | None:
    """The last whole checkpoint. Any that are not are deleted: left by a kill while they were written or removed."""
    found = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    whole = [path for path in found if _is_whole(path)]
    for path in found:
        if path not in whole:
            shutil.rmtree(path)
    return whole[-1] if whole else None


def _is_whole(checkpoint: Path) -> bool:
    # The Trainer writes its state last. After a power cut the files before it may be short all the same.
    try:
        for path in (checkpoint / "trainer_state.json", *checkpoint.glob("*.json")):
            json.loads(path.read_bytes())
        for path in checkpoint.glob("*.safetensors"):
            with safe_open(path, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return True


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(settings, dict):
        return {prefix: settings}
    return {
        key: value
        for name, inner in settings.items()
        for key, value in _flat(inner, f"{prefix}.{name}" if prefix else name).items()
    }
