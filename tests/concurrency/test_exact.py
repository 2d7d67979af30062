"""isolation="exact": no update of another process is lost, and the result equals that of sequential batches."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import in_processes

import hashemb

WRITERS, NUM_FEW = 4, 48


# ---- lost updates ----


def count_up(path: str, isolation: Any, num_threads: int, kind: str, batches: int) -> int:
    """Add ones to a few rows, `batches` times; return how often each key occurs in a batch."""
    hashemb.set_num_threads(num_threads)
    with hashemb.open(path, "r+", isolation=isolation) as table:
        keys = np.tile(np.arange(NUM_FEW), 256)  # enough for three threads, and full of duplicates
        for _ in range(batches):
            if kind == "bags":  # of two keys each, whose gradient is that of the bag
                offsets = np.arange(0, keys.size + 1, 2)
                table.update(keys, np.ones((offsets.size - 1, 4), np.float32), offsets=offsets)
            elif kind == "distinct":
                table.update(keys[:NUM_FEW], np.ones((NUM_FEW, 4), np.float32))
            else:
                table.update(keys, np.ones((keys.size, 4), np.float32))
    return 1 if kind == "distinct" else 256


def count_in_all(path: Path, isolation: Any, num_threads: int, kind: str, batches: int, method: str) -> tuple[Any, Any]:
    """Return the result of `WRITERS` processes that count concurrently, and the expected result."""
    options: dict[str, Any] = {"optimizer": hashemb.SGD(lr=1.0), "init": hashemb.Zeros()}
    hashemb.create(path, num_embeddings=2**20, embedding_dim=4, **options).close()
    work = (str(path), isolation, num_threads, kind, batches)
    occurrences = in_processes(count_up, [work] * WRITERS, method=method)
    with hashemb.open(path) as table:
        assert np.unique(table.rows(np.arange(NUM_FEW))).size == NUM_FEW
        assert table.step == WRITERS * batches
        return -table.lookup(np.arange(NUM_FEW)), np.full((NUM_FEW, 4), sum(occurrences) * batches, np.float32)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("kind", ["distinct", "duplicates", "bags"])
def test_exact_loses_no_update(tmp_path: Path, num_threads: int, kind: str) -> None:
    """The sum is exact in float32, so a single lost update is visible."""
    found, expected = count_in_all(tmp_path / "t", "exact", num_threads, kind, 100, "forkserver")
    assert expected[0, 0] < 2**24
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_exact_loses_no_update_however_processes_are_started(tmp_path: Path, method: str) -> None:
    found, expected = count_in_all(tmp_path / "t", "exact", 2, "duplicates", 20, method)
    np.testing.assert_array_equal(found, expected)


def test_what_hogwild_loses(tmp_path: Path) -> None:
    """Losses are not specified, so they are printed. No element gains, and none falls below what one writer added."""
    found, expected = count_in_all(tmp_path / "t", "hogwild", 1, "distinct", 2000, "forkserver")
    lost = 1 - found.sum() / expected.sum()
    print(f"hogwild lost {100 * lost:.3f} % of {WRITERS} writers' updates to the same rows")
    assert (found == np.round(found)).all()
    assert (found <= expected).all()
    assert (found >= 1).all()


# ---- sequential order ----


class RecordingCore:
    """The core of a table that records the step of each of its batches."""

    def __init__(self, core: Any) -> None:
        self.core, self.steps = core, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.core, name)

    def apply(self, plan: Any, *options: Any) -> int:
        need = int(self.core.apply(plan, *options))
        if not need:
            self.steps.append(plan.step)
        return need


def batch_of(writer: int, number: int, dim: int) -> tuple[Any, Any, dict[str, Any]]:
    """Make batch `number` of a writer: from few keys, for one thread, to enough for many; every third has bags."""
    rng = np.random.default_rng([31, writer, number])
    size = int(rng.choice([1, 300, 5000, 9000, 20_000]))
    keys = rng.integers(0, 40_000, size)
    if number % 3:
        return keys, rng.standard_normal((size, dim), np.float32), {}
    offsets = np.append(np.arange(0, size, 7), size)
    return keys, rng.standard_normal((offsets.size - 1, dim), np.float32), {"offsets": offsets, "pooling": "mean"}


def train_exactly(path: str, writer: int, num_threads: int, batches: int) -> list[int]:
    """Train, and return the steps of the writer's batches."""
    hashemb.set_num_threads(num_threads)
    with hashemb.open(path, "r+", isolation="exact") as table:
        core = RecordingCore(table._core)
        table._core = core  # type: ignore[assignment]
        for number in range(batches):
            keys, grads, bags = batch_of(writer, number, table.embedding_dim)
            table.update(keys, grads, **bags)
    return core.steps


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [(1, 1, 1), (3, 3, 3), (1, 2, 3)])
def test_exact_is_one_batch_after_the_other_by_step(tmp_path: Path, dtype: Any, threads: tuple[int, ...]) -> None:
    """The result of Adagrad depends on the order; weight decay and rounding depend on the step."""
    live, replayed, batches = tmp_path / "live", tmp_path / "replayed", 30
    options: dict[str, Any] = {"optimizer": hashemb.Adagrad(lr=0.1, weight_decay=1e-3), "num_hashes": 2, "seed": 9}
    hashemb.create(live, num_embeddings=50_021, embedding_dim=5, dtype=dtype, **options).close()
    shutil.copytree(live, replayed)
    work = [(str(live), writer, n, batches) for writer, n in enumerate(threads)]
    done = in_processes(train_exactly, work)
    origin = {step: (writer, number) for writer, steps in enumerate(done) for number, step in enumerate(steps)}
    assert sorted(origin) == list(range(1, len(threads) * batches + 1))
    changes = sum(origin[step][0] != origin[step + 1][0] for step in range(1, len(origin)))
    assert changes >= len(threads), "the writers hardly met"
    with hashemb.open(replayed, "r+") as table, hashemb.open(live) as found:
        for step in sorted(origin):
            keys, grads, bags = batch_of(*origin[step], table.embedding_dim)
            table.update(keys, grads, **bags)
        np.testing.assert_array_equal(found.weight, table.weight)
        for name, array in table.state.items():
            np.testing.assert_array_equal(found.state[name], array, err_msg=name)
        assert found.stats().rows_touched == table.stats(exact=True).rows_touched
