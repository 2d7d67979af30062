"""The columns that a fitted estimator expects, and the conversion of its input to batches of keys.

The first data determine the layout, which is saved with the model: later data must have the same columns, and the same
values get the same keys.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from hashemb._packages import require
from hashemb.sklearn._columns import read_columns
from hashemb.sklearn._kinds import ColumnKind, encode_columns, infer_kinds, num_keys

__all__ = ["Examples", "Layout"]


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

    def read(self, table: Any, estimator: Any) -> Examples:
        """Encode later data, for an estimator that was fitted on this layout.

        Raises
        ------
        ValueError
            The number, the names or the order of the columns differ.
        TypeError
            A column holds another kind of values.
        """
        if self.kinds is None:
            matrix = table if sparse.issparse(table) else sparse.csr_array(np.asarray(table, np.float64))
            _check_columns(matrix, estimator)
            return self._sparse(matrix)
        if sparse.issparse(table):
            name = type(estimator).__name__
            raise ValueError(f"X is a sparse matrix, but {name} was fitted on a table of {self.num_columns} columns")
        columns = read_columns(table)
        pa = require("pyarrow")
        names = pa.table({name: pa.nulls(0) for name in columns.names})
        _check_columns(names if columns.named else np.empty((0, len(columns.arrays))), estimator)
        return Examples(*encode_columns(columns, self.kinds))

    def _sparse(self, matrix: Any) -> Examples:
        with np.errstate(over="ignore"):  # infinite results are rejected below, with their place
            rows = require("sklearn.utils").check_array(
                matrix, accept_sparse="csr", dtype=np.float32, ensure_all_finite=False, ensure_min_samples=0
            )
        if not rows.has_canonical_format:
            rows = rows.copy()
            rows.sum_duplicates()
        finite = np.isfinite(rows.data)
        if not finite.all():
            first = int(np.argmin(finite))
            row = int(np.searchsorted(rows.indptr, first, side="right")) - 1
            raise ValueError(f"X holds {rows.data[first]} in row {row}, column {rows.indices[first]}: must be finite")
        return Examples(rows)


def _check_columns(table: Any, estimator: Any) -> None:
    """Check the number and the names of the columns by scikit-learn's rules; `table` may have no rows."""
    require("sklearn.utils.validation").validate_data(estimator, table, reset=False, skip_check_array=True)
