"""The generators are diverse: a test that never draws a collision or an empty bag proves nothing about them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import strategies as own
from hypothesis import given, settings
from hypothesis import strategies as st

from hashemb import reference


def draws(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    """Return `count` examples that hypothesis draws from a strategy."""
    found: list[Any] = []

    @settings(max_examples=count, database=None)
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    assert len(found) >= count // 2
    return found


def test_keys_reach_every_border() -> None:
    drawn = Counter(key for array in draws(own.key_arrays(), 300) for key in array.tolist())
    assert set(own.EXTREME_KEYS) <= set(drawn)
    assert len(drawn) > 100, "mostly the same keys"
    assert sum(-3 <= key <= 12 for key in drawn.elements()) > 300, "too few keys that repeat"


def test_batches_hold_what_goes_wrong() -> None:
    batches = draws(own.batches(3, pooled=True), 300)
    bags = [np.diff(batch.call["offsets"]) for batch in batches]
    seen = {
        "empty batch": sum(len(b.keys) == 0 for b in batches),
        "no bag": sum(len(sizes) == 0 for sizes in bags),
        "empty bag beside full ones": sum(bool((sizes == 0).any() and sizes.any()) for sizes in bags),
        "repeated key": sum(len(np.unique(b.keys)) < len(b.keys) for b in batches),
        "zero gradient": sum(bool((b.grads == 0).any()) for b in batches),
        "weights": sum(b.call["per_sample_weights"] is not None for b in batches),
        "no weights": sum(b.call["per_sample_weights"] is None for b in batches),
        "negative weight": sum(
            b.call["per_sample_weights"] is not None and bool((b.call["per_sample_weights"] < 0).any()) for b in batches
        ),
        **{pooling: sum(b.call["pooling"] == pooling for b in batches) for pooling in own.POOLINGS},
    }
    assert min(seen.values()) >= 5, seen


def test_plain_batches_collide_in_small_tables() -> None:
    batches = draws(own.batches(1, pooled=False), 100)
    collisions = 0
    for batch in batches:
        keys = np.unique(batch.keys)
        collisions += len(np.unique(reference.rows(keys, num_embeddings=13))) < len(keys)
    assert collisions > 20


def test_options_vary() -> None:
    options = draws(own.table_options(), 150)
    for name, wanted in {"num_embeddings": 5, "embedding_dim": 6, "num_hashes": 3, "seed": 3, "init": 3}.items():
        assert len({option[name] for option in options}) == wanted, name
    assert {option["optimizer"] for option in options} == set(own.OPTIMIZERS)


@pytest.mark.parametrize("num_embeddings", [1, 13, 257])
def test_colliding_keys_collide(num_embeddings: int) -> None:
    keys = own.colliding_keys(5, num_embeddings=num_embeddings, seed=3)
    assert len(np.unique(keys)) == 5
    assert reference.rows(keys, num_embeddings=num_embeddings, seed=3).tolist() == [[0]] * 5


def test_canary_stream() -> None:
    """A stream that is too short for all extreme keys is refused."""
    with pytest.raises(AssertionError, match="a border was never drawn"):
        own.random_stream(2, 5, 1, seed=0, num_embeddings=50)
    assert len(own.random_stream(10, 64, 1, seed=0, num_embeddings=50)) == 10
