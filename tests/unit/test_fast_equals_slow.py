"""The table equals its slow twin bit for bit, over dtype, dim, optimiser, batch, bags, threads and ISA."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import hashemb
from hashemb import _runtime
from hashemb.reference import ReferenceTable

DIMS = (1, 2, 3, 5, 8, 16, 17, 32, 64, 100, 128)
DTYPES = ("float32", "float16", "bfloat16")
OPTIMIZERS = {
    "adagrad": hashemb.Adagrad(lr=0.05),
    "adagrad_offset_decay": hashemb.Adagrad(lr=0.05, initial_accumulator_value=0.1, weight_decay=0.3),
    "rowwise": hashemb.RowWiseAdagrad(lr=0.05, eps=1e-6),
    "rowwise_decay": hashemb.RowWiseAdagrad(lr=0.1, weight_decay=0.01),
    "sgd": hashemb.SGD(lr=0.5),
    "sgd_decay": hashemb.SGD(lr=0.5, weight_decay=0.2),
    "ftrl": hashemb.FTRL(alpha=0.1, beta=1.0, l1=0.02, l2=0.5),
}
INITS = (hashemb.Uniform(0.05), hashemb.Normal(0.1), hashemb.Zeros())


def make_pair(tmp_path, **options):
    fast = hashemb.create(tmp_path / f"t{np.random.default_rng().integers(2**62)}", **options)
    return fast, ReferenceTable(**options)


def random_batch(rng, num_keys, num_bags):
    """Make keys with duplicates and extreme values, and offsets with empty bags."""
    keys = rng.integers(-50, 50, num_keys)
    keys[rng.random(num_keys) < 0.3] = rng.integers(-(2**63), 2**63 - 1, 1)
    cuts = np.sort(rng.integers(0, num_keys + 1, num_bags - 1)) if num_bags > 1 else []
    return keys, np.concatenate([[0], cuts, [num_keys]]).astype(np.int64)


def assert_same(fast, slow, keys, **call):
    np.testing.assert_array_equal(
        fast.lookup(keys, **call).view(np.uint32), slow.lookup(keys, **call).view(np.uint32)
    )


def assert_same_bytes(fast, slow):
    assert fast.weight.tobytes() == slow.weight.tobytes()
    assert set(fast.state) == set(slow.state)
    for name in slow.state:
        assert fast.state[name].tobytes() == slow.state[name].tobytes(), name
    assert fast.step == slow.step


def train_both(fast, slow, rng, *, steps=3, num_keys=200):
    dim = slow.embedding_dim
    for i in range(steps):
        keys, offsets = random_batch(rng, num_keys, 40)
        grads = rng.normal(size=(num_keys, dim)).astype(np.float32)
        fast.update(keys, grads)
        slow.update(keys, grads)
        fast.lr = slow.lr = slow.lr * 0.9
        pooling = ("sum", "mean", "sqrtn")[i % 3]
        weights = None if i == 1 else rng.normal(size=num_keys).astype(np.float32)
        call = {"offsets": offsets, "pooling": pooling, "per_sample_weights": weights}
        assert_same(fast, slow, keys, **call)
        grads = rng.normal(size=(40, dim)).astype(np.float32)
        fast.update(keys, grads, **call)
        slow.update(keys, grads, **call)
        assert_same(fast, slow, rng.integers(-60, 60, (7, 9)))
    assert_same_bytes(fast, slow)


@pytest.fixture(autouse=True)
def restore_threads_and_isa():
    threads, isa = hashemb.get_num_threads(), _runtime.get_isa()
    yield
    hashemb.set_num_threads(threads)
    _runtime.set_isa(isa)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_over_dims_and_optimizers(tmp_path, dim, dtype):
    for i, (name, optimizer) in enumerate(OPTIMIZERS.items()):
        rng = np.random.default_rng([dim, i])
        options = {"num_embeddings": 301, "embedding_dim": dim, "dtype": dtype, "optimizer": optimizer}
        fast, slow = make_pair(tmp_path, **options, init=INITS[i % 3], seed=i, num_hashes=1 + (i + dim) % 3)
        with fast:
            train_both(fast, slow, rng, steps=2)
        assert np.count_nonzero(slow.weight.any(axis=1)) > 60, name  # the batches are really diverse


@pytest.mark.parametrize("isa", _runtime.available_isas())
@pytest.mark.parametrize("dim", [1, 5, 16, 64, 128])
def test_every_isa(tmp_path, isa, dim):
    _runtime.set_isa(isa)
    assert _runtime.get_isa() == isa
    for dtype, (i, optimizer) in itertools.product(DTYPES, enumerate(OPTIMIZERS.values())):
        options = {"num_embeddings": 97, "embedding_dim": dim, "dtype": dtype, "optimizer": optimizer}
        fast, slow = make_pair(tmp_path, **options, init=INITS[(i + 1) % 3], num_hashes=1 + i % 2)
        with fast:
            train_both(fast, slow, np.random.default_rng(i), steps=1)


@pytest.mark.parametrize("isa", _runtime.available_isas())
@pytest.mark.parametrize("optimizer_class", [hashemb.Adagrad, hashemb.RowWiseAdagrad])
@pytest.mark.parametrize("dim", [1, 8, 16, 17, 32, 48, 64, 80])
def test_rows_that_become_zero_in_part(tmp_path, isa, optimizer_class, dim):
    """With that accumulator, and gradients too small for it, an update subtracts exactly the gradient."""
    _runtime.set_isa(isa)
    cuts = (0, 1, 2, 15, 16, 17, 32, 63, dim - 1, dim)
    parts = sorted({(a, b) for a in cuts for b in cuts if a < b <= dim})
    keys = np.arange(len(parts))
    optimizer = optimizer_class(lr=2.0**30, initial_accumulator_value=2.0**60)
    fast, slow = make_pair(tmp_path, num_embeddings=1 << 14, embedding_dim=dim, optimizer=optimizer)
    assert len(np.unique(slow.rows(keys))) == len(parts)
    grads = np.random.default_rng(dim).normal(size=(len(parts), dim)).astype(np.float32)
    with fast:
        for table in (fast, slow):
            table.update(keys, grads)
        rows = slow.lookup(keys)
        grads = np.zeros_like(rows)
        for grad, row, (a, b) in zip(grads, rows, parts, strict=True):
            grad[a:b] = row[a:b]
        for _ in range(2):
            for table in (fast, slow):
                table.update(keys, grads)
            assert_same(fast, slow, keys)
            assert_same_bytes(fast, slow)
            grads = np.zeros_like(rows)
        zero = np.array([fast.lookup([key])[0, a:b] == 0 for key, (a, b) in zip(keys, parts, strict=True)], object)
        assert all(part.all() for part in zero)
        assert np.signbit(fast.lookup([keys[parts.index((0, dim))]])[0, 0])


def test_unknown_isa_is_refused():
    with pytest.raises(ValueError, match="no kernels for the instruction set 'avx1024'"):
        _runtime.set_isa("avx1024")


@pytest.mark.parametrize("dim", [1, 5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_threads_do_not_change_bits(tmp_path, optimizer, dim):
    """The batches are large enough for all threads."""
    rng = np.random.default_rng(5)
    keys = rng.integers(0, 3000, 40_000)
    offsets = np.concatenate([[0], np.sort(rng.integers(0, 40_000, 9_999)), [40_000]])
    weights = rng.random(40_000).astype(np.float32)
    grads, bag_grads = (rng.normal(size=(n, dim)).astype(np.float32) for n in (40_000, 10_000))
    call = {"offsets": offsets, "pooling": "sqrtn", "per_sample_weights": weights}
    slow = ReferenceTable(num_embeddings=2000, embedding_dim=dim, optimizer=optimizer)
    slow.update(keys, grads)
    slow.update(keys, bag_grads, **call)
    for num_threads in (1, 2, 3, 8):
        hashemb.set_num_threads(num_threads)
        with hashemb.create(
            tmp_path / f"t{num_threads}", num_embeddings=2000, embedding_dim=dim, optimizer=optimizer
        ) as fast:
            fast.update(keys, grads)
            fast.update(keys, bag_grads, **call)
            assert_same_bytes(fast, slow)
            assert_same(fast, slow, keys)
            assert_same(fast, slow, keys, **call)


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("num_embeddings", [1, 2, 3, 255, 257, 4096, 5000, 2**16 + 1])
def test_updates_are_merged_alike_whatever_the_buckets(tmp_path, num_embeddings, num_threads, dim):
    """Cover fewer rows than buckets, empty buckets, and one key in half of the batch or in all of it."""
    hashemb.set_num_threads(num_threads)
    rng = np.random.default_rng(num_embeddings)
    keys = rng.integers(0, 2**63, 20_000)
    keys[rng.random(20_000) < 0.5] = 7
    options = {"num_embeddings": num_embeddings, "embedding_dim": dim, "num_hashes": 2}
    fast, slow = make_pair(tmp_path, **options)
    with fast:
        for batch in (keys, keys[:9], keys[:700], np.full(6000, 7)):
            grads = rng.normal(size=(batch.size, dim)).astype(np.float32)
            fast.update(batch, grads)
            slow.update(batch, grads)
            assert_same_bytes(fast, slow)


def test_a_batch_too_large_for_one_update_is_refused(tmp_path):
    """A batch of 2**32 or more occurrences is refused; the arrays are never touched, so they take no memory."""
    keys, grads = np.zeros(2**28 + 1, np.uint64), np.zeros((2**28 + 1, 1), np.float32)
    with hashemb.create(tmp_path / "t", num_embeddings=10, embedding_dim=1, num_hashes=16) as table:
        with pytest.raises(ValueError, match=r"an update of 4294967312 rows .* of 10 rows .* divide the batch"):
            table.update(keys, grads)
        assert table.step == 0


@pytest.mark.parametrize("num_embeddings", [1, 2, 2**31 - 1, 2**31, 2**33 + 7, 2**63 - 1])
def test_rows_at_any_size(num_embeddings):
    """Compare the row formula alone with Python's integers."""
    from hashemb.reference.table import fmix64, mulhi64

    keys = np.array([0, 1, 2**31, 2**63, 2**64 - 1, 12345678901234567], np.uint64)
    expected = [int(k) * num_embeddings >> 64 for k in fmix64(keys)]
    assert mulhi64(fmix64(keys), num_embeddings).tolist() == expected
