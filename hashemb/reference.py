"""Reference implementation of the table's algorithms in plain NumPy, operation by operation, in memory.

It is the oracle of the tests (the fast table must equal it bit for bit), the documentation of every formula, and
a way to check a table where the extension cannot be built. It never imports the extension and shares no code with
it. It uses only NumPy's float32 and float64 ``+``, ``-``, ``*``, ``/`` and ``sqrt``, which IEEE 754 makes the same
everywhere.

>>> import numpy as np
>>> from hashemb import reference
>>> table = reference.ReferenceTable(num_embeddings=1000, embedding_dim=4, seed=1)
>>> keys = reference.hash_keys(["cat", "dog", "cat"])
>>> table.update(keys, np.ones((3, 4), np.float32))
>>> table.lookup(keys).shape
(3, 4)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import mmh3
import numpy as np
import numpy.typing as npt

from hashemb._reference_numerics import exp, from_bfloat16, log1p, normal_quantile, to_bfloat16, to_float16
from hashemb.init import Initializer, Normal, Uniform
from hashemb.optim import FTRL, SGD, Adagrad, Optimizer, RowWiseAdagrad

__all__ = ["ReferenceTable", "hash_keys", "initial_rows", "rows"]

U64 = npt.NDArray[np.uint64]
F32 = npt.NDArray[np.float32]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


# ---- keys and rows ----


def hash_keys(values: Iterable[int | str | bytes | None], field: str | None = None) -> U64:
    """Return keys of Python values: for each, the low 64 bits of MurmurHash3 x64-128 of its bytes."""
    seed = 0 if field is None else mmh3.hash(field.encode(), 0, signed=False)
    return np.array([_hash_value(v, seed) for v in values], np.uint64)


def _hash_value(value: int | str | bytes | None, seed: int) -> int:
    if value is None:
        data = b"\x00null"
    elif isinstance(value, int):
        data = (value & _MASK).to_bytes(8, "little")
    else:
        data = value.encode() if isinstance(value, str) else value
    return int(mmh3.hash64(data, seed, x64arch=True, signed=False)[0])


def fmix64(k: U64) -> U64:
    """Apply MurmurHash3's 64-bit finaliser."""
    k = k ^ (k >> np.uint64(33))
    k = k * np.uint64(0xFF51AFD7ED558CCD)
    k = k ^ (k >> np.uint64(33))
    k = k * np.uint64(0xC4CEB9FE1A85EC53)
    return k ^ (k >> np.uint64(33))


def splitmix64(seed: U64 | int, i: U64) -> U64:
    """Return output number i, counted from 0, of SplitMix64 started at `seed`."""
    z = np.asarray(seed, np.uint64) + (i + np.uint64(1)) * np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _seed_output(seed: int, i: int) -> int:
    return int(splitmix64(np.array([seed], np.uint64), np.array([i], np.uint64))[0])


def mulhi64(a: U64, b: int) -> U64:
    """Return the high 64 bits of a * b, computed from four 32-bit products."""
    low, s = np.uint64(0xFFFFFFFF), np.uint64(32)
    b0, b1 = np.uint64(b & 0xFFFFFFFF), np.uint64(b >> 32)
    a0, a1 = a & low, a >> s
    middle = a1 * b0 + ((a0 * b0) >> s)
    carry = (middle & low) + a0 * b1
    return a1 * b1 + (middle >> s) + (carry >> s)


def rows(keys: U64, *, num_embeddings: int, num_hashes: int = 1, seed: int = 0) -> npt.NDArray[np.int64]:
    """Return the rows of keys, int64 (num_keys, num_hashes): ``mulhi64(fmix64(key ^ salt_h), num_embeddings)``."""
    keys = np.asarray(keys).reshape(-1).astype(np.uint64)
    salts = [np.uint64(_seed_output(seed, h)) for h in range(num_hashes)]
    columns = [mulhi64(fmix64(keys ^ salt), num_embeddings) for salt in salts]
    return np.stack(columns, axis=1).astype(np.int64)


# ---- initial values ----


