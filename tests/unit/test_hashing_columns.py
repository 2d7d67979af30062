"""hash_keys and hash_fields on pandas, polars and Arrow columns give the keys of the same values in a list."""

from __future__ import annotations

import ctypes
import errno

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hashemb import hash_fields, hash_keys

pa = pytest.importorskip("pyarrow")
pd = pytest.importorskip("pandas")
pl = pytest.importorskip("polars")

STRINGS = ["", "a", None, "twelve bytes", "thirteen byte", "a\x00b", "é", "sixteen bytes ok", "\U0001f600" * 9]
STRINGS += [None, "a"]
INTEGERS = [5, None, 0, 127, 5, None, 1, 2]
SIGNED = [-128, None, -1, 127, 5, None, 1, 2]
BOOLEANS = [True, None, False, True, True, False, None, None, True]
CATEGORIES = [text and text.replace("\x00", "") for text in STRINGS]  # pandas < 3 ends a category at a NUL
BYTES = [None if text is None else text.encode() + b"\xff" for text in STRINGS]


def arrow(arrow_type):
    return lambda values: pa.array(values, arrow_type)


def dictionary(index_type):
    return lambda values: pa.array(values).dictionary_encode().cast(pa.dictionary(index_type, pa.string()))


def chunked(values):
    return pa.chunked_array([values[:2], [], values[2:]], pa.string())


def pandas(dtype):
    return lambda values: pd.Series(values, dtype=dtype)


def polars(dtype):
    return lambda values: pl.Series("x", values, dtype=dtype)


COLUMNS = {
    "arrow string": (arrow(pa.string()), STRINGS),
    "arrow large_string": (arrow(pa.large_string()), STRINGS),
    "arrow binary": (arrow(pa.binary()), BYTES),
    "arrow large_binary": (arrow(pa.large_binary()), BYTES),
    "arrow fixed_size_binary": (arrow(pa.binary(9)), [b"012345678", None, b"\x00" * 9]),
    "arrow fixed_size_binary long": (arrow(pa.binary(35)), [b"x" * 35, None, b"\x00" * 35]),
    "arrow bool": (arrow(pa.bool_()), BOOLEANS),
    "arrow null": (arrow(pa.null()), [None] * 5),
    "arrow dictionary of null": (lambda v: pa.array(v).dictionary_encode(), [None] * 5),
    "arrow dictionary of int": (lambda v: pa.array(v).dictionary_encode(), INTEGERS),
    "arrow chunked": (chunked, STRINGS),
    **{f"arrow {kind}": (arrow(getattr(pa, kind)()), SIGNED) for kind in ("int8", "int16", "int32", "int64")},
    **{f"arrow {kind}": (arrow(getattr(pa, kind)()), INTEGERS) for kind in ("uint8", "uint16", "uint32", "uint64")},
    **{
        f"arrow dictionary {kind}": (dictionary(getattr(pa, kind)()), STRINGS)
        for kind in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    },
    "pandas object": (pandas(object), STRINGS),
    "pandas mixed object": (pandas(object), [1, "1", b"1", None, True, 2**64 - 1, -1]),
    "pandas string": (pandas("string[python]"), STRINGS),
    "pandas string[pyarrow]": (pandas("string[pyarrow]"), STRINGS),
    "pandas str": (pandas("str"), [text for text in STRINGS if text is not None]),
    "pandas inferred": (pd.Series, STRINGS),
    "pandas ArrowDtype string": (lambda v: pd.Series(v, dtype=pd.ArrowDtype(pa.string())), STRINGS),
    "pandas ArrowDtype int": (lambda v: pd.Series(v, dtype=pd.ArrowDtype(pa.int16())), SIGNED),
    "pandas Int8": (pandas("Int8"), SIGNED),
    "pandas Int64": (pandas("Int64"), [-(2**63), None, 2**63 - 1, 0]),
    "pandas UInt64": (pandas("UInt64"), [2**64 - 1, None, 0]),
    "pandas boolean": (pandas("boolean"), BOOLEANS),
    "pandas int64": (pandas("int64"), [3, -1, 4]),
    "pandas bool": (pandas("bool"), [True, False, True]),
    "pandas Sparse": (lambda v: pd.Series(v, dtype=pd.SparseDtype("int64", 0)), [0, 0, 3, -1]),
    "pandas category": (pandas("category"), CATEGORIES),
    "pandas category of Int64": (lambda v: pd.Series(v, dtype="Int64").astype("category"), INTEGERS),
    "pandas Index": (lambda v: pd.Index(v, dtype=object), STRINGS),
    "pandas RangeIndex": (lambda v: pd.RangeIndex(len(v)), [0, 1, 2, 3]),
    "pandas Categorical": (pd.Categorical, CATEGORIES),
    "pandas array": (lambda v: pd.array(v, dtype="Int32"), SIGNED),
    "polars String": (polars(pl.String), STRINGS),
    "polars Binary": (polars(pl.Binary), BYTES),
    "polars Categorical": (polars(pl.Categorical), STRINGS),
    "polars Enum": (polars(pl.Enum(["unused", *sorted({t for t in STRINGS if t is not None})])), STRINGS),
    "polars Boolean": (polars(pl.Boolean), BOOLEANS),
    "polars Null": (polars(pl.Null), [None] * 4),
    "polars Object": (polars(pl.Object), ["a", 1, None, b"x"]),
    "polars Int8": (polars(pl.Int8), SIGNED),
    "polars UInt64": (polars(pl.UInt64), [2**64 - 1, None, 0]),
    "polars chunked": (lambda v: pl.concat([pl.Series(v[:2]), pl.Series(v[2:])], rechunk=False), STRINGS),
}
if hasattr(pa, "string_view"):
    COLUMNS["arrow string_view"] = (arrow(pa.string_view()), STRINGS)
    COLUMNS["arrow binary_view"] = (arrow(pa.binary_view()), BYTES)


