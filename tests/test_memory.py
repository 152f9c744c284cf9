"""The predicted peak: its parts against sizes counted by hand and against a real model's, its order, and its errors."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from builders import tiny_gpt2, tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM, BloomConfig

from multisbora import memory
from multisbora.errors import CheckpointError, GeometryError, UsageError
from multisbora.geometry import Geometry, from_card, from_checkpoint
from multisbora.memory import Peak, find_config, predict_peak
from multisbora.plan import plan
from multisbora.skeleton import from_config


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base") / "llama")


def predicted(folder: Path, batch_size: int = 4, length: int = 16, **options: Any) -> Peak:
    chosen = {key: options.pop(key) for key in ("variant", "rank_pattern", "target_modules") if key in options}
    found = plan(from_checkpoint(folder), rank=4, **{"target_modules": "all-linear", **chosen})
    return predict_peak(folder, found, batch_size, length, **options)


@pytest.mark.parametrize("variant", ["fa", "fb"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_parts_are_those_of_the_real_model(tmp_path: Path, variant: Any, build: Any) -> None:
    folder = build(tmp_path / "base")
    planned = plan(from_checkpoint(folder), variant=variant, rank=4, target_modules="all-linear")
    found = predict_peak(folder, planned, 2, 8)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    # Tied weights are one storage; buffers such as rotary frequencies count.
    tensors = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.parameters()}
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert found.base == sum(tensors.values()) + buffers
    indices = 4 * sum(part.rank for part in planned.matrices)
    assert found.adapter == 4 * planned.trainable_parameters + indices
    assert found.gradients == 4 * planned.trainable_parameters == planned.cost(variant).gradient_bytes
    # AdamW also keeps a step counter of 4 bytes a tensor.
    assert found.optimizer == planned.cost(variant).optimizer_bytes + 4 * len(planned.matrices)
    assert found.tokens == 16


def test_the_parts_add_up(llama: Path) -> None:
    found = predicted(llama)
    assert found.peak == found.base + found.adapter + found.optimizer + found.activations + found.transient
    assert min(found.to_json().values()) > 0
    assert list(found.to_json()) == [
        "tokens",
        "base",
        "adapter",
        "gradients",
        "optimizer",
        "activations",
        "transient",
        "peak",
    ]


def test_logits_counted_by_hand() -> None:
    """A model that is nearly nothing but its vocabulary."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=20_000,
        dtype="bfloat16",
    )
    geometry = from_config(config)
    found = predict_peak(config, plan(geometry, rank=2, target_modules=["q_proj"]), 2, 33)
    logits = 2 * 32 * 20_000
    # When the logits' gradient turns from that of the log-probabilities into that of the scores, both are there in
    # fp32, and the log-probabilities themselves, which are among the activations; everything else is small.
    assert found.activations == pytest.approx(4 * logits, rel=0.02)
    assert found.transient == pytest.approx(2 * 4 * logits, rel=0.02)


def test_activations_are_what_autograd_saves(llama: Path) -> None:
    """Against the real model on real memory: bytes of the distinct storages that backward was given to keep."""
    from multisbora.attention import use_packed_attention
    from multisbora.dataset import Example, pack
    from multisbora.trainer import answer_loss
    from multisbora.tuner import SboraConfig

    for variant in ("fa", "fb"):
        base = AutoModelForCausalLM.from_pretrained(llama, dtype="auto")
        use_packed_attention(base)
        indices = {m.module: list(range(4)) for m in from_checkpoint(llama).select("all-linear")}
        model = peft.get_peft_model(base, SboraConfig(task_type="CAUSAL_LM", variant=variant, indices=indices)).train()
        saved: dict[int, torch.UntypedStorage] = {}
        own = {t.untyped_storage().data_ptr() for t in itertools.chain(model.parameters(), model.buffers())}

        def keep(tensor: torch.Tensor, saved: Any = saved, own: Any = own) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage
            return tensor

        batch = pack([Example([5] * 16, 1)] * 4)
        labels = batch.pop("labels")
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = answer_loss(model(**batch, use_cache=False), labels)
        measured = sum(storage.nbytes() for storage in saved.values())
        # Indices as int64, the batch and the loss are alive too, and a few masks are saved that Python cannot see.
        assert predicted(llama, variant=variant).activations == pytest.approx(measured, rel=0.05), variant
        del loss


def test_order_of_methods_and_what_lowers_the_peak(llama: Path) -> None:
    fa, fb, lora = (predicted(llama, method=method) for method in ("fa", "fb", "lora"))
    assert fa.activations < fb.activations < lora.activations
    assert fa.peak < fb.peak < lora.peak
    assert lora.gradients == 4 * plan(from_checkpoint(llama), rank=4, target_modules="all-linear").lora_parameters
    again = predicted(llama)
    assert again == fa
    checkpointed = predicted(llama, gradient_checkpointing=True)
    assert checkpointed.activations < fa.activations and checkpointed.base == fa.base
    assert predicted(llama, answer=1).peak < fa.peak
    assert predicted(llama, dropout=0.1).activations > fa.activations
    assert predicted(llama, dtype=torch.float32).base > 1.9 * fa.base


def test_activations_grow_with_the_tokens(llama: Path) -> None:
    small, double = predicted(llama, 4, 16), predicted(llama, 8, 16)
    # Beside them there are the indices as int64 and fp32 updates, as many for any batch.
    assert double.activations == pytest.approx(2 * small.activations, rel=0.03)
    assert (small.base, small.optimizer) == (double.base, double.optimizer)


