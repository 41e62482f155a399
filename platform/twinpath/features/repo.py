"""A Feast repository: opened when first used, its registry read once and refreshed beside requests.

How the parts fit, for whoever writes another of them:

* ``FeatureRepo.service(name)`` gives a :class:`~twinpath.features.spec.ServiceSpec`: plain values.
* Online, ``nodes/features.py`` reads the newest values; ``Node.offline(features="as_of")`` gives
  the node that takes its place in a batch job, which joins with ``features/history.py``:
  ``as_of_join(view, keys, moments, sources) -> ViewRows`` for a view (``moments``: int64 µs, UTC).
* Both hand the views' values to ``features/rows.py``, which fills what is missing, computes views
  on demand and names the columns: online and offline share that code.
"""

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twinpath.errors import ConfigError, did_you_mean
from twinpath.features.feast_import import feast_
from twinpath.features.spec import OnDemandSpec, ServiceSpec, ViewSpec

#: Feast type → column type. All others are object columns ("any").
_TYPES = {
    "Float32": "float32",
    "Float64": "float64",
    "Int32": "int32",
    "Int64": "int64",
    "Bool": "bool",
    "String": "str",
    "UnixTimestamp": "datetime64[us]",
}


class FeatureRepo:
    """``FeatureRepo("feature_repo")``: the folder with ``feature_store.yaml`` and definitions, or
    a mapping with the content of such a file (relative paths then count from here).

    Nothing is read before it is needed. Raises MissingExtraError without Feast, ConfigError for a
    folder that is no repository.
    """

    def __init__(self, path_or_config: str | Path | Mapping[str, Any]) -> None:
        self.given = path_or_config
        self._lock = threading.RLock()
        self._store: Any = None
        self._services: dict[str, ServiceSpec] = {}
        self._stop = threading.Event()
        self._watching: threading.Thread | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureRepo, (self.given,)

    @property
    def store(self) -> Any:
        """The ``feast.FeatureStore``. Its registry is never refreshed by a read: see watch()."""
        with self._lock:
            if self._store is None:
                self._store = self._open()
            return self._store

    def _open(self) -> Any:
        os.environ.setdefault("FEAST_USAGE", "False")
        feast = feast_()
        from feast.repo_config import load_repo_config

        try:
            if isinstance(self.given, Mapping):
                config = feast.RepoConfig(**self.given)
                config.repo_path = Path.cwd()
            else:
                folder = Path(self.given).absolute()
                file = folder / "feature_store.yaml"
                if not file.is_file():
                    raise ConfigError(
                        f"no feature repository in {folder}: expected a feature_store.yaml there"
                    )
                config = load_repo_config(folder, file)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"the feature repository {self.given!r}: {error}") from error
        # 0: a cached registry never expires, so that no request has to wait for a new one.
        config.registry.cache_ttl_seconds = 0
        return feast.FeatureStore(repo_path=str(config.repo_path), config=config)

    def service(self, name: str) -> ServiceSpec:
        """What a feature service has. Raises ConfigError when nothing of that name is applied."""
        with self._lock:
            found = self._services.get(name)
            if found is None:
                found = self._services[name] = self._read(name)
            return found

    def feature_names(self, service: str, full_names: bool = False) -> tuple[str, ...]:
        """The columns that a service gives, in its order."""
        return tuple(self.service(service).columns(full_names))

    def watch(self, every_s: float = 60.0) -> None:
        """Refresh the registry in a background thread, until close()."""
        with self._lock:
            if self._watching is not None:
                return
            self._stop.clear()
            self._watching = threading.Thread(
                target=self._refresh, args=(every_s,), name="feature-registry", daemon=True
            )
            self._watching.start()

    def close(self) -> None:
        """Stop the background thread."""
        self._stop.set()
        with self._lock:
            watching, self._watching = self._watching, None
        if watching is not None:
            watching.join(timeout=5)

    def refresh(self) -> None:
        """Read the registry anew. What was known stays where that fails."""
        self.store.refresh_registry()
        with self._lock:
            self._services = {name: self._read(name) for name in self._services}

    def _refresh(self, every_s: float) -> None:
        import logging

        while not self._stop.wait(every_s):
            try:
                self.refresh()
            except Exception:
                logging.getLogger(__name__).warning(
                    "the feature registry could not be refreshed; the last one stays", exc_info=True
                )

    def _read(self, name: str) -> ServiceSpec:
        store = self.store
        from feast.errors import FeastObjectNotFoundException
        from feast.utils import _get_feature_views_to_use

        try:
            service = store.get_feature_service(name, allow_cache=True)
        except FeastObjectNotFoundException:
            known = [s.name for s in store.list_feature_services()]
            raise ConfigError(
                f"the feature repository has no service {name!r}.{did_you_mean(name, known)} "
                "After a change of its definitions: twinpath features apply"
            ) from None
        stored, computed = _get_feature_views_to_use(
            registry=store.registry, project=store.project, features=service,
            allow_cache=True, hide_dummy_entity=False,
        )  # fmt: skip
        entities = {e.name: e for e in store.list_entities(allow_cache=True)}
        on_demand = tuple(_on_demand(view) for view in computed)
        promised = tuple(
            (_title(projection), feature.name)
            for projection in service.feature_view_projections
            for feature in projection.features
        )
        views = tuple(_view(view, entities, store.repo_path) for view in stored)
        return ServiceSpec(name, views, on_demand, promised)


