"""Edits and merges that die or are refused at any call that changes a file: the old checkpoint, or the new one."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import edit_json, tiny_llama
from commands import refused as message_of
from faults import ERRORS, Case, calls, dies, moments, refused, short_writes, tree
from mix import write_mix
from safetensors.numpy import load_file, save_file

from multisbora import journal
from multisbora.edit import add, remove, reweight
from multisbora.errors import CheckpointError
from multisbora.journal import FOLDER, editing, reading, recover
from multisbora.merge import merge
from multisbora.receipt import Receipt

pytestmark = pytest.mark.usefixtures("unsynced")

Operation = Callable[[Path], object]
OPERATIONS = ("add rows", "add columns", "remove rows", "remove columns", "reweight rows", "remove the last")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "base", num_hidden_layers=1, shards=2)


@pytest.fixture(scope="module")
def tasks(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    variants = {"first": "fa", "rows": "fb", "columns": "fa"}
    found = write_mix(
        tmp_path_factory.mktemp("adapters"), base, variants, rank=2, target_modules=["q_proj", "o_proj", "down_proj"]
    )
    # The first one, which no operation touches, trained a norm whole beside its regions.
    weights = found["first"] / "adapter_model.safetensors"
    norm = {"base_model.model.model.norm.weight": np.full(32, 0.5, np.float32)}
    save_file(load_file(weights) | norm, weights, metadata={"format": "pt"})
    edit_json(found["first"] / "adapter_config.json", modules_to_save=["norm"])
    return found


@pytest.fixture(scope="module")
def cases(base: Path, tasks: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("cases")

    def case(name: str, present: list[str], act: Operation) -> Case:
        merge(base, [tasks[task] for task in present], output=folder / name, whole_modules="keep")
        return Case(folder / name, act)

    return {
        "add rows": case("add-rows", ["first"], lambda at: add(at, tasks["rows"], 0.5)),
        "add columns": case("add-columns", ["first", "rows"], lambda at: add(at, tasks["columns"])),
        "remove rows": case("remove-rows", ["first", "rows"], lambda at: remove(at, "rows")),
        "remove columns": case("remove-columns", ["columns", "rows"], lambda at: remove(at, "columns")),
        "reweight rows": case("reweight", ["first", "rows"], lambda at: reweight(at, tasks["rows"], -2)),
        "remove the last": case("last", ["rows"], lambda at: remove(at, "rows")),
    }


@pytest.mark.parametrize("name", OPERATIONS)
def test_killed_at_every_call(cases: dict[str, Case], tmp_path: Path, name: str) -> None:
    case, found = cases[name], []
    assert len(case.calls) > 20
    for number, (at, how) in enumerate(moments(case.calls)):
        folder = case.copy(tmp_path / str(number))
        assert dies(lambda folder=folder: case.act(folder), at, how)  # type: ignore[misc]
        left = tree(folder)
        if recover(folder):
            assert left != tree(folder)
        after = tree(folder)
        assert after in (case.old, case.new), f"{how} call {at}, {case.calls[at - 1]}"
        found.append(after == case.new)
        case.act(folder) if not found[-1] else None
        assert tree(folder) == case.new
        shutil.rmtree(folder)
    assert found == sorted(found)  # there is one moment from which on the edit counts
    assert 0 < sum(found) < len(found)


@pytest.mark.parametrize("name", ["add rows", "remove columns", "reweight rows"])
def test_killed_while_it_recovers(cases: dict[str, Case], tmp_path: Path, name: str) -> None:
    case, tried = cases[name], 0
    numbers = itertools.count()
    for at in range(1, len(case.calls) + 1, 8):
        folder = case.copy(tmp_path / "crashed")
        assert dies(lambda folder=folder: case.act(folder), at, "after")  # type: ignore[misc]
        cut_short = (folder / FOLDER).is_dir()
        twin = Path(shutil.copytree(folder, tmp_path / "twin"))
        names = calls(lambda twin=twin: recover(twin))  # type: ignore[misc]
        settled = tree(twin)
        assert settled == case.old if cut_short else settled in (case.old, case.new)
        for second, how in moments(names):
            crashed = Path(shutil.copytree(folder, tmp_path / str(next(numbers))))
            assert dies(lambda crashed=crashed: recover(crashed), second, how)  # type: ignore[misc]
            recover(crashed)
            assert tree(crashed) == settled
            shutil.rmtree(crashed)
            tried += 1
        shutil.rmtree(folder)
        shutil.rmtree(twin)
    assert tried > 40


def test_killed_again_and_again_while_it_recovers(cases: dict[str, Case], tmp_path: Path) -> None:
    draw = random.Random(0)
    for number in range(10):
        case = cases[draw.choice(OPERATIONS)]
        folder, act = case.copy(tmp_path / str(number)), case.act
        dies(lambda folder=folder, act=act: act(folder), draw.randint(1, len(case.calls)), "before")  # type: ignore[misc]
        while dies(lambda folder=folder: recover(folder), draw.randint(1, 40), "before"):  # type: ignore[misc]
            pass
        assert tree(folder) in (case.old, case.new)


@pytest.mark.parametrize("code", ERRORS, ids=[errno.errorcode[code] for code in ERRORS])
@pytest.mark.parametrize("name", OPERATIONS)
def test_refused_once_at_every_call(cases: dict[str, Case], tmp_path: Path, name: str, code: int) -> None:
    case, done = cases[name], []
    for at in range(1, len(case.calls) + 1):
        folder = case.copy(tmp_path / str(at))
        with refused(at, code) as hit:
            try:
                case.act(folder)
                done.append(True)
            except CheckpointError as error:
                done.append(False)
                assert "\n" not in str(error)
                assert os.strerror(code) in str(error)
                assert "all is as it was" in str(error)
        assert hit
        if done[-1]:  # only sweeping was refused, which the next command does
            recover(folder)
        assert tree(folder) == (case.new if done[-1] else case.old), f"call {at}, {hit}"
        shutil.rmtree(folder)
    counts = [at for at, name in enumerate(case.calls) if name == "rename"][-1]
    for at, name in enumerate(case.calls):  # to make a folder that is there may be refused in any way
        assert done[at] == (at > counts + 1 or (name == "mkdir" and at > 0))


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_disk_that_stays_full(cases: dict[str, Case], tmp_path: Path, name: str) -> None:
    """Putting back is refused, too; then whoever comes next does it."""
    case, seen = cases[name], set()
    for at in range(1, len(case.calls) + 1):
        folder = case.copy(tmp_path / str(at))
        done = False
        with refused(at, errno.ENOSPC, lasting=True):
            try:
                case.act(folder)
                done = True
            except CheckpointError as error:
                seen.add(next(kept for kept in ("all is as it was", "the next command") if kept in str(error)))
        recover(folder)
        assert tree(folder) == (case.new if done else case.old)
        shutil.rmtree(folder)
    assert seen == {"all is as it was", "the next command"}


@pytest.mark.parametrize("name", OPERATIONS)
def test_writes_that_come_short(cases: dict[str, Case], tmp_path: Path, name: str) -> None:
    for seed in range(3):
        folder = cases[name].copy(tmp_path / str(seed))
        with short_writes(seed):
            cases[name].act(folder)
        assert tree(folder) == cases[name].new


def test_a_merge_appears_whole_or_not_at_all(base: Path, tasks: dict[str, Path], tmp_path: Path) -> None:
    adapters = [tasks["rows"]]
    names = calls(lambda: merge(base, adapters, output=tmp_path / "whole", whole_modules="keep"))
    whole, seen = tree(tmp_path / "whole"), []
    for number, (at, how) in enumerate(moments(names)):
        place = tmp_path / str(number)
        place.mkdir()
        # Threads write: another call than in the counted run may be the `at`-th, and the last one may never come.
        dies(lambda place=place: merge(base, adapters, output=place / "out", whole_modules="keep"), at, how)  # type: ignore[misc]
        seen.append((place / "out").exists())
        if not seen[-1]:
            merge(base, adapters, output=place / "out", whole_modules="keep")
        assert tree(place / "out") == whole
        assert seen[-1] or [path.name for path in place.iterdir()] == ["out"]
        shutil.rmtree(place)
    assert 0 < sum(seen) < len(seen) / 3


@pytest.mark.parametrize("code", ERRORS, ids=[errno.errorcode[code] for code in ERRORS])
def test_a_merge_that_is_refused_leaves_nothing(base: Path, tasks: dict[str, Path], tmp_path: Path, code: int) -> None:
    adapters = list(tasks.values())
    names = calls(lambda: merge(base, adapters, output=tmp_path / "whole", whole_modules="keep"))
    whole, failed = tree(tmp_path / "whole"), 0
    for at in range(1, len(names) + 1):
        place = tmp_path / str(at)
        place.mkdir()
        with refused(at, code):
            try:
                merge(base, adapters, output=place / "out", whole_modules="keep")
            except CheckpointError as error:
                failed += 1
                assert "\n" not in str(error)
                # A rename that was done and a folder that then cannot be synced: all of it is there.
                assert not (place / "out").exists() or tree(place / "out") == whole
        if (place / "out").exists():
            assert tree(place / "out") == whole
        else:
            assert [path.name for path in place.iterdir()] == []
        shutil.rmtree(place)
    assert failed > len(names) / 2


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("only root may mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="only root may mount a file system")
@pytest.mark.parametrize("name", ["add rows", "add columns", "remove columns", "reweight rows"])
def test_a_disk_that_is_really_full(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(journal, "require_space", lambda folder, needed: None)
    monkeypatch.setattr("multisbora.change.require_space", lambda folder, needed: None)
    failed = 0
    with small_disk(tmp_path / "disk", 4 << 20) as disk:
        for pages in range(0, 40):
            folder = cases[name].copy(disk / str(pages))
            with (disk / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
                while True:
                    ballast.write(bytes(4096))
            os.truncate(disk / "ballast", max(0, (disk / "ballast").stat().st_size - 4096 * pages))
            done = True
            try:
                cases[name].act(folder)
            except CheckpointError as error:
                done = False
                failed += 1
                assert os.strerror(errno.ENOSPC) in str(error)
            (disk / "ballast").unlink()
            recover(folder)
            assert tree(folder) == (cases[name].new if done else cases[name].old)
            shutil.rmtree(folder)
            if done:
                break
    assert failed > 2
    assert done


def crashed(case: Case, folder: Path) -> Path:
    """A copy whose edit died right after the first of its weights were written."""
    begun = case.calls.index("rename")
    case.copy(folder)
    assert dies(lambda: case.act(folder), case.calls.index("pwrite", begun) + 1, "after")
    assert (folder / FOLDER).is_dir()
    left = tree(folder)
    assert any(case.old[name] != left[name] for name in left if name.startswith("model"))
    return folder


@pytest.mark.parametrize("name", ["add rows", "remove columns"])
def test_a_damaged_journal_touches_nothing(cases: dict[str, Case], tmp_path: Path, name: str) -> None:
    folder = crashed(cases[name], tmp_path / "crashed")
    files = [path for path in sorted((folder / FOLDER).iterdir())]
    if name.startswith("add"):
        files.append(folder / "multisbora_undo" / "rows.safetensors")
    assert len(files) == 5
    for path in files:
        data = path.read_bytes()
        for at in (0, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
            before = tree(folder)
            for use in (lambda: recover(folder), lambda: reading(folder).__enter__(), lambda: remove(folder, "first")):
                message_of(use, CheckpointError)
            assert tree(folder) == before
        path.write_bytes(data)
    assert recover(folder)
    assert tree(folder) == cases[name].old


def test_weights_that_are_others_than_the_journal_is_of(cases: dict[str, Case], tmp_path: Path) -> None:
    folder = crashed(cases["add rows"], tmp_path / "crashed")
    path = next(folder.glob("model*.safetensors"))
    path.write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"tp"'))
    for file in folder.glob("model*.safetensors"):
        file.write_bytes(file.read_bytes().replace(b'"format":"pt"', b'"format":"tp"'))
    before = tree(folder)
    message_of(lambda: recover(folder), CheckpointError, "was changed since")
    assert tree(folder) == before


def test_a_folder_that_cannot_be_written_says_so(cases: dict[str, Case], tmp_path: Path) -> None:
    folder = crashed(cases["add rows"], tmp_path / "crashed")
    before = tree(folder)
    with refused(1, errno.EROFS, lasting=True):
        message_of(lambda: reading(folder).__enter__(), CheckpointError, "was cut short", "Read-only file system")
    assert tree(folder) == before


def test_nothing_outside_of_the_folder_is_touched(cases: dict[str, Case], tmp_path: Path) -> None:
    """A checkpoint from somebody else may hold a journal, and links that lead elsewhere."""
    folder, other = crashed(cases["add rows"], tmp_path / "theirs"), cases["add rows"].copy(tmp_path / "ours")
    for path in folder.glob("model*.safetensors"):
        path.unlink()
        path.symlink_to(other / path.name)
    message_of(lambda: recover(folder), CheckpointError, "symbolic links")
    for path in folder.glob("model*.safetensors"):
        path.unlink()
        shutil.copy(other / path.name, path)
    shutil.rmtree(folder / FOLDER)
    shutil.rmtree(folder / "multisbora_undo")
    (folder / f"{FOLDER}.done").mkdir()
    (folder / "multisbora_undo").symlink_to(other)
    assert recover(folder)
    assert tree(other) == cases["add rows"].old


def test_one_is_told_when_something_was_put_right(cases: dict[str, Case], tmp_path: Path) -> None:
    told: list[str] = []
    folder = crashed(cases["add rows"], tmp_path / "crashed")
    with reading(folder, say=told.append):
        assert tree(folder) == cases["add rows"].old
    assert len(told) == 1
    assert "cut short" in told[0]
    with reading(folder, say=told.append):
        pass
    assert not recover(folder, told.append)
    assert len(told) == 1


def test_a_card_that_was_not_there_is_not_there_again(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["add rows"]
    folder = case.copy(tmp_path / "plain")
    (folder / "README.md").unlink()
    before, plain = tree(folder), Case(folder, case.act)
    for at in range(len(plain.calls) // 2, len(plain.calls)):
        copy = plain.copy(tmp_path / str(at))
        dies(lambda copy=copy: case.act(copy), at, "after")  # type: ignore[misc]
        recover(copy)
        assert tree(copy) in (before, plain.new)


def test_the_next_edit_starts_from_what_was_put_back(
    cases: dict[str, Case], tasks: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    folder = crashed(cases["add rows"], tmp_path / "crashed")
    add(folder, tasks["columns"], 0.5, allow_base_mismatch=False)
    merge(base, [tasks["first"], tasks["columns"]], {"columns": 0.5}, output=tmp_path / "whole", whole_modules="keep")
    assert tree(folder) == tree(tmp_path / "whole")


def test_a_merge_from_a_checkpoint_whose_edit_died(
    cases: dict[str, Case], tasks: dict[str, Path], tmp_path: Path
) -> None:
    case = cases["add rows"]
    folder = crashed(case, tmp_path / "crashed")
    merge(case.before, [tasks["columns"]], output=tmp_path / "one", allow_base_mismatch=True)
    merge(folder, [tasks["columns"]], output=tmp_path / "two", allow_base_mismatch=True)
    assert tree(folder) == case.old
    one, two = tree(tmp_path / "one"), tree(tmp_path / "two")
    assert {name: data for name, data in one.items() if name.startswith("model")} == {
        name: data for name, data in two.items() if name.startswith("model")
    }
    with editing(folder):
        message_of(lambda: merge(folder, [tasks["columns"]], output=tmp_path / "three"), CheckpointError)
    assert not (tmp_path / "three").exists()


def test_two_writers_cannot_meet(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["add rows"]
    folder = case.copy(tmp_path / "ours")
    with editing(folder):
        message_of(lambda: case.act(folder), CheckpointError, "being read or edited by another process")
        message_of(lambda: recover(folder), CheckpointError, "by another process")
    with reading(folder):
        message_of(lambda: case.act(folder), CheckpointError, "being read or edited by another process")
        with reading(folder, folder / "..", tmp_path / "none"):  # any number of readers, and what is no checkpoint
            pass
    assert tree(folder) == case.old
    case.act(folder)
    assert tree(folder) == case.new


def test_readers_wait_a_moment_for_a_writer(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cases["add rows"].copy(tmp_path / "ours")
    monkeypatch.setattr(journal, "_PATIENCE", 0.0)
    with editing(folder):
        message_of(lambda: reading(folder).__enter__(), CheckpointError, "is being edited by another process")
    monkeypatch.setattr(journal, "_PATIENCE", 60.0)
    held, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        with editing(folder):
            held.set()
            let_go.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)

    def pause(seconds: float) -> None:
        let_go.set()
        thread.join()

    monkeypatch.setattr("time.sleep", pause)
    with reading(folder):
        pass
    assert let_go.is_set()


def test_a_dry_run_is_a_reader(cases: dict[str, Case], tasks: dict[str, Path], tmp_path: Path) -> None:
    folder = cases["add rows"].copy(tmp_path / "ours")
    with reading(folder):
        assert calls(lambda: add(folder, tasks["rows"], dry_run=True)) == []
    with editing(folder):
        message_of(lambda: add(folder, tasks["rows"], dry_run=True), CheckpointError, "is being edited")


def test_folders_that_cannot_be_locked(cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases["add rows"]
    folder = case.copy(tmp_path / "ours")

    def flock(file: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with reading(folder):
        pass
    message_of(lambda: case.act(folder), CheckpointError, "cannot be locked", "copy it to a local disk")
    assert tree(folder) == case.old


def test_an_interrupt_from_the_keyboard_puts_all_back(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("multisbora.change.write_cells", stop)
    folder = cases["add rows"].copy(tmp_path / "ours")
    with pytest.raises(KeyboardInterrupt):
        cases["add rows"].act(folder)
    assert tree(folder) == cases["add rows"].old


def test_nothing_is_written_before_the_journal_is_on_the_disk(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of the calls: everything of the journal synced, renamed, the rename synced, and only then weights."""
    events: list[tuple[str, str]] = []
    write, rename = os.pwrite, os.rename

    def name_of(file: int) -> str:
        return os.readlink(f"/proc/self/fd/{file}")

    def noted_write(file: int, data: bytes, offset: int) -> int:
        events.append(("write", name_of(file)))
        return write(file, data, offset)

    def noted_rename(old: str, new: str) -> None:
        events.append(("rename", str(new)))
        rename(old, new)

    monkeypatch.setattr(os, "pwrite", noted_write)
    monkeypatch.setattr(os, "rename", noted_rename)
    monkeypatch.setattr(os, "fsync", lambda file: events.append(("sync", name_of(file))))
    for name in OPERATIONS:
        folder = cases[name].copy(tmp_path / name.replace(" ", "-"))
        events.clear()
        cases[name].act(folder)
        begun = events.index(("rename", str(folder / FOLDER)))
        counts = events.index(("rename", str(folder / f"{FOLDER}.done")))
        weights = [i for i, (event, path) in enumerate(events) if event == "write" and "/model" in path]
        assert begun < min(weights)
        assert max(weights) < counts
        written = {path for event, path in events[:begun] if event == "write"}
        assert len(written) >= 4  # the note, two receipts, the card
        synced = {path for event, path in events[:begun] if event == "sync"}
        assert synced >= written | {str(folder / f"{FOLDER}.partial")}
        assert ("sync", str(folder)) in events[begun : min(weights)]
        for path in {events[i][1] for i in weights}:
            last = max(i for i in weights if events[i][1] == path)
            assert ("sync", path) in events[last:counts]
        assert not any(event == "write" for event, _ in events[counts:])
        assert ("sync", str(folder)) in events[counts:]


def test_a_receipt_with_scores_comes_back_with_them(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["remove rows"]
    folder = case.copy(tmp_path / "scored")
    replace(Receipt.read(folder), scores={"rows": {"score": 1.0}}).write(folder)
    before = tree(folder)
    with refused(len(case.calls) // 2, errno.EIO), pytest.raises(CheckpointError):
        case.act(folder)
    assert tree(folder) == before
