"""`keys_of_rows` inverts `EmbeddingTable.rows`, and `sample_rows` returns rows that have been written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hashemb
from hashemb._random import fmix64, unfmix64
from hashemb.errors import ClosedTableError


def create(path: Path, **options: Any) -> hashemb.EmbeddingTable:
    return hashemb.create(path, **{"num_embeddings": 5000, "embedding_dim": 4, **options})


@pytest.mark.parametrize("num_embeddings", [1, 2, 3, 1000, 2**20, 2**32, 2**32 + 1, 2**40 + 7])
def test_keys_lead_back_to_their_rows(tmp_path: Path, num_embeddings: int) -> None:
    rng = np.random.default_rng(num_embeddings)
    rows = np.concatenate([[0, num_embeddings - 1], rng.integers(0, num_embeddings, 500)]).reshape(2, -1)
    with create(tmp_path / "t", num_embeddings=num_embeddings, embedding_dim=1, seed=3) as table:
        keys = hashemb.keys_of_rows(table, rows)
        assert keys.dtype == np.uint64
        np.testing.assert_array_equal(table.rows(keys), rows)
        assert hashemb.keys_of_rows(table, []).shape == (0,)


@given(st.lists(st.integers(0, 2**64 - 1), max_size=20))
def test_the_finaliser_is_inverted(values: list[int]) -> None:
    x = np.array(values, np.uint64)
    np.testing.assert_array_equal(unfmix64(fmix64(x.copy())), x)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([5000], ValueError, r"rows must be in \[0, 5000\), got 5000 to 5000"),
        ([-1, 3], ValueError, r"rows must be in \[0, 5000\), got -1 to 3"),
        ([2**63], ValueError, "rows must be in"),
        ([1.0], TypeError, "rows must be integers, got dtype float64"),
        (["a"], TypeError, "rows must be integers"),
    ],
)
def test_rows_that_are_none(tmp_path: Path, rows: list[Any], error: type[Exception], message: str) -> None:
    with create(tmp_path / "t") as table, pytest.raises(error, match=message):
        hashemb.keys_of_rows(table, rows)


def test_a_table_of_several_hashes_has_no_such_keys(tmp_path: Path) -> None:
    with create(tmp_path / "t", num_hashes=2) as table, pytest.raises(ValueError, match="a table with 2 hashes"):
        hashemb.keys_of_rows(table, [0])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_sample_of_all_rows(tmp_path: Path, dtype: str, mode: Any) -> None:
    keys = np.arange(700)
    with create(tmp_path / "t", dtype=dtype) as table:
        assert hashemb.sample_rows(table).is_complete
        assert hashemb.sample_rows(table).values.shape == (0, 4)
        table.update(keys, np.random.default_rng(0).normal(size=(700, 4)).astype(np.float32))
        vectors, written = table.lookup(keys), np.unique(table.rows(keys))
    with hashemb.open(tmp_path / "t", mode) as table:
        sample = hashemb.sample_rows(table)
        np.testing.assert_array_equal(sample.rows, written)
        assert sample.is_complete
        assert sample.values.dtype == np.float32
        np.testing.assert_array_equal(table.lookup(hashemb.keys_of_rows(table, sample.rows)), sample.values)
        where = np.searchsorted(sample.rows, table.rows(keys))
        np.testing.assert_array_equal(sample.values[where], vectors)


def test_a_sample_is_evenly_spaced(tmp_path: Path) -> None:
    with create(tmp_path / "t", num_embeddings=100_000) as table:
        table.update(np.arange(200_000), np.ones((200_000, 4), np.float32))
        for limits in ({"max_rows": 100}, {"max_blocks": 20}):
            sample = hashemb.sample_rows(table, **limits)
            assert not sample.is_complete
            assert 100 <= len(sample.rows) <= 20 * 256
            assert sample.rows[0] < 2000
            assert sample.rows[-1] > 98_000
            assert (np.diff(sample.rows) > 0).all()
    with pytest.raises(ClosedTableError):
        hashemb.sample_rows(table)
