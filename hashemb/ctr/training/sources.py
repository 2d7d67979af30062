"""The files that a run learns: their names, how they are opened, and where each one is resumed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hashemb.ctr.data import Reader, is_stream, open_reader
from hashemb.ctr.training.model_dir import ModelCard, SourcePosition

__all__ = ["Columns", "check_paths", "open_source", "position_in"]


@dataclass(frozen=True)
class Columns:
    """Column options for the first file, as for `open_reader`; the model keeps the resulting schema."""

    numeric: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    positive: str | None = None

    def check_against(self, card: ModelCard) -> None:
        """Raise a ValueError if `card` was made with other options."""
        for option, names, kinds in (
            ("numeric", self.numeric, ("count", "float")),
            ("categorical", self.categorical, ("integer", "string")),
        ):
            for name in names:
                if card.schema.get(name) not in kinds:
                    made = f"reads it as {card.schema[name]}" if name in card.schema else "has no such field"
                    raise ValueError(f"{option} {name!r}: the model {made}; leave the option out")
        made_with = card.label_values or ("0", "1")
        if self.positive is not None and self.positive != made_with[1]:
            made = f"the model was made with {made_with[1]!r}"
            raise ValueError(f"positive {self.positive!r}: {made}; leave the option out")


def open_source(
    card: ModelCard, path: str, columns: Columns | None = None, *, start: int = 0, strict: bool = False
) -> Reader:
    """Open a labelled file as the card specifies.

    The first file of a model determines, together with `columns`, how all later files are read.

    Raises
    ------
    ValueError
        The file has no known format, lacks a field that the model was trained on, has no labels or has labels with
        more than two values; or `columns` contradicts the card.
    """
    columns = columns or Columns()
    if card.schema:
        columns.check_against(card)
        columns = Columns()
    reader = open_reader(
        [path],
        format=card.data_format,
        label=card.label,
        numeric=columns.numeric,
        categorical=columns.categorical,
        schema=card.schema or None,
        positive=columns.positive,
        label_values=card.label_values,
        batch_size=card.batch_size,
        strict=strict,
        start=start,
    )
    if reader.schema and reader.label is None:
        reader.close()
        wanted = f"column {card.label!r}" if card.label else "label column"
        raise ValueError(f"{path}: no {wanted} to learn from; it has the fields {', '.join(reader.schema)}")
    if not card.schema:
        card.schema, card.label, card.label_values = dict(reader.schema), reader.label, reader.label_values
    return reader


def check_paths(paths: Sequence[str | os.PathLike[str]], *, passes: int = 1) -> list[str]:
    """Return the paths as the card names them: absolute, except for standard input and pipes.

    Raises
    ------
    ValueError
        A path is given twice, or a stream is to be read in several passes.
    FileNotFoundError
        A path does not exist.
    """
    names: list[str] = []
    for path in paths:
        name = os.fspath(path) if is_stream(path) else str(Path(path).absolute())
        if name in names:
            raise ValueError(f"{os.fspath(path)} is given twice; to learn it again, raise passes")
        names.append(name)
    if passes > 1 and any(is_stream(name) for name in names):
        raise ValueError(f"standard input and pipes can be read once, not {passes} times")
    return names


def position_in(card: ModelCard, path: str) -> SourcePosition:
    """Return the position at which to resume the file."""
    if is_stream(path):
        return SourcePosition(0, "")
    known = card.sources.get(path)
    position = known.in_file(path) if known else None
    if known and known.rows and position is None:
        raise ValueError(
            f"{path} is another file than the one whose first {known.rows:,} rows have been learned (that had "
            f"{known.size_bytes:,} bytes): give the new one another name to learn it from its beginning"
        )
    return SourcePosition.of(path) if position is None else position
