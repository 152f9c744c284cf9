"""The cards' files, every card against what transformers builds and saves, and the script that writes them."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

from multisbora import cards
from multisbora.cards import Card, card_names, card_text, grouped, read_card
from multisbora.cli import app
from multisbora.errors import GeometryError, UsageError
from multisbora.geometry import Geometry, describe, from_card
from multisbora.resources import models_dir, tasks_dir

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "make_cards.py"
MIXTURES = {"Mixtral-8x7B": "w1 w3 w2", "Mixtral-8x22B": "w1 w3 w2", "Qwen3-30B-A3B": "gate_proj up_proj down_proj"}


@functools.cache
def make_cards() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_cards", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pydantic looks up the annotations of its models there
    spec.loader.exec_module(module)
    return module


def build(card: Card, **sizes: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(card.model_type, **{**card.config, **sizes})
    with torch.device("meta"), no_init_weights():  # nothing to initialise there, and it takes half of the time
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


def two_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config that make it two layers deep, those of parts of the model included."""
    parts = {key: value | two_layers(value) for key, value in config.items() if isinstance(value, dict)}
    return parts | {key: 2 for key in config if key in ("num_hidden_layers", "n_layer")}


def layers(card: Card) -> int:
    text = card.config.get("text_config", card.config)
    return int(text.get("num_hidden_layers") or text["n_layer"])


