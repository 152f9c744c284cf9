"""Tuned lambdas: better on rows that nobody learned, never worse than allowed, and exactly what a merge writes."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import pytest
import torch
import yaml
from builders import draw_moments, draw_regions, edit_json, tiny_gpt2, tiny_llama, tree, write_adapter
from commands import Run, assert_refused, refused
from layers import bits
from safetensors.torch import load_file, save_file

from multisbora import SboraConfig, merge
from multisbora import tune as tuning
from multisbora.adapter import Adapter, rewrite
from multisbora.blend import Blend
from multisbora.cli_composed import _tuned_lines
from multisbora.correct import RIDGE
from multisbora.dataset import encode, pack
from multisbora.edit import remove
from multisbora.errors import AdapterError, CheckpointError, DataError, MergeError, TrainingError, UsageError
from multisbora.evaluate import log_likelihoods
from multisbora.geometry import from_checkpoint
from multisbora.lambdas import Space
from multisbora.loading import load_base, load_model, load_tokenizer
from multisbora.moments import Moments
from multisbora.probe import Batch, probe
from multisbora.recipe import Recipe
from multisbora.stream import fingerprint
from multisbora.trainer import answer_loss
from multisbora.tune import Point, Tuned, TunedTask, tune
from multisbora.view import Kind
from multisbora.weights import TaskWeight, read_weights, write_weights

TASKS = {"adding": lambda n: f" {n + 1}", "spelling": lambda n: " " + " ".join("abcdefghij"[int(c)] for c in str(n))}


class Made(NamedTuple):
    """Two trained tasks on one base, and where their rows are."""

    base: Path
    adapters: list[Path]
    recipes: list[Recipe]

    def tuned(self, **settings: Any) -> Tuned:
        return tune(self.base, self.adapters, self.recipes, **({"steps": 8, "rows": 16} | settings))


def write_rows(path: Path, task: str, numbers: range) -> str:
    write: Callable[[int], str] = TASKS.get(task, str)
    rows = [{"instruction": f"{task} {n}", "output": write(n), "answer": str(n)} for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def recipe_of(folder: Path, task: str, **settings: Any) -> Recipe:
    content = {
        "name": task,
        "prompt": "{instruction}:",
        "train": write_rows(folder / f"{task}-train.jsonl", task, range(100, 140)),
        "dev": write_rows(folder / f"{task}-dev.jsonl", task, range(200, 216)),
        "eval": {"data": write_rows(folder / f"{task}-test.jsonl", task, range(300, 308)), "metric": "number"},
    }
    return Recipe.model_validate(content | settings)


def learned(
    base: Path, folder: Path, recipe: Recipe, config: SboraConfig, steps: int, quantization: Kind | None = None
) -> Path:
    """An adapter that has learned its rows, as `train` would write it, without a Trainer."""
    tokenizer = load_tokenizer(base)
    lines = Path(recipe.train[0].path).read_text(encoding="utf-8").splitlines()
    batch = pack(encode(recipe, [json.loads(line) for line in lines], tokenizer).examples)
    labels = batch.pop("labels")
    torch.manual_seed(0)
    model = peft.get_peft_model(load_base(base, quantization), config)
    optimizer = torch.optim.AdamW([values for values in model.parameters() if values.requires_grad], lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        answer_loss(model(**batch, use_cache=False), labels).backward()
        optimizer.step()
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    return folder


def make(
    folder: Path,
    variants: dict[str, str],
    *,
    dtype: str = "float32",
    gpt2: bool = False,
    steps: int = 40,
    quantization: Kind | None = None,
    **config: Any,
) -> Made:
    """Tasks on a tiny model.

    Args:
        variants: task -> fa or fb.
    """
    base = (tiny_gpt2 if gpt2 else tiny_llama)(folder / "base", dtype=dtype, **config)
    geometry = from_checkpoint(base)
    regions = draw_regions(geometry, variants, rank=8)
    recipes, adapters = [], []
    for task, variant in variants.items():
        taken: dict[str, list[int]] = {}
        for other in list(variants)[: len(adapters)]:
            if variants[other] != variant:
                taken = {name: sorted({*taken.get(name, []), *own}) for name, own in regions[other].items()}
        sbora = SboraConfig(
            task_type="CAUSAL_LM",
            variant=variant,  # type: ignore[arg-type]
            alpha=16,
            r=8,
            indices=regions[task],
            excluded=taken,
            task=task,
            composition="default",
            base_fingerprint=fingerprint(base, geometry),
        )
        recipes.append(recipe_of(folder, task))
        adapters.append(learned(base, folder / task, recipes[-1], sbora, steps, quantization))
    return Made(base, adapters, recipes)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("tune"), dict.fromkeys(TASKS, "fa"))


@pytest.fixture(scope="module")
def tuned(made: Made) -> Tuned:
    return made.tuned(steps=16)


# --- what it is for ------------------------------------------------------------------------------------------------


def kept(found: Tuned, when: str) -> list[float]:
    return [getattr(task, f"retention_{when}") for task in found.tasks.values()]


def test_the_task_that_keeps_least_keeps_more(tuned: Tuned) -> None:
    assert min(kept(tuned, "before")) < 0.9  # else there was nothing to tune
    assert min(kept(tuned, "after")) > min(kept(tuned, "before")) + 0.02
    assert tuned.chosen is not None and tuned.chosen.step > 0
    assert tuned.weights == tuned.chosen.weights and tuned.lambdas == 28
    for task in tuned.tasks.values():
        assert (task.rows, task.learned) == (8, 8)
        share = (task.base - task.after) / (task.base - task.own)
        assert task.retention_after == pytest.approx(share)


def test_no_task_loses_more_than_the_slack(made: Made, tuned: Tuned) -> None:
    for slack, found in ((0.01, tuned), (0.0, made.tuned(slack=0.0)), (0.3, made.tuned(slack=0.3))):
        for before, after in zip(kept(found, "before"), kept(found, "after"), strict=True):
            assert after >= before - slack


def test_the_front_is_what_no_other_point_beats(tuned: Tuned) -> None:
    points = [list(point.nll.values()) for point in tuned.front]
    assert tuned.chosen in tuned.front
    for one in points:
        for other in points:
            assert one == other or any(a < b for a, b in zip(one, other, strict=True))


def test_same_rows_same_lambdas(made: Made) -> None:
    once, again = (made.tuned(steps=4) for _ in range(2))
    assert json.dumps(once.to_json()) == json.dumps(again.to_json())


def test_lambdas_by_task_kind_and_layer(made: Made) -> None:
    for by, count in (("task", 2), ("kind", 14), ("layer", 4)):
        found = made.tuned(by=by, steps=3)
        assert found.lambdas == count
        assert all(len(weight.patterns) in (0, count // 2) for weight in found.weights.values())


def test_search_is_another_way(made: Made) -> None:
    found = made.tuned(by="task", method="search", steps=8)
    assert min(kept(found, "after")) >= min(kept(found, "before"))
    assert found.chosen is not None and found.method == "search"
    message = refused(lambda: made.tuned(method="search"), UsageError, "search of 8 steps", "28 lambdas")
    assert "raise steps" in message


# --- it is what a merge writes -------------------------------------------------------------------------------------


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.parametrize("kind", ["llama bfloat16", "llama float32", "gpt2 bfloat16"])
def test_a_tuned_composition_is_the_merged_checkpoint(kind: str, tmp_path: Path) -> None:
    """fa and fb together, bit for bit: the weights that were judged, and with them the losses."""
    name, dtype = kind.split()
    made = make(tmp_path, {"adding": "fa", "spelling": "fb"}, dtype=dtype, gpt2=name == "gpt2", steps=10)
    found = made.tuned(slack=5.0, steps=3)
    assert found.chosen is not None
    path = tmp_path / "weights.yaml"
    point = found.front[-1]  # chosen or not, but no start
    assert point.step > 0 and point.weights is not None
    assert any(weight.patterns for weight in point.weights.values())
    write_weights(path, point.weights)
    merge(made.base, made.adapters, read_weights(path), output=tmp_path / "merged")
    merged = tensors(tmp_path / "merged")

    model, _ = load_model(made.adapters[0], made.base, made.adapters[1:])
    modules = {recipe.name: dict.fromkeys(dict(model.base_model.named_layers()), 8) for recipe in made.recipes}
    space = Space.of(modules, point.weights, "matrix")
    blend = Blend(model, space.modules)
    blend.compose(space.start)
    for module, layer in blend.layers.items():
        layer.settle()
        assert torch.equal(bits(layer.base_layer.weight), bits(merged[f"{module}.weight"])), module

    assert_same_losses(made, point, tmp_path / "merged", 1e-5 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize("kind", ["llama bfloat16", "llama float32", "gpt2 bfloat16"])
@pytest.mark.parametrize("by", ["task", "matrix"])
def test_a_composition_tuned_for_a_corrected_merge_is_that_merge(kind: str, by: Any, tmp_path: Path) -> None:
    name, dtype = kind.split()
    made = make(tmp_path, {"adding": "fa", "spelling": "fb"}, dtype=dtype, gpt2=name == "gpt2", steps=10)
    moments = moments_of(made)
    found = made.tuned(slack=5.0, steps=3, by=by, moments=moments, ridge=0.05)
    assert found.ridge == 0.05 and found.to_json()["ridge"] == 0.05
    plain = made.tuned(slack=5.0, steps=3, by=by)
    for task, other in plain.tasks.items():  # alone they are what they are
        assert found.tasks[task].own == pytest.approx(other.own, rel=1e-6)
        assert found.tasks[task].before != other.before
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    points = {point.step: point for point in found.front}
    assert found.chosen is not None and max(points) > 0
    for step, point in points.items():
        folder = tmp_path / f"merged-{step}"
        merge(made.base, made.adapters, point.weights, output=folder, method="corrected", moments=moments, ridge=0.05)
        assert_same_losses(made, point, folder, tolerance)


def test_a_corrected_merge_tuned_keeps_more(made: Made) -> None:
    found = made.tuned(steps=16, moments=moments_of(made))
    assert min(kept(found, "after")) > min(kept(found, "before"))
    assert found.ridge == RIDGE and found.chosen is not None and found.chosen.step > 0
    searched = made.tuned(by="task", method="search", steps=8, moments=moments_of(made))
    assert min(kept(searched, "after")) >= min(kept(searched, "before"))


@pytest.mark.parametrize("kind", ["llama bfloat16", "llama float32", "gpt2 bfloat16"])
@pytest.mark.parametrize("corrected", [False, True])
def test_adapters_tuned_by_channel_merge_to_what_was_judged(kind: str, corrected: bool, tmp_path: Path) -> None:
    """fa and fb together; at a lambda of 1, and so that each can be taken out again."""
    name, dtype = kind.split()
    made = make(tmp_path, {"adding": "fa", "spelling": "fb"}, dtype=dtype, gpt2=name == "gpt2", steps=10)
    moments = moments_of(made) if corrected else None
    start = {"adding": 0.8}
    found = made.tuned(slack=5.0, steps=3, by="channel", moments=moments, start=start)
    assert found.chosen is not None and found.chosen.step > 0 and found.values is not None
    assert found.weights == dict.fromkeys(TASKS, TaskWeight()) and found.chosen.weights is None
    assert found.lambdas == sum(8 * len(own) for own in found.values.values())
    assert "weights" not in found.to_json()["front"][0]
    folders = []
    for adapter in made.adapters:
        folders.append(tmp_path / "tuned" / adapter.name)
        rewrite(adapter, found.values[adapter.name], folders[-1], leave="nothing")
    merged = tmp_path / "merged"
    merge(made.base, folders, output=merged)
    assert_same_losses(made, found.chosen, merged, 1e-5 if dtype == "float32" else 1e-2)
    model, _ = load_model(made.adapters[0], made.base, made.adapters[1:])  # as `Blend` has it, bit for bit
    written = tensors(merged)
    for module, layer in model.base_model.named_layers():
        for adapter, task in zip(model.peft_config, TASKS, strict=True):
            layer.scaling[adapter] = 1.0
            layer.sbora_values[adapter].data.copy_(torch.from_numpy(found.values[task][module]))
        layer.outdate()
        layer.settle()
        assert torch.equal(bits(layer.base_layer.weight), bits(written[f"{module}.weight"])), module
    before = {path.name: path.read_bytes() for path in made.base.glob("*.safetensors")}
    for task in TASKS:
        remove(merged, task)
    assert {path.name: path.read_bytes() for path in merged.glob("*.safetensors")} == before

    # The start is a merge of what was trained, plain or corrected.
    first = Point(0, None, {name: task.before for name, task in found.tasks.items()}, {})
    method: Any = {"method": "corrected", "moments": moments} if corrected else {}
    merge(made.base, made.adapters, start, output=tmp_path / "start", **method)
    assert_same_losses(made, first, tmp_path / "start", 1e-4 if dtype == "float32" else 2e-2)


def test_a_rewritten_adapter_differs_in_values_alone(made: Made, tmp_path: Path) -> None:
    """Also where ranks and scalings differ from matrix to matrix; PEFT loads it."""
    source = tmp_path / "source"
    shutil.copytree(made.adapters[0], source)
    weights = load_file(source / "adapter_model.safetensors")
    for name in list(weights):  # three of eight columns
        if "layers.0.mlp" in name:
            weights[name] = (weights[name][:3] if name.endswith("indices") else weights[name][:, :3]).contiguous()
    save_file(weights, source / "adapter_model.safetensors", {"format": "pt"})
    ranks = {r".*\.0\.mlp\..*": 3, "up_proj": 8}
    edit_json(source / "adapter_config.json", alpha_pattern={"q_proj": 3.0}, rank_pattern=ranks, use_rslora=True)
    (source / "notes.txt").write_text("a note")
    (source / "left.bin").write_text("of what was trained")
    old = Adapter.read(source)
    values = {name: 2 * module.values for name, module in old.modules.items()}
    rewrite(source, values, tmp_path / "new", leave="left.bin")
    new = Adapter.read(tmp_path / "new")
    assert {name: module.scaling for name, module in new.modules.items()} == dict.fromkeys(values, 1.0)
    assert all(np.array_equal(new.modules[name].values, own) for name, own in values.items())
    assert [module.region for module in new.modules.values()] == [module.region for module in old.modules.values()]
    assert replace(new, path=old.path, digest=old.digest, modules=old.modules) == old
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(
        path.name for path in source.iterdir() if path.name != "left.bin"
    )
    model, _ = load_model(tmp_path / "new", made.base)
    assert {scale for _, layer in model.base_model.named_layers() for scale in layer.scaling.values()} == {1.0}


def test_by_channel_keeps_more_than_by_matrix(made: Made) -> None:
    by_matrix, by_channel = (made.tuned(steps=16, by=by) for by in ("matrix", "channel"))
    assert min(kept(by_channel, "after")) > min(kept(by_matrix, "after"))


def test_adapters_that_do_not_name_their_task(made: Made, tmp_path: Path) -> None:
    """They go by their folders; a lambda of 0 where a task has no matrix is none."""
    adapters = [Path(shutil.copytree(adapter, tmp_path / adapter.name)) for adapter in made.adapters]
    for adapter in adapters:
        edit_json(adapter / "adapter_config.json", task=None)
    every = dict.fromkeys({name.rpartition(".")[2] for name in Adapter.read(adapters[0]).modules}, 1.0)
    nameless = made._replace(adapters=adapters)
    found = nameless.tuned(steps=1, moments=moments_of(nameless), start={"adding": {"default": 0, **every}})
    assert found.tasks.keys() == set(TASKS)


def test_what_cannot_be_tuned_for_a_corrected_merge(made: Made) -> None:
    moments = moments_of(made)
    refused(lambda: made.tuned(moments={"adding": moments["adding"]}), DataError, "spelling has none")
    empty = {task: found.without_blocks() for task, found in moments.items()}
    refused(lambda: made.tuned(moments=empty, dry_run=True), DataError, "lack", "channels")
    strange = {task: replace(found, base_fingerprint="blake3:1") for task, found in moments.items()}
    refused(lambda: made.tuned(moments=strange), DataError, "measured on another base")
    through = {task: replace(found, source="adapter", adapter="0" * 64) for task, found in moments.items()}
    refused(lambda: made.tuned(moments=through), DataError, "went through another adapter")
    for start in (0, -0.5, {"default": 1, "q_proj": 0}):
        refused(lambda start=start: made.tuned(moments=moments, start={"adding": start}), UsageError, "the start has")
    refused(lambda: made.tuned(moments=moments, ridge=-1.0), UsageError, "no positive number")
    refused(lambda: made.tuned(ridge=0.1), UsageError, "a ridge is of corrected merges")


def moments_of(made: Made) -> dict[str, Moments]:
    """Moments of random rows."""
    geometry = from_checkpoint(made.base)
    mark = fingerprint(made.base, geometry)
    names = [adapter.name for adapter in made.adapters]
    return {
        name: draw_moments(geometry, name, base_fingerprint=mark, seed=seed, target_modules=geometry.kinds())
        for seed, name in enumerate(names)
    }


def test_a_base_in_float16(tmp_path: Path) -> None:
    made = make(tmp_path, {"adding": "fa", "spelling": "fb"}, steps=10)
    whole = made.tuned(slack=5.0, steps=2)
    base = tiny_llama(tmp_path / "half", dtype="float16")  # of the same weights
    for adapter in made.adapters:
        edit_json(adapter / "adapter_config.json", base_fingerprint=fingerprint(base, from_checkpoint(base)))
    said: list[str] = []
    found = made._replace(base=base).tuned(slack=5.0, steps=2, say=said.append)
    assert "lambdas are tuned in float32" in said[-1]
    for task, other in whole.tasks.items():
        assert found.tasks[task].own == pytest.approx(other.own, rel=0.02)


def assert_same_losses(made: Made, point: Point, merged: Path, tolerance: float) -> None:
    """Of the rows that judged, in a merged checkpoint and as they were told of a point."""
    plain, tokenizer = load_model(merged)
    for recipe in made.recipes:
        examples = judged(made, recipe, tokenizer)
        tokens = sum(len(example.input_ids) - example.answer_start for example in examples)
        nll = -sum(log_likelihoods(plain, examples)) / tokens
        assert point.nll[recipe.name] == pytest.approx(nll, rel=tolerance)


@pytest.mark.parametrize("method", ["gradient", "search"])
def test_on_a_quantised_base_it_is_the_merge_up_to_rounding(method: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 1}
    made = make(tmp_path, dict.fromkeys(TASKS, "fa"), steps=10, quantization="nf4", **sizes)
    found = made.tuned(method=method, by="task", slack=5.0, steps=3)
    point = max(found.front, key=lambda point: point.step)
    assert point.step > 0
    merge(made.base, made.adapters, point.weights, output=tmp_path / "merged")
    assert_same_losses(made, point, tmp_path / "merged", 1e-3)


def judged(made: Made, recipe: Recipe, tokenizer: Any) -> list[Any]:
    return tuning._halves(tuning.probe(recipe, tokenizer, 16, print, least=2), recipe.name)[1]


def test_lambdas_of_the_start_are_where_it_begins(made: Made) -> None:
    """0 and negative ones, of patterns too: the first point is exactly that."""
    start = {"adding": {"default": -0.5, "q_proj": 0.0}, "spelling": 0}
    found = made.tuned(start=start, steps=2, by="kind", slack=5.0)
    model, _ = load_model(made.adapters[0], made.base, made.adapters[1:])
    blend = Blend(model, [name for name, _ in model.base_model.named_layers()])
    blend.compose(np.array([[0.0 if "q_proj" in name else -0.5 for name in blend.layers], [0.0] * 14]))
    tokenizer = load_tokenizer(made.base)
    for task in made.recipes:
        batches = blend.batches(judged(made, task, tokenizer), 2048)
        nll = blend.nats(batches).sum() / sum(batch.tokens for batch in batches)
        assert found.tasks[task.name].before == pytest.approx(nll, rel=1e-6)
    assert found.chosen is not None and found.chosen.step > 0
    assert min(kept(found, "after")) > min(kept(found, "before"))


# --- rows ----------------------------------------------------------------------------------------------------------


def test_the_halves_share_no_prompt(made: Made) -> None:
    tokenizer = load_tokenizer(made.base)
    rows = [{"instruction": f"adding {n % 5}", "output": f" {n}"} for n in range(20)]
    learn, judge = tuning._halves(encode(made.recipes[0], rows, tokenizer).examples, "adding")
    prompts = [{tuple(e.input_ids[: e.answer_start]) for e in half} for half in (learn, judge)]
    assert not prompts[0] & prompts[1] and len(learn) + len(judge) == 20 and len(prompts[1]) == 2


def test_a_task_without_enough_rows(made: Made, tmp_path: Path) -> None:
    def given(numbers: range, **settings: Any) -> Callable[[], Tuned]:
        dev = write_rows(tmp_path / "dev.jsonl", "adding", numbers)
        recipe = Recipe.model_validate({**made.recipes[0].model_dump(mode="json"), "dev": dev, **settings})
        return lambda: made._replace(recipes=[recipe, made.recipes[1]]).tuned()

    refused(given(range(0)), DataError, "dev.jsonl is empty")
    refused(given(range(1)), DataError, "adding", "has 1 rows", "needs 2")
    refused(given(range(200, 210), training={"cutoff": 14}), DataError, "adding", "exceed 14 tokens", "raise training")
    refused(given(range(200, 210), prompt="{missing}"), DataError, "missing")
    refused(given(range(200, 210), dev=str(tmp_path / "none.jsonl")), DataError, "none.jsonl does not exist")
    same = tmp_path / "same.jsonl"
    same.write_text('{"instruction": "one", "output": " 1"}\n{"instruction": "one", "output": " 2"}\n')
    refused(given(range(1), dev=str(same)), DataError, "adding", "one prompt", "two halves")


def test_templates_may_differ(made: Made, tmp_path: Path) -> None:
    """Each task is read by its own; one that is not the adapter's own any more is told."""
    adapter = tmp_path / "adding"
    shutil.copytree(made.adapters[0], adapter)
    content = {"recipe": {**made.recipes[0].model_dump(mode="json"), "prompt": "Q: {instruction}", "dev": None}}
    (adapter / "training.json").write_text(json.dumps(content))
    said: list[str] = []
    found = made._replace(adapters=[adapter, made.adapters[1]]).tuned(steps=1, say=said.append)
    assert found.tasks
    assert [line for line in said if "adding" in line and "prompt, dev of its recipe differ" in line]
    for broken in ("{", "[]", '{"recipe": null}', '{"recipe": {"training": 1}}'):
        (adapter / "training.json").write_text(broken)
        tuning._tell_recipe(Adapter.read(adapter), made.recipes[0], said.append)
    assert sum("differ" in line for line in said) == 1


