"""What a saga does, in plain Python: steps in order and beside each other, choices, waiting, and
what undoes each step.

A definition is a value. Its parts have names that are unique in it; what happens to them is written
down under these names, with the round in brackets for what is inside of a loop.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any

from celery_eda.errors import ConfigurationError, SagaError
from celery_eda.retry import Policy, checked

#: What a saga knows, by name.
Data = Mapping[str, Any]
Give = Callable[[Data], Mapping[str, Any]]
Condition = Callable[[Data], bool]
#: Rounds after which a loop fails, unless it says otherwise.
LONGEST_LOOP = 100
MISSING: Any = object()
_NAME = re.compile(r"[\w.-]{1,100}")


@dataclass(frozen=True)
class Step:
    """A command to a task, of this service or another one, and what undoes it.

    Attributes:
        task, undo: names of tasks; without an undo nothing has to be undone.
        give, give_undo: make their keyword arguments of the saga's data.
        keep: the name under which the result is known from then on; None not to keep it.
        retry: decides on further attempts after a failure.
        timeout: seconds for the outcome; None for as long as it takes.
        options: those of ``apply_async``.
    """

    name: str
    task: str
    undo: str | None = None
    give: Give | None = None
    give_undo: Give | None = None
    keep: str | None = None
    retry: Policy | None = None
    timeout: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Wait:
    """Waits for a signal: a person's decision, or an event from outside.

    Attributes:
        default: what is taken for the signal when the time is over; without one that is a failure.
    """

    name: str
    keep: str | None
    timeout: float | None = None
    default: Any = MISSING


@dataclass(frozen=True)
class SubSaga:
    """Another saga of this service: begun, waited for, and undone as a whole.

    Attributes:
        definition: of what is begun; its data at its end are the result.
        give: makes what it is to know of the data of the saga that begins it.
        timeout: seconds for its end; then it is cancelled.
    """

    name: str
    definition: Definition
    give: Give | None = None
    keep: str | None = None
    timeout: float | None = None


@dataclass(frozen=True)
class Lock:
    """A semantic lock: waits until no other saga holds *key*, and holds it to the saga's end.

    After Garcia-Molina and Salem, *Sagas* (1987), and Eventuate's lock and stash: between their
    steps sagas see what others have done and may undo. Those that take the same key do not.
    """

    name: str
    key: Callable[[Data], str]
    timeout: float | None = None


@dataclass(frozen=True)
class Sleep:
    """Waits for some *seconds*."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Pivot:
    """From here on there is no way back: what fails is not undone, but waits to be resumed."""

    name: str


@dataclass(frozen=True)
class Fail:
    """The end of what goes on from here: it has failed, and *why*."""

    name: str
    why: str


@dataclass(frozen=True)
class Choice:
    """The first block whose condition holds; none if none does."""

    name: str
    cases: tuple[tuple[Condition, Block], ...]


@dataclass(frozen=True)
class Loop:
    """A block again and again, as long as *again* says so, before each round."""

    name: str
    again: Condition
    body: Block
    limit: int


@dataclass(frozen=True)
class Parallel:
    """Branches beside each other, until *need* of them are done.

    Those that are not done by then are given up, and what they did is undone.
    """

    name: str
    branches: tuple[Block, ...]
    need: int


Part = Step | SubSaga | Lock | Wait | Sleep | Pivot | Fail | Choice | Loop | Parallel


@dataclass(frozen=True)
class Block:
    """Parts one after the other."""

    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Definition:
    """One version of a saga.

    Attributes:
        parts: all of them by their names, those inside of others too.
        origin: where it is described.
    """

    name: str
    version: int
    body: Block
    parts: Mapping[str, Part]
    origin: str