def saved_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors that transformers would write, by its own way back from the live names."""
    return {name: tuple(t.shape) for name, t in revert_weight_conversion(model, model.state_dict()).items()}


def test_there_are_cards_and_every_one_loads() -> None:
    files = sorted(models_dir().glob("*.json"))
    assert len(files) >= 45
    assert {path.stem for path in files} == set(card_names())
    stems = {name.lower() for name in card_names()}
    aliases: list[str] = []
    for path in files:
        geometry = from_card(path)
        assert read_card(path.stem) == read_card(path) and geometry.model == path.stem and len(geometry.matrices) > 0
        names = json.loads(path.read_text())["names"]
        assert names and all(read_card(name).path == path for name in names)
        aliases += [name.lower() for name in names]
    assert len(set(aliases)) == len(aliases), "two cards share an alias"
    assert not stems.intersection(aliases), "an alias is the name of a card"
    for model_type in ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2"):
        assert any(read_card(path).model_type == model_type for path in files), model_type


def test_the_recipes_folder_is_there() -> None:
    assert tasks_dir().is_dir()


@pytest.mark.parametrize("name", card_names())
def test_a_card_is_what_transformers_builds_and_saves(name: str) -> None:
    card, geometry = read_card(name), from_card(name)
    model = build(card)
    assert sum(weight.numel() for weight in model.parameters()) == card.parameters

    # What PEFT calls all-linear, of the language model: every linear layer but the head.
    linear = {
        module_name: module
        for module_name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
        and module is not model.get_output_embeddings()
        and "vision_tower" not in module_name
    }
    selected = geometry.select("all-linear")
    assert {geometry.find(module_name) for module_name in linear} == set(selected) and len(linear) == len(selected)
    for module_name, module in linear.items():
        matrix = geometry.find(module_name)
        assert matrix.stored_shape == tuple(module.weight.shape)
        assert (matrix.orientation == "conv1d") == isinstance(module, Conv1D)

    # The names on disk, from a model of two layers: above, every layer was compared, and what transformers does to a
    # name on its way to disk does not depend on the layer's number. The hub's GPT-2 lacks a part that it writes now.
    saved = saved_shapes(build(card, **two_layers(card.config)))
    if card.model_type == "gpt2":
        saved = {tensor.removeprefix("transformer."): shape for tensor, shape in saved.items()}
    first = {m.tensor: m.stored_shape for m in geometry.matrices if re.search(r"\b(layers|h)\.[01]\.", m.module)}
    assert len(first) * layers(card) == len(geometry.matrices) * 2
    assert {tensor: saved.get(tensor) for tensor in first} == first
    # Nothing that is a matrix in a block of the language model is missing, but for routers.
    blocks = {t for t, shape in saved.items() if len(shape) == 2 and re.search(r"\b(layers|h)\.\d", t)}
    left = {tensor for tensor in blocks - set(first) if "vision_tower" not in tensor}
    assert all(tensor.endswith(".gate.weight") for tensor in left) and bool(left) == (name in MIXTURES)


@pytest.mark.parametrize("name", MIXTURES)
def test_stacked_experts_make_the_live_model_s_fused_ones(name: str) -> None:
    card, geometry = read_card(name), from_card(name)
    fused = {n: tuple(w.shape) for n, w in build(card).named_parameters() if ".mlp.experts." in n}
    gate, up, down = MIXTURES[name].split()
    holder = "block_sparse_moe" if card.model_type == "mixtral" else "mlp"
    experts = [matrix for matrix in geometry.matrices if matrix.is_expert]
    count = card.config.get("num_local_experts") or card.config["num_experts"]
    assert len(experts) == 3 * layers(card) * count and len(fused) == 2 * layers(card)
    for layer in range(layers(card)):
        shapes = {
            (kind, geometry.find(f"model.layers.{layer}.{holder}.experts.{expert}.{kind}").shape)
            for kind in (gate, up, down)
            for expert in range(count)
        }
        (g, u, d) = (dict(shapes)[kind] for kind in (gate, up, down))
        assert len(shapes) == 3  # all experts of a layer are of one size
        assert fused[f"model.layers.{layer}.mlp.experts.gate_up_proj"] == (count, g[0] + u[0], g[1]) and g == u
        assert fused[f"model.layers.{layer}.mlp.experts.down_proj"] == (count, *d)


@pytest.mark.parametrize(
    ("name", "linear", "experts"),
    [
        ("Llama-3-8B", 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096), 0),
        ("Gemma-2-2b", 26 * (2 * 2048 * 2304 + 2 * 1024 * 2304 + 3 * 9216 * 2304), 0),
        ("Phi-4", 40 * ((40 + 2 * 10) * 128 * 5120 + 5120 * 5120 + 3 * 17920 * 5120), 0),
        ("GPT-2", 12 * (3 * 768 * 768 + 768 * 768 + 2 * 3072 * 768), 0),
        ("Mixtral-8x7B", 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096), 32 * 8 * 3 * 14336 * 4096),
    ],
)
def test_linear_parameters_by_hand(name: str, linear: int, experts: int) -> None:
    geometry = from_card(name)
    cells = {matrix: matrix.out_features * matrix.in_features for matrix in geometry.matrices}
    assert sum(cells[matrix] for matrix in geometry.select("all-linear")) == linear
    assert sum(size for matrix, size in cells.items() if matrix.is_expert) == experts


def test_published_counts() -> None:
    """Figures that the models' publishers or the hub print, so that the script's data is not its own witness."""
    assert describe(read_card("Llama-3-8B"))["adaptable_parameters"] == 6_979_321_856
    # embedding, head and 65 norms of 4096
    assert read_card("Llama-3-8B").parameters == 6_979_321_856 + 2 * 128256 * 4096 + 65 * 4096 == 8_030_261_248
    published = {"LLaMA-7B": 6_738_415_616, "Mistral-7B": 7_241_732_096, "Qwen2.5-7B": 7_615_616_512}
    published |= {"Mixtral-8x7B": 46_702_792_704, "GPT-2": 124_439_808, "SmolLM2-135M": 134_515_008}
    published |= {"Gemma-2-2b": 2_614_341_888, "Phi-3.5-mini": 3_821_079_552, "Llama-3-70B": 70_553_706_496}
    assert {name: read_card(name).parameters for name in published} == published


def test_cards_of_the_papers_models() -> None:
    sizes = {"LLaMA-7B": (4096, 11008, 4096, 32), "LLaMA-13B": (5120, 13824, 5120, 40)}
    sizes |= {"Llama-3-8B": (4096, 14336, 1024, 32), "SmolLM2-135M": (576, 1536, 192, 30)}
    for name, (hidden, intermediate, kv, layers) in sizes.items():
        card = from_card(name)
        assert len(card.matrices) == 7 * layers
        assert card.find("model.layers.0.self_attn.k_proj").shape == (kv, hidden)
        assert card.find(f"model.layers.{layers - 1}.mlp.down_proj").shape == (hidden, intermediate)


def test_other_names_of_a_model() -> None:
    assert from_card("huggingfacetb/smollm2-135m-INSTRUCT").model == "SmolLM2-135M"
    assert read_card("meta-llama/Llama-3.3-70B-Instruct").name == "Llama-3-70B"
    assert read_card("Qwen/Qwen2.5-Coder-7B-Instruct").name == "Qwen2.5-7B"
    assert read_card("gpt2").name == "GPT-2"
    with pytest.raises(UsageError, match="did you mean LLaMA-7B"):
        from_card("lama-7b")
    with pytest.raises(UsageError, match="cards: Gemma-2-27b"):
        from_card("@@@")


def test_a_card_s_own_name_costs_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    original = cards._card
    monkeypatch.setattr(cards, "_card", lambda path: read.append(path) or original(path))
    assert read_card("llama-3-70b").name == "Llama-3-70B" and len(read) == 1


def test_what_a_card_says_for_people() -> None:
    found = describe(read_card("Mixtral-8x7B"))
    assert found["layers"] == 32 and found["hidden_size"] == 4096
    assert found["matrices"] == 32 * (4 + 24) and found["expert_matrices"] == 32 * 24
    assert found["kinds"] == ["w1", "w2", "w3", "k_proj", "o_proj", "q_proj", "v_proj"]
    assert found["digest"] == from_card("Mixtral-8x7B").digest and found["names"][0] == "mistralai/Mixtral-8x7B-v0.1"
    assert (
        describe(read_card("GPT-2"))["hidden_size"] == 768 and describe(read_card("Gemma-3-4b"))["hidden_size"] == 2560
    )


def test_models_lists_every_card() -> None:
    result = CliRunner().invoke(app, ["models"])
    heading, *rows = result.stdout.splitlines()
    assert result.exit_code == 0 and heading.split()[:4] == ["card", "type", "layers", "hidden"]
    assert tuple(row.split()[0] for row in rows) == card_names()
    (row,) = [row for row in rows if row.startswith("Mixtral-8x7B ")]
    assert row.split()[1:7] == ["mixtral", "32", "4096", "46.70", "B", "896"]
    assert " ".join(row.split()[7:]) == "w1 w2 w3 k_proj o_proj q_proj v_proj mistralai/Mixtral-8x7B-v0.1 and 1 more"
    found = json.loads(CliRunner().invoke(app, ["models", "--json"]).stdout)
    assert tuple(found) == card_names() and found["GPT-2"] == describe(read_card("GPT-2"))


def test_a_card_s_text_reads_back_and_has_one_group_a_line() -> None:
    path = models_dir() / "Gemma-3-4b.json"
    card = json.loads(path.read_text())
    assert card_text(card) == path.read_text()
    lines = [line for line in path.read_text().splitlines() if '"module"' in line]
    assert len(lines) == len(card["groups"]) == 7 and json.loads(lines[0].strip(" ,")) == card["groups"][0]


def test_groups_of_experts() -> None:
    rows = [(f"h.{i}.experts.{e}.w", 2, 3, "linear") for i in (0, 1) for e in (0, 1, 2)]
    whole = {"module": "h.{i}.experts.{e}.w", "layers": 2, "experts": 3, "out": 2, "in": 3, "orientation": "linear"}
    assert grouped(rows) == [whole]
    assert grouped(rows[1:3]) == [whole | {"layers": 1, "experts": [1, 2]}]
    assert grouped(rows[:-1]) == [
        whole | {"experts": 1},
        whole | {"experts": [1]},
        whole | {"layers": 1, "experts": [2]},
    ]
    assert grouped([("h.0.shared_experts.w", 2, 3, "linear")])[0]["module"] == "h.{i}.shared_experts.w"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"extra": 1}, "a card has the keys"),
        ({"names": "x"}, "names must be"),
        ({"model_type": 1}, "model_type must be"),
        ({"parameters": "many"}, "parameters must be"),
        ({"parameters": True}, "parameters must be"),
        ({"config": []}, "config an object"),
        ({"groups": [1]}, "groups must be"),
        ({"groups": []}, "no adaptable matrices"),
        ({"groups": [{"module": "x"}]}, "a group has the keys"),
    ],
)
def test_a_malformed_card_is_refused(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(json.loads((models_dir() / "GPT-2.json").read_text()) | change))
    with pytest.raises(GeometryError, match=why):
        from_card(path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"layers": "3"}, "layers must be"),
        ({"layers": [-1]}, "layers must be"),
        ({"layers": True}, "layers must be"),
        ({"layers": 0}, "needs layers"),
        ({"layers": [1, 1]}, "lists a matrix twice"),
        ({"module": "h.0.attn.x"}, "needs layers"),
        ({"experts": 2}, "needs experts"),
        ({"module": "h.{i}.experts.{e}.w"}, "needs experts"),
        ({"module": "h.{i}.experts.{e}.w", "experts": "8"}, "experts must be"),
        ({"out": 0}, "above 0"),
        ({"in": 2.0}, "above 0"),
        ({"orientation": "up"}, "orientation"),
    ],
)
def test_a_malformed_group_is_refused(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    path = tmp_path / "mine.json"
    card = json.loads((models_dir() / "GPT-2.json").read_text())
    card["groups"][0] |= change
    path.write_text(json.dumps(card))
    with pytest.raises(GeometryError, match=why) as caught:
        from_card(path)
    assert "\n" not in str(caught.value)


def test_a_card_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("{")
    with pytest.raises(GeometryError, match="not readable as JSON"):
        from_card(tmp_path / "mine.json")


def test_every_card_holds_the_facts_it_was_made_from() -> None:
    facts = make_cards().read_facts()
    assert set(facts) == set(card_names())
    for name, fact in facts.items():
        card = read_card(name)
        assert (list(card.names), card.model_type, card.parameters) == (fact.names, fact.model_type, fact.parameters)
        assert card.config == fact.config


@pytest.mark.parametrize("name", ["GPT-2", "Mixtral-8x7B", "Gemma-3-4b", "SmolLM2-135M"])
def test_the_script_writes_the_cards_that_are_there(name: str) -> None:
    script = make_cards()
    assert script.card(name, script.read_facts()[name]) == (models_dir() / f"{name}.json").read_text()


def test_a_wrong_config_value_is_noticed() -> None:
    script = make_cards()
    facts = script.read_facts()["GPT-2"]
    wrong = facts.model_copy(update={"config": facts.config | {"n_layer": 11}})
    with pytest.raises(
        GeometryError, match=r"GPT-2: its config gives 117,351,936 parameters, published are 124,439,808"
    ):
        script.card("GPT-2", wrong)


def test_the_script_s_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = make_cards()

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["make_cards.py", *arguments])
        return script.main(), capsys.readouterr().out

    monkeypatch.setattr(script, "models_dir", lambda: tmp_path)
    path = tmp_path / "GPT-2.json"
    assert run("--check", "GPT-2") == (1, "GPT-2: differs\n") and not path.exists()
    assert run("GPT-2") == (0, "GPT-2: written\n") and path.read_text() == (models_dir() / path.name).read_text()
    assert run("--check", "GPT-2") == (0, "") == run("GPT-2")
    path.write_text(path.read_text().replace("768", "769", 1))
    assert run("--check", "GPT-2") == (1, "GPT-2: differs\n")
    facts = {"GPT-2": script.read_facts()["GPT-2"]}
    monkeypatch.setattr(script, "read_facts", lambda: facts)
    (tmp_path / "Stray.json").write_text("{}")
    assert run("--check") == (1, "GPT-2: differs\nStray: cards.yaml has no such card\n")
    with pytest.raises(SystemExit) as caught:
        run("GPT2")
    assert caught.value.code == 2 and "did you mean GPT-2" in capsys.readouterr().err


def test_a_geometry_and_its_card() -> None:
    for name in ("Mixtral-8x7B", "GPT-2", "Gemma-3-4b"):
        geometry = from_card(name)
        assert isinstance(geometry, Geometry) and geometry.to_card()["groups"] == list(read_card(name).groups)
