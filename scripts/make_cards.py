"""Write the geometry cards in registry/models/ from the published config values in scripts/cards.yaml.

Run it with the environment's Python: `.venv/bin/python scripts/make_cards.py`. `--check` writes nothing, names every
card that is not what would be written, and then exits with 1. Each model is built by transformers on torch's meta
device, so no weights are made or fetched. A card has the names of the published checkpoint, which differ from those of
the live model for some architectures: `stored_names` and `expert_matrices` say how.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from multisbora.cards import card_text
from multisbora.errors import GeometryError, MultisboraError
from multisbora.geometry import Geometry, Matrix
from multisbora.resources import models_dir
from multisbora.settings import Strict, UniqueKeys, check
from multisbora.skeleton import from_model

FACTS = Path(__file__).with_name("cards.yaml")

# model_type -> leading parts of the live model, and those of the published checkpoints.
PREFIXES = {"gpt2": ("transformer.", ""), "gemma3": ("model.language_model.", "language_model.model.")}

# model_type -> what the checkpoints call a live "mlp.experts", and an expert's gate, up and down matrix.
EXPERTS = {
    "mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
}


class Facts(Strict):
    """One entry of cards.yaml: other names of the model, its architecture, published count and config values."""

    names: list[str]
    model_type: str
    parameters: int
    config: dict[str, Any]


def read_facts(path: Path = FACTS) -> dict[str, Facts]:
    """Card name -> facts. Raises UsageError where an entry has a wrong or a missing key."""
    content = yaml.load(path.read_text(encoding="utf-8"), UniqueKeys)
    return {name: check(entry, Facts, f"{path}: {name}") for name, entry in content.items()}


def build(facts: Facts, **sizes: Any) -> PreTrainedModel:
    """The model on the meta device. `sizes` override entries of its config."""
    config = AutoConfig.for_model(facts.model_type, **(facts.config | sizes))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def stored_names(name: str, facts: Facts, model: PreTrainedModel) -> Geometry:
    """The geometry of a live model, with the names and the matrices of its published checkpoint."""
    live, stored = PREFIXES.get(facts.model_type, ("", ""))
    matrices = []
    for matrix in from_model(model).matrices:
        if not matrix.module.startswith(live):
            raise GeometryError(f"{name}: {matrix.module} does not start with {live!r}: correct PREFIXES")
        module = stored + matrix.module.removeprefix(live)
        matrices.append(Matrix(module, f"{module}.weight", *matrix.shape, matrix.orientation))
    matrices += expert_matrices(facts.model_type, model)
    return Geometry(name, facts.model_type, tuple(matrices))


def expert_matrices(model_type: str, model: PreTrainedModel) -> list[Matrix]:
    """The experts one by one, from their fused tensors.

    Live, `gate_up_proj` is (experts, gate and up rows, in) and `down_proj` (experts, out, in).
    """
    if model_type not in EXPERTS:
        return []
    parent, gate, up, down = EXPERTS[model_type]
    matrices = []
    for name, fused in model.named_parameters():
        block, found, kind = name.partition(".mlp.experts.")
        if not found:
            continue
        experts, rows, columns = fused.shape
        for expert in range(experts):
            for own in (gate, up) if kind == "gate_up_proj" else (down,):
                module = f"{block}.{parent}.{expert}.{own}"
                out_features = rows // 2 if kind == "gate_up_proj" else rows
                matrices.append(Matrix(module, f"{module}.weight", out_features, columns))
    return matrices


def card(name: str, facts: Facts) -> str:
    """The text of a card.

    Raises:
        GeometryError: the config gives another number of parameters than was published, so one of its values is wrong.
    """
    model = build(facts)
    counted = sum(weight.numel() for weight in model.parameters())  # a tied tensor comes once
    if counted != facts.parameters:
        raise GeometryError(
            f"{name}: its config gives {counted:,} parameters, published are {facts.parameters:,}: correct {FACTS.name}"
        )
    grouped = stored_names(name, facts, model).to_card()
    return card_text(
        {
            "names": facts.names,
            "model_type": facts.model_type,
            "parameters": facts.parameters,
            "config": facts.config,
            "groups": grouped["groups"],
        }
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 where a card differs")
    parser.add_argument("cards", nargs="*", metavar="CARD", help="these cards alone (default: all)")
    given = parser.parse_args()
    facts = read_facts()
    for name in given.cards:
        if name not in facts:
            near = difflib.get_close_matches(name, facts, n=1)
            parser.error(f"{FACTS.name} has no {name}" + (f": did you mean {near[0]}?" if near else ""))
    folder = models_dir()
    wrong = []
    for name in given.cards or facts:
        path = folder / f"{name}.json"
        text = card(name, facts[name])
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        wrong.append(name)
        if not given.check:
            path.write_text(text, encoding="utf-8")
        print(f"{name}: {'differs' if given.check else 'written'}")
    for stray in sorted(set() if given.cards else {path.stem for path in folder.glob("*.json")} - set(facts)):
        print(f"{stray}: {FACTS.name} has no such card")
        wrong.append(stray)
    return int(bool(given.check and wrong))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MultisboraError as error:
        sys.exit(f"make_cards.py: {error}")
