"""A soak test: two exact writers, a reader, snapshots with verify, and deltas with a follower, for hours on one table.

    $ python tests/soak.py --hours 2 --pace 0.3

Every ten seconds the memory (smaps_rollup), open descriptors and threads of each process are written to a CSV file. At
the end the test checks that

- every process ended normally, every snapshot verified, and the replica equalled its source at each comparison;
- the rows are, bit for bit, the sums of the gradients that the writers recorded;
- the anonymous memory of no process grew by more than a bound over the second half, according to a linear fit;
- open descriptors and threads were no more in the last quarter than in the second.

By design the history.json of the table grows to 1,000 points, and so does the memory of its readers, so the history is
filled beforehand.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from soak_roles import FAILURE, ROLES, Board, create, run_role, soak_keys

import hashemb

FIELDS = ("seconds", "process", "rss_kib", "pss_kib", "anonymous_kib", "descriptors", "threads")
HISTORY_POINTS = 1000


class SoakError(AssertionError):
    """Raised for a failure of the soak."""


@dataclass(frozen=True)
class Plan:
    """Duration, load and limits. `growth_kib` bounds the growth of anonymous memory over the second half."""

    seconds: float
    pace: float = 0.3
    every_s: float = 10.0
    growth_kib: float = 1024.0
    prefill: bool = True


def run_soak(directory: Path, plan: Plan, csv_path: Path | None = None) -> dict[str, Any]:
    """Run the soak in a new directory below `directory`, which is removed unless it fails; return the figures."""
    root = Path(tempfile.mkdtemp(prefix="soak-", dir=directory))
    prepare(root, prefill=plan.prefill)
    context, board = multiprocessing.get_context("spawn"), Board(root / "board")
    processes = {role: context.Process(target=run_role, args=(role, root, plan.pace), daemon=True) for role in ROLES}
    try:
        for process in processes.values():
            process.start()
        samples = watch(processes, board, plan, csv_path)
        board["stop"][0] = 1
        for process in processes.values():
            process.join(120)
        check_ends(root, processes)
    finally:
        for process in processes.values():
            process.kill()
            process.join()
    figures = {**done(board), "sums": check_sums(root), **judge(samples, plan.growth_kib)}
    shutil.rmtree(root)
    return figures


def prepare(root: Path, *, prefill: bool) -> None:
    """Create the table, with as many points of history as it can have."""
    with create(root / "table") as table:
        for _ in range(HISTORY_POINTS if prefill else 0):
            table.export_delta(None, root / "empty.delta")
            (root / "empty.delta").unlink()


# ---- watching ----


def watch(processes: dict[str, Any], board: Board, plan: Plan, csv_path: Path | None) -> list[dict[str, Any]]:
    """Sample every process until the time is over or one of them ends."""
    samples: list[dict[str, Any]] = []
    with open(csv_path or os.devnull, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        began = time.monotonic()
        while time.monotonic() - began < plan.seconds and not board["stop"][0]:
            time.sleep(plan.every_s)
            for role, process in processes.items():
                if process.exitcode is None and (found := usage(process.pid)):
                    samples.append({"seconds": round(time.monotonic() - began, 1), "process": role, **found})
                    writer.writerow(samples[-1])
            file.flush()
            if any(process.exitcode is not None for process in processes.values()):
                break
    return samples


def usage(pid: int) -> dict[str, int]:
    """Return memory in KiB, descriptors and threads; an empty dict for a process that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        memory = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        descriptors, threads = (len(os.listdir(f"/proc/{pid}/{kind}")) for kind in ("fd", "task"))
    except (OSError, ProcessLookupError):
        return {}
    return {
        "rss_kib": memory["Rss"],
        "pss_kib": memory["Pss"],
        "anonymous_kib": memory["Anonymous"],
        "descriptors": descriptors,
        "threads": threads,
    }


# ---- the verdict ----


