"""Rebuilding a projection: a shadow table beside the live one, fed, compared and swapped in.

The shadow is another consumer of the events, with a cursor of its own for each key. It is fed from
the logs of the services that emitted the events. Meanwhile the live projection forwards each event
to the shadow, which applies the next one of a key, parks early ones and ignores those that were fed
already. A rebuild that was interrupted can be repeated. Projections cannot publish.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any
from uuid import UUID

from sqlalchemy import (
    JSON,
    ColumnElement,
    Connection,
    Engine,
    Select,
    Table,
    and_,
    cast,
    delete,
    func,
    insert,
    not_,
    select,
)
from sqlalchemy.exc import OperationalError

from celery_eda.core.arguments import Arguments
from celery_eda.core.event import Event
from celery_eda.core.identity import ORDER_HEADER, Lane, Position
from celery_eda.core.message import Message
from celery_eda.core.silence import silenced
from celery_eda.databases import LongText
from celery_eda.errors import InvalidEvent, RebuildError
from celery_eda.events.projections.projection import Projection, Values
from celery_eda.events.projections.shadows import Shadow, Shadows
from celery_eda.events.registry import EventRegistry
from celery_eda.events.replay import Replay
from celery_eda.events.subscriptions import Subscriptions
from celery_eda.ordering import Cursor, Cursors, Progress, Turn

#: Events to feed in one transaction.
AT_ONCE = 500
#: Keys of differing rows that a comparison reports.
EXAMPLES = 10


@dataclass(frozen=True)
class Difference:
    """The difference between a shadow and the live table.

    Attributes:
        missing: the number of rows that only the shadow has.
        extra: the number of rows that only the live table has.
        changed: the number of rows with the same key and other values.
        examples: keys of up to 10 such rows.
        behind: up to 10 keys of which the two have not handled the same events.
    """

    missing: int
    extra: int
    changed: int
    examples: tuple[Any, ...]
    behind: tuple[str, ...]

    @property
    def rows(self) -> int:
        """The number of rows that differ."""
        return self.missing + self.extra + self.changed


@dataclass(frozen=True)
class Rebuild:
    """Applies events to projections, and rebuilds projections."""

    engine: Engine
    shadows: Shadows
    subscriptions: Subscriptions
    registry: EventRegistry
    cursors: Cursors
    progress: Progress
    replay: Replay

    # ── one event ───────────────────────────────────────────────────────────────────────────

    def apply(self, connection: Connection, projection: Projection, event: Event) -> None:
        """Apply *event*, the next one of its key, to the live table and to a following shadow.

        An event that matches no pattern of the projection only advances the order of its key.
        """
        shadow = self.shadows.share(connection, projection.name)
        self._apply_to(projection.table, connection, projection, event)
        if shadow is Shadow.following:
            self._forward(connection, projection, event)

    def _apply_to(
        self, table: Table, connection: Connection, projection: Projection, event: Event
    ) -> None:
        """Write the row of *event* in *table*, if a pattern matches the event."""
        if self.subscriptions.known[projection.name].wants(event.type):
            key = projection.row_key(event)
            before = projection.read(connection, table, key)
            projection.write(connection, table, key, before, self._after(projection, before, event))

    def _after(self, projection: Projection, row: Values | None, event: Event) -> Values | None:
        """Return the row after *event*; the function cannot publish."""
        with silenced(f"The projection {projection.name}"):
            return projection(row, self.registry.restored(event))

    # ── the shadow ──────────────────────────────────────────────────────────────────────────

    def begin(self, projection: Projection, shadow: Shadow) -> None:
        """Create an empty shadow, in place of an existing one.

        From then on the live projection forwards its events to a *following* shadow.
        """
        self.discard(projection)
        with self.engine.begin() as connection:
            projection.shadow.create(connection)
        with self.engine.begin() as connection:
            self.shadows.lock(connection, projection.name)
            self.shadows.set(connection, projection.name, shadow)

    def discard(self, projection: Projection) -> None:
        """Drop the shadow. Idempotent."""
        with self.engine.begin() as connection:
            self.shadows.lock(connection, projection.name)
            self._unset(connection, projection)
        self._drop(projection)

    def feed(
        self, projection: Projection, events: Iterable[Event], skip: Collection[UUID] = ()
    ) -> Iterator[int]:
        """Apply *events* to the shadow, in transactions of 500 events.

        The shadow ignores events that it has already, so an interrupted feed can be repeated.

        Args:
            projection: whose shadow is fed.
            events: in the order of each key, from its beginning.
            skip: ids of events to leave out.

        Yields:
            After each transaction, the number of events so far.

        Raises:
            RebuildError: there is no shadow, an event is missing, or the projection fails.
        """
        given, number = iter(events), 0
        while batch := list(islice(given, AT_ONCE)):
            with self.engine.begin() as connection:
                self._require_shadow(connection, projection)
                self._feed(connection, projection, batch, skip)
            number += len(batch)
            yield number

    def compare(self, connection: Connection, projection: Projection) -> Difference:
        """Compare the shadow with the live table, which handles no event meanwhile.

        Raises:
            RebuildError: there is no shadow.
        """
        self.shadows.lock(connection, projection.name)
        self._require_shadow(connection, projection)
        live, shadow = projection.table, projection.shadow
        differing = not_(_same(shadow, live))
        queries = {
            "missing": _without(shadow, live),
            "extra": _without(live, shadow),
            "changed": select(shadow).join(live, _same_key(shadow, live)).where(differing),
        }
        examples: list[Any] = []
        (key_name,) = projection.table.primary_key.columns.keys()
        for query in queries.values():
            key, room = query.selected_columns[key_name], EXAMPLES - len(examples)
            examples += connection.scalars(query.with_only_columns(key).limit(room))
        return Difference(
            **{name: _count(connection, query) for name, query in queries.items()},
            examples=tuple(examples),
            behind=self.progress.differing_keys(
                connection, projection.name, projection.follower, EXAMPLES
            ),
        )

    def swap(self, projection: Projection) -> Difference:
        """Copy the shadow's rows into the live table, in one transaction, and drop the shadow.

        Returns:
            The difference before.

        Raises:
            RebuildError: there is no following shadow, or the two have not handled the same events.
                Nothing has changed; repeat the swap later.
        """
        live, shadow = projection.table, projection.shadow
        with self.engine.begin() as connection:
            if self.shadows.lock(connection, projection.name) is Shadow.frozen:
                raise RebuildError(
                    f"The shadow of {projection.name} is frozen in the past. Make one without --at."
                )
            difference = self.compare(connection, projection)
            if difference.behind:
                raise RebuildError(
                    f"{projection.name} and its shadow have not handled the same events, e.g. of "
                    f"{', '.join(difference.behind)}. Wait until the queue of the projection is "
                    "empty, redrive or discard its dead letters, then feed the shadow again."
                )
            same = select(1).where(_same_key(live, shadow), _same(live, shadow))
            connection.execute(delete(live).where(~same.correlate(live).exists()))
            names = [column.name for column in live.columns]
            connection.execute(insert(live).from_select(names, _without(shadow, live)))
            self._unset(connection, projection)
        self._drop(projection)
        return difference

    # ── steps ───────────────────────────────────────────────────────────────────────────────

    def _forward(self, connection: Connection, projection: Projection, event: Event) -> None:
        """Apply an event of the live table to the shadow too, or park it for the shadow."""
        position = _position(event)
        cursor = self.cursors.lock(connection, projection.follower, position.lane)
        match cursor.turn_of(position):
            case Turn.now:
                self._apply_to(projection.shadow, connection, projection, event)
                self._advance(connection, projection, position, cursor)
            case Turn.later:
                queue = self.subscriptions.name_of(self.subscriptions.known[projection.name])
                message = self.replay.message_to(queue, event)
                self.cursors.park(connection, projection.follower, position, message)

    def _feed(
        self,
        connection: Connection,
        projection: Projection,
        events: list[Event],
        skip: Collection[UUID],
    ) -> None:
        subscription = self.subscriptions.known[projection.name]
        lanes: defaultdict[Lane, list[Event]] = defaultdict(list)
        for event in events:
            if event.category in subscription.categories and event.key is not None:
                lanes[_position(event).lane].append(event)
        # Sorted: transactions that lock several keys lock them in one order, against deadlocks.
        for lane in sorted(lanes, key=lambda each: (each.source, each.scope, each.key)):
            cursor = locked = self.cursors.lock(connection, projection.follower, lane)
            fresh, last = [], None
            for event in lanes[lane]:
                position = _position(event)
                if cursor.turn_of(position) is Turn.past:
                    continue
                if cursor.turn_of(position) is Turn.later:
                    raise RebuildError(
                        f"Events of {event.stream} are missing before {event.type} {event.id}. "
                        "Export the whole category from its beginning, and keep the order."
                    )
                cursor, last = cursor.after(position), position
                if subscription.wants(event.type) and event.id not in skip:
                    fresh.append(event)
            if fresh:
                self._try(connection, projection, fresh)
            if last:
                self._advance(connection, projection, last, locked)

    def _try(self, connection: Connection, projection: Projection, events: list[Event]) -> None:
        """Apply *events* of one key to the shadow; an error names the event that failed."""
        reached, shadow = events[0], projection.shadow
        try:
            key = projection.row_key(reached)
            before = row = projection.read(connection, shadow, key)
            for reached in events:
                row = self._after(projection, row, reached)
            projection.write(connection, shadow, key, before, row)
        except OperationalError:
            raise  # an outage or a lost race of the database, not the fault of an event
        except Exception as error:
            raise RebuildError(
                f"{projection.name} fails with {reached.type} {reached.id} of {reached.stream}: "
                f"{type(error).__name__}: {error}. Correct the function, or --skip the event."
            ) from error

    def _advance(
        self, connection: Connection, projection: Projection, position: Position, cursor: Cursor
    ) -> None:
        """Advance the shadow to *position*, and apply the parked events that follow."""
        follower, lane = projection.follower, position.lane
        self.cursors.go_to(connection, follower, position, cursor)
        while message := cursor.parked and self.cursors.release(connection, follower, lane):
            event, cursor = _parked(message), self.cursors.lock(connection, follower, lane)
            self._apply_to(projection.shadow, connection, projection, event)
            self.cursors.go_to(connection, follower, _position(event), cursor)

    def _require_shadow(self, connection: Connection, projection: Projection) -> None:
        if self.shadows.find(connection, projection.name) is None:
            raise RebuildError(
                f"{projection.name} has no shadow. Make one with `eda projections rebuild`."
            )

    def _unset(self, connection: Connection, projection: Projection) -> None:
        """Record that the projection has no shadow any more."""
        self.cursors.delete(connection, projection.follower)
        self.shadows.set(connection, projection.name, None)

    def _drop(self, projection: Projection) -> None:
        with self.engine.begin() as connection:
            projection.shadow.drop(connection, checkfirst=True)


def _position(event: Event) -> Position:
    """The position of *event* in the order of its key.

    Raises:
        InvalidEvent: the event comes without its position.
    """
    if (position := Position.of_event(event)) is None:
        raise InvalidEvent(
            f"{event.type} {event.id} has no position in the order of its key. Use a log of "
            "`celery eda events export`."
        )
    return position


def _parked(message: Message) -> Event:
    """The event in a *message* that was parked for a shadow."""
    event = Event.of_cloud(Arguments.of(message).args[0])
    return replace(event, order=tuple(message.headers[ORDER_HEADER]))


def _same_key(one: Table, other: Table) -> ColumnElement[bool]:
    return and_(*(column == other.c[column.name] for column in one.primary_key))


def _same(one: Table, other: Table) -> ColumnElement[bool]:
    """True if two rows have equal values; NULL equals NULL."""
    pairs = [(_comparable(column), _comparable(other.c[column.name])) for column in one.columns]
    return and_(*(a.is_not_distinct_from(b) for a, b in pairs))


def _comparable(column: ColumnElement[Any]) -> ColumnElement[Any]:
    """*column* in a type that can be compared: PostgreSQL has no ``=`` for JSON."""
    return cast(column, LongText) if isinstance(column.type, JSON) else column


def _without(one: Table, other: Table) -> Select[Any]:
    """The rows of *one* whose keys the *other* does not have."""
    there = select(1).where(_same_key(one, other)).correlate(one).exists()
    return select(one).where(~there)


def _count(connection: Connection, query: Select[Any]) -> int:
    return connection.scalar(select(func.count()).select_from(query.subquery())) or 0
