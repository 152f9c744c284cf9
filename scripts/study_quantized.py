#!/usr/bin/env python3
"""QSBoRA on a real model and real data: a task trained on an NF4 base beside the same task on the base as stored.

    scripts/study_quantized.py --data DIR --work DIR

DIR of --data holds math/{train,test}.jsonl (or those of --task), rows with the fields subset, instruction, output,
answer (the LLM-Adapters format). Each adapter is merged onto both views of the base where both mean something, every
merge is proven, and base, adapters and merged checkpoints are scored on both views, by the NLL of the right answers.
Every step is a `multisbora` command; what is there already is not done again, so a run that was cut short goes on. It
needs about an hour on two cores with 60 steps and 100 rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies import multisbora, side_by_side

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SETTINGS = ["training.learning_rate=1e-3", "training.warmup_steps=20", "training.save_steps=50"]
# Of the answers that would be generated none is looked at.
EVAL = ["--num-beams", "1", "--max-new-tokens", "1", "--batch-size", "32", "--json"]
VIEWS = ("original", "dequantized")


@dataclass(frozen=True)
class Study:
    """What was asked for. Each base, as stored and quantised, is a project folder of its own with the same claims."""

    data: Path
    work: Path
    task: str
    variant: str
    kind: str
    steps: int
    rows: int

    @property
    def sets(self) -> list[str]:
        data = self.data / self.task
        given = [f"train={data}/train.jsonl", f"eval.data={data}/test.jsonl", *SETTINGS]
        return [part for setting in given for part in ("--set", setting)]

    @property
    def folders(self) -> dict[str, Path]:
        return {
            "original": self.work / f"{self.variant}-original",
            "dequantized": self.work / f"{self.variant}-{self.kind}",
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--task", default="math")
    parser.add_argument("--variant", default="fa", choices=["fa", "fb"])
    parser.add_argument("--quantization", default="nf4", choices=["nf4", "int8"])
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each run")
    parser.add_argument("--rows", type=int, default=100, help="test rows, the same for every model")
    given = parser.parse_args()
    study = Study(
        given.data.resolve(),
        given.work.resolve(),
        given.task,
        given.variant,
        given.quantization,
        given.steps,
        given.rows,
    )
    train(study)
    proofs = merge(study)
    scores = score(study)
    print("\n".join(report(study, scores, proofs)))


def train(study: Study) -> None:
    jobs = []
    for trained_on, folder in study.folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "multisbora.yaml").is_file():
            multisbora(folder, ["init", "--model", MODEL, "--variant", study.variant, "--rank", "64"])
        multisbora(folder, ["allocate", "--tasks", study.task])
        if not (folder / "adapters" / study.task).is_dir():
            quantization = ["--quantization", study.kind] if trained_on == "dequantized" else []
            steps = ["--max-steps", str(study.steps)]
            jobs.append((folder, ["train", "--task", study.task, *steps, *quantization, *study.sets], None))
    side_by_side(jobs)


def merge(study: Study) -> dict[tuple[str, str], dict[str, Any]]:
    """(view trained on, view merged onto) -> its proof. What was trained on the stored base knows no other."""
    proofs = {}
    for trained_on, folder in study.folders.items():
        for view in VIEWS if trained_on == "dequantized" else ("original",):
            if not (folder / f"merged-{view}").is_dir():
                multisbora(folder, ["merge", "--base-view", view, "--output", f"merged-{view}"])
            proofs[trained_on, view] = json.loads(multisbora(folder, ["verify", f"merged-{view}", "--json"]))
    return proofs


def score(study: Study) -> dict[tuple[str, str, str], dict[str, Any]]:
    """(model, view trained on, view scored on) -> scores."""
    quantize = {"original": [], "dequantized": ["--base-view", "dequantized", "--quantization", study.kind]}
    wanted: dict[tuple[str, str, str], tuple[Path, list[str]]] = {}
    for trained_on, folder in study.folders.items():
        wanted["base", "-", trained_on] = (folder, [MODEL, *quantize[trained_on]])
        own = f"adapters/{study.task}"
        for view in VIEWS:
            # An adapter of the quantised base says itself how that was quantised.
            options = ["--base-view", view] if trained_on == "dequantized" else quantize[view]
            wanted["own adapter", trained_on, view] = (folder, [own, *options])
            if (folder / f"merged-{view}").is_dir():
                wanted["merged", trained_on, view] = (folder, [f"merged-{view}"])
    files = {}
    jobs = []
    for (model, trained_on, view), (folder, path) in wanted.items():
        target = folder / f"scores-{model.split()[0]}-{view}-{study.task}-{study.rows}.json"
        files[model, trained_on, view] = target
        if not target.is_file():
            command = ["eval", *path, "--tasks", study.task, "--limit", str(study.rows), *EVAL, *study.sets]
            jobs.append((folder, command, target))
    side_by_side(jobs)
    return {key: json.loads(path.read_text())["tasks"][study.task] for key, path in files.items()}


def report(
    study: Study, scores: dict[tuple[str, str, str], dict[str, Any]], proofs: dict[tuple[str, str], dict[str, Any]]
) -> Iterator[str]:
    names = {"-": "-", "original": "as stored", "dequantized": study.kind}
    subsets = list(next(iter(scores.values()))["subsets"])
    yield f"| model | trained on | base view | {study.task} NLL | " + " | ".join(f"{s} NLL" for s in subsets) + " |"
    yield "| --- | --- | --- |" + " --- |" * (1 + len(subsets))
    order = {"base": 0, "own adapter": 1, "merged": 2}
    for model, trained_on, view in sorted(
        scores, key=lambda key: (order[key[0]], VIEWS.index(key[2]), key[1] != "original")
    ):
        found = scores[model, trained_on, view]
        cells = [figure(found["nll"]), *(figure(found["subsets"][s]["nll"]) for s in subsets)]
        yield f"| {model} | {names[trained_on]} | {view} | " + " | ".join(cells) + " |"
    yield ""
    for (trained_on, view), proof in proofs.items():
        yield (
            f"trained on {names[trained_on]}, merged onto {view}: verify ok {proof['ok']}, {proof['tensors']} tensors, "
            f"{proof['cells_changed']:,} cells changed, outside regions {proof['cells_outside_regions']}"
        )
    for trained_on, folder in study.folders.items():
        adapter = folder / "adapters" / study.task
        training = json.loads((adapter / "training.json").read_text())
        lines = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]
        speed = statistics.median(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
        losses = [line["loss"] for line in lines if "loss" in line]
        yield (
            f"trained on {names[trained_on]}: {training['steps']} steps, {training['tokens']:,} tokens, loss "
            f"{losses[0]:.3f} to {losses[-1]:.3f}, median {speed:.0f} tokens/s beside the other run"
        )


def figure(nll: float | None) -> str:
    return "-" if nll is None else f"{nll:.4f}"


if __name__ == "__main__":
    main()
