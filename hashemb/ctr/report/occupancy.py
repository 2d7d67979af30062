"""Measure how a table is used: which keys of the data share rows, and how large the rows have become.

The counts are exact for the data on which they are made. `EmbeddingTable.stats` has estimates that need no data, based
on the number of touched rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

import hashemb
from hashemb.ctr._types import Int64Array, UInt64Array

if TYPE_CHECKING:
    from hashemb import EmbeddingTable
    from hashemb.ctr.data import Batch

__all__ = ["FieldCollisions", "KeyCensus", "RowNorms", "row_norms"]


_PENDING_KEYS = 1 << 20


class FieldCollisions(NamedTuple):
    """Number of distinct keys in a field, and of those that share all their rows with other keys of the data."""

    field: str
    distinct_keys: int
    sharing_keys: int

    @property
    def rate(self) -> float:
        """Share of the keys that collide; 0 if there are no keys."""
        return self.sharing_keys / self.distinct_keys if self.distinct_keys else 0.0


class KeyCensus:
    """Collects the distinct keys of each field, batch by batch. It takes 8 bytes per distinct key, plus 8 MiB.

    Parameters
    ----------
    fields : sequence of str
        Names of the fields, in the order of the key columns.

    Examples
    --------
    >>> from hashemb.ctr.data.readers import Batch
    >>> census = KeyCensus(["user", "ad"])
    >>> census.add(Batch(None, np.array([[1, 5], [2, 5], [1, 6]], np.uint64)))
    >>> [keys.tolist() for keys in census.distinct()]
    [[1, 2], [5, 6]]
    """

    def __init__(self, fields: Sequence[str]) -> None:
        self.fields = list(fields)
        self._distinct = [np.empty(0, np.uint64) for _ in self.fields]
        self._pending: list[list[UInt64Array]] = [[] for _ in self.fields]
        self._num_pending = 0

    def add(self, batch: Batch) -> None:
        """Add the keys of a batch; of a ragged batch, only those whose field is in `fields`."""
        for number in range(len(self.fields)):
            keys = batch.keys[:, number] if batch.keys.ndim == 2 else batch.keys[_in_field(batch, number)]
            self._pending[number].append(keys)
            self._num_pending += keys.size
        if self._num_pending > _PENDING_KEYS:
            self._merge()

    def distinct(self) -> list[UInt64Array]:
        """Return the distinct keys of each field, in ascending order."""
        self._merge()
        return self._distinct

    def _merge(self) -> None:
        for number, pending in enumerate(self._pending):
            self._distinct[number] = np.unique(np.concatenate([self._distinct[number], *pending]))
            pending.clear()
        self._num_pending = 0

    def collisions(self, table: EmbeddingTable) -> list[FieldCollisions]:
        """Count the keys that collide in `table`, field by field; O(n log n) in the number of distinct keys."""
        columns = self.distinct()
        keys, codes = np.unique(np.concatenate([*columns, np.empty(0, np.uint64)]), return_inverse=True)
        sharing = _sharing(table.rows(keys).reshape(len(keys), table.num_hashes))[codes.reshape(-1)]
        ends = np.cumsum([len(column) for column in columns])
        return [
            FieldCollisions(field, len(column), int(sharing[end - len(column) : end].sum()))
            for field, column, end in zip(self.fields, columns, ends.tolist(), strict=True)
        ]


def _in_field(batch: Batch, number: int) -> npt.NDArray[np.bool_]:
    if batch.fields is None:
        return np.full(batch.keys.shape, number == 0)
    inside: npt.NDArray[np.bool_] = batch.fields == number
    return inside


def _sharing(rows: Int64Array) -> npt.NDArray[np.bool_]:
    """Return for each key (one line of `rows`) whether all its rows are also rows of other keys."""
    _, codes, counts = np.unique(rows, return_inverse=True, return_counts=True)
    own = (rows[:, :, None] == rows[:, None, :]).sum(axis=2)
    shared: npt.NDArray[np.bool_] = (counts[codes.reshape(rows.shape)] > own).all(axis=1)
    return shared


class RowNorms(NamedTuple):
    """Euclidean norms of rows that have been learned.

    Attributes
    ----------
    norms : ndarray of float32
        The norms.
    sampled : bool
        Whether they come from an evenly spaced sample of the rows instead of all rows.
    as_stored : bool
        Whether the norms exclude weight decay that is still owed. This happens only in a table with several hashes per
        key, where rows cannot be looked up one by one.
    """

    norms: npt.NDArray[np.float32]
    sampled: bool
    as_stored: bool


def row_norms(table: EmbeddingTable, *, max_blocks: int = 1 << 14, max_rows: int = 1 << 16) -> RowNorms:
    """Compute the norms of all touched rows, or of an evenly spaced sample (see `hashemb.sample_rows`)."""
    sample = hashemb.sample_rows(table, max_rows, max_blocks)
    vectors = sample.values
    if table.num_hashes == 1:
        vectors = table.lookup(hashemb.keys_of_rows(table, sample.rows))
    as_stored = table.num_hashes > 1 and table.optimizer.weight_decay > 0.0
    return RowNorms(np.sqrt(np.einsum("nd,nd->n", vectors, vectors)), not sample.is_complete, as_stored)
