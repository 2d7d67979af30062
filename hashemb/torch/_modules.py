"""Embedding and EmbeddingBag: look-ups in a table as part of the autograd graph.

A look-up creates a *leaf*: a tensor with the shape of the result that takes no memory. Autograd accumulates the
gradient of the result in the leaf, as in any parameter, and that gradient is passed to `EmbeddingTable.update`
unchanged. No gradient of the table's size and no sparse gradient is ever created; accumulation, clipping, loss scaling
and higher derivatives are left to autograd.

Invariant: pending gradients are held by the backward pass that creates them or by a `TableOptimizer`, never by a
module, so a failed pass leaves nothing behind.
"""

from __future__ import annotations

import math
import os
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hashemb
from hashemb import EmbeddingTable
from hashemb.torch._gradients import Array, Call, Gradients

__all__ = ["Embedding", "EmbeddingBag", "TableModule"]


class _Lookup(torch.autograd.Function):
    """Replaces the leaf with the table's vectors in the graph. The result is no view and may be modified in place."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, vectors: Array, dtype: Any) -> Tensor:
        return torch.from_numpy(vectors).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.to(torch.float32), None, None


class TableModule(torch.nn.Module):
    """Base class of `Embedding` and `EmbeddingBag`: the table, its node in the graph, and references to it on disk.

    `anchor` is a parameter without elements. Its `requires_grad` determines whether the table learns, and its dtype
    is the dtype of results; `requires_grad_`, `double`, `bfloat16` and the like therefore work as for any module.
    """

    def __init__(self, table: EmbeddingTable, padding_idx: int | None, l2: float) -> None:
        super().__init__()
        if not isinstance(table, EmbeddingTable):
            raise TypeError(f"table must be a hashemb.EmbeddingTable, got {type(table).__name__} {table!r}")
        if not 0.0 <= l2 < math.inf:
            raise ValueError(f"l2 must be finite and >= 0, got {l2!r}")
        self.table, self.padding_idx, self.l2 = table, padding_idx, float(l2)
        self.embedding_dim = table.embedding_dim
        self.anchor = torch.nn.Parameter(torch.empty(0), requires_grad=table.mode == "r+")
        self._reference = {"path": os.path.abspath(table.path), "id": hashemb.info(table.path).id}
        self._optimizer: Gradients | None = None  # where a TableOptimizer collects gradients
        self._passes: weakref.WeakValueDictionary[int, Gradients] = weakref.WeakValueDictionary()

    # -- in the graph --

    def _vectors(self, call: Call) -> Tensor:
        vectors = self.table.lookup(
            call.keys, offsets=call.offsets, pooling=call.pooling, per_sample_weights=call.weights
        )
        if not (torch.is_grad_enabled() and self.anchor.requires_grad):
            return torch.from_numpy(vectors).to(self.anchor.dtype)
        leaf = torch.zeros(()).expand(vectors.shape).requires_grad_()
        leaf.call = call
        leaf.register_post_accumulate_grad_hook(self._arrived)
        return _Lookup.apply(leaf, vectors, self.anchor.dtype)

    def _arrived(self, leaf: Tensor) -> None:
        """Pass an accumulated gradient to the optimiser, or to the update that follows this backward pass."""
        gradients = self._optimizer
        if gradients is None:
            number = torch._C._current_graph_task_id()
            gradients = self._passes.get(number)
            if gradients is None:
                gradients = self._passes[number] = Gradients(self.table)
                torch.autograd.Variable._execution_engine.queue_callback(gradients.apply)
        gradients.add(leaf)

    def _is_kept(self, keys: Array) -> Array | None:
        """Return a mask of the keys that are not padding; None if all are kept."""
        if self.padding_idx is None:
            return None
        kept: Array = keys.astype(np.uint64, copy=False) != np.uint64(self.padding_idx & (1 << 64) - 1)
        return None if kept.all() else kept

    # -- where it lives --

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Implement `to`, `cuda`, `double` and the like."""
        device = fn(torch.empty(0)).device
        if device.type != "cpu":
            raise RuntimeError(
                f"{self} cannot move to {device}: the table is a file mapped into this machine's memory. "
                f'Leave the module on the CPU and move what it returns: module(keys).to("{device}")'
            )
        return super()._apply(fn, recurse)

    def get_extra_state(self) -> dict[str, Any]:
        """Return, for `state_dict`, the table's path, id and step. The rows stay in its files."""
        return {**self._reference, "step": self.table.step}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Check the state in `load_state_dict`: another table is a `ValueError`, another step a `RuntimeWarning`."""
        if state["id"] != self._reference["id"]:
            raise ValueError(
                f"the state is of table {state['id']} at {state['path']}; this module has table "
                f"{self._reference['id']} at {self._reference['path']}"
            )
        if state["step"] != self.table.step:
            warnings.warn(
                f"{self.table.path} is at step {self.table.step}, the state was saved at step {state['step']}: a state "
                "refers to the table and holds no rows; for both of one moment save table.snapshot() with it",
                RuntimeWarning,
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        """Return, for `pickle` and `copy.deepcopy`, a reference to the table."""
        state = {**self.__dict__, "table": (self.table.mode, self.table.isolation), "_optimizer": None}
        del state["_passes"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the table again, in the mode it had."""
        path, (mode, isolation) = state["_reference"]["path"], state["table"]
        if hashemb.info(path).id != state["_reference"]["id"]:
            raise ValueError(f"{path} holds table {hashemb.info(path).id}, not {state['_reference']['id']}")
        super().__setstate__(state)
        self.table = hashemb.open(path, mode, isolation=isolation)
        self._passes = weakref.WeakValueDictionary()

    def extra_repr(self) -> str:
        options = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        options += f", l2={self.l2:g}" if self.l2 else ""
        return f"{self.table.path!r}, {self.table.num_embeddings}, {self.embedding_dim}{options}"


