"""TensorFlow Serving's REST API, version 1: a graph answers the clients of that server.

Rows come as ``instances`` or, by column, as ``inputs``; the answer is ``predictions`` or
``outputs`` in the same way. A model of one input takes bare values, and a single output is given
bare. ``:classify`` and ``:regress`` need outputs that can be read as classes and scores, or as one
number. The one signature is ``serving_default``. Other than there, NaN is null in answers and
refused in requests: both sides are strict JSON. A request succeeds or fails as one.
"""

import base64
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request as StarletteRequest
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route

from twinpath.errors import (
    EmptyBodyError,
    InputError,
    MalformedBodyError,
    TwinpathError,
    UnknownModelError,
    did_you_mean,
)
from twinpath.graph.columns import Columns, Outcome
from twinpath.graph.dtypes import ColumnType
from twinpath.online.dataplane import DataPlane, whole
from twinpath.online.exchange import Answer, Call, Codec, Request
from twinpath.online.protocols.json_rows import (
    RowReader,
    RowWriter,
    bare_input,
    dumps,
    read_object,
    rows_of,
    shown,
)

SIGNATURE = "serving_default"
Outputs = Mapping[str, ColumnType]
Reading = Callable[[Outputs], Callable[[Columns], list[Any]]]

_ROOT = "/v1/models"
_VERBS = ("predict", "classify", "regress")
_DTYPES = {
    "bool": "DT_BOOL", "int8": "DT_INT8", "int16": "DT_INT16", "int32": "DT_INT32",
    "int64": "DT_INT64", "uint8": "DT_UINT8", "uint16": "DT_UINT16", "uint32": "DT_UINT32",
    "uint64": "DT_UINT64", "float16": "DT_HALF", "bfloat16": "DT_BFLOAT16",
    "float32": "DT_FLOAT", "float64": "DT_DOUBLE", "str": "DT_STRING",
    "datetime64[us]": "DT_STRING", "any": "DT_VARIANT",
}  # fmt: skip


def inference(plane: DataPlane) -> dict[str, Codec]:
    """Codecs by path below the app's root."""
    model = f"{_ROOT}/{plane.name}"
    places = [model, *(f"{model}/versions/{version}" for version in plane.metadata.versions)]
    codecs: tuple[Codec, ...] = (
        PredictCodec(plane),
        ExamplesCodec(plane, classification),
        ExamplesCodec(plane, regression),
    )
    verbs = dict(zip(_VERBS, codecs, strict=True))
    return {f"{place}:{verb}": codec for place in places for verb, codec in verbs.items()}


def routes(plane: DataPlane) -> list[BaseRoute]:
    """Status and metadata; models, versions and verbs that are not here. KServe's first protocol
    is this one, with a liveness at the root and ``ready`` in the status: its clients ask for both.
    """

    async def alive(request: StarletteRequest) -> JSONResponse:
        return JSONResponse({"status": "alive"})

    async def answer(request: StarletteRequest) -> JSONResponse:
        place: str = request.path_params["place"]
        place, colon, verb = place.partition(":")
        about = not colon and place.endswith("/metadata")
        allowed = "POST" if colon else "GET"
        try:
            version = _version_of(plane, place.removesuffix("/metadata").split("/"))
            if colon and verb not in _VERBS:
                raise UnknownModelError(f"no verb {verb!r} here.{did_you_mean(verb, _VERBS)}")
            if request.method != allowed:
                text = f"{request.method} is not allowed here: expected {allowed}"
                return JSONResponse({"error": text}, 405, {"Allow": allowed})
            document = _metadata(plane, version) if about else await _status(plane, version)
        except TwinpathError as error:
            return JSONResponse({"error": error.message}, _status_code(error))
        return JSONResponse(document)

    return [
        Route("/", alive),
        Route(_ROOT + "/{place:path}", answer, methods=["GET", "POST"]),
    ]