def view_spec(repo: FeatureRepo, view: Any) -> ViewSpec:
    """What one of Feast's stored views has: all of its features, outside of any service."""
    store = repo.store
    entities = {e.name: e for e in store.list_entities(allow_cache=True)}
    return _view(view, entities, store.repo_path)


def _title(projection: Any) -> str:
    return str(projection.name_to_use())


def column_type(dtype: Any) -> str:
    """The column type for a Feast type."""
    return _TYPES.get(str(dtype), "any")


def _view(view: Any, entities: Mapping[str, Any], repo_path: Path) -> ViewSpec:
    projection = view.projection
    renamed = projection.join_key_map
    stored = tuple(entities[name].join_key for name in view.entities if name in entities)
    kinds = {column.name: column_type(column.dtype) for column in view.entity_columns}
    source = view.batch_source
    ttl_s = view.ttl.total_seconds() if view.ttl else 0.0
    return ViewSpec(
        name=view.name,
        entity_keys=tuple(renamed.get(key, key) for key in stored),
        features={f.name: column_type(f.dtype) for f in projection.features},
        ttl_s=ttl_s or None,
        timestamp_field=getattr(source, "timestamp_field", "") or "event_timestamp",
        source_path=_source_path(source, repo_path),
        created_field=getattr(source, "created_timestamp_column", "") or None,
        key_types={renamed.get(key, key): kinds.get(key, "str") for key in stored},
        stored_keys=stored,
        field_mapping=dict(getattr(source, "field_mapping", None) or {}),
        label=_title(projection),
    )


def _source_path(source: Any, repo_path: Path) -> str | None:
    path = getattr(source, "path", None)
    if not isinstance(path, str) or not path:
        return None
    if "://" in path or Path(path).is_absolute():
        return path
    return str(Path(repo_path) / path)


def _on_demand(view: Any) -> OnDemandSpec:
    inputs = tuple(
        (_title(projection), feature.name)
        for projection in view.source_feature_view_projections.values()
        for feature in projection.features
    )
    request = {
        field.name: column_type(field.dtype)
        for source in view.source_request_sources.values()
        for field in source.schema
    }
    return OnDemandSpec(
        name=view.projection.name_to_use(),
        features={f.name: column_type(f.dtype) for f in view.features},
        inputs=inputs,
        request=request,
        mode=view.mode,
        transformation=view,
    )
