"""Generate impressions like Criteo's with known true click probabilities, for training and evaluation.

Impression i is a pure function of (seed, i): any range can be generated separately, in any pieces. Only the last step,
the logistic function, is not exactly rounded, so the columns are the same on every machine.

An impression has 13 integer columns (log-normal counts) and 26 categorical ones (power laws over 4 to 10**8
values), with missing values. Its logit is the sum of a bias, an effect of each value, and for some pairs of columns the
product of two-dimensional vectors of the two values: a factorisation machine of rank `TRUE_RANK`. Effects and
vectors are hashed from the values. The popularity of values drifts continuously: see `_Categorical._indices`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hashemb._packages import require
from hashemb._random import fmix64
from hashemb.ctr._power_law import draws, gaussian, log_normal, power_law, splitmix
from hashemb.ctr._replacing import replacing
from hashemb.ctr._types import Float64Array, Int64Array, UInt64Array
from hashemb.ctr.data import CRITEO_LABEL, CRITEO_SCHEMA, bucketize_counts, encode
from hashemb.ctr.synthetic.writers import SUFFIXES, open_writer

__all__ = ["TRUE_RANK", "ImpressionStream", "Impressions", "truth_path"]

_WRITE_ROWS = 1 << 16
_PILOT_ROWS = 1 << 15

# (share of missing values, log2 of the median, its standard deviation, smallest value)
_INTEGERS = (
    (0.45, 1.0, 1.6, 0), (0.00, 2.3, 3.2, -2), (0.20, 3.0, 2.2, 0), (0.20, 2.4, 1.5, 0), (0.05, 11.3, 3.2, 0),
    (0.25, 5.4, 2.4, 0), (0.05, 2.0, 2.2, 0), (0.00, 2.9, 1.6, 0), (0.05, 5.5, 2.2, 0), (0.45, 0.4, 0.8, 0),
    (0.05, 1.2, 1.2, 0), (0.75, 0.6, 1.2, 0), (0.20, 2.5, 1.6, 0),
)  # fmt: skip

# Rank of C1..C26 by vocabulary size: 0 has 4 values, 25 has `max_vocabulary`.
_SIZE_ORDER = (7, 9, 24, 22, 6, 3, 15, 8, 0, 18, 14, 23, 13, 4, 16, 21, 2, 12, 11, 1, 25, 5, 10, 20, 17, 19)
_MISSING = {"C3": 0.03, "C4": 0.03, "C6": 0.12, "C19": 0.44, "C20": 0.44, "C22": 0.76, "C25": 0.44, "C26": 0.44}
_LONG_TAILED = 22  # columns from this rank on (at least 13 million values by default) have the longest tails

# Pairs of columns whose values interact. Their vocabularies are small (4 x 239, 16 x 61, 31 x 472), so that pairs of
# values occur often enough in a few hundred thousand impressions to be learned.
_PAIRS = (("C9", "C5"), ("C17", "C14"), ("C6", "C1"))
_PAIR_RANK = 2
TRUE_RANK = _PAIR_RANK * len(_PAIRS)

# Standard deviations on the logit scale. With these values the true probabilities have an AUC of .82 to .84, a logistic
# regression reaches about .71, and a factorisation machine can close most of the gap (docs/explanation/generator.md has
# measurements).
_INTEGER_EFFECT = 0.15
_CATEGORY_EFFECT = 0.2
_PAIR_EFFECT = 0.55


@dataclass(frozen=True)
class Impressions:
    """A range of impressions.

    Attributes
    ----------
    columns : dict of str to pyarrow.Array
        I1..I13 as int32, C1..C26 as dictionary-encoded strings of 8 hexadecimal digits; null where missing.
    labels : ndarray of float32, shape (n,)
        Labels, which are 1 with the true probability, else 0.
    probabilities : ndarray of float64, shape (n,)
        The true probabilities. No model can have a lower expected log loss.
    """

    columns: dict[str, Any]
    labels: npt.NDArray[np.float32]
    probabilities: Float64Array

    def keys(self) -> UInt64Array:
        """Return hashed keys, (n, 39), the same as `open_reader` computes for a file of these impressions."""
        return encode(self.columns, CRITEO_SCHEMA)


class ImpressionStream:
    """An endless, reproducible stream of impressions.

    Parameters
    ----------
    seed : int
        Seed, modulo 2**64. Streams with different seeds have only their shape in common.
    max_vocabulary : int
        Number of values in the largest categorical column, 4 to 2**31; the sizes of the 26 columns grow from 4 to this
        number in equal ratios.
    base_ctr : float
        Click-through rate at the start of the stream, in (0, 1); it changes slightly as popularity drifts.
    drift_period : int or None
        Number of impressions after which each rank of popularity passes to another value, at a different time for each
        rank; None for no drift.

    Examples
    --------
    >>> stream = ImpressionStream(seed=1)
    >>> whole, tail = stream.generate(0, 1000), stream.generate(990, 10)
    >>> bool((whole.probabilities[990:] == tail.probabilities).all())
    True
    >>> stream.vocabularies["C9"], stream.vocabularies["C21"], len(whole.columns)
    (4, 100000000, 39)
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        max_vocabulary: int = 10**8,
        base_ctr: float = 0.22,
        drift_period: int | None = 1 << 21,
    ) -> None:
        if not 4 <= max_vocabulary <= 1 << 31:
            raise ValueError(f"max_vocabulary must be between 4 and 2**31, got {max_vocabulary}")
        if not 0.0 < base_ctr < 1.0:
            raise ValueError(f"base_ctr must be between 0 and 1, got {base_ctr}")
        if drift_period is not None and not 1 <= drift_period <= 1 << 31:
            raise ValueError(f"drift_period must be between 1 and 2**31, got {drift_period}")
        self.seed = seed
        salts = splitmix(seed)
        self._label_salt = next(salts)
        self._columns: dict[str, _Integer | _Categorical] = {
            f"I{j}": _Integer(*parameters, salts) for j, parameters in enumerate(_INTEGERS, 1)
        }
        self.vocabularies: dict[str, int] = {}
        for j, order in enumerate(_SIZE_ORDER, 1):
            name, size = f"C{j}", round(4.0 * (max_vocabulary / 4.0) ** (order / 25))
            exponent = 1.2 if order >= _LONG_TAILED else 1.0 + 0.07 * math.log10(size)
            self.vocabularies[name] = size
            self._columns[name] = _Categorical(size, _MISSING.get(name, 0.0), drift_period, exponent, salts)
        self._bias = _solve_bias(self._draw(0, _PILOT_ROWS)[1], base_ctr)

    def generate(self, start: int, count: int) -> Impressions:
        """Generate impressions `start` to `start + count`, about 0.5 KB of memory each; a ValueError below 0."""
        if start < 0 or count < 0 or start + count > 1 << 62:
            raise ValueError(f"a range of impressions lies in [0, 2**62), got start {start}, count {count}")
        columns, logits = self._draw(start, count)
        probabilities = 1.0 / (1.0 + np.exp(-(logits + self._bias)))
        uniform = (draws(self._label_salt, start, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return Impressions(columns, (uniform < probabilities).astype(np.float32), probabilities)

    def _draw(self, start: int, count: int) -> tuple[dict[str, Any], Float64Array]:
        """Draw the columns, and compute logits without the bias."""
        logits = np.zeros(count)
        columns, vectors = {}, {}
        interacting = {name for pair in _PAIRS for name in pair}
        for name, column in self._columns.items():
            indices, columns[name] = column.draw(start, count)
            logits += column.effects(indices)
            if name in interacting:
                vectors[name] = column.vectors(indices)
        for a, b in _PAIRS:
            for u, v in zip(vectors[a], vectors[b], strict=True):
                logits += _PAIR_EFFECT * (u * v)
        return columns, logits

    def write(
        self, path: str | os.PathLike[str], start: int, count: int, *, progress: Callable[[int], None] | None = None
    ) -> None:
        """Write impressions `start` to `start + count` to a file, and their probabilities to another one next to it.

        Parameters
        ----------
        path : path
            ``.parquet`` (zstd, columns label, I1..I13, C1..C26) or ``.tsv``, ``.tsv.gz``, ``.tsv.zst`` (Criteo's
            text format). An existing file is replaced.
        progress : callable, optional
            Called with the number of impressions written so far.

        Notes
        -----
        The true probabilities are written to a separate file, ``<stem>.truth.npy`` (float32), so that a program that
        trains on `path` cannot see them. Both files are written under temporary names and renamed once they are
        complete, the impressions last. Memory grows by only 4 bytes per impression.
        """
        path = Path(path)
        truth = np.empty(count, np.float32)
        with replacing(truth_path(path)) as truth_temporary, replacing(path) as temporary:
            with open_writer(temporary, path.name) as write:
                for first in range(0, count, _WRITE_ROWS):
                    part = self.generate(start + first, min(_WRITE_ROWS, count - first))
                    write({CRITEO_LABEL: part.labels.astype(np.int8), **part.columns})
                    truth[first : first + len(part.labels)] = part.probabilities
                    if progress is not None:
                        progress(first + len(part.labels))
            with open(truth_temporary, "wb") as file:
                np.save(file, truth)


def truth_path(path: str | os.PathLike[str]) -> Path:
    """Return the path to which `ImpressionStream.write` writes the true probabilities of the file `path`.

    Examples
    --------
    >>> truth_path("data/train.tsv.gz").name
    'train.truth.npy'
    """
    path = Path(path)
    suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), path.suffix)
    return path.with_name(path.name.removesuffix(suffix) + ".truth.npy")


