"""Metrics against scikit-learn and the formulas, streaming against whole arrays; undefined values cause no warnings."""

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

from hashemb.ctr.metrics import (
    StreamingMetrics,
    auc,
    calibration,
    expected_calibration_error,
    gauc,
    logloss,
    normalized_entropy,
)
from hashemb.ctr.metrics.calibration_bins import wilson_interval
from hashemb.ctr.metrics.scores import calibration_by_quantile

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
    """This includes scores outside the histogram, in one bin, or all tied; the bound is not always vacuous."""
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


def packed(values: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(values.tobytes())).decode()


FOUR_ZEROS = packed(np.zeros(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"histogram": "!"}, "not a state of StreamingMetrics"),
        ({"histogram": "AAAA"}, "not a state of StreamingMetrics"),
        ({"sum_loss": None}, "not a state of StreamingMetrics"),
        ({"num_bins": 3}, "not a state of StreamingMetrics"),
        ({"num_bins": 1 << 13}, "not a state of StreamingMetrics"),
        ({"num_bins": 2, "histogram": FOUR_ZEROS}, "state has 2 bins, this version has 16384"),
        ({"histogram": FOUR_ZEROS}, "histogram must have 262,144 bytes, found 32"),
        ({"histogram": packed(np.full((2, 1 << 14), -1))}, "histogram must hold sums from 0"),
        ({"histogram": packed(np.zeros(1 << 26, np.int64))}, "histogram must have 262,144 bytes, found 262,145"),
        ({"sum_loss": float("inf")}, "sum_loss must be finite"),
        ({"squares": packed(np.zeros((2, 1 << 14))), "examples": 10**30}, "examples must be from 0 to"),
    ],
)
def test_state_that_is_none(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamingMetrics.from_state_dict(StreamingMetrics().state_dict() | change)
    with pytest.raises(ValueError, match="not a state of StreamingMetrics: num_bins must be an integer, found nothing"):
        StreamingMetrics.from_state_dict({})


# ---- weights ----


def test_weights_against_scikit_learn() -> None:
    y, p = predictions(5000)
    w = np.random.default_rng(1).exponential(1.0, 5000)
    assert auc(y, p, w) == pytest.approx(sklearn_metrics.roc_auc_score(y, p, sample_weight=w), rel=1e-12)
    assert logloss(y, p, w) == pytest.approx(sklearn_metrics.log_loss(y, p, sample_weight=w), rel=1e-12)
    assert calibration(y, p, w) == pytest.approx(np.average(p, weights=w) / np.average(y, weights=w), rel=1e-12)
    metrics = StreamingMetrics()
    for part in np.array_split(np.arange(5000), 7):
        metrics.update(y[part], p[part], w[part])
    assert metrics.examples == 5000
    assert metrics.weight == pytest.approx(w.sum())
    for function in (logloss, calibration, normalized_entropy):
        assert getattr(metrics, function.__name__) == pytest.approx(function(y, p, w), rel=1e-10)
    assert abs(metrics.auc - auc(y, p, w)) <= metrics.auc_error_bound


FUNCTIONS = (auc, logloss, normalized_entropy, calibration)


def test_a_whole_weight_is_so_many_examples() -> None:
    y, p = predictions(2000)
    w = np.random.default_rng(2).integers(0, 4, 2000)
    repeated = np.repeat(y, w), np.repeat(p, w)
    for function in FUNCTIONS:
        assert function(y, p, w) == pytest.approx(function(*repeated), rel=1e-12)
    users = np.arange(2000) % 37
    assert gauc(y, p, users, w) == pytest.approx(gauc(*repeated, np.repeat(users, w)), rel=1e-12)
    for weighted, expected in zip(
        calibration_by_quantile(y, p, w), calibration_by_quantile(*repeated), strict=True
    ):
        assert weighted[:3] == pytest.approx(expected[:3], rel=1e-12)


def test_streams_with_and_without_weights_mix() -> None:
    y, p = predictions(3000)
    mixed, all_weighted = streamed(y[:2000], p[:2000]), StreamingMetrics()
    before = mixed.copy()
    mixed.update(y[2000:], p[2000:], np.full(1000, 2.5))
    all_weighted.update(y, p, np.repeat([1.0, 2.5], [2000, 1000]))
    recent = mixed - before
    for metrics, expected in ((mixed, all_weighted), (recent, streamed(y[2000:], p[2000:]))):
        assert metrics.examples == expected.examples
        assert metrics.logloss == pytest.approx(expected.logloss, rel=1e-10)
        assert metrics.auc == pytest.approx(expected.auc, rel=1e-10)
    assert recent.weight == pytest.approx(2500.0)
    restored = StreamingMetrics.from_state_dict(json.loads(json.dumps(mixed.state_dict())))
    assert restored.state_dict() == mixed.state_dict()
    assert restored.calibration_by_quantile() == mixed.calibration_by_quantile()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], r"weights must have shape \(2,\), one per label, got \(1,\)"),
        ([1.0, -1.0], "weights must be finite and at least 0, got -1.0 at index 1"),
        ([math.inf, 1.0], "weights must be finite and at least 0, got inf at index 0"),
        ([1.0, math.nan], "weights must be finite and at least 0, got nan at index 1"),
    ],
)
def test_bad_weights(weights: list[float], message: str) -> None:
    metrics = streamed([0, 1], [0.3, 0.6])
    before = metrics.state_dict()
    for function in (*FUNCTIONS, calibration_by_quantile, metrics.update):
        with pytest.raises(ValueError, match=message):
            function([0, 1], [0.1, 0.2], weights)
    assert metrics.state_dict() == before


