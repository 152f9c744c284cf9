"""plan against the paper's own tables, against files that the tuner really writes, and against what allocate does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from builders import tiny_gpt2, tiny_llama, write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import multisbora.cli
import multisbora.commands
from multisbora.allocator import DEFAULT_TARGETS, allocate
from multisbora.errors import AllocationError, UsageError
from multisbora.geometry import Geometry, Matrix, from_card, from_checkpoint
from multisbora.plan import METHODS, matrix_cost, plan
from multisbora.registry import Registry
from multisbora.tuner import SboraConfig

SMALL = from_card("SmolLM2-135M")


def millions(count: float) -> float:
    return round(count / 1e6, 1)


@pytest.mark.parametrize(
    ("model", "rank", "fa", "fb", "lora"),
    [
        ("LLaMA-7B", 32, 28.0, 28.0, 56.1),
        ("LLaMA-7B", 64, 56.1, 56.1, 112.2),
        ("Llama-3-8B", 32, 25.2, 31.5, 56.6),
        ("Llama-3-8B", 64, 50.3, 62.9, 113.2),
    ],
)
def test_tables_3_and_4(model: str, rank: int, fa: float, fb: float, lora: float) -> None:
    """Column TP of Tables 3 and 4, targets q, k, v, up, down (the authors' settings), every parameter counted once.

    FA trains B, rank x out_features a matrix; FB trains A, rank x in_features; LoRA both.
    """
    geometry = from_card(model)
    plans = [plan(geometry, variant=variant, rank=rank, target_modules=DEFAULT_TARGETS) for variant in ("fa", "fb")]
    assert [millions(found.trainable_parameters) for found in plans] == [fa, fb]
    assert {millions(found.lora_parameters) for found in plans} == {lora}


@pytest.mark.parametrize(
    ("model", "lora", "fa", "fb"),
    [("LLaMA-7B", 80.0, 43.5, 36.4), ("LLaMA-13B", 125.2, 68.2, 57.0), ("Llama-3-8B", 83.9, 44.0, 39.8)],
)
def test_table_5_counts_half(model: str, lora: float, fa: float, fb: float) -> None:
    """Column TP of Table 5: all linears of attention and MLP (also o and gate; no head), rank 64, printed HALVED.

    QLoRA's code divides the count of trainable parameters by two in 4-bit mode, since it takes them for packed pairs.
    The real counts are twice these. QLoRA's row is halved as well: r x (in + out), both factors.
    """
    plans = [plan(from_card(model), variant=variant, rank=64, target_modules="all-linear") for variant in ("fa", "fb")]
    assert [millions(found.trainable_parameters / 2) for found in plans] == [fa, fb]
    # The paper rounds 79.95M to 80.0M (two decimals first); 0.05M apart at most.
    assert plans[0].lora_parameters / 2e6 == pytest.approx(lora, abs=0.051)


@pytest.mark.parametrize(("out", "in_", "r"), [(4096, 4096, 32), (11008, 4096, 64), (576, 1536, 1)])
def test_table_1(out: int, in_: int, r: int) -> None:
    """Columns "Trainable Params", "Total Params" and "Gradient Memory", with k the input's size and d the output's.

    So the paper's text has it, and its first and last column. Its middle column calls SBoRA's sizes the other way round
    (r + k x r for FA), and is put right here: what is stored is the vector of indices and what is trained.
    """
    k, d = in_, out
    lora, fa, fb = (matrix_cost(method, (out, in_), r) for method in ("lora", "fa", "fb"))
    assert [cost.trainable_parameters for cost in (lora, fa, fb)] == [(k + d) * r, d * r, k * r]
    assert [cost.total_parameters for cost in (lora, fa, fb)] == [(k + d) * r, r + d * r, r + k * r]
    assert [cost.gradient_bytes for cost in (lora, fa, fb)] == [4 * (k + d) * r, 4 * d * r, 4 * k * r]
    assert [cost.optimizer_bytes for cost in (lora, fa, fb)] == [8 * (k + d) * r, 8 * d * r, 8 * k * r]


@pytest.mark.parametrize(("out", "in_", "r"), [(4096, 4096, 32), (11008, 4096, 64), (576, 1536, 1)])
def test_table_2(out: int, in_: int, r: int) -> None:
    """Columns "Multiplication" and "Addition" without their first terms, which are the frozen matrix's own.

    Here W is k x d and x is d x 1, as the table's caption says: k is the OUTPUT's size, unlike in Table 1.
    """
    k, d = out, in_
    lora, fa, fb = (matrix_cost(method, (out, in_), r) for method in ("lora", "fa", "fb"))
    assert [cost.multiplications for cost in (lora, fa, fb)] == [(k + d) * r, k * r, d * r]
    assert [cost.additions for cost in (lora, fa, fb)] == [
        r * (d - 1) + k * (r - 1) + 1 * k,
        k * (r - 1) + 1 * k,
        r * (d - 1) + 1 * r,
    ]


def test_saved_activations() -> None:
    out, in_, r = 11, 7, 3
    assert [matrix_cost(method, (out, in_), r).saved_elements for method in METHODS] == [r, in_, in_ + r]
    found = plan(SMALL, rank=32).to_json()["activation_bytes_per_token"]
    # q, k, v and up read 576 channels, down reads 1536, in 30 layers of 16-bit values.
    assert found == {"fa": 30 * 5 * 32 * 2, "fb": 30 * (4 * 576 + 1536) * 2, "lora": 30 * (4 * 576 + 1536 + 5 * 32) * 2}
    with pytest.raises(UsageError, match="method 'dora' is unknown"):
        matrix_cost("dora", (8, 8), 2)  # type: ignore[arg-type]


def test_costs_add_up_over_matrices_of_different_ranks() -> None:
    found = plan(SMALL, variant="fb", rank=8, rank_pattern={"q_proj": 16})
    for method in METHODS:
        parts = [matrix_cost(method, part.matrix.shape, part.rank) for part in found.matrices]
        for key in ("trainable_parameters", "total_parameters", "multiplications", "additions", "saved_elements"):
            assert getattr(found.cost(method), key) == sum(getattr(part, key) for part in parts)
    assert found.cost("fb").trainable_parameters == found.trainable_parameters
    assert found.cost("lora").trainable_parameters == found.lora_parameters
    assert found.to_json()["gradient_bytes"] == 4 * found.trainable_parameters
    assert found.to_json()["optimizer_bytes"] == 8 * found.trainable_parameters


BASES: dict[str, Any] = {
    "llama": tiny_llama,
    "deep llama": lambda folder: tiny_llama(folder, num_hidden_layers=11),  # "layers.10" sorts before "layers.2"
    "gpt2": tiny_gpt2,
    "bare gpt2": lambda folder: tiny_gpt2(folder, bare=True),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", ["fa", "fb"])
def test_adapter_bytes_and_parameters_are_those_of_a_saved_adapter(tmp_path: Path, base: str, variant: Any) -> None:
    folder = BASES[base](tmp_path / "base")
    geometry = from_checkpoint(folder)
    pattern = {"q_proj": 7, "c_fc": 7}
    expected = plan(geometry, variant=variant, rank=4, target_modules="all-linear", rank_pattern=pattern)
    # Masked cells, where a task of the other variant crosses this one, are stored as zeros.
    masked = {expected.matrices[0].matrix.module: [0, 3]}
    config = SboraConfig(
        task_type="CAUSAL_LM",
        variant=variant,
        indices={part.matrix.module: list(range(part.rank)) for part in expected.matrices},
        excluded=masked,
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), config)
    assert expected.trainable_parameters == model.get_nb_trainable_parameters()[0]
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    assert expected.adapter_bytes == file.stat().st_size
    with safe_open(file, "np") as saved:
        shapes = [saved.get_slice(key).get_shape() for key in saved.keys() if "values" in key]  # noqa: SIM118
    assert sorted(map(tuple, shapes)) == sorted(part.values_shape for part in expected.matrices)


@settings(deadline=None, max_examples=30)
@given(rank=st.integers(1, 24), layers=st.integers(1, 12), variant=st.sampled_from(["fa", "fb"]), wide=st.booleans())
def test_adapter_bytes_at_every_length_of_the_header(
    tmp_path_factory: pytest.TempPathFactory, rank: int, layers: int, variant: Any, wide: bool
) -> None:
    """The header's padding depends on how many digits its offsets have."""
    modules = [f"model.layers.{i}.self_attn.q_proj" for i in range(layers)]
    size = 1000 if wide else 24
    geometry = Geometry("g", "llama", tuple(Matrix(m, f"{m}.weight", size, 24) for m in modules))
    folder = write_adapter(tmp_path_factory.mktemp("adapter") / "a", geometry, "t", variant=variant, rank=rank)
    expected = plan(geometry, variant=variant, rank=rank, target_modules="all-linear").adapter_bytes
    assert expected == (folder / "adapter_model.safetensors").stat().st_size


def test_the_json_has_the_designs_keys() -> None:
    found = plan(SMALL, variant="fb", rank=32).to_json()
    assert list(found) == [
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
    ]
    assert json.loads(json.dumps(found)) == found
    assert (found["model"], found["variant"], found["rank"], found["matrices"]) == ("SmolLM2-135M", "fb", 32, 150)
    assert found["capacity_tasks"] == 192 // 32
    assert len(found["matrices_detail"]) == 150
    assert found["trainable_parameters"] == sum(detail["trainable_parameters"] for detail in found["matrices_detail"])
    assert found["matrices_detail"][0] == {
        "module": "model.layers.0.mlp.down_proj",
        "out_features": 576,
        "in_features": 1536,
        "rank": 32,
        "trainable_parameters": 32 * 1536,
        "free": 576,
        "capacity_tasks": 18,
    }


@pytest.mark.parametrize("variant", ["fa", "fb"])
def test_figures_equal_what_allocate_gives(variant: Any) -> None:
    options: dict[str, Any] = {"variant": variant, "rank": 16, "rank_pattern": {"q_proj": 24}}
    expected = plan(SMALL, **options)
    with Registry.open("sqlite://") as registry:
        claims = allocate(registry, SMALL, ["a"], **options).tasks["a"]
    values = 0
    for module, region in claims.regions.items():
        rows, columns = region.values_shape(SMALL.find(module).shape)
        values += rows * columns
    assert expected.trainable_parameters == values
    assert len(expected.matrices) == len(claims.regions)


def test_capacity_falls_with_every_task_and_is_true() -> None:
    with Registry.open("sqlite://") as registry:
        for number in range(9):
            assert plan(SMALL, registry=registry).capacity_tasks == 9 - number
            allocate(registry, SMALL, [f"t{number}"])
        full = plan(SMALL, registry=registry)
        assert full.capacity_tasks == 0 and full.matrices[0].free == 1536 - 9 * 64
        assert full.trainable_parameters == plan(SMALL).trainable_parameters
        with pytest.raises(AllocationError):
            allocate(registry, SMALL, ["t9"])
        assert plan(SMALL, registry=registry, composition="other").capacity_tasks == 9
        # q, k, v and up have no cell left for a row: nine tasks own all of their 576 columns.
        crossing = plan(SMALL, registry=registry, variant="fb", rank=32)
        assert crossing.capacity_tasks == 0
        assert {m.matrix.kind for m in crossing.matrices if m.capacity_tasks} == {"down_proj"}
        with pytest.raises(AllocationError, match="all of its 576 columns are other tasks' or protected"):
            allocate(registry, SMALL, ["t9"], variant="fb", rank=32)
        assert plan(SMALL, registry=registry, variant="fb", rank=32, target_modules=["down_proj"]).capacity_tasks == 18
        assert plan(SMALL, registry=registry, target_modules=["down_proj"]).capacity_tasks == 24 - 9
        assert plan(SMALL, registry=registry, rank=1, rank_pattern={"down_proj": 100}).capacity_tasks == 0


def test_wanted_tasks_that_do_not_fit() -> None:
    plan(SMALL, tasks=9).require_capacity()
    with pytest.raises(
        AllocationError, match=r"10 tasks of rank 64 need 640 columns .* 576 of 576 are free: room for 9"
    ):
        plan(SMALL, tasks=10).require_capacity()


def test_the_other_variant_is_advised_only_where_it_has_room() -> None:
    """fb of rank 64 has room for three tasks: v_proj has 192 rows."""
    few = plan(SMALL, rank=192, tasks=4, target_modules=["v_proj", "down_proj"])
    many = plan(SMALL, rank=192, tasks=1, target_modules=["v_proj"])
    assert few.matrices[-1].other_free == many.matrices[0].other_free == 192
    with pytest.raises(AllocationError, match=r"lower the rank, or use another composition$"):
        few.require_capacity()
    with Registry.open("sqlite://") as registry:
        allocate(registry, SMALL, ["wide"], rank=448, target_modules=["v_proj"])
        with pytest.raises(AllocationError, match=r"lower the rank, use fb, or another composition$"):
            plan(SMALL, rank=192, target_modules=["v_proj"], registry=registry).require_capacity()
        allocate(registry, SMALL, ["rest"], rank=128, target_modules=["v_proj"])
        with pytest.raises(AllocationError, match=r"lower the rank, or use another composition$"):  # no cell is left
            plan(SMALL, rank=192, target_modules=["v_proj"], registry=registry).require_capacity()


def test_conv1d_counts_logical_sizes() -> None:
    geometry = Geometry("g", "gpt2", (Matrix("h.0.attn.c_attn", "h.0.attn.c_attn.weight", 72, 24, "conv1d"),))
    assert plan(geometry, rank=3, target_modules=["c_attn"]).trainable_parameters == 3 * 72
    assert plan(geometry, rank=3, target_modules=["c_attn"], variant="fb").trainable_parameters == 3 * 24
    assert plan(geometry, rank=3, target_modules=["c_attn"]).capacity_tasks == 8


def test_wrong_usage_is_refused() -> None:
    for options in ({"rank": 0}, {"rank": 577}, {"variant": "x"}, {"target_modules": ["c_attn"]}):
        with pytest.raises(UsageError):
            plan(SMALL, **options)  # type: ignore[arg-type]


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """`multisbora plan ...` in an empty folder: exit code, stdout, stderr."""
    monkeypatch.setattr(
        multisbora.commands, "quiet_libraries", lambda: None
    )  # for its whole process, and tests share one
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["multisbora", "plan", *arguments])
        with pytest.raises(SystemExit) as exit_:
            multisbora.cli.main()
        return (int(exit_.value.code or 0), *capsys.readouterr())

    return call


