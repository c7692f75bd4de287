"""What Alembic runs: the migrations, on the connection that `Database.upgrade` hands over."""

from __future__ import annotations

from alembic import context

from segqc.store.schema import Base

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
context.run_migrations()
