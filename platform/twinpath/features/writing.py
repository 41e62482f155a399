"""Writes rows to the online store, in Feast's own format and through Feast's own writers.

A row replaces what the store has of its key unless that is newer: whatever order rows come in, or
come again, the newest stays. (Of two with the same event timestamp SQLite keeps the later written
one, Redis the first: so do Feast's writers.)
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from twinpath.errors import ConfigError, did_you_mean
from twinpath.features.repo import FeatureRepo

#: Entity key, values by feature, event timestamp, created timestamp: what Feast's stores take.
StoreRow = tuple[Any, dict[str, Any], datetime, datetime | None]

#: Rows in one call of the store. SQLite takes no more than 32,766 keys in a query.
CHUNK_ROWS = 5_000


class ViewWriter:
    """Writes rows of one feature view; see the module.

    Its methods block. They share Feast's connection: call them from one thread at a time. Raises
    ConfigError for a view that the repository does not have, or that is not stored by key.
    """

    def __init__(self, repo: FeatureRepo, view: str) -> None:
        self._store = repo.store
        self.view = feature_view(repo, view)
        self.keys = {column.name: column.dtype for column in self.view.entity_columns}
        self.features = {field.name: field.dtype for field in self.view.features}
        if not self.keys or any(name.startswith("__dummy") for name in self.keys):
            raise ConfigError(f"view {view!r} has no entities: Feast's own commands write it")

    @property
    def timestamp_field(self) -> str:
        """The column of event timestamps."""
        return getattr(self.view.batch_source, "timestamp_field", "") or "event_timestamp"

    def rows(
        self,
        columns: Mapping[str, Sequence[Any]],
        moments: Sequence[datetime],
        created: Sequence[datetime] | None = None,
    ) -> list[StoreRow]:
        """Python values, None for null, by key and feature, as rows for :meth:`write`. Raises
        ValueError or TypeError for values that Feast cannot store."""
        from feast.protos.feast.types.EntityKey_pb2 import EntityKey
        from feast.type_map import python_values_to_proto_values

        protos = {
            name: python_values_to_proto_values(list(columns[name]), dtype.to_value_type())
            for name, dtype in (self.keys | self.features).items()
        }
        names = list(self.keys)
        keys = [
            EntityKey(join_keys=names, entity_values=values)
            for values in zip(*(protos[name] for name in names), strict=True)
        ]
        values = zip(*(protos[name] for name in self.features), strict=True)
        features = [dict(zip(self.features, row, strict=True)) for row in values]
        made = created if created is not None else [None] * len(keys)
        return list(zip(keys, features, moments, made, strict=True))

    def write(self, rows: Sequence[StoreRow], progress: Callable[[int], Any] | None = None) -> int:
        """Write rows, each newer one over the older; how many were written. ``progress`` is told
        of rows done. Raises what the store raises; what was written before stays."""
        return sum(self.write_each(rows, progress))

    def write_each(
        self, rows: Sequence[StoreRow], progress: Callable[[int], Any] | None = None
    ) -> list[bool]:
        """The same; whether each row was written."""
        written = [False] * len(rows)
        for start in range(0, len(rows), CHUNK_ROWS):
            chunk = rows[start : start + CHUNK_ROWS]
            newest = self._newest(chunk)
            if newest:
                provider = self._store._get_provider()
                chosen = [chunk[position] for position in newest]
                provider.online_write_batch(self._store.config, self.view, chosen, None)
            for position in newest:
                written[start + position] = True
            if progress is not None:
                progress(len(chunk))
        return written

    def _newest(self, rows: Sequence[StoreRow]) -> list[int]:
        """The position of each key's newest row (of equal ones the last), unless the store has a
        newer one."""
        newest: dict[bytes, int] = {}
        for position, row in enumerate(rows):
            key = row[0].SerializeToString(deterministic=True)
            if key not in newest or _aware(row[2]) >= _aware(rows[newest[key]][2]):
                newest[key] = position
        chosen = list(newest.values())
        some = next(iter(self.features))
        keys = [rows[position][0] for position in chosen]
        provider = self._store._get_provider()
        stored = provider.online_read(self._store.config, self.view, keys, [some])
        return [
            position
            for position, (moment, _) in zip(chosen, stored, strict=True)
            if moment is None or _aware(rows[position][2]) >= _aware(moment)
        ]


def feature_view(repo: FeatureRepo, name: str) -> Any:
    """Feast's object for a stored view. Raises ConfigError when there is none of that name."""
    store = repo.store
    from feast.errors import FeastObjectNotFoundException

    try:
        return store.get_feature_view(name, allow_registry_cache=True)
    except FeastObjectNotFoundException:
        known = [view.name for view in store.list_feature_views(allow_cache=True)]
        raise ConfigError(
            f"the feature repository has no view {name!r}.{did_you_mean(name, known)}"
        ) from None


def _aware(moment: datetime) -> datetime:
    """The moment with its zone; Feast's naive ones are UTC."""
    from datetime import UTC

    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