def _half_words(words: U64, dim: int) -> npt.NDArray[np.uint32]:
    """Split (n, pairs) 64-bit words into (n, dim) 32-bit halves, low half first."""
    low = (words & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    high = (words >> np.uint64(32)).astype(np.uint32)
    return np.stack([low, high], axis=2).reshape(len(words), 2 * words.shape[1])[:, :dim]


def initial_rows(
    row: npt.NDArray[np.int64], *, embedding_dim: int, init: Initializer, seed: int = 0, num_hashes: int = 1
) -> F32:
    """Return the values of rows never written, float32 (num_rows, embedding_dim).

    Columns 2p and 2p + 1 come from the low and high half of word ``row * ceil(dim / 2) + p`` of a SplitMix64
    stream; each row is scaled by ``1 / sqrt(num_hashes)``.
    """
    first = np.asarray(row).reshape(-1, 1).astype(np.uint64)
    num_pairs = (embedding_dim + 1) // 2
    index = np.asarray(first * np.uint64(num_pairs) + np.arange(num_pairs, dtype=np.uint64), np.uint64)
    u = _half_words(splitmix64(_seed_output(seed, 1 << 32), index), embedding_dim)
    if isinstance(init, Uniform):
        scale = np.float32(init.scale / math.sqrt(num_hashes))
        unit = (u >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
        return unit * scale
    if isinstance(init, Normal):
        std = init.std / math.sqrt(num_hashes)
        return (normal_quantile((u.astype(np.float64) + 0.5) * 2.0**-32) * std).astype(np.float32)
    return np.zeros((len(first), embedding_dim), np.float32)


# ---- optimisers: (values, summed gradients, states) of the touched rows -> new values; states change in place ----


def mean_square(g: F32) -> F32:
    """Return mean(g²) per row: sixteen partial sums by column modulo 16, then a tree of additions."""
    padded = np.zeros((len(g), -(-g.shape[1] // 16) * 16), np.float32)
    padded[:, : g.shape[1]] = g * g
    lanes = np.zeros((len(g), 16), np.float32)
    for start in range(0, padded.shape[1], 16):
        lanes = lanes + padded[:, start : start + 16]
    for width in (8, 4, 2, 1):
        lanes = lanes[:, :width] + lanes[:, width : 2 * width]
    return np.asarray(lanes[:, 0] / np.float32(g.shape[1]))


def adagrad_step(w: F32, g: F32, accumulator: F32, lr: np.float32, optimizer: Adagrad) -> F32:
    """Compute ``a += g²; w -= lr * g / (sqrt(a + initial) + eps)``; row-wise, `a += mean(g²)`."""
    initial, eps = np.float32(optimizer.initial_accumulator_value), np.float32(optimizer.eps)
    if isinstance(optimizer, RowWiseAdagrad):
        accumulator += mean_square(g)
        step = lr / (np.sqrt(accumulator + initial) + eps)
        return w - step[:, None] * g
    accumulator += g * g
    return w - lr * g / (np.sqrt(accumulator + initial) + eps)


def ftrl_step(
    w: F32, g: F32, z: F32, n: F32, alpha: np.float32, optimizer: FTRL, written: npt.NDArray[np.bool_]
) -> F32:
    """Compute Algorithm 1 of McMahan et al. 2013; a new row's z is the one that gives the initial weight."""
    beta, l1, l2 = np.float32(optimizer.beta), np.float32(optimizer.l1), np.float32(optimizer.l2)
    start = np.where(written[:, None], z, -w * (beta / alpha + l2) - np.sign(w) * l1)
    n_new = n + g * g
    root = np.sqrt(n_new)
    sigma = (root - np.sqrt(n)) / alpha
    z_new = start + (g - sigma * w)
    magnitude = np.abs(z_new) - l1
    size = magnitude / ((beta + root) / alpha + l2)
    z[...], n[...] = z_new, n_new
    return np.where(magnitude <= 0.0, np.float32(0.0), np.where(z_new < 0.0, size, -size))


# ---- the table ----


class ReferenceTable:
    """A table in memory with the arguments of `hashemb.create` and the methods of `EmbeddingTable`.

    It takes O(num_embeddings * embedding_dim) memory. Arguments are trusted: this class checks nothing.

    Attributes
    ----------
    weight : ndarray, (num_embeddings, embedding_dim)
        Weights in the storage dtype; bfloat16 as uint16.
    state : dict of ndarray
    step : int
    lr : float
    """

    def __init__(
        self,
        *,
        num_embeddings: int,
        embedding_dim: int,
        dtype: str = "float32",
        optimizer: Optimizer | None = None,
        init: Initializer | None = None,
        num_hashes: int = 1,
        seed: int = 0,
    ) -> None:
        self.num_embeddings, self.embedding_dim, self.dtype = num_embeddings, embedding_dim, dtype
        self.optimizer: Optimizer = Adagrad() if optimizer is None else optimizer
        self.init: Initializer = Uniform() if init is None else init
        self.num_hashes, self.seed = num_hashes, seed
        self.step, self.lr, self.decay_total = 0, self.optimizer.lr, 0.0
        storage = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[dtype]
        self.weight: npt.NDArray[Any] = np.zeros((num_embeddings, embedding_dim), storage)
        self.state: dict[str, npt.NDArray[Any]] = {
            name: np.zeros(self.weight.shape if kind == "element" else num_embeddings, np.float32)
            for name, kind in self.optimizer.state_files.items()
        }
        if self.optimizer.weight_decay > 0.0:
            self.state["paid"] = np.zeros(num_embeddings, np.float64)

    # -- reading --

    def rows(self, keys: Any) -> npt.NDArray[np.int64]:
        """Return the rows of keys, of shape ``keys.shape``, or ``keys.shape + (k,)`` with num_hashes k > 1."""
        keys = np.asarray(keys)
        shape = keys.shape if self.num_hashes == 1 else (*keys.shape, self.num_hashes)
        return self._rows(keys).reshape(shape)

    def lookup(
        self, keys: Any, *, offsets: Any = None, pooling: str = "sum", per_sample_weights: Any = None
    ) -> F32:
        """Return vectors as `EmbeddingTable.lookup` does."""
        vectors = np.zeros((np.asarray(keys).size, self.embedding_dim), np.float32)
        by_hash = self._rows(keys)
        for h in range(self.num_hashes):
            values = self._read(by_hash[:, h])
            vectors = values if h == 0 else vectors + values
        if offsets is None:
            return vectors.reshape(*np.asarray(keys).shape, self.embedding_dim)
        bag_of, scale = bags(offsets, pooling, per_sample_weights)
        if per_sample_weights is not None:
            vectors = vectors * np.asarray(per_sample_weights, np.float32)[:, None]
        pooled = np.zeros((len(scale), self.embedding_dim), np.float32)
        np.add.at(pooled, bag_of, vectors)
        return pooled if pooling == "sum" else pooled * scale[:, None]

    def _rows(self, keys: Any) -> npt.NDArray[np.int64]:
        return rows(
            np.asarray(keys),
            num_embeddings=self.num_embeddings,
            num_hashes=self.num_hashes,
            seed=self.seed,
        )

    def _load(self, row: npt.NDArray[np.int64]) -> tuple[F32, npt.NDArray[np.bool_]]:
        """Return the values before the decay that they owe, and whether each row has been written."""
        stored = self.weight[row]
        written: npt.NDArray[np.bool_] = (stored.view(np.uint8) != 0).any(axis=1)
        wide = from_bfloat16(stored) if self.dtype == "bfloat16" else stored.astype(np.float32)
        fresh = initial_rows(
            row,
            embedding_dim=self.embedding_dim,
            init=self.init,
            seed=self.seed,
            num_hashes=self.num_hashes,
        )
        return np.where(written[:, None], wide, fresh), written

    def _read(self, row: npt.NDArray[np.int64]) -> F32:
        values, _ = self._load(row)
        return self._decayed(values, row)

    def _decayed(self, values: F32, row: npt.NDArray[np.int64]) -> F32:
        if "paid" not in self.state:
            return values
        factor = exp(self.decay_total - self.state["paid"][row]).astype(np.float32)
        return values * factor[:, None]

    # -- writing --

    def update(
        self,
        keys: Any,
        grads: Any,
        *,
        offsets: Any = None,
        pooling: str = "sum",
        per_sample_weights: Any = None,
    ) -> None:
        """Apply one optimiser step as `EmbeddingTable.update` does."""
        contributions = np.asarray(grads, np.float32).reshape(-1, self.embedding_dim)
        if offsets is not None:
            bag_of, scale = bags(offsets, pooling, per_sample_weights)
            factor = scale[bag_of]
            if per_sample_weights is not None:
                factor = np.asarray(per_sample_weights, np.float32) * factor
            contributions = contributions[bag_of] * factor[:, None]
        occurrences = self._rows(keys).reshape(-1)
        contributions = np.repeat(contributions, self.num_hashes, axis=0)
        row, sums = sum_by_row(occurrences, contributions)
        self.step += 1
        if self.optimizer.weight_decay > 0.0:
            self.decay_total += log1p(-(self.lr * self.optimizer.weight_decay))
        if row.size:
            self._step_rows(row, sums)

    def _step_rows(self, row: npt.NDArray[np.int64], g: F32) -> None:
        lr = np.float32(self.lr)
        values, written = self._load(row)
        w = self._decayed(values, row)
        if "paid" in self.state:
            self.state["paid"][row] = self.decay_total
        states = [self.state[name][row] for name in self.optimizer.state_files]
        if isinstance(self.optimizer, SGD):
            w = w - lr * g
        elif isinstance(self.optimizer, FTRL):
            w = ftrl_step(w, g, states[0], states[1], lr, self.optimizer, written)
        else:
            w = adagrad_step(w, g, states[0], lr, self.optimizer)
        for name, values_ in zip(self.optimizer.state_files, states, strict=True):
            self.state[name][row] = values_
        self._store(row, w)

    def _store(self, row: npt.NDArray[np.int64], w: F32) -> None:
        if self.dtype == "float32":
            stored: npt.NDArray[Any] = w
        else:
            random = self._rounding_bits(row)
            stored = to_bfloat16(w, random) if self.dtype == "bfloat16" else to_float16(w, random)
        stored = np.ascontiguousarray(stored)
        empty = ~stored.view(np.uint8).any(axis=1)
        stored[empty, 0] = 0x8000 if self.dtype == "bfloat16" else -0.0
        self.weight[row] = stored

    def _rounding_bits(self, row: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
        key = np.uint64(_seed_output(self.seed, (1 << 32) + 1))
        seed = fmix64(fmix64(key ^ row.astype(np.uint64)) ^ np.uint64(self.step))
        pairs = np.arange((self.embedding_dim + 1) // 2, dtype=np.uint64)
        return _half_words(splitmix64(seed[:, None], pairs), self.embedding_dim)


def bags(offsets: Any, pooling: str, weights: Any) -> tuple[npt.NDArray[np.int64], F32]:
    """Return each key's bag, int64 (num_keys,), and each bag's scale, float32 (num_bags,)."""
    offsets = np.asarray(offsets).astype(np.int64)
    num_bags = len(offsets) - 1
    bag_of = np.repeat(np.arange(num_bags), np.diff(offsets))
    if pooling == "sum":
        return bag_of, np.ones(num_bags, np.float32)
    total = np.diff(offsets).astype(np.float32)
    if weights is not None:
        w = np.asarray(weights, np.float32)
        total = np.zeros(num_bags, np.float32)
        np.add.at(total, bag_of, w if pooling == "mean" else w * w)
    root = total if pooling == "mean" else np.sqrt(total)
    return bag_of, np.where(total == 0.0, np.float32(0.0), np.float32(1.0) / np.where(total == 0.0, 1.0, root))


def sum_by_row(
    occurrences: npt.NDArray[np.int64], contributions: F32
) -> tuple[npt.NDArray[np.int64], F32]:
    """Return the distinct rows in ascending order, and the sum of each one's contributions in batch order."""
    row, first, inverse = np.unique(occurrences, return_index=True, return_inverse=True)
    sums = contributions[first].copy()
    later = np.ones(len(occurrences), np.bool_)
    later[first] = False
    np.add.at(sums, inverse.reshape(-1)[later], contributions[later])
    return row, sums
