"""Spread: over repeats, and over prompts by bootstrap."""

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


def bootstrap_interval(
    sums: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0
) -> tuple[float, float] | None:
    """The 95 % percentile interval of a statistic of column sums, rows drawn anew with replacement.

    Args:
        sums: float[P, C], what each prompt contributes.
        statistic: totals float[R, C] -> float[R].

    Returns:
        Lower and upper end; None for fewer than two prompts, which say nothing of spread, and where it is no number.

    Reference: Efron 1979, "Bootstrap methods: another look at the jackknife".
    """
    num_prompts = len(sums)
    if num_prompts < 2:
        return None
    weights = np.random.default_rng(seed).multinomial(num_prompts, [1 / num_prompts] * num_prompts, RESAMPLES)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = statistic(weights @ np.asarray(sums, np.float64))
    values = values[np.isfinite(values)]
    if not values.size:
        return None
    low, high = np.percentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


def median_and_range(values: Sequence[float]) -> tuple[float | None, tuple[float, float] | None]:
    """Of repeats; (None, None) for none."""
    if not values:
        return None, None
    return float(np.median(values)), (min(values), max(values))
