"""The graph's own typed endpoint: rows in, rows out."""

from typing import Any
from urllib.parse import parse_qs

from starlette.routing import BaseRoute

from twinpath.errors import InputError, MalformedBodyError, TwinpathError, http_status_of
from twinpath.graph.columns import Outcome, RowError
from twinpath.graph.local import after_validation
from twinpath.online.dataplane import DataPlane
from twinpath.online.exchange import Answer, Call, Codec, Request
from twinpath.online.protocols.json_rows import RowReader, RowWriter, dumps


class _WrongMediaError(InputError):
    """The body's declared type is not JSON."""

    code = "unsupported_media_type"
    http_status = 415


def inference(plane: DataPlane) -> dict[str, Codec]:
    """Codecs by path below the app's root."""
    codec = PredictCodec(plane)
    return {"/predict": codec, f"/{plane.name}/predict": codec}


def routes(plane: DataPlane) -> list[BaseRoute]:
    """None beside inference: the API page is the app's own."""
    return []


class PredictCodec:
    """``POST /<graph>/predict``: ``{"rows": [...]}`` in and out."""

    def __init__(self, plane: DataPlane) -> None:
        self._input = plane.plan.input_schema
        self._reader = RowReader(self._input)
        self._writer = RowWriter(plane.plan.output_schema)

    def decode(self, request: Request) -> Call | Answer:
        """See `exchange.Codec`."""
        _check_media(request.headers.get(b"content-type", b"application/json"))
        partial = _wants_partial(request.query)
        checked = self._reader.quick(request.body) or self._input.from_json_rows(request.body)
        if not len(checked.rows) or not (partial or checked.ok):
            return self._answer(checked, partial)
        return Call(
            checked.columns, lambda ran: self._answer(after_validation(checked, ran), partial)
        )

    def refuse(self, error: TwinpathError) -> Answer:
        """See `exchange.Codec`."""
        return Answer(error.http_status, dumps(_error(error.code, error.message)))

    def _answer(self, outcome: Outcome, partial: bool) -> Answer:
        if outcome.errors and not partial:
            first = outcome.errors[min(outcome.errors)]
            text = f"{len(outcome.errors)} of {outcome.n} rows failed; first: {first.message}"
            status = max(http_status_of(e.code) for e in outcome.errors.values())
            return Answer(status, dumps(_error(first.code, text, outcome.errors)))
        rows = self._writer.rows(outcome.columns)
        if not partial:
            return Answer(200, dumps({"rows": rows}))
        spread: list[Any] = [None] * outcome.n
        for position, row in zip(outcome.rows.tolist(), rows, strict=True):
            spread[position] = row
        return Answer(200, dumps({"rows": spread, "errors": _row_errors(outcome.errors)}))


def _check_media(given: bytes) -> None:
    kind = given.split(b";")[0].strip().lower()
    if kind != b"application/json" and not kind.endswith(b"+json"):
        text = f"content-type {kind.decode('latin-1')!r} is not read here: send application/json"
        raise _WrongMediaError(text)


def _wants_partial(query: bytes) -> bool:
    if not query:
        return False
    asked = parse_qs(query.decode("latin-1"), keep_blank_values=True)
    value = asked.get("on_error", ["fail"])[-1]
    if value not in ("fail", "partial"):
        raise MalformedBodyError(f"on_error={value!r}: expected 'fail' or 'partial'")
    return value == "partial"


def _row_errors(errors: dict[int, RowError]) -> list[dict[str, Any]]:
    return [
        {"row": i, "code": e.code, "message": e.message, "node": e.node, "field": e.field}
        for i, e in sorted(errors.items())
    ]


def _error(code: str, message: str, rows: dict[int, RowError] | None = None) -> dict[str, Any]:
    error: dict[str, Any] = {"code": code, "message": message}
    return {"error": error | ({"rows": _row_errors(rows)} if rows else {})}
