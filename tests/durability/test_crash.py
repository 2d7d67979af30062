"""Power failures at every call (tests/crash.py): new directories are complete or absent, and flushed data is there."""

from __future__ import annotations

import os
import pickle
import shutil
import warnings

import crash
import numpy as np
import pytest
import shim
from crash import ALL, GRADS, NEW, OLD, OPTIONS

import hashemb
from hashemb._files import building as _building
from hashemb._files import directory as _directory
from hashemb._files import recovery as _recovery
from hashemb._files import writers as _writers
from hashemb._files.directory import read_history
from hashemb.errors import DeltaError

SOME, MANY = (range(7), 2), (range(60), 1)  # seeds, and the stride between the calls that are checked
many = pytest.mark.parametrize("seeds", [SOME, pytest.param(MANY, marks=pytest.mark.slow)], ids=["some", "many"])


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return shim.compiled(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def disks(library, tmp_path, monkeypatch):
    """Yield in turn the disks that power failures in an operation may leave, on a machine that has restarted."""

    def make(name, seeds):
        with shim.fast_directory(tmp_path) as work:
            (work / "root").mkdir()
            done = shim.run(library, "crash.py", str(work / "root"), str(work / "record"), name)
            assert done.returncode == 0, done.stderr
            moments, root = load(work / "record")
            for module in (_building, _directory, _recovery, _writers):
                monkeypatch.setattr(module, "boot_id", lambda: "another boot")
            for mark, disk in crash.states(moments, root, work, *seeds):
                yield mark, disk
                shutil.rmtree(disk)

    return make


def load(path):
    """Load the record of the program, whose classes were in `__main__`."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            return super().find_class("crash" if module == "__main__" else module, name)

    with open(path, "rb") as file:
        return Unpickler(file).load()


def reopened(path):
    """Open a table to write, as the next process would; a warning that the machine has restarted is expected."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*delta", RuntimeWarning)
        warnings.filterwarnings("ignore", ".*was not closed cleanly before the machine restarted", RuntimeWarning)
        return hashemb.open(path, "r+")


def twin(*updates):
    table = hashemb.reference.ReferenceTable(**OPTIONS)
    for keys, grads in updates:
        table.update(keys, grads)
    return table.lookup(ALL)


def check_works(path, *, damaged=False):
    """Check that a table reports its losses, accepts an update, and that a snapshot of it has the same contents."""
    with reopened(path) as table:
        assert table.recovered == "rebooted" or not damaged
        before, grads = table.lookup(ALL), np.ones((ALL.size, 4), np.float32)
        table.snapshot(path.parent / "copy")
        with hashemb.open(path.parent / "copy") as copy:
            np.testing.assert_array_equal(copy.lookup(ALL), before)
        table.update(ALL, grads)
        assert (table.lookup(ALL) != before).all()
    assert hashemb.info(path).clean


FIRST, SECOND = (OLD, GRADS[: OLD.size]), (NEW, GRADS)


def check_new(disks, name, made, seeds, expected):
    """Check that the directory `made` is complete or absent, and present after its mark. Return how often it was
    absent and present.
    """
    found = [0, 0]
    for mark, disk in disks(name, seeds):
        path = disk / made
        found[path.exists()] += 1
        assert path.exists() or mark != "made", disk
        if path.exists():
            with hashemb.open(path) as table:
                np.testing.assert_array_equal(table.lookup(ALL), expected)
            check_works(path)
        assert {p.name for p in disk.iterdir() if not p.name.startswith(".")} <= {"t", made, "copy"}
    return found


@many
def test_create(disks, seeds):
    found = check_new(disks, "create", "new", seeds, twin())
    assert min(found) > 10, found


@many
def test_snapshot(disks, seeds):
    found = check_new(disks, "snapshot", "s", seeds, twin(FIRST, SECOND))
    assert min(found) > 10, found


@many
def test_table_under_a_snapshot(disks, seeds):
    """The table itself keeps everything but the last update, which was not yet durable."""
    expected = twin(FIRST)[: OLD.size]
    for _, disk in disks("snapshot", seeds):
        with hashemb.open(disk / "t") as table:
            np.testing.assert_array_equal(table.lookup(OLD), expected)
        check_works(disk / "t")


