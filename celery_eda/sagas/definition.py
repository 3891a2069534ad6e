"""Definitions of sagas as values: steps, parallel branches, choices, loops and waits.

The parts of a definition have names that are unique in it. A saga's history refers to a part by
its name, with the round in brackets for a part inside a loop: ``pay[2]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from celery_eda.core.retry import Policy
from celery_eda.errors import SagaError

#: The data of a saga, by name. JSON can express all of it.
Data = Mapping[str, Any]
#: Makes the keyword arguments of a task from the data of the saga.
Arguments = Callable[[Data], Mapping[str, Any]]
Condition = Callable[[Data], bool]
MISSING: Any = object()


@dataclass(frozen=True)
class Step:
    """A command to a task of any service, and the task that compensates it.

    Attributes:
        task, undo: names of tasks; without *undo* there is nothing to compensate.
        give, give_undo: make their keyword arguments from the saga's data.
        keep: the name under which the result enters the data; None drops the result.
        retry: decides on further attempts after a failure.
        timeout: seconds until the step fails without an outcome; None waits forever.
        options: those of ``apply_async``.
    """

    name: str
    task: str
    undo: str | None = None
    give: Arguments | None = None
    give_undo: Arguments | None = None
    keep: str | None = None
    retry: Policy | None = None
    timeout: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Wait:
    """A wait for a signal: the decision of a person, or a message from another system.

    Attributes:
        timeout: seconds; None waits forever.
        default: the value to use after *timeout*; without a default the part fails then.
    """

    name: str
    keep: str | None
    timeout: float | None = None
    default: Any = MISSING


@dataclass(frozen=True)
class SubSaga:
    """Another saga of this service as a part: started, awaited, and compensated as a whole.

    Attributes:
        definition: of the sub-saga; its final data are the result.
        give: makes the data of the sub-saga from the data of its parent.
        timeout: seconds until the sub-saga is cancelled; None waits forever.
    """

    name: str
    definition: Definition
    give: Arguments | None = None
    keep: str | None = None
    timeout: float | None = None


@dataclass(frozen=True)
class Lock:
    """A semantic lock, held from here to the end of the saga.

    After Garcia-Molina and Salem, *Sagas* (1987), and the lock and stash of Eventuate: between two
    steps other sagas see changes that may still be compensated. Sagas that lock the same *key* run
    one after the other.

    Attributes:
        timeout: seconds until the part fails without the lock; None waits forever.
    """

    name: str
    key: Callable[[Data], str]
    timeout: float | None = None


@dataclass(frozen=True)
class Sleep:
    """A pause of some *seconds*."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Pivot:
    """The point of no return: a later failure parks the saga instead of compensating it."""

    name: str


@dataclass(frozen=True)
class Fail:
    """A failure by design; *why* is the reason that the saga reports."""

    name: str
    why: str


@dataclass(frozen=True)
class Choice:
    """The first block whose condition holds; nothing if no condition holds."""

    name: str
    cases: tuple[tuple[Condition, Block], ...]


@dataclass(frozen=True)
class Loop:
    """A block that repeats while *again*, asked before each round, holds.

    Attributes:
        limit: rounds after which the loop fails.
    """

    name: str
    again: Condition
    body: Block
    limit: int


@dataclass(frozen=True)
class Parallel:
    """Branches that run concurrently until *need* of them are done.

    The other branches are abandoned then, and compensated.
    """

    name: str
    branches: tuple[Block, ...]
    need: int


Part = Step | SubSaga | Lock | Wait | Sleep | Pivot | Fail | Choice | Loop | Parallel


@dataclass(frozen=True)
class Block:
    """Parts that run one after the other."""

    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Definition:
    """One version of a saga.

    Attributes:
        parts: the parts of all depths, by name.
        origin: the function that describes the saga, as ``module.function``.
    """

    name: str
    version: int
    body: Block
    parts: Mapping[str, Part]
    origin: str


@dataclass(frozen=True)
class Definitions:
    """The registered sagas of one app, by name and version."""

    known: dict[str, dict[int, Definition]] = field(default_factory=dict)

    def add(self, definition: Definition) -> None:
        """Register *definition*.

        Raises:
            SagaError: another definition has this name and version.
        """
        versions = self.known.setdefault(definition.name, {})
        if versions.get(definition.version, definition).origin != definition.origin:
            raise SagaError(
                f"The saga {definition.name} has version {definition.version} already. Running "
                "sagas keep the version they began with: give the new one the next number."
            )
        versions[definition.version] = definition

    def of(self, name: str, version: int) -> Definition:
        """Return one *version* of the saga *name*.

        Raises:
            SagaError: this version is not in the code.
        """
        try:
            return self.known[name][version]
        except KeyError:
            raise SagaError(
                f"Version {version} of the saga {name} is not defined here. Keep it in the code "
                "until the last saga of that version has ended."
            ) from None


def blocks_in(part: Part) -> tuple[Block, ...]:
    """The blocks of a *part* that has some."""
    match part:
        case Choice():
            return tuple(case for _, case in part.cases)
        case Loop():
            return (part.body,)
        case Parallel():
            return part.branches
    return ()


def names_in(block: Block) -> frozenset[str]:
    """The names of all parts of *block*, at any depth."""
    return frozenset(_names_in(block))


def _names_in(block: Block) -> Iterator[str]:
    for part in block.parts:
        yield part.name
        for each in blocks_in(part):
            yield from _names_in(each)


def always(_: Data) -> bool:
    """Return True: the condition of an unconditional ``otherwise``."""
    return True


def name_of(condition: Condition) -> str | None:
    """Return the name of a condition; None for a lambda."""
    name = getattr(condition, "__name__", "<lambda>")
    return None if name == "<lambda>" else str(name)
