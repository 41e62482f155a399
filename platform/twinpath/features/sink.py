"""A feature view as the sink of a batch job: what was scored can be looked up online."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twinpath.errors import ConfigError, did_you_mean
from twinpath.features.pushed_rows import RowCheck
from twinpath.features.repo import FeatureRepo
from twinpath.features.writing import CHUNK_ROWS, ViewWriter


@dataclass(frozen=True, slots=True)
class FeatureSink:
    """Writes rows to the online store of ``repo`` (see `FeatureRepo`), as features of ``view``.

    ``columns`` maps keys, features or the timestamp of the view to columns of the rows, where the
    names differ. Rows without a timestamp column count from when the writing begins.
    """

    view: str
    repo: Any
    columns: Mapping[str, str] = field(default_factory=dict)

    def check(self, names: Iterable[str]) -> None:
        """Raises ConfigError unless rows with these columns can be written."""
        given = set(names)
        writer = self._writer()
        for name in (*writer.keys, *writer.features):
            wanted = self.columns.get(name, name)
            if wanted not in given:
                raise ConfigError(
                    f"view {self.view!r} needs {name!r}, and the rows have no column {wanted!r}."
                    f"{did_you_mean(wanted, given)} Name source columns in keep=, or say "
                    f"FeatureSink(columns={{{name!r}: …}})"
                )

    def write(self, folder: Path | str) -> int:
        """Write all rows of a folder of Parquet files; how many there were. Writing the same again
        changes nothing, so a job that was cut short may be repeated. Raises InputError for a row
        that does not fit the view."""
        import pyarrow.dataset as ds

        writer = self._writer()
        checks, now_s = RowCheck(writer), time.time()
        dataset = ds.dataset(str(folder), format="parquet")
        names = {name: self.columns.get(name, name) for name in (*writer.keys, *writer.features)}
        at = self.columns.get(writer.timestamp_field, writer.timestamp_field)
        if at in dataset.schema.names:
            names[writer.timestamp_field] = at
        rows = 0
        for batch in dataset.to_batches(columns=list(names.values()), batch_size=CHUNK_ROWS):
            columns = [batch.column(name).to_pylist() for name in names.values()]
            listed = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
            if listed:
                writer.write(checks.store_rows(listed, now_s))
            rows += len(listed)
        return rows

    def _writer(self) -> ViewWriter:
        repo = self.repo if isinstance(self.repo, FeatureRepo) else FeatureRepo(self.repo)
        return ViewWriter(repo, self.view)
