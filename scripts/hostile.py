"""What an attacker would make of valid files: mutations of bytes, JSON, safetensors headers, and the file itself.

`stress_files.py` and tests/test_hostile.py draw from here. Each mutation takes a file that is valid, and leaves in its
place something that may not be.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mutation = Callable[[Path, random.Random], None]


class Raw(str):
    """A piece of JSON text as it is to be written, whether it is JSON or not."""


# An object is a list of pairs in a tuple, so that a name can stand in it twice.
Node = Any
MEGABYTE = 1 << 20
LENGTHS = (0, 1, 7, 8, 2**16, 2**31, 2**32 + 1, 10**8, 10**8 + 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 8)
SIZES = (0, 1, 2, 3, 7, 2**31, 2**32, 2**40, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**19, -1, -(2**63))
HUGE = Raw("9" * 400)
TEXTS = (
    *(
        "",
        " ",
        "a",
        "..",
        ".",
        "/",
        "a/b",
        "../../x",
        "/etc/passwd",
        "a\0b",
        "a\nb",
        "a\x1b[31mb",
        "\u202egnp.exe",
        "\x7f",
    ),
    *(
        "\ud800",
        "\udfff\ud800",
        "\U0001f980",
        "e\u0301",
        "__metadata__",
        "fa",
        "fb",
        "F32",
        "BF16",
        "I32",
        "F4",
        "nf4",
        "SBORA",
    ),
    *(
        "model.layers." + "9" * 4400 + ".x.weight",
        "x" * 300,
        "x" * 5000,
        "(a+)+$",
        "((a*)*)*b",
        "(",
        "[",
        "%s",
        "{0}",
        "\\",
    ),
)
PATTERNS = (
    *(
        "(a+)+$",
        r"((\w+)+)+!",
        r"(.*)*!",
        r"(\w|\w)*!",
        "(a|a)" * 40 + "!",
        ".*" * 40 + "!",
        r"(?:(?:\w{0,900}){900})!",
    ),
    *(
        "(" * 500 + ")" * 500,
        "(?=(a+)+$)a",
        r"(\w+)\1+!",
        "a{1000000}",
        "[z-a]",
        "[[a]",
        "(?P<n>a)",
        "*",
        "\\",
        "x" * 100_000,
    ),
)
SCALARS = (
    *(Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e400"), Raw("-1e400"), HUGE, Raw("1" * 5000), Raw("1E-400")),
    *(None, True, False, 0, 1, -1, 0.5, 1.0, 1e308, 2**31, 2**63, 2**64 - 1, Raw("01"), Raw("'x'"), Raw("{"), Raw("")),
    *(Raw('"\\ud800"'), Raw('"\\u0000"'), Raw('"\x01"'), Raw('"\\x"'), Raw("[" * 900 + "]" * 900), Raw("[" * 10_000)),
    *(
        Raw("[" * 10_000 + "]" * 10_000),
        Raw('{"a":' * 10_000 + "1" + "}" * 10_000),
        [],
        [[]],
        (),
        [None],
        [True, False],
    ),
    *(
        [0],
        [1.0],
        [-1],
        [2**64],
        ["1"],
        [2, 1],
        [1, 1],
        [0, 1, 2, 3],
        [5] * 1000,
        ["x" * 300] * 100,
        (("a", 1), ("a", 1)),
    ),
)


def text(node: Node) -> str:
    """JSON text of a node; wrong where a part of it is."""
    if isinstance(node, Raw):
        return str(node)
    if isinstance(node, tuple):
        return "{" + ",".join(f"{text(name)}:{text(value)}" for name, value in node) + "}"
    if isinstance(node, list):
        return "[" + ",".join(text(item) for item in node) + "]"
    return json.dumps(node)


def parsed(raw: bytes) -> Node:
    return json.loads(raw, object_pairs_hook=tuple)


def mutate_json(node: Node, chance: random.Random) -> Node:
    """A node with one part of it, wherever it lies, changed."""
    if isinstance(node, tuple | list) and node and chance.random() < 0.8:
        place = chance.randrange(len(node))
        items = list(node)
        if isinstance(node, list):
            items[place] = mutate_json(items[place], chance)
            return items
        name, value = items[place]
        items[place] = (name, mutate_json(value, chance))
        return tuple(items)
    return _changed(node, chance)


def _changed(node: Node, chance: random.Random) -> Node:
    kind = chance.randrange(6)
    if isinstance(node, tuple) and node and kind < 4:
        place = chance.randrange(len(node))
        name, value = node[place]
        if kind == 0:
            return node[:place] + node[place + 1 :]
        if kind == 1:
            return (*node, (name, _hostile(value, chance)))  # twice
        if kind == 2:
            return (*node[:place], (_name(chance), value), *node[place + 1 :])
        return (*node, (_name(chance), _hostile(value, chance)))
    if isinstance(node, list) and node and kind < 3:
        place = chance.randrange(len(node))
        return (node[:place] + node[place + 1 :], node[::-1], [*node, *node])[kind]
    return _hostile(node, chance)


def _name(chance: random.Random) -> str | Raw:
    if chance.random() < 0.01:
        return "n" * MEGABYTE
    return chance.choice([*TEXTS, *PATTERNS, Raw('"\\ud800"'), Raw("1"), Raw("null")])


def _hostile(node: Node, chance: random.Random) -> Node:
    kind = chance.randrange(4)
    if kind == 0 and type(node) is int:
        return chance.choice([*SIZES, node + 1, node - 1, 2 * node, -node, node + 4, float(node), str(node), HUGE])
    if kind == 1 and isinstance(node, str):
        return chance.choice([node.upper(), node + "x", node[:-1], node * 2, *TEXTS])
    if kind == 2 and isinstance(node, tuple):
        return tuple((_name(chance), _scalar(chance)) for _ in range(chance.choice([1, 3, 1000])))
    return _scalar(chance)


def _scalar(chance: random.Random) -> Node:
    return chance.choice([*SCALARS, *TEXTS, *SIZES])


def flipped(raw: bytes, chance: random.Random) -> bytes:
    """Bytes with a few changed, cut, doubled, dropped or put in, or another size at the end."""
    data = bytearray(raw)
    for _ in range(chance.choice([1, 1, 2, 4, 16])):
        place = chance.randrange(len(data)) if data else 0
        kind = chance.randrange(8)
        if kind < 3 and data:
            data[place] ^= 1 << chance.randrange(8)
        elif kind == 3 and data:
            data[place] = chance.choice(b'\0\xff\n"{}[],:0-9e\\')
        elif kind == 4:
            del data[place:]
        elif kind == 5:
            data += bytes(chance.choice([1, 4, 8, 4096]))
        elif kind == 6:
            data[place:place] = data[place : place + chance.choice([1, 8, 64])]
        else:
            del data[place : place + chance.choice([1, 4, 64])]
    return bytes(data)


def header_of(raw: bytes) -> tuple[bytes, bytes]:
    """The header and the data of a valid safetensors file."""
    length = int.from_bytes(raw[:8], "little")
    return raw[8 : 8 + length], raw[8 + length :]


def with_header(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def tensors_file(chance: random.Random) -> bytes:
    """A small safetensors file made up as a whole: most are wrong in shape, size, order or overlap; some are valid."""
    entries: list[tuple[Node, Node]] = []
    position = 0
    for number in range(chance.randint(0, 4)):
        size = chance.choice([0, 1, 2, 4, 8, 12])
        start = position + chance.choice([0, 0, 0, 0, 1, -1, 4, 2**62])
        ends = [start + 4 * size] * 6 + [start, start - 1, 2**63, 2**64 - 1]
        shapes = [[size]] * 5 + [
            [size, 1],
            [1] * 40,
            [1] * 1000,
            [0, 2**40, 2**40],
            [2**40, 2**40],
            [size, 0],
            [],
            [2**32] * 64,
        ]
        dtype = chance.choice(["F32", "F32", "F32", "I32", "U32", "F4", "F8_E8M0", "C64", "F31", "f32"])
        offsets = [start, chance.choice(ends)]
        entries.append((f"t{number}", (("dtype", dtype), ("shape", chance.choice(shapes)), ("data_offsets", offsets))))
        position = offsets[1]
    if chance.random() < 0.3:
        entries.append(
            (
                "__metadata__",
                chance.choice([(("a", "b"),), (("a", 1),), (), None, "x", (("a", "\ud800"),), [["a", "b"]]]),
            )
        )
    chance.shuffle(entries)
    spaces = chance.choice(["", "", " ", "   ", "\0"])
    return with_header(
        (chance.choice(["", "", "", " "]) + text(tuple(entries)) + spaces).encode("utf-8", "surrogatepass"),
        bytes(max(0, min(position, 4096))),
    )


def large_header(chance: random.Random) -> bytes:
    """A header that is large, or long to parse: many tensors, many values, long names, deep nests."""
    count = chance.choice([100_000, 250_000])
    kinds: list[Callable[[], bytes]] = [
        lambda: "{{{}}}".format(",".join(_empty_tensor(n) for n in range(100_000))).encode(),
        lambda: b'{"a":' + b"[" * count,
        lambda: b'{"a":[' + b"[]," * (8 * count) + b"[]]}",
        lambda: b'{"a":[' + b'{"":0},' * (8 * count) + b"0]}",
        lambda: b'{"a":[' + b"0," * (24 * count) + b"0]}",
        lambda: b'{"' + b"n" * (20 * MEGABYTE) + b'":1}',
        lambda: ('{"__metadata__":{"a":"' + "\U0001f980" + "x" * (31 * MEGABYTE) + '"}}').encode(),
        lambda: text((("a", (("dtype", "F32"), ("shape", [2**62] * count), ("data_offsets", [0, 0]))),)).encode(),
        lambda: b'{"a":' + b"9" * (8 * MEGABYTE) + b"}",
        lambda: b'{"a":"' + b"\\u0041" * MEGABYTE + b'"}',
        lambda: b" " * (30 * MEGABYTE),
        lambda: b"{" + b" " * (30 * MEGABYTE) + b"}",
    ]
    return with_header(chance.choice(kinds)(), b"")


def _empty_tensor(number: int) -> str:
    return f'"layers.{number}.weight":{{"dtype":"F32","shape":[0,8],"data_offsets":[0,0]}}'


def bytes_mutation(path: Path, chance: random.Random) -> None:
    path.write_bytes(flipped(path.read_bytes(), chance))


def json_mutation(path: Path, chance: random.Random) -> None:
    node = parsed(path.read_bytes())
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        node = mutate_json(node, chance)
    path.write_bytes(_encoded(node))


def header_mutation(path: Path, chance: random.Random) -> None:
    """The header's JSON, changed, with its length put right, or not."""
    header, data = header_of(path.read_bytes())
    kind = chance.random()
    if kind < 0.15:
        path.write_bytes(with_header(header, data, chance.choice([*LENGTHS, len(header) + 1, len(header) - 1])))
    elif kind < 0.3:
        path.write_bytes(tensors_file(chance))
    elif kind < 0.4:
        path.write_bytes(with_header(flipped(header, chance), data))
    else:
        node = parsed(header)
        for _ in range(chance.choice([1, 1, 2])):
            node = mutate_json(node, chance)
        path.write_bytes(with_header(_encoded(node), data))


