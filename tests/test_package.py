"""What users install: the wheel's files, what an import costs, and the public names."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path

import pytest

import multisbora

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "sqlalchemy", "huggingface_hub", "numpy")


def run(code: str, cwd: Path, python_path: Path = ROOT) -> str:
    """What a fresh Python prints on stdout for `code`, with `python_path` before everything installed."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(python_path)!r})\n{code}"]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(source: Path, target: Path, *flags: str) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), *flags, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    build(ROOT, folder, "--wheel")
    return only(folder, "*.whl")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source archive built from the tree."""
    folder = tmp_path_factory.mktemp("sdist")
    build(ROOT, folder, "--sdist")
    return only(folder, "*.tar.gz")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files, laid out as in site-packages."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def data_files() -> dict[str, Path]:
    """Every card and recipe of the tree: its name in a wheel -> its path here."""
    found = {}
    for folder, pattern, name in (("registry/models", "*.json", "models"), ("tasks", "*.yaml", "tasks")):
        paths = sorted((ROOT / folder).rglob(pattern))
        assert paths, f"{folder} holds no {pattern}"
        found.update({f"multisbora/_data/{name}/{path.relative_to(ROOT / folder).as_posix()}": path for path in paths})
    return found


def package_files() -> dict[str, Path]:
    """Every file of the package here, less what Python caches: its name in a wheel -> its path."""
    paths = [path for path in sorted((ROOT / "multisbora").rglob("*")) if path.is_file()]
    return {path.relative_to(ROOT).as_posix(): path for path in paths if "__pycache__" not in path.parts}


def test_wheel_holds_the_package_its_data_and_nothing_else(wheel: Path) -> None:
    expected = package_files() | data_files()
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.startswith("multisbora-0.1.0.dist-info/")}
        assert names == set(expected)
        for name, path in expected.items():
            assert archive.read(name) == path.read_bytes(), name


def test_wheel_metadata(installed: Path) -> None:
    wheel: Distribution = PathDistribution(only(installed, "*.dist-info"))
    assert wheel.metadata["Name"] == "multisbora"
    assert wheel.version == multisbora.__version__
    assert wheel.metadata["Requires-Python"] == ">=3.10"
    assert wheel.metadata["License-Expression"] == "Apache-2.0"
    license_text = wheel.read_text("licenses/LICENSE")
    assert license_text is not None and license_text == (ROOT / "LICENSE").read_text()
    scripts = [(entry.name, entry.value) for entry in wheel.entry_points]
    assert scripts == [("multisbora", "multisbora.cli:main")]


def test_installed_wheel_finds_its_own_cards_and_recipes(installed: Path, tmp_path: Path) -> None:
    # A stranger's folder of this name beside the package must not be taken for ours.
    (installed / "tasks").mkdir()
    code = "from multisbora.resources import models_dir, tasks_dir; print(models_dir()); print(tasks_dir())"
    data = installed / "multisbora" / "_data"
    assert run(code, tmp_path, installed).splitlines() == [str(data / "models"), str(data / "tasks")]


def test_installed_wheel_makes_a_registry(installed: Path, tmp_path: Path) -> None:
    """Its migrations are found as package data, too."""
    code = (
        "from multisbora.registry import Registry\n"
        "with Registry.open('sqlite:///registry.db') as registry: print(registry.models())"
    )
    assert run(code, tmp_path, installed).strip() == "{}"
    assert (tmp_path / "registry.db").is_file()


def test_checkout_finds_its_own_cards_and_recipes(tmp_path: Path) -> None:
    code = "from multisbora.resources import models_dir, tasks_dir; print(models_dir()); print(tasks_dir())"
    assert run(code, tmp_path).splitlines() == [str(ROOT / "registry" / "models"), str(ROOT / "tasks")]


def test_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    source = only(tmp_path / "source", "multisbora-*")
    assert {path.name for path in source.iterdir()} <= {
        ".gitignore", "LICENSE", "PKG-INFO", "README.md", "docs", "multisbora", "pyproject.toml", "registry", "scripts",
        "tasks", "tests",
    }  # fmt: skip
    build(source, tmp_path, "--wheel")
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(only(tmp_path, "*.whl")) as theirs:
        assert sorted(theirs.namelist()) == sorted(ours.namelist())


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import multisbora", id="import"),
        pytest.param("import multisbora; dir(multisbora)", id="dir"),
        pytest.param("import multisbora.cli", id="cli"),
        pytest.param(
            "sys.argv = ['multisbora', '--help']\n"
            "from multisbora.cli import main\n"
            "try: code = main()\n"
            "except SystemExit as stop: code = stop.code\n"
            "assert not code, code",
            id="help",
        ),
    ],
)
def test_start_loads_nothing_heavy(code: str, tmp_path: Path) -> None:
    out = run(f"{code}\nprint('loaded:', *sorted(set({HEAVY!r}) & set(sys.modules)))", tmp_path)
    assert out.splitlines()[-1].split() == ["loaded:"]


def test_import_changes_nothing(tmp_path: Path) -> None:
    code = (
        "import logging, os, warnings\n"
        "state = lambda: (dict(os.environ), logging.root.handlers[:], logging.root.level, warnings.filters[:])\n"
        "before = state()\n"
        "import multisbora\n"
        "assert state() == before\n"
    )
    assert run(code, tmp_path) == ""


def test_public_names() -> None:
    assert sorted(multisbora.__all__) == ["Registry", "SboraConfig", "allocate", "composed", "merge", "train", "verify"]
    # Importing a submodule binds its name in the package: the functions of the same names must win all the same.
    for name in ("merge", "train", "verify"):
        importlib.import_module(f"multisbora.{name}")
    for name in multisbora.__all__:
        assert callable(getattr(multisbora, name)), name
    assert set(multisbora.__all__) <= set(dir(multisbora))
    with pytest.raises(AttributeError, match="no_such_name"):
        multisbora.no_such_name  # noqa: B018
