"""The columns that a fitted estimator expects, and the conversion of its input to batches of keys.

The first data determine the layout, which is saved with the model: later data must have the same columns, and the same
values get the same keys.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from hashemb.sklearn._columns import ColumnKind, Columns, encode_columns, infer_kinds, num_keys, read_columns

__all__ = ["Examples", "Layout"]

_SHOWN_NAMES = 5


class Examples:
    """Encoded examples, with the same number of keys each, or as a sparse matrix, whose rows differ in length.

    Parameters
    ----------
    keys : ndarray of uint64, shape (n, num_keys), or scipy.sparse CSR matrix
        Keys of the examples. In a sparse matrix the column indices are the keys and the data are the values.
    values : ndarray of float32, shape of keys, optional
        Values of the keys. Default: all 1.
    """

    def __init__(self, keys: Any, values: npt.NDArray[np.float32] | None = None) -> None:
        self._keys = keys
        self._values = values

    def __len__(self) -> int:
        return int(self._keys.shape[0])

    def take(self, rows: npt.NDArray[np.int64]) -> Examples:
        """Return a copy of these rows."""
        return Examples(self._keys[rows], None if self._values is None else self._values[rows])

    def batch(self, rows: slice | npt.NDArray[np.int64]) -> dict[str, Any]:
        """Return the rows as arguments of a model's `learn` and `predict_logits`."""
        part = self._keys[rows]
        if not sparse.issparse(part):
            return {"keys": part} if self._values is None else {"keys": part, "values": self._values[rows]}
        return {
            "keys": part.indices.astype(np.uint64),
            "offsets": part.indptr.astype(np.int64),
            "values": part.data,
        }


@dataclass(frozen=True)
class Layout:
    """The columns of an input.

    Attributes
    ----------
    num_columns : int
        Number of columns.
    kinds : dict of str to kind, or None
        The result of `infer_kinds` for the first data; None for sparse matrices, where a column's index is its key.
    named : bool
        Whether the names in `kinds` are the table's own.
    """

    num_columns: int
    kinds: dict[str, ColumnKind] | None = None
    named: bool = False

    @property
    def num_keys(self) -> int | None:
        """Number of keys per example; None if it varies."""
        return None if self.kinds is None else num_keys(self.kinds)

    @classmethod
    def of(
        cls, table: Any, *, categorical: Collection[Any] | None = None, numeric: Collection[Any] | None = None
    ) -> tuple[Layout, Examples]:
        """Return the layout of the first data, and its examples; arguments and errors as for `infer_kinds`."""
        if sparse.issparse(table):
            if categorical is not None or numeric is not None:
                raise ValueError("categorical_features and numeric_features are for tables, X is a sparse matrix")
            layout = cls(int(table.shape[1]))
            return layout, layout._sparse(table)
        columns = read_columns(table)
        kinds = infer_kinds(columns, categorical=categorical, numeric=numeric)
        return cls(len(kinds), kinds, columns.named), Examples(*encode_columns(columns, kinds))

    def read(self, table: Any, owner: str) -> Examples:
        """Encode later data. `owner` is the estimator's name, for messages.

        Raises
        ------
        ValueError
            The number, the names or the order of the columns differ.
        TypeError
            A column holds another kind of values.
        """
        if self.kinds is None:
            matrix = table if sparse.issparse(table) else sparse.csr_array(np.asarray(table, np.float64))
            self._check_count(matrix.shape[1], owner)
            return self._sparse(matrix)
        if sparse.issparse(table):
            raise ValueError(f"X is a sparse matrix, but {owner} was fitted on a table of {self.num_columns} columns")
        columns = read_columns(table)
        self._check_names(columns, owner)
        self._check_count(len(columns.arrays), owner)
        return Examples(*encode_columns(columns, self.kinds))

    def _sparse(self, matrix: Any) -> Examples:
        if matrix.dtype.kind == "c":
            raise ValueError(f"Complex data not supported: got {matrix.dtype} values")
        if matrix.shape[1] == 0:
            raise ValueError(
                f"Found array with 0 feature(s) (shape={tuple(matrix.shape)}) while a minimum of 1 is required."
            )
        with np.errstate(over="ignore"):  # infinite results are rejected below
            rows = matrix.tocsr().astype(np.float32)
        if not rows.has_canonical_format:
            rows = rows.copy()
            rows.sum_duplicates()
        finite = np.isfinite(rows.data)
        if not finite.all():
            first = int(np.argmin(finite))
            row = int(np.searchsorted(rows.indptr, first, side="right")) - 1
            raise ValueError(f"X holds {rows.data[first]} in row {row}, column {rows.indices[first]}: must be finite")
        return Examples(rows)

    def _check_count(self, count: int, owner: str) -> None:
        if count != self.num_columns:
            raise ValueError(f"X has {count} features, but {owner} is expecting {self.num_columns} features as input")

    def _check_names(self, columns: Columns, owner: str) -> None:
        """Check, like scikit-learn, for the same names in the same order; warn if only one side has names."""
        if columns.named and not self.named:
            warnings.warn(f"X has feature names, but {owner} was fitted without feature names", stacklevel=5)
        elif self.named and not columns.named:
            warnings.warn(
                f"X does not have valid feature names, but {owner} was fitted with feature names", stacklevel=5
            )
        elif self.named and columns.names != list(self.kinds or {}):
            raise ValueError(_difference(columns.names, list(self.kinds or {})))


def _difference(found: list[str], fitted: list[str]) -> str:
    message = "The feature names should match those that were passed during fit.\n"
    unseen, missing = sorted(set(found) - set(fitted)), sorted(set(fitted) - set(found))
    if unseen:
        message += "Feature names unseen at fit time:\n" + _listing(unseen)
    if missing:
        message += "Feature names seen at fit time, yet now missing:\n" + _listing(missing)
    if not unseen and not missing:
        message += "Feature names must be in the same order as they were in fit.\n"
    return message


def _listing(names: list[str]) -> str:
    lines = [f"- {name}\n" for name in names[:_SHOWN_NAMES]]
    return "".join(lines) + ("- ...\n" if len(names) > _SHOWN_NAMES else "")