def large_mutation(path: Path, chance: random.Random) -> None:
    large = large_header(chance)
    path.write_bytes(header_of(large)[0] if path.suffix == ".json" else large)


def kind_mutation(path: Path, chance: random.Random) -> None:
    """Something else in the file's place: nothing, a folder, a pipe, a link to a device or nowhere, a hole."""
    path.unlink()
    kind = chance.randrange(8)
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        os.mkfifo(path)
    elif kind in (3, 4, 5):
        path.symlink_to(("/dev/zero", path.name, "nowhere")[kind - 3])
    elif kind == 6:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    elif kind == 7:  # as large as it claims, and all of it a hole
        size = (1 << 40) - (1 << 40) % 16
        tensors = tuple(
            (
                f"base_model.model.model.layers.0.self_attn.q_proj.sbora_{kind}",
                (("dtype", dtype), ("shape", shape), ("data_offsets", place)),
            )
            for kind, dtype, shape, place in (
                ("indices", "I32", [4], [0, 16]),
                ("values", "F32", [size // 16, 4], [16, 16 + size]),
            )
        )
        header = text(tensors).encode()
        path.write_bytes(with_header(header, b""))
        os.truncate(path, 8 + len(header) + 16 + size)


def index_mutation(path: Path, chance: random.Random) -> None:
    """A shard's name in the index of a checkpoint that leads elsewhere."""
    index = json.loads(path.read_bytes())
    names = ["../secret.safetensors", "/etc/passwd", str(path.parent.parent / "secret.safetensors"), "a\0.safetensors"]
    names += [
        "sub/model.safetensors",
        "x" * 300 + ".safetensors",
        "\u00e9" * 127 + ".safetensors",
        "missing.safetensors",
        "..",
    ]
    names += [
        "..safetensors",
        ".safetensors",
        "a\n.safetensors",
        "config.json",
        "\ud800.safetensors",
        "",
        "\\..\\x.safetensors",
    ]
    chosen = chance.choice(names)
    for tensor in list(index["weight_map"])[: chance.choice([1, 2, None])]:
        index["weight_map"][tensor] = chosen
    path.write_text(json.dumps(index))


def adapter_config_mutation(path: Path, chance: random.Random) -> None:
    """Values of an adapter's configuration that aim at what is done with them."""
    content = json.loads(path.read_bytes())
    modules = content["target_modules"]
    many = {f"m{number}": chance.random() for number in range(100_000)}
    edits: list[dict[str, Any]] = [
        *({"alpha_pattern": {pattern: 2.0}} for pattern in PATTERNS),
        *({"task": name} for name in TEXTS),
        *({key: name} for key in ("base_model_name_or_path", "composition", "claim_digest") for name in TEXTS[:20]),
        *({"alpha": value} for value in (True, "8", [8], {"a": 8}, -8, 0, 1e308, 2**64)),
        *(
            {"excluded": {modules[0]: value}}
            for value in ([-1], [True], [1.0], [0, 0], [10**6], [2**63], "01", {}, [[0]])
        ),
        {"excluded": {modules[0]: list(range(1_000_000))}},
        {"alpha_pattern": many},
        {"excluded": {name: [0] for name in many}},
        {"excluded": {name: [] for module in modules for name in (module, module.removeprefix("model."))}},
        *({"base_quantization": _scheme(**edit)} for edit in _SCHEMES),
    ]
    path.write_text(json.dumps(content | chance.choice(edits)))


def _scheme(**changes: object) -> dict[str, object]:
    scheme = {"kind": "nf4", "dtype": "float32", "block_size": 64, "double": True, "digest": "0" * 64}
    return scheme | {"modules": ["model.layers.0.self_attn.q_proj"]} | changes


_SCHEMES: tuple[dict[str, object], ...] = (
    *(
        {},
        {"kind": "x" * 10_000},
        {"kind": ["nf4"]},
        {"kind": {"a": 1}},
        {"dtype": "int4"},
        {"dtype": []},
        {"block_size": 0},
    ),
    *(
        {"block_size": -64},
        {"block_size": 2**40},
        {"block_size": True},
        {"block_size": 63},
        {"double": 1},
        {"double": "yes"},
    ),
    *(
        {"modules": []},
        {"modules": ["x" * 5000]},
        {"modules": ["a\nb"]},
        {"modules": [1]},
        {"modules": "abc"},
        {"digest": 1},
    ),
    *({"modules": ["model.layers.0.self_attn.q_proj"] * 2}, {"modules": ["lm_head"]}, {"more": 1}, {"kind": "int8"}),
)


def _encoded(node: Node) -> bytes:
    return text(node).encode("utf-8", "surrogatepass")
