"""The error of a transaction that another one has overtaken."""

from __future__ import annotations


class LostRace(Exception):
    """A concurrent transaction has committed first; this one can only be rolled back.

    A copy of the message has been handled, or the row to be written has changed meanwhile.
    """
