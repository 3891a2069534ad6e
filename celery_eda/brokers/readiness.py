"""Sockets that can be read without waiting."""

from __future__ import annotations

import selectors
from typing import Any

#: Without a limit on the numbers of descriptors, where the system has such a selector.
_Selector: Any = getattr(selectors, "PollSelector", selectors.SelectSelector)


def readable(*sockets: Any, within: float = 0) -> set[int]:
    """Descriptors of the *sockets* that can be read; waits for one of them for some seconds."""
    with _Selector() as selector:
        for each in sockets:
            selector.register(each, selectors.EVENT_READ)
        return {key.fd for key, _ in selector.select(within)}
