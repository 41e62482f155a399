"""Evidence holds however often it is looked at, and divergences are not fooled by few rows."""

from math import log

import numpy as np
import pytest

from twinpath.errors import InputError
from twinpath.rollout.bins import Bins
from twinpath.rollout.divergence import grouped, kl, psi
from twinpath.rollout.labels import LabelSketch, accuracy, auc, calibration, mean_label, proportion
from twinpath.rollout.sequential import (
    KnownRate,
    Rate,
    SameDistribution,
    found_by_ebh,
    needed,
)


def peaks(make, draw, runs, looks, seed=0):
    """The highest log e-value that each run ever shows, looked at after each block."""
    random = np.random.default_rng(seed)
    highest = []
    for _ in range(runs):
        process = make()
        top = 0.0
        for look in range(looks):
            process.see(*draw(random, look))
            top = max(top, process.log_e)
        highest.append(top)
    return np.array(highest)


def test_equal_distributions_are_hardly_ever_told_apart_however_often_one_looks():
    rates = np.full(20, 1 / 20)
    top = peaks(
        lambda: SameDistribution.over(20),
        lambda random, _: (random.multinomial(95, rates), random.multinomial(5, rates)),
        runs=100,
        looks=80,
    )
    # Ville: a rate of at most 5 %; 100 runs have more than 12 with a probability of 0.1 %.
    assert (top >= log(20)).sum() <= 12


def test_drift_that_both_share_is_no_evidence():
    def draw(random, look):
        rates = np.roll(np.linspace(1, 9, 12), look // 5)
        rates = rates / rates.sum()
        return random.multinomial(40, rates), random.multinomial(10, rates)

    top = peaks(lambda: SameDistribution.over(12), draw, runs=100, looks=80)
    assert (top >= log(20)).sum() <= 12


def test_blocks_of_one_row_and_of_one_version_are_evidence_too():
    random = np.random.default_rng(3)
    process = SameDistribution.over(2)
    for _ in range(400):
        row = np.eye(2, dtype=np.int64)[int(random.random() < 0.2)]
        process.see(row, np.zeros(2, np.int64))
        row = np.eye(2, dtype=np.int64)[int(random.random() < 0.8)]
        process.see(np.zeros(2, np.int64), row)
    assert process.log_e > 20
    assert process.incumbent.sum() == process.challenger.sum() == 400


def test_a_difference_is_found_soon():
    a, b = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    top = peaks(
        lambda: SameDistribution.over(3),
        lambda random, _: (random.multinomial(95, a), random.multinomial(5, b)),
        runs=50,
        looks=40,
    )
    assert (top >= needed(0.001)).all()


def rate_draw(p, q, n=95, m=5):
    return lambda random, _: ((random.binomial(n, p), n), (random.binomial(m, q), m))


@pytest.mark.parametrize(("p", "q"), [(0.02, 0.02), (0.05, 0.02), (0.0, 0.0)])
def test_a_rate_that_is_not_higher_is_hardly_ever_called_higher(p, q):
    top = peaks(Rate, rate_draw(p, q), runs=300, looks=100)
    assert (top >= log(20)).sum() <= 25


def test_a_rate_that_is_higher_is_found_soon():
    top = peaks(Rate, rate_draw(0.01, 0.2), runs=50, looks=60)
    assert (top >= needed(0.001)).all()


def test_a_rate_over_a_known_limit_is_found_and_one_below_is_not():
    def alone(rate):
        return lambda random, _: ((random.binomial(20, rate), 20),)

    below = peaks(lambda: KnownRate(0.05), alone(0.05), runs=300, looks=80)
    assert (below >= log(20)).sum() <= 25
    above = peaks(lambda: KnownRate(0.05), alone(0.3), runs=50, looks=30)
    assert (above >= needed(0.001)).all()


def test_ebh_finds_more_where_more_is_wrong():
    strong = log(64 / 0.01)
    assert found_by_ebh([0.0, 1.0], 64, 0.01) == []
    assert found_by_ebh([0.0, strong, 1.0], 64, 0.01) == [1]
    # Each alone is too weak; four of them are not.
    weak = log(64 / (4 * 0.01)) + 0.001
    assert found_by_ebh([weak] * 3, 64, 0.01) == []
    assert found_by_ebh([weak, 0.0, weak, weak, weak], 64, 0.01) == [0, 2, 3, 4]
    assert found_by_ebh([], 64, 0.01) == []


def test_samples_of_one_distribution_diverge_by_nothing_on_average():
    random = np.random.default_rng(0)
    rates = np.full(10, 0.1)
    for small in (50, 200, 2000):
        found = [
            psi(random.multinomial(5000, rates), random.multinomial(small, rates))
            for _ in range(200)
        ]
        # Without the correction the mean would be 9 / small.
        assert np.mean([one.value for one in found]) < 4.5 / small
        assert np.mean([one.low() > 0 for one in found]) < 0.1


def test_divergences_approach_their_definitions():
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.3, 0.3])
    a, b = (p * 10_000_000).astype(int), (q * 10_000_000).astype(int)
    assert psi(a, b).value == pytest.approx(float(((q - p) * np.log(q / p)).sum()), rel=1e-3)
    assert kl(a, b).value == pytest.approx(float((q * np.log(q / p)).sum()), rel=1e-3)
    assert psi(a, a).value == 0