@pytest.mark.parametrize("field", [None, "city"])
@pytest.mark.parametrize("kind", COLUMNS)
def test_columns(kind, field):
    """Hash the whole column, and slices that begin in the middle of a validity byte."""
    build, values = COLUMNS[kind]
    column, expected = build(values), hash_keys(values, field=field)
    keys = hash_keys(column, field=field)
    np.testing.assert_array_equal(keys, expected, strict=True)
    assert keys.flags.c_contiguous
    for start in range(len(values) + 1):
        np.testing.assert_array_equal(hash_keys(column[start:], field=field), expected[start:])
        np.testing.assert_array_equal(hash_keys(column[:start], field=field), expected[:start])
    for start in range(len(values)):
        np.testing.assert_array_equal(hash_keys(column[start : start + 1], field=field), expected[start : start + 1])


def test_the_samples_spread():
    lengths = {len(text.encode()) for text in STRINGS if text is not None}
    assert {0, 1, 12, 13, 16} < lengths
    assert STRINGS.count(None) == 2
    assert len(STRINGS) > 8  # more than one byte of validity bits


@given(st.lists(st.none() | st.text(max_size=40)), st.integers(0, 20), st.integers(0, 20))
@example(["x" * n for n in range(41)], 0, 41)
def test_strings_of_all_libraries(values, start, length):
    expected = hash_keys(values[start : start + length])
    column = pa.array(values, pa.string())
    candidates = [column, column.cast(pa.large_string()), column.dictionary_encode(), pa.chunked_array([column])]
    candidates += [pl.Series(values, dtype=pl.String), pd.Series(values, dtype="string[pyarrow]")]
    candidates += [pd.Series(values, dtype=object)]
    for candidate in candidates:
        np.testing.assert_array_equal(hash_keys(candidate[start : start + length]), expected, strict=True)


