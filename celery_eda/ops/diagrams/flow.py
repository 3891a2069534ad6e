"""The emissions, calls and subscriptions of an app, read from its source code without running it.

An emission is a call of ``emit`` with a literal event name; a computed name is shown as ``?``. The
flows of several services can be combined in one graph.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from celery import Celery, Task

from celery_eda.core import topics
from celery_eda.events import Projection, Subscription
from celery_eda.ops.diagrams.graph import Edge, Graph, Node

#: Stands for a computed name.
UNKNOWN = "?"
#: Methods of a task that publish a call of the task.
CALLS = frozenset(("delay", "apply_async", "request", "s", "si", "signature"))


@dataclass(frozen=True)
class Flow:
    """The flow of one service.

    Attributes:
        emits: pairs (name of a function or task, name of an event).
        calls: pairs (name of a function or task, name of the called task).
        listens: pairs (task of a subscription, pattern).
    """

    service: str
    emits: tuple[tuple[str, str], ...] = ()
    calls: tuple[tuple[str, str], ...] = ()
    listens: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, app: Celery, service: str, subscriptions: Iterable[Subscription]) -> Flow:
        """The flow of *app*, read from the modules that define its tasks."""
        app.finalize()
        modules = {sys.modules[task.run.__module__] for task in _own(app)}
        found = [each for module in modules for each in _published(module)]
        listens = ((each.task, pattern) for each in subscriptions for pattern in each.patterns)
        return cls(
            service,
            emits=_sorted((who, what) for who, kind, what in found if kind == "event"),
            calls=_sorted((who, what) for who, kind, what in found if kind == "task"),
            listens=_sorted(listens),
        )

    @property
    def events(self) -> tuple[str, ...]:
        """The sorted names of the emitted events, without computed ones."""
        return tuple(sorted({event for _, event in self.emits} - {UNKNOWN}))

    @classmethod
    def read(cls, plain: Any) -> Flow:
        """The inverse of :func:`dataclasses.asdict`.

        Raises:
            ValueError: *plain* is not a flow.
        """
        match plain:
            case {"service": str(service), "emits": emits, "calls": calls, "listens": listens}:
                return cls(service, *map(_pairs, (emits, calls, listens)))
        raise ValueError("not a flow; `eda flow --format json` prints one")


def graph(flows: Iterable[Flow]) -> Graph:
    """The graph of *flows*: functions and tasks, grouped by service, linked by events."""
    flows = list(flows)
    events = {event for flow in flows for event in flow.events}
    nodes: dict[Node, None] = {}
    edges: dict[Edge, None] = {}

    def edge(start: Node, end: Node) -> None:
        nodes.update({start: None, end: None})
        edges[Edge(start, end)] = None

    for flow in flows:
        for who, event in flow.emits:
            edge(Node(who, flow.service), Node(event, kind="event"))
        for who, task in flow.calls:
            edge(Node(who, flow.service), Node(task, flow.service))
        for task, pattern in flow.listens:
            chosen = [event for event in sorted(events) if topics.matches(pattern, event)]
            for event in chosen or [pattern]:
                edge(Node(event, kind="event"), Node(task, flow.service))
    return Graph(tuple(nodes), tuple(edges))


def _sorted(pairs: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(set(pairs)))


def _pairs(plain: Iterable[Iterable[Any]]) -> tuple[tuple[str, str], ...]:
    return _sorted((str(who), str(what)) for who, what in plain)


def _own(app: Celery) -> list[Task]:
    """The tasks of the app itself, without those of Celery and of this package."""
    foreign = ("celery.", "celery_eda.")
    return [
        task
        for name, task in app.tasks.items()
        if not name.startswith(foreign) and task.run.__module__ in sys.modules
    ]


def _published(module: ModuleType) -> Iterator[tuple[str, str, str]]:
    """Triples (function or task, ``event`` or ``task``, name of the event or task)."""
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError, SyntaxError):
        return
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            who = _name_of_task(module, function.name) or function.name
            for call in _calls_in(function):
                for kind, what in _published_by(call, module):
                    yield who, kind, what


def _name_of_task(module: ModuleType, variable: str) -> str | None:
    """The name of the task in *variable* of *module*; None if the variable holds no task."""
    task = getattr(module, variable, None)
    return task.name if isinstance(task, Task | Projection) else None


def _calls_in(function: ast.AST) -> Iterator[ast.Call]:
    """The calls in *function*, without those of nested functions."""
    for child in ast.iter_child_nodes(function):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if isinstance(child, ast.Call):
            yield child
        yield from _calls_in(child)


def _published_by(call: ast.Call, module: ModuleType) -> Iterator[tuple[str, str]]:
    if not isinstance(call.func, ast.Attribute):
        return
    if call.func.attr == "emit":
        first = call.args[0] if call.args else None
        for name in _texts(first):
            yield "event", name
    elif call.func.attr == "send_task" and call.args:
        for name in _texts(call.args[0]):
            yield "task", name
    elif (
        call.func.attr in CALLS
        and isinstance(call.func.value, ast.Name)
        and (task := _name_of_task(module, call.func.value.id))
    ):
        yield "task", task


def _texts(node: ast.expr | None) -> list[str]:
    """The literal strings to which *node* may evaluate; ``?`` for a computed one."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.IfExp(body=one, orelse=other):
            return [*_texts(one), *_texts(other)]
    return [UNKNOWN]
