"""Crosstalk: every figure against dense updates and a plain loop over rows, and what cannot be measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import draw_regions, tiny_gpt2, tiny_llama, write_adapter
from commands import refused
from safetensors.numpy import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from multisbora import crosstalk as module
from multisbora.adapter import Adapter
from multisbora.crosstalk import Crosstalk, Culprit, Ratio, crosstalk
from multisbora.dataset import Example
from multisbora.errors import AdapterError, DataError, UsageError
from multisbora.evaluate import log_likelihoods
from multisbora.geometry import from_checkpoint
from multisbora.loading import load_base, load_tokenizer
from multisbora.probe import probe
from multisbora.recipe import Recipe
from multisbora.shifts import Shift
from multisbora.view import Quantization
from multisbora.weights import TaskWeight

TASKS = {"sums": "fa", "words": "fb", "rhymes": "fa"}
TARGETS = {"sums": "all-linear", "words": ["q_proj", "down_proj"], "rhymes": ["q_proj", "v_proj", "down_proj"]}
LAMBDAS: dict[str, Any] = {"sums": 0.8, "words": {"default": -0.5, "q_proj": 1.5}, "rhymes": 1.0}
ROWS = 5


def recipe_of(folder: Path, task: str, rows: int = 7, **changes: Any) -> Recipe:
    """Dev rows of the task's own kind, of uneven lengths."""
    made = [
        {"instruction": f"{task} {i} {task[:2] * (i % 4)}", "output": f"{task[i % 3 :]} {i}", "answer": str(i)}
        for i in range(rows)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in made)
    (folder / f"{task}-dev.jsonl").write_text(lines)
    for part in ("train", "test"):
        (folder / f"{task}-{part}.jsonl").write_text(lines.replace(f'"{task} ', f'"{part} {task} '))
    content = {
        "name": task,
        "prompt": f"{task.upper()}: {{instruction}}\n",
        "train": str(folder / f"{task}-train.jsonl"),
        "dev": str(folder / f"{task}-dev.jsonl"),
        "eval": {"data": str(folder / f"{task}-test.jsonl"), "metric": "number"},
    }
    return Recipe.model_validate(content | changes)


