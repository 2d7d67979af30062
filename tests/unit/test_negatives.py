"""Negative down-sampling is reproducible, and calibrated on a stream with known truth; without correction it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit

import hashemb
from hashemb.ctr.data import Batch
from hashemb.ctr.metrics import calibration
from hashemb.ctr.training import NegativeSampling
from hashemb.ctr.training.progressive import ProgressiveValidator

pytest.importorskip("pyarrow")


class WeightedLogisticRegression:
    """A learner with sample weights on a table of one column: sums over fields, and gradients by hand."""

    def __init__(self, table: hashemb.EmbeddingTable) -> None:
        self.table = table

    def predict_proba(self, keys: np.ndarray, **parts: Any) -> np.ndarray:
        return expit(self.table.lookup(keys)[..., 0].sum(axis=1)).astype(np.float32)

    def learn(
        self, keys: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None, **parts: Any
    ) -> np.ndarray:
        before = self.predict_proba(keys)
        residuals = (before - labels) * (1.0 if weights is None else weights)
        self.table.update(keys, np.repeat(residuals, keys.shape[1]).reshape(*keys.shape, 1))
        return before


@pytest.fixture(scope="module")
def impressions() -> Batch:
    """Generate a stream with one click in twenty impressions, typical of negative down-sampling in practice."""
    from hashemb.ctr.synthetic import ImpressionStream

    made = ImpressionStream(seed=3, base_ctr=0.05).generate(0, 60_000)
    return Batch(made.labels, made.keys())


def learn(batch: Batch, path: Path, negatives: NegativeSampling | None) -> tuple[ProgressiveValidator, np.ndarray]:
    """Learn 50,000 impressions; return the validator, and raw predictions for the next 10,000."""
    optimizer = hashemb.Adagrad(lr=0.02, initial_accumulator_value=1.0)
    with hashemb.create(path, num_embeddings=2**18, embedding_dim=1, optimizer=optimizer, init=hashemb.Zeros()) as t:
        validator = ProgressiveValidator(WeightedLogisticRegression(t), negatives=negatives)
        for i in range(0, 50_000, 250):
            validator.learn(Batch(batch.labels[i : i + 250], batch.keys[i : i + 250]))
        return validator, validator.model.predict_proba(batch.keys[50_000:])


@pytest.mark.parametrize("correction", ["predictions", "weights"])
def test_corrected_probabilities_are_calibrated(impressions: Batch, correction: Any, tmp_path: Path) -> None:
    negatives = NegativeSampling(0.1, correction)
    validator, raw = learn(impressions, tmp_path / "t", negatives)
    labels = impressions.labels[50_000:]
    assert calibration(labels, negatives.corrected(raw)) == pytest.approx(1.0, abs=0.08)
    uncorrected = calibration(labels, raw)
    if correction == "predictions":
        assert uncorrected > 4.0, "what would be predicted without the correction"
        assert calibration(labels, NegativeSampling(0.5).corrected(raw)) > 1.5, "nor does another rate do"
    else:
        assert uncorrected == calibration(labels, negatives.corrected(raw))
    assert validator.learned == 50_000
    assert 0.1 < validator.metrics.examples / 50_000 < 0.2


def test_progressive_metrics_are_those_of_all_examples(impressions: Batch, tmp_path: Path) -> None:
    """A fifth of the examples gives the click rate, calibration and loss of learning all of them."""
    everything, _ = learn(impressions, tmp_path / "all", None)
    for correction in ("predictions", "weights"):
        sampled, _ = learn(impressions, tmp_path / correction, NegativeSampling(0.2, correction))
        metrics = sampled.metrics
        assert metrics.weight == pytest.approx(50_000, rel=0.02)
        assert metrics.positives == everything.metrics.positives
        assert metrics.logloss == pytest.approx(everything.metrics.logloss, rel=0.06)
        assert metrics.examples < 15_000


def test_unweighted_learning_is_not_calibrated(impressions: Batch, tmp_path: Path) -> None:
    """Calibration is due to the weights: with a weight of 1, the same examples give odds ten times too high."""
    negatives = NegativeSampling(0.1)
    kept = negatives.select(impressions, 0)
    optimizer = hashemb.Adagrad(lr=0.02, initial_accumulator_value=1.0)
    with hashemb.create(tmp_path / "t", num_embeddings=2**18, embedding_dim=1, optimizer=optimizer) as table:
        model = WeightedLogisticRegression(table)
        for i in range(0, len(kept.labels), 250):
            model.learn(kept.keys[i : i + 250], kept.labels[i : i + 250])
        assert calibration(impressions.labels, model.predict_proba(impressions.keys)) > 3.0


def test_what_is_kept_depends_on_seed_and_number_alone() -> None:
    labels = (np.random.default_rng(0).random(10_000) < 0.3).astype(np.float32)
    negatives = NegativeSampling(0.25, seed=7)
    whole = negatives.keep(labels, 0)
    pieces = [negatives.keep(labels[i : i + 333], i) for i in range(0, 10_000, 333)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    assert whole[labels == 1].all()
    assert whole[labels == 0].mean() == pytest.approx(0.25, abs=0.02)
    other = NegativeSampling(0.25, seed=8).keep(labels, 0)
    assert (other != whole)[labels == 0].mean() == pytest.approx(2 * 0.25 * 0.75, abs=0.02)
    assert NegativeSampling(1.0).keep(labels, 0).all()


def test_ragged_batches_keep_their_keys_together() -> None:
    labels = np.float32([0, 1, 0, 0, 1, 0, 0, 0])
    lengths = np.array([2, 0, 3, 1, 2, 0, 1, 4])
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    keys = np.arange(offsets[-1], dtype=np.uint64)
    batch = Batch(labels, keys, offsets, keys.astype(np.float32), keys.astype(np.int32), np.arange(8, dtype=np.float32))
    negatives = NegativeSampling(0.5, seed=1)
    mask, kept = negatives.keep(labels, 100), negatives.select(batch, 100)
    assert 2 < mask.sum() < 8
    for number, example in enumerate(np.flatnonzero(mask)):
        mine = slice(kept.offsets[number], kept.offsets[number + 1])
        expected = keys[offsets[example] : offsets[example + 1]]
        for part in (kept.keys, kept.values, kept.fields):
            assert part[mine].tolist() == expected.tolist()
    assert kept.labels.tolist() == labels[mask].tolist()
    assert kept.weights.tolist() == np.flatnonzero(mask).tolist()
    expected_weights = np.where(kept.labels == 0, 2.0, 1.0) * kept.weights
    assert negatives.importance(kept).tolist() == expected_weights.tolist()


def test_correction_against_its_formula_and_extremes() -> None:
    p = np.float32([0.0, 1e-30, 1e-6, 0.3, 0.999999, 1.0])
    q = NegativeSampling(0.01).corrected(p)
    exact = p.astype(np.float64) / (p + (1.0 - p.astype(np.float64)) / 0.01)
    np.testing.assert_allclose(q, exact, rtol=1e-6)
    assert q.dtype == np.float32
    assert q[0] == 0.0
    assert q[-1] == 1.0
    inner = slice(1, 5)
    odds = [x[inner].astype(np.float64) / (1.0 - x[inner].astype(np.float64)) for x in (p, q)]
    np.testing.assert_allclose(odds[1] / odds[0], 0.01, rtol=0.1)
    np.testing.assert_array_equal(NegativeSampling(1.0).corrected(p), p)
    assert NegativeSampling(0.5, "weights").corrected(p) is p


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, float("nan")])
def test_bad_rates(rate: float) -> None:
    with pytest.raises(ValueError, match=rf"the rate of negatives must be in \(0, 1\], got {rate}"):
        NegativeSampling(rate)


def test_bad_correction() -> None:
    with pytest.raises(ValueError, match="correction must be one of predictions, weights, got 'none'"):
        NegativeSampling(0.5, "none")  # type: ignore[arg-type]
