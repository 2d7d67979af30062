"""The commands of `hashemb`: parse options, call the other modules of this package, and print the results."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import hashemb
from hashemb.ctr._extras import require
from hashemb.ctr._printable import print_line
from hashemb.ctr.arguments import (
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
    one_of,
    parser,
)
from hashemb.ctr.checkpoints import Checkpoints
from hashemb.ctr.console import confirm, progress_bar, say
from hashemb.ctr.demo import run_demo
from hashemb.ctr.first_look import Plan, default_table, look, reading_text
from hashemb.ctr.following import follow_deltas
from hashemb.ctr.inspection import describe, steps_lost
from hashemb.ctr.model_dir import ModelCard, load_model, training_lock
from hashemb.ctr.negatives import NegativeSampling, agreed_sampling
from hashemb.ctr.options import ModelOptions, open_or_create
from hashemb.ctr.scoring import open_for_scoring, score, write_probabilities
from hashemb.ctr.session import run_training
from hashemb.ctr.trainer import Columns, Trainer, check_paths

if TYPE_CHECKING:
    import typer
    from rich.console import Console
else:
    typer = require("typer")

__all__ = ["app", "typer"]

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    help="Click-through-rate models whose embedding table is a directory of memory-mapped files.",
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print_line(f"hashemb {hashemb.__version__}")
        raise typer.Exit


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
    options = ModelOptions(
        model=model, num_fields=num_fields, rank=rank, rows=rows, num_hashes=num_hashes, dtype=dtype, seed=seed,
        init_scale=init_scale, optimizer=optimizer, weight_decay=weight_decay,
        initial_accumulator=initial_accumulator, lr=lr,
    )  # fmt: skip
    agreed_sampling(None, negative_rate, negative_correction)
    require("pyarrow")  # needed later, like the console: fail before anything is created
    console = _console()
    check_paths(files)
    table = table or default_table(files)
    columns = Columns(column_names(numeric), column_names(categorical), positive)
    looked_at, plan = ModelCard(rank=0, data_format=data_format or "auto", label=label), Plan()
    is_new = not table.exists()
    if is_new:  # leave no new model behind for a file that can't be read
        plan, options = look(looked_at, files, columns).refine(options)
        options = replace(options, num_fields=num_fields or len(looked_at.schema) or None)
    checkpoints = _resume(table, snapshots, deltas, console)
    learner, card = open_or_create(table, options)
    with closing(learner.table), training_lock(table):
        if is_new:
            plan.settle(card, looked_at)
            for line in reading_text(card, plan):
                say(console, line)
        card.data_format = data_format or card.data_format
        card.label = label or card.label
        if batch_size:
            card.batch_size, card.warm_up = batch_size, 0
        learned_with = NegativeSampling(card.negative_rate, card.negative_correction) if learner.table.step else None
        sampling = agreed_sampling(learned_with, negative_rate, negative_correction)
        card.negative_rate, card.negative_correction = sampling.rate, sampling.correction
        if learner.kind == "fm" and not os.environ.get("HASHEMB_NUM_THREADS"):
            # Reading an example takes as long as learning it, and threads that wait for a CPU delay both.
            hashemb.set_num_threads(max(1, hashemb.get_num_threads() - 1))
        trainer = Trainer(
            table, learner, card, files, passes=passes or card.passes, strict=strict, schedule=progress,
            label_delay=label_delay, save_seconds=save_every, columns=columns, checkpoints=checkpoints)  # fmt: skip
        status = run_training(trainer, console)
    raise typer.Exit(status)


def _resume(table: Path, snapshots: Path | None, deltas: Path | None, console: Console) -> Checkpoints | None:
    """Return the checkpoints, if requested, after restoring the last one if the trainer was killed."""
    if snapshots is None:
        if deltas is not None:
            raise typer.BadParameter("--deltas needs --snapshots: a server must not be ahead of what a kill leaves")
        return None
    checkpoints = Checkpoints(snapshots, deltas)
    step = checkpoints.resume(table)
    if step is not None:
        say(console, f"{table}: a run was killed; back to the checkpoint at step {step:,}")
    return checkpoints


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
        bool, typer.Option("--skip-bad-lines", help="Leave bad lines out of the output instead of stopping at one.")
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
def inspect(
    table: Annotated[Path, typer.Argument(help="Directory of a table or model.")],
    exact: Annotated[bool, typer.Option("--exact", help="Count touched rows by reading them.")] = False,
) -> None:
    """Show a table's geometry, optimiser, occupancy and size, and its model."""
    console = _console()
    for name, value in describe(table, exact=exact):
        say(console, f"{name:<16} {value}")


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="Directory of a table, model or snapshot; or a delta file.")],
    suspects: Annotated[bool, typer.Option("--suspects", help="Name rows that killed processes were writing.")] = False,
) -> None:
    """Check all checksums and invariants of a table, snapshot or delta. Exit with status 1 if any fails."""
    problems = _verify(path, suspects=suspects)
    for problem in problems:
        print_line(str(problem))
    if problems:
        raise typer.Exit(1)
    say(_console(), f"{path}: nothing is wrong")


