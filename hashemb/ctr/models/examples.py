"""Check a batch of examples and convert it, in either form, to the arrays that the models' kernels require.

The matrix form has one key per field and example; the ragged form, with `offsets`, has any number of keys, each with
its field. All checks are done before anything is looked up or learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hashemb.ctr import _checks
from hashemb.ctr._types import Array, Float32Array

__all__ = ["Examples", "check_examples", "check_labels", "check_weights"]


@dataclass(frozen=True)
class Examples:
    """A checked batch.

    Attributes
    ----------
    keys : integer array, (n, num_fields) or (num_keys,)
        Keys of the examples.
    count : int
        Number of examples, n.
    num_fields : int
        Number of keys per example in the matrix form, else 0.
    offsets : ndarray of int64, (n + 1,), or None
        Offsets of the ragged form.
    values, fields : ndarray of float32, int32, (num_keys,), or None
        Value and field of each key.
    """

    keys: Array
    count: int
    num_fields: int
    offsets: npt.NDArray[np.int64] | None = None
    values: Float32Array | None = None
    fields: npt.NDArray[np.int32] | None = None

    def keys_before(self, end: int) -> int:
        """Return the number of keys of the first `end` examples."""
        return end * self.num_fields if self.offsets is None else int(self.offsets[end] - self.offsets[0])

    def part(self, start: int, stop: int) -> Examples:
        """Return examples [start, stop), as views; their offsets are not shifted to 0."""
        if start == 0 and stop == self.count:
            return self
        keys = slice(self.keys_before(start), self.keys_before(stop))
        return Examples(
            keys=self.keys[start:stop] if self.offsets is None else self.keys[keys],
            count=stop - start,
            num_fields=self.num_fields,
            offsets=None if self.offsets is None else self.offsets[start : stop + 1],
            values=None if self.values is None else self.values[keys],
            fields=None if self.fields is None else self.fields[keys],
        )


def check_examples(
    keys: Array, offsets: Any = None, values: Any = None, fields: Any = None, *, num_fields: int | None = None
) -> Examples:
    """Check a batch.

    Parameters
    ----------
    keys, offsets, values, fields
        As for the models' methods.
    num_fields : int, optional
        Number of fields, for a model that distinguishes fields: the matrix form must have as many columns, and the
        ragged form must have `fields` below this number.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong dtype, shape or range.
    """
    keys = np.asarray(keys)
    if keys.dtype.kind not in "iu" and not (keys.size == 0 and keys.ndim == 1):
        raise TypeError(f"keys must be integers, got {keys.dtype}: hash values with hashemb.hash_fields first")
    values = None if values is None else _check_values(values, keys.shape)
    if offsets is None:
        _check_matrix(keys, fields, num_fields)
        return Examples(keys, keys.shape[0], keys.shape[1], values=values)
    if keys.ndim != 1:
        raise ValueError(f"keys must have shape (num_keys,) with offsets, got {keys.ndim} dimensions: {keys.shape}")
    offsets = _checks.check_offsets(offsets, keys.size)
    fields = _check_fields(fields, keys.size, num_fields)
    return Examples(keys, len(offsets) - 1, 0, offsets, values, fields)


def check_labels(labels: npt.ArrayLike, n: int) -> Float32Array:
    """Check for labels in [0, 1], one for each of `n` examples."""
    y = np.ascontiguousarray(labels, np.float32)
    if y.shape != (n,):
        raise ValueError(f"labels must have shape ({n},), one per example (row of keys), got {y.shape}")
    _checks.check_all("labels must be in [0, 1]", y, (y >= 0.0) & (y <= 1.0))  # False for NaN
    return y


def check_weights(weights: npt.ArrayLike | None, n: int) -> Float32Array | None:
    """Check for finite weights >= 0, one for each of `n` examples."""
    if weights is None:
        return None
    return _checks.check_weights(np.ascontiguousarray(weights, np.float32), n, each="example")


def _check_matrix(keys: Array, fields: Any, num_fields: int | None) -> None:
    if keys.ndim != 2:
        raise ValueError(
            f"keys must have shape (n, num_fields), or come with offsets, got {keys.ndim} dimensions: {keys.shape}"
        )
    if fields is not None:
        raise ValueError("fields come with offsets; without them the field of a key is its column")
    if num_fields is not None and keys.shape[1] != num_fields:
        raise ValueError(f"the model has {num_fields} fields, keys have {keys.shape[1]} columns")


def _check_values(values: Any, shape: tuple[int, ...]) -> Float32Array:
    x = np.ascontiguousarray(values, np.float32)
    if x.shape != shape:
        raise ValueError(f"values must have the shape of keys, {shape}, got {x.shape}")
    x = x.reshape(-1)
    finite = np.isfinite(x)
    if not finite.all():
        first = int(np.argmin(finite))
        index = tuple(map(int, np.unravel_index(first, shape)))
        raise ValueError(f"values must be finite, got {x[first]} at index {index}")
    return x


def _check_fields(fields: Any, num_keys: int, num_fields: int | None) -> npt.NDArray[np.int32] | None:
    if fields is None:
        if num_fields is not None:
            raise ValueError("this model distinguishes fields: with offsets it needs fields, one number per key")
        return None
    found = np.asarray(fields)
    if found.shape != (num_keys,):
        raise ValueError(f"fields must have shape ({num_keys},), one per key, got {found.shape}")
    if num_fields is None:
        return None  # a factorisation machine does not distinguish fields
    if found.dtype.kind not in "iu" and num_keys:
        raise TypeError(f"fields must be integers, got {found.dtype}")
    inside = (found >= 0) & (found < num_fields)
    if not inside.all():
        first = int(np.argmin(inside))
        raise ValueError(f"fields must be in [0, {num_fields}), got {found[first]} at index {first}")
    return np.ascontiguousarray(found, np.int32)
