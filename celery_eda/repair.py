"""What can be done about a dead letter: redrive, edit, skip, discard; by a person or a repairer.

A redrive is the next revision of the same message, in the same place in its key's order. Each
letter is treated in one transaction, with its record in the audit: doing it twice, from two places
at once, or dying in the middle is harmless.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection

from celery_eda import joining
from celery_eda.arguments import JSON, Arguments, as_json
from celery_eda.audit import Action, Audit, Author, Entry
from celery_eda.cursors import Cursors, Turn
from celery_eda.dead_letters import DeadLetters, Filter, Letter, Reason, State
from celery_eda.dialects.base import LostRace
from celery_eda.errors import NotItsTurn, UnreadableBody
from celery_eda.identity import ORDER_HEADER, REPLAY_HEADER
from celery_eda.message import Message
from celery_eda.transaction import Store

#: What a broker writes into a message that it has put aside.
_OF_BROKERS = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count")
#: Headers that begin again when a message is sent again.
_BEGUN: Mapping[str, Any] = {"expires": None, "retries": 0}
#: Earlier letters of the same message that a repairer is shown.
LONGEST_HISTORY = 100


@dataclass(frozen=True)
class End:
    """What has become of a dead letter.

    Attributes:
        state: its state; None if there is no such letter.
        fresh: whether this very call did it. If not, the letter had its end already, and nothing
            was changed.
    """

    id: int
    state: str | None
    fresh: bool


@dataclass(frozen=True)
class Repair:
    """Treats the dead letters of one database, in the transaction of the caller's connection.

    What is sent again leaves if and only if that transaction commits. A refusal raises, and the
    transaction is to be rolled back.
    """

    dead_letters: DeadLetters
    audit: Audit
    cursors: Cursors
    store: Store

    def redrive(
        self,
        connection: Connection,
        id: int,
        author: Author,
        *,
        arguments: Arguments | None = None,
        out_of_order: bool = False,
        action: Action = Action.redrive,
    ) -> End:
        """Send the message of an open letter again, as its next revision.

        It goes with *arguments* instead of its own, if there are any; the letter keeps those that
        failed. If others of its key were let past it, it goes only *out_of_order*: it then takes
        effect after them, whenever it comes.

        Raises:
            NotItsTurn: its place in its key's order has passed.
            UnreadableBody: *arguments* cannot be written into its body.
        """
        letter = self.dead_letters.find(connection, id, lock=True)
        if letter is None or not letter.is_open:
            return _ended(id, letter)
        message = self._in_place(connection, letter, out_of_order=out_of_order)
        detail: dict[str, Any] = {}
        if arguments is not None:
            message = arguments.in_place_of(message)
            detail = {"args": list(arguments.args), "kwargs": dict(arguments.kwargs)}
        self._send(connection, afresh(message))
        return self._close(connection, letter, State.redriven, action, author, **detail)

    def edit(
        self,
        connection: Connection,
        id: int,
        author: Author,
        *,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> End:
        """Change the arguments of an open letter; the audit keeps the old body.

        Those that are None stay as they are. What nobody could read becomes JSON, if both are
        given.

        Raises:
            UnreadableBody: the old ones cannot be read and not both are given, or somebody else
                could read them, and what is to follow the task would be lost.
        """
        letter = self.dead_letters.find(connection, id, lock=True)
        if letter is None or not letter.is_open:
            return _ended(id, letter)
        message = edited(letter, args, kwargs)
        self.dead_letters.change(connection, id, message)
        old = letter.message.body.decode(errors="backslashreplace")
        self.audit.add(connection, author, Action.edit, letter, body=old)
        return End(id, letter.state, fresh=True)

    def skip(self, connection: Connection, id: int, author: Author) -> End:
        """Give up the message that holds its key, and let the next one take its turn.

        Raises:
            NotItsTurn: it does not hold its key.
        """
        letter = self.dead_letters.find(connection, id, lock=True)
        if letter is None or not letter.is_open:
            return _ended(id, letter)
        place, consumer = letter.message.place, _consumer(letter)
        if place is None:
            raise NotItsTurn(f"Letter {id} has no ordering key, so it holds up nobody. Discard it.")
        if consumer is None:
            raise NotItsTurn(_never_arrived(letter))
        cursor = self.cursors.find(connection, consumer, place.lane)
        match cursor.turn(place):
            case Turn.past:
                raise NotItsTurn(f"The key of letter {id} has gone on without it. Discard it.")
            case Turn.later:
                raise NotItsTurn(
                    f"Letter {id} waits for others of its key {place.lane.key!r}. Redrive or skip "
                    "those first."
                )
        try:
            released = self.cursors.advance(connection, consumer, place, cursor)
        except LostRace as error:
            raise NotItsTurn(f"The key of letter {id} moved on right now. Look again.") from error
        if released:
            self._send(connection, released)
        return self._close(connection, letter, State.skipped, Action.skip, author)

    def discard(
        self, connection: Connection, id: int, author: Author, *, awaited: bool = False
    ) -> End:
        """Give up a message that no other one waits for.

        With *awaited* also one that others of its key will wait for, whose turn has not come:
        should they ever come, somebody has to treat them too.

        Raises:
            NotItsTurn: others of its key wait for it.
        """
        letter = self.dead_letters.find(connection, id, lock=True)
        if letter is None or not letter.is_open:
            return _ended(id, letter)
        if letter.message.place is not None:
            match self._turn(connection, letter):
                case Turn.now:
                    raise NotItsTurn(
                        f"Letter {id} holds its key {letter.key!r}, and those behind it would "
                        "wait for ever. Skip it instead."
                    )
                case Turn.later if not awaited and _consumer(letter) is None:
                    raise NotItsTurn(f"{_never_arrived(letter)} Or discard it with `--awaited`.")
                case Turn.later if not awaited:
                    raise NotItsTurn(
                        f"Those behind letter {id} of its key {letter.key!r} will wait for it. "
                        "Skip it when its turn has come, or discard it with `--awaited`."
                    )
        return self._close(connection, letter, State.discarded, Action.discard, author)

    def history(self, connection: Connection, letter: Letter) -> tuple[Letter | Entry, ...]:
        """Earlier letters of the same message, and what was done to all of them; oldest first."""
        message_id = letter.message.identity.id
        same = Filter(message_id=message_id)
        letters = self.dead_letters.select(connection, same, LONGEST_HISTORY)
        earlier: list[Letter | Entry] = [each for each in letters if each.id < letter.id]
        done = self.audit.of_message(connection, message_id)
        return tuple(sorted([*earlier, *done], key=lambda each: each.at))

    def _close(
        self,
        connection: Connection,
        letter: Letter,
        state: State,
        action: Action,
        author: Author,
        **detail: Any,
    ) -> End:
        self.dead_letters.close(connection, letter.id, state)
        self.audit.add(connection, author, action, letter, **detail)
        return End(letter.id, state.value, fresh=True)

    def _send(self, connection: Connection, message: Message) -> None:
        joining.join(connection, self.store).capture(message)

    def _in_place(self, connection: Connection, letter: Letter, *, out_of_order: bool) -> Message:
        """The letter's message, without a place if that has passed or is malformed."""
        message = letter.message
        if message.place is not None and self._turn(connection, letter) is not Turn.past:
            return message
        if message.place is not None and not out_of_order:
            raise NotItsTurn(
                f"Others of its key {letter.key!r} were let past letter {letter.id}. Redrive it "
                "out of order (`--out-of-order`), to take effect after them, or discard it."
            )
        headers = {key: value for key, value in message.headers.items() if key != ORDER_HEADER}
        return replace(message, headers=headers)

    def _turn(self, connection: Connection, letter: Letter) -> Turn:
        """Whether it is its turn at its consumer; what never reached one is still to come."""
        place, consumer = letter.message.place, _consumer(letter)
        if place is None or consumer is None:
            return Turn.later
        return self.cursors.find(connection, consumer, place.lane).turn(place)


