"""What a feature service gives, as plain values: no Feast object is needed to read them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ViewSpec:
    """One feature view of a service.

    #: ``entity_keys`` are the join keys as columns of a batch, in the view's order, and
    #: ``stored_keys`` the names under which the store knows the same keys (they differ where a
    #: service renames a view's join keys).
    #: ``features`` maps each feature that is read to its column type ("float32", "str", …).
    #: ``ttl_s`` seconds, None when values hold for ever.
    #: ``source_path`` is the absolute path (or URI) of the batch source, None if it is no file;
    #: ``field_mapping`` maps columns of the source to names in the view.
    #: ``label`` is the name in full feature names; ``name`` the one that the store uses.
    """

    name: str
    entity_keys: tuple[str, ...]
    features: Mapping[str, str]
    ttl_s: float | None
    timestamp_field: str
    source_path: str | None = None
    created_field: str | None = None
    key_types: Mapping[str, str] = field(default_factory=dict)
    stored_keys: tuple[str, ...] = ()
    field_mapping: Mapping[str, str] = field(default_factory=dict)
    label: str = ""

    @property
    def title(self) -> str:
        """The name in full feature names."""
        return self.label or self.name


@dataclass(frozen=True, slots=True)
class OnDemandSpec:
    """A view whose features are computed from others at the time of the read.

    #: ``request`` maps columns that have to come with the request to their types.
    #: ``inputs`` are the (view, feature) pairs that it reads.
    #: ``transformation`` is Feast's object; ``mode`` is "python" or "pandas".
    """

    name: str
    features: Mapping[str, str]
    inputs: tuple[tuple[str, str], ...] = ()
    request: Mapping[str, str] = field(default_factory=dict)
    mode: str = "python"
    transformation: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """A feature service: stored views, views on demand, and the features that it promises.

    #: ``promised`` are (view title, feature) pairs in the service's order. A view may have more
    #: features than are promised: those that only a view on demand reads.
    """

    name: str
    views: tuple[ViewSpec, ...]
    on_demand: tuple[OnDemandSpec, ...] = ()
    promised: tuple[tuple[str, str], ...] = ()

    @property
    def keys(self) -> dict[str, str]:
        """Key columns that a batch needs → their types, in the order of the views."""
        return {key: view.key_types.get(key, "str") for view in self.views
                for key in view.entity_keys}  # fmt: skip

    @property
    def request(self) -> dict[str, str]:
        """Columns beside the keys that views on demand need from the request → types."""
        return {name: kind for view in self.on_demand for name, kind in view.request.items()}

    def type_of(self, view: str, feature: str) -> str:
        """The column type of one promised feature."""
        for stored in self.views:
            if stored.title == view and feature in stored.features:
                return stored.features[feature]
        return next(v.features[feature] for v in self.on_demand if v.name == view)

    def column(self, view: str, feature: str, full_names: bool = False) -> str:
        """The column of a feature: its own name, or ``view__feature`` as in Feast."""
        return f"{view}__{feature}" if full_names else feature

    def columns(self, full_names: bool = False) -> dict[str, str]:
        """Promised columns → types, in the service's order."""
        return {
            self.column(view, feature, full_names): self.type_of(view, feature)
            for view, feature in self.promised
        }
