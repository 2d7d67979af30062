"""Ways to look up and update embeddings that need only NumPy and a C compiler: ours, NumPy's and the roofline."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

import hashemb
from bench import native
from bench.harness import OURS, Clock, Skip
from bench.workload import EPS, LR, Case, Floats, Keys, Rows, as_float32, gradients, writable


class EmbeddingSide(ABC):
    """Base class of the sides: the rows of keys, access to rows for the judge, and the phases of a run.

    Subclasses implement `lookup`, whose float32 vectors are then read by the consumer, and `update`.
    """

    name = ""
    group = ""
    judged = True  # whether the update is (row-wise) Adagrad, which the judge can check

    def __init__(self, table: hashemb.EmbeddingTable, case: Case, *, train: bool) -> None:
        self.table, self.case, self.train = table, case, train
        self.grads = gradients(case.num_vectors, case.dim)

    def rows(self, keys: Keys) -> Rows:
        """Return the rows of a batch in this side's own numbering."""
        return self.table.rows(keys)

    def read(self, rows: Rows) -> tuple[Floats, Floats]:
        """Return the weights and the accumulator of rows."""
        state = self.table.state.get("accumulator")
        assert state is not None
        return as_float32(self.table.weight[rows], self.case.dtype), state[rows]

    def prepare(self, keys: Keys) -> Any:
        return keys

    @abstractmethod
    def lookup(self, prepared: Any) -> Any:
        """Return the vectors of a batch, in the side's own type."""

    def values(self, result: Any) -> Floats:
        """Return the result as a NumPy array, without a copy."""
        return np.asarray(result)

    @abstractmethod
    def update(self, prepared: Any, result: Any) -> None:
        """Take one step with the gradients of the case."""

    def run(self, prepared: Any, clock: Clock) -> None:
        result = self.lookup(prepared)
        clock.lap("lookup")
        native.consume(self.values(result), self.case.threads)
        clock.lap("consume")
        if self.train:
            self.update(prepared, result)
            clock.lap("update")


class HashembSide(EmbeddingSide):
    """Our side, from raw keys. The result goes to memory that is reused, as in a training loop."""

    name, group = OURS, OURS

    def __init__(self, table: hashemb.EmbeddingTable, case: Case, *, train: bool, reuse: bool = True) -> None:
        super().__init__(table, case, train=train)
        self.out = np.empty((case.num_vectors, case.dim), np.float32) if reuse else None
        if not reuse:
            self.name, self.note = f"{OURS} new result", "allocates its result at each call"
            self.group = self.name
        self.bags: dict[str, Any] = {}
        if case.bag > 1:
            self.bags = {"offsets": np.arange(0, case.num_keys + 1, case.bag)}

    def prepare(self, keys: Keys) -> Keys:
        return keys.reshape(-1)

    def lookup(self, prepared: Keys) -> Floats:
        return self.table.lookup(prepared, out=self.out, **self.bags)

    def update(self, prepared: Keys, result: Floats) -> None:
        self.table.update(prepared, self.grads, **self.bags)


