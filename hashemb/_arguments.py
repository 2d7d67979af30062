"""Checks of arguments: any accepted form is converted to the one that the core takes, or raises a clear error.

Every function is pure and names the argument and the numbers in its message. Arrays that need no conversion are
recognised first, by the identity of their dtype: on a batch of 26 keys the conversions cost more than the kernel.
"""

from __future__ import annotations

import os
import uuid
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from numpy.ma import MaskedArray
from scipy import sparse

from hashemb._files import format as _format
from hashemb._rules import Whole, shown
from hashemb._version import __version__
from hashemb.init import Normal, Uniform, Zeros
from hashemb.optim import Adagrad, Optimizer, check_divisor, with_rate

POOLINGS = {"sum": 0, "mean": 1, "sqrtn": 2}
_UINT64, _INT64, _FLOAT32 = np.dtype(np.uint64), np.dtype(np.int64), np.dtype(np.float32)

Keys = npt.NDArray[np.uint64]
Offsets = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Batch = tuple[Keys, "Offsets | None", "Floats | None", int, tuple[int, ...]]


def integer(name: str, value: Any, low: int, high: int) -> int:
    """Return `value` as an int in [low, high]."""
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__} {shown(value)}")
    number = int(value.__index__())
    if not low <= number <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {shown(number)}")
    return number


def flag_or_none(name: str, value: Any) -> bool | None:
    """Return True, False, or None, which leaves the choice to the library."""
    if value is not None and not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True, False or None, got {type(value).__name__} {value!r}")
    return None if value is None else bool(value)


def _is_plain(array: npt.NDArray[Any]) -> bool:
    """Return whether C can read the array: it is in C order, and each element is aligned to its size."""
    flags = array.flags
    return flags.c_contiguous and flags.aligned


