"""Several processes train one task as one process does, or end in one line that says why not."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import tiny_llama
from commands import make_project, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import BATCH, ENDED, NOTES, ROWS
from safetensors.numpy import load_file

from multisbora.distributed import Processes, StepBatches, first_to_fail, is_first
from multisbora.errors import TrainingError, UsageError
from multisbora.recipe import Training

# A loaded machine may take minutes for what takes half of one otherwise.
pytestmark = pytest.mark.timeout(900)
# Two processes add up the gradients of a step in another order than one does, in fp32: seen were 4.8e-7 (one unit in
# the last place) on losses of 5.5 and 2.3e-7 on values up to 0.23, after 8 steps of AdamW.
LOSS = VALUES = 2e-6
# Sharded bf16 weights use the gather form, which rounds a sum where the in-place form rounds a weight.
BF16_LOSS, BF16_VALUES = 2e-3, 1e-2


# --- what was promised --------------------------------------------------------------------------------------------


def torchrun(count: int, rank: int = 0, **more: str) -> dict[str, str]:
    return {"WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank), **more}


def test_promises_of_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Processes.promised({}) == Processes(1, 0, "ddp")
    assert Processes.promised(torchrun(4, 2)) == Processes(4, 2, "ddp")
    fsdp = torchrun(2, 1, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    assert Processes.promised(fsdp) == Processes(2, 1, "fsdp2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert Processes.promised(torchrun(2, ACCELERATE_USE_DEEPSPEED="true")).parallelism == "deepspeed"
    assert Processes.promised({}).settings == {"processes": 1}
    assert Processes.promised(fsdp).settings == {"processes": 2, "parallelism": "fsdp2"}
    # What MPI and Slurm set of a single process promises nothing.
    assert Processes.promised({"PMI_SIZE": "1"}) == Processes()


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (torchrun(2, ACCELERATE_USE_FSDP="true"), ("FSDP version 1", "fsdp_version: 2")),
        (torchrun(2, ACCELERATE_USE_FSDP="true", FSDP_VERSION="1"), ("FSDP version 1", "fsdp_version: 2")),
        (torchrun(2, ACCELERATE_USE_MEGATRON_LM="true"), ("Megatron-LM",)),
        (torchrun(2, ACCELERATE_USE_DEEPSPEED="true"), ("package deepspeed is not installed", "pip install")),
        (
            torchrun(2, ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_USE_FSDP="true", FSDP_VERSION="2"),
            ("DeepSpeed and FSDP exclude each other",),
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, ("OMPI_COMM_WORLD_SIZE promises 2", "torchrun")),
        (torchrun(2) | {"WORLD_SIZE": "two"}, ("WORLD_SIZE is 'two'", "not a number")),
    ],
)
def test_what_cannot_be_had_is_refused(
    environ: dict[str, str], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(lambda: Processes.promised(environ), UsageError, *words)


def test_deepspeed_config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, environ = tmp_path / "ds.json", torchrun(2)
    refused(lambda: Processes.promised(environ, config), UsageError, "ds.json cannot be read", "No such file")
    config.write_text("[1]")
    refused(lambda: Processes.promised(environ, config), UsageError, "ds.json is no JSON object")
    config.write_text("{")
    refused(lambda: Processes.promised(environ, config), UsageError, "ds.json cannot be read")
    config.write_text('{"zero_optimization": {"stage": 2}}')
    refused(lambda: Processes.promised({}, config), UsageError, "--deepspeed needs a process a device", "torchrun")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(lambda: Processes.promised(environ, config), UsageError, "deepspeed is not installed")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    found = Processes.promised(environ, config)
    assert found.parallelism == "deepspeed" and found.deepspeed == {"zero_optimization": {"stage": 2}}
    assert found.settings["deepspeed"] == found.deepspeed


class Accelerator:
    """As much of accelerate's as a check looks at."""

    def __init__(self, kind: str, processes: int, is_fsdp2: bool = False) -> None:
        from accelerate.utils import DistributedType

        self.distributed_type, self.num_processes = DistributedType[kind], processes
        self.is_fsdp2 = is_fsdp2


