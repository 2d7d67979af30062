"""Score files with a trained model: one probability per example, in the order of the input."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt

from hashemb.ctr.data import Format, Reader, open_reader, read_ahead
from hashemb.ctr.models import HashedModel
from hashemb.ctr.training.model_dir import ModelCard
from hashemb.ctr.training.negatives import NegativeSampling

__all__ = ["ScoreBatch", "open_for_scoring", "score", "write_probabilities"]


class ScoreBatch(NamedTuple):
    """Probabilities of consecutive examples, float32 (n,), and their labels where the file has any."""

    probabilities: npt.NDArray[np.float32]
    labels: npt.NDArray[np.float32] | None


def open_for_scoring(
    card: ModelCard,
    paths: Sequence[str | os.PathLike[str]],
    *,
    data_format: Format | None = None,
    label: str | None = None,
    strict: bool = True,
) -> Reader:
    """Open a reader of `paths` that encodes keys as the model was trained on.

    The reader is strict by default: if a bad line were skipped, the probabilities would no longer match the lines.
    """
    return open_reader(
        paths,
        format=data_format or card.data_format,
        label=label or card.label,
        schema=card.schema or None,
        label_values=card.label_values,
        batch_size=card.batch_size,
        strict=strict,
    )


def score(
    model: HashedModel, reader: Reader, negatives: NegativeSampling | None = None
) -> Generator[ScoreBatch, None, None]:
    """Score the batches of `reader` one at a time; `negatives` is the result of `ModelCard.negatives`."""
    with closing(read_ahead(reader, depth=8)) as batches:
        for batch in batches:
            probabilities = model.predict_proba(batch.keys, **batch.features())
            yield ScoreBatch(probabilities if negatives is None else negatives.corrected(probabilities), batch.labels)


def write_probabilities(file: IO[str], probabilities: npt.NDArray[np.float32]) -> None:
    """Write one number per line, with the fewest digits that yield the same float32 when read back."""
    if len(probabilities):
        file.write("\n".join(probabilities.astype(str).tolist()) + "\n")
