"""Moments on their own: what cannot be, blocks asked for, bytes and back, and what harm they foretell."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from commands import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from multisbora.errors import DataError, UsageError
from multisbora.moments import FLOATS, WIDEST, Moments, Site, harm, pack_triangle, unpack_triangle

Q, DOWN = "model.layers.0.q_proj", "model.layers.0.down_proj"


def site(out_features: int = 3, in_features: int = 7, channels: tuple[int, ...] = (1, 4, 6), seed: int = 0) -> Site:
    x = np.random.default_rng(seed).normal(size=(40, in_features))
    chosen = x[:, list(channels)]
    return Site(
        energy=(x**2).mean(0).astype(np.float32),
        response=np.arange(1, out_features + 1, dtype=np.float32),
        channels=np.array(channels, np.int32),
        block=(chosen.T @ chosen / 40).astype(np.float32),
    )


def moments(**changes: Any) -> Moments:
    sites = {Q: site(), DOWN: site(7, 5, (), seed=1)}
    return Moments(
        **(
            {"task": "math", "base_fingerprint": "blake3:1", "geometry_digest": "2" * 64}
            | {"rows": 3, "tokens": 40, "sites": sites}
            | changes
        )
    )


def assert_same(one: Moments, other: Moments) -> None:
    assert replace(one, sites={}) == replace(other, sites={})
    assert one.sites.keys() == other.sites.keys()
    for module, found in one.sites.items():
        for what in ("energy", "response", "channels", "block"):
            mine, theirs = getattr(found, what), getattr(other.sites[module], what)
            assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs), (module, what)


def test_the_block_of_some_channels_in_their_order() -> None:
    found = moments()
    whole = found.sites[Q].block
    assert np.array_equal(found.block(Q, [6, 1]), whole[np.ix_([2, 0], [2, 0])])
    assert np.array_equal(found.block(Q, np.array([1, 4, 6])), whole)
    assert found.block(Q, []).shape == (0, 0)


@pytest.mark.parametrize(
    ("module", "channels", "words"),
    [
        (Q, [1, 2, 4], f"lack 1 of 3 channels in {Q}"),
        (Q, [7], "lack 1 of 1 channels"),
        (DOWN, [0, 1], "lack 2 of 2 channels"),
        ("model.layers.9.q_proj", [0], "lack the matrix in model.layers.9.q_proj"),
    ],
)
def test_channels_that_were_not_measured(module: str, channels: list[int], words: str) -> None:
    found = moments()
    refused(lambda: found.block(module, channels), DataError, words, "multisbora measure --tasks math")


def test_more_channels_than_are_ever_measured() -> None:
    refused(lambda: moments().block(DOWN, list(range(WIDEST + 1))), DataError, "4097 input channels", "take fa tasks")


def test_moments_of_another_base() -> None:
    moments().check_base("blake3:1")
    refused(
        lambda: moments().check_base("blake3:2"), DataError, "another base model", "multisbora measure --tasks math"
    )


def test_without_blocks_the_rest_stays() -> None:
    found = moments().without_blocks()
    assert np.array_equal(found.sites[Q].energy, site().energy)
    assert all(s.block.shape == (0, 0) and len(s.channels) == 0 for s in found.sites.values())
    assert_same(Moments.from_bytes(found.to_bytes(), "x"), found)


def change(**parts: Any) -> dict[str, Any]:
    return {"sites": {Q: replace(site(), **parts)}}


BLOCK = site().block


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (change(energy=np.full(7, np.nan, np.float32)), f"{Q}: energy is not finite"),
        (change(response=np.full(3, np.inf, np.float32)), "response is not finite"),
        (change(block=np.full((3, 3), np.nan, np.float32)), "block is not finite"),
        (change(energy=-site().energy), "a mean square is negative"),
        (change(block=-BLOCK), "a mean square is negative"),
        (change(block=BLOCK[:2, :2]), "its channels do not fit its block"),
        (change(channels=np.array([1, 1, 6], np.int32)), "its channels do not fit its block"),
        (change(channels=np.array([1, 4, 7], np.int32)), "its channels do not fit its block"),
        (change(channels=np.array([-1, 4, 6], np.int32)), "its channels do not fit its block"),
        (change(block=np.triu(BLOCK)), "its block is not symmetric"),
        (change(energy=site().energy[None]), "energy has 2 axes, not 1"),
        ({"rows": 0}, "0 rows"),
        ({"tokens": -1}, "-1 tokens"),
        ({"source": "guess"}, "source guess"),
        ({"source": "adapter"}, "adapter None"),
        ({"adapter": "3" * 64}, "source task"),
    ],
)
def test_what_cannot_be(changes: dict[str, Any], words: str) -> None:
    refused(lambda: moments(**changes), DataError, "task math are damaged", words, "multisbora measure", "--tasks math")


def test_a_name_that_no_task_has() -> None:
    refused(lambda: moments(task="../x"), UsageError, "not usable")


def test_bytes_and_back() -> None:
    found = moments(source="text")
    assert_same(Moments.from_bytes(found.to_bytes(), "x"), found)
    assert found.to_bytes() == moments(source="text").to_bytes()
    through = moments(source="adapter", adapter="3" * 64)
    assert_same(Moments.from_bytes(through.to_bytes(), "x"), through)
    refused(lambda: through.check_base("blake3:2"), DataError, "multisbora measure --trained --tasks math")


def rewritten(**changes: Any) -> bytes:
    """The bytes of moments whose header says something else."""
    content = moments().to_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    head = json.loads(header["__metadata__"]["multisbora_moments"])
    head |= changes.pop("head", {})
    for key in changes.pop("without", ()):
        del head[key]
    header["__metadata__"]["multisbora_moments"] = json.dumps(head)
    for name, change in changes.items():
        if change is None:
            del header[name]
        else:
            header[name] = header.get(name, {}) | change
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + content[8 + length :]


ENERGY, CHANNELS = f"{Q}.energy", f"{Q}.channels"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "ends inside its header"),
        (b"\xff" * 8, "ends inside its header"),
        (moments().to_bytes()[:100], "ends inside its header"),
        (struct.pack("<Q", 4) + b"[[]]", "no multisbora_moments"),
        (struct.pack("<Q", 4) + b"nope", "not JSON"),
        (struct.pack("<Q", 2) + b"{}", "no multisbora_moments"),
        (moments().to_bytes()[:-4], "is no tensor of it"),
        (rewritten(head={"format": 2}), "format 1"),
        (rewritten(head={"more": 1}), "format 1"),
        (rewritten(without=["rows"]), "format 1"),
        (rewritten(head={"rows": "3"}), "something else than names and counts"),
        (rewritten(head={"rows": True}), "something else than names and counts"),
        (rewritten(head={"task": "../x"}), "not usable"),
        (rewritten(head={"rows": 0}), "0 rows"),
        (rewritten(**{ENERGY: {"shape": [8]}}), "is no tensor of it"),
        (rewritten(**{ENERGY: {"shape": [-7]}}), "is no tensor of it"),
        (rewritten(**{ENERGY: {"shape": [1] * 40 + [7]}}), "is no tensor of it"),
        (rewritten(**{ENERGY: {"shape": [0, 10**19], "data_offsets": [0, 0]}}), "is no tensor of it"),
        (rewritten(**{ENERGY: {"dtype": "F16"}}), "is no tensor of it"),
        (rewritten(**{ENERGY: {"dtype": []}}), "is no tensor of it"),
        (rewritten(**{ENERGY: {"more": 1}}), "is no tensor of it"),
        (rewritten(**{ENERGY: {"dtype": "I32"}}), "another dtype"),
        (rewritten(**{CHANNELS: None}), "lacks some of"),
        (rewritten(strange={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}), "belongs to no moments"),
        (rewritten(**{"\n.energy": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}), "belongs to no moments"),
    ],
)
def test_bytes_that_are_no_moments(content: bytes, words: str) -> None:
    refused(lambda: Moments.from_bytes(content, "moments.safetensors"), DataError, "moments.safetensors", words)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_damaged_bytes_raise_one_kind_of_error(data: st.DataObject) -> None:
    content = bytearray(moments().to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        Moments.from_bytes(bytes(content), "x")
    except DataError as error:
        assert "\n" not in str(error)


@settings(deadline=None)
@given(st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_a_triangle_is_the_whole_block(size: int, seed: int) -> None:
    half = np.random.default_rng(seed).normal(size=(size, size))
    block = (half + half.T).astype(np.float32)
    packed = pack_triangle(block)
    assert len(packed) == FLOATS.itemsize * size * (size + 1) // 2
    assert np.array_equal(unpack_triangle(packed, size), block)
    with pytest.raises(ValueError, match="not the triangle"):
        unpack_triangle(packed + b"\0\0\0\0", size)


def test_harm_is_the_mean_square_of_the_shift() -> None:
    """Of 40 tokens of equal weight, |B x|^2 / out."""
    x = np.random.default_rng(3).normal(size=(40, 4))
    values = np.random.default_rng(4).normal(size=(6, 4))
    shifts = x @ values.T
    assert harm(values, x.T @ x / 40) == pytest.approx((shifts**2).sum(1).mean() / 6)
    assert harm(2 * values, x.T @ x / 40) == pytest.approx(4 * (shifts**2).sum(1).mean() / 6)
    assert harm(0 * values, x.T @ x / 40) == 0
