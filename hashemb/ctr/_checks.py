"""Checks of arguments that models, metrics and estimators share; the messages name the first bad value."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from hashemb.ctr._types import Array, Int64Array

__all__ = ["check_all", "check_offsets", "check_weights"]

T = TypeVar("T", bound=Array)


def check_all(rule: str, values: Array, good: npt.NDArray[np.bool_]) -> None:
    """Raise a ValueError that states the rule and the first value that is not `good`, unless all are."""
    if not good.all():
        first = int(np.argmin(good))
        raise ValueError(f"{rule}, got {values[first]} at index {first}")


def check_weights(weights: T, n: int, *, each: str, name: str = "weights", bound: str = ">= 0") -> T:
    """Check an array for finite weights >= 0, one for `each` of `n` things, and return it."""
    if weights.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},), one per {each}, got {weights.shape}")
    check_all(f"{name} must be finite and {bound}", weights, np.isfinite(weights) & (weights >= 0.0))
    return weights


def check_offsets(offsets: Any, num_keys: int) -> Int64Array:
    """Check for offsets that rise from 0 to the number of keys: example i has keys offsets[i] to offsets[i + 1]."""
    found = np.asarray(offsets)
    if found.dtype.kind not in "iu":
        raise TypeError(f"offsets must be integers, got {found.dtype}")
    if found.ndim != 1 or found.size == 0:
        raise ValueError(f"offsets must have shape (n + 1,), got {found.shape}")
    o = np.ascontiguousarray(found, np.int64)
    if o[0] != 0 or o[-1] != num_keys:
        raise ValueError(f"offsets must go from 0 to {num_keys}, the number of keys; they go from {o[0]} to {o[-1]}")
    rising = o[1:] >= o[:-1]
    if not rising.all():
        first = int(np.argmin(rising))
        raise ValueError(f"offsets must not fall: {o[first]} at index {first}, then {o[first + 1]}")
    return o
