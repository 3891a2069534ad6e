"""From the outbox to the broker: claim, publish, wait for the confirms, clear.

With a backlog, a relay claims and clears batches while the broker works on others.

Any number of relays work side by side: in processes of their own, beside workers, and in the
committing processes themselves. None of them is needed for the promise, only for progress: a row
leaves the outbox when the broker has confirmed that very message, whichever relay sent it.
"""

from __future__ import annotations

import operator
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Protocol
from uuid import uuid4

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from celery_eda.brokers import Pipelined, PublishResult, Transport, Verdict
from celery_eda.core import addresses, checkpoints, redaction
from celery_eda.core.event import EVENT_EXCHANGE
from celery_eda.core.retry import OUTAGE_DELAY, backoff
from celery_eda.core.settings import Settings
from celery_eda.dead_letters import DeadLetterStore, Reason
from celery_eda.outbox.batch import Batch, ClaimedBatches
from celery_eda.outbox.result_backend import ResultBackend
from celery_eda.outbox.store import OutboxStore, Pending

log = redaction.logger(__name__)

#: Batches that are claimed by ascending ids before a relay starts again at the lowest id. Rows with
#: lower ids may have been committed, or become free, in the meantime.
CHAIN = 20
#: Batches that the broker works on at the same time.
IN_FLIGHT = 2
#: Seconds within which a server that is up answers a prerequisite, be it by an error.
PROMPT = 0.5


class Broker(Protocol):
    """Connects to the broker."""

    def connect(self) -> Transport:
        """A new connection, for the thread that calls this."""
        ...


class Chores(Protocol):
    """One round of housekeeping."""

    def step(self) -> bool:
        """Do a small step; False if there was nothing left to do.

        Raises:
            SQLAlchemyError: the database is away.
        """
        ...


class Housekeeping(Protocol):
    """Housekeeping that a relay does beside its sending."""

    def start(self) -> Chores:
        """Begin a new round."""
        ...


@dataclass(frozen=True)
class RelayResult:
    """The numbers of messages by what became of them.

    Attributes:
        confirmed: the broker has them.
        dropped: replies to processes that have ended, and events without a subscription.
        refused: refused by the broker, or with a prerequisite that failed. They are retried later.
        unknown: the broker was away. They stay in the outbox as they were.
    """

    confirmed: int = 0
    dropped: int = 0
    refused: int = 0
    unknown: int = 0

    def __add__(self, other: RelayResult) -> RelayResult:
        return RelayResult(*map(operator.add, astuple(self), astuple(other)))

    @property
    def claimed(self) -> int:
        return self.confirmed + self.dropped + self.refused + self.unknown


