"""Several tasks in one call: on this machine, and on a Ray cluster of two nodes that share a PostgreSQL registry."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from commands import Run, assert_refused, make_project

from multisbora import cluster, workers
from multisbora.board import Board
from multisbora.errors import TrainingError
from multisbora.project import Project
from multisbora.workers import WORKER_FILE, Job, KilledError, RayCluster

TASKS = ("adding", "doubling", "broken")
LONG = ("--max-steps", "60", "--set", "training.save_steps=5")
WEIGHTS = "adapter_model.safetensors"
MEMORY = 4_000_000_000


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Bytes are compared between processes, and sums over several threads may differ."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A Ray cluster of two nodes with a CPU each, which both are on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "memory": MEMORY, "object_store_memory": 100 * 2**20, "include_dashboard": False}
        found = Cluster(initialize_head=True, head_node_args=node)
        found.add_node(num_cpus=1, memory=MEMORY, object_store_memory=100 * 2**20)
        yield found.address
        found.shutdown()


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of adapters that were trained in one go, in this process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    make_project(folder, base)
    break_a_task(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.chdir(folder) if sys.version_info >= (3, 11) else _chdir(folder):
        from multisbora.commands import train_task
        from multisbora.lifecycle import allocate_tasks

        project = Project.load()
        allocate_tasks(project, TASKS, None, None, False, dry_run=False, say=lambda message: None)
        found = {}
        for task in ("adding", "doubling"):
            overrides = ["training.max_steps=60", "training.save_steps=5"]
            train_task(project, task, overrides, None, dry_run=False, say=lambda message: None, quiet=lambda: None)
            found[task] = (project.adapter(task) / WEIGHTS).read_bytes()
    torch.set_num_threads(threads)
    return found


@contextlib.contextmanager
def _chdir(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    yield
    os.chdir(before)


def wait_for(what: Callable[[], Any], seconds: float = 400) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.01)
    raise AssertionError(f"waited in vain for {what}")


def worker(run: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((run / WORKER_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return found


def process_of(run: Path, checkpoint: int, command: subprocess.Popen[str] | None = None) -> int:
    """The process that a run is in, once it has kept this checkpoint."""
    state = run / f"checkpoint-{checkpoint}" / "trainer_state.json"
    wait_for(lambda: state.parent.is_dir() or (command is not None and command.poll() is not None))
    assert command is None or command.poll() is None, command.communicate()
    return int(wait_for(lambda: worker(run))["pid"])


class Killer(threading.Thread):
    """Kills the process of a task in the middle of its run, and says whether another task was trained meanwhile."""

    def __init__(self, task: str, other: str | None = None) -> None:
        super().__init__(daemon=True)
        self.run_folder = (Path("adapters") / f"{task}.run").absolute()
        self.other_folder = None if other is None else (Path("adapters") / f"{other}.run").absolute()
        self.killed, self.together = 0, False

    def run(self) -> None:
        if self.other_folder is not None:
            self.together = bool(wait_for(lambda: worker(self.run_folder) and worker(self.other_folder)))
        self.killed = process_of(self.run_folder, 10)
        os.kill(self.killed, signal.SIGKILL)


def break_a_task(folder: Path) -> None:
    """A third recipe, whose rows lack a field of its prompt."""
    recipe = yaml.safe_load((folder / "tasks" / "adding.yaml").read_text())
    (folder / "tasks" / "broken.yaml").write_text(yaml.safe_dump(recipe | {"prompt": "Q: {question}\nA:"}))


def set_registry(folder: Path, url: str) -> None:
    path = folder / "multisbora.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"registry": url}))


class Stub:
    """Stands for a cluster with these nodes. `kills` says how many processes of a task are killed."""

    slots: float = 1
    resources: tuple[dict[str, float], ...] = ()

    def __init__(self, address: str | None = None, kills: dict[str, int] | None = None) -> None:
        self.kills, self.asked = kills or {}, list[Job]()

    def __enter__(self) -> Stub:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def nodes(self) -> list[dict[str, float]]:
        return list(self.resources)

    def look(self, project: Project, folder: Path) -> None:
        pass

    def start(self, job: Job) -> Job:
        self.asked.append(job)
        return job

    def answer(self, started: Job) -> dict[str, Any] | None:
        if self.kills.get(started.task, 0) >= started.attempt:
            raise KilledError("SIGKILL")
        return {"steps": 3, "loss": 1.0}

    def stop(self, started: Any) -> None:
        pass


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cluster_of_two_nodes(
    project: Path, run: Run, address: str, postgresql_url: str, undisturbed: dict[str, bytes]
) -> None:
    """One of three tasks is killed and goes on, one fails, and the third has nothing to do with either."""
    break_a_task(project)
    set_registry(project, postgresql_url)
    assert run("allocate", "--tasks", ",".join(TASKS)).code == 0
    killer = Killer("adding", "doubling")
    killer.start()

    done = run("train", "--tasks", "adding,doubling,broken", "--engine", "ray", "--address", address, "--json", *LONG)

    killer.join(60)
    assert killer.killed and killer.together
    assert done.code == 1
    assert done.err.splitlines()[-1] == "multisbora: 1 of 3 tasks failed: broken (adapters/broken.log)"
    found = done.json["tasks"]
    assert [(task, of["state"], of["attempts"]) for task, of in found.items()] == [
        ("adding", "trained", 2),
        ("doubling", "trained", 1),
        ("broken", "failed", 1),
    ]
    assert found["adding"]["result"]["steps"] == 60
    assert found["adding"]["resources"]["cpus"] == 1 and found["adding"]["resources"]["gpus"] == 0
    assert cluster.LIBRARY_BYTES < found["adding"]["resources"]["memory"] < MEMORY
    assert "field question" in found["broken"]["error"] and f"broken: failed: {found['broken']['error']}" in done.err
    assert "adding: its process was killed (WorkerCrashedError), retry 1 of 3" in done.err
    assert "ray" not in done.err.lower().replace("--engine ray", "")

    for task in ("adding", "doubling"):
        assert (project / "adapters" / task / WEIGHTS).read_bytes() == undisturbed[task], task
    log = (project / "adapters" / "adding.log").read_text()
    assert re.search(rf"attempt 1 on .*, process {killer.killed}\n", log)
    assert "attempt 2" in log and "going on from" in log
    assert "field question" in (project / "adapters" / "broken.log").read_text()
    assert not list((project / "adapters").glob("*.run")) and not list((project / "adapters").glob(".*"))
    stages = {task: of["stage"] for task, of in run("status", "--json").json["tasks"].items()}
    assert stages == {"adding": "trained", "doubling": "trained", "broken": "allocated"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_task_goes_on_here(
    project: Path, run: Run, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with the local engine; then other calls, which do what is left."""
    break_a_task(project)
    assert run("allocate", "--tasks", ",".join(TASKS)).code == 0
    killer = Killer("adding")
    killer.start()

    done = run("train", "--tasks", "adding", "--json", *LONG)

    assert killer.killed
    assert done.code == 0
    found = done.json["tasks"]["adding"]
    assert (found["state"], found["attempts"], found["resources"]) == ("trained", 2, {})
    assert "adding: its process was killed (SIGKILL), retry 1 of 3" in done.err
    assert (project / "adapters" / "adding" / WEIGHTS).read_bytes() == undisturbed["adding"]

    stub = Stub()
    monkeypatch.setattr(cluster, "LocalProcesses", lambda: stub)
    done = run("train", "--tasks", "adding,doubling", "--json")
    assert done.code == 0
    assert [of["state"] for of in done.json["tasks"].values()] == ["there already", "trained"]
    assert "adding: adapters/adding is there already" in done.err
    assert [job.task for job in stub.asked] == ["doubling"]

    done = run("train", "--tasks", "adding", "--engine", "ray")  # for which no Ray is started
    assert done.code == 0
    assert [line.split()[:3] for line in done.out.splitlines()][1:] == [["adding", "there", "already"]]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("engine", "number"), [("local", signal.SIGINT), ("ray", signal.SIGTERM)])
