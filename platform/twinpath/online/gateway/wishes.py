"""What a caller may ask for in headers: a deadline, a priority, an id; and how many rows."""

import re
import time
from collections.abc import Awaitable

from twinpath.errors import BodyTooLargeError, MalformedBodyError
from twinpath.online.dataplane import Ask
from twinpath.online.policy import Priority

TIMEOUT_HEADER = b"x-request-timeout-ms"
PRIORITY_HEADER = b"x-request-priority"
_NUMBER = re.compile(rb"^\d{1,9}(\.\d{1,6})?$")
_LEVELS = {level.name.lower().encode(): level for level in Priority}


class Deadlines:
    """Rule: ``X-Request-Timeout-Ms`` milliseconds after it came, a request is of no use."""

    def admit(self, ask: Ask) -> Awaitable[None] | None:
        """Raises MalformedBodyError for what is no positive number."""
        given = ask.headers.get(TIMEOUT_HEADER)
        if given is not None:
            if not _NUMBER.match(given) or not float(given):
                raise MalformedBodyError(
                    f"X-Request-Timeout-Ms: {given.decode('latin-1')[:40]!r}: expected a positive "
                    "number of milliseconds"
                )
            asked_s = time.monotonic() + float(given) / 1000
            ask.deadline_s = asked_s if ask.deadline_s is None else min(ask.deadline_s, asked_s)
        return None


class Priorities:
    """Rule: ``X-Request-Priority``, low, normal or high, as far as the caller may."""

    def admit(self, ask: Ask) -> Awaitable[None] | None:
        """Raises MalformedBodyError for any other word."""
        given = ask.headers.get(PRIORITY_HEADER)
        if given is not None:
            level = _LEVELS.get(given.strip().lower())
            if level is None:
                raise MalformedBodyError(
                    f"X-Request-Priority: {given.decode('latin-1')[:40]!r}: expected low, normal "
                    "or high"
                )
            ask.priority = level
        if ask.priority > ask.max_priority:
            ask.priority = ask.max_priority
        return None


class MaxRows:
    """Rule: no request has more rows than this."""

    passive = True

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def admit(self, ask: Ask) -> Awaitable[None] | None:
        """Rows are not known yet."""
        return None

    def admit_rows(self, ask: Ask) -> None:
        """Raises BodyTooLargeError."""
        if ask.rows > self._rows:
            raise BodyTooLargeError(
                f"the request has {ask.rows} rows and the limit is {self._rows}: send fewer rows "
                "in a request, or score them with a batch job"
            )
