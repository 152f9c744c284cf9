"""What was measured of tasks' rows (`moments`), in a registry's tables: by a task's name, with claims or without.

Nothing here is history, and no claim rests on it: it can be measured again. So exports leave it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa

from ..errors import DataError, RegistryError, UsageError
from ..moments import FLOATS, INTS, WIDEST, Moments, Site, pack_triangle, unpack_triangle
from .reader import Reader, damaged
from .schema import matrices, measurements, models, moments

_EMPTY = sa.literal(b"")
_BYTES = sa.types.NullType()  # SQLAlchemy's own type makes bytes of a number, and so would hide it
_HEADS = sa.select(measurements, models.c.geometry_digest).join(models, models.c.id == measurements.c.model_id)


@dataclass(frozen=True, slots=True)
class Measured:
    """What there is of one task's rows.

    Attributes:
        rows, tokens, source, base_fingerprint: as in `Moments`.
        matrices: how many were measured.
        channels: sum of the channels of all their blocks.
    """

    rows: int
    tokens: int
    source: str
    base_fingerprint: str
    matrices: int
    channels: int


def keep(connection: sa.Connection, model: str, found: Moments) -> None:
    """Put a task's moments in the place of those that there are.

    Raises:
        RegistryError: the model is not registered, or has other matrices.
    """
    known = connection.execute(sa.select(models.c.id, models.c.geometry_digest).where(models.c.name == model)).first()
    if known is None:
        raise RegistryError(f"model {model!r} is not in the registry: run multisbora measure --tasks {found.task}")
    columns = (matrices.c.module, matrices.c.id, matrices.c.out_features, matrices.c.in_features)
    rows = connection.execute(sa.select(*columns).where(matrices.c.model_id == known.id))
    ids = {(module, out_features, in_features): matrix_id for module, matrix_id, out_features, in_features in rows}
    keys = {module: (module, len(site.response), len(site.energy)) for module, site in found.sites.items()}
    wrong = [module for module, key in keys.items() if key not in ids]
    if known.geometry_digest != found.geometry_digest or wrong:
        which = f" ({wrong[0]})" if wrong else ""
        raise RegistryError(
            f"the moments of task {found.task} are of other matrices than those of {model} in the registry{which}: "
            f"run multisbora measure --tasks {found.task} on that model"
        )
    _forget(connection, known.id, found.task)
    row = {
        "model_id": known.id,
        "task": found.task,
        "base_fingerprint": found.base_fingerprint,
        "row_count": found.rows,
        "token_count": found.tokens,
        "source": found.source,
    }
    measurement = connection.execute(measurements.insert().values(**row)).inserted_primary_key
    for module, site in found.sites.items():  # one by one: all of them together can be gigabytes
        connection.execute(
            moments.insert(),
            {
                "measurement_id": measurement[0],  # type: ignore[index]
                "matrix_id": ids[keys[module]],
                "energy": np.asarray(site.energy, FLOATS).tobytes(),
                "response": np.asarray(site.response, FLOATS).tobytes(),
                "channels": np.asarray(site.channels, INTS).tobytes(),
                "block": pack_triangle(site.block),
            },
        )


def rename(connection: sa.Connection, model_id: int, task: str, name: str) -> None:
    """Let a task's moments go with it to another name, where they take the place of those that there are."""
    mine = sa.and_(measurements.c.model_id == model_id, measurements.c.task == task)
    if connection.execute(sa.select(measurements.c.id).where(mine)).first():
        _forget(connection, model_id, name)
        connection.execute(measurements.update().where(mine).values(task=name))


def forget(connection: sa.Connection, model: str, task: str) -> None:
    """Delete a task's moments.

    Raises:
        RegistryError: there are none.
    """
    of_model = sa.select(models.c.id).where(models.c.name == model)
    found = connection.execute(
        sa.select(measurements.c.model_id).where(measurements.c.model_id.in_(of_model), measurements.c.task == task)
    ).scalar()
    if found is None:
        raise RegistryError(f"task {task!r} was not measured on {model}: there is nothing to forget")
    _forget(connection, found, task)


