"""The form of a receipt: what one that somebody else made is checked against before anything is done with it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, ValidationError

from .checkpoint import TEMPLATES_FOLDER
from .errors import UsageError
from .header import MAX_NAME
from .names import check_name
from .settings import Strict
from .untrusted import is_plain, shown

FORMAT = 2


def _plain(text: str) -> str:
    if not is_plain(text, MAX_NAME):
        raise ValueError("a name must be printable, and of some hundred characters at most")
    return text


def _file(name: str) -> str:
    parts = _plain(name).split("/")
    if parts[0] == TEMPLATES_FOLDER and len(parts) == 2:
        parts = parts[1:]
    if len(parts) != 1 or parts[0].startswith(".") or "\\" in name:
        raise ValueError("a file must lie in the folder itself")
    return name


def _task(name: str) -> str:
    try:
        return check_name(name)
    except UsageError as error:
        raise ValueError(str(error)) from None


_Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Text = Annotated[str, AfterValidator(_plain)]
_File = Annotated[str, AfterValidator(_file)]
_Task = Annotated[str, AfterValidator(_task)]
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Number = Annotated[float, Field(allow_inf_nan=False)]


class _Part(Strict):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _View(_Part):
    view: Literal["original", "dequantized"]
    quantization: dict[str, Any] | None


class _Base(_View):
    model: _Text
    fingerprint: _Text
    checked: bool


class _Region(_Part):
    indices: list[_Count]
    excluded: list[_Count]
    scaling: _Number
    weight: _Number
    digest: _Digest | None
    undo_digest: _Digest | None


class _MergedTask(_Part):
    weight: _Number | dict[_Text, _Number]
    variant: Literal["fa", "fb"]
    composition: _Text | None
    claim_digest: _Text | None
    adapter_digest: _Digest
    base_fingerprint: _Text | None
    cells: _Count
    cells_changed: _Count | None
    regions: dict[_Text, _Region]
    trained_on: _View


class _Whole(_Part):
    how: Literal["keep", "average"]
    weights: dict[_Task, _Number]
    cells_changed: _Count | None
    digest: _Digest | None
    undo_digest: _Digest | None


class _KeptTask(_Part):
    digest: _Digest
    size: _Count
    rows: _Count
    tokens: _Count
    source: Literal["task", "text", "adapter"]


class _Correction(_Part):
    ridge: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    tasks: dict[_Task, _KeptTask]


class _WeightsFile(_Part):
    size: _Count
    header: _Digest


class _OtherFile(_Part):
    size: _Count
    sha256: _Digest | None


class _Receipt(_Part):
    format: Literal[2]
    base: _Base
    tasks: dict[_Task, _MergedTask]
    weights: dict[_File, _WeightsFile]
    tensors: dict[_Text, _Digest]
    files: dict[_File, _OtherFile]
    whole: dict[_Text, _Whole]
    max_shard_size: Annotated[int, Field(gt=0, lt=2**63)] | None
    tensors_changed: list[_Text]
    cells_changed: _Count | None
    cells_owned: _Count
    scores: dict[str, Any]
    corrected: _Correction | None = None  # only in receipts of corrected merges


def check_form(content: Any) -> None:
    """Refuse what has not the form of a receipt.

    Args:
        content: parsed JSON.

    Raises:
        UsageError: of another format, or with a part that is missing, unknown or of another kind; it names the first.
    """
    if not isinstance(content, dict):
        raise UsageError("it is no object")
    if content.get("format") != FORMAT:
        raise UsageError(f"it has format {shown(content.get('format'))}, not {FORMAT}")
    try:
        _Receipt.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(shown(str(part), 60) for part in first["loc"])
        raise UsageError(f"{shown(where, 200)}: {shown(first['msg'], 200)}") from None
    corrected = content.get("corrected")
    if corrected is not None and corrected["tasks"].keys() != content["tasks"].keys():
        raise UsageError("corrected.tasks: they are not the tasks that were merged")
