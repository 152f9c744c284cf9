"""Thousands of files that somebody made to do harm, and whether multisbora reads or refuses each of them cleanly.

Run it with the environment's Python: `.venv/bin/python scripts/stress_files.py --count 10000`. It makes a tiny base
model in one file and in shards, two adapters and their merged checkpoint, and mutates one file of them after another:
safetensors headers and data, indices, adapter_config.json, config.json, receipts and undo data (see hostile.py).
Everything that reads such a file is then called on it.

What must hold for each call, or the exit code is 1:

- it reads the file, and then safetensors' own loader reads the same; or it raises a MultisboraError of one printable
  line of at most 600 characters, which names the file or its folder;
- it takes at most --limit seconds of the processor, and all of them together at most --memory MB more than the valid
  files do (a header of 100,000 tensors, near the largest that is read, takes two to six seconds: time is in proportion
  to the tensors, and nothing takes more);
- it opens no file outside the folders that it was given, and no tensor is said to lie beyond the end of its file;
- `verify` never proves a checkpoint whose weights are not those that were merged.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import hostile
import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

from multisbora import verify
from multisbora.adapter import Adapter
from multisbora.checkpoint import Checkpoint
from multisbora.errors import MultisboraError
from multisbora.geometry import from_checkpoint
from multisbora.header import read_header
from multisbora.merge import merge
from multisbora.receipt import Receipt

WIDTH, RANK = 16, 4
MODULES = tuple(f"model.layers.{layer}.self_attn.{kind}" for layer in (0, 1) for kind in ("q_proj", "v_proj"))
LONGEST = 600
HANG_SECONDS = 10
ROOM = 1 << 30  # bytes of addresses beyond those that the valid files need
WEIGHTS, RECEIPT, CONFIG = "model.safetensors", "multisbora_receipt.json", "adapter_config.json"
INDEX, ADAPTER = "model.safetensors.index.json", "adapter_model.safetensors"


class Hang(BaseException):
    """A call that does not end. No part of the package catches it."""


@dataclass(frozen=True)
class Target:
    """A file that is mutated: what may happen to it, and who reads it.

    Attributes:
        file: under the sample's folder.
        share: of the cases.
        mutations: (weight, mutation).
        readers: names of methods of `Sample`.
    """

    file: str
    share: int
    mutations: tuple[tuple[int, hostile.Mutation], ...]
    readers: Sequence[str]


_TENSORS = (
    *((60, hostile.header_mutation), (30, hostile.bytes_mutation), (4, hostile.kind_mutation)),
    (2, hostile.large_mutation),
)
_JSON = (
    *((60, hostile.json_mutation), (20, hostile.bytes_mutation), (4, hostile.kind_mutation)),
    (1, hostile.large_mutation),
)
TARGETS = (
    Target(f"base/{WEIGHTS}", 20, _TENSORS, ("header", "checkpoint", "geometry", "merge")),
    Target("shards/model-00001-of-00002.safetensors", 10, _TENSORS, ("checkpoint", "geometry", "merge_shards")),
    Target(f"shards/{INDEX}", 10, (*_JSON, (40, hostile.index_mutation)), ("checkpoint", "geometry", "merge_shards")),
    Target(f"a/{ADAPTER}", 20, _TENSORS, ("header", "adapter", "merge", "proof")),
    Target(f"a/{CONFIG}", 20, (*_JSON, (60, hostile.adapter_config_mutation)), ("adapter", "merge", "proof")),
    Target("base/config.json", 4, _JSON, ("geometry", "merge", "proof")),
    Target(f"merged/{RECEIPT}", 10, _JSON, ("receipt", "proof")),
    Target(f"merged/{WEIGHTS}", 3, _TENSORS, ("header", "checkpoint", "proof")),
    Target("merged/multisbora_undo/a.safetensors", 3, _TENSORS, ("header", "proof")),
)


@dataclass
class Found:
    """What came of the cases so far.

    Attributes:
        outcomes: (reader, "read" or "refused") -> calls.
        problems: what did not hold, at most one a call.
    """

    cases: int = 0
    slowest: float = 0.0
    memory: float = 0.0  # MB above that of the valid files
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


class Sample:
    """Small valid files of every kind, in a folder of their own; `mutated` makes one of them hostile for a while."""

    def __init__(self, root: Path) -> None:
        self.root = root
        chance = np.random.default_rng(0)
        tensors: dict[str, np.ndarray] = {
            f"{module}.weight": chance.normal(size=(WIDTH, WIDTH)).astype(ml_dtypes.bfloat16).astype(np.float32)
            for module in MODULES
        }
        tensors["model.embed_tokens.weight"] = chance.normal(size=(32, WIDTH)).astype(np.float32)
        half = len(tensors) // 2
        parts = [dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])]
        names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
        for folder in ("base", "shards"):
            (root / folder).mkdir()
            config = {"model_type": "llama", "hidden_size": WIDTH, "architectures": ["LlamaForCausalLM"]}
            (root / folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, root / "base" / WEIGHTS, metadata={"format": "pt"})
        for name, part in zip(names, parts, strict=True):
            save_file(part, root / "shards" / name, metadata={"format": "pt"})
        save_file(parts[0], root / "secret.safetensors")
        weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
        (root / "shards" / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
        adapters = [self._write_adapter(task, number, chance) for number, task in enumerate("ab")]
        receipt = merge(root / "base", adapters, output=root / "merged", allow_base_mismatch=True, dry_run=True)
        for folder in adapters:
            config = json.loads((folder / CONFIG).read_text())
            (folder / CONFIG).write_text(json.dumps(config | {"base_fingerprint": receipt.base_fingerprint}))
        merge(root / "base", adapters, output=root / "merged")
        self.weights = load_file(root / "merged" / WEIGHTS)

    def _write_adapter(self, task: str, number: int, chance: np.random.Generator) -> Path:
        folder = self.root / task
        folder.mkdir()
        own = np.arange(number * RANK, (number + 1) * RANK, dtype=np.int32)
        tensors: dict[str, np.ndarray] = {}
        for module in MODULES:
            tensors[f"base_model.model.{module}.sbora_indices"] = own
            tensors[f"base_model.model.{module}.sbora_values"] = chance.normal(size=(WIDTH, RANK)).astype(np.float32)
        save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
        config = {"peft_type": "SBORA", "variant": "fa", "r": RANK, "alpha": 8, "use_rslora": False, "task": task}
        config |= {"alpha_pattern": {"v_proj": 4.0}, "target_modules": list(MODULES), "composition": "default"}
        config |= {"base_model_name_or_path": "base", "base_fingerprint": None, "excluded": {}}
        (folder / CONFIG).write_text(json.dumps(config))
        return folder

    @contextmanager
    def mutated(self, target: Target, chance: random.Random) -> Iterator[str]:
        """Mutate a file; put it back at the end. Yields the mutation's name."""
        path = self.root / target.file
        valid = path.read_bytes()
        weights, mutations = zip(*target.mutations, strict=True)
        mutation: hostile.Mutation = chance.choices(mutations, weights)[0]
        try:
            mutation(path, chance)
            yield mutation.__name__
        finally:
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            path.unlink(missing_ok=True)
            path.write_bytes(valid)

    def header(self, path: Path) -> None:
        header = read_header(path)
        size = path.stat().st_size
        if any(header.data_start + info.end > size for info in header.tensors.values()):
            raise AssertionError("a tensor ends beyond the end of the file")
        _compare_header(path, header.metadata, {n: (i.dtype, i.shape) for n, i in header.tensors.items()})

    def checkpoint(self, path: Path) -> None:
        checkpoint = Checkpoint.open(path.parent)
        for file, header in checkpoint.headers.items():
            _compare_header(file, header.metadata, {n: (i.dtype, i.shape) for n, i in header.tensors.items()})
        for name, info in list(checkpoint.headers[next(iter(checkpoint.headers))].tensors.items())[:4]:
            if info.dtype == "F32" and info.nbytes < 1 << 20 and checkpoint.tensor(name).shape != info.shape:
                raise AssertionError(f"{name} has another shape than its header says")

    def geometry(self, path: Path) -> None:
        geometry = from_checkpoint(path.parent)
        if not all(matrix.tensor.startswith(matrix.module) for matrix in geometry.matrices):
            raise AssertionError("a matrix has another name than its tensor")

    def adapter(self, path: Path) -> None:
        adapter = Adapter.read(path.parent)
        stored = load_file(path.parent / ADAPTER)
        for name, module in adapter.modules.items():
            indices, values = (stored[f"base_model.model.{name}.sbora_{part}"] for part in ("indices", "values"))
            if list(module.region.indices) != indices.tolist() or not np.array_equal(module.values, values):
                raise AssertionError(f"{name} is not what the file holds")

    def receipt(self, path: Path) -> None:
        Receipt.read(path.parent)

    def merge(self, path: Path) -> None:
        self._merge(self.root / "base")

    def merge_shards(self, path: Path) -> None:
        self._merge(self.root / "shards")

    def _merge(self, base: Path) -> None:
        merge(base, [self.root / "a", self.root / "b"], output=self.root / "never", dry_run=True)

    def proof(self, path: Path) -> None:
        proof = verify(self.root / "merged", base=self.root / "base", adapters=[self.root / "a", self.root / "b"])
        if not proof.ok:
            raise Refused(str(proof.problem))
        now = load_file(self.root / "merged" / WEIGHTS)
        if now.keys() != self.weights.keys() or any(now[n].tobytes() != self.weights[n].tobytes() for n in now):
            raise AssertionError("other weights than those that were merged are proven")


