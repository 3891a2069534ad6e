"""Pictures of what follows what: as text for Mermaid, and as SVG.

The SVG has a column for each step from the beginning, and in it each box lies near those that lead
to it: the layers, bends and barycentres of Sugiyama, Tagawa and Toda (1981).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from statistics import fmean

#: Of a box and between boxes, in pixels.
LETTER, PADDING, HEIGHT, ROW, COLUMN, MARGIN = 7.2, 12, 30, 46, 70, 20
#: Fill of each kind of box.
FILLS = {"event": "#fde9c8", "task": "#dbe9f7", "choice": "#e6f4dd", "end": "#eeeeee"}
_SHAPES = {"event": ("([", "])"), "task": ("[", "]"), "choice": ("{{", "}}"), "end": ("((", "))")}


@dataclass(frozen=True)
class Node:
    """A box: its *label*, and the *group* that it belongs to, if any."""

    label: str
    group: str = ""
    kind: str = "task"


@dataclass(frozen=True)
class Edge:
    """An arrow."""

    start: Node
    end: Node
    label: str = ""


@dataclass(frozen=True)
class Graph:
    """Boxes and arrows."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]

    def to_mermaid(self) -> str:
        """As a flowchart of Mermaid."""
        names = {node: f"n{number}" for number, node in enumerate(self.nodes)}
        groups: dict[str, list[Node]] = defaultdict(list)
        for node in self.nodes:
            groups[node.group].append(node)
        lines = ["flowchart LR"]
        for number, (group, nodes) in enumerate(sorted(groups.items())):
            if group:
                lines.append(f'  subgraph g{number}["{_quoted(group)}"]')
            for node in nodes:
                begin, end = _SHAPES[node.kind]
                lines.append(f'  {names[node]}{begin}"{_quoted(node.label)}"{end}')
            if group:
                lines.append("  end")
        for edge in self.edges:
            arrow = f'-->|"{_quoted(edge.label)}"|' if edge.label else "-->"
            lines.append(f"  {names[edge.start]} {arrow} {names[edge.end]}")
        return "\n".join(lines)

    def to_svg(self) -> str:
        """As a picture."""
        columns, routes = _laid_out(self)
        widths = [max(map(_width, column)) for column in columns]
        left = [MARGIN + sum(widths[:n]) + n * COLUMN for n in range(len(columns))]
        at = {
            node: (left[n], MARGIN + row * ROW, widths[n])
            for n, column in enumerate(columns)
            for row, node in enumerate(column)
        }
        width = (left[-1] + widths[-1] if columns else 0) + MARGIN
        height = max(map(len, columns), default=0) * ROW + 2 * MARGIN
        parts = [_arrow(edge, route, at) for edge, route in routes.items()]
        parts += [_box(node, *at[node]) for node in self.nodes]
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
            f'width="{width:.0f}" height="{height:.0f}" font-family="monospace" font-size="12">\n'
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" '
            'markerHeight="8" orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>\n'
            '<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
        )


def _laid_out(graph: Graph) -> tuple[list[list[Node]], dict[Edge, list[Node]]]:
    """The columns, each from above to below, and the nodes that each edge leads by.

    An edge over several columns has a place of its own in those between.
    """
    ranks = _ranks(graph)
    columns: list[list[Node]] = [[] for _ in range(max(ranks.values(), default=-1) + 1)]
    for node in graph.nodes:
        columns[ranks[node]].append(node)
    routes = {}
    for number, edge in enumerate(graph.edges):
        between = range(ranks[edge.start] + 1, ranks[edge.end])
        bends = [Node("", f"{number}.{rank}", "bend") for rank in between]
        for rank, bend in zip(between, bends, strict=True):
            columns[rank].append(bend)
        routes[edge] = [edge.start, *bends, edge.end]
    before: dict[Node, list[Node]] = defaultdict(list)
    for route in routes.values():
        for start, end in pairwise(route):
            before[end].append(start)
    rows: dict[Node, int] = {}
    for column in columns:
        heights = {
            node: _barycentre([rows[each] for each in before[node] if each in rows])
            for node in column
        }
        column.sort(key=heights.__getitem__)
        rows.update({node: row for row, node in enumerate(column)})
    return columns, routes


