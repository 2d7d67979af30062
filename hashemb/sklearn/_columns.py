"""Convert any table in memory to named Arrow columns, infer a kind for each column, and encode keys and values.

All columns are converted to Arrow, so the same values have the same keys in every library. They are encoded by
`fields.encode`, so categories have the same keys as when the readers read them from a file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

import hashemb
from hashemb._packages import require
from hashemb.ctr.data import Kind, encode
from hashemb.sklearn._splines import between_knots

__all__ = ["ColumnKind", "Columns", "check_kinds", "encode_columns", "infer_kinds", "num_keys", "read_columns"]

ColumnKind = Literal[Kind, "number", "mixed"]

_ALLOWED = "each value's type: argument must be a string or a number"


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


def infer_kinds(
    columns: Columns,
    *,
    categorical: Collection[str | int] | None = None,
    numeric: Collection[str | int] | None = None,
) -> dict[str, ColumnKind]:
    """Infer from its type how each column is encoded, unless the column is listed.

    Parameters
    ----------
    columns : Columns
        The columns of a table.
    categorical : names or positions of columns, optional
        Columns of floats that hold ids, such as integers that were converted to floats because some are missing.
    numeric : names or positions of columns, optional
        Columns of integers or booleans that measure something; floats are numeric by default.

    Returns
    -------
    dict of str to {"string", "integer", "number", "mixed"}
        "string" and "integer" are kinds of `fields.encode`; a "number" is interpolated between knots (`_splines`); a
        "mixed" column contains both strings and integers, each hashed as its own type.

    Raises
    ------
    ValueError
        A listed column is unknown, or a column is in both lists.
    TypeError
        A column in `numeric` holds strings.

    Examples
    --------
    >>> infer_kinds(read_columns({"user": [7, 8], "price": [0.5, 2.0], "age": [33, 34]}), numeric=["age"])
    {'user': 'integer', 'price': 'number', 'age': 'number'}
    """
    ids, numbers = (_listed(columns, name, value) for name, value in
                    (("categorical_features", categorical), ("numeric_features", numeric)))  # fmt: skip
    both = sorted(ids & numbers)
    if both:
        raise ValueError(f"column {both[0]!r} is in categorical_features and in numeric_features: one of them is wrong")
    return {
        name: _kind(name, array, is_id=name in ids, is_number=name in numbers)
        for name, array in zip(columns.names, columns.arrays, strict=True)
    }


def encode_columns(
    columns: Columns, kinds: Mapping[str, ColumnKind]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.float32] | None]:
    """Compute the keys of a table, and their values if it holds numbers.

    Parameters
    ----------
    columns : Columns
        One column for each kind, in the same order; the names are taken from `kinds`.
    kinds : mapping of str to kind
        The result of `infer_kinds` for the table that a model was fitted on; or a schema of `hashemb train`, in which
        bucketized numbers have the kinds "count" and "float".

    Returns
    -------
    keys : ndarray of uint64, shape (num_rows, width)
        Keys; `width` is the result of `num_keys`. First come the keys of the columns without numbers, one each, then
        those of the columns with numbers, two each.
    values : ndarray of float32, shape of keys, or None
        Values of the keys; None if all are 1.

    Raises
    ------
    TypeError
        A column holds another kind of values than before, such as text instead of numbers.
    ValueError
        A number in a column of ids is not an integer.

    Examples
    --------
    >>> import hashemb
    >>> keys, values = encode_columns(read_columns({"user": [7, None], "price": [3.0, 8.0]}),
    ...                               {"user": "integer", "price": "number"})
    >>> bool(keys[0, 0] == hashemb.hash_keys(7, field="user")), values.tolist()
    (True, [[1.0, 0.5, 0.5], [1.0, 1.0, 0.0]])
    """
    arrays = {
        name: _FITTING[kind](name, array) for (name, kind), array in zip(kinds.items(), columns.arrays, strict=True)
    }
    schema: dict[str, Kind] = {}
    for name, kind in kinds.items():
        if kind != "number":
            schema[name] = "string" if kind == "mixed" else kind
    numbers = [_between_knots(name, arrays[name]) for name, kind in kinds.items() if kind == "number"]
    keys = [pair for pair, _ in numbers]
    if schema:
        keys.insert(0, _encode(arrays, schema))
    if not numbers:
        return keys[0], None
    ones = np.ones((columns.num_rows, len(schema)), np.float32)
    return np.concatenate(keys, axis=1), np.concatenate([ones, *(shares for _, shares in numbers)], axis=1)


def num_keys(kinds: Mapping[str, ColumnKind]) -> int:
    """Return the number of keys of an example."""
    return sum(2 if kind == "number" else 1 for kind in kinds.values())


def _encode(arrays: dict[str, Any], schema: dict[str, Kind]) -> npt.NDArray[np.uint64]:
    try:
        return encode(arrays, schema)
    except TypeError as error:
        raise TypeError(f"{error}; {_ALLOWED}") from error


def _between_knots(name: str, array: Any) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.float32]]:
    numbers = array.cast(require("pyarrow").float64()).to_numpy(zero_copy_only=False)  # null becomes NaN
    knots, shares = between_knots(numbers)
    missing = np.repeat(np.isnan(numbers)[:, None], 2, axis=1)
    return hashemb.hash_keys(np.ma.MaskedArray(knots, missing), field=name), shares


def check_kinds(kinds: Any) -> dict[str, ColumnKind]:
    """Check and copy a result of `infer_kinds` that was read from JSON; raise a ValueError if it is invalid."""
    known = (*get_args(Kind), "number", "mixed")
    if not isinstance(kinds, dict) or not kinds or not all(kind in known for kind in kinds.values()):
        raise ValueError(f"not a kind for each column, of {', '.join(known)}: {kinds!r}")
    return dict(kinds)


# ---- tables of other libraries ----


def _take_apart(table: Any) -> tuple[list[Any], list[Any]]:
    """Return the names (empty for an array) and the columns as objects of the table's library."""
    if isinstance(table, Mapping):
        return list(table), list(table.values())
    if _is_a(table, "pandas", "DataFrame"):
        return list(table.columns), [column for _, column in table.items()]
    if _is_a(table, "polars", "DataFrame"):
        return list(table.columns), table.get_columns()
    if _is_a(table, "pyarrow", "Table", "RecordBatch"):
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