class Embedding(TableModule):
    """Like `torch.nn.Embedding`, on a hashed table: any 64-bit key has a vector, and backward updates the rows.

    Parameters
    ----------
    table : EmbeddingTable
        Table that holds the vectors, in mode "r+" for training. In mode "r" the module is frozen.
    padding_idx : int, optional
        A key whose vector is 0 and is never updated.
    l2 : float
        Adds ``l2 / 2 * |v|²`` to the loss for each distinct key of a look-up. Unlike the table's own `weight_decay`, it
        passes through the optimiser as a gradient and affects only the rows in the batch.

    Attributes
    ----------
    table : EmbeddingTable
        The table.
    embedding_dim : int
        Length of a vector.
    anchor : torch.nn.Parameter
        A parameter without elements. `requires_grad` determines whether the module learns, `dtype` is the dtype of its
        results.

    Notes
    -----
    Without a `TableOptimizer`, every backward pass through the module ends with one step of the table's own optimiser,
    for all look-ups of the module in that graph together. The optimisers of torch do not affect the rows.

    `state_dict` holds the table's path, id and step, not its rows. Unpickling or deep-copying opens the same table
    again. The module stays on the CPU. `torch.compile` leaves the look-up out of its graphs.

    Examples
    --------
    >>> import tempfile, hashemb, torch
    >>> from hashemb.torch import Embedding
    >>> table = hashemb.create(tempfile.mkdtemp() + "/t.emb", num_embeddings=2**20, embedding_dim=4)
    >>> embedding = Embedding(table)
    >>> keys = torch.from_numpy(hashemb.hash_fields({"user": ["ann", "bob"], "ad": ["shoes", "kettle"]}))
    >>> vectors = embedding(keys)
    >>> vectors.shape
    torch.Size([2, 2, 4])
    >>> vectors.square().sum().backward()
    >>> table.step
    1
    >>> table.close()
    """

    def __init__(self, table: EmbeddingTable, *, padding_idx: int | None = None, l2: float = 0.0) -> None:
        super().__init__(table, padding_idx, l2)

    def forward(self, keys: Any) -> Tensor:
        """Look up the vectors of keys.

        Parameters
        ----------
        keys : Tensor or array_like of any integer dtype and shape
            Keys, for example all features of a batch, ``(n, num_fields)``. Negative keys are converted to
            their two's complement.

        Returns
        -------
        Tensor, shape ``keys.shape + (embedding_dim,)``

        Raises
        ------
        TypeError
            The keys are not integers.
        ClosedTableError
            The table is closed.
        """
        return _outside_graphs(self._embed)(keys)

    def _embed(self, keys: Any) -> Tensor:
        array = _array(keys)
        kept = self._is_kept(array)
        if kept is None:
            return self._vectors(Call(array, l2=self.l2))
        vectors = self._vectors(Call(array[kept], l2=self.l2))
        empty = vectors.new_zeros((*array.shape, self.embedding_dim))
        return empty.index_put((torch.from_numpy(kept),), vectors)


