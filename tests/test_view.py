"""How a quantised base is recorded, and which view a set of adapters is put on."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multisbora.errors import UsageError
from multisbora.view import Quantization, choose_view

NF4 = Quantization("nf4", "bfloat16", 64, True, ("model.layers.0.q", "model.layers.0.v"), "a" * 64)
INT8 = Quantization("int8", "float16", None, False, ("model.layers.0.q",), "b" * 64)


@settings(deadline=None, max_examples=50)
@given(
    scheme=st.one_of(
        st.tuples(st.sampled_from(["nf4", "fp4"]), st.sampled_from([64, 128]), st.booleans()),
        st.just(("int8", None, False)),
    ),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    modules=st.lists(st.text(min_size=1), min_size=1),
    digest=st.text(),
)
def test_json_and_back(scheme: tuple[str, Any, bool], dtype: str, modules: list[str], digest: str) -> None:
    kind, block_size, double = scheme
    given_ = Quantization(kind, dtype, block_size, double, tuple(modules), digest)
    assert Quantization.from_json(json.loads(json.dumps(given_.to_json()))) == given_


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "nf5"},
        {"dtype": "float64"},
        {"block_size": None},
        {"block_size": "64"},
        {"double": 1},
        {"kind": "int8"},
        {"kind": "int8", "block_size": None},
        {"modules": []},
        {"modules": "q"},
        {"modules": [1]},
        {"digest": None},
        {"more": 1},
        {"kind": ["nf4"]},
    ],
)
def test_what_means_nothing_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="quantisation"):
        Quantization.from_json(NF4.to_json() | change)


@pytest.mark.parametrize("content", [[], "nf4", {}, None])
def test_what_is_no_quantisation_is_refused(content: object) -> None:
    with pytest.raises(UsageError, match="has the keys"):
        Quantization.from_json(content)


@pytest.mark.parametrize(
    ("trained", "asked", "found"),
    [
        ({"a": None, "b": None}, None, None),
        ({"a": NF4, "b": NF4}, None, NF4),
        ({"a": NF4, "b": NF4}, "dequantized", NF4),
        ({"a": NF4, "b": INT8}, "original", None),
        ({"a": NF4, "b": None}, "dequantized", NF4),
        ({"a": NF4, "b": None}, "original", None),
        ({"a": None}, "original", None),
    ],
)
def test_the_view_of_the_training_or_the_one_asked_for(
    trained: dict[str, Quantization | None], asked: str | None, found: Quantization | None
) -> None:
    assert choose_view(trained, asked) == found


@pytest.mark.parametrize(
    ("trained", "asked", "message"),
    [
        ({"a": NF4, "b": None}, None, r"a on .*nf4 with double.*, b on the original.*original or --base-view dequant"),
        ({"a": NF4, "b": INT8}, None, r"a on .*nf4.*, b on .*int8.*say --base-view original$"),
        ({"a": NF4, "b": replace(NF4, digest="c" * 64)}, "dequantized", "a and b were trained on differently"),
        ({"a": None, "b": None}, "dequantized", "a, b trained on the original base, .*say --base-view original"),
        ({"a": NF4}, "quantized", "base view 'quantized' is unknown: use original or dequantized"),
    ],
)
def test_a_view_that_nobody_can_know_is_refused(
    trained: dict[str, Quantization | None], asked: str | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        choose_view(trained, asked)
