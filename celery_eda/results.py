"""Celery's result backend, which is left alone while a message is being captured.

What Celery would tell the backend or the broker before it sends a message (a chord's size, a
queue for the reply) travels with the message and is done just before it is sent. What only helps
a later look-up is done when somebody looks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
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

from celery_eda import context, transports
from celery_eda.identity import Identity

#: What has to precede a message: names and arguments, as :func:`prepare` knows them.
Preparation = tuple[tuple[str, Any], ...]

_preparation: ContextVar[Preparation] = ContextVar("celery_eda_preparation", default=())


def defer(app: Celery) -> None:
    """Keep Celery from touching the result backend while a message is being captured."""
    make = app._get_backend

    def get_backend() -> Backend:
        if context.current_transaction() is not None:
            # The database backend makes its tables with the first result, too.
            app.conf.database_create_tables_at_setup = False
        return _deferring(make())

    app._get_backend = get_backend


def take_preparation() -> Preparation:
    """What has to precede the message that is being captured right now."""
    preparation = _preparation.get()
    _preparation.set(())
    return preparation


def declaration_of(queue: Queue) -> tuple[str, Any]:
    """The preparation that declares *queue*."""
    return "declare", queue.as_dict(recurse=True)


def prepare(app: Celery, preparation: Preparation) -> None:
    """Do what has to precede a message. Repeating it is harmless.

    Raises:
        Exception: whatever the backend or the broker raises when it is away.
    """
    for name, argument in preparation:
        if name == "set_chord_size":
            app.backend.set_chord_size(*argument)
        elif name == "apply_chord":
            result: GroupResult = result_from_tuple(argument, app=app)
            app.backend.apply_chord((result.id, result.results), None)
        elif name == "reply_queue":
            transports.declare_reply_queue(app, *argument)
        else:
            _declare(app, argument)


def repeat_chord_part(task: Task) -> None:
    """Let *task*, a copy, complete its chord: the earlier one may have died while doing so.

    A worker that completes a chord on Redis first claims it for some seconds, so that no other
    one does it too. The claim of a dead one would keep the chord incomplete for ever. Should it
    be alive, both publish the chord's body, under one identity.
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
    """*backend*, silent while a message is being captured."""
    for change in (_defer_chords, _defer_replies, _defer_waiting, _identify_chords, _insist):
        change(backend)
    return backend


def _defer_chords(backend: Backend) -> None:
    set_chord_size, apply_chord = backend.set_chord_size, backend.apply_chord
    publishes_only = getattr(apply_chord, "__func__", None) is Backend.apply_chord

    def maybe_set_chord_size(group_id: str, size: int) -> None:
        if context.current_transaction() is None:
            set_chord_size(group_id, size)
        else:
            precede("set_chord_size", [group_id, size])

    def maybe_apply_chord(header: Any, body: Any, **options: Any) -> None:
        if context.current_transaction() is None or publishes_only:
            apply_chord(header, body, **options)
        else:
            result = backend.app.GroupResult(header[0], list(header[1]))
            precede("apply_chord", result.as_tuple())

    backend.set_chord_size = maybe_set_chord_size
    backend.apply_chord = maybe_apply_chord


def _defer_replies(backend: Backend) -> None:
    on_task_call = backend.on_task_call

    def maybe_on_task_call(producer: Any, task_id: str) -> Any:
        if context.current_transaction() is None:
            return on_task_call(producer, task_id)
        # A result that comes before its queue is there would be lost without a word.
        if isinstance(backend, RPCBackend) and not task_join_will_block():
            precede(*declaration_of(backend.binding))
        return None

    backend.on_task_call = maybe_on_task_call


def _defer_waiting(backend: Backend) -> None:
    """Subscribe to results made in a transaction when somebody first waits for any."""
    if not backend.is_async:
        return
    add_pending_result, wait = backend.add_pending_result, backend._wait_for_pending
    unheard: WeakValueDictionary[int, AsyncResult] = WeakValueDictionary()

    def maybe_add_pending_result(result: Any, *args: Any, **kwargs: Any) -> Any:
        if context.current_transaction() is None:
            return add_pending_result(result, *args, **kwargs)
        unheard[id(result)] = result
        return result

    def add_all_and_wait(result: Any, **options: Any) -> Any:
        while unheard:
            add_pending_result(unheard.popitem()[1])
        return wait(result, **options)

    backend.add_pending_result = maybe_add_pending_result
    backend._wait_for_pending = add_all_and_wait


def _identify_chords(backend: Backend) -> None:
    """Give what completes a chord an identity of its own.

    Celery publishes it after the handler's commit, and once more with a further copy of one of
    the chord's parts.
    """
    complete = backend.on_chord_part_return

    def complete_as_itself(request: Any, *args: Any, **kwargs: Any) -> Any:
        key = f"{request.group} {_last_id(request.chord)}"
        with context.identified(Identity.of_foreign(key, 0, position) for position in count()):
            return complete(request, *args, **kwargs)

    backend.on_chord_part_return = complete_as_itself


def _insist(backend: Backend) -> None:
    """Have a message brought again by the broker if *backend* cannot be told what came of it.

    Celery would acknowledge it, and whoever waits for the result or the chord would wait for ever.
    """
    for name in ("mark_as_done", "mark_as_failure"):
        setattr(backend, name, _insisting(getattr(backend, name)))


def _insisting(tell: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(tell)
    def insist(task_id: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return tell(task_id, *args, **kwargs)
        except Exception as error:
            progress = context.in_progress.get()
            if progress is None or progress.delivery.task_id != task_id:
                raise
            raise Reject(error, requeue=True) from error

    return insist


def _last_id(body: Any) -> Any:
    """The id of what the signature *body* of a chord ends in, made anew whenever it is applied."""
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


def precede(name: str, argument: Any) -> None:
    """Let what is captured next be preceded by this; see :func:`prepare`."""
    _preparation.set((*_preparation.get(), (name, argument)))
