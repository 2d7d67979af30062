"""Describe the contents of a directory: the table's geometry, occupancy and size, and its model, if any."""

from __future__ import annotations

import os
from pathlib import Path

import hashemb
from hashemb._text import format_bytes
from hashemb.ctr.metrics import StreamingMetrics
from hashemb.ctr.training import MODEL_FILE, ModelCard, read_card
from hashemb.errors import HashembError

__all__ = ["describe", "steps_lost"]

Facts = list[tuple[str, str]]


def describe(directory: str | os.PathLike[str], *, exact: bool = False) -> Facts:
    """Return facts about a table, and about its model if there is one, as (name, value) lines.

    Parameters
    ----------
    directory : path
        Directory of the table.
    exact : bool
        Count the touched rows by reading every block ever written, instead of using the table's own count.
    """
    facts = _table_facts(directory, exact)
    if Path(directory, MODEL_FILE).exists():
        facts += _model_facts(read_card(directory))
    return facts


def steps_lost(table: str | os.PathLike[str], snapshot: str | os.PathLike[str]) -> str:
    """Describe in a sentence what is lost when a snapshot replaces a table.

    Raises
    ------
    ValueError
        The snapshot was taken of another table.
    """
    kept = hashemb.info(snapshot)
    try:
        damaged = hashemb.info(table)
    except (HashembError, OSError):
        return f"The snapshot is of step {kept.step:,}; what was learned after it is lost."
    if damaged.id != kept.id:
        raise ValueError(f"{os.fspath(snapshot)} is of table {kept.id}, {os.fspath(table)} is table {damaged.id}")
    return f"The snapshot is of step {kept.step:,}, the table of step {damaged.step:,}: what lies between is lost."


def _table_facts(directory: str | os.PathLike[str], exact: bool) -> Facts:
    info = hashemb.info(directory)
    with hashemb.open(directory, mode="r") as table:
        stats = table.stats(exact=exact)
    share = stats.rows_touched / stats.num_embeddings
    resident = "unknown" if stats.resident_bytes is None else format_bytes(stats.resident_bytes)
    return [
        ("table", info.path),
        ("geometry", f"{info.num_embeddings:,} rows x {info.embedding_dim}"),
        ("dtype", info.dtype),
        ("optimizer", f"{info.optimizer}"),
        ("learning rate", f"{info.lr:g}"),
        ("init", f"{info.init}"),
        ("hashes per key", f"{info.num_hashes}"),
        ("seed", f"{info.seed}"),
        ("step", f"{info.step:,}"),
        ("rows touched", f"{stats.rows_touched:,} ({share:.2%}{', counted' if stats.exact else ''})"),
        ("distinct keys", f"{stats.estimated_distinct_keys:,.0f} (estimated)"),
        ("collision rate", f"{stats.collision_rate:.2%} of keys share every row (expected)"),
        ("size, logical", format_bytes(stats.logical_bytes)),
        ("size, on disk", format_bytes(stats.disk_bytes)),
        ("size, in memory", resident),
        ("format", f"{info.format}, made by {info.created_by}"),
    ]


def _model_facts(card: ModelCard) -> Facts:
    facts: Facts = [
        ("model", card.description),
        ("fields", f"{len(card.schema)}: {', '.join(card.schema)}" if card.schema else "none seen yet"),
        ("label", card.label or "none seen yet"),
        ("batch size", f"{card.batch_size:,}"),
    ]
    for path, position in card.sources.items():
        under_way = f", {position.rows:,} rows into the next" if position.rows else ""
        facts.append(("learned", f"{path}: {position.passes} pass{'' if position.passes == 1 else 'es'}{under_way}"))
    if card.progress:
        metrics = StreamingMetrics.from_state_dict(card.progress["metrics"])
        facts.append(
            (
                f"pass {card.progress['pass']}",
                f"{metrics.examples:,} examples: logloss {metrics.logloss:.6f}, "
                f"NE {metrics.normalized_entropy:.4f}, AUC {metrics.auc:.4f}",
            )
        )
    return facts
