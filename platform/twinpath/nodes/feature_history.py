"""FeatureHistory: what a `FeatureLookup` gives, joined at each row's moment; for batch jobs."""

from typing import Any

from twinpath.graph.columns import Columns, row_count
from twinpath.graph.node import FeatureTime, Node
from twinpath.nodes.features import FeatureLookup, moments_us


class FeatureHistory(FeatureLookup):
    """The features that were known of each row's keys at the row's moment (``as_of``).

    Takes the arguments of `FeatureLookup`, and gives the same columns. What concerns the online
    store only (time limits, staleness, degrading) has no meaning here.
    """

    def setup(self) -> None:
        """Open the repository. Raises ConfigError."""
        from twinpath.features.history import Sources
        from twinpath.features.rows import RowMaker

        _, spec = self.opened_spec()
        self._spec = spec
        self._maker = RowMaker(spec, self.on_missing, self.defaults, self.full_names)
        self._sources: Any = Sources()

    def predict(self, columns: Columns) -> Columns:  # type: ignore[override]  # nothing to wait for
        """The service's columns for n rows. Raises ConfigError where a source is no file."""
        from twinpath.features.history import history_columns

        assert self.as_of is not None
        moments = moments_us(columns[self.as_of], self.as_of)
        made = history_columns(self._spec.views, self._maker, columns, moments, self._sources)
        return self._marked(made, row_count(columns), False)

    def teardown(self) -> None:
        """Forget the sources."""
        self._sources = None

    def offline(self, features: FeatureTime = "as_of") -> Node:
        """Itself."""
        return self
