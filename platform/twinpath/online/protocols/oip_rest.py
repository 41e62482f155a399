"""Open Inference Protocol v2 over REST: inference.

https://github.com/kserve/open-inference-protocol, with the extensions of Triton's server for binary
tensor data, classification and request parameters
(https://github.com/triton-inference-server/server/tree/main/docs/protocol). A request succeeds or
fails as one. JSON is strict: NaN and infinities are written as null, and null is read as NaN.
"""

import gzip
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from twinpath.errors import (
    InputError,
    MalformedBodyError,
    TwinpathError,
    did_you_mean,
)
from twinpath.graph.columns import Columns, Outcome
from twinpath.online import pins
from twinpath.online.dataplane import DataPlane, whole
from twinpath.online.exchange import Answer, Call, Codec, Headers, Request
from twinpath.online.policy import Priority
from twinpath.online.protocols.oip_binary import Heads
from twinpath.online.protocols.oip_body import HEADER_LENGTH, document_of, inflated, length_of
from twinpath.online.protocols.oip_floats import LEAST_BYTES, FloatTensors
from twinpath.online.protocols.oip_tensors import (
    as_texts,
    datatype_of,
    from_json,
    from_raw,
    shape_of,
    to_column,
    to_raw,
)

_BINARY = b"application/octet-stream"
_GZIP_FROM_BYTES = 1024


def inference(plane: DataPlane) -> dict[str, Codec]:
    """Codecs by path below the app's root."""
    codec = InferCodec(plane)
    paths = [f"/v2/models/{plane.name}/infer"]
    paths += [f"/v2/models/{plane.name}/versions/{v}/infer" for v in plane.metadata.versions]
    return dict.fromkeys(paths, codec)


def refuse(error: TwinpathError) -> Answer:
    """An error in the protocol's form."""
    return Answer(error.http_status, orjson.dumps({"error": error.message}))


