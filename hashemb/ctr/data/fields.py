"""Encode columns of values as one uint64 key per field; this determines which values share a key.

A schema maps each field's name to its kind; the order of the schema is the order of the key columns. Values of
different fields have different keys, barring hash collisions, because `hashemb.hash_fields` salts every field by its
name. A missing value has a key of its own in every kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

import hashemb
from hashemb._packages import require

__all__ = [
    "CRITEO_LABEL",
    "CRITEO_SCHEMA",
    "CountBuckets",
    "Kind",
    "Schema",
    "bucketize_counts",
    "bucketize_floats",
    "check_schema",
    "encode",
]

Kind = Literal["string", "integer", "count", "float"]
Schema = Mapping[str, Kind]

_SMALL = 4096  # most counts are smaller

CRITEO_LABEL = "label"
CRITEO_SCHEMA: dict[str, Kind] = {
    **dict.fromkeys((f"I{i}" for i in range(1, 14)), "count"),
    **dict.fromkeys((f"C{i}" for i in range(1, 27)), "string"),
}


def bucketize_counts(counts: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Bucketize integers: the bucket of x is ``floor(ln(x)**2)`` for x > 2, else x itself.

    Parameters
    ----------
    counts : array_like of int
        Counts in an array of any shape.

    Returns
    -------
    ndarray of int64
        Buckets, in the same shape. 3 and 4 share bucket 1 with 1 itself, and 5 shares bucket 2 with 2; 0 and each
        negative value have a bucket of their own. For larger x the width of a bucket grows as ``x / (2 ln x)``.

    Raises
    ------
    TypeError
        The counts are not integers.

    Notes
    -----
    This is the rule of the BARS benchmark for Criteo (Zhu et al., SIGIR 2022), which follows the winners of the Kaggle
    competition ("3 Idiots", 2014). The buckets are exact for x below 2**37; for larger x, rounding of the logarithm
    may move an x at the edge of a bucket to the adjacent one.

    Examples
    --------
    >>> bucketize_counts([-2, 0, 1, 2, 3, 5, 10, 100, 65535]).tolist()
    [-2, 0, 1, 2, 1, 2, 5, 21, 122]
    """
    x = np.asarray(counts)
    if x.dtype.kind not in "iu" and x.size:
        raise TypeError(f"counts must be integers, got {x.dtype}")
    far = (x < 0) | (x >= _SMALL)
    buckets = np.asarray(_small_buckets()[np.where(far, 0, x).astype(np.int64)])
    if far.any():
        buckets[far] = _buckets_by_logarithm(x[far])
    return buckets


@cache
def _small_buckets() -> npt.NDArray[np.int64]:
    """Return the bucket of each count below `_SMALL`: a look-up takes half the time of a logarithm."""
    return _buckets_by_logarithm(np.arange(_SMALL))


