"""The business tables of the system under fault."""

from __future__ import annotations

from sqlalchemy import Column, Integer, MetaData, String, Table

metadata = MetaData()
OPTIONS = {"mysql_engine": "InnoDB", "mariadb_engine": "InnoDB"}
#: What committed: one row for each transaction that published.
orders = Table("orders", metadata, Column("number", Integer, primary_key=True), **OPTIONS)
#: What took effect; nothing here forbids a number to be there twice.
effects = Table(
    "effects",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("name", String(40), nullable=False),
    Column("number", Integer, nullable=False),
    **OPTIONS,
)
#: Rows that handlers compete for.
accounts = Table(
    "accounts",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("visits", Integer, nullable=False),
    **OPTIONS,
)
