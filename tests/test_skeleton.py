"""Geometry from transformers configs, against what transformers saves. The cards are in test_cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tiny_gpt2, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)
from transformers.pytorch_utils import Conv1D

from multisbora.errors import GeometryError
from multisbora.geometry import CONV1D_MODEL_TYPES, from_checkpoint
from multisbora.skeleton import from_config, from_model

LLAMA_KINDS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    "config_class", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, GemmaConfig, Gemma2Config]
)
def test_decoders_of_the_llama_kind(config_class: Any) -> None:
    config = config_class()
    geometry = from_config(config)
    assert geometry.model == geometry.model_type == config.model_type
    assert len(geometry.matrices) == 7 * config.num_hidden_layers
    assert set(geometry.kinds()) == LLAMA_KINDS
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, k = (geometry.find(f"model.layers.0.self_attn.{name}_proj") for name in "qk")
    assert q.shape == (config.num_attention_heads * head, config.hidden_size)
    assert k.shape == (config.num_key_value_heads * head, config.hidden_size)
    down = geometry.find(f"model.layers.{config.num_hidden_layers - 1}.mlp.down_proj")
    assert down.shape == (config.hidden_size, config.intermediate_size)
    assert {matrix.orientation for matrix in geometry.matrices} == {"linear"}


def test_gpt2() -> None:
    geometry = from_config(GPT2Config())
    assert geometry.model_type == "gpt2" and len(geometry.matrices) == 4 * 12
    shapes = {matrix.module.removeprefix("transformer.h.0."): matrix.shape for matrix in geometry.matrices[:4]}
    assert shapes == {
        "attn.c_attn": (2304, 768),
        "attn.c_proj": (768, 768),
        "mlp.c_fc": (3072, 768),
        "mlp.c_proj": (768, 3072),
    }
    assert {matrix.orientation for matrix in geometry.matrices} == {"conv1d"}


def test_conv1d_model_types_are_transformers_own() -> None:
    import transformers

    folder = Path(transformers.__file__).parent / "models"
    using = {
        path.parent.name for path in folder.glob("*/modeling_*.py") if " Conv1D(" in path.read_text(encoding="utf-8")
    }
    # clvp mixes both in a speech model, and is no decoder that we read.
    assert {"gpt2", "openai", "imagegpt", "decision_transformer"} == using - {"clvp"}
    assert {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"} == CONV1D_MODEL_TYPES


@pytest.mark.parametrize(
    "options", [{"tied": True}, {"tied": False}, {"tied": True, "shards": 3, "num_hidden_layers": 3}], ids=str
)
def test_a_llama_checkpoint_equals_its_config(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = tiny_llama(tmp_path / "model", **options)
    assert (folder / "model.safetensors.index.json").exists() == ("shards" in options)
    stored, built = from_checkpoint(folder), from_config(folder)
    assert stored == built and stored.digest == built.digest
    assert from_config(folder / "config.json") == built


def test_a_gpt2_checkpoint_equals_its_config(tmp_path: Path) -> None:
    folder = tiny_gpt2(tmp_path / "model")
    assert from_checkpoint(folder).digest == from_config(folder).digest
    bare = from_checkpoint(tiny_gpt2(tmp_path / "bare", bare=True))
    for matrix in from_config(folder).matrices:
        assert bare.find(matrix.module).shape == matrix.shape


def test_what_transformers_itself_saves(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model", max_shard_size="2KB")
    assert (tmp_path / "model" / "model.safetensors.index.json").exists()
    assert from_checkpoint(tmp_path / "model").digest == from_config(config).digest


def test_every_matrix_is_a_module_of_the_live_model(tmp_path: Path) -> None:
    for folder in (tiny_llama(tmp_path / "llama"), tiny_gpt2(tmp_path / "gpt2")):
        model = AutoModelForCausalLM.from_pretrained(folder)
        for matrix in from_checkpoint(folder).matrices:
            module = model.get_submodule(matrix.module)
            assert isinstance(module, (torch.nn.Linear, Conv1D))
            assert tuple(module.weight.shape) == matrix.stored_shape


def tiny_mixture() -> MixtralConfig:
    sizes = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, vocab_size=16)
    return MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=3)


def tiny_gemma3() -> Gemma3Config:
    text = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, vocab_size=16)
    eye = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2)
    return Gemma3Config(
        text_config=text | dict(num_key_value_heads=1, head_dim=4),
        vision_config=eye | dict(image_size=28, patch_size=14, vision_use_head=False),
        mm_tokens_per_image=4,
    )


def test_a_mixture_live_and_as_saved(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(tiny_mixture()).save_pretrained(tmp_path / "model")
    live, stored = from_config(tiny_mixture()), from_checkpoint(tmp_path / "model")
    assert live.matrices == stored.select("all-linear") and len(live.matrices) == 2 * 4
    experts = [matrix for matrix in stored.matrices if matrix.is_expert]
    assert len(experts) == 2 * 3 * 3 and len(stored.matrices) == len(live.matrices) + len(experts)
    assert {matrix.kind for matrix in experts} == {"w1", "w2", "w3"}
    assert stored.find("model.layers.1.block_sparse_moe.experts.2.w2").shape == (8, 12)


def test_a_multimodal_model_live_and_as_saved(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(tiny_gemma3()).save_pretrained(tmp_path / "model")
    live, stored = from_config(tiny_gemma3()), from_checkpoint(tmp_path / "model")
    assert live.digest == stored.digest and len(live.matrices) == 2 * 7
    assert {matrix.module.split(".")[0] for matrix in stored.matrices} == {"language_model"}
    for matrix in live.matrices:
        assert stored.find(matrix.module).shape == matrix.shape
        assert stored.find(f"base_model.model.{matrix.module}").tensor != matrix.tensor


def test_a_live_model_and_its_config_have_one_geometry(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    assert from_model(AutoModelForCausalLM.from_pretrained(folder)) == from_config(folder)


def test_bad_configs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GeometryError, match=r"no config\.json"):
        from_config(tmp_path)
    for content in ("{", "{}", '{"model_type": "no-such-thing"}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(GeometryError, match="not usable") as caught:
            from_config(tmp_path)
        assert "\n" not in str(caught.value)
    with pytest.raises(GeometryError, match="no decoder"):
        from_config(T5Config())
    remote = {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "x--code.Config", "AutoModelForCausalLM": "x--code.Model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(remote))
    with pytest.raises(GeometryError, match="not usable"):
        from_config(tmp_path)


def test_a_plain_config_is_no_decoder() -> None:
    with pytest.raises(GeometryError, match="no decoder"):
        from_config(PretrainedConfig())