def test_an_interrupt_stops_all_and_keeps_checkpoints(
    engine: str, number: signal.Signals, project: Path, run: Run, request: pytest.FixtureRequest
) -> None:
    flags = ["--engine", engine]
    if engine == "ray":
        flags += ["--address", request.getfixturevalue("address")]
        set_registry(project, request.getfixturevalue("postgresql_url"))
    assert run("allocate", "--tasks", "adding,doubling").code == 0
    # A test run in the background of a shell ignores Ctrl-C, and hands that down.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from multisbora.cli import main; main()"
    command = [sys.executable, "-c", code, "train", "--tasks", "adding,doubling", *flags, "--json"]
    steps = ["--max-steps", "100000", "--set", "training.save_steps=5"]
    started = subprocess.Popen([*command, *steps], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        runs = [Path(f"adapters/{task}.run") for task in (("adding", "doubling") if engine == "ray" else ("adding",))]
        processes = [psutil.Process(process_of(folder, 10, started)) for folder in runs]
        started.send_signal(number)
        out, err = started.communicate(timeout=200)
    finally:
        started.kill()
    assert started.returncode == 1 and out == ""
    assert err.splitlines()[-1].startswith("multisbora: interrupted: ") and "adding, doubling" in err
    assert "Traceback" not in err
    psutil.wait_procs(processes, timeout=60)
    assert not any(process.is_running() for process in processes)
    assert all(list(folder.glob("checkpoint-*")) for folder in runs)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_process_of_the_local_engine_ends_with_its_parent(project: Path, run: Run) -> None:
    assert run("allocate", "--tasks", "adding").code == 0
    command = [sys.executable, "-m", "multisbora", "train", "--tasks", "adding", "--max-steps", "100000"]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process = psutil.Process(int(wait_for(lambda: worker(Path("adapters/adding.run")))["pid"]))
    finally:
        started.kill()
        started.wait()
    process.wait(timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_dry_run_starts_ray_here_and_writes_nothing(project: Path, run: Run) -> None:
    assert run("allocate", "--tasks", "adding,doubling").code == 0
    before = sorted(project.rglob("*"))
    done = run("train", "--tasks", "adding,doubling", "--engine", "ray", "--dry-run", "--json")
    assert done.code == 0, done
    for found in done.json["tasks"].values():
        assert found["state"] == "planned" and found["result"]["steps"] == 3
        assert found["resources"]["memory"] > cluster.LIBRARY_BYTES
    assert sorted(project.rglob("*")) == before


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def put(*resources: dict[str, float]) -> None:
        stub = type("Stub", (Stub,), {"resources": resources})
        monkeypatch.setattr(cluster, "RayCluster", stub)

    return put


@pytest.mark.parametrize(
    ("resources", "cpus", "gpus"),
    [
        ([{"CPU": 8, "memory": 1e10}], 4, 0),
        ([{"CPU": 1, "memory": 1e10}], 1, 0),
        ([{"CPU": 8, "memory": 1e10}, {"CPU": 16, "GPU": 2, "memory": 1e10}], 1, 1),
    ],
)
def test_what_ray_is_asked_for(
    resources: list[dict[str, float]], cpus: int, gpus: int, project: Path, run: Run, nodes: Callable[..., None]
) -> None:
    nodes(*resources)
    assert run("allocate", "--tasks", "adding,doubling").code == 0
    done = run("train", "--tasks", "adding,doubling", "--engine", "ray", "--dry-run", "--json")
    assert done.code == 0, done
    for found in done.json["tasks"].values():
        assert (found["resources"]["cpus"], found["resources"]["gpus"]) == (cpus, gpus)


def test_a_longer_batch_asks_for_more_memory(project: Path, run: Run, nodes: Callable[..., None]) -> None:
    nodes({"CPU": 2, "memory": 1e12})
    assert run("allocate", "--tasks", "adding,doubling").code == 0
    asked = []
    for size in ("4", "40"):
        flags = ("--engine", "ray", "--dry-run", "--json", "--set", f"training.batch_size={size}")
        tasks = run("train", "--tasks", "adding,doubling", *flags).json["tasks"]
        assert tasks["adding"]["resources"] == tasks["doubling"]["resources"]
        asked.append(tasks["adding"]["resources"]["memory"] - cluster.LIBRARY_BYTES)
    assert asked[0] * 5 < asked[1]


def test_a_task_that_fits_on_no_node(project: Path, run: Run, nodes: Callable[..., None]) -> None:
    nodes({"CPU": 2, "memory": 650_000_000}, {"CPU": 64, "memory": 640_000_000})
    set_registry(project, f"sqlite:///{project}/registry.db")
    assert run("allocate", "--tasks", "adding,doubling").code == 0
    flags = ("--tasks", "adding,doubling", "--engine", "ray", "--set", "training.cutoff=50000")
    assert_refused(run("train", *flags), 1, "the Ray cluster has 2 nodes", "PostgreSQL")
    nodes({"CPU": 2, "memory": 650_000_000})
    done = run("train", *flags)
    assert_refused(done, 1, "task adding needs ", " bytes", "more than 650,000,000 (1 more", progress=True)
    needed = int(re.search(r"needs ([\d,]+) bytes", done.err)[1].replace(",", ""))  # type: ignore[index]
    assert needed > 650_000_000
    assert not (project / "adapters").exists()
    nodes()
    assert_refused(run("train", *flags), 1, "no node with a CPU")


def test_a_task_that_is_killed_again_and_again(project: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("allocate", "--tasks", "adding,doubling").code == 0
    stub = Stub(kills={"adding": 99, "doubling": cluster.RETRIES})
    monkeypatch.setattr(cluster, "LocalProcesses", lambda: stub)
    done = run("train", "--tasks", "adding,doubling", "--json")
    assert done.code == 1
    found = done.json["tasks"]
    assert [(of["state"], of["attempts"]) for of in found.values()] == [("failed", 4), ("trained", 4)]
    assert "killed 4 times (SIGKILL)" in found["adding"]["error"]
    assert [(job.task, job.attempt) for job in stub.asked] == [
        (t, n) for t in ("adding", "doubling") for n in range(1, 5)
    ]
    assert len({job.token for job in stub.asked}) == 8


def test_killed_when_all_was_done_but_told(trained: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter is published and its process killed before it could say so: the registry hears of it all the same."""
    (trained / "adapters" / "adding").rename(trained / "kept")
    stub = Stub(kills={"adding": 1})
    start = stub.start

    def publish_and_die(job: Job) -> Job:
        (trained / "kept").rename(trained / "adapters" / "adding")
        return start(job)

    monkeypatch.setattr(stub, "start", publish_and_die)
    monkeypatch.setattr(cluster, "LocalProcesses", lambda: stub)
    with cluster.required(Project.load()) as registry:
        claims = registry.task(Project.load().model_name, "adding")
        registry.mark(claims, "training")
    done = run("train", "--tasks", "adding", "--json")
    assert done.code == 0
    assert done.json["tasks"]["adding"]["state"] == "trained" and len(stub.asked) == 1
    assert run("status", "--json").json["tasks"]["adding"]["stage"] == "trained"


def test_an_adapter_of_other_claims_is_in_the_way(trained: Path, run: Run) -> None:
    assert run("release", "--task", "adding").code == 0
    assert run("allocate", "--tasks", "adding", "--variant", "fb").code == 0
    assert_refused(run("train", "--tasks", "doubling,adding"), 1, "adapters/adding was trained on other claims")


@pytest.mark.parametrize(
    ("flags", "code", "parts"),
    [
        (["--engine", "ray", "--tasks", "adding,addding"], 2, ["addding", "did you mean adding?"]),
        (["--tasks", "adding", "--set", "training.epoch=1"], 2, ["training.epoch", "did you mean epochs?"]),
        (["--tasks", "adding", "--engine", "slurm"], 2, ["'slurm'", "local or ray"]),
        (["--tasks", "adding", "--address", "auto"], 2, ["--engine ray"]),
        (["--task", "adding", "--engine", "ray"], 2, ["--engine and --address are for --tasks"]),
        (["--tasks", "adding", "--deepspeed", "x.json"], 2, ["--deepspeed", "--task"]),
        (["--task", "adding", "--tasks", "adding"], 2, ["--task,", "--tasks"]),
        ([], 2, ["--task,", "--tasks"]),
        (["--tasks", "adding"], 1, ["adding", "multisbora allocate"]),
    ],
)
def test_refused_before_anything_starts(flags: list[str], code: int, parts: list[str], project: Path, run: Run) -> None:
    assert_refused(run("train", *flags), code, *parts)
    assert not (project / "adapters").exists()


def test_not_in_the_processes_of_a_launcher(project: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert_refused(run("train", "--tasks", "adding"), 2, "torchrun", "--task")


def test_without_ray(project: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run("allocate", "--tasks", "adding").code == 0
    assert_refused(run("train", "--tasks", "adding", "--engine", "ray"), 1, "pip install 'multisbora[ray]'")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nobody", "nobody:port"])
def test_no_cluster_at_the_address(address: str, project: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("allocate", "--tasks", "adding").code == 0
    done = run("train", "--tasks", "adding", "--engine", "ray", "--address", address)
    assert_refused(done, 1, f"no Ray cluster answers at {address}")
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert_refused(run("train", "--tasks", "adding", "--engine", "ray"), 1, f"no Ray cluster answers at {address}")


def test_nodes_that_do_not_see_the_project(project: Path, address: str, tmp_path: Path) -> None:
    with RayCluster(address) as joined:
        joined.look(Project.load(), project)
        with pytest.raises(TrainingError, match=r"node \S+ does not see .*/other/multisbora.yaml: .*that they share"):
            joined.look(Project.load(), tmp_path / "other")
        assert [node["CPU"] for node in joined.nodes()] == [1, 1]


def test_a_job_as_json(project: Path) -> None:
    job = Job(Project.load(composition="other"), project, "adding", ("training.epochs=1",), max_steps=3, cpus=2).again()
    assert Job.from_json(job.to_json()) == job and "\n" not in job.to_json()


def test_a_table_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, said = Terminal(), list[str]()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    project = Project.of(model="base")
    jobs = [Job(project, tmp_path, task, (), max_steps=60) for task in ("adding", "doubling")]
    with Board(jobs, said.append) as board:
        board.look(jobs)
        (tmp_path / jobs[0].run).mkdir(parents=True)
        place = {"token": jobs[0].token, "host": "node-7", "pid": 1}
        (tmp_path / jobs[0].run / WORKER_FILE).write_text(json.dumps(place))
        lines = [{"step": 5, "loss": 2.5, "tokens_per_second": 1234.5}, {"step": 6, "dev_loss": 2.0}]
        metrics = "".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 7, "lo'
        (tmp_path / jobs[0].run / "metrics.jsonl").write_text(metrics)
        board.look(jobs)
        board.ended(jobs[1], "failed", "no rows", {})
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).split("\n")
    last = [line.split() for line in shown if line.strip()][-3:]
    assert last[0] == ["task", "state", "node", "step", "loss", "tokens/s", "elapsed"]
    assert last[1][:6] == ["adding", "training", "node-7", "6/60", "2.5000", "1,234"]
    assert last[2] == ["doubling", "failed", "0:00"]
    assert said == ["doubling: failed: no rows (log: adapters/doubling.log)"]


def test_an_error_of_a_library_ends_its_task_alone(project: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it said, and where, is in the log; this process keeps its own stdout."""
    assert run("allocate", "--tasks", "adding").code == 0

    def fail(*_: object, **__: object) -> None:
        os.write(1, b"from below\n")
        raise ZeroDivisionError("first\nsecond")

    monkeypatch.setattr(workers, "train_task", fail)
    # pytest has put a file in the place of stdout, for which `work` puts another.
    assert workers.work(Job(Project.load(), project, "adding", ())) == {"error": "ZeroDivisionError: first"}
    log = (project / "adapters" / "adding.log").read_text()
    assert "from below" in log and "Traceback" in log and log.endswith("second\n")
    assert sorted(path.name for path in (project / "adapters").iterdir()) == ["adding.log"]
