"""The table against independent or published algorithms: PyTorch, FBGEMM's formula, McMahan's, dense decay.

The peers work on a dense matrix of all rows, the table on keys; `table.rows` translates between them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import strategies

import hashemb

NUM_ROWS = 53
RATES = [0.5, 0.25, 0.25, 0.05, 0.0, 0.125]

F64 = npt.NDArray[np.float64]


def every_row(table: hashemb.EmbeddingTable) -> npt.NDArray[np.int64]:
    """Return one key for each row of a small table, in the order of the rows."""
    tried = np.arange(-2000, 2000)
    rows, first = np.unique(table.rows(tried), return_index=True)
    assert rows.tolist() == list(range(table.num_embeddings))
    return tried[first]


def stream(dim: int, *, seed: int, num_batches: int = 40) -> list[tuple[Any, Any]]:
    return strategies.random_stream(num_batches, 64, dim, seed=seed, num_embeddings=NUM_ROWS)


def create(tmp_path: Path, optimizer: Any, dim: int, init: Any = None) -> hashemb.EmbeddingTable:
    init = hashemb.Uniform(0.5) if init is None else init
    return hashemb.create(
        tmp_path / "t.emb", num_embeddings=NUM_ROWS, embedding_dim=dim, optimizer=optimizer, init=init
    )


def dense_gradient(table: hashemb.EmbeddingTable, keys: Any, grads: Any) -> F64:
    """Return the gradient of the whole matrix."""
    total = np.zeros((table.num_embeddings, table.embedding_dim))
    np.add.at(total, table.rows(keys), grads.astype(np.float64))
    return total


# ---- PyTorch ----


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch's own optimiser causes it
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("options", [{}, {"eps": 1e-3, "initial_accumulator_value": 0.5}], ids=str)
def test_adagrad_is_that_of_torch(tmp_path: Path, options: dict[str, float], sparse: bool) -> None:
    torch = pytest.importorskip("torch")
    with create(tmp_path, hashemb.Adagrad(lr=0.25, **options), 5) as table:
        initial = torch.from_numpy(table.lookup(every_row(table)))
        module = torch.nn.Embedding(NUM_ROWS, 5, sparse=sparse, _weight=initial.clone())
        optimizer = torch.optim.Adagrad(module.parameters(), lr=0.25, **options)
        for number, (keys, grads) in enumerate(stream(5, seed=1)):
            table.lr = optimizer.param_groups[0]["lr"] = RATES[number % len(RATES)]
            optimizer.zero_grad()
            module(torch.from_numpy(table.rows(keys))).backward(torch.from_numpy(grads))
            optimizer.step()
            table.update(keys, grads)
        found = table.lookup(every_row(table))
    assert (found != initial.numpy()).any(axis=1).mean() > 0.5, "few rows were trained"
    np.testing.assert_allclose(found, module.weight.detach().numpy(), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_are_those_of_torch(tmp_path: Path, mode: str, weighted: bool) -> None:
    """Compare forward and, by autograd, backward. torch has weights for sums only, so a mean takes one more factor."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    offsets = np.array([0, 3, 3, 10, 11, 40])
    with create(tmp_path, hashemb.SGD(lr=0.5), 6) as table:
        module = torch.nn.EmbeddingBag(
            NUM_ROWS, 6, mode=mode, include_last_offset=True, _weight=torch.from_numpy(table.lookup(every_row(table)))
        )
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        for _ in range(5):
            keys = rng.choice(np.array(strategies.EXTREME_KEYS), 40)
            weights = rng.random(40).astype(np.float32) if weighted and mode == "sum" else None
            call = {"offsets": offsets, "pooling": mode, "per_sample_weights": weights}
            rows, ends = torch.from_numpy(table.rows(keys)), torch.from_numpy(offsets)
            pooled = module(rows, ends, None if weights is None else torch.from_numpy(weights))
            np.testing.assert_allclose(table.lookup(keys, **call), pooled.detach().numpy(), rtol=1e-5, atol=1e-6)
            grads = rng.normal(size=(5, 6)).astype(np.float32)
            optimizer.zero_grad()
            pooled.backward(torch.from_numpy(grads))
            optimizer.step()
            table.update(keys, grads, **call)
        np.testing.assert_allclose(table.lookup(every_row(table)), module.weight.detach().numpy(), rtol=1e-5, atol=2e-6)


# ---- published formulas ----


@pytest.mark.parametrize("dim", [1, 3, 16, 17])
def test_row_wise_adagrad_is_that_of_fbgemm(tmp_path: Path, dim: int) -> None:
    """EXACT_ROWWISE_ADAGRAD: m += mean_d(g²); w -= lr / (sqrt(m) + eps) * g, once per distinct row."""
    with create(tmp_path, hashemb.RowWiseAdagrad(lr=0.25, eps=1e-8), dim) as table:
        w = table.lookup(every_row(table)).astype(np.float64)
        m = np.zeros(NUM_ROWS)
        for number, (keys, grads) in enumerate(stream(dim, seed=3)):
            table.lr = lr = RATES[number % len(RATES)]
            g = dense_gradient(table, keys, grads)
            m += np.mean(g * g, axis=1)
            w -= (lr / (np.sqrt(m) + 1e-8))[:, None] * g
            table.update(keys, grads)
        np.testing.assert_allclose(table.lookup(every_row(table)), w, rtol=1e-4, atol=5e-6)
        np.testing.assert_allclose(table.state["accumulator"], m, rtol=1e-5)


