"""Connections to a broker that lose no message when their worker dies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kombu import Connection

from celery_eda.brokers.registry import broker_of_type, is_database
from celery_eda.core.service import Service

if TYPE_CHECKING:
    from typing_extensions import Self


class SafeConnection(Connection):
    """Kombu's connection, with the consuming transport of the broker's descriptor if it has one.

    Over that transport no message is lost when a worker dies, and no message can break a worker.
    """

    @classmethod
    def made(cls, service: Service, url: str, *args: Any, **options: Any) -> Self:
        """A connection of *service* to the broker at *url*.

        If that is a database, the settings of the service name its tables.
        """
        if is_database(url):
            settings = service.settings
            names = {"table_prefix": settings.table_prefix, "schema": settings.schema}
            options["transport_options"] = {**names, **(options.get("transport_options") or {})}
        return cls(url, *args, **options)

    def info(self) -> dict[str, Any]:
        """Details of the connection, which Celery shows to everybody who may inspect workers.

        For a transport that reads URLs kombu's "hostname" is the whole URL, with the password.
        """
        shown: dict[str, Any] = super().info()
        if "://" in (shown.get("hostname") or ""):
            shown["hostname"] = self.as_uri()
        return shown

    def get_transport_cls(self) -> Any:
        transport = super().get_transport_cls()
        return broker_of_type(transport.driver_type).consumers.get(transport, transport)
