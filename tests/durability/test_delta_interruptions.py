"""Deltas that are killed while being applied or exported, also with concurrent writers: in the end, deltas and tables
are complete.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from delta_chains import OPTIONS, assert_same, chain, contents, files_of, train

import hashemb
from hashemb._files import directory as _directory
from hashemb._files import table_files as _table_files
from hashemb.errors import DeltaError

#: Where a child kills itself: (module or class, function, number of the last call).
APPLYING = [
    ("hashemb._files.table_files.TableFiles", "claim", 1),
    ("hashemb._points.delta", "write_history", 1),
    ("hashemb._sharing", "ClosedGate", 1),
    ("hashemb._points.delta", "_write_runs", 1),
    ("hashemb._points.delta", "_write_runs", 5),
    ("hashemb._points.delta", "_take_counters", 1),
    ("hashemb._files.table_files.TableFiles", "flush", 1),
    ("hashemb._points.delta", "write_history", 2),
]
EXPORTING = [
    ("hashemb._points.delta", "save_point", 1),
    ("hashemb._points.delta", "_count", 1),
    ("hashemb._points.delta_file", "_write_group", 2),
    ("hashemb._points.delta", "write_history", 1),
    ("os", "rename", 1),
    ("os", "rename", 2),
]
KILL = """
    import os, pydoc, signal, sys
    import hashemb
    from hashemb._files import blocks as _blocks

    _blocks.GROUP_BYTES = 1 << 14  # several groups
    owner, name, calls = pydoc.locate(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    real = getattr(owner, name)

    def killing(*args, **kwargs):
        global calls
        calls -= 1
        if not calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, killing)
"""


def killed(script: str, where: tuple[str, str, int], *arguments: Path) -> None:
    """Run a script in a process that kills itself at this call, and check that it did."""
    code = textwrap.dedent(KILL) + textwrap.dedent(script)
    command = [sys.executable, "-c", code, where[0], where[1], str(where[2]), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, f"{where} was not reached: {done.stderr}"


@pytest.mark.parametrize("where", APPLYING, ids=str)
def test_an_apply_that_was_killed_is_completed_by_another(tmp_path: Path, where: tuple[str, str, int]) -> None:
    with hashemb.create(tmp_path / "s", **OPTIONS) as source:
        chain(source, tmp_path, 3, state=True)
        expected = contents(source)
    files = files_of(tmp_path, 3)
    hashemb.create(tmp_path / "r", **OPTIONS).close()
    hashemb.apply_delta(tmp_path / "r", files[0])
    killed("hashemb.apply_delta(sys.argv[4], sys.argv[5])", where, tmp_path / "r", files[1])
    if _directory.read_history(str(tmp_path / "r")).applying:
        _half_applied_table_behaves(tmp_path, files)
    else:
        assert where[1] in ("claim", "write_history")
        hashemb.open(tmp_path / "r").close()  # must not warn
    for file in files[1:]:
        hashemb.apply_delta(tmp_path / "r", file)
    with hashemb.open(tmp_path / "r") as replica:
        assert_same(contents(replica), expected)
        assert replica.step == 9
    with pytest.raises(DeltaError, match="already"):
        hashemb.apply_delta(tmp_path / "r", files[1])


def _half_applied_table_behaves(tmp_path: Path, files: list[Path]) -> None:
    info = hashemb.delta_info(files[1])
    for mode in ("r", "r+"):
        with pytest.warns(RuntimeWarning, match=f"delta {info.id} was applied in part"):
            hashemb.open(tmp_path / "r", mode).close()
    for file in (files[0], files[2]):
        with pytest.raises(DeltaError, match=f"{info.id} was applied in part") as caught:
            hashemb.apply_delta(tmp_path / "r", file)
        assert caught.value.reason == "interrupted"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = hashemb.open(tmp_path / "r", "r+")
    with table:
        for take in (lambda: table.snapshot(tmp_path / "copy"), lambda: table.export_delta(None, tmp_path / "x.delta")):
            with pytest.raises(DeltaError, match="apply it again first"):
                take()


@pytest.mark.parametrize("where", EXPORTING, ids=str)
def test_an_export_that_was_killed(tmp_path: Path, where: tuple[str, str, int]) -> None:
    """The file is complete or absent; the changes are in the next delta from the same point."""
    with hashemb.create(tmp_path / "s", **OPTIONS) as source:
        chain(source, tmp_path, 1, state=True)
        train(source, 1)
    script = """
        with hashemb.open(sys.argv[4], "r+") as source:
            source.export_delta(sys.argv[5], sys.argv[6], state=True)
    """
    killed(script, where, tmp_path / "s", tmp_path / "0.delta", tmp_path / "killed.delta")
    assert not (tmp_path / "killed.delta").exists() or hashemb.check_delta(tmp_path / "killed.delta") == []
    with hashemb.open(tmp_path / "s", "r+") as source, hashemb.create(tmp_path / "r", **OPTIONS) as replica:
        train(source, 2)
        source.export_delta(tmp_path / "0.delta", tmp_path / "1.delta", state=True)
        for file in files_of(tmp_path, 2):
            hashemb.apply_delta(replica, file)
        assert_same(contents(replica), contents(source))


def test_what_a_killed_export_left_behind_is_removed_by_the_next(tmp_path: Path) -> None:
    with hashemb.create(tmp_path / "s", **OPTIONS) as source:
        chain(source, tmp_path, 1)
        train(source, 1)
    script = 'hashemb.open(sys.argv[4], "r+").export_delta(sys.argv[5], sys.argv[6])'
    target = tmp_path / "1.delta"
    killed(script, ("hashemb._points.delta_file", "_write_group", 1), tmp_path / "s", tmp_path / "0.delta", target)
    (left,) = tmp_path.glob(".1.delta.*.tmp")
    os.utime(left, (time.time() - 60,) * 2)
    with hashemb.open(tmp_path / "s", "r+") as source:
        source.export_delta(tmp_path / "0.delta", target)
    assert not left.exists()


def test_an_interrupted_apply_survives_a_restart_of_the_machine(tmp_path: Path) -> None:
    """A table that was not closed before a restart loses its history, but not the record of a partly applied delta."""
    with hashemb.create(tmp_path / "s", **OPTIONS) as source:
        chain(source, tmp_path, 2)
        expected = contents(source, state=False)
    files = files_of(tmp_path, 2)
    hashemb.create(tmp_path / "r", **OPTIONS).close()
    hashemb.apply_delta(tmp_path / "r", files[0])
    killed("hashemb.apply_delta(sys.argv[4], sys.argv[5])", APPLYING[4], tmp_path / "r", files[1])
    with open(tmp_path / "r" / "control", "r+b") as control:
        control.seek(128)
        control.write(b"another boot".ljust(36, b"\0"))
    with pytest.warns(RuntimeWarning, match="before the machine restarted"):
        hashemb.apply_delta(tmp_path / "r", files[1])
    with hashemb.open(tmp_path / "r") as replica:
        assert_same(contents(replica, state=False), expected)


def test_a_failed_apply_leaves_a_note_and_an_open_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error in the middle, instead of a kill, the same process continues."""
    with hashemb.create(tmp_path / "s", **OPTIONS) as source, hashemb.create(tmp_path / "r", **OPTIONS) as replica:
        chain(source, tmp_path, 1)

        def fail(self: Any) -> None:
            raise OSError("the disk is gone")

        with monkeypatch.context() as patch:
            patch.setattr(_table_files.TableFiles, "flush", fail)
            with pytest.raises(OSError, match="the disk is gone"):
                hashemb.apply_delta(replica, tmp_path / "0.delta")
        hashemb.apply_delta(replica, tmp_path / "0.delta")
        assert_same(contents(replica, state=False), contents(source, state=False))
        replica.update([1], np.ones((1, 5), np.float32))


