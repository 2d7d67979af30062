"""Table files that are not regular files, links, foreign files in a table, and creations that are undone."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hashemb
from hashemb import errors
from hashemb._files import writers as _writers

OPTIONS: dict[str, Any] = {"num_embeddings": 3000, "embedding_dim": 4}
ONES = np.ones((100, 4), np.float32)
LIMIT_S = 60  # an open that waits for the other end of a FIFO would wait forever

#: Make every call that reads a table or a delta by its path; print how each ended.
CALLS = """
import json, signal, sys
import hashemb
signal.alarm(int(sys.argv[1]))
t, delta, new, empty = sys.argv[2:]
calls = {
    "open r": lambda: hashemb.open(t).close(),
    "info": lambda: hashemb.info(t),
    "verify": lambda: "; ".join(map(str, hashemb.verify(t))),
    "restore": lambda: hashemb.restore(t, new),
    "follow": lambda: hashemb.follow(t, empty),
    "open r+": lambda: hashemb.open(t, "r+").close(),
    "delta_info": lambda: hashemb.delta_info(delta),
    "verify delta": lambda: "; ".join(map(str, hashemb.verify(delta))),
    "apply_delta": lambda: hashemb.apply_delta(t, delta),
}
ended = {}
for name, call in calls.items():
    try:
        ended[name] = ["", str(call())]
    except hashemb.errors.HashembError as error:
        ended[name] = [type(error).__name__, str(error)]
print(json.dumps(ended))
"""
ARRAYS = {"open r", "open r+", "verify", "restore", "apply_delta"}
#: The calls that read a file; those that only need other files work without it.
READ_BY = {
    "meta.json": ARRAYS | {"info", "follow"},
    "control": ARRAYS | {"info"},
    "weight.npy": ARRAYS,
    "accumulator.npy": ARRAYS,
    "blocks.npy": ARRAYS,
    "lock": {"open r+", "verify", "restore", "apply_delta"},
    "history.json": ARRAYS | {"follow"},
    "snapshot.json": {"info", "verify", "restore"},
    "checksums.npy": {"verify", "restore"},
    "saving.json": set(),
    "0.delta": {"delta_info", "verify delta", "apply_delta"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a snapshot `t`, a delta `0.delta` that follows it, and an empty directory `empty`."""
    folder = tmp_path_factory.mktemp("made")
    with hashemb.create(folder / "source", **OPTIONS) as table:
        table.update(np.arange(100), ONES)
        table.snapshot(folder / "t")
        table.update(np.arange(100), ONES)
        table.export_delta(folder / "t", folder / "0.delta")
    shutil.rmtree(folder / "source")
    (folder / "empty").mkdir()
    return folder


def ends(folder: Path) -> dict[str, list[str]]:
    """Return how every call on the contents of a folder ends."""
    paths = [folder / "t", folder / "0.delta", folder / "new", folder / "empty"]
    command = [sys.executable, "-c", CALLS, str(LIMIT_S), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * LIMIT_S)
    assert done.returncode != -signal.SIGALRM, "it waits for ever"
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", READ_BY)
def test_a_fifo_in_the_place_of_a_file(tmp_path: Path, made: Path, name: str) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    file = tmp_path / name if name == "0.delta" else tmp_path / "t" / name
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    for call, (error, message) in ends(tmp_path).items():
        if call not in READ_BY[name]:
            assert error == "", (call, message)
        elif call.startswith("verify"):
            assert file.name in message, (call, message)
        else:
            assert error in ("CorruptTableError", "FormatError"), (call, message)
            assert file.name in message, (call, message)
            assert "found a FIFO" in message or call == "restore", (call, message)  # reports like `verify`
    assert file.is_fifo()


def test_canary_with_regular_files_every_call_works(tmp_path: Path, made: Path) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    assert {call: message for call, (error, message) in ends(tmp_path).items() if error} == {}


@pytest.mark.parametrize("kind", ["socket", "device", "directory", "loop"])
@pytest.mark.parametrize("name", ["meta.json", "weight.npy", "history.json"])
def test_other_files_that_are_none(tmp_path: Path, made: Path, kind: str, name: str) -> None:
    shutil.copytree(made / "t", tmp_path / "t")
    file = tmp_path / "t" / name
    file.unlink()
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as made_there:
            made_there.bind(str(file))
    elif kind == "directory":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero" if kind == "device" else name)
    found = {"loop": "a symbolic link that leads nowhere"}.get(kind, f"a {kind}")
    with pytest.raises(errors.FormatError, match=rf"{name}: expected a regular file, found {found}"):
        hashemb.open(tmp_path / "t")


@pytest.mark.parametrize("kind", ["directory", "device"])
def test_what_is_given_as_a_delta_and_is_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path if kind == "directory" else "/dev/zero"
    with pytest.raises(errors.FormatError, match=f"expected a regular file, found a {kind}"):
        hashemb.delta_info(path)


# ---- links ----


@pytest.fixture
def linked(tmp_path: Path, made: Path) -> Path:
    """Make a copy of the snapshot in which every file is a link to one elsewhere, as in the cache of a model hub."""
    shutil.copytree(made / "t", tmp_path / "blobs")
    (tmp_path / "t").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "t" / file.name).symlink_to(f"../blobs/{file.name}")
    return tmp_path


