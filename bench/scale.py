"""Does the size of a table cost anything? From 2**16 to 2**33 rows, with the same set of keys at every size.

A table of 2**33 rows of 64 bytes has 512 GiB, most of which is never written. The keys come from a fixed set, so the
memory touched is bounded; but in a sparse table each of them has a page of weights and one of state to itself, in
memory and on disk. That is why the set is small (2**16 keys), and why the disk used is reported.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

import hashemb
from bench import torch_sides, workload
from bench.harness import Clock, Mismatch, Result, Settings, digest, measure
from bench.workload import OPTIMIZERS, gradients

DIM, BATCH = 16, 4096 * 26
BASE_BITS = 25  # ratios are to this size
SIZES = (25, 16, 18, 20, 22, 24, 28, 30, 33)


class SizeSide:
    """A table of 2**bits rows in which every key of the set has been written once."""

    def __init__(self, directory: str, bits: int, keys: Any) -> None:
        self.name = self.group = f"2^{bits} rows"
        path = os.path.join(directory, f"{bits}.emb")
        self.table = hashemb.create(
            path, num_embeddings=1 << bits, embedding_dim=DIM, optimizer=OPTIMIZERS["rowwise_adagrad"]
        )
        self.table.update(keys, gradients(keys.size, DIM))
        self.out = np.zeros((BATCH, DIM), np.float32)
        self.grads = gradients(BATCH, DIM)
        info = hashemb.info(path)  # not stats(): asking for the resident pages of half a terabyte takes seconds
        self.disk_bytes = info.disk_bytes
        self.note = f"{info.logical_bytes / 2**30:.1f} GiB, {info.disk_bytes / 2**30:.2f} on disk"

    def prepare(self, keys: Any) -> Any:
        return keys

    def run(self, prepared: Any, clock: Clock) -> None:
        grads = self.grads[: prepared.size]
        self.table.lookup(prepared, out=self.out[: prepared.size])
        clock.lap("lookup")
        self.table.update(prepared, grads)
        clock.lap("update")


class CreateSide:
    """Creation, opening and closing of a table of 2**bits rows; nothing is written to it."""

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


def run(settings: Settings) -> Iterator[Result]:
    torch_sides.set_num_threads(1)
    num_keys = 1 << (8 if settings.smoke else 16)
    keys = np.random.default_rng(11).integers(0, 1 << 64, num_keys, np.uint64)
    with tempfile.TemporaryDirectory(prefix="hashemb-bench-", dir=settings.directory) as directory:
        sizes = SIZES[:2] + SIZES[-1:] if settings.smoke else SIZES
        creations = [CreateSide(directory, bits) for bits in sizes]
        rows = measure(creations, int, units=1, repeats=settings.repeats, inner=settings.inner)
        yield Result("scale", {"what": "create and open"}, "table", 1, rows, {}, {})
        yield steps(settings, [SizeSide(directory, bits, keys) for bits in sizes], keys)


def steps(settings: Settings, sides: list[SizeSide], keys: Any) -> Result:
    """Look-up and update at every size, the sizes in turn."""

    @functools.lru_cache(maxsize=4)
    def batch(number: int) -> Any:
        return keys[np.random.default_rng([5, number]).integers(0, keys.size, BATCH if keys.size > 1 << 10 else 512)]

    checks: dict[str, Any] = {"distinct_keys": keys.size, "disk_gib": {s.name: s.disk_bytes / 2**30 for s in sides}}
    for side in sides:
        rows = side.table.rows(keys)
        if not np.array_equal(side.table.lookup(keys), side.table.weight[rows]):
            raise Mismatch(f"{side.name}: look-up is not the rows' bits")
        checks[f"lookup_sha256 {side.name}"] = digest(side.table.lookup(keys))
    measured = measure(sides, batch, units=batch(0).size, repeats=settings.repeats, inner=settings.inner)
    for side in sides:
        workload.drop_table(side.table)
    point = {"what": "look-up and update", "dim": DIM, "distinct_keys": keys.size, "threads": 1}
    return Result("scale", point, "key", batch(0).size, measured, {}, checks)
