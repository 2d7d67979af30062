"""Valid tables have no problems, of any kind and with any concurrent users; every defect is reported."""

from __future__ import annotations

import os
import signal
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from strategies import OPTIMIZERS
from worker import Worker

import hashemb
from hashemb import _sharing, verify
from hashemb._files import directory as _directory
from hashemb._files import format as _format
from hashemb._files import lineage
from hashemb._files.format import CONTROL_DTYPE

KEYS = np.arange(300)


def train(table: hashemb.EmbeddingTable, seed: int = 0, keys: Any = KEYS) -> None:
    rng = np.random.default_rng(seed)
    table.update(keys, rng.normal(size=(len(keys), table.embedding_dim)).astype(np.float32))


def create(path: Path, **changes: Any) -> hashemb.EmbeddingTable:
    options: dict[str, Any] = {"num_embeddings": 5000, "embedding_dim": 8, "optimizer": hashemb.Adagrad(lr=0.1)}
    return hashemb.create(path, **options | changes)


def lines(path: Path) -> list[str]:
    """Return the problems found, without the directory."""
    return [str(problem).replace(f"{path}/", "") for problem in verify(path)]


# ---- valid tables ----


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_tables_in_order(tmp_path: Path, optimizer: Any, dtype: str) -> None:
    """A table is valid while open, when closed, as a snapshot, and as a snapshot that was trained further."""
    with create(tmp_path / "t", optimizer=optimizer, dtype=dtype, num_hashes=2, init=hashemb.Uniform(0.5)) as table:
        for step in range(3):
            train(table, step)
        table.snapshot(tmp_path / "s", extra={"position": [1, 2.5, "ä"]})
        table.snapshot(tmp_path / "untouched")
        train(table, 3)
        assert verify(tmp_path / "t") == []
    with hashemb.open(tmp_path / "s", "r+") as table:
        assert verify(tmp_path / "s") == []
        train(table, 4, KEYS[:20])
        assert verify(tmp_path / "s") == []
        table.snapshot(tmp_path / "s2")
    for name in ("t", "s", "s2", "untouched"):
        assert verify(tmp_path / name) == [], name


@pytest.mark.parametrize("rows", [1, 2, 65, 2**33])
@pytest.mark.parametrize("steps", [0, 1])
def test_sizes(tmp_path: Path, rows: int, steps: int) -> None:
    """The time for a table of 2^33 rows depends only on the rows that were written."""
    with create(tmp_path / "t", num_embeddings=rows, embedding_dim=3) as table:
        for step in range(steps):
            train(table, step, KEYS[:30])
        table.snapshot(tmp_path / "s")
    assert verify(tmp_path / "t") == []
    assert verify(tmp_path / "s") == []


def test_large_rows_and_huge_pages(tmp_path: Path) -> None:
    """Blocks may be larger than a page, and unwritten blocks may have space allocated around them."""
    for name, options in {
        "wide": {"num_embeddings": 20, "embedding_dim": 5000},
        "huge": {"num_embeddings": 2**18, "embedding_dim": 16, "huge_pages": True},
    }.items():
        with create(tmp_path / name, **options) as table:
            train(table, keys=KEYS[:8])
        assert verify(tmp_path / name) == []


def test_a_table_with_checks_of_no_age(tmp_path: Path) -> None:
    """The page has neither an owner nor a checksum, as in tables made before these were added."""
    with create(tmp_path / "t") as table:
        train(table)
    page = bytearray((tmp_path / "t" / "control").read_bytes())
    fields = np.frombuffer(page, _format.CONTROL_DTYPE)
    fields["table"], fields["checksum"], fields["opened"] = _format.id_bytes(""), 0, 0
    (tmp_path / "t" / "control").write_bytes(page)
    assert verify(tmp_path / "t") == []


