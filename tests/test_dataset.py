"""Rows in, token batches out: files of every kind, boundaries and cutoffs, packed batches that equal padded ones."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import VOCABULARY
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from multisbora.attention import PACKED, packed_attention, use_packed_attention
from multisbora.dataset import (
    Encoded,
    Example,
    Split,
    check_examples,
    encode,
    load_rows,
    overlap,
    pack,
    packs,
    pad,
    split,
)
from multisbora.errors import DataError
from multisbora.recipe import Recipe, Source
from multisbora.trainer import answer_loss

ROWS = [{"question": "1 + 1", "output": "2"}, {"question": "2 + 5", "output": "7"}]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(DataError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def recipe(prompt: str = "Q: {question} A:", **training: Any) -> Recipe:
    content = {"name": "toy", "prompt": prompt, "train": "x.json", "training": training}
    return Recipe.model_validate(content | {"eval": {"data": "y.json", "metric": "number"}})


# --- rows ---------------------------------------------------------------------------------------------------------


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_files(tmp_path: Path, suffix: str) -> None:
    rows = [{"question": 'é, "x"\nand {more}', "output": "two"}, {"question": "b", "output": "three"}]
    path = write(tmp_path / f"rows{suffix}", rows)
    assert load_rows([Source(path=str(path))]) == [(None, row) for row in rows]


def test_relative_paths_several_sources_and_subsets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.json", ROWS)
    write(tmp_path / "b.jsonl", [{"question": "c", "answer": 3}])
    found = load_rows([Source(path="a.json", subset="first"), Source(path="./b.jsonl")])
    assert found == [*(("first", row) for row in ROWS), (None, {"question": "c", "answer": 3})]


def test_fields_that_only_some_rows_have(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "a", "output": "b"}, {"question": "c"}])
    rows = [row for _, row in load_rows([Source(path=str(path))])]
    assert rows[1]["output"] is None
    refused(lambda: encode(recipe(), rows, Tokenizer()), "row 2 of task toy", "field output")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.json", None, ("missing.json does not exist", "relative to")),
        ("./rows.txt", "x", ("rows.txt is none of .json",)),
        ("./no/where", None, ("does not exist",)),
        ("broken.json", '[{"a": 1}, {"a": ', ("broken.json cannot be read",)),
        ("broken.jsonl", '{"a": 1}\n{"a": \n', ("broken.jsonl cannot be read",)),
        ("broken.parquet", "PAR1 no parquet", ("broken.parquet cannot be read",)),
        ("none.json", "[]", ("none.json",)),
        ("none.csv", "question,output\n", ("none.csv",)),
        ("empty.json", "", ("empty.json is empty",)),
        ("empty.csv", "", ("empty.csv",)),
    ],
)
def test_files_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | None, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_text(content)
    refused(lambda: load_rows([Source(path=name)]), *words)


def test_hub_id_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(path: str, config: str | None, *, split: str) -> None:
        assert (path, config, split) == ("owner/data", "small", "test")
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source(path="owner/data", config="small", split="test")
    refused(lambda: load_rows([source]), "owner/data cannot be read", "no network more")


def test_loading_leaves_the_bars_as_they_were(tmp_path: Path) -> None:
    import datasets

    path = write(tmp_path / "a.json", ROWS)
    datasets.enable_progress_bars()
    load_rows([Source(path=str(path))])
    assert datasets.is_progress_bar_enabled()


# --- examples -----------------------------------------------------------------------------------------------------


class Tokenizer:
    """One token a character, 10 + its code; BOS 1 where asked for, EOS 2."""

    def __init__(self, bos: bool = True, eos: int | None = 2) -> None:
        self.bos, self.eos_token_id = bos, eos

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        ids = [10 + ord(character) for character in text]
        return type("Encoding", (), {"input_ids": [1, *ids] if self.bos and add_special_tokens else ids})


def tokens(text: str) -> list[int]:
    return [10 + ord(character) for character in text]


@pytest.mark.parametrize("bos", [True, False])
def test_encode(bos: bool) -> None:
    encoded = encode(recipe("{question}="), [{"question": "1+1", "output": "2"}], Tokenizer(bos))
    prompt = [*([1] if bos else []), *tokens("1+1=")]
    assert encoded.examples == [Example([*prompt, *tokens("2"), 2], len(prompt))]
    assert (encoded.truncated, encoded.dropped, encoded.empty, encoded.shown) == (0, 0, 0, "")
    assert encoded.tokens == len(prompt) + 2


def test_cutoff() -> None:
    rows = [{"question": q, "output": a} for q, a in [("ab", "cd"), ("ab", "cde"), ("abcd", "e"), ("abcde", "f")]]
    encoded = encode(recipe("{question}"), rows, Tokenizer(), cutoff=6)
    assert encoded.examples == [
        Example([1, *tokens("abcd"), 2], 3),
        Example([1, *tokens("abcde")], 3),  # cut: no end of sequence is taught
        Example([1, *tokens("abcde")], 5),
    ]
    assert (encoded.truncated, encoded.dropped) == (3, 1)
    assert encoded.shown.startswith("row 2 has 7 tokens") and "abcde" in encoded.shown


def test_empty_targets_are_left_out() -> None:
    rows = [{"question": "a", "output": " \n"}, {"question": "b", "output": "c"}, {"question": "d", "output": ""}]
    encoded = encode(recipe(), rows, Tokenizer())
    assert (len(encoded.examples), encoded.empty) == (1, 2)


def test_empty_prompt_without_bos() -> None:
    """Nothing predicts the first token of such an example, least of all the end of the one before it."""
    encoded = encode(recipe("{question}"), [{"question": "", "output": "abc"}], Tokenizer(bos=False))
    assert encoded.examples == [Example([*tokens("abc"), 2], 1)]
    assert pack([Example([3, 4, 5], 2), *encoded.examples])["logits_to_keep"].tolist() == [1, 3, 4, 5]


def test_tokenizer_without_end() -> None:
    refused(lambda: encode(recipe(), ROWS, Tokenizer(eos=None)), "no end-of-sequence token", "recipe toy")


def test_real_tokenizer(tmp_path: Path) -> None:
    from builders import tiny_llama
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama(tmp_path / "m"))
    (example,) = encode(recipe(), [{"question": "é?", "output": "Ja.\n"}], tokenizer).examples
    assert tokenizer.decode(example.input_ids[: example.answer_start]) == "Q: é? A:"
    assert tokenizer.decode(example.input_ids[example.answer_start : -1]) == "Ja.\n"
    assert example.input_ids[-1] == tokenizer.eos_token_id


def test_check_examples() -> None:
    some = [Example([1, 2, 3], 1)] * 99

    def check(encoded: Encoded, **training: Any) -> list[str]:
        said: list[str] = []
        check_examples(encoded, recipe(cutoff=8, **training), said.append)
        return said

    assert check(Encoded(some, 0, 0, 0, "")) == []
    assert check(Encoded(some, 0, 0, 3, "")) == ["task toy: 3 rows have an empty output and are left out"]
    (said,) = check(Encoded(some, 1, 1, 0, "row 5 ..."), max_truncated=0.01)
    assert said == "task toy: 1 of 100 examples (1.0%) exceed 8 tokens and are cut (1 left out whole); row 5 ..."
    cut = Encoded(some, 1, 1, 0, "row 5 ...")
    refused(lambda: check(cut), "1 of 100", "max_truncated 0.5%", "row 5", "raise training.cutoff")
    refused(lambda: check(cut, max_truncated=0.0099), "1 of 100")
    refused(lambda: check(Encoded([], 2, 2, 0, "row 1")), "no row is left to train on", "cutoff of 8")
    refused(lambda: check(Encoded([], 0, 0, 2, "")), "no row is left")


# --- dev rows -----------------------------------------------------------------------------------------------------


def row_of(number: int) -> dict[str, Any]:
    return {"question": f"{number} + 1", "output": f"{number + 1}"}


def split_recipe(seed: int = 0, **keys: Any) -> Recipe:
    content = {"name": "toy", "prompt": "Q: {question} A:", "train": "x.json", "training": {"seed": seed}}
    return Recipe.model_validate(content | {"eval": {"data": "y.json", "metric": "number"}} | keys)


def test_no_dev_rows() -> None:
    assert split(split_recipe(), ROWS, None, ROWS) == Split({1: ROWS[0], 2: ROWS[1]}, {})


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=2, max_size=60),
    st.lists(st.integers(0, 40), max_size=10),
    st.sampled_from([0.1, 0.25, 0.5, 1, 5]),
    st.integers(0, 3),
)
def test_rows_held_out(numbers: list[int], tested: list[int], size: float, seed: int) -> None:
    """No prompt on both sides, no test row held out, nothing lost, no more than asked for."""
    rows = [row_of(number) for number in numbers]
    try:
        parts = split(split_recipe(seed, dev_size=size), rows, None, [row_of(number) for number in tested])
    except DataError:  # too few prompts
        return
    assert parts.of_training and {**parts.train, **parts.dev} == dict(enumerate(rows, 1))
    assert not parts.train.keys() & parts.dev.keys() and list(parts.dev) == sorted(parts.dev)
    train, dev = ({numbers[n - 1] for n in side} for side in (parts.train, parts.dev))
    assert not train & dev and not dev & set(tested) and train
    assert 1 <= len(parts.dev) <= (size if size >= 1 else max(1, round(size * len(rows))))


def test_what_is_held_out_hangs_on_the_prompt_and_the_seed() -> None:
    rows = [row_of(number) for number in range(100)]

    def held(rows: list[dict[str, Any]], seed: int = 0) -> set[str]:
        found = split(split_recipe(seed, dev_size=10), rows, None, [])
        assert len(found.dev) == 10
        return {row["question"] for row in found.dev.values()}

    assert held(rows) == held(rows[::-1]) == held(rows) != held(rows, 1)
    twice = [{**row, "question": f" {row['question'].upper()} "} for row in rows]
    found = split(split_recipe(dev_size=0.1), [*rows, *twice], None, [])
    assert sorted(n - 100 for n in found.dev if n > 100) == sorted(n for n in found.dev if n <= 100)


def test_dev_rows_of_their_own() -> None:
    dev = [row_of(1), row_of(50), row_of(60), row_of(2), row_of(70)]
    parts = split(split_recipe(dev="d.json"), [row_of(1), row_of(2), row_of(3)], dev, [row_of(60), row_of(1)])
    assert parts.train == {1: row_of(1), 2: row_of(2), 3: row_of(3)}
    assert parts.dev == {2: row_of(50), 5: row_of(70)} and not parts.of_training
    assert (parts.in_training, parts.in_test) == (1, 2)


def test_dev_rows_that_cannot_be_had() -> None:
    refused(lambda: split(split_recipe(dev="d.json"), ROWS, ROWS, []), "all 2 dev rows are also training rows")
    refused(lambda: split(split_recipe(dev_size=2), ROWS, None, []), "leaves none of 2 rows to train on")
    refused(lambda: split(split_recipe(dev_size=1), ROWS, None, ROWS), "no rows can be held out")
    refused(lambda: split(split_recipe(dev_size=1), [{"query": "x"}, *ROWS], None, []), "row 1 of task toy", "question")


def test_dev_rows_are_named_as_such() -> None:
    one = encode(split_recipe(), {3: row_of(3), 7: row_of(70)}, Tokenizer(), what="dev row")
    assert [example.row for example in one.examples] == [3, 7]
    refused(lambda: encode(split_recipe(), {4: {"question": "x"}}, Tokenizer(), what="dev row"), "dev row 4 of task")
    cut = encode(split_recipe(), {3: row_of(3), 7: row_of(70)}, Tokenizer(), cutoff=14, what="dev row")
    assert cut.truncated == 1 and cut.shown.startswith("dev row 7 has")
    refused(lambda: check_examples(cut, split_recipe(), print, "dev "), "1 of 2 dev examples (50.0%) exceed")
    refused(lambda: check_examples(Encoded([], 0, 0, 2, ""), recipe(), print, "dev "), "no dev row is left to score")


def test_overlap_looks_past_case_and_space() -> None:
    test = [{"question": " 1  +\n1", "output": "x"}, {"question": "2 + 6"}, {"question": "2 + 5"}]
    assert overlap(recipe(), ROWS, test) == 2
    assert overlap(recipe("ask {question}"), [{"question": "AB", "output": ""}], [{"question": "ab"}]) == 1
    refused(lambda: overlap(recipe(), ROWS, [{"query": "x"}]), "test row 1", "question")


def test_pack_and_pad_by_hand() -> None:
    examples = [Example([5, 6, 7], 1), Example([8, 9, 10, 11], 3)]
    packed = {
        key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in pack(examples).items()
    }
    assert packed == {
        "input_ids": [[5, 6, 7, 8, 9, 10, 11]],
        "position_ids": [[0, 1, 2, 0, 1, 2, 3]],
        "logits_to_keep": [0, 1, 5],
        "labels": [[6, 7, 11]],
        "example_lengths": [3, 4],
        "cu_seq_lens_q": [0, 3, 7],
        "cu_seq_lens_k": [0, 3, 7],
        "max_length_q": 4,
        "max_length_k": 4,
    }
    assert {key: value.tolist() for key, value in pad(examples, 0).items()} == {
        "input_ids": [[5, 6, 7, 0], [8, 9, 10, 11]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1]],
        "labels": [[6, 7, -100, -100], [-100, -100, 11, -100]],
    }


# --- packed batches are padded batches ----------------------------------------------------------------------------

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SIZES |= dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)
WINDOW = 4  # shorter than the examples


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def gpt2() -> PreTrainedModel:
    small = dict(n_embd=24, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=64)
    return GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, **small))


def mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(sliding_window=WINDOW, **SIZES))


def gemma() -> PreTrainedModel:
    layers = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(sliding_window=WINDOW, head_dim=8, layer_types=layers, **SIZES))


MODELS = {"llama": llama, "gpt2": gpt2, "mistral": mistral, "gemma": gemma}


def make(name: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name]()
    assert model.config._attn_implementation == "sdpa"
    return model.train()


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    return [
        Example(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist(), start)
        for length, start in [(9, 3), (3, 2), (14, 10), (7, 1)]
    ]


def loss_and_gradients(model: PreTrainedModel, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    loss = answer_loss(model(**inputs, use_cache=False), batch["labels"])
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", PACKED])
@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_padded(name: str, attention: str) -> None:
    model = make(name)
    wanted, padded = loss_and_gradients(model, pad(examples(), 0))
    if attention == PACKED:
        assert use_packed_attention(model) and model.config._attn_implementation == PACKED
    assert packs(model) and model.training
    loss, packed = loss_and_gradients(model, pack(examples()))
    # fp32, sums in another order: a few roundings.
    assert abs(loss - wanted) <= 2e-6 * abs(wanted)
    assert packed.keys() == padded.keys() and packed
    for key in packed:
        assert (packed[key] - padded[key]).norm() <= 1e-5 * padded[key].norm() + 1e-7, key


@pytest.mark.parametrize("name", ["mistral", "gemma"])
def test_the_window_matters_in_these_tests(name: str) -> None:
    """Without the window the loss is another, so the test above would see it missing."""
    model = make(name)
    batch = pack(examples())
    windowed, _ = loss_and_gradients(model, batch)
    model.config.sliding_window = 64
    for module in model.modules():
        if getattr(module, "sliding_window", None):
            module.sliding_window = 64
    use_packed_attention(model)
    assert abs(loss_and_gradients(model, batch)[0] - windowed) > 1e-4


def test_packed_attention_in_bf16_keeps_the_dtype() -> None:
    model = make("llama").to(torch.bfloat16).eval()
    batch = {key: value for key, value in pack(examples()).items() if key != "labels"}
    # With a cache transformers builds no block-diagonal mask, so packed batches are run without.
    plain = model(**batch, use_cache=False).logits
    assert use_packed_attention(model)
    packed = model(**batch, use_cache=False).logits
    assert packed.dtype == torch.bfloat16
    assert (packed - plain).float().norm() <= 2e-2 * plain.float().norm()


def test_packed_attention_without_lengths_is_sdpa() -> None:
    model = make("llama").eval()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    plain = model(input_ids=ids, attention_mask=mask).logits
    use_packed_attention(model)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, plain)


def test_other_attention_stays() -> None:
    model = make("llama")
    model.set_attn_implementation("eager")
    assert not use_packed_attention(model)
    assert model.config._attn_implementation == "eager"


def test_packed_attention_costs_no_square_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from multisbora import attention

    seen: list[tuple[int, bool]] = []

    def spy(module: Any, query: Any, key: Any, value: Any, mask: Any, **_: Any) -> tuple[torch.Tensor, None]:
        seen.append((query.shape[2], mask is None))
        return query.transpose(1, 2), None

    monkeypatch.setattr(attention, "sdpa_attention_forward", spy)
    query = torch.randn(1, 2, 9, 4)
    output, _ = packed_attention(torch.nn.Module(), query, query, query, None, [2, 4, 3], sliding_window=3)
    assert seen == [(2, True), (4, False), (3, True)]
    assert torch.equal(output, query.transpose(1, 2))


def forward_without(model: PreTrainedModel, *dropped: str) -> PreTrainedModel:
    """A model that ignores some of its arguments."""
    inner = model.forward

    def forward(**kwargs: Any) -> Any:
        return inner(**{key: value for key, value in kwargs.items() if key not in dropped})

    model.forward = forward  # type: ignore[method-assign]
    return model


def test_packs_sees_a_model_that_leaks() -> None:
    assert packs(make("llama"))
    assert not packs(forward_without(make("llama"), "position_ids"))
    leaky = make("llama")
    use_packed_attention(leaky)
    assert not packs(forward_without(leaky, "example_lengths", "position_ids"))


def test_packs_sees_a_model_that_gives_all_logits() -> None:
    assert not packs(forward_without(make("llama"), "logits_to_keep"))


def test_packs_sees_a_model_that_takes_no_positions() -> None:
    model = make("llama")
    inner = model.forward
    model.forward = lambda input_ids, use_cache: inner(input_ids)  # type: ignore[method-assign]
    assert not packs(model.eval())
    assert not model.training
