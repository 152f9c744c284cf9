"""What a task's rows send through the matrices of a base model, see `moments`: one pass forward and back over them.

The base is frozen, and nobody's adapter is on it, or the task's own alone. The loss is a sum over answer tokens, so
the gradient at a token is that of its own row's loss, in whatever batch it stands. The p-th token of an answer counts
1 / p, see `probe.opening_loss`; of a text that stands for a task all tokens count alike, each as an answer of its own.

Through its adapter, a task's loss is that of answers drawn from the model, token by token behind the true ones. Squared
gradients of what a model says itself are how much its words hang on a matrix (the Fisher information); those of true
answers vanish wherever an adapter is sure of them, however easily it could be talked out of it.
"""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .adapter import Adapter
from .attention import use_packed_attention
from .dataset import Example
from .errors import DataError, GeometryError
from .geometry import Geometry, Names
from .loading import load_base, load_model
from .moments import FLOATS, INTS, Moments, Site
from .probe import BATCH_TOKENS, Batch, Say, batches, opening_loss
from .quantization import widen
from .trainer import answer_loss
from .tuner import SboraLayer
from .untrusted import open_file
from .view import Kind

CHUNK = 256  # tokens of a chunk of text
_DRAWN = 256  # answer tokens that are drawn at a time
_CHARACTERS = 8  # that a token of a text may have on average; where they are more, fewer chunks are found


def measure(
    model: Any,
    examples: Sequence[Example],
    task: str,
    *,
    geometry: Geometry,
    base_fingerprint: str,
    modules: Sequence[str] | None = None,
    channels: Mapping[str, Sequence[int]] | None = None,
    source: Literal["task", "text"] = "task",
    adapter: str | None = None,
    tokens: int = BATCH_TOKENS,
) -> Moments:
    """The moments of some examples on a base model, which stays as it is.

    Sums are fp32, of values in the model's own dtype. The same on one machine and number of threads; another size of
    batch changes roundings alone. (Drawn answers may then have other words, since a draw falls where rounded chances
    put it: moments differ by that as between two draws.)

    Args:
        model: as `load_model` gives it; a transformers model, or the one in a PeftModel, adapter and all.
        task: whose examples they are.
        geometry: of the model; its names are those of `modules`, `channels` and the answer.
        base_fingerprint: `stream.fingerprint` of the checkpoint.
        modules: those to measure; None: every matrix that is a linear layer of the live model.
        channels: module -> input channels of its block; none where it is not named.
        source: "text" where the examples stand for those of the task.
        adapter: digest of the adapter that is on the model, which the task's examples go through; their answers are
            drawn from it then.
        tokens: of a batch, see `probe.batches`.

    Raises:
        DataError: there are no examples, or the model gives values on them that are not finite.
        GeometryError: a module is not in the model, or is no linear layer of it.
    """
    if not examples:
        raise DataError(f"task {task} has no rows to measure: name rows in its recipe, or give a text with --text")
    layers = find_layers(model, geometry, modules)
    sums = {module: _Sums(layer, *geometry.find(module).shape) for module, layer in layers.items()}
    for module, wanted in (channels or {}).items():
        if module in sums:
            sums[module].block_of(wanted)
    draws = np.random.default_rng(0)
    with _watching(model, sums):
        for batch in batches(model, examples, tokens):
            outputs = model(**batch.inputs)
            if adapter is not None:
                batch = drawn_answers(outputs, batch, draws)
            loss = opening_loss(outputs, batch) if source == "task" else answer_loss(outputs, batch.labels, 1)
            if not torch.isfinite(loss):
                raise DataError(
                    f"task {task}: the {'base model' if adapter is None else 'adapter'}'s loss on its rows is "
                    f"{float(loss.detach())}, nothing can be measured: check the weights with `multisbora eval`"
                )
            loss.backward()
    total = sum(len(example.input_ids) for example in examples)
    answers = len(examples) if source == "task" else total
    sites = {module: found.site(answers) for module, found in sums.items()}
    for module, site in sites.items():
        if not all(np.isfinite(values).all() for values in (site.energy, site.response, site.block)):
            raise DataError(
                f"task {task}: what its rows send through {module} is not finite: load the base in another dtype, or "
                "check its weights"
            )
    told = source if adapter is None else "adapter"
    return Moments(task, base_fingerprint, geometry.digest, len(examples), total, sites, told, adapter)


@torch.no_grad()
def drawn_answers(outputs: Any, batch: Batch, draws: np.random.Generator) -> Batch:
    """A batch with answer tokens that are drawn from what the model says there, one draw a token."""
    answered = batch.places > 0
    found = []
    for logits in outputs.logits[answered].split(_DRAWN):  # (tokens, vocabulary)
        chances = logits.cpu().double().softmax(-1).cumsum(-1)  # not every accelerator has fp64
        draw = torch.from_numpy(draws.random(len(chances)))[:, None]
        found.append(torch.searchsorted(chances, draw * chances[:, -1:], right=True)[:, 0])
    labels = batch.labels.clone()
    labels[answered] = torch.cat(found).clamp(max=outputs.logits.shape[-1] - 1).to(labels.device)
    return replace(batch, labels=labels)


