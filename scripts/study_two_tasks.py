#!/usr/bin/env python3
"""The main job on a real model and real data: two tasks trained apart, merged, proven, scored (docs/results.md).

    scripts/study_two_tasks.py --data DIR --work DIR

DIR of --data holds math/{train,test}.jsonl and commonsense/{train,test}.jsonl, rows with the fields subset,
instruction, output, answer (the LLM-Adapters format). Every step is a `multisbora` command or the public interface;
what is there already is not done again, so a run that was cut short goes on. Needs about 90 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from studies import multisbora, side_by_side

TASKS = {"math": 250, "commonsense": 225}  # optimizer steps: at least 300k training tokens each
SETTINGS = ["training.learning_rate=1e-3", "training.warmup_steps=20", "training.save_steps=50"]
EVAL = ["--num-beams", "1", "--max-new-tokens", "128", "--batch-size", "32", "--json"]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

# Runs with stock PEFT alone: what another user of the exported folder would do.
STOCK = """
import sys, torch, peft
from transformers import AutoModelForCausalLM
base, adapter, ids, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = peft.PeftModel.from_pretrained(model, adapter).eval()
assert not any(name.startswith("multisbora") for name in sys.modules)
with torch.no_grad():
    torch.save([model(x).logits for x in torch.load(ids)], out)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--variants", default="fa,fb")
    parser.add_argument("--rows", type=int, default=300, help="test rows a task, the same for every model")
    options = parser.parse_args()
    data, variants = options.data.resolve(), options.variants.split(",")
    folders = {variant: options.work.resolve() / variant for variant in variants}

    jobs: list[tuple[Path, list[str], Path | None]] = []
    for variant, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "multisbora.yaml").is_file():
            multisbora(folder, ["init", "--model", MODEL, "--variant", variant, "--rank", "64"])
        multisbora(folder, ["allocate", "--tasks", ",".join(TASKS)])
        for task, steps in TASKS.items():
            if not (folder / "adapters" / task).is_dir():
                jobs.append((folder, ["train", "--task", task, "--max-steps", str(steps), *sets(data, task)], None))
    side_by_side(jobs)

    for folder in folders.values():
        if not (folder / "merged").is_dir():
            multisbora(folder, ["merge", "--output", "merged"])
    proofs = {v: json.loads(multisbora(folder, ["verify", "merged", "--json"])) for v, folder in folders.items()}

    jobs = []
    scores: dict[tuple[str, str], Path] = {}
    for variant, folder in folders.items():
        for task in TASKS:
            for name, path in (("base", MODEL), ("own", f"adapters/{task}"), ("merged", "merged")):
                home = options.work.resolve() if name == "base" else folder
                found = home / f"scores-{name}-{task}-{options.rows}.json"
                if (name, task) not in scores or name != "base":
                    scores[f"{variant} {name}" if name != "base" else name, task] = found
                    command = ["eval", path, "--tasks", task, "--limit", str(options.rows), *EVAL, *sets(data, task)]
                    if not found.is_file() and all(job[2] != found for job in jobs):
                        jobs.append((folder, command, found))
    side_by_side(jobs)

    read = {key: json.loads(path.read_text())["tasks"][key[1]] for key, path in scores.items()}
    print(table(read, variants))
    for variant, folder in folders.items():
        proof = proofs[variant]
        print(
            f"\n{variant}: verify ok {proof['ok']}, {proof['tensors']} tensors, {proof['cells_changed']:,} cells "
            f"changed, outside regions {proof['cells_outside_regions']}"
        )
        for task in TASKS:
            training = json.loads((folder / "adapters" / task / "training.json").read_text())
            print(f"{variant} {task}: {training['steps']} steps, {training['tokens']:,} tokens")
        print(compare_live(folder, data))
        print(compare_export(folder, data))


def sets(data: Path, task: str) -> list[str]:
    given = [f"train={data}/{task}/train.jsonl", f"eval.data={data}/{task}/test.jsonl", *SETTINGS]
    return [part for setting in given for part in ("--set", setting)]


