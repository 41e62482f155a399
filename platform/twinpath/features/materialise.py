"""Materialisation: the newest row of each key from a view's source into the online store.

Feast's ``materialize`` reads the source into pandas and converts all of its rows in a time range;
here the newest row of each key is chosen in columns first, and only those are converted. What is
written, and what the registry notes of it, is the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from time import perf_counter
from typing import Any

from twinpath.errors import ConfigError
from twinpath.features.history import latest, scan_rows
from twinpath.features.repo import FeatureRepo, view_spec
from twinpath.features.writing import CHUNK_ROWS, ViewWriter, feature_view

#: Told of a view's name, the rows done and the rows there are.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Materialised:
    """What was done for one view. ``start`` None: from the first row on. ``rows`` is the number
    of keys that had a row in that time; ``written`` leaves out those with a newer one stored."""

    view: str
    start: datetime | None
    end: datetime
    rows: int
    written: int
    duration_s: float


def materialise(
    repo: FeatureRepo,
    *,
    end: datetime | None = None,
    start: datetime | None = None,
    views: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> list[Materialised]:
    """Write the features that hold at ``end`` (default: now) to the online store.

    Without ``start`` each view goes on where its last materialisation ended; the first time that is
    ``end`` minus its time to live, or the source's first row. Naive times are UTC. ``views`` are
    names (default: all that are served online). Raises ConfigError for a view that is not there, or
    whose source is no Parquet file.
    """
    until = _utc(end) if end is not None else datetime.now(UTC)
    if start is not None and _utc(start) > until:
        raise ConfigError(f"start {_utc(start).isoformat()} is after end {until.isoformat()}")
    if views is None:
        stored = repo.store.list_feature_views(allow_cache=True)
        views = [view.name for view in stored if view.online]
    done = []
    for name in views:
        writer = ViewWriter(repo, name)
        first = _utc(start) if start is not None else _start(writer.view, until)
        done.append(_materialise(repo, writer, first, until, progress))
    return done


def _materialise(
    repo: FeatureRepo,
    writer: ViewWriter,
    start: datetime | None,
    end: datetime,
    progress: Progress | None,
) -> Materialised:
    began = perf_counter()
    spec = view_spec(repo, writer.view)
    rows = scan_rows(spec, None if start is None else _us(start), _us(end))
    newest = latest(spec, rows).collect()
    written = done = 0
    for part in newest.iter_slices(CHUNK_ROWS):
        columns = {
            stored: part[key].to_list()
            for stored, key in zip(spec.stored_keys, spec.entity_keys, strict=True)
        }
        columns |= {name: part[name].to_list() for name in spec.features}
        moments = [_EPOCH + timedelta(microseconds=us) for us in part["__at__"].to_list()]
        created = part["__created__"].to_list() if spec.created_field is not None else None
        written += writer.write(writer.rows(columns, moments, created))
        done += part.height
        if progress is not None:
            progress(spec.name, done, newest.height)
    store = repo.store
    since = start if start is not None else _EPOCH
    store.registry.apply_materialization(writer.view, store.project, since, end)
    return Materialised(spec.name, start, end, newest.height, written, perf_counter() - began)


def last_end(repo: FeatureRepo, view: str) -> datetime | None:
    """Up to when a view has been materialised; None if it never was."""
    end: datetime | None = feature_view(repo, view).most_recent_end_time
    return None if end is None else _utc(end)


def _start(view: Any, end: datetime) -> datetime | None:
    last = view.most_recent_end_time
    if last is not None:
        return min(_utc(last), end)
    return end - view.ttl if view.ttl else None


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _us(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1)


def _utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