@dataclass(frozen=True)
class Definitions:
    """The sagas that an app knows, by name and version."""

    known: dict[str, dict[int, Definition]] = field(default_factory=dict)

    def add(self, definition: Definition) -> None:
        """Let there be *definition*.

        Raises:
            SagaError: there is another one of that name and version.
        """
        versions = self.known.setdefault(definition.name, {})
        if versions.get(definition.version, definition).origin != definition.origin:
            raise SagaError(
                f"The saga {definition.name} has version {definition.version} already. Sagas that "
                "run keep the one they began with: give the new one the next number."
            )
        versions[definition.version] = definition

    def of(self, name: str, version: int) -> Definition:
        """That *version* of the saga *name*.

        Raises:
            SagaError: the code has it no more.
        """
        try:
            return self.known[name][version]
        except KeyError:
            raise SagaError(
                f"Version {version} of the saga {name} is not defined here. Keep it for as long "
                "as a saga of that version runs."
            ) from None


def always(_: Data) -> bool:
    """The condition that holds in any case."""
    return True


def name_of(condition: Condition) -> str | None:
    """What a condition is called, if it is a function with a name."""
    name = getattr(condition, "__name__", "<lambda>")
    return None if name == "<lambda>" else str(name)


def defined(name: str, version: int, describe: Callable[[Steps], object]) -> Definition:
    """The definition that *describe* gives.

    Raises:
        ConfigurationError: it makes no sense.
    """
    steps = Steps(name)
    describe(steps)
    origin = f"{describe.__module__}.{getattr(describe, '__qualname__', describe)}"
    return Definition(name, version, steps.block(), dict(steps.parts), origin)


