"""hash_keys and hash_fields on Python and NumPy values, against mmh3 bit for bit."""

from __future__ import annotations

import doctest
import enum
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis.extra.numpy as hnp
import mmh3
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import hashemb
from hashemb import hash_fields, hash_keys, reference

ROOT = Path(__file__).resolve().parents[2]
INTEGERS = st.integers(-(2**63), 2**64 - 1)
VALUES = st.one_of(INTEGERS, st.text(), st.binary(), st.booleans(), st.none())
FIELDS = st.none() | st.text()
KINDS = ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]


def key_of(value: object, field: str | None = None) -> int:
    """Compute a key by the definition, one value at a time."""
    if value is None:
        data = b"\x00null"
    elif isinstance(value, str):
        data = value.encode()
    elif isinstance(value, bytes):
        data = value
    else:
        data = (int(value) % 2**64).to_bytes(8, "little")
    seed = 0 if field is None else mmh3.hash(field, 0, signed=False)
    return mmh3.hash64(data, seed, x64arch=True, signed=False)[0]


def keys_of(values, field: str | None = None) -> np.ndarray:
    return np.array([key_of(v, field) for v in values], np.uint64)


def assert_keys(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.dtype == np.uint64
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, expected, strict=True)


def test_known_answers():
    """Keys are stored in existing tables, so these numbers must never change."""
    known = {
        (0, None): 0x28DF63B7CC57C3CB,
        (-1, None): 0xA0E4B27A1ABAED73,
        (5, None): 0x0FD4C5F69B6C771B,
        ("5", None): 0x0D4B8545BA5B58A5,
        ("", None): 0,
        (None, None): 0xC6C29E5CEF4E8A2C,
        ("caf\u00e9", None): 0xA2E7C22A053364DD,
        ("\U0001f600", None): 0x156DB15587E0545C,
        ("Berlin", "city"): 0x41E22D512B168471,
        (17, "user"): 0x99313F19C870C87D,
        (None, "user"): 0x73C3AA5DD4A62388,
    }
    for (value, field), key in known.items():
        assert int(hash_keys(value, field=field)) == key, (value, field)


@given(st.lists(VALUES), FIELDS)
@example([5, "5", b"5", True, None, "", b"", "\x00null", "a\x00", "\U0001f600", 2**63, -(2**63)], "ads")
def test_lists_and_tuples(values, field):
    expected = keys_of(values, field)
    assert_keys(hash_keys(values, field=field), expected)
    assert_keys(hash_keys(tuple(values), field=field), expected)


@given(st.lists(VALUES), FIELDS)
def test_equals_the_slow_twin(values, field):
    assert_keys(hash_keys(values, field=field), reference.hash_keys(values, field=field))


@given(VALUES, FIELDS)
def test_scalars_give_zero_dimensions(value, field):
    assert_keys(hash_keys(value, field=field), np.array(key_of(value, field), np.uint64))


@given(st.data(), st.sampled_from(KINDS), st.sampled_from("<>"))
def test_integer_arrays(data, kind, order):
    array = data.draw(hnp.arrays(np.dtype(order + kind), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0)))
    expected = keys_of(array.reshape(-1).tolist()).reshape(array.shape)
    assert_keys(hash_keys(array), expected)
    assert_keys(hash_keys(array.T), expected.T.copy())


@given(st.lists(st.binary(max_size=40)))
def test_fixed_width_bytes(values):
    array = np.array(values, dtype="S") if values else np.empty(0, "S3")
    assert_keys(hash_keys(array), keys_of(array.tolist()))  # tolist drops trailing NULs, as NumPy always does


@given(st.lists(st.text(max_size=40)), st.sampled_from("<>"))
@example(["abcd\x80", "abcde", "\x00a", "a\U0010ffff", "\ud7ff\ue000\uffff\U00010000\u07ff\u0800"], ">")
def test_fixed_width_strings(values, order):
    array = np.array(values, dtype="U") if values else np.empty(0, "U3")
    assert_keys(hash_keys(array.astype(array.dtype.newbyteorder(order))), keys_of(array.tolist()))


