"""How fast are columns of values hashed to keys? `hash_keys` against functions commonly used per value or per column.

Only mmh3 computes the same function, so its keys are compared value by value; the others compute 32 or 64 bits of
another hash for the same purpose. All sides use one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mmh3
import numpy as np

import hashemb
from bench import torch_sides
from bench.harness import OURS, Clock, Mismatch, Result, Settings, Skip, available, digest, measure

PER_VALUE = 1 << 18  # values for sides that need a Python object per value
WIDTH = 8  # bytes in a string


class HashSide:
    """A side that hashes a column in one call of `fn`; `column` is in the form that `fn` takes."""

    def __init__(self, name: str, fn: Callable[[Any], Any], column: Any, *, share: float = 1.0) -> None:
        self.name, self.group, self.fn, self.column, self.share = name, name, fn, column, share
        self.note = "" if share == 1.0 else f"on {len(column)} values"

    def prepare(self, batch: int) -> Any:
        return self.column

    def run(self, prepared: Any, clock: Clock) -> None:
        self.fn(prepared)
        clock.lap("hash")


def run(settings: Settings) -> Iterator[Result]:
    torch_sides.set_num_threads(1)
    n = 10_000 if settings.smoke else 10_000_000
    ints = np.random.default_rng(3).integers(0, 1 << 63, n)
    letters = np.random.default_rng(4).integers(97, 123, (n, WIDTH), np.uint8)
    for kind in ("int64", "NumPy S8", "Arrow string"):
        skipped: dict[str, str] = {}
        sides: list[Any] = []
        with available(skipped, kind):
            sides, checks = int_sides(ints, skipped) if kind == "int64" else string_sides(kind, letters, skipped)
        if not sides:
            continue
        rows = measure(sides, int, units=n, repeats=max(1, settings.repeats // 2), inner=1)
        yield Result("hash", {"column": kind, "values": n}, "value", n, rows, skipped, checks)


def int_sides(ints: Any, skipped: dict[str, str]) -> tuple[list[Any], dict[str, Any]]:
    few = ints[:PER_VALUE].tolist()
    share = len(few) / ints.size
    checks = check(hashemb.hash_keys(ints), mmh3_ints(few))
    sides = [HashSide(OURS, hashemb.hash_keys, ints), HashSide("mmh3 per value", mmh3_ints, few, share=share)]
    sides += column_peers(ints, lambda: ints, skipped)
    return sides, checks


def string_sides(kind: str, letters: Any, skipped: dict[str, str]) -> tuple[list[Any], dict[str, Any]]:
    fixed = letters.view(f"S{WIDTH}").reshape(-1)
    few = [v.decode() for v in fixed[:PER_VALUE].tolist()]
    share = len(few) / fixed.size
    column = fixed if kind == "NumPy S8" else arrow_strings(letters)
    checks = check(hashemb.hash_keys(column), mmh3_strings(few))
    sides = [HashSide(OURS, hashemb.hash_keys, column), HashSide("mmh3 per value", mmh3_strings, few, share=share)]
    with available(skipped, "hash_keys of a list"):
        sides.append(HashSide("hashemb on a list of str", hashemb.hash_keys, few, share=share))
    with available(skipped, "FeatureHasher"):
        sides.append(HashSide("scikit-learn FeatureHasher", feature_hasher(), few, share=share))
    sides += column_peers(np.array(few, object), lambda: arrow_strings(letters), skipped)
    return sides, checks


def column_peers(for_pandas: Any, for_polars: Callable[[], Any], skipped: dict[str, str]) -> list[HashSide]:
    """Return the peers that take a whole column. pandas gets Python strings as objects, polars Arrow data."""
    sides = []
    n = for_pandas.size
    with available(skipped, "pandas"):
        from pandas.util import hash_array

        plain = lambda v: hash_array(v, categorize=False)  # noqa: E731
        sides.append((HashSide("pandas hash_array", plain, for_pandas), n))
    with available(skipped, "polars"):
        import polars

        series = polars.Series("v", for_polars())
        sides.append((HashSide("polars Series.hash", polars.Series.hash, series), len(series)))
    whole = max((size for _, size in sides), default=n)
    for side, size in sides:
        side.share = size / whole
    return [side for side, _ in sides]


def mmh3_ints(values: list[int]) -> Any:
    return [mmh3.mmh3_x64_128_utupledigest(v.to_bytes(8, "little"), 0)[0] for v in values]


def mmh3_strings(values: list[str]) -> Any:
    return [mmh3.hash64(v, signed=False)[0] for v in values]


def feature_hasher() -> Callable[[list[str]], Any]:
    """Return a function that hashes each value as a separate sample, into 2**20 columns, scikit-learn's default."""
    from sklearn.feature_extraction import FeatureHasher

    hasher = FeatureHasher(input_type="string")
    return lambda values: hasher.transform([v] for v in values)


def arrow_strings(letters: Any) -> Any:
    """Return an Arrow string column over the same bytes, without a copy; raise `Skip` without pyarrow."""
    try:
        import pyarrow
    except ImportError:
        raise Skip("pyarrow is not installed") from None
    offsets = np.arange(0, letters.size + 1, WIDTH, dtype=np.int32)
    buffers = [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(np.ascontiguousarray(letters))]
    return pyarrow.Array.from_buffers(pyarrow.string(), len(offsets) - 1, buffers)


def check(keys: Any, expected: list[int]) -> dict[str, Any]:
    """Check that our keys equal mmh3's, bit for bit."""
    if not np.array_equal(keys[: len(expected)], np.array(expected, np.uint64)):
        raise Mismatch("hash_keys differs from mmh3")
    return {"values": keys.size, "keys_sha256": digest(keys)}
