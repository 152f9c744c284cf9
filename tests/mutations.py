"""What can be wrong with a merged checkpoint, and what the two proofs say of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

import torch
from damaged import DOWN, INDEX, OWN, RECEIPT, SHARD, UP, Case, Q
from safetensors.torch import load_file, save_file

Mutation = Callable[[Case], object]
OTHER = SHARD.replace("00001-of", "00002-of")
WEIGHT, NORM = f"{Q}.weight", "model.layers.0.input_layernorm.weight"
UNDO = "multisbora_undo/{}.safetensors"
REGION = ("tasks", "math", "regions", Q)


def bit(name: str, *place: int, number: int = 0) -> Mutation:
    def mutate(case: Case) -> None:
        tensors = case.tensors()
        tensors[name].view(torch.int16)[place] ^= 1 << number if number < 15 else -(1 << 15)
        case.save(tensors)

    return mutate


def tensor(name: str, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Mutation:
    """Replace a tensor by change(merged, base), and make the file's header fit."""

    def mutate(case: Case) -> None:
        tensors = case.tensors()
        tensors[name] = change(tensors[name], load_file(case.base / SHARD)[name]).contiguous()
        case.save(tensors)
        case.rehash()

    return mutate


def swapped_columns(merged: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    swapped = merged.clone()
    swapped[:, [1, 4]] = merged[:, [4, 1]]
    return swapped


def lambda_twice(merged: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    doubled = merged.clone()
    doubled[:, 1] = (base[:, 1].float() + 2 * (merged[:, 1].float() - base[:, 1].float())).to(base.dtype)
    return doubled


def swapped_tensors(case: Case) -> None:
    """Of one shape; the one is no task's at all."""
    tensors = case.tensors()
    gate = UP.replace("up_proj", "gate_proj")
    tensors[UP], tensors[gate] = tensors[gate], tensors[UP]
    case.save(tensors)


def rounded_twice(case: Case) -> None:
    """The update rounded to bf16 before it is added: what adding up in the model's dtype would do."""
    values = load_file(case.adapters[0] / "adapter_model.safetensors")[f"base_model.model.{Q}.sbora_values"]
    tensors, base = case.tensors(), load_file(case.base / SHARD)[WEIGHT]
    tensors[WEIGHT][:, OWN["math"]] = base[:, OWN["math"]] + (values * (0.5 * 8 / 3)).to(torch.bfloat16)
    case.save(tensors)


def task_left_out(case: Case) -> None:
    """chat is in the receipt, and not in the weights."""
    for shard in (SHARD, OTHER):
        merged, base = load_file(case.merged / shard), load_file(case.base / shard)
        for name in merged:
            if name.endswith(("q_proj.weight", "down_proj.weight")):
                others = [i for i in range(merged[name].shape[1]) if i not in OWN["math"]]
                for row in OWN["chat"]:
                    merged[name][row, others] = base[name][row, others]
        save_file(merged, case.merged / shard, metadata={"format": "pt"})


def renamed(case: Case) -> None:
    tensors = case.tensors()
    tensors[f"{Q}.weights"] = tensors.pop(WEIGHT)
    case.save(tensors)
    case.reindex()
    case.rehash()


def added(case: Case) -> None:
    case.save({**case.tensors(), "model.extra.weight": torch.zeros(3)})
    case.reindex()
    case.rehash()


def moved(case: Case) -> None:
    tensors = case.tensors()
    save_file(
        load_file(case.merged / OTHER) | {WEIGHT: tensors.pop(WEIGHT)}, case.merged / OTHER, metadata={"format": "pt"}
    )
    case.save(tensors)
    case.reindex()
    case.rehash()


def pointed_elsewhere(case: Case) -> None:
    index = json.loads((case.merged / INDEX).read_text())
    index["weight_map"][WEIGHT] = OTHER
    (case.merged / INDEX).write_text(json.dumps(index, indent=2))
    case.rehash()


def file(name: str, content: bytes | None, rehash: bool = False) -> Mutation:
    def mutate(case: Case) -> None:
        (case.merged / name).unlink(missing_ok=True)
        if content is not None:
            (case.merged / name).parent.mkdir(exist_ok=True)
            (case.merged / name).write_bytes(content)
        if rehash:
            case.rehash()

    return mutate


def told(*keys: Any, value: Any) -> Mutation:
    def change(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return lambda case: case.receipt(change)


def told_gone(*keys: Any) -> Mutation:
    def change(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return lambda case: case.receipt(change)


def told_lambda(case: Case) -> None:
    """The weight and what follows from it."""

    def change(content: dict[str, Any]) -> None:
        content["tasks"]["math"]["weight"] = 0.6
        for region in content["tasks"]["math"]["regions"].values():
            region["weight"] = 0.6

    case.receipt(change)


def cut(case: Case) -> None:
    os.truncate(case.merged / SHARD, (case.merged / SHARD).stat().st_size - 2)


def cut_and_rehashed(case: Case) -> None:
    cut(case)
    case.rehash()


def undo_file(task: str, change: Callable[[dict[str, torch.Tensor]], object], owner: str | None = None) -> Mutation:
    def mutate(case: Case) -> None:
        path = case.merged / UNDO.format(task)
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt", "multisbora": "undo", "task": owner or task})

    return mutate


def undo_bit(tensors: dict[str, torch.Tensor]) -> None:
    tensors[WEIGHT].view(torch.int16)[1, 3] ^= 1


def undos_swapped(case: Case) -> None:
    one, two = (case.merged / UNDO.format(task) for task in ("math", "chat"))
    kept = one.read_bytes()
    two.replace(one)
    two.write_bytes(kept)


def hidden_as_weights(case: Case) -> None:
    """A file of the base's is another one here, and the receipt calls it weights, of which it tells a header alone."""
    (case.base / "spiece.model").write_bytes(b"\n" + bytes(7) + b"x" * 50)
    data = b"\n" + bytes(7) + b"y" * 50
    (case.merged / "spiece.model").write_bytes(data)
    entry = {"size": len(data), "header": hashlib.sha256(data[:18]).hexdigest()}
    case.receipt(lambda content: content["weights"].update({"spiece.model": entry}))


def taken_over(name: str) -> Mutation:
    """A file of the base that no merge carries over, since loaders would take it for the model or for a part of it."""

    def mutate(case: Case) -> None:
        for folder in (case.base, case.merged):
            (folder / name).write_bytes(b"{}")
        case.receipt(lambda content: content["files"].update({name: {}}))
        case.rehash()

    return mutate


def linked_templates(case: Case) -> None:
    """A folder that a loader looks into, in place of the one that was merged."""
    folder = case.merged / "additional_chat_templates"
    folder.rename(case.merged.parent / "elsewhere")
    (case.merged.parent / "elsewhere" / "evil.jinja").write_text("{{ evil }}")
    folder.symlink_to(case.merged.parent / "elsewhere")
    (case.base / "additional_chat_templates" / "tools.jinja").unlink()
    case.receipt(lambda content: content["files"].pop("additional_chat_templates/tools.jinja"))


def other_metadata(case: Case) -> None:
    case.save(case.tensors(), {"format": "np"})


def other_config(case: Case) -> None:
    text = (case.merged / "config.json").read_text()
    (case.merged / "config.json").write_text(text.replace('"bfloat16"', '"float16"'))


def no_template(case: Case) -> None:
    (case.merged / "additional_chat_templates" / "tools.jinja").unlink()


# What is done: what the full proof says of it, and what the quick one says; None where the quick one cannot know.
MUTATIONS: dict[str, tuple[Mutation, str, str | None]] = {
    "a bit outside": (
        bit(WEIGHT, 9, 8),
        f"^{WEIGHT}: 1 wrong cells, first at row 9, column 8, which no task owns: exp",
        f"^{WEIGHT}: .*cells that no task owns differ",
    ),
    "the sign outside": (bit(WEIGHT, 0, 0, number=15), "row 0, column 0, which no task owns", "no task owns differ"),
    "a bit of a norm": (
        bit(NORM, 7),
        f"^{NORM}: 1 wrong cells, first at index \\[7\\], which no task owns",
        f"^{NORM}: .*no task owns differ",
    ),
    "a bit of the embedding": (
        bit("model.embed_tokens.weight", 258, 31),
        "^model.embed_tokens.weight: 1 wrong cells, first at row 258, column 31",
        "^model.embed_tokens.weight: .*no task owns differ",
    ),
    "minus zero for zero": (
        bit(UP, 0, 0, number=15),
        f"^{UP}: 1 wrong cells, first at row 0, column 0, .*: expected 0.0, found -0.0$",
        f"^{UP}: .*no task owns differ",
    ),
    "a bit of a NaN": (
        bit(UP, 0, 1),
        r"row 0, column 1, .*: expected nan \(bits 0x7fc0\), found nan \(bits 0x7fc1\)$",
        f"^{UP}: .*no task owns differ",
    ),
    "a bit of fa": (
        bit(WEIGHT, 9, 4),
        f"^{WEIGHT}: 1 wrong cells, first at row 9, column 4, owned by math: expected",
        f"^{WEIGHT}: the cells owned by math are not those that were merged$",
    ),
    "a bit of fb": (
        bit(WEIGHT, 2, 5),
        f"^{WEIGHT}: 1 wrong cells, first at row 2, column 5, owned by chat: expected",
        f"^{WEIGHT}: the cells owned by chat are not those that were merged$",
    ),
    "a bit where fa crosses fb": (bit(WEIGHT, 2, 4), "row 2, column 4, owned by math", "owned by math"),
    "swapped columns": (tensor(WEIGHT, swapped_columns), "row 0, column 1, owned by math", "owned by math"),
    "lambda twice": (tensor(WEIGHT, lambda_twice), "column 1, owned by math", "owned by math"),
    "rounded twice": (rounded_twice, f"^{WEIGHT}: .* owned by math", "owned by math"),
    "one matrix left out": (tensor(WEIGHT, lambda merged, base: base), "owned by math", "owned by"),
    "one task left out": (task_left_out, f"^{DOWN}.weight: .*first at row 2, column 0, owned by chat", "owned by chat"),
    "transposed": (tensor(WEIGHT, lambda merged, base: merged.T), f"^{WEIGHT}: .*wrong cells", "owned by"),
    "swapped tensors": (
        swapped_tensors,
        "gate_proj.weight: .* first at row 0, column 0, which no",
        "gate_proj.*differ",
    ),
    "another dtype": (
        tensor(WEIGHT, lambda merged, base: merged.half()),
        f"^{WEIGHT} is .*'F16', .*in the base .*'BF16'",
        f"^{WEIGHT}: the cells owned by chat are not those that were merged",
    ),
    "another shape": (
        tensor(WEIGHT, lambda merged, base: merged.reshape(16, 64)),
        r"\[16, 64\]",
        "owns BF16|the cells owned by",
    ),
    "all NaN": (tensor(NORM, lambda merged, base: merged * torch.nan), "32 wrong cells.*found nan", "owns differ"),
    "a renamed tensor": (renamed, f"^{WEIGHT} of the base is missing in", f"^{WEIGHT} is in the receipt but not in"),
    "an extra tensor": (added, "^model.extra.weight is in .* but not in the base", "but not in the receipt"),
    "a moved tensor": (moved, "has another header than the base's", None),
    "an index that points elsewhere": (
        pointed_elsewhere,
        f"^{INDEX} is not the base's",
        f"does not say where the tensors are: {WEIGHT} is in {SHARD}",
    ),
    "metadata": (other_metadata, f"^{SHARD} has the metadata", f"^{SHARD} has another header than was merged"),
    "a missing shard": (file(SHARD, None), f"^{SHARD} is in the receipt but not in", "is in the receipt but not in"),
    "a missing index": (file(INDEX, None), f"^{INDEX} is in the receipt but not in", "is in the receipt but not in"),
    "a truncated shard": (cut, f"^{SHARD} has .* bytes, the receipt says", f"^{SHARD} has .* bytes"),
    "one whose size was forged": (cut_and_rehashed, "no readable weights", "no readable weights"),
    "a shard of zeros": (file(SHARD, bytes(1000), rehash=True), "no readable weights", "no readable weights"),
    "an index of nonsense": (file(INDEX, b"[1"), f"^{INDEX} has 2 bytes", f"^{INDEX} has 2 bytes"),
    "another tokenizer": (file("tokenizer.json", b"{}"), "^tokenizer.json has 2 bytes", "^tokenizer.json has 2 bytes"),
    "another one, forged": (
        file("tokenizer.json", b"{}", rehash=True),
        "^tokenizer.json is not the base's, byte for byte",
        None,
    ),
    "no tokenizer": (file("tokenizer.json", None), "^tokenizer.json is in the receipt but not in", "but not in"),
    "none, forged": (file("tokenizer.json", None, rehash=True), "^tokenizer.json of the base is missing", None),
    "no template": (no_template, "^additional_chat_templates/tools.jinja is in the receipt but", "tools.jinja"),
    "dtype in the config": (other_config, "^config.json has ", "^config.json has "),
    "no config": (file("config.json", None), "^config.json is in the receipt but not in", "config.json is in"),
    "an extra file": (file("extra.json", b"{}"), "^extra.json is in .* but not in the receipt", "^extra.json"),
    "one in a folder": (file("more/extra.json", b"{}"), "^more/extra.json is in .* but not in", "^more/extra.json"),
    "an extra shard": (file("stray.safetensors", b""), "^stray.safetensors is in .* but not in", "^stray.safe"),
    "a file hidden as weights": (
        hidden_as_weights,
        "^the receipt lists other files of weights than there are: spiece.model is none",
        "^the receipt lists other files of weights than there are: spiece.model is none",
    ),
    "an adapter of the base's": (
        taken_over("adapter_config.json"),
        "^adapter_config.json brings weights of its own",
        "^adapter_config.json brings weights of its own",
    ),
    "other weights of the base's": (
        taken_over("consolidated.safetensors"),
        "^consolidated.safetensors brings weights of its own",
        "^consolidated.safetensors brings weights of its own",
    ),
    "a linked folder": (
        linked_templates,
        "^additional_chat_templates is in .* but not in the receipt",
        "^additional_chat_templates is in .* but not in the receipt",
    ),
    "an edited card": (file("README.md", b"bought"), "^README.md has 6 bytes, the receipt says", "^README.md has 6"),
    "an edit cut short": (
        file(".multisbora_journal/entry", b"x"),
        "^an edit of .* was interrupted, or is going on: .multisbora_journal is in it",
        "^an edit of .* was interrupted",
    ),
    "an edited undo cell": (
        undo_file("chat", undo_bit),
        rf"^multisbora_undo/chat.safetensors: {Q}.weight: 1 wrong cells, first at row 7, column 5: expected",
        rf"^multisbora_undo/chat.safetensors: {Q}.weight: its cells are not those that were kept",
    ),
    "no undo file": (file(UNDO.format("chat"), None), "^multisbora_undo/chat.safetensors is missing", "chat.safet"),
    "one of a stranger": (file(UNDO.format("x"), b"x"), "^multisbora_undo/x.safetensors is in", "undo/x.safetensors"),
    "swapped undo files": (
        undos_swapped,
        "^multisbora_undo/chat.safetensors says of itself .*'task': 'math'",
        "^multisbora_undo/chat.safetensors says of itself .*'task': 'math'",
    ),
    "an undo tensor too many": (
        undo_file("math", lambda tensors: tensors.update(x=torch.zeros(2, 2))),
        "^multisbora_undo/math.safetensors has x, of which math owns no cell",
        "^multisbora_undo/math.safetensors has x",
    ),
    "an undo tensor too few": (
        undo_file("math", lambda tensors: tensors.pop(WEIGHT)),
        f"^multisbora_undo/math.safetensors has nothing of {WEIGHT}, where math owns BF16 ",
        f"has nothing of {WEIGHT}",
    ),
    "an undo tensor of another dtype": (
        undo_file("math", lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].half()})),
        f"^multisbora_undo/math.safetensors has F16 .* of {WEIGHT}, where math owns BF16 ",
        "has F16",
    ),
    "no receipt": (file(RECEIPT, None), f"{RECEIPT} is missing or damaged", "missing or damaged"),
    "a receipt of nonsense": (file(RECEIPT, b"{"), f"{RECEIPT} is missing or damaged", "missing or damaged"),
    "a receipt of lists": (file(RECEIPT, b'{"tasks": [1]}'), "missing or damaged", "missing or damaged"),
    "a receipt of another format": (told("format", value=1), "has format '1', not 2: merge again", "has format '1'"),
    "told too little": (told_gone("scores"), "'scores' is missing", "'scores' is missing"),
    "told too much": (told("more", value=1), "'more' is no part of a receipt", "'more' is no part"),
    "told too much of a region": (told(*REGION, "more", value=1), "'more' is no part", "'more' is no part"),
    "told a name of two lines": (
        told("tensors", "a\n\x1b[31m", value="0" * 64),
        r"digests of other tensors than the base has: a\\n\\x1b\[31m",
        r"^'a\\n\\x1b\[31m is in the receipt but not in",
    ),
    "told weight": (told("tasks", "math", "weight", value=0.6), "owned by math", "has the lambda 0.5 in .* is 0.6"),
    "told weight of a region": (
        told(*REGION, "weight", value=0.6),
        f"^math: the receipt has the lambda 0.6 in {Q}, where the task's weight is 0.5",
        f"^math: the receipt has the lambda 0.6 in {Q}",
    ),
    "told weight and regions": (told_lambda, f"^{DOWN}.weight: .* owned by math", None),
    "told weight of nonsense": (told("tasks", "math", "weight", value="1"), "missing or damaged", "or damaged"),
    "told weight beyond floats": (told("tasks", "math", "weight", value=10**400), "missing or damaged", "or damaged"),
    "told patterns without end": (
        told("tasks", "math", "weight", value={"default": 0.5, **{f"a{number}|b": 1 for number in range(5000)}}),
        "a weight has 5001 patterns",
        "a weight has 5001 patterns",
    ),
    "told pattern of no default": (told("tasks", "math", "weight", value={"q": 1}), "or damaged", "or damaged"),
    "told zero weight": (told("tasks", "chat", "weight", value=0), "owned by chat", "other changed|has the lambda"),
    "told indices": (
        told(*REGION, "indices", value=[1, 4, 31]),
        f"^math: the receipt has another region or scaling in {Q}",
        f"^math: {WEIGHT}: row 2, column 31 is owned by another task too",
    ),
    "told indices outside": (told(*REGION, "indices", value=[1, 4, 32]), "another region", "outside of the matrix"),
    "told indices that meet": (
        told("tasks", "chat", "regions", Q, "excluded", value=[1, 4]),
        "^chat: the receipt has another region",
        "owns BF16|row 2, column 30 is owned by another task too",
    ),
    "told excluded": (told(*REGION, "excluded", value=[1]), "another region or scaling", "owned by math are not"),
    "told scaling": (told(*REGION, "scaling", value=1.0), "another region or scaling", None),
    "told variant": (
        told("tasks", "math", "variant", value="fb"),
        "^math: the receipt has another variant",
        "owned by math are",
    ),
    "told digest": (
        told(*REGION, "digest", value="0" * 64),
        f"^math: .*another digest of its cells in {WEIGHT}",
        "math",
    ),
    "told undo digest": (
        told(*REGION, "undo_digest", value="0" * 64),
        f"^math: the receipt has another digest of its undone cells in {WEIGHT}",
        "its cells are not those that were kept",
    ),
    "told tensor": (
        told("tensors", NORM, value="0" * 64),
        f"^{NORM}: the base's bytes do not have the digest that the receipt tells",
        f"^{NORM}: .*no task owns differ",
    ),
    "told tensor gone": (
        told_gone("tensors", NORM),
        f"digests of other tensors .*{NORM}",
        f"^{NORM} is in .* but not in",
    ),
    "told adapter": (told("tasks", "math", "adapter_digest", value="0" * 64), "another adapter digest", None),
    "told digest of an adapter that is none": (
        told("tasks", "math", "adapter_digest", value="0" * 63),
        "is no digest of an adapter",
        "is no digest of an adapter",
    ),
    "told claims": (told("tasks", "chat", "claim_digest", value=None), "^chat: .* another claim digest", None),
    "told composition": (told("tasks", "chat", "composition", value="x"), "^chat: .* another composition", None),
    "told base": (
        told("base", "fingerprint", value="0" * 64),
        "another base fingerprint",
        "checked = True, but its tasks name another base|another base fingerprint",
    ),
    "told base of a task": (
        told("tasks", "chat", "base_fingerprint", value=None),
        "^chat: the receipt has another base fingerprint",
        "checked = True, but its tasks name another base, or none",
    ),
    "told checked": (
        told("base", "checked", value=False),
        "has checked = False, but its tasks name its base",
        "checked",
    ),
    "told view": (told("base", "view", value="dequantized"), "does not fit its quantisation", "does not fit"),
    "told hash": (
        told("files", "tokenizer.json", "sha256", value="0" * 64),
        "^tokenizer.json is not the file that was merged",
        "^tokenizer.json is not the file that was merged",
    ),
    "told header": (told("weights", SHARD, "header", value="0" * 64), f"^{SHARD} has another header than was", SHARD),
    "told file of weights gone": (
        told_gone("weights", SHARD),
        f"^{SHARD} is in .* but not in the rec",
        "lists other files",
    ),
    "told files": (told_gone("files", "config.json"), "^config.json is in .* but not in the receipt", "config.json"),
    "told region gone": (told_gone(*REGION), "^math: the receipt has another set of modules", "of which math owns no"),
    "told task gone": (
        told_gone("tasks", "math"),
        "has the tasks chat; the adapters given are",
        "no task owns|but not in",
    ),
    "told task of a bad name": (told("tasks", "../x", value={}), "missing or damaged", "missing or damaged"),
    "told cells": (
        told("tasks", "math", "cells", value=1),
        r"^math: the receipt says cells owned, changed = \(1, ",
        r"^math: the receipt says cells owned, changed = \(1, ",
    ),
    "told changed cells": (
        told("tasks", "math", "cells_changed", value=1),
        r"^math: .*, 1\), counted",
        r"^math: .*, 1\)",
    ),
    "told total": (told("cells_changed", value=1), "says 1 cells changed in all", "says 1 cells changed in all"),
    "told owned": (told("cells_owned", value=1), "says 1 cells owned in all", "says 1 cells owned in all"),
    "told tensors changed": (told("tensors_changed", value=[]), "lists other changed tensors", "lists other changed"),
    "told shards": (told("max_shard_size", value=100), f"^{SHARD} holds .* above the 100 that", f"^{SHARD} holds"),
    "told whole": (
        told("whole", value={NORM: dict(how="keep", weights={}, cells_changed=0, digest="", undo_digest="")}),
        "^the receipt has other tensors that were trained whole than none",
        "the cells trained whole by",
    ),
}