class EmbeddingBag(TableModule):
    """Like `torch.nn.EmbeddingBag`, on a hashed table: pools the vectors of bags of keys.

    Parameters
    ----------
    table : EmbeddingTable
        As for `Embedding`; the notes there apply to this module too.
    mode : {"mean", "sum", "sqrtn"}
        Pooling mode. "mean" divides a bag's sum by its total weight, "sqrtn" by the root of its total squared weight;
        the result is 0 for an empty bag and for one whose divisor is 0.
    include_last_offset : bool
        Whether `offsets` ends with the number of keys.
    padding_idx : int, optional
        A key that is ignored in every bag.
    l2 : float
        As for `Embedding`.

    Notes
    -----
    If `per_sample_weights` requires a gradient, vectors are looked up individually and pooled by torch, which takes
    memory for ``num_keys * embedding_dim`` floats; otherwise the table's kernel pools them without extra memory.

    Examples
    --------
    >>> import tempfile, hashemb, torch
    >>> from hashemb.torch import EmbeddingBag
    >>> table = hashemb.create(tempfile.mkdtemp() + "/t.emb", num_embeddings=2**20, embedding_dim=4)
    >>> bag = EmbeddingBag(table, mode="sum")
    >>> bag(torch.tensor([5, 7, 5, -1]), torch.tensor([0, 3])).shape      # bags [5, 7, 5] and [-1]
    torch.Size([2, 4])
    >>> bag(torch.tensor([[5, 7], [5, -1]])).shape                        # bags of two keys each
    torch.Size([2, 4])
    >>> table.close()
    """

    def __init__(
        self,
        table: EmbeddingTable,
        *,
        mode: str = "mean",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        l2: float = 0.0,
    ) -> None:
        super().__init__(table, padding_idx, l2)
        if mode not in ("mean", "sum", "sqrtn"):
            raise ValueError(f"mode must be 'mean', 'sum' or 'sqrtn', got {mode!r}")
        self.mode, self.include_last_offset = mode, include_last_offset

    def forward(self, keys: Any, offsets: Any = None, per_sample_weights: Any = None) -> Tensor:
        """Look up and pool the vectors of bags of keys.

        Parameters
        ----------
        keys : Tensor or array_like of any integer dtype
            Keys, in shape (num_keys,) with offsets or (num_bags, keys_per_bag) without.
        offsets : Tensor or array_like of int, shape (num_bags,) or (num_bags + 1,), optional
            Start of each bag; with `include_last_offset`, followed by the end of the last bag.
        per_sample_weights : Tensor or array_like of float, in the shape of `keys`, optional
            Weights of the keys; they may require a gradient.

        Returns
        -------
        Tensor, shape (num_bags, embedding_dim)

        Raises
        ------
        TypeError, ValueError
            An argument has the wrong dtype or shape.
        """
        return _outside_graphs(self._pool)(keys, offsets, per_sample_weights)

    def _pool(self, keys: Any, offsets: Any, per_sample_weights: Any) -> Tensor:
        array = _array(keys)
        weights = None if per_sample_weights is None else _weights(per_sample_weights, array.shape)
        array, ends = self._bags(array, offsets)
        kept = self._is_kept(array)
        if kept is not None:
            ends = np.concatenate([[0], np.cumsum(kept)])[ends]
            array, weights = array[kept], None if weights is None else weights[torch.from_numpy(kept)]
        if weights is not None and weights.requires_grad and torch.is_grad_enabled():
            return self._pool_by_torch(self._vectors(Call(array, l2=self.l2)), weights, np.diff(ends))
        return self._vectors(Call(array, ends, self.mode, None if weights is None else _array(weights), self.l2))

    def _bags(self, keys: Array, offsets: Any) -> tuple[Array, Array]:
        """Return the keys in one dimension, and the offsets of their bags, including the last offset."""
        if keys.ndim == 2:
            if offsets is not None:
                raise ValueError(f"keys of shape {keys.shape} are bags already: offsets must be None")
            return keys.reshape(-1), np.arange(len(keys) + 1) * keys.shape[1]
        if keys.ndim != 1 or offsets is None:
            raise ValueError(f"keys must have two dimensions, or one and offsets; got shape {keys.shape}")
        ends = _array(offsets)
        if ends.ndim != 1 or ends.dtype.kind not in "iu":
            raise ValueError(f"offsets must be integers of one dimension, got {ends.dtype} of shape {ends.shape}")
        ends = ends.astype(np.int64)
        if not self.include_last_offset:
            ends = np.append(ends, keys.size)
        if ends.size == 0 or ends[0] != 0 or ends[-1] != keys.size or (np.diff(ends) < 0).any():
            raise ValueError(f"offsets must start at 0, never fall and end at {keys.size}, got {_array(offsets)}")
        return keys, ends

    def _pool_by_torch(self, vectors: Tensor, weights: Tensor, sizes: Array) -> Tensor:
        counts = torch.from_numpy(sizes)
        bags = torch.repeat_interleave(torch.arange(sizes.size), counts)
        totals = vectors.new_zeros(sizes.size, self.embedding_dim).index_add(
            0, bags, (vectors * weights[:, None]).to(vectors.dtype)
        )
        if self.mode == "sum":
            return totals
        parts = weights if self.mode == "mean" else weights.square()
        divisors = parts.new_zeros(sizes.size).index_add(0, bags, parts)
        is_zero = divisors == 0
        divisors = divisors.masked_fill(is_zero, 1)  # mask before the root, whose derivative at 0 is infinite
        divisors = divisors if self.mode == "mean" else divisors.sqrt()
        return (totals / divisors[:, None]).to(vectors.dtype).masked_fill(is_zero[:, None], 0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode!r}"


def _array(values: Any) -> Array:
    """Convert a tensor or array_like to an array, without a copy except for bfloat16, which NumPy does not support."""
    if not isinstance(values, Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    array: Array = values.float().numpy() if values.dtype == torch.bfloat16 else values.numpy()
    return array


def _weights(values: Any, shape: tuple[int, ...]) -> Tensor:
    """Flatten per-sample weights to one dimension, still in their graph."""
    weights = values if isinstance(values, Tensor) else torch.from_numpy(np.asarray(values))
    if tuple(weights.shape) != shape:
        raise ValueError(f"per_sample_weights must have the shape of keys, {shape}, got {tuple(weights.shape)}")
    return weights.reshape(-1)


def _outside_graphs(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `function`; while `torch.compile` traces, a wrapper that runs as plain Python between two graphs."""
    if not torch.compiler.is_compiling():
        return function
    return torch.compiler.disable(function)  # type: ignore[no-any-return]
