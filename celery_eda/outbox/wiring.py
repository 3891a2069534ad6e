"""Messages on their way from a transaction to the broker."""

from __future__ import annotations

from celery_eda.brokers import Brokers
from celery_eda.core.once import cached_once
from celery_eda.core.service import Service
from celery_eda.databases import Databases
from celery_eda.dead_letters import DeadLetters
from celery_eda.ordering import Ordering
from celery_eda.outbox.housekeeping import Housekeeping, Retained
from celery_eda.outbox.relay import Relay
from celery_eda.outbox.result_backend import ResultBackend
from celery_eda.outbox.sender import CommitSender
from celery_eda.outbox.sent_events import SentEvents
from celery_eda.outbox.store import OutboxStore
from celery_eda.outbox.writer import Companion, Writer


class Outbox:
    """The transactional outbox of one service.

    Attributes:
        service: the service that publishes the messages.
        databases: its database.
        companions: wings that write rows beside the messages of a transaction, in this order.
        retained: wings with rows that may be deleted some day, in the order of housekeeping.
    """

    def __init__(
        self,
        service: Service,
        databases: Databases,
        brokers: Brokers,
        ordering: Ordering,
        dead_letters: DeadLetters,
    ) -> None:
        self.service = service
        self.databases = databases
        self._brokers = brokers
        self._ordering = ordering
        self._dead_letters = dead_letters
        self.companions: list[Companion] = []
        self.retained: list[Retained] = [dead_letters]
        service.add(self)

    @cached_once
    def store(self) -> OutboxStore:
        """The messages that are committed and not sent yet."""
        databases = self.databases
        return OutboxStore(
            databases.tables.outbox,
            databases.dialect,
            self._brokers.encode_envelope,
            self.service.name_or_none,
        )

    @cached_once
    def writer(self) -> Writer:
        """Writes captured messages with the commit."""
        return Writer(
            engine=self.databases.engine,
            sequences=self._ordering.sequences,
            companions=self.companions,
            direct=self._brokers.direct,
            store=self.store,
            sender=self.sender if self.service.settings.send_after_commit else None,
        )

    @cached_once
    def sender(self) -> CommitSender:
        """Sends what this process commits, right after the commit."""
        return CommitSender(self.relay())

    @cached_once
    def housekeeping(self) -> Housekeeping:
        """Deletes rows past their retention. Relays do so beside sending."""
        chores = [chore for wing in self.retained for chore in wing.retention()]
        return Housekeeping(self.databases.relay_engine, chores)

    def relay(self) -> Relay:
        """A new relay with connections of its own, for one thread."""
        return Relay(
            engine=self.databases.relay_engine,
            outbox=self.store,
            dead_letters=self._dead_letters.store,
            broker=self._brokers,
            backend=ResultBackend(self.service.app),
            settings=self.service.settings,
            housekeeping=self.housekeeping,
            sent_events=SentEvents(self.service.app, self.service.settings.publish_timeout),
        )
