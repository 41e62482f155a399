"""Twinpath: write a model-serving graph once; run it in process, on Ray Serve and on Ray Data."""

from twinpath.errors import TwinpathError
from twinpath.graph.columns import ROW_ERROR, Columns, Outcome, RowError
from twinpath.graph.expressions import col
from twinpath.graph.graph import Graph, Handle
from twinpath.graph.node import Node
from twinpath.graph.placement import Batch, Placement, Replicas

__version__ = "0.1.0"

__all__ = [
    "ROW_ERROR",
    "Batch",
    "Columns",
    "Graph",
    "Handle",
    "Node",
    "Outcome",
    "Placement",
    "Replicas",
    "RowError",
    "TwinpathError",
    "col",
]