class InferCodec:
    """``POST /v2/models/<graph>/infer``."""

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane
        self._inputs, self._outputs = plane.metadata.inputs, plane.metadata.outputs
        self._datatypes = {name: datatype_of(kind) for name, kind in self._outputs.items()}
        #: Datatype and shape of each input, if dtype and shape are all that is checked of any.
        self._tensors: dict[str, tuple[str, list[int]]] | None = None
        if plane.plan.input_schema.only_tensors:
            self._tensors = {
                name: (datatype_of(kind), list(kind.shape or ()))
                for name, kind in self._inputs.items()
            }
        self._before = None if self._tensors is None else Heads(self._tensors)
        self._floats: FloatTensors | None = None
        if self._tensors is not None and FloatTensors.can_read(self._tensors):
            self._floats = FloatTensors(self._tensors)
        self._starts: dict[str, bytes] = {}
        self._heads = {
            name: (
                orjson.dumps({"name": name, "datatype": datatype_of(kind)})[:-1] + b',"shape":',
                None if kind.shape is None else b"".join(b",%d" % s for s in kind.shape) + b"]",
            )
            for name, kind in self._outputs.items()
        }
        #: What is asked for when a request names no outputs.
        self._all = [Output(name) for name in self._outputs]

    def decode(self, request: Request) -> Call | Answer:
        """See `exchange.Codec`."""
        headers = request.headers
        body = request.body
        if b"content-encoding" in headers:
            body = inflated(headers[b"content-encoding"], body)
        zipped = b"gzip" in headers.get(b"accept-encoding", b"")
        version = pins.asked(request.path, headers) if self._plane.pinnable else None
        head = None
        length = headers.get(HEADER_LENGTH)
        size = None if length is None else length_of(length)
        if self._before is not None and size is not None and not zipped and version is None:
            head = body[:size]
            known = self._before.find(head)
            if known is not None and size + known.tail_bytes == len(body):
                columns = known.columns(body, size)
                return Call(columns, known.encode, known.timeout_s, known.priority)
        if self._floats is not None and length is None and not zipped and len(body) >= LEAST_BYTES:
            plain = self._floats.columns(body)
            if plain is not None:
                return Call(plain, self._all_of(version))
        document, tail = document_of(body, length)
        bools = b"true" in body or b"false" in body
        if tail is None and len(document) == 1 and b"accept-encoding" not in headers:
            plain = self._plain(document, bools)
            if plain is not None:
                return Call(plain, self._all_of(version))
        columns = self._plane.checked(self._columns(document, tail, bools))
        parameters = _parameters(document)
        wanted = self.wanted(document, parameters)
        request_id = document.get("id")

        def encode(outcome: Outcome) -> Answer:
            return self._encode(outcome, wanted, request_id, zipped, version)

        timeout_s, priority = urgency(parameters) if parameters else (None, None)
        if head is not None and self._before is not None:
            outputs = self._fixed(wanted)
            self._before.remember(head, document, encode, outputs, (timeout_s, priority))
        return Call(columns, encode, timeout_s, priority)

    def refuse(self, error: TwinpathError) -> Answer:
        """See `exchange.Codec`."""
        return refuse(error)

    def _plain(self, document: dict[str, Any], bools: bool) -> Columns | None:
        """The columns of the plainest request: each input of the model, of exactly its datatype
        and shape, and nothing else. None for any other, which takes the longer way."""
        inputs = document.get("inputs")
        wanted = self._tensors
        if wanted is None or type(inputs) is not list or len(inputs) != len(wanted):
            return None
        columns: Columns = {}
        for tensor in inputs:
            if type(tensor) is not dict or len(tensor) != 4:
                return None
            name = tensor.get("name")
            if not isinstance(name, str):
                return None
            known = wanted.get(name)
            shape, data = tensor.get("shape"), tensor.get("data")
            if (
                known is None
                or tensor.get("datatype") != known[0]
                or type(shape) is not list
                or shape[1:] != known[1]
                or type(shape[0]) is not int
                or type(data) is not list
            ):
                return None
            values = from_json(name, known[0], shape, data, may_hold_bools=bools)
            columns[name] = values
        if len(columns) != len(wanted):
            return None
        same_rows(columns)
        return columns

    def _fixed(self, wanted: "list[Output]") -> list[str] | None:
        """The names of the outputs that are asked for, if all are numbers in binary."""
        for output in wanted:
            kind = self._outputs[output.name]
            as_in_memory = kind.numpy_dtype.kind not in "OM" and kind.dtype != "bfloat16"
            if not output.binary or output.classes or not as_in_memory:
                return None
        return [output.name for output in wanted]

    def _head(self, version: str | None) -> dict[str, Any]:
        plane = self._plane
        return {"model_name": plane.name, "model_version": version or plane.version}

    def _all_of(self, version: str | None) -> Callable[[Outcome], Answer]:
        """Encodes all outputs of a request that asked for none."""
        if version is None:
            return self._encode_all
        return lambda outcome: self._encode_all(outcome, version)

    def _encode_all(self, outcome: Outcome, version: str | None = None) -> Answer:
        """All outputs as JSON; like `_encode`, with all but the numbers prepared."""
        columns = whole(outcome)
        version = version or self._plane.version
        start = self._starts.get(version)
        if start is None:
            if len(self._starts) > 100:
                self._starts.clear()
            start = orjson.dumps(self._head(version))[:-1] + b',"outputs":['
            self._starts[version] = start
        parts = [start]
        for name, (head, tail_shape) in self._heads.items():
            values = columns[name]
            if values.dtype.kind in "OM":
                data = orjson.dumps(as_texts(values))
            else:
                flat = values if values.ndim == 1 else np.ascontiguousarray(values).ravel()
                data = orjson.dumps(flat, option=orjson.OPT_SERIALIZE_NUMPY)
            if tail_shape is None:
                shape = orjson.dumps(values.shape)
            else:
                shape = b"[%d%b" % (len(values), tail_shape)
            parts += (head, shape, b',"data":', data, b"},")
        parts[-1] = b"}]}"
        return Answer(200, b"".join(parts))

    def _columns(self, document: dict[str, Any], tail: memoryview | None, bools: bool) -> Columns:
        given = document.get("inputs")
        if not isinstance(given, list) or not given:
            raise MalformedBodyError(
                'expected {"inputs": [{"name", "shape", "datatype", "data"}]}: put the tensors '
                'in a list under "inputs"'
            )
        columns: Columns = {}
        at = 0
        for tensor in given:
            if not isinstance(tensor, dict) or not isinstance(tensor.get("name"), str):
                raise MalformedBodyError(f"an input must have a name; got {str(tensor)[:80]}")
            name = tensor["name"]
            kind = self._inputs.get(name)
            if kind is None:
                raise InputError(f"unknown input {name!r}.{did_you_mean(name, self._inputs)}")
            if name in columns:
                raise InputError(f"input {name!r} is given twice")
            datatype, shape = tensor.get("datatype"), tensor.get("shape")
            size = (tensor.get("parameters") or {}).get("binary_data_size")
            if size is not None:
                if tail is None or type(size) is not int or not 0 <= size <= len(tail) - at:
                    raise InputError(
                        f"input {name!r}: binary_data_size {size!r} is more than the body has "
                        f"behind its JSON: send {HEADER_LENGTH.decode()} and the bytes"
                    )
                values = from_raw(name, datatype, shape, tail[at : at + size])  # type: ignore[arg-type]  # checked there
                at += size
            elif "data" in tensor:
                data = tensor["data"]
                values = from_json(name, datatype, shape, data, may_hold_bools=bools)  # type: ignore[arg-type]  # checked there
            else:
                raise InputError(f"input {name!r} has neither data nor binary_data_size")
            columns[name] = to_column(name, kind, values)
        if tail is not None and at != len(tail):
            raise InputError(f"{len(tail) - at} bytes behind the last binary input: remove them")
        same_rows(columns)
        return columns

    def wanted(self, document: dict[str, Any], parameters: Mapping[str, Any]) -> "list[Output]":
        """The outputs to give. Raises InputError for one that the graph does not have."""
        asked = document.get("outputs")
        binary = parameters.get("binary_data_output") is True
        if not asked:
            return [Output(o.name, True) for o in self._all] if binary else self._all
        if not isinstance(asked, list):
            raise MalformedBodyError('"outputs" must be a list of {"name"}')
        wanted = []
        for output in asked:
            name = output.get("name") if isinstance(output, dict) else None
            if not isinstance(name, str):
                raise MalformedBodyError(f"an output must have a name; got {str(output)[:80]}")
            if name not in self._outputs:
                raise InputError(f"unknown output {name!r}.{did_you_mean(name, self._outputs)}")
            more = _parameters(output)
            top = more.get("classification", 0)
            if type(top) is not int or top < 0:
                raise InputError(
                    f"output {name!r}: classification {top!r} must be a number of classes"
                )
            wanted.append(Output(name, more.get("binary_data", binary) is True, top))
        return wanted

    def _encode(
        self,
        outcome: Outcome,
        wanted: "list[Output]",
        request_id: Any,
        zipped: bool,
        version: str | None,
    ) -> Answer:
        columns = whole(outcome)
        document: dict[str, Any] = self._head(version)
        if request_id is not None:
            document["id"] = request_id
        tail: list[bytes] = []
        document["outputs"] = [
            self._tensor(output, columns[output.name], tail) for output in wanted
        ]
        body = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
        headers: Headers = []
        media = b"application/json"
        if tail:
            headers.append((HEADER_LENGTH, b"%d" % len(body)))
            body = b"".join([body, *tail])
            media = _BINARY
        if zipped and len(body) >= _GZIP_FROM_BYTES:
            body = gzip.compress(body, 1)
            headers.append((b"content-encoding", b"gzip"))
        return Answer(200, body, media, headers)

    def _tensor(self, output: "Output", values: NDArray[Any], tail: list[bytes]) -> dict[str, Any]:
        datatype = self._datatypes[output.name]
        if output.classes:
            values, datatype = classified(output.name, values, output.classes), "BYTES"
        tensor: dict[str, Any] = {
            "name": output.name, "datatype": datatype, "shape": list(values.shape),
        }  # fmt: skip
        if output.binary:
            raw = to_raw(values, datatype)
            tail.append(raw)
            tensor["parameters"] = {"binary_data_size": len(raw)}
        elif values.dtype.kind in "OM":
            tensor["data"] = as_texts(values)
        elif values.ndim == 1 and values.flags.c_contiguous:
            tensor["data"] = values
        else:
            tensor["data"] = np.ascontiguousarray(values).ravel()
        return tensor


