"""The check that the history of a saga fits its definition.

A definition must not change while sagas of its version run: a new one is a new version. If it has
changed all the same, the history would be read wrongly, and steps would be done twice, or never be
compensated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from celery_eda.sagas.definition import (
    Block,
    Choice,
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
    blocks_in,
    names_in,
)
from celery_eda.sagas.record import Kind, Record

#: The parts to which records of each kind belong.
PARTS: Mapping[Kind, tuple[type[Part], ...]] = {
    Kind.step: (Step, SubSaga),
    Kind.undo: (Step, SubSaga),
    Kind.lock: (Lock,),
    Kind.wait: (Wait,),
    Kind.signal: (Wait,),
    Kind.sleep: (Sleep,),
    Kind.choice: (Choice,),
    Kind.taken: (Parallel,),
    Kind.round: (Loop,),
    Kind.pivot: (Pivot,),
}


def misfit(definition: Definition, records: Sequence[Record]) -> str | None:
    """The reason why *records* cannot come from *definition*; None if they can."""
    check = _Check(records)
    return check.parts(definition) or check.block(definition.body, "")


@dataclass(frozen=True)
class _Check:
    records: Sequence[Record]

    def parts(self, definition: Definition) -> str | None:
        """Check that each record belongs to a part of its kind, inside as many loops."""
        depths = dict(_depths(definition.body, 0))
        for record in self.records:
            part = definition.parts.get(record.part)
            if part is None:
                return f"its history has {record.path!r}, which is not in the definition"
            if not isinstance(part, PARTS[record.kind]):
                kind = type(part).__name__.lower()
                return f"its history has a {record.kind.value} {record.path!r}, now a {kind}"
            rounds = record.path.count("[") - (record.kind is Kind.round)
            if record.kind is not Kind.signal and rounds != depths[record.part]:
                return f"its history has {record.path!r}, now inside {depths[record.part]} loops"
        return None

    def block(self, block: Block, rounds: str) -> str | None:
        """Check that no part has begun before the one in front of it."""
        missing: Part | None = None
        for part in block.parts:
            begun = self._has_begun(part, rounds)
            if begun and missing is not None:
                return f"{part.name!r} has begun, but {missing.name!r} before it has not"
            if begun and (why := self._inside(part, rounds)):
                return why
            if not begun and missing is None and _leaves_records(part):
                missing = part
        return None

    def _inside(self, part: Part, rounds: str) -> str | None:
        match part:
            case Choice():
                return self._choice(part, rounds)
            case Loop():
                return self._loop(part, rounds)
            case Parallel():
                return self._parallel(part, rounds)
        return None

    def _choice(self, choice: Choice, rounds: str) -> str | None:
        chosen = self._value(Kind.choice, f"{choice.name}{rounds}")
        if chosen is not None and chosen >= len(choice.cases):
            return f"case {chosen + 1} of {choice.name!r}, which was chosen, is not defined"
        for number, (_, case) in enumerate(choice.cases):
            if number == chosen:
                if why := self.block(case, rounds):
                    return why
            elif self._has_any(names_in(case), rounds):
                return f"a case of {choice.name!r} has begun that was not chosen"
        return None

    def _loop(self, loop: Loop, rounds: str) -> str | None:
        number = 1
        while self._value(Kind.round, f"{loop.name}{rounds}[{number}]"):
            if why := self.block(loop.body, f"{rounds}[{number}]"):
                return why
            number += 1
        return None

    def _parallel(self, parallel: Parallel, rounds: str) -> str | None:
        taken = self._value(Kind.taken, f"{parallel.name}{rounds}") or []
        for number, branch in enumerate(parallel.branches):
            if why := self.block(branch, rounds):
                return why
            # A branch whose result is used is done, so each of its parts has begun.
            if number in taken and (part := self._not_begun(branch, rounds)):
                return f"a branch of {parallel.name!r} is done, but {part.name!r} in it never began"
        if any(number >= len(parallel.branches) for number in taken):
            return f"{parallel.name!r} has fewer branches than were done"
        return None

    def _not_begun(self, branch: Block, rounds: str) -> Part | None:
        parts = (each for each in branch.parts if _leaves_records(each))
        return next((each for each in parts if not self._has_begun(each, rounds)), None)

    def _has_begun(self, part: Part, rounds: str) -> bool:
        return self._has_any(names_in(Block((part,))), rounds)

    def _has_any(self, names: frozenset[str], rounds: str) -> bool:
        return any(
            each.part in names and each.path.removeprefix(each.part).startswith(rounds)
            for each in self.records
            if each.kind is not Kind.signal  # it may come before its wait
        )

    def _value(self, kind: Kind, path: str) -> Any:
        found = (each.value for each in self.records if (each.kind, each.path) == (kind, path))
        return next(found, None)


def _depths(block: Block, depth: int) -> Iterator[tuple[str, int]]:
    """The number of loops around each part of *block*, by name."""
    for part in block.parts:
        yield part.name, depth
        for inner in blocks_in(part):
            yield from _depths(inner, depth + isinstance(part, Loop))


def _leaves_records(part: Part) -> bool:
    """True if there is a record of *part* as soon as it has begun."""
    match part:
        case Fail():
            return False
        case Parallel():
            return any(_leaves_records(each) for block in part.branches for each in block.parts)
    return True