def table(scores: dict[tuple[str, str], dict[str, Any]], variants: list[str]) -> str:
    models = ["base", *(f"{variant} {name}" for variant in variants for name in ("own", "merged"))]
    lines = [
        "| model | " + " | ".join(f"{task} NLL | {task} score" for task in TASKS) + " |",
        "| --- |" + " --- |" * 2 * len(TASKS),
    ]
    for model in models:
        cells = [f"{scores[model, t]['nll']:.3f} | {scores[model, t]['score']:.1%}" for t in TASKS]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    for task in TASKS:
        subsets = scores["base", task]["subsets"]
        lines += ["", f"| {task}: score (NLL) | " + " | ".join(f"{s} (n={v['n']})" for s, v in subsets.items()) + " |"]
        lines.append("| --- |" + " --- |" * len(subsets))
        for model in models:
            found = scores[model, task]["subsets"]
            lines.append(
                f"| {model} | " + " | ".join(f"{v['score']:.1%} ({v['nll']:.3f})" for v in found.values()) + " |"
            )
    return "\n".join(lines)


def prompts(base: Path, data: Path, count: int = 8) -> list[Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = []
    for task in TASKS:
        with (data / task / "test.jsonl").open() as file:
            rows = [json.loads(line) for _, line in zip(range(count), file, strict=False)]
        texts += [f"{row['instruction']}\n{row['output']}" for row in rows]
    return [tokenizer(text, return_tensors="pt").input_ids for text in texts]


def compare_live(folder: Path, data: Path) -> str:
    """The merged checkpoint in stock transformers against the base with both adapters active."""
    import torch
    from transformers import AutoModelForCausalLM

    from multisbora.hub import find_base
    from multisbora.loading import load_model

    base = find_base(MODEL)
    live, _ = load_model(base, adapters=[folder / "adapters" / task for task in TASKS])
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    with torch.no_grad():
        pairs = [(live(ids).logits.float(), merged(ids).logits.float()) for ids in prompts(base, data)]
        live.merge_adapter(live.active_adapters)
        exact = all(torch.equal(live(ids).logits, merged(ids).logits) for ids in prompts(base, data))
    relative = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    largest = max(float((a - b).abs().max()) for a, b in pairs)
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs) / sum(a[..., 0].numel() for a, _ in pairs)
    return (
        f"{folder.name}: live against merged, {len(pairs)} texts, {live.dtype}: relative difference of logits at most "
        f"{relative:.2e}, largest {largest:.3f}, same next token at {same:.2%} of positions; "
        f"after merge_adapter() bit-equal: {exact}"
    )


def compare_export(folder: Path, data: Path) -> str:
    """Each task's plain-LoRA export in stock PEFT, in a process of its own, against our own adapter, in fp32."""
    import torch

    from multisbora.hub import find_base
    from multisbora.loading import load_model

    base = find_base(MODEL)
    torch.save(prompts(base, data), folder / "prompts.pt")
    ids = torch.load(folder / "prompts.pt")
    lines = []
    for task in TASKS:
        lora, answer = folder / f"lora-{task}", folder / f"lora-{task}.pt"
        if not lora.is_dir():
            multisbora(folder, ["export", "--task", task, "--format", "peft-lora", "--output", str(lora)])
        subprocess.run(
            [sys.executable, "-c", STOCK, str(base), str(lora), str(folder / "prompts.pt"), str(answer)], check=True
        )
        model, _ = load_model(folder / "adapters" / task, base)
        model = model.float()
        with torch.no_grad():
            pairs = [(model(x).logits, y) for x, y in zip(ids, torch.load(answer), strict=True)]
        relative = max(float((a - b).norm() / b.norm()) for a, b in pairs)
        lines.append(
            f"{folder.name} {task}: LoRA export in stock PEFT, fp32: relative difference of logits {relative:.1e}"
        )
        answer.unlink()
    (folder / "prompts.pt").unlink()
    return "\n".join(lines)


if __name__ == "__main__":
    main()
