"""What every server is asked, and the answers that make its speed worth measuring."""

import json
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from benchmarks.online import models
from benchmarks.online.environments import PeerError
from benchmarks.online.forms import FORMS
from graphs.demo import body_of, read_requests
from graphs.flights_model.schema import flights_dir

_BODIES = 100
_CHECKED = 48


@dataclass(frozen=True)
class Workload:
    """``model`` is what the server serves; requests have ``rows`` rows each."""

    name: str
    model: str
    rows: int = 1
    binary: bool = False


#: By name, in the order of measuring; those of one model are asked of one running server.
WORKLOADS: Mapping[str, Workload] = {
    each.name: each
    for each in (
        Workload("tabular", "tabular"),
        Workload("tabular64", "tabular", 64),
        Workload("tabular64-binary", "tabular", 64, binary=True),
        Workload("torch", "torch"),
        Workload("flights", "flights"),
        Workload("echo", "echo"),
    )
}


@dataclass(frozen=True)
class Asked:
    """Bodies of a workload in one form."""

    bodies: list[bytes]
    headers: Mapping[str, str]


@cache
def asked(workload: Workload, form: str) -> Asked:
    """The same rows for every server, in its form."""
    if workload.model == "flights":
        bodies = [body_of([row]) for row in _flights()]
        return Asked(bodies, {"Content-Type": "application/json"})
    encoded = [FORMS[form].encode(x) for x in _inputs(workload)]
    return Asked([body for body, _ in encoded], encoded[0][1])


def check(workload: Workload, form: str, url: str) -> None:
    """Ask many at a time, so that batches form, and compare. Raises PeerError on a difference."""
    given = asked(workload, form)
    with ThreadPoolExecutor(16) as pool:
        answers = list(
            pool.map(lambda body: _post(url, body, given.headers), given.bodies[:_CHECKED])
        )
    for number, (headers, body) in enumerate(answers):
        if workload.model == "flights":
            same = _same_rows(json.loads(body)["rows"], _flights_reference()[number])
        else:
            wanted = _reference(workload)[number]
            found = FORMS[form].decode(headers, body)
            same = found.size == wanted.size and np.allclose(
                found.ravel(), wanted.ravel(), rtol=1e-4, atol=1e-6
            )
        if not same:
            raise PeerError(f"{workload.name}: answer {number} is wrong: {body[:200]!r}")


def _post(url: str, body: bytes, headers: Mapping[str, str]) -> tuple[Mapping[str, str], bytes]:
    request = urllib.request.Request(url, data=body, headers=dict(headers))
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.headers, answer.read()
    except OSError as error:
        said = error.read()[:300] if isinstance(error, urllib.error.HTTPError) else b""
        raise PeerError(f"{url}: {error} {said.decode(errors='replace')}") from None


@cache
def _inputs(workload: Workload) -> list[models.Array]:
    rows = models.rows(workload.model, workload.rows * _BODIES)
    return np.split(rows, _BODIES)


@cache
def _reference(workload: Workload) -> list[models.Array]:
    predict = models.load(workload.model)
    return [predict(x.astype(np.float32)) for x in _inputs(workload)[:_CHECKED]]


@cache
def _flights() -> list[Any]:
    return list(read_requests(flights_dir())[:_BODIES])


@cache
def _flights_reference() -> list[Any]:
    from benchmarks.fused_graph import graph

    try:
        return [
            graph.run(json.loads(body_of([row]))["rows"]).rows() for row in _flights()[:_CHECKED]
        ]
    finally:
        graph.close()


def _same_rows(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> bool:
    return len(found) == len(wanted) and all(
        set(mine) == set(theirs)
        and all(
            np.isclose(mine[name], theirs[name], rtol=1e-4)
            if isinstance(mine[name], float)
            else mine[name] == theirs[name]
            for name in mine
        )
        for mine, theirs in zip(found, wanted, strict=True)
    )