def test_command_line_with_a_card_alone(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("--model", "SmolLM2-135M", "--rank", "32", "--json")
    found = json.loads(out)
    assert code == 0 and list(found)[9:] == [
        "gradient_bytes",
        "optimizer_bytes",
        "activation_bytes_per_token",
        "compositions",
        "ownership",
    ]
    assert found["ownership"][0]["planned"] == [32, 32]
    assert found["compositions"]["default"]["more_tasks"] == 18
    code, out, _ = run("--model", "SmolLM2-135M", "--rank", "32")
    assert code == 0 and "11,854,344" in out and "peak memory" not in out
    assert "q_proj         columns [++..............................] 544/576" in out.splitlines()
    assert "room for tasks, before the planned               18" in out.splitlines()
    assert "adapter file, bytes                      11,854,344    11.9 MB" in out.splitlines()
    assert (
        "default: 18 more tasks like these fit: model.layers.0.mlp.up_proj decides: all of its 576 columns are free"
        in (out.splitlines())
    )
    assert not list(tmp_path.iterdir())


def test_command_line_predicts_the_peak_of_a_batch(run: Run, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    config = tiny_llama(tmp_path / "whole") / "config.json"
    (bare / "config.json").write_bytes(config.read_bytes())
    shape = ("--rank", "4", "--batch-size", "2", "--length", "16")
    code, out, _ = run("--model", str(bare), *shape, "--json")
    found = json.loads(out)
    assert code == 0 and list(found)[-3:] == ["peak", "compositions", "ownership"]
    assert found["peak"]["tokens"] == 32 and found["peak"]["peak"] > found["peak"]["base"]
    code, out, err = run("--model", str(bare), *shape)
    peak = found["peak"]["peak"]
    assert code == 0 and f"peak memory, peak{peak:>34,}{peak / 1000:>8.1f} kB" in out.splitlines()
    assert err == "predicting the peak on a model without weights: up to a minute\n"


def test_command_line_takes_checkpointing_from_the_recipes(run: Run, tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    (tmp_path / "tasks").mkdir()
    recipe = "prompt: '{q}'\ntrain: rows.jsonl\neval: {data: rows.jsonl, metric: number}\n"
    (tmp_path / "tasks" / "plain.yaml").write_text(recipe)
    (tmp_path / "tasks" / "frugal.yaml").write_text(recipe + "training: {gradient_checkpointing: true}\n")
    peaks = {}
    for tasks in ("plain", "frugal", "plain,frugal"):
        shape = ("--rank", "4", "--batch-size", "8", "--length", "32", "--tasks", tasks, "--json")
        code, out, err = run("--model", str(base), *shape)
        assert code == 0, err
        peaks[tasks] = json.loads(out)["peak"]["peak"]
    assert peaks["frugal"] < peaks["plain"] == peaks["plain,frugal"]  # the larger of the two is what must fit


def test_command_line_predicts_no_peak_of_a_quantised_base(run: Run, tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    (tmp_path / "tasks").mkdir()
    recipe = "prompt: '{q}'\ntrain: rows.jsonl\neval: {data: rows.jsonl, metric: number}\n"
    (tmp_path / "tasks" / "plain.yaml").write_text(recipe)
    (tmp_path / "tasks" / "small.yaml").write_text(recipe + "training: {quantization: nf4}\n")
    shape = ("--rank", "4", "--batch-size", "8", "--length", "32")
    code, out, err = run("--model", str(base), *shape, "--tasks", "plain,small")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "not predicted for a quantised base: task small has training.quantization nf4" in err
    assert run("--model", str(base), "--rank", "4", "--tasks", "plain,small")[0] == 0
    assert run("--model", str(base), *shape, "--tasks", "plain")[0] == 0


@pytest.mark.parametrize("half", [("--batch-size", "4"), ("--length", "128")])
def test_command_line_wants_both_sizes_of_a_batch(run: Run, half: tuple[str, str]) -> None:
    code, out, err = run("--model", "SmolLM2-135M", *half)
    assert (code, out) == (2, "") and "--batch-size and --length belong together" in err


def test_command_line_says_what_a_card_lacks(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    SMALL.write(path)
    assert run("--model", str(path), "--json")[0] == 0
    code, out, err = run("--model", str(path), "--batch-size", "4", "--length", "128")
    assert (code, out) == (1, "") and "has no config, which the peak memory needs" in err


def test_static_figures_load_no_torch() -> None:
    code = (
        "import sys, multisbora.cli as cli\n"
        "sys.argv = ['multisbora', 'plan', '--model', 'Llama-3-8B']\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    sys.exit(end.code or 10 * ('torch' in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
