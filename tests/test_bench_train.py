"""The training benchmarks of scripts/ at toy size: they run, compare what they say, and count what the paper counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import builders
import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
NAMES = ("figures", "methods", "bench_train", "bench_tokens", "bench_complexity")
TOY = ["--layers", "1", "--rank", "2", "--batch", "2", "--tokens", "8", "--threads", "1"]


@pytest.fixture(scope="module")
def script() -> Iterator[Callable[[str], ModuleType]]:
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)  # they import each other
        yield __import__
    torch.set_num_threads(threads)
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def toy(script: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tiny shape, which is the default one's stand-in."""
    methods = script("methods")
    shape = methods.Shape(36, 48, 3, 1, 2, 64, True)
    monkeypatch.setitem(methods.SHAPES, "smollm2-12", shape)
    return shape


@pytest.mark.usefixtures("toy")
def test_steps_of_every_method(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench, out = script("bench_train"), tmp_path / "steps.json"
    code = bench.main(["steps", *TOY, "--rounds", "2", "--warm", "1", "--json", str(out)])
    half, full = script("figures").read([out])
    assert (half.name, full.name) == ("steps-bfloat16", "steps-float32")
    assert [row[0] for row in half.rows] == script("methods").METHODS
    assert [row[0] for row in full.rows] == [name for name in script("methods").METHODS if name != "lora 16 bit"]
    assert half.bars["frozen"] == (1.0, 1.0, 1.0)
    assert half.columns[-3:] == ["/ lora", "/ lora 16 bit", "/ dora"] and full.columns[-2:] == ["/ lora", "/ dora"]
    assert {row[0]: row for row in half.rows}["lora 16 bit"][-2] == "1.00"
    assert all(len(row) == len(result.columns) for result in (half, full) for row in result.rows)
    assert (len(half.budgets), len(full.budgets)) == (8, 4)
    assert [str(budget).partition(": ")[0] for budget in full.budgets if "isolated" in str(budget)] == [
        "step of fa isolated / fa <= 1.03",
        "step of fb isolated / fb <= 1.03",
    ]
    assert code == (0 if half.held and full.held else 1)
    shown = capsys.readouterr().out
    assert all(f"budget: {budget}" in shown for budget in half.budgets)


def test_ratios_are_taken_within_rounds(script: Any) -> None:
    taken = {"frozen": [1.0, 2.0, 4.0], "fa": [1.5, 2.0, 4.8]}
    assert script("bench_train").ratios(taken, "fa", "frozen") == pytest.approx((1.2, 1.1, 1.35))


def test_only_in_place_methods_have_weights_of_their_own(script: Any, toy: Any) -> None:
    methods = script("methods")
    case = methods.Case("bfloat16", "cpu", 2, 2, 8, 0, False, toy)
    base = methods.load(case)
    before = {name: weight.clone() for name, weight in base.named_parameters()}
    models = {name: methods.adapt(methods.twin(base, name), name, 2) for name in methods.METHODS}
    for name, model in models.items():
        methods.make_step(model, case, name)()
        methods.make_step(model, case, name)()
        if name != "frozen":
            assert methods.writes_in_place(model, base) == (name in methods.IN_PLACE), name
    assert all(torch.equal(weight, before[name]) for name, weight in base.named_parameters())
    trained = {name: sum(p.numel() for p in model.parameters() if p.requires_grad) for name, model in models.items()}
    assert trained["frozen"] == 0
    assert trained["lora"] == trained["shira"] == trained["lora 16 bit"] == trained["fa"] + trained["fb"]
    assert trained["lora A frozen"] == trained["fa"]
    dtypes = {name: {p.dtype for p in model.parameters() if p.requires_grad} for name, model in models.items()}
    assert dtypes.pop("lora 16 bit") == {torch.bfloat16} and dtypes.pop("frozen") == set()
    assert all(found == {torch.float32} for found in dtypes.values())


def test_a_gather_step_does_not_pass_for_one_in_place(script: Any, toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, methods = script("bench_train"), script("methods")
    monkeypatch.setattr(bench, "adapt", lambda base, name, rank: methods.adapt(base, f"{name} gather", rank))
    with pytest.raises(RuntimeError, match="fa was not computed in place"):
        bench.time_steps(methods.Case("bfloat16", "cpu", 2, 2, 8, 0, False, toy), ["fa"], 1, 0)


@pytest.mark.parametrize("out_features, in_features, rank, tokens", [(12, 20, 3, 5), (20, 12, 4, 8)])
def test_a_layer_costs_what_the_paper_says(
    script: Any, out_features: int, in_features: int, rank: int, tokens: int
) -> None:
    bench = script("bench_complexity")
    frozen = bench.count_layer("frozen", out_features, in_features, rank, tokens)
    assert frozen.forward == frozen.backward == out_features * in_features * tokens
    found = {
        name: bench.beyond(bench.count_layer(name, out_features, in_features, rank, tokens), frozen, tokens)
        for name in bench.METHODS
    }
    both = (out_features + in_features) * rank
    assert found["lora"]["trainable"] == found["lora"]["gradient"] == found["lora"]["stored"] == both
    assert found["lora"]["forward"] == both  # Table 2
    assert found["fa"]["stored"] == out_features * rank + rank  # Table 1
    assert found["fb"]["stored"] == in_features * rank + rank
    assert found["fa gather"]["forward"] == out_features * rank  # Table 2
    assert found["fb gather"]["forward"] == in_features * rank
    assert found["fa"]["forward"] == found["fb"]["forward"] == 0
    assert found["fa"]["kept"] == tokens * rank
    for name, figures in found.items():
        assert figures == bench.expected(name, [(out_features, in_features)], rank, tokens), name


@pytest.mark.usefixtures("toy")
def test_a_model_costs_the_sum_of_its_layers(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, out = script("bench_complexity"), tmp_path / "counts.json"
    assert bench.main(["--rank", "3", "--tokens", "8", "--json", str(out)]) == 0
    assert [result.name for result in script("figures").read([out])] == ["complexity-layer", "complexity-model"]
    monkeypatch.setitem(bench.FORMULAS, "fa", bench.FORMULAS["fb"])
    assert bench.main(["--rank", "3", "--tokens", "8"]) == 1


def test_tokens_of_the_same_rows(script: Any, tmp_path: Path) -> None:
    base, data, out = builders.tiny_llama(tmp_path / "base"), tmp_path / "rows.jsonl", tmp_path / "tokens.json"
    rows = [{"instruction": "a" * (5 * i % 70), "output": "b" * (1 + i % 9), "answer": "b"} for i in range(33)]
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "output": " "}]), encoding="utf-8")
    bench = script("bench_tokens")
    sizes = ["--rank", "2", "--cutoff", "600", "--blocks", "2", "--steps", "2", "--warm", "1", "--threads", "1"]
    code = bench.main(["--data", str(data), "--model", str(base), *sizes, "--json", str(out)])
    (result,) = script("figures").read([out])
    assert [row[0] for row in result.rows] == ["fa", "fb", "lora"]
    assert [row[-1] for row in result.rows[:2]] == ["0.0%", "0.0%"] and result.rows[2][-1] != "0.0%"
    assert result.bars["lora"] == (1.0, 1.0, 1.0)
    assert code == (0 if result.held else 1)
    with pytest.raises(SystemExit, match="33 usable rows"):
        bench.main(["--data", str(data), "--model", str(base), *sizes, "--steps", "3"])