@pytest.mark.parametrize(
    ("promised", "came_up", "right"),
    [
        (Processes(1), ("NO", 1), True),
        (Processes(1), ("MULTI_GPU", 1), True),
        (Processes(2), ("MULTI_CPU", 2), True),
        (Processes(2), ("NO", 1), False),
        (Processes(2), ("MULTI_GPU", 4), False),
        (Processes(2), ("FSDP", 2, True), False),
        (Processes(2, 0, "fsdp2"), ("FSDP", 2, True), True),
        (Processes(2, 0, "fsdp2"), ("FSDP", 2, False), False),
        (Processes(2, 0, "fsdp2"), ("MULTI_CPU", 2), False),
        (Processes(1, 0, "fsdp2"), ("NO", 1), False),
        (Processes(2, 0, "deepspeed"), ("DEEPSPEED", 2), True),
        (Processes(2, 0, "deepspeed"), ("MULTI_GPU", 2), False),
    ],
)
def test_what_came_up_is_compared(promised: Processes, came_up: tuple[Any, ...], right: bool) -> None:
    accelerator = Accelerator(*came_up)
    if right:
        promised.check(accelerator)
        return
    name = {"ddp": "data parallelism", "fsdp2": "FSDP2", "deepspeed": "DeepSpeed"}[promised.parallelism]
    refused(
        lambda: promised.check(accelerator),
        TrainingError,
        f"asked for {name} in {promised.count} processes",
        came_up[0],
    )


def test_a_process_alone_needs_nobody() -> None:
    alone = Processes()
    alone.start()
    with alone.agree():
        assert alone.tell("this") == "this"
    alone.check_same({"alpha": 8})
    with pytest.raises(KeyError), alone.agree():
        raise KeyError("passed on as it is")
    assert is_first() and first_to_fail() and first_to_fail()


# --- one batch, however many processes share it -------------------------------------------------------------------


def test_the_batch_is_divided() -> None:
    assert Processes(1).micro_batch(16, None) == (16, 1)
    assert Processes(1).micro_batch(16, 4) == (4, 4)
    assert Processes(2).micro_batch(16, None) == (8, 1)
    assert Processes(2).micro_batch(16, 4) == (4, 2)
    assert Processes(4).micro_batch(16, 8) == (4, 1)  # a micro-batch is what fits on a device: less fits too
    refused(lambda: Processes(3).micro_batch(16, None), UsageError, "16 cannot be divided among 3 processes")
    # A bound: the largest divisor of a process's share that is not above it.
    assert Processes(2).micro_batch(12, 4) == (3, 2)
    assert Processes(2).micro_batch(6, 2) == (1, 3)
    assert Processes(1).micro_batch(10, 4) == (2, 5)


def test_quantised_bases_are_not_sharded() -> None:
    training = Training(batch_size=8, quantization="nf4")
    Processes(2).check_recipe(training)
    for kind, name in (("fsdp2", "FSDP2"), ("deepspeed", "DeepSpeed")):
        sharded = Processes(2, 0, kind)  # type: ignore[arg-type]
        sharded.check_recipe(Training(batch_size=8))
        refused(lambda: sharded.check_recipe(training), UsageError, name, "training.quantization nf4")  # noqa: B023


def test_deepspeed_does_not_train_isolated() -> None:
    isolated = Training(batch_size=8, isolate=0.1)
    Processes(2).check_recipe(isolated)
    Processes(2, 0, "fsdp2").check_recipe(isolated)
    refused(
        lambda: Processes(2, 0, "deepspeed").check_recipe(isolated), UsageError, "DeepSpeed", "training.isolate 0.1"
    )