def test_links_are_followed_by_readers(linked: Path, made: Path) -> None:
    with hashemb.open(linked / "t") as table, hashemb.open(made / "t") as expected:
        np.testing.assert_array_equal(table.lookup(np.arange(200)), expected.lookup(np.arange(200)))
        assert table.stats().disk_bytes == expected.stats().disk_bytes
    assert hashemb.info(linked / "t").snapshot == hashemb.info(made / "t").snapshot
    assert hashemb.verify(linked / "t") == []
    hashemb.restore(linked / "t", linked / "new")
    with hashemb.open(linked / "new", "r+") as table:
        table.update(np.arange(100), ONES)


@pytest.mark.parametrize("name", ["weight.npy", "blocks.npy", "control", "lock"])
def test_links_are_refused_by_writers(tmp_path: Path, made: Path, name: str) -> None:
    shutil.copytree(made / "t", tmp_path / "t")
    target = (tmp_path / "t" / name).rename(tmp_path / "target")
    (tmp_path / "t" / name).symlink_to(target)
    before = target.read_bytes()
    with pytest.raises(errors.ReadOnlyTableError, match=rf'{name}: is a symbolic link.*open the table with mode="r"'):
        hashemb.open(tmp_path / "t", "r+")
    if name == "lock":
        with pytest.raises(errors.ReadOnlyTableError, match="lock: is a symbolic link"):
            hashemb.restore(made / "t", tmp_path / "t", replace=True)
    assert target.read_bytes() == before


# ---- leftovers ----


def test_only_what_replacing_a_file_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "t"
    hashemb.create(path, **OPTIONS).close()
    mine = ["notes.tmp", "history.json.tmp", "history.json.old.tmp", "model.json.77.tmp", "history.json.7.tmp.tmp"]
    for name in (*mine, "saving.json", "saving.json.77.tmp", "history.json.78.tmp"):
        (path / name).write_text("mine")
    (path / "history.json.79.tmp").mkdir()
    hashemb.open(path, "r+").close()
    own = {"meta.json", "control", "lock", "weight.npy", "accumulator.npy", "blocks.npy"}
    assert set(os.listdir(path)) - own == {*mine, "history.json.79.tmp"}


# ---- the permissions of new directories ----


def test_the_umask_does_not_change_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The umask is global to the process: files created by other threads could become world-writable. A thread watches
    it.
    """
    stop, seen, real = threading.Event(), set(), os.umask

    def slow_umask(mask: int) -> int:
        before = real(mask)
        time.sleep(0.05)
        return before

    def watch() -> None:
        while not stop.is_set():
            with open("/proc/self/status") as file:
                seen.update(line.split()[1] for line in file if line.startswith("Umask:"))

    monkeypatch.setattr(os, "umask", slow_umask)
    before = real(0o027)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for number in range(10):
            hashemb.create(tmp_path / f"t{number}", num_embeddings=10, embedding_dim=1).close()
    finally:
        stop.set()
        watcher.join()
        real(before)
    assert seen == {"0027"}
    assert (tmp_path / "t0").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "t0" / "weight.npy").stat().st_mode & 0o777 == 0o640


# ---- tables that cannot be opened after creation ----


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[BaseException]]:
    """Make the opening of a table raise the exceptions in the list, at its last step."""
    raised: list[BaseException] = [OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))]
    real = _writers.Writers._unseal

    def unseal(self: Any, **fields: Any) -> None:
        real(self, **fields)
        if raised and not fields:
            raise raised.pop()

    monkeypatch.setattr(_writers.Writers, "_unseal", unseal)
    return raised


@pytest.mark.parametrize("error", [OSError(errno.ENOMEM, "no"), KeyboardInterrupt()])
def test_a_table_that_was_made_and_cannot_be_opened_is_removed(
    tmp_path: Path, failing: list[BaseException], error: BaseException
) -> None:
    failing[:] = [error]
    with pytest.raises(type(error)):
        hashemb.create(tmp_path / "t", **OPTIONS)
    assert os.listdir(tmp_path) == []
    hashemb.create(tmp_path / "t", **OPTIONS).close()


def test_address_space_that_is_short(tmp_path: Path) -> None:
    code = """
import resource, sys, hashemb
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
try:
    hashemb.create(sys.argv[1], num_embeddings=2**32, embedding_dim=4)
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "t")], capture_output=True, text=True)
    assert "do not fit the address space" in done.stdout, done.stderr
    assert os.listdir(tmp_path) == []


def test_a_table_that_was_there_before_stays(tmp_path: Path, failing: list[BaseException]) -> None:
    error = failing.pop()
    hashemb.create(tmp_path / "t", **OPTIONS).close()
    failing.append(error)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        hashemb.create(tmp_path / "t", **OPTIONS, exist_ok=True)
    assert hashemb.verify(tmp_path / "t") == []


@pytest.mark.parametrize("still_open", [True, False])
def test_a_table_that_another_process_uses_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, still_open: bool
) -> None:
    """The other process has the table open for writing, or has written to it and closed it."""
    others = []

    def open_beside(path: str, mode: Any, **options: Any) -> Any:
        others.append(hashemb.open(path, "r+"))
        if not still_open:
            others[0].update([7], ONES[:1])
            others[0].close()
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(sys.modules["hashemb.create"], "EmbeddingTable", open_beside)
    monkeypatch.setattr(hashemb, "open", lambda path, mode: hashemb.EmbeddingTable(path, mode))
    with pytest.raises(OSError, match="Cannot allocate memory"):
        hashemb.create(tmp_path / "t", **OPTIONS)
    others[0].close()
    assert hashemb.verify(tmp_path / "t") == []
    assert hashemb.info(tmp_path / "t").step == (0 if still_open else 1)
