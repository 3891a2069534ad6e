"""Actions on dead letters: redrive, edit, skip and discard, by a person or a repairer.

A redrive sends the next revision of the same message, at the same position in the order of its key.
Each action and its entry in the audit trail share one transaction, so repeating an action, doing it
twice at the same time, or crashing in the middle is harmless.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection

from celery_eda.core.arguments import JSON, Arguments, as_json
from celery_eda.core.context import Capture
from celery_eda.core.identity import ORDER_HEADER, REPLAY_HEADER
from celery_eda.core.message import Message
from celery_eda.databases import LostRace
from celery_eda.dead_letters.audit import Action, Audit, AuditEntry, Author
from celery_eda.dead_letters.letter import Letter, LetterFilter, LetterState, Reason
from celery_eda.dead_letters.reduced import is_reduced, whole
from celery_eda.dead_letters.store import DeadLetterStore
from celery_eda.errors import NotItsTurn, UnreadableBody
from celery_eda.ordering import Cursors, Turn

#: Prefixes of the headers that a broker adds when it dead-letters or redelivers a message.
_OF_BROKERS = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count")
#: Headers that are reset when a message is sent again.
_RESET: Mapping[str, Any] = {"expires": None, "retries": 0}
#: The most letters in the history of a message.
LONGEST_HISTORY = 100


@dataclass(frozen=True)
class RepairResult:
    """The result of an action on a dead letter.

    Attributes:
        id: of the letter.
        state: its state now; None if there is no such letter.
        fresh: True if this call changed the letter; False if it was not open, and nothing was done.
    """

    id: int
    state: str | None
    fresh: bool


@dataclass(frozen=True)
class Repair:
    """Actions on the dead letters of one database, in a transaction of the caller.

    Each method uses the connection of the open *transaction*, which also captures the messages to
    send again: they are sent if and only if it commits. After an error the caller has to roll it
    back.
    """

    dead_letters: DeadLetterStore
    audit: Audit
    cursors: Cursors

    def redrive(
        self,
        transaction: Capture,
        id: int,
        author: Author,
        *,
        arguments: Arguments | None = None,
        out_of_order: bool = False,
        action: Action = Action.redrive,
    ) -> RepairResult:
        """Send the message of an open letter again, as its next revision.

        *arguments* replace those of the message; the letter keeps the old ones. If later messages
        of its key have taken effect already, the message is only sent with *out_of_order*: it
        takes effect after them, without a position.

        Raises:
            NotItsTurn: later messages of its key have taken effect already.
            UnreadableBody: *arguments* cannot be written into the body, or the letter is stored in
                reduced form and there are none.
        """
        connection = transaction.connection
        letter = self.dead_letters.find(connection, id, lock=True)
        if letter is None or not letter.is_open:
            return _already_closed(id, letter)
        if arguments is None and is_reduced(letter.message):
            raise UnreadableBody(
                f"Letter {id} has only the beginning of its body. Write all arguments again "
                "(`edit --args … --kwargs …`), or discard the letter."
            )
        message = self._at_its_position(connection, letter, out_of_order=out_of_order)
        detail: dict[str, Any] = {}
        if arguments is not None:
            message = whole(arguments.in_place_of(message))
            detail = {"args": list(arguments.args), "kwargs": dict(arguments.kwargs)}
        transaction.capture(next_revision(message))
        return self._close(connection, letter, LetterState.redriven, action, author, **detail)

    def edit(
        self,
        transaction: Capture,
        id: int,
        author: Author,
        *,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> RepairResult:
        """Change the arguments of an open letter; the audit trail keeps the old body.

        None leaves *args* or *kwargs* unchanged. An unreadable body is replaced by JSON if both
        are given.

        Raises:
            UnreadableBody: see :func:`edited`.
        """
        connection = transaction.connection
        letter = self.dead_letters.find(connection, id, lock=True)
        if letter is None or not letter.is_open:
            return _already_closed(id, letter)
        message = edited(letter, args, kwargs)
        self.dead_letters.change(connection, id, message)
        old = letter.message.body.decode(errors="backslashreplace")
        self.audit.add(connection, author, Action.edit, letter, body=old)
        return RepairResult(id, letter.state, fresh=True)

    def skip(self, transaction: Capture, id: int, author: Author) -> RepairResult:
        """Abandon the message that blocks its key; the next one of the key takes its turn.

        Raises:
            NotItsTurn: the message does not block its key.
        """
        connection = transaction.connection
        letter = self.dead_letters.find(connection, id, lock=True)
        if letter is None or not letter.is_open:
            return _already_closed(id, letter)
        position, consumer = letter.message.position, _consumer(letter)
        if position is None:
            raise NotItsTurn(f"Letter {id} has no ordering key, so it blocks nothing. Discard it.")
        if consumer is None:
            raise NotItsTurn(_never_sent(letter))
        cursor = self.cursors.find(connection, consumer, position.lane)
        match cursor.turn_of(position):
            case Turn.past:
                raise NotItsTurn(
                    f"Later messages of the key of letter {id} have taken effect already. Discard "
                    "it."
                )
            case Turn.later:
                raise NotItsTurn(
                    f"Letter {id} waits for others of its key {letter.key!r}. Redrive or skip "
                    "those first."
                )
        try:
            released = self.cursors.advance(connection, consumer, position, cursor)
        except LostRace as error:
            raise NotItsTurn(
                f"The key of letter {id} advanced at this very moment. Show the letter and decide "
                "again."
            ) from error
        if released:
            transaction.capture(released)
        return self._close(connection, letter, LetterState.skipped, Action.skip, author)

    def discard(
        self, transaction: Capture, id: int, author: Author, *, awaited: bool = False
    ) -> RepairResult:
        """Abandon a message that no other message waits for.

        With *awaited*, the turn of the message may still be to come. Later messages of its key then
        stay parked until they are repaired too.

        Raises:
            NotItsTurn: others of its key wait, or will wait, for the message.
        """
        connection = transaction.connection
        letter = self.dead_letters.find(connection, id, lock=True)
        if letter is None or not letter.is_open:
            return _already_closed(id, letter)
        if letter.message.position is not None:
            match self._turn(connection, letter):
                case Turn.now:
                    raise NotItsTurn(
                        f"Letter {id} blocks its key {letter.key!r}, and later messages of the key "
                        "would wait forever. Skip it instead."
                    )
                case Turn.later if not awaited and _consumer(letter) is None:
                    raise NotItsTurn(f"{_never_sent(letter)} Or discard it with `--awaited`.")
                case Turn.later if not awaited:
                    raise NotItsTurn(
                        f"Later messages of the key {letter.key!r} will wait for letter {id}. "
                        "Skip it when its turn has come, or discard it with `--awaited`."
                    )
        return self._close(connection, letter, LetterState.discarded, Action.discard, author)

    def history(self, connection: Connection, letter: Letter) -> tuple[Letter | AuditEntry, ...]:
        """Earlier letters of the same message, and the audit entries of all; oldest first."""
        message_id = letter.message.identity.id
        same = LetterFilter(message_id=message_id)
        letters = self.dead_letters.select(connection, same, LONGEST_HISTORY)
        earlier: list[Letter | AuditEntry] = [each for each in letters if each.id < letter.id]
        done = self.audit.of_message(connection, message_id)
        return tuple(sorted([*earlier, *done], key=lambda each: each.at))

    def _close(
        self,
        connection: Connection,
        letter: Letter,
        state: LetterState,
        action: Action,
        author: Author,
        **detail: Any,
    ) -> RepairResult:
        self.dead_letters.close(connection, letter.id, state)
        self.audit.add(connection, author, action, letter, **detail)
        return RepairResult(letter.id, state.value, fresh=True)

    def _at_its_position(
        self, connection: Connection, letter: Letter, *, out_of_order: bool
    ) -> Message:
        """The letter's message; without a position if that has passed or is malformed."""
        message = letter.message
        if message.position is not None and self._turn(connection, letter) is not Turn.past:
            return message
        if message.position is not None and not out_of_order:
            raise NotItsTurn(
                f"Later messages of the key {letter.key!r} have taken effect before letter "
                f"{letter.id}. Redrive it out of order (`--out-of-order`), to take effect after "
                "them, or discard it."
            )
        headers = {key: value for key, value in message.headers.items() if key != ORDER_HEADER}
        return replace(message, headers=headers)

    def _turn(self, connection: Connection, letter: Letter) -> Turn:
        """The turn of the letter at its consumer; ``later`` if it reached none."""
        position, consumer = letter.message.position, _consumer(letter)
        if position is None or consumer is None:
            return Turn.later
        return self.cursors.find(connection, consumer, position.lane).turn_of(position)


