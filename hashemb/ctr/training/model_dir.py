"""A trained model on disk: one directory, the table's files plus `model.json`.

The table holds all learned state; `model.json` specifies what the table's rows mean (kind, rank, fields), how to read
data for the model, the position in each source, and the progress of training. It is replaced atomically (written to
a temporary file, synced, renamed), so a reader finds either the old version or the new one, never a mixture.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import hashemb
from hashemb._text import shown
from hashemb.ctr._json_values import as_list, as_number, as_object, as_text, as_whole, one_of, parse_file
from hashemb.ctr._replacing import replacing
from hashemb.ctr.data import Format, Kind, ReadReport
from hashemb.ctr.models import FactorizationMachine, FieldAwareFM, FieldWeightedFM, HashedModel
from hashemb.ctr.training.negatives import Correction, NegativeSampling
from hashemb.ctr.training.progressive import check_progress
from hashemb.errors import FormatError, HashembError

__all__ = [
    "MODEL_FILE",
    "ModelCard",
    "ModelKind",
    "SourcePosition",
    "build_model",
    "card_values",
    "load_model",
    "parse_card",
    "read_card",
    "training_lock",
    "write_card",
]

ModelKind = Literal["factorization_machine", "field_weighted_fm", "field_aware_fm"]

MODEL_FILE = "model.json"
LOCK_FILE = "model.lock"
MODEL_FORMAT = 1
SMALLEST_BATCH = 32
MAX_FIELDS = 1 << 16  # for models that distinguish fields
KINDS = {
    "factorization_machine": "factorization machine",
    "field_weighted_fm": "field-weighted factorization machine",
    "field_aware_fm": "field-aware factorization machine",
}
_DIGEST_BYTES = 64 * 1024


@dataclass
class SourcePosition:
    """Position of training in one file.

    Attributes
    ----------
    size_bytes, digest : int, str
        Size and digest of the file when it was last opened; the digest covers the first and the last 64 KiB.
    passes : int
        Number of completed passes.
    rows : int
        Good rows learned in the current pass; 0 between passes.
    rows_per_pass : int
        Good rows of the last completed pass.
    bad_rows, bad_lines : int, list of str
        Number of bad rows when the file was last read, and the first of them, with the reasons.
    """

    size_bytes: int
    digest: str
    passes: int = 0
    rows: int = 0
    rows_per_pass: int = 0
    bad_rows: int = 0
    bad_lines: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> SourcePosition:
        """Return the position at the beginning of the file at `path`; reads at most 128 KiB of it."""
        size_bytes = os.path.getsize(path)
        return cls(size_bytes, _digest(path, size_bytes))

    def in_file(self, path: str | os.PathLike[str]) -> SourcePosition | None:
        """Return this position in the current file, which may have grown since; None if it has changed otherwise.

        If a file was learned to its end and has then grown, the last pass resumes with the added data.
        """
        now = SourcePosition.of(path)
        if now.size_bytes < self.size_bytes or _digest(path, self.size_bytes) != self.digest:
            return None
        if now.size_bytes > self.size_bytes and self.passes and not self.rows:
            return replace(now, passes=self.passes - 1, rows=self.rows_per_pass)
        return replace(self, size_bytes=now.size_bytes, digest=now.digest)

    def note_bad_lines(self, report: ReadReport) -> None:
        """Store the bad rows from the reader's report, which counts from the file's beginning, wherever it started."""
        self.bad_rows, self.bad_lines = report.rows_bad, [str(line) for line in report.bad_lines]


def _digest(path: str | os.PathLike[str], size_bytes: int) -> str:
    """Return the digest of the first and the last 64 KiB of the file's first `size_bytes` bytes."""
    with open(path, "rb") as file:
        digest = hashlib.blake2b(file.read(min(_DIGEST_BYTES, size_bytes)), digest_size=16)
        tail = max(0, size_bytes - _DIGEST_BYTES)
        file.seek(tail)
        digest.update(file.read(size_bytes - tail))
    return digest.hexdigest()


