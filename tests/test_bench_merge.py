"""The benchmark of merging at toy size: its inputs are models and adapters, its instruments see what they should."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from safetensors import safe_open

from multisbora.adapter import Adapter
from multisbora.geometry import from_checkpoint

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
NAMES = ("figures", "synthetic", "measured", "merge_runs", "bench_merge")
MB = 10**6

pytestmark = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux")


@pytest.fixture(scope="module")
def script() -> Iterator[Callable[[str], ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)  # they import each other
        yield __import__
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def toy(script: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, all 16 fa tasks that fit, and the fb task."""
    synthetic, folder = script("synthetic"), tmp_path_factory.mktemp("toy")
    synthetic.write_model(folder / "base", synthetic.TOY, synthetic.TOY.size() // 2)
    for task in [*(f"fa{number}" for number in range(16)), "fb"]:
        synthetic.write_task(folder / task, synthetic.TOY, task, 4, "none")
    return folder


def test_a_random_checkpoint_is_a_llama(script: Any, toy: Path) -> None:
    from transformers import AutoModelForCausalLM

    shape, base = script("synthetic").TOY, toy / "base"
    shards = sorted(base.glob("*.safetensors"))
    assert len(shards) > 1 and sum(shard.stat().st_size for shard in shards) > shape.size()
    model, said = AutoModelForCausalLM.from_pretrained(base, output_loading_info=True)
    assert not any(said.values())
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == shape.tensors()
    matrices = [weight.float() for weight in weights.values() if weight.dim() == 2]
    assert all(0.018 < float(weight.std()) < 0.022 for weight in matrices)
    starts = {tuple(weight.flatten()[:8].tolist()) for weight in matrices}
    assert len(starts) == len(matrices)  # no two are the same piece
    index = json.loads((base / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(weight.numel() * 2 for weight in weights.values()) == shape.size()
    for name, file in index["weight_map"].items():
        with safe_open(base / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118  (no mapping)
    adapted = {matrix.module: matrix.shape for matrix in from_checkpoint(base).select(script("synthetic").TARGETS)}
    assert adapted == shape.adapted()


def test_the_shape_of_the_real_one(script: Any) -> None:
    synthetic = script("synthetic")
    shape = synthetic.LLAMA_3B
    assert shape.size() == 6_425_499_648  # of Llama-3.2-3B's two shards, without their headers
    assert synthetic.Shape(32, 4096, 14336, 32, 8, 128256).largest_adapted() == 2 * 4096 * 14336
    sizes = [shape.of_size(size).size() for size in (1e9, 2e9, 4e9)]
    assert sizes == pytest.approx([1e9, 2e9, 4e9], rel=0.06)
    assert shape.of_size(0).layers == 1 and shape.of_size(shape.size()) == shape


def test_random_tasks_are_disjoint(script: Any, toy: Path) -> None:
    geometry = from_checkpoint(toy / "base")
    adapters = [Adapter.read(toy / f"fa{number}") for number in range(16)]
    crossing = Adapter.read(toy / "fb")
    matrices = [adapter.fit(geometry) for adapter in (*adapters, crossing)]
    assert all(len(found) == 10 for found in matrices)
    for one, two in itertools.combinations([*adapters[:3], crossing], 2):
        meeting = crossing in (one, two) and adapters[2] in (one, two)
        for module in one.modules:
            assert one.modules[module].region.meets(two.modules[module].region) == meeting
    owned = [set(adapter.modules["model.layers.0.mlp.up_proj"].region.indices) for adapter in adapters]
    assert sum(map(len, owned)) == len(set.union(*owned)) == 64
    with pytest.raises(ValueError, match="too few columns or rows for fa16 of rank 4"):
        script("synthetic").write_task(toy / "fa16", script("synthetic").TOY, "fa16", 4, "none")


def test_memory_of_a_child_of_a_child_counts(script: Any) -> None:
    child = "import mmap, time; m = mmap.mmap(-1, 60_000_000, mmap.MAP_PRIVATE); m.write(bytes(60_000_000));"
    child += "time.sleep(0.3)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True); print('done')"
    found = script("measured").run([sys.executable, "-c", parent])
    assert found.output == "done\n" and found.seconds > 0.3
    assert 60 * MB < found.anonymous < 200 * MB and found.anonymous < found.peak < 250 * MB


def test_a_mapped_file_is_no_anonymous_memory(script: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(40 * MB))
    code = "import mmap, sys, time; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, mmap.MAP_SHARED,"
    code += "mmap.PROT_READ); n = sum(m[i] for i in range(0, len(m), 4096)); time.sleep(0.2)"
    found = script("measured").run([sys.executable, "-c", code, str(tmp_path / "file")])
    assert found.anonymous < 30 * MB and found.peak > 40 * MB


def test_a_peak_between_two_looks_is_seen(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = script("measured")
    monkeypatch.setattr(measured, "_LOOK", 0.2)
    code = "import mmap, time; time.sleep(0.3); m = mmap.mmap(-1, 80_000_000); m.write(bytes(80_000_000)); m.close();"
    assert measured.run([sys.executable, "-c", code + "time.sleep(0.5)"]).peak > 80 * MB


def test_a_command_that_fails_says_why(script: Any) -> None:
    with pytest.raises(RuntimeError, match=r"exit code 3: it broke"):
        script("measured").run([sys.executable, "-c", "import sys; print('it broke', file=sys.stderr); sys.exit(3)"])


def test_cold_and_warm_are_what_they_say(script: Any, tmp_path: Path) -> None:
    measured = script("measured")
    if script("merge_runs").file_system(tmp_path) in ("tmpfs", "ramfs"):
        pytest.skip("these files are never out of memory")
    paths = [tmp_path / "one", tmp_path / "two", tmp_path / "empty"]
    for path, size in zip(paths, (3 * MB, 5000, 0), strict=True):
        path.write_bytes(os.urandom(size))
    assert measured.in_memory(paths) == 1.0
    assert measured.make_cold(paths)
    assert measured.in_memory(paths) == 0.0
    with paths[0].open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
        file.read(4096)
    assert 0 < measured.in_memory(paths) < 0.5
    measured.make_warm(paths)
    assert measured.in_memory(paths) == 1.0
    assert measured.in_memory(paths[2:]) == 0.0


def test_memory_that_cannot_be_had_is_no_warm_run(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = script("measured")
    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setattr(measured, "in_memory", lambda paths: 0.5)
    monkeypatch.setattr(measured, "_DROP_CACHES", tmp_path / "none")
    with pytest.raises(RuntimeError, match=r"50\.0% of the input stays in the page cache: run this as root"):
        measured.make_cold([tmp_path / "file"])
    with pytest.raises(RuntimeError, match=r"only 50\.0% of the input stays in the page cache"):
        measured.make_warm([tmp_path / "file"])


def quick(tmp_path: Path, *arguments: str) -> list[str]:
    (tmp_path / "work").mkdir(exist_ok=True)
    once = ["--rounds", "1", "--growth-rounds", "1", "--inplace-rounds", "1"]
    return ["--quick", "--work", str(tmp_path / "work"), *once, *arguments]


def check_tables(results: dict[str, Any], shown: str) -> None:
    for result in results.values():
        assert all(len(row) == len(result.columns) for row in result.rows) and not result.budgets
        assert result.markdown() in shown


@pytest.mark.slow
def test_sections_at_toy_size(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench, out, raw = script("bench_merge"), tmp_path / "merge.json", tmp_path / "raw.jsonl"
    monkeypatch.setattr(bench, "TASKS", (2, 16))
    given = ["--only", "merge,growth,inplace", "--json", str(out), "--raw", str(raw), "--markdown"]
    assert bench.main(quick(tmp_path, *given)) == 0
    assert list((tmp_path / "work").iterdir()) == []
    results = {result.name: result for result in script("figures").read([out])}
    check_tables(results, capsys.readouterr().out)
    assert list(results) == ["merge", "merge-tasks", "merge-sizes", "merge-inplace"]
    whats = [tuple(row[:2]) for row in results["merge"].rows]
    assert whats == [(cache, what) for cache in ("cold", "warm") for what in ("multisbora", "cp", "cp + sync")]
    assert [row[0] for row in results["merge-tasks"].rows] == ["2", "16", "1 fa, 1 fb"]
    assert [row[1] for row in results["merge-sizes"].rows] == ["1", "2"]
    edits = ["add", "reweight", "remove", "whole merge"]
    assert [tuple(row[:3]) for row in results["merge-inplace"].rows] == [
        (task, cache, edit) for task in ("fb", "fa") for cache in ("cold", "warm") for edit in edits
    ]
    runs = [json.loads(line) for line in raw.read_text().splitlines()]
    assert {run["section"] for run in runs} == {"merge", "growth", "inplace"}
    assert all(run["seconds"] > 0 for run in runs)
    merges = [run for run in runs if run["what"] == "multisbora"]
    assert all(run["counted"] > script("synthetic").TOY.of_size(0).size() for run in merges)
    assert all(run["peak"] > run["anonymous"] > 5 * MB for run in merges)


@pytest.mark.slow
def test_peers_at_toy_size(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench, out = script("bench_merge"), tmp_path / "peers.json"
    monkeypatch.setattr(bench, "LIMITS", {"warm": 1.5})
    assert bench.main(quick(tmp_path, "--only", "peers", "--json", str(out), "--markdown")) == 0
    assert list((tmp_path / "work").iterdir()) == []
    shown = capsys.readouterr().out
    peers = ["PEFT", "mergekit"] if importlib.util.find_spec("mergekit") else ["PEFT"]
    assert ("mergekit is left out: give --mergekit" in shown) == ("mergekit" not in peers)
    results = {result.name: result for result in script("figures").read([out])}
    check_tables(results, shown)
    assert [row[1] for row in results["merge-peers"].rows] == ["multisbora", "cp", *peers]


def test_ratios_are_taken_within_rounds_and_budgets_judged(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench, runs, synthetic = script("bench_merge"), script("merge_runs"), script("synthetic")
    order: list[tuple[str, str]] = []

    def stand_in(self: Any, job: Any, cache: str, section: str) -> dict[str, Any]:
        order.append((cache, job.name))
        number = sum((cache, job.name) == known for known in order)
        if job.name == "cp":
            return {"seconds": 1.0 * number, "synced": 2.0 * number, "peak": MB, "anonymous": 0}
        seconds = {"cold": 1.1, "warm": 1.6}[cache] * number
        return {"seconds": seconds, "fsync": 0.5, "peak": 400 * MB, "anonymous": 200 * MB}

    monkeypatch.setattr(runs.Bench, "measure", stand_in)
    monkeypatch.setattr(runs, "LLAMA_3B", synthetic.TOY)  # of which --layers takes the first
    size = ["--layers", "2", "--rank", "4"]
    assert bench.main([*quick(tmp_path)[1:], "--only", "merge", "--rounds", "3", *size, "--markdown"]) == 1
    assert order == [
        (cache, what)
        for cache in ("cold", "warm")
        for what in ("multisbora", "cp", "cp", "multisbora", "multisbora", "cp")
    ]
    shown = capsys.readouterr().out
    assert "| cold | multisbora | 2.20 | 1.65 to 2.75 | 0.50 | 1.10 (1.10 to 1.10) | 0.55 | 400 | 200 |" in shown
    assert "| warm | cp + sync | 4.00 | 3.00 to 5.00 |  |  |  | 1 | 0 |" in shown
    assert "- merge / cp, cold <= 1.15: 1.100, held" in shown
    assert "- merge / cp, warm <= 1.50: 1.600, MISSED" in shown
    assert "peak memory of a cold merge / (one matrix + adapters + 300 MB) <= 1.00: 1.333, MISSED" in shown


def test_a_peer_that_merges_something_else_is_found(script: Any, toy: Path, tmp_path: Path) -> None:
    from multisbora.merge import merge

    check, shape = script("bench_merge").check_agreement, script("synthetic").TOY
    merge(toy / "base", [toy / "fa0", toy / "fa1"], output=tmp_path / "ours", allow_base_mismatch=True)
    weights = {"fa1": 0.9}
    other = tmp_path / "other"
    merge(toy / "base", [toy / "fa0", toy / "fa1"], weights, output=other, allow_base_mismatch=True)
    check(tmp_path / "ours", tmp_path / "ours", toy / "base", shape)
    for theirs in (other, toy / "base"):
        with pytest.raises(SystemExit, match=rf"{theirs.name} merged another model.layers.0.self_attn.q_proj.weight"):
            check(tmp_path / "ours", theirs, toy / "base", shape)


def test_an_edit_that_leaves_a_trace_is_found(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = script("merge_runs")

    def stand_in(self: Any, work: str, python: str = "", **arguments: Any) -> dict[str, Any]:
        if work == "merge":
            shutil.copytree(arguments["base"], arguments["output"])
        elif work == "add":
            with next(Path(arguments["folder"]).glob("*.safetensors")).open("ab") as file:
                file.write(b"x")
        return dict.fromkeys(("seconds", "peak", "anonymous", "written", "counted"), 1)

    monkeypatch.setattr(runs.Bench, "work", stand_in)
    with pytest.raises(SystemExit, match="after add and remove of fb the checkpoint is not what it was before"):
        script("bench_merge").main(quick(tmp_path, "--only", "inplace"))
    assert list((tmp_path / "work").iterdir()) == []


def test_inputs_that_are_kept_are_taken_again(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, runs = script("bench_merge"), script("merge_runs")
    found = {"seconds": 1.0, "synced": 1.0, "fsync": 0.0, "peak": 1, "anonymous": 1}
    monkeypatch.setattr(runs.Bench, "measure", lambda *_: found)
    kept = quick(tmp_path, "--only", "merge", "--keep")
    folder = tmp_path / "work" / bench.WORK
    assert bench.main(kept) == 0
    inputs = {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}
    base = runs.name_of(runs.TOY)
    names = {base, f"{base}-rank-4"}
    assert {path.parent.name for path in inputs} == {base, "fa0", "fa1"}
    (folder / "multisbora").mkdir()  # as a run that was killed leaves it
    (folder / "llama-9.partial").mkdir()
    assert bench.main(kept) == 0
    assert {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()} == inputs
    config = folder / f"{base}-rank-4" / "fa1" / "adapter_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "base_fingerprint": "of an older kind"}))
    assert bench.main(kept) == 0
    assert json.loads(config.read_text()) == content
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert bench.main(quick(tmp_path, "--only", "merge")) == 0
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--only", "merge,twice"], "--only twice is no section: they are merge, peers, growth, inplace"),
        (["--rounds", "0"], "rounds must be 1 or more"),
        (["--layers", "0"], "--layers and --rank must be 1 or more"),
        (["--rank", "193"], "16 tasks need 3088 columns of 3072"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        script("bench_merge").main([*quick(tmp_path)[1:], *arguments])
    assert ended.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]
    assert list((tmp_path / "work").iterdir()) == []


def test_a_disk_that_is_too_small(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench, synthetic = script("bench_merge"), script("synthetic")
    assert 13e9 < bench.space_needed(synthetic.LLAMA_3B, 64, ["merge"], False) < 14e9
    assert 32e9 < bench.space_needed(synthetic.LLAMA_3B, 64, ["merge", "peers"], True) < 34e9
    monkeypatch.setattr(bench.shutil, "disk_usage", lambda folder: SimpleNamespace(free=14 * 10**9))
    with pytest.raises(SystemExit) as ended:
        bench.main([*quick(tmp_path)[1:], "--only", "peers"])
    assert ended.value.code == 2 and "has only 14.0 GB: give --work another disk" in capsys.readouterr().err
    assert list((tmp_path / "work").iterdir()) == []


def test_one_run_at_a_time(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    bench = script("bench_merge")
    folder = tmp_path / "work" / bench.WORK
    folder.mkdir(parents=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit):
            bench.main(quick(tmp_path))
    finally:
        os.close(lock)
    assert "another run is measuring" in capsys.readouterr().err and folder.is_dir()


def test_the_pages_places_are_those_of_the_scripts() -> None:
    page = (SCRIPTS.parent / "docs" / "merging.md").read_text(encoding="utf-8")
    names = ["merge", "merge-peers", "merge-tasks", "merge-sizes", "merge-inplace"]
    names += ["switch-smollm2-135m", "switch-llama-3-8b"]
    for name in names:
        assert page.count(f"<!-- figures {name} -->") == page.count(f"<!-- end {name} -->") == 1, name
