"""Keys and gradients in any accepted form give the same result; the form that the core takes is not copied."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

import hashemb
from hashemb import _arguments

KEYS = np.array([[0, 5, 2**63 - 1], [7, 2**62, 5]], np.int64)
GRADS = np.random.default_rng(3).standard_normal((2, 3, 4), np.float32)


class Subclass(np.ndarray[Any, Any]):
    """A subclass of NumPy's array."""


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
    """Vector loops may assume that the address of an element is a multiple of its size."""
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


# ---- arrays whose meaning would be lost ----

OFFSETS = np.array([0, 4, 6])


def masked(array: Any) -> Any:
    return np.ma.masked_array(array, np.arange(array.size).reshape(array.shape) % 2 == 1)


MASKED = {
    "keys": lambda t: t.lookup(masked(KEYS)),
    "a list of keys": lambda t: t.lookup([masked(KEYS[0]), masked(KEYS[1])]),
    "a masked key": lambda t: t.lookup([1, np.ma.masked]),
    "keys of rows": lambda t: t.rows(masked(KEYS)),
    "keys of prefetch": lambda t: t.prefetch(masked(KEYS)),
    "keys of update": lambda t: t.update(masked(KEYS), GRADS),
    "offsets": lambda t: t.lookup(KEYS.ravel(), offsets=masked(OFFSETS)),
    "weights": lambda t: t.lookup(KEYS.ravel(), offsets=OFFSETS, per_sample_weights=masked(np.ones(6))),
    "grads": lambda t: t.update(KEYS, masked(GRADS)),
    "a list of grads": lambda t: t.update(KEYS, list(masked(GRADS))),
    "out": lambda t: t.lookup(KEYS, out=np.ma.masked_array(np.empty((2, 3, 4), np.float32))),
}


@pytest.fixture
def table(tmp_path: Path) -> Any:
    with hashemb.create(tmp_path / "t", num_embeddings=50, embedding_dim=4) as table:
        yield table


@pytest.mark.parametrize("what", MASKED)
def test_a_mask_is_not_ignored(table: Any, what: str) -> None:
    with pytest.raises(TypeError, match="masked array, of which the mask would be ignored"):
        MASKED[what](table)
    assert table.step == 0


def test_what_the_message_says_to_do_works(table: Any) -> None:
    array = masked(KEYS)
    assert table.lookup(array.filled(0)).shape == (2, 3, 4)
    assert table.lookup(array.compressed()).shape == (3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.lookup(np.zeros(2, [("a", "i8")])), "keys must be integers, got dtype"),
        (lambda t: t.lookup(np.array([1, None])), "keys must be integers, got dtype object"),
        (lambda t: t.update(KEYS, GRADS.astype(object)), "grads must be floats, got dtype object"),
        (lambda t: t.lookup(sparse.csr_matrix(np.eye(4) * 1j)), "data of a CSR matrix .* real numbers, got .*complex"),
    ],
)
def test_other_arrays_whose_meaning_would_be_lost(table: Any, call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call(table)


def test_missing_values_of_pandas(table: Any) -> None:
    pandas = pytest.importorskip("pandas")
    with pytest.raises(TypeError, match=r"keys must be integers, got dtype (object|float64)"):
        table.lookup(pandas.array([1, None], "Int64"))
    with pytest.raises((TypeError, ValueError), match=r"grads must be f"):
        table.update([1], pandas.DataFrame({name: pandas.array([None], "Float64") for name in "abcd"}))
    assert table.lookup(pandas.Series([1, 2], index=[5, 6])).shape == (2, 4)
    assert table.step == 0


def test_tensors_with_gradients(table: Any) -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"grads cannot be read as an array: .*detach\(\)"):
        table.update([1], torch.ones(1, 4, requires_grad=True))
    table.update(torch.tensor([1]), torch.ones(1, 4))
    assert table.step == 1
