"""Which version is loaded, serves and goes: events in, instructions out, nothing else.

A version goes  wanted → loading → ready → draining → gone,  or is refused while it loads. Two
policies, as TensorFlow Serving has them (AvailabilityPreservingPolicy and
ResourcePreservingPolicy): ``availability`` keeps what serves until its successor is ready;
``resource`` unloads first, so that two versions never need memory at the same time, and answers
nothing in between.

#: ``serving`` is None or a version that is READY: a version takes traffic only after it is.
#: At most one version is loading.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

#: Seconds until a version that was refused for a passing reason is tried again: doubled each time.
RETRY_S = 5.0
RETRY_MAX_S = 300.0


class Policy(StrEnum):
    """What gives way when versions change: memory, or nothing at all."""

    AVAILABILITY = "availability"
    RESOURCE = "resource"


class State(StrEnum):
    """Where a version is."""

    WANTED = "wanted"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Desired:
    """Event: these versions should be live; the first is the one that should serve."""

    versions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Loaded:
    """Event: a version passed every check."""

    version: str


@dataclass(frozen=True, slots=True)
class Failed:
    """Event: a version did not. ``passing`` when another try may end better."""

    version: str
    code: str
    reason: str
    passing: bool = False


@dataclass(frozen=True, slots=True)
class Drained:
    """Event: nothing that a draining version was asked is under way any more."""

    version: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Event: time goes by."""


Event = Desired | Loaded | Failed | Drained | Tick


@dataclass(frozen=True, slots=True)
class Load:
    """Instruction: load and check a version in the background."""

    version: str


@dataclass(frozen=True, slots=True)
class Serve:
    """Instruction: rows that nothing else claims go to this version from now on."""

    version: str | None


@dataclass(frozen=True, slots=True)
class Drain:
    """Instruction: give a version no more rows; tell when it has answered all."""

    version: str


@dataclass(frozen=True, slots=True)
class Unload:
    """Instruction: free what a version holds."""

    version: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """Instruction: say that a version was refused, and why."""

    version: str
    code: str
    reason: str


Instruction = Load | Serve | Drain | Unload | Refuse


@dataclass(slots=True)
class _Version:
    state: State
    code: str = ""
    reason: str = ""
    tries: int = 0
    retry_at_s: float | None = None


@dataclass(slots=True)
class SwapMachine:
    """The machine of one model in one process."""

    policy: Policy = Policy.AVAILABILITY
    desired: tuple[str, ...] = ()
    serving: str | None = None
    _versions: dict[str, _Version] = field(default_factory=dict)

    def states(self) -> dict[str, tuple[State, str, str]]:
        """Version → (state, code, reason); code and reason are of refusals."""
        return {name: (v.state, v.code, v.reason) for name, v in self._versions.items()}

    def state(self, version: str) -> State | None:
        """Where a version is; None for one that is not known here."""
        found = self._versions.get(version)
        return None if found is None else found.state

    @property
    def settled(self) -> bool:
        """Whether every version that should be live is ready or refused."""
        return all(self.state(v) in (State.READY, State.REFUSED) for v in self.desired)

    def handle(self, event: Event, now_s: float) -> list[Instruction]:
        """What to do about an event; ``now_s`` is on any clock that only goes forward."""
        done: list[Instruction] = []
        match event:
            case Desired(versions):
                self._desire(versions)
            case Loaded(version):
                if self.state(version) is State.LOADING:
                    self._versions[version] = _Version(State.READY)
            case Failed(version, code, reason, passing):
                done += self._failed(version, code, reason, passing, now_s)
            case Drained(version):
                if self.state(version) is State.DRAINING:
                    del self._versions[version]
                    done.append(Unload(version))
                    if version in self.desired:
                        self._versions[version] = _Version(State.WANTED)
            case Tick():
                pass
        return done + self._advance(now_s)

    def _desire(self, versions: Sequence[str]) -> None:
        self.desired = tuple(dict.fromkeys(versions))
        for version in self.desired:
            self._versions.setdefault(version, _Version(State.WANTED))
        for version, found in list(self._versions.items()):
            # What was wanted and never began, and refusals nobody waits for, are forgotten.
            if version not in self.desired and found.state in (State.WANTED, State.REFUSED):
                del self._versions[version]

    def _failed(
        self, version: str, code: str, reason: str, passing: bool, now_s: float
    ) -> list[Instruction]:
        found = self._versions.get(version)
        if found is None or found.state is not State.LOADING:
            return []
        if version not in self.desired:
            del self._versions[version]
            return []
        found.state, found.code, found.reason = State.REFUSED, code, reason
        found.tries += 1
        found.retry_at_s = None
        if passing:
            wait_s = min(RETRY_S * 2 ** (found.tries - 1), RETRY_MAX_S)
            found.retry_at_s = now_s + wait_s
        return [Refuse(version, code, reason)]

    def _advance(self, now_s: float) -> list[Instruction]:
        done: list[Instruction] = []
        first = self._first()
        if first is not None and self.serving != first and self.state(first) is State.READY:
            self.serving = first
            done.append(Serve(first))
        if self.policy is Policy.RESOURCE and self._waiting(now_s) is not None:
            done += self._retire(keep_serving=False)
        else:
            done += self._retire(keep_serving=self.serving != first)
        version = self._waiting(now_s)
        busy = any(v.state is State.LOADING for v in self._versions.values())
        if self.policy is Policy.RESOURCE:
            busy |= any(v.state is State.DRAINING for v in self._versions.values())
        if version is not None and not busy:
            found = self._versions[version]
            found.state, found.retry_at_s = State.LOADING, None
            done.append(Load(version))
        return done

    def _first(self) -> str | None:
        """Who should serve: the first that should be live; where nothing serves and it was
        refused, the next one."""
        for version in self.desired:
            if self.serving is not None or self.state(version) is not State.REFUSED:
                return version
        return self.desired[0] if self.desired else None

    def _waiting(self, now_s: float) -> str | None:
        """The next version to load: those that should be live, in their order."""
        for version in self.desired:
            found = self._versions[version]
            again = found.retry_at_s is not None and now_s >= found.retry_at_s
            if found.state is State.WANTED or (found.state is State.REFUSED and again):
                return version
        return None

    def _retire(self, keep_serving: bool) -> list[Instruction]:
        """Drain what is ready and should not be live, but for the one that serves until its
        successor does."""
        done: list[Instruction] = []
        for version, found in self._versions.items():
            if found.state is not State.READY or version in self.desired:
                continue
            if version == self.serving:
                if keep_serving:
                    continue
                self.serving = None
                done.append(Serve(None))
            found.state = State.DRAINING
            done.append(Drain(version))
        return done
