"""Common tests of all models: formula and gradient, both forms of a batch, values and weights, other processes, bad
input.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hashemb
from hashemb.ctr.models import (
    PAIR_FIELD,
    FactorizationMachine,
    FieldAwareFM,
    FieldWeightedFM,
    HashedModel,
    logistic_loss,
)

FIELDS = 4
KINDS = ("lr", "fm", "fwfm", "ffm")
MakeModel = Callable[..., HashedModel]


def build(kind: str, table: hashemb.EmbeddingTable, num_fields: int = FIELDS) -> HashedModel:
    if kind == "fwfm":
        return FieldWeightedFM(table, num_fields=num_fields)
    return FieldAwareFM(table, num_fields=num_fields) if kind == "ffm" else FactorizationMachine(table)


@pytest.fixture
def make_model(tmp_path: Path) -> Iterator[MakeModel]:
    tables: list[hashemb.EmbeddingTable] = []

    def make(kind: str, num_fields: int = FIELDS, **options: Any) -> HashedModel:
        options = {"init": hashemb.Uniform(0.3), "optimizer": hashemb.SGD(lr=1.0), "num_embeddings": 9000} | options
        dim = {"lr": 1, "fm": 1 + 5, "fwfm": 1 + 5, "ffm": 1 + 3 * num_fields}[kind]
        tables.append(hashemb.create(tmp_path / f"{len(tables)}.emb", embedding_dim=dim, **options))
        return build(kind, tables[-1], num_fields)

    yield make
    for table in tables:
        table.close()


def matrix(n: int, num_fields: int = FIELDS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Make keys with few distinct values per field, so that rows repeat within the batch, and labels."""
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 9, (n, num_fields)).astype(np.uint64) + 1000 * np.arange(num_fields, dtype=np.uint64)
    return keys, (rng.random(n) < 0.3).astype(np.float32)


