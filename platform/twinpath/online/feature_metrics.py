"""What feature lookups read, as metrics of Ray's exporter beside those of their graph."""

import asyncio
from collections.abc import Mapping
from typing import Any

from twinpath.nodes.features import FeatureLookup
from twinpath.online.metrics import FLUSH_S, Make

#: Count of `FeatureLookup.statistics` → what the counter ``twinpath_feature_<count>`` says.
COUNTS = {
    "reads": "Reads of feature stores, one for each batch.",
    "rows": "Rows that features were read for.",
    "entities": "Distinct entities among them.",
    "cached_entities": "Entities that were answered from the cache.",
    "failures": "Reads that failed or were late.",
    "missing": "Values that the store did not have.",
    "expired": "Values that were older than their time to live.",
}
#: Moment of the last read → what the gauge ``twinpath_feature_<moment>`` says.
AGES = {
    "age_mean_s": "Mean age of the features of the last read, in seconds.",
    "age_max_s": "Age of the oldest feature of the last read, in seconds.",
}


class FeatureMetrics:
    """The metrics of the lookups among some loaded nodes, by name."""

    def __init__(self, make: Make, nodes: Mapping[str, Any]) -> None:
        self._lookups = {n: node for n, node in nodes.items() if isinstance(node, FeatureLookup)}
        self._told: dict[tuple[str, str], float] = {}
        self._due = False
        if not self._lookups:
            return
        self._made = {
            name: make(kind, f"twinpath_feature_{name}", text, ("node",))
            for kind, texts in (("Counter", COUNTS), ("Gauge", AGES))
            for name, text in texts.items()
        }

    def soon(self) -> None:
        """Flush within a second; call it on the loop, for each batch."""
        if self._lookups and not self._due:
            self._due = True
            asyncio.get_running_loop().call_later(FLUSH_S, self.flush)

    def flush(self) -> None:
        """Hand what is new to the exporter."""
        self._due = False
        for node, lookup in self._lookups.items():
            tags = {"node": node}
            statistics = lookup.statistics
            for name in COUNTS:
                value = getattr(statistics, name)
                before = self._told.get((node, name), 0)
                if value > before:
                    self._told[node, name] = value
                    self._made[name].inc(value - before, tags=tags)
            if statistics.reads:
                for name in AGES:
                    self._made[name].set(getattr(statistics, name), tags=tags)