class _Column:
    """A column whose values have hashed effects; `missing` is the share of missing values."""

    def __init__(self, missing: float, effect: float, salts: Iterator[int]) -> None:
        self._missing_below = np.uint64(round(missing * 65536))
        self._effect = effect
        self._draw_salt, self._effect_salt, self._vector_salt = next(salts), next(salts), next(salts)

    def _words(self, start: int, count: int) -> tuple[UInt64Array, npt.NDArray[np.bool_]]:
        words = draws(self._draw_salt, start, count)
        return words, (words & np.uint64(0xFFFF)) < self._missing_below

    def effects(self, indices: Int64Array) -> Float64Array:
        """Return the main effect of each value."""
        return gaussian(fmix64(indices.astype(np.uint64) ^ np.uint64(self._effect_salt))) * self._effect

    def vectors(self, indices: Int64Array) -> list[Float64Array]:
        """Return the coordinates, 1 or -1, of the vector of each value."""
        words = fmix64(indices.astype(np.uint64) ^ np.uint64(self._vector_salt))
        bits = [(words >> np.uint64(bit) & np.uint64(1)).astype(np.float64) for bit in range(_PAIR_RANK)]
        return [1.0 - 2.0 * bit for bit in bits]


class _Integer(_Column):
    """A column of log-normal counts, shifted to start at `smallest`."""

    def __init__(
        self, missing: float, log2_median: float, log2_std: float, smallest: int, salts: Iterator[int]
    ) -> None:
        super().__init__(missing, _INTEGER_EFFECT, salts)
        self._distribution = log_normal(log2_median, log2_std)
        self._smallest = smallest

    def draw(self, start: int, count: int) -> tuple[Int64Array, Any]:
        """Return the indices that determine the effects, and the column; the index of a count is its bucket."""
        words, missing = self._words(start, count)
        counts = self._distribution.ranks(words) + (self._smallest - 1)
        indices = np.where(missing, 1 << 32, bucketize_counts(counts))
        return indices, require("pyarrow").array(counts.astype(np.int32), mask=missing)


