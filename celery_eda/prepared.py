"""A call of a task that is like an earlier one: only what differs is made anew.

For each call Celery looks up the route, and makes and encodes twenty headers that are the same as
the last time. Here the first message of a kind is Celery's own, and becomes a template: in the next
ones the ids, the arguments and what shows them are filled in. A call that might differ in anything
else is left to Celery.
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

from celery_eda import context, transports
from celery_eda.context import Capture
from celery_eda.identity import ID_HEADER, Identity, Lane
from celery_eda.message import Encoded, Message
from celery_eda.template import Template

if TYPE_CHECKING:
    from celery_eda.transports.base import EnvelopeTemplate

#: Options of a call of which all the messages that have the same ones are alike.
ALIKE = frozenset(
    (
        *("task_type", "result_cls", "shadow", "ignore_result", "time_limit", "soft_time_limit"),
        *("queue", "exchange", "routing_key", "priority", "serializer", "delivery_mode"),
    )
)
#: Options that may be there if they are None.
ABSENT = frozenset(
    (
        *("task_id", "producer", "link", "link_error", "expires", "compression"),
        *("immediate", "mandatory"),
    )
)
#: What differs from message to message, in the headers and in the properties.
HEADERS = ("id", "root_id", "parent_id", "argsrepr", "kwargsrepr", ID_HEADER)
PROPERTIES = ("correlation_id", "reply_to")
#: The third part of a body: nothing comes after the task.
NOTHING_AFTER = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
#: Kinds of calls to remember.
MOST_KINDS = 1000

Arguments = tuple[Any, Mapping[str, Any]]


@dataclass(frozen=True)
class Form:
    """What the messages of one kind have in common.

    Attributes:
        first: one of them, without its body.
        serializer: of their bodies.
        router: by which Celery found their route.
        queue: which Celery found, as it was declared.
        levels: how deep their arguments are shown.
        headers: of them, as JSON.
        properties: likewise.
        envelope: both as the broker's protocol has them, None if it needs none.
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
    def of(cls, app: Celery, first: Message, serializer: str) -> Form:
        """The form of a message that Celery made.

        Raises:
            ValueError: there is more about it than a form has.
        """
        if first.queue is None or first.due or first.preparation or first.draft:
            raise ValueError("no other message can be made like this one")
        headers = [name for name in HEADERS if first.headers[name] is not None]
        marks = {name: f"<{name} {uuid()}>" for name in (*headers, *PROPERTIES)}
        marked = first.knowing(
            None,
            headers={**first.headers, **{name: marks[name] for name in headers}},
            properties={**first.properties, **{name: marks[name] for name in PROPERTIES}},
        )
        texts = app.eda.outbox.encode(marked)
        return cls(
            first.knowing(None, body=b""),
            serializer,
            app.amqp.router,
            app.amqp.queues.get(first.queue),
            app.conf.task_repr_maxlevels,
            Template(texts.headers, {name: _json(marks[name]) for name in headers}),
            Template(texts.properties, {name: _json(marks[name]) for name in PROPERTIES}),
            transports.envelope_template_of(app, marked, headers, PROPERTIES),
        )

    def body(self, arguments: Arguments) -> tuple[str, str, bytes]:
        """Content type, encoding and the body itself."""
        kind, encoding, body = serialization.dumps((*arguments, NOTHING_AFTER), self.serializer)
        return kind, encoding, body.encode() if isinstance(body, str) else body

    def filled(
        self, identity: Identity, values: Mapping[str, str], body: bytes, lane: Lane | None
    ) -> Message:
        """A message with these *values* where it differs."""
        texts = {name: _json(value) for name, value in values.items()}
        encoded = Encoded(
            self.headers.filled(texts),
            self.properties.filled(texts),
            self.envelope.filled(values) if self.envelope else None,
        )
        headers = {name: values[name] for name in self.headers.names}
        properties = {name: values[name] for name in self.properties.names}
        return self.first.knowing(
            encoded,
            identity=identity,
            lane=lane,
            body=body,
            headers={**self.first.headers, **headers},
            properties={**self.first.properties, **properties},
        )


