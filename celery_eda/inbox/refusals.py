"""Messages that no task handles: each is stored whole as a dead letter, once.

A worker acknowledges such a message after its dead letter has been committed. A redelivery is
recognized by the contents of the message, from which its identity in the inbox is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any
from uuid import UUID, uuid5

from kombu.utils import json
from sqlalchemy import Engine

from celery_eda.brokers import dead_letter_exchange
from celery_eda.core.error_text import text_of
from celery_eda.core.event import EVENT_EXCHANGE
from celery_eda.core.identity import Identity
from celery_eda.core.inspection import measure, undecodable
from celery_eda.core.limits import LARGEST, NAME_LENGTH, fits
from celery_eda.core.message import PROPERTIES, Message, Wire
from celery_eda.dead_letters import DeadLetterStore, Reason
from celery_eda.errors import Malformed, TooLarge, Undecodable, WorkersLost
from celery_eda.inbox.store import InboxStore, Outcome
from celery_eda.outbox import Writer, Written
from celery_eda.requests import Responder

#: The consumer of refused messages in the inbox.
CONSUMER = "celery_eda.inspection"
#: The header or property that holds all the others as text, where JSON cannot represent them.
UNREADABLE_JSON = "eda_json"
#: Levels of nested lists and mappings that JSON can represent wherever it is written or read:
#: Python's own limit depends on the depth of the stack.
DEEPEST = 300
#: The property that holds the properties with which no message can be sent again.
OTHERS = "eda_others"

_GIVEN_UP = {
    dead_letter_exchange.DELIVERY_LIMIT: Reason.lost_worker,
    dead_letter_exchange.EXPIRED: Reason.expired,
}
_CONTENTS = UUID("0d0f2a52-4f0e-5a3e-8c1d-6a2f1d7d1b7c")
#: Headers that differ from one delivery of a message to the next.
_OF_DELIVERY = frozenset(["redelivered", "x-delivery-count", "x-acquired-count"])
#: Properties of the transport, and those that are stored in columns of their own.
_OF_TRANSPORT = frozenset(
    [
        "application_headers",
        "body_encoding",
        "content_encoding",
        "content_type",
        "delivery_info",
        "delivery_tag",
    ]
)


@dataclass(frozen=True)
class Refusal:
    """The reason why a message is not handled.

    Attributes:
        error: describes the reason without quoting the message.
    """

    reason: Reason
    error: Exception

    @classmethod
    def of(cls, error: Exception) -> Refusal:
        """The refusal of a message that raised *error* when it was inspected or decoded."""
        if isinstance(error, TooLarge):
            return cls(Reason.too_large, error)
        if isinstance(error, Undecodable):
            return cls(Reason.undecodable, error)
        if isinstance(error, Malformed):
            return cls(Reason.malformed, error)
        return cls(Reason.undecodable, undecodable(error))


@dataclass(frozen=True)
class RefusedMessage:
    """A message that may be acknowledged once its dead letter is stored.

    Attributes:
        letter: the message, as its dead letter stores it.
        consumer: its consumer in the inbox.
        identity: its identity in the inbox.
    """

    letter: Message
    refusal: Refusal
    consumer: str
    identity: Identity


@dataclass(frozen=True)
class Refusals:
    """Stores refused messages.

    Attributes:
        writer: writes the reply to a refused request.
    """

    engine: Engine
    inbox: InboxStore
    dead_letters: DeadLetterStore
    responder: Responder
    writer: Writer

    def dead_letter(self, refused: RefusedMessage) -> bool:
        """Write the dead letter of a message, unless the inbox has an outcome of it already.

        A request gets the error as its reply, in the same transaction.

        Returns:
            False if there is an outcome already. Either way the message may be acknowledged.
        """
        letter, refusal, consumer = refused.letter, refused.refusal, refused.consumer
        written: list[Written] = []
        with self.engine.begin() as connection:
            fresh = self.inbox.record_failure(connection, consumer, refused.identity, Outcome.dead)
            if fresh:
                self.dead_letters.add(
                    connection,
                    letter,
                    refusal.reason,
                    error=refusal.error,
                    attempts=1,
                    consumer=None if consumer == CONSUMER else consumer,
                )
                if reply := self.responder.refuse(letter, refusal.error):
                    written += self.writer.write(connection, reply)
        self.writer.dispatch(written)
        return fresh


def refused(message: Any, refusal: Refusal) -> RefusedMessage:
    """A *message* of kombu's that no task handles.

    Its identity is computed from its contents: two messages that are equal in every byte, including
    the delivery tag if the publisher gives one, count as copies of each other.
    """
    body, info = _bytes(message.body), message.delivery_info or {}
    names = [_name(each) for each in (message.content_type, message.content_encoding)]
    names += [_name(info.get(each)) for each in ("exchange", "routing_key")]
    headers, properties = storable(message.headers), storable(message.properties)
    others = {name: properties[name] for name in properties.keys() - PROPERTIES - _OF_TRANSPORT}
    kept = {name: properties[name] for name in PROPERTIES & properties.keys()}
    lasting = {name: headers[name] for name in headers.keys() - _OF_DELIVERY}
    tag = info.get("delivery_tag") or properties.get("delivery_tag")
    contents = _identity_of(body, *names, lasting, kept, others, tag if isinstance(tag, str) else 0)
    content_type, content_encoding, exchange, routing_key = names
    letter = Message(
        identity=_own_identity(message.headers) or contents,
        task=_name(headers.get("task")),
        body=body,
        content_type=content_type,
        content_encoding=content_encoding,
        headers=headers,
        properties={**kept, OTHERS: others} if others else kept,
        exchange=exchange,
        routing_key=routing_key,
    )
    return RefusedMessage(letter, refusal, CONSUMER, contents)


def given_up(message: Any) -> RefusedMessage:
    """A *message* of kombu's that a queue of the broker has given up.

    Its consumer and identity in the inbox are those of its task, since a worker may have recorded
    an outcome before the broker gave up.
    """
    why, exchange, routing_key = dead_letter_exchange.origin_of(message.headers)
    if exchange == EVENT_EXCHANGE:  # one subscription gave it up, the others did not
        exchange, routing_key = "", dead_letter_exchange.queue_in(message.headers)
    error = WorkersLost(f"the broker gave it up: {why}")
    kept = refused(message, Refusal(_GIVEN_UP.get(why, Reason.rejected), error))
    letter = replace(kept.letter, exchange=_name(exchange), routing_key=_name(routing_key))
    identity = _own_identity(message.headers) or _foreign_identity(message)
    if identity is None or not letter.task:
        return replace(kept, letter=letter)
    return RefusedMessage(replace(letter, identity=identity), kept.refusal, letter.task, identity)


def unread(payload: bytes, why: str = "not a message as kombu writes them") -> RefusedMessage:
    """A *payload* that cannot be read as a message at all."""
    identity = _identity_of(payload)
    letter = Message(identity, "", payload, "application/data", "binary", {}, {}, "", "")
    return RefusedMessage(letter, Refusal(Reason.malformed, Malformed(why)), CONSUMER, identity)


def in_any_case(read: Callable[[], RefusedMessage], message: Any) -> RefusedMessage:
    """The result of *read*; if that fails, *message* of kombu's by nothing but its body."""
    try:
        return read()
    except Exception as error:
        why = f"its headers and properties cannot be read: {type(error).__name__}"
        return unread(_bytes(message.body), why)


