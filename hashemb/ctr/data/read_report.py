"""A reader's report on its input: the number of rows delivered and rejected, and the reasons."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["MAX_BAD_LINES_KEPT", "BadLine", "ReadReport"]

MAX_BAD_LINES_KEPT = 20


class BadLine(NamedTuple):
    """One rejected row; its text is ``path:line: reason``.

    `line` counts from 1. It is the line of a Criteo file, the record of a CSV file (the header is record 1; a
    quoted line break starts no new one) and the row of a Parquet file.
    """

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


@dataclass
class ReadReport:
    """Counts of the rows that a reader has delivered and rejected so far.

    Attributes
    ----------
    rows_good : int
        Rows delivered, plus the rows that ``start=`` skipped: ``open_reader(…, start=report.rows_good)`` resumes
        after the last row of this reader.
    rows_bad : int
        Rows rejected. Input is parsed ahead of delivery, so this may already count rows after the last delivered one.
    bad_lines : list of BadLine
        The first 20 rejected rows.
    """

    rows_good: int = 0
    rows_bad: int = 0
    bad_lines: list[BadLine] = field(default_factory=list)

    def reject(self, bad_line: BadLine, *, strict: bool = False) -> None:
        """Count `bad_line`, and keep it if there is room; with `strict` also raise its text as a ValueError."""
        self.rows_bad += 1
        if len(self.bad_lines) < MAX_BAD_LINES_KEPT:
            self.bad_lines.append(bad_line)
        if strict:
            raise ValueError(str(bad_line))