def test_the_error_of_a_divergence_is_that_of_repeated_samples():
    random = np.random.default_rng(1)
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.3, 0.3, 0.4])
    for divergence in (psi, kl):
        found = [
            divergence(random.multinomial(3000, p), random.multinomial(400, q)) for _ in range(600)
        ]
        spread = np.std([one.value for one in found])
        assert np.mean([one.error for one in found]) == pytest.approx(spread, rel=0.25)


def test_groups_have_about_equal_counts_and_lose_no_bin():
    counts = np.array([0, 5, 5, 0, 90, 0, 3, 3, 3, 1, 0])
    at = grouped(counts)
    assert at[0] == 0
    assert np.add.reduceat(counts, at).sum() == counts.sum()
    assert 90 in np.add.reduceat(counts, at)
    even = np.add.reduceat(np.ones(100, int), grouped(np.ones(100, int)))
    assert even.tolist() == [10] * 10
    assert grouped(np.zeros(5)).tolist() == [0]
    assert grouped(np.array([1, 1, 0, 7, 0, 0]), apart=2).tolist()[-2:] == [4, 5]


def labelled(n, seed=0, lift=1.0):
    random = np.random.default_rng(seed)
    logits = random.normal(0, 1.5, n)
    labels = random.random(n) < 1 / (1 + np.exp(-lift * logits))
    return 1 / (1 + np.exp(-logits)), labels


def test_figures_of_labels_are_those_of_the_usual_library():
    from sklearn.metrics import accuracy_score, roc_auc_score

    scores, labels = labelled(20_000)
    sketch = LabelSketch.of(Bins(), scores, labels)
    assert auc(sketch).value == pytest.approx(roc_auc_score(labels, scores), abs=0.002)
    assert accuracy(sketch).value == pytest.approx(accuracy_score(labels, scores >= 0.5))
    assert mean_label(sketch).value == pytest.approx(labels.mean())
    assert calibration(sketch).value < 0.02
    assert calibration(LabelSketch.of(Bins(), scores**3, labels)).value > 0.1


def test_the_error_of_the_auc_is_that_of_repeated_samples():
    found = [auc(LabelSketch.of(Bins(), *labelled(400, seed))) for seed in range(150)]
    spread = np.std([one.value for one in found])
    assert np.mean([one.error for one in found]) == pytest.approx(spread, rel=0.3)


def test_label_sketches_add_up():
    scores, labels = labelled(1000)
    whole = LabelSketch.of(Bins(), scores, labels)
    parts = LabelSketch.of(Bins(), scores[:300], labels[:300])
    parts.add(LabelSketch.of(Bins(), scores[300:], labels[300:]))
    assert (parts.outcomes == whole.outcomes).all()
    assert parts.agreed == whole.agreed
    assert np.allclose(parts.score_sum, whole.score_sum)


def test_without_labels_there_are_no_figures():
    empty = LabelSketch.empty(Bins())
    for figure in (auc, accuracy, calibration, mean_label):
        assert np.isnan(figure(empty).value)
        assert np.isinf(figure(empty).error)
    only_late = LabelSketch.of(Bins(), [0.5, 0.6], [1, 1])
    assert np.isnan(auc(only_late).value)


def test_what_is_no_label_is_refused():
    with pytest.raises(InputError, match=r"label 0\.5: expected 0 or 1"):
        LabelSketch.of(Bins(), [0.1, 0.2], [1, 0.5])
    with pytest.raises(InputError, match="expected n of each"):
        LabelSketch.of(Bins(), [0.1, 0.2], [1])


def test_a_rate_without_events_is_not_certain():
    assert proportion(0, 10).error > 0.05
