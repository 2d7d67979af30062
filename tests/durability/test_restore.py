"""Restoring a table from a snapshot gives the same bits atomically and keeps the old table, or changes nothing."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_full_disk import fill, mounted

import hashemb
from hashemb import errors, restore, verify
from hashemb._files import building as _building
from hashemb._files import directory as _directory

KEYS = np.arange(300)
OPTIONS: dict[str, Any] = {
    "num_embeddings": 5000,
    "embedding_dim": 8,
    "optimizer": hashemb.Adagrad(lr=0.1, weight_decay=0.01),
}


def train(table: hashemb.EmbeddingTable, seed: int) -> None:
    rng = np.random.default_rng(seed)
    table.update(KEYS, rng.normal(size=(300, table.embedding_dim)).astype(np.float32))


def content(path: Path) -> dict[str, Any]:
    """Return the complete contents of a table."""
    with hashemb.open(path) as table:
        arrays = {"weight": table.weight, "blocks": table._files.arrays["blocks"], **table.state}
        return {name: array.tobytes() for name, array in arrays.items()} | {"step": table.step, "lr": table.lr}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Make a table `t` at step 3 and its snapshot `s` of step 2."""
    with hashemb.create(tmp_path / "t", **OPTIONS) as table:
        for step in range(2):
            train(table, step)
        table.lr = 0.05
        table.snapshot(tmp_path / "s", extra={"position": 600})
        train(table, 2)
    return tmp_path


# ---- results ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_table(tmp_path: Path, dtype: str) -> None:
    """The table verifies, has the same bits, and further training gives the same bits as if nothing had been lost."""
    with hashemb.create(tmp_path / "t", dtype=dtype, **OPTIONS) as table:
        train(table, 0)
        info = table.snapshot(tmp_path / "s")
        train(table, 1)
    assert restore(tmp_path / "s", tmp_path / "new") is None
    assert content(tmp_path / "new") == content(tmp_path / "s")
    assert verify(tmp_path / "new") == []
    assert verify(tmp_path / "s") == []
    with hashemb.open(tmp_path / "new", "r+") as table:
        assert table.recovered is None
        train(table, 1)
    now, before = content(tmp_path / "new"), content(tmp_path / "t")
    assert now == {**before, "blocks": now["blocks"]}
    found = hashemb.info(tmp_path / "new")
    assert found.snapshot is None
    assert (found.clean, found.step, found.id) == (True, 2, hashemb.info(tmp_path / "t").id)
    assert _directory.read_history(str(tmp_path / "new")).last == info.point


def test_holes_stay_holes(tmp_path: Path) -> None:
    with hashemb.create(tmp_path / "t", num_embeddings=2**31, embedding_dim=16) as table:
        train(table, 0)
        table.snapshot(tmp_path / "s")
    calls: list[tuple[int, int]] = []
    restore(tmp_path / "s", tmp_path / "new", progress=lambda done, total: calls.append((done, total)))
    assert hashemb.info(tmp_path / "new").disk_bytes <= hashemb.info(tmp_path / "t").disk_bytes
    assert calls[-1] == (300, 300)
    with hashemb.open(tmp_path / "t") as old, hashemb.open(tmp_path / "new") as new:
        np.testing.assert_array_equal(old.lookup(KEYS), new.lookup(KEYS))


def test_an_empty_table(tmp_path: Path) -> None:
    with hashemb.create(tmp_path / "t", num_embeddings=1, embedding_dim=1) as table:
        table.snapshot(tmp_path / "s")
    restore(tmp_path / "s", tmp_path / "new")
    assert verify(tmp_path / "new") == []


def test_in_place_of_another(made: Path) -> None:
    """The old table is kept under the first free name; other files in its directory are copied along."""
    (made / "t" / "model.json").write_text("of the table")
    (made / "t" / "notes").write_text("mine")
    (made / "s" / "model.json").write_text("of the snapshot")
    before = content(made / "t")
    with hashemb.open(made / "t") as reader:
        seen = reader.lookup(KEYS)
        assert restore(made / "s", made / "t", replace=True) == f"{made / 't'}.damaged-1"
        np.testing.assert_array_equal(reader.lookup(KEYS), seen)
    assert content(made / "t") == content(made / "s")
    assert content(made / "t.damaged-1") == before
    assert ((made / "t" / "model.json").read_text(), (made / "t" / "notes").read_text()) == ("of the snapshot", "mine")
    assert restore(made / "s", made / "t", replace=True) == f"{made / 't'}.damaged-2"
    assert sorted(f.name for f in made.iterdir()) == ["s", "t", "t.damaged-1", "t.damaged-2"]