class Case:
    """A base, adapters that cross each other, and recipes."""

    def __init__(self, folder: Path, base: Path, targets: Mapping[str, Any]) -> None:
        self.folder, self.base = folder, base
        self.geometry = from_checkpoint(base)
        regions = draw_regions(self.geometry, TASKS, rank=3)
        self.adapters = []
        for number, (task, variant) in enumerate(TASKS.items()):
            indices = {m.module: regions[task][m.module] for m in self.geometry.select(targets[task])}
            # The tasks of the other variant came earlier, and keep the cells where they cross.
            earlier = {
                module: sorted(
                    index
                    for other in list(TASKS)[:number]
                    if TASKS[other] != variant and module in {m.module for m in self.geometry.select(targets[other])}
                    for index in regions[other][module]
                )
                for module in indices
            }
            excluded = {module: found for module, found in earlier.items() if found}
            made = write_adapter(
                folder / "adapters" / task, self.geometry, task, variant=variant, rank=3, indices=indices,
                excluded=excluded, seed=number, spread=0.2, alpha=4 + number,
            )  # fmt: skip
            self.adapters.append(made)
        self.recipes = [recipe_of(folder, task) for task in TASKS]

    def __call__(self, **options: Any) -> Crosstalk:
        return crosstalk(self.base, self.adapters, self.recipes, **({"rows": ROWS} | options))

    def examples(self, task: str) -> list[Example]:
        recipe = self.recipes[list(TASKS).index(task)]
        return probe(recipe, load_tokenizer(self.base), ROWS, lambda message: None)

    def dense(self, task: str, module: str) -> np.ndarray:
        """s times the values at their cells, (out, in) fp64, lambda left out."""
        found = np.zeros(self.geometry.find(module).shape)
        part = Adapter.read(self.folder / "adapters" / task).modules.get(module)
        if part is not None:
            where = (slice(None), list(part.region.indices))
            found[where if part.region.variant == "fa" else where[::-1]] = part.scaling * part.values.astype(np.float64)
        return found


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("crosstalk")
    return Case(folder, tiny_llama(folder / "base", dtype="float32", initializer_range=0.3), TARGETS)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Conv1D, and matrices of two kinds by one name."""
    folder = tmp_path_factory.mktemp("gpt2")
    targets = {"sums": "all-linear", "words": ["c_fc"], "rhymes": ["c_attn", "c_fc"]}
    return Case(folder, tiny_gpt2(folder / "base", initializer_range=0.3), targets)


@pytest.fixture(scope="module")
def measured(case: Case) -> Crosstalk:
    return case(weights=LAMBDAS)


# ------------------------------------------------------------------------------------------------- the plain loop


def row_nats(model: Any, example: Example) -> torch.Tensor:
    """Of each answer token of a row."""
    ids = torch.tensor([example.input_ids])
    logits = model(ids, use_cache=False).logits[0, example.answer_start - 1 : -1]
    return F.cross_entropy(logits.double(), ids[0, example.answer_start :], reduction="none")


def keep(seen: dict[str, Any], name: str, layer: Any, inputs: Any, output: torch.Tensor) -> None:
    """A forward hook."""
    output.retain_grad()
    seen[name] = inputs[0].detach()[0], output


def by_hand(case: Case, lambdas: Mapping[str, TaskWeight]) -> dict[str, tuple[Shift, Shift]]:
    """{module: (a token, all alike; a row, weighted by |g|^2 / out)}: a row at a time, with dense updates, in fp64."""
    model = load_base(case.base).double()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and name != "lm_head"}
    tasks = list(TASKS)
    dense = {name: [case.dense(task, name) for task in tasks] for name in layers}
    sums = {name: np.zeros((2, 3, 3, 3)) for name in layers}  # weighting, rows of, shift by, shift by
    for i, task in enumerate(tasks):
        tokens = 0
        for example in case.examples(task):
            seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
            hooks = [layer.register_forward_hook(partial(keep, seen, name)) for name, layer in layers.items()]
            nats = row_nats(model, example)
            (nats / torch.arange(1, len(nats) + 1)).sum().backward()
            for hook in hooks:
                hook.remove()
            tokens += len(example.input_ids)
            for name, (x, output) in seen.items():
                assert output.grad is not None
                shifts = np.stack([x.numpy() @ update.T for update in dense[name]])  # (tasks, tokens, out)
                loud = output.grad[0].square().mean(-1).numpy()
                for place, weights in enumerate((np.ones_like(loud), loud)):
                    sums[name][place, i] += np.einsum("jto,kto,t->jk", shifts, shifts, weights)
        for total in sums.values():
            total[0, i] /= tokens
            total[1, i] /= len(case.examples(task))
    found = {}
    for name, total in sums.items():
        scale = np.array([lambdas[task].at(name) for task in tasks])
        shifts = []
        for grams in total:
            energy = np.stack([np.diag(gram) for gram in grams])
            inner = np.stack([gram[i] for i, gram in enumerate(grams)])
            shifts.append(Shift(scale**2 * energy, scale * inner, np.diag(energy)))
        found[name] = (shifts[0], shifts[1])
    return found


def loss_by_hand(case: Case, task: str, lambdas: Mapping[str, TaskWeight]) -> float:
    """Nats per answer token with dense updates in the weights."""
    model = load_base(case.base)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear | Conv1D) and name != "lm_head":
                update = sum(weight.at(name) * case.dense(other, name) for other, weight in lambdas.items())
                if lambdas:
                    dense = torch.tensor(update, dtype=torch.float32)
                    layer.weight += dense.t() if isinstance(layer, Conv1D) else dense
        examples = case.examples(task)
        total = sum(float(row_nats(model, example).sum()) for example in examples)
    return total / sum(len(example.input_ids) - example.answer_start for example in examples)


def assert_shift(got: Shift, wanted: Shift, what: str) -> None:
    for name in ("energy", "inner", "own"):
        values, truth = getattr(got, name), getattr(wanted, name)
        np.testing.assert_allclose(values, truth, rtol=2e-4, atol=2e-5 * np.abs(truth).max(), err_msg=f"{what} {name}")


# ------------------------------------------------------------------------------------------------------- the figures


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_shifts_are_those_of_dense_updates(kind: str, request: pytest.FixtureRequest) -> None:
    case: Case = request.getfixturevalue("case" if kind == "llama" else "gpt2")
    weights: Any = LAMBDAS if kind == "llama" else {"words": {"c_fc": -2.0}}
    got = case(weights=weights)
    wanted = by_hand(case, got.weights)
    assert {name for name, (shift, _) in wanted.items() if shift.own.any()} == set(got.matrices)
    crossing = 0
    for name, effect in got.matrices.items():
        assert_shift(effect.shift, wanted[name][0], name)
        assert_shift(effect.harm, wanted[name][1], f"{name}, weighted")
        crossing += int(abs(effect.shift.inner[0, 1]) > 1e-6)  # an fa task's own against an fb task's
    assert crossing > 0
    total = got.total
    for part, place in ((total.shift, 0), (total.harm, 1)):
        energy = np.sum([shifts[place].energy for shifts in wanted.values()], 0)
        inner = np.sum([shifts[place].inner for shifts in wanted.values()], 0)
        own = np.sum([shifts[place].own for shifts in wanted.values()], 0)
        np.testing.assert_allclose(part.share, energy / own[:, None], rtol=2e-4)
        np.testing.assert_allclose(part.cosine, inner / np.sqrt(energy * own[:, None]), rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_losses_are_those_of_dense_updates(kind: str, request: pytest.FixtureRequest) -> None:
    case: Case = request.getfixturevalue("case" if kind == "llama" else "gpt2")
    weights: Any = LAMBDAS if kind == "llama" else {"words": {"c_fc": -2.0}}
    got = case(weights=weights)
    assert got.tasks == tuple(TASKS)
    for task in TASKS:
        losses = got.losses[task]
        base = loss_by_hand(case, task, {})
        solo = loss_by_hand(case, task, {task: TaskWeight()})
        merged = loss_by_hand(case, task, got.weights)
        assert (losses.base, losses.solo, losses.merged) == pytest.approx((base, solo, merged), rel=1e-4)
        for other in TASKS:
            left = {name: weight for name, weight in got.weights.items() if name != other}
            assert losses.without[other].value == pytest.approx(loss_by_hand(case, task, left) - merged, abs=2e-4)
        if base > solo:
            assert losses.retention is not None
            assert losses.retention.value == pytest.approx((base - merged) / (base - solo), rel=1e-2)
        else:
            assert losses.retention is None
        assert losses.rows == ROWS
        examples = case.examples(task)
        assert losses.tokens == sum(len(example.input_ids) for example in examples)
        assert losses.answer_tokens == sum(len(example.input_ids) - example.answer_start for example in examples)
        assert len({round(value, 3) for value in (base, solo, merged)}) == 3, "nothing told apart"


def test_a_model_that_cannot_keep_packed_examples_apart(
    case: Case, measured: Crosstalk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No padding counts as a token."""
    for name in ("shifts", "probe", "evaluate"):
        monkeypatch.setattr(f"multisbora.{name}.packs", lambda model: False)
    got = case(weights=LAMBDAS)
    for name, effect in got.matrices.items():
        assert_shift(effect.shift, measured.matrices[name].shift, name)
        assert_shift(effect.harm, measured.matrices[name].harm, name)
    for task, losses in got.losses.items():
        assert losses.merged == pytest.approx(measured.losses[task].merged, rel=1e-5)


