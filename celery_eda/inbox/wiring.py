"""The inbox, as wired for one service."""

from __future__ import annotations

from typing import Any, Protocol

from kombu.utils.imports import symbol_by_name

from celery_eda.core.once import cached_once
from celery_eda.core.retry import Policy, checked_policy
from celery_eda.core.service import Service
from celery_eda.databases import Chore, Databases
from celery_eda.dead_letters import DeadLetters
from celery_eda.errors import ConfigurationError
from celery_eda.inbox.attempts import Attempts
from celery_eda.inbox.consumer import Consumer
from celery_eda.inbox.drain import longest_drain
from celery_eda.inbox.failures import Failures
from celery_eda.inbox.gaps import GivenUpMessages, OverdueKeys
from celery_eda.inbox.local_delivery import LocalDelivery
from celery_eda.inbox.ordering import ReleasedMessages, TurnKeeper
from celery_eda.inbox.refusals import Refusals
from celery_eda.inbox.store import InboxStore
from celery_eda.inbox.transient import TransientErrors
from celery_eda.inbox.unit_of_work import UnitsOfWork
from celery_eda.ordering import Ordering
from celery_eda.outbox import Outbox
from celery_eda.requests import Requests


class Readdresser(Protocol):
    """A wing with queues whose messages are not calls of tasks."""

    def readdress(self, message: Any, queue: str) -> None:
        """Rewrite *message*, kombu's, into a call of a task, if *queue* belongs to this wing."""
        ...


class Inbox:
    """The consuming side of one service.

    Attributes:
        readdressers: rewrite messages from queues whose messages are not calls of tasks.
        local_delivery: delivers parked messages in a worker that is connected to its broker; None
            elsewhere.
    """

    def __init__(
        self,
        service: Service,
        databases: Databases,
        ordering: Ordering,
        dead_letters: DeadLetters,
        outbox: Outbox,
        requests: Requests,
    ) -> None:
        self._service = service
        self._databases = databases
        self._ordering = ordering
        self._dead_letters = dead_letters
        self._outbox = outbox
        self._requests = requests
        self.readdressers: list[Readdresser] = []
        self.local_delivery: LocalDelivery | None = None
        service.add(self)
        outbox.retained.append(self)

    @cached_once
    def store(self) -> InboxStore:
        """The messages that have been handled."""
        return InboxStore(self._databases.tables.inbox, self._databases.dialect)

    @cached_once
    def attempts(self) -> Attempts:
        """Counts of redeliveries."""
        return Attempts(self._databases.tables.attempts, self._databases.dialect)

    @cached_once
    def consumer(self) -> Consumer:
        """Handles deliveries so that each message takes effect once."""
        databases, settings = self._databases, self._service.settings
        attempts = self.attempts
        timeout = settings.transaction_timeout
        units = UnitsOfWork(databases.engine, databases.dialect, attempts, self._outbox, timeout)
        turns = TurnKeeper(self._ordering.cursors)
        transient = TransientErrors(databases.dialect, settings.outage_patience)
        return Consumer(
            engine=databases.engine,
            inbox=self.store,
            attempts=attempts,
            units=units,
            turns=turns,
            failures=Failures(
                inbox=self.store,
                dead_letters=self._dead_letters.store,
                units=units,
                turns=turns,
                responder=self._requests.responder,
                transient_errors=transient,
                repair_tasks=self._dead_letters.repair_tasks,
            ),
            responder=self._requests.responder,
            transient_errors=transient,
            max_deliveries=settings.max_deliveries,
            transaction_timeout=timeout,
            policy=self.retry_policy,
        )

    @cached_once
    def longest_drain(self) -> float:
        """Seconds for which parked messages may follow one delivery of the broker."""
        transport = self._service.app.conf.broker_transport_options or {}
        return longest_drain(transport.get("visibility_timeout"))

    @cached_once
    def refusals(self) -> Refusals:
        """Stores messages that reach no task as dead letters."""
        return Refusals(
            engine=self._databases.engine,
            inbox=self.store,
            dead_letters=self._dead_letters.store,
            responder=self._requests.responder,
            writer=self._outbox.writer,
        )

    @cached_once
    def retry_policy(self) -> Policy | None:
        """The policy of tasks without one of their own.

        Raises:
            ConfigurationError: ``eda_retry_policy`` is not a policy.
        """
        if (given := self._service.settings.retry_policy) is None:
            return None
        try:
            policy: Policy = checked_policy(symbol_by_name(given))
            return policy
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigurationError(
                f"eda_retry_policy names {given!r}, which cannot be imported: {error}. "
                "Set it to `module:name` of a RetryPolicy or a function."
            ) from error

    def check(self) -> None:
        """Check the settings of the inbox.

        Raises:
            ConfigurationError: ``eda_retry_policy`` is not a policy.
        """
        _ = self.retry_policy

    def retention(self) -> list[Chore]:
        """The rules for messages that were handled, and for parked ones."""
        tables, settings = self._databases.tables, self._service.settings
        ordering = self._ordering
        return [
            ReleasedMessages(ordering.cursors, self._outbox.store, settings.transaction_timeout),
            GivenUpMessages(ordering.gaps, self._outbox.store),
            OverdueKeys(ordering.progress, settings.order_patience),
            self.store.retention(
                tables.dead_letters, tables.parked, tables.outbox, settings.inbox_retention
            ),
            self.attempts.retention(settings.inbox_retention),
        ]
