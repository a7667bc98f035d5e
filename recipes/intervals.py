"""Intervals over a handful of seeds.

Not called statistics: a script's own folder is first on its path, where a file of that name would hide the
module of Python's own, which torch's compiler imports.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
from scipy.stats import t

CONFIDENCE = 0.95
MAX_RESAMPLES = 10_000


def mean_interval(values: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over axis 0 and its 95 % t-interval: mean -+ t s / sqrt(n).

    Args:
        values: A row a seed, [n, ...], n >= 1.

    Returns:
        Mean, low and high, each [...]; low and high are nan for n = 1, which shows no spread.
    """
    mean, spread, quantile, n = _summary(values)
    half = quantile * spread / np.sqrt(n)
    return mean, mean - half, mean + half


def prediction_interval(values: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over axis 0 and the 95 % interval for one further draw: mean -+ t s sqrt(1 + 1/n).

    Args:
        values: A row a seed, [n, ...], n >= 1.

    Returns:
        Mean, low and high, each [...]; low and high are nan for n = 1.
    """
    mean, spread, quantile, n = _summary(values)
    half = quantile * spread * np.sqrt(1 + 1 / n)
    return mean, mean - half, mean + half


def _summary(values: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray, float, int]:
    """Mean, standard deviation (n - 1), two-sided quantile of Student's t, and n."""
    array = np.asarray(values, dtype=np.float64)
    n = len(array)
    mean = array.mean(axis=0)
    if n == 1:
        return mean, np.full_like(mean, np.nan), np.nan, n
    return mean, array.std(axis=0, ddof=1), float(t.ppf((1 + CONFIDENCE) / 2, n - 1)), n


def resamples(n_seeds: int) -> np.ndarray:
    """Indices of the bootstrap over seeds, [resamples, n_seeds].

    All n^n of them where they are at most 10,000 (up to 5 seeds), which leaves no chance in the result;
    10,000 drawn with a fixed seed otherwise.
    """
    if n_seeds**n_seeds <= MAX_RESAMPLES:
        return np.array(list(product(range(n_seeds), repeat=n_seeds)), dtype=np.intp)
    return np.random.default_rng(0).integers(n_seeds, size=(MAX_RESAMPLES, n_seeds))
