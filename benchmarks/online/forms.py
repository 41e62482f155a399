"""How rows are put to a server and its answer is read: a form for each kind of server."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.online.models import Array

_HEADER_LENGTH = "Inference-Header-Content-Length"
_JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Form:
    """``encode`` gives a body and headers, which depend on the number of rows alone; ``decode``
    reads the answer's headers and body."""

    encode: Callable[[Array], tuple[bytes, Mapping[str, str]]]
    decode: Callable[[Mapping[str, str], bytes], Array]


def _json(document: Any) -> tuple[bytes, Mapping[str, str]]:
    return json.dumps(document, separators=(",", ":")).encode(), _JSON


def _oip(x: Array) -> tuple[bytes, Mapping[str, str]]:
    data = x.ravel().tolist()
    tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": data}
    return _json({"inputs": [tensor]})


def _from_oip(headers: Mapping[str, str], body: bytes) -> Array:
    [output] = json.loads(body)["outputs"]
    return np.asarray(output["data"], dtype=np.float64).reshape(output["shape"])


def _oip_binary(x: Array) -> tuple[bytes, Mapping[str, str]]:
    raw = np.ascontiguousarray(x, dtype="<f4").tobytes()
    parameters = {"binary_data_size": len(raw)}
    tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "parameters": parameters}
    wanted = {"name": "y", "parameters": {"binary_data": True}}
    head, _ = _json({"inputs": [tensor], "outputs": [wanted]})
    headers = {"Content-Type": "application/octet-stream", _HEADER_LENGTH: str(len(head))}
    return head + raw, headers


def _from_oip_binary(headers: Mapping[str, str], body: bytes) -> Array:
    length = int(headers[_HEADER_LENGTH])
    [output] = json.loads(body[:length])["outputs"]
    return np.frombuffer(body[length:], dtype="<f4").reshape(output["shape"])


FORMS: Mapping[str, Form] = {
    "oip": Form(_oip, _from_oip),
    "oip-binary": Form(_oip_binary, _from_oip_binary),
    # Servers without a protocol of their own for tensors.
    "plain": Form(
        lambda x: _json({"x": x.tolist()}),
        lambda headers, body: np.asarray(json.loads(body)["y"]),
    ),
    "bentoml": Form(
        lambda x: _json({"x": x.tolist()}),
        lambda headers, body: np.asarray(json.loads(body)),
    ),
    "mlflow": Form(
        lambda x: _json({"inputs": x.tolist()}),
        lambda headers, body: np.asarray(json.loads(body)["predictions"]),
    ),
}
