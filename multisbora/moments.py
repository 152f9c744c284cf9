"""What a task's rows send through the matrices of a base model: the second moments that say, without the rows, how
loudly any update of a matrix would speak on them.

For one matrix, x is what it gets for a token, (in,), and g the gradient of the task's loss at what it puts out, (out,),
both of the base model alone, or with the task's own trained adapter on it, and then of answers that the model draws
(see `measure`); in that loss the p-th token of an answer counts 1 / p (`probe.opening_loss`). With w = |g|^2 a token,
the moments are sums over the tokens of a row, as means over a task's rows:

    energy    w x_c^2, for each input channel c
    block     w x_c x_d, for the input channels c and d that somebody claimed
    response  g_o^2, for each output channel o

An update D (out x in) that is zero but for channels of the block moves the output of a token by D x, and a row's loss
by the sum of g.(D x). If gradients pointed everywhere alike, and those of a row's tokens each its own way, the mean
square of that would be trace(D block D') / out, in squared nats a row: `harm`. The weight w is what makes prompt
tokens, of which few matter to an answer, count for little.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from .errors import DataError, UsageError
from .header import MAX_NAME
from .names import check_name
from .publish import write_whole
from .untrusted import MAX_JSON_BYTES, is_plain, open_file, parse_json, shown

FORMAT = 1
# Of fb tasks all that a matrix gets counts, not only some columns: a block of more channels takes too much room.
WIDEST = 4096
SOURCES = ("task", "text", "adapter")
MOMENTS_FILE = "multisbora_moments.safetensors"  # beside an adapter: of its rows, through it
FLOATS = np.dtype("<f4")  # as stored
INTS = np.dtype("<i4")
Floats = npt.NDArray[np.float32]
_HEAD = "multisbora_moments"
_AXES = {"energy": 1, "response": 1, "channels": 1, "block": 2}  # of a site, in order
_MOST = 2**48  # of a length or an offset that a header may tell of
_ROUNDING = 1e-3  # between the two halves of a block, as a share of its largest value


@dataclass(frozen=True, slots=True)
class Site:
    """The moments of one matrix.

    Attributes:
        energy: (in,) fp32.
        response: (out,) fp32.
        channels: (n,) int32, sorted: the input channels of the block.
        block: (n, n) fp32, symmetric; its diagonal is `energy[channels]` up to rounding.
    """

    energy: Floats
    response: Floats
    channels: npt.NDArray[np.int32]
    block: Floats

    def at(self, channels: Sequence[int] | npt.NDArray[Any]) -> Floats:
        """The block of some channels, in their order, (r, r).

        Raises:
            KeyError: the block lacks one of them; the argument is how many.
        """
        wanted = np.asarray(channels, np.int64)
        places = np.searchsorted(self.channels, wanted)
        found = places < len(self.channels)
        found[found] = self.channels[places[found]] == wanted[found]
        if not found.all():
            raise KeyError(int(np.count_nonzero(~found)))
        return self.block[np.ix_(places, places)]

    def fault(self) -> str:
        """What cannot be of a matrix; "" where all can."""
        for what, axes in _AXES.items():
            values = getattr(self, what)
            if values.ndim != axes:
                return f"{what} has {values.ndim} axes, not {axes}"
            if not np.isfinite(values).all():
                return f"{what} is not finite"
        if min(self.energy.min(initial=0), self.response.min(initial=0), np.diagonal(self.block).min(initial=0)) < 0:
            return "a mean square is negative"
        size = len(self.channels)
        rising = bool((np.diff(self.channels) > 0).all())
        inside = size == 0 or (self.channels[0] >= 0 and self.channels[-1] < len(self.energy))
        if self.block.shape != (size, size) or not rising or not inside:
            return "its channels do not fit its block"
        if np.abs(self.block - self.block.T).max(initial=0) > _ROUNDING * np.abs(self.block).max(initial=0):
            return "its block is not symmetric"
        return ""


@dataclass(frozen=True, slots=True)
class Moments:
    """The moments of one task's rows at every matrix that was looked at.

    Attributes:
        task: whose rows they were.
        base_fingerprint: of the base model that they went through.
        geometry_digest: of its geometry.
        rows, tokens: how many there were.
        source: "task"; "text" where the task had no rows of its own and some other text stood for them; or "adapter",
            its rows through the base with its adapter on it.
        sites: module -> its moments.
        adapter: digest of that adapter, as in `Adapter`.
    """

    task: str
    base_fingerprint: str
    geometry_digest: str
    rows: int
    tokens: int
    sites: Mapping[str, Site] = field(repr=False)
    source: str = "task"
    adapter: str | None = None

    def __post_init__(self) -> None:
        check_name(self.task)
        counts = (self.rows, self.tokens)
        if not isinstance(self.base_fingerprint, str):
            raise self._damaged(f"base fingerprint {shown(self.base_fingerprint)}")
        if not all(type(count) is int and count > 0 for count in counts) or self.source not in SOURCES:
            raise self._damaged(f"{shown(self.rows)} rows, {shown(self.tokens)} tokens, source {shown(self.source)}")
        if (self.source == "adapter") != (self.adapter is not None):
            raise self._damaged(f"source {self.source}, adapter {shown(self.adapter)}")
        for module, site in self.sites.items():
            if fault := site.fault():
                raise self._damaged(f"{module}: {fault}")

    def _damaged(self, what: str) -> DataError:
        return DataError(f"the moments of task {self.task} are damaged ({what}): run multisbora {self.command} anew")

    @property
    def command(self) -> str:
        """What measures them."""
        return f"measure {'' if self.adapter is None else '--trained '}--tasks {self.task}"

    def without_blocks(self) -> Moments:
        """The same, of which no block is left: what allocation needs, in a small part of the room."""
        empty = np.zeros(0, INTS), np.zeros((0, 0), FLOATS)
        return replace(self, sites={module: Site(s.energy, s.response, *empty) for module, s in self.sites.items()})

    def check_base(self, base_fingerprint: str) -> None:
        """Refuse moments of another base.

        Raises:
            DataError: they are.
        """
        if self.base_fingerprint != base_fingerprint:
            raise DataError(
                f"the moments of task {self.task} were measured on another base model: "
                f"run multisbora {self.command} on this one"
            )

    def block(self, module: str, channels: Sequence[int] | npt.NDArray[Any]) -> Floats:
        """The block of some input channels of one matrix, (r, r) fp32.

        Raises:
            DataError: that matrix or some of its channels were not measured, or are more than `WIDEST`.
        """
        try:
            return self.sites[module].at(channels)
        except KeyError as error:
            if len(channels) > WIDEST:
                raise DataError(
                    f"{module} has {len(channels)} input channels that count, and no more than {WIDEST} are measured "
                    "together: take fa tasks, and leave --method corrected out"
                ) from None
            missing = "the matrix" if module not in self.sites else f"{error.args[0]} of {len(channels)} channels"
            raise DataError(
                f"the moments of task {self.task} lack {missing} in {module}, claimed since they were measured: "
                f"run multisbora {self.command} where its rows are"
            ) from None

    def to_bytes(self) -> bytes:
        """A safetensors file: "<module>.energy", "<module>.response", "<module>.channels", "<module>.block"."""
        tensors = {
            f"{module}.{what}": np.ascontiguousarray(getattr(site, what))
            for module, site in self.sites.items()
            for what in ("energy", "response", "channels", "block")
        }
        head = {
            "format": FORMAT,
            "task": self.task,
            "base_fingerprint": self.base_fingerprint,
            "geometry_digest": self.geometry_digest,
            "rows": self.rows,
            "tokens": self.tokens,
            "source": self.source,
            **({} if self.adapter is None else {"adapter": self.adapter}),
        }
        return safetensors.numpy.save(tensors, {_HEAD: json.dumps(head, sort_keys=True)})

    @classmethod
    def from_bytes(cls, content: bytes | mmap.mmap, where: str, command: str = "measure") -> Moments:
        """What `to_bytes` gave, whoever made it: the bytes are believed in nothing. Copies no block.

        Args:
            where, command: in messages: where they are from, and what measures them anew.

        Raises:
            DataError: they are none; or as the constructor.
        """
        try:
            tensors, head = _parse(content)
            keys = ["task", "base_fingerprint", "geometry_digest", "rows", "tokens", "source"]
            keys += ["adapter"] if "adapter" in head else []
            if head.get("format") != FORMAT or head.keys() != {"format", *keys}:
                raise ValueError(f"its head is not that of format {FORMAT}")
            kinds = (str, str, str, int, int, str, str)
            if [type(head[key]) for key in keys] != list(kinds[: len(keys)]):
                raise ValueError("its head has something else than names and counts")
            sites = {module: Site(*parts) for module, parts in _sites(tensors).items()}
            return cls(**{key: head[key] for key in keys}, sites=sites)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        except (ValueError, UsageError) as error:
            raise DataError(
                f"{where} holds no moments that can be used, {error}: run multisbora {command} anew"
            ) from None


def keep_beside(adapter: Path, moments: Moments) -> None:
    """Put the moments of a task's rows through its adapter into the adapter's folder, in the place of older ones.

    Raises:
        DataError: they cannot be written.
    """
    path = adapter / MOMENTS_FILE
    try:
        write_whole(path, moments.to_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from None


def read_beside(adapter: Path) -> Moments | None:
    """The moments in an adapter's folder, whoever put them there; None where there are none.

    Raises:
        DataError: the file cannot be read, or holds no moments through an adapter.
    """
    path = adapter / MOMENTS_FILE
    try:
        with open_file(path) as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # an empty file has no map
        raise DataError(f"{path} cannot be read ({error}): run multisbora measure --trained anew") from None
    found = Moments.from_bytes(content, str(path), "measure --trained")
    if found.adapter is None:
        raise DataError(f"{path} holds moments of the base model alone: run multisbora measure --trained anew")
    return found


def _parse(content: bytes | mmap.mmap) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Arrays and head of a safetensors file that holds nothing else.

    Raises:
        ValueError: it is another file.
    """
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > min(len(content) - 8, MAX_JSON_BYTES):
        raise ValueError("it ends inside its header")
    header = parse_json(content[8 : 8 + length])
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    text = metadata.get(_HEAD) if isinstance(metadata, dict) else None
    head = parse_json(text.encode()) if isinstance(text, str) else None
    if not isinstance(head, dict):
        raise ValueError(f"its header has no {_HEAD}")
    data = memoryview(content)[8 + length :]
    found = {}
    for name, entry in header.items():
        values = _array(entry, data)
        if values is None:
            raise ValueError(f"{shown(name)} is no tensor of it")
        found[name] = values
    return found, head


