"""Names of services on RabbitMQ: for each a queue without messages, which states the owner.

The broker refuses to declare a queue again with other arguments, and deletes it some time after the
last declaration.
"""

from __future__ import annotations

from amqp.exceptions import ChannelError, PreconditionFailed
from kombu import Connection, Queue

from celery_eda.core import redaction

log = redaction.logger(__name__)

#: Beginning of the names of the queues.
PREFIX = "eda.service."


def hold(connection: Connection, name: str, owner: str, expires: float) -> bool:
    """Hold *name* for *owner* during the next *expires* seconds; False if another one holds it."""
    # The broker compares no arguments of ours. It does compare this one, which has no effect here.
    stated = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": owner}
    queue = Queue(PREFIX + name, expires=expires, queue_arguments=stated)
    channel = connection.channel()
    try:
        queue.bind(channel).queue_declare()
    except PreconditionFailed:
        return False
    except ChannelError as error:
        log.warning(
            "the broker does not let this service hold its name %s: %s. Workers of another service "
            "of that name are not noticed. Permit the worker's user to declare queues %s*.",
            name,
            error,
            PREFIX,
        )
    finally:
        if channel.is_open:
            channel.close()
    return True
