"""A cluster of three RabbitMQ nodes whose nodes die, freeze and are restarted one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Road
from tests.faults.verdict import expect_all_once_in_order, handled, open_accounts, traffic
from tests.support.servers.rabbitmq import RabbitMQ
from tests.support.servers.rabbitmq_cluster import NODES, RabbitMQCluster

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

#: Seconds for the effects of one round; a node takes half a minute to rejoin.
PATIENCE = 300.0
ROUNDS = 2
SIZE = 300

_vhosts = itertools.count(1)


@pytest.fixture(scope="module")
def cluster(servers_folder: Path) -> Iterator[RabbitMQCluster]:
    with RabbitMQCluster.running(servers_folder) as cluster:
        yield cluster


@pytest.fixture
def vhost(cluster: RabbitMQCluster) -> str:
    return f"cluster{next(_vhosts)}"


@pytest.fixture(params=["quorum", "classic"])
def road(
    request: pytest.FixtureRequest,
    cluster: RabbitMQCluster,
    vhost: str,
    postgresql_url: str,
    tmp_path: Path,
) -> Iterator[Road]:
    """A system whose processes know all nodes, with queues of either type."""
    road = Road(cluster.vhost(vhost), postgresql_url, tmp_path)
    road.environment["ROAD_QUEUE_TYPE"] = request.param
    road.environment["ROAD_MAX_DELIVERIES"] = "1000"  # each fault takes the messages of all workers
    yield road
    road.end()


def kill(cluster: RabbitMQCluster, home: RabbitMQ) -> Callable[[], None]:
    home.kill()
    cluster.meet(NODES - 1)
    return home.start


def freeze(cluster: RabbitMQCluster, home: RabbitMQ) -> Callable[[], None]:
    home.freeze()
    cluster.meet(NODES - 1)

    def replace() -> None:
        """Kill it before it goes on: the others do not always let it in again."""
        home.kill()
        home.start()

    return replace


def restart_all(cluster: RabbitMQCluster, home: RabbitMQ) -> Callable[[], None]:
    for node in cluster.nodes:
        node.restart()
        cluster.meet(NODES)
    return lambda: None


@pytest.mark.parametrize("fault", [kill, freeze, restart_all])
def test_a_cluster_loses_nothing_whatever_happens_to_its_nodes(
    road: Road,
    cluster: RabbitMQCluster,
    vhost: str,
    fault: Callable[[RabbitMQCluster, RabbitMQ], Callable[[], None]],
) -> None:
    open_accounts(road)
    workers = [road.worker("-n", f"worker{number}@%h") for number in (1, 2)]
    relays = [road.relay(), road.relay()]
    for round_ in range(ROUNDS):
        before = handled(road)
        producers = traffic(road, round_, SIZE)
        road.until(lambda seen=before: handled(road) > seen + 50, "traffic", PATIENCE)  # type: ignore[misc]

        heal = fault(cluster, cluster.home_of(vhost, "road"))
        road.pause(5, "processes go to another node meanwhile")
        heal()
        cluster.start()

        assert [each.wait(PATIENCE) for each in producers] == [0, 0], road.logs()
        for process in (*workers, *relays):  # what a supervisor does
            if not process.alive:
                process.start()
        expect_all_once_in_order(road, PATIENCE)