def test_weights_of_nothing() -> None:
    zeros = np.zeros(2)
    assert all(math.isnan(function([0, 1], [0.1, 0.2], zeros)) for function in FUNCTIONS)
    assert calibration_by_quantile([0, 1], [0.1, 0.2], zeros) == []
    assert math.isnan(gauc([0, 1], [0.1, 0.2], [1, 1], zeros))


# ---- GAUC ----


def gauc_user_by_user(y: np.ndarray, p: np.ndarray, users: np.ndarray) -> float:
    """Compute GAUC by its definition, with scikit-learn's AUC and a loop."""
    total, impressions = 0.0, 0
    for user in np.unique(users):
        mine = users == user
        if 0 < y[mine].sum() < mine.sum():
            total += mine.sum() * sklearn_metrics.roc_auc_score(y[mine], p[mine])
            impressions += int(mine.sum())
    return total / impressions if impressions else math.nan


@pytest.mark.parametrize("digits", [2, 15], ids=["ties", "no ties"])
@pytest.mark.parametrize("num_users", [1, 40, 4000])
def test_gauc_is_what_it_is_user_by_user(num_users: int, digits: int) -> None:
    y, p = predictions(4000)
    p = p.round(digits)
    users = np.random.default_rng(3).integers(0, num_users, 4000)
    expected = gauc_user_by_user(y, p, users)
    assert gauc(y, p, users) == pytest.approx(expected, rel=1e-12)
    assert gauc(y, p, [f"user {n}" for n in users]) == pytest.approx(expected, rel=1e-12)
    if num_users == 1:
        assert expected == pytest.approx(auc(y, p))


def test_gauc_is_blind_to_who_clicks_a_lot() -> None:
    rng = np.random.default_rng(4)
    users = rng.integers(0, 200, 20_000)
    rates = rng.uniform(0.05, 0.95, 200)
    y = (rng.random(20_000) < rates[users]).astype(float)
    assert auc(y, rates[users]) > 0.7
    assert gauc(y, rates[users], users) == pytest.approx(0.5)
    assert gauc(y, y, users) == 1.0


