"""Drawing: a plan as Mermaid text and as an SVG picture; shows itself in notebooks."""

from dataclasses import dataclass
from functools import cached_property
from html import escape
from itertools import pairwise
from pathlib import Path

from twinpath.errors import ConfigError
from twinpath.graph.expressions import Where
from twinpath.graph.layout import Layout, lay_out
from twinpath.graph.placement import Placement
from twinpath.graph.plan import INPUT, Plan, Step

#: kind → (fill, border, what the legend says)
_COLOURS = {
    "edge": ("#f3f4f6", "#6b7280", "input, output"),
    "fused": ("#eaf1fd", "#3b6fc4", "fused: runs in its neighbours' process"),
    "placed": ("#fff3d9", "#c27c0a", "placed: own replicas"),
    "branch": ("#e6f6ec", "#2f8f5b", "branch: rows that match"),
    "exit": ("#fde8ea", "#c2415a", "early exit"),
}
_FONT = "ui-sans-serif,-apple-system,'Segoe UI','Helvetica Neue',Arial,'DejaVu Sans',sans-serif"
_MARGIN, _TITLE, _LAYER_GAP, _LEGEND = 28.0, 40.0, 50.0, 40.0
_LINE, _PAD = 17.0, 14.0


@dataclass(frozen=True, slots=True)
class Vertex:
    """A box: its kind (a key of the colours), a title, smaller lines, and the text on hover."""

    kind: str
    title: str
    lines: tuple[str, ...] = ()
    hover: str = ""

    @property
    def width(self) -> float:
        """Pixels, estimated from the text."""
        lines = [_width(line, 11.5) for line in self.lines]
        return max(_width(self.title, 14) * 1.07, 70.0, *lines) + 2 * _PAD

    @property
    def height(self) -> float:
        """Pixels."""
        return 18 + _LINE * (1 + len(self.lines))


