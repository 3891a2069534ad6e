"""From the outbox to the broker: claim, send, wait for the confirms, clear.

A relay that has much to send does all of that while the broker works on what it was sent before.

Any number of relays work side by side, in processes of their own, beside workers, and in the
committing processes themselves. None of them is needed for the promise, only for progress: a row
leaves the outbox when the broker has confirmed that very message, whoever sent it.
"""

from __future__ import annotations

import operator
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from uuid import uuid4

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from celery_eda import addresses, checkpoints, redaction
from celery_eda.dead_letters import DeadLetterStore
from celery_eda.event import EVENT_EXCHANGE
from celery_eda.letter import Reason
from celery_eda.outbox import OutboxStore, Pending
from celery_eda.relay_batch import Batch, Hands
from celery_eda.results import Prerequisites
from celery_eda.retry import OUTAGE_DELAY, backoff
from celery_eda.settings import Settings
from celery_eda.transports.base import Pipelined, PublishResult, Transport, Verdict

log = redaction.logger(__name__)

#: Batches of which each is claimed behind the one before. What became free or was committed behind
#: them is found when that is begun anew.
CHAIN = 20
#: Batches that a broker works on at the same time.
UNDER_WAY = 2
#: Seconds within which a server that is there refuses what has to precede a message.
PROMPT = 0.5


@dataclass(frozen=True)
class Round:
    """What became of the messages of one round.

    ``dropped`` ones are replies for whom nobody waits any more, and events to which nobody
    subscribes. ``refused`` ones rest for a while:
    the broker did not take them, or what has to precede one of them could not be done. ``unknown``
    ones stay in the outbox as they were: the broker was away.
    """

    confirmed: int = 0
    dropped: int = 0
    refused: int = 0
    unknown: int = 0

    def __add__(self, other: Round) -> Round:
        return Round(*map(operator.add, astuple(self), astuple(other)))

    @property
    def claimed(self) -> int:
        return self.confirmed + self.dropped + self.refused + self.unknown


