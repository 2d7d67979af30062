"""Label delay: examples are scored when shown and learned in order when their label is known; pauses leave no trace."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from hashemb.ctr.data import Batch
from hashemb.ctr.training import EveryN, NegativeSampling
from hashemb.ctr.training.progressive import ProgressiveValidator


class Diary:
    """A model that predicts how much it has learned, and records all calls."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int, int]] = []  # (what, first key, number of examples)
        self.learned = 0
        self.parts: list[set[str]] = []

    def predict_proba(self, keys: np.ndarray, **parts: Any) -> np.ndarray:
        self.events.append(("score", int(keys.flat[0]), len(keys)))
        return np.full(len(keys), 0.5 + self.learned * 1e-6, np.float32)

    def learn(self, keys: np.ndarray, labels: np.ndarray, **parts: Any) -> np.ndarray:
        before = self.predict_proba(keys)
        self.events[-1] = ("learn", int(keys.flat[0]), len(keys))
        self.learned += len(labels)
        self.parts.append(set(parts))
        return before


def stream(n: int, size: int) -> list[Batch]:
    """Make batches whose keys are the numbers of the examples."""
    rng = np.random.default_rng(0)
    labels, keys = (rng.random(n) < 0.4).astype(np.float32), np.arange(n, dtype=np.uint64)[:, None]
    return [Batch(labels[i : i + size], keys[i : i + size]) for i in range(0, n, size)]


def run(batches: list[Batch], **options: Any) -> tuple[Diary, ProgressiveValidator]:
    diary = Diary()
    validator = ProgressiveValidator(diary, EveryN(30), **options)
    for batch in batches:
        validator.learn(batch)
    return diary, validator


def test_no_delay_is_one_call_a_batch() -> None:
    diary, validator = run(stream(100, 20))
    assert [event[0] for event in diary.events] == ["learn"] * 5
    assert (validator.learned, validator.waiting) == (100, 0)
    same, _ = run(stream(100, 20), delay=0.0)
    assert same.events == diary.events


@pytest.mark.parametrize("size", [1, 7, 20])
@pytest.mark.parametrize("delay", [1, 20, 33, 1000])
def test_what_is_known_when(size: int, delay: int) -> None:
    """Before a batch is scored, exactly those batches have been learned whose last label is `delay` examples old."""
    diary, validator = run(stream(100, size), delay=delay)
    learned = 0
    for what, first, count in diary.events:
        if what == "learn":
            assert first == learned, "in order"
            learned += count
            continue
        assert learned <= max(0, first - delay + 1)
        assert learned + size > first - delay + 1 or learned == first, "nothing waits longer than it has to"
    assert validator.learned == learned
    assert validator.waiting == 100 - learned < delay + 2 * size
    validator.finish()
    assert (validator.learned, validator.waiting) == (100, 0)
    assert [event[1] for event in diary.events if event[0] == "learn"] == list(range(0, 100, size))


def test_a_delay_of_one_batch_is_none() -> None:
    """The labels of a batch are known when the next one begins: learning and scores are those without a delay."""
    diary, validator = run(stream(100, 20), delay=1)
    undelayed, expected = run(stream(100, 20))
    validator.finish()
    assert [event for event in diary.events if event[0] == "learn"] == undelayed.events
    assert validator.metrics.state_dict() == expected.metrics.state_dict()


def test_delay_in_units_of_time() -> None:
    """Impressions in a busy period are learned later in the stream than those in a quiet one."""
    seconds = np.concatenate([np.arange(50) * 0.1, 100 + np.arange(50) * 10.0])
    diary = Diary()
    validator = ProgressiveValidator(diary, delay=30.0)
    for batch, when in zip(stream(100, 10), np.split(seconds, 10), strict=True):
        validator.learn(batch, when)
    kinds = "".join(event[0][0] for event in diary.events)
    assert kinds == "sssss" + "llllls" + "s" + "ls" + "ls" + "ls"


