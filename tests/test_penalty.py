"""The penalty of isolated training: what it is the sum of, its gradient against autograd's, and what is refused."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from builders import answer_tokens, draw_moments, tiny_gpt2, tiny_llama
from commands import Run, assert_refused, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from multisbora import SboraConfig
from multisbora.adapter import Adapter
from multisbora.allocator import allocate
from multisbora.errors import DataError, TrainingError, UsageError
from multisbora.geometry import Geometry, from_checkpoint
from multisbora.moments import Moments, harm
from multisbora.penalty import STRENGTH, LivePenalty, Penalty, strength_of
from multisbora.project import Project
from multisbora.recipe import Recipe, load
from multisbora.region import own_axis
from multisbora.registry import Registry
from multisbora.registry.claims import TaskClaims

NAME = "owner/tiny"
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
# fp32, the same sums in another order: relative to the norm of each gradient.
TOLERANCE = 2e-6


class Base:
    """A tiny base model; claims of an fa task, an fb task after it and an fa task after both, each of which keeps out
    of the cells before it; and moments of two tasks."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.geometry: Geometry = replace(from_checkpoint(folder), model=NAME)
        with Registry.open("sqlite://") as registry:
            for task, variant in (("fa", "fa"), ("fb", "fb"), ("late", "fa")):
                options: dict[str, Any] = {"variant": variant, "rank": 3, "target_modules": TARGETS[kind]}
                allocate(registry, self.geometry, [task], **options)
            self.claims: dict[str, TaskClaims] = registry.claims(NAME)
        self.others = [draw_moments(self.geometry, f"other{seed}", seed=seed) for seed in (1, 2)]

    def live(self, task: str, use_rslora: bool = False, dtype: torch.dtype = torch.float32) -> Any:
        """A PEFT model of a task with random values."""
        claims = self.claims[task]
        config = SboraConfig(
            variant=claims.variant,
            r=claims.rank,
            alpha=5,
            use_rslora=use_rslora,
            indices={module: list(region.indices) for module, region in claims.regions.items()},
            excluded={module: list(region.excluded) for module, region in claims.regions.items() if region.excluded},
        )
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype), config)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for _, layer in model.base_model.named_layers():
                values = layer.sbora_values["default"]
                values.copy_(torch.randn(values.shape, generator=generator) * 0.1)
                if "default" in layer.sbora_excluded:
                    values.index_fill_(1 - own_axis(claims.variant), layer.sbora_excluded["default"], 0.0)
        return model


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    make: Any = {"llama": tiny_llama, "gpt2": tiny_gpt2}[request.param]
    more = {"bare": True} if request.param == "gpt2" else {}
    return Base(make(tmp_path_factory.mktemp("base") / request.param, **more), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base(tiny_llama(tmp_path_factory.mktemp("base") / "llama"), "llama")


def harms(model: Any, base: Base, moments: list[Moments]) -> torch.Tensor:
    """The sum of harms by its definition, of whole update matrices and whole second moments, for autograd."""
    found = torch.zeros((), dtype=torch.float64)
    for name, layer in model.base_model.named_layers():
        matrix = base.geometry.find(name)
        update = torch.zeros(matrix.shape, dtype=torch.float64)
        index = layer.sbora_indices["default"].long()
        update = update.index_add(own_axis(layer.variant["default"]), index, layer.update("default").double())
        for one in moments:
            block = torch.from_numpy(one.sites[matrix.module].block).double()
            found = found + (update @ block * update).sum() / matrix.out_features
    return found


# --- the gradient and the value -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(st.sampled_from(["fa", "fb", "late"]), st.floats(1e-4, 1e3), st.booleans(), st.sampled_from([1, 2]))
def test_the_gradient_is_that_of_strength_times_the_harms(
    either: Base, task: str, strength: float, use_rslora: bool, count: int
) -> None:
    live, others = either.live(task, use_rslora), either.others[:count]
    trained = [parameter for parameter in live.parameters() if parameter.requires_grad]
    wanted = torch.autograd.grad(strength * harms(live, either, others), trained)
    penalty = LivePenalty(live, Penalty.of(either.claims[task], others), strength)
    penalty.add_gradient()
    assert len(trained) == len(either.claims[task].regions)
    for parameter, gradient in zip(trained, wanted, strict=True):
        assert parameter.grad is not None and gradient.any()
        assert (parameter.grad - gradient).norm() <= TOLERANCE * gradient.norm()
    assert penalty.value() == pytest.approx(float(strength * harms(live, either, others).detach()), rel=1e-5)


@pytest.mark.parametrize("task", ["fa", "fb"])
def test_the_same_on_a_bf16_base(llama: Base, task: str) -> None:
    """fb's products are bf16 there: eight bits."""
    live = llama.live(task, dtype=torch.bfloat16)
    trained = [parameter for parameter in live.parameters() if parameter.requires_grad]
    wanted = torch.autograd.grad(harms(live, llama, llama.others), trained)
    penalty = LivePenalty(live, Penalty.of(llama.claims[task], llama.others), 1.0)
    penalty.add_gradient()
    for parameter, gradient in zip(trained, wanted, strict=True):
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        assert (parameter.grad - gradient).norm() <= (5e-3 if task == "fb" else TOLERANCE) * gradient.norm()
    assert penalty.value() == pytest.approx(float(harms(live, llama, llama.others).detach()), rel=2e-3)


def test_it_is_added_to_what_is_there_and_scaled_as_that_is(llama: Base) -> None:
    live, penalty = llama.live("fa"), Penalty.of(llama.claims["fa"], llama.others)
    trained = [parameter for parameter in live.parameters() if parameter.requires_grad]
    LivePenalty(live, penalty, 0.5).add_gradient()
    alone = [parameter.grad.clone() for parameter in trained]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    LivePenalty(live, penalty, 0.5).add_gradient(scaler.scale(torch.ones(())))
    for parameter, gradient in zip(trained, alone, strict=True):
        torch.testing.assert_close(parameter.grad, 1 + 1024 * gradient, rtol=1e-6, atol=1e-6)


def test_it_is_the_harm_of_moments(llama: Base) -> None:
    live, claims = llama.live("fa"), llama.claims["fa"]
    wanted = 0.0
    for name, layer in live.base_model.named_layers():
        values = layer.update("default").detach().numpy()
        wanted += sum(harm(values, other.block(name, claims.regions[name].indices)) for other in llama.others)
    assert LivePenalty(live, Penalty.of(claims, llama.others), 0.25).value() == pytest.approx(wanted / 4, rel=1e-5)


def test_cells_of_earlier_claims_stay_zero(llama: Base) -> None:
    """An fb task behind an fa task has zeros at that one's columns, an fa task behind an fb task at its rows."""
    for task, axis in (("fb", 1), ("late", 0)):
        live, claims = llama.live(task), llama.claims[task]
        LivePenalty(live, Penalty.of(claims, llama.others), 1.0).add_gradient()
        for name, layer in live.base_model.named_layers():
            excluded = torch.tensor(claims.regions[name].excluded)
            gradient = layer.sbora_values["default"].grad
            assert len(excluded) and gradient.any() and not gradient.index_select(axis, excluded).any()


def test_steps_along_it_lower_the_harm(llama: Base) -> None:
    live = llama.live("fb")
    penalty = LivePenalty(live, Penalty.of(llama.claims["fb"], llama.others), 1.0)
    optimizer = torch.optim.SGD([p for p in live.parameters() if p.requires_grad], lr=1e-3)
    found = [penalty.value()]
    for _ in range(5):
        optimizer.zero_grad()
        penalty.add_gradient()
        optimizer.step()
        found.append(penalty.value())
    assert found == sorted(found, reverse=True) and found[-1] < 0.9 * found[0]


# --- what it is made of -------------------------------------------------------------------------------------------


def test_blocks_are_sums_at_the_claimed_channels(llama: Base) -> None:
    claims = llama.claims["fa"]
    penalty = Penalty.of(claims, iter(llama.others))
    assert penalty.tasks == ["other1", "other2"] and penalty.blocks.keys() == claims.regions.keys()
    assert all(not other.sites for other in penalty.others)
    for module, region in claims.regions.items():
        wanted = sum(other.block(module, region.indices) for other in llama.others)
        np.testing.assert_allclose(penalty.blocks[module], wanted, rtol=1e-5)
        assert penalty.blocks[module].dtype == np.float32
    whole = Penalty.of(llama.claims["fb"], llama.others)
    assert all(whole.blocks[m].shape == (llama.geometry.find(m).in_features,) * 2 for m in whole.blocks)


def test_the_moments_are_left_as_they_were(llama: Base) -> None:
    before = [other.to_bytes() for other in llama.others]
    for task in llama.claims:
        Penalty.of(llama.claims[task], llama.others)
    assert [other.to_bytes() for other in llama.others] == before


def test_the_digest_is_of_the_blocks(llama: Base) -> None:
    claims, (one, two) = llama.claims["fa"], llama.others
    digest = Penalty.of(claims, [one, two]).digest
    assert Penalty.of(claims, [one, two]).digest == digest
    assert Penalty.of(claims, [replace(one, task="renamed"), two]).digest == digest
    assert len({digest, Penalty.of(claims, [one]).digest, Penalty.of(llama.claims["late"], [one, two]).digest}) == 3
    # What lies outside of the claimed channels is nobody's business.
    module, region = next(iter(claims.regions.items()))
    site = one.sites[module]
    free = next(channel for channel in range(len(site.energy)) if channel not in region.indices)
    for channel, same in ((free, True), (region.indices[0], False)):
        block = site.block.copy()
        block[channel, channel] *= 2
        louder = replace(one, sites={**one.sites, module: replace(site, block=block)})
        assert (Penalty.of(claims, [louder, two]).digest == digest) == same


# --- what is refused ----------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_one_line(llama: Base) -> None:
    fa, fb, other = llama.claims["fa"], llama.claims["fb"], llama.others[0]
    refused(lambda: Penalty.of(fa, []), UsageError, "task fa shares no composition", "nobody to isolate it from")
    refused(lambda: Penalty.of(fa, [replace(other, task="fa")]), UsageError, "the moments of task fa are its own")
    refused(
        lambda: Penalty.of(fa, [replace(other, geometry_digest="0" * 64)]),
        DataError,
        "the moments of task other1 are of another geometry",
    )
    few = {module: [0, 1] for module in other.sites}
    lacking = draw_moments(llama.geometry, "few", channels=few)
    refused(lambda: Penalty.of(fa, [lacking]), DataError, "task few lack", "of 3 channels in", "multisbora measure")
    refused(
        lambda: Penalty.of(fb, [lacking]), DataError, "task few have the block of 2 of", "input channels", "with fa"
    )
    for claims in (fa, fb):
        none = draw_moments(llama.geometry, "none", target_modules=["k_proj"])
        refused(lambda: Penalty.of(claims, [none]), DataError, "task none lack the matrix in")  # noqa: B023


def test_another_base_or_other_claims(llama: Base) -> None:
    penalty = Penalty.of(llama.claims["fa"], llama.others)
    penalty.check(llama.claims["fa"], "of no base")
    refused(
        lambda: penalty.check(llama.claims["fa"], "another"), DataError, "task other1 were measured on another base"
    )
    refused(
        lambda: penalty.check(llama.claims["late"], "of no base"), UsageError, "other claims than those of task late"
    )


def test_a_strength_and_a_penalty_go_together(llama: Base) -> None:
    def recipe(isolate: float | None) -> Recipe:
        content = {"name": "toy", "prompt": "{q}", "train": "x.json", "eval": {"data": "y.json", "metric": "number"}}
        return Recipe.model_validate(content | {"training": {"isolate": isolate}})

    penalty = Penalty.of(llama.claims["fa"], llama.others)
    assert strength_of(recipe(0), None) == strength_of(recipe(None), None) == 0
    assert strength_of(recipe(0.1), penalty) == 0.1 and strength_of(recipe(None), penalty) == STRENGTH
    refused(lambda: strength_of(recipe(0.1), None), UsageError, "training.isolate 0.1 needs the moments")
    refused(lambda: strength_of(recipe(0), penalty), UsageError, "training.isolate is 0, and a penalty was given")


def test_a_penalty_that_was_kept(llama: Base, tmp_path: Path) -> None:
    penalty = Penalty.of(llama.claims["fb"], llama.others)
    penalty.write(tmp_path / "kept.safetensors")
    found = Penalty.read(tmp_path / "kept.safetensors")
    assert (found.claim_digest, found.others, found.digest) == (penalty.claim_digest, penalty.others, penalty.digest)
    refused(lambda: Penalty.read(tmp_path / "none"), TrainingError, "is not there: all machines of a run")
    refused(lambda: penalty.write(tmp_path / "no" / "folder"), TrainingError, "cannot be written")
    content = (tmp_path / "kept.safetensors").read_bytes()
    for damaged in (b"", content[:-9], content.replace(b"claim_digest", b"claim_digits")):
        (tmp_path / "kept.safetensors").write_bytes(damaged)
        refused(lambda: Penalty.read(tmp_path / "kept.safetensors"), TrainingError, "kept.safetensors is damaged")


def test_moments_that_lack_something_are_passed_over(llama: Base) -> None:
    claims, (one, two) = llama.claims["fa"], llama.others
    lacking: list[str] = []
    found = Penalty.gather(claims, [replace(one, task="late", sites={}), two], lacking.append)
    assert found is not None and found.digest == Penalty.of(claims, [two]).digest and found.tasks == [two.task]
    assert len(lacking) == 1 and "task late lack the matrix" in lacking[0]
    assert Penalty.gather(claims, [], lacking.append) is None


# --- the command --------------------------------------------------------------------------------------------------


def test_train_isolated(project: Path, run: Run) -> None:
    """From the registry's moments of the other task, and of nobody else."""
    quiet = ("train", "--task", "adding", "--isolate", "20")
    run("allocate", "--tasks", "adding")
    assert_refused(run(*quiet), 2, "task adding shares no composition with another task", "training.isolate")
    run("allocate", "--tasks", "doubling")
    for more in ((), ("--dry-run",)):
        assert_refused(run(*quiet, *more), 1, "isolated from doubling, whose rows nobody", "measure --tasks doubling")
    assert run("measure", "--tasks", "doubling").code == 0
    assert "adapters/adding would be trained" in run(*quiet, "--dry-run").out
    done = run(*quiet, "--json")
    assert done.code == 0, done.err

    kept = json.loads(Path("adapters/adding/training.json").read_text())
    assert (kept["recipe"]["training"]["isolate"], kept["isolated_from"]) == (20.0, ["doubling"])
    lines = [json.loads(line) for line in Path("adapters/adding/metrics.jsonl").read_text().splitlines()]
    adapter = Adapter.read(Path("adapters/adding"))
    with Registry.open(Project.load().registry) as registry:
        moments = registry.moments(Project.load().model_name, "doubling")
    assert moments is not None
    wanted = sum(
        harm(module.scaling * module.values, moments.block(name, module.region.indices))
        for name, module in adapter.modules.items()
    )
    answers = answer_tokens(load("adding", Path("tasks")), Path(Project.load().model))
    assert lines[-1]["isolation"] == pytest.approx(20 * wanted / answers, rel=1e-4) and wanted > 0
    # Rows of a task itself say nothing of its crosstalk.
    assert_refused(run("train", "--task", "doubling", "--isolate", "1"), 1, "from adding, whose rows nobody")


def test_isolated_where_the_others_were_measured(project: Path, run: Run) -> None:
    """Nobody has to ask for it, and who does not want it says 0."""
    recipe = Path("tasks/doubling.yaml").read_text()
    Path("tasks/appending.yaml").write_text(recipe.replace("name: doubling", "name: appending"))
    assert run("allocate", "--tasks", "adding,doubling,appending", "--strategy", "random").code == 0
    dry = ("train", "--task", "adding", "--dry-run")
    assert "solat" not in run(*dry).err
    assert run("measure", "--tasks", "doubling").code == 0
    assert "isolated from doubling; not isolated from others: the rows of appending were not" in run(*dry).err
    assert "solat" not in run(*dry, "--isolate", "0").err
    assert run("measure", "--tasks", "appending").code == 0
    done = run("train", "--task", "adding")
    assert done.code == 0 and "isolated from appending, doubling\n" in done.err
    kept = json.loads(Path("adapters/adding/training.json").read_text())
    assert (kept["recipe"]["training"]["isolate"], kept["isolated_from"]) == (STRENGTH, ["appending", "doubling"])


def test_what_lacks_channels_isolates_from_nobody(project: Path, run: Run) -> None:
    run("allocate", "--tasks", "doubling")
    run("measure", "--tasks", "doubling")
    run("allocate", "--tasks", "adding", "--strategy", "random")
    done = run("train", "--task", "adding", "--dry-run")
    assert done.code == 0 and "not isolated from other tasks: the moments of task doubling lack" in done.err


def test_moments_of_another_base_isolate_from_nobody(project: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless somebody asks for it: a teammate who measures elsewhere stops nobody's training."""
    run("allocate", "--tasks", "adding,doubling")
    with monkeypatch.context() as patch:
        patch.setattr("multisbora.survey.fingerprint", lambda *_: "blake3:other")
        assert run("measure", "--tasks", "doubling").code == 0
    dry = run("train", "--task", "adding", "--dry-run")
    assert dry.code == 0 and "not isolated from other tasks: the moments of task doubling were measured on" in dry.err
    assert_refused(run("train", "--task", "adding", "--dry-run", "--isolate", "1"), 1, "measured on another base model")


def test_a_run_goes_on_though_moments_are_forgotten(project: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("allocate", "--tasks", "adding,doubling")
    run("measure", "--tasks", "doubling")
    quiet = ("train", "--task", "adding", "--isolate", "20", "--set", "training.save_steps=1")
    train = importlib.import_module("multisbora.train")
    with monkeypatch.context() as patch:
        patch.setattr(train, "_publish", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        assert run(*quiet).code == 1
    assert run("registry", "forget", "--task", "doubling").code == 0
    done = run(*quiet)
    assert done.code == 0 and "going on from" in done.err
    assert json.loads(Path("adapters/adding/training.json").read_text())["isolated_from"] == ["doubling"]


def test_blocks_that_take_more_memory_than_the_model(project: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("allocate", "--tasks", "adding,doubling")
    run("measure", "--tasks", "doubling")
    monkeypatch.setattr("multisbora.penalty.MOST_BYTES", 6 * 4 * 4**2 - 1)
    assert "take 384 bytes, --isolate 1000 takes them" in run("train", "--task", "adding", "--dry-run").err
    assert run("train", "--task", "adding", "--dry-run", "--isolate", "1000").code == 0


def test_a_refusal_comes_before_anything_is_begun(project: Path, run: Run) -> None:
    run("allocate", "--tasks", "adding,doubling")
    events = len(run("registry", "history", "--json").json)
    refusal = run("train", "--task", "adding", "--isolate", "1")
    assert_refused(refusal, 1, "doubling, whose rows nobody has measured", "multisbora measure --tasks doubling")
    assert not Path("adapters").exists() and len(run("registry", "history", "--json").json) == events
    assert run("release", "--task", "adding").code == 0


def test_damaged_moments_of_others_hinder_nobody_who_does_not_need_them(
    project: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("allocate", "--tasks", "adding,doubling")
    run("measure", "--tasks", "doubling")

    def damaged(registry: Registry, model: str, task: str) -> Moments:
        raise DataError(f"the moments of task {task} are damaged")

    monkeypatch.setattr(Registry, "moments", damaged)
    assert "not isolated from other tasks: the moments of task doubling are damaged" in (
        run("train", "--task", "adding", "--dry-run").err
    )
    assert_refused(run("train", "--task", "adding", "--dry-run", "--isolate", "1"), 1, "doubling are damaged")


def test_channels_that_were_claimed_since(project: Path, run: Run) -> None:
    run("allocate", "--tasks", "doubling")
    run("measure", "--tasks", "doubling")
    run("allocate", "--tasks", "adding")
    quiet = ("train", "--task", "adding", "--isolate", "1", "--dry-run")
    assert_refused(run(*quiet), 1, "the moments of task doubling lack", "measure --tasks doubling")
    assert run("measure", "--tasks", "doubling").code == run(*quiet).code == 0


@pytest.mark.parametrize("strength", ["-1", "nan", "inf", "1e300"])
def test_strengths_that_cannot_be(project: Path, run: Run, strength: str) -> None:
    run("allocate", "--tasks", "adding,doubling")
    assert_refused(run("train", "--task", "adding", "--isolate", strength), 2, "training.isolate")


def test_several_tasks_isolated(project: Path, run: Run) -> None:
    """Each reads the registry itself, wherever it is trained; one that cannot be is no hindrance to the others."""
    run("allocate", "--tasks", "adding,doubling")
    run("measure", "--tasks", "doubling")
    done = run("train", "--tasks", "adding,doubling", "--isolate", "1", "--dry-run", "--json")
    assert done.code == 1
    assert {task: found["state"] for task, found in done.json["tasks"].items()} == {
        "adding": "planned",
        "doubling": "failed",
    }
    assert "isolated from adding, whose rows nobody has measured" in done.json["tasks"]["doubling"]["error"]
