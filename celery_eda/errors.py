"""Everything that can go wrong, in one tree; each error says what failed and what to do next.

EDAError
├── ConfigurationError          also Celery's ImproperlyConfigured
│   ├── UnknownSetting          a misspelt eda_* key
│   ├── UnsafeSetting           a combination that would lose or double messages
│   └── SchemaOutdated          tables missing or from another version
├── TransactionError
│   ├── AutocommitTransaction   there is no transaction to share
│   ├── TwoEngines              the outbox would commit apart from the work
│   ├── TwoSessions             cannot tell which open session a message belongs to
│   ├── OutsideTransaction      published outside, where the settings forbid it
│   ├── VersionConflict         somebody else has appended to the event stream
│   └── BrokenTransaction       a handler ended the transaction of its own message
├── RepairError                 a dead letter cannot be treated like that
│   ├── UnreadableBody          its arguments can be neither read nor changed here
│   └── NotItsTurn              others of its key would be lost, or overtaken
├── InvalidKey                  no ordering key; also ValueError
├── InvalidEvent                no event, name or pattern of one; also ValueError
├── ArchivedEvents              the first events of a stream have left the store
├── RebuildError                a projection cannot be made anew like that
├── PublishingForbidden         nothing may leave from here: a replay, or a projection
├── OutOfSequence               why a message whose turn has passed is a dead letter
├── RequestError
│   ├── RequestTimeout          no reply came in time; also TimeoutError
│   ├── UnsentRequest           waiting for the reply to what is not committed yet
│   ├── UnknownRequest          nobody here asked for such a reply
│   └── RemoteError             what the responder failed with, if its type is not known here
├── SagaError                   a saga cannot be begun, or treated like that
├── SagaTimeout                 why a step or a wait of a saga has failed; also TimeoutError
├── NoDelivery                  asked for the delivery's session outside a reliable task
├── NoNextAttempt               a handler raised Retry by itself
├── Malformed                   why a message is not handled; also ValueError
│   ├── TooLarge
│   └── Undecodable
├── TimeLimit                   why a message that overruns its hard limit is a dead letter
├── Unwanted                    a message is expired or revoked
└── WorkersLost                 why a message that ends its workers is a dead letter
"""

from __future__ import annotations

from celery.exceptions import ImproperlyConfigured


class EDAError(Exception):
    """Base of every error that celery_eda raises itself."""


class ConfigurationError(EDAError, ImproperlyConfigured):
    """The app cannot keep the promise as it is configured."""


class UnknownSetting(ConfigurationError):
    """A key begins with ``eda_`` but names no setting."""


class UnsafeSetting(ConfigurationError):
    """A setting, or a combination of settings, would lose or double messages."""


class SchemaOutdated(ConfigurationError):
    """The tables are missing or belong to another version."""


class TransactionError(EDAError):
    """A message cannot share the fate of the transaction it was published in."""


class AutocommitTransaction(TransactionError):
    """The connection commits every statement by itself."""


class TwoEngines(TransactionError):
    """The session's work and the outbox would be committed one after the other."""


class TwoSessions(TransactionError):
    """More than one attached session is open, so the message's transaction is unclear."""


class OutsideTransaction(TransactionError):
    """A message was published outside any transaction, and ``eda_outside`` is ``raise``."""


class BrokenTransaction(TransactionError):
    """A handler's work would not be committed together with the record that it was done."""


class VersionConflict(TransactionError):
    """A stream of events is not at the version that was expected; nothing may be committed.

    Attributes:
        stream, expected, actual: its name, and the versions.
    """

    def __init__(self, stream: str, expected: int, actual: int) -> None:
        super().__init__(
            f"The stream {stream} is at version {actual}, not {expected}: somebody else has "
            "appended to it. Roll back, read it again and decide anew."
        )
        self.stream, self.expected, self.actual = stream, expected, actual


class RepairError(EDAError):
    """A dead letter cannot be treated as was asked; nothing was changed."""


class UnreadableBody(RepairError):
    """The arguments of a dead letter can be neither read nor changed here."""


class NotItsTurn(RepairError):
    """The order of a key forbids what was asked."""


class InvalidKey(EDAError, ValueError):
    """What was given cannot be the ordering key of a message."""


class InvalidEvent(EDAError, ValueError):
    """What was given is no event, or no name, pattern or data of one."""


class ArchivedEvents(EDAError):
    """Events that a fold begins with were archived; there is no state to be told.

    Attributes:
        stream, version: its name, and the first version that is not there.
    """

    def __init__(self, stream: str, version: int) -> None:
        super().__init__(
            f"Event {version} of {stream} has left the store, so its state cannot be folded from "
            "there. Fold with the snapshot of a later version, or from the archive."
        )
        self.stream, self.version = stream, version


class RebuildError(EDAError):
    """A projection cannot be made anew, compared or exchanged like that; nothing was changed."""


class PublishingForbidden(EDAError):
    """Something was published from where nothing may leave: a replay, or a projection."""


class OutOfSequence(EDAError):
    """A message came although another has taken its place, and it is no copy."""


class RequestError(EDAError):
    """A request has no result."""


class RequestTimeout(RequestError, TimeoutError):
    """No reply came in time. One that comes later is dropped, unless the request is durable."""


class UnsentRequest(RequestError):
    """The reply was waited for inside the transaction that still holds the request."""


class UnknownRequest(RequestError):
    """There is no durable request with this correlation id in this database."""


class RemoteError(RequestError):
    """What the responder failed with.

    Attributes:
        type: name of the error's class there.
        message: its text, bounded and without what looked like a secret.
        traceback: lines of the responder's code, if it told.
    """

    def __init__(self, type: str, message: str, traceback: str | None = None) -> None:
        super().__init__(type, message, traceback)
        self.type = type
        self.message = message
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{self.type}: {self.message}"


class SagaError(EDAError):
    """A saga cannot be begun, or treated as was asked; nothing was changed."""


class SagaTimeout(EDAError, TimeoutError):
    """The time of a step, or of a wait, was over."""


class NoDelivery(EDAError):
    """The session of the message in progress was asked for while none is in progress."""


class NoNextAttempt(EDAError):
    """A handler raised ``Retry`` although it had not published another attempt."""


class Malformed(EDAError, ValueError):
    """A part of a message is not what it has to be; its words quote nothing of the message."""


class TooLarge(Malformed):
    """A message, or a part of it, is larger than the settings allow."""


class Undecodable(Malformed):
    """The body of a message cannot be restored, decoded, or may not be."""


class TimeLimit(EDAError):
    """A message overran its hard time limit each time that it was delivered."""


class Unwanted(EDAError):
    """A message is not to be handled any more: it is ``expired`` or ``revoked``."""


class WorkersLost(EDAError):
    """A message was delivered again and again, and no worker came to an end with it."""
