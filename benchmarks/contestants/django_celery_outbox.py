"""django-celery-outbox: its Celery app, its table, its relay, without logging."""

from __future__ import annotations

import logging
from typing import Any
from urllib.parse import urlsplit

import django
import structlog
from django.conf import settings
from django.db import connection, transaction

from benchmarks.contestants.serving import PAYLOAD, environment, serve

database = urlsplit(environment("DATABASE"))
settings.configure(
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": database.path[1:],
            "USER": database.username,
            "HOST": database.hostname,
            "PORT": database.port,
            "CONN_MAX_AGE": None,
        }
    },
    INSTALLED_APPS=["django_celery_outbox"],
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    CELERY_OUTBOX_APP=f"{__name__}.app",
    USE_TZ=True,
)
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
django.setup()

from django.core.management import call_command  # noqa: E402  # Django has to be set up first
from django_celery_outbox import OutboxCelery  # noqa: E402
from django_celery_outbox.models import CeleryOutbox  # noqa: E402
from django_celery_outbox.relay import Relay, RelayConfig  # noqa: E402

app = OutboxCelery("django", broker=environment("BROKER"), set_as_current=False)
app.conf.update(
    task_default_queue=environment("QUEUE") or "relayed",
    task_default_queue_type=environment("QUEUE_TYPE") or "classic",
)
#: The defaults of its command, except for the pause after an incomplete batch.
OPTIONS: dict[str, float | int | str | None] = {
    "batch_size": 100,
    "idle_time": 0.0,
    "backoff_time": 120,
    "max_retries": 5,
    "publish_concurrency": 1,
    "queue_snapshot_refresh_seconds": 5.0,
    "stale_timeout_seconds": 300,
    "send_timeout": 10.0,
    "shutdown_timeout": 30.0,
    "broker_outage_cooldown": 30.0,
    "max_backoff": 3600.0,
    "liveness_file": None,
}


@app.task(name="bench.carry", ignore_result=True)
def carry(payload: str) -> None:
    """Do nothing; the message carries about 1 KB."""


def prepare() -> None:
    """Create its tables, and a business table."""
    call_command("migrate", verbosity=0)
    with connection.cursor() as cursor:
        cursor.execute("CREATE TABLE IF NOT EXISTS business (number integer PRIMARY KEY)")


def fill(count: int) -> None:
    """Publish *count* messages in one transaction."""
    with transaction.atomic():
        for _ in range(count):
            carry.delay(PAYLOAD)


def fill_beside_work(count: int, first: int) -> None:
    """Commit *count* transactions of one row and one message."""
    for number in range(first, first + count):
        with transaction.atomic():
            _work(number)
            carry.delay(PAYLOAD)


def work(count: int, first: int) -> None:
    """Commit *count* transactions of one row, without messages."""
    for number in range(first, first + count):
        with transaction.atomic():
            _work(number)


def _work(number: int) -> None:
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO business VALUES (%s)", [number])


def drain() -> int:
    """Send everything in the outbox."""
    count = int(CeleryOutbox.objects.count())
    relay = Relay(app, RelayConfig.from_options(OPTIONS))
    while CeleryOutbox.objects.exists():
        relay._processing()
    return count


def forget() -> None:
    """Empty the outbox without sending."""
    CeleryOutbox.objects.all().delete()


VERBS: dict[str, Any] = {
    each.__name__: each for each in (prepare, fill, fill_beside_work, work, drain, forget)
}

if __name__ == "__main__":
    serve(VERBS)
