"""Statistics of a classifier's predictions, in NumPy alone. Shares lie in 0..1; whoever shows them makes percent."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Z95 = 1.959963984540054  # the standard normal distribution's 97.5% quantile
TEMPERATURES = (0.01, 100.0)  # between which the best one is sought
_CHUNK = 1 << 22  # logits in work at a time: 16 MB


def wilson(correct: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Return Wilson's score interval of a share: (p̂ + z²/2n ± z·√(p̂(1-p̂)/n + z²/4n²)) / (1 + z²/n), p̂ = correct / n.

    Unlike p̂ ± z·√(p̂(1-p̂)/n) it stays within 0..1, and is not empty where all are right. (0, 1) for n = 0.

    E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22 (1927).
    """
    if not n:
        return 0.0, 1.0
    p = correct / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low, high = (middle - half) / scale, (middle + half) / scale
    return (0.0 if correct == 0 else low), (1.0 if correct == n else high)


# 97.5% quantiles of Student's t for 1, 2, … degrees of freedom
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean of some values, one a run, and half the width of its 95% interval (Student's t); None for one."""
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return mean, None
    return mean, t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n)


def t_quantile(degrees: int) -> float:
    """Return the 97.5% quantile of Student's t for a number of degrees of freedom of at least 1."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    z = Z95  # the first terms of the quantile's series in 1 / degrees
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def mcnemar_interval(a_correct: ArrayLike, b_correct: ArrayLike, z: float = Z95) -> tuple[float, float, float]:
    """Return how much more often ``a`` is right than ``b`` on the same images, and the interval of that difference.

    Only the images count on which one of the two is right: n₁₀ where it is a, n₀₁ where it is b. The difference is
    (n₁₀ - n₀₁) / n. Its interval is Bonett's and Price's adjusted one: with p₁₀ = (n₁₀ + 1) / (n + 2) and p₀₁ alike,
    p₁₀ - p₀₁ ± z·√((p₁₀ + p₀₁ - (p₁₀ - p₀₁)²) / (n + 2)), which holds for few differences too. An interval that
    does not hold 0 agrees with McNemar's test.

    Q. McNemar, "Note on the sampling error of the difference between correlated proportions", Psychometrika 12 (1947);
    D. G. Bonett, R. M. Price, "Adjusted Wald Confidence Interval for a Difference of Binomial Proportions Based on
    Paired Data", J. Educ. Behav. Stat. 37 (2012).

    Args:
        a_correct, b_correct: of each image whether it was classified correctly, `[n]`.

    Returns:
        The difference, and the interval's ends. (0, -1, 1) for n = 0.
    """
    a, b = np.asarray(a_correct, dtype=bool), np.asarray(b_correct, dtype=bool)
    n = len(a)
    if not n:
        return 0.0, -1.0, 1.0
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p, q = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return (only_a - only_b) / n, max(-1.0, p - q - half), min(1.0, p - q + half)


def reliability(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> dict[str, NDArray[Any]]:
    """Return what a reliability diagram shows, for bins ((i-1)/bins, i/bins] of the confidence.

    Args:
        confidence: probability of the predicted class, `[n]`.
        correct: whether the prediction is right, `[n]`.

    Returns:
        `count`, mean `confidence` and `accuracy` of each bin, `[bins]`; 0 where a bin is empty.
    """
    p, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    place = np.clip(np.ceil(p * bins).astype(np.int64) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    some = np.maximum(count, 1)
    return {
        'count': count,
        'confidence': np.bincount(place, weights=p, minlength=bins) / some,
        'accuracy': np.bincount(place, weights=right, minlength=bins) / some,
    }


def ece(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Return the expected calibration error: Σ_b n_b / n · \\|accuracy_b - confidence_b\\| over :func:`reliability`'s
    bins.

    C. Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, eq. 3.
    """
    found = reliability(confidence, correct, bins)
    gaps = np.abs(found['accuracy'] - found['confidence'])
    return float((found['count'] * gaps).sum() / max(int(found['count'].sum()), 1))


def best_temperature(
    logits: NDArray[Any],
    targets: NDArray[Any],
    total: Callable[[NDArray[np.float64]], NDArray[np.float64]] = lambda sums: sums,
) -> float:
    """Return the temperature T that minimises the mean cross-entropy of softmax(logits / T), within 0.01..100.

    In β = 1/T it is convex: its derivative is the mean of E_p[z] - z_y, the second one that of Var_p[z], for p =
    softmax(β·z). Newton's method finds where the first is 0, by bisection where a step leaves what is known to hold it.

    C. Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 4.2.

    Args:
        logits: `[n, C]`.
        targets: classes `[n]`.
        total: adds the sums of several processes, which each have a part of the images.

    Returns:
        T; NaN where there are no images. A bound where all are right (0.01), or the logits say nothing (100).
    """

    def slope(x: float) -> tuple[float, float]:
        """First and second derivative at β = exp(x), as means."""
        first, second, n = total(_derivatives(logits, targets, math.exp(x)))
        return (first / n, second / n) if n else (math.nan, math.nan)

    low, high = (math.log(1 / t) for t in reversed(TEMPERATURES))
    x, (first, second) = 0.0, slope(0.0)
    if math.isnan(first):
        return math.nan
    if first == second == 0 and not total(np.array([np.ptp(logits, axis=1).sum()]))[0]:  # each row is of equal logits
        return TEMPERATURES[1]
    if first < 0 and slope(high)[0] <= 0:
        return TEMPERATURES[0]
    if first > 0 and slope(low)[0] >= 0:
        return TEMPERATURES[1]
    for step in range(60):
        low, high = (low, x) if first > 0 else (x, high)
        newton = math.exp(x) - first / second if second > 0 else 0.0
        new = math.log(newton) if newton > 0 else -math.inf
        if not low <= new <= high or step > 20:
            new = (low + high) / 2
        if abs(new - x) < 1e-7:
            break
        x, (first, second) = new, slope(new)
    return math.exp(-x)


