"""The study of composition at toy size: the peers are what they are said to be, runs are kept, all of it runs."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from multisbora.adapter import Adapter
from multisbora.dataset import Example
from multisbora.loading import load_base

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
NAMES = ("figures", "baselines", "study_composition")
PARTS = tuple(f"composition_{part}" for part in ("tasks", "runs", "plan", "steps", "work", "tables"))
Script = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def script() -> Iterator[Script]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)  # they import each other
        yield __import__
    for name in (*NAMES, *PARTS):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def toy(script: Script, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(model, data) of --quick."""
    found: tuple[Path, Path] = script("composition_tasks").write_toy(tmp_path_factory.mktemp("toy"))
    return found


# --------------------------------------------------------------------------------------------------------------- tasks


def test_rows_are_split_by_their_prompts(script: Script) -> None:
    split = script("composition_tasks").split
    rows = [{"instruction": f"How  MANY {n % 30}?", "output": str(n)} for n in range(60)]
    train, dev = split(rows, 10)
    assert len(dev) == 10 and len(train) == 50
    assert {row["instruction"] for row in train}.isdisjoint(row["instruction"] for row in dev)
    assert len(split(rows, 400)[1]) <= 15  # a quarter
    again = split([{**row, "instruction": row["instruction"].lower()} for row in rows], 10)
    assert [row["output"] for row in again[1]] == [row["output"] for row in dev]  # case and space mean nothing


def test_tasks_are_cut_from_their_files(script: Script, toy: tuple[Path, Path], tmp_path: Path) -> None:
    tasks = script("composition_tasks")
    sizes = tasks.Sizes(dev=5, watch=2, test=3, steps=4, batch=2)
    tasks.prepare(toy[1], tmp_path, sizes)

    def rows(task: str, part: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in (tmp_path / "rows" / f"{task}-{part}.jsonl").read_text().splitlines()]

    for task, cut in tasks.CUTS.items():
        parts = {part: rows(task, part) for part in ("train", "dev", "watch", "test")}
        assert len(parts["test"]) == 3 and parts["watch"] == parts["dev"][:2] and len(parts["dev"]) in (3, 5)
        assert {row["subset"] for row in parts["train"]} == set(cut.subsets or tasks._subsets(cut.source))
        assert all(" test " in row["instruction"] for row in parts["test"])
    assert len(tasks.EIGHT) == len(set(tasks.EIGHT)) == 8 and set(tasks.MERGES[4]) < set(tasks.EIGHT)
    for merged in tasks.MERGES.values():  # as many rows of each task as its own adapter learns
        union = rows(tasks.joint(merged), "train")
        assert len(union) == len(merged) * sizes.steps * sizes.batch
        for task in merged:
            assert sum(row in rows(task, "train") for row in union) >= sizes.steps * sizes.batch
    tasks.prepare(toy[1], tmp_path, sizes)
    with pytest.raises(ValueError, match=r"math-train\.jsonl is of a study of other rows or settings: give another"):
        tasks.prepare(toy[1], tmp_path, tasks.Sizes(dev=6, watch=2, test=3, steps=4, batch=2))


# ---------------------------------------------------------------------------------------------------------------- runs


def test_a_key_hangs_on_what_decides_the_result(script: Script) -> None:
    run = script("composition_runs").Run
    one = run("train", "a b/c, --d", {"x": 1})
    assert one.key.startswith("train-a-b-c-d-") and one.key == run("train", "a b/c, --d", {"x": 1}).key
    others = [
        run("train", one.name, {"x": 2}),
        run("own", one.name, {"x": 1}),
        run("train", one.name, {"x": 1}, (one,)),
    ]
    deeper = run("train", one.name, {"x": 1}, (run("train", "other", {"x": 2}),))
    assert len({other.key.rpartition("-")[2] for other in (one, *others, deeper)}) == 5


