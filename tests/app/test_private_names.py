"""The private names of other libraries that this one relies on, and the versions that have them.

Each is used in one module. A new version of a library may rename any of them: raise its upper
bound in setup.cfg only after these tests have passed with it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections import Counter
from collections.abc import Iterator
from configparser import ConfigParser
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import celery_eda

PACKAGE = Path(celery_eda.__file__).parent
ROOT = PACKAGE.parent
LIBRARIES = ("amqp", "celery", "kombu", "redis", "sqlalchemy")
#: Versions that have all names below. SQLAlchemy and py-amqp are used by public names only.
SEEN_IN = {
    "celery": ("5.7.0",),
    "kombu": ("5.7.0",),
    "redis": ("6.4.0", "8.1.0"),
    "sqlalchemy": ("2.0.58", "2.1.9"),
}
#: Documented in spite of the underscore, by Python's named tuples.
PUBLIC = {"_replace"}


@dataclass(frozen=True)
class Private:
    """A private name of another library.

    Attributes:
        owner: a module or ``module:Class``. For an overridden name, the class that ours extends.
        name: the name on its owner.
        user: the module of celery_eda that uses it.
        reason: the purpose of its use.
        parameters: those of a method or function that is called or overridden, as ``_parameters``
            writes them; None for a value, and for a hook that the owner calls but does not define.
    """

    owner: str
    name: str
    user: str
    reason: str
    parameters: str | None = None

    @property
    def library(self) -> str:
        return self.owner.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.owner}.{self.name}"


AMQP = "celery.app.amqp:AMQP"
BACKEND = "celery.backends.base:Backend"
REQUEST = "celery.worker.request:Request"
CHANNEL = "kombu.transport.virtual:Channel"
REDIS = "kombu.transport.redis:Channel"
POLLER = "kombu.transport.redis:MultiChannelPoller"
IN_CHANNEL = "brokers/database/channel.py"
IN_REDIS = "brokers/redis/consume.py"
IN_ENVELOPES = "brokers/redis/envelopes.py"
IN_REQUEST = "inbox/request.py"
IN_RESULTS = "outbox/result_backend.py"
IN_RECORDER = "outbox/capture/recorder.py"

# fmt: off
NAMES = (
    Private("celery._state", "get_current_worker_task", "core/redaction.py",
            "the task whose log lines are redacted", ""),
    Private("celery._state", "task_join_will_block", IN_RESULTS,
            "whether waiting for a result is refused", ""),
    Private("celery.app.base:Celery", "_acquire_producer", "outbox/capture/amqp.py",
            "a captured call acquires no connection", "self, timeout="),
    Private("celery.app.base:Celery", "_get_backend", IN_RESULTS,
            "the backend is made without touching its server", "self"),
    Private("celery.backends.asynchronous:AsyncBackendMixin", "_wait_for_pending", IN_RESULTS,
            "subscribes before it waits",
            "self, result, timeout=, on_interval=, on_message=, **kwargs"),
    Private(BACKEND, "_call_task_errbacks", "inbox/handler.py",
            "errbacks are published in the transaction", "self, request, exc, traceback"),
    Private(AMQP, "_retry_publish", "outbox/capture/amqp.py",
            "links, chains and bodies of chords leave apart from sessions",
            "self, publish, *args, **kwargs"),
    Private(AMQP, "_create_task_sender", "outbox/capture/amqp.py",
            "Celery's own sender makes each captured message", "self"),
    Private("celery.app.amqp:Queues", "_consume_from", "app/worker_queues.py",
            "the queues of the option -Q; None without it"),
    Private(REQUEST, "_announce_revoked", IN_REQUEST,
            "a revoked message becomes a dead letter", "self, reason, terminated, signum, expired"),
    Private(REQUEST, "_already_revoked", IN_REQUEST, "a message is revoked once"),
    Private(REQUEST, "_app", IN_REQUEST, "leads to the service"),
    Private(REQUEST, "_context", IN_REQUEST, "the request that signals report"),
    Private(REQUEST, "_request_dict", IN_REQUEST, "carries the message to the child process"),
    Private("kombu.connection:Connection", "_reraise_as_library_errors", IN_RECORDER,
            "Celery enters it before it publishes", "self, ConnectionError=, ChannelError="),
    Private("kombu.messaging:Producer", "_delivery_details", IN_RECORDER,
            "kombu's choice of exchange and delivery mode",
            "self, exchange, delivery_mode=, maybe_delivery_mode=, Exchange="),
    Private("kombu.messaging:Producer", "_prepare", IN_RECORDER, "kombu's encoding of a body",
            "self, body, serializer=, content_type=, content_encoding=, compression=, headers="),
    Private(CHANNEL, "_put", IN_CHANNEL, "stores a message", "self, queue, message"),
    Private("kombu.transport.virtual.exchange:FanoutExchange", "_put_fanout", IN_CHANNEL,
            "stores a message for all bound queues"),
    Private(CHANNEL, "_new_queue", IN_CHANNEL, "declares a queue", "self, queue, **kwargs"),
    Private(CHANNEL, "_has_queue", IN_CHANNEL, "finds a queue", "self, queue, **kwargs"),
    Private(CHANNEL, "_queue_bind", IN_CHANNEL, "stores a binding"),
    Private(CHANNEL, "_size", IN_CHANNEL, "counts messages", "self, queue"),
    Private(CHANNEL, "_purge", IN_CHANNEL, "deletes messages", "self, queue"),
    Private(CHANNEL, "_active_queues", IN_CHANNEL, "the queues that are consumed"),
    Private(CHANNEL, "_tag_to_queue", IN_CHANNEL, "the queue of a cancelled consumer"),
    Private("kombu.transport.virtual:Transport", "_deliver", "brokers/database/consume.py",
            "delivers to the consumer of a queue", "self, message, queue"),
    Private("kombu.transport.redis:Transport", "_deliver", IN_REDIS,
            "delivers to the consumer of a queue", "self, message, queue"),
    Private(REDIS, "_new_queue", IN_REDIS, "marks queues that expire",
            "self, queue, auto_delete=, **kwargs"),
    Private(REDIS, "_brpop_start", IN_REDIS, "takes in one step", "self, timeout="),
    Private(REDIS, "_brpop_read", IN_REDIS, "reads the taken message", "self, **options"),
    Private(REDIS, "_brpop_sent_at", IN_REDIS, "kombu finds stale polls by it"),
    Private(REDIS, "_in_poll", IN_REDIS, "the connection that waits for a reply"),
    Private(REDIS, "_flush_brpop_reauth", IN_REDIS, "new credentials after a poll", "self"),
    Private(REDIS, "_poll_error", IN_REDIS, "errors of bells", "self, type, **options"),
    Private(REDIS, "_do_restore_message", IN_REDIS, "restores messages of a forged format",
            "self, payload, exchange, routing_key, pipe, leftmost="),
    Private(REDIS, "_queue_cycle", IN_REDIS, "kombu's order of queues"),
    Private(POLLER, "_fd_to_chan", IN_REDIS, "the bell of a file descriptor"),
    Private(POLLER, "_chan_to_sock", IN_REDIS, "whether a bell is registered"),
    Private(POLLER, "_register", IN_REDIS, "registers a bell", "self, channel, client, type"),
    Private(REDIS, "_q_for_pri", IN_ENVELOPES, "the list of a priority", "self, queue, pri"),
    Private(REDIS, "_expires", IN_ENVELOPES, "the queues whose expiry kombu renews"),
    Private(REDIS, "_get_message_priority", IN_ENVELOPES, "kombu's reading of a priority",
            "self, message, reverse="),
    Private(REDIS, "_next_delivery_tag", IN_ENVELOPES, "unique tags", "self"),
    Private(REDIS, "_put", IN_ENVELOPES, "the text that kombu would push",
            "self, queue, message, **kwargs"),
    Private("kombu.transport.virtual.base:Channel", "_size", "events/queues.py",
            "counts the messages of a subscription", "self, queue"),
    Private(REQUEST, "_success_was_stored", IN_REQUEST,
            "a lost worker's message is redelivered", "self"),
    Private("celery.app.base:Celery", "_tasks", "app/installation.py",
            "the tasks of an app that is being finalized"),
    Private("celery.app.defaults", "_OPTIONS", "core/settings.py",
            "the group of options that settings are registered in"),
    Private("celery.app.autoretry", "_orig_run", "inbox/task.py",
            "the user's function of a task with autoretry_for"),
    Private("celery.backends.redis:RedisBackend", "_chord_claim_extend_script", "outbox/chords.py",
            "whether this backend claims the completion of chords"),
    Private("redis.connection:AbstractConnection", "_sock", IN_REDIS,
            "whether a connection is still the same"),
)
# fmt: on


@pytest.mark.parametrize("private", NAMES, ids=str)
def test_the_installed_version_has_the_name(private: Private) -> None:
    module, _, path = private.owner.partition(":")
    owner = importlib.import_module(module)
    for part in path.split(".") if path else ():
        owner = getattr(owner, part)
    found = getattr(owner, private.name, None)

    assert hasattr(owner, private.name) or private.name in _mentioned(owner)
    assert private.parameters == (_parameters(found) if inspect.isroutine(found) else None)


def test_private_names_are_used_only_as_listed() -> None:
    duck_typed = {(each.user, each.name) for each in NAMES} & set(_defined())

    assert set(_foreign()) | duck_typed == {(each.user, each.name) for each in NAMES}


def test_each_name_is_listed_once() -> None:
    assert [each for each, times in Counter(map(str, NAMES)).items() if times > 1] == []


@pytest.mark.parametrize("library", SEEN_IN)
def test_the_bounds_admit_the_installed_version_and_none_beyond_those_seen(library: str) -> None:
    (required,) = (each for each in _requirements() if each.name == library)
    (upper,) = (Version(each.version) for each in required.specifier if each.operator == "<")
    newest = max(map(Version, SEEN_IN[library]))

    assert required.specifier.contains(version(library))
    assert all(required.specifier.contains(each) for each in SEEN_IN[library])
    assert upper <= Version(f"{newest.major}.{newest.minor + 1}")


def test_each_library_with_a_private_name_has_versions() -> None:
    assert {each.library for each in NAMES} <= SEEN_IN.keys()


def _requirements() -> list[Requirement]:
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lines = parser["options"]["install_requires"].splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def _parameters(function: Any) -> str:
    """Parameters of *function*, an equals sign after each that has a default."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return ", ".join(
        f"{stars.get(each.kind, '')}{each.name}{'' if each.default is each.empty else '='}"
        for each in inspect.signature(function).parameters.values()
    )


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC and name != "_"


