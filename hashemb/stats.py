"""Statistics of a table's use: `TableStats`, the occupancy formulas behind it, and a sample of the written rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from hashemb._files import TableFiles
from hashemb._points import widen

__all__ = ["RowSample", "TableStats", "collision_rate", "estimate_distinct_keys", "sample_rows"]


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


# ---- a sample of the rows ----


class RowSample(NamedTuple):
    """Rows of a table that have been written.

    Attributes
    ----------
    rows : ndarray of int64, shape (num_rows,)
        Row numbers, ascending.
    values : ndarray of float32, shape (num_rows, embedding_dim)
        The stored weights, before weight decay that is still owed.
    is_complete : bool
        Whether these are all rows that have been written.
    """

    rows: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]
    is_complete: bool


class _Table(Protocol):
    """What `sample_rows` needs of an `EmbeddingTable`, whose module is above this one."""

    num_embeddings: int
    dtype: str

    def _open_files(self) -> TableFiles: ...


def sample_rows(table: _Table, max_rows: int = 1 << 16, max_blocks: int = 1 << 14) -> RowSample:
    """Return an evenly spaced sample of the rows that have been written, or all of them if there are few.

    Parameters
    ----------
    table : EmbeddingTable
        An open table, in any mode.
    max_rows, max_blocks : int
        Read at most this many blocks, evenly spaced among the written ones, and return at most this many of their rows.
        A block has about 4096 bytes of weights.

    Returns
    -------
    RowSample

    Raises
    ------
    ClosedTableError
        The table is closed.
    """
    files = table._open_files()
    block_rows = files.meta.block_rows
    with files.calls:
        written = files.written_blocks()
        blocks = _evenly(written, max_blocks)
        rows = (blocks[:, None] * block_rows + np.arange(block_rows)).reshape(-1)
        rows = rows[rows < table.num_embeddings]
        stored = files.arrays["weight"][rows]
    touched = np.flatnonzero(stored.view(f"u{stored.dtype.itemsize}").any(axis=1))
    chosen = _evenly(touched, max_rows)
    is_complete = len(blocks) == len(written) and len(chosen) == len(touched)
    return RowSample(rows[chosen], widen(stored[chosen], table.dtype), is_complete)


def _evenly(numbers: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int64]:
    """Return all numbers, or `most` evenly spaced ones."""
    if len(numbers) <= most:
        return numbers
    return numbers[np.linspace(0, len(numbers) - 1, most).astype(np.int64)]
