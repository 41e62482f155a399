"""One request and its answer, whatever the protocol: what codecs read and write.

A codec (a module in `protocols/`) turns a :class:`Request` into a :class:`Call` and the outcome
of the call into an :class:`Answer`. It does no I/O and knows no server, so that the same codec
serves the fast path, any ASGI server and tests.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from twinpath.errors import TwinpathError
from twinpath.graph.columns import Columns, Outcome
from twinpath.online.policy import Priority

Headers = list[tuple[bytes, bytes]]
JSON = b"application/json"


@dataclass(slots=True)
class Request:
    """A whole HTTP request: ``headers`` by lower-case name, ``body`` already complete."""

    path: str
    query: bytes
    headers: Mapping[bytes, bytes]
    body: bytes


@dataclass(slots=True)
class Answer:
    """A whole HTTP answer. ``headers`` are those beside content-type and content-length."""

    status: int
    body: bytes
    media: bytes = JSON
    headers: Headers = field(default_factory=list)


@dataclass(slots=True)
class Call:
    """Rows to run, and how to answer with their outcome.

    ``columns`` fit the graph's input; ``encode`` gets the outcome of exactly these rows, and may
    raise TwinpathError, which then goes to the codec's ``refuse``. ``timeout_s`` and ``priority``
    are what the request's own body asks for, where the protocol has a place for it; so is the
    ``version`` of the model.
    """

    columns: Columns
    encode: Callable[[Outcome], Answer]
    timeout_s: float | None = None
    priority: Priority | None = None
    version: str | None = None


class Codec(Protocol):
    """One inference endpoint of one protocol.

    A protocol's module has ``inference(plane)``, its codecs by exact path below the app's root,
    and ``routes(plane)``, Starlette routes for all else that it answers (metadata, readiness,
    models that are not here).
    """

    def decode(self, request: Request) -> Call | Answer:
        """The rows of a request; an answer at once if there is nothing to run. Raises
        TwinpathError for a request that cannot be read."""

    def refuse(self, error: TwinpathError) -> Answer:
        """The error in the protocol's own form. Retry-After is added by the server."""


class Refused:
    """The codec of a request that is not read, such as one over the limit: it passes the gateway,
    which says who asked and notes it down, and where others are decoded it is refused."""

    def __init__(self, codec: Codec, error: TwinpathError) -> None:
        self._error = error
        self.refuse = codec.refuse

    def decode(self, request: Request) -> Call | Answer:
        """See `Codec`."""
        raise self._error
