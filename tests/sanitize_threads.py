"""The ThreadSanitizer process of sanitize.py: eight threads do everything at once, on a table of each kind in turn.

The only error that a call may raise is `ClosedTableError` after the table has been closed, which a thread does at the
end of each kind while the others continue.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import hashemb
from hashemb.errors import ClosedTableError

NUM_THREADS, LIBRARY_THREADS, DIM = 8, 3, 8
KINDS: dict[str, dict[str, Any]] = {
    "adagrad": {},
    "float16": {"dtype": "float16"},
    "hashes": {"num_hashes": 2},
    "exact": {},
    "decay": {"optimizer": hashemb.Adagrad(weight_decay=1e-3)},
    "rowwise": {"optimizer": hashemb.RowWiseAdagrad()},
    "ftrl": {"optimizer": hashemb.FTRL()},
}


class Crowd:
    """The threads of one kind of table."""

    def __init__(self, kind: str, place: Path, seconds: float, seed: int) -> None:
        self.place, self.seed, self.end = place, seed, time.monotonic() + seconds
        self.isolation: Any = "exact" if kind == "exact" else "hogwild"
        hashemb.create(place / "t", num_embeddings=1 << 15, embedding_dim=DIM, **KINDS[kind]).close()
        self.table = hashemb.open(place / "t", "r+", isolation=self.isolation)
        self.names, self.counts, self.errors = itertools.count(), Counter[str](), list[str]()
        self.is_closing = False
        self.start = threading.Barrier(NUM_THREADS)  # the first calls come at once, to test lazy initialization

    def actions(self) -> dict[str, Callable[[Any, Any], Any]]:
        table = self.table
        return {
            "lookup": lambda keys, grads: table.lookup(keys),
            "update": lambda keys, grads: table.update(keys, grads),
            "bags": self.bags,
            "prefetch": lambda keys, grads: table.prefetch(keys),
            "snapshot": self.snapshot,
            "export": self.export,
            "stats": lambda keys, grads: table.stats(exact=True),
            "flush": lambda keys, grads: table.flush(),
            "rows": lambda keys, grads: table.rows(keys),
            "lr": self.change_lr,
            "threads": lambda keys, grads: hashemb.set_num_threads(LIBRARY_THREADS),
            "reader": self.read_elsewhere,
            "writer": self.write_elsewhere,
            "hash": lambda keys, grads: hashemb.hash_keys(keys),
        }

    def bags(self, keys: Any, grads: Any) -> None:
        offsets = np.append(np.arange(0, keys.size, 7), keys.size)
        self.table.lookup(keys, offsets=offsets, pooling="mean")
        self.table.update(keys, grads[: offsets.size - 1], offsets=offsets, pooling="mean")

    def snapshot(self, keys: Any, grads: Any) -> None:
        path = self.place / f"snapshot-{next(self.names)}"
        self.table.snapshot(path)
        shutil.rmtree(path)

    def export(self, keys: Any, grads: Any) -> None:
        path = self.place / f"{next(self.names)}.delta"
        self.table.export_delta(None, path)
        path.unlink()

    def change_lr(self, keys: Any, grads: Any) -> None:
        self.table.lr = 0.01 + self.table.step % 7 / 1000

    def read_elsewhere(self, keys: Any, grads: Any) -> None:
        with hashemb.open(self.place / "t", "r") as table:
            table.lookup(keys)

    def write_elsewhere(self, keys: Any, grads: Any) -> None:
        with hashemb.open(self.place / "t", "r+", isolation=self.isolation) as table:
            table.update(keys, grads)

    def work(self, number: int) -> None:
        rng, actions = np.random.default_rng([self.seed, number]), self.actions()
        usual = ["lookup", "update", "update", "snapshot"]
        self.start.wait()
        while time.monotonic() < self.end and not self.errors:
            size = int(rng.choice([3, 100, 5000, 20_000]))
            keys = rng.integers(0, 1 << 40, size)
            keys[: size // 2] = rng.integers(0, 50, size // 2)
            what = str(rng.choice([*actions, *usual]))
            try:
                actions[what](keys, np.ones((size, DIM), np.float32))
                self.counts[what] += 1
            except ClosedTableError:
                if not self.is_closing:
                    self.errors.append(traceback.format_exc())
                return
            except Exception:
                self.errors.append(f"{what}: {traceback.format_exc()}")
                return

    def close_amid(self) -> None:
        """Close the table shortly before the others would end."""
        time.sleep(max(0.0, self.end - time.monotonic()) * 0.9)
        self.is_closing = True
        self.table.close()

    def run(self) -> None:
        threads = [threading.Thread(target=self.work, args=(number,)) for number in range(NUM_THREADS)]
        threads.append(threading.Thread(target=self.close_amid))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        problems = hashemb.verify(self.place / "t")
        if problems:
            self.errors.append(f"the table does not verify: {problems}")


def main(spec: dict[str, Any]) -> None:
    hashemb.set_num_threads(LIBRARY_THREADS)
    kinds = spec["kinds"] or list(KINDS)
    failed = False
    for kind in kinds:
        with tempfile.TemporaryDirectory(dir=spec["place"]) as place:
            crowd = Crowd(kind, Path(place), spec["seconds"] / len(kinds), spec["seed"])
            crowd.run()
        print(f"{kind}: {dict(sorted(crowd.counts.items()))}", flush=True)
        for error in crowd.errors:
            failed = True
            print(error, file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
