"""A trained model on disk: one directory, the table's files plus `model.json`.

The table holds all that was learned; `model.json` says what the table's rows mean (kind, rank, fields), how to read
data for it, how far each source has been learned and how that went. It is replaced as a whole (written beside,
synced, renamed), so that a reader finds the old one or the new one, never a mixture.
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
from hashemb.ctr._json_values import as_list, as_number, as_object, as_text, as_whole, one_of, parse_file
from hashemb.ctr._labels import shown
from hashemb.ctr._report import ReadReport
from hashemb.ctr.fields import Kind
from hashemb.ctr.models import FactorizationMachine, FieldAwareFM, FieldWeightedFM, HashedModel
from hashemb.ctr.negatives import Correction, NegativeSampling
from hashemb.ctr.progressive import check_progress
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

Format = Literal["auto", "criteo", "csv", "parquet", "libsvm", "libffm", "vw"]
ModelKind = Literal["factorization_machine", "field_weighted_fm", "field_aware_fm"]

MODEL_FILE = "model.json"
LOCK_FILE = "model.lock"
MODEL_FORMAT = 1
SMALLEST_BATCH = 32
MAX_FIELDS = 1 << 16  # of a model that tells them apart
KINDS = {
    "factorization_machine": "factorization machine",
    "field_weighted_fm": "field-weighted factorization machine",
    "field_aware_fm": "field-aware factorization machine",
}
_DIGEST_BYTES = 64 * 1024


@dataclass
class SourcePosition:
    """How far one file has been learned.

    Attributes
    ----------
    size_bytes, digest : int, str
        Of the file when it was last opened; the digest is over the first and the last 64 KiB.
    passes : int
        Passes completed.
    rows : int
        Good rows learned in the pass under way; 0 between passes.
    rows_per_pass : int
        Good rows of the last pass that was completed.
    bad_rows, bad_lines : int, list of str
        Rows that could not be used when the file was last read, and the first of them, with the reasons.
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
        """The beginning of the file at `path`; reads at most 128 KiB of it."""
        size_bytes = os.path.getsize(path)
        return cls(size_bytes, _digest(path, size_bytes))

    def in_file(self, path: str | os.PathLike[str]) -> SourcePosition | None:
        """This position in the file as it is now: it may have grown since. None if it has changed otherwise.

        In a file that was learned to its end and then grew, the last pass goes on with what has been added.
        """
        now = SourcePosition.of(path)
        if now.size_bytes < self.size_bytes or _digest(path, self.size_bytes) != self.digest:
            return None
        if now.size_bytes > self.size_bytes and self.passes and not self.rows:
            return replace(now, passes=self.passes - 1, rows=self.rows_per_pass)
        return replace(self, size_bytes=now.size_bytes, digest=now.digest)

    def note_bad_lines(self, report: ReadReport) -> None:
        """Take over what the reader of the file says; it counts from the file's beginning, wherever it started."""
        self.bad_rows, self.bad_lines = report.rows_bad, [str(line) for line in report.bad_lines]


def _digest(path: str | os.PathLike[str], size_bytes: int) -> str:
    """Of the first 64 KiB of the file's first `size_bytes`, and of the last 64 KiB of those."""
    with open(path, "rb") as file:
        digest = hashlib.blake2b(file.read(min(_DIGEST_BYTES, size_bytes)), digest_size=16)
        tail = max(0, size_bytes - _DIGEST_BYTES)
        file.seek(tail)
        digest.update(file.read(size_bytes - tail))
    return digest.hexdigest()


