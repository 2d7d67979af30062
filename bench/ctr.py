"""From a log to a trained model: hashemb against Vowpal Wabbit, scikit-learn, river and torch, on the same rows.

Each side runs in its own process from start to end, on the same two CPUs; the sides run in turn. The start-up time of a
process is measured on the first 256 rows, also in turn, and its minimum is subtracted. A tool that would take hours
gets only the first part of the rows; its time is per example. All other tools read Vowpal Wabbit's text, prepared
beforehand with bucketed counts and without missing values; hashemb reads the log as it is.

Each side then makes another pass over the rows and scores each example before learning it: progressive validation, with
the log loss and AUC of one pass for the best of its settings. Ours has one setting, the defaults. The true
probabilities of the generated rows give the lowest loss that can be expected. The first 10,000 rows of Criteo's file
are used too, if they are available.
"""

from __future__ import annotations

import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bench import ctr_data
from bench.ctr_data import Rows
from bench.ctr_sides import FM, LR, START_ROWS, Side, sides
from bench.harness import OURS, Clock, Mismatch, Result, Settings, available, summaries
from bench.process import Usage, run_command, usable_cpus

ROWS = {"smoke": 2_000, "usual": 4_000_000, "full": 20_000_000}
MAX_REPEATS = 5
CPUS = 2
TIMEOUT_S = 4 * 3600.0

Run = tuple[Usage, Usage]  # all rows, start-up
NOTHING = Usage(0.0, 0.0, 0, "")


def run(settings: Settings) -> Iterator[Result]:
    count = ROWS["smoke" if settings.smoke else "full" if settings.full else "usual"]
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="hashemb-ctr-", dir=settings.directory) as directory:
        print(f"  writing {count:,} impressions", flush=True)
        rows = ctr_data.generate(directory, count)
        chosen = wanted(settings, skipped)
        found = quality(rows, chosen, settings, "generated")
        found += criteo_quality(directory, chosen, settings)
        runs = time_sides(rows, chosen, settings)
        checks = {"best_possible_logloss": ctr_data.best_logloss(rows), "start_rows": START_ROWS}
        for model in (LR, FM):
            yield result(model, rows, chosen, runs, found, skipped, checks, settings)


def wanted(settings: Settings, skipped: dict[str, str]) -> list[Side]:
    """Return our side and the requested peers that are installed."""
    chosen = []
    for side in sides(settings.smoke):
        if side.group.startswith("hashemb") or re.search(settings.sides, f"{side.name} {side.model}"):
            with available(skipped, f"{side.name}: {side.model}"):
                side.require()
                chosen.append(side)
    return chosen


def rows_of(side: Side, rows: Rows) -> Rows:
    return rows if side.rows is None or side.rows >= rows.count else rows.head(side.rows)


# ---- time ----


def time_sides(rows: Rows, chosen: Sequence[Side], settings: Settings) -> dict[Side, list[Run]]:
    """Run every side in turn, reversing the order each time; each run is paired with a run of the start-up."""
    runs: dict[Side, list[Run]] = {side: [] for side in chosen}
    few = rows.head(START_ROWS)
    for side in chosen:
        for part in (few, rows_of(side, rows)) if side.prepares else ():
            launch(side, part, rows)
        if not settings.smoke:  # load the program's own files into the page cache
            launch(side, few, rows)
    for repeat in range(min(settings.repeats, MAX_REPEATS)):
        for side in chosen if repeat % 2 == 0 else reversed(chosen):
            if repeat and side.once:
                continue
            part = rows_of(side, rows)
            whole = launch(side, part, rows)
            side.check(part, whole)
            start = NOTHING if settings.smoke else launch(side, few, rows)
            runs[side].append((whole, start))
    return runs


def launch(side: Side, part: Rows, rows: Rows, setting: Any = None, *, score: bool = False) -> Usage:
    """Run once in an empty directory `out` next to the rows; with `score`, that directory is kept for `quality`."""
    out = rows.directory / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    command = side.command(part, out, side.settings[0] if setting is None else setting, score=score)
    usage = run_command(command, cpus=usable_cpus(CPUS), timeout_s=TIMEOUT_S)
    if not score:
        shutil.rmtree(out)
    return usage


class Timed:
    """A side as `summaries` takes it; `share` excludes the rows of the start-up."""

    def __init__(self, side: Side, rows: Rows) -> None:
        self.name, self.group = side.name, side.group
        self.share = (rows_of(side, rows).count - START_ROWS) / (rows.count - START_ROWS)


def clocks_of(runs: list[Run]) -> list[Clock]:
    """Subtract the shortest start-up from every run: a start-up slowed by other work would make a run look too fast."""
    wall, cpu = (min(getattr(start, kind) for _, start in runs) for kind in ("wall_s", "cpu_s"))
    clocks = []
    for whole, _ in runs:
        clock = Clock()
        clock.seconds, clock.cpu_seconds = {"train": whole.wall_s - wall}, whole.cpu_s - cpu
        clocks.append(clock)
    return clocks


