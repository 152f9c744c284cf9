"""Processes that train tasks: on this machine, and on a Ray cluster of two nodes that share a PostgreSQL registry."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from commands import Run, make_project

from multisbora import cluster
from multisbora.engines import KilledError, LocalProcesses, RayCluster
from multisbora.errors import TrainingError
from multisbora.project import Project
from multisbora.workers import WORKER_FILE, Job

TASKS = ("adding", "doubling", "broken")
STEPS = 120  # behind the tenth there must be time to kill a run, on a busy machine too
LONG = ("--max-steps", str(STEPS), "--set", "training.save_steps=5")
WEIGHTS = "adapter_model.safetensors"
MEMORY = 4_000_000_000
Training = Callable[..., None]


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
        for running in found.list_all_nodes():  # at once: asked kindly, a node waits minutes for what a test left on it
            found.remove_node(running, allow_graceful=False)


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of adapters that were trained in one go, in this process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    make_project(folder, base)
    break_a_task(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.chdir(folder) if sys.version_info >= (3, 11) else _chdir(folder):
        from multisbora.allocating import allocate_tasks
        from multisbora.commands import train_task

        project = Project.load()
        allocate_tasks(project, TASKS, None, None, False, dry_run=False, say=lambda message: None)
        found = {}
        for task in ("adding", "doubling"):
            overrides = [f"training.max_steps={STEPS}", "training.save_steps=5"]
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

    def kept() -> bool:  # this one, or a later one: where the processors are busy, that may have taken its place
        numbers = [path.name.rpartition("-")[2] for path in run.glob("checkpoint-*")]
        return any(number.isdecimal() and int(number) >= checkpoint for number in numbers)

    wait_for(lambda: kept() or (command is not None and command.poll() is not None))
    assert command is None or command.poll() is None, command.communicate()
    return int(wait_for(lambda: worker(run))["pid"])


def interrupt(
    number: signal.Signals, flags: tuple[str, ...], pids: Callable[[subprocess.Popen[str]], list[int]]
) -> None:
    """Send a signal to a command that trains, once its processes are there, and see all of them end."""
    # A test run in the background of a shell ignores Ctrl-C, and hands that down.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from multisbora.cli import main; main()"
    command = [sys.executable, "-c", code, "train", "--tasks", "adding,doubling", "--json", *flags]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        processes = [psutil.Process(pid) for pid in pids(started)]
        started.send_signal(number)
        out, err = started.communicate(timeout=200)
    finally:
        started.kill()
    assert started.returncode == 1 and out == ""
    assert err.splitlines()[-1].startswith("multisbora: interrupted: ") and "adding, doubling" in err
    assert "Traceback" not in err
    psutil.wait_procs(processes, timeout=60)
    assert not any(process.is_running() for process in processes)


class Killer(threading.Thread):
    """Kills the process of a task in the middle of its run."""

    def __init__(self, task: str) -> None:
        super().__init__(daemon=True)
        self.run_folder = (Path("adapters") / f"{task}.run").absolute()
        self.killed = 0

    def run(self) -> None:
        with contextlib.suppress(AssertionError):  # whoever started it sees that nothing was killed
            pid = process_of(self.run_folder, 10)  # which may be half written; the one of step 5 is whole
            os.kill(pid, signal.SIGKILL)
            self.killed = pid


def break_a_task(folder: Path) -> None:
    """A third recipe, whose rows lack a field of its prompt."""
    recipe = yaml.safe_load((folder / "tasks" / "adding.yaml").read_text())
    (folder / "tasks" / "broken.yaml").write_text(yaml.safe_dump(recipe | {"prompt": "Q: {question}\nA:"}))


def set_registry(folder: Path, url: str) -> None:
    path = folder / "multisbora.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"registry": url}))


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Training:
    """Has the processes to come run these lines in the place of training; none of them then loads torch."""

    def put(lines: str, before: str = "") -> None:
        code = """
            import os, time, types
            import multisbora.workers

            def done(**answer):
                return types.SimpleNamespace(to_json=lambda: answer)

            def train(project, task, *_, on_start, **__):
            BODY

            multisbora.workers.train_task = train
        """
        (tmp_path / "site").mkdir(exist_ok=True)
        code = textwrap.dedent(code).replace("BODY", textwrap.indent(textwrap.dedent(lines), "    "))
        (tmp_path / "site" / "sitecustomize.py").write_text(f"{before}\n{code}")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))

    return put


def answer_of(folder: Path) -> dict[str, Any]:
    with LocalProcesses() as engine:
        started = engine.start(Job(Project.load(), folder, "adding", ()))
        found: dict[str, Any] = wait_for(lambda: engine.answer(started))
    return found


HOLD = """
    os.makedirs(f"adapters/{task}.run")
    on_start()
    time.sleep(1000)
