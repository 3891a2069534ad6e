"""From the outbox to the broker: claim, publish, wait for the confirms, settle.

With a backlog, a relay claims and clears batches while the broker works on others.

Any number of relays work side by side: in processes of their own, beside workers, and in the
committing processes themselves. None of them is needed for the promise, only for progress: a row
leaves the outbox when the broker has confirmed that very message, whichever relay sent it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from uuid import uuid4

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from celery_eda.brokers import Brokers, Pipelined, Transport
from celery_eda.core import checkpoints, redaction
from celery_eda.core.retry import OUTAGE_DELAY, backoff
from celery_eda.core.settings import Settings
from celery_eda.dead_letters import DeadLetterStore
from celery_eda.outbox.batch import Batch, ClaimedBatches
from celery_eda.outbox.housekeeping import Housekeeping, Round, warn_of_abandoned
from celery_eda.outbox.result_backend import ResultBackend
from celery_eda.outbox.sent_events import SentEvents
from celery_eda.outbox.settlement import RelayResult, Settlement
from celery_eda.outbox.store import OutboxStore, Pending

log = redaction.logger(__name__)

#: Batches that are claimed by ascending ids before a relay starts again at the lowest id. Rows with
#: lower ids may have been committed, or become free, in the meantime.
CHAIN = 20
#: Batches that the broker works on at the same time.
IN_FLIGHT = 2
#: Seconds within which a server that is up answers a prerequisite, be it by an error.
PROMPT = 0.5


class Relay:
    """Sends the messages that are due, in one thread.

    Args:
        broker: gives the thread that sends its connection.
        backend: makes the calls that have to precede a message.
        housekeeping: is done beside the sending, while there is no backlog.
        sent_events: are published for monitors when messages have been sent.
    """

    def __init__(
        self,
        engine: Engine,
        outbox: OutboxStore,
        dead_letters: DeadLetterStore,
        broker: Brokers,
        backend: ResultBackend,
        settings: Settings,
        housekeeping: Housekeeping | None = None,
        sent_events: SentEvents | None = None,
    ) -> None:
        self.engine = engine
        self.outbox = outbox
        self.dead_letters = dead_letters
        self.broker = broker
        self.backend = backend
        self.settings = settings
        self.housekeeping = housekeeping
        self.sent_events = sent_events
        self.owner = uuid4().hex
        self.settlement = Settlement(outbox, dead_letters, settings, self.owner)
        self.stopping = threading.Event()
        self._transport: Transport | None = None
        self._round: Round | None = None
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
            sent_events=self.sent_events and self.sent_events.another(),
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
                self._housekeep()
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
        """Close the connections to the broker."""
        if self.sent_events:
            self.sent_events.close()
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
        events = self.sent_events.of(batch.answered) if self.sent_events else []
        done = self.settlement.settle(batch)
        claimed.commit(batch)
        checkpoints.reach("relay.cleared")
        if self.sent_events:
            self.sent_events.publish(events)
        return done

    def _is_late(self, batch: Batch) -> bool:
        """True if the claim on *batch* might end before the broker has answered."""
        spare = self.settings.claim_timeout - self.settings.publish_timeout
        return time.monotonic() > batch.since + spare

    def _release(self, claimed: ClaimedBatches, batch: Batch) -> None:
        """Give up the claim on a batch that was not sent."""
        self.settlement.release(batch)
        claimed.commit(batch)

    def _unprepared(self, pending: Sequence[Pending]) -> dict[int, str]:
        """The rows whose prerequisites failed, with the reasons, by row id.

        After a failure that took long, no further prerequisites are tried: each might take as long
        as a time-out.
        """
        demanding = [each for each in pending if each.message.prerequisites]
        unprepared: dict[int, str] = {}
        for position, each in enumerate(demanding):
            started = time.monotonic()
            try:
                self.backend.run(each.message.prerequisites, each.message.identity)
            except Exception as error:
                log.warning("a prerequisite of a message failed, it is sent later: %r", error)
                why = f"A prerequisite failed: {error!r}"[:500]
                late = time.monotonic() - started > PROMPT
                concerned = demanding[position:] if late else [each]
                unprepared |= {one.id: why for one in concerned}
                if late:
                    break
        return unprepared

    def _housekeep(self) -> None:
        """Do one step of housekeeping, if a round is due; an error ends the round only.

        It is called only when there was no full batch, since messages go first.
        """
        if self.housekeeping is None or time.monotonic() < self._housekeeping_due:
            return
        try:
            if self._round is None:
                warn_of_abandoned(self.engine, self.outbox)
            self._round = self._round or self.housekeeping.start()
            if self._round.step():
                return
        except Exception as error:
            log.warning("the housekeeping failed and is tried again later: %r", error)
        self._round = None
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