def ragged(n: int, seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Make keys, the rest of the examples, and labels: 0 to 6 keys per example, with repeated fields in any order."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 7, n)
    counts[:2] = 0, 5
    total = int(counts.sum())
    fields = rng.integers(0, FIELDS, total)
    keys = rng.integers(0, 9, total).astype(np.uint64) + 1000 * fields.astype(np.uint64)
    rest = {
        "offsets": np.concatenate([[0], np.cumsum(counts)]),
        "values": rng.normal(1.0, 0.5, total).astype(np.float32),
        "fields": fields.astype(np.int32),
    }
    return keys, rest, (rng.random(n) < 0.3).astype(np.float32)


def logit_by_definition(kind: str, v: np.ndarray, x: np.ndarray, f: np.ndarray, bias: float, r: np.ndarray) -> float:
    """Return the sum over pairs as in the papers, in float64."""
    total = bias + float(x @ v[:, 0])
    for i, j in itertools.combinations(range(len(v)), 2):
        if kind == "ffm":
            vectors = v[:, 1:].reshape(len(v), FIELDS, -1)
            total += x[i] * x[j] * float(vectors[i, f[j]] @ vectors[j, f[i]])
        else:
            total += x[i] * x[j] * r[f[i], f[j]] * float(v[i, 1:] @ v[j, 1:])
    return total


def weights_of_pairs(model: HashedModel) -> np.ndarray:
    if isinstance(model, FieldWeightedFM):
        return model.pair_weights().astype(np.float64)
    return np.ones((FIELDS, FIELDS))


def logits_by_definition(kind: str, model: HashedModel, keys: np.ndarray, rest: dict[str, np.ndarray]) -> np.ndarray:
    vectors = model.table.lookup(keys).astype(np.float64)
    bias, r = float(model.table.lookup(model._reserved_keys)[0, 0]), weights_of_pairs(model)
    owned = [slice(a, b) for a, b in itertools.pairwise(rest["offsets"])]
    return np.array(
        [logit_by_definition(kind, vectors[o], rest["values"][o], rest["fields"][o], bias, r) for o in owned]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_logit_is_the_formula(make_model: MakeModel, kind: str) -> None:
    model = make_model(kind)
    keys, rest, _ = ragged(60)
    logits = model.predict_logits(keys, **rest)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, logits_by_definition(kind, model, keys, rest), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_by_finite_differences(make_model: MakeModel, kind: str) -> None:
    """With SGD at lr 1 a step subtracts the gradient, in every element of every row, including reserved rows."""
    model = make_model(kind)
    keys, rest, labels = ragged(12)
    weights = np.random.default_rng(1).uniform(0.0, 2.0, 12).astype(np.float32)
    distinct, position = np.unique(keys, return_inverse=True)
    probed = np.concatenate([distinct, model._reserved_keys])
    assert len(np.unique(model.table.rows(probed))) == len(probed), "the check needs rows that don't collide"
    before = model.table.lookup(probed).astype(np.float64)

    def loss(parameters: np.ndarray) -> float:
        reserved = parameters[len(distinct) :]
        r = np.ones((FIELDS, FIELDS))
        if kind == "fwfm":
            low, high = np.minimum.outer(range(FIELDS), range(FIELDS)), np.maximum.outer(range(FIELDS), range(FIELDS))
            r += reserved[1:].ravel()[high * (high + 1) // 2 + low]
        total = 0.0
        for e, (a, b) in enumerate(itertools.pairwise(rest["offsets"])):
            x, f = rest["values"][a:b].astype(np.float64), rest["fields"][a:b]
            logit = logit_by_definition(kind, parameters[position[a:b]], x, f, reserved[0, 0], r)
            total += float(weights[e] * logistic_loss(logit, labels[e]))
        return total

    model.learn(keys, labels, weights=weights, **rest)
    step = before - model.table.lookup(probed)
    epsilon = 1e-5
    for index in np.ndindex(*before.shape):
        shift = np.zeros_like(before)
        shift[index] = epsilon
        expected = (loss(before + shift) - loss(before - shift)) / (2 * epsilon)
        assert step[index] == pytest.approx(expected, abs=5e-5), (kind, index)
    assert np.abs(step).max() > 0.1
    assert kind != "fwfm" or np.abs(step[len(distinct) + 1 :]).max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_fields", [1, FIELDS])
def test_ragged_is_the_matrix_in_other_words(make_model: MakeModel, kind: str, num_fields: int) -> None:
    keys, labels = matrix(200, num_fields)
    flat = {"offsets": np.arange(201) * num_fields, "fields": np.tile(np.arange(num_fields), 200)}
    models = [make_model(kind, num_fields) for _ in range(3)]
    np.testing.assert_array_equal(models[0].learn(keys, labels), models[1].learn(keys.ravel(), labels, **flat))
    models[2].learn(keys, labels, values=np.ones(keys.shape), weights=np.ones(200))
    for model in models[1:]:
        np.testing.assert_array_equal(model.table.weight, models[0].table.weight)
        np.testing.assert_array_equal(model.predict_logits(keys), models[0].predict_logits(keys))
    np.testing.assert_array_equal(models[0].predict_proba(keys.ravel(), **flat), models[0].predict_proba(keys))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_repeated_examples(make_model: MakeModel, kind: str) -> None:
    keys, labels = matrix(30)
    copies = np.random.default_rng(0).integers(0, 4, 30)
    weighted, repeated = make_model(kind), make_model(kind)
    weighted.learn(keys, labels, weights=copies)
    repeated.learn(np.repeat(keys, copies, axis=0), np.repeat(labels, copies))
    np.testing.assert_allclose(weighted.predict_logits(keys), repeated.predict_logits(keys), rtol=1e-3, atol=1e-4)
    assert np.abs(weighted.predict_logits(keys) - make_model(kind).predict_logits(keys)).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_two_are_twice_the_weight(make_model: MakeModel, kind: str) -> None:
    """The logit is linear in x if an example has one key only and hence no interactions."""
    model = make_model(kind)
    one = {"offsets": [0, 1], "fields": [2]}
    bias, single, double = (float(model.predict_logits([7], values=[x], **one)[0]) for x in (0.0, 1.0, 2.0))
    assert double - bias == pytest.approx(2.0 * (single - bias), rel=1e-5)
    assert single != bias
    empty = model.predict_logits(np.empty(0, np.uint64), offsets=[0, 0], fields=np.empty(0, np.int32))
    assert float(empty[0]) == bias


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 30])
def test_an_example_is_scored_alike_in_any_batch(
    make_model: MakeModel, kind: str, chunk_bytes: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr("hashemb.ctr.models.hashed_model._CHUNK_BYTES", chunk_bytes)
    model = make_model(kind)
    keys, rest, labels = ragged(300)
    whole = model.predict_proba(keys, **rest)
    for e in (0, 1, 63, 64, 299):
        own = slice(*rest["offsets"][e : e + 2])
        alone = {"offsets": [0, own.stop - own.start], "values": rest["values"][own], "fields": rest["fields"][own]}
        assert model.predict_proba(keys[own], **alone)[0] == whole[e]
    np.testing.assert_array_equal(model.learn(keys, labels, **rest), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_learning_goes_on_with_the_same_bits(make_model: MakeModel, kind: str) -> None:
    """Another object can continue after half of the batches: everything that a model has learned is in its table."""
    batches = [matrix(100, seed=seed) for seed in range(6)]
    through, stopped = (make_model(kind, optimizer=hashemb.Adagrad(lr=0.1)) for _ in range(2))
    path = stopped.table.path
    for keys, labels in batches:
        through.learn(keys, labels)
    for keys, labels in batches[:3]:
        stopped.learn(keys, labels)
    stopped.table.close()
    with hashemb.open(path, "r+") as table:
        model = build(kind, table)
        for keys, labels in batches[3:]:
            model.learn(keys, labels)
        np.testing.assert_array_equal(table.weight, through.table.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_threads_learns_the_same_bits(make_model: MakeModel, kind: str) -> None:
    before, weights = hashemb.get_num_threads(), []
    try:
        for num_threads in (1, 3):
            hashemb.set_num_threads(num_threads)
            model = make_model(kind, optimizer=hashemb.Adagrad(lr=0.1))
            for seed in range(3):
                model.learn(*matrix(2000, seed=seed))
            weights.append(model.table.weight.copy())
    finally:
        hashemb.set_num_threads(before)
    np.testing.assert_array_equal(weights[0], weights[1])


SCORE = """
import sys
import numpy as np
import hashemb
sys.path.insert(0, sys.argv[1])
from test_field_models import build, matrix
with hashemb.open(sys.argv[2]) as table:
    sys.stdout.buffer.write(build(sys.argv[3], table).predict_proba(matrix(50)[0]).tobytes())
"""


@pytest.mark.parametrize("kind", KINDS)
def test_second_process_predicts_the_same_bits(make_model: MakeModel, kind: str) -> None:
    model = make_model(kind)
    model.learn(*matrix(100, seed=5))
    command = [sys.executable, "-c", SCORE, str(Path(__file__).parent), model.table.path, kind]
    scored = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    np.testing.assert_array_equal(np.frombuffer(scored, np.float32), model.predict_proba(matrix(50)[0]))


def test_field_weighted_starts_as_a_factorization_machine(make_model: MakeModel) -> None:
    weighted, plain = (make_model(kind, init=hashemb.Zeros()) for kind in ("fwfm", "fm"))
    assert isinstance(weighted, FieldWeightedFM)
    np.testing.assert_array_equal(weighted.pair_weights(), np.ones((FIELDS, FIELDS)))
    rng = np.random.default_rng(0)
    keys, _ = matrix(20)
    rows = rng.normal(0.0, 0.5, (len(np.unique(keys)), 6)).astype(np.float32)
    for model in (weighted, plain):
        model.table.update(np.unique(keys), -rows)
    np.testing.assert_allclose(weighted.predict_logits(keys), plain.predict_logits(keys), rtol=1e-5, atol=1e-6)


def test_field_weights_tell_pairs_apart(make_model: MakeModel) -> None:
    """If labels depend only on the pair of fields (0, 1), its weight grows compared with the others."""
    rng = np.random.default_rng(0)
    model = make_model("fwfm", optimizer=hashemb.Adagrad(lr=0.1))
    assert isinstance(model, FieldWeightedFM)
    for _ in range(150):
        bits = rng.integers(0, 2, (256, FIELDS)).astype(np.uint64)
        model.learn(bits + 10 * np.arange(FIELDS, dtype=np.uint64), (bits[:, 0] == bits[:, 1]).astype(np.float32))
    r = np.abs(model.pair_weights())
    others = [r[f, g] for f, g in itertools.combinations(range(FIELDS), 2) if (f, g) != (0, 1)]
    assert r[0, 1] > 1.5 * max(others)
    np.testing.assert_array_equal(model.pair_weights(), model.pair_weights().T)


def test_pairs_are_numbered_alike_for_any_number_of_fields(make_model: MakeModel) -> None:
    model = make_model("fwfm")
    few, many = FieldWeightedFM(model.table, num_fields=3), FieldWeightedFM(model.table, num_fields=40)
    np.testing.assert_array_equal(few.pair_weights(), many.pair_weights()[:3, :3])
    expected = model.table.lookup(hashemb.hash_keys([0], field=PAIR_FIELD))[0]
    np.testing.assert_array_equal(few.pair_weights()[np.tril_indices(3)], np.float32(1.0) + expected)


@pytest.mark.parametrize("kind", ["fwfm", "ffm"])
def test_a_model_of_fields_needs_them(make_model: MakeModel, kind: str) -> None:
    model = make_model(kind)
    labels = np.zeros(2, np.float32)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"keys": np.zeros((2, 3), np.uint64)}, r"the model has 4 fields, keys have 3 columns"),
        ({"keys": [1, 2, 3], "offsets": [0, 1, 3]}, "with offsets it needs fields"),
        (
            {"keys": [1, 2, 3], "offsets": [0, 1, 3], "fields": [0, 4, 1]},
            r"fields must be in \[0, 4\), got 4 at index 1",
        ),
        ({"keys": [1, 2, 3], "offsets": [0, 1, 3], "fields": [0, -1, 1]}, r"got -1 at index 1"),
        ({"keys": [1, 2, 3], "offsets": [0, 1, 3], "fields": [0, 1]}, r"fields must have shape \(3,\).*\(2,\)"),
    ]
    for arguments, message in bad:
        with pytest.raises(ValueError, match=message):
            model.learn(labels=labels, **arguments)
        with pytest.raises(ValueError, match=message):
            model.predict_proba(**arguments)
    with pytest.raises(TypeError, match="fields must be integers, got float64"):
        model.predict_proba([1, 2], offsets=[0, 2], fields=[0.0, 1.0])
    assert model.table.step == 0


NAN = float("nan")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"offsets": [1, 2, 4]}, ValueError, "offsets must go from 0 to 4.*they go from 1 to 4"),
        ({"offsets": [0, 2, 5]}, ValueError, "they go from 0 to 5"),
        ({"offsets": [0, 5, 4]}, ValueError, "offsets must not fall: 5 at index 1, then 4"),
        ({"offsets": [0.0, 2.0, 4.0]}, TypeError, "offsets must be integers, got float64"),
        ({"offsets": []}, TypeError, "offsets must be integers"),
        ({"offsets": np.empty(0, np.int64)}, ValueError, r"offsets must have shape \(n \+ 1,\), got \(0,\)"),
        ({"offsets": [0, 4]}, ValueError, r"labels must have shape \(1,\).*got \(2,\)"),
        ({"offsets": None, "values": None}, ValueError, "or come with offsets, got 1 dimensions"),
        (
            {"keys": np.zeros((2, 2), np.uint64)},
            ValueError,
            r"values must have the shape of keys, \(2, 2\), got \(4,\)",
        ),
        ({"keys": np.zeros((2, 2), np.uint64), "values": None}, ValueError, r"shape \(num_keys,\) with offsets"),
        ({"values": [1.0, NAN, 1.0, 1.0]}, ValueError, r"values must be finite, got nan at index \(1,\)"),
        ({"values": [1.0, 1.0, 1.0, np.inf]}, ValueError, r"got inf at index \(3,\)"),
        ({"values": [1.0]}, ValueError, r"values must have the shape of keys, \(4,\), got \(1,\)"),
        ({"weights": [1.0, NAN]}, ValueError, "weights must be finite and >= 0, got nan at index 1"),
        ({"weights": [-1.0, 1.0]}, ValueError, "got -1.0 at index 0"),
        ({"weights": [1.0]}, ValueError, r"weights must have shape \(2,\), one per example, got \(1,\)"),
        ({"fields": [0, 1, 2]}, ValueError, r"fields must have shape \(4,\)"),
    ],
)
def test_bad_batches_change_nothing(
    make_model: MakeModel, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = make_model("fm")
    good: dict[str, Any] = {"keys": [1, 2, 3, 4], "labels": [0.0, 1.0], "offsets": [0, 2, 4], "values": [1.0] * 4}
    with pytest.raises(error, match=message):
        model.learn(**(good | changes))
    assert (model.table.step, model.table.weight.any()) == (0, False)
    model.learn(**good)
    assert model.table.step == 1


def test_fields_belong_to_the_ragged_form(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="without them the field of a key is its column"):
        make_model("fm").predict_proba(np.zeros((1, 2), np.uint64), fields=[[0, 1]])


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batches_are_no_step(make_model: MakeModel, kind: str) -> None:
    model = make_model(kind)
    none: dict[str, Any] = {"offsets": [0], "fields": np.empty(0, np.int32)}
    assert model.predict_proba([], **none).shape == model.learn([], [], **none).shape == (0,)
    assert model.learn(np.empty((0, FIELDS), np.uint64), []).shape == (0,)
    assert model.table.step == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda table: FieldWeightedFM(table, num_fields=0), "num_fields must be at least 1, got 0"),
        (lambda table: FieldWeightedFM(table, num_fields=3, rank=4), "of rank 4 needs.*embedding_dim 7"),
        (lambda table: FieldAwareFM(table, num_fields=0), "num_fields must be at least 1, got 0"),
        (lambda table: FieldAwareFM(table, num_fields=4), r"4 fields and rank 1 needs.*= 5 elements.*embedding_dim 7"),
        (lambda table: FieldAwareFM(table, num_fields=3, rank=3), r"= 10 elements.*embedding_dim 7"),
        (lambda table: FieldAwareFM(table, num_fields=7), "rank 0 needs rank >= 1"),
    ],
)
def test_models_that_do_not_fit_the_table(tmp_path: Path, make: Callable[..., HashedModel], message: str) -> None:
    with (
        hashemb.create(tmp_path / "t.emb", num_embeddings=10, embedding_dim=7) as table,
        pytest.raises(ValueError, match=message),
    ):
        make(table)


def test_divergence_leaves_the_table(make_model: MakeModel) -> None:
    for kind in ("fwfm", "ffm"):
        model = make_model(kind, optimizer=hashemb.SGD(lr=1e25))
        keys, labels = matrix(20)
        while np.isfinite(model.predict_logits(keys)).all():
            model.learn(keys, labels)
        step, weight = model.table.step, model.table.weight.copy()
        with pytest.raises(FloatingPointError, match=r"the logit of example \d+ of the batch is .*lower lr"):
            model.learn(keys, labels)
        assert model.table.step == step
        np.testing.assert_array_equal(model.table.weight, weight)
