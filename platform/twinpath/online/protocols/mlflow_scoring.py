"""MLflow's scoring protocol, as its own server speaks it: a graph behind ``/invocations``.

Rows come as JSON under ``dataframe_split``, ``dataframe_records``, ``instances`` or ``inputs``, or
as CSV. ``predictions`` is a list with one value a row for a graph of one output, as for a model
that returns an array, and one mapping a row otherwise, as for one that returns a DataFrame.
Stricter than there: columns that the graph does not know are refused instead of dropped, and
``params`` too, since a graph takes none. A request succeeds or fails as one.
"""

import base64
import csv
import importlib.metadata
import io
from typing import Any, get_args

from starlette.requests import Request as StarletteRequest
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from twinpath.errors import (
    EmptyBodyError,
    InputError,
    MalformedBodyError,
    TwinpathError,
    did_you_mean,
)
from twinpath.graph.columns import Columns, Outcome
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

FORMS = ("dataframe_split", "dataframe_records", "instances", "inputs")
#: What ``/version`` says where MLflow is not installed: the version whose protocol this is.
PROTOCOL_VERSION = "3.0.0"
_TEXT = b"text/plain; charset=utf-8"
_EXPECTED = (
    "a JSON object with exactly one of dataframe_split, dataframe_records, instances, inputs"
)
_CODES = {
    401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "RESOURCE_DOES_NOT_EXIST",
    429: "REQUEST_LIMIT_EXCEEDED", 499: "CANCELLED", 500: "INTERNAL_ERROR",
    503: "TEMPORARILY_UNAVAILABLE", 504: "DEADLINE_EXCEEDED",
}  # fmt: skip


def inference(plane: DataPlane) -> dict[str, Codec]:
    """Codecs by path below the app's root."""
    return {"/invocations": ScoringCodec(plane)}


def routes(plane: DataPlane) -> list[BaseRoute]:
    """Health and version, with the bodies and types of MLflow's server."""
    version = _version()

    async def ping(request: StarletteRequest) -> Response:
        status = 404 if await plane.ready() else 200
        return Response("\n", status, media_type="application/json")

    async def tell_version(request: StarletteRequest) -> Response:
        return Response(version, media_type="application/json")

    return [Route("/ping", ping), Route("/health", ping), Route("/version", tell_version)]


