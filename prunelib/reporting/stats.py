"""Means, intervals and paired comparisons, computed with numpy alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 10_000
# Above this number of degrees of freedom the asymptotic expansion is exact to 1e-12.
_LARGE_DF = 1000
# Resamples are drawn in chunks of about this many indices (16 MB of int64).
_CHUNK = 2_000_000


def spearman(one: Floats, other: Floats) -> float:
    """Return Spearman's rank correlation of two arrays [n]; equal values share their mean rank.

    NaN where all values of one are equal.
    """
    ranks = []
    for values in (one, other):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        ranks.append(((2 * ends - counts - 1) / 2)[inverse] - (len(values) - 1) / 2)
    first, second = ranks
    scale = float(np.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / scale if scale else math.nan


def student_t_cdf(t: float, df: int) -> float:
    """P(T <= t) of Student's t with an integer number of degrees of freedom.

    The finite trigonometric series of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    theta = math.atan(abs(t) / math.sqrt(df))
    cosine, sine = math.cos(theta), math.sin(theta)
    odd = df % 2 == 1
    term = cosine if odd else 1.0
    total = term if df > 1 else 0.0
    for k in range(3 if odd else 2, df - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    inside = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return 0.5 + math.copysign(inside / 2, t)


@lru_cache(maxsize=256)
def student_t_quantile(p: float, df: int) -> float:
    """The ``p`` quantile of Student's t with ``df`` degrees of freedom.

    Bisection of the exact distribution function; for more than 1,000 degrees of freedom the
    Cornish-Fisher expansion (Abramowitz and Stegun, 26.7.5).

    Raises:
        ValueError: ``p`` is not strictly between 0 and 1, or ``df`` is below 1.
    """
    if not 0 < p < 1 or df < 1:
        raise ValueError(f"no Student t quantile for p={p}, df={df}")
    if p < 0.5:
        return -student_t_quantile(1 - p, df)
    if df > _LARGE_DF:
        z = NormalDist().inv_cdf(p)
        g1 = (z**3 + z) / 4
        g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
        g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
        return z + g1 / df + g2 / df**2 + g3 / df**3
    low, high = 0.0, 1.0
    while student_t_cdf(high, df) < p:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        if student_t_cdf(middle, df) < p:
            low = middle
        else:
            high = middle
    return (low + high) / 2


@dataclass(frozen=True)
class Estimate:
    """Mean, sample standard deviation and confidence limits of ``n`` values.

    ``sd``, ``low`` and ``high`` are None for a single value, which has no spread to show.
    """

    mean: float
    sd: float | None
    low: float | None
    high: float | None
    n: int


def estimate(values: Sequence[float] | Floats, confidence: float = 0.95) -> Estimate:
    """Mean, standard deviation (n - 1) and Student t interval of ``values``.

    Raises:
        ValueError: there are no values.
    """
    array = np.asarray(values, dtype=np.float64)
    n = len(array)
    if n == 0:
        raise ValueError("no values to average")
    mean = float(array.mean())
    if n == 1:
        return Estimate(mean, None, None, None, 1)
    sd = float(array.std(ddof=1))
    half = student_t_quantile((1 + confidence) / 2, n - 1) * sd / math.sqrt(n)
    return Estimate(mean, sd, mean - half, mean + half, n)


def bootstrap_limits(
    differences: Floats, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Floats:
    """Percentile bootstrap limits of the mean of each column.

    Every column is resampled with the same draws of rows (documents), so comparisons over the
    same documents share them and do not depend on one another's order.

    Args:
        differences: [documents, comparisons].
        confidence: coverage of the interval.
        resamples: number of bootstrap resamples.
        seed: seed of the resampling.

    Returns:
        [2, comparisons]: lower and upper limits.
    """
    documents, comparisons = differences.shape
    rng = np.random.default_rng(seed)
    means = np.empty((resamples, comparisons))
    step = max(1, _CHUNK // documents)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        draws = rng.integers(0, documents, size=(rows, documents))
        draws += np.arange(rows)[:, None] * documents
        counts = np.bincount(draws.ravel(), minlength=rows * documents)
        means[start : start + rows] = counts.reshape(rows, documents) @ differences / documents
    tail = (1 - confidence) / 2
    limits: Floats = np.quantile(means, [tail, 1 - tail], axis=0)
    return limits