def _derivatives(logits: NDArray[Any], targets: NDArray[Any], beta: float) -> NDArray[np.float64]:
    """Return sums over the images of the cross-entropy's two derivatives by β, and their number."""
    sums = np.array([0.0, 0.0, len(logits)])
    rows = max(1, _CHUNK // max(logits.shape[1], 1)) if len(logits) else 1
    for start in range(0, len(logits), rows):
        z = logits[start : start + rows]
        z = z - z.max(axis=1, keepdims=True)  # no exp() overflows, and a mean of differences loses fewer digits
        p = np.exp(beta * z)
        norm = p.sum(axis=1, dtype=np.float64)
        mean = np.einsum('ij,ij->i', p, z, dtype=np.float64) / norm
        square = np.einsum('ij,ij,ij->i', p, z, z, dtype=np.float64) / norm
        sums[0] += (mean - z[np.arange(len(z)), targets[start : start + rows]]).sum()
        sums[1] += (square - mean**2).sum()
    return sums


def confusion(targets: ArrayLike, predictions: ArrayLike, num_classes: int) -> NDArray[np.int64]:
    """Return the confusion matrix `[C, C]`: row i, column j counts the images of class i that were taken for j."""
    t, p = np.asarray(targets, dtype=np.int64), np.asarray(predictions, dtype=np.int64)
    counts = np.bincount(t * num_classes + p, minlength=num_classes * num_classes)
    return counts.reshape(num_classes, num_classes)


def per_class(targets: ArrayLike, predictions: ArrayLike, num_classes: int) -> dict[str, NDArray[Any]]:
    """Return figures of each class, `[C]` each: `images` of it, how many were `predicted` to be of it, how many of its
    images were `correct`, and its `accuracy` = correct / images (its recall), NaN where it has no image."""
    t, p = np.asarray(targets, dtype=np.int64), np.asarray(predictions, dtype=np.int64)
    images = np.bincount(t, minlength=num_classes)
    correct = np.bincount(t[t == p], minlength=num_classes)
    accuracy = np.divide(correct, images, out=np.full(num_classes, np.nan), where=images > 0)
    return {
        'images': images,
        'predicted': np.bincount(p, minlength=num_classes),
        'correct': correct,
        'accuracy': accuracy,
    }


def macro(targets: ArrayLike, predictions: ArrayLike, num_classes: int) -> float:
    """Return the mean of the classes' accuracies, over those that have images: each class counts the same, however many
    images it has. NaN where there are none.

    K. H. Brodersen et al., "The Balanced Accuracy and Its Posterior Distribution", ICPR 2010.
    """
    accuracy = per_class(targets, predictions, num_classes)['accuracy']
    there = accuracy[~np.isnan(accuracy)]
    return float(there.mean()) if len(there) else math.nan


LEAST_ENTROPY = 0.7  # of log C, below which a generator counts as collapsed


def collapse(counts: Sequence[int], class_names: Sequence[str] | None = None) -> str:
    """Return a sentence where generated images are of few classes only, and what to try; else an empty text.

    Args:
        counts: generated images that a teacher puts into each class.
        class_names: by index.
    """
    n, total = len(counts), sum(counts)
    shares = [c / total for c in counts if c]
    entropy = -sum(p * math.log(p) for p in shares) / math.log(n)
    never = [i for i, c in enumerate(counts) if not c]
    # of evenly spread images a class may be missing by chance
    expected = n * (1 - 1 / n) ** total
    if entropy >= LEAST_ENTROPY and len(never) <= max(0.02 * n, 2 * expected):
        return ''
    names = [repr(class_names[i]) if class_names else str(i) for i in never[:5]]
    missing = (
        f'{len(never)} of {n} classes never occur ({", ".join(names)}{", …" if len(never) > 5 else ""})'
        if never
        else ''
    )
    what = ', and '.join(filter(None, [missing, f'their entropy is {entropy:.2f} of 1']))
    return (
        f'the generator has collapsed: among {total:,} generated images {what}, so the student learns little of the '
        'rest. Try another --seed, --generator-epochs (more where the entropy in generator.csv still rises, fewer '
        'where it has fallen), a smaller --generator-kwargs info_weight, or a larger --train-fraction'
    )
