"""A private MariaDB, durable (flushed at each commit), with a new database for each test."""

from __future__ import annotations

import os
import pwd
import re
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit, urlunsplit

import pymysql
from typing_extensions import Self

from tests.support.servers import ports
from tests.support.servers.base import Server
from tests.support.servers.docker import Container
from tests.support.servers.hosts import LocalProcess
from tests.support.servers.programs import beside, first, run

OLDEST = (10, 6)
SETTINGS = {
    "character-set-server": "utf8mb4",
    "innodb-flush-log-at-trx-commit": "1",
    "max-connections": "200",
}


class MariaDB(Server):
    """A MariaDB server; its ``root`` needs no password from this machine."""

    name: ClassVar[str] = "MariaDB"

    variable: ClassVar[str] = "CELERY_EDA_TEST_MARIADB_URL"
    packages: ClassVar[str] = "mariadb-server 10.6 or later (apt)"

    @classmethod
    def local(cls, root: Path) -> Self | None:
        """A new one, made by ``mariadb-install-db`` of this machine."""
        program = _program()
        if program is None:
            return None
        port = ports.claim()
        folder = root / f"mariadb-{port}"
        temporary = folder / "tmp"
        temporary.mkdir(parents=True)
        own = [
            f"--datadir={folder / 'data'}",
            # Not the machine's: two that are installed at once delete each other's files there.
            f"--tmpdir={temporary}",
            f"--user={pwd.getpwuid(os.getuid()).pw_name}",
        ]
        access = ["--auth-root-authentication-method=normal", "--skip-test-db"]
        run(["mariadb-install-db", "--no-defaults", *own, *access])
        # Names are not resolved, so that 127.0.0.1 is not taken for the "localhost" of sockets.
        place = [f"--port={port}", "--bind-address=127.0.0.1", "--skip-name-resolve"]
        command: list[str | Path] = [
            program,
            "--no-defaults",
            *own,
            *place,
            f"--socket={folder / 's'}",
            *_settings(),
        ]
        return cls(LocalProcess(command, folder), _url(port))

    @classmethod
    def container(cls) -> Self:
        """A new one in Docker."""
        port = ports.claim()
        access = {"MARIADB_ALLOW_EMPTY_ROOT_PASSWORD": "1"}
        return cls(Container("mariadb:11.4", port, 3306, _settings(), access), _url(port))

    def login(self) -> None:
        """Connect and disconnect."""
        self._connect(read_timeout=2).close()

    def database(self, name: str) -> str:
        """The SQLAlchemy URL of a new database; an older one of that name is dropped."""
        self.drop(name)
        self._execute(f"CREATE DATABASE `{_full(name)}`")
        return urlunsplit(urlsplit(self.url)._replace(path=f"/{_full(name)}"))

    def drop(self, name: str) -> None:
        """Drop a database of ours; waits for transactions that use it."""
        self._execute(f"DROP DATABASE IF EXISTS `{_full(name)}`")

    def _execute(self, statement: str) -> None:
        with self._connect(read_timeout=30) as connection, connection.cursor() as cursor:
            cursor.execute(statement)

    def _connect(self, read_timeout: int) -> pymysql.Connection:
        url = urlsplit(self.url)
        return pymysql.connect(
            host=url.hostname,
            port=self.port,
            user=unquote(url.username or "root"),
            password=unquote(url.password or ""),
            connect_timeout=2,
            read_timeout=read_timeout,
            autocommit=True,
        )


def _full(name: str) -> str:
    """Names of our own, so that a server that we were only given loses nothing of its owner's."""
    return f"eda_test_{name}"


def _url(port: int) -> str:
    return f"mysql+pymysql://root@127.0.0.1:{port}/mysql"


def _settings() -> list[str]:
    return [f"--{name}={value}" for name, value in SETTINGS.items()]


def _program() -> Path | None:
    """The first server program of MariaDB that is recent enough."""
    for folder in [*beside("mariadbd"), Path("/usr/sbin"), Path("/usr/local/sbin")]:
        if first([folder], "mariadbd") and _version(folder / "mariadbd") >= OLDEST:
            return folder / "mariadbd"
    return None


def _version(program: Path) -> tuple[int, ...]:
    found = re.search(r"Ver (\d+)\.(\d+)", run([program, "--version"]))
    return tuple(map(int, found.groups())) if found else (0,)
