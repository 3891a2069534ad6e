"""Copies of a PostgreSQL server: a standby that follows it, a base backup, and its archive."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.support.servers import ports
from tests.support.servers.errors import ServerFailed
from tests.support.servers.postgresql import PostgreSQL, owner, programs_for
from tests.support.servers.programs import run
from tests.support.waiting import eventually


def back_up(primary: PostgreSQL, folder: Path, *options: str) -> None:
    """Make a base backup of the running *primary* in ``folder/data``."""
    user = owner()
    programs = programs_for(user)
    assert programs, "It has made the primary."
    folder.mkdir()
    _give_away(folder)
    source = f"host=127.0.0.1 port={primary.port} user=postgres"
    place = ["--pgdata", folder / "data", "--dbname", source]
    run([programs / "pg_basebackup", *place, "--checkpoint=fast", *options], user=user)


def synchronous_standby(primary: PostgreSQL, root: Path) -> PostgreSQL:
    """A running standby without which *primary* commits nothing from now on."""
    port = ports.claim()
    folder = root / f"postgresql-{port}"
    back_up(primary, folder, "--write-recovery-conf")
    standby = PostgreSQL.on(folder, port)
    standby.start()
    primary.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
    primary.execute("SELECT pg_reload_conf()")
    state = "SELECT sync_state FROM pg_stat_replication"
    eventually(lambda: primary.execute(state) == [("sync",)], "the standby follows")
    return standby


def promote(standby: PostgreSQL) -> None:
    """Make *standby* a primary, which commits by itself."""
    promoted = standby.execute("SELECT pg_promote(true, 60)")
    if promoted != [(True,)]:
        raise ServerFailed(f"The standby was not promoted:\n{standby.host.log_tail()}")


def archive_into(archive: Path, primary: PostgreSQL) -> None:
    """Have *primary*, which does not run yet, copy its write-ahead log into *archive*."""
    archive.mkdir()
    _give_away(archive)
    _configure(primary.data, f"archive_mode = on\narchive_command = 'cp %p {archive}/%f'\n")


def restored(primary: PostgreSQL, backup: Path, archive: Path | None) -> PostgreSQL:
    """A running server on *backup* at the port of *primary*, which was killed.

    It repeats what *primary* wrote after the backup, to the last commit, if there is an *archive*.
    """
    settings = {}
    if archive is not None:
        for segment in (primary.data / "pg_wal").iterdir():
            if segment.is_file():
                shutil.copy(segment, archive)
                _give_away(archive / segment.name)
        settings["restore_command"] = f"cp {archive}/%f %p"
    signal = backup / "data/recovery.signal"
    signal.touch()
    _give_away(signal)
    server = PostgreSQL.on(backup, primary.port, **settings)
    server.start()
    server.recover()
    return server


def _configure(data: Path, lines: str) -> None:
    with (data / "postgresql.conf").open("a") as file:
        file.write(lines)


def _give_away(path: Path) -> None:
    """Make the user of PostgreSQL the owner of *path*."""
    if user := owner():
        shutil.chown(path, user)
