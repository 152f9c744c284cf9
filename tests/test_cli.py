"""The commands as a user types them, on a tiny model: the whole way, and every kind of bad input."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import yaml
from builders import edit_json, tiny_gpt2, tiny_llama
from commands import Run, assert_refused
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from multisbora import publish
from multisbora.adapter import Adapter
from multisbora.lifecycle import required
from multisbora.project import Project


def test_the_main_job(trained: Path, base: Path, run: Run) -> None:
    status = run("status", "--json").json
    assert {task: found["adapter"] for task, found in status["tasks"].items()} == {
        "adding": "trained",
        "doubling": "trained",
    }
    assert run("allocate", "--tasks", "doubling,adding", "--json").json["tasks"].keys() == {"doubling", "adding"}

    assert run("merge", "--output", "merged", "--weight", "adding=0.5").code == 0
    proof = run("verify", "merged", "--json")
    assert proof.code == 0
    assert proof.json["ok"] is True and proof.json["cells_outside_regions"] == 0
    assert proof.json["cells_changed"] > 0
    assert proof.json["tasks"]["adding"]["weight"] == 0.5

    scores = run("eval", "merged", "--tasks", "adding,doubling", "--json").json["tasks"]
    assert scores.keys() == {"adding", "doubling"}
    assert scores["adding"]["n"] == 12 and scores["adding"]["nll"] > 0 and 0 <= scores["adding"]["score"] <= 1
    own = run("eval", "adapters/adding", "--tasks", "adding", "--json").json["tasks"]["adding"]
    start = run("eval", str(base), "--tasks", "adding", "--json").json["tasks"]["adding"]
    assert own["nll"] < start["nll"]

    assert run("export", "--task", "adding", "--format", "peft-lora", "--output", "lora").code == 0
    assert json.loads(Path("lora/adapter_config.json").read_text())["peft_type"] == "LORA"


def test_the_merged_checkpoint_is_the_live_model(trained: Path, base: Path, run: Run) -> None:
    """Stock transformers on the merged files, against the base with both adapters active at the same lambdas."""
    assert run("merge", "--output", "merged", "--weight", "doubling=0.25").code == 0
    merged = AutoModelForCausalLM.from_pretrained("merged")
    live = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "adapters/adding", "adding")
    live.load_adapter("adapters/doubling", "doubling")
    live.base_model.set_adapter(["adding", "doubling"])
    live.base_model.set_weight("doubling", 0.25)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        # Two matmuls added differ from one matmul of sums by the order of additions alone: fp32, 57 tokens, 2 layers.
        torch.testing.assert_close(live(ids).logits, merged(ids).logits, atol=1e-5, rtol=1e-5)
        live.merge_adapter(["adding", "doubling"])
        assert torch.equal(live(ids).logits, merged(ids).logits)


def test_a_new_project(tmp_path: Path, base: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "targets" in run("init", "--model", str(base), "--rank", "8", "--dry-run").out
    assert not list(tmp_path.iterdir())
    assert run("init", "--model", str(base), "--rank", "8").code == 0
    assert yaml.safe_load(Path("multisbora.yaml").read_text())["rank"] == 8
    assert_refused(run("init", "--model", str(base), "--rank", "8"), 2, "multisbora.yaml exists")


def test_init_refuses_a_rank_that_no_task_could_have(
    tmp_path: Path, base: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refusal = "lower it, or leave that matrix out with --targets"
    assert_refused(run("init", "--model", str(base), "--rank", "100000"), 2, "rank 100000 is above the", refusal)
    assert_refused(run("init", "--model", str(base), "--rank", "0"), 2, "multisbora: --rank: ", "greater than 0")
    assert not list(tmp_path.iterdir())


def test_init_puts_a_hub_id_in_the_place_of_a_card(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = run("init", "--model", "SmolLM2-135M")
    assert made.code == 0 and "for planning and allocation alone" in made.err
    assert yaml.safe_load(Path("multisbora.yaml").read_text())["model"] == "HuggingFaceTB/SmolLM2-135M"
    assert run("init", "--model", "HuggingFaceTB/SmolLM2-135M", "--dry-run").err == ""


def test_two_spellings_are_one_model(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for n in range(2):
        Path("tasks").mkdir(exist_ok=True)
        Path(f"tasks/t{n}.yaml").write_text("prompt: '{q}'\ntrain: r.jsonl\neval: {data: r.jsonl, metric: number}\n")
    for n, model in enumerate(("HuggingFaceTB/SmolLM2-135M", "huggingfacetb/smollm2-135m")):
        Path("multisbora.yaml").write_text(yaml.safe_dump({"model": model, "targets": ["v_proj"]}))
        assert run("allocate", "--tasks", f"t{n}").code == 0
    assert set(run("status", "--json").json["tasks"]) == {"t0", "t1"}


def test_the_hub_s_library_is_quiet_on_the_command_line() -> None:
    code = (
        "import sys, multisbora.cli as cli\n"
        "sys.argv = ['multisbora', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "from huggingface_hub.utils import logging\n"
        "sys.exit(logging.get_verbosity())\n"
    )
    env = {key: value for key, value in os.environ.items() if key != "HF_HUB_VERBOSITY"}
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, env=env).returncode == logging.ERROR


def test_init_takes_all_linears_where_the_paper_s_targets_are_missing(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("init", "--model", str(tiny_gpt2(tmp_path / "gpt2")), "--rank", "8").code == 0
    assert yaml.safe_load(Path("multisbora.yaml").read_text())["targets"] == "all-linear"


def test_models_and_plan_need_no_project(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "Llama-3-8B" in run("models", "--json").json
    found = run("plan", "--model", "llama-7b", "--rank", "32", "--json").json
    assert round(found["trainable_parameters"] / 1e6, 1) == 28.0
    assert set(found) == {
        "model",
        "variant",
        "rank",
        "matrices",
        "trainable_parameters",
        "lora_parameters",
        "adapter_bytes",
        "capacity_tasks",
        "matrices_detail",
        "gradient_bytes",
        "optimizer_bytes",
        "activation_bytes_per_token",
        "compositions",
        "ownership",
    }
    assert_refused(run("plan"), 2, "no multisbora.yaml", "multisbora init")
    assert not list(tmp_path.iterdir())


def test_plan_says_when_tasks_do_not_fit(project: Path, run: Run) -> None:
    for n in range(9):
        shutil.copyfile("tasks/adding.yaml", f"tasks/t{n}.yaml")
    result = run("plan", "--tasks", ",".join(f"t{n}" for n in range(9)), "--json")
    assert result.code == 1
    assert result.json["capacity_tasks"] == 8
    assert "9 tasks of rank 4 need 36 columns" in result.err
    assert not (project / "registry").exists()


def test_dry_runs_write_nothing(project: Path, run: Run, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    shown = run("allocate", "--tasks", "adding", "--dry-run", "--json")
    assert shown.code == 0
    assert sorted(tmp_path.rglob("*")) == before
    assert run("allocate", "--tasks", "adding", "--json").json == shown.json
    before = sorted(tmp_path.rglob("*"))
    expected = run("train", "--task", "adding", "--dry-run", "--json").json
    assert (expected["steps"], expected["loss"]) == (3, None)
    assert run("release", "--task", "adding", "--dry-run").code == 0
    assert sorted(tmp_path.rglob("*")) == before
    assert "adding" in run("status", "--json").json["tasks"]


def test_a_dry_merge_and_export_write_nothing(trained: Path, run: Run) -> None:
    before = sorted(trained.rglob("*"))
    assert run("merge", "--output", "merged", "--dry-run").code == 0
    assert run("export", "--task", "adding", "--format", "peft-lora", "--output", "lora", "--dry-run").code == 0
    assert sorted(trained.rglob("*")) == before


def test_a_dry_export_checks_that_the_adapter_fits(trained: Path, tmp_path: Path, run: Run) -> None:
    settings = yaml.safe_load(Path("multisbora.yaml").read_text())
    other = tiny_llama(tmp_path / "other", dtype="float32", hidden_size=64)
    Path("multisbora.yaml").write_text(yaml.safe_dump(settings | {"model": str(other)}))
    command = ["export", "--task", "adding", "--format", "peft-lora", "--output", "lora"]
    assert_refused(run(*command), 1, "adapters/adding", "does not fit")
    assert_refused(run(*command, "--dry-run"), 1, "adapters/adding", "does not fit")
    assert not Path("lora").exists()


def test_release_gives_indices_back(project: Path, run: Run) -> None:
    run("allocate", "--tasks", "adding")
    assert run("release", "--task", "adding").code == 0
    assert run("status", "--json").json["tasks"] == {}
    assert_refused(run("release", "--task", "adding"), 1, "adding")


def test_allocation_is_all_or_nothing(project: Path, run: Run) -> None:
    assert run("allocate", "--tasks", "adding", "--rank", "20").code == 0
    assert_refused(
        run("allocate", "--tasks", "doubling", "--rank", "20"),
        1,
        "has 32 columns to give, and 2 tasks that all meet each other need 40 (adding 20, doubling 20): ",
        "lower the rank, or use another composition",  # fb has no room either: v_proj has 16 rows
    )
    assert set(run("status", "--json").json["tasks"]) == {"adding"}
    assert run("allocate", "--tasks", "doubling", "--rank", "20", "--composition", "other").code == 0


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments, code, parts",
    [
        (["train", "--task", "addding"], 2, ["unknown task 'addding'", "did you mean adding?"]),
        (["allocate", "--tasks", "adding,nothing"], 2, ["unknown task 'nothing'"]),
        (["allocate", "--tasks", " , "], 2, ["names nothing"]),
        (["allocate", "--tasks", "adding", "--rank", "0"], 2, ["multisbora: --rank: ", "greater than 0"]),
        (["allocate", "--tasks", "adding", "--rank", "33"], 2, ["rank 33 is above the 32 columns"]),
        (["allocate", "--tasks", "adding", "--compositions", "x.yaml"], 2, ["--tasks", "give one of them"]),
        (["allocate", "--tasks", "adding,adding"], 2, ["composition default names a task twice (adding, adding)"]),
        (["allocate", "--tasks", "adding", "--variant", "fc"], 2, ["multisbora: --variant: ", "fa"]),
        (["allocate", "--tasks", "adding", "--targets", "q_prj"], 2, ["q_prj", "q_proj"]),
        (["train", "--task", "adding"], 1, ["adding", "multisbora allocate"]),
        (["merge", "--output", "merged"], 1, ["multisbora allocate"]),
        (["release", "--task", "adding"], 1, ["multisbora allocate"]),
        (["train", "--task", "adding", "--set", "training.epoch=1"], 2, ["training.epoch", "did you mean epochs?"]),
        (["train", "--task", "adding", "--isolate", "-1"], 2, ["training.isolate (from the command line)", "got -1"]),
        (["train", "--task", "adding", "--set", "nonsense"], 2, ["KEY=VALUE"]),
        (["plan", "--model", ""], 2, ["--model", "names no base model"]),
        (["init", "--model", " "], 2, ["--model", "names no base model"]),
        (["plan", "--model", "/no/where"], 2, ["'/no/where' is neither a folder", "nor a hub id"]),
        (["eval", "nowhere", "--tasks", "adding"], 2, ["nowhere"]),
        (["verify", "nowhere"], 2, ["nowhere is not a folder"]),
        (["eval", "tasks/nowhere", "--tasks", "adding"], 2, ["tasks/nowhere", "no folder"]),
        (["export", "--task", "adding", "--format", "gguf", "--output", "x"], 2, ["gguf", "peft-lora"]),
        (["merge", "--output", "merged", "--weight", "adding"], 2, ["TASK=LAMBDA"]),
    ],
)
def test_wrong_arguments(project: Path, run: Run, arguments: list[str], code: int, parts: list[str]) -> None:
    before = sorted(project.rglob("*"))
    assert_refused(run(*arguments), code, *parts)
    assert sorted(project.rglob("*")) == before


def test_one_adapter_serves_two_compositions(trained: Path, run: Run) -> None:
    assert run("allocate", "--tasks", "adding", "--composition", "other").code == 0
    assert run("status", "--composition", "other", "--json").json["tasks"]["adding"]["adapter"] == "trained"
    assert run("merge", "--composition", "other", "--output", "other").code == 0
    assert run("verify", "other").code == 0
    # The default composition allows the same merge, so that this one may be left; the last of them may not.
    assert run("release", "--task", "adding", "--composition", "other").code == 0
    assert set(run("status", "--json").json["tasks"]) == {"adding", "doubling"}
    assert_refused(
        run("release", "--task", "adding"),
        1,
        "the merged checkpoint other depends on task adding",
        "release it all the same with --force",
    )
    assert run("release", "--task", "adding", "--force").code == 0
    assert set(run("status", "--json").json["tasks"]) == {"doubling"}


def test_scores_go_into_the_receipt_when_asked(trained: Path, run: Run) -> None:
    run("merge", "--output", "merged")
    scores = run("eval", "merged", "--tasks", "adding", "--record", "--json").json["tasks"]
    assert json.loads(Path("merged/multisbora_receipt.json").read_text())["scores"] == scores
    assert run("verify", "merged").code == 0


def test_every_prompt_is_shown_once_with_verbose(trained: Path, run: Run) -> None:
    shown = run("eval", "adapters/adding", "--tasks", "adding", "--verbose", "--json")
    assert all(shown.err.count(f"Q: test {number} adding\n") == 1 for number in range(12))
    assert shown.json["tasks"]["adding"]["n"] == 12


def test_plan_counts_only_tasks_that_hold_nothing_yet(project: Path, run: Run) -> None:
    run("allocate", "--tasks", "adding", "--rank", "32")
    assert run("plan", "--tasks", "adding", "--rank", "32").code == 0
    assert run("plan", "--tasks", "adding,doubling", "--rank", "32").code == 1


def test_plan_says_no_where_allocate_would(project: Path, run: Run) -> None:
    """The figures are still printed; of the same claims allocate gives the same line."""
    assert run("allocate", "--tasks", "adding").code == 0
    assert run("allocate", "--tasks", "doubling", "--composition", "two").code == 0
    for question, line in (
        (("--tasks", "adding", "--rank", "2"), "task 'adding' already holds fa rank 4"),
        (("--tasks", "doubling"), "task 'doubling' cannot join composition 'default'"),
    ):
        before = sorted(project.rglob("*"))
        answer = run("plan", *question)
        assert answer.code == 1 and line in answer.err and len(answer.err.splitlines()) == 1
        assert "trainable parameters a task" in answer.out
        assert run("plan", *question, "--json").json["capacity_tasks"] > 0
        assert run("allocate", *question).err == answer.err
        assert sorted(project.rglob("*")) == before
    assert run("plan", "--rank", "2").code == 0
    assert run("plan", "--tasks", "adding").code == 0


def test_plan_of_a_model_that_the_registry_does_not_know(project: Path, tmp_path: Path, run: Run) -> None:
    assert run("allocate", "--tasks", "adding").code == 0
    other = tiny_llama(tmp_path / "other", hidden_size=64)
    found = run("plan", "--model", str(other), "--tasks", "adding", "--rank", "4", "--json")
    assert found.code == 0 and found.json["compositions"]["default"]["more_tasks"] == 12  # of down_proj's 48 columns
    status = run("status", "--json").json
    assert set(status["tasks"]) == {"adding"} and set(status["compositions"]) == {"default"}


def test_plan_has_room_of_a_composition_without_tasks(project: Path, run: Run) -> None:
    assert run("plan", "--json").json["compositions"]["default"]["more_tasks"] == 8
    run("allocate", "--tasks", "adding")
    rooms = run("plan", "--composition", "new", "--json").json["compositions"]
    assert {name: found["more_tasks"] for name, found in rooms.items()} == {"default": 7, "new": 8}


def test_status_says_what_decides(project: Path, run: Run) -> None:
    run("allocate", "--tasks", "adding")
    run("allocate", "--tasks", "doubling", "--composition", "two")
    lines = run("status").out.splitlines()
    rooms = run("status", "--json").json["compositions"]
    for name in ("default", "two"):
        assert "decides: 4 of its 32 columns are held by task" in rooms[name]["line"]
        assert any(line.startswith(name) and line.endswith(rooms[name]["line"]) for line in lines)


@pytest.mark.parametrize("url", ["nonsense", "sqlite://"])
def test_a_registry_that_cannot_be(project: Path, run: Run, url: str) -> None:
    path = project / "multisbora.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"registry": url}))
    for command in (["status"], ["allocate", "--tasks", "adding"], ["plan"]):
        assert_refused(run(*command), 2, "multisbora.yaml: registry: ", url, "sqlite:///path/to/registry.db")


def test_a_project_of_a_bare_config(tmp_path: Path, base: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bare").mkdir()
    shutil.copyfile(base / "config.json", tmp_path / "bare" / "config.json")
    monkeypatch.chdir(tmp_path)
    bare, whole = (run("plan", "--model", str(m), "--rank", "4", "--json").json for m in ("bare", base))
    assert bare["trainable_parameters"] == whole["trainable_parameters"] > 0


def test_unknown_options_are_wrong_usage(run: Run) -> None:
    result = run("merge", "--outptu", "x")
    assert result.code == 2 and "--outptu" in result.err


def test_all_faults_of_a_recipe_at_once(project: Path, run: Run) -> None:
    path = project / "tasks" / "adding.yaml"
    content = yaml.safe_load(path.read_text())
    content["promt"] = content.pop("prompt")
    content["training"]["batch_size"] = -1
    path.write_text(yaml.safe_dump(content))
    assert_refused(
        run("allocate", "--tasks", "adding"),
        2,
        "tasks/adding.yaml",
        "unknown key promt, did you mean prompt?",
        "prompt is missing",
        "training.batch_size",
    )


def test_a_missing_data_file(project: Path, run: Run) -> None:
    run("allocate", "--tasks", "adding")
    (project / "data" / "adding-train.jsonl").unlink()
    assert_refused(run("train", "--task", "adding"), 1, "data/adding-train.jsonl does not exist")
    assert not (project / "adapters").exists()


def test_merging_what_is_not_trained(project: Path, run: Run) -> None:
    run("allocate", "--tasks", "adding")
    assert_refused(run("merge", "--output", "merged"), 1, "adding is allocated", "multisbora train --task adding")


def test_training_again_is_refused(trained: Path, run: Run) -> None:
    assert_refused(run("train", "--task", "adding"), 1, "adapters/adding is there already")


@pytest.mark.parametrize("dry_run", [False, True])
def test_an_adapter_of_which_the_registry_was_not_told(trained: Path, run: Run, dry_run: bool) -> None:
    """Killed when the run's folder was gone: the same command tells the registry, and says what the run came to."""
    project = Project.load()
    with required(project) as registry:
        registry.mark(registry.task(project.model_name, "adding"), "training")
    before = Path("adapters/adding/adapter_model.safetensors").stat().st_mtime_ns
    done = run("train", "--task", "adding", "--json", *(["--dry-run"] if dry_run else []))
    assert done.code == 0 and "killed before it could tell the registry" in done.err
    kept = json.loads(Path("adapters/adding/training.json").read_text())
    names = ("steps", "tokens", "loss", "trainable_parameters", "dev_loss", "best_step")
    assert {name: done.json[name] for name in names} == {name: kept[name] for name in names}
    assert Path("adapters/adding/adapter_model.safetensors").stat().st_mtime_ns == before
    stage = run("status", "--json").json["tasks"]["adding"]["stage"]
    assert stage == ("training" if dry_run else "trained")
    if not dry_run:
        event = run("registry", "history", "--task", "adding", "--json").json[-1]
        assert event["detail"]["adapter_digest"] == Adapter.read("adapters/adding").digest
        assert_refused(run("train", "--task", "adding"), 1, "adapters/adding is there already")


