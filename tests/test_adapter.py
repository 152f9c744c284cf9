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


def _link(name: str, target: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return apply


def _pipe(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return apply


def _hole(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, 1 << 40)


def _hole_of_values(folder: Path) -> None:
    """Weights of 8 TB that need no disk: all that is written of them is a valid header."""
    size = 1 << 43
    header = {
        INDICES: {"dtype": "I32", "shape": [4], "data_offsets": [0, 16]},
        VALUES: {"dtype": "F32", "shape": [size // 16, 4], "data_offsets": [16, 16 + size]},
    }
    raw = json.dumps(header).encode()
    path = folder / "adapter_model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    os.truncate(path, 8 + len(raw) + 16 + size)


SCHEME: dict[str, Any] = {"kind": "nf4", "dtype": "float32", "block_size": 64, "double": True}
SCHEME |= {"modules": [MODULE], "digest": "0" * 64}
NAN, INF = np.zeros((6, 4), np.float32), np.zeros((6, 4), np.float32)
NAN[2, 1], INF[5, 3] = np.nan, -np.inf
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (_raw("adapter_config.json", None), "adapter_config.json does not exist"),
    "config no JSON": (_raw("adapter_config.json", b"{"), "adapter_config.json is refused, it is not JSON"),
    "config no text": (_raw("adapter_config.json", b"\xff\xfe\x00"), "adapter_config.json is refused, it is not UTF-8"),
    "config a list": (_raw("adapter_config.json", b"[]"), "not a JSON object"),
    "LoRA": (_config(peft_type="LORA"), "is a LORA adapter"),
    "variant": (_config(variant="fc"), "variant 'fc' is unknown"),
    "alpha text": (_config(alpha="8"), "alpha must be a finite number"),
    "alpha infinite": (_config(alpha=float("inf")), "it has Infinity"),
    "alpha endless": (_config(alpha=10**400), "more than 64 bits"),
    "alpha nested": (_config(alpha=[[[[[[[[[[[[1]]]]]]]]]]]] * 1000), "alpha must be a finite number"),
    "config endless": (_link("adapter_config.json", "/dev/zero"), "cannot be read: it is not a regular file"),
    "config a pipe": (_pipe("adapter_config.json"), "cannot be read: it is not a regular file"),
    "weights a pipe": (_pipe("adapter_model.safetensors"), "cannot be read: it is not a regular file"),
    "config a hole": (_hole("adapter_config.json"), "more than 33554432 bytes"),
    "weights a hole": (_hole_of_values, "this machine's memory"),
    "look ahead": (_config(alpha_pattern={"(?=a)b": 1}), "alpha_pattern .* cannot be used"),
    "long pattern": (_config(alpha_pattern={"a" * 5000: 1}), "alpha_pattern .* 5000 characters, more than"),
    "task a path": (_config(task="../../x"), "is not usable"),
    "task hidden": (_config(task=".x"), "is not usable"),
    "task of lines": (_config(task="a\nb"), "task must be printable"),
    "task endless": (_config(task="x" * 5000), "task must be printable"),
    "model of lines": (_config(base_model_name_or_path="a\nlicense: b"), "base_model_name_or_path must be printable"),
    "quantization": (_config(base_quantization={"kind": "x" * 5000}), "base_quantization: "),
    "block size": (_config(base_quantization=SCHEME | {"block_size": 0}), "block_size 0 is none of"),
    "quantised names": (_config(base_quantization=SCHEME | {"modules": ["a\nb"]}), "no name of a module"),
    "excluded twice": (
        _config(excluded={name: [2] for name in (MODULE, MODULE.removeprefix("model."))}),
        "excluded names .* twice",
    ),
    "alpha missing": (_config(alpha=None), "alpha must be a finite number"),
    "alpha pattern": (_config(alpha_pattern={"q_proj": "x"}), r"alpha_pattern\[q_proj\] must be"),
    "alpha patterns": (_config(alpha_pattern=[1]), "alpha_pattern must be an object"),
    "broken pattern": (_config(alpha_pattern={"(": 1}), "alpha_pattern"),
    "rslora": (_config(use_rslora="no"), "use_rslora must be true or false"),
    "task": (_config(task=3), "task must be text"),
    "bias": (_config(bias="all"), "trained biases"),
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
    "values of nothing": (_tensors(values=np.zeros((0, 4), np.float32)), "at least one index, and a value"),
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
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600
    assert str(folder) in str(caught.value)


def test_two_modules_of_one_matrix_are_refused(tmp_path: Path) -> None:
    short = MODULE.removeprefix("model.")
    folder = write_adapter(tmp_path / "a", GEOMETRY, "math", indices={MODULE: [0], short: [1]})
    with pytest.raises(AdapterError, match="which are one matrix"):
        Adapter.read(folder).fit(GEOMETRY)


def test_a_pattern_of_any_kind_is_matched_at_once(tmp_path: Path) -> None:
    patterns = {r"(\w+)+!": 1, "(a|a)" * 40 + "!": 2, ".*" * 40 + "!": 3, r".*layers\.[01]\.self_(attn|mlp).*": 4}
    adapter = Adapter.read(write_adapter(tmp_path / "a", GEOMETRY, "math", rank=4, alpha=8, alpha_pattern=patterns))
    assert {module.scaling for module in adapter.modules.values()} == {1.0}


def test_work_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patterns = {f"m{number}": 1 for number in range(11)}
    folder = write_adapter(tmp_path / "a", GEOMETRY, "math", alpha_pattern=patterns, excluded={MODULE: [1]})
    edit_json(folder / "adapter_config.json", excluded={MODULE.removeprefix("model."): [1]})
    assert Adapter.read(folder)
    with monkeypatch.context() as patch:
        patch.setattr("multisbora.adapter._MAX_MATCHES", 21)
        with pytest.raises(AdapterError, match="too many patterns, 11"):
            Adapter.read(folder)
    with monkeypatch.context() as patch:
        patch.setattr("multisbora.adapter.MAX_PATTERNS", 10)
        with pytest.raises(AdapterError, match="too many patterns, 11"):
            Adapter.read(folder)
    monkeypatch.setattr("multisbora.adapter._MAX_SEARCHES", 1)
    with pytest.raises(AdapterError, match="names too many modules, 1"):
        Adapter.read(folder)


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