def check_ends(root: Path, processes: dict[str, Any]) -> None:
    failures = [root / FAILURE.format(role) for role in processes]
    texts = [f"{file.stem}:\n{file.read_text(encoding='utf-8')}" for file in failures if file.exists()]
    codes = {role: process.exitcode for role, process in processes.items()}
    if texts or any(code != 0 for code in codes.values()):
        raise SoakError(f"exit codes {codes}; see {root}\n" + "\n".join(texts))


def done(board: Board) -> dict[str, int]:
    counted = {name: int(board[name].sum()) for name in ("batches", "lookups", "verified", "applied", "compared")}
    missing = [name for name, count in counted.items() if not count]
    if missing:
        raise SoakError(f"nothing was {', '.join(missing)}: {counted}")
    return counted


def check_sums(root: Path) -> str:
    """Check that every batch is in the table exactly once, by SGD with learning rate 1 from zeros."""
    expected = -sum(np.load(root / f"sums-{number}.npy").astype(np.float32) for number in range(2))
    with hashemb.open(root / "table") as table:
        found = table.lookup(soak_keys(table))
    wrong = np.flatnonzero((found != expected).any(axis=1))
    if wrong.size:
        raise SoakError(f"{wrong.size} rows are not the sums of their gradients, first {wrong[:5].tolist()}")
    problems = hashemb.verify(root / "table")
    if problems:
        raise SoakError(f"the table does not verify: {problems}")
    return "exact"


def judge(samples: list[dict[str, Any]], growth_kib: float) -> dict[str, Any]:
    """Judge each process by its growth over the second half and the low quantiles of descriptors and threads."""
    report: dict[str, Any] = {}
    complaints = []
    for role in dict.fromkeys(sample["process"] for sample in samples):
        mine = [sample for sample in samples if sample["process"] == role]
        grown = growth_over_second_half([s["seconds"] for s in mine], [s["anonymous_kib"] for s in mine])
        levels = {name: quarters([s[name] for s in mine]) for name in ("descriptors", "threads")}
        report[role] = {"anonymous_kib": mine[-1]["anonymous_kib"], "grown_kib": round(grown, 1), **levels}
        if grown > growth_kib:
            complaints.append(f"{role}: memory grew by {grown:.0f} KiB in the second half, {growth_kib:.0f} allowed")
        complaints += [f"{role}: {name} rose from {a} to {b}" for name, (a, b) in levels.items() if b > a]
    if complaints:
        raise SoakError("\n".join([*complaints, json.dumps(report, indent=1)]))
    return {"processes": report}


def growth_over_second_half(seconds: list[float], kib: list[float]) -> float:
    """Return the growth along a least-squares line through the second half of the samples."""
    x, y = np.array(seconds[len(seconds) // 2 :]), np.array(kib[len(kib) // 2 :], float)
    if x.size < 3:
        return 0.0
    return float(np.polyfit(x, y, 1)[0] * (x[-1] - x[0]))


def quarters(values: list[int]) -> tuple[int, int]:
    """Return the 10 % quantile in the second quarter and in the last.

    Some descriptors are open only briefly, and a table that is being reopened has none; a leaked descriptor raises all
    later values.
    """
    n = len(values)
    parts = (values[n // 4 : n // 2] or values, values[3 * n // 4 :])
    second, last = (int(np.quantile(part, 0.1, method="lower")) for part in parts)
    return second, last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--pace", type=float, default=0.3, help="of a processor, for each of the five processes")
    parser.add_argument("--every", type=float, default=10.0, metavar="SECONDS", help="between two samples")
    parser.add_argument("--growth", type=float, default=1024.0, metavar="KIB", help="bound on the second half's growth")
    parser.add_argument("--csv", type=Path, default=Path("soak.csv"))
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the tables are made")
    options = parser.parse_args()
    plan = Plan(3600 * options.hours, options.pace, options.every, options.growth)
    try:
        figures = run_soak(options.dir, plan, options.csv)
    except SoakError as error:
        sys.exit(f"FAILED: {error}")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