def _is_a(value: Any, package: str, *names: str) -> bool:
    """Return whether a class of `value` has one of these names in the package, which need not be imported."""
    return any(c.__name__ in names and c.__module__.partition(".")[0] == package for c in type(value).__mro__)


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
    raise TypeError(f"column {name!r} holds {type_} values; {_ALLOWED}")


def _is_plain(types: Any, type_: Any) -> bool:
    """Return whether `hash_keys` accepts values of this type."""
    tests = (types.is_integer, types.is_boolean, types.is_string, types.is_large_string, types.is_binary,
             types.is_large_binary, types.is_null)  # fmt: skip
    return any(test(type_) for test in tests)


def _arrow_array(pa: Any, name: str, column: Any) -> Any:
    if isinstance(column, (pa.Array, pa.ChunkedArray)):
        return column
    if _is_a(column, "polars", "Series"):
        return column.to_list() if str(column.dtype) == "Object" else column.to_arrow()
    if isinstance(column, np.ndarray) or not _is_a(column, "pandas", "Series", "Index", "ExtensionArray"):
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


# ---- kinds ----


def _listed(columns: Columns, parameter: str, value: Collection[str | int] | None) -> set[str]:
    """Return the names of the listed columns."""
    if value is None:
        return set()
    if isinstance(value, (str, bytes)):
        raise TypeError(f"{parameter} must be a list of columns, got {value!r}")
    found = set()
    for column in value:
        if isinstance(column, str):
            name = column
        elif isinstance(column, (int, np.integer)) and not isinstance(column, (bool, np.bool_)):
            name = columns.names[column] if -len(columns.names) <= column < len(columns.names) else ""
        else:
            raise TypeError(f"{parameter} must list names or positions of columns, got {column!r}")
        if name not in columns.names:
            raise ValueError(f"{parameter}: no column {column!r} among the {len(columns.names)} of X")
        found.add(name)
    return found


def _kind(name: str, array: Any, *, is_id: bool, is_number: bool) -> ColumnKind:
    base = _base_kind(array)
    if is_number and base in ("string", "mixed"):
        raise TypeError(f"column {name!r} is in numeric_features and holds {_described(array)}: convert it first")
    if is_number or (base == "number" and not is_id):
        return "number"
    return "integer" if is_id and base == "number" else base


def _base_kind(array: Any) -> ColumnKind:
    if isinstance(array, list):
        return "mixed"
    types = require("pyarrow").types
    type_ = array.type.value_type if types.is_dictionary(array.type) else array.type
    if types.is_null(type_):
        return "mixed"
    if types.is_floating(type_):
        return "number"
    return "integer" if types.is_integer(type_) or types.is_boolean(type_) else "string"


def _described(array: Any) -> str:
    return "objects of several types" if isinstance(array, list) else f"{array.type} values"


def _must_be(kinds: tuple[str, ...], what: str) -> Callable[[str, Any], Any]:
    def check(name: str, array: Any) -> Any:
        if isinstance(array, list) or (_base_kind(array) not in kinds and str(array.type) != "null"):
            raise TypeError(f"column {name!r} held {what} when the model was fitted, now it holds {_described(array)}")
        return array

    return check


_strings = _must_be(("string",), "strings")
_integers = _must_be(("integer", "number"), "integers")
_numbers = _must_be(("integer", "number"), "numbers")


def _as_it_is(name: str, array: Any) -> Any:
    if not isinstance(array, list) and _base_kind(array) == "number":
        raise TypeError(f"column {name!r} held integers, strings or nothing when the model was fitted, now floats")
    return array


def _whole_numbers(name: str, array: Any) -> Any:
    """Convert ids to integers, including those stored as floats because some are missing."""
    array = _integers(name, array)
    if _base_kind(array) != "number":
        return array
    values = array.to_numpy(zero_copy_only=False)
    missing = np.isnan(values)
    whole = np.where(missing, 0.0, values)
    wrong = np.flatnonzero((whole != np.floor(whole)) | (np.abs(whole) > 2.0**53))
    if wrong.size:
        raise ValueError(
            f"column {name!r} holds ids, and {values[wrong[0]]!r} in row {wrong[0]} is no whole number below 2**53: "
            "leave the column out of categorical_features, or cast it to strings"
        )
    return require("pyarrow").array(whole.astype(np.int64), mask=missing)


def _decoded(name: str, array: Any) -> Any:
    """Decode dictionary-encoded numbers, as the bucketize functions require."""
    pa = require("pyarrow")
    array = _numbers(name, array)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array.cast(pa.int8()) if pa.types.is_boolean(array.type) else array


def _counts(name: str, array: Any) -> Any:
    return _whole_numbers(name, _decoded(name, array))


_FITTING: dict[ColumnKind, Callable[[str, Any], Any]] = {
    "string": _strings,
    "integer": _whole_numbers,
    "count": _counts,
    "float": _decoded,
    "number": _decoded,
    "mixed": _as_it_is,
}
