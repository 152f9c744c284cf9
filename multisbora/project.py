"""The project in the working folder: multisbora.yaml, and where registry, recipes and adapters lie beside it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from . import geometry as geometries
from .allocator import DEFAULT_TARGETS
from .errors import UsageError
from .geometry import Geometry
from .region import Variant
from .settings import Strict, check, read_yaml

PROJECT_FILE = "multisbora.yaml"


class Project(Strict):
    """What every command of one project has in common. Flags override it.

    Attributes:
        model: base model, a hub id or a folder.
        name: what registry and adapters call the base model, so that people who keep it in different places share it;
            left out: the hub id, or the folder's name.
        registry: database URL of the registry; a relative SQLite path is relative to the working folder.
        targets: target modules of tasks whose recipe names none.
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
    recipes: str = "tasks"
    adapters: str = "adapters"

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
        if flags.get("model") and not (Path(folder) / PROJECT_FILE).is_file():
            return cls.of(**flags)
        return cls.load(folder, **flags)

    @classmethod
    def of(cls, **flags: Any) -> Project:
        """A project of flags alone, defaults for those that are None.

        Raises:
            UsageError: values with faults.
        """
        return check(_given(flags), cls, "project")

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
        folder = Path(self.model).expanduser()
        return self.name or (folder.resolve().name if folder.is_dir() else self.model)

    def adapter(self, task: str) -> Path:
        return Path(self.adapters) / task

    def base(self, say: Callable[[str], None] = lambda message: None) -> Path:
        """The base model's folder on this machine, fetched if need be (`hub.find_base`)."""
        from .hub import find_base

        return find_base(self.model, say)

    def geometry(self, say: Callable[[str], None] = lambda message: None) -> Geometry:
        """The base model's geometry: from its card where there is one, so that nothing is fetched; else its headers."""
        if not Path(self.model).expanduser().is_dir():
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

        folder = Path(self.model).expanduser()
        if folder.is_dir() and any(folder.glob("*.safetensors")):
            return self.base_geometry(folder)
        try:
            return replace(geometries.from_card(self.model), model=self.model_name)
        except UsageError:
            return replace(from_config(find_config(self.model)), model=self.model_name)

    def base_geometry(self, folder: Path) -> Geometry:
        """The geometry of the base model's files, under the name that the project and its registry know it by."""
        return replace(geometries.from_checkpoint(folder), model=self.model_name)


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flags.items() if value is not None}
