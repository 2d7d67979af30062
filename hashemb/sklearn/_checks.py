"""Check targets, weights and classes.

scikit-learn's `check_consistent_length` and `_check_sample_weight` are not used: their messages name neither the
argument whose length is wrong nor the first bad weight. `validate_data` checks `y` only together with the names of `X`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.utils import assert_all_finite, column_or_1d
from sklearn.utils.multiclass import check_classification_targets

from hashemb.ctr import _checks
from hashemb.ctr._types import Array, Float32Array

__all__ = ["as_labels", "check_classes", "check_lengths", "check_targets", "check_weights"]


def check_targets(y: Any, name: str) -> Array:
    """Check `y` and return it as an array; `name` is that of the estimator."""
    if y is None:
        raise ValueError(f"This {name} estimator requires y to be passed, but the target y is None.")
    targets: Array = column_or_1d(y, warn=True)
    if targets.dtype.kind == "c":
        raise ValueError(f"Complex data not supported: y holds {targets.dtype} values")
    assert_all_finite(targets, input_name="y")
    check_classification_targets(targets)
    return targets


def check_lengths(num_examples: int, num_targets: int, num_columns: int) -> None:
    """Check that there are as many examples as targets, and at least one."""
    if num_examples == 0:
        raise ValueError(f"Found array with 0 sample(s) (shape=(0, {num_columns})) while a minimum of 1 is required.")
    if num_examples != num_targets:
        raise ValueError(f"X has {num_examples} samples but y has {num_targets}: they must be of one length")


def check_weights(sample_weight: Any, n: int) -> Float32Array | None:
    """Check the weights: they must be valid, and at least one of them must not be zero."""
    if sample_weight is None:
        return None
    weights = _checks.check_weights(np.asarray(sample_weight, np.float32), n, each="sample", name="sample_weight")
    if n and not weights.any():
        raise ValueError(f"all {n} values of sample_weight are zero: nothing to learn")
    return weights


def check_classes(targets: Array, fitted: Array | None, declared: Any) -> Array:
    """Return the two labels: those of the fitted model, else the declared ones, else those in the data."""
    classes = np.unique(targets if declared is None else column_or_1d(declared))
    if fitted is not None:
        if declared is not None and not np.array_equal(classes, fitted):
            raise ValueError(f"classes={classes.tolist()} differ from those of the first call, {fitted.tolist()}")
        classes = fitted
    elif len(classes) == 1:
        raise ValueError(
            f"The data contains only one class, {classes.tolist()[0]!r}, and a classifier needs two: in partial_fit, "
            "name both with classes="
        )
    elif len(classes) > 2:
        raise ValueError(
            "Only binary classification is supported. The type of the target is multiclass: it has "
            f"{len(classes)} classes"
        )
    unknown = np.setdiff1d(targets, classes)
    if len(unknown):
        raise ValueError(f"y holds the label {unknown.tolist()[0]!r}, the classes are {classes.tolist()}")
    return classes


def as_labels(targets: Array, classes: Array) -> Float32Array:
    """Return 1 for the second class and 0 for the first."""
    labels: Float32Array = (targets == classes[1]).astype(np.float32)
    return labels
