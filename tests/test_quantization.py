"""Quantised bases: weights are derived from files bit for bit, gradients are right, and nothing repacks a weight."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import peft
import pytest
import torch
from bitsandbytes import functional
from builders import draw_regions, tiny_gpt2, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import one_hot
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from multisbora.checkpoint import Checkpoint
from multisbora.errors import CheckpointError, UsageError
from multisbora.geometry import from_checkpoint
from multisbora.loading import load_base
from multisbora.quantization import (
    dequantize,
    dequantize_stored,
    describe,
    digest,
    keep_exact,
    loading_options,
    one_thread,
    quantized_layers,
    record,
    round_trip,
    widen,
)
from multisbora.tuner import SboraConfig, SboraLayer
from multisbora.view import Quantization

KINDS = ("nf4", "int8")
DTYPES = ("bfloat16", "float16", "float32")
# Widths of whole 4-bit blocks, and 16 rows of keys: bitsandbytes repacks by 32.
LLAMA: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 1}
GPT2: dict[str, Any] = {"n_embd": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# Largest error of a gradient against the dense oracle's, as a share of its largest entry: a few roundings a dtype.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def llama(folder: Path, **config: Any) -> Path:
    return tiny_llama(folder, **(LLAMA | config))


def gpt2(folder: Path, **config: Any) -> Path:
    return tiny_gpt2(folder, **(GPT2 | config))


def scheme(kind: str, dtype: str = "float32", block_size: int = 64, double: bool = True) -> Quantization:
    blockwise = kind != "int8"
    return Quantization(kind, dtype, block_size if blockwise else None, double and blockwise, ("m",), "")


def quantized_linear(kind: str, weight: Tensor, bias: Tensor | None = None) -> Any:
    """bitsandbytes' own layer of a plain weight (out, in), computing in the weight's dtype; left as it comes."""
    out_features, in_features = weight.shape
    if kind == "nf4":
        layer: Any = bitsandbytes.nn.Linear4bit(
            in_features, out_features, bias=bias is not None, compute_dtype=weight.dtype, quant_type="nf4"
        )
        layer.weight = bitsandbytes.nn.Params4bit(
            weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
        )
    else:
        layer = bitsandbytes.nn.Linear8bitLt(
            in_features, out_features, bias=bias is not None, has_fp16_weights=False, threshold=6.0
        )
        layer.weight = bitsandbytes.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer.to("cpu")


# ------------------------------------------------------------------------------------- what the stored weights become


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_loading_gives_the_weights_that_the_stored_tensors_give(
    build: Any, dtype: str, kind: Any, tmp_path: Path
) -> None:
    base = build(tmp_path / "base", dtype=dtype, shards=2)
    model = load_base(base, kind)
    found = describe(model)
    assert found is not None
    assert (found.kind, found.dtype, found.double) == (kind, dtype, kind == "nf4")
    assert found.block_size == (64 if kind == "nf4" else None)
    geometry, checkpoint = from_checkpoint(base), Checkpoint.open(base)
    assert {geometry.find(name).tensor for name in found.modules} == {m.tensor for m in geometry.matrices}
    digests = {}
    for name, layer in quantized_layers(model):
        matrix = geometry.find(name)
        stored = checkpoint.tensor(matrix.tensor)
        digests[name] = dequantize_stored(stored.T if matrix.orientation == "conv1d" else stored, found, name)
        live = dequantize(layer, model.dtype)
        live = (live.T if matrix.orientation == "conv1d" else live).contiguous().view(torch.uint8).numpy()
        assert live.tobytes() == stored.tobytes(), name
        assert stored.tobytes() != checkpoint.tensor(matrix.tensor).tobytes()
    assert digest(digests.items()) == found.digest
    assert record(model) == found.to_json()
    assert describe(load_base(base)) is None
    assert record(load_base(base)) is None


def test_the_number_of_threads_does_not_matter() -> None:
    """It does to the mean of the scales, unless one thread takes it: this fails without `one_thread`."""
    before = torch.get_num_threads()
    try:
        for seed in range(30):
            weight = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(seed)) * 0.02
            scales = weight.view(-1, 64).abs().amax(1)
            means = []
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                means.append(scales.mean().item())
            if len(set(means)) > 1:
                break
        found = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(round_trip(weight, scheme("nf4")))
            assert torch.get_num_threads() == threads
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(before)


def test_loading_quantises_on_one_thread_and_gives_the_others_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = llama(tmp_path / "base")
    seen, quantize, before = set(), functional.quantize_4bit, torch.get_num_threads()

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.add((torch.get_num_threads(), args[0].device.type))
        return quantize(*args, **kwargs)

    monkeypatch.setattr(functional, "quantize_4bit", spy)
    torch.set_num_threads(3)
    try:
        load_base(base, "nf4")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == {(1, "cpu")}


def test_threads_come_back_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), one_thread():
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


@settings(deadline=None, max_examples=40)
@given(
    out_features=st.integers(1, 40),
    blocks=st.integers(1, 3),
    kind=st.sampled_from(["nf4", "fp4", "int8"]),
    dtype=st.sampled_from(DTYPES),
    double=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_round_trip_keeps_shape_dtype_and_the_largest_of_a_block(
    out_features: int, blocks: int, kind: str, dtype: str, double: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, 64 * blocks, generator=generator).to(getattr(torch, dtype))
    kept = weight.clone()
    there = round_trip(weight, scheme(kind, dtype, double=double))
    assert torch.equal(weight, kept)
    assert there.shape == weight.shape
    assert there.dtype == weight.dtype
    assert torch.equal(there, round_trip(weight, scheme(kind, dtype, double=double)))
    # An 8-bit row is off by half a step; a 4-bit block by half of its widest gap (fp4's is 1/3 of the scale).
    scale = weight.abs().max().float()
    bound = {"int8": 1 / 127, "nf4": 0.2, "fp4": 0.25}[kind] * scale * (1.1 if double else 1.01)
    assert (there.float() - weight.float()).abs().max() <= bound


@pytest.mark.parametrize("width", [32, 65, 96])
def test_a_width_that_4_bit_blocks_do_not_fill_is_refused(width: int, tmp_path: Path) -> None:
    """bitsandbytes gives back other weights there on some CPUs, without a word."""
    weight = torch.randn(48, width, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UsageError, match=f"a matrix of {width} columns cannot be turned back from nf4: use int8"):
        round_trip(weight, scheme("nf4"))
    with pytest.raises(UsageError, match=rf"\d has {width} input channels, no multiple of the 4-bit block of 64.*int8"):
        describe(nn.Sequential(quantized_linear("nf4", weight)))
    assert (round_trip(weight, scheme("int8")) - weight).abs().max() < 0.05


def test_such_a_base_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    with pytest.raises(UsageError, match=r"model\.layers\.0\.self_attn\.q_proj has 32 input channels"):
        load_base(base, "nf4")
    assert describe(load_base(base, "int8")) is not None


def test_a_stored_array_is_rounded_to_its_own_dtype() -> None:
    generator = np.random.default_rng(0)
    stored = generator.normal(size=(8, 64)).astype(np.float32)
    loaded_as = scheme("nf4", "bfloat16")  # the folder's config says bf16, this file holds fp32
    expected = round_trip(torch.from_numpy(stored.copy()).bfloat16(), loaded_as).float().numpy()
    dequantize_stored(stored, loaded_as, "m")
    assert stored.dtype == np.float32
    assert np.array_equal(stored, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_quantising_breaks_is_refused(kind: Any, tmp_path: Path) -> None:
    stored = np.full((4, 64), 1.0, np.float32)
    stored[1, 3] = np.nan if kind == "nf4" else 1e6  # int8 goes through fp16
    with pytest.raises(CheckpointError, match="q_proj is not finite once it is quantised"):
        dequantize_stored(stored, scheme(kind), "q_proj")


# ----------------------------------------------------------------------------------------------------- what it trains


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["fa", "fb"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dense_dequantised_layer(
    kind: str, variant: Any, dtype: torch.dtype, bias: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(48, 128, generator=generator) * 0.1).to(dtype)
    offset = torch.randn(48, generator=generator).to(dtype) if bias else None
    base = quantized_linear(kind, weight, offset)
    keep_exact(base)
    dense = dequantize(base, dtype).double()
    layer = SboraLayer(base)
    indices = [1, 5, 17, 40]
    layer.update_layer("t", SboraConfig(variant=variant, r=4, alpha=8, indices={"lin": indices}), "lin")
    layer.set_adapter(["t"])
    values = torch.randn(layer.sbora_values["t"].shape, generator=generator) * 0.1
    with torch.no_grad():
        layer.sbora_values["t"].copy_(values)
    x = torch.randn(3, 7, 128, generator=generator).to(dtype).requires_grad_()
    wanted = torch.randn(3, 7, 48, generator=generator).to(dtype)
    layer.train()
    out = layer(x)
    out.backward(wanted)

    x_oracle, v_oracle = x.detach().double().requires_grad_(), values.double().requires_grad_()
    whole = dense + 2.0 * one_hot_of(variant, indices, v_oracle, (48, 128))
    expected = F.linear(x_oracle, whole, None if offset is None else offset.double())
    expected.backward(wanted.double())
    assert x.grad is not None and x_oracle.grad is not None and v_oracle.grad is not None
    found_values = layer.sbora_values["t"].grad
    for found, oracle in ((out, expected), (x.grad, x_oracle.grad), (found_values, v_oracle.grad)):
        error = (found.double() - oracle).abs().max() / oracle.abs().max()
        assert error <= TOLERANCE[dtype], error
    assert all(not p.requires_grad for p in base.parameters())


def one_hot_of(variant: str, indices: list[int], values: Tensor, shape: tuple[int, int]) -> Tensor:
    basis = one_hot(variant, indices, torch.eye(len(indices)), shape)  # (r, in) for fa, (out, r) for fb
    return values @ basis if variant == "fa" else basis @ values


def adapted(model: Any, base: Path, variant: str) -> Any:
    regions = draw_regions(from_checkpoint(base), {"t": variant})["t"]
    model = peft.get_peft_model(model, SboraConfig(variant=variant, r=4, alpha=8, indices=regions))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if ".sbora_values." in name:
                values.copy_(torch.randn(values.shape, generator=generator) * 0.05)
    return model


def gradients(model: Any) -> dict[str, Tensor]:
    ids = torch.arange(3, 60).reshape(3, 19)
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def dequantized_twin(base: Path, quantized: Any) -> Any:
    """The same base as plain layers that hold the dequantised weights."""
    plain = load_base(base)
    for name, layer in quantized_layers(quantized):
        target = plain.get_submodule(name)
        values = dequantize(layer, plain.dtype)
        target.weight.data = values if isinstance(target, nn.Linear) else values.T.contiguous()
    return plain


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("variant", ["fa", "fb"])
@pytest.mark.parametrize(("kind", "build"), [("nf4", llama), ("int8", llama), ("nf4", gpt2)])
def test_train_eval_train(kind: Any, build: Any, variant: str, checkpointing: bool, tmp_path: Path) -> None:
    """The trap of a 4-bit weight that is repacked in eval mode: gradients and weights are the same after it."""
    base = build(tmp_path / "base", dtype="float32")
    quantized = load_base(base, kind)
    assert quantized.config.get_text_config().tie_word_embeddings
    before = {name: dequantize(layer, torch.float32) for name, layer in quantized_layers(quantized)}
    twin = adapted(dequantized_twin(base, quantized), base, variant)
    if checkpointing:
        # Called gradient_checkpointing_enable before transformers 5.23, which warns of that name.
        enable = getattr(quantized, "activation_checkpointing_enable", None) or quantized.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    model = adapted(quantized, base, variant)

    model.train()
    first = gradients(model)
    expected = gradients(twin.train())
    assert first.keys() == {name.replace(".base_layer", "") for name in expected}
    for name, gradient in expected.items():
        error = (first[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-12)
        assert error <= 1e-4, (name, error)

    model.eval()
    with torch.no_grad():
        for _ in range(2):
            logits = model(input_ids=torch.arange(3, 30)[None]).logits
    if kind == "nf4":
        with torch.no_grad():
            assert torch.allclose(logits, twin.eval()(input_ids=torch.arange(3, 30)[None]).logits, atol=1e-4)
    for name, layer in quantized_layers(model.get_base_model()):
        assert torch.equal(dequantize(layer, torch.float32), before[name.replace(".base_layer", "")]), name

    model.train()
    again = gradients(model)
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_shapes_that_bitsandbytes_cannot_repack_are_evaluated_all_the_same(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")  # its keys have 16 rows
    model = load_base(base, "nf4")
    twin = dequantized_twin(base, model).eval()
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.allclose(model.eval()(ids).logits, twin(ids).logits, rtol=0.05, atol=0.05)


def test_a_model_of_ones_own_is_kept_exact_too() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(quantized_linear("nf4", weight), nn.Linear(64, 64), quantized_linear("int8", weight))
    packed, bytes_before = copy.deepcopy(net), net[0].weight.data.clone()
    keep_exact(net)
    with torch.no_grad():
        net.eval()(torch.randn(2, 64))
    assert torch.equal(net[0].weight.data, bytes_before)
    packed[0].weight.quant_state.packing_format_for_cpu = True  # as an eval forward leaves it on some CPUs
    with pytest.raises(UsageError, match=r"0 was used in eval mode before.*load the model again"):
        keep_exact(packed)
    keep_exact(nn.Linear(3, 4))


def test_peft_alone_keeps_a_quantised_model_exact_and_records_it(tmp_path: Path) -> None:
    folder = llama(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(folder, **loading_options("nf4"))
    wanted = record(model)
    assert wanted is not None
    before = {name: dequantize(layer, torch.float32) for name, layer in quantized_layers(model)}
    adapted = peft.get_peft_model(model, SboraConfig(r=4, alpha=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        adapted.eval()(input_ids=torch.tensor([[5, 6, 7]]))
    after = {name: dequantize(layer, torch.float32) for name, layer in quantized_layers(model)}
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    adapted.add_adapter("second", SboraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "out")
    for saved in (tmp_path / "out", tmp_path / "out" / "second"):
        assert json.loads((saved / "adapter_config.json").read_text())["base_quantization"] == wanted
    plain = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), SboraConfig(r=4))
    assert plain.active_peft_config.base_quantization is None


@pytest.mark.skipif(not functional.has_avx512bf16(), reason="only a CPU with AVX512-BF16 repacks weights")
def test_without_it_the_weight_is_repacked() -> None:
    """If this fails, bitsandbytes has mended it, and `keep_exact` can go."""
    layer = quantized_linear("nf4", torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    before = layer.weight.data.clone()
    with torch.no_grad():
        layer.eval()(torch.randn(2, 64))
    assert not torch.equal(layer.weight.data.view(-1), before.view(-1))
    with pytest.raises(UsageError, match="was used in eval mode before"):
        keep_exact(nn.Sequential(layer))


@pytest.mark.parametrize("kind", KINDS)
def test_fp16_is_computed_in_fp32_after_widening(kind: Any, tmp_path: Path) -> None:
    base = llama(tmp_path / "base", dtype="float16")
    model = load_base(base, kind)
    found = describe(model)
    widen(model)
    assert model.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.uint8 if kind == "nf4" else torch.int8}
    model.train()
    assert model(torch.arange(3, 20)[None]).logits.dtype == torch.float32
    model = load_base(base, kind)
    assert describe(model) == found
    with torch.no_grad():
        assert model.train()(torch.arange(3, 20)[None]).logits.dtype == torch.float16


def test_widening_a_plain_model_is_its_float(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", dtype="float16")
    model, expected = load_base(base), load_base(base).float()
    widen(model)
    found = model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


# ------------------------------------------------------------------------------------------------- what is described


def test_two_ways_of_quantising_in_one_model_are_refused(tmp_path: Path) -> None:
    model = load_base(llama(tmp_path / "base"), "nf4")
    weight = load_file(tmp_path / "base" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    model.model.layers[0].mlp.up_proj = quantized_linear("int8", weight)
    with pytest.raises(UsageError, match="quantised in 2 ways"):
        describe(model)


def test_the_digest_sees_every_weight(tmp_path: Path) -> None:
    model = load_base(llama(tmp_path / "base"), "nf4")
    before = describe(model)
    assert before is not None
    model.model.layers[1].mlp.down_proj.weight.data[5] ^= 0x10
    after = describe(model)
    assert after is not None
    assert after.modules == before.modules
    assert after.digest != before.digest


def test_ways_that_cannot_be_loaded_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="quantization 'nf5' is unknown: use nf4 or int8"):
        loading_options("nf5")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="blocks of 64, not of 128"):
        loading_options(scheme("nf4", block_size=128))
    found = describe(load_base(llama(tmp_path / "base"), scheme("fp4", double=False)))
    assert found is not None
    assert (found.kind, found.double) == ("fp4", False)
