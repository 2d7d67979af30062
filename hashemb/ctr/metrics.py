"""How good predicted click probabilities are: AUC, GAUC, log loss, normalised entropy, calibration.

The functions take whole arrays; `StreamingMetrics` takes batches, in bounded memory. Where a metric is not
defined (no examples, or only one class) the value is NaN, without a warning. Losses are in nats per example.
Probabilities of exactly 0 or 1 are clipped to [eps, 1 - eps], eps = 2**-52, as scikit-learn clips float64.
An example of weight w counts as w examples; a weight of 0 leaves it out.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from hashemb.ctr._extras import require
from hashemb.ctr._metric_basics import Floats, checked, entropy, ratio
from hashemb.ctr.calibration_bins import CalibrationBin, calibration_bins, expected_calibration_error
from hashemb.ctr.streaming_metrics import StreamingMetrics

__all__ = [
    "CalibrationBin",
    "StreamingMetrics",
    "auc",
    "calibration",
    "calibration_by_quantile",
    "expected_calibration_error",
    "gauc",
    "logloss",
    "normalized_entropy",
]


def auc(labels: npt.ArrayLike, probabilities: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Area under the ROC curve: how often a random positive scores above a random negative; ties count half.

    Parameters
    ----------
    labels : array_like of 0/1, shape (n,)
    probabilities : array_like of float, shape (n,)
        In [0, 1].
    weights : array_like of float, shape (n,), optional
        Of the examples, finite and at least 0. Default: all 1.

    Returns
    -------
    float
        NaN if one of the classes is absent. O(n log n), by scikit-learn.

    Raises
    ------
    ValueError
        Shapes differ, a label is not 0 or 1, a probability is not in [0, 1], a weight is negative or not finite.

    Examples
    --------
    >>> auc([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.1])
    0.75
    >>> auc([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.1], weights=[1, 3, 1, 1])
    0.625
    """
    y, p, w = checked(labels, probabilities, weights)
    if not (w @ y > 0.0 and w @ (1.0 - y) > 0.0):
        return math.nan
    return float(require("sklearn.metrics").roc_auc_score(y, p, sample_weight=None if weights is None else w))


def gauc(
    labels: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    users: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
) -> float:
    """AUC within each user, averaged over the users who have both classes, by their number of impressions.

    A model that knows only which users click a lot has a good AUC and a GAUC of .5: this one measures the order in
    which each user's impressions are put.

    Parameters
    ----------
    labels, probabilities, weights
        As for `auc`. With weights, a user's number of impressions is the sum of theirs.
    users : array_like, shape (n,)
        Who saw it: integers or strings. Ragged or missing values are not accepted.

    Returns
    -------
    float
        NaN if no user has both classes. O(n log n), without a loop over users.

    Raises
    ------
    ValueError
        As for `auc`; `users` has another length.

    References
    ----------
    Zhu et al.: Optimized Cost per Click in Taobao Display Advertising, KDD 2017, section 4; Zhou et al.: Deep Interest
    Network, KDD 2018, section 6.2; ``gAUC`` of FuxiCTR.

    Examples
    --------
    >>> gauc([1, 0, 1, 0, 0], [0.9, 0.8, 0.3, 0.4, 0.1], users=["a", "a", "b", "b", "b"])
    0.7
    """
    y, p, w = checked(labels, probabilities, weights)
    names = np.asarray(users)
    if names.shape != y.shape:
        raise ValueError(f"users must have shape {y.shape}, one per label, got {names.shape}")
    codes = np.unique(names, return_inverse=True)[1].reshape(-1)
    areas, impressions = _areas(y, p, w, codes)
    defined = ~np.isnan(areas)
    return ratio(float(areas[defined] @ impressions[defined]), float(impressions[defined].sum()))


