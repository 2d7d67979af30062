"""A snapshot is one moment between batches, whichever processes write and whichever are killed while it is taken."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import wait_for

import hashemb
from hashemb import _sharing

SPAWN = multiprocessing.get_context("spawn")
PAIRS, FAR, CLOCK = 1000, 10**6, 10**9
COUNTERS: dict[str, Any] = {"optimizer": hashemb.SGD(lr=1.0), "init": hashemb.Zeros()}


# ---- writers that run until they are stopped ----


def pairs_of(writer: int) -> tuple[Any, Any]:
    """Return the keys of a writer's own pairs; the two rows of a pair are anywhere in the table."""
    first = np.arange(PAIRS) + writer * PAIRS
    return first, first + FAR


def keep_writing(path: str, writer: int, isolation: Any, num_threads: int) -> None:
    """Add one, in each batch, to both rows of random pairs and to the writer's clock."""
    hashemb.set_num_threads(num_threads)
    rng, (first, second) = np.random.default_rng([17, writer]), pairs_of(writer)
    with hashemb.open(path, "r+", isolation=isolation) as table:
        while True:
            chosen = rng.integers(0, PAIRS, rng.integers(1, 5000))
            keys = np.concatenate([first[chosen], [CLOCK + writer], second[chosen]])
            table.update(keys, np.ones((keys.size, 4), np.float32))


@contextmanager
def writers(path: Path, isolation: Any, threads: tuple[int, ...]) -> Iterator[list[Any]]:
    """Yield processes that have begun to write to the table, and kill them at the end."""
    started = [
        SPAWN.Process(target=keep_writing, args=(str(path), writer, isolation, n), daemon=True)
        for writer, n in enumerate(threads)
    ]
    clocks = CLOCK + np.arange(len(threads))
    try:
        for process in started:
            process.start()
        with hashemb.open(path) as table:
            wait_for(lambda: bool((table.lookup(clocks) < -5).all()))
        yield started
        assert all(process.exitcode is None for process in started), "a writer failed"
    finally:
        for process in started:
            process.kill()
            process.join()


@pytest.mark.parametrize(("isolation", "threads"), [("hogwild", (1, 2)), ("exact", (1, 2))])
def test_snapshots_under_fire_hold_whole_batches(tmp_path: Path, isolation: Any, threads: tuple[int, ...]) -> None:
    """Both rows of each pair are equal, and the step is the number of batches in the snapshot."""
    path, clocks = tmp_path / "t", CLOCK + np.arange(len(threads))
    hashemb.create(path, num_embeddings=2**20, embedding_dim=4, **COUNTERS).close()
    last_step = -1
    with hashemb.open(path, "r+") as table:
        first, second = (np.concatenate(keys) for keys in zip(*map(pairs_of, range(len(threads))), strict=True))
        rows = table.rows(np.concatenate([first, second, clocks]))
        _, found, counts = np.unique(rows, return_inverse=True, return_counts=True)
        alone = (counts[found][: first.size] == 1) & (counts[found][first.size : 2 * first.size] == 1)
        assert alone.mean() > 0.9
        assert (counts[found][2 * first.size :] == 1).all()
        with writers(path, isolation, threads):
            for number in range(4):
                info = table.snapshot(tmp_path / f"s{number}")
                with hashemb.open(tmp_path / f"s{number}") as taken:
                    one, other = taken.lookup(first[alone]), taken.lookup(second[alone])
                    np.testing.assert_array_equal(one, other)
                    assert (one[:, 1:] == one[:, :1]).all()
                    assert info.step == taken.step == -taken.lookup(clocks)[:, 0].sum()
                    assert taken.stats(exact=True).rows_touched >= taken.stats().rows_touched - 5000 * len(threads)
                assert info.step > last_step, "nobody wrote meanwhile"
                last_step = info.step


