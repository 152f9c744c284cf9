"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import refused

from multisbora import publish as module
from multisbora.checkpoint import copy_file
from multisbora.errors import CheckpointError
from multisbora.publish import check_output, check_output_file, publish, publish_file, write_whole, writing


def test_publish_shows_all_or_nothing(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "er" / "out"
    with publish(output) as partial:
        (partial / "a").write_text("a")
        assert not output.exists()
        assert partial.parent == output.parent
    assert (output / "a").read_text() == "a"
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    with pytest.raises(KeyboardInterrupt), publish(tmp_path / "other") as partial:
        (partial / "a").write_text("a")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_publish_has_the_rights_of_an_ordinary_folder(tmp_path: Path) -> None:
    (tmp_path / "ordinary").mkdir()
    with publish(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_publish_takes_an_empty_folder_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with publish(tmp_path / "empty") as partial:
        (partial / "a").write_text("new")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("empty", "file", "link"):
        with pytest.raises(CheckpointError, match="exists and is not an empty folder"), publish(tmp_path / name):
            pytest.fail("the block must not run")
    assert (tmp_path / "empty" / "a").read_text() == "new"
    with pytest.raises(CheckpointError, match="exists and is not"), publish(tmp_path / "late"):
        (tmp_path / "late").mkdir()
        (tmp_path / "late" / "theirs").write_text("")
    assert [path.name for path in (tmp_path / "late").iterdir()] == ["theirs"]
    with pytest.raises(CheckpointError, match="cannot be made"), publish(tmp_path / "file" / "below"):
        pytest.fail("the block must not run")


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    message = r"out of disk space for .*it needs .* GB"
    with pytest.raises(CheckpointError, match=message), publish(tmp_path / "out", needed=1 << 60):
        pytest.fail("the block must not run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, number: int) -> None:
    message = r"out of disk space while writing .*out: nothing was kept"
    with pytest.raises(CheckpointError, match=message), publish(tmp_path / "out") as partial:
        (partial / "a").write_text("half")
        raise OSError(number, os.strerror(number))
    assert not list(tmp_path.iterdir())


def test_a_write_that_really_fails_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(100_000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="out of disk space"), publish(tmp_path / "out") as partial:
            copy_file(source, partial / "copy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_read_that_fails_is_not_called_a_write(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="gone cannot be read: No such file"),
        publish(tmp_path / "out") as partial,
    ):
        copy_file(tmp_path / "gone", partial / "copy")


def test_what_a_killed_process_left_is_swept_and_a_living_one_is_not(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\nfrom multisbora.publish import publish\n"
        "with publish(sys.argv[1]) as partial:\n    (partial / 'half').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(module.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "out"], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    [dead] = tmp_path.iterdir()
    assert dead.name.startswith(".out.")
    with publish(tmp_path / "out") as first:
        assert not dead.exists()
        with publish(tmp_path / "other"):
            assert first.exists()
        with pytest.raises(CheckpointError, match="exists"), publish(tmp_path / "out") as second:
            assert first.exists()
            (second / "a").write_text("")
            shutil.copytree(second, tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with publish_file(output) as partial:
        partial.write_text("whole")
        assert not output.exists()
    assert output.read_text() == "whole"
    assert output.stat().st_nlink == 1
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    with pytest.raises(KeyboardInterrupt), publish_file(tmp_path / "other") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_a_file_has_the_rights_of_an_ordinary_one(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_text("")
    with publish_file(tmp_path / "out") as partial:
        partial.write_text("")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("links", [True, False])
def test_no_file_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def refuses(*arguments: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuses)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "link"):
        with pytest.raises(CheckpointError, match=f"{name} exists: choose another"), publish_file(tmp_path / name):
            pytest.fail("the block must not run")
    with pytest.raises(CheckpointError, match="late exists"), publish_file(tmp_path / "late") as partial:
        partial.write_text("mine")
        (tmp_path / "late").write_text("theirs")
    assert (tmp_path / "late").read_text() == "theirs"
    with publish_file(tmp_path / "out") as partial:
        partial.write_text("mine")
    assert (tmp_path / "out").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "late", "link", "out"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path, number: int) -> None:
    words = "out of disk space while writing" if number == errno.ENOSPC else "out was not written: Input/output error"
    with pytest.raises(CheckpointError, match=words), publish_file(tmp_path / "out") as partial:
        partial.write_text("half")
        raise OSError(number, os.strerror(number))
    assert not list(tmp_path.iterdir())


def test_a_place_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", 1)
    check_output_file(tmp_path / "new" / "er", 1)
    (tmp_path / "empty" / "file").write_text("")
    refused(lambda: check_output(tmp_path / "empty"), CheckpointError, "is not an empty folder")
    refused(lambda: check_output_file(tmp_path / "empty"), CheckpointError, "empty exists: choose another output")
    for check in (check_output, check_output_file):
        refused(lambda check=check: check(tmp_path / "new", 1 << 60), CheckpointError, "out of disk space for", "GB")
        refused(lambda check=check: check(tmp_path / "empty" / "file" / "new"), CheckpointError, "file takes no files")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["file"]


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "receipt"
    for data in (b"one", b"", b"another"):
        write_whole(path, data)
        assert path.read_bytes() == data

    def fails(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"more")
    assert path.read_bytes() == b"another"
    assert [path.name for path in tmp_path.iterdir()] == ["receipt"]


def test_what_is_left_is_said(tmp_path: Path) -> None:
    def fail(number: int) -> None:
        with writing(tmp_path / "out", "all is as before"):
            raise OSError(number, os.strerror(number))

    refused(lambda: fail(errno.EDQUOT), CheckpointError, "out of disk space while writing", "out: all is as before;")
    refused(lambda: fail(errno.EROFS), CheckpointError, "out was not written: Read-only file system; all is as before")
