"""A trainer whose table is many times larger than its memory control group, for test_memory_limit.py.

    $ python tests/memory_limited.py PATH SECONDS GROUP

It joins GROUP (the file to write its process id to), creates the table, and until the time is over looks up and updates
keys from the whole table, takes snapshots and exports deltas. It prints its counts as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np

import hashemb

NUM_ROWS, DIM, BATCH = 1 << 20, 64, 1000  # 256 MiB of weights, and as much state


def train(path: Path, seconds: float) -> dict[str, float]:
    rng, end = np.random.default_rng(0), time.monotonic() + seconds
    counts = {"batches": 0, "snapshots": 0, "deltas": 0, "longest_batch_s": 0.0}
    with hashemb.create(path, num_embeddings=NUM_ROWS, embedding_dim=DIM, optimizer=hashemb.Adagrad(lr=0.1)) as table:
        last: hashemb.DeltaInfo | None = None
        while time.monotonic() < end or not counts["deltas"]:
            began = time.monotonic()
            keys = rng.integers(0, 1 << 62, BATCH)
            table.update(keys, np.ones((BATCH, DIM), np.float32) - table.lookup(keys))
            counts["longest_batch_s"] = max(counts["longest_batch_s"], time.monotonic() - began)
            counts["batches"] += 1
            if counts["batches"] % 40 == 20:
                table.snapshot(path.with_suffix(".snapshot"))
                shutil.rmtree(path.with_suffix(".snapshot"))
                counts["snapshots"] += 1
            if counts["batches"] % 40 == 39:
                last = table.export_delta(last, path.with_suffix(".delta"))
                path.with_suffix(".delta").unlink()
                counts["deltas"] += 1
        counts["rows_touched"] = table.stats().rows_touched
    return counts


def main() -> None:
    path, seconds, group = sys.argv[1:]
    Path(group).write_text(str(os.getpid()))
    print(json.dumps(train(Path(path), float(seconds))))


if __name__ == "__main__":
    main()