class PredictCodec:
    """``POST /v1/models/<graph>:predict``."""

    def __init__(self, plane: DataPlane) -> None:
        self._schema = plane.plan.input_schema
        self._reader = RowReader(self._schema, "instances")
        self._writer = RowWriter(plane.plan.output_schema)
        self._bare = bare_input(self._schema)
        outputs = plane.metadata.outputs.items()
        #: Outputs that may hold bytes.
        self._bytes = {n for n, kind in outputs if kind.dtype == "any" or n.endswith("_bytes")}

    def decode(self, request: Request) -> Call | Answer:
        """See `exchange.Codec`."""
        if b'"instances"' in request.body[:80] and b'"b64"' not in request.body:
            quick = self._reader.quick(request.body)
            if quick is not None:
                return Call(quick.columns, self._predictions)
        document = _document(request.body, '{"instances": [...]}', {"instances", "inputs"})
        given = {"instances", "inputs"} & document.keys()
        if len(given) != 1:
            raise MalformedBodyError(
                f'expected one of "instances" (by row) and "inputs" (by column), got '
                f"{', '.join(map(repr, sorted(given))) or 'neither'}: send exactly one"
            )
        key = given.pop()
        if key == "inputs":
            return Call(self._by_column(document[key]), self._outputs)
        return Call(self._by_row(document[key]), self._predictions)

    def refuse(self, error: TwinpathError) -> Answer:
        """See `exchange.Codec`."""
        return refusal(error)

    def _by_row(self, rows: Any) -> Columns:
        if not isinstance(rows, list):
            raise MalformedBodyError(f'"instances": expected a list, got {shown(rows)}')
        if not rows:
            raise EmptyBodyError('"instances" is an empty list: send at least one')
        if all(isinstance(row, dict) for row in rows):
            return whole(self._reader.rows(rows))
        if any(isinstance(row, dict) for row in rows):
            text = '"instances" mixes objects with bare values: send one kind'
            raise MalformedBodyError(text)
        return self._by_column({self._bare_name(rows[0]): rows})

    def _by_column(self, given: Any) -> Columns:
        if not isinstance(given, dict):
            given = {self._bare_name(given): given}
        fields = self._schema.fields
        lists = {name: _texts(values, fields.get(name)) for name, values in given.items()}
        return whole(self._reader.columns(lists))

    def _bare_name(self, value: Any) -> str:
        if self._bare is None:
            names = ", ".join(map(repr, self._schema.fields))
            raise MalformedBodyError(
                f"got the bare value {shown(value)}, and this model has the inputs {names}: "
                'name them, as in {"<input>": <value>}'
            )
        return self._bare

    def _predictions(self, outcome: Outcome) -> Answer:
        lists = self._lists(outcome)
        if len(lists) == 1:
            return Answer(200, dumps({"predictions": next(iter(lists.values()))}))
        return Answer(200, dumps({"predictions": rows_of(lists)}))

    def _outputs(self, outcome: Outcome) -> Answer:
        lists = self._lists(outcome)
        bare = next(iter(lists.values())) if len(lists) == 1 else lists
        return Answer(200, dumps({"outputs": bare}))

    def _lists(self, outcome: Outcome) -> dict[str, list[Any]]:
        lists = self._writer.lists(whole(outcome))
        for name in self._bytes:
            lists[name] = _encoded(lists[name], name)
        return lists