# ---- quality ----


def quality(rows: Rows, chosen: Sequence[Side], settings: Settings, data: str) -> list[dict[str, Any]]:
    """Measure each side's best setting on the rows that it is timed on, and ours on the rows of each of them."""
    found = []
    judged = [side for side in chosen if side.has_quality and not side.prepares]
    if settings.smoke:  # each further setting would cost another start
        judged = [side for side in judged if side.name in (OURS, "VW")]
    sizes = {rows_of(side, rows).count for side in judged}
    for side in judged:
        ours = side.name == OURS
        for count in sorted(sizes) if ours else [rows_of(side, rows).count]:
            tried = side.settings[:1] if settings.smoke else side.settings
            entries = [scored(side, rows, count, setting) for setting in tried]
            best = min(entries, key=lambda entry: entry["logloss"])
            found.append({"data": data, **best, "tried": [(e["setting"], e["logloss"]) for e in entries]})
            print(f"  {data} " + ", ".join(f"{name} {value}" for name, value in best.items()), flush=True)
    check_formats(found)
    return found


def check_formats(found: list[dict[str, Any]]) -> None:
    """Check that the same rows read from Parquet, which have the same keys, give the same model, bit for bit."""
    text = {entry["model"]: entry["logloss"] for entry in found if entry["side"] == OURS}  # the last one is on all rows
    for entry in found:
        if entry["side"] == "hashemb, Parquet" and entry["logloss"] != (other := text[entry["model"]]):
            raise Mismatch(f"{entry['model']}: logloss {entry['logloss']} from Parquet, {other} from text")


def scored(side: Side, rows: Rows, count: int, setting: Any) -> dict[str, Any]:
    part = rows if count == rows.count else rows.head(count)
    usage = launch(side, part, rows, setting, score=True)
    side.check(part, usage)
    result = side.quality(part, rows.directory / "out")
    if result.examples != count or not np.isfinite([result.logloss, result.auc]).all():
        raise Mismatch(f"{side.name}: {result} of {count} examples")
    point = {"model": side.model, "side": side.name, "rows": count, "setting": setting}
    return {**point, "logloss": result.logloss, "auc": result.auc}


def criteo_quality(directory: str, chosen: Sequence[Side], settings: Settings) -> list[dict[str, Any]]:
    """Measure the same on real rows, if they are available."""
    if settings.smoke:
        return []
    rows = ctr_data.criteo_head(pathlib.Path(directory) / "criteo")
    if rows is None:
        print("  no Criteo rows: $HASHEMB_DATA/criteo/head10000.tsv.gz is not there")
        return []
    return quality(rows, [side for side in chosen if "Parquet" not in side.name], settings, "Criteo")


# ---- results ----


def result(
    model: str,
    rows: Rows,
    chosen: Sequence[Side],
    runs: dict[Side, list[Run]],
    found: list[dict[str, Any]],
    skipped: dict[str, str],
    checks: dict[str, Any],
    settings: Settings,
) -> Result:
    """Summarise the sides of one model; factorisation machines also get Vowpal Wabbit's logistic regression."""
    compared = [side for side in chosen if side.model == model]
    if model == FM:
        compared += [side for side in chosen if side.group == "VW LR"]
    timed = [Timed(side, rows) for side in compared]
    for side, other in zip(timed, compared, strict=True):
        side.name += " (logistic regression)" if other.model != model else ""
    clocks = {side.name: clocks_of(runs[other]) for side, other in zip(timed, compared, strict=True)}
    units = rows.count - START_ROWS
    table = summaries(timed, clocks, units)  # type: ignore[arg-type]
    for row, side in zip(table, compared, strict=True):
        row |= usage_of(runs[side], rows_of(side, rows).count)
    here = [entry for entry in found if entry["model"] == model or entry["side"] == "VW"]
    case = {"what": model, "rows": rows.count, "fields": len(ctr_data.NAMESPACES), "cpus": len(usable_cpus(CPUS))}
    if settings.smoke:
        case["start-up"] = "included"
    wrong = {name: why for name, why in skipped.items() if name.endswith(model)}
    return Result("ctr", case, "example", units, table, wrong, {**checks, "quality": here})


def usage_of(runs: list[Run], count: int) -> dict[str, Any]:
    """Return medians over the runs, for whole processes."""
    whole, start = [run[0] for run in runs], [run[1] for run in runs]
    return {
        "rows": count,
        "whole_s": float(np.median([usage.wall_s for usage in whole])),
        "cpu_s": float(np.median([usage.cpu_s for usage in whole])),
        "start_s": float(np.median([usage.wall_s for usage in start])),
        "peak_mib": max(usage.peak_bytes for usage in whole) / 2**20,
    }