def test_what_is_needed_comes_first_and_nothing_twice(script: Script, tmp_path: Path) -> None:
    runs, path = script("composition_runs"), tmp_path / "runs.jsonl"
    store = runs.Store(path)
    a, b = runs.Run("k", "a", {}), runs.Run("k", "b", {})
    c = runs.Run("k", "c", {}, (a, b))
    d, e = runs.Run("k", "d", {"bad": 1}), runs.Run("k", "e", {"late": 1})
    f = runs.Run("k", "f", {}, (d,))
    seen: list[str] = []

    def perform(run: Any, threads: int) -> dict[str, Any]:
        assert 1 <= threads <= (os.cpu_count() or 1)
        seen.append(run.name)
        if run.name == "d":
            raise RuntimeError("it\nbroke")
        return {"name": run.name}

    def plan() -> list[Any]:
        return [c, f] + ([e] if store.has(c) else [])  # what comes next hangs on what was found

    failed = runs.work_off(plan, store, perform)
    assert failed == {d.key: "RuntimeError: it broke"}
    assert sorted(seen) == ["a", "b", "c", "d", "e"] and seen.index("c") > max(seen.index("a"), seen.index("b"))
    assert store.result(c) == {"name": "c"} and not store.has(f)
    fresh = runs.Store(path)
    assert fresh.read(c)["seconds"] >= 0
    with pytest.raises(KeyError):
        fresh.read(f)
    seen.clear()
    runs.work_off(lambda: [c, e], fresh, perform, workers=1)
    assert seen == []


def test_files_that_are_gone_are_made_anew_where_they_are_needed(script: Script, tmp_path: Path) -> None:
    runs, path = script("composition_runs"), tmp_path / "runs.jsonl"
    claims = runs.Run("claims", "a", {})
    adapter = runs.Run("train", "b", {}, (claims,))
    own, mix = runs.Run("own", "c", {}, (adapter,)), runs.Run("mix", "d", {}, (adapter,))
    runs.work_off(lambda: [own], runs.Store(path), lambda run, threads: {"first": True}, workers=1)
    files: set[str] = set()  # of another machine
    seen: list[str] = []

    def perform(run: Any, threads: int) -> dict[str, Any]:
        assert run.kind == "claims" or all(need.key in files for need in run.needs)
        seen.append(run.kind)
        files.add(run.key)
        return {"first": False}

    store = runs.Store(path)
    runs.work_off(lambda: [own], store, perform, at_hand=lambda run: run.key in files)
    assert seen == []
    runs.work_off(lambda: [own, mix], store, perform, at_hand=lambda run: run.key in files)
    assert seen == ["claims", "train", "mix"]
    again = runs.Store(path)
    assert [again.result(run)["first"] for run in (adapter, own, mix)] == [True, True, False]
    files.discard(claims.key)  # from which what was made from it follows
    seen.clear()
    runs.work_off(lambda: [runs.Run("mix", "e", {}, (adapter,))], store, perform, at_hand=lambda run: run.key in files)
    assert seen == ["claims", "mix"]