def _forget(connection: sa.Connection, model_id: int, task: str) -> None:
    mine = sa.and_(measurements.c.model_id == model_id, measurements.c.task == task)
    of_mine = sa.select(measurements.c.id).where(mine)
    connection.execute(moments.delete().where(moments.c.measurement_id.in_(of_mine)))
    connection.execute(measurements.delete().where(mine))


def load(connection: sa.Connection, model: str, task: str, channels: bool) -> Moments | None:
    """A task's moments, or None where it was not measured.

    Args:
        channels: whether to read the blocks; else all of them are empty, and none of their bytes is read.

    Raises:
        RegistryError: they are damaged.
    """
    head = connection.execute(_HEADS.where(models.c.name == model, measurements.c.task == task)).first()
    if head is None:
        return None
    of_block = [moments.c.channels, moments.c.block] if channels else [_EMPTY, _EMPTY]
    stored = [sa.type_coerce(column, _BYTES) for column in (moments.c.energy, moments.c.response, *of_block)]
    rows = connection.execute(
        sa.select(matrices.c.module, matrices.c.out_features, matrices.c.in_features, *stored)
        .join(matrices, matrices.c.id == moments.c.matrix_id)
        .where(moments.c.measurement_id == head.id)
        .order_by(moments.c.matrix_id)
    )
    sites = {}
    for module, out_features, in_features, *parts in rows:
        site = _site(parts, out_features, in_features)
        if site is None:
            raise damaged(f"the moments of task {task!r} do not fit its matrix {module}")
        sites[module] = site
    return _of(head, sites)


def measured(connection: sa.Connection, model: str) -> dict[str, Measured]:
    """Which tasks of a model were measured, by name, in alphabetical order."""
    size = sa.func.coalesce(sa.func.sum(sa.func.length(moments.c.channels)), 0)
    rows = connection.execute(
        sa.select(measurements, sa.func.count(moments.c.matrix_id).label("sites"), size.label("bytes"))
        .join(models, models.c.id == measurements.c.model_id)
        .outerjoin(moments, moments.c.measurement_id == measurements.c.id)
        .where(models.c.name == model)
        .group_by(measurements.c.id)
    )
    found = {
        row.task: Measured(
            row.row_count,
            row.token_count,
            row.source,
            row.base_fingerprint,
            row.sites,
            int(row.bytes) // INTS.itemsize,
        )
        for row in rows
    }
    return dict(sorted(found.items()))


def channels(connection: sa.Connection, model: str, task: str) -> dict[str, list[int]]:
    """The input channels of each block of a task's moments, by module; {} where it was not measured."""
    rows = connection.execute(
        sa.select(matrices.c.module, sa.type_coerce(moments.c.channels, _BYTES))
        .join(matrices, matrices.c.id == moments.c.matrix_id)
        .join(measurements, measurements.c.id == moments.c.measurement_id)
        .join(models, models.c.id == measurements.c.model_id)
        .where(models.c.name == model, measurements.c.task == task)
    )
    return {module: np.frombuffer(stored, INTS).tolist() for module, stored in rows if isinstance(stored, bytes)}


def block_channels(reader: Reader, model: str, task: str) -> dict[str, list[int]]:
    """The input channels at which somebody may ask how a task's rows vary together: module -> sorted channels.

    They are the columns of every fa task that shares a composition with the task, its own among them; and for an fb
    task, which reads them all, all of its matrices, but of those with more than `WIDEST` none.

    Returns:
        {} for a task without claims.
    """
    holdings = reader.holdings(model)
    mine = next((holding for holding in holdings if holding.task == task), None)
    if mine is None:
        return {}
    shapes = reader.shapes(model)
    found: dict[str, set[int]] = {}
    for holding in holdings:
        if holding.task is None or holding.compositions.isdisjoint(mine.compositions):
            continue
        for module, indices in holding.indices.items():
            width = shapes[module][1]
            if holding.variant == "fa":
                found.setdefault(module, set()).update(indices.tolist())
            elif width <= WIDEST:
                found.setdefault(module, set()).update(range(width))
    return {module: sorted(channels) for module, channels in found.items()}


