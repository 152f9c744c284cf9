"""Corrected merges on disk: what they write and keep, what they refuse, and what proves them."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from builders import draw_moments, tiny_llama, tree
from commands import refused
from damaged import RECEIPT
from mix import write_mix
from safetensors.numpy import load_file, save
from test_edit import KINDS, VARIANTS, Models, Q

from multisbora.adapter import Adapter
from multisbora.correct import Wish, channels, correct
from multisbora.difference import diff
from multisbora.errors import CheckpointError, DataError, MergeError, UsageError
from multisbora.geometry import from_checkpoint
from multisbora.kept import FOLDER, Correction, KeptFile, kept_name
from multisbora.merge import merge
from multisbora.moments import Moments, Site
from multisbora.receipt import Receipt
from multisbora.stream import fingerprint
from multisbora.verify import verify

solver = importlib.import_module("multisbora.correct")
pytestmark = pytest.mark.usefixtures("unsynced")


def moments_of(base: Path, tasks: Mapping[str, object], **options: Any) -> dict[str, Moments]:
    """Moments of each task at all channels of all matrices."""
    geometry = from_checkpoint(base)
    mark = fingerprint(base, geometry)
    options = {"target_modules": geometry.kinds(), **options}
    return {
        task: draw_moments(geometry, task, base_fingerprint=mark, seed=seed, **options)
        for seed, task in enumerate(sorted(tasks))
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "base", shards=2)


@pytest.fixture(scope="module")
def tasks(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_mix(tmp_path_factory.mktemp("adapters"), base, VARIANTS)


@pytest.fixture(scope="module")
def moments(base: Path) -> dict[str, Moments]:
    return moments_of(base, VARIANTS)


@pytest.fixture(scope="module")
def merged_once(
    base: Path, tasks: dict[str, Path], moments: dict[str, Moments], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "ours"
    merge(base, [*tasks.values()], {"math": 0.5}, output=folder, method="corrected", moments=moments)
    return folder


@pytest.fixture
def merged(merged_once: Path, tmp_path: Path) -> Path:
    """All tasks, math at 0.5; a copy to damage."""
    return Path(shutil.copytree(merged_once, tmp_path / "ours"))


def kept_of(folder: Path, task: str) -> Path:
    correction = Receipt.read(folder).correction
    assert correction is not None
    return folder / FOLDER / kept_name(task, correction.tasks[task].digest)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_cells_hold_the_corrected_values_and_nothing_else_changed(models: Models, tmp_path: Path, kind: str) -> None:
    base, adapters = models.get(kind)
    moments, weights = moments_of(base, adapters), {"code": 0.5, "law": -1.25}
    output, shard_size = tmp_path / "merged", KINDS[kind][2]
    receipt = merge(
        base,
        [*adapters.values()],
        weights,
        output=output,
        max_shard_size=shard_size,
        method="corrected",
        moments=moments,
        ridge=0.1,
    )
    assert receipt == Receipt.read(output)
    assert receipt.correction is not None and receipt.correction.ridge == 0.1
    geometry = from_checkpoint(base)
    loaded = {task: Adapter.read(folder) for task, folder in adapters.items()}
    where: dict[str, list[str]] = {}
    for task, adapter in loaded.items():
        for module in adapter.modules:
            where.setdefault(geometry.find(module).module, []).append(task)
    before = {name: t for path in base.glob("*.safetensors") for name, t in _load(path).items()}
    after = {name: t for path in output.glob("*.safetensors") for name, t in _load(path).items()}
    assert before.keys() == after.keys()
    differ = 0
    for module, owners in where.items():
        matrix = geometry.find(module)
        known = channels((loaded[task].modules[module].region for task in owners), matrix.in_features)
        wishes = [
            Wish(task, own.region, own.values, own.scaling, weights.get(task, 1.0), moments[task].block(module, known))
            for task in owners
            for own in (loaded[task].modules[module],)
        ]
        for wish in wishes:
            upper = np.triu(wish.block)
            object.__setattr__(wish, "block", upper + np.triu(upper, 1).T)
        expected = before[matrix.tensor].to(torch.float32)
        view = expected if matrix.part is None else expected[matrix.part]
        view = view if matrix.orientation == "linear" else view.T
        for task, values in correct(wishes, matrix.shape, 0.1, module).values.items():
            own = loaded[task].modules[module]
            lines = list(own.region.indices)
            plain = own.values * np.float32(own.scaling * weights.get(task, 1.0))
            differ += int(np.count_nonzero(plain != values))
            if own.region.variant == "fa":
                view[:, lines] += torch.from_numpy(values)
            else:
                view[lines] += torch.from_numpy(values)
        if matrix.part is None:
            assert torch.equal(after.pop(matrix.tensor), expected.to(before.pop(matrix.tensor).dtype))
        else:
            dtype = before[matrix.tensor].dtype
            assert torch.equal(after[matrix.tensor][matrix.part], expected[matrix.part].to(dtype))
    assert differ > 1000  # it is not the plain merge
    for name in before:
        if not any(matrix.tensor == name for matrix in geometry.matrices):
            assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
    proof = verify(output, base, [*adapters.values()])
    assert proof.ok, proof.problem
    assert proof.cells_outside_regions == 0
    quick = verify(output, quick=True)
    assert quick.ok, quick.problem


def _load(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_what_is_kept(merged: Path, tasks: dict[str, Path], moments: dict[str, Moments], base: Path) -> None:
    receipt, geometry = Receipt.read(merged), from_checkpoint(base)
    assert receipt.correction is not None
    assert Correction.from_json(receipt.correction.to_json()) == receipt.correction
    assert {path.name for path in (merged / FOLDER).iterdir()} == receipt.correction.names
    for task, folder in tasks.items():
        told, path = receipt.correction.tasks[task], kept_of(merged, task)
        assert blake3(path.read_bytes()).hexdigest() == told.digest
        assert (path.stat().st_size, told.rows, told.tokens, told.source) == (told.size, 4, 64, "task")
        kept, adapter = KeptFile.open(merged, task, told), Adapter.read(folder)
        for module, own in adapter.modules.items():
            matrix = geometry.find(module)
            name, shape = matrix.cells_name, own.values.shape
            assert np.array_equal(kept.values(name, shape), own.values)
            assert not np.array_equal(kept.corrected(name, shape), own.values)
            owners = [
                r.tasks[t].regions[module].region for r in (receipt,) for t in r.tasks if module in r.tasks[t].regions
            ]
            known = channels(owners, matrix.in_features)
            block = kept.moments(name, len(known))
            assert np.array_equal(np.triu(block), np.triu(moments[task].block(module, known)))
            assert np.array_equal(block, block.T)
    assert "corrected merge" in (merged / "README.md").read_text()
    assert "`base + corrected values`" in (merged / "README.md").read_text()


def test_the_same_bytes_in_any_order_and_again(
    base: Path, tasks: dict[str, Path], moments: dict[str, Moments], merged: Path, tmp_path: Path
) -> None:
    merge(
        base,
        [*tasks.values()][::-1],
        {"math": 0.5},
        output=tmp_path / "again",
        method="corrected",
        moments=dict(reversed(moments.items())),
        ridge=0.01,
    )
    assert tree(tmp_path / "again") == tree(merged)
    preview = merge(
        base,
        [*tasks.values()],
        {"math": 0.5},
        output=tmp_path / "no",
        method="corrected",
        moments=moments,
        dry_run=True,
    )
    assert preview.correction == Receipt.read(merged).correction
    assert not (tmp_path / "no").exists()


def test_one_task_is_what_a_plain_merge_makes_of_it(
    base: Path, tasks: dict[str, Path], moments: dict[str, Moments], tmp_path: Path
) -> None:
    for name, options in {"plain": {}, "corrected": {"method": "corrected", "moments": moments}}.items():
        merge(base, [tasks["math"]], {"math": 0.3}, output=tmp_path / name, **options)  # type: ignore[arg-type]
    one, two = tree(tmp_path / "plain"), tree(tmp_path / "corrected")
    assert {name for name in one.keys() | two.keys() if one.get(name) != two.get(name)} == {
        RECEIPT,
        "README.md",
        *(name for name in two if name.startswith(FOLDER)),
    }
    assert verify(tmp_path / "corrected", base, [tasks["math"]]).ok


def test_a_plain_merge_speaks_of_none_of_it(base: Path, tasks: dict[str, Path], tmp_path: Path) -> None:
    merge(base, [*tasks.values()], output=tmp_path / "plain")
    assert not (tmp_path / "plain" / FOLDER).exists()
    content = json.loads((tmp_path / "plain" / RECEIPT).read_text())
    assert "corrected" not in content
    assert "corrected" not in (tmp_path / "plain" / "README.md").read_text()
    (tmp_path / "plain" / FOLDER).mkdir()
    (tmp_path / "plain" / FOLDER / "x").write_text("x")
    assert "is in" in str(verify(tmp_path / "plain", quick=True).problem)


def test_a_lambda_of_0_in_some_matrices_and_in_all(
    base: Path, tasks: dict[str, Path], moments: dict[str, Moments], tmp_path: Path
) -> None:
    weights = {"chat": 0.0, "code": {"default": 1.0, "q_proj": 0.0}}
    receipt = merge(base, [*tasks.values()], weights, output=tmp_path / "some", method="corrected", moments=moments)
    assert receipt.tasks["chat"].cells_changed == 0
    proof = verify(tmp_path / "some", base, [*tasks.values()])
    assert proof.ok, proof.problem
    # Without them: the same cells.
    rest = [folder for task, folder in tasks.items() if task != "chat"]
    merge(base, rest, {"code": weights["code"]}, output=tmp_path / "rest", method="corrected", moments=moments)
    for path in (tmp_path / "rest").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "some" / path.name).read_bytes()


def test_it_takes_what_a_merge_takes_and_nothing_that_it_would_ignore(
    base: Path, tasks: dict[str, Path], moments: dict[str, Moments], tmp_path: Path
) -> None:
    def call(**options: Any) -> Callable[[], object]:
        return lambda: merge(base, [*tasks.values()], output=tmp_path / "out", **options)

    corrected: dict[str, Any] = {"method": "corrected", "moments": moments}
    refused(call(method="best"), UsageError, "'best'", "plain or corrected")
    refused(call(moments=moments), UsageError, "knows no moments", "--method corrected")
    refused(call(ridge=0.1), UsageError, "knows no ridge")
    refused(call(**corrected, ridge=0.0), UsageError, "ridge 0.0 is no positive number")
    refused(call(method="corrected"), DataError, "multisbora measure --tasks chat,code,law,math")
    some = {task: found for task, found in moments.items() if task != "law"}
    refused(call(method="corrected", moments=some), DataError, "law has none", "multisbora measure --tasks law ")
    other = {**moments, "law": replace(moments["law"], base_fingerprint="blake3:0")}
    refused(call(method="corrected", moments=other), DataError, "law", "another base model")
    refused(call(method="corrected", moments=other, allow_base_mismatch=True), DataError, "law", "another base model")
    sites = {module: site for module, site in moments["law"].sites.items() if module != Q}
    refused(
        call(method="corrected", moments={**moments, "law": replace(moments["law"], sites=sites)}), DataError, Q, "law"
    )
    site = moments["law"].sites[Q]
    small = Site(site.energy, site.response, site.channels[:4], site.block[:4, :4])
    fewer = replace(moments["law"], sites={**moments["law"].sites, Q: small})
    refused(call(method="corrected", moments={**moments, "law": fewer}), DataError, "28 of 32 channels in", Q)
    assert not (tmp_path / "out").exists()


def test_experts_that_nobody_can_measure(models: Models, tmp_path: Path) -> None:
    base, adapters = models.get("mixture")
    known = moments_of(base, adapters)
    for task, found in known.items():
        sites = {module: site for module, site in found.sites.items() if "experts" not in module}
        known[task] = replace(found, sites=sites)
    call = lambda: merge(base, [*adapters.values()], output=tmp_path / "o", method="corrected", moments=known)  # noqa: E731
    refused(call, DataError, "experts are no linear layers", "merge with --method plain")


def test_an_output_that_is_taken_is_refused_before_the_work(
    merged: Path, base: Path, tasks: dict[str, Path], moments: dict[str, Moments], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("multisbora.merge")  # the package's name of it is the function
    monkeypatch.setattr(module, "correct_all", lambda *_: pytest.fail("it was solved"))
    call = lambda: merge(base, [*tasks.values()], output=merged, method="corrected", moments=moments)  # noqa: E731
    refused(call, CheckpointError, "exists")


def test_moments_with_nan_cannot_be() -> None:
    block = np.full((2, 2), np.nan, np.float32)
    line = np.ones(2, np.float32)
    with pytest.raises(DataError, match="damaged"):
        Moments("math", "b", "g", 1, 1, {Q: Site(line, line, np.arange(2, dtype=np.int32), block)})


def test_a_patch_of_it_is_refused(merged: Path, tmp_path: Path) -> None:
    refused(lambda: diff(merged, tmp_path / "p"), MergeError, "is a corrected merge", "copy the folder")
    assert not (tmp_path / "p").exists()


# Mutations: what is done to a checkpoint; what the proof says first; what the quick one does, None if it cannot know.

Mutation = Callable[[Path], object]


def told(change: Callable[[dict[str, Any]], object]) -> Mutation:
    def mutate(folder: Path) -> None:
        content = json.loads((folder / RECEIPT).read_text())
        change(content)
        (folder / RECEIPT).write_text(json.dumps(content))

    return mutate


def kept(
    task: str, change: Callable[[dict[str, np.ndarray]], object], *, forged: bool, cells: bool = False
) -> Mutation:
    """Change arrays of a kept file.

    Args:
        forged: have the receipt and the file's name fit.
        cells: have the checkpoint's cells, and what the receipt says of them, fit too.
    """

    def mutate(folder: Path) -> None:
        path = kept_of(folder, task)
        arrays = load_file(path)
        change(arrays)
        metadata = {"format": "pt", "multisbora": "corrected", "task": task}
        path.write_bytes(data := save(arrays, metadata=metadata))
        if forged:
            mark = blake3(data).hexdigest()
            path.rename(path.with_name(kept_name(task, mark)))
            told(lambda content: content["corrected"]["tasks"][task].update(digest=mark, size=len(data)))(folder)
        if cells:
            forge_cells(folder, task, arrays)

    return mutate


def forge_cells(folder: Path, task: str, arrays: dict[str, np.ndarray]) -> None:
    """Write base + corrected values of the q_proj of the first layer, as an honest merge of them would have."""
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file

    name = f"{Q}.weight"
    (path,) = (path for path in folder.glob("*.safetensors") if name in load_torch(path))
    tensors, undo = load_torch(path), load_torch(folder / "multisbora_undo" / f"{task}.safetensors")[name]
    content = json.loads((folder / RECEIPT).read_text())
    region = content["tasks"][task]["regions"][Q]
    rows = [row for row in range(tensors[name].shape[0]) if row not in region["excluded"]]
    cells = (undo.float() + torch.from_numpy(arrays[f"corrected/{name}"][rows])).to(undo.dtype)
    held = tensors[name][rows][:, region["indices"]]
    entry, change = content["tasks"][task], int((cells != undo).sum()) - int((held != undo).sum())
    tensors[name][torch.tensor(rows)[:, None], torch.tensor(region["indices"])] = cells
    region["digest"] = blake3(cells.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    entry["cells_changed"] += change
    content["cells_changed"] += change
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / RECEIPT).write_text(json.dumps(content))


def one(kind: str, change: Callable[[np.ndarray], object]) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda arrays: change(arrays[f"{kind}/{Q}.weight"])


def bump(place: tuple[int, int], by: float) -> Callable[[np.ndarray], object]:
    def change(array: np.ndarray) -> None:
        array[place] *= by

    return change


MUTATIONS: dict[str, tuple[Mutation, str, str | None]] = {
    "corrected values": (
        kept("math", one("corrected", bump((0, 0), 1.1)), forged=False),
        "^multisbora_corrected/math-.* is not the file that was kept",
        "^multisbora_corrected/math-.* is not the file that was kept",
    ),
    "corrected values and their digest": (
        kept("math", one("corrected", bump((0, 0), 1.1)), forged=True),
        f"^{Q}.weight: 1 wrong cells, first at row 0, column .*, owned by math",
        None,
    ),
    "corrected values, their digest and the cells": (
        kept("math", one("corrected", bump((0, 0), 1.001)), forged=True, cells=True),
        f"^{Q}.weight: .* corrected values are no solution, first at row 0, column .*: of a ridge of 0.01",
        None,
    ),
    "corrected values by the last bits, and the rest": (
        kept("math", one("corrected", bump((3, 1), 1 + 2.0**-19)), forged=True, cells=True),
        f"^{Q}.weight: .* corrected values are no solution, first at row 3, column ",
        None,
    ),
    "plain values, their digest and the cells": (
        kept("math", lambda a: a.update({f"corrected/{Q}.weight": a[f"values/{Q}.weight"]}), forged=True, cells=True),
        f"^{Q}.weight: .* corrected values are no solution",
        None,
    ),
    "an excess": (
        kept("law", one("excess", bump((0, 0), 1.01)), forged=True),
        f"^{Q}.weight: .* corrected values are no solution",
        None,
    ),
    "no excess": (
        kept("law", lambda a: a.pop(f"excess/{Q}.weight"), forged=True),
        f"^{Q}.weight: what is kept of it cannot be used: .*has no excess/{Q}.weight",
        None,
    ),
    "moments": (
        kept("chat", one("moments", bump((0, 3), 2.0)), forged=False),
        "^multisbora_corrected/chat-.* is not the file that was kept",
        "^multisbora_corrected/chat-.* is not the file that was kept",
    ),
    "moments and their digest": (
        kept("chat", one("moments", bump((0, 3), 1.01)), forged=True),
        f"^{Q}.weight: .* corrected values are no solution",
        None,
    ),
    "moments that are none": (
        kept("chat", one("moments", bump((0, 3), float("nan"))), forged=True),
        f"^{Q}.weight: what is kept of it cannot be used: .*the moments of chat are not finite",
        None,
    ),
    "moments of fewer channels": (
        kept("chat", lambda a: a.update({f"moments/{Q}.weight": a[f"moments/{Q}.weight"][:, :3]}), forged=True),
        f"^{Q}.weight: what is kept of it cannot be used: .* of \\[1, 3\\], not of 32 channels",
        None,
    ),
    "no moments": (
        kept("chat", lambda a: a.pop(f"moments/{Q}.weight"), forged=True),
        f"has no moments/{Q}.weight",
        None,
    ),
    "trained values and their digest": (
        kept("code", one("values", lambda array: array.__iadd__(1)), forged=True),
        f"^{Q}.weight: what is kept as trained by code is not what its adapter has",
        None,
    ),
    "more than is kept": (
        kept("code", lambda a: a.update(more=np.zeros((1, 1), np.float32)), forged=True),
        "^multisbora_corrected/code-.* has more",
        None,
    ),
    "no corrected values": (
        kept("code", lambda a: a.pop(f"corrected/{Q}.weight"), forged=True),
        f"cannot be read: .*has no corrected/{Q}.weight",
        None,
    ),
    "a value in a cell of another task": (
        kept("chat", lambda a: a[f"corrected/{Q}.weight"].__setitem__((0, slice(None)), 1.0), forged=True),
        "the corrected values are not zero in cells that an earlier task owns",
        None,
    ),
    "the ridge": (
        told(lambda content: content["corrected"].update(ridge=0.011)),
        "corrected values are no solution, first at row 0, .*: of a ridge of 0.011 and the moments that are kept$",
        None,
    ),
    "no ridge": (
        told(lambda content: content["corrected"].update(ridge=0)),
        "the ridge is not positive",
        "the ridge is not positive",
    ),
    "a lambda": (
        told(lambda content: content["tasks"]["math"].update(weight=0.4)),
        "corrected values are no solution",
        "^math: the receipt has the lambda 0.5 in .* is 0.4",
    ),
    "a file gone": (
        lambda folder: kept_of(folder, "law").unlink(),
        "^multisbora_corrected/law-.* is missing or damaged",
        "^multisbora_corrected/law-.* is missing or damaged",
    ),
    "a file more": (
        lambda folder: (folder / FOLDER / "law.safetensors").write_bytes(b""),
        "^multisbora_corrected/law.safetensors is in .* but not in the receipt",
        "^multisbora_corrected/law.safetensors is in .* but not in the receipt",
    ),
    "told of a task less": (
        told(lambda content: content["corrected"]["tasks"].pop("law")),
        "",
        "other tasks that were corrected than it has tasks",
    ),
    "not told": (
        told(lambda content: content.pop("corrected")),
        "wrong cells, first at row 0",
        "^multisbora_corrected/.* but not in the receipt",
    ),
    "told of nothing": (
        told(lambda content: content.update(corrected=None)),
        "missing or damaged",
        "missing or damaged",
    ),
    "told of a source": (
        told(lambda content: content["corrected"]["tasks"]["law"].update(source="x")),
        "missing or damaged",
        "missing or damaged",
    ),
    "a cell": (
        lambda folder: _bit(folder),
        f"^{Q}.weight: 1 wrong cells, first at row 0, column 0",
        "no task owns differ|are not those that were merged",
    ),
}


@pytest.mark.parametrize("off", [0.0, 0.999, 1.001])
def test_values_that_solve_other_amounts_are_caught(
    merged: Path,
    base: Path,
    tasks: dict[str, Path],
    moments: dict[str, Moments],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    off: float,
) -> None:
    """All fits but for how much tasks ask for, which is a little less, or nothing more than lambda."""
    honest = solver._excess
    monkeypatch.setattr(solver, "_excess", lambda *args: (off * honest(*args)).astype(np.float32))
    forged = tmp_path / "forged"
    merge(base, [*tasks.values()], output=forged, method="corrected", moments=moments)
    proof = verify(forged, base, [*tasks.values()])
    assert not proof.ok and "is not the one that it has to have: of a ridge of 0.01" in str(proof.problem)


def _bit(folder: Path) -> None:
    from safetensors.torch import save_file

    (path,) = (path for path in folder.glob("*.safetensors") if f"{Q}.weight" in _load(path))
    tensors = _load(path)
    tensors[f"{Q}.weight"].view(torch.int16)[0, 0] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_is_caught_and_named(merged: Path, base: Path, tasks: dict[str, Path], name: str) -> None:
    mutate, full, quick = MUTATIONS[name]
    mutate(merged)
    proof = verify(merged, base, [*tasks.values()])
    assert not proof.ok
    assert str(proof.problem).isprintable()
    assert re.search(full, str(proof.problem)), proof.problem
    proof = verify(merged, quick=True)
    assert (proof.ok, proof.problem is None) == (quick is None, quick is None), proof.problem
    assert quick is None or re.search(quick, str(proof.problem)), proof.problem
