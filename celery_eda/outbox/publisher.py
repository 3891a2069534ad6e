"""Messages that are published outside any transaction."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from celery_eda.core import context
from celery_eda.core.message import Message
from celery_eda.errors import OutsideTransaction
from celery_eda.outbox.wiring import Outbox

log = logging.getLogger(__name__)

_NOTHING = nullcontext()
_warned: set[str] = set()


def publishing(outbox: Outbox, task: str, key: Any = None) -> AbstractContextManager[None]:
    """A block that publishes a call of *task*. Outside a transaction, ``eda_outside`` decides.

    By default the messages of reliable tasks are stored, and Celery sends all others. A message
    with a *key* is stored in any case, to get its place in the order of the key.

    Raises:
        OutsideTransaction: ``eda_outside`` is ``raise`` and no transaction is open.
    """
    if context.current_transaction() is not None:
        return _NOTHING
    _note_outside(outbox, task)
    outside = _rule(outbox)
    if key is None:
        if outside == "send":
            return _NOTHING
        if outside is None and not outbox.service.is_reliable(task):
            return _NOTHING
    return stored(outbox, task)


def _note_outside(outbox: Outbox, task: str) -> None:
    """Note that a call of *task* leaves outside any transaction, and warn if by accident.

    A thread that a handler starts has an empty context, so it is not part of the transaction.
    """
    if context.is_outside_on_purpose():
        return
    context.published_outside.set(task)
    if context.in_progress.get() or outbox.service.app.current_worker_task or task in _warned:
        return
    if any(each.in_handler and not each.finished for each in context.running):
        _warned.add(task)
        log.warning(
            "%s is published from another thread than that of the handler in progress, so it is "
            "not part of the handler's transaction and leaves even if the handler fails. If the "
            "handler has started the thread, run its work with `contextvars.copy_context().run`; "
            "if the message is to leave anyway, publish it inside `with eda.outside():`.",
            task,
        )


def _rule(outbox: Outbox) -> str | None:
    """The value of ``eda_outside`` that applies here: on purpose, nothing is refused."""
    outside = outbox.service.settings.outside
    return None if outside == "raise" and context.is_outside_on_purpose() else outside


@contextmanager
def stored(
    outbox: Outbox, what: str, store: Callable[[Sequence[Message]], None] | None = None
) -> Iterator[None]:
    """A block whose messages are stored, unless a transaction is open that captures them.

    Args:
        outbox: of the service that publishes.
        what: the subject of the error message.
        store: called with the messages at the end of the block, if there are any; by default they
            are written to *outbox* in a short transaction of their own.

    Raises:
        OutsideTransaction: ``eda_outside`` is ``raise`` and no transaction is open.
    """
    if context.current_transaction() is not None:
        yield
        return
    if _rule(outbox) == "raise":
        raise OutsideTransaction(
            f"{what} was published outside any transaction and eda_outside is 'raise'. "
            "Publish it inside `with eda.transaction():`, attach the sessionmaker in use, publish "
            "it inside `with eda.outside():`, or choose eda_outside = 'store' or 'send'."
        )
    collected = context.Collected()
    with context.scope_of(collected):
        yield
    if collected.messages:
        (store or outbox.writer.write_now)(collected.messages)