def _array(entry: object, data: memoryview) -> npt.NDArray[Any] | None:
    """The array that an entry of a header tells of; None where it tells of none."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return None
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = {"F32": FLOATS, "I32": INTS}.get(kind) if isinstance(kind, str) else None
    counts = [shape, offsets] if isinstance(shape, list) and isinstance(offsets, list) else []
    if dtype is None or not counts or not all(type(n) is int and 0 <= n < _MOST for of in counts for n in of):
        return None
    if len(shape) > 2 or len(offsets) != 2 or not offsets[0] <= offsets[1] <= len(data):
        return None
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        return None
    values: npt.NDArray[Any] = np.frombuffer(data[offsets[0] : offsets[1]], dtype).reshape(shape)
    return values


def _sites(tensors: Mapping[str, npt.NDArray[Any]]) -> dict[str, tuple[npt.NDArray[Any], ...]]:
    """Tensors by module, in the order of a site.

    Raises:
        ValueError: a site has not all of its tensors, or one of another dtype; or a name is none of a module's.
    """
    found: dict[str, dict[str, npt.NDArray[Any]]] = {}
    for name, values in tensors.items():
        module, _, what = name.rpartition(".")
        if what not in _AXES or not is_plain(module, MAX_NAME):
            raise ValueError(f"{shown(name)} belongs to no moments")
        if values.dtype != (INTS if what == "channels" else FLOATS):
            raise ValueError(f"{shown(name)} is of another dtype")
        found.setdefault(module, {})[what] = values
    for module, parts in found.items():
        if parts.keys() != _AXES.keys():
            raise ValueError(f"it lacks some of {shown(module)}")
    return {module: tuple(parts[what] for what in _AXES) for module, parts in sorted(found.items())}


def pack_triangle(block: npt.NDArray[Any]) -> bytes:
    """The upper triangle of a symmetric (n, n), row by row: n (n + 1) / 2 values, "<f4"."""
    return b"".join(np.asarray(row[place:], FLOATS).tobytes() for place, row in enumerate(block))


def unpack_triangle(packed: bytes, size: int) -> Floats:
    """The (size, size) block whose upper triangle `pack_triangle` gave.

    Raises:
        ValueError: the bytes are not of that size.
    """
    flat = np.frombuffer(packed, FLOATS)
    if len(flat) != size * (size + 1) // 2:
        raise ValueError(f"{len(flat)} values are not the triangle of {size} x {size}")
    block = np.zeros((size, size), np.float32)
    start = 0
    for place in range(size):
        row = flat[start : start + size - place]
        block[place, place:] = block[place:, place] = row
        start += len(row)
    return block


def harm(values: npt.NDArray[Any], block: Floats) -> float:
    """trace(B M B') / out: the mean square of what an fa update does to a loss, see above, in squared nats a row.

    Args:
        values: (out, r), with lambda and scaling in them.
        block: (r, r), of the channels of the update.
    """
    return float(((values @ block) * values).sum()) / len(values)
