"""Several processes that train one task together: what a launcher promised, what came up, and how they keep together.

torchrun and `accelerate launch` start one process a device and say so in its environment. accelerate turns that into
plain data parallelism (DDP), into sharded weights (FSDP2) or into DeepSpeed, and where it cannot, it trains in another
way without a word: on a CPU, FSDP becomes DDP, and torchrun's processes become strangers that all train the whole task.
So what came up is compared with what was promised. Importing this module loads no torch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from .errors import MultisboraError, TrainingError, UsageError

if TYPE_CHECKING:
    from .recipe import Training

Parallelism = Literal["ddp", "fsdp2", "deepspeed"]
T = TypeVar("T")

_NAMES = {"ddp": "data parallelism", "fsdp2": "FSDP2", "deepspeed": "DeepSpeed"}
# Process counts of launchers that set nothing else which torch.distributed could start from.
_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_FAILED = "multisbora_failed"


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of a run, and this one among them.

    Attributes:
        count: how many, over all machines.
        rank: number of this one, from 0. Process 0 alone talks, holds the run's folder, tells the registry and
            publishes.
        parallelism: how they share the work.
        deepspeed: what stands in the DeepSpeed config file, where one was given.
    """

    count: int = 1
    rank: int = 0
    parallelism: Parallelism = "ddp"
    deepspeed: dict[str, Any] | None = None

    @classmethod
    def promised(
        cls, environ: Mapping[str, str] | None = None, deepspeed: str | os.PathLike[str] | None = None
    ) -> Processes:
        """What the launcher said in the environment, and a DeepSpeed config file that was given beside it.

        Raises:
            UsageError: FSDP in version 1, Megatron, mpirun without torch's own variables, or a DeepSpeed config that
                cannot be used.
        """
        environ = os.environ if environ is None else environ
        count, rank = _number(environ, "WORLD_SIZE", 1), _number(environ, "RANK", 0)
        for name in _MPI_SIZES:
            if "WORLD_SIZE" not in environ and _number(environ, name, 1) > 1:
                raise UsageError(
                    f"{name} promises {environ[name]} processes, but WORLD_SIZE, RANK and MASTER_ADDR are not set: "
                    "start with torchrun or `accelerate launch`"
                )
        if _on(environ, "ACCELERATE_USE_MEGATRON_LM"):
            raise UsageError("Megatron-LM does not train SBoRA adapters: use data parallelism, FSDP2 or DeepSpeed")
        fsdp, given = _on(environ, "ACCELERATE_USE_FSDP"), deepspeed is not None
        version = environ.get("FSDP_VERSION", "1")
        if fsdp and version != "2":
            raise UsageError(f"FSDP version {version} is not supported: set fsdp_version: 2 in the accelerate config")
        if not (given or _on(environ, "ACCELERATE_USE_DEEPSPEED")):
            return cls(count, rank, "fsdp2" if fsdp else "ddp")
        if fsdp:
            raise UsageError("DeepSpeed and FSDP exclude each other: ask for one of them")
        if given and "LOCAL_RANK" not in environ:
            raise UsageError(
                "--deepspeed needs a process a device: start with `torchrun --nproc-per-node N -m multisbora train ...`"
            )
        config = None if deepspeed is None else _read_deepspeed(Path(deepspeed))
        if importlib.util.find_spec("deepspeed") is None:
            raise UsageError("DeepSpeed was asked for, but the package deepspeed is not installed: pip install it")
        return cls(count, rank, "deepspeed", config)

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def settings(self) -> dict[str, Any]:
        """What a run's settings keep of it: the order of sums and every process's random state hang on these."""
        found: dict[str, Any] = {"processes": self.count}
        if self.count > 1 or self.parallelism != "ddp":
            found["parallelism"] = self.parallelism
        if self.deepspeed is not None:
            found["deepspeed"] = self.deepspeed
        return found

    def micro_batch(self, batch_size: int, micro_batch_size: int | None) -> tuple[int, int]:
        """Examples on one device at a time, and how many times a step, so that a step is `batch_size` in all.

        The first is the largest divisor of each process's share that is at most `micro_batch_size`.

        Raises:
            UsageError: the batch cannot be divided so.
        """
        each, odd = divmod(batch_size, self.count)
        if odd:
            raise UsageError(
                f"training.batch_size {batch_size} cannot be divided among {self.count} processes: "
                "start a number of processes that divides it, or change it with --set"
            )
        bound = min(micro_batch_size or each, each)
        micro = next(size for size in range(bound, 0, -1) if each % size == 0)
        return micro, each // micro

    def check_recipe(self, training: Training) -> None:
        """Refuse what these processes cannot train, before anything is loaded.

        Raises:
            UsageError: the batch cannot be divided, a quantised base would have to be sharded, or DeepSpeed would have
                to train isolated.
        """
        self.micro_batch(training.batch_size, training.micro_batch_size)
        if training.isolate and self.parallelism == "deepspeed":
            raise UsageError(
                f"DeepSpeed takes its step within backward, so that no penalty can be added (training.isolate "
                f"{training.isolate:g}): train with plain data parallelism or FSDP2, or set training.isolate to 0"
            )
        if training.quantization is not None and self.parallelism != "ddp":
            raise UsageError(
                f"{_NAMES[self.parallelism]} does not shard bases that are quantised (training.quantization "
                f"{training.quantization}): train with plain data parallelism, or on the 16-bit base"
            )

    def start(self) -> None:
        """Join the other processes, before anything is loaded.

        Raises:
            TrainingError: they cannot be joined, or came up as something else than was promised.
        """
        if self.parallelism == "ddp" and self.count == 1:
            return
        from accelerate import PartialState

        if self.parallelism == "fsdp2":
            # With it, accelerate loads weights in one process and moves the model through the meta device, where it
            # takes every tensor of the state dict for a sharded one: it fails on the indices of the adapter.
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        try:
            state = PartialState(cpu=use_cpu())
        except Exception as error:  # accelerate, torch's store and the backends each raise kinds of their own
            raise TrainingError(
                f"process {self.rank} of {self.count} cannot join the others: {_one_line(error)}"
            ) from error
        came_up = state.distributed_type.value
        sharded = self.parallelism == "ddp" or came_up not in ("NO", "MULTI_CPU")
        if state.num_processes != self.count or state.process_index != self.rank or not sharded:
            raise self._other(came_up, state.num_processes)

    def check(self, accelerator: Any) -> None:
        """Compare what was promised with the Accelerator that the Trainer made.

        Raises:
            TrainingError: it is something else.
        """
        came_up, count = accelerator.distributed_type.value, accelerator.num_processes
        if self.parallelism == "fsdp2":
            right = came_up == "FSDP" and accelerator.is_fsdp2
        elif self.parallelism == "deepspeed":
            right = came_up == "DEEPSPEED"
        else:
            right = came_up.startswith("MULTI_") or (came_up == "NO" and self.count == 1)
        if not right or count != self.count:
            raise self._other(came_up, count)

    def _other(self, came_up: str, count: int) -> TrainingError:
        name = _NAMES[self.parallelism]
        hint = "look at the launcher's arguments and at what torch says of this machine's devices"
        if came_up in ("NO", "MULTI_CPU") and self.parallelism != "ddp":
            hint = f"{name} needs accelerators; without them start plain data parallelism with torchrun"
        return TrainingError(
            f"the launcher asked for {name} in {self.count} processes, but {came_up} in {count} came up: {hint}"
        )

    @contextlib.contextmanager
    def agree(self) -> Iterator[None]:
        """What is done inside is done when all processes have done it; what one of them raises, all raise.

        Every process has to come here, in the same order.
        """
        mine: Exception | None = None
        try:
            yield
        except Exception as error:
            mine = error
        if self._joined:
            failed = [error for error in self._gather(self._portable(mine)) if error is not None]
            mine = mine or next(iter(failed), None)
        if mine is not None:
            raise mine

    def tell(self, value: T) -> T:
        """The value that process 0 has."""
        found: T = self._gather(value)[0] if self._joined else value
        return found

    def check_same(self, settings: dict[str, Any]) -> None:
        """Compare what this process trains with what process 0 does. Every process has to call.

        Raises:
            TrainingError: they differ: another data file or another base model on one machine.
        """
        theirs = self.tell(settings)
        odd = sorted(key for key in settings.keys() | theirs.keys() if settings.get(key) != theirs.get(key))
        if odd:
            raise TrainingError(
                f"process {self.rank} of {self.count} has another {', '.join(odd)} than process 0: "
                "give all machines the same base model, data, recipe and registry"
            )

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Around a part in which the processes exchange data: an end of another one becomes one line.

        Raises:
            TrainingError: another process is gone.
        """
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not _is_of_network(error):
                raise
            raise TrainingError(
                f"process {self.rank} of {self.count} lost the others: one of them failed or was killed, "
                "for memory perhaps; look at what its machine says"
            ) from error

    @property
    def _joined(self) -> bool:
        if self.count == 1:
            return False
        import torch

        return torch.distributed.is_initialized()

    def _gather(self, value: Any) -> list[Any]:
        import torch

        found: list[Any] = [None] * self.count
        with self.connected():
            torch.distributed.all_gather_object(found, value)
        return found

    def _portable(self, error: Exception | None) -> MultisboraError | None:
        if error is None or isinstance(error, MultisboraError):
            return error
        return TrainingError(f"process {self.rank} of {self.count} failed: {type(error).__name__}: {_one_line(error)}")


class StepBatches:
    """A batch sampler: the micro-batches of all processes in order, one of process 0, one of process 1, and so on.

    A step's examples are those that one process alone would take. The last step of an epoch may have fewer; they are
    spread so that all processes have the same number of micro-batches, as collective operations need it. A process
    that is left without an example gets the one at `blank`.

    Args:
        sampler: indices of the examples of one epoch, in order.
        batch_size: examples of a step, over all processes.
        micro: examples of a micro-batch.
        blank: index of an example without an answer token, which adds nothing to loss and gradients.
    """

    def __init__(self, sampler: Any, batch_size: int, micro: int, processes: Processes, blank: int) -> None:
        # accelerate puts a seeded sampler in the place of a random one, under this name.
        self.sampler = sampler
        self.step, self.micro, self.blank = batch_size, micro, blank
        self.processes = processes.count

    def __iter__(self) -> Iterator[list[int]]:
        step: list[int] = []
        for index in self.sampler:
            step.append(index)
            if len(step) == self.step:
                yield from self._split(step)
                step = []
        if step:
            yield from self._split(step)

    def __len__(self) -> int:
        full, rest = divmod(len(self.sampler), self.step)
        return full * self._parts(self.step) + self._parts(rest)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def _parts(self, examples: int) -> int:
        rounds = -(-examples // (self.micro * self.processes))
        return rounds * self.processes if self.processes > 1 else -(-examples // self.micro)

    def _split(self, step: list[int]) -> Iterator[list[int]]:
        parts = self._parts(len(step))
        if self.processes == 1:
            yield from (step[at : at + self.micro] for at in range(0, len(step), self.micro))
            return
        for part in range(parts):
            start, end = part * len(step) // parts, (part + 1) * len(step) // parts
            yield step[start:end] or [self.blank]


def hush(message: str) -> None:
    """What the other processes say instead: what process 0 says is said for all."""


def is_first() -> bool:
    """Whether this process is the one that talks: process 0 of its launcher, or one that no launcher started."""
    return _number(os.environ, "WORLD_SIZE", 1) == 1 or _number(os.environ, "RANK", 0) == 0


def first_to_fail() -> bool:
    """Whether no other process of this run has failed before: that one says why, the others end without a word."""
    if _number(os.environ, "WORLD_SIZE", 1) == 1:
        return True
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=5))))
        return bool(store.add(_FAILED, 1) == 1)
    except Exception:  # the store lives in another process, which may be gone: better said twice than never
        return True


def finish() -> None:
    """Leave the other processes. For the end of a program; a process group cannot be joined twice."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def use_cpu() -> bool:
    """Whether accelerate has to be told that there is no accelerator: unless told, it joins nothing on a CPU."""
    import torch

    return not torch.accelerator.is_available()


def _read_deepspeed(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"DeepSpeed config {path} cannot be read: {_one_line(error)}") from None
    if not isinstance(found, dict):
        raise UsageError(f"DeepSpeed config {path} is no JSON object: see DeepSpeed's documentation of its config")
    return found


def _on(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "false").lower() in ("1", "true", "yes", "on")


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name) or str(default)
    if not text.isdecimal():
        raise UsageError(f"environment variable {name} is {text!r}, not a number: a launcher sets it, unset it")
    return int(text)


def _is_of_network(error: RuntimeError) -> bool:
    import torch

    text = str(error)
    return isinstance(error, torch.distributed.DistError) or "gloo" in text or "NCCL" in text or "Gloo" in text


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
