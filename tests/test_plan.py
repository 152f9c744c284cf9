"""plan against the paper's own columns of trainable parameters, and against what allocate then does."""

from __future__ import annotations

import json
from typing import Any

import pytest

from multisbora.allocator import DEFAULT_TARGETS, allocate
from multisbora.errors import AllocationError, UsageError
from multisbora.geometry import Geometry, Matrix, from_card
from multisbora.plan import plan
from multisbora.registry import Registry

SMALL = from_card("SmolLM2-135M")


def millions(count: float) -> float:
    return round(count / 1e6, 1)


@pytest.mark.parametrize(
    ("model", "rank", "fa", "fb", "lora"),
    [
        ("LLaMA-7B", 32, 28.0, 28.0, 56.1),
        ("LLaMA-7B", 64, 56.1, 56.1, 112.2),
        ("Llama-3-8B", 32, 25.2, 31.5, 56.6),
        ("Llama-3-8B", 64, 50.3, 62.9, 113.2),
    ],
)
def test_tables_3_and_4(model: str, rank: int, fa: float, fb: float, lora: float) -> None:
    """Column TP of Tables 3 and 4, targets q, k, v, up, down (the authors' settings), every parameter counted once.

    FA trains B, rank x out_features a matrix; FB trains A, rank x in_features; LoRA both.
    """
    geometry = from_card(model)
    plans = [plan(geometry, variant=variant, rank=rank, target_modules=DEFAULT_TARGETS) for variant in ("fa", "fb")]
    assert [millions(found.trainable_parameters) for found in plans] == [fa, fb]
    assert {millions(found.lora_parameters) for found in plans} == {lora}


@pytest.mark.parametrize(
    ("model", "lora", "fa", "fb"),
    [("LLaMA-7B", 80.0, 43.5, 36.4), ("LLaMA-13B", 125.2, 68.2, 57.0), ("Llama-3-8B", 83.9, 44.0, 39.8)],
)
def test_table_5_counts_half(model: str, lora: float, fa: float, fb: float) -> None:
    """Column TP of Table 5: all linears of attention and MLP (also o and gate; no head), rank 64, printed HALVED.

    QLoRA's code divides the count of trainable parameters by two in 4-bit mode, since it takes them for packed pairs.
    The real counts are twice these. QLoRA's row is halved as well: r x (in + out), both factors.
    """
    plans = [plan(from_card(model), variant=variant, rank=64, target_modules="all-linear") for variant in ("fa", "fb")]
    assert [millions(found.trainable_parameters / 2) for found in plans] == [fa, fb]
    # The paper rounds 79.95M to 80.0M (two decimals first); 0.05M apart at most.
    assert plans[0].lora_parameters / 2e6 == pytest.approx(lora, abs=0.051)


def test_the_json_has_the_designs_keys() -> None:
    found = plan(SMALL, variant="fb", rank=32).to_json()
    assert list(found) == [
        "model",
        "variant",
        "rank",
        "matrices",
        "trainable_parameters",
        "lora_parameters",
        "adapter_bytes",
        "capacity_tasks",
        "matrices_detail",
    ]
    assert json.loads(json.dumps(found)) == found
    assert (found["model"], found["variant"], found["rank"], found["matrices"]) == ("SmolLM2-135M", "fb", 32, 150)
    assert found["capacity_tasks"] == 192 // 32
    assert len(found["matrices_detail"]) == 150
    assert found["trainable_parameters"] == sum(detail["trainable_parameters"] for detail in found["matrices_detail"])
    assert found["matrices_detail"][0] == {
        "module": "model.layers.0.mlp.down_proj",
        "out_features": 576,
        "in_features": 1536,
        "rank": 32,
        "trainable_parameters": 32 * 1536,
        "free": 576,
        "capacity_tasks": 18,
    }


@pytest.mark.parametrize("variant", ["fa", "fb"])
def test_figures_equal_what_allocate_gives(variant: Any) -> None:
    options: dict[str, Any] = {"variant": variant, "rank": 16, "rank_pattern": {"q_proj": 24}}
    expected = plan(SMALL, **options)
    with Registry.open("sqlite://") as registry:
        claims = allocate(registry, SMALL, ["a"], **options).tasks["a"]
    values = 0
    for module, region in claims.regions.items():
        rows, columns = region.values_shape(SMALL.find(module).shape)
        values += rows * columns
    assert expected.trainable_parameters == values
    indices = sum(region.rank for region in claims.regions.values())
    assert expected.adapter_bytes == 4 * values + 4 * indices
    assert len(expected.matrices) == len(claims.regions)


def test_capacity_falls_with_every_task_and_is_true() -> None:
    with Registry.open("sqlite://") as registry:
        for number in range(9):
            assert plan(SMALL, registry=registry).capacity_tasks == 9 - number
            allocate(registry, SMALL, [f"t{number}"])
        full = plan(SMALL, registry=registry)
        assert full.capacity_tasks == 0 and full.matrices[0].free == 1536 - 9 * 64
        assert full.trainable_parameters == plan(SMALL).trainable_parameters
        with pytest.raises(AllocationError):
            allocate(registry, SMALL, ["t9"])
        assert plan(SMALL, registry=registry, composition="other").capacity_tasks == 9
        # q, k, v and up have no cell left for a row: nine tasks own all of their 576 columns.
        crossing = plan(SMALL, registry=registry, variant="fb", rank=32)
        assert crossing.capacity_tasks == 0
        assert {m.matrix.kind for m in crossing.matrices if m.capacity_tasks} == {"down_proj"}
        with pytest.raises(AllocationError, match="other tasks own all of its 576 columns"):
            allocate(registry, SMALL, ["t9"], variant="fb", rank=32)
        assert plan(SMALL, registry=registry, variant="fb", rank=32, target_modules=["down_proj"]).capacity_tasks == 18
        assert plan(SMALL, registry=registry, target_modules=["down_proj"]).capacity_tasks == 24 - 9
        assert plan(SMALL, registry=registry, rank=1, rank_pattern={"down_proj": 100}).capacity_tasks == 0


def test_wanted_tasks_that_do_not_fit() -> None:
    plan(SMALL, tasks=9).require_capacity()
    with pytest.raises(
        AllocationError, match=r"10 tasks of rank 64 need 640 columns .* 576 of 576 are free: room for 9"
    ):
        plan(SMALL, tasks=10).require_capacity()


def test_conv1d_counts_logical_sizes() -> None:
    geometry = Geometry("g", "gpt2", (Matrix("h.0.attn.c_attn", "h.0.attn.c_attn.weight", 72, 24, "conv1d"),))
    assert plan(geometry, rank=3, target_modules=["c_attn"]).trainable_parameters == 3 * 72
    assert plan(geometry, rank=3, target_modules=["c_attn"], variant="fb").trainable_parameters == 3 * 24
    assert plan(geometry, rank=3, target_modules=["c_attn"]).capacity_tasks == 8


def test_wrong_usage_is_refused() -> None:
    for options in ({"rank": 0}, {"rank": 577}, {"variant": "x"}, {"target_modules": ["c_attn"]}):
        with pytest.raises(UsageError):
            plan(SMALL, **options)  # type: ignore[arg-type]