def test_an_adapter_of_other_claims_is_not_taken_for_the_run_s(trained: Path, run: Run) -> None:
    project = Project.load()
    with required(project) as registry:
        registry.mark(registry.task(project.model_name, "adding"), "training")
    edit_json("adapters/adding/adapter_config.json", claim_digest="0" * 64)
    assert_refused(run("train", "--task", "adding"), 1, "adapters/adding is there already")
    assert run("status", "--json").json["tasks"]["adding"]["stage"] == "training"


def test_what_a_run_came_to(project: Path, run: Run) -> None:
    assert run("allocate", "--tasks", "adding,doubling").code == 0
    line = run("train", "--task", "adding").out
    assert re.fullmatch(r"adapters/adding: 3 steps, .*, loss \d+\.\d{4}, \d+ s in this session\n", line), line
    dev = ["--set", "dev_size=4", "--set", "training.eval_steps=1"]
    assert "adapters/doubling would be trained: 3 steps" in run("train", "--task", "doubling", *dev, "--dry-run").out
    line = run("train", "--task", "doubling", *dev).out
    kept = json.loads(Path("adapters/doubling/training.json").read_text())
    assert f"dev loss {kept['dev_loss']:.4f} at step {kept['best_step']}, which is kept, " in line


def test_an_adapter_of_another_base(trained: Path, tmp_path: Path, run: Run) -> None:
    other = tiny_llama(tmp_path / "other", dtype="float32", seed=1)
    content = yaml.safe_load(Path("multisbora.yaml").read_text())
    model = content["model"]
    shutil.move(model, tmp_path / "kept")
    try:
        shutil.copytree(other, model)
        assert_refused(run("merge", "--output", "merged"), 1, "adding", "another base", "--allow-base-mismatch")
        assert_refused(run("eval", "adapters/adding", "--tasks", "adding"), 1, "adding", "base")
        assert not Path("merged").exists()
        assert run("merge", "--output", "merged", "--allow-base-mismatch").code == 0
    finally:
        shutil.rmtree(model)
        shutil.move(tmp_path / "kept", model)


