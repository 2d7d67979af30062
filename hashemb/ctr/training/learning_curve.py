"""The stored progressive validation table, whose rows are merged when there are too many."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from hashemb._text import shown
from hashemb.ctr._json_values import as_list, as_number, as_object, as_whole

__all__ = ["MAX_ROWS", "LearningCurve", "ProgressRow"]

MAX_ROWS = 256


@dataclass(frozen=True)
class ProgressRow:
    """One row of the progressive validation table. The metrics are those of predictions made before learning.

    Attributes
    ----------
    examples : int
        Examples scored and learned so far in this pass.
    logloss_since_last, logloss : float
        Mean logistic loss (nats) since the previous row, and since the pass began.
    normalized_entropy, auc : float
        Metrics since the pass began.
    examples_per_second : float
        Speed since the previous row, in this process; NaN if nothing had been learned yet.
    """

    examples: int
    logloss_since_last: float
    logloss: float
    normalized_entropy: float
    auc: float
    examples_per_second: float


class LearningCurve:
    """Rows of one pass, at most `MAX_ROWS`: when there are more, every two adjacent rows are merged.

    Values "since the previous row" are then averaged over both, so that only resolution is lost.

    Examples
    --------
    >>> curve = LearningCurve([ProgressRow(n, 0.5, 0.5, 0.9, 0.7, 100.0) for n in range(10, 10 * MAX_ROWS + 20, 10)])
    >>> rows = list(curve)
    >>> len(rows), [row.examples for row in rows[:2]], rows[-1].examples
    (129, [20, 40], 2570)
    """

    def __init__(self, rows: Iterable[ProgressRow] = ()) -> None:
        self._rows: list[ProgressRow] = []
        for row in rows:
            self.add(row)

    def __iter__(self) -> Iterator[ProgressRow]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: ProgressRow) -> None:
        """Append a row, which must have more examples than the previous ones."""
        self._rows.append(row)
        if len(self._rows) > MAX_ROWS:
            starts = [0, *(previous.examples for previous in self._rows[:-1])]
            pairs = range(0, len(self._rows) - 1, 2)
            merged = [_merged(starts[i], self._rows[i], self._rows[i + 1]) for i in pairs]
            self._rows = merged + self._rows[2 * len(merged) :]

    def to_json(self) -> list[dict[str, Any]]:
        """Return the rows as JSON values: NaN becomes null, and the speed, which depends on the run, is left out."""
        rows = [replace(row, examples_per_second=math.nan) for row in self._rows]
        return [{name: None if value != value else value for name, value in asdict(row).items()} for row in rows]

    @classmethod
    def from_json(cls, rows: Any) -> LearningCurve:
        """Parse the result of `to_json`; raise a ValueError for anything else."""
        curve, examples = cls(), 0
        for row in map(_parse_row, as_list(rows, "rows")):
            if row.examples <= examples:
                raise ValueError(f"rows must have more and more examples, found {row.examples:,} after {examples:,}")
            curve.add(row)
            examples = row.examples
        return curve


def _parse_row(values: Any) -> ProgressRow:
    row = as_object(values, "a row")
    names = [f.name for f in fields(ProgressRow)]
    if sorted(row) != sorted(names):
        raise ValueError(f"a row must have {', '.join(names)}, found {shown(list(row))}")
    examples = as_whole(row["examples"], "examples of a row", 1)
    figures = {name: math.nan if row[name] is None else as_number(row[name], name, 0.0) for name in names[1:]}
    return ProgressRow(examples, **figures | {"examples_per_second": figures["examples_per_second"] or math.nan})


def _merged(start: int, a: ProgressRow, b: ProgressRow) -> ProgressRow:
    first, second = a.examples - start, b.examples - a.examples
    loss = (first * a.logloss_since_last + second * b.logloss_since_last) / (first + second)
    seconds = first / a.examples_per_second + second / b.examples_per_second
    return ProgressRow(b.examples, loss, b.logloss, b.normalized_entropy, b.auc, (first + second) / seconds)
