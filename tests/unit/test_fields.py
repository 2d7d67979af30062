"""Buckets of numbers, and keys from columns."""

from __future__ import annotations

from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hashemb
from hashemb.ctr.data import Kind, bucketize_counts, encode
from hashemb.ctr.data.fields import bucketize_floats

pa = pytest.importorskip("pyarrow")


def test_count_buckets_are_exact() -> None:
    """Check every edge below 2**37 with 50-digit arithmetic: the smallest integer with ln(x)**2 >= k."""
    buckets = range(2, 658)
    with localcontext() as context:
        context.prec = 50
        edges = [int(Decimal(k).sqrt().exp()) + 1 for k in buckets]
    assert edges[-1] < 2**37 < edges[-1] * 1.02
    assert bucketize_counts(edges).tolist() == list(buckets)
    assert bucketize_counts([edge - 1 for edge in edges]).tolist() == [k - 1 for k in buckets]


def test_count_buckets_at_the_ends() -> None:
    assert bucketize_counts([-(2**63), -1, 0, 1, 2, 3]).tolist() == [-(2**63), -1, 0, 1, 2, 1]
    assert bucketize_counts(np.array([2**63 - 1, 2**63], np.uint64)).tolist() == [1906, 1906]
    assert bucketize_counts([]).shape == (0,)
    with pytest.raises(TypeError, match="counts must be integers, got float64"):
        bucketize_counts([1.5])


@given(st.integers(-(2**63), 2**63 - 1) | st.integers(-10, 5000))
def test_count_buckets_are_of_the_value_alone(x: int) -> None:
    """A bucket is the same whether looked up or computed, in any shape and width and among any other values."""
    bucket = int(bucketize_counts([x]).item())
    assert x <= 2 or bucket == int(np.floor(np.log(float(x)) ** 2))
    assert x > 2 or bucket == x
    scalar = bucketize_counts(x)
    assert (scalar.shape, scalar.dtype, int(scalar)) == ((), np.int64, bucket)
    assert bucketize_counts(np.array([[5000, x], [x, 0]])).tolist() == [[72, bucket], [bucket, 0]]
    for dtype in (np.uint8, np.int16, np.uint64):
        if np.iinfo(dtype).min <= x <= np.iinfo(dtype).max:
            assert bucketize_counts(np.array([x], dtype)).tolist() == [bucket]


@given(st.floats(1e-300, 1e300), st.floats(0, 1), st.sampled_from([1.0, -1.0]))
def test_float_buckets(x: float, share: float, sign: float) -> None:
    """Values 13 % apart differ; buckets preserve the order and the sign."""
    a, b = bucketize_floats(np.array([x, x * 1.126]) * sign)
    assert a != b
    low, mid = bucketize_floats([x, x * (1 + 0.1 * share)])
    assert low <= mid <= low + 2
    assert bucketize_floats([-0.0])[0] == bucketize_floats([0.0])[0] == 0
    assert len(set(bucketize_floats([x, -x, 0.0, np.inf, -np.inf]).tolist())) == 5


@pytest.mark.parametrize(
    ("column", "kind", "same_as"),
    [
        (pa.array(["a", None]), "string", ["a", None]),
        (pa.array([b"a", b"\xff"]), "string", [b"a", b"\xff"]),
        (pa.array(["b", "a", "b", None]).dictionary_encode(), "string", ["b", "a", "b", None]),
        (pa.array([5, None, -1]), "integer", [5, None, -1]),
        (pa.array([5, 2**64 - 1], pa.uint64()), "integer", [5, 2**64 - 1]),
        (pa.array([100, None, -1, 2]), "count", [21, None, -1, 2]),
        (pa.array([0, 100, None, 65535], pa.int32())[1:], "count", [21, None, 122]),
        (pa.array([7] * 9 + [None, 3], pa.uint8())[8:], "count", [3, None, 1]),
        (pa.array([], pa.int64()), "count", []),
        (pa.array([100, None, 2**64 - 1], pa.uint64()), "count", [21, None, 1967]),
        (pa.array([1.5, None, float("nan"), 0.0]), "float", [0x3FF8 << 48 >> 49, None, None, 0]),
        (pa.array([1.5, 0.0], pa.float32()), "float", [0x3FF8 << 48 >> 49, 0]),
    ],
)
def test_encoding(column: Any, kind: Kind, same_as: list[Any]) -> None:
    keys = encode({"f": column, "other": column}, {"f": kind})
    assert keys.shape == (len(column), 1)
    assert keys[:, 0].tolist() == [int(hashemb.hash_keys([value], field="f")[0]) for value in same_as]
