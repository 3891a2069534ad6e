"""A private cluster of RabbitMQ nodes on this machine, each to be killed and frozen by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

from tests.support.servers import ports
from tests.support.servers.errors import ServerUnavailable
from tests.support.servers.hosts import LocalProcess
from tests.support.servers.rabbitmq import RabbitMQ, programs_of_a_node
from tests.support.waiting import eventually

#: Nodes of a cluster.
NODES = 3


class RabbitMQCluster:
    """Three nodes that share users, virtual hosts and queues."""

    def __init__(self, nodes: list[RabbitMQ]) -> None:
        self.nodes = nodes

    @classmethod
    @contextlib.contextmanager
    def running(cls, root: Path) -> Iterator[RabbitMQCluster]:
        """A running cluster, with its data below *root*, that ends with the block.

        Raises:
            ServerUnavailable: RabbitMQ is not installed here.
        """
        programs = programs_of_a_node()
        if programs is None:
            raise ServerUnavailable(f"No cluster of RabbitMQ here: install {RabbitMQ.packages}.")
        epmd = ports.claim()
        # An epmd that a node starts dies with that node.
        folder = root / f"epmd-{epmd}"
        folder.mkdir()
        daemon = LocalProcess(["epmd", "-port", str(epmd), "-address", "127.0.0.1"], folder)
        settings = ["cluster_partition_handling = pause_minority"]
        nodes = [RabbitMQ.node(programs, root, epmd=epmd, settings=settings) for _ in range(NODES)]
        with ExitStack() as stack:
            daemon.start()
            stack.callback(daemon.discard)
            for node in nodes:
                stack.enter_context(node)
            for node in nodes[1:]:
                node.ctl("stop_app")
                node.ctl("join_cluster", nodes[0].node_name)
                node.ctl("start_app")
            yield cls(nodes)

    def vhost(self, name: str) -> str:
        """The URL of a new virtual host: those of all nodes, so that clients try one by one."""
        self.start()
        self.nodes[0].vhost(name)
        path = f"/{quote(name, safe='')}"
        return ";".join(urlunsplit(urlsplit(each.url)._replace(path=path)) for each in self.nodes)

    def start(self) -> None:
        """Have all nodes running and answering."""
        for node in self.nodes:
            if not node.host.alive:
                node.host.start()
        for node in self.nodes:
            node.start()
        self.meet(NODES)

    def meet(self, size: int) -> None:
        """Wait until each node that is not stopped or frozen sees *size* running nodes."""
        up = list(filter(is_up, self.nodes))
        eventually(lambda: {running_at(node) for node in up} == {size}, f"{size} nodes")

    def home_of(self, vhost: str, queue: str) -> RabbitMQ:
        """The node with the leader of a quorum queue, or with a classic queue."""
        name = next(filter(is_up, self.nodes)).evaluate(
            f'{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"{vhost}">>, queue,'
            f' <<"{queue}">>)), amqqueue:qnode(Q)'
        )
        return next(each for each in self.nodes if each.node_name == name.strip("'"))


def is_up(node: RabbitMQ) -> bool:
    """True if *node* is neither stopped nor frozen."""
    return node.host.alive and not node.host.frozen


def running_at(node: RabbitMQ) -> int:
    """The number of running nodes of the cluster, as *node* sees it."""
    return int(node.evaluate("length(rabbit_nodes:all_running())"))
