"""What a version has to show before it takes traffic: answers, the right ones, and in time.

Golden rows are a file ``golden.json`` among a version's files: ``{"inputs": {column: [...]},
"outputs": {column: [...]}, "rtol": 1e-4, "atol": 1e-6}``.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from twinpath.errors import ArtifactError, ModelCheckError, ModelError
from twinpath.graph.columns import Columns, row_count
from twinpath.graph.dtypes import ColumnType
from twinpath.registry.manifest import Manifest
from twinpath.registry.signature import UNNAMED

GOLDEN = "golden.json"
#: A version that takes longer than this multiple of what serves now is refused, if the difference
#: is over the grace: below it the clock is not to be trusted.
SLOW_FACTOR = 5.0
SLOW_GRACE_S = 0.005
_ROUNDS = 5
_ROUND_BUDGET_S = 2.0

Predict = Callable[[Columns], Columns]


@dataclass(frozen=True)
class Golden:
    """Rows whose answers are known."""

    inputs: Columns
    outputs: Columns
    rtol: float = 1e-4
    atol: float = 1e-6


def read_golden(manifest: Manifest, given: Mapping[str, ColumnType]) -> Golden | None:
    """A version's golden rows, if it has any. Raises ArtifactError for a file that is none."""
    for relative in (GOLDEN, f"extra_files/{GOLDEN}"):
        path = manifest.folder / relative
        if path.is_file():
            break
    else:
        return None
    try:
        document = json.loads(path.read_text())
        inputs = {n: _column(v, given.get(n)) for n, v in document["inputs"].items()}
        outputs = {n: np.asarray(v) for n, v in document["outputs"].items()}
        return Golden(
            inputs, outputs, float(document.get("rtol", 1e-4)), float(document.get("atol", 1e-6))
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{GOLDEN} cannot be read: {type(error).__name__}: {error}") from None


def read_example(manifest: Manifest, given: Mapping[str, ColumnType]) -> Columns | None:
    """The input example that MLflow keeps beside a model, as the node's columns (`given`: their
    types). None where there is none, or none that the node's columns can be made of."""
    array = manifest.folder / "example.npy"
    try:
        if array.is_file():
            return _from_matrix(np.load(array, allow_pickle=False), given)
        name = (manifest.example or {}).get("artifact_path")
        if not name:
            return None
        document = json.loads(manifest.file(str(name)).read_text())
    except (OSError, ValueError, ArtifactError):
        return None
    if isinstance(document, dict) and "columns" in document and "data" in document:
        rows = list(zip(*document["data"], strict=True))
        columns = dict(zip(map(str, document["columns"]), rows, strict=True))
        return {n: _column(list(v), given.get(n)) for n, v in columns.items()}
    if isinstance(document, list) and document:
        return _from_matrix(np.asarray(document), given)
    return None


def made_up(given: Mapping[str, ColumnType], rows: int = 2) -> Columns | None:
    """Rows of zeros and empty texts, to warm up with where nothing better is known; None if a
    column has no known shape."""
    if not given or any(kind.shape is None or kind.dtype == "any" for kind in given.values()):
        return None
    return {
        n: kind.filled(rows, "" if kind.dtype == "str" else np.zeros((), kind.numpy_dtype))
        for n, kind in given.items()
    }


def check_answers(predict: Predict, rows: Columns, what: str) -> None:
    """Raises ModelCheckError when it cannot answer these rows or an answer is NaN or infinite."""
    answer = _asked(predict, rows, what)
    for name, values in answer.items():
        if values.dtype.kind != "f":
            continue
        finite = np.isfinite(values).reshape(len(values), -1)
        bad = np.asarray(~finite.all(axis=1), bool)
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            raise ModelCheckError(
                f"{int(bad.sum())} of {len(bad)} answers to {what} are not finite: {name!r} of row "
                f"{first} is {values[first]}"
            )


def check_golden(predict: Predict, golden: Golden) -> None:
    """Raises ModelCheckError that names the first answer which is not the known one."""
    answer = _asked(predict, golden.inputs, "the golden rows")
    for name, known in golden.outputs.items():
        if name not in answer:
            raise ModelCheckError(f"{GOLDEN} knows {name!r}, which the node does not return")
        found = answer[name]
        if known.dtype.kind in "iufb" and found.dtype.kind in "iufb":
            close = np.isclose(found, known, rtol=golden.rtol, atol=golden.atol)
            same = np.asarray(close.reshape(len(found), -1).all(axis=1), bool)
        else:
            same = np.array([a == b for a, b in zip(found.tolist(), known.tolist(), strict=True)])
        if not same.all():
            row = int(np.flatnonzero(~same)[0])
            raise ModelCheckError(
                f"golden row {row}: {name!r} is {found[row]}, expected {known[row]} "
                f"({int((~same).sum())} of {len(same)} differ)"
            )


def check_speed(predict: Predict, incumbent: Predict, rows: Columns) -> tuple[float, float]:
    """Seconds of a call of both, in turns. Raises ModelCheckError for one that is slower than
    what serves by more than SLOW_FACTOR and SLOW_GRACE_S."""
    mine: list[float] = []
    other: list[float] = []
    started_s = time.perf_counter()
    for _ in range(_ROUNDS):
        for call, times in ((predict, mine), (incumbent, other)):
            began_s = time.perf_counter()
            call(rows)
            times.append(time.perf_counter() - began_s)
        if time.perf_counter() - started_s > _ROUND_BUDGET_S:
            break
    # The quickest of its calls against the median of the other's: a busy machine makes calls slow,
    # never quick.
    slow_s, now_s = min(mine), statistics.median(other)
    if slow_s > now_s * SLOW_FACTOR and slow_s - now_s > SLOW_GRACE_S:
        raise ModelCheckError(
            f"{row_count(rows)} rows take {slow_s * 1000:.1f} ms, {slow_s / max(now_s, 1e-6):.0f} "
            f"times as long as what serves now ({now_s * 1000:.2f} ms); the limit is "
            f"{SLOW_FACTOR:g} times"
        )
    return slow_s, now_s


def _asked(predict: Predict, rows: Columns, what: str) -> Columns:
    try:
        return predict(rows)
    except (ModelError, MemoryError):
        raise
    except Exception as error:
        raise ModelCheckError(f"it cannot answer {what}: {type(error).__name__}: {error}") from None


def _from_matrix(values: Any, given: Mapping[str, ColumnType]) -> Columns | None:
    if len(given) == 1:
        ((name, kind),) = given.items()
        if kind.shape is None or values.shape[1:] == kind.shape:
            return {name: _column(values, kind)}
    if values.ndim == 2 and values.shape[1] == len(given):
        return {n: _column(values[:, i], kind) for i, (n, kind) in enumerate(given.items())}
    return {UNNAMED: values} if not given else None


def _column(values: Any, kind: ColumnType | None) -> np.ndarray:
    if kind is not None and kind.dtype not in ("any", "str"):
        return np.asarray(values, dtype=kind.numpy_dtype)
    array = np.asarray(values)
    return array.astype(object) if array.dtype.kind in "UO" else array