@dataclass
class ModelCard:
    """The contents of `model.json`.

    Attributes
    ----------
    rank : int
        Rank of the model; 0 is logistic regression.
    kind : {"factorization_machine", "field_weighted_fm", "field_aware_fm"}
        Kind of the model.
    num_fields : int or None
        Number of fields, for models that distinguish fields, i.e. the last two kinds.
    schema : dict
        Kind of each field, in the order of the key columns: how the reader encoded the first file and must encode all
        others. It is empty until the first file is read.
    data_format, label : str, str or None
        Format of the data and name of the label column.
    label_values : sequence of two str, or None
        The values of that column that mean 0 and 1; None: 0 and 1.
    batch_size, passes : int
        Number of examples per update, and default number of passes over each file.
    warm_up : int
        Number of examples at the start of the first pass over which batches grow from 32 to `batch_size`.
    table_step : int
        The table's step when this card was written; a table at a later step was trained without an update of the card.
    sources : dict
        The `SourcePosition` of each file, by absolute path.
    progress : dict
        The current pass and the state of its `ProgressiveValidator`; empty before the first batch.
    negative_rate, negative_correction : float, str
        Share of the negatives that the model learns from, and the correction for it; see `NegativeSampling`.
    hashemb_version : str
        Version that wrote the card.
    """

    rank: int
    schema: dict[str, Kind] = field(default_factory=dict)
    data_format: Format = "auto"
    label: str | None = None
    label_values: Sequence[str] | None = None
    batch_size: int = 256
    passes: int = 1
    table_step: int = 0
    sources: dict[str, SourcePosition] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    negative_rate: float = 1.0
    negative_correction: Correction = "predictions"
    hashemb_version: str = hashemb.__version__
    warm_up: int = 0
    kind: ModelKind = "factorization_machine"
    num_fields: int | None = None

    @property
    def description(self) -> str:
        """Describe the model in a few words.

        >>> ModelCard(rank=0).description, ModelCard(rank=4, kind="field_aware_fm", num_fields=39).description
        ('logistic regression', 'field-aware factorization machine of rank 4 over 39 fields')
        """
        if self.rank == 0:
            return "logistic regression"
        fields = "" if self.num_fields is None else f" over {self.num_fields} fields"
        return f"{KINDS[self.kind]} of rank {self.rank}{fields}"

    @property
    def embedding_dim(self) -> int:
        """Number of elements in a row of the model's table."""
        vectors = (self.num_fields or 0) if self.kind == "field_aware_fm" else 1
        return 1 + vectors * self.rank

    def warm_batch_size(self, learned: int) -> int:
        """Return the batch size after `learned` examples of the first pass; it doubles whenever these double.

        >>> card = ModelCard(rank=0, batch_size=1000, warm_up=100_000)
        >>> [card.warm_batch_size(learned) for learned in (0, 6_399, 6_400, 99_999, 100_000)]
        [32, 32, 64, 512, 1000]
        """
        if learned >= self.warm_up:
            return self.batch_size
        share = self.batch_size * learned // self.warm_up
        return min(max(SMALLEST_BATCH, 1 << (share.bit_length() - 1) if share else 0), self.batch_size)

    def negatives(self, seed: int = 0) -> NegativeSampling | None:
        """Return the sampling of negatives, with the choice determined by `seed`; None if all are learned."""
        sampling = NegativeSampling(self.negative_rate, self.negative_correction, seed)
        return None if self.negative_rate == 1.0 else sampling


def card_values(card: ModelCard) -> dict[str, Any]:
    """Convert the card to JSON values; `parse_card` is the inverse."""
    return {"format": MODEL_FORMAT, **asdict(card)}


def write_card(directory: str | os.PathLike[str], card: ModelCard) -> None:
    """Replace the directory's `model.json`, atomically and durably. The caller must hold the `training_lock`."""
    card.hashemb_version = hashemb.__version__
    text = json.dumps(card_values(card), indent=1)
    with replacing(Path(directory, MODEL_FILE)) as temporary, open(temporary, "x", encoding="utf-8") as file:
        file.write(text + "\n")


def read_card(directory: str | os.PathLike[str]) -> ModelCard:
    """Read the directory's `model.json`.

    Raises
    ------
    FileNotFoundError
        The file does not exist: the directory has no model, or is a table without one.
    FormatError
        The file is not a model card, or has a newer format.
    """
    path = Path(directory, MODEL_FILE)
    try:
        return parse_file(path, "a model card", parse_card)
    except FileNotFoundError:
        raise FileNotFoundError(f"{os.fspath(directory)}: no model here ({MODEL_FILE} not found)") from None


