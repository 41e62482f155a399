"""What a node may know of, and say about, the batch that it is given, beside its columns."""

from contextvars import ContextVar

#: When nobody waits for the batch any more, on ``time.monotonic``'s clock; None: there is no end.
DEADLINE_S: ContextVar[float | None] = ContextVar("twinpath_deadline_s", default=None)

_NOTES: ContextVar[dict[str, str] | None] = ContextVar("twinpath_notes", default=None)


def note(subject: str, text: str) -> None:
    """Tell clients something about how their answer came about, such as ("features", "degraded").

    It becomes ``Outcome.notes``, and over HTTP the header ``x-<subject>``. Outside of a run nobody
    is told.
    """
    notes = _NOTES.get()
    if notes is not None:
        notes[subject] = text


def collect_notes() -> dict[str, str]:
    """A fresh mapping that gets the notes of what runs in this context from now on."""
    notes: dict[str, str] = {}
    _NOTES.set(notes)
    return notes
