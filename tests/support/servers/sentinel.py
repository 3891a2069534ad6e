"""A private Redis behind Sentinel: a master, a replica, and one sentinel that promotes it."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import redis
from typing_extensions import Self

from tests.support.servers import ports
from tests.support.servers.errors import ServerUnavailable
from tests.support.servers.hosts import LocalProcess
from tests.support.servers.redis import Redis, program

MASTER = "eda"
CONFIGURATION = """
bind 127.0.0.1
port {port}
dir {folder}
sentinel monitor {master} 127.0.0.1 {node} 1
sentinel down-after-milliseconds {master} 1000
sentinel failover-timeout {master} 3000
"""


class Sentinel(Redis):
    """One sentinel, and the two nodes that it watches.

    Attributes:
        nodes: the first is the master at the beginning.
    """

    def __init__(self, host: LocalProcess, url: str, nodes: list[Redis]) -> None:
        super().__init__(host, url)
        self.nodes = nodes

    @classmethod
    def beside(cls, root: Path) -> Self:
        """A new one, with its nodes."""
        executable = program()
        if executable is None:
            raise ServerUnavailable(f"No Redis here: install {Redis.packages}.")
        first = Redis.node(executable, root)
        second = Redis.node(executable, root, replicaof=f"127.0.0.1 {first.port}")
        port = ports.claim()
        folder = root / f"sentinel-{port}"
        folder.mkdir()
        configuration = folder / "sentinel.conf"
        configuration.write_text(
            CONFIGURATION.format(port=port, folder=folder, master=MASTER, node=first.port)
        )
        host = LocalProcess([executable, configuration, "--sentinel"], folder)
        return cls(host, f"redis://127.0.0.1:{port}/0", [first, second])

    @property
    def broker_url(self) -> str:
        """The URL for kombu; the transport option ``master_name`` is ``MASTER``."""
        return f"sentinel://127.0.0.1:{self.port}/0"

    @property
    def master(self) -> Redis:
        """The node that is the master by the sentinel's word."""
        with redis.Redis.from_url(self.url, socket_timeout=10) as client:
            _, port = client.sentinel_get_master_addr_by_name(MASTER)
        return next(each for each in self.nodes if each.port == port)

    @property
    def is_replicated(self) -> bool:
        """True if the master has a replica, and the sentinel knows that replica to be well."""
        with redis.Redis.from_url(self.master.url, socket_timeout=10) as client:
            connected = client.role()[2]
        with redis.Redis.from_url(self.url, socket_timeout=10) as client:
            replicas = client.sentinel_slaves(MASTER)
        well = [each for each in replicas if each["flags"] == "slave"]
        return bool(connected and well)

    def __enter__(self) -> Self:
        for node in self.nodes:
            node.start()
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for server in (self, *self.nodes):
            server.host.discard()
