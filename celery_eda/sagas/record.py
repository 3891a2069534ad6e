"""Records of a saga: its attempts at each of its parts.

A record is written when the attempt begins and changed once, when the attempt ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any


class Kind(str, Enum):
    """The subject of a record.

    ``step``: a command. ``undo``: the command that compensates a step. ``lock``, ``wait`` and
    ``sleep``: a wait for a lock, a signal, a timer. ``signal``: a signal that came before its wait.
    ``choice``: the case of a conditional. ``taken``: the branches whose results a parallel block
    uses. ``round``: True if a loop begins this round. ``pivot``: the point of no return is passed.
    """

    step = "step"
    undo = "undo"
    lock = "lock"
    wait = "wait"
    sleep = "sleep"
    signal = "signal"
    choice = "choice"
    taken = "taken"
    round = "round"
    pivot = "pivot"


class Status(str, Enum):
    """The outcome of a record.

    ``open``: no outcome yet. ``done``: success. ``failed``: an error or a time-out. ``skipped``: a
    person counts the failure as a success. ``again``: a person has ordered another attempt.
    ``dropped``: the wait ended because its branch is not needed any more.
    """

    open = "open"
    done = "done"
    failed = "failed"
    skipped = "skipped"
    again = "again"
    dropped = "dropped"


@dataclass(frozen=True)
class Record:
    """One attempt at one part.

    Attributes:
        path: the name of the part, followed by the round of each loop around it: ``pay[2]``.
        attempt: from 1.
        ended: rank of this end among the ends of the saga's records, from 1; None while open.
        value: the result, the signal, the choice or the error.
        timed_out: True if the time-out failed this record, so that the outcome may still come.
        id: primary key; 0 before the record is stored.
    """

    kind: Kind
    path: str
    attempt: int = 1
    status: Status = Status.open
    ended: int | None = None
    value: Any = None
    timed_out: bool = False
    id: int = 0

    @property
    def part(self) -> str:
        """The name of the part, without the rounds of its loops."""
        return part_name(self.path)


def part_name(path: str) -> str:
    """The name of the part at *path*, without the rounds of its loops."""
    return path.partition("[")[0]
