"""How good predicted click probabilities are: AUC, log loss, normalised entropy, calibration.

The functions take whole arrays; `StreamingMetrics` takes batches, in bounded memory. Where a metric is not
defined (no examples, or only one class) the value is NaN, without a warning. Losses are in nats per example.
Probabilities of exactly 0 or 1 are clipped to [eps, 1 - eps], eps = 2**-52, as scikit-learn clips float64.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hashemb.ctr._extras import require

__all__ = ["StreamingMetrics", "auc", "calibration", "logloss", "normalized_entropy"]

_EPS = float(np.finfo(np.float64).eps)

# Scores are counted in bins of equal width on the logit scale; beyond ±16 (1e-7) everything shares the end bins.
_LOGIT_LIMIT = 16.0
_NUM_BINS = 1 << 14
_BINS_PER_LOGIT = _NUM_BINS / (2 * _LOGIT_LIMIT)

Floats = npt.NDArray[np.float64]


def auc(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """Area under the ROC curve: how often a random positive scores above a random negative; ties count half.

    Parameters
    ----------
    labels : array_like of 0/1, shape (n,)
    probabilities : array_like of float, shape (n,)
        In [0, 1].

    Returns
    -------
    float
        NaN if one of the classes is absent. O(n log n), by scikit-learn.

    Raises
    ------
    ValueError
        Shapes differ, a label is not 0 or 1, a probability is not in [0, 1].

    Examples
    --------
    >>> auc([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.1])
    0.75
    """
    y, p = _checked(labels, probabilities)
    if not 0 < y.sum() < len(y):
        return math.nan
    return float(require("sklearn.metrics").roc_auc_score(y, p))


def logloss(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """Mean of ``-(y ln p + (1 - y) ln(1 - p))``, by scikit-learn; arguments and errors as for `auc`.

    Examples
    --------
    >>> round(logloss([1, 0], [0.5, 0.25]), 4)
    0.4904
    """
    y, p = _checked(labels, probabilities)
    return float(require("sklearn.metrics").log_loss(y, p, labels=[0, 1])) if len(y) else math.nan


def normalized_entropy(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
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
    y, p = _checked(labels, probabilities)
    return _ratio(logloss(y, p), _entropy(float(y.sum()), len(y)))


def calibration(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """Expected over observed clicks, ``sum(p) / sum(y)``; arguments and errors as for `auc`.

    Above 1 the predictions are too high. NaN if there are no clicks.

    Examples
    --------
    >>> calibration([1, 0], [0.75, 0.75])
    1.5
    """
    y, p = _checked(labels, probabilities)
    return _ratio(float(p.sum()), float(y.sum()))


class StreamingMetrics:
    """The same metrics over a stream of batches, in memory that does not grow (256 KiB).

    Log loss, normalised entropy and calibration come from float64 sums and are exact up to rounding. AUC comes
    from a histogram of the scores, 512 bins per unit of logit: pairs that share a bin count half, so it is off
    by at most `auc_error_bound`, half the share of (positive, negative) pairs that fall into one bin. On
    ordinary data that is a few 1e-4, and the error itself far smaller, because within so narrow a bin about
    half of the pairs are in order.

    `copy` gives a snapshot, and ``metrics - snapshot`` the metrics of what came in between. Not thread-safe.

    Examples
    --------
    >>> metrics = StreamingMetrics()
    >>> metrics.update([1, 0, 0], [0.8, 0.3, 0.1])
    >>> before = metrics.copy()
    >>> metrics.update([1], [0.5])
    >>> metrics.examples, (metrics - before).examples, round((metrics - before).logloss, 4), metrics.auc
    (4, 1, 0.6931, 1.0)
    """

    def __init__(self) -> None:
        self._sum_loss = 0.0
        self._sum_probabilities = 0.0
        self._histogram = np.zeros((2, _NUM_BINS), np.int64)  # [label, bin of the logit]

    def update(self, labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> None:
        """Add a batch; arguments and errors as for `auc`. A batch that is refused changes nothing."""
        y, p = _checked(labels, probabilities)
        p_clipped = np.clip(p, _EPS, 1.0 - _EPS)
        log_p, log_not_p = np.log(p_clipped), np.log1p(-p_clipped)
        bins = ((log_p - log_not_p + _LOGIT_LIMIT) * _BINS_PER_LOGIT).astype(np.int64)
        bins = np.clip(bins, 0, _NUM_BINS - 1) + np.where(y == 1.0, _NUM_BINS, 0)
        self._sum_loss -= float(np.where(y == 1.0, log_p, log_not_p).sum())
        self._sum_probabilities += float(p.sum())
        self._histogram += np.bincount(bins, minlength=2 * _NUM_BINS).reshape(2, _NUM_BINS)

    @property
    def examples(self) -> int:
        """Number of examples."""
        return int(self._histogram.sum())

    @property
    def positives(self) -> int:
        """Number of examples with label 1."""
        return int(self._histogram[1].sum())

    @property
    def logloss(self) -> float:
        """Mean log loss; NaN without examples."""
        return _ratio(self._sum_loss, self.examples)

    @property
    def best_constant_logloss(self) -> float:
        """Log loss of predicting the mean label for every example: its entropy. NaN without examples."""
        return _entropy(self.positives, self.examples)

    @property
    def normalized_entropy(self) -> float:
        """`logloss` over `best_constant_logloss`; NaN if one of the classes is absent."""
        return _ratio(self.logloss, self.best_constant_logloss)

    @property
    def calibration(self) -> float:
        """Sum of the probabilities over the number of positives; NaN without positives."""
        return _ratio(self._sum_probabilities, self.positives)

    @property
    def auc(self) -> float:
        """Area under the ROC curve, within `auc_error_bound`; NaN if one of the classes is absent."""
        negatives, positives = self._histogram.astype(np.float64)
        below = np.cumsum(negatives) - negatives
        return _ratio(float(positives @ (below + 0.5 * negatives)), float(positives.sum() * negatives.sum()))

    @property
    def auc_error_bound(self) -> float:
        """The most that `auc` can be off, given the histogram; NaN if one of the classes is absent."""
        negatives, positives = self._histogram.astype(np.float64)
        return _ratio(0.5 * float(positives @ negatives), float(positives.sum() * negatives.sum()))

    def copy(self) -> StreamingMetrics:
        """An independent copy."""
        other = StreamingMetrics()
        other._sum_loss, other._sum_probabilities = self._sum_loss, self._sum_probabilities
        other._histogram = self._histogram.copy()
        return other

    def __sub__(self, earlier: StreamingMetrics) -> StreamingMetrics:
        """Metrics of the examples added since the snapshot `earlier`; a ValueError if it is not one of these."""
        if not isinstance(earlier, StreamingMetrics):
            return NotImplemented
        since = self.copy()
        since._sum_loss -= earlier._sum_loss
        since._sum_probabilities -= earlier._sum_probabilities
        since._histogram -= earlier._histogram
        if since._histogram.min() < 0:
            raise ValueError(
                f"not an earlier state of these metrics: {earlier.examples} examples, these have {self.examples}"
            )
        return since

    def state_dict(self) -> dict[str, Any]:
        """Everything, as a dict that JSON can hold; a few ten kilobytes at most. Floats survive exactly."""
        packed = zlib.compress(self._histogram.astype("<i8").tobytes(), 9)
        return {
            "sum_loss": self._sum_loss,
            "sum_probabilities": self._sum_probabilities,
            "num_bins": _NUM_BINS,
            "histogram": base64.b64encode(packed).decode("ascii"),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> StreamingMetrics:
        """The metrics whose `state_dict` this is; a ValueError if it is not one."""
        metrics = cls()
        try:
            metrics._sum_loss = float(state["sum_loss"])
            metrics._sum_probabilities = float(state["sum_probabilities"])
            counts = np.frombuffer(zlib.decompress(base64.b64decode(state["histogram"])), "<i8")
            metrics._histogram = counts.astype(np.int64).reshape(2, int(state["num_bins"]))
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            raise ValueError(f"not a state of StreamingMetrics: {error!r}") from error
        if metrics._histogram.shape != (2, _NUM_BINS):
            raise ValueError(f"state has {metrics._histogram.shape[1]} bins, this version has {_NUM_BINS}")
        return metrics

    def __repr__(self) -> str:
        return (
            f"StreamingMetrics(examples={self.examples}, logloss={self.logloss:.6f}, "
            f"normalized_entropy={self.normalized_entropy:.6f}, auc={self.auc:.6f}, "
            f"calibration={self.calibration:.4f})"
        )


def _checked(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> tuple[Floats, Floats]:
    y, p = np.asarray(labels, np.float64), np.asarray(probabilities, np.float64)
    if y.ndim != 1 or y.shape != p.shape:
        raise ValueError(f"labels and probabilities must be 1-D and of one length, got {y.shape} and {p.shape}")
    bad = np.flatnonzero((y != 0.0) & (y != 1.0))
    if len(bad):
        raise ValueError(f"labels must be 0 or 1, got {y[bad[0]]} at index {bad[0]}")
    bad = np.flatnonzero(~((p >= 0.0) & (p <= 1.0)))
    if len(bad):
        raise ValueError(f"probabilities must be in [0, 1], got {p[bad[0]]} at index {bad[0]}")
    return y, p


def _entropy(positives: float, examples: int) -> float:
    """Log loss of the best constant, in nats."""
    rate = _ratio(positives, examples)
    return 0.0 - sum(q * math.log(q) for q in (rate, 1.0 - rate) if q != 0.0)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
