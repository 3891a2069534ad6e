"""The transactional outbox: capture, transactions, writer, store, relay."""

from __future__ import annotations

from celery_eda.outbox import result_backend
from celery_eda.outbox.capture.amqp import amqp_class, wrap_send_task
from celery_eda.outbox.publisher import publishing, stored
from celery_eda.outbox.result_backend import defer as defer_results
from celery_eda.outbox.store import OutboxStore
from celery_eda.outbox.transactions.attach import attach
from celery_eda.outbox.transactions.base import Transaction
from celery_eda.outbox.transactions.join import join, outside, transaction
from celery_eda.outbox.transactions.session import listen as listen_to_sessions
from celery_eda.outbox.transactions.unattached import listen as listen_for_unattached
from celery_eda.outbox.wiring import Outbox
from celery_eda.outbox.writer import Writer, Written

__all__ = [
    "Outbox",
    "OutboxStore",
    "Transaction",
    "Writer",
    "Written",
    "amqp_class",
    "attach",
    "defer_results",
    "join",
    "listen_for_unattached",
    "listen_to_sessions",
    "outside",
    "publishing",
    "result_backend",
    "stored",
    "transaction",
    "wrap_send_task",
]
