"""The durable store of models, tasks, compositions and claims, and what can be asked of it.

claims      what one task holds
lines       what a line of the history may hold
schema      the tables, and what the database itself refuses; migrations/ makes them
database    SQLite and PostgreSQL opened with care
reader      questions inside one transaction
measured    what was measured of tasks' rows
ledger      and what can be written in one
store       Registry: a store that is open
rows, storage, replay, audit        the proof that every invariant of a store holds
document, snapshot                  a store as one JSON, and back
"""

from .store import AXES as AXES
from .store import DEFAULT_COMPOSITION as DEFAULT_COMPOSITION
from .store import Registry as Registry
