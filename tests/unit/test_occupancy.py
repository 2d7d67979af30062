"""Keys that share rows, counted one by one, and norms of exactly the rows that were written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hashemb
from hashemb.ctr.data import Batch
from hashemb.ctr.report.occupancy import KeyCensus, row_norms
from hashemb.stats import collision_rate


def keys_of(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return hashemb.hash_fields({"a": rng.integers(0, 300, n), "b": rng.integers(0, 40, n)})


def learned(path: Path, keys: np.ndarray, **options: Any) -> hashemb.EmbeddingTable:
    settings = {"num_embeddings": 1000, "embedding_dim": 4, "optimizer": hashemb.Adagrad(lr=0.1)} | options
    table = hashemb.create(path, **settings)
    for _ in range(3):
        table.update(keys, np.random.default_rng(1).normal(size=(*keys.shape, table.embedding_dim)))
    return table


@pytest.mark.parametrize("num_hashes", [1, 2])
def test_collisions_counted_one_by_one(tmp_path: Path, num_hashes: int) -> None:
    keys = keys_of(2000)
    with learned(tmp_path / "t", keys[:1], num_hashes=num_hashes, num_embeddings=500) as table:
        census = KeyCensus(["a", "b"])
        for part in np.array_split(keys, 7):
            census.add(Batch(None, part))
        distinct = [np.unique(column) for column in keys.T]
        rows = {int(key): table.rows(np.uint64(key)).reshape(-1).tolist() for key in np.concatenate(distinct)}
        users = Counter(row for mine in rows.values() for row in set(mine))
        for column, field in zip(distinct, census.collisions(table), strict=True):
            sharing = sum(all(users[row] > 1 for row in rows[int(key)]) for key in column)
            assert (field.distinct_keys, field.sharing_keys) == (len(column), sharing)
            assert field.rate == sharing / len(column)
        assert sum(field.sharing_keys for field in census.collisions(table)) > 20


def test_what_is_expected_is_what_is_counted(tmp_path: Path) -> None:
    keys = keys_of(5000)
    with learned(tmp_path / "t", keys) as table:
        census = KeyCensus(["a", "b"])
        census.add(Batch(None, keys))
        counted = census.collisions(table)
        rate = sum(field.sharing_keys for field in counted) / sum(field.distinct_keys for field in counted)
        assert rate == pytest.approx(table.stats().collision_rate, abs=0.06)
        assert rate == pytest.approx(collision_rate(340, 1000), abs=0.06)
        assert 0.2 < rate < 0.4


def test_a_key_of_two_fields_shares_no_row_with_itself(tmp_path: Path) -> None:
    with learned(tmp_path / "t", keys_of(1), num_embeddings=2**33) as table:
        census = KeyCensus(["a", "b", "empty"])
        census.add(Batch(None, np.array([1, 2, 1, 3], np.uint64), np.array([0, 2, 4]), None, np.int32([0, 0, 1, 1])))
        assert [tuple(field) for field in census.collisions(table)] == [("a", 2, 0), ("b", 2, 0), ("empty", 0, 0)]
        assert census.collisions(table)[2].rate == 0.0


def test_the_census_merges_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hashemb.ctr.report.occupancy._PENDING_KEYS", 50)
    keys, census = keys_of(1000), KeyCensus(["a", "b"])
    for part in np.array_split(keys, 40):
        census.add(Batch(None, part))
    for column, found in zip(keys.T, census.distinct(), strict=True):
        np.testing.assert_array_equal(found, np.unique(column))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("num_embeddings", [1000, 2**36 + 7])
def test_norms_are_those_of_the_rows_written(
    tmp_path: Path, dtype: str, weight_decay: float, num_embeddings: int
) -> None:
    """Norms include the decay that rows owe. A table of 2**36 rows that is nearly all holes takes no longer."""
    keys = keys_of(400)
    adagrad = hashemb.Adagrad(lr=0.1, weight_decay=weight_decay)
    with learned(tmp_path / "t", keys, dtype=dtype, num_embeddings=num_embeddings, optimizer=adagrad) as table:
        for _ in range(5):
            table.update(keys[:1], np.ones((1, 2, 4)))  # the other rows owe more by now
        one_each = np.unique(table.rows(keys), return_index=True)[1]
        expected = np.linalg.norm(table.lookup(keys.reshape(-1)[one_each]), axis=1)
        found = row_norms(table)
        assert not found.sampled
        assert not found.as_stored
        np.testing.assert_allclose(np.sort(found.norms), np.sort(expected), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_with_two_hashes_are_those_stored(tmp_path: Path, dtype: str) -> None:
    keys = keys_of(400)
    adagrad = hashemb.Adagrad(lr=0.1, weight_decay=0.05)
    with learned(tmp_path / "t", keys, num_hashes=2, dtype=dtype, optimizer=adagrad) as table:
        rows = np.unique(table.rows(keys))
        stored = table.weight[rows]
        wide = stored if dtype == "float32" else (stored.astype(np.uint32) << 16).view(np.float32)
        found = row_norms(table)
        assert found.as_stored
        np.testing.assert_allclose(np.sort(found.norms), np.sort(np.linalg.norm(wide, axis=1)), rtol=1e-6)


def test_a_sample_is_taken_of_many_rows(tmp_path: Path) -> None:
    keys = np.arange(20_000, dtype=np.uint64)
    with learned(tmp_path / "t", keys, num_embeddings=50_000) as table:
        whole, of_rows, of_blocks = row_norms(table), row_norms(table, max_rows=2000), row_norms(table, max_blocks=8)
        assert [norms.sampled for norms in (whole, of_rows, of_blocks)] == [False, True, True]
        assert len(of_rows.norms) == 2000
        assert 200 < len(of_blocks.norms) < 2048
        for sample in (of_rows, of_blocks):
            assert np.median(sample.norms) == pytest.approx(np.median(whole.norms), rel=0.1)
        assert len(whole.norms) == table.stats(exact=True).rows_touched


def test_norms_of_an_untouched_table(tmp_path: Path) -> None:
    with hashemb.create(tmp_path / "t", num_embeddings=2**33, embedding_dim=4) as table:
        assert len(row_norms(table).norms) == 0