def test_ftrl_is_that_of_mcmahan(tmp_path: Path) -> None:
    """Algorithm 1 of "Ad Click Prediction: a View from the Trenches" (2013), coordinate by coordinate."""
    alpha, beta, l1, l2 = 0.25, 1.0, 2.0, 0.5
    optimizer = hashemb.FTRL(alpha=alpha, beta=beta, l1=l1, l2=l2)
    with create(tmp_path, optimizer, 3, init=hashemb.Zeros()) as table:
        z, n, w = np.zeros((3, NUM_ROWS, 3))
        for keys, grads in stream(3, seed=4):
            g = dense_gradient(table, keys, grads)
            for i in np.argwhere(g):
                at = tuple(i)
                w[at] = 0.0 if abs(z[at]) <= l1 else weight(z[at], n[at], alpha, beta, l1, l2)
                sigma = (np.sqrt(n[at] + g[at] ** 2) - np.sqrt(n[at])) / alpha
                z[at] += g[at] - sigma * w[at]
                n[at] += g[at] ** 2
            table.update(keys, grads)
        w = np.where(np.abs(z) <= l1, 0.0, weight(z, n, alpha, beta, l1, l2))
        found = table.lookup(every_row(table))
    assert 5 < np.count_nonzero(w == 0.0) < w.size - 5, "l1 must zero some weights and not all"
    np.testing.assert_allclose(found, w, rtol=1e-3, atol=2e-5)


def weight(z: Any, n: Any, alpha: float, beta: float, l1: float, l2: float) -> Any:
    return -(z - np.sign(z) * l1) / ((beta + np.sqrt(n)) / alpha + l2)


# ---- lazy decay is dense decay ----


class Dense:
    """The algorithm in float64, visiting every row at every step."""

    def __init__(self, w: F64, optimizer: Any) -> None:
        self.w, self.optimizer = w, optimizer
        self.a = np.zeros_like(w[:, 0] if isinstance(optimizer, hashemb.RowWiseAdagrad) else w)

    def step(self, g: F64, lr: float) -> None:
        self.w *= 1.0 - lr * self.optimizer.weight_decay
        if isinstance(self.optimizer, hashemb.SGD):
            self.w -= lr * g
            return
        by_row = isinstance(self.optimizer, hashemb.RowWiseAdagrad)
        self.a += np.mean(g * g, axis=1) if by_row else g * g
        rate = lr / (np.sqrt(self.a) + self.optimizer.eps)
        self.w -= (rate[:, None] if by_row else rate) * g


DECAYING = [
    hashemb.SGD(lr=0.5, weight_decay=0.05),
    hashemb.Adagrad(lr=0.5, weight_decay=0.1, eps=1e-6),
    hashemb.RowWiseAdagrad(lr=0.5, weight_decay=0.02, eps=1e-6),
]


@pytest.mark.parametrize("optimizer", DECAYING, ids=repr)
@pytest.mark.parametrize("dim", [1, 5])
def test_lazy_decay_is_dense_decay(tmp_path: Path, optimizer: Any, dim: int) -> None:
    """This holds for a learning rate that changes, stays at 0 and returns, and for rows touched late or never."""
    with create(tmp_path, optimizer, dim) as table:
        order = every_row(table)
        dense = Dense(table.lookup(order).astype(np.float64), optimizer)
        never = np.setdiff1d(np.arange(NUM_ROWS), touched(table, dim))
        assert len(never) >= 3, "every row was touched"
        initial = dense.w[never].copy()
        for number, (keys, grads) in enumerate(stream_on_few_rows(dim)):
            table.lr = lr = RATES[number % len(RATES)]
            table.update(keys, grads)
            dense.step(dense_gradient(table, keys, grads), lr)
            if number % 29 == 0:
                bytes_before = table.weight.tobytes()
                np.testing.assert_allclose(table.lookup(order), dense.w, rtol=2e-5, atol=5e-6)
                assert table.weight.tobytes() == bytes_before, "reading paid a debt"
        np.testing.assert_allclose(table.lookup(order), dense.w, rtol=2e-5, atol=5e-6)
        assert np.abs(dense.w[never]).max() < 0.7 * np.abs(initial).max(), "decay too weak to be seen"
        assert not table.weight[never].any()


def stream_on_few_rows(dim: int) -> list[tuple[Any, Any]]:
    """Return batches of two of the keys, and of all of them in every fifth batch; some keys never occur."""
    return [
        (keys[: 64 if number % 5 == 0 else 2], grads[: 64 if number % 5 == 0 else 2])
        for number, (keys, grads) in enumerate(stream(dim, seed=5, num_batches=120))
    ]


def touched(table: hashemb.EmbeddingTable, dim: int) -> npt.NDArray[np.int64]:
    return np.unique(table.rows(np.concatenate([keys for keys, _ in stream_on_few_rows(dim)])))


def test_decay_over_many_steps_stays_exact(tmp_path: Path) -> None:
    """After ten thousand steps on one row, another's owed decay is a single number without ten thousand roundings."""
    optimizer = hashemb.SGD(lr=0.01, weight_decay=0.01)
    with create(tmp_path, optimizer, 4) as table:
        waiting, busy = every_row(table)[:2]
        initial = table.lookup([waiting]).astype(np.float64)
        zero = np.zeros((1, 4), np.float32)
        for _ in range(10_000):
            table.update([busy], zero)
        expected = initial * (1.0 - 0.01 * 0.01) ** 10_000
        np.testing.assert_allclose(table.lookup([waiting]), expected, rtol=1e-6)
        table.update([waiting], zero)
        np.testing.assert_allclose(table.lookup([waiting]), expected * (1.0 - 1e-4), rtol=1e-6)
        np.testing.assert_allclose(table.state["paid"][table.rows([waiting])], 10_001 * np.log1p(-1e-4), rtol=1e-9)
