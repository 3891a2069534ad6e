"""Repairers: functions that decide about messages that failed permanently.

A repairer runs as a task of its own, so it does not delay the consumer that failed. Its decision
takes effect once, in the transaction of its own message, with its name and reason in the audit
trail.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from celery import Task
from sqlalchemy import Connection

from celery_eda.brokers import own_queues
from celery_eda.core.arguments import Arguments
from celery_eda.core.context import Capture
from celery_eda.core.service import Service
from celery_eda.dead_letters.audit import Action, Author
from celery_eda.dead_letters.failure import Failure, Leave, RepairDecision, Resubmit, Skip
from celery_eda.dead_letters.letter import Letter
from celery_eda.dead_letters.repair import Repair
from celery_eda.errors import ConfigurationError, UnreadableBody

#: Beginning of the names of the queues of repair tasks.
REPAIRS = "eda.repair"


@dataclass(frozen=True)
class Repairers:
    """Calls repairers, and executes their decisions."""

    repair: Repair
    service: Service

    def run(
        self,
        transaction: Capture,
        id: int,
        repairer: str,
        decide: Callable[[Failure], RepairDecision],
    ) -> str:
        """Execute the decision of *decide* about an open letter.

        A letter that changes while *decide* runs is left to a person.

        Args:
            transaction: the one of the repairer's own message.
            id: of the letter.
            repairer: its name, for the audit trail.
            decide: the user's function.

        Returns:
            The result, e.g. ``redriven``, ``left``, ``already skipped``.

        Raises:
            RepairError: the decision cannot be executed.
            TypeError: *decide* did not return a decision.
        """
        connection = transaction.connection
        letter = self.repair.dead_letters.find(connection, id)
        if letter is None or not letter.is_open:
            return f"already {letter.state}" if letter else "gone"
        message_id = letter.message.identity.id
        repairs = self.repair.audit.count(connection, message_id, Action.repair)
        if repairs >= self.service.settings.max_repairs:
            return self._leave(connection, letter, repairer, f"{repairs} repairs did not help")
        try:
            failure = self._failure(connection, letter)
        except UnreadableBody as error:
            return self._leave(connection, letter, repairer, str(error))
        decision = decide(failure)
        now = self.repair.dead_letters.find(connection, id, lock=True)
        if now is None or not now.is_open:
            return f"already {now.state}" if now else "gone"
        if now.message != letter.message:
            return self._leave(connection, now, repairer, "it was edited meanwhile")
        return self._execute(transaction, letter, repairer, decision)

    def _execute(
        self, transaction: Capture, letter: Letter, repairer: str, decision: RepairDecision
    ) -> str:
        match decision:
            case Resubmit(given, why):
                arguments = given and Arguments(*given, Arguments.of(letter.message).embedded)
                result = self.repair.redrive(
                    transaction,
                    letter.id,
                    Author(repairer, why),
                    arguments=arguments,
                    out_of_order=self._may_be_overtaken(letter),
                    action=Action.repair,
                )
                return str(result.state)
            case Skip(why):
                return str(self.repair.skip(transaction, letter.id, Author(repairer, why)).state)
            case Leave(why):
                return self._leave(transaction.connection, letter, repairer, why)
            case None:
                return self._leave(transaction.connection, letter, repairer, "")
        raise TypeError(
            f"{repairer} returned {type(decision).__qualname__}. Return failure.resubmit(…), "
            "failure.skip(why), failure.leave(why) or None."
        )

    def _failure(self, connection: Connection, letter: Letter) -> Failure:
        arguments = Arguments.of(letter.message)
        task = self.service.app.tasks.get(letter.message.task)
        return Failure(
            letter=letter,
            args=arguments.args,
            kwargs=arguments.kwargs,
            history=self.repair.history(connection, letter),
            signature=task and inspect.signature(task.run),
        )

    def _leave(self, connection: Connection, letter: Letter, repairer: str, why: str) -> str:
        self.repair.audit.add(connection, Author(repairer, why), Action.leave, letter)
        return "left"

    def _may_be_overtaken(self, letter: Letter) -> bool:
        """True if a failed message of this task does not block its key."""
        task = letter.consumer and self.service.app.tasks.get(letter.consumer)
        return getattr(task, "when_dead", "block") == "skip"


@dataclass(frozen=True)
class RepairTasks:
    """The repair tasks of one app.

    Attributes:
        known: the repairers of each task, by its name: the type of the errors, the name of the
            repair task, and its own queue or None.
    """

    service: Service
    known: dict[str, list[tuple[Any, str, str | None]]] = field(default_factory=dict)

    def refuse_second(self, task: str, repairer: str) -> None:
        """Refuse a second repair task of *task* with the name *repairer*.

        Raises:
            ConfigurationError: the name is taken.
        """
        if repairer in (name for _, name, _ in self.known.get(task, ())):
            raise ConfigurationError(
                f"{task} has a repairer {repairer} already. Give this one a name of its own: "
                "`@eda.repairs(…, name=…)`."
            )

    def add(self, task: str, on: Any, repairer: str, queue: str | None) -> None:
        """Register *repairer* for errors of type *on* of *task*."""
        if queue is not None:
            own_queues.add(self.service, queue)
        self.known.setdefault(task, []).append((on, repairer, queue))

    def refuse_plain(self) -> None:
        """Refuse repairers of plain tasks, whose failures make no dead letters.

        Tasks of other services, which are not registered here, are not checked.

        Raises:
            ConfigurationError: a registered task with a repairer is not reliable.
        """
        registered = self.service.app.tasks.keys() & self.known.keys()
        plain = sorted(name for name in registered if not self.service.is_reliable(name))
        if plain:
            raise ConfigurationError(
                f"There are repairers of plain tasks: {', '.join(plain)}. They would never be "
                "called, since a failed message of a plain task is no dead letter. Make the tasks "
                "reliable with `@eda.task` or `eda_tasks`, or remove the repairers."
            )

    @property
    def queues(self) -> set[str]:
        """The queues of all repair tasks."""
        everything = (each for repairers in self.known.values() for each in repairers)
        return {queue or self._default_queue for _, _, queue in everything}

    @property
    def _default_queue(self) -> str:
        """The queue of repair tasks without one of their own; services do not share it."""
        return self.service.settings.repair_queue or f"{REPAIRS}.{self.service.name}"

    def dispatch(self, task: Task, error: Exception, letter: int) -> None:
        """Publish a call of the first repair task for *error* of *task*, if there is any."""
        for on, name, queue in self.known.get(task.name, ()):
            if isinstance(error, on):
                self.service.app.tasks[name].apply_async(
                    (letter,), queue=queue or self._default_queue
                )
                return
