"""Pending gradients between autograd and a table, and the arguments of the look-ups that they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from hashemb import EmbeddingTable

__all__ = ["Array", "Call", "Gradients"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Call:
    """The arguments of a look-up, which its update needs again."""

    keys: Array
    offsets: Array | None = None
    pooling: str = "sum"
    weights: Array | None = None
    l2: float = 0.0

    def as_sums(self) -> tuple[Array, Array]:
        """Return (bag sizes, weights) with which pooling "sum" gives the same result."""
        if self.offsets is None:
            return np.ones(self.keys.size, np.int64), np.ones(self.keys.size, np.float32)
        sizes = np.diff(self.offsets)
        weights = np.ones(self.keys.size, np.float32) if self.weights is None else self.weights
        if self.pooling == "sum":
            return sizes, weights
        bags = np.repeat(np.arange(sizes.size), sizes)
        totals = np.bincount(bags, weights if self.pooling == "mean" else weights**2, sizes.size)
        divisors = (totals if self.pooling == "mean" else np.sqrt(totals))[bags]
        scaled = np.divide(weights, divisors, out=np.zeros(self.keys.size), where=divisors != 0.0)
        return sizes, scaled.astype(np.float32)


class Gradients:
    """Collects the gradients of look-ups in one table and applies them as one update."""

    def __init__(self, table: EmbeddingTable) -> None:
        self.table = table
        self.leaves: list[Tensor] = []

    def add(self, leaf: Tensor) -> None:
        if not any(leaf is other for other in self.leaves):  # else autograd has already added to its gradient
            self.leaves.append(leaf)

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        self.leaves.clear()

    def apply(self) -> None:
        """Update the table once, if there are gradients. If the update fails, the gradients are kept."""
        pieces = [(leaf.call, leaf.grad.detach().numpy()) for leaf in self.leaves if leaf.grad is not None]
        pieces += [self._penalty(call) for call, _ in pieces if call.l2]
        if len(pieces) == 1:
            [(call, grads)] = pieces
            self.table.update(
                call.keys, grads, offsets=call.offsets, pooling=call.pooling, per_sample_weights=call.weights
            )
        elif pieces:
            self._apply_together(pieces)
        self.clear()

    def _penalty(self, call: Call) -> tuple[Call, Array]:
        """Return the gradient of ``l2 / 2 * |v|²``, summed over the distinct keys of a look-up."""
        keys = np.unique(call.keys)
        return Call(keys), np.float32(call.l2) * self.table.lookup(keys)

    def _apply_together(self, pieces: list[tuple[Call, Array]]) -> None:
        keys = np.concatenate([call.keys.reshape(-1) for call, _ in pieces])
        grads = np.concatenate([grads.reshape(-1, self.table.embedding_dim) for _, grads in pieces])
        if all(call.offsets is None for call, _ in pieces):
            self.table.update(keys, grads)
            return
        sizes, weights = zip(*(call.as_sums() for call, _ in pieces), strict=True)
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
        self.table.update(keys, grads, offsets=offsets, per_sample_weights=np.concatenate(weights))
