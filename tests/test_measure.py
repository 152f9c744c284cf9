"""Measuring against autograd by hand, one example at a time, and what cannot be measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from builders import tiny_gpt2, tiny_llama
from commands import refused
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from multisbora import probe
from multisbora.dataset import Example
from multisbora.errors import DataError, GeometryError
from multisbora.geometry import Geometry, from_checkpoint
from multisbora.loading import load_base, load_tokenizer
from multisbora.measure import CHUNK, drawn_answers, find_layers, measure, open_base, text_examples
from multisbora.moments import Moments, harm

CHANNELS = (0, 3, 5, 17)


def examples(count: int = 7, seed: int = 0) -> list[Example]:
    generator = np.random.default_rng(seed)
    lengths = [9, 4, 30, 2, 17, 12, 25][:count]
    return [Example(generator.integers(3, 250, n).tolist(), max(1, n // 2), row) for row, n in enumerate(lengths, 1)]


def seen(model: Any, found: Sequence[Example], module: str, *, opening: bool = True) -> tuple[Tensor, Tensor]:
    """What one linear layer gets, (tokens, in), and the loss's gradient at what it puts out, (tokens, out), in fp64.

    Args:
        opening: whether the p-th token of an answer counts 1 / p.
    """
    layer = model.get_submodule(module)
    inputs, gradients = [], []
    for example in found:
        kept: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Tensor], output: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.extend((args[0], output.detach().requires_grad_(True)))
            return kept[1]

        hook = layer.register_forward_hook(keep)
        ids = torch.tensor([example.input_ids])
        scores = torch.log_softmax(model(input_ids=ids).logits[0], dim=-1)
        hook.remove()
        answers = ids[0, example.answer_start :]
        nats = -scores[example.answer_start - 1 : -1].gather(1, answers[:, None])[:, 0]
        loss = (nats / torch.arange(1, len(nats) + 1)).sum() if opening else nats.sum()
        (gradient,) = torch.autograd.grad(loss, kept[1])
        inputs.append(kept[0][0].detach())
        gradients.append(gradient[0])
    return torch.cat(inputs), torch.cat(gradients)


def close(found: np.ndarray, wanted: Tensor) -> bool:
    expected = wanted.numpy()
    return found.shape == expected.shape and bool(np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max())


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make = tiny_llama if request.param == "llama" else tiny_gpt2
    return make(tmp_path_factory.mktemp("measured") / request.param, dtype="float32", seed=1)


def look(folder: Path, found: Sequence[Example], **options: Any) -> tuple[Any, Geometry, Moments]:
    model, geometry = open_base(folder, None, pytest.fail), from_checkpoint(folder)
    channels = {matrix.module: CHANNELS for matrix in geometry.matrices}
    told = measure(model, found, "math", geometry=geometry, base_fingerprint="x", channels=channels, **options)
    return model, geometry, told


@pytest.mark.parametrize("source", ["task", "text"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("tokens", [40, 2048])
def test_moments_are_those_of_autograd(
    folder: Path, packed: bool, tokens: int, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a text all tokens count alike."""
    rows = examples()
    if not packed:
        monkeypatch.setattr(probe, "packs", lambda model: False)
    _, geometry, told = look(folder, rows, tokens=tokens, source=source)
    plain = load_base(folder).double()
    assert (told.rows, told.tokens, told.geometry_digest) == (7, 99, geometry.digest)
    assert set(told.sites) == {matrix.module for matrix in geometry.matrices}
    for module, site in told.sites.items():
        x, g = seen(plain, rows, module, opening=source == "task")
        weight = g.square().sum(1, keepdim=True)
        part = x[:, list(CHANNELS)] * weight.sqrt()
        count = len(rows) if source == "task" else len(x)
        assert close(site.energy, (weight * x.square()).sum(0) / count)
        assert close(site.response, g.square().sum(0) / count)
        assert site.channels.tolist() == list(CHANNELS)
        assert close(site.block, part.T @ part / count) and np.array_equal(site.block, site.block.T)
        assert np.allclose(np.diagonal(site.block), site.energy[list(CHANNELS)], rtol=1e-4)


