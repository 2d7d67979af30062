"""A table four times as large as memory, against plain mappings, LMDB and RocksDB under the same limit.

Each side runs in its own process and its own memory control group, and starts with a cold page cache. It does look-ups
or training steps (look-up and update), with uniform keys or with keys drawn by Zipf's law with exponent 1.2. A row has
16 float32 values. hashemb and NumPy use row-wise Adagrad. The stores write vectors back by SGD, which needs no state;
they use batch calls, no sync and no write-ahead log, and were filled in the order of their keys.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import hashemb
from bench import workload
from bench.harness import OURS, Clock, Mismatch, Result, Settings, Skip, available, digest, file_system, summaries
from bench.kv import encode
from bench.memory_limit import drop_page_cache, limited_group
from bench.workload import EPS, LR

DIM, BATCH, WARM_SECONDS = 16, 1 << 14, 8.0
LIMITS_MIB = {"smoke": 160, "usual": 512, "full": 1024}
PLAIN = "hashemb, not asking ahead"
SIDES = [OURS, PLAIN, "NumPy memmap", "LMDB", "RocksDB"]
STORES = ("LMDB", "RocksDB")
#: A mapping without advice reads up to megabytes ahead per fault (read_ahead_kb): part of a batch is enough.
SHARES = {"NumPy memmap": 1 / 64}
CHECKED = 256  # vectors of the first batch


class Named:
    """A side as `summaries` takes it."""

    def __init__(self, name: str) -> None:
        self.name = self.group = name
        self.share = SHARES.get(name, 1.0)


# ---- parent process ----


def run(settings: Settings) -> Iterator[Result]:
    size = "smoke" if settings.smoke else "full" if settings.full else "usual"
    limit_bytes = LIMITS_MIB[size] << 20
    if file_system(settings.directory).split()[:1] == ["tmpfs"]:
        raise Skip(f"{settings.directory} is memory (tmpfs)")
    bits = (4 * limit_bytes // (DIM * 4)).bit_length() - 1 if size != "smoke" else 16
    with limited_group(limit_bytes):  # raises `Skip`, if it has to, before tables are filled
        drop_page_cache()
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="hashemb-ooc-", dir=settings.directory) as directory:
        fill(directory, bits)
        names = [name for name in SIDES if name not in STORES or filled(name, directory, bits, skipped)]
        for what in ("lookup", "train"):  # in this order: training changes what look-ups find
            for distribution in ("zipf1.2",) if settings.smoke else ("zipf1.2", "uniform"):
                spec = {"bits": bits, "distribution": distribution, "what": what, "directory": directory}
                spec |= {"batches": max(settings.repeats, 3), "warm": 3 if settings.smoke else 60}
                yield compare(spec, names, limit_bytes, skipped)


def fill(directory: str, bits: int) -> None:
    path = os.path.join(directory, "t.emb")
    optimizer = workload.OPTIMIZERS["rowwise_adagrad"]
    with hashemb.create(
        path, num_embeddings=1 << bits, embedding_dim=DIM, optimizer=optimizer, huge_pages=False
    ) as table:
        grads = np.random.default_rng(13).standard_normal((workload.FILL_ROWS, DIM)).astype(np.float32)
        for begin in range(0, 1 << bits, workload.FILL_ROWS):
            rows = np.arange(begin, min(begin + workload.FILL_ROWS, 1 << bits))
            table.update(workload.keys_of_rows(rows, 1 << bits), grads[: rows.size])


def filled(name: str, directory: str, bits: int, skipped: dict[str, str]) -> bool:
    with available(skipped, name), hashemb.open(os.path.join(directory, "t.emb"), huge_pages=False) as table:
        print(f"  filling {name}", flush=True)
        _, put = open_store(name, directory)
        keys = np.sort(workload.keys_of_rows(np.arange(1 << bits), 1 << bits))
        for begin in range(0, keys.size, 1 << 16):
            part = keys[begin : begin + (1 << 16)]
            put(encode(part.byteswap()), encode(table.lookup(part)))
        return True
    return False


def compare(spec: dict[str, Any], names: list[str], limit_bytes: int, skipped: dict[str, str]) -> Result:
    """Run every side in turn, each from a cold cache; look-ups must return the same bits."""
    found = {name: in_child({**spec, "side": name}, limit_bytes) for name in names}
    clocks: dict[str, list[Clock]] = {}
    for name, child in found.items():
        clocks[name] = [clock_of(laps) for laps in child["laps"]]
        if child["first_sha256"] != found[OURS]["first_sha256"] and spec["what"] == "lookup":
            raise Mismatch(f"{name}: the vectors of the first batch are not ours")
    checks = {"first_lookup_sha256": found[OURS]["first_sha256"], "distinct_pages_per_batch": found[OURS]["pages"]}
    checks |= {f"pages_read_per_batch {name}": child["pages_read"] for name, child in found.items()}
    point = {"what": spec["what"], "popularity": spec["distribution"]}
    case = {**point, "rows": 1 << spec["bits"], "limit_mib": limit_bytes >> 20, "dim": DIM, "keys": BATCH, "threads": 1}
    rows = summaries([Named(name) for name in names], clocks, BATCH)
    return Result("out_of_core", case, "key", BATCH, rows, skipped, checks)


def clock_of(laps: dict[str, float]) -> Clock:
    clock = Clock()
    clock.cpu_seconds = laps.pop("cpu")
    clock.seconds = laps
    return clock


def in_child(spec: dict[str, Any], limit_bytes: int) -> dict[str, Any]:
    drop_page_cache()
    with limited_group(limit_bytes) as group:
        command = [sys.executable, "-m", "bench.out_of_core", json.dumps({**spec, "group": str(group)})]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise RuntimeError(f"{spec['side']} ended with status {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# ---- child process ----


def keys_for(spec: dict[str, Any], number: int) -> Any:
    """Return the keys of batch `number`, each of an existing row: popular ranks are scattered over the table."""
    rng, n = np.random.default_rng([14, number]), 1 << spec["bits"]
    if spec["distribution"] == "uniform":
        return workload.keys_of_rows(rng.integers(0, n, BATCH), n)
    ranks = workload.zipf_ranks(rng.random(BATCH), n, 1.2)
    scattered = ranks * np.uint64(0x9E3779B97F4A7C15) % np.uint64(n)  # an odd factor is one-to-one modulo 2**bits
    return workload.keys_of_rows(scattered.astype(np.int64), n)


Lookup, Update = Callable[[Any], Any], Callable[[Any, Any, Any], None]


def table_side(spec: dict[str, Any]) -> tuple[Lookup, Update]:
    path = os.path.join(spec["directory"], "t.emb")
    table = hashemb.open(path, "r+" if spec["what"] == "train" else "r", huge_pages=False)
    table._core.fault_ahead = spec["side"] == OURS  # type: ignore[union-attr]
    return table.lookup, lambda keys, vectors, grads: table.update(keys, grads)


def memmap_side(spec: dict[str, Any]) -> tuple[Lookup, Update]:
    """Return functions on the table's own files, opened by `numpy.load`; they use our hashing, which is timed too."""
    path = os.path.join(spec["directory"], "t.emb")
    mode: Any = "r+" if spec["what"] == "train" else "r"
    weight, accumulator = (np.load(f"{path}/{name}.npy", mmap_mode=mode) for name in ("weight", "accumulator"))
    table = hashemb.open(path)

    def update(keys: Any, vectors: Any, grads: Any) -> None:
        rows, inverse = np.unique(table.rows(keys), return_inverse=True)
        total = np.zeros((rows.size, DIM), np.float32)
        np.add.at(total, inverse, grads)
        a = accumulator[rows] + (total**2).mean(axis=1)
        accumulator[rows] = a
        weight[rows] -= LR * total / (np.sqrt(a) + EPS)[:, None]

    return lambda keys: weight[table.rows(keys)], update


