"""Recipes: the shipped ones load, and what is wrong in one is said in one line, all of it at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from multisbora.allocator import DEFAULT_TARGETS
from multisbora.errors import DataError, MultisboraError, UsageError
from multisbora.project import Project
from multisbora.recipe import Evaluation, Recipe, Source, Training, fields_of, load, names
from multisbora.resources import tasks_dir

SHIPPED = sorted(names())
MINIMAL: dict[str, Any] = {
    "prompt": "Q: {question}\nA:",
    "train": "rows.json",
    "eval": {"data": "test.json", "metric": "number"},
}


def write(folder: Path, content: Any = None, name: str = "toy", **changes: Any) -> Path:
    """A folder of recipes with one in it: the minimal one with changes, or any text."""
    text = content if isinstance(content, str) else yaml.safe_dump(MINIMAL | changes)
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def refused(call: Callable[[], object], *words: str, kind: type[MultisboraError] = UsageError) -> str:
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def test_recipes_are_shipped() -> None:
    assert {"math", "commonsense"} <= set(SHIPPED)
    assert len(SHIPPED) == len(list(tasks_dir().glob("*.yaml")))


@pytest.mark.parametrize("task", SHIPPED)
def test_shipped_recipe(task: str) -> None:
    recipe = load(task)
    assert recipe.name == task
    assert recipe.fill(dict.fromkeys([*fields_of(recipe.prompt), recipe.target], "x"), "row")[1] == "x"
    subsets = {source.subset for source in recipe.eval.data}
    assert set(recipe.eval.options) <= subsets and set(recipe.eval.metrics) <= subsets
    if recipe.eval.metric == "option":
        assert set(recipe.eval.options) == subsets


def test_a_key_given_twice(tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text("prompt: '{a}'\nprompt: '{b}'\n")
    with pytest.raises(UsageError, match=r"toy\.yaml is no valid YAML.*'prompt' is given twice"):
        load("toy", tmp_path)


def test_the_paper_s_settings() -> None:
    math, commonsense = load("math"), load("commonsense")
    targets = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    assert math.target_modules is commonsense.target_modules is None
    assert Project(model="any").targets == DEFAULT_TARGETS == targets
    assert (math.training.epochs, math.training.learning_rate, math.training.batch_size) == (3, 3e-4, 8)
    assert (commonsense.training.epochs, commonsense.training.learning_rate) == (1, 2e-4)
    assert commonsense.training.batch_size == 16
    assert math.training.cutoff == commonsense.training.cutoff == 256
    assert (math.eval.num_beams, math.eval.max_new_tokens) == (4, 256)
    assert (commonsense.eval.num_beams, commonsense.eval.max_new_tokens) == (4, 32)
    assert math.eval.metric == "number" and math.eval.metrics == {"AQuA": "letter"}
    assert len(math.eval.data) == 6 and len(commonsense.eval.data) == 8


def test_minimal_recipe(tmp_path: Path) -> None:
    recipe = load("toy", write(tmp_path))
    assert recipe.name == "toy" and recipe.target == "output" and recipe.target_modules is None
    assert recipe.train == (Source(path="rows.json"),) and recipe.training == Training()
    assert recipe.eval == Evaluation(data=(Source(path="test.json"),), metric="number")


def test_the_project_s_recipe_goes_before_the_package_s(tmp_path: Path) -> None:
    write(tmp_path, name="math", description="mine")
    assert load("math", tmp_path).description == "mine"
    assert load("commonsense", tmp_path) == load("commonsense")
    assert names(tmp_path)["math"] == tmp_path / "math.yaml"


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    folder = write(tmp_path)
    same = load("toy", folder).digest
    assert load("toy", folder).digest == same
    assert load("toy", folder, ["training.seed=1"]).digest != same
    assert load("toy", folder, ["training.seed=0"]).digest == same


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"promt": "x"}, ("unknown key promt", "did you mean prompt?")),
        ({"training": {"learnig_rate": 1}}, ("unknown key training.learnig_rate", "did you mean learning_rate?")),
        ({"eval": MINIMAL["eval"] | {"metics": {}}}, ("unknown key eval.metics", "did you mean metric")),
        ({"train": [{"path": "a", "splitt": "b"}]}, ("unknown key train.0.splitt", "did you mean split?")),
        ({"eval": MINIMAL["eval"] | {"data": {"pth": "a"}}}, ("eval.data.0.pth", "did you mean path?")),
        ({"zzz": 1}, ("unknown key zzz", "known: description, dev, dev_size, eval")),
        ({"eval": {"data": "x"}}, ("eval.metric is missing",)),
        ({"eval": MINIMAL["eval"] | {"metric": "words"}}, ("eval.metric", "'number'", "got 'words'")),
        ({"train": []}, ("train", "at least 1")),
        ({"training": {"epochs": 0}}, ("training.epochs", "greater than 0", "got 0")),
        ({"training": {"dropout": 1}}, ("training.dropout", "less than 1")),
        ({"training": {"epochs": "many"}}, ("training.epochs", "got 'many'")),
        ({"training": {"micro_batch_size": 0}}, ("training.micro_batch_size", "greater than 0")),
        ({"training": {"seed": -1}}, ("training.seed", "greater than or equal to 0")),
        ({"training": {"seed": 2**32}}, ("training.seed", "less than 4294967296")),
        ({"training": {"epochs": math.inf}}, ("training.epochs", "finite number")),
        ({"training": {"learning_rate": math.inf}}, ("training.learning_rate", "finite number")),
        ({"training": {"weight_decay": math.inf}}, ("training.weight_decay", "finite number")),
        ({"training": {"max_grad_norm": math.nan}}, ("training.max_grad_norm", "greater than 0")),
        ({"dev_size": math.inf}, ("dev_size", "finite number")),
        ({"training": 5}, ("training", "got 5")),
        ({"dev_size": 0}, ("dev_size", "greater than 0")),
        ({"dev_size": 1.5}, ("dev_size 1.5 is neither a share", "whole number of rows")),
        ({"dev": "dev.json", "dev_size": 0.1}, ("dev names rows", "dev_size", "give one of them")),
        ({"dev": [{"pth": "x"}]}, ("dev.0.pth", "did you mean path?")),
        ({"training": {"early_stopping_patience": 3}}, ("early_stopping_patience needs dev rows", "dev_size, 0.05")),
        ({"training": {"eval_steps": 7}}, ("training.eval_steps needs dev rows", "dev_size, 0.05")),
        ({"training": {"early_stopping_patience": 0}, "dev_size": 0.1}, ("early_stopping_patience", "greater than 0")),
        ({"prompt": "no field"}, ("prompt names no field", "{instruction}")),
        ({"prompt": "{instruction"}, ("expected '}'",)),
        ({"prompt": "instruction}"}, ("Single '}'",)),
        ({"prompt": "{}"}, ("{} is no plain field name", "{{")),
        ({"prompt": "{0}"}, ("{0} is no plain field name",)),
        ({"prompt": '{"a": {x}}'}, ("no plain field name",)),
        ({"prompt": "{a.b}"}, ("{a.b} is no plain field name",)),
        ({"prompt": "{a[0]}"}, ("no plain field name",)),
        ({"prompt": "{a:{width}}"}, ("{a:{width}} is no plain field name",)),
        ({"prompt": "{a!r}"}, ("{a!r} is no plain field name",)),
        ({"eval": MINIMAL["eval"] | {"choice": "the answer"}}, ("choice must name {option}",)),
    ],
    ids=str,
)
def test_fault(tmp_path: Path, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    folder = write(tmp_path, **changes)
    refused(lambda: load("toy", folder), str(tmp_path / "toy.yaml"), *words)


def test_what_is_no_fault(tmp_path: Path) -> None:
    assert load("toy", write(tmp_path, training={"max_grad_norm": math.inf})).training.max_grad_norm == math.inf
    recipe = load("toy", write(tmp_path, training={"batch_size": 6, "micro_batch_size": 4}))
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    watched = load("toy", write(tmp_path, dev_size=0.1, training={"eval_steps": 7}))
    assert watched.training.eval_steps == 7


def test_name_is_the_file_s(tmp_path: Path) -> None:
    content = yaml.safe_dump(MINIMAL | {"name": "other"})
    refused(lambda: load("toy", write(tmp_path, content)), "toy.yaml: name is 'other'", "'toy'", "leave name out")
    assert load("other", write(tmp_path, content, name="other")).name == "other"


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    folder = write(tmp_path, training={"epohs": 1, "seed": "x"}, eval={"metric": "number"}, trian=1, prompt="{")
    refused(
        lambda: load("toy", folder),
        *("training.epohs, did you mean epochs?", "training.seed", "eval.data is missing", "unknown key trian"),
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("- a\n- b\n", ("must hold `key: value` lines", "list")),
        ("", ("must hold `key: value` lines",)),
        ("prompt: [", ("no valid YAML",)),
        ("prompt: 2020-99-99", ("no valid YAML", "month must be in 1..12")),
        ("prompt: !!int word", ("no valid YAML",)),
        ("prompt: !!bool word", ("no valid YAML",)),
        ("prompt: a\tb: c\n\t- d", ("no valid YAML",)),
        ("!!python/object/apply:os.system [x]", ("no valid YAML",)),
    ],
    ids=repr,
)
def test_no_recipe_at_all(tmp_path: Path, content: str, words: tuple[str, ...]) -> None:
    folder = write(tmp_path, content)
    refused(lambda: load("toy", folder), "toy.yaml", *words)


def test_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_bytes(b"\xff\xfe\x00prompt")
    refused(lambda: load("toy", tmp_path), "toy.yaml cannot be read")


def test_unknown_task(tmp_path: Path) -> None:
    refused(lambda: load("maths"), "unknown task 'maths'", "did you mean math?", "tasks/maths.yaml")
    refused(lambda: load("poetry"), "unknown task 'poetry'", "known are", "commonsense", "math")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("training.learning_rate=1e-4", "training.learning_rate", 1e-4),
        ("training.learning_rate=2", "training.learning_rate", 2.0),
        ("training.max_steps=7", "training.max_steps", 7),
        ("training.max_steps=null", "training.max_steps", None),
        ("training.gradient_checkpointing=true", "training.gradient_checkpointing", True),
        ("description=a=b", "description", "a=b"),
        ("target_modules=[q_proj, v_proj]", "target_modules", ("q_proj", "v_proj")),
        ("train=other.json", "train", (Source(path="other.json"),)),
        ("dev=dev.json", "dev", (Source(path="dev.json"),)),
        ("dev_size=0.05", "dev_size", 0.05),
        ("dev_size=200", "dev_size", 200.0),
        ("train=[a.json, b.json]", "train", (Source(path="a.json"), Source(path="b.json"))),
        ("eval.metrics.AQuA=letter", "eval.metrics", {"AQuA": "letter"}),
    ],
)
def test_override(tmp_path: Path, override: str, key: str, value: object) -> None:
    found: Any = load("toy", write(tmp_path), [override])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_the_last_override_counts(tmp_path: Path) -> None:
    folder = write(tmp_path, training={"epochs": 9, "seed": 4})
    recipe = load("toy", folder, ["training.epochs=1", "training.epochs=2"])
    assert (recipe.training.epochs, recipe.training.seed) == (2, 4)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.lerning_rate=1", ("training.lerning_rate", "did you mean learning_rate?")),
        ("trainin.epochs=1", ("unknown key trainin", "did you mean train")),
        ("training.epochs", ("is not KEY=VALUE",)),
        ("=3", ("is not KEY=VALUE",)),
        ("training.epochs=[", ("no valid YAML",)),
        ("training.epochs=2020-99-99", ("no valid YAML",)),
        ("training.epochs=-1", ("training.epochs", "greater than 0")),
        ("training.epochs.x=1", ("training.epochs",)),
    ],
)
def test_wrong_override(tmp_path: Path, override: str, words: tuple[str, ...]) -> None:
    folder = write(tmp_path)
    refused(lambda: load("toy", folder, [override]), *words)


def test_fill(tmp_path: Path) -> None:
    recipe = load("toy", write(tmp_path, prompt="{{literal}} {a}, {b}: ", target="c"))
    assert recipe.fill({"a": "{b}", "b": 2, "c": 3.5}, "row 1") == ("{literal} {b}, 2: ", "3.5")
    assert recipe.fill({"a": "", "b": False, "c": ""}, "row 1") == ("{literal} , False: ", "")
    refused(
        lambda: recipe.fill({"a": 1, "z": 2, "c": None}, "row 7"),
        *("row 7", "field b, c of recipe toy", "the row has a, z, c"),
        kind=DataError,
    )


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load("math").training.epochs = 1  # type: ignore[misc]


def test_recipe_from_code() -> None:
    recipe = Recipe(name="x", prompt="{q}", train="a.json", eval=Evaluation(data="b.json", metric="letter"))  # type: ignore[arg-type]
    assert recipe.train == (Source(path="a.json"),) and recipe.eval.data == (Source(path="b.json"),)
