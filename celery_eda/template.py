"""A text with places in it, to be filled in again and again: what stays the same is made once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import AnyStr, Generic


class Template(Generic[AnyStr]):
    """A text, or bytes, in which some places differ from use to use.

    Args:
        whole: it, with something of its own at each of those places.
        places: what that is, by the name of the place.

    Raises:
        ValueError: one of them is not there, or not only once.
    """

    def __init__(self, whole: AnyStr, places: Mapping[str, AnyStr]) -> None:
        for name, text in places.items():
            if whole.count(text) != 1:
                raise ValueError(f"{name} has no place of its own")
        self.names = sorted(places, key=lambda name: whole.index(places[name]))
        self._nothing: AnyStr = whole[:0]
        self._pieces: list[AnyStr] = []
        for name in self.names:
            before, _, whole = whole.partition(places[name])
            self._pieces += [before, self._nothing]
        self._pieces.append(whole)

    def filled(self, values: Mapping[str, AnyStr]) -> AnyStr:
        """The whole with these *values* in its places; there may be more than are needed."""
        pieces = self._pieces.copy()
        pieces[1::2] = [values[name] for name in self.names]
        return self._nothing.join(pieces)
