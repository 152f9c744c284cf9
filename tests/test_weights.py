"""Lambdas: what stands for one, on the command line, in files and in receipts, and what does not."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from commands import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from multisbora.errors import UsageError
from multisbora.patterns import MAX_PATTERNS
from multisbora.weights import (
    By,
    TaskWeight,
    folded,
    grouped,
    parse_weights,
    read_weights,
    require_use,
    resolve,
    write_weights,
)

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.v_proj"
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
PATTERNS = st.sampled_from(["q_proj", "v_proj", r"layers\.0\..*", "self_attn.[qv]_proj", ".*", "mlp.down_proj"])


def test_the_first_pattern_that_names_a_matrix_decides() -> None:
    weight = TaskWeight.of({"default": 0.5, "q_proj": 0.0, r"layers\.0\..*": 2, ".*": 3}, "math")
    assert (weight.at(Q), weight.at("model.layers.0.mlp.up_proj"), weight.at(V)) == (0.0, 2.0, 3.0)
    assert TaskWeight.of({"v_proj": 0.25}, "math").at(Q) == 1.0
    assert TaskWeight.of({"proj": 0.25}, "math").at(Q) == 1.0  # a pattern names whole parts of a name
    assert TaskWeight(0.5).at(Q) == 0.5
    assert TaskWeight() == TaskWeight.of(1, "math") == TaskWeight.of(TaskWeight(), "math")


@given(default=NUMBERS, patterns=st.dictionaries(PATTERNS, NUMBERS))
def test_json_and_back(default: float, patterns: dict[str, float]) -> None:
    weight = TaskWeight(default, tuple(patterns.items()))
    content = json.loads(json.dumps(weight.to_json()))
    assert TaskWeight.of(content, "math") == weight
    assert isinstance(content, dict) == bool(patterns)


def test_people_read_it_in_order() -> None:
    assert str(TaskWeight(0.5)) == "0.5"
    assert str(TaskWeight.of({"v_proj": 2, "default": 0.1, "q_proj": 0}, "math")) == "0.1, v_proj 2, q_proj 0"


@pytest.mark.parametrize("value", [math.nan, math.inf, True, None, "1", [1.0], pytest.param(10**400, id="10^400")])
def test_what_is_no_weight(value: Any) -> None:
    refused(lambda: TaskWeight.of(value, "math"), UsageError, "the weight of math must be a finite number")
    refused(lambda: TaskWeight.of({"q_proj": value}, "math"), UsageError, "the weight of math in q_proj must be")
    refused(lambda: TaskWeight.of({"default": value, "q_proj": 1}, "math"), UsageError, "the weight of math must be")


@pytest.mark.parametrize("pattern", ["", 1, None])
def test_what_is_no_pattern(pattern: Any) -> None:
    refused(lambda: TaskWeight.of({pattern: 1.0}, "math"), UsageError, "the weight of math has the key")
    refused(lambda: TaskWeight.of({"q_(proj": 1.0}, "math"), UsageError, "math in 'q_(proj': it cannot be used")


def test_every_task_has_a_weight_and_no_other_has_one() -> None:
    given: Mapping[str, Any] = {"chat": 0.5, "code": {"q_proj": 2}}
    assert resolve(["math", "chat", "code"], given) == {
        "math": TaskWeight(),
        "chat": TaskWeight(0.5),
        "code": TaskWeight(1.0, (("q_proj", 2.0),)),
    }
    assert resolve(iter(["math"]), None) == {"math": TaskWeight()}
    refused(lambda: resolve(["math", "code"], {"maths": 1.0}), UsageError, "'maths', which is not merged", "math, code")


def test_a_pattern_that_names_nothing_is_refused() -> None:
    require_use(TaskWeight.of({"q_proj": 0, "v_proj": 0.0}, "math"), "math", iter([Q, V]))
    weight = TaskWeight.of({"q_proj": 0.5, "k_proj": 0.5}, "math")
    refused(lambda: require_use(weight, "math", [Q, V]), UsageError, "math in 'k_proj' names none", "q_proj, v_proj")


def test_too_many_patterns_are_refused_and_a_thousand_are_not() -> None:
    names = [f"model.layers.{number}.self_attn.q_proj" for number in range(1000)]
    weight = TaskWeight.of({name: number for number, name in enumerate(names)}, "math")
    assert [weight.at(name) for name in names] == list(range(1000))
    many = {f"m{number}": 1 for number in range(4001)}
    refused(lambda: TaskWeight.of(many, "math"), UsageError, "the weight of math has 4001 patterns, 4000 are the most")


def test_the_command_lines_weights() -> None:
    found = parse_weights(["math=0.8", "chat:q_proj=0.5", "chat:v_proj=-1e-3", "code=1", r"code:layers\.[0-3]\..*=0"])
    assert found == {
        "math": TaskWeight(0.8),
        "chat": TaskWeight(1.0, (("q_proj", 0.5), ("v_proj", -1e-3))),
        "code": TaskWeight(1.0, ((r"layers\.[0-3]\..*", 0.0),)),
    }
    assert parse_weights(["math:(?:a|b=c)=2"]) == {"math": TaskWeight(1.0, (("(?:a|b=c)", 2.0),))}
    assert parse_weights([]) == {}


@pytest.mark.parametrize(
    "text", ["math", "math=", "=1", "math=x", "math=nan", "math=inf", "math:=1", ":q=1", "", "math:default=1"]
)
def test_what_is_no_option(text: str) -> None:
    refused(lambda: parse_weights([text]), UsageError, f"--weight {text!r} is not TASK=LAMBDA or TASK:PATTERN=LAMBDA")


def test_an_option_twice_is_refused() -> None:
    for name in ("math", "math:q_proj"):
        refused(
            lambda name=name: parse_weights([f"{name}=1", f"{name}=1"]), UsageError, f"--weight {name} is given twice"
        )
    refused(lambda: parse_weights(["math:(=1"]), UsageError, "it cannot be used")


CONTENT: dict[str, Any] = {"math": 0.75, "chat": {"default": 1e-05, "q_proj": -2, "v_proj": 0}}
FOUND = {"math": TaskWeight(0.75), "chat": TaskWeight(1e-05, (("q_proj", -2.0), ("v_proj", 0.0)))}


def test_a_file_of_weights_is_yaml_or_json(tmp_path: Path) -> None:
    (tmp_path / "weights.json").write_text(json.dumps(CONTENT))
    (tmp_path / "weights.yaml").write_text("math: 0.75\nchat:\n  default: 1.0e-05\n  q_proj: -2\n  v_proj: 0\n")
    assert read_weights(tmp_path / "weights.json") == read_weights(str(tmp_path / "weights.yaml")) == FOUND


@given(
    weights=st.dictionaries(
        st.sampled_from(["a", "b", "c"]), st.one_of(NUMBERS, st.dictionaries(PATTERNS, NUMBERS)), min_size=1
    )
)
def test_what_is_written_as_json_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, weights: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("weights") / "weights.json"
    found = {task: TaskWeight.of(value, task) for task, value in weights.items()}
    path.write_text(json.dumps({task: weight.to_json() for task, weight in found.items()}))
    assert read_weights(path) == found


@pytest.mark.parametrize("content", ["", "[]", "{}", "3", "1: 2", "- math", "null"])
def test_a_file_of_something_else(tmp_path: Path, content: str) -> None:
    path = tmp_path / "weights.yaml"
    path.write_text(content)
    refused(lambda: read_weights(path), UsageError, str(path))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("w.json", "{", "is no valid JSON"),
        ("w.json", "[" * 100_000, "is no valid JSON"),
        ("w.json", '{"math": 1, "math": 2}', "is no valid JSON"),
        ("w.json", '{"math": NaN}', "is no valid JSON"),
        ("w.json", '{"math": "1"}', "the weight of math must be a finite number, got '1'"),
        ("w.yaml", "math: [", "w.yaml"),
        ("w.yaml", "math: 1\nmath: 2", "w.yaml"),
        ("w.yaml", "math: .nan", "the weight of math must be a finite number, got nan"),
        ("w.yaml", f"math: {'9' * 400}", "the weight of math must be a finite number"),
        ("w.yaml", "math: &a {q_proj: *a}", "the weight of math in q_proj must be a finite number"),
        ("w.yaml", "math: {q_proj: one}", "the weight of math in q_proj must be a finite number, got 'one'"),
    ],
)
def test_a_file_with_faults(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    refused(lambda: read_weights(tmp_path / name), UsageError, str(tmp_path / name), words)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for name in ("gone.json", "gone.yaml"):
        refused(lambda name=name: read_weights(tmp_path / name), UsageError, name)
    (tmp_path / "folder.json").mkdir()
    refused(lambda: read_weights(tmp_path / "folder.json"), UsageError, "folder.json cannot be read")


# --- groups of matrices, and files ---------------------------------------------------------------------------------

LLAMA = [f"model.layers.{i}.{kind}" for i in (0, 1, 11) for kind in ("self_attn.q_proj", "mlp.up_proj")]


def test_matrices_that_share_a_lambda() -> None:
    names = [*LLAMA, "lm_head"]
    assert grouped(names, "task") == {".*": names}
    assert grouped(names, "kind") == {"q_proj": LLAMA[::2], "up_proj": LLAMA[1::2], "lm_head": ["lm_head"]}
    assert grouped(names, "layer") == {
        r"model\.layers\.0\..*": LLAMA[:2],
        r"model\.layers\.1\..*": LLAMA[2:4],
        r"model\.layers\.11\..*": LLAMA[4:],
        "lm_head": ["lm_head"],
    }
    assert list(grouped(names, "matrix").values()) == [[name] for name in names]
    assert len(grouped(["h.0.mlp.experts.7.w1", "h.0.mlp.experts.8.w1"], "layer")) == 1


def test_more_matrices_than_a_weight_may_have_patterns() -> None:
    names = [f"model.layers.{i}.up_proj" for i in range(MAX_PATTERNS)]
    refused(lambda: grouped(names, "matrix"), UsageError, "4000 lambdas", "3999 patterns", "by layer, kind or task")
    assert len(grouped(names, "kind")) == 1
    weight = TaskWeight(1.0, tuple((pattern, 2.0) for pattern in grouped(names[1:], "matrix")))
    assert TaskWeight.of(weight.to_json(), "math") == weight  # as many as are allowed can be read again


PARTS = st.sampled_from(["model", "layers", "vision", "0", "1", "up", "q-proj", "w+1"])
MODULES = st.lists(st.lists(PARTS, min_size=1, max_size=5).map(".".join), min_size=1, max_size=8, unique=True)


@settings(deadline=None)
@given(modules=MODULES, by=st.sampled_from(["task", "kind", "layer", "matrix"]), data=st.data())
def test_folded_lambdas_are_the_lambdas(modules: list[str], by: By, data: st.DataObject) -> None:
    lambdas = {module: data.draw(st.sampled_from([0.0, -0.25, 1.0, 0.7312])) for module in modules}
    weight = folded(lambdas, by)
    assert {module: weight.at(module) for module in modules} == lambdas
    require_use(weight, "math", modules)


def test_folded_lambdas_are_as_few_as_they_can_be() -> None:
    assert folded(dict.fromkeys(LLAMA, 0.8), "matrix") == TaskWeight(0.8)
    assert folded({name: float("q_proj" in name) for name in LLAMA}, "kind") == TaskWeight(
        0.5, (("q_proj", 1.0), ("up_proj", 0.0))
    )
    assert len(folded({name: float(number) for number, name in enumerate(LLAMA)}, "kind").patterns) == len(LLAMA)


@pytest.mark.parametrize("suffix", ["yaml", "yml", "json"])
def test_a_file_of_weights_and_back(suffix: str, tmp_path: Path) -> None:
    lambdas = {name: number / 3 - 1e-9 for number, name in enumerate(LLAMA)}
    weights = {"math": folded(lambdas, "matrix"), "code": TaskWeight(1e-5), "law": folded(lambdas, "kind")}
    path = tmp_path / f"weights.{suffix}"
    write_weights(path, weights, "made here")
    assert read_weights(path) == weights
    assert ("# made here" in path.read_text()) == (suffix != "json")


def test_a_file_of_weights_is_told_by_its_suffix(tmp_path: Path) -> None:
    path = tmp_path / "weights.txt"
    refused(lambda: write_weights(path, {"math": TaskWeight()}), UsageError, "weights.txt", ".yaml, .yml, .json")
    assert not path.exists()


def test_many_lambdas_are_told_by_their_range() -> None:
    weight = TaskWeight(0.5, tuple((f"layers.{i}.up", i / 10) for i in range(9)))
    assert str(weight) == "0.5, 9 patterns 0 to 0.8"


def test_a_pattern_on_the_command_line_goes_before_those_of_the_file_and_a_lambda_replaces_them() -> None:
    from_file = {"math": TaskWeight(0.9, (("q_proj", 0.2), ("k_proj", 0.3))), "chat": TaskWeight(0.4)}
    told = parse_weights(["math:q_proj=0.5", "chat=0.7"], from_file)
    assert told == {
        "math": TaskWeight(0.9, (("q_proj", 0.5), ("k_proj", 0.3))),
        "chat": TaskWeight(0.7),
    }
    assert [told["math"].at(f"layers.0.{kind}") for kind in ("q_proj", "k_proj", "v_proj")] == [0.5, 0.3, 0.9]
    assert parse_weights(["math=1"], from_file)["math"] == TaskWeight(1.0)
