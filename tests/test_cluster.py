"""Several tasks in one call: what is asked of an engine, and what becomes of its answers. Engines: test_engines.py."""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import Run, assert_refused

from multisbora import cluster
from multisbora.engines import KilledError
from multisbora.errors import RegistryError, UsageError
from multisbora.project import Project
from multisbora.workers import Job


@pytest.fixture(autouse=True)
def _no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def set_registry(folder: Path, url: str) -> None:
    path = folder / "multisbora.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"registry": url}))


class Stub:
    """Stands for a cluster with these nodes. `kills` says how many processes of a task are killed."""

    slots: float = 1
    resources: tuple[dict[str, float], ...] = ()

    def __init__(self, address: str | None = None, kills: dict[str, int] | None = None) -> None:
        self.kills, self.asked, self.stopped = kills or {}, list[Job](), list[Job]()

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

    def stop(self, started: Sequence[Job]) -> None:
        self.stopped += started


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


def test_isolated_training_asks_for_the_memory_of_its_blocks(
    project: Path, run: Run, nodes: Callable[..., None]
) -> None:
    nodes({"CPU": 2, "memory": 1e12})
    assert run("allocate", "--tasks", "adding,doubling").code == 0
    assert run("measure", "--tasks", "adding,doubling").code == 0
    asked = []
    for strength in (("--isolate", "0"), ("--isolate", "1"), ()):
        flags = ("--engine", "ray", "--dry-run", "--json", *strength)
        tasks = run("train", "--tasks", "adding,doubling", *flags).json["tasks"]
        asked.append(tasks["adding"]["resources"]["memory"])
    assert asked[1] - asked[0] == 3 * 6 * 4 * 4**2  # thrice 6 matrices of 4 x 4 in fp32
    assert asked[2] == asked[1]
    assert run("registry", "forget", "--task", "doubling").code == 0
    flags = ("--engine", "ray", "--dry-run", "--json")
    alone = run("train", "--tasks", "adding,doubling", *flags).json["tasks"]
    assert alone["adding"]["resources"]["memory"] == asked[0] < alone["doubling"]["resources"]["memory"]


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


@pytest.fixture
def stub(project: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """In the place of the local engine, for two tasks with claims."""
    assert run("allocate", "--tasks", "adding,doubling").code == 0
    found = Stub()
    monkeypatch.setattr(cluster, "LocalProcesses", lambda: found)
    return found


def test_a_second_call_does_what_is_left(trained: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (trained / "adapters" / "doubling").rename(trained / "elsewhere")
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


def test_no_tasks(project: Path) -> None:
    with pytest.raises(UsageError, match="no task to train was named"):
        cluster.train_tasks(Project.load(), [])


def test_what_ends_the_drive_stops_the_processes(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(started: Job) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(stub, "answer", fail)
    with pytest.raises(ZeroDivisionError):
        cluster.train_tasks(Project.load(), ["adding", "doubling"])
    assert [job.task for job in stub.stopped] == ["adding"]


def test_a_killed_task_whose_registry_is_away(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails; the next one is trained all the same."""
    stub.kills = {"adding": 1}
    is_there = cluster._is_there

    def away(*arguments: Any, **flags: Any) -> bool:
        if stub.asked:
            raise RegistryError("no answer from the database")
        return is_there(*arguments, **flags)

    monkeypatch.setattr(cluster, "_is_there", away)
    found = cluster.train_tasks(Project.load(), ["adding", "doubling"]).tasks
    assert [of.state for of in found.values()] == ["failed", "trained"]
    assert "killed (SIGKILL)" in str(found["adding"].error) and "no answer from" in str(found["adding"].error)


def test_off_the_main_thread(stub: Stub) -> None:
    found: list[cluster.Outcomes] = []
    thread = threading.Thread(target=lambda: found.append(cluster.train_tasks(Project.load(), ["adding"])))
    thread.start()
    thread.join()
    assert [of.state for of in found[0].tasks.values()] == ["trained"]


def test_a_handler_that_python_does_not_know_stays(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda number, handler: pytest.fail("replaced"))
    assert cluster.train_tasks(Project.load(), ["adding"]).tasks["adding"].state == "trained"


def test_a_registry_with_a_task_called_as_the_run_of_another(
    trained: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can be read, and its adapter stays whole when the other task is trained; no new one can be made."""
    assert_refused(run("allocate", "--tasks", "adding.run"), 2, "'adding.run'", "neither .run nor .log")
    assert_refused(
        run("registry", "rename", "--task", "doubling", "--to", "adding.log"),
        2,
        "'adding.log'",
        "neither .run nor .log",
    )
    with monkeypatch.context() as before:
        before.setattr("multisbora.names._BESIDE_ADAPTERS", ())
        assert run("registry", "rename", "--task", "doubling", "--to", "adding.run").code == 0
    (trained / "adapters" / "adding").rename(trained / "elsewhere")
    files = {path.name: path.read_bytes() for path in (trained / "adapters" / "adding.run").iterdir()}
    assert_refused(run("train", "--task", "adding"), 1, "adapters/adding.run holds an adapter", progress=True)
    assert {path.name: path.read_bytes() for path in (trained / "adapters" / "adding.run").iterdir()} == files
    assert run("registry", "check").code == 0
    assert "adding.run" in run("status", "--json").json["tasks"]
    assert run("registry", "rename", "--task", "adding.run", "--to", "tripling").code == 0