def edited(letter: Letter, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None) -> Message:
    """The letter's message with other arguments; None leaves *args* or *kwargs* unchanged.

    Raises:
        UnreadableBody: the old arguments cannot be read, and one of the two is None; or only other
            services can read them, so that callbacks in the body would be lost.
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
    return whole(new.in_place_of(message))


def in_order(letters: Iterable[Letter]) -> list[Letter]:
    """*letters* by id, except that those of one key follow each other in the order of the key."""
    letters = sorted(letters, key=lambda each: each.id)
    positions = {each.id: each.message.position for each in letters}
    first: dict[Any, int] = {}
    for each in letters:
        if position := positions[each.id]:
            first.setdefault((each.consumer, position.lane), each.id)

    def rank(letter: Letter) -> tuple[int, int, int, int]:
        if (position := positions[letter.id]) is None:
            return letter.id, 0, 0, letter.id
        lane = position.lane
        return first[letter.consumer, lane], position.epoch, position.number, letter.id

    return sorted(letters, key=rank)


def _already_closed(id: int, letter: Letter | None) -> RepairResult:
    return RepairResult(id, letter.state if letter else None, fresh=False)


def _consumer(letter: Letter) -> str | None:
    """The consumer whose cursor the letter's position refers to.

    None for a message that was never sent: its consumer belongs to some other service. A message
    that was refused unread was for the task of this service.
    """
    if letter.consumer is None and letter.reason == Reason.unsendable.value:
        return None
    return letter.consumer or letter.message.task or None


def _was_unreadable(letter: Letter) -> bool:
    """True if no consumer can have read the body: it is broken, or was refused unread."""
    refused = letter.consumer is None and letter.reason != Reason.unsendable.value
    message = letter.message
    return refused or (message.content_type == JSON and not message.headers.get("compression"))


def _never_sent(letter: Letter) -> str:
    return (
        f"Letter {letter.id} was never sent, and its consumer waits for it before all later ones "
        f"of its key {letter.key!r}. Redrive it once the broker accepts it, edited if need be."
    )


def next_revision(message: Message) -> Message:
    """The next revision of *message*: it does not expire, and its retries are counted from 0.

    The mark of a replay is removed too, so the handler may publish.
    """
    dropped = (*_OF_BROKERS, REPLAY_HEADER)
    headers = {
        name: value for name, value in message.headers.items() if not name.startswith(dropped)
    }
    headers |= {name: value for name, value in _RESET.items() if name in headers}
    # Properties of ours describe how the message was stored.
    kept = {
        name: value
        for name, value in message.properties.items()
        if name != "expiration" and not name.startswith("eda_")
    }
    return message.revised(headers=headers, properties=kept)
