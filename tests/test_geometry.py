"""Cards, selection and checkpoints' headers. What transformers says of the same models is in test_skeleton."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from multisbora import geometry as geometries
from multisbora.errors import CheckpointError, GeometryError, UsageError
from multisbora.geometry import Geometry, Matrix, card_names, from_card, from_checkpoint
from multisbora.resources import models_dir, tasks_dir


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


def write_checkpoint(folder: Path, tensors: dict[str, Any], model_type: str = "llama") -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def test_every_card_loads() -> None:
    files = sorted(models_dir().glob("*.json"))
    assert len(files) >= 4
    assert {path.stem for path in files} == set(card_names())
    aliases: list[str] = []
    for path in files:
        by_path, by_name = from_card(path), from_card(path.stem)
        assert by_path == by_name and by_path.model == path.stem and len(by_path.matrices) > 0
        names = json.loads(path.read_text())["names"]
        assert names and all(from_card(name) == by_path for name in names)
        aliases += [name.lower() for name in names]
    assert len(set(aliases)) == len(aliases), "two cards share an alias"


def test_the_recipes_folder_is_there() -> None:
    assert tasks_dir().is_dir()


def test_cards_of_the_papers_models() -> None:
    sizes = {"LLaMA-7B": (4096, 11008, 4096, 32), "LLaMA-13B": (5120, 13824, 5120, 40)}
    sizes |= {"Llama-3-8B": (4096, 14336, 1024, 32), "SmolLM2-135M": (576, 1536, 192, 30)}
    for name, (hidden, intermediate, kv, layers) in sizes.items():
        card = from_card(name)
        assert len(card.matrices) == 7 * layers
        assert card.find("model.layers.0.self_attn.k_proj").shape == (kv, hidden)
        assert card.find(f"model.layers.{layers - 1}.mlp.down_proj").shape == (hidden, intermediate)
    assert from_card("huggingfacetb/smollm2-135m-INSTRUCT").model == "SmolLM2-135M"


def test_an_unknown_card_has_a_hint() -> None:
    with pytest.raises(UsageError, match="did you mean LLaMA-7B"):
        from_card("lama-7b")
    with pytest.raises(UsageError, match="cards: LLaMA-13B"):
        from_card("@@@")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"extra": 1}, "a card has the keys"),
        ({"names": "x"}, "names must be"),
        ({"model_type": 1}, "model_type must be"),
        ({"groups": [1]}, "groups must be"),
        ({"groups": []}, "no adaptable matrices"),
        ({"groups": [{"module": "x"}]}, "a group has the keys"),
    ],
)
def test_a_malformed_card_is_refused(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(tiny().to_card() | change))
    with pytest.raises(GeometryError, match=why):
        from_card(path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"layers": "3"}, "layers must be"),
        ({"layers": [-1]}, "layers must be"),
        ({"layers": 0}, "needs layers"),
        ({"layers": [1, 1]}, "lists a matrix twice"),
        ({"module": "model.layers.0.x"}, "needs layers"),
        ({"out": 0}, "above 0"),
        ({"in": 2.0}, "above 0"),
        ({"orientation": "up"}, "orientation"),
    ],
)
def test_a_malformed_group_is_refused(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    path = tmp_path / "mine.json"
    card = tiny().to_card()
    card["groups"][0] |= change
    path.write_text(json.dumps(card))
    with pytest.raises(GeometryError, match=why):
        from_card(path)


def test_a_card_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("{")
    with pytest.raises(GeometryError, match="not readable as JSON"):
        from_card(tmp_path / "mine.json")


def test_a_written_card_reads_back(tmp_path: Path) -> None:
    uneven = (Matrix("model.layers.3.odd", "model.layers.3.odd.weight", 3, 5, "conv1d"),)
    shared = (Matrix("shared.proj", "shared.proj.weight", 3, 5),)
    for geometry in (tiny(), tiny(1), Geometry("x", "llama", tiny().matrices + uneven + shared)):
        path = tmp_path / f"{geometry.model}.json"
        geometry.write(path)
        assert from_card(path) == geometry
        assert from_card(path).digest == geometry.digest
    assert len(tiny().to_card()["groups"]) == 3


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
