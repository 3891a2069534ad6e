"""Replication behind Sentinel: a message counts as sent when a replica has it too.

Redis replies before its replicas have the message. When the master dies, Sentinel makes a replica
the master, and a message that only the old master had would be lost. So each batch ends with
``WAIT``. While no replica is connected, the master alone confirms, as it does without Sentinel;
Redis's ``min-replicas-to-write`` makes it refuse messages then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from kombu.transport.redis import SentinelChannel

from celery_eda.brokers.base import PublishResult, Verdict

log = logging.getLogger(__name__)

#: Replicas that have to have a message. Sentinel prefers the replica that has most.
ENOUGH = 1


class Replication:
    """The replication that a sending connection waits for.

    Attributes:
        wanted: the number of replicas that the next batch waits for.
    """

    def __init__(self, *, patience: float) -> None:
        self.wanted = 0
        self._is_replicated = False
        self._milliseconds = max(1, int(patience * 1000))

    def begin(self, channel: Any, connection: Any) -> None:
        """Ask the server behind a new *connection* for its replicas, if Sentinel watches it.

        Args:
            channel: kombu's, to the same server.
            connection: the one that sends.
        """
        self._is_replicated = isinstance(channel, SentinelChannel)
        if not self._is_replicated:
            return
        connection.send_command("ROLE")
        self._count(connection.read_response())
        if not self.wanted:
            log.warning(
                "no replica is connected to the Redis master: what it confirms is lost if it dies. "
                "Set min-replicas-to-write in Redis to refuse messages meanwhile."
            )

    def commands(self) -> list[list[Any]]:
        """The commands that end a batch."""
        if not self._is_replicated:
            return []
        return [["WAIT", self.wanted, self._milliseconds], ["ROLE"]]

    def shortfall(self, wanted: int, reply: Callable[[], Any]) -> PublishResult | None:
        """The result of a batch that fewer than *wanted* replicas have; None if enough have it.

        Args:
            wanted: the number of replicas when the batch was sent.
            reply: gives the server's replies to the :meth:`commands`, one after the other.
        """
        if not self._is_replicated:
            return None
        replicated = reply()
        self._count(reply())
        if isinstance(replicated, int) and replicated >= wanted:
            return None
        return PublishResult(Verdict.unknown, f"No replica has confirmed the message: {replicated}")

    def _count(self, role: Any) -> None:
        replicas = role[2] if isinstance(role, list) and role[:1] == [b"master"] else ()
        self.wanted = min(ENOUGH, len(replicas))
