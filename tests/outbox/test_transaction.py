"""What a transaction captured is written whole, once, and only where there is one to share."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from sqlalchemy import Connection

from celery_eda.core.message import Message
from celery_eda.errors import AutocommitTransaction
from celery_eda.outbox.transactions.base import Transaction
from tests.support.messages import message
from tests.support.outboxes import stand_in_outbox
from tests.support.service import Service


def test_everything_captured_is_written_in_one_go(service: Service) -> None:
    batches: list[int] = []

    def add(connection: Connection, messages: Sequence[Message]) -> list[int]:
        batches.append(len(messages))
        return service.outbox.add(connection, messages)

    transaction = Transaction(
        stand_in_outbox(add, service.store.writer.dispatch, service.store_apart)
    )
    transaction.capture(message("a"))
    transaction.capture(message("b"))
    with service.engine.begin() as connection:
        transaction.write(connection)
        transaction.write(connection)

    assert (batches, service.sent) == ([2], "ab")


def test_a_failed_write_keeps_the_messages_so_that_a_second_commit_fails_too(
    service: Service,
) -> None:
    def fail(connection: Connection, messages: Sequence[Message]) -> list[int]:
        raise OSError("the disk is full")

    transaction = Transaction(
        stand_in_outbox(fail, service.store.writer.dispatch, service.store_apart)
    )
    transaction.capture(message("a"))

    with service.engine.begin() as connection:
        for _ in range(2):
            with pytest.raises(OSError, match="full"):
                transaction.write(connection)


def test_ids_are_handed_off_once(service: Service) -> None:
    transaction = Transaction(service.store)
    transaction.capture(message("a"))
    with service.engine.begin() as connection:
        transaction.write(connection)

    transaction.dispatch()
    transaction.dispatch()

    assert service.handed_off == ["a"]


def test_what_was_forgotten_is_neither_written_nor_handed_off(service: Service) -> None:
    transaction = Transaction(service.store)
    transaction.capture(message("a"))
    transaction.drop()
    with service.engine.begin() as connection:
        transaction.write(connection)
    transaction.dispatch()

    assert (service.sent, service.handed_off) == ("", [])


def test_a_connection_that_commits_by_itself_is_refused(service: Service) -> None:
    transaction = Transaction(service.store)
    transaction.capture(message("a"))

    alone = service.engine.execution_options(isolation_level="AUTOCOMMIT")
    with alone.connect() as connection, pytest.raises(AutocommitTransaction):
        transaction.write(connection)
    assert service.sent == ""