@pytest.mark.parametrize("file", ["meta.json", "control", "lock", "weight.npy", "blocks.npy"])
def test_in_place_of_the_damaged(made: Path, file: str) -> None:
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(b"\0" * 100)):
        damage(made / "t" / file)
        assert verify(made / "t") != []
        aside = restore(made / "s", made / "t", replace=True)
        assert aside is not None
        assert verify(made / "t") == []
        assert content(made / "t") == content(made / "s")
        assert verify(aside) != []


def test_by_a_link(made: Path) -> None:
    """The target of the link is replaced."""
    (made / "link").symlink_to("t")
    assert restore(made / "s", made / "link", replace=True) == f"{made / 't'}.damaged-1"
    assert (made / "link").is_symlink()
    assert hashemb.info(made / "link").step == 2


def test_a_snapshot_opened_but_not_trained(made: Path) -> None:
    hashemb.open(made / "s", "r+").close()
    restore(made / "s", made / "new")
    assert content(made / "new") == content(made / "s")


# ---- refused ----


def names(directory: Path) -> list[str]:
    return sorted(file.name for file in directory.iterdir())


def test_refused(made: Path) -> None:
    """Nothing is changed and nothing is left behind."""
    (made / "d").mkdir()
    (made / "d" / "mine").write_text("keep")
    before, all_names = content(made / "t"), names(made)
    with pytest.raises(FileExistsError, match="already something"):
        restore(made / "s", made / "t")
    with pytest.raises(FileNotFoundError, match="directory to create"):
        restore(made / "s", made / "nowhere" / "t")
    with pytest.raises(FileNotFoundError, match="no table at this path"):
        restore(made / "nowhere", made / "new")
    with pytest.raises(errors.FormatError, match="not a hashemb table: it is not replaced"):
        restore(made / "s", made / "d", replace=True)
    with pytest.raises(ValueError, match="both the snapshot and the table"):
        restore(made / "s", made / "s", replace=True)
    with pytest.raises(ValueError, match=r"not a snapshot: it holds no file snapshot\.json"):
        restore(made / "t", made / "new")
    with hashemb.open(made / "s", "r+") as table:
        train(table, 5)
    with pytest.raises(ValueError, match="has been written since it was taken at step 2: it is at step 3"):
        restore(made / "s", made / "new")
    assert content(made / "t") == before
    assert names(made) == all_names


def test_refused_while_a_writer_is_at_work(made: Path) -> None:
    with hashemb.open(made / "t", "r+"), pytest.raises(errors.HashembError, match="open for writing"):
        restore(made / "s", made / "t", replace=True)
    assert names(made) == ["s", "t"]
    assert restore(made / "s", made / "t", replace=True) is not None