class _Categorical(_Column):
    """A column of values from a vocabulary of `size`, with ranks drawn from a power law.

    Rare values, whose effects cannot be learned, have a larger share in a large vocabulary, so its effects are smaller.
    """

    def __init__(
        self, size: int, missing: float, drift_period: int | None, exponent: float, salts: Iterator[int]
    ) -> None:
        super().__init__(missing, _CATEGORY_EFFECT * math.sqrt(1.0 - math.log10(size) / 10.0), salts)
        self._size = size
        # Small vocabularies, such as device types, drift more slowly than large ones, such as ads.
        self._drift_period = None if drift_period is None else int(drift_period * 8.0 / math.log10(size))
        self._distribution = power_law(size, exponent)
        self._phase_salt, self._name_salt = next(salts), next(salts)
        self._stride = _coprime_near(size * 0.618, size)

    def _indices(self, words: UInt64Array, start: int) -> Int64Array:
        """Return the value, 0 to `size` - 1, that each impression's word selects.

        The word determines a rank of popularity. The value at each rank moves on by `stride` once per period, with a
        separate phase for each rank; each impression draws the exact time of the change independently, so that one
        value fades out over a period while the next one fades in.
        """
        ranks = self._distribution.ranks(words)
        if self._drift_period is None:
            return ranks - 1
        clock = np.arange(start, start + len(ranks), dtype=np.int64)
        clock += self._fraction_of_period(ranks.astype(np.uint64) ^ np.uint64(self._phase_salt))
        clock += self._fraction_of_period(words ^ np.uint64(self._phase_salt))
        generations = clock // self._drift_period
        return (ranks - 1 + generations % self._size * self._stride) % self._size

    def _fraction_of_period(self, words: UInt64Array) -> Int64Array:
        return ((fmix64(words) >> np.uint64(36)) * np.uint64(self._drift_period or 0) >> np.uint64(28)).astype(np.int64)

    def draw(self, start: int, count: int) -> tuple[Int64Array, Any]:
        """Return the indices that determine the effects, and the column."""
        words, missing = self._words(start, count)
        indices = self._indices(words, start)
        names = _scramble32(indices.astype(np.uint32), self._name_salt)
        indices[missing] = self._size
        return indices, _hexadecimal(require("pyarrow").array(names, mask=missing))


