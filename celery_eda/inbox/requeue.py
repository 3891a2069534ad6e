"""The return of a message to the broker, after a delivery whose end has not been recorded.

Celery acknowledges a message whose task raises an error. So a task may raise only errors that are
recorded; every other one is turned into a ``Reject`` here, and the broker redelivers the message.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import NoReturn

from celery import Task
from celery.exceptions import Reject

from celery_eda.core import context, redaction
from celery_eda.core.error_text import loggable
from celery_eda.core.interruption import ends_worker
from celery_eda.inbox.transient import TRANSIENT_DELAY

log = redaction.logger(__name__)


def requeue(task: Task, task_id: str, error: BaseException) -> NoReturn:
    """Have the broker redeliver the message of a call, after a pause: it comes back at once.

    Raises:
        Reject: the broker is to redeliver the message.
        BaseException: *error*, if it ends the worker; the broker then redelivers the message too.
    """
    context.abandon()
    if ends_worker(error) or (isinstance(error, Reject) and error.requeue):
        raise error
    with suppress(Exception):  # a time limit may end the pause
        if isinstance(error, Exception):
            log.error(
                "the end of %s[%s] could not be recorded; the broker redelivers it. If this goes "
                "on, check that the service may write to all of its tables.",
                task.name,
                task_id,
                exc_info=error,
            )
            time.sleep(TRANSIENT_DELAY[1])
    # As text: an exception may be one that cannot be sent to Celery's main process.
    raise Reject(_text_of(error), requeue=True) from error


def _text_of(error: BaseException) -> str:
    with suppress(BaseException):
        return loggable(repr(error))
    return type(error).__qualname__
