"""Decides what happens to a message that is published outside any transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from celery_eda.core import context
from celery_eda.core.message import Message
from celery_eda.errors import OutsideTransaction

_NOTHING = nullcontext()


@dataclass(frozen=True)
class Publisher:
    """Decides what happens to messages that are published outside any transaction.

    Attributes:
        outside: the setting ``eda_outside``.
        is_reliable: True if the task of this name is handled exactly once.
        store: writes messages to the outbox in a short transaction of its own.
    """

    outside: str | None
    is_reliable: Callable[[str], bool]
    store: Callable[[Sequence[Message]], None]

    def publishing(self, task: str) -> AbstractContextManager[None]:
        """A block that publishes *task*. Outside a transaction, ``eda_outside`` decides.

        By default the messages of reliable tasks are stored, and Celery sends all others.

        Raises:
            OutsideTransaction: ``eda_outside`` is ``raise`` and no transaction is open.
        """
        if self.outside == "send" or context.current_transaction() is not None:
            return _NOTHING
        if self.outside is None and not self.is_reliable(task):
            return _NOTHING
        return self.stored(task, self.store)

    @contextmanager
    def stored(self, what: str, store: Callable[[Sequence[Message]], None]) -> Iterator[None]:
        """A block whose messages go to *store*, unless a transaction is open that captures them.

        Args:
            what: the subject of the error message.
            store: called with the messages at the end of the block, if there are any.

        Raises:
            OutsideTransaction: ``eda_outside`` is ``raise`` and no transaction is open.
        """
        if context.current_transaction() is not None:
            yield
            return
        if self.outside == "raise":
            raise OutsideTransaction(
                f"{what} was published outside any transaction and eda_outside is 'raise'. "
                "Publish it inside `with eda.transaction():`, attach the sessionmaker in use, "
                "or choose eda_outside = 'store' or 'send'."
            )
        collected = context.Collected()
        with context.scope_of(collected):
            yield
        if collected.messages:
            store(collected.messages)
