"""Progressive validation: every example is scored before it is learned.

The running loss is then that of unseen data, without a held-out set and in one pass: the number that a model
serving live traffic would have had (Blum, Kalai, Langford: Beating the Hold-Out, COLT 1999; the "average loss" of
Vowpal Wabbit). It stops being so when an example comes round again; hence one validator per pass over the data.

In life a label comes later than its impression: a model that is asked about the next one has not learned it yet. With
a *label delay* an example is scored when it comes, and learned when its label is known (River's ``delay``).
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
from hashemb.ctr.learning_curve import LearningCurve, ProgressRow
from hashemb.ctr.metrics import StreamingMetrics
from hashemb.ctr.negatives import NegativeSampling

if TYPE_CHECKING:
    from hashemb.ctr.batches import Batch

__all__ = ["EveryN", "Learner", "PowersOfTwo", "ProgressRow", "ProgressiveValidator", "Schedule", "check_progress"]


class Learner(Protocol):
    """A model that learns in batches and answers what it believed before it saw the labels.

    Both methods take the batch's ``offsets``, ``values`` and ``fields`` by name, `learn` its ``weights`` and
    ``numbering`` too; what a batch does not have is not passed.
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
        """Probabilities before the update, shape (n,)."""

    def predict_proba(
        self,
        keys: npt.NDArray[Any],
        *,
        offsets: npt.NDArray[np.int64] | None = None,
        values: npt.NDArray[np.float32] | None = None,
        fields: npt.NDArray[np.int32] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Probabilities, shape (n,); asked for only where labels are delayed."""


class Schedule(Protocol):
    """When a row of the progressive table is due."""

    def after(self, examples: int) -> int:
        """Count of examples, greater than `examples`, at which the next row is due."""


@dataclass(frozen=True)
class PowersOfTwo:
    """A row at 1,024, 2,048, 4,096 … examples: as many rows for any size of data."""

    first: int = 1024

    def after(self, examples: int) -> int:
        """The next power of two.

        >>> PowersOfTwo().after(0), PowersOfTwo().after(1024), PowersOfTwo().after(5000)
        (1024, 2048, 8192)
        """
        return max(self.first, 1 << examples.bit_length())


@dataclass(frozen=True)
class EveryN:
    """A row every `n` examples, n >= 1."""

    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"EveryN: n must be at least 1, got {self.n}")

    def after(self, examples: int) -> int:
        """The next multiple of `n`.

        >>> EveryN(1000).after(0), EveryN(1000).after(1000), EveryN(1000).after(1500)
        (1000, 2000, 2000)
        """
        return (examples // self.n + 1) * self.n


class _Waiting(NamedTuple):
    """A batch that has been scored and whose labels are not known yet."""

    batch: Batch  # what is learned of it
    examples: int  # that it came with
    last_time: float


class _State(NamedTuple):
    """What `ProgressiveValidator.state` has put into words."""

    metrics: StreamingMetrics
    at_last_row: StreamingMetrics
    curve: LearningCurve
    examples: int
    waiting: int


def _parse_state(values: Any) -> _State:
    """`ValueError` for what is no state, or one that a validator could not go on from."""
    state = as_object(values, "progress")
    metrics = StreamingMetrics.from_state_dict(as_object(state.get("metrics"), "metrics"))
    at_last_row = StreamingMetrics.from_state_dict(as_object(state.get("at_last_row"), "at_last_row"))
    _ = metrics - at_last_row
    curve = LearningCurve.from_json(state.get("rows", []))
    learned = max((row.examples for row in curve), default=0)
    if learned > metrics.examples:
        raise ValueError(f"the last of rows stands at {learned:,} examples, the metrics are of {metrics.examples:,}")
    examples = as_whole(state.get("examples", metrics.examples), "examples")
    return _State(metrics, at_last_row, curve, examples, as_whole(state.get("waiting", 0), "waiting", 0, examples))


def check_progress(values: Any) -> None:
    """Raise a ValueError where what a model's card says of its learning is not what a trainer has written there."""
    progress = as_object(values, "progress")
    if progress:
        as_whole(progress.get("pass"), "pass", 1)
        _parse_state(progress)
        LearningCurve.from_json(progress.get("first_pass_rows", []))


class ProgressiveValidator:
    """Feeds batches to a model and keeps the metrics of what it predicted before learning them.

    Rows fall due at exact counts of examples, wherever batches begin and end: all predictions of a batch come
    before its one update, so the metrics may be read between any two of them.

    Parameters
    ----------
    model : Learner
    schedule : Schedule
    delay : float
        How long after its impression a label is known, at least 0: in examples, or in the unit of the times that
        `learn` is given. A batch is learned, in one update, once the label of its last example is known when the
        next batch begins. With 0 (as with any delay that ends before the next batch) that is at once.
    negatives : NegativeSampling, optional
        Learn and score only the examples that it keeps. Metrics are estimates for all examples: probabilities are
        corrected, and a kept negative weighs 1 / rate.
    state : dict, optional
        What `state` of an earlier validator returned; the table goes on as if there had been no pause, if it is
        given the batches that had not been learned then, and those that follow.
    clock : callable
        Seconds, for examples/s.

    Attributes
    ----------
    metrics : StreamingMetrics
        Of all examples scored so far.
    curve : LearningCurve
        The rows so far.
    learned : int
        Examples done with in this process: learned, or left out.
    waiting : int
        Examples that have come and whose labels are not known yet; their batches are held in memory. Less than
        `delay` and two batches, where it is in examples.
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
        """Examples scored and not learned."""
        return sum(entry.examples for entry in self._queue)

    def learn(self, batch: Batch, times: npt.ArrayLike | None = None) -> list[ProgressRow]:
        """Learn what is known by now, score a batch, and return the rows that fell due within it.

        Parameters
        ----------
        batch : Batch
            With labels, 0 or 1.
        times : array_like of float, shape (n,), optional
            When the impressions were shown, not descending, neither here nor from batch to batch. Default: the
            examples' numbers.

        Raises
        ------
        ValueError
            The batch has no labels; times are of another shape, not finite or descend. Nothing has been learned.
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
        """Examples that have come in this pass and need not come again, kept or not."""
        return self._next_example

    def finish(self) -> None:
        """Learn what is waiting: no more impressions come, but their labels do."""
        self._learn_known(math.inf)

    def last_row(self) -> ProgressRow | None:
        """The row that closes the table; None where the last one already stands at the last example."""
        if self.metrics.examples == self._at_last_row.examples:
            return None
        return self._row(self._rate(0))

    def state(self) -> dict[str, Any]:
        """All that a later validator needs to go on from here, as JSON-able values."""
        return {
            "metrics": self.metrics.state_dict(),
            "at_last_row": self._at_last_row.state_dict(),
            "rows": self.curve.to_json(),
            "examples": self._next_example + self._scored_before,
            "waiting": self.waiting + self._scored_before,
        }

    def _span(self, times: npt.ArrayLike | None, count: int) -> tuple[float, float]:
        """When the batch's first and last impressions were shown."""
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
        """How many of the kept examples are among the batch's first so many."""
        if self.negatives is None or not examples:
            return examples
        assert batch.labels is not None
        start = self._next_example - len(batch.labels)
        return int(self.negatives.keep(batch.labels[:examples], start).sum())

    def _score(self, batch: Batch, probabilities: npt.NDArray[np.float32], start: int) -> list[ProgressRow]:
        """Take the predictions from `start` on into the metrics."""
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
