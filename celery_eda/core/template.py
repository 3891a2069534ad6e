"""A text with slots: its constant parts are made once, and only the slots filled each time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import AnyStr, Generic


class Template(Generic[AnyStr]):
    """A text, or bytes, with named slots.

    Args:
        whole: an example of the text, with a unique text in each slot.
        slots: those unique texts, by the name of the slot.

    Raises:
        ValueError: a slot's text occurs in the whole not at all, or more than once.
    """

    def __init__(self, whole: AnyStr, slots: Mapping[str, AnyStr]) -> None:
        for name, text in slots.items():
            if whole.count(text) != 1:
                raise ValueError(f"{name} has no slot of its own")
        self.names = sorted(slots, key=lambda name: whole.index(slots[name]))
        self._empty: AnyStr = whole[:0]
        self._pieces: list[AnyStr] = []
        for name in self.names:
            before, _, whole = whole.partition(slots[name])
            self._pieces += [before, self._empty]
        self._pieces.append(whole)

    def filled(self, values: Mapping[str, AnyStr]) -> AnyStr:
        """The text with these *values* in its slots; other values are ignored."""
        pieces = self._pieces.copy()
        pieces[1::2] = [values[name] for name in self.names]
        return self._empty.join(pieces)
