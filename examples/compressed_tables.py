"""Compressed tables with far fewer rows than distinct values, built on an ordinary table.

A table by itself offers one hash, several hashes and 16-bit rows. This module adds two ways to use few rows well:

- `FrequentRows`: frequent values have rows of their own, and the others share the remaining rows;
- `QuotientRemainder`: each value has a pair of rows, which are multiplied, and few values have the same pair.

Both provide the three members of an `EmbeddingTable` that a model uses, `embedding_dim`, `lookup` and `update`, so a
model accepts one in place of its table. All learned state stays in the table, where every process that attaches to it
sees it. docs/benchmarks/memory.md compares the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import hashemb
from hashemb import reference
from hashemb.ctr.models import BIAS_FIELD

if TYPE_CHECKING:
    from hashemb import EmbeddingTable

__all__ = ["FrequentRows", "QuotientRemainder", "keys_for_rows", "most_frequent_keys"]

Float32Array = npt.NDArray[np.float32]
KeyArray = npt.NDArray[np.uint64]

_MAX_ROWS = 1 << 32  # keys of this many rows are found without Python integers
_SALT = np.uint64(0x9E3779B97F4A7C15)


def keys_for_rows(table: EmbeddingTable, rows: npt.ArrayLike) -> KeyArray:
    """Find a key for each row that the table maps to that row.

    Parameters
    ----------
    table : EmbeddingTable
        Table with at most 2**32 rows and one hash.
    rows : array_like of int, any shape
        Row numbers in [0, num_embeddings).

    Returns
    -------
    ndarray of uint64, shape of `rows`
        ``table.rows(keys_for_rows(table, rows))`` is `rows`.

    Raises
    ------
    ValueError
        The table has more rows or hashes, or a row is out of range.

    Examples
    --------
    >>> import tempfile
    >>> with hashemb.create(tempfile.mkdtemp() + "/t.emb", num_embeddings=1000, embedding_dim=1) as table:
    ...     table.rows(keys_for_rows(table, [0, 7, 999])).tolist()
    [0, 7, 999]
    """
    n = table.num_embeddings
    if n > _MAX_ROWS or table.num_hashes != 1:
        raise ValueError(
            f"keys can be found for the rows of a table of at most 2**32 rows and 1 hash, this has {n} and "
            f"{table.num_hashes}"
        )
    return hashemb.keys_of_rows(table, rows)


def most_frequent_keys(keys: npt.NDArray[Any], count: int) -> KeyArray:
    """Return the `count` most frequent keys, in descending order of frequency; ties are ordered by key.

    Parameters
    ----------
    keys : integer array, any shape
        A sample of the training data, such as the first part of a log.
    count : int
        Number of keys, at least 0. If there are fewer distinct keys, all of them are returned.

    Returns
    -------
    ndarray of uint64, shape (at most count,)
        The keys. It takes O(n log n) in the size of the sample.

    Examples
    --------
    >>> most_frequent_keys(np.array([[5, 8], [5, 9], [8, 5]]), 2).tolist()
    [5, 8]
    """
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")
    distinct, counts = np.unique(np.asarray(keys).astype(np.uint64, copy=False), return_counts=True)
    order = np.argsort(-counts, kind="stable")[:count]
    return distinct[order]


class FrequentRows:
    """A small table in which frequent keys have rows of their own and all other keys share the remaining rows.

    When many keys are hashed to few rows, most of them collide, and frequent keys are as likely to collide as rare
    ones. Here the first rows belong to the keys in `frequent`, one each; all other keys are hashed to the rows after
    them.

    Parameters
    ----------
    table : EmbeddingTable
        Table with one hash and more rows than there are frequent keys.
    frequent : integer array, shape (m,)
        Distinct keys that get rows of their own; `most_frequent_keys` finds them. A model's bias gets a row as well.
        The same keys must be passed whenever the table is opened again: keep them with the model.

    Attributes
    ----------
    table : EmbeddingTable
        The underlying table.
    embedding_dim : int
        Length of a vector.
    num_own_rows : int
        Number of rows that belong to one key each: rows 0 to ``num_own_rows - 1``.
    index_bytes : int
        Memory of the index of frequent keys, 4 bytes per key; it counts towards the size of the model.

    Raises
    ------
    ValueError
        The table has too few rows for the frequent keys, more than 2**32 rows or several hashes; or a key occurs twice.

    Notes
    -----
    The index holds 32 bits of each frequent key's hash. Any other key matches one of the m entries with probability
    m / 2**32; it then shares that row, like a collision in a hashed table.

    A look-up costs one binary search per key, O(log m), on top of the table's look-up. Concurrent look-ups are safe.

    References
    ----------
    Ginart et al.: Mixed Dimension Embeddings with Application to Memory-Efficient Recommendation Systems, ISIT 2021,
    for the observation that popular values deserve more of the memory. Zhang et al.: Model Size Reduction Using
    Frequency Based Double Hashing for Recommender Systems, RecSys 2020, for the idea of separate rows for frequent
    values and hashing for the others.

    Examples
    --------
    >>> import tempfile
    >>> keys = np.array([[1, 2], [1, 3], [1, 4]], np.uint64)
    >>> with hashemb.create(tempfile.mkdtemp() + "/t.emb", num_embeddings=4, embedding_dim=1) as table:
    ...     small = FrequentRows(table, most_frequent_keys(keys, 1))
    ...     (small.rows(keys) == small.rows(keys)[0, 0]).tolist(), small.num_own_rows
    ([[True, False], [True, False], [True, False]], 2)
    """

    def __init__(self, table: EmbeddingTable, frequent: npt.NDArray[Any]) -> None:
        self.table, self.embedding_dim = table, table.embedding_dim
        given = np.asarray(frequent).astype(np.uint64, copy=False).ravel()
        if np.unique(given).size != given.size:
            raise ValueError(f"frequent keys must be distinct, got {given.size} with {np.unique(given).size} distinct")
        bias = hashemb.hash_keys(["bias"], field=BIAS_FIELD)
        self._own = np.unique(_halves(np.concatenate([given, bias]))[0])
        if self._own.size >= table.num_embeddings:
            raise ValueError(
                f"{self._own.size} keys with rows of their own (the bias is one) leave no row for the others in a "
                f"table of {table.num_embeddings}"
            )
        keys_for_rows(table, [])  # raises if the table is unsuitable

    @property
    def num_own_rows(self) -> int:
        """Number of rows that belong to one key each."""
        return self._own.size

    @property
    def index_bytes(self) -> int:
        """Memory of the index of frequent keys, in bytes."""
        return self._own.nbytes

    def rows(self, keys: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Return the row of each key, int64, in the shape of `keys`."""
        high, low = _halves(keys)
        place = np.minimum(np.searchsorted(self._own, high), self._own.size - 1)
        shared = _scaled(low, self.table.num_embeddings - self._own.size)
        rows: npt.NDArray[np.int64] = np.where(self._own[place] == high, place, shared + self._own.size)
        return rows

    def lookup(self, keys: npt.NDArray[Any], *, out: Float32Array | None = None) -> Float32Array:
        """Return vectors, float32, shape ``keys.shape + (embedding_dim,)``; like `EmbeddingTable.lookup`."""
        return self.table.lookup(keys_for_rows(self.table, self.rows(keys)), out=out)

    def update(self, keys: npt.NDArray[Any], grads: npt.NDArray[Any]) -> None:
        """Take one optimiser step; `grads` has the shape of `lookup`'s result. Like `EmbeddingTable.update`."""
        self.table.update(keys_for_rows(self.table, self.rows(keys)), grads)


