"""What every format offers to the reader, and the rules that they share: which column is the label, what kind
the others are, what a label may look like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from hashemb.ctr._extras import require
from hashemb.ctr.fields import CRITEO_SCHEMA, Kind, Schema

__all__ = [
    "Block",
    "Fault",
    "Options",
    "Reject",
    "Source",
    "find_label",
    "first_per_row",
    "infer_schema",
    "parse_labels",
    "shown",
]

Fault = tuple[int, str]  # (row or line, reason)
Reject = Callable[[int, str], None]  # (line, reason); raises in strict mode

_LABEL_NAMES = ("label", "click")
_LABELS = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0}
_SHOWN_CHARACTERS = 40


class Block(NamedTuple):
    """Consecutive rows: float32 labels (None without a label column) and one Arrow array per field."""

    labels: npt.NDArray[np.float32] | None
    columns: dict[str, Any]

    @property
    def num_rows(self) -> int:
        """Rows in the block."""
        return len(next(iter(self.columns.values())))

    def without(self, rows: Iterable[int]) -> Block:
        """The block without `rows`."""
        rows = list(rows)
        if not rows:
            return self
        kept = np.delete(np.arange(self.num_rows), rows)
        taken = require("pyarrow").array(kept)
        labels = None if self.labels is None else self.labels[kept]
        return Block(labels, {name: column.take(taken) for name, column in self.columns.items()})


@dataclass(frozen=True)
class Options:
    """What the caller says about the columns."""

    label: str | None = None
    numeric: tuple[str, ...] = ()
    schema: Schema | None = None


class Source(Protocol):
    """One input of any format."""

    name: str
    label: str | None
    schema: dict[str, Kind]  # every field that the input has, with the kind it would be read as

    @property
    def bytes_read(self) -> int:
        """Bytes of the file, as stored, that have been taken so far."""

    def accepts(self, field: str, kind: Kind) -> bool:
        """Whether the column `field`, which it has, can be read as `kind`."""

    def blocks(self, schema: Schema, reject: Reject) -> Iterator[Block]:
        """The good rows in order, reduced to the fields of `schema`; the others go to `reject`."""

    def close(self) -> None:
        """Close the file."""


def find_label(
    name: str, columns: Sequence[str], first_values: Callable[[str], Any], options: Options
) -> str | None:
    """Which column is the label, by the rule of `open_reader`; `first_values` gives the beginning of a column."""
    fields = options.schema or {}
    if options.label is not None:
        if options.label in fields:
            raise ValueError(f"{options.label!r} is named as the label and as a field of the schema")
        if options.label not in columns and options.schema is None:
            raise ValueError(f"{name}: no column {options.label!r} for the label; it has {', '.join(columns)}")
        return options.label if options.label in columns else None
    for wanted in _LABEL_NAMES:
        for column in columns:
            if column.lower() == wanted and column not in fields:
                return column
    if options.schema is not None or not columns:
        return None
    labels, faults = parse_labels(first_values(columns[0]))
    return columns[0] if len(labels) and not faults else None


def infer_schema(
    name: str, kinds: Mapping[str, Kind | None], label: str | None, options: Options, *, text: bool
) -> dict[str, Kind]:
    """Kinds of the fields, from what their values look like (None: no values seen) and what the caller wants.

    An input that has all of Criteo's columns gets Criteo's kinds where they fit, so that the same data in
    another format gives the same keys. In `text` any column fits "string".
    """
    missing = [column for column in options.numeric if column not in kinds or column == label]
    if missing:
        raise ValueError(f"{name}: no column {missing[0]!r}, which numeric= names; it has {', '.join(kinds)}")
    usual = CRITEO_SCHEMA if set(CRITEO_SCHEMA) <= set(kinds) else {}
    schema: dict[str, Kind] = {}
    for column, kind in kinds.items():
        wanted = "count" if column in options.numeric else usual.get(column)
        if column == label:
            continue
        if wanted == "count" and kind in ("integer", None):
            schema[column] = "count"
        elif column in options.numeric:
            raise ValueError(f"{name}: numeric= takes columns of integers, and {column!r} holds {kind} values")
        else:
            schema[column] = "string" if kind is None or (text and wanted == "string") else kind
    return schema


def parse_labels(column: Any) -> tuple[npt.NDArray[np.float32], list[Fault]]:
    """Labels of an Arrow column of any type, float32 0/1, and the rows that hold neither.

    0 and 1 may come as integers, floats, booleans or text (``0``, ``1.0``, ``true`` …).
    """
    codes = column.dictionary_encode()
    values = [*codes.dictionary.to_pylist(), None]
    meaning = np.array([_label_of(value) for value in values], np.float32)
    indices = codes.indices.fill_null(len(values) - 1).to_numpy(zero_copy_only=False)
    labels = meaning[indices]
    bad = np.flatnonzero(np.isnan(labels))
    return labels, [(int(row), f"label must be 0 or 1, found {shown(values[indices[row]])}") for row in bad]


def _label_of(value: object) -> float:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        return _LABELS.get(value.lower(), np.nan)
    return float(value) if isinstance(value, (int, float)) and value in (0, 1) else np.nan


def first_per_row(faults: Iterable[Fault]) -> list[Fault]:
    """The first fault of each row."""
    first: dict[int, str] = {}
    for row, reason in faults:
        first.setdefault(row, reason)
    return list(first.items())


def shown(value: object) -> str:
    """`value` as it stands in a message: quoted, at most 40 characters; nothing for a missing one."""
    if value is None:
        return "nothing"
    text = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…")
