"""Options of the command line: counts with suffixes, optimisers by name, and options that must agree with a model.

An option that is not given is `None` here: a new model then uses the default, an existing model keeps its value.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import hashemb
from hashemb.ctr.models import HashedModel
from hashemb.ctr.training.model_dir import MODEL_FILE, ModelCard, ModelKind, build_model, load_model, write_card
from hashemb.errors import HashembError

__all__ = [
    "DEFAULTS",
    "DEFAULT_RATES",
    "MODELS",
    "ModelOptions",
    "build_optimizer",
    "create_model",
    "new_card",
    "open_or_create",
    "parse_count",
]

_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
             "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}  # fmt: skip


@dataclass(frozen=True)
class ModelOptions:
    """Options that are fixed when a model is created. `None`: not given."""

    model: str | None = None
    num_fields: int | None = None
    rank: int | None = None
    rows: int | None = None
    num_hashes: int | None = None
    dtype: str | None = None
    seed: int | None = None
    init_scale: float | None = None
    optimizer: str | None = None
    weight_decay: float | None = None
    initial_accumulator: float | None = None
    lr: float | None = None  # the only option that may be changed later

    def filled(self) -> ModelOptions:
        """Fill in the defaults of a new model for the options that are not given.

        Raises
        ------
        ValueError
            The model is unknown, or cannot have this rank.
        """
        rank = DEFAULT_RANKS.get(self.model or "", DEFAULTS["rank"])
        filled = {"num_fields": self.num_fields, "rank": _first(self.rank, rank)}
        filled |= {name: _first(getattr(self, name), value) for name, value in DEFAULTS.items() if name != "rank"}
        _check_rank(filled["model"], filled["rank"])
        rates = DEFAULT_RATES if filled["rank"] else DEFAULT_RATES | LINEAR_RATES
        lr, accumulator = rates.get(filled["optimizer"], (None, None))
        filled |= {"lr": _first(self.lr, lr), "initial_accumulator": _first(self.initial_accumulator, accumulator)}
        return ModelOptions(**filled)


#: Names of models on a command line. "lr" is a factorisation machine of rank 0.
MODELS: dict[str, ModelKind] = {
    "lr": "factorization_machine",
    "fm": "factorization_machine",
    "fwfm": "field_weighted_fm",
    "ffm": "field_aware_fm",
}

DEFAULTS: dict[str, Any] = {
    "model": "fm",
    "rank": 15,
    "rows": 2**22,
    "num_hashes": 1,
    "dtype": "float32",
    "seed": 0,
    "init_scale": 0.01,
    "optimizer": "adagrad",
    "weight_decay": 0.0,
}

DEFAULT_RANKS = {"lr": 0, "ffm": 4}  # where they differ from DEFAULTS; 4 is libffm's

# (lr, initial accumulator). Adagrad's first step in an element is lr whatever the gradient's size, and the 40 rows of
# an impression take it at the same time: with accumulators of 0 and lr 0.05, a factorisation machine is worse than a
# constant for most of its first 10,000 Criteo impressions (NE 1.21 over all of them; 0.92 with these values).
DEFAULT_RATES: dict[str, tuple[float, float | None]] = {
    "adagrad": (0.04, 5.0),
    "rowwise-adagrad": (0.02, 1.0),
    "sgd": (0.001, None),
    "ftrl": (0.03, None),
}

# Logistic regression has no factors that large steps could disturb: its log loss on the first 10,000 Criteo impressions
# is .4683; with the rates above it is .4722.
LINEAR_RATES = {"adagrad": (0.06, 2.0)}


def parse_count(text: str) -> int:
    """Parse a count with an optional suffix.

    >>> [parse_count(s) for s in ("4194304", "4_194_304", "4,194,304", "2^22", "2**22", "4Mi", "1.5M", "1e6")]
    [4194304, 4194304, 4194304, 4194304, 4194304, 4194304, 1500000, 1000000]

    Raises
    ------
    ValueError
        The text is not an integer from 1 to 2^63 - 1 in one of these forms.
    """
    compact = text.replace("_", "").replace(",", "").strip()
    power = re.fullmatch(r"(\d{1,3})(?:\^|\*\*)(\d{1,3})", compact)
    plain = re.fullmatch(r"(\d+(?:\.\d+)?(?:[eE]\d{1,2})?)\s*([KMGT]?i?)", compact, re.IGNORECASE)
    value: float = -1
    if power:
        value = int(power[1]) ** int(power[2])
    elif plain and plain[2].upper() in _SUFFIXES:
        number = int(plain[1]) if plain[1].isdigit() else float(plain[1])
        value = number * _SUFFIXES[plain[2].upper()]
    if value < 1 or value != int(value):
        raise ValueError(f"{text!r} is not a count >= 1 such as 4194304, 2^22, 4M (millions) or 4Mi (2^20s)")
    if value >= 1 << 63:
        raise ValueError(f"{text!r} is not a count below 2^63")
    return int(value)


def build_optimizer(options: ModelOptions) -> hashemb.Adagrad | hashemb.SGD | hashemb.FTRL:
    """Build the optimiser that `options` (with defaults filled in) specify.

    Raises
    ------
    ValueError
        The name is unknown, or the optimiser does not have one of the given hyper-parameters.
    """
    given: dict[str, Any] = asdict(options)
    name, lr, decay, start = (given[key] for key in ("optimizer", "lr", "weight_decay", "initial_accumulator"))
    if name not in DEFAULT_RATES:
        raise ValueError(f"unknown optimizer {name!r}: one of {', '.join(DEFAULT_RATES)}")
    if name in ("adagrad", "rowwise-adagrad"):
        kind = hashemb.Adagrad if name == "adagrad" else hashemb.RowWiseAdagrad
        return kind(lr=lr, weight_decay=decay, initial_accumulator_value=start)
    if start is not None:
        raise ValueError(f"{name} has no accumulator to start at {start}")
    if name == "sgd":
        return hashemb.SGD(lr=lr, weight_decay=decay)
    if decay:
        raise ValueError("ftrl has no weight decay")
    return hashemb.FTRL(alpha=lr)


def open_or_create(directory: str | os.PathLike[str], options: ModelOptions) -> tuple[HashedModel, ModelCard]:
    """Open the model in `directory` for training; create it if the directory does not exist.

    An untrained table without `model.json` is used as a new model; this makes it possible to train with options that
    only `hashemb.create` has.

    Raises
    ------
    ValueError
        `options` differ from those that the model was created with, or cannot be combined.
    HashembError
        The directory holds a table that has been trained but is not a model.
    """
    path = Path(directory)
    if not path.exists():
        filled = options.filled()
        return create_model(path, filled, new_card(filled))
    if not (path / MODEL_FILE).exists():
        _adopt(path, options)
    model, card = load_model(path, mode="r+")
    try:
        _check_agreement(path, model, card, options)
        if options.lr is not None:
            model.table.lr = options.lr
    except BaseException:
        model.table.close()
        raise
    return model, card


def create_model(path: Path, options: ModelOptions, card: ModelCard) -> tuple[HashedModel, ModelCard]:
    """Create the model that `card` describes with `options`, whose defaults have been filled in."""
    given: dict[str, Any] = asdict(options)
    table = hashemb.create(
        path,
        num_embeddings=given["rows"],
        embedding_dim=card.embedding_dim,
        dtype=given["dtype"],
        optimizer=build_optimizer(options),
        init=hashemb.Uniform(given["init_scale"]),
        num_hashes=given["num_hashes"],
        seed=given["seed"],
    )
    write_card(path, card)
    return build_model(table, card), card


def new_card(options: ModelOptions) -> ModelCard:
    """Return the card of a new model with `options`, whose defaults have been filled in."""
    given: dict[str, Any] = asdict(options)
    return _card(given["model"], given["rank"], options.num_fields)


def _card(model: str, rank: int, num_fields: int | None) -> ModelCard:
    """Return the card of a new model; `num_fields` is ignored by models that do not distinguish fields."""
    if model in ("lr", "fm"):
        return ModelCard(rank=rank)
    if num_fields is None:
        raise ValueError(f"the number of fields of a new {model} is not known before any data is read: give num_fields")
    return ModelCard(rank=rank, kind=MODELS[model], num_fields=num_fields)


def _adopt(path: Path, options: ModelOptions) -> None:
    """Write the card of a table that was created by `hashemb.create` and never trained."""
    name = options.model or DEFAULTS["model"]
    with hashemb.open(path, mode="r") as table:
        if table.step:
            raise HashembError(
                f"{path}: a table with {table.step:,} updates but no {MODEL_FILE}: not trained by this command"
            )
        factors = table.embedding_dim - 1
        card = _card(name, factors // (options.num_fields or 1) if name == "ffm" else factors, options.num_fields)
        build_model(table, card)  # raises if the table has another shape
        write_card(path, card)


def _check_agreement(path: Path, model: HashedModel, card: ModelCard, options: ModelOptions) -> None:
    table = model.table
    if options.model == "lr":
        options = replace(options, rank=_first(options.rank, 0))
    actual = {
        "model": options.model if MODELS.get(options.model or "") == card.kind else _name(card),
        "num_fields": model.num_fields,
        "rank": model.rank,
        "rows": table.num_embeddings,
        "num_hashes": table.num_hashes,
        "dtype": str(table.dtype),
        "seed": table.seed,
        "init_scale": getattr(table.init, "scale", None),
        "optimizer": table.optimizer.kind.replace("_", "-"),
        "weight_decay": table.optimizer.weight_decay,
        "initial_accumulator": getattr(table.optimizer, "initial_accumulator_value", None),
    }
    for name, value in actual.items():
        given = getattr(options, name)
        if given is not None and given != value:
            raise ValueError(
                f"{path} was made with {name} {value}, not {given}: leave the option out, or name another table"
            )


def _name(card: ModelCard) -> str:
    return next(name for name, kind in MODELS.items() if kind == card.kind and (name != "lr" or card.rank == 0))


def _check_rank(model: str, rank: int) -> None:
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}: one of {', '.join(MODELS)}")
    if (model == "lr" and rank != 0) or (model in ("fwfm", "ffm") and rank < 1):
        raise ValueError(f"a model {model} can't have rank {rank}: lr has rank 0, fwfm and ffm at least 1")


def _first(given: Any, default: Any) -> Any:
    return default if given is None else given
