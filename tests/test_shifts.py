"""What updates add to outputs: the sums of small matrices against the shifts themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import adapt, config, fill, linear, one_hot, random_weight

from multisbora.shifts import Effect, Watch

OUT, IN, TOKENS = 6, 9, 5
AXES = {"fa": IN, "fb": OUT}
CLAIMS = st.sampled_from(["fa", "fb"]).flatmap(
    lambda variant: st.tuples(
        st.just(variant), st.sets(st.integers(0, AXES[variant] - 1), min_size=1, max_size=4).map(sorted)
    )
)


@settings(deadline=None, max_examples=40)
@given(
    claims=st.lists(CLAIMS, min_size=1, max_size=4),
    missing=st.integers(0, 4),
    kind=st.sampled_from(["linear", "conv1d"]),
    seed=st.integers(0, 99),
    loud=st.booleans(),
)
def test_inner_products_are_those_of_dense_shifts(
    claims: list[tuple[str, list[int]]], missing: int, kind: str, seed: int, loud: bool
) -> None:
    """Of any tasks: that share cells or a channel, cross, or have nothing in this layer."""
    torch.manual_seed(seed)
    named = {f"task{i}": config(variant, indices, alpha=2.0) for i, (variant, indices) in enumerate(claims)}
    layer = adapt(linear(random_weight(OUT, IN), kind), **named)
    dense = []
    for name, (variant, indices) in zip(named, claims, strict=True):
        values = torch.randn(layer.sbora_values[name].shape)
        fill(layer, name, values)
        dense.append(one_hot(variant, indices, values, (OUT, IN)) * 2.0 / len(indices))
    names = list(named)
    names.insert(missing % (len(names) + 1), "elsewhere")
    dense.insert(names.index("elsewhere"), torch.zeros(OUT, IN, dtype=torch.float64))
    x, weights = torch.randn(TOKENS, IN), torch.rand(TOKENS)
    watch = Watch(layer, names)
    got = watch.nothing()
    got[0] += watch.inner_products(watch.read(x), weights if loud else None)
    shifts = torch.stack([x.double() @ update.t() for update in dense])  # (tasks, tokens, out)
    wanted = torch.einsum("jto,kto,t->jk", shifts, shifts, weights.double() if loud else torch.ones(TOKENS).double())
    torch.testing.assert_close(got[0].double(), wanted, rtol=1e-4, atol=1e-4)
    assert not got[1].any()


def test_what_is_kept_for_backward_is_as_wide_as_the_model_computes() -> None:
    """r numbers a token and task: in bf16 for columns; projections are sums, and kept as such."""
    x = torch.randn(TOKENS, IN).bfloat16()
    columns = adapt(linear(random_weight(OUT, IN, torch.bfloat16)), a=config("fa", [1, 4]), b=config("fa", [0]))
    read = Watch(columns, ["a", "b"]).read(x)
    assert read.dtype == torch.bfloat16 and torch.equal(read, x[:, [1, 4, 0]])
    both = adapt(linear(random_weight(OUT, IN, torch.bfloat16)), a=config("fa", [1, 4]), b=config("fb", [0]))
    assert Watch(both, ["a", "b"]).read(x).dtype == torch.float32


def grams(shifts: np.ndarray) -> list[np.ndarray]:
    """(rows of, shift by, tokens, out) -> for the rows of each task (2, tasks, tasks), both weightings alike."""
    return [np.stack([np.einsum("jto,kto->jk", part, part)] * 2) for part in shifts]


@settings(deadline=None, max_examples=40)
@given(
    lambdas=st.lists(st.sampled_from([1.0, 0.0, -0.5, 2.0, 0.3]), min_size=2, max_size=4),
    silent=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_shares_and_cosines(lambdas: list[float], silent: int, seed: int) -> None:
    """By what they mean: of shifts at their lambdas, against the own one at 1; of one that is silent nothing."""
    count = len(lambdas)
    shifts = np.random.default_rng(seed).normal(size=(count, count, TOKENS, OUT))
    if silent < count:
        shifts[:, silent] = 0
    effect = Effect.of(grams(shifts), lambdas)
    for i in range(count):
        own = shifts[i, i].ravel()
        for j in range(count):
            added = lambdas[j] * shifts[i, j].ravel()
            share, cosine = effect.shift.share[i, j], effect.harm.cosine[i, j]
            assert effect.harm.energy[i, j] == pytest.approx(added @ added)
            if i == silent:
                assert np.isnan(share) and np.isnan(cosine)
                continue
            assert share == pytest.approx((added @ added) / (own @ own))
            if added.any():
                wanted = added @ own / np.linalg.norm(added) / np.linalg.norm(own)
                assert cosine == pytest.approx(wanted, abs=1e-9) and abs(cosine) <= 1
            else:
                assert np.isnan(cosine)
    both = effect + effect
    np.testing.assert_allclose(both.shift.share, effect.shift.share)
    np.testing.assert_allclose(both.harm.energy, 2 * effect.harm.energy)


def test_rounding_leaves_no_energy_below_zero() -> None:
    effect = Effect.of([np.full((2, 1, 1), -1e-12)], [1.0])
    assert (
        effect.shift.energy == 0 and np.isnan(effect.shift.cosine) and effect.to_json(["a"])["a"]["a"]["share"] is None
    )
