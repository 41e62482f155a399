"""What a loader returns, and what it is told."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from twinpath.graph.columns import Columns
from twinpath.graph.dtypes import ColumnType
from twinpath.registry.device import TorchOptions


class Model(Protocol):
    """A loaded model. ``predict`` may be called from several threads."""

    #: Bytes that it is known to hold, on the host and on the GPU; 0 where that is not known.
    host_bytes: int
    vram_bytes: int

    def predict(self, inputs: Columns) -> Any:
        """Inputs by the signature's names, n rows each (an unnamed tensor is called ``""``), to an
        array of n rows or arrays by name."""


@dataclass(frozen=True)
class LoadOptions:
    """How a node wants its model. ``outputs``: the columns that it returns, which decide between
    scores and classes. ``architecture``: ``package.module:Class`` for a bare state dict."""

    outputs: Mapping[str, ColumnType] = field(default_factory=dict)
    torch: TorchOptions = field(default_factory=TorchOptions)
    architecture: str | None = None
    threads: int = 1

    @property
    def scores(self) -> bool:
        """Whether floats are wanted, and not classes."""
        return all(kind.numpy_dtype.kind == "f" for kind in self.outputs.values())