def test_the_order_of_tasks_changes_nothing(case: Case, measured: Crosstalk) -> None:
    turned = crosstalk(case.base, case.adapters[::-1], case.recipes, rows=ROWS, weights=LAMBDAS)
    assert turned.tasks == measured.tasks[::-1]
    for name, effect in turned.matrices.items():
        other = measured.matrices[name]
        np.testing.assert_allclose(effect.harm.energy[::-1, ::-1], other.harm.energy, rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(effect.shift.inner[::-1, ::-1], other.shift.inner, rtol=1e-3, atol=1e-4)
    for task, losses in turned.losses.items():
        assert losses.merged == pytest.approx(measured.losses[task].merged, rel=1e-5)
        for other_task, change in losses.without.items():
            assert change.value == pytest.approx(measured.losses[task].without[other_task].value, abs=1e-5)


def test_a_composition_is_looked_at_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks at lambda 1: without one of them is the other alone, which is somebody's own adapter."""
    looks = 0

    def counting(*arguments: Any) -> list[float]:
        nonlocal looks
        looks += 1
        return log_likelihoods(*arguments)

    monkeypatch.setattr(module, "log_likelihoods", counting)
    got = crosstalk(case.base, case.adapters[:2], case.recipes[:2], rows=2)
    assert looks == 2 * 4
    for task, other in (("sums", "words"), ("words", "sums")):
        losses = got.losses[task]
        assert losses.merged + losses.without[other].value == pytest.approx(losses.solo)


def test_lambdas_of_zero_and_below(case: Case) -> None:
    got = case(weights={"sums": -1.0, "words": {"default": 0.0, "q_proj": 0}}, rows=3)
    total = got.total
    assert not total.shift.energy[:, 1].any() and not total.harm.energy[:, 1].any()
    assert np.isnan(total.harm.cosine[:, 1]).all()
    assert total.harm.own[1] > 0 and total.harm.share[1, 0] > 0
    np.testing.assert_allclose(total.harm.share.diagonal(), [1, 0, 1])
    assert total.shift.cosine[0, 0] == pytest.approx(-1) and total.shift.cosine[2, 2] == pytest.approx(1)
    assert all(losses.without["words"].value == 0 for losses in got.losses.values())
    shown = got.to_json()["total"]["sums"]["words"]
    assert shown["energy"] == shown["share"] == shown["harm"] == 0
    assert shown["cosine"] is None and shown["harm_cosine"] is None
    nothing = case(weights=dict.fromkeys(TASKS, 0.0), rows=3)
    assert nothing.worst(5) == []
    for task in TASKS:
        assert nothing.losses[task].merged == nothing.losses[task].base


def test_an_adapter_that_was_never_trained(case: Case, tmp_path: Path) -> None:
    blank = write_adapter(tmp_path / "words", case.geometry, "words", rank=2, seed=9, spread=0.0)
    got = crosstalk(case.base, [case.adapters[0], blank], case.recipes[:2], rows=3)
    assert got.losses["words"].retention is None
    assert np.isnan(got.total.harm.share[1]).all() and not got.total.harm.energy[:, 1].any()
    json.dumps(got.to_json(), allow_nan=False)
    assert {culprit.on for culprit in got.worst(2)} == {"words"}
    assert all(culprit.against_own is None for culprit in got.worst(2))


def test_one_row(case: Case) -> None:
    got = case(rows=1)
    for losses in got.losses.values():
        assert losses.rows == 1
        assert all(change.error is None for change in losses.without.values())
    json.dumps(got.to_json(), allow_nan=False)


def test_the_matrices_that_do_the_harm(measured: Crosstalk) -> None:
    named = measured.worst(3)
    assert [culprit.on for culprit in named] == [task for task in TASKS for _ in range(3)]
    everything = measured.worst(1000)
    for i, on in enumerate(TASKS):
        mine = [culprit for culprit in everything if culprit.on == on]
        assert mine[:3] == [culprit for culprit in named if culprit.on == on]
        assert mine == sorted(mine, key=lambda culprit: -culprit.harm)
        assert sum(culprit.share for culprit in mine) == pytest.approx(1)
        assert {culprit.of for culprit in mine} == set(TASKS) - {on}
        total = measured.total.harm
        assert sum(culprit.harm for culprit in mine) == pytest.approx(total.energy[i].sum() - total.energy[i, i])
    first = everything[0]
    effect = measured.matrices[first.module].harm
    place = list(TASKS).index(first.of)
    assert first == Culprit(
        first.module, "sums", first.of, effect.energy[0, place], first.share, effect.share[0, place]
    )


def test_json(measured: Crosstalk) -> None:
    shown = json.loads(json.dumps(measured.to_json(worst=2), allow_nan=False))
    assert list(shown) == ["passes", "tasks", "total", "matrices", "worst"]
    assert list(shown["tasks"]) == list(TASKS) == list(shown["total"])
    assert shown["tasks"]["words"]["weight"] == LAMBDAS["words"]
    losses = measured.losses["sums"]
    assert shown["tasks"]["sums"]["nll"] == {"base": losses.base, "solo": losses.solo, "merged": losses.merged}
    assert shown["tasks"]["sums"]["without"]["words"]["change"] == losses.without["words"].value
    assert shown["matrices"].keys() == measured.matrices.keys()
    cell = shown["matrices"]["model.layers.0.self_attn.q_proj"]["sums"]["rhymes"]
    effect = measured.matrices["model.layers.0.self_attn.q_proj"]
    assert cell == {
        **{"energy": effect.shift.energy[0, 2], "share": effect.shift.share[0, 2], "cosine": effect.shift.cosine[0, 2]},
        **{"harm": effect.harm.energy[0, 2], "harm_share": effect.harm.share[0, 2]},
        "harm_cosine": effect.harm.cosine[0, 2],
    }
    assert len(shown["worst"]) == 6
    # Only one task adapts it, which nobody else's rows have an own update to be compared with.
    lonely = shown["matrices"]["model.layers.0.mlp.up_proj"]
    assert lonely["rhymes"]["sums"]["harm"] > 0 and lonely["rhymes"]["sums"]["harm_share"] is None


def test_errors_of_ratios() -> None:
    above, ones = np.array([1.0, 2.0, 6.0, 3.0]), np.ones(4)
    mean = Ratio.of(above, ones)
    assert mean.value == 3.0
    assert mean.error == pytest.approx(above.std(ddof=1) / 2)
    assert Ratio.of(3 * ones, 2 * ones) == Ratio(1.5, 0.0)
    assert Ratio.of(above[:1], ones[:1]) == Ratio(1.0, None)
    # Of rows of uneven lengths, against what many draws of such rows spread.
    generator = np.random.default_rng(0)
    draws = []
    for _ in range(2000):
        counts = generator.integers(1, 9, 60).astype(np.float64)
        draws.append(Ratio.of(counts * 0.7 + generator.normal(0, 1, 60), counts))
    errors = [draw.error for draw in draws if draw.error is not None]
    assert np.mean(errors) == pytest.approx(np.std([draw.value for draw in draws]), rel=0.05)


def test_retention(measured: Crosstalk) -> None:
    """Of the row's sums, not of the mean of their ratios; none where the own adapter gains nothing."""
    examples = [Example([1] * length, 1) for length in (4, 3, 6)]
    weights = {"sums": TaskWeight(0.5), "words": TaskWeight()}
    merged, alone = frozenset(weights.items()), frozenset({("words", TaskWeight())})
    half, own = frozenset({("sums", TaskWeight(0.5))}), frozenset({("sums", TaskWeight())})
    nats = {
        (frozenset(), "sums"): np.array([9.0, 8.0, 7.0]),
        (own, "sums"): np.array([3.0, 2.0, 1.0]),
        (merged, "sums"): np.array([4.5, 4.0, 2.0]),
        (alone, "sums"): np.array([10.0, 8.0, 7.0]),
        (half, "sums"): np.array([4.0, 4.0, 2.0]),
    }
    losses = module._losses("sums", weights, examples, nats)
    assert (losses.base, losses.solo, losses.merged) == (2.4, 0.6, 1.05)
    assert losses.retention is not None and losses.retention.value == pytest.approx(0.75)
    assert losses.without["words"].value == pytest.approx(-0.05)
    assert losses.without["sums"].value == pytest.approx(1.45)
    worse = {**nats, (own, "sums"): np.array([9.0, 8.0, 7.0])}
    assert module._losses("sums", weights, examples, worse).retention is None


def test_a_base_in_float16(case: Case, measured: Crosstalk, tmp_path: Path) -> None:
    """Whose gradients, of the sum of a row's nats, would be rounded to nothing in deep layers."""
    base = tiny_llama(tmp_path / "half", dtype="float16", initializer_range=0.3)
    said: list[str] = []
    got = crosstalk(base, case.adapters, case.recipes, rows=ROWS, weights=LAMBDAS, say=said.append)
    assert len(said) == 4 and "float16" in said[-1] and "base it was trained on" not in said[-1]
    np.testing.assert_allclose(got.total.harm.energy, measured.total.harm.energy, rtol=0.05)


# ---------------------------------------------------------------------------------------------- what cannot be measured


def test_which_tasks(case: Case) -> None:
    one, two = case.adapters[:1], case.adapters[:2]
    recipes = case.recipes
    refused(lambda: crosstalk(case.base, one, recipes[:1]), UsageError, "got sums: name at least two, each once")
    refused(lambda: crosstalk(case.base, [], []), UsageError, "got none: name at least two")
    refused(lambda: crosstalk(case.base, one * 2, recipes[:2]), UsageError, "got sums, sums: name at least two")
    refused(lambda: crosstalk(case.base, two, recipes), UsageError, "adapters are of sums, words, the recipes of sums")
    refused(lambda: crosstalk(case.base, two, recipes[1:]), UsageError, "recipes of words, rhymes", "one recipe for")
    refused(lambda: case(rows=0), UsageError, "rows must be at least 1, got 0")


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"cooking": 1.0}, "a weight is given for 'cooking'"),
        ({"words": {"up_proj": 0.5}}, "the weight of words in 'up_proj' names none of its matrices"),
        ({"sums": float("nan")}, "the weight of sums must be a finite number"),
    ],
)
def test_which_lambdas(case: Case, weights: Any, words: str) -> None:
    refused(lambda: case(weights=weights), UsageError, words)