def parse_card(values: Any) -> ModelCard:
    """Parse the result of `card_values`; raise a ValueError for anything else, so that every card is valid."""
    found = as_object(values, "the card")
    version = as_whole(found.get("format"), "format", 1)
    if version > MODEL_FORMAT:
        raise ValueError(f"format {version} is newer than this version reads ({MODEL_FORMAT})")
    known = {f.name: found[f.name] for f in fields(ModelCard) if f.name in found}
    as_whole(known.get("rank"), "rank")
    sources = as_object(known.get("sources"), "sources")
    card = ModelCard(**known | {"sources": {path: _parse_position(path, at) for path, at in sources.items()}})
    _check_model(card)
    _check_reading(card)
    check_progress(card.progress)
    return card


def _parse_position(path: str, values: Any) -> SourcePosition:
    name = f"source {shown(path)}"
    found = as_object(values, name)
    as_text(found.get("digest"), f"{name}: digest")
    if not found.keys() <= {f.name for f in fields(SourcePosition)} or "size_bytes" not in found:
        raise ValueError(f"{name} must be a position in a file, found {shown(found)}")
    position = SourcePosition(**found)
    for what in ("size_bytes", "passes", "rows", "rows_per_pass", "bad_rows"):
        as_whole(getattr(position, what), f"{name}: {what}")
    for line in as_list(position.bad_lines, f"{name}: bad_lines"):
        as_text(line, f"{name}: a bad line")
    return position


def _check_model(card: ModelCard) -> None:
    one_of(card.kind, "kind", KINDS)
    if card.num_fields is not None or card.kind != "factorization_machine":
        as_whole(card.num_fields, "num_fields", 1, MAX_FIELDS)
    as_whole(card.table_step, "table_step", high=(1 << 64) - 1)
    as_number(card.negative_rate, "negative_rate")
    card.negatives()
    as_text(card.hashemb_version, "hashemb_version")


def _check_reading(card: ModelCard) -> None:
    for name, kind in as_object(card.schema, "schema").items():
        as_text(name, "a field", encodable=True)
        one_of(kind, f"kind of field {shown(name)}", get_args(Kind))
    one_of(card.data_format, "data_format", get_args(Format))
    if card.label is not None:
        as_text(card.label, "label")
    if card.label_values is not None:
        pair = [as_text(value, "a label value") for value in as_list(card.label_values, "label_values")]
        if len(pair) != 2 or pair[0] == pair[1]:
            raise ValueError(f"label_values must be two different strings, found {shown(pair)}")
    as_whole(card.batch_size, "batch_size", 1)
    as_whole(card.passes, "passes", 1)
    as_whole(card.warm_up, "warm_up")


def build_model(table: hashemb.EmbeddingTable, card: ModelCard) -> HashedModel:
    """Build the model that the card describes, on an open table.

    Raises
    ------
    ValueError
        The table's rows do not have the size that the model requires.
    """
    if card.kind == "factorization_machine":
        return FactorizationMachine(table, rank=card.rank)
    kind = FieldWeightedFM if card.kind == "field_weighted_fm" else FieldAwareFM
    return kind(table, num_fields=card.num_fields or 0, rank=card.rank)


def load_model(directory: str | os.PathLike[str], mode: Literal["r", "r+"] = "r") -> tuple[HashedModel, ModelCard]:
    """Open a trained model.

    Parameters
    ----------
    directory : path
        Directory that `hashemb train --table` wrote.
    mode : {"r", "r+"}
        As for `hashemb.open`: "r" to predict, "r+" to train further.

    Returns
    -------
    (HashedModel, ModelCard)
        A `FactorizationMachine`, `FieldWeightedFM` or `FieldAwareFM`, and its card. Close `model.table` after use.

    Raises
    ------
    FileNotFoundError, FormatError
        The directory does not exist or has no model, or this version cannot read the model, or it does not fit the
        table.
    """
    card = read_card(directory)
    table = hashemb.open(directory, mode=mode)
    try:
        return build_model(table, card), card
    except ValueError as error:
        table.close()
        raise FormatError(f"{Path(directory, MODEL_FILE)}: {error}") from error
    except BaseException:
        table.close()
        raise


@contextmanager
def training_lock(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Lock the directory against a second trainer, which would overwrite the positions of this one.

    The kernel releases the lock when its holder ends, even if it is killed. Readers take no lock.

    Raises
    ------
    HashembError
        Another trainer holds the lock.
    """
    with open(Path(directory, LOCK_FILE), "a+", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise HashembError(
                f"{os.fspath(directory)}: another trainer (process {holder}) is at work on this model"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
