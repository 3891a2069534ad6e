"""Every ``eda_*`` setting: its type, its default and its effect.

Settings are ordinary Celery options: ``app.conf.eda_relay_batch``, ``CELERY_EDA_RELAY_BATCH``
through a namespace, ``eda.relay_batch=100`` on the worker's command line.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar

from celery.app import defaults

from celery_eda.errors import ConfigurationError, UnknownSetting, UnsafeSetting

T = TypeVar("T")
PREFIX = "eda_"


HOUR = 3600.0
DAY = 24 * HOUR


def option(
    default: T,
    doc: str,
    *,
    choices: tuple[Any, ...] = (),
    least: float = 0,
    optional: bool = False,
    secret: bool = False,
) -> T:
    """A dataclass field that is also a Celery option.

    With *optional*, None is allowed. The value of a *secret* is not in the ``repr`` of settings.
    """
    metadata = {"doc": doc, "choices": choices, "least": least, "optional": optional}
    value: T = field(default=default, metadata=metadata, repr=not secret)
    return value


@dataclass(frozen=True)
class Settings:
    """The settings of one app, checked."""

    database_url: str | None = option(
        None,
        "SQLAlchemy URL of the service's own database: outbox, inbox and dead letters.",
        secret=True,
    )
    service: str | None = option(
        None,
        "Name of this service, by which other services know the order of its messages; by default "
        "the name of the Celery app. It must never change.",
    )
    schema: str | None = option(None, "Database schema of the tables; None for the default one.")
    table_prefix: str = option("eda_", "Beginning of the names of the tables.")
    tasks: tuple[str, ...] = option(
        (), "Patterns of task names, e.g. `orders.*`: such tasks are reliable without `@eda.task`."
    )
    outside: str | None = option(
        None,
        "Effect of publishing outside a transaction: `store` (in a short transaction of its own), "
        "`send` (straight to the broker, as plain Celery does) or `raise`. By default, messages of "
        "reliable tasks are stored and all others are sent.",
        choices=(None, "store", "send", "raise"),
    )
    send_after_commit: bool = option(
        True,
        "True: the committing process sends its messages itself, on a background thread, and the "
        "relay sends only messages left over by a crash or an outage.",
    )
    embedded_relay: bool = option(
        True, "True: every worker runs a relay beside its pool. False: run relays separately."
    )
    relay_batch: int = option(500, "Messages that a relay claims and sends in one batch.", least=1)
    relay_poll: float = option(
        0.1, "Maximum seconds between two polls of an empty outbox.", least=0.001
    )
    publish_timeout: float = option(
        10.0, "Seconds to wait for the broker's confirmation of a batch.", least=0.1
    )
    transaction_timeout: float = option(
        600.0,
        "Seconds that a handler's transaction may be idle before the database ends it and the "
        "message is handled again.",
        least=1,
    )
    claim_timeout: float = option(
        30.0,
        "Seconds after which other relays may claim the rows of a relay that hangs. Must be longer "
        "than `eda_publish_timeout`.",
        least=1,
    )
    retry_delay: float = option(
        1.0,
        "Seconds before a message that the broker refused is sent again; doubled each time.",
        least=0.01,
    )
    retry_delay_max: float = option(300.0, "The longest such delay, in seconds.", least=0.01)
    max_attempts: int = option(
        20, "Refusals by the broker after which a message becomes a dead letter.", least=1
    )
    max_deliveries: int = option(
        5,
        "Redeliveries of one message, each after a lost worker, before it becomes a dead letter.",
        least=1,
    )
    repair_queue: str | None = option(
        None,
        "Queue of the tasks that `@eda.repairs` creates; workers without `-Q` consume from it. By "
        "default `eda.repair.<service>`. Two services must not share one.",
    )
    max_repairs: int = option(
        3, "Automatic repairs of one message; after them, only a person can repair it."
    )
    retry_policy: str | Callable[[int, Exception], float | None] | None = option(  # noqa: RUF009  # it makes a field
        None,
        "Retry policy of tasks without a `policy` of their own: a callable, or its `module:name`. "
        "None retries nothing, as Celery does.",
    )
    reply_address: str = option(
        "correlation",
        "Default way of replies to requests: `correlation` (over one queue of this process), "
        "`temporary` (over a queue for each request) or `durable` (into this service's database).",
        choices=("correlation", "temporary", "durable"),
    )
    reply_expires: float = option(
        60.0,
        "Seconds that a reply queue survives without its process, or without the broker.",
        least=1,
    )
    request_timeout: float = option(30.0, "Default seconds to wait for a reply.", least=0.001)
    outage_patience: float = option(
        30.0,
        "Seconds that a worker retries a message while the database is unavailable or busy, before "
        "it requeues the message.",
    )
    delivery_limit: int = option(
        0,
        "Deliveries after which RabbitMQ dead-letters a message of a quorum queue, and a worker "
        "stores it as a dead letter; 0 for no limit. Must be more than `eda_max_deliveries`. "
        "Redeliveries during an outage of the database count too. Queues declared without the "
        "limit have to be deleted first.",
    )
    max_message_bytes: int = option(
        4 * 2**20,
        "Maximum bytes of a message's body, and of its headers. A larger message becomes a dead "
        "letter.",
        least=1024,
    )
    max_decompressed_bytes: int = option(
        4 * 2**20,
        "Maximum bytes of a compressed body after decompression, which stops there.",
        least=1024,
    )
    max_nesting: int = option(
        200,
        "Maximum levels of nested lists and mappings in a body or in headers.",
        least=8,
    )
    max_items: int = option(
        250_000,
        "Maximum number of values in a JSON body: decoded, each takes up to 60 times as many bytes "
        "as in the body.",
        least=1000,
    )

    inbox_retention: float | None = option(
        14 * DAY,
        "Seconds for which the inbox remembers a handled message. None: forever.",
        optional=True,
    )
    dead_letter_retention: float | None = option(
        90 * DAY,
        "Seconds for which a closed dead letter is stored. None: forever. Open ones always are.",
        optional=True,
    )
    audit_retention: float | None = option(
        365 * DAY,
        "Seconds for which the audit trail of dead letters is stored. None: forever.",
        optional=True,
    )
    request_retention: float | None = option(
        14 * DAY,
        "Seconds for which a durable request and its reply are stored. None: forever.",
        optional=True,
    )
    saga_retention: float | None = option(
        90 * DAY,
        "Seconds for which a saga and its history are stored after its end. None: forever. "
        "Afterwards the same id can be used again.",
        optional=True,
    )
    redelivery_horizon: float = option(
        DAY,
        "Maximum seconds before a broker delivers or redelivers a copy of a message: its "
        "visibility timeout plus the longest time without any worker.",
        least=HOUR,
    )
    order_patience: float = option(
        600.0,
        "Seconds after which the log warns of a key whose messages wait for one that has not come.",
        least=1,
    )
    housekeeping_interval: float = option(
        60.0,
        "Seconds between two rounds of a relay's housekeeping, which deletes rows older than their "
        "retention, and sends forgotten parked messages again.",
        least=0.1,
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            _check(setting.name, getattr(self, setting.name), setting.metadata)
        if self.claim_timeout <= self.publish_timeout:
            raise UnsafeSetting(
                f"eda_claim_timeout ({self.claim_timeout} s) must be longer than "
                f"eda_publish_timeout ({self.publish_timeout} s): a relay that still waits for "
                "confirms would lose its claim, and every slow batch would be sent twice. "
                "Raise eda_claim_timeout."
            )
        if 0 < self.delivery_limit <= self.max_deliveries:
            raise UnsafeSetting(
                f"eda_delivery_limit ({self.delivery_limit}) must be more than eda_max_deliveries "
                f"({self.max_deliveries}): the broker would give up before the worker does, which "
                "knows why. Raise eda_delivery_limit, or set it to 0."
            )
        self.check_retention()

    @property
    def longest_return(self) -> float:
        """Seconds after which no copy of a handled message can arrive any more."""
        return self.max_attempts * self.retry_delay_max + self.redelivery_horizon

    def check_retention(self) -> None:
        """Refuse retention times that would delete rows still needed.

        The inbox must remember an attempt for as long as a copy of it may arrive: a relay resends
        a message while the broker refuses it (``eda_max_attempts`` times at most
        ``eda_retry_delay_max``), and the broker delivers it within ``eda_redelivery_horizon``::

            inbox retention ≥ max attempts × longest retry delay + redelivery horizon

        The time that a message spends in the outbox, parked, or as a dead letter needs no term:
        housekeeping spares its inbox rows meanwhile. A closed dead letter is stored for its
        retention after its closing, which the audit trail records::

            audit retention ≥ dead letter retention

        Raises:
            UnsafeSetting: one of the two inequalities does not hold.
        """
        inbox, dead, audit = (
            math.inf if seconds is None else seconds
            for seconds in (self.inbox_retention, self.dead_letter_retention, self.audit_retention)
        )
        if inbox < self.longest_return:
            raise UnsafeSetting(
                f"eda_inbox_retention ({inbox} s) must be at least {self.longest_return} s, which "
                "is eda_max_attempts × eda_retry_delay_max + eda_redelivery_horizon: a copy that "
                "arrives after its inbox row was deleted would take effect once more. Raise "
                "eda_inbox_retention."
            )
        if audit < dead:
            raise UnsafeSetting(
                f"eda_audit_retention ({audit} s) must be at least eda_dead_letter_retention "
                f"({dead} s): otherwise the record of how and when a dead letter was closed would "
                "be deleted before the letter. Raise eda_audit_retention."
            )

    @classmethod
    def of(cls, conf: Any) -> Settings:
        """The settings in *conf*, an app's configuration.

        Raises:
            UnknownSetting: a key begins with ``eda_`` but names no setting.
            ConfigurationError: a value has the wrong type or is out of range.
        """
        defaults = {setting.name: setting.default for setting in fields(cls)}
        # An app configured before this package was imported does not have these defaults.
        values = {name: conf.get(PREFIX + name, default) for name, default in defaults.items()}
        for raw, name in _eda_keys(conf):
            if name not in defaults:
                raise UnknownSetting(_did_you_mean(raw, name, set(defaults)))
        settings = cls(**{each.name: _typed(each, values[each.name]) for each in fields(cls)})
        _check_visibility(conf, settings.redelivery_horizon)
        return settings


def register() -> None:
    """Register the settings with Celery, which then knows their defaults and types."""
    defaults.NAMESPACES["eda"] = defaults.Namespace(
        **{
            setting.name: defaults.Option(setting.default, type=_celery_type(setting.default))
            for setting in fields(Settings)
        }
    )
    options = {PREFIX + name: opt for name, opt in defaults.NAMESPACES["eda"].items()}
    defaults._OPTIONS.update(options)
    defaults.DEFAULTS.update({key: opt.default for key, opt in options.items()})
    defaults.SETTING_KEYS.update(options)


def _celery_type(default: Any) -> str:
    """Celery's name of the type to which it converts text from the command line.

    Its own "tuple" would split the text into characters; :func:`_typed` converts it instead.
    """
    return {bool: "bool", int: "int", float: "float", tuple: "any"}.get(type(default), "string")


def _eda_keys(conf: Any) -> Iterator[tuple[str, str]]:
    """Every configured ``eda_*`` key: as written, and without prefixes.

    *conf* has its namespace only once a value has been read from it.
    """
    namespace = (getattr(conf, "prefix", None) or "").lower()
    for raw in conf:
        key = str(raw).lower()
        if namespace and key.startswith(namespace + PREFIX):
            yield raw, key.removeprefix(namespace + PREFIX)
        elif str(raw).startswith(PREFIX):
            yield raw, key.removeprefix(PREFIX)


def _did_you_mean(raw: str, name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {PREFIX}{close[0]}?" if close else ""
    return f"{raw!r} is no setting of celery_eda.{hint} Known: " + ", ".join(
        PREFIX + each for each in sorted(known)
    )


def _typed(setting: Field[Any], value: Any) -> Any:
    """*value* as the type of the default; text is converted, since environments hold only text."""
    name, default = setting.name, setting.default
    if value is None and setting.metadata["optional"]:
        return None
    if isinstance(value, str) and isinstance(default, bool | int | float):
        try:
            return defaults.Option(type=type(default).__name__).to_python(value)
        except (TypeError, ValueError):
            pass
    if isinstance(default, tuple):
        return (value,) if isinstance(value, str) else tuple(value)
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if default is not None and type(value) is not type(default):
        raise ConfigurationError(
            f"{PREFIX}{name} must be of type {type(default).__name__}, not {value!r}."
        )
    return value


def _check(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    if (choices := metadata["choices"]) and value not in choices:
        raise ConfigurationError(
            f"{PREFIX}{name} must be one of {', '.join(map(repr, choices))}, not {value!r}."
        )
    if type(value) in (int, float) and not metadata["least"] <= value < math.inf:
        raise ConfigurationError(
            f"{PREFIX}{name} must be a number from {metadata['least']} on, not {value!r}."
        )


def _check_visibility(conf: Any, horizon: float) -> None:
    """Refuse a horizon shorter than the broker's visibility time-out."""
    visibility = (conf.get("broker_transport_options") or {}).get("visibility_timeout", 0)
    if horizon < visibility:
        raise UnsafeSetting(
            f"eda_redelivery_horizon ({horizon} s) must be at least the visibility_timeout of "
            f"broker_transport_options ({visibility} s), after which a killed worker's messages "
            "come back. Raise eda_redelivery_horizon."
        )