def test_lambdas_that_are_too_large(case: Case) -> None:
    refused(lambda: case(weights={"sums": 1e30}, rows=1), DataError, "NaN or infinity on rows of task sums", "lower")


def with_recipe(case: Case, **changes: Any) -> Callable[[], Crosstalk]:
    recipe = Recipe.model_validate(case.recipes[1].model_dump() | changes)
    return lambda: crosstalk(case.base, case.adapters[:2], [case.recipes[0], recipe], rows=ROWS)


def test_which_rows(case: Case, tmp_path: Path) -> None:
    refused(with_recipe(case, train=[{"path": str(tmp_path / "no.jsonl")}]), DataError, "no.jsonl does not exist")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    refused(with_recipe(case, dev=[{"path": str(empty)}]), DataError, "empty.jsonl")
    cut = {**case.recipes[1].training.model_dump(), "cutoff": 3}
    refused(with_recipe(case, training=cut), DataError, "task words", "cutoff of 3 tokens")
    short = {**case.recipes[1].training.model_dump(), "cutoff": 20}
    refused(with_recipe(case, training=short), DataError, "task words", "exceed 20 tokens", "raise training.cutoff")
    refused(with_recipe(case, prompt="{question}\n"), DataError, "field question of recipe words is missing")


def test_training_rows_stand_for_dev_rows(case: Case) -> None:
    said: list[str] = []
    plain = Recipe.model_validate(case.recipes[1].model_dump() | {"dev": None})
    crosstalk(case.base, case.adapters[:2], [case.recipes[0], plain], rows=1, say=said.append)
    assert any("task words has no dev rows" in message for message in said)


