"""Call templates: a call like an earlier one is published by filling in what differs.

For each call Celery looks up the route, and makes and encodes twenty headers that are the same as
the last time. Here Celery makes the first message of a kind, which becomes a template. Later
messages of that kind get their own ids, arguments and representations of the arguments. Celery
makes every message that might differ in anything else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from typing import TYPE_CHECKING, Any

from celery import Celery, signals
from celery.app import amqp as app_amqp
from celery.app import base as app_base
from celery.app.routes import MapRoute, Router
from celery.backends.rpc import RPCBackend
from celery.utils.saferepr import saferepr
from kombu import serialization
from kombu.utils.uuid import uuid

from celery_eda import brokers
from celery_eda.core import chord_identities, context
from celery_eda.core.context import Capture
from celery_eda.core.identity import ID_HEADER, Identity, Lane
from celery_eda.core.message import Encoded, Message
from celery_eda.core.silence import refuse_publishing_if_silenced
from celery_eda.core.template import Template
from celery_eda.outbox.wiring import Outbox

if TYPE_CHECKING:
    from celery_eda.brokers import EnvelopeTemplate

#: Options that a templated call may have: calls with equal values have similar messages.
ALIKE = frozenset(
    (
        "task_type",
        "result_cls",
        "shadow",
        "ignore_result",
        "time_limit",
        "soft_time_limit",
        "queue",
        "exchange",
        "routing_key",
        "priority",
        "serializer",
        "delivery_mode",
    )
)
#: Options that a templated call may have only as None.
ABSENT = frozenset(
    (
        "task_id",
        "producer",
        "link",
        "link_error",
        "expires",
        "compression",
        "immediate",
        "mandatory",
    )
)
#: Headers and properties that differ from message to message.
HEADERS = ("id", "root_id", "parent_id", "argsrepr", "kwargsrepr", ID_HEADER)
PROPERTIES = ("correlation_id", "reply_to")
#: The third part of a body, for a call that nothing follows.
NOTHING_AFTER = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
#: The most kinds of calls with a template; Celery makes the messages of all others.
MOST_KINDS = 1000

Arguments = tuple[Any, Mapping[str, Any]]


@dataclass(frozen=True)
class CallTemplate:
    """The common parts of all messages of one kind.

    Attributes:
        first: a message that Celery made, without its body.
        serializer: the serializer of the bodies.
        router: the router that gave Celery the route.
        queue: the queue that Celery found, as it was declared.
        levels: how deep the representations of arguments go.
        headers: the headers as JSON, with slots.
        properties: the properties as JSON, with slots.
        envelope: both in the format of the broker, with slots; None if the broker has none.
    """

    first: Message
    serializer: str
    router: Router
    queue: Any
    levels: int
    headers: Template[str]
    properties: Template[str]
    envelope: EnvelopeTemplate | None

    @classmethod
    def of(cls, app: Celery, outbox: Outbox, first: Message, serializer: str) -> CallTemplate:
        """A template of a message that Celery made.

        Raises:
            ValueError: the message has no queue, or has something that a template cannot have.
        """
        if first.queue is None or first.due or first.prerequisites or first.event_append:
            raise ValueError("a template cannot have the queue, delay or event of this message")
        headers = [name for name in HEADERS if first.headers[name] is not None]
        marks = {name: f"<{name} {uuid()}>" for name in (*headers, *PROPERTIES)}
        marked = first.with_encoded(
            None,
            headers={**first.headers, **{name: marks[name] for name in headers}},
            properties={**first.properties, **{name: marks[name] for name in PROPERTIES}},
        )
        texts = outbox.store.encode(marked)
        return cls(
            first.with_encoded(None, body=b""),
            serializer,
            app.amqp.router,
            app.amqp.queues.get(first.queue),
            app.conf.task_repr_maxlevels,
            Template(texts.headers, {name: _json(marks[name]) for name in headers}),
            Template(texts.properties, {name: _json(marks[name]) for name in PROPERTIES}),
            brokers.envelope_template_of(app, marked, headers, PROPERTIES),
        )

    def body(self, arguments: Arguments) -> tuple[str, str, bytes]:
        """Content type, encoding and the body itself."""
        kind, encoding, body = serialization.dumps((*arguments, NOTHING_AFTER), self.serializer)
        return kind, encoding, body.encode() if isinstance(body, str) else body

    def filled(
        self, identity: Identity, values: Mapping[str, str], body: bytes, lane: Lane | None
    ) -> Message:
        """A message with these *values* in the slots."""
        texts = {name: _json(value) for name, value in values.items()}
        encoded = Encoded(
            self.headers.filled(texts),
            self.properties.filled(texts),
            self.envelope.filled(values) if self.envelope else None,
        )
        headers = {name: values[name] for name in self.headers.names}
        properties = {name: values[name] for name in self.properties.names}
        return self.first.with_encoded(
            encoded,
            identity=identity,
            lane=lane,
            body=body,
            headers={**self.first.headers, **headers},
            properties={**self.first.properties, **properties},
        )


class CallTemplates:
    """Publishes calls of tasks, from a template where one is known.

    Args:
        send_task: Celery's own function.
    """

    def __init__(self, app: Celery, outbox: Outbox, send_task: Callable[..., Any]) -> None:
        self._outbox = outbox
        self._app = app
        self._send_task = send_task
        # None for a kind of which Celery has to make each message.
        self._templates: dict[Any, CallTemplate | None] = {}
        self._made_for: Any = None

    def send(
        self, transaction: Capture, name: str, args: Any, kwargs: Any, options: dict[str, Any]
    ) -> Any:
        """Publish in *transaction*, as Celery would; returns the task's result."""
        parent = self._app.current_worker_task
        arguments = (args or (), kwargs or {})
        kind = self._kind(name, args, kwargs, options, parent)
        if template := self._template_of(kind):
            return self._fill(template, transaction, name, arguments, options, parent)
        if not self._may_learn(kind, options):
            return self._send_task(name, args, kwargs, **options)
        collected, made_for = context.Collected(), self._made_for
        with context.scope_of(collected):
            result = self._send_task(name, args, kwargs, **options)
        for message in collected.messages:
            transaction.capture(message)
        template = self._learn(collected.messages, arguments, options, parent)
        self._clear_if_outdated()
        # Otherwise a setting has changed meanwhile. Using Celery for the first time changes some.
        if self._made_for is made_for:
            self._templates[kind] = template
        return result

    def _kind(self, name: str, args: Any, kwargs: Any, options: dict[str, Any], parent: Any) -> Any:
        """The kind of a call, a hashable value; None if Celery has to make its message."""
        if (
            signals.before_task_publish.receivers
            or signals.after_task_publish.receivers
            or signals.task_sent.receivers
            or chord_identities.gives_identities()
            or (args is not None and type(args) not in (tuple, list))
            or (kwargs is not None and type(kwargs) is not dict)
            or (parent and not all(type(each) is str for each in _ancestry(parent)))
        ):
            return None
        alike = {key: value for key, value in options.items() if key != "key"}
        # The types are part of the kind, since True is equal to 1.
        kind = (name, parent is None, *alike.items(), *map(type, alike.values()))
        try:
            hash(kind)
        except TypeError:
            return None
        return kind

    def _template_of(self, kind: Any) -> CallTemplate | None:
        """The template of *kind*, if there is one and Celery would still find the same route."""
        self._clear_if_outdated()
        if (template := self._templates.get(kind)) is None:
            return None
        amqp = self._app.amqp
        same = (
            amqp.router is template.router
            and amqp.queues.get(template.first.queue) is template.queue
        )
        return template if same else None

    def _may_learn(self, kind: Any, options: Mapping[str, Any]) -> bool:
        return (
            kind is not None
            and (kind not in self._templates or self._templates[kind] is not None)
            and len(self._templates) < MOST_KINDS
            and _are_alike(options)
        )

    def _clear_if_outdated(self) -> None:
        """Drop all templates after a fork or a new setting; messages name their process."""
        process, settings = os.getpid(), self._app.conf.changes
        if (process, settings) != self._made_for:
            self._made_for = process, dict(settings)
            self._templates.clear()

    def _fill(
        self,
        template: CallTemplate,
        transaction: Capture,
        name: str,
        arguments: Arguments,
        options: Mapping[str, Any],
        parent: Any,
    ) -> Any:
        """Publish the message that Celery would make, filled into a template."""
        refuse_publishing_if_silenced(name)
        task_id, identity = uuid(), Identity.fresh()
        values = self._values(template, task_id, identity, arguments, parent)
        _, _, body = template.body(arguments)
        lane = self._app.amqp.lane_of(name, options.get("key"), arguments)
        transaction.capture(template.filled(identity, values, body, lane))
        result = (options.get("result_cls") or self._app.AsyncResult)(task_id)
        result.ignored = options.get("ignore_result")
        if parent:
            parent.add_trail(result)
        return result

    def _learn(
        self,
        messages: Sequence[Message],
        arguments: Arguments,
        options: Mapping[str, Any],
        parent: Any,
    ) -> CallTemplate | None:
        """A template of the message that Celery has made, if it gives the same message again.

        None if Celery has to make the other messages of this kind too.
        """
        if not self._is_reproducible(options):
            return None
        serializer = options.get("serializer") or self._app.conf.task_serializer
        try:
            [message] = messages
            template = CallTemplate.of(self._app, self._outbox, message, serializer)
        except ValueError:
            return None
        values = self._values(template, message.headers["id"], message.identity, arguments, parent)
        again = template.filled(message.identity, values, message.body, message.lane)
        content = (message.content_type, message.content_encoding, message.body)
        same = (
            again == message
            and again.encoded == self._outbox.store.encode(message)
            and template.body(arguments) == content
        )
        return template if same else None

    def _is_reproducible(self, options: Mapping[str, Any]) -> bool:
        """True if a template yields the bytes that Celery would make.

        No signal receiver, custom router or overridden method must be able to change a message.
        """
        amqp, conf = self._app.amqp, self._app.conf
        return (
            all(
                _is_from(module, function)
                for module, function in (
                    (app_base, self._send_task),
                    (app_amqp, amqp.create_task_message),
                    (app_amqp, amqp.make_task_sender),
                )
            )
            and type(amqp.router) is Router
            and all(type(route) is MapRoute for route in amqp.router.routes)
            and not conf.task_always_eager
            and not conf.task_inherit_parent_priority
            and bool(options.get("ignore_result") or not isinstance(self._app.backend, RPCBackend))
        )

    def _values(
        self,
        template: CallTemplate,
        task_id: str,
        identity: Identity,
        arguments: Arguments,
        parent: Any,
    ) -> dict[str, str]:
        """The values of a message for the slots, by the name of the header or property."""
        (args, kwargs), amqp = arguments, self._app.amqp
        values = {
            "id": task_id,
            "root_id": task_id,
            "argsrepr": _shown(args, amqp.argsrepr_maxsize, template.levels),
            "kwargsrepr": _shown(kwargs, amqp.kwargsrepr_maxsize, template.levels),
            ID_HEADER: str(identity.id),
            "correlation_id": task_id,
            "reply_to": self._app.thread_oid,
        }
        if parent:
            values["root_id"], values["parent_id"] = _ancestry(parent)
        return values


