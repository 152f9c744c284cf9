"""Run by Alembic, on the connection and in the transaction that `multisbora.registry.database` has opened."""

from alembic import context

from multisbora.registry.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    version_table=context.config.attributes["version_table"],
    target_metadata=metadata,
)
context.run_migrations()
