"""What a new model takes from its first files before it learns: how they are read, and how long to learn from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from hashemb.ctr._streams import without_compression_suffix
from hashemb.ctr.model_dir import ModelCard
from hashemb.ctr.trainer import Columns, is_stream, open_source

__all__ = ["Plan", "default_table", "look", "reading_text"]

SMALL_EXAMPLES = 50_000
LOG_FORMATS = ("criteo", "vw")  # of streams, which come once
LOG_BATCH, TABLE_BATCH = 256, 32
ENOUGH_EXAMPLES, MAX_PASSES = 20_000, 5


class Plan(NamedTuple):
    """Examples per update and passes, and how many examples there are; None: many, or a log."""

    batch_size: int = LOG_BATCH
    passes: int = 1
    examples: int | None = None

    def settle(self, card: ModelCard, looked_at: ModelCard) -> None:
        """Write into the card of a new model how `looked_at` says to read, and this."""
        card.schema, card.label, card.label_values = looked_at.schema, looked_at.label, looked_at.label_values
        card.batch_size, card.passes = self.batch_size, self.passes


def default_table(files: Sequence[Path]) -> Path:
    """The model's directory where none is named: ``<stem>.model`` in the working directory.

    >>> default_table([Path("data/clicks.csv.gz")]).name
    'clicks.model'

    Raises
    ------
    ValueError
        The first file is standard input, which has no name.
    """
    if str(files[0]) == "-":
        raise ValueError("standard input has no name to call the model by: say where it goes with --table")
    return Path(Path(without_compression_suffix(str(files[0]))).stem + ".model")


def look(card: ModelCard, files: Sequence[Path], columns: Columns) -> Plan:
    """Take from the files how they are read, into `card`, and how to learn from them.

    Small tables, whose examples are all there is, are learned in small batches and more than once; logs and large
    files are learned once, as they come. A pipe can't be looked at.

    Raises
    ------
    ValueError
        As `open_source`: before anything is made.
    """
    examples = 0
    for path in files:
        if is_stream(path):
            return Plan()
        with open_source(card, str(path), columns) as reader:
            if reader.format in LOG_FORMATS:
                return Plan()
            for batch in reader:
                examples += batch.num_examples
                if examples > SMALL_EXAMPLES:
                    return Plan()
            card.schema = dict(reader.schema)
    passes = min(MAX_PASSES, max(1, round(ENOUGH_EXAMPLES / max(1, examples))))
    return Plan(TABLE_BATCH, passes, examples)


def reading_text(card: ModelCard, plan: Plan) -> Iterator[str]:
    """Lines on what was decided for a new model without being asked."""
    if card.label_values is not None:
        negative, positive = card.label_values
        yield f"Label {card.label!r}: {positive!r} is 1, {negative!r} is 0 (--positive chooses the other)."
    if plan.examples is not None:
        kinds = Counter(card.schema.values())
        yield f"Fields: {', '.join(f'{count} {kind}' for kind, count in kinds.items())} (--numeric, --categorical)."
        times = "once" if plan.passes == 1 else f"{plan.passes} times"
        yield f"{plan.examples:,} examples, learned {times} in batches of {plan.batch_size} (--passes, --batch-size)."
