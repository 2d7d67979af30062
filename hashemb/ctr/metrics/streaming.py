"""Compute metrics of a stream of batches in bounded memory, from sums and a histogram of the scores of each class."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hashemb.ctr._json_values import as_number, as_text, as_whole
from hashemb.ctr._maths import add_scores
from hashemb.ctr._types import Float64Array
from hashemb.ctr.metrics.basics import as_floats, checked, entropy, ratio
from hashemb.ctr.metrics.calibration_bins import CalibrationBin, calibration_bins

__all__ = ["StreamingMetrics"]

_EPS = float(np.finfo(np.float64).eps)

# Scores are counted in bins of equal width on the logit scale; all scores beyond ±16 (1e-7) share the outermost bins.
_LOGIT_LIMIT = 16.0
_NUM_BINS = 1 << 14
_MAX_SUM = 1e100  # limit for sums of weights, which are float32, and of their squares
_BINS_PER_LOGIT = _NUM_BINS / (2 * _LOGIT_LIMIT)


class StreamingMetrics:
    """Computes the metrics over a stream of batches, in constant memory (256 KiB, or 512 KiB with weights).

    Log loss, normalised entropy and calibration are computed from float64 sums and are exact up to rounding. AUC is
    computed from a histogram of the scores with 512 bins per unit of logit: pairs in the same bin count half, so the
    error is at most `auc_error_bound`, half the share of (positive, negative) pairs in the same bin. On ordinary data
    this bound is a few 1e-4 and the error is far smaller, because about half of the pairs within such a narrow bin are
    in order. `calibration_by_quantile` uses the same histogram: the error of its predictions is at most 1/1024 on the
    logit scale.

    `copy` returns a snapshot, and ``metrics - snapshot`` the metrics of the examples added since. Not thread-safe.

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
        self._examples = 0
        self._histogram = np.zeros((2, _NUM_BINS))  # [label, bin of the logit] -> sum of weights
        self._squares: Float64Array | None = None  # the same for squared weights; None while all weights are 1

    def update(self, labels: npt.ArrayLike, probabilities: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> None:
        """Add a batch; arguments and errors as for `auc`. A rejected batch changes nothing."""
        y, p, w = as_floats(labels), as_floats(probabilities), None if weights is None else as_floats(weights)
        if y.ndim != 1 or y.shape != p.shape or (w is not None and w.shape != y.shape):
            checked(y, p, w)
        squares = self._squares
        if w is not None and squares is None:
            squares = self._histogram.copy()
        sums = add_scores(y, p, w, self._histogram, squares, logit_limit=_LOGIT_LIMIT, eps=_EPS)
        if sums is None:
            checked(y, p, w)
            raise AssertionError("valid scores were refused")
        self._squares = squares
        self._sum_loss += sums[0]
        self._sum_probabilities += sums[1]
        self._examples += len(y)

    @property
    def examples(self) -> int:
        """Number of examples, regardless of their weights."""
        return self._examples

    @property
    def weight(self) -> float:
        """Sum of the weights; without weights, the number of examples."""
        return float(self._histogram.sum())

    @property
    def positives(self) -> float:
        """Sum of the weights of the examples with label 1; without weights their number."""
        return float(self._histogram[1].sum())

    @property
    def logloss(self) -> float:
        """Mean log loss; NaN without examples."""
        return ratio(self._sum_loss, self.weight)

    @property
    def best_constant_logloss(self) -> float:
        """Log loss of predicting the mean label for every example: its entropy. NaN without examples."""
        return entropy(self.positives, self.weight)

    @property
    def normalized_entropy(self) -> float:
        """`logloss` over `best_constant_logloss`; NaN if one of the classes is absent."""
        return ratio(self.logloss, self.best_constant_logloss)

    @property
    def calibration(self) -> float:
        """Sum of the probabilities over the number of positives; NaN without positives."""
        return ratio(self._sum_probabilities, self.positives)

    @property
    def auc(self) -> float:
        """Area under the ROC curve, within `auc_error_bound`; NaN if one of the classes is absent."""
        negatives, positives = self._histogram
        below = np.cumsum(negatives) - negatives
        return ratio(float((positives * (below + 0.5 * negatives)).sum()), float(positives.sum() * negatives.sum()))

    @property
    def auc_error_bound(self) -> float:
        """Upper bound of the error of `auc`, given the histogram; NaN if one of the classes is absent."""
        negatives, positives = self._histogram
        return ratio(0.5 * float((positives * negatives).sum()), float(positives.sum() * negatives.sum()))

    def calibration_by_quantile(self, num_bins: int = 10) -> list[CalibrationBin]:
        """Compute the same as the function of this name from the histogram; quantiles are rounded to its bins."""
        logits = (np.arange(_NUM_BINS) + 0.5) / _BINS_PER_LOGIT - _LOGIT_LIMIT
        squares = self._histogram if self._squares is None else self._squares
        weights = self._histogram.sum(axis=0)
        return calibration_bins(
            1.0 / (1.0 + np.exp(-logits)), weights, self._histogram[1], squares.sum(axis=0), num_bins
        )

    def copy(self) -> StreamingMetrics:
        """Return an independent copy."""
        return self._minus(StreamingMetrics())

    def __sub__(self, earlier: StreamingMetrics) -> StreamingMetrics:
        """Return the metrics of the examples added since `earlier`; a ValueError if that is not an earlier snapshot."""
        if not isinstance(earlier, StreamingMetrics):
            return NotImplemented
        since = self._minus(earlier)
        if since._histogram.min() < -(0.5 if self._squares is None else 1e-9 * self.weight) or since._examples < 0:
            raise ValueError(
                f"not an earlier state of these metrics: {earlier.examples} examples, these have {self.examples}"
            )
        np.maximum(since._histogram, 0.0, out=since._histogram)  # rounding errors of fractional sums
        return since

    def _minus(self, earlier: StreamingMetrics) -> StreamingMetrics:
        since = StreamingMetrics()
        since._sum_loss = self._sum_loss - earlier._sum_loss
        since._sum_probabilities = self._sum_probabilities - earlier._sum_probabilities
        since._examples = self._examples - earlier._examples
        since._histogram = self._histogram - earlier._histogram
        if self._squares is not None:
            earlier_squares = earlier._histogram if earlier._squares is None else earlier._squares
            since._squares = np.maximum(self._squares - earlier_squares, 0.0)
        return since

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a dict of JSON values (a few ten kilobytes without weights). Floats are kept exactly."""
        state = {
            "sum_loss": self._sum_loss,
            "sum_probabilities": self._sum_probabilities,
            "num_bins": _NUM_BINS,
            "histogram": _packed(self._histogram, "<i8" if self._squares is None else "<f8"),
        }
        if self._squares is not None:
            state |= {"examples": self._examples, "squares": _packed(self._squares, "<f8")}
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> StreamingMetrics:
        """Restore metrics from the result of `state_dict`; raise a ValueError for anything else."""
        try:
            return cls()._restored(state)
        except ValueError as error:
            raise ValueError(f"not a state of StreamingMetrics: {error}") from error

    def _restored(self, state: Mapping[str, Any]) -> StreamingMetrics:
        num_bins, weighted = as_whole(state.get("num_bins"), "num_bins"), "squares" in state
        if num_bins != _NUM_BINS:
            raise ValueError(f"state has {num_bins} bins, this version has {_NUM_BINS}")
        self._sum_loss = as_number(state.get("sum_loss"), "sum_loss", 0.0, _MAX_SUM)
        self._sum_probabilities = as_number(state.get("sum_probabilities"), "sum_probabilities", 0.0, _MAX_SUM)
        self._histogram = _unpacked(state, "histogram", "<f8" if weighted else "<i8")
        self._squares = _unpacked(state, "squares", "<f8") if weighted else None
        self._examples = as_whole(state.get("examples") if weighted else int(self._histogram.sum()), "examples")
        return self

    def __repr__(self) -> str:
        return (
            f"StreamingMetrics(examples={self.examples}, logloss={self.logloss:.6f}, "
            f"normalized_entropy={self.normalized_entropy:.6f}, auc={self.auc:.6f}, "
            f"calibration={self.calibration:.4f})"
        )


def _packed(values: Float64Array, dtype: str) -> str:
    return base64.b64encode(zlib.compress(values.astype(dtype).tobytes(), 1)).decode("ascii")


def _unpacked(state: Mapping[str, Any], name: str, dtype: str) -> Float64Array:
    """Decompress an array, up to its maximum size only: a few bytes could expand to gigabytes."""
    size_bytes = 2 * _NUM_BINS * np.dtype(dtype).itemsize
    try:
        packed = base64.b64decode(as_text(state.get(name), name))
        content = zlib.decompressobj().decompress(packed, size_bytes + 1)
    except zlib.error as error:
        raise ValueError(f"{name} is damaged: {error}") from error
    if len(content) != size_bytes:
        raise ValueError(f"{name} must have {size_bytes:,} bytes, found {len(content):,} or more")
    values = np.frombuffer(content, dtype).astype(np.float64).reshape(2, _NUM_BINS)
    if not ((values >= 0.0) & (values <= _MAX_SUM)).all():
        raise ValueError(f"{name} must hold sums from 0 to {_MAX_SUM:g}, found others")
    return values
