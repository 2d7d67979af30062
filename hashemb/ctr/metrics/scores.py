"""Metrics of predicted click probabilities: AUC, GAUC, log loss, normalised entropy and calibration.

The functions take whole arrays; `StreamingMetrics` takes batches, in bounded memory. An undefined metric (no
examples, or only one class) is NaN, without a warning. Losses are in nats per example. Probabilities of exactly 0
or 1 are clipped to [eps, 1 - eps], eps = 2**-52, as scikit-learn clips float64. An example of weight w counts as w
examples; one of weight 0 is ignored.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from hashemb._packages import require
from hashemb.ctr._types import Float64Array
from hashemb.ctr.metrics.basics import checked, entropy, ratio
from hashemb.ctr.metrics.calibration_bins import CalibrationBin, calibration_bins

__all__ = [
    "auc",
    "calibration",
    "calibration_by_quantile",
    "gauc",
    "logloss",
    "normalized_entropy",
]


def auc(labels: npt.ArrayLike, probabilities: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Compute the area under the ROC curve.

    This is the probability that a random positive scores above a random negative; ties count half.

    Parameters
    ----------
    labels : array_like of 0/1, shape (n,)
    probabilities : array_like of float, shape (n,)
        Predicted probabilities in [0, 1].
    weights : array_like of float, shape (n,), optional
        Weights of the examples, finite and at least 0. Default: all 1.

    Returns
    -------
    float
        The area; NaN if one of the classes is absent. scikit-learn computes it in O(n log n).

    Raises
    ------
    ValueError
        Shapes differ, a label is not 0 or 1, a probability is not in [0, 1], or a weight is negative or not finite.

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
    """Compute the AUC within each user, averaged over the users that have both classes.

    The average is weighted by each user's number of impressions. A model that only knows which users click often has
    a good AUC and a GAUC of .5: GAUC measures how well each user's impressions are ranked.

    Parameters
    ----------
    labels, probabilities, weights
        As for `auc`. With weights, a user's number of impressions is the sum of its examples' weights.
    users : array_like, shape (n,)
        User of each impression: integers or strings. Ragged and missing values are rejected.

    Returns
    -------
    float
        The averaged AUC; NaN if no user has both classes. It takes O(n log n), without a loop over users.

    Raises
    ------
    ValueError
        As for `auc`; or `users` has a different length.

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


def _areas(
    y: Float64Array, p: Float64Array, w: Float64Array, groups: npt.NDArray[np.intp]
) -> tuple[Float64Array, Float64Array]:
    """Compute the AUC and the weight of each group, numbered from 0; the AUC is NaN where a class is absent.

    It takes one sort by (group, score). A positive scores above all negatives before its tie and half of those in it.
    """
    order = np.lexsort((p, groups))
    y, p, w, groups = y[order], p[order], w[order], groups[order]
    new_tie = np.ones(len(y), bool)
    new_tie[1:] = (groups[1:] != groups[:-1]) | (p[1:] != p[:-1])
    ties = np.cumsum(new_tie) - 1
    tie_groups = groups[new_tie]
    negatives, positives = np.bincount(ties, w * (1.0 - y)), np.bincount(ties, w * y)
    negatives_of, positives_of = np.bincount(tie_groups, negatives), np.bincount(tie_groups, positives)
    # The sums run from the beginning of all groups: they are exact for whole weights up to 2**53, else rounded.
    before = np.cumsum(negatives) - negatives - (np.cumsum(negatives_of) - negatives_of)[tie_groups]
    ordered = np.bincount(tie_groups, positives * (before + 0.5 * negatives))
    pairs = negatives_of * positives_of
    areas = np.full(len(pairs), math.nan)
    np.divide(ordered, pairs, out=areas, where=pairs > 0.0)
    impressions: Float64Array = np.bincount(groups, w).astype(np.float64, copy=False)
    return areas, impressions


def logloss(labels: npt.ArrayLike, probabilities: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Compute the mean of ``-(y ln p + (1 - y) ln(1 - p))``, with scikit-learn; arguments and errors as for `auc`.

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
    """Compute the log loss divided by that of the best constant, the mean label; arguments and errors as for `auc`.

    A value of 1 is no better than predicting the click-through rate. Unlike the log loss, it can be compared between
    data sets with different rates. It is NaN if one of the classes is absent.

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
    """Compute expected over observed clicks, ``sum(p) / sum(y)``; arguments and errors as for `auc`.

    A value above 1 means that the predictions are too high. It is NaN if there are no clicks.

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
    """Compare predicted and observed click-through rates in bins of equally many examples, by default deciles.

    Parameters
    ----------
    labels, probabilities, weights
        As for `auc`.
    num_bins : int
        Number of bins, at least 1. Equal probabilities share a bin, so there may be fewer.

    Returns
    -------
    list of CalibrationBin
        The non-empty bins, in ascending order of the predictions. It takes O(n log n).

    Raises
    ------
    ValueError
        As for `auc`; or `num_bins` is below 1.

    Notes
    -----
    The bins are those of scikit-learn's ``calibration_curve(strategy="quantile")`` except for its interpolation of
    edges. With weights, each bin gets an equal share of their sum.

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