@pytest.mark.parametrize("negatives", [None, NegativeSampling(0.3)], ids=["all", "sampled"])
@pytest.mark.parametrize("delay", [0, 25, 64])
@pytest.mark.parametrize("learned_again", [0, 3])
def test_a_pause_leaves_no_trace(delay: int, learned_again: int, negatives: NegativeSampling | None) -> None:
    """Training resumes with the batches that had not been learned, even if they are divided differently."""
    batches = stream(400, 16)
    options: dict[str, Any] = {"delay": delay, "negatives": negatives}
    unbroken, expected = run(batches, **options)
    expected.finish()
    for pause in (1, 4, 9, 20):
        diary, validator = run(batches[:pause], **options)
        rows = [row.examples for row in validator.curve]
        for _ in range(learned_again + 1):
            state = json.loads(json.dumps(validator.state()))
            done = validator.learned + getattr(validator, "done_before", 0)
            validator = ProgressiveValidator(diary, EveryN(30), state=state, **options)
            validator.done_before = done  # type: ignore[attr-defined]
            validator.learn(batches[done // 16])
        for batch in batches[done // 16 + 1 :]:
            validator.learn(batch)
        validator.finish()
        assert [e for e in diary.events if e[0] == "learn"] == [e for e in unbroken.events if e[0] == "learn"]
        assert validator.metrics.state_dict() == expected.metrics.state_dict()
        assert [row.examples for row in validator.curve] == [row.examples for row in expected.curve]
        assert [row.examples for row in validator.curve][: len(rows)] == rows


def test_resuming_with_smaller_batches_scores_nothing_twice() -> None:
    _, validator = run(stream(96, 16), delay=40)
    waiting, examples = validator.waiting, validator.metrics.examples
    assert (waiting, examples) == (64, 96)
    diary = Diary()
    resumed = ProgressiveValidator(diary, delay=40, state=validator.state())
    (rest,) = stream(132, 132)
    for first in range(32, 132, 20):
        resumed.learn(Batch(rest.labels[first : first + 20], rest.keys[first : first + 20]))
    scored = [event for event in diary.events if event[0] == "score"]
    assert scored == [("score", 92, 20), ("score", 112, 20)], "of the first of these, 4 have been scored"
    assert resumed.metrics.examples == 132


def test_every_part_of_a_batch_arrives() -> None:
    diary = Diary()
    labels, keys, offsets = np.float32([0, 1]), np.arange(3, dtype=np.uint64), np.array([0, 1, 3])
    ones, fields = np.ones(3, np.float32), np.zeros(3, np.int32)
    whole = Batch(labels, keys, offsets, ones, fields, np.float32([1, 2]))
    for batch in (whole, whole._replace(values=None, weights=None), Batch(labels, keys[:2, None])):
        for delay in (0, 1):
            validator = ProgressiveValidator(diary, delay=delay)
            validator.metrics.update([0, 1], [0.5, 0.5])
            diary.predict_proba = lambda keys, **parts: np.full(2, 0.5, np.float32)  # type: ignore[method-assign]
            diary.events.append(("", 0, 0))
            validator.learn(batch)
            validator.finish()
    assert diary.parts[::2] == [{"offsets", "values", "fields", "weights"}, {"offsets", "fields"}, set()]
    assert diary.parts[1::2] == diary.parts[::2]


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([1.0], r"times must have shape \(2,\), one per label, got \(1,\)"),
        ([6.0, 5.5], "times must be finite and not descend, got 5.5 at index 1 after 6.0"),
        ([4.0, 6.0], "times must be finite and not descend, got 4.0 at index 0 after 5.0"),
        ([6.0, np.nan], "times must be finite and not descend, got nan at index 1 after 6.0"),
    ],
)
def test_bad_times(times: list[float], message: str) -> None:
    diary = Diary()
    validator = ProgressiveValidator(diary, delay=0.1)
    first, second = stream(4, 2)
    validator.learn(first, [1.0, 5.0])
    events = list(diary.events)
    with pytest.raises(ValueError, match=message):
        validator.learn(second, times)
    assert diary.events == events


def test_bad_delay_and_no_labels() -> None:
    for delay in (-1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match=f"the label delay must be finite and at least 0, got {delay}"):
            ProgressiveValidator(Diary(), delay=delay)
    with pytest.raises(ValueError, match="a batch without labels can't be learned"):
        ProgressiveValidator(Diary()).learn(Batch(None, np.zeros((1, 1), np.uint64)))