def _are_alike(options: Mapping[str, Any]) -> bool:
    """True if all messages of calls with these *options* are alike."""
    return all(
        name in ALIKE or name == "key" or (name in ABSENT and value is None)
        for name, value in options.items()
    )


def _is_from(module: Any, method: Any) -> bool:
    """True if *method* is the module's own function, and not a wrapper around it."""
    code = getattr(getattr(method, "__func__", None), "__code__", None)
    return code is not None and code.co_filename == module.__file__


def _ancestry(parent: Any) -> tuple[Any, Any]:
    """The root id and the parent id that the messages of the task *parent* carry."""
    return parent.request.root_id or parent.request.id, parent.request.id


def _shown(arguments: Any, most: int, levels: int) -> str:
    """Celery's representation of *arguments*.

    Short ones that consist of plain values are represented here, since ``saferepr`` is slow.
    """
    text = ""
    if type(arguments) is tuple:
        shown = [_PLAIN[type(each)](each) for each in arguments if type(each) in _PLAIN]
        if len(shown) == len(arguments):
            text = f"({', '.join(shown)}{',' if len(shown) == 1 else ''})"
    elif not arguments and type(arguments) is dict:
        text = "{}"
    if text and len(text) < most and levels > 0:
        return text
    shown_by_celery: str = saferepr(arguments, most, levels)
    return shown_by_celery


#: Celery's representation of values of the most common types.
_PLAIN: dict[type, Callable[[Any], str]] = {
    str: lambda text: "'" + text.replace("'", "\\'") + "'",
    int: str,
    bool: str,
    type(None): str,
}


def _json(text: str) -> str:
    return encode_basestring_ascii(text)