def find_layers(model: Any, geometry: Geometry, modules: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The linear layers of a live model, by the names of a geometry.

    Args:
        modules: None: all that there are, without what the live model has no layer for, such as fused experts.

    Raises:
        GeometryError: the model has no such layer, or none at all.
    """
    adapted = {name: layer for name, layer in model.named_modules() if isinstance(layer, SboraLayer)}
    live = adapted | {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and name.removesuffix(".base_layer") not in adapted
    }
    names = Names(live)
    chosen = geometry.matrices if modules is None else [geometry.find(module) for module in modules]
    found: dict[str, nn.Module] = {}
    for matrix in chosen:
        layers = names.find(matrix.module)
        if len(layers) == 1:
            found[matrix.module] = live[layers[0]]
        elif modules is not None:
            raise GeometryError(
                f"{matrix.module} is no linear layer of the live {geometry.model}: it cannot be measured"
            )
    if not found:
        raise GeometryError(f"no matrix of {geometry.model} is a linear layer of the live model: nothing to measure")
    return found


def open_base(folder: Path, quantization: Kind | None, say: Say) -> Any:
    """A base model to measure, in eval mode, on the accelerator if there is one.

    Raises:
        CheckpointError: it is no causal language model, is damaged, or lacks tensors.
    """
    model = load_base(folder, quantization)
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    return _ready(model, say)


def open_trained(folder: Path, adapter: Adapter, say: Say) -> Any:
    """A base model with one task's adapter on it, as it was trained, to measure.

    Raises:
        CheckpointError, AdapterError: as `load_model`.
    """
    found, _ = load_model(adapter.path, folder, say=say)
    return _ready(found.get_base_model(), say)


def _ready(model: Any, say: Say) -> Any:
    """A model that gives gradients, in eval mode."""
    if model.dtype == torch.float16:
        say("the base is fp16, whose gradients vanish without loss scaling: measuring in fp32")
        widen(model)
    use_packed_attention(model)
    return model.eval()


def text_examples(path: Path, tokenizer: Any, rows: int, longest: int) -> list[Example]:
    """The first chunks of a plain text, as examples of which every token but the first is an answer token.

    Args:
        rows: how many at most.
        longest: tokens that the model reads at a time; a chunk has CHUNK at most.

    Raises:
        DataError: the file is missing or no UTF-8 text, or has fewer than two tokens.
    """
    size = min(CHUNK, longest)
    try:
        with open_file(path) as file:
            raw = file.read(rows * size * _CHARACTERS)
        # What is read may end inside a character where the text goes on.
        text = codecs.getincrementaldecoder("utf-8")().decode(raw, len(raw) < rows * size * _CHARACTERS)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: give a file of plain text") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text: give a file of plain text") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    # A model that knows each text to begin with a token of its own finds it at the start of every chunk.
    start = [token for token in tokenizer("").input_ids[:1] if token == tokenizer.bos_token_id]
    step = size - len(start)
    chunks = [start + ids[place : place + step] for place in range(0, len(ids), step)]
    examples = [Example(chunk, 1, row) for row, chunk in enumerate(chunks[:rows], 1) if len(chunk) > 1]
    if not examples:
        raise DataError(f"{path} holds no text to measure: give a file of some thousand words")
    return examples


class _Sums:
    """Sums over tokens at one linear layer, (out, in)."""

    def __init__(self, layer: nn.Module, out_features: int, in_features: int) -> None:
        self.layer = layer
        options: dict[str, Any] = {"dtype": torch.float32, "device": next(layer.parameters()).device}
        self.energy = torch.zeros(in_features, **options)
        self.response = torch.zeros(out_features, **options)
        self.channels = torch.zeros(0, dtype=torch.long, device=options["device"])
        self.block = torch.zeros(0, 0, **options)

    def block_of(self, channels: Sequence[int]) -> None:
        self.channels = torch.tensor(sorted(set(channels)), dtype=torch.long, device=self.energy.device)
        self.block = self.energy.new_zeros(len(self.channels), len(self.channels))

    def watch(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """A forward hook."""
        x = (args[0] if args else kwargs["input"]).detach()
        if output.requires_grad:
            output.register_hook(lambda gradient: self._add(x, gradient))

    def _add(self, x: Tensor, gradient: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()  # (tokens, in)
        squares = gradient.reshape(-1, gradient.shape[-1]).float().square()  # (tokens, out)
        weights = squares.sum(1)  # (tokens,)
        self.response += squares.sum(0)
        self.energy += weights @ x.square()
        if len(self.channels):
            part = x[:, self.channels] * weights.sqrt()[:, None]  # (tokens, n)
            self.block += part.T @ part

    def site(self, rows: int) -> Site:
        """The means over rows."""
        block = (self.block + self.block.T) / 2  # a product of matrices rounds both halves in its own way
        return Site(
            energy=(self.energy / rows).cpu().numpy().astype(FLOATS),
            response=(self.response / rows).cpu().numpy().astype(FLOATS),
            channels=self.channels.cpu().numpy().astype(INTS),
            block=(block / rows).cpu().numpy().astype(FLOATS),
        )


@contextlib.contextmanager
def _watching(model: Any, sums: Mapping[str, _Sums]) -> Iterator[None]:
    """Let a model's layers tell their sums, with gradients at what they put out and of no weight."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    mode = model.training
    hooks = [found.layer.register_forward_hook(found.watch, with_kwargs=True) for found in sums.values()]
    # Nothing else of a frozen model asks for a gradient.
    hooks.append(model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_(True)))
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        model.eval()
        with torch.enable_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in learning:
            parameter.requires_grad_(True)
        model.train(mode)
