"""The modules of hashemb.torch against those of torch.nn on the same rows: results, gradients, Adagrad updates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import hashemb

torch = pytest.importorskip("torch")
from hashemb.torch import Embedding, EmbeddingBag, TableOptimizer  # noqa: E402

NUM_ROWS, DIM, LR = 41, 5, 0.25


@pytest.fixture
def table(tmp_path: Path) -> Iterator[hashemb.EmbeddingTable]:
    optimizer, init = hashemb.Adagrad(lr=LR, initial_accumulator_value=0.1), hashemb.Uniform(0.5)
    with hashemb.create(
        tmp_path / "t.emb", num_embeddings=NUM_ROWS, embedding_dim=DIM, optimizer=optimizer, init=init
    ) as created:
        yield created


def key_of_row(table: hashemb.EmbeddingTable) -> npt.NDArray[np.int64]:
    """Return a key for each row."""
    tried = np.arange(-1000, 1000)
    rows, first = np.unique(table.rows(tried), return_index=True)
    assert rows.tolist() == list(range(NUM_ROWS))
    return tried[first]


def dense_twin(table: hashemb.EmbeddingTable, kind: Any, **options: Any) -> tuple[Any, Any]:
    """Make torch's module with the rows of the table as its weight, and torch's Adagrad for it."""
    weight = torch.from_numpy(table.lookup(key_of_row(table)))
    module = kind(NUM_ROWS, DIM, _weight=weight, **options)
    return module, torch.optim.Adagrad(module.parameters(), lr=LR, initial_accumulator_value=0.1)


def assert_same_rows(table: hashemb.EmbeddingTable, module: Any) -> None:
    np.testing.assert_allclose(table.lookup(key_of_row(table)), module.weight.detach().numpy(), rtol=2e-5, atol=2e-6)


def bags_of(rng: np.random.Generator, num_keys: int, num_bags: int) -> npt.NDArray[np.int64]:
    """Return the offsets of bags, some of which are empty."""
    return np.concatenate([[0], np.sort(rng.integers(0, num_keys + 1, num_bags - 1))])


@pytest.mark.parametrize("collected", [False, True], ids=["at backward", "TableOptimizer"])
def test_embedding_is_that_of_torch(table: hashemb.EmbeddingTable, collected: bool) -> None:
    """Compare them through a nonlinear loss of all fields of a batch at once, with many repeated keys."""
    rng = np.random.default_rng(0)
    ours, (theirs, adagrad) = Embedding(table), dense_twin(table, torch.nn.Embedding)
    tables = TableOptimizer(ours) if collected else None
    before = table.lookup(key_of_row(table))
    for _ in range(30):
        keys, target = rng.integers(-500, 500, (7, 4)), torch.from_numpy(rng.normal(size=(7, 4, DIM)).astype("f"))
        found, expected = ours(torch.from_numpy(keys)), theirs(torch.from_numpy(table.rows(keys)))
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)
        adagrad.zero_grad()
        (expected.sin() - target).square().sum().backward()
        adagrad.step()
        (found.sin() - target).square().sum().backward()
        if tables is not None:
            tables.step()
        assert_same_rows(table, theirs)
    assert table.step == 30
    assert np.abs(table.lookup(key_of_row(table)) - before).mean() > 0.1, "few rows were trained"


@pytest.mark.parametrize("include_last_offset", [False, True])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_are_those_of_torch(table: hashemb.EmbeddingTable, mode: str, include_last_offset: bool) -> None:
    rng = np.random.default_rng(1)
    options = {"mode": mode, "include_last_offset": include_last_offset}
    ours, (theirs, adagrad) = EmbeddingBag(table, **options), dense_twin(table, torch.nn.EmbeddingBag, **options)
    for _ in range(30):
        keys, starts = rng.integers(-500, 500, 40), bags_of(rng, 40, 9)
        offsets = torch.from_numpy(np.append(starts, 40) if include_last_offset else starts)
        grads = torch.from_numpy(rng.normal(size=(9, DIM)).astype("f"))
        found, expected = ours(torch.from_numpy(keys), offsets), theirs(torch.from_numpy(table.rows(keys)), offsets)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)
        adagrad.zero_grad()
        expected.backward(grads)
        adagrad.step()
        found.backward(grads)
        assert_same_rows(table, theirs)


@pytest.mark.parametrize("learned_weights", [False, True])
def test_per_sample_weights_are_those_of_torch(table: hashemb.EmbeddingTable, learned_weights: bool) -> None:
    """Compare bags of equal size in a matrix, and the gradient of the weights."""
    rng = np.random.default_rng(2)
    ours, (theirs, adagrad) = EmbeddingBag(table, mode="sum"), dense_twin(table, torch.nn.EmbeddingBag, mode="sum")
    for _ in range(20):
        keys = rng.integers(-500, 500, (6, 4))
        weights = [torch.from_numpy(rng.normal(size=(6, 4)).astype("f")).clone() for _ in range(2)]
        weights[1].copy_(weights[0])
        for tensor in weights:
            tensor.requires_grad_(learned_weights)
        found = ours(torch.from_numpy(keys), None, weights[0])
        expected = theirs(torch.from_numpy(table.rows(keys)), None, weights[1])
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)
        adagrad.zero_grad()
        expected.square().sum().backward()
        adagrad.step()
        found.square().sum().backward()
        assert_same_rows(table, theirs)
        if learned_weights:
            torch.testing.assert_close(weights[0].grad, weights[1].grad, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("mode", ["sum", "mean", "sqrtn"])
def test_both_ways_of_pooling_agree(table: hashemb.EmbeddingTable, mode: str) -> None:
    """The kernel and, for learned weights, torch's operations agree, also for an empty bag and one with divisor 0."""
    rng = np.random.default_rng(3)
    keys, offsets = torch.from_numpy(rng.integers(-500, 500, 12)), torch.tensor([0, 4, 4, 6])
    weights = torch.from_numpy(rng.random(12).astype("f"))
    weights[4:6] = 0.0
    bag = EmbeddingBag(table, mode=mode)
    fixed, learned = bag(keys, offsets, weights), bag(keys, offsets, weights.requires_grad_())
    torch.testing.assert_close(fixed, learned, rtol=1e-5, atol=1e-6)
    assert not fixed[1:3].any()
    grads = torch.from_numpy(rng.normal(size=(4, DIM)).astype("f"))
    learned.backward(grads)
    assert torch.isfinite(weights.grad).all()
    after = table.lookup(key_of_row(table))
    path = Path(table.path).parent / "other.emb"
    with hashemb.create(
        path, num_embeddings=NUM_ROWS, embedding_dim=DIM, optimizer=table.optimizer, init=table.init
    ) as other:
        EmbeddingBag(other, mode=mode)(keys, offsets, weights.detach().numpy()).backward(grads)
        np.testing.assert_allclose(other.lookup(key_of_row(other)), after, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["sum", "mean", "sqrtn"])
