"""The commands of `hashemb`: parse options, call the other modules of this package, and print the results."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import hashemb
from hashemb._packages import require
from hashemb.cli.arguments import (
    COUNT,
    BatchSize,
    Categorical,
    DataFormat,
    Deltas,
    Dtype,
    Files,
    InitialAccumulator,
    InitScale,
    Label,
    LabelDelay,
    LearningRate,
    ModelName,
    NegativeCorrection,
    NegativeRate,
    NewTable,
    Numeric,
    NumFields,
    NumHashes,
    OptimizerName,
    Passes,
    Positive,
    Progress,
    Rank,
    Rows,
    SaveEvery,
    Seed,
    Snapshots,
    Strict,
    Table,
    WeightDecay,
    column_names,
)
from hashemb.cli.console import print_line, progress_bar, say
from hashemb.cli.demo import run_demo
from hashemb.cli.session import run_training
from hashemb.ctr._replacing import replacing
from hashemb.ctr.training import (
    Columns,
    ModelOptions,
    TrainOptions,
    TrainPlan,
    load_model,
    open_for_scoring,
    score,
    write_probabilities,
)

if TYPE_CHECKING:
    import typer
    from rich.console import Console

    from hashemb.ctr.models import HashedModel
else:
    typer = require("typer")

__all__ = ["app", "typer"]

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    help="Click-through-rate models whose embedding table is a directory of memory-mapped files.",
)


@app.command()
def train(
    files: Files,
    table: NewTable = None,
    model: ModelName = None,
    rank: Rank = None,
    num_fields: NumFields = None,
    rows: Rows = None,
    lr: LearningRate = None,
    optimizer: OptimizerName = None,
    weight_decay: WeightDecay = None,
    initial_accumulator: InitialAccumulator = None,
    init_scale: InitScale = None,
    num_hashes: NumHashes = None,
    dtype: Dtype = None,
    seed: Seed = None,
    batch_size: BatchSize = None,
    passes: Passes = None,
    data_format: DataFormat = None,
    label: Label = None,
    positive: Positive = None,
    numeric: Numeric = None,
    categorical: Categorical = None,
    strict: Strict = False,
    progress: Progress = None,
    negative_rate: NegativeRate = None,
    negative_correction: NegativeCorrection = None,
    label_delay: LabelDelay = 0,
    save_every: SaveEvery = 60.0,
    snapshots: Snapshots = None,
    deltas: Deltas = None,
) -> None:
    """Train a model on files, printing the progressive validation loss. Run again to resume.

    An existing model keeps the options it was created with. Ctrl-C finishes the batch and saves.
    """
    if deltas is not None and snapshots is None:
        raise typer.BadParameter("--deltas requires --snapshots: a server must not get updates that a kill would undo")
    options = TrainOptions(
        files=files, table=table, data_format=data_format, label=label, batch_size=batch_size, passes=passes,
        strict=strict, schedule=progress, negative_rate=negative_rate, negative_correction=negative_correction,
        label_delay=label_delay, save_seconds=save_every, snapshots=snapshots, deltas=deltas,
        columns=Columns(column_names(numeric), column_names(categorical), positive),
        model=ModelOptions(
            model=model, num_fields=num_fields, rank=rank, rows=rows, num_hashes=num_hashes, dtype=dtype, seed=seed,
            init_scale=init_scale, optimizer=optimizer, weight_decay=weight_decay,
            initial_accumulator=initial_accumulator, lr=lr,
        ),
    )  # fmt: skip
    require("pyarrow")  # needed later, like the console: fail before anything is created
    console = _console()
    with TrainPlan(options) as plan, plan.trainer(lambda line: say(console, line)) as trainer:
        _leave_a_thread_to_read(trainer.model)
        status = run_training(trainer, console)
    raise typer.Exit(status)


def _leave_a_thread_to_read(model: HashedModel) -> None:
    """Learn a plain model on one thread less, unless the user has set their number.

    Reading an example takes as long as learning it, and threads that wait for a CPU delay both.
    """
    if model.kind == "fm" and not os.environ.get("HASHEMB_NUM_THREADS"):
        hashemb.set_num_threads(max(1, hashemb.get_num_threads() - 1))


@app.command()
def predict(
    files: Files,
    table: Table,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write here instead of to standard output.")
    ] = None,
    data_format: DataFormat = None,
    label: Label = None,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Skip bad lines instead of stopping at the first.")
    ] = False,
) -> None:
    """Print the probability of each example, one per line. The table is only read, so training may continue."""
    try:
        bad = _predict(files, table, output, data_format=data_format, label=label, strict=not skip_bad_lines)
    except BrokenPipeError:  # the reader of our output has closed it: `hashemb predict … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if bad:
        have = "line has" if bad == 1 else "lines have"
        print_line(f"hashemb: {bad:,} bad {have} no probability in the output", stderr=True)


def _predict(files: list[Path], table: Path, output: Path | None, **reading: Any) -> int:
    """Score the files and write to `output`; return the number of bad lines that were skipped."""
    model, card = load_model(table)
    with closing(model.table), ExitStack() as stack:
        reader = stack.enter_context(open_for_scoring(card, files, **reading))
        file = stack.enter_context(_output(output))
        advance = stack.enter_context(progress_bar(_console(stderr=True), "scoring", reader.bytes_total))
        count = 0
        for batch in stack.enter_context(closing(score(model, reader, card.negatives()))):
            write_probabilities(file, batch.probabilities)
            count += len(batch.probabilities)
            advance(reader.bytes_read, count)
        file.flush()
        return reader.report.rows_bad


@app.command()
def demo(
    dir: Annotated[Path, typer.Option(help="Directory for all files; a second run reuses the data.")] = Path("demo"),
    impressions: Annotated[
        Any, typer.Option(parser=COUNT, metavar="COUNT", help="Impressions to generate. [default: 1,000,000]")
    ] = None,
) -> None:
    """Generate a click log, train on it, and compare the model with the true probabilities."""
    raise typer.Exit(run_demo(dir, impressions or 1_000_000, _console()))


def _console(*, stderr: bool = False) -> Console:
    console: Console = require("rich.console").Console(stderr=stderr)
    return console


def _output(path: Path | None) -> AbstractContextManager[IO[str]]:
    """Open standard output, which stays open, or the file at `path`, which appears when it is complete."""
    if path is None:
        return nullcontext(sys.stdout)
    if path.exists() and not path.is_file():  # /dev/null or a pipe: write to it, never replace it
        return open(path, "w", encoding="ascii")
    return _replacing(path)


@contextmanager
def _replacing(path: Path) -> Iterator[IO[str]]:
    with replacing(path) as temporary, open(temporary, "x", encoding="ascii") as file:
        yield file
