"""What does sharing cost? Each process has one thread, and each benchmark uses a table with every row written:

- two concurrent writers against one, Hogwild and exact, with uniform and Zipf keys;
- a snapshot during full-speed training by two writers: how long they are held up when it begins, what fraction of their
  rate remains until it has returned, and how long it takes. With three processes on two cores, the writers cannot keep
  their full rate;
- a delta after 1 % of the blocks were written, against a snapshot of all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np

import hashemb
from bench import workload
from bench.harness import Clock, Mismatch, Result, Settings, Skip, measure, require_memory
from bench.workload import Case
from bench.writers import LOG_FIELDS, Times, Writer, timed, writers
from hashemb import _sharing
from hashemb._points import snapshot as snapshot_module

DISTRIBUTIONS = ("uniform", "zipf1.2")
BATCHES_PER_RUN = 20
WARM_S, SNAPSHOTS, ATTEMPTS = 2.0, 5, 10


def run(settings: Settings) -> Iterator[Result]:
    for optimizer in settings.optimizers or (["adagrad"] if settings.smoke else ["rowwise_adagrad", "adagrad"]):
        case = Case(rows=1 << (14 if settings.smoke else 23), dim=16, optimizer=optimizer)
        case = dataclasses.replace(case, batch=64) if settings.smoke else case
        yield from together(settings, case)
    rows = 1 << (14 if settings.smoke else 25)
    case = Case(rows=rows, dim=16, optimizer="adagrad")
    yield from snapshots(settings, case)
    yield from deltas(settings, case)


@contextlib.contextmanager
def table_of(settings: Settings, case: Case, copies: int = 0) -> Iterator[tuple[str, hashemb.EmbeddingTable]]:
    """Yield a directory and a warm table in it, with room for `copies` copies."""
    needed = workload.table_bytes(case) * (1 + copies)
    free = shutil.disk_usage(settings.directory).free
    if free < needed:
        raise Skip(f"{settings.directory} needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
    require_memory(needed, "the table")
    with tempfile.TemporaryDirectory(prefix="hashemb-bench-", dir=settings.directory) as directory:
        table = workload.make_table(directory, case)
        try:
            yield directory, table
        finally:
            table.close()


# ---- concurrent writers ----


class Together:
    """Several writers at once. Time per key counts the keys of all, so two that don't disturb each other halve it."""

    def __init__(self, started: list[Writer], batches: int) -> None:
        self.name = self.group = f"{len(started)} writer{'s' * (len(started) > 1)}"
        self.writers, self.batches, self.share = started, batches, float(len(started))

    def prepare(self, batch: int) -> int:
        return batch

    def run(self, prepared: int, clock: Clock) -> None:
        clock.start()
        for writer in self.writers:
            writer.ask("some", self.batches)
        for writer in self.writers:
            writer.answer()
        clock.lap("update")


def together(settings: Settings, case: Case) -> Iterator[Result]:
    batches = 3 if settings.smoke else BATCHES_PER_RUN
    with table_of(settings, case) as (_, table):
        for distribution in DISTRIBUTIONS:
            for isolation in ("hogwild", "exact"):
                point = dataclasses.replace(case, distribution=distribution)
                before, huge = table.step, workload.huge_page_bytes(table)
                with writers(table.path, point, isolation, 2) as started:
                    sides = [Together(started[:1], batches), Together(started, batches)]
                    units = case.num_keys * batches
                    rows = measure(sides, int, units=units, repeats=settings.repeats, inner=1)
                wanted = 2 + (settings.repeats + 1) * 2 * 3 * batches
                if table.step - before != wanted:
                    raise Mismatch(f"{wanted} batches were written, the table counts {table.step - before}")
                checks = {"speed_up": 1.0 / rows[1]["median_ratio"], "steps": wanted, "huge_page_bytes": huge}
                yield Result("sharing", point_of(point, "two writers", isolation), "key", units, rows, {}, checks)


