"""The flow chart of a saga's definition."""

from __future__ import annotations

from celery_eda.ops.diagrams.graph import Edge, Graph, Node
from celery_eda.sagas import (
    Block,
    Choice,
    Condition,
    Definition,
    Fail,
    Lock,
    Loop,
    Parallel,
    Part,
    Pivot,
    Sleep,
    Step,
    SubSaga,
    Wait,
    always,
    name_of,
)

#: Nodes from which the next arrows start, each with the label of its arrow.
Ends = list[tuple[Node, str]]


def graph(definition: Definition) -> Graph:
    """The graph of *definition*: each step with its undo task, and all parts that may follow."""
    picture = _Picture()
    begin = Node(f"{definition.name} v{definition.version}", kind="end")
    last = picture.block(definition.body, [(begin, "")])
    picture.arrows(last, Node("completed", kind="end"))
    return Graph(tuple(picture.nodes), tuple(picture.edges))


class _Picture:
    def __init__(self) -> None:
        self.nodes: dict[Node, None] = {}
        self.edges: dict[Edge, None] = {}

    def arrows(self, begin: Ends, end: Node) -> Ends:
        for start, label in begin:
            self.nodes.update({start: None, end: None})
            self.edges[Edge(start, end, label)] = None
        return [(end, "")]

    def block(self, block: Block, begin: Ends) -> Ends:
        for part in block.parts:
            begin = self._part(part, begin)
        return begin

    def _part(self, part: Part, begin: Ends) -> Ends:
        node = _node(part)
        here = self.arrows(begin, node)
        match part:
            case Fail():
                return []
            case Choice():
                ends: Ends = []
                for number, (condition, block) in enumerate(part.cases, 1):
                    ends += self.block(block, [(node, _words(part, condition, number))])
                return ends if part.cases[-1][0] is always else [*ends, (node, "none")]
            case Loop():
                self.arrows(self.block(part.body, [(node, _words(part, part.again, 1))]), node)
                return [(node, "done")]
            case Parallel():
                ends = [end for each in part.branches for end in self.block(each, here)]
                count = "all" if part.need == len(part.branches) else part.need
                return self.arrows(ends, Node(f"{part.name}: {count} done", kind="choice"))
        return here


def _node(part: Part) -> Node:
    match part:
        case Step():
            undo = f" ↩ {part.undo}" if part.undo else ""
            return Node(f"{part.name}: {part.task}{undo}")
        case SubSaga(definition=inner):
            return Node(f"{part.name}: saga {inner.name} v{inner.version}")
        case Wait():
            return Node(f"wait for {part.name}{_within(part.timeout)}", kind="event")
        case Lock():
            return Node(f"lock {part.name}{_within(part.timeout)}", kind="event")
        case Sleep():
            return Node(f"{part.name}: {part.seconds:g} s", kind="event")
        case Pivot():
            return Node(part.name, kind="end")
        case Fail():
            return Node(f"{part.name}: {part.why}", kind="end")
        case Choice():
            return Node(f"{part.name}?", kind="choice")
        case Loop():
            return Node(f"{part.name}, at most {part.limit} times", kind="choice")
        case Parallel():
            return Node(part.name, kind="choice")


def _within(timeout: float | None) -> str:
    return "" if timeout is None else f", {timeout:g} s at most"


def _words(part: Choice | Loop, condition: Condition, number: int) -> str:
    """The label of the arrow that is followed when *condition* is true."""
    if condition is always:
        return "otherwise"
    name = name_of(condition) or f"case {number}"
    return "yes" if part.name.startswith(name) else name