def _areas(y: Floats, p: Floats, w: Floats, groups: npt.NDArray[np.intp]) -> tuple[Floats, Floats]:
    """AUC and weight of each group, numbered from 0; NaN where a class is absent.

    One sort by (group, score). A positive scores above the negatives before its tie, and half of those in it.
    """
    order = np.lexsort((p, groups))
    y, p, w, groups = y[order], p[order], w[order], groups[order]
    new_tie = np.ones(len(y), bool)
    new_tie[1:] = (groups[1:] != groups[:-1]) | (p[1:] != p[:-1])
    ties = np.cumsum(new_tie) - 1
    tie_groups = groups[new_tie]
    negatives, positives = np.bincount(ties, w * (1.0 - y)), np.bincount(ties, w * y)
    negatives_of, positives_of = np.bincount(tie_groups, negatives), np.bincount(tie_groups, positives)
    # Summed from the beginning of all groups: exact for whole weights up to 2**53, rounded for others.
    before = np.cumsum(negatives) - negatives - (np.cumsum(negatives_of) - negatives_of)[tie_groups]
    ordered = np.bincount(tie_groups, positives * (before + 0.5 * negatives))
    pairs = negatives_of * positives_of
    areas = np.full(len(pairs), math.nan)
    np.divide(ordered, pairs, out=areas, where=pairs > 0.0)
    impressions: Floats = np.bincount(groups, w).astype(np.float64, copy=False)
    return areas, impressions


def logloss(labels: npt.ArrayLike, probabilities: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Mean of ``-(y ln p + (1 - y) ln(1 - p))``, by scikit-learn; arguments and errors as for `auc`.

    Examples
    --------
    >>> round(logloss([1, 0], [0.5, 0.25]), 4)
    0.4904
    """
    y, p, w = checked(labels, probabilities, weights)
    if not w.sum() > 0.0:
        return math.nan
    return float(require("sklearn.metrics").log_loss(y, p, labels=[0, 1], sample_weight=None if weights is None else w))


def normalized_entropy(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> float:
    """Log loss divided by that of the best constant, the mean label; arguments and errors as for `auc`.

    1 means no better than knowing the click-through rate; it can be compared between data of different rates,
    which a log loss cannot. NaN if one of the classes is absent.

    References
    ----------
    He et al.: Practical Lessons from Predicting Clicks on Ads at Facebook, ADKDD 2014, section 2.

    Examples
    --------
    >>> normalized_entropy([1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25])
    1.0
    """
    y, _, w = checked(labels, probabilities, weights)
    return ratio(logloss(labels, probabilities, weights), entropy(float(w @ y), float(w.sum())))


def calibration(labels: npt.ArrayLike, probabilities: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Expected over observed clicks, ``sum(p) / sum(y)``; arguments and errors as for `auc`.

    Above 1 the predictions are too high. NaN if there are no clicks.

    Examples
    --------
    >>> calibration([1, 0], [0.75, 0.75])
    1.5
    """
    y, p, w = checked(labels, probabilities, weights)
    return ratio(float(w @ p), float(w @ y))


def calibration_by_quantile(
    labels: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    *,
    num_bins: int = 10,
) -> list[CalibrationBin]:
    """Predicted against observed click-through rate in bins of equally many examples: by decile, unless told otherwise.

    Parameters
    ----------
    labels, probabilities, weights
        As for `auc`.
    num_bins : int
        At least 1. Equal probabilities share a bin, so that there may be fewer.

    Returns
    -------
    list of CalibrationBin
        In ascending order of the predictions, without empty ones. O(n log n).

    Raises
    ------
    ValueError
        As for `auc`; `num_bins` below 1.

    Notes
    -----
    The bins are those of scikit-learn's ``calibration_curve(strategy="quantile")`` but for its interpolation of
    edges. With weights, a bin's share is of their sum.

    Examples
    --------
    >>> low, high = calibration_by_quantile([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.8], num_bins=2)
    >>> low.predicted.__round__(3), low.observed, high.predicted, high.observed, high.weight
    (0.15, 0.0, 0.7, 1.0, 2.0)
    """
    y, p, w = checked(labels, probabilities, weights)
    order = np.argsort(p, kind="stable")
    y, p, w = y[order], p[order], w[order]
    return calibration_bins(p, w, w * y, w * w, num_bins)