# --- own adapters followed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["matrix", "channel"])
def test_own_adapters_are_followed_on_rows_that_they_learned(made: Made, by: Any, monkeypatch: Any) -> None:
    """And what is kept is judged by the answers of rows that they did not."""
    looked: list[tuple[str, bool, list[list[int]]]] = []

    def watched(recipe: Recipe, *args: Any, learned: bool = False, **settings: Any) -> Any:
        examples = probe(recipe, *args, learned=learned, **settings)
        looked.append((recipe.name, learned, [example.input_ids for example in examples]))
        return examples

    monkeypatch.setattr(tuning, "probe", watched)
    found = made.tuned(follow="own", by=by, rows=20, slack=0.05)
    assert [(name, learned, len(rows)) for name, learned, rows in looked] == [
        (task, learned, 10) for task in TASKS for learned in (True, False)
    ]
    for learned, judged in zip(looked[::2], looked[1::2], strict=True):
        assert not any(row in learned[2] for row in judged[2])
    assert {(task.learned, task.rows) for task in found.tasks.values()} == {(10, 10)}
    assert found.chosen is not None and found.chosen.step > 0
    assert min(kept(found, "after")) > min(kept(found, "before")) + 0.1
    assert found.to_json()["follow"] == "own"


def test_both_are_followed_in_turn(made: Made, monkeypatch: Any) -> None:
    """Answers of half of the dev rows, and own adapters on training rows: no row of these judges."""
    taken: list[tuple[bool, list[int]]] = []

    class Watched(Blend):
        def slopes(self, batch: Batch, target: torch.Tensor | None = None) -> Any:
            taken.append((target is not None, batch.labels[batch.labels != -100].tolist()))
            return super().slopes(batch, target)

    monkeypatch.setattr(tuning, "Blend", Watched)
    monkeypatch.setattr(tuning, "STEP_TOKENS", 64)  # several batches of each task
    found = made.tuned(follow="both", rows=16, steps=8, slack=0.05)
    assert [own for own, _ in taken] == [False, False, True, True] * 4
    assert len({str(labels) for own, labels in taken if own}) == len({str(labels) for own, labels in taken}) / 2 > 2
    assert {(task.learned, task.rows) for task in found.tasks.values()} == {(16, 8)}
    assert found.chosen is not None and found.chosen.step > 0
    assert min(kept(found, "after")) > min(kept(found, "before")) + 0.02