@pytest.mark.parametrize("length", range(41))
def test_every_length_of_bytes(length):
    """Strings are at the start and at the end of their buffer, beyond which nothing may be read."""
    rng = np.random.default_rng(length)
    values = [rng.integers(1, 256, length, np.uint8).tobytes() for _ in range(5)]
    assert_keys(hash_keys(values), keys_of(values))
    for width in range(max(length, 1), 43):
        assert_keys(hash_keys(np.array(values, f"S{width}")), keys_of(values))


@pytest.mark.parametrize("length", [*range(20), 63, 64, 65, 1000, 100_000])
def test_every_length_of_text(length):
    values = ["x" * length, "ж" * length, "x" * max(length - 1, 0) + "ж"]
    assert_keys(hash_keys(values), keys_of(values))
    assert_keys(hash_keys(np.array(values, f"U{length + 1}")), keys_of(values))


@given(st.lists(VALUES, min_size=1), FIELDS)
def test_object_arrays(values, field):
    array = np.empty(len(values), object)
    array[:] = values
    assert_keys(hash_keys(array, field=field), keys_of(values, field))
    assert_keys(hash_keys(array[::-1], field=field), keys_of(values[::-1], field))


class Colour(enum.IntEnum):
    RED = 3


class Index:
    def __index__(self) -> int:
        return 7


class Text(str):
    pass


@pytest.mark.parametrize(
    ("value", "equivalent"),
    [
        (np.int8(-3), -3),
        (np.uint64(2**64 - 1), -1),
        (np.bool_(True), 1),
        (np.str_("a\x00"), "a\x00"),
        (np.bytes_(b"a\x00"), b"a\x00"),
        (np.array(4), 4),
        (Colour.RED, 3),
        (Index(), 7),
        (Text("t"), "t"),
        (float("nan"), None),
        (np.float32("nan"), None),
    ],
    ids=repr,
)
def test_objects_that_stand_for_a_value(value, equivalent):
    expected = np.array(key_of(equivalent), np.uint64)
    assert_keys(hash_keys(value), expected)
    assert_keys(hash_keys([value]), expected.reshape(1))


def test_integers_are_not_strings():
    keys = hash_keys([5, "5", np.int64(5), b"5"])
    assert keys[0] == keys[2]
    assert keys[1] == keys[3]
    assert keys[0] != keys[1]


