"""Replies to requests, as the requester waits for them: one reply, or enough of several."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator, Sequence
from concurrent.futures import CancelledError, Future, as_completed
from concurrent.futures import TimeoutError as WaitTimeout
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast
from uuid import UUID

from celery_eda.core import context
from celery_eda.core.identity import Identity
from celery_eda.errors import RequestTimeout, UnsentRequest
from celery_eda.requests.mailbox import Mailbox
from celery_eda.requests.outcomes import ErrorOutcome
from celery_eda.requests.watcher import ReplyWatcher

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

_TIMEOUTS = (TimeoutError, WaitTimeout, asyncio.TimeoutError)


class PendingReply(Protocol):
    """Access to the outcome of one request, wherever the reply arrives."""

    @property
    def done(self) -> bool:
        """True if the outcome is available."""
        ...

    def future(self, timeout: float) -> Future[Any]:
        """Future of the result or :class:`ErrorOutcome`.

        The future may be cancelled once *timeout* seconds have passed without a reply.
        """
        ...

    @property
    def given_up(self) -> bool:
        """True if the reply can no longer arrive, because a wait for it has ended without it."""
        ...

    def cancel(self) -> None:
        """Stop waiting."""
        ...


@dataclass(frozen=True)
class CommitGuard:
    """Refusal to wait for a reply inside the transaction whose commit sends the request.

    Attributes:
        identity: of the request.
        transaction: the one that captured the request; None if it was stored at once.
    """

    correlation_id: str
    identity: Identity
    transaction: context.Capture | None

    def check(self) -> None:
        """Raise if the request is still uncommitted.

        Raises:
            UnsentRequest: waiting now would never end.
        """
        if context.holds(self.identity, self.transaction):
            raise UnsentRequest(
                f"The request {self.correlation_id} is sent when its transaction commits, so its "
                "reply cannot be awaited inside that transaction. Wait after the `with` block, or "
                "in a following task."
            )


class Reply(Generic[R_co]):
    """The reply to one request: ``reply.get(timeout=2)``, or ``await reply``.

    Attributes:
        correlation_id: of the request and of its reply. For a durable request any process of the
            same service finds the reply with ``eda.reply(correlation_id)``.
    """

    def __init__(
        self,
        correlation_id: str,
        pending: PendingReply,
        guard: CommitGuard | None,
        timeout: float,
    ) -> None:
        self.correlation_id = correlation_id
        self.pending = pending
        self._guard = guard
        self._timeout = timeout

    @property
    def done(self) -> bool:
        """True if the reply has arrived. For a durable request this reads the database."""
        return self.pending.done

    def get(self, timeout: float | None = None) -> R_co:
        """Wait for the result.

        Args:
            timeout: seconds to wait at most; by default ``eda_request_timeout``.

        Raises:
            RequestTimeout: no reply arrived in time. Unless the request is durable, a later reply
                is dropped.
            UnsentRequest: the transaction that holds the request is not committed yet.
            RemoteError: the responder failed permanently. If the type of its error is built into
                Python, or registered with ``eda.register_error``, that error is raised instead.
        """
        self._check()
        seconds = self._timeout if timeout is None else timeout
        try:
            outcome = self.pending.future(seconds).result(seconds)
        except (*_TIMEOUTS, CancelledError) as error:
            raise self._timed_out(seconds) from error
        return cast(R_co, _result_or_raise(outcome))

    def __await__(self) -> Generator[Any, None, R_co]:
        return self._get_async().__await__()

    def cancel(self) -> None:
        """Stop waiting, and drop a later reply. The request itself is not undone."""
        self.pending.cancel()

    def check_sent(self) -> None:
        """Raise ``UnsentRequest`` if the transaction that holds the request is not committed."""
        if self._guard is not None:
            self._guard.check()

    def _check(self) -> None:
        """Refuse to wait for a reply that cannot arrive.

        Raises:
            UnsentRequest: the transaction that holds the request is not committed.
            RequestTimeout: an earlier wait has given the reply up.
        """
        self.check_sent()
        if self.pending.given_up:
            raise RequestTimeout(
                f"The reply to {self.correlation_id} was given up by an earlier wait that timed "
                "out or was cancelled, and a later reply is dropped. Ask again, or ask with "
                '`address="durable"`, whose replies can be waited for repeatedly.'
            )

    async def _get_async(self) -> R_co:
        self._check()
        future = asyncio.wrap_future(self.pending.future(self._timeout))
        try:
            await asyncio.wait([future], timeout=self._timeout)
        except asyncio.CancelledError:
            self.cancel()
            raise
        if not future.done() or future.cancelled():
            raise self._timed_out(self._timeout)
        return cast(R_co, _result_or_raise(future.result()))

    def _timed_out(self, seconds: float) -> RequestTimeout:
        self.cancel()
        return RequestTimeout(
            f"No reply to {self.correlation_id} within {seconds:g} s. Is a worker of that service "
            "running, and is the task decorated with `@eda.task`?"
        )


class Replies(Generic[R]):
    """The replies to several requests, of which *need* are enough, by default all.

    ``replies.get(timeout=2)`` or ``await replies`` returns the results as soon as enough replies
    have arrived, in the order of the calls. Later replies are dropped.

    Attributes:
        each: the single replies.
    """

    def __init__(self, each: Sequence[Reply[R]], need: int | None, timeout: float) -> None:
        self.each = tuple(each)
        self._need = len(self.each) if need is None else need
        self._timeout = timeout

    @property
    def done(self) -> bool:
        """True if enough replies have arrived, errors included."""
        return sum(each.done for each in self.each) >= self._need

    def get(self, timeout: float | None = None) -> list[R]:
        """Wait for the results.

        Args:
            timeout: seconds to wait at most; by default ``eda_request_timeout``.

        Raises:
            RequestTimeout: too few replies arrived in time.
            UnsentRequest: the transaction that holds the requests is not committed yet.
            Exception: the error of the responder after whose failure too few can succeed.
        """
        seconds = self._timeout if timeout is None else timeout
        tally, futures = self._begin(seconds)
        try:
            for future in () if tally.decided else as_completed(futures, seconds):
                tally.add(futures[future], future.result())
                if tally.decided:
                    break
        except (*_TIMEOUTS, CancelledError) as error:
            raise self._too_few(tally, seconds) from error
        finally:
            self.cancel()
        return tally.results

    def __await__(self) -> Generator[Any, None, list[R]]:
        return self._get_async().__await__()

    def cancel(self) -> None:
        """Stop waiting for all of the replies."""
        for each in self.each:
            each.cancel()

    async def _get_async(self) -> list[R]:
        tally, futures = self._begin(self._timeout)
        indexes = {asyncio.wrap_future(future): index for future, index in futures.items()}
        waiting, deadline = set(indexes), time.monotonic() + self._timeout
        try:
            while waiting and not tally.decided:
                left = deadline - time.monotonic()
                done, waiting = await asyncio.wait(
                    waiting, timeout=max(left, 0), return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    break
                for future in done:
                    if not future.cancelled():
                        tally.add(indexes[future], future.result())
        finally:
            for future in waiting:
                future.cancel()
            self.cancel()
        if not tally.decided:
            raise self._too_few(tally, self._timeout)
        return tally.results

    def _begin(self, seconds: float) -> tuple[_Tally[R], dict[Future[Any], int]]:
        """The tally of the replies that are here, and the futures of the others by their index."""
        for each in self.each:
            each.check_sent()
        tally = _Tally[R](self._need, len(self.each))
        futures = {each.pending.future(seconds): index for index, each in enumerate(self.each)}
        for future in [each for each in futures if each.done()]:
            index = futures.pop(future)
            if not future.cancelled():
                tally.add(index, future.result())
        if not tally.decided and tally.successes + len(futures) < self._need:
            raise RequestTimeout(
                f"{tally.successes} of {self._need} replies have arrived; others were given up by "
                "an earlier wait that timed out or was cancelled. Ask again."
            )
        return tally, futures

    def _too_few(self, tally: _Tally[R], seconds: float) -> RequestTimeout:
        return RequestTimeout(
            f"{tally.successes} of {self._need} replies arrived within {seconds:g} s. Are workers "
            "of all services running, and are the tasks decorated with `@eda.task`?"
        )


class _Tally(Generic[R]):
    """Count of successes, until there are enough or too few remain possible."""

    def __init__(self, need: int, total: int) -> None:
        self._need = need
        self._failures_allowed = total - need
        self._by_index: dict[int, R] = {}
        self._error: Exception | None = None

    def add(self, index: int, outcome: Any) -> None:
        """Count *outcome*; those after the decision are ignored."""
        if self.decided:
            return
        if not isinstance(outcome, ErrorOutcome):
            self._by_index[index] = outcome
        elif self._failures_allowed:
            self._failures_allowed -= 1
        else:
            self._error = outcome.error

    @property
    def decided(self) -> bool:
        """True if there are enough successes, or too few remain possible."""
        return self._error is not None or self.successes == self._need

    @property
    def successes(self) -> int:
        return len(self._by_index)

    @property
    def results(self) -> list[R]:
        """Results of the successes, in the order of the calls.

        Raises:
            Exception: the error of the responder after whose failure too few could succeed.
        """
        if self._error is not None:
            raise self._error
        return [self._by_index[index] for index in sorted(self._by_index)]


@dataclass(frozen=True)
class MailboxReply:
    """A reply that arrives in the mailbox of this process.

    Attributes:
        arrival: future of the outcome. The mailbox refers to it weakly: without it the reply is
            dropped.
    """

    correlation_id: str
    mailbox: Mailbox
    arrival: Future[Any]

    @property
    def done(self) -> bool:
        return self.arrival.done() and not self.arrival.cancelled()

    def future(self, timeout: float) -> Future[Any]:
        return self.arrival

    @property
    def given_up(self) -> bool:
        return self.arrival.cancelled()

    def cancel(self) -> None:
        self.mailbox.cancel(self.correlation_id)
        self.arrival.cancel()


class StoredReply:
    """A durable reply: it arrives in the database of the service and can be read repeatedly."""

    given_up = False

    def __init__(self, correlation_id: UUID, watcher: ReplyWatcher) -> None:
        self._correlation_id = correlation_id
        self._watcher = watcher
        self._future: Future[Any] | None = None

    @property
    def done(self) -> bool:
        return self._watcher.look(self._correlation_id) is not None

    def future(self, timeout: float) -> Future[Any]:
        self._future = self._watcher.watch(self._correlation_id, timeout)
        return self._future

    def cancel(self) -> None:
        if self._future is not None:
            self._future.cancel()


@dataclass(frozen=True)
class EagerReply:
    """The reply of a task that ran in the requesting process, under ``task_always_eager``.

    Attributes:
        outcome: the result, or an :class:`ErrorOutcome`.
    """

    outcome: Any
    given_up = False

    @property
    def done(self) -> bool:
        return True

    def future(self, timeout: float) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(self.outcome)
        return future

    def cancel(self) -> None:
        """Nothing to do: the outcome is here already."""


def _result_or_raise(outcome: Any) -> Any:
    if isinstance(outcome, ErrorOutcome):
        raise outcome.error
    return outcome
