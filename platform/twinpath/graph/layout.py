"""Layered layout of a small directed acyclic graph, top to bottom, in pure Python.

Vertices stand in the layer after their deepest source. An edge over several layers passes
through bends, which take part in the ordering like vertices, so that lines do not cross boxes.
All lengths are pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

GAP_X = 36.0
BEND_WIDTH = 22.0
_ROUNDS = 12

Edge = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Layout:
    """Centres of vertices, the points that every edge passes, and the layers, top first."""

    x: Mapping[str, float]
    layer: Mapping[str, int]
    bends: Mapping[Edge, tuple[tuple[float, int], ...]]
    depth: int
    width: float


def lay_out(widths: Mapping[str, float], edges: Mapping[Edge, float], last: str) -> Layout:
    """Place vertices (name → width, sources first) so that edges go down; ``last`` ends below all.

    ``edges`` map to the width that their first bend needs (a label stands there); ``bends`` of
    the result gives for each edge the (x, layer) that it passes between its ends.
    """
    layer = dict.fromkeys(widths, 0)
    for vertex in widths:
        before = [layer[a] + 1 for a, b in edges if b == vertex]
        layer[vertex] = max(before, default=0)
    layer[last] = max(layer.values())
    sizes = dict(widths)
    places = dict(layer)
    links: list[Edge] = []
    chains: dict[Edge, list[str]] = {}
    for edge in edges:
        top, bottom = layer[edge[0]] + 1, layer[edge[1]]
        chain = [f"{edge[0]}\n{edge[1]}\n{level}" for level in range(top, bottom)]
        for level, bend in enumerate(chain, top):
            places[bend] = level
            sizes[bend] = max(edges[edge], BEND_WIDTH) if level == top else BEND_WIDTH
        stops = [edge[0], *chain, edge[1]]
        links += pairwise(stops)
        chains[edge] = chain
    rows: list[list[str]] = [[] for _ in range(max(places.values()) + 1)]
    for vertex, level in places.items():
        rows[level].append(vertex)
    x = _positions(rows, sizes, links)
    left = min(x[v] - sizes[v] / 2 for v in sizes)
    x = {vertex: value - left for vertex, value in x.items()}
    return Layout(
        {vertex: x[vertex] for vertex in widths},
        layer,
        {edge: tuple((x[bend], places[bend]) for bend in chain) for edge, chain in chains.items()},
        len(rows),
        max(x[v] + sizes[v] / 2 for v in sizes),
    )


def _positions(
    rows: list[list[str]], sizes: Mapping[str, float], links: Sequence[Edge]
) -> dict[str, float]:
    """Centres by vertex: order each layer by its neighbours' mean, then pull towards them."""
    near: dict[str, list[str]] = {vertex: [] for vertex in sizes}
    above: dict[str, list[str]] = {vertex: [] for vertex in sizes}
    for a, b in links:
        near[a].append(b)
        near[b].append(a)
        above[b].append(a)
    x: dict[str, float] = {}
    for row in rows:
        row.sort(key=lambda v: _mean([x[n] for n in above[v]], 0.0))
        _pack(row, {v: _mean([x[n] for n in above[v]], 0.0) for v in row}, sizes, x)
    for turn in range(_ROUNDS):
        for row in rows if turn % 2 else rows[::-1]:
            wanted = {v: _mean([x[n] for n in near[v]], x[v]) for v in row}
            if turn < _ROUNDS // 2:
                row.sort(key=lambda v: wanted[v])
            _pack(row, wanted, sizes, x)
    return x


def _pack(
    row: Sequence[str],
    wanted: Mapping[str, float],
    sizes: Mapping[str, float],
    x: dict[str, float],
) -> None:
    """Centres as near to ``wanted`` as the order and the gaps allow; the row keeps its mean."""
    offset, offsets = 0.0, []
    for i, vertex in enumerate(row):
        if i:
            offset += (sizes[row[i - 1]] + sizes[vertex]) / 2 + GAP_X
        offsets.append(offset)
    # Isotonic regression of (wanted - offset): blocks that would overlap share their mean.
    blocks: list[tuple[float, int]] = []
    for vertex, shift in zip(row, offsets, strict=True):
        blocks.append((wanted[vertex] - shift, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (b, nb), (a, na) = blocks.pop(), blocks.pop()
            blocks.append(((a * na + b * nb) / (na + nb), na + nb))
    values = [value for value, count in blocks for _ in range(count)]
    for vertex, shift, value in zip(row, offsets, values, strict=True):
        x[vertex] = value + shift


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default