def _plain(array: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Return the array, or a copy, with this dtype and its own shape (0-d included), in a form that C can read."""
    array = np.ascontiguousarray(array, dtype).reshape(array.shape)
    return array if array.flags.aligned else array.copy()


def _array(name: str, values: Any) -> npt.NDArray[Any]:
    """Return the values as an array; raise `TypeError` for those that NumPy can only read by losing information."""
    if type(values) is np.ndarray:
        return values
    kinds = {type(values), *map(type, values)} if isinstance(values, (list, tuple)) else {type(values)}
    if any(issubclass(kind, MaskedArray) for kind in kinds):
        raise TypeError(
            f"{name} must not be a masked array, of which the mask would be ignored: give masked entries a value with "
            ".filled(value), or leave them out with .compressed()"
        )
    try:
        return np.asarray(values)
    except RuntimeError as error:  # PyTorch raises it for a tensor with a gradient
        raise TypeError(f"{name} cannot be read as an array: {error}") from None


def keys_array(keys: Any) -> Keys:
    """Return keys of any integer dtype and shape as uint64 in C order, negative ones by two's complement."""
    if type(keys) is np.ndarray and _is_plain(keys):
        if keys.dtype is _UINT64:
            return keys
        if keys.dtype is _INT64:
            return keys.view(_UINT64)
    array = _array("keys", keys)
    if array.dtype.kind not in "iu":
        if array.size == 0 and isinstance(keys, (list, tuple)):
            return np.empty(array.shape, np.uint64)
        raise TypeError(
            f"keys must be integers, got dtype {array.dtype}; turn other values into keys with hashemb.hash_keys"
        )
    if array.dtype.kind == "i":
        return _plain(array, _INT64).view(_UINT64)
    return _plain(array, _UINT64)


def float_array(name: str, values: Any, shape: tuple[int, ...]) -> Floats:
    """Return floats of exactly this shape as float32 in C order. The core checks that they are finite."""
    array = _array(name, values)
    if array.dtype is _FLOAT32 and array.shape == shape and _is_plain(array):
        return array
    if array.dtype.kind != "f":
        raise TypeError(f"{name} must be floats, got dtype {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    with np.errstate(over="ignore"):  # a float64 beyond float32's range becomes infinite and is rejected later
        return _plain(array, _FLOAT32)


def offsets_array(offsets: Any, num_keys: int) -> Offsets:
    """Return bag boundaries as int64; the core checks their values in a copy that no other thread can change."""
    array = _array("offsets", offsets)
    if array.dtype.kind not in "iu":
        raise TypeError(f"offsets must be integers, got dtype {array.dtype}")
    if array.ndim != 1 or array.size == 0:
        raise ValueError(
            f"offsets must have shape (num_bags + 1,), at least one entry, got shape {array.shape}"
        )
    if array.dtype == np.uint64 and int(array.max()) > num_keys:
        raise ValueError(f"offsets must not exceed the {num_keys} keys, got {int(array.max())}")
    return _plain(array, _INT64)


def pooling_code(pooling: Any) -> int:
    """Return the core's number for a pooling."""
    if not isinstance(pooling, str) or pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(map(repr, POOLINGS))}, got {pooling!r}")
    return POOLINGS[pooling]


def sample_weights(weights: Any, num_keys: int) -> Floats:
    """Return one finite float32 weight per key."""
    array = float_array("per_sample_weights", weights, (num_keys,))
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        i = int(bad[0])
        raise ValueError(f"per_sample_weights must be finite: per_sample_weights[{i}] is {array[i]} in float32")
    return array


def batch(keys: Any, offsets: Any, pooling: Any, weights: Any, dim: int) -> Batch:
    """Check the keys of one call, with their offsets, weights and pooling.

    Returns
    -------
    keys : ndarray of uint64
    offsets, weights : ndarray or None
    pooling : int
    shape : tuple of int
        Shape of the result: one vector per key, or per bag.
    """
    if type(keys) is not np.ndarray and sparse.issparse(keys):
        keys, offsets, weights = _from_csr(keys, offsets, weights)
    code = pooling_code(pooling)
    keys = keys_array(keys)
    if offsets is None:
        if weights is not None:
            raise ValueError("per_sample_weights needs offsets")
        if code != 0:
            raise ValueError(f"pooling={pooling!r} needs offsets")
        return keys, None, None, code, (*keys.shape, dim)
    if keys.ndim != 1:
        raise ValueError(f"keys must be one-dimensional with offsets, got shape {keys.shape}")
    offsets = offsets_array(offsets, keys.size)
    if weights is not None:
        weights = sample_weights(weights, keys.size)
    return keys, offsets, weights, code, (offsets.size - 1, dim)


def _from_csr(matrix: Any, offsets: Any, weights: Any) -> tuple[Any, Any, Any]:
    if matrix.format != "csr":
        raise TypeError(f"sparse keys must be in CSR format, got {matrix.format}: convert with .tocsr()")
    if offsets is not None or weights is not None:
        raise ValueError("a CSR matrix brings its own offsets and per_sample_weights: give neither")
    if matrix.data.dtype.kind not in "biuf":
        raise TypeError(f"the data of a CSR matrix are weights and must be real numbers, got dtype {matrix.data.dtype}")
    nnz = int(matrix.indptr[-1]) if matrix.indptr.size else 0
    return matrix.indices[:nnz], matrix.indptr, np.asarray(matrix.data[:nnz], np.float32)


def output_array(out: Any, shape: tuple[int, ...]) -> Floats:
    """Return a new result array, or the caller's `out` if it can hold the result."""
    if out is None:
        return np.empty(shape, _FLOAT32)
    if not isinstance(out, np.ndarray) or out.dtype != np.float32 or not out.dtype.isnative:
        found = out.dtype if isinstance(out, np.ndarray) else type(out).__name__
        raise TypeError(f"out must be a float32 array, got {found}")
    if isinstance(out, MaskedArray):
        raise TypeError("out must not be a masked array, of which the mask would be ignored: give its .data")
    if out.shape != shape:
        raise ValueError(f"out must have shape {shape}, got {out.shape}")
    if not _is_plain(out) or not out.flags.writeable:
        raise ValueError("out must be C-contiguous, aligned and writeable")
    return out


# ---- geometry of a new table ----


def table_meta(
    num_embeddings: Any, embedding_dim: Any, dtype: Any, optimizer: Any, init: Any, num_hashes: Any, seed: Any
) -> _format.TableMeta:
    """Return the metadata of a new table from the arguments of `create`."""
    optimizer = Adagrad() if optimizer is None else optimizer
    init = Uniform() if init is None else init
    if type(optimizer) not in _format.OPTIMIZERS.values():
        raise TypeError(f"optimizer must be Adagrad, RowWiseAdagrad, SGD or FTRL(...), got {optimizer!r}")
    if not isinstance(init, (Uniform, Normal, Zeros)):
        raise TypeError(f"init must be Uniform, Normal or Zeros(...), got {init!r}")
    check_divisor(optimizer)
    if not _format.META_RULES["dtype"].holds(dtype):
        dtypes = ", ".join(map(repr, _format.STORAGE_DTYPES))
        raise ValueError(f"dtype must be one of {dtypes}, got {shown(dtype)}")
    dim = _geometry("embedding_dim", embedding_dim)
    itemsize = np.dtype(_format.STORAGE_DTYPES[dtype]).itemsize
    meta = _format.TableMeta(
        num_embeddings=_geometry("num_embeddings", num_embeddings),
        embedding_dim=dim,
        dtype=dtype,
        optimizer=optimizer,
        init=init,
        num_hashes=_geometry("num_hashes", num_hashes),
        seed=_geometry("seed", seed),
        block_rows=_format.rows_per_block(dim * itemsize),
        id=uuid.uuid4().hex,
        created_by=f"hashemb {__version__}",
    )
    _format.check_size(meta)
    return meta


def _geometry(name: str, value: Any) -> int:
    """Return `value` as an int within the limits of this field of a table."""
    rule = _format.META_RULES[name]
    assert isinstance(rule, Whole)
    return integer(name, value, rule.low, rule.high)


def check_same(path: str, found: _format.TableMeta, wanted: _format.TableMeta) -> None:
    """Raise `ValueError` unless both describe the same table; its id and creator may differ."""
    names = ("num_embeddings", "embedding_dim", "dtype", "optimizer", "init", "num_hashes", "seed")
    differing = [n for n in names if getattr(found, n) != getattr(wanted, n)]
    if differing:
        details = "; ".join(f"{n} is {getattr(found, n)!r}, not {getattr(wanted, n)!r}" for n in differing)
        raise ValueError(f"{path} holds another table: {details}")


def path_string(path: str | os.PathLike[str], name: str = "path") -> str:
    """Return a path as a normalised str."""
    text = os.fspath(path)
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a str or path-like of str, got {type(text).__name__}")
    if not text:
        raise ValueError(f"{name} must not be empty")
    if "\0" in text:
        raise ValueError(f"{name} must not hold a null character, got {text!r}")
    return os.path.normpath(text)


def isolation(value: Any) -> Literal["hogwild", "exact"]:
    if value not in ("hogwild", "exact"):
        raise ValueError(f'isolation must be "hogwild" or "exact", got {value!r}')
    return value  # type: ignore[no-any-return]


def learning_rate(value: Any, optimizer: Optimizer) -> float:
    """Return a rate that is valid for a table with this optimiser."""
    return float(with_rate(optimizer, value).lr)
