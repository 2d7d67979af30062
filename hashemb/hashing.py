"""Hashing of columns of values to uint64 keys.

Every accepted container is first turned into a `_Column`: its shape and a function that writes the keys of
its values. Types and lengths are thus checked before anything is hashed, and a field of a wide batch is
written straight into its place in the result. pandas, polars and pyarrow are never imported here: their objects
are recognised by class, and Arrow data is read through the Arrow C data interface.

The bytes that represent each value are fixed; see docs/explanation/hashing.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import mmh3
import numpy as np
from numpy.typing import NDArray

from hashemb import _hashing
from hashemb._packages import is_a
from hashemb._random import splitmix64, unfmix64

if TYPE_CHECKING:
    from hashemb.table import EmbeddingTable

__all__ = ["hash_fields", "hash_keys", "keys_of_rows"]

Keys = NDArray[np.uint64]
Result = TypeVar("Result")


class _Column(NamedTuple):
    """A container whose kind has been resolved: `write(seed, out)` fills `out`, which is 1-D and may be strided."""

    shape: tuple[int, ...]
    write: Callable[[int, Keys], None]


def hash_keys(values: Any, field: str | None = None) -> Keys:
    r"""Hash values to the 64-bit keys that `lookup` and `update` take.

    A key is the low 64 bits of MurmurHash3 x64-128 of the value's bytes: UTF-8 for a string, 8 bytes of
    little-endian two's complement for an integer or a boolean, the bytes themselves for bytes, and the
    reserved ``b"\x00null"`` for a missing value (None, NaN among objects, NaT, NA, Arrow and polars nulls).
    Therefore 5 and "5" have different keys, and a value has the same key on every machine and in every container.

    Parameters
    ----------
    values : scalar, list, tuple, numpy.ndarray, pandas, polars or Arrow column
        Integers of any width, booleans, strings, bytes, missing values, or objects that mix them, in any shape,
        memory order and byte order. In dictionary-encoded and categorical columns each distinct value is hashed once.
    field : str, optional
        Name of the feature. It salts the keys, so that equal values of different fields get different keys.

    Returns
    -------
    numpy.ndarray
        uint64, C-contiguous, with the shape of `values`; 0-d for a scalar. `values` is not modified.

    Raises
    ------
    TypeError
        The values are floats, dates, nested values or tables: bin them, or cast them to integers or strings first.
    OverflowError
        An integer is outside [-2**63, 2**64).
    ValueError
        A string cannot be encoded as UTF-8 because of a lone surrogate.

    Notes
    -----
    One pass reads the values' bytes and writes 8 bytes per value. The function is thread-safe. A key equals
    ``mmh3.hash64(value_bytes, seed, x64arch=True, signed=False)[0]`` with ``seed = mmh3.hash(field, 0,
    signed=False)``, or 0 without a field. MurmurHash3 is by Austin Appleby (public domain).

    NumPy drops trailing NULs of its `S` and `U` strings, so they do not affect the keys.

    Examples
    --------
    >>> import hashemb
    >>> hashemb.hash_keys(["Berlin", "Paris", None], field="city")
    array([ 4747406783840420977, 12080231636599394452, 11306016469232221311],
          dtype=uint64)
    >>> bool(hashemb.hash_keys(5) == hashemb.hash_keys("5"))
    False
    """
    column = _column(values)
    keys = np.empty(column.shape, np.uint64)
    column.write(_seed(field), keys.reshape(-1))
    return keys


def hash_fields(columns: Any) -> Keys:
    """Hash the columns of a table, each salted by its name, to one row of keys per example.

    Parameters
    ----------
    columns : mapping of str to column, pandas.DataFrame, polars.DataFrame, pyarrow.Table or RecordBatch
        Each column is 1-D and is accepted by `hash_keys`; all have the same length.

    Returns
    -------
    numpy.ndarray
        uint64, shape (num_examples, num_fields), C-contiguous; column j is
        ``hash_keys(columns[name_j], field=name_j)``.

    Raises
    ------
    ValueError
        There are no columns, columns differ in length or have more than one dimension, or a name occurs twice.
    TypeError
        `columns` is not a table, a name is not a string, or `hash_keys` does not accept the values; the message names
        the field.

    Notes
    -----
    There is one pass and no copy of a field's keys. The function is thread-safe.

    Examples
    --------
    >>> import hashemb
    >>> keys = hashemb.hash_fields({"user": [17, 4, 17], "city": ["Paris", "Rome", None]})
    >>> keys.shape
    (3, 2)
    >>> bool(keys[0, 0] == keys[2, 0])
    True
    """
    fields = _fields(columns)
    keys = np.empty((fields[0][1].shape[0], len(fields)), np.uint64)
    for index, (name, column) in enumerate(fields):
        _for_field(name, column.write, _seed(name), keys[:, index])
    return keys


def _seed(field: str | None) -> int:
    if field is None:
        return 0
    if not isinstance(field, str):
        raise TypeError(f"field must be a str or None, got {type(field).__name__} {field!r}")
    try:
        name = field.encode()  # given the str, mmh3 5.3.1 crashes on a lone surrogate
    except UnicodeEncodeError as error:
        raise ValueError(f"field {field!r} is not valid Unicode: {error}") from error
    return int(mmh3.hash(name, 0, signed=False))


def _unhashable(what: str) -> str:
    return (
        f"cannot hash {what}: values are integers, strings, bytes or missing; bin floats (numpy.digitize) or"
        " cast other types to integers or strings"
    )


def _column(values: Any) -> _Column:
    if isinstance(values, np.ndarray):
        return _array(values)
    if isinstance(values, (list, tuple, range)):
        return _sequence(values)
    if isinstance(values, (str, bytes, np.generic)):
        return _objects((values,), ())
    if isinstance(values, Mapping) or _table_items(values) is not None:
        raise TypeError(f"hash_keys takes one column, got a {type(values).__name__}: use hash_fields")
    if is_a(values, "pandas", "Series", "Index", "ExtensionArray"):
        return _pandas(values)
    if hasattr(values, "__arrow_c_array__") or hasattr(values, "__arrow_c_stream__"):
        return _arrow(values)
    if hasattr(values, "__array__"):
        return _array(np.asarray(values))
    if hasattr(values, "__iter__"):
        raise TypeError(f"hash_keys takes a list, an array or a column, got a {type(values).__name__}")
    return _objects((values,), ())


def _objects(values: list[Any] | tuple[Any, ...], shape: tuple[int, ...]) -> _Column:
    return _Column(shape, partial(_hashing.hash_objects, values))


def _sequence(values: Sequence[Any]) -> _Column:
    if len(values) > 0 and (isinstance(values[0], (list, tuple)) or getattr(values[0], "ndim", 0) > 0):
        return _array(np.array(values, dtype=object))
    return _objects(values if isinstance(values, (list, tuple)) else tuple(values), (len(values),))


def _array(array: NDArray[Any]) -> _Column:
    kind = array.dtype.kind
    if isinstance(array, np.ma.MaskedArray):
        data = array.filled(None) if kind == "O" else array.data
        return _with_missing(_array(np.asarray(data)), np.ma.getmaskarray(array))
    if kind in "OT":  # T is numpy.dtypes.StringDType, whose elements are str or its NA object
        return _objects(array.astype(object, copy=False).reshape(-1).tolist(), array.shape)
    if kind not in "biuSU":
        raise TypeError(_unhashable(f"{array.dtype} values"))
    raw, width = _raw_bytes(array)
    if kind == "S":
        return _Column(array.shape, partial(_hashing.hash_fixed_bytes, raw, width))
    if kind == "U":
        return _Column(array.shape, partial(_hashing.hash_fixed_ucs4, raw, width // 4))
    return _Column(array.shape, partial(_hashing.hash_integers, raw, width, kind == "i"))


def _raw_bytes(array: NDArray[Any]) -> tuple[NDArray[np.uint8], int]:
    """Return the contiguous bytes of the elements in native order, copied only if needed, and the bytes per element."""
    if array.dtype.itemsize == 0:  # S0 and U0 hold empty strings only
        array = array.astype(f"{array.dtype.kind}1")
    if not array.dtype.isnative or not array.flags.c_contiguous:
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    return array.reshape(-1).view(np.uint8), array.dtype.itemsize


def _null_key(seed: int) -> np.uint64:
    key = np.empty(1, np.uint64)
    _hashing.hash_objects((None,), seed, key)
    return np.uint64(key[0])


def _with_missing(column: _Column, missing: NDArray[np.bool_]) -> _Column:
    def write(seed: int, out: Keys) -> None:
        column.write(seed, out)
        out[missing.reshape(-1)] = _null_key(seed)

    return _Column(column.shape, write)


def _categorical(codes: NDArray[Any], categories: _Column) -> _Column:
    def write(seed: int, out: Keys) -> None:
        distinct = np.empty(categories.shape[0] + 1, np.uint64)
        categories.write(seed, distinct[:-1])
        distinct[-1] = _null_key(seed)  # the code of a missing value is -1
        out[:] = distinct[codes]

    return _Column(codes.shape, write)


def _pandas(values: Any) -> _Column:
    """Return the column of a Series, an Index or an extension array."""
    dtype, array = values.dtype, getattr(values, "array", values)
    if is_a(dtype, "pandas", "CategoricalDtype"):
        used = array if len(array.categories) <= len(array) else array.remove_unused_categories()
        return _categorical(used.codes, _column(used.categories))
    if is_a(dtype, "pandas", "ArrowDtype") or str(getattr(dtype, "storage", "")).startswith("pyarrow"):
        return _column(array.__arrow_array__())
    if dtype.kind in "fcmM":
        raise TypeError(_unhashable(f"{dtype} values"))
    if dtype.kind in "biu" and not isinstance(dtype, np.dtype):
        data = array.to_numpy(dtype={"b": "bool", "i": "int64", "u": "uint64"}[dtype.kind], na_value=0)
        return _with_missing(_array(data), np.asarray(array.isna()))
    return _array(values.to_numpy())


def _arrow(values: Any) -> _Column:
    """Return the column of an object that has a length and exports the Arrow PyCapsule interface."""
    kind = getattr(values, "type", None) or getattr(values, "dtype", type(values).__name__)
    if str(kind) == "Object":  # a polars Series of Python objects, which Arrow cannot carry
        return _sequence(values.to_list())
    return _Column((len(values),), partial(_write_arrow, values, _unhashable(f"{kind} values")))


def _write_arrow(values: Any, unsupported: str, seed: int, out: Keys) -> None:
    if hasattr(values, "__arrow_c_array__"):
        schema, array = values.__arrow_c_array__(None)
        _hashing.hash_arrow_array(schema, array, seed, out, unsupported)
        return
    try:
        _hashing.hash_arrow_stream(values.__arrow_c_stream__(None), seed, out, unsupported)
    except OSError:
        if not is_a(getattr(values, "dtype", None), "polars", "Categorical", "Enum"):
            raise
        # polars before 1.34 fails to export these; as strings they have the same keys.
        _hashing.hash_arrow_stream(values.cast(str).__arrow_c_stream__(None), seed, out, unsupported)


def _table_items(columns: Any) -> Iterable[tuple[Any, Any]] | None:
    """Return the names and columns of a table, or None for anything else."""
    if isinstance(columns, Mapping):
        return columns.items()
    if is_a(columns, "pandas", "DataFrame"):
        return zip(columns.columns, (series for _, series in columns.items()), strict=True)
    if is_a(columns, "polars", "DataFrame"):
        return zip(columns.columns, columns.get_columns(), strict=True)
    if is_a(columns, "pyarrow", "Table", "RecordBatch"):
        return zip(columns.schema.names, columns.columns, strict=True)
    return None


def _for_field(name: str, function: Callable[..., Result], *args: Any) -> Result:
    """Call a function, and prefix the message of an error with the field's name."""
    try:
        return function(*args)
    except (TypeError, ValueError, OverflowError) as error:
        raise type(error)(f"field {name!r}: {error}") from error


