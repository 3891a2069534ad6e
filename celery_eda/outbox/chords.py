"""Chords, whose parts the result backend counts; the worker of the last part publishes the body.

Celery publishes the body after the handler's commit, and once more with every further copy of a
part that completes the chord. So the messages that complete a chord get identities that are
computed from the chord, and its copies count as one message.

The ids of a chord do not tell its runs apart: a frozen chord has the same ids whenever it is
applied. So each application is a *run*, which the result backend keeps beside the chord's size.
"""

from __future__ import annotations

from itertools import count
from typing import Any
from uuid import UUID

from celery import Task
from celery.backends.base import Backend, BaseKeyValueStoreBackend
from celery.exceptions import Reject

from celery_eda.core.chord_identities import identified
from celery_eda.core.identity import Identity

#: The end of the key under which a result backend keeps the runs of a chord.
RUNS = ".eda"
#: The most runs of a chord that are kept. An older one is no longer recognized as a repetition.
MOST_RUNS = 20


def is_known(backend: Backend, group_id: str, run: UUID) -> bool:
    """True if *run* of a chord has begun: a relay begins it again when it repeats a message."""
    return _counts_parts(backend) and str(run) in _runs(backend, group_id)


def keep(backend: Any, group_id: str, run: UUID) -> None:
    """Keep *run* as the latest one of a chord, if *backend* completes the chord itself."""
    if _counts_parts(backend):
        runs = [*_runs(backend, group_id), str(run)]
        backend.set(backend.get_key_for_group(group_id, RUNS), " ".join(runs[-MOST_RUNS:]))


def identify(backend: Backend) -> None:
    """Give the messages that complete a chord identities that are computed from its run."""
    complete = backend.on_chord_part_return

    def complete_as_itself(request: Any, *args: Any, **kwargs: Any) -> Any:
        if not request.group:
            return complete(request, *args, **kwargs)
        run = _runs(backend, request.group)[-1:] if _counts_parts(backend) else []
        # Without a run, which a publisher without this package does not store, the body has to do.
        key = " ".join([request.group, str(_last_id(request.chord)), *run])
        with identified(Identity.of_foreign(key, 0, position) for position in count()):
            return complete(request, *args, **kwargs)

    backend.on_chord_part_return = complete_as_itself


def repeat_part(task: Task) -> None:
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


def _counts_parts(backend: Backend) -> bool:
    """True if *backend* counts the parts of chords; others ask for all results again and again."""
    return isinstance(backend, BaseKeyValueStoreBackend) and (
        backend.implements_incr or type(backend).set_chord_size is not Backend.set_chord_size
    )


def _runs(backend: Any, group_id: str) -> list[str]:
    """The runs of a chord, the latest one last; empty if none is known."""
    kept = backend.get(backend.get_key_for_group(group_id, RUNS)) or ""
    return (kept.decode() if isinstance(kept, bytes) else str(kept)).split()


def _last_id(body: Any) -> Any:
    """The task id of the last task in the signature *body* of a chord.

    Celery makes a new one whenever it applies a chord that is not frozen.
    """
    match body:
        case {"kwargs": {"tasks": [*_, last]}} | {"kwargs": {"body": dict(last)}}:
            return _last_id(last)
        case {"options": {"task_id": task_id}}:
            return task_id
    return None
