"""``python -m bench.compression_report results.json``: write the tables and the figure of docs/benchmarks/memory.md.

Like `bench.report`, this replaces the text between two marks and leaves the rest of the page untouched.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

from bench.report import latest, machine_lines, replace_between_marks

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "memory.md"
TITLES = {"Frappe": "Frappe, test AUC", "generated": "Generated stream, last quarter of one pass"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.compression_report", description=__doc__)
    parser.add_argument("files", nargs="+", type=pathlib.Path)
    parser.add_argument("--page", type=pathlib.Path, default=PAGE)
    parser.add_argument("--no-picture", action="store_true")
    options = parser.parse_args(arguments)
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in options.files]
    results = latest(r for report in reports for r in report["results"] if r["bench"] == "compression")
    if not results:
        raise SystemExit("no results of the bench compression in these files")
    sets = {name: [r for r in results if r["case"]["what"] == name] for name in TITLES}
    found = {name: chosen for name, chosen in sets.items() if chosen}
    picture = options.page.with_suffix(".svg")
    lines = machine_lines(reports)
    for name, chosen in found.items():
        lines += [f"### {TITLES[name]}", "", *table(chosen), *limits(chosen[0])]
    if not options.no_picture:
        lines += [f"![AUC against bytes]({picture.name})", ""]
    replace_between_marks(options.page, "\n".join(lines))
    if not options.no_picture:
        draw(found, picture)


def table(results: list[dict[str, Any]]) -> list[str]:
    """Format a row per variant and a column per size: the AUC, with its difference from the reference in brackets."""
    names = list(dict.fromkeys(side["name"] for result in results for side in result["sides"]))
    heads = [f"{r['case']['smaller']:,}x smaller, {kilobytes(r['case']['bytes'])}" for r in results]
    lines = [f"| AUC, logloss | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for name in names:
        cells = [cell(next((s for s in r["sides"] if s["name"] == name), None), name == names[0]) for r in results]
        cells = cells[:1] + [""] * (len(cells) - 1) if name == names[0] else cells
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def cell(side: dict[str, Any] | None, is_reference: bool) -> str:
    if side is None:
        return ""
    difference = "" if is_reference else f" ({-side['auc_lost']:+.4f})"
    return f"{side['auc']:.4f}{difference}, {side['logloss']:.4f}"


def kilobytes(count: int) -> str:
    return f"{count / 1e3:,.1f} kB" if count < 1e6 else f"{count / 1e6:,.1f} MB"


def limits(result: dict[str, Any]) -> list[str]:
    checks = result["checks"]
    if "best_possible_auc" not in checks:
        seeds = f"Medians of {checks['seeds']} seeds" if checks["seeds"] > 1 else "One seed"
        return [f"{seeds}, {result['case']['values']:,} distinct values.", ""]
    return [
        f"{checks['impressions']:,} impressions, {result['case']['values']:,} distinct values. The true probabilities "
        f"have AUC {checks['best_possible_auc']:.4f}, logloss {checks['best_possible_logloss']:.4f}.",
        "",
    ]


def draw(found: dict[str, list[dict[str, Any]]], path: pathlib.Path) -> None:
    """Plot AUC against bytes, one curve per variant; the reference is a horizontal line."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "hashemb"  # the same results give the same file
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(1, len(found), figsize=(6 * len(found), 4.5), layout="constrained", squeeze=False)
    for axes, (name, results) in zip(grid[0], found.items(), strict=True):
        reference = results[0]["sides"][0]
        axes.axhline(reference["auc"], color="black", linewidth=0.8, label=reference["name"])
        for number, variant in enumerate(dict.fromkeys(s["name"] for r in results for s in r["sides"][1:])):
            points = sorted((s["bytes"], s["auc"]) for r in results for s in r["sides"] if s["name"] == variant)
            style = {"linestyle": "--" if "bfloat16" in variant else "-", "color": f"C{number % 10}"}
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=variant, **style)
        axes.set(title=TITLES[name], xscale="log", xlabel="bytes of weights and index", ylabel="AUC")
        axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
