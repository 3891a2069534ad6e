"""Pictures of sagas: of a definition, and of what has become of one instance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from html import escape

from celery_eda import redaction
from celery_eda.drawing import Edge, Graph, Node
from celery_eda.saga_definition import (
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
from celery_eda.saga_log import Entry, Saga
from celery_eda.saga_run import Kind, Status

#: Boxes that something leaves, and what is written at its arrow.
Ends = list[tuple[Node, str]]
#: Of the picture of an instance, in pixels.
NAMES, BARS, NOTES, LINE, MARGIN, THINNEST = 200, 520, 380, 22, 16, 3
FILLS = {
    Status.open: "#b9d4f1",
    Status.done: "#a8d5a2",
    Status.failed: "#ee9b94",
    Status.skipped: "#d3c1e5",
    Status.again: "#ee9b94",
    Status.dropped: "#dddddd",
}


def graph(definition: Definition) -> Graph:
    """What may follow what in *definition*, and by each step what undoes it."""
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
    """What is written at the arrow for when *condition* holds."""
    if condition is always:
        return "otherwise"
    name = name_of(condition) or f"case {number}"
    return "yes" if part.name.startswith(name) else name


def timeline(saga: Saga, history: Sequence[Entry]) -> str:
    """What has become of *saga* as an SVG: a bar for each attempt, and who decided.

    A thin line shows when the time of an attempt is over, or was.
    """
    moments = [moment for each in history for moment in (each.begun_at, each.ended_at) if moment]
    first = min(moments, default=saga.begun_at or datetime.min)
    length = max(moments, default=first) - first
    scale = BARS / max(length / timedelta(seconds=1), 1e-6)

    def x(moment: datetime) -> float:
        return MARGIN + NAMES + (moment - first).total_seconds() * scale

    lines = list(_lines(history, x))
    error = f": {saga.error}" if saga.error else ""
    title = redaction.redact(f"{saga.id}, {saga.name} v{saga.version}: {saga.state.value}{error}")
    width = 2 * MARGIN + NAMES + BARS + NOTES
    height = 2 * MARGIN + (len(history) + 2) * LINE
    span = f"{first} and {length.total_seconds():.3f} s"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            'font-family="sans-serif" font-size="12">',
            '<rect width="100%" height="100%" fill="white"/>',
            _text(MARGIN, MARGIN + 12, title, "font-weight='bold'"),
            _text(MARGIN + NAMES, MARGIN + LINE + 12, span, "fill='#666'"),
            *lines,
            "</svg>",
        ]
    )


def _lines(history: Sequence[Entry], x: Callable[[datetime], float]) -> Iterator[str]:
    for number, each in enumerate(history, 2):
        record, y = each.record, MARGIN + number * LINE
        begin, end = x(each.begun_at), x(each.ended_at) if each.ended_at else MARGIN + NAMES + BARS
        attempt = f" #{record.attempt}" if record.attempt > 1 else ""
        kind = "" if record.kind is Kind.step else f"{record.kind.value} "
        yield _text(MARGIN, y + 14, f"{kind}{record.place}{attempt}")
        yield (
            f'<rect x="{begin:.1f}" y="{y + 3}" width="{max(end - begin, THINNEST):.1f}" '
            f'height="{LINE - 6}" rx="2" fill="{FILLS[record.status]}" stroke="#555" '
            f'stroke-width="0.5"/>'
        )
        if each.due and x(each.due) <= MARGIN + NAMES + BARS:
            yield (
                f'<path d="M{x(each.due):.1f} {y}v{LINE}" stroke="#c0392b" stroke-dasharray="3 2"/>'
            )
        yield _text(MARGIN + NAMES + BARS + 10, y + 14, _note(each))


def _note(entry: Entry) -> str:
    record = entry.record
    words = ["timed out" if record.timed_out else record.status.value]
    if isinstance(record.value, Exception):
        words.append(redaction.redact(f"{type(record.value).__name__}: {record.value}"))
    if entry.who:
        words.append(f"by {entry.who}")
    return ", ".join(words)


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x}" y="{y}" {style}>{escape(text)}</text>'
