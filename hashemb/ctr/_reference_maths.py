"""The slow reference of _maths: the same formulas, with sums in the same order, in plain NumPy.

This module never imports the extension. An example consists of its keys' vectors (n, dim), values x (n,) and fields f
(n,). A model's function returns the contribution of interactions to the logit, and a function from the residual to
the gradients. All arithmetic is float32 except the logistic function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hashemb.ctr._types import Array, Float32Array
from hashemb.reference.numerics import exp

__all__ = ["Outcome", "run", "sigmoid"]

Interactions = tuple[np.float32, Callable[[np.float32], Float32Array]]

_LANES = 16
_BLOCK = 64
_HALF = np.float32(0.5)


@dataclass(frozen=True)
class Outcome:
    """The results of `Maths.run`: `out` in either form, the gradients of the vectors, and its sums."""

    logits: Float32Array
    probabilities: Float32Array
    gradients: Float32Array
    residual: float
    pair_gradients: npt.NDArray[np.float64]


def sigmoid(logits: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Compute 1 / (1 + exp(-z)) in double precision."""
    z = np.asarray(logits, np.float64)
    e = exp(-np.abs(z))
    return np.where(np.isnan(z), z, np.where(z < 0.0, e, 1.0) / (1.0 + e))


def run(
    kind: str,
    vectors: Float32Array,
    labels: Float32Array,
    *,
    bias: float,
    num_fields: int,
    offsets: Array | None = None,
    values: Float32Array | None = None,
    fields: Array | None = None,
    index: Array,
    weights: Float32Array | None = None,
    pair_weights: Float32Array | None = None,
) -> Outcome:
    """Compute a whole batch; the arguments are those of `Maths` and `Maths.run`."""
    sums, vectors = np.zeros_like(vectors), vectors[index]
    n, dim = len(labels), vectors.shape[1]
    ends = np.arange(n + 1) * num_fields if offsets is None else offsets
    x = np.ones(len(vectors), np.float32) if values is None else values
    f = np.arange(len(vectors)) % max(num_fields, 1) if fields is None else fields
    logits, probabilities, gradients = np.empty(n, np.float32), np.empty(n, np.float32), np.zeros_like(vectors)
    num_pairs = num_fields * (num_fields + 1) // 2 if kind == "fwfm" else 0
    total, totals, pairs = 0.0, np.zeros(num_pairs), np.zeros((num_pairs, dim), np.float32)
    block_total = 0.0
    for e in range(n):
        own = slice(ends[e], ends[e + 1])
        interaction, backward = _interactions(kind, vectors[own], x[own], f[own], num_fields, pair_weights)
        logits[e] = np.float32(bias) + (_sum(x[own, None] * vectors[own, :1])[0] + interaction)
        p = float(sigmoid(logits[e]))
        residual = np.float32((1.0 if weights is None else float(weights[e])) * (p - float(labels[e])))
        probabilities[e] = p
        gradients[own] = backward(residual)
        gradients[own, 0] = residual * x[own]
        block_total += float(residual)
        if num_pairs:
            _add_pairs(pairs, residual, x[own, None] * vectors[own], f[own])
        if (e + 1) % _BLOCK == 0 or e + 1 == n:
            total += block_total
            totals += [_fold(lanes) for lanes in pairs]
            block_total, pairs = 0.0, np.zeros_like(pairs)
    np.add.at(sums, index, gradients)  # adds them in order
    return Outcome(logits, probabilities, sums, total, totals)


def _interactions(
    kind: str, v: Float32Array, x: Float32Array, f: Array, num_fields: int, pair_weights: Any
) -> Interactions:
    if kind == "ffm":
        return _ffm(v, x, f, (v.shape[1] - 1) // num_fields)
    return _fm(v, x) if kind == "fm" else _fwfm(v, x, f, pair_weights)


def _fm(v: Float32Array, x: Float32Array) -> Interactions:
    y = x[:, None] * v
    others = _sum(y) - y
    return _HALF * _fold(_sum(y * others)), lambda residual: (residual * x)[:, None] * others


def _fwfm(v: Float32Array, x: Float32Array, f: Array, pair_weights: Float32Array) -> Interactions:
    y = x[:, None] * v
    others = np.zeros_like(v)
    for i in range(len(v)):
        apart = np.arange(len(v)) != i
        others[i] = _sum(pair_weights[f[i], f[apart], None] * y[apart])
    return _HALF * _fold(_sum(y * others)), lambda residual: (residual * x)[:, None] * others


def _ffm(v: Float32Array, x: Float32Array, f: Array, rank: int) -> Interactions:
    def meets(i: int, j: int) -> slice:
        """Return the slice of key i's row that holds its vector for the field of key j."""
        return slice(1 + f[j] * rank, 1 + f[j] * rank + rank)

    n = len(v)
    lanes = np.zeros(1 + rank, np.float32)
    for i in range(n):
        products = [(x[i] * x[j]) * (v[i, meets(i, j)] * v[j, meets(j, i)]) for j in range(i + 1, n)]
        lanes[1:] += _sum(np.array(products, np.float32).reshape(-1, rank))

    def backward(residual: np.float32) -> Float32Array:
        gradients = np.zeros_like(v)
        for i in range(n):
            for j in range(i + 1, n):
                c = residual * (x[i] * x[j])
                gradients[i, meets(i, j)] += c * v[j, meets(j, i)]
                gradients[j, meets(j, i)] += c * v[i, meets(i, j)]
        return gradients

    return _fold(lanes), backward


def _add_pairs(pairs: Float32Array, residual: np.float32, y: Float32Array, f: Array) -> None:
    """Add residual y_i * y_j to the row of each pair of fields."""
    for i in range(len(y)):
        for j in range(i):
            high, low = max(f[i], f[j]), min(f[i], f[j])
            pairs[high * (high + 1) // 2 + low] += (residual * y[i]) * y[j]


def _sum(rows: Float32Array) -> Float32Array:
    """Sum the rows from first to last."""
    total = np.zeros(rows.shape[1:], np.float32)
    for row in rows:
        total += row
    return total


def _fold(elements: Float32Array) -> np.float32:
    """Sum all elements except the first: sixteen partial sums by lane, added as a tree."""
    lanes = np.zeros(-(-len(elements) // _LANES) * _LANES, np.float32)
    lanes[1 : len(elements)] = elements[1:]
    sums = _sum(lanes.reshape(-1, _LANES))
    while len(sums) > 1:
        sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
    return np.float32(sums[0])
