"""Models whose matrices have one name on disk and another in memory, from the headers to a proven merge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from builders import VOCABULARY, edit_json, tiny_gpt2, tiny_llama, write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from multisbora import SboraConfig
from multisbora.adapter import Adapter
from multisbora.allocator import allocate
from multisbora.errors import AdapterError, UsageError
from multisbora.export import export_peft_lora
from multisbora.geometry import Geometry, Matrix, Names, from_checkpoint, spellings
from multisbora.loading import load_base, load_model
from multisbora.merge import merge
from multisbora.recipe import Recipe
from multisbora.registry import Registry
from multisbora.registry.claims import TaskClaims
from multisbora.run import METRICS_FILE
from multisbora.stream import fingerprint
from multisbora.train import train
from multisbora.tuner import SboraLayer
from multisbora.verify import verify
from multisbora.verify.names import Names as VerifierNames

TARGETS = {"gemma3": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
HUB, LIVE = "language_model.model.", "model.language_model."
IDS = torch.arange(3, 43)[None]
# The live update is a matmul of its own, so fp32 sums come in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def tiny_gemma3(folder: Path, *, renamed: bool = False) -> Path:
    """A random Gemma 3 of 60,000 parameters. Its vision tower has the text part's sizes, and more layers of its names.

    Args:
        renamed: store the live model's names, not those of the published checkpoints.
    """
    text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    vision = {**text, "num_hidden_layers": 3, "image_size": 8, "patch_size": 4}
    text |= dict(num_key_value_heads=4, head_dim=8, vocab_size=VOCABULARY, max_position_embeddings=256)
    text |= dict(sliding_window=16, query_pre_attn_scalar=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=1,
        **{name: VOCABULARY + i for i, name in enumerate(("image_token_index", "boi_token_index", "eoi_token_index"))},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gemma3ForConditionalGeneration(config)
        for name, weight in model.named_parameters():
            if name.endswith("_proj.weight"):
                torch.nn.init.normal_(weight, std=0.2)
    state = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    if not renamed:
        state = {_published(name): weight for name, weight in state.items()}
    tiny_llama(folder)  # for its tokenizer
    (folder / "model.safetensors").unlink()
    model.config.architectures = [type(model).__name__]
    model.config.dtype = "float32"
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_file(
        {name: weight.contiguous() for name, weight in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def _published(name: str) -> str:
    if name.startswith(LIVE):
        return HUB + name.removeprefix(LIVE)
    return name.removeprefix("model.").replace("vision_tower.", "vision_tower.vision_model.", 1)


@dataclass
class Journey:
    """A base, the claims of an fa task and of an fb task after it, and their adapters, trained on the live model."""

    folder: Path
    base: Path
    geometry: Geometry
    claims: dict[str, TaskClaims]

    @property
    def adapters(self) -> list[Path]:
        return [self.folder / task for task in self.claims]

    def config(self, task: str) -> SboraConfig:
        """As `multisbora.train` makes it."""
        claims = self.claims[task]
        return SboraConfig(
            task_type="CAUSAL_LM",
            variant=claims.variant,
            r=claims.rank,
            alpha=8,
            indices={module: list(region.indices) for module, region in claims.regions.items()},
            excluded={module: list(region.excluded) for module, region in claims.regions.items() if region.excluded},
            task=task,
            composition=claims.composition,
            base_fingerprint=fingerprint(self.base, self.geometry),
            claim_digest=claims.digest,
        )


def _claims(geometry: Geometry, kind: str) -> dict[str, TaskClaims]:
    with Registry.open("sqlite://") as registry:
        for task, rank in (("fa", 3), ("fb", 2)):
            targets = TARGETS[kind]
            allocate(
                registry,
                geometry,
                [task],
                variant=task,
                rank=rank,
                target_modules=targets,
                rank_pattern={targets[-1]: 5},
            )
        return registry.claims(geometry.model)


def _journey(folder: Path, named: str) -> Journey:
    kind, _, renamed = named.partition(" ")
    base = (
        tiny_gpt2(folder / "base", bare=True) if kind == "gpt2" else tiny_gemma3(folder / "base", renamed=bool(renamed))
    )
    geometry = from_checkpoint(base)
    made = Journey(folder, base, geometry, _claims(geometry, kind))
    assert any(region.excluded for region in made.claims["fb"].regions.values())
    for task in made.claims:
        torch.manual_seed(1)
        model = peft.get_peft_model(load_base(base), made.config(task))
        before = {name: weight.clone() for name, weight in model.named_parameters() if not weight.requires_grad}
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=0)
        for _ in range(3):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.base_model.restore()
        assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters() if name in before)
        model.save_pretrained(folder / task, save_embedding_layers=False)
    merge(base, made.adapters, {"fa": 0.7}, output=folder / "merged")
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Journey]:
    return cache(lambda kind: _journey(tmp_path_factory.mktemp("journey"), kind))


@pytest.fixture(params=["gemma3", "gemma3 renamed", "gpt2"])
def journey(request: pytest.FixtureRequest, made: Callable[[str], Journey]) -> Journey:
    return made(request.param)


@pytest.fixture(params=["gemma3", "gemma3 renamed"])
def gemma3(request: pytest.FixtureRequest, made: Callable[[str], Journey]) -> Journey:
    return made(request.param)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def test_claims_reach_the_live_layers_that_they_mean_and_no_others(journey: Journey) -> None:
    for task, claims in journey.claims.items():
        model = load_base(journey.base)
        stock = {name: weight.clone() for name, weight in model.named_parameters()}
        tuned = peft.get_peft_model(model, journey.config(task))
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SboraLayer)}
        assert len(layers) == len(claims.regions) == 2 * len(TARGETS[journey.geometry.model_type])
        with torch.no_grad():
            for layer in layers.values():
                layer.sbora_values["default"].fill_(1.0)
        tuned.merge_adapter()
        cells = 0
        for name, weight in model.named_parameters():
            if ".sbora_" in name:
                continue
            name = name.replace(".base_layer", "")
            owned = torch.zeros_like(weight, dtype=torch.bool)
            if name.removesuffix(".weight") in layers:
                matrix = journey.geometry.find(name.removesuffix(".weight"))
                region = claims.regions[matrix.module]
                view = owned.T if matrix.orientation == "conv1d" else owned  # (out, in)
                view = view.T if task == "fa" else view
                view[list(region.indices)] = True
                view[:, list(region.excluded)] = False
            assert torch.equal(weight != stock[name], owned), name
            cells += int(owned.sum())
        assert cells == sum(region.cells(journey.geometry.find(m).shape) for m, region in claims.regions.items())


def test_merged_is_proven_and_is_the_live_model(journey: Journey) -> None:
    proof = verify(journey.folder / "merged", journey.base, journey.adapters)
    assert proof.ok, proof.problem
    assert proof.cells_changed == sum(task.cells for task in proof.tasks.values())
    live, _ = load_model(journey.base, adapters=journey.adapters)
    live.base_model.set_weight("adapter0", 0.7)
    merged, report = AutoModelForCausalLM.from_pretrained(journey.folder / "merged", output_loading_info=True)
    assert not any(report.values())
    assert (logits(live) - logits(load_base(journey.base))).abs().max() > 0.01
    torch.testing.assert_close(logits(live), logits(merged), **CLOSE)
    live.merge_adapter(live.active_adapters)
    assert torch.equal(logits(live), logits(merged))


def test_stock_peft_takes_each_task_as_a_plain_lora(journey: Journey, tmp_path: Path) -> None:
    for adapter in journey.adapters:
        export_peft_lora(adapter, tmp_path / adapter.name, journey.geometry)
        stock = AutoModelForCausalLM.from_pretrained(journey.base)
        lora = peft.PeftModel.from_pretrained(stock, tmp_path / adapter.name).eval()
        live, _ = load_model(adapter, journey.base)
        torch.testing.assert_close(logits(lora), logits(live), **CLOSE)


def test_a_cell_of_the_vision_tower_betrays_itself(gemma3: Journey, tmp_path: Path) -> None:
    """q_proj of block 0 exists twice with one shape; no task's region covers the tower's."""
    weights = gemma3.base / "model.safetensors"
    towers = [
        name for name in load_file(weights) if "vision_tower" in name and name.endswith("0.self_attn.q_proj.weight")
    ]
    assert len(towers) == 1
    assert not any("vision" in matrix.module for matrix in gemma3.geometry.matrices)
    shutil.copytree(gemma3.folder / "merged", tmp_path / "merged")
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    column = next(r.indices[0] for m, r in gemma3.claims["fa"].regions.items() if m.endswith("0.self_attn.q_proj"))
    tensors[towers[0]][0, column] += 1
    save_file(tensors, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    proof = verify(tmp_path / "merged", gemma3.base, gemma3.adapters)
    assert proof.cells_outside_regions == 1
    assert proof.problem is not None and proof.problem.startswith(
        f"{towers[0]}: 1 wrong cells, first at row 0, column {column}"
    )


@pytest.mark.parametrize("tower", ["vision_tower.vision_model.encoder", "model.vision_tower.encoder", "visual"])
def test_a_tower_never_stands_for_the_language_model(gemma3: Journey, tmp_path: Path, tower: str) -> None:
    module = f"{tower}.layers.0.self_attn.q_proj"
    eye = Geometry("eye", "siglip", (Matrix(module, f"{module}.weight", 32, 32),))
    adapter = write_adapter(tmp_path / "eye", eye, "eye", indices={module: [0, 1]})
    with pytest.raises(AdapterError, match=f"has no matrix '{module}'"):
        Adapter.read(adapter).fit(gemma3.geometry)
    edit_json(adapter / "adapter_config.json", excluded={f"{LIVE}layers.0.self_attn.q_proj": [0]})
    with pytest.raises(AdapterError, match=r"excluded names .*, which is no module of the adapter"):
        Adapter.read(adapter)
    with pytest.raises(UsageError, match=f"{module} is a target, but `indices` has no entry"):
        gemma3.config("fa").region(module, (32, 32))


def test_a_target_of_both_parts_needs_claims_in_both(gemma3: Journey) -> None:
    indices = {module: list(region.indices) for module, region in gemma3.claims["fa"].regions.items()}
    both = SboraConfig(indices=indices, target_modules=TARGETS["gemma3"])
    with pytest.raises(UsageError, match=r"model\.vision_tower\..*_proj is a target, but `indices` has no entry"):
        peft.get_peft_model(load_base(gemma3.base), both)


def test_a_name_that_can_mean_two_modules_is_refused() -> None:
    names = ("model.layers.0.up", "language_model.layers.0.up")
    config = SboraConfig(indices={"layers.0.up": [1]}, excluded={name: [0] for name in names[:1]})
    assert config.region(names[0], (4, 4)).excluded == (0,)
    two = SboraConfig(indices={name: [i] for i, name in enumerate(names)})
    assert two.region(names[1], (4, 4)).indices == (1,)
    with pytest.raises(
        UsageError, match=r"base_model\.layers\.0\.up can be model\..* or language_model\.layers\.0\.up"
    ):
        two.region("base_model.layers.0.up", (4, 4))
    with pytest.raises(UsageError, match=r"layers\.0\.up: layers\.0\.up can be"):
        SboraConfig(indices={"layers.0.up": [1]}, excluded={name: [0] for name in names})


fronts = st.lists(
    st.sampled_from(
        ["model", "language_model", "base_model", "transformer", "encoder", "vision_tower", "vision_model", "visual"]
    ),
    max_size=3,
)
ends = st.sampled_from(["layers.0.q", "layers.1.q", "layers.10.q", "h.0.q", "0.q", "layers.0.experts.1.q", "q"])
modules = st.builds(lambda front, end: ".".join([*front, end]), fronts, ends)


@settings(deadline=None, max_examples=300)
@given(st.sets(modules, max_size=6), modules)
def test_the_verifier_reads_names_as_the_merge_does(names: set[str], module: str) -> None:
    """The rule is written twice; this compares the two."""
    assert sorted(Names(names).find(module)) == sorted(VerifierNames(names).find(module))


@settings(deadline=None, max_examples=300)
@given(modules)
def test_every_spelling_means_the_module_and_no_other_block(module: str) -> None:
    found = spellings(module)
    assert found[0] == module
    for other in found:
        assert Names([module]).find(other) == [module]
        assert Names([module]).find(other.replace("0.", "7.")) == ([] if "0." in other else [module])


def test_train_takes_a_multimodal_base_for_a_task_in_text(
    gemma3: Journey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "train.json"
    rows.write_text(json.dumps([{"question": f"{n} plus 1?", "output": f"it is {n + 1}"} for n in range(8)]))
    recipe = Recipe.model_validate(
        {
            "name": "fb",
            "prompt": "Q: {question} A: ",
            "train": str(rows),
            "training": {"max_steps": 3, "batch_size": 4, "learning_rate": 0.05, "warmup_steps": 0, "logging_steps": 1},
            "eval": {"data": str(tmp_path / "none.json"), "metric": "number"},
        }
    )
    said: list[str] = []
    train(recipe, gemma3.base, gemma3.claims["fb"], tmp_path / "fb", alpha=8, say=said.append)
    assert not any("packed" in line for line in said)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "fb" / METRICS_FILE).read_text().splitlines()]
    assert losses[-1] < losses[0]
    adapters = [gemma3.folder / "fa", tmp_path / "fb"]
    merge(gemma3.base, adapters, output=tmp_path / "merged", claims={t: c.digest for t, c in gemma3.claims.items()})
    proof = verify(tmp_path / "merged", gemma3.base, adapters)
    assert proof.ok, proof.problem
