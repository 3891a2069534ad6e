"""``@eda.repairs``: makes a function a repairer of a task's failed messages."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from celery_eda.core.context import current_session
from celery_eda.dead_letters import DeadLetters
from celery_eda.inbox import TaskDecorator, run_async
from celery_eda.outbox import Outbox, join


class RepairDecorator:
    """``@eda.repairs(charge, on=BadAmount)``: makes a function a repairer of a task's messages.

    When the task fails for good with such an error, a call of the repair task ``<task>.repair`` is
    published to the queue ``eda_repair_queue``, by default ``eda.repair.<service>``, in the
    transaction that writes the dead letter. So the worker that failed is not blocked. Workers
    without ``-Q`` consume from that queue. Both workers have to load the module with the repairer.

    The function gets a :class:`celery_eda.Failure` and returns ``failure.resubmit(…)``,
    ``failure.skip(why)``, ``failure.leave(why)``, or None, which means leave. The decision takes
    effect once, together with what the function wrote. If the repairer fails, the repair becomes
    a dead letter itself, and the failed message stays open. After ``eda_max_repairs`` repairs of
    one message it is left to a person.
    """

    def __init__(self, dead_letters: DeadLetters, outbox: Outbox, task: TaskDecorator) -> None:
        self._dead_letters = dead_letters
        self._outbox = outbox
        self._task = task

    def __call__(
        self,
        task: Any,
        on: type[Exception] | tuple[type[Exception], ...] = Exception,
        *,
        name: str | None = None,
        queue: str | None = None,
        **options: Any,
    ) -> Callable[[Callable[..., Any]], Any]:
        """Register a repairer.

        Args:
            task: the reliable task or its name. Give the name if the app is configured after its
                tasks are defined. A worker refuses to start with a repairer of a plain task.
            on: errors that it repairs; the first repairer of the task that accepts the error
                gets the message.
            name: of the repair task; several repairers of one task need different names.
            queue: of the repair task, instead of ``eda_repair_queue``. It is made if the app does
                not define it, even if ``task_create_missing_queues`` is off.
            options: those of ``@eda.task``.

        Raises:
            ConfigurationError: there is a repairer of that name already.
        """
        tasks = self._dead_letters.repair_tasks
        repaired = task if isinstance(task, str) else task.name
        repairer = name or f"{repaired}.repair"
        tasks.refuse_second(repaired, repairer)

        def decorate(function: Callable[..., Any]) -> Any:
            decide = run_async(self._task.with_session(function))

            @wraps(function, assigned=("__module__", "__doc__"))
            def repair(letter: int) -> str:
                transaction = join(current_session().connection(), self._outbox)
                return self._dead_letters.repairers.run(transaction, letter, repairer, decide)

            del repair.__wrapped__  # Celery would use the function's signature
            tasks.add(repaired, on, repairer, queue)
            return self._task(name=repairer, **options)(repair)

        return decorate
