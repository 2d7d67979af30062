"""Batches of consecutive examples, as a matrix of keys or in ragged form, and how they are cut and joined."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hashemb.ctr._maths import DistinctKeys

__all__ = ["Batch", "number_keys", "rebatch"]


class Batch(NamedTuple):
    """Consecutive examples of the input, n of them.

    Attributes
    ----------
    labels : ndarray of float32, shape (n,), or None
        Labels 0 or 1; None if the source has no labels.
    keys : ndarray of uint64
        Keys of shape (n, num_fields), C-contiguous; column j is ``reader.field_names[j]`` and is salted by that name.
        If `offsets` is given, keys of shape (nnz,), for examples with any number of features.
    offsets : ndarray of int64, shape (n + 1,), or None
        Example i has the keys ``keys[offsets[i]:offsets[i + 1]]``.
    values : ndarray of float32, of the shape of `keys`, or None
        Values of the features; None: all are 1.
    fields : ndarray of int32, shape (nnz,), or None
        Field of each key, as an index into ``reader.field_names``. It is None in the matrix form, where the column is
        the field, and for libsvm, which has no fields.
    weights : ndarray of float32, shape (n,), or None
        Importance of the examples; None: all are 1.
    numbering : (ndarray of uint64, shape (m,), ndarray of int32, of as many elements as `keys`), or None
        The distinct keys, and the position of each key among them, if they were computed before the batch is learned.
    """

    labels: npt.NDArray[np.float32] | None
    keys: npt.NDArray[np.uint64]
    offsets: npt.NDArray[np.int64] | None = None
    values: npt.NDArray[np.float32] | None = None
    fields: npt.NDArray[np.int32] | None = None
    weights: npt.NDArray[np.float32] | None = None
    numbering: tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32]] | None = None

    @property
    def num_examples(self) -> int:
        """Number of examples in the batch."""
        return len(self.keys) if self.offsets is None else len(self.offsets) - 1

    @property
    def num_bytes(self) -> int:
        """Number of bytes of the arrays, without the `numbering`."""
        return sum(array.nbytes for array in self[:-1] if array is not None)

    def features(self) -> dict[str, Any]:
        """Return those of `offsets`, `values` and `fields` that are not None, as keyword arguments of a model."""
        given = {"offsets": self.offsets, "values": self.values, "fields": self.fields}
        return {name: array for name, array in given.items() if array is not None}

    def examples(self, first: int, last: int) -> Batch:
        """Return examples `first` up to `last`, as views where possible."""
        rows = flat = slice(first, last)
        offsets = self.offsets
        if offsets is not None:
            flat = slice(int(offsets[first]), int(offsets[last]))
            offsets = offsets[first : last + 1] - offsets[first]
        return Batch(
            _part(self.labels, rows),
            self.keys[flat],
            offsets,
            _part(self.values, flat),
            _part(self.fields, flat),
            _part(self.weights, rows),
        )


def number_keys(finder: DistinctKeys) -> Callable[[Batch], Batch]:
    """Return a function that adds the `numbering` to a batch; it must be the only user of `finder`."""

    def numbered(batch: Batch) -> Batch:
        keys = batch.keys.reshape(-1)
        distinct, index = np.empty(keys.size, np.uint64), np.empty(keys.size, np.int32)
        count = finder.find(keys, distinct, index)
        return batch._replace(numbering=(distinct[:count].copy(), index))

    return numbered


def _part(array: npt.NDArray[Any] | None, rows: slice) -> Any:
    return None if array is None else array[rows]


def rebatch(parts: Iterator[Batch], batch_size: int) -> Iterator[Batch]:
    """Cut the examples into batches of `batch_size`; the last may be shorter. Only batches across parts are copied."""
    waiting: list[Batch] = []
    missing = batch_size
    for part in parts:
        size, first = part.num_examples, 0
        while size - first >= missing:
            waiting.append(part.examples(first, first + missing))
            yield _join(waiting)
            first, missing, waiting = first + missing, batch_size, []
        if first < size:
            waiting.append(part.examples(first, size))
            missing -= size - first
    if waiting:
        yield _join(waiting)


def _join(batches: list[Batch]) -> Batch:
    """Join several batches of the same form."""
    if len(batches) == 1:
        return batches[0]
    labels, keys, _, values, fields, weights = (
        None if any(array is None for array in arrays) else np.concatenate(arrays)
        for arrays in zip(*(batch[:-1] for batch in batches), strict=True)  # a numbering can't be joined
    )
    assert keys is not None
    return Batch(labels, keys, _joined_offsets(batches), values, fields, weights)


def _joined_offsets(batches: list[Batch]) -> npt.NDArray[np.int64] | None:
    lengths = [np.diff(batch.offsets) for batch in batches if batch.offsets is not None]
    if not lengths:
        return None
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths))])
