"""Scoring: answers out of texts, likelihoods against a plain loop, generation that batching does not change."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import edit_json, tiny_gpt2, tiny_llama, write_adapter
from safetensors.torch import load_file, save_file

from multisbora import evaluate as evaluation
from multisbora.attention import PACKED
from multisbora.dataset import Example, encode
from multisbora.errors import AdapterError, CheckpointError, DataError, UsageError
from multisbora.evaluate import evaluate, extract, generate, is_right, load_model, log_likelihoods
from multisbora.geometry import from_checkpoint
from multisbora.merge import merge
from multisbora.recipe import Recipe
from multisbora.stream import fingerprint


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp32, so that batches and packs differ from single rows by rounding alone; spread wide enough to say things."""
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama", dtype="float32", initializer_range=0.3)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def recipe_of(tmp_path: Path, rows: list[dict[str, Any]], name: str = "math", **settings: Any) -> Recipe:
    path = write_rows(tmp_path / f"{name}.jsonl", rows)
    scoring = {"data": path, "metric": "number", "num_beams": 1, "max_new_tokens": 6} | settings
    return Recipe.model_validate({"name": name, "prompt": "{instruction}\n", "train": path, "eval": scoring})


def sums(count: int, subset: str = "all") -> list[dict[str, Any]]:
    return [
        {"subset": subset, "instruction": f"{i} and {'x' * i}", "output": f"It is {i}", "answer": str(i)}
        for i in range(1, count + 1)
    ]


def choices() -> list[dict[str, Any]]:
    rows = []
    for i in range(4):
        rows.append({"subset": "ARC-Easy", "instruction": f"q{i}", "output": "a1", "answer": f"Answer{1 + i % 2}"})
        rows.append({"subset": "boolq", "instruction": f"is {i} it?", "output": "true", "answer": i % 2 == 0})
    return rows


CHOICES = {
    "metric": "option",
    "options": {"arc_easy": ["answer1", "answer2"], "BoolQ": ["true", "false"]},
    "choice": "it is {option}",
}


# ----------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 36.", "36"),
        ("6 * $6 = $36.", "36"),
        ("it costs $1,234,567.50 now", "1234567.50"),
        ("10 - 8 = 2", "2"),
        ("the change is -3", "-3"),
        ("x=-3.5.", "-3.5"),
        ("a debt of -$40", "-40"),
        ("a debt of \u221240 dollars", "-40"),
        ("10-8", "8"),
        ("f(2)-8", "8"),
        ("it is .5", ".5"),
        ("so ...5", "5"),
        ("3/4", "4"),
        ("50%", "50"),
        ("007", "007"),
        ("16kids", "16"),
        ("", None),
        ("no idea.", None),
        ("-", None),
        ("$", None),
    ],
)
def test_number_is_the_last_one(text: str, number: str | None) -> None:
    assert extract(text, "number") == number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is C", "C"),
        ("The answer is (C).", "C"),
        ("The answer is: **D**", "D"),
        ("Answer: B", "B"),
        ("the answer is A because of gravity", "A"),
        ("A pipe fills a tank. B can too. The answer is (D).", "D"),
        ("Options (A) 1 (B) 2. The answer is (E).", "E"),
        ("Option B is right, not (C).", "B"),
        ("The best choice is E.", "E"),
        ("(C)", "C"),
        ("C) 42", "C"),
        ("[B]", "B"),
        ("C", "C"),
        ("B. 42", "B"),
        ("A", "A"),
        ("A.", "A"),
        ("A\nbecause", "A"),
        ("A train leaves at noon", "A"),
        ("A train goes from B to C", "B"),
        ("Because Every Dog Can", None),
        ("A's share", None),
        ("an e-mail, an E-mail", None),
        ("the answer is c", None),
        ("F", None),
        ("", None),
    ],
)
def test_letter_is_one_that_stands_as_an_answer(text: str, letter: str | None) -> None:
    assert extract(text, "letter") == letter


@pytest.mark.parametrize(
    ("text", "options", "word"),
    [
        ("the correct answer is true", (), "true"),
        ("False. It is true.", (), "false"),
        ("the correct answer is Solution2.", (), "solution2"),
        ("ending4 or option1", (), "ending4"),
        ("untrue", (), None),
        ("answer", (), None),
        ("the correct answer is answer12", (), "answer12"),
        ("answer12", ("answer1", "answer12"), "answer12"),
        ("answer3, no: answer1", ("answer1", "answer2"), "answer1"),
        ("Very Likely", ("likely", "very likely"), "very likely"),
        ("c++ it is", ("C", "C++"), "c++"),
        ("", ("a",), None),
    ],
)
def test_option_is_the_first_word_of_the_list(text: str, options: tuple[str, ...], word: str | None) -> None:
    assert extract(text, "option", options) == word


