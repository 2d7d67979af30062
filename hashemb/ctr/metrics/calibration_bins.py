"""Compare predicted and observed click-through rates in quantile bins of the score, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from hashemb.ctr._types import Float64Array

__all__ = ["CalibrationBin", "calibration_bins", "expected_calibration_error", "wilson_interval"]

_Z95 = float(ndtri(0.975))  # of the normal distribution


class CalibrationBin(NamedTuple):
    """A bin of examples with similar predictions.

    Attributes
    ----------
    weight : float
        Sum of the weights of the examples; without weights, their number.
    predicted : float
        Mean of the predictions.
    observed : float
        Share of positives.
    low, high : float
        95 % Wilson interval of the true rate behind `observed`; calibrated predictions lie in it 19 times out of 20.
    """

    weight: float
    predicted: float
    observed: float
    low: float
    high: float


def wilson_interval(rate: float, count: float) -> tuple[float, float]:
    """Compute the 95 % score interval of a share `rate` among `count` independent examples.

    References
    ----------
    Wilson: Probable Inference, the Law of Succession, and Statistical Inference, JASA 22 (1927).

    Examples
    --------
    >>> [round(limit, 4) for limit in wilson_interval(0.1, 100)]
    [0.0552, 0.1744]
    """
    shrink = 1.0 / (1.0 + _Z95**2 / count)
    centre = (rate + _Z95**2 / (2.0 * count)) * shrink
    half = _Z95 * math.sqrt(rate * (1.0 - rate) / count + (_Z95 / (2.0 * count)) ** 2) * shrink
    return max(0.0, min(rate, centre - half)), min(1.0, max(rate, centre + half))


def calibration_bins(
    scores: Float64Array,
    weights: Float64Array,
    positive_weights: Float64Array,
    squared_weights: Float64Array,
    num_bins: int,
) -> list[CalibrationBin]:
    """Put groups of examples into bins of equal weight.

    Parameters
    ----------
    scores : ndarray of float64, shape (g,)
        Mean prediction of each group, in ascending order. Groups with equal scores share a bin.
    weights, positive_weights, squared_weights : ndarray of float64, shape (g,)
        For each group: the sum of weights, that of the positive examples, and the sum of squared weights.
    num_bins : int
        Number of bins, at least 1.

    Returns
    -------
    list of CalibrationBin
        The non-empty bins. With unequal weights, the interval is computed for ``(sum w)**2 / sum w**2`` examples
        (Kish: Survey Sampling, 1965).
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")
    total = np.cumsum(weights)
    if not len(total) or not total[-1] > 0.0:
        return []
    shares = total[-1] * np.arange(1, num_bins) / num_bins
    edges = scores[np.searchsorted(total, shares, side="left")]
    bins = np.searchsorted(edges, scores, side="left")
    columns = (weights, weights * scores, positive_weights, squared_weights)
    sums = np.stack([np.bincount(bins, column, minlength=num_bins) for column in columns], axis=1)
    return [_bin(*row) for row in sums.tolist() if row[0] > 0.0]


def _bin(weight: float, predicted: float, positive: float, squared: float) -> CalibrationBin:
    observed = min(1.0, positive / weight)
    return CalibrationBin(weight, predicted / weight, observed, *wilson_interval(observed, weight * weight / squared))


def expected_calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Compute the weighted mean distance between predicted and observed rates over the bins; NaN without bins.

    The error grows with the number of bins. It is above 0 for a calibrated model too, because of noise in the rates.

    References
    ----------
    Naeini et al.: Obtaining Well Calibrated Probabilities Using Bayesian Binning, AAAI 2015.

    Examples
    --------
    >>> expected_calibration_error([CalibrationBin(3.0, 0.5, 0.25, 0.0, 1.0), CalibrationBin(1.0, 0.5, 0.5, 0.0, 1.0)])
    0.1875
    """
    weight = sum(bin.weight for bin in bins)
    return sum(bin.weight * abs(bin.predicted - bin.observed) for bin in bins) / weight if weight else math.nan
