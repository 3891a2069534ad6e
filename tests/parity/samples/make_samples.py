"""Makes the samples in this folder. It was run with the package of commit 9d3097c.

To repeat that, in an empty folder with links to ``celery_eda`` of that commit and to ``tests`` of
this one: ``PYTHONPATH=. python -m tests.parity.samples.make_samples``. ``reading.py`` has to name
things as that commit does. Samples made with newer code prove nothing about older rows.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from kombu.transport import memory

from tests.parity.samples import reading, state
from tests.parity.samples.program import Shop
from tests.support.servers.postgresql import PostgreSQL
from tests.support.servers.rabbitmq import RabbitMQ
from tests.support.servers.redis import Redis


class RecordedShop(Shop):
    """Keeps every row that its outbox has ever had."""

    def __init__(self, broker: str, database: str) -> None:
        super().__init__(broker, database)
        self.outbox: dict[int, Any] = {}

    def send(self) -> None:
        (rows,) = state.rows(self, "eda_outbox").values()
        self.outbox |= {row["id"]: row for row in rows}
        super().send()


@contextmanager
def opened(kind: type[Shop], broker: str, database: str) -> Iterator[Any]:
    """A shop in a new database, with nothing in the memory of this process."""
    memory.Channel.queues.clear()
    memory.Transport.global_state.clear()
    shop = kind(broker, database)
    state.create(shop)
    yield shop
    shop.close()


def sample_states(name: str, broker: str, database: str) -> None:
    """Take a sample after each stage of the program."""
    with opened(Shop, broker, database) as shop:
        for moment in ("publish", "begin", "finish"):
            getattr(shop, moment)()
            state.save(f"{name}-{moment}", state.of(shop))


def sample_wire(name: str, broker: str, other: str, folder: Path) -> None:
    """Take a sample of all rows of an outbox, and of what comes to the *other* broker of them."""
    with opened(RecordedShop, broker, f"sqlite:///{folder / name}.db") as shop:
        for moment in ("publish", "begin", "finish"):
            getattr(shop, moment)()
        rows = {"eda_outbox": [row for _, row in sorted(shop.outbox.items())]}
    with opened(Shop, other, f"sqlite:///{folder / name}-sent.db") as shop:
        state.insert(shop, rows)
        shop.send()
    state.save(f"{name}-wire", {"rows": rows, "sent": state.waiting(other)})


def main() -> None:
    """Make all of them."""
    logging.disable(logging.CRITICAL)
    folder = Path(tempfile.mkdtemp(prefix="celery-eda-"))
    folder.chmod(0o755)
    with ExitStack() as servers:
        servers.callback(shutil.rmtree, folder)
        postgresql, rabbitmq, redis = (
            servers.enter_context(kind.find(folder)) for kind in (PostgreSQL, RabbitMQ, Redis)
        )
        databases = {
            "sqlite": f"sqlite:///{folder}/sqlite.db",
            "postgresql": postgresql.database("samples"),
        }
        for name, database in databases.items():
            sample_states(name, "memory://", database)
        database = f"sqlite:///{folder}/broker.db"
        sample_states("database-sqlite", f"eda+{database}", database)
        database = postgresql.database("broker")
        sample_states("database-postgresql", f"eda+{database}", database)
        sample_wire("rabbitmq", rabbitmq.vhost("samples"), rabbitmq.vhost("sent"), folder)
        sample_wire("redis", redis.database(1), redis.database(2), folder)
    state.save("names", reading.names(Shop("memory://", "sqlite://").eda))


if __name__ == "__main__":
    main()
