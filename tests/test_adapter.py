"""An adapter folder is read whole and strictly, or refused in one line."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import edit_json, write_adapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from multisbora.adapter import Adapter
from multisbora.errors import AdapterError
from multisbora.geometry import Geometry, Matrix
from multisbora.region import Region

MODULE = "model.layers.0.self_attn.q_proj"
OTHER = "model.layers.1.self_attn.q_proj"
GEOMETRY = Geometry("toy", "llama", tuple(Matrix(name, f"{name}.weight", 6, 8) for name in (MODULE, OTHER)))
VALUES, INDICES = (f"base_model.model.{MODULE}.sbora_{part}" for part in ("values", "indices"))


@pytest.mark.parametrize(("variant", "shape"), [("fa", (6, 3)), ("fb", (3, 8))])
def test_reads_what_was_written(tmp_path: Path, variant: str, shape: tuple[int, int]) -> None:
    own = {MODULE: [1, 2, 5], OTHER: [0, 4]}
    other = {MODULE: [0, 3]}
    folder = write_adapter(
        tmp_path / "a",
        GEOMETRY,
        "math",
        variant=variant,
        indices=own,
        excluded=other,
        alpha=12,
        base_fingerprint="f" * 64,
        claim_digest="c" * 64,
    )
    adapter = Adapter.read(folder)
    stored = load_file(folder / "adapter_model.safetensors")
    assert (adapter.task, adapter.composition, adapter.variant) == ("math", "default", variant)
    assert (adapter.base_fingerprint, adapter.claim_digest, adapter.base_model) == ("f" * 64, "c" * 64, "toy")
    assert adapter.digest == hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert list(adapter.modules) == [MODULE, OTHER]
    module = adapter.modules[MODULE]
    assert module.region == Region(variant, (1, 2, 5), (0, 3))  # type: ignore[arg-type]
    assert module.values.shape == shape
    assert module.values.dtype == np.float32
    assert np.array_equal(module.values, stored[VALUES])
    assert (module.scaling, adapter.modules[OTHER].scaling) == (4.0, 6.0)


def test_scaling_follows_patterns_and_rslora(tmp_path: Path) -> None:
    own = {MODULE: [0, 1, 2, 3], OTHER: [0]}
    patterns: dict[str, Any] = {"use_rslora": True, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}}
    adapter = Adapter.read(write_adapter(tmp_path / "a", GEOMETRY, "math", indices=own, alpha=10, **patterns))
    assert (adapter.modules[MODULE].scaling, adapter.modules[OTHER].scaling) == (5.0, 3.0)


def test_a_task_without_a_name_is_called_after_its_folder(tmp_path: Path) -> None:
    assert Adapter.read(write_adapter(tmp_path / "maths", GEOMETRY, None)).task == "maths"


def test_excluded_names_may_lack_leading_parts(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", GEOMETRY, "math", excluded={MODULE: [2]})
    edit_json(folder / "adapter_config.json", excluded={MODULE.removeprefix("model."): [2]})
    assert Adapter.read(folder).modules[MODULE].region.excluded == (2,)


def _tensors(**changes: Any) -> Callable[[Path], None]:
    """Replace (array), add (array) or drop (None) tensors; "values" and "indices" are those of MODULE."""

    def apply(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        named = {{"values": VALUES, "indices": INDICES}.get(name, name): array for name, array in changes.items()}
        tensors = load_file(path) | named
        save_file({name: array for name, array in tensors.items() if array is not None}, path)

    return apply


def _config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "adapter_config.json", **changes)


def _raw(name: str, content: bytes | None) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)

    return apply


def _truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    os.truncate(path, path.stat().st_size - 4)


NAN, INF = np.zeros((6, 4), np.float32), np.zeros((6, 4), np.float32)
NAN[2, 1], INF[5, 3] = np.nan, -np.inf
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (_raw("adapter_config.json", None), "adapter_config.json does not exist"),
    "config no JSON": (_raw("adapter_config.json", b"{"), "adapter_config.json is not JSON"),
    "config no text": (_raw("adapter_config.json", b"\xff\xfe\x00"), "adapter_config.json is not JSON"),
    "config a list": (_raw("adapter_config.json", b"[]"), "not a JSON object"),
    "LoRA": (_config(peft_type="LORA"), "is a LORA adapter"),
    "variant": (_config(variant="fc"), "variant 'fc' is unknown"),
    "alpha text": (_config(alpha="8"), "alpha must be a finite number"),
    "alpha infinite": (_config(alpha=float("inf")), "alpha must be a finite number"),
    "alpha missing": (_config(alpha=None), "alpha must be a finite number"),
    "alpha pattern": (_config(alpha_pattern={"q_proj": "x"}), r"alpha_pattern\[q_proj\] must be"),
    "alpha patterns": (_config(alpha_pattern=[1]), "alpha_pattern must be an object"),
    "broken pattern": (_config(alpha_pattern={"(": 1}), "alpha_pattern"),
    "rslora": (_config(use_rslora="no"), "use_rslora must be true or false"),
    "task": (_config(task=3), "task must be text"),
    "modules_to_save": (_config(modules_to_save=["lm_head"]), "biases or whole modules"),
    "bias": (_config(bias="all"), "biases or whole modules"),
    "excluded module": (
        _config(excluded={"model.layers.7.self_attn.q_proj": [1]}),
        "layers.7.*no module of the adapter",
    ),
    "excluded kind": (_config(excluded={MODULE: ["1"]}), "must be a list of whole numbers"),
    "excluded order": (_config(excluded={MODULE: [2, 1]}), "excluded must be sorted"),
    "excluded outside": (_config(excluded={MODULE: [6]}), "excluded index 6 is outside 6"),
    "excluded values": (_config(excluded={MODULE: [2]}), "not zero in excluded cells"),
    "no weights": (_raw("adapter_model.safetensors", None), "adapter_model.safetensors does not exist"),
    "empty weights": (_raw("adapter_model.safetensors", b""), "truncated or corrupt"),
    "truncated": (_truncate, "truncated or corrupt"),
    "pickle": (_raw("adapter_model.safetensors", b"\x80\x04\x95" + bytes(64)), "truncated or corrupt"),
    "values dtype": (_tensors(values=np.zeros((6, 4), np.float16)), f"{MODULE}: sbora_values must be F32"),
    "values axes": (_tensors(values=np.zeros(24, np.float32)), "sbora_values must be F32 with 2 axes"),
    "values rank": (_tensors(values=np.zeros((6, 3), np.float32)), "4 indices but values of shape"),
    "indices dtype": (_tensors(indices=np.array([0, 1, 2, 3], np.int64)), "sbora_indices must be I32"),
    "unsorted": (_tensors(indices=np.array([1, 0, 2, 3], np.int32)), f"{MODULE}: indices must be sorted"),
    "repeated": (_tensors(indices=np.array([0, 1, 1, 3], np.int32)), "without repeats"),
    "negative": (_tensors(indices=np.array([-1, 0, 1, 3], np.int32)), "not negative"),
    "none": (_tensors(indices=np.array([], np.int32), values=np.zeros((6, 0), np.float32)), "at least one index"),
    "nan": (_tensors(values=NAN), rf"{MODULE}: 1 values are NaN or infinite, first at \[2, 1\]"),
    "inf": (_tensors(values=INF), "NaN or infinite"),
    "no indices": (_tensors(indices=None), f"{MODULE} has no sbora_indices"),
    "no values": (_tensors(values=None), f"{MODULE} has no sbora_values"),
    "saved module": (_tensors(**{"base_model.model.lm_head.weight": NAN}), "lm_head.weight, which is no part"),
    "bias tensor": (_tensors(**{f"base_model.model.{MODULE}.bias": NAN}), "q_proj.bias, which is no part"),
    "no prefix": (_tensors(**{f"{MODULE}.sbora_values": NAN}), "which is no part"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    folder = write_adapter(tmp_path / "a", GEOMETRY, "math", rank=4)
    damage(folder)
    with pytest.raises(AdapterError, match=message) as caught:
        Adapter.read(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="does not exist"):
        Adapter.read(tmp_path / "nowhere")


def test_no_tensors_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", GEOMETRY, "math")
    header = json.dumps({}).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(AdapterError, match="holds no tensors"):
        Adapter.read(folder)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_bytes_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "a" if (tmp_path / "a").exists() else write_adapter(tmp_path / "a", GEOMETRY, "math")
    path = folder / data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    before = path.read_bytes()
    content = bytearray(before)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        Adapter.read(folder)
    except AdapterError as error:
        assert "\n" not in str(error)
    finally:
        path.write_bytes(before)
