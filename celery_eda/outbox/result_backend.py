"""Celery's result backend, whose calls are deferred while a message is being captured.

Calls that have to precede a message (a chord's size, the queue for a reply) are stored with the
message as its *prerequisites*, and a relay makes them just before it sends the message. Calls that
only prepare for a result are made when the first result is awaited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any
from uuid import UUID
from weakref import WeakValueDictionary

from celery import Celery
from celery._state import task_join_will_block
from celery.backends.base import Backend
from celery.backends.rpc import RPCBackend
from celery.exceptions import Reject
from celery.result import AsyncResult, GroupResult, result_from_tuple
from kombu import Exchange, Queue

from celery_eda import brokers
from celery_eda.core import context
from celery_eda.core.chord_identities import next_identity
from celery_eda.core.identity import Identity
from celery_eda.errors import NotDelivered, UncommittedCall
from celery_eda.outbox import chords

#: Calls that have to precede a message: names and arguments, see :func:`run_prerequisites`.
Prerequisites = tuple[tuple[str, Any], ...]

_prerequisites: ContextVar[Prerequisites] = ContextVar("celery_eda_prerequisites", default=())


def defer(app: Celery) -> None:
    """Defer the calls of *app* to its result backend while a message is being captured."""
    make = app._get_backend

    def get_backend() -> Backend:
        if context.current_transaction() is not None:
            # The database backend makes its tables with the first result anyway.
            app.conf.database_create_tables_at_setup = False
        return _deferring(make())

    app._get_backend = get_backend


def take_prerequisites() -> Prerequisites:
    """The prerequisites of the message that is captured now. The next message begins with none."""
    prerequisites = _prerequisites.get()
    _prerequisites.set(())
    return prerequisites


def declaration_of(queue: Queue) -> tuple[str, Any]:
    """The prerequisite that declares *queue*."""
    return "declare", queue.as_dict(recurse=True)


@dataclass(frozen=True)
class ResultBackend:
    """The result backend and the reply queues of one app, as a relay calls them."""

    app: Celery

    def run(self, prerequisites: Prerequisites, identity: Identity) -> None:
        """Make the calls that have to precede a message; see :func:`run_prerequisites`."""
        run_prerequisites(self.app, prerequisites, identity)


def run_prerequisites(app: Celery, prerequisites: Prerequisites, identity: Identity) -> None:
    """Make the calls that have to precede the message of this *identity*.

    Repeating them is harmless.

    Raises:
        Exception: any error of the backend or the broker.
    """
    for name, argument in prerequisites:
        if name == "set_chord_size":
            app.backend.set_chord_size(*argument, run=identity.id)
        elif name == "apply_chord":
            result: GroupResult = result_from_tuple(argument, app=app)
            app.backend.apply_chord((result.id, result.results), None)
        elif name == "reply_queue":
            brokers.declare_reply_queue(app, *argument)
        else:
            _declare(app, argument)


def _deferring(backend: Backend) -> Backend:
    """*backend*, changed so that it makes no calls while a message is being captured."""
    _defer_chords(backend)
    _defer_replies(backend)
    _defer_waiting(backend)
    _refuse_waiting(backend)
    chords.identify(backend)
    _publish_apart_from_sessions(backend)
    _requeue_on_failure(backend)
    return backend


def _defer_chords(backend: Backend) -> None:
    set_chord_size, apply_chord = backend.set_chord_size, backend.apply_chord
    publishes_only = getattr(apply_chord, "__func__", None) is Backend.apply_chord

    def maybe_set_chord_size(group_id: str, size: int, run: UUID | None = None) -> None:
        if context.current_transaction() is not None:
            require_first("set_chord_size", [group_id, size])
            return
        # A chord that is the body of another one has the same run when it is applied once more.
        run = run or (next_identity() or Identity.fresh()).id
        if not chords.is_known(backend, group_id, run):
            set_chord_size(group_id, size)
            chords.keep(backend, group_id, run)

    def maybe_apply_chord(header: Any, body: Any, **options: Any) -> None:
        if context.current_transaction() is None or publishes_only:
            apply_chord(header, body, **options)
        else:
            result = backend.app.GroupResult(header[0], list(header[1]))
            require_first("apply_chord", result.as_tuple())

    backend.set_chord_size = maybe_set_chord_size
    backend.apply_chord = maybe_apply_chord


def _defer_replies(backend: Backend) -> None:
    on_task_call = backend.on_task_call

    def maybe_on_task_call(producer: Any, task_id: str) -> Any:
        if context.current_transaction() is None:
            return on_task_call(producer, task_id)
        # A result that comes before its queue exists would be lost silently.
        if isinstance(backend, RPCBackend) and not task_join_will_block():
            require_first(*declaration_of(backend.binding))
        return None

    backend.on_task_call = maybe_on_task_call


def _defer_waiting(backend: Backend) -> None:
    """Subscribe to results made in a transaction only when the first result is awaited."""
    if not backend.is_async:
        return
    add_pending_result, wait = backend.add_pending_result, backend._wait_for_pending
    unwatched: WeakValueDictionary[int, AsyncResult] = WeakValueDictionary()

    def maybe_add_pending_result(result: Any, *args: Any, **kwargs: Any) -> Any:
        if context.current_transaction() is None:
            return add_pending_result(result, *args, **kwargs)
        unwatched[id(result)] = result
        return result

    def add_all_and_wait(result: Any, **options: Any) -> Any:
        while unwatched:
            add_pending_result(unwatched.popitem()[1])
        return wait(result, **options)

    backend.add_pending_result = maybe_add_pending_result
    backend._wait_for_pending = add_all_and_wait


def _publish_apart_from_sessions(backend: Backend) -> None:
    """Let errbacks and the bodies of chords leave whatever becomes of the sessions of the task.

    Celery publishes them while it stores the end of the task, which may have left a session open.
    """
    for name in ("mark_as_done", "mark_as_failure", "mark_as_revoked"):
        setattr(backend, name, _apart_from_sessions(backend.app, getattr(backend, name)))


def _apart_from_sessions(app: Celery, store: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(store)
    def store_and_publish(*args: Any, **kwargs: Any) -> Any:
        with context.apart_from_sessions(app.current_task):
            return store(*args, **kwargs)

    return store_and_publish


def _refuse_waiting(backend: Backend) -> None:
    """Refuse to wait in a transaction for the result of a call that it holds: it never comes."""
    for name in ("wait_for_pending", "iter_native"):
        setattr(backend, name, _refusing(getattr(backend, name)))


def _refusing(wait: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(wait)
    def wait_or_refuse(result: Any, *args: Any, **kwargs: Any) -> Any:
        for task_id in _awaited(result):
            if context.holds(task_id):
                raise UncommittedCall(
                    f"The call {task_id} leaves when its transaction commits, so its result cannot "
                    "come before. Wait for it after the end of the transaction."
                )
        return wait(result, *args, **kwargs)

    return wait_or_refuse


def _awaited(result: Any) -> Iterator[str]:
    """The ids of the calls that have to end before *result* is there."""
    waiting = [result]
    while waiting:
        each = waiting.pop()
        # A set of results has neither an id nor a parent.
        yield from filter(None, [getattr(each, "id", None)])
        # Not `+=`: Celery's generated groups have lists that would take the place of this one.
        waiting.extend(filter(None, [getattr(each, "parent", None)]))
        waiting.extend(getattr(each, "results", None) or ())


def _requeue_on_failure(backend: Backend) -> None:
    """Have the broker redeliver a message if *backend* cannot store its result.

    Celery would acknowledge the message, and a caller that waits for the result or for the chord
    would wait forever.
    """
    for name in ("mark_as_done", "mark_as_failure", "mark_as_retry"):
        setattr(backend, name, _requeueing(getattr(backend, name)))


def _requeueing(store: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(store)
    def store_or_requeue(task_id: str, *args: Any, **kwargs: Any) -> Any:
        tracing = context.tracing_of(task_id)
        if tracing and not tracing.recorded:
            raise NotDelivered("Celery has not called the task, but reports its end")
        try:
            return store(task_id, *args, **kwargs)
        except Exception as error:
            if tracing is None:
                raise
            raise Reject(error, requeue=True) from error

    return store_or_requeue


def _declare(app: Celery, description: dict[str, Any]) -> None:
    queue = Queue(**{**description, "exchange": Exchange(**description["exchange"])})
    with app.pool.acquire_channel(block=True) as (_, channel):
        queue.bind(channel).declare()


def require_first(name: str, argument: Any) -> None:
    """Add a prerequisite to the next message that is captured; see :func:`run_prerequisites`."""
    _prerequisites.set((*_prerequisites.get(), (name, argument)))