@dataclass
class ModelCard:
    """What `model.json` holds.

    Attributes
    ----------
    rank : int
        Of the model; 0 is logistic regression.
    kind : {"factorization_machine", "field_weighted_fm", "field_aware_fm"}
    num_fields : int or None
        Of a model that tells fields apart, i.e. of the last two kinds.
    schema : dict
        Field -> kind, in the order of the key columns: how the reader made keys of the first file, and has to of
        all others. Empty until then.
    data_format, label : str, str or None
        Format that the data is read as, and the column that is the label.
    label_values : sequence of two str, or None
        What means 0 and what means 1 in that column; None: 0 and 1.
    batch_size, passes : int
        Examples per update, and how often files are learned unless another number is asked for.
    warm_up : int
        Examples of the first pass over which batches grow to `batch_size`, from 32.
    table_step : int
        The table's step when this card was written; more updates than that in the table mean that it was trained
        without the card following.
    sources : dict
        Absolute path -> `SourcePosition`.
    progress : dict
        Pass under way and the state of its `ProgressiveValidator`; empty before the first batch.
    negative_rate, negative_correction : float, str
        Share of the negatives that the model learns from, and what corrects for it; see `NegativeSampling`.
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
        """The model in a few words.

        >>> ModelCard(rank=0).description, ModelCard(rank=4, kind="field_aware_fm", num_fields=39).description
        ('logistic regression', 'field-aware factorization machine of rank 4 over 39 fields')
        """
        if self.rank == 0:
            return "logistic regression"
        fields = "" if self.num_fields is None else f" over {self.num_fields} fields"
        return f"{KINDS[self.kind]} of rank {self.rank}{fields}"

    @property
    def embedding_dim(self) -> int:
        """Elements of a row of the model's table."""
        vectors = (self.num_fields or 0) if self.kind == "field_aware_fm" else 1
        return 1 + vectors * self.rank

    def warm_batch_size(self, learned: int) -> int:
        """Examples per update after `learned` of the first pass: doubled whenever those have doubled.

        >>> card = ModelCard(rank=0, batch_size=1000, warm_up=100_000)
        >>> [card.warm_batch_size(learned) for learned in (0, 6_399, 6_400, 99_999, 100_000)]
        [32, 32, 64, 512, 1000]
        """
        if learned >= self.warm_up:
            return self.batch_size
        share = self.batch_size * learned // self.warm_up
        return min(max(SMALLEST_BATCH, 1 << (share.bit_length() - 1) if share else 0), self.batch_size)

    def negatives(self, seed: int = 0) -> NegativeSampling | None:
        """Which negatives the model learns from, chosen by `seed`, and its correction; None if all."""
        sampling = NegativeSampling(self.negative_rate, self.negative_correction, seed)
        return None if self.negative_rate == 1.0 else sampling


def card_values(card: ModelCard) -> dict[str, Any]:
    """The card as JSON values; `parse_card` is the inverse."""
    return {"format": MODEL_FORMAT, **asdict(card)}


def write_card(directory: str | os.PathLike[str], card: ModelCard) -> None:
    """Replace the directory's `model.json`, atomically and durably. One writer at a time: `training_lock`."""
    card.hashemb_version = hashemb.__version__
    text = json.dumps(card_values(card), indent=1)
    temporary = Path(directory, MODEL_FILE + ".new")
    temporary.unlink(missing_ok=True)  # of a writer that was killed; or a link, which is not to be followed
    with open(temporary, "x", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, Path(directory, MODEL_FILE))
    _sync_directory(directory)


def read_card(directory: str | os.PathLike[str]) -> ModelCard:
    """Read the directory's `model.json`.

    Raises
    ------
    FileNotFoundError
        There is none: no model, or a table without one.
    FormatError
        Not a model card, or one of a newer format.
    """
    path = Path(directory, MODEL_FILE)
    try:
        return parse_file(path, "a model card", parse_card)
    except FileNotFoundError:
        raise FileNotFoundError(f"{os.fspath(directory)}: no model here ({MODEL_FILE} not found)") from None


def parse_card(values: Any) -> ModelCard:
    """The card that `card_values` gave; `ValueError` for anything else, so that all who read one can rely on it."""
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
    """The model that the card describes, on an open table.

    Raises
    ------
    ValueError
        The table's rows are not of the size that this model has.
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
        What `hashemb train --table` wrote.
    mode : {"r", "r+"}
        As for `hashemb.open`: "r" to score, "r+" to go on learning.

    Returns
    -------
    (HashedModel, ModelCard)
        A `FactorizationMachine`, `FieldWeightedFM` or `FieldAwareFM`. Close `model.table` when done with it.

    Raises
    ------
    FileNotFoundError, FormatError
        No such directory; no model in it; not one that this version reads; or one that the table is not of.
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
    """Hold the directory against a second trainer, which would overwrite this one's positions.

    The kernel lets go of the lock when its holder dies, however it dies. Readers take no lock.

    Raises
    ------
    HashembError
        Another trainer holds it.
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


def _sync_directory(directory: str | os.PathLike[str]) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
