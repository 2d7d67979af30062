"""``python -m bench.report results.json [...]``: write the tables and figures of docs/benchmarks/results.md.

The tables replace the text between two marks of that page; the rest is left untouched. If several files contain the
same case, the last one counts.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "results.md"
BEGIN, END = "<!-- results: written by bench.report -->", "<!-- end of results -->"
DEFAULTS = {"fields": 26, "bag": 1, "dtype": "float32", "distribution": "uniform", "batch": 4096}
TITLES = {
    "lookup": "Look-up",
    "update": "Look-up and exact update",
    "pooled": "Look-up and exact update of bags of 20 keys",
    "roofline": "Fraction of the roofline",
    "hash": "Keys from columns",
    "overhead": "Cost of a call",
    "scale": "Size of the table",
    "kv": "Against key-value stores",
    "out_of_core": "Larger than memory",
    "sharing": "Several processes",
    "ctr": "From a log to a trained model",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=pathlib.Path)
    parser.add_argument("--page", "--readme", type=pathlib.Path, default=PAGE)
    parser.add_argument("--no-pictures", action="store_true")
    options = parser.parse_args(arguments)
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in options.files]
    results = latest(with_place(result, report) for report in reports for result in report["results"])
    text = "\n".join([*machine_lines(reports), *tables(results)])
    replace_between_marks(options.page, text)
    if not options.no_pictures:
        draw(results, options.page.parent)


def with_place(result: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """Add the file system of the tables to the case of a result; older result files have it once for all results."""
    if result["bench"] in ("hash", "compression") or "on" in result["case"]:
        return result
    return {**result, "case": {**result["case"], "on": report["machine"]["file_system"]}}


def latest(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one result per case, in order of first appearance."""
    return list({(r["bench"], json.dumps(r["case"], sort_keys=True)): r for r in results}.values())


def replace_between_marks(path: pathlib.Path, text: str) -> None:
    page = path.read_text(encoding="utf-8")
    head, found, rest = page.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    if not found or not closed:
        raise SystemExit(f"{path} lacks the marks {BEGIN!r} and {END!r}")
    path.write_text(f"{head}{BEGIN}\n\n{text}\n{END}{tail}", encoding="utf-8")


# ---- text ----