def test_ranks_of_single_matrices_count(llama: Path) -> None:
    found = predicted(llama, rank_pattern={"q_proj": 8})
    more = 2 * 4 * 32  # two layers, four more columns of q_proj, 32 outputs
    assert found.gradients == predicted(llama).gradients + 4 * more
    assert (
        predicted(llama, method="lora", rank_pattern={"q_proj": 8}).gradients
        > predicted(llama, method="lora").gradients
    )


def test_names_that_lack_their_leading_part(tmp_path: Path) -> None:
    bare, whole = (predicted(tiny_gpt2(tmp_path / str(bare), bare=bare)) for bare in (True, False))
    assert bare == whole


def test_a_model_that_cannot_pack_is_padded(tmp_path: Path) -> None:
    config = BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=100)
    found = predict_peak(config, plan(from_config(config), rank=2, target_modules="all-linear"), 2, 8)
    assert found.peak > found.base > 0


def test_a_large_model_takes_no_memory() -> None:
    """Llama-3-70B would need 141 GB; two of its 80 layers stand for all, or this test would take a minute."""
    config = find_config("Llama-3-70B")
    assert config.num_hidden_layers == 80
    config.num_hidden_layers = 2
    geometry = from_card("Llama-3-70B")
    two = Geometry(
        "two",
        "llama",
        tuple(m for m in geometry.matrices if m.module.startswith(("model.layers.0.", "model.layers.1."))),
    )
    found = predict_peak(config, plan(two, rank=64, target_modules="all-linear"), 1, 2048)
    weights = sum(m.out_features * m.in_features for m in two.matrices)
    others = 2 * 128_256 * 8192 + 5 * 8192
    assert found.base == pytest.approx(2 * (weights + others), rel=1e-6)
    assert found.peak > 7e9


def test_configs_of_every_kind_of_model_name(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find_config(str(llama)).hidden_size == 32
    card = find_config("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert (card.model_type, card.hidden_size, card.num_key_value_heads) == ("llama", 576, 3)
    converted = tmp_path / "multisbora" / "HuggingFaceTB--SmolLM2-135M-Instruct"
    converted.mkdir(parents=True)
    (converted / "config.json").write_bytes((llama / "config.json").read_bytes())
    assert find_config("HuggingFaceTB/SmolLM2-135M-Instruct").hidden_size == 32

    def no_hub(model: str) -> Path:
        raise CheckpointError(f"config.json of {model} cannot be fetched")

    monkeypatch.setattr("multisbora.hub.find_config", no_hub)
    with pytest.raises(CheckpointError, match="some/model"):
        find_config("some/model")


def test_a_card_without_a_config_says_what_is_missing(tmp_path: Path) -> None:
    card = {
        "names": ["a/b"],
        "model_type": "llama",
        "groups": [{"module": "h.{i}.q", "layers": 1, "out": 8, "in": 8, "orientation": "linear"}],
    }
    path = tmp_path / "card.json"
    path.write_text(json.dumps(card))
    with pytest.raises(GeometryError, match=r"the card of .*card.json has no config, .* give the model's folder"):
        find_config(str(path))
    path.write_text(json.dumps(card | {"config": {"hidden_size": "wide"}}))
    with pytest.raises(GeometryError, match="has a config that cannot be used"):
        find_config(str(path))


def test_wrong_usage(llama: Path, tmp_path: Path) -> None:
    for batch_size, length in ((0, 16), (4, 1)):
        with pytest.raises(UsageError, match="at least 1 row and 2 tokens"):
            predicted(llama, batch_size, length)
    for answer in (0, 16):
        with pytest.raises(UsageError, match="answer tokens"):
            predicted(llama, answer=answer)
    other = plan(from_card("LLaMA-7B"), rank=4)
    with pytest.raises(UsageError, match=r"LLaMA-7B: .* is no linear layer of the live model"):
        predict_peak(llama, other, 4, 16)
    ours = plan(from_checkpoint(llama), rank=4)
    with pytest.raises(GeometryError, match=r"no config\.json"):
        predict_peak(tmp_path, ours, 4, 16)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(GeometryError, match="not usable"):
        predict_peak(tmp_path, ours, 4, 16)
    config = AutoConfig.from_pretrained(llama)
    config.num_attention_heads = -1
    with pytest.raises(GeometryError, match="no decoder can be built"):
        predict_peak(config, ours, 4, 16)


def test_a_model_that_looks_at_values_is_refused_in_one_line(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    forward = LlamaModel.forward

    def looks(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = forward(self, *args, **kwargs)
        float(result[0].sum())
        return result

    monkeypatch.setattr(LlamaModel, "forward", looks)
    with pytest.raises(GeometryError, match="depends on values, not on sizes alone") as raised:
        predicted(llama)
    assert "\n" not in str(raised.value)


def test_a_config_that_is_handed_over_stays_as_it_was(llama: Path) -> None:
    config = AutoConfig.from_pretrained(llama)
    before = config.to_json_string()
    predict_peak(config, plan(from_checkpoint(llama), rank=4), 1, 4)
    assert config.to_json_string() == before and config.use_cache


def test_importing_loads_no_torch() -> None:
    code = "import sys, multisbora.memory; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_counter_forgets_what_dies() -> None:
    live = memory._live_bytes()
    with live:
        first = torch.ones(1000)
        view = first.view(10, 100)
        second = first + 1
        assert live.now == 8000
        del first
        assert live.now == 8000  # the view keeps it
        del view
        assert live.now == 4000 == second.untyped_storage().nbytes()
    assert live.peak == 8000 and math.isfinite(second.sum().item())
