"""The estimators: partial_fit, resuming, inputs, and scikit-learn's tools."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clicks import clicks, rows_of
from scipy import sparse

pytest.importorskip("sklearn")
pytest.importorskip("pandas")
pytest.importorskip("polars")
pytest.importorskip("pyarrow")

import pandas as pd
import polars as pl
import pyarrow as pa
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import hashemb
from hashemb.ctr.models import FactorizationMachine
from hashemb.sklearn import HashedFMClassifier, HashedFwFMClassifier, HashedLogisticRegression

Estimator = Any
KINDS = [HashedLogisticRegression, HashedFMClassifier, HashedFwFMClassifier]
SMALL = {"rows": 4096, "random_state": 0}

every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize("weighted", [False, True])
def test_pieces_give_the_bits_of_the_whole(kind: type[Estimator], weighted: bool) -> None:
    table, y = clicks(1000)
    weights = np.random.default_rng(1).uniform(0.1, 2.0, 1000) if weighted else None
    whole = kind(max_iter=1, shuffle=False, **SMALL).fit(table, y, sample_weight=weights)
    pieces = kind(**SMALL)
    for start in range(0, 1000, 320):
        rows = slice(start, start + 320)
        part = None if weights is None else weights[rows]
        pieces.partial_fit(rows_of(table, rows), y[rows], classes=[False, True], sample_weight=part)
    assert whole.table_.step == pieces.table_.step == 32
    np.testing.assert_array_equal(whole.table_.weight, pieces.table_.weight)
    np.testing.assert_array_equal(whole.decision_function(table), pieces.decision_function(table))


@every_kind
def test_it_can_go_on_where_it_stopped(kind: type[Estimator], tmp_path: Path) -> None:
    table, y = clicks(600)
    first, second = slice(0, 320), slice(320, 600)
    undisturbed = (
        kind(**SMALL).partial_fit(rows_of(table, first), y[first]).partial_fit(rows_of(table, second), y[second])
    )
    stopped = kind(table=tmp_path / "m.emb", **SMALL).partial_fit(rows_of(table, first), y[first])
    del stopped
    resumed = kind(table=tmp_path / "m.emb", **SMALL).partial_fit(rows_of(table, second), y[second])
    np.testing.assert_array_equal(resumed.decision_function(table), undisturbed.decision_function(table))


@every_kind
def test_a_seed_fixes_the_bits_and_another_changes_them(kind: type[Estimator]) -> None:
    table, y = clicks(300)
    once, again, other = (
        kind(rows=4096, random_state=seed).fit(table, y).decision_function(table) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, other)


@every_kind
def test_whole_weights_are_copies(kind: type[Estimator]) -> None:
    """They agree within one batch, up to the rounding of float32 sums; an example of weight 0 equals an absent one."""
    table, y = clicks(120)
    weights = np.random.default_rng(2).integers(0, 4, 120)
    frame = pd.DataFrame(table)
    copies = np.repeat(np.arange(120), weights)
    options = {"batch_size": 400, "shuffle": False, "max_iter": 5} | SMALL
    weighted = kind(**options).fit(frame, y, sample_weight=weights)
    repeated = kind(**options).fit(frame.iloc[copies], y[copies])
    np.testing.assert_allclose(
        weighted.decision_function(frame), repeated.decision_function(frame), rtol=1e-4, atol=1e-5
    )
    kept = weights > 0
    absent = kind(**options).fit(frame[kept], y[kept], sample_weight=weights[kept])
    np.testing.assert_array_equal(weighted.decision_function(frame), absent.decision_function(frame))


def test_probabilities_are_those_of_the_model_on_the_keys() -> None:
    table, y = clicks(200)
    ids = {"user": table["user"], "site": table["site"]}
    model = HashedFMClassifier(**SMALL).fit(ids, y)
    expected = FactorizationMachine(model.table_).predict_logits(hashemb.hash_fields(ids))
    np.testing.assert_array_equal(model.decision_function(ids), expected)
    p = model.predict_proba(ids)
    np.testing.assert_allclose(p[:, 1], 1.0 / (1.0 + np.exp(-expected.astype(np.float64))), rtol=1e-12)
    np.testing.assert_allclose(np.exp(model.predict_log_proba(ids)), p, rtol=1e-12)


@pytest.mark.parametrize("kind", [HashedLogisticRegression, HashedFMClassifier])
def test_columns_of_a_sparse_matrix_are_keys_and_its_data_values(kind: type[Estimator]) -> None:
    random = np.random.default_rng(0)
    dense = np.where(random.random((300, 50)) < 0.2, random.normal(size=(300, 50)), 0.0)
    y = dense[:, :25].sum(axis=1) > dense[:, 25:].sum(axis=1)
    model = kind(max_iter=20, batch_size=16, lr=0.2, **SMALL).fit(sparse.csr_array(dense), y)
    assert model.score(sparse.csr_array(dense), y) > 0.9
    weights = model.table_.lookup(np.arange(50))[:, 0].astype(np.float64)
    if kind is HashedLogisticRegression:
        logits = model.decision_function(dense)
        bias = model.decision_function(np.zeros((1, 50)))
        np.testing.assert_allclose(logits, dense @ weights + bias, atol=1e-4)
    for other in (sparse.csc_matrix(dense), sparse.coo_array(dense), dense):
        np.testing.assert_array_equal(model.decision_function(other), model.decision_function(sparse.csr_array(dense)))


def test_values_never_seen_are_scored() -> None:
    table, y = clicks(300)
    model = HashedLogisticRegression(rows=2**20, random_state=0).fit(table, y)
    new = {"user": [999], "site": ["new.com"], "price": [1.0]}
    known = {"user": [999], "site": ["site-3.com"], "price": [None]}
    assert np.isfinite(model.decision_function(new)).all()
    # Unseen values have no weight: the difference is the weight of one site, which is learned.
    weight = model.table_.lookup(hashemb.hash_keys(["site-3.com"], field="site"))[0, 0]
    without = model.decision_function({**known, "site": ["other.com"]})
    assert abs(weight) > 0.01
    np.testing.assert_allclose(model.decision_function(known) - without, weight, rtol=1e-5)


@pytest.mark.parametrize("library", [pd.DataFrame, pl.DataFrame, pa.table, dict])
def test_any_library_may_hold_what_another_was_fitted_on(library: Callable[[Any], Any]) -> None:
    table, y = clicks(200)
    model = HashedFMClassifier(**SMALL).fit(library(table), y)
    assert model.feature_names_in_.tolist() == ["user", "site", "price"]
    assert model.n_features_in_ == 3
    for other in (pd.DataFrame(table), pl.DataFrame(table), pa.table(table), table):
        np.testing.assert_array_equal(model.decision_function(other), model.decision_function(table))


def test_columns_in_another_order_are_refused() -> None:
    table, y = clicks(100)
    model = HashedLogisticRegression(**SMALL).fit(pd.DataFrame(table), y)
    with pytest.raises(ValueError, match="in the same order as they were in fit"):
        model.predict(pd.DataFrame(table)[["site", "user", "price"]])
    with pytest.raises(ValueError, match="yet now missing:\n- price"):
        model.predict(pd.DataFrame(table)[["user", "site"]])


def test_read_only_arrays_on_disk_are_taken(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", x[:, 0] > 0)
    mapped, y = (np.load(tmp_path / name, mmap_mode="r") for name in ("x.npy", "y.npy"))
    model = HashedLogisticRegression(**SMALL).fit(
        mapped, y, sample_weight=np.load(tmp_path / "y.npy", mmap_mode="r") + 1
    )
    np.testing.assert_array_equal(model.predict_proba(mapped), model.predict_proba(x))


LABELS = [
    (["no", "yes"], "<U3"),
    ([3, 7], "int64"),
    ([False, True], "bool"),
    ([-1.0, 1.0], "float64"),
    (["a", "b"], "O"),
]


@pytest.mark.parametrize(("labels", "dtype"), LABELS)
def test_any_two_labels(labels: list[Any], dtype: str, tmp_path: Path) -> None:
    table, clicked = clicks(200)
    y = np.array(labels, dtype=dtype)[clicked.astype(int)]
    path = tmp_path / "m.emb"
    model = HashedLogisticRegression(table=path, **SMALL).fit(table, y)
    for estimator in (model, HashedLogisticRegression.from_table(path)):
        assert estimator.classes_.tolist() == labels
        assert set(estimator.predict(table)) == set(labels)
        assert estimator.predict(table).dtype == np.dtype(dtype)
    assert model.score(table, y) > 0.7


# ---- scikit-learn's tools ----


def test_parameters_may_be_numpy_numbers() -> None:
    table, y = clicks(50)
    found = {"rows": np.int64(512), "rank": np.int32(2), "batch_size": np.int64(16), "lr": np.float32(0.25)}
    model = HashedFMClassifier(random_state=np.random.RandomState(0), **found).fit(table, y)
    assert (model.table_.num_embeddings, model.table_.embedding_dim, model.table_.lr) == (512, 3, 0.25)


def test_grid_search_in_a_pipeline() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(300, 3)) + 1000.0
    y = x[:, 0] + x[:, 1] > 2000.0
    pipeline = make_pipeline(StandardScaler(), HashedLogisticRegression(**SMALL))
    search = GridSearchCV(pipeline, {"hashedlogisticregression__lr": [1e-6, 0.2]}, cv=3).fit(x, y)
    assert search.best_params_ == {"hashedlogisticregression__lr": 0.2}
    assert search.best_score_ > 0.85
    assert cross_val_score(search.best_estimator_, x, y, cv=3).mean() > 0.85


def test_a_column_transformer_of_frames_keeps_types() -> None:
    table, y = clicks(300)
    scaled = ColumnTransformer([("price", StandardScaler(), ["price"])], remainder="passthrough")
    scaled.set_output(transform="pandas")
    pipeline = make_pipeline(scaled, HashedFMClassifier(**SMALL)).fit(pd.DataFrame(table), y)
    assert pipeline[-1].feature_names_in_.tolist() == ["price__price", "remainder__user", "remainder__site"]
    assert pipeline.score(pd.DataFrame(table), y) > 0.75


def test_clones_have_the_parameters_and_not_the_table(tmp_path: Path) -> None:
    table, y = clicks(50)
    model = HashedFMClassifier(rank=3, numeric_features=["user"], table=tmp_path / "m.emb", **SMALL).fit(table, y)
    copied = clone(model)
    assert copied.get_params() == model.get_params()
    with pytest.raises(NotFittedError):
        copied.predict(table)
    with pytest.raises(NotFittedError):
        _ = copied.table_


def test_early_stopping_keeps_the_best_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    table = {"id": random.integers(0, 200, 600), "kind": random.integers(0, 3, 600)}
    y = random.random(600) < 0.2 + 0.3 * table["kind"]  # ids are random, so learning them is overfitting
    options = {
        "early_stopping": True,
        "validation_fraction": 0.25,
        "lr": 0.3,
        "max_iter": 50,
        "shuffle": False,
        "tol": 0.0,
    }
    model = HashedFMClassifier(table=tmp_path / "m.emb", verbose=1, **options, **SMALL).fit(table, y)
    curve = model.validation_loss_curve_
    assert model.n_iter_ == len(curve) == len(model.loss_curve_) == model.best_iter_ + 2 < 50
    assert np.argmin(curve) == model.best_iter_ - 1
    held_out, labels = rows_of(table, slice(450, None)), y[450:]
    log_proba = model.predict_log_proba(held_out)
    assert np.mean(-log_proba[np.arange(150), labels.astype(int)]) == pytest.approx(min(curve), rel=1e-6)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == model.n_iter_
    assert lines[0].startswith("[HashedFMClassifier] pass 1/50: log loss 0.")
    assert "held out 0." in lines[0]
    reader = HashedFMClassifier.from_table(tmp_path / "m.emb")
    np.testing.assert_array_equal(reader.decision_function(table), model.decision_function(table))


def test_early_stopping_comes_with_many_examples() -> None:
    x = np.random.default_rng(0).integers(0, 5, (10_000, 1))
    y = x[:, 0] > 2
    few = HashedLogisticRegression(max_iter=1, batch_size=1000, **SMALL).fit(x[1:], y[1:])
    many = HashedLogisticRegression(max_iter=1, batch_size=1000, **SMALL).fit(x, y)
    assert (len(few.validation_loss_curve_), len(many.validation_loss_curve_)) == (0, 1)