def test_a_line_that_was_cut_short_is_passed_over(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, path = script("composition_runs"), tmp_path / "runs.jsonl"
    a, b = runs.Run("own", "a", {}), runs.Run("own", "b", {})
    store = runs.Store(path, "c0ffee")
    store.write(a, {"x": 1}, 2.0)
    store.write(b, {"x": 2}, 2.0)
    assert json.loads(path.read_text().splitlines()[0])["commit"] == "c0ffee"
    path.write_text(path.read_text()[:-9])
    cut = runs.Store(path)
    assert cut.has(a) and not cut.has(b) and f"line 2 of {path} holds no run" in capsys.readouterr().err
    cut.write(b, {"x": 3}, 2.0)
    assert [runs.Store(path).result(run)["x"] for run in (a, b)] == [1, 3]


def a_plan(script: Script, tmp_path: Path, **settings: Any) -> Any:
    plan, runs = script("composition_plan"), script("composition_runs")
    ranks = dict.fromkeys([*plan.FAMILIES, *plan.RATED_AS], 4)
    setup = plan.Setup("base", "print", ("q_proj",), ranks, {**ranks, "fb": 2}, (1e-3, 2e-3, 4e-3), **settings)
    return plan.Plan(setup, runs.Store(tmp_path / "runs.jsonl"))


def answer_rates(plan: Any, kind: str, best: float) -> list[float]:
    """Do the trainings for a learning rate, whose dev loss is lowest at `best`. Which rates were tried."""
    while missing := [run for run in plan.rate_runs(kind) if not plan.store.has(run)]:
        assert plan.rate(kind) is None
        for run in missing:
            own = 1.0 if run.spec["task"] == "math" else 0.1
            plan.store.write(run, {"dev_loss": own * (1 + abs(math.log2(run.spec["rate"] / best)))}, 1.0)
    return sorted({run.spec["rate"] for run in plan.rate_runs(kind)})


@pytest.mark.parametrize(
    ("best", "tried", "taken"),
    [
        (2e-3, [1e-3, 2e-3, 4e-3], 2e-3),
        (4e-3, [1e-3, 2e-3, 4e-3, 8e-3], 4e-3),
        (1.0, [1e-3, 2e-3, 4e-3, 8e-3, 16e-3], 16e-3),
        (1e-3, [5e-4, 1e-3, 2e-3, 4e-3], 1e-3),
    ],
)
def test_a_learning_rate_is_looked_for_beyond_the_edge(
    script: Script, tmp_path: Path, best: float, tried: list[float], taken: float
) -> None:
    plan = a_plan(script, tmp_path)
    assert answer_rates(plan, "lora", best) == pytest.approx(tried)
    assert plan.rate("lora") == pytest.approx(taken)


def test_rates_come_first_and_lori_after_its_masks(script: Script, tmp_path: Path) -> None:
    plan, names = a_plan(script, tmp_path), script("composition_plan")
    first = next(plan.runs(["pair"]))
    assert first.kind == "train" and first.spec["rate"] == 1e-3 and "random" in first.name
    cell = names.Cell(names.PAIR, 0, names.LORI, "cat")
    assert {run.spec["peer"] for run in plan.of(cell)} == {"lori-dense"}
    answer_rates(plan, "lori-dense", 2e-3)
    lori = plan.trainings(cell)
    assert {run.spec["peer"] for run in lori} == {"lori"}
    assert {need.spec["rate"] for run in lori for need in run.needs} == {2e-3}
    assert plan.rate("lori") == 2e-3  # and learns as they did


def test_arms_differ_in_what_they_say(script: Script, tmp_path: Path) -> None:
    plan, names = a_plan(script, tmp_path, isolate=2.0), script("composition_plan")
    for kind in ("fa", "fb", "lora"):
        answer_rates(plan, kind, 2e-3)

    def trained(arm: Any, tasks: tuple[str, ...] = names.PAIR) -> Any:
        return plan.trainings(names.Cell(tasks, 0, arm, names.ONE))[0]

    arms = (names.FA, names.FA_ISOLATED, names.FA_QUIET, names.FA_BOTH, names.OVERLAP, names.FB, names.LORA, names.OSRM)
    assert len({trained(arm).key for arm in arms}) == len(arms)
    assert [need.kind for need in trained(names.FA).needs] == ["claims"] and trained(names.FA).spec["isolate"] == 0
    assert [need.kind for need in trained(names.FA_BOTH).needs] == ["moments"] and trained(names.FA_BOTH).spec[
        "isolate"
    ] == 2
    assert trained(names.OSRM).spec["others"] == ["commonsense"]
    alone = [need.spec for run in plan.trainings(names.Cell(names.PAIR, 0, names.OVERLAP, "")) for need in run.needs]
    assert [spec["tasks"] for spec in alone] == [["math"], ["commonsense"]]
    four = trained(names.FB, names.MERGES[4])
    assert four.key == trained(names.FB, names.MERGES[8]).key and four.needs[0].spec["rank"] == 2
    joint = plan.trainings(names.Cell(names.PAIR, 0, names.JOINT, names.ONE))
    assert [run.spec["task"] for run in joint] == ["joint2"] and joint[0].needs[0].spec["rank"] == 4
    svd = plan.lambdas(names.Cell(names.PAIR, 0, names.LORA, "svd grid"))
    assert svd.key == plan.lambdas(names.Cell(names.PAIR, 0, names.LORA, "cat grid")).key
    both = plan.mix(names.Cell(names.PAIR, 0, names.FA, names.CORRECTED_TUNED))
    assert [need.kind for need in both.needs] == ["train", "train", "through", "through", "tune"]
    assert both.spec["how"] == "corrected" and both.needs[-1].spec["corrected"]
    assert both.needs[-1].needs == both.needs[:-1]
    finer = plan.mix(names.Cell(names.PAIR, 0, names.FA, names.CORRECTED_CHANNEL))
    assert [need.kind for need in finer.needs] == ["train", "train", "tune"] and finer.spec["how"] == "live"
    assert finer.needs[-1].needs == both.needs and finer.needs[-1].spec["by"] == "channel"


# ----------------------------------------------------------------------------------------------------------- the peers


def test_ranks_come_nearest_to_one_number_of_values(script: Script, toy: tuple[Path, Path]) -> None:
    from multisbora.geometry import from_checkpoint

    ranks, geometry = script("study_composition").ranks, from_checkpoint(toy[0])
    shapes = [matrix.shape for matrix in geometry.select(["q_proj", "k_proj", "up_proj", "down_proj"])]
    out, into = (sum(shape[axis] for shape in shapes) for axis in (0, 1))
    found = ranks(geometry, ["q_proj", "k_proj", "up_proj", "down_proj"], 8, 2)
    assert found["fa"] == found["lori"] == found["lori-dense"] == 8
    for kind, each in (("lora", out + into), ("osrm", out + into), ("fb", into)):
        assert abs(found[kind] * each - 8 * out) <= each / 2
    assert ranks(geometry, ["q_proj", "k_proj"], 4, 8)["fb"] == 2  # k_proj has 16 rows
    with pytest.raises(ValueError, match="8 tasks of rank 8 need 64 columns of 32: lower --rank"):
        ranks(geometry, ["q_proj"], 8, 8)


def test_the_largest_entries_of_a_matrix(script: Script) -> None:
    largest = script("baselines").largest
    values = torch.tensor([[0.1, -5.0, 0.2], [3.0, 0.0, -0.3]])
    assert largest(values, 1 / 3).tolist() == [[False, True, False], [True, False, False]]
    assert int(largest(torch.zeros(30, 10)).sum()) == 30 and int(largest(torch.ones(2, 2)).sum()) == 1


TARGETS = ["q_proj", "up_proj", "down_proj"]


def an_adapter(script: Script, base: Path, kind: str, seed: str = "0", rank: int = 3) -> Any:
    return script("baselines").adapt(load_base(base), kind, rank, TARGETS, seed)


def train_a_little(model: Any, steps: int = 3) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.0)
    ids = torch.arange(60)[None] % 50
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def test_lori_trains_what_its_mask_says(script: Script, toy: tuple[Path, Path]) -> None:
    baselines = script("baselines")
    dense = an_adapter(script, toy[0], "lori-dense")
    assert all("lora_B" in name for name, p in dense.named_parameters() if p.requires_grad)
    starts = {name: layer.lora_A["default"].weight.clone() for name, layer in baselines.layers(dense).items()}
    train_a_little(dense)
    assert all(torch.equal(starts[n], la.lora_A["default"].weight) for n, la in baselines.layers(dense).items())
    masks = {n: baselines.largest(la.lora_B["default"].weight.detach()) for n, la in baselines.layers(dense).items()}
    sparse = an_adapter(script, toy[0], "lori")
    assert baselines.train_only(sparse, masks) == sum(int(mask.sum()) for mask in masks.values())
    train_a_little(sparse)
    for name, layer in baselines.layers(sparse).items():
        assert torch.equal(layer.lora_B["default"].weight.detach() != 0, masks[name])


