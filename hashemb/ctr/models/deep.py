"""DeepFM and DCN-V2 on a hashed table: deep click models that need no vocabulary.

Both are PyTorch modules that take hashed keys and return log-odds. The embeddings are rows of a table, which is trained
by its own optimiser (`hashemb.torch`); all other parameters are torch parameters. This module needs the extra
``hashemb[torch]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import hashemb.torch
from hashemb import EmbeddingTable

import torch  # isort: skip - hashemb.torch says what to install where it is missing
from torch import Tensor  # isort: skip

__all__ = ["DCNv2", "DeepFM", "predict_proba"]


class DeepFM(torch.nn.Module):
    """A factorisation machine and a tower of dense layers that share their embeddings.

    ``logit = bias + sum_i w_i + sum_{i<j} <v_i, v_j> + tower(v_1, …, v_F)``, over the F fields of an example.

    Parameters
    ----------
    table : EmbeddingTable
        Table of the embeddings. Column 0 of a row is the linear weight w, the others are the embedding v.
    num_fields : int
        Number of keys in an example.
    hidden_units : sequence of int
        Widths of the tower's layers.
    dropout : float
        Share of each layer's outputs that is dropped in training, in [0, 1).
    batch_norm : bool
        Whether batch normalisation is applied before each activation.
    l2 : float
        L2 regularisation of the embeddings, as for `hashemb.torch.Embedding`.

    Attributes
    ----------
    embedding : hashemb.torch.Embedding
        Look-ups in the table.
    tower : torch.nn.Sequential
        The dense layers.
    bias : torch.nn.Parameter
        The bias of the logit.

    References
    ----------
    Guo et al.: DeepFM: A Factorization-Machine based Neural Network for CTR Prediction, IJCAI 2017.

    Examples
    --------
    >>> import tempfile, hashemb, torch
    >>> _ = torch.manual_seed(0)
    >>> from hashemb.ctr.models.deep import DeepFM
    >>> table = hashemb.create(tempfile.mkdtemp() + "/t.emb", num_embeddings=2**16, embedding_dim=1 + 8,
    ...                        optimizer=hashemb.Adagrad(lr=0.1))
    >>> keys = hashemb.hash_fields({"user": ["ann", "bob", "eve"], "ad": ["shoes", "shoes", "kettle"]})
    >>> model = DeepFM(table, 2, hidden_units=(16, 16))
    >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    >>> for _ in range(30):
    ...     optimizer.zero_grad()
    ...     loss = torch.nn.functional.binary_cross_entropy_with_logits(model(keys), torch.tensor([1.0, 0.0, 1.0]))
    ...     loss.backward()           # the table's rows learn here
    ...     optimizer.step()          # and everything else here
    >>> predict_proba(model, keys).round().tolist()
    [1.0, 0.0, 1.0]
    >>> table.close()
    """

    def __init__(
        self,
        table: EmbeddingTable,
        num_fields: int,
        *,
        hidden_units: Sequence[int] = (400, 400, 400),
        dropout: float = 0.0,
        batch_norm: bool = True,
        l2: float = 0.0,
    ) -> None:
        super().__init__()
        if table.embedding_dim < 2:
            raise ValueError(f"DeepFM needs rows of 1 + rank >= 2 elements, the table has {table.embedding_dim}")
        self.embedding = hashemb.torch.Embedding(table, l2=l2)
        self.num_fields = num_fields
        width = num_fields * (table.embedding_dim - 1)
        self.tower = _tower(width, hidden_units, dropout, batch_norm)
        self.tower.append(torch.nn.Linear(hidden_units[-1] if hidden_units else width, 1))
        self.bias = torch.nn.Parameter(torch.zeros(()))

    def forward(self, keys: Any) -> Tensor:
        """Return the log-odds, shape (n,), of examples with keys (n, num_fields) of any integer dtype."""
        rows = self.embedding(_check_keys(keys, self.num_fields))
        linear, vectors = rows[..., 0].sum(1), rows[..., 1:]
        sums = vectors.sum(1)
        pairs = 0.5 * (sums.square() - vectors.square().sum(1)).sum(1)
        deep = self.tower(vectors.flatten(1)).squeeze(1)
        return self.bias + linear + pairs + deep


class DCNv2(torch.nn.Module):
    """Deep & cross network, version 2: cross layers in parallel with a tower of dense layers.

    Cross layer l maps ``x_l`` to ``x_0 * (W_l x_l + b_l) + x_l``, where x_0 is the concatenation of the example's
    embeddings; the logit is linear in the outputs of the last cross layer and the tower.

    Parameters
    ----------
    table : EmbeddingTable
        Table of the embeddings; each row is one embedding.
    num_fields : int
        Number of keys in an example.
    num_cross_layers : int
        Number of cross layers; L layers yield a polynomial of degree L + 1.
    hidden_units, dropout, batch_norm, l2
        As for `DeepFM`. Without hidden units the model has cross layers only.

    References
    ----------
    Wang et al.: DCN V2: Improved Deep & Cross Network and Practical Lessons for Web-scale Learning to Rank Systems,
    WWW 2021, sections 3.1 to 3.3 (parallel structure).

    Examples
    --------
    >>> import tempfile, hashemb
    >>> from hashemb.ctr.models.deep import DCNv2
    >>> table = hashemb.create(tempfile.mkdtemp() + "/t.emb", num_embeddings=2**16, embedding_dim=8)
    >>> keys = hashemb.hash_fields({"user": ["ann", "bob", "eve"], "ad": ["shoes", "shoes", "kettle"]})
    >>> predict_proba(DCNv2(table, 2, hidden_units=(16,)), keys).shape
    (3,)
    >>> table.close()
    """

    def __init__(
        self,
        table: EmbeddingTable,
        num_fields: int,
        *,
        num_cross_layers: int = 3,
        hidden_units: Sequence[int] = (400, 400, 400),
        dropout: float = 0.0,
        batch_norm: bool = True,
        l2: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = hashemb.torch.Embedding(table, l2=l2)
        self.num_fields = num_fields
        width = num_fields * table.embedding_dim
        self.crosses = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(num_cross_layers))
        self.tower = _tower(width, hidden_units, dropout, batch_norm)
        self.output = torch.nn.Linear(width + (hidden_units[-1] if hidden_units else 0), 1)

    def forward(self, keys: Any) -> Tensor:
        """Return the log-odds, shape (n,), of examples with keys (n, num_fields) of any integer dtype."""
        first = self.embedding(_check_keys(keys, self.num_fields)).flatten(1)
        crossed = first
        for cross in self.crosses:
            crossed = first * cross(crossed) + crossed
        outputs = [crossed, self.tower(first)] if len(self.tower) else [crossed]
        return self.output(torch.cat(outputs, 1)).squeeze(1)


def predict_proba(model: torch.nn.Module, keys: Any, *, batch_size: int = 8192) -> npt.NDArray[np.float32]:
    """Predict the probabilities of label 1, with the model in evaluation mode during the call.

    Parameters
    ----------
    model : torch.nn.Module
        A module that returns log-odds, such as `DeepFM` or `DCNv2`.
    keys : integer array, shape (n, num_fields)
        Keys of the examples.
    batch_size : int
        Number of examples that are scored at a time, which bounds the memory.

    Returns
    -------
    ndarray of float32, shape (n,)
    """
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            parts = [model(keys[i : i + batch_size]).float().sigmoid().numpy() for i in range(0, len(keys), batch_size)]
    finally:
        model.train(was_training)
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


class _Dropout(torch.nn.Module):
    """Like `torch.nn.Dropout`, but with eight random bits per element and the share rounded to a multiple of 1/256.

    On a CPU, torch draws its random numbers one at a time: `torch.nn.Dropout` takes almost half of a tower's time.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        if not 0.0 <= share <= 255.5 / 256:
            raise ValueError(f"dropout must be in [0, 1) and leave at least a 256th, got {share!r}")
        self.num_kept = round(256 * (1.0 - share))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        is_kept = words.view(torch.uint8)[: x.numel()].view(x.shape) < self.num_kept
        return x * (is_kept.to(x.dtype) * (256 / self.num_kept))

    def extra_repr(self) -> str:
        return f"{1 - self.num_kept / 256:g}"


def _tower(width: int, hidden_units: Sequence[int], dropout: float, batch_norm: bool) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for units in hidden_units:
        layers.append(torch.nn.Linear(width, units))
        layers += [torch.nn.BatchNorm1d(units)] if batch_norm else []
        layers.append(torch.nn.ReLU())
        layers += [_Dropout(dropout)] if dropout else []
        width = units
    return torch.nn.Sequential(*layers)


def _check_keys(keys: Any, num_fields: int) -> Any:
    shape = tuple(np.shape(keys))
    if len(shape) != 2 or shape[1] != num_fields:
        raise ValueError(f"keys must have shape (n, {num_fields}), one column per field, got {shape}")
    return keys
