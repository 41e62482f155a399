"""OpenAPI descriptions of the standard protocols' endpoints, beside a graph's own typed one."""

from typing import Any

from twinpath.graph.plan import Plan
from twinpath.online.protocols.oip_tensors import NUMPY, datatype_of

_TEXT = {"type": "string"}
_OBJECT = {"type": "object"}


def paths(plan: Plan) -> dict[str, Any]:
    """Paths of Open Inference Protocol, TF Serving and MLflow, as plain data."""
    name = plan.graph_name
    model = f"/v2/models/{name}"
    return {
        f"{model}/infer": {
            "post": _inference("oip", "Infer", _oip_request(plan), _oip_answer(plan))
        },
        model: _get("oip", "Model metadata"),
        f"{model}/ready": _get("oip", "Is the model ready?"),
        f"{model}/stats": _get("oip", "Statistics"),
        "/v2": _get("oip", "Server metadata"),
        "/v2/health/live": _get("oip", "Is the server alive?"),
        "/v2/health/ready": _get("oip", "Is the server ready?"),
        f"/v1/models/{name}:predict": {
            "post": _inference("tensorflow-serving", "Predict", _tf_request(), _OBJECT)
        },
        f"/v1/models/{name}": _get("tensorflow-serving", "Model status"),
        f"/v1/models/{name}/metadata": _get("tensorflow-serving", "Model metadata"),
        "/invocations": {"post": _inference("mlflow", "Score", _mlflow_request(), _OBJECT)},
        "/ping": _get("mlflow", "Is the server alive?"),
    }


def _oip_request(plan: Plan) -> dict[str, Any]:
    fields = plan.input_schema.fields
    tensor = {
        "type": "object",
        "required": ["name", "shape", "datatype", "data"],
        "properties": {
            "name": {"type": "string", "enum": list(fields)},
            "shape": {
                "type": "array", "minItems": 1,
                "items": {"type": "integer", "minimum": 0, "maximum": 1 << 28},
            },
            "datatype": {"type": "string", "enum": list(NUMPY)},
            "data": {"type": "array"},
        },
    }  # fmt: skip
    example = [
        {"name": name, "shape": [1, *(kind.shape or ())], "datatype": datatype_of(kind)}
        for name, kind in fields.items()
    ]
    return {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": _TEXT,
            "inputs": {
                "type": "array", "minItems": 1, "items": tensor,
                "description": f"the model's inputs: {example}",
            },
        },
    }  # fmt: skip


def _oip_answer(plan: Plan) -> dict[str, Any]:
    tensor = {
        "type": "object",
        "required": ["name", "shape", "datatype", "data"],
        "properties": {
            "name": {"type": "string", "enum": list(plan.output_schema.fields)},
            "shape": {"type": "array", "items": {"type": "integer"}},
            "datatype": {"type": "string", "enum": list(NUMPY)},
            "data": {"type": "array"},
        },
    }
    return {
        "type": "object",
        "required": ["model_name", "model_version", "outputs"],
        "properties": {
            "model_name": _TEXT,
            "model_version": _TEXT,
            "outputs": {"type": "array", "items": tensor},
        },
    }


def _tf_request() -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"instances": {"type": "array", "minItems": 1}, "inputs": {}},
    }


def _mlflow_request() -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "dataframe_split": _OBJECT,
            "dataframe_records": {"type": "array"},
            "instances": {},
            "inputs": {},
        },
    }


def _inference(
    tag: str, summary: str, body: dict[str, Any], answer: dict[str, Any]
) -> dict[str, Any]:
    failures = {
        status: {"description": text, "content": {"application/json": {"schema": _OBJECT}}}
        for status, text in (
            ("400", "the body cannot be read"),
            ("401", "no valid credentials, where they are asked for"),
            ("403", "the credentials do not open this graph"),
            ("413", "the body or its number of rows is over the limit"),
            ("415", "the body is of a kind that is not read here"),
            ("422", "a row does not fit the input model, or a node could not compute it"),
            ("429", "the caller's own limit is reached; retry after Retry-After seconds"),
            ("500", "a node broke its contract, or an unexpected error"),
            ("503", "the queue is full; retry after Retry-After seconds"),
            ("504", "the rows waited too long and were not run"),
        )
    }
    return {
        "tags": [tag],
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {
            "200": {
                "description": "answers of all rows",
                "content": {"application/json": {"schema": answer}},
            },
            **failures,
        },
    }


def _get(tag: str, summary: str) -> dict[str, Any]:
    answers = {
        status: {"description": text}
        for status, text in (("200", "yes, or what was asked for"), ("503", "not yet"))
    }
    return {"get": {"tags": [tag], "summary": summary, "responses": answers}}
