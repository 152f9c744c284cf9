"""Checkpoints of any size with random weights, and adapters for them, written straight into files, without torch.

A checkpoint has the shapes of a Llama 3 with a tied head: bf16 in shards with an index, as transformers saves it. Its
matrices are cut from one block of normal values (sd 0.02), each from another place, so a file of gigabytes costs little
more than writing it. Tasks have regions drawn from one permutation a matrix: any fa tasks of one base are disjoint.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
_BLOCK = 1 << 26  # values
_STRIDE = 10_000_019  # from the place of one tensor to that of the next; a prime, so that few start alike
_ITEM = 2  # bytes of a bf16 value


@dataclass(frozen=True)
class Shape:
    """A Llama. `embedding` and norms are never adapted; the head is the embedding."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Stored tensor -> shape, in the order of their names, as safetensors sorts them."""
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        found["model.norm.weight"] = (self.hidden,)
        for layer in range(self.layers):
            block = f"model.layers.{layer}"
            found |= {f"{block}.{name}.weight": shape for name, shape in self._matrices().items()}
            found |= {f"{block}.{norm}.weight": (self.hidden,) for norm in _NORMS}
        return dict(sorted(found.items()))

    def adapted(self) -> dict[str, tuple[int, int]]:
        """Module -> (out, in) of what the tasks adapt."""
        chosen = {name: shape for name, shape in self._matrices().items() if name.endswith(TARGETS)}
        return {f"model.layers.{i}.{name}": shape for i in range(self.layers) for name, shape in chosen.items()}

    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(_bytes(shape) for shape in self.tensors().values())

    def largest_adapted(self) -> int:
        """Bytes of the largest matrix that is adapted."""
        return max(_bytes(shape) for shape in self.adapted().values())

    def of_size(self, size: float) -> Shape:
        """The same with so few layers that it has about `size` bytes; one at least."""
        one, two = (replace(self, layers=layers).size() for layers in (1, 2))
        return replace(self, layers=max(1, 1 + round((size - one) / (two - one))))

    def _matrices(self) -> dict[str, tuple[int, int]]:
        hidden, keys = self.hidden, self.kv_heads * self.head_size
        return {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (self.intermediate, hidden),
            "mlp.up_proj": (self.intermediate, hidden),
            "mlp.down_proj": (hidden, self.intermediate),
        }


_NORMS = ("input_layernorm", "post_attention_layernorm")
LLAMA_3B = Shape(28, 3072, 8192, 24, 8, 128_256)  # Llama-3.2-3B: 6.43 GB
TOY = Shape(2, 64, 128, 4, 2, 512)


def write_model(folder: Path, shape: Shape, shard_size: int) -> Path:
    """A checkpoint in shards of at most `shard_size` bytes each, at a folder that appears whole."""
    partial = _fresh(folder.with_name(f"{folder.name}.partial"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    _write_json(partial / "config.json", config)
    _write_json(partial / "generation_config.json", {"do_sample": True})
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, dims in shape.tensors().items():
        if shards[-1] and sum(map(_bytes, shards[-1].values())) + _bytes(dims) > shard_size:
            shards.append({})
        shards[-1][name] = dims
    normal = np.random.default_rng(0).standard_normal(_BLOCK, dtype=np.float32)
    block = memoryview((normal * np.float32(0.02)).astype(ml_dtypes.bfloat16).view(np.uint8))
    del normal
    where: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(partial / name, tensors, block, start=len(where))
        where |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": shape.size()}, "weight_map": where}
    _write_json(partial / "model.safetensors.index.json", index)
    return partial.rename(folder)


def write_task(folder: Path, shape: Shape, task: str, rank: int, fingerprint: str) -> Path:
    """An adapter folder as training leaves it, at a folder that appears whole.

    Args:
        task: "fa0", "fa1", ... or "fb"; the last leaves out the cells that fa0 and fa1 own.
        fingerprint: of the base.

    Raises:
        ValueError: a matrix has too few columns for that many tasks.
    """
    partial = _fresh(folder.with_name(f"{folder.name}.partial"))
    variant = task[:2]
    tensors: dict[str, Any] = {}
    excluded: dict[str, list[int]] = {}
    generator = np.random.default_rng([*task.encode()])
    for number, (module, (out_features, in_features)) in enumerate(shape.adapted().items()):
        columns = np.random.default_rng([number, 0]).permutation(in_features)
        if variant == "fa":
            first = rank * int(task[2:])
            indices = np.sort(columns[first : first + rank])
            values = generator.standard_normal((out_features, rank), dtype=np.float32)
        else:
            indices = np.sort(np.random.default_rng([number, 1]).permutation(out_features)[:rank])
            values = generator.standard_normal((rank, in_features), dtype=np.float32)
            excluded[module] = sorted(columns[: 2 * rank].tolist())
            values[:, excluded[module]] = 0
        if len(indices) < rank:
            raise ValueError(f"{module} has too few columns or rows for {task} of rank {rank}")
        tensors[f"base_model.model.{module}.sbora_values"] = values * np.float32(0.005)
        tensors[f"base_model.model.{module}.sbora_indices"] = indices.astype(np.int32)
    save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "SBORA",
        "task_type": "CAUSAL_LM",
        "variant": variant,
        "r": rank,
        "alpha": rank,
        "use_rslora": False,
        "target_modules": list(TARGETS),
        "base_model_name_or_path": "random",
        "task": task,
        "composition": "default",
        "base_fingerprint": fingerprint,
        "excluded": excluded,
    }
    _write_json(partial / "adapter_config.json", config)
    return partial.rename(folder)


def task_size(shape: Shape, variant: str, rank: int) -> int:
    """Bytes of the weights of an adapter, about."""
    return 4 * rank * sum(dims[variant == "fb"] for dims in shape.adapted().values())


def name_of(shape: Shape) -> str:
    """A folder name that tells this shape from others."""
    return "llama-" + "-".join(str(value) for value in asdict(shape).values())


def _write_shard(path: Path, tensors: dict[str, tuple[int, ...]], block: memoryview, start: int) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, dims in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [place, place + _bytes(dims)]}
        place += _bytes(dims)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, dims in enumerate(tensors.values(), start):
            left = _bytes(dims)
            if len(dims) == 1:  # a norm
                file.write(np.ones(dims, ml_dtypes.bfloat16).tobytes())
                continue
            begin = number * _STRIDE * _ITEM % len(block)
            while left:
                piece = block[begin : begin + left]
                file.write(piece)
                left, begin = left - len(piece), 0


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _bytes(dims: tuple[int, ...]) -> int:
    size = _ITEM
    for length in dims:
        size *= length
    return size