class ExamplesCodec:
    """``:classify`` and ``:regress``. ``reading`` says how results are made of the outputs."""

    def __init__(self, plane: DataPlane, reading: Reading) -> None:
        self._schema = plane.plan.input_schema
        self._reader = RowReader(self._schema, "examples")
        self._outputs, self._reading = plane.metadata.outputs, reading

    def decode(self, request: Request) -> Call | Answer:
        """See `exchange.Codec`."""
        read = self._reading(self._outputs)
        expected = '{"examples": [{...}]}'
        document = _document(request.body, expected, {"examples", "context"})
        context, examples = document.get("context", {}), document.get("examples")
        if not isinstance(context, dict):
            raise MalformedBodyError(f'"context": expected an object, got {shown(context)}')
        if not isinstance(examples, list):
            raise MalformedBodyError(f'"examples": expected a list, got {shown(examples)}')
        if not examples:
            raise EmptyBodyError('"examples" is an empty list: send at least one')
        rows = [self._row(context, example) for example in examples]
        return Call(
            whole(self._reader.rows(rows)),
            lambda outcome: Answer(200, dumps({"result": read(whole(outcome))})),
        )

    def refuse(self, error: TwinpathError) -> Answer:
        """See `exchange.Codec`."""
        return refusal(error)

    def _row(self, context: dict[str, Any], example: Any) -> Any:
        """An example over the context that all share. A feature's value may be in a list."""
        if not isinstance(example, dict):
            return example
        row = context | example
        for name, kind in self._schema.fields.items():
            value = row.get(name)
            if kind.shape == () and isinstance(value, list) and len(value) == 1:
                row[name] = value[0]
        return row


def classification(outputs: Outputs) -> Callable[[Columns], list[Any]]:
    """``[[label, score], …]`` a row: of ``classes`` and ``scores``, of one label and one score,
    of one score for each output, or of a single vector of scores, whose labels are empty.
    Raises InputError for other outputs."""
    floats = _scalars(outputs, "f")
    labels = [n for n, kind in outputs.items() if kind.shape == () and n not in floats]
    only = next(iter(outputs.values()))
    if {"classes", "scores"} <= outputs.keys():
        return lambda columns: [
            [[_label(c), s] for c, s in zip(_listed(classes), _listed(scores), strict=False)]
            for classes, scores in zip(
                columns["classes"].tolist(), columns["scores"].tolist(), strict=True
            )
        ]
    if len(floats) == len(labels) == 1 and len(outputs) == 2:
        label, score = labels[0], floats[0]
        return lambda columns: [
            [[_label(c), s]]
            for c, s in zip(columns[label].tolist(), columns[score].tolist(), strict=True)
        ]
    if len(outputs) == len(floats) > 1:
        return lambda columns: [
            [list(pair) for pair in zip(floats, row, strict=True)]
            for row in zip(*(columns[name].tolist() for name in floats), strict=True)
        ]
    if len(outputs) == 1 and only.numpy_dtype.kind == "f" and len(only.shape or ()) == 1:
        return lambda columns: [
            [["", score] for score in row] for row in next(iter(columns.values())).tolist()
        ]
    raise _unsuited(
        outputs, "classify", "'classes' and 'scores', one label and one float, only floats, or one "
        "vector of floats",
    )  # fmt: skip


def regression(outputs: Outputs) -> Callable[[Columns], list[Any]]:
    """The one number of each row. Raises InputError for outputs without exactly one."""
    numbers = _scalars(outputs, "f") or _scalars(outputs, "iu")
    if len(numbers) == 1:
        return lambda columns: columns[numbers[0]].tolist()
    only = next(iter(outputs.values()))
    if len(outputs) == 1 and only.shape == (1,) and only.numpy_dtype.kind == "f":
        return lambda columns: next(iter(columns.values()))[:, 0].tolist()
    raise _unsuited(outputs, "regress", "exactly one float")


def _scalars(outputs: Outputs, kinds: str) -> list[str]:
    return [n for n, kind in outputs.items() if kind.shape == () and kind.numpy_dtype.kind in kinds]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _label(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, str) else dumps(value).decode()


def _unsuited(outputs: Outputs, verb: str, expected: str) -> InputError:
    known = ", ".join(f"{name} ({kind})" for name, kind in outputs.items())
    return InputError(f":{verb} needs {expected}; the outputs are {known}: use :predict")


def refusal(error: TwinpathError) -> Answer:
    """``{"error": "..."}``."""
    return Answer(_status_code(error), dumps({"error": error.message}))