def test_budgets_and_pages(script: Any, tmp_path: Path) -> None:
    figures = script("figures")
    budgets = [figures.Budget("a / b", 1.05, 1.05), figures.Budget("speed", 2.0, 1.9, at_most=False)]
    result = figures.Result("x", "title", "setting", ["method", "n"], [["fa", "1"]], {"fa": (1.1, 1.0, 1.2)}, budgets)
    assert [budget.held for budget in budgets] == [True, False] and not result.held
    page, plotted, found = tmp_path / "page.md", tmp_path / "page.svg", tmp_path / "x.json"
    found.write_text(json.dumps([figures.asdict(result)]), encoding="utf-8")
    page.write_text("before\n<!-- figures x -->\nold\n<!-- end x -->\nafter\n", encoding="utf-8")
    for _ in range(2):  # filling again changes nothing
        assert figures.main([str(found), "--page", str(page)]) == 0
        assert page.read_text(encoding="utf-8") == (
            "before\n<!-- figures x -->\nsetting\n\n| method | n |\n| --- | --- |\n| fa | 1 |\n\n"
            "- a / b <= 1.05: 1.050, held\n- speed >= 2.00: 1.900, MISSED\n<!-- end x -->\nafter\n"
        )
    with pytest.raises(ValueError, match="no place for y: add <!-- figures y -->"):
        figures.fill("none", [replace(result, name="y")])
    pytest.importorskip("matplotlib")
    assert figures.main([str(found), "--plot", str(plotted)]) == 0
    drawn = plotted.read_text(encoding="utf-8")
    assert "title" in drawn and "cut" not in drawn
    low = replace(result, bars={"fa": (1.1, 1.0, 1.2), "LoRA": (-39.0, -40.0, -38.0)})
    figures.plot([low], plotted)
    drawn = plotted.read_text(encoding="utf-8")
    assert "bars are cut at -1" in drawn and "-39.00" in drawn