class Prepared:
    """Sends calls of tasks, those of a kind that is known already by a short cut.

    Args:
        send_task: Celery's own.
    """

    def __init__(self, app: Celery, send_task: Callable[..., Any]) -> None:
        self._app = app
        self._send_task = send_task
        # None for a kind of which each message has to be Celery's own.
        self._forms: dict[Any, Form | None] = {}
        self._made_for: Any = None

    def send(
        self, transaction: Capture, name: str, args: Any, kwargs: Any, options: dict[str, Any]
    ) -> Any:
        """Publish in *transaction*, as Celery would; returns the task's result."""
        parent = self._app.current_worker_task
        arguments = (args or (), kwargs or {})
        kind = self._kind(name, args, kwargs, options, parent)
        if form := self._form_of(kind):
            return self._fill(form, transaction, name, arguments, options, parent)
        if not self._may_learn(kind, options):
            return self._send_task(name, args, kwargs, **options)
        collected, made_for = context.Collected(), self._made_for
        with context.scope_of(collected):
            result = self._send_task(name, args, kwargs, **options)
        for message in collected.messages:
            transaction.capture(message)
        form = self._learn(collected.messages, arguments, options, parent)
        self._forget_what_changed()
        # Else a setting has changed meanwhile, if only because Celery was used for the first time.
        if self._made_for is made_for:
            self._forms[kind] = form
        return result

    def _kind(self, name: str, args: Any, kwargs: Any, options: dict[str, Any], parent: Any) -> Any:
        """What the calls of a kind have in common; None if this one has to be Celery's own."""
        if (
            signals.before_task_publish.receivers
            or signals.after_task_publish.receivers
            or signals.task_sent.receivers
            or context.gives_identities()
            or (args is not None and type(args) not in (tuple, list))
            or (kwargs is not None and type(kwargs) is not dict)
            or (parent and not all(type(each) is str for each in _ancestry(parent)))
        ):
            return None
        alike = {key: value for key, value in options.items() if key != "key"}
        # By their types too, since True is equal to 1.
        kind = (name, parent is None, *alike.items(), *map(type, alike.values()))
        try:
            hash(kind)
        except TypeError:
            return None
        return kind

    def _form_of(self, kind: Any) -> Form | None:
        """The form of this *kind*, if it is known and Celery would still find the same route."""
        self._forget_what_changed()
        if (form := self._forms.get(kind)) is None:
            return None
        amqp = self._app.amqp
        same = amqp.router is form.router and amqp.queues.get(form.first.queue) is form.queue
        return form if same else None

    def _may_learn(self, kind: Any, options: Mapping[str, Any]) -> bool:
        return (
            kind is not None
            and (kind not in self._forms or self._forms[kind] is not None)
            and len(self._forms) < MOST_KINDS
            and _are_alike(options)
        )

    def _forget_what_changed(self) -> None:
        """Forget all forms after a fork, whose messages tell, or once a setting has changed."""
        process, settings = os.getpid(), self._app.conf.changes
        if (process, settings) != self._made_for:
            self._made_for = process, dict(settings)
            self._forms.clear()

    def _fill(
        self,
        form: Form,
        transaction: Capture,
        name: str,
        arguments: Arguments,
        options: Mapping[str, Any],
        parent: Any,
    ) -> Any:
        """Publish the message that Celery would make, made by a form."""
        context.refuse_publishing_if_silenced(name)
        task_id, identity = uuid(), Identity.fresh()
        values = self._values(form, task_id, identity, arguments, parent)
        _, _, body = form.body(arguments)
        lane = self._app.amqp.lane_of(name, options.get("key"), arguments)
        transaction.capture(form.filled(identity, values, body, lane))
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
    ) -> Form | None:
        """The form of Celery's own message, if the form would have made the same one.

        None if others have to be Celery's own too.
        """
        if not self._is_celerys_own(options):
            return None
        serializer = options.get("serializer") or self._app.conf.task_serializer
        try:
            [message] = messages
            form = Form.of(self._app, message, serializer)
        except ValueError:
            return None
        values = self._values(form, message.headers["id"], message.identity, arguments, parent)
        again = form.filled(message.identity, values, message.body, message.lane)
        content = (message.content_type, message.content_encoding, message.body)
        same = (
            again == message
            and again.encoded == self._app.eda.outbox.encode(message)
            and form.body(arguments) == content
        )
        return form if same else None

    def _is_celerys_own(self, options: Mapping[str, Any]) -> bool:
        """Whether nothing has a say in a message but what a form knows."""
        amqp, conf = self._app.amqp, self._app.conf
        return (
            all(
                _is_from(module, function)
                for module, function in (
                    (app_base, self._send_task),
                    (app_amqp, amqp.create_task_message),
                    (app_amqp, amqp._create_task_sender),
                )
            )
            and type(amqp.router) is Router
            and all(type(route) is MapRoute for route in amqp.router.routes)
            and not conf.task_always_eager
            and not conf.task_inherit_parent_priority
            and bool(options.get("ignore_result") or not isinstance(self._app.backend, RPCBackend))
        )

    def _values(
        self, form: Form, task_id: str, identity: Identity, arguments: Arguments, parent: Any
    ) -> dict[str, str]:
        """What a message has in its places."""
        (args, kwargs), amqp = arguments, self._app.amqp
        values = {
            "id": task_id,
            "root_id": task_id,
            "argsrepr": _shown(args, amqp.argsrepr_maxsize, form.levels),
            "kwargsrepr": _shown(kwargs, amqp.kwargsrepr_maxsize, form.levels),
            ID_HEADER: str(identity.id),
            "correlation_id": task_id,
            "reply_to": self._app.thread_oid,
        }
        if parent:
            values["root_id"], values["parent_id"] = _ancestry(parent)
        return values


def _are_alike(options: Mapping[str, Any]) -> bool:
    """Whether all messages of these *options* are alike."""
    return all(
        name in ALIKE or name == "key" or (name in ABSENT and value is None)
        for name, value in options.items()
    )


def _is_from(module: Any, method: Any) -> bool:
    """Whether the code of *method* is the module's own, and not that of a wrapper around it."""
    code = getattr(getattr(method, "__func__", None), "__code__", None)
    return code is not None and code.co_filename == module.__file__


def _ancestry(parent: Any) -> tuple[Any, Any]:
    """What a message says of the task that publishes it: the first of its line, and itself."""
    return parent.request.root_id or parent.request.id, parent.request.id


def _shown(arguments: Any, most: int, levels: int) -> str:
    """What Celery shows of *arguments*; of plain ones that are all shown without its machinery."""
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


#: How Celery shows what is most often an argument.
_PLAIN: dict[type, Callable[[Any], str]] = {
    str: lambda text: "'" + text.replace("'", "\\'") + "'",
    int: str,
    bool: str,
    type(None): str,
}


def _json(text: str) -> str:
    return encode_basestring_ascii(text)