class ScoringCodec:
    """``POST /invocations``."""

    def __init__(self, plane: DataPlane) -> None:
        self._schema = plane.plan.input_schema
        forms = ("dataframe_records", "instances", "inputs")
        self._readers = {b'"%b"' % form.encode(): RowReader(self._schema, form) for form in forms}
        self._reader = RowReader(self._schema)
        self._writer = RowWriter(plane.plan.output_schema)
        self._bare = bare_input(self._schema)
        infos = self._schema.model.model_fields.items()
        kinds = {name: {info.annotation, *get_args(info.annotation)} for name, info in infos}
        self._not_null = {name for name, kind in kinds.items() if type(None) not in kind}
        #: Inputs of bytes, which are text in base64 there, and outputs that may be.
        self._binary = {name for name, kind in kinds.items() if bytes in kind}
        outputs = plane.metadata.outputs.items()
        self._objects = [name for name, kind in outputs if kind.dtype == "any"]

    def decode(self, request: Request) -> Call | Answer:
        """See `exchange.Codec`."""
        media = request.headers.get(b"content-type", b"application/json").decode("latin-1")
        kind, *pairs = (part.strip() for part in media.split(";"))
        given = {key.lower(): value for key, _, value in (pair.partition("=") for pair in pairs)}
        if given.pop("charset", "utf-8").strip('"').lower() != "utf-8":
            return Answer(415, b"The scoring server only supports UTF-8", _TEXT)
        if given:
            text = f"Unrecognized content type parameters: {', '.join(given)}"
            return Answer(415, text.encode(), _TEXT)
        match kind.lower():
            case "application/json":
                return Call(self._json(request.body), self._encode)
            case "text/csv":
                return Call(self._csv(request.body), self._encode)
        text = "This predictor only supports the content types application/json and text/csv"
        return Answer(415, f"{text}. Got '{media}'.".encode(), _TEXT)

    def refuse(self, error: TwinpathError) -> Answer:
        """See `exchange.Codec`."""
        # What is wrong with a row is a bad request there.
        status = 400 if error.http_status == 422 else error.http_status
        code = _CODES.get(status, "BAD_REQUEST")
        return Answer(status, dumps({"error_code": code, "message": error.message}))

    def _json(self, body: bytes) -> Columns:
        start = body[:80]
        reader = next((r for key, r in self._readers.items() if key in start), None)
        quick = reader.quick(body) if reader is not None and not self._binary else None
        if quick is not None:
            return quick.columns
        document = read_object(body, _EXPECTED)
        if document.pop("params", None):
            raise InputError('"params" are given and this graph takes none: leave them out')
        for key in document:
            if key not in FORMS:
                raise MalformedBodyError(f"unknown key {key!r}.{did_you_mean(key, FORMS)}")
        if len(document) != 1:
            got = ", ".join(map(repr, document)) or "none of them"
            raise MalformedBodyError(f"expected {_EXPECTED}, got {got}")
        ((form, value),) = document.items()
        match form:
            case "dataframe_split":
                return self._split(value)
            case "dataframe_records":
                return self._rows(form, value)
            case "instances" | "inputs" if isinstance(value, list):
                if any(isinstance(row, dict) for row in value):
                    return self._rows(form, value)
                return self._unnamed(form, value)
            case "inputs" if isinstance(value, dict):
                if value and not any(isinstance(each, list) for each in value.values()):
                    return self._rows(form, [value])
                return self._columns(value)
        expected = "a list of rows" if form == "instances" else "columns by name, or a list"
        raise MalformedBodyError(f"{form!r}: expected {expected}, got {shown(value)}")

    def _split(self, value: Any) -> Columns:
        expected = '{"columns": [...], "data": [[...]]}'
        if not isinstance(value, dict) or "data" not in value:
            raise MalformedBodyError(f"'dataframe_split': expected {expected}, got {shown(value)}")
        unknown = next(iter(value.keys() - {"columns", "data", "index"}), None)
        if unknown is not None:
            raise MalformedBodyError(f"'dataframe_split': unknown key {unknown!r}: remove it")
        names, data = value.get("columns"), value["data"]
        if names is None or names == list(range(len(self._schema.fields))):
            names = list(self._schema.fields)  # as a DataFrame without names has them
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise MalformedBodyError(f"'columns': expected a list of names, got {shown(names)}")
        _no_duplicates(names)
        if not isinstance(data, list):
            raise MalformedBodyError(f"'data': expected a list of rows, got {shown(data)}")
        return self._matrix(names, data)

    def _matrix(self, names: list[str], data: list[Any]) -> Columns:
        for i, row in enumerate(data):
            if not isinstance(row, list) or len(row) != len(names):
                shape = f"a list of {len(names)} values ({', '.join(names)})"
                raise MalformedBodyError(f"row {i}: expected {shape}, got {shown(row)}")
        return self._columns(dict(zip(names, map(list, zip(*data, strict=True)), strict=False)))

    def _unnamed(self, form: str, values: list[Any]) -> Columns:
        """Values of the one input; or rows of an array, with all inputs in their order."""
        if self._bare is not None:
            return self._columns({self._bare: values})
        if any(isinstance(value, list) for value in values):
            return self._matrix(list(self._schema.fields), values)
        names = ", ".join(map(repr, self._schema.fields))
        raise MalformedBodyError(
            f"{form!r}: expected rows with the inputs {names}, got {shown(values)}: name them"
        )

    def _rows(self, form: str, rows: Any) -> Columns:
        if not isinstance(rows, list):
            raise MalformedBodyError(f"{form!r}: expected a list of rows, got {shown(rows)}")
        if not rows:
            raise EmptyBodyError(f"{form!r} is an empty list: send at least one row")
        if self._binary:
            rows = [_unpacked(row, self._binary) for row in rows]
        return whole(self._reader.rows(rows))

    def _columns(self, lists: dict[str, Any]) -> Columns:
        return whole(self._reader.columns(_unpacked(lists, self._binary)))

    def _csv(self, body: bytes) -> Columns:
        """Rows of text, which are read as the fields' types. An empty cell is a null, or the
        default of a field that cannot be null; an unnamed column is the index, and left out."""
        try:
            lines = [line for line in csv.reader(io.StringIO(body.decode("utf-8-sig"))) if line]
        except (UnicodeDecodeError, csv.Error) as error:
            raise MalformedBodyError(f"the body is not CSV in UTF-8: {error}") from None
        if len(lines) < 2:
            raise EmptyBodyError("expected a line of column names and one line a row")
        names, *data = lines
        _no_duplicates(names)
        rows = []
        for i, line in enumerate(data):
            if len(line) != len(names):
                text = f"row {i}: expected {len(names)} values, got {len(line)}: {shown(line)}"
                raise MalformedBodyError(text)
            cells = zip(names, line, strict=True)
            rows.append(
                {n: cell or None for n, cell in cells if n and (cell or n not in self._not_null)}
            )
        return self._rows("text/csv", rows)

    def _encode(self, outcome: Outcome) -> Answer:
        lists = self._writer.lists(whole(outcome))
        for name in self._objects:
            lists[name] = [_packed(value) for value in lists[name]]
        only = next(iter(lists.values())) if len(lists) == 1 else None
        return Answer(200, dumps({"predictions": rows_of(lists) if only is None else only}))


def _no_duplicates(names: list[str]) -> None:
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise MalformedBodyError(f"column {twice!r} is given twice: give it once")


def _unpacked(values: Any, names: set[str]) -> Any:
    """A row, or columns, with the base64 text of these names as bytes."""
    if not isinstance(values, dict) or not names & values.keys():
        return values
    return values | {name: _bytes(values[name], name) for name in names & values.keys()}


def _bytes(value: Any, name: str) -> Any:
    if isinstance(value, list):
        return [_bytes(each, name) for each in value]
    if not isinstance(value, str):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except ValueError:
        text = f"{name}: expected bytes as text in base64, got {shown(value)}"
        raise InputError(text) from None


def _packed(value: Any) -> Any:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def _version() -> str:
    try:
        return importlib.metadata.version("mlflow")
    except importlib.metadata.PackageNotFoundError:
        return PROTOCOL_VERSION
