"""What a node may know of, and say about, the batch that it is given, beside its columns."""

from contextvars import ContextVar

#: When nobody waits for the batch any more, on ``time.monotonic``'s clock; None: there is no end.
DEADLINE_S: ContextVar[float | None] = ContextVar("twinpath_deadline_s", default=None)

_REMARKS: ContextVar[dict[str, str] | None] = ContextVar("twinpath_remarks", default=None)


def remark(subject: str, text: str) -> None:
    """Tell clients something about how their answer came about, such as ("features", "degraded").

    It becomes ``Outcome.remarks``, over HTTP the header ``x-<subject>``, and over gRPC a parameter
    of the response. Outside of a run nobody is told.
    """
    remarks = _REMARKS.get()
    if remarks is not None:
        remarks[subject] = text


def collect_remarks() -> dict[str, str]:
    """A fresh mapping that gets the remarks of what runs in this context from now on."""
    remarks: dict[str, str] = {}
    _REMARKS.set(remarks)
    return remarks
