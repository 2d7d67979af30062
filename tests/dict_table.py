"""A table as a dict from row to vector, in plain Python and float64: the textbook, and the model of the state machine.

It has no batches, threads, files or lazy computation: weight decay multiplies every row at every step. Gradients are
combined in float32 in batch order, as the format specifies, because Adagrad turns the difference between a sum of 0 and
one of 1e-9 into a whole step; everything after that is float64.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from hashemb import FTRL, SGD, Adagrad, RowWiseAdagrad, reference

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

MASK = 2**64 - 1


def fmix64(key: int) -> int:
    key = ((key ^ key >> 33) * 0xFF51AFD7ED558CCD) & MASK
    key = ((key ^ key >> 33) * 0xC4CEB9FE1A85EC53) & MASK
    return key ^ key >> 33


def splitmix64(seed: int, index: int) -> int:
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
    return z ^ z >> 31


class DictTable:
    """The table that the others are compared with. Arguments are those of `hashemb.create`; float32 storage only."""

    def __init__(
        self,
        *,
        num_embeddings: int,
        embedding_dim: int,
        optimizer: Any,
        init: Any,
        num_hashes: int = 1,
        seed: int = 0,
    ) -> None:
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.optimizer, self.init, self.num_hashes, self.seed = optimizer, init, num_hashes, seed
        self.salts = [splitmix64(seed, h) for h in range(num_hashes)]
        self.lr, self.step, self.faded = optimizer.lr, 0, 1.0
        self.vectors: dict[int, F64] = {}
        self.state: dict[int, dict[str, F64]] = {}

    def rows(self, key: int) -> list[int]:
        return [fmix64((key & MASK) ^ salt) * self.num_embeddings >> 64 for salt in self.salts]

    def read(self, row: int) -> F64:
        """Return the current value of a row; if it was never written, its initial value less the decay of all steps."""
        if row in self.vectors:
            return self.vectors[row]
        initial = reference.initial_rows(
            np.array([row]),
            embedding_dim=self.embedding_dim,
            init=self.init,
            seed=self.seed,
            num_hashes=self.num_hashes,
        )
        return np.asarray(initial[0].astype(np.float64) * self.faded)

    def vector(self, key: int) -> F64:
        return np.sum([self.read(row) for row in self.rows(key)], axis=0)

    def lookup(self, keys: Any, *, offsets: Any = None, pooling: str = "sum", per_sample_weights: Any = None) -> F64:
        vectors = np.array([self.vector(int(key)) for key in keys]).reshape(-1, self.embedding_dim)
        if offsets is None:
            return vectors
        weights = np.ones(len(keys)) if per_sample_weights is None else np.asarray(per_sample_weights, np.float64)
        pooled = np.zeros((len(offsets) - 1, self.embedding_dim))
        for bag, (begin, end) in enumerate(itertools.pairwise(offsets)):
            weighted = weights[begin:end, None] * vectors[begin:end]
            pooled[bag] = weighted.sum(axis=0) * float(bag_scale(weights[begin:end], pooling))
        return pooled

    def update(
        self, keys: Any, grads: F32, *, offsets: Any = None, pooling: str = "sum", per_sample_weights: Any = None
    ) -> None:
        sums: dict[int, F32] = {}
        for key, grad in self._contributions(keys, grads, offsets, pooling, per_sample_weights):
            for row in self.rows(key):
                sums[row] = sums[row] + grad if row in sums else grad
        self.step += 1
        self._decay()
        for row, grad in sums.items():
            self._step_row(row, grad.astype(np.float64))

    def _contributions(self, keys: Any, grads: F32, offsets: Any, pooling: str, weights: Any) -> list[tuple[int, F32]]:
        """Return (key, contribution to the gradient of its rows) in batch order."""
        if offsets is None:
            return [(int(key), grad) for key, grad in zip(keys, grads, strict=True)]
        weights = np.ones(len(keys), np.float32) if weights is None else weights
        found = []
        for bag, (begin, end) in enumerate(itertools.pairwise(offsets)):
            scale = bag_scale(weights[begin:end], pooling)
            found += [(int(keys[i]), grads[bag] * (weights[i] * scale)) for i in range(begin, end)]
        return found

    def _decay(self) -> None:
        factor = 1.0 - self.lr * self.optimizer.weight_decay
        self.faded *= factor
        for row in self.vectors:
            self.vectors[row] = self.vectors[row] * factor

    def _step_row(self, row: int, g: F64) -> None:
        w, optimizer, lr = self.read(row), self.optimizer, self.lr
        state = self.state.setdefault(row, {})
        if isinstance(optimizer, SGD):
            self.vectors[row] = w - lr * g
        elif isinstance(optimizer, FTRL):
            self.vectors[row] = self._ftrl(state, w, g)
        else:
            assert isinstance(optimizer, Adagrad)
            square = np.mean(g * g) if isinstance(optimizer, RowWiseAdagrad) else g * g
            state["a"] = state.get("a", optimizer.initial_accumulator_value) + square
            self.vectors[row] = w - lr * g / (np.sqrt(state["a"]) + optimizer.eps)

    def _ftrl(self, state: dict[str, F64], w: F64, g: F64) -> F64:
        """Take a step of McMahan et al. 2013, Algorithm 1; z starts where the initial weight is the solution."""
        o, alpha = self.optimizer, self.lr
        n = state.get("n", np.zeros_like(w))
        z = state.get("z", -w * (o.beta / alpha + o.l2) - np.sign(w) * o.l1)
        sigma = (np.sqrt(n + g * g) - np.sqrt(n)) / alpha
        state["z"] = z = z + g - sigma * w
        state["n"] = n = n + g * g
        solution = -(z - np.sign(z) * o.l1) / ((o.beta + np.sqrt(n)) / alpha + o.l2)
        return np.where(np.abs(z) <= o.l1, 0.0, solution)


def bag_scale(weights: npt.NDArray[Any], pooling: str) -> np.float32:
    """Return the factor for the weighted sum of a bag: 1, 1 / sum of weights, or 1 / sqrt(sum of squared weights)."""
    if pooling == "sum":
        return np.float32(1.0)
    total = np.float32(0.0)
    for weight in weights:
        total += np.float32(weight if pooling == "mean" else weight * weight)
    if total == 0.0:
        return np.float32(0.0)
    return np.float32(1.0) / (total if pooling == "mean" else np.float32(math.sqrt(total)))
