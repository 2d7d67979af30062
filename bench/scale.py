"""Does the size of a table affect its speed? From 2**16 to 2**33 rows, with a warm working set of equal size.

Keys are hashed, so the rows of a set of keys are spread over the whole table, and "of equal size" has three meanings:

- the same keys at every size: equal rows. But memory consists of pages. From 2**24 rows on, nearly every key has a page
  of weights to itself, and at 2**33 also a page of state and most of a page of the page table, so that the walk from an
  address to its page misses the cache at two more levels. This is what a user sees after making a table larger;
- equally dense pages: keys whose rows are placed in a table of 2**33 as those of the first set are in a table of 2**25,
  except for gaps between stretches of 2**16 rows. This gives the same number of pages and nearly the same number of
  page tables, and so isolates the cost of size in the library itself;
- equal memory: more keys in the table of 2**25, until its pages and page tables take as much as those of 2**33.

The plain C loops of native.c on the same rows show how much of the difference is due to the machine. A table of
2**33 rows of 64 bytes has 512 GiB, most of which is never written; the set is small (2**16 keys) to bound what is. On
a disk file system the kernel writes dirty pages back, and the next store into each of them faults, so more pages mean
more faults. The faults are reported; ``--dir`` on a tmpfs with a few GiB avoids them. All tables have pages of 4 KiB
(``huge_pages=False``): otherwise the small ones would have larger pages than the large ones.
"""

from __future__ import annotations

import functools
import math
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import hashemb
from bench import native, torch_sides, workload
from bench.harness import Clock, Mismatch, Result, Settings, digest, measure
from bench.workload import OPTIMIZERS, gradients

DIM, BATCH = 16, 4096 * 26
BASE_BITS, TOP_BITS = 25, 33  # ratios are relative to the first size
SIZES = (BASE_BITS, 16, 18, 20, 22, 24, 28, 30, TOP_BITS)
PAGE_BYTES, TABLE_ENTRIES = 4096, 512  # of a page, in a page of the page table
BYTES_PER_ROW = (4 * DIM, 4, 4 / 1024)  # weights, row-wise state, one number per 64 KiB of weights
LOOP_AHEAD = 24
STRETCH_BITS = 16  # 4 MiB of weights, two pages of the page table


class SizeSide:
    """A set of keys, each written once, in a table of 2**bits rows."""

    def __init__(self, name: str, table: hashemb.EmbeddingTable, keys: Any) -> None:
        self.name = self.group = name
        self.table, self.keys = table, keys
        for begin in range(0, keys.size, BATCH):
            part = keys[begin : begin + BATCH]
            table.update(part, gradients(BATCH, DIM)[: part.size])
        self.out, self.grads = np.zeros((BATCH, DIM), np.float32), gradients(BATCH, DIM)
        info = hashemb.info(table.path)  # not stats(): querying the resident pages of half a terabyte takes seconds
        self.disk_bytes, self.logical_bytes = info.disk_bytes, info.logical_bytes
        self.faults = self.runs = 0
        self.run(np.resize(keys, BATCH), Clock())  # allocate the scratch memory that later calls reuse

    @property
    def note(self) -> str:
        sizes = f"{self.logical_bytes / 2**30:.1f} GiB, {self.disk_bytes / 2**30:.2f} on disk"
        return f"{sizes}; {self.keys.size} keys; {self.faults / max(self.runs, 1):.0f} page faults a batch"

    def prepare(self, draws: Any) -> Any:
        return self.keys[draws % self.keys.size]

    def run(self, prepared: Any, clock: Clock) -> None:
        grads, faults = self.grads[: prepared.size], page_faults()
        self.table.lookup(prepared, out=self.out[: prepared.size])
        clock.lap("lookup")
        self.table.update(prepared, grads)
        clock.lap("update")
        self.faults, self.runs = self.faults + page_faults() - faults, self.runs + 1


class LoopSide:
    """The plain C loops on the rows of a side's keys: copy them in the order drawn, add to them in ascending order.

    They run in one thread, so that a row that was drawn twice does no harm.
    """

    def __init__(self, side: SizeSide) -> None:
        native.shared_object()
        self.name = self.group = side.name
        self.side, self.weight, self.state = side, side.table.weight, side.table.state["accumulator"]

    def prepare(self, draws: Any) -> tuple[Any, Any]:
        rows = self.side.table.rows(self.side.prepare(draws))
        return rows, np.sort(rows)

    def run(self, prepared: tuple[Any, Any], clock: Clock) -> None:
        rows, ascending = prepared
        native.gather(self.weight, rows, self.side.out, ahead=LOOP_AHEAD, nontemporal=False, far=True, num_threads=1)
        clock.lap("gather")
        native.update(
            self.weight, self.state, ascending, None, self.side.grads, scale=1e-9, ahead=LOOP_AHEAD, num_threads=1
        )
        clock.lap("add")


class CreateSide:
    """Create, open and close a table of 2**bits rows, without writing to it."""

    def __init__(self, directory: str, bits: int) -> None:
        self.name = self.group = f"2^{bits} rows"
        self.path, self.rows = os.path.join(directory, f"create-{bits}.emb"), 1 << bits

    def prepare(self, batch: int) -> None:
        return None

    def run(self, prepared: None, clock: Clock) -> None:
        clock.start()
        table = hashemb.create(self.path, num_embeddings=self.rows, embedding_dim=DIM)
        clock.lap("create")
        table.close()
        for mode in ("r+", "r"):
            clock.start()
            table = hashemb.open(self.path, mode)
            clock.lap(f"open {mode}")
            table.close()
        shutil.rmtree(self.path)
        clock.start()


