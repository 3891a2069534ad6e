"""Limits of the content of a message and of the columns that store it."""

from __future__ import annotations

from dataclasses import dataclass

#: Characters of a name: a task, a queue, an exchange, a routing key, a content type.
NAME_LENGTH = 255
#: Bytes of an ordering key or of a service's name in UTF-8, the most that MariaDB can index.
KEY_BYTES = 255
#: The largest number that a header may hold: a column holds that of the next attempt too.
LARGEST = 2**31 - 2


def fits(name: str, octets: int = 4 * NAME_LENGTH) -> bool:
    """True if *name* is printable text that a column of *octets* bytes holds, on any database."""
    return len(name) <= NAME_LENGTH and name.isprintable() and len(name.encode()) <= octets


@dataclass(frozen=True)
class Limits:
    """The largest message that a worker handles.

    Attributes:
        bytes: of its body, and of its headers, as received.
        nesting: depth of lists and mappings within each other.
        items: number of values in a body of JSON, each of which takes memory of its own.
    """

    bytes: int
    nesting: int
    items: int
