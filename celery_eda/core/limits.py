"""Limits of the content of a message and of the columns that store it."""

from __future__ import annotations

from dataclasses import dataclass

#: Characters of a name: a task, a queue, an exchange, a routing key, a content type.
NAME_LENGTH = 255
#: Bytes of an ordering key or of a service's name in UTF-8, the most that MariaDB can index.
KEY_BYTES = 255


@dataclass(frozen=True)
class Limits:
    """The largest message that a worker handles.

    Attributes:
        bytes: of its body, and of its headers, as received.
        nesting: depth of lists and mappings within each other.
    """

    bytes: int
    nesting: int
