"""The peers on PyTorch: FBGEMM's table-batched embedding on the CPU, and nn.EmbeddingBag with sparse gradients.

They get rows ("ready ids"): the rows to which our table hashes the keys or, with one table per feature,
``row % rows_per_table``. All peers of a case share one set of weights in anonymous memory, copied from our table, and
FBGEMM also runs on our own mapped files (`preallocated_host_buffers`), so that the case fits in memory.

FBGEMM is run in three shapes: T=F (one table per feature), T=1 (one table, one feature: a batch of batch * F samples),
and one table shared by F features. The first two use its JIT kernels; the last uses its serial scalar loop, which is
faster where the JIT kernel mixes SSE and AVX instructions at a cost (see README.md).
"""

from __future__ import annotations

import logging
import mmap
from abc import abstractmethod
from typing import Any

import numpy as np

import hashemb
from bench.harness import Skip, require_memory
from bench.sides import EmbeddingSide
from bench.workload import EPS, LR, Case, Floats, Keys, Rows, as_float32, table_bytes, writable

SHAPES = ("T=F", "T=1", "shared")


class Buffers:
    """Weights and accumulator as flat torch tensors.

    They are filled from a table, or are the table's own mapping with its huge pages.
    """

    def __init__(self, table: hashemb.EmbeddingTable, case: Case, kind: str) -> None:
        import torch

        self.kind = kind
        if kind == "files":
            self.mapped = table.weight, table.state["accumulator"]  # these keep the mapping alive
            self.weight, self.accumulator = (torch.from_numpy(writable(array).reshape(-1)) for array in self.mapped)
            return
        require_memory(table_bytes(case), "a copy of the table for the peers")
        self.weight = self._anonymous(case.rows * case.dim, kind)
        self.accumulator = self._anonymous(table.state["accumulator"].size, kind)
        rows_at_once = 1 << 20
        for begin in range(0, case.rows, rows_at_once):
            part = as_float32(table.weight[begin : begin + rows_at_once], case.dtype)
            self.weight[begin * case.dim : begin * case.dim + part.size] = torch.from_numpy(part.reshape(-1))
        self.accumulator.copy_(torch.from_numpy(np.array(table.state["accumulator"])).reshape(-1))

    @staticmethod
    def _anonymous(size: int, kind: str) -> Any:
        import torch

        memory = mmap.mmap(-1, size * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # like malloc
        if kind == "huge pages":
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=torch.float32)


class TorchSide(EmbeddingSide):
    """A side that reads rows from the buffers and returns tensors."""

    def __init__(self, table: hashemb.EmbeddingTable, case: Case, buffers: Buffers, *, train: bool) -> None:
        import torch

        super().__init__(table, case, train=train)
        self.torch, self.buffers = torch, buffers
        self.torch_grads = torch.from_numpy(self.grads)
        self.weight_view = buffers.weight.numpy().reshape(case.rows, case.dim)
        self.state_view = buffers.accumulator.numpy().reshape(case.rows, -1)

    def read(self, rows: Rows) -> tuple[Floats, Floats]:
        state = self.state_view[rows]
        return self.weight_view[rows], state[..., 0] if self.case.optimizer == "rowwise_adagrad" else state

    def lookup(self, prepared: Any) -> Any:
        if self.train:
            return self.forward(prepared)
        with self.torch.no_grad():
            return self.forward(prepared)

    @abstractmethod
    def forward(self, prepared: Any) -> Any:
        """Return the output of the module, with its graph when training."""

    def values(self, result: Any) -> Floats:
        values: Floats = result.detach().numpy()
        return values


class FbgemmSide(TorchSide):
    """SplitTableBatchedEmbeddingBagsCodegen on the CPU, without bounds checks."""

    def __init__(
        self, table: hashemb.EmbeddingTable, case: Case, buffers: Buffers, shape: str, *, train: bool
    ) -> None:
        super().__init__(table, case, buffers, train=train)
        if case.dim % 4:
            raise Skip("FBGEMM's dimensions are multiples of 4")
        if case.fields == 1 and shape != "T=1":
            raise Skip("one feature is T=1")
        self.shape = shape
        self.group = "FBGEMM" + {"memory": "", "huge pages": " huge pages", "files": " on files"}[buffers.kind]
        self.name = f"{self.group} {shape}".replace("T=F", f"T={case.fields}")
        self.tables = case.fields if shape == "T=F" else 1
        self.features = 1 if shape == "T=1" else case.fields
        self.rows_per_table = case.rows // self.tables
        self.module = self._module()
        self.offsets = self.torch.arange(0, case.num_keys + 1, case.bag)
        width = case.dim * self.features
        self.shaped_grads = self.torch_grads.view(-1, width)

    def _module(self) -> Any:
        logging.getLogger().setLevel(logging.WARNING)
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            BoundsCheckMode,
            ComputeDevice,
            EmbeddingLocation,
            OptimType,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        kinds = {"rowwise_adagrad": OptimType.EXACT_ROWWISE_ADAGRAD, "adagrad": OptimType.EXACT_ADAGRAD}
        spec = (self.rows_per_table, self.case.dim, EmbeddingLocation.HOST, ComputeDevice.CPU)
        rows = self.rows_per_table * self.tables
        state_width = self.buffers.accumulator.numel() // self.case.rows
        return SplitTableBatchedEmbeddingBagsCodegen(
            [spec] * self.tables,
            feature_table_map=[0] * self.features if self.shape == "shared" else None,
            optimizer=kinds[self.case.optimizer],
            learning_rate=LR,
            eps=EPS,
            bounds_check_mode=BoundsCheckMode.NONE,
            preallocated_host_buffers={
                "weights": self.buffers.weight[: rows * self.case.dim],
                "momentum1": self.buffers.accumulator[: rows * state_width],
            },
        )

    def rows(self, keys: Keys) -> Rows:
        rows = self.table.rows(keys)
        if self.tables == 1:
            return rows
        first = np.arange(self.tables)[None, :, None] * self.rows_per_table
        return rows % self.rows_per_table + first

    def prepare(self, keys: Keys) -> Any:
        ids = self.table.rows(keys)
        if self.tables > 1:
            ids = ids % self.rows_per_table
        if self.features > 1:  # feature-major
            ids = ids.transpose(1, 0, 2)
        return self.torch.from_numpy(np.ascontiguousarray(ids).reshape(-1))

    def forward(self, prepared: Any) -> Any:
        return self.module(prepared, self.offsets)

    def update(self, prepared: Any, result: Any) -> None:
        result.backward(self.shaped_grads)