@given(st.lists(st.none() | st.integers(-(2**63), 2**63 - 1)), st.integers(0, 20))
def test_integers_of_all_libraries(values, start):
    expected = hash_keys(values[start:])
    for build in (arrow(pa.int64()), polars(pl.Int64), pandas("Int64"), pandas(object)):
        np.testing.assert_array_equal(hash_keys(build(values)[start:]), expected, strict=True)


def test_missing_values_of_pandas_among_objects():
    expected = hash_keys([None] * 4)
    np.testing.assert_array_equal(hash_keys([pd.NA, pd.NaT, np.nan, None]), expected)
    np.testing.assert_array_equal(hash_keys(pd.Series([pd.NA, pd.NaT, np.nan, None], dtype=object)), expected)
    assert hash_keys(pd.NA) == expected[0]


def test_arrow_nulls_inside_a_dictionary():
    values = pa.array(["a", None, "b"])
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, None, 0], pa.int8()), values)
    np.testing.assert_array_equal(hash_keys(column), hash_keys(["a", None, "b", None, "a"]))


@pytest.mark.parametrize("num_rows", [55, 56, 57, 112, 300])
@pytest.mark.parametrize("build", [pa.array, lambda values: pa.array(values).dictionary_encode()])
def test_arrow_nulls_of_long_columns(build, num_rows):
    """Nulls are found 56 at a time, from any bit offset: at the edges, none, all, and one in three."""
    rng = np.random.default_rng(num_rows)
    for absent in (rng.random(num_rows) < 1 / 3, np.zeros(num_rows, bool), np.ones(num_rows, bool)):
        absent[[0, 54]] = True
        values = [None if gone else f"value {i}" for i, gone in enumerate(absent)]
        expected, column = hash_keys(values), build(values)
        for start in range(9):
            for stop in range(num_rows - 8, num_rows + 1):
                np.testing.assert_array_equal(hash_keys(column[start:stop]), expected[start:stop])


def test_arrow_codes_of_nulls_are_never_followed():
    codes = np.array([1, -7, 0, 127, 1], np.int8)
    present = np.packbits([1, 0, 1, 0, 1], bitorder="little")
    indices = arrow_from_buffers(pa.int8(), 5, present, codes)
    for words in (["a", "b"], [f"{i}" for i in range(100)]):
        column = pa.DictionaryArray.from_arrays(indices, words, safe=False)
        expected = hash_keys([words[1], None, words[0], None, words[1]])
        np.testing.assert_array_equal(hash_keys(column), expected)


@pytest.mark.parametrize("num_rows", [3, 2000])
def test_dictionaries_longer_than_the_column(num_rows):
    """A short batch of a long file doesn't hash the whole dictionary, and gets the same keys."""
    words = [f"word {i}" for i in range(1000)]
    codes = [(i * 617) % 1000 for i in range(num_rows)]
    expected = hash_keys([words[code] for code in codes])
    column = pa.DictionaryArray.from_arrays(pa.array(codes, pa.uint16()), words)
    np.testing.assert_array_equal(hash_keys(column), expected)
    np.testing.assert_array_equal(hash_keys(pd.Categorical.from_codes(codes, words)), expected)
    np.testing.assert_array_equal(hash_keys(pl.Series([words[c] for c in codes], dtype=pl.Enum(words))), expected)


def test_views_beyond_one_buffer():
    values = [("x" * n) * 100 + str(n) for n in range(300)]
    column = pl.concat([pl.Series(values[:200]), pl.Series(values[200:])]).gather(range(299, -1, -1))
    np.testing.assert_array_equal(hash_keys(column), hash_keys(values[::-1]))


def test_offsets_past_2_to_the_31():
    """The bytes of this large_string are 4 GiB into a buffer that is never touched before that."""
    num_bytes = 2**32 + 16
    data = np.zeros(num_bytes, np.uint8)
    data[2**32 :] = np.frombuffer(b"0123456789abcdef", np.uint8)
    offsets = np.array([2**32, 2**32 + 5, num_bytes], np.int64)
    column = pa.Array.from_buffers(pa.large_binary(), 2, [None, pa.py_buffer(offsets), pa.py_buffer(data)])
    np.testing.assert_array_equal(hash_keys(column), hash_keys([b"01234", b"56789abcdef"]))


