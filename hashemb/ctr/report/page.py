"""The page of a report: plain HTML in one self-contained file, with a table for every figure."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence

import numpy as np

import hashemb
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
from hashemb.ctr.report.occupancy import expected_rate
from hashemb.ctr.training import ProgressRow

__all__ = ["page"]

_SHOWN_ROWS = 20

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --line: #c9ced6; --soft: #f2f4f7;
        --first: #0b62c4; --second: #b34700; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --paper: #14171c; --line: #414853; --soft: #1e232b; --first: #6cb0ff; --second: #ffa25c; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 48rem; color: var(--ink); background: var(--paper);
       font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
a { color: var(--first); } nav ul { padding-left: 1.2rem; }
figure { margin: 1rem 0; } figure svg { display: block; width: 100%; max-width: 36rem; height: auto; }
figcaption { font-size: .9rem; }
.scroll { overflow-x: auto; } .scroll:focus { outline: 2px solid var(--first); }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .5rem 0; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child, table.text td { text-align: left; } thead th { background: var(--soft); }
table.text td { overflow-wrap: anywhere; } tbody th { font-weight: 400; }
@media (max-width: 30rem) { table { font-size: .8rem; } th, td { padding: .25rem .3rem; } }
summary { cursor: pointer; padding: .3rem 0; }
"""

Cells = Sequence[str]


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
        ("settings", "Settings", [_table("The table and the model", ("", ""), facts.settings, text=True)]),
    ]
    title = _escaped(f"{facts.name}: report on a click-through-rate model")
    links = "".join(f'<li><a href="#{key}">{heading}</a></li>' for key, heading, _ in sections)
    body = "\n".join(
        f'<section aria-labelledby="{key}">\n<h2 id="{key}">{heading}</h2>\n' + "\n".join(parts) + "\n</section>"
        for key, heading, parts in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n"
        f"<p>Made by hashemb {_escaped(hashemb.__version__)}.</p>\n"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n{body}\n</main>\n</body>\n</html>\n'
    )


# ---- sections ----


def _metrics(facts: RunFacts) -> Iterator[str]:
    columns = {}
    if facts.evaluation is not None:
        columns["data given"] = (facts.evaluation.metrics, facts.evaluation.gauc)
        files = ", ".join(facts.evaluation.paths)
        yield _text(f"Data given: {files}; {_bad_rows(facts.evaluation.bad_rows)}.")
    if facts.learning.examples:
        columns["while learning"] = (facts.learning, None)
        yield _text(f"While learning, each example was scored before it was learned (pass {facts.passes}).")
        if facts.passes > 1:
            yield _text("In that pass the examples had been learned before: its figures are not of unseen data.")
    if not columns:
        yield _text("The model has learned nothing yet, and no data was given to score.")
        return
    names = [name for name, _ in _figures(StreamingMetrics(), None)]
    values = [[value for _, value in _figures(metrics, gauc)] for metrics, gauc in columns.values()]
    rows = [row for row in zip(names, *values, strict=True) if any(cell != "–" for cell in row[1:])]
    yield _table("Metrics", ("", *columns), rows)


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


def _curve(facts: RunFacts) -> Iterator[str]:
    rows = [row for row in facts.curve if row.logloss == row.logloss]
    if not rows:
        yield _text("No row of the progressive table is kept with this model.")
        return
    first, last = rows[0], rows[-1]
    yield _figure(
        curve_figure(rows),
        f"Log loss of predictions made before learning, over the first pass: from {first.logloss_since_last:.4f} at "
        f"{first.examples:,} examples to {last.logloss_since_last:.4f} at {last.examples:,} (since the row before).",
    )
    head = ("examples", "since last", "log loss", "NE", "AUC")
    table = _table("Progressive table", head, [_curve_cells(row) for row in rows])
    yield table if len(rows) <= _SHOWN_ROWS else f"<details><summary>All {len(rows)} rows</summary>{table}</details>"


def _curve_cells(row: ProgressRow) -> Cells:
    figures = (row.logloss_since_last, row.logloss, row.normalized_entropy, row.auc)
    return (f"{row.examples:,}", *(_number(value, 5) for value in figures))


def _calibration(facts: RunFacts) -> Iterator[str]:
    metrics = facts.evaluation.metrics if facts.evaluation else facts.learning
    bins = metrics.calibration_by_quantile()
    if not bins:
        yield _text("There are no predictions to compare.")
        return
    inside = sum(bin.low <= bin.predicted <= bin.high for bin in bins)
    source = "the data given" if facts.evaluation else "predictions made before learning"
    yield _figure(
        calibration_figure(bins),
        f"Observed against predicted click-through rate by decile of the prediction, on {source}. In {inside} of "
        f"{len(bins)} the prediction lies inside the 95 % interval of what was observed.",
    )
    head = ("examples", "predicted", "observed", "95 % from", "to")
    yield _table("Deciles of the prediction", head, [_bin_cells(bin) for bin in bins])


def _bin_cells(bin: CalibrationBin) -> Cells:
    return (f"{bin.weight:,.0f}", *(f"{value:.5f}" for value in bin[1:]))


