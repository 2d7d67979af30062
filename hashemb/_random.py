"""The two integer mixers of the library: SplitMix64, and MurmurHash3's finaliser with its inverse.

`hashemb.reference` has its own, as the tests' oracle, and csrc/numerics.h has them in C.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["GOLDEN", "MASK", "fmix64", "splitmix64", "unfmix64"]

GOLDEN = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio, the step of SplitMix64
MASK = (1 << 64) - 1
_FACTORS = (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53)
_INVERSES = tuple(pow(factor, -1, 1 << 64) for factor in reversed(_FACTORS))

U64 = npt.NDArray[np.uint64]


def splitmix64(seed: int, i: int) -> int:
    """Return output number `i`, counted from 0, of SplitMix64 started at `seed` (Steele, Lea, Flood, OOPSLA 2014)."""
    z = (seed + (i + 1) * GOLDEN) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def fmix64(x: U64) -> U64:
    """Apply MurmurHash3's 64-bit finaliser in place, and return `x`."""
    return _mix(x, _FACTORS)


def unfmix64(x: U64) -> U64:
    """Invert `fmix64` in place, and return `x`: shifts by 33 undo themselves, and factors have inverses mod 2**64."""
    return _mix(x, _INVERSES)


def _mix(x: U64, factors: tuple[Any, ...]) -> U64:
    for factor in factors:
        x ^= x >> np.uint64(33)
        x *= np.uint64(factor)
    x ^= x >> np.uint64(33)
    return x