def store_side(spec: dict[str, Any]) -> tuple[Lookup, Update]:
    get, put = open_store(spec["side"], spec["directory"])

    def lookup(keys: Any) -> Any:
        return np.frombuffer(b"".join(get(encode(keys.byteswap()))), np.float32).reshape(-1, DIM)

    return lookup, lambda keys, vectors, grads: put(encode(keys.byteswap()), encode(vectors - np.float32(LR) * grads))


def open_store(name: str, directory: str) -> tuple[Callable[[Any], Any], Callable[[Any, Any], None]]:
    """Return get(keys) and put(keys, values), both on bytes."""
    return (open_lmdb if name == "LMDB" else open_rocksdb)(os.path.join(directory, name))


def open_lmdb(path: str) -> tuple[Callable[[Any], Any], Callable[[Any, Any], None]]:
    import lmdb

    store = lmdb.open(
        path, map_size=64 << 30, sync=False, metasync=False, writemap=True, map_async=True, readahead=False
    )

    def get(keys: list[bytes]) -> list[bytes]:
        with store.begin(buffers=True) as transaction:
            return [bytes(value) for _, value in transaction.cursor().getmulti(keys)]

    def put(keys: list[bytes], values: list[bytes]) -> None:
        with store.begin(write=True) as transaction:
            transaction.cursor().putmulti(zip(keys, values, strict=True))

    return get, put