@settings(deadline=None)
@given(
    examples=st.integers(1, 70),
    each=st.integers(1, 5),
    accumulate=st.integers(1, 4),
    count=st.sampled_from([1, 2, 3, 8]),
)
def test_steps_are_those_of_one_process(examples: int, each: int, accumulate: int, count: int) -> None:
    size, processes = each * accumulate * count, Processes(count)
    micro, _ = processes.micro_batch(size, each)
    batches = StepBatches(range(examples), size, micro, processes, blank=examples)
    found = list(batches)

    assert len(found) == len(batches) and len(found) % count == 0
    assert all(1 <= len(batch) <= micro for batch in found)
    of_step = (size // micro // count) * count
    for number in range(0, examples, size):
        step = found[number // size * of_step :][:of_step]
        given_out = [index for batch in step for index in batch if index != examples]
        assert given_out == list(range(number, min(number + size, examples)))
        # Nobody idles while there are examples.
        assert all(batch != [examples] for batch in step) or len(given_out) < len(step)


def test_epochs_reach_the_sampler() -> None:
    class Shuffled(list[int]):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    sampler = Shuffled(range(4))
    StepBatches(sampler, 2, 1, Processes(2), blank=4).set_epoch(3)
    assert sampler.epoch == 3


# --- two processes against one ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the runs of processes.py left, a folder each."""
    folder = tmp_path_factory.mktemp("runs")
    base = tiny_llama(folder / "llama", dtype="float32")
    tiny_llama(folder / "bf16", dtype="bfloat16")
    for variant, count in (("fa", ROWS), ("fb", ROWS + 5)):
        rows = [
            {"question": f"{n} plus {'1 ' * (n % 5)}?", "output": f"it is {n + 1}{' and so on' * (n % 3)}"}
            for n in range(count)
        ]
        (folder / f"{variant}.json").write_text(json.dumps(rows))
    (folder / "project").mkdir()
    make_project(folder / "project", base)
    program = [sys.executable, str(Path(__file__).with_name("processes.py")), str(folder)]
    done = subprocess.run(program, env=quiet(folder), capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def quiet(folder: Path) -> dict[str, str]:
    """This environment with one thread, without a device, without the hub and with caches of its own."""
    more = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **more, "HF_DATASETS_CACHE": str(folder / "cache")}


def ended(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / ENDED).read_text())
    return found


def metrics(adapter: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def weights(adapter: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = load_file(adapter / "adapter_model.safetensors")
    return found


def notes(folder: Path, key: str, rank: int) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / f"{NOTES}.{rank}").read_text().splitlines()]
    return [line for line in lines if key in line]


def assert_equal(one: Path, two: Path, loss: float, values: float) -> None:
    expected, found = metrics(one), metrics(two)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, other in zip(found, expected, strict=True):
        assert line.keys() == other.keys()
        close = {"loss", "dev_loss", "grad_norm", "isolation"}
        for key in line.keys() - close:
            assert line[key] == other[key]
        for key in line.keys() & close:
            assert line[key] == pytest.approx(other[key], abs=loss, rel=0)
    expected_values, found_values = weights(one), weights(two)
    assert list(found_values) == list(expected_values)
    for name, tensor in found_values.items():
        assert (tensor.dtype, tensor.shape) == (expected_values[name].dtype, expected_values[name].shape)
        np.testing.assert_allclose(tensor, expected_values[name], rtol=0, atol=values)
        assert tensor.any()
    assert (one / "adapter_config.json").read_bytes() == (two / "adapter_config.json").read_bytes()
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())


