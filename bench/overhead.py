"""What does a call cost? Microseconds per look-up and per update of 1, 26 and 256 x 26 keys.

Large batches show what fraction of their rate small ones reach. The table has a million rows, which fit in the caches,
because the cost of the call itself is measured.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from typing import Any

import hashemb
from bench import embedding, torch_sides, workload
from bench.harness import Clock, Result, Settings, measure
from bench.sides import EmbeddingSide
from bench.workload import Case

BATCHES = ((1, 1), (1, 26), (256, 26), (4096, 26))
KEYS_PER_RUN = 1 << 16


class Calls:
    """Many calls of a side, each with its own keys; the clock is read only before the first and after the last."""

    def __init__(self, side: EmbeddingSide) -> None:
        self.side, self.name, self.group = side, side.name, side.group

    def prepare(self, batches: list[Any]) -> list[Any]:
        return [self.side.prepare(keys) for keys in batches]

    def run(self, prepared: list[Any], clock: Clock) -> None:
        side = self.side
        results = [side.lookup(p) for p in prepared]
        clock.lap("lookup")
        for p, r in zip(prepared, results, strict=True):
            side.update(p, r)
        clock.lap("update")


def run(settings: Settings) -> Iterator[Result]:
    base = Case(rows=1 << (14 if settings.smoke else 20), dim=16)
    with tempfile.TemporaryDirectory(prefix="hashemb-bench-", dir=settings.directory) as directory:
        table = workload.make_table(directory, base)
        for case in cases(settings, base):
            yield run_case(settings, table, case)
        workload.drop_table(table)


def cases(settings: Settings, base: Case) -> Iterator[Case]:
    for batch, fields in BATCHES[:3] if settings.smoke else BATCHES:
        for threads in settings.threads or ([1] if settings.smoke else [1, 2]):
            yield dataclasses.replace(base, batch=batch, fields=fields, threads=threads)


def calls_per_run(settings: Settings, case: Case) -> int:
    return 4 if settings.smoke else max(2, min(500, KEYS_PER_RUN // case.num_keys))


def point(case: Case) -> dict[str, Any]:
    return {"keys": case.num_keys, "rows": case.rows, "dim": case.dim, "threads": case.threads}


def run_case(settings: Settings, table: hashemb.EmbeddingTable, case: Case) -> Result:
    torch_sides.set_num_threads(case.threads)
    calls = calls_per_run(settings, case)
    kept = dataclasses.replace(settings, sides=settings.sides or "NumPy|FBGEMM memory|Bag")
    skipped: dict[str, str] = {}
    sides = embedding.make_sides(table, case, skipped, kept, train=True)
    checks = embedding.check_sides(sides, case, train=True)

    @functools.lru_cache(maxsize=4)
    def batch(number: int) -> list[Any]:
        return [workload.keys_for(case, number * calls + i) for i in range(calls)]

    settle_s = embedding.SETTLE_S if case.threads > 1 else 0.0
    rows = measure(
        [Calls(side) for side in sides], batch, units=calls, repeats=settings.repeats, inner=1, settle_s=settle_s
    )
    checks["huge_page_bytes"] = workload.huge_page_bytes(table)
    return Result("overhead", point(case), "call", calls, rows, skipped, checks)
