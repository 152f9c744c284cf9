"""A merged checkpoint becomes a GGUF file by llama.cpp's own converter, and llama.cpp says with it what we say.

The converter and the runtime come from one source package, llama-cpp-python's; scripts/peers fetches and builds it.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import VOCABULARY, tiny_llama
from composition import KINDS, Composition, compose, compose_on
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

PEERS = Path(os.environ.get("MULTISBORA_PEERS") or Path(__file__).parents[2] / ".peers")
PYTHON = PEERS / "llama.cpp" / "bin" / "python"
CONVERTER = PEERS / "llama.cpp" / "source" / "convert_hf_to_gguf.py"
LLAMAS = [kind for kind in KINDS if kind in ("llama bfloat16", "real")]  # no GPT-2: its vocabulary must be the real one
TOKENS = 24
PROMPTS = ("What is the capital of France?", "def add(a, b):\n", "One, two, three,")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (PYTHON.exists() and CONVERTER.exists()),
        reason=f"llama.cpp is not in {PEERS}: scripts/peers builds it there",
    ),
]

LLAMA_CPP = """
import json, sys
import numpy
from llama_cpp import GGML_TYPE_F32, Llama
job = json.load(open(sys.argv[1]))
# Keys and values in fp32 as well, where 16 bits are the default.
model = Llama(
    job["gguf"], n_ctx=256, logits_all=True, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, flash_attn=False, verbose=False
)
answers = {}
for number, (text, tokens) in enumerate(zip(job["texts"], job["prompts"])):
    answers[f"text{number}"] = model.tokenize(text.encode(), add_bos=False, special=True)
    model.reset()
    model.eval(tokens)
    for _ in range(job["tokens"]):
        model.eval([int(model.scores[model.n_tokens - 1].argmax())])
    answers[f"tokens{number}"] = model.input_ids[: model.n_tokens].copy()
    answers[f"logits{number}"] = model.scores[: model.n_tokens].copy()
numpy.savez(job["output"], **answers)
"""


@pytest.fixture(scope="module", params=LLAMAS)
def mix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Composition:
    folder = tmp_path_factory.mktemp("gguf")
    if request.param == "real":
        return compose(folder, request.param)
    base = tiny_llama(folder / "base", dtype=request.param.split()[1])
    _byte_tokenizer().save_pretrained(base)
    return compose_on(folder, base, rank=4, spread=0.05)


@pytest.fixture(scope="module")
def prompts(mix: Composition) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(mix.merged)
    return [[tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)] for text in PROMPTS]


@pytest.fixture(scope="module")
def model(mix: Composition) -> Any:
    """The merged checkpoint in stock transformers, computed in fp32."""
    return AutoModelForCausalLM.from_pretrained(mix.merged, dtype=torch.float32).eval()


def convert(mix: Composition, kind: str) -> Path:
    path = mix.folder / f"{kind}.gguf"
    call(CONVERTER, mix.merged, "--outfile", path, "--outtype", kind)
    return path


def answer(gguf: Path, prompts: list[list[int]]) -> dict[str, np.ndarray]:
    """What llama.cpp says greedily: tokens with their prompt, and the logits at each."""
    output = gguf.with_suffix(".npz")
    job = {"gguf": str(gguf), "texts": PROMPTS, "prompts": prompts, "tokens": TOKENS, "output": str(output)}
    file = gguf.with_suffix(".json")
    file.write_text(json.dumps(job))
    call("-c", LLAMA_CPP, file)
    with np.load(output) as answers:
        return dict(answers)


def call(*arguments: str | Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [PYTHON, *arguments], env=environment | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    found: np.ndarray = model(torch.tensor(tokens, dtype=torch.long)[None]).logits[0].numpy()
    return found


def test_llama_cpp_says_what_transformers_says(mix: Composition, model: Any, prompts: list[list[int]]) -> None:
    answers = answer(convert(mix, "f32"), prompts)
    base = AutoModelForCausalLM.from_pretrained(mix.base, dtype=torch.float32).eval()
    for number, prompt in enumerate(prompts):
        tokens = answers[f"tokens{number}"]
        expected = logits(model, tokens)
        theirs = answers[f"logits{number}"]
        error = np.abs(theirs - expected).max() / np.abs(expected).max()
        changed = np.abs(logits(base, tokens) - expected).max() / np.abs(expected).max()
        print(f"{mix.folder.name}: logits within {error:.1e} of the largest; the base's are {changed:.1e} away")
        assert tokens[: len(prompt)].tolist() == prompt
        if mix.base.name != "base":  # the tiny models' tokenizer has no words
            assert answers[f"text{number}"].tolist() == prompt[1:]
        start = len(prompt)
        assert tokens[start:].tolist() == expected[start - 1 : -1].argmax(-1).tolist()  # each what we would say next
        assert error < 1e-4 < changed / 100  # fp32 sums in another order


def test_the_file_of_16_bits_holds_the_same_numbers(mix: Composition, model: Any, prompts: list[list[int]]) -> None:
    """Weights as they are in the checkpoint; llama.cpp then rounds what it multiplies them with, which we do not."""
    answers = answer(convert(mix, "auto"), prompts)
    for number in range(len(prompts)):
        expected = logits(model, answers[f"tokens{number}"])
        error = np.linalg.norm(answers[f"logits{number}"] - expected) / np.linalg.norm(expected)
        print(f"{mix.folder.name}: relative error of the logits {error:.1e}")
        assert error < 0.02


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """A vocabulary of bytes as Llama 2 has it, which the converter takes from any model."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256))]
    assert len(names) == VOCABULARY
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