def point_of(case: Case, what: str, isolation: str = "hogwild") -> dict[str, Any]:
    named = {k: getattr(case, k) for k in ("rows", "dim", "batch", "fields", "distribution", "optimizer")}
    return {"what": what, "isolation": isolation, **named}


# ---- a snapshot during training ----


def snapshots(settings: Settings, case: Case) -> Iterator[Result]:
    count, warm_s = (2, 0.05) if settings.smoke else (max(SNAPSHOTS, settings.repeats // 2), WARM_S)
    with table_of(settings, case, copies=1) as (directory, table):
        for distribution in DISTRIBUTIONS:
            for batch in (16,) if settings.smoke else (256, 4096):
                point = dataclasses.replace(case, distribution=distribution, batch=batch)
                with writers(table.path, point, "hogwild", 2) as started:
                    runs = [patiently(directory, table, started, warm_s) for _ in range(count)]
                yield snapshot_result(point, runs)


class Missed(Mismatch):
    """Raised if a writer had no batch before the snapshot, or none while it was taken."""


def patiently(
    directory: str, table: hashemb.EmbeddingTable, started: list[Writer], warm_s: float
) -> dict[str, float]:
    """Repeat a snapshot if, at smoke size, it finished within milliseconds while a writer waited for a processor."""
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(Missed):
            return snapshot_under_fire(directory, table, started, warm_s)
    return snapshot_under_fire(directory, table, started, warm_s)


def snapshot_under_fire(
    directory: str, table: hashemb.EmbeddingTable, started: list[Writer], warm_s: float
) -> dict[str, float]:
    """Measure one snapshot and its effect on the writers."""
    for writer in started:
        writer.ask("until told")
    time.sleep(warm_s)
    dst = os.path.join(directory, "snapshot")
    begin, copy = timed(_sharing.begin_point), timed(snapshot_module._copy_blocks)
    with mock.patch.object(_sharing, "begin_point", begin), mock.patch.object(snapshot_module, "_copy_blocks", copy):
        called = time.perf_counter()
        info = table.snapshot(dst)
        returned = time.perf_counter()
    time.sleep(warm_s / 4)
    for writer in started:
        writer.ask("stop")
    logs = [writer.answer() for writer in started]
    check_snapshot(dst, info)
    size = hashemb.info(dst).disk_bytes
    shutil.rmtree(dst)
    opened: float = begin.ended  # type: ignore[attr-defined]
    parts = {"begin_s": begin.seconds, "copy_s": copy.seconds}  # type: ignore[attr-defined]
    return {**effect_on(logs, called, opened, returned), **parts, "whole_s": returned - called, "bytes": float(size)}


def check_snapshot(path: str, info: hashemb.SnapshotInfo) -> None:
    with hashemb.open(path) as taken:
        touched = taken.stats(exact=True).rows_touched
        if taken.step != info.step or touched != taken.num_embeddings:
            raise Mismatch(f"the snapshot of step {info.step} is of step {taken.step}, with {touched} rows")


def effect_on(logs: list[Times], called: float, opened: float, returned: float) -> dict[str, float]:
    """Return how long the writers were held up (the larger time of the two) and their rates (summed over the two).

    held_s: by how much the first batch after the point in time exceeded the previous median: at the gate, and to save
    rows. rate_kept: the fraction of their rate that the writers kept from the call until it returned.
    """
    held, before, during = [], 0.0, 0.0
    begin, end = map(LOG_FIELDS.index, LOG_FIELDS)
    for log in logs:
        old, now = log[log[:, end] < called], log[(log[:, end] >= called) & (log[:, begin] < returned)]
        if not old.size or not now.size:
            raise Missed(f"a writer wrote {len(old)} batches before the snapshot and {len(now)} during it")
        usual = float(np.median(old[:, end] - old[:, begin]))
        next_one = log[log[:, end] > opened][0]
        held.append(float(max(0.0, next_one[end] - next_one[begin] - usual)))
        before += len(old) / (called - log[0, begin])
        during += share_within(now, begin, end, called, returned) / (returned - called)
    return {
        "held_s": max(held), "rate_before": before, "rate_during": during, "rate_kept": during / before
    }  # fmt: skip


def share_within(log: Times, begin: int, end: int, low: float, high: float) -> float:
    """Count the batches within a span of time; those at its edges count by the part that lies within it."""
    inside = np.minimum(log[:, end], high) - np.maximum(log[:, begin], low)
    return float((inside.clip(0.0) / (log[:, end] - log[:, begin])).sum())


def snapshot_result(case: Case, runs: list[dict[str, float]]) -> Result:
    checks: dict[str, Any] = {name: float(np.median([run[name] for run in runs])) for name in runs[0]}
    checks["worst_held_s"] = max(run["held_s"] for run in runs)
    phases = {"begin": "begin_s", "copy": "copy_s"}
    rows = [summary("snapshot", [run["whole_s"] for run in runs], {p: checks[k] for p, k in phases.items()})]
    return Result("sharing", point_of(case, "snapshot under two writers"), "snapshot", 1, rows, {}, checks)


# ---- deltas ----


def deltas(settings: Settings, case: Case) -> Iterator[Result]:
    """Compare deltas with snapshots while no writer runs. Deltas include the state, so both store the same blocks."""
    if not hasattr(hashemb.EmbeddingTable, "export_delta"):
        raise Skip("this version has no deltas")
    with table_of(settings, case, copies=1) as (directory, table):
        full, part, sizes = [], [], []
        rows_per_block = case.rows // len(np.load(os.path.join(table.path, "blocks.npy"), mmap_mode="r"))
        num_blocks = case.rows // rows_per_block
        for number in range(2 if settings.smoke else max(3, settings.repeats // 2)):
            dst, file = os.path.join(directory, "snapshot"), os.path.join(directory, f"{number}.delta")
            began = time.perf_counter()
            info = table.snapshot(dst)
            full.append(time.perf_counter() - began)
            chosen = np.random.default_rng(number).choice(num_blocks, max(1, num_blocks // 100), replace=False)
            keys = workload.keys_of_rows(np.sort(chosen) * rows_per_block, case.rows)
            table.update(keys, workload.gradients(keys.size, case.dim))
            began = time.perf_counter()
            table.export_delta(info, file, state=True)
            part.append(time.perf_counter() - began)
            sizes.append(os.path.getsize(file) / hashemb.info(dst).disk_bytes)
            shutil.rmtree(dst)
            os.unlink(file)
    rows = [summary("snapshot", full, {}), summary("delta of 1 %", part, {}, full)]
    checks = {"size_over_snapshot": float(np.median(sizes)), "time_over_snapshot": rows[1]["median_ratio"]}
    yield Result("sharing", point_of(case, "delta of 1 % of the blocks"), "file", 1, rows, {}, checks)


def summary(
    name: str, seconds: list[float], phases: dict[str, float], base: list[float] | None = None
) -> dict[str, Any]:
    """Format times that were taken here as one side of a result, like `harness.measure`."""
    ns, other = np.array(seconds) * 1e9, np.array(base or seconds) * 1e9
    ratio = float(np.median(ns) / np.median(other))
    return {
        "name": name, "group": name, "median_ns": float(np.median(ns)), "min_ns": float(ns.min()),
        "quartiles_ns": np.quantile(ns, [0.25, 0.75]).tolist(), "max_over_min": float(ns.max() / ns.min()),
        "phases_ns": {phase: s * 1e9 for phase, s in phases.items()}, "runs": ns.size,
        "median_ratio": float(np.median(ns / other)), "ratio_of_medians": ratio,
        "ratio_of_minima": float(ns.min() / other.min()), "cpu_ratio": ratio, "note": "",
    }  # fmt: skip
