"""The project in the working folder: multisbora.yaml, and where registry, recipes and adapters lie beside it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
import yaml
from pydantic import Field, field_validator

from . import geometry as geometries
from .allocator import DEFAULT_TARGETS
from .cards import Card, read_card
from .errors import UsageError
from .geometry import Geometry
from .hub import local_folder
from .region import Variant
from .settings import Strict, check, read_yaml, unfit

PROJECT_FILE = "multisbora.yaml"
_FLAGS = frozenset({"model", "variant", "rank", "targets", "composition", "strategy"})


class Project(Strict):
    """What every command of one project has in common. Flags override it.

    Attributes:
        model: base model, a hub id or a folder.
        name: what registry and adapters call the base model, so that people who keep it in different places share it;
            left out: the hub id, as its geometry card spells it, or the folder's name.
        registry: database URL of the registry; a relative SQLite path is relative to the working folder.
        targets: target modules of tasks whose recipe names none.
        strategy: how `allocate` chooses indices, see there; "auto" is "isolated" where all tasks that meet were
            measured, and else "random".
    """

    model: str
    name: str | None = None
    registry: str = "sqlite:///registry/registry.db"
    composition: str = "default"
    variant: Variant = "fa"
    rank: int = Field(default=64, gt=0)
    alpha: float = Field(default=64, gt=0)
    use_rslora: bool = False
    targets: tuple[str, ...] | str = DEFAULT_TARGETS
    seed: int = 0
    strategy: Literal["auto", "random", "isolated"] = "auto"
    recipes: str = "tasks"
    adapters: str = "adapters"

    @field_validator("model")
    @classmethod
    def _named(cls, model: str) -> str:
        if not model.strip():
            raise unfit("names no base model: give a hub id like owner/name or a folder")
        return model

    @field_validator("registry")
    @classmethod
    def _kept(cls, url: str) -> str:
        usable = "write sqlite:///path/to/registry.db or postgresql+psycopg://user:password@host/database"
        try:
            parsed = sa.make_url(url)
        except (sa.exc.ArgumentError, ValueError):
            raise unfit(f"{url.rpartition('@')[2]!r} is no database URL: {usable}") from None  # no password
        shown = parsed.render_as_string(hide_password=True)
        backend = parsed.drivername.partition("+")[0]
        if backend not in ("sqlite", "postgresql", "postgres"):
            raise unfit(f"{shown!r} is neither SQLite nor PostgreSQL: {usable}")
        database = parsed.database or ":memory:"
        if backend == "sqlite" and (":memory:" in database or parsed.query.get("mode") == "memory"):
            raise unfit(f"{shown!r} is in memory, where every command would forget what the last one wrote: {usable}")
        return url

    @classmethod
    def load(cls, folder: str | os.PathLike[str] = ".", **flags: Any) -> Project:
        """The project of a folder, with flags (None: not given) before what its file says.

        Raises:
            UsageError: no multisbora.yaml there, or one with faults.
        """
        path = Path(folder) / PROJECT_FILE
        if not path.is_file():
            raise UsageError(f"no {PROJECT_FILE} in this folder: run `multisbora init --model M` here first")
        return cls.of(**{**read_yaml(path, cls).model_dump(), **_given(flags)})

    @classmethod
    def load_or_default(cls, folder: str | os.PathLike[str] = ".", **flags: Any) -> Project:
        """As `load`, but where there is no multisbora.yaml a `model` among the flags is enough."""
        if flags.get("model") is not None and not (Path(folder) / PROJECT_FILE).is_file():
            return cls.of(**flags)
        return cls.load(folder, **flags)

    @classmethod
    def of(cls, **flags: Any) -> Project:
        """A project of flags alone, defaults for those that are None.

        Raises:
            UsageError: values with faults.
        """
        return check(_given(flags), cls, flags=_FLAGS)

    def text(self) -> str:
        """The content of multisbora.yaml."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def write(self, folder: str | os.PathLike[str] = ".") -> Path:
        """Write multisbora.yaml.

        Raises:
            UsageError: the folder has one already.
        """
        path = Path(folder) / PROJECT_FILE
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(self.text())
        except FileExistsError:
            raise UsageError(f"{path} exists: edit it, or run init in another folder") from None
        return path

    @property
    def model_name(self) -> str:
        """What registry and adapters call the base model; one name, however a hub id's letters are cased."""
        folder = local_folder(self.model)
        if self.name:
            return self.name
        if folder:
            return folder.resolve().name
        card = _card(self.model)
        own = [card.name, *card.names] if card else []
        return next((name for name in own if name.lower() == self.model.lower()), self.model)

    @property
    def hub_id(self) -> str | None:
        """The hub id behind the name of a geometry card, which can be planned and allocated but not trained.

        None where the model is no card's name, or the card knows no hub id. Of several, the one of that very name.
        """
        card = None if local_folder(self.model) else _card(self.model)
        ids = [name for name in card.names if "/" in name] if card else []
        if any(name.lower() == self.model.lower() for name in ids):
            return None
        same = [name for name in ids if name.partition("/")[2].lower() == self.model.lower()]
        return next(iter((*same, *ids)), None)

    def adapter(self, task: str) -> Path:
        return Path(self.adapters) / task

    def base(self, say: Callable[[str], None] = lambda message: None) -> Path:
        """The base model's folder on this machine, fetched if need be (`hub.find_base`)."""
        from .hub import find_base

        return find_base(self.model, say)

    def geometry(self, say: Callable[[str], None] = lambda message: None) -> Geometry:
        """The base model's geometry: from its card where there is one, so that nothing is fetched; else its headers."""
        if not local_folder(self.model):
            try:
                return replace(geometries.from_card(self.model), model=self.model_name)
            except UsageError:
                pass  # no card: the checkpoint itself is asked
        return self.base_geometry(self.base(say))

    def outline(self) -> Geometry:
        """The geometry for planning: as `geometry`, but a model of which only the config is at hand will do.

        Names of its tensors may differ from those of the checkpoint, so nothing is claimed by it.
        """
        from .hub import find_config
        from .skeleton import from_config

        folder = local_folder(self.model)
        if folder and any(folder.glob("*.safetensors")):
            return self.base_geometry(folder)
        try:
            return replace(geometries.from_card(self.model), model=self.model_name)
        except UsageError:
            return replace(from_config(find_config(self.model)), model=self.model_name)

    def base_geometry(self, folder: Path) -> Geometry:
        """The geometry of the base model's files, under the name that the project and its registry know it by."""
        return replace(geometries.from_checkpoint(folder), model=self.model_name)


def _card(model: str) -> Card | None:
    try:
        return read_card(model)
    except UsageError:
        return None


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flags.items() if value is not None}
