"""A table whose directory is moved, removed or replaced while it is open continues to use its own files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hashemb
from hashemb import errors
from hashemb._files.directory import Directory
from hashemb._files.saving import open_announced

OPTIONS: dict[str, Any] = {"num_embeddings": 10_000, "embedding_dim": 4, "seed": 3}
ONES = np.ones((100, 4), np.float32)


def tree(folder: Path) -> dict[str, bytes]:
    """Return all files of a folder except those that a live table changes in place."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_forked_child(call: Callable[[], object]) -> None:
    """Run the call in a child; fail if it raises."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            call()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.fixture
def moved(tmp_path: Path) -> Any:
    """Open a table with a snapshot `base`, move it to `moved`, and put another one with the same arguments in place."""
    table = hashemb.create(tmp_path / "t", **OPTIONS)
    table.update(np.arange(100), ONES)
    table.snapshot(tmp_path / "base")
    (tmp_path / "t").rename(tmp_path / "moved")
    with hashemb.create(tmp_path / "t", **OPTIONS) as other:
        other.update(np.arange(5000, 5100), ONES)
    with table:
        yield table


def use(table: hashemb.EmbeddingTable, folder: Path) -> None:
    """Do everything that writes to the files of a table."""
    table.update(np.arange(50, 150), ONES)
    table.snapshot(folder / "s")
    table.update(np.arange(200, 300), ONES)
    table.export_delta(folder / "s", folder / "1.delta")
    table.lr = 0.5
    table.flush()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_moved_table_writes_to_its_own_directory(tmp_path: Path, moved: hashemb.EmbeddingTable) -> None:
    before = tree(tmp_path / "t")
    use(moved, tmp_path)
    in_forked_child(lambda: moved.update(np.arange(10), ONES[:10]))
    in_forked_child(lambda: moved.snapshot(tmp_path / "of the child"))
    step, vectors = moved.step, moved.lookup(np.arange(300))
    moved.close()
    assert tree(tmp_path / "t") == before
    for path in ("t", "moved", "s", "of the child"):
        assert hashemb.verify(tmp_path / path) == []
    with hashemb.open(tmp_path / "moved") as table:
        assert (table.step, step) == (4, 4)
        np.testing.assert_array_equal(table.lookup(np.arange(300)), vectors)


def test_points_of_a_moved_table_are_not_those_of_the_other(tmp_path: Path, moved: hashemb.EmbeddingTable) -> None:
    """The other table must not accept a snapshot that is not from its past: a replica would silently differ."""
    moved.snapshot(tmp_path / "s")
    with hashemb.open(tmp_path / "t", "r+") as other:
        with pytest.raises(ValueError, match="not among the 0 in the table's history"):
            other.export_delta(tmp_path / "s", tmp_path / "x.delta")
        moved.export_delta(tmp_path / "s", tmp_path / "x.delta")


def test_a_delta_is_applied_to_a_moved_replica(tmp_path: Path) -> None:
    with hashemb.create(tmp_path / "source", **OPTIONS) as source:
        info = source.export_delta(None, tmp_path / "0.delta")
        source.update(np.arange(100), ONES)
        source.export_delta(info, tmp_path / "1.delta")
        expected = source.lookup(np.arange(200))
    with hashemb.create(tmp_path / "t", **OPTIONS) as replica:
        (tmp_path / "t").rename(tmp_path / "moved")
        hashemb.create(tmp_path / "t", **OPTIONS).close()
        before = tree(tmp_path / "t")
        for number in range(2):
            hashemb.apply_delta(replica, tmp_path / f"{number}.delta")
    assert tree(tmp_path / "t") == before
    with hashemb.open(tmp_path / "moved") as table:
        np.testing.assert_array_equal(table.lookup(np.arange(200)), expected)
    assert hashemb.follow(tmp_path / "moved", tmp_path).sequence == 1


@pytest.mark.parametrize("replaced", [False, True])
def test_a_removed_table(tmp_path: Path, replaced: bool) -> None:
    """Rows can still be trained and read; calls that need the directory report that it is gone."""
    with hashemb.create(tmp_path / "source", **OPTIONS) as source:
        source.export_delta(None, tmp_path / "0.delta")
    table = hashemb.create(tmp_path / "t", **OPTIONS)
    shutil.rmtree(tmp_path / "t")
    if replaced:
        hashemb.create(tmp_path / "t", **OPTIONS).close()
    before = tree(tmp_path / "t") if replaced else None
    table.update(np.arange(100), ONES)
    assert (table.lookup(np.arange(100)) != 0).all()
    table.flush()
    for call in (
        lambda: table.snapshot(tmp_path / "s"),
        lambda: table.export_delta(None, tmp_path / "1.delta"),
        lambda: hashemb.apply_delta(table, tmp_path / "0.delta"),
    ):
        with pytest.raises(errors.HashembError, match=r"/t: the table was removed, or its lock file was replaced"):
            call()
    table.update(np.arange(100), ONES)
    assert table.step == 2
    table.close()
    assert sorted(os.listdir(tmp_path)) == ["0.delta", "source", *(["t"] if replaced else [])]
    if replaced:
        assert tree(tmp_path / "t") == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_of_a_removed_table_is_refused(tmp_path: Path) -> None:
    """A child cannot open a lock file of its own, without which batches of parent and child would not be exclusive."""

    def child() -> None:
        with pytest.raises(errors.HashembError, match="the table was removed"):
            table.update(np.arange(10), ONES[:10])
        assert table.lookup([7]).shape == (1, 4)

    with hashemb.create(tmp_path / "t", **OPTIONS) as table:
        shutil.rmtree(tmp_path / "t")
        in_forked_child(child)
        table.update(np.arange(10), ONES[:10])
        assert table.step == 1


def test_a_lock_file_that_was_replaced(tmp_path: Path) -> None:
    """A new lock file does not exclude processes that have the old one open."""
    with hashemb.create(tmp_path / "t", **OPTIONS) as table:
        (tmp_path / "t" / "lock").unlink()
        (tmp_path / "t" / "lock").touch()
        with pytest.raises(errors.HashembError, match="its lock file was replaced"):
            table.snapshot(tmp_path / "s")
    assert os.listdir(tmp_path) == ["t"]


def test_a_relative_path_and_another_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with hashemb.create("t", **OPTIONS) as table:
        monkeypatch.chdir(tmp_path / "elsewhere")
        use(table, tmp_path)
    assert (tmp_path / "t" / "history.json").exists()
    assert os.listdir(tmp_path / "elsewhere") == []


def test_a_table_behind_a_link(tmp_path: Path) -> None:
    hashemb.create(tmp_path / "v1", **OPTIONS).close()
    (tmp_path / "live").symlink_to("v1")
    with hashemb.open(tmp_path / "live", "r+") as table:
        (tmp_path / "live").unlink()
        hashemb.create(tmp_path / "v2", **OPTIONS).close()
        (tmp_path / "live").symlink_to("v2")
        before = tree(tmp_path / "v2")
        use(table, tmp_path)
    assert tree(tmp_path / "v2") == before
    assert (tmp_path / "v1" / "history.json").exists()


# ---- identity ----


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Make a table with the history of another: its snapshot is `s`, its first delta `0.delta`."""
    with hashemb.create(tmp_path / "other", **OPTIONS) as other:
        other.export_delta(None, tmp_path / "0.delta")
        other.snapshot(tmp_path / "s")
    hashemb.create(tmp_path / "t", **OPTIONS).close()
    return tmp_path


