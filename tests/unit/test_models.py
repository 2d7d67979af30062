"""The factorisation machine: its formula, its gradient, and its use of the table."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hashemb
from hashemb.ctr import _reference_maths
from hashemb.ctr._maths import DistinctKeys
from hashemb.ctr.data import Batch, number_keys
from hashemb.ctr.models import BIAS_FIELD, FactorizationMachine, logistic_loss

RANKS = (0, 1, 4, 15)
MakeTable = Callable[..., hashemb.EmbeddingTable]


@pytest.fixture
def make_table(tmp_path: Path) -> Iterator[MakeTable]:
    tables: list[hashemb.EmbeddingTable] = []

    def make(rank: int, **options: Any) -> hashemb.EmbeddingTable:
        options = {"init": hashemb.Uniform(0.3), "optimizer": hashemb.SGD(lr=1.0), "num_embeddings": 5000} | options
        tables.append(hashemb.create(tmp_path / f"{len(tables)}.emb", embedding_dim=1 + rank, **options))
        return tables[-1]

    yield make
    for table in tables:
        table.close()


def random_batch(n: int, num_fields: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Make keys with few distinct values per field, so that rows repeat within the batch, and labels."""
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 20, (n, num_fields)).astype(np.uint64) + 1000 * np.arange(num_fields, dtype=np.uint64)
    return keys, (rng.random(n) < 0.3).astype(np.float32)


def logits_by_definition(table: hashemb.EmbeddingTable, keys: np.ndarray) -> np.ndarray:
    """Compute Rendle's formula with its double sum, in float64."""
    vectors = table.lookup(keys).astype(np.float64)
    bias = float(table.lookup(hashemb.hash_keys(["bias"], field=BIAS_FIELD))[0, 0])
    pairs = itertools.combinations(range(keys.shape[1]), 2)
    interactions = sum(np.sum(vectors[:, i, 1:] * vectors[:, j, 1:], axis=1) for i, j in pairs)
    return bias + vectors[:, :, 0].sum(axis=1) + interactions


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("num_fields", [1, 2, 3, 39])
def test_logit_is_the_formula(make_table: MakeTable, rank: int, num_fields: int) -> None:
    table = make_table(rank)
    keys, _ = random_batch(50, num_fields)
    logits = FactorizationMachine(table).predict_logits(keys)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, logits_by_definition(table, keys), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", RANKS)
def test_gradient_by_finite_differences(make_table: MakeTable, rank: int) -> None:
    """With SGD at lr 1 a step subtracts the gradient, which is compared with differences of the loss per element."""
    table = make_table(rank)
    keys, labels = random_batch(12, 3)
    model = FactorizationMachine(table)
    probed = np.append(np.unique(keys), hashemb.hash_keys(["bias"], field=BIAS_FIELD))
    assert len(np.unique(table.rows(probed))) == len(probed), "the check needs rows that don't collide"
    before = table.lookup(probed).astype(np.float64)

    def loss(parameters: np.ndarray) -> float:
        vectors = dict(zip(probed.tolist(), parameters, strict=True))
        bias = parameters[-1, 0]
        total = 0.0
        for row, label in zip(keys.tolist(), labels, strict=True):
            v = np.stack([vectors[key] for key in row])
            pairs = sum(v[i, 1:] @ v[j, 1:] for i, j in itertools.combinations(range(len(row)), 2))
            total += float(logistic_loss(bias + v[:, 0].sum() + pairs, label))
        return total

    model.learn(keys, labels)
    step = before - table.lookup(probed)
    epsilon = 1e-5
    for index in np.ndindex(*before.shape):
        shift = np.zeros_like(before)
        shift[index] = epsilon
        expected = (loss(before + shift) - loss(before - shift)) / (2 * epsilon)
        assert step[index] == pytest.approx(expected, abs=2e-5), (rank, index)
    assert np.abs(step).max() > 0.1


