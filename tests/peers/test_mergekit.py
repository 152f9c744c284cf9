"""mergekit's task arithmetic on our single-task checkpoints gives our merged checkpoint, and where not, here is why.

mergekit sees W0 and, per task, T = round(W0 + s * values), and computes round(W0 + lambda * (T - W0)) in fp32. We have
the adapter's values and compute round(W0 + lambda * s * values). So it rounds once more than we do, on the way into T:
by at most half a spacing of the dtype at T, of which a share lambda reaches the result.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from composition import KINDS, VARIANTS, Composition, compose, stored, without_us
from distance import Distance, between, spacing
from safetensors import safe_open
from torch import Tensor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("mergekit") is None,
        reason='mergekit is not installed: scripts/test installs it, and so does pip install "multisbora[test]"',
    ),
]

MERGEKIT = """
import json, sys
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for config, output in json.load(open(sys.argv[1])):
    options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(config), output, options)
"""


@dataclass(frozen=True)
class Cells:
    """The owned cells of one matrix in every checkpoint, in one row, and what they should be.

    Attributes:
        weights: lambda of each task here.
        updates: s * values of each task, float64.
        owners: place of each cell's owner among the tasks.
    """

    base: Tensor
    alone: list[Tensor]
    ours: Tensor
    theirs: Tensor
    weights: list[float]
    updates: list[Tensor]
    owners: Tensor

    @property
    def operands(self) -> list[Tensor]:
        """What is added and subtracted on the way to one of the merged checkpoints."""
        return [self.base, *self.alone, *self.updates]

    @property
    def exact(self) -> Tensor:
        """W0 + lambda * s * values, in float64."""
        cells = self.base.double()
        for weight, update in zip(self.weights, self.updates, strict=True):
            cells += weight * update
        return cells

    @property
    def slack(self) -> Tensor:
        """What arithmetic in fp32 may add to the roundings to the dtype."""
        largest = torch.stack([tensor.double().abs() for tensor in (*self.operands, self.exact)]).amax(0)
        return 2 * spacing(largest, torch.float32)


def cells_of(mix: Composition) -> Iterator[Cells]:
    """The owned cells of one matrix after another."""
    for matrix in mix.geometry.select("all-linear"):
        owners = mix.owners(matrix)
        owned = owners >= 0
        yield Cells(
            base=stored(mix.base, matrix.tensor)[owned],
            alone=[stored(folder, matrix.tensor)[owned] for folder in mix.alone.values()],
            ours=stored(mix.merged, matrix.tensor)[owned],
            theirs=stored(mix.folder / "theirs", matrix.tensor)[owned],
            weights=[mix.weight(task, matrix.tensor) for task in VARIANTS],
            updates=[update[owned] for update in mix.updates(matrix).values()],
            owners=owners[owned],
        )


def _configuration(mix: Composition, dtype: str) -> dict[str, object]:
    """mergekit's configuration with the lambdas of `composition`: fp32 arithmetic, stored in the base's dtype."""
    kinds = sorted({matrix.kind for matrix in mix.geometry.select("all-linear")})
    models = [
        {
            "model": str(folder),
            "parameters": {"weight": [{"filter": kind, "value": mix.weight(task, f".{kind}.")} for kind in kinds]},
        }
        for task, folder in mix.alone.items()
    ]
    for model in models:
        model["parameters"]["weight"].append({"value": 1.0})  # of tensors that no task has a cell in
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(mix.base),
        "models": models,
        "dtype": "float32",
        "out_dtype": dtype,
    }


@pytest.fixture(scope="module")
def mixes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Composition]:
    """Every kind of model composed by us, and, in its folder "theirs", by mergekit: one process for all."""
    folder = tmp_path_factory.mktemp("mergekit")
    mixes = {kind: compose(folder / kind, kind) for kind in KINDS}
    jobs = []
    for mix in mixes.values():
        dtype = json.loads((mix.base / "config.json").read_text())["dtype"]
        jobs.append((_configuration(mix, dtype), str(mix.folder / "theirs")))
    without_us(MERGEKIT, jobs, folder)
    return mixes


@pytest.fixture(params=KINDS)
def mix(request: pytest.FixtureRequest, mixes: dict[str, Composition]) -> Composition:
    return mixes[request.param]


def test_both_have_the_same_tensors_and_differ_in_owned_cells_alone(mix: Composition) -> None:
    ours, theirs, base = (headers(folder) for folder in (mix.merged, mix.folder / "theirs", mix.base))
    assert ours == theirs == base
    adapted = {matrix.tensor for matrix in mix.geometry.select("all-linear")}
    for name in ours.keys() - adapted:
        assert torch.equal(stored(mix.merged, name), stored(mix.folder / "theirs", name)), name
    for matrix in mix.geometry.select("all-linear"):
        free = mix.owners(matrix) < 0
        assert free.any() and not free.all()
        assert torch.equal(stored(mix.merged, matrix.tensor)[free], stored(mix.folder / "theirs", matrix.tensor)[free])


def test_a_task_at_lambda_1_is_the_same_in_both(mix: Composition) -> None:
    distance = Distance()
    number = list(VARIANTS).index("chat")
    for cells in cells_of(mix):
        assert cells.weights[number] == 1
        mine = cells.owners == number
        distance += between(cells.ours[mine], cells.theirs[mine], cells.base[mine])
    print(f"{mix.folder.name}: {distance}")
    if cells.base.element_size() == 2:
        assert distance.differing == 0  # T - W0 is exact in fp32, or too small beside T to matter
    assert distance.spacings <= 1  # in fp32, T - W0 is rounded once


def test_elsewhere_they_differ_by_the_rounding_of_the_single_task_checkpoints(mix: Composition) -> None:
    distance = Distance()
    for cells in cells_of(mix):
        dtype, exact = cells.base.dtype, cells.exact
        base, alone = cells.base.float(), [tensor.float() for tensor in cells.alone]
        added = sum(torch.tensor(weight) * (one - base) for weight, one in zip(cells.weights, alone, strict=True))
        assert torch.equal(cells.theirs, (base + added).to(dtype))
        ours, theirs = cells.ours.double(), cells.theirs.double()
        once = spacing(torch.maximum(ours.abs(), exact.abs()), dtype) / 2
        assert ((ours - exact).abs() <= once + cells.slack).all()
        twice = spacing(torch.maximum(theirs.abs(), exact.abs()), dtype) / 2
        for number, (weight, one) in enumerate(zip(cells.weights, cells.alone, strict=True)):
            twice += (cells.owners == number) * abs(weight) * spacing(one, dtype) / 2
        assert ((theirs - exact).abs() <= twice + cells.slack).all()
        distance += between(cells.ours, cells.theirs, *cells.operands)
    print(f"{mix.folder.name}: {distance}")
    assert 0 < distance.differing < distance.cells / 2
    # Of a 32-bit dtype every rounding of the arithmetic counts, three of theirs and three of ours.
    assert distance.spacings <= (1 if cells.base.element_size() == 2 else 3)


def test_another_lambda_would_show(mix: Composition) -> None:
    cells = next(cells_of(mix))
    other = replace(cells, weights=[weight * 1.1 for weight in cells.weights])
    wrong = (cells.theirs.double() - other.exact).abs() > 2 * spacing(cells.theirs, cells.base.dtype) + cells.slack
    assert wrong.double().mean() > 0.2


def headers(folder: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of every tensor of a checkpoint."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safe_open is no mapping)
                part = file.get_slice(name)
                found[name] = (part.get_shape(), part.get_dtype())
    return found
