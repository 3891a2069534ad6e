"""The history of the tables, as Alembic revisions; :mod:`celery_eda.databases.upgrade` runs them."""
