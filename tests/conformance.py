"""A conformance kit for tables, whatever their storage. Inherit `Conformance` and define `make` to run it.

    class TestMine(Conformance):
        def make(self, tmp_path, **options):
            return MyTable(**options)

A table is anything with `lookup`, `update`, `rows`, `lr`, `step`, `weight` and `state`. The expected contents come from
`DictTable`, which shares no code with the tables under test. Half-precision storage is compared to within the width of
its steps.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dict_table import DictTable
from strategies import EXTREME_KEYS, POOLINGS, Batch, colliding_keys

from hashemb import SGD, Adagrad, Normal, RowWiseAdagrad, Uniform, Zeros, reference

INTEGER_DTYPES = ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">i4", ">i8", ">u8"]
#: The relative width of one step of each storage, which bounds the error of one update.
STORAGE_STEP = {"float32": 2e-6, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def random_batch(
    seed: int, dim: int, *, num_keys: int = 40, pooling: str | None = None, weighted: bool = False
) -> Batch:
    """Return keys that include extreme values and repeats; with `pooling`, 12 bags, some of them empty."""
    rng = np.random.default_rng(seed)
    keys = rng.choice(np.array([*EXTREME_KEYS, *range(12)], np.int64), num_keys)
    assert len(np.unique(keys)) < num_keys, "no key repeats"
    if pooling is None:
        return Batch(keys, (rng.integers(-16, 17, (num_keys, dim)) / 8).astype(np.float32), {})
    offsets = np.concatenate([[0, 0], np.sort(rng.integers(0, num_keys + 1, 10)), [num_keys]])
    weights = (rng.integers(1, 9, num_keys) / 4).astype(np.float32) if weighted else None
    grads = (rng.integers(-16, 17, (12, dim)) / 8).astype(np.float32)
    return Batch(keys, grads, {"offsets": offsets, "pooling": pooling, "per_sample_weights": weights})


class Conformance:
    """The kit. A subclass defines `make` and, if its table is slow or limited, `options`."""

    options: dict[str, Any] = {}  # noqa: RUF012

    def make(self, tmp_path: Path, **options: Any) -> Any:
        raise NotImplementedError

    def make_both(self, tmp_path: Path, **changes: Any) -> tuple[Any, DictTable]:
        """Make the table under test and its model with the same arguments."""
        options: dict[str, Any] = {"num_embeddings": 101, "embedding_dim": 5, "seed": 7, "init": Uniform(0.5)}
        options |= {"optimizer": Adagrad(lr=0.25)} | self.options | changes
        table = self.make(tmp_path, **options)
        options.pop("dtype", None)
        return table, DictTable(**options)

    @pytest.fixture
    def both(self, tmp_path: Path) -> Any:
        return functools.partial(self.make_both, tmp_path)

    def assert_equal(self, table: Any, model: DictTable, batch: Batch) -> None:
        step = STORAGE_STEP[self.options.get("dtype", "float32")]
        size = 20.0 if batch.call else 1.0  # a bag sums up to about 20 vectors
        np.testing.assert_allclose(
            table.lookup(batch.keys, **batch.call),
            model.lookup(batch.keys, **batch.call),
            rtol=8 * step,
            atol=8 * step * size,
        )

    # -- rows and their initial values --

    @pytest.mark.parametrize("num_hashes", [1, 3])
    def test_rows_are_the_formula(self, both: Any, num_hashes: int) -> None:
        for num_embeddings in (1, 2, 101, 2**16 + 1):
            table, model = both(num_embeddings=num_embeddings, num_hashes=num_hashes)
            found = table.rows(np.array(EXTREME_KEYS)).reshape(len(EXTREME_KEYS), num_hashes)
            assert found.dtype == np.int64
            assert found.tolist() == [model.rows(key) for key in EXTREME_KEYS]

    @pytest.mark.parametrize("init", [Uniform(0.5), Normal(0.25), Zeros()], ids=repr)
    def test_untouched_rows_read_as_their_initial_value(self, both: Any, init: Any) -> None:
        table, _ = both(init=init)
        rows = table.rows(np.array(EXTREME_KEYS))
        expected = reference.initial_rows(rows, embedding_dim=5, init=init, seed=7)
        np.testing.assert_array_equal(table.lookup(np.array(EXTREME_KEYS)), expected)
        assert not table.weight.any(), "reading wrote"
        if not isinstance(init, Zeros):
            assert len(np.unique(expected)) > expected.size // 2, "initial values repeat"

    def test_a_vector_does_not_depend_on_its_batch(self, both: Any) -> None:
        table, _ = both()
        table.update(np.arange(50), np.ones((50, 5), np.float32))
        keys = np.random.default_rng(3).integers(0, 60, (7, 3, 11))
        together = table.lookup(keys)
        assert together.shape == (7, 3, 11, 5)
        assert together.dtype == np.float32
        one_by_one = np.array([table.lookup([key])[0] for key in keys.reshape(-1).tolist()])
        np.testing.assert_array_equal(together.reshape(-1, 5), one_by_one)

    # -- forms of keys --

    @pytest.mark.parametrize("dtype", INTEGER_DTYPES)
    def test_every_integer_dtype(self, both: Any, dtype: str) -> None:
        table, _ = both()
        info = np.iinfo(dtype)
        values = [int(info.min), 0, 1, 100, int(info.max)]
        expected = table.lookup(np.array([value % 2**64 for value in values], np.uint64))
        np.testing.assert_array_equal(table.lookup(np.array(values, dtype)), expected)
        assert len(np.unique(expected, axis=0)) == len(set(values))

    def test_strided_and_read_only_arrays(self, both: Any) -> None:
        table, _ = both()
        keys, grads = np.arange(24).reshape(4, 6), np.ones((4, 3, 5), np.float32)
        keys.flags.writeable = grads.flags.writeable = False
        before = table.lookup(np.ascontiguousarray(keys[:, ::-2]))
        np.testing.assert_array_equal(table.lookup(keys[:, ::-2]), before)
        np.testing.assert_array_equal(table.lookup(keys.T), table.lookup(keys).transpose(1, 0, 2))
        table.update(keys[:, ::-2], grads[:, :, ::-1])
        np.testing.assert_allclose(table.lookup(keys[:, ::-2]), before - 0.25, rtol=0.01)

    def test_empty_and_zero_dimensional_batches(self, both: Any) -> None:
        table, _ = both()
        assert table.lookup(np.empty((0, 3), np.int64)).shape == (0, 3, 5)
        assert table.lookup(np.int64(7)).shape == (5,)
        np.testing.assert_array_equal(table.lookup(np.array(7)), table.lookup([7])[0])
        table.update(np.empty(0, np.int64), np.empty((0, 5), np.float32))
        assert table.step == 1, "an empty batch is a step"
        assert not table.weight.any()
        table.update(np.array(7), np.ones(5, np.float32))
        assert table.step == 2
        assert np.count_nonzero(table.weight.any(axis=1)) == 1

    # -- updates --

    @pytest.mark.parametrize("num_hashes", [1, 2])
    @pytest.mark.parametrize("pooling", [None, *POOLINGS])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_it_learns_as_the_model_does(self, both: Any, num_hashes: int, pooling: str | None, weighted: bool) -> None:
        table, model = both(num_hashes=num_hashes)
        for seed in range(4):
            batch = random_batch(seed, 5, pooling=pooling, weighted=weighted)
            table.update(batch.keys, batch.grads, **batch.call)
            model.update(batch.keys, batch.grads, **batch.call)
            self.assert_equal(table, model, Batch(np.array(EXTREME_KEYS), batch.grads, {}))
            self.assert_equal(table, model, batch)
        assert table.step == model.step == 4

    def test_repeated_and_colliding_keys_are_summed_first(self, both: Any) -> None:
        """Adagrad's first step has size lr for any gradient; two steps instead of one would have 1.7 lr."""
        table, _ = both(init=Zeros())
        twins = colliding_keys(2, num_embeddings=101, seed=7)
        grads = np.array([[1.0], [2.0], [4.0]], np.float32) * np.ones((1, 5), np.float32)
        table.update(np.array([twins[0], twins[1], twins[0]]), grads)
        np.testing.assert_allclose(table.lookup(twins), -0.25, rtol=2 * STORAGE_STEP["bfloat16"])
        assert np.count_nonzero(table.weight.any(axis=1)) == 1

    def test_only_the_rows_of_its_keys_change(self, both: Any) -> None:
        table, _ = both()
        table.update(np.arange(60), np.ones((60, 5), np.float32))
        before = {name: array.copy() for name, array in {"weight": table.weight, **table.state}.items()}
        keys = np.arange(100, 110)
        touched = np.unique(table.rows(keys))
        table.update(keys, np.ones((10, 5), np.float32))
        others = np.setdiff1d(np.arange(101), touched)
        for name, array in {"weight": table.weight, **table.state}.items():
            np.testing.assert_array_equal(array[others], before[name][others], err_msg=name)
            assert (array[touched] != before[name][touched]).any(), name

    def test_a_written_row_is_never_all_zero_bytes(self, both: Any) -> None:
        """An update that lands on 0 must not turn into the initial value at the next look-up."""
        table, _ = both(optimizer=SGD(lr=1.0))
        table.update([3], table.lookup([3]))
        np.testing.assert_array_equal(table.lookup([3]), np.zeros((1, 5), np.float32))
        assert table.weight[table.rows([3])].tobytes().strip(b"\0") != b""

    # -- learning rates, decay --

    def test_the_rate_of_the_moment_is_used(self, both: Any) -> None:
        table, model = both(optimizer=SGD(lr=0.5))
        for lr in (0.5, 0.0, 0.125, 2.0):
            table.lr = model.lr = lr
            assert table.lr == lr
            batch = random_batch(int(lr * 8), 5)
            table.update(batch.keys, batch.grads)
            model.update(batch.keys, batch.grads)
            self.assert_equal(table, model, batch)

    @pytest.mark.parametrize(
        "optimizer", [SGD(lr=0.5, weight_decay=0.25), RowWiseAdagrad(lr=0.25, weight_decay=0.5)], ids=repr
    )
    def test_decay_reaches_every_row_at_every_step(self, both: Any, optimizer: Any) -> None:
        table, model = both(optimizer=optimizer)
        everything = Batch(np.arange(80), np.empty((0, 5), np.float32), {})
        for seed in range(5):
            batch = random_batch(seed, 5)
            table.update(batch.keys, batch.grads)
            model.update(batch.keys, batch.grads)
            self.assert_equal(table, model, everything)
        assert model.faded < 0.6
