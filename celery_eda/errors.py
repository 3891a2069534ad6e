"""Everything that can go wrong, in one tree; each error says what failed and what to do next.

EDAError
├── ConfigurationError          also Celery's ImproperlyConfigured
│   ├── UnknownSetting          a misspelt eda_* key
│   ├── UnsafeSetting           a combination that would lose or double messages
│   ├── NameTaken               a service with another database has the same name
│   ├── UnsafeQueue             a reliable task is called by way of a queue that would lose it
│   └── SchemaOutdated          tables missing or from another version
├── TransactionError
│   ├── AutocommitTransaction   there is no transaction to share
│   ├── TwoEngines              the outbox would not commit together with the work
│   ├── TwoSessions             cannot tell which open session a message belongs to
│   ├── OtherBroker             called with a connection to another broker than the app's
│   ├── UncommittedCall         waiting for the result of a call that is not committed yet
│   ├── OutsideTransaction      published outside, where the settings forbid it
│   ├── StatementTooLarge       more than the server accepts at once
│   ├── VersionConflict         another transaction has appended to the event stream
│   └── BrokenTransaction       a handler ended the transaction of its own message
├── RepairError                 a dead letter cannot be treated like that
│   ├── UnreadableBody          its arguments can be neither read nor changed here
│   └── NotItsTurn              other messages of its key would be lost or overtaken
├── InvalidKey                  no ordering key; also ValueError
├── InvalidEvent                no event, name or pattern of one; also ValueError
├── ArchivedEvents              the first events of a stream have left the store
├── RebuildError                a projection cannot be rebuilt like that
├── PublishingForbidden         nothing may leave from here: a replay, or a projection
├── OutOfSequence               why a message whose turn has passed is a dead letter
├── RequestError
│   ├── RequestTimeout          no reply came in time; also TimeoutError
│   ├── UnsentRequest           waiting for the reply to what is not committed yet
│   ├── UnknownRequest          no such durable request in this database
│   └── RemoteError             the responder's error, if its type is not known here
├── SagaError                   a saga cannot be started or changed like that
├── SagaTimeout                 why a step or a wait of a saga has failed; also TimeoutError
├── NoDelivery                  asked for the delivery's session outside a reliable task
├── NoNextAttempt               a handler raised Retry by itself
├── Interrupted                 a handler ended with what is no Exception
├── Unprintable                 instead of an error whose own methods fail
├── NotDelivered                why a message is redelivered that Celery gave to no task
├── Malformed                   why a message is not handled; also ValueError
│   ├── TooLarge
│   └── Undecodable
├── TimeLimit                   why a message that overruns its hard limit is a dead letter
├── TransactionTimeout          why one is whose transactions were idle for too long
├── Unwanted                    a message is expired or revoked
└── WorkersLost                 why a message that ends its workers is a dead letter
"""

from __future__ import annotations

from celery.exceptions import ImproperlyConfigured


class EDAError(Exception):
    """Base of every error that celery_eda raises itself."""


class ConfigurationError(EDAError, ImproperlyConfigured):
    """The configuration of the app would break a guarantee."""


class UnknownSetting(ConfigurationError):
    """A key begins with ``eda_`` but names no setting."""


class UnsafeSetting(ConfigurationError):
    """A setting, or a combination of settings, would lose or double messages."""


class NameTaken(ConfigurationError):
    """Workers with another database use the name of this service on the same broker."""


class UnsafeQueue(ConfigurationError):
    """A reliable task is called by way of a queue in which its message would not take effect once.

    That is a queue with ``no_ack``, which loses it, or a broadcast, of whose copies one takes
    effect.
    """


class SchemaOutdated(ConfigurationError):
    """The tables are missing or belong to another version."""


class TransactionError(EDAError):
    """A message cannot be committed together with the transaction it was published in."""


class AutocommitTransaction(TransactionError):
    """The connection commits every statement by itself."""


class TwoEngines(TransactionError):
    """The session and the outbox use two engines, so they cannot commit atomically."""


class TwoSessions(TransactionError):
    """More than one attached session is open, so the message's transaction is ambiguous."""


class OtherBroker(TransactionError):
    """A call names a connection or producer to another broker than the app's."""


class UncommittedCall(TransactionError):
    """The caller waits for a result inside the transaction that has yet to commit the call."""


