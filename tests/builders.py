"""Tiny models and adapters on disk, for any test: real files, random weights, nothing trained and nothing fetched."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file as save_torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from multisbora.dataset import encode, load_rows
from multisbora.geometry import Geometry
from multisbora.loading import load_tokenizer
from multisbora.moments import Moments, Site
from multisbora.recipe import Recipe

SPECIAL = ("<pad>", "<s>", "</s>")  # ids 0, 1, 2
VOCABULARY = len(SPECIAL) + 256


def tiny_llama(
    folder: str | Path, *, dtype: str = "bfloat16", shards: int = 1, tied: bool = True, seed: int = 0, **config: Any
) -> Path:
    """A random Llama of about 50,000 parameters with a byte-level tokenizer, as transformers would have saved it.

    Args:
        dtype: "bfloat16", "float16" or "float32".
        shards: 1 writes model.safetensors, more write shards and their index.
        tied: whether the head is the embedding, and then not stored.
        config: overrides of LlamaConfig.
    """
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=256)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied)
    return _save(folder, LlamaForCausalLM, LlamaConfig(**(sizes | special | config)), dtype, shards, seed)


def tiny_gpt2(
    folder: str | Path, *, dtype: str = "float32", shards: int = 1, bare: bool = False, seed: int = 0, **config: Any
) -> Path:
    """A random GPT-2, whose matrices are Conv1D: stored transposed. The head is tied.

    Args:
        bare: store "h.0..." instead of "transformer.h.0...", as the published GPT-2 does.
    """
    sizes = dict(n_embd=24, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=256)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    prefix = "transformer." if bare else ""
    return _save(folder, GPT2LMHeadModel, GPT2Config(**(sizes | special | config)), dtype, shards, seed, prefix)


def draw_regions(
    geometry: Geometry,
    tasks: Mapping[str, str] | Sequence[str],
    *,
    rank: int = 4,
    seed: int = 0,
    target_modules: Any = "all-linear",
) -> dict[str, dict[str, list[int]]]:
    """Random indices of `rank` for each task and module, disjoint per variant.

    Args:
        tasks: task -> variant, or names of fa tasks.
    """
    variants = dict(tasks) if isinstance(tasks, Mapping) else dict.fromkeys(tasks, "fa")
    generator = np.random.default_rng(seed)
    regions: dict[str, dict[str, list[int]]] = {task: {} for task in variants}
    for matrix in geometry.select(target_modules):
        free = {
            "fa": generator.permutation(matrix.in_features).tolist(),
            "fb": generator.permutation(matrix.out_features).tolist(),
        }
        for task, variant in variants.items():
            regions[task][matrix.module] = sorted(free[variant][:rank])
            del free[variant][:rank]
    return regions


def write_adapter(
    folder: str | Path,
    geometry: Geometry,
    task: str | None,
    *,
    variant: str = "fa",
    rank: int = 4,
    indices: Mapping[str, Sequence[int]] | None = None,
    excluded: Mapping[str, Sequence[int]] | None = None,
    alpha: float = 8,
    seed: int = 0,
    base_fingerprint: str | None = None,
    claim_digest: str | None = None,
    target_modules: Any = "all-linear",
    spread: float = 0.05,
    **config: Any,
) -> Path:
    """An adapter folder as `save_pretrained` of a trained SBORA model writes it, with random values.

    Args:
        indices: {module: sorted indices}; drawn with `seed` if None.
        excluded: {module: indices of the other axis}; values there are zero.
        spread: standard deviation of the values; 0 is an adapter that was never trained.
        config: further keys of adapter_config.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    indices = indices or draw_regions(geometry, {"": variant}, rank=rank, seed=seed, target_modules=target_modules)[""]
    excluded = {module: list(values) for module, values in (excluded or {}).items()}
    generator = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for module, own in indices.items():
        out_features, in_features = geometry.find(module).shape
        shape = (out_features, len(own)) if variant == "fa" else (len(own), in_features)
        values = generator.normal(0, spread, shape).astype(np.float32)
        values[
            (excluded.get(module, []), slice(None)) if variant == "fa" else (slice(None), excluded.get(module, []))
        ] = 0
        tensors[f"base_model.model.{module}.sbora_values"] = values
        tensors[f"base_model.model.{module}.sbora_indices"] = np.array(own, dtype=np.int32)
    save_numpy(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    content = {
        "peft_type": "SBORA",
        "task_type": "CAUSAL_LM",
        "variant": variant,
        "r": rank,
        "alpha": alpha,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": sorted(indices),
        "base_model_name_or_path": geometry.model,
        "task": task,
        "composition": "default",
        "base_fingerprint": base_fingerprint,
        "claim_digest": claim_digest,
        "excluded": excluded,
    }
    (folder / "adapter_config.json").write_text(json.dumps(content | config, indent=2), encoding="utf-8")
    return folder


def draw_moments(
    geometry: Geometry,
    task: str,
    *,
    base_fingerprint: str = "of no base",
    channels: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    tokens: int = 64,
    target_modules: Any = "all-linear",
) -> Moments:
    """Moments of random activations and gradients, some channels louder than others.

    Args:
        channels: module -> input channels of its block, sorted; None: all of them.
    """
    generator = np.random.default_rng(seed)
    sites = {}
    for matrix in geometry.select(target_modules):
        x = generator.normal(0, generator.lognormal(0, 1, matrix.in_features), (tokens, matrix.in_features))
        g = generator.normal(0, generator.lognormal(-2, 1, matrix.out_features), (tokens, matrix.out_features))
        weighted = x * (g**2).sum(1, keepdims=True) ** 0.5
        block = (weighted.T @ weighted / tokens).astype(np.float32)
        chosen = np.arange(matrix.in_features) if channels is None else np.asarray(channels[matrix.module])
        sites[matrix.module] = Site(
            energy=np.diag(block).copy(),
            response=(g**2).mean(0).astype(np.float32),
            channels=chosen.astype(np.int32),
            block=block[np.ix_(chosen, chosen)],
        )
    return Moments(task, base_fingerprint, geometry.digest, rows=4, tokens=tokens, sites=sites)


def answer_tokens(recipe: Recipe, base: Path) -> float:
    """How many a row has in the mean, all of its rows being training rows."""
    rows = [row for _, row in load_rows(recipe.train)]
    examples = encode(recipe, rows, load_tokenizer(base), recipe.training.cutoff).examples
    return sum(len(example.input_ids) - example.answer_start for example in examples) / len(examples)


def tree(folder: str | Path) -> dict[str, bytes]:
    """Every file of a folder and of those in it: path inside of it -> content."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def edit_json(path: str | Path, **changes: Any) -> None:
    """Change top-level keys of a JSON file."""
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    Path(path).write_text(json.dumps(content | changes, indent=2), encoding="utf-8")


def _save(
    folder: str | Path, architecture: Any, config: Any, dtype: str, shards: int, seed: int, strip: str = ""
) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = architecture(config).to(getattr(torch, dtype)).eval()
    tied = getattr(config, "tie_word_embeddings", False)
    state = {
        k.removeprefix(strip): v.contiguous()
        for k, v in model.state_dict().items()
        if not (tied and k == "lm_head.weight")
    }
    model.config.architectures = [architecture.__name__]
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    if shards == 1:
        save_torch(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    where = {key: names[i * shards // len(state)] for i, key in enumerate(state)}
    for name in names:
        part = {key: state[key] for key in state if where[key] == name}
        save_torch(part, folder / name, metadata={"format": "pt"})
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: any text has one, and no vocabulary is to be trained."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)
