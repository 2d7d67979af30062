"""Progressive validation: every example is scored before it is learned.

The running loss is therefore measured on unseen data, in one pass and without a held-out set: it is the loss that a
model serving live traffic would have had (Blum, Kalai, Langford: Beating the Hold-Out, COLT 1999; the "average loss" of
Vowpal Wabbit). This no longer holds when an example is seen again, so each pass over the data has its own validator.

In production a label arrives later than its impression, and the next impressions are scored by a model that has not
learned it yet. With a *label delay* an example is scored when it arrives and learned when its label is known (River's
``delay``).
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from hashemb.ctr._json_values import as_object, as_whole
from hashemb.ctr.metrics import StreamingMetrics
from hashemb.ctr.training.learning_curve import LearningCurve, ProgressRow
from hashemb.ctr.training.negatives import NegativeSampling

if TYPE_CHECKING:
    from hashemb.ctr.data import Batch

__all__ = ["EveryN", "Learner", "PowersOfTwo", "ProgressRow", "ProgressiveValidator", "Schedule", "check_progress"]


class Learner(Protocol):
    """Protocol of a model that learns in batches and returns its predictions from before each update.

    Both methods take the batch's ``offsets``, ``values`` and ``fields`` by name; `learn` also takes its ``weights`` and
    ``numbering``. Arrays that a batch does not have are not passed.
    """

    def learn(
        self,
        keys: npt.NDArray[Any],
        labels: npt.NDArray[np.float32],
        *,
        offsets: npt.NDArray[np.int64] | None = None,
        values: npt.NDArray[np.float32] | None = None,
        fields: npt.NDArray[np.int32] | None = None,
        weights: npt.NDArray[np.float32] | None = None,
        numbering: tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32]] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Learn a batch and return the probabilities from before the update, shape (n,)."""

    def predict_proba(
        self,
        keys: npt.NDArray[Any],
        *,
        offsets: npt.NDArray[np.int64] | None = None,
        values: npt.NDArray[np.float32] | None = None,
        fields: npt.NDArray[np.int32] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Return probabilities, shape (n,); called only if labels are delayed."""


class Schedule(Protocol):
    """Protocol of a schedule, which determines when rows of the progressive validation table are due."""

    def after(self, examples: int) -> int:
        """Return the number of examples, greater than `examples`, at which the next row is due."""


@dataclass(frozen=True)
class PowersOfTwo:
    """Schedule a row at 1,024, 2,048, 4,096 … examples, so that the table stays short for any amount of data."""

    first: int = 1024

    def after(self, examples: int) -> int:
        """Return the next power of two.

        >>> PowersOfTwo().after(0), PowersOfTwo().after(1024), PowersOfTwo().after(5000)
        (1024, 2048, 8192)
        """
        return max(self.first, 1 << examples.bit_length())


@dataclass(frozen=True)
class EveryN:
    """Schedule a row every `n` examples, n >= 1."""

    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"EveryN: n must be at least 1, got {self.n}")

    def after(self, examples: int) -> int:
        """Return the next multiple of `n`.

        >>> EveryN(1000).after(0), EveryN(1000).after(1000), EveryN(1000).after(1500)
        (1000, 2000, 2000)
        """
        return (examples // self.n + 1) * self.n


class _Waiting(NamedTuple):
    """A batch that has been scored and whose labels are not known yet."""

    batch: Batch  # the examples to be learned
    examples: int  # the size of the batch before negatives were dropped
    last_time: float


class _State(NamedTuple):
    """The parsed result of `ProgressiveValidator.state`."""

    metrics: StreamingMetrics
    at_last_row: StreamingMetrics
    curve: LearningCurve
    examples: int
    waiting: int


def _parse_state(values: Any) -> _State:
    """Parse a state; raise a ValueError if it is invalid or a validator could not resume from it."""
    state = as_object(values, "progress")
    metrics = StreamingMetrics.from_state_dict(as_object(state.get("metrics"), "metrics"))
    at_last_row = StreamingMetrics.from_state_dict(as_object(state.get("at_last_row"), "at_last_row"))
    _ = metrics - at_last_row
    curve = LearningCurve.from_json(state.get("rows", []))
    learned = max((row.examples for row in curve), default=0)
    if learned > metrics.examples:
        raise ValueError(f"the last row is at {learned:,} examples, but the metrics cover {metrics.examples:,}")
    examples = as_whole(state.get("examples", metrics.examples), "examples")
    return _State(metrics, at_last_row, curve, examples, as_whole(state.get("waiting", 0), "waiting", 0, examples))


def check_progress(values: Any) -> None:
    """Raise a ValueError if the progress recorded in a model's card cannot have been written by a trainer."""
    progress = as_object(values, "progress")
    if progress:
        as_whole(progress.get("pass"), "pass", 1)
        _parse_state(progress)
        LearningCurve.from_json(progress.get("first_pass_rows", []))


class ProgressiveValidator:
    """Trains a model on batches and tracks the metrics of its predictions from before each update.

    Rows fall due at exact counts of examples, wherever batches begin and end: all predictions of a batch are made
    before its single update, so the metrics are valid between any two of them.

    Parameters
    ----------
    model : Learner
        The model to train.
    schedule : Schedule
        Schedule of the rows. Default: `PowersOfTwo`.
    delay : float
        Time between an impression and its label, at least 0: in examples, or in the unit of the times that are passed
        to `learn`. A batch is learned, in one update, when a later batch begins and the label of its last example is
        known by then. With delay 0 each batch is learned at once; any delay that ends before the next batch has the
        same effect.
    negatives : NegativeSampling, optional
        Learn and score only the examples that it keeps. Metrics are estimates for all examples: probabilities are
        corrected, and a kept negative weighs 1 / rate.
    state : dict, optional
        The result of `state` of an earlier validator. The table continues as if there had been no pause, provided that
        this validator is given the batches that had not been learned by then and those that follow.
    clock : callable
        Clock in seconds, used to compute examples/s.

    Attributes
    ----------
    metrics : StreamingMetrics
        Metrics of all examples scored so far.
    curve : LearningCurve
        The rows so far.
    learned : int
        Examples that this validator has finished: they were learned, or dropped by `negatives`.
    waiting : int
        Examples that have arrived and whose labels are not known yet; their batches are held in memory. If `delay` is
        in examples, these are fewer than `delay` plus two batches.
    """

    def __init__(
        self,
        model: Learner,
        schedule: Schedule | None = None,
        *,
        delay: float = 0.0,
        negatives: NegativeSampling | None = None,
        state: dict[str, Any] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not 0.0 <= delay < math.inf:
            raise ValueError(f"the label delay must be finite and at least 0, got {delay}")
        self.model, self.delay, self.negatives = model, delay, negatives
        self.schedule: Schedule = PowersOfTwo() if schedule is None else schedule
        self.metrics, self._at_last_row, self.curve = StreamingMetrics(), StreamingMetrics(), LearningCurve()
        self.learned, self._next_example, self._scored_before = 0, 0, 0
        if state is not None:
            self._restore(state)
        self._queue: deque[_Waiting] = deque()
        self._last_time = -math.inf
        self._clock = clock
        self._mark = (clock(), self.metrics.examples)

    def _restore(self, state: dict[str, Any]) -> None:
        found = _parse_state(state)
        self.metrics, self._at_last_row, self.curve = found.metrics, found.at_last_row, found.curve
        self._scored_before = found.waiting
        self._next_example = found.examples - found.waiting

    @property
    def waiting(self) -> int:
        """Number of examples that have been scored but not learned."""
        return sum(entry.examples for entry in self._queue)

    def learn(self, batch: Batch, times: npt.ArrayLike | None = None) -> list[ProgressRow]:
        """Learn the batches whose labels are known by now, score this batch, and return the rows that fell due in it.

        Parameters
        ----------
        batch : Batch
            Batch with labels, 0 or 1.
        times : array_like of float, shape (n,), optional
            Times at which the impressions were shown; they must not descend within a batch or from batch to batch.
            Default: the examples' numbers.

        Raises
        ------
        ValueError
            The batch has no labels, or `times` has the wrong shape, is not finite or descends. Nothing has been
            learned.
        """
        if batch.labels is None:
            raise ValueError("a batch without labels can't be learned")
        count = len(batch.labels)
        first_time, last_time = self._span(times, count)
        self._learn_known(first_time)
        kept = batch if self.negatives is None else self.negatives.select(batch, self._next_example)
        self._next_example += count
        scored_before = min(self._scored_before, count)
        self._scored_before -= scored_before
        if self.delay == 0.0:
            probabilities = self._learn(kept)
            self.learned += count
        else:
            self._queue.append(_Waiting(kept, count, last_time))
            if scored_before == count:
                return []
            probabilities = self.model.predict_proba(kept.keys, **kept.features())
        return self._score(kept, probabilities, self._already(batch, scored_before))

    @property
    def examples(self) -> int:
        """Number of examples that have arrived in this pass and need not be read again, kept or not."""
        return self._next_example

    def finish(self) -> None:
        """Learn the waiting examples: there are no more impressions, but their labels do arrive."""
        self._learn_known(math.inf)

    def last_row(self) -> ProgressRow | None:
        """Return the row that closes the table; None if the last row already includes the last example."""
        if self.metrics.examples == self._at_last_row.examples:
            return None
        return self._row(self._rate(0))

    def state(self) -> dict[str, Any]:
        """Return all that a later validator needs to resume from here, as JSON-serializable values."""
        return {
            "metrics": self.metrics.state_dict(),
            "at_last_row": self._at_last_row.state_dict(),
            "rows": self.curve.to_json(),
            "examples": self._next_example + self._scored_before,
            "waiting": self.waiting + self._scored_before,
        }

    def _span(self, times: npt.ArrayLike | None, count: int) -> tuple[float, float]:
        """Return the times at which the batch's first and last impressions were shown."""
        if times is None:
            first = float(self._next_example)
            return (first, first + count - 1.0) if count else (-math.inf, self._last_time)
        when = self._checked_times(times, count)
        return (float(when[0]), float(when[-1])) if count else (-math.inf, self._last_time)

    def _checked_times(self, times: npt.ArrayLike, count: int) -> npt.NDArray[np.float64]:
        when = np.asarray(times, np.float64)
        if when.shape != (count,):
            raise ValueError(f"times must have shape ({count},), one per label, got {when.shape}")
        ordered = np.isfinite(when) & (when >= np.concatenate(([self._last_time], when[:-1]))[:count])
        if not ordered.all():
            first = int(np.argmin(ordered))
            before = when[first - 1] if first else self._last_time
            raise ValueError(f"times must be finite and not descend, got {when[first]} at index {first} after {before}")
        if count:
            self._last_time = float(when[-1])
        return when

    def _learn_known(self, now: float) -> None:
        while self._queue and self._queue[0].last_time + self.delay <= now:
            entry = self._queue.popleft()
            self._learn(entry.batch)
            self.learned += entry.examples

    def _learn(self, batch: Batch) -> npt.NDArray[np.float32]:
        if self.negatives is not None and self.negatives.correction == "weights":
            batch = batch._replace(weights=self.negatives.importance(batch))
        assert batch.labels is not None
        importance: dict[str, Any] = {} if batch.weights is None else {"weights": batch.weights}
        if batch.numbering is not None:
            importance["numbering"] = batch.numbering
        return self.model.learn(batch.keys, batch.labels, **batch.features(), **importance)

    def _already(self, batch: Batch, examples: int) -> int:
        """Count how many of the batch's first `examples` examples are kept."""
        if self.negatives is None or not examples:
            return examples
        assert batch.labels is not None
        start = self._next_example - len(batch.labels)
        return int(self.negatives.keep(batch.labels[:examples], start).sum())

    def _score(self, batch: Batch, probabilities: npt.NDArray[np.float32], start: int) -> list[ProgressRow]:
        """Add the predictions from `start` on to the metrics."""
        labels, weights = batch.labels, batch.weights
        assert labels is not None
        if self.negatives is not None:
            probabilities, weights = self.negatives.corrected(probabilities), self.negatives.importance(batch)
        rate = self._rate(len(labels) - start)
        rows: list[ProgressRow] = []
        while start < len(labels):
            due = start + self.schedule.after(self.metrics.examples) - self.metrics.examples
            part = slice(start, min(due, len(labels)))
            self.metrics.update(labels[part], probabilities[part], None if weights is None else weights[part])
            if part.stop == due:
                rows.append(self._row(rate))
            start = part.stop
        if rows:
            self._mark = (self._clock(), self.metrics.examples)
        return rows

    def _rate(self, pending: int) -> float:
        seconds, examples = self._mark
        elapsed = self._clock() - seconds
        learned = self.metrics.examples + pending - examples
        return learned / elapsed if learned and elapsed > 0.0 else math.nan

    def _row(self, rate: float) -> ProgressRow:
        recent = self.metrics - self._at_last_row
        self._at_last_row = self.metrics.copy()
        row = ProgressRow(
            examples=self.metrics.examples,
            logloss_since_last=recent.logloss,
            logloss=self.metrics.logloss,
            normalized_entropy=self.metrics.normalized_entropy,
            auc=self.metrics.auc,
            examples_per_second=rate,
        )
        self.curve.add(row)
        return row
