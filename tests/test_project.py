"""multisbora.yaml: read, overridden, written once, and a geometry without fetching the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from builders import tiny_llama

from multisbora import geometry, hub
from multisbora.errors import MultisboraError, UsageError
from multisbora.project import PROJECT_FILE, Project

CARD = "HuggingFaceTB/SmolLM2-135M"


def write(folder: Path, text: str) -> Path:
    (folder / PROJECT_FILE).write_text(text, encoding="utf-8")
    return folder


def refused(folder: Path, *words: str, **flags: object) -> None:
    with pytest.raises(UsageError) as caught:
        Project.load(folder, **flags)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_load(tmp_path: Path) -> None:
    project = Project.load(write(tmp_path, "model: a/b\nvariant: fb\nrank: 8\nalpha: 1e1\ntargets: [q_proj]\n"))
    assert project == Project(model="a/b", variant="fb", rank=8, alpha=10, targets=("q_proj",))
    assert project.registry == "sqlite:///registry/registry.db" and project.composition == "default"
    assert project.adapter("math") == Path("adapters/math")


def test_flags_go_before_the_file(tmp_path: Path) -> None:
    folder = write(tmp_path, "model: a/b\nrank: 8\nseed: 4\n")
    project = Project.load(folder, rank=16, variant=None, model="c/d", seed=0)
    assert project == Project(model="c/d", rank=16, seed=0)
    assert Project.load(folder, rank=None) == Project.load(folder) == Project(model="a/b", rank=8, seed=4)


def test_faults(tmp_path: Path) -> None:
    refused(tmp_path, "no multisbora.yaml in this folder", "multisbora init --model M")
    where = str(write(tmp_path, "modl: a/b\nrank: 0\nvariant: fc\n") / PROJECT_FILE)
    refused(tmp_path, where, "unknown key modl, did you mean model?", "model is missing", "rank", "variant")
    refused(write(tmp_path, "rank: 4\nmodel: [\n"), f"{where} is no valid YAML: line 3: ")
    refused(
        write(tmp_path, "model: a/b\nrank: 4\nrank: 8\n"), f"{where} is no valid YAML: line 3: 'rank' is given twice"
    )
    refused(write(tmp_path, ""), where, "is empty")
    refused(write(tmp_path, "just text\n"), where, "must hold `key: value` lines")
    refused(write(tmp_path, "model: a/b\n"), "rank", "greater than 0", "got 0", rank=0)
    for flag, value in (("rank", 0), ("variant", "fc"), ("model", ""), ("targets", 7)):
        with pytest.raises(UsageError, match=f"^--{flag}: "):
            Project.load(tmp_path, **{flag: value})
    refused(write(tmp_path, "model: a/b\n"), "unknown key rnk", "did you mean rank?", rnk=1)


@pytest.mark.parametrize(
    "url, reason",
    [
        ("nonsense", "'nonsense' is no database URL: write sqlite:///path/to/registry.db"),
        ("postgresql://me:secret@host:port/db", "'host:port/db' is no database URL"),
        ("mysql://me:secret@host/db", "is neither SQLite nor PostgreSQL"),
        ("sqlite://", "is in memory, where every command would forget"),
        ("sqlite:///:memory:", "is in memory"),
        ("sqlite:///file::memory:?uri=true", "is in memory"),
        ("sqlite:///file:x?mode=memory&uri=true", "is in memory"),
    ],
)
def test_registries_that_keep_nothing(tmp_path: Path, url: str, reason: str) -> None:
    path = write(tmp_path, f"model: a/b\nregistry: '{url}'\n") / PROJECT_FILE
    with pytest.raises(UsageError) as caught:
        Project.load(tmp_path)
    assert str(caught.value).startswith(f"{path}: registry: ") and reason in str(caught.value)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["sqlite:///a/b.db", "postgresql://host/db", "postgresql+psycopg://u:p@host:5432/db"])
def test_registries_that_can_be(tmp_path: Path, url: str) -> None:
    assert Project.load(write(tmp_path, f"model: a/b\nregistry: {url}\n")).registry == url


def test_one_name_for_a_model_however_it_is_spelt(tmp_path: Path) -> None:
    spelt = "HuggingFaceTB/SmolLM2-135M-Instruct"
    for model in (spelt, spelt.lower(), spelt.upper()):
        assert Project(model=model).model_name == Project(model=model).geometry().model == spelt
    assert Project(model="smollm2-135m").model_name == "SmolLM2-135M"
    assert Project(model="Nobody/Unknown").model_name == "Nobody/Unknown"
    assert Project(model=spelt.lower(), name="ours").model_name == "ours"


@pytest.mark.parametrize(
    "model, hub_id",
    [
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M"),
        ("Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),  # an alias in the card of Llama-3-8B, whose first id is another
        ("gpt2", "openai-community/gpt2"),
        ("huggingfacetb/smollm2-135m", None),
        ("nobody/unknown", None),
        ("nowhere", None),
    ],
)
def test_the_hub_id_behind_a_card(model: str, hub_id: str | None) -> None:
    assert Project(model=model).hub_id == hub_id


def test_a_folder_goes_before_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_llama(tmp_path / "gpt2")
    assert Project(model="gpt2").hub_id is None and Project(model="gpt2").model_name == "gpt2"


def test_write_and_read_again(tmp_path: Path) -> None:
    project = Project(model="a/b", rank=3, targets="all-linear")
    path = project.write(tmp_path)
    assert path == tmp_path / PROJECT_FILE and Project.load(tmp_path) == project
    assert next(iter(yaml.safe_load(path.read_text()))) == "model"
    before = path.read_bytes()
    with pytest.raises(UsageError, match="exists: edit it"):
        Project(model="other").write(tmp_path)
    assert path.read_bytes() == before


def test_the_repository_s_own_project_loads() -> None:
    root = Path(__file__).resolve().parents[1]
    if (root / PROJECT_FILE).is_file():  # a wheel's tests run without it
        assert Project.load(root).geometry().matrices


def test_geometry_of_a_card_fetches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "find_base", lambda *_: pytest.fail("the model was fetched"))
    found = Project(model=CARD).geometry()
    assert found.model == CARD and found.matrices == geometry.from_card(CARD).matrices


def test_geometry_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_llama(tmp_path / "model")
    project = Project(model=str(folder))
    assert project.geometry().model == "model"  # its name, wherever it lies: people share a registry by it
    assert Project(model=str(folder), name="ours").geometry().model == "ours"
    assert project.geometry().digest == geometry.from_checkpoint(folder).digest
    assert project.base() == folder
    monkeypatch.chdir(tmp_path)
    assert Project(model="model").geometry().model == "model"


def test_model_without_card_or_folder_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_llama(tmp_path / "model")
    monkeypatch.setattr(hub, "find_base", lambda model, say: say(f"fetching {model}") or folder)
    said: list[str] = []
    found = Project(model="nobody/unknown").geometry(said.append)
    assert found.model == "nobody/unknown" and found.digest == geometry.from_checkpoint(folder).digest
    assert said == ["fetching nobody/unknown"]


def test_model_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(MultisboraError, match="neither a folder on this machine nor a hub id"):
        Project(model=str(tmp_path / "nowhere")).geometry()