@pytest.mark.parametrize("variant", ["fa", "fb"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_does(runs: Path, kind: str, variant: str) -> None:
    """fa in two micro-batches a process, fb in one and with dev rows; the last step has one example for both."""
    one, two = runs / "one" / "adapters" / variant, runs / kind / "adapters" / variant
    assert ended(runs / kind)["codes"] == [0, 0], ended(runs / kind)["stderr"]
    assert_equal(one, two, LOSS, VALUES)
    assert ("dev_loss" in metrics(two)[-1]) == (variant == "fb")
    summaries = [json.loads((adapter / "training.json").read_text()) for adapter in (one, two)]
    assert [summary.pop("processes") for summary in summaries] == [1, 2]
    assert summaries[1].pop("parallelism") == kind
    assert summaries[1]["recipe"] == summaries[0]["recipe"]
    assert [summary["tokens"] for summary in summaries] == [metrics(one)[-2 if variant == "fb" else -1]["tokens"]] * 2


@pytest.mark.parametrize("variant", ["fa", "fb"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_are_isolated_as_one_is(runs: Path, kind: str, variant: str) -> None:
    """The penalty is added once a step, whole where values are whole and by rows where rows are spread."""
    one, two = (runs / where / "adapters" / f"quiet-{variant}" for where in ("one", kind))
    assert_equal(one, two, LOSS, VALUES)
    assert all(line["isolation"] > 0 for line in metrics(two) if "loss" in line)
    plain = runs / "one" / "adapters" / variant
    assert all(
        (weights(two)[name] - values).std() > 0.01 for name, values in weights(plain).items() if "values" in name
    )


def test_sharded_bf16_weights_beside_fp32_values(runs: Path) -> None:
    assert_equal(runs / "one" / "adapters" / "bf16", runs / "fsdp2" / "adapters" / "bf16", BF16_LOSS, BF16_VALUES)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_rows_of_a_step_are_those_of_one_process(runs: Path, kind: str) -> None:
    alone = notes(runs / "one", "rows", 0)
    shared = [notes(runs / kind, "rows", rank) for rank in (0, 1)]
    assert len(shared[0]) == len(shared[1])
    assert {line["step"] for line in alone} == set(range(2 * -(-ROWS // BATCH)))
    for task in ("fa", "fb"):
        for step in {line["step"] for line in alone}:
            expected = [row for line in alone if (line["task"], line["step"]) == (task, step) for row in line["rows"]]
            found = [
                [row for line in rank if (line["task"], line["step"]) == (task, step) for row in line["rows"]]
                for rank in shared
            ]
            assert sorted(row for rows in found for row in rows if row) == sorted(expected)
            assert not (set(found[0]) & set(found[1])) - {0}


def test_weights_are_sharded(runs: Path) -> None:
    """DTensors, of which each process holds its half; DDP's processes hold everything."""
    for rank in (0, 1):
        for note in notes(runs / "fsdp2", "held", rank):
            assert note["kinds"] == ["DTensor"] and 0.45 * note["all"] < note["held"] < 0.55 * note["all"]
        assert all(note["held"] == note["all"] for note in notes(runs / "ddp", "held", rank))
    assert notes(runs / "fsdp2", "held", 0)


@pytest.mark.parametrize(("kind", "whole"), [("ddp", "dropout"), ("fsdp2", "fb")])
def test_an_interrupted_run_goes_on_bit_for_bit(runs: Path, kind: str, whole: str) -> None:
    adapters = runs / kind / "adapters"
    assert (adapters / "resumed" / "adapter_model.safetensors").read_bytes() == (
        adapters / whole / "adapter_model.safetensors"
    ).read_bytes()
    assert metrics(adapters / "resumed") == metrics(adapters / whole)
    # The checkpoints of sharded runs are the plain ones: the adapter, and states in safetensors and JSON.
    files = [note["checkpoint"] for note in notes(runs / kind, "checkpoint", 0)]
    plain = {"README.md", "adapter_config.json", "adapter_model.safetensors", "trainer_state.json"}
    states = {
        f"{state}.{suffix}"
        for state in ("optimizer", "scheduler", "random_0", "random_1")
        for suffix in ("json", "safetensors")
    }
    assert files and all(set(names) == plain | states for names in files)


def test_process_0_alone_answers_for_all(runs: Path) -> None:
    results = [[note["result"] for note in notes(runs / "ddp", "result", rank)] for rank in (0, 1)]
    for first, second in zip(*results, strict=True):
        assert {**first, "seconds": 0} == {**second, "seconds": 0}


# --- the command line ---------------------------------------------------------------------------------------------


def lines_of(runs: Path, name: str) -> list[str]:
    """What both processes of a run said on stderr."""
    return [line for text in ended(runs / name)["stderr"] for line in text.splitlines()]


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("no-such-task", 2, ("unknown task 'nothing'",)),
        ("odd-batch", 2, ("batch_size 5 cannot be divided among 2 processes",)),
        ("no-data", 1, ("no rows here",)),
        ("other-data", 1, ("process 1 of 2 has another train_digest than process 0",)),
        ("breaks", 1, ("it breaks at step 3",)),
        ("fsdp-on-cpu", 1, ("asked for FSDP2 in 2 processes", "MULTI_CPU in 2 came up")),
        ("strangers", 1, ("asked for data parallelism in 2 processes", "NO in 1 came up")),
    ],
)
def test_all_end_with_one_message(runs: Path, name: str, code: int, words: tuple[str, ...]) -> None:
    """No process was ended from outside: nobody waits for one that has failed."""
    assert ended(runs / name)["codes"] == [code, code]
    said = [line for line in lines_of(runs, name) if "starting anew" not in line]
    assert len(said) == 1 and said[0].startswith("multisbora: ")
    assert all(word in said[0] for word in words)
    assert ended(runs / name)["stdout"] == ["", ""]


def test_a_killed_process_ends_the_others(runs: Path) -> None:
    assert ended(runs / "killed")["codes"] == [1, -9]
    assert "process 0 of 2 lost the others" in lines_of(runs, "killed")[-1]


def test_a_bug_keeps_its_traceback_and_ends_the_others(runs: Path) -> None:
    found = ended(runs / "bug")
    assert found["codes"] == [70, 1]
    assert "Traceback" in found["stderr"][0]
    assert found["stderr"][1] == "multisbora: process 0 of 2 failed: KeyError: 'rows'\n"


def test_one_process_talks_and_publishes(runs: Path) -> None:
    dry = ended(runs / "dry-run")
    assert dry["codes"] == [0, 0] and dry["stderr"] == ["", ""]
    assert dry["stdout"][0].count("adapters/adding would be trained") == 1 and dry["stdout"][1] == ""
    found = ended(runs / "trained")
    assert found["codes"] == [0, 0] and found["stdout"][0].startswith("adapters/adding: 3 steps")
    assert found["stdout"][1] == "" and "multisbora:" not in "".join(found["stderr"])
    assert [line["step"] for line in metrics(runs / "project" / "adapters" / "adding")] == [1, 2, 3]
    assert sorted(path.name for path in (runs / "project" / "adapters").iterdir()) == ["adding"]


# The launchers themselves, each of which loads all libraries in every process.
ACCELERATE = ["--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port"],
    "accelerate": ["accelerate.commands.launch", *ACCELERATE, "--main_process_port"],
}


@pytest.mark.parametrize("name", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_launchers(runs: Path, tmp_path: Path, name: str) -> None:
    make_project(tmp_path, runs / "llama")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    environ = quiet(runs)
    for arguments in (
        ["-m", "multisbora", "allocate", "--tasks", "adding"],
        ["-m", *LAUNCHERS[name], port, "-m", "multisbora", "train", "--task", "adding", "--json"],
    ):
        program = [sys.executable, *arguments]
        done = subprocess.run(program, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    alone = runs / "project" / "adapters" / "adding"
    # Two processes add up in another order than one.
    assert found["steps"] == 3 and found["loss"] == pytest.approx(metrics(alone)[-1]["loss"], rel=1e-6)
    assert weights(tmp_path / "adapters" / "adding").keys() == weights(alone).keys()
