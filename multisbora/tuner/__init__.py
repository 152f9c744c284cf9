"""SBoRA as a PEFT method. Importing this package registers it, so that PEFT loads, trains, saves and merges it."""

from __future__ import annotations

from peft.utils import PeftType, register_peft_method


def _extend_peft_type(name: str) -> PeftType:
    """A member `name` of PEFT's enum of methods, which has no public way to add one."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    PeftType._member_map_[name] = member
    PeftType._member_names_.append(name)
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


PEFT_TYPE = _extend_peft_type("SBORA")

from .compose import composed  # noqa: E402
from .config import SboraConfig  # noqa: E402
from .layer import SboraLayer  # noqa: E402
from .model import SboraModel  # noqa: E402

register_peft_method(name="sbora", config_cls=SboraConfig, model_cls=SboraModel, prefix=SboraModel.prefix)

__all__ = ["PEFT_TYPE", "SboraConfig", "SboraLayer", "SboraModel", "composed"]
