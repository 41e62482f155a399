"""Random graphs from recipes that Hypothesis can draw, shrink and print."""

from typing import Any

import numpy as np
from hypothesis import strategies as st
from pydantic import BaseModel

from twinpath import ROW_ERROR, Columns, Graph, Handle, Node, Replicas, col
from twinpath.errors import DuplicateNameError

NAMES = ("a", "b", "c")


class Row(BaseModel):
    a: float
    b: int
    text: str
    c: float | None = None


class Answer(BaseModel):
    a: float
    b: int
    text: str
    c: float | None
    label: str | None = None


class Affine(Node):
    """Writes ``out`` from ``source``; declared, so that dead columns are dropped around it."""

    def __init__(self, source: str, out: str, factor: int) -> None:
        self.source, self.out, self.factor = source, out, factor
        self.inputs = {source: "int64" if source == "b" else "float64"}
        self.outputs = {out: "int64" if out == "b" else "float64"}

    def predict(self, columns: Columns) -> Columns:
        values = columns[self.source] * self.factor + 1
        if self.out == "b":
            values = np.nan_to_num(values).astype(np.int64) % 1000
        return {self.out: values.astype(np.int64 if self.out == "b" else np.float64)}


class SlowAffine(Affine):
    """The same, asynchronous."""

    async def predict(self, columns: Columns) -> Columns:
        return super().predict(columns)


class Label(Node):
    """Writes text from text and a number."""

    inputs = {"text": "str", "b": "int64"}
    outputs = {"label": "str"}

    def predict(self, columns: Columns) -> Columns:
        pairs = zip(columns["text"], columns["b"], strict=True)
        return {"label": np.array([f"{t}{b}" for t, b in pairs], dtype=object)}


class Undeclared:
    """A plain class that declares nothing."""

    def predict(self, columns: Columns) -> Columns:
        return {"a": columns["a"] - 0.5}


class Raises(Node):
    """Raises for the whole batch when one row is poison."""

    inputs = {"b": "int64"}
    outputs = {"c": "float64"}

    def __init__(self, divisor: int) -> None:
        self.divisor = divisor

    def predict(self, columns: Columns) -> Columns:
        if (columns["b"] % self.divisor == 3).any():
            raise ValueError("poison")
        return {"c": columns["b"] / 2}


class Marks(Node):
    """Fails single rows as values."""

    inputs = {"a": "float64"}
    outputs = {"a": "float64"}

    def predict(self, columns: Columns) -> Columns:
        errors = np.full(len(columns["a"]), None, dtype=object)
        errors[columns["a"] > 90] = "too large"
        return {"a": columns["a"] / 4, ROW_ERROR: errors}


def make_node(kind: str, number: int) -> Any:
    source, out = NAMES[number % 3], NAMES[number // 3 % 3]
    makers = {
        "affine": lambda: Affine(source, out, number % 5 - 2),
        "async": lambda: SlowAffine(source, out, number % 5 - 2),
        "label": Label,
        "undeclared": Undeclared,
        "raises": lambda: Raises(5 + number % 7),
        "marks": Marks,
    }
    return makers[kind]()


KINDS = ("affine", "async", "label", "undeclared", "raises", "marks")
recipes = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        st.integers(0, 40),
        st.lists(st.integers(0, 8), min_size=1, max_size=2),
        st.booleans(),
        st.booleans(),
    ),
    min_size=1,
    max_size=7,
)
rows = st.lists(
    st.fixed_dictionaries(
        {
            "a": st.floats(-100, 100),
            "b": st.integers(0, 500),
            "text": st.sampled_from(["x", "yy", "ü", ""]),
            "c": st.none() | st.floats(-10, 10),
        }
    ),
    min_size=1,
    max_size=30,
)


def build(name: str, recipe: list[tuple[str, int, list[int], bool, bool]]) -> Graph:
    """The graph of a recipe: (kind, number, sources, has a where=, has its own replicas)."""
    graph = Graph(name, input=Row, output=Answer)
    with graph as start:
        handles: list[Handle] = [start]
        for index, (kind, number, sources, branch, placed) in enumerate(recipe):
            node = make_node(kind, number)
            outputs = getattr(node, "outputs", None)
            branch = branch and outputs is not None
            args = list(dict.fromkeys(handles[s % len(handles)] for s in sources))
            # The full rows are always among the sources of the output, so every row has one.
            graph_args = args
            options: dict[str, Any] = {"name": f"n{index}"}
            if branch:
                options["where"] = col("b") > number * 10
                options["default"] = {"b": -1} if "b" in outputs else {}
            placement = Affine("a", "a", 1).on(replicas=Replicas(1))._placement if placed else None
            handles.append(graph.add(node, *graph_args, placement=placement, **options))
            if index == 2 and number % 4 == 0:
                handles.append(graph.exit(handles[0], where=col("b") < number))
        graph.output(start, handles[-1])
    return graph


def try_build(name: str, recipe: list[tuple[str, int, list[int], bool, bool]]) -> Graph | None:
    """None for a recipe whose branches would write the same column."""
    try:
        return build(name, recipe)
    except DuplicateNameError:
        return None
