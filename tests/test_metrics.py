"""Statistics of predictions, against other code that computes them another way."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from timm_rld import metrics


def planted(n=500, classes=7, scale=2.0, seed=0):
    """Logits [n, C] that favour the right class a little, and the classes."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes, n)
    logits = rng.normal(0, 1, (n, classes))
    logits[np.arange(n), targets] += 1.2
    return (logits * scale).astype(np.float32), targets


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_wilsons_interval_holds_the_shares_that_a_score_test_does_not_reject():
    for correct, n in ((7, 20), (0, 12), (12, 12), (970, 1000)):
        shares = np.linspace(0, 1, 200001)[1:-1]
        kept = shares[np.abs(correct / n - shares) <= metrics.Z95 * np.sqrt(shares * (1 - shares) / n)]
        low, high = metrics.wilson(correct, n)
        assert low == pytest.approx(kept[0], abs=1e-5) and high == pytest.approx(kept[-1], abs=1e-5)
    assert metrics.wilson(0, 0) == (0.0, 1.0)


def test_the_paired_interval_covers_the_true_difference_in_95_of_100_draws():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(2000):
        u = rng.random(200)
        a, b = u < 0.80, (u < 0.70) | (u > 0.96)  # right in 80% and 74%
        difference, low, high = metrics.mcnemar_interval(a, b)
        assert low <= difference <= high and difference == pytest.approx(a.mean() - b.mean())
        covered += low <= 0.06 <= high
    assert 0.93 < covered / 2000 < 0.97


def test_the_paired_interval_of_equals_is_not_empty():
    same = np.arange(50) < 40
    difference, low, high = metrics.mcnemar_interval(same, same)
    assert difference == 0 and -0.1 < low < 0 < high < 0.1
    assert metrics.mcnemar_interval([], []) == (0.0, -1.0, 1.0)


@pytest.mark.parametrize('bins', [1, 10, 15])
def test_ece_is_that_of_a_loop_over_the_bins(bins):
    logits, targets = planted()
    p = softmax(logits)
    confidence, correct = p.max(1).astype(np.float64), p.argmax(1) == targets
    expected = 0.0
    for b in range(bins):
        here = [i for i, c in enumerate(confidence) if b / bins < c <= (b + 1) / bins]
        if here:
            gap = abs(np.mean([correct[i] for i in here]) - np.mean([confidence[i] for i in here]))
            expected += len(here) / len(targets) * gap
    assert metrics.ece(confidence, correct, bins) == pytest.approx(expected, abs=1e-12)


def test_a_network_that_is_sure_and_right_is_calibrated():
    assert metrics.ece(np.ones(9), np.ones(9)) == 0 and metrics.ece(np.ones(4), np.zeros(4)) == 1
    assert metrics.ece([], []) == 0


@pytest.mark.parametrize('scale', [0.1, 1.0, 5.0, 30.0])
def test_no_temperature_of_a_fine_grid_has_a_lower_loss_than_the_best(scale):
    logits, targets = planted(scale=scale)

    def loss(t):
        z = logits.astype(np.float64) / t
        return (np.log(np.exp(z - z.max(1, keepdims=True)).sum(1)) + z.max(1) - z[np.arange(len(z)), targets]).mean()

    best = metrics.best_temperature(logits, targets)
    grid = np.exp(np.linspace(np.log(0.01), np.log(100), 4001))
    assert best == pytest.approx(grid[np.argmin([loss(t) for t in grid])], rel=2e-3)
    assert all(loss(best) <= loss(t) + 1e-9 for t in (best * 0.99, best * 1.01))


def test_of_logits_that_say_nothing_the_best_temperature_is_the_highest():
    assert metrics.best_temperature(np.full((9, 5), 0.3, np.float32), np.arange(9) % 5) == 100
    all_said = metrics.best_temperature(1e4 * np.eye(5, dtype=np.float32), np.arange(5))
    assert all_said == pytest.approx(0.01)


def test_the_best_temperature_scales_with_the_logits():
    logits, targets = planted()
    once, ten_times = (metrics.best_temperature(k * logits, targets) for k in (1, 10))
    assert ten_times == pytest.approx(10 * once, rel=1e-4)


@pytest.mark.parametrize(
    'logits, targets, expected',
    [
        (np.eye(3, dtype=np.float32), np.arange(3), 0.01),  # all right: the sharper, the better
        (np.eye(3, dtype=np.float32), np.array([1, 2, 0]), 100.0),  # all wrong
        (np.empty((0, 3), dtype=np.float32), np.empty(0, dtype=int), math.nan),
    ],
)
def test_where_no_temperature_is_best_a_bound_is(logits, targets, expected):
    assert metrics.best_temperature(logits, targets) == pytest.approx(expected, nan_ok=True)


def test_processes_with_parts_of_the_images_find_the_temperature_of_all():
    logits, targets = planted()
    parts, meet = {}, threading.Barrier(2)

    def process(rank, images):
        def total(sums):
            parts[rank] = sums
            meet.wait(10)
            both = parts[0] + parts[1]
            meet.wait(10)
            return both

        return metrics.best_temperature(logits[images], targets[images], total)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(process, (0, 1), (slice(0, 200), slice(200, None))))
    assert found[0] == found[1] == pytest.approx(metrics.best_temperature(logits, targets), rel=1e-6)


def test_confusion_and_the_figures_of_each_class_are_those_of_a_loop():
    logits, targets = planted(classes=5)
    targets = np.where(targets == 3, 2, targets)  # a class without images
    predictions = logits.argmax(1)
    expected = [[0] * 5 for _ in range(5)]
    for t, p in zip(targets.tolist(), predictions.tolist()):
        expected[t][p] += 1
    assert metrics.confusion(targets, predictions, 5).tolist() == expected
    found = metrics.per_class(targets, predictions, 5)
    assert found['images'].tolist() == [sum(row) for row in expected]
    assert found['predicted'].tolist() == [sum(row[j] for row in expected) for j in range(5)]
    assert found['correct'].tolist() == [expected[i][i] for i in range(5)]
    assert math.isnan(found['accuracy'][3]) and found['accuracy'][0] == expected[0][0] / sum(expected[0])
    shares = [expected[i][i] / sum(expected[i]) for i in (0, 1, 2, 4)]
    assert metrics.macro(targets, predictions, 5) == pytest.approx(sum(shares) / 4)
