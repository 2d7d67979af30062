"""Train a model directory on files, in an order and in batches that an interruption does not change.

Invariant: after every batch the pair (table, card) records exactly which examples have been learned. Batches never
span two files and are cut at multiples of the batch size from a file's beginning, so a run that is stopped between
two batches and resumed sees the same batches, and ends with the same bits, as an uninterrupted run.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hashemb.ctr._maths import DistinctKeys
from hashemb.ctr.data import BadLine, Batch, Reader, is_stream, number_keys, read_ahead
from hashemb.ctr.models import HashedModel
from hashemb.ctr.training.checkpoints import Checkpoints
from hashemb.ctr.training.model_dir import ModelCard, SourcePosition, write_card
from hashemb.ctr.training.progressive import ProgressiveValidator, ProgressRow, Schedule
from hashemb.ctr.training.sources import Columns, check_paths, open_source, position_in

__all__ = ["BadLines", "TrainStep", "Trainer"]

_READ_AHEAD_EXAMPLES = 1 << 15


@dataclass
class BadLines:
    """Number of lines that readers could not use, and the first 20 of them."""

    count: int = 0
    first: list[BadLine] = field(default_factory=list)

    def add(self, reader: Reader) -> None:
        """Add the report of a reader that has finished."""
        self.count += reader.report.rows_bad
        self.first = (self.first + list(reader.report.bad_lines))[:20]


@dataclass(frozen=True)
class TrainStep:
    """Result of training on one batch.

    Attributes
    ----------
    path : str
        File of the batch.
    pass_number : int
        1 for the first pass; metrics of later passes are measured on examples that have been learned before.
    rows : list of ProgressRow
        Rows of the progressive validation table that fell due.
    examples : int
        Examples learned in this run.
    bytes_done : int
        Bytes processed so far in this run, out of `Trainer.bytes_total`.
    """

    path: str
    pass_number: int
    rows: list[ProgressRow]
    examples: int
    bytes_done: int


class _Scored(NamedTuple):
    """Examples of a file that have been scored and may not have been learned yet."""

    position: SourcePosition
    examples: int
    is_end: bool = False  # of the file


class Trainer:
    """Trains a model on files, tracks the position in each file, and saves model and positions.

    Parameters
    ----------
    directory : path
        Model directory; the caller must hold its `training_lock`.
    model : HashedModel
        Model on the directory's table, which must be open in mode "r+".
    card : ModelCard
        The directory's card; it is updated in place.
    paths : sequence of path
        Files to learn, in order. Files that the card knows are resumed at their saved positions.
    passes : int
        Number of times that each file is to be learned in total, earlier runs included.
    strict : bool
        Stop at the first bad line instead of counting it.
    schedule : Schedule, optional
        Schedule of the progressive validation table.
    label_delay : float
        Number of examples after which a label is known, as for `ProgressiveValidator`. Positions count learned
        examples; examples that were waiting when a run stopped are read again by the next run, but not scored again.
    save_seconds : float
        Save when this much time has passed since the last save.
    columns : Columns, optional
        Column options for the first file of a new model.
    checkpoints : Checkpoints, optional
        Take a checkpoint with every save; the first is taken before anything is learned.
    first : Reader, optional
        The first file, already open at its beginning as the card of a new model specifies.

    Raises
    ------
    ValueError
        A file is given twice, or a partly learned file has been replaced.
    FileNotFoundError
        A file does not exist.

    Notes
    -----
    Iterating over `run` does the training. To stop, leave the iteration at any step and call `save`; a later trainer
    resumes from there. After a kill, training resumes from the last save, and the examples learned in up to
    `save_seconds` are learned twice. With `checkpoints` none are learned twice, provided that `Checkpoints.resume`
    has restored the model to the last checkpoint.
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
        label_delay: float = 0.0,
        save_seconds: float = 60.0,
        columns: Columns | None = None,
        checkpoints: Checkpoints | None = None,
        first: Reader | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.directory, self.model, self.card = directory, model, card
        self.passes, self.strict, self.schedule = passes, strict, schedule
        self.label_delay, self.save_seconds, self._clock = label_delay, save_seconds, clock
        self.columns, self.checkpoints = columns or Columns(), checkpoints
        self.bad_lines = BadLines()
        self._reported: set[str] = set()
        self.examples = 0
        self.pass_number = 0
        self.validator: ProgressiveValidator | None = None
        self.sources = {name: position_in(card, name) for name in check_paths(paths, passes=passes)}
        self._opened = {} if first is None else {next(iter(self.sources)): first}
        self.bytes_total = sum(
            position.size_bytes * max(0, passes - position.passes) for position in self.sources.values()
        )
        self._bytes_finished = 0
        self._unlearned: deque[_Scored] = deque()
        self._settled = 0  # the validator's examples that the positions include
        self._first_pass_rows = _first_pass_rows(card.progress)

    @property
    def finished(self) -> bool:
        """Whether every file has been learned `passes` times."""
        return all(position.passes >= self.passes for position in self.sources.values())

    def run(self) -> Generator[TrainStep, None, None]:
        """Learn the remaining examples, one batch per step."""
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
        """Flush the table to disk, then write the card that describes it."""
        self.model.table.flush()
        kept = {path: position for path, position in self.sources.items() if not is_stream(path)}
        self.card.sources.update(kept)
        self.card.table_step = self.model.table.step
        if self.validator is not None:
            self.card.progress = {"pass": self.pass_number, **self.validator.state()}
            self.card.progress["waiting"] -= self._waiting_from_streams()
            if self.pass_number > 1:
                self.card.progress["first_pass_rows"] = self._first_pass_rows
        write_card(self.directory, self.card)
        if self.checkpoints is not None:
            self.checkpoints.take(self.model.table, self.card)

    def _waiting_from_streams(self) -> int:
        """Count the waiting examples that cannot be read again."""
        return sum(entry.examples for entry in self._unlearned if not entry.position.digest)

    def _start_pass(self, number: int) -> None:
        """Start or resume the metrics of pass `number`."""
        if self.validator is not None and self.pass_number == number:
            return
        if self.validator is not None and self.pass_number == 1:
            self._first_pass_rows = self.validator.curve.to_json()
        state: dict[str, Any] | None = None
        if self.validator is None and self.card.progress.get("pass") == number:
            state = self.card.progress
        self.pass_number = number
        self._settled = 0
        self.validator = ProgressiveValidator(
            self.model,
            self.schedule,
            delay=self.label_delay,
            negatives=self.card.negatives(self.model.table.seed),
            state=state,
        )

    def _close_pass(self, number: int) -> Iterator[TrainStep]:
        """Yield the last row of pass `number`, if this run has worked on that pass."""
        if self.validator is None or self.pass_number != number:
            return
        self.validator.finish()
        self._settle()
        row = self.validator.last_row()
        if row is not None:
            path = next(reversed(self.sources))
            yield TrainStep(path, number, [row], self.examples, self._bytes_finished)

    def _learn_file(self, path: str, position: SourcePosition) -> Iterator[TrainStep]:
        assert self.validator is not None
        reader = self._open(path, position)
        depth = max(2, _READ_AHEAD_EXAMPLES // self.card.batch_size)
        batches = read_ahead(reader, depth, at_leisure=number_keys(DistinctKeys()))
        try:
            for batch in batches:
                rows = []
                for part in self._parts(batch):
                    rows += self.validator.learn(part)
                    self._unlearned.append(_Scored(position, part.num_examples))
                if len(reader.schema) > len(self.card.schema):
                    self.card.schema = dict(reader.schema)
                self._settle()
                self.examples += batch.num_examples
                done = self._bytes_finished + reader.bytes_read
                yield TrainStep(path, self.pass_number, rows, self.examples, done)
            self._unlearned.append(_Scored(position, 0, is_end=True))
            self._settle()
            self._bytes_finished += position.size_bytes
        finally:
            batches.close()
            reader.close()
            if path not in self._reported:  # later passes meet the same bad lines
                self._reported.add(path)
                self.bad_lines.add(reader)
            position.note_bad_lines(reader.report)

    def _open(self, path: str, position: SourcePosition) -> Reader:
        reader = self._opened.pop(path, None)
        if reader is None:
            return open_source(self.card, path, self.columns, start=position.rows, strict=self.strict)
        reader.batch_size = self.card.batch_size
        return reader

    def _parts(self, batch: Batch) -> list[Batch]:
        """Split a batch into the parts that are learned at once; after the first pass's warm-up it stays whole.

        A new model learns most from its first examples, but within one batch no example benefits from the ones before
        it; the parts therefore start small and grow. Every step ends at the end of a batch, so stopping does not
        change where parts are cut.
        """
        assert self.validator is not None
        size = batch.num_examples
        if self.pass_number == 1:
            size = self.card.warm_batch_size(self.validator.examples)
        if size >= batch.num_examples:
            return [batch]
        starts = range(0, batch.num_examples, size)
        return [batch.examples(start, min(start + size, batch.num_examples)) for start in starts]

    def _settle(self) -> None:
        """Advance the positions by the examples that have been learned."""
        assert self.validator is not None
        while self._unlearned and self._settled + self._unlearned[0].examples <= self.validator.learned:
            position, examples, is_end = self._unlearned.popleft()
            self._settled += examples
            position.rows += examples
            if is_end:
                position.passes, position.rows, position.rows_per_pass = position.passes + 1, 0, position.rows


def _first_pass_rows(progress: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = progress.get("rows" if progress.get("pass") == 1 else "first_pass_rows", [])
    return rows
