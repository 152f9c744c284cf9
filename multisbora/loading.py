"""Models from folders into memory: a base or merged checkpoint, alone or with adapters on it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .adapter import CONFIG_FILE, Adapter, training_record
from .checkpoint import RECEIPT_FILE, Checkpoint
from .errors import AdapterError, CheckpointError, UsageError
from .geometry import from_checkpoint
from .quantization import describe, loading_options, one_thread, prepare
from .stream import fingerprint
from .tuner import SboraLayer
from .view import Kind, Quantization, choose_view

Say = Callable[[str], None]


def load_model(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    adapters: Sequence[str | os.PathLike[str]] = (),
    *,
    base_view: str | None = None,
    quantization: Kind | None = None,
    say: Say = lambda message: None,
) -> tuple[Any, Any]:
    """A model in eval mode, on the accelerator if there is one, and its tokenizer. Safetensors only, no remote code.

    Args:
        path: a model folder (a base or a merged checkpoint), or an adapter folder, which needs `base`.
        base: folder of the base model that an adapter is of; not looked at where `path` is a model folder.
        adapters: folders of further adapters. All adapters are active; PEFT knows them as adapter0, adapter1, ...,
            that of `path` first.
        base_view: the view of the base that adapters are put on, "original" or "dequantized"; None takes the one that
            they were trained on. The dequantised one is the quantised base itself, as it was trained on.
        quantization: quantise a plain base so, or the base of adapters that were trained on the original one; the
            others say themselves how their base is quantised.

    Returns:
        (model, tokenizer): a transformers model, in a PeftModel where there are adapters.

    Raises:
        UsageError: an adapter folder without a base, two adapters of one task, or a view that is not known.
        CheckpointError: the model is missing, damaged, incomplete, or no causal language model.
        AdapterError: an adapter is damaged, or of another base.
    """
    path = Path(path)
    folders = [Path(folder) for folder in adapters]
    if (path / CONFIG_FILE).is_file():
        if base is None:
            raise UsageError(f"{path} is an adapter: give the base model that it was trained on too")
        folders.insert(0, path)
        path = Path(base)
    read = [Adapter.read(folder) for folder in folders]
    for i, adapter in enumerate(read):
        if twin := next((other for other in read[:i] if other.task == adapter.task), None):
            raise UsageError(f"{twin.path} and {adapter.path} are both task {adapter.task!r}: give one of them")
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder: give the folder of a model or of an adapter")
    Checkpoint.open(path)  # a missing, truncated or corrupt file, in one clear line
    view = _view(read, path, base_view, quantization)
    _check_base(read, path, say)
    tokenizer = load_tokenizer(path)
    _check_vocabulary(read, path, tokenizer, say)
    model = load_base(path, view)
    if isinstance(view, Quantization) and describe(model) != view:
        told = next(adapter for adapter in read if adapter.quantization == view)
        raise AdapterError(
            f"{told.path}: {path} quantised here is not, bit for bit, the base of its training: install the version "
            "of bitsandbytes that it was trained with, or say --base-view original"
        )
    if read:
        model = _with_adapters(model, read)
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    return model.eval(), tokenizer


def _view(adapters: list[Adapter], path: Path, asked: str | None, kind: Kind | None) -> Quantization | Kind | None:
    """The quantisation that adapters recorded, or the kind that was asked for, or none."""
    trained = {adapter.task: adapter.quantization for adapter in adapters}
    if kind is None:
        if asked == "dequantized" and not any(trained.values()):
            raise UsageError(f"nothing says how {path} is to be quantised: say --quantization nf4 or int8 too")
        return choose_view(trained, asked)
    if asked == "original":
        raise UsageError(f"--base-view original is the base as it is stored: leave --quantization {kind} out")
    if told := next((adapter for adapter in adapters if adapter.quantization), None):
        raise UsageError(f"{told.path} says itself how its base was quantised: leave --quantization {kind} out")
    if (path / RECEIPT_FILE).is_file():
        raise UsageError(f"{path} is a merged checkpoint, whose view was chosen when it was merged: take none here")
    if asked not in (None, "dequantized"):
        raise UsageError(f"base view {asked!r} is unknown: use original or dequantized")
    return kind


def _check_base(adapters: list[Adapter], base: Path, say: Say) -> None:
    if not adapters:
        return
    geometry = from_checkpoint(base)
    base_print = fingerprint(base, geometry)
    for adapter in adapters:
        if adapter.base_fingerprint is None:
            say(f"{adapter.path} does not say which base it was trained on: its scores are right if {base} is it")
        elif adapter.base_fingerprint != base_print:
            raise AdapterError(
                f"{adapter.path} was trained on another base than {base} (fingerprint "
                f"{adapter.base_fingerprint[:12]}, not {base_print[:12]}): evaluate it on its own base"
            )
        adapter.fit(geometry)


def _check_vocabulary(adapters: list[Adapter], base: Path, tokenizer: Any, say: Say) -> None:
    """Say where a token has another number than in training, as far as an adapter's folder tells."""
    found = vocabulary_digest(tokenizer) if adapters else ""
    for adapter in adapters:
        if training_record(adapter.path).get("vocabulary_digest", found) != found:
            say(
                f"{adapter.path} was trained with another vocabulary than the tokenizer of {base} has: its tokens mean "
                "something else to it, so take the tokenizer of its training"
            )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder. No remote code.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    with _loading(folder, "its tokenizer"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def vocabulary_digest(tokenizer: Any) -> str:
    """SHA-256 of which number each token of a tokenizer has."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def load_config(folder: Path) -> Any:
    """The transformers config of a checkpoint.

    Raises:
        CheckpointError: transformers does not know the model.
    """
    with _loading(folder, "a model's config"):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def load_base(folder: Path, quantization: Kind | Quantization | None = None) -> Any:
    """A transformers model in its stored dtype, from a folder of safetensors. No remote code.

    Args:
        quantization: quantise its linear layers, but for the head, while it is loaded, and leave it on the accelerator
            if there is one. Its weights stay exact, see `quantization.keep_exact`.

    Raises:
        CheckpointError: it is no causal language model, is damaged, or lacks tensors.
        UsageError: `quantization` is unknown.
    """
    options = {} if quantization is None else loading_options(quantization)
    with _loading(folder, "a causal language model"), one_thread() if quantization else contextlib.nullcontext():
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors of its model, {missing[0]} first: fetch or merge it again"
        )
    if quantization is not None:
        prepare(model)
    return model


@contextlib.contextmanager
def _loading(folder: Path, what: str) -> Iterator[None]:
    with quiet():
        try:
            yield
        except Exception as error:  # every model's and tokenizer's own code runs in there
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{folder} cannot be loaded as {what}: {reason}") from None


def _with_adapters(model: Any, adapters: list[Adapter]) -> peft.PeftModel:
    names = [f"adapter{i}" for i in range(len(adapters))]
    for name, adapter in zip(names, adapters, strict=True):
        with quiet():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error below
            try:
                if isinstance(model, peft.PeftModel):
                    model.load_adapter(adapter.path, name)
                else:
                    model = peft.PeftModel.from_pretrained(model, adapter.path, name)
            except (RuntimeError, ValueError, KeyError, UsageError) as error:
                reason = " ".join(str(error).split())[:300]
                raise AdapterError(f"{adapter.path} cannot be put into this base: {reason}") from None
        modules = model.get_base_model().named_modules()
        live = {module for module, layer in modules if isinstance(layer, SboraLayer) and name in layer.sbora_values}
        if odd := sorted(live ^ set(adapter.modules)):
            raise AdapterError(
                f"{adapter.path}: {CONFIG_FILE} and its tensors are about different modules, {odd[0]} first: "
                "fetch or train the adapter again"
            )
    model.base_model.set_adapter(names, inference_mode=True)
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Loading draws bars, reports missing tensors and warns about its own future; we say what matters ourselves."""
    logging = transformers.utils.logging
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
