"""The files of a merged checkpoint: those that the receipt lists, those of the base, and how tensors lie in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..untrusted import read_json
from .tensors import INDEX, SINGLE, UNREADABLE, Weights, one_line, read_head, sha256
from .told import RECEIPT, Told
from .undo import undo_name

_CARD, _ADAPTER = "README.md", "adapter_config.json"
_TEMPLATES = "additional_chat_templates"
# Kinds of files without which a merged checkpoint is another model than its base, or none.
_NEEDED = (".bpe", ".jinja", ".json", ".model", ".py", ".spm", ".tiktoken", ".txt", ".vocab")
# Loaders would take these instead of, or on top of, what was merged.
_STRANGE = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pickle", ".pkl", ".pt", ".pth", ".safetensors")
_JOURNALS = (".multisbora_journal", ".multisbora_journal.partial", ".multisbora_journal.done")


def interrupted(merged: Path) -> list[str]:
    """What an edit that did not end has left behind."""
    return [
        f"an edit of {merged} was interrupted, or is going on: {name} is in it; add, remove or reweight finish it"
        for name in _JOURNALS
        if (merged / name).exists()
    ]


def listed_files(merged: Path, told: Told) -> Iterator[str]:
    """What of a merged checkpoint's files is not as its receipt says: names, sizes and digests."""
    present = _visible(merged)
    listed = told.files.keys() | told.weights.keys()
    for name in sorted(listed - present):
        yield f"{name} is in the receipt but not in {merged}"
    beside = {RECEIPT, *told.kept_files.values(), *(undo_name(owner) for owner in told.undo_files)}
    for name in sorted(present - listed - beside):
        yield f"{name} is in {merged} but not in the receipt"
    for name in sorted(told.files):
        if name in told.weights or name.lower().endswith(_STRANGE) or name == _ADAPTER:
            yield f"{name} brings weights of its own, and is in the receipt among the other files"
    for name in sorted(listed & present):
        path = merged / name
        size, digest = told.weights.get(name) or told.files[name]
        try:
            if path.stat().st_size != size:
                yield f"{name} has {path.stat().st_size} bytes, the receipt says {size}"
            elif name in told.weights and hashlib.sha256(read_head(path)).hexdigest() != digest:
                yield f"{name} has another header than was merged: its sha256 differs from the receipt's"
            elif name in told.files and sha256(path) != digest:
                yield f"{name} is not the file that was merged: its sha256 differs from the receipt's"
        except (OSError, ValueError) as error:
            yield f"{name} cannot be read: {one_line(error)}"


def other_weights(after: Weights, told: Told) -> Iterator[str]:
    """What the receipt calls a file of weights and is none, or the other way round: of such a file it tells the digest
    of a header alone."""
    for name in sorted(told.weights.keys() - after.files.keys()):
        yield f"the receipt lists other files of weights than there are: {name} is none"
    for name in sorted(after.files.keys() - told.weights.keys()):
        yield f"the receipt lists other files of weights than there are: {name} is one"


def base_files(merged: Path, base: Path, told: Told) -> Iterator[str]:
    """What of a merged checkpoint's files is not the base's, byte for byte, though it must be."""
    made = {_CARD} if told.max_shard_size is None else {_CARD, INDEX}
    present = _visible(merged)
    for name in sorted(told.files.keys() & present - made):
        if not (base / name).is_file() or sha256(base / name) != sha256(merged / name):
            yield f"{name} is not the base's, byte for byte"
    for path in sorted((*base.iterdir(), *base.glob(f"{_TEMPLATES}/*.jinja"))):
        name = path.relative_to(base).as_posix()
        index = name.endswith(".index.json")  # the weights say which of them is used
        skip = name in present or name in (_CARD, RECEIPT, _ADAPTER) or name.startswith(".") or index
        if path.is_file() and path.suffix in _NEEDED and not skip:
            yield f"{name} of the base is missing in {merged}"


def layout(before: Weights, after: Weights) -> Iterator[str]:
    """What is not as in the base where tensors must lie as they do there, to the byte."""
    if before.files.keys() != after.files.keys():
        yield f"the weights are in {', '.join(after.files)}; those of the base in {', '.join(before.files)}"
    for name in sorted(before.files.keys() & after.files.keys()):
        one, two = before.files[name], after.files[name]
        if one.metadata != two.metadata:
            yield f"{name} has the metadata {str(two.metadata)[:200]}, that of the base {str(one.metadata)[:200]}"
        elif one.head != two.head:
            yield f"{name} has another header than the base's: other tensors, or in another order"


def own_layout(merged: Path, after: Weights, limit: int) -> Iterator[str]:
    """What is not as it must be where tensors were laid out anew in files of at most `limit` bytes of tensors."""
    count = len(after.files)
    numbered = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if sorted(after.files) != (numbered if count > 1 else [SINGLE]):
        yield f"the weights are in {', '.join(sorted(after.files))}, which is not how {count} files are called"
    if count == 1 and (merged / INDEX).exists():
        yield f"{INDEX} is in {merged}, where {SINGLE} has all tensors"
    for name, file in after.files.items():
        size = sum(stored.nbytes for stored in file.tensors.values())
        if size > limit and len(file.tensors) > 1:
            yield f"{name} holds {size} bytes of tensors, above the {limit} that the receipt says"
    if count > 1:
        size = sum(stored.nbytes for stored in after.tensors.values())
        total = _index(merged).get("metadata", {}).get("total_size")
        if total != size:
            yield f"{INDEX} has total_size {str(total)[:40]}, the tensors have {size} bytes"


def carried_metadata(before: Weights, after: Weights, base: Path, merged: Path) -> Iterator[str]:
    """What of the base's metadata is not in files that were laid out anew."""
    expected: dict[str, str] = {}
    for name in sorted(before.files):
        expected |= before.files[name].metadata or {}
    for name, file in after.files.items():
        if (file.metadata or {}) != expected:
            yield f"{name} has the metadata {str(file.metadata)[:200]}, those of the base {str(expected)[:200]}"
    if len(after.files) > 1:
        one, two = ({**_index(folder).get("metadata", {}), "total_size": 0} for folder in (base, merged))
        if one != two:
            yield f"{INDEX} has other metadata than the base's"


def _index(folder: Path) -> dict[str, Any]:
    try:
        content = read_json(folder / INDEX)
        return {"metadata": dict(content.get("metadata") or {})}
    except UNREADABLE:
        return {}


def _visible(folder: Path) -> set[str]:
    """What lies in a folder and in those in it, by its path; without what is hidden. Links to folders are not followed
    but named: a loader would follow them."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts)}
