"""OpenAPI descriptions of the standard protocols' endpoints, beside a graph's own typed one."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from twinpath.graph.plan import Plan
from twinpath.online.protocols.oip_tensors import NUMPY, datatype_of

Schema = dict[str, Any]

_TEXT = {"type": "string"}
_OBJECT = {"type": "object"}
_LIST = {"type": "array"}
#: An error of a protocol is text; the gateway's own, on pages beside inference, is an object.
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": ["string", "object"]}},
}
_MLFLOW_ERROR = {
    "type": "object",
    "required": ["error_code", "message"],
    "properties": {"error_code": _TEXT, "message": _TEXT},
}
#: What any request but a probe may be answered with.
GUARDED = {
    "400": "the request, or a header of it, cannot be read",
    "401": "no valid credentials, where they are asked for",
    "403": "the credentials do not open this graph",
    "429": "the caller's own limit is reached; retry after Retry-After seconds",
    "503": "not ready, or the queue is full; retry after Retry-After seconds",
}
_UNKNOWN = {"404": "no such model or version is served here"}
#: The same for inference.
INFERENCE = GUARDED | {
    "408": "the body did not come to its end in time",
    "413": "the body or its number of rows is over the limit",
    "415": "the body is of a kind that is not read here",
    "422": "a row does not fit the input model, or a node could not compute it",
    "500": "a node broke its contract, or an unexpected error",
    "504": "the rows waited too long and were not run",
}


def paths(plan: Plan, row: Mapping[str, Any], versions: Sequence[str]) -> dict[str, Any]:
    """Paths of Open Inference Protocol, TF Serving and MLflow, as plain data. ``row`` is an
    example, empty if there is none; ``versions`` are those of the model."""
    version = {
        "name": "version", "in": "path", "required": True,
        "schema": _TEXT | {"examples": list(versions)},
    }  # fmt: skip
    return _oip(plan, row, version) | _tf_serving(plan, row, version) | _mlflow(row)


def streaming(plan: Plan, row: Schema, routed: Collection[str]) -> dict[str, Any]:
    """The path of graphs that can be streamed, if it is there; ``row`` is the schema of one."""
    path = f"/v2/models/{plan.graph_name}/generate_stream"
    if path not in routed:
        return {}
    found = _infer("oip", "Answer of one row, in parts", row, {}, (), _ERROR)
    events = {"description": "an event for each part", "content": {"text/event-stream": {}}}
    found["post"]["responses"]["200"] = events
    return {path: found}


def _oip(plan: Plan, row: Mapping[str, Any], version: Schema) -> dict[str, Any]:
    name = plan.graph_name
    ready = _shape(_named(name), ready={"type": "boolean"})
    tensors = {"type": "array", "items": _shape(name=_TEXT, datatype=_TEXT, shape=_LIST)}
    metadata = _shape(_named(name), versions=_LIST, platform=_TEXT, inputs=tensors, outputs=tensors)
    stats = _shape(model_stats={"type": "array", "items": _shape(_named(name), version=_TEXT)})
    index = {"type": "array", "items": _shape(_named(name), state=_TEXT, version=_TEXT)}
    found: dict[str, Any] = {}
    for place, parameters in _places(f"/v2/models/{name}", version):
        found |= {
            f"{place}/infer": _infer(
                "oip", "Infer", _oip_request(plan, row), _oip_answer(plan), parameters
            ),
            place: _get("oip", "Model metadata", metadata, parameters),
            f"{place}/ready": _get("oip", "Is the model ready?", ready, parameters),
            f"{place}/stats": _get("oip", "Statistics", stats, parameters),
        }
    repository = "/v2/repository/models/" + name
    asked = _shape() | {"properties": {"ready": {"type": "boolean"}}}
    return found | {
        "/v2": _get("oip", "Server metadata", _shape(name=_TEXT, version=_TEXT, extensions=_LIST)),
        "/v2/health/live": _probe("oip", "Is the server alive?", _shape(live={"type": "boolean"})),
        "/v2/health/ready": _probe("oip", "Is the server ready?", ready),
        "/v2/models/stats": _get("oip", "Statistics of all models", stats),
        "/v2/repository/index": _post("oip", "Models, or those that are ready", asked, index),
        f"{repository}/load": _post("oip", "Put the model into service", _OBJECT, _OBJECT),
        f"{repository}/unload": _post("oip", "Take the model out of service", _OBJECT, _OBJECT),
    }


def _tf_serving(plan: Plan, row: Mapping[str, Any], version: Schema) -> dict[str, Any]:
    tag = "tensorflow-serving"
    status = _shape(model_version_status=_LIST, name=_TEXT, ready={"type": "boolean"})
    metadata = _shape(model_spec=_OBJECT, metadata=_OBJECT)
    signature = {"signature_name": {"type": "string", "enum": ["serving_default", ""]}}
    rows = {"type": "array", "minItems": 1}
    predict = _with_example({"instances": rows, "inputs": {}} | signature, "instances", row)
    examples = _with_example(
        {"examples": rows | {"items": _OBJECT}, "context": _OBJECT} | signature, "examples", row
    ) | {"required": ["examples"]}
    predicted = {"type": "object", "properties": {"predictions": _LIST, "outputs": {}}}
    result = _shape(result=_LIST)
    found: dict[str, Any] = {
        "/": _probe(tag, "Is the server alive? (KServe's first protocol)", _shape(status=_TEXT))
    }
    for place, parameters in _places(f"/v1/models/{plan.graph_name}", version):
        found |= {
            f"{place}:predict": _infer(tag, "Predict", predict, predicted, parameters),
            f"{place}:classify": _infer(tag, "Classify", examples, result, parameters),
            f"{place}:regress": _infer(tag, "Regress", examples, result, parameters),
            place: _get(tag, "Model status", status, parameters),
            f"{place}/metadata": _get(tag, "Model metadata", metadata, parameters),
        }
    return found


def _mlflow(row: Mapping[str, Any]) -> dict[str, Any]:
    forms = {"dataframe_split": _OBJECT, "dataframe_records": _LIST, "instances": {}, "inputs": {}}
    body = _with_example(forms, "dataframe_records", row)
    score = _infer("mlflow", "Score", body, _shape(predictions=_LIST), (), _MLFLOW_ERROR)
    operation = score["post"]
    operation["requestBody"]["content"]["text/csv"] = {"schema": _TEXT}
    operation["responses"]["415"]["content"] = {"text/plain": {"schema": _TEXT}}
    alive = {
        "200": {"description": "yes"},
        "404": {"description": "no: the model is not ready"},
    }
    probe = {"get": {"tags": ["mlflow"], "summary": "Is the model ready?", "responses": alive}}
    version = _get("mlflow", "Version of MLflow", {})
    # Its type is JSON, as MLflow's server has it, and it is none.
    del version["get"]["responses"]["200"]["content"]
    return {"/invocations": score, "/ping": probe, "/health": probe, "/version": version}


def _oip_request(plan: Plan, row: Mapping[str, Any]) -> Schema:
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
            "data": _LIST,
        },
    }  # fmt: skip
    expected = [
        {"name": name, "shape": [1, *(kind.shape or ())], "datatype": datatype_of(kind)}
        for name, kind in fields.items()
    ]
    request: Schema = {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": _TEXT,
            "inputs": {
                "type": "array", "minItems": 1, "items": tensor,
                "description": f"the model's inputs: {expected}",
            },
        },
    }  # fmt: skip
    given = [e | {"data": [row[str(e["name"])]]} for e in expected if e["name"] in row]
    if given and all(fields[name].shape == () for name in row):
        request["examples"] = [{"inputs": given}]
    return request


def _oip_answer(plan: Plan) -> Schema:
    tensor = _shape(
        name={"type": "string", "enum": list(plan.output_schema.fields)},
        shape={"type": "array", "items": {"type": "integer"}},
        datatype={"type": "string", "enum": list(NUMPY)},
        data=_LIST,
    )
    outputs = {"type": "array", "items": tensor}
    return _shape(model_name=_TEXT, model_version=_TEXT, outputs=outputs)


def _places(model: str, version: Schema) -> Iterable[tuple[str, Sequence[Schema]]]:
    """The paths of a model: with and without its version."""
    return (model, ()), (model + "/versions/{version}", (version,))


def _infer(
    tag: str,
    summary: str,
    body: Schema,
    answer: Schema,
    parameters: Sequence[Schema],
    error: Schema = _ERROR,
) -> dict[str, Any]:
    refusals = INFERENCE | (_UNKNOWN if parameters else {})
    operation = _operation(tag, summary, answer, refusals, parameters, error)
    return {"post": operation | {"requestBody": {"required": True, "content": _json(body)}}}


def _post(tag: str, summary: str, body: Schema, answer: Schema) -> dict[str, Any]:
    refusals = GUARDED | {"500": "not every replica could be told: try again"}
    return {
        "post": _operation(tag, summary, answer, refusals)
        | {"requestBody": {"content": _json(body)}}
    }


def _get(
    tag: str, summary: str, answer: Schema, parameters: Sequence[Schema] = ()
) -> dict[str, Any]:
    refusals = GUARDED | (_UNKNOWN if parameters else {})
    return {"get": _operation(tag, summary, answer, refusals, parameters)}


def _probe(tag: str, summary: str, answer: Schema) -> dict[str, Any]:
    return {"get": _operation(tag, summary, answer, {"503": "not yet"})}


def _operation(
    tag: str,
    summary: str,
    answer: Schema,
    refusals: Mapping[str, str],
    parameters: Sequence[Schema] = (),
    error: Schema = _ERROR,
) -> dict[str, Any]:
    responses = {"200": {"description": "what was asked for", "content": _json(answer)}}
    for status, text in refusals.items():
        responses[status] = {"description": text, "content": _json(error)}
    more = {"parameters": list(parameters)} if parameters else {}
    return {"tags": [tag], "summary": summary, **more, "responses": responses}


def _with_example(properties: Schema, key: str, row: Mapping[str, Any]) -> Schema:
    examples = {"examples": [{key: [dict(row)]}]} if row else {}
    return {"type": "object", "properties": properties, **examples}


def _named(name: str) -> Schema:
    return {"name": {"type": "string", "const": name}}


def _shape(more: Mapping[str, Any] | None = None, **properties: Any) -> Schema:
    """An object that has all of these."""
    every = {**(more or {}), **properties}
    return {"type": "object", "required": list(every), "properties": every}


def _json(schema: Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
