"""The plan of a run of training: everything that its options and its first files decide, before anything is changed.

The first file is opened once. What is read to infer the schema and the number of examples is what the run learns first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from hashemb.ctr.data import STDIN, Format, Reader, is_stream, without_compression_suffix
from hashemb.ctr.models import HashedModel
from hashemb.ctr.training.checkpoints import Checkpoints
from hashemb.ctr.training.model_dir import ModelCard, training_lock
from hashemb.ctr.training.negatives import Correction, NegativeSampling, agreed_sampling
from hashemb.ctr.training.options import ModelOptions, create_model, new_card, open_or_create
from hashemb.ctr.training.progressive import Schedule
from hashemb.ctr.training.sources import Columns, check_paths, open_source
from hashemb.ctr.training.trainer import Trainer

__all__ = ["TrainOptions", "TrainPlan", "default_table"]

SMALL_EXAMPLES = 50_000
LOG_FORMATS = ("criteo", "vw")  # formats of streams, which are read once


@dataclass(frozen=True)
class TrainOptions:
    """Options of a run of training. `None`: not given; a new model then uses the default, another keeps its value.

    Attributes
    ----------
    files : sequence of Path
        Files to learn, in order.
    table : Path, optional
        Directory of the model. Default `default_table` of the files.
    model : ModelOptions
        Options that are fixed when a model is created.
    columns : Columns
        Kinds of columns, and the label that means 1.
    data_format, label : str, optional
        Format of the files and name of the label column.
    batch_size, passes : int, optional
        Number of examples per update, and number of times that each file is to be learned, earlier runs included.
    strict, schedule, label_delay, save_seconds
        As for `Trainer`.
    negative_rate, negative_correction : float and str, optional
        As for `NegativeSampling`.
    snapshots, deltas : Path, optional
        Directories of `Checkpoints`; `deltas` needs `snapshots`.
    """

    files: Sequence[Path]
    table: Path | None = None
    model: ModelOptions = field(default_factory=ModelOptions)
    columns: Columns = field(default_factory=Columns)
    data_format: Format | None = None
    label: str | None = None
    batch_size: int | None = None
    passes: int | None = None
    strict: bool = False
    schedule: Schedule | None = None
    negative_rate: float | None = None
    negative_correction: Correction | None = None
    label_delay: float = 0.0
    save_seconds: float = 60.0
    snapshots: Path | None = None
    deltas: Path | None = None


class Pace(NamedTuple):
    """How fast a new model learns: examples per update, passes over the files, and the examples of its warm-up."""

    batch_size: int
    passes: int
    warm_up: int = 1 << 17


LOG_PACE, TABLE_PACE = Pace(1024, 1), Pace(32, 10)
CHOSEN_MODEL_PASSES = 5


class NewModel(NamedTuple):
    """A model that is to be created: its options, complete, and the card to start with, and what was read for them."""

    options: ModelOptions
    card: ModelCard
    first: Reader | None  # of the first file, at its beginning; None for a stream
    examples: int | None  # of a small table


class TrainPlan:
    """What a run of training will do; a context manager, which closes the first file.

    For a new model, the files determine how they are read and how many passes are made over them. Small tables, which
    hold all the examples there are, are learned in small batches and in several passes; logs and large files are
    learned in one pass. A stream can be read only once, so it is not opened before the run.

    Parameters
    ----------
    options : TrainOptions
        What the caller asks for.

    Attributes
    ----------
    directory : Path
        Directory of the model.
    new : NewModel or None
        The model to create; None if the directory exists.

    Raises
    ------
    ValueError, OSError
        The options contradict each other, or a file cannot be read. Nothing has been created or changed.
    """

    def __init__(self, options: TrainOptions) -> None:
        agreed_sampling(None, options.negative_rate, options.negative_correction)
        names = check_paths(options.files, passes=options.passes or 1)
        self.options = options
        self.directory = options.table or default_table(options.files)
        self.new = None if self.directory.exists() else _plan_new_model(names, options)

    def __enter__(self) -> TrainPlan:
        return self

    def __exit__(self, *error: object) -> None:
        if self.new is not None and self.new.first is not None:
            self.new.first.close()

    @contextmanager
    def trainer(self, notify: Callable[[str], None]) -> Iterator[Trainer]:
        """Create or open the model, and yield a trainer that holds its lock; close the model afterwards.

        `notify` is called with each line that describes what was restored and what was chosen.

        Raises
        ------
        ValueError
            The options differ from those that the model was created with.
        HashembError
            Another trainer holds the lock, the directory is not a model, or no checkpoint can be restored.
        """
        checkpoints = self._checkpoints(notify)
        model, card = self._open_model()
        with closing(model.table), training_lock(self.directory):
            if self.new is not None:
                for line in _choices(self.new):
                    notify(line)
            self._agree(card, is_trained=bool(model.table.step))
            yield self._trainer(model, card, checkpoints)

    def _checkpoints(self, notify: Callable[[str], None]) -> Checkpoints | None:
        """Return the checkpoints, if requested, after restoring the last one if the trainer was killed."""
        if self.options.snapshots is None:
            return None
        checkpoints = Checkpoints(self.options.snapshots, self.options.deltas)
        step = checkpoints.resume(self.directory)
        if step is not None:
            notify(f"{self.directory}: a run was killed; back to the checkpoint at step {step:,}")
        return checkpoints

    def _open_model(self) -> tuple[HashedModel, ModelCard]:
        if self.new is not None:
            return create_model(self.directory, self.new.options, self.new.card)
        return open_or_create(self.directory, self.options.model)

    def _agree(self, card: ModelCard, *, is_trained: bool) -> None:
        """Write the options of this run to the card."""
        options = self.options
        card.data_format = options.data_format or card.data_format
        card.label = options.label or card.label
        if options.batch_size:
            card.batch_size, card.warm_up = options.batch_size, 0
        learned_with = NegativeSampling(card.negative_rate, card.negative_correction) if is_trained else None
        sampling = agreed_sampling(learned_with, options.negative_rate, options.negative_correction)
        card.negative_rate, card.negative_correction = sampling.rate, sampling.correction

    def _trainer(self, model: HashedModel, card: ModelCard, checkpoints: Checkpoints | None) -> Trainer:
        options = self.options
        return Trainer(
            self.directory,
            model,
            card,
            options.files,
            passes=options.passes or card.passes,
            strict=options.strict,
            schedule=options.schedule,
            label_delay=options.label_delay,
            save_seconds=options.save_seconds,
            columns=options.columns,
            checkpoints=checkpoints,
            first=None if self.new is None else self.new.first,
        )


def default_table(files: Sequence[Path]) -> Path:
    """Return the default directory of a model: ``<stem>.model`` in the working directory.

    >>> default_table([Path("data/clicks.csv.gz")]).name
    'clicks.model'

    Raises
    ------
    ValueError
        The first file is standard input, which has no name.
    """
    if str(files[0]) == STDIN:
        raise ValueError("standard input has no name to call the model by: say where it goes with --table")
    return Path(Path(without_compression_suffix(str(files[0]))).stem + ".model")


def _plan_new_model(names: Sequence[str], options: TrainOptions) -> NewModel:
    """Infer from the files how they are read and learned."""
    looked_at = ModelCard(rank=0, data_format=options.data_format or "auto", label=options.label)
    with ExitStack() as stack:
        first = None
        if not is_stream(names[0]):
            first = stack.enter_context(open_source(looked_at, names[0], options.columns, strict=options.strict))
        examples = _count_examples(looked_at, first, names[1:], options.columns)
        model, pace = _choose(options.model, examples)
        model = replace(model, num_fields=model.num_fields or len(looked_at.schema) or None).filled()
        card = replace(
            new_card(model),
            data_format=looked_at.data_format,
            schema=looked_at.schema,
            label=looked_at.label,
            label_values=looked_at.label_values,
            **pace._asdict(),
        )
        stack.pop_all()
        return NewModel(model, card, first, examples)


def _count_examples(card: ModelCard, first: Reader | None, others: Sequence[str], columns: Columns) -> int | None:
    """Count the examples of the files, and add their fields to the card; None if they are a log, a stream or many."""
    count = None if first is None else _count_small(card, first, SMALL_EXAMPLES)
    for name in others:
        if count is None or is_stream(name):
            return None
        with open_source(card, name, columns) as reader:
            more = _count_small(card, reader, SMALL_EXAMPLES - count)
        count = None if more is None else count + more
    return count


def _count_small(card: ModelCard, reader: Reader, most: int) -> int | None:
    count = None if reader.format in LOG_FORMATS else reader.look_ahead(most)
    if count is not None:
        card.schema = dict(reader.schema)
    return count


def _choose(options: ModelOptions, examples: int | None) -> tuple[ModelOptions, Pace]:
    """Choose logistic regression with a high learning rate for a small table, unless other options are given.

    On six of seven small tables its AUC was within .01 of scikit-learn's logistic regression on the same keys,
    while factors fitted the noise (docs/howto/train.md); they overfit less after 5 passes than after 10.
    """
    if examples is None:
        return options, LOG_PACE
    asked_for = (options.model, options.rank, options.optimizer, options.lr, options.initial_accumulator)
    if any(value is not None for value in asked_for):
        return options, TABLE_PACE._replace(passes=CHOSEN_MODEL_PASSES)
    return replace(options, model="lr", lr=0.1, initial_accumulator=1.0), TABLE_PACE


def _choices(new: NewModel) -> Iterator[str]:
    """Yield lines that describe the choices made for a new model."""
    card = new.card
    if card.label_values is not None:
        negative, positive = card.label_values
        yield f"Label {card.label!r}: {positive!r} is 1, {negative!r} is 0 (--positive chooses the other)."
    if new.examples is not None:
        kinds = Counter(card.schema.values())
        yield f"Fields: {', '.join(f'{count} {kind}' for kind, count in kinds.items())} (--numeric, --categorical)."
        how = f"{card.passes} passes in batches of {card.batch_size}"
        yield f"{new.examples:,} examples, a small table: {how} (--model, --passes, --batch-size)."