class OutsideTransaction(TransactionError):
    """A message was published outside any transaction, and ``eda_outside`` is ``raise``."""


class BrokenTransaction(TransactionError):
    """A handler's work would not be committed together with its inbox row."""


class StatementTooLarge(TransactionError):
    """A statement is larger than the database accepts; a repetition would fail too."""


class VersionConflict(TransactionError):
    """An event stream is not at the expected version; the transaction must be rolled back.

    Attributes:
        stream, expected, actual: its name, and the versions.
    """

    def __init__(self, stream: str, expected: int, actual: int) -> None:
        super().__init__(
            f"The stream {stream} is at version {actual}, not {expected}: another transaction "
            "has appended events. Roll back, read the stream again and repeat the decision."
        )
        self.stream, self.expected, self.actual = stream, expected, actual


class RepairError(EDAError):
    """A repair of a dead letter was refused; nothing was changed."""


class UnreadableBody(RepairError):
    """The arguments of a dead letter can be neither read nor changed here."""


class NotItsTurn(RepairError):
    """The order of the message's key forbids the repair."""


class InvalidKey(EDAError, ValueError):
    """A value cannot be the ordering key of a message."""


class InvalidEvent(EDAError, ValueError):
    """A value is not an event, or not the name, pattern or data of one."""


class ArchivedEvents(EDAError):
    """The first events of a fold were archived, so its state is unknown.

    Attributes:
        stream, version: its name, and the first missing version.
    """

    def __init__(self, stream: str, version: int) -> None:
        super().__init__(
            f"Event {version} of {stream} has left the store, so its state cannot be folded from "
            "there. Fold with the snapshot of a later version, or from the archive."
        )
        self.stream, self.version = stream, version


class RebuildError(EDAError):
    """A projection cannot be rebuilt, compared or switched like that; nothing was changed."""


class PublishingForbidden(EDAError):
    """Code that must not publish, a replay or a projection, has published."""


class OutOfSequence(EDAError):
    """A message arrived after a later one of its key was handled, and is not a copy."""


class RequestError(EDAError):
    """A request did not return a result."""


class RequestTimeout(RequestError, TimeoutError):
    """No reply arrived in time. A later one is dropped, unless the request is durable."""


class UnsentRequest(RequestError):
    """The caller waits for a reply inside the transaction that has yet to commit the request."""


class UnknownRequest(RequestError):
    """There is no durable request with this correlation id in this database."""


class RemoteError(RequestError):
    """The error with which the responder failed.

    Attributes:
        type: name of the error's class there.
        message: its text, bounded and with secrets redacted.
        traceback: lines of the responder's code, if it sent them.
    """

    def __init__(self, type: str, message: str, traceback: str | None = None) -> None:
        super().__init__(type, message, traceback)
        self.type = type
        self.message = message
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{self.type}: {self.message}"


class SagaError(EDAError):
    """A saga cannot be started or changed like that; nothing was changed."""


class SagaTimeout(EDAError, TimeoutError):
    """The time limit of a step or of a wait has passed."""


class NoDelivery(EDAError):
    """The delivery's session was requested while no message is being handled."""


class NotDelivered(EDAError):
    """Celery did not call the task of a message, so the broker redelivers the message."""


class NoNextAttempt(EDAError):
    """A handler raised ``Retry`` although it had not published another attempt."""


class Interrupted(EDAError):
    """A handler ended with what is no ``Exception``, such as ``asyncio.CancelledError``.

    That is the ``__cause__``. Retry policies and repairers get this error instead.
    """


class Unprintable(EDAError):
    """Celery gets this error instead of one that it could not print, compare or send."""


class Malformed(EDAError, ValueError):
    """A part of a message is malformed; the text never quotes the message."""


class TooLarge(Malformed):
    """A message, or a part of it, is larger than the settings allow."""


class Undecodable(Malformed):
    """The body of a message cannot be decompressed or decoded, or must not be."""


class TimeLimit(EDAError):
    """A message exceeded its hard time limit at each delivery."""


class TransactionTimeout(EDAError):
    """The database ended the transaction of each delivery of a message, because it was idle."""


class Unwanted(EDAError):
    """A message must not be handled any more: it is ``expired`` or ``revoked``."""


class WorkersLost(EDAError):
    """A message was redelivered too often: each worker was lost while handling it."""
