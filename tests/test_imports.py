"""The import rule: from later to earlier in the order that pyproject.toml states, and no sibling's private names."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "multisbora").rglob("*.py"))


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """import-linter on the package under `root`, with the contracts of `root`'s pyproject.toml."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    # The folder goes first, before the installed package of the same name.
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def private_uses(source: str) -> list[str]:
    """The private names of other modules of the package that `source`, a module of it, imports or reaches into."""
    tree = ast.parse(source)
    modules = set()  # local names of modules of the package
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "multisbora"):
            for name in node.names:
                if name.name.startswith("_") and not name.name.startswith("__"):
                    found.append(name.name)
                if node.module in (None, "multisbora"):
                    modules.add(name.asname or name.name)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            continue
        if node.value.id in modules and node.attr.startswith("_") and not node.attr.startswith("__"):
            found.append(f"{node.value.id}.{node.attr}")
    return found


def test_the_package_keeps_the_import_rule() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "line", "message"),
    [
        ("errors", "from .merge import merge", "Imports go from later to earlier BROKEN"),
        (
            "verify.full",
            "def late():\n    from ..delta import delta",
            "The verifier shares no code with what it proves BROKEN",
        ),
        ("plan", "import torch", "What works on files needs no deep-learning library BROKEN"),
        ("unlisted", "", "modules are not listed as layers"),
    ],
)
def test_a_breach_is_found(module: str, line: str, message: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "multisbora", tmp_path / "multisbora", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "multisbora" / f"{module.replace('.', '/')}.py").open("a") as file:
        file.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert f"multisbora.{module}" in done.stdout + done.stderr


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_private_name_of_a_sibling(path: Path) -> None:
    assert private_uses(path.read_text(encoding="utf-8")) == []


def test_private_uses_are_seen() -> None:
    assert private_uses("from .merge import _cells, merge") == ["_cells"]
    assert private_uses("from multisbora.merge import _cells") == ["_cells"]
    assert private_uses("from . import merge\nmerge._cells") == ["merge._cells"]
    assert private_uses("import json\nfrom . import merge\njson._x, merge.cells, merge.__doc__") == []


def test_there_are_modules_to_check() -> None:
    assert len(MODULES) > 10