def test_answers_through_an_adapter_are_drawn_from_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the true answers are, and in whatever batch they stand."""
    rows = examples()
    short = [replace(row, input_ids=[*row.input_ids[:-1], 3]) for row in rows]  # the last token predicts nothing
    _, _, told = look(folder, rows, adapter="x")
    assert look(folder, rows, adapter="x")[2].to_bytes() == told.to_bytes()
    _, _, true = look(folder, rows)
    told_again = [look(folder, rows, adapter="x", tokens=40)[2], look(folder, short, adapter="x")[2]]
    monkeypatch.setattr(probe, "packs", lambda model: False)
    told_again.append(look(folder, rows, adapter="x")[2])
    assert (told.source, told.adapter) == ("adapter", "x")
    for module, site in told.sites.items():
        for again in told_again:
            np.testing.assert_allclose(site.block, again.sites[module].block, rtol=1e-3, atol=1e-4 * site.block.max())
        assert not np.allclose(site.block, true.sites[module].block, rtol=0.05)


def test_drawn_answers_have_the_chances_of_the_model() -> None:
    """Over many draws the mean squared gradient of a token is p (1 - p) at each logit, the Fisher information."""
    count, chances = 20_000, torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    logits = chances.log().expand(1, count, -1)
    places = torch.arange(count)[None] % 3  # two of three are of answers
    batch = probe.Batch({}, torch.where(places > 0, 1, -100), places)
    drawn = drawn_answers(SimpleNamespace(logits=logits), batch, np.random.default_rng(0))
    assert torch.equal(drawn.places, places) and (drawn.labels[places == 0] == -100).all()
    shares = torch.bincount(drawn.labels[places > 0], minlength=5) / int((places > 0).sum())
    assert shares[1] == 0 and torch.allclose(shares, chances, atol=0.015)


def test_harm_is_that_of_an_update_on_these_rows(folder: Path) -> None:
    rows = examples()
    _, geometry, told = look(folder, rows)
    module = geometry.matrices[0].module
    out_features, in_features = geometry.find(module).shape
    update = torch.zeros(out_features, in_features, dtype=torch.float64)
    values = torch.randn(out_features, len(CHANNELS), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    update[:, list(CHANNELS)] = values
    x, g = seen(load_base(folder).double(), rows, module)
    wanted = float((g.square().sum(1) * (x @ update.T).square().sum(1)).sum()) / len(rows) / out_features
    assert harm(values.numpy(), told.block(module, CHANNELS)) == pytest.approx(wanted, rel=1e-4)


def test_the_model_stays_as_it_was(folder: Path) -> None:
    model, geometry = open_base(folder, None, pytest.fail).train(), from_checkpoint(folder)
    first = next(model.parameters()).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one = measure(model, examples(), "math", geometry=geometry, base_fingerprint="x")
    again = measure(model, examples(), "math", geometry=geometry, base_fingerprint="x")
    assert one.to_bytes() == again.to_bytes()
    assert model.training and not first.requires_grad and sum(p.requires_grad for p in model.parameters()) > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert not any(getattr(hook, "__module__", "").startswith("multisbora") for hook in hooks)


def test_moments_of_a_bf16_base_are_nearly_those_of_its_fp32_copy(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "half", dtype="bfloat16")
    _, _, half = look(folder, examples())
    geometry = from_checkpoint(folder)
    wide = measure(load_base(folder).float(), examples(), "math", geometry=geometry, base_fingerprint="x")
    for module, site in half.sites.items():
        assert site.energy.dtype == np.float32
        assert np.allclose(site.energy, wide.sites[module].energy, rtol=0.3, atol=0.05 * site.energy.max())


def test_a_base_in_fp16_is_measured_in_fp32(tmp_path: Path) -> None:
    said: list[str] = []
    model = open_base(tiny_llama(tmp_path / "half", dtype="float16"), None, said.append)
    assert model.dtype == torch.float32 and len(said) == 1 and "fp16" in said[0]


def test_a_quantised_base(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "base", dtype="bfloat16", hidden_size=64, intermediate_size=128)
    geometry = from_checkpoint(folder)
    half, plain = (
        measure(open_base(folder, kind, pytest.fail), examples(), "math", geometry=geometry, base_fingerprint="x")
        for kind in ("nf4", None)
    )
    assert half.sites.keys() == plain.sites.keys()
    for module, site in half.sites.items():
        wanted = plain.sites[module].energy
        assert float(site.energy @ wanted / np.linalg.norm(site.energy) / np.linalg.norm(wanted)) > 0.7


def test_the_modules_that_were_asked_for(folder: Path) -> None:
    model, geometry = open_base(folder, None, pytest.fail), from_checkpoint(folder)
    module = geometry.matrices[-1].module
    told = measure(model, examples(), "math", geometry=geometry, base_fingerprint="x", modules=[module])
    assert list(told.sites) == [module] and told.sites[module].block.shape == (0, 0)
    assert isinstance(find_layers(model, geometry, [module])[module], nn.Linear | Conv1D)


def test_modules_that_are_not_there(folder: Path) -> None:
    model, geometry = open_base(folder, None, pytest.fail), from_checkpoint(folder)
    module = geometry.matrices[0].module
    name, _, last = module.rpartition(".")
    setattr(model.get_submodule(name), last, nn.Identity())
    refused(lambda: find_layers(model, geometry, [module]), GeometryError, module, "no linear layer")
    assert module not in find_layers(model, geometry)
    refused(lambda: find_layers(nn.Identity(), geometry), GeometryError, "nothing to measure")


# What cannot be measured.


def test_no_rows(folder: Path) -> None:
    refused(lambda: look(folder, []), DataError, "task math has no rows", "--text")


def test_one_row_of_two_tokens(folder: Path) -> None:
    _, _, told = look(folder, [Example([7, 9], 1)])
    assert (told.rows, told.tokens) == (1, 2) and all(site.energy.max() > 0 for site in told.sites.values())


def test_a_base_with_nan(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "broken", dtype="float32")
    model, geometry = open_base(folder, None, pytest.fail), from_checkpoint(folder)
    model.get_submodule("model.layers.1.mlp.down_proj").weight.data[0, 0] = float("nan")
    found = refused(
        lambda: measure(model, examples(), "math", geometry=geometry, base_fingerprint="x"), DataError, "loss", "nan"
    )
    assert "task math" in found


def test_activations_beyond_fp32(tmp_path: Path) -> None:
    """The loss is finite, since nothing reads the channel; its energy is not."""
    folder = tiny_llama(tmp_path / "loud", dtype="float32")
    model, geometry = open_base(folder, None, pytest.fail), from_checkpoint(folder)
    block = model.get_submodule("model.layers.1.mlp")
    block.up_proj.weight.data[3] *= 1e30
    block.down_proj.weight.data[:, 3] = 0
    refused(
        lambda: measure(model, examples(), "math", geometry=geometry, base_fingerprint="x"),
        DataError,
        "model.layers.1.mlp.",
        "not finite",
    )
    assert all(parameter.requires_grad for parameter in model.parameters())


# Text in place of rows.


def test_chunks_of_a_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama(tmp_path / "llama"))
    path = tmp_path / "text.txt"
    path.write_text("abc " * 200, encoding="utf-8")
    found = text_examples(path, tokenizer, 8, 10_000)
    assert [len(example.input_ids) for example in found] == [CHUNK] * 3 + [800 - 3 * CHUNK]
    assert all(example.answer_start == 1 for example in found)
    assert tokenizer.decode([i for example in found for i in example.input_ids]) == "abc " * 200
    assert text_examples(path, tokenizer, 2, 10_000) == found[:2]
    assert {len(example.input_ids) for example in text_examples(path, tokenizer, 3, 50)} == {50}


def test_a_text_that_is_cut_inside_a_character(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama(tmp_path / "llama"))
    path = tmp_path / "text.txt"
    path.write_text("x" + "é" * 30_000, encoding="utf-8")
    assert len(text_examples(path, tokenizer, 1, 10_000)) == 1
    path.write_bytes(b"x\xff" * 30_000)  # it is longer than what is read, and no text all the same
    refused(lambda: text_examples(path, tokenizer, 1, 10_000), DataError, "text.txt", "not UTF-8")


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "does not exist"), (b"", "no text"), (b"a", "no text"), (b"\xff\xfe\x00", "not UTF-8")],
)
def test_a_text_that_is_none(tmp_path: Path, content: bytes | None, words: str) -> None:
    tokenizer = load_tokenizer(tiny_llama(tmp_path / "llama"))
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    refused(lambda: text_examples(path, tokenizer, 4, 256), DataError, "text.txt", words)
    refused(lambda: text_examples(tmp_path, tokenizer, 4, 256), DataError, "cannot be read")
