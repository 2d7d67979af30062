"""The commands of `hashemb`: options in, work done by the modules beside this one, lines out."""

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
from hashemb.ctr.checkpoints import Checkpoints
from hashemb.ctr.console import progress_bar, say
from hashemb.ctr.demo import run_demo
from hashemb.ctr.following import follow_deltas
from hashemb.ctr.inspection import describe, steps_lost
from hashemb.ctr.model_dir import ModelCard, load_model, training_lock
from hashemb.ctr.options import DEFAULT_RATES, DEFAULTS, MODELS, ModelOptions, open_or_create, parse_count
from hashemb.ctr.progressive import EveryN, PowersOfTwo, Schedule
from hashemb.ctr.scoring import open_for_scoring, score, write_probabilities
from hashemb.ctr.session import run_training
from hashemb.ctr.trainer import Trainer, check_paths, is_stream, open_source

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


def _parser(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse`, with its `ValueError` as a usage error that names the option."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return convert


def _schedule(text: str) -> Schedule:
    return PowersOfTwo() if text == "powers" else EveryN(parse_count(text))


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{text!r} is not one of {', '.join(choices)}")
        return text

    return parse


def _default(name: str) -> str:
    return f"[new model: {DEFAULTS[name]}]"


Files = Annotated[list[Path], typer.Argument(help="Criteo TSV, CSV or Parquet; .gz and .zst are read as they are.")]
Table = Annotated[Path, typer.Option("--table", "-t", help="Directory of the model.")]
Count = _parser(parse_count)
DataFormat = Annotated[
    Any,
    typer.Option(
        "--format",
        parser=_parser(_one_of("auto", "criteo", "csv", "parquet")),
        metavar="NAME",
        help="criteo, csv or parquet. [default: by name and contents]",
    ),
]
Label = Annotated[str | None, typer.Option(help="Label column. [default: the reader's choice]")]
ModelName = Annotated[
    str | None,
    typer.Option(
        parser=_parser(_one_of(*MODELS)),
        metavar="NAME",
        help=f"lr, fm, fwfm (field-weighted FM) or ffm (field-aware). {_default('model')}",
    ),
]
Rank = Annotated[
    int | None, typer.Option(min=0, help="Latent factors; 0: logistic regression. [new model: 15; ffm 4]")
]
NumFields = Annotated[
    int | None, typer.Option(min=1, help="Of fwfm and ffm. [new model: as many as the first file has]")
]
OptimizerName = Annotated[
    str | None,
    typer.Option(parser=_parser(_one_of(*DEFAULT_RATES)), metavar="NAME", help=f"{', '.join(DEFAULT_RATES)}."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        parser=_parser(_one_of("float32", "float16", "bfloat16")),
        metavar="NAME",
        help=f"float32, float16 or bfloat16. {_default('dtype')}",
    ),
]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(f"hashemb {hashemb.__version__}")
        raise typer.Exit


@app.command()
def train(
    files: Files,
    table: Table,
    model: ModelName = None,
    rank: Rank = None,
    num_fields: NumFields = None,
    rows: Annotated[
        int | None, typer.Option(parser=Count, metavar="COUNT", help="Rows: 4194304, 2^22, 4Mi. [new model: 2^22]")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; may change later. [new model: adagrad 0.04]")] = None,
    optimizer: OptimizerName = None,
    weight_decay: Annotated[float | None, typer.Option(help=f"Decoupled decay. {_default('weight_decay')}")] = None,
    initial_accumulator: Annotated[
        float | None, typer.Option(help="What Adagrad's accumulators start at. [new model: 5, row-wise 1]")
    ] = None,
    init_scale: Annotated[float | None, typer.Option(help=f"Rows start in ±this. {_default('init_scale')}")] = None,
    num_hashes: Annotated[int | None, typer.Option(min=1, help=f"Rows per key. {_default('num_hashes')}")] = None,
    dtype: Dtype = None,
    seed: Annotated[int | None, typer.Option(min=0, help=f"Of hashing and initial rows. {_default('seed')}")] = None,
    batch_size: Annotated[
        int | None, typer.Option(parser=Count, metavar="COUNT", help="Examples per update. [new model: 256]")
    ] = None,
    passes: Annotated[int, typer.Option(min=1, help="Times to learn each file, earlier runs included.")] = 1,
    data_format: DataFormat = None,
    label: Label = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad line.")] = False,
    progress: Annotated[
        Any,
        typer.Option(
            parser=_parser(_schedule), metavar="N|powers", help="Print a row every N examples. [default: powers of 2]"
        ),
    ] = None,
    save_every: Annotated[float, typer.Option(min=0.0, help="Seconds between saves while training.")] = 60.0,
    snapshots: Annotated[
        Path | None, typer.Option(help="Snapshot to this directory with every save: a kill loses and repeats nothing.")
    ] = None,
    deltas: Annotated[
        Path | None, typer.Option(help="With --snapshots: deltas for `hashemb follow`, to this directory.")
    ] = None,
) -> None:
    """Learn files, printing the loss on each example before it is learned. Run again to resume.

    A model that exists keeps the options it was made with. Ctrl-C finishes the batch and saves.
    """
    options = ModelOptions(
        model=model, num_fields=num_fields, rank=rank, rows=rows, num_hashes=num_hashes, dtype=dtype, seed=seed,
        init_scale=init_scale, optimizer=optimizer, weight_decay=weight_decay,
        initial_accumulator=initial_accumulator, lr=lr,
    )  # fmt: skip
    require("pyarrow")  # as the console, needed later: to be missed before anything is made
    console = _console()
    check_paths(files)
    if not table.exists() and not is_stream(files[0]):  # leave no new model behind for a file that can't be read
        first = ModelCard(rank=0, data_format=data_format or "auto", label=label)
        open_source(first, str(files[0])).close()
        options = replace(options, num_fields=num_fields or len(first.schema) or None)
    checkpoints = _resume(table, snapshots, deltas, console)
    learner, card = open_or_create(table, options)
    with closing(learner.table), training_lock(table):
        card.data_format = data_format or card.data_format
        card.label = label or card.label
        card.batch_size = batch_size or card.batch_size
        trainer = Trainer(
            table, learner, card, files, passes=passes, strict=strict, schedule=progress, save_seconds=save_every,
            checkpoints=checkpoints)  # fmt: skip
        status = run_training(trainer, console)
    raise typer.Exit(status)


def _resume(table: Path, snapshots: Path | None, deltas: Path | None, console: Console) -> Checkpoints | None:
    """The checkpoints, if there are to be any, after the model is back at the last one if it was killed."""
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
    """Print the probability of each example, one a line. Only reads the table, beside any trainer."""
    try:
        bad = _predict(files, table, output, data_format=data_format, label=label, strict=not skip_bad_lines)
    except BrokenPipeError:  # whoever reads our output has had enough: `hashemb predict … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if bad:
        have = "line has" if bad == 1 else "lines have"
        print(f"hashemb: {bad:,} bad {have} no probability in the output", file=sys.stderr)


def _predict(files: list[Path], table: Path, output: Path | None, **reading: Any) -> int:
    """Score the files into `output`; the number of bad lines left out."""
    model, card = load_model(table)
    with closing(model.table), ExitStack() as stack:
        reader = stack.enter_context(open_for_scoring(card, files, **reading))
        file = stack.enter_context(_output(output))
        advance = stack.enter_context(progress_bar(_console(stderr=True), "scoring", reader.bytes_total))
        count = 0
        for batch in stack.enter_context(closing(score(model, reader))):
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
    """Show a table's geometry, optimiser, occupancy and size, and the model on it."""
    console = _console()
    for name, value in describe(table, exact=exact):
        say(console, f"{name:<16} {value}")


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="Directory of a table, model or snapshot; or a delta file.")],
) -> None:
    """Check a table, snapshot or delta: every check sum and every invariant. Status 1 if something is wrong."""
    problems = _verify(path)
    for problem in problems:
        print(problem)
    if problems:
        raise typer.Exit(1)
    say(_console(), f"{path}: nothing is wrong")


