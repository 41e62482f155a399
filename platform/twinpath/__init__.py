"""Twinpath: write a model-serving graph once; run it in process, on Ray Serve and on Ray Data.

Names are loaded when they are first used: ``import twinpath`` itself costs almost nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twinpath.errors import TwinpathError
    from twinpath.features.sink import FeatureSink
    from twinpath.graph.columns import ROW_ERROR, Columns, Outcome, RowError
    from twinpath.graph.expressions import col
    from twinpath.graph.graph import Graph, Handle
    from twinpath.graph.node import Node
    from twinpath.graph.placement import Batch, Placement, Replicas
    from twinpath.nodes.features import FeatureLookup
    from twinpath.nodes.registry import RegistryModel

__version__ = "0.1.0"

__all__ = [
    "ROW_ERROR",
    "Batch",
    "Columns",
    "FeatureLookup",
    "FeatureSink",
    "Graph",
    "Handle",
    "Node",
    "Outcome",
    "Placement",
    "RegistryModel",
    "Replicas",
    "RowError",
    "Tensor",
    "TwinpathError",
    "col",
]

_HOMES = {
    "ROW_ERROR": "graph.columns",
    "Batch": "graph.placement",
    "Columns": "graph.columns",
    "FeatureLookup": "nodes.features",
    "FeatureSink": "features.sink",
    "Graph": "graph.graph",
    "Handle": "graph.graph",
    "Node": "graph.node",
    "Outcome": "graph.columns",
    "Placement": "graph.placement",
    "RegistryModel": "nodes.registry",
    "Replicas": "graph.placement",
    "RowError": "graph.columns",
    "Tensor": "graph.tensors",
    "TwinpathError": "errors",
    "col": "graph.expressions",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'twinpath' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"twinpath.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