class QuotientRemainder:
    """A small table in which a key's vector is the product of two rows, ``r * (1 + q)``, element by element.

    The remainder and quotient by m identify a number, so m + D/m rows are enough to distinguish D numbers. Keys
    are not numbers in [0, D) but 64-bit hashes: one half of the mixed bits selects one of `num_remainders` rows and
    the other half one of the rest. Among D keys, a key shares its pair with another one with a probability of about
    D / (num_remainders * num_quotients); with one hash it would be D / (num_remainders + num_quotients).

    Parameters
    ----------
    table : EmbeddingTable
        Table with one hash and at least 2 rows.
    num_remainders : int, optional
        Number of rows for remainders, at least 1 and less than the table has; the other rows are for quotients.
        Default: half of the rows, which yields the most pairs.

    Attributes
    ----------
    table : EmbeddingTable
        The underlying table.
    embedding_dim : int
        Length of a vector.
    num_remainders, num_quotients : int
        Number of rows of each kind.

    Raises
    ------
    ValueError
        The table has more than 2**32 rows or several hashes, or `num_remainders` leaves no rows for quotients.

    Notes
    -----
    Shi et al. multiply r and q, both initialised uniformly at random in ±1/sqrt(rows). If rows are initialised near
    zero, as in a factorisation machine, the products would be small to second order, and so would be their gradients;
    a row q therefore holds the difference between its factor and one. The look-ups are twice those of the table, and an
    update takes an extra look-up.

    References
    ----------
    Shi, Mudigere, Naumov, Yang: Compositional Embeddings Using Complementary Partitions for Memory-Efficient
    Recommendation Systems, KDD 2020, section 3 (operation: element-wise multiplication).

    Examples
    --------
    >>> import tempfile
    >>> with hashemb.create(tempfile.mkdtemp() + "/t.emb", num_embeddings=20, embedding_dim=2) as table:
    ...     small = QuotientRemainder(table)
    ...     vectors = small.lookup(np.arange(60))
    ...     len(np.unique(vectors, axis=0)) > 20, small.num_quotients
    (True, 10)
    """

    def __init__(self, table: EmbeddingTable, *, num_remainders: int | None = None) -> None:
        self.table, self.embedding_dim = table, table.embedding_dim
        self.num_remainders = table.num_embeddings // 2 if num_remainders is None else num_remainders
        if not 1 <= self.num_remainders < table.num_embeddings:
            raise ValueError(
                f"num_remainders must be in [1, {table.num_embeddings}), the rows of the table, "
                f"got {self.num_remainders}"
            )
        self.num_quotients = table.num_embeddings - self.num_remainders
        keys_for_rows(table, [])  # raises if the table is unsuitable

    def rows(self, keys: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Return the two rows of each key, int64, shape ``(2,) + keys.shape``: remainder, quotient."""
        high, low = _halves(keys)
        quotients = _scaled(high, self.num_quotients) + self.num_remainders
        return np.stack([_scaled(low, self.num_remainders), quotients])

    def lookup(self, keys: npt.NDArray[Any], *, out: Float32Array | None = None) -> Float32Array:
        """Return vectors, float32, shape ``keys.shape + (embedding_dim,)``; like `EmbeddingTable.lookup`."""
        r, q = self.table.lookup(keys_for_rows(self.table, self.rows(keys)))
        q += np.float32(1.0)
        vectors: Float32Array = np.multiply(r, q, out=out)
        return vectors

    def update(self, keys: npt.NDArray[Any], grads: npt.NDArray[Any]) -> None:
        """Take one optimiser step on both rows of every key; `grads` has the shape of `lookup`'s result.

        The gradients are ``(1 + q) * grads`` for r and ``r * grads`` for q, at the values from before the step.
        """
        pair = keys_for_rows(self.table, self.rows(keys))
        r, q = self.table.lookup(pair)
        g = np.asarray(grads, np.float32)
        q += np.float32(1.0)
        self.table.update(pair, np.stack([q * g, r * g]))


def _halves(keys: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """Return the high and low 32 bits of the keys' hashes, which are independent of the rows a table would choose."""
    mixed = reference.fmix64(np.asarray(keys).astype(np.uint64, copy=False) ^ _SALT)
    return (mixed >> np.uint64(32)).astype(np.uint32), mixed.astype(np.uint32)


def _scaled(half: npt.NDArray[np.uint32], count: int) -> npt.NDArray[np.int64]:
    """Scale 32 bits to [0, count), as ``floor(half count / 2**32)``, for a count of at most 2**32."""
    return (half.astype(np.uint64) * np.uint64(count) >> np.uint64(32)).astype(np.int64)
