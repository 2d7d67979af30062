"""The options of `hashemb train` and those shared with other commands: their types, parsers and help texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from hashemb._packages import require
from hashemb.ctr.data import Format
from hashemb.ctr.training import (
    DEFAULT_RATES,
    DEFAULTS,
    MODELS,
    Correction,
    EveryN,
    PowersOfTwo,
    Schedule,
    parse_count,
)

if TYPE_CHECKING:
    import typer
else:
    typer = require("typer")


def parser(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Wrap `parse` so that its `ValueError` becomes a usage error that names the option."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return convert


def _schedule(text: str) -> Schedule:
    return PowersOfTwo() if text == "powers" else EveryN(parse_count(text))


def one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{text!r} is not one of {', '.join(choices)}")
        return text

    return parse


def _default(name: str) -> str:
    return f"[new model: {DEFAULTS[name]}]"


def column_names(texts: list[str] | None) -> tuple[str, ...]:
    return tuple(name.strip() for text in texts or () for name in text.split(",") if name.strip())


Files = Annotated[
    list[Path],
    typer.Argument(help="Criteo TSV, CSV, Parquet, libsvm, libffm or VW text; may be .gz, .zst or .bz2."),
]
Table = Annotated[Path, typer.Option("--table", "-t", help="Directory of the model.")]
COUNT = parser(parse_count)
DataFormat = Annotated[
    Any,
    typer.Option(
        "--format",
        parser=parser(one_of(*get_args(Format))),
        metavar="NAME",
        help=f"{', '.join(get_args(Format)[1:])}. [default: by name and contents]",
    ),
]
Label = Annotated[str | None, typer.Option(help="Label column. [default: inferred]")]

OptimizerName = Annotated[
    str | None,
    typer.Option(parser=parser(one_of(*DEFAULT_RATES)), metavar="NAME", help=f"{', '.join(DEFAULT_RATES)}."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        parser=parser(one_of("float32", "float16", "bfloat16")),
        metavar="NAME",
        help=f"float32, float16 or bfloat16. {_default('dtype')}",
    ),
]
NegativeRate = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, help="Share of the negatives to learn from. Predictions stay calibrated."),
]
NegativeCorrection = Annotated[
    Any,
    typer.Option(
        parser=parser(one_of(*get_args(Correction))),
        metavar="NAME",
        help=f"How the rate is corrected for: {' or '.join(get_args(Correction))}. [new model: predictions]",
    ),
]
LabelDelay = Annotated[
    int, typer.Option(min=0, help="Examples after which a label is known and learned. Scoring is not delayed.")
]
NewTable = Annotated[
    Path | None, typer.Option("--table", "-t", help="Directory of the model. [default: NAME.model, by the first file]")
]
ModelName = Annotated[
    str | None,
    typer.Option(
        parser=parser(one_of(*MODELS)),
        metavar="NAME",
        help="lr, fm, fwfm (field-weighted FM) or ffm (field-aware). [new model: fm; lr if small]",
    ),
]
Rank = Annotated[
    int | None, typer.Option(min=0, help="Latent factors; 0: logistic regression. [new model: 15; ffm 4]")
]
NumFields = Annotated[
    int | None, typer.Option(min=1, help="Fields, for fwfm and ffm. [new model: as many as the first file has]")
]
Rows = Annotated[
    int | None, typer.Option(parser=COUNT, metavar="COUNT", help="Rows: 4194304, 2^22, 4Mi. [new model: 2^22]")
]
LearningRate = Annotated[
    float | None,
    typer.Option("--lr", help="Learning rate; may change later. [new model: adagrad 0.04, rank 0 0.06; small 0.1]"),
]
WeightDecay = Annotated[float | None, typer.Option(help=f"Decoupled decay. {_default('weight_decay')}")]
InitialAccumulator = Annotated[
    float | None,
    typer.Option(help="Initial value of Adagrad's accumulators. [new model: 5; rank 0 2; row-wise, small 1]"),
]
InitScale = Annotated[float | None, typer.Option(help=f"Initial rows are uniform in ±this. {_default('init_scale')}")]
NumHashes = Annotated[int | None, typer.Option(min=1, help=f"Rows per key. {_default('num_hashes')}")]
Seed = Annotated[int | None, typer.Option(min=0, help=f"Seed of hashing and of initial rows. {_default('seed')}")]
BatchSize = Annotated[
    int | None,
    typer.Option(
        parser=COUNT, metavar="COUNT", help="Examples per update. [new model: 1,024, at first 32; 32 if small]"
    ),
]
Passes = Annotated[
    int | None,
    typer.Option(min=1, help="Passes over each file, including earlier runs. [new model: 1; 10 if small]"),
]
Positive = Annotated[
    str | None, typer.Option(metavar="VALUE", help="Label that means 1. [default: of two, the one that sorts second]")
]
Numeric = Annotated[
    list[str] | None, typer.Option(metavar="NAMES", help="Columns of integers that are quantities: a,b.")
]
Categorical = Annotated[list[str] | None, typer.Option(metavar="NAMES", help="Columns of numbers that are ids: a,b.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first bad line.")]
Progress = Annotated[
    Any,
    typer.Option(
        parser=parser(_schedule), metavar="N|powers", help="Print a row every N examples. [default: powers of 2]"
    ),
]
SaveEvery = Annotated[float, typer.Option(min=0.0, help="Seconds between saves while training.")]
Snapshots = Annotated[
    Path | None, typer.Option(help="Directory for a snapshot with every save: a kill loses and repeats nothing.")
]
Deltas = Annotated[
    Path | None, typer.Option(help="Directory for deltas, for `hashemb follow`. Requires --snapshots.")
]
