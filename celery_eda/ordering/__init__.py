"""The order of messages that share a key: keys, sequences, cursors, parked messages."""

from __future__ import annotations

from celery_eda.ordering import keys
from celery_eda.ordering.cursor import Cursor, Turn
from celery_eda.ordering.cursors import Cursors, PositionTaken
from celery_eda.ordering.gaps import Gaps
from celery_eda.ordering.keys import Key, key_function
from celery_eda.ordering.progress import Progress, WaitingKey
from celery_eda.ordering.sequences import Sequences
from celery_eda.ordering.wiring import Ordering

__all__ = [
    "Cursor",
    "Cursors",
    "Gaps",
    "Key",
    "Ordering",
    "PositionTaken",
    "Progress",
    "Sequences",
    "Turn",
    "WaitingKey",
    "key_function",
    "keys",
]
