"""A failed message, handed to a function that may mend it; in the end it is a person's.

The repairer is a task of its own, so the consumer that failed is never held up. What it answers
takes effect once, in the transaction of its own message, with its name and reason in the audit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any
from uuid import UUID

from celery import Celery, Task
from sqlalchemy import Connection

from celery_eda.arguments import Arguments
from celery_eda.audit import Action, Author, Entry
from celery_eda.dead_letters import Letter
from celery_eda.errors import ConfigurationError, UnreadableBody
from celery_eda.repair import Repair


@dataclass(frozen=True)
class Resubmit:
    """A repairer's answer: send the message again, with these arguments, None as they are."""

    arguments: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None
    why: str = ""

    def because(self, why: str) -> Resubmit:
        """The same with the reason, for the audit."""
        return replace(self, why=why)


@dataclass(frozen=True)
class Skip:
    """A repairer's answer: give the message up, those behind it go on."""

    why: str


@dataclass(frozen=True)
class Leave:
    """A repairer's answer: a person is needed."""

    why: str


#: What a repairer may return; None leaves the letter to a person.
Answer = Resubmit | Skip | Leave | None


@dataclass(frozen=True)
class Failure:
    """A message that failed for good, as its repairer gets it.

    Attributes:
        letter_id: of the dead letter.
        message_id: the same through all attempts and repairs; an idempotency key.
        args, kwargs: what the task was called with.
        error_type: name of the exception's class.
        error, traceback: bounded, and without what looked like a secret.
        attempts: how many there were since it was last sent.
        key: its ordering key, which it holds until it is repaired or skipped.
        history: its earlier dead letters and what was done to them, the oldest first.
        signature: of the task's function, None if this worker does not know the task.
    """

    letter_id: int
    message_id: UUID
    task: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    reason: str
    error_type: str | None
    error: str | None
    traceback: str | None
    attempts: int
    first_at: datetime | None
    at: datetime
    key: str | None
    history: tuple[Letter | Entry, ...] = ()
    signature: inspect.Signature | None = field(default=None, repr=False)

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments by the names of their parameters, as far as those are known."""
        return {**dict(zip(self._positional, self.args, strict=False)), **self.kwargs}

    def resubmit(self, *args: Any, **corrections: Any) -> Resubmit:
        """Send it again: the next revision of the same message, in its place in its key's order.

        Args:
            args: take the place of the first positional arguments.
            corrections: take the place of arguments by name, however those were passed.

        Raises:
            TypeError: the task does not take such arguments.
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
        """Give it up: the next message of its key takes its turn."""
        return Skip(why)

    def leave(self, why: str) -> Leave:
        """Leave it to a person: it stays open, and goes on holding its key."""
        return Leave(why)

    @property
    def _positional(self) -> list[str]:
        if self.signature is None:
            return []
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return [each.name for each in self.signature.parameters.values() if each.kind in kinds]


