"""Gather the facts for a report on a model, from its directory and from data scored with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import hashemb
from hashemb.ctr.data import read_ahead
from hashemb.ctr.metrics import StreamingMetrics, gauc
from hashemb.ctr.report.inspection import Facts, describe
from hashemb.ctr.report.occupancy import FieldCollisions, KeyCensus, RowNorms, row_norms
from hashemb.ctr.training import LearningCurve, ModelCard, ProgressRow, SourcePosition, load_model, open_for_scoring

if TYPE_CHECKING:
    from hashemb.ctr.data import Batch, Reader

__all__ = ["Evaluation", "MemoryPoint", "RunFacts", "evaluate", "gather", "memory_point"]

Progress = Callable[[int, int], None]


@dataclass
class Evaluation:
    """Evaluation of a model on data.

    Attributes
    ----------
    paths : list of str
        The data files; empty for metrics from training.
    metrics : StreamingMetrics
        Metrics of the predictions.
    gauc : float or None
        GAUC, if a user column was given.
    bad_rows : int
        Number of rows in the data that could not be used.
    collisions : list of FieldCollisions
        Collisions among the data's distinct keys; empty without data.
    """

    paths: list[str]
    metrics: StreamingMetrics
    gauc: float | None = None
    bad_rows: int = 0
    collisions: list[FieldCollisions] = field(default_factory=list)


@dataclass(frozen=True)
class MemoryPoint:
    """Quality and size of a model: `disk_bytes` is the size of its table, including optimiser state."""

    name: str
    num_embeddings: int
    embedding_dim: int
    dtype: str
    disk_bytes: int
    auc: float
    logloss: float


@dataclass
class RunFacts:
    """All facts on a page about one model.

    Attributes
    ----------
    name : str
        Last part of the model's path.
    settings : list of (str, str)
        Facts about the table and the model, as (name, value).
    sources : dict of str to SourcePosition
        The files that the model has learned.
    curve : list of ProgressRow
        Learning curve of the first pass, in which every example was unseen.
    passes : int
        The current pass, or the last one.
    learning : StreamingMetrics
        Metrics of the current pass, from before each example was learned.
    evaluation : Evaluation or None
        Evaluation on the given data.
    stats : TableStats
        Statistics of the table.
    num_hashes : int
        Number of rows per key.
    norms : RowNorms
        Norms of the rows.
    memory : list of MemoryPoint
        This model, then the models that it is compared with.
    """

    name: str
    settings: Facts
    sources: dict[str, SourcePosition]
    curve: list[ProgressRow]
    passes: int
    learning: StreamingMetrics
    evaluation: Evaluation | None
    stats: hashemb.TableStats
    num_hashes: int
    norms: RowNorms
    memory: list[MemoryPoint]


def gather(
    run: str | os.PathLike[str],
    files: Sequence[str | os.PathLike[str]] = (),
    *,
    user: str | None = None,
    compare: Sequence[str | os.PathLike[str]] = (),
    progress: Progress | None = None,
    **reading: Any,
) -> RunFacts:
    """Gather the facts about the model in the directory `run`.

    Parameters
    ----------
    run : path
        Directory of the model.
    files : sequence of path
        Labelled data to score. Without files, the metrics are those from training.
    user : str, optional
        Field that holds the user of each impression, for GAUC.
    compare : sequence of path
        Other models, to compare AUC and memory.
    progress : callable, optional
        Called with the bytes and examples scored so far.
    **reading
        `data_format` and `label` as for `open_for_scoring`.

    Raises
    ------
    ValueError
        A field does not exist, the data has no labels, or a user column is given without data.
    FileNotFoundError, FormatError
        As for `load_model`.
    """
    if user is not None and not files:
        raise ValueError(f"GAUC by {user!r} needs data to score")
    model, card = load_model(run)
    with closing(model.table) as table:
        evaluation = evaluate(model, card, files, user=user, progress=progress, **reading) if files else None
        stats, norms = table.stats(), row_norms(table)
        settings = [fact for fact in describe(run) if fact[0] != "size, in memory"]  # not a fact about the model
    others = [memory_point(path, files, **reading) for path in compare]
    first = card.progress.get("rows" if card.progress.get("pass") == 1 else "first_pass_rows", [])
    learning = learning_metrics(card)
    return RunFacts(
        name=Path(run).absolute().name,
        settings=settings,
        sources=card.sources,
        curve=list(LearningCurve.from_json(first)),
        passes=card.progress.get("pass", 0),
        learning=learning,
        evaluation=evaluation,
        stats=stats,
        num_hashes=hashemb.info(run).num_hashes,
        norms=norms,
        memory=[_point(run, stats.disk_bytes, evaluation.metrics if evaluation else learning), *others],
    )


def evaluate(
    model: Any,
    card: ModelCard,
    files: Sequence[str | os.PathLike[str]],
    *,
    user: str | None = None,
    progress: Progress | None = None,
    **reading: Any,
) -> Evaluation:
    """Score labelled files; return their metrics and collisions.

    Memory grows with the number of distinct keys and, with a user column, by 20 bytes per example.
    """
    with open_for_scoring(card, files, strict=False, **reading) as reader:
        column = _column_of(user, reader)
        census, metrics, negatives = KeyCensus(reader.field_names), StreamingMetrics(), card.negatives()
        scored: list[tuple[Any, Any, Any]] = []
        with closing(read_ahead(reader)) as batches:
            for batch in batches:
                if batch.labels is None:
                    raise ValueError(f"{os.fspath(files[0])}: no labels to compare predictions with")
                probabilities = model.predict_proba(batch.keys, **batch.features())
                probabilities = probabilities if negatives is None else negatives.corrected(probabilities)
                metrics.update(batch.labels, probabilities, batch.weights)
                census.add(batch)
                if column is not None:
                    scored.append((batch.labels, probabilities, _users(batch, column)))
                if progress is not None:
                    progress(reader.bytes_read, metrics.examples)
        return Evaluation(
            paths=[os.fspath(path) for path in files],
            metrics=metrics,
            gauc=gauc(*(np.concatenate(part) for part in zip(*scored, strict=True))) if scored else None,
            bad_rows=reader.report.rows_bad,
            collisions=census.collisions(model.table),
        )


def _column_of(user: str | None, reader: Reader) -> int | None:
    if user is None:
        return None
    if user not in reader.field_names:
        raise ValueError(f"no field {user!r} to tell users by; the model has {', '.join(reader.field_names)}")
    return reader.field_names.index(user)


def _users(batch: Batch, column: int) -> npt.NDArray[np.uint64]:
    if batch.keys.ndim != 2:
        raise ValueError("users can't be told apart in data whose examples have several values of a field, or none")
    return batch.keys[:, column].copy()


def memory_point(
    run: str | os.PathLike[str], files: Sequence[str | os.PathLike[str]] = (), **reading: Any
) -> MemoryPoint:
    """Return AUC and size of another model: the AUC is measured on the files or, without files, during training."""
    model, card = load_model(run)
    with closing(model.table) as table:
        metrics = evaluate(model, card, files, **reading).metrics if files else learning_metrics(card)
        return _point(run, table.stats().disk_bytes, metrics)


def _point(run: str | os.PathLike[str], disk_bytes: int, metrics: StreamingMetrics) -> MemoryPoint:
    info = hashemb.info(run)
    return MemoryPoint(
        Path(run).absolute().name, info.num_embeddings, info.embedding_dim, info.dtype, disk_bytes,
        metrics.auc, metrics.logloss,
    )  # fmt: skip


def learning_metrics(card: ModelCard) -> StreamingMetrics:
    """Return the metrics of the current pass, or the last one; empty before the first pass."""
    return StreamingMetrics.from_state_dict(card.progress["metrics"]) if card.progress else StreamingMetrics()
