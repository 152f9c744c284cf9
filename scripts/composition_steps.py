"""How each run of study_composition.py is done: `multisbora` commands for ours, composition_work.py for the rest.

The work folder:

    rows/, tasks/      of the tasks
    claims/KEY         a project with claims and moments, for all adapters that are trained on them
    trained/KEY        one adapter, in adapters/TASK
    tuned/KEY          adapters that were tuned by channel, by TASK
    composed/KEY       a project with links to adapters, for one tuning or merge
    logs/KEY.log       what was said
    runs.jsonl         what came out
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from composition_plan import CORRECTED, Setup
from composition_runs import Answer, Run, Store

from multisbora.project import PROJECT_FILE, Project

WORKER = Path(__file__).with_name("composition_work.py")


class Steps:
    """Does runs.

    Args:
        here: in this process, one at a time, in place of processes of their own. For toys: nothing has to be imported
            anew.
        lock: a file descriptor that processes of their own hold as long as they live.
    """

    def __init__(self, work: Path, setup: Setup, store: Store, *, here: bool, lock: int) -> None:
        self.work, self.setup, self.store, self.here, self.lock = work, setup, store, here, lock
        self._children: set[subprocess.Popen[str]] = set()
        self._stopped = threading.Event()
        for folder in ("claims", "trained", "tuned", "composed", "logs"):
            (work / folder).mkdir(exist_ok=True)

    def __call__(self, run: Run, threads: int) -> Answer:
        does: dict[str, Callable[[Run, int], Answer]] = {
            "claims": self._claims,
            "moments": self._moments,
            "through": self._through,
            "train": self._train,
            "base": self._base,
            "own": self._own,
            "mix": self._mix,
            "tune": self._tune,
            "grid": self._grid,
            "score": self._score,
            "crosstalk": self._crosstalk,
        }
        answer = does[run.kind](run, threads)
        if (mark := self._mark(run)) is not None:
            mark.touch()
        return answer

    def at_hand(self, run: Run) -> bool:
        """Whether the files that others need of a run are in the work folder."""
        mark = self._mark(run)
        return mark is None or mark.is_file()

    def _mark(self, run: Run) -> Path | None:
        """What says that all files of a run are there: beside them, to go where they go."""
        if run.kind in ("claims", "train"):
            folder = self.work / ("claims" if run.kind == "claims" else "trained") / run.key
        elif run.kind in ("moments", "through"):
            (of,) = run.needs
            folder = self.work / ("claims" if of.kind == "claims" else "trained") / of.key
        elif _is_by_channel(run):
            folder = self.work / "tuned" / run.key
        else:
            return None
        return folder / f"{run.key}.done"

    def stop(self) -> None:
        """End the processes that are at work."""
        self._stopped.set()
        for child in list(self._children):
            child.terminate()

    # ------------------------------------------------------------------------------------------------------ projects

    def _project(self, folder: Path, registry: Path, **settings: Any) -> Path:
        """A project's file in a folder, of which a run that was killed may have left one."""
        folder.mkdir(parents=True, exist_ok=True)
        made = Project.of(
            model=self.setup.base,
            registry=f"sqlite:///{registry}",
            targets=self.setup.targets,
            recipes=str(self.work / "tasks"),
            **settings,
        )
        (folder / PROJECT_FILE).write_text(made.text(), encoding="utf-8")
        return folder

    def _on(self, folder: Path, claims: Run) -> Path:
        """A project on the claims of another folder."""
        spec = claims.spec
        settings = {"variant": spec["variant"], "rank": spec["rank"], "alpha": spec["rank"]}
        registry = self.work / "claims" / claims.key / "registry.db"
        return self._project(folder, registry, seed=spec["seed"], strategy=_strategy(spec), **settings)

    def _claims(self, run: Run, threads: int) -> Answer:
        folder = self._on(self.work / "claims" / run.key, run)
        tasks = ",".join(run.spec["tasks"])
        if run.spec["strategy"] == "isolated":
            self._multisbora(run, folder, ["measure", "--tasks", tasks, "--rows", str(run.spec["rows"])], threads)
        self._multisbora(run, folder, ["allocate", "--tasks", tasks], threads)
        return {}

    def _moments(self, run: Run, threads: int) -> Answer:
        (claims,) = run.needs
        if claims.spec["strategy"] == "isolated":  # for which allocating measured
            return {}
        command = ["measure", "--tasks", ",".join(run.spec["tasks"]), "--rows", str(run.spec["rows"])]
        self._multisbora(run, self.work / "claims" / claims.key, command, threads)
        return {}

    def _through(self, run: Run, threads: int) -> Answer:
        (training,) = run.needs
        folder = self.work / "trained" / training.key
        command = ["measure", "--trained", "--tasks", training.spec["task"], "--rows", str(run.spec["rows"])]
        self._multisbora(run, folder, command, threads)
        return {}

    def _together(self, run: Run, adapters: Mapping[str, str]) -> Path:
        """A project in which all of these adapters of ours lie, anew."""
        folder = self.work / "composed" / run.key
        shutil.rmtree(folder, ignore_errors=True)
        self._on(folder, _claims_of(_trainings(run)[0]))
        (folder / "adapters").mkdir()
        for task, adapter in adapters.items():
            (folder / "adapters" / task).symlink_to(adapter)
        return folder

    def _adapters(self, trainings: Sequence[Run]) -> dict[str, str]:
        return {
            run.spec["task"]: str(self.work / "trained" / run.key / "adapters" / run.spec["task"]) for run in trainings
        }

    # ------------------------------------------------------------------------------------------------------ trainings

    def _train(self, run: Run, threads: int) -> Answer:
        folder, task = self.work / "trained" / run.key, run.spec["task"]
        watch = self.work / "rows" / f"{task}-watch.jsonl"
        settings = [f"training.learning_rate={run.spec['rate']!r}", f"training.seed={run.spec['seed']}", f"dev={watch}"]
        output = str(folder / "adapters" / task)
        trained = {"work": "trained", "output": output}
        if Path(output).is_dir():  # a run that was killed between its end and its record
            return self._work(run, trained, threads, plain=True)
        if "peer" in run.spec:
            dense = [self._adapters([need])[task] for need in run.needs]
            told = {"task": task, "overrides": settings, "output": output, "dense": dense[0] if dense else None}
            told |= {"kind": run.spec["peer"], "rank": run.spec["rank"], "targets": list(self.setup.targets)}
            told |= {"others": run.spec.get("others", []), "other_rows": run.spec.get("rows", 0)}
            return self._work(run, {"work": "peer", **told}, threads)
        self._on(folder, _claims_of(run))
        command = ["train", "--task", task, *(part for setting in settings for part in ("--set", setting))]
        command += ["--isolate", repr(run.spec["isolate"])]
        self._multisbora(run, folder, command, threads)
        return self._work(run, trained, threads, plain=True)

    # ----------------------------------------------------------------------------------------------------- evaluation

    def _base(self, run: Run, threads: int) -> Answer:
        return self._loss(run, "checkpoint", {}, {}, "", threads)

    def _own(self, run: Run, threads: int) -> Answer:
        adapters = self._adapters(run.needs)
        return self._loss(run, _kind(run.needs[0]), adapters, dict.fromkeys(adapters, 1.0), "cat", threads)

    def _mix(self, run: Run, threads: int) -> Answer:
        trainings, weights = self._parts(run)
        if run.spec["how"] != CORRECTED:
            adapters = self._merged_of(run)
            return self._loss(run, _kind(trainings[0]), adapters, weights, run.spec["how"], threads)
        with self._merged(run, trainings, weights, threads) as merged:
            return self._loss(run, "checkpoint", {}, {}, "", threads, base=merged)

    def _merged_of(self, run: Run) -> dict[str, str]:
        """The adapters that a run composes: those that were trained, or what tuning by channel made of them."""
        adapters = self._adapters(_trainings(run))
        for tuned in filter(_is_by_channel, run.needs):
            adapters = {task: str(self.work / "tuned" / tuned.key / task) for task in adapters}
        return adapters

    def _parts(self, run: Run) -> tuple[list[Run], dict[str, Any]]:
        """The adapters of a composition, and its lambdas."""
        trainings = _trainings(run)
        chosen = [need for need in run.needs if need.kind in ("tune", "grid")]
        even: dict[str, Any] = {need.spec["task"]: run.spec.get("weight", 1.0) for need in trainings}
        return trainings, (self.store.result(chosen[0])["weights"] if chosen else even)

    def _loss(
        self,
        run: Run,
        kind: str,
        adapters: Mapping[str, str],
        weights: Mapping[str, Any],
        how: str,
        threads: int,
        base: Path | None = None,
    ) -> Answer:
        told: dict[str, Any] = {"work": "loss", "kind": kind, "adapters": adapters, "weights": weights, "how": how}
        told |= {"tasks": run.spec["tasks"], "limit": run.spec.get("limit")}
        return self._work(run, told | ({} if base is None else {"base": str(base)}), threads)

    def _tune(self, run: Run, threads: int) -> Answer:
        folder = self._together(run, self._adapters(_trainings(run)))
        command = ["tune", "--tasks", ",".join(run.spec["tasks"]), "--by", run.spec["by"], "--json"]
        command += ["--rows", str(run.spec["rows"]), "--steps", str(run.spec["steps"])]
        command += ["--corrected"] if run.spec.get("corrected") else []
        command += ["--follow", run.spec["follow"]] if "follow" in run.spec else []
        if _is_by_channel(run):
            (before,) = (need for need in run.needs if need.kind == "tune")
            (folder / "start.yaml").write_text(yaml.safe_dump(self.store.result(before)["weights"]), encoding="utf-8")
            output = self.work / "tuned" / run.key
            shutil.rmtree(output, ignore_errors=True)
            command += ["--weights-from", "start.yaml", "--output", str(output)]
        found: Answer = json.loads(self._multisbora(run, folder, command, threads))
        shutil.rmtree(folder)
        return {key: found[key] for key in ("weights", "tasks", "lambdas", "steps")}

    def _crosstalk(self, run: Run, threads: int) -> Answer:
        """What `multisbora crosstalk` says, the matrices added up by their kind."""
        folder = self._together(run, self._merged_of(run))
        command = ["crosstalk", "--tasks", ",".join(run.spec["tasks"]), "--rows", str(run.spec["rows"]), "--json"]
        found: Answer = json.loads(self._multisbora(run, folder, command, threads))
        shutil.rmtree(folder)
        kinds: dict[str, dict[str, float]] = {}
        for module, effect in found["matrices"].items():
            of_kind = kinds.setdefault(module.rpartition(".")[2], dict.fromkeys(run.spec["tasks"], 0.0))
            for on, updates in effect.items():
                of_kind[on] += sum(figures["harm"] for of, figures in updates.items() if of != on)
        return {"losses": found["tasks"], "total": found["total"], "kinds": kinds, "worst": found["worst"]}

    def _grid(self, run: Run, threads: int) -> Answer:
        told = {"kind": _kind(run.needs[0]), "adapters": self._adapters(run.needs), "how": run.spec["how"]}
        return self._work(run, {"work": "grid", "rows": run.spec["rows"], **told}, threads)

    @contextlib.contextmanager
    def _merged(self, run: Run, trainings: Sequence[Run], weights: Mapping[str, Any], threads: int) -> Iterator[Path]:
        """A checkpoint with these tasks in it, for as long as it is looked at."""
        how = run.spec["how"]
        folder = self.work / "composed" / run.key
        if _kind(trainings[0]) == "ours":
            self._together(run, self._adapters(trainings))
            (folder / "weights.yaml").write_text(yaml.safe_dump(dict(weights)), encoding="utf-8")
            command = ["merge", "--tasks", ",".join(weights), "--weights-from", "weights.yaml", "--output", "merged"]
            command += ["--method", "corrected"] if how == CORRECTED else []
            self._multisbora(run, folder, command, threads)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            told = {"adapters": self._adapters(trainings), "weights": weights, "how": how}
            self._work(run, {"work": "unload", **told, "output": str(folder / "merged")}, threads, recipes=False)
        yield folder / "merged"
        shutil.rmtree(folder)

    def _score(self, run: Run, threads: int) -> Answer:
        if not run.needs:
            return self._eval(run, self.work, self.setup.base, threads)
        trainings, weights = self._parts(run)
        if run.spec["how"] != "own":
            with self._merged(run, trainings, weights, threads) as merged:
                return self._eval(run, merged.parent, str(merged), threads)
        if _kind(trainings[0]) == "ours":
            folder = self.work / "trained" / trainings[0].key
            return self._eval(run, folder, self._adapters(trainings)[run.spec["task"]], threads)
        told = Run(run.kind, run.name, {**run.spec, "how": "cat"}, run.needs)
        with self._merged(told, trainings, weights, threads) as merged:
            return self._eval(run, merged.parent, str(merged), threads)

    def _eval(self, run: Run, folder: Path, path: str, threads: int) -> Answer:
        command = ["eval", path, "--tasks", run.spec["task"], "--limit", str(run.spec["rows"]), "--num-beams", "1"]
        command += ["--max-new-tokens", "128", "--batch-size", "32", "--json"]
        if not (folder / PROJECT_FILE).is_file():
            self._project(folder, folder / "registry.db")
        answer: Answer = json.loads(self._multisbora(run, folder, command, threads))["tasks"][run.spec["task"]]
        return answer

    # ------------------------------------------------------------------------------------------------------ processes

    def _multisbora(self, run: Run, folder: Path, arguments: Sequence[str], threads: int) -> str:
        """A command in a project's folder; what it prints.

        Raises:
            RuntimeError: it failed.
        """
        if self.here:
            return _typed(folder, arguments)
        return self._start(run, ["-m", "multisbora", *arguments], folder, threads)

    def _work(
        self, run: Run, told: Mapping[str, Any], threads: int, *, plain: bool = False, recipes: bool = True
    ) -> Answer:
        """A piece of work of composition_work.py.

        Args:
            plain: it needs neither the base nor the recipes.
        """
        if not plain:
            told = {"base": self.setup.base, **({"recipes": str(self.work / "tasks")} if recipes else {}), **told}
        if self.here:
            from composition_work import do

            return do(told)
        path = self.work / "logs" / f"{run.key}.told.json"
        path.write_text(json.dumps(told), encoding="utf-8")
        answer: Answer = json.loads(self._start(run, [str(WORKER), str(path)], self.work, threads).splitlines()[-1])
        return answer

    def _start(self, run: Run, command: Sequence[str], folder: Path, threads: int) -> str:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        log = self.work / "logs" / f"{run.key}.log"
        with log.open("a", encoding="utf-8") as said:
            if self._stopped.is_set():
                raise RuntimeError("stopped")
            child = subprocess.Popen(
                [sys.executable, *command],
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                pass_fds=(self.lock,),
            )
            self._children.add(child)
            answer, _ = child.communicate()
            self._children.discard(child)
        if child.returncode:
            last = log.read_text(encoding="utf-8").strip().splitlines()[-1:] or ["it said nothing"]
            raise RuntimeError(f"exit code {child.returncode}: {last[0]} (see {log})")
        return answer


def _trainings(run: Run) -> list[Run]:
    """Those that a run composes."""
    return [need for need in run.needs if need.kind == "train"]


def _claims_of(training: Run) -> Run:
    (need,) = training.needs
    return need.needs[0] if need.kind == "moments" else need


def _is_by_channel(run: Run) -> bool:
    return run.kind == "tune" and run.spec["by"] == "channel"


def _kind(training: Run) -> str:
    return "peer" if "peer" in training.spec else "ours"


def _strategy(spec: Mapping[str, Any]) -> str:
    return "isolated" if spec["strategy"] == "isolated" else "random"


def _typed(folder: Path, arguments: Sequence[str]) -> str:
    """A command in this process.

    Raises:
        RuntimeError: it failed.
    """
    from multisbora.cli import app

    before, told = Path.cwd(), io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(told):
            code = app(list(arguments), prog_name="multisbora", standalone_mode=False)
    finally:
        os.chdir(before)
    if code:
        raise RuntimeError(f"multisbora {arguments[0]} ended with exit code {code}")
    return told.getvalue()
