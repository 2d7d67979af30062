"""Output of the command line: the progressive validation table, the progress bar, and numbers in readable units.

Rows are plain text on a terminal and in a pipe; bars are drawn only on a terminal. Every line is escaped by
`printable`, here or in `print_line`, because the names of columns, files and fields come from untrusted files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hashemb.ctr._extras import require
from hashemb.ctr._printable import printable
from hashemb.ctr.progressive import ProgressRow
from hashemb.ctr.trainer import BadLines

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["bad_line_text", "confirm", "format_bytes", "format_row", "progress_bar", "row_header", "say"]

_COLUMNS = ("examples", "since last", "logloss", "NE", "AUC", "examples/s")
_WIDTHS = (14, 12, 12, 10, 10, 13)


def say(console: Console, text: str = "") -> None:
    """Print one line, escaped by `printable` but without markup, highlighting or wrapping."""
    console.print(printable(text, console.encoding), markup=False, emoji=False, highlight=False, soft_wrap=True)


def confirm(question: str) -> None:
    """Ask the question; end the command unless the answer is yes."""
    require("typer").confirm(printable(question), abort=True)


def row_header() -> str:
    """Return the heading of the progressive validation table: "since last" is the log loss since the previous row."""
    return "".join(f"{name:>{width}}" for name, width in zip(_COLUMNS, _WIDTHS, strict=True))


def format_row(row: ProgressRow) -> str:
    """Format one row of the progressive validation table, aligned with `row_header`."""
    rate = "-" if row.examples_per_second != row.examples_per_second else f"{row.examples_per_second:,.0f}"
    cells = (
        f"{row.examples:,}",
        f"{row.logloss_since_last:.6f}",
        f"{row.logloss:.6f}",
        f"{row.normalized_entropy:.4f}",
        f"{row.auc:.4f}",
        rate,
    )
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))


def format_bytes(count: float) -> str:
    """Format a number of bytes with a binary unit.

    >>> format_bytes(0), format_bytes(1536), format_bytes(2**39)
    ('0 B', '1.5 KiB', '512.0 GiB')
    """
    if count < 1024:
        return f"{count:.0f} B"
    units = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    power = min(int(math.log2(count)) // 10, len(units))
    return f"{count / 1024**power:.1f} {units[power - 1]}"


def bad_line_text(bad: BadLines) -> Iterator[str]:
    """Yield the report on the bad lines; nothing if there were none."""
    if not bad.count:
        return
    yield f"{bad.count:,} bad line{'s' if bad.count > 1 else ''} left out:"
    yield from (f"  {line}" for line in bad.first)
    if bad.count > len(bad.first):
        yield f"  … and {bad.count - len(bad.first):,} more"


@contextmanager
def progress_bar(
    console: Console, label: str, total: int | None, *, unit_name: str = "examples"
) -> Iterator[Callable[[int, int], None]]:
    """Show a bar with rate and remaining time below the printed lines; off a terminal, show nothing.

    Yields
    ------
    advance : callable
        ``advance(done, count)`` reports that `done` of `total` is done, in `count` units so far.
    """
    if not console.is_terminal:
        yield lambda done, count: None
        return
    rich = require("rich.progress")
    columns = (
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(),
        rich.TaskProgressColumn(),
        rich.TextColumn("{task.fields[rate]}", markup=False),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(printable(label, console.encoding), total=total, rate="")

        def advance(done: int, count: int) -> None:
            elapsed = bar.tasks[task].elapsed
            rate = f"{count / elapsed:,.0f} {unit_name}/s" if elapsed else ""
            bar.update(task, completed=done, rate=rate)

        yield advance

