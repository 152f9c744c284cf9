"""A merged checkpoint with its base and adapters, to be damaged in every way."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from builders import tiny_llama, write_adapter
from safetensors.torch import load_file, save_file

from multisbora.geometry import from_checkpoint
from multisbora.merge import merge
from multisbora.stream import fingerprint

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
UP = "model.layers.0.mlp.up_proj.weight"
SHARD = "model-00001-of-00002.safetensors"
RECEIPT = "multisbora_receipt.json"
INDEX = "model.safetensors.index.json"
OWN = {"math": [1, 4, 30], "chat": [2, 7]}  # math owns columns (fa), chat rows (fb) less math's cells


class Case:
    """The parts of one proof."""

    def __init__(self, folder: Path) -> None:
        self.base, self.merged = folder / "base", folder / "merged"
        self.adapters = [folder / "math", folder / "chat"]

    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.merged / SHARD)

    def save(self, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
        """Write the first shard again."""
        save_file(tensors, self.merged / SHARD, metadata=metadata or {"format": "pt"})

    def rehash(self) -> None:
        """Make the receipt fit the files that there are, their headers and sizes: what is inside must betray itself."""

        def change(content: dict[str, Any]) -> None:
            for name in [name for name in content["files"] if not (self.merged / name).is_file()]:
                del content["files"][name]
            for name, entry in content["files"].items():
                data = (self.merged / name).read_bytes()
                entry |= {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
            for name, entry in content["weights"].items():
                if (self.merged / name).is_file():
                    data = (self.merged / name).read_bytes()
                    head = data[: 8 + int.from_bytes(data[:8], "little")]
                    entry |= {"header": hashlib.sha256(head).hexdigest(), "size": len(data)}

        self.receipt(change)

    def receipt(self, change: Callable[[dict[str, Any]], object]) -> None:
        content = json.loads((self.merged / RECEIPT).read_text())
        change(content)
        (self.merged / RECEIPT).write_text(json.dumps(content))

    def reindex(self) -> None:
        """Have the index say where the tensors are."""
        path = self.merged / INDEX
        shards = sorted(self.merged.glob("model-*.safetensors"))
        where = {tensor: shard.name for shard in shards for tensor in load_file(shard)}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"weight_map": where}))

    def forge_regions(self) -> None:
        """Have the receipt's digests and counts of cells be those of the checkpoint, as a forger would."""

        def change(content: dict[str, Any]) -> None:
            for task, entry in content["tasks"].items():
                before = load_file(self.merged / "multisbora_undo" / f"{task}.safetensors")
                entry["cells_changed"] = 0
                for module, region in entry["regions"].items():
                    after, undone = self.cells(task, module, region), before[f"{module}.weight"]
                    for key, cells in (("digest", after), ("undo_digest", undone)):
                        data = cells.contiguous().view(torch.uint8).numpy().tobytes()
                        region[key] = blake3(data).hexdigest()
                    entry["cells_changed"] += int((after.view(torch.int16) != undone.view(torch.int16)).sum())
            content["cells_changed"] = sum(entry["cells_changed"] for entry in content["tasks"].values())

        self.receipt(change)

    def cells(self, task: str, module: str, region: dict[str, Any]) -> torch.Tensor:
        """What a region holds, in the layout of undo files."""
        name = f"{module}.weight"
        weight = next(t[name] for p in self.merged.glob("model-*.safetensors") if name in (t := load_file(p)))
        matrix = weight if task == "math" else weight.T
        kept = [row for row in range(len(matrix)) if row not in region["excluded"]]
        found = matrix[kept][:, region["indices"]]
        return found if task == "math" else found.T


def make_case(folder: Path) -> Case:
    """Two tasks whose regions cross, merged into a sharded bf16 Llama that also has a zero and a NaN in one tensor."""
    base = tiny_llama(folder / "base", shards=2)
    tensors = load_file(base / SHARD)
    tensors[UP][0, 0], tensors[UP][0, 1] = 0.0, torch.nan
    save_file(tensors, base / SHARD, metadata={"format": "pt"})
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    geometry = from_checkpoint(base)
    modules = [matrix.module for matrix in geometry.select(["q_proj", "down_proj"])]
    math = {module: OWN["math"] for module in modules}
    chat = {module: OWN["chat"] for module in modules}
    options: dict[str, Any] = {"base_fingerprint": fingerprint(base, geometry), "claim_digest": "c" * 64}
    write_adapter(folder / "math", geometry, "math", indices=math, **options)
    write_adapter(folder / "chat", geometry, "chat", variant="fb", indices=chat, excluded=math, seed=1, **options)
    merge(base, [folder / "math", folder / "chat"], {"math": 0.5}, output=folder / "merged")
    return Case(folder)


def copied(case: Case, folder: Path) -> Case:
    """The same once more, to be damaged."""
    shutil.copytree(case.base.parent, folder)
    return Case(folder)
