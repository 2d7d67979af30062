"""Whether a column of integers holds ids or counts, when nobody says: a guess from its first values.

The two mistakes weigh unequally. Ids read as counts fall into a few dozen buckets, and all that they say is lost;
counts read as ids are learned value by value, which is as good where values come again. So integers are ids, unless
the file is small and nearly all values differ: then no id would be met again, but a bucket is. The most common value
is set aside, so that amounts which are mostly 0 are found too.
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
    """Whether the integers of an Arrow column, the first of a file of that size (None: unknown), seem to be counts.

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
