"""Click-through-rate models that keep all their parameters in the rows of one embedding table.

A model is a formula without state: it looks up rows, computes a probability, and passes gradients back to the table.
Two processes that attach to one table therefore share one model, and only the table needs to be saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy.special import log_expit

import hashemb
from hashemb.ctr._types import Float32Array
from hashemb.ctr.models.hashed_model import BIAS_FIELD, HashedModel

if TYPE_CHECKING:
    from hashemb import EmbeddingTable

__all__ = [
    "BIAS_FIELD",
    "PAIR_FIELD",
    "FactorizationMachine",
    "FieldAwareFM",
    "FieldWeightedFM",
    "HashedModel",
    "logistic_loss",
]


PAIR_FIELD = "hashemb.pair"  # reserved, as is BIAS_FIELD: no data column may have this name


def logistic_loss(logits: npt.NDArray[Any], labels: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Compute the logistic loss of each example, ``log(1 + exp(-z))`` for label 1, without overflow at any logit.

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
    loss: npt.NDArray[np.float64] = -(y * log_expit(z) + (1.0 - y) * log_expit(-z))
    return loss


class FactorizationMachine(HashedModel):
    """Second-order factorisation machine over hashed features; with rank 0, logistic regression.

    ``logit = bias + sum_i w_i x_i + sum_{i<j} <v_i, v_j> x_i x_j``, where i and j run over an example's keys.

    Parameters
    ----------
    table : EmbeddingTable
        Table with rows of 1 + rank elements: the linear weight w, then the latent factors v. Training needs mode
        "r+".
    rank : int, optional
        Number of latent factors; the table's `embedding_dim` must be ``1 + rank``. Default: inferred from the table.

    Notes
    -----
    The sum of all interactions is computed as ``1/2 sum_i <y_i, s - y_i>``, ``y_i = x_i v_i``, ``s = sum_i y_i``, in
    time linear in keys x rank; ``x_i (s - y_i)`` is also the gradient of v_i, and this form avoids the cancellation
    of ``|s|^2 - sum |y_i|^2``. `HashedModel` documents what the models have in common.

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

    kind = "fm"

    def __init__(self, table: EmbeddingTable, *, rank: int | None = None) -> None:
        self.rank = table.embedding_dim - 1 if rank is None else rank
        if self.rank < 0 or table.embedding_dim != 1 + self.rank:
            raise ValueError(
                f"a factorisation machine of rank {self.rank} needs rows of 1 + rank = {1 + self.rank} elements "
                f"(linear weight, factors); the table has embedding_dim {table.embedding_dim}"
            )
        super().__init__(table)


