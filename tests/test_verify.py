"""The proof holds for every honest merge, and names what is wrong with every other one."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import edit_json, tiny_gpt2, tiny_llama, write_adapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from multisbora.checkpoint import fingerprint
from multisbora.errors import AdapterError, CheckpointError, UsageError
from multisbora.geometry import from_checkpoint
from multisbora.merge import merge
from multisbora.verify import verify

Q = "model.layers.0.self_attn.q_proj"
SHARD = "model-00001-of-00002.safetensors"
RECEIPT = "multisbora_receipt.json"
OWN = {"math": [1, 4, 30], "chat": [2, 7]}  # math owns columns (fa), chat rows (fb) less math's cells


class Case:
    """A merged checkpoint with its base and adapters, to be damaged."""

    def __init__(self, folder: Path) -> None:
        self.base, self.merged = folder / "base", folder / "merged"
        self.adapters = [folder / "math", folder / "chat"]

    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.merged / SHARD)

    def save(self, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
        """Write the first shard again, and put its new hash into the receipt: the cells alone must betray it."""
        save_file(tensors, self.merged / SHARD, metadata=metadata or {"format": "pt"})
        self.rehash()

    def rehash(self) -> None:
        content = json.loads((self.merged / RECEIPT).read_text())
        for name in content["files"]:
            if (data := self.merged / name).is_file():
                content["files"][name] = {
                    "sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
                    "size": data.stat().st_size,
                }
        (self.merged / RECEIPT).write_text(json.dumps(content))

    def receipt(self, change: Callable[[dict[str, Any]], object]) -> None:
        content = json.loads((self.merged / RECEIPT).read_text())
        change(content)
        (self.merged / RECEIPT).write_text(json.dumps(content))


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("honest")
    base = tiny_llama(folder / "base", shards=2)
    geometry = from_checkpoint(base)
    mark = fingerprint(base, geometry)
    modules = [matrix.module for matrix in geometry.select(["q_proj", "down_proj"])]
    math = {module: OWN["math"] for module in modules}
    chat = {module: OWN["chat"] for module in modules}
    options: dict[str, Any] = {"base_fingerprint": mark, "claim_digest": "c" * 64}
    write_adapter(folder / "math", geometry, "math", indices=math, **options)
    write_adapter(folder / "chat", geometry, "chat", variant="fb", indices=chat, excluded=math, seed=1, **options)
    merge(base, [folder / "math", folder / "chat"], {"math": 0.5}, output=folder / "merged")
    return folder


@pytest.fixture
def case(honest: Path, tmp_path: Path) -> Case:
    shutil.copytree(honest, tmp_path / "case")
    return Case(tmp_path / "case")


def test_an_honest_merge_is_proven(case: Case) -> None:
    proof = verify(case.merged, case.base, case.adapters[::-1])
    assert proof.ok, proof.problem
    assert proof.problem is None
    assert proof.cells_outside_regions == 0
    assert proof.tensors == len(load_file(case.base / SHARD)) + len(
        load_file(case.base / SHARD.replace("00001-of", "00002-of"))
    )
    # Two layers of q_proj (32 x 32) and down_proj (32 x 48): 3 columns of 32; 2 rows less 3 cells.
    assert proof.tasks["math"].cells == 4 * 3 * 32
    assert proof.tasks["chat"].cells == 2 * 2 * (32 - 3) + 2 * 2 * (48 - 3)
    assert proof.tasks["math"].weight == 0.5
    assert proof.cells_changed == sum(task.cells_changed for task in proof.tasks.values())
    content = proof.to_json()
    assert list(content) == ["ok", "tensors", "cells_changed", "cells_outside_regions", "tasks", "problem"]
    assert content["tasks"]["chat"] == {
        "cells": proof.tasks["chat"].cells,
        "cells_changed": proof.tasks["chat"].cells_changed,
        "weight": 1.0,
    }
    json.dumps(content)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bare"])
def test_every_layout_is_proven(tmp_path: Path, dtype: str, kind: str) -> None:
    if kind == "llama":
        base = tiny_llama(tmp_path / "base", dtype=dtype, tied=False)
    else:
        base = tiny_gpt2(tmp_path / "base", dtype=dtype, shards=2, bare=kind == "bare")
    live = from_checkpoint(base if kind != "bare" else tiny_gpt2(tmp_path / "live"))
    geometry = from_checkpoint(base)
    adapters = [
        write_adapter(
            tmp_path / f"task{i}",
            live,
            f"task{i}",
            variant=variant,
            alpha=7,
            use_rslora=True,
            base_fingerprint=fingerprint(base, geometry),
            alpha_pattern={live.matrices[0].kind: 3 + i},
            indices={matrix.module: [4 * i, 4 * i + 2] for matrix in live.matrices},
            excluded={matrix.module: [4, 6] for matrix in live.matrices} if variant == "fb" else {},
        )
        for i, variant in enumerate(("fb", "fa"))
    ]
    receipt = merge(base, adapters, {"task0": -0.3}, output=tmp_path / "merged")
    proof = verify(tmp_path / "merged", base, adapters)
    assert proof.ok, proof.problem
    assert proof.cells_changed == receipt.cells_changed
    assert {name: task.cells for name, task in proof.tasks.items()} == {n: t.cells for n, t in receipt.tasks.items()}


def test_a_weight_of_zero_and_a_mismatch_that_was_allowed_are_proven(case: Case) -> None:
    other = tiny_llama(case.base.parent / "other", seed=5)
    merge(other, case.adapters, {"chat": 0}, output=case.base.parent / "out", allow_base_mismatch=True)
    proof = verify(case.base.parent / "out", other, case.adapters)
    assert proof.ok, proof.problem
    assert proof.tasks["chat"].cells_changed == 0


def _bit(name: str, row: int, column: int | None = None, bit: int = 0) -> Callable[[Case], None]:
    def mutate(case: Case) -> None:
        tensors = case.tensors()
        view = tensors[name].view(torch.int16)
        place = row if column is None else (row, column)
        view[place] ^= 1 << bit if bit < 15 else -(1 << 15)
        case.save(tensors)

    return mutate


def _tensor(name: str, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[Case], None]:
    """Replace a tensor by change(merged, base)."""

    def mutate(case: Case) -> None:
        tensors = case.tensors()
        tensors[name] = change(tensors[name], load_file(case.base / SHARD)[name]).contiguous()
        case.save(tensors)

    return mutate


def _swap(merged: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    swapped = merged.clone()
    swapped[:, [1, 4]] = merged[:, [4, 1]]
    return swapped


def _twice(merged: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    doubled = base.clone()
    doubled[:, 1] = (base[:, 1].float() + 2 * (merged[:, 1].float() - base[:, 1].float())).to(base.dtype)
    doubled[:, [4, 30]] = merged[:, [4, 30]]
    doubled[[2, 7]] = merged[[2, 7]]
    return doubled


def _double_rounding(case: Case) -> None:
    """The update rounded to bf16 before it is added: what adding up in the model's dtype would do."""
    values = load_file(case.adapters[0] / "adapter_model.safetensors")[f"base_model.model.{Q}.sbora_values"]
    tensors, base = case.tensors(), load_file(case.base / SHARD)[f"{Q}.weight"]
    tensors[f"{Q}.weight"][:, OWN["math"]] = base[:, OWN["math"]] + (values * (0.5 * 8 / 3)).to(torch.bfloat16)
    case.save(tensors)


