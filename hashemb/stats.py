"""Statistics of a table's use: `TableStats` and the occupancy formulas behind it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

__all__ = ["TableStats", "collision_rate", "estimate_distinct_keys"]


@dataclass(frozen=True)
class TableStats:
    """How full a table is; returned by `EmbeddingTable.stats`.

    Attributes
    ----------
    num_embeddings : int
        Number of rows in the table.
    rows_touched : int
        Number of rows written at least once. Rows are counted when first written, so several Hogwild writers may
        count a row twice; with `exact` they are counted by reading the written blocks.
    exact : bool
        Whether `rows_touched` comes from such a scan.
    estimated_distinct_keys : float
        Number of distinct keys updated, estimated from `rows_touched`; inf when every row is touched.
    collision_rate : float
        Expected fraction of those keys that share all their rows with other keys.
    logical_bytes, disk_bytes : int
        Size of the files with and without their holes.
    resident_bytes : int or None
        Bytes of the files in the page cache; None where the kernel does not report it.
    huge_page_bytes : int or None
        Bytes that this process has used so far and maps with pages of 2 MiB; None where the kernel does not report
        it. Other processes may map the same bytes with smaller pages.
    """

    num_embeddings: int
    rows_touched: int
    exact: bool
    estimated_distinct_keys: float
    collision_rate: float
    logical_bytes: int
    disk_bytes: int
    resident_bytes: int | None
    huge_page_bytes: int | None

    @classmethod
    def estimate(
        cls, rows_touched: int, num_embeddings: int, num_hashes: int, *, exact: bool, **sizes: Any
    ) -> TableStats:
        """Estimate keys and collisions from the number of rows touched; `sizes` are the fields ending in `_bytes`."""
        distinct = estimate_distinct_keys(rows_touched, num_embeddings, num_hashes)
        return cls(
            num_embeddings=num_embeddings,
            rows_touched=rows_touched,
            exact=exact,
            estimated_distinct_keys=distinct,
            collision_rate=collision_rate(distinct, num_embeddings, num_hashes),
            **sizes,
        )


def estimate_distinct_keys(rows_touched: int, num_embeddings: int, num_hashes: int = 1) -> float:
    """Estimate how many distinct keys touched this many rows, by inverting the expected occupancy.

    D keys with k hashes touch ``n * (1 - (1 - 1/n)**(k * D))`` of n rows in expectation. This is the occupancy
    problem (Feller, An Introduction to Probability Theory and Its Applications I, section IV.2), also known as linear
    counting (Whang et al., ACM TODS 15, 1990).

    >>> round(estimate_distinct_keys(632, 1000))
    999
    """
    if num_embeddings == 1:
        return float(rows_touched)
    if rows_touched >= num_embeddings:
        return math.inf
    return math.log1p(-rows_touched / num_embeddings) / math.log1p(-1.0 / num_embeddings) / num_hashes


def collision_rate(distinct_keys: float, num_embeddings: int, num_hashes: int = 1) -> float:
    """Return the expected fraction of keys that share each of their rows with at least one other key.

    >>> round(collision_rate(1000, 1000), 3)
    0.632
    """
    if distinct_keys <= 1.0:
        return 0.0
    if num_embeddings == 1 or math.isinf(distinct_keys):
        return 1.0
    others = (distinct_keys - 1.0) * num_hashes
    shared = -math.expm1(others * math.log1p(-1.0 / num_embeddings))
    return float(shared**num_hashes)