def test_a_start_follows_from_its_seed(script: Script, toy: tuple[Path, Path]) -> None:
    def start(seed: str) -> torch.Tensor:
        torch.rand(3)  # whatever was drawn before
        (first, *_) = script("baselines").layers(an_adapter(script, toy[0], "lora", seed)).values()
        return first.lora_A["default"].weight.detach()

    state = torch.get_rng_state()
    assert torch.equal(start("math 0"), start("math 0")) and not torch.equal(start("math 0"), start("math 1"))
    torch.set_rng_state(state)
    with pytest.raises(ValueError, match="'ia3' is none of lora, osrm, lori-dense, lori"):
        an_adapter(script, toy[0], "ia3")


def some_examples(shift: int) -> list[Example]:
    return [Example([5 + (shift * n + place) % 200 for place in range(6 + n)], 2, n) for n in range(4)]


def test_osrm_starts_where_the_others_are_quiet(script: Script, toy: tuple[Path, Path]) -> None:
    baselines, base = script("baselines"), load_base(toy[0])
    base.config.use_cache = False
    others = [some_examples(7), some_examples(11)[:2]]
    seen: dict[str, list[torch.Tensor]] = {}
    layer = base.get_submodule("model.layers.1.mlp.down_proj")
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.setdefault("x", []).append(inputs[0].detach()[0]))
    tasks = []
    for rows in others:
        seen.clear()
        with torch.no_grad():
            for example in rows:
                base(input_ids=torch.tensor([example.input_ids]))
        tasks.append(torch.cat(seen["x"]).float())
    hook.remove()
    moments = baselines.input_moments(base.eval(), TARGETS, others)
    assert len(moments) == 2 * len(TARGETS)
    dense = sum(x.T @ x / len(x) for x in tasks) / 2
    torch.testing.assert_close(moments["model.layers.1.mlp.down_proj"], dense, rtol=1e-4, atol=1e-6)

    model = baselines.adapt(base, "osrm", 3, TARGETS, "0")
    drawn = baselines.layers(model)["model.layers.1.mlp.down_proj"].lora_A["default"].weight.detach().clone()
    baselines.start_quietly(model, moments)
    quiet = baselines.layers(model)["model.layers.1.mlp.down_proj"].lora_A["default"].weight.detach()
    assert quiet.norm(dim=1).tolist() == pytest.approx([baselines.LORA_ROW] * 3, rel=1e-4)
    assert float(drawn.norm(dim=1).mean()) == pytest.approx(baselines.LORA_ROW, rel=0.1)  # as long as LoRA's own
    loud = [float((x @ quiet.T).square().sum() / (x @ drawn.T).square().sum()) for x in tasks]
    assert max(loud) < 0.02


