"""Peak memory of training as `plan` predicts it and as it is, on SmolLM2-135M in bf16: fa, fb, and PEFT's LoRA.

Run it with the environment's Python: `.venv/bin/python scripts/bench_memory.py`. It takes about five minutes on two
cores. Each case is a process of its own that runs two steps of `multisbora.train`; for LoRA the same call, with PEFT's
adapter put in place of ours. Every token but a row's first is learned, as `plan` assumes.

Measured is the peak of the resident memory (VmHWM) less the resident memory when everything is imported and warm but
the model is not loaded. Three things to know about that figure:

- Weights are mapped from the safetensors file, so they become resident page by page as they are first read, and a
  page counts once. The count starts anew (/proc/self/clear_refs) when the model is loaded, so that nothing which only
  loading needed is in the peak.
- Imports are not the model's: a tiny model is trained first, so that the libraries that a first step loads, and the
  code that its kernels generate, are there before the count begins.
- glibc's malloc keeps freed blocks, up to 32 MB each, for later. That is no part of the prediction. Column "measured"
  is the process as users start it. Column "returned" is the same with MALLOC_MMAP_THRESHOLD_ set, which makes malloc
  give large blocks back at once: what is left of the difference is the prediction's own.

Exit code 1 if a prediction for fa or fb is more than 20% off "measured", or if trainable parameters or adapter bytes
differ at all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TOLERANCE = 0.20
METHODS = ("fa", "fb", "lora")
SHAPES = ((4, 128), (2, 512))
STEPS = 2


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}: this needs Linux")


def run_training(base: Path, work: Path, method: str, rank: int, batch_size: int, length: int) -> dict[str, int]:
    """Two steps of `multisbora.train`: the peak as the head of this file defines it, and the sizes of what came out."""
    import peft

    import multisbora.train  # noqa: F401  (the module; the package's attribute of that name is the function)
    from multisbora import Registry, allocate
    from multisbora.geometry import from_checkpoint
    from multisbora.recipe import Recipe

    training = sys.modules["multisbora.train"]
    geometry = from_checkpoint(base)
    rows = work / "rows.jsonl"
    # The prompt is one token, the target `length - 2`, and the end of sequence is the last.
    row = json.dumps({"prompt": "the", "target": " the" * (length - 2)})
    rows.write_text("\n".join([row] * batch_size), encoding="utf-8")
    recipe = Recipe.model_validate(
        {
            "name": "bench",
            "prompt": "{prompt}",
            "target": "target",
            "train": str(rows),
            "training": {"batch_size": batch_size, "max_steps": STEPS, "cutoff": length, "logging_steps": 1},
            "eval": {"data": str(work / "none.jsonl"), "metric": "number"},
        }
    )
    with Registry.open("sqlite://") as registry:
        variant = "fb" if method == "fb" else "fa"
        claims = allocate(registry, geometry, ["bench"], variant=variant, rank=rank).tasks["bench"]

    found: dict[str, int] = {}
    load_base, get_peft_model = training.load_base, peft.get_peft_model

    def load_and_reset(folder: Path) -> Any:
        found["before"] = resident("VmRSS")
        model = load_base(folder)
        Path("/proc/self/clear_refs").write_text("5")
        return model

    def get_lora(model: Any, config: Any) -> Any:
        lora = peft.LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=sorted(config.indices))
        return get_peft_model(model, lora)

    training.load_base = load_and_reset
    peft.get_peft_model = get_lora if method == "lora" else get_peft_model
    try:
        result = training.train(recipe, base, claims, work / "adapter", geometry=geometry)
    finally:
        training.load_base, peft.get_peft_model = load_base, get_peft_model
    if result.tokens != STEPS * batch_size * length:
        raise RuntimeError(f"{result.tokens} tokens were trained on, not {STEPS} x {batch_size} x {length}")
    return {
        "peak": resident("VmHWM") - found["before"],
        "trainable_parameters": result.trainable_parameters,
        "adapter_bytes": (work / "adapter" / "adapter_model.safetensors").stat().st_size,
    }


def tiny_copy(base: Path, folder: Path) -> Path:
    """A model of the base's kind and tokenizer with one narrow layer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = AutoConfig.from_pretrained(base)
    config.update({"num_hidden_layers": 1, "hidden_size": 36, "intermediate_size": 48, "head_dim": 4})
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def measure(base: str, method: str, rank: int, batch_size: int, length: int) -> dict[str, int]:
    """One case, in this process."""
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        (work / "warm").mkdir()
        (work / "real").mkdir()
        run_training(tiny_copy(Path(base), work / "tiny"), work / "warm", method, 2, 2, 16)
        return run_training(Path(base), work / "real", method, rank, batch_size, length)


def in_a_process(*case: object, **environment: str) -> dict[str, int]:
    """One case, in a process of its own. Raises CalledProcessError where it fails."""
    command = [sys.executable, __file__, "--case", *map(str, case)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, **environment})
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=32, help="of all three methods (default: 32)")
    parser.add_argument("--case", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        base, method, *numbers = arguments.case
        print(json.dumps(measure(base, method, *map(int, numbers))))
        return 0

    from multisbora.geometry import from_checkpoint
    from multisbora.hub import find_base
    from multisbora.memory import predict_peak
    from multisbora.plan import plan

    base = find_base(MODEL, say=print)
    geometry = from_checkpoint(base)
    off = []
    print(f"{MODEL}, bf16, rank {arguments.rank}; MB = 1,000,000 bytes")
    print("method  rows x tokens  predicted  measured  ratio  returned  ratio  trainable parameters   adapter bytes")
    for batch_size, length in SHAPES:
        for method in METHODS:
            planned = plan(geometry, variant="fb" if method == "fb" else "fa", rank=arguments.rank)
            predicted = predict_peak(base, planned, batch_size, length, method=method).peak
            case = (base, method, arguments.rank, batch_size, length)
            found = in_a_process(*case)
            returned = None
            if method != "lora" and (batch_size, length) == SHAPES[0]:
                returned = in_a_process(*case, MALLOC_MMAP_THRESHOLD_="65536")["peak"]
            ratio = predicted / found["peak"]
            print(
                f"{method:<6}  {batch_size:>4} x {length:<6}  {predicted / 1e6:>9.0f}  {found['peak'] / 1e6:>8.0f}"
                f"  {ratio:>5.2f}  {'-' if returned is None else format(returned / 1e6, '.0f'):>8}"
                f"  {'-' if returned is None else format(predicted / returned, '.2f'):>5}",
                end="",
            )
            if method == "lora":
                parameters = planned.cost("lora").trainable_parameters
                print(f"  {parameters:>9} {found['trainable_parameters']:>9}               -", flush=True)
                continue
            print(
                f"  {planned.trainable_parameters:>9} {found['trainable_parameters']:>9}"
                f"  {planned.adapter_bytes:>9} {found['adapter_bytes']:>9}",
                flush=True,
            )
            sizes = {key: getattr(planned, key) for key in ("trainable_parameters", "adapter_bytes")}
            off += [
                f"{method} {key}: {size}, measured {found[key]}" for key, size in sizes.items() if size != found[key]
            ]
            if abs(ratio - 1) > TOLERANCE:
                off.append(f"{method} at {batch_size} x {length}: ratio {ratio:.2f}")
    print(f"budget: within {TOLERANCE:.0%}: {'MISSED: ' + '; '.join(off) if off else 'held'}")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
