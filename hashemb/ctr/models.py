"""Click-through-rate models whose every parameter is a row of one embedding table.

A model is a formula, not a store: it looks rows up, computes a probability, and hands gradients back to the table.
Two processes that attach to one table therefore hold one model, and nothing needs saving beside the table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit

import hashemb

if TYPE_CHECKING:
    from hashemb import EmbeddingTable

__all__ = ["BIAS_FIELD", "FactorizationMachine", "logistic_loss"]

Float32Array = npt.NDArray[np.float32]
KeyArray = npt.NDArray[Any]

BIAS_FIELD = "hashemb.bias"  # reserved: no data column may have this name
_BLOCK_BYTES = 512 * 1024  # what one pass over the batch works on; half of a common per-core L2 cache


def logistic_loss(logits: npt.NDArray[Any], labels: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Logistic loss of each example, ``log(1 + exp(-z))`` for label 1, without overflow at any logit.

    Parameters
    ----------
    logits, labels : array_like, shape (n,)
        Log-odds z, and labels in [0, 1].

    Returns
    -------
    ndarray of float64, shape (n,)

    Examples
    --------
    >>> logistic_loss(np.array([0.0, 1000.0, -1000.0]), np.array([1, 1, 1])).round(4).tolist()
    [0.6931, 0.0, 1000.0]
    """
    z, y = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    return y * np.logaddexp(0.0, -z) + (1.0 - y) * np.logaddexp(0.0, z)


