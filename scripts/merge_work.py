"""One piece of work of bench_merge.py, in the process that it starts for it: `merge_work.py WORK JSON`.

Prints one JSON object: seconds of importing, seconds of the work itself, its peak of resident memory (VmHWM, bytes; of
the whole process, imports too), the seconds that it spent in fsync (added up over its threads), the bytes that the
kernel read from and wrote to a disk for it (/proc/self/io; whole pages), and the bytes that it gave to write calls.

Nothing but the standard library is imported before the clock runs, so that peers' environments can run it too.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Work = Callable[[], object]
_synced: list[float] = []


def prepare_merge(base: str, adapters: list[str], output: str) -> Work:
    from multisbora.merge import merge

    return lambda: merge(base, adapters, output=output)


def prepare_add(folder: str, adapter: str) -> Work:
    from multisbora.edit import add

    return lambda: add(folder, adapter)


def prepare_remove(folder: str, task: str) -> Work:
    from multisbora.edit import remove

    return lambda: remove(folder, task)


def prepare_reweight(folder: str, adapter: str, weight: float) -> Work:
    from multisbora.edit import reweight

    return lambda: reweight(folder, adapter, weight=weight)


def prepare_peft(base: str, loras: list[str], output: str, shard_size: int) -> Work:
    """As PEFT's documentation merges several adapters: load, load, merge_and_unload, save."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def work() -> None:
        names = [Path(lora).name for lora in loras]
        model = AutoModelForCausalLM.from_pretrained(base)  # in the dtype of the checkpoint
        tuned = PeftModel.from_pretrained(model, loras[0], adapter_name=names[0])
        for name, lora in zip(names[1:], loras[1:], strict=True):
            tuned.load_adapter(lora, adapter_name=name)
        merged = tuned.merge_and_unload(adapter_names=names)
        merged.save_pretrained(output, max_shard_size=shard_size)

    return work


def prepare_mergekit(base: str, models: list[str], output: str, shard_size: int) -> Work:
    """mergekit's task_arithmetic with all weights 1 and its own defaults; there is no tokenizer to copy."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = MergeConfiguration.model_validate(
        {
            "merge_method": "task_arithmetic",
            "base_model": base,
            "models": [{"model": model, "parameters": {"weight": 1.0}} for model in models],
            "parameters": {"normalize": False},
            "dtype": "bfloat16",
        }
    )
    options = MergeOptions(copy_tokenizer=False, out_shard_size=shard_size)
    return lambda: run_merge(config, output, options)


PREPARE: dict[str, Callable[..., Work]] = {
    "merge": prepare_merge,
    "add": prepare_add,
    "remove": prepare_remove,
    "reweight": prepare_reweight,
    "peft": prepare_peft,
    "mergekit": prepare_mergekit,
}


def _timed(sync: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(sync)
    def call(file: Any) -> None:
        start = time.perf_counter()
        try:
            sync(file)
        finally:
            _synced.append(time.perf_counter() - start)

    return call


def _counters(path: str) -> dict[str, int]:
    pairs = (line.replace(":", " ").split() for line in Path(path).read_text().splitlines())
    return {key: int(values[0]) for key, *values in pairs if values and values[0].isdigit()}


def main() -> None:
    work, arguments = sys.argv[1], json.loads(sys.argv[2])
    begin = time.perf_counter()
    do = PREPARE[work](**arguments)
    imported = time.perf_counter()
    os.fsync, os.fdatasync = _timed(os.fsync), _timed(os.fdatasync)
    before, start = _counters("/proc/self/io"), time.perf_counter()
    do()
    seconds = time.perf_counter() - start
    after = _counters("/proc/self/io")
    found: dict[str, Any] = {
        "imports": imported - begin,
        "seconds": seconds,
        "fsync": sum(_synced),
        "peak": 1024 * _counters("/proc/self/status")["VmHWM"],
        "read": after["read_bytes"] - before["read_bytes"],
        "written": after["write_bytes"] - before["write_bytes"],
        "counted": after["wchar"] - before["wchar"],
    }
    print("\n" + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