def test_a_snapshot_begins_promptly_under_batches_that_overlap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With four writers on fewer cores there is always a batch in flight, and the gate must still close."""
    path, waited, begin = tmp_path / "t", [], _sharing.begin_point

    def timed(*args: Any) -> Any:
        began = time.perf_counter()
        try:
            return begin(*args)
        finally:
            waited.append(time.perf_counter() - began)

    monkeypatch.setattr(_sharing, "begin_point", timed)
    hashemb.create(path, num_embeddings=2**20, embedding_dim=4, **COUNTERS).close()
    with hashemb.open(path, "r+") as table, writers(path, "hogwild", (1, 1, 1, 1)):
        for number in range(5):
            table.snapshot(tmp_path / f"s{number}")
    median = statistics.median(waited)
    print(f"the gate closed after {1e3 * median:.1f} ms (median of {len(waited)}), {1e3 * max(waited):.1f} at most")
    assert median < 1.0


# ---- killed during a snapshot ----


def die_in_a_snapshot(path: str, dst: str) -> None:
    def die(done: int, total: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    hashemb.open(path, "r+").snapshot(dst, progress=die)


def kill_a_snapshot(path: Path, dst: Path) -> None:
    process = SPAWN.Process(target=die_in_a_snapshot, args=(str(path), str(dst)))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not dst.exists()


def test_a_killed_snapshot_disturbs_nobody(tmp_path: Path) -> None:
    """Its directory, its announcement and its mark in the control page remain, but nothing waits for them."""
    keys, path = np.arange(1000), tmp_path / "t"
    with hashemb.create(path, num_embeddings=2**22, embedding_dim=4, **COUNTERS) as table:
        table.update(keys, np.ones((1000, 4), np.float32))
        kill_a_snapshot(path, tmp_path / "dead")
        assert int(table._files.control["saving"][0]) > 0, "the snapshot did not die in the middle"  # type: ignore[union-attr]
        table.update(keys, np.ones((1000, 4), np.float32))
        info = table.snapshot(tmp_path / "s")
        table.update(keys, np.ones((1000, 4), np.float32))
        with hashemb.open(tmp_path / "s") as taken:
            np.testing.assert_array_equal(taken.lookup(keys), np.full((1000, 4), -2, np.float32))
        assert info.step == 2
        np.testing.assert_array_equal(table.lookup(keys), np.full((1000, 4), -3, np.float32))


def test_blocks_saved_for_a_killed_snapshot_are_not_taken_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next owner holds the lock and has announced its snapshot, but has not begun: the mark in the control page is
    still that of the killed one, and a writer that finds it must save nothing.
    """
    keys, path, begin = np.arange(1000), tmp_path / "t", _sharing.begin_point
    with hashemb.create(path, num_embeddings=2**22, embedding_dim=4, **COUNTERS) as table:
        table.update(keys, np.ones((1000, 4), np.float32))
        kill_a_snapshot(path, tmp_path / "dead")

        def late(control: Any, lock_fd: int) -> Any:
            table._files.control["saving"] = 1  # type: ignore[union-attr]
            with hashemb.open(path, "r+") as writer:
                writer.update(keys, np.ones((1000, 4), np.float32))
            return begin(control, lock_fd)

        monkeypatch.setattr(_sharing, "begin_point", late)
        table.snapshot(tmp_path / "s")
        with hashemb.open(tmp_path / "s") as taken:
            np.testing.assert_array_equal(taken.lookup(keys), np.full((1000, 4), -2, np.float32))


def test_what_a_killed_snapshot_left_in_the_table_goes_with_the_next_writer(tmp_path: Path) -> None:
    path = tmp_path / "t"
    hashemb.create(path, num_embeddings=1000, embedding_dim=4).close()
    whole = {entry.name for entry in os.scandir(path)}
    for name in ("saving.json", "saving.json.77.tmp", "history.json.78.tmp"):
        (path / name).write_bytes(b"{")
    with hashemb.open(path) as reader, hashemb.open(path, "r+") as table:
        assert reader.step == table.step == 0
        assert {entry.name for entry in os.scandir(path)} == {*whole, "inflight"}