# ---- working sets ----


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def working_set_bytes(bits: int, num_keys: float) -> float:
    """Return the expected bytes of pages, page tables included, that hashed keys touch in a table of 2**bits rows.

    n keys hashed over p pages touch p * (1 - (1 - 1/p)**n) of them, nearly p * (1 - exp(-n/p)). A page of the page
    table maps 512 pages, and so on for four levels.
    """
    pages = 0.0
    for row_bytes in BYTES_PER_ROW:
        spans = [max(1.0, 2.0**bits * row_bytes / PAGE_BYTES / TABLE_ENTRIES**level) for level in range(5)]
        pages += sum(-p * math.expm1(-num_keys / p) for p in spans)
    return pages * PAGE_BYTES


def keys_that_take(bits: int, num_bytes: float) -> int:
    """Return how many hashed keys have a working set of that many bytes; at most four per row of the table."""
    low, high = 1, 4 << bits
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if working_set_bytes(bits, middle) >= num_bytes else (middle + 1, high)
    return low


def keys_as_dense(keys: Any, base: hashemb.EmbeddingTable, top: hashemb.EmbeddingTable) -> Any:
    """Return keys whose rows are placed in `top` as those of `keys` are in `base`, except for gaps between stretches.

    A stretch has 2**16 rows. Stretches keep their order over the whole table, because a kernel may divide its work by
    the position of rows.
    """
    rows = base.rows(keys)
    stretch, within = rows >> STRETCH_BITS, rows & ((1 << STRETCH_BITS) - 1)
    spread = stretch * (top.num_embeddings // base.num_embeddings << STRETCH_BITS) + within
    found = workload.keys_of_rows(spread, top.num_embeddings)
    if not np.array_equal(top.rows(found), spread):
        raise Mismatch("the keys do not have the rows that they were made for")
    return found


# ---- benchmarks ----


def run(settings: Settings) -> Iterator[Result]:
    torch_sides.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="hashemb-bench-", dir=settings.directory) as directory:
        sizes = SIZES[:2] + SIZES[-1:] if settings.smoke else SIZES
        creations = [CreateSide(directory, bits) for bits in sizes]
        rows = measure(creations, int, units=1, repeats=settings.repeats, inner=settings.inner)
        yield Result("scale", {"what": "create and open"}, "table", 1, rows, {}, {})
        rng = np.random.default_rng(11)
        keys = rng.integers(0, 1 << 64, 1 << (8 if settings.smoke else 16), np.uint64)
        tables = {bits: make_table(directory, bits) for bits in sizes}
        same_keys = {bits: SizeSide(f"2^{bits} rows", table, keys) for bits, table in tables.items()}
        yield steps(settings, list(same_keys.values()), "look-up and update")
        base, top = same_keys[BASE_BITS], same_keys[TOP_BITS]
        num_keys = keys_that_take(BASE_BITS, working_set_bytes(TOP_BITS, keys.size))
        more_keys = np.concatenate([keys, rng.integers(0, 1 << 64, num_keys - keys.size, np.uint64)])
        compared = [
            base,
            top,
            SizeSide(f"{top.name} as dense", top.table, keys_as_dense(keys, base.table, top.table)),
            SizeSide(f"{base.name} of the memory", base.table, more_keys),
        ]
        yield steps(settings, compared, "what equal size means")
        limits = [LoopSide(side) for side in compared]
        yield turns(settings, limits, "what the machine makes of it: plain C loops")
        for table in tables.values():
            workload.drop_table(table)


def make_table(directory: str, bits: int) -> hashemb.EmbeddingTable:
    path = os.path.join(directory, f"{bits}.emb")
    return hashemb.create(
        path, num_embeddings=1 << bits, embedding_dim=DIM, optimizer=OPTIMIZERS["rowwise_adagrad"], huge_pages=False
    )


@functools.lru_cache(maxsize=4)
def draws(size: int, number: int) -> Any:
    """Return batch `number`: the random numbers by which a side picks its keys."""
    return np.random.default_rng([5, number]).integers(0, 1 << 62, size)


def steps(settings: Settings, sides: Sequence[SizeSide], what: str) -> Result:
    """Time the look-up and update of each side, in turn."""
    checks: dict[str, Any] = {"disk_gib": {s.name: s.disk_bytes / 2**30 for s in sides}}
    for side in sides:
        side.faults = side.runs = 0
        rows, found = side.table.rows(side.keys), side.table.lookup(side.keys)
        if not np.array_equal(found, side.table.weight[rows]):
            raise Mismatch(f"{side.name}: look-up is not the rows' bits")
        checks[f"lookup_sha256 {side.name}"] = digest(found)
    result = turns(settings, sides, what)
    checks["huge_page_bytes"] = {side.name: workload.huge_page_bytes(side.table) for side in sides}
    return Result(**{**result.__dict__, "checks": {**checks, **result.checks}})


def turns(settings: Settings, sides: Sequence[Any], what: str) -> Result:
    """Time the sides in turn; the checks hold the ratio of each phase's median to that of the first side."""
    size = 512 if settings.smoke else BATCH
    batch = functools.partial(draws, size)
    rows = measure(sides, batch, units=size, repeats=settings.repeats, inner=settings.inner)
    base = rows[0]["phases_ns"]
    ratios = {row["name"]: {phase: row["phases_ns"][phase] / ns for phase, ns in base.items()} for row in rows}
    return Result("scale", {"what": what, "dim": DIM, "threads": 1}, "key", size, rows, {}, {"phase_ratios": ratios})