class Relay:
    """Sends the messages that are due, in one thread.

    Args:
        broker: gives the thread that sends its connection.
        backend: makes the calls that have to precede a message.
        housekeeping: is done beside the sending, while there is no backlog.
    """

    def __init__(
        self,
        engine: Engine,
        outbox: OutboxStore,
        dead_letters: DeadLetterStore,
        broker: Broker,
        backend: ResultBackend,
        settings: Settings,
        housekeeping: Housekeeping | None = None,
    ) -> None:
        self.engine = engine
        self.outbox = outbox
        self.dead_letters = dead_letters
        self.broker = broker
        self.backend = backend
        self.settings = settings
        self.housekeeping = housekeeping
        self.owner = uuid4().hex
        self.stopping = threading.Event()
        self._transport: Transport | None = None
        self._chores: Chores | None = None
        self._housekeeping_due = time.monotonic() + settings.housekeeping_interval

    def another(self) -> Relay:
        """A relay of the same outbox with connections of its own, for another thread or process."""
        return Relay(
            engine=self.engine,
            outbox=self.outbox,
            dead_letters=self.dead_letters,
            broker=self.broker,
            backend=self.backend,
            settings=self.settings,
            housekeeping=self.housekeeping,
        )

    def run(self) -> None:
        """Send until :meth:`stop`. Waits for the end of outages, and raises nothing."""
        idle = failures = 0
        while not self.stopping.is_set():
            done = self._send_or_log()
            if done is None or (done.unknown and not done.confirmed):
                pause = backoff(failures, *OUTAGE_DELAY)
                failures, idle = failures + 1, 0
            else:
                failures = 0
                idle = 0 if done.claimed else idle + 1
                # From 2 ms after the last message up to the longest pause of an empty outbox.
                pause = min(self.settings.relay_poll, 0.001 * 2.0 ** min(idle, 62)) if idle else 0
            if done is not None and done.claimed < self.settings.relay_batch:
                self._keep_house()
            self.stopping.wait(pause)
        self.close()

    def drain(self) -> RelayResult:
        """Send every message that is due now.

        Raises:
            SQLAlchemyError: the database is away.
        """
        total = RelayResult()
        while (done := self.send()).claimed:
            total += done
            if done.unknown and not done.confirmed:
                break
        self.close()
        return total

    def stop(self) -> None:
        """End :meth:`run` after the batches in progress."""
        self.stopping.set()

    def close(self) -> None:
        """Close the connection to the broker."""
        if self._transport:
            self._transport.close()
            self._transport = None

    def send(self, ids: Sequence[int] = ()) -> RelayResult:
        """Claim rows that are due, send and settle them; repeat while there is a full batch.

        With a pipelined transport, one batch is settled and the next one claimed while the broker
        works on others.

        Args:
            ids: the rows to claim; by default all that are due.

        Raises:
            SQLAlchemyError: the database is away. All claims end with their connections.
        """
        transport = self._transport = self._transport or self.broker.connect()
        with ClaimedBatches(self.engine) as claimed:
            batches = self._chain(claimed, ids)
            if isinstance(transport, Pipelined):
                return self._overlap(transport, batches, claimed)
            done = RelayResult()
            for batch in batches:
                claimed.receive(batch, transport.publish(batch.messages))
                done += self._settle(claimed, batch)
            return done

    def _overlap(
        self, transport: Pipelined, batches: Iterator[Batch], claimed: ClaimedBatches
    ) -> RelayResult:
        """Send *batches* so that the broker always has work.

        The relay sends the next batch first. Then it settles the one that the broker has answered,
        and claims another one.
        """
        done, in_flight = RelayResult(), deque[Batch]()
        try:
            ready = next(batches, None)
            while ready or in_flight:
                answered = None
                if ready is None or len(in_flight) == IN_FLIGHT:
                    claimed.receive(in_flight[0], transport.finish())
                    answered = in_flight.popleft()
                    if ready and (claimed.is_in_doubt or self._is_late(ready)):
                        self._release(claimed, ready)
                        ready = None
                if ready:
                    in_flight.append(ready)
                    transport.begin(ready.messages)
                if answered:
                    done += self._settle(claimed, answered)
                ready = next(batches, None)
        finally:
            if in_flight:  # the next batch on this connection would get the answers to these
                self.close()
        return done

    def _chain(self, claimed: ClaimedBatches, ids: Sequence[int]) -> Iterator[Batch]:
        """Batches by ascending ids, each claimed when the caller asks for it."""
        last = 0
        while batch := self._claim(claimed, ids, last):
            yield batch
            is_full = len(batch.pending) >= self.settings.relay_batch
            is_over = claimed.count >= CHAIN or claimed.is_in_doubt or self.stopping.is_set()
            if ids or not is_full or is_over:
                return
            last = batch.pending[-1].id

    def _claim(self, claimed: ClaimedBatches, ids: Sequence[int], after: int) -> Batch | None:
        """The next rows, claimed in a transaction of their own; None if there are none."""
        batch = claimed.begin()
        limit = self.settings.relay_batch
        batch.pending = self.outbox.claim(batch.connection, self.owner, limit, ids, after)
        if not batch.pending:
            claimed.commit(batch)
            return None
        checkpoints.reach("relay.claimed")
        batch.unprepared = self._unprepared(batch.pending)
        return batch

    def _settle(self, claimed: ClaimedBatches, batch: Batch) -> RelayResult:
        """Record the broker's answers to *batch*, and commit."""
        checkpoints.reach("relay.confirmed")
        done = self._record(batch.connection, batch.answered, batch.unprepared)
        claimed.commit(batch)
        checkpoints.reach("relay.cleared")
        return done

    def _is_late(self, batch: Batch) -> bool:
        """True if the claim on *batch* might end before the broker has answered."""
        spare = self.settings.claim_timeout - self.settings.publish_timeout
        return time.monotonic() > batch.since + spare

    def _release(self, claimed: ClaimedBatches, batch: Batch) -> None:
        """Give up the claim on a batch that was not sent."""
        self._record(batch.connection, (), batch.unprepared)
        self.outbox.release(batch.connection, self.owner, [each.id for each in batch.sendable])
        claimed.commit(batch)

    def _unprepared(self, pending: Sequence[Pending]) -> dict[int, str]:
        """The rows whose prerequisites failed, with the reasons, by row id.

        After a failure that took long no further prerequisites are tried: each might take as long
        as a time-out.
        """
        demanding = [each for each in pending if each.message.prerequisites]
        unprepared: dict[int, str] = {}
        for position, each in enumerate(demanding):
            started = time.monotonic()
            try:
                self.backend.run(each.message.prerequisites)
            except Exception as error:
                log.warning("a prerequisite of a message failed, it is sent later: %r", error)
                why = f"A prerequisite failed: {error!r}"[:500]
                late = time.monotonic() - started > PROMPT
                concerned = demanding[position:] if late else [each]
                unprepared |= {one.id: why for one in concerned}
                if late:
                    break
        return unprepared

    def _record(
        self,
        connection: Connection,
        answered: Sequence[tuple[Pending, PublishResult]],
        unprepared: Mapping[int, str],
    ) -> RelayResult:
        """Clear the confirmed rows, postpone those that cannot be sent, release the others."""
        by_verdict = {
            verdict: [pair for pair in answered if pair[1].verdict is verdict]
            for verdict in Verdict
        }
        confirmed, refused, unknown = by_verdict.values()
        dropped = [each for each, answer in refused if _may_be_dropped(each, answer)]
        gone = [*(each for each, _ in confirmed), *dropped]
        self.outbox.clear(connection, self.owner, [each.id for each in gone])
        _log_dropped(dropped)
        for each, answer in refused:
            if each not in dropped:
                self._refuse(connection, each, answer.why)
        for row_id, why in unprepared.items():
            self._postpone(connection, row_id, OUTAGE_DELAY[1], why)
        if unknown:
            self._leave(connection, unknown, broker_answers=bool(confirmed))
        return RelayResult(
            confirmed=len(confirmed),
            dropped=len(dropped),
            refused=len(refused) - len(dropped) + len(unprepared),
            unknown=len(unknown),
        )

    def _leave(
        self,
        connection: Connection,
        unknown: Sequence[tuple[Pending, PublishResult]],
        *,
        broker_answers: bool,
    ) -> None:
        """Leave messages with an unknown fate in the outbox; no attempt is charged."""
        why = unknown[0][1].why
        log.warning("%d messages stay in the outbox, to be sent again: %s", len(unknown), why)
        if not broker_answers:
            self.outbox.release(connection, self.owner, [each.id for each, _ in unknown])
            return
        for each, _ in unknown:
            # A queue that never confirms must not hold up the others.
            self._postpone(connection, each.id, self.settings.claim_timeout, why)

    def _postpone(self, connection: Connection, row_id: int, delay: float, why: str) -> None:
        self.outbox.postpone(connection, self.owner, row_id, delay, why, charged=False)

    def _refuse(self, connection: Connection, pending: Pending, why: str) -> None:
        attempts = pending.attempts + 1
        if attempts >= self.settings.max_attempts:
            if message := self.outbox.withdraw(connection, self.owner, pending.id):
                log.error("dead letter: %s cannot be sent: %s", message.task, why)
                self.dead_letters.add(
                    connection, message, Reason.unsendable, error=why, attempts=attempts
                )
            return
        delay = backoff(pending.attempts, self.settings.retry_delay, self.settings.retry_delay_max)
        log.warning(
            "%s was refused by the broker, next try in %.1f s: %s", pending.message.task, delay, why
        )
        self.outbox.postpone(connection, self.owner, pending.id, delay, why)

    def _keep_house(self) -> None:
        """Do one step of housekeeping, if a round is due; an error ends the round only.

        It is called only when there was no full batch, since messages go first.
        """
        if self.housekeeping is None or time.monotonic() < self._housekeeping_due:
            return
        try:
            self._chores = self._chores or self.housekeeping.start()
            if self._chores.step():
                return
        except Exception as error:
            log.warning("the housekeeping failed and is tried again later: %r", error)
        self._chores = None
        self._housekeeping_due = time.monotonic() + self.settings.housekeeping_interval

    def _send_or_log(self) -> RelayResult | None:
        try:
            return self.send()
        except SQLAlchemyError as error:
            log.warning("the relay cannot reach the outbox, trying again: %s", error)
        except Exception:  # the relay has to go on: beside a worker nothing would restart it
            log.exception("the relay has failed, trying again")
            self.close()
        return None


def _may_be_dropped(pending: Pending, answer: PublishResult) -> bool:
    """True if an unroutable message may be dropped.

    That is a reply to a process that has ended, or an event without a subscription.
    """
    is_reply = addresses.is_volatile(pending.message.routing_key)
    return answer.unroutable and (is_reply or _is_event(pending))


def _is_event(pending: Pending) -> bool:
    return pending.message.exchange == EVENT_EXCHANGE


def _log_dropped(dropped: Sequence[Pending]) -> None:
    events = sum(map(_is_event, dropped))
    if replies := len(dropped) - events:
        log.warning("%d replies are dropped: the processes that asked have ended", replies)
    if events:
        log.info("%d events have no subscription", events)
