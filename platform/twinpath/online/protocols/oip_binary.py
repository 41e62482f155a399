"""Binary tensor requests whose JSON is one that came before.

Clients that send tensors in binary repeat the same few hundred bytes of JSON before them, request
after request, as long as the number of rows stays the same. What it says is read once: from then on
such a request costs one look into a dictionary and a view of its bytes.
(https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from twinpath.graph.columns import Columns, Outcome
from twinpath.online.dataplane import whole
from twinpath.online.exchange import Answer
from twinpath.online.policy import Priority
from twinpath.online.protocols.oip_tensors import NUMPY, to_raw

#: So many heads are remembered, none longer than this.
_BOUND = 256
_LONGEST_BYTES = 4096

Encode = Callable[[Outcome], Answer]


class Head:
    """What the JSON before binary tensors says: where each tensor is, and how to answer.

    ``encode`` is the long way, which is taken once. ``outputs`` names those to give in binary, in
    their order; None where an answer depends on more than the number of rows.
    """

    __slots__ = ("_encode", "_outputs", "_places", "_start", "priority", "tail_bytes", "timeout_s")

    def __init__(
        self,
        places: Sequence[tuple[str, np.dtype[Any], tuple[int, ...], int, int]],
        tail_bytes: int,
        encode: Encode,
        outputs: Sequence[str] | None,
        timeout_s: float | None,
        priority: Priority | None,
    ) -> None:
        self._places, self.tail_bytes = places, tail_bytes
        self._encode, self._outputs = encode, outputs
        self.timeout_s, self.priority = timeout_s, priority
        #: An answer without its tensors: headers, media and the JSON before them.
        self._start: tuple[bytes, bytes, list[tuple[bytes, bytes]]] | None = None

    def columns(self, body: bytes, at: int) -> Columns:
        """Read-only views of the tensors in a body, behind its first ``at`` bytes."""
        return {
            name: np.frombuffer(body, dtype, count, at + start).reshape(shape)
            for name, dtype, shape, count, start in self._places
        }

    def encode(self, outcome: Outcome) -> Answer:
        """The outcome of such a request. Raises the first row's error."""
        if self._start is None or self._outputs is None:
            answer = self._encode(outcome)
            if self._outputs is not None and answer.status == 200:
                size = sum(len(to_raw(outcome.columns[name])) for name in self._outputs)
                start = answer.body[: len(answer.body) - size]
                self._start = (start, answer.media, answer.headers.copy())
            return answer
        columns = whole(outcome)
        start, media, headers = self._start
        tail = [to_raw(columns[name]) for name in self._outputs]
        return Answer(200, b"".join((start, *tail)), media, headers.copy())


class Heads:
    """Those that came lately, by their bytes. ``tensors``: datatype and shape of each input of a
    model of which nothing else is checked."""

    def __init__(self, tensors: Mapping[str, tuple[str, list[int]]]) -> None:
        self._tensors = tensors
        self._known: dict[bytes, Head] = {}

    def find(self, head: bytes) -> Head | None:
        """What these bytes were found to say."""
        return self._known.get(head)

    def remember(
        self,
        head: bytes,
        document: Mapping[str, Any],
        encode: Encode,
        outputs: Sequence[str] | None,
        urgency: tuple[float | None, Priority | None],
    ) -> None:
        """Note what the JSON of a request that was found good says; nothing for one with an id,
        which does not come again, or with a tensor that is not in binary or to be converted."""
        if len(head) > _LONGEST_BYTES or "id" in document:
            return
        places, at = [], 0
        for tensor in document["inputs"]:
            name, datatype, shape = tensor["name"], tensor["datatype"], tensor["shape"]
            wanted = self._tensors[name]
            size = (tensor.get("parameters") or {}).get("binary_data_size")
            dtype = NUMPY[datatype]
            if size is None or datatype != wanted[0] or shape[1:] != wanted[1]:
                return
            if dtype.hasobject or datatype == "BF16" or dtype != dtype.newbyteorder("<"):
                return
            places.append((name, dtype, tuple(shape), size // dtype.itemsize, at))
            at += size
        if len(self._known) >= _BOUND:
            self._known.clear()
        self._known[head] = Head(places, at, encode, outputs, *urgency)
