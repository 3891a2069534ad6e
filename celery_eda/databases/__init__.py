"""Databases: the tables, their migrations, and the statements that differ by vendor."""

from __future__ import annotations

from celery_eda.databases import schema
from celery_eda.databases.dialect import Dialect, Values
from celery_eda.databases.engines import is_same_database
from celery_eda.databases.lost_race import LostRace
from celery_eda.databases.message_rows import from_row, json_of, read_prerequisites, to_row
from celery_eda.databases.postgresql import PostgreSQL
from celery_eda.databases.registry import dialect_of, known_dialect
from celery_eda.databases.retention import Chore, Retention, ago
from celery_eda.databases.sqlite import SQLite
from celery_eda.databases.statements import cached_statement, quoted_name
from celery_eda.databases.tables import Tables
from celery_eda.databases.types import LongText
from celery_eda.databases.wiring import Databases

__all__ = [
    "Chore",
    "Databases",
    "Dialect",
    "LongText",
    "LostRace",
    "PostgreSQL",
    "Retention",
    "SQLite",
    "Tables",
    "Values",
    "ago",
    "cached_statement",
    "dialect_of",
    "from_row",
    "is_same_database",
    "json_of",
    "known_dialect",
    "quoted_name",
    "read_prerequisites",
    "schema",
    "to_row",
]