class Relay:
    """Sends what is due, in one thread.

    Args:
        prepare: makes the calls on the result backend that a message needs first.
        make_transport: connects to the broker; called in the thread that sends.
        housekeep: what there is to do beside sending, in small steps; a step is taken whenever
            the next value is asked for.
    """

    def __init__(
        self,
        engine: Engine,
        outbox: OutboxStore,
        dead_letters: DeadLetterStore,
        make_transport: Callable[[], Transport],
        prepare: Callable[[Prerequisites], None],
        settings: Settings,
        housekeep: Callable[[], Iterator[object]] = lambda: iter(()),
    ) -> None:
        self.engine = engine
        self.outbox = outbox
        self.dead_letters = dead_letters
        self.make_transport = make_transport
        self.prepare = prepare
        self.settings = settings
        self.housekeep = housekeep
        self.owner = uuid4().hex
        self.stopping = threading.Event()
        self._transport: Transport | None = None
        self._rest_of_housekeeping = housekeep()
        self._housekeeping_due = time.monotonic() + settings.housekeeping_interval

    def run(self) -> None:
        """Send until :meth:`stop`. Outages are waited for, and nothing is raised."""
        idle = failures = 0
        while not self.stopping.is_set():
            done = self._round_or_none()
            if done is None or (done.unknown and not done.confirmed):
                pause = backoff(failures, *OUTAGE_DELAY)
                failures, idle = failures + 1, 0
            else:
                failures = 0
                idle = 0 if done.claimed else idle + 1
                # From 2 ms after the last message up to the longest pause of an empty outbox.
                pause = min(self.settings.relay_poll, 0.001 * 2.0 ** min(idle, 62)) if idle else 0
            if done is not None and done.claimed < self.settings.relay_batch:
                self._take_a_step_of_housekeeping()
            self.stopping.wait(pause)
        self.close()

    def drain(self) -> Round:
        """Send everything that is due now, then return what became of it.

        Raises:
            SQLAlchemyError: the database is away.
        """
        total = Round()
        while (done := self.send()).claimed:
            total += done
            if done.unknown and not done.confirmed:
                break
        self.close()
        return total

    def stop(self) -> None:
        """End :meth:`run` after the round in progress."""
        self.stopping.set()

    def close(self) -> None:
        """Drop the connection to the broker."""
        if self._transport:
            self._transport.close()
            self._transport = None

    def send(self, ids: Sequence[int] = ()) -> Round:
        """Claim rows that are due (only *ids*, if given), send, settle; as long as there are many.

        While the broker works on one batch, the one before it is settled and the next one claimed,
        if the broker's transport can be given more than one.

        Raises:
            SQLAlchemyError: the database is away; what was claimed is free again.
        """
        transport = self._transport = self._transport or self.make_transport()
        with Hands(self.engine) as hands:
            batches = self._chain(hands, ids)
            if isinstance(transport, Pipelined):
                return self._overlap(transport, batches, hands)
            done = Round()
            for batch in batches:
                hands.hear(batch, transport.publish(batch.messages))
                done += self._settle(hands, batch)
            return done

    def _overlap(self, transport: Pipelined, batches: Iterator[Batch], hands: Hands) -> Round:
        """Send *batches*, so that the broker has the next one while it is heard about the last.

        What it has answered is settled, and one more claimed, when it has got its work.
        """
        done, sent = Round(), deque[Batch]()
        try:
            ready = next(batches, None)
            while ready or sent:
                heard = None
                if ready is None or len(sent) == UNDER_WAY:
                    hands.hear(sent[0], transport.finish())
                    heard = sent.popleft()
                    if ready and (hands.is_in_doubt or self._is_late(ready)):
                        self._give_back(hands, ready)
                        ready = None
                if ready:
                    sent.append(ready)
                    transport.begin(ready.messages)
                if heard:
                    done += self._settle(hands, heard)
                ready = next(batches, None)
        finally:
            if sent:  # somebody else would be told what the broker answers
                self.close()
        return done

    def _chain(self, hands: Hands, ids: Sequence[int]) -> Iterator[Batch]:
        """Batches, each claimed behind the one before when it is asked for."""
        last = 0
        while batch := self._claim(hands, ids, last):
            yield batch
            is_full = len(batch.pending) >= self.settings.relay_batch
            is_over = hands.taken >= CHAIN or hands.is_in_doubt or self.stopping.is_set()
            if ids or not is_full or is_over:
                return
            last = batch.pending[-1].id

    def _claim(self, hands: Hands, ids: Sequence[int], after: int) -> Batch | None:
        """The next rows, in a transaction of their own; None if there are none."""
        batch = hands.take()
        limit = self.settings.relay_batch
        batch.pending = self.outbox.claim(batch.connection, self.owner, limit, ids, after)
        if not batch.pending:
            hands.let_go(batch)
            return None
        checkpoints.reach("relay.claimed")
        batch.unprepared = self._unprepared(batch.pending)
        return batch

    def _settle(self, hands: Hands, batch: Batch) -> Round:
        """Note what the broker answered to *batch*, and commit that."""
        checkpoints.reach("relay.confirmed")
        done = self._note(batch.connection, batch.answered, batch.unprepared)
        hands.let_go(batch)
        checkpoints.reach("relay.cleared")
        return done

    def _is_late(self, batch: Batch) -> bool:
        """Whether its claim might end before the broker has answered."""
        spare = self.settings.claim_timeout - self.settings.publish_timeout
        return time.monotonic() > batch.since + spare

    def _give_back(self, hands: Hands, batch: Batch) -> None:
        """Let others have what was claimed and not sent; what could not be sent rests."""
        self._note(batch.connection, (), batch.unprepared)
        self.outbox.release(batch.connection, self.owner, [each.id for each in batch.sendable])
        hands.let_go(batch)

    def _unprepared(self, pending: Sequence[Pending]) -> dict[int, str]:
        """Those that cannot be sent yet, and why: what has to precede them failed.

        After a failure that took its time no other is tried: each may take as long as a time-out.
        """
        demanding = [each for each in pending if each.message.prerequisites]
        unprepared: dict[int, str] = {}
        for position, each in enumerate(demanding):
            started = time.monotonic()
            try:
                self.prepare(each.message.prerequisites)
            except Exception as error:
                log.warning("what has to precede a message cannot be done: %r", error)
                why = f"What has to precede it cannot be done: {error!r}"[:500]
                late = time.monotonic() - started > PROMPT
                concerned = demanding[position:] if late else [each]
                unprepared |= {one.id: why for one in concerned}
                if late:
                    break
        return unprepared

    def _note(
        self,
        connection: Connection,
        answered: Sequence[tuple[Pending, PublishResult]],
        unprepared: Mapping[int, str],
    ) -> Round:
        """Clear what was confirmed, let rest what cannot be sent, give back the others."""
        by_verdict = {
            verdict: [pair for pair in answered if pair[1].verdict is verdict]
            for verdict in Verdict
        }
        confirmed, refused, unknown = by_verdict.values()
        unwanted = [each for each, answer in refused if _is_unwanted(each, answer)]
        gone = [*(each for each, _ in confirmed), *unwanted]
        self.outbox.clear(connection, self.owner, [each.id for each in gone])
        _tell_of(unwanted)
        for each, answer in refused:
            if each not in unwanted:
                self._refuse(connection, each, answer.why)
        for row_id, why in unprepared.items():
            self._rest(connection, row_id, OUTAGE_DELAY[1], why)
        if unknown:
            self._leave(connection, unknown, broker_answers=bool(confirmed))
        return Round(
            confirmed=len(confirmed),
            dropped=len(unwanted),
            refused=len(refused) - len(unwanted) + len(unprepared),
            unknown=len(unknown),
        )

    def _leave(
        self,
        connection: Connection,
        unknown: Sequence[tuple[Pending, PublishResult]],
        *,
        broker_answers: bool,
    ) -> None:
        """Leave what nobody knows about in the outbox; no attempt is charged."""
        why = unknown[0][1].why
        log.warning("%d messages stay in the outbox, to be sent again: %s", len(unknown), why)
        if not broker_answers:
            self.outbox.release(connection, self.owner, [each.id for each, _ in unknown])
            return
        for each, _ in unknown:
            # A queue that never confirms must not hold up the others.
            self._rest(connection, each.id, self.settings.claim_timeout, why)

    def _rest(self, connection: Connection, row_id: int, delay: float, why: str) -> None:
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

    def _take_a_step_of_housekeeping(self) -> None:
        """If it is time for it; what goes wrong there does not stop the sending.

        Only when no full batch was there to be sent: what waits for the broker goes first.
        """
        if time.monotonic() < self._housekeeping_due:
            return
        try:
            if next(self._rest_of_housekeeping, None) is not None:
                return
        except Exception as error:
            log.warning("the housekeeping fails, and is done again later: %r", error)
        self._rest_of_housekeeping = self.housekeep()
        self._housekeeping_due = time.monotonic() + self.settings.housekeeping_interval

    def _round_or_none(self) -> Round | None:
        try:
            return self.send()
        except SQLAlchemyError as error:
            log.warning("the relay cannot reach the outbox, trying again: %s", error)
        except Exception:  # beside a worker nobody would start it again
            log.exception("the relay has failed, trying again")
            self.close()
        return None


def _is_unwanted(pending: Pending, answer: PublishResult) -> bool:
    """Whether it may go unheard: a reply to a process that is gone, or an event."""
    message = pending.message
    unheard = _is_event(pending) or addresses.is_volatile(message.routing_key)
    return answer.unroutable and unheard


def _is_event(pending: Pending) -> bool:
    return pending.message.exchange == EVENT_EXCHANGE


def _tell_of(unwanted: Sequence[Pending]) -> None:
    events = sum(map(_is_event, unwanted))
    if replies := len(unwanted) - events:
        log.warning("%d replies are dropped: who asked for them is gone", replies)
    if events:
        log.info("%d events have no subscriber", events)
