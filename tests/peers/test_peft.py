"""Stock PEFT merges the LoRA exports of all tasks, one after another, into our merged checkpoint.

Both compute W0 + lambda * s * values in fp32 and round once to the dtype. We multiply with fp32(lambda * s), PEFT with
s in the export and then with lambda: a last bit of the update in fp32 may differ. Two ways of PEFT round more to a
dtype of 16 bits: `safe_merge=True` the update before it is added, and `combination_type="cat"` both factors, lambda in
one of them, since the adapter that it makes has the base's dtype.
"""

from __future__ import annotations

import pytest
import torch
from composition import KINDS, VARIANTS, Composition, compose, stored, without_us
from distance import Distance, between
from safetensors import safe_open

from multisbora.export import export_peft_lora
from multisbora.geometry import from_checkpoint

pytestmark = pytest.mark.slow

WAYS = ("sequence", "reversed", "safe", "cat")
STOCK_PEFT = """
import json, sys
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
for job in json.load(open(sys.argv[1])):
    tasks, ways = list(job["loras"]), job["ways"]
    for way, output in ways.items():
        model = AutoModelForCausalLM.from_pretrained(job["base"])
        for task, folder in job["loras"].items():
            if isinstance(model, PeftModel):
                model.load_adapter(folder, adapter_name=task)
            else:
                model = PeftModel.from_pretrained(model, folder, adapter_name=task)
        for name, module in model.base_model.model.named_modules():
            if isinstance(module, LoraLayer):
                for task in tasks:
                    module.set_scale(task, job["weights"][task][name])
        names = tasks[::-1] if way == "reversed" else tasks
        if way == "cat":
            model.add_weighted_adapter(tasks, [1.0] * len(tasks), "all", combination_type="cat")
            names = ["all"]
        merged = model.merge_and_unload(safe_merge=way == "safe", adapter_names=names)
        state = {name: tensor.contiguous() for name, tensor in merged.state_dict().items() if name != "lm_head.weight"}
        save_file(state, output)
assert not [name for name in sys.modules if name.startswith("multisbora")]
"""


@pytest.fixture(scope="module")
def mixes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Composition]:
    """Every kind of model composed by us, and, in its folder, as "WAY.safetensors" by PEFT: one process for all."""
    folder = tmp_path_factory.mktemp("peft")
    mixes = {kind: compose(folder / kind, kind) for kind in KINDS}
    jobs = []
    for mix in mixes.values():
        loras = {task: mix.folder / f"{task}-lora" for task in mix.adapters}
        for task, lora in loras.items():
            export_peft_lora(mix.adapters[task], lora, mix.geometry)
        weights = {
            task: {matrix.module: mix.weight(task, matrix.tensor) for matrix in mix.geometry.select("all-linear")}
            for task in loras
        }
        jobs.append(
            {
                "base": str(mix.base),
                "loras": {task: str(lora) for task, lora in loras.items()},
                "weights": weights,
                "ways": {way: str(mix.folder / f"{way}.safetensors") for way in WAYS},
            }
        )
    without_us(STOCK_PEFT, jobs, folder)
    return mixes


@pytest.fixture(params=KINDS)
def mix(request: pytest.FixtureRequest, mixes: dict[str, Composition]) -> Composition:
    return mixes[request.param]


def distances(mix: Composition, way: str) -> tuple[Distance, Distance]:
    """(distance of ours from PEFT's in cells of the task at lambda 1, in all other owned cells)."""
    whole, rest = Distance(), Distance()
    number = list(VARIANTS).index("chat")
    with safe_open(mix.folder / f"{way}.safetensors", framework="pt") as theirs:
        for matrix in mix.geometry.select("all-linear"):
            base, ours = stored(mix.base, matrix.tensor), stored(mix.merged, matrix.tensor)
            other, owners = theirs.get_tensor(matrix.tensor), mix.owners(matrix)
            assert torch.equal(ours[owners < 0], other[owners < 0])
            updates = mix.updates(matrix)
            for mine, is_whole in ((owners == number, True), ((owners >= 0) & (owners != number), False)):
                operands = [base[mine], *(update[mine] for update in updates.values())]
                found = between(ours[mine], other[mine], *operands)
                whole, rest = (whole + found, rest) if is_whole else (whole, rest + found)
    print(f"{mix.folder.name}, {way}: at lambda 1 {whole}; elsewhere {rest}")
    return whole, rest


def is_short(mix: Composition) -> bool:
    """Whether the base has 16 bits a number."""
    return stored(mix.base, mix.geometry.matrices[0].tensor).element_size() == 2


def test_peft_merges_the_exports_into_our_merged_checkpoint(mix: Composition) -> None:
    whole, rest = distances(mix, "sequence")
    assert whole.cells and whole.differing == 0
    if is_short(mix):
        assert rest.differing <= rest.cells / 5000  # where a last bit of the update in fp32 decides a tie
        assert rest.spacings <= 1
    else:
        assert rest.differing <= rest.cells / 2
        assert rest.spacings <= 2


def test_the_order_of_tasks_is_nothing_to_peft_either(mix: Composition) -> None:
    one, other = (mix.folder / f"{way}.safetensors" for way in ("sequence", "reversed"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("way", ["safe", "cat"])
def test_the_ways_of_peft_that_round_to_the_dtype_first(mix: Composition, way: str) -> None:
    whole, rest = distances(mix, way)
    if is_short(mix):
        assert whole.differing > 0  # so that the way above is the one to compare with
        assert max(whole.spacings, rest.spacings) <= 2
    else:
        assert (mix.folder / f"{way}.safetensors").read_bytes() == (mix.folder / "sequence.safetensors").read_bytes()


def test_peft_leaves_every_other_tensor_as_the_base_has_it(mix: Composition) -> None:
    adapted = {matrix.tensor for matrix in from_checkpoint(mix.base).select("all-linear")}
    with safe_open(mix.folder / "sequence.safetensors", framework="pt") as theirs:
        others = [name for name in theirs.keys() if name not in adapted]  # noqa: SIM118 (a safe_open is no mapping)
        assert others
        for name in others:
            assert torch.equal(theirs.get_tensor(name), stored(mix.merged, name)), name