@dataclass(frozen=True)
class Repairers:
    """Does with dead letters what repairers say.

    Attributes:
        find_task: the task of a name, None if this process does not know it.
        max_repairs: repairs of one message; then it is left to a person.
    """

    repair: Repair
    find_task: Callable[[str], Task | None]
    max_repairs: int

    def attend(
        self, connection: Connection, id: int, repairer: str, decide: Callable[[Failure], Answer]
    ) -> str:
        """Do with an open letter what *decide* says; returns what became of it.

        A letter that somebody treats meanwhile is left alone.

        Raises:
            RepairError: what it says cannot be done.
            TypeError: it says none of the answers.
        """
        letter = self.repair.dead_letters.find(connection, id)
        if letter is None or not letter.is_open:
            return f"already {letter.state}" if letter else "gone"
        message_id = letter.message.identity.id
        repairs = self.repair.audit.count(connection, message_id, Action.repair)
        if repairs >= self.max_repairs:
            return self._leave(connection, letter, repairer, f"{repairs} repairs did not help")
        try:
            failure = self._failure(connection, letter)
        except UnreadableBody as error:
            return self._leave(connection, letter, repairer, str(error))
        answer = decide(failure)
        now = self.repair.dead_letters.find(connection, id, lock=True)
        if now is None or not now.is_open:
            return f"already {now.state}" if now else "gone"
        if now.message != letter.message:
            return self._leave(connection, now, repairer, "it was edited meanwhile")
        return self._follow(connection, letter, repairer, answer)

    def _follow(self, connection: Connection, letter: Letter, repairer: str, answer: Answer) -> str:
        match answer:
            case Resubmit(given, why):
                arguments = given and Arguments(*given, Arguments.of(letter.message).embedded)
                end = self.repair.redrive(
                    connection,
                    letter.id,
                    Author(repairer, why),
                    arguments=arguments,
                    out_of_order=self._lets_pass(letter),
                    action=Action.repair,
                )
                return str(end.state)
            case Skip(why):
                return str(self.repair.skip(connection, letter.id, Author(repairer, why)).state)
            case Leave(why):
                return self._leave(connection, letter, repairer, why)
            case None:
                return self._leave(connection, letter, repairer, "")
        raise TypeError(
            f"{repairer} returned {type(answer).__qualname__}. Return failure.resubmit(…), "
            "failure.skip(why), failure.leave(why) or None."
        )

    def _failure(self, connection: Connection, letter: Letter) -> Failure:
        arguments = Arguments.of(letter.message)
        task = self.find_task(letter.message.task)
        return Failure(
            letter_id=letter.id,
            message_id=letter.message.identity.id,
            task=letter.message.task,
            args=arguments.args,
            kwargs=arguments.kwargs,
            reason=letter.reason,
            error_type=letter.error_type,
            error=letter.error,
            traceback=letter.traceback,
            attempts=letter.attempts,
            first_at=letter.first_at,
            at=letter.at,
            key=letter.key,
            history=self.repair.history(connection, letter),
            signature=task and inspect.signature(task.run),
        )

    def _leave(self, connection: Connection, letter: Letter, repairer: str, why: str) -> str:
        self.repair.audit.add(connection, Author(repairer, why), Action.leave, letter)
        return "left"

    def _lets_pass(self, letter: Letter) -> bool:
        """Whether its task says that a failed message does not hold its key."""
        task = letter.consumer and self.find_task(letter.consumer)
        return getattr(task, "when_dead", "block") == "skip"


@dataclass(frozen=True)
class RepairTasks:
    """The tasks of one app that repair others.

    Attributes:
        app, queue: the app, and the queue of those that have none of their own; both are asked
            for when they are needed.
        known: of each task that is repaired: the errors that a repairer takes on, its name, and
            its own queue.
    """

    app: Callable[[], Celery]
    queue: Callable[[], str]
    known: dict[str, list[tuple[Any, str, str | None]]] = field(default_factory=dict)

    def refuse_second(self, task: str, repairer: str) -> None:
        """Refuse a *repairer* of *task* of a name that is taken.

        Raises:
            ConfigurationError: it has one of that name already.
        """
        if repairer in (name for _, name, _ in self.known.get(task, ())):
            raise ConfigurationError(
                f"{task} has a repairer {repairer} already. Give this one a name of its own: "
                "`@eda.repairs(…, name=…)`."
            )

    def add(self, task: str, on: Any, repairer: str, queue: str | None) -> None:
        """Let *repairer* mend *task* where it failed with an error of the kind *on*."""
        self.known.setdefault(task, []).append((on, repairer, queue))

    @property
    def queues(self) -> set[str]:
        """The queues of all of them."""
        everything = (each for repairers in self.known.values() for each in repairers)
        return {queue or self.queue() for _, _, queue in everything}

    def seek(self, task: Task, error: Exception, letter: int) -> None:
        """Publish the repair of a dead letter, if somebody repairs such errors of *task*."""
        for on, name, queue in self.known.get(task.name, ()):
            if isinstance(error, on):
                self.app().tasks[name].apply_async((letter,), queue=queue or self.queue())
                return
