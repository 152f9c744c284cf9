"""Scaling, patterns, and the one function that says what a task adds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from multisbora.delta import delta, pattern_value, scaling

Q3 = "model.layers.3.self_attn.q_proj"


@pytest.mark.parametrize(
    ("pattern", "module", "matches"),
    [
        ("q_proj", Q3, True),
        ("self_attn.q_proj", Q3, True),
        (Q3, Q3, True),
        (r"layers\.3\..*q_proj", Q3, True),
        ("layers.3.*.q_proj", Q3, True),
        (r"layers\.(1|3)\.self_attn\..*", Q3, True),
        ("attn.q_proj", Q3, False),
        ("proj", Q3, False),
        ("q_proj", Q3 + "2", False),
        ("layers.3", Q3, False),
        ("k_proj|q_proj", Q3, True),
    ],
)
def test_patterns_name_whole_last_parts(pattern: str, module: str, matches: bool) -> None:
    assert pattern_value({pattern: 1}, module, 0) == int(matches)


def test_the_first_pattern_wins() -> None:
    assert pattern_value({"k_proj": 1, "q_proj": 2, ".*": 3}, Q3, 0) == 2
    assert pattern_value({".*": 3, "q_proj": 2}, Q3, 0) == 3
    assert pattern_value({}, Q3, 7) == 7


def test_patterns_are_read_as_peft_reads_them() -> None:
    from peft.utils.other import get_pattern_key

    modules = [Q3, "model.layers.13.mlp.down_proj", "transformer.h.0.attn.c_attn"]
    for pattern in ("q_proj", "layers.3.*", r".*\.13\..*", "h.0.attn.c_attn", "attn", "down_proj", "proj"):
        for module in modules:
            peft = get_pattern_key([pattern], module) == pattern
            # PEFT answers with the module itself where no pattern matches.
            assert pattern_value({pattern: True}, module, False) == peft


def test_scaling() -> None:
    assert scaling(64, 32, False) == 2.0
    assert scaling(64, 32, True) == 64 / math.sqrt(32)


def test_delta_gives_numpy_and_torch_the_same_bits() -> None:
    values = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    for weight, scale in ((1.0, 1.0), (0.8, 1 / 3), (-0.3, math.sqrt(2))):
        ours = delta(values, scale, weight)
        assert ours.dtype == np.float32
        live = delta(torch.from_numpy(values), scale, weight)
        assert live.dtype == torch.float32
        assert np.array_equal(ours.view(np.int32), live.numpy().view(np.int32))