def test_right_is_within_a_thousandth_or_equal_but_for_case() -> None:
    assert is_right("118548", "118548.0", "number")
    assert is_right("1.333", "1.3333333333333333", "number")
    assert not is_right("1.33", "1.3333333333333333", "number")
    assert not is_right(None, "0", "number")
    assert not is_right("9" * 400, "1", "number")
    assert not is_right("1", "none", "number")
    assert is_right("answer1", "Answer1", "option")
    assert not is_right("A", "B", "letter")


# -------------------------------------------------------------------------------------------------------- likelihoods


def by_hand(model: Any, examples: list[Example]) -> list[float]:
    """One example at a time, all logits, no packing and no padding."""
    sums = []
    for example in examples:
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            logs = model(ids).logits[0].log_softmax(-1)
        places = range(example.answer_start, len(example.input_ids))
        sums.append(sum(logs[place - 1, example.input_ids[place]].item() for place in places))
    return sums


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_and_padded_likelihoods_are_those_of_a_plain_loop(
    kind: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = llama if kind == "llama" else tiny_gpt2(tmp_path / "gpt2", initializer_range=0.3)
    model, tokenizer = load_model(path)
    examples = encode(recipe_of(tmp_path, sums(9)), sums(9), tokenizer).examples
    expected = by_hand(model, examples)
    for budget in (1, 90, 4096):
        monkeypatch.setattr(evaluation, "BATCH_TOKENS", budget)
        torch.testing.assert_close(log_likelihoods(model, examples), expected, rtol=1e-5, atol=1e-4)
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "packs", lambda model: False)
            torch.testing.assert_close(log_likelihoods(model, examples), expected, rtol=1e-5, atol=1e-4)
    assert model.config._attn_implementation == "sdpa" != PACKED
    assert log_likelihoods(model, []) == []


def test_batches_stay_within_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", 10)
    lengths = [3, 12, 5, 4, 1, 6]
    assert list(evaluation._batches(lengths, packed=True)) == [[1], [5], [2, 3], [0, 4]]
    assert list(evaluation._batches(lengths, packed=False)) == [[1], [5], [2, 3], [0, 4]]
    assert list(evaluation._batches([4, 3, 3], packed=True)) == [[0, 1, 2]]
    assert list(evaluation._batches([4, 3, 3], packed=False)) == [[0, 1], [2]]
    assert list(evaluation._batches([], packed=True)) == []


def test_nll_leaves_out_rows_with_an_empty_target_but_scores_them(llama: Path, tmp_path: Path) -> None:
    rows = sums(5)
    rows[1]["output"] = " "
    recipe = recipe_of(tmp_path, rows)
    task = evaluate(llama, [recipe]).tasks["math"]
    model, tokenizer = load_model(llama)
    examples = encode(recipe, rows, tokenizer).examples
    tokens = sum(len(example.input_ids) - example.answer_start for example in examples)
    assert len(examples) == 4
    assert task.n == 5
    assert task.nll == pytest.approx(-sum(by_hand(model, examples)) / tokens, rel=1e-4)
    nothing = evaluate(llama, [recipe_of(tmp_path, [row | {"output": ""} for row in rows])])
    assert nothing.tasks["math"].nll is None


# --------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_padded_on_the_left_writes_what_each_prompt_alone_does(llama: Path, beams: int) -> None:
    model, tokenizer = load_model(llama)
    prompts = [tokenizer(text).input_ids for text in ("abc", "a much longer prompt than the first", "x", "hello you")]
    together = generate(model, tokenizer, prompts, num_beams=beams, max_new_tokens=8)
    alone = [generate(model, tokenizer, [p], num_beams=beams, max_new_tokens=8)[0] for p in prompts]
    assert together == alone
    assert len(set(together)) > 1
    assert together[::-1] == generate(model, tokenizer, prompts[::-1], num_beams=beams, max_new_tokens=8)


def greedy(model: Any, ids: list[int], steps: int) -> list[int]:
    made: list[int] = []
    for _ in range(steps):
        with torch.no_grad():
            made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
    return made


