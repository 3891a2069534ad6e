"""The identities of the messages that complete a chord."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from celery_eda.core.identity import Identity

# The identities of a chord's messages, which have to be the same when a part's copy completes it.
# Celery's backend publishes them itself, through methods that take no options of ours. Every other
# publish gets its identity as the option `eda_identity`.
_identities: ContextVar[Iterator[Identity] | None] = ContextVar(
    "celery_eda_identities", default=None
)


@contextmanager
def identified(identities: Iterator[Identity]) -> Iterator[None]:
    """Give these *identities*, in this order, to the messages that complete a chord."""
    token = _identities.set(identities)
    try:
        yield
    finally:
        _identities.reset(token)


def gives_identities() -> bool:
    """True while a chord is completed, whose messages have identities of their own."""
    return _identities.get() is not None


def next_identity() -> Identity | None:
    """The identity of the next message of a chord that is completed; None elsewhere."""
    identities = _identities.get()
    return next(identities) if identities else None
