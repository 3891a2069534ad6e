"""Column types that mean the same in every supported database."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    DateTime,
    Dialect,
    Integer,
    LargeBinary,
    String,
    Text,
    TypeDecorator,
    Uuid,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.sql.type_api import TypeEngine

from celery_eda.core.limits import NAME_LENGTH

# SQLite numbers rows only in a column of the type INTEGER; AUTOINCREMENT never reuses an id.
Identifier = BigInteger().with_variant(Integer(), "sqlite")
Moment = DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
Bytes = LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")
LongText = Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")
# The same bytes under both dialect names of MariaDB; only one of them has a native UUID type.
MessageId: TypeEngine[Any] = Uuid().with_variant(
    Uuid(native_uuid=False), "mysql", "mariadb", "sqlite"
)


class Name(TypeDecorator[str]):
    """Text of at most *octets* bytes in UTF-8, compared byte by byte.

    MariaDB and MySQL store it as bytes: they ignore trailing blanks, and share no collation that
    does not.
    """

    impl = String(NAME_LENGTH)
    cache_ok = True

    def __init__(self, octets: int = 4 * NAME_LENGTH) -> None:
        super().__init__()
        self.octets = octets

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if _keeps_bytes(dialect):
            return dialect.type_descriptor(mysql.VARBINARY(self.octets))
        return dialect.type_descriptor(String(NAME_LENGTH))

    def process_bind_param(self, value: str | None, dialect: Dialect) -> Any:
        return value.encode() if value is not None and _keeps_bytes(dialect) else value

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:
        return value.decode() if isinstance(value, bytes) else value


def _keeps_bytes(dialect: Dialect) -> bool:
    return dialect.name in ("mysql", "mariadb")
