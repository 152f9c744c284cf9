"""The proof holds for every honest merge, whatever its layout; what cannot be judged is one clear error."""

from __future__ import annotations

import inspect
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import edit_json, tiny_gpt2, tiny_llama, write_adapter
from commands import Run, assert_refused
from damaged import RECEIPT, SHARD, Case, Q, copied, make_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import multisbora.verify
from multisbora.errors import AdapterError, CheckpointError, UsageError
from multisbora.geometry import Geometry, from_checkpoint
from multisbora.merge import merge
from multisbora.stream import fingerprint
from multisbora.verify import names, tensors, verify

NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("honest"))


@pytest.fixture
def case(honest: Case, tmp_path: Path) -> Case:
    return copied(honest, tmp_path / "case")


def both(merged: Path, base: Path, adapters: list[Path]) -> None:
    """Proven, and the quick check says the same."""
    proof, quick = verify(merged, base, adapters), verify(merged, quick=True)
    assert proof.ok, proof.problem
    assert quick.ok, quick.problem
    assert (proof.quick, quick.quick) == (False, True)
    for key in ("tensors", "cells_changed", "cells_outside_regions", "tasks"):
        assert getattr(proof, key) == getattr(quick, key), key
    assert proof.cells_outside_regions == 0


def test_an_honest_merge_is_proven(case: Case) -> None:
    both(case.merged, case.base, case.adapters)
    proof = verify(case.merged, case.base, case.adapters[::-1])
    assert proof.ok, proof.problem
    assert proof.problem is None
    shards = [case.base / SHARD, case.base / SHARD.replace("00001-of", "00002-of")]
    assert proof.tensors == sum(len(load_file(shard)) for shard in shards)
    # Two layers of q_proj (32 x 32) and down_proj (32 x 48): 3 columns of 32; 2 rows less 3 cells.
    assert proof.tasks["math"].cells == 4 * 3 * 32
    assert proof.tasks["chat"].cells == 2 * 2 * (32 - 3) + 2 * 2 * (48 - 3)
    assert proof.tasks["math"].weight == 0.5
    assert proof.cells_changed == sum(task.cells_changed for task in proof.tasks.values())
    content = proof.to_json()
    keys = ["ok", "quick", "tensors", "cells_changed", "cells_outside_regions", "tasks", "problem"]
    assert list(content) == keys
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
    both(tmp_path / "merged", base, adapters)
    proof = verify(tmp_path / "merged", base, adapters)
    assert proof.cells_changed == receipt.cells_changed
    assert {name: task.cells for name, task in proof.tasks.items()} == {n: t.cells for n, t in receipt.tasks.items()}


