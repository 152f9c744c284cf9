"""Selection, names, digests and checkpoints' headers. What transformers says of it is in test_skeleton, test_cards."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from multisbora import geometry as geometries
from multisbora.errors import CheckpointError, GeometryError, UsageError
from multisbora.geometry import Geometry, Matrix, adaptable, from_card, from_checkpoint


def tiny(layers: int = 12, model: str = "tiny") -> Geometry:
    shapes = {"self_attn.q_proj": (6, 6), "self_attn.k_proj": (2, 6), "mlp.down_proj": (6, 8)}
    return Geometry(
        model,
        "llama",
        tuple(
            Matrix(f"model.layers.{layer}.{name}", f"model.layers.{layer}.{name}.weight", *shape)
            for layer in range(layers)
            for name, shape in shapes.items()
        ),
    )


def named(*modules: str) -> Geometry:
    return Geometry("tiny", "llama", tuple(Matrix(module, f"{module}.weight", 6, 4) for module in modules))


def mixture(layers: int = 2, experts: int = 3, prefix: str = "model.layers") -> Geometry:
    attention = [f"{prefix}.{layer}.self_attn.q_proj" for layer in range(layers)]
    wide = [
        f"{prefix}.{layer}.block_sparse_moe.experts.{expert}.{kind}"
        for layer in range(layers)
        for expert in range(experts)
        for kind in ("w1", "w2")
    ]
    return named(*attention, *wide)


def write_checkpoint(folder: Path, tensors: dict[str, Any], model_type: str = "llama") -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def test_a_written_card_reads_back(tmp_path: Path) -> None:
    uneven = (Matrix("model.layers.3.odd", "model.layers.3.odd.weight", 3, 5, "conv1d"),)
    shared = (Matrix("shared.proj", "shared.proj.weight", 3, 5),)
    for geometry in (tiny(), tiny(1), Geometry("x", "llama", tiny().matrices + uneven + shared)):
        path = tmp_path / f"{geometry.model}.json"
        geometry.write(path)
        assert from_card(path) == geometry
        assert from_card(path).digest == geometry.digest
    assert len(tiny().to_card()["groups"]) == 3


def test_a_written_card_of_a_mixture_has_one_group_a_kind(tmp_path: Path) -> None:
    geometry = mixture()
    groups = geometry.to_card()["groups"]
    assert [(g["module"], g["layers"], g.get("experts")) for g in groups] == [
        ("model.layers.{i}.block_sparse_moe.experts.{e}.w1", 2, 3),
        ("model.layers.{i}.block_sparse_moe.experts.{e}.w2", 2, 3),
        ("model.layers.{i}.self_attn.q_proj", 2, None),
    ]
    geometry.write(tmp_path / "tiny.json")
    assert from_card(tmp_path / "tiny.json") == geometry


@settings(deadline=None, max_examples=50)
@given(st.sets(st.tuples(st.integers(0, 12), st.integers(0, 12), st.sampled_from("ab")), min_size=1))
def test_any_set_of_experts_reads_back_from_its_card(members: set[tuple[int, int, str]]) -> None:
    geometry = named(*(f"h.{layer}.experts.{expert}.{kind}" for layer, expert, kind in members))
    with tempfile.TemporaryDirectory() as folder:
        geometry.write(Path(folder) / "tiny.json")
        assert from_card(Path(folder) / "tiny.json") == geometry


def test_layers_are_in_the_order_of_their_numbers() -> None:
    layers = [int(matrix.module.split(".")[2]) for matrix in tiny().matrices]
    assert layers == sorted(layers)
    shuffled = Geometry("tiny", "llama", tuple(sorted(tiny().matrices, key=lambda matrix: matrix.module)))
    assert shuffled == tiny() and shuffled.digest == tiny().digest


def test_the_digest_is_of_the_matrices_alone() -> None:
    assert tiny(model="other").digest == tiny().digest
    assert re.fullmatch("[0-9a-f]{64}", tiny().digest)
    first, *rest = tiny().matrices
    for changed in (
        Matrix(first.module, first.tensor, first.in_features, first.out_features),
        Matrix(first.module, first.tensor, *first.shape, "conv1d"),
        Matrix(first.module + "2", first.tensor + "2", *first.shape),
    ):
        assert Geometry("tiny", "llama", (changed, *rest)).digest != tiny().digest


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.sampled_from(["model", "transformer", "language_model", "base_model", "gpt_neox"]), max_size=3),
    st.sampled_from(["layers", "h", "blocks"]),
)
def test_one_model_has_one_digest_whatever_stands_before_its_blocks(parts: list[str], container: str) -> None:
    prefix = ".".join([*parts, container])
    assert mixture(prefix=prefix).digest == mixture(prefix=container).digest
    assert mixture(prefix=prefix).digest != mixture(prefix=f"{prefix}s").digest


def test_the_digest_keeps_full_names_where_short_ones_clash() -> None:
    ends = ("layers.0.q", "layers.1.q")
    both = named(*(f"{side}.{end}" for side in ("encoder", "decoder") for end in ends))
    renamed = named(*(f"{side}.{end}" for side in ("encoder", "other") for end in ends))
    assert both.digest != renamed.digest
    assert named("encoder.layers.0.q").digest == named("decoder.layers.0.q").digest
    assert named("shared.q").digest != named("other.q").digest  # no block: nothing to cut off


def test_conv1d_is_stored_transposed() -> None:
    matrix = Matrix("transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_attn.weight", 72, 24, "conv1d")
    assert matrix.shape == (72, 24) and matrix.stored_shape == (24, 72) and matrix.kind == "c_attn"
    assert Matrix("h.0.x", "h.0.x.weight", 72, 24).stored_shape == (72, 24)


def test_select_reads_targets_as_peft_does() -> None:
    geometry = tiny(2)
    assert geometry.kinds() == ("down_proj", "k_proj", "q_proj")
    assert geometry.select("all-linear") == geometry.matrices
    assert {matrix.kind for matrix in geometry.select(["q_proj", "self_attn.k_proj"])} == {"q_proj", "k_proj"}
    assert [m.module for m in geometry.select(("model.layers.1.mlp.down_proj",))] == ["model.layers.1.mlp.down_proj"]
    assert [m.module for m in geometry.select(r".*\.1\..*q_proj")] == ["model.layers.1.self_attn.q_proj"]
    for nothing in (["proj"], ["c_attn"], "q_proj", [], ["q_proj$"]):
        with pytest.raises(UsageError, match="it has down_proj, k_proj, q_proj"):
            geometry.select(nothing)
    with pytest.raises(UsageError, match="no regular expression"):
        geometry.select("(")
    many = named(*(f"model.layers.0.kind{number:03d}" for number in range(1000)))
    with pytest.raises(UsageError, match=r"it has kind000, .* and 980 more") as caught:
        many.select("nothing")
    assert len(str(caught.value)) < 500


def test_all_linear_leaves_experts_out_and_names_select_them() -> None:
    geometry = mixture()
    assert [matrix.kind for matrix in geometry.select("all-linear")] == ["q_proj", "q_proj"]
    assert sum(matrix.is_expert for matrix in geometry.matrices) == 12 == len(geometry.select(["w1", "w2"]))
    assert [m.module for m in geometry.select(["experts.0.w1"])] == [
        f"model.layers.{layer}.block_sparse_moe.experts.0.w1" for layer in (0, 1)
    ]
    assert len(geometry.select(r".*\.experts\.[01]\.w2")) == 4
    assert not any(m.is_expert for m in named("h.0.mlp.shared_experts.up", "h.0.experts.up", "experts.up").matrices)
    with pytest.raises(UsageError, match="'all-linear' matches no matrix of tiny: it has w1"):
        named("h.0.experts.0.w1").select("all-linear")


def test_find_knows_the_spellings_of_multimodal_models() -> None:
    spellings = ("language_model.model.layers", "model.language_model.layers", "model.layers", "layers")
    for stored in spellings:
        geometry = mixture(prefix=stored)
        for asked in (*spellings, *(f"base_model.model.{spelling}" for spelling in spellings)):
            for end in ("1.self_attn.q_proj", "0.block_sparse_moe.experts.2.w1"):
                assert geometry.find(f"{asked}.{end}").module == f"{stored}.{end}"
        for tower in ("vision_tower.vision_model.encoder.layers", "visual.layers", "model.vision_tower.layers"):
            with pytest.raises(GeometryError, match="has no matrix"):
                geometry.find(f"{tower}.0.self_attn.q_proj")
    two = named("model.layers.0.q", "language_model.layers.0.q")
    assert two.find("model.layers.0.q").module == "model.layers.0.q"
    with pytest.raises(GeometryError, match="more than one"):
        two.find("base_model.layers.0.q")


def test_find_forgives_leading_parts() -> None:
    geometry = tiny(2)
    name = "model.layers.1.self_attn.q_proj"
    for spelled in (name, f"base_model.model.{name}", name.removeprefix("model."), "1.self_attn.q_proj"):
        assert geometry.find(spelled).module == name
    with pytest.raises(GeometryError, match=r"did you mean model\.layers\.1\.self_attn\.q_proj"):
        geometry.find("model.layers.1.self_attn.q_porj")
    for vague in ("q_proj", "xmodel.layers.1.self_attn.q_proj", "self_attn.q_proj"):
        with pytest.raises(GeometryError, match="has no matrix"):
            geometry.find(vague)
    two = Geometry("two", "x", tuple(Matrix(f"{side}.h.0.q", f"{side}.h.0.q.weight", 2, 2) for side in "ab"))
    with pytest.raises(GeometryError, match="more than one"):
        two.find("h.0.q")


def test_a_checkpoint_has_only_matrices_of_numbered_blocks(tmp_path: Path) -> None:
    half = ml_dtypes.bfloat16
    tensors = {
        "model.embed_tokens.weight": np.zeros((9, 4), half),
        "lm_head.weight": np.zeros((9, 4), half),
        "model.norm.weight": np.zeros(4, half),
        "model.layers.0.input_layernorm.weight": np.zeros(4, half),
        "model.layers.0.self_attn.q_proj.weight": np.zeros((6, 4), half),
        "model.layers.0.self_attn.q_proj.bias": np.zeros(6, half),
        "model.layers.0.table": np.zeros((2, 2), half),
        "model.layers.10.self_attn.q_proj.weight": np.zeros((6, 4), half),
        "model.layers.2.experts.weight": np.zeros((2, 6, 4), half),
        "model.layers.2.self_attn.q_proj.weight": np.zeros((6, 4), half),
    }
    folder = write_checkpoint(tmp_path / "mine", tensors)
    geometry = from_checkpoint(folder)
    assert [matrix.module for matrix in geometry.matrices] == [
        f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 2, 10)
    ]
    assert geometry.model == "mine" and geometry.model_type == "llama"
    assert {matrix.shape for matrix in geometry.matrices} == {(6, 4)}


@pytest.mark.parametrize(("model_type", "orientation"), [("mixtral", "linear"), ("llama4_text", "conv1d")])
def test_experts_that_are_stored_fused_are_a_matrix_each(tmp_path: Path, model_type: str, orientation: str) -> None:
    """transformers itself stores (experts, out, in); Llama 4, gpt-oss and Qwen3-VL have it the other way round."""
    shape = (3, 8, 4) if orientation == "linear" else (3, 4, 8)
    tensors = {
        "model.layers.1.mlp.experts.gate_up_proj": np.zeros(shape, np.float32),
        "model.layers.1.mlp.experts.gate_up_proj_bias": np.zeros((3, 8), np.float32),
        "model.layers.1.mlp.gate.weight": np.zeros((3, 4), np.float32),
        "model.layers.1.self_attn.q_proj.weight": np.zeros((4, 4), np.float32),
    }
    geometry = from_checkpoint(write_checkpoint(tmp_path / "mine", tensors, model_type))
    fused = [matrix for matrix in geometry.matrices if matrix.is_expert]
    assert [(m.module, m.part, m.parts) for m in fused] == [
        (f"model.layers.1.mlp.experts.{expert}.gate_up_proj", expert, 3) for expert in range(3)
    ]
    assert {(m.tensor, m.shape, m.stored_shape, m.orientation) for m in fused} == {
        ("model.layers.1.mlp.experts.gate_up_proj", (8, 4), shape, orientation)
    }
    assert fused[2].cells_name == "model.layers.1.mlp.experts.gate_up_proj[2]"
    assert all(not matrix.is_expert for matrix in geometry.select("all-linear"))


def test_a_hub_checkpoint_and_its_resaved_copy_are_one_geometry(tmp_path: Path) -> None:
    weight = np.zeros((4, 12), np.float32)
    hub = from_checkpoint(write_checkpoint(tmp_path / "hub", {"h.0.attn.c_attn.weight": weight}, "gpt2"))
    copy = from_checkpoint(write_checkpoint(tmp_path / "copy", {"transformer.h.0.attn.c_attn.weight": weight}, "gpt2"))
    assert hub.matrices != copy.matrices and hub.digest == copy.digest


@pytest.mark.parametrize(
    ("language", "tower"),
    [
        ("language_model.model.layers", "vision_tower.vision_model.encoder.layers"),  # Gemma 3, LLaVA on the hub
        ("model.language_model.layers", "model.vision_tower.encoder.layers"),  # as transformers names them now
        ("language_model.model.layers", "some.new.eye.layers"),
        ("model.layers", "visual.blocks"),  # Qwen2-VL on the hub
    ],
)
def test_of_a_multimodal_checkpoint_the_language_model_alone_counts(tmp_path: Path, language: str, tower: str) -> None:
    weight = np.zeros((6, 4), np.float32)
    tensors = {f"{part}.{i}.self_attn.q_proj.weight": weight for part in (language, tower) for i in (0, 1)}
    tensors |= {"multi_modal_projector.linear_1.weight": weight, "language_model.lm_head.weight": weight}
    geometry = from_checkpoint(write_checkpoint(tmp_path / "mine", tensors, "gemma3"))
    assert [matrix.module for matrix in geometry.matrices] == [f"{language}.{i}.self_attn.q_proj" for i in (0, 1)]


def test_a_tower_alone_has_nothing_to_adapt(tmp_path: Path) -> None:
    weight = np.zeros((6, 4), np.float32)
    tensors = {"vision_model.encoder.layers.0.self_attn.q_proj.weight": weight}
    with pytest.raises(GeometryError, match="no adaptable matrices"):
        from_checkpoint(write_checkpoint(tmp_path / "mine", tensors, "siglip"))


def test_a_mixture_s_router_is_no_matrix_but_a_plain_gate_is() -> None:
    block = "model.layers.0"
    experts = {f"{block}.moe.experts.{e}.w1.weight": (6, 4) for e in (0, 1)}
    shared = {f"{block}.moe.shared_expert.gate_proj.weight": (6, 4)}
    routers = {
        f"{block}.moe.{name}.weight": (2, 4) for name in ("gate", "router", "router.layer", "shared_expert_gate")
    }
    assert adaptable(experts | shared | routers) == [*experts, *shared]
    live = {f"{block}.moe.experts.gate_up_proj": (2, 12, 4), f"{block}.moe.gate.weight": (2, 4)}
    assert adaptable(live) == []
    plain = {f"{block}.mlp.gate.weight": (6, 4), f"{block}.mlp.gate_proj.weight": (6, 4)}
    assert adaptable(plain) == list(plain) == adaptable(plain | experts)[:2]


def test_a_gpt2_checkpoint_is_conv1d(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "mine", {"h.0.attn.c_attn.weight": np.zeros((4, 12), np.float32)}, "gpt2")
    (matrix,) = from_checkpoint(folder).matrices
    assert matrix.shape == (12, 4) and matrix.stored_shape == (4, 12) and matrix.orientation == "conv1d"
    assert from_checkpoint(folder).find("transformer.h.0.attn.c_attn") == matrix


def test_bad_checkpoints_are_refused(tmp_path: Path) -> None:
    good = {"model.layers.0.q_proj.weight": np.zeros((2, 2), np.float32)}
    folder = write_checkpoint(tmp_path / "mine", good)
    (folder / "config.json").unlink()
    with pytest.raises(GeometryError, match=r"config\.json does not exist"):
        from_checkpoint(folder)
    for text in ("", "[]", "{}", '{"model_type": 3}'):
        (folder / "config.json").write_text(text)
        with pytest.raises(GeometryError, match="model_type"):
            from_checkpoint(folder)
    quantised = {"model.layers.0.q_proj.weight": np.zeros((2, 2), np.uint8)}
    with pytest.raises(GeometryError, match=r"quantised .*U8"):
        from_checkpoint(write_checkpoint(tmp_path / "4bit", quantised))
    with pytest.raises(GeometryError, match="no adaptable matrices"):
        from_checkpoint(write_checkpoint(tmp_path / "none", {"norm.weight": np.zeros(2, np.float32)}))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        from_checkpoint(folder)


def test_geometry_needs_no_torch() -> None:
    code = (
        "import sys, multisbora.geometry; print(any(m.split('.')[0] in ('torch', 'transformers') for m in sys.modules))"
    )
    root = Path(geometries.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "False"
