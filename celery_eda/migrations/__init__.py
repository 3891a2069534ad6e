"""The history of the tables, as Alembic revisions; :mod:`celery_eda.upgrading` runs them."""
