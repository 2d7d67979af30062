"""Convert any table in memory to named Arrow columns, so that the same values have the same keys in every library.

Each column is converted on its own, because a column of mixed objects has no Arrow type. Neither narwhals nor the Arrow
PyCapsule interface allows this: the first refuses two columns of one name with its own error and knows no pandas Index,
and the second converts a whole frame, so that one such column would make all of them unreadable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hashemb._packages import is_a, require

__all__ = ["ALLOWED", "Columns", "read_columns"]

ALLOWED = "each value's type: argument must be a string or a number"


class Columns(NamedTuple):
    """The columns of a table.

    Attributes
    ----------
    names : list of str
        Names of the columns; "x0", "x1", … if the table has no names.
    arrays : list
        Columns of equal length: each a pyarrow.Array, or a list of objects if Arrow has no type for the mixture.
    named : bool
        Whether the table has names of its own.
    """

    names: list[str]
    arrays: list[Any]
    named: bool

    @property
    def num_rows(self) -> int:
        """Number of rows in the table."""
        return len(self.arrays[0]) if self.arrays else 0


def read_columns(table: Any) -> Columns:
    """Split a table into Arrow columns.

    Parameters
    ----------
    table : ndarray, list of rows, mapping of str to column, pandas or polars DataFrame, Arrow table or record batch
        Arrays, lists, and DataFrames without any string among their column names count as unnamed. Columns that the
        conversion to Arrow does not change are not copied.

    Returns
    -------
    Columns

    Raises
    ------
    TypeError
        Only some of the names are strings, or a column holds values other than strings, numbers, booleans, dates,
        times and missing values.
    ValueError
        The table is not two-dimensional or has no columns, complex numbers, duplicate names, or columns of different
        lengths.

    Examples
    --------
    >>> read_columns(np.array([[1.5, 2.5, 3.5]])).names
    ['x0', 'x1', 'x2']
    >>> read_columns({"ad": ["x", None], "when": np.array(["2024-05-01", "NaT"], "M8[D]")}).arrays[1].type
    DataType(int64)
    """
    names, raw = _take_apart(table)
    named = bool(names) and any(isinstance(name, str) for name in names)
    if named:
        _check_names(names)
    else:
        names = [f"x{index}" for index in range(len(raw))]
    columns = Columns(names, [_to_arrow(name, column) for name, column in zip(names, raw, strict=True)], named)
    if not raw:
        rows = len(table) if hasattr(table, "__len__") and not isinstance(table, Mapping) else 0
        raise ValueError(f"Found array with 0 feature(s) (shape=({rows}, 0)) while a minimum of 1 is required.")
    for name, array in zip(columns.names, columns.arrays, strict=True):
        if len(array) != columns.num_rows:
            raise ValueError(f"column {name!r} has {len(array)} values but {columns.names[0]!r} has {columns.num_rows}")
    return columns


# ---- tables of other libraries ----


def _take_apart(table: Any) -> tuple[list[Any], list[Any]]:
    """Return the names (empty for an array) and the columns as objects of the table's library."""
    if isinstance(table, Mapping):
        return list(table), list(table.values())
    if is_a(table, "pandas", "DataFrame"):
        return list(table.columns), [column for _, column in table.items()]
    if is_a(table, "polars", "DataFrame"):
        return list(table.columns), table.get_columns()
    if is_a(table, "pyarrow", "Table", "RecordBatch"):
        return list(table.schema.names), list(table.columns)
    matrix = np.asarray(table)
    if isinstance(table, (list, tuple)) and matrix.dtype.kind in "US":
        matrix = np.array(table, dtype=object)  # NumPy would turn the numbers among strings into strings
    if matrix.ndim != 2:
        raise ValueError(
            f"Expected 2D array, got {matrix.ndim}D array instead, of shape {matrix.shape}. Reshape your data either "
            "using array.reshape(-1, 1) if it has a single feature or array.reshape(1, -1) if it is a single sample."
        )
    if matrix.dtype.kind == "c":
        raise ValueError(f"Complex data not supported: got {matrix.dtype} values")
    return [], list(matrix.T)


def _check_names(names: Sequence[Any]) -> None:
    seen = set()
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                "Feature names are only supported if all input features have string names, but one of them is "
                f"{name!r}, of type {type(name).__name__}: convert them with X.columns = X.columns.astype(str)"
            )
        if name in seen:
            raise ValueError(f"two columns are named {name!r}: their keys could not be told apart")
        seen.add(name)


# ---- columns to Arrow ----


def _to_arrow(name: str, column: Any) -> Any:
    """Convert a column to an Arrow array of a plain or dictionary type, or a list if Arrow has no type for it."""
    pa = require("pyarrow")
    array = _arrow_array(pa, name, column)
    if isinstance(array, list):
        return array
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    types, type_ = pa.types, array.type
    if types.is_dictionary(type_) and not _is_plain(types, type_.value_type):
        array = array.dictionary_decode()
        type_ = array.type
    if types.is_dictionary(type_) or _is_plain(types, type_):
        return array
    if types.is_temporal(type_):
        return _microseconds(pa, array)
    if types.is_floating(type_) or types.is_decimal(type_):
        return array.cast(pa.float64())
    raise TypeError(f"column {name!r} holds {type_} values; {ALLOWED}")


def _is_plain(types: Any, type_: Any) -> bool:
    """Return whether `hash_keys` accepts values of this type."""
    tests = (types.is_integer, types.is_boolean, types.is_string, types.is_large_string, types.is_binary,
             types.is_large_binary, types.is_null)  # fmt: skip
    return any(test(type_) for test in tests)


def _arrow_array(pa: Any, name: str, column: Any) -> Any:
    if isinstance(column, (pa.Array, pa.ChunkedArray)):
        return column
    if is_a(column, "polars", "Series"):
        return column.to_list() if str(column.dtype) == "Object" else column.to_arrow()
    if isinstance(column, np.ndarray) or not is_a(column, "pandas", "Series", "Index", "ExtensionArray"):
        column = _native(name, column)
    try:
        return pa.array(column, from_pandas=True)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return list(column)  # no single Arrow type: strings mixed with numbers, integers of 65 bits, objects


def _native(name: str, column: Any) -> Any:
    """Convert an array, a list or a tuple to a dtype that Arrow supports."""
    if isinstance(column, (list, tuple)):
        return column
    array = np.asanyarray(column)
    if array.ndim != 1:
        raise ValueError(f"column {name!r} must have one dimension, got the shape {array.shape}")
    kind = array.dtype.kind
    if kind == "c":
        raise ValueError(f"Complex data not supported: column {name!r} holds {array.dtype} values")
    if kind in "Mm" and np.datetime_data(array.dtype)[0] not in ("s", "ms", "us", "ns"):
        return array.astype(f"{kind}8[us]")
    if kind == "f" and array.dtype.itemsize not in (4, 8):
        return array.astype(np.float64)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _microseconds(pa: Any, array: Any) -> Any:
    """Convert dates (since 1970, UTC), times (since midnight) and durations to int64 microseconds."""
    types, type_ = pa.types, array.type
    if types.is_timestamp(type_) or types.is_date(type_):
        target = pa.timestamp("us", getattr(type_, "tz", None))
    else:
        target = pa.time64("us") if types.is_time(type_) else pa.duration("us")
    return array.cast(target, safe=False).cast(pa.int64())
