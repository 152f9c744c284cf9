"""The ASCII map: exact text, and what holds for any claims."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multisbora.errors import GeometryError
from multisbora.geometry import Geometry, Matrix, from_card
from multisbora.ownership import MAX_LINES, WIDTH, ownership
from multisbora.plan import Plan, plan
from multisbora.region import Region
from multisbora.registry.claims import TaskClaims

SMALL = from_card("SmolLM2-135M")


def claims_of(
    task: str, ranks: dict[str, int], *, variant: Any = "fa", rank: int = 64, start: int = 0, composition: str = "team"
) -> TaskClaims:
    regions = {module: Region(variant, tuple(range(start, start + count))) for module, count in ranks.items()}
    return TaskClaims("SmolLM2-135M", "", composition, task, variant, rank, regions)


def modules(*kinds: str, layers: int = 30) -> list[str]:
    return [m.module for m in SMALL.matrices if m.kind in kinds and int(m.module.split(".")[2]) < layers]


def planned(**options: Any) -> Plan:
    return plan(SMALL, **{"rank": 64, **options})


def test_nothing_claimed_yet() -> None:
    assert ownership(SMALL, {}, planned(tasks=2)).lines() == [
        "SmolLM2-135M",
        "+ 2 planned fa 64  . free",
        "kind           axis    share of the indices               free after/all",
        "down_proj      columns [+++.............................] 1408/1536",
        "up_proj        columns [+++++++.........................] 448/576",
        "k_proj         columns [+++++++.........................] 448/576",
        "q_proj         columns [+++++++.........................] 448/576",
        "v_proj         columns [+++++++.........................] 448/576",
    ]


def test_tasks_of_both_variants_protected_channels_and_uneven_layers() -> None:
    held = {
        "math": claims_of("math", dict.fromkeys(modules("q_proj", "v_proj"), 64)),
        "code": claims_of("code", dict.fromkeys(modules("v_proj"), 48), variant="fb", rank=48),
        "early": claims_of("early", dict.fromkeys(modules("q_proj", layers=3), 288), rank=288, start=64),
    }
    protected = {("model.layers.29.self_attn.q_proj", 1): (1, 2, 3), ("model.layers.0.self_attn.v_proj", 0): 4}
    found = ownership(SMALL, held, planned(target_modules=["q_proj"]), protected)
    assert found.lines() == [
        "SmolLM2-135M, composition team",
        "x protected  a math fa 64  b code fb 48  c early fa 288  + 1 planned fa 64",
        ". free",
        "kind           axis    share of the indices               free after/all",
        "q_proj         columns [xaaacc+++.......................] 160..448/576",
        "v_proj         columns [aaaa............................] 512/576",
        "v_proj         rows    [xbbbbbbbb.......................] 140..144/192",
    ]
    assert found.to_json()[0] == {
        "kind": "q_proj",
        "axis": "columns",
        "size": 576,
        "matrices": 30,
        "tasks": {"math": [64, 64], "early": [0, 288]},
        "protected": [0, 3],
        "planned": [64, 64],
        "free": [160, 448],
    }
    assert json.loads(json.dumps(found.to_json())) == found.to_json()


def test_what_is_missing_for_tasks_that_do_not_fit_is_said_in_words() -> None:
    held = {"big": claims_of("big", dict.fromkeys(modules("q_proj"), 500), rank=500)}
    found = ownership(SMALL, held, planned(tasks=2, target_modules=["q_proj"]))
    assert found.lines()[-1] == "q_proj         columns [aaaaaaaaaaaaaaaaaaaaaaaaaaaa++++] 52 missing of 576"


def test_no_task_is_planned_where_all_hold_their_claims() -> None:
    held = {"math": claims_of("math", dict.fromkeys(modules("k_proj"), 576), rank=576)}
    assert ownership(SMALL, held, planned(tasks=0)).lines() == [
        "SmolLM2-135M, composition team",
        "a math fa 576  . free",
        "kind           axis    share of the indices               free/all",
        "k_proj         columns [aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa] 0/576",
    ]


def test_kinds_of_one_name_and_other_sizes_stay_apart() -> None:
    parts = [("h.{}.attn.c_proj", 24, 24), ("h.{}.mlp.c_proj", 24, 96), ("h.{}.attn.c_attn", 72, 24)]
    matrices = (
        Matrix(name.format(i), f"{name.format(i)}.weight", out, in_, "conv1d")
        for i in range(2)
        for name, out, in_ in parts
    )
    geometry = Geometry("gpt2", "gpt2", tuple(matrices))
    lines = ownership(geometry, {}, plan(geometry, rank=6, target_modules="all-linear")).lines()
    assert lines[3:] == [
        "c_attn         columns [++++++++........................] 18/24",
        "attn.c_proj    columns [++++++++........................] 18/24",
        "mlp.c_proj     columns [++..............................] 90/96",
    ]


def test_experts_are_one_kind() -> None:
    names = [f"model.layers.{i}.mlp.experts.{e}.w1" for i in range(2) for e in range(8)]
    geometry = Geometry("m", "mixtral", tuple(Matrix(name, f"{name}.weight", 16, 32) for name in names))
    found = ownership(geometry, {}, plan(geometry, rank=8, target_modules=["w1"]))
    assert [(strip.kind, strip.matrices) for strip in found.strips] == [("w1", 16)]


def test_many_tasks_share_a_mark_and_long_names_are_cut() -> None:
    held = {f"{'task' * 20}{n}": claims_of(f"t{n}", dict.fromkeys(modules("q_proj"), 10), rank=10) for n in range(50)}
    lines = ownership(SMALL, held, planned(target_modules=["q_proj"])).lines()
    assert "a tasktasktasktaskta.. fa 10" in lines[1] and "* 30 more tasks" in " ".join(lines)
    # Fifty tasks of ten columns: 32 marks cannot be in proportion to the last column, but none of the 20 is left out.
    assert lines[-1] == "q_proj         columns [abcdefghijklmnopqrst*********++.] 12/576"


def test_too_many_kinds_show_the_tightest() -> None:
    sizes = {f"model.layers.0.p{n:02}": 32 + n for n in range(40)}
    geometry = Geometry("m", "llama", tuple(Matrix(m, f"{m}.weight", 8, size) for m, size in sizes.items()))
    lines = ownership(geometry, {}, plan(geometry, rank=16, target_modules="all-linear")).lines()
    assert len(lines) == MAX_LINES
    assert [line.split()[0] for line in lines[3:-1]] == [f"p{n:02}" for n in range(21)]
    assert lines[-1] == "and 19 more with more room"


def test_claims_of_another_model_are_refused() -> None:
    held = {"math": claims_of("math", {"model.layers.99.self_attn.q_proj": 4})}
    with pytest.raises(GeometryError):
        ownership(SMALL, held, planned())


def test_names_with_other_leading_parts_are_found() -> None:
    held = {"math": claims_of("math", {m.removeprefix("model."): 64 for m in modules("q_proj")})}
    assert ownership(SMALL, held, planned(tasks=0)).strips[0].tasks == {"math": (64, 64)}


@settings(deadline=None, max_examples=60)
@given(
    ranks=st.lists(st.tuples(st.integers(1, 12), st.booleans(), st.integers(1, 30)), max_size=30),
    tasks=st.integers(0, 40),
    guarded=st.integers(0, 20),
)
def test_shape_of_any_map(ranks: list[tuple[int, bool, int]], tasks: int, guarded: int) -> None:
    held = {}
    for number, (rank, rows, layers) in enumerate(ranks):
        ranked = dict.fromkeys(modules("q_proj", "v_proj", layers=layers), rank)
        held[f"task-{number}"] = claims_of(f"t{number}", ranked, variant="fb" if rows else "fa", rank=rank)
    protected = {(module, 0): range(guarded) for module in modules("v_proj")}
    found = ownership(SMALL, held, planned(rank=8, tasks=tasks), protected)
    lines = found.lines()
    assert len(lines) <= MAX_LINES and all(len(line) <= WIDTH and line.isascii() for line in lines)
    assert lines == ownership(SMALL, held, planned(rank=8, tasks=tasks), protected).lines()
    for strip, line in zip(found.strips, lines[-len(found.strips) :] if found.strips else [], strict=True):
        bar = line[line.index("[") + 1 : line.index("]")]
        assert len(bar) == 32
        # Whoever owns anything is seen, and nobody else.
        assert set(bar) == {mark for mark, count in strip.totals.items() if count}
        assert sum(strip.totals.values()) == strip.size * strip.matrices
        for mark, count in strip.totals.items():
            share = 32 * count / (strip.size * strip.matrices)
            assert abs(bar.count(mark) - share) <= len(strip.totals)