class FieldWeightedFM(HashedModel):
    """Factorisation machine with a learned weight for each pair of fields.

    ``logit = bias + sum_i w_i x_i + sum_{i<j} r_{F(i) F(j)} <v_i, v_j> x_i x_j``, where F(i) is the field of key i.

    Parameters
    ----------
    table : EmbeddingTable
        Table with rows of 1 + rank elements, as for `FactorizationMachine`. The differences r - 1 of the pair weights
        are learned in the rows of reserved keys (`PAIR_FIELD`), ``1 + rank`` pairs per row: pair {f, g}, g <= f, has
        number f (f + 1) / 2 + g. The model therefore starts as a factorisation machine, and weight decay pulls it back
        to one.
    num_fields : int
        Number of fields.
    rank : int, optional
        Number of latent factors, at least 1. Default: inferred from the table.

    Notes
    -----
    In its authors' measurements the model is nearly as good as a field-aware machine and has a few per cent of its
    parameters. Values of one field in the same example (ragged form) interact too, with weight r_{F F}.

    References
    ----------
    Pan, Xu, Ruiz, Zhao, Pan, Sun, Lu: Field-weighted Factorization Machines for Click-Through Rate Prediction in
    Display Advertising, WWW 2018, equation 5.

    Examples
    --------
    >>> import tempfile, hashemb
    >>> table = hashemb.create(tempfile.mkdtemp() + "/fwfm.emb", num_embeddings=1000, embedding_dim=1 + 4)
    >>> model = FieldWeightedFM(table, num_fields=2)
    >>> keys = hashemb.hash_fields({"user": ["ann", "bob"], "ad": ["shoes", "shoes"]})
    >>> model.learn(keys, np.array([1.0, 0.0])).round(1).tolist(), model.pair_weights().shape
    ([0.5, 0.5], (2, 2))
    >>> table.close()
    """

    kind = "fwfm"

    def __init__(self, table: EmbeddingTable, *, num_fields: int, rank: int | None = None) -> None:
        self.rank = table.embedding_dim - 1 if rank is None else rank
        self.num_fields = _check_num_fields(num_fields)
        if self.rank < 1 or table.embedding_dim != 1 + self.rank:
            raise ValueError(
                f"a field-weighted factorisation machine of rank {self.rank} needs rank >= 1 and rows of 1 + rank "
                f"elements (linear weight, factors); the table has embedding_dim {table.embedding_dim}"
            )
        pairs, elements = num_fields * (num_fields + 1) // 2, table.num_embeddings * table.embedding_dim
        if pairs > elements:
            raise ValueError(f"{num_fields:,} fields have {pairs:,} pairs, the table {elements:,} elements for weights")
        super().__init__(table)
        f = np.arange(num_fields)
        high, low = np.maximum(f[:, None], f), np.minimum(f[:, None], f)
        self._pair_of = high * (high + 1) // 2 + low

    def pair_weights(self) -> Float32Array:
        """Return the current weights r of the field pairs, float32 (num_fields, num_fields)."""
        return self._pair_weights(self.table.lookup(self._reserved_keys))

    def _reserved(self) -> npt.NDArray[np.uint64]:
        num_fields = self.num_fields or 0
        num_rows = -(-num_fields * (num_fields + 1) // 2 // self.table.embedding_dim)
        pairs = hashemb.hash_keys(np.arange(num_rows), field=PAIR_FIELD)
        return np.concatenate([super()._reserved(), pairs])

    def _pair_weights(self, vectors: Float32Array) -> Float32Array:
        weights: Float32Array = np.float32(1.0) + vectors[1:].reshape(-1)[self._pair_of]
        return weights

    def _shared(self, vectors: Float32Array) -> dict[str, Any]:
        return super()._shared(vectors) | {"pair_weights": self._pair_weights(vectors)}

    def _put_shared_gradients(self, vectors: Float32Array) -> None:
        super()._put_shared_gradients(vectors)
        gradients = self._maths.pair_gradients
        vectors[1:].reshape(-1)[: gradients.size] = gradients


class FieldAwareFM(HashedModel):
    """Factorisation machine in which a feature has a separate vector for each field that it interacts with.

    ``logit = bias + sum_i w_i x_i + sum_{i<j} <v_i[F(j)], v_j[F(i)]> x_i x_j``, where F(i) is the field of key i.

    Parameters
    ----------
    table : EmbeddingTable
        Table with rows of ``1 + num_fields * rank`` elements: the linear weight w, then the vectors v[0], v[1], …
    num_fields : int
        Number of fields. It determines the shape of the table and cannot change later.
    rank : int, optional
        Elements of each vector, at least 1; ranks 4 and 8 have specialised loops. Default: inferred from the table.

    Notes
    -----
    The model takes about num_fields times the memory of a factorisation machine of the same rank, and reads and writes
    about num_fields times as much per key. It overfits in a few passes: use early stopping or weight decay. Values of
    one field in the same example (ragged form) interact too. Examples are not scaled to unit length, which libffm does
    by default; pass `values` to scale them.

    References
    ----------
    Juan, Zhuang, Chin, Lin: Field-aware Factorization Machines for CTR Prediction, RecSys 2016, equation 4.

    Examples
    --------
    >>> import tempfile, hashemb
    >>> table = hashemb.create(tempfile.mkdtemp() + "/ffm.emb", num_embeddings=1000, embedding_dim=1 + 2 * 4)
    >>> model = FieldAwareFM(table, num_fields=2)
    >>> model.rank
    4
    >>> keys = hashemb.hash_fields({"user": ["ann", "bob"], "ad": ["shoes", "shoes"]})
    >>> model.learn(keys, np.array([1.0, 0.0])).round(1).tolist()
    [0.5, 0.5]
    >>> table.close()
    """

    kind = "ffm"

    def __init__(self, table: EmbeddingTable, *, num_fields: int, rank: int | None = None) -> None:
        self.num_fields = _check_num_fields(num_fields)
        self.rank = (table.embedding_dim - 1) // num_fields if rank is None else rank
        if self.rank < 1 or table.embedding_dim != 1 + num_fields * self.rank:
            raise ValueError(
                f"a field-aware factorisation machine of {num_fields} fields and rank {self.rank} needs rank >= 1 and "
                f"rows of 1 + num_fields * rank = {1 + num_fields * self.rank} elements; the table has embedding_dim "
                f"{table.embedding_dim}"
            )
        super().__init__(table)


def _check_num_fields(num_fields: int) -> int:
    if num_fields < 1:
        raise ValueError(f"num_fields must be at least 1, got {num_fields}")
    return num_fields
