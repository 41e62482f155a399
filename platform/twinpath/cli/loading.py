"""Finds the graph that ``package.module:name`` names, and says clearly why it cannot."""

import importlib
import pkgutil
import sys
from pathlib import Path

from twinpath.errors import ConfigError, did_you_mean
from twinpath.graph.graph import Graph


def load_graph(path: str) -> Graph:
    """The graph at ``package.module:name``; ``:graph`` when no name is given.

    Modules are found from the current directory, as Python's ``-m`` does. Raises ConfigError.
    """
    module_name, _, name = path.partition(":")
    name = name or "graph"
    if not module_name or not all(part.isidentifier() for part in module_name.split(".")):
        raise ConfigError(
            f"{path!r} is no path to a graph: expected package.module:name, "
            "for example graphs.flights:graph"
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(f"importing {module_name!r} failed: {error}") from error
        raise ConfigError(_not_found(module_name, error.name)) from None
    if not hasattr(module, name):
        graphs = [key for key, value in vars(module).items() if isinstance(value, Graph)]
        raise ConfigError(f"module {module_name!r} has no {name!r}.{did_you_mean(name, graphs)}")
    found = getattr(module, name)
    if not isinstance(found, Graph):
        graphs = [key for key, value in vars(module).items() if isinstance(value, Graph)]
        raise ConfigError(
            f"{path!r} is a {type(found).__name__}, not a Graph.{did_you_mean(name, graphs)}"
        )
    return found


def _not_found(module: str, missing: str) -> str:
    """The text for a module that does not exist, with its closest sibling."""
    parent, _, last = missing.rpartition(".")
    try:
        places = importlib.import_module(parent).__path__ if parent else [str(Path.cwd())]
    except (ImportError, AttributeError):
        places = []
    siblings = [info.name for info in pkgutil.iter_modules(places)]
    where = f"in package {parent!r}" if parent else "here"
    return f"no module {module!r}: nothing named {last!r} {where}.{did_you_mean(last, siblings)}"
