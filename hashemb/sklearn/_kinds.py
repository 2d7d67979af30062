"""Infer how each column of a table is encoded, and encode keys and values.

Categories are encoded by `fields.encode`, so they have the same keys as when the readers read them from a file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

import hashemb
from hashemb._packages import require
from hashemb.ctr.data import Kind, encode
from hashemb.sklearn._columns import ALLOWED, Columns
from hashemb.sklearn._splines import between_knots

__all__ = ["ColumnKind", "check_kinds", "encode_columns", "infer_kinds", "num_keys"]

ColumnKind = Literal[Kind, "number", "mixed"]


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
    >>> from hashemb.sklearn._columns import read_columns
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
    >>> from hashemb.sklearn._columns import read_columns
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
        raise TypeError(f"{error}; {ALLOWED}") from error


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
