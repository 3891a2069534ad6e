"""PostgreSQL compresses messages with LZ4, where it has that, since its own method is slow."""

from __future__ import annotations

from alembic import op

revision = "0010"
down_revision = "0009"

WHOLE = ("headers", "properties", "body")
COLUMNS = {
    "outbox": (*WHOLE, "envelope"),
    "parked": WHOLE,
    "dead_letters": WHOLE,
    "events": ("data",),
    "queue": ("message", "body"),
}

#: The server is asked within the statement, since that may only be printed.
STATEMENT = (
    "DO $$ BEGIN IF EXISTS (SELECT FROM pg_settings "
    "WHERE name = 'default_toast_compression' AND 'lz4' = ANY (enumvals)) "
    "THEN EXECUTE '{alter}'; END IF; END $$"
)


def upgrade(prefix: str, schema: str | None) -> None:
    """Set it for the columns that hold messages; rows that are there stay as they are."""
    if op.get_context().dialect.name != "postgresql":
        return
    quote = op.get_context().dialect.identifier_preparer.quote
    for table, columns in COLUMNS.items():
        name = ".".join(quote(each) for each in (schema, f"{prefix}{table}") if each)
        changes = (f"ALTER COLUMN {column} SET COMPRESSION lz4" for column in columns)
        alter = f"ALTER TABLE {name} {', '.join(changes)}".replace("'", "''")
        op.execute(STATEMENT.format(alter=alter))
