"""Infer from its first values whether a column of integers holds ids or counts.

The two mistakes differ in cost. Ids that are read as counts fall into a few dozen buckets, which loses their
information; counts that are read as ids are learned value by value, which works as well if values repeat. Integers are
therefore ids, unless the file is small and nearly all values differ: then ids would not repeat, but buckets do. The
most common value is ignored, so that amounts that are mostly 0 are recognised too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["SMALL_FILE_BYTES", "looks_like_count"]

SMALL_FILE_BYTES = 1 << 24
_SAMPLE_ROWS = 2000
_MIN_ROWS = 50
_DIFFERENT = 0.95  # Frappe's items, which are ids: .67 of the first 2,000


def looks_like_count(values: Any, file_bytes: int | None) -> bool:
    """Return whether the integers in an Arrow column seem to be counts.

    The column holds the first values of a file of `file_bytes` bytes (None if unknown).

    >>> import pyarrow as pa
    >>> ids, amounts = pa.array([7, 8, 7, 9] * 50), pa.array([0] * 200 + [i * i for i in range(200)])
    >>> looks_like_count(ids, 1000), looks_like_count(amounts, 1000), looks_like_count(amounts, None)
    (False, True, False)
    """
    given = values[:_SAMPLE_ROWS].drop_null().to_numpy(zero_copy_only=False)
    if len(given) == 0 or file_bytes is None or file_bytes > SMALL_FILE_BYTES:
        return False
    _, repeats = np.unique(given, return_counts=True)
    rest = len(given) - int(repeats.max())
    return rest >= _MIN_ROWS and len(repeats) - 1 >= _DIFFERENT * rest