def test_peers_are_combined_by_peft(script: Script, toy: tuple[Path, Path], tmp_path: Path) -> None:
    baselines = script("baselines")
    for task in ("one", "two"):
        model = an_adapter(script, toy[0], "lora", task)
        train_a_little(model)
        model.save_pretrained(tmp_path / task, save_embedding_layers=False)
    model, _ = baselines.load_peers(toy[0], {task: tmp_path / task for task in ("one", "two")})
    ids = torch.arange(40)[None]
    layer = baselines.layers(model)["model.layers.0.mlp.up_proj"]
    deltas = {task: layer.get_delta_weight(task) for task in ("one", "two")}
    assert all(float(delta.norm()) > 0 for delta in deltas.values())

    def logits(weights: dict[str, float], how: str) -> torch.Tensor:
        with torch.no_grad(), baselines.combined(model, weights, how):
            found: torch.Tensor = model(ids).logits
        return found

    bare = load_base(toy[0]).eval()
    with torch.no_grad():
        assert torch.equal(logits({}, "cat"), bare(ids).logits)
    with baselines.combined(model, {"one": 0.5, "two": 2.0}, "cat"):
        mixed = layer.get_delta_weight(baselines.MERGED)
        torch.testing.assert_close(mixed, 0.5 * deltas["one"] + 2 * deltas["two"])
    own = logits({"two": 1.0}, "svd")
    model.set_adapter("two")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, own)
    results = [logits({"one": 1.0, "two": 1.0}, how) for how in baselines.MERGES]
    assert all(torch.isfinite(result).all() for result in results)
    assert all(not torch.allclose(results[0], other, atol=1e-4) for other in results[1:])  # and none is a plain sum
    again = [logits({"one": 1.0, "two": 1.0}, how) for how in baselines.MERGES]
    assert all(map(torch.equal, results, again))  # dare draws the same
    assert baselines.MERGED not in model.peft_config


