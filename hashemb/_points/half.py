"""Conversion of weights between storage dtypes, rounded to nearest even, by pure functions on arrays.

The kernels round stochastically, which suits training; weights for serving are rounded once, to nearest.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hashemb._files import STORAGE_DTYPES, Array

_NEGATIVE_ZERO = {"float32": 0x80000000, "float16": 0x8000, "bfloat16": 0x8000}


def convert_rows(rows: Array, source: str, target: str) -> Array:
    """Convert stored rows (n, dim) of a table of dtype `source` to the stored rows of one of dtype `target`.

    A row never written (all zero bytes) remains so; a written row that rounds to zero gets -0.0 as its first element.
    Raise `ValueError` if a finite weight is too large for `target`.
    """
    if source == target:
        return rows
    wide = widen(rows, source)
    found = _narrow(wide, target)
    _refuse_overflow(wide, widen(found, target), target)
    bits = found.view(f"u{found.dtype.itemsize}")
    written = rows.view(f"u{rows.dtype.itemsize}").any(axis=1)
    bits[written & ~bits.any(axis=1), 0] = _NEGATIVE_ZERO[target]
    return found


def widen(rows: Array, source: str) -> npt.NDArray[np.float32]:
    """Return stored weights of dtype `source` as float32, which is exact."""
    if source == "bfloat16":
        return (rows.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return rows.astype(np.float32)


def _narrow(wide: npt.NDArray[np.float32], target: str) -> Array:
    if target == "bfloat16":
        bits = wide.view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        nearest = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
        quiet = (bits >> np.uint32(16)).astype(np.uint16) | np.uint16(0x40)
        return np.where(np.isnan(wide), quiet, nearest)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # the caller rejects values that became infinite
        return wide.astype(STORAGE_DTYPES[target])


def _refuse_overflow(wide: npt.NDArray[np.float32], found: npt.NDArray[np.float32], target: str) -> None:
    lost = np.isinf(found) & np.isfinite(wide)
    if lost.any():
        raise ValueError(f"a weight of {float(wide[lost][0])!r} is too large for {target}")