def test_probabilities_are_of_before_the_update(make_table: MakeTable) -> None:
    keys, labels = random_batch(100, 5)
    model = FactorizationMachine(make_table(4))
    expected = model.predict_proba(keys)
    np.testing.assert_array_equal(model.learn(keys, labels), expected)
    assert np.abs(model.predict_proba(keys) - expected).max() > 0.01


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("num_fields", [1, 10, 39])
def test_probability_is_the_same_in_any_batch(make_table: MakeTable, rank: int, num_fields: int) -> None:
    keys, _ = random_batch(1500, num_fields)
    model = FactorizationMachine(make_table(rank))
    whole = model.predict_proba(keys)
    singly = [model.predict_proba(keys[i : i + 1])[0] for i in range(0, 1500, 100)]
    np.testing.assert_array_equal(whole[::100], singly)
    np.testing.assert_array_equal(whole, np.concatenate([model.predict_proba(part) for part in np.split(keys, 3)]))


def test_predictions_do_not_depend_on_the_cache_chunks(make_table: MakeTable, monkeypatch: Any) -> None:
    keys, labels = random_batch(1000, 7)
    model, results = FactorizationMachine(make_table(4)), []
    before = model.learn(keys, labels)
    for chunk_bytes in (1, 10_000, 1 << 30):
        monkeypatch.setattr("hashemb.ctr.models.hashed_model._CHUNK_BYTES", chunk_bytes)
        results.append(model.predict_proba(keys))
    assert not np.array_equal(results[0], before)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("num_threads", [1, 4])
@pytest.mark.parametrize("rank", RANKS)
def test_learning_is_the_update_of_all_keys(make_table: MakeTable, rank: int, num_threads: int) -> None:
    """They are equal bit for bit if no two keys share a row: the table sums a gradient per key of each example."""
    keys, labels = random_batch(3000, 7)
    bias_key = hashemb.hash_keys(["bias"], field=BIAS_FIELD)
    options = {"num_embeddings": 10**5, "optimizer": hashemb.Adagrad(lr=0.1)}
    fast, slow = make_table(rank, **options), make_table(rank, **options)
    assert len(np.unique(fast.rows(np.append(keys, bias_key)))) == len(np.unique(keys)) + 1
    hashemb.set_num_threads(num_threads)
    try:
        probabilities = FactorizationMachine(fast).learn(keys, labels)
    finally:
        hashemb.set_num_threads(2)
    vectors = slow.lookup(keys.ravel())
    expected = _reference_maths.run(
        "fm", vectors, labels, bias=float(slow.lookup(bias_key)[0, 0]), num_fields=7, index=np.arange(keys.size)
    )
    bias_gradient = np.zeros((1, 1 + rank), np.float32)
    bias_gradient[0, 0] = expected.residual
    slow.update(np.append(bias_key, keys), np.concatenate([bias_gradient, expected.gradients]))
    np.testing.assert_array_equal(probabilities, expected.probabilities)
    np.testing.assert_array_equal(fast.weight, slow.weight)
    np.testing.assert_array_equal(fast.state["accumulator"], slow.state["accumulator"])


def test_keys_that_were_numbered_before(make_table: MakeTable) -> None:
    keys, labels = random_batch(500, 7)
    batch = number_keys(DistinctKeys())(Batch(labels, keys))
    assert batch.numbering is not None
    np.testing.assert_array_equal(batch.numbering[0][batch.numbering[1]], keys.ravel())
    assert batch.examples(0, 100).numbering is None
    plain, numbered = make_table(4), make_table(4)
    FactorizationMachine(plain).learn(keys, labels)
    model = FactorizationMachine(numbered)
    model.learn(keys, labels, numbering=batch.numbering)
    np.testing.assert_array_equal(plain.weight, numbered.weight)
    with pytest.raises(ValueError, match="490 keys are not those of 500 examples of 7 keys"):
        model.learn(keys, labels, numbering=(batch.numbering[0], batch.numbering[1][:490]))
    with pytest.raises(ValueError, match="an index must be between 0 and 9"):
        model.learn(keys, labels, numbering=(batch.numbering[0][:10], batch.numbering[1]))
    np.testing.assert_array_equal(plain.weight, numbered.weight)


