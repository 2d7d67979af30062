"""Key streams, warm tables, and the judge: the correct result of a look-up or an update in a few lines of NumPy."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import hashemb
from bench.harness import Mismatch
from hashemb import reference

Keys = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

LR, EPS = 0.01, 1e-10
FILL_ROWS = 1 << 18  # rows written in one call when a table is filled
OPTIMIZERS = {
    "rowwise_adagrad": hashemb.RowWiseAdagrad(lr=LR, eps=EPS),
    "adagrad": hashemb.Adagrad(lr=LR, eps=EPS),
}


@dataclass(frozen=True)
class Case:
    """One case of a grid. A batch has `batch` samples of `fields` features with `bag` keys each."""

    rows: int
    dim: int
    batch: int = 4096
    fields: int = 26
    bag: int = 1
    distribution: str = "uniform"
    threads: int = 1
    dtype: str = "float32"
    optimizer: str = "rowwise_adagrad"

    @property
    def num_keys(self) -> int:
        return self.batch * self.fields * self.bag

    @property
    def num_vectors(self) -> int:
        return self.batch * self.fields


# ---- keys ----


def keys_for(case: Case, number: int) -> Keys:
    """Return batch `number` of raw 64-bit keys, (batch, fields, bag): uniform, or Zipf with exponent 1.2 per field."""
    shape = (case.batch, case.fields, case.bag)
    rng = np.random.default_rng([2024, number])
    if case.distribution == "uniform":
        return rng.integers(0, 1 << 64, shape, np.uint64)
    if case.distribution != "zipf1.2":
        raise ValueError(f"distribution must be uniform or zipf1.2, got {case.distribution!r}")
    ranks = zipf_ranks(rng.random(shape), case.rows // case.fields, 1.2)
    values = ranks * np.uint64(case.fields) + np.arange(case.fields, dtype=np.uint64)[None, :, None]
    keys: Keys = reference.fmix64(values + np.uint64(1))
    return keys


def zipf_ranks(uniform: npt.NDArray[np.float64], n: int, exponent: float) -> Keys:
    """Draw ranks 0 … n - 1 by inverting the continuous power law on [1, n + 1): P(rank) falls as rank ** -exponent."""
    low = (n + 1.0) ** (1.0 - exponent)
    x = (uniform * (low - 1.0) + 1.0) ** (1.0 / (1.0 - exponent))
    return np.minimum(x.astype(np.uint64) - np.uint64(1), np.uint64(n - 1))


def keys_of_rows(rows: npt.NDArray[Any], num_rows: int, seed: int = 0) -> Keys:
    """Return a key for each row of a table of 2**b rows: the inverse of the finaliser applied to the first hash."""
    bits = num_rows.bit_length() - 1
    if num_rows != 1 << bits:
        raise ValueError(f"the number of rows must be a power of two, got {num_rows}")
    salt = reference.splitmix64(seed, np.zeros(1, np.uint64))
    return unmix64(rows.astype(np.uint64) << np.uint64(64 - bits)) ^ salt


def unmix64(k: Keys) -> Keys:
    """Invert MurmurHash3's finaliser, like `as_float32` without private names: older builds lack them."""
    k = k ^ (k >> np.uint64(33))
    k = k * np.uint64(pow(0xC4CEB9FE1A85EC53, -1, 1 << 64))
    k = k ^ (k >> np.uint64(33))
    k = k * np.uint64(pow(0xFF51AFD7ED558CCD, -1, 1 << 64))
    return k ^ (k >> np.uint64(33))


# ---- tables ----


@functools.cache
def gradients(num_vectors: int, dim: int) -> Floats:
    """Return the gradient that is used for every batch of that shape."""
    return np.random.default_rng(7).standard_normal((num_vectors, dim), np.float32)