def _buckets_by_logarithm(x: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
    logarithm = np.log(np.maximum(x, 1).astype(np.float64))
    return np.where(x > 2, np.floor(logarithm * logarithm).astype(np.int64), x.astype(np.int64))


class CountBuckets(NamedTuple):
    """The rule of `bucketize_counts` as lookup tables, which find a bucket without a logarithm.

    Attributes
    ----------
    small : ndarray of int16, shape (4096,)
        Bucket of each count below 4096.
    first : ndarray of int64
        The smallest count x > 2 whose bucket is at least the index.
    octave : ndarray of int32, shape (64,)
        Bucket of 2**k, and of the largest int64 for k = 63.
    """

    small: npt.NDArray[np.int16]
    first: npt.NDArray[np.int64]
    octave: npt.NDArray[np.int32]

    @classmethod
    def all(cls) -> CountBuckets:
        """Compute the tables for all of int64, by bisection of `bucketize_counts` itself; takes about 3 ms.

        >>> tables = CountBuckets.all()
        >>> x = np.array([4095, 4096, 10**6, 2**40])
        >>> (np.searchsorted(tables.first, x, side="right") - 1 == bucketize_counts(x)).all().item()
        True
        """
        largest = np.iinfo(np.int64).max
        buckets = np.arange(int(bucketize_counts(largest)) + 1)
        low, high = np.full(len(buckets), 3, np.int64), np.full(len(buckets), largest, np.int64)
        while (low < high).any():
            middle = low + (high - low) // 2
            reached = bucketize_counts(middle) >= buckets
            low, high = np.where(reached, low, middle + 1), np.where(reached, middle, high)
        powers = np.array([*(1 << np.arange(63)), largest])
        octave = np.searchsorted(high, powers, side="right") - 1
        return cls(bucketize_counts(np.arange(_SMALL)).astype(np.int16), high, octave.astype(np.int32))


def bucketize_floats(values: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Bucketize real numbers by the sign, the binary exponent and the first three bits of the mantissa.

    Parameters
    ----------
    values : array_like of float
        Values in an array of any shape; float16 and float32 are widened first, which changes no bucket.

    Returns
    -------
    ndarray of int64
        Buckets, in the same shape. Each doubling of the value spans eight buckets, so a bucket is 6 to 12 % wide at
        any scale; 0 and -0 share a bucket; each infinity and NaN has its own (readers treat NaN as missing).

    Notes
    -----
    The rule only shifts bits, so the bucket of a value is the same on every machine. Unlike the logarithmic rule for
    counts, it distinguishes values between 0 and 1, such as rates and scores.

    Examples
    --------
    >>> a, b, c, d = bucketize_floats([0.50, 0.52, 0.60, -0.50]).tolist()
    >>> a == b, a == c, a == d
    (True, False, False)
    """
    x = np.asarray(values, dtype=np.float64) + 0.0  # -0.0 + 0.0 is 0.0
    return x.view(np.int64) >> 49


def check_schema(schema: Schema) -> dict[str, Kind]:
    """Return a copy of `schema`, or raise a ValueError that describes what is wrong with it."""
    if not schema:
        raise ValueError("the schema names no fields")
    for name, kind in schema.items():
        if kind not in get_args(Kind):
            raise ValueError(f"field {name!r}: kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    return dict(schema)


def encode(columns: Mapping[str, Any], schema: Schema) -> npt.NDArray[np.uint64]:
    """Compute the keys of a batch: hash every column of `schema`, salted by its name.

    Parameters
    ----------
    columns : mapping of str to pyarrow.Array
        Columns of equal length: strings (plain or dictionary-encoded) for kind ``"string"``, integers for
        ``"integer"`` and ``"count"``, floats for ``"float"``. Columns that `schema` does not name are ignored.
    schema : mapping of str to {"string", "integer", "count", "float"}
        Fields in the order of the result's columns. Strings and integers are hashed unchanged, counts and floats
        after `bucketize_counts` and `bucketize_floats`. Null and NaN are missing values.

    Returns
    -------
    ndarray of uint64, shape (n, len(schema))
        Keys, C-contiguous.

    Raises
    ------
    KeyError
        A field of the schema is not among the columns.

    Examples
    --------
    >>> import pyarrow as pa
    >>> keys = encode({"ad": pa.array(["x", None]), "seen": pa.array([3, 4])}, {"ad": "string", "seen": "count"})
    >>> bool(keys[1, 0] == hashemb.hash_keys([None], field="ad")[0]), bool(keys[0, 1] == keys[1, 1])
    (True, True)
    """
    canonical = {name: _CANONICAL[kind](columns[name]) for name, kind in schema.items()}
    return hashemb.hash_fields(canonical)


def _as_it_is(column: Any) -> Any:
    return column


def _counts(column: Any) -> Any:
    """Return the buckets with the validity bitmap of the counts; values under a null are computed but never used."""
    pa = require("pyarrow")
    dtype = np.uint64 if column.type == pa.uint64() else np.int64  # only uint64 has values that do not fit int64
    column = column if dtype is np.uint64 else column.cast(pa.int64())
    validity, values = column.buffers()
    counts = np.frombuffer(values, dtype, column.offset + len(column)) if len(column) else np.empty(0, dtype)
    buffers = [validity, pa.py_buffer(bucketize_counts(counts))]
    return pa.Array.from_buffers(pa.int64(), len(column), buffers, offset=column.offset)


def _floats(column: Any) -> Any:
    pa = require("pyarrow")
    values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)  # null becomes NaN
    return pa.array(bucketize_floats(values), mask=np.isnan(values))


_CANONICAL: dict[Kind, Callable[[Any], Any]] = {
    "string": _as_it_is,
    "integer": _as_it_is,
    "count": _counts,
    "float": _floats,
}
