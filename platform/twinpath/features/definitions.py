"""Definitions of a feature repository: read from its Python files, and applied to its registry."""

import importlib.util
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from twinpath.errors import ConfigError
from twinpath.features.feast_import import feast_
from twinpath.features.repo import FeatureRepo


@dataclass(frozen=True, slots=True)
class Applied:
    """Names of what a repository defines, by kind."""

    entities: tuple[str, ...]
    views: tuple[str, ...]
    on_demand: tuple[str, ...]
    services: tuple[str, ...]


def read_definitions(folder: Path) -> list[Any]:
    """The Feast objects that the Python files of a folder define, each once.

    Collections of objects count too. The folder's parent need not be importable. Raises
    ConfigError for a file that fails, or when there is nothing.
    """
    feast_(checked=True)
    found: list[Any] = []
    files = sorted(folder.glob("*.py"))
    for file in files:
        module = _load(file)
        for value in vars(module).values():
            for item in _objects(value):
                # One that another file imported is read twice.
                if not any(item is known or _equal(item, known) for known in found):
                    found.append(item)
    if not found:
        names = ", ".join(file.name for file in files) or "no Python file"
        raise ConfigError(
            f"no feature definitions in {folder} ({names}): define entities, feature views and "
            "feature services at the top of a module there"
        )
    return found


def apply(repo: FeatureRepo, definitions: Iterable[Any]) -> Applied:
    """Write definitions to the registry and make the online store's tables. Applying the same
    again changes nothing; what is not among them stays."""
    from feast import Entity, FeatureService, FeatureView, OnDemandFeatureView

    given = list(definitions)
    store = repo.store
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="On demand feature view is an experimental")
        store.apply(given)
    repo.refresh()

    def names(kind: Any) -> tuple[str, ...]:
        return tuple(sorted(item.name for item in given if isinstance(item, kind)))

    return Applied(
        names(Entity), names(FeatureView), names(OnDemandFeatureView), names(FeatureService)
    )


def _equal(item: Any, known: Any) -> bool:
    return type(item) is type(known) and item.name == known.name and bool(item == known)


def _load(file: Path) -> ModuleType:
    # Feast keeps a view on demand as source text and by value: its module needs no lasting name.
    name = f"_twinpath_features_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # As for `feast apply`, files of a repository may import each other.
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{file}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(file.parent))
        del sys.modules[name]
    return module


def _objects(value: Any) -> Iterator[Any]:
    from feast import Entity, FeatureService, OnDemandFeatureView
    from feast.base_feature_view import BaseFeatureView
    from feast.data_source import DataSource

    if isinstance(
        value, (Entity, FeatureService, OnDemandFeatureView, BaseFeatureView, DataSource)
    ):
        yield value
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _objects(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _objects(item)