def _collisions(facts: RunFacts) -> Iterator[str]:
    stats = facts.stats
    yield _text(
        f"{stats.rows_touched:,} of {stats.num_embeddings:,} rows are in use "
        f"({stats.rows_touched / stats.num_embeddings:.2%}), by an estimated "
        f"{stats.estimated_distinct_keys:,.0f} keys; {stats.collision_rate:.2%} of keys are expected to share "
        "every row of theirs with another key."
    )
    fields = [field for field in facts.evaluation.collisions if field.distinct_keys] if facts.evaluation else []
    if not fields:
        yield _text("Which fields they are in is known only of data: give some.")
        return
    distinct = sum(field.distinct_keys for field in fields)
    expected = expected_rate(distinct, stats.num_embeddings, facts.num_hashes)
    shown = f", the {MAX_BARS} largest fields" if len(fields) > MAX_BARS else ""
    yield _figure(
        collision_figure(fields, expected),
        f"Share of each field's keys in the data given that share every row with another of its keys{shown}; the line "
        f"is what is expected of {distinct:,} distinct keys, {expected:.2%}.",
    )
    cells = [(f.field, f"{f.distinct_keys:,}", f"{f.sharing_keys:,}", f"{f.rate:.2%}") for f in fields]
    yield _table("Counted on the data given", ("field", "distinct keys", "sharing", "share"), cells)


def _norms(facts: RunFacts) -> Iterator[str]:
    norms = facts.norms.norms
    if not (norms > 0.0).any():
        yield _text("No row has been written yet.")
        return
    what = "a sample of the rows touched, blocks evenly spaced" if facts.norms.sampled else "all rows touched"
    owing = ", as stored: without the decay that a row still owes" if facts.norms.as_stored else ""
    quantiles = np.quantile(norms, (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0)).tolist()
    yield _figure(
        norm_figure(facts.norms),
        f"Norms of {len(norms):,} rows ({what}{owing}): half of them are above {quantiles[3]:.4g}.",
    )
    head = ("least", "1 %", "10 %", "median", "90 %", "99 %", "greatest")
    yield _table("Quantiles of the norm", head, [[f"{value:.4g}" for value in quantiles]])


def _memory(facts: RunFacts) -> Iterator[str]:
    points = [point for point in facts.memory if point.auc == point.auc]
    where = "the data given" if facts.evaluation else "what each had learned, scored before it was learned"
    if len(points) > 1:
        best = max(points, key=lambda point: point.auc)
        yield _figure(
            memory_figure(points),
            f"AUC on {where} against the bytes that the table takes on disk, of {len(points)} models; the best is "
            f"{best.name}, {best.auc:.4f} with {format_bytes(best.disk_bytes)}.",
        )
    else:
        yield _text("With other models to compare it with (--compare), a picture stands here.")
    cells = [
        (p.name, f"{p.num_embeddings:,} × {p.embedding_dim}", p.dtype, format_bytes(p.disk_bytes),
         _number(p.auc, 5), _number(p.logloss, 6))
        for p in facts.memory
    ]  # fmt: skip
    yield _table(f"On {where}", ("model", "rows", "dtype", "on disk", "AUC", "log loss"), cells)


def _data(facts: RunFacts) -> Iterator[str]:
    if not facts.sources:
        yield _text("No files are known: nothing learned yet, or only standard input and pipes.")
        return
    cells = [
        (path, f"{s.passes}", f"{s.rows or s.rows_per_pass:,}", f"{s.bad_rows:,}", format_bytes(s.size_bytes))
        for path, s in facts.sources.items()
    ]
    yield _table("Files", ("file", "passes", "rows", "bad rows", "size"), cells)
    bad = [line for source in facts.sources.values() for line in source.bad_lines]
    if bad:
        items = "".join(f"<li>{_escaped(line)}</li>" for line in bad)
        yield f"<details><summary>The first bad rows, with the reasons</summary><ul>{items}</ul></details>"


# ---- pieces ----


def _escaped(text: str) -> str:
    return html.escape(printable(text))


def _text(text: str) -> str:
    return f"<p>{_escaped(text)}</p>"


def _figure(svg: str, caption: str) -> str:
    """Format a figure with its caption, which is also its text alternative."""
    text = _escaped(caption)
    return f'<figure role="img" aria-label="{text}">{svg}<figcaption>{text}</figcaption></figure>'


def _table(caption: str, head: Cells, rows: Sequence[Sequence[str]], *, text: bool = False) -> str:
    """Format a table that scrolls separately on narrow screens; the first cell of each row is its heading."""
    name = _escaped(caption)
    columns = "".join(f'<th scope="col">{_escaped(cell)}</th>' if cell else "<td></td>" for cell in head)
    lines = "\n".join(
        f'<tr><th scope="row">{_escaped(row[0])}</th>'
        + "".join(f"<td>{_escaped(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    heading = f"<thead><tr>{columns}</tr></thead>\n" if any(head) else ""
    kind = ' class="text"' if text else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table{kind}>'
        f"<caption>{name}</caption>\n{heading}<tbody>\n{lines}\n</tbody></table></div>"
    )


def _number(value: float, digits: int) -> str:
    return "–" if value != value else f"{value:.{digits}f}"


def _bad_rows(count: int) -> str:
    return "no bad rows" if not count else f"{count:,} bad row{'s' if count > 1 else ''} left out"
