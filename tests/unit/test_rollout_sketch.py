"""Counts of versions add up in any order, and the recorder counts every row once."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinpath.errors import InputError
from twinpath.rollout.bins import Bins, Scale
from twinpath.rollout.recorder import WAITING_ROWS, Recorder, score_of
from twinpath.rollout.sketch import OTHER, Report, merged

ALL_BINS = [
    Bins(),
    Bins(scale=Scale.PROBABILITY),
    Bins(scale=Scale.REAL),
    Bins(scale=Scale.LABEL),
    Bins.adapted(np.linspace(1000, 1010, 500)),
]


@st.composite
def reports(draw):
    recorder = Recorder(("carrier",))
    for _ in range(draw(st.integers(0, 4))):
        n = draw(st.integers(1, 6))
        scores = draw(st.lists(st.floats(width=32), min_size=n, max_size=n))
        carriers = draw(st.lists(st.sampled_from(["UA", "AA", "é"]), min_size=n, max_size=n))
        failed = draw(st.lists(st.booleans(), min_size=n, max_size=n))
        recorder.record(
            draw(st.sampled_from(["1", "2"])),
            np.array(scores),
            {"carrier": np.array(carriers, object)},
            draw(st.floats(0, 10)),
            np.array(failed),
        )
    return recorder.drain()


def text(report):
    """A form that equal reports share."""
    return sorted(
        (
            version,
            sketch.overall.outcomes.tolist(),
            sketch.latency.tolist(),
            sorted(
                (column, value, tally.outcomes.tolist())
                for column, values in sketch.segments.items()
                for value, tally in values.items()
            ),
        )
        for version, sketch in report.versions.items()
    )


@settings(max_examples=60, deadline=None)
@given(reports(), reports(), reports())
def test_merging_is_associative_and_commutative(a, b, c):
    bins = Bins()
    left = merged([merged([a, b], bins), c], bins)
    right = merged([a, merged([b, c], bins)], bins)
    assert text(left) == text(right) == text(merged([c, b, a], bins))


@settings(max_examples=40, deadline=None)
@given(reports())
def test_a_report_survives_json(report):
    assert text(Report.from_json(report.to_json())) == text(report)


@pytest.mark.parametrize("wrong", ["", "[]", "{}", '{"bins":{},"versions":{"1":{}}}', "null"])
def test_what_is_no_report_is_refused(wrong):
    with pytest.raises(InputError, match="not a report"):
        Report.from_json(wrong)


def test_reports_with_other_bins_do_not_add():
    with pytest.raises(InputError, match="does not add"):
        Report(Bins()).add(Report(Bins(scale=Scale.REAL)))


def test_merging_changes_neither_part():
    recorder = Recorder(("c",))
    recorder.record("1", np.array([0.5]), {"c": np.array(["x"], object)}, 0.001)
    report = recorder.drain()
    before = text(report)
    merged([report, report], Bins())
    assert text(report) == before


def test_every_row_is_counted_once_overall_and_in_its_segment():
    recorder = Recorder(("carrier", "origin"))
    random = np.random.default_rng(0)
    total = {"1": 0, "2": 0}
    found = []
    for i in range(400):
        n = int(random.integers(1, 120))
        version = "1" if i % 3 else "2"
        total[version] += n
        columns = {"carrier": np.array([f"C{j % 7}" for j in range(n)], object)}
        recorder.record(version, random.random(n), columns, 0.002, random.random(n) < 0.1)
        if i % 50 == 0:
            found.append(recorder.drain())
    report = merged([*found, recorder.drain()], Bins())
    for version, rows in total.items():
        sketch = report.versions[version]
        assert sketch.overall.rows == rows
        assert sum(tally.rows for tally in sketch.segments["carrier"].values()) == rows
        # A column that the batch lacks is one segment.
        assert set(sketch.segments["origin"]) == {OTHER}
        assert sketch.overall.errors == sum(
            tally.errors for tally in sketch.segments["carrier"].values()
        )
    assert sum(int(s.latency.sum()) for s in report.versions.values()) == 400
    assert recorder.drain().versions == {}


def test_the_number_of_segments_is_bounded():
    recorder = Recorder(("k",), capacity=5)
    recorder.record("1", np.zeros(100), {"k": np.arange(100)}, 0.001)
    values = recorder.drain().versions["1"].segments["k"]
    assert set(values) == {"0", "1", "2", "3", "4", OTHER}
    assert values[OTHER].rows == 95


def test_waiting_rows_are_bounded():
    recorder = Recorder()
    for _ in range(3):
        recorder.record("1", np.zeros(WAITING_ROWS // 2), {}, 0.001)
        assert recorder.waiting_rows < WAITING_ROWS
    assert recorder.drain().versions["1"].overall.rows == 3 * (WAITING_ROWS // 2)


def test_threads_lose_no_row():
    recorder = Recorder()

    def work():
        for _ in range(500):
            recorder.record("1", np.array([0.5, 0.6]), {}, 0.001)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    drained = [recorder.drain() for _ in range(20)]
    for thread in threads:
        thread.join()
    report = merged([*drained, recorder.drain()], Bins())
    assert report.versions["1"].overall.rows == 4000


def test_a_failed_row_is_an_error_and_not_a_score():
    recorder = Recorder()
    recorder.record("1", np.array([np.nan, 0.5]), {}, 0.01, np.array([True, False]))
    tally = recorder.drain().versions["1"].overall
    assert (tally.rows, tally.errors, int(tally.scores.sum())) == (2, 1, 1)


@pytest.mark.parametrize("bins", ALL_BINS, ids=lambda bins: bins.scale)
def test_what_is_not_finite_has_a_bin_of_its_own(bins):
    values = np.array([np.nan, np.inf, 0.5, 1001.0, -3.0])
    if bins.scale is Scale.LABEL:
        values = np.array([None, float("nan"), "a", "b", "c"], object)
    index = bins.index(values)
    assert (index[:2] == bins.count - 1).all()
    assert ((index[2:] >= 0) & (index[2:] < bins.count - 1)).all()


def test_rare_and_sure_probabilities_are_told_apart():
    index = Bins().index(np.array([0.001, 0.002, 0.5, 0.998, 0.999]))
    assert len(set(index.tolist())) == 5


@pytest.mark.parametrize("scores", [[5.0, 9.0, 60.0, 300.0], [-40.0, -3.0, 0.0, 7.0], [0, 1, 2, 3]])
def test_scores_that_are_no_probabilities_are_told_apart_without_being_asked(scores):
    assert len(set(Bins().index(np.array(scores)).tolist())) == 4


def test_adapted_bins_see_what_fixed_ones_do_not():
    scores = np.random.default_rng(0).uniform(1000, 1010, 5000)
    assert len(np.unique(Bins(scale=Scale.REAL).index(scores))) <= 2
    adapted = Bins.adapted(scores)
    counts = np.bincount(adapted.index(scores), minlength=adapted.count)
    assert counts.max() < 300
    assert Bins.model_validate_json(adapted.model_dump_json()) == adapted
    assert len(adapted.model_dump_json()) < 1000


def test_adapted_bins_of_one_value_or_none_are_bins():
    for scores in ([5.0] * 10, [], [np.nan]):
        assert Bins.adapted(np.array(scores)).count >= 2


def test_labels_of_classes_are_counted_by_class():
    bins = Bins(scale=Scale.LABEL)
    index = bins.index(np.array(["late", "early", "late"], object))
    assert index[0] == index[2] != index[1]
    assert bins.index(np.array([3, 4], np.int32)).tolist() == [3, 4]


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": "edges"},
        {"edges": (1.0,)},
        {"scale": "edges", "edges": (2.0, 1.0)},
        {"scale": "edges", "edges": (1.0, float("inf"))},
    ],
)
def test_edges_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match="edges"):
        Bins(**wrong)


def test_one_score_is_taken_of_several():
    assert score_of(np.array([[0.2, 0.8], [0.9, 0.1]])).tolist() == [0.8, 0.1]
    assert score_of(np.array([[0.2, 0.5, 0.3]])).tolist() == [0.5]
    assert score_of(np.array([[3.0], [4.0]])).tolist() == [3.0, 4.0]
    assert score_of(np.array([1.0])).tolist() == [1.0]
