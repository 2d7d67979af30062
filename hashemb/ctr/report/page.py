"""The contents of a report: its sections, with a table for every figure. `page.html.j2` turns them into HTML."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

import hashemb
from hashemb._packages import require
from hashemb._text import format_bytes, printable
from hashemb.ctr.metrics import CalibrationBin, StreamingMetrics, expected_calibration_error
from hashemb.ctr.report.facts import RunFacts
from hashemb.ctr.report.figures import (
    MAX_BARS,
    calibration_figure,
    collision_figure,
    curve_figure,
    memory_figure,
    norm_figure,
)
from hashemb.ctr.training import ProgressRow
from hashemb.stats import collision_rate

__all__ = ["page"]

_SHOWN_ROWS = 20

_TEMPLATE = "page.html.j2"

Cells = Sequence[str]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: ClassVar = "text"


@dataclass(frozen=True)
class Figure:
    """A figure with its caption, which is also its text alternative."""

    svg: str
    caption: str
    kind: ClassVar = "figure"


@dataclass(frozen=True)
class Table:
    """A table, which scrolls separately on narrow screens; the first cell of each row is its heading."""

    caption: str
    head: Cells
    rows: Sequence[Cells]
    summary: str = ""  # of the closed element that contains the table, if any
    has_text: bool = False  # and not numbers
    kind: ClassVar = "table"


@dataclass(frozen=True)
class Lines:
    """A list in a closed element."""

    summary: str
    lines: Sequence[str]
    kind: ClassVar = "lines"


Parts = Iterator[Text | Figure | Table | Lines]


def page(facts: RunFacts) -> str:
    """Return the report as one HTML document that loads no other resources."""
    sections = [
        ("metrics", "How good it is", _metrics(facts)),
        ("curve", "Learning curve", _curve(facts)),
        ("calibration", "Calibration", _calibration(facts)),
        ("collisions", "Collisions", _collisions(facts)),
        ("norms", "Norms of rows", _norms(facts)),
        ("memory", "AUC against memory", _memory(facts)),
        ("data", "Data learned", _data(facts)),
        ("settings", "Settings", [Table("The table and the model", ("", ""), facts.settings, has_text=True)]),
    ]
    jinja = require("jinja2", "report")
    environment = jinja.Environment(
        loader=jinja.PackageLoader("hashemb.ctr.report", "."),
        autoescape=True,
        undefined=jinja.StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text: str = environment.get_template(_TEMPLATE).render(
        title=f"{facts.name}: report on a click-through-rate model", version=hashemb.__version__, sections=sections
    )
    return text


def _printable(value: Any) -> Any:
    """Replace control characters in text; a figure, which is markup already, passes."""
    return printable(value) if type(value) is str else value


# ---- sections ----


def _metrics(facts: RunFacts) -> Parts:
    columns = {}
    if facts.evaluation is not None:
        columns["data given"] = (facts.evaluation.metrics, facts.evaluation.gauc)
        files = ", ".join(facts.evaluation.paths)
        yield Text(f"Data given: {files}; {_bad_rows(facts.evaluation.bad_rows)}.")
    if facts.learning.examples:
        columns["while learning"] = (facts.learning, None)
        yield Text(f"While learning, each example was scored before it was learned (pass {facts.passes}).")
        if facts.passes > 1:
            yield Text("In that pass the examples had been learned before: its metrics are not those of unseen data.")
    if not columns:
        yield Text("The model has learned nothing yet, and no data was given to score.")
        return
    names = [name for name, _ in _figures(StreamingMetrics(), None)]
    values = [[value for _, value in _figures(metrics, gauc)] for metrics, gauc in columns.values()]
    rows = [row for row in zip(names, *values, strict=True) if any(cell != "–" for cell in row[1:])]
    yield Table("Metrics", ("", *columns), rows)


def _figures(metrics: StreamingMetrics, gauc: float | None) -> Iterator[tuple[str, str]]:
    yield "examples", f"{metrics.weight:,.0f}"
    yield "positive", f"{metrics.positives:,.0f}"
    yield "log loss (nats)", _number(metrics.logloss, 6)
    yield "log loss of the best constant", _number(metrics.best_constant_logloss, 6)
    yield "normalised entropy", _number(metrics.normalized_entropy, 4)
    yield "AUC", _number(metrics.auc, 5)
    yield "GAUC", "–" if gauc is None else _number(gauc, 5)
    yield "predicted / observed clicks", _number(metrics.calibration, 4)
    error = expected_calibration_error(metrics.calibration_by_quantile())
    yield "expected calibration error, deciles", _number(error, 5)


def _curve(facts: RunFacts) -> Parts:
    rows = [row for row in facts.curve if row.logloss == row.logloss]
    if not rows:
        yield Text("The model has no rows of progressive validation.")
        return
    first, last = rows[0], rows[-1]
    yield Figure(
        curve_figure(rows),
        f"Log loss of predictions made before learning, over the first pass: from {first.logloss_since_last:.4f} at "
        f"{first.examples:,} examples to {last.logloss_since_last:.4f} at {last.examples:,} (since the row before).",
    )
    head = ("examples", "since last", "log loss", "NE", "AUC")
    summary = "" if len(rows) <= _SHOWN_ROWS else f"All {len(rows)} rows"
    yield Table("Progressive table", head, [_curve_cells(row) for row in rows], summary)


def _curve_cells(row: ProgressRow) -> Cells:
    figures = (row.logloss_since_last, row.logloss, row.normalized_entropy, row.auc)
    return (f"{row.examples:,}", *(_number(value, 5) for value in figures))


def _calibration(facts: RunFacts) -> Parts:
    metrics = facts.evaluation.metrics if facts.evaluation else facts.learning
    bins = metrics.calibration_by_quantile()
    if not bins:
        yield Text("There are no predictions to compare.")
        return
    inside = sum(bin.low <= bin.predicted <= bin.high for bin in bins)
    source = "the data given" if facts.evaluation else "predictions made before learning"
    yield Figure(
        calibration_figure(bins),
        f"Observed against predicted click-through rate by decile of the prediction, on {source}. In {inside} of "
        f"{len(bins)} the prediction lies inside the 95 % interval of what was observed.",
    )
    head = ("examples", "predicted", "observed", "95 % from", "to")
    yield Table("Deciles of the prediction", head, [_bin_cells(bin) for bin in bins])


def _bin_cells(bin: CalibrationBin) -> Cells:
    return (f"{bin.weight:,.0f}", *(f"{value:.5f}" for value in bin[1:]))


def _collisions(facts: RunFacts) -> Parts:
    stats = facts.stats
    yield Text(
        f"{stats.rows_touched:,} of {stats.num_embeddings:,} rows are in use "
        f"({stats.rows_touched / stats.num_embeddings:.2%}), by an estimated "
        f"{stats.estimated_distinct_keys:,.0f} keys; {stats.collision_rate:.2%} of keys are expected to share "
        "every row of theirs with another key."
    )
    fields = [field for field in facts.evaluation.collisions if field.distinct_keys] if facts.evaluation else []
    if not fields:
        yield Text("Which fields they are in is known only of data: give some.")
        return
    distinct = sum(field.distinct_keys for field in fields)
    expected = collision_rate(distinct, stats.num_embeddings, facts.num_hashes)
    shown = f", the {MAX_BARS} largest fields" if len(fields) > MAX_BARS else ""
    yield Figure(
        collision_figure(fields, expected),
        f"Share of each field's keys in the data given that share every row with another of its keys{shown}; the line "
        f"is what is expected of {distinct:,} distinct keys, {expected:.2%}.",
    )
    cells = [(f.field, f"{f.distinct_keys:,}", f"{f.sharing_keys:,}", f"{f.rate:.2%}") for f in fields]
    yield Table("Counted on the data given", ("field", "distinct keys", "sharing", "share"), cells)


def _norms(facts: RunFacts) -> Parts:
    norms = facts.norms.norms
    if not (norms > 0.0).any():
        yield Text("No row has been written yet.")
        return
    what = "a sample of the rows touched, blocks evenly spaced" if facts.norms.sampled else "all rows touched"
    owing = ", as stored: without the decay that a row still owes" if facts.norms.as_stored else ""
    quantiles = np.quantile(norms, (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0)).tolist()
    yield Figure(
        norm_figure(facts.norms),
        f"Norms of {len(norms):,} rows ({what}{owing}): half of them are above {quantiles[3]:.4g}.",
    )
    head = ("least", "1 %", "10 %", "median", "90 %", "99 %", "greatest")
    yield Table("Quantiles of the norm", head, [[f"{value:.4g}" for value in quantiles]])


def _memory(facts: RunFacts) -> Parts:
    points = [point for point in facts.memory if point.auc == point.auc]
    where = "the data given" if facts.evaluation else "what each had learned, scored before it was learned"
    if len(points) > 1:
        best = max(points, key=lambda point: point.auc)
        yield Figure(
            memory_figure(points),
            f"AUC on {where} against the bytes that the table takes on disk, of {len(points)} models; the best is "
            f"{best.name}, {best.auc:.4f} with {format_bytes(best.disk_bytes)}.",
        )
    else:
        yield Text("Name other models with --compare to plot AUC against memory.")
    cells = [
        (p.name, f"{p.num_embeddings:,} × {p.embedding_dim}", p.dtype, format_bytes(p.disk_bytes),
         _number(p.auc, 5), _number(p.logloss, 6))
        for p in facts.memory
    ]  # fmt: skip
    yield Table(f"On {where}", ("model", "rows", "dtype", "on disk", "AUC", "log loss"), cells)


def _data(facts: RunFacts) -> Parts:
    if not facts.sources:
        yield Text("The model has learned no files yet, or only standard input and pipes.")
        return
    cells = [
        (path, f"{s.passes}", f"{s.rows or s.rows_per_pass:,}", f"{s.bad_rows:,}", format_bytes(s.size_bytes))
        for path, s in facts.sources.items()
    ]
    yield Table("Files", ("file", "passes", "rows", "bad rows", "size"), cells)
    bad = [line for source in facts.sources.values() for line in source.bad_lines]
    if bad:
        yield Lines("The first bad rows, with the reasons", bad)


def _number(value: float, digits: int) -> str:
    return "–" if value != value else f"{value:.{digits}f}"


def _bad_rows(count: int) -> str:
    return "no bad rows" if not count else f"{count:,} bad row{'s' if count > 1 else ''} left out"