class EmbeddingBagSide(TorchSide):
    """nn.EmbeddingBag(sparse=True) with torch.optim.Adagrad or SparseAdam."""

    def __init__(
        self, table: hashemb.EmbeddingTable, case: Case, buffers: Buffers, optimizer: str, *, train: bool
    ) -> None:
        super().__init__(table, case, buffers, train=train)
        torch = self.torch
        self.name = self.group = f"EmbeddingBag + {optimizer}" if train else "EmbeddingBag"
        self.judged = optimizer == "Adagrad"
        weight = buffers.weight.view(case.rows, case.dim)
        self.module = torch.nn.EmbeddingBag(case.rows, case.dim, mode="sum", sparse=True, _weight=weight)
        self.offsets = torch.arange(0, case.num_keys, case.bag)
        if train:
            self.optimizer = self._adagrad() if optimizer == "Adagrad" else self._sparse_adam()

    def _adagrad(self) -> Any:
        if self.case.optimizer != "adagrad":
            raise Skip("torch.optim.Adagrad is element-wise")
        require_memory(4 * self.buffers.weight.numel(), "the state of torch.optim.Adagrad")
        optimizer = self.torch.optim.Adagrad(self.module.parameters(), lr=LR, eps=EPS)
        optimizer.state[self.module.weight]["sum"] = self.buffers.accumulator.view_as(self.module.weight)
        return optimizer

    def _sparse_adam(self) -> Any:
        require_memory(8 * self.buffers.weight.numel(), "the state of torch.optim.SparseAdam")
        optimizer = self.torch.optim.SparseAdam(list(self.module.parameters()), lr=LR)
        state = optimizer.state[self.module.weight]
        state["step"] = 0
        for name in ("exp_avg", "exp_avg_sq"):  # `full` instead of `zeros`: its pages exist before the clock starts
            state[name] = self.torch.full_like(self.module.weight, 1e-6)
        return optimizer

    def prepare(self, keys: Keys) -> Any:
        return self.torch.from_numpy(self.table.rows(keys).reshape(-1))

    def forward(self, prepared: Any) -> Any:
        return self.module(prepared, self.offsets)

    def update(self, prepared: Any, result: Any) -> None:
        self.optimizer.zero_grad()
        result.backward(self.torch_grads)
        self.optimizer.step()


def make_sides(
    table: hashemb.EmbeddingTable,
    case: Case,
    *,
    train: bool,
    kinds: tuple[str, ...] = ("memory", "huge pages", "files"),
) -> list[tuple[str, Any]]:
    """Return (name, function that makes the side) for every available peer."""
    cache: dict[str, Buffers] = {}

    def buffers(kind: str) -> Buffers:
        if case.dtype != "float32":
            raise Skip(f"{case.dtype} is not a type that it trains on the CPU")
        if kind not in cache:
            cache[kind] = Buffers(table, case, kind)
        return cache[kind]

    made: list[tuple[str, Any]] = []
    for kind in kinds:
        for shape in SHAPES if kind != "files" else SHAPES[::2]:
            made.append((f"FBGEMM {kind} {shape}", _fbgemm(table, case, buffers, kind, shape, train)))
    for optimizer in ("Adagrad", "SparseAdam") if train else ("Adagrad",):
        made.append((f"EmbeddingBag + {optimizer}", _embedding_bag(table, case, buffers, optimizer, train)))
    return made


def _fbgemm(table: Any, case: Case, buffers: Any, kind: str, shape: str, train: bool) -> Any:
    return lambda: FbgemmSide(table, case, buffers(kind), shape, train=train)


def _embedding_bag(table: Any, case: Case, buffers: Any, optimizer: str, train: bool) -> Any:
    return lambda: EmbeddingBagSide(table, case, buffers("memory"), optimizer, train=train)


def set_num_threads(n: int) -> None:
    """Set the number of threads of hashemb, and of PyTorch and FBGEMM if they are installed."""
    hashemb.set_num_threads(n)
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(n)
