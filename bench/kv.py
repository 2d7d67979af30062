"""A table against key-value stores in which embeddings are often kept: LMDB, RocksDB and Redis.

The benchmark has a million vectors of 64 bytes. "get" fetches the vectors of 6656 random keys as one float32 array;
"put" writes them: in the stores it replaces the values, in our table it is an SGD step, which reads them too. The
stores get encoded keys, no durability (no sync, no write-ahead log) and their batch calls; Redis runs on the same
machine, on a Unix socket.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import hashemb
from bench import torch_sides, workload
from bench.harness import OURS, Clock, Mismatch, Result, Settings, Skip, available, digest, measure
from bench.workload import gradients

DIM, BATCH = 16, 256 * 26


class StoreSide:
    """A store of bytes. `get` returns the values in the order of the keys; `put` takes (key, value) pairs."""

    def __init__(self, name: str, get: Callable[[Any], Any], put: Callable[[Any], Any]) -> None:
        self.name = self.group = name
        self.get, self.put = get, put

    def prepare(self, batch: tuple[Any, Any]) -> tuple[list[bytes], list[tuple[bytes, bytes]]]:
        keys, vectors = batch
        names = encode(keys)
        return names, list(zip(names, encode(vectors), strict=True))

    def vectors(self, names: list[bytes]) -> Any:
        return np.frombuffer(b"".join(self.get(names)), np.float32).reshape(-1, DIM)

    def run(self, prepared: Any, clock: Clock) -> None:
        names, pairs = prepared
        self.vectors(names)
        clock.lap("get")
        self.put(pairs)
        clock.lap("put")


class TableSide:
    """Our side: a look-up and an SGD step."""

    name = group = OURS

    def __init__(self, directory: str) -> None:
        path = os.path.join(directory, "kv.emb")
        self.table = hashemb.create(path, num_embeddings=1 << 21, embedding_dim=DIM, optimizer=hashemb.SGD(lr=0.01))

    def prepare(self, batch: tuple[Any, Any]) -> tuple[Any, Any]:
        return batch

    def run(self, prepared: Any, clock: Clock) -> None:
        keys, vectors = prepared
        self.table.lookup(keys)
        clock.lap("get")
        self.table.update(keys, vectors)
        clock.lap("put")


def run(settings: Settings) -> Iterator[Result]:
    torch_sides.set_num_threads(1)
    n, size = (2000, 256) if settings.smoke else (1 << 20, BATCH)
    keys = np.random.default_rng(12).integers(0, 1 << 64, n, np.uint64)
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="hashemb-kv-", dir=settings.directory) as directory:
        ours = TableSide(directory)
        for begin in range(0, n, size):
            part = keys[begin : begin + size]
            ours.table.update(part, gradients(part.size, DIM))
        stored = ours.table.lookup(keys)
        sides: list[Any] = [ours]
        closers: list[Callable[[], Any]] = []
        try:
            for name, start in (("LMDB", lmdb_side), ("RocksDB", rocksdb_side), ("Redis", redis_side)):
                with available(skipped, name):
                    sides.append(start(os.path.join(directory, name), closers))
            for side in sides[1:]:
                fill_and_check(side, keys, stored)
            vectors = gradients(size, DIM)

            def batch(number: int) -> tuple[Any, Any]:
                chosen = np.random.default_rng([6, number]).choice(n, size, replace=False)
                return keys[chosen], vectors

            rows = measure(sides, batch, units=size, repeats=settings.repeats, inner=settings.inner)
            checks = {"huge_page_bytes": workload.huge_page_bytes(ours.table)}
        finally:
            for close in closers:
                close()
        workload.drop_table(ours.table)
    point = {"vectors": n, "dim": DIM, "batch": size, "threads": 1}
    checks |= {"vectors_sha256": digest(stored), "stored": n}
    yield Result("kv", point, "key", size, rows, skipped, checks)


def encode(array: Any) -> list[bytes]:
    """Return each row of the array as bytes."""
    data, width = array.tobytes(), array[0].nbytes
    return [data[i : i + width] for i in range(0, len(data), width)]


def fill_and_check(side: StoreSide, keys: Any, stored: Any) -> None:
    """Write every vector and check that it is read back unchanged."""
    names, values = encode(keys), encode(stored)
    for begin in range(0, len(names), BATCH):
        side.put(list(zip(names[begin : begin + BATCH], values[begin : begin + BATCH], strict=True)))
    for begin in range(0, len(names), BATCH):
        if not np.array_equal(side.vectors(names[begin : begin + BATCH]), stored[begin : begin + BATCH]):
            raise Mismatch(f"{side.name}: the vectors that were put do not come back")


def lmdb_side(path: str, closers: list[Callable[[], Any]]) -> StoreSide:
    import lmdb

    store = lmdb.open(path, map_size=4 << 30, sync=False, metasync=False, writemap=True, map_async=True, lock=False)
    closers.append(store.close)

    def get(names: list[bytes]) -> list[bytes]:
        with store.begin(buffers=True) as transaction:
            return [bytes(value) for _, value in transaction.cursor().getmulti(names)]

    def put(pairs: list[tuple[bytes, bytes]]) -> None:
        with store.begin(write=True) as transaction:
            transaction.cursor().putmulti(pairs)

    return StoreSide("LMDB", get, put)


def rocksdb_side(path: str, closers: list[Callable[[], Any]]) -> StoreSide:
    import rocksdict

    options = rocksdict.Options(raw_mode=True)
    options.create_if_missing(True)
    store = rocksdict.Rdict(path, options)
    closers.append(store.close)
    no_log: Any = rocksdict.WriteOptions()
    no_log.disable_wal = True

    def put(pairs: list[tuple[bytes, bytes]]) -> None:
        batch = rocksdict.WriteBatch(raw_mode=True)
        for key, value in pairs:
            batch.put(key, value)
        store.write(batch, no_log)

    return StoreSide("RocksDB", lambda names: store[names], put)


def redis_side(path: str, closers: list[Callable[[], Any]]) -> StoreSide:
    """Start a server on a Unix socket; `closers` gets a function that ends its process."""
    import redis

    program = shutil.which("redis-server")
    if program is None:
        raise Skip("redis-server is not installed")
    os.mkdir(path)
    socket = os.path.join(path, "socket")
    options = ["--port", "0", "--unixsocket", socket, "--save", "", "--appendonly", "no", "--dir", path]
    server = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    client = redis.Redis(unix_socket_path=socket)

    def close() -> None:
        client.close()
        server.terminate()
        server.wait(timeout=30)

    closers.append(close)
    wait_for(client, server)
    return StoreSide("Redis", client.mget, lambda pairs: client.mset(dict(pairs)))


def wait_for(client: Any, server: subprocess.Popen[bytes]) -> None:
    """Wait until the server answers; raise `Skip` if it doesn't within ten seconds."""
    import redis

    for _ in range(200):
        try:
            client.ping()
            return
        except redis.ConnectionError:
            if server.poll() is not None:
                break
            time.sleep(0.05)
    raise Skip(f"redis-server did not start (exit status {server.poll()})")