@pytest.mark.parametrize("shape", [(), (0,), (7,), (0, 3), (2, 0), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("dtype", ["i4", "?", "S5", "U5", "O"])
def test_shape_is_kept(shape, dtype):
    array = (np.arange(np.prod(shape, dtype=int)) % 2).reshape(shape).astype(dtype)
    expected = keys_of(array.reshape(-1).tolist()).reshape(shape)
    assert_keys(hash_keys(array), expected)
    assert_keys(hash_keys(array.copy(order="F")), expected)


@pytest.mark.parametrize("empty", [[], (), range(0), np.empty(0, "i8"), np.empty(0, "S0"), np.empty(0, "U0")])
def test_empty(empty):
    assert_keys(hash_keys(empty), np.empty(0, np.uint64))


@pytest.mark.parametrize("dtype", ["S0", "U0"])
def test_strings_of_width_zero(dtype):
    assert_keys(hash_keys(np.zeros(3, dtype)), keys_of(["", "", ""]))


def test_nested_lists_and_ranges():
    assert_keys(hash_keys([[1, "a"], [None, 4]]), keys_of([1, "a", None, 4]).reshape(2, 2))
    assert_keys(hash_keys([np.array([1, 2]), np.array([3, 4])]), keys_of([1, 2, 3, 4]).reshape(2, 2))
    assert_keys(hash_keys(range(2**63 - 1, 2**63 + 2)), keys_of(range(2**63 - 1, 2**63 + 2)))


@pytest.mark.parametrize("dtype", ["<i8", ">i8", "<u2", ">u2", "S5", "S17", "<U5", ">U5", "O"])
def test_layouts(dtype):
    """Strided, reversed, read-only and unaligned arrays are hashed and left unchanged."""
    array = np.arange(100, 124).astype(dtype)
    raw = np.zeros(array.nbytes + 1, np.uint8)
    unaligned = raw[1:].view(dtype) if dtype != "O" else array.copy()
    unaligned[:] = array
    frozen = array.copy()
    frozen.flags.writeable = False
    expected = keys_of(array.tolist())
    for layout, keys in [
        (array[::2], expected[::2]),
        (array[::-1], expected[::-1]),
        (array.reshape(4, 6).T, expected.reshape(4, 6).T),
        (frozen, expected),
        (unaligned, expected),
    ]:
        before = layout.copy()
        assert_keys(hash_keys(layout), keys.copy())
        assert np.array_equal(layout, before)
        assert layout.dtype == np.dtype(dtype)


def test_masked_arrays():
    masked = np.ma.masked_array([[1, 2], [3, 4]], mask=[[0, 1], [0, 0]])
    assert_keys(hash_keys(masked, "f"), keys_of([1, None, 3, 4], "f").reshape(2, 2))
    assert_keys(hash_keys(np.ma.masked_array(["a", "b"])), keys_of(["a", "b"]))
    objects = np.ma.masked_array(np.array([1.5, "b"], object), mask=[1, 0])
    assert_keys(hash_keys(objects), keys_of([None, "b"]))


@pytest.mark.skipif(not hasattr(np.dtypes, "StringDType"), reason="NumPy 1 has no variable-width strings")
def test_numpy_variable_width_strings():
    dtype = np.dtypes.StringDType(na_object=None)
    values = ["", "a\x00", "ж" * 40, None]
    assert_keys(hash_keys(np.array(values, dtype)), keys_of(values))


def test_a_list_shortened_meanwhile_is_an_error_not_a_crash():
    values: list[object] = [1, 2, 3, 4]

    class Shortens:
        def __index__(self) -> int:
            del values[2:]
            return 0

    values[1] = Shortens()
    with pytest.raises(IndexError):
        hash_keys(values)


def test_threads_get_the_same_keys():
    array = np.arange(20_000)
    with ThreadPoolExecutor(4) as pool:
        for keys in pool.map(hash_keys, [array] * 8):
            assert_keys(keys, hash_keys(array))


LONE_SURROGATE = "ab\ud800c"
BAD_VALUES = [
    ([1, 2**64], OverflowError, r"18446744073709551616 at position 1 .* \[-2\*\*63, 2\*\*64\)"),
    ([-(2**63) - 1], OverflowError, "-9223372036854775809 at position 0"),
    ([1 << 100_000], OverflowError, "an integer of 100001 bits at position 0"),
    (np.array([1, 2**70], object), OverflowError, f"{2**70} at position 1"),
    (1.5, TypeError, "float at position 0.*bin floats.*cast"),
    ([1, 2.0], TypeError, "float at position 1.*bin floats.*cast"),
    (np.array([1.0]), TypeError, "float64 values.*bin floats.*cast"),
    (np.float32(1), TypeError, "float32 at position 0"),
    (np.array([1j]), TypeError, "complex128"),
    (np.array(["2024-01-01"], "M8[D]"), TypeError, r"datetime64\[D\]"),
    (np.zeros(2, "i4,f4"), TypeError, "cannot hash .*i4.* values"),
    (["a", LONE_SURROGATE], ValueError, "string at position 1 .*surrogate"),
    (np.array(["a", LONE_SURROGATE]), ValueError, "string at position 1 .*surrogate"),
    (np.array([0x110000, 0], np.uint32).view("U1"), ValueError, r"position 0 .*past U\+10FFFF"),
    ([["a"], ["b", "c"]], (TypeError, ValueError), "list at position 0|inhomogeneous"),
    ([1, [2]], TypeError, "list at position 1"),
    ([bytearray(b"a")], TypeError, "bytearray at position 0"),
    ([object()], TypeError, "object at position 0"),
    ({1, 2}, TypeError, "got a set"),
    ((x for x in "ab"), TypeError, "got a generator"),
    ({"a": [1]}, TypeError, "got a dict: use hash_fields"),
    (object(), TypeError, "object at position 0"),
]


@pytest.mark.parametrize(("values", "error", "message"), BAD_VALUES, ids=[m for _, _, m in BAD_VALUES])
def test_bad_values(values, error, message):
    with pytest.raises(error, match=message):
        hash_keys(values)


def test_bad_field_names():
    with pytest.raises(TypeError, match="field must be a str or None, got int 3"):
        hash_keys([1], field=3)
    with pytest.raises(ValueError, match="surrogates"):
        hash_keys([1], field="\ud800")


@given(st.dictionaries(st.text(), st.lists(VALUES, min_size=3, max_size=3), min_size=1))
@settings(max_examples=50)
def test_fields_are_salted_columns(columns):
    keys = hash_fields(columns)
    assert_keys(keys, np.stack([keys_of(v, name) for name, v in columns.items()], axis=1))


def test_fields_of_arrays_are_written_in_place():
    columns = {
        "a": np.arange(5),
        "b": np.array(list("vwxyz"), ">U2"),
        "c": [b"", None, 1, "x", True],
        "d": np.array([b"0123456789abcdefg"] * 5),
        "e": np.ma.masked_array(range(5), [0, 1, 0, 0, 1]),
    }
    keys = hash_fields(columns)
    for j, (name, values) in enumerate(columns.items()):
        assert_keys(keys[:, j].copy(), hash_keys(values, field=name))
    assert len(set(hash_fields({"a": [7], "b": [7]})[0])) == 2


def test_fields_of_empty_columns():
    assert hash_fields({"a": [], "b": np.empty(0, "S4")}).shape == (0, 2)


BAD_COLUMNS = [
    ({}, ValueError, "no columns"),
    ([1, 2], TypeError, "dict, a DataFrame or an Arrow table, got a list"),
    ({"a": [1, 2], "b": [1, 2, 3]}, ValueError, "field 'b' has 3 values but 'a' has 2"),
    ({"a": [[1, 2]], "b": [1]}, ValueError, r"field 'a' must have one dimension, got the shape \(1, 2\)"),
    ({"a": [1], "b": "x"}, ValueError, r"field 'b' must have one dimension, got the shape \(\)"),
    ({3: [1]}, TypeError, "field names must be str, got int 3"),
    ({"a": [1], "price": np.array([1.0])}, TypeError, "field 'price': cannot hash float64 values"),
    ({"a": [1], "b": [2**64]}, OverflowError, "field 'b': 18446744073709551616 at position 0"),
    ({"a": [LONE_SURROGATE]}, ValueError, "field 'a': the string at position 0"),
]


@pytest.mark.parametrize(("columns", "error", "message"), BAD_COLUMNS, ids=[m for _, _, m in BAD_COLUMNS])
def test_bad_columns(columns, error, message):
    with pytest.raises(error, match=message):
        hash_fields(columns)


def test_no_library_is_imported():
    program = (
        "import sys, hashemb, numpy; hashemb.hash_keys(['a', None, 1.0 * float('nan'), numpy.int8(1)]);"
        "hashemb.hash_fields({'a': [1]});"
        "assert not {'pandas', 'polars', 'pyarrow', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_examples_run():
    assert doctest.testmod(hashemb.hashing, raise_on_error=True).attempted > 0
    path = ROOT / "docs" / "explanation" / "hashing.md"
    page = doctest.testfile(str(path), module_relative=False, raise_on_error=True)
    assert page.attempted > 0