def make_table(directory: str, case: Case) -> hashemb.EmbeddingTable:
    """Create a table in which every row has been written once, so that no page remains to be allocated or zeroed."""
    path = os.path.join(directory, f"{case.rows}x{case.dim}-{case.dtype}-{case.optimizer}.emb")
    table = hashemb.create(
        path, num_embeddings=case.rows, embedding_dim=case.dim, dtype=case.dtype, optimizer=OPTIMIZERS[case.optimizer]
    )
    step = min(FILL_ROWS, case.rows)
    grads = gradients(step, case.dim)
    for begin in range(0, case.rows, step):
        rows = np.arange(begin, min(begin + step, case.rows))
        table.update(keys_of_rows(rows, case.rows), grads[: rows.size])
    table.flush()
    return table


def is_fresh(table: hashemb.EmbeddingTable) -> bool:
    """Return whether nothing but `make_table` has updated the table."""
    return table.step == -(-table.num_embeddings // FILL_ROWS)


def drop_table(table: hashemb.EmbeddingTable) -> None:
    """Close the table and delete its files."""
    table.close()
    shutil.rmtree(table.path)


def huge_page_bytes(table: hashemb.EmbeddingTable) -> int | None:
    """Return how much of the table is mapped by pages of 2 MiB, on which half the cost of a random access depends."""
    return table.stats().huge_page_bytes


def writable(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a view of the table's own mapping that a peer may write to. `array` must outlive it."""
    memory = (ctypes.c_byte * array.nbytes).from_address(array.ctypes.data)
    return np.frombuffer(memory, array.dtype).reshape(array.shape)


def table_bytes(case: Case) -> int:
    """Return the bytes of weights and state."""
    width = 4 if case.dtype == "float32" else 2
    return case.rows * (case.dim * width + 4 * (case.dim if case.optimizer == "adagrad" else 1))


def as_float32(rows: npt.NDArray[Any], dtype: str) -> Floats:
    """Return stored rows as float32; bfloat16 is stored as uint16."""
    if dtype == "bfloat16":
        return (rows.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return rows.astype(np.float32)


# ---- the judge ----


def check_lookup(name: str, rows: Rows, weights: Floats, result: Floats) -> None:
    """Check that each vector is the sum of the rows of its bag. `weights`, (batch, fields, bag, dim), has every row."""
    expected = weights.sum(axis=2, dtype=np.float64).reshape(-1, weights.shape[-1])
    if result.size != expected.size:
        raise Mismatch(f"{name}: look-up gave {result.size} values, {expected.size} expected")
    found = result.reshape(expected.shape)
    if rows.shape[2] == 1 and not np.array_equal(found, expected.astype(np.float32)):
        raise Mismatch(f"{name}: look-up is not the rows' bits")
    if not np.allclose(found, expected, rtol=1e-5, atol=1e-6):
        raise Mismatch(f"{name}: look-up is off by {np.abs(found - expected).max()}")


def summed_gradients(rows: Rows, grads: Floats) -> tuple[Rows, npt.NDArray[np.float64]]:
    """Return the distinct rows, and the sum of the gradients of each."""
    distinct, inverse = np.unique(rows.reshape(-1), return_inverse=True)
    per_key = np.repeat(grads, rows.shape[2], axis=0)
    total = np.zeros((distinct.size, grads.shape[1]))
    np.add.at(total, inverse.reshape(-1), per_key)
    return distinct, total


def check_update(
    name: str,
    optimizer: str,
    total: npt.NDArray[np.float64],
    before: tuple[Any, Any],
    after: tuple[Any, Any],
    atol: float,
) -> None:
    """Check that the weights and state of the distinct rows are those of a step of (row-wise) Adagrad."""
    (w0, a0), (w1, a1) = before, after
    square = total**2
    if optimizer == "rowwise_adagrad":
        square = square.mean(axis=1)
    a = a0 + square
    root = np.sqrt(a) + EPS
    w = w0 - LR * total / (root[:, None] if root.ndim == 1 else root)
    if not np.allclose(a1, a, rtol=1e-4, atol=1e-5):
        raise Mismatch(f"{name}: the accumulator is off by {np.abs(a1 - a).max()}")
    if not np.allclose(w1, w, rtol=1e-4, atol=atol):
        raise Mismatch(f"{name}: the weights are off by {np.abs(w1 - w).max()}")
