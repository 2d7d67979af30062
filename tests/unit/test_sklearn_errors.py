"""Bad parameters and bad data are refused, with the reason, before anything is written."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clicks import clicks, rows_of
from scipy import sparse

pytest.importorskip("sklearn")
pytest.importorskip("pyarrow")

from hashemb.sklearn import HashedFMClassifier, HashedFwFMClassifier, HashedLogisticRegression

SMALL = {"rows": 4096, "random_state": 0}

BAD_PARAMETERS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rows": 0}, ValueError, "num_embeddings"),
    ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
    ({"max_iter": 0}, ValueError, "max_iter must be at least 1, got 0"),
    ({"batch_size": 2.5}, TypeError, "batch_size must be an int, got float 2.5"),
    ({"lr": -1.0}, ValueError, "lr must be between 0 and 1e30"),
    ({"optimizer": "adam"}, ValueError, "unknown optimizer 'adam'"),
    ({"optimizer": "sgd", "initial_accumulator": 1.0}, ValueError, "no accumulator"),
    ({"dtype": "int8"}, ValueError, "dtype"),
    ({"early_stopping": "never"}, ValueError, "early_stopping must be True, False or"),
    ({"early_stopping": True, "validation_fraction": 1.0}, ValueError, "validation_fraction must be between"),
    ({"early_stopping": True, "validation_fraction": 0.001}, ValueError, "leaves 0 to validate with and 40 to learn"),
    ({"tol": float("nan")}, ValueError, "tol"),
    ({"numeric_features": ["site"]}, TypeError, "'site' is in numeric_features"),
    ({"table": 7}, TypeError, "expected str, bytes or os.PathLike object, not int"),
]


@pytest.mark.parametrize(("parameters", "error", "message"), BAD_PARAMETERS)
def test_bad_parameters_are_refused_by_fit(
    parameters: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    table, y = clicks(40)
    model = HashedFMClassifier(**({"rows": 100, "table": tmp_path / "m.emb"} | parameters))
    with pytest.raises(error, match=message):
        model.fit(table, y)
    gc.collect()
    assert list(tmp_path.iterdir()) == []


BAD_DATA: list[tuple[Any, Any, type[Exception], str]] = [
    ([0, 1, 1], None, ValueError, "X has 4 samples but y has 3"),
    ([0, 1, 2, 1], None, ValueError, "it has 3 classes"),
    ([1, 1, 1, 1], None, ValueError, "contains only one class, 1"),
    ([0.5, 0.1, 0.2, 0.9], None, ValueError, "Unknown label type"),
    ([0, 1, np.nan, 1], None, ValueError, "y contains NaN"),
    ([0, 1, 0, 1], [1, 1, 1], ValueError, r"must have shape \(4,\), one per sample, got \(3,\)"),
    ([0, 1, 0, 1], [1, 1, -1, 1], ValueError, "got -1.0 at index 2"),
    ([0, 1, 0, 1], [0, 1, np.inf, 1], ValueError, "got inf at index 2"),
    ([0, 1, 0, 1], [0, 0, 0, 0], ValueError, "all 4 values of sample_weight are zero"),
    ([0, 1, 0, 1], [0, 1, 0, 1], ValueError, "contains only one class"),
    (np.array(["2024-01-01", "2025-01-01"] * 2, "M8[D]"), None, TypeError, "cannot be written to estimator.json"),
]


@pytest.mark.parametrize(("y", "weights", "error", "message"), BAD_DATA)
def test_bad_data_is_refused_before_anything_is_written(
    y: Any, weights: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    model = HashedLogisticRegression(table=tmp_path / "m.emb", **SMALL)
    for learn in (model.fit, model.partial_fit):
        if weights == [0, 1, 0, 1] and learn == model.partial_fit:
            continue  # a batch of a stream may have a single class
        with pytest.raises(error, match=message):
            learn({"a": [1, 2, 3, 4]}, y, sample_weight=weights)
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_bad_values_later_change_nothing() -> None:
    table, y = clicks(100)
    model = HashedLogisticRegression(**SMALL).partial_fit(table, y)
    step = model.table_.step
    for bad, labels, message in [
        ({**table, "user": ["ann"] * 100}, y, "'user' held integers when the model was fitted"),
        (rows_of(table, slice(50)), y, "50 samples but y has 100"),
        ({**table, "user": np.arange(100) + 0.5}, y, "'user' holds ids"),
        (table, np.where(y, 2, 0), "y holds the label 2, the classes are"),
        (sparse.csr_array((100, 3)), y, "X is a sparse matrix"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            model.partial_fit(bad, labels)
    assert model.table_.step == step


def test_sparse_matrices_with_what_has_no_place_in_them() -> None:
    y = [0, 1]
    with pytest.raises(ValueError, match="X holds nan in row 1, column 1: must be finite"):
        HashedLogisticRegression(**SMALL).fit(sparse.csr_array([[1.0, 0.0], [0.0, np.nan]]), y)
    with pytest.raises(ValueError, match="X holds inf in row 0"):
        HashedLogisticRegression(**SMALL).fit(sparse.csr_array([[1e300, 0.0], [0.0, 1.0]]), y)
    with pytest.raises(ValueError, match="are for tables"):
        HashedLogisticRegression(numeric_features=[0], **SMALL).fit(sparse.csr_array(np.eye(2)), y)
    with pytest.raises(TypeError, match="no sparse matrices"):
        HashedFwFMClassifier(**SMALL).fit(sparse.csr_array(np.eye(2)), y)


def test_the_first_part_of_a_stream_needs_both_labels_or_their_names() -> None:
    with pytest.raises(ValueError, match="name both with classes="):
        HashedLogisticRegression(**SMALL).partial_fit({"a": [1, 2]}, [1, 1])
    model = HashedLogisticRegression(**SMALL).partial_fit({"a": [1, 2]}, [1, 1], classes=[0, 1])
    assert model.predict({"a": [1]}).tolist() == [1]