TABLE = {"user": [17, 4, -1], "city": ["Paris", "Rome", "Paris"], "ad": ["x" * 50, None, ""]}


@pytest.mark.parametrize(
    "table",
    [
        pd.DataFrame(TABLE),
        pd.DataFrame(TABLE).astype({"city": "category"}),
        pl.DataFrame(TABLE),
        pa.table(TABLE),
        pa.concat_tables([pa.table(TABLE)[:1], pa.table(TABLE)[1:]]),
        pa.RecordBatch.from_pydict(TABLE),
    ],
    ids=lambda table: type(table).__module__ + "." + type(table).__name__,
)
def test_tables(table):
    keys = hash_fields(table)
    np.testing.assert_array_equal(keys, hash_fields(TABLE), strict=True)
    assert keys.flags.c_contiguous
    with pytest.raises(TypeError, match=f"got a {type(table).__name__}: use hash_fields"):
        hash_keys(table)


def arrow_from_buffers(arrow_type, length, *buffers, **children):
    raw = [None if b is None else pa.py_buffer(b) for b in buffers]
    return pa.Array.from_buffers(arrow_type, length, raw, **children)


def damaged_offsets(offsets, dtype, arrow_type):
    """Make an array whose offsets change after pyarrow has checked them."""
    shared = np.zeros(len(offsets), dtype)
    column = arrow_from_buffers(arrow_type, len(offsets) - 1, None, shared, b"0123456789")
    shared[:] = offsets
    return column


def damaged_codes(codes):
    return pa.DictionaryArray.from_arrays(pa.array(codes), ["a", "b"], safe=False)


BAD_COLUMNS = {
    "float": (lambda: pa.array([1.5]), TypeError, "double values.*bin floats"),
    "empty float": (lambda: pa.array([], pa.float32()), TypeError, "float values.*bin floats"),
    "half": (lambda: pa.array([np.float16(1)]), TypeError, "halffloat values"),
    "no chunk": (lambda: pa.chunked_array([], pa.float64()), TypeError, "double values"),
    "date": (lambda: pa.array([1], pa.date32()), TypeError, r"date32\[day\] values.*cast"),
    "list": (lambda: pa.array([[1]]), TypeError, r"list<.*int64> values"),
    "dictionary of floats": (lambda: pa.array([1.5]).dictionary_encode(), TypeError, "dictionary<values=double"),
    "polars float": (lambda: pl.Series([1.5]), TypeError, "Float64 values.*bin floats"),
    "polars date": (lambda: pl.Series([1]).cast(pl.Date), TypeError, "Date values"),
    "polars list": (lambda: pl.Series([[1]]), TypeError, r"List\(Int64\) values"),
    "pandas float": (lambda: pd.Series([1.0, None]), TypeError, "float64 values.*bin floats"),
    "pandas Float64": (lambda: pd.Series([None], dtype="Float64"), TypeError, "Float64 values"),
    "pandas datetime": (lambda: pd.Series(pd.to_datetime(["2024-01-01"])), TypeError, "datetime64"),
    "pandas float category": (lambda: pd.Series([1.5]).astype("category"), TypeError, "float64 values"),
    "pandas float in object": (lambda: pd.Series([1, 1.5], dtype=object), TypeError, "float at position 1"),
    "falling offsets": (lambda: damaged_offsets([0, 4, 3, 9], np.int32, pa.string()), ValueError, "position 1 point"),
    "offset past the end": (lambda: damaged_offsets([0, 9, 4], np.int64, pa.large_string()), ValueError, "position 0"),
    "negative offset": (lambda: damaged_offsets([-1, 4], np.int32, pa.binary()), ValueError, "position 0 point"),
    "code past the dictionary": (lambda: damaged_codes([0, 1, 2]), ValueError, "position 2 point outside"),
    "negative code": (lambda: damaged_codes([0, -1]), ValueError, "position 1 point outside"),
}


