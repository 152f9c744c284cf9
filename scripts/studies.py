"""What the studies share: `multisbora` commands, one after another or two at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def multisbora(folder: Path, arguments: list[str], threads: int | None = None) -> str:
    print(f"{folder.name}$ multisbora {' '.join(arguments)}", file=sys.stderr, flush=True)
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    done = subprocess.run(
        [sys.executable, "-m", "multisbora", *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(f"multisbora {arguments[0]} ended with exit code {done.returncode}")
    return done.stdout


def side_by_side(jobs: list[tuple[Path, list[str], Path | None]]) -> None:
    """Two commands at a time, with half of the cores each; a job's answer goes into its file, whole."""

    def run(job: tuple[Path, list[str], Path | None]) -> None:
        folder, command, target = job
        answer = multisbora(folder, command, threads=max(1, (os.cpu_count() or 1) // 2))
        if target is not None:
            partial = target.with_suffix(".partial")
            partial.write_text(answer)
            partial.replace(target)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, jobs))