def faults(connection: sa.Connection) -> Iterator[str]:
    """What of them cannot be, by sizes and by values, one line each."""
    sized = (moments.c.energy, moments.c.response, moments.c.channels, moments.c.block)
    rows = connection.execute(
        sa.select(
            moments.c.measurement_id,
            moments.c.matrix_id,
            measurements.c.task,
            models.c.name,
            matrices.c.module,
            matrices.c.out_features,
            matrices.c.in_features,
            matrices.c.model_id == measurements.c.model_id,
            *(sa.func.length(column) for column in sized),
        )
        .select_from(
            moments.outerjoin(measurements, measurements.c.id == moments.c.measurement_id)
            .outerjoin(models, models.c.id == measurements.c.model_id)
            .outerjoin(matrices, matrices.c.id == moments.c.matrix_id)
        )
        .order_by(moments.c.measurement_id, moments.c.matrix_id)
    )
    for head in connection.execute(_HEADS.order_by(measurements.c.id)):
        try:
            _of(head, {})
        except RegistryError as error:
            yield f"measurement {head.id}: {error}"
    for measurement, matrix, task, model, module, out_features, in_features, same, *found in rows.all():
        what = "do not fit its matrix"
        if same and found == _lengths(in_features, out_features, found[2] or 0):
            stored = sa.select(*(sa.type_coerce(column, _BYTES) for column in sized))
            mine = (moments.c.measurement_id == measurement, moments.c.matrix_id == matrix)
            try:
                site = _site(list(connection.execute(stored.where(*mine)).one()), out_features, in_features)
            except sa.exc.DBAPIError as error:  # text that is none
                if error.connection_invalidated:
                    raise
                site = None
            fault = "they are no bytes" if site is None else site.fault()
            if not fault:
                continue
            what = f"are damaged ({fault}) at its matrix"
        yield (
            f"the moments of task {task!r} of {model or 'no model'} {what} {module}: measure it again with "
            f"multisbora measure --tasks {task}"
        )


def _lengths(in_features: int, out_features: int, channels: int) -> list[int]:
    """How many bytes there are of each column, where there are so many of channels."""
    count = channels // INTS.itemsize
    return [FLOATS.itemsize * size for size in (in_features, out_features, count, count * (count + 1) // 2)]


def _of(head: sa.Row[Any], sites: Mapping[str, Site]) -> Moments:
    """The moments that a row of `_HEADS` tells of.

    Raises:
        RegistryError: it is damaged, or one of the sites is.
    """
    try:
        return Moments(
            task=head.task,
            base_fingerprint=head.base_fingerprint,
            geometry_digest=head.geometry_digest,
            rows=head.row_count,
            tokens=head.token_count,
            sites=sites,
            source=head.source,
        )
    except (DataError, UsageError) as error:
        raise RegistryError(str(error)) from None


def _site(parts: list[object], out_features: int, in_features: int) -> Site | None:
    """The moments of one matrix from what is stored; None where that cannot be."""
    energy, response, channels, block = parts
    if not (
        isinstance(energy, bytes)
        and isinstance(response, bytes)
        and isinstance(channels, bytes)
        and isinstance(block, bytes)
    ):
        return None
    if [len(part) for part in (energy, response, channels, block)] != _lengths(
        in_features, out_features, len(channels)
    ):
        return None
    size = len(channels) // INTS.itemsize
    return Site(
        energy=np.frombuffer(energy, FLOATS),
        response=np.frombuffer(response, FLOATS),
        channels=np.frombuffer(channels, INTS),
        block=unpack_triangle(block, size),
    )
