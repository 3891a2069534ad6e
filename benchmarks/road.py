"""The time of one request, step by step: ``python -m benchmarks.road --broker redis``.

Prints, as Markdown, the time at which each step of the road is reached, and every statement that
the database executes for one request and its reply. Statements of the relay beside the worker,
which polls, are counted separately.
"""

from __future__ import annotations

import re
import socket
import threading
from collections import Counter, defaultdict
from pathlib import Path

import click
import psutil
from sqlalchemy import create_engine, text

from benchmarks import figures
from benchmarks.stage import Stage
from tests.support.servers.hosts import Host, LocalProcess
from tests.support.servers.postgresql import PostgreSQL

COUNT, PAUSE = 60, 0.05
#: A statement in PostgreSQL's log, in a line that begins with ``PREFIX``.
PREFIX = "%p|%r| "
STATEMENT = re.compile(
    r"^(?P<backend>\d+)\|[\d.]+\((?P<port>\d+)\)\| LOG:  (statement|execute \S+): (?P<words>.*)$"
)


@click.command()
@click.option("--broker", type=click.Choice(["rabbitmq", "redis"]), default="rabbitmq")
@click.option("--address", default="correlation", show_default=True)
@click.option("--count", default=COUNT, show_default=True)
def main(broker: str, address: str, count: int) -> None:
    """Trace COUNT requests, one after the other."""
    with Stage() as stage, stage.cast() as cast:
        told = Told(stage.folder)
        where = {
            "BENCH_BROKER": stage.broker(broker),
            "BENCH_DATABASE": stage.database(),
            "BENCH_MARKS": told.path,
            "BENCH_STEPS": "1",
        }
        requester = cast.contestant("ours", **where)
        worker = cast.worker("ours", **where)
        requester.do("ask_slowly", 10, address, PAUSE)
        log = _log(stage.postgresql.host)
        _log_statements(where["BENCH_DATABASE"], on=True)
        told.lines.clear()
        begin = log.stat().st_size
        requester.do("ask_slowly", count, address, PAUSE)
        _log_statements(where["BENCH_DATABASE"], on=False)
        slots = {pid for word, pid, _ in told.lines if word == "delivery.received"}
        names = {requester.pid: "requester", **dict.fromkeys(slots, "worker's slot")}
        ports = _ports([requester.pid, *worker.host.pids])
        statements = Counter(
            (names.get(ports.get(port, 0), "relay beside the worker"), words)
            for port, words in _statements(log, begin)
        )
    click.echo(f"### {broker}, {address}, {count} requests\n")
    click.echo("| reached | by | ms after the request (median) |\n|---|---|---|")
    for (word, who), moments in steps(told.lines, names):
        click.echo(f"| `{word}` | {who} | {1000 * figures.median(moments):.1f} |")
    click.echo("\n| by | statement | for one request |\n|---|---|---|")
    for (who, words), times in sorted(statements.items(), key=lambda pair: (pair[0][0], -pair[1])):
        if times >= count / 10:
            click.echo(f"| {who} | `{words}` | {times / count:.2f} |")
    for who in sorted({who for who, _ in statements}):
        total = sum(times for (whose, _), times in statements.items() if whose == who)
        click.echo(f"| **{who}** | all | **{total / count:.1f}** |")


class Told:
    """The reports of the processes: step, process, time."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "road")
        self.lines: list[tuple[str, int, float]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        threading.Thread(target=self._hear, daemon=True).start()

    def _hear(self) -> None:
        while True:
            word, pid, moment = self._socket.recv(256).split()
            self.lines.append((word.decode(), int(pid), float(moment)))


def steps(
    lines: list[tuple[str, int, float]], names: dict[int, str]
) -> list[tuple[tuple[str, str], list[float]]]:
    """The seconds since the request, by step and process, in chronological order."""
    since: dict[tuple[str, str], list[float]] = defaultdict(list)
    begun = None
    for word, pid, moment in sorted(lines, key=lambda line: line[2]):
        if word == "asked":
            begun = moment
        elif begun is not None and pid in names:
            since[word, names[pid]].append(moment - begun)
    return sorted(since.items(), key=lambda pair: figures.median(pair[1]))


def _log(host: Host) -> Path:
    """The log of the server.

    Raises:
        SystemExit: the server runs elsewhere.
    """
    if isinstance(host, LocalProcess):
        return host.log
    raise SystemExit(
        "The statements are read from the log of a PostgreSQL of our own: unset "
        f"{PostgreSQL.variable}, and install {PostgreSQL.packages}."
    )


def _log_statements(url: str, *, on: bool) -> None:
    """Switch the logging of statements on or off."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"ALTER SYSTEM SET log_line_prefix = '{PREFIX}'"))
        connection.execute(text(f"ALTER SYSTEM SET log_statement = '{'all' if on else 'none'}'"))
        connection.execute(text("SELECT pg_reload_conf(), pg_sleep(0.3)"))
    engine.dispose()


def _statements(log: Path, begin: int) -> list[tuple[int, str]]:
    """Pairs (client port, beginning of the statement) logged from *begin* on."""
    with log.open() as lines:
        lines.seek(begin)
        found = (STATEMENT.match(line.rstrip()) for line in lines)
        return [(int(each["port"]), _short(each["words"])) for each in found if each]


def _short(words: str) -> str:
    """A statement without the parts that differ from call to call."""
    words = words.replace("eda_outbox.", "")
    short = re.sub(r"SELECT .* FROM", "SELECT … FROM", words)
    short = re.sub(r" (\(|VALUES|SET|WHERE).*", " …", short)
    return {";": "; (ping)"}.get(short.strip(), short.strip())[:60]


def _ports(pids: list[int]) -> dict[int, int]:
    """The owner of each local port."""
    return {
        each.laddr.port: pid
        for pid in pids
        if psutil.pid_exists(pid)
        for each in psutil.Process(pid).net_connections("tcp")
        if each.laddr
    }


if __name__ == "__main__":
    main()
