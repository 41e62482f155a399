"""A version that a request asks for reaches the node, and only the rows of that request."""

from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from twinpath import Graph, Node
from twinpath.errors import MalformedBodyError, UnknownModelError
from twinpath.graph.columns import PIN, ROW_ERROR, RowError
from twinpath.graph.stage import Executor
from twinpath.online import pins


class Row(BaseModel):
    x: float


class Out(BaseModel):
    y: float


class Versioned(Node):
    """Adds the version that is asked for; 1 by default; there is no version 9."""

    pins = True
    inputs = {"x": "float64"}
    outputs = {"y": "float64"}

    def predict(self, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        asked = columns.get(PIN)
        n = len(columns["x"])
        texts = ["1"] * n if asked is None else [pin or "1" for pin in asked]
        answer = {"y": columns["x"] + np.array([float(text) for text in texts])}
        if "9" in texts:
            error = RowError(UnknownModelError.code, "no version 9")
            answer[ROW_ERROR] = np.array([error if t == "9" else None for t in texts], object)
        return answer


class Plain(Node):
    """Knows nothing of versions."""

    inputs = {"y": "float64"}
    outputs = {"y": "float64"}

    def predict(self, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert PIN not in columns
        return {"y": columns["y"] * 10}


def executor() -> Executor:
    graph = Graph("pinned", input=Row, output=Out)
    with graph as row:
        graph.output(Plain()(Versioned()(row)))
    assert graph.plan.pinnable
    made = Executor(graph.plan)
    made.setup()
    return made


async def test_pins_go_with_their_rows_through_a_mixed_batch():
    asked = np.array([None, "2", None, "3"], object)
    outcome = await executor().run({"x": np.zeros(4), PIN: asked})
    assert outcome.columns["y"].tolist() == [10, 20, 10, 30]
    assert PIN not in outcome.columns


async def test_a_pin_that_cannot_be_served_fails_its_own_row_with_its_own_code():
    asked = np.array([None, "9"], object)
    outcome = await executor().run({"x": np.zeros(2), PIN: asked})
    assert outcome.rows.tolist() == [0]
    assert outcome.errors[1].code == UnknownModelError.code


async def test_a_batch_without_pins_is_as_ever():
    outcome = await executor().run({"x": np.zeros(2)})
    assert outcome.columns["y"].tolist() == [10, 10]


@pytest.mark.parametrize(
    ("path", "headers", "expected"),
    [
        ("/v2/models/m/versions/3/infer", {}, "3"),
        ("/v1/models/m/versions/3:predict", {}, "3"),
        ("/m/predict", {b"x-model-version": b"4"}, "4"),
        ("/v2/models/m/versions/3/infer", {b"x-model-version": b"4"}, "3"),
        ("/m/predict", {}, None),
        ("/v2/models/m/versions/v1/infer", {}, None),
    ],
)
def test_path_and_header_name_a_version(path: str, headers: Any, expected: str | None):
    assert pins.asked(path, headers) == expected


def test_a_header_that_is_no_version_is_a_bad_request():
    with pytest.raises(MalformedBodyError, match="expected a version such as 3"):
        pins.asked("/m/predict", {b"x-model-version": b"latest"})


def test_codecs_are_found_with_and_without_a_version():
    codecs = {"/v2/models/m/infer": 1, "/v1/models/m:predict": 2}
    assert pins.at(codecs, "/v2/models/m/versions/12/infer") == 1
    assert pins.at(codecs, "/v1/models/m/versions/12:predict") == 2
    assert pins.at(codecs, "/v1/models/m:predict") == 2
    assert pins.at(codecs, "/v2/models/n/versions/12/infer") is None
    raw = {path.encode(): number for path, number in codecs.items()}
    assert pins.at_raw(raw, b"/v2/models/m/versions/12/infer") == 1
    assert pins.at_raw(raw, b"/v1/models/m/versions/12:predict") == 2
