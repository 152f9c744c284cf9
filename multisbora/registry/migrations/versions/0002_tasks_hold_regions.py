"""Regions belong to tasks, crossings have a keeper, tasks a role and a stage; guards keep all of it.

A region's excluded indices become the indices of the tasks it yields to. A store of the first schema has, of tasks that
were released since, only those indices, so each task that had any gets one holder, of role "released", for them. Of two
tasks that are both there, the one whose mask has the other's indices yields.
"""

from __future__ import annotations

import hashlib
import json
import re
from datetime import datetime, timezone

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from alembic import op

from multisbora.errors import RegistryError
from multisbora.registry.migrations.guards import install

revision = "0002"
down_revision = "0001"

# Of the digest that this revision gives to models, frozen: a later geometry may have another.
_CONTAINER = re.compile(r"(?:^|(?<=\.))[^.]+\.\d+\.")
_TRANSPOSED = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})

_FIRST_MEMBERSHIP = "(SELECT min(first.id) FROM memberships first WHERE first.task_id = m.task_id)"
_Indices = npt.NDArray[np.uint32]


def upgrade() -> None:
    bind = op.get_bind()
    # Not by op.add_column: that leaves checks out in SQLite.
    op.execute(
        "ALTER TABLE tasks ADD COLUMN role VARCHAR(16) NOT NULL DEFAULT 'task' "
        "CHECK (role IN ('task', 'protected', 'released'))"
    )
    op.execute(
        "ALTER TABLE tasks ADD COLUMN stage VARCHAR(16) NOT NULL DEFAULT 'allocated' "
        "CHECK (stage IN ('allocated', 'training', 'trained'))"
    )
    op.create_table(
        "yields",
        sa.Column("task_id", sa.Integer, sa.ForeignKey("tasks.id"), primary_key=True),
        sa.Column("keeper_id", sa.Integer, sa.ForeignKey("tasks.id"), primary_key=True, index=True),
        sa.CheckConstraint("keeper_id < task_id"),
        sqlite_with_rowid=False,
    )
    op.rename_table("regions", "regions_of_memberships")
    op.create_table(
        "regions",
        sa.Column("task_id", sa.Integer, sa.ForeignKey("tasks.id"), primary_key=True),
        sa.Column("matrix_id", sa.Integer, sa.ForeignKey("matrices.id"), primary_key=True),
        sa.Column("indices", sa.LargeBinary, nullable=False),
        sqlite_with_rowid=False,
    )
    yielding = _settle_crossings(bind)
    _record_stages(bind)
    bind.exec_driver_sql(
        "INSERT INTO regions SELECT m.task_id, r.matrix_id, r.indices FROM regions_of_memberships r "
        f"JOIN memberships m ON m.id = r.membership_id WHERE m.id = {_FIRST_MEMBERSHIP}"
    )
    _keep_excluded(bind, yielding)
    _renew_digests(bind)
    op.drop_table("regions_of_memberships")
    op.drop_index("ix_claims_membership_id", "claims")
    op.drop_table("multisbora_schema")
    if bind.dialect.name == "postgresql":  # a guard takes their place
        for constraint in sa.inspect(bind).get_foreign_keys("claims"):
            op.execute(f"ALTER TABLE claims DROP CONSTRAINT {constraint['name']}")
    install(bind)


def _settle_crossings(bind: sa.Connection) -> list[tuple[int, int]]:
    """Who yields to whom by the first schema's masks: (task, keeper), where a keeper's id is the lower one.

    A task that came back under an old mask may have a lower id than the one that keeps the crossing. It gets a new id.

    Raises:
        RegistryError: the masks go round in a circle, which no order of ids can say.
    """
    keepers: dict[int, set[int]] = {task_id: set() for (task_id,) in bind.exec_driver_sql("SELECT id FROM tasks")}
    held = _unpacked(bind, "indices")
    masks = _unpacked(bind, "excluded")
    together = bind.exec_driver_sql(
        "SELECT DISTINCT early.id, late.id FROM memberships a "
        "JOIN memberships b ON b.composition_id = a.composition_id "
        "JOIN tasks late ON late.id = a.task_id JOIN tasks early ON early.id = b.task_id "
        "WHERE early.id < late.id AND early.variant <> late.variant ORDER BY 1, 2"
    )
    for early, late in together.fetchall():
        for task_id, keeper in ((late, early), (early, late)):
            shared = held.get(task_id, {}).keys() & held.get(keeper, {}).keys()
            mask = masks.get(task_id, {})
            if shared and all(np.isin(held[keeper][m], mask.get(m, ())).all() for m in shared):
                keepers[task_id].add(keeper)
                break
    renamed: dict[int, int] = {}
    for task_id in _keepers_first(keepers):
        above = max((renamed[keeper] for keeper in keepers[task_id]), default=task_id - 1)
        renamed[task_id] = task_id if above < task_id else _renumber(bind, task_id)
    return sorted((renamed[task_id], renamed[keeper]) for task_id, found in keepers.items() for keeper in found)


