"""SboraConfig: what an SBoRA adapter is, as PEFT configures its methods."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import lru_cache
from operator import index
from typing import Any

from peft import PeftConfig

from ..delta import pattern_value
from ..errors import UsageError
from ..geometry import Names, spellings
from ..patterns import check_pattern
from ..region import VARIANTS, Region, Variant, draw


@dataclass
class SboraConfig(PeftConfig):
    """Configuration of an SBoRA adapter (arXiv 2407.05413): a LoRA whose frozen factor is a set of one-hot vectors.

    Args:
        variant: "fa" trains B (out_features x r) on r owned columns, "fb" trains A (r x in_features) on r owned rows.
        r: rank, the number of columns or rows that the adapter owns in every target matrix.
        alpha: the update is scaled by alpha / r, or by alpha / sqrt(r) with `use_rslora`.
        target_modules: suffixes of module names, a regular expression, or "all-linear". With `indices` given and this
            left out, the targets are the modules of `indices`, in each of their `geometry.spellings`.
        indices: {module: sorted indices}, as the registry allocated them. None draws them with `seed`, for the use of a
            single task without a registry. A module's rank is the number of its indices. Its name may be the stored or
            the live one, here and in `excluded`: `geometry.Names` says which names mean one module.
        excluded: {module: indices of the other axis} whose cells earlier claims own; those values stay zero.
        seed: of the draw, and of nothing else.
        use_rslora: rank-stabilised scaling.
        dropout: probability with which an input channel is dropped on its way into the adapter.
        rank_pattern, alpha_pattern: {pattern of a module's name: value} where it differs from `r` or `alpha`.
        exclude_modules, layers_to_transform, layers_pattern: narrow `target_modules`, as everywhere in PEFT.
        modules_to_save: modules that are trained whole and kept in the adapter.
        task, composition, base_fingerprint, claim_digest: provenance, written by `multisbora train`; merging checks it.
        base_quantization: how the base was quantised, `view.Quantization.to_json`, so that a merge can derive the
            dequantised base from the stored one; None for a base as stored.

    Raises:
        UsageError: a value that cannot mean anything.
    """

    variant: Variant = "fa"
    r: int = 64
    alpha: float = 64
    target_modules: list[str] | set[str] | str | None = None
    indices: dict[str, list[int]] | None = None
    excluded: dict[str, list[int]] = field(default_factory=dict)
    seed: int = 0
    use_rslora: bool = False
    dropout: float = 0.0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    task: str | None = None
    composition: str | None = None
    base_fingerprint: str | None = None
    claim_digest: str | None = None
    base_quantization: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        from . import PEFT_TYPE  # the registration needs this class first

        self.peft_type = PEFT_TYPE
        if self.variant not in VARIANTS:
            raise UsageError(f"variant {self.variant!r} is unknown: use fa (columns) or fb (rows)")
        for name, rank in (("r", self.r), *self.rank_pattern.items()):
            if not isinstance(rank, int) or isinstance(rank, bool) or rank <= 0:
                raise UsageError(f"rank {rank!r} ({name}) must be a positive integer")
        if not 0.0 <= self.dropout < 1.0:
            raise UsageError(f"dropout {self.dropout} must be at least 0 and below 1")
        if self.layers_pattern and self.layers_to_transform is None:
            raise UsageError("layers_pattern does nothing without layers_to_transform: give both or neither")
        if self.indices is not None:
            for module in self.indices:
                self._given_region(module)
            if self.target_modules is None:
                # PEFT knows the live model's names alone, and this config does not know the model.
                self.target_modules = {name for module in self.indices for name in spellings(module)}
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            try:
                check_pattern(pattern)
            except UsageError as error:
                raise UsageError(f"rank_pattern or alpha_pattern {pattern!r}: {error}") from None
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, sets sorted, so that the same configuration gives the same bytes."""
        return {k: sorted(v) if isinstance(v, set) else v for k, v in super().to_dict().items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json. The indices are not in it: they lie beside the values in the safetensors file.

        A module with more or fewer indices than `r` and `rank_pattern` say gets an entry in `rank_pattern`, so that a
        loader makes room of the right size before it reads them.
        """
        ranks = {
            "|".join(re.escape(name) for name in spellings(module)): len(indices)
            for module, indices in (self.indices or {}).items()
            if len(indices) != pattern_value(self.rank_pattern, module, self.r)
        }
        # Its own entry goes first: the first pattern that fits is the one that counts.
        pattern = ranks | {key: rank for key, rank in self.rank_pattern.items() if key not in ranks}
        super(SboraConfig, replace(self, indices=None, rank_pattern=pattern)).save_pretrained(save_directory, **kwargs)

    def _given_region(self, module: str) -> Region:
        assert self.indices is not None
        try:
            return Region(
                self.variant,
                tuple(index(i) for i in self.indices[module]),
                tuple(index(i) for i in _lookup(self.excluded, module) or ()),
            )
        except UsageError as error:
            raise UsageError(f"{module}: {error}") from None
        except TypeError:
            raise UsageError(f"{module}: indices and excluded must be lists of whole numbers") from None

    def region(self, module: str, shape: tuple[int, int]) -> Region:
        """The region of one module.

        Args:
            module: dotted name in the base model.
            shape: (out_features, in_features).

        Raises:
            UsageError: no indices for the module, indices outside the matrix, or a rank above the axis.
        """
        if self.indices is None:
            size = shape[1] if self.variant == "fa" else shape[0]
            rank = pattern_value(self.rank_pattern, module, self.r)
            if rank > size:
                raise UsageError(
                    f"{module}: rank {rank} is above its {size} {'columns' if self.variant == 'fa' else 'rows'}: "
                    "lower r, or give this module its own in rank_pattern"
                )
            indices = draw(size, rank, self.seed, module)
            region = Region(self.variant, indices, tuple(_lookup(self.excluded, module) or ()))
        else:
            name = _entry(self.indices, module)
            if name is None:
                raise UsageError(
                    f"{module} is a target, but `indices` has no entry for it: "
                    "allocate it, or leave it out of target_modules"
                )
            region = self._given_region(name)
        region.check(shape, module)
        return region

    def check_targets(self, modules: Collection[str]) -> None:
        """Refuse `indices` and `excluded` of modules that are not among the targets, `modules`.

        Nothing would be trained there; or cells would be that belong to another task.

        Raises:
            UsageError: there are some; the message names the first.
        """
        for what, given in (("indices", self.indices or {}), ("excluded", self.excluded)):
            stray = [name for name in given if not _names(modules, name)]
            if stray:
                more = f" (and {len(stray) - 1} more)" if len(stray) > 1 else ""
                raise UsageError(
                    f"`{what}` has an entry for {stray[0]}{more}, which is no target module of this model: "
                    "correct the name, or add it to target_modules"
                )


def _names(names: Collection[str], module: str) -> list[str]:
    """Those of `names` that can mean `module`, as `geometry.Names` has it."""
    return [module] if module in names else _index(tuple(names)).find(module)


@lru_cache(maxsize=4)  # all modules of a model are looked up in the same few collections, one after another
def _index(names: tuple[str, ...]) -> Names:
    return Names(names)


def _entry(mapping: dict[str, list[int]], module: str) -> str | None:
    """The key that means `module`, if there is one."""
    names = _names(mapping, module)
    if len(names) > 1:
        raise UsageError(
            f"{module} can be {' or '.join(names)}: name modules in indices and excluded as this model does"
        )
    return names[0] if names else None


def _lookup(mapping: dict[str, list[int]], module: str) -> list[int] | None:
    name = _entry(mapping, module)
    return None if name is None else mapping[name]
