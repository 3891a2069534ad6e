"""From an event to its row; and a projection made anew beside the one in use, compared, and put
in its place.

The shadow is one more consumer in the order of each key. It is fed from the log of the services
that emitted the events, and meanwhile the live projection hands it what it handles itself: in its
turn that takes effect, too early it is parked, and what the log had already is passed over.
Whatever dies can be begun again. Nothing can be published from a projection.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
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

from celery_eda import context
from celery_eda.arguments import Arguments
from celery_eda.column_types import LongText
from celery_eda.cursor import Cursor, Turn
from celery_eda.cursors import Cursors
from celery_eda.errors import InvalidEvent, RebuildError
from celery_eda.event import Event
from celery_eda.event_types import EventTypes
from celery_eda.identity import ORDER_HEADER, Lane, Position
from celery_eda.message import Message
from celery_eda.projections import Projection, Projections, Shadow, Values
from celery_eda.subscriptions import Subscriptions

#: Events that a shadow is fed with in one transaction.
AT_ONCE = 500
#: Keys that a comparison tells.
EXAMPLES = 10


@dataclass(frozen=True)
class Difference:
    """How a shadow differs from its projection.

    Attributes:
        missing: rows that only the shadow has.
        extra: rows that only the projection has.
        changed: rows that say something else.
        examples: keys of some of them.
        behind: keys in which one of them has handled more events than the other.
    """

    missing: int
    extra: int
    changed: int
    examples: tuple[Any, ...]
    behind: tuple[str, ...]

    @property
    def rows(self) -> int:
        """How many rows differ."""
        return self.missing + self.extra + self.changed


@dataclass(frozen=True)
class Projecting:
    """Makes rows of events.

    Attributes:
        addressed: makes the message with which an event comes to a subscription's queue.
    """

    engine: Engine
    projections: Projections
    subscriptions: Subscriptions
    types: EventTypes
    cursors: Cursors
    addressed: Callable[[str, Event], Message]

    # ── one event ───────────────────────────────────────────────────────────────────────────

    def take(self, connection: Connection, projection: Projection, event: Event) -> None:
        """Let *event*, at its turn, take effect in the live table, and in a shadow that follows.

        One that is not wanted only has its turn.
        """
        shadow = self.projections.share(connection, projection.name)
        self._apply(connection, projection, projection.table, event)
        if shadow is Shadow.following:
            self._hand_on(connection, projection, event)

    def _apply(
        self, connection: Connection, projection: Projection, table: Table, event: Event
    ) -> None:
        """Let *event* take effect in its row, if it is wanted."""
        if self.subscriptions.known[projection.name].wants(event.type):
            key = projection.row_key(event)
            before = projection.read(connection, table, key)
            projection.write(connection, table, key, before, self._after(projection, before, event))

    def _after(self, projection: Projection, row: Values | None, event: Event) -> Values | None:
        """What *event* makes of a *row*."""
        with context.silenced(f"The projection {projection.name}"):
            return projection(row, self.types.restored(event))

    # ── the shadow ──────────────────────────────────────────────────────────────────────────

    def begin(self, projection: Projection, shadow: Shadow) -> None:
        """Make an empty shadow, in place of one that there may be.

        From then on one that is *following* is told of what the live projection handles.
        """
        self.discard(projection)
        with self.engine.begin() as connection:
            projection.shadow.create(connection)
        with self.engine.begin() as connection:
            self.projections.lock(connection, projection.name)
            self.projections.note(connection, projection.name, shadow)

    def discard(self, projection: Projection) -> None:
        """Forget the shadow. Repeating it is harmless."""
        with self.engine.begin() as connection:
            self.projections.lock(connection, projection.name)
            self._forget(connection, projection)
        self._drop(projection)

    def feed(
        self, projection: Projection, events: Iterable[Event], skip: Collection[UUID] = ()
    ) -> Iterator[int]:
        """Let *events*, those of each key in their order, take effect in the shadow.

        What it has already is passed over, so that whoever was killed gives them all again. Those
        of *skip* have their turn without an effect.

        Returns:
            After each transaction, how many events were given so far.

        Raises:
            RebuildError: there is no shadow, events are missing before one, or the projection
                fails with one.
        """
        given, number = iter(events), 0
        while batch := list(islice(given, AT_ONCE)):
            with self.engine.begin() as connection:
                self._require_shadow(connection, projection)
                self._feed(connection, projection, batch, skip)
            number += len(batch)
            yield number

    def compare(self, connection: Connection, projection: Projection) -> Difference:
        """How the shadow differs from the live table, which nobody changes meanwhile.

        Raises:
            RebuildError: there is no shadow.
        """
        self.projections.lock(connection, projection.name)
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
            behind=self.cursors.differing_keys(
                connection, projection.name, projection.follower, EXAMPLES
            ),
        )

    def swap(self, projection: Projection) -> Difference:
        """Let the live table say what the shadow says, in one transaction, and forget the shadow.

        Returns:
            What was different.

        Raises:
            RebuildError: there is no shadow that follows, or one of them has handled events that
                the other has not: nothing was changed, and later it may succeed.
        """
        live, shadow = projection.table, projection.shadow
        with self.engine.begin() as connection:
            if self.projections.lock(connection, projection.name) is Shadow.frozen:
                raise RebuildError(
                    f"The shadow of {projection.name} is of the past. Make one without --at."
                )
            difference = self.compare(connection, projection)
            if difference.behind:
                raise RebuildError(
                    f"{projection.name} and its shadow have not handled the same events, e.g. of "
                    f"{', '.join(difference.behind)}. Wait until no message is left for "
                    "it, and see to its dead letters; then feed the shadow with a new log."
                )
            same = select(1).where(_same_key(live, shadow), _same(live, shadow))
            connection.execute(delete(live).where(~same.correlate(live).exists()))
            names = [column.name for column in live.columns]
            connection.execute(insert(live).from_select(names, _without(shadow, live)))
            self._forget(connection, projection)
        self._drop(projection)
        return difference

    # ── steps ───────────────────────────────────────────────────────────────────────────────

    def _hand_on(self, connection: Connection, projection: Projection, event: Event) -> None:
        """Give the shadow's consumer an event that the live one handles."""
        position = _place(event)
        cursor = self.cursors.lock(connection, projection.follower, position.lane)
        match cursor.turn_of(position):
            case Turn.now:
                self._apply(connection, projection, projection.shadow, event)
                self._advance(connection, projection, position, cursor)
            case Turn.later:
                queue = self.subscriptions.name_of(self.subscriptions.known[projection.name])
                message = self.addressed(queue, event)
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
                lanes[_place(event).lane].append(event)
        # In one order, like whoever else locks more than one.
        for lane in sorted(lanes, key=lambda each: (each.source, each.stream, each.key)):
            cursor = locked = self.cursors.lock(connection, projection.follower, lane)
            fresh, last = [], None
            for event in lanes[lane]:
                position = _place(event)
                if cursor.turn_of(position) is Turn.past:
                    continue
                if cursor.turn_of(position) is Turn.later:
                    raise RebuildError(
                        f"Events of {event.stream} are missing before {event.type} {event.id}. "
                        "Export the whole category, from its beginning and in its order."
                    )
                cursor, last = cursor.after(position), position
                if subscription.wants(event.type) and event.id not in skip:
                    fresh.append(event)
            if fresh:
                self._try(connection, projection, fresh)
            if last:
                self._advance(connection, projection, last, locked)

    def _try(self, connection: Connection, projection: Projection, events: list[Event]) -> None:
        """Let *events* of one key take effect in the shadow, and say with which one that fails."""
        reached, shadow = events[0], projection.shadow
        try:
            key = projection.row_key(reached)
            before = row = projection.read(connection, shadow, key)
            for reached in events:
                row = self._after(projection, row, reached)
            projection.write(connection, shadow, key, before, row)
        except OperationalError:
            raise  # the database is away, or let us lose a race: no event is to blame
        except Exception as error:
            raise RebuildError(
                f"{projection.name} fails with {reached.type} {reached.id} of {reached.stream}: "
                f"{type(error).__name__}: {error}. Mend it, or leave it out with --skip."
            ) from error

    def _advance(
        self, connection: Connection, projection: Projection, position: Position, cursor: Cursor
    ) -> None:
        """Note that the shadow has come to *position*, and let what was parked behind it follow."""
        follower, lane = projection.follower, position.lane
        self.cursors.go_to(connection, follower, position, cursor)
        while message := cursor.parked and self.cursors.release(connection, follower, lane):
            event, cursor = _parked(message), self.cursors.lock(connection, follower, lane)
            self._apply(connection, projection, projection.shadow, event)
            self.cursors.go_to(connection, follower, _place(event), cursor)

    def _require_shadow(self, connection: Connection, projection: Projection) -> None:
        if self.projections.find(connection, projection.name) is None:
            raise RebuildError(
                f"{projection.name} has no shadow. Make one with `eda projections rebuild`."
            )

    def _forget(self, connection: Connection, projection: Projection) -> None:
        self.cursors.forget(connection, projection.follower)
        self.projections.note(connection, projection.name, None)

    def _drop(self, projection: Projection) -> None:
        with self.engine.begin() as connection:
            projection.shadow.drop(connection, checkfirst=True)


