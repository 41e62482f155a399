"""The OpenAPI 3.1 description of a graph's REST endpoint, and the page that shows it."""

import html
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from twinpath.errors import MissingExtraError
from twinpath.graph.plan import Plan
from twinpath.online import openapi_protocols

_ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message"],
            "properties": {
                "code": {"type": "string"},
                "message": {"type": "string"},
                "rows": {"type": "array", "items": {"$ref": "#/components/schemas/RowError"}},
            },
        }
    },
}
_ROW_ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["row", "code", "message"],
    "properties": {
        "row": {"type": "integer", "description": "position in the request, from 0"},
        "code": {"type": "string"},
        "message": {"type": "string"},
        "node": {"type": ["string", "null"]},
        "field": {"type": ["string", "null"]},
    },
}


def describe(
    plan: Plan, version: str, versions: Sequence[str] = ("1",), routed: Collection[str] = ()
) -> dict[str, Any]:
    """The OpenAPI document, as plain data. ``versions`` are the model's; ``routed`` are paths that
    not every graph has."""
    given, answer = plan.input_schema.model, plan.output_schema.model
    models, definitions = models_json_schema(
        [(given, "validation"), (answer, "serialization")],
        ref_template="#/components/schemas/{model}",
    )
    schemas = dict(definitions.get("$defs", {}))
    schemas |= {"Error": _ERROR_SCHEMA, "RowError": _ROW_ERROR_SCHEMA}
    rows_in = _rows(models[(given, "validation")], required=["rows"])
    example = _example(given)
    if example:
        rows_in["examples"] = [{"rows": [example]}]
    rows_out = _rows(models[(answer, "serialization")], required=["rows"])
    rows_out["properties"]["rows"]["items"] = {
        "anyOf": [models[(answer, "serialization")], {"type": "null"}],
        "description": "null for a row that failed, only with on_error=partial",
    }
    rows_out["properties"]["errors"] = {
        "type": "array",
        "items": {"$ref": "#/components/schemas/RowError"},
        "description": "only with on_error=partial",
    }
    error = _json({"$ref": "#/components/schemas/Error"})
    failures = {
        status: {"description": text, "content": error}
        for status, text in openapi_protocols.INFERENCE.items()
    }
    predict = {
        "tags": ["inference"],
        "summary": f"Predict with graph {plan.graph_name}",
        "parameters": [
            {
                "name": "on_error",
                "in": "query",
                "description": "fail: one failing row fails the request; partial: it is null",
                "schema": {"type": "string", "enum": ["fail", "partial"], "default": "fail"},
            }
        ],
        "requestBody": {"required": True, "content": _json(rows_in)},
        "responses": {
            "200": {"description": "one answer a row", "content": _json(rows_out)},
            **failures,
        },
    }
    answers = {
        "200": {"description": "yes", "content": _json({"type": "object"})},
        "503": {"description": "not yet", "content": error},
    }
    probe = {"tags": ["health"], "responses": answers}
    return {
        "openapi": "3.1.0",
        "info": {"title": plan.graph_name, "version": version},
        # Where the gateway asks for credentials, one of these.
        "security": [{}, {"key": []}, {"token": []}],
        "paths": {
            f"/{plan.graph_name}/predict": {"post": predict | {"operationId": "predict"}},
            "/predict": {"post": predict | {"operationId": "predictHere"}},
            "/healthz": {"get": {"summary": "Is the process alive?", **probe}},
            "/readyz": {"get": {"summary": "Can it answer?", **probe}},
            **openapi_protocols.paths(plan, example, versions),
            **openapi_protocols.streaming(plan, models[(given, "validation")], routed),
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                "token": {"type": "http", "scheme": "bearer"},
            },
        },
    }


def page(title: str) -> str:
    """The Swagger UI page; its assets are served beside it, so it works without the internet."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)} API</title>
<link rel="stylesheet" href="docs/swagger-ui.css"></head>
<body><div id="ui"></div><script src="docs/swagger-ui-bundle.js"></script>
<script>SwaggerUIBundle({{url: "openapi.json", dom_id: "#ui", deepLinking: true,
  validatorUrl: null, tryItOutEnabled: true}})</script></body></html>"""


@cache
def assets() -> Path:
    """The folder of Swagger UI's files. Raises MissingExtraError."""
    try:
        import swagger_ui
    except ImportError:
        raise MissingExtraError("swagger-ui-py", "online") from None
    return Path(swagger_ui.__file__).parent / "static"


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _rows(item: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {
        "type": "object",
        "required": required,
        "properties": {"rows": {"type": "array", "items": item, "minItems": 1}},
    }


def _example(model: type[BaseModel]) -> dict[str, Any]:
    """A row from the fields' own examples; empty when a required field has none."""
    row: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        if info.examples:
            row[name] = info.examples[0]
        elif info.is_required():
            return {}
    return row