@pytest.mark.parametrize("case", BAD_COLUMNS)
def test_bad_columns(case):
    build, error, message = BAD_COLUMNS[case]
    with pytest.raises(error, match=message):
        hash_keys(build())


@pytest.mark.skipif(int(pa.__version__.split(".")[0]) < 18, reason="this pyarrow cannot build views from buffers")
@pytest.mark.parametrize(
    "view", [(-1, 0, 0, 0), (13, 0, 1, 0), (13, 0, -1, 0), (13, 0, 0, 4), (13, 0, 0, -1)], ids=str
)
def test_views_outside_their_buffers(view):
    column = arrow_from_buffers(pa.string_view(), 1, None, np.array(view, np.int32), b"0123456789abcdef")
    with pytest.raises(ValueError, match="position 0 point outside"):
        hash_keys(column)


def test_fields_name_the_column_that_is_wrong():
    with pytest.raises(TypeError, match="field 'price': cannot hash double values"):
        hash_fields(pa.table({"user": [1], "price": [1.5]}))
    with pytest.raises(ValueError, match="two columns are named 'a'"):
        hash_fields(pd.DataFrame([[1, 2]], columns=["a", "a"]))
    with pytest.raises(ValueError, match="two columns are named 'a'"):
        hash_fields(pa.table([[1], [2]], names=["a", "a"]))
    with pytest.raises(TypeError, match="field names must be str, got int 0"):
        hash_fields(pd.DataFrame([[1]]))
    with pytest.raises(ValueError, match="field 'b' has 1 values but 'a' has 2"):
        hash_fields({"a": pl.Series([1, 2]), "b": pa.array([1])})


class Exporter:
    """A column of another library, with the Arrow PyCapsule interface, a length, and nothing else."""

    def __init__(self, column, length):
        self.column, self.length = column, length

    def __len__(self):
        return self.length

    def __arrow_c_stream__(self, requested_schema=None):
        return self.column.__arrow_c_stream__(requested_schema)


class ArrayExporter(Exporter):
    def __arrow_c_array__(self, requested_schema=None):
        return self.column.__arrow_c_array__(requested_schema)


def test_any_library_that_speaks_arrow():
    column = pa.array(STRINGS)
    expected = hash_keys(STRINGS)
    np.testing.assert_array_equal(hash_keys(Exporter(pa.chunked_array([column]), len(STRINGS))), expected)
    np.testing.assert_array_equal(hash_keys(ArrayExporter(column, len(STRINGS))), expected)


@pytest.mark.parametrize("length", [2, 4])
def test_a_wrong_length_is_an_error(length):
    with pytest.raises(ValueError, match=f"fit {length} keys|fill {length} keys"):
        hash_keys(Exporter(pa.chunked_array([[1, 2], [3]]), length))
    with pytest.raises(ValueError, match=f"fit {length} keys|fill {length} keys"):
        hash_keys(ArrayExporter(pa.array([1, 2, 3]), length))


class FailingExporter(Exporter):
    """A stream whose callback number `which` (get_schema, get_next) fails with EIO, as on a broken disk."""

    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(lambda stream, out: errno.EIO)
    which = 0

    def __arrow_c_stream__(self, requested_schema=None):
        capsule = self.column.__arrow_c_stream__(requested_schema)
        get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
        get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        stream = ctypes.cast(get_pointer(capsule, b"arrow_array_stream"), ctypes.POINTER(ctypes.c_void_p))
        stream[self.which] = ctypes.cast(self.callback, ctypes.c_void_p).value
        return capsule


@pytest.mark.parametrize("which", [0, 1])
def test_a_failing_stream_is_an_oserror(which):
    exporter = FailingExporter(pa.chunked_array([[1, 2]]), 2)
    exporter.which = which
    with pytest.raises(OSError, match="the Arrow stream failed") as caught:
        hash_keys(exporter)
    assert caught.value.errno == errno.EIO
