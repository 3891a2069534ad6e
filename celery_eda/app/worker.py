"""A check before a Celery worker starts: a worker that could lose messages must not run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from celery import bootsteps

from celery_eda.app import unsafe_queues
from celery_eda.app.installation import make_reliable
from celery_eda.errors import UnsafeSetting
from celery_eda.inbox import ReliableTask, is_asynchronous, make_safe, take_when_due

#: Pools that run greenlets.
GREEN_POOLS = ("gevent", "eventlet")


class Guard(bootsteps.Step):
    """Refuses to start a worker with a pool, settings or tables that break a guarantee."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        eda = worker.app.eda
        pool = worker.pool_cls.__module__.rpartition(".")[2]
        if why := eda.databases.dialect.refused_pools.get(pool):
            raise UnsafeSetting(f"The pool {pool} cannot be used with this database: {why}.")
        make_reliable(worker.app)
        for task in _reliable(worker.app.tasks.values()):
            make_safe(task)
        take_when_due(worker.app.tasks.values())
        if pool in GREEN_POOLS and (names := _asynchronous(worker.app.tasks.values())):
            raise UnsafeSetting(
                f"The pool {pool} cannot run `async def` tasks ({', '.join(names)}): its greenlets "
                "share one thread, which can run one event loop at a time. "
                "Use prefork, threads or solo."
            )
        eda.check()
        eda.dead_letters.repair_tasks.refuse_plain()
        unsafe_queues.warn_of_unsafe(worker.app)
        unsafe_queues.warn_of_left_behind(worker.app)
        eda.events.record_queues()


def _reliable(tasks: Iterable[Any]) -> list[ReliableTask]:
    return [task for task in tasks if isinstance(task, ReliableTask)]


def _asynchronous(tasks: Iterable[Any]) -> list[str]:
    return sorted(task.name for task in _reliable(tasks) if is_asynchronous(task.run))