class Steps:
    """What describes a saga, one part after the other."""

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
        give: Give | None = None,
        give_undo: Give | None = None,
        keep: str | None = MISSING,
        retry: Policy | None = None,
        timeout: float | None = None,
        **options: Any,
    ) -> None:
        """Have *task* do something, and *undo* undo it if a later part fails.

        Args:
            name: unique in this saga.
            task: a reliable task, or the name of one of any service.
            undo: likewise.
            give: makes the keyword arguments of *task* of the saga's data, which is a dictionary;
                without it the data are its one argument.
            give_undo: likewise for *undo*; by default as *give*, with what is known by then.
            keep: the name in the data for the result, by default that of the step; None to drop it.
            retry: a policy for failures that are final to the task itself.
            timeout: seconds after which the step has failed; what comes later is undone.
            options: of ``apply_async``, as ``queue``.
        """
        if retry is not None:
            checked(retry)
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
        """Wait until somebody gives this *signal*; its value is then in the data.

        Args:
            signal: unique in this saga.
            timeout: seconds after which the value is *default*.
            default: without one the saga fails when the time is over.
            keep: the name in the data, by default that of the signal.
        """
        self._add(Wait(signal, signal if keep is MISSING else keep, timeout, default))

    def saga(
        self,
        name: str,
        saga: Any,
        *,
        give: Give | None = None,
        keep: str | None = MISSING,
        timeout: float | None = None,
    ) -> None:
        """Begin another saga of this service, and go on when it is completed.

        If a later part fails it is undone as a whole; if this saga is cancelled meanwhile, so is
        that one. It is called as this one, with ``/name`` behind it.

        Args:
            name: unique in this saga.
            saga: what :meth:`celery_eda.EDA.saga` has made.
            give: makes what it is to know of this saga's data; without it that is all of them.
            keep: the name in the data for what it knows at its end, by default *name*.
            timeout: seconds after which it is cancelled, and this part has failed.
        """
        keep = name if keep is MISSING else keep
        self._add(SubSaga(name, saga.definition, give, keep, timeout))

    def lock(self, name: str, key: Callable[[Data], str], *, timeout: float | None = None) -> None:
        """Let no other saga of this service have the same *key*, from here to the end of this one.

        Who comes later waits, in the order in which they came. It binds only those that take it. A
        saga that is parked keeps it.

        Args:
            name: unique in this saga.
            key: what is locked, made of the saga's data.
            timeout: seconds after which the saga fails instead of waiting on; two that wait for
                each other need it.
        """
        self._add(Lock(name, key, timeout))

    def sleep(self, name: str, seconds: float) -> None:
        """Wait for some *seconds*; nobody is kept busy by that."""
        self._add(Sleep(name, seconds))

    def pivot(self, name: str = "pivot") -> None:
        """From here on only forward: what fails then is not undone, but resumed by a person."""
        if len(self._open) > 1:
            raise ConfigurationError(
                f"The pivot of {self._saga} is inside of another part: put it between two parts of "
                "the saga itself, so that all before it is done."
            )
        self._add(Pivot(name))

    def fail(self, name: str, why: str) -> None:
        """Go no further: what was done is undone, with *why* as the reason."""
        self._add(Fail(name, why))

    @contextmanager
    def parallel(self, name: str = "parallel", *, need: int | None = None) -> Iterator[None]:
        """A block of branches, each in ``with steps.branch():``.

        Args:
            name: unique in this saga.
            need: how many have to be done; None for all, 1 for the first.
        """
        self._branches.append([])
        with self._block() as block:
            yield
        branches = tuple(self._branches.pop())
        if block or not branches or not 0 < (need or len(branches)) <= len(branches):
            raise ConfigurationError(
                f"{name} of {self._saga} needs branches, with all its parts in one of them, and a "
                "`need` of at most their number: `with steps.branch(): …`."
            )
        self._add(Parallel(name, branches, need or len(branches)))

    @contextmanager
    def branch(self) -> Iterator[None]:
        """One of the branches of a ``parallel``."""
        if not self._branches:
            raise ConfigurationError(f"{self._saga} has a branch outside of any `parallel`.")
        with self._block() as block:
            yield
        self._branches[-1].append(Block(tuple(block)))

    @contextmanager
    def when(self, condition: Condition, name: str | None = None) -> Iterator[None]:
        """A block for when *condition* holds for the data, once the saga has come here.

        The choice has the name of the function, unless it is given one.
        """
        with self._block() as block:
            yield
        cases = [(condition, Block(tuple(block)))]
        name = name or self._free(name_of(condition) or f"choice{self._count(Choice)}")
        self._add(Choice(name, tuple(cases)))
        self._cases = cases

    @contextmanager
    def otherwise(self, condition: Condition = always) -> Iterator[None]:
        """A block for when no condition before it held, and *condition* does, if there is one."""
        cases, before = self._cases, self._open[-1]
        if cases is None or not before or not isinstance(choice := before[-1], Choice):
            raise ConfigurationError(f"{self._saga} has an `otherwise` that follows no `when`.")
        with self._block() as block:
            yield
        cases.append((condition, Block(tuple(block))))
        before[-1] = self.parts[choice.name] = Choice(choice.name, tuple(cases))
        self._cases = cases

    @contextmanager
    def repeat(
        self, while_: Condition, *, limit: int = LONGEST_LOOP, name: str | None = None
    ) -> Iterator[None]:
        """A block again and again, as long as *while_* holds; that fails after *limit* rounds."""
        with self._block() as block:
            yield
        name = name or self._free(name_of(while_) or f"loop{self._count(Loop)}")
        self._add(Loop(name, while_, Block(tuple(block)), limit))

    def block(self) -> Block:
        """All that was described so far."""
        return Block(tuple(self._open[0]))

    @contextmanager
    def _block(self) -> Iterator[list[Part]]:
        self._open.append([])
        yield self._open[-1]
        self._open.pop()

    def _add(self, part: Part) -> None:
        if part.name in self.parts or not _NAME.fullmatch(part.name):
            raise ConfigurationError(
                f"{self._saga} has more than one part {part.name!r}, or that is no name. Give each "
                "part a name of its own, of letters, digits and `_ - .`."
            )
        self.parts[part.name] = part
        self._open[-1].append(part)
        self._cases = None

    def _free(self, name: str) -> str:
        """*name*, or with a number behind it if that is taken."""
        numbered = (f"{name}{number}" for number in count(2))
        return next(each for each in chain([name], numbered) if each not in self.parts)

    def _count(self, kind: type) -> int:
        return 1 + sum(isinstance(part, kind) for part in self.parts.values())


def _task_name(task: Any) -> str:
    return task if isinstance(task, str) else str(task.name)
