"""Look-ups and updates of embeddings, ours and the peers', on a grid of cases.

This is the common part of lookup.py, update.py and pooled.py.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

import hashemb
from bench import torch_sides, workload
from bench.harness import Mismatch, Result, Settings, Skip, available, digest, measure, require_memory
from bench.sides import EmbeddingSide, HashembSide, NumpySide, RooflineSide
from bench.workload import Case

SETTLE_S = 0.03  # libgomp's idle threads spin for about this long
CHECKED_SAMPLES = 256


def grid(settings: Settings, base: Case, optimizers: list[str]) -> Iterator[Case]:
    """Yield the acceptance cases (dims 16 and 64, 1 and 2 threads), the full grid, or one tiny case."""
    threads = settings.threads or [1, 2]
    if settings.smoke:
        dim, tiny = settings.dims[0] if settings.dims else 16, base.batch // 64
        yield dataclasses.replace(base, rows=1 << 14, dim=dim, batch=tiny, threads=2, optimizer=optimizers[0])
        return
    if not settings.full:
        for o, d, t in itertools.product(optimizers, settings.dims or [16, 64], threads):
            yield dataclasses.replace(base, optimizer=o, dim=d, threads=t)
        return
    dims = settings.dims or [4, 8, 16, 32, 64, 128]
    batches = [max(1, base.batch * b // 4096) for b in (256, 4096, 16384)]
    for dtype, rows, o, d in itertools.product(("float32", "bfloat16"), (1 << 20, 1 << 23, 1 << 25), optimizers, dims):
        for dist, b, t in itertools.product(("uniform", "zipf1.2"), batches, threads):
            yield dataclasses.replace(
                base, dtype=dtype, rows=rows, optimizer=o, dim=d, distribution=dist, batch=b, threads=t
            )


def run(bench: str, settings: Settings, base: Case, *, train: bool) -> Iterator[Result]:
    """Measure every case of the grid."""
    optimizers = settings.optimizers or (["rowwise_adagrad", "adagrad"] if train else ["rowwise_adagrad"])
    for table, case in with_tables(settings, grid(settings, base, optimizers)):
        yield run_case(bench, settings, table, case, train=train)


def with_tables(settings: Settings, cases: Iterable[Case]) -> Iterator[tuple[hashemb.EmbeddingTable, Case]]:
    """Yield each case with a warm table; consecutive cases with the same kind of table share it."""
    for _, group in itertools.groupby(cases, key=lambda c: (c.rows, c.dim, c.dtype, c.optimizer)):
        same_table = list(group)
        with tempfile.TemporaryDirectory(prefix="hashemb-bench-", dir=settings.directory) as directory:
            try:
                require_memory(2 * workload.table_bytes(same_table[0]), "the table and a peer's copy")
            except Skip as reason:
                print(f"skipped {same_table[0]}: {reason}")
                continue
            table = workload.make_table(directory, same_table[0])
            for case in same_table:
                yield table, case
            workload.drop_table(table)


def run_case(bench: str, settings: Settings, table: hashemb.EmbeddingTable, case: Case, *, train: bool) -> Result:
    """Make the sides, check each, and measure them in turn."""
    torch_sides.set_num_threads(case.threads)
    skipped: dict[str, str] = {}
    sides = make_sides(table, case, skipped, settings, train=train)
    batch = functools.lru_cache(maxsize=4)(functools.partial(workload.keys_for, case))
    checks = check_sides(sides, case, train=train)
    for side in sides:
        if isinstance(side, RooflineSide):
            side.tune([batch(i) for i in range(1000, 1006)])
    settle_s = SETTLE_S if case.threads > 1 and not settings.smoke else 0.0
    rows = measure(sides, batch, units=case.num_keys, repeats=settings.repeats, inner=settings.inner, settle_s=settle_s)
    checks["huge_page_bytes"] = workload.huge_page_bytes(table)
    return Result(bench, dataclasses.asdict(case), "key", case.num_keys, rows, skipped, checks)


def make_sides(
    table: hashemb.EmbeddingTable, case: Case, skipped: dict[str, str], settings: Settings, *, train: bool
) -> list[EmbeddingSide]:
    """Return our side, then every side that can run on this machine and whose name `--sides` matches."""
    makers: list[tuple[str, Any]] = [
        ("hashemb new result", lambda: HashembSide(table, case, train=train, reuse=False)),
        ("roofline", lambda: RooflineSide(table, case, train=train)),
        ("NumPy", lambda: NumpySide(table, case, train=train)),
        *torch_sides.make_sides(table, case, train=train),
    ]
    sides: list[EmbeddingSide] = [HashembSide(table, case, train=train)]
    for name, make in makers:
        if re.search(settings.sides, name):
            with available(skipped, name):
                sides.append(make())
    return sides


# ---- checks ----


def check_sides(sides: list[EmbeddingSide], case: Case, *, train: bool) -> dict[str, Any]:
    """Check that every look-up returns the rows and that every update agrees with Adagrad.

    Returns counts, and hashes of our results as long as nothing but the initial fill has updated the table: later they
    depend on how many updates have been timed.
    """
    keys = workload.keys_for(case, 1 << 20)
    fresh = workload.is_fresh(sides[0].table)
    checks: dict[str, Any] = {"keys": case.num_keys, "values": case.num_vectors * case.dim}
    for side in sides:
        result = side.values(side.lookup(side.prepare(keys)))
        rows = side.rows(keys)
        few = slice(0, CHECKED_SAMPLES)
        vectors = result.reshape(case.batch, -1, case.dim)
        if result.size != case.num_vectors * case.dim:
            raise Mismatch(f"{side.name}: look-up gave {result.size} values")
        workload.check_lookup(side.name, rows[few], side.read(rows[few])[0], vectors[few])
        if fresh and side is sides[0]:
            checks["lookup_sha256"] = digest(result)
    for side in sides if train else ():
        rows, values = check_one_update(side, case, keys)
        checks["distinct_rows"] = int(rows.size)
        if fresh and side is sides[0]:
            checks["update_sha256"] = digest(*values)
    return checks


def check_one_update(side: EmbeddingSide, case: Case, keys: Any) -> tuple[Any, tuple[Any, Any]]:
    """Check one step of a side against the judge.

    For a side with different arithmetic, check only that the weights have changed and are finite. Returns the distinct
    rows, and their weights and state after the step.
    """
    prepared = side.prepare(keys)
    rows, total = workload.summed_gradients(side.rows(keys), side.grads)
    before = side.read(rows)
    side.update(prepared, side.lookup(prepared))
    after = side.read(rows)
    if side.judged:
        atol = 1e-6 if case.dtype == "float32" else 1e-2
        workload.check_update(side.name, case.optimizer, total, before, after, atol)
    elif not np.isfinite(after[0]).all() or not (after[0] != before[0]).any():
        raise Mismatch(f"{side.name}: an update left no change, or values that are not finite")
    return rows, after