class Refused(MultisboraError):
    """A proof that does not hold: it is told like an error."""


def _compare_header(path: Path, metadata: dict[str, str], told: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """Raise if safetensors' own reader refuses the file, or reads other tensors."""
    if path.stat().st_size > ROOM:  # a hole; they map the file as a whole
        return
    found = {}
    with safetensors.safe_open(path, framework="np") as file:
        theirs = dict(file.metadata() or {})
        for name in file.keys():  # noqa: SIM118 - it is no dictionary
            part = file.get_slice(name)
            found[name] = (part.get_dtype(), tuple(part.get_shape()))
    if found != told or theirs != metadata:
        raise AssertionError("safetensors reads other tensors or metadata")


class Watch:
    """The files that the process opens while it is on."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.on = False
        self.outside: list[str] = []
        self._known = tuple(
            {
                str(Path(folder).resolve())
                for folder in (sys.prefix, sys.base_prefix, Path(verify.__code__.co_filename).parent)
            }
        )
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if not path.startswith((f"{self.root}{os.sep}", *self._known)) and path != str(self.root):
                self.outside.append(path)


def stress(
    root: Path, count: int, seed: int, *, limit: float, skip: Sequence[str] = (), case: int | None = None
) -> Found:
    """Make the files in an empty folder and mutate them `count` times. The same seed makes the same cases.

    Args:
        limit: seconds that a call may take.
        skip: readers to leave out.
        case: only this one.
    """
    sample, watch, found = Sample(root), Watch(root), Found()
    targets = [replace(target, readers=[name for name in target.readers if name not in skip]) for target in TARGETS]
    present = [target for target in targets if target.readers and (root / target.file).is_file()]
    for target in present:  # valid files first: imports and caches, and the memory that they need
        for reader in target.readers:
            getattr(sample, reader)(root / target.file)
    start, told = _peak(), 0
    with bounded():
        for number in range(count) if case is None else [case]:
            chance = random.Random(f"{seed}/{number}")
            target = chance.choices(present, [target.share for target in present])[0]
            with sample.mutated(target, chance) as mutation:
                name = f"case {number}, {mutation}"
                _forget_peak()  # what it took to make the file is not what it takes to read it
                for reader in target.readers:
                    try_one(found, watch, getattr(sample, reader), root / target.file, name, limit)
                found.memory = max(found.memory, _peak() - start)
            for problem in found.problems[told:]:
                print(problem, file=sys.stderr, flush=True)
            told = len(found.problems)
            found.cases += 1
            if found.cases % 1000 == 0:
                print(f"{found.cases} files, {len(found.problems)} problems", file=sys.stderr, flush=True)
    return found


def try_one(found: Found, watch: Watch, reader: Callable[[Path], None], path: Path, name: str, limit: float) -> None:
    """Call one reader on a hostile file, and judge what it does."""
    where = f"{name}, {reader.__name__} of {path.parent.name}/{path.name}"
    watch.outside.clear()
    outcome = "refused"
    problem: str | None = None
    begun = time.process_time()  # others may be busy on the same machine; who waits is rung for
    try:
        with _alarm():
            watch.on = True
            reader(path)
        outcome = "read"
    except MultisboraError as error:
        problem = complaint(str(error), watch.root)
    except Hang:
        problem = f"it hangs for {HANG_SECONDS} s"
    except Exception as error:
        problem = f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        watch.on = False
    took = time.process_time() - begun
    if problem is None and watch.outside:
        problem = f"it opens {watch.outside[0]}"
    if problem is None and took > limit:
        problem = f"it takes {took:.1f} s"
    found.slowest = max(found.slowest, took)
    found.outcomes[reader.__name__, outcome] += 1
    if problem is not None:
        found.problems.append(f"{where}: {problem}")


def complaint(message: str, root: Path) -> str | None:
    """What is wrong with the message of an error, if anything."""
    if len(message) > LONGEST:
        return f"a message of {len(message)} characters: {message[:200]!r}"
    if not message.isprintable():
        return f"a message that is not one printable line: {message!r}"
    return None


@contextmanager
def _alarm() -> Iterator[None]:
    def ring(signum: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def bounded() -> Iterator[None]:
    """Less than all of the machine's memory for this process: what asks for it gets a MemoryError instead."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _peak() -> float:
    """MB of memory that this process had at the most since `_forget_peak`."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=10_000, help="mutated files (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this case alone, to look into it")
    parser.add_argument("--skip", nargs="*", default=[], help="readers to leave out")
    parser.add_argument(
        "--limit", type=float, default=8.0, help="processor seconds that a call may take (default %(default)s)"
    )
    parser.add_argument("--memory", type=float, default=600.0, help="MB in all (default %(default)s)")
    given = parser.parse_args(arguments)
    scratch = Path(tempfile.mkdtemp(prefix="stress-files-")).resolve()
    begun = time.perf_counter()
    try:
        found = stress(scratch, given.count, given.seed, limit=given.limit, skip=given.skip, case=given.case)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if found.memory > given.memory:
        found.problems.append(f"all of them take {found.memory:.0f} MB more than the valid files")
        print(found.problems[-1], file=sys.stderr)
    print(f"{'reader':<14}{'read':>8}{'refused':>9}")
    for reader in sorted({reader for reader, _ in found.outcomes}):
        print(f"{reader:<14}{found.outcomes[reader, 'read']:>8}{found.outcomes[reader, 'refused']:>9}")
    print(
        f"{found.cases} files, {sum(found.outcomes.values())} calls in {time.perf_counter() - begun:.0f} s; "
        f"slowest {found.slowest:.2f} s; memory +{found.memory:.0f} MB; {len(found.problems)} problems"
    )
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