class Output:
    """One tensor that was asked for."""

    __slots__ = ("binary", "classes", "name")

    def __init__(self, name: str, binary: bool = False, classes: int = 0) -> None:
        self.name, self.binary, self.classes = name, binary, classes


def classified(name: str, values: NDArray[Any], top: int) -> NDArray[Any]:
    """The classification extension: ``value:index`` of the highest values of each row, (n, top).

    Raises InputError for an output that is no numeric tensor of shape (n, classes).
    """
    if values.ndim != 2 or values.dtype.kind not in "iuf":
        raise InputError(f"output {name!r} has no classes: it is no numeric tensor of shape [n, k]")
    order = np.argsort(-values, axis=1, kind="stable")[:, :top]
    texts = np.empty(order.shape, dtype=object)
    for row, picked in enumerate(order.tolist()):
        for place, index in enumerate(picked):
            texts[row, place] = f"{values[row, index]:f}:{index}"
    return texts


def metadata(plane: DataPlane) -> dict[str, Any]:
    """Model metadata of the protocol."""
    known = plane.metadata
    return {
        "name": known.name,
        "versions": list(known.versions),
        "platform": "twinpath",
        "inputs": [_described(name, kind) for name, kind in known.inputs.items()],
        "outputs": [_described(name, kind) for name, kind in known.outputs.items()],
    }


