"""Learning files into a model directory, in an order and in batches that an interruption doesn't change.

Invariant: after every batch the pair (table, card) says exactly which examples have been learned. Batches never
span two files and are cut at multiples of the batch size from a file's beginning, so a run that was stopped between
two batches and started again takes the same batches, and ends with the same bits, as one that was not.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hashemb.ctr.checkpoints import Checkpoints
from hashemb.ctr.model_dir import ModelCard, SourcePosition, write_card
from hashemb.ctr.models import HashedModel
from hashemb.ctr.progressive import ProgressiveValidator, ProgressRow, Schedule
from hashemb.ctr.readahead import read_ahead
from hashemb.ctr.readers import BadLine, Reader, open_reader

__all__ = ["BadLines", "TrainStep", "Trainer", "check_paths", "is_stream", "open_source"]


@dataclass
class BadLines:
    """Lines that readers could not use: how many, and the first 20 of them."""

    count: int = 0
    first: list[BadLine] = field(default_factory=list)

    def add(self, reader: Reader) -> None:
        """Take over the report of a reader that is done."""
        self.count += reader.report.rows_bad
        self.first = (self.first + list(reader.report.bad_lines))[:20]


@dataclass(frozen=True)
class TrainStep:
    """What one batch brought.

    Attributes
    ----------
    path : str
        File of the batch.
    pass_number : int
        1 for the first pass; figures of later passes are of examples that have been learned before.
    rows : list of ProgressRow
        Rows of the progressive table that fell due.
    examples : int
        Examples learned in this run.
    bytes_done : int
        Bytes of all the run's work done so far, of `Trainer.bytes_total`.
    """

    path: str
    pass_number: int
    rows: list[ProgressRow]
    examples: int
    bytes_done: int


class Trainer:
    """Learns files, keeps their positions, and saves them.

    Parameters
    ----------
    directory : path
        Model directory; hold its `training_lock`.
    model : HashedModel
        On the directory's table, open "r+".
    card : ModelCard
        The directory's card; updated in place.
    paths : sequence of path
        Files to learn, in order. Those the card knows are taken up where they were left.
    passes : int
        How many times each file is to be learned in all, earlier runs included.
    strict : bool
        Stop at the first bad line instead of counting it.
    schedule : Schedule, optional
        Of the progressive table.
    save_seconds : float
        Save when this long has passed since the last time.
    checkpoints : Checkpoints, optional
        Take one with every save, the first before anything is learned.

    Raises
    ------
    ValueError
        A file given twice, or replaced since it was half learned.
    FileNotFoundError
        No such file.

    Notes
    -----
    Iterating over `run` does the work; stop at any step and call `save`, and a later trainer goes on from there.
    After a kill it goes on from the last save: the examples of up to `save_seconds` are learned twice. With
    `checkpoints` none are, if `Checkpoints.resume` has put the model back to the last one.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        model: HashedModel,
        card: ModelCard,
        paths: Sequence[str | os.PathLike[str]],
        *,
        passes: int = 1,
        strict: bool = False,
        schedule: Schedule | None = None,
        save_seconds: float = 60.0,
        checkpoints: Checkpoints | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.directory, self.model, self.card = directory, model, card
        self.passes, self.strict, self.schedule = passes, strict, schedule
        self.save_seconds, self._clock = save_seconds, clock
        self.checkpoints = checkpoints
        self.bad_lines = BadLines()
        self.examples = 0
        self.pass_number = 0
        self.validator: ProgressiveValidator | None = None
        self.sources = {name: _position(card, name) for name in check_paths(paths)}
        if passes > 1 and any(is_stream(path) for path in self.sources):
            raise ValueError(f"standard input and pipes can be read once, not {passes} times")
        self.bytes_total = sum(
            position.size_bytes * max(0, passes - position.passes) for position in self.sources.values()
        )
        self._bytes_finished = 0

    @property
    def finished(self) -> bool:
        """Whether every file has been learned as often as asked."""
        return all(position.passes >= self.passes for position in self.sources.values())

    def run(self) -> Generator[TrainStep, None, None]:
        """Learn what is left to learn, one batch a step."""
        if self.checkpoints is not None:
            self.save()
        saved_at = self._clock()
        for number in range(1, self.passes + 1):
            for path, position in self.sources.items():
                if position.passes >= number:
                    continue
                self._start_pass(number)
                for step in self._learn_file(path, position):
                    yield step
                    if self._clock() - saved_at >= self.save_seconds:
                        self.save()
                        saved_at = self._clock()
            yield from self._close_pass(number)

    def save(self) -> None:
        """Write the table to its disk, then the card that says what it holds."""
        self.model.table.flush()
        kept = {path: position for path, position in self.sources.items() if not is_stream(path)}
        self.card.sources.update(kept)
        self.card.table_step = self.model.table.step
        if self.validator is not None:
            self.card.progress = {"pass": self.pass_number, **self.validator.state()}
        write_card(self.directory, self.card)
        if self.checkpoints is not None:
            self.checkpoints.take(self.model.table, self.card)

    def _start_pass(self, number: int) -> None:
        """Begin, or take up again, the metrics of pass `number`."""
        if self.validator is not None and self.pass_number == number:
            return
        state: dict[str, Any] | None = None
        if self.validator is None and self.card.progress.get("pass") == number:
            state = self.card.progress
        self.pass_number = number
        self.validator = ProgressiveValidator(self.model, self.schedule, state=state)

    def _close_pass(self, number: int) -> Iterator[TrainStep]:
        """The last row of a pass that this run has worked on."""
        row = self.validator.last_row() if self.validator and self.pass_number == number else None
        if row is not None:
            path = next(reversed(self.sources))
            yield TrainStep(path, number, [row], self.examples, self._bytes_finished)

    def _learn_file(self, path: str, position: SourcePosition) -> Iterator[TrainStep]:
        assert self.validator is not None
        reader = open_source(self.card, path, start=position.rows, strict=self.strict)
        batches = read_ahead(reader)
        try:
            for batch in batches:
                assert batch.labels is not None
                rows = self.validator.learn(batch.keys, batch.labels)
                position.rows += len(batch.labels)
                self.examples += len(batch.labels)
                done = self._bytes_finished + reader.bytes_read
                yield TrainStep(path, self.pass_number, rows, self.examples, done)
            position.passes, position.rows, position.rows_per_pass = position.passes + 1, 0, position.rows
            self._bytes_finished += position.size_bytes
        finally:
            batches.close()
            reader.close()
            self.bad_lines.add(reader)