def test_the_model_folders_own_settings_do_not_leak_and_text_ends_at_its_end(
    llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = load_model(llama)
    prompt = tokenizer("hello").input_ids
    made = greedy(model, prompt, 6)
    expected = tokenizer.decode(made, skip_special_tokens=True)
    other = shutil.copytree(llama, tmp_path / "other")
    settings = {"do_sample": True, "temperature": 9.0, "top_p": 0.5, "repetition_penalty": 50.0, "max_length": 7}
    edit_json(other / "generation_config.json", **settings, min_new_tokens=3, suppress_tokens=made)
    model, tokenizer = load_model(other)
    assert generate(model, tokenizer, [prompt], max_new_tokens=6) == [expected]
    assert model.generation_config.temperature == 9.0
    # Whatever the tokenizer pads with, even with what ends a text.
    tokenizer.pad_token = tokenizer.eos_token
    longer = [prompt, tokenizer("a longer one").input_ids]
    assert generate(model, tokenizer, longer, max_new_tokens=6)[0] == expected
    # A chat model's second way to end counts as well.
    model.generation_config.eos_token_id = [2, made[3]]
    assert generate(model, tokenizer, longer, max_new_tokens=6)[0] == tokenizer.decode(made[: made.index(made[3])])
    assert capfd.readouterr().err == ""


def test_scores_do_not_depend_on_batch_size_or_order(llama: Path, tmp_path: Path) -> None:
    told: list[str] = []
    rows = sums(7)
    one = evaluate(llama, [recipe_of(tmp_path, rows)], batch_size=1, say=told.append, verbose=True)
    alone, told = told, []
    many = evaluate(llama, [recipe_of(tmp_path, rows[::-1])], batch_size=4, say=told.append, verbose=True)
    assert one.tasks["math"].score == many.tasks["math"].score
    assert one.tasks["math"].nll == pytest.approx(many.tasks["math"].nll, rel=1e-5)
    strip = [sorted(text.partition("\n")[2] for text in texts) for texts in (alone, told)]
    assert strip[0] == strip[1]
    assert len(strip[0]) == 7


def test_answers_that_batching_changes_are_told(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(evaluation, "generate", lambda m, t, prompts, **settings: [str(len(prompts))] * len(prompts))
    evaluate(llama, [recipe_of(tmp_path, sums(5))], say=told.append)
    assert told == [
        "task math: 3 of 3 answers differ between a batch of 5 and one prompt at a time, because rounding differs; "
        "batch_size 1 gives scores free of it"
    ]


# ------------------------------------------------------------------------------------------------------------- scores


def test_right_answers_are_counted_by_row_and_by_subset(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*sums(3, "AddSub"), *sums(1, "AQuA")]
    rows[3]["answer"] = "b"
    recipe = recipe_of(tmp_path, rows, metrics={"aqua": "letter"})
    replies = {"1 and x\n": "So 7. The answer is (B), 1.", "2 and xx\n": "2", "3 and xxx\n": ""}

    def fake(model: Any, tokenizer: Any, prompts: list[list[int]], **settings: Any) -> list[str]:
        assert settings == {"num_beams": 2, "max_new_tokens": 5}
        return [replies[tokenizer.decode(prompt)] for prompt in prompts]

    monkeypatch.setattr(evaluation, "generate", fake)
    told: list[str] = []
    result = evaluate(llama, [recipe], num_beams=2, max_new_tokens=5, say=told.append, verbose=True)
    shape = result.to_json()
    assert json.loads(json.dumps(shape)) == shape
    assert set(shape) == {"tasks"}
    task = shape["tasks"]["math"]
    assert set(task) == {"score", "subset_mean", "nll", "n", "subsets"}
    assert task["score"] == 3 / 4
    assert task["subset_mean"] == pytest.approx((2 / 3 + 1) / 2)
    assert {name: (s["score"], s["n"]) for name, s in task["subsets"].items()} == {"AddSub": (2 / 3, 3), "AQuA": (1, 1)}
    assert all(set(subset) == {"score", "nll", "n"} for subset in task["subsets"].values())
    assert min(subset["nll"] for subset in task["subsets"].values()) <= task["nll"]
    assert told[1] == "--- math, AddSub, row 2: right (answer 2, gold 2)\n2 and xx\n2"
    assert told[2].startswith("--- math, AddSub, row 3: wrong (no answer found, gold 3)\n")
    assert len(told) == 4


def test_choice_takes_the_most_likely_option(llama: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, choices(), "common", **CHOICES)
    told: list[str] = []
    result = evaluate(llama, [recipe], method="choice", say=told.append, verbose=True).tasks["common"]
    model, tokenizer = load_model(llama)
    right: dict[str, list[bool]] = {"ARC-Easy": [], "boolq": []}
    for row in choices():
        options = ["answer1", "answer2"] if row["subset"] == "ARC-Easy" else ["true", "false"]
        prompt = tokenizer(f"{row['instruction']}\n").input_ids
        texts = [tokenizer(f"it is {option}").input_ids for option in options]
        values = by_hand(model, [Example(prompt + text, len(prompt)) for text in texts])
        right[row["subset"]].append(options[values.index(max(values))] == str(row["answer"]).casefold())
    assert {name: subset.score for name, subset in result.subsets.items()} == {k: sum(v) / 4 for k, v in right.items()}
    assert len(told) == 8
    assert all("[log-likelihoods: " in text for text in told)


def test_choice_of_letters_needs_no_list_and_numbers_are_refused(llama: Path, tmp_path: Path) -> None:
    rows = sums(2, "aqua")
    for row in rows:
        row["answer"] = "(c)"
    recipe = recipe_of(tmp_path, rows, metric="letter")
    assert evaluate(llama, [recipe], method="choice").tasks["math"].score in (0, 1 / 2, 1)
    with pytest.raises(UsageError, match=r"subset all, has no options to choose from: use method generate$"):
        evaluate(llama, [recipe_of(tmp_path, sums(2))], method="choice")
    words = [row | {"answer": "true"} for row in sums(1)]
    with pytest.raises(UsageError, match=r"or name them in eval\.options"):
        evaluate(llama, [recipe_of(tmp_path, words, metric="option")], method="choice")


def test_a_sample_has_every_subset_by_its_share_and_is_part_of_a_larger_one(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, [*sums(60, "big"), *sums(30, "half"), *sums(2, "tiny")])
    draw = lambda limit, seed=0: [q.number for q in evaluation._questions(recipe, limit, seed, print)]  # noqa: E731
    assert draw(None) == draw(500) == list(range(1, 93))
    chosen = draw(20)
    assert chosen == sorted(chosen)
    assert chosen == draw(20)
    assert chosen != draw(20, seed=1)
    assert set(chosen) <= set(draw(21)) <= set(draw(50))
    counts = [sum(low < n <= high for n in chosen) for low, high in ((0, 60), (60, 90), (90, 92))]
    assert counts == [13, 6, 1]
    assert len(draw(1)) == 1


# ---------------------------------------------------------------------------------------------- models and their paths


def test_an_adapter_a_merged_checkpoint_and_several_adapters(llama: Path, tmp_path: Path) -> None:
    geometry = from_checkpoint(llama)
    base_print = fingerprint(llama, geometry)
    given = {"base_fingerprint": base_print, "spread": 0.3, "alpha": 4}
    regions = [{m.module: list(range(start, start + 4)) for m in geometry.matrices} for start in (0, 8)]
    one = write_adapter(tmp_path / "one", geometry, "b", indices=regions[0], **given)
    two = write_adapter(tmp_path / "two", geometry, "sbora.x", indices=regions[1], seed=1, **given)
    merge(llama, [one, two], output=tmp_path / "merged")
    recipe = recipe_of(tmp_path, sums(4))
    base_nll, one_nll, both, merged = (
        evaluate(path, [recipe], **settings).tasks["math"].nll
        for path, settings in (
            (llama, {}),
            (one, {"base": llama}),
            (one, {"base": llama, "adapters": [two]}),
            (tmp_path / "merged", {}),
        )
    )
    assert both == pytest.approx(merged, rel=1e-5)
    assert len({round(nll, 3) for nll in (base_nll, one_nll, both)}) == 3
    assert evaluate(llama, [recipe], adapters=[one, two]).tasks["math"].nll == pytest.approx(both, rel=1e-6)
    model, _ = load_model(one, llama, [two])
    assert not model.training
    assert [model.peft_config[name].task for name in ("adapter0", "adapter1")] == ["b", "sbora.x"]
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "sbora" in name)

    with pytest.raises(UsageError, match="give the base model that it was trained on too"):
        evaluate(one, [recipe])
    with pytest.raises(UsageError, match="are both task 'b'"):
        evaluate(one, [recipe], base=llama, adapters=[one])
    with pytest.raises(AdapterError, match="trained on another base"):
        evaluate(one, [recipe], base=tmp_path / "merged")


def test_an_adapter_that_does_not_fit_or_is_not_whole(llama: Path, tmp_path: Path) -> None:
    geometry = from_checkpoint(llama)
    recipe = recipe_of(tmp_path, sums(1))
    free = write_adapter(tmp_path / "free", geometry, "free")
    told: list[str] = []
    evaluate(free, [recipe], base=llama, say=told.append)
    assert told == [f"{free} does not say which base it was trained on: its scores are right if {llama} is it"]
    wide = tiny_llama(tmp_path / "wide", intermediate_size=64)
    with pytest.raises(AdapterError, match="does not fit wide"):
        evaluate(free, [recipe], base=wide)
    with pytest.raises(AdapterError, match="about different modules"):
        half = write_adapter(tmp_path / "half", geometry, "half", target_modules=["q_proj", "k_proj"])
        edit_json(half / "adapter_config.json", target_modules=["q_proj", "k_proj", "v_proj"])
        evaluate(half, [recipe], base=llama)
    edit_json(half / "adapter_config.json", target_modules=["q_proj", "k_proj"], r=5)
    with pytest.raises(AdapterError, match="cannot be put into this base"):
        evaluate(half, [recipe], base=llama)
    (free / "adapter_model.safetensors").write_bytes(b"123")
    with pytest.raises(AdapterError, match="truncated or corrupt"):
        evaluate(free, [recipe], base=llama)


def test_model_folders_that_cannot_be_read(llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(tmp_path, sums(1))
    with pytest.raises(CheckpointError, match="is no folder"):
        evaluate(tmp_path / "nowhere", [recipe])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError):
        evaluate(empty, [recipe])
    cut = shutil.copytree(llama, tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        evaluate(cut, [recipe])
    lacking = shutil.copytree(llama, tmp_path / "lacking")
    tensors = load_file(lacking / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors of its model, model.layers.1.mlp.up_proj.weight"):
        evaluate(lacking, [recipe])
    unknown = shutil.copytree(llama, tmp_path / "unknown")
    edit_json(unknown / "config.json", model_type="nothing known", architectures=["Nothing"])
    with pytest.raises(CheckpointError, match="cannot be loaded as a causal language model") as raised:
        evaluate(unknown, [recipe])
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""


def test_arguments_and_rows_that_cannot_mean_anything(llama: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, sums(2))
    for name in ("limit", "batch_size", "num_beams", "max_new_tokens"):
        with pytest.raises(UsageError, match=f"{name} must be at least 1, got 0"):
            evaluate(llama, [recipe], **{name: 0})
    with pytest.raises(UsageError, match="method 'guess' is unknown"):
        evaluate(llama, [recipe], method="guess")  # type: ignore[arg-type]
    for recipes in ([], [recipe, recipe]):
        with pytest.raises(UsageError, match="name at least one task, and each once"):
            evaluate(llama, recipes)
    rows = sums(2)
    rows[1].pop("answer")
    with pytest.raises(DataError, match="test row 2 of task math: it has no answer"):
        evaluate(llama, [recipe_of(tmp_path, rows)])
    rows = [row | {"answer": "many"} for row in sums(2)]
    with pytest.raises(DataError, match=r"subset all: no gold answer can ever be given .*'many'"):
        evaluate(llama, [recipe_of(tmp_path, rows)])
    rows[0]["answer"] = "$1"
    told: list[str] = []
    result = evaluate(llama, [recipe_of(tmp_path, rows)], say=told.append)
    assert told == [
        "task math, subset all: 1 of 2 rows will count as wrong (row 2 says 'many', metric 'number' wants a number)"
    ]
    assert math.isfinite(result.tasks["math"].score)


def test_texts_beyond_the_models_positions(tmp_path: Path) -> None:
    long = sums(2)
    long[1]["instruction"] = "y" * 40
    recipe = recipe_of(tmp_path, long)
    with pytest.raises(DataError, match="needs up to 49 tokens at a time and the model was made for 32"):
        evaluate(tiny_gpt2(tmp_path / "gpt2", n_positions=32), [recipe])
    told: list[str] = []
    evaluate(tiny_llama(tmp_path / "short", max_position_embeddings=32), [recipe], say=told.append)
    assert len(told) == 2
    assert all(text.endswith("scores of its longest rows say little") for text in told)