def test_gradient_of_per_sample_weights(table: hashemb.EmbeddingTable, mode: str) -> None:
    """Check first and second derivatives in float64."""
    rng = np.random.default_rng(4)
    keys, offsets = rng.integers(-500, 500, 8), [0, 3, 3]
    weights = torch.from_numpy(rng.random(8) + 0.5).requires_grad_()
    bag = EmbeddingBag(table, mode=mode).double().requires_grad_(False)
    assert torch.autograd.gradcheck(lambda w: bag(keys, offsets, w), (weights,))
    assert torch.autograd.gradgradcheck(lambda w: bag(keys, offsets, w), (weights,))


def test_padding(table: hashemb.EmbeddingTable) -> None:
    """Padding has no vector, is not counted in a mean and has no gradient; -1 is the key 2**64 - 1."""
    keys = torch.tensor([[3, 4, -1], [5, -1, -1], [-1, -1, -1]])
    plain, padded = Embedding(table), Embedding(table, padding_idx=-1)
    assert torch.equal(padded(keys)[0, :2], plain(keys)[0, :2])
    assert not padded(keys)[keys == -1].any()
    assert torch.equal(padded(keys.to(torch.uint64)), padded(keys))
    bag = EmbeddingBag(table, padding_idx=-1)
    expected = torch.stack([plain(keys[0, :2]).mean(0), plain(keys[1, 0]), torch.zeros(DIM)])
    torch.testing.assert_close(bag(keys), expected, rtol=1e-5, atol=1e-7)
    weights = torch.ones(3, 3, requires_grad=True)
    torch.testing.assert_close(bag(keys, None, weights), expected, rtol=1e-5, atol=1e-7)
    before = table.lookup(key_of_row(table))
    (padded(keys).sum() + bag(keys).sum()).backward()
    changed = (table.lookup(key_of_row(table)) != before).any(axis=1)
    assert set(np.flatnonzero(changed)) == set(table.rows([3, 4, 5]))


