"""local == online == offline, on a real Ray Serve and a real Ray Data."""

import json

import httpx
import pandas as pd
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from ray import serve

from parity.random_graphs import build, recipes, try_build
from twinpath.graph.local import LocalRunner

ROWS = [
    {"a": (i * 37 % 200) - 100 + i / 8, "b": i * 13 % 501, "text": "xyü"[i % 3], "c": c}
    for i, c in enumerate([None, 1.5, -2.25, 0.0] * 12)
]

#: (kind, number, sources, where=, own replicas): every kind of node, branches across processes.
RECIPES = {
    "chain-with-placed-branch": [
        ("affine", 1, [0], False, False),
        ("async", 8, [1], True, True),
        ("raises", 2, [2], False, True),
        ("label", 0, [1, 3], True, False),
    ],
    "plain-class-placed-and-early-exit": [
        ("undeclared", 0, [0], False, True),
        ("marks", 3, [1], False, False),
        ("affine", 12, [2], True, True),
        ("label", 4, [3, 4], False, False),
    ],
}


def check_all_three(graph, url: str) -> None:
    with LocalRunner(graph.plan) as runner:
        local = runner.run(ROWS)
    expected = local.rows()
    codes = {i: error.code for i, error in local.errors.items()}

    serve.run(graph.app({}), name=graph.name, route_prefix=f"/{graph.name}")
    answer = httpx.post(
        f"{url}/{graph.name}/predict?on_error=partial", json={"rows": ROWS}, timeout=60
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["rows"] == expected
    assert {e["row"]: e["code"] for e in answer.json()["errors"]} == codes
    serve.delete(graph.name)

    frame = pd.DataFrame(ROWS).assign(id=range(len(ROWS)))
    job = graph.job(frame, keep=["id"], workers=1, batch_size=16)
    scored = job.dataset().to_pandas()
    assert scored["id"].tolist() == list(range(len(ROWS)))
    for row, given_back in enumerate(scored.to_dict("records")):
        error = given_back["__error__"]
        if row in codes:
            assert json.loads(error)["code"] == codes[row]
            continue
        assert not error
        for name, value in expected[row].items():
            got = given_back[name]
            assert got == value or (value is None and pd.isna(got)), (row, name, got, value)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", RECIPES)
def test_known_graphs_answer_the_same_in_all_three_runtimes(name, ray_and_serve):
    check_all_three(build(name, RECIPES[name]), ray_and_serve)


@pytest.mark.timeout(600)
def test_random_graphs_answer_the_same_in_all_three_runtimes(ray_and_serve):
    seen = []

    @settings(
        max_examples=2,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(recipe=recipes.filter(lambda steps: 2 < len(steps) < 5), number=st.integers(0, 10**9))
    def all_agree(recipe, number):
        graph = try_build(f"random-{number}", recipe)
        assume(graph is not None)
        check_all_three(graph, ray_and_serve)
        seen.append(recipe)

    all_agree()
    assert seen