@app.command()
def repair(
    table: Annotated[Path, typer.Argument(help="Directory of the table or model.")],
    snapshot: Annotated[Path, typer.Option("--from", help="A snapshot of it.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
) -> None:
    """Replace a damaged table with a snapshot; the damaged table is kept. An intact table is not changed."""
    problems = _verify(table)
    if not problems:
        say(_console(), f"{table}: nothing is wrong, nothing to repair")
        return
    for problem in problems:
        print_line(str(problem))
    lost = steps_lost(table, snapshot)
    if not yes:
        confirm(f"Put {snapshot} in the place of {table}? {lost}")
    with _counting("restoring") as progress:
        aside = hashemb.restore(snapshot, table, replace=True, progress=progress)
    print_line(f"{table} is restored. {lost}")
    print_line(f"The damaged table: {aside}")


def _verify(path: Path, *, suspects: bool = False) -> list[hashemb.Problem]:
    with _counting("verifying") as progress:
        return hashemb.verify(path, progress=progress, suspects=suspects)


@contextmanager
def _counting(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar over blocks, whose total number is known only at the first update."""
    with progress_bar(_console(stderr=True), label, 1000, unit_name="blocks") as advance:
        yield lambda done, total: advance(done * 1000 // max(total, 1), done)


@app.command()
def demo(
    dir: Annotated[Path, typer.Option(help="Where everything goes; a second run reuses the data.")] = Path("demo"),
    impressions: Annotated[
        Any, typer.Option(parser=COUNT, metavar="COUNT", help="Impressions to generate. [default: 1,000,000]")
    ] = None,
) -> None:
    """Generate a click log, train on it, and compare the model with the true probabilities."""
    raise typer.Exit(run_demo(dir, impressions or 1_000_000, _console()))


TableDirectory = Annotated[Path, typer.Argument(metavar="TABLE", help="Directory of a table or model.")]


@app.command()
def snapshot(
    table: TableDirectory,
    target: Annotated[Path, typer.Argument(metavar="DST", help="Directory to make.")],
) -> None:
    """Copy a table at one point in time, while training continues."""
    with hashemb.open(table, "r+") as opened:
        info = opened.snapshot(target)
    print_line(f"snapshot number {info.sequence}, step {info.step:,}: {info.num_blocks:,} blocks in {target}")


@app.command()
def delta(
    table: TableDirectory,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="File to make; by custom *.delta.")],
    since: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Snapshot or delta of the table. [default: everything]")
    ] = None,
    state: Annotated[bool, typer.Option("--state", help="The optimiser's state too, to train on with.")] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            parser=parser(one_of("float32", "float16", "bfloat16")), metavar="NAME", help="Of weights. [the table's]"
        ),
    ] = None,
) -> None:
    """Write the changes in a table since a snapshot or delta to one file, while training continues."""
    with hashemb.open(table, "r+") as opened:
        info = opened.export_delta(since, output, state=state, dtype=dtype)
    print_line(f"delta number {info.sequence}, step {info.step:,}: {info.num_blocks:,} blocks in {output}")


@app.command()
def follow(
    deltas: Annotated[Path, typer.Argument(metavar="DELTAS", help="Directory that *.delta files are put in.")],
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="The replica; made if it is not there.")],
    interval: Annotated[float, typer.Option(min=0.01, help="Seconds between looks at the directory.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Apply what there is, then end.")] = False,
) -> None:
    """Keep a replica up to date with the deltas in a directory, until Ctrl-C."""
    with suppress(KeyboardInterrupt):
        follow_deltas(deltas, table, interval_s=interval, once=once)


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
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "w", encoding="ascii") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
