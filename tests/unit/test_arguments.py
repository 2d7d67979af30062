"""Keys and gradients in any accepted form give the result of the form that the core takes; that one is not copied."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hashemb
from hashemb import _arguments

KEYS = np.array([[0, 5, 2**63 - 1], [7, 2**62, 5]], np.int64)
GRADS = np.random.default_rng(3).standard_normal((2, 3, 4), np.float32)


class Subclass(np.ndarray[Any, Any]):
    """An array of a class that is not NumPy's own."""


FORMS = {
    "uint64": lambda a: a.astype(np.uint64) if a.dtype.kind == "i" else a,
    "another type of 64 bits": lambda a: a.astype(np.longlong) if a.dtype.kind == "i" else a,
    "and unsigned": lambda a: a.astype(np.ulonglong) if a.dtype.kind == "i" else a,
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "column by column": np.asfortranarray,
    "every other": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "backwards": lambda a: a[::-1].copy()[::-1],
    "unpickled": lambda a: pickle.loads(pickle.dumps(a)),
    "subclass": lambda a: a.view(Subclass),
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "unaligned": lambda a: np.frombuffer(b"." + a.tobytes(), a.dtype, offset=1).reshape(a.shape),
    "lists": lambda a: a.tolist(),
}


@pytest.mark.parametrize("form", FORMS)
def test_any_form_of_keys_and_grads(tmp_path: Path, form: str) -> None:
    make = FORMS[form]
    results = []
    for name, keys, grads in (("plain", KEYS, GRADS), ("form", make(KEYS), make(GRADS))):
        with hashemb.create(tmp_path / name, num_embeddings=50, embedding_dim=4) as table:
            table.update(keys, grads)
            results.append((table.rows(keys), table.lookup(keys), np.array(table.weight)))
    for plain, other in zip(*results, strict=True):
        assert plain.shape == other.shape
        np.testing.assert_array_equal(plain, other)


@pytest.mark.parametrize("dtype", [np.uint64, np.int64])
@pytest.mark.parametrize("shape", [(), (0,), (26,), (2, 3)])
def test_the_cores_own_form_is_not_copied(dtype: type, shape: tuple[int, ...]) -> None:
    keys, grads = np.zeros(shape, dtype), np.zeros((*shape, 4), np.float32)
    checked, _, _, _, result_shape = _arguments.batch(keys, None, "sum", None, 4)
    assert checked.dtype == np.uint64
    assert checked.ctypes.data == keys.ctypes.data
    assert checked.shape == shape
    assert _arguments.float_array("grads", grads, result_shape) is grads


def test_what_c_may_not_read_is_copied() -> None:
    """Vector loops may assume that an element lies at a multiple of its size."""
    keys, grads = FORMS["unaligned"](KEYS), FORMS["unaligned"](GRADS)
    offsets = np.frombuffer(b"." + np.array([0, 6]).tobytes(), np.int64, offset=1)
    assert not any(a.flags.aligned for a in (keys, grads, offsets))
    assert _arguments.keys_array(keys).flags.aligned
    assert _arguments.keys_array(keys.astype(np.uint64)).flags.aligned
    assert _arguments.float_array("grads", grads, grads.shape).flags.aligned
    assert _arguments.offsets_array(offsets, 6).flags.aligned
    out = np.frombuffer(bytearray(grads.nbytes + 1), np.float32, offset=1).reshape(grads.shape)
    with pytest.raises(ValueError, match="out must be C-contiguous, aligned and writeable"):
        _arguments.output_array(out, grads.shape)
