"""Forks: a child must not use the connections, threads and locks of its parent.

Systems that cannot fork, such as Windows, need none of this.
"""

from __future__ import annotations

import os
from collections.abc import Callable

CAN_FORK = hasattr(os, "fork")


def _nothing() -> None:
    """Do nothing."""


def on_fork(
    in_child: Callable[[], object],
    *,
    before: Callable[[], object] = _nothing,
    in_parent: Callable[[], object] = _nothing,
) -> None:
    """Have the functions called at each fork of this process."""
    if register := getattr(os, "register_at_fork", None):
        register(before=before, after_in_parent=in_parent, after_in_child=in_child)
