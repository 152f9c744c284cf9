"""Who owns a cell where fa and fb meet in one composition: claims, training, merge, proof and export say the same.

Random histories of a registry are held against an oracle that has every matrix as a dense table of cells, made from
the design's words alone: a task claims whole lines, and of a cell on two lines the earlier claim keeps it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from builders import tiny_gpt2, tiny_llama, tree, write_adapter
from hypothesis import currently_in_test_context, event, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

from multisbora.allocator import allocate
from multisbora.checkpoint import RECEIPT_FILE
from multisbora.errors import AdapterError, AllocationError
from multisbora.export import export_peft_lora
from multisbora.geometry import Geometry, Matrix, from_checkpoint
from multisbora.loading import load_model
from multisbora.merge import merge
from multisbora.registry import Registry
from multisbora.stream import fingerprint
from multisbora.tuner import SboraLayer
from multisbora.verify import verify

KINDS = {"llama": ("q_proj", "k_proj", "down_proj"), "gpt2": ("c_attn", "c_fc", "c_proj")}
AXES = {"fa": 1, "fb": 0}  # of an (out, in) matrix: fa claims columns, fb rows
LAMBDAS = (1.0, 0.0, -1.0, 0.37, -1.3, 2.5)
COMPOSITIONS = ("one", "two")
IDS = torch.arange(3, 40)[None]
# Live, an update is a product of its own, which fp32 sums in another order; of the largest logit.
LIVE_TOLERANCE = 1e-5


# --- a base, and what can happen to its registry -------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """A tiny model on disk. A tenth of its weights are -0.0, which adding nothing would turn into +0.0."""

    folder: Path
    family: str

    @classmethod
    def make(cls, folder: Path, name: str) -> Base:
        family, dtype = name.split()
        if family == "llama":
            sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
            tiny_llama(folder, dtype=dtype, num_key_value_heads=1, **sizes)
        else:
            tiny_gpt2(folder, dtype=dtype, n_embd=12, n_layer=1)
        state, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
        for tensor in state.values():
            if tensor.dim() == 2:
                tensor[torch.rand(tensor.shape, generator=generator) < 0.1] = -0.0
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return cls(folder, family)

    # No fields: hypothesis prints those of every argument of a test that fails.

    @cached_property
    def geometry(self) -> Geometry:
        return from_checkpoint(self.folder)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.folder, self.geometry)

    @cached_property
    def state(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "model.safetensors")

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.state.values())).dtype

    def matrices(self, kinds: Sequence[int]) -> list[Matrix]:
        wanted = [KINDS[self.family][kind] for kind in kinds]
        return [matrix for matrix in self.geometry.matrices if matrix.module.rpartition(".")[2] in wanted]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    folder = tmp_path_factory.mktemp("bases")
    names = ("llama float32", "llama bfloat16", "llama float16", "gpt2 float32", "gpt2 bfloat16")
    return {name: Base.make(folder / name.replace(" ", "-"), name) for name in names}


@dataclass(frozen=True)
class Give:
    """A new task; `kinds` are its targets."""

    variant: str
    rank: int
    kinds: tuple[int, ...]
    compositions: tuple[str, ...]
    use_rslora: bool = False


@dataclass(frozen=True)
class Join:
    """A task that holds claims shall be in one more composition, with the same ones. `which` counts from the latest."""

    which: int
    composition: str


@dataclass(frozen=True)
class Release:
    """A task gives its claims back: in one composition, or in all of them."""

    which: int
    composition: str | None


@dataclass(frozen=True)
class Protect:
    """Some channels of one kind of matrix are never to be owned."""

    axis: int
    kind: int
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Unprotect:
    """They may be, again."""


Step = Give | Join | Release | Protect | Unprotect

some_kinds = st.sets(st.integers(0, 2), min_size=1).map(lambda kinds: tuple(sorted(kinds)))
some_compositions = st.sampled_from([("one",), ("two",), COMPOSITIONS])
gives = st.builds(Give, st.sampled_from(["fa", "fb"]), st.integers(1, 3), some_kinds, some_compositions, st.booleans())
protects = st.builds(
    Protect, st.integers(0, 1), st.integers(0, 2), st.sets(st.integers(0, 7), min_size=1, max_size=2).map(tuple)
)
others = st.one_of(
    st.builds(Release, st.integers(0, 5), st.sampled_from([None, *COMPOSITIONS])),
    st.builds(Join, st.integers(0, 5), st.sampled_from(COMPOSITIONS)),
    protects,
    st.just(Unprotect()),
)


@st.composite
def histories(draw: st.DrawFn) -> list[Step]:
    """Perhaps a protection, two tasks that cross in composition "one" and stay, and whatever comes between more."""
    variant, kinds = draw(st.sampled_from(["fa", "fb"])), draw(some_kinds)
    shared = (*kinds, *(kind for kind in draw(some_kinds) if kind not in kinds))
    first = Give(variant, draw(st.integers(1, 3)), kinds, draw(st.sampled_from([("one",), COMPOSITIONS])))
    other = "fb" if variant == "fa" else "fa"
    second = Give(other, draw(st.integers(1, 3)), shared, draw(st.sampled_from([("one",), COMPOSITIONS])))
    steps: list[Step] = [*draw(st.lists(protects, max_size=2)), first, second]
    for new in draw(st.lists(gives, max_size=4)):
        steps += [*draw(st.lists(others, max_size=2)), new]
    return steps + draw(st.lists(others, max_size=2))


# --- the oracle ------------------------------------------------------------------------------------------------------


def lines(shape: tuple[int, int], axis: int, indices: Sequence[int]) -> np.ndarray:
    """(out, in), True on whole rows (axis 0) or columns (axis 1)."""
    found = np.zeros(shape, np.bool_)
    for index in indices:
        if axis == 0:
            found[index, :] = True
        else:
            found[:, index] = True
    return found


@dataclass
class Held:
    """A task as the oracle sees it: the cells on its lines, and those of them that are its own, by module.

    `met` are the earlier members of its compositions when it was claimed: it trains without the cells on their lines,
    whatever becomes of them.
    """

    name: str
    asked: Give
    claims: Any  # TaskClaims
    compositions: set[str]
    lines: dict[str, np.ndarray]
    owned: dict[str, np.ndarray]
    met: set[str]

    @property
    def number(self) -> int:
        return int(self.name.removeprefix("task"))

    @property
    def scaling(self) -> float:
        return 8 / (math.sqrt(self.asked.rank) if self.asked.use_rslora else self.asked.rank)

    def of_values(self, module: str, table: np.ndarray) -> np.ndarray:
        """A table of cells in the layout of the trained values."""
        return table.take(self.claims.regions[module].indices, axis=AXES[self.asked.variant])


@dataclass
class Mix:
    """A history, step by step in a registry and in the oracle. The oracle says beforehand what is to be refused."""

    base: Base
    registry: Registry
    live: dict[str, Held] = field(default_factory=dict)  # earliest claim first
    protected: dict[tuple[str, int], set[int]] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    given: int = 0

    def do(self, step: Step) -> None:
        kept = list(self.live)[:2]  # the crossing that `histories` promises
        if isinstance(step, Give):
            self.give(step)
        elif isinstance(step, Protect):
            self.protect(step)
        elif isinstance(step, Unprotect):
            if self.protected:
                self.registry.unprotect(self.model)
                self.protected = {}
                self.seen.add("unprotected")
        elif isinstance(step, Join):
            self.join(list(self.live.values())[-1 - step.which % len(self.live)], step.composition)
        elif free := [held for held in self.live.values() if held.name not in kept]:
            held = free[-1 - step.which % len(free)]
            if step.composition is None or step.composition in held.compositions:
                self.registry.release(self.model, held.name, step.composition)
                held.compositions -= {step.composition} if step.composition else set(COMPOSITIONS)
                self.seen.add("released in one" if held.compositions else "released")
                if not held.compositions:
                    del self.live[held.name]

    @property
    def model(self) -> str:
        return self.base.geometry.model

    def guarded(self, matrix: Matrix, axis: int) -> np.ndarray:
        return lines(matrix.shape, axis, sorted(self.protected.get((matrix.module, axis), ())))

    def give(self, step: Give) -> None:
        name, axis, matrices = f"task{self.given}", AXES[step.variant], self.base.matrices(step.kinds)
        self.given += 1
        earlier = [held for held in self.live.values() if held.compositions & set(step.compositions)]
        not_mine, possible = {}, True
        for matrix in matrices:
            nobody = self.guarded(matrix, 0) | self.guarded(matrix, 1)
            before = [held for held in earlier if matrix.module in held.lines]
            not_mine[matrix.module] = nobody | np.any([nobody, *(held.lines[matrix.module] for held in before)], axis=0)
            on_axis = [self.guarded(matrix, axis)]
            on_axis += [held.lines[matrix.module] for held in before if held.asked.variant == step.variant]
            free = ~np.any(on_axis, axis=0).all(axis=1 - axis)
            left = ~not_mine[matrix.module].take(np.flatnonzero(free), axis=axis)
            possible &= int(free.sum()) >= step.rank and bool(left.any())

        def call() -> Any:
            return allocate(
                self.registry,
                self.base.geometry,
                variant=step.variant,  # type: ignore[arg-type]
                rank=step.rank,
                composition={composition: [name] for composition in step.compositions},
                target_modules=[KINDS[self.base.family][kind] for kind in step.kinds],
            )

        if not possible:
            self.seen.add("full")
            with pytest.raises(AllocationError):
                call()
            return
        claims = call().tasks[name]
        own = {m.module: lines(m.shape, axis, claims.regions[m.module].indices) for m in matrices}
        owned = {module: own[module] & ~not_mine[module] for module in own}
        met = {held.name for held in earlier}
        self.live[name] = Held(name, step, claims, set(step.compositions), own, owned, met)

    def join(self, held: Held, composition: str) -> None:
        """Refused where lines of it and of a member meet, and neither made room for the other when it was claimed."""
        if composition in held.compositions:
            return
        clash = False
        for other in self.live.values():
            if other is held or composition not in other.compositions:
                continue
            first, second = sorted((held, other), key=lambda one: one.number)
            meet = any((second.lines[m] & first.lines[m]).any() for m in first.lines.keys() & second.lines.keys())
            clash |= meet and first.name not in second.met
        options: dict[str, Any] = dict(variant=held.asked.variant, rank=held.asked.rank, composition=composition)
        options["target_modules"] = [KINDS[self.base.family][kind] for kind in held.asked.kinds]
        if clash:
            self.seen.add("join refused")
            with pytest.raises(AllocationError, match=f"{held.name!r} cannot join composition '{composition}'"):
                allocate(self.registry, self.base.geometry, [held.name], **options)
            return
        allocate(self.registry, self.base.geometry, [held.name], **options)
        held.compositions.add(composition)
        self.seen.add("joined")

    def protect(self, step: Protect) -> None:
        matrices = [m for m in self.base.matrices([step.kind]) if max(step.channels) < m.shape[step.axis]]
        new = {m: set(step.channels) - self.protected.get((m.module, step.axis), set()) for m in matrices}
        touched = any(
            (lines(matrix.shape, step.axis, sorted(channels)) & held.lines[matrix.module]).any()
            for matrix, channels in new.items()
            for held in self.live.values()
            if matrix.module in held.lines
        )
        channels = {("rows", "columns")[step.axis]: {matrix.module: list(step.channels) for matrix in matrices}}
        if touched:
            self.seen.add("protection refused")
            with pytest.raises(AllocationError, match="are held or crossed by"):
                self.registry.protect(self.base.geometry, **channels)
            return
        self.registry.protect(self.base.geometry, **channels)
        self.seen.add("protected")
        for matrix in matrices:
            self.protected.setdefault((matrix.module, step.axis), set()).update(step.channels)

    def members(self, composition: str) -> list[Held]:
        return [held for held in self.live.values() if composition in held.compositions]

    def write(self, folder: Path) -> dict[str, Path]:
        """An adapter a task, with random values in its own cells."""
        return {
            name: write_adapter(
                folder / name,
                self.base.geometry,
                name,
                variant=held.asked.variant,
                rank=held.asked.rank,
                indices={module: region.indices for module, region in held.claims.regions.items()},
                excluded={m: region.excluded for m, region in held.claims.regions.items() if region.excluded},
                seed=held.number,
                use_rslora=held.asked.use_rslora,
                base_fingerprint=self.base.fingerprint,
                claim_digest=held.claims.digest,
                base_model_name_or_path=str(self.base.folder),  # or PEFT asks the hub for it
            )
            for name, held in self.live.items()
        }

    def update(self, held: Held, folder: Path, module: str, weight: float) -> np.ndarray:
        """lambda * s * values in the cells of a task, 0 in all others; (out, in), fp32."""
        values = load_numpy(folder / "adapter_model.safetensors")[f"base_model.model.{module}.sbora_values"]
        found = np.zeros(held.owned[module].shape, np.float32)
        for position, index in enumerate(held.claims.regions[module].indices):
            if held.asked.variant == "fa":
                found[:, index] = values[:, position]
            else:
                found[index, :] = values[position, :]
        return np.where(held.owned[module], found * np.float32(weight * held.scaling), np.float32(0))

    def expected(self, adapters: Mapping[str, Path], weights: Mapping[str, float]) -> dict[str, torch.Tensor]:
        """What a merge of these tasks has to be. A task at 0 leaves its cells as they are."""
        found = {name: tensor.clone() for name, tensor in self.base.state.items()}
        for name, weight in weights.items():
            held = self.live[name]
            for module, owned in held.owned.items():
                matrix = self.base.geometry.find(module)
                update = torch.from_numpy(self.update(held, adapters[name], module, weight))
                before, after = self.base.state[matrix.tensor], found[matrix.tensor]
                if self.base.family == "gpt2":  # stored transposed; these are views
                    before, after = before.T, after.T
                cells = torch.from_numpy(owned)
                if weight:
                    after[cells] = (before[cells].float() + update[cells]).to(after.dtype)
        return found


@contextmanager
def played(base: Base, steps: Sequence[Step]) -> Iterator[Mix]:
    """A history, in a registry in memory."""
    with Registry.open("sqlite://") as registry:
        mix = Mix(base, registry)
        for step in steps:
            mix.do(step)
        for what in sorted(mix.seen) if currently_in_test_context() else ():
            event(what)
        yield mix


@dataclass(frozen=True)
class Plan:
    """A history, and what is to be merged after it."""

    steps: list[Step]
    composition: str
    left_out: list[bool]
    lambdas: list[float]

    def weights(self, mix: Mix, *, crossing: bool = False) -> dict[str, float]:
        """Tasks of the composition to be merged -> lambda; with `crossing`, the first two among them."""
        members = mix.members("one" if crossing else self.composition) or mix.members("one")
        chosen = [
            held
            for i, (held, out) in enumerate(zip(members, self.left_out, strict=False))
            if not out or (crossing and i < 2)
        ]
        return {held.name: self.lambdas[held.number] for held in chosen or members}


plans = st.builds(
    Plan,
    histories(),
    st.sampled_from(COMPOSITIONS),
    st.lists(st.booleans(), min_size=6, max_size=6),
    st.lists(st.sampled_from(LAMBDAS), min_size=6, max_size=6),
)


# Protected cells, both orders at a crossing, two compositions, a join refused; in the merges, one task is at 0.
FIXED: list[Step] = [
    Protect(0, 0, (2,)),
    Give("fa", 3, (0, 1), ("one",)),
    Give("fb", 2, (0, 2), COMPOSITIONS, True),
    Give("fb", 1, (0,), ("two",)),
    Give("fa", 2, (0, 1, 2), COMPOSITIONS),
    Join(3, "two"),  # of task0, whose columns task2 crosses without knowing of them
]
FIXED_PLAN = Plan(FIXED, "two", [False] * 6, [-1.3, 0.37, 1.0, 0.0, 1.0, 1.0])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def assert_bits(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(bits(found[name]), bits(tensor)), name


# --- who owns what ---------------------------------------------------------------------------------------------------


def assert_owners(mix: Mix) -> int:
    """The registry's claims are the oracle's, cell by cell; returns how many cells are masked."""
    masked = 0
    for composition in COMPOSITIONS:
        found = mix.registry.claims(mix.model, composition)
        assert set(found) == {held.name for held in mix.members(composition)}
        owners = {matrix.module: np.zeros(matrix.shape, np.int64) for matrix in mix.base.geometry.matrices}
        for name, claims in found.items():
            held = mix.live[name]
            assert claims.digest == held.claims.digest  # what an adapter carries stays true whatever comes after
            assert set(claims.regions) == set(held.owned)
            for module, region in claims.regions.items():
                shape = held.owned[module].shape
                axis = AXES[held.asked.variant]
                cells = lines(shape, axis, region.indices) & ~lines(shape, 1 - axis, region.excluded)
                assert np.array_equal(cells, held.owned[module]), (name, module)
                owners[module] += cells
                masked += int((held.lines[module] & ~cells).sum())
        for matrix in mix.base.geometry.matrices:
            assert owners[matrix.module].max() <= 1, (composition, matrix.module)
            for axis in (0, 1):
                assert not (owners[matrix.module][mix.guarded(matrix, axis)]).any()
    return masked


@settings(max_examples=20, deadline=None)
@given(steps=histories(), family=st.sampled_from(["llama float32", "gpt2 float32"]))
def test_no_cell_has_two_owners_and_the_earlier_claim_keeps_it(
    bases: dict[str, Base], steps: list[Step], family: str
) -> None:
    with played(bases[family], steps) as mix:
        assert assert_owners(mix) > 0


@pytest.mark.parametrize("name", ["llama float32", "gpt2 float32"])
def test_the_mixes_have_crossings(bases: dict[str, Base], name: str) -> None:
    """Counted by hand: row 2 of the first kind of matrix is protected, task3 comes last in both compositions."""
    with played(bases[name], FIXED) as mix:
        assert_owners(mix)
        assert mix.seen == {"protected", "join refused"}
        first, second, third = (mix.base.matrices([kind])[0].module for kind in range(3))
        masked = {
            (held.name, module): int((held.lines[module] & ~held.owned[module]).sum())
            for held in mix.live.values()
            for module in held.owned
        }
        expected = {("task0", first): 3, ("task0", second): 0, ("task2", first): 0}
        expected |= {("task1", first): 2 * 3, ("task1", third): 0}
        expected |= {("task3", first): 2 * (2 + 1 + 1), ("task3", second): 0, ("task3", third): 2 * 2}
        assert {key: masked[key] for key in expected} == expected


# --- files: merge, proof, export -------------------------------------------------------------------------------------


@settings(max_examples=5, deadline=None)
@given(plan=plans, order=st.randoms(use_true_random=False))
@example(plan=FIXED_PLAN, order=Random(0))
@pytest.mark.parametrize("name", ["llama float32", "llama bfloat16", "llama float16", "gpt2 float32", "gpt2 bfloat16"])
def test_any_subset_merges_into_its_owners_cells_alone(
    bases: dict[str, Base], tmp_path_factory: pytest.TempPathFactory, name: str, plan: Plan, order: Any
) -> None:
    folder = tmp_path_factory.mktemp("merge")
    with played(bases[name], plan.steps) as mix:
        adapters, weights = mix.write(folder), plan.weights(mix)
        merge(mix.base.folder, [adapters[task] for task in weights], weights, output=folder / "one")
        assert_bits(load_file(folder / "one" / "model.safetensors"), mix.expected(adapters, weights))
        shuffled = order.sample(sorted(weights), len(weights))
        merge(mix.base.folder, [adapters[task] for task in shuffled], weights, output=folder / "two")
        assert tree(folder / "one") == tree(folder / "two")


@settings(max_examples=5, deadline=None)
@given(plan=plans, data=st.data())
@pytest.mark.parametrize("name", ["llama bfloat16", "gpt2 float32"])
def test_one_bit_at_a_crossing_fails_the_proof(
    bases: dict[str, Base], tmp_path_factory: pytest.TempPathFactory, name: str, plan: Plan, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("proof")
    with played(bases[name], plan.steps) as mix:
        adapters, weights = mix.write(folder), plan.weights(mix, crossing=True)
        paths = [adapters[task] for task in weights]
        merge(mix.base.folder, paths, weights, output=folder / "out")
        proof = verify(folder / "out", mix.base.folder, paths[::-1])
        assert proof.ok, proof.problem
        merged = load_file(folder / "out" / "model.safetensors")
        changed = sum(int((bits(merged[key]) != bits(old)).sum()) for key, old in mix.base.state.items())
        assert (proof.cells_changed, proof.cells_outside_regions) == (changed, 0)
        for task in weights:
            assert proof.tasks[task].cells == sum(int(owned.sum()) for owned in mix.live[task].owned.values())
        # Cells on a line of a merged task that does not own them: an earlier one does, or nobody who is merged.
        crossings = [
            (module, int(row), int(column))
            for task in weights
            for module, line in mix.live[task].lines.items()
            for row, column in np.argwhere(line & ~mix.live[task].owned[module])
        ]
        module, row, column = data.draw(st.sampled_from(crossings))
        having = [t for t in weights if module in mix.live[t].owned and mix.live[t].owned[module][row, column]]
        event("owned" if having else "outside")
        stored = (column, row) if mix.base.family == "gpt2" else (row, column)
        tensor = f"{module}.weight"
        merged[tensor].view(bits(merged[tensor]).dtype)[stored] ^= 1 << data.draw(st.integers(0, 14))
        save_file(merged, folder / "out" / "model.safetensors", metadata={"format": "pt"})
        proof = verify(folder / "out", mix.base.folder, paths)
        whose = f"owned by {having[0]}" if having else "which no task owns"
        assert not proof.ok
        assert f"{tensor}: 1 wrong cells, first at row {stored[0]}, column {stored[1]}, {whose}:" in str(proof.problem)
        assert proof.cells_outside_regions == (0 if having else 1)


@settings(max_examples=5, deadline=None)
@given(plan=plans)
@example(plan=FIXED_PLAN)
@pytest.mark.parametrize("name", ["llama float32", "gpt2 float32"])
def test_the_sum_of_exported_loras_is_the_merged_update(
    bases: dict[str, Base], tmp_path_factory: pytest.TempPathFactory, name: str, plan: Plan
) -> None:
    folder = tmp_path_factory.mktemp("export")
    with played(bases[name], plan.steps) as mix:
        adapters, weights = mix.write(folder), dict.fromkeys(plan.weights(mix, crossing=True), 1.0)
        sums = {matrix.module: np.zeros(matrix.shape, np.float32) for matrix in mix.base.geometry.matrices}
        for task in weights:
            output = folder / f"{task}-lora"
            export_peft_lora(adapters[task], output, mix.base.geometry)
            config = json.loads((output / "adapter_config.json").read_text())
            assert (config["lora_alpha"], config["alpha_pattern"]) == (config["r"], config["rank_pattern"])
            assert config["use_rslora"] is False  # so that what PEFT adds is B @ A, times one
            factors = load_numpy(output / "adapter_model.safetensors")
            for module in mix.live[task].owned:
                lora_a, lora_b = (factors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
                product = lora_b @ lora_a
                assert np.array_equal(product, mix.update(mix.live[task], adapters[task], module, 1.0)), (task, module)
                sums[module] += product
        merge(mix.base.folder, [adapters[task] for task in weights], output=folder / "out")
        merged = load_file(folder / "out" / "model.safetensors")
        for matrix in mix.base.geometry.matrices:
            update = torch.from_numpy(sums[matrix.module])
            update = update.T if mix.base.family == "gpt2" else update
            assert torch.equal(mix.base.state[matrix.tensor] + update, merged[matrix.tensor]), matrix.module


@settings(max_examples=5, deadline=None)
@given(plan=plans, data=st.data())
@pytest.mark.parametrize("name", ["llama float32", "gpt2 float32"])
def test_a_value_in_another_tasks_cell_is_refused(
    bases: dict[str, Base], tmp_path_factory: pytest.TempPathFactory, name: str, plan: Plan, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("tampered")
    with played(bases[name], plan.steps) as mix:
        adapters, weights = mix.write(folder), plan.weights(mix, crossing=True)
        paths = [adapters[task] for task in weights]
        merge(mix.base.folder, paths, weights, output=folder / "out")
        masked = {
            (task, module): np.argwhere(mix.live[task].of_values(module, ~owned))
            for task in weights
            for module, owned in mix.live[task].owned.items()
        }
        task, module = data.draw(st.sampled_from([key for key, cells in masked.items() if len(cells)]))
        place = tuple(data.draw(st.sampled_from(masked[task, module].tolist())))
        file = adapters[task] / "adapter_model.safetensors"
        tensors = load_numpy(file)
        values = tensors[f"base_model.model.{module}.sbora_values"].copy()
        values[place] = data.draw(st.sampled_from([1e-30, -0.5, 3.0]))
        save_numpy({**tensors, f"base_model.model.{module}.sbora_values": values}, file, metadata={"format": "pt"})
        with pytest.raises(AdapterError) as refused:
            merge(mix.base.folder, paths, weights, output=folder / "again")
        assert str(file) in str(refused.value) and f"{module}: values are not zero in excluded" in str(refused.value)
        assert not (folder / "again").exists()
        proof = verify(folder / "out", mix.base.folder, paths)
        assert not proof.ok and str(proof.problem).startswith(f"{task}: ")
        # Whoever forges the receipt as well is found by the cells themselves.
        forged = {"adapter_digest": hashlib.sha256(file.read_bytes()).hexdigest()}
        receipt = folder / "out" / RECEIPT_FILE
        content = json.loads(receipt.read_bytes())
        content["tasks"][task] |= forged
        receipt.write_text(json.dumps(content))
        proof = verify(folder / "out", mix.base.folder, paths)
        assert not proof.ok and "not zero in cells that an earlier task owns" in str(proof.problem)


# --- the live model --------------------------------------------------------------------------------------------------


def layers(model: Any) -> dict[str, SboraLayer]:
    return {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, SboraLayer)}


def base_weights(model: Any) -> dict[str, torch.Tensor]:
    return {f"{module}.weight": layer.base_layer.weight.data for module, layer in layers(model).items()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@settings(max_examples=4, deadline=None)
@given(plan=plans, decay=st.sampled_from([0.0, 0.1]))
@example(plan=FIXED_PLAN, decay=0.1)
@pytest.mark.parametrize("name", ["llama float32", "llama bfloat16", "gpt2 float32"])
def test_training_never_writes_into_another_tasks_cell(
    bases: dict[str, Base], tmp_path_factory: pytest.TempPathFactory, name: str, plan: Plan, decay: float
) -> None:
    folder = tmp_path_factory.mktemp("live")
    with played(bases[name], plan.steps) as mix:
        adapters, weights = mix.write(folder), plan.weights(mix, crossing=True)
        model, _ = load_model(mix.base.folder, adapters=[adapters[task] for task in weights])
        loaded = {f"adapter{i}": task for i, task in enumerate(weights)}
        model.base_model.set_adapter(list(loaded))
        cells = {
            (adapter, module): torch.from_numpy(mix.live[task].of_values(module, owned))
            for adapter, task in loaded.items()
            for module, owned in mix.live[task].owned.items()
        }
        values = {key: layers(model)[key[1]].sbora_values[key[0]] for key in cells}
        assert any(not mine.all() for mine in cells.values())
        optimizer = torch.optim.AdamW(values.values(), lr=0.01, weight_decay=decay)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            for key, parameter in values.items():
                assert parameter.grad is not None and not parameter.grad[~cells[key]].any(), key
                assert parameter.grad[cells[key]].any(), key
            optimizer.step()
        for key, parameter in values.items():
            assert not parameter[~cells[key]].any() and parameter[cells[key]].all(), key
        model.save_pretrained(folder / "trained")
        trained = {task: folder / "trained" / adapter for adapter, task in loaded.items()}
        merge(mix.base.folder, list(trained.values()), weights, output=folder / "out")
        merged = load_file(folder / "out" / "model.safetensors")
        assert_bits(merged, mix.expected(trained, weights))
        proof = verify(folder / "out", mix.base.folder, list(trained.values()))
        assert proof.ok, proof.problem
        for adapter, task in loaded.items():
            model.base_model.set_weight(adapter, weights[task])
        expected = logits(load_model(folder / "out")[0])
        if mix.base.dtype == torch.float32:
            assert (logits(model) - expected).abs().max() <= LIVE_TOLERANCE * expected.abs().max()
        model.merge_adapter(adapter_names=list(loaded))
        assert_bits(base_weights(model), {key: merged[key] for key in base_weights(model)})
        assert torch.equal(logits(model), expected)
        model.unmerge_adapter()
        assert_bits(base_weights(model), {key: mix.base.state[key] for key in base_weights(model)})
