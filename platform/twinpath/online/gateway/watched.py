"""A file that somebody may replace while it is in use."""

import contextlib
import time
from pathlib import Path


class Watched:
    """Tells when a file is another one, by its inode, time and size."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._looked_s = time.monotonic()
        self._state = self._stat()

    def changed(self, period_s: float) -> bool:
        """Whether it changed since the last look; looks at most once in ``period_s`` seconds."""
        now_s = time.monotonic()
        if now_s - self._looked_s <= period_s:
            return False
        self._looked_s = now_s
        before, self._state = self._state, self._stat()
        return self._state != before

    def _stat(self) -> tuple[int, int, int] | None:
        with contextlib.suppress(OSError):
            found = self._path.stat()
            return found.st_ino, found.st_mtime_ns, found.st_size
        return None