def _trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield str(path.relative_to(PACKAGE)), ast.parse(path.read_text())


def _defined_in(tree: ast.AST) -> Iterator[str]:
    """Private names that *tree* defines: functions, classes, fields, attributes of self."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                yield name


def _defined() -> Iterator[tuple[str, str]]:
    for module, tree in _trees():
        yield from ((module, name) for name in _defined_in(tree) if _is_private(name))


def _used_in(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Private attributes that *tree* reads, writes or gets by name; True for those of self."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name, value=of) if _is_private(name):
                yield name, ast.unparse(of) in ("self", "cls", "super()")
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "hasattr" | "delattr"),
                args=[of, ast.Constant(value=str(name)), *_],
            ) if _is_private(name):
                yield name, ast.unparse(of) in ("self", "cls")


def _foreign() -> Iterator[tuple[str, str]]:
    """Private names of other libraries, each with the module of celery_eda that uses it."""
    ours = {name for _, name in _defined()}
    for module, tree in _trees():
        here = set(_defined_in(tree))
        for name, of_self in _used_in(tree):
            if name not in (ours if of_self else here):
                yield module, name
        for name in _imported(tree):
            yield module, name
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.bases:
                theirs = _names_of_bases(module, node.name)
                used = {name for name, of_self in _used_in(node) if of_self}
                for name in theirs & (used | set(_defined_in(node))):
                    yield module, name


def _imported(tree: ast.AST) -> Iterator[str]:
    """Names imported from a private module of a library, or private themselves."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(LIBRARIES):
            inside = any(map(_is_private, (node.module or "").split(".")))
            yield from (each.name for each in node.names if inside or _is_private(each.name))
        elif isinstance(node, ast.Import):
            for each in node.names:
                if each.name.startswith(LIBRARIES) and any(map(_is_private, each.name.split("."))):
                    yield each.name


def _names_of_bases(module: str, name: str) -> set[str]:
    """Private names of the bases of a class of ours that come from other libraries."""
    path = module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    cls = getattr(importlib.import_module(f"celery_eda.{path}"), name)
    return _private_names(*(each for each in cls.__mro__ if _is_theirs(each)))


def _is_theirs(cls: type) -> bool:
    return cls.__module__.split(".")[0] in LIBRARIES


def _mentioned(owner: Any) -> set[str]:
    """Private names that a class, with its bases, or a module defines or mentions."""
    if inspect.isclass(owner):
        return _private_names(owner)
    tree = ast.parse(inspect.getsource(owner))
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@cache
def _private_names(*classes: type) -> set[str]:
    """Private names that *classes*, or their own bases, define or mention."""
    names = set()
    for cls in {base for each in classes for base in each.__mro__ if _is_theirs(base)}:
        names |= vars(cls).keys()
        tree = ast.parse(dedent(inspect.getsource(cls)))
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return set(filter(_is_private, names))
