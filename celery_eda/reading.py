"""What a reply says: the outcome of one request. Whatever else comes in its place is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from kombu.serialization import prepare_accept_content

from celery_eda.inspection import inspect
from celery_eda.limits import Limits
from celery_eda.remote_errors import RemoteErrors
from celery_eda.replying import REPLY_TASK


@dataclass(frozen=True)
class Failed:
    """An outcome that is an error."""

    error: Exception


@dataclass(frozen=True)
class Reading:
    """How a reply is read.

    Attributes:
        accept: the content types that may be decoded.
    """

    limits: Limits
    accept: frozenset[str]
    errors: RemoteErrors

    @classmethod
    def of(cls, limits: Limits, names: Any, errors: RemoteErrors) -> Reading:
        return cls(limits, frozenset(prepare_accept_content(names) or ()), errors)

    def read(self, message: Any) -> tuple[str, Any]:
        """Correlation id and result, or error, in *message*, kombu's; None if it was none.

        Raises:
            ValueError: it is no reply as this system writes them.
        """
        if message is None:
            raise ValueError("no message")
        message.accept = self.accept
        if refusal := inspect(message, self.limits):
            raise ValueError(str(refusal.error))
        if message.headers["task"] != REPLY_TASK:
            raise ValueError("another message than a reply")
        return self.outcome_in(message.payload[0])

    def outcome_in(self, arguments: Any) -> tuple[str, Any]:
        """Correlation id and result, or error, in the *arguments* of the task of a reply.

        Raises:
            ValueError: they are not what a reply has.
        """
        match arguments:
            case [str(correlation_id), {"result": result, **others}] if not others:
                return str(UUID(correlation_id)), result
            case [str(correlation_id), {"error": described, **others}] if not others:
                return str(UUID(correlation_id)), Failed(self.errors.from_wire(described))
        raise ValueError("neither a result nor an error")