def _ranks(graph: Graph) -> dict[Node, int]:
    """How many steps each node is from the beginning, on the longest path.

    What leads back to where it came from is no step further.
    """
    after: dict[Node, list[Node]] = {node: [] for node in graph.nodes}
    for edge in graph.edges:
        after[edge.start].append(edge.end)
    order: list[Node] = []
    seen: dict[Node, bool] = {}
    back: set[tuple[Node, Node]] = set()

    def visit(node: Node) -> None:
        seen[node] = True  # on the path
        for following in after[node]:
            if following not in seen:
                visit(following)
            elif seen[following]:
                back.add((node, following))
        seen[node] = False
        order.append(node)

    for node in graph.nodes:
        if node not in seen:
            visit(node)
    ranks = dict.fromkeys(graph.nodes, 0)
    for node in reversed(order):
        for following in after[node]:
            if (node, following) not in back:
                ranks[following] = max(ranks[following], ranks[node] + 1)
    return ranks


def _barycentre(rows: Sequence[int]) -> float:
    return fmean(rows) if rows else float("inf")


def _width(node: Node) -> float:
    return max(len(node.label), len(node.group)) * LETTER + 2 * PADDING


def _box(node: Node, x: float, y: float, width: float) -> str:
    corner = HEIGHT / 2 if node.kind in ("event", "end") else 4
    sign = f'<text x="{x + 4:.0f}" y="{y - 3:.0f}" font-size="9" fill="#666">'
    group = f"{sign}{escape(node.group)}</text>" if node.group else ""
    return (
        f'<g><rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{HEIGHT}" '
        f'rx="{corner:.0f}" fill="{FILLS[node.kind]}" stroke="#555"/>'
        f'<text x="{x + width / 2:.0f}" y="{y + HEIGHT / 2 + 4:.0f}" text-anchor="middle">'
        f"{escape(node.label)}</text>{group}</g>"
    )


def _arrow(edge: Edge, route: Sequence[Node], at: Mapping[Node, tuple[float, float, float]]) -> str:
    if at[route[-1]][0] < at[route[0]][0]:
        return _arrow_back(at[route[0]], at[route[-1]])
    x, y, width = at[route[0]]
    path = f"M{x + width:.0f} {y + HEIGHT / 2:.0f}"
    for start, end in pairwise(route):
        (x, y, width), (to_x, to_y, to_width) = at[start], at[end]
        x, y, to_y = x + width, y + HEIGHT / 2, to_y + HEIGHT / 2
        bend = max(COLUMN / 2, abs(to_x - x) / 2)
        curve = (x + bend, y, to_x - bend, to_y, to_x, to_y)
        path += f"C{' '.join(f'{each:.0f}' for each in curve)}"
        if end is not route[-1]:
            path += f"H{to_x + to_width:.0f}"
    drawn = f'<path d="{path}" fill="none" stroke="#555" marker-end="url(#tip)"/>'
    if edge.label:
        (x, y, width), (to_x, to_y, _) = at[route[0]], at[route[1]]
        drawn += (
            f'<text x="{(x + width + to_x) / 2:.0f}" y="{(y + to_y + HEIGHT) / 2 - 4:.0f}" '
            f'font-size="10" text-anchor="middle">{escape(edge.label)}</text>'
        )
    return drawn


def _arrow_back(start: tuple[float, float, float], end: tuple[float, float, float]) -> str:
    """An arrow to an earlier column, over the boxes between them."""
    (x, y, width), (to_x, to_y, to_width) = start, end
    x, to_x = x + width / 2, to_x + to_width / 2
    curve = f"M{x:.0f} {y}C{x:.0f} {y - MARGIN} {to_x:.0f} {to_y - MARGIN} {to_x:.0f} {to_y}"
    return f'<path d="{curve}" fill="none" stroke="#555" marker-end="url(#tip)"/>'


def _quoted(text: str) -> str:
    """*text* as Mermaid takes it."""
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
