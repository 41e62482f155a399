"""The bound of mirrored work: copies for the challenger are dropped, never queued. Pure."""

from dataclasses import dataclass


@dataclass(slots=True)
class MirrorBudget:
    """Whether a batch may be mirrored now.

    #: At most ``max_rows`` copies are under way, and none begins while the primary's queue holds
    #: more than ``max_queued`` rows: what the challenger takes is never taken from an answer.
    """

    max_rows: int = 256
    max_queued: int = 64
    running: int = 0
    mirrored: int = 0
    dropped: int = 0

    def admit(self, rows: int, queued: int = 0) -> bool:
        """Whether these rows may go to the challenger as well; if so, call :meth:`done` after."""
        if queued > self.max_queued or self.running + rows > self.max_rows:
            self.dropped += rows
            return False
        self.running += rows
        self.mirrored += rows
        return True

    def done(self, rows: int) -> None:
        """Copies that were admitted are scored, or failed."""
        self.running -= rows