def test_gauc_that_is_not_defined_or_not_asked_well() -> None:
    assert math.isnan(gauc([], [], []))
    assert math.isnan(gauc([0, 1], [0.1, 0.2], [1, 2]))
    with pytest.raises(ValueError, match=r"users must have shape \(2,\), one per label, got \(3,\)"):
        gauc([0, 1], [0.1, 0.2], [1, 2, 3])


# ---- calibration by quantile ----


@pytest.mark.parametrize("num_bins", [1, 5, 10])
def test_bins_are_those_of_scikit_learn(num_bins: int) -> None:
    y, p = predictions(5000)
    bins = calibration_by_quantile(y, p, num_bins=num_bins)
    calibration_curve = pytest.importorskip("sklearn.calibration").calibration_curve
    observed, predicted = calibration_curve(y, p, n_bins=num_bins, strategy="quantile")
    assert [bin.weight for bin in bins] == [5000 / num_bins] * num_bins
    np.testing.assert_allclose([bin.observed for bin in bins], observed)
    np.testing.assert_allclose([bin.predicted for bin in bins], predicted)


def test_tied_predictions_share_a_bin() -> None:
    y, p = np.tile([0.0, 1.0], 500), np.repeat([0.2, 0.2, 0.2, 0.7], 250)
    bins = calibration_by_quantile(y, p)
    assert [(bin.weight, round(bin.predicted, 12), bin.observed) for bin in bins] == [(750, 0.2, 0.5), (250, 0.7, 0.5)]


def test_streamed_bins_are_close_to_exact_ones() -> None:
    y, p = predictions(50_000)
    for exact, close in zip(
        calibration_by_quantile(y, p), streamed(y, p).calibration_by_quantile(), strict=True
    ):
        assert close.weight == pytest.approx(exact.weight, abs=200)
        assert close.predicted == pytest.approx(exact.predicted, rel=5e-3)
        assert close.observed == pytest.approx(exact.observed, abs=5e-3)


def test_intervals_hold_what_they_promise() -> None:
    """95 % of the intervals contain calibrated predictions, also with weights; few contain predictions half as high."""
    inside, weighted, wrong = [], [], []
    for seed in range(40):
        y, p = predictions(2000, seed=seed)
        w = np.random.default_rng(seed).choice([1.0, 10.0], 2000)
        inside += [bin.low <= bin.predicted <= bin.high for bin in calibration_by_quantile(y, p)]
        weighted += [bin.low <= bin.predicted <= bin.high for bin in calibration_by_quantile(y, p, w)]
        wrong += [bin.low <= bin.predicted <= bin.high for bin in calibration_by_quantile(y, p / 2)]
    assert 0.92 < np.mean(inside) < 0.98
    assert 0.92 < np.mean(weighted) < 0.98
    assert np.mean(wrong) < 0.25


@pytest.mark.parametrize(("positive", "count"), [(0, 7), (3, 10), (10, 10), (1, 1)])
def test_wilson_against_its_definition(positive: int, count: int) -> None:
    """The limits are the rates that are 1.96 of their own standard deviations away from the observed share."""
    share = positive / count
    low, high = wilson_interval(share, count)
    assert 0.0 <= low <= share <= high <= 1.0
    for limit in (low, high):
        if 0.0 < limit < 1.0:
            assert abs(limit - share) / math.sqrt(limit * (1 - limit) / count) == pytest.approx(1.959964, rel=1e-6)


def test_expected_calibration_error() -> None:
    y, p = predictions(50_000)
    honest, wrong = (expected_calibration_error(calibration_by_quantile(y, q)) for q in (p, p / 2))
    assert honest < 0.01
    assert wrong == pytest.approx(p.mean() / 2, rel=0.1)
    assert math.isnan(expected_calibration_error([]))
    with pytest.raises(ValueError, match="num_bins must be at least 1, got 0"):
        calibration_by_quantile(y, p, num_bins=0)