def edited(letter: Letter, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None) -> Message:
    """The letter's message with other arguments; those that are None stay.

    Raises:
        UnreadableBody: those that stay cannot be read, or what is to follow the task would be
            lost.
    """
    message = letter.message
    try:
        old = Arguments.of(message)
    except UnreadableBody:
        if args is None or kwargs is None or not _was_unreadable(letter):
            raise
        old, message = Arguments(), as_json(message)
    new = replace(
        old,
        args=old.args if args is None else tuple(args),
        kwargs=old.kwargs if kwargs is None else kwargs,
    )
    return new.in_place_of(message)


def in_order(letters: Iterable[Letter]) -> list[Letter]:
    """*letters* by their ids, but those of one key one after the other, in its order."""
    letters = sorted(letters, key=lambda each: each.id)
    places = {each.id: each.message.place for each in letters}
    first: dict[Any, int] = {}
    for each in letters:
        if place := places[each.id]:
            first.setdefault((each.consumer, place.lane), each.id)

    def rank(letter: Letter) -> tuple[int, int, int, int]:
        if (place := places[letter.id]) is None:
            return letter.id, 0, 0, letter.id
        return first[letter.consumer, place.lane], place.epoch, place.number, letter.id

    return sorted(letters, key=rank)


def _ended(id: int, letter: Letter | None) -> End:
    return End(id, letter.state if letter else None, fresh=False)


def _consumer(letter: Letter) -> str | None:
    """Whose cursor the letter's place is about; None if it was never sent: that may be anybody's.

    What was refused before its consumer saw it was still for the task of this service.
    """
    if letter.consumer is None and letter.reason == Reason.unsendable.value:
        return None
    return letter.consumer or letter.message.task or None


def _was_unreadable(letter: Letter) -> bool:
    """Whether nobody can have read its body: it is broken, or was refused unread."""
    refused = letter.consumer is None and letter.reason != Reason.unsendable.value
    message = letter.message
    return refused or (message.content_type == JSON and not message.headers.get("compression"))


def _never_arrived(letter: Letter) -> str:
    return (
        f"Letter {letter.id} has never left for its consumer, which waits for it before all others "
        f"of its key {letter.key!r}. Redrive it once the broker takes it, edited if need be."
    )


def afresh(message: Message) -> Message:
    """The next revision of *message*, which does not expire and has all its retries again.

    Of a replayed event too: whoever sends it again lets it publish.
    """
    left = (*_OF_BROKERS, REPLAY_HEADER)
    headers = {name: value for name, value in message.headers.items() if not name.startswith(left)}
    headers |= {name: value for name, value in _BEGUN.items() if name in headers}
    # Those of ours say how it was kept.
    kept = {
        name: value
        for name, value in message.properties.items()
        if name != "expiration" and not name.startswith("eda_")
    }
    return message.revised(headers=headers, properties=kept)
