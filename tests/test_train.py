"""A task's run on a tiny model: the adapter folder it ends in, the same bytes again, and what stops it."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft.utils.save_and_load
import pytest
import torch
from builders import answer_tokens, draw_moments, edit_json, tiny_gpt2, tiny_llama
from commands import refused
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from multisbora.adapter import TRAINING_FILE, Adapter
from multisbora.allocator import allocate
from multisbora.dataset import encode, pack
from multisbora.errors import CheckpointError, DataError, MultisboraError, TrainingError, UsageError
from multisbora.geometry import Geometry, from_checkpoint
from multisbora.loading import load_model
from multisbora.penalty import STRENGTH, Penalty
from multisbora.recipe import Recipe
from multisbora.registry import Registry
from multisbora.registry.claims import TaskClaims
from multisbora.run import METRICS_FILE, RUN_FILE, hold_run
from multisbora.stream import fingerprint
from multisbora.train import TrainResult, train
from multisbora.trainer import answer_loss

train_module = importlib.import_module("multisbora.train")  # the package's own `train` is the function
trainer_module = importlib.import_module("multisbora.trainer")
metrics_module = importlib.import_module("multisbora.metrics")
NAME = "owner/tiny"
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
STEPS = 6


class Base:
    """A tiny base model, and the claims of an fa and, after it, an fb task on it."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.geometry: Geometry = replace(from_checkpoint(folder), model=NAME)
        with Registry.open("sqlite://") as registry:
            for variant in ("fa", "fb"):
                options: dict[str, Any] = {"variant": variant, "rank": 4, "target_modules": TARGETS[kind]}
                allocate(registry, self.geometry, [variant], **options)
            self.claims: dict[str, TaskClaims] = registry.claims(NAME)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base(tiny_llama(tmp_path_factory.mktemp("base") / "llama", dtype="bfloat16"), "llama")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base(tiny_gpt2(tmp_path_factory.mktemp("base") / "gpt2", bare=True), "gpt2")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.json"
    path.write_text(json.dumps([{"question": f"{n} plus 1?", "output": f"it is {n + 1}"} for n in range(24)]))
    return path


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of its own, and no question to the hub: `datasets` and PEFT would ask it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def ask(repository: str, *_: Any, **__: Any) -> None:
        pytest.fail(f"the hub was asked for {repository}")

    monkeypatch.setattr(peft.utils.save_and_load, "check_file_exists_on_hf_hub", ask)


@pytest.fixture
def recipe(rows: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(**changes: Any) -> Recipe:
        training: dict[str, Any] = {"max_steps": STEPS, "batch_size": 4, "learning_rate": 0.05, "warmup_steps": 0}
        training |= {"save_steps": 2, "logging_steps": 1, "dropout": 0.1}
        content = {
            "name": "toy",
            "prompt": "Q: {question} A: ",
            "train": str(rows),
            "training": training | changes.pop("training", {}),
            "eval": {"data": str(tmp_path / "no-test.json"), "metric": "number"},
        }
        return Recipe.model_validate(content | changes)

    return make


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def losses(folder: Path) -> list[dict[str, Any]]:
    return [{key: line.get(key) for key in ("step", "loss", "dev_loss", "tokens")} for line in metrics(folder)]


def interrupted(step: int, *arguments: Any, **options: Any) -> None:
    """Train with a Ctrl-C at the end of a step."""
    original = metrics_module.Metrics.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_module.Metrics, "on_step_end", on_step_end)
        with pytest.raises(KeyboardInterrupt):
            train(*arguments, **options)


# --- a run --------------------------------------------------------------------------------------------------------


