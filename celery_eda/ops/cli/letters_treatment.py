"""The treatment of chosen dead letters, one transaction each, and the report of its results."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import click
from sqlalchemy.exc import SQLAlchemyError

from celery_eda.app import EDA
from celery_eda.core import redaction
from celery_eda.core.context import Capture
from celery_eda.core.error_text import printable
from celery_eda.dead_letters import Author, LetterState, RepairResult
from celery_eda.errors import RepairError
from celery_eda.ops.cli.console import report
from celery_eda.outbox import join

Treatment = Callable[[Capture, int, Author], RepairResult]


@dataclass(frozen=True)
class Treated:
    """The result for one letter, with the *error* if it could not be treated."""

    result: RepairResult
    error: str | None = None

    def outcome(self, aim: LetterState) -> Literal["done", "already", "failed"]:
        """The result of a command whose letters should end in the state *aim*."""
        if self.error is None and self.result.fresh:
            return "done"
        if self.error is None and self.result.state == aim.value and aim is not LetterState.open:
            return "already"
        return "failed"

    @property
    def plain(self) -> dict[str, Any]:
        """The result as JSON values."""
        result = self.result
        return {
            "id": result.id,
            "state": result.state,
            "fresh": result.fresh,
            "error": self.error,
        }


def treat(
    eda: EDA,
    ids: Sequence[int],
    treatment: Treatment,
    aim: LetterState,
    author: Author,
    *,
    missing: Sequence[int] = (),
    rate: float | None = None,
    as_json: bool,
) -> None:
    """Treat each letter in a transaction of its own, then print the results."""
    for id in missing:
        click.echo(f"There is no letter {id} among the chosen ones.", err=True)
    results = []
    with _progress(ids, shown=not as_json) as progress:
        for id in _paced(progress, rate):
            treated = _treated(eda, treatment, id, author)
            results.append(treated)
            if not as_json and (treated.error or not treated.result.fresh):
                click.echo(printable(treated.error or refusal(treated.result)), err=True)
    tally = {"done": 0, "already": 0, "failed": len(missing)}
    for treated in results:
        tally[treated.outcome(aim)] += 1
    what = "edited" if aim is LetterState.open else aim.value
    report(
        {**tally, "letters": [each.plain for each in results]},
        f"{tally['done']} {what}, {tally['already']} already, {tally['failed']} failed",
        as_json=as_json,
    )
    if tally["failed"] or not ids:
        raise SystemExit(1)


def _treated(eda: EDA, treatment: Treatment, id: int, author: Author) -> Treated:
    try:
        with eda.databases.engine.begin() as connection:
            return Treated(treatment(join(connection, eda.outbox), id, author))
    except RepairError as error:
        return Treated(RepairResult(id, None, fresh=False), str(error))
    except SQLAlchemyError as error:
        # The transaction was rolled back; a repetition of the command treats the letter.
        reason = redaction.redact(f"Letter {id}: {error}")
        return Treated(RepairResult(id, None, fresh=False), reason)


def refusal(result: RepairResult) -> str:
    """A sentence that says why nothing was done."""
    if result.state is None:
        return f"There is no letter {result.id}."
    return f"Letter {result.id} is {result.state} already."


def _progress(ids: Sequence[int], *, shown: bool) -> AbstractContextManager[Iterable[int]]:
    """*ids*, with a progress bar on a terminal."""
    if shown and len(ids) > 1 and sys.stderr.isatty():
        return click.progressbar(ids, file=sys.stderr)
    return nullcontext(ids)


def _paced(ids: Iterable[int], seconds: float | None) -> Iterator[int]:
    """*ids*, at most one per *seconds*."""
    due = time.monotonic()
    for each in ids:
        if seconds:
            time.sleep(max(0.0, due - time.monotonic()))
            due = max(due, time.monotonic() - seconds) + seconds
        yield each
