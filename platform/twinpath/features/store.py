"""What reads an online store: the fast ways for Redis and SQLite, Feast's own for all others."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from twinpath.errors import ConfigError
from twinpath.features.decode import NEVER, Raw
from twinpath.features.repo import FeatureRepo
from twinpath.features.spec import ViewSpec

#: For one entity: of each view in turn its features' stored values, then its event timestamp in
#: the store's own form, which ``StoreReader.moments`` reads.
RawRow = Sequence[Any]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Distinct keys of one group of entities, and the views that are read for them."""

    group: int
    keys: Sequence[bytes]


class StoreReader(Protocol):
    """Reads stored values for groups of views that have the same entities."""

    #: Bytes that end every key of this store.
    suffix: bytes
    #: Whether reads end by themselves within the time limit, so that nobody needs to watch.
    ends_in_time: bool

    async def read(self, wanted: Sequence[Wanted]) -> list[list[RawRow]]:
        """For each group one row for each of its keys, in order. Raises OSError (a timeout or a
        lost connection among them) or another exception of the store's when it cannot."""

    def moments(self, raw: Sequence[Any]) -> NDArray[np.int64]:
        """Event timestamps of a column of rows as µs since 1970 (UTC), NEVER where none is."""

    async def close(self) -> None:
        """Release connections."""


def group_views(views: Sequence[ViewSpec]) -> list[list[ViewSpec]]:
    """Views with the same entities, which share their keys, in order of appearance."""
    groups: dict[Any, list[ViewSpec]] = {}
    for view in views:
        stored = view.stored_keys or view.entity_keys
        kinds = tuple(view.key_types.get(key, "str") for key in view.entity_keys)
        groups.setdefault((view.entity_keys, stored, kinds), []).append(view)
    return list(groups.values())


def open_reader(
    repo: FeatureRepo, groups: Sequence[Sequence[ViewSpec]], timeout_s: float
) -> StoreReader:
    """The quickest reader for the repository's online store that reads it rightly. Raises
    ConfigError for a view of a pinned version."""
    pinned = next((v.title for group in groups for v in group if "@" in v.title), None)
    if pinned is not None:
        raise ConfigError(
            f"the service pins {pinned!r}: lookups read views as they are now; leave the version "
            "out"
        )
    config = repo.store.config
    kind = getattr(config.online_store, "type", "")
    plain = (
        config.entity_key_serialization_version == 3
        and not config.registry.enable_online_feature_view_versioning
    )
    if plain and kind == "sqlite":
        from twinpath.features.sqlite import SqliteReader, database_path

        return SqliteReader(database_path(config), config.project, groups, timeout_s)
    if plain and kind == "redis":
        from twinpath.features.redis import RedisReader, address_of

        address = address_of(config.online_store)
        if address is not None:
            return RedisReader(address, config.project, groups, timeout_s)
    return FeastReader(repo, groups)


#: Reads by Feast that run at once.
_FEAST_THREADS = 8


class FeastReader:
    """Reads through Feast's ``OnlineStore.online_read``, in a thread: for every store that Feast
    knows. Its values take the same way into columns as those of the fast readers."""

    suffix = b""
    ends_in_time = False

    def __init__(self, repo: FeatureRepo, groups: Sequence[Sequence[ViewSpec]]) -> None:
        self._repo, self._groups = repo, groups
        # Of its own: reads of a store that hangs must not hold up whatever else has threads.
        self._threads = ThreadPoolExecutor(_FEAST_THREADS, "feast-read")

    async def read(self, wanted: Sequence[Wanted]) -> list[list[RawRow]]:
        """See `StoreReader`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._read, wanted)

    def _read(self, wanted: Sequence[Wanted]) -> list[list[RawRow]]:
        from feast.infra.key_encoding_utils import deserialize_entity_key

        store = self._repo.store
        answers: list[list[RawRow]] = []
        for want in wanted:
            keys = [deserialize_entity_key(key, 3) for key in want.keys]
            rows: list[list[Any]] = [[] for _ in keys]
            for view in self._groups[want.group]:
                table = store.get_feature_view(view.name, allow_registry_cache=True)
                names = list(view.features)
                read = store._get_provider().online_read(store.config, table, keys, list(names))
                for row, (moment, values) in zip(rows, read, strict=True):
                    found = values or {}
                    row += [found[n].SerializeToString() if n in found else None for n in names]
                    # A store may answer a row that is not there without values; nulls are some.
                    row.append(moment if found else None)
            answers.append(rows)  # type: ignore[arg-type]
        return answers

    def moments(self, raw: Sequence[Any]) -> NDArray[np.int64]:
        """See `StoreReader`."""
        from datetime import UTC

        return np.array(
            [
                NEVER
                if moment is None
                else round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
                           * 1_000_000)
                for moment in raw
            ],
            dtype=np.int64,
        )  # fmt: skip

    async def close(self) -> None:
        """Feast closes its own connections."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def slices(views: Sequence[ViewSpec]) -> list[tuple[ViewSpec, int]]:
    """Where in a raw row the values of each view begin."""
    starts, start = [], 0
    for view in views:
        starts.append((view, start))
        start += len(view.features) + 1
    return starts


__all__ = ["FeastReader", "Raw", "RawRow", "StoreReader", "Wanted", "group_views", "open_reader"]
