"""Regions against brute force: a set of cells."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multisbora.errors import UsageError
from multisbora.region import Region, Variant, draw, own_axis, priorities

SHAPE = (7, 6)


@st.composite
def regions(draw: Any, variant: Variant | None = None) -> Region:
    variant = variant or draw(st.sampled_from(["fa", "fb"]))
    axis = own_axis(variant)
    own = draw(st.sets(st.integers(0, SHAPE[axis] - 1), min_size=1))
    excluded = draw(st.sets(st.integers(0, SHAPE[1 - axis] - 1)))
    return Region(variant, tuple(sorted(own)), tuple(sorted(excluded)))


def cells(region: Region) -> set[tuple[int, int]]:
    """The cells, one by one, from the words of the design."""
    return {
        (row, column)
        for row in range(SHAPE[0])
        for column in range(SHAPE[1])
        if (column in region.indices and row not in region.excluded)
        or (row in region.indices and column not in region.excluded)
        if (column in region.indices if region.variant == "fa" else row in region.indices)
        if (row not in region.excluded if region.variant == "fa" else column not in region.excluded)
    }


@given(regions())
def test_cells_are_counted(region: Region) -> None:
    assert region.cells(SHAPE) == len(cells(region))
    region.check(SHAPE, "x")


@given(regions(), regions())
def test_crossing_regions_meet_exactly_where_they_share_a_cell(one: Region, other: Region) -> None:
    assert one.meets(other) == other.meets(one)
    shared = bool(cells(one) & cells(other))
    if one.variant != other.variant:
        assert one.meets(other) == shared
    elif shared:
        assert one.meets(other)
    else:
        # Of one variant, regions that share an index meet even where exclusions part their cells.
        assert one.meets(other) == bool(set(one.indices) & set(other.indices))


@given(st.lists(regions(), max_size=6))
def test_with_crossings_excluded_no_cell_has_two_owners(drawn: list[Region]) -> None:
    held: list[Region] = []
    for region in drawn:
        used = {index for earlier in held if earlier.variant == region.variant for index in earlier.indices}
        indices = tuple(index for index in region.indices if index not in used)
        if not indices:
            continue
        crossed = {index for earlier in held if earlier.variant != region.variant for index in earlier.indices}
        held.append(Region(region.variant, indices, tuple(sorted(crossed))))
    owned = [cells(region) for region in held]
    assert sum(map(len, owned)) == len(set().union(*owned))
    assert not any(one.meets(other) for place, one in enumerate(held) for other in held[:place])
    # Masking costs no cell: every claimed row and column is owned whole, by somebody.
    rows = {index for region in held if region.variant == "fb" for index in region.indices}
    columns = {index for region in held if region.variant == "fa" for index in region.indices}
    whole = {(r, c) for r in range(SHAPE[0]) for c in range(SHAPE[1]) if r in rows or c in columns}
    assert set().union(*owned) == whole


def test_shapes_of_values() -> None:
    assert Region("fa", (1, 3)).values_shape(SHAPE) == (7, 2)
    assert Region("fb", (1, 3, 4)).values_shape(SHAPE) == (3, 6)
    assert Region("fb", (1, 3, 4)).rank == 3


@pytest.mark.parametrize("indices", [(), (1, 1), (2, 1), (-1, 2)])
def test_bad_indices_are_refused(indices: tuple[int, ...]) -> None:
    with pytest.raises(UsageError):
        Region("fa", indices)
    if indices:
        with pytest.raises(UsageError, match="excluded must be sorted"):
            Region("fa", (0,), indices)


def test_other_bad_regions_are_refused() -> None:
    with pytest.raises(UsageError, match="variant 'fc' is unknown"):
        Region("fc", (0,))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="q_proj: index 6 is outside an axis of 6"):
        Region("fa", (6,)).check(SHAPE, "q_proj")
    with pytest.raises(UsageError, match="q_proj: excluded 7 is outside an axis of 7"):
        Region("fa", (5,), (7,)).check(SHAPE, "q_proj")
    Region("fb", (6,), (5,)).check(SHAPE, "q_proj")


def test_priorities_are_fixed() -> None:
    """A golden, from SplitMix64 as published and the key's SHA-256, both worked out in plain integers."""
    state = int.from_bytes(hashlib.sha256(b'[0, "m"]').digest()[:8], "little")
    expected = []
    for step in range(1, 6):
        x = (state + step * 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        expected.append(x ^ (x >> 31))
    assert priorities(5, 0, "m").tolist() == expected
    assert priorities(3, 0, "m").tolist() == expected[:3]
    assert priorities(5, 1, "m").tolist() != expected


@given(st.integers(1, 40), st.data())
def test_a_draw_takes_the_free_channels_of_least_priority(size: int, data: Any) -> None:
    taken = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    free = [index for index in range(size) if not taken[index]]
    count = data.draw(st.integers(0, len(free)))
    drawn = draw(size, count, "key", taken=taken)
    assert drawn == tuple(sorted(sorted(free, key=priorities(size, "key").tolist().__getitem__)[:count]))
    assert draw(size, len(free), "key", taken=taken) == tuple(free)
    with pytest.raises(ValueError):
        draw(size, len(free) + 1, "key", taken=taken)
