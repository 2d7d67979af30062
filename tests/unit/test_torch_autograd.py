"""Behaviour that users of autograd expect: accumulation, failure, freezing, dtypes, compilation, copies, processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hashemb
from hashemb.errors import ClosedTableError, ReadOnlyTableError

torch = pytest.importorskip("torch")
from hashemb.torch import Embedding, EmbeddingBag, TableOptimizer  # noqa: E402

KEYS = torch.tensor([[1, 2], [3, -1]])
DIM = 4


@pytest.fixture
def table(tmp_path: Path) -> Iterator[hashemb.EmbeddingTable]:
    with create(tmp_path / "t.emb") as created:
        yield created


def create(path: Path, **options: Any) -> hashemb.EmbeddingTable:
    return hashemb.create(path, num_embeddings=1000, embedding_dim=DIM, optimizer=hashemb.Adagrad(lr=0.1), **options)


def twin(table: hashemb.EmbeddingTable) -> hashemb.EmbeddingTable:
    """Make another table with the same rows."""
    return create(Path(table.path + ".twin"))


def loss_of(vectors: Any) -> Any:
    return vectors.square().sum() + vectors.sum()


# ---- when the table is updated ----


def test_a_backward_pass_is_one_update(table: hashemb.EmbeddingTable) -> None:
    embedding = Embedding(table)
    (loss_of(embedding(KEYS)) + embedding(KEYS[0]).sum()).backward()
    with twin(table) as other:
        vectors, again = other.lookup(KEYS.numpy()), other.lookup(KEYS[0].numpy())
        keys = np.concatenate([KEYS.numpy().ravel(), KEYS[0].numpy()])
        other.update(keys, np.concatenate([(2 * vectors + 1).reshape(-1, DIM), np.ones_like(again)]))
        assert table.step == other.step == 1
        assert np.array_equal(table.lookup(KEYS.numpy()), other.lookup(KEYS.numpy()))


def test_accumulation_is_one_update(table: hashemb.EmbeddingTable) -> None:
    """Accumulate micro-batches whose graphs are freed before `step`, twice, and then discard gradients."""
    embedding = Embedding(table)
    optimizer = TableOptimizer(torch.nn.Sequential(embedding))
    with twin(table) as other:
        for _ in range(2):
            for part in KEYS:
                loss_of(embedding(part)).backward()
            other.update(KEYS.numpy(), 2 * other.lookup(KEYS.numpy()) + 1)
            optimizer.step()
            assert optimizer.parameters() == []
        assert table.step == 2
        assert np.array_equal(table.lookup(KEYS.numpy()), other.lookup(KEYS.numpy()))
        loss_of(embedding(KEYS)).backward()
        optimizer.zero_grad()
        optimizer.step()
        assert np.array_equal(table.lookup(KEYS.numpy()), other.lookup(KEYS.numpy()))
    assert table.step == 2


def test_two_modules_on_one_table(table: hashemb.EmbeddingTable) -> None:
    modules = torch.nn.ModuleList([Embedding(table), EmbeddingBag(table)])
    (modules[0](KEYS).sum() + modules[1](KEYS).sum()).backward()
    assert table.step == 2
    optimizer = TableOptimizer(modules)
    (modules[0](KEYS).sum() + modules[1](KEYS).sum()).backward()
    assert len(optimizer.parameters()) == 2
    optimizer.step()
    assert table.step == 3


def test_retained_graph(table: hashemb.EmbeddingTable) -> None:
    """Two passes through one graph are two updates, or with an optimiser one update by the sum."""
    loss = Embedding(table)(KEYS).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert table.step == 2
    embedding = Embedding(table)
    optimizer, loss = TableOptimizer(embedding), embedding(KEYS).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    [leaf] = optimizer.parameters()
    assert leaf.grad.unique().tolist() == [2.0]


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")  # a cycle of tensors, which `step` breaks
def test_gradients_of_gradients(table: hashemb.EmbeddingTable) -> None:
    """Penalise the gradient with respect to the vectors, as in adversarial training: d/dv (3 v²)² = 36 v³."""
    embedding = Embedding(table)
    optimizer, vectors = TableOptimizer(embedding), embedding(KEYS)
    (gradient,) = torch.autograd.grad((vectors**3).sum(), vectors, create_graph=True)
    assert optimizer.parameters() == []
    gradient.square().sum().backward()
    torch.testing.assert_close(optimizer.parameters()[0].grad, 36 * vectors.detach() ** 3)
    vectors = embedding(KEYS)
    optimizer.zero_grad()
    vectors.exp().sum().backward(create_graph=True)
    optimizer.step()
    assert table.step == 1


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        raise KeyError("on purpose")


def test_a_pass_that_fails_leaves_nothing(table: hashemb.EmbeddingTable) -> None:
    embedding = Embedding(table)
    other = torch.ones(3, requires_grad=True)
    failing = _Fails.apply(other).sum()  # before the look-up, so after it in the backward pass
    with pytest.raises(KeyError, match="on purpose"):
        (failing + embedding(KEYS).sum()).backward()
    assert table.step == 0
    embedding(KEYS[:1]).sum().backward()
    with twin(table) as expected:
        expected.update(KEYS[:1].numpy(), np.ones((1, 2, DIM), np.float32))
        assert np.array_equal(table.lookup(KEYS.numpy()), expected.lookup(KEYS.numpy()))


def test_gradients_that_are_not_finite(table: hashemb.EmbeddingTable) -> None:
    embedding = Embedding(table)
    with pytest.raises(ValueError, match=r"grads\[0, 0\] is nan"):
        (embedding(KEYS).sum() * float("nan")).backward()
    optimizer = TableOptimizer(embedding)
    (embedding(KEYS).sum() * float("inf")).backward()
    with pytest.raises(ValueError, match="inf"):
        optimizer.step()
    assert len(optimizer.parameters()) == 1
    optimizer.zero_grad()
    embedding(KEYS).sum().backward()
    optimizer.step()
    assert table.step == 1


def test_gradients_of_any_strides(table: hashemb.EmbeddingTable) -> None:
    """Gradients may be broadcast, transposed or sliced."""
    embedding = Embedding(table)
    grads = torch.arange(64.0).reshape(DIM, 2, 8)[:, :, ::4].permute(2, 1, 0)
    embedding(KEYS).backward(grads)
    embedding(KEYS).sum().backward()
    embedding(KEYS).transpose(0, 2).reshape(-1).sum().backward()
    with twin(table) as other:
        other.update(KEYS.numpy(), grads.numpy())
        for _ in range(2):
            other.update(KEYS.numpy(), np.ones((2, 2, DIM), np.float32))
        assert np.array_equal(table.lookup(KEYS.numpy()), other.lookup(KEYS.numpy()))


def test_results_may_be_changed_in_place(table: hashemb.EmbeddingTable) -> None:
    vectors = Embedding(table)(KEYS)
    torch.nn.functional.relu_(vectors).sum().backward()
    assert table.step == 1


# ---- torch's tools on a TableOptimizer ----


def test_clipping(table: hashemb.EmbeddingTable) -> None:
    embedding = Embedding(table)
    optimizer = TableOptimizer(embedding)
    embedding(KEYS).sum().backward()
    norm = torch.nn.utils.clip_grad_norm_(optimizer.parameters(), 1.0)
    assert float(norm) == 4.0
    optimizer.step()
    with twin(table) as other:
        other.update(KEYS.numpy(), np.full((2, 2, DIM), 0.25, np.float32))
        np.testing.assert_allclose(table.lookup(KEYS.numpy()), other.lookup(KEYS.numpy()), rtol=1e-4)


def test_loss_scaling(table: hashemb.EmbeddingTable) -> None:
    """Gradients are unscaled before the update; a step with infinite gradients is skipped."""
    embedding = Embedding(table)
    optimizer, scaler = TableOptimizer(embedding), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(embedding(KEYS).sum()).backward()
    scaler.unscale_(optimizer)
    assert optimizer.parameters()[0].grad.unique().tolist() == [1.0]
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    scaler.scale(embedding(KEYS).sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert table.step == 1
    assert scaler.get_scale() == 512.0


def test_learning_rates_of_schedulers(table: hashemb.EmbeddingTable) -> None:
    embedding = Embedding(table)
    optimizer = TableOptimizer(embedding)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for expected in (0.1, 0.05, 0.025):
        embedding(KEYS).sum().backward()
        optimizer.step()
        assert table.lr == expected
        schedule.step()
    saved = optimizer.state_dict()
    table.lr = 0.3  # for example by another process, after the last step of a scheduler
    embedding(KEYS).sum().backward()
    restored = TableOptimizer(embedding)
    assert restored.param_groups[0]["lr"] == 0.3
    restored.load_state_dict(saved)
    assert restored.param_groups[0]["lr"] == 0.0125
    with pytest.raises(ValueError, match="2 tables, this optimiser has 1"):
        restored.load_state_dict({"state": {}, "param_groups": saved["param_groups"] * 2})


def test_closure(table: hashemb.EmbeddingTable) -> None:
    embedding = Embedding(table)
    optimizer = TableOptimizer([embedding])

    def closure() -> float:
        loss = embedding(KEYS).sum()
        loss.backward()
        return float(loss.detach())

    expected = float(embedding(KEYS).detach().sum())
    with torch.no_grad():
        assert optimizer.step(closure) == expected
    assert table.step == 1


def test_an_optimiser_without_tables() -> None:
    with pytest.raises(ValueError, match="no hashemb"):
        TableOptimizer(torch.nn.Linear(1, 1))


# ---- modes, dtypes, devices ----


def test_without_gradients(table: hashemb.EmbeddingTable) -> None:
    embedding = Embedding(table)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert not embedding(KEYS).requires_grad
    model = torch.nn.Sequential(embedding, torch.nn.Linear(DIM, 1))
    model.eval()
    assert model(KEYS).requires_grad
    embedding.requires_grad_(False)
    assert not embedding(KEYS).requires_grad
    model(KEYS).sum().backward()
    assert table.step == 0


def test_a_table_that_is_only_read(table: hashemb.EmbeddingTable) -> None:
    with hashemb.open(table.path) as reader:
        embedding = Embedding(reader)
        assert not embedding(KEYS).requires_grad
        loss = embedding.requires_grad_()(KEYS).sum()
        with pytest.raises(ReadOnlyTableError):
            loss.backward()
    with pytest.raises(ClosedTableError):
        embedding(KEYS)


def test_dtypes(table: hashemb.EmbeddingTable) -> None:
    """Vectors have the dtype of the module; the table computes in float32. Autocast applies after the look-up."""
    embedding = Embedding(table)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        embedding.to(dtype)
        vectors = embedding(KEYS)
        assert vectors.dtype == dtype
        vectors.sum().backward()
    model = torch.nn.Sequential(embedding, torch.nn.Linear(DIM, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert embedding(KEYS).dtype == torch.float32
        result = model(KEYS)
    assert result.dtype == torch.bfloat16
    result.float().sum().backward()
    assert table.step == 4
    weights = torch.ones(2, 2, dtype=torch.bfloat16)
    plain = EmbeddingBag(table, mode="sum")
    torch.testing.assert_close(plain(KEYS, None, weights), plain(KEYS))


def test_other_devices(table: hashemb.EmbeddingTable) -> None:
    embedding = Embedding(table)
    with pytest.raises(RuntimeError, match=r"cannot move to meta.*move what it returns"):
        torch.nn.Sequential(embedding).to("meta")
    assert embedding.cpu()(KEYS).device.type == "cpu"


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch.compile reads it from graph inputs
def test_compiled(table: hashemb.EmbeddingTable) -> None:
    """The look-up stays outside of the graphs before and after it."""
    embedding, bag = Embedding(table), EmbeddingBag(table)
    compiled = torch.compile(lambda keys: (embedding(keys * 1).sin() + bag(keys)).sum(), backend="eager")
    with torch.no_grad():
        expected = (embedding(KEYS).sin() + bag(KEYS)).sum()
    loss = compiled(KEYS)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert table.step == 2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: Embedding("t.emb"), TypeError, "must be a hashemb.EmbeddingTable, got str"),
        (lambda t: Embedding(t)(torch.rand(2)), TypeError, "hash_keys"),
        (lambda t: EmbeddingBag(t, mode="max"), ValueError, "'max'"),
        (lambda t: EmbeddingBag(t)(KEYS[0]), ValueError, r"one and offsets; got shape \(2,\)"),
        (lambda t: EmbeddingBag(t)(KEYS, [0]), ValueError, "bags already"),
        (lambda t: EmbeddingBag(t)(KEYS[0], [1]), ValueError, "start at 0"),
        (lambda t: EmbeddingBag(t)(KEYS[0], [0, 2, 1]), ValueError, "never fall"),
        (lambda t: EmbeddingBag(t)(KEYS[0], [0.0]), ValueError, "integers of one dimension, got float64"),
        (lambda t: EmbeddingBag(t, include_last_offset=True)(KEYS[0], [0, 1]), ValueError, "end at 2"),
        (lambda t: EmbeddingBag(t)(KEYS, None, torch.ones(3)), ValueError, r"\(2, 2\), got \(3,\)"),
        (lambda t: EmbeddingBag(t)(KEYS, None, torch.ones(2, 2, dtype=torch.int64)), TypeError, "must be floats"),
    ],
)
def test_wrong_arguments(table: hashemb.EmbeddingTable, call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(table)
