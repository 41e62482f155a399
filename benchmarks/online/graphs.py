"""The benchmark's models as Twinpath graphs: ``benchmarks.online.graphs:tabular`` and others."""

from typing import Annotated, Any

from numpy.typing import NDArray
from pydantic import BaseModel, create_model

from benchmarks.online.models import ANSWER_WIDTH, MAX_BATCH, WIDTH, load
from twinpath import Batch, Columns, Graph, Node
from twinpath.graph.tensors import Tensor


class Model(Node):
    """A model of the benchmark, by its name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.inputs = {"x": f"float32[{WIDTH[name]}]"}
        self.outputs = {"y": f"float32[{ANSWER_WIDTH[name]}]"}

    def setup(self) -> None:
        """Load it where it runs."""
        self._predict = load(self.name)

    def predict(self, columns: Columns) -> Columns:
        """All rows at once."""
        return {"y": self._predict(columns["x"])}


def _row(name: str, field: str, width: int) -> type[BaseModel]:
    tensor = Annotated[NDArray[Any], Tensor(f"float32[{width}]")]
    return create_model(name, **{field: (tensor, ...)})  # type: ignore[call-overload,no-any-return]


def _graph(name: str) -> Graph:
    given = _row(f"{name.title()}Request", "x", WIDTH[name])
    answer = _row(f"{name.title()}Answer", "y", ANSWER_WIDTH[name])
    # The same bound as in Triton's configuration.
    graph = Graph(name, input=given, output=answer, batch=Batch(max_size=MAX_BATCH))
    with graph as rows:
        graph.output(Model(name)(rows))
    return graph


tabular = _graph("tabular").app
torch = _graph("torch").app
echo = _graph("echo").app