def _status_code(error: TwinpathError) -> int:
    # What a client got wrong is INVALID_ARGUMENT there, and that is 400 over HTTP.
    return 400 if error.http_status == 422 else error.http_status


def _document(body: bytes, expected: str, keys: set[str]) -> dict[str, Any]:
    """The body, its keys and signature checked and its ``b64`` objects decoded."""
    document = read_object(body, expected)
    signature = document.pop("signature_name", SIGNATURE)
    if signature not in ("", SIGNATURE):
        raise InputError(f"no signature {shown(signature)} here: leave it out, or {SIGNATURE!r}")
    for key in document:
        if key not in keys:
            raise MalformedBodyError(f"unknown key {key!r}.{did_you_mean(key, keys)}")
    return {key: _decoded(value) for key, value in document.items()} if b"b64" in body else document


def _decoded(value: Any) -> Any:
    """The value with every ``{"b64": "..."}`` in it as bytes."""
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    if not isinstance(value, dict):
        return value
    if value.keys() != {"b64"}:
        return {name: _decoded(each) for name, each in value.items()}
    try:
        return base64.b64decode(value["b64"], validate=True)
    except (TypeError, ValueError):
        text = f'"b64": expected text in base64, got {shown(value["b64"])}'
        raise MalformedBodyError(text) from None


def _texts(values: Any, kind: ColumnType | None) -> Any:
    """Bytes of a text column as text; what is no UTF-8 is left, and refused as no text."""
    if kind is None or kind.dtype != "str" or not isinstance(values, list):
        return values
    return [_text(value) if isinstance(value, bytes) else value for value in values]


def _text(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _encoded(values: list[Any], name: str) -> list[Any]:
    """Bytes as ``b64`` objects. As there, an output named ``*_bytes`` holds bytes."""
    named = name.endswith("_bytes")
    return [
        {"b64": base64.b64encode(v if isinstance(v, bytes) else v.encode()).decode()}
        if isinstance(v, bytes) or (named and isinstance(v, str))
        else v
        for v in values
    ]


def _version_of(plane: DataPlane, parts: list[str]) -> str:
    """The version that ``<model>[/versions/<version>]`` names."""
    name, *rest = parts
    found = plane.find(name)
    if not rest:
        return found.version
    if len(rest) != 2 or rest[0] != "versions":
        text = f"nothing at {'/'.join(parts)!r}: expected {name}, or {name}/versions/<version>"
        raise UnknownModelError(text)
    plane.find(name, rest[1])
    return rest[1]


async def _status(plane: DataPlane, version: str) -> dict[str, Any]:
    missing = await plane.ready()
    state = "AVAILABLE" if not missing else "LOADING" if plane.loaded else "END"
    status = {"error_code": "OK", "error_message": "; ".join(missing)}
    return {
        "model_version_status": [{"version": version, "state": state, "status": status}],
        "name": plane.name,
        "ready": not missing,
    }


def _metadata(plane: DataPlane, version: str) -> dict[str, Any]:
    signature = {
        "inputs": _tensor_infos(plane.metadata.inputs),
        "outputs": _tensor_infos(plane.metadata.outputs),
        "method_name": "tensorflow/serving/predict",
    }
    return {
        "model_spec": {"name": plane.name, "signature_name": "", "version": version},
        "metadata": {"signature_def": {"signature_def": {SIGNATURE: signature}}},
    }


def _tensor_infos(columns: Mapping[str, ColumnType]) -> dict[str, Any]:
    return {
        name: {
            "dtype": _DTYPES[kind.dtype],
            "tensor_shape": _tensor_shape(kind),
            "name": f"{name}:0",
        }
        for name, kind in columns.items()
    }


def _tensor_shape(kind: ColumnType) -> dict[str, Any]:
    sizes = () if kind.shape is None else (-1, *kind.shape)
    dim = [{"size": str(size), "name": ""} for size in sizes]
    return {"dim": dim, "unknown_rank": kind.shape is None}
