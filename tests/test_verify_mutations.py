"""Every mutation of a merged checkpoint is caught by the full proof, and by the quick one unless a forger was at work;
each is named, with tensor, cell and owner or with the file."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from builders import edit_json, tiny_llama, write_adapter
from damaged import DOWN, INDEX, RECEIPT, SHARD, Case, Q, copied, make_case
from mutations import MUTATIONS, WEIGHT, Mutation, bit, lambda_twice, task_left_out
from safetensors.torch import load_file, save_file

from multisbora.geometry import from_checkpoint
from multisbora.merge import merge
from multisbora.verify import verify


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("honest"))


@pytest.fixture
def case(honest: Case, tmp_path: Path) -> Case:
    return copied(honest, tmp_path / "case")


def test_there_are_enough_of_them() -> None:
    assert len(MUTATIONS) > 60
    assert [name for name, (_, _, quick) in MUTATIONS.items() if quick is None] == [
        "a moved tensor",
        "another one, forged",
        "none, forged",
        "told weight and regions",
        "told scaling",
        "told adapter",
        "told claims",
        "told composition",
    ]


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_is_caught_and_named(case: Case, name: str) -> None:
    mutate, full, quick = MUTATIONS[name]
    mutate(case)
    proof = verify(case.merged, case.base, case.adapters)
    assert not proof.ok
    assert proof.problem is not None
    assert proof.problem.isprintable()
    assert re.search(full, proof.problem), proof.problem
    outside = name.startswith(("a bit outside", "the sign", "a bit of a ", "a bit of the", "minus"))
    assert (proof.cells_outside_regions == 1) == outside
    json.dumps(proof.to_json())

    proof = verify(case.merged, quick=True)
    assert proof.quick
    assert (proof.ok, proof.problem is None) == (quick is None, quick is None), proof.problem
    if quick is not None:
        assert str(proof.problem).isprintable()
        assert re.search(quick, str(proof.problem)), proof.problem
    assert not outside or proof.cells_outside_regions is None
    json.dumps(proof.to_json())


def retrained(case: Case) -> None:
    path = case.adapters[0] / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"base_model.model.{Q}.sbora_values"][0, 0] += 1
    save_file(tensors, path)


def other_base(case: Case) -> None:
    shutil.rmtree(case.base)
    tiny_llama(case.base, shards=2, seed=5)


def other_adapter(case: Case) -> None:
    """One of another task under this task's name."""
    geometry = from_checkpoint(case.base)
    shutil.rmtree(case.adapters[0])
    write_adapter(case.adapters[0], geometry, "math", indices={f"{Q}": [8, 9]})


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (retrained, f"^{WEIGHT}: 1 wrong cells, first at row 0, column 1, owned by math"),
        (other_base, "the base's bytes do not have the digest that the receipt tells: another base"),
        (
            other_adapter,
            r"^model.layers.0.mlp.down_proj.weight: .* wrong cells, first at row 0, column 1, which no task",
        ),
    ],
)
def test_other_inputs_are_caught_where_the_checkpoint_is_sound(case: Case, mutate: Mutation, message: str) -> None:
    mutate(case)
    proof = verify(case.merged, case.base, case.adapters)
    assert not proof.ok
    assert re.search(message, str(proof.problem)), proof.problem
    assert verify(case.merged, quick=True).ok


def test_another_task_s_adapter_is_refused(case: Case, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", from_checkpoint(case.base), "other")
    proof = verify(case.merged, case.base, [case.adapters[0], other])
    assert proof.problem == "the receipt has the tasks chat, math; the adapters given are math, other"


def test_a_forger_is_caught_by_the_full_proof_alone(case: Case) -> None:
    """Cells, digests and counts that fit each other are another honest merge to whoever has no adapters."""
    task_left_out(case)
    case.save(case.tensors() | {WEIGHT: lambda_twice(case.tensors()[WEIGHT], load_file(case.base / SHARD)[WEIGHT])})
    case.forge_regions()
    quick = verify(case.merged, quick=True)
    assert quick.problem == "chat changed no cell at its weight: it is not in the model"
    bit(WEIGHT, 7, 9)(case)
    case.forge_regions()
    assert verify(case.merged, quick=True).ok
    proof = verify(case.merged, case.base, case.adapters)
    assert f"{DOWN}.weight: " in str(proof.problem) and "owned by chat" in str(proof.problem)


def test_two_tasks_in_one_cell_are_caught(case: Case) -> None:
    """Even where a receipt and both adapters agree on it."""
    for adapter in case.adapters:
        edit_json(adapter / "adapter_config.json", excluded={})
    case.receipt(lambda c: [r.update(excluded=[]) for r in c["tasks"]["chat"]["regions"].values()])
    for options in ({"base": case.base, "adapters": case.adapters}, {"quick": True}):
        proof = verify(case.merged, **options)  # type: ignore[arg-type]
        assert not proof.ok
        assert re.search("is owned by another task too|where chat owns BF16", str(proof.problem))


@pytest.mark.parametrize("size", [2000, 10**9])
def test_other_files_than_the_base_s(case: Case, tmp_path: Path, size: int) -> None:
    """Tensors laid out anew are held against what the receipt says of their files."""
    output = tmp_path / "sharded"
    merge(case.base, case.adapters, {"math": 0.5}, output=output, max_shard_size=size)
    arguments: tuple[dict[str, Any], ...] = ({"base": case.base, "adapters": case.adapters}, {"quick": True})
    for options in arguments:
        proof = verify(output, **options)
        assert proof.ok, proof.problem
    assert (output / INDEX).is_file() == (size < 10**9)
    edit_json(output / RECEIPT, max_shard_size=None)
    assert "the weights are in model" in str(verify(output, **arguments[0]).problem)
    edit_json(output / RECEIPT, max_shard_size=500)
    first = sorted(output.glob("model*.safetensors"))[0].name
    for options in arguments:
        assert re.match(r"model.*safetensors holds \d+ bytes of tensors, above", str(verify(output, **options).problem))
    edit_json(output / RECEIPT, max_shard_size=size)
    if size != 2000:
        shutil.copy(case.base / INDEX, output / INDEX)
        for options in arguments:
            assert str(verify(output, **options).problem).startswith(f"{INDEX} is in {output}, where model.safetensors")
    if size == 2000:
        index = json.loads((output / INDEX).read_text())
        edit_json(output / INDEX, metadata=index["metadata"] | {"total_size": 1})
        for options in arguments:
            assert str(verify(output, **options).problem).startswith(f"{INDEX} has total_size 1, the tensors have")
        edit_json(output / INDEX, metadata=index["metadata"])
        (output / first).rename(output / "first.safetensors")
        edit_json(
            output / INDEX,
            weight_map={k: v.replace(first, "first.safetensors") for k, v in index["weight_map"].items()},
        )
        for options in arguments:
            assert "first.safetensors" in str(verify(output, **options).problem)
