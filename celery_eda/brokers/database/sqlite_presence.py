"""The presence of a taker on SQLite: a pipe beside the file, locked while its process lives.

The kernel drops the lock when the process ends, however it ends. A process that has put a message
into a queue writes to every pipe; a write to the file without that shows in its data version.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from sqlalchemy import URL, Connection, Engine

from celery_eda.databases import Tables
from celery_eda.errors import ConfigurationError

#: File systems whose locks and pipes do not reach other machines, or cannot be relied on.
REMOTE = frozenset(
    {
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "fuse.ceph",
        "fuse.glusterfs",
        "fuse.s3fs",
        "fuse.sshfs",
        "glusterfs",
        "gpfs",
        "lustre",
        "ncpfs",
        "nfs",
        "nfs4",
        "smb2",
        "smb3",
        "smbfs",
        "virtiofs",
    }
)
#: Milliseconds that a statement of a taker waits for the write lock.
BUSY_TIMEOUT = 50
MOUNTS = "/proc/self/mounts"


def file_of(url: URL) -> Path:
    """The file of the database at *url*.

    Raises:
        ConfigurationError: the database is in memory.
    """
    if url.database in (None, "", ":memory:"):
        raise ConfigurationError(
            "A SQLite database in memory cannot be the broker: each connection would have its "
            "own database. Name a file: eda+sqlite:///queue.db."
        )
    return Path(os.path.abspath(str(url.database)))


def folder_of(engine: Engine, tables: Tables) -> Path:
    """The folder of the takers' pipes."""
    return Path(f"{file_of(engine.url)}-{tables.takers.fullname}")


def refuse_remote(path: Path, mounts: str | None = None) -> None:
    """Refuse a database file on a network file system, as far as the list of mounts shows it.

    Raises:
        ConfigurationError: the file system of *path* is in ``REMOTE``.
    """
    if (kind := _file_system(path, mounts)) in REMOTE:
        raise ConfigurationError(
            f"{path} is on a network file system ({kind}): locks do not hold there, and messages "
            "would be lost or handled twice. Put the file on a local disk, or use PostgreSQL."
        )


def refuse_without_pipes() -> None:
    """Refuse a system without the pipes by which processes wake each other.

    Raises:
        ConfigurationError: this is such a system.
    """
    if not hasattr(os, "mkfifo"):
        raise ConfigurationError(
            "SQLite cannot be the broker on this system, which has no named pipes. Use "
            "eda+postgresql://, RabbitMQ or Redis; SQLite can still be the service's database."
        )


def _file_system(path: Path, mounts: str | None) -> str:
    if mounts is None:
        try:
            mounts = Path(MOUNTS).read_text(errors="replace")
        except OSError:
            return ""
    found = [line.split(" ")[1:3] for line in mounts.splitlines() if line.count(" ") >= 2]
    folders = [path.resolve(), *path.resolve().parents]
    kinds = {Path(where.replace("\\040", " ")): kind for where, kind in found}
    return next((kinds[folder] for folder in folders if folder in kinds), "")


class LockedPipe:
    """The presence of one taker: a locked pipe with a unique name."""

    def __init__(self, folder: Path) -> None:
        self.name = uuid4().hex
        self._path = folder / self.name
        self._seen: Any = None
        folder.mkdir(exist_ok=True)
        # Renamed to its visible name only once locked: an unlocked pipe means a dead taker.
        hidden = folder / f".{self.name}"
        os.mkfifo(hidden)
        self._descriptor: int | None = os.open(hidden, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        _lock(self._descriptor)
        hidden.rename(self._path)

    def announce(self, connection: Connection, taker: int) -> None:
        # The locked pipe exists already. A handler may hold the write lock for long; meanwhile a
        # worker must not be blocked by it, and tries again.
        connection.exec_driver_sql(f"PRAGMA busy_timeout = {BUSY_TIMEOUT}")

    def fileno(self) -> int:
        if self._descriptor is None:
            raise ConnectionResetError("this taker has ended")
        return self._descriptor

    def woken(self) -> Mapping[str, int] | None:
        with suppress(BlockingIOError):
            os.read(self.fileno(), 65536)
            return None
        return {}

    def missed(self, connection: Connection) -> bool:
        before, self._seen = self._seen, connection.exec_driver_sql("PRAGMA data_version").scalar()
        return bool(before != self._seen)

    def disown(self) -> None:
        # The lock of an open file ends when every process that shares it has closed it.
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def end(self) -> None:
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)
            self.disown()


def is_gone(folder: Path, name: str) -> bool:
    """True if no process holds the lock of the pipe *name*; the pipe is removed then."""
    path = folder / name
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except PermissionError:  # another user's pipe: that user's processes look after it
        return False
    try:
        _lock(descriptor)
    except BlockingIOError:
        return False
    else:
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Lock a pipe.

    Raises:
        BlockingIOError: a process holds the lock.
    """
    import fcntl  # not on Windows, where SQLite cannot be the broker

    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def wake_all(folder: Path) -> None:
    """Wake the takers of all pipes in *folder*."""
    with suppress(OSError):
        for name in os.listdir(folder):
            _wake(folder / name)


def _wake(path: Path) -> None:
    with suppress(OSError):  # the taker has ended, or its pipe is full
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.write(descriptor, b"!")
        finally:
            os.close(descriptor)
