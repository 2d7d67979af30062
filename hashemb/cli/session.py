"""Run training on a console: print the output before, during and after it, and handle stops."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING

from hashemb.cli.console import progress_bar, say
from hashemb.cli.stopping import StopRequest, stop_on_signals
from hashemb.ctr.training import Trainer, TrainStep

if TYPE_CHECKING:
    from rich.console import Console

    from hashemb.ctr.training import BadLines, ProgressRow

__all__ = ["run_training"]

_COLUMNS = ("examples", "since last", "logloss", "NE", "AUC", "examples/s")
_WIDTHS = (14, 12, 12, 10, 10, 13)
_PASSES_SHOWN = 2  # passes printed with all their rows; of later passes only the last row is printed


def run_training(trainer: Trainer, console: Console) -> int:
    """Train on the remaining examples, save, and print a summary.

    Returns
    -------
    int
        Exit status: 0, or 130 after Ctrl-C (143 after SIGTERM); the model has been saved in either case.
    """
    if trainer.finished:
        most = max(position.passes for position in trainer.sources.values())
        times = "once" if trainer.passes == 1 else f"{trainer.passes} times"
        say(console, f"Nothing to do: every file has been learned {times}. To learn them again: --passes {most + 1}")
        return 0
    _say_where_we_start(trainer, console)
    with stop_on_signals() as stop, closing(trainer.run()) as steps:
        try:
            _show(steps, trainer.bytes_total, stop, console)
        except (Exception, SystemExit):  # between batches: a bad line in strict mode, a full disk, a closed pipe
            steps.close()
            trainer.save()
            raise
        steps.close()  # closes the reader, whose report is part of the summary
        trainer.save()
    _say_summary(trainer, console)
    if stop:
        say(console, f"Stopped. {trainer.directory} is saved and complete; the same command goes on from here.")
    return stop.exit_code


def _show(steps: Iterable[TrainStep], bytes_total: int, stop: StopRequest, console: Console) -> None:
    """Run the steps and print their results, until they end or a stop is requested."""
    pass_number = 0
    last: ProgressRow | None = None
    with progress_bar(console, "training", bytes_total or None) as advance:
        for step in steps:
            if step.pass_number != pass_number:
                _say_last(last, console)
                last = None
                pass_number = step.pass_number
                _say_pass(pass_number, console)
            for row in step.rows:
                if pass_number > _PASSES_SHOWN:
                    last = row
                else:
                    say(console, format_row(row))
            advance(step.bytes_done, step.examples)
            if stop:
                break
    _say_last(last, console)


def _say_last(row: ProgressRow | None, console: Console) -> None:
    if row is not None:
        say(console, format_row(row))


def _say_where_we_start(trainer: Trainer, console: Console) -> None:
    table = trainer.model.table
    kind = trainer.card.description
    say(console, f"{trainer.directory}: {kind}, {table.num_embeddings:,} rows, {table.optimizer.kind}, lr {table.lr:g}")
    ahead = table.step - trainer.card.table_step
    if ahead:
        say(
            console,
            f"The table has {ahead:,} updates that its last save doesn't know of: a run was killed, or another "
            "program trained it. Examples since that save are learned again.",
        )
    if trainer.card.negative_rate < 1.0:
        by = trainer.card.negative_correction
        share = f"{trainer.card.negative_rate:.3g}"
        say(console, f"Learning {share} of the negatives, corrected by {by}; figures are estimates for all examples.")
    if trainer.label_delay:
        say(console, f"Labels are learned {trainer.label_delay:,.0f} examples after they are scored.")
    for path, position in trainer.sources.items():
        if position.rows:
            say(console, f"Resuming {path} at row {position.rows + 1:,}")


def _say_pass(number: int, console: Console) -> None:
    if number > _PASSES_SHOWN:
        if number == _PASSES_SHOWN + 1:
            say(console, "Later passes, the last row of each:")
        return
    if number > 1:
        say(console, f"Pass {number}: these examples have been learned before, so they are not unseen data.")
    say(console, row_header())


def _say_summary(trainer: Trainer, console: Console) -> None:
    if trainer.validator is not None:
        metrics = trainer.validator.metrics
        say(
            console,
            f"{metrics.weight:,.0f} examples, {metrics.positives:,.0f} positive. Best constant's logloss: "
            f"{metrics.best_constant_logloss:.6f}; the model's: {metrics.logloss:.6f}; "
            f"calibration {metrics.calibration:.4f}",
        )
    for line in bad_line_text(trainer.bad_lines):
        say(console, line)
    say(console, f"Model: {trainer.directory}")


# ---- the table of progressive validation, and bad lines ----


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


def bad_line_text(bad: BadLines) -> Iterator[str]:
    """Yield the report on the bad lines; nothing if there were none."""
    if not bad.count:
        return
    yield f"{bad.count:,} bad line{'s' if bad.count > 1 else ''} left out:"
    yield from (f"  {line}" for line in bad.first)
    if bad.count > len(bad.first):
        yield f"  … and {bad.count - len(bad.first):,} more"
