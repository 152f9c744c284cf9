"""A plain LoRA: stock PEFT loads it without us, and it is the same update."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import tiny_gpt2, tiny_llama, write_adapter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from multisbora.adapter import Adapter
from multisbora.errors import AdapterError, CheckpointError
from multisbora.export import export_peft_lora
from multisbora.geometry import Geometry, from_checkpoint

STOCK_PEFT = """
import json, sys, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", category=DeprecationWarning)
warnings.filterwarnings("ignore", category=FutureWarning)
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM
for name, (base, adapter) in json.load(open("jobs.json")).items():
    assert type(LoraConfig.from_pretrained(adapter)) is LoraConfig
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        live = model(torch.arange(3, 20)[None]).logits
        merged = model.merge_and_unload()
        torch.save((live, merged(torch.arange(3, 20)[None]).logits, merged.state_dict()), name + ".pt")
assert not [name for name in sys.modules if name.startswith("multisbora")]
"""
KINDS = ("llama", "gpt2", "bare gpt2")


def _bases(folder: Path, kind: str) -> tuple[Path, Geometry, Geometry]:
    """A base, its stored geometry, and that of the live module names, which differ for GPT-2 as it is published."""
    if kind == "llama":
        base = tiny_llama(folder / kind, dtype="float32")
        return base, from_checkpoint(base), from_checkpoint(base)
    base = tiny_gpt2(folder / kind, bare=kind != "gpt2")
    return base, from_checkpoint(base), from_checkpoint(tiny_gpt2(folder / f"{kind} live"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All exports, loaded by stock PEFT in one process: mixed ranks, rslora, patterns, excluded cells, Conv1D."""
    folder = tmp_path_factory.mktemp("exported")
    jobs = {}
    for kind in KINDS:
        base, stored, live = _bases(folder, kind)
        regions = {m.module: [1, 2, 7, 12][: 1 + i % 4] for i, m in enumerate(live.matrices)}
        excluded = {live.matrices[1].module: [0, 5]}
        alpha = {live.matrices[0].kind: 3}
        for variant in ("fa", "fb"):
            name = f"{kind} {variant}"
            own = folder / f"{name} adapter"
            write_adapter(
                own,
                live,
                "math",
                variant=variant,
                indices=regions,
                use_rslora=True,
                excluded=excluded,
                alpha_pattern=alpha,
            )
            export_peft_lora(own, folder / f"{name} lora", stored)
            jobs[name] = (str(base), str(folder / f"{name} lora"))
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", STOCK_PEFT]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("variant", ["fa", "fb"])
@pytest.mark.parametrize("kind", KINDS)
def test_stock_peft_gives_the_dense_one_hot_update(exported: Path, kind: str, variant: str) -> None:
    live_logits, merged_logits, merged = torch.load(exported / f"{kind} {variant}.pt")
    model = AutoModelForCausalLM.from_pretrained(exported / kind)
    oracle, stored = model.state_dict(), from_checkpoint(exported / kind)
    for name, module in Adapter.read(exported / f"{kind} {variant} adapter").modules.items():
        matrix = stored.find(name)
        axis = matrix.in_features if variant == "fa" else matrix.out_features
        one_hot = torch.eye(axis)[list(module.region.indices)]  # (r, axis)
        values = torch.tensor(module.values) * module.scaling
        update = values @ one_hot if variant == "fa" else one_hot.T @ values  # (out, in)
        oracle[f"{name}.weight"] += update.T if matrix.orientation == "conv1d" else update
    assert oracle.keys() == merged.keys()
    for name, tensor in oracle.items():
        assert torch.equal(merged[name], tensor), name  # bit-equal: a product with one-hot rows sums nothing
    with torch.no_grad():
        assert torch.equal(model(torch.arange(3, 20)[None]).logits, merged_logits)
    # Live, the update is a matmul of its own: fp32 sums in another order, logits of about 0.1.
    torch.testing.assert_close(live_logits, merged_logits, rtol=1e-4, atol=1e-5)


def test_the_files_say_each_thing_once(tmp_path: Path) -> None:
    geometry = from_checkpoint(tiny_llama(tmp_path / "base"))
    adapter = write_adapter(tmp_path / "a", geometry, "math", rank=3, alpha=12, target_modules=["q_proj"])
    export_peft_lora(adapter, tmp_path / "one", geometry)
    export_peft_lora(adapter, tmp_path / "two", geometry)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (3, 3, {})
    assert (config["peft_type"], config["fan_in_fan_out"], config["bias"]) == ("LORA", False, "none")
    module = "model.layers.1.self_attn.q_proj"
    tensors = load_file(tmp_path / "one" / "adapter_model.safetensors")
    read = Adapter.read(adapter).modules[module]
    lora_a, lora_b = (tensors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
    assert (lora_a.dtype, lora_b.dtype) == (torch.float32, torch.float32)
    assert lora_a.shape == (3, 32)
    assert torch.equal(lora_a.nonzero()[:, 1], torch.tensor(read.region.indices))
    assert lora_a.sum() == 3
    assert np.array_equal(lora_b.numpy(), read.values * np.float32(4))
    assert len(tensors) == 2 * 2


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    geometry = from_checkpoint(base)
    adapter = write_adapter(tmp_path / "a", geometry, "math")
    with pytest.raises(CheckpointError, match="is not an empty folder"):
        export_peft_lora(adapter, base, geometry)
    other = from_checkpoint(tiny_llama(tmp_path / "wide", intermediate_size=64))
    for geometry, message in (
        (other, "does not fit wide"),
        (from_checkpoint(tiny_gpt2(tmp_path / "g")), "does not fit g"),
    ):
        with pytest.raises(AdapterError, match=message):
            export_peft_lora(adapter, tmp_path / "out", geometry)
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterError, match="truncated or corrupt"):
        export_peft_lora(adapter, tmp_path / "out", geometry)
    assert not (tmp_path / "out").exists()