@app.command()
def repair(
    table: Annotated[Path, typer.Argument(help="Directory of the table or model.")],
    snapshot: Annotated[Path, typer.Option("--from", help="A snapshot of it.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
) -> None:
    """Put a snapshot in the place of a damaged table, which is kept beside it. Does nothing to a table in order."""
    problems = _verify(table)
    if not problems:
        say(_console(), f"{table}: nothing is wrong, nothing to repair")
        return
    for problem in problems:
        print(problem)
    lost = steps_lost(table, snapshot)
    if not yes:
        typer.confirm(f"Put {snapshot} in the place of {table}? {lost}", abort=True)
    with _counting("restoring") as progress:
        aside = hashemb.restore(snapshot, table, replace=True, progress=progress)
    say(_console(), f"{table} is restored. {lost}\nThe damaged table: {aside}")


def _verify(path: Path) -> list[hashemb.Problem]:
    with _counting("verifying") as progress:
        return hashemb.verify(path, progress=progress)


@contextmanager
def _counting(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over blocks whose number is known only when it moves."""
    with progress_bar(_console(stderr=True), label, 1000, unit_name="blocks") as advance:
        yield lambda done, total: advance(done * 1000 // max(total, 1), done)


@app.command()
def demo(
    dir: Annotated[Path, typer.Option(help="Where everything goes; a second run reuses the data.")] = Path("demo"),
    impressions: Annotated[
        Any, typer.Option(parser=Count, metavar="COUNT", help="Impressions to generate. [default: 1,000,000]")
    ] = None,
) -> None:
    """Generate a click log, learn it, and compare the model with the truth that generated it."""
    raise typer.Exit(run_demo(dir, impressions or 1_000_000, _console()))


TableDirectory = Annotated[Path, typer.Argument(metavar="TABLE", help="Directory of a table or model.")]


@app.command()
def snapshot(
    table: TableDirectory,
    target: Annotated[Path, typer.Argument(metavar="DST", help="Directory to make.")],
) -> None:
    """Copy a table as it is at one point in time, while trainers go on."""
    with hashemb.open(table, "r+") as opened:
        info = opened.snapshot(target)
    print(f"snapshot number {info.sequence}, step {info.step:,}: {info.num_blocks:,} blocks in {target}")


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
            parser=_parser(_one_of("float32", "float16", "bfloat16")), metavar="NAME", help="Of weights. [the table's]"
        ),
    ] = None,
) -> None:
    """Write what changed in a table since a snapshot or delta to one file, while trainers go on."""
    with hashemb.open(table, "r+") as opened:
        info = opened.export_delta(since, output, state=state, dtype=dtype)
    print(f"delta number {info.sequence}, step {info.step:,}: {info.num_blocks:,} blocks in {output}")


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
    """Standard output, left open; or the file at `path`, which appears when it is complete."""
    if path is None:
        return nullcontext(sys.stdout)
    if path.exists() and not path.is_file():  # /dev/null, a pipe: to be written to, never to be replaced
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