class Drawing:
    """The picture of a plan. ``save`` writes it; a notebook shows it by itself."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __repr__(self) -> str:
        return f"Drawing of graph {self.plan.graph_name!r}: .mermaid, .svg, .save(path)"

    def _repr_svg_(self) -> str:
        return self.svg

    def _repr_html_(self) -> str:
        return f'<div style="max-width:100%;overflow-x:auto">{self.svg}</div>'

    def save(self, path: str | Path) -> Path:
        """Write ``.svg`` or ``.mmd``, by the suffix. Raises ConfigError for another suffix."""
        path = Path(path)
        if path.suffix not in (".svg", ".mmd"):
            raise ConfigError(f"cannot draw {path.name!r}: expected a name ending in .svg or .mmd")
        path.write_text(self.svg if path.suffix == ".svg" else self.mermaid, encoding="utf-8")
        return path

    @cached_property
    def _vertices(self) -> dict[str, Vertex]:
        """Boxes by key, sources before what reads them."""
        inputs = self.plan.input_schema
        found = {
            "input": Vertex(
                "edge", inputs.model.__name__, (_count(len(inputs.fields), "input column"),)
            )
        }
        for step in self.plan.steps:
            if step.node is not None:
                found[_key(step.id)] = _node_vertex(step)
            for number, leaving in enumerate(self.plan.exits, 1):
                if step.name == f"rest-{number}":
                    found[_key(step.id)] = Vertex(
                        "exit", "early exit", (), condition_text(leaving.where)
                    )
        for number, _ in enumerate(self.plan.exits, 1):
            if not any(step.name == f"rest-{number}" for step in self.plan.steps):
                found[f"exit{number}"] = Vertex("exit", "early exit")
        outputs = self.plan.output_schema
        found["output"] = Vertex(
            "edge", outputs.model.__name__, (_count(len(outputs.fields), "output column"),)
        )
        return found

    @cached_property
    def _edges(self) -> dict[tuple[str, str], str]:
        """Label by (from, to); "" for an edge that every row takes."""
        edges: dict[tuple[str, str], str] = {}
        for step in self.plan.steps:
            for source in step.sources:
                label = (
                    "" if step.node is None or step.where is None else condition_text(step.where)
                )
                edges[_key(source), _key(step.id)] = label
        for number, leaving in enumerate(self.plan.exits, 1):
            rest = [step for step in self.plan.steps if step.name == f"rest-{number}"]
            key = _key(rest[0].id) if rest else f"exit{number}"
            if not rest:
                edges[_key(leaving.source), key] = ""
            for a, b in list(edges):
                if rest and a == key:
                    edges[a, b] = edges[a, b] or "the others"
            edges[key, "output"] = condition_text(leaving.where)
        for source in self.plan.results:
            label = "the others" if self._vertices[_key(source)].kind == "exit" else ""
            both = edges.get((_key(source), "output"))
            edges[_key(source), "output"] = label if both is None else ""
        return edges

    @cached_property
    def mermaid(self) -> str:
        """Mermaid flowchart text: one subgraph a stage, conditions on the edges."""
        lines = ["flowchart TD"]
        staged: set[str] = set()
        for stage in self.plan.stages:
            keys = [_key(step.id) for step in stage.steps if _key(step.id) in self._vertices]
            if not keys:
                continue
            what = _scale(stage.placement) if stage.placement else "fused"
            lines.append(
                f'  subgraph stage{stage.index}["stage {stage.index + 1}: {_quoted(what)}"]'
            )
            lines += [f"    {self._mermaid_vertex(key)}" for key in keys]
            lines.append("  end")
            staged.update(keys)
        lines += [f"  {self._mermaid_vertex(k)}" for k in self._vertices if k not in staged]
        for (a, b), label in self._edges.items():
            lines.append(f'  {a} -->|"{_quoted(label)}"| {b}' if label else f"  {a} --> {b}")
        for kind, (fill, border, _) in _COLOURS.items():
            lines.append(f"  classDef {kind} fill:{fill},stroke:{border},color:#111827")
        return "\n".join(lines) + "\n"

    def _mermaid_vertex(self, key: str) -> str:
        vertex = self._vertices[key]
        text = "<br/>".join(_quoted(line) for line in (vertex.title, *vertex.lines))
        opening, closing = {"edge": ("([", "])"), "exit": ("{{", "}}")}.get(vertex.kind, ("[", "]"))
        return f'{key}{opening}"{text}"{closing}:::{vertex.kind}'

    @cached_property
    def svg(self) -> str:
        """The picture as one self-contained SVG element."""
        vertices, edges = self._vertices, self._edges
        layout = lay_out(
            {k: v.width for k, v in vertices.items()},
            {edge: _label_width(text) for edge, text in edges.items()},
            "output",
        )
        heights = [
            max((v.height for k, v in vertices.items() if layout.layer[k] == level), default=20.0)
            for level in range(layout.depth)
        ]
        tops = [_MARGIN + _TITLE + sum(heights[:i]) + i * _LAYER_GAP for i in range(layout.depth)]
        middles = [top + height / 2 for top, height in zip(tops, heights, strict=True)]
        kinds = [k for k in _COLOURS if k != "edge" and any(v.kind == k for v in vertices.values())]
        legend = [(kind, 22 + _width(_COLOURS[kind][2], 11.5) + 18) for kind in kinds]
        heading = _width(self.plan.graph_name, 18) * 1.1
        widest = max(layout.width, sum(size for _, size in legend), heading + 150)
        width = widest + 2 * _MARGIN
        height = tops[-1] + heights[-1] + _MARGIN + _LEGEND
        shift = _MARGIN + (widest - layout.width) / 2
        nodes = sum(step.node is not None for step in self.plan.steps)
        summary = f"{_count(nodes, 'node')} · {_count(len(self.plan.stages), 'stage')}"
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
            f'width="{width:.0f}" height="{height:.0f}" style="max-width:100%;height:auto" '
            f'role="img" font-family="{_FONT}">',
            f"<title>Graph {escape(self.plan.graph_name)}</title>",
            '<defs><marker id="twinpath-tip" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="6" '
            'markerHeight="6" orient="auto"><path d="M0 .6 8 4 0 7.4z" fill="#6b7280"/></marker>'
            "</defs>",
            f'<rect width="{width:.0f}" height="{height:.0f}" rx="10" fill="#ffffff"/>',
            f'<text x="{_MARGIN}" y="{_MARGIN + 14}" font-size="18" font-weight="650" '
            f'fill="#111827">{escape(self.plan.graph_name)}</text>',
            f'<text x="{_MARGIN + heading + 12:.0f}" y="{_MARGIN + 14}" font-size="12" '
            f'fill="#6b7280">{summary}</text>',
        ]
        lines = {edge: self._line(edge, layout, shift, middles) for edge in edges}
        parts += [lines[edge][0] for edge in edges]
        for key, vertex in vertices.items():
            parts.append(_box(vertex, layout.x[key] + shift, middles[layout.layer[key]]))
        parts += [_label(text, *lines[edge][1]) for edge, text in edges.items() if text]
        x = _MARGIN
        for kind, size in legend:
            fill, border, says = _COLOURS[kind]
            y = height - _MARGIN
            parts.append(
                f'<rect x="{x:.1f}" y="{y - 10:.1f}" width="13" height="13" rx="3.5" fill="{fill}" '
                f'stroke="{border}"/><text x="{x + 20:.1f}" y="{y + 1:.1f}" font-size="11.5" '
                f'fill="#4b5563">{escape(says)}</text>'
            )
            x += size
        return "".join(parts) + "</svg>"

    def _line(
        self, edge: tuple[str, str], layout: Layout, shift: float, middles: list[float]
    ) -> tuple[str, tuple[float, float]]:
        """The curve of an edge, and the point for its label: its first bend, or its middle."""
        a, b = edge
        start = (layout.x[a] + shift, middles[layout.layer[a]] + self._vertices[a].height / 2)
        end = (layout.x[b] + shift, middles[layout.layer[b]] - self._vertices[b].height / 2 - 2)
        points = [start, *((x + shift, middles[level]) for x, level in layout.bends[edge]), end]
        path = [f"M{start[0]:.1f} {start[1]:.1f}"]
        for (x0, y0), (x1, y1) in pairwise(points):
            bow = (y1 - y0) * 0.5
            path.append(f"C{x0:.1f} {y0 + bow:.1f} {x1:.1f} {y1 - bow:.1f} {x1:.1f} {y1:.1f}")
        stroke = _COLOURS["branch"][1] if self._edges[edge] else "#9ca3af"
        dashes = ' stroke-dasharray="5 4"' if self._edges[edge] else ""
        line = (
            f'<path d="{" ".join(path)}" fill="none" stroke="{stroke}" stroke-width="1.6"{dashes} '
            'marker-end="url(#twinpath-tip)"/>'
        )
        if len(points) > 2:
            return line, points[1]
        return line, ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)


def _node_vertex(step: Step) -> Vertex:
    kind = "placed" if step.placement else "branch" if step.where is not None else "fused"
    lines = [type(step.node).__name__]
    if step.placement:
        lines.append(_scale(step.placement))
    writes = "all its columns" if step.outputs is None else ", ".join(step.outputs)
    return Vertex(kind, step.name, tuple(lines), f"writes {writes}")


def _scale(placement: Placement) -> str:
    """``"1 GPU · 0–4 replicas"``."""
    parts = [f"{placement.num_gpus:g} GPU"] if placement.num_gpus else []
    parts += [f"{placement.num_cpus:g} CPU"] if placement.num_cpus is not None else []
    parts += [f"{amount:g} {name}" for name, amount in placement.resources.items()]
    low, high = placement.replicas.min, placement.replicas.max
    parts.append(_count(high, "replica") if low == high else f"{low}–{high} replicas")
    return " · ".join(parts)


def _box(vertex: Vertex, x: float, y: float) -> str:
    fill, border, _ = _COLOURS[vertex.kind]
    width, height = vertex.width, vertex.height
    top = y - height / 2
    round_ = height / 2 if vertex.kind in ("edge", "exit") else 9
    texts = [
        f'<text x="{x:.1f}" y="{top + 23:.1f}" font-size="14" font-weight="600" fill="#111827" '
        f'text-anchor="middle">{escape(vertex.title)}</text>'
    ]
    for i, line in enumerate(vertex.lines):
        texts.append(
            f'<text x="{x:.1f}" y="{top + 23 + _LINE * (i + 1):.1f}" font-size="11.5" '
            f'fill="#4b5563" text-anchor="middle">{escape(line)}</text>'
        )
    hover = f"<title>{escape(vertex.hover)}</title>" if vertex.hover else ""
    return (
        f'<g>{hover}<rect x="{x - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" '
        f'height="{height:.1f}" rx="{round_:.1f}" fill="{fill}" stroke="{border}" '
        f'stroke-width="1.4"/>{"".join(texts)}</g>'
    )


def _label(text: str, x: float, y: float) -> str:
    short, width = _short(text), _label_width(text)
    return (
        f'<g><title>{escape(text)}</title><rect x="{x - width / 2:.1f}" y="{y - 10:.1f}" '
        f'width="{width:.1f}" height="19" rx="6" fill="#ffffff" stroke="#d1d5db" '
        f'stroke-width=".8"/><text x="{x:.1f}" y="{y + 3.5:.1f}" font-size="11.5" '
        f'fill="#1f5f3d" text-anchor="middle">{escape(short)}</text></g>'
    )


def _short(text: str) -> str:
    return text if len(text) <= 42 else text[:41] + "…"


def _label_width(text: str) -> float:
    return _width(_short(text), 11.5) + 14 if text else 0.0


def _key(step: int) -> str:
    return "input" if step == INPUT else f"n{step}"


def condition_text(where: Where) -> str:
    """A condition as text; a plain function by its name."""
    if not callable(where):
        text = str(where)
        return text[1:-1] if text[:1] == "(" and _closes_last(text) else text
    return str(getattr(where, "__name__", type(where).__name__)).replace("<lambda>", "a function")


def _closes_last(text: str) -> bool:
    """Whether the parenthesis that opens ``text`` closes at its end."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i == len(text) - 1
    return False


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _width(text: str, size: float) -> float:
    """Pixels that ``text`` takes, a little generous: fonts differ between machines."""
    narrow, wide = "iljtfr.,:;|!'()[] ", "mwMW@<>=~+&"
    return sum(0.4 if c in narrow else 0.9 if c in wide else 0.62 for c in text) * size


def _quoted(text: str) -> str:
    """Text for a quoted Mermaid label: its own entities, so that nothing ends the quotes."""
    entities = {"#": "#35;", '"': "#quot;", "<": "#lt;", ">": "#gt;", "&": "#amp;", "`": "#96;"}
    return "".join(entities.get(letter, letter) for letter in text).replace("\n", " ")