@pytest.mark.parametrize("follow", ["own", "both"])
def test_without_dev_rows_own_adapters_are_followed_on_half_of_the_others(made: Made, follow: Any) -> None:
    recipes = [Recipe.model_validate({**r.model_dump(mode="json"), "dev": None}) for r in made.recipes]
    said: list[str] = []
    found = made._replace(recipes=recipes).tuned(follow=follow, steps=2, say=said.append)
    assert {(task.learned, task.rows) for task in found.tasks.values()} == {(8, 8)}
    assert sum("training rows stand for them" in line for line in said) == 2


@pytest.mark.parametrize("width", [1, 8])
def test_how_far_a_composition_is_from_an_own_adapter_and_its_slopes(made: Made, width: int) -> None:
    """Kullback-Leibler divergence of the whole distributions, against what torch says of them, and its differences."""
    model, _ = load_model(made.adapters[0], made.base, made.adapters[1:])
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    modules = [name for name, _ in model.base_model.named_layers()]
    spreads = None
    if width > 1:
        spreads = {
            name: {
                task: {task: layer.sbora_values[own].detach().float().numpy() * layer.scaling[own]}
                for task, own in zip(TASKS, model.peft_config, strict=True)
            }
            for name, layer in model.base_model.named_layers()
        }
    blend = Blend(model, modules, spreads, list(TASKS), width)
    (batch,) = blend.batches(judged(made, made.recipes[0], load_tokenizer(made.base)), 2048)
    lambdas = np.random.default_rng(0).uniform(0.2, 1.0, (2, len(modules) * width))
    target = blend.told(batch, 0)
    assert target.shape[0] == batch.tokens and torch.allclose(target.exp().sum(1), torch.ones(batch.tokens))
    assert blend.apart(batch, target) == pytest.approx(0, abs=1e-5)  # the own adapter is composed
    blend.compose(lambdas)
    with torch.no_grad():
        logits = model(**batch.inputs).logits[0][batch.labels[0] != -100]
    divergence = torch.distributions.kl_divergence(
        *(torch.distributions.Categorical(logits=x) for x in (target, logits))
    )
    assert blend.apart(batch, target) == pytest.approx(float(divergence.sum()), rel=1e-4)
    apart, slopes = blend.slopes(batch, target)
    assert apart == pytest.approx(float(divergence.sum()), rel=1e-4)
    way = slopes + np.random.default_rng(1).normal(size=lambdas.shape) * slopes.std()
    way /= np.linalg.norm(way)
    ends = []
    for step in (1e-2, -1e-2):
        blend.compose(lambdas + step * way)
        ends.append(blend.apart(batch, target))
    assert (slopes * way).sum() == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=1e-2)