def open_source(card: ModelCard, path: str, *, start: int = 0, strict: bool = False) -> Reader:
    """Open a labelled file as the card says; the first one ever decides how all others are read.

    Raises
    ------
    ValueError
        The file is of no known format, lacks a field that the model was trained on, or has no labels.
    """
    reader = open_reader(
        [path],
        format=card.data_format,
        label=card.label,
        schema=card.schema or None,
        batch_size=card.batch_size,
        strict=strict,
        start=start,
    )
    if reader.schema and reader.label is None:
        reader.close()
        wanted = f"column {card.label!r}" if card.label else "label column"
        raise ValueError(f"{path}: no {wanted} to learn from; it has the fields {', '.join(reader.schema)}")
    if not card.schema:
        card.schema, card.label = dict(reader.schema), reader.label
    return reader


def check_paths(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The paths as the card names them: absolute, but for standard input and pipes.

    Raises
    ------
    ValueError
        One is given twice.
    FileNotFoundError
        One does not exist.
    """
    names: list[str] = []
    for path in paths:
        name = os.fspath(path) if is_stream(path) else str(Path(path).absolute())
        if name in names:
            raise ValueError(f"{os.fspath(path)} is given twice; to learn it again, raise passes")
        names.append(name)
    return names


def _position(card: ModelCard, path: str) -> SourcePosition:
    """Where to take up the file."""
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


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is standard input or a pipe: read once, with no position to come back to."""
    return os.fspath(path) == "-" or stat.S_ISFIFO(os.stat(path).st_mode)