def storable(value: Any) -> dict[str, Any]:
    """Headers or properties as JSON can represent them, with nothing left out."""
    plain = _plain(value)
    with suppress(Exception):
        json.loads(json.dumps(plain))
        if isinstance(plain, dict) and measure(plain)[0] <= DEEPEST:
            return plain
    return {UNREADABLE_JSON: _text_of(plain)}


def _plain(value: Any) -> Any:
    """A copy of *value* with text for names and bytes for buffers; any depth will do."""
    whole = [value]
    todo: list[tuple[Any, Any]] = [(whole, 0)]
    while todo:
        container, slot = todo.pop()
        match container[slot]:
            case Mapping() as mapping:
                copy: Any = {_text(name): each for name, each in mapping.items()}
                todo.extend((copy, name) for name in copy)
            case list() | tuple() as items:
                copy = list(items)
                todo.extend((copy, position) for position in range(len(copy)))
            case bytearray() | memoryview() as buffer:
                copy = bytes(buffer)
            case item:
                copy = item
        container[slot] = copy
    return whole[0]


def _text_of(value: Any) -> str:
    """JSON of *value*, at any depth; a value that JSON lacks is written as its ``repr``."""
    text: list[str] = []
    todo: list[tuple[bool, Any]] = [(True, value)]
    while todo:
        is_value, each = todo.pop()
        if not is_value:
            text.append(each)
        elif isinstance(each, dict):
            todo.append((False, "}"))
            for position, (name, item) in reversed([*enumerate(each.items())]):
                todo += ((True, item), (False, f"{', ' if position else ''}{json.dumps(name)}: "))
            todo.append((False, "{"))
        elif isinstance(each, list):
            todo.append((False, "]"))
            for position, item in reversed([*enumerate(each)]):
                todo += ((True, item), (False, ", " if position else ""))
            todo.append((False, "["))
        else:
            text.append(_leaf(each))
    return "".join(text)


def _leaf(value: Any) -> str:
    try:
        return str(json.dumps(value))
    except TypeError:
        return str(json.dumps(repr(value)))


def _text(name: Any) -> str:
    return name.decode(errors="backslashreplace") if isinstance(name, bytes) else str(name)


def _bytes(body: Any) -> bytes:
    match body:
        case None:
            return b""
        case str():
            return body.encode(errors="surrogatepass")
        case _:
            return bytes(body)


def _name(value: Any) -> str:
    """*value* as text that fits into a column; the headers hold the rest."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else repr(value)
    return text_of(text[:NAME_LENGTH])[:NAME_LENGTH]


def _own_identity(headers: Any) -> Identity | None:
    try:
        return Identity.of_headers(headers)
    except (AttributeError, ValueError):
        return None


def _foreign_identity(message: Any) -> Identity | None:
    headers = message.headers
    retries, nesting = (headers.get(name) or 0 for name in ("retries", "replaced_task_nesting"))
    match headers.get("id"), retries, nesting:
        case str(task_id), int(), int() if fits(task_id) and 0 <= retries <= LARGEST:
            with suppress(LookupError, UnicodeError):  # of the encoding that the message names
                return Wire.of(message).foreign_identity
    return None


def _identity_of(body: bytes, *parts: Any) -> Identity:
    digest = sha256(sha256(body).digest())
    digest.update(json.dumps(parts, default_kwargs={"sort_keys": True}).encode())
    return Identity(uuid5(_CONTENTS, digest.hexdigest()))
