"""Connections to a broker that lose no message when their worker dies."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kombu import Connection

from celery_eda.brokers.registry import broker_of_type, is_database
from celery_eda.databases.tables import Tables

if TYPE_CHECKING:
    from typing_extensions import Self


class SafeConnection(Connection):
    """Kombu's connection, with the consuming transport of the broker's descriptor if it has one.

    Over that transport no message is lost when a worker dies, and no message can break a worker.
    """

    @classmethod
    def made(cls, tables: Callable[[], Tables], url: str, *args: Any, **options: Any) -> Self:
        """A connection to the broker at *url*; if that is a database, with these *tables* in it."""
        if is_database(url):
            names = {"table_prefix": tables().prefix, "schema": tables().schema}
            options["transport_options"] = {**names, **(options.get("transport_options") or {})}
        return cls(url, *args, **options)

    def get_transport_cls(self) -> Any:
        transport = super().get_transport_cls()
        return broker_of_type(transport.driver_type).consumers.get(transport, transport)