def _rename(case: Case) -> None:
    tensors = case.tensors()
    tensors[f"{Q}.weights"] = tensors.pop(f"{Q}.weight")
    case.save(tensors)


def _move(case: Case) -> None:
    tensors = case.tensors()
    other = case.merged / SHARD.replace("00001-of", "00002-of")
    save_file(load_file(other) | {f"{Q}.weight": tensors.pop(f"{Q}.weight")}, other, metadata={"format": "pt"})
    case.save(tensors)


def _file(name: str, content: bytes | None, rehash: bool = True) -> Callable[[Case], None]:
    def mutate(case: Case) -> None:
        (case.merged / name).unlink(missing_ok=True)
        if content is not None:
            (case.merged / name).write_bytes(content)
        if rehash:
            case.rehash()

    return mutate


def _told(*keys: Any, value: Any) -> Callable[[Case], None]:
    def change(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return lambda case: case.receipt(change)


def _cut(case: Case) -> None:
    os.truncate(case.merged / SHARD, (case.merged / SHARD).stat().st_size - 2)
    case.rehash()


def _retrained(case: Case) -> None:
    path = case.adapters[0] / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"base_model.model.{Q}.sbora_values"][0, 0] += 1
    save_file(tensors, path)


OUTSIDE, ROW, NORM = f"{Q}.weight", 2, "model.layers.0.input_layernorm.weight"
REGION = ("tasks", "math", "regions", Q)
MUTATIONS: dict[str, tuple[Callable[[Case], None], str]] = {
    "a bit outside": (
        _bit(OUTSIDE, 9, 8),
        f"{Q}.weight: 1 wrong cells, first at row 9, column 8, which no task owns: exp",
    ),
    "the sign outside": (_bit(OUTSIDE, 0, 0, bit=15), "1 wrong cells, first at row 0, column 0, which no task owns"),
    "a bit of a norm": (_bit(NORM, 7), f"{NORM}: 1 wrong cells, first at index \\[7\\], which no task owns"),
    "a bit of the embedding": (_bit("model.embed_tokens.weight", 258, 31), "embed_tokens.weight: 1 wrong cells"),
    "a bit of fa": (_bit(OUTSIDE, 9, 4), "first at row 9, column 4, owned by math: expected"),
    "a bit of fb": (_bit(OUTSIDE, ROW, 5), "first at row 2, column 5, owned by chat: expected"),
    "a bit where fa crosses fb": (_bit(OUTSIDE, ROW, 4), "first at row 2, column 4, owned by math"),
    "swapped columns": (_tensor(OUTSIDE, _swap), "first at row 0, column 1, owned by math"),
    "lambda twice": (_tensor(OUTSIDE, _twice), "column 1, owned by math"),
    "rounded twice": (_double_rounding, "owned by math"),
    "one matrix left out": (_tensor(OUTSIDE, lambda merged, base: base), "owned by math"),
    "transposed": (_tensor(OUTSIDE, lambda merged, base: merged.T), "wrong cells"),
    "another dtype": (_tensor(OUTSIDE, lambda merged, base: merged.half()), "'F16', .*in the base .*'BF16'"),
    "another shape": (_tensor(OUTSIDE, lambda merged, base: merged.reshape(16, 64)), r"\[16, 64\]"),
    "a NaN": (_tensor(NORM, lambda merged, base: merged * torch.nan), "32 wrong cells.*found nan"),
    "a renamed tensor": (_rename, "model.safetensors.index.json does not say where"),
    "a moved tensor": (_move, "model.safetensors.index.json does not say where"),
    "metadata": (lambda case: case.save(case.tensors(), {"format": "np"}), "other names or metadata"),
    "missing shard": (_file(SHARD, None), f"{SHARD} is in the receipt but not in"),
    "missing index": (_file("model.safetensors.index.json", None), "index.json is in the receipt but not in"),
    "truncated shard": (_cut, "no readable weights"),
    "shard of zeros": (_file(SHARD, bytes(1000)), "no readable weights"),
    "index of nonsense": (
        _file("model.safetensors.index.json", b"[1"),
        "model.safetensors.index.json is not the base's",
    ),
    "tokenizer": (_file("tokenizer.json", b"{}"), "tokenizer.json is not the base's, byte for byte"),
    "config": (_file("config.json", b"{}"), "config.json is not the base's, byte for byte"),
    "no config": (_file("config.json", None), "config.json is in the receipt but not in"),
    "an extra file": (_file("extra.json", b"{}", rehash=False), "extra.json is in .* but not in the receipt"),
    "an extra shard": (
        _file("stray.safetensors", b"", rehash=False),
        "stray.safetensors is in .* but not in the receipt",
    ),
    "an edited card": (_file("README.md", b"bought", rehash=False), "README.md has 6 bytes, the receipt says"),
    "no receipt": (_file(RECEIPT, None, rehash=False), "receipt.json is missing or damaged"),
    "a receipt of nonsense": (_file(RECEIPT, b"{", rehash=False), "receipt.json is missing or damaged"),
    "a receipt of lists": (_file(RECEIPT, b'{"tasks": [1]}', rehash=False), "receipt.json is missing or damaged"),
    "told weight": (_told("tasks", "math", "weight", value=0.6), "owned by math"),
    "told weight of nonsense": (_told("tasks", "math", "weight", value="1"), "missing or damaged"),
    "told weight beyond floats": (_told("tasks", "math", "weight", value=10**400), "missing or damaged"),
    "told zero weight": (_told("tasks", "chat", "weight", value=0), "owned by chat"),
    "told indices": (
        _told(*REGION, "indices", value=[1, 4, 31]),
        f"math: the receipt has another region or scaling in {Q}",
    ),
    "told excluded": (_told(*REGION, "excluded", value=[1]), "another region or scaling"),
    "told scaling": (_told(*REGION, "scaling", value=1.0), "another region or scaling"),
    "told variant": (_told("tasks", "math", "variant", value="fb"), "math: the receipt has another variant"),
    "told digest": (_told("tasks", "math", "adapter_digest", value="0" * 64), "another adapter digest"),
    "told claims": (_told("tasks", "chat", "claim_digest", value=None), "chat: the receipt has another claim digest"),
    "told base": (_told("base", "fingerprint", value="0" * 64), "another base fingerprint"),
    "told hash": (_told("files", "tokenizer.json", "sha256", value="0" * 64), "its sha256 differs from the receipt's"),
    "told files": (lambda case: case.receipt(lambda c: c["files"].pop("config.json")), "but not in the receipt"),
    "told region gone": (lambda case: case.receipt(lambda c: c["tasks"]["math"]["regions"].pop(Q)), "set of modules"),
    "told task gone": (
        lambda case: case.receipt(lambda c: c["tasks"].pop("math")),
        "tasks chat; the adapters given are",
    ),
    "told cells": (_told("tasks", "math", "cells", value=1), r"math: the receipt says cells owned, changed = \(1, "),
    "told total": (_told("cells_changed", value=1), "in all: the receipt says"),
    "told tensors": (_told("tensors_changed", value=[]), "lists other changed tensors"),
    "told tensors of nonsense": (_told("tensors_changed", value=[[1]]), "lists other changed tensors"),
    "a retrained adapter": (_retrained, "row 0, column 1, owned by math"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_is_caught_and_named(case: Case, name: str) -> None:
    mutate, message = MUTATIONS[name]
    mutate(case)
    proof = verify(case.merged, case.base, case.adapters)
    assert not proof.ok
    assert proof.problem is not None
    assert "\n" not in proof.problem
    assert re.search(message, proof.problem), proof.problem
    outside = name in ("a bit outside", "the sign outside", "a bit of a norm", "a bit of the embedding")
    assert (proof.cells_outside_regions == 1) == outside
    json.dumps(proof.to_json())


def test_other_adapters_than_the_merged_ones_are_refused(case: Case) -> None:
    for adapters in ([], case.adapters[:1], [*case.adapters, case.adapters[0]]):
        proof = verify(case.merged, case.base, adapters)
        assert not proof.ok
        assert "the receipt has the tasks chat, math; the adapters given are" in str(proof.problem)


def test_two_tasks_in_one_cell_are_caught(case: Case) -> None:
    """Even where a receipt and both adapters agree on it."""
    for adapter in case.adapters:
        edit_json(adapter / "adapter_config.json", excluded={})
    case.receipt(lambda c: [r.update(excluded=[]) for r in c["tasks"]["chat"]["regions"].values()])
    proof = verify(case.merged, case.base, case.adapters)
    assert not proof.ok
    assert "is owned by another task too" in str(proof.problem)


def test_an_undo_file_is_no_stranger(case: Case) -> None:
    (case.merged / "multisbora_undo.safetensors").write_bytes(b"x")
    (case.merged / ".cache").write_bytes(b"x")
    assert verify(case.merged, case.base, case.adapters).ok


def test_what_cannot_be_judged_is_an_error(case: Case) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        verify(case.merged / "none", case.base, case.adapters)
    with pytest.raises(UsageError, match="is the base itself"):
        verify(case.base, case.base, case.adapters)
    with pytest.raises(AdapterError, match="is not a readable adapter"):
        verify(case.merged, case.base, [case.base])
    with pytest.raises(CheckpointError, match="is not a readable base"):
        verify(case.merged, case.base / "none", case.adapters)
    os.truncate(case.base / SHARD, 40)
    with pytest.raises(CheckpointError, match="is not a readable base"):
        verify(case.merged, case.base, case.adapters)
    os.truncate(case.adapters[0] / "adapter_model.safetensors", 40)
    with pytest.raises(AdapterError, match="math is not a readable adapter"):
        verify(case.merged, case.base, case.adapters)


@pytest.mark.parametrize(
    "config",
    [
        {"alpha": "8"},
        {"alpha": 10**400},
        {"variant": "fc"},
        {"alpha_pattern": {"(": 1}},
        {"task": 3},
        {"excluded": {Q: 3}},
    ],
)
def test_an_adapter_with_a_broken_config_is_an_error(case: Case, config: dict[str, Any]) -> None:
    edit_json(case.adapters[0] / "adapter_config.json", **config)
    with pytest.raises(AdapterError, match="math is not a readable adapter"):
        verify(case.merged, case.base, case.adapters)


def test_the_oracle_shares_no_code_with_what_it_judges() -> None:
    lines = Path(inspect.getsourcefile(verify) or "").read_text().splitlines()
    assert [line for line in lines if line.startswith(("from .", "from multisbora", "import multisbora"))] == [
        "from .errors import AdapterError, CheckpointError, UsageError"
    ]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_bytes_never_crash_it(case: Case, data: st.DataObject) -> None:
    """Whatever happens to a file of the merged checkpoint or of an adapter: a proof, a problem, or one clear error."""
    path = data.draw(st.sampled_from([case.merged / SHARD, case.merged / RECEIPT, *_files(case.adapters[0])]))
    before = path.read_bytes()
    content = bytearray(before)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 2000) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
    try:
        proof = verify(case.merged, case.base, case.adapters)
    except AdapterError as error:
        assert "\n" not in str(error)
    else:
        assert proof.ok == (proof.problem is None)
        assert not proof.ok or path.read_bytes() == before or path.suffix == ".json"
    finally:
        path.write_bytes(before)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())
