"""FeatureLookup: a feature service's values for each row, newest online, as of then offline."""

import asyncio
import inspect
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from twinpath.errors import ConfigError, FeatureStoreError, GraphError
from twinpath.graph.columns import Columns, row_count
from twinpath.graph.context import DEADLINE_S, remark
from twinpath.graph.node import FeatureTime, Node

if TYPE_CHECKING:
    from twinpath.features.online import ReadStatistics
    from twinpath.features.repo import FeatureRepo
    from twinpath.features.spec import ServiceSpec

#: The registry is read anew this often, in a thread of its own.
REFRESH_S = 60.0
#: Gets what a lookup read: its input columns, the rows' moments (µs since 1970, None: now), and
#: the columns that it gave.
Watch = Callable[[Columns, NDArray[np.int64] | None, Columns], None]


class FeatureLookup(Node):
    """Gives every row the features of a Feast service.

    Online, and in process, it reads the newest values from the online store: the distinct keys of
    a batch, in one round trip. In a batch job it gives what was known at each row's moment (see
    `Node.offline`), unless the job asks for ``features="now"``.

    ``repo`` is the repository's folder, the content of its ``feature_store.yaml`` as a mapping, or
    a `FeatureRepo`. ``as_of`` names the column (datetime64[us], UTC) with each row's moment: a
    batch job needs it, and online it is what the time to live counts from (without it: now).
    ``on_missing`` and ``defaults`` are explained at `RowMaker`. A read may take ``timeout_ms`` and
    no longer than the request's deadline; when the store does not answer, the batch fails with
    FeatureStoreError (503), or with ``on_failure="degrade"`` all its rows count as missing, their
    answers carry the remark ``features: degraded``, and ``degraded_column``, if one is named, is
    True. ``max_staleness_s`` lets values that were read serve again for so many seconds.

    ``keys`` and ``features`` (columns → types) declare what the service needs and gives; without
    them the repository is read when the graph is written, and where it cannot be read yet, the
    node's columns stay undeclared.
    """

    def __init__(
        self,
        service: str,
        repo: Any,
        *,
        on_missing: Literal["default", "null", "error"] = "default",
        defaults: Mapping[str, Any] | None = None,
        as_of: str | None = None,
        max_staleness_s: float | None = None,
        timeout_ms: float = 200.0,
        on_failure: Literal["error", "degrade"] = "error",
        full_names: bool = False,
        degraded_column: str | None = None,
        keys: Mapping[str, str] | None = None,
        features: Mapping[str, str] | None = None,
    ) -> None:
        _one_of("on_missing", on_missing, ("default", "null", "error"))
        _one_of("on_failure", on_failure, ("error", "degrade"))
        if timeout_ms <= 0 or (max_staleness_s is not None and max_staleness_s < 0):
            raise GraphError(
                f"FeatureLookup: timeout_ms={timeout_ms!r} must be over 0 and "
                f"max_staleness_s={max_staleness_s!r} not below 0"
            )
        if (keys is None) != (features is None):
            raise GraphError("FeatureLookup: give both keys and features, or neither")
        self.service, self.repo = service, repo
        self.on_missing, self.defaults = on_missing, dict(defaults or {})
        self.as_of, self.max_staleness_s, self.timeout_ms = as_of, max_staleness_s, timeout_ms
        self.on_failure, self.full_names = on_failure, full_names
        self.degraded_column = degraded_column
        if keys is None or features is None:
            keys, features = self._declared()
            # A copy in another process must not have to read the repository to know its columns.
            args, options = self._arguments
            found = {"keys": keys, "features": features}
            object.__setattr__(self, "_arguments", (args, options | found))
        self.keys, self.features = keys, features
        if keys is not None and features is not None:
            moment = {} if as_of is None else {as_of: "datetime64[us]"}
            # Declared by instance: which columns they are is known only here.
            self.inputs = {**keys, **moment}  # type: ignore[misc]
            mark = {} if degraded_column is None else {degraded_column: "bool"}
            self.outputs = {**self._types(features), **mark}  # type: ignore[misc]

    def _types(self, features: Mapping[str, str]) -> dict[str, str]:
        from twinpath.features.rows import declared_types

        return declared_types(features, self.on_missing)

    def _declared(self) -> tuple[dict[str, str] | None, dict[str, str] | None]:
        from twinpath.errors import TwinpathError

        try:
            spec = self._open().service(self.service)
        except (TwinpathError, OSError):
            return None, None
        return {**spec.keys, **spec.request}, spec.columns(self.full_names)

    def _open(self) -> "FeatureRepo":
        from twinpath.features.repo import FeatureRepo

        return self.repo if isinstance(self.repo, FeatureRepo) else FeatureRepo(self.repo)

    def opened_spec(self) -> tuple["FeatureRepo", "ServiceSpec"]:
        """The repository and the service, which must be as declared. Raises ConfigError."""
        repo = self._open()
        spec = repo.service(self.service)
        kinds = spec.columns(self.full_names)
        if self.features is not None and dict(self.features) != kinds:
            wrong = sorted(set(self.features.items()) ^ set(kinds.items()))
            raise ConfigError(
                f"FeatureLookup({self.service!r}) declares other features than the repository "
                f"has; first of {len(wrong)} differences: {wrong[0][0]!r}. Apply the repository's "
                "definitions, or declare what it gives"
            )
        needed = sorted({**spec.keys, **spec.request})
        if self.keys is not None and sorted(self.keys) != needed:
            raise ConfigError(
                f"FeatureLookup({self.service!r}) declares the keys "
                f"{', '.join(sorted(self.keys))}, and the service needs {', '.join(needed)}"
            )
        return repo, spec

    def setup(self) -> None:
        """Open the repository, and its online store with the first batch. Raises ConfigError for
        a service that is not applied, or that gives other features than were declared."""
        from twinpath.features.decode import NEVER
        from twinpath.features.online import OnlineFeatures
        from twinpath.features.rows import RowMaker

        self._never = NEVER
        repo, spec = self.opened_spec()
        self._spec = spec
        self._maker = RowMaker(spec, self.on_missing, self.defaults, self.full_names)
        self._online = OnlineFeatures(
            repo, spec, timeout_s=self.timeout_ms / 1000, max_staleness_s=self.max_staleness_s
        )
        self._repo = repo
        repo.watch(REFRESH_S)
        self._loop: asyncio.AbstractEventLoop | None = None
        #: Told of every read that succeeded.
        self.watch: Watch | None = None

    @property
    def statistics(self) -> "ReadStatistics":
        """What this process has read since set-up."""
        return self._online.statistics

    async def predict(self, columns: Columns) -> Columns:
        """The service's columns for n rows. Raises FeatureStoreError, DeadlineError."""
        n = row_count(columns)
        self._loop = asyncio.get_running_loop()
        moments = None if self.as_of is None else moments_us(columns[self.as_of], self.as_of)
        if moments is not None and (moments == self._never).any():
            # A row that does not say when it asks does so now, here and in what is captured.
            moments = np.where(moments == self._never, time.time_ns() // 1000, moments)
        try:
            views = await self._online.read(columns, moments, DEADLINE_S.get())
        except FeatureStoreError:
            if self.on_failure == "error":
                raise
            remark("features", "degraded")
            return self._marked(self._maker.nothing(columns, n), n, True)
        made = self._maker.columns(views, columns, n)
        if self.watch is not None:
            self.watch(columns, moments, made)
        return self._marked(made, n, False)

    def _marked(self, made: Columns, n: int, degraded: bool) -> Columns:
        if self.degraded_column is not None:
            made[self.degraded_column] = np.full(n, degraded)
        return made

    def teardown(self) -> None:
        """Close the store's connections, on the event loop that they belong to."""
        repo = getattr(self, "_repo", None)
        if repo is not None:
            repo.close()
        online = getattr(self, "_online", None)
        loop = getattr(self, "_loop", None)
        if online is None or loop is None or loop.is_closed():
            return
        if loop.is_running():
            closing = asyncio.run_coroutine_threadsafe(online.close(), loop)
            if asyncio._get_running_loop() is not loop:  # which would wait for itself
                closing.result(timeout=5)
        else:
            loop.run_until_complete(online.close())

    def offline(self, features: FeatureTime = "as_of") -> Node:
        """A point-in-time join, or this node itself for ``features="now"``. Raises GraphError
        where no column gives the rows' moments."""
        if features == "now":
            return self
        from twinpath.nodes.feature_history import FeatureHistory

        if self.as_of is None:
            raise GraphError(
                f"FeatureLookup({self.service!r}) cannot join features in a batch job: say with "
                'as_of="column" at which moment each row asks, or run job(features="now")'
            )
        args, options = self._arguments
        bound = inspect.signature(type(self).__init__).bind(self, *args, **options)
        bound.apply_defaults()
        given = {name: bound.arguments[name] for name in list(bound.arguments)[1:]}
        return FeatureHistory(**given)


def moments_us(values: NDArray[Any], column: str) -> NDArray[np.int64]:
    """Moments as µs since 1970. Raises GraphError for a column of another type."""
    if values.dtype.kind != "M":
        raise GraphError(f"column {column!r} has type {values.dtype}: expected datetime64[us]")
    return values.astype("datetime64[us]").astype(np.int64)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise GraphError(f"FeatureLookup: {name}={value!r}, expected one of {allowed}")
