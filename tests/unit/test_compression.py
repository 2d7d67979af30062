"""Compressed tables, composed from rows of an ordinary one: their rows and gradients, and training a model on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hashemb
from examples.compressed_tables import FrequentRows, QuotientRemainder, keys_for_rows, most_frequent_keys
from hashemb.ctr.models import BIAS_FIELD, FactorizationMachine


def make(path: Path, rows: int, dim: int = 3, **options: Any) -> hashemb.EmbeddingTable:
    options.setdefault("optimizer", hashemb.SGD(lr=1.0))
    return hashemb.create(path / f"{rows}.emb", num_embeddings=rows, embedding_dim=dim, **options)


@pytest.mark.parametrize("rows", [1, 2, 3, 1000, 1 << 20, (1 << 32) - 1, 1 << 32])
@pytest.mark.parametrize("seed", [0, 12345])
def test_every_row_has_a_key(rows: int, seed: int, tmp_path: Path) -> None:
    wanted = np.unique(np.concatenate([np.arange(min(rows, 2000)), rows - 1 - np.arange(min(rows, 2000))]))
    with make(tmp_path, rows, 1, seed=seed) as table:
        assert np.array_equal(table.rows(keys_for_rows(table, wanted)), wanted)
        assert keys_for_rows(table, wanted[:0]).shape == (0,)


def test_rows_that_are_not_there(tmp_path: Path) -> None:
    with make(tmp_path, 10) as table:
        with pytest.raises(ValueError, match=r"rows must be in \[0, 10\), got 3 to 10"):
            keys_for_rows(table, [3, 10])
        with pytest.raises(ValueError, match=r"got -1 to 0"):
            keys_for_rows(table, [0, -1])
    with make(tmp_path, 11, num_hashes=2) as table, pytest.raises(ValueError, match="1 hash, this has 11 and 2"):
        keys_for_rows(table, [0])
    with make(tmp_path, (1 << 32) + 1) as table, pytest.raises(ValueError, match="this has 4294967297 and 1"):
        keys_for_rows(table, [0])


def test_most_frequent_keys() -> None:
    keys = np.repeat(np.array([7, 2**63, 5, 9], np.uint64), [3, 4, 1, 1])
    assert most_frequent_keys(keys, 3).tolist() == [2**63, 7, 5]
    assert most_frequent_keys(keys.reshape(3, 3), 10).tolist() == [2**63, 7, 5, 9]
    assert most_frequent_keys(keys[:0], 2).size == 0
    with pytest.raises(ValueError, match="at least 0, got -1"):
        most_frequent_keys(keys, -1)


def test_frequent_keys_share_no_row(tmp_path: Path) -> None:
    keys = np.random.default_rng(1).integers(0, 1 << 64, 5000, np.uint64)
    with make(tmp_path, 400) as table:
        small = FrequentRows(table, keys[:300])
        own, others = small.rows(keys[:300]), small.rows(keys[300:])
        assert small.num_own_rows == 301
        assert small.index_bytes == 4 * 301
        bias = small.rows(hashemb.hash_keys(["bias"], field=BIAS_FIELD))
        assert sorted([*own, *bias]) == list(range(301))
        assert set(others) == set(range(301, 400)), "the others use all that is left, and nothing else"
        assert small.rows(keys.reshape(50, 100)).shape == (50, 100)


def test_frequent_rows_are_rows_of_the_table(tmp_path: Path) -> None:
    keys = np.arange(20, dtype=np.uint64)
    with make(tmp_path, 16) as table:
        small = FrequentRows(table, keys[:5])
        before = small.lookup(keys)
        assert np.array_equal(before, table.lookup(keys_for_rows(table, small.rows(keys))))
        small.update(keys[:5], np.ones((5, 3), np.float32))
        assert np.array_equal(small.lookup(keys[:5]), before[:5] - 1.0)
        assert np.array_equal(small.lookup(keys[5:]), before[5:])


def test_what_frequent_rows_refuse(tmp_path: Path) -> None:
    keys = np.arange(10)
    with make(tmp_path, 11) as table:
        with pytest.raises(ValueError, match=r"11 keys with rows of their own .* leave no row .* table of 11"):
            FrequentRows(table, keys)
        with pytest.raises(ValueError, match="distinct, got 3 with 2 distinct"):
            FrequentRows(table, np.array([1, 1, 2]))
    with make(tmp_path, 12, num_hashes=2) as table, pytest.raises(ValueError, match="1 hash"):
        FrequentRows(table, keys)


@pytest.mark.parametrize("num_remainders", [None, 1, 30])
def test_pairs_of_rows(num_remainders: int | None, tmp_path: Path) -> None:
    keys = np.random.default_rng(2).integers(0, 1 << 64, (40, 25), np.uint64)
    with make(tmp_path, 31 if num_remainders == 30 else 60) as table:
        small = QuotientRemainder(table, num_remainders=num_remainders)
        remainders, quotients = small.rows(keys)
        assert remainders.shape == keys.shape
        assert set(remainders.flat) == set(range(small.num_remainders))
        assert set(quotients.flat) == set(range(small.num_remainders, table.num_embeddings))
        pairs = len(set(zip(remainders.flat, quotients.flat, strict=True)))
        possible = small.num_remainders * small.num_quotients
        assert pairs == pytest.approx(possible * (1 - np.exp(-keys.size / possible)), rel=0.1)
        r, q = table.lookup(keys_for_rows(table, small.rows(keys)))
        assert np.array_equal(small.lookup(keys), r * (1 + q))


def test_gradients_of_pairs_are_the_slopes(tmp_path: Path) -> None:
    """One SGD step with learning rate 1 subtracts the gradients, which are compared with differences of the loss."""
    keys = np.random.default_rng(3).integers(0, 1 << 64, 30, np.uint64)
    grads = np.random.default_rng(4).standard_normal((30, 3)).astype(np.float32)
    with make(tmp_path, 12, init=hashemb.Normal(0.5)) as table:
        small = QuotientRemainder(table)
        rows, before = small.rows(keys), table.lookup(keys_for_rows(table, np.arange(12))).astype(np.float64)

        def loss(weights: np.ndarray) -> float:
            return float((weights[rows[0]] * (1 + weights[rows[1]]) * grads).sum())

        small.update(keys, grads)
        moved = before - table.lookup(keys_for_rows(table, np.arange(12)))
    for row in range(12):
        for column in range(3):
            step = np.zeros((12, 3))
            step[row, column] = 1e-4
            slope = (loss(before + step) - loss(before - step)) / 2e-4
            assert moved[row, column] == pytest.approx(slope, abs=2e-5)


def test_what_pairs_refuse(tmp_path: Path) -> None:
    with make(tmp_path, 10) as table:
        for count in (0, 10):
            with pytest.raises(ValueError, match=rf"num_remainders must be in \[1, 10\).* got {count}"):
                QuotientRemainder(table, num_remainders=count)
    with make(tmp_path, 1) as table, pytest.raises(ValueError, match="got 0"):
        QuotientRemainder(table)
    with make(tmp_path, 12, num_hashes=3) as table, pytest.raises(ValueError, match="1 hash"):
        QuotientRemainder(table)


@pytest.mark.parametrize("kind", ["frequent", "pairs"])
def test_a_model_learns_on_fewer_rows_than_values(kind: str, tmp_path: Path) -> None:
    """Labels are the parity of 200 values, a few of them popular; the rows represent more of them than by one hash."""
    rng = np.random.default_rng(5)
    popular = np.minimum(rng.zipf(1.3, 6000) - 1, 199)
    keys = hashemb.hash_fields({"a": popular, "b": rng.integers(0, 3, 6000)})
    labels = (popular % 2).astype(np.float32)
    losses = {}
    for name in ("hashed", kind):
        with make(tmp_path, 33 if name == "hashed" else 34, 1, optimizer=hashemb.Adagrad(lr=0.5)) as table:
            frequent = most_frequent_keys(keys, 25)
            store: Any = table
            if name != "hashed":
                store = FrequentRows(table, frequent) if kind == "frequent" else QuotientRemainder(table)
            model = FactorizationMachine(store)
            for start in range(0, 6000, 100):
                model.learn(keys[start : start + 100], labels[start : start + 100])
            p = model.predict_proba(keys)
            losses[name] = float(-np.log(np.where(labels == 1, p, 1 - p)).mean())
    assert losses[kind] < {"frequent": 0.7, "pairs": 0.9}[kind] * losses["hashed"], losses