def test_loss_is_summed_over_the_batch(make_table: MakeTable) -> None:
    """A batch with each example twice makes a step twice as large."""
    keys, labels = random_batch(1, 3)
    steps = []
    for copies in (1, 2):
        table = make_table(2)
        before = table.lookup(keys)
        FactorizationMachine(table).learn(np.repeat(keys, copies, axis=0), np.repeat(labels, copies))
        steps.append(before - table.lookup(keys))
    np.testing.assert_allclose(steps[1], 2 * steps[0], rtol=1e-4, atol=1e-6)


def test_bias_alone_learns_the_rate(make_table: MakeTable) -> None:
    """With an uninformative field, the probability becomes the share of positive labels."""
    table = make_table(2, optimizer=hashemb.Adagrad(lr=0.5), init=hashemb.Zeros())
    model = FactorizationMachine(table)
    keys = np.zeros((1000, 1), np.uint64)
    labels = np.zeros(1000, np.float32)
    labels[:200] = 1.0
    for _ in range(200):
        model.learn(keys, labels)
    assert model.predict_proba(keys[:1])[0] == pytest.approx(0.2, abs=1e-3)
    assert table.lookup(hashemb.hash_keys(["bias"], field=BIAS_FIELD))[0, 0] < -0.3


def test_factors_learn_what_linear_weights_cannot(make_table: MakeTable) -> None:
    keys = hashemb.hash_fields({"a": ["x", "x", "y", "y"], "b": ["u", "v", "u", "v"]})
    exclusive_or = np.array([1.0, 0.0, 0.0, 1.0])
    predictions = {}
    for rank in (0, 4):
        model = FactorizationMachine(make_table(rank, optimizer=hashemb.Adagrad(lr=0.1)))
        for _ in range(300):
            model.learn(keys, exclusive_or)
        predictions[rank] = model.predict_proba(keys)
    np.testing.assert_allclose(predictions[0], 0.5, atol=0.1)
    np.testing.assert_allclose(predictions[4], exclusive_or, atol=0.1)


def test_one_lookup_and_one_update_a_batch(make_table: MakeTable) -> None:
    table = make_table(3)
    model = FactorizationMachine(table)
    keys, labels = random_batch(64, 4)
    model.predict_proba(keys)
    assert table.step == 0
    model.learn(keys, labels)
    assert table.step == 1


def test_batches_of_changing_shape_share_buffers(make_table: MakeTable) -> None:
    table = make_table(3)
    model = FactorizationMachine(table)
    for n, num_fields in ((10, 3), (500, 2), (1, 1), (300, 9), (7, 0)):
        keys, labels = random_batch(n, num_fields, seed=n)
        expected = logits_by_definition(table, keys)
        np.testing.assert_allclose(model.predict_logits(keys), expected, rtol=1e-5, atol=1e-5)
        model.learn(keys, labels)


def test_empty_batch_is_no_step(make_table: MakeTable) -> None:
    table = make_table(3)
    model = FactorizationMachine(table)
    keys = np.empty((0, 5), np.uint64)
    assert model.predict_proba(keys).shape == (0,)
    assert model.learn(keys, []).shape == (0,)
    assert table.step == 0


def test_key_dtypes_and_layouts(make_table: MakeTable) -> None:
    model = FactorizationMachine(make_table(3))
    keys, _ = random_batch(20, 4)
    expected = model.predict_proba(keys)
    for dtype in (np.int64, np.int32, ">u8"):
        np.testing.assert_array_equal(model.predict_proba(keys.astype(dtype)), expected)
    for same in (np.asfortranarray(keys), keys.tolist()):
        np.testing.assert_array_equal(model.predict_proba(same), expected)
    np.testing.assert_array_equal(
        model.predict_proba(np.array([[-1, -2]])), model.predict_proba(np.array([[2**64 - 1, 2**64 - 2]], np.uint64))
    )