# --- what cannot be tuned ------------------------------------------------------------------------------------------


def test_a_task_that_gains_nothing_by_its_own_adapter(made: Made, tmp_path: Path) -> None:
    regions = draw_regions(from_checkpoint(made.base), ["a", "b", "useless"], rank=8)
    print_ = fingerprint(made.base, from_checkpoint(made.base))
    useless = write_adapter(
        tmp_path / "useless",
        from_checkpoint(made.base),
        "useless",
        rank=8,
        indices=regions["useless"],
        base_fingerprint=print_,
        spread=0.2,
    )
    said: list[str] = []
    recipes = [*made.recipes, recipe_of(tmp_path, "useless")]
    found = tune(made.base, [*made.adapters, useless], recipes, rows=16, steps=4, say=said.append)
    assert [line for line in said if "useless" in line and "gains nothing to speak of" in line]
    task = found.tasks["useless"]
    assert task.base - task.own < 0.01 * task.base and task.retention_before is None and task.retention_after is None
    assert task.after - task.before <= 0.01 * task.base
    assert all(
        value is not None for name, t in found.tasks.items() if name != "useless" for value in (t.retention_after,)
    )
    json.dumps(found.to_json(), allow_nan=False)
    refused(
        lambda: tune(made.base, [useless], [recipes[-1]], rows=16, steps=2),
        DataError,
        "no adapter of useless gains anything",
    )