def test_a_table_opened_while_a_delta_is_applied_gives_no_warning(tmp_path: Path) -> None:
    with hashemb.create(tmp_path / "s", **OPTIONS) as source, hashemb.create(tmp_path / "r", **OPTIONS) as replica:
        chain(source, tmp_path, 1)
        opened = []

        def look(done: int, total: int) -> None:
            assert _directory.read_history(replica.path).applying
            opened.append(hashemb.open(tmp_path / "r", "r"))

        hashemb.apply_delta(replica, tmp_path / "0.delta", progress=look)
        assert opened
        for table in opened:
            np.testing.assert_array_equal(table.lookup([1, 2, 3]), source.lookup([1, 2, 3]))
            table.close()


# ---- with concurrent writers ----

ROWS = 4096


def step_all_rows(path: str, stop: Any) -> None:
    """Take steps of 1 on every row, so that each element counts them; to be run in a child process."""
    with hashemb.open(path, "r+", isolation="exact") as table:  # so that two processes lose no updates
        keys = np.arange(ROWS * 8)
        _, first = np.unique(table.rows(keys), return_index=True)
        keys = keys[first]
        grads = np.full((len(keys), 4), -1.0, np.float32)
        while not stop.is_set():
            table.update(keys, grads)


@pytest.mark.parametrize("writers", [1, 2])
def test_a_delta_is_a_point_in_time_while_writers_go_on(tmp_path: Path, writers: int) -> None:
    """Writers step all rows alike: in every delta, every row has taken exactly the number of steps of the delta."""
    context = multiprocessing.get_context("spawn")
    options = {"num_embeddings": ROWS, "embedding_dim": 4, "init": hashemb.Zeros(), "optimizer": hashemb.SGD(lr=1.0)}
    with hashemb.create(tmp_path / "s", **options) as source, hashemb.create(tmp_path / "r", **options) as replica:
        stop = context.Event()
        processes = [context.Process(target=step_all_rows, args=(str(tmp_path / "s"), stop)) for _ in range(writers)]
        for process in processes:
            process.start()
        try:
            while source.step < 10:
                time.sleep(0.01)
            since, steps = None, []
            for number in range(8):
                since = source.export_delta(since, tmp_path / f"{number}.delta")
                steps.append(since.step)
                hashemb.apply_delta(replica, tmp_path / f"{number}.delta")
                written = replica.weight[replica.weight.any(axis=1)]
                assert len(written) > ROWS * 0.99
                assert np.unique(written).tolist() == [since.step]
        finally:
            stop.set()
            for process in processes:
                process.join(30)
                assert process.exitcode == 0
        assert len(set(steps)) > 1, "the writers did not get on meanwhile"


def test_two_exports_at_once(tmp_path: Path) -> None:
    """They wait for each other, so that sequence numbers and parents form a chain."""
    with hashemb.create(tmp_path / "s", **OPTIONS) as source:
        chain(source, tmp_path, 1)
        infos: list[hashemb.DeltaInfo] = []

        def export(name: str) -> None:
            infos.extend(source.export_delta(tmp_path / "0.delta", tmp_path / f"{name}{i}.delta") for i in range(5))

        threads = [threading.Thread(target=export, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(info.sequence for info in infos) == list(range(1, 11))