def test_a_tokenizer_of_another_vocabulary(case: Case, tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "small", dtype="float32", vocab_size=90)
    refused(
        lambda: crosstalk(base, case.adapters[:2], case.recipes[:2]),
        DataError, "task sums: its rows have token", "the vocabulary of this model has 90", "another model's",
    )  # fmt: skip


def test_rows_longer_than_the_model_s_positions(gpt2: Case, tmp_path: Path) -> None:
    base = tiny_gpt2(tmp_path / "short", n_positions=16)
    refused(
        lambda: crosstalk(base, gpt2.adapters[:2], gpt2.recipes[:2]),
        DataError, "task sums needs up to", "made for 16", "lower training.cutoff of its recipe to 16",
    )  # fmt: skip


def test_another_template_than_in_training(case: Case, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "words", case.geometry, "words", target_modules=["q_proj"])
    adapters = [case.adapters[0], adapter]
    told, recipe = adapter / "training.json", case.recipes[1].model_dump(mode="json")
    said: list[str] = []
    told.write_text(json.dumps({"recipe": recipe | {"prompt": "{instruction}"}}))
    crosstalk(case.base, adapters, case.recipes[:2], rows=1, say=said.append)
    assert [message for message in said if "words was trained with another prompt than its recipe has now" in message]
    said.clear()
    for content in ("{}", "[]", "no JSON", json.dumps({"recipe": recipe})):
        told.write_text(content)
        module._check_template(Adapter.read(adapter), case.recipes[1], said.append)
    assert said == []