@many
def test_flush(disks, seeds):
    """Flushed data is there, bit for bit; later changes may be there, row by row."""
    old = twin(FIRST, FIRST)[: OLD.size]
    before = twin(FIRST)
    lost = 0
    for mark, disk in disks("flush", seeds):
        with hashemb.open(disk / "t") as table:
            if mark:
                np.testing.assert_array_equal(table.lookup(OLD), old)
                assert table.lr == 0.05
                assert table.step >= 2
            if mark == "flushed twice":
                np.testing.assert_array_equal(table.lookup(NEW[5:]), final()[17:52])
            vectors = table.lookup(ALL)
        whole = any((vectors == state).all() for state in (before, final()))
        lost += not whole
        check_works(disk / "t", damaged=not whole)
    assert lost > 10, "no power failure lost anything: the model is at fault"


def final():
    """Return the result of `crash.flush` without a failure."""
    table = hashemb.reference.ReferenceTable(**OPTIONS)
    for keys, grads in (FIRST, FIRST):
        table.update(keys, grads)
    table.lr = 0.05
    for keys, grads in (SECOND, SECOND, SECOND, (NEW[:5], GRADS[:5])):
        table.update(keys, grads)
    return table.lookup(ALL)


def applied(replica, delta):
    """Apply the delta to a replica, unless it is applied already. Return None if the replica has lost its history, as
    a table does that was open when the machine restarted: it refuses all deltas and has to be copied again.
    """
    try:
        with reopened(replica) as table:
            hashemb.apply_delta(table, delta)
    except DeltaError as error:
        if error.reason == "gap" and not read_history(replica).points:
            return None
        if error.reason != "applied":
            raise
    with hashemb.open(replica) as table:
        return table.lookup(ALL)


@many
def test_export(disks, seeds):
    """The file is complete or absent. A complete file brings a replica to the state of the table."""
    found, expected = [0, 0], twin(FIRST, SECOND)
    for mark, disk in disks("export", seeds):
        delta = disk / "d.delta"
        found[delta.exists()] += 1
        assert delta.exists() or mark != "made"
        if delta.exists():
            np.testing.assert_array_equal(applied(disk / "base", delta), expected)
    assert min(found) > 10, found


@many
def test_apply(disks, seeds):
    """The replica is at the beginning or end of the delta, or reports a partial delta and accepts it again."""
    begin, end, found = twin(FIRST), twin(FIRST, SECOND), {"between": 0, "forgotten": 0, "taken": 0}
    for mark, disk in disks("apply", seeds):
        applying = read_history(disk / "base").applying
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*delta.*", RuntimeWarning)
            with hashemb.open(disk / "base") as replica:
                vectors = replica.lookup(ALL)
        if applying is None:
            assert any((vectors == state).all() for state in (begin, end)), disk
        assert mark != "made" or (vectors == end).all()
        after = applied(disk / "base", disk / "d.delta")
        assert applying is None or after is not None, "between, and forgotten"
        found["between" if applying else "forgotten" if after is None else "taken"] += 1
        if after is not None:
            np.testing.assert_array_equal(after, end)
    assert min(found.values()) > 5, found


@many
def test_restore(disks, seeds):
    """The table is either the complete old one or the complete snapshot, and the snapshot is unchanged."""
    old, new, found = twin(FIRST, SECOND, SECOND), twin(FIRST, SECOND), [0, 0]
    for mark, disk in disks("restore", seeds):
        for path in (disk / "t", disk / "s"):
            assert hashemb.verify(path) == []
        with hashemb.open(disk / "t") as table:
            vectors = table.lookup(ALL)
        is_new = bool((vectors == new).all())
        assert is_new or (vectors == old).all()
        assert is_new or mark != "made"
        found[is_new] += 1
        check_works(disk / "t")
    assert min(found) > 3, found


def test_space_that_was_lost_is_reserved_again(tmp_path, monkeypatch):
    """The mark of a block can survive while its space is lost; after a restart writers reserve the space again."""
    path = tmp_path / "t"
    with hashemb.create(path, **OPTIONS) as table:
        table.update(*FIRST)
        table.flush()
        copy = shutil.copytree(path, tmp_path / "crashed")  # never closed
    used = (path / "accumulator.npy").stat().st_blocks
    os.truncate(copy / "accumulator.npy", 4096)
    os.truncate(copy / "accumulator.npy", (path / "accumulator.npy").stat().st_size)
    assert (copy / "accumulator.npy").stat().st_blocks < used
    for module in (_building, _directory, _recovery, _writers):
        monkeypatch.setattr(module, "boot_id", lambda: "another boot")
    with reopened(copy):
        assert (copy / "accumulator.npy").stat().st_blocks >= used
