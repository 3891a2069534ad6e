"""Request and reply: requests made, replied to and awaited."""

from __future__ import annotations

from celery_eda.requests.client import RequestClient
from celery_eda.requests.durable import refuse_other_queue
from celery_eda.requests.remote_errors import RemoteErrors
from celery_eda.requests.reply import Replies, Reply
from celery_eda.requests.responder import Responder
from celery_eda.requests.wiring import Requests

__all__ = [
    "RemoteErrors",
    "Replies",
    "Reply",
    "RequestClient",
    "Requests",
    "Responder",
    "refuse_other_queue",
]
