"""How long `multisbora --help` takes, against a bare Python that does nothing.

Run it with the environment's Python: `.venv/bin/python scripts/bench_startup.py`. The two commands take turns, after
one unmeasured run of each; the medians and their ratio are printed.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

BUDGET_SECONDS = 0.3


def seconds(command: list[str]) -> float:
    """Wall time of one run of `command`, in seconds. Raises CalledProcessError where it fails."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15, help="measured runs of each command (default: 15)")
    runs = parser.parse_args().runs
    if runs < 1:
        parser.error(f"--runs is {runs}: give 1 or more")
    script = Path(sys.executable).with_name("multisbora")
    if not script.is_file():
        parser.error(f"{script} does not exist: run this with the Python that multisbora is installed in")
    commands = {"python -c pass": [sys.executable, "-c", "pass"], "multisbora --help": [str(script), "--help"]}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for run in range(runs + 1):
        for name, command in commands.items():
            taken = seconds(command)
            if run:  # the first run only warms the disk cache
                times[name].append(taken)
    bare, shown = (statistics.median(values) for values in times.values())
    for name, values in times.items():
        print(f"{name:18} {statistics.median(values):.3f} s (median of {runs}, {min(values):.3f} to {max(values):.3f})")
    print(f"ratio              {shown / bare:.1f}")
    print(f"budget             {BUDGET_SECONDS} s: {'held' if shown < BUDGET_SECONDS else 'MISSED'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
