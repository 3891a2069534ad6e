"""What a requester holds in hand: one reply, or several of which some are enough."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import CancelledError, Future, as_completed
from concurrent.futures import TimeoutError as WaitTimeout
from typing import Any, Generic, Protocol, TypeVar, cast
from uuid import UUID

from celery_eda.errors import RequestTimeout
from celery_eda.reading import Failed
from celery_eda.reply_watcher import ReplyWatcher

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

_TIMEOUTS = (TimeoutError, WaitTimeout, asyncio.TimeoutError)


class Outcome(Protocol):
    """Where the outcome of one request will be."""

    @property
    def done(self) -> bool:
        """Whether it is there."""
        ...

    def future(self, timeout: float) -> Future[Any]:
        """It, as soon as it is there: the result, or :class:`Failed`. Not later than *timeout*."""
        ...

    def give_up(self) -> None:
        """Nobody waits for it any more."""
        ...


class Reply(Generic[R_co]):
    """The reply to one request: ``reply.get(timeout=2)``, or ``await reply``.

    Attributes:
        correlation_id: of the request and of its reply; ``eda.reply(correlation_id)`` finds a
            durable one from anywhere in its service.
    """

    def __init__(
        self,
        correlation_id: str,
        outcome: Outcome,
        refuse_unsent: Callable[[], None],
        patience: float,
    ) -> None:
        self.correlation_id = correlation_id
        self.outcome = outcome
        self.refuse_unsent = refuse_unsent
        self._patience = patience

    @property
    def done(self) -> bool:
        """Whether the reply is here; a durable one is looked for in the database."""
        return self.outcome.done

    def get(self, timeout: float | None = None) -> R_co:
        """The result. Waits *timeout* seconds at most, by default ``eda_request_timeout``.

        Raises:
            RequestTimeout: none came; unless the request is durable, it is given up.
            UnsentRequest: the transaction that holds the request is not committed yet.
            RemoteError: the responder failed for good. Where its error's type is registered
                (``eda.register_error``), or one of Python's own, that is raised instead.
        """
        self.refuse_unsent()
        seconds = self._patience if timeout is None else timeout
        try:
            outcome = self.outcome.future(seconds).result(seconds)
        except (*_TIMEOUTS, CancelledError) as error:
            raise self._too_late(seconds) from error
        return cast(R_co, result_of(outcome))

    def __await__(self) -> Generator[Any, None, R_co]:
        return self._get_async().__await__()

    def cancel(self) -> None:
        """Wait no more: a reply that comes is dropped. The request is not undone."""
        self.outcome.give_up()

    async def _get_async(self) -> R_co:
        self.refuse_unsent()
        future = asyncio.wrap_future(self.outcome.future(self._patience))
        try:
            await asyncio.wait([future], timeout=self._patience)
        except asyncio.CancelledError:
            self.cancel()
            raise
        if not future.done() or future.cancelled():
            raise self._too_late(self._patience)
        return cast(R_co, result_of(future.result()))

    def _too_late(self, seconds: float) -> RequestTimeout:
        self.cancel()
        return RequestTimeout(
            f"No reply to {self.correlation_id} within {seconds:g} s. Is a worker of that service "
            "running, and is the task one of `@eda.task`?"
        )


class Replies(Generic[R]):
    """The replies to a request to many, of which *need* are enough, by default all.

    ``replies.get(timeout=2)`` or ``await replies`` gives the results as soon as enough have come,
    in the order of the calls. What comes later is dropped.

    Attributes:
        each: the single replies.
    """

    def __init__(self, each: Sequence[Reply[R]], need: int | None, patience: float) -> None:
        self.each = tuple(each)
        self._need = len(self.each) if need is None else need
        self._patience = patience

    @property
    def done(self) -> bool:
        """Whether enough are here."""
        return sum(each.done for each in self.each) >= self._need

    def get(self, timeout: float | None = None) -> list[R]:
        """The results. Waits *timeout* seconds at most, by default ``eda_request_timeout``.

        Raises:
            RequestTimeout: too few came in time.
            UnsentRequest: the transaction that holds the requests is not committed yet.
            Exception: that of a responder, after which too few can succeed.
        """
        seconds = self._patience if timeout is None else timeout
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
        """Wait no more."""
        for each in self.each:
            each.cancel()

    async def _get_async(self) -> list[R]:
        tally, futures = self._begin(self._patience)
        places = {asyncio.wrap_future(future): place for future, place in futures.items()}
        waiting, until = set(places), time.monotonic() + self._patience
        try:
            while waiting and not tally.decided:
                left = until - time.monotonic()
                come, waiting = await asyncio.wait(
                    waiting, timeout=max(left, 0), return_when=asyncio.FIRST_COMPLETED
                )
                if not come:
                    break
                for future in come:
                    if not future.cancelled():
                        tally.add(places[future], future.result())
        finally:
            for future in waiting:
                future.cancel()
            self.cancel()
        if not tally.decided:
            raise self._too_few(tally, self._patience)
        return tally.results

    def _begin(self, seconds: float) -> tuple[_Tally[R], dict[Future[Any], int]]:
        for each in self.each:
            each.refuse_unsent()
        tally = _Tally[R](self._need, len(self.each))
        futures = {each.outcome.future(seconds): place for place, each in enumerate(self.each)}
        for future in [each for each in futures if each.done()]:
            place = futures.pop(future)
            if not future.cancelled():
                tally.add(place, future.result())
        if not tally.decided and tally.successes + len(futures) < self._need:  # given up before
            raise self._too_few(tally, seconds)
        return tally, futures

    def _too_few(self, tally: _Tally[R], seconds: float) -> RequestTimeout:
        come = tally.successes
        return RequestTimeout(f"{come} of {self._need} replies came within {seconds:g} s.")


class _Tally(Generic[R]):
    """Counts successes until there are enough, or too few can be left."""

    def __init__(self, need: int, total: int) -> None:
        self._need = need
        self._failures_allowed = total - need
        self._by_place: dict[int, R] = {}
        self._error: Exception | None = None

    def add(self, place: int, outcome: Any) -> None:
        """Count one; what comes after the decision counts no more."""
        if self.decided:
            return
        if not isinstance(outcome, Failed):
            self._by_place[place] = outcome
        elif self._failures_allowed:
            self._failures_allowed -= 1
        else:
            self._error = outcome.error

    @property
    def decided(self) -> bool:
        """Whether there are enough, or too few can be left."""
        return self._error is not None or self.successes == self._need

    @property
    def successes(self) -> int:
        return len(self._by_place)

    @property
    def results(self) -> list[R]:
        """Those that succeeded.

        Raises:
            Exception: that of the responder after which too few were left.
        """
        if self._error is not None:
            raise self._error
        return [self._by_place[place] for place in sorted(self._by_place)]


class Awaited:
    """An outcome that comes into this process's mailbox."""

    def __init__(self, future: Future[Any], forget: Callable[[], None]) -> None:
        self._future = future
        self._forget = forget

    @property
    def done(self) -> bool:
        return self._future.done() and not self._future.cancelled()

    def future(self, timeout: float) -> Future[Any]:
        return self._future

    def give_up(self) -> None:
        self._forget()
        self._future.cancel()


class Recorded:
    """An outcome that comes into the service's database, where it stays for whoever asks again."""

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

    def give_up(self) -> None:
        if self._future is not None:
            self._future.cancel()


def result_of(outcome: Any) -> Any:
    """The result in *outcome*, or its error, raised."""
    if isinstance(outcome, Failed):
        raise outcome.error
    return outcome