def test_the_history_of_another_table_is_refused(foreign: Path) -> None:
    message = r"t/history\.json: expected the history of table \w{32}, found that of table \w{32}: remove the file"
    with hashemb.open(foreign / "t", "r+") as table:
        shutil.copy(foreign / "other" / "history.json", foreign / "t")
        before = tree(foreign / "t")
        for call in (
            lambda: table.snapshot(foreign / "copy"),
            lambda: table.export_delta(foreign / "s", foreign / "x.delta"),
            lambda: table.export_delta(None, foreign / "x.delta"),
            lambda: hashemb.apply_delta(table, foreign / "0.delta"),
            lambda: hashemb.follow(foreign / "t", foreign),
            lambda: hashemb.open(foreign / "t"),
        ):
            with pytest.raises(errors.CorruptTableError, match=message):
                call()
        assert tree(foreign / "t") == before
        (foreign / "t" / "history.json").unlink()
        table.snapshot(foreign / "copy")
    assert hashemb.verify(foreign / "t") == []


def test_a_writer_saves_no_rows_to_a_directory_that_took_the_place_of_a_snapshots(tmp_path: Path) -> None:
    """If the unfinished directory of a snapshot is replaced by a copy, the snapshot fails and no file changes."""
    seen = []

    def swap(done: int, total: int) -> None:
        if seen:
            return
        (building,) = tmp_path.glob(".s.*.tmp")
        building.rename(tmp_path / "moved")
        shutil.copytree(tmp_path / "moved", building)
        before = tree(building)
        writer.update(np.arange(100), ONES)
        seen.append(tree(building) == before)

    with hashemb.create(tmp_path / "t", **OPTIONS) as table, hashemb.open(tmp_path / "t", "r+") as writer:
        table.update(np.arange(100), ONES)
        with pytest.raises(OSError, match="a writer of the table could not save a row to it"):
            table.snapshot(tmp_path / "s", progress=swap)
        assert seen == [True]
        assert table.step == 2
    assert not (tmp_path / "s").exists()


def test_an_announcement_says_which_directory_it_means(tmp_path: Path) -> None:
    """An announcement of an older version, which may run at the same time, does not."""
    (tmp_path / "here").mkdir()
    with Directory(str(tmp_path / "here")) as here, Directory(str(tmp_path)) as elsewhere:
        wanted: dict[str, Any] = {"directory": here.path}
        for noted in ({}, {"identity": here.identity()}):
            open_announced({**wanted, **noted}).close()
        with pytest.raises(OSError, match="the directory of a snapshot in progress has been replaced"):
            open_announced({**wanted, "identity": elsewhere.identity()})