def test_another_base(case: Case, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "words", case.geometry, "words", base_fingerprint="0" * 64)
    adapters = [case.adapters[0], other]
    refused(lambda: crosstalk(case.base, adapters, case.recipes[:2]), AdapterError, "was trained on another base")


def test_adapters_that_have_no_lambda(case: Case, tmp_path: Path) -> None:
    whole = write_adapter(tmp_path / "words", case.geometry, "words", modules_to_save=["embed_tokens"])
    tensors = load_file(whole / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] = np.zeros((259, 32), np.float32)
    save_file(tensors, whole / "adapter_model.safetensors")
    adapters = [case.adapters[0], whole]
    refused(
        lambda: crosstalk(case.base, adapters, case.recipes[:2]), UsageError, "task words trained whole modules too"
    )


def test_adapters_of_a_quantised_base(case: Case, tmp_path: Path) -> None:
    told = Quantization("nf4", "bfloat16", 64, True, ("model.layers.0.self_attn.q_proj",), "a" * 64)
    quantised = write_adapter(tmp_path / "words", case.geometry, "words", base_quantization=told.to_json())
    adapters = [case.adapters[0], quantised]
    refused(lambda: crosstalk(case.base, adapters, case.recipes[:2]), UsageError, "nf4", "--base-view original")
    got = crosstalk(case.base, adapters, case.recipes[:2], rows=1, base_view="original")
    assert got.total.harm.own.all()
