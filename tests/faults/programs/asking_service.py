"""A service that asks for quotes.

``python -m tests.faults.programs.asking_service ADDRESS FIRST LAST``

It asks in one transaction, prints the correlation ids once the requests have left (durable ones
at once), and waits for all replies. It has a database of its own beside the road's files, and no
worker; durable requests are those of the road itself.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

from celery import Celery
from sqlalchemy import func, select

from celery_eda import EDA
from celery_eda.databases import upgrade


def make(broker: str, folder: Any, **settings: Any) -> EDA:
    """The service; it sends right after the commit, and leaves the rest to a relay."""
    app = Celery("asker", broker=broker, set_as_current=False)
    app.conf.update(
        eda_database_url=f"sqlite:///{folder}/asker.db",
        eda_reply_expires=2.0,
        eda_request_timeout=60.0,
        task_default_queue=os.environ.get("ROAD_QUEUE", "road"),
    )
    app.conf.update(settings)
    eda = EDA(app)
    upgrade.upgrade(eda.databases.engine, eda.databases.tables)
    return eda


def ask(eda: EDA, number: int, seconds: float = 0.0, **options: Any) -> Any:
    return eda.request("road.quote", (number, seconds), **options)


def unsent(eda: EDA) -> int:
    with eda.databases.engine.connect() as connection:
        query = select(func.count()).select_from(eda.databases.tables.outbox)
        return connection.execute(query).scalar_one()


if __name__ == "__main__":
    address, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if address == "durable":
        from tests.faults.programs.order_system import eda
    else:
        eda = make(os.environ["ROAD_BROKER"], os.environ["ROAD_FOLDER"])
    threading.Thread(target=eda.outbox.relay().run, daemon=True).start()
    with eda.transaction():
        replies = [ask(eda, number, address=address) for number in range(first, last + 1)]
    while address != "durable" and unsent(eda):
        time.sleep(0.05)
    for reply in replies:
        print(reply.correlation_id, flush=True)  # noqa: T201  # for who waits for them
    print([reply.get() for reply in replies], flush=True)  # noqa: T201
