"""The settings shared by all services: the broker, and the queue of each service.

This is a Celery configuration module. Environment variables override the defaults: ``SHOP_BROKER``,
``SHOP_ORDER_DATABASE``, ``SHOP_PAYMENT_DATABASE``, … (SQLAlchemy URLs), and ``SHOP_NAME``, so that
two shops can share a broker.
"""

from __future__ import annotations

import os

SERVICES = ("order", "payment", "kitchen", "delivery")

# The default needs no server: one SQLite file is the broker. Set the URL of another broker here.
broker_url = os.environ.get("SHOP_BROKER", "eda+sqlite:///broker.db")
broker_connection_retry_on_startup = True
# For Redis, ignored by other brokers. What a killed worker had in hand comes back when its
# visibility timeout is over, so it is short here, but longer than any task takes.
broker_transport_options = {
    "visibility_timeout": 5,
    # How often a worker looks for such messages. kombu's defaults make that every 100 s …
    "unacked_restore_interval": 1,
    "unacked_restore_throttle": 1,
    # … and let a worker that is killed while it looks stop all others for 300 s.
    "unacked_mutex_expire": 5,
}
task_ignore_result = True
worker_cancel_long_running_tasks_on_connection_loss = False

# A relay that is killed leaves its rows to the others after this many seconds (SQLite; the other
# databases free them at once).
eda_claim_timeout = 5.0
eda_publish_timeout = 3.0
# The shop runs its relays apart: `celery -A … eda relay`.
eda_embedded_relay = False


def queue_of(service: str) -> str:
    """The queue of the tasks of *service*."""
    return f"{os.environ.get('SHOP_NAME', 'shop')}.{service}"


def database_of(service: str) -> str:
    """The URL of the database that belongs to *service* alone."""
    return os.environ.get(f"SHOP_{service.upper()}_DATABASE", f"sqlite:///{service}.db")


# A task's name begins with its service: `payment.charge` goes to the queue of `payment`.
task_routes = {
    f"{service}.*": {"queue": queue_of(service)} for service in (*SERVICES, "notification")
}