def open_rocksdb(path: str) -> tuple[Callable[[Any], Any], Callable[[Any, Any], None]]:
    import rocksdict

    options = rocksdict.Options(raw_mode=True)
    options.create_if_missing(True)
    store = rocksdict.Rdict(path, options)
    no_log: Any = rocksdict.WriteOptions()
    no_log.disable_wal = True

    def put(keys: list[bytes], values: list[bytes]) -> None:
        batch = rocksdict.WriteBatch(raw_mode=True)
        for key, value in zip(keys, values, strict=True):
            batch.put(key, value)
        store.write(batch, no_log)

    return lambda keys: store[keys], put


OPENERS = {OURS: table_side, PLAIN: table_side, "NumPy memmap": memmap_side, "LMDB": store_side, "RocksDB": store_side}


def child(spec: dict[str, Any]) -> dict[str, Any]:
    """Warm up for a number of batches or a length of time, then time batches that no side has seen."""
    with open(spec["group"], "w", encoding="ascii") as group:
        group.write(str(os.getpid()))
    hashemb.set_num_threads(1)
    lookup, update = OPENERS[spec["side"]](spec)
    grads = np.random.default_rng(15).standard_normal((BATCH, DIM)).astype(np.float32)
    first, until, laps = digest(lookup(keys_for(spec, 0)[:CHECKED])), time.monotonic() + WARM_SECONDS, []
    read, size = 0, int(BATCH * SHARES.get(spec["side"], 1.0))
    for number in range(1, 1 + spec["warm"] + spec["batches"]):
        is_warm_up = number <= spec["warm"]
        if is_warm_up and time.monotonic() > until:
            continue
        keys, before, clock = keys_for(spec, number)[:size], bytes_read(), Clock()
        vectors = lookup(keys)
        clock.lap("lookup")
        if spec["what"] == "train":
            update(keys, vectors, grads[:size])
            clock.lap("update")
        if not is_warm_up:
            laps.append({**clock.seconds, "cpu": clock.cpu_seconds})
            read += bytes_read() - before
    pages = np.unique(rows_of_a_batch(spec) * DIM * 4 // 4096).size
    return {"laps": laps, "first_sha256": first, "pages": pages, "pages_read": read / len(laps) / 4096 * (BATCH / size)}


def rows_of_a_batch(spec: dict[str, Any]) -> Any:
    with hashemb.open(os.path.join(spec["directory"], "t.emb"), huge_pages=False) as table:
        return table.rows(keys_for(spec, 1))


def bytes_read() -> int:
    with open("/proc/self/io", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes"))


if __name__ == "__main__":
    print(json.dumps(child(json.loads(sys.argv[1]))))