def test_two_models_on_one_table_are_one_model(make_table: MakeTable) -> None:
    table = make_table(3)
    keys, labels = random_batch(50, 4)
    writer, reader = FactorizationMachine(table), FactorizationMachine(table)
    writer.learn(keys, labels)
    np.testing.assert_array_equal(reader.predict_proba(keys), writer.predict_proba(keys))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.0, 1.0], r"labels must have shape \(3,\), one per example \(row of keys\), got \(2,\)"),
        ([[0.0], [1.0], [1.0]], r"got \(3, 1\)"),
        ([0.0, 1.0, 2.0], r"labels must be in \[0, 1\], got 2.0 at index 2"),
        ([0.0, -1.0, 2.0], r"got -1.0 at index 1"),
        ([0.0, np.nan, 1.0], r"got nan at index 1"),
    ],
)
def test_bad_labels(make_table: MakeTable, labels: Any, message: str) -> None:
    table = make_table(2)
    with pytest.raises(ValueError, match=message):
        FactorizationMachine(table).learn(random_batch(3, 2)[0], labels)
    assert table.step == 0


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        (np.zeros(3, np.uint64), ValueError, r"\(n, num_fields\), or come with offsets, got 1 dimensions"),
        (np.zeros((2, 3, 1), np.uint64), ValueError, r"got 3 dimensions"),
        (np.zeros((2, 3)), TypeError, r"keys must be integers, got float64.*hash_fields"),
        (np.zeros((2, 3), bool), TypeError, r"got bool"),
        ([["a", "b"]], TypeError, r"hash_fields"),
    ],
)
def test_bad_keys(make_table: MakeTable, keys: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FactorizationMachine(make_table(2)).predict_proba(keys)


def test_rank_must_fit_the_table(make_table: MakeTable) -> None:
    table = make_table(4)
    assert FactorizationMachine(table, rank=4).rank == FactorizationMachine(table).rank == 4
    with pytest.raises(ValueError, match=r"rank 8 needs rows of 1 \+ rank = 9 elements.*embedding_dim 5"):
        FactorizationMachine(table, rank=8)
    with pytest.raises(ValueError, match="rank -1"):
        FactorizationMachine(table, rank=-1)


def test_divergence_is_an_error_that_leaves_the_table(make_table: MakeTable) -> None:
    table = make_table(2, optimizer=hashemb.SGD(lr=1e30))
    model = FactorizationMachine(table)
    keys, labels = random_batch(20, 3)
    while np.isfinite(model.predict_logits(keys)).all():
        model.learn(keys, labels)
    step, weight = table.step, table.weight.copy()
    assert 0 < step < 5
    with pytest.raises(FloatingPointError, match=r"the logit of example \d+ of the batch is .*lower lr"):
        model.learn(keys, labels)
    assert table.step == step
    np.testing.assert_array_equal(table.weight, weight)


def test_read_only_table_scores_and_does_not_learn(make_table: MakeTable) -> None:
    table = make_table(2)
    keys, labels = random_batch(20, 3)
    with hashemb.open(table.path) as reader:
        model = FactorizationMachine(reader)
        np.testing.assert_array_equal(model.predict_proba(keys), FactorizationMachine(table).predict_proba(keys))
        with pytest.raises(hashemb.errors.ReadOnlyTableError):
            model.learn(keys, labels)


def test_logistic_loss_is_stable() -> None:
    logits = np.array([-1e4, -50.0, 0.0, 50.0, 1e4], np.float32)
    np.testing.assert_allclose(logistic_loss(logits, np.zeros(5)), [0.0, 1.9e-22, np.log(2), 50.0, 1e4], rtol=0.02)
    np.testing.assert_allclose(logistic_loss(logits, np.ones(5)), [1e4, 50.0, np.log(2), 1.9e-22, 0.0], rtol=0.02)
