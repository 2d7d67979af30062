"""Lines, questions and progress bars on a terminal.

Lines are the same on a terminal and in a pipe; bars are drawn only on a terminal. All text is escaped by `printable`,
because the names of columns, files and fields come from untrusted files.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hashemb._packages import require
from hashemb._text import printable

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["confirm", "counting", "print_line", "progress_bar", "say"]


def print_line(text: str, *, stderr: bool = False) -> None:
    """Print one line, escaped by `printable`, and flush it."""
    file = sys.stderr if stderr else sys.stdout
    print(printable(text, getattr(file, "encoding", None) or "utf-8"), file=file, flush=True)


def say(console: Console, text: str = "") -> None:
    """Print one line, escaped by `printable` but without markup, highlighting or wrapping."""
    console.print(printable(text, console.encoding), markup=False, emoji=False, highlight=False, soft_wrap=True)


def confirm(question: str) -> bool:
    """Ask a question; return whether the answer is yes."""
    try:
        answer = input(f"{printable(question)} [y/N]: ")
    except EOFError:
        return False
    return answer.strip().lower() in ("y", "yes")


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


@contextmanager
def counting(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show the progress over blocks, whose total number is known only at the first update.

    Without rich, the bar is a percentage.

    Yields
    ------
    advance : callable
        ``advance(done, total)``: `done` of `total` blocks are done.
    """
    if importlib.util.find_spec("rich") is not None:
        console = require("rich.console").Console(stderr=True)
        with progress_bar(console, label, 1000, unit_name="blocks") as advance:
            yield lambda done, total: advance(done * 1000 // max(total, 1), done)
    elif sys.stderr.isatty():
        yield lambda done, total: _overwrite(f"{label} {done / max(total, 1):.0%}")
        _overwrite("")
    else:
        yield lambda done, total: None


def _overwrite(text: str) -> None:
    """Replace the last line on a terminal."""
    sys.stderr.write(f"\r\x1b[K{printable(text)}")
    sys.stderr.flush()
