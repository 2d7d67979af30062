"""Generators of batches: keys at the limits of every integer type, duplicates, collisions, empty bags.

Gradients and weights are multiples of 1/8 and 1/4: float32 represents them exactly, so that a sum that cancels is 0
in every arithmetic and a model in float64 stays comparable. test_strategies.py asserts that the draws are diverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from hashemb import FTRL, SGD, Adagrad, Normal, RowWiseAdagrad, Uniform, Zeros, reference

#: 0, -1, and both sides of the limits of float32, int32, uint32, float64 and int64; -2**63 is 2**63 as a uint64.
EXTREME_KEYS = [
    *(0, 1, -1, 2**24 - 1, 2**24, 2**24 + 1, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1),
    *(2**32 - 1, 2**32, 2**53 + 1, 2**63 - 1, -(2**63)),
]
POOLINGS = ["sum", "mean", "sqrtn"]

OPTIMIZERS = [
    Adagrad(lr=0.25),
    Adagrad(lr=0.1, eps=1e-3, initial_accumulator_value=0.5, weight_decay=0.25),
    RowWiseAdagrad(lr=0.25, eps=1e-6),
    RowWiseAdagrad(lr=0.1, weight_decay=0.5),
    SGD(lr=0.05),
    SGD(lr=0.05, weight_decay=1.0),
    FTRL(alpha=0.2, beta=1.0, l1=0.25, l2=0.5),
]
INITIALIZERS = [Uniform(0.5), Normal(0.25), Zeros()]


@dataclass(frozen=True)
class Batch:
    """The arguments of one pooled or plain call: `call` has its keywords, `grads` the gradient of its result."""

    keys: npt.NDArray[np.int64]
    grads: npt.NDArray[np.float32]
    call: dict[str, Any]

    def __repr__(self) -> str:
        return f"Batch(keys={self.keys.tolist()}, grads={self.grads.tolist()}, call={self.call})"


def colliding_keys(count: int, *, num_embeddings: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Return different keys that share row 0 of a small table, found by trying keys in turn."""
    tried = np.arange(10_000, 10_000 + 40 * count * num_embeddings, dtype=np.int64)
    found = tried[reference.rows(tried, num_embeddings=num_embeddings, seed=seed)[:, 0] == 0][:count]
    assert len(found) == count, f"{len(found)} of {count} keys share a row of {num_embeddings}"
    return found


def keys() -> st.SearchStrategy[int]:
    """Draw a key as a signed 64-bit integer: often small (hence repeated), often extreme, sometimes arbitrary."""
    return st.one_of(
        st.integers(-3, 12),
        st.sampled_from(EXTREME_KEYS),
        st.integers(-(2**63), 2**63 - 1),
    )


def key_arrays(max_size: int = 24) -> st.SearchStrategy[npt.NDArray[np.int64]]:
    return st.lists(keys(), max_size=max_size).map(lambda values: np.array(values, np.int64))


def gradients(shape: tuple[int, int]) -> st.SearchStrategy[npt.NDArray[np.float32]]:
    size = shape[0] * shape[1]
    eighths = st.lists(st.integers(-16, 16), min_size=size, max_size=size)
    return eighths.map(lambda values: (np.array(values, np.float32) / 8).reshape(shape))


@st.composite
def bag_calls(draw: st.DrawFn, num_keys: int) -> dict[str, Any]:
    """Draw offsets, pooling and per_sample_weights for `num_keys` keys, with empty bags and with no bag at all."""
    cuts = sorted(draw(st.lists(st.integers(0, num_keys), max_size=6)))
    offsets = np.array([0, *cuts, num_keys] if num_keys or draw(st.booleans()) else [0], np.int64)
    weights = None
    if draw(st.booleans()):
        quarters = draw(st.lists(st.integers(-6, 9), min_size=num_keys, max_size=num_keys))
        weights = np.array(quarters, np.float32) / 4
    return {"offsets": offsets, "pooling": draw(st.sampled_from(POOLINGS)), "per_sample_weights": weights}


@st.composite
def batches(draw: st.DrawFn, dim: int, *, pooled: bool, max_size: int = 24) -> Batch:
    array = draw(key_arrays(max_size))
    call = draw(bag_calls(len(array))) if pooled else {}
    num_results = len(call["offsets"]) - 1 if pooled else len(array)
    return Batch(array, draw(gradients((num_results, dim))), call)


def table_options() -> st.SearchStrategy[dict[str, Any]]:
    """Draw the arguments of a small table, from one row (where all keys collide) to more rows than keys."""
    return st.fixed_dictionaries(
        {
            "num_embeddings": st.sampled_from([1, 2, 13, 257, 5000]),
            "embedding_dim": st.sampled_from([1, 2, 3, 5, 16, 17]),
            "optimizer": st.sampled_from(OPTIMIZERS),
            "init": st.sampled_from(INITIALIZERS),
            "num_hashes": st.sampled_from([1, 2, 3]),
            "seed": st.sampled_from([0, 1, 2**64 - 1]),
        }
    )


def random_stream(
    num_batches: int, batch_size: int, dim: int, *, seed: int, num_embeddings: int
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """Yield batches of keys and gradients from a fixed seed; they are asserted to contain every extreme key."""
    rng = np.random.default_rng(seed)
    pool = np.concatenate([EXTREME_KEYS, colliding_keys(4, num_embeddings=num_embeddings), rng.integers(0, 60, 60)])
    stream = []
    for number in range(num_batches):
        size = 0 if number == num_batches // 2 else batch_size
        array = rng.choice(pool, size)
        stream.append((array, rng.normal(size=(size, dim)).astype(np.float32)))
    drawn = [array for array, _ in stream]
    everything = np.concatenate(drawn)
    rows = reference.rows(np.unique(everything), num_embeddings=num_embeddings)
    assert set(EXTREME_KEYS) <= set(everything.tolist()), "a border was never drawn: make the stream longer"
    assert any(len(np.unique(array)) < len(array) for array in drawn), "no batch repeats a key"
    assert len(np.unique(rows)) < len(rows), "no two keys collide"
    return stream
