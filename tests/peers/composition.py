"""Tasks composed by `merge`, beside what a peer needs to do the same: adapters, lambdas, single-task checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from builders import draw_regions, tiny_gpt2, tiny_llama, write_adapter
from safetensors import safe_open
from torch import Tensor

from multisbora.geometry import Geometry, Matrix, from_checkpoint
from multisbora.merge import merge
from multisbora.stream import fingerprint

VARIANTS = {"math": "fa", "chat": "fb", "code": "fa"}  # chat's rows cross the columns of math, and code's cross them
WEIGHTS: dict[str, float | dict[str, float]] = {
    "math": {"default": 0.8, "v_proj": 0.55, "c_fc": 0.55},
    "chat": 1.0,
    "code": -0.37,
}
SCALING = 3.0  # s = alpha / rank, and no power of two, so that it rounds
TINY = ("llama bfloat16", "llama float16", "llama float32", "gpt2 float32")
REAL = "MULTISBORA_PEERS_MODEL"  # names the folder of a model that is not tiny, a Llama
KINDS = (*TINY, *(["real"] if os.environ.get(REAL) else []))


@dataclass(frozen=True)
class Composition:
    """A base, one adapter a task in it, and the checkpoint that `merge` makes of them with WEIGHTS.

    Attributes:
        geometry: of the base as it is stored.
        adapters: task -> folder.
        alone: task -> checkpoint with this task only, at lambda 1.
    """

    folder: Path
    base: Path
    geometry: Geometry
    adapters: dict[str, Path]
    alone: dict[str, Path]
    merged: Path

    def weight(self, task: str, tensor: str) -> float:
        """Lambda of a task in a stored tensor."""
        given = WEIGHTS[task]
        if isinstance(given, float):
            return given
        return next((value for name, value in given.items() if f".{name}." in tensor), given["default"])

    def updates(self, matrix: Matrix) -> dict[str, Tensor]:
        """{task: s * values} in float64, in the stored layout and zero where the task owns nothing.

        Read from the adapters' files: independent of what merges, exports or verifies.
        """
        found = {}
        for task, folder in self.adapters.items():
            values = _read(folder, matrix, "values").double()
            update = torch.zeros(matrix.shape, dtype=torch.float64)  # (out, in)
            update[_cells(task, folder, matrix)] = SCALING * values
            found[task] = update.t() if matrix.orientation == "conv1d" else update
        return found

    def owners(self, matrix: Matrix) -> Tensor:
        """Of each cell of a stored tensor the place of its owner among the tasks, or -1."""
        found = torch.full(matrix.shape, -1)  # (out, in)
        for number, (task, folder) in enumerate(self.adapters.items()):
            mine = torch.zeros(matrix.shape, dtype=torch.bool)
            mine[_cells(task, folder, matrix)] = True
            found[mine & (found < 0)] = number  # where two cross, the earlier claim keeps the cell
        return found.t() if matrix.orientation == "conv1d" else found


def compose(folder: Path, kind: str) -> Composition:
    """Write a base of a kind of KINDS and adapters for it, and merge them, together and each alone."""
    name, _, dtype = kind.partition(" ")
    rank, spread = (64, 0.005) if name == "real" else (4, 0.05)
    if name == "real":
        base = Path(os.environ[REAL])
    else:
        base = (tiny_llama if name == "llama" else tiny_gpt2)(folder / "base", dtype=dtype)
    return compose_on(folder, base, rank, spread)


def compose_on(folder: Path, base: Path, rank: int, spread: float) -> Composition:
    """The same on a base that is there already."""
    geometry = from_checkpoint(base)
    regions = draw_regions(geometry, VARIANTS, rank=rank)
    adapters: dict[str, Path] = {}
    for seed, (task, variant) in enumerate(VARIANTS.items()):
        crossing = [earlier for earlier in adapters if VARIANTS[earlier] != variant]
        adapters[task] = write_adapter(
            folder / "adapters" / task,
            geometry,
            task,
            variant=variant,
            rank=rank,
            alpha=SCALING * rank,
            indices=regions[task],
            excluded={
                module: sorted(index for earlier in crossing for index in regions[earlier][module])
                for module in (regions[task] if crossing else ())
            },
            seed=seed,
            spread=spread,
            base_fingerprint=fingerprint(base, geometry),
        )
    merge(base, list(adapters.values()), weights_of(geometry), output=folder / "merged")
    alone = {task: folder / "alone" / task for task in adapters}
    (folder / "alone").mkdir()
    for task, output in alone.items():
        merge(base, [adapters[task]], output=output)
    return Composition(folder, base, geometry, adapters, alone, folder / "merged")


def weights_of(geometry: Geometry) -> Mapping[str, float | dict[str, float]]:
    """WEIGHTS without the patterns that name no matrix of this model, which `merge` refuses."""
    kinds = {"default", *(matrix.kind for matrix in geometry.select("all-linear"))}
    return {
        task: weight if isinstance(weight, float) else {k: value for k, value in weight.items() if k in kinds}
        for task, weight in WEIGHTS.items()
    }


def stored(folder: Path, name: str) -> Tensor:
    """One tensor of a checkpoint."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 (a safe_open is no mapping)
                tensor: Tensor = file.get_tensor(name)
                return tensor
    raise KeyError(f"{folder} has no {name}")


def _read(folder: Path, matrix: Matrix, what: str) -> Tensor:
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        tensor: Tensor = file.get_tensor(f"base_model.model.{matrix.module}.sbora_{what}")
        return tensor


def _cells(task: str, folder: Path, matrix: Matrix) -> tuple[Any, Any]:
    """The cells of a matrix, (out, in), that an adapter has values for, as an index."""
    indices = _read(folder, matrix, "indices").long()
    return (slice(None), indices) if VARIANTS[task] == "fa" else (indices, slice(None))


def without_us(code: str, jobs: list[Any], folder: Path) -> None:
    """Run a peer's code on these jobs in a process of its own, that does not find multisbora through PYTHONPATH."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "jobs.json")],
        cwd=folder,
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
