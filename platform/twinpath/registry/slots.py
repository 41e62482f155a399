"""Version slots: the versions of one model that are live in this process, and how they change.

`swap.SwapMachine` decides; this does it. One thread loads and unloads; rows are scored by whoever
holds a slot. Every public method may be called from any thread.
"""

import contextlib
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from twinpath.errors import ModelError, OverloadedError, RegistryError, TwinpathError
from twinpath.graph.columns import Columns
from twinpath.registry.cache import ArtifactCache
from twinpath.registry.client import Registry, unknown_version
from twinpath.registry.loading import LiveModel, Wanted, load_version
from twinpath.registry.memory import give_back
from twinpath.registry.reference import REFUSED_TAG, VersionInfo
from twinpath.registry.swap import (
    Desired,
    Drain,
    Drained,
    Event,
    Failed,
    Instruction,
    Load,
    Loaded,
    Policy,
    Refuse,
    Serve,
    State,
    SwapMachine,
    Tick,
    Unload,
)

_LOG = logging.getLogger(__name__)
#: Reasons that may pass by themselves: what is fetched again, or fits when others have gone.
_PASSING = ("registry", "artifact", "memory_budget", "missing_extra")
#: How soon a thread that waits for the interpreter asks for it while a version is being loaded. An
#: event loop lets go of it at every system call, and would wait so long each time to have it back.
#: (A lower priority of the loading thread makes this worse: it holds the interpreter while it waits
#: for a CPU.)
_SWITCH_S = 0.00002
#: CPython's own.
_USUAL_SWITCH_S = 0.005
_TICK_S = 1.0
#: Looking for what can go back to the system stops everything for a moment; smaller versions leave
#: room that the next one takes.
_WORTH_BYTES = 16 << 20
_TAG_CHARACTERS = 900


@dataclass(eq=False, slots=True)
class Slot:
    """One live version. ``inflight``: calls that it has not answered yet."""

    version: str
    live: LiveModel
    info: VersionInfo
    inflight: int = 0
    draining: bool = False


