"""Progressive validation: examples are scored before they are learned, and a pause leaves no trace."""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hashemb
from hashemb.ctr.data import Batch, read_ahead
from hashemb.ctr.metrics import auc, logloss, normalized_entropy
from hashemb.ctr.models import FactorizationMachine
from hashemb.ctr.training import EveryN, PowersOfTwo, ProgressRow
from hashemb.ctr.training.progressive import ProgressiveValidator


class Memoriser:
    """A model that predicts 0.5 for unseen keys, and for others, with near certainty, the label it has seen."""

    def __init__(self) -> None:
        self.seen: dict[int, float] = {}

    def learn(self, keys: np.ndarray, labels: Any, **parts: Any) -> np.ndarray:
        before = self.predict_proba(keys)
        self.seen.update({int(k): 0.01 + 0.98 * float(y) for k, y in zip(keys[:, 0], labels, strict=True)})
        return before

    def predict_proba(self, keys: np.ndarray, **parts: Any) -> np.ndarray:
        return np.array([self.seen.get(int(key), 0.5) for key in keys[:, 0]], np.float32)


def stream(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Make examples of two fields whose labels depend on both."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 50, (n, 2))
    effects = rng.normal(0, 1.5, (2, 50))
    logits = effects[0, values[:, 0]] + effects[1, values[:, 1]] - 1.0
    labels = (rng.random(n) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    return hashemb.hash_fields({"a": values[:, 0], "b": values[:, 1]}), labels


def batches(keys: np.ndarray, labels: np.ndarray, size: int = 100) -> list[Batch]:
    return [Batch(labels[i : i + size], keys[i : i + size]) for i in range(0, len(keys), size)]


def validate(table_path: Path, keys: np.ndarray, labels: np.ndarray, **options: Any) -> ProgressiveValidator:
    adagrad = hashemb.Adagrad(lr=0.1)
    with hashemb.create(table_path, num_embeddings=10_000, embedding_dim=5, optimizer=adagrad) as table:
        validator = ProgressiveValidator(FactorizationMachine(table), **options)
        for batch in batches(keys, labels):
            validator.learn(batch)
    return validator


def test_every_example_is_scored_before_it_is_learned() -> None:
    validator = ProgressiveValidator(Memoriser())
    keys, labels = np.arange(1000, dtype=np.uint64)[:, None], np.tile(np.float32([0, 1]), 500)
    for batch in batches(keys, labels):
        validator.learn(batch)
    assert validator.metrics.logloss == pytest.approx(math.log(2))
    for batch in batches(keys, labels):
        validator.learn(batch)
    second_pass = 2 * validator.metrics.logloss - math.log(2)
    assert second_pass == pytest.approx(-math.log(0.99), rel=1e-4)


def test_shuffled_labels_teach_nothing(tmp_path: Path) -> None:
    """A metric that leaked the label would show AUC above .5 or NE below 1 here."""
    keys, labels = stream(20_000)
    honest = validate(tmp_path / "honest", keys, labels).metrics
    shuffled = validate(tmp_path / "shuffled", keys, np.random.default_rng(1).permutation(labels)).metrics
    assert honest.auc > 0.7
    assert honest.normalized_entropy < 0.95
    assert shuffled.auc == pytest.approx(0.5, abs=0.02)
    assert shuffled.normalized_entropy >= 1.0


def test_rows_fall_due_inside_batches() -> None:
    validator = ProgressiveValidator(Memoriser(), EveryN(70))
    keys, labels = np.arange(300, dtype=np.uint64)[:, None] % 40, np.tile(np.float32([0, 1, 1]), 100)
    rows = [row for batch in batches(keys, labels) for row in validator.learn(batch)]
    assert [row.examples for row in rows] == [70, 140, 210, 280]
    last = validator.last_row()
    assert last is not None
    assert last.examples == 300
    assert validator.last_row() is None


def test_figures_of_a_row() -> None:
    """Compare them with the metrics of the same predictions in one array."""
    keys, labels = stream(1000)
    model = Memoriser()
    predictions = np.concatenate([model.learn(batch.keys, batch.labels) for batch in batches(keys, labels)])
    validator = ProgressiveValidator(Memoriser(), EveryN(300))
    rows: list[ProgressRow] = [row for batch in batches(keys, labels) for row in validator.learn(batch)]
    y, p = labels[:600], predictions[:600]
    assert rows[1].examples == 600
    assert rows[1].logloss == pytest.approx(logloss(y, p))
    assert rows[1].logloss_since_last == pytest.approx(logloss(y[300:], p[300:]))
    assert rows[1].normalized_entropy == pytest.approx(normalized_entropy(y, p))
    assert rows[1].auc == pytest.approx(auc(y, p), abs=2e-3)


def test_rate_is_of_this_process_since_the_last_row() -> None:
    now = [0.0]
    validator = ProgressiveValidator(Memoriser(), EveryN(50), clock=lambda: now[0])
    keys, labels = np.arange(200, dtype=np.uint64)[:, None], np.zeros(200, np.float32)
    rows = []
    for batch in batches(keys, labels):
        now[0] += 2.0
        rows += validator.learn(batch)
    assert [row.examples_per_second for row in rows] == [50.0] * 4
    resumed = ProgressiveValidator(Memoriser(), EveryN(50), state=validator.state(), clock=lambda: now[0])
    now[0] += 4.0
    assert resumed.learn(Batch(labels[:100], keys[:100]))[0].examples_per_second == 25.0


def test_a_pause_leaves_no_trace() -> None:
    keys, labels = stream(1000)
    unbroken, model = ProgressiveValidator(Memoriser(), EveryN(150)), Memoriser()
    expected = [row for batch in batches(keys, labels) for row in unbroken.learn(batch)]
    validator = ProgressiveValidator(model, EveryN(150))
    rows = []
    for number, batch in enumerate(batches(keys, labels)):
        rows += validator.learn(batch)
        if number in (0, 4, 7):
            state = json.loads(json.dumps(validator.state()))
            validator = ProgressiveValidator(model, EveryN(150), state=state)
    figures = [(r.examples, r.logloss_since_last, r.logloss, r.normalized_entropy, r.auc) for r in rows]
    assert figures == [(r.examples, r.logloss_since_last, r.logloss, r.normalized_entropy, r.auc) for r in expected]
    assert len(rows) == 6


def test_schedules() -> None:
    assert [PowersOfTwo().after(n) for n in (0, 1023, 1024, 1025, 2048)] == [1024, 1024, 2048, 2048, 4096]
    assert [EveryN(1).after(n) for n in (0, 1, 7)] == [1, 2, 8]
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        EveryN(0)


def test_read_ahead_keeps_order_and_raises_in_place() -> None:
    def items() -> Any:
        yield from range(5)
        raise OSError("the disk is gone")

    ahead = read_ahead(items())
    assert [next(ahead) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)


def test_read_ahead_does_work_at_leisure_when_it_is_ahead() -> None:
    taken: list[int] = []
    numbers = (taken.append(i) or i for i in range(1, 101))
    items = read_ahead(numbers, depth=8, at_leisure=lambda item: -item)
    assert next(items) == 1, "nothing was ready before it"
    deadline = time.monotonic() + 60.0
    while len(taken) < 9 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    held = list(itertools.islice(items, 8))
    assert all(item < 0 for item in held[4:7]), "put when four were ready"
    assert [abs(item) for item in held + list(items)] == list(range(2, 101))


def test_read_ahead_stays_within_its_depth_and_stops_when_closed() -> None:
    taken = []
    batches = read_ahead((taken.append(i) or i for i in range(1000)), depth=3)
    assert next(batches) == 0
    batches.close()
    assert len(taken) <= 6
