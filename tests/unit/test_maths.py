"""The compiled maths of the models against its slow twin, bit for bit: every form of a batch, CPU and thread count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from scipy.special import expit

from hashemb import _runtime
from hashemb.ctr import _maths, _reference_maths

# (kind, dim, fields of the model): rows of one lane, of whole lanes, and of more, with and without a remainder.
MODELS = [
    ("fm", 1, 7), ("fm", 2, 5), ("fm", 11, 10), ("fm", 16, 39), ("fm", 17, 3), ("fm", 32, 4), ("fm", 40, 1),
    ("fwfm", 2, 5), ("fwfm", 16, 6), ("fwfm", 11, 1), ("fwfm", 35, 4),
    ("ffm", 1 + 5, 5), ("ffm", 1 + 6 * 4, 6), ("ffm", 1 + 3 * 8, 3), ("ffm", 1 + 2 * 21, 2), ("ffm", 1 + 3, 1),
]  # fmt: skip


@pytest.fixture(params=_runtime.available_isas())
def isa(request: Any) -> Iterator[str]:
    before = _runtime.get_isa()
    _runtime.set_isa(request.param)
    yield request.param
    _runtime.set_isa(before)


def batch(kind: str, dim: int, num_fields: int, form: str, n: int = 150) -> dict[str, Any]:
    """Make arguments of the twin. Ragged examples have 0 to 6 keys, with repeated fields in any order.

    There are half as many vectors as keys: some occur in several examples, some several times in one, some in none.
    """
    rng = np.random.default_rng(dim * 100 + num_fields)
    counts = np.full(n, num_fields) if form in ("matrix", "values") else rng.integers(0, 7, n)
    num_keys = int(counts.sum())
    arguments: dict[str, Any] = {
        "vectors": rng.normal(0.0, 0.4, (num_keys // 2, dim)).astype(np.float32),
        "index": rng.integers(0, num_keys // 2, num_keys).astype(np.int32),
        "labels": rng.integers(0, 2, n).astype(np.float32),
        "bias": 0.25,
        "num_fields": num_fields,
    }
    if form != "matrix":
        arguments["values"] = rng.normal(1.0, 1.0, num_keys).astype(np.float32)
    if form == "ragged":
        arguments["offsets"] = np.concatenate([[0], np.cumsum(counts)])
        arguments["fields"] = rng.integers(0, num_fields, num_keys).astype(np.int32)
        arguments["weights"] = rng.uniform(0.0, 3.0, n).astype(np.float32)
    if kind == "fwfm":
        r = rng.normal(1.0, 1.0, (num_fields, num_fields)).astype(np.float32)
        arguments["pair_weights"] = np.tril(r) + np.tril(r, -1).T
    return arguments


def run(kind: str, arguments: dict[str, Any], num_threads: int = 1) -> _reference_maths.Outcome:
    """Call the extension, with the arguments and results of the twin."""
    rest = {name: value for name, value in arguments.items() if name not in ("vectors", "labels", "weights")}
    vectors = arguments["vectors"].copy()
    maths = _maths.Maths(kind, vectors.shape[1], arguments["num_fields"])
    logits, other_logits, probabilities = np.empty((3, len(arguments["labels"])), np.float32)
    maths.run(vectors, logits, logits=True, num_threads=num_threads, **rest)
    each = rest | {"index": None}
    maths.run(vectors[arguments["index"]], other_logits, logits=True, num_threads=num_threads, **each)
    np.testing.assert_array_equal(logits, other_logits, "a vector for each key")
    gradients = np.zeros_like(vectors)
    learning = {"labels": arguments["labels"], "weights": arguments.get("weights"), "gradients": gradients}
    maths.run(vectors, probabilities, num_threads=num_threads, **learning, **rest)
    np.testing.assert_array_equal(vectors, arguments["vectors"], "nothing is written to the vectors")
    return _reference_maths.Outcome(logits, probabilities, gradients, maths.residual, maths.pair_gradients)


def assert_same_bits(a: _reference_maths.Outcome, b: _reference_maths.Outcome) -> None:
    for name in ("logits", "probabilities", "gradients", "residual", "pair_gradients"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), name)


@pytest.mark.parametrize("form", ["matrix", "values", "ragged"])
@pytest.mark.parametrize(("kind", "dim", "num_fields"), MODELS)
def test_fast_equals_slow(isa: str, kind: str, dim: int, num_fields: int, form: str) -> None:
    arguments = batch(kind, dim, num_fields, form)
    expected = _reference_maths.run(kind, **arguments)
    assert np.abs(expected.gradients).max() > 0.1
    assert len(np.unique(expected.logits)) > 50
    assert_same_bits(run(kind, arguments), expected)


@pytest.mark.parametrize(
    ("kind", "dim", "num_fields"), [("fm", 16, 39), ("fm", 11, 9), ("fwfm", 16, 39), ("ffm", 157, 39)]
)
def test_any_number_of_threads_gives_the_same_bits(kind: str, dim: int, num_fields: int) -> None:
    arguments = batch(kind, dim, num_fields, "values", n=1000)
    one = run(kind, arguments)
    for num_threads in (2, 3, 7):
        assert_same_bits(run(kind, arguments, num_threads), one)


@pytest.mark.parametrize(("kind", "dim", "num_fields"), [("fm", 16, 5), ("fwfm", 4, 5)])
def test_sums_do_not_depend_on_where_a_batch_is_cut(kind: str, dim: int, num_fields: int) -> None:
    arguments = batch(kind, dim, num_fields, "matrix", n=5 * _maths.BLOCK_EXAMPLES + 3)
    whole = run(kind, arguments)
    maths = _maths.Maths(kind, dim, num_fields)
    out = np.empty(len(arguments["labels"]), np.float32)
    cut = 3 * _maths.BLOCK_EXAMPLES
    gradients = np.zeros_like(arguments["vectors"])
    for part in (slice(0, cut), slice(cut, None)):
        keys = slice(part.start * num_fields, None if part.stop is None else part.stop * num_fields)
        maths.run(
            arguments["vectors"], out[part], bias=0.25, num_fields=num_fields, index=arguments["index"][keys],
            gradients=gradients, labels=arguments["labels"][part], pair_weights=arguments.get("pair_weights"),
        )  # fmt: skip
    np.testing.assert_array_equal(gradients, whole.gradients)
    assert maths.residual == whole.residual
    np.testing.assert_array_equal(maths.pair_gradients, whole.pair_gradients)
    maths.start()
    assert maths.residual == 0.0
    assert not maths.pair_gradients.any()


@pytest.mark.parametrize("num_distinct", [1, 3, 100, 1000, 10**9])
def test_distinct_keys_come_in_the_order_of_their_first_places(num_distinct: int) -> None:
    """The same object works on batches of other sizes, and on keys that differ only in their highest or lowest bits."""
    rng, finder = np.random.default_rng(num_distinct), _maths.DistinctKeys()
    for n in (1000, 1, 0, 20_000, 7):
        for shift in (0, 34):
            keys = rng.integers(0, num_distinct, n, np.uint64) << np.uint64(shift)
            found, index = np.zeros(n, np.uint64), np.empty(n, np.int32)
            count = finder.find(keys, found, index)
            np.testing.assert_array_equal(found[:count], keys[np.sort(np.unique(keys, return_index=True)[1])])
            np.testing.assert_array_equal(found[index], keys)
            assert not found[count:].any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keys": np.zeros(4, np.int64)}, TypeError, "keys: expected a C-contiguous array.*int64"),
        ({"distinct": np.zeros(3, np.uint64)}, ValueError, "distinct: expected 4 elements, got 3"),
        ({"index": np.zeros(5, np.int32)}, ValueError, "index: expected 4 elements, got 5"),
    ],
)
def test_distinct_keys_stay_within_their_arrays(change: Any, error: type[Exception], message: str) -> None:
    arrays = {"keys": np.zeros(4, np.uint64), "distinct": np.zeros(4, np.uint64), "index": np.zeros(4, np.int32)}
    with pytest.raises(error, match=message):
        _maths.DistinctKeys().find(**(arrays | change))


def test_sigmoid_is_rounded_once() -> None:
    """The error is at most .501 units in the last place of the exact value, and zero at both ends."""
    rng = np.random.default_rng(0)
    z = np.concatenate([rng.normal(0, 4, 20000), rng.uniform(-100, 100, 20000), [0.0, -0.0, 88.8, -103.0]])
    z = z.astype(np.float32)
    p = np.empty_like(z)
    _maths.Maths("fm", 1, 0).run(z[:, None], p, bias=0.0, num_fields=1)
    exact = expit(z.astype(np.float64))
    assert np.max(np.abs(p - exact) / np.spacing(exact.astype(np.float32)).astype(np.float64)) <= 0.501
    np.testing.assert_array_equal(p, _reference_maths.sigmoid(z).astype(np.float32))
    np.testing.assert_array_equal(_reference_maths.sigmoid(np.array([1e30, -1e30], np.float32)), [1.0, 0.0])


def test_logits_that_are_not_finite_are_left_in_place_of_probabilities() -> None:
    vectors = np.array([[np.inf], [-np.inf], [np.nan], [1.0]], np.float32)
    out = np.empty(4, np.float32)
    _maths.Maths("fm", 1, 0).run(vectors, out, bias=0.0, num_fields=1)
    np.testing.assert_array_equal(out[:3], [np.inf, -np.inf, np.nan])
    assert out[3] == np.float32(expit(1.0))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"vectors": np.zeros((7, 3), np.float32)}, ValueError, "7 keys are not those of 4 examples of 2 keys"),
        ({"vectors": np.zeros((8, 3))}, TypeError, "vectors: expected a C-contiguous array.*float64"),
        ({"out": np.zeros(8, np.float32)[::2]}, TypeError, "out: expected a C-contiguous array"),
        ({"labels": np.zeros(3, np.float32)}, ValueError, "labels: expected 4 elements, got 3"),
        ({"values": np.zeros(9, np.float32)}, ValueError, "values: expected 8 elements, got 9"),
        ({"offsets": np.array([0, 2, 4, 6, 9])}, ValueError, "offsets must rise to 8"),
        ({"offsets": np.array([0, 5, 4, 6, 8])}, ValueError, "offsets must rise to 8"),
        ({"offsets": np.array([0, 2, 8])}, ValueError, "offsets: expected 5 elements, got 3"),
        ({"offsets": np.arange(0, 9, 2)}, ValueError, "each key needs a field between 0 and 1"),
        ({"offsets": np.arange(0, 9, 2), "fields": np.full(8, 2, np.int32)}, ValueError, "between 0 and 1"),
        ({"offsets": np.arange(0, 9, 2), "fields": np.full(8, -1, np.int32)}, ValueError, "between 0 and 1"),
        ({"pair_weights": None}, ValueError, "fwfm needs pair_weights"),
        ({"labels": np.zeros(4, np.float32)}, ValueError, "labels need an index and gradients"),
        ({"index": np.full(8, 8, np.int32)}, ValueError, "an index must be between 0 and 7"),
        ({"index": np.full(8, -1, np.int32)}, ValueError, "an index must be between 0 and 7"),
        ({"index": np.zeros(9, np.int32)}, ValueError, "9 keys are not those of 4 examples of 2 keys"),
        ({"index": np.zeros(8)}, TypeError, "index: expected a C-contiguous array.*float64"),
        ({"gradients": np.zeros((7, 3), np.float32)}, ValueError, "gradients: expected 24 elements, got 21"),
    ],
)
def test_what_would_reach_outside_an_array(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "vectors": np.zeros((8, 3), np.float32),
        "out": np.zeros(4, np.float32),
        "pair_weights": np.ones((2, 2), np.float32),
    }
    maths = _maths.Maths("fwfm", 3, 2)
    maths.run(bias=0.0, **arguments)
    with pytest.raises(error, match=message):
        maths.run(bias=0.0, **(arguments | changes))


@pytest.mark.parametrize(("kind", "dim", "num_fields"), [("fm", 0, 3), ("fwfm", 4, 0), ("ffm", 4, 2), ("ffm", 4, -3)])
def test_impossible_models(kind: str, dim: int, num_fields: int) -> None:
    with pytest.raises(ValueError, match=kind):
        _maths.Maths(kind, dim, num_fields)
