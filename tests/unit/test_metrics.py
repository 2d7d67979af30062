"""Metrics: against scikit-learn and the formulas; streaming against whole arrays; nothing undefined warns."""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hashemb.ctr.metrics import StreamingMetrics, auc, calibration, logloss, normalized_entropy

sklearn_metrics = pytest.importorskip("sklearn.metrics")

Arrays = tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]


def predictions(n: int, *, mean: float = -1.5, std: float = 1.3, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    p = 1 / (1 + np.exp(-rng.normal(mean, std, n)))
    return (rng.random(n) < p).astype(np.float32), p


def streamed(labels: npt.ArrayLike, probabilities: npt.ArrayLike, batch_size: int = 1000) -> StreamingMetrics:
    metrics = StreamingMetrics()
    y, p = np.asarray(labels), np.asarray(probabilities)
    for i in range(0, len(y), batch_size):
        metrics.update(y[i : i + batch_size], p[i : i + batch_size])
    return metrics


def test_whole_arrays() -> None:
    y, p = predictions(5000)
    rate = y.mean(dtype=np.float64)
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    loss = -np.mean(np.where(y == 1, np.log(p), np.log1p(-p)))
    assert auc(y, p) == sklearn_metrics.roc_auc_score(y, p)
    assert logloss(y, p) == pytest.approx(loss, rel=1e-12)
    assert normalized_entropy(y, p) == pytest.approx(loss / entropy, rel=1e-12)
    assert calibration(y, p) == pytest.approx(p.sum() / y.sum(), rel=1e-12)
    assert normalized_entropy(y, np.full(5000, rate)) == pytest.approx(1.0)


def test_streaming_equals_whole() -> None:
    y, p = predictions(20_000)
    metrics = streamed(y, p, batch_size=777)
    assert metrics.examples == 20_000
    assert metrics.positives == y.sum()
    assert metrics.logloss == pytest.approx(logloss(y, p), rel=1e-12)
    assert metrics.normalized_entropy == pytest.approx(normalized_entropy(y, p), rel=1e-12)
    assert metrics.calibration == pytest.approx(calibration(y, p), rel=1e-12)
    assert metrics.best_constant_logloss == pytest.approx(logloss(y, np.full(20_000, y.mean())), rel=1e-6)
    assert metrics.auc == pytest.approx(auc(y, p), abs=2e-6)


@pytest.mark.parametrize(
    ("mean", "std", "bound"),
    [(-1.5, 1.3, 3e-4), (-6, 2, 3e-4), (-12, 3, 1e-2), (0, 8, 0.1), (-3, 1e-4, 0.5), (2, 0, 0.5)],
)
def test_auc_is_off_by_no_more_than_its_bound(mean: float, std: float, bound: float) -> None:
    """Also where scores lie beyond the histogram, in one bin, or are all tied; the bound is not always vacuous."""
    y, p = predictions(50_000, mean=mean, std=std)
    y[:2] = 0, 1
    metrics = streamed(y, p)
    assert abs(metrics.auc - auc(y, p)) <= metrics.auc_error_bound + 1e-12
    assert metrics.auc_error_bound <= bound


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1)), max_size=50))
def test_auc_bound_on_anything(pairs: list[tuple[bool, float]]) -> None:
    y, p = [float(label) for label, _ in pairs], [probability for _, probability in pairs]
    metrics = streamed(y, p)
    if 0 < sum(y) < len(y):
        assert abs(metrics.auc - auc(y, p)) <= metrics.auc_error_bound + 1e-12
    else:
        assert math.isnan(metrics.auc)
        assert math.isnan(metrics.auc_error_bound)


def test_probabilities_of_0_and_1_are_clipped() -> None:
    eps = np.finfo(np.float64).eps
    assert logloss([1, 0], [0.0, 1.0]) == pytest.approx(-np.log(eps), rel=1e-3)
    for y, p in (([1, 0], [0.0, 1.0]), ([1, 0], [1.0, 0.0]), ([1, 0, 1], [1e-300, 0.0, 1.0])):
        metrics = streamed(y, p)
        assert metrics.logloss == pytest.approx(logloss(y, p), rel=1e-9, abs=1e-15)
        assert abs(metrics.auc - auc(y, p)) <= metrics.auc_error_bound
        assert metrics.calibration == calibration(y, p)


