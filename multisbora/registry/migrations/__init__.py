"""Alembic migrations of the registry's schema, run by `multisbora.registry.database` when a store is opened."""
