"""Tables of every library give the same keys, and anything that is not a table is refused with the reason."""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("pyarrow")
pytest.importorskip("pandas")
pytest.importorskip("polars")

import pandas as pd
import polars as pl
import pyarrow as pa

import hashemb
from hashemb.ctr.data import encode
from hashemb.sklearn._columns import read_columns
from hashemb.sklearn._kinds import encode_columns, infer_kinds, num_keys
from hashemb.sklearn._splines import between_knots

CONTENT: dict[str, list[Any]] = {
    "user": [17, 4, -17, 2**62],
    "site": ["a.com", "ß", "", "a.com"],
    "price": [0.5, float("nan"), -3.0, 1e300],
    "mobile": [True, False, True, True],
    "seen": [datetime.datetime(2024, 5, 1, 12), datetime.datetime(1969, 1, 1), None, datetime.datetime(2024, 5, 1, 12)],
    "day": [datetime.date(2024, 5, 1), None, datetime.date(1970, 1, 1), datetime.date(2024, 5, 1)],
    "clicks": [3, None, 5, 0],
}


def keys_of(table: Any, **listed: Any) -> tuple[np.ndarray, np.ndarray | None]:
    columns = read_columns(table)
    return encode_columns(columns, infer_kinds(columns, **listed))


def pandas_nullable() -> Any:
    frame = pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in CONTENT.items()})
    return frame.astype({"user": "Int64", "site": "string", "price": "Float64", "mobile": "boolean", "clicks": "Int64"})


def pandas_numpy() -> Any:
    frame = pd.DataFrame(CONTENT)
    return frame.assign(clicks=pd.array(CONTENT["clicks"], dtype="Int64"), site=frame["site"].astype("category"))


MAKERS: dict[str, Callable[[], Any]] = {
    "lists": lambda: CONTENT,
    "arrow": lambda: pa.table(CONTENT),
    "batch": lambda: pa.RecordBatch.from_pydict(CONTENT),
    "chunks": lambda: pa.concat_tables([pa.table(CONTENT).slice(0, 1), pa.table(CONTENT).slice(1)]),
    "polars": lambda: pl.DataFrame(CONTENT, strict=False),
    "polars categories": lambda: pl.DataFrame(CONTENT, strict=False).with_columns(pl.col("site").cast(pl.Categorical)),
    "pandas nullable": pandas_nullable,
    "pandas": pandas_numpy,
    "pandas arrow": lambda: pa.table(CONTENT).to_pandas(types_mapper=pd.ArrowDtype),
    "pandas rows in another order": lambda: pandas_numpy().iloc[::-1].iloc[::-1],
    "object arrays": lambda: {name: np.array(values, dtype=object) for name, values in CONTENT.items()},
}


@pytest.mark.parametrize("library", MAKERS)
def test_the_same_values_have_the_same_keys(library: str) -> None:
    expected, shares = keys_of(CONTENT)
    assert len(np.unique(expected)) > 15, "the content has too few distinct values to show anything"
    keys, values = keys_of(MAKERS[library]())
    np.testing.assert_array_equal(keys, expected)
    np.testing.assert_array_equal(values, shares)


def test_categories_have_the_keys_that_readers_give_them() -> None:
    names = ["user", "site", "mobile", "clicks"]
    table = pa.table({name: CONTENT[name] for name in names})
    keys, values = keys_of(table)
    schema = {"user": "integer", "site": "string", "mobile": "integer", "clicks": "integer"}
    expected = encode({name: table[name].combine_chunks() for name in names}, schema)
    assert values is None
    np.testing.assert_array_equal(keys, expected)


def test_kinds_of_a_training_command_are_read_as_buckets() -> None:
    table = pa.table({"age": [33, None], "price": [0.5, None]})
    kinds = {"age": "count", "price": "float"}
    keys, values = encode_columns(read_columns(table), kinds)
    assert values is None
    expected = encode({name: table[name].combine_chunks() for name in kinds}, kinds)
    np.testing.assert_array_equal(keys, expected)