def _described(name: str, kind: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype_of(kind), "shape": shape_of(kind)}


def _parameters(holder: Mapping[str, Any]) -> Mapping[str, Any]:
    given = holder.get("parameters")
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise MalformedBodyError(f'"parameters" must be an object, got {str(given)[:80]}')
    return given


def urgency(parameters: Mapping[str, Any]) -> tuple[float | None, Priority | None]:
    """Seconds until the answer is of no use, and the priority: Triton's request parameters
    ``timeout`` (microseconds) and ``priority`` (1 is the highest, 0 the model's own)."""
    timeout, level = parameters.get("timeout"), parameters.get("priority")
    for name in ("sequence_id", "sequence_start", "sequence_end"):
        if parameters.get(name):
            raise InputError(f"parameter {name!r}: sequences are not kept here: send without it")
    if timeout is not None and (type(timeout) is not int or timeout < 0):
        raise InputError(f"parameter 'timeout': expected microseconds, got {timeout!r}")
    if level is not None and (type(level) is not int or level < 0):
        raise InputError(f"parameter 'priority': expected 0, 1, 2 …, got {level!r}")
    priority = None
    if level:
        priority = {1: Priority.HIGH, 2: Priority.NORMAL}.get(level, Priority.LOW)
    return (timeout / 1e6 if timeout else None), priority


def same_rows(columns: Columns) -> None:
    """Raises InputError when columns differ in their number of rows."""
    if not columns:
        raise InputError("no inputs: send a tensor for each of the model's inputs")
    first, *others = columns.items()
    for name, values in others:
        if len(values) != len(first[1]):
            raise InputError(
                f"input {name!r} has {len(values)} rows and {first[0]!r} has {len(first[1])}"
            )
