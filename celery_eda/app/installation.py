"""Installation: the extensions of a Celery app."""

from __future__ import annotations

from typing import Any

from celery import Celery, signals

from celery_eda.core import context, redaction
from celery_eda.core.service import service_of
from celery_eda.inbox import made_reliable
from celery_eda.outbox import (
    Outbox,
    amqp_class,
    defer_results,
    listen_for_unattached,
    listen_to_sessions,
    wrap_send_task,
)

#: Celery's own tasks that run, or publish, tasks of the user.
CANVAS_TASKS = frozenset(
    f"celery.{name}" for name in ("accumulate", "chord_unlock", "chunks", "map", "starmap")
)
#: Celery's own loggers that print errors raised by handlers.
LOGS_OF_ERRORS = ("celery.app.trace", "celery.worker.request")
#: Boot steps by name: a process that only publishes does not import Celery's worker.
WORKER_STEPS = ("celery_eda.app.worker:Guard", "celery_eda.outbox.embedded:EmbeddedRelay")
CONSUMER_STEPS = (
    "celery_eda.app.service_name:HoldName",
    "celery_eda.inbox.intake:Intake",
    "celery_eda.app.worker_queues:WorkerQueues",
)


def install(app: Celery, outbox: Outbox) -> None:
    """Extend *app*: its publishing, its result backend, its logs, and the steps of its workers."""
    app.amqp_cls = amqp_class(app.amqp_cls)
    app.__dict__.pop("amqp", None)
    wrap_send_task(app, outbox)
    defer_results(app)
    listen_to_sessions()
    listen_for_unattached()
    signals.beat_init.connect(publish_on_schedule)
    for name in LOGS_OF_ERRORS:
        redaction.logger(name)
    app.steps["worker"].update(WORKER_STEPS)
    app.steps["consumer"].update(CONSUMER_STEPS)
    app.on_after_finalize.connect(make_reliable)


def publish_on_schedule(**_: Any) -> None:
    """Let ``beat`` publish although ``eda_outside`` refuses publishing outside a transaction."""
    context.open_scope(None)


def make_reliable(sender: Celery, **_: Any) -> None:
    """Make the tasks that ``eda_tasks`` names reliable, and Celery's own tasks of the canvas.

    Celery calls it when the app is finalized. A worker calls it again when it starts, for tasks
    defined in between.
    """
    service = service_of(sender)
    for name, task in sender._tasks.items():
        if getattr(task, "reliable", None) is not None:
            continue
        if service.is_named(name) or name in CANVAS_TASKS:
            made_reliable(task)