def _coprime_near(target: float, size: int) -> int:
    candidate = max(1, round(target))
    while np.gcd(candidate, size) != 1:
        candidate += 1
    return candidate


def _scramble32(values: npt.NDArray[np.uint32], salt: int) -> npt.NDArray[np.uint32]:
    """Apply a permutation of the 32-bit numbers (MurmurHash3's finaliser), so that distinct values stay distinct."""
    x = values ^ np.uint32(salt & 0xFFFFFFFF)
    for shift, multiplier in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x ^= x >> np.uint32(shift)
        x *= np.uint32(multiplier)
    x ^= x >> np.uint32(16)
    return x


def _hexadecimal(numbers: Any) -> Any:
    """Convert an Arrow array of uint32 to a dictionary-encoded one with 8 hexadecimal digits."""
    pa = require("pyarrow")
    encoded = numbers.dictionary_encode()
    distinct = encoded.dictionary.to_numpy()
    nibbles = (distinct[:, None] >> np.arange(28, -4, -4, dtype=np.uint32)) & np.uint32(15)
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)[nibbles]
    offsets = np.arange(0, 8 * len(distinct) + 1, 8, dtype=np.int32)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(digits)]
    return pa.DictionaryArray.from_arrays(
        encoded.indices, pa.Array.from_buffers(pa.string(), len(distinct), buffers)
    )


def _solve_bias(logits: Float64Array, base_ctr: float) -> float:
    """Find the bias at which the mean probability is `base_ctr`, by bisection, to 4 decimal places."""
    low, high = -40.0, 40.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        if (1.0 / (1.0 + np.exp(-(logits + middle)))).mean() < base_ctr:
            low = middle
        else:
            high = middle
    return round(low, 4)
