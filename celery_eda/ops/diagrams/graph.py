"""Directed graphs as Mermaid text, which GitHub, MkDocs and editors render."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

#: Brackets of Mermaid around the label of each kind of node.
_SHAPES = {
    "event": ("([", "])"),
    "task": ("[", "]"),
    "choice": ("{{", "}}"),
    "end": ("((", "))"),
}


@dataclass(frozen=True)
class Node:
    """A box with a *label*, in the frame of its *group* if it has one.

    Attributes:
        kind: ``task``, ``event``, ``choice`` or ``end``; it decides the shape.
    """

    label: str
    group: str = ""
    kind: str = "task"


@dataclass(frozen=True)
class Edge:
    """An arrow from *start* to *end*, with an optional *label*."""

    start: Node
    end: Node
    label: str = ""


@dataclass(frozen=True)
class Graph:
    """Nodes, and the edges between them; every end of an edge is one of the nodes."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]

    def to_mermaid(self) -> str:
        """The source of a Mermaid flowchart, from left to right, a subgraph for each group."""
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


def _quoted(text: str) -> str:
    """*text* escaped for a quoted label of Mermaid."""
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