class NumpySide(EmbeddingSide):
    """Fancy indexing on the table's own mapping; duplicates are summed by sort and reduceat."""

    name, group = "NumPy", "NumPy"

    def __init__(self, table: hashemb.EmbeddingTable, case: Case, *, train: bool) -> None:
        super().__init__(table, case, train=train)
        if case.dtype != "float32":
            raise Skip("NumPy has no bfloat16")
        self.mapped = table.weight, table.state["accumulator"]  # these keep the mapping alive
        self.weight, self.accumulator = map(writable, self.mapped)

    def prepare(self, keys: Keys) -> Rows:
        return self.rows(keys)

    def lookup(self, prepared: Rows) -> Floats:
        vectors: Floats = self.weight[prepared].sum(axis=2) if self.case.bag > 1 else self.weight[prepared]
        return vectors

    def update(self, prepared: Rows, result: Floats) -> None:
        flat = prepared.reshape(-1)
        order = np.argsort(flat, kind="stable")
        distinct, first = np.unique(flat[order], return_index=True)
        grads = np.add.reduceat(self.grads[order // self.case.bag], first, axis=0)
        square = grads * grads
        if self.case.optimizer == "rowwise_adagrad":
            square = square.mean(axis=1)
        total = self.accumulator[distinct] + square
        self.accumulator[distinct] = total
        root = np.sqrt(total) + np.float32(EPS)
        self.weight[distinct] -= LR * grads / (root[:, None] if root.ndim == 1 else root)


class RooflineSide(EmbeddingSide):
    """The plain C loops on the table's own mapping, with given rows. The update adds without an optimiser."""

    name, group = "roofline", "roofline"
    judged = False

    def __init__(self, table: hashemb.EmbeddingTable, case: Case, *, train: bool) -> None:
        super().__init__(table, case, train=train)
        native.shared_object()
        if case.dtype != "float32" or case.bag > 1:
            raise Skip("the roofline loops are written for single float32 rows")
        self.out = aligned((case.num_vectors, case.dim))
        self.ahead, self.nontemporal, self.far = 16, False, False
        self.update_ahead, self.sort = 16, False

    def prepare(self, keys: Keys) -> tuple[Rows, Rows, Rows]:
        """Return the rows in the given order; and sorted, with the position that each of them had."""
        rows = self.rows(keys).reshape(-1)
        order = np.argsort(rows, kind="stable")
        return rows, rows[order], order

    def lookup(self, prepared: tuple[Rows, Rows, Rows]) -> Floats:
        native.gather(
            self.table.weight, prepared[0], self.out, ahead=self.ahead, nontemporal=self.nontemporal,
            far=self.far, num_threads=self.case.threads,
        )  # fmt: skip
        return self.out

    def update(self, prepared: tuple[Rows, Rows, Rows], result: Any) -> None:
        rows, order = (prepared[1], prepared[2]) if self.sort else (prepared[0], None)
        native.update(
            self.table.weight, self.table.state["accumulator"], rows, order, self.grads, scale=1e-9,
            ahead=self.update_ahead, num_threads=self.case.threads,
        )  # fmt: skip

    def tune(self, batches: list[Keys]) -> None:
        """Choose the fastest prefetch distance, kind of stores and order of rows, so that the loops show the limit."""
        prepared = [self.prepare(b) for b in batches]
        yes_no = (False, True)
        stores = yes_no if self.case.dim % 8 == 0 else (False,)
        choices = [(a, nt, far) for a in (8, 16, 32, 64) for nt in stores for far in yes_no]
        self.ahead, self.nontemporal, self.far = min(choices, key=lambda c: self._lookup_seconds(prepared, *c))
        if self.train:
            updates = [(a, s) for a in (4, 8, 16, 32) for s in (False, True)]
            self.update_ahead, self.sort = min(updates, key=lambda u: self._update_seconds(prepared, *u))
        kind = "non-temporal" if self.nontemporal else "plain"
        order = f", update {self.update_ahead} ahead, {'sorted' if self.sort else 'batch order'}"
        level = "L2" if self.far else "L1"
        self.note = f"{kind} stores, {self.ahead} ahead to {level}" + order * self.train

    def _lookup_seconds(self, prepared: list[Any], ahead: int, nontemporal: bool, far: bool) -> float:
        self.ahead, self.nontemporal, self.far = ahead, nontemporal, far
        return best_seconds(lambda p: native.consume(self.lookup(p), self.case.threads), prepared)

    def _update_seconds(self, prepared: list[Any], ahead: int, sort: bool) -> float:
        self.update_ahead, self.sort = ahead, sort
        return best_seconds(lambda p: self.update(p, None), prepared)


def best_seconds(fn: Any, arguments: list[Any]) -> float:
    """Return the shortest time of `fn` over the arguments."""
    times = []
    for a in arguments:
        clock = Clock()
        fn(a)
        clock.lap("all")
        times.append(clock.total)
    return min(times)


def aligned(shape: tuple[int, ...]) -> Floats:
    """Return float32 memory aligned to 64 bytes; `empty` makes NumPy request huge pages, as for our results."""
    size = int(np.prod(shape))
    raw = np.empty(size + 16, np.float32)
    first = -raw.ctypes.data % 64 // 4
    return raw[first : first + size].reshape(shape)
