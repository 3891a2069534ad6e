"""``Steps``: the language in which a function describes a saga.

    @eda.saga("order")
    def order(steps: Steps) -> None:
        steps.step("pay", "payment.charge", undo="payment.refund")
        with steps.parallel():
            with steps.branch():
                steps.step("make", "kitchen.make", undo="kitchen.throw_away")
            with steps.branch():
                steps.step("notify", "notification.send")

The function runs once, when the saga is registered, and yields a definition.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, count
from typing import Any

from celery_eda.core.retry import Policy, checked_policy
from celery_eda.errors import ConfigurationError
from celery_eda.sagas.definition import (
    MISSING,
    Arguments,
    Block,
    Choice,
    Condition,
    Data,
    Definition,
    Fail,
    Lock,
    Loop,
    Parallel,
    Part,
    Pivot,
    Sleep,
    Step,
    SubSaga,
    Wait,
    always,
    name_of,
)

#: Rounds after which a loop fails, by default.
LONGEST_LOOP = 100
_NAME = re.compile(r"[\w.-]{1,100}")


def defined(name: str, version: int, describe: Callable[[Steps], object]) -> Definition:
    """Return the definition of the saga that *describe* describes.

    Raises:
        ConfigurationError: the description is inconsistent; the error says where.
    """
    steps = Steps(name)
    describe(steps)
    origin = f"{describe.__module__}.{getattr(describe, '__qualname__', describe)}"
    return Definition(name, version, steps.block(), dict(steps.parts), origin)


class Steps:
    """The description of a saga under construction; each call adds one part.

    Names are unique in a saga: 1 to 100 letters, digits and ``_ - .``.
    """

    def __init__(self, saga: str) -> None:
        self.parts: dict[str, Part] = {}
        self._saga = saga
        self._open: list[list[Part]] = [[]]
        self._branches: list[list[Block]] = []
        self._cases: list[tuple[Condition, Block]] | None = None

    def step(
        self,
        name: str,
        task: Any,
        *,
        undo: Any = None,
        give: Arguments | None = None,
        give_undo: Arguments | None = None,
        keep: str | None = MISSING,
        retry: Policy | None = None,
        timeout: float | None = None,
        **options: Any,
    ) -> None:
        """Call *task*, and compensate the call with *undo* if a later part fails.

        Args:
            name: unique in this saga.
            task: a reliable task, or the name of a reliable task of any service.
            undo: likewise.
            give: makes the keyword arguments of *task* from the saga's data, a dictionary;
                without *give* the data are the only argument.
            give_undo: likewise for *undo*; by default *give*, called with the data of that moment.
            keep: the name under which the result enters the data, by default that of the step;
                None drops the result.
            retry: a policy for failures that the task's own retries did not cure.
            timeout: seconds until the step fails; a success that comes later is compensated.
            options: options of ``apply_async``, such as ``queue``.
        """
        if retry is not None:
            checked_policy(retry)
        keep = name if keep is MISSING else keep
        self._add(
            Step(
                name,
                task=_task_name(task),
                undo=None if undo is None else _task_name(undo),
                give=give,
                give_undo=give_undo or give,
                keep=keep,
                retry=retry,
                timeout=timeout,
                options=options,
            )
        )

    def wait_for(
        self,
        signal: str,
        *,
        timeout: float | None = None,
        default: Any = MISSING,
        keep: str | None = MISSING,
    ) -> None:
        """Wait for a *signal*, whose value enters the data.

        Args:
            signal: unique in this saga.
            timeout: seconds until *default* is used instead.
            default: a value; without a default the part fails after *timeout*.
            keep: the name in the data, by default that of the signal.
        """
        self._add(Wait(signal, signal if keep is MISSING else keep, timeout, default))

    def saga(
        self,
        name: str,
        saga: Any,
        *,
        give: Arguments | None = None,
        keep: str | None = MISSING,
        timeout: float | None = None,
    ) -> None:
        """Start another saga of this service, and continue when the sub-saga has completed.

        If a later part fails, the sub-saga is compensated as a whole. If this saga is cancelled,
        so is a running sub-saga. The id of the sub-saga is the id of this saga and ``/name``.

        Args:
            name: unique in this saga.
            saga: a function decorated with :meth:`celery_eda.EDA.saga`.
            give: makes the sub-saga's data from this saga's data; without *give* all data are
                copied.
            keep: the name under which the sub-saga's final data enter the data, by default *name*.
            timeout: seconds until the sub-saga is cancelled and this part fails.
        """
        keep = name if keep is MISSING else keep
        self._add(SubSaga(name, saga.definition, give, keep, timeout))

    def lock(self, name: str, key: Callable[[Data], str], *, timeout: float | None = None) -> None:
        """Lock *key* against other sagas of this service, from here to the end of this saga.

        Later sagas queue for the lock, first come, first served. The lock is advisory: sagas that
        do not call :meth:`lock` ignore it. A parked saga keeps its locks.

        Args:
            name: unique in this saga.
            key: makes the key, at most 255 bytes, from the saga's data.
            timeout: seconds until the part fails without the lock. Sagas that take two locks in
                different orders need it: deadlocks are not detected.
        """
        self._add(Lock(name, key, timeout))

    def sleep(self, name: str, seconds: float) -> None:
        """Pause for some *seconds*; no worker is occupied meanwhile."""
        self._add(Sleep(name, seconds))

    def pivot(self, name: str = "pivot") -> None:
        """Mark the point of no return: a later failure parks the saga until a person resumes it."""
        if len(self._open) > 1:
            raise ConfigurationError(
                f"The pivot of {self._saga} is inside another part. Put it between two parts at "
                "the top level of the saga, so that everything before it is done."
            )
        self._add(Pivot(name))

    def fail(self, name: str, why: str) -> None:
        """Fail: the saga is compensated, with *why* as the reason."""
        self._add(Fail(name, why))

    @contextmanager
    def parallel(self, name: str = "parallel", *, need: int | None = None) -> Iterator[None]:
        """Begin a block of concurrent branches, each in ``with steps.branch():``.

        Args:
            name: unique in this saga.
            need: how many branches have to be done; None for all, 1 for the first. The other
                branches are compensated.
        """
        self._branches.append([])
        with self._block() as block:
            yield
        branches = tuple(self._branches.pop())
        if block or not branches or not 0 < (need or len(branches)) <= len(branches):
            raise ConfigurationError(
                f"{name} of {self._saga} needs branches, `with steps.branch(): …`, each part "
                "inside a branch, and a `need` of at most the number of branches."
            )
        self._add(Parallel(name, branches, need or len(branches)))

    @contextmanager
    def branch(self) -> Iterator[None]:
        """Begin a branch of a ``parallel`` block."""
        if not self._branches:
            raise ConfigurationError(
                f"{self._saga} has a branch outside of a parallel block. Put it into "
                "`with steps.parallel(): …`."
            )
        with self._block() as block:
            yield
        self._branches[-1].append(Block(tuple(block)))

    @contextmanager
    def when(self, condition: Condition, name: str | None = None) -> Iterator[None]:
        """Begin a block that runs if *condition* holds for the data of that moment.

        The choice is named after the function, unless *name* is given.
        """
        with self._block() as block:
            yield
        cases = [(condition, Block(tuple(block)))]
        name = name or self._free(name_of(condition) or f"choice{self._count(Choice)}")
        self._add(Choice(name, tuple(cases)))
        self._cases = cases

    @contextmanager
    def otherwise(self, condition: Condition = always) -> Iterator[None]:
        """Begin a block that runs if no earlier condition held, and *condition* holds."""
        cases, before = self._cases, self._open[-1]
        if cases is None or not before or not isinstance(choice := before[-1], Choice):
            raise ConfigurationError(
                f"{self._saga} has an `otherwise` without a `when` directly before it. "
                "Put the `otherwise` behind its `when`."
            )
        with self._block() as block:
            yield
        cases.append((condition, Block(tuple(block))))
        before[-1] = self.parts[choice.name] = Choice(choice.name, tuple(cases))
        self._cases = cases

    @contextmanager
    def repeat(
        self, while_: Condition, *, limit: int = LONGEST_LOOP, name: str | None = None
    ) -> Iterator[None]:
        """Begin a block that repeats while *while_* holds, and fails after *limit* rounds."""
        with self._block() as block:
            yield
        name = name or self._free(name_of(while_) or f"loop{self._count(Loop)}")
        self._add(Loop(name, while_, Block(tuple(block)), limit))

    def block(self) -> Block:
        """Return the parts described so far."""
        return Block(tuple(self._open[0]))

    @contextmanager
    def _block(self) -> Iterator[list[Part]]:
        self._open.append([])
        yield self._open[-1]
        self._open.pop()

    def _add(self, part: Part) -> None:
        if part.name in self.parts or not _NAME.fullmatch(part.name):
            raise ConfigurationError(
                f"{self._saga} has two parts {part.name!r}, or that is not a valid name. Give each "
                "part a unique name of letters, digits and `_ - .`."
            )
        self.parts[part.name] = part
        self._open[-1].append(part)
        self._cases = None

    def _free(self, name: str) -> str:
        """Return *name*, with a number appended if the name is in use."""
        numbered = (f"{name}{number}" for number in count(2))
        return next(each for each in chain([name], numbered) if each not in self.parts)

    def _count(self, kind: type) -> int:
        return 1 + sum(isinstance(part, kind) for part in self.parts.values())


def _task_name(task: Any) -> str:
    return task if isinstance(task, str) else str(task.name)