"""


def test_an_answer_has_a_way_of_its_own(project: Path, training: Training) -> None:
    """Whatever is printed, and however long it is."""
    lines = "print('more'); os.write(1, b'and more'); return done(steps=3, note='x' * 200_000)"
    training(lines, before="print('before everything')")
    assert answer_of(project) == {"steps": 3, "note": "x" * 200_000}
    assert (project / "adapters" / "adding.log").read_text().endswith("more\nand more")


@pytest.mark.parametrize(
    ("lines", "by"),
    [
        ("os._exit(0)", "no answer"),
        ("return done(something='else')", "no answer"),
        ("os._exit(3)", "exit code 3"),
        ("os.kill(os.getpid(), 9)", "SIGKILL"),
        ("os.kill(os.getpid(), 40)", "signal 40"),
    ],
)
def test_a_process_without_an_answer_was_killed(lines: str, by: str, project: Path, training: Training) -> None:
    training(lines)
    with pytest.raises(KilledError, match=f"^{by}$"):
        answer_of(project)


def test_whatever_is_raised_is_an_answer(project: Path, training: Training) -> None:
    training("raise SystemExit(0)")
    assert answer_of(project) == {"error": "SystemExit: 0"}
    training("raise OSError('x' * 90_000)")
    assert answer_of(project) == {"error": "x" * 2000 + "..."}
    assert answer_of(project / "gone") == {"error": f"[Errno 2] No such file or directory: '{project}/gone'"}


def test_a_log_that_cannot_be_is_no_reason_to_try_again(project: Path, run: Run, training: Training) -> None:
    assert run("allocate", "--tasks", "adding").code == 0
    training("return done(steps=1)")
    (project / "adapters" / "adding.log").mkdir(parents=True)
    done = run("train", "--tasks", "adding", "--json")
    assert done.code == 1
    found = done.json["tasks"]["adding"]
    assert (found["state"], found["attempts"]) == ("failed", 1)
    assert found["error"].startswith("the log adapters/adding.log cannot be written (Is a directory): ")


def test_a_full_disk_under_the_log_ends_nothing(project: Path, training: Training) -> None:
    (project / "adapters").mkdir()
    (project / "adapters" / "adding.log").symlink_to("/dev/full")
    training("print('x' * 100_000); return done(steps=1)")
    assert answer_of(project) == {"steps": 1}


def test_a_process_ends_with_its_parent(project: Path, run: Run, training: Training) -> None:
    training(HOLD)
    assert run("allocate", "--tasks", "adding").code == 0
    command = [sys.executable, "-m", "multisbora", "train", "--tasks", "adding"]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process = psutil.Process(int(wait_for(lambda: worker(Path("adapters/adding.run")))["pid"]))
    finally:
        started.kill()
        started.wait()
    process.wait(timeout=60)


def test_ctrl_c_stops_the_process(project: Path, run: Run, training: Training) -> None:
    training(HOLD)
    assert run("allocate", "--tasks", "adding,doubling").code == 0
    interrupt(signal.SIGINT, (), lambda _: [int(wait_for(lambda: worker(Path("adapters/adding.run")))["pid"])])


@pytest.mark.slow
def test_nodes_that_do_not_see_the_project(project: Path, address: str, tmp_path: Path) -> None:
    with RayCluster(address) as joined:
        joined.look(Project.load(), project)
        with pytest.raises(TrainingError, match=r"node \S+ does not see .*/other/multisbora.yaml: .*that they share"):
            joined.look(Project.load(), tmp_path / "other")
        assert [node["CPU"] for node in joined.nodes()] == [1, 1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cluster_of_two_nodes(
    project: Path, run: Run, address: str, postgresql_url: str, undisturbed: dict[str, bytes]
) -> None:
    """One of three tasks is killed and goes on, one fails, and the third has nothing to do with either."""
    break_a_task(project)
    set_registry(project, postgresql_url)
    assert run("allocate", "--tasks", ",".join(TASKS)).code == 0
    killer = Killer("adding")
    killer.start()

    done = run("train", "--tasks", "adding,doubling,broken", "--engine", "ray", "--address", address, "--json", *LONG)

    killer.join(60)
    assert killer.killed
    assert done.code == 1
    assert done.err.splitlines()[-1] == "multisbora: 1 of 3 tasks failed: broken (adapters/broken.log)"
    found = done.json["tasks"]
    assert [(task, of["state"], of["attempts"]) for task, of in found.items()] == [
        ("adding", "trained", 2),
        ("doubling", "trained", 1),
        ("broken", "failed", 1),
    ]
    assert found["adding"]["result"]["steps"] == STEPS
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
def test_a_killed_task_goes_on_here(project: Path, run: Run, undisturbed: dict[str, bytes]) -> None:
    """The same with the local engine."""
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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sigterm_stops_all_on_a_cluster_and_keeps_checkpoints(
    project: Path, run: Run, address: str, postgresql_url: str
) -> None:
    """Two tasks, which are trained at the same time."""
    set_registry(project, postgresql_url)
    assert run("allocate", "--tasks", "adding,doubling").code == 0
    flags = ("--engine", "ray", "--address", address, "--max-steps", "100000", "--set", "training.save_steps=5")
    runs = [Path(f"adapters/{task}.run") for task in ("adding", "doubling")]
    interrupt(signal.SIGTERM, flags, lambda started: [process_of(folder, 5, started) for folder in runs])
    assert all(list(folder.glob("checkpoint-*")) for folder in runs)


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
