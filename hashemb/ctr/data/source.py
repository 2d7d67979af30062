"""The interface between formats and the reader, and the rule that infers the kinds of columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from hashemb.ctr.data.batches import Batch
from hashemb.ctr.data.columns import Fault, LabelValues, Options
from hashemb.ctr.data.fields import CRITEO_SCHEMA, Kind, Schema, encode

__all__ = ["Block", "Reject", "Source", "check_distinct", "first_per_row", "infer_schema"]

Reject = Callable[[int, str], None]  # (line, reason); raises in strict mode


class Block(NamedTuple):
    """Consecutive rows: float32 labels (None without a label column) and one Arrow array per field."""

    labels: npt.NDArray[np.float32] | None
    columns: dict[str, Any]

    def batch(self, schema: Schema, without: Iterable[int] = ()) -> Batch:
        """Encode the fields of `schema` as a batch, leaving out the rows `without`."""
        keys, labels = encode(self.columns, schema), self.labels
        rows = list(without)
        if rows:
            keys = np.delete(keys, rows, axis=0)
            labels = None if labels is None else np.delete(labels, rows)
        return Batch(labels, keys)


class Source(Protocol):
    """Protocol of one input of any format."""

    name: str
    format: str
    label: str | None
    label_values: LabelValues | None
    schema: dict[str, Kind]  # every field of the input, with its inferred kind

    @property
    def bytes_read(self) -> int:
        """Bytes of the file, as stored, that have been read so far."""

    def accepts(self, field: str, kind: Kind) -> bool:
        """Return whether the existing column `field` can be read as `kind`."""

    def batches(self, schema: dict[str, Kind], reject: Reject) -> Iterator[Batch]:
        """Yield the good rows in order, reduced to the fields of `schema`; pass the others to `reject`.

        Batches may have any size. Formats that do not name their fields in advance add new fields to `schema`.
        """

    def close(self) -> None:
        """Close the file."""


def infer_schema(
    name: str, kinds: Mapping[str, Kind | None], label: str | None, options: Options, *, text: bool
) -> dict[str, Kind]:
    """Infer the kinds of the fields from the kinds of their values (None: no values seen) and the caller's options.

    An input with all of Criteo's columns gets Criteo's kinds where they fit, so that the same data in another format
    yields the same keys. In `text` any column can have kind "string".
    """
    for option, columns in (("numeric", options.numeric), ("categorical", options.categorical)):
        missing = [column for column in columns if column not in kinds or column == label]
        if missing:
            raise ValueError(f"{name}: no column {missing[0]!r}, which {option}= names; it has {', '.join(kinds)}")
    usual = CRITEO_SCHEMA if set(CRITEO_SCHEMA) <= set(kinds) else {}
    return {
        column: _kind(name, column, kind, usual.get(column), options, text)
        for column, kind in kinds.items()
        if column != label
    }


def _kind(name: str, column: str, seen: Kind | None, usual: Kind | None, options: Options, text: bool) -> Kind:
    if column in options.categorical:
        if seen == "float" and not text:
            raise ValueError(f"{name}: categorical= takes text and integers, and {column!r} holds {seen} values")
        return "integer" if seen in ("integer", "count") else "string"
    if column in options.numeric:
        if seen == "string":
            raise ValueError(f"{name}: numeric= takes columns of numbers, and {column!r} holds {seen} values")
        return "float" if seen == "float" else "count"
    if usual == "count" and seen in ("integer", "count", None):
        return "count"
    if usual is not None and seen == "count":
        return "integer" if not text else "string"
    return "string" if seen is None or (text and usual == "string") else seen


def check_distinct(name: str, columns: Iterable[str]) -> None:
    """Raise a ValueError if two columns of the input `name` have the same name."""
    seen: set[str] = set()
    for column in columns:
        if column in seen:
            raise ValueError(f"{name}: two columns are named {column!r}")
        seen.add(column)


def first_per_row(faults: Iterable[Fault]) -> list[Fault]:
    """Return the first fault of each row."""
    first: dict[int, str] = {}
    for row, reason in faults:
        first.setdefault(row, reason)
    return list(first.items())
