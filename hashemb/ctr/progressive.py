"""Progressive validation: every example is scored before it is learned.

The running loss is then that of unseen data, without a held-out set and in one pass: the number that a model
serving live traffic would have had (Blum, Kalai, Langford: Beating the Hold-Out, COLT 1999; the "average loss" of
Vowpal Wabbit). It stops being so when an example comes round again; hence one validator per pass over the data.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hashemb.ctr.batches import Batch
from hashemb.ctr.metrics import StreamingMetrics

__all__ = ["EveryN", "Learner", "PowersOfTwo", "ProgressRow", "ProgressiveValidator", "Schedule"]


class Learner(Protocol):
    """A model that learns in batches and answers what it believed before it saw the labels."""

    def learn(self, keys: npt.NDArray[Any], labels: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Probabilities before the update, shape (n,)."""


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


@dataclass(frozen=True)
class ProgressRow:
    """One row of the progressive table. Loss figures are of predictions made before learning.

    Attributes
    ----------
    examples : int
        Examples scored and learned so far in this pass.
    logloss_since_last, logloss : float
        Mean logistic loss (nats) since the row before, and since the pass began.
    normalized_entropy, auc : float
        Since the pass began.
    examples_per_second : float
        Since the row before, in this process; NaN for a row made when nothing was learned yet.
    """

    examples: int
    logloss_since_last: float
    logloss: float
    normalized_entropy: float
    auc: float
    examples_per_second: float


class ProgressiveValidator:
    """Feeds batches to a model and keeps the metrics of what it predicted before learning them.

    Rows fall due at exact counts of examples, wherever batches begin and end: all predictions of a batch come
    before its one update, so the metrics may be read between any two of them.

    Parameters
    ----------
    model : Learner
    schedule : Schedule
    state : dict, optional
        What `state` of an earlier validator returned; the table goes on as if there had been no pause.
    clock : callable
        Seconds, for examples/s.
    """

    def __init__(
        self,
        model: Learner,
        schedule: Schedule | None = None,
        *,
        state: dict[str, Any] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model = model
        self.schedule: Schedule = PowersOfTwo() if schedule is None else schedule
        self.metrics = StreamingMetrics() if state is None else StreamingMetrics.from_state_dict(state["metrics"])
        self._at_last_row = (
            StreamingMetrics() if state is None else StreamingMetrics.from_state_dict(state["at_last_row"])
        )
        self._clock = clock
        self._mark = (clock(), self.metrics.examples)

    def learn(self, batch: Batch) -> list[ProgressRow]:
        """Score a batch, learn it, and return the rows that fell due within it."""
        labels = batch.labels
        if labels is None:
            raise ValueError("a batch without labels can't be learned")
        parts = batch.features() if batch.weights is None else {**batch.features(), "weights": batch.weights}
        probabilities = self.model.learn(batch.keys, labels, **parts)
        rate = self._rate(len(labels))
        rows: list[ProgressRow] = []
        start = 0
        while start < len(labels):
            due = start + self.schedule.after(self.metrics.examples) - self.metrics.examples
            stop = min(due, len(labels))
            self.metrics.update(labels[start:stop], probabilities[start:stop])
            if stop == due:
                rows.append(self._row(rate))
            start = stop
        if rows:
            self._mark = (self._clock(), self.metrics.examples)
        return rows

    def last_row(self) -> ProgressRow | None:
        """The row that closes the table; None where the last one already stands at the last example."""
        if self.metrics.examples == self._at_last_row.examples:
            return None
        return self._row(self._rate(0))

    def state(self) -> dict[str, Any]:
        """All that a later validator needs to go on from here, as JSON-able values."""
        return {"metrics": self.metrics.state_dict(), "at_last_row": self._at_last_row.state_dict()}

    def _rate(self, pending: int) -> float:
        seconds, examples = self._mark
        elapsed = self._clock() - seconds
        learned = self.metrics.examples + pending - examples
        return learned / elapsed if learned and elapsed > 0.0 else float("nan")

    def _row(self, rate: float) -> ProgressRow:
        recent = self.metrics - self._at_last_row
        self._at_last_row = self.metrics.copy()
        return ProgressRow(
            examples=self.metrics.examples,
            logloss_since_last=recent.logloss,
            logloss=self.metrics.logloss,
            normalized_entropy=self.metrics.normalized_entropy,
            auc=self.metrics.auc,
            examples_per_second=rate,
        )