def test_a_matrix_is_columns_x0_x1() -> None:
    matrix = np.asfortranarray([[1, 2], [3, 4]], dtype=">i4")
    matrix.flags.writeable = False
    keys, values = keys_of(matrix)
    assert values is None
    np.testing.assert_array_equal(keys, hashemb.hash_fields({"x0": [1, 3], "x1": [2, 4]}))
    np.testing.assert_array_equal(keys_of(matrix.tolist())[0], keys)
    np.testing.assert_array_equal(keys_of(pd.DataFrame(matrix.astype(int)))[0], keys)  # integers are not used as names


def test_rows_of_several_types_keep_them() -> None:
    keys, _ = keys_of([["a", 1], ["b", 2]])
    np.testing.assert_array_equal(keys, hashemb.hash_fields({"x0": ["a", "b"], "x1": [1, 2]}))


def test_strings_beside_integers_are_each_what_they_are() -> None:
    keys, _ = keys_of({"page": [5, "5", None, b"5"]})
    np.testing.assert_array_equal(keys[:, 0], hashemb.hash_keys([5, "5", None, b"5"], field="page"))
    assert keys[0, 0] != keys[1, 0]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns", "m", "D"])
def test_an_instant_has_one_key_in_every_unit(unit: str) -> None:
    instants = np.array(["2024-05-01", "NaT", "1969-12-31"], dtype=f"M8[{unit}]")
    microseconds = [1714521600 * 10**6, None, -86400 * 10**6]
    np.testing.assert_array_equal(keys_of({"t": instants})[0][:, 0], hashemb.hash_keys(microseconds, field="t"))


def test_instants_are_those_of_utc() -> None:
    aware = pd.Series(pd.to_datetime(["2024-05-01 02:00", None])).dt.tz_localize("Europe/Berlin")
    naive = pd.Series(pd.to_datetime(["2024-05-01 00:00", None]))
    np.testing.assert_array_equal(keys_of({"t": aware})[0], keys_of({"t": naive})[0])


def test_durations_times_and_decimals() -> None:
    keys, _ = keys_of({"t": [datetime.time(0, 0, 1)], "d": [datetime.timedelta(seconds=2)]})
    np.testing.assert_array_equal(keys, hashemb.hash_fields({"t": [10**6], "d": [2 * 10**6]}))
    exact, _ = keys_of({"x": [decimal.Decimal("1.50"), decimal.Decimal("2.25")]})
    np.testing.assert_array_equal(exact, keys_of({"x": [1.5, 2.25]})[0])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble])
def test_numbers_are_shared_by_knots_whatever_their_width(dtype: Any) -> None:
    keys, values = keys_of(np.array([[0.75], [np.nan], [-5.0]], dtype=dtype))
    expected, shares = keys_of({"x0": [0.75, None, -5.0]})
    np.testing.assert_array_equal(keys, expected)
    np.testing.assert_array_equal(values, shares)
    np.testing.assert_array_equal(keys[1], np.repeat(hashemb.hash_keys([None], field="x0"), 2))
    np.testing.assert_array_equal(values, np.float32([[0.5, 0.5], [1, 0], [0.25, 0.75]]))


def test_knots_are_powers_of_two_and_shares_interpolate() -> None:
    random = np.random.default_rng(0)
    x = np.concatenate([random.normal(size=500) * 10.0 ** random.integers(-300, 300, 500), 2.0 ** np.arange(-50, 50)])
    knots, shares = between_knots(x)
    positions = np.where(knots == 0, 0.0, np.sign(knots) * 2.0 ** (np.abs(knots) - 1100.0 - 1.0))
    np.testing.assert_allclose(np.sum(positions * shares, axis=1), x, rtol=1e-6)
    assert (shares >= 0.0).all()
    np.testing.assert_array_equal(shares.sum(axis=1), 1.0)
    assert (knots[:, 0] % 2 == 0).all()
    assert (np.abs(knots[:, 1] - knots[:, 0]) == 1).all()


def test_knots_at_the_ends_of_the_numbers() -> None:
    knots, shares = between_knots([0.0, -0.0, 5e-324, np.finfo(float).max, np.inf, -np.inf, np.nan])
    assert (knots[[0, 1, 6]] == 0).all()
    ends = [knots[i, int(np.argmax(shares[i]))] for i in range(7)]
    assert ends[3] == ends[4] == -ends[5] == 1100 + 1025  # in float32 the largest number is the next power of two
    assert ends[2] == 1100 - 1073
    assert np.isfinite(shares).all()