def _keepers_first(keepers: dict[int, set[int]]) -> list[int]:
    """Tasks in an order in which every keeper comes before those that yield to it, else by id."""
    order: list[int] = []
    waiting = sorted(keepers)
    while waiting:
        ready = next((task_id for task_id in waiting if keepers[task_id].issubset(order)), None)
        if ready is None:
            raise RegistryError(
                f"the masks of tasks number {', '.join(map(str, waiting[:10]))} go round in a circle, nothing was "
                "written: release one of them with the multisbora that made this registry, then open it again"
            )
        order.append(ready)
        waiting.remove(ready)
    return order


def _renumber(bind: sa.Connection, task_id: int) -> int:
    """Give a task an id above all others."""
    named = f"FROM tasks WHERE id = {int(task_id)}"
    bind.exec_driver_sql(
        "INSERT INTO tasks (model_id, name, variant, rank, stage) "
        f"SELECT model_id, '#' || name, variant, rank, stage {named}"
    )
    new = int(bind.exec_driver_sql("SELECT max(id) FROM tasks").scalar_one())
    bind.exec_driver_sql(f"UPDATE memberships SET task_id = {new} WHERE task_id = {int(task_id)}")
    bind.exec_driver_sql(f"DELETE {named}")
    bind.exec_driver_sql(f"UPDATE tasks SET name = substr(name, 2) WHERE id = {new}")
    return new


def _unpacked(bind: sa.Connection, column: str) -> dict[int, dict[int, _Indices]]:
    """Task -> matrix -> the indices that its first membership has."""
    found: dict[int, dict[int, _Indices]] = {}
    rows = bind.exec_driver_sql(
        f"SELECT m.task_id, r.matrix_id, r.{column} FROM regions_of_memberships r "
        f"JOIN memberships m ON m.id = r.membership_id WHERE m.id = {_FIRST_MEMBERSHIP}"
    )
    for task_id, matrix_id, packed in rows:
        found.setdefault(task_id, {})[matrix_id] = np.frombuffer(packed, "<u4")
    return found


def _keep_excluded(bind: sa.Connection, yielding: list[tuple[int, int]]) -> None:
    # Negative ids: the holders are older than every task. None is -1, see guards.
    bind.exec_driver_sql(
        "INSERT INTO tasks (id, model_id, name, variant, rank, role) "
        "SELECT -1 - t.id, t.model_id, '#-' || (t.id + 1), CASE t.variant WHEN 'fa' THEN 'fb' ELSE 'fa' END, t.rank, "
        "'released' FROM tasks t WHERE EXISTS (SELECT 1 FROM memberships m JOIN regions_of_memberships r "
        "ON r.membership_id = m.id WHERE m.task_id = t.id AND length(r.excluded) > 0)"
    )
    bind.exec_driver_sql(
        "INSERT INTO regions SELECT -1 - m.task_id, r.matrix_id, r.excluded FROM regions_of_memberships r "
        f"JOIN memberships m ON m.id = r.membership_id WHERE length(r.excluded) > 0 AND m.id = {_FIRST_MEMBERSHIP}"
    )
    bind.exec_driver_sql("INSERT INTO yields SELECT -1 - t.id, t.id FROM tasks t WHERE t.id < 0")
    for task_id, keeper_id in yielding:
        bind.exec_driver_sql(f"INSERT INTO yields VALUES ({int(task_id)}, {int(keeper_id)})")


def _record_stages(bind: sa.Connection) -> None:
    """Nobody knows which tasks of the first schema were trained. All count as such, so that none is moved away."""
    bind.exec_driver_sql("UPDATE tasks SET stage = 'trained'")
    bind.execute(
        sa.text(
            "INSERT INTO events (at, actor, action, model, composition, task, detail) "
            "SELECT :at, 'migration 0002', 'trained', o.name, c.name, t.name, :detail FROM tasks t "
            "JOIN models o ON o.id = t.model_id JOIN memberships m ON m.task_id = t.id "
            f"JOIN compositions c ON c.id = m.composition_id WHERE m.id = {_FIRST_MEMBERSHIP} ORDER BY t.id"
        ),
        {
            "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "detail": json.dumps({"assumed": "the first schema did not say"}),
        },
    )


def _renew_digests(bind: sa.Connection) -> None:
    # Of the first schema's time is a digest in which the spelling of a model's names counts.
    for model_id, model_type in bind.exec_driver_sql("SELECT id, model_type FROM models").fetchall():
        matrices = bind.exec_driver_sql(
            f"SELECT module, out_features, in_features FROM matrices WHERE model_id = {int(model_id)}"
        ).fetchall()
        digest = _digest([tuple(row) for row in matrices], "conv1d" if model_type in _TRANSPOSED else "linear")
        bind.exec_driver_sql(f"UPDATE models SET geometry_digest = '{digest}' WHERE id = {int(model_id)}")


def _digest(matrices: list[tuple[str, int, int]], orientation: str) -> str:
    starts = [_CONTAINER.search(module) for module, _, _ in matrices]
    tails = [row[0][match.start() if match else 0 :] for match, row in zip(starts, matrices, strict=True)]
    plain = len(set(tails)) == len(tails)
    rows = sorted(
        [tail if plain else module, out, in_, orientation]
        for tail, (module, out, in_) in zip(tails, matrices, strict=True)
    )
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()
