"""The peers of study_composition.py: what others train and merge, at the number of trainable values that ours have.

    lora         PEFT's LoRA
    osrm         the same, but A starts in the directions in which the OTHER tasks' inputs vary least (OSRM, 2505.22934)
    lori-dense   A stays as it was drawn, B is trained (LoRI-D, 2504.07448)
    lori         of such a B the tenth of largest entries in each matrix, trained anew from zero (LoRI-S)

They are trained by multisbora's own Trainer, on the examples that `multisbora train` makes of the same recipe, in the
same order, with the same optimizer, schedule and clipping: `batches_of` shows that. What they have of their own is the
model. They are merged by PEFT's add_weighted_adapter, with its defaults and density 0.5 where it wants one; svd leaves
the columns out that it would cut off anyway.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from multisbora.attention import use_packed_attention
from multisbora.dataset import Encoded, Example, encode, load_rows, packs, split
from multisbora.distributed import Processes
from multisbora.loading import load_base, load_tokenizer, quiet
from multisbora.probe import batches
from multisbora.publish import publish
from multisbora.recipe import Recipe
from multisbora.run import METRICS_FILE
from multisbora.trainer import TaskTrainer

PEERS = ("lora", "osrm", "lori-dense", "lori")
MERGED = "merged"
MERGES = ("cat", "linear", "svd", "ties", "dare_ties", "magnitude_prune", "ties_svd")
DENSITY = 0.5  # of what these keep; PEFT has no default for it
SHARE = 0.1  # of the entries of B that LoRI-S trains, as in its paper
LORA_ROW = 1 / math.sqrt(3)  # norm of a row of A as PEFT draws it: uniform within +-1/sqrt(in)


# ------------------------------------------------------------------------------------------------------------ adapters


def adapt(base: Any, kind: str, rank: int, targets: Sequence[str], seed: str) -> peft.PeftModel:
    """A base with one fresh adapter, named "default", that changes nothing yet. Its A follows from `seed` alone.

    Scaling is alpha / rank = 2 as the paper has it; LoRI's too.
    """
    if kind not in PEERS:
        raise ValueError(f"{kind!r} is none of {', '.join(PEERS)}")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=list(targets))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:6], "big"))
        model = peft.get_peft_model(base, config)
    if kind.startswith("lori"):
        for layer in layers(model).values():
            layer.lora_A["default"].weight.requires_grad_(False)
    return model


def layers(model: Any) -> dict[str, Any]:
    """{module: PEFT's layer}."""
    return {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}


def largest(values: Tensor, share: float = SHARE) -> Tensor:
    """Where the largest entries of a matrix are, by size: True at a `share` of them, at least one."""
    count = max(1, round(share * values.numel()))
    kept = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    kept[values.abs().flatten().topk(count).indices] = True
    return kept.view_as(values)


def train_only(model: Any, masks: Mapping[str, Tensor]) -> int:
    """Have each B trained where its mask says so, and stay at zero elsewhere. How many entries that are."""
    for name, layer in layers(model).items():
        weight = layer.lora_B["default"].weight
        mask = masks[name].to(weight)
        # Adam moves an entry that never had a gradient nowhere, and there is no weight decay.
        weight.register_hook(lambda gradient, mask=mask: gradient * mask)
    return int(sum(mask.sum() for mask in masks.values()))


def masks_of(folder: Path) -> dict[str, Tensor]:
    """{module: mask of B} of a trained lori-dense adapter."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    end, head = ".lora_B.weight", "base_model.model."
    return {
        key.removesuffix(end).removeprefix(head): largest(value) for key, value in tensors.items() if key.endswith(end)
    }


@torch.no_grad()
def input_moments(model: Any, targets: Sequence[str], examples: Sequence[Sequence[Example]]) -> dict[str, Tensor]:
    """Second moments of what each targeted matrix gets, {module: (in, in)} fp32, as the mean over tasks.

    Args:
        model: the base, whose attention keeps packed examples apart.
        examples: of each task. A task counts as much as any other, however long its rows are.
    """
    found: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    modules = {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in targets and isinstance(m, nn.Linear)}

    def watch(name: str) -> Any:
        def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2).float()  # (tokens, in)
            sums[name] = sums[name].addmm_(x.T, x) if name in sums else x.T @ x

        return see

    looked = [[batch.inputs for batch in batches(model, rows)] for rows in examples]  # which runs the model, too
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    try:
        for rows, groups in zip(examples, looked, strict=True):
            sums.clear()
            for inputs in groups:
                model(**inputs)
            tokens = sum(len(example.input_ids) for example in rows)
            for name, total in sums.items():
                part = total / (tokens * len(examples))
                found[name] = found[name] + part if name in found else part
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def start_quietly(model: Any, moments: Mapping[str, Tensor]) -> None:
    """Set each A to the directions of least variance, orthogonal rows as long as those of LoRA's own start."""
    for name, layer in layers(model).items():
        weight = layer.lora_A["default"].weight  # (r, in)
        directions = torch.linalg.eigh(moments[name].double()).eigenvectors  # columns, least variance first
        weight.copy_(directions[:, : len(weight)].T * LORA_ROW)


# ------------------------------------------------------------------------------------------------------------ training


def examples_of(recipe: Recipe, tokenizer: Any) -> tuple[Encoded, Encoded]:
    """(train, dev) as `multisbora train` makes them; the recipe names dev rows."""
    rows, dev, test = (
        [row for _, row in load_rows(source)] for source in (recipe.train, recipe.dev or (), recipe.eval.data)
    )
    parts = split(recipe, rows, dev, test)
    cutoff = recipe.training.cutoff
    return encode(recipe, parts.train, tokenizer, cutoff), encode(recipe, parts.dev, tokenizer, cutoff, "dev row")


def train_peer(
    base: Path,
    recipe: Recipe,
    kind: str,
    rank: int,
    targets: Sequence[str],
    output: Path,
    *,
    others: Sequence[Recipe] = (),
    other_rows: int = 128,
    dense: Path | None = None,
) -> dict[str, Any]:
    """Train one peer's adapter of one task into a PEFT folder. A run that was cut short begins anew.

    Args:
        others: recipes of the other tasks; osrm looks at dev rows of theirs.
        dense: the lori-dense adapter that lori takes its masks from.

    Returns:
        what `multisbora train` keeps in training.json, as far as the study reads it.
    """
    tokenizer = load_tokenizer(base)
    train, dev = examples_of(recipe, tokenizer)
    model = load_base(base)
    model.config.get_text_config().use_cache = False
    use_packed_attention(model)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    started = time.monotonic()
    moments = {}
    if kind == "osrm":
        looked = [examples_of(other, tokenizer)[1].examples[:other_rows] for other in others]
        moments = input_moments(model.eval(), targets, looked)
    adapted = adapt(model, kind, rank, targets, f"{recipe.name} {recipe.training.seed}")
    values = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    if kind == "osrm":
        start_quietly(adapted, moments)
    if kind == "lori":
        if dense is None:
            raise ValueError("lori needs the lori-dense adapter that its masks come from")
        values = train_only(adapted, masks_of(dense))
    run = output.with_name(f"{output.name}.run")
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    trainer = TaskTrainer(
        adapted,
        recipe,
        run,
        train.examples,
        dev.examples,
        Processes.promised(),
        packed=packs(model),
        show=lambda example: str(tokenizer.decode(example.input_ids)),
    )
    trainer.train()
    summary = {
        "steps": trainer.state.global_step,
        "tokens": int(trainer.state.num_input_tokens_seen),
        "loss": trainer.metrics.loss,
        "dev_loss": trainer.state.best_metric,
        "train_digest": train.digest,
        "trainable_parameters": values,
        "seconds": round(time.monotonic() - started, 1),
    }
    shutil.rmtree(output, ignore_errors=True)
    with publish(output) as partial:
        adapted.save_pretrained(partial, save_embedding_layers=False)
        (partial / "training.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(run / METRICS_FILE, partial / METRICS_FILE)
    shutil.rmtree(run)
    return summary


def batches_of(adapter: Path) -> str:
    """A digest of the batches that an adapter was trained on, ours or a peer's: its examples in their order, and the
    tokens that it had seen after each step."""
    summary = json.loads((adapter / "training.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (adapter / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    seen = [[line["step"], line["tokens"]] for line in lines if "tokens" in line]
    return hashlib.sha256(json.dumps([summary["train_digest"], seen]).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------- merging


def load_peers(base: Path, adapters: Mapping[str, Path]) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer): a base with the adapters of tasks, each under its task's name."""
    model: Any = load_base(base)
    use_packed_attention(model)
    for task, folder in adapters.items():
        with quiet():
            if isinstance(model, peft.PeftModel):
                model.load_adapter(folder, task)
            else:
                model = peft.PeftModel.from_pretrained(model, folder, adapter_name=task)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model.eval(), load_tokenizer(base)


@contextlib.contextmanager
def combined(model: Any, weights: Mapping[str, float], how: str) -> Iterator[None]:
    """Have some tasks active, as `how` of PEFT's ways of adding adapters up makes one of them; no task is the base.

    One task at 1 is its own adapter, whatever `how` is.
    """
    if not weights:
        with model.disable_adapter():
            yield
        return
    if list(weights.values()) == [1.0]:
        model.set_adapter(next(iter(weights)))
        yield
        return
    options: dict[str, Any] = {}
    if "svd" in how:
        options["svd_full_matrices"] = False
    if how not in ("cat", "linear", "svd"):
        options["density"] = DENSITY
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # dare drops entries at random
        model.add_weighted_adapter(list(weights), list(weights.values()), MERGED, combination_type=how, **options)
    model.set_adapter(MERGED)
    try:
        yield
    finally:
        model.set_adapter(next(iter(weights)))
        model.delete_adapter(MERGED)
