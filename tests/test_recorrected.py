"""Edits of corrected checkpoints: byte for byte what a corrected merge of the tasks that are there makes, whole or not
at all, and refused where what they need is not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import edit_json, tiny_llama
from commands import refused
from faults import Case, calls, dies, moments, tree
from faults import refused as failing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mix import write_mix
from test_corrected import kept_of, moments_of
from test_edit import KINDS, PATTERNS, VARIANTS, Models, Q, edit_at_random, untouched

from multisbora.checkpoint import RECEIPT_FILE
from multisbora.edit import add, remove, reweight
from multisbora.errors import CheckpointError, DataError, UsageError
from multisbora.journal import FOLDER as JOURNAL
from multisbora.journal import recover
from multisbora.kept import FOLDER
from multisbora.merge import merge
from multisbora.moments import Moments, Site
from multisbora.receipt import Receipt
from multisbora.verify import verify

pytestmark = pytest.mark.usefixtures("unsynced")

Operation = Callable[[Path], object]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="module")
def measured(models: Models) -> Callable[[str], dict[str, Moments]]:
    made: dict[str, dict[str, Moments]] = {}

    def get(kind: str) -> dict[str, Moments]:
        if kind not in made:
            made[kind] = moments_of(models.get(kind)[0], VARIANTS)
        return made[kind]

    return get


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_edits_in_any_order_end_in_what_a_merge_makes(
    models: Models, measured: Callable[[str], dict[str, Moments]], tmp_path: Path, data: st.DataObject
) -> None:
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    base, adapters = models.get(kind)
    shard_size, pattern, moments = KINDS[kind][2], PATTERNS[kind.split()[0]], measured(kind)
    number = st.sampled_from([1.0, 0.5, -1.25, 0.0, 3.0])
    weight = number | st.fixed_dictionaries({"default": number, f"({pattern})": number})
    folder = tmp_path / os.urandom(6).hex()
    options = {"method": "corrected", "moments": moments, "max_shard_size": shard_size}
    present = edit_at_random(data, folder, base, adapters, weight, options, {"moments": moments}, most=4)
    proof = verify(folder, base, [adapters[task] for task in present])
    assert proof.ok, proof.problem
    shutil.rmtree(folder)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_remove_of_add_is_nothing_for_every_task(
    models: Models, measured: Callable[[str], dict[str, Moments]], tmp_path: Path, kind: str
) -> None:
    base, adapters = models.get(kind)
    moments = measured(kind)
    for task, folder in adapters.items():
        others = [adapters[other] for other in adapters if other != task]
        output = tmp_path / task
        merge(base, others, output=output, method="corrected", moments=moments, max_shard_size=KINDS[kind][2])
        before = tree(output)
        edit = add(output, folder, -0.75, moments=moments)
        assert edit.cells > 0
        assert verify(output, base, [*others, folder]).ok
        remove(output, task)
        assert tree(output) == before


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "base", num_hidden_layers=1, shards=2)


TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def tasks(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    variants = {"first": "fa", "rows": "fb", "columns": "fa"}
    return write_mix(tmp_path_factory.mktemp("adapters"), base, variants, rank=2, target_modules=TARGETS)


@pytest.fixture(scope="module")
def known(base: Path) -> dict[str, Moments]:
    return moments_of(base, {"first": 0, "rows": 0, "columns": 0}, target_modules=TARGETS)


@pytest.fixture
def merged(base: Path, tasks: dict[str, Path], known: dict[str, Moments], tmp_path: Path) -> Path:
    """first and rows."""
    folder = tmp_path / "ours"
    merge(base, [tasks["first"], tasks["rows"]], output=folder, method="corrected", moments=known)
    return folder


OPERATIONS = ("add", "remove", "reweight", "remove the last")


@pytest.fixture(scope="module")
def cases(
    base: Path, tasks: dict[str, Path], known: dict[str, Moments], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("cases")

    def case(name: str, present: list[str], act: Operation) -> Case:
        paths = [tasks[task] for task in present]
        merge(base, paths, output=folder / name, method="corrected", moments=known)
        return Case(folder / name, act)

    return {
        "add": case("add", ["first", "rows"], lambda at: add(at, tasks["columns"], 0.5, moments=known)),
        "remove": case("remove", ["first", "rows", "columns"], lambda at: remove(at, "rows")),
        "reweight": case("reweight", ["first", "rows"], lambda at: reweight(at, tasks["rows"], -2)),
        "remove the last": case("last", ["rows"], lambda at: remove(at, "rows")),
    }


@pytest.mark.parametrize("name", OPERATIONS)
def test_killed_at_any_call(cases: dict[str, Case], tmp_path: Path, name: str) -> None:
    """Every third of them: test_journal takes all of the same calls, where tasks are merged plainly."""
    case, found = cases[name], []
    assert len(case.calls) > 20
    for number, (at, how) in enumerate([*moments(case.calls)][::3]):
        folder = case.copy(tmp_path / str(number))
        assert dies(lambda folder=folder: case.act(folder), at, how)  # type: ignore[misc]
        recover(folder)
        after = tree(folder)
        assert after in (case.old, case.new), f"{how} call {at}, {case.calls[at - 1]}"
        found.append(after == case.new)
        case.act(folder) if not found[-1] else None
        assert tree(folder) == case.new
        shutil.rmtree(folder)
    assert found == sorted(found)  # there is one moment from which on the edit counts
    assert 0 < sum(found) < len(found)


@pytest.mark.parametrize("name", ["add", "remove"])
def test_killed_while_it_recovers(cases: dict[str, Case], tmp_path: Path, name: str) -> None:
    case, tried = cases[name], 0
    for at in range(1, len(case.calls) + 1, 9):
        folder = case.copy(tmp_path / f"crashed-{at}")
        assert dies(lambda folder=folder: case.act(folder), at, "after")  # type: ignore[misc]
        if not (folder / JOURNAL).is_dir():
            continue
        twin = Path(shutil.copytree(folder, tmp_path / f"twin-{at}"))
        names = calls(lambda twin=twin: recover(twin))  # type: ignore[misc]
        for again in range(1, len(names) + 1, 5):
            copy = Path(shutil.copytree(folder, tmp_path / f"copy-{at}-{again}"))
            dies(lambda copy=copy: recover(copy), again, "half")  # type: ignore[misc]
            recover(copy)
            assert tree(copy) == case.old
            shutil.rmtree(copy)
            tried += 1
    assert tried > 10


@pytest.mark.parametrize("name", ["add", "remove", "reweight"])
def test_refused_by_the_system_at_any_call(cases: dict[str, Case], tmp_path: Path, name: str) -> None:
    case = cases[name]
    for at in range(1, len(case.calls) + 1, 2):
        folder = case.copy(tmp_path / str(at))
        try:
            with failing(at, 28) as hit:
                case.act(folder)
        except CheckpointError as error:
            assert "\n" not in str(error)
        recover(folder)
        assert hit
        assert tree(folder) in (case.old, case.new)
        shutil.rmtree(folder)


def test_the_last_task_may_go_and_any_may_come_back(
    merged: Path, tasks: dict[str, Path], known: dict[str, Moments]
) -> None:
    before = tree(merged)
    remove(merged, "first")
    assert len([*(merged / FOLDER).iterdir()]) == 1
    remove(merged, "rows")
    correction = Receipt.read(merged).correction
    assert correction is not None and correction.tasks == {}
    assert not (merged / FOLDER).exists()
    assert FOLDER not in (merged / "README.md").read_text()
    assert verify(merged, quick=True).ok
    add(merged, tasks["rows"], moments=known)
    add(merged, tasks["first"], moments=known)
    assert tree(merged) == before


def test_nothing_to_do(merged: Path, tasks: dict[str, Path]) -> None:
    before = tree(merged)
    edit = reweight(merged, tasks["rows"], 1.0)
    assert (edit.files, edit.tensors, edit.cells) == ((), (), 0)
    assert tree(merged) == before


def test_an_edit_writes_cells_of_all_tasks(merged: Path, tasks: dict[str, Path], known: dict[str, Moments]) -> None:
    before = Receipt.read(merged)
    edit = add(merged, tasks["columns"], moments=known)
    after = Receipt.read(merged)
    assert edit.receipt == after
    for module, region in before.tasks["first"].regions.items():
        assert after.tasks["first"].regions[module].digest != region.digest
        assert after.tasks["first"].regions[module].undo_digest == region.undo_digest
    assert sum(name.startswith(f"{FOLDER}/") for name in edit.files) == 5  # two go, three come


def test_matrices_of_others_alone_stay(base: Path, tmp_path: Path) -> None:
    """A task that has no cell in a matrix does not decide what is in it, not even by solving it again."""
    found = write_mix(tmp_path / "a", base, {"first": "fa", "rows": "fb"}, rank=2, target_modules=TARGETS)
    found |= write_mix(tmp_path / "b", base, {"late": "fa"}, rank=2, target_modules=["up_proj"])
    known = moments_of(base, found, target_modules=[*TARGETS, "up_proj"])
    folder = tmp_path / "ours"
    merge(base, [found["first"], found["rows"]], output=folder, method="corrected", moments=known)
    edit = add(folder, found["late"], moments=known)
    assert {name.split(".")[-2] for name in edit.tensors} == {"up_proj"}
    merge(base, [*found.values()], output=tmp_path / "twin", method="corrected", moments=known)
    assert tree(folder) == tree(tmp_path / "twin")


def test_moments_where_they_are_needed_alone(
    merged: Path, base: Path, tasks: dict[str, Path], known: dict[str, Moments], tmp_path: Path
) -> None:
    untouched(merged, lambda: add(merged, tasks["columns"]), DataError, "columns", "multisbora measure --tasks")
    some = {task: found for task, found in known.items() if task != "rows"}
    untouched(merged, lambda: add(merged, tasks["columns"], moments=some), DataError, "rows has none")
    other = {**known, "columns": replace(known["columns"], base_fingerprint="blake3:0")}
    untouched(merged, lambda: add(merged, tasks["columns"], moments=other), DataError, "columns", "another base")
    plain = tmp_path / "plain"
    merge(base, [tasks["first"]], output=plain)
    untouched(plain, lambda: add(plain, tasks["rows"], moments=known), UsageError, "merged plainly", "leave them out")


@pytest.mark.parametrize("what", ["a value", "tokens"])
def test_moments_that_were_measured_anew(
    merged: Path, tasks: dict[str, Path], known: dict[str, Moments], what: str
) -> None:
    """What is there was merged with others: solved with both, it would be neither."""
    site = known["first"].sites[Q]
    block = site.block.copy()
    block[np.ix_(*[np.arange(len(block))] * 2)] *= np.float32(1.001)
    sites = {**known["first"].sites, Q: Site(site.energy, site.response, site.channels, block)}
    first = replace(known["first"], sites=sites) if what == "a value" else replace(known["first"], tokens=65)
    call = lambda: add(merged, tasks["columns"], moments={**known, "first": first})  # noqa: E731
    if (
        what == "a value"
    ):  # where rows has a cell in every channel, all moments were kept, and nothing else is asked for
        call()
        return
    untouched(merged, call, DataError, "task first are not those", "merge all anew")


def test_moments_that_were_measured_anew_of_columns(
    base: Path, tasks: dict[str, Path], known: dict[str, Moments], tmp_path: Path
) -> None:
    folder = tmp_path / "ours"
    found = write_mix(tmp_path / "a", base, {"one": "fa", "two": "fa", "three": "fa"}, rank=2, target_modules=TARGETS)
    known = moments_of(base, found, target_modules=TARGETS)
    merge(base, [found["one"], found["two"]], output=folder, method="corrected", moments=known)
    site = known["one"].sites[Q]
    sites = {**known["one"].sites, Q: replace(site, block=site.block * np.float32(1.001))}
    anew = {**known, "one": replace(known["one"], sites=sites)}
    untouched(folder, lambda: add(folder, found["three"], moments=anew), DataError, "task one are not those")
    add(folder, found["three"], moments=known)


def test_the_same_rows_measured_once_more_at_more_columns(base: Path, tmp_path: Path) -> None:
    """As it is where a task is allocated after the others were merged: a wider block rounds what was there anew."""
    found = write_mix(tmp_path / "a", base, {"one": "fa", "two": "fa", "three": "fa"}, rank=2, target_modules=TARGETS)
    known, folder = moments_of(base, found, target_modules=TARGETS), tmp_path / "ours"
    merge(base, [found["one"], found["two"]], output=folder, method="corrected", moments=known)
    before, generator = tree(folder), np.random.default_rng(0)

    def anew(site: Site) -> Site:
        noise = generator.uniform(-1e-6, 1e-6, site.block.shape)
        return replace(site, block=(site.block * (1 + noise + noise.T)).astype(np.float32))

    later = {
        task: replace(each, sites={module: anew(site) for module, site in each.sites.items()})
        for task, each in known.items()
    }
    assert not np.array_equal(later["one"].sites[Q].block, known["one"].sites[Q].block)
    add(folder, found["three"], moments=later)
    proof = verify(folder, base, [*found.values()])
    assert proof.ok, proof.problem
    remove(folder, "three")
    assert tree(folder) == before


def test_a_receipt_that_does_not_fit_itself(merged: Path, tasks: dict[str, Path], known: dict[str, Moments]) -> None:
    content = json.loads((merged / RECEIPT_FILE).read_text())
    first = content["corrected"]["tasks"]["first"]
    for kept in ({"rows": first}, {**content["corrected"]["tasks"], "columns": first}):
        edit_json(merged / RECEIPT_FILE, corrected={**content["corrected"], "tasks": kept})
        untouched(merged, lambda: remove(merged, "first"), CheckpointError, "corrected.tasks")
        untouched(merged, lambda: reweight(merged, tasks["rows"], 2), CheckpointError, "corrected.tasks")
        assert "other tasks that were corrected" in str(verify(merged, quick=True).problem)
    for task, what in (("first", "indices"), ("rows", "excluded")):
        changed = json.loads(json.dumps(content["tasks"]))
        next(iter(changed[task]["regions"].values()))[what].append(10**6)
        edit_json(merged / RECEIPT_FILE, tasks=changed, corrected=content["corrected"])
        for act in (lambda: remove(merged, "first"), lambda: add(merged, tasks["columns"], moments=known)):
            untouched(merged, act, CheckpointError, "is damaged", task, "1000000 is outside an axis")


def test_damaged_files_are_refused(merged: Path, tasks: dict[str, Path], known: dict[str, Moments]) -> None:
    path = kept_of(merged, "first")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    untouched(merged, lambda: remove(merged, "rows"), CheckpointError, "was changed since it was written")
    path.unlink()
    untouched(merged, lambda: remove(merged, "rows"), CheckpointError, "cannot be read")
    path.write_bytes(data)
    (merged / FOLDER).rename(merged.parent / "elsewhere")
    (merged / FOLDER).symlink_to(merged.parent / "elsewhere")
    untouched(merged, lambda: remove(merged, "rows"), CheckpointError, "symbolic link")


def test_the_checkpoint_is_refused_for_another_adapter(merged: Path, tasks: dict[str, Path]) -> None:
    refused(lambda: reweight(merged, tasks["columns"], 1), UsageError, "'columns'")
    refused(lambda: add(merged, tasks["rows"]), UsageError, "holds task rows already")