def test_listed_columns() -> None:
    table = {"id": [1.0, None, 3.0], "age": [33, 34, None], "price": [0.5, 1.0, 2.0]}
    columns = read_columns(table)
    kinds = infer_kinds(columns, categorical=["id"], numeric=[1])
    assert kinds == {"id": "integer", "age": "number", "price": "number"}
    assert num_keys(kinds) == 5
    keys, _ = encode_columns(columns, kinds)
    np.testing.assert_array_equal(keys[:, 0], hashemb.hash_keys([1, None, 3], field="id"))


def test_ids_that_became_floats_later_keep_their_keys() -> None:
    kinds = infer_kinds(read_columns({"id": [1, 2]}))
    keys, _ = encode_columns(read_columns(pd.DataFrame({"id": [2, None]})), kinds)
    np.testing.assert_array_equal(keys[:, 0], hashemb.hash_keys([2, None], field="id"))


@pytest.mark.parametrize("kind", ["string", "integer", "count", "float", "number", "mixed"])
def test_a_column_may_be_missing_altogether(kind: str) -> None:
    missing = hashemb.hash_keys([None], field="a")[0]
    for column in ([None, None], pa.nulls(2)):
        assert (encode_columns(read_columns({"a": column}), {"a": kind})[0] == missing).all()


BAD_TABLES: list[tuple[Any, type[Exception], str]] = [
    (np.zeros(3), ValueError, "Reshape your data"),
    (np.zeros((2, 2, 2)), ValueError, "got 3D array"),
    (np.zeros((4, 0)), ValueError, r"0 feature\(s\) \(shape=\(4, 0\)\)"),
    ({}, ValueError, r"0 feature\(s\)"),
    (np.zeros((2, 2), complex), ValueError, "Complex data not supported"),
    ({"z": np.zeros(2, complex)}, ValueError, "Complex data not supported: column 'z'"),
    ({"a": [1, 2], "b": [1]}, ValueError, "column 'b' has 1 values but 'a' has 2"),
    ({"a": np.zeros((2, 2))}, ValueError, "column 'a' must have one dimension"),
    ({"a": [1], 3: [1]}, TypeError, "string names, but one of them is 3"),
    ({"a": [{"b": 1}]}, TypeError, "column 'a' holds struct.*must be a string or a number"),
    ({"a": ["x", 1.5]}, TypeError, "must be a string or a number"),
    ({"a": ["x", object()]}, TypeError, "must be a string or a number"),
    ({"a": [[1], [2, 3]]}, TypeError, "column 'a' holds list"),
]


@pytest.mark.parametrize(("table", "error", "message"), BAD_TABLES)
def test_what_is_no_table_is_refused(table: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        keys_of(table)


def test_two_columns_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two columns are named 'a'"):
        read_columns(pd.DataFrame(np.zeros((2, 2)), columns=["a", "a"]))


@pytest.mark.parametrize(
    ("listed", "error", "message"),
    [
        ({"numeric": ["b"]}, TypeError, "'b' is in numeric_features and holds string values"),
        ({"numeric": ["c"]}, ValueError, "no column 'c' among the 2"),
        ({"numeric": [2]}, ValueError, "no column 2 among the 2"),
        ({"numeric": "a"}, TypeError, "must be a list of columns, got 'a'"),
        ({"categorical": [0.5]}, TypeError, "names or positions"),
        ({"categorical": ["a"], "numeric": [0]}, ValueError, "'a' is in categorical_features and in numeric"),
        ({"categorical": ["a"]}, ValueError, "'a' holds ids, and .*1.5.* in row 1"),
    ],
)
def test_wrong_lists_are_refused(listed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        keys_of({"a": [1.0, 1.5], "b": ["x", "y"]}, **listed)


@pytest.mark.parametrize(
    ("kind", "column", "message"),
    [
        ("integer", ["7"], "'a' held integers when the model was fitted, now it holds string values"),
        ("number", ["7"], "held numbers"),
        ("string", [7], "held strings when the model was fitted, now it holds int64 values"),
        ("string", ["x", 7], "objects of several types"),
        ("mixed", [1.5], "now floats"),
    ],
)
def test_a_column_must_stay_what_it_was(kind: str, column: list[Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        encode_columns(read_columns({"a": column}), {"a": kind})