def mixture(folder: Path, model_type: str) -> Path:
    """A base whose experts are fused in 3-D tensors, and one block of it is not."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.layers.0.mlp.experts.gate_up_proj": (3, 12, 8),
        "model.layers.0.mlp.experts.down_proj": (3, 6, 8),
        "model.layers.0.mlp.experts.gate_up_proj_bias": (3, 12),
        "model.layers.0.mlp.router.weight": (3, 8),
        "model.layers.0.self_attn.q_proj.weight": (8, 8),
        "model.scalar": (),
        "model.empty": (0, 4),
        "model.numbers": (3, 5, 2, 2),
    }
    content = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    content["model.bytes"] = torch.arange(7, dtype=torch.uint8)
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_fused_experts_are_proven(tmp_path: Path, model_type: str) -> None:
    """One matrix a part; stored (in, out) by some models."""
    base = mixture(tmp_path / "base", model_type)
    geometry = from_checkpoint(base)
    assert len([matrix for matrix in geometry.matrices if matrix.part is not None]) == 6
    modules = [matrix.module for matrix in geometry.matrices if matrix.part != 1]
    columns = {module: [0, 3] for module in modules}
    mark = fingerprint(base, geometry)
    one = write_adapter(tmp_path / "one", geometry, "one", indices=columns, base_fingerprint=mark)
    rows = {module: [1, 5] for module in modules}
    options: dict[str, Any] = {"variant": "fb", "indices": rows, "excluded": columns, "base_fingerprint": mark}
    two = write_adapter(tmp_path / "two", geometry, "two", **options)
    merged = tmp_path / "merged"
    merge(base, [one, two], {"one": {"experts.2.*": 0.25}}, output=merged)
    both(merged, base, [one, two])
    name = "model.layers.0.mlp.experts.down_proj"
    damaged = load_file(merged / "model.safetensors")
    damaged[name].view(torch.int16)[2, 4, 3] ^= 1
    save_file(damaged, merged / "model.safetensors", metadata={"format": "pt"})
    owner = "owned by one" if model_type == "qwen3_moe" else "which no task owns"
    problem = verify(merged, base, [one, two]).problem
    assert str(problem).startswith(f"{name}: 1 wrong cells, first at index [2, 4, 3], {owner}: ")
    told = f"{name}[2]: the cells owned by one" if "one" in owner else f"{name}: with all tasks taken out"
    assert str(verify(merged, quick=True).problem).startswith(told)


def test_a_lambda_a_pattern_is_proven(case: Case, tmp_path: Path) -> None:
    """The first pattern that names a matrix decides, also where the names would sort otherwise."""
    weights = {"math": {"self_attn.*": 0.5, r".*\.0\..*": 2.0, "default": -1.0}, "chat": {"q_proj": 0.0}}
    merge(case.base, case.adapters, weights, output=tmp_path / "out")
    both(tmp_path / "out", case.base, case.adapters)
    assert verify(tmp_path / "out", quick=True).to_json()["tasks"]["math"]["weight"] == weights["math"]
    content = json.loads((tmp_path / "out" / RECEIPT).read_text())
    content["tasks"]["math"]["weight"] = dict(reversed(weights["math"].items()))
    (tmp_path / "out" / RECEIPT).write_text(json.dumps(content))
    assert "owned by math" in str(verify(tmp_path / "out", case.base, case.adapters).problem)
    assert "has the lambda 0.5 in" in str(verify(tmp_path / "out", quick=True).problem)


def test_a_weight_of_zero_and_a_mismatch_that_was_allowed_are_proven(case: Case) -> None:
    other = tiny_llama(case.base.parent / "other", seed=5)
    out = case.base.parent / "out"
    merge(other, case.adapters, {"chat": 0}, output=out, allow_base_mismatch=True)
    both(out, other, case.adapters)
    assert verify(out, other, case.adapters).tasks["chat"].cells_changed == 0
    assert json.loads((out / RECEIPT).read_text())["base"]["checked"] is False


def whole(adapter: Path, name: str, values: torch.Tensor) -> None:
    """Have an adapter hold a tensor that was trained whole."""
    path = adapter / "adapter_model.safetensors"
    save_file(load_file(path) | {f"base_model.model.{name}": values}, path, metadata={"format": "pt"})
    edit_json(adapter / "adapter_config.json", modules_to_save=[name.split(".")[-2]])


@pytest.mark.parametrize("how", ["keep", "average"])
def test_modules_that_were_trained_whole_are_proven(case: Case, tmp_path: Path, how: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for adapter in case.adapters[: 1 if how == "keep" else 2]:
        whole(adapter, NORM, torch.randn(32, generator=generator))
    merged = tmp_path / "out"
    merge(case.base, case.adapters, {"math": 0.25}, output=merged, whole_modules=how)
    both(merged, case.base, case.adapters)
    names = "math" if how == "keep" else "chat, math"
    damaged = load_file(merged / SHARD)
    damaged[NORM].view(torch.int16)[9] ^= 1
    save_file(damaged, merged / SHARD, metadata={"format": "pt"})
    proof = verify(merged, case.base, case.adapters)
    assert str(proof.problem).startswith(f"{NORM}: 1 wrong cells, first at index [9], trained whole by {names}: ")
    assert proof.cells_outside_regions == 0
    quick = verify(merged, quick=True)
    assert quick.problem == f"{NORM}: the cells trained whole by {names} are not those that were merged"
    edit_json(merged / RECEIPT, whole={})
    assert str(verify(merged, case.base, case.adapters).problem).startswith("the receipt has other tensors")
    undo = "multisbora_undo/+whole.safetensors"
    assert re.search(f"no task owns differ|{re.escape(undo)}", str(verify(merged, quick=True).problem))


def test_a_checkpoint_is_checked_where_neither_base_nor_adapters_are(case: Case) -> None:
    (case.base / "config.json").unlink()
    for adapter in case.adapters:
        (adapter / "adapter_config.json").unlink()
    assert verify(case.merged, quick=True).ok


def test_what_is_hidden_or_not_the_base_s_is_no_stranger(case: Case) -> None:
    (case.merged / ".cache").write_bytes(b"x")
    (case.base / "README.md").write_bytes(b"of the base")
    (case.base / "adapter_config.json").write_bytes(b"{}")
    (case.base / "notes.pdf").write_bytes(b"x")
    both(case.merged, case.base, case.adapters)


def test_other_adapters_than_the_merged_ones_are_refused(case: Case) -> None:
    for adapters in ([], case.adapters[:1], [*case.adapters, case.adapters[0]]):
        proof = verify(case.merged, case.base, adapters)
        assert not proof.ok
        assert "the receipt has the tasks chat, math; the adapters given are" in str(proof.problem)


def test_what_cannot_be_judged_is_an_error(case: Case) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        verify(case.merged / "none", case.base, case.adapters)
    with pytest.raises(UsageError, match="is the base itself"):
        verify(case.base, case.base, case.adapters)
    with pytest.raises(UsageError, match="needs the base and the adapters"):
        verify(case.merged, case.base)
    with pytest.raises(UsageError, match="needs the base and the adapters"):
        verify(case.merged, adapters=case.adapters)
    with pytest.raises(UsageError, match="takes neither base nor adapters"):
        verify(case.merged, case.base, quick=True)
    with pytest.raises(UsageError, match="must be a list of folders"):
        verify(case.merged, case.base, str(case.adapters[0]))
    with pytest.raises(AdapterError, match="is not a readable adapter"):
        verify(case.merged, case.base, [case.base])
    with pytest.raises(CheckpointError, match="is not a readable base"):
        verify(case.merged, case.base / "none", case.adapters)
    (case.base / "config.json").rename(case.base / "kept.json")
    with pytest.raises(CheckpointError, match=r"config\.json is missing or has no model_type"):
        verify(case.merged, case.base, case.adapters)
    (case.base / "kept.json").rename(case.base / "config.json")
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
        {"alpha_pattern": {f"a{number}|b": 1 for number in range(5000)}},
        {"task": 3},
        {"excluded": {Q: 3}},
        {"excluded": {Q: [0], f"base_model.{Q}": [0]}},
    ],
)
def test_an_adapter_with_a_broken_config_is_an_error(case: Case, config: dict[str, Any]) -> None:
    edit_json(case.adapters[0] / "adapter_config.json", **config)
    with pytest.raises(AdapterError, match="math is not a readable adapter"):
        verify(case.merged, case.base, case.adapters)


def test_the_oracle_shares_no_code_with_what_it_judges() -> None:
    """Errors, and a matcher that no regular expression can hang, are all that it takes from the rest of the package."""
    folder = Path(inspect.getsourcefile(multisbora.verify) or "").parent
    lines = [line for path in sorted(folder.glob("*.py")) for line in path.read_text().splitlines()]
    assert len(list(folder.glob("*.py"))) > 5
    taken = {line.split(" import ")[0] for line in lines if re.match(r"\s*(from|import) (\.\.|multisbora)", line)}
    assert taken == {"from ..errors", "from ..patterns", "from ..untrusted"}


shapes = st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple)
parts = st.sampled_from(
    [
        "model",
        "language_model",
        "vision_tower",
        "layers",
        "0",
        "3",
        "mlp",
        "experts",
        "gate",
        "router",
        "q",
        "my_experts",
    ]
)
stored_names = st.builds(
    lambda front, end: ".".join([*front, end]),
    st.lists(parts, min_size=1, max_size=5),
    st.sampled_from(["weight", "bias", "down_proj", "shared_expert_gate.weight", "experts.gate_up_proj"]),
)


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(stored_names, st.tuples(shapes, st.sampled_from(["BF16", "F32", "I8"])), max_size=8))
def test_the_verifier_takes_the_same_tensors_for_adaptable(
    tmp_path_factory: pytest.TempPathFactory, found: dict[str, tuple[tuple[int, ...], str]]
) -> None:
    """The rule is written twice; this compares the two."""
    folder = tmp_path_factory.mktemp("model")
    kinds = {"BF16": torch.bfloat16, "F32": torch.float32, "I8": torch.int8}
    content = {name: torch.zeros(shape, dtype=kinds[dtype]) for name, (shape, dtype) in found.items()}
    save_file(content, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    try:
        geometry: Geometry | None = from_checkpoint(folder)
    except Exception:
        geometry = None
    stored = tensors.Weights(folder).tensors
    expected = set() if geometry is None else {matrix.tensor for matrix in geometry.matrices}
    assert set(names.adaptable(stored)) == expected


def test_the_fingerprint_is_that_of_training(case: Case) -> None:
    stored = tensors.Weights(case.base).tensors
    digests = json.loads((case.merged / RECEIPT).read_text())["tensors"]
    assert names.fingerprint(stored, digests) == fingerprint(case.base, from_checkpoint(case.base))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_bytes_never_crash_it(case: Case, data: st.DataObject) -> None:
    """Whatever happens to a file of the merged checkpoint or of an adapter: a proof, a problem, or one clear error."""
    undo = case.merged / "multisbora_undo" / "chat.safetensors"
    inside = [case.merged / SHARD, case.merged / RECEIPT, undo]
    path = data.draw(st.sampled_from([*inside, *_files(case.adapters[0])]))
    before = path.read_bytes()
    content = bytearray(before)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 2000) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
    try:
        if path in inside:
            quick = verify(case.merged, quick=True)
            assert quick.ok == (quick.problem is None)
            assert not quick.ok or path.read_bytes() == before or path.suffix == ".json"
        proof = verify(case.merged, case.base, case.adapters)
    except AdapterError as error:
        assert "\n" not in str(error)
    else:
        assert proof.ok == (proof.problem is None)
        assert not proof.ok or path.read_bytes() == before or path.suffix == ".json"
    finally:
        path.write_bytes(before)


def test_blocks_cut_nothing_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of many blocks, whose last one is short."""
    monkeypatch.setattr(tensors, "BLOCK", 200)
    case = make_case(tmp_path)
    both(case.merged, case.base, case.adapters)
    for place in ((31, 31), (2, 31), (31, 30)):
        damaged = case.tensors()
        damaged[f"{Q}.weight"].view(torch.int16)[place] ^= 1
        save_file(damaged, case.merged / SHARD, metadata={"format": "pt"})
        problem = verify(case.merged, case.base, case.adapters).problem
        assert f"1 wrong cells, first at row {place[0]}, column {place[1]}, " in str(problem)
        assert not verify(case.merged, quick=True).ok
        damaged[f"{Q}.weight"].view(torch.int16)[place] ^= 1
        save_file(damaged, case.merged / SHARD, metadata={"format": "pt"})
    both(case.merged, case.base, case.adapters)


def test_the_command_checks_quickly_where_no_project_is(
    trained: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("merge", "--output", "merged").code == 0
    monkeypatch.chdir(trained / "merged")
    found = run("verify", ".", "--quick", "--json")
    assert (found.code, found.json["ok"], found.json["quick"]) == (0, True, True)
    assert run("verify", ".", "--quick").out.splitlines()[-1] == ". is what its receipt says"
    assert_refused(run("verify", ".", "--quick", "--base", str(trained)), 2, "neither base nor adapters")
    raw = bytearray(Path("model.safetensors").read_bytes())
    raw[-1] ^= 1
    Path("model.safetensors").write_bytes(raw)
    found = run("verify", ".", "--quick")
    assert (found.code, found.out.endswith("some of them outside the tasks' regions\n")) == (3, True)
    assert "multisbora: . does not hold: " in found.err and "differ" in found.err


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())
