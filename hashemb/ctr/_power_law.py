"""Counter-based random draws: long-tailed integers from 64-bit words, with integer and exactly rounded arithmetic.

No transcendental functions are used to compute a value from a word, so it is the same on every machine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from hashemb._random import GOLDEN, MASK, fmix64, splitmix64
from hashemb.ctr._types import Float64Array, Int64Array, UInt64Array

__all__ = ["Dyadic", "draws", "gaussian", "log_normal", "power_law", "splitmix"]


_TABLE_SIZE = 1 << 16


def splitmix(seed: int) -> Iterator[int]:
    """Yield the SplitMix64 sequence of `seed` (modulo 2**64), as salts for independent draws."""
    return (splitmix64(seed & MASK, i) for i in itertools.count())



def draws(salt: int, start: int, count: int) -> UInt64Array:
    """Draw one random word for each of the counters `start` to `start + count`, by mixing a Weyl sequence."""
    counters = np.arange(start, start + count, dtype=np.uint64)
    counters *= np.uint64(GOLDEN)
    counters += np.uint64(salt)
    return fmix64(counters)


def gaussian(words: UInt64Array) -> Float64Array:
    """Draw from an approximately standard normal distribution: the scaled sum of a word's four 16-bit parts.

    The values lie within ±3.47.
    """
    total = np.zeros(len(words), np.uint64)
    for shift in (0, 16, 32, 48):
        total += (words >> np.uint64(shift)) & np.uint64(0xFFFF)
    return (total.astype(np.float64) - 131070.0) * (1.0 / math.sqrt(4 * (65536.0**2 - 1) / 12))


class Dyadic:
    """A long-tailed distribution over ranks 1, 2, …: weighted octaves, and 1/x inside an octave.

    Octave k is [2**k, 2**(k+1)), the last one cut off at `size`. Weights are rounded to multiples of 2**-16.
    """

    def __init__(self, weights: Sequence[float], size: int) -> None:
        bounds = np.round(np.cumsum(weights) / np.sum(weights) * _TABLE_SIZE).astype(np.int64)
        self._octave = np.repeat(np.arange(len(weights)), np.diff(bounds, prepend=0)).astype(np.uint8)
        low = 2.0 ** np.arange(len(weights))
        self._low = low
        self._width = np.minimum(2.0 * low, size + 1.0) - low

    def ranks(self, words: UInt64Array) -> Int64Array:
        """Return the rank that each word selects; uses its upper 48 bits."""
        octave = self._octave[words >> np.uint64(48)]
        t = ((words >> np.uint64(16)) & np.uint64(0xFFFFFFFF)).astype(np.float64)
        t *= 2.0**-32
        share = t * (0.6565 + 0.3435 * t)  # 2**t - 1 to within 0.003: density 1/x in the octave
        ranks: Float64Array = self._low[octave] + np.floor(self._width[octave] * share)
        return ranks.astype(np.int64)


def power_law(size: int, exponent: float) -> Dyadic:
    """Make a power law: rank r of `size` has a probability proportional to ``r**-exponent``, octave by octave."""
    octaves = size.bit_length()
    weights = [2.0 ** (k * (1.0 - exponent)) for k in range(octaves)]
    weights[-1] *= math.log2((size + 1) / 2 ** (octaves - 1))
    return Dyadic(weights, size)


def log_normal(log2_median: float, log2_std: float) -> Dyadic:
    """Make a log-normal distribution over ranks, cut off at four standard deviations."""
    octaves = int(log2_median + 4.0 * log2_std) + 2
    edges = [-math.inf, *range(1, octaves), math.inf]
    below = [0.5 * math.erfc(-(edge - log2_median) / (log2_std * math.sqrt(2.0))) for edge in edges]
    return Dyadic(np.diff(below).tolist(), 2**octaves)
