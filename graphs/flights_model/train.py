"""Prepares the flights example: data, features, models and how good they are.

``python -m graphs.flights_model.train [--dir DIR] [--again]``

Trains on January to September, tests on October to December of 2013. Whatever is there already is
reused. Writes ``<dir>/model/{delay,second}.joblib``, ``reasons.json`` and ``metrics.json``, and
registers the delay model in ``<dir>/registry/mlflow.db``.
"""

import argparse
import json
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from graphs.flights_model.data import REQUEST_COLUMNS, prepare, whole_directory
from graphs.flights_model.decide import THEMES
from graphs.flights_model.features import LATE_MINUTES, build
from graphs.flights_model.nodes import CLOSE_CALL, FEATURES, matrix, save_model
from graphs.flights_model.preprocess import Preprocess
from graphs.flights_model.registered import ensure_registered
from graphs.flights_model.schema import flights_dir
from graphs.flights_model.store import lookup, make_repository, materialise
from twinpath.graph.columns import Columns

LAST_TRAINING_MONTH = 9


def ensure(directory: Path, *, again: bool = False) -> dict[str, Any]:
    """Make data, features and models unless they are there; return the metrics.

    Args:
        directory: the example's directory, see `flights_dir`.
        again: build features and models anew.
    """
    if again:
        for folder in ("features", "feature_repo", "model"):
            shutil.rmtree(directory / folder, ignore_errors=True)
    metrics = directory / "model" / "metrics.json"
    if not metrics.is_file():
        began = time.perf_counter()
        prepare(directory)
        prepared = time.perf_counter()
        build(directory)
        make_repository(directory)
        materialise(directory)
        built = time.perf_counter()
        with whole_directory(directory / "model") as out:
            found = _train(directory, out)
            found["seconds"] = {
                "data": round(prepared - began, 2),
                "features": round(built - prepared, 2),
                "training": round(time.perf_counter() - built, 2),
            }
            (out / "metrics.json").write_text(json.dumps(found, indent=2) + "\n")
    ensure_registered(directory)
    read: dict[str, Any] = json.loads(metrics.read_text())
    return read


def request_columns(requests: pl.DataFrame) -> Columns:
    """Return a table of requests as the columns that the graph takes."""
    nobody_says = np.full(requests.height, np.datetime64("NaT"), dtype="datetime64[us]")
    return {
        "asked_at": requests["asked_at"].to_numpy() if "asked_at" in requests else nobody_says,
    } | {
        name: np.array(requests[name].to_list(), dtype=object)
        if requests[name].dtype == pl.String
        else requests[name].to_numpy()
        for name in REQUEST_COLUMNS
    }


def _train(directory: Path, out: Path) -> dict[str, Any]:
    """Fit all models, write them into `out`, return the metrics."""
    flights = pl.read_parquet(directory / "data" / "flights.parquet").drop_nulls("arr_delay")
    columns = request_columns(flights)
    # The nodes that serve are the ones that make the training matrix: no second code path.
    for node in (Preprocess(str(directory)), lookup(directory).offline()):
        node.setup()
        columns |= node.predict(columns)
    x, late = matrix(columns), flights["arr_delay"].to_numpy() > LATE_MINUTES
    training = flights["month"].to_numpy() <= LAST_TRAINING_MONTH
    x_train, late_train, x_test = x[training], late[training], x[~training]

    delay = HistGradientBoostingClassifier(
        max_iter=60,
        learning_rate=0.15,
        max_leaf_nodes=31,
        min_samples_leaf=100,
        l2_regularization=5.0,
        max_features=0.5,
        early_stopping=False,
        random_state=0,
    ).fit(x_train, late_train)
    net = MLPClassifier((32,), alpha=1e-3, batch_size=512, max_iter=6, random_state=0)
    # Ended by the count of passes on purpose: more of them overfit the months seen.
    net.set_params(tol=0.0, n_iter_no_change=6, verbose=False)
    second = make_pipeline(
        SimpleImputer(strategy="median"),
        StandardScaler(),
        FunctionTransformer(np.clip, kw_args={"a_min": -5.0, "a_max": 5.0}),
        net,
    )
    _fit_quietly(second, x_train[::2], late_train[::2])
    save_model(out / "delay.joblib", delay)
    save_model(out / "second.joblib", second)
    linear = _linear(columns, training, late_train)
    (out / "reasons.json").write_text(json.dumps(linear, indent=2) + "\n")

    p_first = delay.predict_proba(x_test)[:, 1]
    p_second = second.predict_proba(x_test)[:, 1]
    close = (p_first >= CLOSE_CALL[0]) & (p_first <= CLOSE_CALL[1])
    p_final = np.where(close, (p_first + p_second) / 2, p_first)
    hours = x[:, FEATURES.index("minute_of_day")] // 60
    p_baseline = _baseline(columns["carrier"], hours, late, training)
    late_test = late[~training]
    return {
        "rows_train": int(training.sum()),
        "rows_test": len(late_test),
        "share_late_test": round(float(late_test.mean()), 4),
        "auc": round(float(roc_auc_score(late_test, p_final)), 4),
        "auc_model_alone": round(float(roc_auc_score(late_test, p_first)), 4),
        "auc_second_alone": round(float(roc_auc_score(late_test, p_second)), 4),
        "auc_baseline": round(float(roc_auc_score(late_test, p_baseline)), 4),
        "baseline": "share of late flights by carrier and hour, January to September",
        "share_reviewed_test": round(float(close.mean()), 4),
    }


def _fit_quietly(model: Any, x: NDArray[np.float64], late: NDArray[np.bool_]) -> None:
    """Fit without the warning that a net stopped by its count of passes has not converged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x, late)


def _linear(
    columns: Columns, training: NDArray[np.bool_], late: NDArray[np.bool_]
) -> dict[str, tuple[float, float]]:
    """Fit the linear model behind the reasons: feature -> (typical value, log-odds a unit)."""
    features = tuple(feature for theme in THEMES for feature in theme.features)
    x = matrix(columns, features)[training]
    imputer, scaler = SimpleImputer(strategy="mean"), StandardScaler()
    fitted = LogisticRegression(C=0.1).fit(scaler.fit_transform(imputer.fit_transform(x)), late)
    weights = fitted.coef_[0] / scaler.scale_
    return {
        feature: (float(typical), float(weight))
        for feature, typical, weight in zip(features, scaler.mean_, weights, strict=True)
    }


def _baseline(
    carrier: NDArray[Any], hour: NDArray[Any], late: NDArray[np.bool_], training: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Share of late training flights by carrier and hour, smoothed, for the test rows."""
    table = pl.DataFrame({"carrier": carrier.tolist(), "hour": hour, "late": late})
    seen = table.filter(pl.Series(training))
    prior, weight = float(late[training].mean()), 20
    rate = (pl.col("late").sum() + prior * weight) / (pl.len() + weight)
    shares = seen.group_by("carrier", "hour").agg(rate.alias("share"))
    test = table.filter(pl.Series(~training)).join(
        shares, on=["carrier", "hour"], how="left", maintain_order="left"
    )
    return test["share"].fill_null(prior).to_numpy()


def main() -> None:
    """Prepare the example and print its metrics."""
    parser = argparse.ArgumentParser(description="Prepare data, features and models.")
    parser.add_argument("--dir", help="the example's directory (default: .twinpath/flights)")
    parser.add_argument("--again", action="store_true", help="build features and models anew")
    given = parser.parse_args()
    directory = flights_dir(given.dir)
    print(
        json.dumps({"directory": str(directory)} | ensure(directory, again=given.again), indent=2)
    )


if __name__ == "__main__":
    main()