NAN_CASES = [
    ([], [], {"logloss", "auc", "normalized_entropy", "calibration", "best_constant_logloss"}),
    ([0, 0], [0.1, 0.2], {"auc", "normalized_entropy", "calibration"}),
    ([1, 1], [0.1, 0.2], {"auc", "normalized_entropy"}),
    ([0, 1], [0.1, 0.2], set()),
]


@pytest.mark.parametrize(("labels", "probabilities", "undefined"), NAN_CASES)
def test_what_is_not_defined_is_nan(labels: list[int], probabilities: list[float], undefined: set[str]) -> None:
    functions: dict[str, Callable[..., float]] = {
        "logloss": logloss, "auc": auc, "normalized_entropy": normalized_entropy, "calibration": calibration,
    }  # fmt: skip
    assert {name for name, f in functions.items() if math.isnan(f(labels, probabilities))} == undefined & set(functions)
    metrics = streamed(labels, probabilities)
    names = [*functions, "best_constant_logloss"]
    assert {name for name in names if math.isnan(getattr(metrics, name))} == undefined
    assert "nan" in repr(metrics) if undefined else "nan" not in repr(metrics)


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([0, 2], [0.1, 0.2], "labels must be 0 or 1, got 2.0 at index 1"),
        ([0, math.nan], [0.1, 0.2], "labels must be 0 or 1, got nan at index 1"),
        ([0, 1], [0.1, 1.5], r"probabilities must be in \[0, 1\], got 1.5 at index 1"),
        ([0, 1], [-0.1, 0.5], r"probabilities must be in \[0, 1\], got -0.1 at index 0"),
        ([0, 1], [0.1, math.nan], r"probabilities must be in \[0, 1\], got nan at index 1"),
        ([0, 1], [0.1], r"1-D and of one length, got \(2,\) and \(1,\)"),
        ([[0, 1]], [[0.1, 0.2]], r"1-D and of one length, got \(1, 2\) and \(1, 2\)"),
    ],
)
def test_bad_input(labels: list[float], probabilities: list[float], message: str) -> None:
    metrics = streamed([0, 1], [0.3, 0.6])
    before = metrics.state_dict()
    for function in (logloss, auc, normalized_entropy, calibration, metrics.update):
        with pytest.raises(ValueError, match=message):
            function(labels, probabilities)
    assert metrics.state_dict() == before


def test_since_a_snapshot() -> None:
    y, p = predictions(3000)
    metrics = streamed(y[:1000], p[:1000])
    snapshot = metrics.copy()
    metrics.update(y[1000:], p[1000:])
    recent, expected = metrics - snapshot, streamed(y[1000:], p[1000:])
    assert (snapshot.examples, metrics.examples, recent.examples) == (1000, 3000, 2000)
    for name in ("logloss", "normalized_entropy", "auc", "calibration", "best_constant_logloss"):
        assert getattr(recent, name) == pytest.approx(getattr(expected, name), rel=1e-10)
    assert math.isnan((metrics - metrics).logloss)
    with pytest.raises(ValueError, match="not an earlier state of these metrics: 3000 examples, these have 1000"):
        snapshot - metrics
    with pytest.raises(TypeError):
        metrics - 1  # type: ignore[operator]


def test_state_goes_through_json_and_on() -> None:
    y, p = predictions(50_000)
    metrics = streamed(y[:40_000], p[:40_000])
    text = json.dumps(metrics.state_dict())
    restored = StreamingMetrics.from_state_dict(json.loads(text))
    assert len(text) < 50_000
    for part in (metrics, restored):
        part.update(y[40_000:], p[40_000:])
    assert restored.state_dict() == metrics.state_dict()
    assert restored.auc == metrics.auc


FOUR_ZEROS = base64.b64encode(zlib.compress(bytes(32))).decode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"histogram": "!"}, "not a state of StreamingMetrics"),
        ({"histogram": "AAAA"}, "not a state of StreamingMetrics"),
        ({"sum_loss": None}, "not a state of StreamingMetrics"),
        ({"num_bins": 3}, "not a state of StreamingMetrics"),
        ({"num_bins": 1 << 13}, "not a state of StreamingMetrics"),
        ({"num_bins": 2, "histogram": FOUR_ZEROS}, "state has 2 bins, this version has 16384"),
    ],
)
def test_state_that_is_none(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamingMetrics.from_state_dict(StreamingMetrics().state_dict() | change)
    with pytest.raises(ValueError, match="not a state of StreamingMetrics: KeyError"):
        StreamingMetrics.from_state_dict({})
