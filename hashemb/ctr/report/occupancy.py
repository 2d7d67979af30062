"""Measure how a table is used: which keys of the data share rows, and how large the rows have become.

The counts are exact for the data on which they are made. `EmbeddingTable.stats` has estimates that need no data, based
on the number of touched rows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from hashemb.ctr._json_values import as_object, as_whole, parse_file
from hashemb.ctr._power_law import splitmix

if TYPE_CHECKING:
    from hashemb import EmbeddingTable
    from hashemb.ctr.data import Batch

__all__ = ["FieldCollisions", "KeyCensus", "RowNorms", "expected_rate", "row_norms"]

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

_PENDING_KEYS = 1 << 20
_BLOCKS_OFFSET_BYTES = 4096  # docs/reference/format.md: the data of every array file starts here
_EPOCHS_PER_READ = 1 << 20
_FMIX_INVERSES = (0x9CB4B2F8129337DB, 0x4F74430C22A54005)  # of MurmurHash3's multipliers, last first, modulo 2**64


class FieldCollisions(NamedTuple):
    """Number of distinct keys in a field, and of those that share all their rows with other keys of the data."""

    field: str
    distinct_keys: int
    sharing_keys: int

    @property
    def rate(self) -> float:
        """Share of the keys that collide; 0 if there are no keys."""
        return self.sharing_keys / self.distinct_keys if self.distinct_keys else 0.0


def expected_rate(distinct_keys: int, num_embeddings: int, num_hashes: int = 1) -> float:
    """Return the expected share of keys that share all their rows with other keys.

    The share is ``(1 - (1 - 1/n)**(k (D - 1)))**k``, for D keys and k hashes into n rows.

    >>> round(expected_rate(1000, 1000), 3), expected_rate(1, 1000), round(expected_rate(1000, 1000, 2), 3)
    (0.632, 0.0, 0.747)
    """
    if distinct_keys < 2 or num_embeddings == 1:
        return float(distinct_keys > 1)
    shared = -math.expm1(num_hashes * (distinct_keys - 1) * math.log1p(-1.0 / num_embeddings))
    return float(shared**num_hashes)


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
        self._pending: list[list[U64]] = [[] for _ in self.fields]
        self._num_pending = 0

    def add(self, batch: Batch) -> None:
        """Add the keys of a batch; of a ragged batch, only those whose field is in `fields`."""
        for number in range(len(self.fields)):
            keys = batch.keys[:, number] if batch.keys.ndim == 2 else batch.keys[_in_field(batch, number)]
            self._pending[number].append(keys)
            self._num_pending += keys.size
        if self._num_pending > _PENDING_KEYS:
            self._merge()

    def distinct(self) -> list[U64]:
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


def _sharing(rows: I64) -> npt.NDArray[np.bool_]:
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
    """Compute the norms of all touched rows, or of at most `max_rows` rows in at most `max_blocks` written blocks.

    The samples of blocks and of rows are evenly spaced. The function reads the marks of written blocks and the chosen
    blocks, by default at most 64 MiB of rows; blocks that were never written are holes in the files and are skipped.
    """
    block_rows = parse_file(Path(table.path, "meta.json"), "a table's metadata", _block_rows)
    written = _written_blocks(table.path)
    blocks = _evenly(written, max_blocks)
    rows = (blocks[:, None] * block_rows + np.arange(block_rows)).reshape(-1)
    rows = rows[rows < table.num_embeddings]
    stored = table.weight[rows]
    touched = np.flatnonzero(stored.view(f"u{stored.dtype.itemsize}").any(axis=1))
    chosen = _evenly(touched, max_rows)
    sampled = len(blocks) < len(written) or len(chosen) < len(touched)
    if table.num_hashes == 1:
        vectors = table.lookup(_keys_of_rows(rows[chosen], table.num_embeddings, table.seed))
    else:
        vectors = _as_float32(stored[chosen])
    as_stored = table.num_hashes > 1 and table.optimizer.weight_decay > 0.0
    return RowNorms(np.sqrt(np.einsum("nd,nd->n", vectors, vectors)), sampled, as_stored)


def _block_rows(values: object) -> int:
    return as_whole(as_object(values, "meta.json").get("block_rows"), "block_rows", 1, 4096)


def _evenly(numbers: I64, most: int) -> I64:
    """Return all numbers, or `most` evenly spaced ones."""
    if len(numbers) <= most:
        return numbers
    return numbers[np.linspace(0, len(numbers) - 1, most).astype(np.int64)]


def _written_blocks(path: str | os.PathLike[str]) -> I64:
    """Return the numbers of the blocks ever written, in ascending order; holes in the file are skipped."""
    found = [np.empty(0, np.int64)]
    with open(Path(path, "blocks.npy"), "rb", buffering=0) as file:
        for first, count in _data_ranges(file.fileno()):
            for start in range(first, first + count, _EPOCHS_PER_READ):
                file.seek(_BLOCKS_OFFSET_BYTES + 4 * start)
                epochs = np.frombuffer(file.read(4 * min(_EPOCHS_PER_READ, first + count - start)), "<u4")
                found.append(start + np.flatnonzero(epochs))
    return np.concatenate(found)


def _data_ranges(descriptor: int) -> Iterator[tuple[int, int]]:
    """Yield (first epoch, number of epochs) for the parts of blocks.npy that are not holes."""
    end, position = os.fstat(descriptor).st_size, _BLOCKS_OFFSET_BYTES
    while position < end:
        try:
            begin = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError:  # ENXIO: the rest of the file is a hole
            return
        position = os.lseek(descriptor, begin, os.SEEK_HOLE)
        first = (begin - _BLOCKS_OFFSET_BYTES) // 4
        yield first, (position - _BLOCKS_OFFSET_BYTES) // 4 - first


def _keys_of_rows(rows: I64, num_embeddings: int, seed: int) -> U64:
    """Return a key for each row: the inverse of ``row = mulhi64(fmix64(key ^ salt), num_embeddings)``."""
    mixed = np.array([-(-(row << 64) // num_embeddings) for row in rows.tolist()], np.uint64)
    for inverse in _FMIX_INVERSES:
        mixed ^= mixed >> np.uint64(33)
        mixed *= np.uint64(inverse)
    mixed ^= mixed >> np.uint64(33)
    return mixed ^ np.uint64(next(splitmix(seed)))


def _as_float32(stored: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    if stored.dtype == np.uint16:  # bfloat16
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32)
