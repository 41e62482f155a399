"""The same rows by both versions: what differs, what fails the gate, and its picture."""

import builtins
import io
import json

import numpy as np
import pytest

from twinpath.errors import InputError, MissingExtraError
from twinpath.rollout.backtest import CHALLENGER, INCUMBENT, LABEL, Backtest
from twinpath.rollout.bins import Bins, Scale
from twinpath.rollout.plots import picture


def block(n=6000, seed=0, *, noise=0.3, wrong=None, label=True):
    """Flights of 20 carriers; the challenger is `noise` off, and the opposite for one carrier."""
    random = np.random.default_rng(seed)
    carrier = np.array([f"C{i:02d}" for i in range(20)], object)[random.integers(0, 20, n)]
    logits = random.normal(0, 1.5, n) + np.where(carrier == "C00", 1.5, 0.0)
    sign = np.where(carrier == wrong, -1.0, 1.0)
    columns = {
        "carrier": carrier,
        INCUMBENT: 1 / (1 + np.exp(-logits)),
        CHALLENGER: 1 / (1 + np.exp(-(sign * logits + random.normal(0, noise, n)))),
    }
    if label:
        columns[LABEL] = (random.random(n) < 1 / (1 + np.exp(-logits))).astype(float)
    return columns


def test_a_challenger_that_scores_alike_passes():
    report = Backtest("3", "4", ("carrier",)).add(block()).report()
    assert (report.passed, report.reasons, report.rows) == (True, (), 6000)
    assert 0 < report.mean_change < 0.1
    figures = {d.figure: d for d in report.differences if not d.segment}
    assert set(figures) == {
        "error rate", "score PSI", "score KL", "AUC", "accuracy", "calibration error",
    }  # fmt: skip
    assert len(report.table()) == 20
    json.dumps(report.as_dict(), allow_nan=False)


def test_a_challenger_wrong_for_one_carrier_fails_there_and_passes_overall():
    backtest = Backtest("3", "4", ("carrier",)).add(block(wrong="C00", label=False))
    report = backtest.report()
    assert not report.passed
    assert all("carrier=C00" in reason for reason in report.reasons)
    assert report.table()[0].segment == "carrier=C00"
    assert Backtest("3", "4").add(block(wrong="C00", label=False)).report().passed


def test_a_challenger_of_worse_labels_fails():
    report = Backtest("3", "4").add(block(noise=4.0)).report()
    assert any(reason.startswith("AUC: worse by") for reason in report.reasons)


def test_failed_rows_are_counted_and_not_scored():
    columns = block()
    columns["failed_challenger"] = np.arange(6000) % 20 == 0
    columns[CHALLENGER] = np.where(columns["failed_challenger"], np.nan, columns[CHALLENGER])
    report = Backtest("3", "4").add(columns).report()
    assert report.reasons[0].startswith("error rate: worse by 0.05")
    assert np.isfinite(report.mean_change)


def test_blocks_and_workers_add_up():
    whole = Backtest("3", "4", ("carrier",)).add(block())
    left, right = Backtest("3", "4", ("carrier",)), Backtest("3", "4", ("carrier",))
    columns = block()
    for i, rows in enumerate(np.array_split(np.arange(6000), 7)):
        part = {name: values[rows] for name, values in columns.items()}
        (left if i % 2 else right).add(part)
    merged = left.merge(right).report()
    ideal = whole.report()
    for one, other in zip(merged.differences, ideal.differences, strict=True):
        assert (one.figure, one.segment, one.rows) == (other.figure, other.segment, other.rows)
        assert one.size == pytest.approx(other.size)
        assert one.low == pytest.approx(other.low)
    assert merged.largest_change == ideal.largest_change
    assert merged.mean_change == pytest.approx(ideal.mean_change)
    assert (merged.crossed, merged.rows) == (ideal.crossed, ideal.rows)


def test_the_largest_segments_are_listed_and_the_others_are_one():
    backtest = Backtest("3", "4", ("k",))
    for i in range(5):
        n = 40 * (60 - 10 * i)
        keys = np.arange(n) % 40 + 40 * i
        backtest.add({INCUMBENT: np.full(n, 0.5), CHALLENGER: np.full(n, 0.5), "k": keys})
    table = {d.segment: d.rows for d in backtest.report().table()}
    assert len(table) == 65
    assert sum(table.values()) == 40 * (60 + 50 + 40 + 30 + 20)
    assert table["k=0"] == 60
    assert table["k=(other)"] == 16 * 50 + 40 * (40 + 30 + 20)


def test_classes_are_compared_by_how_many_changed():
    before = np.array(["late", "early"] * 100, object)
    now = before.copy()
    now[:20] = "late"
    bins = Bins(scale=Scale.LABEL)
    report = Backtest("3", "4", bins=bins).add({INCUMBENT: before, CHALLENGER: now}).report()
    assert report.crossed == 0.05
    assert report.mean_change == 0


def test_rows_without_a_label_yet_are_compared_by_score_alone():
    columns = block()
    columns[LABEL][:3000] = np.nan
    figures = {d.figure: d for d in Backtest("3", "4").add(columns).report().differences}
    assert (figures["AUC"].rows, figures["score PSI"].rows) == (3000, 6000)


def test_what_cannot_be_compared_is_refused_with_the_reason():
    with pytest.raises(InputError, match="'score_challenger' is not in the block"):
        Backtest("3", "4").add({INCUMBENT: np.zeros(3)})
    with pytest.raises(InputError, match="no rows"):
        Backtest("3", "4").report()
    with pytest.raises(InputError, match="compared with itself"):
        Backtest("3", "3")


@pytest.mark.parametrize(
    ("backtest", "columns"),
    [
        (Backtest("3", "4", ("carrier",)), block(wrong="C00")),
        (
            Backtest("3", "4", bins=Bins(scale=Scale.LABEL)),
            {
                INCUMBENT: np.array(["a", "b"] * 40, object),
                CHALLENGER: np.array(["a", "a"] * 40, object),
            },
        ),
    ],
    ids=["segments and labels", "neither, and classes"],
)
def test_its_picture_is_a_png_that_shows_something(backtest, columns):
    from matplotlib import image

    png = picture(backtest.add(columns), backtest.report())
    pixels = image.imread(io.BytesIO(png), format="png")
    assert pixels.shape[:2] == (880, 1210)
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    backtest = Backtest("3", "4").add(block(50))
    with pytest.raises(MissingExtraError, match=r"twinpath\[loadtest\]"):
        picture(backtest, backtest.report())