def test_an_adapter_of_another_base(made: Made, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", dtype="float32", seed=5)
    refused(lambda: tune(other, made.adapters, made.recipes, rows=16), AdapterError, "was trained on another base")
    wider = tiny_llama(tmp_path / "wider", dtype="float32", hidden_size=64)
    refused(lambda: tune(wider, made.adapters, made.recipes, rows=16), AdapterError, "does not fit")
    refused(lambda: tune(tmp_path / "none", made.adapters, made.recipes), CheckpointError, "none")


def test_adapters_that_could_not_be_merged(made: Made, tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(made.adapters[0], twin)
    edit_json(twin / "adapter_config.json", task="twin")
    recipes = [made.recipes[0], recipe_of(tmp_path, "twin")]
    refused(lambda: tune(made.base, [made.adapters[0], twin], recipes), MergeError, "adding and twin both own cells")
    untrained = write_adapter(tmp_path / "zero", from_checkpoint(made.base), "adding", spread=0.0)
    refused(lambda: tune(made.base, [untrained], made.recipes[:1]), MergeError, "adding was never trained")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"by": "matrices"}, ["by 'matrices' is unknown", "task, kind, layer, matrix"]),
        ({"method": "luck"}, ["method 'luck' is unknown", "gradient or search"]),
        ({"follow": "me"}, ["follow 'me' is unknown", "own or both"]),
        ({"follow": "both", "method": "search"}, ["a search follows the answers", "gradient"]),
        ({"follow": "own", "method": "search"}, ["a search follows the answers", "gradient"]),
        ({"rows": 1}, ["rows must be at least 2"]),
        ({"steps": 0}, ["steps must be at least 1"]),
        ({"slack": -0.1}, ["slack must be at least 0"]),
        ({"slack": float("nan")}, ["slack must be at least 0 and finite, got nan"]),
        ({"regular": float("inf")}, ["regular must be at least 0 and finite, got inf"]),
        ({"seed": -1}, ["seed must be from 0 to 4294967295, got -1"]),
        ({"start": {"adding": 1e39}}, ["task adding: a lambda of 1e+39 is too large to start from"]),
        ({"start": {"law": 1}}, ["a weight is given for 'law'"]),
        ({"start": {"adding": float("nan")}}, ["the weight of adding must be a finite number"]),
        ({"start": {"adding": {"k_prj": 1}}}, ["'k_prj' names none of its matrices"]),
    ],
    ids=str,
)
def test_arguments_that_mean_nothing(made: Made, settings: dict[str, Any], words: list[str]) -> None:
    refused(lambda: made.tuned(**settings), UsageError, *words)