def test_a_grid_is_climbed_to_its_best_point(script: Script) -> None:
    work = script("composition_work")
    tried: dict[tuple[float, ...], float] = {}

    def lost(point: tuple[float, ...]) -> float:
        one, two = point
        return tried.setdefault(point, (one - 0.9) ** 2 + (two - 0.3) ** 2 + 0.02 * (one - two) ** 2)

    best = work.climb(lost, 2, tried)
    assert best == min(((a, b) for a in work.LAMBDAS for b in work.LAMBDAS), key=lost) == (0.9, 0.3)
    tried.clear()
    wanted = (0.2, 1.2) * 4
    far = lambda point: sum((a - b) ** 2 for a, b in zip(point, wanted, strict=True))  # noqa: E731
    many = work.climb(lambda point: tried.setdefault(point, far(point)), 8, tried)
    assert len(tried) == work.TRIALS and tried[many] == min(tried.values())


def test_wilson_intervals(script: Script) -> None:
    wilson = script("composition_tables").wilson
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


# ----------------------------------------------------------------------------------------------------------- all of it


def run_study(script: Script, work: Path, *arguments: str) -> int:
    code: int = script("study_composition").main(["--work", str(work), "--quick", "--seeds", "0", *arguments])
    return code


@pytest.fixture(scope="module")
def done(script: Script, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder in which three sections are done."""
    work = tmp_path_factory.mktemp("study")
    out = work / "results.json"
    assert run_study(script, work, "--only", "pair,scores,crosstalk", "--json", str(out)) == 0
    return work


def read_runs(work: Path) -> dict[str, Any]:
    return {run["key"]: run for run in map(json.loads, (work / "runs.jsonl").read_text().splitlines())}


def nll(found: Any) -> float:
    return float(sum(found["nats"]) / sum(found["tokens"]))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tables_say_what_the_runs_found(script: Script, done: Path) -> None:
    plan = script("composition_plan")
    results = {result.name: result for result in script("figures").read([done / "results.json"])}
    heard, where = "composition-crosstalk-2", "composition-crosstalk-2-where"
    assert list(results) == ["composition-2", "composition-2-nll", heard, where, "composition-scores"]
    lines = [(row[0], row[1]) for row in results["composition-2"].rows]
    named = script("composition_tables")._named
    assert lines == [(arm.name, named(arm, how)) for arm, hows in plan.FEW for how in hows]
    for result in results.values():
        assert all(len(row) == len(result.columns) for row in result.rows) and not result.budgets
    runs = read_runs(done)
    (base,) = (run["result"]["math"] for run in runs.values() if (run["kind"], run["name"]) == ("base", "math"))
    (own,) = (
        run["result"]["math"] for run in runs.values() if run["kind"] == "own" and run["name"].startswith("LoRA math")
    )
    (mix,) = (
        run["result"]["math"] for run in runs.values() if run["name"] == "LoRA cat 2t s0" and run["kind"] == "mix"
    )
    kept = (nll(base) - nll(mix)) / (nll(base) - nll(own))
    (row,) = (row for row in results["composition-2"].rows if row[:2] == ["LoRA", "sum, lambda 1"])
    assert row[4] == f"{kept:.1%}"
    assert "Greedy answers to 2 test rows a task" in results["composition-scores"].setting
    assert all("on 2 dev rows a task" in results[name].setting for name in (heard, where))
    assert [row[0] for row in results["composition-scores"].rows][:2] == ["base", "fa, isolated, --isolate: own"]
    for name, columns in ((heard, ["math", "commonsense", "kept"]), (where, ["q_proj", "down_proj", "worst matrix"])):
        assert set(columns) < set(results[name].columns)
        told = [(arm.name, how, task) for _, arm, how in plan.FEW_HEARD for task in ("math", "commonsense")]
        assert [tuple(row[:3]) for row in results[name].rows] == told
    kept = [row[-2] for row in results[heard].rows]
    assert all(kept[:2]) and kept[2:] == ["", ""] and "lambdas are in the values" in results[heard].setting
    looks = (run for run in runs.values() if run["kind"] == "crosstalk")
    look = next(run["result"] for run in looks if run["name"] == "fa, random lambda 1 2t s0")
    harm = {of: figures["harm"] for of, figures in look["total"]["math"].items()}
    assert results[heard].rows[0][3:5] == ["", f"{harm['commonsense'] / harm['math']:.1%}"]
    assert math.isclose(sum(kind["math"] for kind in look["kinds"].values()), harm["commonsense"])
    page = "".join(f"<!-- figures {name} -->\n<!-- end {name} -->\n" for name in results)
    assert "sum, lambda 1" in script("figures").fill(page, list(results.values()))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_trainings_saw_the_same_batches(script: Script, done: Path) -> None:
    runs = [run for run in read_runs(done).values() if run["kind"] == "train" and run["spec"]["task"] == "math"]
    assert {run["spec"].get("peer", "ours") for run in runs} == {"ours", "lora", "osrm", "lori-dense", "lori"}
    assert len(runs) >= 8 and len({run["result"]["batches"] for run in runs}) == 1
    assert len({run["result"]["loss"] for run in runs}) == len(runs)  # and none is another's twin
    values = {run["spec"].get("peer", "ours"): run["result"]["trainable_parameters"] for run in runs}
    assert values["lori"] < 0.2 * values["lori-dense"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_control_has_the_same_indices_for_all(script: Script, done: Path) -> None:
    def indices(words: str) -> list[dict[str, Any]]:
        folders = sorted((done / "trained").glob(f"train-fa-{words}-s0*/adapters/*"))
        adapters = [Adapter.read(folder) for folder in folders if folder.name in ("math", "commonsense")]
        return [{name: module.region.indices for name, module in adapter.modules.items()} for adapter in adapters]

    one, two = indices("same-indices-for-all-*")
    assert one == two
    one, two = indices("random-*")
    assert all(set(one[name]).isdisjoint(two[name]) for name in one)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_is_there_is_not_done_again(script: Script, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, before = done / "runs.jsonl", read_runs(done)
    gone = {next(key for key in before if key.startswith(start)) for start in ("own-LoRA", "train-LoRA")}
    lines = runs.read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["key"] not in gone]
    runs.write_text("".join(kept))
    assert run_study(script, done, "--only", "pair,scores") == 0
    said = capsys.readouterr().err
    assert said.count(": done in") == 2  # the adapter that was there is not trained once more
    after = runs.read_text()
    assert after.startswith("".join(kept)) and len(after.splitlines()) == len(lines)
    assert {key: run["result"] for key, run in read_runs(done).items()} == {k: r["result"] for k, r in before.items()}
    assert run_study(script, done, "--report") == 0
    assert "OSRM" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_other_batches_are_noticed(script: Script, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = done / "changed.jsonl"
    (key,) = (key for key, run in read_runs(done).items() if key.startswith("train-OSRM-math"))
    lines = read_runs(done)
    lines[key]["result"]["batches"] = "others"
    changed.write_text("".join(json.dumps(line) + "\n" for line in lines.values()))
    elsewhere = done / "elsewhere"  # neither rows nor adapters are needed for tables
    assert run_study(script, elsewhere, "--report", "--runs", str(changed)) == 1
    assert f"{key} was trained on other batches" in capsys.readouterr().err
    assert not (elsewhere / "rows").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_process_of_its_own_finds_the_same(script: Script, done: Path) -> None:
    study, plan, runs = script("study_composition"), script("composition_plan"), script("composition_runs")
    store, made = runs.Store(done / "runs.jsonl"), {}
    whole = study.Plan

    def keep(setup: Any, *rest: Any) -> Any:
        made["setup"] = setup
        return whole(setup, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "Plan", keep)
        assert run_study(script, done, "--report") == 0
    lock = os.open(done, os.O_RDONLY)
    try:
        steps = script("composition_steps").Steps(done, made["setup"], store, here=False, lock=lock)
        cell = plan.Cell(plan.PAIR, 0, plan.LORA, "cat")
        mix = whole(made["setup"], store).mix(cell)
        for task, found in steps(mix, 1).items():
            assert found["nats"] == pytest.approx(store.result(mix)[task]["nats"], rel=1e-3)
    finally:
        os.close(lock)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_merges_of_four(script: Script, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert run_study(script, tmp_path, "--only", "four", "--json", str(out)) == 0
    results = script("figures").read([out])
    assert [result.name for result in results] == ["composition-4", "composition-4-nll"]
    assert [row[0] for row in results[0].rows] == ["fa, random", "LoRA"]
    assert results[0].columns[4:8] == list(script("composition_tasks").MERGES[4])


def test_processes_that_fail_say_why_and_can_be_stopped(script: Script, tmp_path: Path) -> None:
    runs = script("composition_runs")
    steps = script("composition_steps").Steps(tmp_path, None, runs.Store(tmp_path / "runs.jsonl"), here=False, lock=0)
    run = runs.Run("own", "one", {})
    assert steps._start(run, ["-c", "import os; print(os.environ['OMP_NUM_THREADS'])"], tmp_path, 3) == "3\n"
    with pytest.raises(RuntimeError, match=r"exit code 3: it broke \(see .*own-one-.*\.log\)"):
        steps._start(run, ["-c", "import sys; print('it broke', file=sys.stderr); sys.exit(3)"], tmp_path, 1)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(steps._start, run, ["-c", "import time; print(1); time.sleep(100)"], tmp_path, 1)
        while not steps._children:
            time.sleep(0.01)
        steps.stop()
        assert isinstance(waiting.exception(60), RuntimeError)
    with pytest.raises(RuntimeError, match="stopped"):
        steps._start(run, ["-c", ""], tmp_path, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quick", "--only", "triple"], "--only triple is no section: they are pair, seeds"),
        ([], "--data names the folder of the rows"),
        (["--quick", "--isolate", "0"], "--isolate must be above 0"),
        (["--quick", "--runs", "nowhere/runs.jsonl"], "nowhere is no folder"),
        (["--quick", "--rank", "5"], "8 tasks of rank 5 need 40 columns of 32"),
    ],
)
def test_refusals(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        script("study_composition").main(["--work", str(tmp_path), *arguments])
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_two_studies_in_one_folder_are_refused(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    lock = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit):
            script("study_composition").main(["--work", str(tmp_path), "--quick"])
        assert "is at work in" in capsys.readouterr().err
    finally:
        os.close(lock)
