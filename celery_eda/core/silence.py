"""Blocks in which nothing may be published, such as the replay of an event."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from celery_eda.errors import PublishingForbidden

# The reason why nothing may be published right here; None if publishing is allowed.
_silenced_by: ContextVar[str | None] = ContextVar("celery_eda_silenced_by", default=None)


@contextmanager
def silenced(what: str) -> Iterator[None]:
    """Forbid publishing inside the block; *what* is the subject of the error's text."""
    token = _silenced_by.set(what)
    try:
        yield
    finally:
        _silenced_by.reset(token)


def refuse_publishing_if_silenced(name: str) -> None:
    """Check that a call of the task *name* may be published right here.

    Raises:
        PublishingForbidden: the code runs inside a :func:`silenced` block.
    """
    if (what := _silenced_by.get()) is not None:
        raise PublishingForbidden(
            f"{what} publishes {name}, which must not leave: it was published when the event was "
            "new. Publish from a separate subscription. If this is a replay and the message should "
            "be sent once more, redrive the dead letter or replay with --publish."
        )
