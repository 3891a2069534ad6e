"""Messages that are published outside any transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from celery_eda.core import context
from celery_eda.core.message import Message
from celery_eda.errors import OutsideTransaction
from celery_eda.outbox.wiring import Outbox

_NOTHING = nullcontext()


def publishing(outbox: Outbox, task: str) -> AbstractContextManager[None]:
    """A block that publishes a call of *task*. Outside a transaction, ``eda_outside`` decides.

    By default the messages of reliable tasks are stored, and Celery sends all others.

    Raises:
        OutsideTransaction: ``eda_outside`` is ``raise`` and no transaction is open.
    """
    outside = outbox.service.settings.outside
    if outside == "send" or context.current_transaction() is not None:
        return _NOTHING
    if outside is None and not outbox.service.is_reliable(task):
        return _NOTHING
    return stored(outbox, task)


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
    if outbox.service.settings.outside == "raise":
        raise OutsideTransaction(
            f"{what} was published outside any transaction and eda_outside is 'raise'. "
            "Publish it inside `with eda.transaction():`, attach the sessionmaker in use, "
            "or choose eda_outside = 'store' or 'send'."
        )
    collected = context.Collected()
    with context.scope_of(collected):
        yield
    if collected.messages:
        (store or outbox.writer.write_now)(collected.messages)