def _fields(columns: Any) -> list[tuple[str, _Column]]:
    items = _table_items(columns)
    if items is None:
        kind = type(columns).__name__
        raise TypeError(f"hash_fields takes a dict, a DataFrame or an Arrow table, got a {kind}")
    fields: dict[str, _Column] = {}
    for name, values in items:
        if not isinstance(name, str):
            raise TypeError(f"field names must be str, got {type(name).__name__} {name!r}")
        if name in fields:
            raise ValueError(f"two columns are named {name!r}: their keys would be the same")
        fields[name] = _for_field(name, _column, values)
    _check_shapes(fields)
    return list(fields.items())


def _check_shapes(fields: dict[str, _Column]) -> None:
    if not fields:
        raise ValueError("there are no columns to hash")
    first, expected = next((name, column.shape) for name, column in fields.items())
    for name, column in fields.items():
        if len(column.shape) != 1:
            raise ValueError(f"field {name!r} must have one dimension, got the shape {column.shape}")
        if column.shape != expected:
            raise ValueError(f"field {name!r} has {column.shape[0]} values but {first!r} has {expected[0]}")


# ---- from rows back to keys ----


def keys_of_rows(table: EmbeddingTable, rows: Any) -> Keys:
    """Return, for each row, a key that the table maps to that row.

    Parameters
    ----------
    table : EmbeddingTable
        A table with one hash per key.
    rows : array_like of int, any shape
        Row numbers in [0, num_embeddings).

    Returns
    -------
    ndarray of uint64, shape of `rows`
        ``table.rows(keys_of_rows(table, rows))`` is `rows`.

    Raises
    ------
    TypeError
        `rows` are not integers.
    ValueError
        The table has several hashes per key, or a row is out of range.

    Notes
    -----
    The table computes the row of a key as ``mulhi64(fmix64(key ^ salt), n)`` for n rows. The smallest mixed value of
    row r is ``ceil(r * 2**64 / n)``, and `fmix64` is a bijection. Each row takes O(1).

    Examples
    --------
    >>> import hashemb, tempfile
    >>> with hashemb.create(tempfile.mkdtemp() + "/t.emb", num_embeddings=1000, embedding_dim=1) as table:
    ...     table.rows(hashemb.keys_of_rows(table, [0, 7, 999])).tolist()
    [0, 7, 999]
    """
    n, wanted = table.num_embeddings, np.asarray(rows)
    if table.num_hashes != 1:
        raise ValueError(f"a key has several rows in a table with {table.num_hashes} hashes")
    if wanted.dtype.kind not in "iu" and wanted.size:
        raise TypeError(f"rows must be integers, got dtype {wanted.dtype}")
    if wanted.size and not 0 <= int(wanted.min()) <= int(wanted.max()) < n:
        raise ValueError(f"rows must be in [0, {n}), got {wanted.min()} to {wanted.max()}")
    return unfmix64(_smallest_mixed(wanted, n)) ^ np.uint64(splitmix64(table.seed, 0))


def _smallest_mixed(rows: NDArray[Any], n: int) -> Keys:
    """Return ``ceil(row * 2**64 / n)``, in 64-bit integers where the remainders allow it."""
    step, rest = divmod(1 << 64, n)
    if not 1 < n <= 1 << 32:
        return np.array([-(-(row << 64) // n) for row in rows.ravel().tolist()], np.uint64).reshape(rows.shape)
    r = rows.astype(np.uint64)
    mixed: Keys = r * np.uint64(step) + (r * np.uint64(rest) + np.uint64(n - 1)) // np.uint64(n)
    return mixed