def test_progress_counts_written_blocks(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    with create(tmp_path / "t", num_embeddings=2**25, embedding_dim=16) as table:
        train(table)
        written = np.count_nonzero(table._files.arrays["blocks"])
    assert verify(tmp_path / "t", progress=lambda done, total: calls.append((done, total))) == []
    assert calls[-1] == (written, written)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert len(calls) > 3


def test_nothing_is_written(tmp_path: Path) -> None:
    with create(tmp_path / "t") as table:
        train(table)
        table.snapshot(tmp_path / "s")
    for name in ("t", "s"):
        before = {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in (tmp_path / name).iterdir()}
        assert verify(tmp_path / name) == []
        assert {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in (tmp_path / name).iterdir()} == before


# ---- tables in use, or left by killed processes ----


def test_beside_writers(tmp_path: Path) -> None:
    """New rows, new blocks and new epochs appear all the time, with weight decay, and cause no false alarm."""
    stop, trouble = threading.Event(), []

    def write(table: hashemb.EmbeddingTable, seed: int) -> None:
        rng = np.random.default_rng(seed)
        while not stop.is_set():
            keys = rng.integers(0, 1 << 20, 500)
            table.update(keys, rng.normal(size=(500, 8)).astype(np.float32))

    options = {"num_embeddings": 2**17, "optimizer": hashemb.Adagrad(lr=0.1, weight_decay=0.1)}
    with create(tmp_path / "t", **options) as table, hashemb.open(tmp_path / "t", "r+") as other:
        train(table)
        table.snapshot(tmp_path / "0")
        with hashemb.open(tmp_path / "0", "r+") as trained:
            writers = [threading.Thread(target=write, args=(t, i)) for i, t in enumerate((table, other, trained))]
            for writer in writers:
                writer.start()
            for count in range(1, 6):
                trouble += verify(tmp_path / "t") + verify(tmp_path / "0")
                table.snapshot(tmp_path / str(count))
            stop.set()
            for writer in writers:
                writer.join()
    assert trouble == []
    for name in ("t", "0", "1", "5"):
        assert verify(tmp_path / name) == []


def test_a_killed_writer_leaves_a_table_in_order(tmp_path: Path) -> None:
    with Worker() as worker:
        worker.request("open", str(create_closed(tmp_path / "t")), "r+")
        worker.pipe.send(("call", str(tmp_path / "t"), "r+", "update", (KEYS, np.ones((300, 8))), {}))
        worker.answer()
        for _ in range(20):  # the last one is never finished
            worker.pipe.send(("call", str(tmp_path / "t"), "r+", "update", (KEYS, np.ones((300, 8))), {}))
        os.kill(worker.process.pid, signal.SIGKILL)
        worker.process.join()
    assert not hashemb.info(tmp_path / "t").clean
    assert verify(tmp_path / "t") == []


def create_closed(path: Path) -> Path:
    create(path, optimizer=hashemb.Adagrad(lr=0.1, weight_decay=0.1)).close()
    return path


def test_a_row_killed_in_its_first_update_is_in_order(tmp_path: Path) -> None:
    """State is written before the weight: the row reads as never written, but its accumulator is not zero."""
    with create(tmp_path / "t") as table:
        train(table)
        row = int(table.rows([1])[0])
    with open(tmp_path / "t" / "weight.npy", "r+b") as file:
        os.pwrite(file.fileno(), bytes(32), 4096 + 32 * row)
    assert verify(tmp_path / "t") == []


def test_a_writer_opens_a_snapshot_while_it_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that begins with an untouched snapshot ends as the check of a table."""
    with create(tmp_path / "t") as table:
        train(table)
        table.snapshot(tmp_path / "s")
    opened: list[hashemb.EmbeddingTable] = []

    def open_and_train(done: int, total: int) -> None:
        if not opened:
            opened.append(hashemb.open(tmp_path / "s", "r+"))
            train(opened[0], 1)

    from hashemb._files import blocks as _blocks

    real = _blocks.read_units

    def read(fd: int, size: int, file_bytes: int, units: Any) -> Any:
        open_and_train(0, 0)
        return real(fd, size, file_bytes, units)

    monkeypatch.setattr(_blocks, "read_units", read)
    assert verify(tmp_path / "s") == []
    opened[0].close()
    assert opened[0].mode == "r+"


def test_after_a_power_failure(tmp_path: Path) -> None:
    """Rows, marks and history may be ahead of the page; anything that the next writer repairs is no problem."""
    with create(tmp_path / "t", optimizer=hashemb.Adagrad(lr=0.1, weight_decay=0.1)) as table:
        train(table, 0, KEYS[:20])
        lost = [(tmp_path / "t" / name).read_bytes() for name in ("control", "blocks.npy")]
        table.snapshot(tmp_path / "s")
        train(table, 1)
    for name, data in zip(("control", "blocks.npy"), lost, strict=True):
        (tmp_path / "t" / name).write_bytes(data)
    boot = CONTROL_DTYPE.fields["boot_id"][1]
    poke(tmp_path / "t" / "control", boot, b"00000000-0000-0000-0000-000000000000")
    assert verify(tmp_path / "t") == []
    with pytest.warns(RuntimeWarning, match="not closed cleanly"):
        hashemb.open(tmp_path / "t", "r+").close()
    found = lines(tmp_path / "t")  # only about the decay, whose total is lost for good
    assert {line.split(":")[0] for line in found} <= {"paid.npy"}


# ---- deltas ----


def test_deltas_and_replicas(tmp_path: Path) -> None:
    with create(tmp_path / "t", optimizer=hashemb.Adagrad(lr=0.1, weight_decay=0.1)) as table:
        train(table)
        table.export_delta(None, tmp_path / "0.delta")
        train(table, 1)
        table.export_delta(tmp_path / "0.delta", tmp_path / "1.delta", state=True)
    hashemb.follow(tmp_path / "replica", tmp_path)
    for name in ("t", "replica", "0.delta", "1.delta"):
        assert verify(tmp_path / name) == [], name
    damaged = bytearray((tmp_path / "1.delta").read_bytes())
    damaged[-5000] ^= 4
    (tmp_path / "1.delta").write_bytes(damaged)
    (problem,) = verify(tmp_path / "1.delta")
    assert problem.file == str(tmp_path / "1.delta")


# ---- invalid tables ----


def poke(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), data, at)


@pytest.mark.parametrize(
    ("file", "value", "problem"),
    [
        ("weight", np.nan, "weight.npy: expected finite weights, found nan in row {row}"),
        ("weight", -np.inf, "weight.npy: expected finite weights, found -inf in row {row}"),
        ("accumulator", -1.0, "accumulator.npy: expected finite sums of squares, 0 or more, found -1.0 in row {row}"),
        ("accumulator", np.inf, "accumulator.npy: expected finite sums of squares, 0 or more, found inf in row {row}"),
        ("paid", 0.5, "paid.npy: expected values between the table's decay total and 0, found 0.5 in row {row}"),
        ("paid", -9.0, "paid.npy: expected values between the table's decay total and 0, found -9.0 in row {row}"),
        ("paid", np.nan, "paid.npy: expected values between the table's decay total and 0, found nan in row {row}"),
    ],
)
def test_impossible_values_of_a_table(tmp_path: Path, file: str, value: float, problem: str) -> None:
    with create(tmp_path / "t", optimizer=hashemb.Adagrad(lr=0.1, weight_decay=0.1)) as table:
        train(table)
        row = int(table.rows([7])[0])
    row_bytes, code = (8, "<d") if file == "paid" else (32, "<f")
    poke(tmp_path / "t" / f"{file}.npy", 4096 + row * row_bytes, struct.pack(code, value))
    assert lines(tmp_path / "t") == [problem.format(row=row)]


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 0x7C00), ("bfloat16", 0x7F80), ("bfloat16", 0xFFC1)])
def test_impossible_values_of_half_precision(tmp_path: Path, dtype: str, bits: int) -> None:
    with create(tmp_path / "t", dtype=dtype) as table:
        train(table)
        row = int(table.rows([7])[0])
    poke(tmp_path / "t" / "weight.npy", 4096 + row * 16 + 6, struct.pack("<H", bits))
    shown = "inf" if dtype == "float16" else f"bits {bits:#06x}"
    assert lines(tmp_path / "t") == [f"weight.npy: expected finite weights, found {shown} in row {row}"]


def test_ftrl_sums_of_squares(tmp_path: Path) -> None:
    """`n` must not be negative, `z` may be."""
    with create(tmp_path / "t", optimizer=hashemb.FTRL()) as table:
        train(table)
        row = int(table.rows([7])[0])
    for file in ("z", "n"):
        poke(tmp_path / "t" / f"{file}.npy", 4096 + row * 32, struct.pack("<f", -2.0))
    assert lines(tmp_path / "t") == [
        f"n.npy: expected finite sums of squares, 0 or more, found -2.0 in row {row}"
    ]  # fmt: skip


def test_epochs_of_the_future(tmp_path: Path) -> None:
    with create(tmp_path / "t") as table:
        train(table)
    poke(tmp_path / "t" / "blocks.npy", 4096 + 4, struct.pack("<I", 9))
    assert lines(tmp_path / "t") == ["blocks.npy: expected epochs up to 1, found epoch 9 of block 1"]


def test_many_problems_are_counted(tmp_path: Path) -> None:
    with create(tmp_path / "t", num_embeddings=2**17) as table:
        table.update(np.arange(2**16), np.ones((2**16, 8), np.float32))
        size = (tmp_path / "t" / "weight.npy").stat().st_size
    poke(tmp_path / "t" / "weight.npy", 4096, b"\xff" * (size - 4096))
    found = lines(tmp_path / "t")
    assert len(found) == 11
    assert found[-1] == "weight.npy: expected blocks of finite weights, found 1,014 more that are not so"


def test_a_trained_snapshot_is_checked_where_it_was_not_trained(tmp_path: Path) -> None:
    """Old blocks are checked by checksums, which cover every bit, and new ones like those of any table."""
    with create(tmp_path / "t") as table:
        train(table)
        table.snapshot(tmp_path / "s")
    with hashemb.open(tmp_path / "s", "r+") as table:
        train(table, 1, KEYS[:1])
        changed, old = (int(table.rows([key])[0]) for key in KEYS[:2])
        assert changed // 128 != old // 128, "the two rows must lie in different blocks"
    for row in (changed, old):
        poke(tmp_path / "s" / "weight.npy", 4096 + 32 * row, struct.pack("<f", 0.125))
    (line,) = lines(tmp_path / "s")
    assert line.startswith("weight.npy: expected check sum 0x")
    assert f" of block {old // 128} (rows {old // 128 * 128} to {old // 128 * 128 + 127}), found 0x" in line


def test_kinds_of_files(tmp_path: Path) -> None:
    """Pipes, directories and dangling links in place of files are reported, without waiting for them."""
    create(tmp_path / "t").close()
    (tmp_path / "t" / "lock").unlink()
    os.mkfifo(tmp_path / "t" / "lock")
    (tmp_path / "t" / "weight.npy").unlink()
    (tmp_path / "t" / "weight.npy").mkdir()
    (tmp_path / "t" / "control").unlink()
    (tmp_path / "t" / "control").symlink_to("nowhere")
    assert sorted(lines(tmp_path / "t")) == [
        "control: expected a file, found none",
        "lock: expected a file, found prw-r--r--",
        "weight.npy: expected a file, found drwxr-xr-x",
    ]


def test_what_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing is at this path"):
        verify(tmp_path / "t")
    (tmp_path / "d").mkdir()
    assert "meta.json: expected a file, found none" in lines(tmp_path / "d")
    (tmp_path / "f").write_text("hello")
    assert len(verify(tmp_path / "f")) == 1
    create(tmp_path / "t").close()
    (tmp_path / "t" / "meta.json").write_bytes(b"[" * 100_000)
    (line,) = lines(tmp_path / "t")
    assert line.startswith("meta.json: expected JSON, found 100000 bytes that are not")


def test_a_history_out_of_order(tmp_path: Path) -> None:
    with create(tmp_path / "t") as table:
        table.snapshot(tmp_path / "a")
        table.snapshot(tmp_path / "b")
    history = _directory.read_history(str(tmp_path / "t"))
    first, second = history.points
    for points, found in [((second, first), f"found {first}"), ((first, first), f"found {first}")]:
        (tmp_path / "t" / "history.json").write_bytes(lineage.History(points).encode())
        assert any(found in line for line in lines(tmp_path / "t"))
    late = lineage.Point(first.id, "snapshot", 7, 99, 0)
    (tmp_path / "t" / "history.json").write_bytes(lineage.History((late,)).encode())
    assert lines(tmp_path / "t") == [f"history.json: expected points before epoch 3, found {late}"]


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing disk is reported as a problem, not raised as an exception."""
    with create(tmp_path / "t") as table:
        train(table)

    def fail(*args: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    monkeypatch.setattr(_sharing, "read_units", fail)
    (line,) = lines(tmp_path / "t")
    assert line == "blocks.npy: expected a file that can be read, found [Errno 5] Input/output error"
