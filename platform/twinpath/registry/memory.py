"""The memory budget: refusing with numbers before a version is loaded, a hard stop while it is."""

import contextlib
import ctypes
import ctypes.util
import gc
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from twinpath.errors import MemoryBudgetError, MissingExtraError

#: Part of the memory that is never promised to a model.
HEADROOM = 0.125
#: What a load may reserve beyond what the budget allows: libraries, stacks and arenas of threads.
_SLACK_BYTES = 512 << 20
#: A model in memory takes about this multiple of its files; loading needs both for a moment.
GROWTH = 2.0
_CGROUP_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_limiting = threading.Lock()


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes there are and bytes that are free, of one kind of memory."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Budget:
    """``limit_bytes``: for all versions of a node together; None: what the machine has."""

    limit_bytes: int | None = None
    headroom: float = HEADROOM

    def admit(self, need_bytes: int, used_bytes: int, memory: Memory, what: str = "host") -> int:
        """Bytes that a version may take which needs about ``need_bytes`` beside versions that hold
        ``used_bytes``. Raises MemoryBudgetError with all the numbers when there is not enough."""
        reserve = int(memory.total_bytes * self.headroom)
        allowed = memory.free_bytes - reserve
        why = (
            f"{_gib(memory.free_bytes)} of {_gib(memory.total_bytes)} are free and "
            f"{self.headroom:.1%} ({_gib(reserve)}) stay so"
        )
        if self.limit_bytes is not None:
            left = int(self.limit_bytes * (1 - self.headroom)) - used_bytes
            if left < allowed:
                allowed = left
                why = (
                    f"the budget is {_gib(self.limit_bytes)}, {self.headroom:.1%} of it stay free "
                    f"and other versions hold {_gib(used_bytes)}"
                )
        if need_bytes > allowed:
            raise MemoryBudgetError(
                f"it needs about {_gib(need_bytes)} of {what} memory and may take "
                f"{_gib(max(0, allowed))}: {why}"
            )
        return allowed


def host_memory() -> Memory:
    """The machine's, or the container's where that is less."""
    try:
        import psutil
    except ImportError:
        raise MissingExtraError("psutil", "registry") from None
    found = psutil.virtual_memory()
    total, free = int(found.total), int(found.available)
    for limit_file, used_file in _CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):
            limit = int(Path(limit_file).read_text())
            used = int(Path(used_file).read_text())
            if limit < total:
                # Page cache counts as used there and can be had at once.
                free = min(free, limit - used + _cache_bytes(Path(used_file).parent))
                total = limit
    return Memory(total, max(0, free))


def _cache_bytes(cgroup: Path) -> int:
    found = 0
    with contextlib.suppress(OSError, ValueError):
        for line in (cgroup / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in ("inactive_file", "active_file"):
                found += int(value)
    return found


@contextlib.contextmanager
def limited(extra_bytes: int) -> Iterator[None]:
    """This process may take at most about ``extra_bytes`` more inside; asking for more raises
    MemoryError. The limit is the process's (RLIMIT_DATA: private memory that can be written), so it
    is wide enough for all others in it.
    """
    try:
        import resource
    except ImportError:  # not on this system; the estimate alone has to do
        yield
        return
    with _limiting:
        before = resource.getrlimit(resource.RLIMIT_DATA)
        limit = _data_bytes() + extra_bytes + _SLACK_BYTES
        if before[1] != resource.RLIM_INFINITY:
            limit = min(limit, before[1])
        resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, before)


def _data_bytes() -> int:
    """What counts against RLIMIT_DATA now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0


def give_back() -> None:
    """Return what was freed to the system: glibc keeps it otherwise."""
    gc.collect()
    name = ctypes.util.find_library("c")
    trim = getattr(ctypes.CDLL(name), "malloc_trim", None) if name else None
    if trim is not None:
        trim(0)


def _gib(size_bytes: int) -> str:
    if abs(size_bytes) < 100 * 2**20:
        return f"{size_bytes / 2**20:.1f} MiB"
    return f"{size_bytes / 2**30:.2f} GiB"
