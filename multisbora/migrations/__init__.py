"""Alembic migrations of the registry's schema, run by `multisbora.database` when a store is opened."""
