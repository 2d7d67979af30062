"""Encode measured numbers as features: each number is interpolated between two knots."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["between_knots"]

_OFFSET = 1100  # added to binary exponents, which are at least -1073, so that knot 0 is left for the number 0
_INFINITY = 1025  # one past the greatest exponent


def between_knots(numbers: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Find the two powers of two around each number, and the number's shares of them.

    Parameters
    ----------
    numbers : array_like of float, shape (n,)
        Numbers; NaN is treated as 0.

    Returns
    -------
    knots : ndarray of int64, shape (n, 2)
        ``sign * (1100 + k)`` for the knot ``sign * 2**(k - 1)``, 0 for 0. The even one comes first, so a knot is in the
        same column whether it is above or below a number.
    shares : ndarray of float32, shape (n, 2)
        Shares of the knots, >= 0, with sum 1; the sum of the knots' values times their shares is the number.

    Notes
    -----
    With a weight for each knot, ``sum_j share_j w_j`` is a continuous function that is linear between powers of two:
    a spline on a scale that fits all units and requires no pass over the data. Numbers that differ little in proportion
    (years) all lie between the same knots and should be shifted or scaled first. All operations are exactly rounded,
    so the result is the same on every machine.

    Examples
    --------
    >>> knots, shares = between_knots([1.0, 5.0, -0.75, 0.0])
    >>> (knots - 1100)[:2].tolist(), knots[2:].tolist()
    ([[2, 1], [4, 3]], [[-1100, -1101], [0, 0]])
    >>> shares.tolist()
    [[0.0, 1.0], [0.25, 0.75], [0.5, 0.5], [1.0, 0.0]]
    """
    x = np.nan_to_num(np.asarray(numbers, np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf)
    infinite = np.isinf(x)
    mantissa, exponent = np.frexp(np.abs(x))
    lower = np.where(infinite, _INFINITY, exponent.astype(np.int64)) + _OFFSET
    upper_share = np.where(infinite | (x == 0.0), 0.0, 2.0 * np.where(infinite, 0.0, mantissa) - 1.0)
    sign = np.sign(x).astype(np.int64)
    knots = np.stack([sign * lower, sign * (lower + 1)], axis=1)
    shares = np.stack([1.0 - upper_share, upper_share], axis=1).astype(np.float32)
    odd = lower % 2 == 1
    knots[odd], shares[odd] = knots[odd, ::-1], shares[odd, ::-1]
    return knots, shares