def test_refused_from_a_snapshot_that_changes_meanwhile(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hashemb._files import blocks as _blocks

    real, opened = _blocks.checksums, []

    def checksums(data: Any) -> Any:
        if not opened:
            opened.append(hashemb.open(made / "s", "r+"))
            train(opened[0], 7)
        return real(data)

    monkeypatch.setattr(_blocks, "checksums", checksums)
    with pytest.raises(errors.CorruptTableError, match="cannot be restored from"):
        restore(made / "s", made / "new")
    opened[0].close()
    assert names(made) == ["s", "t"]


def test_a_writer_that_comes_while_it_is_replaced(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits, and must not then write to the table that has been moved aside."""
    found: list[BaseException] = []

    def open_it() -> None:
        try:
            hashemb.open(made / "t", "r+").close()
        except errors.HashembError as error:
            found.append(error)

    writer, real = threading.Thread(target=open_it), _building.take_place

    def take_place(*paths: str) -> None:
        writer.start()
        time.sleep(0.3)  # by now it waits for the lock of the old table
        real(*paths)

    monkeypatch.setattr(_building, "take_place", take_place)
    aside = restore(made / "s", made / "t", replace=True)
    writer.join()
    assert "moved or replaced" in str(found[0])
    assert aside is not None
    assert hashemb.info(aside).clean, "nobody has written to it"
    open_it()
    assert len(found) == 1


# ---- killed, or out of space ----


CHILD = """
import os, signal, sys
import hashemb
from hashemb._files import building as _building
call, left, source, path = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
owner, name = (_building, "exchange") if call == "exchange" else (os, call)
real = getattr(owner, name)
def dying(*args, **kwargs):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(owner, name, dying)
hashemb.restore(source, path, replace=True)
"""


def kill_at(call: str, number: int, made: Path) -> int:
    """Kill a child before the n-th call of a function and return its status."""
    command = [sys.executable, "-c", CHILD, call, str(number), str(made / "s"), str(made / "t")]
    return subprocess.run(command, timeout=60).returncode


@pytest.mark.parametrize("call", ["rename", "exchange", "fsync", "pwrite"])
def test_killed_before_each_step(made: Path, call: str) -> None:
    """The path has the complete old or new table, the snapshot is unharmed, and the next attempt works."""
    old, new = content(made / "t"), content(made / "s")
    step = {"rename": 1, "exchange": 1, "fsync": 4, "pwrite": 5}[call]
    number, seen = 1, set()
    while kill_at(call, number, made) == -signal.SIGKILL:
        now = content(made / "t")
        assert now in (old, new), f"{call} {number}"
        seen.add(now == new)
        if now == new:
            shutil.rmtree(made / "t")
            shutil.move(made / "t.damaged-1", made / "t")
        assert verify(made / "t") == []
        assert verify(made / "s") == []
        assert content(made / "t") == old, "what was there has not been lost"
        for left in made.glob("t.damaged-*"):  # the new table, before the exchange
            assert verify(left) == []
            shutil.rmtree(left)
        number += step
    assert number > 1
    assert False in seen
    assert (call == "fsync") >= (True in seen)
    assert content(made / "t") == new
    assert verify(made / "t") == []


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS])
def test_without_exchanging_names(made: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(one: str, other: str) -> None:
        raise OSError(code, os.strerror(code), one)

    monkeypatch.setattr(_building, "exchange", refuse)
    before = content(made / "t")
    assert restore(made / "s", made / "t", replace=True) == f"{made / 't'}.damaged-1"
    assert content(made / "t") == content(made / "s")
    assert content(made / "t.damaged-1") == before
    assert names(made) == ["s", "t", "t.damaged-1"]


def test_when_names_cannot_be_changed(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk error between the steps undoes everything."""

    def fail(one: str, other: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), one)

    before = content(made / "t")
    monkeypatch.setattr(_building, "exchange", fail)
    with pytest.raises(OSError, match="Input/output error"):
        restore(made / "s", made / "t", replace=True)
    assert content(made / "t") == before
    assert names(made) == ["s", "t"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_when_the_directory_cannot_be_synced(made: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool) -> None:
    """A replacement that is not known to be durable is undone: the old table is back."""
    real = _building.sync_directory

    def sync(path: str) -> None:
        if path == str(made):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        real(path)

    def refuse(one: str, other: str) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), one)

    before = content(made / "t")
    monkeypatch.setattr(_building, "sync_directory", sync)
    if not can_exchange:
        monkeypatch.setattr(_building, "exchange", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        restore(made / "s", made / "t", replace=True)
    assert content(made / "t") == before
    assert names(made) == ["s", "t"]


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    yield from mounted(request.param, 32, tmp_path)


def test_on_a_full_disk(small_disk: Path) -> None:
    """An error is raised, the old table is unchanged and nothing is left behind; with space the same call works."""
    with hashemb.create(small_disk / "t", num_embeddings=2**16, embedding_dim=16) as table:
        for step in range(3):
            table.update(KEYS + 300 * step, np.ones((300, 16), np.float32))
        table.snapshot(small_disk / "s")
    before = content(small_disk / "t")
    ballast = fill(small_disk)
    os.truncate(ballast, ballast.stat().st_size - (1 << 20))
    with pytest.raises(errors.NoSpaceError, match="no space left"):
        restore(small_disk / "s", small_disk / "t", replace=True)
    assert content(small_disk / "t") == before
    assert set(names(small_disk)) - {"lost+found"} == {"ballast", "s", "t"}
    ballast.unlink()
    restore(small_disk / "s", small_disk / "t", replace=True)
    assert verify(small_disk / "t") == []


def test_from_several_processes_at_once(made: Path) -> None:
    """Each keeps the old table under its own name, or gets an error that it lost the race."""
    context = multiprocessing.get_context("spawn")
    racers = [
        context.Process(target=restore, args=(made / "s", made / f"new{i % 2}"), daemon=True) for i in range(4)
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
    assert sorted(racer.exitcode for racer in racers) in ([0, 0, 1, 1], [0, 0, 0, 1])
    for i in range(2):
        assert verify(made / f"new{i}") == []