def test_full_run(llama: Base, recipe: Any, tmp_path: Path) -> None:
    said: list[str] = []
    output = tmp_path / "adapters" / "toy"
    claims = llama.claims["fa"]
    result = train(recipe(), llama.folder, claims, output, alpha=8, use_rslora=True, say=said.append)

    assert set(path.name for path in output.parent.iterdir()) == {"toy"}  # no run folder is left
    read = Adapter.read(output)
    assert (read.task, read.composition, read.variant) == ("fa", "default", "fa")
    assert read.base_model == NAME
    assert read.base_fingerprint == fingerprint(llama.folder, llama.geometry)
    assert read.claim_digest == claims.digest
    assert {name: module.region for name, module in read.modules.items()} == claims.regions
    assert all(module.scaling == 8 / 2 and module.values.any() for module in read.modules.values())

    lines = metrics(output)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert {*lines[0]} == {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second"}
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    assert all(before["tokens"] < after["tokens"] for before, after in itertools.pairwise(lines))

    assert isinstance(result, TrainResult) and result.task == "fa" and result.adapter == output
    assert (result.steps, result.tokens, result.loss) == (STEPS, lines[-1]["tokens"], lines[-1]["loss"])
    assert result.trainable_parameters == sum(module.values.size for module in read.modules.values())
    json.dumps(result.to_json(), allow_nan=False)

    summary = json.loads((output / TRAINING_FILE).read_text())
    assert summary["steps"] == STEPS and summary["examples"] == 24 and summary["loss"] == result.loss
    assert summary["recipe"]["name"] == "toy" and summary["claim_digest"] == claims.digest
    # Nothing of this machine goes with the adapter but the recipe's own paths.
    for path in output.iterdir():
        assert path.name == TRAINING_FILE or str(llama.folder).encode() not in path.read_bytes()
    assert any("not checked whether test rows" in line and "no-test.json does not exist" in line for line in said)


def test_a_tokenizer_with_other_numbers_than_in_training(llama: Base, recipe: Any, tmp_path: Path) -> None:
    """As many tokens, two of which changed places: no size and no row tells."""
    train(recipe(), llama.folder, llama.claims["fa"], tmp_path / "toy")
    said: list[str] = []
    load_model(tmp_path / "toy", llama.folder, say=said.append)
    other = Path(shutil.copytree(llama.folder, tmp_path / "other"))
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    edit_json(other / "tokenizer.json", model=content["model"])
    assert not said
    load_model(tmp_path / "toy", other, say=said.append)
    assert len(said) == 1 and f"{tmp_path / 'toy'} was trained with another vocabulary" in said[0]
    (tmp_path / "toy" / TRAINING_FILE).write_text("[]")  # another program's
    load_model(tmp_path / "toy", other, say=said.append)
    assert len(said) == 1


def test_same_bytes_again_and_after_an_interruption(llama: Base, recipe: Any, tmp_path: Path) -> None:
    claims = llama.claims["fa"]
    first, again, resumed = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    whole = train(recipe(), llama.folder, claims, first)
    train(recipe(), llama.folder, claims, again)
    assert weights(first) == weights(again)
    assert (first / "adapter_config.json").read_bytes() == (again / "adapter_config.json").read_bytes()

    interrupted(5, recipe(), llama.folder, claims, resumed)
    run = tmp_path / "c.run"
    assert not resumed.exists() and (run / "checkpoint-4").is_dir()
    assert not (run / "checkpoint-4" / "model.safetensors").exists()
    # Steps that were logged after the last checkpoint, and a line that a kill cut short.
    with (run / METRICS_FILE).open("a") as file:
        file.write('{"step": 5, "loss": 9.0}\n{"step": 6, "lo')
    said: list[str] = []
    result = train(recipe(), llama.folder, claims, resumed, say=said.append)
    assert any("going on from" in line and "checkpoint-4" in line for line in said)
    assert weights(resumed) == weights(first)
    assert (result.steps, result.tokens, result.loss) == (whole.steps, whole.tokens, whole.loss)
    kept = [{key: line[key] for key in ("step", "loss", "tokens")} for line in metrics(resumed)]
    assert kept == [{key: line[key] for key in ("step", "loss", "tokens")} for line in metrics(first)]
    assert not run.exists()


@pytest.mark.parametrize("packed", [True, False])
def test_resume_in_a_later_epoch(
    llama: Base, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    """The order of a later epoch comes back, also where examples of similar length are put together, and a mean over
    several steps that began before the checkpoint."""
    monkeypatch.setattr(train_module, "packs", lambda model: packed)
    claims = llama.claims["fb"]
    changed = recipe(training={"max_steps": 11, "batch_size": 8, "save_steps": 5, "logging_steps": 2})
    train(changed, llama.folder, claims, tmp_path / "whole")
    interrupted(9, changed, llama.folder, claims, tmp_path / "a")  # three steps an epoch: it goes on in the second
    said: list[str] = []
    train(changed, llama.folder, claims, tmp_path / "a", say=said.append)
    assert any("checkpoint-5" in line for line in said)
    assert weights(tmp_path / "a") == weights(tmp_path / "whole")
    assert losses(tmp_path / "a") == losses(tmp_path / "whole")


def test_checkpoints_hold_the_adapter_and_no_pickle(llama: Base, recipe: Any, tmp_path: Path) -> None:
    claims = llama.claims["fa"]
    interrupted(3, recipe(), llama.folder, claims, tmp_path / "a")
    (checkpoint,) = (tmp_path / "a.run").glob("checkpoint-*")
    assert {path.name for path in checkpoint.iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "trainer_state.json"),
        *(f"{part}.{kind}" for part in ("optimizer", "scheduler", "random_0") for kind in ("json", "safetensors")),
    }
    values = sum(module.values.nbytes for module in Adapter.read(checkpoint).modules.values())
    base = sum(path.stat().st_size for path in llama.folder.glob("*.safetensors"))
    sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
    assert sizes["adapter_model.safetensors"] < values + 4000 < base / 4
    assert 2 * values < sizes["optimizer.safetensors"] < 2 * values + 8000  # two moments a value, and names
    assert {path.name for path in (tmp_path / "a.run").iterdir()} - {checkpoint.name} == {
        *(RUN_FILE, METRICS_FILE, ".lock"),
    }


def test_a_run_that_was_killed_behind_its_adapter(llama: Base, recipe: Any, tmp_path: Path) -> None:
    """The adapter is in place, the run's folder not yet gone: the same call says what it said, another is refused."""
    claims, output = llama.claims["fa"], tmp_path / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module.shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(recipe(), llama.folder, claims, output)
    before = weights(output)
    refused(lambda: train(recipe(), llama.folder, claims, output, alpha=3), CheckpointError, str(output))
    result = train(recipe(), llama.folder, claims, output)
    summary = json.loads((output / TRAINING_FILE).read_text())
    assert (result.steps, result.loss) == (STEPS, summary["loss"]) and weights(output) == before
    assert not (tmp_path / "a.run").exists()
    refused(lambda: train(recipe(), llama.folder, claims, output), CheckpointError, str(output))


@pytest.mark.parametrize("dev", [{}, {"dev_size": 4, "training": {"eval_steps": STEPS}}], ids=["", "best is last"])
def test_interrupted_after_the_last_step(llama: Base, recipe: Any, tmp_path: Path, dev: dict[str, Any]) -> None:
    """Killed, or out of disk space, between training and the adapter."""
    claims, output = llama.claims["fa"], tmp_path / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "_publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(recipe(**dev), llama.folder, claims, output)
    resumed = train(recipe(**dev), llama.folder, claims, output)
    whole = train(recipe(**dev), llama.folder, claims, tmp_path / "whole")
    assert resumed.best_step == (STEPS if dev else None)
    assert weights(output) == weights(tmp_path / "whole")
    assert (resumed.steps, resumed.tokens, resumed.loss) == (whole.steps, whole.tokens, whole.loss)


def test_interrupted_before_and_within_a_checkpoint(llama: Base, recipe: Any, tmp_path: Path) -> None:
    claims, output, run = llama.claims["fa"], tmp_path / "a", tmp_path / "a.run"
    interrupted(1, recipe(), llama.folder, claims, output)
    assert not list(run.glob("checkpoint-*"))
    interrupted(5, recipe(), llama.folder, claims, output)
    # Killed while the checkpoint was written: the Trainer writes its state last.
    (run / "checkpoint-4" / "trainer_state.json").unlink()
    said: list[str] = []
    train(recipe(), llama.folder, claims, output, say=said.append)
    assert any("going on from" in line and "checkpoint-2" in line for line in said)
    train(recipe(), llama.folder, claims, tmp_path / "whole")
    assert weights(output) == weights(tmp_path / "whole")


def test_resume_with_other_settings_is_refused(llama: Base, gpt2: Base, recipe: Any, tmp_path: Path) -> None:
    output, claims = tmp_path / "a", llama.claims["fa"]
    interrupted(3, recipe(), llama.folder, claims, output)
    before = (tmp_path / "a.run" / RUN_FILE).read_bytes()
    changed = recipe(training={"learning_rate": 0.5}, prompt="{question}")
    refused(
        lambda: train(changed, llama.folder, claims, output, alpha=1),
        TrainingError,
        *("a.run", "recipe.training.learning_rate was 0.05, is 0.5", "recipe.prompt was", "alpha was 64, is 1"),
        "delete that folder",
    )
    refused(lambda: train(recipe(), llama.folder, llama.claims["fb"], output), TrainingError, "claim_digest was")
    assert (tmp_path / "a.run" / RUN_FILE).read_bytes() == before
    (tmp_path / "a.run" / RUN_FILE).write_text("{")
    refused(lambda: train(recipe(), llama.folder, claims, output), TrainingError, RUN_FILE, "delete that folder")


def test_what_changes_nothing_may_change(llama: Base, recipe: Any, rows: Path, tmp_path: Path) -> None:
    output, claims = tmp_path / "a", llama.claims["fa"]
    interrupted(3, recipe(), llama.folder, claims, output)
    moved = tmp_path / "moved.json"
    shutil.copyfile(rows, moved)
    scored = {"data": str(tmp_path / "other.json"), "metric": "letter", "max_new_tokens": 8}
    other = recipe(
        description="better", train=str(moved), eval=scored, target_modules=["k_proj"], training={"save_steps": 1}
    )
    said: list[str] = []
    train(other, llama.folder, claims, output, say=said.append)
    assert any("going on from" in line for line in said)
    train(recipe(), llama.folder, claims, tmp_path / "whole")
    assert weights(output) == weights(tmp_path / "whole")
    summary = json.loads((output / TRAINING_FILE).read_text())
    assert summary["recipe"]["description"] == "better" and summary["recipe"]["training"]["save_steps"] == 1
    assert summary["machine"]["torch"] == torch.__version__ and summary["machine"]["packed"]


def test_padded_after_packed_is_no_resume(
    llama: Base, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(3, recipe(), llama.folder, llama.claims["fa"], tmp_path / "a")
    monkeypatch.setattr(train_module, "packs", lambda model: False)
    refused(
        lambda: train(recipe(), llama.folder, llama.claims["fa"], tmp_path / "a"),
        TrainingError,
        *("a.run", "computed with something else", "packed was True, is False", "delete that folder"),
    )


def test_a_checkpoint_without_the_optimizer_is_not_gone_on_from(llama: Base, recipe: Any, tmp_path: Path) -> None:
    claims, output = llama.claims["fa"], tmp_path / "a"
    interrupted(5, recipe(), llama.folder, claims, output)
    (tmp_path / "a.run" / "checkpoint-4" / "optimizer.safetensors").unlink()
    said: list[str] = []
    train(recipe(), llama.folder, claims, output, say=said.append)
    assert any("going on from" in line and "checkpoint-2" in line for line in said)


def test_test_rows_that_move_dev_rows_are_no_resume(llama: Base, recipe: Any, rows: Path, tmp_path: Path) -> None:
    interrupted(3, recipe(dev_size=4), llama.folder, llama.claims["fa"], tmp_path / "a")
    # Test rows are never held out: with all but four of the training rows among them, these four are.
    test = tmp_path / "test.json"
    test.write_text(json.dumps([{**row, "answer": "1"} for row in json.loads(rows.read_text())[:-4]]))
    changed = recipe(dev_size=4, eval={"data": str(test), "metric": "number"})
    refused(
        lambda: train(changed, llama.folder, llama.claims["fa"], tmp_path / "a"),
        *(TrainingError, "dev_digest was", "train_digest was"),
    )


def test_other_settings_are_fine_while_there_is_no_checkpoint(llama: Base, recipe: Any, tmp_path: Path) -> None:
    interrupted(1, recipe(), llama.folder, llama.claims["fa"], tmp_path / "a")
    said: list[str] = []
    changed = recipe(training={"max_steps": 2, "batch_size": 2})
    assert train(changed, llama.folder, llama.claims["fa"], tmp_path / "a", say=said.append).steps == 2
    assert "an interrupted run left no checkpoint: starting anew" in said


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fb_after_fa_keeps_the_crossing_cells(
    request: pytest.FixtureRequest, recipe: Any, tmp_path: Path, kind: str
) -> None:
    base: Base = request.getfixturevalue(kind)
    claims = base.claims["fb"]
    assert all(region.excluded == base.claims["fa"].regions[name].indices for name, region in claims.regions.items())
    train(recipe(), base.folder, claims, tmp_path / "a")
    read = Adapter.read(tmp_path / "a")
    found = {base.geometry.find(name).module: module for name, module in read.modules.items()}
    assert {name: module.region for name, module in found.items()} == claims.regions
    for module in found.values():
        assert module.values.any() and not module.values[:, list(module.region.excluded)].any()
    assert metrics(tmp_path / "a")[-1]["loss"] < metrics(tmp_path / "a")[0]["loss"] - 0.02


def test_conv1d(gpt2: Base, recipe: Any, tmp_path: Path) -> None:
    train(recipe(), gpt2.folder, gpt2.claims["fa"], tmp_path / "a", geometry=gpt2.geometry)
    read = Adapter.read(tmp_path / "a")
    assert next(iter(read.modules)) == "transformer.h.0.attn.c_attn"
    assert {module.values.shape for module in read.modules.values()} == {(72, 4), (96, 4)}
    assert metrics(tmp_path / "a")[-1]["loss"] < metrics(tmp_path / "a")[0]["loss"] - 0.02


def test_gradient_checkpointing_gives_the_same_adapter(llama: Base, recipe: Any, tmp_path: Path) -> None:
    for name, on in (("plain", False), ("checkpointed", True)):
        changed = recipe(training={"gradient_checkpointing": on, "max_steps": 2, "dropout": 0.0})
        train(changed, llama.folder, llama.claims["fa"], tmp_path / name)
    assert weights(tmp_path / "plain") == weights(tmp_path / "checkpointed")


def test_micro_batches_and_epochs(llama: Base, recipe: Any, tmp_path: Path) -> None:
    """One step of 8 examples is one step of 8, in however many parts; an epoch is every example once."""
    for name, micro in (("whole", None), ("parts", 4)):
        settings = {"batch_size": 8, "micro_batch_size": micro, "max_steps": None, "epochs": 1, "dropout": 0.0}
        result = train(recipe(training=settings), llama.folder, llama.claims["fa"], tmp_path / name)
        assert result.steps == 24 // 8
    for one, two in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        assert one["tokens"] == two["tokens"]
        assert one["loss"] == pytest.approx(two["loss"], rel=0.05)


def test_loss_is_in_nats_a_token(llama: Base, recipe: Any, rows: Path, tmp_path: Path) -> None:
    changed = recipe(training={"max_steps": 1, "batch_size": 24})
    result = train(changed, llama.folder, llama.claims["fa"], tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(llama.folder)
    tokenizer = AutoTokenizer.from_pretrained(llama.folder)
    batch = pack(encode(changed, json.loads(rows.read_text()), tokenizer).examples)
    labels = batch.pop("labels")
    with torch.no_grad():
        wanted = answer_loss(model(**batch, use_cache=False), labels)
    # bf16 logits, examples in another order. A count that lacks one token would be off by one part in 300.
    assert result.loss == pytest.approx(float(wanted), rel=5e-4)


def test_answer_loss() -> None:
    logits = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0))
    outputs = type("Outputs", (), {"logits": logits})
    nats = -logits.log_softmax(-1)[0]
    wanted = nats[0, 4] + nats[2, 1]
    labels = torch.tensor([[4, -100, 1]])
    assert answer_loss(outputs, labels) == pytest.approx(float(wanted / 2))
    assert answer_loss(outputs, labels, num_items_in_batch=8) == pytest.approx(float(wanted / 8))


def test_padded_where_packing_leaks(llama: Base, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    changed = recipe(training={"max_steps": 2, "dropout": 0.0})
    train(changed, llama.folder, llama.claims["fa"], tmp_path / "packed")
    monkeypatch.setattr(train_module, "packs", lambda model: False)
    train(changed, llama.folder, llama.claims["fa"], tmp_path / "padded", say=said.append)
    assert any("batches are padded" in line for line in said)
    packed, padded = Adapter.read(tmp_path / "packed"), Adapter.read(tmp_path / "padded")
    for one, two in zip(metrics(packed.path), metrics(padded.path), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=0.05)
    for name, module in packed.modules.items():
        other = padded.modules[name].values
        assert np.vdot(module.values, other) > 0.95 * np.linalg.norm(module.values) * np.linalg.norm(other)


def test_last_steps_are_logged(llama: Base, recipe: Any, tmp_path: Path) -> None:
    changed = recipe(training={"max_steps": 3, "logging_steps": 2})
    result = train(changed, llama.folder, llama.claims["fa"], tmp_path / "a")
    assert [line["step"] for line in metrics(tmp_path / "a")] == [2, 3]
    assert result.loss == metrics(tmp_path / "a")[-1]["loss"]


def test_dry_run(llama: Base, recipe: Any, tmp_path: Path) -> None:
    result = train(recipe(), llama.folder, llama.claims["fa"], tmp_path / "a", dry_run=True)
    assert result.steps == STEPS and result.loss is None and not list(tmp_path.glob("a*"))
    done = train(recipe(), llama.folder, llama.claims["fa"], tmp_path / "a")
    assert result.trainable_parameters == done.trainable_parameters
    assert result.tokens == pytest.approx(done.tokens, rel=0.1)


def test_overlap_is_said(llama: Base, recipe: Any, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text(
        json.dumps([{"question": "3  PLUS 1?", "answer": "4"}, {"question": "no", "answer": "1"}])
    )
    said: list[str] = []
    changed = recipe(eval={"data": str(tmp_path / "test.json"), "metric": "number"})
    train(changed, llama.folder, llama.claims["fa"], tmp_path / "a", dry_run=True, say=said.append)
    assert any("1 of 2 test rows of task toy are also training rows" in line for line in said)


def test_test_rows_of_another_form_do_not_stop_training(llama: Base, recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text(json.dumps([{"query": "x", "answer": "4"}]))
    said: list[str] = []
    changed = recipe(eval={"data": str(tmp_path / "test.json"), "metric": "number"})
    train(changed, llama.folder, llama.claims["fa"], tmp_path / "a", dry_run=True, say=said.append)
    assert any("not checked" in line and "question" in line for line in said)


# --- isolated -----------------------------------------------------------------------------------------------------


def penalty_of(base: Base, task: str, seed: int = 1) -> Penalty:
    print_ = fingerprint(base.folder, base.geometry)
    return Penalty.of(base.claims[task], [draw_moments(base.geometry, "other", seed=seed, base_fingerprint=print_)])


@pytest.mark.parametrize("variant", ["fa", "fb"])
def test_isolated_training_is_quieter_on_the_others(llama: Base, recipe: Any, tmp_path: Path, variant: str) -> None:
    claims, penalty = llama.claims[variant], penalty_of(llama, variant)
    changed, isolated = {"max_steps": 20, "dropout": 0.0, "logging_steps": 5}, {"isolate": 0.1}
    plain = train(recipe(training=changed), llama.folder, claims, tmp_path / "plain")
    quiet = train(recipe(training=changed | isolated), llama.folder, claims, tmp_path / "quiet", penalty=penalty)

    def harm_of(folder: Path) -> float:
        found = 0.0
        for name, module in Adapter.read(folder).modules.items():
            update = module.scaling * module.values
            found += float(((update @ penalty.blocks[name]) * update).sum()) / llama.geometry.find(name).out_features
        return found

    assert harm_of(tmp_path / "quiet") < 0.5 * harm_of(tmp_path / "plain")
    lines, plain_lines = metrics(tmp_path / "quiet"), metrics(tmp_path / "plain")
    assert plain.loss is not None and quiet.loss is not None
    assert plain.loss < quiet.loss < plain_lines[0]["loss"]
    assert [line["step"] for line in lines if "isolation" in line] == [line["step"] for line in plain_lines]
    wanted = 0.1 * harm_of(tmp_path / "quiet") / answer_tokens(recipe(), llama.folder)
    assert lines[-1]["isolation"] == pytest.approx(wanted, rel=5e-3)
    assert not any("isolation" in line for line in plain_lines)
    summary = json.loads((tmp_path / "quiet" / TRAINING_FILE).read_text())
    assert (summary["isolation_digest"], summary["isolated_from"]) == (penalty.digest, ["other"])
    assert summary["recipe"]["training"]["isolate"] == 0.1


def test_an_isolated_run_goes_on_with_the_moments_it_began_with(llama: Base, recipe: Any, tmp_path: Path) -> None:
    claims, penalty = llama.claims["fa"], penalty_of(llama, "fa")
    isolated = recipe(training={"isolate": 0.01})
    train(isolated, llama.folder, claims, tmp_path / "whole", penalty=penalty)
    interrupted(5, isolated, llama.folder, claims, tmp_path / "a", penalty=penalty)
    for strength, other, words in (
        (0.02, penalty, ("recipe.training.isolate was 0.01, is 0.02",)),
        (0.0, None, ("isolation_digest was", "recipe.training.isolate was 0.01, is None")),
    ):
        changed = recipe(training={"isolate": strength})
        with pytest.raises(TrainingError) as caught:
            train(changed, llama.folder, claims, tmp_path / "a", penalty=other)
        assert all(word in str(caught.value) for word in words)
    said: list[str] = []
    anew = penalty_of(llama, "fa", seed=2)  # measured again meanwhile: of no account to a run that has begun
    train(isolated, llama.folder, claims, tmp_path / "a", penalty=anew, say=said.append)
    assert any("going on from" in line and "checkpoint-4" in line for line in said)
    assert weights(tmp_path / "a") == weights(tmp_path / "whole")
    assert [line["isolation"] for line in metrics(tmp_path / "a")] == [
        line["isolation"] for line in metrics(tmp_path / "whole")
    ]


def test_a_run_goes_on_as_it_was_begun_where_the_recipe_leaves_it_open(
    llama: Base, recipe: Any, tmp_path: Path
) -> None:
    claims, penalty = llama.claims["fa"], penalty_of(llama, "fa")
    settings = {"max_steps": 6, "isolate": None}
    for name, first, then in (("a", penalty, None), ("b", None, penalty)):
        interrupted(5, recipe(training=settings), llama.folder, claims, tmp_path / name, penalty=first)
        train(recipe(training=settings), llama.folder, claims, tmp_path / name, penalty=then)
        train(recipe(training=settings), llama.folder, claims, tmp_path / f"{name}-whole", penalty=first)
        assert weights(tmp_path / name) == weights(tmp_path / f"{name}-whole")
        told = json.loads((tmp_path / name / TRAINING_FILE).read_text())
        assert told["recipe"]["training"]["isolate"] == (STRENGTH if first else 0) and (
            "isolated_from" in told
        ) == bool(first)
    assert weights(tmp_path / "a") != weights(tmp_path / "b")


def test_without_isolation_nothing_is_new(llama: Base, recipe: Any, tmp_path: Path) -> None:
    """Settings, results and metrics have no key that those of runs before there was isolation lack."""
    claims = llama.claims["fa"]
    interrupted(3, recipe(training={"isolate": 0}), llama.folder, claims, tmp_path / "a")
    before = json.loads((tmp_path / "a.run" / RUN_FILE).read_text())
    assert "isolate" not in before["recipe"]["training"] and "isolation_digest" not in before
    train(recipe(), llama.folder, claims, tmp_path / "a")
    train(recipe(), llama.folder, claims, tmp_path / "whole")
    assert weights(tmp_path / "a") == weights(tmp_path / "whole")
    summary = json.loads((tmp_path / "a" / TRAINING_FILE).read_text())
    assert not {"isolation_digest", "isolated_from"} & summary.keys()


def test_a_penalty_that_does_not_fit(llama: Base, recipe: Any, tmp_path: Path) -> None:
    claims, penalty = llama.claims["fa"], penalty_of(llama, "fa")
    isolated = recipe(training={"isolate": 0.01})
    given: Any = (llama.folder, claims, tmp_path / "a")
    refused(lambda: train(isolated, *given), UsageError, "training.isolate 0.01 needs the moments of other tasks")
    off = recipe(training={"isolate": 0})
    refused(lambda: train(off, *given, penalty=penalty), UsageError, "training.isolate is 0")
    others = Penalty.of(claims, [draw_moments(llama.geometry, "other")])
    refused(lambda: train(isolated, *given, penalty=others), DataError, "task other were measured on another base")
    fb = penalty_of(llama, "fb")
    refused(lambda: train(isolated, *given, penalty=fb, dry_run=True), UsageError, "other claims than those of task fa")
    assert not list(tmp_path.glob("a*"))


# --- dev rows -----------------------------------------------------------------------------------------------------


def test_the_best_adapter_is_kept(llama: Base, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dev losses as given here: lowest at step 2, and twice not lower after that."""
    given = iter([3.0, 2.0, 2.5, 2.0])

    def evaluate(self: Any, *_: Any, **__: Any) -> dict[str, float]:
        found = {"eval_loss": next(given)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    monkeypatch.setattr(trainer_module.TaskTrainer, "evaluate", evaluate)
    claims, said = llama.claims["fa"], []
    settings = {"eval_steps": 1, "early_stopping_patience": 2, "save_steps": 50, "logging_steps": 50}
    changed = recipe(training=settings, dev_size=4)
    result = train(changed, llama.folder, claims, tmp_path / "a", say=said.append)
    assert (result.steps, result.best_step, result.dev_loss) == (4, 2, 2.0)
    assert [line["dev_loss"] for line in metrics(tmp_path / "a") if "dev_loss" in line] == [3.0, 2.0, 2.5, 2.0]
    assert [line["step"] for line in metrics(tmp_path / "a") if "loss" in line] == [1, 2, 3, 4]
    assert any("4 of 24 training rows are held out" in line for line in said)
    summary = json.loads((tmp_path / "a" / TRAINING_FILE).read_text())
    assert (summary["best_step"], summary["dev_loss"], summary["steps"]) == (2, 2.0, 4)
    assert (summary["examples"], summary["dev_examples"], summary["dev_truncated"]) == (20, 4, 0)
    # What is kept is the adapter as it was at step 2 of this very schedule.
    given = iter([3.0, 2.0, 2.5])
    interrupted(3, changed, llama.folder, claims, tmp_path / "b")
    assert weights(tmp_path / "b.run" / "checkpoint-2") == weights(tmp_path / "a")
    json.dumps(result.to_json(), allow_nan=False)


def test_dev_rows_are_watched_and_not_learned(llama: Base, recipe: Any, rows: Path, tmp_path: Path) -> None:
    seen: list[list[int]] = []
    original = trainer_module.TaskTrainer._collate

    def collate(self: Any, examples: Any) -> Any:
        seen.append([example.row for example in examples])
        return original(self, examples)

    claims = llama.claims["fa"]
    changed = recipe(training={"max_steps": None, "epochs": 2, "eval_steps": 4}, dev_size=0.25)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module.TaskTrainer, "_collate", collate)
        result = train(changed, llama.folder, claims, tmp_path / "a")
    learned = {row for batch in seen for row in batch}
    assert len(learned) == 18 and result.steps == 10  # 18 rows in batches of 4, twice
    looks = {line["step"]: line["dev_loss"] for line in metrics(tmp_path / "a") if "dev_loss" in line}
    assert list(looks) == [4, 8, 10]  # the last step too
    assert result.dev_loss == min(looks.values()) and looks[result.best_step] == result.dev_loss
    # The same figure from outside, of the adapter that was kept.
    model, tokenizer = load_model(tmp_path / "a", llama.folder)
    everything = encode(changed, json.loads(rows.read_text()), tokenizer).examples
    batch = pack([example for example in everything if example.row not in learned])
    labels = batch.pop("labels")
    with torch.no_grad():
        wanted = float(answer_loss(model(**batch, use_cache=False), labels))
    assert result.dev_loss == pytest.approx(wanted, rel=2e-3)  # bf16
    again = train(changed, llama.folder, claims, tmp_path / "b")
    assert again.dev_loss == result.dev_loss and losses(tmp_path / "a") == losses(tmp_path / "b")


def test_dev_rows_of_their_own_are_checked(llama: Base, recipe: Any, tmp_path: Path) -> None:
    def write(*rows: tuple[str, str]) -> str:
        path = tmp_path / "dev.json"
        path.write_text(json.dumps([{"question": question, "output": output} for question, output in rows]))
        return str(path)

    def run(dev: str, **training: Any) -> None:
        changed = recipe(dev=dev, training=training)
        train(changed, llama.folder, llama.claims["fa"], tmp_path / "a", dry_run=True, say=said.append)

    said: list[str] = []
    run(write(("1 plus 1?", "2"), ("7 minus 1?", "6")))
    assert "task toy: 1 dev rows are left out: 1 have the prompt of a training row, 0 that of a test row" in said
    long = write(("7 minus 1?", "it is 6, I should think, or so"))
    refused(lambda: run(long, cutoff=40), DataError, "1 of 1 dev examples", "exceed 40 tokens", "dev row 1 has")
    run(long, cutoff=40, max_truncated=1)
    assert any("1 of 1 dev examples (100.0%) exceed 40 tokens and are cut" in line for line in said)
    refused(lambda: run(write(("1 plus 1?", "2"))), DataError, "all 1 dev rows are also training rows")
    refused(lambda: run(str(tmp_path / "none.json")), DataError, "none.json does not exist")
    refused(lambda: run(write(("x", " "))), DataError, "no dev row is left to score")


def test_other_dev_rows_are_no_resume(llama: Base, recipe: Any, tmp_path: Path) -> None:
    claims = llama.claims["fa"]
    interrupted(3, recipe(dev_size=4), llama.folder, claims, tmp_path / "a")
    for changes, words in (
        ({"dev_size": 5}, ("recipe.dev_size was 4.0, is 5.0", "dev_digest was", "train_digest was")),
        ({"dev_size": 4, "training": {"eval_steps": 7}}, ("recipe.training.eval_steps was 100, is 7",)),
        ({"dev_size": 4, "training": {"early_stopping_patience": 7}}, ("early_stopping_patience was None, is 7",)),
        ({}, ("recipe.dev_size was 4.0, is None",)),
    ):
        refused(
            lambda changes=changes: train(recipe(**changes), llama.folder, claims, tmp_path / "a"),
            TrainingError,
            *words,
        )


# --- what stops it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logging_steps", [1, 50])
def test_loss_that_is_not_finite(
    llama: Base, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logging_steps: int
) -> None:
    monkeypatch.setattr(trainer_module, "answer_loss", lambda *a, **k: answer_loss(*a, **k) * torch.nan)
    broken = recipe(training={"logging_steps": logging_steps})
    refused(
        lambda: train(broken, llama.folder, llama.claims["fa"], tmp_path / "a"),
        TrainingError,
        *("task toy: loss is nan at step", "lower training.learning_rate"),
    )
    assert not (tmp_path / "a").exists()


def test_a_broken_row_is_named_and_the_checkpoint_stays(llama: Base, recipe: Any, tmp_path: Path) -> None:
    steps = itertools.count(1)

    def loss(outputs: Any, labels: Any, **count: Any) -> Any:
        return answer_loss(outputs, labels, **count) * (torch.nan if next(steps) == 4 else 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "answer_loss", loss)
        message = refused(
            lambda: train(recipe(training={"logging_steps": 50}), llama.folder, llama.claims["fa"], tmp_path / "a"),
            TrainingError,
            *("task toy: loss is nan at step 4, on training rows", "plus 1? A: it is"),
        )
    named = re.search(r"training rows ([\d, ]+) \(row (\d+): 'Q: (\d+) plus 1", message)
    assert named is not None
    assert len(named[1].split(", ")) == 4 and named[1].split(", ")[0] == named[2]
    assert int(named[2]) == int(named[3]) + 1  # rows count from 1, the questions from 0
    said: list[str] = []
    train(recipe(training={"logging_steps": 50}), llama.folder, llama.claims["fa"], tmp_path / "a", say=said.append)
    assert any("checkpoint-2" in line for line in said)


def test_output_is_taken(llama: Base, recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("x")
    refused(lambda: train(recipe(), llama.folder, llama.claims["fa"], tmp_path / "a"), CheckpointError, str(tmp_path))
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"] and not (tmp_path / "a.run").exists()


def test_claims_of_another_model(llama: Base, gpt2: Base, recipe: Any, tmp_path: Path) -> None:
    refused(
        lambda: train(recipe(), gpt2.folder, llama.claims["fa"], tmp_path / "a"),
        TrainingError,
        *("claims of task 'fa'", str(gpt2.folder), "allocate again"),
    )
    assert not list(tmp_path.glob("a*"))


def test_data_that_cannot_be_used(llama: Base, recipe: Any, tmp_path: Path) -> None:
    def run(**changes: Any) -> None:
        train(recipe(**changes), llama.folder, llama.claims["fa"], tmp_path / "a")

    refused(lambda: run(train=str(tmp_path / "none.json")), DataError, "none.json does not exist")
    refused(lambda: run(target="solution"), DataError, "row 1 of task toy", "solution")
    refused(lambda: run(training={"cutoff": 22}), DataError, "exceed 22 tokens", "raise training.cutoff")
    refused(lambda: run(training={"cutoff": 5}), DataError, "no row is left")
    assert not list(tmp_path.glob("a*"))


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"optimizer": "adam_wrong"}, ("training.optimizer", "adam_wrong")),
        ({"lr_scheduler": "zigzag"}, ("training.lr_scheduler", "zigzag")),
        (
            {"lr_scheduler": "warmup_stable_decay"},
            ("lr_scheduler 'warmup_stable_decay' cannot be used", "inverse_sqrt"),
        ),
        ({"lr_scheduler": "reduce_lr_on_plateau"}, ("lr_scheduler 'reduce_lr_on_plateau' cannot be used",)),
        pytest.param(
            {"optimizer": "paged_adamw_32bit"},
            ("training.optimizer 'paged_adamw_32bit'", "no CUDA device"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="paged optimizers work here"),
        ),
    ],
    ids=str,
)
def test_settings_that_the_trainer_does_not_know(
    llama: Base, recipe: Any, tmp_path: Path, training: dict[str, Any], words: tuple[str, ...]
) -> None:
    refused(
        lambda: train(recipe(training=training), llama.folder, llama.claims["fa"], tmp_path / "a"), UsageError, *words
    )
    assert not list(tmp_path.glob("a*"))


@pytest.mark.parametrize("name", train_module._SCHEDULES)
def test_schedules_need_no_arguments_of_their_own(name: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=3)
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr()[0] > 0


@pytest.mark.parametrize("dry_run", [True, False])
def test_rows_longer_than_the_positions(recipe: Any, tmp_path: Path, dry_run: bool) -> None:
    short = Base(tiny_gpt2(tmp_path / "short", n_positions=20), "gpt2")
    calls: list[str] = []
    refused(
        lambda: train(
            recipe(),
            *(short.folder, short.claims["fa"], tmp_path / "a"),
            dry_run=dry_run,
            on_start=lambda: calls.append("started"),
        ),
        *(DataError, "task toy needs up to", "made for 20", "lower training.cutoff to 20"),
    )
    assert not calls and not (tmp_path / "a.run").exists()
    cut = recipe(training={"cutoff": 20, "max_truncated": 1})
    assert train(cut, short.folder, short.claims["fa"], tmp_path / "a").steps == STEPS
    turning = Base(tiny_llama(tmp_path / "turning", max_position_embeddings=20), "llama")
    said: list[str] = []
    train(recipe(), turning.folder, turning.claims["fa"], tmp_path / "b", dry_run=True, say=said.append)
    assert any("made for 20" in line for line in said)


def test_base_that_cannot_be_read(llama: Base, recipe: Any, tmp_path: Path) -> None:
    def run(base: Path) -> None:
        train(recipe(), base, llama.claims["fa"], tmp_path / "a")

    refused(lambda: run(tmp_path / "nowhere"), MultisboraError, "nowhere")
    bare = tmp_path / "bare"
    shutil.copytree(llama.folder, bare)
    for path in bare.glob("tokenizer*"):
        path.unlink()
    refused(lambda: run(bare), CheckpointError, "tokenizer", str(bare))
    strange = tmp_path / "strange"
    shutil.copytree(llama.folder, strange)
    (strange / "config.json").write_text('{"model_type": "never-heard-of"}')
    refused(lambda: run(strange), CheckpointError, str(strange))
    assert not (tmp_path / "a").exists()


def test_the_bar_is_for_terminals(llama: Base, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    class Bar:
        def __init__(self, **settings: Any) -> None:
            self.settings, self.steps, self.shown = settings, 0, []
            bars.append(self)

        def update(self, steps: int) -> None:
            self.steps += steps

        def set_postfix(self, figures: dict[str, str]) -> None:
            self.shown.append(figures)

        def close(self) -> None:
            pass

    monkeypatch.setattr(metrics_module, "tqdm", Bar)
    monkeypatch.setattr(metrics_module.sys.stderr, "isatty", lambda: False, raising=False)
    train(recipe(), llama.folder, llama.claims["fa"], tmp_path / "a")
    assert bars == []
    monkeypatch.setattr(metrics_module.sys.stderr, "isatty", lambda: True, raising=False)
    result = train(recipe(), llama.folder, llama.claims["fa"], tmp_path / "b")
    (bar,) = bars
    assert bar.settings["total"] == bar.steps == result.steps
    assert bar.shown and all({"loss", "tok/s"} == figures.keys() for figures in bar.shown)


def test_other_rows_under_the_same_name_are_no_resume(llama: Base, recipe: Any, rows: Path, tmp_path: Path) -> None:
    content = rows.read_text()
    try:
        interrupted(3, recipe(), llama.folder, llama.claims["fa"], tmp_path / "a")
        rows.write_text(json.dumps(json.loads(content)[::-1]))
        refused(
            lambda: train(recipe(), llama.folder, llama.claims["fa"], tmp_path / "a"), TrainingError, "train_digest was"
        )
    finally:
        rows.write_text(content)


def test_a_task_trains_once_at_a_time(llama: Base, recipe: Any, tmp_path: Path) -> None:
    with hold_run(tmp_path / "a.run"):
        refused(
            lambda: train(recipe(), llama.folder, llama.claims["fa"], tmp_path / "a"), TrainingError, "a.run is in use"
        )
    train(recipe(), llama.folder, llama.claims["fa"], tmp_path / "a")


def test_a_full_disk_is_one_line(llama: Base, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module.peft.PeftModel, "save_pretrained", full)
        refused(
            lambda: train(recipe(), llama.folder, llama.claims["fa"], tmp_path / "a"), TrainingError, "No space left"
        )
    train(recipe(), llama.folder, llama.claims["fa"], tmp_path / "a")


def test_an_fp16_base_trains_in_fp32_without_a_gpu(recipe: Any, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "half", dtype="float16")
    geometry = from_checkpoint(folder)
    claims = allocate(Registry.open("sqlite://"), geometry, ["toy"], rank=4, target_modules="all-linear").tasks["toy"]
    said: list[str] = []
    train(recipe(), folder, claims, tmp_path / "a", say=said.append)
    assert any("fp32" in line for line in said) or torch.cuda.is_available()
