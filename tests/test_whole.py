"""Modules that tasks trained whole: refused, kept, or averaged by lambda; and never mixed up with regions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from builders import draw_regions, edit_json, tiny_llama, tree, write_adapter
from commands import Run
from peft import get_peft_model
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from transformers import AutoModelForCausalLM

from multisbora import SboraConfig, verify
from multisbora.adapter import Adapter
from multisbora.edit import add, remove, reweight
from multisbora.errors import AdapterError, MergeError, MultisboraError, UsageError
from multisbora.geometry import from_checkpoint
from multisbora.merge import merge
from multisbora.receipt import Receipt
from multisbora.stream import fingerprint

HEAD, NORM = "lm_head.weight", "model.norm.weight"
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "untied", tied=False)


def write(folder: Path, base: Path, task: str, number: int, **whole: np.ndarray) -> Path:
    geometry = from_checkpoint(base)
    regions = draw_regions(geometry, ["zero", "one", "two"])
    adapter = write_adapter(
        folder / task,
        geometry,
        task,
        indices=regions[("zero", "one", "two")[number]],
        seed=number,
        base_fingerprint=fingerprint(base, geometry),
        modules_to_save=sorted({name.rpartition(".")[0].rpartition(".")[2] for name in whole}),
    )
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors |= {f"base_model.model.{name}": values for name, values in whole.items()}
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    return adapter


def stored(folder: Path, name: str) -> torch.Tensor:
    return load_torch(folder / "model.safetensors")[name]


def trained_from(base: Path, name: str, seed: int) -> np.ndarray:
    values = stored(base, name).float().numpy()
    return values + np.random.default_rng(seed).normal(0, 0.1, values.shape).astype(np.float32)


def test_a_pattern_of_a_weight_may_name_what_was_trained_whole_alone(untied: Path, tmp_path: Path) -> None:
    task = write(tmp_path, untied, "a", 0, **{HEAD: trained_from(untied, HEAD, 1)})
    receipt = merge(untied, [task], {"a": {"lm_head": 0.5}}, output=tmp_path / "out", whole_modules="keep")
    assert receipt.whole[HEAD].weights == {"a": 0.5}
    assert {region.weight for region in receipt.tasks["a"].regions.values()} == {1.0}
    assert verify(tmp_path / "out", base=untied, adapters=[task]).ok


@pytest.mark.parametrize("weight", [1.0, 0.5, -0.25])
def test_one_that_is_kept(untied: Path, tmp_path: Path, weight: float) -> None:
    head, norm = trained_from(untied, HEAD, 1), trained_from(untied, NORM, 2)
    tasks = [write(tmp_path, untied, "a", 0, **{HEAD: head, NORM: norm}), write(tmp_path, untied, "b", 1)]
    receipt = merge(untied, tasks, {"a": weight}, output=tmp_path / "out", whole_modules="keep")
    for name, values in ((HEAD, head), (NORM, norm)):
        before = stored(untied, name).float()
        wanted = before + weight * (torch.from_numpy(values) - before) if weight != 1 else torch.from_numpy(values)
        assert torch.equal(stored(tmp_path / "out", name), wanted.to(torch.bfloat16))
    assert set(receipt.whole) == {HEAD, NORM}
    assert receipt.whole[HEAD].weights == {"a": weight}
    assert receipt.whole[NORM].cells_changed == int((stored(untied, NORM) != stored(tmp_path / "out", NORM)).sum()) > 0
    assert Receipt.read(tmp_path / "out") == receipt
    undo = load_torch(tmp_path / "out" / "multisbora_undo" / "+whole.safetensors")
    assert torch.equal(undo[HEAD], stored(untied, HEAD))
    assert torch.equal(undo[NORM].flatten(), stored(untied, NORM))


def test_an_average_by_lambda_whatever_the_order(untied: Path, tmp_path: Path) -> None:
    values = {task: trained_from(untied, HEAD, seed) for seed, task in enumerate("abc")}
    tasks = [write(tmp_path, untied, task, number, **{HEAD: values[task]}) for number, task in enumerate("abc")]
    weights = {"a": 0.5, "b": 1.5, "c": 0.0}
    for number, order in enumerate((tasks, tasks[::-1])):
        merge(untied, order, weights, output=tmp_path / f"out{number}", whole_modules="average")
    assert tree(tmp_path / "out0") == tree(tmp_path / "out1")
    wanted = (0.5 * values["a"].astype(np.float64) + 1.5 * values["b"]) / 2
    found = stored(tmp_path / "out0", HEAD)
    # Sums in fp32 before the one rounding: the same bfloat16 but where the exact value is next to the middle of two.
    assert (found == torch.from_numpy(wanted).to(torch.bfloat16)).float().mean() > 0.999
    assert Receipt.read(tmp_path / "out0").whole[HEAD].weights == {"a": 0.5, "b": 1.5}


@pytest.mark.parametrize(
    ("how", "weights", "kind", "message"),
    [
        ("refuse", {}, MergeError, "a trained lm_head.weight whole, which has no region"),
        ({"b": "average"}, {}, MergeError, "a trained lm_head.weight whole, which has no region"),
        ("keep", {}, MergeError, "a and b trained lm_head.weight whole: only one can be kept"),
        ({"a": "average", "b": "keep"}, {}, MergeError, "only one can be kept"),
        ("average", {"a": 1, "b": -1}, MergeError, "lm_head.weight is no average of lambdas a 1, b -1"),
        ("mean", {}, UsageError, "whole_modules 'mean' is unknown: use refuse, keep, average"),
    ],
)
def test_what_is_refused(
    untied: Path, tmp_path: Path, how: Any, weights: dict[str, float], kind: type[MultisboraError], message: str
) -> None:
    head = trained_from(untied, HEAD, 0)
    tasks = [write(tmp_path, untied, task, number, **{HEAD: head}) for number, task in enumerate("ab")]
    with pytest.raises(kind, match=message) as caught:
        merge(untied, tasks, weights, output=tmp_path / "out", whole_modules=how)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_rest_that_cannot_be_merged(untied: Path, tmp_path: Path) -> None:
    head = trained_from(untied, HEAD, 0)
    tied = tiny_llama(tmp_path / "tied")
    with pytest.raises(AdapterError, match=r"whole, which .*tied does not store"):
        merge(tied, [write(tmp_path, tied, "a", 0, **{HEAD: head})], output=tmp_path / "out", whole_modules="keep")
    cut = write(tmp_path, untied, "b", 0, **{HEAD: head[:-1]})
    with pytest.raises(AdapterError, match=r"trained lm_head.weight as \[258, 32\], .* has BF16 \[259, 32\]"):
        merge(untied, [cut], output=tmp_path / "out", whole_modules="keep")
    both = write(tmp_path, untied, "c", 0, **{f"{Q}.weight": trained_from(untied, f"{Q}.weight", 0)})
    with pytest.raises(MergeError, match=f"c trained {Q}.weight whole, in which another task has a region"):
        merge(untied, [both], output=tmp_path / "out", whole_modules="keep")
    nan = write(tmp_path, untied, "d", 0, **{HEAD: np.full_like(head, np.nan)})
    with pytest.raises(AdapterError, match=r"lm_head.weight holds NaN or infinity"):
        Adapter.read(nan)


def test_at_weight_0_nothing_is_merged_and_nothing_refused(untied: Path, tmp_path: Path) -> None:
    tasks = [write(tmp_path, untied, "a", 0, **{HEAD: trained_from(untied, HEAD, 0)}), write(tmp_path, untied, "b", 1)]
    receipt = merge(untied, tasks, {"a": 0}, output=tmp_path / "out")
    assert receipt.whole == {}
    assert torch.equal(stored(tmp_path / "out", HEAD), stored(untied, HEAD))


def test_what_peft_saves_is_what_is_merged(untied: Path, tmp_path: Path) -> None:
    """An adapter of PEFT's own making: the merged head is that of the live model, in the checkpoint's dtype."""
    model = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32)
    config = SboraConfig(variant="fa", r=2, alpha=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    live = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) / 10)
    live.save_pretrained(tmp_path / "adapter")
    merge(untied, [tmp_path / "adapter"], output=tmp_path / "out", allow_base_mismatch=True, whole_modules="keep")
    head = live.base_model.model.lm_head.modules_to_save["default"].weight
    assert torch.equal(stored(tmp_path / "out", HEAD), head.detach().to(torch.bfloat16))


@pytest.fixture
def with_head(trained: Path, tmp_path: Path) -> Path:
    """A project whose task `adding` also trained the head, which its base stores apart."""
    settings = yaml.safe_load(Path("multisbora.yaml").read_text())
    copy = tmp_path / "untied" / Path(settings["model"]).name  # by which the registry knows it
    copy.mkdir(parents=True)
    for path in Path(settings["model"]).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    weights = load_file(copy / "model.safetensors")
    head = weights["model.embed_tokens.weight"]
    save_file(weights | {HEAD: head}, copy / "model.safetensors", {"format": "pt"})
    Path("multisbora.yaml").write_text(yaml.safe_dump(settings | {"model": str(copy)}))
    adapter = Path("adapters/adding")
    tensors = load_file(adapter / "adapter_model.safetensors") | {f"base_model.model.{HEAD}": head + 1}
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    edit_json(adapter / "adapter_config.json", modules_to_save=["lm_head"])
    return trained


def test_the_command_does_what_the_recipe_says(with_head: Path, run: Run) -> None:
    model = yaml.safe_load(Path("multisbora.yaml").read_text())["model"]
    refused = run("merge", "--output", "out")
    assert refused.code == 1, refused.err
    assert "adding trained lm_head.weight whole" in refused.err
    assert run("merge", "--output", "kept", "--whole-modules", "keep").code == 0
    recipe = Path("tasks/adding.yaml")
    recipe.write_text(recipe.read_text() + "whole_modules: keep\n")
    assert run("merge", "--output", "said").code == 0
    assert tree("kept") == tree("said")
    wanted = load_file(Path(model) / "model.safetensors")[HEAD] + 1
    assert np.array_equal(load_file(Path("kept/model.safetensors"))[HEAD], wanted)


def test_an_edit_leaves_whole_tensors_alone_and_refuses_their_tasks(untied: Path, tmp_path: Path) -> None:
    """What nobody can take out of an average bit by bit is not edited; all else is, as if merged anew."""
    head = trained_from(untied, HEAD, 0)
    a, b = write(tmp_path, untied, "a", 0, **{HEAD: head}), write(tmp_path, untied, "b", 1)
    merge(untied, [a], output=tmp_path / "one", whole_modules="keep")
    merge(untied, [a, b], output=tmp_path / "both", whole_modules="keep")
    before, both = tree(tmp_path / "one"), tree(tmp_path / "both")
    for edit in (lambda: remove(tmp_path / "both", "a"), lambda: reweight(tmp_path / "both", a, 0.5)):
        with pytest.raises(MergeError, match=r"a trained lm_head.weight whole, which is not changed in place"):
            edit()
    assert tree(tmp_path / "both") == both
    remove(tmp_path / "both", "b")
    assert tree(tmp_path / "both") == before
    add(tmp_path / "both", b)
    assert tree(tmp_path / "both") == both
    assert verify(tmp_path / "both", untied, [a, b]).ok
    assert verify(tmp_path / "both", quick=True).ok
    c = write(tmp_path, untied, "c", 2, **{NORM: trained_from(untied, NORM, 0)})
    with pytest.raises(MergeError, match=r"c trained model.norm.weight whole"):
        add(tmp_path / "both", c)
    assert tree(tmp_path / "both") == both
