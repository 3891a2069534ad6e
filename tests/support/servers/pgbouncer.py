"""A private pgbouncer before a PostgreSQL: each transaction gets any of a few connections."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit, urlunsplit

import psycopg
from typing_extensions import Self

from tests.support.servers import ports
from tests.support.servers.base import Server
from tests.support.servers.errors import ServerUnavailable
from tests.support.servers.hosts import LocalProcess
from tests.support.servers.postgresql import PostgreSQL, owner

#: Connections to the server: fewer than clients, so that these share them.
CONNECTIONS = 4
SETTINGS = """
[databases]
* = host=127.0.0.1 port={server} user=postgres

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
max_client_conn = 400
default_pool_size = {connections}
server_login_retry = 0.2
ignore_startup_parameters = extra_float_digits
"""


class PgBouncer(Server):
    """A pooler; whom it lets in needs no password."""

    name: ClassVar[str] = "pgbouncer"
    variable: ClassVar[str] = "CELERY_EDA_TEST_PGBOUNCER_URL"
    packages: ClassVar[str] = "pgbouncer (apt)"

    @classmethod
    def before(cls, server: PostgreSQL, root: Path, mode: str = "transaction") -> Self:
        """A new one before *server*; not started yet.

        Raises:
            ServerUnavailable: there is no such program here.
        """
        program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
        if program is None:
            raise ServerUnavailable(f"No {cls.name} here: install {cls.packages}.")
        port, user = ports.claim(), owner()
        folder = root / f"pgbouncer-{port}"
        folder.mkdir()
        settings = folder / "pgbouncer.ini"
        settings.write_text(
            SETTINGS.format(server=server.port, port=port, mode=mode, connections=CONNECTIONS)
        )
        if user:
            shutil.chown(folder, user)
        host = LocalProcess([program, settings], folder, user=user)
        return cls(host, f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres")

    @classmethod
    def local(cls, root: Path) -> Self | None:
        """None: it stands before a server, see :meth:`before`."""
        return None

    @classmethod
    def container(cls) -> Self:
        """There is none: see :meth:`before`."""
        raise ServerUnavailable(f"No {cls.name} here: install {cls.packages}.")

    def login(self) -> None:
        """Ask the server something through it."""
        url = urlunsplit(urlsplit(self.url)._replace(scheme="postgresql"))
        with psycopg.connect(url, connect_timeout=2, autocommit=True) as connection:
            connection.execute("SELECT 1")

    def through(self, url: str) -> str:
        """The URL of the same database, by way of the pooler."""
        return urlunsplit(urlsplit(url)._replace(netloc=f"postgres@127.0.0.1:{self.port}"))