class Slots:
    """The live versions of one registered model.

    ``recorded`` gives rows that were asked lately, to warm up with. ``changed`` is told, in the
    loading thread, when another version serves or one was refused.
    """

    def __init__(
        self,
        name: str,
        registry: Registry,
        cache: ArtifactCache,
        wanted: Wanted,
        policy: Policy,
        *,
        recorded: Callable[[], Columns | None] = lambda: None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self._registry, self._cache, self._wanted = registry, cache, wanted
        self._recorded, self._changed = recorded, changed
        self._machine = SwapMachine(policy)
        self._lock = threading.RLock()
        self._settled = threading.Condition(self._lock)
        self._slots: dict[str, Slot] = {}
        self._serving: Slot | None = None
        #: What is known of versions whose description the registry need not be asked for.
        self._known: dict[str, VersionInfo] = {}
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(
            target=self._work, daemon=True, name=f"twinpath-slots-{name}"
        )
        self._thread.start()

    def desire(
        self, versions: tuple[str, ...], known: dict[str, VersionInfo] | None = None
    ) -> None:
        """Which versions should be live; the first of them should serve."""
        with self._lock:
            self._known |= known or {}
            if versions != self._machine.desired:
                self._post(Desired(versions))

    def live(self, version: str | None) -> bool:
        """Whether a version takes rows now."""
        slot = self._slots.get(version) if version is not None else self._serving
        return slot is not None and not slot.draining

    @property
    def serving(self) -> str | None:
        """The version that serves."""
        slot = self._serving
        return None if slot is None else slot.version

    def serving_info(self) -> VersionInfo | None:
        """What the registry knows of the version that serves."""
        slot = self._serving
        return None if slot is None else slot.info

    def versions(self) -> list[str]:
        """Versions that take rows now, the serving one first."""
        with self._lock:
            ready = [v for v, slot in self._slots.items() if not slot.draining]
            return sorted(ready, key=lambda v: (v != self.serving, int(v)))

    @contextlib.contextmanager
    def use(self, version: str | None = None) -> Iterator[Slot]:
        """A slot that stays while it is used; the serving one by default. Raises UnknownModelError
        for a version that is not live, OverloadedError while nothing serves."""
        with self._lock:
            slot = self._serving if version is None else self._slots.get(version)
            if slot is None or slot.draining:
                if version is not None:
                    raise unknown_version(self.name, version, self.versions())
                raise OverloadedError(f"no version of model {self.name!r} is loaded yet", 1.0)
            slot.inflight += 1
        try:
            yield slot
        finally:
            self._leave(slot)

    def wait(self, timeout_s: float) -> bool:
        """Wait until every version that should be live is ready or refused."""
        with self._settled:
            return self._settled.wait_for(lambda: self._machine.settled, timeout_s)

    def status(self) -> list[dict[str, Any]]:
        """Each version with its state and, if it was refused, why. Plain data."""
        with self._lock:
            found = []
            for version, (state, code, reason) in self._machine.states().items():
                slot = self._slots.get(version)
                found.append(
                    {
                        "version": version,
                        "state": str(state),
                        "serving": version == self.serving,
                        "code": code,
                        "reason": reason,
                        "bytes": slot.live.host_bytes if slot else 0,
                        "vram_bytes": slot.live.vram_bytes if slot else 0,
                        "inflight": slot.inflight if slot else 0,
                        "digest": slot.live.digest if slot else None,
                        "notes": list(slot.live.notes) if slot else [],
                    }
                )
            return sorted(found, key=lambda each: int(each["version"]))

    def refusal(self, version: str) -> tuple[str, str] | None:
        """Code and reason of a version that was refused."""
        with self._lock:
            state, code, reason = self._machine.states().get(version, (None, "", ""))
            return (code, reason) if state is State.REFUSED else None

    def close(self) -> None:
        """Unload everything. Calls under way go on with what they hold."""
        with self._lock:
            self._closed = True
            self._serving = None
            self._slots.clear()
        self._jobs.put(None)
        self._thread.join(timeout=10)

    def _post(self, event: Event) -> None:
        """Let the machine decide, and begin what it says. Called with the lock held."""
        with self._lock:
            if self._closed:
                return
            for instruction in self._machine.handle(event, time.monotonic()):
                self._begin(instruction)
            if self._machine.settled:
                self._settled.notify_all()

    def _leave(self, slot: Slot) -> None:
        with self._lock:
            slot.inflight -= 1
            if slot.draining and not slot.inflight:
                self._post(Drained(slot.version))

    def _begin(self, instruction: Instruction) -> None:
        match instruction:
            case Load():
                loading = instruction.version
                self._jobs.put(lambda: self._load(loading))
            case Serve(version):
                self._serving = self._slots[version] if version is not None else None
                self._jobs.put(self._changed)
            case Drain(version):
                slot = self._slots[version]
                slot.draining = True
                if not slot.inflight:
                    self._post(Drained(version))
            case Unload(version):
                slot = self._slots.pop(version)
                info, size = slot.info, slot.live.host_bytes
                del slot
                self._jobs.put(lambda: self._unload(info, size))
            case Refuse(version, code, reason):
                _LOG.warning("model %s version %s is refused: %s", self.name, version, reason)
                self._jobs.put(lambda: self._tag(version, f"{code}: {reason}"))
                self._jobs.put(self._changed)

    def _work(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=_TICK_S)
            except queue.Empty:
                self._post(Tick())
                continue
            if job is None:
                return
            try:
                job()
            except Exception:
                _LOG.exception("model %s: a change of versions failed", self.name)

    def _load(self, version: str) -> None:
        sys.setswitchinterval(_SWITCH_S)
        try:
            slot = self._loaded(version)
        except TwinpathError as error:
            event: Event = Failed(version, error.code, error.message, error.code in _PASSING)
        except BaseException as error:
            # SystemExit and the like, from code that a version brought along.
            text = f"{type(error).__name__}: {error}"
            _LOG.warning("model %s version %s: loading raised %s", self.name, version, text)
            event = Failed(version, ModelError.code, text)
        else:
            with self._lock:
                self._slots[version] = slot
            event = Loaded(version)
        finally:
            sys.setswitchinterval(_USUAL_SWITCH_S)
        self._post(event)
        if isinstance(event, Loaded) and slot.info.refused:
            self._tag(version, None)

    def _loaded(self, version: str) -> Slot:
        info = self._info(version)
        location = [""]

        def download(folder: Any) -> Any:
            return self._registry.download(info, folder)

        entry = self._cache.fetch(self._registry.tracking_uri, info, download)
        if any(not each.startswith("sha256:") for each in self._wanted.trust.entries):
            with contextlib.suppress(RegistryError):
                location = [self._registry.location(info)]
        with self._lock:
            used = sum(slot.live.host_bytes for slot in self._slots.values())
            serving = self._serving
        live = load_version(
            entry,
            [info.source, *location],
            self._wanted,
            used_bytes=used,
            recorded=self._recorded(),
            incumbent=serving.live.predict if serving is not None else None,
        )
        return Slot(version, live, info)

    def _info(self, version: str) -> VersionInfo:
        try:
            info = self._registry.version(self.name, version)
        except RegistryError:
            known = self._known.get(version)
            if known is None:
                raise
            return known
        self._known[version] = info
        return info

    def _unload(self, info: VersionInfo, size_bytes: int) -> None:
        self._cache.release(self._registry.tracking_uri, info)
        if size_bytes >= _WORTH_BYTES:
            give_back()

    def _tag(self, version: str, text: str | None) -> None:
        with contextlib.suppress(TwinpathError):
            if text is None:
                self._registry.delete_tag(self.name, REFUSED_TAG, version)
            else:
                self._registry.set_tag(self.name, REFUSED_TAG, text[:_TAG_CHARACTERS], version)
