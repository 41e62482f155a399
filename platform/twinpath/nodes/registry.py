"""RegistryModel: a node whose model is whatever the registry says should serve.

Every replica follows the registry by itself, so shipping a version, a rollout's next step or a
rollback needs no restart and nobody who tells it. See `docs/registry.md`.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from twinpath.errors import ConfigError, RegistryError, TwinpathError, error_of
from twinpath.graph.columns import PIN, Columns
from twinpath.graph.dtypes import ColumnType
from twinpath.graph.node import Node
from twinpath.nodes.routing import Route, Router
from twinpath.registry.cache import ArtifactCache, default_root
from twinpath.registry.client import Registry
from twinpath.registry.device import TorchOptions
from twinpath.registry.flavors.model import LoadOptions
from twinpath.registry.loading import Wanted
from twinpath.registry.memory import Budget
from twinpath.registry.reference import (
    DEFAULT_ALIAS,
    LIVE_TAG,
    ROLLOUT_TAG,
    ModelReference,
    ModelState,
)
from twinpath.registry.slots import Slots
from twinpath.registry.swap import Policy
from twinpath.registry.trust import Trust
from twinpath.registry.watcher import Watcher
from twinpath.rollout.sketch import Report
from twinpath.rollout.split import Split
from twinpath.rollout.state import RolloutState

_LOG = logging.getLogger(__name__)


class RegistryModel(Node):
    """A registered model, by ``alias`` (default ``champion``) or by ``version``.

    ``inputs`` and ``outputs`` are columns with their types, as in `Node`; without ``inputs`` the
    model is given all columns and takes those of its signature. One output of floats gets scores
    (of a classifier with two classes the probability of the second). ``model_version`` names a
    column to return the version in that scored the row. ``key`` keeps rows with equal values on one
    version during a rollout, ``segments`` are columns by whose values it is judged. ``trusted``:
    sources (glob patterns) and digests whose code may run, see `registry.trust`. ``policy``:
    ``availability`` or ``resource``. ``memory_bytes`` bounds all versions together.
    ``tracking_uri``: MLflow's; MLFLOW_TRACKING_URI by default.

    Controllers talk to its copies in all replicas through ``commands``: methods that may be called
    by name with plain arguments. Raises ConfigError.
    """

    #: Methods that `online.replicas` lets a controller call by name.
    commands: ClassVar[tuple[str, ...]] = ("status", "drain_reports", "apply")
    #: Whether a request may pin a version: pins come as the reserved column `PIN`.
    pins: ClassVar[bool] = True

    def __init__(
        self,
        name: str,
        *,
        alias: str | None = None,
        version: str | int | None = None,
        tracking_uri: str | None = None,
        inputs: Mapping[str, str] | None = None,
        outputs: Mapping[str, str] | None = None,
        model_version: str | None = None,
        key: str | Sequence[str] | None = None,
        segments: Sequence[str] = (),
        policy: Literal["availability", "resource"] = "availability",
        trusted: Sequence[str] = (),
        memory_bytes: int | None = None,
        torch: TorchOptions | Mapping[str, Any] | None = None,
        architecture: str | None = None,
        threads: int = 1,
        record: bool = True,
        poll_s: float = 1.0,
        timeout_s: float = 5.0,
        startup_timeout_s: float = 300.0,
        cache_dir: str | None = None,
        cache_bytes: int = 20 * 2**30,
    ) -> None:
        self.reference = ModelReference(name, alias, None if version is None else str(version))
        self.tracking_uri = tracking_uri
        self.key = (key,) if isinstance(key, str) else None if key is None else tuple(key)
        self.segments = tuple(segments)
        self._model_outputs = dict(outputs or {"score": "float64"})
        self._model_inputs = None if inputs is None else dict(inputs)
        self._version_column = model_version
        if inputs is not None:
            more = (*(self.key or ()), *self.segments)
            extra = {name: "any" for name in more if name not in inputs}
            self.inputs = dict(inputs) | extra  # type: ignore[misc]  # this node's own
        more_outputs = {} if model_version is None else {model_version: "str"}
        self.outputs = self._model_outputs | more_outputs  # type: ignore[misc]  # this node's own
        if policy not in tuple(Policy):
            raise ConfigError(f"policy {policy!r}: expected availability or resource")
        self._policy = Policy(policy)
        options = torch if isinstance(torch, TorchOptions) else TorchOptions(**(torch or {}))
        self._wanted = Wanted(
            given=None if inputs is None else _types(inputs),
            options=LoadOptions(_types(self._model_outputs), options, architecture, threads),
            trust=Trust.of(trusted),
            budget=Budget(memory_bytes),
        )
        self._record = record
        self._poll_s, self._timeout_s = poll_s, timeout_s
        self._startup_timeout_s = startup_timeout_s
        self._cache_dir, self._cache_bytes = cache_dir, cache_bytes

    @property
    def name(self) -> str:
        """The registered model's name."""
        return self.reference.name

    @property
    def alias(self) -> str:
        """The alias that says what serves."""
        return self.reference.alias or DEFAULT_ALIAS

    def at(self, version: str) -> Self:
        """A copy that serves this version, whatever the registry says."""
        args, given = self._arguments
        kept = {key: value for key, value in given.items() if key != "alias"}
        return type(self)(*args, **(kept | {"version": version, "record": True}))

    def setup(self) -> None:
        """Load what should serve. If the registry is down or that version is refused, the version
        that served last on this node does. Raises RegistryError or ModelError when there is none.
        """
        self._lock = threading.RLock()
        self._rollout: RolloutState | None = None
        self._state: ModelState | None = None
        self._applied_s = 0.0
        self._problem: str | None = None
        self._registry = Registry(self.tracking_uri, timeout_s=self._timeout_s)
        root = Path(self._cache_dir) if self._cache_dir else default_root()
        self._cache = ArtifactCache(root, max_bytes=self._cache_bytes)
        self._router = Router(
            tuple(self._model_outputs), self._version_column, self.segments, self._record
        )
        self._slots = Slots(
            self.name, self._registry, self._cache, self._wanted, self._policy,
            recorded=self._router.recent, changed=self._changed,
        )  # fmt: skip
        self._router.slots = self._slots
        uri, reference = self._registry.tracking_uri, str(self.reference)
        self._last = self._cache.last_served(uri, reference)
        self._watcher = Watcher(self._registry, self.name, self._seen, poll_s=self._poll_s)
        try:
            self._start()
        except BaseException:
            self.teardown()
            raise
        self._watcher.start()

    def teardown(self) -> None:
        """Stop following the registry and unload everything."""
        for part in ("_watcher", "_router", "_slots", "_registry"):
            held = getattr(self, part, None)
            if held is not None:
                held.close()

    def predict(self, columns: Columns) -> Columns:
        """Rows grouped by version, scored, and put back in order."""
        pins = columns.get(PIN)
        if pins is None:
            return self._router.score(columns)
        return self._router.score({n: v for n, v in columns.items() if n != PIN}, pins)

    def status(self) -> dict[str, Any]:
        """``{"model", "alias", "serving", "versions": [{"version", "state", "serving", "code",
        "reason", "bytes", "vram_bytes", "inflight", "digest", "notes"}], "registry": {"problem",
        "age_s"}, "rollout": {…} | None, "mirror": {"mirrored", "dropped"}, "problem"}``."""
        seen_s = self._watcher.seen_s
        rollout = self._rollout
        return {
            "model": self.name,
            "alias": None if self.reference.version is not None else self.alias,
            "serving": self._slots.serving,
            "versions": self._slots.status(),
            "registry": {
                "problem": self._watcher.problem,
                "age_s": None if seen_s is None else round(time.monotonic() - seen_s, 3),
            },
            "rollout": None if rollout is None else rollout.model_dump(mode="json"),
            "mirror": self._router.mirrored(),
            "problem": self._problem,
        }

    def drain_reports(self) -> Report:
        """What was counted since the last call, by version and segment."""
        return self._router.drain()

    def apply(self, state: str | None) -> bool:
        """Follow this rollout state (text of the tag; None: no rollout) now, ahead of the next
        poll. Raises ConfigError for a text that is none."""
        if state is not None:
            RolloutState.from_tag(state)
        with self._lock:
            if self._state is None:
                return False
            self._applied_s = time.monotonic()
            tags = {k: v for k, v in self._state.tags.items() if k != ROLLOUT_TAG}
            if state is not None:
                tags[ROLLOUT_TAG] = state
            self._follow(dataclasses.replace(self._state, tags=tags))
        self._watcher.ask_now()
        return True

    def ask_now(self) -> None:
        """Read the registry at once instead of at the next poll."""
        self._watcher.ask_now()

    def versions(self) -> list[str]:
        """Versions that take rows now, the serving one first."""
        return self._slots.versions()

    def notes(self) -> list[str]:
        """What readiness should say although rows are answered."""
        notes = []
        if self._watcher.problem is not None:
            seen_s = self._watcher.seen_s
            age = "" if seen_s is None else f" for {time.monotonic() - seen_s:.0f} s"
            notes.append(
                f"the registry has not answered{age}; version {self._slots.serving} of "
                f"{self.name!r} goes on: {self._watcher.problem}"
            )
        for each in self._slots.status():
            if each["reason"]:
                text = f"version {each['version']} of {self.name!r} is refused: {each['reason']}"
                notes.append(text)
        return notes

    def _start(self) -> None:
        last = self._last
        try:
            self._watcher.read()
        except RegistryError as error:
            if last is None:
                raise
            _LOG.warning("%s; version %s, which served last, does", error, last.version)
            self._slots.desire((last.version,), {last.version: last})
        if not self._slots.wait(self._startup_timeout_s):
            raise RegistryError(
                f"no version of {self.name!r} was loaded within {self._startup_timeout_s:g} s"
            )
        if self._slots.live(None):
            return
        refused = [each for each in self._slots.status() if each["reason"]]
        if last is not None and last.version not in [each["version"] for each in refused]:
            versions = (*(each["version"] for each in refused), last.version)
            self._slots.desire(versions, {last.version: last})
            self._slots.wait(self._startup_timeout_s)
            if self._slots.live(None):
                return
        first = refused[0] if refused else {"version": "?", "code": "registry", "reason": "none"}
        text = f"version {first['version']} of {self.name!r} is refused: {first['reason']}"
        raise error_of(first["code"], text)

    def _seen(self, state: ModelState, began_s: float) -> None:
        with self._lock:
            if began_s >= self._applied_s:
                self._follow(state)

    def _follow(self, state: ModelState) -> None:
        """Do what the registry says. What is wrong with it is noted, and the rest done."""
        self._problem = None
        self._state = state
        rollout = self._rollout_of(state)
        if self.reference.version is not None:
            wanted: list[str] = [self.reference.version]
        elif rollout is not None:
            wanted = list(rollout.versions)
        else:
            named = state.aliases.get(self.alias)
            if named is None:
                self._problem = f"model {self.name!r} has no alias {self.alias!r}"
                if self._slots.serving is None:
                    raise error_of("unknown_model", self._problem)
                return
            wanted = [named]
        wanted += [
            v.strip() for v in state.tags.get(LIVE_TAG, "").split(",") if v.strip().isdigit()
        ]
        last = self._last
        if self._slots.serving is None and last is not None and self._slots.refusal(wanted[0]):
            wanted.append(last.version)
        self._slots.desire(tuple(dict.fromkeys(wanted)))
        if rollout != self._rollout:
            self._rollout = rollout
            self._router.route(self._route(rollout))

    def _rollout_of(self, state: ModelState) -> RolloutState | None:
        text = state.rollout
        if text is None or self.reference.version is not None:
            return None
        try:
            found = RolloutState.from_tag(text)
        except TwinpathError as error:
            self._problem = error.message
            return None
        return found if found.live and found.alias == self.alias else None

    def _route(self, rollout: RolloutState | None) -> Route:
        if rollout is None:
            return Route()
        split = Split.of(rollout)
        if split.key is None and self.key is not None:
            split = dataclasses.replace(split, key=self.key)
        segments = tuple(dict.fromkeys((*self.segments, *rollout.segments)))
        return Route(
            split, rollout.incumbent, rollout.challenger, rollout.id, segments, rollout.bins
        )

    def _changed(self) -> None:
        """Another version serves: it is the one to go on with should the registry be down."""
        info = self._slots.serving_info()
        if info is not None:
            self._last = info
            self._cache.remember(self._registry.tracking_uri, str(self.reference), info)


def _types(specs: Mapping[str, str]) -> dict[str, ColumnType]:
    return {name: ColumnType.parse(spec) for name, spec in specs.items()}