def _place(event: Event) -> Position:
    """The place of *event* in the order of its key.

    Raises:
        InvalidEvent: nobody has told it.
    """
    if (position := Position.of_event(event)) is None:
        raise InvalidEvent(
            f"{event.type} {event.id} has no place in the order of its key. Take the log from "
            "`eda events export`."
        )
    return position


def _parked(message: Message) -> Event:
    """The event of a *message* that was parked for a shadow."""
    event = Event.of_cloud(Arguments.of(message).args[0])
    return replace(event, order=tuple(message.headers[ORDER_HEADER]))


def _same_key(one: Table, other: Table) -> ColumnElement[bool]:
    return and_(*(column == other.c[column.name] for column in one.primary_key))


def _same(one: Table, other: Table) -> ColumnElement[bool]:
    """Whether two rows say the same; two that say nothing do."""
    pairs = [(_comparable(column), _comparable(other.c[column.name])) for column in one.columns]
    return and_(*(a.is_not_distinct_from(b) for a, b in pairs))


def _comparable(column: ColumnElement[Any]) -> ColumnElement[Any]:
    """PostgreSQL compares no JSON."""
    return cast(column, LongText) if isinstance(column.type, JSON) else column


def _without(one: Table, other: Table) -> Select[Any]:
    """The rows of *one* whose keys are not in the *other*."""
    there = select(1).where(_same_key(one, other)).correlate(one).exists()
    return select(one).where(~there)


def _count(connection: Connection, query: Select[Any]) -> int:
    return connection.scalar(select(func.count()).select_from(query.subquery())) or 0
