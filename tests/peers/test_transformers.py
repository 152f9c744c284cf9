"""Stock transformers loads a merged checkpoint, in a process without us, and computes what the live model does."""

from __future__ import annotations

import pytest
import torch
from composition import KINDS, Composition, compose, weights_of, without_us
from safetensors.torch import load_file

from multisbora import composed
from multisbora.loading import load_model

pytestmark = pytest.mark.slow

TOKENS = 24
PROMPTS = ("What is 3 plus 4? ", "Name a colour: ", "")
STOCK_TRANSFORMERS = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
for job in json.load(open(sys.argv[1])):
    model, said = AutoModelForCausalLM.from_pretrained(job["model"], output_loading_info=True)
    assert not any(said[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), said
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    answers = {}
    for number, prompt in enumerate(job["prompts"]):
        tokens = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]])
        answer = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=job["tokens"], do_sample=False
        )
        with torch.no_grad():
            answers |= {f"tokens{number}": answer, f"logits{number}": model(answer).logits}
    save_file(answers, job["output"])
assert not [name for name in sys.modules if name.startswith(("multisbora", "peft.tuners.sbora"))]
"""


@pytest.fixture(scope="module")
def mixes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Composition]:
    """Every kind of model composed by us, and, in its folder as "answers.safetensors", what stock transformers said."""
    folder = tmp_path_factory.mktemp("transformers")
    mixes = {kind: compose(folder / kind, kind) for kind in KINDS}
    jobs = [
        {
            "model": str(mix.merged),
            "prompts": PROMPTS,
            "tokens": TOKENS,
            "output": str(mix.folder / "answers.safetensors"),
        }
        for mix in mixes.values()
    ]
    without_us(STOCK_TRANSFORMERS, jobs, folder)
    return mixes


@pytest.fixture(params=KINDS)
def mix(request: pytest.FixtureRequest, mixes: dict[str, Composition]) -> Composition:
    return mixes[request.param]


def test_stock_transformers_generates_what_the_live_model_does(mix: Composition) -> None:
    answers = load_file(mix.folder / "answers.safetensors")
    first, *others = mix.adapters.values()
    model, tokenizer = load_model(first, base=mix.base, adapters=others)
    for number, prompt in enumerate(PROMPTS):
        prefix = [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
        tokens = torch.tensor([prefix])
        with composed(model, weights_of(mix.geometry)), torch.no_grad():
            live = model.generate(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=TOKENS, do_sample=False
            )
            logits = model(input_ids=live).logits
        assert torch.equal(live, answers[f"tokens{number}"])
        assert live.shape[1] > len(prefix)
        assert torch.equal(logits, answers[f"logits{number}"])  # the same weights, so the same products
        with composed(model, {}), torch.no_grad():
            assert not torch.equal(model(input_ids=live).logits, logits)