def test_claims_that_changed_since_training(trained: Path, run: Run) -> None:
    run("release", "--task", "adding")
    run("allocate", "--tasks", "adding", "--rank", "5")
    assert run("status", "--json").json["tasks"]["adding"]["adapter"] == "trained on other claims"
    assert_refused(run("merge", "--output", "merged"), 1, "adding", "claims")
    assert not Path("merged").exists()


def test_nan_in_an_adapter(trained: Path, run: Run) -> None:
    path = Path("adapters/adding/adapter_model.safetensors")
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("sbora_values"))
    tensors[name][0, 0] = np.nan
    save_file(tensors, path)
    assert_refused(run("merge", "--output", "merged"), 1, "adapters/adding", "NaN")
    assert not Path("merged").exists()


def test_a_full_output_folder(trained: Path, run: Run) -> None:
    Path("merged").mkdir()
    Path("merged/mine.txt").write_text("mine")
    assert_refused(run("merge", "--output", "merged"), 1, "merged", "not an empty folder")
    assert Path("merged/mine.txt").read_text() == "mine"


def test_a_full_disk(trained: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(publish.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert_refused(run("merge", "--output", "merged"), 1, "disk")
    assert not Path("merged").exists()


@pytest.mark.parametrize("damage", ["truncated", "header"])
def test_a_damaged_base(trained: Path, run: Run, damage: str, tmp_path: Path) -> None:
    content = yaml.safe_load(Path("multisbora.yaml").read_text())
    broken = tmp_path / "broken"
    shutil.copytree(content["model"], broken)
    weights = broken / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-100] if damage == "truncated" else b"\xff" * 16 + raw[16:])
    assert run("merge", "--output", "merged").code == 0
    assert_refused(run("verify", "merged", "--base", str(broken)), 1, str(broken))
    Path("multisbora.yaml").write_text(yaml.safe_dump(content | {"model": str(broken)}))
    assert_refused(run("plan"), 1, "model.safetensors")


def test_a_tampered_merge_ends_in_exit_code_3(trained: Path, run: Run) -> None:
    run("merge", "--output", "merged")
    raw = bytearray(Path("merged/model.safetensors").read_bytes())
    raw[-1] ^= 1
    Path("merged/model.safetensors").write_bytes(raw)
    result = run("verify", "merged", "--json")
    assert result.code == 3
    assert result.json["ok"] is False
    assert "merged does not hold" in result.err


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_lost_receipt_ends_in_exit_code_3(trained: Path, run: Run, content: str | None) -> None:
    run("merge", "--output", "merged")
    path = Path("merged/multisbora_receipt.json")
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert_refused(run("verify", "merged"), 3, "merged does not hold", "multisbora_receipt.json")


def test_an_edited_receipt_ends_in_exit_code_3(trained: Path, run: Run) -> None:
    run("merge", "--output", "merged")
    receipt = json.loads(Path("merged/multisbora_receipt.json").read_text())
    receipt["tasks"]["adding"]["weight"] = 0.9
    edit_json("merged/multisbora_receipt.json", tasks=receipt["tasks"])
    assert run("verify", "merged").code == 3