def test_a_file_that_goes_while_the_table_is_measured_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the announcement of a just-ended snapshot made `info`, `stats` and opening for writing fail."""
    path = tmp_path / "t"
    with hashemb.create(path, num_embeddings=1000, embedding_dim=4) as table:
        size = table.stats().disk_bytes
        (path / "saving.json").write_bytes(b"{}")
        seen = list(os.scandir(path))
        (path / "saving.json").unlink()
        monkeypatch.setattr("hashemb._files.directory.os.scandir", lambda _: nullcontext(seen))
        assert table.stats().disk_bytes == hashemb.info(path).disk_bytes == size


# ---- exactly once ----


BATCHES, EVERY = 60, 7
TRAINED: dict[str, Any] = {"num_embeddings": 20_011, "embedding_dim": 4, "dtype": "bfloat16", "num_hashes": 2}


def learn(table: hashemb.EmbeddingTable, number: int) -> None:
    rng = np.random.default_rng([23, number])
    table.update(rng.integers(0, 30_000, 2000), rng.standard_normal((2000, 4), np.float32))


def train(root: str, pause_s: float) -> None:
    """Learn all batches, resuming from the last snapshot; the table that a killed trainer left is discarded."""
    snapshots = sorted(Path(root).glob("after-*"))
    shutil.rmtree(Path(root) / "live", ignore_errors=True)
    shutil.copytree(snapshots[-1], Path(root) / "live")
    with hashemb.open(Path(root) / "live", "r+") as table:
        for number in range(hashemb.info(snapshots[-1]).snapshot.extra["next"], BATCHES):
            learn(table, number)
            time.sleep(pause_s)
            if number % EVERY == EVERY - 1:
                table.snapshot(Path(root) / f"after-{number:04}", extra={"next": number + 1})


def wait_for_one_more(root: Path, process: Any) -> None:
    before = len(list(root.glob("after-*")))
    wait_for(lambda: len(list(root.glob("after-*"))) > before or process.exitcode is not None)


def test_a_killed_trainer_learns_its_data_exactly_once(tmp_path: Path) -> None:
    """The result is equal bit for bit, with an accumulator and with rounding that depends on the step."""
    rng = np.random.default_rng(4)
    adagrad = hashemb.Adagrad(lr=0.1, weight_decay=1e-4)
    with hashemb.create(tmp_path / "first", optimizer=adagrad, **TRAINED) as table:
        table.snapshot(tmp_path / "after--001", extra={"next": 0})
        for number in range(BATCHES):
            learn(table, number)
    kills = 0
    for _ in range(30):
        process = SPAWN.Process(target=train, args=(str(tmp_path), 0.002 if kills < 4 else 0.0))
        process.start()
        if kills < 4:
            wait_for_one_more(tmp_path, process)
            time.sleep(rng.uniform(0, 0.02))
            process.kill()
        process.join(60)
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            break
    assert kills >= 3
    with hashemb.open(tmp_path / "first") as expected, hashemb.open(tmp_path / "live") as found:
        assert found.step == expected.step == BATCHES
        np.testing.assert_array_equal(found.weight, expected.weight)
        for name, array in expected.state.items():
            np.testing.assert_array_equal(found.state[name], array, err_msg=name)


# ---- many threads on one object ----


def test_threads_write_read_and_take_snapshots_of_one_object(tmp_path: Path) -> None:
    keys, errors = np.arange(2000), []
    with hashemb.create(tmp_path / "t", num_embeddings=2**22, embedding_dim=4, **COUNTERS) as table:

        def work(number: int) -> None:
            try:
                for turn in range(30):
                    table.update(keys, np.ones((2000, 4), np.float32))
                    values = table.lookup(keys)
                    assert (values == np.round(values)).all()
                    if number < 2 and turn % 10 == 5:
                        table.snapshot(tmp_path / f"s{number}-{turn}")
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert errors == []
        assert table.step == 180
        np.testing.assert_array_equal(table.lookup(keys), np.full((2000, 4), -180, np.float32))
    for path in sorted(tmp_path.glob("s*-*")):
        with hashemb.open(path) as taken:
            np.testing.assert_array_equal(taken.lookup(keys), np.full((2000, 4), -taken.step, np.float32))
    assert len(list(tmp_path.glob("s*-*"))) == 6


def files_held(process: int, directory: Path) -> list[str]:
    """Return open files of a process that are in the directory, or were before they were removed."""
    found = []
    for entry in os.scandir(f"/proc/{process}/fd"):
        try:
            found.append(os.readlink(entry.path))
        except FileNotFoundError:
            continue
    return [name for name in found if name.startswith(f"{directory}/")]


def test_a_writer_lets_go_of_a_snapshot_that_is_done(tmp_path: Path) -> None:
    """Otherwise the space of a deleted snapshot would stay allocated until the writer ends."""
    path, snapshots = tmp_path / "t", tmp_path / "snapshots"
    snapshots.mkdir()
    hashemb.create(path, num_embeddings=2**20, embedding_dim=4, **COUNTERS).close()
    with writers(path, "hogwild", (1,)) as (writer,), hashemb.open(path, "r+") as table:
        seen: list[str] = []

        def wait_for_writer(_: int, __: int) -> None:
            wait_for(lambda: any("rows.log" in name for name in files_held(writer.pid, snapshots)))
            seen.extend(files_held(writer.pid, snapshots))

        table.snapshot(snapshots / "s", progress=wait_for_writer)
        assert seen
        assert not any("weight.npy" in name for name in seen)
        steps = table.step
        wait_for(lambda: table.step > steps + 3)
        assert files_held(writer.pid, snapshots) == []
