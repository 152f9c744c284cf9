"""multisbora: train many tasks apart, each in its own region of a base model's weights, and merge any of them exactly.

The names in `__all__` are the public interface. They are imported on first use: `import multisbora` loads no torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .allocator import allocate as allocate
    from .merge import merge as merge
    from .registry import Registry as Registry
    from .train import train as train
    from .tuner import SboraConfig as SboraConfig
    from .tuner import composed as composed
    from .verify import verify as verify

__version__ = "0.1.0"
__all__ = ["Registry", "SboraConfig", "allocate", "composed", "merge", "train", "verify"]
_HOME = {
    "Registry": "registry",
    "SboraConfig": "tuner",
    "allocate": "allocator",
    "composed": "tuner",
    "merge": "merge",
    "train": "train",
    "verify": "verify",
}


class _Package(ModuleType):
    """Importing a submodule sets the package's attribute of its name, and merge, train and verify are submodules too.

    Properties keep the public functions in their places whatever is imported first.
    """

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


def _public(name: str) -> property:
    def get(package: ModuleType) -> Any:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)

    def ignore(package: ModuleType, value: Any) -> None:
        pass

    return property(get, ignore)


for _name in __all__:
    setattr(_Package, _name, _public(_name))
sys.modules[__name__].__class__ = _Package
