"""Which tensor goes into which file: the base's own, or sharded anew so that transformers loads it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from builders import tiny_gpt2, tiny_llama
from commands import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from multisbora.checkpoint import Checkpoint
from multisbora.errors import CheckpointError, UsageError
from multisbora.header import DTYPE_BITS, TensorInfo, read_header
from multisbora.layout import lay_out, new_target, parse_size, same_layout, sharded
from multisbora.stream import stream

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base") / "llama", shards=3)


def write(folder: Path, checkpoint: Checkpoint, max_shard_size: int | None) -> Path:
    """All files of a layout, as a merge of nothing would write them."""
    layout = lay_out(checkpoint, max_shard_size)
    folder.mkdir()
    stream(checkpoint, layout.targets, folder)
    for path in layout.companions:
        (folder / path.name).write_bytes(path.read_bytes())
    if layout.index is not None:
        (folder / INDEX).write_bytes(layout.index)
    return folder


def test_the_same_layout_is_the_files_as_they_are(base: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(base)
    targets = same_layout(checkpoint)
    assert [target.name for target in targets] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    for target in targets:
        raw = (base / target.name).read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        assert target.head == raw[:start]
        assert target.head_digest == hashlib.sha256(raw[:start]).hexdigest()
        assert target.size == len(raw)
        assert target.source == base / target.name
        header = read_header(base / target.name)
        assert target.offsets == {name: start + info.start for name, info in header.tensors.items()}
    out = write(tmp_path / "out", checkpoint, None)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in base.iterdir()
    }


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 200_000))
def test_shards_hold_what_they_may_and_keep_the_order(base: Path, size: int) -> None:
    checkpoint = Checkpoint.open(base)
    order = [name for header in checkpoint.headers.values() for name in header.tensors]
    targets, index = sharded(checkpoint, size)
    assert [name for target in targets for name in target.offsets] == order
    sums = [sum(checkpoint.info(name).nbytes for name in target.offsets) for target in targets]
    for target, filled in zip(targets, sums, strict=True):
        assert filled <= size or len(target.offsets) == 1
        assert target.source is None and target.size == len(target.head) + filled
        assert len(target.head) % 8 == 0
    for (one, filled), two in zip(zip(targets, sums, strict=True), targets[1:], strict=False):
        assert one.offsets and filled + checkpoint.info(next(iter(two.offsets))).nbytes > size  # no shard is too short
    if len(targets) == 1:
        assert index is None and targets[0].name == "model.safetensors"
    else:
        assert index is not None
        content = json.loads(index)
        assert content["metadata"]["total_size"] == sum(sums)
        assert content["weight_map"] == {name: target.name for target in targets for name in target.offsets}
        assert list(content["weight_map"]) == sorted(content["weight_map"])
        names = [f"model-{n:05d}-of-{len(targets):05d}.safetensors" for n in range(1, len(targets) + 1)]
        assert [target.name for target in targets] == names


@pytest.mark.parametrize("size", [20_000, 1 << 30])
@pytest.mark.parametrize("kind", ["llama", "sharded llama", "gpt2"])
def test_transformers_loads_what_was_sharded_anew(tmp_path: Path, kind: str, size: int) -> None:
    if kind == "gpt2":
        base = tiny_gpt2(tmp_path / "base")
    else:
        base = tiny_llama(tmp_path / "base", tied=False, shards=2 if "sharded" in kind else 1)
    out = write(tmp_path / "out", Checkpoint.open(base), size)
    assert (out / INDEX).exists() == (size < 1 << 30) == (not (out / "model.safetensors").exists())
    assert Checkpoint.open(out).where.keys() == Checkpoint.open(base).where.keys()
    before, report = AutoModelForCausalLM.from_pretrained(base), None
    after, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for (name, one), two in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        assert torch.equal(one, two) and one.dtype == two.dtype, name


def test_metadata_of_headers_and_index_are_kept(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", shards=2)
    index = json.loads((base / INDEX).read_text())
    index["metadata"] |= {"total_parameters": 7, "total_size": 1}
    (base / INDEX).write_text(json.dumps(index))
    path = base / "model-00002-of-00002.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "more": "of it"})
    targets, content = sharded(Checkpoint.open(base), 20_000)
    assert content is not None
    stored = sum(
        read_header(path).tensors[name].nbytes for path in base.glob("*.safetensors") for name in load_file(path)
    )
    assert json.loads(content)["metadata"] == {"total_parameters": 7, "total_size": stored}
    for target in targets:
        head = json.loads(target.head[8:])
        assert head["__metadata__"] == {"format": "pt", "more": "of it"}
    checkpoint = Checkpoint.open(base)
    (base / INDEX).write_text("[]")
    refused(lambda: sharded(checkpoint, 20_000), CheckpointError, INDEX, "is not a readable index")


def test_the_bases_index_is_not_carried_over(base: Path) -> None:
    checkpoint = Checkpoint.open(base)
    assert INDEX in {path.name for path in lay_out(checkpoint, None).companions}
    for size in (20_000, 1 << 30):
        layout = lay_out(checkpoint, size)
        assert {path.name for path in layout.companions} == {
            path.name for path in checkpoint.companions() if path.name != INDEX
        }
    assert layout.index is None


def test_safetensors_reads_a_new_file_of_any_dtype(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {"a": (3, 8), "ü": (2, 2, 4), "scalar": (), "none": (0, 5)}
    known = {
        "F4",
        "F6_E2M3",
        "F6_E3M2",
        "F8_E8M0",
        "F8_E4M3FNUZ",
        "F8_E5M2FNUZ",
        "C64",
    }  # not in every version's Python
    for dtype in DTYPE_BITS.keys() - known:
        tensors = {f"{name} {dtype}": TensorInfo(dtype, shape, 0, 0) for name, shape in shapes.items()}
        target = new_target(f"{dtype}.safetensors", tensors, {"format": "pt"})
        path = tmp_path / target.name
        path.write_bytes(target.head + bytes(target.size - len(target.head)))
        header = read_header(path)
        assert list(header.tensors) == list(tensors) and header.metadata == {"format": "pt"}
        assert {name: header.data_start + info.start for name, info in header.tensors.items()} == target.offsets
        with safe_open(path, "pt") as file:
            assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == {  # noqa: SIM118
                name: info.shape for name, info in tensors.items()
            }
    assert b"__metadata__" not in new_target("x", {}, {}).head


def test_each_tensor_lies_where_its_values_are_aligned(tmp_path: Path) -> None:
    """One bf16 scalar before a matrix of fp32, in another shard of the base, and readers that map the file stumble."""
    tensors = {"a": torch.ones(4, 3), "b": torch.ones((), dtype=torch.bfloat16), "c": torch.ones(5, dtype=torch.uint8)}
    parts = [tensors, {"d": torch.ones(3), "e": torch.ones(3, dtype=torch.float64), "f": torch.ones(2).half()}]
    for number, part in enumerate(parts):
        save_file(part, tmp_path / f"{number}.safetensors", metadata={"format": "pt"})
    weight_map = {name: f"{number}.safetensors" for number, part in enumerate(parts) for name in part}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    out = write(tmp_path / "out", Checkpoint.open(tmp_path), 1 << 20)
    header = read_header(out / "model.safetensors")
    for name, info in header.tensors.items():
        assert (header.data_start + info.start) % (DTYPE_BITS[info.dtype] // 8) == 0, name
    assert load_file(out / "model.safetensors").keys() == weight_map.keys()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000),
        ("500MB", 500_000_000),
        ("2GiB", 2 << 30),
        ("2gib", 2 << 30),
        ("1.5kb", 1500),
        (" 7 K ", 7000),
        ("3Ti", 3 << 40),
        ("12", 12),
        ("12B", 12),
        ("0.5KiB", 512),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "5 apples", "-5GB", "1e9", "5iB", "5GBB", "0", "0.4", "0GB", "9" * 400, "nan"]
)
def test_what_is_no_size(text: str) -> None:
    refused(lambda: parse_size(text), UsageError, "the size ", "write")


@given(number=st.integers(1, 1 << 50))
def test_a_plain_number_is_bytes(number: int) -> None:
    assert parse_size(str(number)) == number