class FactorizationMachine:
    """Second-order factorisation machine over hashed categorical features.

    ``logit = bias + sum_i w_i + sum_{i<j} <v_i, v_j>``, i and j running over an example's fields, each field
    holding one value. With rank 0 there are no factors: the model is logistic regression.

    Parameters
    ----------
    table : EmbeddingTable
        Column 0 of a row is the linear weight w, columns 1..rank are the latent factors v. The bias is column 0 of
        the row of one reserved key (`BIAS_FIELD`), so that all that is learned is in the table and shared by
        every process attached to it. To learn, the table must be open "r+".
    rank : int, optional
        Number of latent factors; the table's `embedding_dim` must be ``1 + rank``. Default: what the table has.

    Notes
    -----
    The loss is *summed* over the batch, never averaged. Adagrad doesn't see a constant factor of the gradient, and
    with SGD `lr` keeps its meaning per example whatever the batch size.

    The weight of an interaction is computed as ``1/2 sum_i <v_i, s - v_i>``, ``s = sum_i v_i``, in time linear in
    fields x rank; ``s - v_i`` is also the gradient of v_i, and the form has none of the cancellation of
    ``|s|^2 - sum |v_i|^2``.

    Not safe for concurrent calls on one object (it reuses its buffers); give each thread its own object on the
    shared table.

    References
    ----------
    Rendle: Factorization Machines, ICDM 2010, lemma 3.1.

    Examples
    --------
    >>> import tempfile, hashemb
    >>> with hashemb.create(tempfile.mkdtemp() + "/fm.emb", num_embeddings=1000, embedding_dim=1 + 4,
    ...                     optimizer=hashemb.Adagrad(lr=0.1)) as table:
    ...     model = FactorizationMachine(table)
    ...     keys = hashemb.hash_fields({"user": ["ann", "bob"], "ad": ["shoes", "shoes"]})
    ...     for _ in range(50):
    ...         _ = model.learn(keys, np.array([1.0, 0.0]))
    ...     model.predict_proba(keys).round().tolist()
    [1.0, 0.0]
    """

    def __init__(self, table: EmbeddingTable, *, rank: int | None = None) -> None:
        self.table = table
        self.rank = table.embedding_dim - 1 if rank is None else rank
        if self.rank < 0 or table.embedding_dim != 1 + self.rank:
            raise ValueError(
                f"a factorisation machine of rank {self.rank} needs rows of 1 + rank = {1 + self.rank} elements "
                f"(linear weight, factors); the table has embedding_dim {table.embedding_dim}"
            )
        self._bias_key = hashemb.hash_keys(["bias"], field=BIAS_FIELD)[0]
        self._keys = np.empty(0, np.uint64)
        self._vectors = np.empty((0, 1 + self.rank), np.float32)
        self._gradients = np.empty((0, 1 + self.rank), np.float32)

    def __repr__(self) -> str:
        return f"FactorizationMachine(rank={self.rank}, table={self.table!r})"

    def predict_logits(self, keys: KeyArray) -> Float32Array:
        """Log-odds of each example, shape (n,); arguments as for `predict_proba`."""
        keys = _check_keys(keys)
        n, num_fields = keys.shape
        logits = np.empty(n, np.float32)
        if n == 0:
            return logits
        vectors, bias = self._lookup(keys)
        scratch = self._gradients_like(min(n, self._block_len(num_fields)) * num_fields)
        for block in self._blocks(n, num_fields):
            size = block.stop - block.start
            others = scratch[: size * num_fields].reshape(size, num_fields, 1 + self.rank)
            logits[block] = _forward(vectors[block], others)
        logits += bias
        return logits

    def predict_proba(self, keys: KeyArray) -> Float32Array:
        """Probability of label 1 for each example.

        Parameters
        ----------
        keys : integer array, shape (n, num_fields)
            One hashed key per field, as `hashemb.hash_fields` returns them.

        Returns
        -------
        ndarray of float32, shape (n,)
            An example's probability doesn't depend on the batch it comes in.
        """
        return _sigmoid(self.predict_logits(keys))

    def learn(self, keys: KeyArray, labels: npt.ArrayLike) -> Float32Array:
        """Score a batch, then take one optimiser step on its summed logistic loss.

        Parameters
        ----------
        keys : integer array, shape (n, num_fields)
        labels : array_like, shape (n,)
            In [0, 1]; 0 or 1 for clicks.

        Returns
        -------
        ndarray of float32, shape (n,)
            Probabilities *before* the update: what progressive validation is made of.

        Raises
        ------
        ValueError
            Labels of the wrong shape or outside [0, 1].
        FloatingPointError
            A logit is not finite: the model has diverged. The table is as before the call.
        """
        keys = _check_keys(keys)
        n, num_fields = keys.shape
        y = _check_labels(labels, n)
        if n == 0:
            return np.empty(0, np.float32)
        vectors, bias = self._lookup(keys)
        flat = self._gradients_like(n * num_fields + 1)
        gradients = flat[:-1].reshape(n, num_fields, 1 + self.rank)
        probabilities = np.empty(n, np.float32)
        for block in self._blocks(n, num_fields):
            logits = _forward(vectors[block], gradients[block])
            logits += bias
            _check_finite(logits, block.start)
            probabilities[block] = _sigmoid(logits)
            _backward(gradients[block], probabilities[block] - y[block])
        flat[-1] = 0.0
        flat[-1, 0] = np.sum(probabilities - y, dtype=np.float64)
        self.table.update(self._keys[: n * num_fields + 1], flat)
        return probabilities

    def _lookup(self, keys: KeyArray) -> tuple[Float32Array, np.float32]:
        """Look up the whole batch and the bias in one call: vectors (n, num_fields, 1 + rank), bias."""
        count = keys.size + 1
        if self._keys.size < count:
            self._keys = np.empty(count, np.uint64)
            self._vectors = np.empty((count, 1 + self.rank), np.float32)
        self._keys[: count - 1].reshape(keys.shape)[...] = keys
        self._keys[count - 1] = self._bias_key
        flat = self._vectors[:count]
        self.table.lookup(self._keys[:count], out=flat)
        return flat[:-1].reshape(*keys.shape, 1 + self.rank), flat[-1, 0]

    def _gradients_like(self, count: int) -> Float32Array:
        if len(self._gradients) < count:
            self._gradients = np.empty((count, 1 + self.rank), np.float32)
        return self._gradients[:count]

    def _block_len(self, num_fields: int) -> int:
        example_bytes = 2 * 4 * max(1, num_fields) * (1 + self.rank)
        return max(1, _BLOCK_BYTES // example_bytes)

    def _blocks(self, n: int, num_fields: int) -> list[slice]:
        """Slices of examples whose vectors and gradients stay in cache from the first pass to the last."""
        size = self._block_len(num_fields)
        return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _forward(vectors: Float32Array, others: Float32Array) -> Float32Array:
    """Logits without bias; `others` receives, per field, the sum over all other fields (s - v_i).

    Column 0 of `others` is zeroed, so that the product runs over whole contiguous rows: einsum is three times as
    fast on those as on the factors' columns alone. And einsum, not BLAS: its bits don't depend on the CPU.
    """
    dim = vectors.shape[2]
    sums = np.einsum("nfd->nd", vectors)
    logits: Float32Array = sums[:, 0].copy()
    if dim > 1:
        np.subtract(sums[:, None, :], vectors, out=others)
        others[:, :, 0] = 0.0
        logits += np.float32(0.5) * np.einsum("nfd,nfd->n", vectors, others)
    return logits


def _backward(others: Float32Array, residuals: Float32Array) -> None:
    """Turn `others`, as `_forward` left them, into the gradients of the summed loss, in place."""
    if others.shape[2] > 1:
        others *= residuals[:, None, None]
    others[:, :, 0] = residuals[:, None]


def _sigmoid(logits: Float32Array) -> Float32Array:
    probabilities: Float32Array = expit(logits)
    return probabilities


def _check_keys(keys: KeyArray) -> KeyArray:
    keys = np.asarray(keys)
    if keys.ndim != 2:
        raise ValueError(f"keys must have shape (n, num_fields), got {keys.ndim} dimensions: {keys.shape}")
    if keys.dtype.kind not in "iu":
        raise TypeError(f"keys must be integers, got {keys.dtype}: hash values with hashemb.hash_fields first")
    return keys


def _check_labels(labels: npt.ArrayLike, n: int) -> Float32Array:
    y = np.asarray(labels, np.float32)
    if y.shape != (n,):
        raise ValueError(f"labels must have shape ({n},), one per row of keys, got {y.shape}")
    inside = (y >= 0.0) & (y <= 1.0)  # False for NaN
    if not inside.all():
        first = int(np.argmin(inside))
        raise ValueError(f"labels must be in [0, 1], got {y[first]} at index {first}")
    return y


def _check_finite(logits: Float32Array, start: int) -> None:
    finite = np.isfinite(logits)
    if not finite.all():
        first = int(np.argmin(finite))
        raise FloatingPointError(
            f"the logit of example {start + first} of the batch is {logits[first]}: the model has diverged; "
            "train a new table with a lower lr"
        )
