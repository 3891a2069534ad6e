"""PostgreSQL that fails over to its standby, or is restored from a backup."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.faults.conftest import Process, Road
from tests.faults.verdict import expect_all_once_in_order, handled, open_accounts, traffic
from tests.support.servers.errors import ServerUnavailable
from tests.support.servers.postgresql import PostgreSQL
from tests.support.servers.postgresql_copies import (
    archive_into,
    back_up,
    promote,
    restored,
    synchronous_standby,
)

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

PATIENCE = 200.0
SIZE = 300


@pytest.fixture
def folder(servers_folder: Path, tmp_path: Path) -> Path:
    """A folder of this test that the user of PostgreSQL may enter."""
    folder = servers_folder / tmp_path.name
    folder.mkdir()
    return folder


def new_server(folder: Path) -> PostgreSQL:
    server = PostgreSQL.local(folder)
    if server is None:
        raise ServerUnavailable(f"No {PostgreSQL.name} here: install {PostgreSQL.packages}.")
    return server


@pytest.fixture
def primary(folder: Path) -> Iterator[PostgreSQL]:
    with new_server(folder) as primary:
        yield primary


@pytest.fixture
def standby(primary: PostgreSQL, folder: Path) -> Iterator[PostgreSQL]:
    with synchronous_standby(primary, folder) as standby:
        yield standby


@contextmanager
def running_road(broker: str, database: str, folder: Path) -> Iterator[Road]:
    road = Road(broker, database, folder)
    try:
        yield road
    finally:
        road.end()


def of_both(url: str, *servers: PostgreSQL) -> str:
    """The database of *url* on whichever of *servers* takes writes."""
    hosts = "&".join(f"host=127.0.0.1:{each.port}" for each in servers)
    database = urlsplit(url).path
    return (
        f"postgresql+psycopg://postgres@{database}?{hosts}"
        "&target_session_attrs=read-write&connect_timeout=2"
    )


def begin(road: Road) -> list[Process]:
    """Two workers and two relays."""
    road.environment["ROAD_MAX_DELIVERIES"] = "1000"  # a fault takes the messages of all workers
    open_accounts(road)
    workers = [road.worker("-n", f"worker{number}@%h") for number in (1, 2)]
    return [*workers, road.relay(), road.relay()]


def go_on(processes: list[Process]) -> None:
    """Start what has ended, as a supervisor does."""
    for process in processes:
        if not process.alive:
            process.start()


def end(road: Road, producers: list[Process], struck: Sequence[Process] = ()) -> None:
    """Wait until *producers* have committed all, and those *struck* by a fault have ended."""
    assert [each.wait(PATIENCE) for each in producers] == [0] * len(producers), road.logs()
    for each in struck:
        each.wait(PATIENCE)


def kill(primary: PostgreSQL) -> None:
    primary.kill()


def freeze(primary: PostgreSQL) -> None:
    primary.freeze()


@pytest.mark.parametrize("fault", [kill, freeze])
def test_a_synchronous_standby_takes_over_without_a_loss(
    primary: PostgreSQL,
    standby: PostgreSQL,
    fault: Callable[[PostgreSQL], None],
    rabbitmq_url: str,
    tmp_path: Path,
) -> None:
    url = of_both(primary.database("road"), primary, standby)
    with running_road(rabbitmq_url, url, tmp_path) as road:
        processes = begin(road)
        struck = traffic(road, 0, SIZE)
        road.until(lambda: handled(road) > 50, "traffic")

        fault(primary)
        promote(standby)
        primary.kill()  # whoever promotes a standby makes sure of the old primary
        go_on(processes)
        end(road, traffic(road, 1, SIZE), struck)

        expect_all_once_in_order(road, PATIENCE)


def test_a_base_backup_with_its_archive_loses_nothing(
    folder: Path, rabbitmq_url: str, tmp_path: Path
) -> None:
    lost = new_server(folder)
    archive = folder / "archive"
    archive_into(archive, lost)
    with lost, running_road(rabbitmq_url, lost.database("road"), tmp_path) as road:
        processes = begin(road)
        struck = traffic(road, 0, SIZE)
        road.until(lambda: handled(road) > 50, "traffic")
        back_up(lost, folder / "backup")
        struck += traffic(road, 1, SIZE)
        road.until(lambda: handled(road) > 2 * SIZE, "traffic after the backup")

        lost.kill()
        with restored(lost, folder / "backup", archive):
            go_on(processes)
            end(road, traffic(road, 2, SIZE), struck)

            expect_all_once_in_order(road, PATIENCE)


def test_a_base_backup_alone_loses_what_came_after_it_and_nothing_else(
    folder: Path, rabbitmq_url: str, tmp_path: Path
) -> None:
    lost = new_server(folder)
    with lost, running_road(rabbitmq_url, lost.database("road"), tmp_path) as road:
        processes = begin(road)
        end(road, traffic(road, 0, SIZE))
        expect_all_once_in_order(road, PATIENCE)
        back_up(lost, folder / "backup")
        end(road, traffic(road, 1, SIZE))
        expect_all_once_in_order(road, PATIENCE)

        lost.kill()
        with restored(lost, folder / "backup", None):
            new_epoch = road._run(
                ["celery", "-A", road.app, "eda", "order", "new-epoch", "--yes"], None
            )
            assert new_epoch.wait() == 0, road.logs()
            go_on(processes)
            end(road, traffic(road, 2, SIZE))

            expect_all_once_in_order(road, PATIENCE)
