"""Failures as repairers get them, and the decisions that repairers return."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any
from uuid import UUID

from celery_eda.dead_letters.audit import AuditEntry
from celery_eda.dead_letters.letter import Letter


@dataclass(frozen=True)
class Resubmit:
    """Decision to send the message again.

    Attributes:
        arguments: the positional and keyword arguments to send; None leaves them unchanged.
        why: the reason, for the audit trail.
    """

    arguments: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None
    why: str = ""

    def because(self, why: str) -> Resubmit:
        """The same decision with a reason, for the audit trail."""
        return replace(self, why=why)


@dataclass(frozen=True)
class Skip:
    """Decision to abandon the message; the next one of its key takes its turn."""

    why: str


@dataclass(frozen=True)
class Leave:
    """Decision to leave the message to a person."""

    why: str


#: Return type of a repairer; None leaves the letter to a person.
RepairDecision = Resubmit | Skip | Leave | None


@dataclass(frozen=True)
class Failure:
    """A message that failed permanently, with what a repairer needs to decide about it.

    Attributes:
        letter: the dead letter.
        args, kwargs: arguments of the call that failed.
        history: earlier letters of the same message, and the actions on them, oldest first.
        signature: of the task's function; None if this worker does not know the task.
    """

    letter: Letter = field(repr=False)
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    history: tuple[Letter | AuditEntry, ...] = ()
    signature: inspect.Signature | None = field(default=None, repr=False)

    @property
    def letter_id(self) -> int:
        """Id of the dead letter."""
        return self.letter.id

    @property
    def message_id(self) -> UUID:
        """Id of the message, equal in all attempts and repairs: an idempotency key."""
        return self.letter.message.identity.id

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.letter.message.task

    @property
    def reason(self) -> str:
        """The reason for which the message became a dead letter, e.g. ``retries exhausted``."""
        return self.letter.reason

    @property
    def error_type(self) -> str | None:
        """Name of the exception's class, without its module."""
        return self.letter.error_type

    @property
    def error(self) -> str | None:
        """Text of the exception, bounded and redacted."""
        return self.letter.error

    @property
    def traceback(self) -> str | None:
        """Lines of code that the exception passed through, bounded and redacted."""
        return self.letter.traceback

    @property
    def attempts(self) -> int:
        """Number of failed attempts since the message was last sent."""
        return self.letter.attempts

    @property
    def first_at(self) -> datetime | None:
        """End of the first attempt, in UTC."""
        return self.letter.first_at

    @property
    def at(self) -> datetime:
        """Time at which the message became a dead letter, in UTC."""
        return self.letter.at

    @property
    def key(self) -> str | None:
        """Ordering key of the message; blocked until the message is repaired or skipped."""
        return self.letter.key

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments by the names of their parameters, as far as those are known."""
        return {**dict(zip(self._positional, self.args, strict=False)), **self.kwargs}

    def resubmit(self, *args: Any, **corrections: Any) -> Resubmit:
        """Send the next revision of the message, at its position in the order of its key.

        Args:
            args: replace the first positional arguments.
            corrections: replace arguments by name, whether those were passed by name or not.

        Raises:
            TypeError: the task does not accept the resulting arguments.
        """
        if not args and not corrections:
            return Resubmit()
        positional, kwargs = [*args, *self.args[len(args) :]], dict(self.kwargs)
        for name, value in corrections.items():
            if name in self._positional[: len(positional)]:
                positional[self._positional.index(name)] = value
            else:
                kwargs[name] = value
        if self.signature is not None:
            self.signature.bind(*positional, **kwargs)
        return Resubmit((tuple(positional), kwargs))

    def skip(self, why: str) -> Skip:
        """Abandon the message; the next one of its key takes its turn."""
        return Skip(why)

    def leave(self, why: str) -> Leave:
        """Leave the message to a person; it stays open and continues to block its key."""
        return Leave(why)

    @property
    def _positional(self) -> list[str]:
        if self.signature is None:
            return []
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return [each.name for each in self.signature.parameters.values() if each.kind in kinds]
