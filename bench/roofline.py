"""What fraction of the machine's limit is reached? hashemb against the plain C loops of native.c, on distinct rows.

The look-up is measured together with its consumer, the update alone, as a preceding look-up would warm the rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

import hashemb
from bench import embedding, native, torch_sides, workload
from bench.harness import Clock, Result, Settings, measure
from bench.sides import HashembSide, RooflineSide
from bench.workload import Case, Keys


def run(settings: Settings) -> Iterator[Result]:
    native.shared_object()
    optimizers = settings.optimizers or ["rowwise_adagrad", "adagrad"]
    base = Case(rows=1 << 23, dim=16, distribution="distinct rows")
    cases = embedding.grid(dataclasses.replace(settings, full=False), base, optimizers)
    for table, case in embedding.with_tables(settings, cases):
        for phase in ("lookup", "update") if case.optimizer == optimizers[0] else ("update",):
            yield run_phase(settings, table, case, phase)


def run_phase(settings: Settings, table: hashemb.EmbeddingTable, case: Case, phase: str) -> Result:
    torch_sides.set_num_threads(case.threads)
    batch = functools.partial(distinct_keys, case)
    ours = HashembSide(table, case, train=phase == "update")
    limit = RooflineSide(table, case, train=phase == "update")
    sides: list[Any] = [ours, limit]
    checks = embedding.check_sides(sides, dataclasses.replace(case, distribution="uniform"), train=False)
    limit.tune([batch(i) for i in range(1000, 1006)])
    if phase == "update":
        sides = [UpdateOnly(ours), UpdateOnly(limit)]
    rows = measure(sides, batch, units=case.num_keys, repeats=settings.repeats, inner=settings.inner)
    checks["huge_page_bytes"] = workload.huge_page_bytes(table)
    return Result("roofline", {"phase": phase, **dataclasses.asdict(case)}, "key", case.num_keys, rows, {}, checks)


def distinct_keys(case: Case, number: int) -> Keys:
    """Return keys of distinct random rows: a slice of a permutation of all rows, which changes after each full pass."""
    per_turn = case.rows // case.num_keys
    rows = permutation(case.rows, number // per_turn)
    begin = number % per_turn * case.num_keys
    chosen = rows[begin : begin + case.num_keys]
    return workload.keys_of_rows(chosen, case.rows).reshape(case.batch, case.fields, 1)


@functools.lru_cache(maxsize=2)
def permutation(num_rows: int, seed: int) -> Any:
    return np.random.default_rng(seed).permutation(num_rows)


class UpdateOnly:
    """The update of a side, without a look-up."""

    def __init__(self, side: HashembSide | RooflineSide) -> None:
        self.side, self.name, self.group = side, side.name, side.group
        self.prepare, self.note = side.prepare, getattr(side, "note", "")

    def run(self, prepared: Any, clock: Clock) -> None:
        self.side.update(prepared, np.empty(0, np.float32))
        clock.lap("update")
