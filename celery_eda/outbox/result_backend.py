"""Celery's result backend, whose calls are deferred while a message is being captured.

Calls that have to precede a message (a chord's size, the queue for a reply) are stored with the
message as its *prerequisites*, and a relay makes them just before it sends the message. Calls that
only prepare for a result are made when the first result is awaited.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

from celery import Celery, Task
from celery._state import task_join_will_block
from celery.backends.base import Backend
from celery.backends.rpc import RPCBackend
from celery.exceptions import Reject
from celery.result import AsyncResult, GroupResult, result_from_tuple
from kombu import Exchange, Queue

from celery_eda import brokers
from celery_eda.core import context
from celery_eda.core.chord_identities import identified
from celery_eda.core.identity import Identity

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

    def run(self, prerequisites: Prerequisites) -> None:
        """Make the calls that have to precede a message; see :func:`run_prerequisites`."""
        run_prerequisites(self.app, prerequisites)


def run_prerequisites(app: Celery, prerequisites: Prerequisites) -> None:
    """Make the calls that have to precede a message. Repeating them is harmless.

    Raises:
        Exception: any error of the backend or the broker.
    """
    for name, argument in prerequisites:
        if name == "set_chord_size":
            app.backend.set_chord_size(*argument)
        elif name == "apply_chord":
            result: GroupResult = result_from_tuple(argument, app=app)
            app.backend.apply_chord((result.id, result.results), None)
        elif name == "reply_queue":
            brokers.declare_reply_queue(app, *argument)
        else:
            _declare(app, argument)


def repeat_chord_part(task: Task) -> None:
    """Make it possible for *task*, a copy, to complete its chord.

    The worker of the first copy may have died before it completed the chord.

    A worker that completes a chord on Redis first claims it for some seconds, so that no other
    worker does it too. The claim of a dead worker would keep the chord incomplete forever. If
    that worker is alive after all, both publish the chord's body, under one identity.

    Raises:
        Reject: the backend is away; the broker redelivers the message.
    """
    backend, request = task.backend, task.request
    if request.chord and hasattr(backend, "_chord_claim_extend_script"):
        claim = backend.get_key_for_group(request.group, ".c")
        try:
            if backend.client.get(claim) != b"done":
                backend.client.delete(claim)
        except Exception as error:
            raise Reject(error, requeue=True) from error


def _deferring(backend: Backend) -> Backend:
    """*backend*, changed so that it makes no calls while a message is being captured."""
    _defer_chords(backend)
    _defer_replies(backend)
    _defer_waiting(backend)
    _identify_chords(backend)
    _publish_apart_from_sessions(backend)
    _requeue_on_failure(backend)
    return backend


def _defer_chords(backend: Backend) -> None:
    set_chord_size, apply_chord = backend.set_chord_size, backend.apply_chord
    publishes_only = getattr(apply_chord, "__func__", None) is Backend.apply_chord

    def maybe_set_chord_size(group_id: str, size: int) -> None:
        if context.current_transaction() is None:
            set_chord_size(group_id, size)
        else:
            require_first("set_chord_size", [group_id, size])

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


def _identify_chords(backend: Backend) -> None:
    """Give the messages that complete a chord identities that are computed from the chord.

    Celery publishes them after the handler's commit, and once more with every further copy of the
    chord's last part. Equal identities make them copies of one message.
    """
    complete = backend.on_chord_part_return

    def complete_as_itself(request: Any, *args: Any, **kwargs: Any) -> Any:
        key = f"{request.group} {_last_id(request.chord)}"
        with identified(Identity.of_foreign(key, 0, position) for position in count()):
            return complete(request, *args, **kwargs)

    backend.on_chord_part_return = complete_as_itself


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


def _requeue_on_failure(backend: Backend) -> None:
    """Have the broker redeliver a message if *backend* cannot store its result.

    Celery would acknowledge the message, and a caller that waits for the result or for the chord
    would wait forever.
    """
    for name in ("mark_as_done", "mark_as_failure"):
        setattr(backend, name, _requeueing(getattr(backend, name)))


def _requeueing(store: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(store)
    def store_or_requeue(task_id: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return store(task_id, *args, **kwargs)
        except Exception as error:
            progress = context.in_progress.get()
            if progress is None or progress.delivery.task_id != task_id:
                raise
            raise Reject(error, requeue=True) from error

    return store_or_requeue


def _last_id(body: Any) -> Any:
    """The task id of the last task in the signature *body* of a chord.

    Celery makes a new one whenever it applies the chord.
    """
    match body:
        case {"kwargs": {"tasks": [*_, last]}} | {"kwargs": {"body": dict(last)}}:
            return _last_id(last)
        case {"options": {"task_id": task_id}}:
            return task_id
    return None


def _declare(app: Celery, description: dict[str, Any]) -> None:
    queue = Queue(**{**description, "exchange": Exchange(**description["exchange"])})
    with app.pool.acquire_channel(block=True) as (_, channel):
        queue.bind(channel).declare()


def require_first(name: str, argument: Any) -> None:
    """Add a prerequisite to the next message that is captured; see :func:`run_prerequisites`."""
    _prerequisites.set((*_prerequisites.get(), (name, argument)))