@pytest.mark.parametrize("kind", [torch.int64, torch.uint64, torch.int32, torch.uint8])
def test_keys_of_any_integer_dtype(table: hashemb.EmbeddingTable, kind: Any) -> None:
    keys = torch.tensor([[0, 7], [200, 7]]).to(kind)
    expected = table.lookup(keys.numpy())
    assert np.array_equal(Embedding(table)(keys).detach().numpy(), expected)
    assert np.array_equal(Embedding(table)(keys.t()).detach().numpy(), expected.transpose(1, 0, 2))
    assert np.array_equal(EmbeddingBag(table, mode="sum")(keys).detach().numpy(), table.lookup(keys.numpy()).sum(1))


def test_empty_batches(table: hashemb.EmbeddingTable) -> None:
    none = torch.empty(0, dtype=torch.int64)
    assert Embedding(table)(none).shape == (0, DIM)
    assert EmbeddingBag(table)(none, none).shape == (0, DIM)
    assert EmbeddingBag(table)(none, torch.zeros(3, dtype=torch.int64)).tolist() == [[0.0] * DIM] * 3
    assert EmbeddingBag(table)(none.reshape(2, 0)).shape == (2, DIM)
    Embedding(table)(none).sum().backward()


def test_one_update_for_look_ups_of_every_kind(table: hashemb.EmbeddingTable) -> None:
    """One table has single vectors, means and weighted sums: the gradients of a key are summed before Adagrad."""
    rng = np.random.default_rng(5)
    modules = [Embedding(table), EmbeddingBag(table), EmbeddingBag(table, mode="sum")]
    tables = TableOptimizer(modules)
    (theirs, adagrad), (mean, _) = dense_twin(table, torch.nn.Embedding), dense_twin(table, torch.nn.EmbeddingBag)
    total = torch.nn.EmbeddingBag(NUM_ROWS, DIM, mode="sum")
    mean.weight = total.weight = theirs.weight
    for _ in range(10):
        keys, offsets = rng.integers(-500, 500, 20), torch.from_numpy(bags_of(rng, 20, 6))
        weights, rows = torch.from_numpy(rng.normal(size=20).astype("f")), torch.from_numpy(table.rows(keys))
        found = modules[0](keys).square().sum() + (modules[1](keys, offsets) + modules[2](keys, offsets, weights)).sum()
        expected = theirs(rows).square().sum() + (mean(rows, offsets) + total(rows, offsets, weights)).sum()
        adagrad.zero_grad()
        expected.backward()
        adagrad.step()
        found.backward()
        tables.step()
        assert_same_rows(table, theirs)
    assert table.step == 10


@pytest.mark.parametrize("kind", ["Embedding", "EmbeddingBag"])
def test_l2_is_a_term_of_the_loss(table: hashemb.EmbeddingTable, kind: str) -> None:
    """It counts each distinct row of a look-up once, however often its key occurs."""
    rng = np.random.default_rng(6)
    ours = Embedding(table, l2=0.3) if kind == "Embedding" else EmbeddingBag(table, mode="sum", l2=0.3)
    theirs, adagrad = dense_twin(table, torch.nn.Embedding)
    keys_by_row = key_of_row(table)
    for _ in range(20):
        rows = rng.integers(0, NUM_ROWS, (6, 4))
        vectors, distinct = theirs(torch.from_numpy(rows)), torch.from_numpy(np.unique(rows))
        expected = vectors if kind == "Embedding" else vectors.sum(1)
        adagrad.zero_grad()
        (expected.sin().sum() + 0.15 * theirs(distinct).square().sum()).backward()
        adagrad.step()
        ours(torch.from_numpy(keys_by_row[rows])).sin().sum().backward()
        assert_same_rows(table, theirs)
    assert table.step == 20