def test_results_of_a_gpu_make_a_section(script: Any) -> None:
    figures = script("figures")
    page = (SCRIPTS.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    page = page[: page.index("<!-- figures gpu -->")] + "<!-- figures gpu -->\n<!-- end gpu -->\n"
    here = figures.Result(figures.named("steps-nf4", "cpu"), "steps", "2 CPU threads", ["n"], [["1"]])
    there = figures.Result(figures.named("steps-nf4", "cuda"), "steps on it", "some GPU", ["n"], [["2"]])
    other = figures.Result(figures.named("memory-nf4", "cuda"), "memory on it", "some GPU", ["n"], [["3"]])
    assert here.name != there.name
    filled = figures.fill(page, [here])
    assert "## On a GPU" not in filled and "some GPU" not in filled
    both = figures.fill(filled, [there, other])
    assert both == figures.fill(both, [here, there, other])
    start = filled.index("<!-- figures gpu -->\n")
    assert both[:start] == filled[:start] and "2 CPU threads" in both[:start]
    assert both[start:] == (
        "<!-- figures gpu -->\n\n## On a GPU\n\n### steps on it\n\nsome GPU\n\n| n |\n| --- |\n| 2 |\n\n"
        "### memory on it\n\nsome GPU\n\n| n |\n| --- |\n| 3 |\n<!-- end gpu -->\n"
    )


@pytest.mark.parametrize(
    "content, flag, said",
    [
        ('[{"name": "tokens"}]', "--page", "is not what a benchmark wrote"),
        ("{", "--page", "is not what a benchmark wrote"),
        (None, "--page", "No such file"),
        ("[]", "--plot", "has bars to draw"),
        ("strange", "--page", "no place for strange: add <!-- figures strange -->"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, flag: str, said: str
) -> None:
    figures, found, target = script("figures"), tmp_path / "found.json", tmp_path / "target"
    target.write_text("as it was")
    if content == "strange":
        content = json.dumps([figures.asdict(figures.Result("strange", "title", "setting", ["n"], [["1"]]))])
    if content is not None:
        found.write_text(content)
    assert figures.main([str(found), flag, str(target)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and said in captured.err
    assert target.read_text() == "as it was"


def test_the_pages_places_are_those_of_the_scripts() -> None:
    page = (SCRIPTS.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    names = ["steps-bfloat16", "steps-float32", "steps-nf4", "memory", "memory-nf4", "tokens", "gpu"]
    names += ["complexity-layer", "complexity-model"]
    for name in names:
        assert page.count(f"<!-- figures {name} -->") == page.count(f"<!-- end {name} -->") == 1, name


def test_steps_on_a_quantised_base(script: Any, toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setitem(script("methods").SHAPES, "smollm2-12", replace(toy, hidden=64, intermediate=128, heads=2))
    out = tmp_path / "steps.json"
    assert script("bench_train").main(["steps", "--nf4", *TOY, "--rounds", "1", "--warm", "0", "--json", str(out)]) == 0
    (result,) = script("figures").read([out])
    assert result.name == "steps-nf4" and "NF4" in result.setting
    assert {"frozen", "fa gather", "fb gather", "lora", "dora"} <= result.bars.keys()
    assert not {"fa", "fb", "shira"} & result.bars.keys()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_of_each_method(script: Any, toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, methods, out = script("bench_train"), script("methods"), tmp_path / "memory.json"
    case = methods.Case("bfloat16", "cpu", 2, 2, 8, 0, False, replace(toy, vocabulary=2**17))
    # Weights, their gradient or not: 9 MB of embeddings alone, and 16 logits of 131,072 in fp32 are 8 MB.
    assert bench.measure_memory(case, "fa") > 8e6
    asked: list[tuple[str, dict[str, str]]] = []

    def stand_in(case: Any, method: str, environment: dict[str, str]) -> int:
        asked.append((method, environment))
        return {"frozen": 70, "fa": 79, "lora": 100}[method] * 10**6 + (10**6 if environment else 0)

    monkeypatch.setattr(bench, "_in_a_process", stand_in)
    args = ["memory", "--shape", "smollm2-12", *TOY, "--methods", "frozen", "fa", "lora", "--json", str(out)]
    assert bench.main(args) == 1
    (result,) = script("figures").read([out])
    assert [method for method, _ in asked] == ["frozen", "frozen", "fa", "fa", "lora", "lora"]
    assert result.rows[1] == ["fa", "79", "80", "0.79", "0.79"]
    assert [str(budget) for budget in result.budgets] == ["peak memory of fa / lora <= 0.78: 0.790, MISSED"]
    monkeypatch.setattr(bench, "_in_a_process", lambda case, method, environment: {"lora": 100}.get(method, 50) * 10**6)
    beside = bench.memory_result(case, ["fa", "lora", "lora 16 bit"])
    assert beside.columns[3:] == ["/ lora", "alive / lora", "/ lora 16 bit", "alive / lora 16 bit"]
    assert beside.rows[0] == ["fa", "50", "50", "0.50", "0.50", "1.00", "1.00"]
    assert beside.bars["fa"] == (0.5, 0.5, 0.5) and beside.name == "memory"
    names = [
        bench.memory_result(replace(case, **changes), ["lora"]).name
        for changes in ({"dtype": "float32"}, {"nf4": True})
    ]
    assert names == ["memory-float32", "memory-nf4"]


@pytest.mark.parametrize("writes, code, wanted", [(True, 0, 0), (True, 1, 1), (False, 1, 1), (False, 3, 3)])
def test_the_gpu_script(tmp_path: Path, writes: bool, code: int, wanted: int) -> None:
    """A missed budget lets the rest run; what leaves no figures ends it, and figures of an earlier run do not count."""
    python, out = tmp_path / "python", tmp_path / "out"
    write = """while [[ "$1" != --json ]]; do shift; done; echo "[]" > "$2";""" if writes else ""
    python.write_text(f"""#!/usr/bin/env bash\necho "$@" >> {tmp_path}/calls\n{write}\nexit {code}\n""")
    python.chmod(0o755)
    out.mkdir()
    (out / "steps-bf16.json").write_text("of an earlier run")
    command = ["bash", str(SCRIPTS / "bench_train_gpu.sh"), str(out), "--device", "cpu", "--layers", "1"]
    done = subprocess.run(command, env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True)
    assert done.returncode == wanted, done.stderr
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert all(Path(call[0]).name == "bench_train.py" and call[-4:] == command[-4:] for call in calls)
    ran = [(call[1], "--nf4" in call) for call in calls]
    everything = [("steps", False), ("memory", False), ("steps", True), ("memory", True)]
    assert ran == (everything if writes else everything[:1])
    assert len(list(out.iterdir())) == (4 if writes else 0)
