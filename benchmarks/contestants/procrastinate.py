"""procrastinate: jobs in the database itself, deferred many at once and one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from procrastinate import App, SyncPsycopgConnector

from benchmarks.contestants.serving import PAYLOAD, environment, serve

url = environment("DATABASE").replace("+psycopg", "")
app = App(connector=SyncPsycopgConnector(conninfo=url))


@app.task(name="carry")
def carry(payload: str) -> None:
    """Carries about 1 KB, to nobody."""


def prepare() -> None:
    """Connect, and make its tables."""
    app.open()
    app.schema_manager.apply_schema()


def fill(count: int) -> None:
    """*count* jobs in one statement."""
    carry.batch_defer(*[{"payload": PAYLOAD}] * count)


VERBS: dict[str, Callable[..., Any]] = {each.__name__: each for each in (prepare, fill)}

if __name__ == "__main__":
    serve(VERBS)
