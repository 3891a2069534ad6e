"""One rule for times without a time zone: they are UTC.

Some databases return moments without a zone, and users may pass such moments to the Python API.
"""

from __future__ import annotations

from datetime import datetime, timezone


def utc(moment: datetime) -> datetime:
    """*moment* in UTC; without a time zone, it is taken to be UTC already."""
    if moment.tzinfo is None:
        return moment.replace(tzinfo=timezone.utc)
    return moment.astimezone(timezone.utc)
