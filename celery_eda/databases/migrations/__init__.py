"""The history of the tables, as Alembic revisions; ``databases.upgrade`` runs them."""
