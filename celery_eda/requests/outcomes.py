"""Outcomes of requests, read from the messages that arrive as replies. Others are refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from kombu.serialization import prepare_accept_content

from celery_eda.core.addresses import REPLY_TASK
from celery_eda.core.inspection import inspect
from celery_eda.core.limits import Limits
from celery_eda.requests.remote_errors import RemoteErrors


@dataclass(frozen=True)
class ErrorOutcome:
    """The outcome of a request that failed."""

    error: Exception


@dataclass(frozen=True)
class ReplyReader:
    """Reader of replies.

    Attributes:
        accept: the content types that may be decoded.
    """

    limits: Limits
    accept: frozenset[str]
    errors: RemoteErrors

    @classmethod
    def of(cls, limits: Limits, names: Any, errors: RemoteErrors) -> ReplyReader:
        """A reader that decodes the content types or serializers with these *names*."""
        return cls(limits, frozenset(prepare_accept_content(names) or ()), errors)

    def read(self, message: Any) -> tuple[str, Any]:
        """The correlation id of a reply, and its result or :class:`ErrorOutcome`.

        Args:
            message: kombu's; None for a body that kombu could not make a message of.

        Raises:
            ValueError: *message* is not a reply.
            Exception: the body cannot be decoded.
        """
        if message is None:
            raise ValueError("no message")
        message.accept = self.accept
        if malformed := inspect(message, self.limits):
            raise ValueError(str(malformed))
        if message.headers["task"] != REPLY_TASK:
            raise ValueError(f"not a call of {REPLY_TASK}")
        return self.outcome_in(message.payload[0])

    def outcome_in(self, arguments: Any) -> tuple[str, Any]:
        """The correlation id, and the result or :class:`ErrorOutcome`.

        Args:
            arguments: ``[correlation_id, {"result": …}]`` or ``[correlation_id, {"error": …}]``,
                the arguments of the task of a reply.

        Raises:
            ValueError: *arguments* have another shape.
        """
        match arguments:
            case [str(correlation_id), {"result": result, **others}] if not others:
                return str(UUID(correlation_id)), result
            case [str(correlation_id), {"error": described, **others}] if not others:
                return str(UUID(correlation_id)), ErrorOutcome(self.errors.from_wire(described))
        raise ValueError("neither a result nor an error")
