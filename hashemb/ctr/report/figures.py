"""The figures of a report, as inline SVG without background and with colours that the page defines.

Text and axes are drawn in ``currentColor`` and data in CSS variables, so that a figure is readable on light and dark
pages. The same facts yield the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hashemb._packages import require
from hashemb._text import printable
from hashemb.ctr.metrics import CalibrationBin
from hashemb.ctr.report.facts import MemoryPoint
from hashemb.ctr.report.occupancy import FieldCollisions, RowNorms
from hashemb.ctr.training import ProgressRow

__all__ = [
    "MAX_BARS",
    "calibration_figure",
    "collision_figure",
    "curve_figure",
    "memory_figure",
    "norm_figure",
]

MAX_BARS = 40
_WIDTH = 4.4  # inches; 10-point text is 10 pixels high on a page that is 360 pixels wide
_INK, _FIRST, _SECOND = "#010203", "#010204", "#010205"  # placeholders for colours that the page defines
_COLOURS = {_INK: "currentColor", _FIRST: "var(--first)", _SECOND: "var(--second)"}
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.0,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
    "grid.alpha": 0.15,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.0,
}


def _svg(name: str, height: float, draw: Callable[[Any], None]) -> str:
    """Draw a figure with `draw`; `name` makes the identifiers of figures on one page unique."""
    matplotlib = require("matplotlib", "report")
    figure_module = require("matplotlib.figure", "report")
    file = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = figure_module.Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_a_page(file.getvalue(), name)


def _for_a_page(text: str, name: str) -> str:
    """Extract the <svg> element and adapt its width, identifiers and colours to the page.

    The element is part of the page, because an image of its own could not take the page's colours.
    """
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    for stand_in, colour in _COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1).strip()


def curve_figure(rows: Sequence[ProgressRow], name: str = "curve") -> str:
    """Plot the log loss since the previous row and since the beginning over the examples, on a logarithmic axis."""

    def draw(axes: Any) -> None:
        examples = [row.examples for row in rows]
        axes.plot(examples, [row.logloss_since_last for row in rows], "o-", color=_FIRST, label="since the row before")
        axes.plot(examples, [row.logloss for row in rows], "s--", color=_SECOND, label="since the beginning")
        _logarithmic(axes, "x", examples)
        axes.set(xlabel="examples", ylabel="log loss (nats)")
        axes.legend()

    return _svg(name, 3.2, draw)


def calibration_figure(bins: Sequence[CalibrationBin], name: str = "calibration") -> str:
    """Plot observed over predicted click-through rates, with intervals, and the diagonal of perfect calibration."""

    def draw(axes: Any) -> None:
        predicted, observed = np.array([(bin.predicted, bin.observed) for bin in bins]).T
        errors = np.array([(bin.observed - bin.low, bin.high - bin.observed) for bin in bins]).T
        wide = observed.min() > 0.0 and predicted.max() > 20.0 * predicted.min()
        ends = (0.8 * min(predicted.min(), observed.min()) if wide else 0.0, 1.1 * max(predicted.max(), observed.max()))
        axes.plot(ends, ends, "--", color=_SECOND, label="calibrated")
        axes.errorbar(predicted, observed, errors, fmt="o", color=_FIRST, capsize=3, label="observed, 95 % interval")
        if wide:
            axes.set(xscale="log", yscale="log")
        axes.set(xlabel="predicted click-through rate", ylabel="observed click-through rate")
        axes.legend()

    return _svg(name, 3.6, draw)


def collision_figure(fields: Sequence[FieldCollisions], expected: float, name: str = "collisions") -> str:
    """Plot the share of colliding keys for each field as bars, and the expected share as a line."""
    largest = sorted(fields, key=lambda field: -field.distinct_keys)[:MAX_BARS]
    shown = [field for field in fields if field in largest]

    def draw(axes: Any) -> None:
        axes.barh(range(len(shown)), [100.0 * field.rate for field in shown], color=_FIRST, height=0.7)
        axes.set_yticks(range(len(shown)), labels=[_plain(field.field) for field in shown])
        axes.axvline(100.0 * expected, color=_SECOND, linestyle="--", label="expected of any key")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="keys that share every row (%)", xlim=(0, None))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.0 + 0.4 / (1.0 + 0.19 * len(shown))))

    return _svg(name, 1.2 + 0.19 * len(shown), draw)


def norm_figure(norms: RowNorms, name: str = "norms") -> str:
    """Plot a histogram of the norms of rows, on a logarithmic axis."""

    def draw(axes: Any) -> None:
        positive = norms.norms[norms.norms > 0.0]
        low, high = positive.min(), positive.max()
        edges = np.geomspace(low, high, 41) if high > low else np.array([0.9 * low, 1.1 * low])
        axes.hist(positive, bins=edges, color=_FIRST)
        _logarithmic(axes, "x", positive)
        axes.set(xlabel="Euclidean norm of a row", ylabel="rows")

    return _svg(name, 2.8, draw)


def memory_figure(points: Sequence[MemoryPoint], name: str = "memory") -> str:
    """Plot AUC over bytes, on a logarithmic axis; each point has the name of its model."""

    def draw(axes: Any) -> None:
        mebibytes = [point.disk_bytes / 2**20 for point in points]
        axes.scatter(mebibytes, [point.auc for point in points], color=_FIRST, s=30)
        middle = np.sqrt(min(mebibytes) * max(mebibytes))
        for x, point in zip(mebibytes, points, strict=True):
            left = x > middle
            axes.annotate(
                _plain(point.name), (x, point.auc), (-6 if left else 6, 4), textcoords="offset points",
                ha="right" if left else "left",
            )  # fmt: skip
        _logarithmic(axes, "x", mebibytes)
        axes.margins(0.12, 0.2)
        axes.set(xlabel="table on disk (MiB)", ylabel="AUC")

    return _svg(name, 3.0, draw)


def _plain(text: str) -> str:
    """Escape a name for Matplotlib, which would parse text between dollar signs as a formula."""
    return printable(text).replace("$", r"\$")


def _logarithmic(axes: Any, axis: str, values: Any) -> None:
    """Make an axis logarithmic with plain numbers as labels, even if it spans less than a decade."""
    ticker = require("matplotlib.ticker", "report")
    low, high = float(np.min(values)), float(np.max(values))
    axes.set(**{f"{axis}scale": "log"})
    place = axes.xaxis if axis == "x" else axes.yaxis
    narrow = high < 30.0 * low
    place.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,), numticks=8))
    place.set_major_formatter(ticker.FuncFormatter(lambda value, _: plain_number(value)))
    place.set_minor_formatter(ticker.NullFormatter())


def plain_number(value: float) -> str:
    """Format a number for an axis; unlike Matplotlib's `EngFormatter`, which writes 20m, leave small ones as they are.

    >>> [plain_number(value) for value in (0.02, 1.0, 500.0, 2000.0, 1e6, 2.5e9)]
    ['0.02', '1', '500', '2k', '1M', '2.5G']
    """
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"