def test_rows_that_the_model_cannot_read(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tuning.load_config(made.base)
    small = copy.deepcopy(config)
    small.vocab_size = 40
    monkeypatch.setattr(tuning, "load_config", lambda folder: small)
    refused(made.tuned, DataError, "task adding: its rows have token", "the vocabulary of this model has 40")


def test_tasks_and_recipes_belong_together(made: Made) -> None:
    refused(
        lambda: made._replace(recipes=made.recipes[:1]).tuned(), UsageError, "spelling has an adapter and no recipe"
    )
    refused(
        lambda: made._replace(adapters=made.adapters[:1]).tuned(), UsageError, "spelling has a recipe and no adapter"
    )


def test_a_loss_that_is_not_finite(made: Made, tmp_path: Path) -> None:
    adapter = tmp_path / "adding"
    shutil.copytree(made.adapters[0], adapter)
    content = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {k: v * 1e30 if v.is_floating_point() else v for k, v in content.items()},
        adapter / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    broken = made._replace(adapters=[adapter, made.adapters[1]])
    refused(broken.tuned, TrainingError, "task adding: its loss with its own adapter is nan")


def test_a_model_that_gives_no_gradient(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Blend, "_loss", lambda self, batch, target: torch.zeros((), requires_grad=True) * 1.0)
    model, _ = load_model(made.adapters[0], made.base, made.adapters[1:])
    blend = Blend(model, [name for name, _ in model.base_model.named_layers()])
    refused(lambda: blend.slopes(None), TrainingError, "does not reach its layers", "--method search")  # type: ignore[arg-type]
    monkeypatch.setattr(Blend, "_loss", lambda self, batch, target: torch.zeros(()))
    refused(lambda: blend.slopes(None), TrainingError, "gives no gradient", "--method search")  # type: ignore[arg-type]


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def ready(made: Made, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose two tasks are trained, and the working folder."""
    folder = tmp_path / "project"
    (folder / "tasks").mkdir(parents=True)
    monkeypatch.chdir(folder)
    project = {"model": str(made.base), "rank": 8, "alpha": 16, "targets": "all-linear"}
    (folder / "multisbora.yaml").write_text(yaml.safe_dump(project))
    for recipe, adapter in zip(made.recipes, made.adapters, strict=True):
        (folder / "tasks" / f"{recipe.name}.yaml").write_text(
            yaml.safe_dump(recipe.model_dump(mode="json", exclude={"name"}, exclude_defaults=True))
        )
        shutil.copytree(adapter, folder / "adapters" / recipe.name)
    return folder


def test_tune_and_merge(ready: Path, run: Run) -> None:
    shown = run("tune", "--tasks", "adding,spelling", "--rows", "16", "--steps", "8", "--output", "weights.yaml")
    assert shown.code == 0, shown.err
    assert "kept after" in shown.out and "wrote weights.yaml: `multisbora merge --weights-from" in shown.out
    told = run("tune", "--tasks", "adding,spelling", "--rows", "16", "--steps", "8", "--json").json
    assert told["by"] == "matrix" and told["method"] == "gradient" and told["lambdas"] == 28
    weights = {task: TaskWeight.of(value, task) for task, value in told["weights"].items()}
    assert read_weights(ready / "weights.yaml") == weights
    assert told["chosen"] in [point["step"] for point in told["front"]]
    assert set(told["tasks"]["adding"]) == {
        *("rows", "learned", "base", "own", "before", "after", "retention_before", "retention_after")
    }
    receipt = merge(
        Path(yaml.safe_load((ready / "multisbora.yaml").read_text())["model"]),
        [ready / "adapters" / task for task in TASKS],
        read_weights(ready / "weights.yaml"),
        output=ready / "merged",
    )
    assert {task: receipt.tasks[task].weight for task in TASKS} == weights


def test_a_task_at_0_in_every_channel_has_no_adapter(ready: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """`merge` would take it for one that was never trained."""
    monkeypatch.setattr("multisbora.tune._choice", lambda *_: 0)
    tuned = ("tune", "--by", "channel", "--rows", "8", "--steps", "1", "--output", "tuned")
    shown = run(*tuned, "--tasks", "adding,spelling", "--weight", "adding=0")
    assert shown.code == 0 and "task adding is at 0 in every channel" in shown.err
    assert [path.name for path in (ready / "tuned").iterdir()] == ["spelling"]


def test_the_lambda_that_is_shown() -> None:
    """A mean is what tuning makes of the default; that of a start that nothing beats is what somebody said."""
    start = {"a": TaskWeight(0.5, (("q_proj", 2.0),)), "b": TaskWeight(1.0, tuple((f"{n}.x", 0.5) for n in range(4)))}
    task = TunedTask(1, 1, 2.0, 1.0, 1.5, 1.5, 0.5, 0.5)
    for step, shown in ((0, ("0.5, q_proj 2", "1 but for 4 patterns")), (3, ("0.5 in the mean", "1 in the mean"))):
        point = Point(step, start, {"a": 1.5, "b": 1.5}, {"a": 0.5, "b": 0.5})
        found = Tuned("kind", "gradient", 8, 4, start, dict.fromkeys(start, task), point, (point,))
        lines = _tuned_lines(found, None)
        assert all(line.endswith(end) for line, end in zip(lines[2:], shown, strict=False)), lines


def test_a_dry_run_computes_and_writes_nothing(ready: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Blend, "nats", lambda *_: pytest.fail("a dry run looked at rows"))
    before = tree(ready)
    shown = run("tune", "--tasks", "adding,spelling", "--by", "kind", "--output", "weights.json", "--dry-run")
    assert (shown.code, shown.out) == (0, "would tune 14 lambdas in 32 steps and write weights.json\n")
    assert tree(ready) == before
    told = run("tune", "--tasks", "adding,spelling", "--weight", "adding=0.5", "--dry-run", "--json").json
    assert told["weights"] == {"adding": 0.5, "spelling": 1.0} and told["tasks"] == {} and told["chosen"] is None


def test_what_the_command_refuses(ready: Path, run: Run) -> None:
    tasks = ("tune", "--tasks", "adding,spelling")
    (ready / "there.yaml").write_text("adding: 1\n")
    assert_refused(run(*tasks, "--output", "there.yaml"), 1, "there.yaml exists")
    assert_refused(run(*tasks, "--output", "weights.txt"), 2, "weights.txt is no file of weights")
    assert_refused(run("tune", "--tasks", "adding,law"), 1, "adapters/law does not exist", "train --task law")
    assert_refused(run("tune"), 1, "no")
    assert_refused(run(*tasks, "--by", "row"), 2, "by 'row' is unknown")
    assert_refused(run(*tasks, "--by", "chanel", "--output", "tuned"), 2, "by 'chanel' is unknown")
    by_channel = (*tasks, "--by", "channel", "--output")
    assert_refused(run(*by_channel, "weights.yaml"), 2, "weights.yaml is a file's name", "give --output a folder")
    assert_refused(run(*by_channel, "adapters"), 1, "adapters")
    assert_refused(run(*tasks, "--by", "channel", "--method", "search"), 2, "cannot find 224 lambdas", progress=True)
    assert (ready / "there.yaml").read_text() == "adding: 1\n"
