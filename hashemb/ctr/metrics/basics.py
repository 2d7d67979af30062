"""Helpers of the metrics: checks of arguments, the entropy of a rate, and a ratio that may be undefined."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from hashemb.ctr._checks import check_all, check_weights
from hashemb.ctr._types import Float64Array

__all__ = ["as_floats", "checked", "entropy", "ratio"]


def as_floats(values: npt.ArrayLike) -> Float64Array:
    """Convert to a contiguous array of float64."""
    return np.asarray(values, np.float64, order="C")


def checked(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, weights: npt.ArrayLike | None
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Return labels, probabilities and weights as float64, or raise a ValueError that describes the fault."""
    y, p = np.asarray(labels, np.float64), np.asarray(probabilities, np.float64)
    if y.ndim != 1 or y.shape != p.shape:
        raise ValueError(f"labels and probabilities must be 1-D and of one length, got {y.shape} and {p.shape}")
    check_all("labels must be 0 or 1", y, (y == 0.0) | (y == 1.0))
    check_all("probabilities must be in [0, 1]", p, (p >= 0.0) & (p <= 1.0))
    w = np.ones(len(y))
    if weights is not None:
        w = check_weights(np.asarray(weights, np.float64), len(y), each="label", bound="at least 0")
    return y, p, w


def entropy(positives: float, examples: float) -> float:
    """Return the log loss of the best constant, in nats."""
    rate = ratio(positives, examples)
    return 0.0 - sum(q * math.log(q) for q in (rate, 1.0 - rate) if q != 0.0)


def ratio(numerator: float, denominator: float) -> float:
    """Return the quotient; NaN if it is undefined."""
    return numerator / denominator if denominator else math.nan