def machine_lines(reports: list[dict[str, Any]]) -> list[str]:
    """Describe the machines of the measurements, one line per distinct machine."""
    lines: dict[str, None] = {}
    for report in reports:
        m = report["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
        lines[
            f"- {m['cpu']} (family/model/stepping {m['family_model_stepping']}), {m['usable_cores']} cores, "
            f"L3 {m['l3']}, kernels {m['isa']}, Linux {m['kernel']}, "
            f"Python {m['python']}; {versions}"
        ] = None
    return ["Measured on:", "", *lines, ""]


def tables(results: list[dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    for bench, title in TITLES.items():
        chosen = [r for r in results if r["bench"] == bench]
        if chosen:
            lines += [f"### {title}", ""]
            lines += FORMS.get(bench, side_tables)(chosen)
    return lines


def point(case: dict[str, Any]) -> str:
    """Format the parameters of a case that differ from the usual ones."""
    shown = {k: v for k, v in case.items() if DEFAULTS.get(k) != v}
    return ", ".join(f"{k.replace('_', ' ')} {power_of_two(v)}" for k, v in shown.items())


def power_of_two(value: Any) -> str:
    if isinstance(value, int) and value >= 1 << 14 and value & (value - 1) == 0:
        return f"2^{value.bit_length() - 1}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def folded_tables(results: list[dict[str, Any]]) -> list[str]:
    """Format the tables to read first, and put the rest behind a click."""
    return [*best_table(results), "<details><summary>All sides</summary>", "", *side_tables(results), "</details>", ""]


def best_table(results: list[dict[str, Any]]) -> list[str]:
    """Format the time of the fastest side of each group over ours; for the roofline it is our fraction of the limit."""
    groups = list(dict.fromkeys(g for r in results for g in r["best"] if not g.startswith("hashemb")))
    lines = ["Time of the best of each kind / ours (median of the ratios; in brackets the ratio of minima):", ""]
    lines += [f"| | {' | '.join(groups)} |", "|---|" + "---:|" * len(groups)]
    for result in results:
        cells = [best_cell(result["best"].get(group)) for group in groups]
        lines.append(f"| {point(result['case'])} | {' | '.join(cells)} |")
    return [*lines, ""]


def best_cell(best: dict[str, Any] | None) -> str:
    return "" if best is None else f"{best['median_ratio']:.2f} ({best['ratio_of_minima']:.2f})"


def side_tables(results: list[dict[str, Any]]) -> list[str]:
    lines = []
    for result in results:
        lines += [f"{point(result['case'])}:", ""]
        lines += [f"| | median, ns per {result['unit']} | quartiles | minimum | time / ours | minima / ours | phases |"]
        lines += ["|---|---:|---:|---:|---:|---:|---|"]
        lines += [side_row(side) for side in result["sides"]]
        lines += ["", *(f"Skipped: {name} ({reason})." for name, reason in result["skipped"].items())]
        lines += [""] if result["skipped"] else []
    return lines


def side_row(side: dict[str, Any]) -> str:
    low, high = side["quartiles_ns"]
    phases = ", ".join(f"{name} {number(ns)}" for name, ns in side["phases_ns"].items())
    name = f"**{side['name']}**" if side["name"] == "hashemb" else side["name"]
    return (
        f"| {name} | {number(side['median_ns'])} | {number(low)}–{number(high)} | {number(side['min_ns'])} "
        f"| {side['median_ratio']:.2f} | {side['ratio_of_minima']:.2f} | {phases} |"
    )


def number(ns: float) -> str:
    return f"{ns:,.1f}" if ns < 1000 else f"{ns:,.0f}"


def roofline_table(results: list[dict[str, Any]]) -> list[str]:
    """Format one row per case: our rate, the limit, and our fraction of it."""
    lines = ["| | hashemb, ns per key | limit | fraction | of the minima |", "|---|---:|---:|---:|---:|"]
    for result in results:
        ours, limit = result["sides"]
        lines.append(
            f"| {roofline_label(result['case'])} | {ours['median_ns']:.1f} | {limit['median_ns']:.1f} "
            f"| {limit['median_ratio']:.2f} | {limit['ratio_of_minima']:.2f} |"
        )
    return [*lines, "", "![fractions of the limit](roofline.svg)", ""]


def scale_tables(results: list[dict[str, Any]]) -> list[str]:
    return [*side_tables(results), "![ns per key over rows](scale.svg)", ""]


def sharing_tables(results: list[dict[str, Any]]) -> list[str]:
    """Format the speed-ups of two writers, the effect of a snapshot on them, and the cost of a delta."""
    lines: list[str] = []
    for what, form in (("two", together_row), ("snapshot", snapshot_row), ("delta", delta_row)):
        chosen, head = [r for r in results if r["case"]["what"].startswith(what)], SHARING_HEADS[what]
        if chosen:
            lines += [f"| {chosen[0]['case']['what']} | {' | '.join(head)} |", "|---|" + "---:|" * len(head)]
            lines += [f"| {sharing_label(r['case'])} | {' | '.join(form(r))} |" for r in chosen]
            lines += [""]
    return lines


SHARING_HEADS = {
    "two": ["one writer, ns per key", "two together", "speed-up", "of the minima"],
    "snapshot": [
        "first batch held up, ms", "worst", "rate kept", "begin, ms", "copy, s", "whole, s", "GiB",
    ],
    "delta": ["snapshot, s", "delta, s", "time / snapshot", "size / snapshot"],
}  # fmt: skip


def sharing_label(case: dict[str, Any]) -> str:
    shown = {k: v for k, v in case.items() if k not in ("what", "dim", "distribution")}
    return f"{point(shown)}, {case['distribution']} keys"


def together_row(result: dict[str, Any]) -> list[str]:
    one, two = result["sides"]
    ratios = [1 / two["median_ratio"], 1 / two["ratio_of_minima"]]
    return [number(one["median_ns"]), number(two["median_ns"]), *(f"{ratio:.2f}" for ratio in ratios)]


def snapshot_row(result: dict[str, Any]) -> list[str]:
    c = result["checks"]
    times = [c[name] * 1e3 for name in ("held_s", "worst_held_s")]
    whole = [f"{c['copy_s']:.2f}", f"{c['whole_s']:.2f}", f"{c['bytes'] / 2**30:.2f}"]
    return [*(f"{ms:.1f}" for ms in times), f"{c['rate_kept']:.2f}", f"{c['begin_s'] * 1e3:.1f}", *whole]


def delta_row(result: dict[str, Any]) -> list[str]:
    full, part = (side["median_ns"] / 1e9 for side in result["sides"])
    c = result["checks"]
    return [f"{full:.2f}", f"{part:.3f}", f"{c['time_over_snapshot']:.3f}", f"{c['size_over_snapshot']:.3f}"]


def ctr_tables(results: list[dict[str, Any]]) -> list[str]:
    """Format the rates and memory of each side, then the losses of one pass."""
    lines: list[str] = []
    for result in results:
        lines += [f"{point(result['case'])}:", "", CTR_HEAD, "|---|" + "---:|" * (CTR_HEAD.count("|") - 2)]
        lines += [ctr_row(side) for side in result["sides"]]
        lines += ["", *(f"Skipped: {name} ({reason})." for name, reason in result["skipped"].items()), ""]
    entries = {json.dumps(entry, sort_keys=True): entry for result in results for entry in result["checks"]["quality"]}
    lines += ["| one pass over | rows | | setting | logloss | AUC |", "|---|---:|---|---|---:|---:|"]
    ordered = sorted(entries.values(), key=lambda entry: (entry["data"] != "generated", -entry["rows"]))
    lines += [quality_row(entry) for entry in ordered]
    best = results[-1]["checks"]["best_possible_logloss"]
    return [*lines, "", f"The generated rows' true probabilities have a log loss of {best:.4f}.", ""]


CTR_HEAD = "| | examples/s | time / ours | minima / ours | processor µs/example | start-up, s | peak MiB | rows |"


def ctr_row(side: dict[str, Any]) -> str:
    name = f"**{side['name']}**" if side["name"] == "hashemb" else side["name"]
    rate, memory = number(1e9 / side["median_ns"]), f"{side['peak_mib']:,.0f}"
    return (
        f"| {name} | {rate} | {side['median_ratio']:.2f} | {side['ratio_of_minima']:.2f} "
        f"| {side['cpu_median_ns'] / 1e3:.1f} | {side['start_s']:.1f} | {memory} | {side['rows']:,} |"
    )


def quality_row(entry: dict[str, Any]) -> str:
    setting = entry["setting"]
    shown = setting if isinstance(setting, str) else ", ".join(f"{k} {v}" for k, v in setting.items())
    name = f"{entry['side']}, {entry['model'].split(',')[0]}"
    figures = f"{entry['logloss']:.4f} | {entry['auc']:.4f}"
    return f"| {entry['data']} | {entry['rows']:,} | {name} | {shown or 'defaults'} | {figures} |"


FORMS: dict[str, Callable[[list[dict[str, Any]]], list[str]]] = {
    "lookup": folded_tables,
    "update": folded_tables,
    "pooled": folded_tables,
    "roofline": roofline_table,
    "scale": scale_tables,
    "sharing": sharing_tables,
    "ctr": ctr_tables,
}


def roofline_label(case: dict[str, Any]) -> str:
    what = case["phase"] if case["phase"] == "lookup" else f"update, {case['optimizer'].replace('_', ' ')}"
    return f"{what}, dim {case['dim']}, {case['threads']} thread{'s' * (case['threads'] > 1)}, {case['on']}"


# ---- figures ----


def draw(results: list[dict[str, Any]], directory: pathlib.Path) -> None:
    """Draw roofline.svg and scale.svg, if the results contain their data."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "hashemb"  # the same results give the same file
    bars = [r for r in results if r["bench"] == "roofline"]
    if bars:
        draw_roofline(bars, directory / "roofline.svg")
    curves = [r for r in results if r["bench"] == "scale" and r["case"]["what"] == "look-up and update"]
    if curves:
        draw_scale(curves[-1], directory / "scale.svg")


def draw_roofline(results: list[dict[str, Any]], path: pathlib.Path) -> None:
    from matplotlib import pyplot

    labels = [roofline_label(r["case"]) for r in results]
    fractions = [r["sides"][1]["median_ratio"] for r in results]
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(labels) + 1.2), layout="constrained")
    bars = axes.barh(labels, fractions, color=["#4477aa" if "lookup" in label else "#66ccaa" for label in labels])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set(xlabel="fraction of the limit", xlim=(0, 1.3))
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def draw_scale(result: dict[str, Any], path: pathlib.Path) -> None:
    from matplotlib import pyplot

    sides = sorted(result["sides"], key=size_bits)
    bits = [size_bits(side) for side in sides]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for phase in ("lookup", "update"):
        axes.plot(bits, [side["phases_ns"][phase] for side in sides], marker="o", label=phase)
    axes.set(xlabel="rows of the table", ylabel="ns per key", ylim=(0, None))
    axes.set_xticks(bits, [f"$2^{{{b}}}$" for b in bits])
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def size_bits(side: dict[str, Any]) -> int:
    return int(side["name"].removeprefix("2^").removesuffix(" rows"))


if __name__ == "__main__":
    main()
